# Copyright 2026 The LIFT and PLACE distillation authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""What does a folder of data hold, which of it is trained on, and what would be left out in silence?"""

import errno
import glob
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from common.errors import fail, first_line

import datasets
from accelerate.logging import get_logger
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder


logger = get_logger(__name__)

# Images that `datasets` does not look for, and what a folder may hold in place of images.
UNREAD = (".heic", ".heif", ".avif", ".jxl")
REMEDIES = {
    ".tar": "add --streaming, and --image_column with the suffix of the images in the .tar files",
    ".parquet": "pass the folder of its .parquet files as --dataset_name",
    ".arrow": "load it by datasets.load_from_disk, write it by to_parquet, and pass that folder as --dataset_name",
    **dict.fromkeys((".zip", ".gz", ".7z", ".rar"), "unpack what is in it"),
}
SPLITS = {"train", "test", "val", "valid", "validation"}


class Folder(NamedTuple):
    """What a folder holds to train on."""

    root: str  # the folder, or its "train" where its sub-folders are splits
    patterns: list[str]  # of all files, as `datasets` takes them
    metadata: list[str]  # the paths of metadata files
    shards: list[str]  # the patterns of .tar files
    suffixes: Counter[str]  # how many files have each, in lower case


def check_data_dir(path: str, output_dir: str, cache_dir: str | None) -> None:
    """Refuse a `--train_data_dir` without data, or around a folder that the run writes to.

    Samples would be trained on later, and with each file of a cache the data would count as others.
    """
    if not os.path.isdir(path):
        fail(f"--train_data_dir {path} is no folder; pass a folder of images")
    if not os.listdir(path):
        fail(f"--train_data_dir {path} is empty; put images into it")
    for flag, folder, what in (
        ("output_dir", output_dir, "its own samples would be trained on"),
        ("cache_dir", cache_dir, "each file of the cache would make the data others, cached anew at every start"),
    ):
        if folder is not None and Path(folder).resolve().is_relative_to(Path(path).resolve()):
            fail(f"--{flag} {folder} is in --train_data_dir {path}, so that {what}; pass a folder outside")


def check_writable(flag: str, folder: Path) -> None:
    """End the process if a folder cannot be made or written to. Nothing is made yet.

    Args:
        flag: Name and value of the flag, for the message.
    """
    place = folder.absolute()
    while not os.path.lexists(place):
        place = place.parent
    if not place.is_dir():
        fail(f"{flag} cannot be written to: {place} is no folder; pass another")
    if not os.access(place, os.W_OK | os.X_OK):
        fail(f"{flag} cannot be written to: {place} is read-only; pass another")


def look_into(path: str) -> Folder:
    """Find out what the folder `--train_data_dir` holds.

    `datasets` would find splits by itself, by a search of the whole folder for each of some sixty patterns, and would
    leave out every file whose name has a word like "test". It follows no link to a folder: each has a pattern here.
    """
    try:
        root = _find_root(os.path.abspath(path))  # as `datasets` names its images
        roots, metadata, shards, suffixes = {root: False}, [], [], Counter()
        for folder, names in walk(root):
            if folder != root and os.path.islink(folder):
                roots[folder] = False
            if names:  # `datasets` wants files of each pattern
                within = (each for each in roots if os.path.join(folder, "").startswith(os.path.join(each, "")))
                roots[max(within, key=len)] = True
            metadata += [os.path.join(folder, name) for name in names if name in ImageFolder.METADATA_FILENAMES]
            shards += [glob.escape(os.path.join(folder, name)) for name in names if name.endswith(".tar")]
            suffixes.update(os.path.splitext(name)[1].lower() for name in names)
    except OSError as error:
        fail(f"--train_data_dir {path} does not load: {first_line(error)}; pass a folder of images or a Hub dataset")
    filled = [each for each, has_files in roots.items() if has_files] or [root]
    return Folder(root, [f"{glob.escape(each)}/**" for each in filled], metadata, sorted(shards), suffixes)


def check_images(folder: Folder, path: str, streaming: bool) -> None:
    """Refuse a folder `--train_data_dir` without images, and say which are of a kind that is left out.

    Also say that a stream does not mix a folder of images.
    """
    kinds = {kind: folder.suffixes[kind] for kind in UNREAD if folder.suffixes[kind]}
    found = " and ".join(f"{count} {kind}" for kind, count in kinds.items())
    if folder.suffixes.keys().isdisjoint(ImageFolder.EXTENSIONS):
        held = (remedy for suffix, remedy in REMEDIES.items() if folder.suffixes[suffix])
        remedy = "convert them to JPEG or PNG" if kinds else next(held, "pass a folder of images")
        fail(f"--train_data_dir {path} holds no images" + f" but {found} files" * bool(kinds) + f"; {remedy}")
    if kinds:
        logger.warning(f"--train_data_dir {path}: {found} files are left out; convert them to JPEG or PNG")
    if streaming:
        order = "come in the order of their folders and names, --shuffle_buffer of them mixed at a time"
        logger.warning(f"--train_data_dir {path}: images {order}; where neighbours are alike, write mixed shards")


def _find_root(path: str) -> str:
    names = {entry.name for entry in os.scandir(path) if not _is_hidden(entry.name) and entry.is_dir()}
    return os.path.join(path, "train") if "train" in names and names <= SPLITS else path


def walk(root: str) -> Iterator[tuple[str, list[str]]]:
    """Each folder and the names of its files, linked ones too. Hidden ones are left out, as by `datasets`.

    Raises:
        OSError: A folder cannot be read, or a link leads back to a folder above it.
    """

    def stop(error: OSError) -> None:  # else what cannot be read would count as empty
        raise error

    for folder, folders, files in os.walk(root, onerror=stop, followlinks=True):
        folders[:] = sorted(name for name in folders if not _is_hidden(name))
        for path in (os.path.join(folder, name) for name in folders):
            if os.path.islink(path) and os.path.realpath(path) in _real_folders(folder, root):
                raise OSError(errno.ELOOP, "a link leads back to a folder above it", path)
        yield folder, [name for name in files if not _is_hidden(name)]


def _real_folders(folder: str, root: str) -> Iterator[str]:
    """Where a folder, and those above it up to the root, really are."""
    while folder != os.path.dirname(root):
        yield os.path.realpath(folder)
        folder = os.path.dirname(folder)


def _is_hidden(name: str) -> bool:
    return name.startswith((".", "__"))


def find_unlisted(path: str, dataset: datasets.Dataset, column: str) -> tuple[list[str], int]:
    """The images that a folder holds and its metadata does not list, which `datasets` drops in silence.

    Args:
        dataset: The undecoded images of the folder.
        column: Theirs.

    Returns:
        Their paths, and how many images the folder has in all.
    """
    listed = {os.path.normpath(record["path"]) for record in dataset[column][:]}
    root, suffixes = _find_root(os.path.abspath(path)), tuple(ImageFolder.EXTENSIONS)
    if not any(each.startswith(root) for each in listed):  # the column is another one than the images'
        return [], len(dataset)
    found = (os.path.join(folder, name) for folder, files in walk(root) for name in sorted(files))
    unlisted = [each for each in found if each.lower().endswith(suffixes) and each not in listed]
    return unlisted, len(listed) + len(unlisted)


def in_order(dataset: datasets.Dataset, column: str) -> datasets.Dataset:
    """The dataset in the order of its images' paths: `datasets` reads several metadata files in one that is random."""
    paths = [(record or {}).get("path") or "" for record in dataset[column][:]]
    return dataset.select(sorted(range(len(paths)), key=paths.__getitem__))
