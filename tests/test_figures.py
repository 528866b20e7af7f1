"""The figures of eval/evaluate.py in features of DINOv2 and CLIP, and what is said of each.

tests/golden/figures.json has what the code of their authors gives for the same images and the same small models.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPConfig,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    PreTrainedModel,
)

import evaluate
import figures
import networks
import report
import result_tables


GOLDEN = json.loads((ROOT / "tests" / "golden" / "figures.json").read_text())
SMALL = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}


def fill(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """Give a model weights that NumPy's generator makes again anywhere."""
    random = np.random.default_rng(seed)
    for weight in model.parameters():
        weight.data = torch.from_numpy(random.normal(0, 0.6, weight.shape)).float()
    return model


def save_dinov2(folder: Path) -> Path:
    """A small DINOv2 with the patches and the positions of the published ones."""
    config = Dinov2Config(**SMALL, mlp_ratio=4, image_size=518, patch_size=14, use_mask_token=False)
    fill(Dinov2Model(config), 0).save_pretrained(folder)
    return folder


def save_clip(folder: Path) -> Path:
    """A small CLIP model, without tokenizer and image processor."""
    shape = {**SMALL, "intermediate_size": 24}
    ends = {"bos_token_id": 98, "eos_token_id": 99, "pad_token_id": 99}
    text = {**shape, **ends, "vocab_size": 100, "max_position_embeddings": 24}
    vision = {**shape, "image_size": 56, "patch_size": 14}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    fill(CLIPModel(config), 1).save_pretrained(folder)
    return folder


def draw(folder: Path, seed: int, low: int, high: int) -> Path:
    """60 images of noise, 48 pixels wide and 40 high."""
    folder.mkdir()
    random = np.random.default_rng(seed)
    for index in range(60):
        pixels = random.integers(low, high, (5, 6, 3)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:06d}.png")
    return folder


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Two folders of images, and small models."""
    root = tmp_path_factory.mktemp("figures")
    models = {"dinov2": save_dinov2(root / "dinov2"), "clip": save_clip(root / "clip")}
    return {"a": draw(root / "a", 0, 0, 200), "b": draw(root / "b", 1, 60, 256), **models}


@pytest.fixture
def score(tmp_path):
    """`score(*flags)` runs evaluate.py and returns its results, and results["text"], the Markdown."""

    def evaluate_into(*flags) -> dict:
        command = ["--output", tmp_path / "results", "--statistics_dir", tmp_path / "statistics", *flags]
        evaluate.main(evaluate.parse_args([str(part) for part in command]))
        results = json.loads((tmp_path / "results.json").read_text())
        return {**results, "text": (tmp_path / "results.md").read_text()}

    return evaluate_into


# -------------------------------------------------------------------------------------- what their authors' code gives


def test_fd_dinov2_is_that_of_dgm_eval(score, folders):
    """From files to the distance: preparation, position embeddings, features, distance."""
    flags = ("--metrics", "fd_dinov2", "--dinov2_model", folders["dinov2"])
    results = score("--images", folders["a"], "--reference", folders["b"], *flags, "--batch_size", 16)
    assert results["rows"][0]["fd_dinov2"] == pytest.approx(GOLDEN["fd_dinov2"], rel=1e-4)
    (network,) = results["networks"]
    assert network["dimensions"] == 12 and network["name"] == f"DINOv2 ({folders['dinov2']})"


def test_cmmd_is_that_of_its_authors(score, folders):
    """From files to the distance: the square at the centre, embeddings, distance."""
    flags = ("--metrics", "cmmd", "--cmmd_model", folders["clip"])
    results = score("--images", folders["a"], "--reference", folders["b"], *flags, "--num_workers", 1)
    assert results["rows"][0]["cmmd"] == pytest.approx(GOLDEN["cmmd"], abs=1e-5)


@pytest.mark.parametrize("block", [7, 512])
def test_cmmd_of_random_embeddings(monkeypatch, block):
    """In blocks of any size; and its bias, the difference from the mean without an image's pair with itself."""
    monkeypatch.setattr(figures, "BLOCK", block)
    random = np.random.default_rng(2)
    a, b = random.normal(size=(300, 16)), random.normal(size=(200, 16)) + 0.3
    a, b = (part / np.linalg.norm(part, axis=1, keepdims=True) for part in (a, b))
    value, bias = figures.clip_mmd(a.astype(np.float32), b.astype(np.float32), torch.device("cpu"))
    assert value == pytest.approx(GOLDEN["random_cmmd"], abs=1e-5)

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return np.exp(-np.square(x[:, None] - y[None]).sum(-1) / 200)

    unbiased = sum((kernel(x, x).sum() - len(x)) / len(x) / (len(x) - 1) for x in (a, b)) - 2 * kernel(a, b).mean()
    assert value - bias == pytest.approx(1000 * unbiased, abs=1e-5) and bias > 0.01


# ------------------------------------------------------------------------------------------ the table and its warnings


def test_each_network_has_statistics_of_its_own(score, folders, tmp_path):
    """One table; one file per network, used again; statistics of one network are not those of another."""
    models = ("--dinov2_model", folders["dinov2"], "--cmmd_model", folders["clip"])
    flags = ("--images", folders["a"], folders["b"], *models, "--metrics", "cmmd", "fd_dinov2", "--reference")
    first = score(*flags, folders["b"])
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "statistics").iterdir()}
    again = score(*flags, folders["b"])
    assert len(kept) == 2 and again["rows"] == first["rows"]
    assert kept == {path: path.stat().st_mtime_ns for path in (tmp_path / "statistics").iterdir()}
    table = [line.split(" | ") for line in first["text"].splitlines() if line.startswith("| FD") or "CMMD" in line]
    assert [row[0] for row in table[:4]] == ["| FD-DINOv2", "| FD-DINOv2", "| CMMD", "| CMMD"]
    assert [row[1] for row in table[:4]] == ["a", "b", "a", "b"] and table[0][3:5] == ["60", "60"]
    a, b = first["rows"]
    assert a["warnings"]["fd_dinov2"] == "fewer than 10,000 images make it too high" and a["samples"]["cmmd"] == [
        60,
        60,
    ]
    assert b["fd_dinov2"] == pytest.approx(0, abs=1e-6) and b["cmmd"] == pytest.approx(0, abs=1e-5)
    assert b["fid"] is None and first["extractor"] is None and "Not Inception" not in first["text"]

    digests = {network["metrics"][0]: network["sha256"] for network in first["networks"]}
    (own,) = [path for path in kept if json.loads(str(np.load(path)["key"]))["extractor"] == digests["fd_dinov2"]]
    (row,) = score("--images", folders["a"], *models[:2], "--metrics", "fd_dinov2", "--reference", own)["rows"]
    assert row["fd_dinov2"] == pytest.approx(a["fd_dinov2"])
    with pytest.raises(SystemExit, match="features of another network than CLIP"):
        score("--images", folders["a"], *models[2:], "--metrics", "cmmd", "--reference", own)


def make_statistics(count: int, kept: int | None = None) -> figures.Statistics:
    """Of `count` images with three features, of which `kept` are at hand."""
    features = np.random.default_rng(count).normal(size=(kept or count, 3)).astype(np.float32)
    mean, covariance = features.mean(0).astype(float), np.cov(features.T)
    return figures.Statistics(count, [], mean, covariance, features, np.zeros((kept or count, 2), np.float32), "a")


def test_warnings_say_what_a_number_of_images_does(monkeypatch):
    few, many = make_statistics(200), make_statistics(20_000, 500)
    assert figures.measure_frechet(few, many).warning == "fewer than 10,000 images make it too high"
    assert figures.measure_frechet(many, many)[1:] == (20_000, 20_000, None)
    lacking = figures.measure_frechet(make_statistics(3, 50), many)
    assert lacking.value is None and "too few images for a covariance of 3 features" in lacking.warning
    # The number of images of a mean and a covariance from elsewhere is not known.
    foreign = many._replace(count=0, features=None)
    assert figures.measure_frechet(many, foreign)[1:] == (20_000, None, None)
    assert "come without features" in figures.measure_kernel(few, foreign, 0).warning
    assert "come without features" in figures.measure_clip_mmd(few, foreign, torch.device("cpu")).warning
    assert "come without features" in figures.measure_manifolds(few, foreign)["recall"].warning
    assert "fewer than 1,000 images, the size" in figures.measure_kernel(few, many, 0).warning
    monkeypatch.setattr(figures, "KID_SUBSET", 200)
    assert figures.measure_kernel(few, many, 0)[1:] == (200, 500, None)
    assert "sets as large" in figures.measure_manifolds(few, many)["precision"].warning
    assert figures.measure_manifolds(make_statistics(3), many)["precision"].value is None
    far = [own._replace(features=own.features + 3000, mean=own.mean + 3000) for own in (few, many)]
    for name in ("precision", "recall"):  # distances do not depend on where the origin is
        value = figures.measure_manifolds(few, many)[name].value
        assert figures.measure_manifolds(*far)[name].value == pytest.approx(value, abs=0.01) and 0 < value < 1
    assert figures.measure_inception_score(few, 0).warning == "fewer than 50,000 images make it too low"
    assert figures.measure_inception_score(make_statistics(9), 0).value is None
    assert "returns no logits" in figures.measure_inception_score(few._replace(logits=None), 0).warning
    assert figures.average_scores(np.linspace(0, 1, 1000)) == figures.Figure(0.5, 1000)
    assert "standard error 0.5" in figures.average_scores(np.array([0.0, 1.0])).warning


def test_cmmd_warns_of_its_bias_alone():
    """Between sets of one distribution it is all there is, on average; between different ones it is a small part."""
    random, device = np.random.default_rng(0), torch.device("cpu")
    pairs = random.normal(size=(40, 2, 50, 3)).astype(np.float32)
    distances, biases = np.mean([figures.clip_mmd(*pair, device) for pair in pairs], axis=0)
    assert distances == pytest.approx(biases, rel=0.2) and biases > 0.5
    first, second = (make_statistics(50)._replace(features=features) for features in pairs[0])
    assert figures.measure_clip_mmd(first, second, device).warning.startswith("so few images raise it by about")
    other = second._replace(features=second.features + 10)
    assert figures.measure_clip_mmd(first, other, device)[1:] == (50, 50, None)


def test_the_report_shows_figures_of_other_networks():
    fact = {"parameters": 10, "macs": 10, "seconds": 1.0, "bytes": 10}
    measured = {"images": 60, "fd_dinov2": 123.456, "cmmd": 0.5, "pickscore": 20.25}
    tables = result_tables.make_tables({"teacher": fact}, {"teacher": measured}, inception=True)
    assert tables[3] == [["model", "FD-DINOv2", "CMMD", "PickScore"], ["teacher", "123.46", "0.5000", "20.250"]]
    assert len(result_tables.make_tables({"teacher": fact}, {}, inception=True)) == 3
    results = {"extractor": None, "reference": {"source": "real", "images": 60}}
    assert report.quality_notes({}, results) == ["Distances: to 60 images (real)."]
    assert report.quality_notes({}, {**results, "reference": None}) == []


# -------------------------------------------------------------------------------------------------------- unfit models


def test_a_model_with_a_missing_weight_is_refused(folders, tmp_path):
    """transformers would make one up."""
    folder = shutil.copytree(folders["dinov2"], tmp_path / "dinov2")
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("fc1.bias"))
    save_file({key: weight for key, weight in weights.items() if key != name}, folder / "model.safetensors")
    with pytest.raises(
        SystemExit, match=r"^error: --dinov2_model \S+ lacks the weights \S*fc1.bias .*; pass a folder"
    ):
        networks.load_dinov2(str(folder), torch.device("cpu"))


def test_features_that_are_not_finite_are_refused(score, folders, tmp_path):
    folder = shutil.copytree(folders["dinov2"], tmp_path / "dinov2")
    weights = load_file(folder / "model.safetensors")
    save_file({name: weight * float("nan") for name, weight in weights.items()}, folder / "model.safetensors")
    flags = ("--images", folders["a"], "--reference", folders["b"], "--metrics", "fd_dinov2")
    with pytest.raises(SystemExit, match=r"^error: --reference \S+: the features by DINOv2 .* are not finite; pass"):
        score(*flags, "--dinov2_model", folder)


def test_a_damaged_image_is_named(score, folders, tmp_path):
    """For figures of the images alone, too."""
    images = shutil.copytree(folders["a"], tmp_path / "images")
    (images / "000007.png").write_bytes((images / "000007.png").read_bytes()[:60])
    flags = ("--reference", folders["b"], "--metrics", "cmmd", "--cmmd_model", folders["clip"])
    with pytest.raises(SystemExit, match=r"^error: --images \S+: \S+000007.png cannot be read; repair or remove it"):
        score("--images", images, *flags)
