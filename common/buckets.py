# Copyright 2026 The LIFT and PLACE distillation authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Which size does each image have in a run with aspect-ratio buckets, and how does a batch get images of one size?"""

import bisect
import itertools
import warnings
from collections.abc import Iterator
from typing import Any

from common.data import measure_images
from common.errors import fail
from common.images import choose_size
from common.teachers import vae_factor

import datasets
import torch
from accelerate.logging import get_logger
from diffusers import AutoencoderKL, ModelMixin, __version__
from diffusers.training_utils import generate_aspect_ratio_buckets, parse_buckets_string
from packaging.version import parse
from torch.utils.data import BatchSampler, RandomSampler

from lift_utils import check_group_size


logger = get_logger(__name__)


def read_buckets(
    given: str | None,
    resolution: int,
    factor: int,
    group_size: int | None,
    multiple: int,
    largest: int | None = None,
) -> list[tuple[int, int]] | None:
    """The sizes (height, width) that `--aspect_ratio_buckets` asks for; those that no step could take end the run.

    Args:
        given: The flag's value: "auto", or sizes in the notation of Diffusers; `None` is no buckets.
        resolution: Side of the square whose area the buckets of "auto" have.
        factor: Pixels per latent.
        group_size: Of PLACE, `None` for other losses.
        multiple: What the models need each side to be divisible by.
        largest: The longest side that the models take; `None` is any.
    """
    if given is None:
        return None
    subject = f"--aspect_ratio_buckets {given}"
    if given == "auto":
        # Of sides that the models take: those with which PLACE's groups divide each bucket, too.
        steps = range(multiple, resolution + 1, multiple)
        whole = (step for step in steps if not group_size or (step // factor) ** 2 % group_size == 0)
        buckets = generate_aspect_ratio_buckets(resolution, next(whole, resolution))
    else:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what the models need divisible is checked below
                buckets = parse_buckets_string(given)
        except ValueError as error:
            remedy = 'pass auto, or sizes such as "512,512;448,576"'
            fail(f"{subject}: {str(error).rstrip('.')}; {remedy}")
    for height, width in buckets:
        bucket = f"{subject}: the bucket {height},{width}"
        if height % multiple or width % multiple:
            fail(f"{bucket} is not divisible by the models; pass multiples of {multiple}")
        if largest and max(height, width) > largest:
            fail(f"{bucket} has more patches along a side than the teacher; pass sides of {largest} at most")
        if not 0.5 <= height * width / resolution**2 <= 2:  # memory, and the grid, are those of the resolution
            fail(f"{bucket} has not about the area of --resolution {resolution}; pass sizes that have, or another one")
        if group_size:
            try:
                check_group_size(group_size, height * width // factor**2)
            except ValueError as error:
                fail(f"{bucket} with --group_size {group_size}: {error}; pass that, or another bucket")
    return buckets


def sort_by_bucket(
    dataset: datasets.Dataset, column: str, buckets: list[tuple[int, int]], num_workers: int
) -> tuple[datasets.Dataset, list[list[int]]]:
    """The rows in the order of their buckets, so that neighbours have one size; within a bucket they keep theirs.

    It says how many images each bucket has.

    Args:
        dataset: With an undecoded image column, all of whose images decode.
        column: Its name.
        buckets: Of [`read_buckets`].
        num_workers: Processes that decode, 0 for this one.

    Returns:
        The dataset, and height, width and number of rows of each bucket that has any, in the dataset's order.
    """
    sizes = [choose_size(*image, buckets) for image in measure_images(dataset, column, num_workers)]
    order = sorted(range(len(sizes)), key=lambda row: sizes[row])
    counts = [[*size, len(list(rows))] for size, rows in itertools.groupby(sizes[row] for row in order)]
    table = ", ".join(f"{height} x {width}: {count:,}" for height, width, count in counts)
    logger.info(f"images by bucket, height x width: {table}")
    return dataset.select(order), counts


class BucketBatchSampler(BatchSampler):
    """Whole batches of rows of one bucket, in the order in which a sampler of single rows fills them.

    What does not fill a batch waits for the next epoch's order. Accelerate puts its own seeded sampler in the place of
    `sampler`, as it does with any shuffling dataloader.

    Args:
        sampler: Of all rows, which may be several passes over the buckets' rows.
        batch_size: Rows of a batch.
        counts: Of the rows of each bucket, in the order of the rows.
    """

    def __init__(self, sampler: RandomSampler, batch_size: int, counts: list[int]):
        super().__init__(sampler, batch_size, drop_last=True)
        self.ends, self.passes = list(itertools.accumulate(counts)), len(sampler) // sum(counts)
        self.batches = [self.passes * count // batch_size for count in counts]  # an epoch, by bucket

    def __iter__(self) -> Iterator[list[int]]:
        waiting = [[] for _ in self.ends]
        for row in self.sampler:
            rows = waiting[bisect.bisect(self.ends, row % self.ends[-1])]
            rows.append(row)
            if len(rows) == self.batch_size:
                yield rows.copy()
                rows.clear()

    def __len__(self) -> int:
        return sum(self.batches)


def make_batches(
    dataset: torch.utils.data.Dataset, batch_size: int, buckets: list[list[int]], num_processes: int
) -> BucketBatchSampler:
    """Shuffled batches of rows of one bucket. Buckets that fill none are named; where none is full the run ends.

    Args:
        buckets: Of [`sort_by_bucket`].
        num_processes: Each of them takes a batch of its own, maybe of another bucket.
    """
    sampler = BucketBatchSampler(RandomSampler(dataset), batch_size, [count for *_, count in buckets])
    if len(sampler) < num_processes:
        whole = f"the buckets fill {len(sampler)} whole batches, fewer than there are processes ({num_processes})"
        remedy = "pass a smaller one, fewer --aspect_ratio_buckets, or more images"
        fail(f"--train_batch_size {batch_size}: {whole}; {remedy}")
    left = [bucket for bucket, batches in zip(buckets, sampler.batches) if batches == 0]
    if left:
        table = ", ".join(f"{height} x {width}: {count}" for height, width, count in left)
        logger.warning(f"buckets with fewer images than --train_batch_size {batch_size} are not trained on: {table}")
    return sampler


def latent_shape(batch: dict[str, Any], vae: AutoencoderKL | None) -> tuple[int, int, int]:
    """The shape (C, h, w) of the latents of a batch, or of one of its rows.

    Args:
        batch: With "moments" (..., C, h, w), or with "images" (..., 3, H, W).
        vae: What encodes the images, of which the config is asked alone; moments need none.
    """
    if "moments" in batch:
        return tuple(batch["moments"].shape[-3:])
    height, width = batch["images"].shape[-2:]
    return vae.config.latent_channels, height // vae_factor(vae), width // vae_factor(vae)


def default_resolution(model: ModelMixin, vae: AutoencoderKL) -> int:
    """The side, in pixels, of the square images of a model of latents. One of other images ends the run.

    Early conversions of Stable Diffusion have half of it in their config. Their pipeline corrects that, and so do we.
    """
    side = model.config.sample_size
    if not isinstance(side, int):
        fail(f"--pretrained_teacher_model has the sample_size {side}, which is no square; pass --resolution")
    if side < 64 and parse(model.config.get("_diffusers_version") or __version__) < parse("0.9.0.dev0"):
        logger.warning(f"the teacher's config, of an early Diffusers, says sample_size {side}: taken for 64")
        side = 64
    return side * vae_factor(vae)
