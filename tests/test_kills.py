"""A handful of the kills of benchmarks/kills.py, and processes that must end although their data workers live."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

from common.reporting import grid_path, save_grid

import pytest
from conftest import ROOT
from PIL import Image

from fork_server import make_fork_server
from kills import kill_runs, make_cases
from small_runs import differences


@pytest.fixture(scope="module")
def server():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield make_fork_server()


@pytest.mark.parametrize("script", ["unet", "dit", "sd3"])
def test_a_killed_run_ends_as_if_nothing_had_happened(server, script, tmp_path):
    """Accumulation, averaged weights, moments of 8 bits, the cache where there is one, and workers, all at once.

    The loop of the other scripts is the same text (test_wiring.py), and `make endings` kills them, too.
    """
    case = make_cases(script, tmp_path, images=24)["most"]
    short = ("--max_train_steps", "4", *(("--no_t5",) if script == "sd3" else ()))
    case = case._replace(flags=(*case.flags, *short))
    tally = kill_runs(server, case, tmp_path / "runs", kills=3, seed=f"test {script}", killed=lambda: None)
    assert tally.failures == []
    assert tally.phases.total() == 3 and tally.finished >= 1 and tally.runs == 3 + tally.finished


@pytest.mark.parametrize("replaced", [0, 1])
def test_a_grid_that_a_kill_has_cut_off_is_drawn_again(replaced, tmp_path, monkeypatch):
    """The step's own file says that nothing is left to draw: it must not be there before samples.png."""
    save_grid(Image.new("L", (4, 4)), tmp_path, 1, [])
    before, replace = (tmp_path / "samples.png").read_bytes(), Path.replace

    def kill(path, target):
        names.append(Path(target).name)
        if len(names) > replaced:
            raise KeyboardInterrupt
        return replace(path, target)

    names: list[str] = []
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "replace", kill)
        save_grid(Image.new("L", (8, 8)), tmp_path, 2, [])
    assert not grid_path(tmp_path, 2).exists()

    save_grid(Image.new("L", (8, 8)), tmp_path, 2, [])
    assert (tmp_path / "samples.png").read_bytes() == grid_path(tmp_path, 2).read_bytes() != before
    assert sorted(path.name for path in tmp_path.rglob("*.*")) == ["samples.png", "step-000001.png", "step-000002.png"]


def test_the_comparison_finds_what_differs(tmp_path):
    run, whole = tmp_path / "run", tmp_path / "whole"
    for name in ("checkpoint-1/student.safetensors", "checkpoint-2/student.safetensors", "unet/weights.safetensors"):
        (whole / name).parent.mkdir(parents=True, exist_ok=True)
        (whole / name).write_text("weights")
    (whole / "checkpoint-2" / "state.json").write_text('{"step": 2, "skipped": [0, 0]}')
    rows = [{"step": step, "loss": 1 / step, "images_per_second": step} for step in (1, 2)]
    (whole / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (whole / "samples").mkdir()
    for step in (1, 2):
        (whole / "samples" / f"step-00000{step}.png").write_text("picture")
    shutil.copytree(whole, run)
    assert differences(run, whole) == []

    # What a kill may change: an older checkpoint, samples of a step on the way, the speed.
    shutil.rmtree(run / "checkpoint-1")
    (run / "samples" / "step-000001.png").unlink()
    (run / "checkpoint-2" / "state.json").write_text('{"skipped": [0, 0], "step": 2}')
    lines = [json.dumps({**row, "images_per_second": 7}) + "\n" for row in rows]
    (run / "metrics.jsonl").write_text("".join(lines))
    assert differences(run, whole) == []

    (run / "checkpoint-2" / "student.safetensors").write_text("weighty")
    (run / "checkpoint-2" / "state.json").unlink()
    (run / "metrics.jsonl").write_text("".join([*lines, lines[-1]]))
    (run / ".tmp-2").mkdir()
    (run / ".tmp-2" / "student.safetensors").touch()
    assert differences(run, whole) == [
        "checkpoint-2/state.json is missing",
        ".tmp-2/student.safetensors is left over",
        "checkpoint-2/student.safetensors differs",
        "metrics.jsonl differs",
    ]


@pytest.mark.parametrize(
    ("end", "code"), [("pass", 0), ("raise RuntimeError", 1), ("sys.exit(3)", 3)], ids=["normal", "error", "exit"]
)
def test_a_process_ends_although_its_data_workers_live(end, code):
    """They ignore the signal by which multiprocessing would end them, and an iterator in use keeps them."""
    program = (
        "import sys, torch\n"
        "from accelerate import Accelerator\n"
        "from common.batches import make_dataloader\n"
        "numbers = torch.utils.data.TensorDataset(torch.arange(64))\n"
        "batches = iter(make_dataloader(numbers, 2, 2, Accelerator(cpu=True)))\n"
        "next(batches)\n"
        "print('ends', flush=True)\n"
        f"{end}\n"
    )
    assert end_of(program) == code


HOLDER = """
import os, sys, time, torch
from common.ending import end_workers

class Numbers(torch.utils.data.Dataset):
    def __len__(self):
        return 2
    def __getitem__(self, index):
        frame = sys._getframe()
        while "done_event" not in frame.f_locals:
            frame = frame.f_back
        frame.f_locals["done_event"]._cond.acquire()
        os.write(writing, b"held")
        time.sleep(600)

reading, writing = os.pipe()
batches = iter(torch.utils.data.DataLoader(Numbers(), num_workers=1))
os.read(reading, 4)
end_workers()
print("ends", flush=True)
del batches
"""


def test_a_process_ends_although_a_killed_worker_held_a_lock():
    """By it torch tells workers to end, whose iterator goes: "hanging in `Event.set()`" is in its own comments."""
    assert end_of(HOLDER) == 0


def end_of(program: str) -> int:
    """The exit code of a program that prints a line when it is at its end."""
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout.readline() == "ends\n"
            return process.wait(30)
        finally:
            process.kill()
