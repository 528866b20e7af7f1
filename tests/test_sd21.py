"""Stable Diffusion's script: launched as a user does, then the pipelines that it saved are loaded and run."""

import importlib.util
import itertools
import json
import re
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from common import captions
from common.buckets import default_resolution
from common.hub import save_with_variant
from common.pruning import prune_width
from common.students import is_narrower, pair_features
from common.teachers import TeacherSource, load_skeleton

import datasets
import numpy as np
import pytest
import torch
from accelerate import PartialState
from conftest import ROOT, copy_script, digest, launch, metrics, same, weights, widened, without_time
from diffusers import (
    AutoencoderKL,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from full_models import SD21
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train_lift_sd21
from lift_utils import FeatureModel
from tiny_models import save_sd_pipeline
from train_lift_sd21 import STUDENTS


SHORT = [
    *("--train_batch_size", 4, "--gradient_accumulation_steps", 1, "--max_train_steps", 2, "--logging_steps", 1),
    *("--num_inference_steps", 1, "--report_to", "none", "--dataloader_num_workers", 0, "--learning_rate", 1e-3),
]
TEACHER = "--pretrained_teacher_model"
PROMPTS = ("--validation_prompts", "a dark bag")
WIDTHS = [name for name in STUDENTS if name.startswith("width_")]


@pytest.fixture
def distil(run, sd_teacher, captioned, tmp_path):
    """`distil(*flags)` runs two steps into a new folder and returns it."""

    def distil_into(*flags, output_dir=tmp_path / "student") -> Path:
        source = ("--pretrained_teacher_model", sd_teacher, "--train_data_dir", captioned, "--student", "bk_base")
        run("train_lift_sd21", *source, "--output_dir", output_dir, *SHORT, *PROMPTS, *flags)
        return output_dir

    return distil_into


def generate(folder: Path, **options) -> np.ndarray:
    """An image, (32, 32, 3) in [0, 1], by a pipeline folder."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder, **options)
    pipeline.set_progress_bar_config(disable=True)
    side = pipeline.unet.config.sample_size
    # In float32 first: some releases of torch have other random numbers in half precision.
    latents = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(0)).to(pipeline.unet.dtype)
    return pipeline("a photo of a bag", num_inference_steps=2, latents=latents, output_type="np").images[0]


# --------------------------------------------------------------------------------------------------- as a user does it


def test_from_teacher_to_student_by_accelerate_launch(sd_teacher, captioned, tmp_path):
    """In a folder that holds nothing but the script, lift_utils.py and common/."""
    copy_script("train_lift_sd21", tmp_path)
    before = digest(sd_teacher)
    flags = ("--pretrained_teacher_model", sd_teacher, "--student", "bk_base", "--train_data_dir", captioned)
    prompts = ("--validation_prompts", "a dark bag", "a bright sneaker")
    finished = launch(
        *("train_lift_sd21.py", *flags, "--output_dir", "student", *SHORT, *prompts, "--report_to", "tensorboard"),
        cwd=tmp_path,
    )
    assert finished.returncode == 0, finished.stdout
    assert "kd=" in finished.stdout and "feat=" in finished.stdout  # beside the progress bar
    assert digest(sd_teacher) == before

    student = tmp_path / "student"
    assert [row["step"] for row in metrics(student)] == [1, 2]
    logged = {"loss", "task", "kd", "feat", "coarse", "fine", "weight", "lr", "grad_norm", "images_per_second"}
    logged |= {"slope_mean", "slope_std", "intercept_mean", "intercept_std", "skipped"}
    assert logged <= metrics(student)[-1].keys()
    events = EventAccumulator(str(student / "logs" / "lift")).Reload().Tags()
    assert events["images"] == ["samples"] and logged <= set(events["scalars"])

    image = generate(student)
    assert image.shape == (32, 32, 3) and 0 <= image.min() < image.max() <= 1
    for part in ("text_encoder/model.safetensors", "vae/diffusion_pytorch_model.safetensors"):
        saved = {name.removeprefix("text_model."): tensor for name, tensor in load_file(student / part).items()}
        assert same(saved, load_file(sd_teacher / part))  # the encoder by the names of Transformers 4
    names = {path.relative_to(sd_teacher) for path in sd_teacher.rglob("*") if path.is_file()}
    assert names <= {path.relative_to(student) for path in student.rglob("*") if path.is_file()}

    ours, theirs = (
        UNet2DConditionModel.from_pretrained(folder / "unet").num_parameters() for folder in (student, sd_teacher)
    )
    card = (student / "README.md").read_text()
    for fact in (
        *("library_name: diffusers", "PLACE, group size 16", "samples.png", "--student bk_base", "text-to-image"),
        *(
            f"{theirs:,}",
            f"{ours:,} parameters, {ours / theirs:.1%}",
            "32 pixels",
            "10% of the captions",
        ),
        'StableDiffusionPipeline.from_pretrained("student")("a prompt")',
    ):
        assert fact in card
    grid = Image.open(student / "samples.png")
    assert grid.height == 24 + 2 * (64 + 4) and grid.width >= 3 * 64  # teacher, student, EMA student; two prompts
    assert Image.open(student / "curves.png").width > 1000


def test_grid_columns_start_from_the_same_noise(distil):
    """With a learning rate of 0 the whole student is the teacher, and its pictures must be the teacher's."""
    prompts = ("--validation_prompts", "a bag", "a sneaker", "a coat")
    folder = distil("--student", "whole", "--learning_rate", 0, "--validation_steps", 1, *prompts)
    assert [path.name for path in sorted((folder / "samples").iterdir())] == [
        f"step-00000{step}.png" for step in (0, 1, 2)
    ]
    grid = Image.open(folder / "samples.png").convert("RGB")
    assert grid.height == 24 + 3 * 68
    pixels = torch.tensor(list(grid.tobytes())).view(grid.height, grid.width, 3).float()
    steps = [width for width in range(66, 120) if (grid.width - 3 * width) >= 12]
    rows = [pixels[26 + 68 * row : 26 + 68 * row + 64] for row in range(3)]
    margins = [(step, grid.width - 3 * step) for step in steps]
    exact = [
        (step, margin)
        for step, margin in margins
        if all(
            (row[:, margin : margin + 64] - row[:, margin + step * column : margin + step * column + 64]).abs().max()
            <= 2
            for row in rows
            for column in (1, 2)
        )
        and all(row[:, margin : margin + 64].std() > 20 for row in rows)
    ]
    assert exact
    margin = exact[0][1]
    pictures = [row[:, margin : margin + 64] for row in rows]
    assert all((one - other).abs().max() > 2 for one, other in itertools.combinations(pictures, 2))


def test_samples_are_of_the_runs_resolution_and_decoded_one_by_one(distil, decoded):
    """At --resolution the teacher's samples, too: a student that is the teacher draws the same."""
    flags = ("--student", "whole", "--learning_rate", 0, "--resolution", 64)
    distil(*flags, "--validation_prompts", "a dark bag", "a bright sneaker")
    assert len(decoded) >= 6 and {tuple(latents.shape) for latents in decoded} == {(1, 4, 16, 16)}
    teacher, student = decoded[:2], decoded[2:4]
    assert all(torch.allclose(one, other, atol=1e-4) for one, other in zip(teacher, student))
    assert (teacher[0] - teacher[1]).abs().max() > 0.01


# -------------------------------------------------------------------------------------------------------- the students


def origin(preset: str, name: str) -> str:
    """Where in the teacher a BK student's tensor comes from, by METHOD.md's words."""
    side, level, kind, index, *rest = [*name.split("."), "", "", ""]
    if side != "up_blocks":
        return name
    moved = {"bk_base": 0, "bk_small": 0, "bk_tiny": 1, "bk_extreme": 2}[preset]
    if kind in ("resnets", "attentions"):
        index = {"0": "0", "1": "2"}[index]
        if preset == "bk_extreme" and level == "0" and index == "0":
            index = "1"  # the teacher's first takes more channels than this student has there
    return ".".join([side, str(int(level) + moved), kind, index, *rest]).rstrip(".")


LAYERS = {  # levels, residual layers of a down block, of an up block, blocks with attention, middle block
    "bk_base": (4, 1, 2, 3, True),
    "bk_small": (4, 1, 2, 3, False),
    "bk_tiny": (3, 1, 2, 3, False),
    "bk_extreme": (2, 1, 2, 2, False),
    **dict.fromkeys((*WIDTHS, "whole"), (4, 2, 3, 3, True)),
}


@pytest.mark.parametrize("preset", [name for name in STUDENTS if name not in WIDTHS[1:-1]])  # those are alike
def test_presets_start_from_the_teachers_blocks(distil, sd_teacher, preset):
    folder = distil("--student", preset, "--learning_rate", 0, "--no-use_ema", "--max_train_steps", 1)
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    levels, down, up, attending, mid = LAYERS[preset]
    assert [len(block.resnets) for block in unet.down_blocks] == [down] * levels
    assert [len(block.resnets) for block in unet.up_blocks] == [up] * levels
    attentions = [len(getattr(block, "attentions", [])) for block in unet.down_blocks]
    assert attentions == [down] * attending + [0] * (levels - attending)
    attentions = [len(getattr(block, "attentions", [])) for block in unet.up_blocks]
    assert attentions == [0] * (levels - attending) + [up] * attending
    assert (unet.mid_block is not None) == mid
    assert unet.config.sample_size == 8 and metrics(folder)[0]["feat"] > 0

    ours, theirs = weights(folder), weights(sd_teacher)
    assert ours.keys() == unet.state_dict().keys()
    if preset in WIDTHS:
        share = int(preset.removeprefix("width_")) / 320
        assert unet.config.block_out_channels[-1] == pytest.approx(32 * share, abs=4)
        assert ours.keys() == theirs.keys() and unet.num_parameters() < 0.9 * sum(map(torch.numel, theirs.values()))
        for name in ("conv_in.weight", "mid_block.resnets.0.conv1.weight", "mid_block.attentions.0.proj_in.weight"):
            assert set(ours[name].flatten().tolist()) <= set(theirs[name].flatten().tolist())
    else:
        sources = {name: origin(preset, name) if preset != "whole" else name for name in ours}
        assert [name for name in ours if not torch.equal(ours[name], theirs[sources[name]])] == []
    if preset == "bk_tiny":
        ours, name = ours["up_blocks.0.resnets.1.conv2.weight"], "up_blocks.1.resnets.{}.conv2.weight"
        assert torch.equal(ours, theirs[name.format(2)]) and not torch.equal(ours, theirs[name.format(1)])
    assert generate(folder).shape == (32, 32, 3)


SIZES = {
    "whole": 865_910_724,
    "bk_base": 583_480_964,
    "bk_small": 485_787_524,
    "bk_tiny": 326_825_604,
    "bk_extreme": 83_324_164,
    "width_256": 558_347_012,
    "width_224": 429_761_700,
    "width_192": 317_974_084,
    "width_160": 222_984_164,
    "width_128": 144_791_940,
}
SD15 = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}


@pytest.fixture(scope="module")
def full_size() -> dict[str, torch.nn.Module]:
    """The U-Nets of Stable Diffusion 2.1 and 1.5 and their VAE, without weights."""
    with torch.device("meta"):
        vae = AutoencoderKL(
            block_out_channels=[128, 256, 512, 512],
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
        )
        return {"2.1": UNet2DConditionModel(**SD21), "1.5": UNet2DConditionModel(**SD15), "vae": vae}


@pytest.mark.parametrize("preset", STUDENTS)
def test_presets_of_stable_diffusion(full_size, preset):
    for version, teacher in (("2.1", full_size["2.1"]), ("1.5", full_size["1.5"])):
        args = train_lift_sd21.parse_args(["--dry_run", "--student", preset, "--lambda_kd_feat", "0"])
        args.resolution = 512
        student, _ = train_lift_sd21.build_student(teacher, full_size["vae"], args)
        if version == "2.1":
            assert student.num_parameters() == SIZES[preset]
        else:
            assert student.num_parameters() / teacher.num_parameters() == pytest.approx(
                SIZES[preset] / SIZES["whole"], abs=0.01
            )
        if preset in WIDTHS:
            assert is_narrower(student, teacher)
            widths = student.config.block_out_channels
            heads = student.config.attention_head_dim
            heads = [heads] * 4 if isinstance(heads, int) else heads
            assert widths[0] == int(preset.removeprefix("width_")) and not any(w % h for w, h in zip(widths, heads))


def test_feature_pairs_of_the_full_size_have_one_size(full_size):
    """Only narrower students need projections; BK-SDM's pairs have the teacher's shapes."""
    for preset, projected in (("bk_tiny", False), ("bk_extreme", False), ("width_128", True)):
        args = train_lift_sd21.parse_args(["--dry_run", "--student", preset])
        args.resolution = 64
        student, recipe = train_lift_sd21.build_student(full_size["2.1"], full_size["vae"], args)
        inputs = train_lift_sd21.example_inputs(student)
        pair, _ = pair_features(student, full_size["2.1"], recipe["features"], inputs)
        assert len(pair.projections) == len(recipe["features"]) >= 4
        assert all(isinstance(layer, torch.nn.Conv2d) == projected for layer in pair.projections)


@pytest.mark.parametrize("linear", [True, False], ids=["linear projections", "convolutions"])
def test_pruning_finds_the_channels_that_matter(linear):
    """GEGLU's halves, heads and cross attention stay consistent: the function survives."""
    torch.manual_seed(1)
    small = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=[8, 16, 32, 32],
        attention_head_dim=[1, 2, 4, 4],
        norm_num_groups=4,
        cross_attention_dim=16,
        use_linear_projection=linear,
    )
    for weight in small.parameters():
        if weight.ndim > 1:  # equal magnitudes, so that a channel's rank is whether something reads it
            weight.data = weight.data.sign() * weight.data.abs().mean()
    teacher, student = widened(small), UNet2DConditionModel.from_config(small.config)
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([3, 600]), torch.randn(2, 8, 16)
    expected = small(*inputs).sample
    torch.testing.assert_close(teacher(*inputs).sample, expected, rtol=1e-3, atol=1e-4)
    assert (student(*inputs).sample - expected).abs().max() > 0.1 * expected.std()
    example = torch.zeros(1, 4, 16, 16), torch.zeros(1, dtype=torch.long), torch.zeros(1, 8, 16)
    prune_width(student, teacher, example)
    torch.testing.assert_close(student(*inputs).sample, expected, rtol=1e-3, atol=1e-3)


def test_a_narrower_json_student_starts_from_the_teachers_channels(distil, sd_teacher, tmp_path):
    teacher, path = UNet2DConditionModel.from_pretrained(sd_teacher / "unet"), tmp_path / "student.json"
    widths = [width // 2 for width in teacher.config.block_out_channels]
    path.write_text(json.dumps({"config": {"block_out_channels": widths, "norm_num_groups": 4}}))
    flags = ("--student", path, "--learning_rate", 0, "--max_train_steps", 1, "--lora_rank", 2)
    ours, theirs = (each["conv_in.weight"].flatten(1) for each in (weights(distil(*flags)), weights(sd_teacher)))
    assert len(ours) == widths[0] and all(any(torch.equal(row, other) for other in theirs) for row in ours)


def test_a_student_of_outer_levels_starts_from_the_teachers(distil, sd_teacher, tmp_path):
    """Its first up block is the teacher's second: up blocks are counted from the inside."""
    path = tmp_path / "student.json"
    path.write_text('{"levels": 3}')
    folder = distil("--student", path, "--learning_rate", 0, "--max_train_steps", 1)
    ours, theirs = weights(folder), weights(sd_teacher)
    names = {name: re.sub(r"^up_blocks\.(\d)", lambda match: f"up_blocks.{int(match[1]) + 1}", name) for name in ours}
    copied = {name for name, other in names.items() if other in theirs and torch.equal(ours[name], theirs[other])}
    assert copied == ours.keys() and metrics(folder)[-1]["feat"] > 0


def test_json_student_with_blocks_and_features(distil, sd_teacher, tmp_path):
    """What a preset can say, a file can: here one level less, other weights fresh, features inside blocks."""
    recipe = {
        "levels": 3,
        "blocks": {"conv_in": "conv_in", "down_blocks.0": "down_blocks.0"},
        "features": [
            ["down_blocks.0.resnets.0", "down_blocks.0.resnets.1"],
            ["down_blocks.1.attentions.0.transformer_blocks.0", "down_blocks.1.attentions.1.transformer_blocks.0"],
        ],
    }
    path = tmp_path / "student.json"
    path.write_text(json.dumps(recipe))
    folder = distil("--student", path, "--learning_rate", 0, "--no-use_ema")
    assert all(row["feat"] > 0 for row in metrics(folder))
    ours, theirs = weights(folder), weights(sd_teacher)
    copied = {name for name in ours if name in theirs and torch.equal(ours[name], theirs[name])}
    assert copied >= {name for name in ours if name.startswith(("conv_in.", "down_blocks.0."))}
    assert not [name for name in copied if "conv1.weight" in name and not name.startswith("down_blocks.0.")]
    assert generate(folder).shape == (32, 32, 3)


# ----------------------------------------------------------------------------------------------------- what is trained


@pytest.mark.parametrize(
    "flags",
    [
        ["--kd_loss", "lift", "--coarse_norm", "l2", "--lambda_kd_feat", 0],
        ["--kd_loss", "mse", "--student", "bk_small"],
        ["--kd_loss", "none"],
        ["--group_size", 64, "--group_by", "position", "--kd_weighting", "constant", "--lambda_kd_feat", 0],
        ["--kd_weighting", "linear", "--student", "bk_tiny", "--gradient_checkpointing"],
        ["--kd_weighting", "cosine", "--random_flip", "--max_train_samples", 8],
        ["--kd_weighting", "coarse_only", "--no-use_ema", "--lambda_kd_feat", 0],
        ["--kd_weighting", "fine_only", "--gradient_accumulation_steps", 2, "--lr_scheduler", "cosine"],
        ["--student_init", "random", "--student", "bk_extreme", "--resolution", 64],
        ["--use_8bit_adam", "--lambda_kd_feat", 0],
        ["--mixed_precision", "bf16"],
        ["--mixed_precision", "bf16", "--cache_latents", "--student", "width_160"],
        ["--mixed_precision", "bf16", "--lora_rank", 2, "--gradient_checkpointing"],
    ],
    ids=lambda flags: " ".join(map(str, flags)),
)
def test_flags_train_a_student_that_loads(distil, sd_teacher, tmp_path, flags):
    folder = distil(*flags, "--cache_dir", tmp_path / "cache")
    after = weights(folder)
    assert all(torch.isfinite(value).all() and value.dtype == torch.float32 for value in after.values())
    if "--student" not in flags:
        before = weights(sd_teacher)
        still = [name for name in after if torch.equal(after[name], before[origin("bk_base", name)])]
        assert len(still) < (0.7 if "--lora_rank" in flags else 0.1) * len(after)
    moments = load_file(folder / "checkpoint-2" / "optimizer.safetensors")
    moments = {key: value for key, value in moments.items() if key.endswith((".exp_avg", ".state1"))}
    learning = sum(bool(value.any()) for value in moments.values())
    if "--lora_rank" in flags:
        assert 0 < learning <= len(moments)
    else:  # every tensor of the U-Net, and of the projections; a narrow one's 1 x 1 innermost features are few
        assert len(moments) >= len(after) and learning >= len(moments) - 4
    rows = metrics(folder)
    assert len(rows) == 2 and all(row["loss"] > 0 and row["skipped"] == 0 for row in rows)
    assert ("coarse" in rows[0]) == ("mse" not in flags and "none" not in flags)
    assert ("feat" in rows[0]) == ("none" not in flags and "--lambda_kd_feat" not in flags)
    if "linear" in flags:
        assert [row["weight"] for row in rows] == pytest.approx([0.5, 1])
    if "--random_flip" in flags:
        assert [row["weight"] for row in rows] == pytest.approx([0.5, 1])  # cosine
    if "coarse_only" in flags:
        assert [row["weight"] for row in rows] == [0, 0]
    if "--resolution" in flags:
        assert UNet2DConditionModel.load_config(folder / "unet")["sample_size"] == 16
    assert generate(folder).min() >= 0


def test_the_loss_falls_and_the_average_is_saved(distil):
    folder = distil(*("--max_train_steps", 40, "--ema_decay", 0.9, "--lambda_task", 0, "--student", "bk_small"))
    rows = metrics(folder)

    def mean(key, part):
        return sum(row[key] for row in rows[part]) / len(rows[part])

    first, last = slice(0, 3), slice(-8, None)
    assert mean("loss", last) < 0.7 * mean("loss", first)
    assert mean("coarse", last) < mean("coarse", first) and mean("weight", last) > mean("weight", first)
    saved = weights(folder)
    trained, averaged = (
        UNet2DConditionModel.from_pretrained(folder / "checkpoint-40", subfolder=subfolder).state_dict()
        for subfolder in ("unet", "unet_ema")  # as in a pipeline
    )
    assert same(saved, averaged)
    assert not any(torch.equal(trained[name], saved[name]) for name in saved if "conv1" in name)


@pytest.mark.parametrize("preset", ["bk_tiny", "inside"])
def test_features_under_checkpointing(sd_teacher, preset):
    """Neither what FeatureModel returns nor its gradients depend on what is recomputed."""
    teacher = UNet2DConditionModel.from_pretrained(sd_teacher / "unet")
    names = [ours for ours, _ in STUDENTS["bk_tiny"]["features"]]
    if preset == "inside":  # of what is recomputed as one piece
        names = [
            *("down_blocks.0.resnets.0.conv1", "mid_block.attentions.0.transformer_blocks.0.ff.net.2"),
            *("up_blocks.1.attentions.2.transformer_blocks.0.attn2.to_q", "up_blocks.0.resnets.1"),
        ]
        unet = teacher.train()
    else:
        config = train_lift_sd21.student_config(dict(teacher.config), STUDENTS["bk_tiny"])
        unet = UNet2DConditionModel.from_config(config).train()
    torch.manual_seed(0)
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([1, 2]), torch.randn(2, 24, 16)

    def gradients(model):
        unet.zero_grad()
        prediction, features = model(*inputs)
        loss = prediction.square().mean() + sum(feature.square().mean() for feature in features)
        loss.backward()
        results = {name: parameter.grad.clone() for name, parameter in unet.named_parameters()}
        return {"prediction": prediction.detach(), "loss": loss.detach(), **results}

    plain = FeatureModel(unet, names)
    expected = gradients(plain)
    assert len(plain(*inputs)[1]) == len(names)
    unet.enable_gradient_checkpointing()
    assert unet.is_gradient_checkpointing
    for _ in range(2):  # nothing is left over from one step to the next
        torch.testing.assert_close(gradients(plain), expected, rtol=1e-4, atol=1e-6)


def test_compiled_equals_eager(distil, compile_quickly, tmp_path):
    teacher = save_sd_pipeline(
        tmp_path / "teacher",
        block_out_channels=[8],
        attention_head_dim=1,
        layers_per_block=1,
        down_block_types=["CrossAttnDownBlock2D"],
        up_block_types=["CrossAttnUpBlock2D"],
        mid_block_type=None,
    )
    flags = (TEACHER, teacher, "--student", "whole", "--student_init", "random", "--max_train_steps", 1)
    eager = distil(*flags, output_dir=tmp_path / "eager")
    assert not compile_quickly
    compiled = distil(*flags, "--compile", output_dir=tmp_path / "compiled")
    assert len(compile_quickly) == 2
    assert metrics(eager)[0]["loss"] == pytest.approx(metrics(compiled)[0]["loss"], rel=1e-4)
    assert weights(compiled).keys() == weights(eager).keys()


def test_fp16_variant_loads(distil):
    folder = distil("--save_fp16_variant", "--student", "bk_small")
    half = load_file(folder / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    full = weights(folder)
    assert half.keys() == full.keys() and all(torch.equal(half[name], full[name].half()) for name in full)
    pipeline = StableDiffusionPipeline.from_pretrained(folder, variant="fp16", torch_dtype=torch.float16)
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        assert part.dtype == torch.float16
    half_image = generate(folder, variant="fp16", torch_dtype=torch.float16)
    assert np.abs(half_image - generate(folder)).max() < 0.1
    save_with_variant(pipeline, folder, fp16_variant=False)  # another student, in the same folder
    assert not list(folder.rglob("*.fp16.*")) and (folder / "unet" / "diffusion_pytorch_model.safetensors").exists()


# ---------------------------------------------------------------------------------------------- noise, time and target


def test_velocity_teachers_by_the_schedulers_config(distil, tmp_path, monkeypatch):
    teacher = save_sd_pipeline(tmp_path / "teacher", "v_prediction")
    targets = []
    add_noise = train_lift_sd21.add_noise

    def record(scheduler, latents, noise, timesteps):
        noisy, target = add_noise(scheduler, latents, noise, timesteps)
        targets.append((target, scheduler.get_velocity(latents, noise, timesteps), noise))
        return noisy, target

    monkeypatch.setattr(train_lift_sd21, "add_noise", record)
    folder = distil("--pretrained_teacher_model", teacher)
    assert len(targets) == 2
    assert all(torch.equal(target, velocity) and not torch.equal(target, e) for target, velocity, e in targets)
    scheduler = PNDMScheduler.from_pretrained(folder, subfolder="scheduler")
    assert scheduler.config.prediction_type == "v_prediction" and scheduler.config.skip_prk_steps
    assert generate(folder).shape == (32, 32, 3)


# -------------------------------------------------------------------------------------------------- resuming, and LoRA


@pytest.mark.parametrize(
    "flags",
    [["--cache_latents", "--random_flip"], ["--lora_rank", 2, "--student", "bk_tiny", "--gradient_checkpointing"]],
    ids=lambda flags: flags[0],
)
def test_a_resumed_run_equals_an_uninterrupted_one(distil, tmp_path, flags):
    flags = [*flags, "--max_train_steps", 3, "--checkpointing_steps", 2, "--cache_dir", tmp_path / "cache"]
    flags += ["--train_batch_size", 20]  # two batches an epoch, eight images wait for another epoch
    whole = distil(*flags, output_dir=tmp_path / "whole")
    resumed = tmp_path / "resumed"
    shutil.copytree(whole, resumed, ignore=shutil.ignore_patterns("vae", "checkpoint-3", "model_index.json"))
    shutil.copytree(whole / "checkpoint-2", resumed / "checkpoint-2", dirs_exist_ok=True)
    distil(*flags, "--resume_from_checkpoint", "latest", output_dir=resumed)
    assert digest(resumed / "checkpoint-3") == digest(whole / "checkpoint-3")
    assert digest(resumed / "checkpoint-3") != digest(whole / "checkpoint-2")
    assert digest(resumed / "unet") == digest(whole / "unet")
    if "--lora_rank" in flags:
        assert digest(resumed / "lora") == digest(whole / "lora")
    assert without_time(resumed) == without_time(whole) and len(metrics(whole)) == 3


def test_lora_trains_adapters_and_saves_both_forms(distil, sd_teacher):
    flags = ("--lora_rank", 2, "--student", "bk_tiny", "--learning_rate", 1e-2, "--max_train_steps", 3)
    folder = distil(*flags, "--ema_decay", 0.5)
    theirs = weights(sd_teacher)
    base = weights(folder / "lora")
    assert all(torch.equal(value, theirs[origin("bk_tiny", name)]) for name, value in base.items())
    merged = weights(folder)
    assert merged.keys() == base.keys()
    changed = {name for name in base if not torch.equal(merged[name], base[name])}
    assert len(changed) > 40 and all(name.endswith(".weight") and "norm" not in name for name in changed)
    adapter = load_file(folder / "lora" / "pytorch_lora_weights.safetensors")
    assert all(value.any() and value.dtype == torch.float32 and 2 in value.shape for value in adapter.values())

    checkpoint = folder / "checkpoint-3"
    assert same(load_file(checkpoint / "lora_ema" / "pytorch_lora_weights.safetensors"), adapter)
    assert load_file(checkpoint / "lora" / "pytorch_lora_weights.safetensors").keys() == adapter.keys()
    assert same(weights(checkpoint), base) and not (checkpoint / "unet_ema").exists()  # the base is stored once
    moments = load_file(checkpoint / "optimizer.safetensors")
    assert sum(key.endswith(".exp_avg") for key in moments) == len(adapter)
    assert len(metrics(folder)) == 3 and all(row["feat"] > 0 and row["grad_norm"] > 0 for row in metrics(folder))

    inputs = torch.randn(2, 4, 8, 8), torch.tensor([5, 700]), torch.randn(2, 24, 16)
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="lora/unet")
    pipeline = StableDiffusionPipeline.from_pretrained(folder, unet=unet)
    with torch.no_grad():
        plain = pipeline.unet(*inputs).sample
        # As the docs say, a form that serves folders and repositories alike.
        pipeline.load_lora_weights(folder, subfolder="lora", weight_name="pytorch_lora_weights.safetensors")
        adapted = pipeline.unet(*inputs).sample
        both = UNet2DConditionModel.from_pretrained(folder / "unet")(*inputs).sample
    torch.testing.assert_close(adapted, both, rtol=1e-4, atol=1e-4)
    assert (adapted - plain).abs().max() > 1e-2
    assert "LoRA of rank 2" in (folder / "README.md").read_text()
    assert generate(folder).shape == (32, 32, 3)

    with pytest.raises(SystemExit, match=r"is of another student .*adapters.* pass the run's own flags"):
        distil(*flags, "--resume_from_checkpoint", "latest", "--lora_rank", 4)


def test_features_come_from_adapted_layers(distil, tmp_path):
    """The pairs of bk_tiny and bk_extreme name a layer that gets an adapter: its output is with the adapter."""
    layer = "down_blocks.2.attentions.0.proj_out"
    recipe = tmp_path / "student.json"
    recipe.write_text(
        json.dumps({**STUDENTS["bk_tiny"], "features": [[layer, "down_blocks.2.attentions.1.proj_out"]]})
    )
    flags = ("--student", recipe, "--lora_rank", 2, "--lambda_task", 0, "--lambda_kd_output", 0)
    folder = distil(*flags, "--max_train_steps", 1)
    adapter = load_file(folder / "lora" / "pytorch_lora_weights.safetensors")
    assert adapter[f"unet.{layer}.lora_B.weight"].any()
    assert not adapter["unet.up_blocks.2.attentions.1.proj_out.lora_B.weight"].any()


# ------------------------------------------------------------------------------------------------------- what it shows


def test_dry_run_needs_no_weights(run, sd_teacher, tmp_path, capsys):
    teacher = tmp_path / "configs"
    shutil.copytree(sd_teacher, teacher, ignore=shutil.ignore_patterns("*.safetensors", "tokenizer"))
    fixed = (
        "--pretrained_teacher_model",
        teacher,
        "--output_dir",
        tmp_path / "none",
        "--dry_run",
        "--lambda_kd_feat",
        0,
        "--train_batch_size",
        64,
    )

    def shown(*flags) -> tuple[str, dict[str, float]]:
        run("train_lift_sd21", *fixed, *flags)
        text = capsys.readouterr().out
        return text, {name: float(size) for name, size in re.findall(r"^  (\S.*?)\s+([\d.]+) MiB$", text, re.M)}

    theirs = UNet2DConditionModel.from_pretrained(sd_teacher / "unet")
    ours = UNet2DConditionModel.from_config(
        train_lift_sd21.student_config(dict(theirs.config), STUDENTS["bk_tiny"])
    ).num_parameters()
    text, parts = shown("--student", "bk_tiny")
    theirs = theirs.num_parameters()
    for fact in (f"student: {ours:,} parameters", f"teacher: {theirs:,}", f"{ours / theirs:.2%}", "MACs", "32 pixels"):
        assert fact in text
    assert '"mid_block_type": null' in text
    pipeline = StableDiffusionPipeline.from_pretrained(sd_teacher)
    encoders = pipeline.vae.num_parameters() + pipeline.text_encoder.num_parameters()
    assert parts["encoders' weights"] == pytest.approx(4 * encoders / 2**20, abs=0.06)
    assert parts["teacher weights"] == pytest.approx(4 * theirs / 2**20, abs=0.06)
    assert parts["sum"] == pytest.approx(sum(parts.values()) - parts["sum"], abs=0.5)

    assert "memory at its peak, after the forward pass" in text
    single = shown("--student", "bk_tiny", "--gradient_accumulation_steps", 1)[1]  # by default gradients accumulate
    assert parts["gradients (fp32)"] == parts["trained weights (fp32)"] and "gradients (fp32)" not in single

    assert "FLOPs of student, teacher and encoders" in text and "beforehand" not in text
    size = 4 * pipeline.vae.config.block_out_channels[0] * 32 * 32  # of a VAE with a layer per block
    text, cached = shown("--student", "bk_tiny", "--cache_latents", "--encoding_batch_size", 8)
    assert "FLOPs of student and teacher\n" in text
    beforehand = re.search(r"^beforehand, VAE and text encoder at once, batch 8: ([\d.]+) MiB$", text, re.M)
    assert float(beforehand[1]) == pytest.approx((4 * encoders + 8 * 4 * size) / 2**20, abs=0.06)
    assert "encoders' weights" not in cached
    assert cached["sum"] == pytest.approx(parts["sum"] - parts["encoders' weights"], abs=0.11)
    lora = shown("--student", "bk_tiny", "--lora_rank", 2)[1]
    assert lora["trained weights (fp32)"] < 0.3 * parts["trained weights (fp32)"]
    assert lora["frozen weights of the student"] == pytest.approx(4 * ours / 2**20, abs=0.06)
    text, saving = shown("--student", "bk_tiny", "--gradient_checkpointing")
    assert "memory at its peak, while a block is recomputed" in text
    activations = "student activations, batch 64"
    assert saving[activations] < parts[activations]
    assert "teacher weights" not in shown("--student", "bk_tiny", "--kd_loss", "none")[1]
    assert not (tmp_path / "none").exists()

    config = teacher / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"block_out_channels": [256, 8, 16]}))
    text, parts = shown("--student", "bk_tiny", "--mixed_precision", "fp16")
    assert "memory at its peak, while images are encoded" in text
    assert parts["working set of the VAE"] == 64 * 4 * 256 * 32 * 32 * 2 / 2**20


# ----------------------------------------------------------------------------------------------------------- bad input


def test_lora_needs_peft(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "peft" else find_spec(name))
    with pytest.raises(SystemExit, match="--lora_rank 4 needs peft; pip install peft, or drop the flag"):
        train_lift_sd21.parse_args(["--dry_run", "--lora_rank", "4"])
    assert train_lift_sd21.parse_args(["--dry_run"]).lora_rank == 0


@pytest.fixture
def prepare(captioned, sd_teacher, tmp_path):
    """`prepare(change, *flags)` makes the dataset of a folder whose metadata rows `change` has edited."""

    PartialState()  # which the logger needs

    def make(change, *flags):
        folder = shutil.copytree(captioned, tmp_path / "edited")
        lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
        lines = change(folder, lines) or lines
        (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        fixed = ("--pretrained_teacher_model", sd_teacher, "--train_data_dir", folder, "--cache_dir", tmp_path / "c")
        fixed = (*fixed, "--resolution", 32, "--dataloader_num_workers", 0)
        args = train_lift_sd21.parse_args([str(flag) for flag in (*fixed, *flags)])
        source = TeacherSource(str(sd_teacher), None, None, train_lift_sd21.EXPECTED)
        return train_lift_sd21.make_dataset(args, train_lift_sd21.load_tokenizer(source))[0]

    return make


def edit(value, count: int = 1):
    """A change of the first captions; `edit(...)` with an Exception class leaves their lines without a caption."""

    def change(folder, lines):
        for line in lines[:count]:
            line["text"] = value
            if value is KeyError:
                del line["text"]

    return change


def drop_line(folder, lines):
    return lines[1:]


def drop_image(folder, lines):
    (folder / lines[0]["file_name"]).unlink()


def spoil_image(folder, lines):
    (folder / lines[0]["file_name"]).write_text("no image")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (edit(None), "have no caption"),
        (edit("  "), "have no caption"),
        (edit(KeyError), "have no caption"),
        (drop_line, "have no caption"),
        (drop_image, "cannot be read"),
        (spoil_image, "cannot be read"),
    ],
    ids=["null", "blank", "no key", "no line", "no file", "damaged"],
)
def test_images_without_a_caption_are_named(prepare, tmp_path, capsys, change, problem):
    with pytest.raises(SystemExit) as error:
        prepare(change)
    message = str(error.value)
    assert "\n" not in message and f"edited: 1 of 48 images {problem}: " in message and "00000.png" in message
    assert "--max_unreadable 0.01" in message and "repair or remove them" in message
    shutil.rmtree(tmp_path / "edited")
    dataset = prepare(change, "--max_unreadable", 0.03)
    output = capsys.readouterr().out
    assert f"skipping 1 of 48 images, which {problem}: " in output and "00000.png" in output
    assert len(dataset) == 47 and output.count("skipping") == 1
    assert dataset[0]["images"].shape == (3, 32, 32) and dataset[0]["input_ids"].shape == (24,)


def test_long_captions_are_cut_counted_and_said_once(prepare, sd_teacher, caplog):
    long = "a photo of a dark bag " * 10
    dataset = prepare(edit(long, 3))
    said = [record.getMessage() for record in caplog.records if "longer" in record.getMessage()]
    assert [line.removeprefix("[RANK 0] ") for line in said] == [
        "captions are longer than a text encoder takes and are cut there: 3 of 48 at 24 tokens for text_encoder"
    ]
    tokenizer = train_lift_sd21.CLIPTokenizer.from_pretrained(sd_teacher, subfolder="tokenizer")
    whole = tokenizer(long, verbose=False)["input_ids"]
    ids = dataset[0]["input_ids"]
    assert len(whole) > 24 and ids.tolist() == [*whole[:23], tokenizer.eos_token_id]
    for _ in range(2):
        assert len(dataset[3]["input_ids"]) == 24
    assert sum("longer" in record.getMessage() for record in caplog.records) == 1


def test_of_many_captions_the_tokens_of_the_first_are_counted(sd_teacher, caplog, monkeypatch):
    monkeypatch.setattr(captions, "LOOKED_AT", 1000)
    tokenizer = train_lift_sd21.CLIPTokenizer.from_pretrained(sd_teacher, subfolder="tokenizer")
    many = datasets.Dataset.from_dict({"text": ["a dark bag " * 20, *["a bag"] * 1498, "a dark bag " * 20]})
    captions.report_long_captions(many["text"], {"text_encoder": tokenizer})
    assert "are cut there: 1 of the first 1,000 at 24 tokens for text_encoder" in caplog.text


HUB = """
import sys, train_lift_sd21
from common.teachers import TeacherSource, load_skeleton
for name in sys.argv[1:]:
    try:
        train_lift_sd21.check_pipeline(TeacherSource(name, None, None, train_lift_sd21.EXPECTED))
    except SystemExit as error:
        print(error)
"""


class Refusal(BaseHTTPRequestHandler):
    """The Hub, for whoever asks for a model that is gone, gated, or behind a server that fails."""

    def do_GET(self):
        status, code = {"gone": (404, "RepoNotFound"), "gated": (403, "GatedRepo")}.get(
            self.path.split("/")[1], (400, "")
        )
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *arguments):
        pass


def test_models_that_are_gone_or_gated_get_one_line(tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Refusal)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    variables = {"HF_ENDPOINT": url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path), "NO_PROXY": "127.0.0.1"}
    finished = subprocess.run(
        [sys.executable, "-c", HUB, "gone/model", "gated/model", "broken/model"],
        **{"cwd": ROOT, "env": {**variables, "PATH": "", "OMP_NUM_THREADS": "1"}, "text": True, "timeout": 100},
        capture_output=True,
    )
    server.shutdown()
    server.server_close()
    gone, gated, broken = finished.stdout.splitlines()
    assert gone.startswith("error: --pretrained_teacher_model gone/model is not on the Hub, or private; pass a Stable")
    assert train_lift_sd21.TEACHER in gone
    assert gated.startswith("error: --pretrained_teacher_model gated/model is gated; accept its terms at ")
    assert "huggingface.co/gated/model" in gated and "hf auth login" in gated
    assert broken.startswith("error: --pretrained_teacher_model broken/model does not load: ")
    assert "Traceback" not in finished.stderr


def test_an_early_conversion_trains_at_the_size_of_its_pipeline(sd_teacher, tmp_path, caplog):
    """Before Diffusers 0.9 the conversion wrote half of it, which the pipeline corrects to 64 latents."""
    teacher = shutil.copytree(sd_teacher, tmp_path / "teacher")
    path = teacher / "unet" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "_diffusers_version": "0.8.1", "sample_size": 32}))
    source = TeacherSource(str(teacher), None, None, "pass another")
    unet, vae = (
        load_skeleton(source, kind, name) for kind, name in ((UNet2DConditionModel, "unet"), (AutoencoderKL, "vae"))
    )
    pipeline = StableDiffusionPipeline.from_pretrained(teacher)
    PartialState()
    assert default_resolution(unet, vae) == pipeline.unet.config.sample_size * pipeline.vae_scale_factor == 64 * 4
    assert "says sample_size 32: taken for 64" in caplog.text
