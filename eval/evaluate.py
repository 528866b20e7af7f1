# Copyright 2026 The LIFT and PLACE distillation authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Measure folders of images against a reference, and print one table: FID, KID, Inception score, precision and recall,
CLIP score.

    python eval/evaluate.py --images teacher-images student-images --reference path/to/real/images --output results

writes results.json and results.md, with the settings from each folder's manifest.json (see generate.py).

The reference is a folder of images, a dataset of the Hub, statistics that an earlier run saved (.npz), or
clean-fid:NAME:RESOLUTION:SPLIT for those that clean-fid publishes. Statistics of a reference are computed once and
kept in --statistics_dir under a key of what they come from.

FID and KID are clean-fid's: its resizing, its Inception, its kernel; the Fréchet distance by a symmetric
eigendecomposition, which agrees with its matrix root. Inception score (10 splits), precision and recall (3 neighbours)
are torch-fidelity's functions, the CLIP score is the mean cosine between image and prompt.

--features swaps Inception for a TorchScript file: it takes float32 (N, 3, H, W) in [0, 255] and returns features
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
from typing import Any, NamedTuple

import cleanfid.downloads_helper
import cleanfid.features
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


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import lift_utils
from generate import read_manifest
from lift_utils import fail


INCEPTION = "inception-2015-12-05.pt"
KEPT = 50_000  # images, drawn at random, whose features are kept for KID, precision and recall; FID sees all
FEW = 10_000  # below so many samples FID is far above its limit, and more so for some models than for others
LIBRARIES = ("torch", "numpy", "pillow", "clean-fid", "torch-fidelity", "transformers")


class Extractor(NamedTuple):
    """What turns images into features."""

    name: str  # as reports show it
    digest: str  # SHA-256 of its file
    size: int | None  # to which images are brought; `None` leaves them
    run: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor | None]]  # float32 (N, 3, H, W) in [0, 255] to
    # features (N, D) and logits (N, classes)


class Statistics(NamedTuple):
    """What the metrics need of a set of images."""

    count: int  # 0 where unknown
    size: list[int]  # width and height; empty where unknown
    mean: np.ndarray  # float64 (D,)
    covariance: np.ndarray  # float64 (D, D)
    features: np.ndarray | None  # float32 (N, D) of up to KEPT images; published statistics may come without
    logits: np.ndarray | None  # float32 (N, classes)
    source: str


# ------------------------------------------------------------------------------------------------------- the arguments


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line, or `input_args`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=lift_utils.HelpFormatter)
    parser.add_argument("--images", required=True, nargs="+", type=Path, help="folders, a row of the table each")
    parser.add_argument("--reference", required=True, help="folder, dataset, .npz, or clean-fid:NAME:RESOLUTION:SPLIT")
    parser.add_argument("--reference_split", default="train", help="split of a dataset")
    parser.add_argument("--image_column", default="image", help="column of a dataset")
    parser.add_argument(
        "--reference_resolution", type=int, help="reduce the reference's shorter side to this and crop the centre"
    )
    parser.add_argument("--output", type=Path, default=Path("results"), help="writes OUTPUT.json and OUTPUT.md")
    parser.add_argument("--statistics_dir", type=Path, default=Path("statistics"), help="keeps the references'")
    parser.add_argument(
        "--inception", type=Path, help=f"where {INCEPTION} is or goes (default: torch's hub folder); must be trusted"
    )
    parser.add_argument("--features", type=Path, help="a TorchScript extractor instead; it runs code: trust it first")
    parser.add_argument("--features_size", type=int, help="side to which images are brought for it (default: as is)")
    parser.add_argument("--clip_model", help="CLIP folder or Hub id, for images with prompts in their manifest")
    parser.add_argument("--batch_size", type=int, default=32, help="images at a time")
    parser.add_argument("--num_workers", type=int, default=0, help="processes that decode and resize")
    parser.add_argument("--seed", type=int, default=0, help="of KID's and the Inception score's subsets")
    args = parser.parse_args(input_args)
    for name in ("batch_size", "features_size", "reference_resolution"):
        value = getattr(args, name)
        if value is not None and value < 1:
            fail(f"--{name} {value} is too small; pass at least 1")
    if args.features_size is not None and args.features is None:
        fail(f"--features_size {args.features_size} is for --features; Inception has a size of its own, drop the flag")
    return args


# ------------------------------------------------------------------------------------------------------- the extractor


def load_extractor(args: argparse.Namespace, device: torch.device) -> Extractor:
    """clean-fid's Inception, or the TorchScript file of `--features`."""
    if args.features is None:
        return load_inception(args.inception, device)
    model = load_torchscript("--features", args.features, device)

    def run(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        try:
            output = model(images)
        except RuntimeError as error:
            what = f"cannot take images of shape {tuple(images.shape[1:])}"
            fail(f"--features {args.features} {what}: {str(error).strip().splitlines()[-1]}; pass --features_size")
        features, logits = output if isinstance(output, tuple) else (output, None)
        for tensor in (features, logits):
            if tensor is not None and (tensor.ndim != 2 or len(tensor) != len(images)):
                shape = tuple(tensor.shape)
                fail(f"--features {args.features} returns {shape} for {len(images)} images; return (N, D)")
        return features, logits

    name = f"{args.features.name} at {args.features_size} px" if args.features_size else args.features.name
    return Extractor(name, lift_utils.hash_file(args.features), args.features_size, run)


def load_inception(path: Path | None, device: torch.device) -> Extractor:
    """The Inception that clean-fid takes features from, fetched once; its file also has the classifier's output."""
    path = path or Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION
    path = path / INCEPTION if path.is_dir() else path
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent) as folder:  # clean-fid takes half a file for a whole one
                shutil.move(cleanfid.downloads_helper.check_download_inception(folder), path)
        except OSError as error:
            url = cleanfid.downloads_helper.inception_url
            fail(f"--inception {path} is missing and cannot be fetched ({error}); put {url} there, or pass --features")
    base = load_torchscript("--inception", path, device)
    if path.name != INCEPTION:
        fail(f"--inception {path} must keep the name {INCEPTION}, under which clean-fid loads it; rename it")
    features = InceptionV3W(str(path.parent), download=False).to(device).eval()

    def run(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # The network's own output is probabilities; their logarithm is what softmax gives back. As published, without
        # the bias of the last layer.
        return features(images), base(images, no_output_bias=True).log()

    return Extractor("Inception (clean-fid)", lift_utils.hash_file(path), 299, run)


def load_torchscript(flag: str, path: Path, device: torch.device) -> torch.jit.ScriptModule:
    try:
        return torch.jit.load(str(path), map_location=device).eval()
    except (RuntimeError, ValueError, OSError) as error:
        fail(f"{flag} {path} does not load: {lift_utils.reason(error)}; pass a file of torch.jit.save")


# ---------------------------------------------------------------------------------------------------------- the images


class Images(torch.utils.data.Dataset):
    """Images as an extractor takes them, resized as clean-fid does it: float32 (3, H, W) in [0, 255].

    Args:
        records: Paths, or rows of `datasets` with an undecoded image.
        size: To which both sides are brought.
        crop: To which the shorter side is reduced before, and the longer one cropped.
    """

    def __init__(self, records, size: int | None, crop: int | None):
        self.records, self.size, self.crop = records, size, crop

    def __len__(self) -> int:
        return len(self.records)

    def open(self, index: int) -> Image.Image:
        record = self.records[index]
        record = {"path": str(record), "bytes": None} if isinstance(record, Path) else record
        image = lift_utils.open_image(record, "RGB")
        if self.crop is None:
            return image
        factor = self.crop / min(image.size)
        image = image.resize(tuple(round(side * factor) for side in image.size), Image.Resampling.BICUBIC)
        left, top = ((side - self.crop) // 2 for side in image.size)
        return image.crop((left, top, left + self.crop, top + self.crop))

    def __getitem__(self, index: int) -> tuple[tuple[int, int], torch.Tensor] | None:
        try:
            image = self.open(index)
        except Exception:  # decoders raise anything on damaged files
            return None
        # Made anew each time: a process that decodes images could not be handed the function.
        resize = make_resizer("PIL", False, "bicubic", (self.size, self.size)) if self.size else np.float32
        return image.size, torch.from_numpy(resize(np.array(image))).permute(2, 0, 1)

    def name(self, index: int) -> str:
        record = self.records[index]
        return str(record if isinstance(record, Path) else record["path"] or f"row {index}")


def list_images(folder: Path, flag: str) -> list[Path]:
    """The image files in a folder and below, in order."""
    if not folder.is_dir():
        fail(f"{flag} {folder} is no folder; pass a folder of images")
    suffixes = {f".{extension.lower()}" for extension in EXTENSIONS if extension != "npy"}
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in suffixes and path.name[0] != ".")
    if not files:
        fail(f"{flag} {folder} holds no images; pass a folder of images")
    return files


@torch.no_grad()
def measure(images: Images, extractor: Extractor, flag: str, args: argparse.Namespace, device) -> Statistics:
    """The statistics of a set of images, which must all be readable and of one size."""
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
                remedy = "pass --reference_resolution" if flag.startswith("--reference") else "keep to one size"
                fail(f"{flag} mixes sizes, {sizes} ({images.name(index)}); {remedy}")
        found, scores = extractor.run(torch.stack([pixels for _, pixels in batch]).float().to(device))
        found = found.float().cpu().numpy()
        if not np.isfinite(found).all():
            fail(f"{flag}: the features by {extractor.name} are not finite; pass an extractor for inputs in [0, 255]")
        exact = found.astype(np.float64)
        if not done:
            # Sums of squares around the first batch's mean lose no digits to the distance from zero.
            origin, first, second = exact.mean(0), 0.0, 0.0
        exact = exact - origin
        first, second = first + exact.sum(0), second + exact.T @ exact
        features.append(found[kept[done : done + len(batch)]])
        if scores is not None:
            logits.append(scores.float().cpu().numpy())
        done += len(batch)
    if done < 2:
        fail(f"{flag} holds {done} image; statistics need at least 2, and FID more than {len(origin)}")
    mean = first / done
    covariance = (second - done * np.outer(mean, mean)) / (done - 1)
    every = np.concatenate(logits) if logits else None
    source = flag.split(" ", 1)[1]
    return Statistics(done, list(size), origin + mean, covariance, np.concatenate(features), every, source)


# ------------------------------------------------------------------------------------------------------- the reference


def load_reference(extractor: Extractor, args: argparse.Namespace, device: torch.device) -> Statistics:
    """Statistics of `--reference`: read, or computed and kept."""
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


def load_dataset(args: argparse.Namespace) -> tuple[Any, str]:
    """The undecoded images of a dataset, and what tells its contents from others'."""
    import datasets

    flag = f"--reference {args.reference}"
    try:
        dataset = datasets.load_dataset(args.reference, split=args.reference_split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        fail(f"{flag} is no folder, and does not load as a dataset: {lift_utils.reason(error)}; pass one of them")
    if args.image_column not in dataset.column_names:
        fail(f"--image_column {args.image_column} is not in the data; choose one of {', '.join(dataset.column_names)}")
    dataset = lift_utils.leave_undecoded(dataset, args.image_column)
    return Column(dataset, args.image_column), f"{dataset._fingerprint} {args.image_column}"


class Column:
    """One column of a dataset, row by row."""

    def __init__(self, dataset, name: str):
        self.dataset, self.column = dataset, name

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict:
        return self.dataset[index][self.column]


def save_statistics(path: Path, statistics: Statistics, key: dict) -> None:
    """Write the file whole or not at all."""
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
    """What [`save_statistics`] wrote, or clean-fid's `mu` and `sigma`; other features are refused."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        mean, covariance = arrays["mu"], arrays["sigma"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        fail(f"--reference {path} cannot be read: {lift_utils.reason(error)}; pass a file that evaluate.py saved")
    key = json.loads(str(arrays["key"])) if "key" in arrays else {}
    if key and (key["extractor"], key["size"]) != (extractor.digest, extractor.size):
        remedy = "pass the --features (or none) it was made with, or the images themselves"
        fail(f"--reference {path} holds features of another extractor than {extractor.name}; {remedy}")
    features = arrays.get("feats")
    count = int(arrays.get("count", 0 if features is None else len(features)))
    size = arrays.get("size", np.array([])).tolist()
    return Statistics(count, size, mean, covariance, features, None, key.get("reference", str(path)))


def load_published(source: str, extractor: Extractor) -> Statistics:
    """Statistics that clean-fid publishes, of features by its Inception."""
    parts = source.split(":")[1:]
    if len(parts) != 3:
        fail(f"--reference {source} is unclear; pass clean-fid:NAME:RESOLUTION:SPLIT, e.g. clean-fid:cifar10:32:train")
    if extractor.size != 299:
        fail(f"--reference {source} holds features by Inception; drop --features")
    name, resolution, split = parts
    get = functools.partial(cleanfid.features.get_reference_statistics, name, resolution, split=split)
    try:
        mean, covariance = get(metric="FID")
        features = get(metric="KID")
    except (OSError, ValueError) as error:
        fail(f"--reference {source} cannot be fetched: {lift_utils.reason(error)}; pass a folder of the images")
    return Statistics(len(features), [], mean, covariance, features, None, source)


# --------------------------------------------------------------------------------------------------------- the metrics


def frechet_distance(
    mean_a: np.ndarray, covariance_a: np.ndarray, mean_b: np.ndarray, covariance_b: np.ndarray
) -> float:
    """Squared Fréchet distance between two Gaussians of means (D,) and covariances (D, D), in float64.

    The trace of the matrix root of A · B is the sum of the roots of the eigenvalues of the symmetric
    root(A) · B · root(A).
    """
    a, b = (torch.from_numpy(np.asarray(matrix, np.float64)) for matrix in (covariance_a, covariance_b))
    values, vectors = torch.linalg.eigh(a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ b @ root).clamp(min=0).sqrt().sum()
    shift = float(np.square(np.asarray(mean_a, np.float64) - np.asarray(mean_b, np.float64)).sum())
    return max(0.0, shift + (a.trace() + b.trace() - 2 * cross).item())


def kernel_inception_distance(ours: np.ndarray, theirs: np.ndarray, seed: int) -> float:
    """clean-fid's KID, over the random subsets that the seed fixes."""
    state = np.random.get_state()  # clean-fid draws from the global generator
    np.random.seed(seed)
    distance = kernel_distance(ours.astype(np.float64), theirs.astype(np.float64))
    np.random.set_state(state)
    return distance


def compare(ours: Statistics, reference: Statistics, args: argparse.Namespace) -> tuple[dict, list[str]]:
    """The metrics of a set of images, `None` where one cannot be had, and remarks on them."""
    dimensions = len(reference.mean)
    fid, kid = ("FID", "KID") if args.features is None else ("Fréchet distance", "kernel distance")
    if len(ours.mean) != dimensions:
        fail(
            f"--reference {args.reference} has {dimensions} features and the extractor {len(ours.mean)}; pass its own"
        )
    scores, remarks = dict.fromkeys(("fid", "kid", "inception_score", "precision", "recall")), []
    counts = {"images": ours.count}
    if reference.features is not None:
        counts["reference images"] = reference.count
    short = [f"{count} {name}" for name, count in counts.items() if count <= dimensions]
    if short:
        # Their covariance is singular: the distance would measure the count.
        remarks.append(f"no {fid}: {' and '.join(short)} are too few for a covariance of {dimensions} features")
    else:
        scores["fid"] = frechet_distance(ours.mean, ours.covariance, reference.mean, reference.covariance)
        few = [f"{count} {name}" for name, count in counts.items() if count < FEW]
        if few:
            remarks.append(f"{fid} on {' and '.join(few)}: fewer than {FEW:,} bias it upwards, go by {kid}")
    if reference.features is None:
        remarks.append(f"no {kid}, precision and recall: the reference's statistics come without features")
    else:
        scores["kid"] = kernel_inception_distance(ours.features, reference.features, args.seed)
        if min(ours.count, reference.count) > 3:
            pair = (torch.from_numpy(features).float() for features in (ours.features, reference.features))
            found = prc_features_to_metric(*pair, prc_neighborhood=3, save_cpu_ram=True, verbose=False)
            scores |= {"precision": found["precision"], "recall": found["recall"]}
    if ours.logits is not None and ours.count >= 10:
        # torch-fidelity multiplies a probability of 0 by its logarithm; e⁻¹⁰⁰ is 0 to the score.
        logits = torch.from_numpy(ours.logits).double().log_softmax(1).clamp(min=-100)
        found = isc_features_to_metric(logits, splits=10, rng_seed=args.seed)
        scores["inception_score"] = found["inception_score_mean"]
    return scores, remarks


@torch.no_grad()
def clip_score(files: list[Path], prompts: list[str], args: argparse.Namespace, device: torch.device) -> float:
    """Mean cosine between CLIP's embeddings of each image and of its prompt."""
    from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

    model, processor, tokenizer = load_clip(args.clip_model, CLIPModel, CLIPImageProcessor, CLIPTokenizer)
    model.to(device).eval()
    total = 0.0
    for start in tqdm(range(0, len(files), args.batch_size), desc="CLIP score", leave=False):
        batch = files[start : start + args.batch_size]
        images = [lift_utils.open_image({"path": str(path), "bytes": None}, "RGB") for path in batch]
        texts = [prompts[int(path.stem) % len(prompts)] for path in batch]
        limit = min(tokenizer.model_max_length, model.config.text_config.max_position_embeddings)
        tokens = tokenizer(texts, padding=True, truncation=True, max_length=limit, return_tensors="pt").to(device)
        pixels = processor(images=images, return_tensors="pt").to(device)
        ours = model.get_image_features(**pixels).pooler_output
        theirs = model.get_text_features(**tokens).pooler_output
        total += torch.cosine_similarity(ours.float(), theirs.float()).sum().item()
    return total / len(files)


@functools.cache
def load_clip(source: str, *kinds) -> list:
    """CLIP's parts, loaded once for all folders."""
    try:
        options = [{"use_safetensors": True}, {}, {}]
        return [kind.from_pretrained(source, **option) for kind, option in zip(kinds, options)]
    except (OSError, ValueError, TypeError) as error:
        fail(f"--clip_model {source} does not load: {lift_utils.reason(error)}; pass a CLIP folder or Hub id")


# ---------------------------------------------------------------------------------------------------------- the report


COLUMNS = {  # title and format of a result, and what it is multiplied by
    "images": ("images", ",", 1),
    "fid": ("FID", ".2f", 1),
    "kid": ("KID · 10³", ".4g", 1000),
    "inception_score": ("IS", ".2f", 1),
    "precision": ("precision", ".3f", 1),
    "recall": ("recall", ".3f", 1),
    "clip_score": ("CLIP", ".4f", 1),
    "sampler": ("sampler", "", 1),
    "num_inference_steps": ("steps", "", 1),
    "guidance_scale": ("guidance", "", 1),
    "seed": ("seed", "", 1),
    "dtype": ("dtype", "", 1),
}


def title_of(key: str, inception: bool) -> str:
    """A column's title; only features by Inception give an FID, a KID and an Inception score."""
    others = {"fid": "Fréchet distance", "kid": "kernel distance · 10³", "inception_score": "score"}
    return COLUMNS[key][0] if inception else others.get(key, COLUMNS[key][0])


def make_table(results: dict) -> str:
    """A Markdown table, a line per folder; columns without a value are left out."""
    rows, inception = results["rows"], results["extractor"]["name"].startswith("Inception")
    shown = [key for key in COLUMNS if any(row.get(key) is not None for row in rows)]
    lines = ["| | " + " | ".join(title_of(key, inception) for key in shown) + " |"]
    lines.append("|---|" + "--:|" * len(shown))
    for row in rows:
        lines.append(f"| {row['name']} | {' | '.join(format_cell(key, row.get(key)) for key in shown)} |")
    return "\n".join(lines)


def format_cell(key: str, value: Any) -> str:
    """A result as its column shows it."""
    _, style, factor = COLUMNS[key]
    return "–" if value is None else f"{value * factor if style else value:{style}}"


def make_notes(results: dict) -> list[str]:
    """What the table was measured with, and what to mind in it."""
    reference, extractor = results["reference"], results["extractor"]
    count = f"{reference['images']:,} images" if reference["images"] else "published statistics"
    notes = [
        f"Reference: {reference['source']}, {count}"
        + (f", {reference['size'][0]} x {reference['size'][1]} pixels." if reference["size"] else "."),
        f"Features: {extractor['name']}, SHA-256 {extractor['sha256'][:16]}…, {extractor['dimensions']} of them.",
    ]
    if not extractor["name"].startswith("Inception"):
        notes.append("**No Inception FID**: these figures compare with no published ones.")
    if results["clip_model"]:
        notes.append(f"CLIP score: mean cosine by {results['clip_model']}.")
    return notes + list_remarks({row["name"]: row for row in results["rows"]})


def list_remarks(rows: dict[str, dict]) -> list[str]:
    """Each remark once, after the names of the rows that it is on."""
    names: dict[str, list[str]] = {}
    for name, row in rows.items():
        for remark in row["remarks"]:
            names.setdefault(remark, []).append(name)
    return [f"{', '.join(those)}: {remark}." for remark, those in names.items()]


def write_results(results: dict, output: Path) -> str:
    """OUTPUT.json and OUTPUT.md; returns the Markdown."""
    text = make_table(results) + "\n\n" + "\n".join(f"- {note}" for note in make_notes(results)) + "\n"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_name(f"{output.name}.json").write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    output.with_name(f"{output.name}.md").write_text(text)
    return text


def describe(folder: Path, name: str) -> tuple[list[Path], dict]:
    """The folder's images, and what its manifest says of them; it must be complete."""
    files, manifest = list_images(folder, "--images"), read_manifest(folder)
    if manifest and len(files) < manifest["num_images"]:
        counts = f"{len(files)} of the {manifest['num_images']} images of its manifest"
        fail(f"--images {folder} holds {counts}; run its generate.py command again to finish it")
    kept = ("sampler", "num_inference_steps", "guidance_scale", "seed", "dtype", "model", "contents", "pipeline")
    row = {key: manifest.get(key) for key in (*kept, "resolution", "resize", "versions")}
    return files, {"name": name, "folder": str(folder), **row}


def label_folders(folders: list[Path]) -> list[str]:
    """Names as short as they can be and differ."""
    for parts in range(1, max(len(folder.resolve().parts) for folder in folders) + 1):
        names = ["/".join(folder.resolve().parts[-parts:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    fail(f"--images {folders[0]} is passed twice; pass each folder once")


# ------------------------------------------------------------------------------------------------------------- the run


def main(args: argparse.Namespace) -> None:
    """Measure every folder and write the table."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    described = [describe(folder, name) for folder, name in zip(args.images, label_folders(args.images))]
    if args.clip_model and not any(read_manifest(folder).get("prompts") for folder in args.images):
        fail(f"--clip_model {args.clip_model} needs prompts, and no folder has them in a manifest.json; drop it")
    extractor = load_extractor(args, device)
    reference = load_reference(extractor, args, device)
    rows = []
    for files, row in described:
        ours = measure(Images(files, extractor.size, None), extractor, f"--images {row['folder']}", args, device)
        if extractor.size is None and reference.size not in ([], ours.size):
            sizes = f"{ours.size[0]}x{ours.size[1]} and the reference {reference.size[0]}x{reference.size[1]}"
            fail(f"--images {row['folder']} is {sizes}; pass --features_size or --reference_resolution")
        scores, remarks = compare(ours, reference, args)
        prompts = read_manifest(Path(row["folder"])).get("prompts")
        scores["clip_score"] = clip_score(files, prompts, args, device) if args.clip_model and prompts else None
        rows.append({**row, "images": ours.count, "size": ours.size, **scores, "remarks": remarks})
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
