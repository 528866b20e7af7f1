# Copyright 2026 The LIFT and PLACE distillation authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Where do the images and labels come from, and which of them can be used?"""

import errno
import os
import tarfile
from contextlib import suppress
from typing import Any

from common.errors import fail, first_line
from common.folders import check_images, find_unlisted, in_order, look_into
from common.images import choose_size, open_image
from common.webdataset import forgive_damage

import datasets
import multiprocess
from accelerate.logging import get_logger
from datasets.fingerprint import Hasher


logger = get_logger(__name__)

BYTES = ("string", "large_string", "binary", "large_binary")  # of files, or their paths
# What an image that is damaged or missing raises, without a number where Pillow says so. Others may have passed soon.
LASTING = (None, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)


class ReadError(Exception):
    """An image cannot be read now, as where a network drive does not answer; it may be whole."""


def load_images(
    dataset_name: str | None,
    dataset_config_name: str | None,
    train_data_dir: str | None,
    cache_dir: str | None,
    columns: dict[str, str],
    streaming: bool = False,
    **options: Any,
) -> tuple[datasets.Dataset | datasets.IterableDataset, str]:
    """The training split of a dataset on the Hub or of a folder of images, undecoded, with the named columns only.

    Args:
        dataset_name: Id on the Hub, or `None` for a folder.
        dataset_config_name: Its configuration.
        train_data_dir: The folder, where there is no id.
        cache_dir: Where `datasets` keeps its files.
        columns: The value of each flag that names a column, "image_column" among them.
        streaming: Whether rows are read as they are asked for; a folder may then hold webdataset shards, .tar files.
        options: Further arguments of `datasets.load_dataset` for image folders.

    Returns:
        The dataset, and the flag it came from with its value, for messages.
    """
    remedy = "pass a folder of images or a Hub dataset"
    try:
        if dataset_name is not None:
            source, hint = f"--dataset_name {dataset_name}", ""
            where = {"path": dataset_name, "name": dataset_config_name}
        else:
            source, hint = f"--train_data_dir {train_data_dir}", ", or give it in the folder's metadata.jsonl"
            if "caption_column" in columns and not streaming:
                hint += ", or in a .txt file beside each image"
            if "label_column" in columns:
                hint += ", or put the images of each class into a sub-folder of its own"
            folder = look_into(train_data_dir)
            where = {"path": "imagefolder", "data_files": {"train": folder.patterns}, **options}
            if streaming and folder.shards:
                where, hint = {"path": "webdataset", "data_files": {"train": folder.shards}}, ""
                remedy = "pass whole shards, whose first five samples have the same kinds of files"
            else:
                check_images(folder, train_data_dir, streaming)
        forgive_damage()
        dataset = datasets.load_dataset(**where, split="train", cache_dir=cache_dir, streaming=streaming)
    except (OSError, ValueError, IndexError, tarfile.TarError, datasets.exceptions.DatasetsError) as error:
        fail(f"{source} does not load: {first_line(error)}; {remedy}")
    if dataset.column_names is None:  # a stream whose columns are known only once it is read
        fail(f"{source} does not say which columns it has; pass webdataset or Parquet files, or drop --streaming")
    for flag, name in columns.items():
        if name not in dataset.column_names:
            fail(f"--{flag} {name} is not in the data; choose one of {', '.join(dataset.column_names)}" + hint)
        if flag == "caption_column" and dataset.features[name] not in map(datasets.Value, ("string", "large_string")):
            fail(f"--{flag} {name} holds {dataset.features[name]}; pass a column of strings")
    if streaming:  # from the Hub, images come decoded by threads, which no cast undoes
        dataset = dataset.decode(False)
    dataset = undecode(dataset.select_columns(list(dict.fromkeys(columns.values()))), columns["image_column"])
    if dataset_name is not None and not streaming:  # of a folder `datasets` follows the files itself
        dataset = follow_files(dataset, columns["image_column"])
    if dataset_name is None and len(folder.metadata) > 1 and not options.get("drop_metadata"):
        if streaming:
            both = f"holds {len(folder.metadata)} metadata files, which a stream has in no certain order"
            fail(f"{source} {both}; drop --streaming, or make one of them")
        dataset = in_order(dataset, columns["image_column"])
    return dataset, source


def follow_files(dataset: datasets.Dataset, column: str) -> datasets.Dataset:
    """The dataset; where its rows name the files of their images, what is cached of it follows these files, too.

    `datasets` sees the table alone, which is the same when an image is exchanged for another one.

    Args:
        dataset: With an undecoded image column.
        column: Its name.
    """
    if not len(dataset) or not (dataset[0][column] or {}).get("path") or dataset[0][column]["bytes"]:
        return dataset
    files = []
    for row in dataset.select_columns(column):
        with suppress(OSError, TypeError):  # it is missing, or no path: decoding it will say so
            status = os.stat(row[column]["path"])
            files.append((row[column]["path"], status.st_size, status.st_mtime_ns))
    fingerprint = Hasher.hash([dataset._fingerprint, files])
    return dataset.select(range(len(dataset)), new_fingerprint=fingerprint)


def choose_samples(dataset: datasets.Dataset, count: int | None, seed: int) -> datasets.Dataset:
    """`count` rows of the dataset, chosen by the seed; all of them, in order, if there are no more, or for `None`."""
    if count is None or count >= len(dataset):
        return dataset
    return dataset.shuffle(seed=seed).select(range(count))


def measure_images(dataset: datasets.Dataset, column: str, num_workers: int) -> list[tuple[int, int]]:
    """Height and width of each image as it stands upright, in pixels; (0, 0) of one that does not decode.

    Each image is decoded once. `datasets` keeps the result, so later runs on the same files do not repeat it.

    Args:
        dataset: With an undecoded image column.
        column: Its name.
        num_workers: Processes that decode, 0 for this one.

    Raises:
        ReadError: An image cannot be read now.
    """
    try:
        measured = dataset.map(
            _measure,
            input_columns=column,
            remove_columns=dataset.column_names,
            num_proc=num_workers or None,
            desc="Checking images",
        )
    except multiprocess.TimeoutError as error:  # on its way out `datasets` asks its processes once more
        raise error.__context__ or error from None
    return list(zip(measured["height"], measured["width"]))


def drop_unreadable(
    dataset: datasets.Dataset,
    column: str,
    source: str,
    max_unreadable: float,
    num_workers: int,
    size: int | list[tuple[int, int]],
) -> datasets.Dataset:
    """The dataset without the images that do not decode, see [`drop_rows`]; it says how many will be enlarged.

    Args:
        dataset: With an undecoded image column.
        column: Its name.
        source: The flag and value the data came from, for messages.
        max_unreadable: The largest share of the images that may be dropped.
        num_workers: Processes that decode, 0 for this one.
        size: See [`load_pixels`].
    """
    try:
        sizes = measure_images(dataset, column, num_workers)
    except ReadError as error:  # to drop the image would make it another dataset, for every later run
        fail(f"{source}: {error}; see that all files can be read, and start again")
    small = [min(image) for image in sizes if all(image) and _is_smaller(image, choose_size(*image, size))]
    if small:
        than = f"{size} pixels" if isinstance(size, int) else "their bucket"
        found = f"{len(small)} of {len(sizes)} images ({len(small) / len(sizes):.1%}) are smaller than {than}"
        logger.warning(f"{found} and will be enlarged; the smallest side is {min(small)}")
    unreadable = [index for index, image in enumerate(sizes) if not all(image)]
    return drop_rows(dataset, unreadable, column, "cannot be read", source, max_unreadable)


def undecode(
    dataset: datasets.Dataset | datasets.IterableDataset, column: str
) -> datasets.Dataset | datasets.IterableDataset:
    """The dataset with the files' bytes or paths in its image column, as [`open_image`] takes them."""
    kind = dataset.features[column]
    try:
        if isinstance(kind, datasets.ClassLabel) or (isinstance(kind, datasets.Value) and kind.dtype not in BYTES):
            raise TypeError  # as a cast does at once, but that of a stream only when it is read
        return dataset.cast_column(column, datasets.Image(decode=False))
    except (ValueError, TypeError, NotImplementedError):
        fail(f"--image_column {column} holds {kind}; pass the column of the images")


def drop_rows(
    dataset: datasets.Dataset, rows: list[int], column: str, problem: str, source: str, max_unreadable: float
) -> datasets.Dataset:
    """The dataset without these rows. Their images are named; too many of them end the run.

    Args:
        dataset: With an undecoded image column.
        rows: Indices to drop.
        column: The image column.
        problem: What is wrong with these images, e.g. "cannot be read".
        source: The flag and value the data came from, for messages.
        max_unreadable: The largest share of the images that may be dropped.
    """
    if not rows:
        return dataset
    paths = [(dataset[index][column] or {}).get("path") for index in rows[:10]]
    names = ", ".join(path or f"row {index}" for path, index in zip(paths, rows))
    report_dropped(len(rows), len(dataset), names, problem, source, max_unreadable)
    return dataset.select(sorted(set(range(len(dataset))) - set(rows)))


def report_dropped(count: int, total: int, names: str, problem: str, source: str, max_unreadable: float) -> None:
    """Say which images are skipped; too many of them end the run. See [`drop_rows`]."""
    if count > max_unreadable * total:
        found = f"{count} of {total} images {problem}: {names}"
        fail(f"{source}: {found}; repair or remove them, or raise --max_unreadable {max_unreadable}")
    print(f"skipping {count} of {total} images, which {problem}: {names}", flush=True)


def report_unlisted(
    folder: str, dataset: datasets.Dataset, column: str, source: str, problem: str, max_unreadable: float
) -> None:
    """Name the images of a folder that its metadata does not list; see [`find_unlisted`] and [`drop_rows`]."""
    unlisted, total = find_unlisted(folder, dataset, column)
    if unlisted:
        report_dropped(len(unlisted), total, ", ".join(unlisted[:10]), problem, source, max_unreadable)


def _measure(record: dict[str, Any]) -> dict[str, int]:
    try:
        width, height = open_image(record, "RGB").size
    except Exception as error:  # decoders raise anything on damaged files
        if getattr(error, "errno", None) not in LASTING:
            raise ReadError(f"{record['path']} cannot be read now: {first_line(error)}") from error
        width = height = 0
    return {"height": height, "width": width}


def _is_smaller(image: tuple[int, int], size: tuple[int, int]) -> bool:
    return image[0] < size[0] or image[1] < size[1]
