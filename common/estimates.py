# Copyright 2026 The LIFT and PLACE distillation authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""What will a run hold in memory and on the disk, and how long will it take?"""

from common.costs import DTYPES, NO_ENCODING, Encoding, dtype_of
from common.sharding import Whole


# Peaks of cards for commodity PCs by NVIDIA's architecture white papers, dense, in TFLOP/s: of float32, and of tensor
# cores on half precision that sum up in float32.
PEAKS = {"RTX 3060, 12 GB": (12.7, 25.5), "RTX 4090, 24 GB": (82.6, 165.2)}
SHARE_OF_PEAK = 0.3


def estimate_memory(
    activations: tuple[int, int],
    student: int,
    teacher_bytes: int,
    batch_size: int,
    mixed_precision: str | None,
    use_8bit_adam: bool,
    use_ema: bool,
    keeps_gradients: bool,
    trained: int | None = None,
    encoders: Encoding = NO_ENCODING,
    features: int = 0,
    processes: int = 1,
    whole: Whole | None = None,
    decoding: int = 0,
    tables: int = 0,
) -> tuple[str, dict[str, int]]:
    """What a training holds on one process when it holds most: that moment's name, and the bytes by part.

    On a GPU, 1.02 to 1.11 of it was allocated, in the runs of docs/evidence.md.

    Args:
        activations: Bytes that the forward pass keeps to the backward pass, and those of the block that gradient
            checkpointing recomputes, 0 without. See [`estimate_activations`].
        student: Parameters of the student.
        teacher_bytes: Weights of the teacher, 0 without one on the device.
        batch_size: Images per device and micro-batch.
        mixed_precision: "fp16", "bf16", "no" or `None`.
        use_8bit_adam: Whether the optimizer keeps its moments in 8 bits.
        use_ema: Whether there is a moving average of the trained weights.
        keeps_gradients: Whether gradients are held during the forward pass, too: those of the micro-batches before.
        trained: Parameters that learn, if not all of the student's; those that do not are held like the teacher's.
        encoders: What encodes images and captions in every step.
        features: Elements of the teacher's features of one image.
        processes: That train together, each on a device of its own.
        whole: What is whole for a while where `--fsdp` spreads student and teacher over them, see [`count_whole`];
            `None` without. One process has nobody to spread to.
        decoding: Bytes of what decodes the samples of a grid.
        tables: Bytes of the models' tables of positions, which each process holds as they are.
    """
    width = dtype_of(mixed_precision).itemsize
    trained = student if trained is None else trained
    kept, recomputed = activations
    whole = whole if processes > 1 else None
    # DistributedDataParallel's buckets, of which the gradients are views, are there from the first step to the last.
    buckets = processes > 1 and whole is None
    keeps_gradients = keeps_gradients or buckets
    held = {
        "trained weights (fp32)": 4 * trained,
        "frozen weights of the student": width * (student - trained),
        "gradients (fp32)": 4 * trained,
        "optimizer moments": (2 if use_8bit_adam else 8) * trained,
        "averaged weights": 4 * trained if use_ema else 0,
        "teacher weights": teacher_bytes,
    }
    always = {name: size // (processes if whole else 1) for name, size in held.items()}
    always |= {"encoders' weights": encoders.weights, "tables of positions": tables}
    gradients = {} if keeps_gradients else {"gradients (fp32)": always.pop("gradients (fp32)")}
    batch = f"student activations, batch {batch_size}"
    # The feature term has both models' features in float32. The backward pass begins with the gradients of them all.
    moments = {
        "after the forward pass": {
            batch: kept,
            "copies of the weights for autocast": width * trained if width < 4 and not recomputed else 0,
            "features of both models and gradients": 12 * features * batch_size,
        },
        "while a block is recomputed": {
            batch: kept,
            "the block being recomputed": recomputed,
            "gradients of the features": width * features * batch_size,
        },
        "after the backward pass": gradients,
    }
    if whole:
        weights, unspread = "weights that are whole for a while", "gradients that are not spread yet"
        begins, *later = moments.values()
        begins[weights] = max(whole.weights, whole.teacher)
        for moment in later:
            moment |= {weights: whole.weights, unspread: whole.gradients}
    if use_ema and buckets:  # elsewhere gradients have just made room for it
        moments["while weights are averaged"] = {"their difference to the average": 4 * trained}
    moments["while images are encoded"] = {"working set of the VAE": encoders.working_set}  # and nothing is whole
    moments["while samples are decoded"] = {"VAE that decodes and its working set (fp32)": decoding}
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


def print_time_estimate(
    student_macs: int,
    teacher_macs: int,
    images: int,
    steps: int,
    checkpointing: bool,
    mixed_precision: str | None,
    processes: int = 1,
    encoder_macs: int = 0,
    adapters: bool = False,
) -> None:
    """Print what each process computes, and how long that takes where a card reaches a share of its peak.

    A backward pass counts as two forward passes, for the gradients of inputs and weights. With adapters it counts as
    one, since few weights have gradients. What processes send each other is not counted.

    Args:
        student_macs: Multiply-accumulates of a forward pass on one image.
        teacher_macs: The teacher's, 0 without one.
        images: Per step, by all accumulated micro-batches of one process.
        steps: Of the whole run.
        checkpointing: Whether the student's forward pass runs twice.
        mixed_precision: "fp16", "bf16", "no" or `None`.
        processes: That take a step together, each with as many images.
        encoder_macs: Of what encodes an image and its caption in every step, as if all of it computed in the precision
            of the run. A VAE in float32 takes longer.
        adapters: Whether the student's own weights are frozen.
    """
    passes = (2 if adapters else 3) + checkpointing
    flops = 2 * steps * images * (passes * student_macs + teacher_macs + encoder_macs)
    whose = "student, teacher and encoders" if encoder_macs else "student and teacher"
    each = f" of each of {processes} processes, without what they send" if processes > 1 else ""
    print(f"time{each}, estimated: {steps:,} steps of {images} images are {flops:.2e} FLOPs of {whose}")
    for card, seconds in _seconds_by_card(flops, mixed_precision).items():
        hours = seconds / 3600
        print(f"  {card:<40}{hours:>12,.{1 if hours >= 1 else 3}f} h")


def print_cache_estimate(
    passes: int | None,
    outputs: int,
    storage: str,
    teacher_macs: int,
    images: int | None,
    mixed_precision: str | None,
    beforehand: int,
    processes: int = 1,
) -> None:
    """Print what the teacher's predictions take, on the device and on the disk, and how long it takes to cache them.

    Args:
        passes: `--cache_teacher`; `None` prints nothing.
        outputs: Elements of a prediction.
        storage: `--cache_teacher_dtype`.
        teacher_macs: Multiply-accumulates of a forward pass on one image.
        images: Of the data set. A dry run does not read it: `None` prints the size for each thousand.
        mixed_precision: "fp16", "bf16", "no" or `None`.
        beforehand: Bytes of the teacher on the device, and of what decodes its samples.
        processes: That fill it together.
    """
    if passes is None:
        return
    width = DTYPES[storage].itemsize
    rows = passes * (images or 1000)
    of = f"{images:,} images" if images is not None else "each 1,000 images (--max_train_samples says how many)"
    print(f"beforehand, the teacher and what decodes its samples: {beforehand / 2**20:,.1f} MiB")
    print(f"the teacher's predictions, cached beforehand, for {of}: {rows * outputs * width / 2**20:,.1f} MiB")
    for card, seconds in _seconds_by_card(2 * rows * teacher_macs / processes, mixed_precision).items():
        print(f"  {card:<40}{seconds / 60:>12,.3g} min")


def _seconds_by_card(flops: float, mixed_precision: str | None) -> dict[str, float]:
    """How long the FLOPs take on each card, by its name and the share of its peak."""
    seconds = {}
    for card, (single, half) in PEAKS.items():
        peak = half if dtype_of(mixed_precision).itemsize == 2 else single
        seconds[f"{card}, at {SHARE_OF_PEAK:.0%} of {peak} TFLOP/s"] = flops / (SHARE_OF_PEAK * peak * 1e12)
    return seconds
