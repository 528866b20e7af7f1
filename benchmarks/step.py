# Copyright 2026 The LIFT and PLACE distillation authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""What a training step costs beyond the work that it cannot avoid.

The script's own `main` runs on random images, and its steps are timed as a whole, with data loading, the loss,
clipping and logging. Between them the parts are timed alone, on the same models and inputs: the teacher's forward
pass, the student's forward and backward pass, the optimizer's step, and the loss on the two outputs. Steps and parts
take turns, so that a busy machine slows both. The aim: a step costs at most 1.05 times its parts, and the loss at most
2 % of the step.

    python benchmarks/step.py                                # a 78.7M teacher and its 1.6 % student at 64 pixels
    python benchmarks/step.py --small                        # a 1.2M teacher at 32 pixels, fast on a CPU
    python benchmarks/step.py --steps 50 -- --train_batch_size 32 --mixed_precision bf16 --use_8bit_adam

Flags after `--` go to the training script.
"""

import argparse
import contextlib
import importlib
import json
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from accelerate.optimizer import AcceleratedOptimizer
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.arguments import fail

from full_models import CELEBA

from device import describe_device
from lift_utils import KDLoss


UNETS = {
    False: CELEBA,
    True: {
        "sample_size": 32,
        "block_out_channels": (32, 64, 64),
        "down_block_types": ("DownBlock2D", "DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D", "UpBlock2D"),
        "norm_num_groups": 8,
    },
}


class Done(Exception):
    """Raised to leave the training loop once enough steps are timed."""


class Stopwatch:
    """Collects seconds by name. Waits for the device before and after each measurement."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}

    def time(self, name: str, function: Callable[[], object]) -> None:
        """Call the function and keep the seconds it took."""
        synchronize()
        start = time.perf_counter()
        function()
        synchronize()
        self.seconds.setdefault(name, []).append(time.perf_counter() - start)


def synchronize() -> None:
    """Wait until the GPU is idle, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Probe:
    """Replaces a script's `compute_losses` with a function that times the last step and then, alone, its parts.

    Args:
        script: The training script's module. Its functions are replaced for good.
        steps: Steps to time.
        warmup: Steps before them.
    """

    def __init__(self, script: ModuleType, steps: int, warmup: int):
        self.steps, self.warmup = steps, warmup
        self.watch, self.start, self.inputs = Stopwatch(), None, {}
        self.compute_losses, script.compute_losses = script.compute_losses, self.step
        self.make_kd_loss, script.make_kd_loss = script.make_kd_loss, self.wrap_kd_loss
        self.guarded_step, script.guarded_step = script.guarded_step, self.keep_optimizer

    def wrap_kd_loss(self, *args: Any, **kwargs: Any) -> KDLoss:
        """Stands in for `make_kd_loss`: the loss that it makes also keeps its inputs."""
        self.kd_loss = self.make_kd_loss(*args, **kwargs)

        def kd_loss(
            student_prediction: torch.Tensor, teacher_prediction: torch.Tensor, progress: float
        ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            self.inputs["loss"] = student_prediction.detach(), teacher_prediction, progress
            return self.kd_loss(student_prediction, teacher_prediction, progress)

        return kd_loss

    def keep_optimizer(self, optimizer: AcceleratedOptimizer, *step: torch.Tensor) -> None:
        """Stands in for `guarded_step`, and keeps the optimizer with the step's gradients."""
        self.optimizer = optimizer
        self.parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self.gradients = [parameter.grad for parameter in self.parameters]
        self.guarded_step(optimizer, *step)

    def step(
        self, student: torch.nn.Module, teacher: torch.nn.Module, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Stands in for `compute_losses`, which is called once per step, right after the data loading."""
        synchronize()
        now = time.perf_counter()
        if self.start is not None:
            self.watch.seconds.setdefault("whole step", []).append(now - self.start)
            self.time_parts(student, teacher)
            if len(self.watch.seconds["whole step"]) == self.steps + self.warmup:
                raise Done
        else:
            for name, model in (("student", student), ("teacher", teacher)):
                model.register_forward_pre_hook(
                    lambda _, args, kwargs, name=name: self.inputs.update({name: (args, kwargs)}), with_kwargs=True
                )
        synchronize()
        self.start = time.perf_counter()
        return self.compute_losses(student, teacher, *args, **kwargs)

    def time_parts(self, student: torch.nn.Module, teacher: torch.nn.Module) -> None:
        """Time the parts of the last step, on its inputs."""
        (student_args, student_kwargs), (teacher_args, teacher_kwargs) = self.inputs["student"], self.inputs["teacher"]

        def forward_backward() -> None:
            prediction, features = student(*student_args, **student_kwargs)
            torch.autograd.backward([prediction, *features], [torch.ones_like(x) for x in (prediction, *features)])

        def teacher_forward() -> None:
            with torch.no_grad():
                teacher(*teacher_args, **teacher_kwargs)

        def loss_alone() -> None:
            student_prediction, teacher_prediction, progress = self.inputs["loss"]
            student_prediction.requires_grad_()
            loss, _ = self.kd_loss(student_prediction, teacher_prediction, progress)
            torch.autograd.grad(loss, student_prediction)

        self.watch.time("teacher forward", teacher_forward)
        self.watch.time("student forward and backward", forward_backward)
        for parameter, gradient in zip(self.parameters, self.gradients):
            parameter.grad = gradient
        self.watch.time("optimizer step", self.optimizer.optimizer.step)
        self.optimizer.optimizer.zero_grad()
        self.watch.time("loss", loss_alone)


def write_inputs(folder: Path, config: dict, images: int) -> None:
    """Write a pipeline of random weights and a folder of random images."""
    DDPMPipeline(UNet2DModel(**config), DDPMScheduler()).save_pretrained(folder / "teacher")
    (folder / "images").mkdir()
    size = (config["sample_size"], config["sample_size"], 3)
    for index in range(images):
        pixels = np.random.default_rng(index).integers(0, 256, size, dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{index}.png")


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line, or `input_args`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--script", default="train_lift_unet", choices=["train_lift_unet"], help="script to time")
    parser.add_argument("--small", action="store_true", help="use a small pair of models")
    parser.add_argument("--steps", type=int, default=20, help="timed steps (default: 20)")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them (default: 2)")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("flags", nargs="*", help="after --: flags for the training script")
    return parser.parse_args(input_args)


def main(args: argparse.Namespace) -> None:
    """Time the steps, print the table, and write the JSON."""
    if args.threads:
        torch.set_num_threads(args.threads)
    script = importlib.import_module(args.script)

    with tempfile.TemporaryDirectory() as folder:
        write_inputs(Path(folder), UNETS[args.small], images=128)
        flags = [
            *("--pretrained_teacher_model", f"{folder}/teacher", "--train_data_dir", f"{folder}/images"),
            *("--output_dir", f"{folder}/student", "--cache_dir", f"{folder}/cache", "--report_to", "none"),
            *("--train_batch_size", "16" if args.small else "4", "--dataloader_num_workers", "0", *args.flags),
        ]
        script_args = script.parse_args(flags)
        if script_args.kd_loss == "none":
            fail("--kd_loss none has no loss to time; pass place, lift or mse")
        probe = Probe(script, args.steps, args.warmup)
        with contextlib.suppress(Done):
            script.main(script_args)

    timed = {name: values[args.warmup :] for name, values in probe.watch.seconds.items()}
    seconds = {name: statistics.median(values) for name, values in timed.items()}
    parts = zip(timed["teacher forward"], timed["student forward and backward"], timed["optimizer step"])
    # Each step is compared with the parts timed right after it: both see the machine in the same state.
    ratio = statistics.median(whole / sum(alone) for whole, alone in zip(timed["whole step"], parts))
    whole = seconds["whole step"]
    on_gpu = torch.cuda.is_available()
    peak = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    result = {
        "device": describe_device(torch.device("cuda" if on_gpu else "cpu")),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "script": args.script,
        "flags": " ".join(args.flags),
        "batch": script_args.train_batch_size,
        "milliseconds": {name: 1000 * value for name, value in seconds.items()},
        "whole / parts": ratio,
        "loss / whole": seconds["loss"] / whole,
        "images per second": script_args.train_batch_size / whole,
        "peak memory MiB": peak / 2**20,
    }
    print(f"\n{result['device']}, {result['threads']} threads, torch {result['torch']}, batch {result['batch']}, ")
    print(f"medians of {args.steps} steps\n")
    print("| part | ms |\n|---|--:|")
    for name, value in result["milliseconds"].items():
        print(f"| {name} | {value:.2f} |")
    print(f"\nwhole step / (teacher forward + student forward and backward + optimizer): {ratio:.3f}")
    print(f"loss / whole step: {result['loss / whole']:.2%}")
    print(f"images per second: {result['images per second']:.1f}")
    print(f"peak memory: {result['peak memory MiB']:,.0f} MiB ({'allocated on the GPU' if on_gpu else 'the process'})")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main(parse_args())
