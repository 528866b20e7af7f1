"""eval/: reproducible images, and the metrics and the report made from them."""

import gc
import json
import math
import multiprocessing
import os
import re
import resource
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from urllib.error import HTTPError, URLError

from common.images import load_pixels, open_image

import cleanfid
import cleanfid.downloads_helper
import cleanfid.features
import datasets
import numpy as np
import pytest
import torch
from cleanfid import fid
from cleanfid.inception_torchscript import InceptionV3W
from conftest import ALONE, ROOT, TWO_PROCESSES, launch, run_file
from diffusers import (
    AutoencoderKL,
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    EulerDiscreteScheduler,
    LDMPipeline,
    PixArtSigmaPipeline,
    PNDMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DModel,
    VQModel,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer, T5EncoderModel

import demo
import evaluate
import figures
import generate
import report
import result_tables
from lift_utils import lift_place_loss
from tiny_models import TINY_UNET, save_dit_pipeline, save_pixart_pipeline, save_sd3_pipeline, save_sd_pipeline


PROMPTS = ["a photo of a dark bag", "a photo of a bright sneaker", "a bag"]


@pytest.fixture(scope="session")
def prompt_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(PROMPTS) + "\n")
    return path


@pytest.fixture(scope="session")
def dit(tmp_path_factory) -> Path:
    """With learned variance and the 1000 classes that DiTPipeline takes for granted."""
    return save_dit_pipeline(tmp_path_factory.mktemp("dit"), num_layers=2)


@pytest.fixture(scope="session")
def sd3(tmp_path_factory) -> Path:
    return save_sd3_pipeline(tmp_path_factory.mktemp("sd3"), absent=(3,), num_layers=2)


@pytest.fixture
def models(teacher, sd_teacher, dit, sd3, prompt_file) -> dict[str, list]:
    """Flags for a model of each kind and its conditions."""
    return {
        "pixels": ["--model", teacher],
        "sd": ["--model", sd_teacher, "--prompt_file", prompt_file],
        "dit": ["--model", dit, "--classes", 3, 999, "ankle boot", 0],
        "sd3": ["--model", sd3, "--prompt_file", prompt_file],
    }


@pytest.fixture
def sample(run, tmp_path):
    """`sample(*flags, name="images")` generates six images in two steps; returns their folder."""

    def sample_into(*flags, name: str = "images") -> Path:
        defaults = [] if "--num_images" in flags else ["--num_images", 6]
        defaults += [] if "--num_inference_steps" in flags else ["--num_inference_steps", 2]
        run("generate", "--output_dir", tmp_path / name, *defaults, *flags)
        return tmp_path / name

    return sample_into


def read(folder: Path) -> np.ndarray:
    """All images, int (N, H, W[, C]), in the order of their numbers."""
    return np.stack([np.array(Image.open(path)) for path in sorted(folder.glob("*.png"))]).astype(int)


def read_tables(markdown: str) -> list[list[list[str]]]:
    """The cells of each table of a Markdown text, without the lines of dashes."""
    tables = [[]]
    for line in [*markdown.splitlines(), ""]:
        if line.startswith("|"):
            tables[-1].append([cell.strip() for cell in line[1:-1].split("|")])
        elif tables[-1]:
            tables.append([])
    return [[row for row in table if set(row[-1]) - set("-:")] for table in tables if table]


def manifest(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())


# ---------------------------------------------------------------------------------------------------------- generation


@pytest.mark.parametrize("lora", [(), ("--lora_rank", "2")], ids=["weights", "LoRA"])
def test_a_checkpoint_draws_what_the_finished_student_does(
    run, sample, sd_teacher, captioned, prompt_file, tmp_path, lora
):
    flags = ("--student", "bk_tiny", "--max_train_steps", 1, "--train_batch_size", 2, "--dataloader_num_workers", 0)
    where = ("--pretrained_teacher_model", sd_teacher, "--train_data_dir", captioned, "--output_dir", tmp_path / "run")
    run("train_lift_sd21", *where, *flags, *lora, "--num_inference_steps", 1, "--report_to", "none")
    checkpoint = ("--model", tmp_path / "run" / "checkpoint-1", "--prompt_file", prompt_file)
    ours = sample(*checkpoint, "--base", sd_teacher, name="checkpoint")
    theirs = sample("--model", tmp_path / "run", "--prompt_file", prompt_file, name="finished")
    assert np.abs(read(ours) - read(theirs)).max() <= (
        1 if lora else 0
    )  # an adapter is merged there, and beside it here
    with pytest.raises(SystemExit, match=r"^error: --model .* is a checkpoint, .* add --base"):
        sample(*checkpoint, name="none")
    with pytest.raises(SystemExit, match=r"^error: --base .* is for a checkpoint-N folder, which .* is not; drop it"):
        sample("--model", sd_teacher, "--base", sd_teacher, name="none")
    base, why = shutil.copytree(sd_teacher, tmp_path / "base"), r"cross_attention_dim \d+, and its own has 7; pass the"
    config = json.loads((base / "unet" / "config.json").read_text())
    (base / "unet" / "config.json").write_text(json.dumps({**config, "cross_attention_dim": 7}))
    with pytest.raises(SystemExit, match=rf"^error: --base .* the checkpoint's unet has {why} teacher's pipeline"):
        sample(*checkpoint, "--base", base, name="none")
    index = json.loads((base / "model_index.json").read_text())
    (base / "model_index.json").write_text(json.dumps({**index, "unet": ["diffusers", "UNet2DModel"]}))
    with pytest.raises(SystemExit, match=r"^error: --base .* is a UNet2DConditionModel, .* has a UNet2DModel; pass"):
        sample(*checkpoint, "--base", base, name="none")


def test_a_base_may_have_the_names_and_the_layout_of_published_pipelines(teachers, teacher, monkeypatch):
    """DiT-XL/2 by the class's old name; DDPMs whose U-Net lies beside model_index.json, which the Hub does not say."""
    student = DiTTransformer2DModel.from_pretrained(teachers["dit"], subfolder="transformer")
    parts = {"transformer": ["diffusers", "Transformer2DModel"]}
    generate.check_base(str(teachers["dit"]), None, parts, "transformer", student)
    student, load_config = UNet2DModel.from_pretrained(teacher, subfolder="unet"), UNet2DModel.load_config

    def load_from_root(base, subfolder=None, **options):
        if subfolder is not None:
            raise OSError(f"{base} does not appear to have a file named config.json.")
        return load_config(teacher, subfolder="unet", **options)

    monkeypatch.setattr(UNet2DModel, "load_config", load_from_root)
    generate.check_base("google/ddpm", None, {"unet": ["diffusers", "UNet2DModel"]}, "unet", student)
    student.register_to_config(in_channels=9)
    with pytest.raises(SystemExit, match="the checkpoint's unet has in_channels 9, and its own has 1;"):
        generate.check_base("google/ddpm", None, {"unet": ["diffusers", "UNet2DModel"]}, "unet", student)


def test_models_that_lie_beside_their_index_are_told_apart(teacher, sample, tmp_path):
    """As published DDPMs are; with other weights it is another model, whose images are not to be mixed."""
    old = tmp_path / "old"
    for part in ("unet", "scheduler"):
        shutil.copytree(teacher / part, old, dirs_exist_ok=True)
    shutil.copy(teacher / "model_index.json", old)
    folder = sample("--model", old, "--num_images", 1)
    assert np.array_equal(read(folder), read(sample("--model", teacher, "--num_images", 1, name="whole")))
    path = old / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor / 2 for name, tensor in load_file(path).items()}, path)
    with pytest.raises(SystemExit, match=r"^error: --model .*: its contents differ from those for the images in"):
        sample("--model", old, "--num_images", 2)


@pytest.mark.parametrize(
    ("kind", "flags"),
    [
        ("pixels", ["--sampler", "ddpm"]),
        ("pixels", ["--sampler", "euler"]),
        ("sd", []),
        ("sd", ["--sampler", "dpm++", "--resolution", 16, "--guidance_scale", 1]),
        ("dit", []),
        ("dit", ["--sampler", "unipc", "--guidance_scale", 1]),
        ("sd3", []),
        ("sd3", ["--sampler", "heun", "--resize", 8]),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else value,
)
def test_an_image_depends_on_its_number_alone(sample, models, kind, flags):
    """Batches of one, four and seven images differ by at most a grey level. Another seed gives another image."""
    whole, single = (sample(*models[kind], *flags, "--batch_size", size, name=f"{size}") for size in (4, 1))
    images = read(whole)
    assert len(images) == 6 and np.abs(images - read(single)).max() <= 1
    side = {"pixels": 16, "sd": 32, "dit": 32, "sd3": 32}[kind]
    side = flags[flags.index("--resolution") + 1] if "--resolution" in flags else side
    side = 8 if "--resize" in flags else side
    assert images.shape[1:3] == (side, side) and images.std() > 2
    assert all(np.abs(images[0] - other).max() > 8 for other in images[1:])  # nor are they one and the same
    more = read(sample(*models[kind], *flags, "--batch_size", 7, "--num_images", 7, name="7"))
    assert np.abs(images - more[:6]).max() <= 1
    other = read(sample(*models[kind], *flags, "--batch_size", 7, "--seed", 1, name="seed"))
    assert np.abs(images - other).max() > 8


def test_published_protocol_by_default(sample, models, sd3):
    protocols = {}
    for kind, flags in models.items():
        folder = sample(*flags, "--num_images", 1, name=kind)
        settings = manifest(folder)
        protocols[kind] = settings["sampler"], settings["guidance_scale"], settings["scheduler"]["class"]
        assert settings["dtype"] == "float32" and settings["seed"] == 0 and settings["num_inference_steps"] == 2
        assert torch.__version__.startswith(settings["versions"]["torch"]) and settings["contents"].startswith(
            "sha256:"
        )
    assert protocols == {
        "pixels": ("ddim", None, "DDIMScheduler"),
        "sd": ("pndm", 7.5, "PNDMScheduler"),
        "dit": ("ddpm", 1.5, "DDPMScheduler"),
        "sd3": ("euler", 7.0, "FlowMatchEulerDiscreteScheduler"),
    }
    assert manifest(Path(folder.parent / "dit"))["scheduler"]["variance_type"] == "learned_range"
    assert manifest(Path(folder.parent / "dit"))["classes"] == [3, 999, 999, 0]
    assert manifest(folder)["prompts"] == PROMPTS and manifest(folder)["pipeline"] == "StableDiffusion3Pipeline"


def test_images_are_those_of_diffusers_own_pipelines(sample, models, teacher, dit):
    generators = [generate.seeded(0, index) for index in range(6)]
    pipeline = DDIMPipeline.from_pretrained(teacher)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)  # as published
    expected = pipeline(6, generators, num_inference_steps=2).images
    assert np.array_equal(read(sample(*models["pixels"])), np.stack([np.array(image) for image in expected]))

    generators = [generate.seeded(0, index) for index in range(6)]
    expected = DiTPipeline.from_pretrained(dit)(
        [3, 999, 999, 0, 3, 999], guidance_scale=2.0, generator=generators, num_inference_steps=2
    ).images
    folder = sample(*models["dit"], "--sampler", "as_saved", "--guidance_scale", 2, name="dit")
    assert np.abs(read(folder) - np.stack([np.array(image) for image in expected])).max() <= 1


def test_null_class_is_the_models_own(sample, tmp_path):
    """Guidance of a DiT with ten classes, whose null class is number 10; DiTPipeline would use number 1000."""
    small = save_dit_pipeline(tmp_path / "ten", num_layers=1, num_embeds_ada_norm=10)
    images = read(sample("--model", small, "--classes", 1, "--num_images", 2, "--guidance_scale", 4))
    plain = read(sample("--model", small, "--classes", 1, "--num_images", 2, "--guidance_scale", 1, name="plain"))
    assert np.abs(images - plain).max() > 1


def test_sd3_with_a_vae_that_shifts_nothing(sample, sd3, prompt_file, tmp_path):
    """Its config has null, the default of AutoencoderKL, which StableDiffusion3Pipeline would add."""
    flags = ("--prompt_file", prompt_file, "--num_images", 1)
    images = []
    for name, shift in (("null", None), ("zero", 0.0)):
        model = shutil.copytree(sd3, tmp_path / f"model-{name}")
        config = json.loads((model / "vae" / "config.json").read_text())
        (model / "vae" / "config.json").write_text(json.dumps({**config, "shift_factor": shift}))
        images.append(read(sample("--model", model, *flags, name=name)))
    assert np.array_equal(*images)


def test_only_sd3_shifts_latents(sample, models, tmp_path):
    """A DiT may have the VAE of one that does: DiTPipeline and the training leave its shift out."""
    _, source, *flags = models["dit"]
    shifted = shutil.copytree(source, tmp_path / "model")
    config = json.loads((shifted / "vae" / "config.json").read_text())
    (shifted / "vae" / "config.json").write_text(json.dumps({**config, "shift_factor": 0.6}))
    images = [read(sample("--model", model, *flags, name=f"{name}")) for name, model in enumerate((source, shifted))]
    assert np.array_equal(*images)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA is full"), OSError(28, "No space left on device")])
def test_a_full_gpu_or_disk_is_said_in_one_line(sample, models, monkeypatch, error):
    def fail_to_draw(*arguments, **options):
        raise error

    monkeypatch.setattr(generate, "generate_images", fail_to_draw)
    gpu, disk = (
        "--batch_size 16 does not fit the GPU: CUDA is full; lower it, or",
        "--output_dir .* No space .* make room",
    )
    with pytest.raises(SystemExit, match=f"^error: {disk if isinstance(error, OSError) else gpu}"):
        sample(*models["dit"])


def test_tokens_of_t5_count(sample, sd3, prompt_file):
    """Without T5 the transformer gets as many zeros as --max_sequence_length says."""
    flags = ("--model", sd3, "--prompt_file", prompt_file, "--num_images", 1, "--guidance_scale", 1)
    folders = [sample(*flags, "--max_sequence_length", length, name=f"{length}") for length in (8, 200)]
    assert [manifest(folder)["max_sequence_length"] for folder in folders] == [8, 200]
    assert np.abs(read(folders[0]) - read(folders[1])).max() > 1
    assert manifest(sample(*flags, name="default"))["max_sequence_length"] == 256


NO_T5 = {"text_encoder_3": None, "tokenizer_3": None}


def test_t5_can_be_left_out(sample, sd3, prompt_file, tmp_path):
    """A checkpoint's other parts are its teacher's, which has T5 even if the student was trained without."""
    whole, flags = save_sd3_pipeline(tmp_path / "whole", num_layers=2), ("--prompt_file", prompt_file)
    with_t5, without, expected = (
        sample("--model", *which, *flags, name=name)
        for name, which in (("with", [whole]), ("without", [whole, "--no_t5"]), ("expected", [sd3]))
    )
    assert np.array_equal(read(without), read(expected)) and np.abs(read(with_t5) - read(without)).max() > 1
    with pytest.raises(SystemExit, match="--no_t5 is True but was None for the images in "):
        sample("--model", whole, "--no_t5", *flags, name="with")
    pipelines = [StableDiffusion3Pipeline.from_pretrained(whole, **options) for options in ({}, NO_T5)]
    kinds = [report.prediction_kind(pipeline) for pipeline in pipelines]
    assert kinds[0] != kinds[1] and kinds[0][0] == kinds[1][0]  # predictions of other conditions do not compare


def test_learned_variance_is_used(sample, models):
    """`ddpm` on a DiT scales its noise by the variance that the model predicts; `as_saved`, DDIM here, adds none."""
    learned = read(sample(*models["dit"], "--guidance_scale", 1))
    generators = [generate.seeded(0, index) for index in range(6)]
    pipeline = DiTPipeline.from_pretrained(models["dit"][1])
    changes = {"variance_type": "learned_range", "clip_sample": False, "timestep_spacing": "linspace"}
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config, **changes)
    scheduler.set_timesteps(2)
    noisy = torch.cat([torch.randn(1, 4, 8, 8, generator=generator) for generator in generators])
    labels = torch.tensor([3, 999, 999, 0, 3, 999])
    with torch.no_grad():
        for step in scheduler.timesteps:
            output = pipeline.transformer(noisy, timestep=step.expand(6), class_labels=labels).sample
            noisy = scheduler.step(output, step, noisy, generator=generators).prev_sample
        pixels = pipeline.vae.decode(noisy / pipeline.vae.config.scaling_factor).sample
    expected = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().permute(0, 2, 3, 1).numpy()
    assert np.abs(learned - expected).max() <= 1
    fixed = read(sample(*models["dit"], "--guidance_scale", 1, "--sampler", "as_saved", name="fixed"))
    assert np.abs(learned - fixed).max() > 8


def test_dit_is_sampled_at_the_published_timesteps(models):
    """By `space_timesteps` of DiT's authors: from the last one on, in fractions of 999."""
    sampler = generate.make_sampler(DiTPipeline.from_pretrained(models["dit"][1]), "ddpm")
    sampler.set_timesteps(250)
    assert sampler.timesteps.tolist() == [round(index * 999 / 249) for index in reversed(range(250))]


@pytest.mark.parametrize("name", ["ddim", "pndm"])
def test_samplers_of_whole_steps_do_not_take_fractions(sd_teacher, name):
    """Euler's own spacing is linspace, by which DDIM would go on from other timesteps than it has reached."""
    pipeline = StableDiffusionPipeline.from_pretrained(sd_teacher)
    pipeline.scheduler = EulerDiscreteScheduler()
    sampler = generate.make_sampler(pipeline, name)
    sampler.set_timesteps(30)
    assert {int(step) for step in sampler.timesteps.unique().diff()} == {1000 // 30}


def test_classes_of_one_name_are_all_drawn(models):
    """ImageNet has two cranes; DiTPipeline's own table of names has the second alone."""
    pipeline = DiTPipeline.from_pretrained(models["dit"][1])
    names = {"2": "crane", "5": "crane", "7": "maillot", "11": "maillot, tank suit"}
    pipeline.id2label = names
    assert generate.find_classes(pipeline, None) == [2, 5, 7, 11]
    assert generate.find_classes(pipeline, ["5", "tank suit", "2"]) == [5, 11, 2]
    for name, numbers in (("crane", [2, 5]), ("maillot", [7, 11])):
        with pytest.raises(SystemExit) as refused:
            generate.find_classes(pipeline, ["3", name])
        says = f"error: --classes {name} is the name of the classes {numbers}; pass one of these numbers"
        assert refused.value.code == says
    with pytest.raises(SystemExit, match="--classes heron is no class; pass a number below 1000"):
        generate.find_classes(pipeline, ["heron"])


def test_two_processes_equal_one(sample, teacher, tmp_path):
    flags = ("--sampler", "ddpm", "--num_inference_steps", 2, "--batch_size", 2, "--num_images", 7)
    one = sample("--model", teacher, *flags, name="one")
    command = ("eval/generate.py", "--model", teacher, "--output_dir", tmp_path / "two", *flags)
    finished = launch(*command, prefix=TWO_PROCESSES)
    assert finished.returncode == 0, finished.stdout
    assert "Images (2 processes): 100%" in finished.stdout and "7 images in" in finished.stdout
    assert np.array_equal(read(one), read(tmp_path / "two"))
    assert manifest(one) == {**manifest(tmp_path / "two"), "model": manifest(one)["model"]}


def test_processes_that_would_each_draw_all_images_are_refused(teacher, tmp_path):
    """Where there is no GPU, Accelerate takes each for the only one, unless it is to use the CPU."""
    program = (ROOT / "eval/generate.py", "--model", teacher, "--output_dir", tmp_path / "images", "--num_images", "2")
    finished = run_file("-m", *TWO_PROCESSES, *program, **ALONE)
    assert finished.returncode == 1 and not (tmp_path / "images").exists()
    says = "error: 2 processes and no GPU: each would work alone; set ACCELERATE_USE_CPU=true, or see nvidia-smi\n"
    assert says in finished.stdout


def test_interrupted_and_resumed_equals_whole(sample, models, monkeypatch):
    flags = (*models["pixels"], "--batch_size", 4, "--sampler", "ddpm", "--num_images", 10)
    whole = sample(*flags, name="whole")
    save, count = generate.save_image, [0]

    def stop_after_six(image, path):
        count[0] += 1
        if count[0] == 7:
            path.with_name(f".{path.name}").write_bytes(b"half a file")
            raise KeyboardInterrupt
        save(image, path)

    monkeypatch.setattr(generate, "save_image", stop_after_six)
    with pytest.raises(KeyboardInterrupt):
        sample(*flags, name="parts")
    monkeypatch.setattr(generate, "save_image", save)
    folder = whole.parent / "parts"
    assert len(list(folder.glob("*.png"))) == 7 and len(list(folder.glob("[0-9]*.png"))) == 6  # one is incomplete
    damaged, kept = folder / "000001.png", folder / "000002.png"
    damaged.write_bytes(damaged.read_bytes()[:-40])
    before = kept.stat().st_mtime_ns
    sample(*flags, name="parts")
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in whole.iterdir())
    assert np.array_equal(read(folder), read(whole)) and kept.stat().st_mtime_ns == before

    sample(*flags[:-1], 12, name="parts")  # more of them, by the same command
    assert len(read(folder)) == 12 and np.array_equal(read(folder)[:10], read(whole))
    assert manifest(folder)["num_images"] == 12


def test_a_folder_is_of_one_model_and_its_prompts(sample, teacher, sd_teacher, prompt_file, tmp_path):
    copy = shutil.copytree(teacher, tmp_path / "copy")
    sample("--model", teacher, "--num_images", 1)
    sample("--model", copy, "--num_images", 2)  # the same contents elsewhere are the same model
    sd = ("--model", sd_teacher, "--num_images", 1, "--prompt_file")
    sample(*sd, prompt_file, name="sd")
    (tmp_path / "other.txt").write_text("a bag\n")
    with pytest.raises(SystemExit, match=r"--prompt_file \S+/other.txt: its prompts differ from those for"):
        sample(*sd, tmp_path / "other.txt", name="sd")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(sample, models, dtype):
    for kind in ("pixels", "dit", "sd"):
        exact, half = (
            read(sample(*models[kind], "--num_images", 2, "--dtype", name, name=f"{kind}-{name}"))
            for name in ("float32", dtype)
        )
        assert np.abs(exact - half).mean() < 8  # the same noise in fewer bits


@pytest.mark.parametrize("kind", ["sd", "dit", "sd3"])
def test_latents_are_decoded_one_by_one(sample, models, monkeypatch, kind):
    """In float32, and with --vae_dtype in half precision; the images are those of a whole batch."""
    decoded, decode = [], AutoencoderKL.decode

    def spied(vae, latents, *arguments, **options):
        decoded.append((len(latents), latents.dtype, vae.decoder.conv_in.weight.dtype))
        return decode(vae, latents, *arguments, **options)

    monkeypatch.setattr(AutoencoderKL, "decode", spied)
    images = read(sample(*models[kind], name="float32"))
    half = ("--dtype", "bfloat16")
    folders = [sample(*models[kind], *half, *vae, name=f"{len(vae)}") for vae in ((), ("--vae_dtype", "float16"))]
    dtypes = (torch.float32, torch.float32, torch.float16)
    assert decoded == [(1, dtype, dtype) for dtype in dtypes for _ in range(6)]
    assert 0 < np.abs(read(folders[0]) - read(folders[1])).max() <= 2  # of the same latents
    assert [manifest(folder)["vae_dtype"] for folder in folders] == ["float32", "float16"]

    def decode_at_once(pipeline, latents):
        shift = (pipeline.vae.config.shift_factor or 0) if kind == "sd3" else 0
        return decode(pipeline.vae, latents / pipeline.vae.config.scaling_factor + shift).sample

    monkeypatch.setattr(generate, "decode", decode_at_once)
    assert np.abs(images - read(sample(*models[kind], name="whole"))).max() <= 1


def test_images_that_overflow_end_the_run(sample, sd_teacher, prompt_file, tmp_path):
    """They would be black PNGs, and be measured as the model's."""
    for name, save in (("sd", None), ("pixart", save_pixart_pipeline)):
        model = save(tmp_path / name) if save else Path(shutil.copytree(sd_teacher, tmp_path / name))
        vae = AutoencoderKL.from_pretrained(model / "vae")
        vae.decoder.conv_in.weight.data *= 1e5
        vae.save_pretrained(model / "vae")
        flags = ("--model", model, "--prompt_file", prompt_file, "--num_images", 1)
        half = ("--vae_dtype", "float16") if name == "sd" else ("--dtype", "float16")
        with pytest.raises(SystemExit, match=f"{model} makes images that are not finite; drop {' '.join(half)}"):
            sample(*flags, *half, name=f"{name}-images")
        assert not list((tmp_path / f"{name}-images").glob("*.png"))
        (tmp_path / f"{name}-images" / ".000000.png").touch()  # as a kill leaves it
        assert read(sample(*flags, name=f"{name}-images")).std() > 0  # by the remedy, into the folder without images


def test_variant_is_a_setting(sample, teacher, tmp_path):
    """It may be other weights; the sum over a folder's files is the same for all its variants."""
    model = Path(shutil.copytree(teacher, tmp_path / "model"))
    UNet2DModel(**TINY_UNET).save_pretrained(model / "unet", variant="other")
    sample("--model", model, "--num_images", 1)
    with pytest.raises(SystemExit, match="--variant is other but was None for the images in"):
        sample("--model", model, "--num_images", 2, "--variant", "other")


def test_lines_of_a_prompt_file(tmp_path):
    """As Windows' editor saves them; a separator that is no end of a line is part of a prompt."""
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa red bag\r\na line\u2028with a separator\r\n".encode())
    assert generate.read_prompts(path) == ["a red bag", "a line\u2028with a separator"]


def test_dtype_of_the_vae_is_a_setting(sample, models):
    sample(*models["sd"], "--num_images", 1)
    with pytest.raises(SystemExit, match="--vae_dtype is bfloat16 but was float32"):
        sample(*models["sd"], "--num_images", 1, "--vae_dtype", "bfloat16")
    assert manifest(sample(*models["pixels"], "--num_images", 1, name="pixels"))["vae_dtype"] is None  # it has none


def test_any_pipeline_that_takes_prompts(sample, prompt_file, tmp_path):
    """PixArt-Sigma draws by its own call; an image depends on its number alone, and flags that it takes count."""
    model = save_pixart_pipeline(tmp_path / "pixart")
    flags = ("--model", model, "--prompt_file", prompt_file, "--max_sequence_length", 8)
    images = read(sample(*flags))
    generators = [generate.seeded(0, index) for index in range(6)]
    options = {"num_inference_steps": 2, "use_resolution_binning": False, "max_sequence_length": 8}
    expected = PixArtSigmaPipeline.from_pretrained(model)([*PROMPTS, *PROMPTS], generator=generators, **options).images
    assert np.array_equal(images, np.stack([np.array(image) for image in expected]))
    assert np.abs(images - read(sample(*flags, "--batch_size", 1, name="single"))).max() <= 1
    settings = manifest(tmp_path / "images")
    assert settings["pipeline"] == "PixArtSigmaPipeline" and settings["prompts"] == PROMPTS
    assert (settings["sampler"], settings["guidance_scale"], settings["vae_dtype"]) == ("as_saved", 4.5, "float32")
    others = ("--sampler", "ddim", "--guidance_scale", 1, "--resolution", 24, "--dtype", "bfloat16")
    images = read(sample(*flags, *others, name="others"))
    assert images.shape == (6, 24, 24, 3) and manifest(tmp_path / "others")["scheduler"]["class"] == "DDIMScheduler"
    assert manifest(tmp_path / "others")["vae_dtype"] == "bfloat16" and images.std() > 2


def test_samplers_keep_a_schedule_of_zero_terminal_snr(tmp_path):
    """Or are refused: with plain betas the figures would be of a process that the model was not trained for."""
    pipeline = StableDiffusionPipeline.from_pretrained(save_sd_pipeline(tmp_path / "sd", "v_prediction"))
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, rescale_betas_zero_snr=True)
    for name in {*generate.SAMPLERS} - {"pndm", "heun"}:
        assert generate.make_sampler(pipeline, name).alphas_cumprod[-1] < 1e-6, name
    for name in ("pndm", "heun"):
        with pytest.raises(SystemExit, match=f"--sampler {name} has no noise schedule of zero .*pass ddim"):
            generate.make_sampler(pipeline, name)
    pipeline.scheduler = DDIMScheduler(prediction_type="sample")
    with pytest.raises(SystemExit, match="--sampler pndm is not for a model that predicts the sample; pass ddim"):
        generate.make_sampler(pipeline, "pndm")


@pytest.mark.parametrize("name", generate.SAMPLERS)
def test_a_sampler_draws_a_teacher_and_its_student_at_the_same_timesteps(tmp_path, name):
    """Published configs of the scheduler are short, a student's has every entry."""
    published = {"_class_name": "PNDMScheduler", "beta_schedule": "scaled_linear", "skip_prk_steps": True}
    teacher = PNDMScheduler.from_config(published | {"prediction_type": "v_prediction", "steps_offset": 1})
    teacher.save_pretrained(tmp_path)
    drawn = []
    for scheduler in (teacher, PNDMScheduler.from_pretrained(tmp_path)):
        sampler = generate.make_sampler(SimpleNamespace(scheduler=scheduler, vae=None), name)
        sampler.set_timesteps(20)
        drawn.append((sampler.timesteps.tolist(), sampler.alphas_cumprod))
    assert drawn[0][0] == drawn[1][0] and torch.equal(drawn[0][1], drawn[1][1])


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_quadratic_timesteps_are_those_of_the_authors_of_ddim(prediction_type):
    """Their recursion, over the squares that they take, the repeated ones too."""
    saved = DDPMScheduler(prediction_type=prediction_type)
    sampler = generate.make_sampler(SimpleNamespace(scheduler=saved), "ddim_quad")

    def predict(noisy: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        return torch.tanh(noisy + step / 1000)

    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    found = generate.denoise(predict, sampler, (1, 1, 4, 4), generators, 100, torch.device("cpu"))
    kept = torch.cat([torch.ones(1), saved.alphas_cumprod]).double()
    noise = generate.make_noise((1, 1, 4, 4), [torch.Generator().manual_seed(seed) for seed in range(2)])
    noisy, steps = noise.double(), [int(root**2) for root in np.linspace(0, 800**0.5, 100)]
    assert steps[-1] in (799, 800) and len(steps) - len({*steps}) > 2
    for step, before in zip(reversed(steps), reversed([-1, *steps[:-1]])):
        signal, scale = kept[step + 1].sqrt(), (1 - kept[step + 1]).sqrt()
        output = predict(noisy, torch.tensor(step))
        if prediction_type == "v_prediction":
            image, noise = signal * noisy - scale * output, signal * output + scale * noisy
        else:
            image, noise = (noisy - scale * output) / signal, output
        noisy = kept[before + 1].sqrt() * image + (1 - kept[before + 1]).sqrt() * noise
    torch.testing.assert_close(found.double(), noisy, rtol=1e-3, atol=1e-3)


def test_a_sampler_whose_noise_is_not_of_the_image_is_refused():
    kind = type("DPMSolverSDEScheduler", (), {"config": {}})  # Diffusers' needs a package more
    with pytest.raises(SystemExit, match=r"--sampler as_saved is a DPMSolverSDEScheduler, whose noise .* pass anoth"):
        generate.make_sampler(SimpleNamespace(scheduler=kind()), "as_saved")


@pytest.mark.parametrize("classes", [10, None])
def test_any_pipeline_that_takes_class_labels_or_nothing(sample, tmp_path, classes):
    """A consistency model, whose noise on the way is of its image's generator; its sampler goes on with no other."""
    unet = UNet2DModel(**{**TINY_UNET, "in_channels": 3, "out_channels": 3}, num_class_embeds=classes)
    ConsistencyModelPipeline(unet, CMStochasticIterativeScheduler()).save_pretrained(tmp_path / "model")
    flags = ("--model", tmp_path / "model", *(("--classes", 1, 7) if classes else ()))
    images = read(sample(*flags))
    assert np.abs(images - read(sample(*flags, "--batch_size", 1, name="single"))).max() <= 1
    assert all(np.abs(images[0] - other).max() > 8 for other in images[1:])
    assert manifest(tmp_path / "images").get("classes") == ([1, 7] if classes else None)
    with pytest.raises(SystemExit, match="--sampler ddim does not go on with the noise of a CMStochasticIterative"):
        sample(*flags, "--sampler", "ddim", name="ddim")


def test_latent_diffusion_without_a_condition(sample, tmp_path):
    """As in docs/adapting.md."""
    levels = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    vqvae = VQModel(**levels, block_out_channels=[8, 8], norm_num_groups=4, latent_channels=3)
    unet = UNet2DModel(**{**TINY_UNET, "in_channels": 3, "out_channels": 3})
    LDMPipeline(vqvae, unet, DDIMScheduler(clip_sample=False)).save_pretrained(tmp_path / "model")
    images = read(sample("--model", tmp_path / "model"))
    assert images.shape == (6, 32, 32, 3) and np.abs(images[0] - images[1]).max() > 8


def test_pipelines_that_draw_otherwise_are_refused(sample, prompt_file, sd_teacher, tmp_path):
    model = shutil.copytree(sd_teacher, tmp_path / "model")
    index = json.loads((model / "model_index.json").read_text())
    for kind, says in (
        ("StableDiffusionImageVariationPipeline", "is a StableDiffusionImageVariationPipeline; pass"),
        ("ModelMixin", "is a ModelMixin; pass"),
        ("StableDiffusionImg2ImgPipeline", "makes no images as a StableDiffusionImg2ImgPipeline: "),
    ):
        (model / "model_index.json").write_text(json.dumps({**index, "_class_name": kind}))
        with pytest.raises(SystemExit, match=f"^error: --model {model} {says}"):
            sample("--model", model, "--prompt_file", prompt_file, name=kind)


@pytest.mark.parametrize("guidance_scale", [1, 4])
def test_text_encoders_of_sd3_make_room(sample, prompt_file, tmp_path, monkeypatch, guidance_scale):
    """They are gone while images are made, and the images are those of the pipeline with all of its parts."""
    model = save_sd3_pipeline(tmp_path / "sd3", num_layers=2)
    flags = ("--model", model, "--prompt_file", prompt_file, "--guidance_scale", guidance_scale, "--batch_size", 2)
    flags += ("--max_sequence_length", 8)
    encode, forward = StableDiffusion3Pipeline.encode_prompt, SD3Transformer2DModel.forward
    encoded, held, unguided = [], [], [""] if guidance_scale > 1 else []

    def count_encoders() -> int:
        gc.collect()
        return sum(isinstance(each, T5EncoderModel) for each in gc.get_objects())

    def spied_encode(pipeline, prompt, *arguments, **options):
        if prompt is not None:  # from text, not from embeddings
            encoded.append(prompt)
        return encode(pipeline, prompt, *arguments, **options)

    def spied_forward(*arguments, **options):
        held.append(count_encoders())
        return forward(*arguments, **options)

    before = count_encoders()  # of other tests
    with monkeypatch.context() as patch:
        patch.setattr(StableDiffusion3Pipeline, "encode_prompt", spied_encode)
        patch.setattr(SD3Transformer2DModel, "forward", spied_forward)
        folder = sample(*flags)
    assert encoded == [*unguided, *PROMPTS]  # each once, for six images
    assert held == [before] * 6

    pipeline = StableDiffusion3Pipeline.from_pretrained(model)
    noise = generate.make_noise((1, 4, 8, 8), [generate.seeded(0, index) for index in range(6)])
    options = {"num_inference_steps": 2, "guidance_scale": guidance_scale, "max_sequence_length": 8}
    expected = pipeline(PROMPTS * 2, latents=noise, **options).images
    assert np.abs(read(folder) - np.stack([np.array(image) for image in expected])).max() <= 1

    monkeypatch.setattr(StableDiffusion3Pipeline, "encode_prompt", spied_encode)
    monkeypatch.setattr(generate, "PIECE", 2)  # a batch
    assert np.array_equal(read(sample(*flags, name="pieces")), read(folder))
    (folder / "000003.png").unlink()
    encoded.clear()
    sample(*flags)
    assert encoded == [*unguided, PROMPTS[2], PROMPTS[0]]  # of images 2 and 3, which are one batch
    assert np.array_equal(read(folder), read(folder.parent / "pieces"))


# ------------------------------------------------------------------------------------------------------------- figures


class Pool(torch.nn.Module):
    """Twelve features, the mean colours of the image's quarters, and logits of dark and bright."""

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        bright = images.mean(dim=(1, 2, 3)) / 255 - 0.5
        logits = torch.stack([-1000 * bright, 1000 * bright], dim=1)
        return torch.nn.functional.adaptive_avg_pool2d(images, 2).flatten(1) / 255, logits


@pytest.fixture(scope="session")
def pool(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pool") / "pool.pt"
    torch.jit.script(Pool()).save(str(path))
    return path


@pytest.fixture(scope="session")
def noise(tmp_path_factory) -> dict[str, Path]:
    """Two folders of 60 coloured images of noise, 12 x 12, of different brightness."""
    root, random = tmp_path_factory.mktemp("noise"), np.random.default_rng(0)
    for name, low, high in (("a", 0, 200), ("b", 90, 256)):
        (root / name).mkdir()
        for index in range(60):
            pixels = random.integers(low, high, (4, 4, 3)).repeat(3, 0).repeat(3, 1).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{index:03d}.png")
    return {"a": root / "a", "b": root / "b"}


@pytest.fixture
def score(tmp_path, monkeypatch):
    """`score(*flags)` runs evaluate.py and returns its results, and results["text"], the Markdown."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))

    def evaluate_into(*flags, output: str = "results") -> dict:
        command = ["--output", tmp_path / output, "--statistics_dir", tmp_path / "statistics", *flags]
        evaluate.main(evaluate.parse_args([str(part) for part in command]))
        results = json.loads((tmp_path / f"{output}.json").read_text())
        return {**results, "text": (tmp_path / f"{output}.md").read_text()}

    return evaluate_into


def test_frechet_distance_of_known_gaussians():
    random = np.random.default_rng(0)
    basis = np.linalg.qr(random.normal(size=(6, 6)))[0]
    first, second = random.uniform(0.1, 4, 6), random.uniform(0.1, 4, 6)
    # Covariances with the same axes: the square roots of the variances are compared.
    a, b = basis * first @ basis.T, basis * second @ basis.T
    shift = random.normal(size=6)
    expected = np.square(shift).sum() + np.square(np.sqrt(first) - np.sqrt(second)).sum()
    assert figures.frechet_distance(shift, a, np.zeros(6), b) == pytest.approx(expected, rel=1e-9)
    # Any two covariances, compared with clean-fid's matrix root.
    c = np.cov(random.normal(size=(6, 50)))
    expected = fid.frechet_distance(shift, a, np.ones(6), c)
    assert figures.frechet_distance(shift, a, np.ones(6), c) == pytest.approx(expected, rel=1e-6)
    singular = np.diag([1.0, 0, 0, 0, 0, 0])
    assert figures.frechet_distance(shift, singular, shift, singular) == pytest.approx(0, abs=1e-9)


def test_distances_equal_those_of_clean_fid(score, noise, pool):
    """From files to distances: decoding, resizing, features."""
    model = torch.jit.load(str(pool))
    extract = {"device": torch.device("cpu"), "num_workers": 0, "verbose": False, "mode": "clean"}
    folders = [str(noise[name]) for name in "ab"]
    expected = fid.compute_fid(*folders, custom_feat_extractor=lambda images: model(images)[0], **extract)
    features = [fid.get_folder_features(folder, lambda images: model(images)[0], **extract) for folder in folders]
    np.random.seed(0)
    kid = fid.kernel_distance(features[1], features[0])

    results = score("--images", noise["a"], "--reference", noise["b"], "--features", pool, "--features_size", 299)
    row = results["rows"][0]
    assert expected > 0.1 and row["fid"] == pytest.approx(expected, rel=1e-5)
    assert kid > 0.01 and row["kid"] == pytest.approx(kid, rel=0.2)  # other subsets
    np.random.seed(0)
    images, reference = (part.astype(np.float64) for part in features)
    assert row["kid"] == pytest.approx(fid.kernel_distance(images, reference), rel=1e-5)
    assert "pool.pt at 299 px" in results["text"] and "Not Inception FID" in results["text"]
    assert "| FID |" not in results["text"] and "Fréchet distance" in results["text"]
    assert "| 60 | 60 | fewer than 10,000 images make it too high |" in results["text"]


def test_identical_folders(score, noise, pool, tmp_path):
    twin = shutil.copytree(noise["a"], tmp_path / "twin")
    flags = ("--reference", noise["a"], "--features", pool, "--num_workers", 1)
    same, other = score("--images", twin, noise["b"], *flags)["rows"]
    assert same["name"] == "twin" and other["name"] == "b" and same["images"] == 60
    assert abs(same["fid"]) < 1e-9 < 0.1 < other["fid"]
    assert same["kid"] < 1e-3 < other["kid"]
    assert same["precision"] == same["recall"] == 1 and other["precision"] < 0.5
    assert same["size"] == [12, 12]


def test_inception_score(score, tmp_path, pool):
    """Half of the images surely dark, half surely bright: two classes. All dark: one."""
    for name, levels in (("two", (20, 230)), ("one", (20, 30))):
        (tmp_path / name).mkdir()
        for index in range(200):
            Image.new("RGB", (4, 4), (levels[index % 2],) * 3).save(tmp_path / name / f"{index}.png")
    flags = ("--features", pool, "--metrics", "inception_score")  # which need no reference
    results = score("--images", tmp_path / "two", tmp_path / "one", *flags)
    two, one = results["rows"]
    assert results["reference"] is None and two["fid"] is None and "Reference:" not in results["text"]
    assert two["samples"]["inception_score"] == [200, None]
    assert two["inception_score"] == pytest.approx(2, abs=0.06)  # of 20 images at a time, not quite half each
    assert one["inception_score"] == pytest.approx(1)


def test_statistics_are_kept_and_used_again(score, noise, pool, tmp_path, monkeypatch):
    reference = shutil.copytree(noise["b"], tmp_path / "reference")
    measured, measure = [], evaluate.measure
    monkeypatch.setattr(
        evaluate, "measure", lambda images, *rest: measured.append(len(images)) or measure(images, *rest)
    )
    flags = ("--images", noise["a"], "--features", pool, "--reference")
    first = score(*flags, reference)
    assert measured == [60, 60]
    again = score(*flags, reference)
    kept = list((tmp_path / "statistics").iterdir())
    assert measured == [60, 60, 60] and len(kept) == 1
    by_name = score(*flags, kept[0])
    for row in (again["rows"][0], by_name["rows"][0]):
        assert {key: row[key] for key in ("fid", "kid", "precision", "recall")} == {
            key: first["rows"][0][key] for key in ("fid", "kid", "precision", "recall")
        }
    (reference / "000.png").unlink()  # other contents need other statistics
    assert score(*flags, reference)["reference"]["images"] == 59
    score(*flags, reference, "--features_size", 8)
    score(*flags, reference, "--features_size", 8, "--reference_resolution", 6)
    assert len(list((tmp_path / "statistics").iterdir())) == 4

    twice = tmp_path / "twice.pt"  # another extractor
    torch.jit.script(torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())).save(str(twice))
    with pytest.raises(SystemExit, match="features of another network"):
        score("--images", noise["a"], "--reference", kept[0], "--features", twice)
    with np.load(kept[0]) as file:
        np.savez(tmp_path / "foreign.npz", mu=file["mu"], sigma=file["sigma"])  # as other programs save them
    with pytest.raises(
        SystemExit, match=r"--reference_resolution 6 is not that of .*, which was made with None; drop"
    ):
        score(*flags, kept[0], "--reference_resolution", 6)
    foreign = score(*flags, tmp_path / "foreign.npz")
    assert foreign["rows"][0]["fid"] == pytest.approx(first["rows"][0]["fid"])
    assert foreign["rows"][0]["kid"] is None and "come without features" in foreign["text"]
    assert "the reference's statistics are of another program, which may resize otherwise" in foreign["text"]
    assert "of another program" not in score(*flags, kept[0])["text"]


def test_some_features_of_large_sets_are_kept(score, noise, pool, tmp_path, monkeypatch):
    """FID uses all images, KID a part of them."""
    flags = ("--images", noise["a"], "--reference", noise["b"], "--features", pool, "--batch_size", 7)
    whole = score(*flags)["rows"][0]
    shutil.rmtree(tmp_path / "statistics")
    monkeypatch.setattr(evaluate, "KEPT", 25)
    part, again = score(*flags), score(*flags)  # the second time from the file
    (path,) = (tmp_path / "statistics").iterdir()
    with np.load(path) as file:
        assert file["feats"].shape == (25, 12) and file["count"] == 60
    for results in (part, again):
        assert results["rows"][0]["fid"] == pytest.approx(whole["fid"]) and results["reference"]["images"] == 60
        assert results["rows"][0]["kid"] == part["rows"][0]["kid"] != whole["kid"]


def test_reference_from_a_dataset(score, noise, pool, monkeypatch):
    paths = [str(path) for path in sorted(noise["b"].iterdir())]
    data = datasets.Dataset.from_dict({"image": paths, "label": [0] * 60}).cast_column("image", datasets.Image())
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: data)
    data = data.add_column("other", [{"bytes": b"no image", "path": None}] * 60).cast_column("other", datasets.Image())
    flags = ("--images", noise["a"], "--features", pool)
    dataset, folder = (score(*flags, "--reference", source) for source in ("owner/name", noise["b"]))
    assert dataset["rows"][0]["fid"] == pytest.approx(folder["rows"][0]["fid"])
    assert dataset["reference"] == {**folder["reference"], "source": "owner/name"}
    for column, message in (
        ("picture", "choose one of image, label, other"),
        ("label", "pass the column of the images"),
    ):
        with pytest.raises(SystemExit, match=f"--image_column {column} .*{message}"):
            score(*flags, "--reference", "owner/name", "--image_column", column)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: data.select([]))
    with pytest.raises(SystemExit, match=r"^error: --reference owner/name holds 0 images; pass at least 2"):
        score(*flags, "--reference", "owner/name")


def test_a_file_of_another_inception_is_none(score, noise, pool):
    """Whatever its name: only features by the published one give an FID."""
    path = shutil.copy(pool, pool.parent / "InceptionV3-of-mine.pt")
    results = score("--images", noise["a"], "--reference", noise["b"], "--features", path)
    assert "Not Inception FID" in results["text"] and "| FID |" not in results["text"]


class FakeInception(torch.nn.Module):
    """The interface of the file that clean-fid loads: `layers` gives 2048 features, the whole probabilities."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten(), torch.nn.Linear(48, 2048))
        self.output = torch.nn.Linear(2048, 3)

    def forward(self, images: torch.Tensor, return_features: bool = False, no_output_bias: bool = False):
        features = self.layers((images - 128) / 128)
        if return_features:
            return features
        bias = None if no_output_bias else self.output.bias
        return torch.nn.functional.linear(features, self.output.weight, bias).softmax(1)


def test_inception_by_clean_fid(score, noise, tmp_path, monkeypatch):
    """Logits take a pass of their own, which only images whose score is asked for have."""
    torch.manual_seed(0)
    asked, measure = [], evaluate.measure

    def record(*options) -> figures.Statistics:
        asked.append((options[2].split()[0], *options[5:]))
        return measure(*options)

    monkeypatch.setattr(evaluate, "measure", record)
    path = tmp_path / "hub" / "checkpoints" / "inception-2015-12-05.pt"
    path.parent.mkdir(parents=True)
    torch.jit.script(FakeInception()).save(str(path))
    results = score("--images", noise["a"], "--reference", noise["b"])
    row = results["rows"][0]
    assert results["extractor"]["name"] == "Inception (clean-fid)" and results["extractor"]["dimensions"] == 2048
    assert row["fid"] is None and row["samples"]["fid"] == [60, 60]
    assert row["remarks"][0] == "FID: not measured: too few images for a covariance of 2,048 features"
    wrapper = InceptionV3W(str(path.parent), download=False)
    extract = {"device": torch.device("cpu"), "num_workers": 0, "verbose": False}
    features = [fid.get_folder_features(str(noise[name]), wrapper, **extract).astype(float) for name in "ab"]
    np.random.seed(0)
    assert row["kid"] == pytest.approx(fid.kernel_distance(*features), rel=1e-4)
    assert row["inception_score"] > 1 and "| IS |" in results["text"] and "| KID · 10³ |" in results["text"]
    assert "Not Inception FID" not in results["text"]
    score("--images", noise["a"], "--reference", noise["b"], "--metrics", "kid", output="again")
    assert asked == [("--reference",), ("--images", True), ("--images", False)]


def test_inception_that_cannot_be_downloaded(score, noise, tmp_path, monkeypatch):
    def no_network(folder):
        Path(folder, "inception-2015-12-05.pt").write_bytes(b"the first half")
        raise URLError("no network")

    monkeypatch.setattr(cleanfid.downloads_helper, "check_download_inception", no_network)
    with pytest.raises(SystemExit, match=r"put https://.*/inception-2015-12-05.pt there, or pass --features"):
        score("--images", noise["a"], "--reference", noise["b"])
    assert not list((tmp_path / "hub" / "checkpoints").iterdir())


def test_published_statistics(score, noise, pool, tmp_path, monkeypatch):
    path = tmp_path / "inception-2015-12-05.pt"
    torch.manual_seed(0)
    torch.jit.script(FakeInception()).save(str(path))
    features, downloads = np.random.default_rng(0).normal(size=(50, 2048)), []

    def fetch(local_folder, url):
        downloads.append(url.rsplit("/", 1)[1])
        np.savez(tmp_path / "published.npz", feats=features, mu=features.mean(0), sigma=np.cov(features.T))
        return str(tmp_path / "published.npz")

    monkeypatch.setattr(cleanfid.features, "check_download_url", fetch)
    flags = ("--images", noise["a"], "--inception", tmp_path, "--reference")
    assert score(*flags, "clean-fid:cifar10:32:train")["rows"][0]["kid"] is not None
    assert downloads == ["cifar10_clean_train_32.npz", "cifar10_clean_train_32_kid.npz"]

    def fetch_moments(local_folder, url):  # of all but three sets clean-fid has no features
        if url.endswith("_kid.npz"):
            raise HTTPError(url, status, "Not Found", None, None)
        return fetch(local_folder, url)

    monkeypatch.setattr(cleanfid.features, "check_download_url", fetch_moments)
    status = 404
    results = score(*flags, "clean-fid:cifar10:32:train", "--metrics", "fid", "kid")
    assert results["rows"][0]["kid"] is None and "statistics come without features" in results["text"]
    assert "of another program" not in results["text"]
    status = 503
    with pytest.raises(SystemExit, match="cannot be downloaded: HTTP Error 503"):
        score(*flags, "clean-fid:cifar10:32:train")


def test_published_statistics_that_were_not_downloaded_whole(score, noise, tmp_path, monkeypatch):
    """clean-fid keeps what a download that was broken off has left, and never asks for it again."""
    torch.manual_seed(0)
    torch.jit.script(FakeInception()).save(str(tmp_path / "inception-2015-12-05.pt"))
    monkeypatch.setattr(cleanfid, "__file__", str(tmp_path / "cleanfid" / "__init__.py"))
    half, other = (tmp_path / "cleanfid" / "stats" / f"{name}_clean_train_32.npz" for name in ("cifar10", "other"))
    half.parent.mkdir(parents=True)
    for path in (half, other):
        path.write_bytes(b"PK\x03\x04 half a file")
    with pytest.raises(SystemExit, match="was not downloaded whole; what there was is removed, run the command again"):
        score("--images", noise["a"], "--inception", tmp_path, "--reference", "clean-fid:CIFAR10:32:train")
    assert not half.exists() and other.exists()


def test_what_the_last_network_lacks_is_said_before_the_first(score, noise, pool, tmp_path):
    flags = ("--images", noise["a"], "--reference", noise["b"], "--features", pool, "--metrics", "fid")
    with pytest.raises(SystemExit, match="--dinov2_model /no/such does not load"):
        score(*flags, "fd_dinov2", "--dinov2_model", "/no/such")
    assert not (tmp_path / "statistics").exists()  # as they would be after the first


def test_what_is_measured_is_kept_when_the_next_network_fails(score, noise, pool, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "check_networks", lambda args: None)
    flags = ("--images", noise["a"], "--reference", noise["b"], "--features", pool, "--metrics", "fid")
    with pytest.raises(SystemExit, match="--dinov2_model /no/such does not load"):
        score(*flags, "fd_dinov2", "--dinov2_model", "/no/such")
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["metrics"] == ["fid"] and results["rows"][0]["fid"] > 0
    assert "fd_dinov2" not in (tmp_path / "results.md").read_text()


@pytest.mark.parametrize("output", [".", "results.json"])
def test_names_that_no_suffix_can_follow(noise, output):
    with pytest.raises(SystemExit, match=rf"--output {re.escape(output)} is no name that \.json and \.md can follow"):
        evaluate.parse_args(["--images", str(noise["a"]), "--reference", "x", "--output", output])


def test_folders_are_those_that_are_trained_on(noise, tmp_path):
    """Links are followed, as to classes of a larger set; what is hidden is no image of it."""
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "class").symlink_to(noise["a"])
    shutil.copytree(noise["b"], tmp_path / "set" / ".thumbnails")
    files = evaluate.list_images(tmp_path / "set", "--reference")
    assert [path.parent.name for path in files] == ["class"] * 60


def test_images_of_another_size_than_the_reference(score, noise, pool, tmp_path):
    """Networks resize both, so nothing else would show it."""
    (tmp_path / "large").mkdir()
    for path in noise["a"].iterdir():
        with Image.open(path) as image:
            image.resize((24, 24)).save(tmp_path / "large" / path.name)
    flags = (
        "--features",
        pool,
        "--features_size",
        12,
        "--metrics",
        "kid",
        "inception_score",
        "--reference",
        noise["b"],
    )
    large, alike = score("--images", tmp_path / "large", noise["a"], *flags)["rows"]
    assert large["warnings"]["kid"].endswith("sizes differ, 24x24 and the reference 12x12")
    assert "sizes differ" not in str(alike) + str(large["warnings"].get("inception_score"))


def test_workers_hold_few_files_open(score, noise, pool):
    """Each tensor that a worker sends is an open file of this process, which may have 1,024 of them."""
    flags = ("--images", noise["a"], "--reference", noise["b"], "--features", pool, "--metrics", "fid")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = len(list(Path("/proc/self/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (opened + 60, limits[1]))
    try:
        row = score(*flags, "--num_workers", 2, "--batch_size", 60)["rows"][0]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert row["fid"] == pytest.approx(score(*flags)["rows"][0]["fid"])


def save_often(path: Path, seed: int) -> None:
    random = np.random.default_rng(seed)
    for _ in range(30):
        features = random.normal(size=(50, 40))
        moments = features.mean(0), np.cov(features.T)
        evaluate.save_statistics(path, figures.Statistics(50, [8, 8], *moments, features, None, "x"), {"a": 1})


def test_statistics_written_by_two_processes_at_once(tmp_path):
    path = tmp_path / "statistics.npz"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=save_often, args=(path, seed)) for seed in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert [found.name for found in tmp_path.iterdir()] == ["statistics.npz"]
    with np.load(path) as file:
        assert np.allclose(file["feats"].mean(0), file["mu"])


@pytest.fixture(scope="session")
def clip(tmp_path_factory, sd_teacher) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = CLIPTokenizer.from_pretrained(sd_teacher / "tokenizer")
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = CLIPConfig(
        text_config={**shape, **ends, "vocab_size": len(tokenizer), "max_position_embeddings": 24},
        vision_config={**shape, "image_size": 32, "patch_size": 8},
        projection_dim=8,
    )
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder)
    return folder


def test_clip_score_and_pickscore(score, sample, models, clip, tmp_path):
    images = sample(*models["sd"], "--num_images", 5)
    flags = (
        "--images",
        images,
        "--metrics",
        "clip_score",
        "pickscore",
        "--clip_model",
        clip,
        "--pickscore_model",
        clip,
    )
    row = score(*flags, "--batch_size", 2)["rows"][0]
    model = CLIPModel.from_pretrained(clip).eval()
    tokenizer, processor = CLIPTokenizer.from_pretrained(clip), CLIPImageProcessor.from_pretrained(clip)
    cosines, logits = [], []
    for index, prompt in enumerate([*PROMPTS, *PROMPTS][:5]):
        pixels = processor(images=Image.open(images / f"{index:06d}.png"), return_tensors="pt")
        output = model(**tokenizer(prompt, return_tensors="pt"), **pixels)
        cosines.append((output.image_embeds * output.text_embeds).sum().item())  # both of length 1
        logits.append(output.logits_per_image.item())  # what PickScore's authors call the score
    assert row["clip_score"] == pytest.approx(np.mean(cosines), abs=1e-5) and np.std(cosines) > 1e-4
    assert row["pickscore"] == pytest.approx(np.mean(logits), rel=1e-4) and np.mean(logits) != np.mean(cosines)
    (tmp_path / "plain").mkdir()
    for path in sorted(images.glob("*.png")):
        shutil.copy(path, tmp_path / "plain")
    plain, generated = score("--images", tmp_path / "plain", *flags[1:], "--num_workers", 1)["rows"]
    assert plain["clip_score"] is None and generated["clip_score"] == pytest.approx(row["clip_score"])
    assert set(plain["warnings"].values()) == {"not measured: the folder has no prompts"}
    error = np.std(cosines, ddof=1) / 5**0.5
    assert generated["warnings"]["clip_score"] == f"fewer than 1,000 images: standard error {error:.2g}"


def test_table_of_several_students(score, sample, models, pool, images):
    """The settings of each manifest are shown too, in tables of at most six columns."""
    teacher = sample(*models["pixels"], "--num_images", 20, name="teacher")
    student = sample(*models["pixels"], "--num_images", 20, "--seed", 1, "--sampler", "ddpm", name="student")
    results = score("--images", teacher, student, "--reference", images, "--features", pool)
    tables = read_tables(results["text"])
    measured, settings = tables
    assert measured[0] == ["metric", "images", "value", "samples", "reference", "warning"]
    assert [row[0] for row in measured[1::2]] == [
        *("Fréchet distance", "kernel distance · 10³", "score", "precision", "recall"),
    ]
    first, second = results["rows"]
    assert measured[2] == [
        *("Fréchet distance", "student", f"{second['fid']:.2f}", "20", "96"),
        "fewer than 10,000 images make it too high",
    ]
    assert measured[5][3:5] == ["20", "–"]  # a score of the images alone
    assert settings[2] == ["student", "ddpm", "2", "1", "float32"]
    assert (first["sampler"], first["seed"], second["sampler"], second["seed"]) == ("ddim", 0, "ddpm", 1)
    assert first["contents"] == second["contents"] and first["versions"]["diffusers"]
    assert results["versions"]["clean-fid"] and first["remarks"][-1].startswith("precision, recall: fewer than")


def test_reference_of_mixed_sizes_is_cropped(score, noise, pool, tmp_path):
    """`--reference_resolution` resizes the shorter side and crops the longer one at its centre."""
    (tmp_path / "wide").mkdir()
    (tmp_path / "square").mkdir()
    for index in range(20):
        image = Image.open(noise["b"] / f"{index:03d}.png")
        image.save(tmp_path / "square" / f"{index}.png")
        frame = Image.new("RGB", (12 + 2 * (index + 1), 12))
        frame.paste(image, (index + 1, 0))
        frame.save(tmp_path / "wide" / f"{index}.png")
    flags = ("--images", noise["a"], "--features", pool, "--reference_resolution", 12, "--reference")
    wide, square = (score(*flags, tmp_path / name)["rows"][0] for name in ("wide", "square"))
    assert wide["fid"] == pytest.approx(square["fid"]) and wide["fid"] > 0.1


@pytest.mark.parametrize("filter", [None, "bicubic"])
def test_the_reference_is_resized_as_images_of_the_training(score, noise, pool, images, tmp_path, filter):
    """Or as those of `--resize`: another filter would count against every model."""
    (tmp_path / "small").mkdir()
    for path in images.iterdir():
        record = {"path": str(path), "bytes": None}
        (pixels,) = load_pixels([record], "RGB", 11)
        small = Image.fromarray(pixels.permute(1, 2, 0).numpy())
        if filter is not None:
            (small,) = generate.resize_images([open_image(record, "RGB")], 11)
        small.save(tmp_path / "small" / path.name)
    flags = ("--images", tmp_path / "small", "--features", pool, "--reference_resolution", 11)
    flags += ("--reference_filter", filter) if filter else ()
    assert score(*flags, "--reference", images)["rows"][0]["fid"] == pytest.approx(0, abs=1e-6)
    others = ("--reference_filter", "lanczos" if filter else "bicubic")
    assert score(*flags, *others, "--reference", images)["rows"][0]["fid"] > 1e-4
    kept = sorted((tmp_path / "statistics").iterdir(), key=os.path.getmtime)
    assert len(kept) == 2
    with pytest.raises(SystemExit, match=f"was resized by {others[1]}; pass --reference_filter {others[1]}, or the"):
        score(*flags, "--reference", kept[1])


# -------------------------------------------------------------------------------------------------------------- report


@pytest.fixture(scope="session")
def students(tmp_path_factory, teacher) -> list[Path]:
    """A narrower U-Net with metrics of a run, and the teacher's twin."""
    root = tmp_path_factory.mktemp("students")
    torch.manual_seed(1)
    narrow = UNet2DModel(**{**TINY_UNET, "block_out_channels": [8, 16]})
    DDPMPipeline(narrow, DDPMScheduler()).save_pretrained(root / "narrow")
    rows = [{"step": step, "loss": 1 / step, "coarse": 2 / step, "weight": 0.5} for step in range(1, 9)]
    (root / "narrow" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copytree(teacher, root / "twin")
    return [root / "narrow", root / "twin"]


class Page(HTMLParser):
    """The sources, headings and tables of a page, and the order of its headings, pictures and tables."""

    def __init__(self, text: str):
        super().__init__()
        self.sources, self.headings, self.tables, self.open, self.order = [], [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.sources += [value for name, value in attributes if name in ("src", "href")]
        self.open.append(tag)
        if tag in ("h2", "img", "table"):
            self.order.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        assert tag in self.open, f"</{tag}> without <{tag}>"
        while self.open.pop() != tag:
            pass

    def handle_data(self, data):
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data


@pytest.fixture
def write_report(tmp_path, costs_here):
    """`write_report(teacher, students, *flags)` returns the folder; costs are measured in this process, for speed."""

    def write_into(teacher, students, *flags, steps: int = 2) -> Path:
        command = ["--teacher", teacher, "--students", *students, "--output_dir", tmp_path / "report"]
        command += ["--num_inference_steps", steps, "--columns", 3, "--timesteps", 4, "--latency_images", 1, *flags]
        report.main(report.parse_args([str(part) for part in command]))
        return tmp_path / "report"

    return write_into


def test_report_of_pixels(write_report, sample, score, images, pool, teacher, students, tmp_path):
    """As a user does it: generate images, measure them, write the report."""
    folders = [sample("--model", model, "--num_images", 20, name=model.name) for model in (teacher, *students)]
    (tmp_path / "real").mkdir()
    for path in sorted(images.iterdir())[:20]:
        shutil.copy(path, tmp_path / "real")
    score("--images", tmp_path / "real", *folders, "--reference", images, "--features", pool)
    flags = ("--images", images, "--timesteps", 10, "--title", "A <title>")
    write_report(teacher, students, "--results", tmp_path / "results.json", *flags)

    text = (tmp_path / "report" / "index.html").read_text()
    page = Page(text)
    assert not page.open[:-1] and page.headings[:2] == ["Teacher and students", "All figures"]
    assert page.order[:6] == ["h2", "img", "table", "h2", "table", "table"]  # the samples and their table come first
    pictures = sorted((tmp_path / "report").glob("*.png"))
    assert [path.name for path in pictures] == ["curves.png", "errors.png", "groups.png", "samples.png"]
    assert len(page.sources) == 4 and all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert not re.search(r"https?://|@import|url\(", text) and "<h1>A &lt;title&gt;</h1>" in text

    assert all(len(row) <= 6 for table in page.tables for row in table)
    summary, quality, costs = ({row[0]: dict(zip(table[0], row)) for row in table[1:]} for table in page.tables)
    assert list(summary) == list(quality) == ["real", "teacher", "narrow", "twin"]
    assert list(costs) == ["teacher", "narrow", "twin"]
    assert quality["real"]["images"] == quality["twin"]["images"] == "20"
    assert summary["real"]["time per image (speed-up)"] == summary["real"]["quality"] == "–"
    measured = {row["contents"]: row for row in json.loads((tmp_path / "results.json").read_text())["rows"]}
    wide, narrow = (UNet2DModel.from_pretrained(model / "unet").num_parameters() for model in (teacher, students[0]))
    assert costs["teacher"]["parameters"] == f"{wide:,}" and costs["narrow"]["parameters"] == f"{narrow:,}"
    assert summary["narrow"]["size (share of the teacher)"].endswith(f"k ({narrow / wide:.1%})")
    distances = [measured[manifest(folder)["contents"]]["fid"] for folder in folders]
    shown = [summary[name]["Fréchet distance"] for name in ("teacher", "narrow", "twin")]
    assert shown == [f"{distance:.2f}" for distance in distances] and shown[1] != shown[0]
    assert summary["twin"]["quality"] == "close to the teacher" and summary["real"]["quality"] == "–"
    assert summary["narrow"]["quality"] == result_tables.quality_in_words(distances[1], distances[0], "the teacher")
    assert "not Inception FID" in text and "up to 1.1: close to" in text

    markdown = (tmp_path / "report" / "report.md").read_text()
    assert read_tables(markdown) == page.tables
    assert re.findall(r"^## (.*)", markdown, re.M) == page.headings and markdown.startswith("# A <title>\n")
    assert sorted(re.findall(r"\]\((.*)\)", markdown)) == [path.name for path in pictures]

    summary = json.loads((tmp_path / "report" / "report.json").read_text())
    facts = summary["facts"]
    assert facts["twin"]["macs"] == facts["teacher"]["macs"] > 2 * facts["narrow"]["macs"]
    assert all(0.001 < fact["seconds"] < 60 for fact in facts.values())
    assert summary["timesteps"] == [50, 150, 250, 350, 450, 550, 650, 750, 850, 950]
    assert summary["errors"]["twin"] == [0] * 10 and min(summary["errors"]["narrow"]) > 1e-4


@pytest.mark.parametrize(
    ("distance", "words"),
    [
        (-0.1, "better"),
        (1.8, "better"),
        (1.81, "close to"),
        (2.2, "close to"),
        (2.21, "slightly worse"),
        (3.0, "slightly worse"),
        (3.01, "worse"),
        (6.0, "worse"),
        (6.01, "much worse"),
    ],
)
def test_quality_in_words(distance, words):
    """Distances compared with a distance of 2."""
    expected = f"{words} than the teacher".replace("to than", "to")
    assert result_tables.quality_in_words(distance, 2.0, "the teacher") == expected


def test_quality_in_words_needs_a_positive_distance():
    assert result_tables.quality_in_words(0.1, -0.1, "the teacher") == "–"
    assert result_tables.quality_in_words(0.1, 0.0, "the teacher") == "–"


def make_results(**distances: tuple[float | None, float | None]) -> tuple[dict[str, dict], dict[str, dict]]:
    """Facts of the models "teacher" and "student", and rows with these Fréchet and kernel distances."""
    costs = {"macs": 2_000_000, "seconds": 0.5, "bytes": 3 * 2**20}
    facts = {"teacher": {**costs, "parameters": 4_000_000}, "student": {**costs, "parameters": 9_996, "seconds": 0.2}}
    rows = {name: {"images": 1000, "fid": fid, "kid": kid, "remarks": []} for name, (fid, kid) in distances.items()}
    return facts, rows


def test_tables_of_the_report():
    """The student is compared with the teacher, the teacher with the real images of the smallest distance."""
    facts, rows = make_results(decoded=(2, 0.1), real=(0.5, -0.01), teacher=(3, 0.2), student=(5, 0.21))
    summary, quality, costs = result_tables.make_tables(facts, rows, inception=False)
    head, decoded, real, teacher, student = summary
    assert head == [
        *("model", "size (share of the teacher)", "time per image (speed-up)"),
        *("Fréchet distance", "kernel distance · 10³", "quality"),
    ]
    assert decoded == ["decoded", "–", "–", "2.00", "100", "–"] and real[-2:] == ["-10", "–"]
    assert teacher == ["teacher", "4M (100.0%)", "0.5 s (1.0×)", "3.00", "200", "much worse than real images"]
    assert student == ["student", "10k (0.2%)", "0.2 s (2.5×)", "5.00", "210", "worse than the teacher"]
    assert quality == [["model", "images"], *([name, "1,000"] for name in rows)]
    assert costs[0] == ["model", "parameters", "GMACs per pass", "time per image", "peak memory"]
    assert costs[2] == ["student", "9,996", "0.002", "0.2 s", "3 MiB"]
    (rule,) = result_tables.judge(facts, rows)[1]
    assert "a student's Fréchet distance divided by the teacher's" in rule and "(the row real)" in rule
    for limit, words in list(result_tables.WORDS.items())[:-1]:
        assert f"p to {limit}: {words}" in rule

    # Without a Fréchet distance of the teacher, and without real images: by kernel distance.
    facts, rows = make_results(teacher=(None, 0.2), student=(5, 0.21))
    summary = result_tables.make_tables(facts, rows, inception=True)[0]
    assert summary[0][3:] == ["FID", "KID · 10³", "quality"]
    assert [row[-1] for row in summary[1:]] == ["–", "close to the teacher"]
    assert "a student's kernel distance" in result_tables.judge(facts, rows)[1][0]

    facts, rows = make_results(student=(5, 0.21))  # no row of the teacher
    summary = result_tables.make_tables(facts, rows, inception=False)[0]
    assert summary[0][-1] == "kernel distance · 10³" and result_tables.judge(facts, rows) == ({}, [])
    summary, quality, costs = result_tables.make_tables(facts, {}, inception=False)  # no results
    assert len(summary[0]) == 3 and quality == [] and len(costs) == 3


RESULTS = sorted(path.parent for path in (ROOT / "demos" / "results").glob("*/results.md"))


@pytest.mark.parametrize("folder", RESULTS, ids=lambda folder: folder.name)
def test_stored_tables_are_made_from_the_stored_numbers(folder):
    tables = result_tables.tables_from_files(folder / "report.json", folder / "quality.json")
    assert all(len(row) <= 6 for table in tables for row in table)
    text = (folder / "results.md").read_text()
    results = json.loads((folder / "quality.json").read_text())
    rows = {row["name"]: row for row in results["rows"]}
    facts = json.loads((folder / "report.json").read_text())["facts"]
    *_, last = facts
    seeds = len([name for name in rows if name.rpartition("-")[0] == last.removesuffix("-0")])
    first, heading, rest = text.partition(f"## All {seeds} seeds")
    assert read_tables(first) == tables
    assert all(result_tables.as_markdown(table) in first for table in tables)
    assert bool(heading) == (seeds > 1)
    if heading:
        assert (heading + rest).startswith(demo.compare_seeds(rows, [*facts][1:], seeds))
    shown = {name: row for name, row in rows.items() if row["contents"] is None or name in facts}
    for remark in [*result_tables.judge(facts, shown)[1], *report.quality_notes(shown, results)]:
        assert f"- {remark}\n" in text


def test_report_in_a_browser(write_report, teacher, students, tmp_path):
    """In Chromium all pictures decode and nothing is wider than the window, of a desktop or of a phone."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("needs Chromium, Debian's package chromium")
    page = write_report(teacher, students) / "index.html"
    script = """<script>addEventListener("load", () => { document.body.innerHTML = JSON.stringify({
        pictures: [...document.images].map((image) => image.complete && image.naturalWidth),
        inside: document.documentElement.scrollWidth <= innerWidth,
        headings: [...document.querySelectorAll("h2")].map((heading) => heading.getBoundingClientRect().top) }); });
        </script>"""
    (tmp_path / "probe.html").write_text(page.read_text().replace("</body>", f"{script}</body>"))
    for width in (1280, 500):
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"]
        command += ["--disable-background-networking", "--disable-component-update", f"--window-size={width},900"]
        command += [f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", (tmp_path / "probe.html").as_uri()]
        finished = subprocess.run(command, capture_output=True, text=True, timeout=120)
        layout = json.loads(re.search(r"<body>(\{.*\})</body>", finished.stdout, re.S)[1])
        widths = [
            Image.open(page.with_name(f"{name}.png")).width for name in ("samples", "curves", "errors", "groups")
        ]
        assert layout["pictures"] == widths and layout["inside"]
        assert len(layout["headings"]) == 5 and layout["headings"] == sorted(layout["headings"])


def test_costs_are_measured_in_a_new_process(teacher, tmp_path):
    command = (
        "--teacher",
        teacher,
        "--students",
        tmp_path / "any",
        "--num_inference_steps",
        2,
        "--output_dir",
        tmp_path,
    )
    args = report.parse_args([str(part) for part in command])
    ballast = torch.ones(2**27)  # 512 MiB of this process, which must not count
    cost = report.measure_costs({"teacher": str(teacher)}, args)["teacher"]
    assert len(ballast) == 2**27 and 2**20 < cost["bytes"] < 2**28 and 0.001 < cost["seconds"] < 60


def test_error_by_timestep_is_what_it_says(write_report, teacher, students, images):
    folder = write_report(teacher, students, "--images", images)
    summary = json.loads((folder / "report.json").read_text())
    clean = [np.array(Image.open(path)) for path in sorted(images.iterdir())[::32]]
    clean = torch.from_numpy(np.stack(clean)).unsqueeze(1).float() / 127.5 - 1
    noise = torch.randn(clean.shape, generator=generate.seeded(0, report.NOISE))
    wide, narrow = (UNet2DModel.from_pretrained(model / "unet").eval() for model in (teacher, students[0]))
    for step, error in zip((125, 375, 625, 875), summary["errors"]["narrow"]):
        noisy = DDPMScheduler().add_noise(clean, noise, torch.tensor([step] * 3))
        with torch.no_grad():
            difference = narrow(noisy, step).sample - wide(noisy, step).sample
        assert error == pytest.approx(difference.square().mean().item(), rel=1e-4)


def test_error_groups_are_those_of_the_loss():
    """A line fitted to each group of the map is the fit of `lift_place_loss`."""
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 8, 8), torch.randn(2, 8, 8)
    groups = report.error_groups(student, teacher, 16)
    parts = lift_place_loss(student[None], teacher[None], group_size=16)
    for channel in range(2):
        for group in range(4):
            inside = groups[channel] == group
            s, t = student[channel][inside], teacher[channel][inside]
            assert len(s) == 16
            slope = ((s - s.mean()) * (t - t.mean())).mean() / (s.var(correction=0) + 1e-7)
            assert parts.slope[0, channel, group].item() == pytest.approx(slope.item(), rel=1e-4)


def test_report_of_each_kind(write_report, sd_teacher, dit, sd3, prompt_file, images, tmp_path):
    sd = save_sd_pipeline(tmp_path / "small-sd", block_out_channels=[8, 8, 16, 16])
    small_dit = save_dit_pipeline(tmp_path / "small-dit", num_layers=1)
    small_sd3 = save_sd3_pipeline(tmp_path / "small-sd3", absent=(3,), num_layers=1)
    for teacher, student, *flags in (
        (sd_teacher, sd, "--prompt_file", prompt_file),
        (dit, small_dit, "--classes", 1, 2, "--images", images),
        (sd3, small_sd3, "--prompt_file", prompt_file),
    ):
        folder = write_report(teacher, [student], *flags)
        summary, text = json.loads((folder / "report.json").read_text()), (folder / "index.html").read_text()
        (errors,) = summary["errors"].values()
        assert len(errors) == 4 and all(0 < error < 100 for error in errors)
        facts = summary["facts"]
        assert facts[student.name]["macs"] < facts["teacher"]["macs"]
        assert facts[student.name]["parameters"] < facts["teacher"]["parameters"]
        assert all(fact["seconds"] > 0 for fact in facts.values())
        assert text.count("data:image/png") == 3 and "No curves" in text and "No quality" in text
        assert ("Prompt 1: a photo of a dark bag" in text) == ("--prompt_file" in flags)
        assert ("have the classes of the samples, which may not be their own" in text) == ("--images" in flags)


def test_a_row_of_the_report_is_of_images_that_were_made_alike(tmp_path):
    comparison = SimpleNamespace(
        contents={"teacher": "y", "student": "x"},
        settings={
            "teacher": ["ddim", 100, None, "fp16", "float32", None],
            "student": ["ddim", 100, None, None, "float32", None],
        },
    )
    made = {"contents": "x", "sampler": "ddim", "guidance_scale": None, "variant": None, "remarks": ["one"]}
    made |= {"dtype": "float32", "resolution": None}
    ten, hundred = ({**made, "name": f"{steps} steps", "num_inference_steps": steps} for steps in (10, 100))
    real = {"name": "real", "contents": None, "remarks": []}

    def find(*rows: dict) -> dict[str, dict]:
        return report.find_rows({"rows": list(rows)}, comparison, tmp_path)

    assert find(ten, hundred, real) == find(hundred, ten, real) == {"real": real, "student": hundred}
    half = {**hundred, "name": "teacher", "contents": "y", "variant": "fp16"}  # --variant is the teacher's alone
    assert find(half, hundred) == {"teacher": half, "student": hundred}
    (row,) = find(ten).values()
    says = "all quality: of images by sampler ddim, num_inference_steps 10, guidance_scale None, variant None"
    says += ", dtype float32, resolution None"
    assert row == {**ten, "remarks": ["one", f"{says}, unlike those shown here"]}
    large = {**hundred, "name": "large", "resolution": 512}
    assert find(large, hundred) == find({**hundred, "dtype": "float16"}, hundred) == {"student": hundred}
    few, many = ({**hundred, "images": count} for count in (10, 50))
    assert find(few, many, ten) == find(many, few) == {"student": many}
    with pytest.raises(SystemExit, match="has several rows of student, 10 steps, 10 steps, and none is made as here;"):
        find(ten, {**ten, "sampler": "ddpm"})


def test_report_of_images_that_are_not_square(write_report, tmp_path):
    for seed, name in enumerate(("teacher", "student")):
        torch.manual_seed(seed)
        DDPMPipeline(UNet2DModel(**{**TINY_UNET, "sample_size": [16, 24]}), DDPMScheduler()).save_pretrained(
            tmp_path / name
        )
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (400, 300)).save(tmp_path / "photos" / "0.png")
    folder = write_report(tmp_path / "teacher", [tmp_path / "student"], "--images", tmp_path / "photos")
    assert "may not be their own" not in (folder / "index.html").read_text()
    assert json.loads((folder / "report.json").read_text())["errors"].keys() == {"student"}
    with Image.open(folder / "groups.png") as picture:
        assert 3 * 24 < picture.width < 3 * 400  # of pixels as the model has them, not as the photograph
    assert {path.name for path in folder.glob("*.png")} >= {"samples.png", "errors.png", "groups.png"}


def test_other_predictions_are_not_shown(write_report, sd_teacher, prompt_file, tmp_path):
    student = save_sd_pipeline(tmp_path / "velocity", prediction_type="v_prediction")
    folder = write_report(sd_teacher, [student], "--prompt_file", prompt_file)
    text = (folder / "index.html").read_text()
    assert "velocity does not predict the same quantity of the same inputs as the teacher" in text
    assert text.count("data:image/png") == 1


def test_students_of_other_conditions_are_counted_by_their_own(write_report, sd_teacher, prompt_file, tmp_path):
    """As of SD 1.x under SD 2.1: their embeddings have other widths."""
    student = save_sd_pipeline(tmp_path / "other", cross_attention_dim=24)
    folder = write_report(sd_teacher, [student], "--prompt_file", prompt_file)
    facts = json.loads((folder / "report.json").read_text())["facts"]
    assert 0 < facts["other"]["macs"] != facts["teacher"]["macs"]


def test_curves_are_smoothed_over_the_last_tenth_of_the_rows_so_far():
    rows = [{"step": step, "task": float(step), "feat": None, "loss": 1.0} for step in range(1, 41)]
    rows[19] |= {"task": math.inf}  # as a gradient of float16 may be
    smoothed = report.smooth(rows)
    assert [row["step"] for row in smoothed] == list(range(1, 41)) and "feat" not in smoothed[0]
    assert smoothed[9]["task"] == 10 and smoothed[24]["task"] == 24.5
    assert smoothed[20]["task"] == 21 and smoothed[39]["task"] == 38.5
    assert smoothed[19]["task"] == 19


def test_runs_of_one_name_have_a_curve_each(tmp_path):
    for seed in (0, 1):
        (tmp_path / f"seed{seed}" / "student").mkdir(parents=True)
        (tmp_path / f"seed{seed}" / "student" / "metrics.jsonl").write_text('{"step": 1}\n')
    runs = [str(tmp_path / f"seed{seed}" / "student") for seed in (0, 1)]
    args = report.parse_args(["--teacher", "t", "--students", "s", "--runs", *runs])
    assert list(args.runs) == ["seed0/student", "seed1/student"]


# -------------------------------------------------------------------------------------------------------------- README


def test_every_flag_of_the_readme_exists(capsys):
    text = (ROOT / "eval" / "README.md").read_text()
    for module in (generate, evaluate, report):
        name = f"eval/{module.__name__}.py"
        commands = re.findall(rf"{name}(?:\\\n|[^\n`])*", text)
        assert commands, name
        with pytest.raises(SystemExit):
            module.parse_args(["--help"])
        known = set(re.findall(r"--[a-z0-9_]+", capsys.readouterr().out))
        for command in commands:
            assert set(re.findall(r"--[a-z0-9_]+", command)) <= known, command


def test_words_of_the_readme_are_those_of_the_report():
    (table,) = [table for table in read_tables((ROOT / "eval" / "README.md").read_text()) if table[0][0] == "ratio"]
    limits = [f"up to {limit}" for limit in list(result_tables.WORDS)[:-1]]
    assert table[1:] == [list(row) for row in zip([*limits, "above"], result_tables.WORDS.values())]


def test_protocols_of_the_readme_are_the_defaults():
    """Sampler, steps and guidance of its commands are the defaults of each kind."""
    text = (ROOT / "eval" / "README.md").read_text()
    commands = re.findall(r"generate\.py(?:\\\n|[^\n`])*", text)
    protocols = set()
    for command in commands:
        if "--num_inference_steps" in command:
            args = generate.parse_args(command.replace("\\\n", " ").split()[1:])
            protocols.add((args.sampler, args.num_inference_steps, args.guidance_scale))
    assert protocols == set(generate.PROTOCOLS.values())
