"""The demo and the benchmarks, run as the Makefile runs them but for their budget."""

import json

import numpy as np
from conftest import run_file
from diffusers import DDIMPipeline
from PIL import Image


def test_demo_from_nothing(tmp_path):
    """A few steps of everything, by the command."""
    flags = ("--teacher_steps", 3, "--student_steps", 2, "--samples", 64, "--inference_steps", 2, "--threads", 1)
    command = ("benchmarks/extreme_compression.py", "--output_dir", tmp_path / "demo", *flags)
    finished = run_file(*command)
    assert finished.returncode == 0, finished.stdout
    demo = tmp_path / "demo"
    quality = json.loads((demo / "quality.json").read_text())
    rows = {row["name"]: row for row in quality["rows"]}
    assert list(rows) == ["real", "teacher", *(f"{kd}-0" for kd in ("none", "mse", "lift", "place"))]
    facts = json.loads((demo / "report.json").read_text())["facts"]
    assert facts["teacher"]["parameters"] == 2_469_729 and facts["place-0"]["parameters"] < 0.06 * 2_469_729
    assert all(np.isfinite(row["fid"]) for row in rows.values())
    assert rows["real"]["fid"] < min(row["fid"] for name, row in rows.items() if name != "real")
    assert rows["teacher"]["sampler"] == "ddim" and rows["teacher"]["num_inference_steps"] == 2
    text = (demo / "results.md").read_text()
    assert "no Inception FID" in text and text.count("\n| ") == 7
    assert "- budget: teacher 3 steps, students 2 steps" in text
    assert Image.open(demo / "samples.png").width > 16 * 96 and Image.open(demo / "curves.png").width > 700
    assert DDIMPipeline.from_pretrained(demo / "place-0")(num_inference_steps=1).images

    finished = run_file(*command, "--teacher_steps", 4)
    assert finished.returncode == 1 and "--teacher_steps 4 was 3" in finished.stdout


def test_step_benchmark_prints_the_ratio(tmp_path):
    path = tmp_path / "step.json"
    flags = ("--small", "--steps", 2, "--warmup", 1, "--threads", 1, "--json", path)
    finished = run_file("benchmarks/step.py", *flags, "--", "--train_batch_size", 2)
    assert finished.returncode == 0, finished.stdout
    result = json.loads(path.read_text())
    assert result["batch"] == 2 and result["whole / parts"] > 0.5 and 0 < result["loss / whole"] < 1
    assert f"loss / whole step: {result['loss / whole']:.2%}" in finished.stdout
