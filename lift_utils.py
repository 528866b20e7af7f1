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
import copy
import gc
import hashlib
import importlib.util
import io
import json
import logging
import math
import os
import re
import shlex
import shutil
import signal
import sys
import textwrap
from collections.abc import Callable, Iterator
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


def check_args(args: argparse.Namespace) -> None:
    """Refuse what can be seen to be wrong in any script's flags before anything is loaded."""
    for name, value in vars(args).items():
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value < 0:
            fail(f"--{name} {value} is negative; pass a positive number")
    counts = "train_batch_size gradient_accumulation_steps max_train_steps checkpointing_steps logging_steps"
    counts += " validation_steps num_validation_images num_inference_steps checkpoints_total_limit max_train_samples"
    counts += " resolution encoding_batch_size"
    for name in counts.split():
        if getattr(args, name, None) == 0:
            fail(f"--{name} 0 is too small; pass at least 1")
    if not args.dry_run:
        if (args.dataset_name is None) == (args.train_data_dir is None):
            fail("--dataset_name or --train_data_dir must say where the images are: pass one of them")
        if args.train_data_dir is not None and not Path(args.train_data_dir).is_dir():
            fail(f"--train_data_dir {args.train_data_dir} is no folder; pass a folder of images")
        if args.train_data_dir is not None and not any(Path(args.train_data_dir).iterdir()):
            fail(f"--train_data_dir {args.train_data_dir} is empty; put images into it")
    if args.enable_xformers_memory_efficient_attention:
        if not torch.cuda.is_available():
            fail("--enable_xformers_memory_efficient_attention needs a CUDA device; drop it: attention is SDPA then")
        if importlib.util.find_spec("xformers") is None:
            fail("--enable_xformers_memory_efficient_attention needs xformers; pip install xformers, or drop it")
    if args.use_8bit_adam and importlib.util.find_spec("bitsandbytes") is None:
        fail("--use_8bit_adam needs bitsandbytes; pip install bitsandbytes, or drop the flag")
    if args.report_to not in ("all", "none") and importlib.util.find_spec(args.report_to) is None:
        fail(f"--report_to {args.report_to} is not installed; pip install {args.report_to}, or pass none")


def read_recipe(args: argparse.Namespace, presets: dict[str, dict], keys: tuple[str, ...]) -> dict | None:
    """The student's recipe: a preset of `--student`, or a JSON object with some of `keys`; `None` if it is neither."""
    if args.student in presets:
        return presets[args.student]
    if not args.student.endswith(".json"):
        return None
    try:
        recipe = json.loads(Path(args.student).read_text())
    except (OSError, ValueError) as error:
        fail(f"--student {args.student} cannot be read: {error}; pass a JSON object")
    unknown = set(recipe) - set(keys) if isinstance(recipe, dict) else {"a list"}
    if unknown:
        known = " and ".join(", ".join(f'"{key}"' for key in keys).rsplit(", ", 1))
        fail(f"--student {args.student} holds {sorted(unknown)}; use {known}")
    return recipe


def reason(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# ------------------------------------------------------------------------------------------------------------ the data


def load_data(args, columns: list[str], **options):
    """The training split that `--dataset_name` or `--train_data_dir` names, and the name of that flag with its value.

    Args:
        columns: The flags that name its columns, such as "image_column".
        options: Further arguments of `datasets.load_dataset` for image folders.
    """
    import datasets

    try:
        if args.dataset_name is not None:
            source = f"--dataset_name {args.dataset_name}"
            dataset = datasets.load_dataset(
                args.dataset_name, args.dataset_config_name, split="train", cache_dir=args.cache_dir
            )
        else:
            source = f"--train_data_dir {args.train_data_dir}"
            dataset = datasets.load_dataset(
                "imagefolder", data_dir=args.train_data_dir, split="train", cache_dir=args.cache_dir, **options
            )
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        fail(f"{source} does not load: {reason(error)}; pass a folder of images or a Hub dataset")
    hint = "" if args.dataset_name else ", or give it in the folder's metadata.jsonl"
    for flag in columns:
        name = getattr(args, flag)
        if name not in dataset.column_names:
            fail(f"--{flag} {name} is not in the data; choose one of {', '.join(dataset.column_names)}" + hint)
    if args.train_data_dir is not None and "caption_column" in columns:
        name_unlisted(dataset, args.image_column, source, args)
    if args.max_train_samples is not None and args.max_train_samples < len(dataset):
        dataset = dataset.shuffle(seed=args.seed).select(range(args.max_train_samples))
    return dataset.select_columns(list(dict.fromkeys(getattr(args, flag) for flag in columns))), source


def load_captioned(args) -> tuple[Any, dict[str, str]]:
    """Images, undecoded, with captions, and what tells these contents from others'.

    Unreadable images and images without a caption are left out.
    """
    from datasets import Value

    image, caption = args.image_column, args.caption_column
    dataset, source = load_data(args, ["image_column", "caption_column"])
    if dataset.features[caption] not in (Value("string"), Value("large_string")):
        fail(f"--caption_column {caption} holds {dataset.features[caption]}; pass a column of strings")
    dataset = drop_unreadable(dataset, image, source, args)
    empty = [row for row, text in enumerate(dataset[caption]) if not (text or "").strip()]
    dataset = leave_out(dataset, empty, image, "have no caption", source, args)
    return dataset, {"data": dataset._fingerprint, "image": image, "caption": caption}


def drop_unreadable(dataset, column: str, source: str, args):
    """The dataset without the images that do not decode, which are named; too many of them end the run.

    The check decodes each image once; `datasets` keeps its result, so later runs on the same files do not repeat it.

    Args:
        dataset: A `datasets.Dataset` with an image column. It comes back undecoded: see [`open_image`].
        source: The flag and value the data came from, for messages.
        args: With `max_unreadable`, the share to put up with, and `dataloader_num_workers`.
    """
    dataset = leave_undecoded(dataset, column)
    workers = args.dataloader_num_workers or None
    checked = dataset.map(
        _is_readable,
        input_columns=column,
        remove_columns=dataset.column_names,
        num_proc=workers,
        desc="Checking images",
    )
    unreadable = [index for index, readable in enumerate(checked["readable"]) if not readable]
    return leave_out(dataset, unreadable, column, "cannot be read", source, args)


def leave_undecoded(dataset, column: str):
    """The dataset with the files' bytes or paths in its image column, as [`open_image`] takes them."""
    from datasets import Image

    try:
        return dataset.cast_column(column, Image(decode=False))
    except (ValueError, TypeError, NotImplementedError):
        fail(f"--image_column {column} holds {dataset.features[column]}; pass the column of the images")


def leave_out(dataset, rows: list[int], column: str, problem: str, source: str, args):
    """The dataset without some rows, whose images are named; more of them than `--max_unreadable` says end the run.

    Args:
        column: The undecoded image column.
        problem: What these images suffer from, e.g. "cannot be read".
        source: The flag and value the data came from.
    """
    if not rows:
        return dataset
    paths = [(dataset[index][column] or {}).get("path") for index in rows[:10]]
    names = ", ".join(path or f"row {index}" for path, index in zip(paths, rows))
    accept_loss(len(rows), len(dataset), names, problem, source, args)
    return dataset.select(sorted(set(range(len(dataset))) - set(rows)))


def name_unlisted(dataset, column: str, source: str, args) -> None:
    """Name the images that a folder holds and its metadata does not list; `datasets` leaves them out in silence."""
    from datasets import Image
    from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

    if not isinstance(dataset.features[column], Image):
        return
    listed = {record["path"] for record in dataset.cast_column(column, Image(decode=False))[column]}
    folders = sorted(filter(os.path.isdir, {os.path.dirname(path) for path in listed}))  # not inside archives
    found = (os.path.join(folder, name) for folder in folders for name in sorted(os.listdir(folder)))
    suffixes = tuple(ImageFolder.EXTENSIONS)
    unlisted = [path for path in found if path.lower().endswith(suffixes) and path not in listed]
    if unlisted:
        total = len(listed) + len(unlisted)
        accept_loss(len(unlisted), total, ", ".join(unlisted[:10]), "have no caption", source, args)


def accept_loss(count: int, total: int, names: str, problem: str, source: str, args) -> None:
    """Say which images are left out, or end the run where they are more than `--max_unreadable` says."""
    if count > args.max_unreadable * total:
        found = f"{count} of {total} images {problem}: {names}"
        fail(f"{source}: {found}; repair or remove them, or raise --max_unreadable {args.max_unreadable}")
    print(f"leaving out {count} of {total} images, which {problem}: {names}", flush=True)


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


# How many rows a file of cached encodings holds: what a run that is killed while it caches has to do again.
CACHE_SHARD = 512


def cache_encodings(dataset, load_encoder: Callable[[], Callable], key: dict[str, Any], args, accelerator):
    """What encoders make of the data, computed once, as a memory-mapped dataset; the encoders are free to go then.

    Each process encodes every n-th shard. A shard is renamed into place when it is whole: an interrupted run goes on
    where it stopped, and a finished cache is read without loading the encoders.

    Args:
        dataset: Rows that `torch.utils.data.default_collate` takes.
        load_encoder: Loads the models and returns a function from a batch to named tensors (B, ...).
        key: Everything that shapes the result, JSON-serialisable: another key is another cache.
        args: With `cache_dir`, `encoding_batch_size` and `dataloader_num_workers`.

    Returns:
        A `datasets.Dataset` of the named tensors without their batch dimension, row for row.
    """
    import datasets
    from tqdm.auto import tqdm

    text = json.dumps(key, sort_keys=True, indent=2)
    root = Path(args.cache_dir or datasets.config.HF_DATASETS_CACHE) / "lift-encodings"
    folder = root / hashlib.sha256(text.encode()).hexdigest()[:24]
    shards = {start: folder / f"rows-{start:09d}" for start in range(0, len(dataset), CACHE_SHARD)}
    mine = list(shards)[accelerator.process_index :: accelerator.num_processes]
    missing = [start for start in mine if not shards[start].exists()]
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "key.json").write_text(text)
        encode = load_encoder()
        ends = {start: min(start + CACHE_SHARD, len(dataset)) for start in missing}
        size = args.encoding_batch_size
        batches = [range(at, min(at + size, end)) for start, end in ends.items() for at in range(start, end, size)]
        loader = torch.utils.data.DataLoader(
            dataset, batch_sampler=batches, num_workers=args.dataloader_num_workers, worker_init_fn=ignore_sigterm
        )
        rows: list[bytes] = []
        progress = tqdm(loader, desc="Encoding the data", disable=not accelerator.is_local_main_process)
        with torch.no_grad():
            for indices, batch in zip(batches, progress):
                rows += _as_rows(encode(batch))
                if indices.stop in ends.values():
                    _write_shard(shards[indices.stop - len(rows)], rows)
                    rows = []
        del encode
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    accelerator.wait_for_everyone()
    whole = datasets.concatenate_datasets([datasets.load_from_disk(str(path)) for path in shards.values()])
    return whole.with_transform(_read_rows)


def _as_rows(encoded: dict[str, torch.Tensor]) -> list[bytes]:
    """Each row's tensors in the safetensors format, which keeps their dtypes, bfloat16 among them, and shapes."""
    from safetensors.torch import save

    encoded = {name: tensor.cpu() for name, tensor in encoded.items()}
    count = len(next(iter(encoded.values())))
    return [save({name: tensor[row].contiguous() for name, tensor in encoded.items()}) for row in range(count)]


def _write_shard(path: Path, rows: list[bytes]) -> None:
    import datasets

    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    large = datasets.Features({"tensors": datasets.Value("large_binary")})  # "binary" holds no more than 2 GiB
    datasets.Dataset.from_dict({"tensors": rows}, features=large).save_to_disk(str(temporary))
    if shown:
        datasets.enable_progress_bars()
    for file in temporary.iterdir():
        _flush(file)
    try:
        temporary.rename(path)
    except OSError:  # another run has written the same
        shutil.rmtree(temporary)


def _read_rows(batch: dict[str, list[bytes]]) -> dict[str, list[torch.Tensor]]:
    from safetensors.torch import load

    rows = [load(row) for row in batch["tensors"]]
    return {name: [row[name] for row in rows] for name in rows[0]}


def identify(source: str, revision: str | None, parts: list[str]) -> dict[str, Any]:
    """What tells one version of a pipeline's parts from another: the Hub's commit, or the files' sizes and times."""
    from huggingface_hub import hf_hub_download

    folder = Path(source)
    if not folder.is_dir():
        return {
            "model": source,
            "commit": Path(hf_hub_download(source, "model_index.json", revision=revision)).parent.name,
        }
    files = [path for part in parts for path in sorted((folder / part).rglob("*")) if path.is_file()]
    described = [[str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    return {"model": str(folder.resolve()), "files": described}


# ---------------------------------------------------------------------------------------------------------- the models


def from_teacher(args, load: Callable, expected: str, **options):
    """`load(--pretrained_teacher_model, **options)`, or an error that says what is wrong with it.

    Args:
        args: With `pretrained_teacher_model`, a folder or a Hub id, and `teacher_revision`.
        load: A `from_pretrained` or `load_config`.
        expected: What to pass instead, e.g. "pass a DDPM pipeline".
    """
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
    from safetensors import SafetensorError

    source = args.pretrained_teacher_model
    folder = Path(source)
    if not folder.is_dir() and (folder.is_absolute() or source.startswith(".") or source.count("/") > 1):
        fail(f"--pretrained_teacher_model {source} is no folder; {expected}")
    try:
        return load(source, revision=args.teacher_revision, **options)
    except (OSError, ValueError, KeyError, AttributeError, TypeError, SafetensorError) as error:
        causes, cause = [error], error.__cause__ or error.__context__
        while cause is not None:
            causes.append(cause)
            cause = cause.__cause__ or cause.__context__
        if any(isinstance(cause, GatedRepoError) for cause in causes):
            remedy = f"accept its terms at https://huggingface.co/{source}, then log in with `hf auth login`"
            fail(f"--pretrained_teacher_model {source} is gated; {remedy}")
        if any(isinstance(cause, RepositoryNotFoundError) for cause in causes):
            fail(f"--pretrained_teacher_model {source} is not on the Hub, or private; {expected}")
        fail(f"--pretrained_teacher_model {source} does not load: {reason(error)} Remedy: {expected}")


def load_part(args, kind, name: str, expected: str):
    """One part of the teacher's pipeline; models come in float32 on the CPU. See [`from_teacher`]."""
    if not issubclass(kind, torch.nn.Module):
        return from_teacher(args, kind.from_pretrained, expected, subfolder=name)
    options = {"subfolder": name, "variant": args.variant, "use_safetensors": True}
    return from_teacher(args, kind.from_pretrained, expected, **options).float()


def load_skeleton(args, kind, name: str, expected: str):
    """A Diffusers model of the teacher's pipeline without its weights, on the meta device."""
    config = from_teacher(args, kind.load_config, expected, subfolder=name)
    with torch.device("meta"):
        return kind.from_config(config)


def vae_factor(vae) -> int:
    """Pixels per latent, along each side, of an AutoencoderKL."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def freeze(model: torch.nn.Module, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
    """The model on the device in the dtype, ready for nothing but forward passes."""
    # Diffusers' own `to` warns of a dtype. In this order the device never holds float32.
    return torch.nn.Module.to(model.requires_grad_(False).eval(), dtype).to(device)


class FeatureModel(torch.nn.Module):
    """A model that returns `(prediction, features)`: its output sample and the outputs of the named submodules.

    The features are outputs of the forward pass, so DistributedDataParallel sees them and `compile()` can trace them.
    Optional projections (FitNet, one per name) are trained with the model and never saved into it.

    Args:
        model: A Diffusers model whose forward takes `return_dict`.
        names: Submodules whose outputs are wanted.
        projections: One module per name, applied to its feature.
        item: Which of a submodule's outputs to take where it returns several.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        names: list[str],
        projections: list[torch.nn.Module] | None = None,
        item: int = 0,
    ):
        super().__init__()
        self.model = model
        self.names = names
        self.item = item
        self.projections = torch.nn.ModuleList(projections or [torch.nn.Identity() for _ in names])
        self._captured: dict[str, torch.Tensor] = {}
        for name in names:
            model.get_submodule(name).register_forward_hook(partial(self._capture, name))

    def _capture(self, name: str, module: torch.nn.Module, inputs: Any, output: Any) -> None:
        self._captured[name] = output[self.item] if isinstance(output, tuple) else output

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


def pair_features(
    student: torch.nn.Module,
    teacher: torch.nn.Module | None,
    pairs: list[list[str]],
    inputs: dict[str, torch.Tensor],
    always_project: bool = False,
    item: int = 0,
) -> tuple[FeatureModel, FeatureModel | None]:
    """Both models with their features, the student's projected to the teacher's widths (FitNet).

    Feature maps (B, C, H, W) get a 1x1 convolution, tokens (B, N, C) a linear layer.

    Args:
        student: A Diffusers model, without adapters.
        pairs: `[student module, teacher module]` each.
        inputs: Arguments of the forward pass of both, on the meta device: nothing is computed.
        always_project: Whether features of equal width are projected too.
        item: Which of a submodule's outputs to take where it returns several.
    """
    if teacher is None or not pairs:
        return FeatureModel(student, []), teacher and FeatureModel(teacher, [])
    shapes = []
    for side, model in enumerate((student, teacher)):
        for pair in pairs:
            if pair[side] not in dict(model.named_modules()):
                fail(f'--student pairs features of "{pair[side]}", which does not exist; correct its "features"')
        with torch.device("meta"), torch.no_grad():
            replica = FeatureModel(type(model).from_config(model.config), [pair[side] for pair in pairs], item=item)
            shapes.append([feature.shape for feature in replica(**inputs)[1]])
    projections: list[torch.nn.Module] = []
    for pair, ours, theirs in zip(pairs, *shapes):
        channel = 1 if len(ours) == 4 else -1
        if len(ours) != len(theirs) or ours.numel() // ours[channel] != theirs.numel() // theirs[channel]:
            fail(f"the features {pair} are {tuple(ours)} and {tuple(theirs)}; pair equal sizes, or --lambda_kd_feat 0")
        if ours[channel] == theirs[channel] and not always_project:
            projections.append(torch.nn.Identity())
        elif channel == 1:
            projections.append(torch.nn.Conv2d(ours[1], theirs[1], 1))
        else:
            projections.append(torch.nn.Linear(ours[-1], theirs[-1]))
    models = [
        FeatureModel(model, [pair[side] for pair in pairs], item=item) for side, model in enumerate((student, teacher))
    ]
    models[0].projections = torch.nn.ModuleList(projections)
    return models[0], models[1]


@torch.no_grad()
def measure_influence(blocks: torch.nn.ModuleList, run: Callable[[], Any], item: int = 0) -> list[float]:
    """How much each transformer block changes its tokens: 1 - cosine of input and output, averaged over all tokens.

    The block influence of ShortGPT (Men et al., 2024): the blocks of least influence are the first to go.

    Args:
        blocks: Their forward takes `hidden_states` (B, N, C), by name or first.
        run: Forward passes of the whole model on data.
        item: Which of a block's outputs are the tokens where it returns several.
    """
    sums, calls = [0.0] * len(blocks), [0] * len(blocks)

    def record(index: int, module: torch.nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        before = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        after = output[item] if isinstance(output, tuple) else output
        sums[index] += 1 - torch.cosine_similarity(before.float(), after.float(), dim=-1).mean().item()
        calls[index] += 1

    hooks = [block.register_forward_hook(partial(record, i), with_kwargs=True) for i, block in enumerate(blocks)]
    run()
    for hook in hooks:
        hook.remove()
    return [total / count for total, count in zip(sums, calls)]


def plot_influence(influence: list[float], kept: list[int], path: Path) -> None:
    """The influence of each block as a bar, those that the student keeps in another colour, to a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(4, 0.3 * len(influence)), 2.8), layout="constrained")
    axis = figure.subplots()
    for label, chosen, colour in (("kept", True, "C0"), ("left out", False, "0.8")):
        blocks = [block for block in range(len(influence)) if (block in kept) == chosen]
        axis.bar(blocks, [influence[block] for block in blocks], color=colour, label=label)
    axis.set_xlabel("block of the teacher")
    axis.set_ylabel("1 - cosine(input, output)")
    axis.legend(fontsize=7)
    figure.savefig(path, dpi=120)


def is_narrower(student: torch.nn.Module, teacher: torch.nn.Module) -> bool:
    """Whether the student has the teacher's layers, each at most as wide."""
    ours, theirs = student.state_dict(), teacher.state_dict()
    return ours.keys() == theirs.keys() and all(
        len(ours[key].shape) == len(theirs[key].shape)
        and all(a <= b for a, b in zip(ours[key].shape, theirs[key].shape))
        for key in ours
    )


def narrow_widths(widths: list[int], fraction: float, groups: int, fixed: bool = False) -> tuple[list[int], int]:
    """Block widths reduced to a fraction, rounded up to whole normalisation groups, and the number of groups.

    Where rounding would make different widths equal, which takes the shortcut convolution out of a block, there are
    fewer groups, unless their number is `fixed`.
    """
    for number in [groups] if fixed else [number for number in range(groups, 0, -1) if groups % number == 0]:
        narrow = [math.ceil(width * fraction / number) * number for width in widths]
        if len(set(narrow)) == len(set(widths)):
            break
    return narrow, number


def prune_width(student, teacher, example: tuple[torch.Tensor, ...], accumulate=None) -> None:
    """Fill a narrower U-Net with the teacher's most important channels, over torch-pruning's dependency graph.

    Coupled layers (residual and skip connections, attention, time embedding) keep the same channels. Channels compete
    within the student's normalisation groups and attention heads, which therefore stay parts of the teacher's.

    Args:
        student: A UNet2DModel or UNet2DConditionModel for which [`is_narrower`] holds.
        teacher: Stays as it is.
        example: Inputs of its forward pass.
        accumulate: Puts gradients into a copy of the teacher; channels are then ranked by |weight · gradient| (Taylor)
            instead of by the magnitude of their weights.
    """
    import torch_pruning as tp
    from diffusers.models.attention_processor import Attention

    if teacher.config.time_embedding_type != "positional":
        fail("--student_init can prune models with a positional time embedding only; pass --student_init random")
    pruned = copy.deepcopy(teacher).eval()
    importance = (
        tp.importance.GroupMagnitudeImportance() if accumulate is None else tp.importance.GroupTaylorImportance()
    )
    if accumulate is not None:
        accumulate(pruned)
    graph = tp.DependencyGraph().build_dependency(pruned, example_inputs=example)
    names = {module: name for name, module in pruned.named_modules()}

    for group in graph.get_all_groups(ignored_layers=[pruned.conv_out]):
        layers = [dep.target.module for dep, _ in group if graph.is_out_channel_pruning_fn(dep.handler)]
        root = names[layers[0]]
        keep, scores = student.get_submodule(root).weight.shape[0], importance(group)
        if root.endswith("ff.net.0.proj"):  # GEGLU: each channel beside its gate in the other half
            kept = keep_channels(scores.view(2, -1).sum(0), keep // 2)
            kept = torch.cat([kept, kept + len(scores) // 2])
        else:
            kept = keep_channels(scores, keep, *_parts(layers, names, pruned, student))
        unwanted = set(range(len(scores))) - set(kept.tolist())
        group.prune(sorted(unwanted))

    state = pruned.state_dict()
    state.update(_fit_time_embedding(student, teacher, state))
    for name, module in student.named_modules():
        if isinstance(module, Attention):
            # Attention divides by the root of the head's width: keep dividing by the teacher's.
            wider = teacher.get_submodule(name)
            factor = math.sqrt(module.inner_dim / module.heads / (wider.inner_dim / wider.heads))
            for key in ("weight", "bias"):
                if f"{name}.to_q.{key}" in state:
                    state[f"{name}.to_q.{key}"] = state[f"{name}.to_q.{key}"] * factor
    student.load_state_dict(state)


def _parts(layers: list[torch.nn.Module], names: dict, teacher, student) -> tuple[int, int]:
    """Into how many heads or normalisation groups the coupled channels fall in the teacher and in the student."""
    for layer in layers:
        name = names.get(layer, "")
        if name.endswith(".to_q"):
            attention = name.removesuffix(".to_q")
            return teacher.get_submodule(attention).heads, student.get_submodule(attention).heads
    for layer in layers:
        if isinstance(layer, torch.nn.GroupNorm):
            groups = student.get_submodule(names[layer]).num_groups
            return groups, groups
    return 1, 1


def keep_channels(scores: torch.Tensor, keep: int, parts: int = 1, kept_parts: int = 1) -> torch.Tensor:
    """Indices, ascending, of the best `keep` channels: the best `kept_parts` of `parts`, equally many from each."""
    if len(scores) % parts or keep % kept_parts:
        parts = kept_parts = 1
    table = scores.view(parts, -1)
    best = table.sum(1).topk(kept_parts).indices.sort().values
    inside = table[best].topk(keep // kept_parts, dim=1).indices.sort(dim=1).values
    return (best.unsqueeze(1) * table.shape[1] + inside).flatten()


def _fit_time_embedding(student, teacher, state: dict) -> dict[str, torch.Tensor]:
    """Weights with which the narrower sinusoid enters the time embedding as the teacher's did.

    A narrower sinusoid has other frequencies, so no choice of columns is exact: the first layer is refitted by least
    squares over all timesteps.
    """
    weight, bias = state["time_embedding.linear_1.weight"], state["time_embedding.linear_1.bias"]
    steps = torch.arange(1000)
    wide, narrow = teacher.time_proj(steps).double(), student.time_proj(steps).double()
    narrow = torch.cat([narrow, torch.ones_like(narrow[:, :1])], dim=1)
    wanted = wide @ weight.double().T + bias.double()
    # Neighbouring low frequencies are nearly collinear: rcond keeps their weights small.
    solution = torch.linalg.lstsq(narrow, wanted, rcond=1e-4, driver="gelsd").solution.to(weight.dtype)
    return {"time_embedding.linear_1.weight": solution[:-1].T, "time_embedding.linear_1.bias": solution[-1]}


# What Diffusers recomputes as one piece under gradient checkpointing.
CHECKPOINTED = re.compile(r"(^|\.)(resnets|transformer_blocks)\.\d+$")


def profile_forward(model: torch.nn.Module, **inputs: torch.Tensor) -> tuple[int, int, int]:
    """What a forward pass costs, without computing anything.

    Args:
        model: A model on the meta device.
        inputs: Meta tensors for its forward.

    Returns:
        Multiply-accumulates; the bytes of activations kept for the backward pass; and the most bytes that one block
        keeps, which gradient checkpointing brings back for a while.
    """
    from torch.utils.flop_counter import FlopCounterMode

    parameters = {id(parameter) for parameter in model.parameters()}
    kept: dict[int, tuple[torch.Tensor, int]] = {}
    before: dict[torch.nn.Module, int] = {}
    largest = 0

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        base = tensor if tensor._base is None else tensor._base
        if id(base) not in parameters:
            # Holding the tensor keeps its id from being given to another one.
            kept[id(base)] = (base, base.numel() * base.element_size())
        return tensor

    def size() -> int:
        return sum(size for _, size in kept.values())

    def enter(module: torch.nn.Module, inputs: Any) -> None:
        before[module] = size()

    def leave(module: torch.nn.Module, inputs: Any, outputs: Any) -> None:
        nonlocal largest
        largest = max(largest, size() - before[module])

    for name, module in model.named_modules():
        if CHECKPOINTED.search(name):
            module.register_forward_pre_hook(enter)
            module.register_forward_hook(leave)
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        FlopCounterMode(display=False) as flops,
    ):
        model(**inputs)
    return flops.get_total_flops() // 2, size(), largest


def print_memory_estimate(
    args,
    activations: tuple[int, int],
    student: int,
    teacher: int,
    trained: int | None = None,
    encoders: int = 0,
) -> None:
    """Print what a training step holds, by part, in MiB.

    Args:
        args: The script's flags.
        activations: Bytes that one image's forward pass keeps in float32: all those kept to the backward pass, and
            those of the block that gradient checkpointing recomputes, 0 without. See [`profile_forward`].
        student: Parameters of the student.
        teacher: Parameters of the teacher, 0 without one.
        trained: Parameters that learn, if not all of the student's; those that do not are held like the teacher's.
        encoders: Parameters of what encodes images and captions in every step.
    """
    half = args.mixed_precision in ("fp16", "bf16")
    width = 2 if half else 4
    trained = student if trained is None else trained
    kept, recomputed = (args.train_batch_size * size * width // 4 for size in activations)
    parts = {
        "trained weights (fp32)": 4 * trained,
        "their copies for autocast": 2 * trained if half else 0,
        "frozen weights of the student": width * (student - trained),
        "gradients (fp32)": 4 * trained,
        "optimizer moments": (2 if args.use_8bit_adam else 8) * trained,
        "averaged weights": 4 * trained if args.use_ema else 0,
        f"student activations, batch {args.train_batch_size}": kept,
        "the block being recomputed": recomputed,
        "teacher weights": width * teacher,
        "encoders' weights": width * encoders,
    }
    print("memory, estimated, without the teacher's working set and the CUDA context:")
    for name, size in [*parts.items(), ("sum", sum(parts.values()))]:
        if size:
            print(f"  {name:<40}{size / 2**20:>12,.1f} MiB")


def estimate_activations(make: Callable[[], torch.nn.Module], checkpointing: bool, **inputs) -> tuple[int, int, int]:
    """MACs, kept and recomputed bytes of a training step's forward pass on one image: see [`profile_forward`].

    Args:
        make: Builds the model on the meta device.
        checkpointing: Whether its blocks are recomputed.
    """
    macs, kept, largest = profile_forward(make().train(), **inputs)
    if not checkpointing:
        return macs, kept, 0
    model = make().train()
    model.enable_gradient_checkpointing()
    return macs, profile_forward(model, **inputs)[1], largest


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


def make_optimizer(model: torch.nn.Module, args) -> torch.optim.Optimizer:
    """AdamW on what the model trains, with the flags' settings: fused, or bitsandbytes' with 8-bit moments."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
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


def get_scheduler(name: str, optimizer: torch.optim.Optimizer, num_warmup_steps: int, num_training_steps: int):
    """Diffusers' course of the learning rate of this name, or "cosine_to_half", a cosine down to half the peak."""
    from diffusers import optimization

    if name != "cosine_to_half":
        return optimization.get_scheduler(
            name, optimizer, num_warmup_steps=num_warmup_steps, num_training_steps=num_training_steps
        )

    def factor(step: int) -> float:
        if step < num_warmup_steps:
            return step / num_warmup_steps
        share = (step - num_warmup_steps) / max(1, num_training_steps - num_warmup_steps)
        return 0.75 + 0.25 * math.cos(math.pi * min(1, share))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


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
    args.mixed_precision = accelerator.mixed_precision  # which the accelerate config may have set
    level = logging.INFO if accelerator.is_main_process else logging.ERROR
    logging.basicConfig(format="%(levelname)s %(message)s", level=level)
    for name in ("httpx", "httpx2"):  # they print every request to the Hub, signed addresses and all
        logging.getLogger(name).setLevel(logging.WARNING)
    if args.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    return accelerator


def working_dtype(accelerator) -> torch.dtype:
    """What frozen models are kept in: the precision of the run."""
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)


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


def output_term(
    prediction: torch.Tensor, wanted: torch.Tensor, args, progress: float
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The mean loss between the student's and the teacher's output that the flags ask for, and its parts to log.

    Args:
        prediction: The student's, (B, C, *spatial).
        wanted: The teacher's, of the same shape.
        args: With `kd_loss` ("place", "lift" or "mse"), `group_size`, `group_by`, `coarse_norm`, `kd_weighting`.
        progress: Share of the run that is done, for the scheduled weights.
    """
    if args.kd_loss == "mse":
        return torch.nn.functional.mse_loss(prediction.float(), wanted.float()), {}
    parts = lift_place_loss(
        prediction,
        wanted,
        group_size=args.group_size if args.kd_loss == "place" else None,
        norm=args.coarse_norm,
        weighting=fine_weighting(args.kd_weighting, progress),
        group_by=args.group_by,
    )
    logs = {"coarse": parts.coarse, "fine": parts.fine, "weight": parts.weight}
    for name, value in (("slope", parts.slope), ("intercept", parts.intercept)):
        logs |= {f"{name}_mean": value.mean(), f"{name}_std": value.std(correction=0)}
    return parts.fine if args.kd_weighting == "fine_only" else parts.loss, logs


def fine_weighting(kind: str, progress: float) -> str | float:
    """`lift_place_loss`'s weighting for a --kd_weighting at a share of the run."""
    schedule = {
        "linear": progress,
        "cosine": (1 - math.cos(math.pi * progress)) / 2,
        "coarse_only": 0.0,
        "fine_only": 1.0,
    }
    return schedule.get(kind, kind)


@contextmanager
def averaged_weights(ema, parameters: list[torch.nn.Parameter]) -> Iterator[None]:
    """Put an EMAModel's averaged weights into the parameters for a while."""
    ema.store(parameters)
    ema.copy_to(parameters)
    try:
        yield
    finally:
        ema.restore(parameters)


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
    shapes = [
        {key: tensor.shape for key, tensor in state.items()}
        for state in (tensors["student"], training.student.state_dict())
    ]
    if different or shapes[0] != shapes[1] or ("ema" in tensors) != (training.ema is not None):
        what = ", ".join(different) or "the features, adapters or averaged weights"
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
    manifest = {path.name: {"bytes": path.stat().st_size, "sha256": hash_file(path)} for path in temporary.iterdir()}
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
            if path.stat().st_size != expected["bytes"] or hash_file(path) != expected["sha256"]:
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


def hash_file(path: Path) -> str:
    """The SHA-256 sum of a file."""
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


def tracked_flags(args) -> dict[str, Any]:
    """The flags as trackers take them: TensorBoard refuses lists and None."""
    flags = {key: value for key, value in vars(args).items() if value is not None}
    return {key: value if isinstance(value, (int, float, str)) else str(value) for key, value in flags.items()}


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
    """One small plot per metric over the steps, up to four in a row, one line per run, to a PNG."""
    from matplotlib.figure import Figure

    columns = min(4, len(keys))
    rows = -(-len(keys) // columns)
    figure = Figure(figsize=(3.2 * columns, 2.6 * rows + 0.2), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis in axes[len(keys) :]:
        axis.axis("off")
    lines = {}
    for axis, key in zip(axes, keys):
        for index, (name, logged) in enumerate(runs.items()):
            points = [(row["step"], row[key]) for row in logged if row.get(key) is not None]
            if points:
                marker = "." if len(points) < 2 else None
                (lines[name],) = axis.plot(*zip(*points), color=f"C{index}", linewidth=1, marker=marker)
        axis.set_title(key)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    if len(runs) > 1:
        figure.legend(lines.values(), lines.keys(), loc="outside right upper", fontsize=9)
    figure.savefig(path, dpi=120)


def labelled_grid(rows: list[tuple[str, list]], scale: int = 1, columns: list[str] | None = None):
    """One row of equally large PIL images per label, on white, with the labels at the left.

    Args:
        rows: A label and its images each. Long labels are broken into lines.
        scale: Whole factor by which small images are enlarged.
        columns: Labels above the columns. Those wider than an image are broken into lines, three at most.
    """
    from PIL import Image, ImageDraw, ImageFont

    font, line = ImageFont.load_default(14), 18
    labels = [textwrap.fill(label, 28, max_lines=6, placeholder=" …") for label, _ in rows]
    width, height = (side * scale for side in rows[0][1][0].size)
    heights = [max(height, line * (label.count("\n") + 1)) + 4 for label in labels]
    margin = 12 + max(int(font.getlength(part)) for label in labels for part in label.split("\n"))
    titles = [textwrap.fill(label, max(12, width // 7), max_lines=3, placeholder=" …") for label in columns or []]
    parts = [part for title in titles for part in title.split("\n")]
    step = max([width, *(int(font.getlength(part)) + 6 for part in parts)]) + 2
    top = 6 + line * max(title.count("\n") + 1 for title in titles) if titles else 0
    grid = Image.new("RGB", (margin + max(len(images) for _, images in rows) * step, top + sum(heights)), "white")
    draw = ImageDraw.Draw(grid)
    for column, title in enumerate(titles):
        place = (margin + column * step + width // 2, top // 2)
        draw.text(place, title, fill="black", font=font, anchor="mm", align="center")
    for label, (_, images), row_height in zip(labels, rows, heights):
        draw.text((6, top + row_height // 2), label, fill="black", font=font, anchor="lm")
        for column, image in enumerate(images):
            enlarged = image.convert("RGB").resize((width, height), Image.Resampling.NEAREST)
            grid.paste(enlarged, (margin + column * step, top + 2))
        top += row_height
    return grid


def save_grid(grid, output_dir: Path, step: int, trackers: list) -> None:
    """Keep a grid of samples as samples/step-<step>.png and as samples.png, and show it in the trackers."""
    import numpy as np

    folder = output_dir / "samples"
    folder.mkdir(exist_ok=True)
    for path in (folder / f"step-{step:06d}.png", output_dir / "samples.png"):
        grid.save(path)
    for tracker in trackers:
        if tracker.name in ("tensorboard", "wandb"):
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"samples": np.array(grid)[None]}, step=step, **layout)


# ------------------------------------------------------------------------------------------------------------- the Hub


def write_model_card(output_dir: Path, args, kind: str, facts: list[str], usage: str, tags: list[str]) -> None:
    """Write the curves and README.md: what the student is, how it was made, how to use it.

    Args:
        output_dir: With metrics.jsonl and samples.png.
        args: The script's flags.
        kind: The sentence's beginning, e.g. "An unconditional diffusion model".
        facts: What is known of teacher and student, a line each.
        usage: Python code.
        tags: Of the Hub, beside those that every student gets.
    """
    from huggingface_hub import ModelCard, ModelCardData

    rows = read_metrics(output_dir / "metrics.jsonl")
    keys = [key for key in ("loss", "task", "kd", "coarse", "fine", "weight") if key in rows[-1]]
    plot_curves({"student": rows}, keys, output_dir / "curves.png")
    method = {
        "place": f"PLACE, group size {args.group_size} by {args.group_by}, {args.coarse_norm} coarse term, "
        f"{args.kd_weighting} weight",
        "lift": f"LIFT, {args.coarse_norm} coarse term, {args.kd_weighting} weight",
        "mse": "mean squared error to the teacher's output",
        "none": "none: the loss on the data alone",
    }[args.kd_loss]
    weights = {name: value for name, value in vars(args).items() if name.startswith("lambda_")}
    facts = [
        *facts,
        f"- Distillation: {method}; {', '.join(f'{name} {value}' for name, value in weights.items())}.",
        f"- Data: `{args.dataset_name or Path(args.train_data_dir).name}`.",
        f"- Training: {args.max_train_steps} steps of {args.train_batch_size * args.gradient_accumulation_steps} "
        f"images per process, learning rate {args.learning_rate}, seed {args.seed}"
        + (f", weights averaged with decay {args.ema_decay}." if args.use_ema else "."),
    ]
    text = "\n".join(
        [
            f"# {output_dir.resolve().name}",
            f"\n{kind}, made with LIFT and PLACE (arXiv 2605.19729).\n",
            *facts,
            f"\n![Samples](samples.png)\n\n![Curves](curves.png)\n\n```python\n{usage}\n```",
            f"\nThe command:\n\n```\n{shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])}\n```",
        ]
    )
    teacher = args.pretrained_teacher_model
    base_model = teacher if teacher is not None and not Path(teacher).exists() else None
    tags = ["diffusers", *tags, "knowledge-distillation", "lift-place"]
    data = ModelCardData(library_name="diffusers", tags=tags, base_model=base_model)
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n").save(output_dir / "README.md")


def create_hub_repo(repo_id: str, private: bool) -> str:
    """Create the repository unless it exists, before a run is spent on it; returns its full id."""
    from huggingface_hub import create_repo

    try:
        return create_repo(repo_id, private=private, exist_ok=True).repo_id
    except Exception as error:  # without a connection, an error of whichever HTTP library the client is built on
        remedy = "log in with `hf auth login`, or check --hub_model_id"
        fail(f"--push_to_hub cannot create {repo_id}: {reason(error)}; {remedy}")


def push_to_hub(output_dir: Path, repo_id: str) -> None:
    """Upload the finished pipeline without checkpoints, logs and hidden files. The token is the one of the login."""
    from huggingface_hub import upload_folder

    ignored = ["checkpoint-*", ".*", "logs/*"]
    text = "End of training"
    try:
        upload_folder(repo_id=repo_id, folder_path=output_dir, commit_message=text, ignore_patterns=ignored)
    except Exception as error:
        remedy = "it is whole: add --resume_from_checkpoint latest"
        fail(f"--push_to_hub cannot upload {output_dir}: {reason(error)}; {remedy}")
