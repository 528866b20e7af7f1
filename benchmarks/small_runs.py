# Copyright 2026 The LIFT and PLACE distillation authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Runs of the scripts that take seconds, on tiny models and random images, and a look at where such a run is."""

import json
import math
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from PIL import Image


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.checkpoints import list_checkpoints
from common.metrics import read_metrics
from common.reporting import grid_path

from fork_server import start_run
from tiny_models import (
    save_dit_pipeline,
    save_pixel_pipeline,
    save_sd3_pipeline,
    save_sd_pipeline,
    save_sdxl_pipeline,
)


ROOT = Path(__file__).resolve().parents[1]
# Of every run, and of its restarts: the same command goes on.
FLAGS = (
    *("--train_batch_size", "4", "--gradient_accumulation_steps", "1", "--max_train_steps", "6"),
    *("--logging_steps", "1", "--checkpointing_steps", "2", "--validation_steps", "3", "--learning_rate", "1e-3"),
    *("--num_inference_steps", "4", "--report_to", "none", "--resume_from_checkpoint", "latest"),
    *("--output_dir", "student", "--cache_dir", "cache"),
)
# Blocks large enough for moments of 8 bits: tensors of fewer than 4096 elements keep those of 32.
WIDE = {"num_layers": 4, "attention_head_dim": 16}
TEACHERS: dict[str, Callable[[Path], Path]] = {
    "unet": save_pixel_pipeline,
    "sd21": save_sd_pipeline,
    "dit": lambda folder: save_dit_pipeline(folder, **WIDE),
    "sd3": lambda folder: save_sd3_pipeline(folder, caption_projection_dim=32, **WIDE),
    "sdxl": save_sdxl_pipeline,
}
SCRIPTS = tuple(TEACHERS)
STUDENTS = {
    "unet": ("--student", "0.5", "--num_validation_images", "2"),
    "sd21": ("--student", "bk_small"),
    "dit": ("--student_depth", "2"),
    "sd3": ("--student", "half", "--max_sequence_length", "8"),
    "sdxl": ("--student", "extreme"),
}
LIMIT = 300.0  # seconds that a run may take, on a machine that has other work too
PLAIN = ("--dataloader_num_workers", "1")
MOST = (
    *("--dataloader_num_workers", "2", "--gradient_accumulation_steps", "2", "--checkpointing_steps", "1"),
    *("--use_ema", "--use_8bit_adam"),
)
CACHED = ("--cache_latents", "--encoding_batch_size", "32")
CACHED_TEACHER = ("--cache_teacher", "2", "--lambda_kd_feat", "0")
PHASES = ("start-up", "caching", "steps", "checkpoint", "validation", "final save", "end")


class Case(NamedTuple):
    """A command line. The teacher and the images are in its folder; whatever runs it has a folder of its own."""

    script: str  # of SCRIPTS
    flags: tuple[str, ...]


class Process(Protocol):
    """What a process of `subprocess` and one of `multiprocessing` have in common."""

    pid: int


def set_environment() -> None:
    """What all runs need in their environment, before a server for them is started: a CPU, one thread, no network."""
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}


def make_case(script: str, folder: Path, images: int, *flags: str) -> Case:
    """Write the script's teacher and images into the folder, unless they are there, and return the command line.

    Args:
        script: Of SCRIPTS.
        folder: For these inputs.
        images: How many.
        flags: Beside those that every run has. The last one counts where one is given twice.
    """
    teacher, data = folder / f"teacher-{script}", folder / f"images-{script}-{images}"
    if not teacher.exists():
        TEACHERS[script](teacher)
    if not data.exists():
        write_images(script, data, images)
    source = ("--pretrained_teacher_model", str(teacher), "--train_data_dir", str(data))
    return Case(script, (*source, *FLAGS, *STUDENTS[script], *flags))


def write_images(script: str, folder: Path, count: int, side: int | None = None) -> None:
    """Random images: grey for the pixel script, in class folders for DiT, with captions for the others.

    Args:
        side: In pixels, by default that of the tiny models.
    """
    folder.mkdir()
    side = side or (16 if script == "unet" else 32)
    lines = []
    for index in range(count):
        pixels = np.random.default_rng(index).integers(0, 256, (side, side, 3), dtype=np.uint8)
        path = folder / f"{index % 4}" / f"{index:04d}.png" if script == "dit" else folder / f"{index:04d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).convert("L" if script == "unet" else "RGB").save(path)
        lines.append({"file_name": path.name, "text": f"a photo of a {('dark', 'bright')[index % 2]} bag"})
    if script in ("sd21", "sd3", "sdxl"):
        (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


class SmallRun:
    """The folder of a command, where the same command starts again and again.

    Args:
        case: The command.
        folder: Is made unless it is there. The output, the cache and what is printed go into it.
        shards: Of the whole cache; `None` where it is not known yet.
    """

    def __init__(self, case: Case, folder: Path, shards: int | None = None):
        self.case, self.folder, self.shards = case, folder, shards
        self.output_dir, self.printed_to = folder / "student", folder / "printed.txt"
        self.cache_dir = folder / "cache" / "lift-encodings"
        folder.mkdir(exist_ok=True)
        self.started = 0.0

    def starts(self) -> None:
        """To be called before each start: it makes the place to print to, and notes the time."""
        self.printed_to.write_text("")
        self.started = time.time()

    def printed(self) -> str:
        """What the last start has printed."""
        return self.printed_to.read_text(errors="replace")

    def list_shards(self) -> list[Path]:
        """Whole shards in the cache."""
        return list(self.cache_dir.glob("*/rows-*"))

    def flag(self, name: str) -> int:
        """The number that the command gives a flag."""
        return int(self.case.flags[len(self.case.flags) - self.case.flags[::-1].index(f"--{name}")])

    def has_checkpoint(self, step: int) -> bool:
        """Whether the checkpoint of a step is in its place, and so whole."""
        return (self.output_dir / f"checkpoint-{step}").exists()

    def last_row(self) -> int:
        """The last step in metrics.jsonl."""
        with suppress(ValueError):  # where it is read while it is written
            rows = read_metrics(self.output_dir / "metrics.jsonl")
            return rows[-1]["step"] if rows else 0
        return 0

    def last_checkpoint(self) -> int:
        """The last step with a checkpoint in its place."""
        return max([0, *(int(path.name.split("-")[1]) for path in list_checkpoints(self.output_dir))])

    def phase(self) -> str:
        """Which of PHASES the last start is in, or has ended in, from what it has printed and what is on the disk."""
        printed = self.printed()
        begun = re.search(r"step (\d+) of (\d+)", printed)
        if begun is None or "Steps:" not in printed:  # the progress bar comes after the resumed state and metrics
            whole = begun is not None or len(self.list_shards()) == self.shards
            return "caching" if "Encoding the data" in printed and not whole else "start-up"
        if [*self.output_dir.glob(".tmp-*"), *self.output_dir.glob(".del-*")]:
            return "checkpoint"
        first, last = map(int, begun.groups())
        step = self.last_row()  # a step's row comes before its checkpoint, and that before its samples
        if step == last and self.has_checkpoint(last):
            card = self.output_dir / "README.md"
            if not grid_path(self.output_dir, last).exists():
                return "validation"
            return "end" if card.exists() and card.stat().st_mtime > self.started else "final save"
        if step > first and step % self.flag("checkpointing_steps") == 0 and not self.has_checkpoint(step):
            return "checkpoint"
        due = step > first and step % self.flag("validation_steps") == 0
        return "validation" if due and not grid_path(self.output_dir, step).exists() else "steps"

    def ahead(self) -> set[str]:
        """The phases that a start has before it, besides those that every start has."""
        last = self.flag("max_train_steps")
        phases = {"start-up", "final save", "end"}
        if not grid_path(self.output_dir, last).exists():
            phases.add("validation")
        if not self.has_checkpoint(last):
            phases |= {"steps", "checkpoint"}
        if len(self.list_shards()) != self.shards:
            phases.add("caching")
        return phases


def watch(run: SmallRun, alive: Callable[[], bool], limit: float) -> Iterator[str]:
    """The phases of a run as they come, looked at every few milliseconds, until it ends.

    Raises:
        TimeoutError: It has not ended within the limit, in seconds.
    """
    deadline = time.monotonic() + limit
    while alive():
        if time.monotonic() > deadline:
            raise TimeoutError(f"it has not ended after {limit:.0f} seconds; it is in the phase {run.phase()}")
        yield run.phase()
        time.sleep(0.003)


def signal_group(process: Process, number: signal.Signals) -> None:
    """Send a signal to a run and its data workers. A run that has ended, or has no group yet, is no error."""
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        with suppress(ProcessLookupError):
            os.kill(process.pid, number)


class Aim(NamedTuple):
    """When a run is to be killed."""

    phase: str  # of PHASES
    visit: int  # which of the run's visits to this phase, counted from 1
    delay: float  # seconds since it came there


def run_once(context: ForkServerContext, run: SmallRun, aim: Aim | None = None) -> tuple[int, dict[str, list[float]]]:
    """Start a run, and kill it where that is aimed at, unless it ends before.

    Args:
        context: Of [`make_fork_server`].
        run: Is started.
        aim: `None` lets the run end by itself.

    Returns:
        The exit code, and the seconds of each visit to each phase.

    Raises:
        TimeoutError: It did not end within LIMIT. It is killed then.
    """
    run.starts()
    process = start_run(context, f"train_lift_{run.case.script}", list(run.case.flags), run.printed_to, run.folder)
    visits: dict[str, list[float]] = {}
    here, since, due = "", 0.0, math.inf
    try:
        for phase in watch(run, process.is_alive, LIMIT):
            now = time.monotonic()
            if phase != here:
                here, since = phase, now
                visits.setdefault(phase, []).append(0.0)
                if aim is not None and (phase, len(visits[phase])) == aim[:2]:
                    due = now + aim.delay
            visits[phase][-1] = now - since
            if now >= due:
                break
    finally:
        if process.is_alive():
            signal_group(process, signal.SIGKILL)
        process.join()
    return process.exitcode, visits


def run_undisturbed(context: ForkServerContext, case: Case, folder: Path) -> tuple[SmallRun, dict[str, list[float]]]:
    """The run that the others are compared with, and the seconds of its visits to each phase."""
    run = SmallRun(case, folder)
    code, visits = run_once(context, run)
    if code != 0:
        sys.exit(f"error: the undisturbed run of {case.script} ended with {code}:\n{run.printed()[-3000:]}")
    shards = run.list_shards()
    run.shards = len(shards)
    if shards:  # the run could not tell which shard was its last
        began = min(path.stat().st_mtime for path in run.cache_dir.glob("*/key.json"))
        visits["caching"] = [max(path.stat().st_mtime for path in shards) - began]
    return run, visits


@contextmanager
def held(process: Process) -> Iterator[None]:
    """Stop a run for a moment, to look at it.

    Its data workers go on. One that is being forked while a group is told to stop and to go on stays stopped for ever:
    the kernel passes the first on to it and not the second.
    """
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(0.002)  # until it has stopped
    try:
        yield
    finally:
        os.kill(process.pid, signal.SIGCONT)


def differences(run: Path, whole: Path) -> list[str]:
    """What sets a finished run's output apart from an uninterrupted one's: files that are missing, left over or other.

    All is compared byte for byte, but for the speed in metrics.jsonl, the time in README.md, the order of keys in JSON
    files, and the sums of these files in a manifest. Of the checkpoints only the last one counts, and samples of steps
    in the midst of a run may be missing.
    """
    last = list_checkpoints(whole)[-1].name
    files = [
        {
            str(path.relative_to(folder)): path
            for path in folder.rglob("*")
            if path.is_file() and not re.fullmatch(r"checkpoint-\d+", path.relative_to(folder).parts[0])
        }
        | {str(path.relative_to(folder)): path for path in (folder / last).rglob("*") if path.is_file()}
        for folder in (run, whole)
    ]
    ours, theirs = files
    missing = {name for name in theirs.keys() - ours.keys() if not re.fullmatch(r"samples/step-\d+\.png", name)}
    found = [f"{name} is missing" for name in sorted(missing)]
    found += [f"{name} is left over" for name in sorted(ours.keys() - theirs.keys())]
    both = sorted(ours.keys() & theirs.keys())
    return found + [f"{name} differs" for name in both if _content(ours[name]) != _content(theirs[name])]


def _content(path: Path) -> bytes | dict | list:
    if path.name == "metrics.jsonl":
        return [{**row, "images_per_second": None} for row in read_metrics(path)]
    if path.name == "manifest.json":
        return sorted(json.loads(path.read_text()))
    if path.name == "README.md":
        return re.sub(rb"; [^;]* of training,", b"", path.read_bytes())
    return json.loads(path.read_text()) if path.suffix == ".json" else path.read_bytes()
