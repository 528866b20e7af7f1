"""requirements.txt gives an environment whose parts work together, and the README speaks of what is there."""

import importlib
import re
import subprocess
import sys
from importlib.metadata import version

import pytest
from conftest import ROOT
from packaging.requirements import Requirement


def requirements() -> list[Requirement]:
    lines = (line.partition("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines())
    return [Requirement(line) for line in lines if line]


@pytest.mark.parametrize("requirement", requirements(), ids=lambda requirement: requirement.name)
def test_installed_versions_are_in_the_ranges(requirement):
    assert version(requirement.name) in requirement.specifier
    words = (ROOT / "requirements.lock").read_text().lower().split()
    locked = dict(word.split("==") for word in words if "==" in word)
    assert locked[requirement.name.lower()] in requirement.specifier


def test_torch_torchvision_cleanfid_peft_and_xformers_work_in_one_process():
    code = """
import torch, torchvision, peft, xformers.ops, cleanfid.fid, numpy
layer = torch.nn.Sequential(torch.nn.Linear(4, 4))
adapted = peft.get_peft_model(layer, peft.LoraConfig(target_modules=["0"], r=2))
assert any("lora_A" in name for name, _ in adapted.named_parameters())
boxes = torch.tensor([[0.0, 0, 2, 2], [0, 0, 2, 2]])
assert torchvision.ops.nms(boxes, torch.tensor([0.5, 0.9]), 0.5).tolist() == [1]
one, zero = numpy.eye(3), numpy.zeros(3)
assert abs(cleanfid.fid.frechet_distance(zero, one, zero + 2, one) - 12) < 1e-6
assert callable(xformers.ops.memory_efficient_attention)
"""
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr


@pytest.mark.parametrize("script", ["train_lift_unet", "train_lift_sd21", "train_lift_dit", "train_lift_sd3"])
def test_every_flag_the_readme_names_exists(script, capsys):
    commands = re.findall(rf"{script}\.py(?:\\\n|[^\n`])*", (ROOT / "README.md").read_text())
    assert len(commands) >= 2
    with pytest.raises(SystemExit):
        importlib.import_module(script).parse_args(["--help"])
    known = set(re.findall(r"--[a-z0-9_]+", capsys.readouterr().out))
    for command in commands:
        assert set(re.findall(r"--[a-z0-9_]+", command)) <= known, command


RESULTS = sorted(path.parent.name for path in (ROOT / "benchmarks" / "results").glob("*/results.md"))


@pytest.mark.parametrize("results", RESULTS)
def test_the_readme_shows_what_was_measured(results):
    measured = (ROOT / "benchmarks" / "results" / results / "results.md").read_text()
    table = [line for line in measured.splitlines() if line.startswith("|")]
    assert len(table) >= 6
    readme = (ROOT / "README.md").read_text()
    assert "\n".join(table) in readme
    assert f"benchmarks/results/{results}/samples.png" in readme


def test_every_picture_the_readme_shows_is_there():
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", (ROOT / "README.md").read_text())
    assert len(pictures) >= 4
    for picture in pictures:
        assert (ROOT / picture).exists(), picture
