"""Checkpoints: a resumed run goes on bit for bit, and a killed one loses nothing that was saved."""

import copy
import errno
import itertools
import json
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import common.images
import common.train_state
from common.batches import endless_batches
from common.checkpoints import (
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
    sweep,
)
from common.ending import StopSignals
from common.metrics import read_metrics
from common.train_state import flatten_optimizer
from common.training import guarded_step, make_optimizer, seed_step

import pytest
import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.optimizer import AcceleratedOptimizer
from conftest import ROOT, digest, run_file, wait_until
from diffusers import UNet2DModel
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train_lift_unet


SHORT = [
    *("--train_batch_size", 40, "--logging_steps", 1, "--checkpointing_steps", 1, "--dataloader_num_workers", 0),
    *("--num_validation_images", 1, "--num_inference_steps", 1, "--report_to", "none", "--learning_rate", 1e-3),
    *("--validation_steps", 3, "--max_train_steps", 5, "--checkpoints_total_limit", 100),
]
LATEST = ("--resume_from_checkpoint", "latest")
FIRST = ("--resume_from_checkpoint", "checkpoint-1")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Models this small are quicker on one thread, and much quicker where cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def command(teacher, images):
    """`command(output_dir, *flags)` is the command line of a short run that saves every step."""

    def command_for(output_dir: Path, *flags) -> list:
        source = ("--pretrained_teacher_model", teacher, "--student", 0.5, "--train_data_dir", images)
        return [*source, "--output_dir", output_dir, *SHORT, *flags]

    return command_for


@pytest.fixture
def distil(run, command, tmp_path):
    """`distil("name", *flags)` runs it and returns the output folder."""

    def distil_into(name: str, *flags) -> Path:
        run("train_lift_unet", *command(tmp_path / name, *flags))
        return tmp_path / name

    return distil_into


@pytest.fixture(scope="module")
def finished() -> dict[str, Path]:
    return {}


@pytest.fixture
def whole(distil, finished, tmp_path_factory) -> Path:
    """An uninterrupted run of five steps, made once. Tests leave it as it is and work on copies."""
    if not finished:
        finished["run"] = shutil.copytree(distil("whole"), tmp_path_factory.mktemp("finished") / "run")
    return finished["run"]


def interrupt(whole: Path, folder: Path, step: int) -> Path:
    """A copy of a run as it is when it was killed after `step`, but with metrics that had got further."""
    shutil.copytree(whole, folder, ignore=shutil.ignore_patterns("README.md", "*.png", "model_index.json"))
    for later in ("unet", "scheduler"):
        shutil.rmtree(folder / later)
    for checkpoint in list_checkpoints(folder):
        if checkpoint.name != f"checkpoint-{step}":
            shutil.rmtree(checkpoint)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "lo')  # the kill came in the middle of a row
    return folder


def rows(folder: Path) -> list[dict]:
    """The metrics without the one column that is not determined by the seed."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert all(row.pop("images_per_second") > 0 for row in rows)
    return rows


def assert_same_result(ours: Path, theirs: Path, steps: int) -> None:
    """Equal to the last bit: the saved model, and the last checkpoint's student, EMA, optimizer and state."""
    last = f"checkpoint-{steps}"
    weights = [
        {key: value for key, value in digest(run / last).items() if "json" not in key} for run in (ours, theirs)
    ]
    assert weights[0] == weights[1]
    models = {f"{folder}/diffusion_pytorch_model.safetensors" for folder in ("unet", "unet_ema")}
    assert weights[0].keys() == models | {"optimizer.safetensors", "projections.safetensors"}
    states = [json.loads((run / last / "state.json").read_text()) for run in (ours, theirs)]
    assert states[0] == states[1]
    assert states[0]["step"] == states[0]["lr_scheduler"]["last_epoch"] == steps
    assert digest(ours / "unet") == digest(theirs / "unet")
    assert [row["step"] for row in rows(ours)] == list(range(1, steps + 1))
    assert rows(ours) == rows(theirs)


# ------------------------------------------------------------------------------------------------------------ resuming


@pytest.mark.parametrize(
    ("resume_at", "steps", "flags"),
    [
        # 96 images: two batches of 40 an epoch, 16 images left out of each.
        pytest.param(3, 5, [], id="within an epoch"),
        pytest.param(4, 5, [], id="at the end of an epoch"),
        pytest.param(
            1, 4, ["--train_batch_size", 32, "--gradient_accumulation_steps", 2], id="groups over the end of an epoch"
        ),
        pytest.param(2, 4, ["--use_8bit_adam", "--adam_weight_decay", 0.01], id="8-bit Adam"),
        pytest.param(2, 4, ["--student", "dropout.json"], id="dropout"),
        pytest.param(2, 5, ["--lr_scheduler", "cosine", "--lr_warmup_steps", 3], id="cosine with warm-up"),
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one(distil, whole, tmp_path, monkeypatch, resume_at, steps, flags):
    monkeypatch.chdir(tmp_path)
    Path("dropout.json").write_text(json.dumps({"width": 0.5, "config": {"dropout": 0.2}}))
    if flags:
        flags = [*flags, "--max_train_steps", steps]
        whole = distil("other", *flags)
    interrupt(whole, tmp_path / "resumed", resume_at)
    resumed = distil("resumed", *flags, *LATEST)
    # It did go on from the checkpoint: earlier ones have not come back.
    names = [path.name for path in list_checkpoints(resumed)]
    assert names == [f"checkpoint-{step}" for step in range(resume_at, steps + 1)]
    assert_same_result(resumed, whole, steps)

    tensors = load_file(whole / f"checkpoint-{steps}" / "optimizer.safetensors")
    assert any(tensor.dtype == torch.uint8 for tensor in tensors.values()) == ("--use_8bit_adam" in flags)
    assert len({row["lr"] for row in rows(whole)}) > (3 if "cosine" in flags else 0)
    assert len({row["loss"] for row in rows(whole)}) == steps and all("feat" in row for row in rows(whole))


def test_projections_of_features_learn(whole):
    first, last = (load_file(whole / f"checkpoint-{step}" / "projections.safetensors") for step in (1, 5))
    assert first and not any(torch.equal(first[name], last[name]) for name in first)


def test_skipped_batches_are_not_decoded(distil, monkeypatch):
    decoded = []
    original = common.images.open_image

    def open_image(record, mode):
        decoded.append(mode)
        return original(record, mode)

    monkeypatch.setattr(common.images, "open_image", open_image)
    flags = ("--train_batch_size", 8)  # 12 batches an epoch
    distil("student", *flags, "--max_train_steps", 10)
    assert decoded.count("L") >= 80
    decoded.clear()
    folder = distil("student", *flags, "--max_train_steps", 12, *LATEST)
    assert len(rows(folder)) == 12
    assert 16 <= decoded.count("L") <= 24  # two batches, and one that may be fetched ahead


def test_latest_starts_anew_in_an_empty_folder(distil, whole, tmp_path):
    (tmp_path / "student").mkdir()
    assert_same_result(distil("student", *LATEST), whole, 5)


def test_a_finished_run_is_only_saved_again(distil, whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "student")
    shutil.rmtree(folder / "unet")
    (folder / "model_index.json").unlink()
    distil("student", *LATEST)
    before, after = digest(whole), digest(folder)
    assert before.pop("README.md") != after.pop("README.md")  # it quotes the command
    assert after == before
    for path in ("metrics.jsonl", "README.md"):
        (folder / path).unlink()
    distil("student", *LATEST)
    assert (
        "samples.png" in (folder / "README.md").read_text() and "curves.png" not in (folder / "README.md").read_text()
    )


def test_the_oldest_go_and_nothing_is_pickled(distil):
    folder = distil("student", "--max_train_steps", 4, "--checkpoints_total_limit", 2, "--report_to", "tensorboard")
    assert [path.name for path in list_checkpoints(folder)] == ["checkpoint-3", "checkpoint-4"]
    assert not list(folder.glob(".*"))
    files = [path for path in folder.rglob("*") if path.is_file() and "logs" not in path.parts]
    assert {path.suffix for path in files} == {".safetensors", ".json", ".jsonl", ".png", ".md"}
    checkpoint = {path.suffix for path in (folder / "checkpoint-4").rglob("*") if path.is_file()}
    assert checkpoint == {".safetensors", ".json"}
    for path in (path for path in folder.rglob("*") if path.is_file()):
        # A pickle of protocol 2 to 5, or the zip file that torch.save makes.
        assert not path.read_bytes().startswith((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK"))


def test_a_full_disk_keeps_the_newest(tmp_path, monkeypatch, capsys):
    save(tmp_path, 1, 2, 3)

    def usage(path: Path) -> SimpleNamespace:  # each checkpoint weighs 512 bytes, and there is room for three
        return SimpleNamespace(free=3 * 512 - 512 * len(list_checkpoints(path)))

    monkeypatch.setattr(shutil, "disk_usage", usage)
    save(tmp_path, 4, limit=3)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-3", "checkpoint-4"]
    assert capsys.readouterr().out == "the disk is almost full: checkpoint-1 makes room for the next checkpoint\n"
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    save(tmp_path, 5)  # all are kept
    assert len(list_checkpoints(tmp_path)) == 4
    save(tmp_path, 6, limit=3)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-5", "checkpoint-6"]


def test_file_systems_that_flush_no_folders(tmp_path, monkeypatch):
    fsync = os.fsync

    def flush_files(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", flush_files)
    save(tmp_path, 1)
    assert load_checkpoint(tmp_path / "checkpoint-1")[1] == {"step": 1}


def test_the_curves_of_a_tracker_have_each_step_once(distil, tmp_path):
    """Those of steps that a kill has undone go, as they do from metrics.jsonl."""
    tracked = ("--max_train_steps", 4, "--report_to", "tensorboard")
    folder = distil("student", *tracked)
    for name in ("checkpoint-3", "checkpoint-4"):
        shutil.rmtree(folder / name)
    distil("student", *tracked, *LATEST)
    events = EventAccumulator(str(folder / "logs" / "lift")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4]


def test_no_batch_waits_for_the_device_after_a_resume(monkeypatch):
    """As before it: Accelerate's `skip_first_batches` forgets that copies need not wait."""
    accelerator, seen = Accelerator(dataloader_config=DataLoaderConfiguration(non_blocking=True)), []

    def send(batch, device, non_blocking: bool = False, **options):
        seen.append(non_blocking)
        return batch

    monkeypatch.setattr("accelerate.data_loader.send_to_device", send)
    dataloader = accelerator.prepare_data_loader(torch.utils.data.DataLoader(range(8), batch_size=2))
    for done in (0, 2):
        batches = endless_batches(dataloader, done, StopSignals(1))
        assert next(batches).tolist() == [2 * done, 2 * done + 1]
    assert seen and all(seen)


# ------------------------------------------------------------------------------------------------------- interruptions


def test_sigterm_saves_and_exits(command, distil, whole, tmp_path):
    """As batch systems send it: to every process of the job, so the processes that decode images get it too."""
    folder = tmp_path / "stopped"
    flags = ("--dataloader_num_workers", 2, "--max_train_steps", 1000, "--checkpointing_steps", 1000)
    process = subprocess.Popen(
        [sys.executable, ROOT / "train_lift_unet.py", *map(str, command(folder, *flags))],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"},
        text=True,
        start_new_session=True,
    )
    try:
        wait_until(lambda: read_metrics(folder / "metrics.jsonl"), process)
        os.killpg(process.pid, signal.SIGTERM)
        output = process.communicate(timeout=60)[0]
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGTERM, output
    assert "--resume_from_checkpoint latest" in output and "Traceback" not in output
    done = len(rows(folder))
    assert [path.name for path in list_checkpoints(folder)] == [f"checkpoint-{done}"]

    steps = max(5, done + 1)
    distil("stopped", "--max_train_steps", steps, *LATEST)
    assert_same_result(folder, whole if steps == 5 else distil("other", "--max_train_steps", steps), steps)


SAVER = """
import os, sys
from pathlib import Path
import torch
from common.checkpoints import list_checkpoints, save_checkpoint

torch.set_num_threads(1)
folder = Path(sys.argv[1])
for _ in sys.stdin:  # one saver after the other; forking spares each the imports
    pid = os.fork()
    if pid:
        print(pid, flush=True)
        os.waitpid(pid, 0)
        print("ended", flush=True)
        continue
    done = list_checkpoints(folder)
    step = int(done[-1].name.split("-")[1]) if done else 0
    while True:
        step += 1
        group = {str(index): torch.full((256, 1024), float(step)) for index in range(2)}
        save_checkpoint(folder, step, {"student": group, "optimizer": group}, {"step": step}, limit=2)
"""


def test_a_kill_at_any_instant_leaves_whole_checkpoints(tmp_path):
    saver = subprocess.Popen(
        [sys.executable, "-c", SAVER, tmp_path], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    rubbish = 0
    try:
        for _ in range(12):
            saver.stdin.write("\n")
            saver.stdin.flush()
            pid = int(saver.stdout.readline())
            deadline = time.monotonic() + 60
            while not list_checkpoints(tmp_path):
                assert time.monotonic() < deadline
                time.sleep(0.01)
            time.sleep(random.uniform(0, 0.2))
            os.kill(pid, signal.SIGKILL)
            assert saver.stdout.readline() == "ended\n"

            folders = list_checkpoints(tmp_path)
            assert folders
            for folder in folders:
                tensors, state = load_checkpoint(folder)
                assert folder.name == f"checkpoint-{state['step']}"
                assert tensors.keys() == {"student", "optimizer"}
                for tensor in (*tensors["student"].values(), *tensors["optimizer"].values()):
                    assert (tensor == state["step"]).all()
            rubbish += len(list(tmp_path.iterdir())) - len(folders)
            sweep(tmp_path)
            assert sorted(tmp_path.iterdir()) == sorted(folders)
    finally:
        saver.stdin.close()
        saver.wait(timeout=30)
    assert rubbish > 0  # kills did fall into saves


def test_flushed_before_it_is_renamed(tmp_path, monkeypatch):
    """What a power cut needs: every file is on the disk before the folder gets its name, and then that name is."""
    synced, renamed = [], []
    fsync, rename = os.fsync, Path.rename

    def record_fsync(descriptor):
        synced.append((os.fstat(descriptor).st_ino, bool(renamed)))
        fsync(descriptor)

    def record_rename(path, target):
        renamed.append(Path(target).name)
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(Path, "rename", record_rename)
    folder = save_checkpoint(tmp_path, 1, {"student": {"a": torch.ones(3)}}, {"step": 1}, limit=None)
    assert renamed == ["checkpoint-1"]
    inodes = {path.stat().st_ino for path in (folder, *folder.iterdir())}
    assert len(inodes) == 4 and inodes <= {inode for inode, after in synced if not after}
    assert (tmp_path.stat().st_ino, True) in synced


def test_native_windows():
    code = "import sys; sys.modules['fcntl'] = None; import train_lift_unet"
    finished = run_file("-c", code)
    assert finished.returncode == 1 and "Traceback" not in finished.stdout
    assert finished.stdout.splitlines()[-1].startswith("error: native Windows") and "use WSL2" in finished.stdout


# ------------------------------------------------------------------------------------------------- damaged and foreign


def save(folder: Path, *steps: int, limit: int | None = None) -> None:
    """Small checkpoints whose content says which step they are of."""
    for step in steps:
        tensors = {name: {"a": torch.full((64,), float(step))} for name in ("student", "optimizer")}
        save_checkpoint(folder, step, tensors, {"step": step}, limit)


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "first byte": lambda path: flip(path, 0),
    "middle byte": lambda path: flip(path, path.stat().st_size // 2),
    "last byte": lambda path: flip(path, -1),
}
FILES = ("student.safetensors", "optimizer.safetensors", "state.json", "manifest.json")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_found(tmp_path, capsys, name, damage):
    save(tmp_path, 1, 2, 10)
    DAMAGE[damage](tmp_path / "checkpoint-10" / name)
    tensors, state = find_checkpoint(tmp_path, "latest")
    assert state == {"step": 2} and (tensors["student"]["a"] == 2).all()
    output = capsys.readouterr().out
    assert "checkpoint-10" in output and output.count("\n") == 1
    for named in ("checkpoint-10", str(tmp_path / "checkpoint-10")):
        with pytest.raises(SystemExit, match=r"^error: --resume_from_checkpoint \S*checkpoint-10: .*latest") as error:
            find_checkpoint(tmp_path, named)
        assert "\n" not in str(error.value)
    assert find_checkpoint(tmp_path, "checkpoint-2", discard_later=True)[1] == {"step": 2}


def test_every_bit_of_the_manifest_is_guarded(tmp_path):
    save(tmp_path, 1)
    path = tmp_path / "checkpoint-1" / "manifest.json"
    content = path.read_bytes()
    for position in range(len(content)):
        for bit in (1, 32):
            path.write_bytes(content[:position] + bytes([content[position] ^ bit]) + content[position + 1 :])
            try:
                tensors, state = load_checkpoint(tmp_path / "checkpoint-1")
            except ValueError:
                continue
            assert state == {"step": 1} and tensors.keys() == {"student", "optimizer"}, position


def test_other_folders_are_no_checkpoints(tmp_path):
    save(tmp_path, 9, 10, limit=5)
    for name in ("checkpoint-", "checkpoint-12-old", "checkpoint-best", ".tmp-11", ".del-8"):
        (tmp_path / name).mkdir()
    (tmp_path / ".tmp-11" / "state.json").write_text('{"step": 11}')
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10"]
    sweep(tmp_path)
    assert not list(tmp_path.glob(".*")) and (tmp_path / "checkpoint-best").exists()


def test_a_run_goes_on_from_the_newest_whole_checkpoint(distil, whole, tmp_path, capsys):
    folder = shutil.copytree(whole, tmp_path / "damaged")
    flip(folder / "checkpoint-5" / "optimizer.safetensors", -1)
    (folder / "checkpoint-4" / "manifest.json").unlink()
    for rubbish in (".tmp-4", ".del-4", ".tmp-6"):  # of earlier kills; the run will save a checkpoint-4 again
        (folder / rubbish).mkdir()
        (folder / rubbish / "state.json").write_text("{}")
    distil("damaged", *LATEST)
    output = capsys.readouterr().out
    assert "passing over checkpoint-5" in output and "passing over checkpoint-4" in output
    assert "checkpoint-3" not in output
    assert_same_result(folder, whole, 5)
    assert not list(folder.glob(".*"))


def test_a_lower_learning_rate_is_obeyed(distil):
    flags = ("--lr_warmup_steps", 2)  # of the default schedule, which is constant after it
    distil("student", "--max_train_steps", 3, *flags)
    folder = distil("student", *flags, *LATEST, "--learning_rate", 1e-5)
    assert [row["lr"] for row in rows(folder)] == pytest.approx([5e-4, 1e-3, 1e-3, 1e-5, 1e-5])
    weights = [
        load_file(folder / f"checkpoint-{step}" / "unet/diffusion_pytorch_model.safetensors") for step in (2, 3, 4)
    ]
    moved = [
        max((after[key] - before[key]).abs().max() for key in after) for before, after in itertools.pairwise(weights)
    ]
    assert 0 < moved[1] < 0.05 * moved[0]  # the first step after the resume already is a small one


def test_optimizer_and_average_obey_their_flags(distil):
    """Three steps, by the checkpoints: AdamW on a clipped gradient, with decay of the weights, and their average."""
    flags = ("--learning_rate", 0.01, "--max_grad_norm", 1e-3, "--adam_weight_decay", 0.5, "--ema_decay", 0.05)
    betas = ("--adam_beta1", 0.6, "--adam_beta2", 0.8, "--adam_epsilon", 1e-5)
    folder = distil("student", "--max_train_steps", 3, *flags, *betas)
    steps = [folder / f"checkpoint-{step}" for step in (1, 2, 3)]
    weights, averages = (
        [load_file(step / model / "diffusion_pytorch_model.safetensors") for step in steps]
        for model in ("unet", "unet_ema")
    )
    moments = [load_file(step / "optimizer.safetensors") for step in steps]
    first, second = (
        torch.cat([value.flatten() for name, value in moments[0].items() if name.endswith(kind)])
        for kind in (".exp_avg", ".exp_avg_sq")
    )
    assert first.norm().item() == pytest.approx(0.4 * 1e-3, rel=1e-3)  # a share of the gradient, and of its square
    assert second.sum().item() == pytest.approx(0.2 * 1e-3**2, rel=1e-3)
    names = [name for name, _ in UNet2DModel.from_pretrained(steps[0] / "unet").named_parameters()]
    for index, name in enumerate(names):  # the model's parameters come before the projections'
        first, second = (
            moments[2][f"{index}.{kind}"] / (1 - beta**3) for kind, beta in (("exp_avg", 0.6), ("exp_avg_sq", 0.8))
        )
        expected = (1 - 0.01 * 0.5) * weights[1][name] - 0.01 * first / (second.sqrt() + 1e-5)
        torch.testing.assert_close(weights[2][name], expected, rtol=1e-5, atol=1e-7)
        average = 0.05 * averages[1][name] + 0.95 * weights[2][name]
        torch.testing.assert_close(averages[2][name], average, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("limit", [None, 1, 2])
def test_latest_is_of_the_course_the_run_took(tmp_path, limit):
    """A run went on from step 4 of 8. What it saves is not taken for older than what it left behind."""
    save(tmp_path, 2, 4, 6, 8)
    save(tmp_path, 5, limit=limit)
    left = [path.name for path in list_checkpoints(tmp_path)]
    assert left == ["checkpoint-2", "checkpoint-4", "checkpoint-5"][-(limit or 3) :]
    assert find_checkpoint(tmp_path, "latest")[1] == {"step": 5}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--output_dir .* holds another run"),
        ([*LATEST, "--student", 0.25], "latest is of another student.*block_out_channels"),
        ([*LATEST, "--no-use_ema"], "latest is of another student"),
        ([*LATEST, "--lambda_kd_feat", 0], "latest is of another student"),
        ([*FIRST, "--resolution", 32, "--discard_later_checkpoints"], "checkpoint-1 is of another student"),
        (FIRST, "checkpoint-1 is older than checkpoint-5, .*; pass latest, or --discard_later_checkpoints"),
        ([*LATEST, "--use_8bit_adam"], "latest is of AdamW; .*--use_8bit_adam"),
        (["--resume_from_checkpoint", "checkpoint-7"], "--resume_from_checkpoint checkpoint-7 is no folder"),
        ([*LATEST, "--max_train_steps", 4], "5 steps are done, and --max_train_steps or .* says 4; pass more, or"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_nothing_is_lost_by_the_wrong_flags(distil, whole, tmp_path, flags, message):
    folder = shutil.copytree(whole, tmp_path / "student")
    with pytest.raises(SystemExit, match=f"^error: .*{message}") as error:
        distil("student", "--max_train_steps", 6, *flags)
    assert "\n" not in str(error.value)
    assert digest(folder) == digest(whole)


def test_processes_go_on_from_one_checkpoint(distil, whole, tmp_path, monkeypatch):
    """On two machines whose folders are not one, the other finds none."""
    folder = shutil.copytree(whole, tmp_path / "student")
    monkeypatch.setattr(common.train_state, "gather_object", lambda steps: [*steps, 0])
    with pytest.raises(SystemExit, match=r"find checkpoints of the steps \[5, 0\]; --output_dir must be one"):
        distil("student", "--max_train_steps", 6, *LATEST)
    assert digest(folder) == digest(whole)


# ------------------------------------------------------------------------------------------- steps that are not finite


def make(kind: str):
    """A parameter set and its optimizer, prepared as the scripts prepare it."""
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(64, 128)), torch.nn.Parameter(torch.randn(10))]
    model = torch.nn.ParameterList(parameters)
    optimizer = make_optimizer(
        model, learning_rate=0.1, betas=(0.9, 0.999), weight_decay=0.1, epsilon=1e-8, use_8bit=kind == "8-bit"
    )
    return parameters, Accelerator().prepare(optimizer)


def make_scaled():
    """A parameter and its optimizer, as Accelerate prepares it for fp16."""
    Accelerator()  # whose state the optimizer asks
    weight = torch.nn.Parameter(torch.ones(3))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    return weight, AcceleratedOptimizer(torch.optim.SGD([weight], lr=0.1), device_placement=False, scaler=scaler)


def take(parameters, optimizer, step: int, value: float, skipped: torch.Tensor) -> None:
    """One step with gradients that depend on `step`, multiplied by `value`."""
    generator = torch.Generator().manual_seed(step)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator) * value
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters])
    guarded_step(optimizer, torch.tensor(1.0), norm, skipped)
    optimizer.zero_grad()


@pytest.mark.parametrize("kind", ["fused", "8-bit"])
def test_a_step_that_is_not_finite_leaves_no_trace(kind):
    """Weights, moments and step counters are those of a run that had the good steps alone."""
    nan, inf = float("nan"), float("inf")
    values = [nan, 1, 1, inf, nan, 1, -inf, 1, nan]
    parameters, optimizer = make(kind)
    start = copy.deepcopy(parameters)
    skipped, counts = torch.zeros(2), []
    for step, value in enumerate(values):
        take(parameters, optimizer, step, value, skipped)
        counts.append(tuple(skipped.tolist()))
    assert counts == [(1, 1), (1, 0), (1, 0), (2, 1), (3, 2), (3, 0), (4, 1), (4, 0), (5, 1)]

    others, other_optimizer = make(kind)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(start, others))
    for step, value in enumerate(values):
        if value == 1:
            take(others, other_optimizer, step, value, torch.zeros(2))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(parameters, others))
    assert not any(torch.equal(ours, theirs) for ours, theirs in zip(parameters, start))
    (tensors, rest), (other_tensors, other_rest) = map(flatten_optimizer, (optimizer, other_optimizer))
    assert tensors.keys() == other_tensors.keys() and rest == other_rest
    assert all(torch.equal(tensors[key], other_tensors[key]) for key in tensors)
    steps = [value for key, value in {**tensors, **rest["scalars"]}.items() if key.endswith(".step")]
    assert [float(step) for step in steps] == [values.count(1)] * 2


def test_a_scaler_that_looks_for_its_scale_is_no_fault():
    """Under fp16 it halves its scale and skips the step; the count begins where no scale would help."""
    weight, optimizer = make_scaled()
    skipped, counts = torch.zeros(2), []
    for step in range(62):
        weight.grad = torch.full((3,), float("inf"))
        optimizer.scaler.scale(torch.tensor(1.0))
        optimizer.scaler.unscale_(optimizer.optimizer)
        loss = torch.tensor(float("nan") if step == 3 else 1.0)
        guarded_step(optimizer, loss, weight.grad.norm(), skipped)
        counts.append(skipped[1].item())
    assert counts[:5] == [0, 0, 0, 1, 0] and counts[40] == 0  # a loss that is not finite counts at any scale
    assert counts[-1] == 20 and torch.equal(weight, torch.ones(3))


def test_a_loss_that_is_not_finite_leaves_the_scale():
    """A teacher that overflows for one image in a thousand must not bring the scale down to nothing."""
    weight, optimizer = make_scaled()
    skipped, moved = torch.zeros(2), []
    for step in range(6):
        before, factor = weight.detach().clone(), float("nan") if step % 2 else 1.0
        loss = weight.sum() * factor
        optimizer.scaler.scale(loss).backward()
        optimizer.scaler.unscale_(optimizer.optimizer)
        guarded_step(optimizer, loss.detach(), weight.grad.norm(), skipped)
        optimizer.zero_grad()
        moved.append(not torch.equal(weight, before))
    assert optimizer.scaler.get_scale() == 2.0**16
    assert moved == [True, False] * 3 and skipped.tolist() == [3, 1]


def test_a_skipped_step_is_counted_and_the_run_goes_on(distil, tmp_path, monkeypatch):
    compute_losses, weights = train_lift_unet.compute_losses, []

    def second_is_nan(student, *others, **options):
        weights.append(copy.deepcopy(student.state_dict()))
        loss, logs = compute_losses(student, *others, **options)
        factor = float("nan") if len(weights) == 2 else 1.0
        return loss * factor, {**logs, "loss": logs["loss"] * factor}

    monkeypatch.setattr(train_lift_unet, "compute_losses", second_is_nan)
    whole = distil("whole", "--max_train_steps", 4)
    assert [(row["skipped"], row["skipped_in_a_row"]) for row in rows(whole)] == [(0, 0), (1, 1), (1, 0), (1, 0)]
    assert [row["loss"] is None for row in rows(whole)] == [False, True, False, False]
    same = [all(torch.equal(new[key], old[key]) for key in new) for old, new in itertools.pairwise(weights)]
    assert same == [False, True, False]
    saved = [path.name for path in list_checkpoints(whole)]
    assert saved == ["checkpoint-1", "checkpoint-3", "checkpoint-4"]  # none of a bad step

    interrupt(whole, tmp_path / "resumed", 3)  # the count is part of the checkpoint
    assert_same_result(distil("resumed", "--max_train_steps", 4, *LATEST), whole, 4)


def test_a_run_that_diverges_ends_and_can_go_on(distil, whole, tmp_path):
    folder = interrupt(whole, tmp_path / "student", 2)
    flags = ("--max_train_steps", 100, "--validation_steps", 100, "--checkpoints_total_limit", 2)
    with pytest.raises(SystemExit, match=r"^error: .*not finite for 20 steps.*lower --learning_rate") as error:
        distil("student", *LATEST, *flags, "--learning_rate", 1e30)
    assert "\n" not in str(error.value)
    assert rows(folder)[-1]["skipped_in_a_row"] == 20 and rows(folder)[-1]["step"] <= 25

    # One ruined step was finite. The good one before it has outlived the limit, and the run goes on from there.
    for checkpoint in list_checkpoints(folder):
        load_checkpoint(checkpoint)
    assert digest(folder / "checkpoint-2") == digest(whole / "checkpoint-2")
    distil("student", "--resume_from_checkpoint", "checkpoint-2", "--discard_later_checkpoints")
    assert_same_result(folder, whole, 5)


def test_checkpoints_that_a_run_discards_are_gone_before_it_saves(distil, whole, tmp_path, monkeypatch):
    """Else `latest`, after its own death, would go on from the course that it was to leave."""
    folder = shutil.copytree(whole, tmp_path / "student")

    def die(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(train_lift_unet, "MetricsLog", die)
    with pytest.raises(KeyboardInterrupt):
        distil("student", "--resume_from_checkpoint", "checkpoint-2", "--discard_later_checkpoints")
    assert [path.name for path in list_checkpoints(folder)] == ["checkpoint-1", "checkpoint-2"]


# ------------------------------------------------------------------------------------------------------- random states


def test_draws_depend_on_the_place_in_the_run_alone():
    def draw(*place):
        seed_step(*place)
        return tuple(torch.rand(4).tolist())

    first = draw(0, 1, 0, 0)
    torch.rand(100)
    assert draw(0, 1, 0, 0) == first
    # Seed, step, micro-step and rank, each of them, and never by their sum or their digits alone.
    places = [(0, 1, 0, 0), (1, 1, 0, 0), (0, 2, 0, 0), (0, 1, 1, 0), (0, 1, 0, 1), (1, 0, 0, 0), (0, 11, 0, 0)]
    places += [(0, 0, 1, 0), (0, 0, 11), (0,), (1,), (10,), (2**40, 1, 0, 0)]
    assert len({draw(*place) for place in places}) == len(places)
