# Copyright 2026 The LIFT and PLACE distillation authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Which captions and prompts are there beside the images, and which images have no caption?"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.data import drop_rows, load_images, report_unlisted
from common.errors import fail, first_line
from common.folders import look_into
from common.streaming import StreamedDataset
from common.texts import read_lines

import datasets
from accelerate.logging import get_logger
from transformers import PreTrainedTokenizerBase


logger = get_logger(__name__)

LOOKED_AT = 10_000  # captions whose tokens are counted: of millions, counting takes half an hour at every start


def add_caption_arguments(groups: dict[str, argparse._ArgumentGroup]) -> None:
    """Add the flags that scripts which train on captions share, to the groups of [`add_shared_arguments`]."""
    data, kd, training, logs = (groups[name] for name in ("data", "distillation", "training", "logging"))
    data.add_argument("--train_data_dir", help="folder of images with captions: metadata.jsonl, or a.txt beside a.jpg")
    data.add_argument("--caption_column", default="text", help="column of the captions")
    data.add_argument("--resolution", type=int, help="side of the training images (default: the teacher's)")
    data.add_argument(
        "--aspect_ratio_buckets",
        metavar="SIZES",
        help="crop each image to the size of nearest aspect ratio, not to the square; a batch has images of one size. "
        'auto: sizes of the area of --resolution squared; or a list, "height,width;height,width", of about one area',
    )
    data.add_argument(
        "--caption_dropout", type=float, default=0.1, help="share of captions replaced by the empty one, for guidance"
    )
    data.add_argument("--encoding_batch_size", type=int, default=4, help="images at a time for --cache_latents")
    kd.add_argument("--lambda_task", type=float, default=1.0, help="weight of the loss on the data")
    kd.add_argument("--lambda_kd_output", type=float, default=1.0, help="weight of the output term")
    training.add_argument("--lora_rank", type=int, default=0, help="train LoRA adapters of this rank, not the weights")
    logs.add_argument(
        "--validation_prompts",
        nargs="+",
        help="rows of the sample grid, or a .txt file with one a line (default: captions of the first four images)",
    )
    logs.add_argument("--num_inference_steps", type=int, default=28, help="steps of the teacher's sampler per sample")
    logs.add_argument("--guidance_scale", type=float, default=7.0, help="classifier-free guidance of the samples")
    logs.add_argument("--save_fp16_variant", action="store_true", help="save half-precision weights beside the others")


def load_captioned(
    dataset_name: str | None,
    dataset_config_name: str | None,
    train_data_dir: str | None,
    cache_dir: str | None,
    columns: dict[str, str],
    max_unreadable: float,
) -> tuple[datasets.Dataset, str]:
    """[`load_images`] with captions. A folder without metadata may have them in a `.txt` file beside each image.

    Args:
        columns: The values of the flags "image_column" and "caption_column".
        max_unreadable: The largest share of the images that metadata may leave out.

    Returns:
        The dataset, and the flag it came from with its value. A caption whose file is missing is `None`.
    """
    folders = dataset_name, dataset_config_name, train_data_dir, cache_dir
    if train_data_dir is None:
        return load_images(*folders, columns)
    image, caption = columns["image_column"], columns["caption_column"]
    folder = look_into(train_data_dir)
    if folder.suffixes[".txt"] and not folder.metadata and caption != image:
        dataset, source = load_images(*folders, {"image_column": image}, drop_labels=True)
        names = [os.path.splitext(record["path"])[0] for record in dataset[image][:]]
        captions = [_read_caption(f"{name}.txt", source) for name in names]
        if any(captions):
            # The fingerprint that `datasets` gives to the result follows the captions: no cache outlives a change.
            return dataset.add_column(caption, captions, feature=datasets.Value("string")), source
    dataset, source = load_images(*folders, columns)
    if folder.suffixes[".txt"]:
        names = sorted({os.path.basename(path) for path in folder.metadata})
        logger.info(f"{source}: the captions are those of {', '.join(names)}; .txt files are not read")
    report_unlisted(train_data_dir, dataset, image, source, "have no caption", max_unreadable)
    return dataset, source


def _read_caption(path: str, source: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8-sig").strip()  # Windows puts a mark at the beginning
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        fail(f"{source}: {path} cannot be read: {first_line(error)}; make it a text in UTF-8, or remove it")


def read_prompts(given: list[str] | None) -> list[str] | None:
    """The prompts of `--validation_prompts`. A value that ends in ".txt" is a file with a prompt on each line."""
    prompts = []
    for value in given or []:
        if not value.endswith(".txt"):
            prompts.append(value)
            continue
        subject, remedy = f"--validation_prompts {value}", "pass a text file in UTF-8 with a prompt on each line"
        if not Path(value).is_file():
            fail(f"{subject} is no file; {remedy}, or prompts that do not end in .txt")
        try:
            lines = read_lines(Path(value))
        except (OSError, UnicodeDecodeError) as error:
            fail(f"{subject} cannot be read: {first_line(error)}; {remedy}")
        if not any(lines):
            fail(f"{subject} is empty; put a prompt on each line")
        prompts += filter(None, lines)
    return prompts or None


def drop_uncaptioned(
    dataset: datasets.Dataset, image_column: str, caption_column: str, source: str, max_unreadable: float
) -> datasets.Dataset:
    """The dataset without the images whose caption is missing or empty; see [`drop_rows`]."""
    empty = [row for row, text in enumerate(dataset[caption_column][:]) if not (text or "").strip()]
    return drop_rows(dataset, empty, image_column, "have no caption", source, max_unreadable)


def find_no_caption(row: dict[str, Any], caption_column: str) -> str | None:
    """What is wrong with a row of a stream: its caption is missing or empty; `None` where it is not."""
    return None if (row[caption_column] or "").strip() else "have no caption"


def first_captions(dataset: datasets.Dataset | StreamedDataset, column: str) -> list[str]:
    """The captions of the first four images."""
    if isinstance(dataset, StreamedDataset):
        return [row[column] for row in dataset.head(4)]
    return list(dataset.with_format(None)[:4][column])


def report_long_captions(captions: Sequence[str], tokenizers: dict[str, PreTrainedTokenizerBase]) -> None:
    """Warn of captions with more tokens than a text encoder gets, as far as the first ones tell.

    Args:
        captions: Of all images.
        tokenizers: Each cuts at its `model_max_length`, by the name of the text encoder.
    """
    looked_at, cut = captions[:LOOKED_AT], []
    of = f"{len(captions)}" if len(captions) <= LOOKED_AT else f"the first {LOOKED_AT:,}"
    for name, tokenizer in tokenizers.items():
        limit = tokenizer.model_max_length
        longer = sum(len(ids) > limit for ids in tokenizer(looked_at, verbose=False)["input_ids"])
        cut += [f"{longer} of {of} at {limit} tokens for {name}"] * bool(longer)
    if cut:
        logger.warning(f"captions are longer than a text encoder takes and are cut there: {', '.join(cut)}")
