# Copyright 2026 The LIFT and PLACE distillation authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""What does a training loop stand on: accelerator, models, optimizer, schedule, seeds, and the guard of a step?"""

import hashlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

from common.attention import use_xformers
from common.errors import fail, first_line
from common.processes import TIMEOUT, check_connected
from common.sharding import shard

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.logging import get_logger
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import (
    AutocastKwargs,
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    GradScalerKwargs,
    InitProcessGroupKwargs,
    ProjectConfiguration,
)
from accelerate.utils.memory import clear_device_cache
from diffusers import optimization
from diffusers.training_utils import EMAModel
from transformers import get_cosine_with_min_lr_schedule_with_warmup

from lift_utils import FeatureModel


logger = get_logger(__name__)


def make_accelerator(
    output_dir: str,
    report_to: str,
    seed: int,
    gradient_accumulation_steps: int,
    mixed_precision: str | None,
    allow_tf32: bool,
    dry_run: bool = False,
    fsdp: bool = False,
    loss_scale: float = 2.0**16,
) -> Accelerator:
    """An Accelerator with a sampler whose order depends on the seed and the epoch alone, and logging set up.

    Args:
        output_dir: Trackers write into its folder "logs".
        report_to: A tracker, "all" or "none".
        seed: Of the order of the data.
        gradient_accumulation_steps: Micro-batches per step.
        mixed_precision: "no", "fp16", "bf16", or `None` for what the accelerate config says.
        allow_tf32: Whether matrix products and convolutions may use TF32.
        dry_run: Whether nothing will be computed: fp16 then needs no GPU.
        fsdp: Whether models will be spread over the processes.
        loss_scale: What the gradient scaler of fp16 starts with.
    """
    for engine in ("FSDP", "DEEPSPEED"):
        if os.environ.get(f"ACCELERATE_USE_{engine}") == "true":
            remedy = "set distributed_type to MULTI_GPU there, and pass --fsdp"
            fail(f"the accelerate config asks for {engine}, which these scripts do not use; {remedy}")
    try:
        accelerator = Accelerator(
            mixed_precision=mixed_precision,
            log_with=None if report_to == "none" else report_to,
            project_config=ProjectConfiguration(project_dir=output_dir, logging_dir=f"{output_dir}/logs"),
            # Groups of micro-batches run on over the end of an epoch, so that every step has the same size.
            gradient_accumulation_plugin=GradientAccumulationPlugin(
                num_steps=gradient_accumulation_steps, sync_with_dataloader=False
            ),
            # The sampler adds the epoch to its seed: that of the run alone would give the next seed the same orders.
            dataloader_config=DataLoaderConfiguration(
                use_seedable_sampler=True, data_seed=place_seed(seed, -1), non_blocking=True
            ),
            kwargs_handlers=[
                InitProcessGroupKwargs(timeout=TIMEOUT),
                # No buffer of these models changes: SD3's table of positions alone is 226 MB and more.
                DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
                GradScalerKwargs(init_scale=loss_scale),
                # A weight is used once in a pass: to keep its half-precision copy until the end would save no work.
                AutocastKwargs(cache_enabled=False),
            ],
        )
    except ValueError as error:
        remedy = "pass --mixed_precision bf16 or no, or another --report_to"
        fail(f"--mixed_precision {mixed_precision} with --report_to {report_to}: {first_line(error)}; {remedy}")
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu" and not dry_run:
        fail("--mixed_precision fp16 needs a GPU, and there is none; pass --mixed_precision bf16 or no")
    check_connected(accelerator.num_processes)
    if fsdp and not dry_run and not torch.distributed.is_initialized():
        fail("--fsdp spreads models over processes, and there is one; launch more with --multi_gpu, or drop it")
    level = logging.INFO if accelerator.is_main_process else logging.ERROR
    logging.basicConfig(format="%(levelname)s %(message)s", level=level)
    for name in ("httpx", "httpx2"):  # they print every request to the Hub, signed addresses and all
        logging.getLogger(name).setLevel(logging.WARNING)
    warn_of_bf16(accelerator)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allow_tf32  # cudnn's own default is True
    return accelerator


def warn_of_bf16(accelerator: Accelerator) -> None:
    """Say where a GPU has no bf16 of its own: older than NVIDIA's Ampere. Accelerate takes imitation for support."""
    if accelerator.mixed_precision != "bf16" or accelerator.device.type != "cuda":
        return
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        slow = "this GPU only imitates it, slowly, and in more memory than --dry_run says"
        logger.warning(f"--mixed_precision bf16: {slow}; pass --mixed_precision fp16")


def prepare_models(
    student: FeatureModel,
    teacher: FeatureModel | None,
    accelerator: Accelerator,
    gradient_checkpointing: bool,
    xformers: bool,
    compiled: bool,
    fsdp: bool = False,
) -> None:
    """Set both models up as asked for, in place."""
    clear_device_cache(garbage_collection=True)  # of a teacher that is gone, in whose hooks and weights are cycles
    models = [model for model in (student, teacher) if model is not None]
    if gradient_checkpointing:
        student.model.enable_gradient_checkpointing()
    if xformers:
        for model in models:
            use_xformers(model.model, accelerator.mixed_precision)
    if compiled:
        # A recomputed block must not capture its feature again: that would break the graph at each block.
        torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True
        for model in models:
            model.compile()
    if fsdp:
        for model in models:
            shard(model, accelerator.device)


def trained_parameters(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The parameters that learn: all but the frozen ones, such as a student's under LoRA adapters."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def make_optimizer(
    model: torch.nn.Module,
    learning_rate: float,
    betas: tuple[float, float],
    weight_decay: float,
    epsilon: float,
    use_8bit: bool,
) -> torch.optim.Optimizer:
    """AdamW on what the model trains: fused, or bitsandbytes' with 8-bit moments."""
    parameters = trained_parameters(model)
    settings = {"lr": learning_rate, "betas": betas, "weight_decay": weight_decay, "eps": epsilon}
    if use_8bit:
        import bitsandbytes as bnb

        return bnb.optim.AdamW8bit(parameters, **settings)
    return torch.optim.AdamW(parameters, fused=True, **settings)


def get_scheduler(
    name: str, optimizer: torch.optim.Optimizer, num_warmup_steps: int, num_training_steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """Diffusers' learning rate schedule of this name, or "cosine_to_half", a cosine down to half the peak."""
    if name == "constant" and num_warmup_steps:  # Diffusers' own "constant" has no warm-up
        name = "constant_with_warmup"
    if num_warmup_steps >= num_training_steps:
        few = f"--lr_warmup_steps {num_warmup_steps} leaves none of the {num_training_steps} steps"
        logger.warning(f"{few} at the full learning rate; pass fewer")
    steps = {"num_warmup_steps": num_warmup_steps, "num_training_steps": num_training_steps}
    if name == "cosine_to_half":
        return get_cosine_with_min_lr_schedule_with_warmup(optimizer, **steps, min_lr_rate=0.5)
    return optimization.get_scheduler(name, optimizer, **steps)


@contextmanager
def averaged_weights(ema: EMAModel, parameters: list[torch.nn.Parameter]) -> Iterator[None]:
    """Put an EMAModel's averaged weights into the parameters for a while."""
    ema.store(parameters)
    try:
        ema.foreach = False  # PyTorch has no `_foreach_copy_` of weights that are spread
        ema.copy_to(parameters)
        yield
    finally:
        ema.restore(parameters)
        ema.foreach = True


def seed_step(seed: int, *position: int) -> None:
    """Seed torch's generators for one place in the run, e.g. `seed_step(args.seed, step, micro_step, rank)`.

    Noise, timesteps, flips and dropout then depend on that place alone: a resumed run repeats them exactly, and there
    is no random state to save, on any rank.
    """
    torch.manual_seed(place_seed(seed, *position))


def place_seed(seed: int, *position: int) -> int:
    """The seed of one place in the run, see [`seed_step`]."""
    digest = hashlib.sha256(repr((seed, *position)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


# A run ends when this many steps in a row had no finite loss and gradient.
MAX_SKIPPED_IN_A_ROW = 20


# Below this scale float16 could not hold the gradients of any loss: what is not finite then is not the scale's fault.
SMALLEST_SCALE = 2.0**-24


def guarded_step(
    optimizer: AcceleratedOptimizer, loss: torch.Tensor, grad_norm: torch.Tensor, skipped: torch.Tensor
) -> None:
    """Take an optimizer step unless this step's loss or gradient norm is not finite, and count those it skips.

    Fused AdamW skips on the device, so nothing waits. 8-bit AdamW waits for the device by itself, for each tensor.
    Under fp16 the gradient scaler skips by itself, with reads from the device; while it looks for its scale, a
    gradient that is not finite is no fault and does not count. It is not told of a loss that is not finite: no scale
    would help, and it would halve its own for each of them, until that holds no gradient.

    Args:
        optimizer: An optimizer prepared by Accelerate.
        loss: Scalar, equal on all ranks.
        grad_norm: Scalar, equal on all ranks.
        skipped: Float tensor of shape (2,): steps skipped in all and in a row, updated in place.
    """
    loss_is_finite, scaler = torch.isfinite(loss), optimizer.scaler
    finite = loss_is_finite
    if scaler is None or scaler.get_scale() < SMALLEST_SCALE:
        finite = finite & torch.isfinite(grad_norm)
    bad = (~finite).to(skipped.dtype)
    skipped.copy_(torch.stack([skipped[0] + bad, (skipped[1] + 1) * bad]))
    if scaler is None:
        if optimizer.optimizer.defaults.get("fused"):
            optimizer.optimizer.found_inf = bad.float()
        elif bad:
            return
    elif not loss_is_finite:
        scaler.update(scaler.get_scale())  # as it was: this only forgets the step's gradients
        return
    optimizer.step()


def check_skipped(row: dict[str, float], step: int, last: bool) -> None:
    """End the run where the loss or its gradient was not finite for [`MAX_SKIPPED_IN_A_ROW`] steps in a row.

    At the run's end two of them are too many, or half of all its steps: the weights are those that made them so.

    Args:
        row: Of this step: "skipped_in_a_row", and with a teacher "teacher_finite", the share of its outputs
            that are wholly finite.
        step: This one.
        last: Whether the run ends with it.
    """
    in_a_row = row["skipped_in_a_row"]
    if in_a_row < MAX_SKIPPED_IN_A_ROW and not (last and (in_a_row >= 2 or 2 * in_a_row >= step)):
        return
    steps = f"for {in_a_row:.0f} steps up to {step}"
    if row.get("teacher_finite", 1) == 1:
        what, remedy = "the loss or its gradient", "lower --learning_rate, or pass --mixed_precision no"
    else:
        what = "the output of --pretrained_teacher_model"
        remedy = "pass --mixed_precision bf16 or no if it overflows in fp16, or another teacher"
    fail(f"{what} was not finite {steps}; {remedy}; nothing was saved, and checkpoints are as they were")
