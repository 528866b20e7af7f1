"""docs/examples/train_lift_ldm.diff: the worked example of docs/adapting.md applies to today's script, and runs."""

import importlib
import json
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, inputs_of, weights
from diffusers import DDIMScheduler, LDMPipeline, UNet2DModel, VQModel

from tiny_models import TINY_UNET


SHORT = [
    *("--train_batch_size", 4, "--max_train_steps", 2, "--dataloader_num_workers", 0, "--num_inference_steps", 1),
    *("--num_validation_images", 2, "--report_to", "none", "--student", 0.5, "--learning_rate", 1e-3, "--no-use_ema"),
]


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    """The script that the diff writes, imported."""
    folder = tmp_path_factory.mktemp("applied")
    shutil.copy(ROOT / "train_lift_unet.py", folder)
    diff = ROOT / "docs" / "examples" / "train_lift_ldm.diff"
    subprocess.run(["git", "apply", diff], cwd=folder, check=True)
    assert (folder / "train_lift_ldm.py").exists()
    sys.path.insert(0, str(folder))
    yield importlib.import_module("train_lift_ldm")
    sys.path.remove(str(folder))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    torch.manual_seed(0)
    levels = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    vqvae = VQModel(block_out_channels=[8, 8], norm_num_groups=4, num_vq_embeddings=16, **levels)
    unet = UNet2DModel(**{**TINY_UNET, "sample_size": 8, "in_channels": 3, "out_channels": 3})
    folder = tmp_path_factory.mktemp("ldm")
    LDMPipeline(vqvae, unet, DDIMScheduler()).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "flags",
    [(), ("--student_init", "diffusion", "--cache_teacher", 2, "--lambda_kd_feat", 0)],
    ids=["live", "cached"],
)
def test_it_distils_into_a_pipeline_that_draws(run, script, teacher, images, tmp_path, flags):
    where = ("--train_data_dir", images, "--output_dir", tmp_path / "student", "--cache_dir", tmp_path / "cache")
    run("train_lift_ldm", "--pretrained_teacher_model", teacher, *where, *SHORT, *flags)
    pipeline = LDMPipeline.from_pretrained(tmp_path / "student")
    assert pipeline.unet.config.block_out_channels == [8, 16]
    assert pipeline(num_inference_steps=1, output_type="np").images.shape == (1, 16, 16, 3)
    row = json.loads((tmp_path / "student" / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["step"] == 2 and ("feat" in row) == (not flags)
    assert "LDMPipeline" in (tmp_path / "student" / "README.md").read_text()
    ours, theirs = (weights(folder, "vqvae") for folder in (tmp_path / "student", teacher))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_noise_is_added_to_the_latents(script, teacher):
    pipeline = LDMPipeline.from_pretrained(teacher)
    draws = {"steps": 1000, "random_flip": False, "antithetic_timesteps": False}
    make = inputs_of(script, (3, 8, 8), draws, scheduler=script.DDPMScheduler(), vqvae=pipeline.vqvae)
    batch = {"images": torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8)}
    batch["draws"] = script.make_draws(2, torch.device("cpu"), (3, 8, 8), **draws)
    batch["draws"]["timesteps"] = torch.zeros(2, dtype=torch.long)
    latents = pipeline.vqvae.encode(batch["images"] / 127.5 - 1).latents * pipeline.vqvae.config.scaling_factor
    inputs, target = make(batch)
    assert torch.equal(target, batch["draws"]["noise"])
    assert torch.allclose(inputs["sample"], 0.9999**0.5 * latents + 0.01 * target, atol=1e-5)


def test_a_dry_run_counts_the_autoencoder(run, script, teacher, capsys):
    run("train_lift_ldm", "--pretrained_teacher_model", teacher, "--student", 0.5, "--dry_run")
    assert "encoders' weights" in capsys.readouterr().out
