"""demos/: small models of Fashion-MNIST and the demos made of them, with a budget of a few steps."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from diffusers import AutoencoderKL, StableDiffusion3Pipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPImageProcessor, CLIPModel, CLIPTextModel, CLIPTextModelWithProjection

import demo
import fashion
import fashion_dit
import fashion_sd3
import fashion_sd21
import fashion_sdxl
import small_models
from result_tables import as_markdown, tables_from_files


@pytest.fixture(scope="module")
def data() -> tuple[np.ndarray, np.ndarray]:
    """The first 300 images, uint8 (300, 28, 28), and their labels."""
    images, labels = fashion.read_fashion_mnist(fashion.find_fashion_mnist(ROOT / ".data"), "train")
    return images[:300], labels[:300]


@pytest.fixture(scope="module")
def words(data) -> tuple[list[str], object]:
    """The images' captions and a tokenizer of their words."""
    captions = [fashion.caption(label, image) for label, image in zip(data[1], data[0])]
    return captions, small_models.make_tokenizer(sorted({word for text in captions for word in text.split()}), 24)


def stamp(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in sorted(folder.rglob("*.safetensors"))}


def error_of(vae, images: np.ndarray) -> float:
    return np.square(small_models.reconstruct(vae, images) / 255 - images / 255).mean().item()


# ----------------------------------------------------------------------------------------------------------- the parts


def test_captions_describe_the_images(data, tmp_path):
    images, labels = data
    folder = fashion.write_captioned(tmp_path / "images", images[:40], labels[:40])
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    for number, line in enumerate(lines):
        pixels = np.array(Image.open(folder / line["file_name"]))
        assert pixels.shape == (32, 32, 3) and np.array_equal(pixels[2:-2, 2:-2, 0], images[number])
        name, bright = fashion.CLASSES[labels[number]], images[number][images[number] > 32].mean() > 150
        assert line["text"] == f"a photo of a {'bright' if bright else 'dark'} {name}"
    assert len(lines) == 40 and len({line["text"] for line in lines}) > 8


def test_autoencoder_learns_and_is_reused(data, tmp_path):
    images = fashion.pad(data[0])
    early = small_models.train_autoencoder(tmp_path / "early", images, steps=2)
    vae = small_models.train_autoencoder(tmp_path / "vae", images, steps=60)
    assert error_of(vae, images[:50]) < 0.6 * error_of(early, images[:50])
    with torch.no_grad():
        latents = vae.encode(small_models.as_inputs(images)).latent_dist.sample() * vae.config.scaling_factor
    assert latents.shape == (300, 16, 8, 8)
    assert latents.std().item() == pytest.approx(1, abs=0.02)
    assert latents.mean((0, 2, 3)).abs().max() < 0.02

    before = stamp(tmp_path)
    again = small_models.train_autoencoder(tmp_path / "vae", images, steps=60)
    assert stamp(tmp_path) == before and error_of(again, images) == error_of(vae, images)
    loaded = AutoencoderKL.from_pretrained(tmp_path / "vae")
    assert loaded.config.scaling_factor == vae.config.scaling_factor != 0.18215


def test_centring_the_latents_changes_no_picture(data):
    torch.manual_seed(0)
    options = {"block_out_channels": [8, 8], "norm_num_groups": 4}
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2, **options
    ).eval()
    inputs = small_models.as_inputs(fashion.pad(data[0][:20]))
    with torch.no_grad():
        before = vae.decode(vae.encode(inputs).latent_dist.mode()).sample
        assert vae.encode(inputs).latent_dist.mean.mean((0, 2, 3)).abs().max() > 0.05
        small_models.centre_latents(vae, inputs)
        after = vae.decode(vae.encode(inputs).latent_dist.mode()).sample
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)


def test_clip_learns_and_is_reused(data, words, tmp_path):
    captions, tokenizer = words
    images = fashion.pad(data[0])
    train = partial(small_models.train_clip, images=images, captions=captions, tokenizer=tokenizer, width=32)
    short, folder = train(tmp_path / "short", steps=1), train(tmp_path / "clip", steps=60)
    ids = tokenizer(fashion.PROMPTS, padding="max_length", max_length=24, return_tensors="pt")["input_ids"]
    processor = CLIPImageProcessor.from_pretrained(folder)
    pixels = processor(images=[Image.fromarray(image).convert("RGB") for image in images], return_tensors="pt")
    torch.testing.assert_close(pixels["pixel_values"], small_models.as_inputs(images), atol=1e-5, rtol=0)

    @torch.no_grad()
    def accuracy(model) -> float:
        """The share of images that are nearer to their own prompt than to the nineteen others."""
        nearest = CLIPModel.from_pretrained(model).eval()(input_ids=ids, **pixels).logits_per_image.argmax(-1)
        return np.mean([fashion.PROMPTS[number] == text for number, text in zip(nearest, captions)])

    assert accuracy(folder) > 0.25 > accuracy(short)
    for kind in (CLIPTextModel, CLIPTextModelWithProjection):  # for the pipelines, with the trained weights
        part, clip = kind.from_pretrained(folder).state_dict(), CLIPModel.from_pretrained(folder).state_dict()
        assert part and all(any(torch.equal(value, other) for other in clip.values()) for value in part.values())
    before = stamp(tmp_path)
    train(folder, steps=60)
    assert stamp(tmp_path) == before


def test_classifier_learns_and_is_reused(data, tmp_path):
    images, labels = fashion.pad(data[0]), data[1]
    classifier = small_models.train_classifier(tmp_path / "classifier.pt", images, labels, steps=60)
    features, logits = classifier(torch.from_numpy(images).float().unsqueeze(1).expand(-1, 3, -1, -1))
    assert features.shape == (300, small_models.FEATURES) and logits.shape == (300, 10)
    right = (logits.argmax(-1).numpy() == labels).mean()
    assert small_models.accuracy(classifier, images, labels) == right > 0.6
    assert features.std(0).mean().item() == pytest.approx(1, abs=0.3)
    again = small_models.train_classifier(tmp_path / "classifier.pt", images, labels, steps=60)
    assert torch.equal(again(torch.from_numpy(images).float().unsqueeze(1))[0], features)


def test_images_in_turn():
    order = fashion.in_turn(["b", "a", "b", "a", "c", "a"], ["a", "b"], 2)
    assert order.tolist() == [1, 0, 3, 2]
    assert len(set(fashion.PROMPTS)) == 20
    for number in range(11):
        assert {text.split(maxsplit=5)[5] for text in fashion.PROMPTS[number : number + 10]} == set(fashion.CLASSES)


# ----------------------------------------------------------------------------------------------------------- the demos


@pytest.fixture
def make_demo(in_process, costs_here, tmp_path, monkeypatch):
    """`make_demo(module, *flags)` makes a demo of a few steps, without processes of their own; returns its folder."""
    monkeypatch.setattr(small_models, "train_classifier", partial(small_models.train_classifier, steps=40))
    monkeypatch.setattr(demo.signal, "signal", lambda *arguments: None)
    for module in (fashion_sd21, fashion_dit):
        monkeypatch.setattr(module, "REFERENCE", 20)
        monkeypatch.setattr(module, "REAL", 10)

    def make(module, *flags) -> Path:
        command = ["--output_dir", tmp_path / "demo", "--teacher_steps", 2, "--student_steps", 2, "--samples", 64]
        command += ["--inference_steps", 2, "--threads", 1, *flags]
        demo.main(module.parse_args([str(flag) for flag in command]), module.run)
        return tmp_path / "demo"

    return make


def read_tables(folder: Path) -> dict[str, dict[str, str]]:
    """The cells of the tables of results.md by row and column; all tables must have at most six columns."""
    tables, cells = tables_from_files(folder / "report.json", folder / "quality.json"), {}
    text = (folder / "results.md").read_text()
    for table in tables:
        assert as_markdown(table) in text and len(table[0]) <= 6
        for row in table[1:]:
            cells.setdefault(row[0], {}).update(zip(table[0][1:], row[1:]))
    return cells


def check_demo(folder: Path, names: list[str]) -> dict[str, dict[str, str]]:
    """Check what all demos write; returns the first table of results.md by row and column."""
    table = read_tables(folder)
    assert list(table) == names
    for name in names:
        assert np.isfinite(float(table[name]["Fréchet distance"]))
    assert float(table["real"]["Fréchet distance"]) < float(table["teacher"]["Fréchet distance"])
    assert table["teacher"]["quality"].endswith(" real images")
    assert all(table[name]["quality"].endswith(" the teacher") for name in names[names.index("teacher") + 1 :])
    text = (folder / "results.md").read_text()
    assert "not Inception FID" in text and "- budget: teacher 2 steps, students 2 steps" in text
    for name in ("samples", "curves", "errors", "groups"):
        assert f"]({name}.png)" in text and Image.open(folder / f"{name}.png").width > 300
    assert (folder / "index.html").read_text().count("data:image/png") == 4
    return table


def test_stable_diffusion_from_nothing_and_again(make_demo, in_process, monkeypatch):
    """A few steps of everything; the second call has nothing to do."""
    monkeypatch.setattr(fashion_sd21, "IMAGES", 96)
    monkeypatch.setattr(fashion_sd21, "METHODS", ("place",))
    monkeypatch.setattr(fashion_sd21, "STUDENTS", ("bk_extreme",))
    small = ("--autoencoder_steps", 2, "--clip_steps", 2)
    folder = make_demo(fashion_sd21, *small)
    assert [Path(flags[1]).name for flags in in_process] == ["teacher", "bk_extreme-place-0"]
    table = check_demo(folder, ["real", "decoded", "teacher", "bk_extreme-place-0"])
    count = {name: int(row["parameters"].replace(",", "")) for name, row in list(table.items())[2:]}
    assert count["bk_extreme-place-0"] < 0.3 * count["teacher"]
    assert table["real"]["CLIP"] == "–" and -1 < float(table["teacher"]["CLIP"]) < 1

    weights = [
        load_file(folder / name / "unet" / "diffusion_pytorch_model.safetensors") for name in ("start", "teacher")
    ]
    assert weights[0].keys() == weights[1].keys()
    assert all(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0] if name.endswith("weight"))
    parts = [load_file(folder / name / "vae" / "diffusion_pytorch_model.safetensors") for name in ("start", "teacher")]
    assert all(torch.equal(parts[0][name], parts[1][name]) for name in parts[0])
    pipeline = StableDiffusionPipeline.from_pretrained(folder / "bk_extreme-place-0")
    assert pipeline("a photo of a dark bag", num_inference_steps=1).images[0].size == (32, 32)

    before = stamp(folder)
    make_demo(fashion_sd21, *small)
    assert len(in_process) == 2 and stamp(folder) == before
    with pytest.raises(SystemExit, match="--teacher_steps 3 was 2"):
        make_demo(fashion_sd21, *small, "--teacher_steps", 3)


def test_stable_diffusion_3_from_nothing(make_demo, monkeypatch):
    monkeypatch.setattr(fashion_sd21, "IMAGES", 96)
    monkeypatch.setattr(fashion_sd21, "METHODS", ("place",))
    folder = make_demo(fashion_sd3, "--autoencoder_steps", 2, "--clip_steps", 2)
    check_demo(folder, ["real", "decoded", "teacher", "third-place-0"])
    manifest = json.loads((folder / "samples" / "teacher" / "manifest.json").read_text())
    assert manifest["max_sequence_length"] == 8 and manifest["prompts"] == fashion.PROMPTS
    absent = {"text_encoder_3": None, "tokenizer_3": None}
    student = StableDiffusion3Pipeline.from_pretrained(folder / "third-place-0", **absent)
    assert student.transformer.config.num_layers == 2


def test_stable_diffusion_xl_from_nothing(make_demo, monkeypatch):
    monkeypatch.setattr(fashion_sd21, "IMAGES", 96)
    monkeypatch.setattr(fashion_sd21, "METHODS", ("place",))
    monkeypatch.setattr(fashion_sdxl, "STUDENTS", ("extreme",))
    folder = make_demo(fashion_sdxl, "--autoencoder_steps", 2, "--clip_steps", 2)
    check_demo(folder, ["real", "decoded", "teacher", "extreme-place-0"])
    student = StableDiffusionXLPipeline.from_pretrained(folder / "extreme-place-0", add_watermarker=False)
    assert student.unet.config.transformer_layers_per_block == [1, 1]
    assert student("a photo of a dark bag", num_inference_steps=1).images[0].size == (32, 32)


def test_dit_from_nothing(make_demo, monkeypatch):
    monkeypatch.setattr(fashion_dit, "IMAGES", 96)
    monkeypatch.setattr(fashion_dit, "METHODS", ("mse", "place"))
    folder = make_demo(fashion_dit, "--seeds", 2)
    check_demo(folder, ["real", "teacher", "mse-0", "place-0"])  # the report shows the first seed
    rows = {row["name"]: row["fid"] for row in json.loads((folder / "quality.json").read_text())["rows"]}
    assert list(rows) == ["real", "teacher", "mse-0", "place-0", "mse-1", "place-1"]
    assert rows["place-0"] != rows["place-1"]
    mean = {loss: (rows[f"{loss}-0"] + rows[f"{loss}-1"]) / 2 for loss in ("mse", "place")}
    text = (folder / "results.md").read_text()
    assert f"| mse | {mean['mse']:.2f} ± " in text and f"| place | {mean['place']:.2f} ± " in text
    assert f" | – | {mean['mse'] - mean['place']:+.2f} (" in text  # there is no student without a teacher
    assert f" | – | {mean['place'] - mean['mse']:+.2f} (" in text
    manifest = json.loads((folder / "samples" / "place-0" / "manifest.json").read_text())
    assert manifest["classes"] == list(range(10))
