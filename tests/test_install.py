"""requirements.txt gives an environment whose parts work together, and the README speaks of what is there."""

import re
import subprocess
import sys
from importlib.metadata import version

import pytest
from conftest import ROOT
from packaging.requirements import Requirement

import train_lift_unet


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


def test_every_flag_the_readme_names_exists(capsys):
    commands = re.findall(r"train_lift_unet\.py(?:[^\n`]|\\\n)*", (ROOT / "README.md").read_text())
    assert len(commands) >= 5
    with pytest.raises(SystemExit):
        train_lift_unet.parse_args(["--help"])
    known = set(re.findall(r"--[a-z0-9_]+", capsys.readouterr().out))
    for command in commands:
        assert set(re.findall(r"--[a-z0-9_]+", command)) <= known, command


def test_the_readme_shows_the_demo_as_it_was_measured():
    measured = (ROOT / "benchmarks" / "results" / "demo" / "results.md").read_text()
    table = [line for line in measured.splitlines() if line.startswith("|")]
    assert len(table) >= 6
    assert "\n".join(table) in (ROOT / "README.md").read_text()
