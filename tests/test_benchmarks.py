"""The demo and the benchmarks, run as the Makefile runs them but for their budget."""

import json

import numpy as np
import pytest
import torch
from conftest import run_file
from diffusers import DDIMPipeline
from PIL import Image

import extreme_compression


def test_demo_from_nothing_and_again(tmp_path):
    """A few steps of everything; the second call finds it all done."""
    flags = ("--teacher_steps", 3, "--student_steps", 2, "--samples", 64, "--inference_steps", 2, "--threads", 1)
    command = ("benchmarks/extreme_compression.py", "--output_dir", tmp_path / "demo", *flags)
    finished = run_file(*command)
    assert finished.returncode == 0, finished.stdout
    demo = tmp_path / "demo"
    results = json.loads((demo / "results.json").read_text())
    rows = results["results"]
    assert list(rows) == ["real, held out", "teacher", *(f"--kd_loss {kd}" for kd in ("none", "mse", "lift", "place"))]
    counts = {name: runs[0].get("parameters") for name, runs in rows.items()}
    assert counts["teacher"] == 2_469_729 and counts["--kd_loss place"] < 0.06 * counts["teacher"]
    assert all(np.isfinite(runs[0]["frechet"]) for runs in rows.values())
    assert rows["real, held out"][0]["frechet"] < min(rows[name][0]["frechet"] for name in list(rows)[1:])
    table = (demo / "results.md").read_text()
    assert "no Inception FID" in table and table.count("\n| ") == 7
    assert Image.open(demo / "samples.png").width > 700 and Image.open(demo / "curves.png").width > 700
    assert DDIMPipeline.from_pretrained(demo / "place-0")(num_inference_steps=1).images

    before = (demo / "place-0" / "unet" / "diffusion_pytorch_model.safetensors").stat().st_mtime_ns
    finished = run_file(*command)
    assert finished.returncode == 0 and "steps" not in finished.stdout.split("| model")[0]
    assert (demo / "place-0" / "unet" / "diffusion_pytorch_model.safetensors").stat().st_mtime_ns == before
    finished = run_file(*command, "--teacher_steps", 4)
    assert finished.returncode == 1 and "--teacher_steps 4 was 3" in finished.stdout


def test_frechet_distance_of_known_gaussians():
    torch.manual_seed(0)
    points = torch.randn(50_000, 4, dtype=torch.float64)
    distance = extreme_compression.frechet_distance
    assert distance(points, points) == pytest.approx(0, abs=1e-9)
    assert distance(points, points + 3) == pytest.approx(4 * 9)
    # N(0, 1) to N(0, 4) in each of four dimensions: 4 · (2 - 1)²
    assert distance(points, 2 * points) == pytest.approx(4, rel=0.02)


def test_step_benchmark_prints_the_ratio(tmp_path):
    path = tmp_path / "step.json"
    flags = ("--small", "--steps", 2, "--warmup", 1, "--threads", 1, "--json", path)
    finished = run_file("benchmarks/step.py", *flags, "--", "--train_batch_size", 2)
    assert finished.returncode == 0, finished.stdout
    result = json.loads(path.read_text())
    assert result["batch"] == 2 and result["whole / parts"] > 0.5 and 0 < result["loss / whole"] < 1
    assert f"loss / whole step: {result['loss / whole']:.2%}" in finished.stdout
