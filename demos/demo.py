# Copyright 2026 The LIFT and PLACE distillation authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""What the demos share: they train as a user does, then run the scripts of eval/. The folder of a demo holds:

    <run>/              train_lift_*.py: the teacher and the students, each a pipeline folder
    samples/<run>/      eval/generate.py: samples of every model, all from the same noise
    quality.json        eval/evaluate.py: distances to real images, in the features of a small classifier
    index.html          eval/report.py: the page; report.md is the same as Markdown, with PNGs
    results.md          report.md, and how the results were made

Every file is kept, so a demo that was stopped continues where it was.
"""

import argparse
import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import ModuleType


# Set before torch is loaded, for this process and for the trainings. Nothing is downloaded. Waiting threads spin for
# microseconds only: the default is ten times slower where other jobs share the cores, and no spinning at all makes the
# second core useless. A text encoder that is loaded from a CLIP folder warns of the weights that it does not use.
os.environ |= {"HF_HUB_OFFLINE": "1", "GOMP_SPINCOUNT": "3000", "TRANSFORMERS_VERBOSITY": "error"}

import numpy as np
import psutil
import torch
from PIL import Image


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "eval"))

from common.arguments import HelpFormatter
from common.card import training_hours
from common.checkpoints import lock_output
from common.errors import fail
from common.folders import check_writable
from common.metrics import read_metrics

import evaluate
import generate
import report
from seeds import cell, interval
from small_models import FEATURES


ROOT = Path(__file__).resolve().parents[1]
# The losses that are compared, by name: none trains without a teacher, none_rms the same with another weight of the
# timesteps.
LOSSES = {
    "none": ("--kd_loss", "none"),
    "none_rms": ("--kd_loss", "none", "--task_loss", "rms"),
    "mse": ("--kd_loss", "mse"),
    "lift": ("--kd_loss", "lift"),
    "place": ("--kd_loss", "place"),
}
NAMES = "the names end with the loss and the seed; `none_rms` is `--kd_loss none --task_loss rms`"
RIVALS = ("none", "mse", "place")  # that all students of several seeds are compared with
TRAIN_BATCH_SIZE = 32
MAX_SAMPLES = 50_000
SAMPLE_BATCH_SIZE = 100

start = time.perf_counter()


def say(message: str) -> None:
    """Print a message after the time since the start."""
    minutes, seconds = divmod(int(time.perf_counter() - start), 60)
    print(f"[{minutes:2d}:{seconds:02d}] {message}", flush=True)


# ------------------------------------------------------------------------------------------------------- the arguments


def make_parser(description: str, output_dir: str, **defaults: int) -> argparse.ArgumentParser:
    """The flags of all demos.

    Args:
        description: The demo's docstring.
        output_dir: Default of --output_dir.
        defaults: Of `teacher_steps`, `student_steps`, `samples` and `inference_steps`.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=HelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path(output_dir), help="folder of everything that is made")
    parser.add_argument("--teacher_steps", type=int, help="training steps of the teacher")
    parser.add_argument("--student_steps", type=int, help="training steps of each student")
    parser.add_argument("--samples", type=int, help="images to generate with each model")
    parser.add_argument("--inference_steps", type=int, help="denoising steps per image")
    parser.add_argument("--seeds", type=int, default=1, help="students per loss; several show the spread")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.set_defaults(**defaults)
    return parser


def parse(parser: argparse.ArgumentParser, input_args: list[str] | None) -> argparse.Namespace:
    """Parse the command line, or `input_args`. Ends the process if a number is out of range."""
    args = parser.parse_args(input_args)
    for name, value in vars(args).items():
        if isinstance(value, int) and value < 1:
            fail(f"--{name} {value} is too small; pass at least 1")
    if not 2 * FEATURES <= args.samples <= MAX_SAMPLES:
        fail(f"--samples {args.samples} does not suit {FEATURES} features; pass {2 * FEATURES} to {MAX_SAMPLES}")
    return args


def save_settings(args: argparse.Namespace) -> None:
    """Write the flags that the results depend on. Ends the process if the folder was started with other ones."""
    free = ("output_dir", "seeds", "threads")
    settings = {name: value for name, value in vars(args).items() if name not in free}
    path = args.output_dir / "settings.json"
    if path.exists():
        saved = json.loads(path.read_text())
        for name, value in settings.items():
            if saved.get(name) != value:
                fail(f"--{name} {value} was {saved.get(name)} in {args.output_dir}; pass a new --output_dir")
    write(path, json.dumps(settings, indent=2))


def write(path: Path, text: str) -> None:
    """Write a file completely or not at all."""
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text)
    temporary.replace(path)


# -------------------------------------------------------------------------------------------------------- the training


def save_images(folder: Path, images: np.ndarray) -> Path:
    """Write grey images, uint8 (N, H, W), as a folder of PNGs, unless it exists."""
    if not folder.exists():
        temporary = folder.with_name(f".{folder.name}")
        temporary.mkdir(parents=True, exist_ok=True)
        for number, pixels in enumerate(images):
            Image.fromarray(pixels).save(temporary / f"{number:05d}.png")
        temporary.rename(folder)
    return folder


def train(args: argparse.Namespace, script: str, run: str, steps: int, flags: list) -> Path:
    """Launch a training script as a user does, unless the run is finished. A stopped run resumes."""
    folder = args.output_dir / run
    if (folder / "done").exists():
        return folder
    say(f"{run}: {steps} steps")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_cpu_threads_per_process"]
    command += [args.threads, "--num_processes", 1, "--num_machines", 1, "--mixed_precision", "no"]
    command += ["--dynamo_backend", "no", ROOT / script, "--output_dir", folder.resolve(), *flags]
    command += ["--train_data_dir", args.output_dir / "images", "--dataloader_num_workers", 0]
    command += ["--cache_dir", args.output_dir / "cache", "--max_train_steps", steps]
    command += ["--train_batch_size", TRAIN_BATCH_SIZE, "--gradient_accumulation_steps", 1, "--ema_decay", 0.99]
    command += ["--lr_scheduler", "cosine", "--lr_warmup_steps", max(1, steps // 20)]
    command += ["--checkpointing_steps", 100, "--checkpoints_total_limit", 1, "--resume_from_checkpoint", "latest"]
    command += ["--num_inference_steps", args.inference_steps, "--report_to", "none"]
    terminate_training(folder, script)
    # In a session of its own: Ctrl-C reaches the demo alone, which then lets the training save its state.
    process = subprocess.Popen([str(part) for part in command], start_new_session=True)
    try:
        if process.wait() != 0:
            fail(f"the training of {folder} ended with exit status {process.returncode}; its messages are above")
    except KeyboardInterrupt:
        say("stopping; the training saves its state")
        terminate_training(folder, script)
        raise
    (folder / "done").touch()
    return folder


def train_students(
    args: argparse.Namespace,
    train: Callable[..., Path],
    prefix: str,
    losses: tuple[str, ...],
    teacher: Path,
    flags: list,
) -> dict[str, Path]:
    """Distil a student by each loss and seed, all else being equal; returns their folders by name.

    Args:
        args: The demo's flags.
        train: From a name, steps and flags to a run's folder, see [`train`].
        prefix: Of the names, which go on with the loss and the seed.
        losses: Names of [`LOSSES`].
        teacher: Its folder.
        flags: Of all students.
    """
    runs = {}
    for seed in range(args.seeds):
        for loss in losses:
            words = ["--pretrained_teacher_model", teacher, "--seed", seed, *LOSSES[loss], *flags]
            runs[f"{prefix}{loss}-{seed}"] = train(f"{prefix}{loss}-{seed}", args.student_steps, words)
    return runs


def terminate_training(folder: Path, script: str) -> None:
    """End the trainings that write to this folder, e.g. one of a killed demo. SIGTERM makes them save their state."""
    processes = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if str(ROOT / script) in words and str(folder.resolve()) in words:
            processes.append(process)
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate()
    psutil.wait_procs(processes, timeout=60)


# ------------------------------------------------------------------------------------------------------ the evaluation


def measure(
    args: argparse.Namespace,
    title: str,
    runs: dict[str, Path],
    real: list[Path],
    reference: Path,
    facts: dict[str, str],
    sampling_flags: tuple = (),
    evaluate_flags: tuple = (),
    report_flags: tuple = (),
) -> None:
    """Generate samples with every model, measure them, and write the report.

    The report is of the students of the first seed; results.md has a table of all seeds beside it.

    Args:
        args: The demo's flags.
        title: Of the report.
        runs: The teacher's folder and the students' folders, by their names, which end with the seed.
        real: Folders of real images, measured beside the samples.
        reference: Folder of the images that all others are compared with.
        facts: Further lines of results.md about how it was made.
        sampling_flags: Flags for generate.py and report.py.
        evaluate_flags: Flags for evaluate.py.
        report_flags: Flags for report.py.
    """
    folder = args.output_dir
    sampling_flags = ("--num_inference_steps", args.inference_steps, *sampling_flags)
    for name, run in runs.items():
        say(f"samples of {name}")
        flags = ("--output_dir", folder / "samples" / name, "--num_images", args.samples, *sampling_flags)
        call(generate, "--model", run, "--batch_size", SAMPLE_BATCH_SIZE, *flags)
    say("distances to real images")
    samples = [folder / "samples" / name for name in runs]
    flags = ("--features", folder / "classifier.pt", "--statistics_dir", folder / "statistics", *evaluate_flags)
    call(evaluate, "--images", *real, *samples, "--reference", reference, "--output", folder / "quality", *flags)
    say("report")
    teacher, students = runs["teacher"], [run for name, run in runs.items() if name.endswith("-0")]
    flags = ("--results", folder / "quality.json", "--title", title, *sampling_flags, *report_flags)
    call(report, "--teacher", teacher, "--students", *students, "--output_dir", folder, *flags)

    hours = {name: training_hours(read_metrics(run / "metrics.jsonl"), TRAIN_BATCH_SIZE) for name, run in runs.items()}
    seconds = ", ".join(f"{name} {each * 3600:.0f} s" for name, each in hours.items())
    facts = {
        "budget": f"teacher {args.teacher_steps} steps, students {args.student_steps} steps, "
        f"of {TRAIN_BATCH_SIZE} images",
        "training": seconds,
        "machine": f"{processor_name()}, {args.threads} thread(s)",
        "versions": ", ".join(f"{library} {version(library)}" for library in ("torch", "diffusers")),
        **facts,
    }
    text = (folder / "report.md").read_text()
    if args.seeds > 1:
        rows = {row["name"]: row for row in json.loads((folder / "quality.json").read_text())["rows"]}
        text += f"\n{compare_seeds(rows, [name for name in runs if name.endswith('-0')], args.seeds)}"
    notes = "\n".join(f"- {name}: {value}" for name, value in facts.items())
    write(folder / "results.md", f"{text}\n## How it was made\n\n{notes}\n")
    say(f"done; read {folder / 'index.html'} or {folder / 'results.md'}")


def compare_seeds(rows: dict[str, dict], names: list[str], seeds: int) -> str:
    """Means of the students over the seeds, as Markdown.

    Args:
        rows: Of evaluate.py, by name.
        names: Of the students of seed 0.
    """
    text = f"## All {seeds} seeds\n\nMeans ± standard errors, and mean differences of the same seed with the interval "
    text += "that holds them in 95 % of cases (Student's t).\n\n"
    heads = ["student", "Fréchet distance", "kernel distance · 10³", *(f"difference to `{rival}`" for rival in RIVALS)]
    text += f"| {' | '.join(heads)} |\n|---|{'--:|' * (len(heads) - 1)}\n"

    def values(name: str, figure: str) -> list[float]:
        return [rows[f"{name}-{seed}"][figure] for seed in range(seeds)]

    for name in (name.removesuffix("-0") for name in names):
        student, hyphen, loss = name.rpartition("-")
        cells = [name, cell(values(name, "fid"), 2), cell([1000 * value for value in values(name, "kid")])]
        for rival in RIVALS:
            other = f"{student}{hyphen}{rival}"
            compared = loss != rival and f"{other}-0" in rows
            cells.append(interval(values(name, "fid"), values(other, "fid")) if compared else "–")
        text += f"| {' | '.join(cells)} |\n"
    return text


def processor_name() -> str:
    """The CPU's model, or its architecture where the model is unknown."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def call(script: ModuleType, *flags: object) -> None:
    """Run a script of eval/ in this process, as its command line does."""
    script.main(script.parse_args([str(flag) for flag in flags]))


# ------------------------------------------------------------------------------------------------------------- the run


def main(args: argparse.Namespace, run: Callable[[argparse.Namespace], None]) -> None:
    """Run a demo. Ctrl-C and SIGTERM stop it so that the same command continues it."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    torch.set_num_threads(args.threads)
    check_writable(f"--output_dir {args.output_dir}", args.output_dir)
    lock_output(args.output_dir)
    try:
        save_settings(args)
        run(args)
    except KeyboardInterrupt:
        say("stopped; the same command continues from here")
        sys.exit(130)
