# Copyright 2026 The LIFT and PLACE distillation authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Measure folders of images against a reference: FID, KID, Inception score, precision and recall, CLIP score.

    python eval/evaluate.py --images teacher-images student-images --reference path/to/real/images --output results

writes results.json and results.md, with the settings from each folder's manifest.json (see generate.py).

The reference is a folder of images, a dataset on the Hub, statistics that an earlier run saved (.npz), or
clean-fid:NAME:RESOLUTION:SPLIT for statistics that clean-fid publishes. The statistics of a reference are computed
once and kept in --statistics_dir.

FID and KID are clean-fid's: its resizing, its Inception, its kernel. The Fréchet distance is computed by a symmetric
eigendecomposition, which agrees with clean-fid's matrix root. Inception score (10 splits), precision and recall (3
neighbours) are computed by torch-fidelity. The CLIP score is the mean cosine between image and prompt.

--features replaces Inception by a TorchScript file. It takes float32 (N, 3, H, W) in [0, 255] and returns features
(N, D), or features and logits (N, classes). A .pt file runs code when it is loaded: pass only one that you trust.
"""

import argparse
import functools
import hashlib
import json
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import cleanfid.downloads_helper
import cleanfid.features
import datasets
import numpy as np
import torch
from cleanfid.fid import kernel_distance
from cleanfid.inception_torchscript import InceptionV3W
from cleanfid.resize import make_resizer
from cleanfid.utils import EXTENSIONS
from PIL import Image
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric
from tqdm.auto import tqdm
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.arguments import HelpFormatter, check_values, fail, first_line
from common.checkpoints import hash_file
from common.data import open_image, undecode
from common.teachers import read_weights

from generate import as_path, check_writable, read_manifest
from result_tables import as_markdown, is_inception, list_remarks, make_table


INCEPTION = "inception-2015-12-05.pt"
KEPT = 50_000  # images, chosen at random, whose features are kept for KID, precision and recall; FID uses all
FEW = 10_000  # with fewer images FID is clearly too high, and for some models more than for others
LIBRARIES = ("torch", "numpy", "pillow", "clean-fid", "torch-fidelity", "transformers")


class Extractor(NamedTuple):
    """A network that turns images into features."""

    name: str  # shown in reports
    digest: str  # SHA-256 of its file
    size: int | None  # images are resized to it; `None`: they are not
    # float32 (N, 3, H, W) in [0, 255] -> features (N, D), logits (N, classes)
    run: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor | None]]


class Statistics(NamedTuple):
    """The statistics of a set of images that the metrics are computed from."""

    count: int  # of images; 0 if unknown
    size: list[int]  # width and height; empty if unknown
    mean: np.ndarray  # float64 (D,)
    covariance: np.ndarray  # float64 (D, D)
    features: np.ndarray | None  # float32 (N, D) of up to KEPT images; published statistics may come without
    logits: np.ndarray | None  # float32 (N, classes)
    source: str


# ------------------------------------------------------------------------------------------------------- the arguments


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line, or `input_args`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--images", required=True, nargs="+", type=as_path, help="folders of images, each a row")
    parser.add_argument("--reference", required=True, help="folder, dataset, .npz, or clean-fid:NAME:RESOLUTION:SPLIT")
    parser.add_argument("--reference_split", default="train", help="split of a dataset")
    parser.add_argument("--image_column", default="image", help="column of a dataset")
    parser.add_argument(
        "--reference_resolution", type=int, help="resize the reference's shorter side to this and crop the centre"
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
    parser.add_argument("--clip_model", help="CLIP folder or Hub id, for images with prompts in their manifest")
    parser.add_argument("--batch_size", type=int, default=32, help="images per batch")
    parser.add_argument("--num_workers", type=int, default=0, help="processes that decode and resize images")
    parser.add_argument("--seed", type=int, default=0, help="seed of the subsets for KID and Inception score")
    args = parser.parse_args(input_args)
    check_values(args)
    if args.features_size is not None and args.features is None:
        fail(f"--features_size {args.features_size} is for --features only; drop the flag")
    return args


# ------------------------------------------------------------------------------------------------------- the extractor


def load_extractor(args: argparse.Namespace, device: torch.device) -> Extractor:
    """Load clean-fid's Inception, or the TorchScript file of `--features`."""
    if args.features is None:
        return load_inception(args.inception, device)
    model = load_torchscript("--features", args.features, device)

    def run(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        try:
            output = model(images)
        except RuntimeError as error:
            problem = f"does not accept images of shape {tuple(images.shape[1:])}"
            fail(f"--features {args.features} {problem}: {str(error).strip().splitlines()[-1]}; pass --features_size")
        features, logits = output if isinstance(output, tuple) else (output, None)
        for tensor in (features, logits):
            if tensor is not None and (tensor.ndim != 2 or len(tensor) != len(images)):
                shape = tuple(tensor.shape)
                fail(f"--features {args.features} returns {shape} for {len(images)} images; return (N, D)")
        return features, logits

    name = f"{args.features.name} at {args.features_size} px" if args.features_size else args.features.name
    return Extractor(name, hash_file(args.features), args.features_size, run)


def load_inception(path: Path | None, device: torch.device) -> Extractor:
    """Load the Inception of clean-fid, for features and for logits. The file is downloaded once."""
    path = path or Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION
    path = path / INCEPTION if path.is_dir() else path
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent) as folder:  # clean-fid does not notice half a file
                shutil.move(cleanfid.downloads_helper.check_download_inception(folder), path)
        except OSError as error:
            url = cleanfid.downloads_helper.inception_url
            fail(f"--inception {path} is missing and not downloaded ({error}); put {url} there, or pass --features")
    base = load_torchscript("--inception", path, device)
    if path.name != INCEPTION:
        fail(f"--inception {path} must have the name {INCEPTION}, which clean-fid loads; rename it")
    features = InceptionV3W(str(path.parent), download=False).to(device).eval()

    def run(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # The network returns probabilities. Their logarithms serve as logits: softmax turns them back. The last layer
        # has no bias, as in the published Inception score.
        return features(images), base(images, no_output_bias=True).log()

    return Extractor("Inception (clean-fid)", hash_file(path), 299, run)


def load_torchscript(flag: str, path: Path, device: torch.device) -> torch.jit.ScriptModule:
    """Load a TorchScript file. Ends the process with the flag's name if that fails."""
    try:
        return torch.jit.load(str(path), map_location=device).eval()
    except (RuntimeError, ValueError, OSError) as error:
        fail(f"{flag} {path} does not load: {first_line(error)}; pass a file of torch.jit.save")


# ---------------------------------------------------------------------------------------------------------- the images


class Images(torch.utils.data.Dataset):
    """Images for an extractor, resized as by clean-fid: the original size, and float32 (3, H, W) in [0, 255].

    An item is `None` if the image cannot be read.

    Args:
        records: Paths, or undecoded images of `datasets`.
        size: Both sides are resized to it.
        crop: Before that the shorter side is resized to it and the longer side is cropped to it.
    """

    def __init__(self, records: "list[Path] | Column", size: int | None, crop: int | None):
        self.records, self.size, self.crop = records, size, crop

    def __len__(self) -> int:
        return len(self.records)

    def open(self, index: int) -> Image.Image:
        """The image, RGB, cropped."""
        record = self.records[index]
        record = {"path": str(record), "bytes": None} if isinstance(record, Path) else record
        image = open_image(record, "RGB")
        if self.crop is None:
            return image
        factor = self.crop / min(image.size)
        image = image.resize(tuple(round(side * factor) for side in image.size), Image.Resampling.BICUBIC)
        left, top = ((side - self.crop) // 2 for side in image.size)
        return image.crop((left, top, left + self.crop, top + self.crop))

    def __getitem__(self, index: int) -> tuple[tuple[int, int], torch.Tensor] | None:
        try:
            image = self.open(index)
        except Exception:  # decoders raise many kinds of errors on damaged files
            return None
        # Made for each image: the function cannot be sent to worker processes.
        resize = make_resizer("PIL", False, "bicubic", (self.size, self.size)) if self.size else np.float32
        return image.size, torch.from_numpy(resize(np.array(image))).permute(2, 0, 1)

    def name(self, index: int) -> str:
        """What error messages call the image."""
        record = self.records[index]
        return str(record if isinstance(record, Path) else record["path"] or f"row {index}")


def list_images(folder: Path, flag: str) -> list[Path]:
    """The image files in a folder and its sub-folders, sorted."""
    if not folder.is_dir():
        fail(f"{flag} {folder} is not a folder; pass a folder of images")
    suffixes = {f".{extension.lower()}" for extension in EXTENSIONS if extension != "npy"}
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in suffixes and path.name[0] != ".")
    if not files:
        fail(f"{flag} {folder} holds no images; pass a folder of images")
    return files


@torch.no_grad()
def measure(
    images: Images, extractor: Extractor, flag: str, args: argparse.Namespace, device: torch.device
) -> Statistics:
    """Compute the statistics of a set of images. Ends the process unless all are readable and of one size.

    Args:
        images: The images.
        extractor: The features are its outputs.
        flag: Name and value of the flag that the images come from, for messages.
        args: With `batch_size`, `num_workers` and `seed`.
        device: Of the extractor.
    """
    loader = torch.utils.data.DataLoader(
        images, batch_size=args.batch_size, num_workers=args.num_workers, collate_fn=list
    )
    kept = np.random.default_rng(args.seed).permutation(len(images)) < KEPT
    size, features, logits, done = None, [], [], 0
    for batch in tqdm(loader, desc=f"Features of {flag.split()[-1]}", leave=False):
        for index, entry in enumerate(batch, done):
            if entry is None:
                fail(f"{flag}: {images.name(index)} cannot be read; repair or remove it")
            size = size or entry[0]
            if entry[0] != size:
                sizes = f"{size[0]}x{size[1]} and {entry[0][0]}x{entry[0][1]}"
                remedy = "pass --reference_resolution" if flag.startswith("--reference") else "pass images of one size"
                fail(f"{flag} mixes sizes, {sizes} ({images.name(index)}); {remedy}")
        outputs, scores = extractor.run(torch.stack([pixels for _, pixels in batch]).float().to(device))
        outputs = outputs.float().cpu().numpy()
        if not np.isfinite(outputs).all():
            fail(f"{flag}: the features by {extractor.name} are not finite; pass an extractor for inputs in [0, 255]")
        exact = outputs.astype(np.float64)
        if not done:
            # Sums of squares around the first batch's mean stay exact where features are far from zero.
            origin, first, second = exact.mean(0), 0.0, 0.0
        exact = exact - origin
        first, second = first + exact.sum(0), second + exact.T @ exact
        features.append(outputs[kept[done : done + len(batch)]])
        if scores is not None:
            logits.append(scores.float().cpu().numpy())
        done += len(batch)
    if done < 2:
        fail(f"{flag} holds {done} image; pass at least 2, and for FID more than {len(origin)}")
    mean = first / done
    covariance = (second - done * np.outer(mean, mean)) / (done - 1)
    all_logits = np.concatenate(logits) if logits else None
    source = flag.split(" ", 1)[1]
    return Statistics(done, list(size), origin + mean, covariance, np.concatenate(features), all_logits, source)


# ------------------------------------------------------------------------------------------------------- the reference


def load_reference(extractor: Extractor, args: argparse.Namespace, device: torch.device) -> Statistics:
    """Read the statistics of `--reference`, or compute and save them."""
    source = args.reference
    if source.startswith("clean-fid:"):
        return load_published(source, extractor)
    if source.endswith(".npz"):
        return read_statistics(Path(source), extractor)
    if Path(source).is_dir():
        records = list_images(Path(source), "--reference")
        files = [[str(path.relative_to(source)), path.stat().st_size, path.stat().st_mtime_ns] for path in records]
        contents = hashlib.sha256(json.dumps(files).encode()).hexdigest()
    else:
        records, contents = load_dataset(args)
    key = {"reference": source, "contents": contents, "crop": args.reference_resolution}
    key |= {"extractor": extractor.digest, "size": extractor.size, "resize": "clean"}
    digest = hashlib.sha256(json.dumps({**key, "reference": ""}).encode()).hexdigest()
    path = args.statistics_dir / f"{Path(source).name}-{digest[:12]}.npz"
    if path.exists():
        return read_statistics(path, extractor)
    images = Images(records, extractor.size, args.reference_resolution)
    statistics = measure(images, extractor, f"--reference {source}", args, device)
    save_statistics(path, statistics, key)
    return statistics


def load_dataset(args: argparse.Namespace) -> "tuple[Column, str]":
    """The undecoded images of the dataset `--reference`, and a string that identifies its contents."""
    flag = f"--reference {args.reference}"
    try:
        dataset = datasets.load_dataset(args.reference, split=args.reference_split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        fail(f"{flag} is not a folder, and does not load as a dataset: {first_line(error)}; pass one of them")
    if args.image_column not in dataset.column_names:
        fail(f"--image_column {args.image_column} is not in the data; choose one of {', '.join(dataset.column_names)}")
    dataset = undecode(dataset, args.image_column)
    return Column(dataset, args.image_column), f"{dataset._fingerprint} {args.image_column}"


class Column:
    """One column of a dataset, as a sequence."""

    def __init__(self, dataset: datasets.Dataset, name: str):
        self.dataset, self.column = dataset, name

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict:
        return self.dataset[index][self.column]


def save_statistics(path: Path, statistics: Statistics, key: dict) -> None:
    """Write a .npz file completely or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
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
    print(f"statistics of {statistics.source} are kept in {path}", flush=True)


def read_statistics(path: Path, extractor: Extractor) -> Statistics:
    """Read a file of [`save_statistics`], or one with `mu` and `sigma` as clean-fid writes it.

    Ends the process if the features are those of another extractor.
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
    if key and (key["extractor"], key["size"]) != (extractor.digest, extractor.size):
        remedy = "pass the --features (or none) it was made with, or the images themselves"
        fail(f"--reference {path} holds features of another extractor than {extractor.name}; {remedy}")
    count = int(arrays.get("count", 0 if features is None else len(features)))
    size = arrays.get("size", np.array([])).tolist()
    return Statistics(count, size, mean, covariance, features, None, key.get("reference", str(path)))


def load_published(source: str, extractor: Extractor) -> Statistics:
    """Download statistics that clean-fid publishes, of features by its Inception."""
    parts = source.split(":")[1:]
    if len(parts) != 3:
        fail(f"--reference {source} is not clean-fid:NAME:RESOLUTION:SPLIT; pass e.g. clean-fid:cifar10:32:train")
    if extractor.size != 299:
        fail(f"--reference {source} holds features by Inception; drop --features")
    name, resolution, split = parts
    get = functools.partial(cleanfid.features.get_reference_statistics, name, resolution, split=split)
    try:
        mean, covariance = get(metric="FID")
        features = get(metric="KID")
    except (OSError, ValueError) as error:
        fail(f"--reference {source} cannot be downloaded: {first_line(error)}; pass a folder of the images")
    return Statistics(len(features), [], mean, covariance, features, None, source)


# --------------------------------------------------------------------------------------------------------- the metrics


def frechet_distance(
    mean_a: np.ndarray, covariance_a: np.ndarray, mean_b: np.ndarray, covariance_b: np.ndarray
) -> float:
    """Squared Fréchet distance between two Gaussians of means (D,) and covariances (D, D), in float64.

    It needs the trace of the matrix root of A · B. That is the sum of the square roots of the eigenvalues of
    root(A) · B · root(A), which is symmetric.
    """
    a, b = (torch.from_numpy(np.asarray(matrix, np.float64)) for matrix in (covariance_a, covariance_b))
    values, vectors = torch.linalg.eigh(a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ b @ root).clamp(min=0).sqrt().sum()
    shift = float(np.square(np.asarray(mean_a, np.float64) - np.asarray(mean_b, np.float64)).sum())
    return max(0.0, shift + (a.trace() + b.trace() - 2 * cross).item())


def kernel_inception_distance(features: np.ndarray, reference_features: np.ndarray, seed: int) -> float:
    """clean-fid's KID between features (N, D) and (M, D); the seed chooses its random subsets."""
    state = np.random.get_state()  # clean-fid uses the global generator
    np.random.seed(seed)
    distance = kernel_distance(features.astype(np.float64), reference_features.astype(np.float64))
    np.random.set_state(state)
    return distance


def compare(statistics: Statistics, reference: Statistics, args: argparse.Namespace) -> tuple[dict, list[str]]:
    """Compare a set of images with the reference.

    Returns:
        The metrics, `None` for those that cannot be computed, and remarks on them.
    """
    dimensions = len(reference.mean)
    fid, kid = ("FID", "KID") if args.features is None else ("Fréchet distance", "kernel distance")
    if len(statistics.mean) != dimensions:
        sizes = f"{dimensions} features, and the extractor {len(statistics.mean)}"
        fail(f"--reference {args.reference} has {sizes}; pass statistics of the same extractor")
    scores, remarks = dict.fromkeys(("fid", "kid", "inception_score", "precision", "recall")), []
    counts = {"images": statistics.count}
    if reference.features is not None:
        counts["reference images"] = reference.count
    short = [f"{count} {name}" for name, count in counts.items() if count <= dimensions]
    if short:
        # The covariance would be singular, and the distance would measure the number of images.
        remarks.append(f"no {fid}: {' and '.join(short)} are too few for a covariance of {dimensions} features")
    else:
        scores["fid"] = frechet_distance(statistics.mean, statistics.covariance, reference.mean, reference.covariance)
        few = [f"{count} {name}" for name, count in counts.items() if count < FEW]
        if few:
            remarks.append(f"{fid} on {' and '.join(few)}: fewer than {FEW:,} make it too high; {kid} is not affected")
    if reference.features is None:
        remarks.append(f"no {kid}, precision and recall: the reference's statistics come without features")
    else:
        scores["kid"] = kernel_inception_distance(statistics.features, reference.features, args.seed)
        if min(statistics.count, reference.count) > 3:
            pair = (torch.from_numpy(features).float() for features in (statistics.features, reference.features))
            values = prc_features_to_metric(*pair, prc_neighborhood=3, save_cpu_ram=True, verbose=False)
            scores |= {name: values[name] for name in ("precision", "recall")}
    if statistics.logits is not None and statistics.count >= 10:
        # torch-fidelity multiplies each probability by its logarithm, so 0 gives NaN. e⁻¹⁰⁰ does not change the score.
        logits = torch.from_numpy(statistics.logits).double().log_softmax(1).clamp(min=-100)
        values = isc_features_to_metric(logits, splits=10, rng_seed=args.seed)
        scores["inception_score"] = values["inception_score_mean"]
    return scores, remarks


@torch.no_grad()
def clip_score(files: list[Path], prompts: list[str], args: argparse.Namespace, device: torch.device) -> float:
    """Mean cosine between CLIP's embeddings of each image and of its prompt, number i modulo their count."""
    model, processor, tokenizer = load_clip(args.clip_model)
    model.to(device).eval()
    total = 0.0
    for start in tqdm(range(0, len(files), args.batch_size), desc="CLIP score", leave=False):
        batch = files[start : start + args.batch_size]
        images = [open_image({"path": str(path), "bytes": None}, "RGB") for path in batch]
        texts = [prompts[int(path.stem) % len(prompts)] for path in batch]
        limit = min(tokenizer.model_max_length, model.config.text_config.max_position_embeddings)
        tokens = tokenizer(texts, padding=True, truncation=True, max_length=limit, return_tensors="pt").to(device)
        pixels = processor(images=images, return_tensors="pt").to(device)
        image_features = model.get_image_features(**pixels).pooler_output
        text_features = model.get_text_features(**tokens).pooler_output
        total += torch.cosine_similarity(image_features.float(), text_features.float()).sum().item()
    return total / len(files)


@functools.cache
def load_clip(source: str) -> tuple[CLIPModel, CLIPImageProcessor, CLIPTokenizer]:
    """Load a CLIP folder or Hub id, once for all folders of images."""
    try:
        model = read_weights(CLIPModel.from_pretrained, source)
        return model, CLIPImageProcessor.from_pretrained(source), CLIPTokenizer.from_pretrained(source)
    except (OSError, ValueError, TypeError) as error:
        fail(f"--clip_model {source} does not load: {first_line(error)}; pass a CLIP folder or Hub id")


# --------------------------------------------------------------------------------------------------------- the results


# Tables of at most six columns: the folder's name and these.
TABLES = {
    "Distances and scores": ("images", "fid", "kid", "inception_score", "clip_score"),
    "Precision and recall": ("precision", "recall"),
    "Settings": ("sampler", "num_inference_steps", "guidance_scale", "seed", "dtype"),
}


def make_notes(results: dict) -> list[str]:
    """How the results were measured, and what to keep in mind."""
    reference, extractor = results["reference"], results["extractor"]
    count = f"{reference['images']:,} images" if reference["images"] else "published statistics"
    size = ", {} x {} pixels".format(*reference["size"]) if reference["size"] else ""
    notes = [
        f"Reference: {reference['source']}, {count}{size}.",
        f"Features: {extractor['name']}, SHA-256 {extractor['sha256'][:16]}…, {extractor['dimensions']} of them.",
    ]
    if not is_inception(results):
        notes.append("**Not Inception FID**: do not compare these distances with published figures.")
    if results["clip_model"]:
        notes.append(f"CLIP score: mean cosine by {results['clip_model']}.")
    return notes + list_remarks({row["name"]: row for row in results["rows"]})


def write_results(results: dict, output: Path) -> str:
    """Write OUTPUT.json and OUTPUT.md; returns the Markdown."""
    rows, parts = {row["name"]: row for row in results["rows"]}, []
    for title, keys in TABLES.items():
        table = make_table(rows, keys, is_inception(results))
        parts += [f"## {title}", as_markdown(table)] if table else []
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
    kept = ("sampler", "num_inference_steps", "guidance_scale", "seed", "dtype", "model", "contents", "pipeline")
    row = {key: manifest.get(key) for key in (*kept, "resolution", "resize", "versions")}
    return files, {"name": name, "folder": str(folder), **row}


def label_folders(folders: list[Path]) -> list[str]:
    """The shortest names that differ: the last parts of the paths."""
    for parts in range(1, max(len(folder.resolve().parts) for folder in folders) + 1):
        names = ["/".join(folder.resolve().parts[-parts:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    fail(f"--images {folders[0]} is passed twice; pass each folder once")


# ------------------------------------------------------------------------------------------------------------- the run


def main(args: argparse.Namespace) -> None:
    """Measure every folder and write the results."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check_writable(f"--output {args.output}", args.output.parent)
    check_writable(f"--statistics_dir {args.statistics_dir}", args.statistics_dir)
    described = [describe(folder, name) for folder, name in zip(args.images, label_folders(args.images))]
    if args.clip_model:
        prompted = [entry for entry in described if read_manifest(Path(entry[1]["folder"]), "--images").get("prompts")]
        if not prompted:
            fail(f"--clip_model {args.clip_model} needs prompts, and no folder has them in a manifest.json; drop it")
        for files, row in prompted:
            unnumbered = [path.name for path in files if not path.stem.isdecimal()]
            if unnumbered:
                problem = f"has prompts by number, and {unnumbered[0]} has no number"
                fail(f"--images {row['folder']} {problem}; rename or remove that")
    extractor = load_extractor(args, device)
    reference = load_reference(extractor, args, device)
    rows = []
    for files, row in described:
        statistics = measure(Images(files, extractor.size, None), extractor, f"--images {row['folder']}", args, device)
        if extractor.size is None and reference.size not in ([], statistics.size):
            sizes = (
                f"{statistics.size[0]}x{statistics.size[1]} and the reference {reference.size[0]}x{reference.size[1]}"
            )
            fail(f"--images {row['folder']} is {sizes}; pass --features_size or --reference_resolution")
        scores, remarks = compare(statistics, reference, args)
        prompts = read_manifest(Path(row["folder"]), "--images").get("prompts")
        scores["clip_score"] = clip_score(files, prompts, args, device) if args.clip_model and prompts else None
        rows.append({**row, "images": statistics.count, "size": statistics.size, **scores, "remarks": remarks})
    results = {
        "reference": {"source": reference.source, "images": reference.count, "size": reference.size},
        "extractor": {"name": extractor.name, "sha256": extractor.digest, "dimensions": len(reference.mean)},
        "clip_model": args.clip_model,
        "seed": args.seed,
        "versions": {library: version(library) for library in LIBRARIES},
        "rows": rows,
    }
    print(write_results(results, args.output))


if __name__ == "__main__":
    main(parse_args())
