# Copyright 2026 The LIFT and PLACE distillation authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""How are images trained on that are too many to keep, and how does such a run go on exactly where it stopped?

A stream is endless: pass after pass, each with its shards in another order. Every data worker of every process reads
shards of its own, one after the other, fills a buffer, shuffles it and yields its rows. All of this follows from the
seed, the process, the worker and the number of the pass, so the number of batches that are done says which comes next,
and a checkpoint need not hold more. Bookmarks, which workers write as they read, only make it quick to get there.
"""

import argparse
import copy
import hashlib
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from common.bookmarks import Bookmark, Bookmarks, forget_bookmarks
from common.ending import outlive_signals
from common.errors import fail, first_line
from common.fetching import fetch
from common.webdataset import forgive_damage

import datasets
import numpy as np
import torch
from accelerate.logging import get_logger
from accelerate.utils import send_to_device
from datasets.distributed import split_dataset_by_node


logger = get_logger(__name__)

Row = dict[str, Any]

# What may be unusable is a share of so many rows at least: a few bad images at the beginning are no large share.
FEWEST_ROWS = 1000

# Flags that need all of the data before the first step, or its length, and what to do instead.
REFUSED = {
    "cache_latents": "encodes all images before the first step; drop it, or (SD3) pass --no-cache_latents",
    "cache_teacher": "predicts on all images before the first step; drop one of them",
    "aspect_ratio_buckets": "sorts all images before the first step; drop one of them",
    "max_train_samples": "chooses among all images; drop it: --max_train_steps says how many a run takes",
    "num_train_epochs": "needs the number of images, which a stream does not know; pass --max_train_steps",
}


def add_streaming_arguments(group: argparse._ArgumentGroup) -> None:
    """Add the flags of streamed data to the group "data" of [`add_shared_arguments`]."""
    group.add_argument(
        "--streaming", action="store_true", help="read the data as they are needed: webdataset shards, or from the Hub"
    )
    group.add_argument(
        "--shuffle_buffer", type=int, default=1000, help="images that a data worker shuffles at a time (--streaming)"
    )


def check_streaming(flags: dict[str, Any]) -> None:
    """Refuse what does not go with `--streaming`.

    Args:
        flags: The values of all flags, by name.
    """
    for name, why in REFUSED.items():
        value = flags.get(name)
        if flags["streaming"] and value is not None and value is not False:
            given = f"--{name}" if value is True else f"--{name} {value}"
            fail(f"{given} with --streaming: it {why}")


def find_nothing(row: Row) -> None:
    """No fault with any row."""


class StreamedDataset:
    """Data that are read as they are needed. Its length is 0: it is not known.

    An image that cannot be used leaves its place in the batch to another one of the batch, or to the next that can: so
    the order does not depend on which images these are, and to skip a row is not to decode it.

    Args:
        stream: Undecoded rows, of [`common.data.load_images`].
        source: The flag and value they came from, for messages.
        load: From columns of undecoded values to columns of tensors.
        image_column: The column of the images.
        max_unreadable: The largest share of the images that may be unusable.
        seed: Of the order.
        shuffle_buffer: Rows that a worker holds and shuffles.
        output_dir: Of the run; bookmarks go into its folder ".stream".
        find_fault: From a row to what is wrong with it beside its image, e.g. "have no caption"; `None` where nothing.
    """

    def __init__(
        self,
        stream: datasets.IterableDataset,
        source: str,
        load: Callable[[dict[str, list]], dict[str, list]],
        image_column: str,
        max_unreadable: float,
        seed: int,
        shuffle_buffer: int,
        output_dir: str,
        find_fault: Callable[[Row], str | None] = find_nothing,
    ):
        self.stream, self.source, self.load, self.image_column = stream, source, load, image_column
        self.max_unreadable, self.seed, self.shuffle_buffer = max_unreadable, seed, shuffle_buffer
        self.folder, self.find_fault = Path(output_dir) / ".stream", find_fault
        self.seen = self.unusable = 0  # rows, by the worker that has this copy

    def __len__(self) -> int:
        return 0

    def read(self, stream: datasets.IterableDataset) -> Iterator[Row]:
        """The rows of one pass over a stream. Whatever the reading raises ends the run."""
        forgive_damage()
        try:
            yield from stream
        except Exception as error:  # of the network, an archive or a table
            remedy = "see that it is there and whole; --resume_from_checkpoint latest then goes on"
            fail(f"{self.source}: reading stopped at {first_line(error)}; {remedy}")

    def head(self, count: int) -> list[Row]:
        """The first `count` undecoded rows with which nothing is wrong, the image aside."""
        rows = (row for row in self.read(self.stream) if self.find_fault(row) is None)
        first = list(itertools.islice(rows, count))
        if not first:
            fail(f"{self.source} has no images that can be trained on; pass other data")
        return first

    def sample(self, count: int) -> list[dict[str, torch.Tensor]]:
        """`count` loaded rows, chosen by the seed among the first ones that a buffer takes."""
        rows = self.head(max(count, self.shuffle_buffer))
        np.random.default_rng(self.seed).shuffle(rows)
        return self.load_rows(rows[:count])

    def load_rows(self, rows: list[Row], following: Iterable[Row] = ()) -> list[dict[str, torch.Tensor]]:
        """Rows as tensors; a usable one, or else one of `following`, takes the place of each that is not."""
        loaded = [self._load_row(row) for row in rows]
        usable = [row for row in loaded if row is not None]
        if not usable:
            stand_ins = filter(None, map(self._load_row, itertools.islice(following, FEWEST_ROWS)))
            usable = list(itertools.islice(stand_ins, 1))
        if not usable:
            fail(f"{self.source}: none of many images in a row can be used, see above; repair or remove them")
        return [usable[place % len(usable)] if row is None else row for place, row in enumerate(loaded)]

    def _load_row(self, row: Row) -> dict[str, torch.Tensor] | None:
        self.seen += 1
        image = row[self.image_column] or {}
        if "://" in (image.get("path") or "") and not image.get("bytes"):
            row = {**row, self.image_column: {**image, "bytes": fetch(image["path"], self.source)}}
        fault = self.find_fault(row)
        if fault is None:
            try:
                columns = self.load({name: [value] for name, value in row.items()})
                return {name: values[0] for name, values in columns.items()}
            except Exception as error:  # decoders raise anything on damaged files
                fault = f"cannot be read ({first_line(error)})"
        self.unusable += 1
        name = image.get("path") or "an image without a name"
        print(f"{self.source}: another image takes the place of {name}, of those that {fault}", flush=True)
        if self.unusable > self.max_unreadable * max(self.seen, FEWEST_ROWS):
            found = f"{self.unusable} of {self.seen} images cannot be used, the last of those that {fault}"
            fail(f"{self.source}: {found}; repair or remove them, or raise --max_unreadable {self.max_unreadable}")
        return None


class StreamPart(torch.utils.data.IterableDataset):
    """The batches of one process: each of its workers yields whole batches of its own, without end.

    Args:
        dataset: Of which each process has its part.
        batch_size: Rows of a batch.
        rank: The process.
        world: How many there are.
        folder: Of the bookmarks.
        first: Number of the batch to begin with, for each worker.
    """

    def __init__(self, dataset: StreamedDataset, batch_size: int, rank: int, world: int, folder: Path, first: int):
        self.dataset, self.batch_size, self.rank, self.folder, self.first = dataset, batch_size, rank, folder, first
        self.stream = split_dataset_by_node(dataset.stream, rank, world)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor] | str]:
        """Batches; in place of one, what ends the run: a worker's own end would not say why."""
        info = torch.utils.data.get_worker_info()
        rows, ahead = self.rows(info.id if info else 0, self.first * self.batch_size), deque()

        def read_ahead() -> Iterator[Row]:
            for row in rows:
                ahead.append(row)  # its own turn comes, too
                yield row

        try:
            while True:
                batch = [ahead.popleft() if ahead else next(rows) for _ in range(self.batch_size)]
                yield torch.utils.data.default_collate(self.dataset.load_rows(batch, read_ahead()))
        except SystemExit as end:
            if not isinstance(end.code, str):  # a signal's
                raise
            yield end.code

    def rows(self, worker: int, start: int) -> Iterator[Row]:
        """A worker's undecoded rows from a place on, pass after pass.

        Args:
            worker: `datasets` gives each that asks for rows its share of the shards.
            start: How many rows come before.
        """
        size, seed = self.dataset.shuffle_buffer, self.dataset.seed
        stream = copy.deepcopy(self.stream)  # else all workers would share the number of the pass
        bookmarks = Bookmarks(self.folder / f"rank-{self.rank}-worker-{worker}.jsonl")
        row, number, block, state = bookmarks.before(start)
        while True:
            # The only seed that the order of the shards has; 0 would leave them as they are.
            stream.set_epoch(1 + int(np.random.default_rng([seed, number]).integers(2**62)))
            stream.load_state_dict(state or {})
            rows = self.dataset.read(stream)
            buffer = list(itertools.islice(rows, size))
            count = block * size + len(buffer)
            while buffer:
                bookmarks.add(Bookmark(row, number, block, state))
                np.random.default_rng([seed, self.rank, worker, number, block]).shuffle(buffer)
                following, state = [], stream.state_dict()  # the next buffer begins there
                while buffer:  # a row in for a row out: no more than `size` are held, and none is long waited for
                    taken = buffer.pop()
                    if row >= start:
                        yield taken
                    row += 1
                    following += itertools.islice(rows, 1)
                buffer, block, count = following, block + 1, count + len(following)
            if count < self.batch_size:
                part = f"the {count} images that a data worker has in a pass over {self.dataset.source}"
                remedy = "pass a smaller one, or fewer --dataloader_num_workers"
                fail(f"--train_batch_size {self.batch_size} is more than {part}; {remedy}")
            number, block, state = number + 1, 0, None


class StreamLoader:
    """What stands for a dataloader where the data are streamed. Its length is 0: it is not known.

    Args:
        dataset: The data.
        batch_size: Images of a process and micro-batch.
        num_workers: Processes that read and decode, 0 for this one; there are no more than shards.
        device: Of the batches.
        rank: This process.
        world: How many there are.
    """

    def __init__(
        self,
        dataset: StreamedDataset,
        batch_size: int,
        num_workers: int,
        device: torch.device,
        rank: int = 0,
        world: int = 1,
    ):
        shards = split_dataset_by_node(dataset.stream, rank, world).num_shards
        self.dataset, self.batch_size, self.device, self.rank, self.world = dataset, batch_size, device, rank, world
        self.num_workers = min(num_workers, shards)
        logger.info(f"{dataset.source} is streamed: {shards:,} shards of this process, {self.num_workers} workers")
        order = dataset.source, dataset.seed, dataset.shuffle_buffer, world, max(1, self.num_workers)
        self.folder = dataset.folder / hashlib.sha256(repr(order).encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return 0

    def batches_from(self, done: int) -> Iterator[dict[str, torch.Tensor]]:
        """All batches after the first `done`, without end. Of those no image is decoded, but in a batch a worker."""
        if done and not self.folder.exists():
            again = f"no bookmark is of this order, so all before batch {done:,} is read again"
            same = "--seed, --shuffle_buffer, --dataloader_num_workers and number of processes"
            logger.warning(f"{self.dataset.source}: {again}; to go on in the run's order, pass its {same}")
        if not done:
            forget_bookmarks(self.folder, self.rank)
        # The workers take turns: those whose turn has passed give a batch that is done.
        first, passed = divmod(done, max(1, self.num_workers))
        batches = torch.utils.data.DataLoader(
            StreamPart(self.dataset, self.batch_size, self.rank, self.world, self.folder, first),
            batch_size=None,
            num_workers=self.num_workers,
            worker_init_fn=outlive_signals,
            pin_memory=self.device.type == "cuda",
        )
        for batch in itertools.islice(batches, passed, None):
            if isinstance(batch, str):
                raise SystemExit(batch)
            yield send_to_device(batch, self.device, non_blocking=True)
