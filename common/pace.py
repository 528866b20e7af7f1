# Copyright 2026 The LIFT and PLACE distillation authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""How long is a run, what is due when, and what does it say of that before its first step?"""

import math
import os
import time
from collections.abc import Callable

from common.errors import fail
from common.train_state import TrainState

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger


logger = get_logger(__name__)

INTERVAL = 30 * 60  # seconds, where no number of steps is given


class Due:
    """When the next checkpoint or sample grid is due. All processes ask together: the first one's clock counts.

    Args:
        steps: Every so many steps; `None` is whenever [`INTERVAL`] has passed.
        agree: From what a process says to what the first one says. See [`common.ending.StopSignals`].
    """

    def __init__(self, steps: int | None, agree: Callable[[bool], bool]):
        self.steps, self.agree, self.since, self.late = steps, agree, time.monotonic(), False

    def now(self, step: int, bad: torch.Tensor | None = None) -> bool:
        """Whether it is due after this step.

        Args:
            bad: Scalar, not 0 where it must wait for a better step. It is read only when it is due.
        """
        by_clock = self.steps is None
        late = self.agree(time.monotonic() - self.since >= INTERVAL) if by_clock else step % self.steps == 0
        self.late = self.late or late
        if not self.late or (bad is not None and bad):
            return False
        self.since, self.late = time.monotonic(), False
        return True

    def __str__(self) -> str:
        return f"every {INTERVAL // 60} minutes" if self.steps is None else f"every {self.steps:,} steps"


def count_steps(steps: int, epochs: float | None, batches: float, accelerator: Accelerator) -> int:
    """Steps of the whole run.

    Args:
        steps: What they are where no number of epochs is given.
        epochs: Passes over the data, or `None`.
        batches: Of an epoch, of all processes.
    """
    if epochs is None:
        return steps
    return math.ceil(epochs * batches / accelerator.num_processes / accelerator.gradient_accumulation_steps)


def describe_start(
    accelerator: Accelerator,
    train_state: TrainState,
    teacher: torch.nn.Module | None,
    data: tuple[int, float, int],
    steps: int,
    checkpoints: Due,
    limit: int | None,
    grids: Due,
) -> None:
    """Log what a run is about to do: on what, how much, and when there will be something to see.

    One of which more steps are done than asked for ends here.

    Args:
        teacher: The one that runs in each step.
        data: Images, batches of an epoch of each process, and images of a batch. An epoch is a pass over the images.
            The first two are 0 where the data are streamed.
        steps: Of the whole run.
        checkpoints: When they are due.
        limit: How many of them are kept; `None` is all.
        grids: When they are due.
    """
    if train_state.saved > steps:
        by = "--max_train_steps or --num_train_epochs"
        fail(f"{train_state.saved:,} steps are done, and {by} says {steps:,}; pass more, or a new --output_dir")
    device = torch.cuda.get_device_name() if accelerator.device.type == "cuda" else accelerator.device.type
    if device == "cpu" and os.environ.get("ACCELERATE_USE_CPU", "").lower() not in ("1", "true"):
        logger.warning("NO GPU WAS FOUND: this run is on the CPU. See nvidia-smi, or launch with --cpu")
    logger.info(f"{accelerator.num_processes} × {device}, mixed precision {accelerator.mixed_precision}")

    student = train_state.student
    count, trained = student.model.num_parameters(), student.model.num_parameters(only_trainable=True)
    beside = ""
    if teacher is not None:
        whole = teacher.model.num_parameters()
        beside = f", {count / whole:.2%} of the teacher's {whole:,}"
    logger.info(f"the student has {count:,} parameters{beside}; {trained:,} are trained")

    images, batches, batch_size = data
    micro_batches = accelerator.gradient_accumulation_steps
    a_step = batch_size * micro_batches * accelerator.num_processes
    size, epochs = "a stream of images", ""
    if batches:
        size = f"{images:,} images, {batches:,.10g} batches an epoch"
        epochs = f", {steps * micro_batches / batches:,.1f} epochs"
    logger.info(f"{size}; {a_step:,} images a step; step {train_state.step:,} of {steps:,}{epochs}")

    moments = 2 if "8bit" in type(train_state.optimizer.optimizer).__name__ else 8
    size = sum(weight.nbytes for weight in student.state_dict().values())
    size += trained * (moments + (4 if train_state.ema is not None else 0))
    kept = "all are kept" if limit is None else f"the newest {limit} are kept"
    logger.info(f"a checkpoint of {size / 1e6:,.0f} MB {checkpoints}, {kept}; a grid of samples {grids}")
