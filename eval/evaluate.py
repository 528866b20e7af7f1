# Copyright 2026 The LIFT and PLACE distillation authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Measure folders of images: FID and its like against a reference, and how well images fit their prompts.

    python eval/evaluate.py --images teacher-images student-images --reference path/to/real/images --output results

writes results.json and results.md: a table with each figure's number of samples and its warning, and the settings
from each folder's manifest.json (see generate.py). --metrics chooses the figures:

    fid, kid                    clean-fid's, in the features of its Inception
    inception_score             torch-fidelity's, 10 splits
    precision, recall           torch-fidelity's, 3 neighbours
    fd_dinov2                   Fréchet distance in the features of DINOv2, as by dgm-eval
    cmmd                        maximum mean discrepancy of CLIP's embeddings
    clip_score                  mean cosine between image and prompt
    pickscore                   mean preference for the image, given its prompt

The reference is a folder of images, a dataset on the Hub, statistics that an earlier run saved (.npz), or
clean-fid:NAME:RESOLUTION:SPLIT for statistics that clean-fid publishes. The statistics of a reference are computed
once for each network and kept in --statistics_dir.

--features replaces Inception by a TorchScript file. It takes float32 (N, 3, H, W) in [0, 255] and returns features
(N, D), or features and logits (N, classes). A .pt file runs code when it is loaded: pass only one that you trust.
"""

import argparse
import dataclasses
import functools
import glob
import hashlib
import itertools
import json
import os
import sys
import zipfile
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from urllib.error import HTTPError

import cleanfid.features
import datasets
import numpy as np
import torch
from cleanfid.utils import EXTENSIONS
from datasets.arrow_dataset import Column
from PIL import Image
from torchvision.transforms import InterpolationMode
from tqdm.auto import tqdm


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.arguments import HelpFormatter, check_values
from common.data import follow_files, undecode
from common.errors import fail, first_line
from common.folders import check_writable, walk
from common.full import end_in_one_line
from common.images import fit_image, open_image

from figures import (
    Figure,
    Statistics,
    average_scores,
    measure_clip_mmd,
    measure_frechet,
    measure_inception_score,
    measure_kernel,
    measure_manifolds,
)
from generate import as_path, read_manifest
from networks import (
    INCEPTION,
    MODELS,
    PICKSCORE_PROCESSOR,
    Extractor,
    Prepare,
    Scorer,
    check_kind,
    load_clip_images,
    load_dinov2,
    load_inception,
    load_processors,
    load_scorer,
    load_torchscript_features,
)
from result_tables import as_markdown, is_inception, list_figures, make_table, title_of


Size = tuple[int, int]  # width and height
KEPT = 50_000  # images, chosen at random, whose features are kept for KID, CMMD, precision and recall; FID uses all
LIBRARIES = ("torch", "numpy", "pillow", "clean-fid", "torch-fidelity", "transformers")
# The figures by what they are computed from: features of Inception or of --features, of DINOv2, of CLIP; prompts.
OF_INCEPTION = ("fid", "kid", "inception_score", "precision", "recall")
OF_PROMPTS = ("clip_score", "pickscore")
METRICS = (*OF_INCEPTION, "fd_dinov2", "cmmd", *OF_PROMPTS)
WITHOUT_REFERENCE = ("inception_score", *OF_PROMPTS)
FILTER, FILTERS = "lanczos", {"lanczos": InterpolationMode.LANCZOS, "bicubic": InterpolationMode.BICUBIC}
# Flags that say what figures are computed by, the figures, and the value without the flag.
NETWORKS = {
    "inception": (OF_INCEPTION, None),
    "features": (OF_INCEPTION, None),
    "dinov2_model": (("fd_dinov2",), "facebook/dinov2-large"),
    "cmmd_model": (("cmmd",), "openai/clip-vit-large-patch14-336"),
    "clip_model": (("clip_score",), "laion/CLIP-ViT-g-14-laion2B-s34B-b88K"),
    "pickscore_model": (("pickscore",), "yuvalkirstain/PickScore_v1"),
}


# ------------------------------------------------------------------------------------------------------- the arguments


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line, or `input_args`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--images", required=True, nargs="+", type=as_path, help="folders of images, each a row")
    parser.add_argument(
        "--metrics", nargs="+", default=list(OF_INCEPTION), choices=METRICS, metavar="METRIC", help="see above"
    )
    parser.add_argument("--reference", help="folder, dataset, .npz, or clean-fid:NAME:RESOLUTION:SPLIT")
    parser.add_argument("--reference_split", default="train", help="split of a dataset")
    parser.add_argument("--image_column", default="image", help="column of a dataset")
    parser.add_argument(
        "--reference_resolution", type=int, help="resize the reference's shorter side to this and crop the centre"
    )
    parser.add_argument(
        "--reference_filter",
        choices=tuple(FILTERS),
        help=f"of --reference_resolution: {FILTER} as the training, bicubic as --resize (default: {FILTER})",
    )
    parser.add_argument("--output", type=as_path, default=Path("results"), help="writes OUTPUT.json and OUTPUT.md")
    parser.add_argument(
        "--statistics_dir", type=as_path, default=Path("statistics"), help="where statistics of references are kept"
    )
    parser.add_argument(
        "--inception", type=as_path, help=f"place of {INCEPTION}, a trusted file (default: torch's hub folder)"
    )
    parser.add_argument(
        "--features", type=as_path, help="TorchScript file instead of Inception; it runs code, so trust it first"
    )
    parser.add_argument(
        "--features_size", type=int, help="resize images to this side for --features (default: do not)"
    )
    for name in ("dinov2_model", "cmmd_model", "clip_model", "pickscore_model"):
        (metric,), default = NETWORKS[name]
        parser.add_argument(f"--{name}", help=f"folder or Hub id for {metric} (default: {default})")
    parser.add_argument("--batch_size", type=int, default=32, help="images per batch")
    parser.add_argument("--num_workers", type=int, default=0, help="processes that decode and resize images")
    parser.add_argument("--seed", type=int, default=0, help="seed of KID's subsets and Inception score's splits")
    args = parser.parse_args(input_args)
    check_values(args)
    if not args.output.name or args.output.suffix in (".json", ".md"):
        fail(f"--output {args.output} is no name that .json and .md can follow; pass e.g. results")
    if args.features_size is not None and args.features is None:
        fail(f"--features_size {args.features_size} is for --features only; drop the flag")
    for name, (metrics, _) in NETWORKS.items():
        if getattr(args, name) is not None and not set(metrics) & set(args.metrics):
            fail(f"--{name} {getattr(args, name)} is for --metrics {' '.join(metrics)}; add one of them, or drop it")
    compared = [metric for metric in args.metrics if metric not in WITHOUT_REFERENCE]
    if args.reference is None and compared:
        fail(f"--metrics {' '.join(compared)} compare with real images; pass them as --reference, or drop these")
    if args.reference_filter is not None and args.reference_resolution is None:
        fail(f"--reference_filter {args.reference_filter} is for --reference_resolution; pass that, or drop the flag")
    args.reference_filter = args.reference_filter or FILTER
    if args.reference is not None and not compared:
        fail(f"--reference {args.reference} is not used by --metrics {' '.join(args.metrics)}; drop it")
    return args


def network_of(args: argparse.Namespace, flag: str) -> str:
    """The folder or Hub id that a flag of [`NETWORKS`] names."""
    return getattr(args, flag) or NETWORKS[flag][1]


# ---------------------------------------------------------------------------------------------------------- the images


class Images(torch.utils.data.Dataset):
    """Images for a network: the original width and height, and what `prepare` makes of the image, (3, H, W).

    An item is `None` if the image cannot be read.

    Args:
        records: Paths, or undecoded images of `datasets`.
        prepare: The network's.
        crop: Before that the shorter side is resized to it and the longer side is cropped to it, as in training.
        filter: Of [`FILTERS`], by which it is resized.
    """

    def __init__(self, records: list[Path] | Column, prepare: Prepare, crop: int | None = None, filter: str = FILTER):
        self.records, self.prepare, self.crop, self.filter = records, prepare, crop, FILTERS[filter]

    def __len__(self) -> int:
        return len(self.records)

    def open(self, index: int) -> Image.Image:
        """The image, RGB, cropped."""
        record = self.records[index]
        record = {"path": str(record), "bytes": None} if isinstance(record, Path) else record
        image = open_image(record, "RGB")
        return image if self.crop is None else fit_image(image, self.crop, self.filter)

    def __getitem__(self, index: int) -> tuple[tuple[int, int], torch.Tensor] | None:
        try:
            image = self.open(index)
        except Exception:  # decoders raise many kinds of errors on damaged files
            return None
        return image.size, self.prepare(image)

    def name(self, index: int) -> str:
        """What error messages call the image."""
        record = self.records[index]
        return str(record if isinstance(record, Path) else record["path"] or f"row {index}")


def list_images(folder: Path, flag: str) -> list[Path]:
    """The image files in a folder and its sub-folders, linked ones too, sorted. Hidden ones are left out."""
    if not folder.is_dir():
        fail(f"{flag} {folder} is not a folder; pass a folder of images")
    suffixes = {f".{extension.lower()}" for extension in EXTENSIONS if extension != "npy"}
    try:
        paths = [Path(within, name) for within, names in walk(str(folder)) for name in names]
    except OSError as error:
        fail(f"{flag} {folder} cannot be read: {first_line(error)}; pass a folder of images")
    files = sorted(path for path in paths if path.suffix.lower() in suffixes)
    if not files:
        fail(f"{flag} {folder} holds no images; pass a folder of images")
    return files


def collate(items: list[tuple[Size, torch.Tensor] | None]) -> tuple[list[Size | None], torch.Tensor | None]:
    """Each image's original size, `None` if it cannot be read, and all images (N, 3, H, W) if they are of one shape.

    A worker sends one tensor a batch: for each it holds a file open, of which a process may have no more than 1,024.
    """
    sizes = [item and item[0] for item in items]
    pixels = [item[1] for item in items if item is not None]
    return sizes, torch.stack(pixels) if len({image.shape for image in pixels}) == 1 else None


def read_batches(
    images: Images, flag: str, args: argparse.Namespace, title: str
) -> Iterator[tuple[list[Size], torch.Tensor | None]]:
    """What [`collate`] makes of all images in their order, `--batch_size` at a time, with a progress bar.

    Ends the process with `flag`, the name and value of the flag that they come from, if an image cannot be read.
    """
    loader = torch.utils.data.DataLoader(
        images, batch_size=args.batch_size, num_workers=args.num_workers, collate_fn=collate
    )
    done = 0
    for sizes, pixels in tqdm(loader, desc=f"{title} of {flag.split()[-1]}", leave=False):
        if None in sizes:
            fail(f"{flag}: {images.name(done + sizes.index(None))} cannot be read; repair or remove it")
        yield sizes, pixels
        done += len(sizes)


@torch.no_grad()
def measure(
    images: Images,
    extractor: Extractor,
    flag: str,
    args: argparse.Namespace,
    device: torch.device,
    with_logits: bool = False,
) -> Statistics:
    """Compute the statistics of a set of images. Ends the process unless all are readable and of one size.

    Args:
        images: The images.
        extractor: The features are its outputs.
        flag: Name and value of the flag that the images come from, for messages.
        args: With `batch_size` and `num_workers`.
        device: Of the extractor.
        with_logits: Whether those of all images are kept, for the Inception score.
    """
    kept = np.random.default_rng(0).permutation(len(images)) < KEPT  # whatever --seed: statistics are kept for all
    size, features, logits, done = None, [], [], 0
    for sizes, pixels in read_batches(images, flag, args, extractor.name.split(" (")[0]):
        for index, other in enumerate(sizes, done):
            size = size or other
            if other != size:
                both = f"{size[0]}x{size[1]} and {other[0]}x{other[1]}"
                remedy = "pass --reference_resolution" if flag.startswith("--reference") else "pass images of one size"
                fail(f"{flag} mixes sizes, {both} ({images.name(index)}); {remedy}")
        outputs, scores = extractor.run(pixels.float().to(device), with_logits)
        outputs = outputs.float().cpu().numpy()
        if not np.isfinite(outputs).all():
            fail(f"{flag}: the features by {extractor.name} are not finite; pass a network for inputs in [0, 255]")
        exact = outputs.astype(np.float64)
        if not done:
            # Sums of squares around the first batch's mean stay exact where features are far from zero.
            origin, first, second = exact.mean(0), 0.0, 0.0
        exact = exact - origin
        first, second = first + exact.sum(0), second + exact.T @ exact
        features.append(outputs[kept[done : done + len(sizes)]])
        if scores is not None:
            logits.append(scores.float().cpu().numpy())
        done += len(sizes)
    if done < 2:
        enough = f"2, and for FID more than {len(origin)}" if done else "2"
        fail(f"{flag} holds {done} image{'s' * (done != 1)}; pass at least {enough}")
    mean = first / done
    covariance = (second - done * np.outer(mean, mean)) / (done - 1)
    all_logits = np.concatenate(logits) if logits else None
    source = flag.split(" ", 1)[1]
    return Statistics(done, list(size), origin + mean, covariance, np.concatenate(features), all_logits, source)


# ------------------------------------------------------------------------------------------------------- the reference


def load_reference(extractor: Extractor, args: argparse.Namespace, device: torch.device) -> Statistics:
    """Read the statistics of `--reference`, or compute and save them."""
    source, crop = args.reference, (args.reference_resolution, args.reference_filter)
    if source.startswith("clean-fid:"):
        return load_published(source)
    if source.endswith(".npz"):
        return read_statistics(Path(source), extractor, *crop)
    if Path(source).is_dir():
        records = list_images(Path(source), "--reference")
        files = [[str(path.relative_to(source)), path.stat().st_size, path.stat().st_mtime_ns] for path in records]
        contents = hashlib.sha256(json.dumps(files).encode()).hexdigest()
    else:
        records, contents = load_dataset(args)
    key = {"reference": source, "contents": contents, "crop": args.reference_resolution, "transparent": "white"}
    key |= {"filter": args.reference_filter} if args.reference_resolution is not None else {}
    key |= {"extractor": extractor.digest, "size": extractor.size, "resize": extractor.resizing}
    digest = hashlib.sha256(json.dumps({**key, "reference": ""}).encode()).hexdigest()
    path = args.statistics_dir / f"{Path(source).name}-{digest[:12]}.npz"
    if path.exists():
        return read_statistics(path, extractor, *crop)
    images = Images(records, extractor.prepare, *crop)
    statistics = measure(images, extractor, f"--reference {source}", args, device)
    save_statistics(path, statistics, key)
    return statistics


def load_dataset(args: argparse.Namespace) -> tuple[Column, str]:
    """The undecoded images of the dataset `--reference`, and a string that identifies its contents."""
    flag = f"--reference {args.reference}"
    try:
        dataset = datasets.load_dataset(args.reference, split=args.reference_split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        fail(f"{flag} is not a folder, and does not load as a dataset: {first_line(error)}; pass one of them")
    if args.image_column not in dataset.column_names:
        fail(f"--image_column {args.image_column} is not in the data; choose one of {', '.join(dataset.column_names)}")
    images = undecode(dataset.select_columns(args.image_column), args.image_column)
    dataset = follow_files(images, args.image_column)
    return dataset[args.image_column], f"{dataset._fingerprint} {args.image_column}"


def save_statistics(path: Path, statistics: Statistics, key: dict) -> None:
    """Write a .npz file completely or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}-{os.getpid()}")  # another process may be writing the same
    try:
        with temporary.open("wb") as file:
            np.savez(
                file,
                mu=statistics.mean,
                sigma=statistics.covariance,
                feats=statistics.features,
                size=np.array(statistics.size),
                count=np.array(statistics.count),
                key=np.array(json.dumps(key)),
            )
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    print(f"statistics of {statistics.source} are kept in {path}", flush=True)


def read_statistics(path: Path, extractor: Extractor, crop: int | None, filter: str) -> Statistics:
    """Read a file of [`save_statistics`], or one with `mu` and `sigma` as clean-fid writes it.

    Ends the process if the features are those of another extractor, or of images cropped otherwise than to `crop` by
    `filter`, where it is given.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        key = json.loads(str(arrays["key"])) if "key" in arrays else {}
        mean, covariance, features = arrays["mu"], arrays["sigma"], arrays.get("feats")
        widths = {mean.size, *covariance.shape, *(features.shape[1:] if features is not None else ())}
        if (mean.ndim, covariance.ndim) != (1, 2) or len(widths) != 1 or not isinstance(key, dict):
            raise ValueError("mu, sigma, feats and key do not fit each other")
        if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
            raise ValueError("mu or sigma is not finite")
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        fail(f"--reference {path} cannot be read: {first_line(error)}; pass a file that evaluate.py saved")
    if key and (key.get("extractor"), key.get("size")) != (extractor.digest, extractor.size):
        remedy = "pass the network and the --metrics it was made with, or the images themselves"
        fail(f"--reference {path} holds features of another network than {extractor.name}; {remedy}")
    if key and key.get("resize", extractor.resizing) != extractor.resizing:
        fail(f"--reference {path} was resized as by {key['resize']}, not {extractor.resizing}; pass the images")
    if crop is not None and key.get("crop") != crop:
        made = f"--reference {path}, which was made with {key.get('crop', 'an unknown one')}"
        fail(f"--reference_resolution {crop} is not that of {made}; drop the flag, or pass the images")
    made_by = key.get("filter", "bicubic")  # which was that of earlier versions
    if crop is not None and made_by != filter:
        fail(f"--reference {path} was resized by {made_by}; pass --reference_filter {made_by}, or the images")
    count = int(arrays.get("count", 0 if features is None else len(features)))
    size = arrays.get("size", np.array([])).tolist()
    origin = {"source": key.get("reference", str(path)), "foreign": not key}
    return Statistics(count, size, mean, covariance, features, None, **origin)


def load_published(source: str) -> Statistics:
    """Download statistics that clean-fid publishes, of features by its Inception."""
    _, name, resolution, split = source.split(":")
    get = functools.partial(cleanfid.features.get_reference_statistics, name, resolution, split=split)
    try:
        mean, covariance = get(metric="FID")
        features = published_features(get)
    except OSError as error:
        fail(f"--reference {source} cannot be downloaded: {first_line(error)}; pass a folder of the images")
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile):
        # clean-fid takes half a file of a download that was broken off for a whole one, now and ever after.
        stem = f"{name}_clean_{split}_{resolution}".lower()
        for path in (Path(cleanfid.__file__).parent / "stats").glob(f"{glob.escape(stem)}*.npz"):
            path.unlink()
        fail(f"--reference {source} was not downloaded whole; what there was is removed, run the command again")
    return Statistics(0 if features is None else len(features), [], mean, covariance, features, None, source)


def published_features(get: Callable[..., np.ndarray]) -> np.ndarray | None:
    """The features that clean-fid publishes of few sets, from which KID is computed; `None` of the others."""
    try:
        return get(metric="KID")
    except HTTPError as error:
        if error.code != 404:
            raise
        return None


# --------------------------------------------------------------------------------------------------------- the metrics


def list_extractors(
    args: argparse.Namespace, device: torch.device
) -> list[tuple[tuple[str, ...], Callable[[], Extractor]]]:
    """For each network of features that `--metrics` needs: the metrics computed from it, and what loads it."""
    if args.features:
        first = functools.partial(load_torchscript_features, args.features, args.features_size, device)
    else:
        first = functools.partial(load_inception, args.inception, device)
    networks = {
        OF_INCEPTION: first,
        ("fd_dinov2",): functools.partial(load_dinov2, network_of(args, "dinov2_model"), device),
        ("cmmd",): functools.partial(load_clip_images, network_of(args, "cmmd_model"), device),
    }
    chosen = [(tuple(metric for metric in names if metric in args.metrics), load) for names, load in networks.items()]
    return [(names, load) for names, load in chosen if names]


def scorer_of(metric: str, args: argparse.Namespace) -> tuple[str, str, str]:
    """The flag of "clip_score" or "pickscore", the model that it names, and whose tokenizer and image processor."""
    name = {"clip_score": "clip_model", "pickscore": "pickscore_model"}[metric]
    source = network_of(args, name)
    # PickScore's authors take those of the model that it started from.
    published = name == "pickscore_model" and source == NETWORKS[name][1]
    return name, source, PICKSCORE_PROCESSOR if published else source


def check_networks(args: argparse.Namespace) -> None:
    """End the process if a network that `--metrics` needs is missing, or `--reference` is not for all of them.

    The networks run one after the other, for hours: what the last one lacks is to be said before the first.
    """
    source, compared = args.reference or "", set(args.metrics) - set(WITHOUT_REFERENCE)
    others = sorted(compared - set(OF_INCEPTION))  # each by a network of its own
    if source.startswith("clean-fid:") and source.count(":") != 3:
        fail(f"--reference {source} is not clean-fid:NAME:RESOLUTION:SPLIT; pass e.g. clean-fid:cifar10:32:train")
    if source.startswith("clean-fid:") and args.reference_resolution is not None:
        fail(f"--reference_resolution {args.reference_resolution} is for images, not for {source}; drop the flag")
    if source.startswith("clean-fid:") and (args.features or others):
        wanted = f"--features {args.features}" if args.features else " ".join(others)
        remedy = "drop --features, and of --metrics all but " + " ".join(OF_INCEPTION)
        fail(f"--reference {source} holds features by Inception, not by that of {wanted}; {remedy}")
    if source.endswith(".npz") and len(others) + (len(others) < len(compared)) > 1:
        several = f"and --metrics {' '.join(sorted(compared))} need several"
        fail(f"--reference {source} holds features of one network, {several}; pass the images, or run each by itself")
    for name in MODELS:
        if set(NETWORKS[name][0]) & set(args.metrics):
            check_kind(name, network_of(args, name))
    for metric in set(OF_PROMPTS) & set(args.metrics):
        load_processors(*scorer_of(metric, args))


def compare(
    statistics: Statistics,
    reference: Statistics | None,
    metrics: tuple[str, ...],
    args: argparse.Namespace,
    device: torch.device,
) -> dict[str, Figure]:
    """The figures of a set of images by these metrics, which are all computed from features of one network."""
    figures = {}
    if reference is not None and len(reference.mean) != len(statistics.mean):
        sizes = f"{len(reference.mean)} features, and the network {len(statistics.mean)}"
        fail(f"--reference {args.reference} has {sizes}; pass statistics of the same network")
    if "inception_score" in metrics:
        figures["inception_score"] = measure_inception_score(statistics, args.seed)
    for metric in {"fid", "fd_dinov2"} & set(metrics):
        figures[metric] = measure_frechet(statistics, reference)
    if "kid" in metrics:
        figures["kid"] = measure_kernel(statistics, reference, args.seed)
    if "cmmd" in metrics:
        figures["cmmd"] = measure_clip_mmd(statistics, reference, device)
    if manifolds := {"precision", "recall"} & set(metrics):
        both = measure_manifolds(statistics, reference)
        figures |= {metric: both[metric] for metric in manifolds}
    return figures


@torch.no_grad()
def score_prompts(
    files: list[Path], prompts: list[str], scorer: Scorer, flag: str, args: argparse.Namespace, device: torch.device
) -> np.ndarray:
    """The score, float64 (N,), of each image by its prompt, which is number i modulo their count."""
    numbers, scores = [int(path.stem) for path in files], []
    for sizes, pixels in read_batches(Images(files, scorer.prepare), flag, args, scorer.name.split(" (")[0]):
        own = [prompts[number % len(prompts)] for number in numbers[len(scores) : len(scores) + len(sizes)]]
        scores += scorer.run(pixels.to(device), own).tolist()
    if not np.isfinite(scores).all():
        fail(f"{flag}: the scores by {scorer.name} are not finite; pass another model for it")
    return np.array(scores)


# --------------------------------------------------------------------------------------------------------- the results


SETTINGS = ("sampler", "num_inference_steps", "guidance_scale", "seed", "dtype")


def make_notes(results: dict) -> list[str]:
    """How the results were measured, and what to keep in mind."""
    notes = []
    if reference := results["reference"]:
        count = f"{reference['images']:,} images" if reference["images"] else "published statistics"
        size = ", {} x {} pixels".format(*reference["size"]) if reference["size"] else ""
        notes.append(f"Reference: {reference['source']}, {count}{size}.")
    for network in results["networks"]:
        titles = ", ".join(title_of(metric, is_inception(results)) for metric in network["metrics"])
        dimensions = f", {network['dimensions']:,} features" if network["dimensions"] else ""
        notes.append(f"{titles}: by {network['name']}, SHA-256 {network['sha256'][:16]}…{dimensions}.")
    if not is_inception(results):
        notes.append("**Not Inception FID**: do not compare these distances with published figures.")
    return notes


def write_results(results: dict, output: Path) -> str:
    """Write OUTPUT.json and OUTPUT.md; returns the Markdown."""
    rows = {row["name"]: row for row in results["rows"]}
    parts = ["## Metrics", as_markdown(list_figures(rows, results["metrics"], is_inception(results)), words=(0, 1, 5))]
    settings = make_table(rows, SETTINGS, is_inception(results))
    parts += ["## Settings", as_markdown(settings)] if settings else []
    parts.append("\n".join(f"- {note}" for note in make_notes(results)))
    text = "\n\n".join(parts) + "\n"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_name(f"{output.name}.json").write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    output.with_name(f"{output.name}.md").write_text(text)
    return text


def describe(folder: Path, name: str) -> tuple[list[Path], dict]:
    """The folder's images, and its settings from the manifest. Ends the process if images are missing."""
    files, manifest = list_images(folder, "--images"), read_manifest(folder, "--images")
    if manifest and len(files) < manifest["num_images"]:
        counts = f"{len(files)} of the {manifest['num_images']} images of its manifest"
        fail(f"--images {folder} holds {counts}; run the generate.py command again to complete it")
    kept = *SETTINGS, "variant", "model", "contents", "pipeline"
    row = {key: manifest.get(key) for key in (*kept, "resolution", "resize", "versions")}
    return files, {"name": name, "folder": str(folder), **row}


def label_folders(folders: list[Path], flag: str = "--images") -> list[str]:
    """The shortest names that differ: the last parts of the paths."""
    for parts in range(1, max(len(folder.resolve().parts) for folder in folders) + 1):
        names = ["/".join(folder.resolve().parts[-parts:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    real = [folder.resolve() for folder in folders]
    twice = next(folder for place, folder in enumerate(folders) if real[place] in real[:place])
    fail(f"{flag} {twice} is passed twice; pass each folder once")


# ------------------------------------------------------------------------------------------------------------- the run


def check_prompts(folders: dict[str, list[Path]], args: argparse.Namespace) -> dict[str, list[str]]:
    """The prompts of those folders of images that have them in their manifest, if `--metrics` needs any."""
    asked = [metric for metric in args.metrics if metric in OF_PROMPTS]
    manifests = {folder: read_manifest(Path(folder), "--images") for folder in folders} if asked else {}
    prompts = {folder: manifest["prompts"] for folder, manifest in manifests.items() if manifest.get("prompts")}
    if asked and not prompts:
        fail(f"--metrics {' '.join(asked)} needs prompts, and no folder has them in a manifest.json; drop it")
    for folder in prompts:
        unnumbered = [path.name for path in folders[folder] if not path.stem.isdecimal()]
        if unnumbered:
            problem = f"has prompts by number, and {unnumbered[0]} has no number"
            fail(f"--images {folder} {problem}; rename or remove that")
    return prompts


@dataclasses.dataclass
class Measured:
    """What was measured of all folders of images so far."""

    figures: dict[str, dict[str, Figure]]  # by folder and metric
    # width and height, by folder; without an entry where no network asked for one size
    sizes: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    networks: list[dict] = dataclasses.field(default_factory=list)  # for the results: what computed which metrics
    reference: dict | None = None  # for the results


def measure_features(
    folders: dict[str, list[Path]], measured: Measured, args: argparse.Namespace, device: torch.device
) -> Iterator[None]:
    """Add the metrics that are computed from features, one network after the other; each time, yield."""
    for metrics, load in list_extractors(args, device):
        extractor, known = load(), None
        if not set(metrics) <= set(WITHOUT_REFERENCE):
            known = load_reference(extractor, args, device)
            measured.reference = {"source": known.source, "images": known.count, "size": known.size}
        for folder, files in folders.items():
            flag = f"--images {folder}"
            images = Images(files, extractor.prepare)
            statistics = measure(images, extractor, flag, args, device, "inception_score" in metrics)
            measured.sizes[folder] = statistics.size
            both = None
            if known is not None and known.size not in ([], statistics.size):
                both = "{}x{} and the reference {}x{}".format(*statistics.size, *known.size)
            if both is not None and extractor.size is None:
                fail(f"{flag} is {both}; pass --features_size or --reference_resolution")
            for metric, figure in compare(statistics, known, metrics, args, device).items():
                measured.figures[folder][metric] = warn_of_sizes(metric, figure, both)
        identity = {"name": extractor.name, "sha256": extractor.digest, "dimensions": len(statistics.mean)}
        measured.networks.append({**identity, "metrics": metrics})
        yield


def warn_of_sizes(metric: str, figure: Figure, sizes: str | None) -> Figure:
    """The figure with a warning of the sizes of its images and of the reference, where these differ and it has one."""
    if sizes is None or metric in WITHOUT_REFERENCE:
        return figure
    return figure._replace(warning="; ".join(filter(None, [figure.warning, f"sizes differ, {sizes}"])))


def measure_prompts(
    folders: dict[str, list[Path]],
    prompts: dict[str, list[str]],
    measured: Measured,
    args: argparse.Namespace,
    device: torch.device,
) -> Iterator[None]:
    """Add the metrics that compare images with their prompts, one network after the other; each time, yield."""
    for metric in [metric for metric in OF_PROMPTS if metric in args.metrics]:
        scorer = load_scorer(*scorer_of(metric, args), device)
        for folder, files in folders.items():
            figure = Figure(None, len(files), warning="not measured: the folder has no prompts")
            if folder in prompts:
                scores = score_prompts(files, prompts[folder], scorer, f"--images {folder}", args, device)
                figure = average_scores(scores)
            measured.figures[folder][metric] = figure
        identity = {"name": scorer.name, "sha256": scorer.digest, "dimensions": None}
        measured.networks.append({**identity, "metrics": [metric]})
        yield


MEMORY = "--batch_size {batch_size} does not fit the GPU: {error}; lower it"
DISK = "--output {output} or --statistics_dir {statistics_dir}: {error}; make room"


@functools.partial(end_in_one_line, memory=MEMORY, disk=DISK)
def main(args: argparse.Namespace) -> None:
    """Measure every folder and write the results."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.allow_tf32 = False  # Inception in float32
    check_writable(f"--output {args.output}", args.output.parent)
    check_writable(f"--statistics_dir {args.statistics_dir}", args.statistics_dir)
    described = [describe(folder, name) for folder, name in zip(args.images, label_folders(args.images))]
    folders = {row["folder"]: files for files, row in described}
    prompts = check_prompts(folders, args)
    check_networks(args)
    measured = Measured({folder: {} for folder in folders})
    features = measure_features(folders, measured, args, device)
    for _ in itertools.chain(features, measure_prompts(folders, prompts, measured, args, device)):
        text = write_results(gather_results(described, measured, args.seed), args.output)  # the next may fail
    print(text)


def gather_results(described: list[tuple[list[Path], dict]], measured: Measured, seed: int) -> dict:
    """All that was measured so far, as JSON types.

    Args:
        described: From [`describe`], for each folder.
        measured: Of these folders.
        seed: That of the flags.
    """
    metrics = {metric for network in measured.networks for metric in network["metrics"]}
    results = {
        "reference": measured.reference,
        # The one of FID and its like, which says whether they are comparable with published figures.
        "extractor": next((each for each in measured.networks if set(each["metrics"]) & set(OF_INCEPTION)), None),
        "networks": measured.networks,
        "metrics": [metric for metric in METRICS if metric in metrics],
        "seed": seed,
        "versions": {library: version(library) for library in LIBRARIES},
    }
    return {**results, "rows": [make_row(row, files, measured, is_inception(results)) for files, row in described]}


def make_row(row: dict, files: list[Path], measured: Measured, inception: bool) -> dict:
    """A folder's settings and figures, for the results."""
    figures = measured.figures[row["folder"]]
    warnings = {metric: figures[metric].warning for metric in METRICS if metric in figures and figures[metric].warning}
    titles: dict[str, list[str]] = {}  # of the metrics, by their warning
    for metric, warning in warnings.items():
        titles.setdefault(warning, []).append(title_of(metric, inception).split(" · ")[0])
    return {
        **row,
        "images": len(files),
        "size": measured.sizes.get(row["folder"], []),
        **{metric: figures[metric].value if metric in figures else None for metric in METRICS},
        "samples": {metric: [figure.samples, figure.reference_samples] for metric, figure in figures.items()},
        "warnings": warnings,
        "remarks": [f"{', '.join(same)}: {warning}" for warning, same in titles.items()],
    }


if __name__ == "__main__":
    main(parse_args())
