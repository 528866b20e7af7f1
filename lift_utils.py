# Copyright 2026 The LIFT and PLACE distillation authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""LIFT and PLACE, coarse-to-fine knowledge distillation of diffusion models, and what the four training scripts share.

The first part, up to the line "End of the mathematics", needs nothing but `torch` and `NamedTuple`: copy it to use the
loss elsewhere. The second part holds the helpers that would otherwise stand word for word in every script.
Source: "LIFT and PLACE: A Simple, Stable, and Effective Knowledge Distillation Framework for Lightweight Diffusion
Models", arXiv 2605.19729, CVPR 2026.
"""

import argparse
import hashlib
import io
import json
import logging
import math
import os
import re
import shutil
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
import torch.distributed


# ----------------------------------------------------------------------------------------------------- the mathematics

# A slope is cov / var, so its gradient grows like 1 / var: a flat student (a zero-initialised output layer) would meet
# gradients of 1e5. Where the student's variance in a group is below this share of the teacher's (a standard deviation
# below 1 %), the gradient of the group's slope is scaled down as if it were that share. The slope itself stays what it
# is: a bound on its value would give a nearly flat student slopes near 1, and hold it there.
MIN_VARIANCE_RATIO = 1e-4


class LiftPlaceLoss(NamedTuple):
    """The loss and its parts, in float32 (float64 for float64 inputs). G is the number of groups per channel."""

    loss: torch.Tensor  # scalar, differentiable
    coarse: torch.Tensor  # scalar, differentiable: distance of the fits from slope 1 and intercept 0
    fine: torch.Tensor  # scalar, differentiable: mean squared residual of the fits
    weight: torch.Tensor  # scalar in [0, 1], detached: what `fine` is multiplied by
    slope: torch.Tensor  # (B, C, G), detached
    intercept: torch.Tensor  # (B, C, G), detached


def lift_place_loss(
    student: torch.Tensor,
    teacher: torch.Tensor,
    group_size: int | None = 16,
    norm: str = "l1",
    weighting: str | float = "adaptive",
    group_by: str = "error",
    eps: float = 1e-7,
    reduction: str = "mean",
) -> LiftPlaceLoss:
    """Coarse-to-fine distillation loss between two predictions on the same noisy input (arXiv 2605.19729).

    Each group of elements gets the least-squares line `teacher ≈ slope · student + intercept`. The line's distance
    from (1, 0) is the coarse, easy error; what the line leaves over is the fine, hard error; the closer the lines are
    to (1, 0), the more the fine error counts. The arithmetic is float32 whatever the inputs' dtype, float64 for
    float64.

    Args:
        student: Prediction of shape (B, C, *spatial), any floating dtype. Gradients flow into it alone.
        teacher: Prediction of the same shape. Treated as a constant.
        group_size: Elements per group, a divisor of the spatial size; 16 in the published runs (PLACE). `None` makes
            each channel of each sample one group (LIFT).
        norm: "l1" or "l2", the distance of the lines from (1, 0) in the coarse term.
        weighting: "adaptive" for `1 - min(1, mean|slope - 1| + mean|intercept|)`, always an L1 distance and averaged
            over all processes of a distributed run (of equal batch sizes); "constant" for 1; or a number in [0, 1].
            Under gradient accumulation it is one weight per micro-batch.
        group_by: "error" groups elements of similar squared error, "position" groups neighbours in memory.
        eps: Added to the student's variance.
        reduction: "mean", or "sum" for the sum over a sample's elements averaged over the batch (C · N · mean).

    Returns:
        A [`LiftPlaceLoss`]. A NaN in the input makes the loss and the weight NaN: it is never hidden.

    Raises:
        ValueError: Shapes differ or lack a spatial dimension of two elements, a dtype is not floating, `group_size`
            does not divide the spatial size or is below 2, or an option is unknown.
    """
    _check_arguments(student, teacher, group_size, norm, weighting, group_by, reduction)
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    s = student.to(dtype).flatten(2)
    t = teacher.detach().to(dtype).flatten(2)

    if group_size is not None:
        if group_by == "error":
            # Stable, so that ties (all errors equal, say) give the same groups on every run.
            order = (s.detach() - t).square().sort(dim=-1, stable=True).indices
            s, t = s.gather(-1, order), t.gather(-1, order)
        s, t = s.unflatten(-1, (-1, group_size)), t.unflatten(-1, (-1, group_size))
    else:
        s, t = s.unsqueeze(-2), t.unsqueeze(-2)

    slope, intercept = _fit(s, t, eps)
    power = 1 if norm == "l1" else 2
    coarse = ((slope - 1).abs().pow(power) + intercept.abs().pow(power)).mean()
    slope, intercept = slope.detach(), intercept.detach()
    fine = (slope.unsqueeze(-1) * s + intercept.unsqueeze(-1) - t).square().mean()

    if weighting == "adaptive":
        weight = _adaptive_weight(slope, intercept)
    else:
        weight = torch.full_like(coarse.detach(), 1.0 if weighting == "constant" else weighting)

    loss = coarse + weight * fine
    if reduction == "sum":
        loss = loss * student[0].numel()
    return LiftPlaceLoss(loss, coarse, fine, weight, slope, intercept)


def _fit(s: torch.Tensor, t: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Least-squares slope and intercept of t on s over the last dimension, from population moments."""
    s_mean, t_mean = s.mean(-1), t.mean(-1)
    s_centred, t_centred = s - s_mean.unsqueeze(-1), t - t_mean.unsqueeze(-1)
    variance = s_centred.square().mean(-1)
    slope = (s_centred * t_centred).mean(-1) / (variance + eps)
    least = MIN_VARIANCE_RATIO * t_centred.square().mean(-1)
    damping = ((variance + eps) / (torch.maximum(variance, least) + eps)).detach()
    slope = slope.detach() + damping * (slope - slope.detach())
    return slope, t_mean - slope * s_mean


def _adaptive_weight(slope: torch.Tensor, intercept: torch.Tensor) -> torch.Tensor:
    distance = (slope - 1).abs().mean() + intercept.abs().mean()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(distance)
        distance = distance / torch.distributed.get_world_size()
    # A tensor clamp keeps NaN; Python's min(1.0, nan) is 1.0 and would turn it into a weight of 0.
    return 1 - distance.clamp(max=1)


def _check_arguments(student, teacher, group_size, norm, weighting, group_by, reduction) -> None:
    if student.shape != teacher.shape or student.ndim < 3 or student.numel() == 0:
        raise ValueError(
            f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must have one shape (B, C, *spatial), "
            "with at least one spatial dimension and no empty one"
        )
    for name, tensor in (("student", student), ("teacher", teacher)):
        if not tensor.is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype}; pass a floating-point prediction, e.g. {name}.float()")
    elements = student[0, 0].numel()
    if elements < 2:
        raise ValueError(f"{tuple(student.shape)} has one element per channel: there is nothing to fit; use plain MSE")
    if group_size is not None:
        check_group_size(group_size, elements)
    if weighting not in ("adaptive", "constant") and (isinstance(weighting, str) or not 0 <= weighting <= 1):
        raise ValueError(f'weighting is {weighting!r}; choose "adaptive", "constant" or a number in [0, 1]')
    for name, value, choices in (
        ("norm", norm, ("l1", "l2")),
        ("group_by", group_by, ("error", "position")),
        ("reduction", reduction, ("mean", "sum")),
    ):
        if value not in choices:
            raise ValueError(f"{name} is {value!r}; choose {choices[0]!r} or {choices[1]!r}")


def check_group_size(group_size: int, elements: int) -> None:
    """Raise a ValueError that names the nearest possible group sizes unless `group_size` > 1 divides `elements`."""
    if group_size > 1 and elements % group_size == 0:
        return
    divisors = [size for size in range(2, elements + 1) if elements % size == 0]
    below = [size for size in divisors if size < group_size][-1:]
    above = [size for size in divisors if size > group_size][:1]
    nearest = " or ".join(str(size) for size in below + above)
    why = "leaves nothing to fit in a group" if group_size < 2 else f"does not divide the {elements} elements"
    raise ValueError(f"group_size {group_size} {why} of a channel; the nearest that does: {nearest}")


# ---------------------------------------------------------------------------------------------- End of the mathematics


def fail(message: str) -> NoReturn:
    """End the run with one line that names the flag, its value and the remedy."""
    raise SystemExit(f"error: {message}")


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the docstring's lines and names each default that says something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        silent = action.default is None or action.default is False
        return action.help if silent else super()._get_help_string(action)


# ------------------------------------------------------------------------------------------------------------ the data


def drop_unreadable(dataset, column: str, source: str, args):
    """The dataset without the images that do not decode, which are named; too many of them end the run.

    The check decodes each image once; `datasets` keeps its result, so later runs on the same files do not repeat it.

    Args:
        dataset: A `datasets.Dataset` with an image column. It comes back undecoded: see [`open_image`].
        source: The flag and value the data came from, for messages.
        args: With `max_unreadable`, the share to put up with, and `dataloader_num_workers`.
    """
    from datasets import Image

    try:
        dataset = dataset.cast_column(column, Image(decode=False))
    except (ValueError, TypeError, NotImplementedError):
        fail(f"--image_column {column} holds {dataset.features[column]}; pass the column of the images")
    workers = args.dataloader_num_workers or None
    checked = dataset.map(
        _is_readable,
        input_columns=column,
        remove_columns=dataset.column_names,
        num_proc=workers,
        desc="Checking images",
    )
    unreadable = [index for index, readable in enumerate(checked["readable"]) if not readable]
    if not unreadable:
        return dataset
    paths = [(dataset[index][column] or {}).get("path") for index in unreadable[:10]]
    names = ", ".join(path or f"row {index}" for path, index in zip(paths, unreadable))
    found = f"{len(unreadable)} of {len(dataset)} images cannot be read: {names}"
    if len(unreadable) > args.max_unreadable * len(dataset):
        fail(f"{source}: {found}; repair or remove them, or raise --max_unreadable {args.max_unreadable}")
    print(f"leaving out {found}", flush=True)
    return dataset.select(sorted(set(range(len(dataset))) - set(unreadable)))


def open_image(record: dict[str, Any], mode: str):
    """A PIL image of the mode, upright, from an undecoded record of `datasets`. 16-bit images keep their range."""
    from PIL import Image, ImageOps

    image = Image.open(io.BytesIO(record["bytes"]) if record["bytes"] else record["path"])
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # convert() would clip these at 255
        image = image.convert("F").point(lambda value: value / 257)
    return image.convert(mode)


def _is_readable(record: dict[str, Any]) -> dict[str, bool]:
    try:
        open_image(record, "RGB")
    except Exception:  # decoders raise anything on damaged files
        return {"readable": False}
    return {"readable": True}


# ---------------------------------------------------------------------------------------------------------- the models


class FeatureModel(torch.nn.Module):
    """A model that returns `(prediction, features)`: its output sample and the outputs of the named submodules.

    The features are outputs of the forward pass, so DistributedDataParallel sees them and `compile()` can trace them.
    Optional projections (FitNet, one per name) are trained with the model and never saved into it.

    Args:
        model: A Diffusers model whose forward takes `return_dict`.
        names: Submodules whose outputs are wanted. Of a tuple of outputs the first is taken.
        projections: One module per name, applied to its feature.
    """

    def __init__(self, model: torch.nn.Module, names: list[str], projections: list[torch.nn.Module] | None = None):
        super().__init__()
        self.model = model
        self.names = names
        self.projections = torch.nn.ModuleList(projections or [torch.nn.Identity() for _ in names])
        self._captured: dict[str, torch.Tensor] = {}
        for name in names:
            model.get_submodule(name).register_forward_hook(partial(self._capture, name))

    def _capture(self, name: str, module: torch.nn.Module, inputs: Any, output: Any) -> None:
        self._captured[name] = output[0] if isinstance(output, tuple) else output

    def forward(self, *args, **kwargs) -> tuple[torch.Tensor, list[torch.Tensor]]:
        prediction = self.model(*args, return_dict=False, **kwargs)[0]
        features = [project(self._captured[name]) for name, project in zip(self.names, self.projections)]
        self._captured.clear()
        return prediction, features


def copy_blocks(
    student: torch.nn.Module, teacher_state: dict[str, torch.Tensor], blocks: dict[str, str] | None = None
) -> list[str]:
    """Copy teacher weights into the student, in place, and return the names of the tensors that stay fresh.

    Args:
        student: The model to fill.
        teacher_state: The teacher's state dict.
        blocks: `{"student.prefix": "teacher.prefix"}`. Every tensor under a student prefix must find its counterpart
            there. `None` copies each tensor whose name and shape both models share.

    Raises:
        ValueError: A prefix names nothing, or a tensor lacks a counterpart of its shape.
    """
    state = student.state_dict()
    if blocks is None:
        source = {key: key for key in state if key in teacher_state and teacher_state[key].shape == state[key].shape}
    else:
        source = {}
        for prefix, teacher_prefix in blocks.items():
            keys = [key for key in state if key == prefix or key.startswith(prefix + ".")]
            if not keys:
                raise ValueError(f'the student has no block "{prefix}"')
            source.update({key: teacher_prefix + key[len(prefix) :] for key in keys})
        for key, teacher_key in source.items():
            if teacher_key not in teacher_state:
                raise ValueError(f'the teacher has no "{teacher_key}" to copy into the student\'s "{key}"')
            ours, theirs = tuple(state[key].shape), tuple(teacher_state[teacher_key].shape)
            if ours != theirs:
                raise ValueError(
                    f'"{key}" of shape {ours} cannot take the teacher\'s "{teacher_key}" of shape {theirs}'
                )
    student.load_state_dict({key: teacher_state[teacher_key] for key, teacher_key in source.items()}, strict=False)
    return [key for key in state if key not in source]


def profile_forward(model: torch.nn.Module, *inputs: torch.Tensor) -> tuple[int, int]:
    """Multiply-accumulates of a forward pass and the bytes it keeps for the backward pass, without computing anything.

    Args:
        model: A model on the meta device. Its parameters do not count as kept.
        inputs: Meta tensors for its forward.
    """
    from torch.utils.flop_counter import FlopCounterMode

    parameters = {id(parameter) for parameter in model.parameters()}
    kept: dict[int, tuple[torch.Tensor, int]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        base = tensor if tensor._base is None else tensor._base
        if id(base) not in parameters:
            # Holding the tensor keeps its id from being given to another one.
            kept[id(base)] = (base, base.numel() * base.element_size())
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        FlopCounterMode(display=False) as flops,
    ):
        model(*inputs)
    return flops.get_total_flops() // 2, sum(size for _, size in kept.values())


def print_memory_estimate(args, student: int, teacher: int, kept: int) -> None:
    """Print what a training step holds, by part, in MiB.

    Args:
        args: The script's flags.
        student: Parameters of the student.
        teacher: Parameters of the teacher, 0 without one.
        kept: Bytes one image's forward pass keeps in float32, from [`profile_forward`].
    """
    width = 2 if args.mixed_precision in ("fp16", "bf16") else 4
    parts = {
        "student weights (fp32)": 4 * student,
        "student gradients (fp32)": 4 * student,
        "optimizer moments": (2 if args.use_8bit_adam else 8) * student,
        "averaged weights": 4 * student if args.use_ema else 0,
        f"student activations, batch {args.train_batch_size}": args.train_batch_size * kept * width // 4,
        "teacher weights": width * teacher,
    }
    print("memory, estimated, without the teacher's working set and the CUDA context:")
    for name, size in [*parts.items(), ("sum", sum(parts.values()))]:
        print(f"  {name:<40}{size / 2**20:>12,.1f} MiB")


# -------------------------------------------------------------------------------------------------------- the training


def prepare_output(args) -> Path:
    """The output folder, shown to be writable and free of another run."""
    output_dir = Path(args.output_dir)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        (output_dir / ".writable").touch()
        (output_dir / ".writable").unlink(missing_ok=True)
    except OSError as error:
        fail(f"--output_dir {output_dir} cannot be written to: {error.strerror}; pass another folder")
    if args.resume_from_checkpoint is None and list_checkpoints(output_dir):
        fail(f"--output_dir {output_dir} holds another run; add --resume_from_checkpoint latest, or pass a new folder")
    return output_dir


def make_optimizer(parameters: Iterable[torch.nn.Parameter], args) -> torch.optim.Optimizer:
    """AdamW with the flags' settings, fused, or bitsandbytes' with 8-bit moments."""
    settings = {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "weight_decay": args.adam_weight_decay,
        "eps": args.adam_epsilon,
    }
    if args.use_8bit_adam:
        import bitsandbytes as bnb

        return bnb.optim.AdamW8bit(parameters, **settings)
    return torch.optim.AdamW(parameters, fused=True, **settings)


def make_accelerator(args):
    """An Accelerator with the flags' settings and a sampler whose order depends on the seed and the epoch alone."""
    from accelerate import Accelerator, DataLoaderConfiguration
    from accelerate.utils import GradientAccumulationPlugin, ProjectConfiguration

    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(project_dir=args.output_dir, logging_dir=f"{args.output_dir}/logs"),
        # Groups of micro-batches run on over the end of an epoch, so that every step has the same size.
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=args.gradient_accumulation_steps, sync_with_dataloader=False
        ),
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.seed),
    )
    level = logging.INFO if accelerator.is_main_process else logging.ERROR
    logging.basicConfig(format="%(levelname)s %(message)s", level=level)
    for name in ("httpx", "httpx2"):  # they print every request to the Hub, signed addresses and all
        logging.getLogger(name).setLevel(logging.WARNING)
    if args.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    return accelerator


def make_dataloader(dataset, args, accelerator) -> torch.utils.data.DataLoader:
    """Shuffled whole batches; the images that do not fill one are left for another epoch's order."""
    if len(dataset) < args.train_batch_size * accelerator.num_processes:
        fail(f"--train_batch_size {args.train_batch_size} is more than the {len(dataset)} images; pass a smaller one")
    return torch.utils.data.DataLoader(
        dataset,
        batch_size=args.train_batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=args.dataloader_num_workers,
        worker_init_fn=ignore_sigterm,
        persistent_workers=args.dataloader_num_workers > 0,
        pin_memory=accelerator.device.type == "cuda",
    )


@contextmanager
def averaged_weights(ema, model: torch.nn.Module) -> Iterator[None]:
    """Put an EMAModel's averaged weights into the model for a while."""
    ema.store(model.parameters())
    ema.copy_to(model.parameters())
    try:
        yield
    finally:
        ema.restore(model.parameters())


def seed_step(seed: int, *position: int) -> None:
    """Seed torch's generators for one place in the run, e.g. `seed_step(args.seed, step, micro_step, rank)`.

    Noise, timesteps, flips and dropout then depend on that place alone: a resumed run repeats them exactly, and there
    is no random state to save, on any rank.
    """
    digest = hashlib.sha256(repr((seed, *position)).encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def endless_batches(dataloader, batches_done: int, skip_first_batches) -> Iterator[dict[str, torch.Tensor]]:
    """Batches of a prepared dataloader, epoch after epoch, from a position on; skipped batches are not decoded."""
    epoch, skip = divmod(batches_done, len(dataloader))
    while True:
        dataloader.set_epoch(epoch)
        yield from skip_first_batches(dataloader, skip) if skip else dataloader
        epoch, skip = epoch + 1, 0


def ignore_sigterm(worker: int) -> None:
    """Keep a data worker alive when a whole job gets SIGTERM: the process it serves saves first, then ends it."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


# A run ends when so many steps in a row had no finite loss and gradient.
MAX_SKIPPED_IN_A_ROW = 20


def guarded_step(optimizer, finite: torch.Tensor, skipped: torch.Tensor) -> None:
    """Take an optimizer step unless this step's loss or gradient norm is not finite, and count those it skips.

    Fused AdamW skips on the device, so nothing waits. Optimizers that cannot (8-bit) cost one device read per step.
    Under fp16 the gradient scaler skips by itself.

    Args:
        optimizer: An optimizer prepared by Accelerate.
        finite: Boolean scalar, equal on all ranks.
        skipped: Float tensor of shape (2,): steps skipped in all and in a row, updated in place.
    """
    bad = (~finite).to(skipped.dtype)
    skipped.copy_(torch.stack([skipped[0] + bad, (skipped[1] + 1) * bad]))
    if optimizer.scaler is None:
        if optimizer.optimizer.defaults.get("fused"):
            optimizer.optimizer.found_inf = bad.float()
        elif bad:
            return
    optimizer.step()


# ----------------------------------------------------------------------------------------------------- the checkpoints
#
# A checkpoint is written into `.tmp-<step>`, completed by a manifest of sizes and SHA-256 sums, flushed to disk and
# only then renamed to `checkpoint-<step>`. A kill at any instant leaves whole checkpoints and rubbish under dot names.


class Training(NamedTuple):
    """All that a run needs to continue exactly. Random states are not in it: see [`seed_step`]."""

    student: FeatureModel  # unwrapped
    optimizer: Any  # as returned by Accelerator.prepare
    lr_scheduler: Any
    ema: Any  # an EMAModel or None
    scaler: Any  # a GradScaler or None
    skipped: torch.Tensor  # see `guarded_step`


def save_training(output_dir: Path, step: int, training: Training, limit: int | None) -> None:
    """Write everything into `checkpoint-<step>`; call on the main process, the others may go on to wait."""
    moments, optimizer = flatten_optimizer(training.optimizer)
    tensors = {"student": training.student.state_dict(), "optimizer": moments}
    state = {
        "step": step,
        "config": dict(training.student.model.config),
        "optimizer": optimizer,
        "lr_scheduler": training.lr_scheduler.state_dict(),
        "scaler": training.scaler and training.scaler.state_dict(),
        "skipped": training.skipped.tolist(),
    }
    if training.ema is not None:
        tensors["ema"] = {str(index): tensor for index, tensor in enumerate(training.ema.shadow_params)}
        state["ema_step"] = training.ema.optimization_step
    save_checkpoint(output_dir, step, tensors, state, limit)


def load_training(output_dir: Path, resume_from: str, training: Training) -> int:
    """Continue from the checkpoint that `--resume_from_checkpoint` asks for; returns the number of steps done."""
    found = find_checkpoint(output_dir, resume_from)
    if found is None:
        return 0
    tensors, state = found
    ours = json.loads(json.dumps(dict(training.student.model.config)))
    different = [key for key in ours if not key.startswith("_") and ours[key] != state["config"].get(key)]
    same_tensors = tensors["student"].keys() == training.student.state_dict().keys()
    if different or not same_tensors or ("ema" in tensors) != (training.ema is not None):
        what = ", ".join(different) or "the features or the averaged weights"
        fail(f"--resume_from_checkpoint {resume_from} is of another student ({what} differ); pass the run's own flags")
    kind = state["optimizer"]["kind"]
    if kind != flatten_optimizer(training.optimizer)[1]["kind"]:
        fail(f"--resume_from_checkpoint {resume_from} is of {kind}; pass --use_8bit_adam as the run did, or leave it")
    training.student.load_state_dict(tensors["student"])
    restore_optimizer(training.optimizer, tensors["optimizer"], state["optimizer"])
    # The place in the schedule is the checkpoint's, the learning rate is this run's: it may have been lowered.
    scheduler = training.lr_scheduler
    scheduler.load_state_dict({**state["lr_scheduler"], "base_lrs": scheduler.base_lrs})
    for group, peak, factor in zip(training.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas):
        group["lr"] = peak * factor(scheduler.last_epoch)
    if training.scaler is not None and state["scaler"]:
        training.scaler.load_state_dict(state["scaler"])
    training.skipped.copy_(torch.tensor(state["skipped"]))
    if training.ema is not None:
        for index, parameter in enumerate(training.ema.shadow_params):
            parameter.copy_(tensors["ema"][str(index)])
        training.ema.optimization_step = state["ema_step"]
    return state["step"]


def flatten_optimizer(optimizer) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """An optimizer's state as named tensors for safetensors and a JSON-serialisable rest."""
    state = optimizer.state_dict()
    entries = {}
    for index, values in state["state"].items():
        # bitsandbytes puts its 8-bit tensors into an inner dict, and takes them back without it.
        for part in (values, *(value for value in values.values() if isinstance(value, dict))):
            entries |= {f"{index}.{key}": value for key, value in part.items() if not isinstance(value, dict)}
    tensors = {key: value for key, value in entries.items() if isinstance(value, torch.Tensor)}
    scalars = {key: value for key, value in entries.items() if key not in tensors}
    return tensors, {"kind": type(getattr(optimizer, "optimizer", optimizer)).__name__, "scalars": scalars}


def restore_optimizer(optimizer, tensors: dict[str, torch.Tensor], rest: dict[str, Any]) -> None:
    """Load what [`flatten_optimizer`] returned. Settings such as the betas stay as they are."""
    state: dict[int, dict[str, Any]] = {}
    for key, value in {**tensors, **rest["scalars"]}.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Folders named `checkpoint-<step>`, oldest first."""
    folders = [path for path in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(folders, key=lambda path: int(path.name.split("-")[1]))


def sweep(output_dir: Path) -> None:
    """Remove what killed saves and prunings left behind."""
    for path in [*output_dir.glob(".tmp-*"), *output_dir.glob(".del-*")]:
        shutil.rmtree(path, ignore_errors=True)


def save_checkpoint(
    output_dir: Path, step: int, tensors: dict[str, dict[str, torch.Tensor]], state: dict[str, Any], limit: int | None
) -> Path:
    """Write `checkpoint-<step>` so that a kill cannot corrupt it, then delete the oldest beyond `limit`.

    Checkpoints of later steps go too: they are damaged, or of a course that this run has left.

    Args:
        tensors: One safetensors file per entry.
        state: Everything else, JSON-serialisable.
        limit: How many checkpoints to keep; `None` keeps all.
    """
    from safetensors.torch import save_file

    folder, temporary = output_dir / f"checkpoint-{step}", output_dir / f".tmp-{step}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for name, group in tensors.items():
        # Optimizers may share one tensor between entries, which safetensors refuses: copy each.
        copies = {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in group.items()}
        save_file(copies, temporary / f"{name}.safetensors")
    (temporary / "state.json").write_text(json.dumps(state))
    manifest = {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in temporary.iterdir()}
    (temporary / "manifest.json").write_text(json.dumps(manifest, indent=2))
    for path in [*temporary.iterdir(), temporary]:
        _flush(path)
    if folder.exists():
        folder.rename(output_dir / f".del-{step}")
    temporary.rename(folder)
    _flush(output_dir)
    names = [path.name for path in list_checkpoints(output_dir)]
    newest = names.index(folder.name) + 1
    for name in [*names[newest:], *(names[: max(0, newest - limit)] if limit is not None else [])]:
        (output_dir / name).rename(output_dir / name.replace("checkpoint", ".del"))
    sweep(output_dir)
    return folder


def load_checkpoint(folder: Path) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, Any]]:
    """Read what [`save_checkpoint`] wrote.

    Raises:
        ValueError: A file is missing, or its size or SHA-256 sum is not the manifest's.
    """
    from safetensors.torch import load_file

    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        for name, expected in manifest.items():
            path = folder / name
            if path.stat().st_size != expected["bytes"] or _sha256(path) != expected["sha256"]:
                raise ValueError(f"{path} is damaged")
    except (OSError, KeyError, TypeError, AttributeError) as error:  # the manifest may be what is damaged
        raise ValueError(f"{folder} is incomplete: {error}") from error
    tensors = {path.stem: load_file(path) for path in folder.glob("*.safetensors")}
    return tensors, json.loads((folder / "state.json").read_text())


def find_checkpoint(output_dir: Path, resume_from: str) -> tuple[dict, dict] | None:
    """The contents of the checkpoint that `--resume_from_checkpoint` asks for; `None` where "latest" finds none.

    "latest" passes over damaged checkpoints, and says so; one that is named must be whole.
    """
    if resume_from != "latest":
        candidates = [path for path in (output_dir / resume_from, Path(resume_from)) if path.is_dir()][:1]
        if not candidates:
            fail(
                f'--resume_from_checkpoint {resume_from} is no folder in {output_dir}; pass "latest" or drop the flag'
            )
    else:
        candidates = reversed(list_checkpoints(output_dir))
    for folder in candidates:
        try:
            return load_checkpoint(folder)
        except ValueError as error:
            if resume_from != "latest":
                fail(f'--resume_from_checkpoint {resume_from}: {error}; pass "latest" for the newest whole one')
            print(f"passing over {folder.name}: {error}", flush=True)
    return None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---------------------------------------------------------------------------------------- the metrics and the pictures


def gather_logs(accelerator, tensors: dict[str, torch.Tensor]) -> dict[str, float]:
    """Scalar tensors of this step, averaged over the processes, in a single read from the device."""
    values = accelerator.reduce(torch.stack([tensor.detach().float() for tensor in tensors.values()]), "mean")
    return dict(zip(tensors, values.tolist()))


def append_metrics(path: Path, row: dict[str, float]) -> None:
    """Add a row to a metrics.jsonl. JSON has no NaN: what is not finite becomes null."""
    with path.open("a") as file:
        file.write(json.dumps({key: value if math.isfinite(value) else None for key, value in row.items()}) + "\n")


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of a metrics.jsonl; a last line that a kill cut short is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def rewind_metrics(path: Path, step: int) -> None:
    """Drop the rows after `step`, so that a resumed run continues the file without duplicate steps."""
    rows = [row for row in read_metrics(path) if row["step"] <= step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
    temporary.replace(path)


def plot_curves(runs: dict[str, list[dict[str, float]]], keys: list[str], path: Path) -> None:
    """One small plot per metric over the steps, one line per run, to a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(keys), 2.8), layout="constrained")
    for axis, key in zip(figure.subplots(1, len(keys), squeeze=False)[0], keys):
        for index, (name, rows) in enumerate(runs.items()):
            points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
            if points:
                marker = "." if len(points) < 2 else None
                axis.plot(*zip(*points), label=name, color=f"C{index}", linewidth=1, marker=marker)
        axis.set_title(key)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if len(runs) > 1 and axis.lines:
            axis.legend(fontsize=7)
    figure.savefig(path, dpi=120)


def labelled_grid(rows: dict[str, list], scale: int = 1):
    """One row of equally large PIL images per label, on white, with the labels at the left.

    Args:
        rows: `{label: images}`.
        scale: Whole factor by which small images are enlarged.
    """
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(14)
    width, height = (side * scale for side in next(iter(rows.values()))[0].size)
    height_of_row = max(height, 20) + 4
    margin = 12 + max(int(font.getlength(label)) for label in rows)
    columns = max(len(images) for images in rows.values())
    grid = Image.new("RGB", (margin + columns * (width + 2), len(rows) * height_of_row), "white")
    draw = ImageDraw.Draw(grid)
    for row, (label, images) in enumerate(rows.items()):
        draw.text((6, row * height_of_row + height_of_row // 2), label, fill="black", font=font, anchor="lm")
        for column, image in enumerate(images):
            enlarged = image.convert("RGB").resize((width, height), Image.Resampling.NEAREST)
            grid.paste(enlarged, (margin + column * (width + 2), row * height_of_row + 2))
    return grid


# ------------------------------------------------------------------------------------------------------------- the Hub


def write_model_card(output_dir: Path, text: str, tags: list[str], base_model: str | None) -> None:
    """Write README.md with the metadata the Hub reads. `base_model` is a Hub id or None."""
    from huggingface_hub import ModelCard, ModelCardData

    data = ModelCardData(library_name="diffusers", tags=tags, base_model=base_model)
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n").save(output_dir / "README.md")


def create_hub_repo(repo_id: str, private: bool) -> str:
    """Create the repository unless it exists, before a run is spent on it; returns its full id."""
    from huggingface_hub import create_repo

    try:
        return create_repo(repo_id, private=private, exist_ok=True).repo_id
    except Exception as error:  # without a connection, an error of whichever HTTP library the client is built on
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        fail(f"--push_to_hub cannot create {repo_id}: {reason}; log in with `hf auth login`, or check --hub_model_id")


def push_to_hub(output_dir: Path, repo_id: str) -> None:
    """Upload the finished pipeline without checkpoints, logs and hidden files. The token is the one of the login."""
    from huggingface_hub import upload_folder

    ignored = ["checkpoint-*", ".*", "logs/*"]
    text = "End of training"
    try:
        upload_folder(repo_id=repo_id, folder_path=output_dir, commit_message=text, ignore_patterns=ignored)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        fail(f"--push_to_hub cannot upload {output_dir}: {reason}; it is whole: add --resume_from_checkpoint latest")
