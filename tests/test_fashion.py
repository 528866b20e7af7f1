"""Fashion-MNIST's parts of a pipeline, and what is made of them, at a budget of a few steps."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from diffusers import AutoencoderKL, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection

import cache
import fashion
import fashion_sd21
import train_lift_sd21


@pytest.fixture(scope="module")
def data() -> tuple[np.ndarray, np.ndarray]:
    """The first 300 images, uint8 (300, 28, 28), and their labels."""
    images, labels = fashion.read_fashion_mnist(fashion.find_fashion_mnist(ROOT / ".data"), "train")
    return images[:300], labels[:300]


@pytest.fixture(scope="module")
def words(data) -> tuple[list[str], object]:
    """The images' captions and a tokenizer of their words."""
    captions = [fashion.caption(label, image) for label, image in zip(data[1], data[0])]
    return captions, fashion.make_tokenizer(sorted({word for text in captions for word in text.split()}), 24)


@pytest.fixture
def in_process(run, monkeypatch) -> list:
    """Lets what would be launched run in this process; returns the commands' names and flags."""
    commands = []

    class Finished:
        def __init__(self, command, **options):
            script = next(number for number, word in enumerate(command) if word.endswith("train_lift_sd21.py"))
            commands.append(command[script + 1 :])
            run("train_lift_sd21", *command[script + 1 :])
            self.returncode = 0

        def wait(self) -> int:
            return self.returncode

    monkeypatch.setattr(fashion_sd21.subprocess, "Popen", Finished)
    monkeypatch.setattr(cache.subprocess, "run", Finished)
    return commands


def stamp(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in sorted(folder.rglob("*.safetensors"))}


def error_of(vae, images: np.ndarray) -> float:
    return np.square(fashion.reconstruct(vae, images) / 255 - images / 255).mean().item()


# ----------------------------------------------------------------------------------------------------------- the parts


def test_captions_say_what_is_there(data, tmp_path):
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
    early = fashion.train_autoencoder(tmp_path / "early", images, steps=2)
    vae = fashion.train_autoencoder(tmp_path / "vae", images, steps=25)
    assert error_of(vae, images[:50]) < 0.6 * error_of(early, images[:50])
    with torch.no_grad():
        latents = vae.encode(fashion.as_inputs(images)).latent_dist.sample() * vae.config.scaling_factor
    assert latents.shape == (300, 4, 8, 8)
    assert latents.std().item() == pytest.approx(1, abs=0.02)
    assert latents.mean((0, 2, 3)).abs().max() < 0.02

    before = stamp(tmp_path)
    again = fashion.train_autoencoder(tmp_path / "vae", images, steps=25)
    assert stamp(tmp_path) == before and error_of(again, images) == error_of(vae, images)
    loaded = AutoencoderKL.from_pretrained(tmp_path / "vae")
    assert loaded.config.scaling_factor == vae.config.scaling_factor != 0.18215


def test_centring_the_latents_changes_no_picture(data):
    torch.manual_seed(0)
    options = {"block_out_channels": [8, 8], "norm_num_groups": 4}
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2, **options
    ).eval()
    inputs = fashion.as_inputs(fashion.pad(data[0][:20]))
    with torch.no_grad():
        before = vae.decode(vae.encode(inputs).latent_dist.mode()).sample
        assert vae.encode(inputs).latent_dist.mean.mean((0, 2, 3)).abs().max() > 0.05
        fashion.centre_latents(vae, inputs)
        after = vae.decode(vae.encode(inputs).latent_dist.mode()).sample
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("projection", [False, True])
def test_text_encoder_learns_and_is_reused(projection, data, words, tmp_path):
    captions, tokenizer = words
    kind = CLIPTextModelWithProjection if projection else CLIPTextModel
    train = partial(
        fashion.train_text_encoder, images=fashion.pad(data[0]), captions=captions, tokenizer=tokenizer, width=32
    )
    train(tmp_path / "short", steps=1, projection=projection)
    text_encoder = train(tmp_path / "text", steps=60, projection=projection)
    ids = tokenizer(fashion_sd21.PROMPTS, padding="max_length", max_length=24, return_tensors="pt")["input_ids"]

    def likeness(model) -> float:
        """How alike the prompts' embeddings are, on average: training pulls them apart."""
        output = model(ids)
        embeddings = torch.nn.functional.normalize(output.text_embeds if projection else output.pooler_output, dim=-1)
        return (embeddings @ embeddings.T).mean().item()

    assert type(text_encoder) is kind
    with torch.no_grad():
        assert likeness(text_encoder) < likeness(kind.from_pretrained(tmp_path / "short").eval()) - 0.1
    before = stamp(tmp_path)
    again = train(tmp_path / "text", steps=60, projection=projection)
    assert stamp(tmp_path) == before and torch.equal(again(ids)[0], text_encoder(ids)[0])


def test_classifier_learns_and_is_reused(data, tmp_path):
    images, labels = fashion.pad(data[0]), data[1]
    classifier = fashion.train_classifier(tmp_path / "classifier.safetensors", images, labels, steps=60)
    classes, features = fashion.classify(classifier, images)
    assert features.shape == (300, fashion.FEATURES) and (classes.numpy() == labels).mean() > 0.6
    again = fashion.train_classifier(tmp_path / "classifier.safetensors", images, labels, steps=60)
    assert torch.equal(fashion.classify(again, images)[1], features)


# --------------------------------------------------------------------------------------------------------- the command


def test_from_nothing_and_again(in_process, tmp_path, monkeypatch):
    """A few steps of everything; the second call finds it all done."""
    monkeypatch.setattr(fashion_sd21, "IMAGES", 96)
    monkeypatch.setattr(fashion_sd21, "METHODS", ("place",))
    monkeypatch.setattr(fashion_sd21, "STUDENTS", ("bk_extreme",))
    monkeypatch.setattr(fashion, "train_classifier", partial(fashion.train_classifier, steps=40))
    demo = tmp_path / "demo"
    flags = ["--output_dir", str(demo), "--autoencoder_steps", "2", "--text_steps", "2", "--teacher_steps", "2"]
    flags += ["--student_steps", "2", "--samples", "64", "--inference_steps", "2", "--threads", "1"]
    fashion_sd21.main(fashion_sd21.parse_args(flags))

    assert [Path(flags[1]).name for flags in in_process] == ["teacher", "bk_extreme-place"]
    results = json.loads((demo / "results.json").read_text())["results"]
    assert list(results) == ["real, held out", "teacher", "bk_extreme-place"]
    assert results["bk_extreme-place"]["parameters"] < 0.3 * results["teacher"]["parameters"]
    assert all(np.isfinite(result["frechet"]) for result in results.values())
    assert results["real, held out"]["frechet"] < min(results[name]["frechet"] for name in list(results)[1:])
    table = (demo / "results.md").read_text()
    assert "no Inception FID" in table and table.count("\n| ") == 4
    assert Image.open(demo / "samples.png").height > 3 * 96 and Image.open(demo / "curves.png").width > 700

    weights = [
        load_file(demo / name / "unet" / "diffusion_pytorch_model.safetensors") for name in ("start", "teacher")
    ]
    assert weights[0].keys() == weights[1].keys()
    assert all(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0] if name.endswith("weight"))
    parts = [load_file(demo / name / "vae" / "diffusion_pytorch_model.safetensors") for name in ("start", "teacher")]
    assert all(torch.equal(parts[0][name], parts[1][name]) for name in parts[0])
    pipeline = StableDiffusionPipeline.from_pretrained(demo / "bk_extreme-place")
    assert pipeline("a photo of a dark bag", num_inference_steps=1).images[0].size == (32, 32)

    before = stamp(demo)
    fashion_sd21.main(fashion_sd21.parse_args(flags))
    assert len(in_process) == 2 and stamp(demo) == before
    with pytest.raises(SystemExit, match="--teacher_steps 3 was 2"):
        fashion_sd21.main(fashion_sd21.parse_args([*flags, "--teacher_steps", "3"]))


# -------------------------------------------------------------------------------------------- the benchmark of caching


def test_shrunk_models_keep_the_proportions():
    args = train_lift_sd21.parse_args(["--student", "bk_tiny", "--train_data_dir", str(ROOT)])
    shares = []
    for sizes in ((8, 128, 200, cache.TOKENS), (1, 512, 49408, 77)):
        macs = cache.count_macs(*cache.make_models(*sizes), args)
        shares.append([value / sum(macs.values()) for value in macs.values()])
    assert shares[0] == pytest.approx(shares[1], abs=0.02) and shares[1][0] > 0.3


def test_cache_benchmark_prints_the_ratio(in_process, tmp_path, capsys):
    path = tmp_path / "cache.json"
    flags = ["--steps", "2", "--warmup", "1", "--runs", "1", "--resolution", "64", "--threads", "1"]
    cache.main(cache.parse_args([*flags, "--json", str(path), "--", "--train_batch_size", "2", "--group_size", "8"]))
    assert ["--cache_latents" in flags for flags in in_process] == [False, True]
    result = json.loads(path.read_text())
    speeds = result["steps per second"]
    assert result["batch"] == 2 and len(speeds["with"]) == len(speeds["without"]) == 1
    assert result["ratio"] == speeds["with"][0] / speeds["without"][0] > 0
    assert f"with / without --cache_latents: {result['ratio']:.2f}" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="--scale 3 does not divide"):
        cache.parse_args(["--scale", "3"])
