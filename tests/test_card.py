"""The model card of a student: whose it is, how the run is repeated by it, and what it must not say."""

import importlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

from common import card
from common.arguments import RunFacts, describe_run
from common.changes import INCIDENTAL, keep_flags, read_changes

import pytest
import torch
from conftest import ROOT, run_file
from huggingface_hub import metadata_load
from safetensors.torch import load_file

import train_lift_unet
from tiny_models import TINY_UNET


TOKEN, LOGIN = "hf_notARealTokenButItMustNotLeak", "of-another-tracker"
CARD = """---
license: other
license_name: the-teachers-own
license_link: LICENSE.md
base_model: someone/pixels
---
# Teacher
"""
FLAGS = [
    *("--student", 0.5, "--train_batch_size", 8, "--max_train_steps", 2, "--checkpointing_steps", 1),
    *("--logging_steps", 1, "--dataloader_num_workers", 0, "--num_inference_steps", 1, "--report_to", "none"),
    *("--num_validation_images", 1),
]


SCRIPTS = ("unet", "sd21", "sdxl", "dit", "sd3")


@pytest.fixture
def make_student(run, teacher, images, tmp_path):
    """`make_student(readme, *flags)` distils a teacher with this model card; returns the folder of the student."""

    def make(readme: str | None, *flags) -> Path:
        source, folder = shutil.copytree(teacher, tmp_path / "teacher"), tmp_path / "student"
        if readme is not None:
            (source / "README.md").write_text(readme)
        data = ("--train_data_dir", images, "--output_dir", folder)
        run("train_lift_unet", "--pretrained_teacher_model", source, *data, *FLAGS, *flags)
        return folder

    return make


@pytest.mark.parametrize("readme", [None, "# No metadata", "---\nlicense: [\n---\n", "---\n- a list\n---\n"])
def test_a_teacher_without_a_card_leaves_the_fields_out(make_student, readme):
    data = metadata_load(make_student(readme) / "README.md")
    assert data["library_name"] == "diffusers" and not data.keys() & {"license", "base_model", "license_name"}


def test_the_card_repeats_the_run_and_keeps_secrets(make_student, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("WANDB_API_KEY", LOGIN)
    student = make_student(CARD, "--cache_dir", tmp_path / LOGIN / TOKEN)
    data = metadata_load(student / "README.md")
    assert data["license"] == "other" and data["license_name"] == "the-teachers-own"
    assert data["base_model"] == "someone/pixels" and "license_link" not in data  # a file that is not here
    text = (student / "README.md").read_text()
    assert TOKEN not in text and LOGIN not in text
    assert "- Hardware: 1 × CPU, mixed precision no; " in text and "all parts of the run together" in text
    assert f"torch {torch.__version__}" in text.replace(torch.__version__.split("+")[0], torch.__version__)
    assert f"Python {sys.version.split()[0]}, " in text

    launcher, script, *flags = text.split("The command:\n\n```\n")[1].split("\n```")[0].partition("train_lift_unet.py")
    assert launcher == "accelerate launch --num_processes 1 --mixed_precision no --cpu " and script
    flags = ["again" if flag == str(student) else flag for flag in shlex.split(flags[0])]
    command = ["-m", "accelerate.commands.launch", *launcher.split()[2:], ROOT / script, *flags]
    finished = run_file(*command, cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert finished.returncode == 0, finished.stdout
    name = "unet/diffusion_pytorch_model.safetensors"
    first, second = load_file(student / name), load_file(tmp_path / "again" / name)
    assert all(torch.equal(first[key], second[key]) for key in first)


def facts(teacher: str | None, license: str | None = None, revision: str | None = None) -> RunFacts:
    return RunFacts([], teacher, revision, license, 4)


def test_the_flag_goes_before_the_teachers_licence(tmp_path):
    (tmp_path / "README.md").write_text(CARD)
    assert card.describe_origin(facts(str(tmp_path), "mit")) == {"base_model": "someone/pixels", "license": "mit"}
    assert card.describe_origin(facts(None, "openrail++")) == {"license": "openrail++"}
    assert card.describe_origin(facts(None)) == {"license": None}


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("/home/ada/private project/sd", None),
        (["someone/pixels", "../sd", "gpt2"], ["someone/pixels", "gpt2"]),
        (["./sd"], None),
        (7, None),
    ],
)
def test_a_base_model_that_is_not_on_the_hub_is_left_out(tmp_path, theirs, ours):
    """The Hub refuses a card with one, and a path would be read by all."""
    (tmp_path / "README.md").write_text(f"---\nbase_model: {json.dumps(theirs)}\n---\n")
    assert card.describe_origin(facts(str(tmp_path)))["base_model"] == ours


def test_a_teacher_on_the_hub(monkeypatch, tmp_path):
    """Its card is read by its revision, and from the cache where it is there."""
    (tmp_path / "README.md").write_text(CARD)
    asked = []
    monkeypatch.setattr(card, "get_hf_file_metadata", lambda url, timeout: asked.append(url))
    monkeypatch.setattr(card, "hf_hub_download", lambda model, name, revision: tmp_path / name)
    origin = card.describe_origin(facts("someone/teacher", revision="v1"))
    assert asked == ["https://huggingface.co/someone/teacher/resolve/v1/README.md"]
    link = "https://huggingface.co/someone/teacher/blob/v1/LICENSE.md"
    names = {"license": "other", "license_name": "the-teachers-own", "license_link": link}
    assert origin == {"base_model": "someone/teacher", **names}
    monkeypatch.setattr(card, "try_to_load_from_cache", lambda *arguments, **options: str(tmp_path / "README.md"))
    assert card.describe_origin(facts("someone/teacher", revision="v1")) == origin and len(asked) == 1


@pytest.mark.parametrize("offline", ["0", "1"])
def test_a_hub_that_does_not_answer_costs_no_time(offline, tmp_path):
    code = "from common.card import read_metadata; print(read_metadata('someone/teacher', None))"
    variables = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": offline, "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-c", f"import time; {code}; start = time.time(); {code}; print(time.time() - start)"]
    environment = {**os.environ, **variables, "NO_PROXY": "127.0.0.1"}
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100)
    first, second, seconds = finished.stdout.splitlines()
    assert first == second == "{}" and float(seconds) < 6


def test_the_launcher_is_told_what_it_was_told(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/train_lift_dit.py", "--student", "d 14"])

    def command(count: int, device: str) -> str:
        state = SimpleNamespace(num_processes=count, mixed_precision="fp16", device=torch.device(device))
        return card.launch_command(state)

    script, how = "train_lift_dit.py --student 'd 14'", "--mixed_precision fp16"
    assert command(1, "cuda") == f"accelerate launch --num_processes 1 {how} {script}"
    assert command(2, "cuda") == f"accelerate launch --num_processes 2 {how} --multi_gpu {script}"
    two = "ACCELERATE_USE_CPU=true ACCELERATE_MIXED_PRECISION=fp16 torchrun --nproc_per_node 2"
    assert command(2, "cpu") == f"{two} {script}"


def test_hours_are_those_of_all_parts():
    """Ten steps of eight images at four a second, and after a resume thirty at two a second; a row without a speed."""
    rows = [{"step": 10, "images_per_second": 4.0}, {"step": 15, "images_per_second": None}, {"step": 20}]
    rows.append({"step": 50, "images_per_second": 2.0})
    assert card.training_hours(rows, 8) * 3600 == pytest.approx(10 * 8 / 4 + 30 * 8 / 2)


def test_no_folders_on_the_hub():
    text = "x --a /mnt/a/b '/mnt/b c/d e' --f=/mnt/f `~/a/c` https://x.y/a/b me/name a/b.png /"
    assert card.without_folders(text) == "x --a b 'd e' --f=f `c` https://x.y/a/b me/name a/b.png /"
    assert card.without_folders("`/mnt/b c/d` --g '/mnt/e f/g h' (before: /a/b)") == "`d` --g 'g h' (before: b)"


@pytest.mark.parametrize("damaged", ["{", '{"a": 1}', "[1]", "3", '[{"x": 1}]'])
def test_damaged_flags_say_nothing(tmp_path, damaged):
    (tmp_path / "flags.json").write_text(damaged)
    assert keep_flags(tmp_path, {"kd_loss": "mse"}, 2) is None and read_changes(tmp_path) == []
    assert len(json.loads((tmp_path / "flags.json").read_text())) == 1


def test_flags_that_do_not_count_are_flags():
    """One that is misspelt would count."""
    command = ["--dry_run", "--student", "whole", "--pretrained_teacher_model", "teacher"]
    parsers = (importlib.import_module(f"train_lift_{script}").parse_args for script in SCRIPTS)
    flags = {name for parse in parsers for name in vars(parse(command))}
    assert flags >= INCIDENTAL and {"kd_loss", "seed", "caption_column", "lr_scheduler", "vae"} <= flags - INCIDENTAL


def test_folders_that_are_a_dot_have_names(run, images, tmp_path, monkeypatch):
    student = tmp_path / "mine"
    student.mkdir()
    (tmp_path / "unet.json").write_text(json.dumps({"config": TINY_UNET}))
    monkeypatch.chdir(student)
    where = ("--kd_loss", "none", "--student", tmp_path / "unet.json", "--train_data_dir", images, "--output_dir", ".")
    run("train_lift_unet", *FLAGS, *where, "--max_train_steps", 1)
    assert 'from_pretrained("mine")' in (student / "README.md").read_text()
    monkeypatch.chdir(images)
    flags = ["--kd_loss", "none", "--student", "x.json", "--train_data_dir", ".", "--output_dir", str(student)]
    args = train_lift_unet.parse_args(flags)
    assert f"- Data: `{images.name}`." in describe_run(args).lines


def test_a_run_that_goes_on_with_other_flags_says_so(make_student, tmp_path, run, images, caplog):
    student, teacher = make_student(None, "--max_train_steps", 1), tmp_path / "teacher"
    other = ("--kd_loss", "mse", "--learning_rate", 1e-3, "--resume_from_checkpoint", "latest")
    where = ("--pretrained_teacher_model", teacher, "--train_data_dir", images, "--output_dir", student)
    caplog.clear()
    run("train_lift_unet", *where, *FLAGS, *other)
    changes = "from step 2 on --kd_loss mse (before: place), --learning_rate 0.001 (before: 0.0002), "
    changes += "--max_train_steps 2 (before: 1)"
    assert f"the run goes on with other flags, {changes}; its card will say so" in caplog.text
    assert f"- Other flags {changes}.\n" in (student / "README.md").read_text()
    caplog.clear()  # learning rates and weights of the loss may follow the length of the run
    run("train_lift_unet", *where, *FLAGS, *other, "--max_train_steps", 3)
    assert "other flags, from step 3 on --max_train_steps 3 (before: 2); its card" in caplog.text
    assert changes in (student / "README.md").read_text()
    parts = json.loads((student / "flags.json").read_text())
    assert [part["first_step"] for part in parts] == [0, 1, 2] and {p["flags"]["num_processes"] for p in parts} == {1}
    caplog.clear()  # the same flags are no change
    shutil.rmtree(student / "checkpoint-2")
    shutil.rmtree(student / "checkpoint-3")
    run("train_lift_unet", *where, *FLAGS, *other, "--max_train_steps", 2)
    run("train_lift_unet", *where, *FLAGS, *other, "--max_train_steps", 2)
    assert caplog.text.count("other flags, from step 2 on") == 1
    parts = json.loads((student / "flags.json").read_text())
    assert [part["first_step"] for part in parts] == [0, 1]  # what is done once more is forgotten


def test_no_secrets_and_no_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.setenv("SOME_SECRET", "abcdefgh")
    monkeypatch.setenv("SHORT_TOKEN", "a")
    text = f"x --a /home/ada/a '/home/ada/b c' --f=/home/ada/f `/home/ada/c` /home/adam/d --e={TOKEN} f/abcdefgh"
    text += " hf_model_of_somebody"
    kept = "x --a ~/a '~/b c' --f=~/f `~/c` /home/adam/d --e=REMOVED f/REMOVED hf_model_of_somebody"
    assert card.without_secrets(text) == kept
