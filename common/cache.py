# Copyright 2026 The LIFT and PLACE distillation authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""How are the encoders' outputs computed once, kept on disk, and shared by all runs that agree in what shapes them?"""

import hashlib
import itertools
import json
import shutil
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from common.checkpoints import flush
from common.ending import outlive_signals
from common.errors import fail
from common.finite import first_non_finite
from common.memory import fits_the_gpu

import datasets
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from accelerate.utils.memory import clear_device_cache
from huggingface_hub import hf_hub_download
from safetensors.torch import load, save
from tqdm.auto import tqdm


# How many rows a file of cached encodings holds: what a run that is killed while it caches has to do again.
CACHE_SHARD = 512
# Goes up when what a key stands for changes, as when transparent images turned white.
CACHE_VERSION = 2


def cache_encodings(
    dataset: datasets.Dataset | list,
    load_encoder: Callable[[], Callable],
    key: dict[str, Any],
    cache_dir: str | None,
    batch_size: int,
    num_workers: int,
    accelerator: Accelerator,
    period: int | None = None,
    description: str = "Encoding the data",
    batch_flag: str = "--encoding_batch_size",
    overflow: str = 'an encoder overflows: its "{}" are not finite; pass --mixed_precision bf16 or no',
) -> datasets.Dataset:
    """What encoders make of the data, computed once, as a memory-mapped dataset; the encoders are freed then.

    Each process encodes every n-th shard. A shard is renamed into place when it is whole: an interrupted run goes on
    with what is missing, runs side by side share the work, and a finished cache is read without loading the encoders.

    Args:
        dataset: Rows that `torch.utils.data.default_collate` takes; see [`collate_alike`] for rows of several shapes.
        load_encoder: Loads the models and returns a function from a batch to named tensors (B, ...).
        key: Everything that shapes the result, JSON-serialisable: another key is another cache.
        cache_dir: Where the cache goes; `None` is the folder of `datasets`.
        batch_size: Rows at a time.
        num_workers: Processes that load the rows.
        accelerator: Of the run.
        period: Where the rows are several passes over the same data, the length of one. No shard belongs to two of
            them, so that a cache of more passes goes on from one of fewer.
        description: Of the progress bar.
        batch_flag: What `batch_size` is the value of, for messages.
        overflow: The message where a tensor, whose name goes into it, is not finite.

    Returns:
        The named tensors without their batch dimension, row for row.
    """
    shorter = {"tf32": True} if torch.backends.cuda.matmul.allow_tf32 else {}
    text = json.dumps({**key, **shorter, "version": CACHE_VERSION}, sort_keys=True, indent=2)
    root = Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / "lift-encodings"
    folder = root / hashlib.sha256(text.encode()).hexdigest()[:24]
    if len(set(gather_object([folder.name]))) > 1:
        found = "--train_data_dir or --dataset_name: the processes find other data"
        fail(f"{found}; see that all of them read the same files, and that nothing else writes there")
    period = period or len(dataset)
    ends = {
        start: min(start + CACHE_SHARD, first + period)
        for first in range(0, len(dataset), period)
        for start in range(first, first + period, CACHE_SHARD)
    }
    shards = {start: folder / f"rows-{start:09d}" for start in ends}
    mine = list(shards)[accelerator.process_index :: accelerator.num_processes]
    missing = [start for start in mine if not shards[start].exists()]
    if missing:
        if folder.exists():  # a run that still works on it, and this one, meet in the middle
            missing.reverse()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "key.json").write_text(text)
        _sweep(folder)
        encode = load_encoder()
        batches = {
            start: [range(at, min(at + batch_size, ends[start])) for at in range(start, ends[start], batch_size)]
            for start in missing
        }
        asked: deque[range] = deque()
        shown, total = accelerator.is_local_main_process, sum(map(len, batches.values()))
        progress = tqdm(total=total, desc=description, disable=not shown)

        def ask() -> Iterator[range]:
            for start in missing:
                if shards[start].exists():  # another run has been here since
                    progress.update(len(batches[start]))
                    continue
                asked.extend(batches[start])
                yield from batches[start]

        loader = torch.utils.data.DataLoader(
            dataset,
            batch_sampler=ask(),
            num_workers=num_workers,
            worker_init_fn=outlive_signals,
            collate_fn=collate_alike,
        )
        # The others have as many. To look theirs up would make NFS believe later that they are still missing.
        rows_left = sum(ends[start] - start for start in missing) * accelerator.num_processes
        stops, rows, size = set(ends.values()), [], None
        with torch.no_grad(), progress:
            for alike in loader:
                indices = asked.popleft()
                with fits_the_gpu(f"{batch_flag} {batch_size}", "lower it"):
                    for batch in alike:
                        encoded = encode(batch)
                        wrong = first_non_finite(encoded)
                        if wrong is not None:
                            fail(overflow.format(wrong))
                        rows += _to_bytes(encoded)
                progress.update()
                if size is None:
                    size = rows_left * sum(map(len, rows)) / len(rows)
                    progress.set_postfix_str(f"{size / 1e6:,.0f} MB in all")
                    _check_room(folder, size)
                if indices.stop in stops:
                    _write_shard(shards[indices.stop - len(rows)], rows)
                    rows = []
        del encode
        clear_device_cache(garbage_collection=True)
    accelerator.wait_for_everyone()
    if not all(path.exists() for path in shards.values()):
        fail(f"--cache_dir {root.parent} lacks what other processes have written; pass one that all machines share")
    whole = datasets.concatenate_datasets([datasets.load_from_disk(str(path)) for path in shards.values()])
    return whole.with_transform(_from_bytes)


def _check_room(folder: Path, size: float) -> None:
    """Refuse a disk that has no room for as many bytes, before hours are spent on them."""
    free = shutil.disk_usage(folder).free
    if size > free:
        room = f"takes {size / 1e9:,.1f} GB for this cache, and {free / 1e9:,.1f} GB are free there"
        fail(f"--cache_dir {folder.parents[1]} {room}; pass a folder on a larger disk, or --max_train_samples")


def collate_alike(rows: list) -> list:
    """Batches of rows in their order, by `default_collate`; a batch ends where the shapes of the tensors change."""
    groups = itertools.groupby(rows, key=_shapes)
    return [torch.utils.data.default_collate(list(alike)) for _, alike in groups]


def _shapes(row: Any) -> Any:
    if isinstance(row, dict):
        return {name: _shapes(value) for name, value in row.items()}
    return getattr(row, "shape", None)


def _to_bytes(encoded: dict[str, torch.Tensor]) -> list[bytes]:
    """Each row's tensors in the safetensors format, which keeps their dtypes, bfloat16 among them, and shapes."""
    encoded = {name: tensor.cpu() for name, tensor in encoded.items()}
    count = len(next(iter(encoded.values())))
    return [save({name: tensor[row].contiguous() for name, tensor in encoded.items()}) for row in range(count)]


def _from_bytes(batch: dict[str, list[bytes]]) -> dict[str, list[torch.Tensor]]:
    rows = [load(row) for row in batch["tensors"]]
    return {name: [row[name] for row in rows] for name in rows[0]}


def _write_shard(path: Path, rows: list[bytes]) -> None:
    temporary = path.with_name(f".{path.name}-{uuid.uuid4().hex}")  # containers have equal process ids
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    large = datasets.Features({"tensors": datasets.Value("large_binary")})  # "binary" holds no more than 2 GiB
    try:
        datasets.Dataset.from_dict({"tensors": rows}, features=large).save_to_disk(str(temporary))
        for file in temporary.iterdir():
            flush(file)
        temporary.rename(path)
    except OSError:
        if not path.exists():  # else another run has written the same
            raise
    finally:  # also where a signal, or a full disk, ends the writing
        shutil.rmtree(temporary, ignore_errors=True)
        if shown:
            datasets.enable_progress_bars()


def _sweep(folder: Path) -> None:
    """Remove what killed runs have left of shards. What is young may be another run's that is being written."""
    for path in folder.glob(".rows-*"):
        with suppress(FileNotFoundError):  # another process sweeps, too
            if path.stat().st_mtime < time.time() - 3600:
                shutil.rmtree(path, ignore_errors=True)


def identify(source: str, revision: str | None, parts: list[str], index: str = "model_index.json") -> dict[str, Any]:
    """What tells one version of a pipeline's parts from another: the Hub's commit, or the files' sizes and times.

    Args:
        source: A Hub id or a folder.
        revision: On the Hub.
        parts: Folders of the pipeline.
        index: A file that it has on the Hub.
    """
    folder = Path(source)
    if not folder.is_dir():
        return {
            "model": source,
            "commit": Path(hf_hub_download(source, index, revision=revision)).parent.name,
        }
    files = [path for part in parts for path in sorted((folder / part).rglob("*")) if path.is_file()]
    described = [[str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    return {"model": str(folder.resolve()), "files": described}


class JoinedDataset(torch.utils.data.Dataset):
    """Datasets of the same rows with other columns each, as one."""

    def __init__(self, parts: list[datasets.Dataset]):
        self.parts = parts

    def __len__(self) -> int:
        return len(self.parts[0])

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, torch.Tensor]]:
        """A batch of rows, read together: a dataloader asks for them so."""
        parts = [read_rows(part, indices) for part in self.parts]
        return [{name: value for row in rows for name, value in row.items()} for rows in zip(*parts)]


def read_rows(dataset: torch.utils.data.Dataset, indices: list[int]) -> list[dict[str, torch.Tensor]]:
    """Rows of a dataset, read together where it can: a file is then opened and its format undone once for all."""
    together = getattr(dataset, "__getitems__", None)
    return together(indices) if together else [dataset[index] for index in indices]
