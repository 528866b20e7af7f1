"""The figures of eval/evaluate.py in features of DINOv2 and CLIP, and what is said of each.

tests/golden/figures.json has what the code of their authors gives for the same images and the same small models.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    PreTrainedModel,
)

import evaluate
import figures


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


@pytest.mark.parametrize("block", [7, 2048])
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
