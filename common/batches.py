# Copyright 2026 The LIFT and PLACE distillation authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Which images come together in a batch, epoch after epoch, and which batch comes next?"""

from collections.abc import Iterator

from common.buckets import make_batches
from common.ending import OutOfData, Stopped, StopSignals, outlive_signals
from common.errors import fail, first_line
from common.streaming import StreamedDataset, StreamLoader

import torch
from accelerate import Accelerator, skip_first_batches


def make_dataloader(
    dataset: torch.utils.data.Dataset | StreamedDataset,
    batch_size: int,
    num_workers: int,
    accelerator: Accelerator,
    buckets: list[list[int]] | None = None,
) -> torch.utils.data.DataLoader | StreamLoader:
    """Shuffled whole batches, of one bucket each; the images that do not fill one wait for another epoch's order."""
    if isinstance(dataset, StreamedDataset):
        place = accelerator.device, accelerator.process_index, accelerator.num_processes
        return StreamLoader(dataset, batch_size, num_workers, *place)
    if len(dataset) < batch_size * accelerator.num_processes:
        on = f" on each of {accelerator.num_processes} processes" * (accelerator.num_processes > 1)
        fail(f"--train_batch_size {batch_size}{on} is more than the {len(dataset)} images; pass a smaller one")
    order = {"batch_size": batch_size, "shuffle": True, "drop_last": True}
    if buckets:
        order = {"batch_sampler": make_batches(dataset, batch_size, buckets, accelerator.num_processes)}
    return torch.utils.data.DataLoader(
        dataset,
        **order,
        num_workers=num_workers,
        worker_init_fn=outlive_signals,
        persistent_workers=num_workers > 0,
        pin_memory=accelerator.device.type == "cuda",
    )


def endless_batches(
    dataloader: torch.utils.data.DataLoader | StreamLoader, batches_done: int, stop: StopSignals
) -> Iterator[dict[str, torch.Tensor]]:
    """Batches of a prepared dataloader, epoch after epoch, from a position on; skipped batches are not decoded.

    Raises:
        Stopped: In place of a batch, after a signal. One process stops waiting for its workers, too, and where the
            data cannot be read.
    """
    streamed, epoch, skip = isinstance(dataloader, StreamLoader), 0, batches_done
    if not streamed:
        epoch, skip = divmod(batches_done, len(dataloader))
    fetch = stop.interruptible(_read) if stop.alone else next  # others would wait for the one that cannot go on
    while True:
        if streamed:
            batches = dataloader.batches_from(skip)  # which do not end
        else:
            dataloader.set_epoch(epoch)
            resumed = skip_first_batches(dataloader, skip) if skip else dataloader
            # Accelerate does not hand this on: each batch would wait for the device.
            resumed._non_blocking = dataloader._non_blocking
            batches = iter(resumed)
        while (batch := fetch(batches, None)) is not None:
            stop.check()
            yield batch
        epoch, skip = epoch + 1, 0


def _read(batches: Iterator[dict[str, torch.Tensor]], end: None) -> dict[str, torch.Tensor] | None:
    """The next batch; `end` after the last one."""
    try:
        return next(batches, end)
    except Stopped:
        raise
    except SystemExit as error:  # says what is wrong
        raise OutOfData(error.code) from None
    except OSError as error:  # of this process or a worker
        raise OutOfData(f"error: the data cannot be read: {first_line(error)}; see that they are there") from error
