# Copyright 2026 The LIFT and PLACE distillation authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""What will a run hold in memory and on the disk, and how long will it take?"""

import math
from collections.abc import Callable
from typing import NamedTuple

from common.costs import DTYPES, NO_ENCODING, Encoding, dtype_of, estimate_activations, profile_forward
from common.sharding import Whole, count_whole
from common.students import count_features
from common.teacher_weights import count_bytes

import torch
from diffusers import ModelMixin


# Peaks of cards for commodity PCs by NVIDIA's architecture white papers, dense, in TFLOP/s: of float32, and of tensor
# cores on half precision that sum up in float32.
PEAKS = {"RTX 3060, 12 GB": (12.7, 25.5), "RTX 4090, 24 GB": (82.6, 165.2)}
SHARE_OF_PEAK = 0.3


class RunPlan(NamedTuple):
    """What the costs of a run depend on, by its flags."""

    batch_size: int  # images per device and micro-batch
    accumulation_steps: int  # micro-batches per step
    steps: int  # of the whole run
    mixed_precision: str | None  # "fp16", "bf16", "no" or `None`
    gradient_checkpointing: bool
    use_8bit_adam: bool
    use_ema: bool
    live_teacher: bool  # whether it runs in every step
    cached_draws: int | None  # `--cache_teacher`
    cached_dtype: str  # `--cache_teacher_dtype`
    images: int | None  # of the data set, which a dry run does not read; `None` is unknown
    processes: int  # that train together, each on a device of its own
    teacher_dtype: str | None = None  # `--teacher_dtype`
    offload_teacher: bool = False
    fsdp: bool = False


class ModelCosts(NamedTuple):
    """What the models of a run cost. Multiply-accumulates are those of a forward pass on one image."""

    macs: int  # of the student
    activations: tuple[int, int]  # bytes that its forward pass keeps and recomputes, see [`estimate_activations`]
    trained: int  # parameters of the student that learn
    frozen: int = 0  # those that do not, and are held in the precision of the run
    adapters: bool = False  # whether those that learn are few, beside frozen ones
    teacher_macs: int = 0
    teacher_bytes: int = 0  # of its weights while it is on the device
    features: int = 0  # elements of the teacher's features of one image
    outputs: int = 0  # elements of a prediction
    whole: Whole | None = None  # for a while, where `--fsdp` spreads both models; see [`count_whole`]
    encoding: Encoding = NO_ENCODING  # of images and captions in every step
    decoding: int = 0  # bytes of what decodes the samples of a grid
    tables: int = 0  # bytes of tables of positions, which each process holds as they are


def count_costs(
    plan: RunPlan,
    make_student: Callable[[], ModelMixin],
    teacher: ModelMixin | None,
    inputs: dict[str, torch.Tensor],
    features: list[list[str]],
    item: int = 0,
) -> ModelCosts:
    """What student and teacher cost, without what encodes images and captions and decodes samples.

    Args:
        make_student: Returns the student as it trains, with adapters if it is to have some, on the meta device.
        teacher: On the meta device, or `None`.
        inputs: Arguments of both, of one image, on the meta device, what is noisy first.
        features: `[student module, teacher module]` each.
        item: See [`count_features`].
    """
    how = plan.gradient_checkpointing, plan.batch_size, plan.mixed_precision
    macs, *activations = estimate_activations(make_student, *how, **inputs)
    student = make_student()
    total = sum(parameter.numel() for parameter in student.parameters())
    trained = sum(parameter.numel() for parameter in student.parameters() if parameter.requires_grad)
    outputs = math.prod((student.config.out_channels, *next(iter(inputs.values())).shape[2:]))
    costs = ModelCosts(macs, activations, trained, total - trained, adapters=trained < total, outputs=outputs)
    if teacher is not None:
        teacher_macs, *_ = profile_forward(teacher.requires_grad_(False), **inputs)
        weights = 0 if plan.offload_teacher else count_bytes(teacher, plan.teacher_dtype, plan.mixed_precision)
        elements = count_features(teacher, features, inputs, item)
        costs = costs._replace(teacher_macs=teacher_macs, teacher_bytes=weights, features=elements)
    return costs._replace(whole=count_whole(student, teacher, costs.teacher_bytes)) if plan.fsdp else costs


def print_estimates(plan: RunPlan, costs: ModelCosts) -> None:
    """Print what a run holds at its peak, how long it takes, and what a cached teacher takes."""
    print_memory_estimate(*estimate_memory(plan, costs), plan.processes)
    print_time_estimate(plan, costs)
    if plan.cached_draws is not None:
        print_cache_estimate(plan, costs)


def estimate_memory(plan: RunPlan, costs: ModelCosts) -> tuple[str, dict[str, int]]:
    """What a training holds on one process when it holds most: that moment's name, and the bytes by part.

    On a GPU, 1.02 to 1.11 of it was allocated, in the runs of docs/evidence.md.
    """
    width = dtype_of(plan.mixed_precision).itemsize
    trained, processes = costs.trained, plan.processes
    kept, recomputed = costs.activations
    whole = costs.whole if processes > 1 else None  # one process has nobody to spread to
    # DistributedDataParallel's buckets, of which the gradients are views, are there from the first step to the last.
    buckets = processes > 1 and whole is None
    held = {
        "trained weights (fp32)": 4 * trained,
        "frozen weights of the student": width * costs.frozen,
        "gradients (fp32)": 4 * trained,
        "optimizer moments": (2 if plan.use_8bit_adam else 8) * trained,
        "averaged weights": 4 * trained if plan.use_ema else 0,
        "teacher weights": costs.teacher_bytes if plan.live_teacher else 0,
    }
    always = {name: size // (processes if whole else 1) for name, size in held.items()}
    always |= {"encoders' weights": costs.encoding.weights, "tables of positions": costs.tables}
    # Those of the micro-batches before are there in the forward pass, too.
    keeps_gradients = plan.accumulation_steps > 1 or buckets
    gradients = {} if keeps_gradients else {"gradients (fp32)": always.pop("gradients (fp32)")}
    batch = f"student activations, batch {plan.batch_size}"
    # The feature term has both models' features in float32. The backward pass begins with the gradients of them all.
    moments = {
        "after the forward pass": {
            batch: kept,
            "copies of the weights for autocast": width * trained if width < 4 and not recomputed else 0,
            "features of both models and gradients": 12 * costs.features * plan.batch_size,
        },
        "while a block is recomputed": {
            batch: kept,
            "the block being recomputed": recomputed,
            "gradients of the features": width * costs.features * plan.batch_size,
        },
        "after the backward pass": gradients,
    }
    if whole:
        weights, unspread = "weights that are whole for a while", "gradients that are not spread yet"
        begins, *later = moments.values()
        begins[weights] = whole.weights
        for moment in later:
            moment |= {weights: whole.weights, unspread: whole.gradients}
        moments["while the teacher predicts"] = {weights: whole.teacher if plan.live_teacher else 0}
    if plan.use_ema and buckets:  # elsewhere gradients have just made room for it
        moments["while weights are averaged"] = {"their difference to the average": 4 * trained}
    moments["while images are encoded"] = {"working set of the VAE": costs.encoding.working_set}  # nothing is whole
    moments["while samples are decoded"] = {"VAE that decodes and its working set (fp32)": costs.decoding}
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    return moment, always | moments[moment]


def print_memory_estimate(moment: str, parts: dict[str, int], processes: int = 1) -> None:
    """Print what [`estimate_memory`] returned, in MiB."""
    each = f" of each of {processes} processes" if processes > 1 else ""
    without = "without the teacher's working set and the CUDA context"
    print(f"memory{each} at its peak, {moment}, estimated, {without}:")
    for name, size in [*parts.items(), ("sum", sum(parts.values()))]:
        if size:
            print(f"  {name:<40}{size / 2**20:>12,.1f} MiB")


def print_time_estimate(plan: RunPlan, costs: ModelCosts) -> None:
    """Print what each process computes, and how long that takes where a card reaches a share of its peak.

    A backward pass counts as two forward passes, for the gradients of inputs and weights. With adapters it counts as
    one, since few weights have gradients. Encoders count as if all of them computed in the precision of the run: a VAE
    in float32 takes longer. What processes send each other is not counted.
    """
    passes = (2 if costs.adapters else 3) + plan.gradient_checkpointing
    teacher_macs, images = costs.teacher_macs if plan.live_teacher else 0, plan.batch_size * plan.accumulation_steps
    flops = 2 * plan.steps * images * (passes * costs.macs + teacher_macs + costs.encoding.macs)
    whose = "student, teacher and encoders" if costs.encoding.macs else "student and teacher"
    each = f" of each of {plan.processes} processes, without what they send" if plan.processes > 1 else ""
    print(f"time{each}, estimated: {plan.steps:,} steps of {images} images are {flops:.2e} FLOPs of {whose}")
    for card, seconds in _seconds_by_card(flops, plan.mixed_precision).items():
        hours = seconds / 3600
        print(f"  {card:<40}{hours:>12,.{1 if hours >= 1 else 3}f} h")


def print_cache_estimate(plan: RunPlan, costs: ModelCosts) -> None:
    """Print what the teacher's predictions take, on the device and on the disk, and how long it takes to cache them.

    All processes fill the cache together. Where the number of images is not known, it is the size of each thousand.
    """
    rows, width = plan.cached_draws * (plan.images or 1000), DTYPES[plan.cached_dtype].itemsize
    of = f"{plan.images:,} images" if plan.images else "each 1,000 images (--max_train_samples says how many)"
    beforehand = (costs.teacher_bytes + costs.decoding) / 2**20
    print(f"beforehand, the teacher and what decodes its samples: {beforehand:,.1f} MiB")
    print(f"the teacher's predictions, cached beforehand, for {of}: {rows * costs.outputs * width / 2**20:,.1f} MiB")
    flops = 2 * rows * costs.teacher_macs / plan.processes
    for card, seconds in _seconds_by_card(flops, plan.mixed_precision).items():
        print(f"  {card:<40}{seconds / 60:>12,.3g} min")


def _seconds_by_card(flops: float, mixed_precision: str | None) -> dict[str, float]:
    """How long the FLOPs take on each card, by its name and the share of its peak."""
    seconds = {}
    for card, (single, half) in PEAKS.items():
        peak = half if dtype_of(mixed_precision).itemsize == 2 else single
        seconds[f"{card}, at {SHARE_OF_PEAK:.0%} of {peak} TFLOP/s"] = flops / (SHARE_OF_PEAK * peak * 1e12)
    return seconds
