"""What a user sees of a run before and while it trains, and when."""

import json
import logging
import math
import re
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

from common import pace
from common.metrics import MetricsLog
from common.pace import Due, count_steps
from common.train_state import RunningMeans

import pytest
import torch
from accelerate import Accelerator
from conftest import metrics, without_time
from diffusers import DDPMPipeline, UNet2DModel

import train_lift_unet


SHORT = (
    *("--train_batch_size", 8, "--dataloader_num_workers", 0, "--num_validation_images", 1, "--logging_steps", 4),
    *("--num_inference_steps", 1, "--report_to", "none", "--checkpointing_steps", 3, "--student", 0.5),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pace")


@pytest.fixture
def distil(run, teacher, images, folder):
    def distil_into(name: str, *flags) -> Path:
        command = ("--pretrained_teacher_model", teacher, "--train_data_dir", images, *SHORT)
        run("train_lift_unet", *command, "--output_dir", folder / name, *flags)
        return folder / name

    return distil_into


def test_due_by_steps_or_by_the_clock(monkeypatch):
    by_steps = Due(3, lambda late: late)
    found = [step for step in range(1, 13) if by_steps.now(step, bad=torch.tensor(float(step in (6, 7))))]
    assert found == [3, 8, 9, 12]
    clock = SimpleNamespace(monotonic=lambda: clock.time, time=0.0)
    monkeypatch.setattr(pace, "time", clock)
    by_clock, found = Due(None, lambda late: late), []
    for step in range(1, 11):
        clock.time += 400  # seconds: due after the fifth, which is a bad one
        if by_clock.now(step, bad=torch.tensor(float(step == 5))):
            found.append(step)
    assert found == [6]
    assert str(by_steps) == "every 3 steps" and str(by_clock) == "every 30 minutes"


def test_a_grid_that_does_not_fit_the_gpu(distil, folder, monkeypatch, capsys):
    """Before the first step it ends the run, which has lost nothing; later the run goes on without it."""
    sample_images, calls = train_lift_unet.sample_images, []

    def sample(model, *arguments, fits: int, **options):
        assert not model.training
        calls.append(model)
        if len(calls) > fits:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return sample_images(model, *arguments, **options)

    monkeypatch.setattr(train_lift_unet, "sample_images", partial(sample, fits=0))
    with pytest.raises(SystemExit, match=r"^error: the sample grid does not fit the GPU: .*; pass fewer"):
        distil("none", "--max_train_steps", 2)
    calls.clear()
    monkeypatch.setattr(train_lift_unet, "sample_images", partial(sample, fits=2))  # the teacher and the student
    run = distil("first", "--max_train_steps", 2, "--validation_steps", 1)
    assert "step 1 has no sample grid, which does not fit the GPU: CUDA out of memory" in capsys.readouterr().out
    assert [path.name for path in (run / "samples").iterdir()] == ["step-000000.png"]
    assert (run / "model_index.json").exists() and calls[-1].training and len(calls) == 4


def test_epochs_in_place_of_steps():
    accelerator = SimpleNamespace(num_processes=2, gradient_accumulation_steps=4)
    assert count_steps(50, None, 100, accelerator) == 50
    assert count_steps(50, 3.0, 100, accelerator) == math.ceil(3 * 100 / 2 / 4)
    assert count_steps(50, 0.01, 100, accelerator) == 1


def test_means_leave_out_what_is_not_finite():
    means = RunningMeans()
    for values in ((1.0, 2.0), (3.0, math.nan), (5.0, math.inf)):
        means.add({"a": torch.tensor(values[0]), "b": torch.tensor(values[1])})
    state = json.loads(json.dumps(means.state_dict()))
    for again in (means, RunningMeans()):
        again.load_state_dict(state)
        assert again.state_dict() == state  # a checkpoint right after another
        again.add({"a": torch.tensor(7.0), "b": torch.tensor(4.0)})
        assert again.read() == {"a": 4.0, "b": 3.0}
        again.add({"a": torch.tensor(1.0), "b": torch.tensor(math.nan)})
        assert again.read()["a"] == 1.0
    again.add({"a": torch.tensor(math.nan), "b": torch.tensor(1.0)})
    assert math.isnan(again.read()["a"])


def test_the_first_day(distil, folder, images, caplog, monkeypatch):
    """What is said before the first step, a grid before it, rows from the first one on, and epochs."""
    caplog.set_level(logging.INFO)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)  # which `accelerate launch --cpu` sets
    run = distil("whole", "--num_train_epochs", 0.5, "--gradient_accumulation_steps", 1)
    steps = math.ceil(len(list(images.rglob("*.png"))) / 8 / 2)
    text = caplog.text
    student = DDPMPipeline.from_pretrained(run).unet
    assert "NO GPU WAS FOUND" in text or torch.cuda.is_available()
    assert f"the student has {student.num_parameters():,} parameters, " in text
    assert f"8 images a step; step 0 of {steps}, 0.5 epochs" in text
    size = float(
        re.search(r"a checkpoint of ([\d,]+) MB every 3 steps, the newest 3 are kept; .* 30 minutes", text)[1]
    )
    last = run / f"checkpoint-{steps}"
    assert size == pytest.approx(sum(path.stat().st_size for path in last.rglob("*")) / 1e6, rel=0.2, abs=0.6)
    assert (run / "samples" / "step-000000.png").exists()
    found = metrics(run)
    assert [row["step"] for row in found] == [1, *range(4, steps, 4), steps]
    assert all(row["max_grad_norm"] == 1.0 and row["kd_mse"] > 0 for row in found)

    # A resume between two rows continues the means, bit for bit.
    resumed = shutil.copytree(run, folder / "resumed")
    for path in resumed.glob("checkpoint-*"):
        if path.name != "checkpoint-3":
            shutil.rmtree(path)
    distil("resumed", "--num_train_epochs", 0.5, "--resume_from_checkpoint", "latest")
    assert without_time(resumed) == without_time(run)


def test_rows_are_means_of_their_steps(distil):
    every = metrics(distil("every", "--max_train_steps", 5, "--logging_steps", 1))
    fourth = metrics(distil("fourth", "--max_train_steps", 5))
    assert [row["step"] for row in fourth] == [1, 4, 5]
    for key in ("loss", "kd_mse", "grad_norm"):
        expected = sum(row[key] for row in every[1:4]) / 3
        assert fourth[1][key] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kd_loss", ["place", "lift", "mse"])
def test_kd_mse_is_the_same_under_every_loss(distil, kd_loss):
    """Before the first update the students are equal."""
    first = metrics(distil(kd_loss, "--max_train_steps", 1, "--kd_loss", kd_loss))[0]
    means = ("--kd_loss", "mse", "--reduction", "mean")
    expected = metrics(distil(f"{kd_loss}-mse", "--max_train_steps", 1, *means))[0]
    assert first["kd_mse"] == pytest.approx(expected["kd"], rel=1e-6)


def test_a_student_is_taken_from_a_run_that_goes_on(distil, teacher, tmp_path):
    run = distil("going", "--max_train_steps", 3)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    unet = UNet2DModel.from_pretrained(run / "checkpoint-3", subfolder="unet_ema")
    DDPMPipeline.from_pretrained(teacher, unet=unet).save_pretrained(tmp_path / "student")
    assert DDPMPipeline.from_pretrained(tmp_path / "student")(num_inference_steps=1).images[0].size == (16, 16)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_grids_of_steps_that_are_gone_are_removed(tmp_path):
    """By their numbers: as texts, 250,000 comes after 1,000,000."""
    (tmp_path / "samples").mkdir()
    for step in (0, 250_000, 1_000_000, 1_250_000):
        (tmp_path / "samples" / f"step-{step:06d}.png").touch()
    (tmp_path / "samples" / "step-1250000 (copy).png").touch()
    flags = {"max_grad_norm": 1.0}
    MetricsLog(tmp_path, Accelerator(cpu=True), flags, 2_000_000, 1_000_000, 8, RunningMeans()).progress_bar.close()
    kept = {"step-000000.png", "step-250000.png", "step-1000000.png", "step-1250000 (copy).png"}
    assert {path.name for path in (tmp_path / "samples").iterdir()} == kept


def test_the_time_to_go_is_said_after_some_steps(tmp_path, capsys):
    accelerator = Accelerator(cpu=True)
    log = MetricsLog(tmp_path, accelerator, {"max_grad_norm": 1.0}, 100, 10, 8, RunningMeans())
    for _ in range(30):
        log.add({"loss": torch.tensor(1.0)})
    log.progress_bar.close()
    assert len(re.findall(r"a step takes [\d.]+ s: [\d:]+ to go", capsys.readouterr().out)) == 1
