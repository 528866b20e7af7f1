"""The published comparison, by benchmarks/published.py, of a tiny teacher and with a small budget."""

import importlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT
from PIL import Image

import published
import train_lift_unet


@pytest.fixture
def commands(run, monkeypatch) -> list[list[str]]:
    """The scripts run in this process; returns what would be launched."""
    started: list[list[str]] = []

    def run_here(command: list[str]) -> SimpleNamespace:
        place = next(number for number, word in enumerate(command) if word.endswith(".py"))
        script, words = Path(command[place]), command[place + 1 :]
        started.append([script.stem, *words])
        assert script.exists() and script.is_relative_to(ROOT)
        if script.parent.name == "eval":
            module = importlib.import_module(script.stem)
            module.main(module.parse_args(words))
        else:
            run(script.stem, *words)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(published, "subprocess", SimpleNamespace(run=run_here))
    return started


def test_one_command_trains_draws_and_measures_and_goes_on(commands, teacher, images, classifier, tmp_path):
    flags = ["--teacher", str(teacher), "--data", str(images), "--output_dir", str(tmp_path / "published")]
    flags += ["--student", "0.5", "--max_train_steps", "2", "--num_images", "12", "--batch_size", "12"]
    flags += ["--features", str(classifier), "--losses", "place", "fitnet"]
    more = ["--train_batch_size", "4", "--num_validation_images", "1", "--num_inference_steps", "1"]
    more += ["--dataloader_num_workers", "0", "--learning_rate", "0.01"]  # else two students would be alike
    published.main(published.parse_args([*flags, "--", *more]))
    kinds = ["generate", "train_lift_unet", "generate", "train_lift_unet", "generate", "evaluate"]
    assert [script for script, *_ in commands] == kinds
    rows = json.loads((tmp_path / "published" / "results.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["teacher", "place-0", "fitnet-0"]
    assert len({row["fid"] for row in rows}) == 3
    assert all(len([*Path(row["folder"]).glob("*.png")]) == 12 for row in rows)
    assert "place-0" in (tmp_path / "published" / "results.md").read_text()
    assert {row["num_inference_steps"] for row in rows} == {100}

    published.main(published.parse_args([*flags, "--", *more]))
    assert [script for script, *_ in commands[6:]] == ["generate", "generate", "generate", "evaluate"]


@pytest.mark.parametrize("loss", published.LOSSES)
def test_losses_are_command_lines_of_the_script(loss, teacher, images):
    words = ["--pretrained_teacher_model", str(teacher), "--train_data_dir", str(images), "--student", "0.5"]
    args = train_lift_unet.parse_args([*words, *published.LOSSES[loss]])
    assert args.kd_loss == loss.removesuffix("-rms").replace("fitnet", "mse")


def test_a_dataset_with_another_column(monkeypatch, tmp_path):
    """The trainings and the reference read it, and the reference is as large as the models' images."""
    started: list[list[str]] = []

    def note(command: list[str]) -> SimpleNamespace:
        started.append(command)
        if "--num_images" in command:
            folder = Path(command[command.index("--output_dir") + 1])
            folder.mkdir(parents=True)
            Image.new("L", (24, 24)).save(folder / "00000.png")
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(published, "subprocess", SimpleNamespace(run=note))
    flags = ["--teacher", "teacher", "--data", "someone/photographs", "--image_column", "img", "--losses", "mse"]
    published.main(published.parse_args([*flags, "--output_dir", str(tmp_path)]))
    read = [command for command in started if "--image_column" in command]
    assert [command[command.index("--image_column") + 1] for command in read] == ["img", "img"]
    assert ["--dataset_name" in command for command in read] == [True, False]
    assert read[1][read[1].index("--reference_resolution") + 1] == "24"


def test_a_failed_script_ends_it(monkeypatch, tmp_path):
    monkeypatch.setattr(published, "subprocess", SimpleNamespace(run=lambda command: SimpleNamespace(returncode=3)))
    flags = ["--teacher", "teacher", "--data", "images", "--output_dir", str(tmp_path)]
    with pytest.raises(SystemExit, match=r"error: .*eval/generate.py ended with exit code 3: its messages are above"):
        published.main(published.parse_args(flags))
