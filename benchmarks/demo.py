# Copyright 2026 The LIFT and PLACE distillation authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""What the demos share: trainings as a user launches them, then the scripts of eval/. In the folder of a demo:

    <run>/              train_lift_*.py: the teacher and the students, each a pipeline folder
    samples/<run>/      eval/generate.py: images of every model, all from the same noise
    quality.json        eval/evaluate.py: figures against real images, in features of a small classifier
    index.html          eval/report.py: the page, and report.md with the pictures
    results.md          that report, and what it was made with

All of it is kept, so that a demo that was stopped goes on from there.
"""

import argparse
import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path


# Before torch is loaded, for this process and the trainings. Nothing is fetched from a network. Threads that wait spin
# for microseconds only: the default is ten times slower where other jobs share the cores, and not to spin at all loses
# the second core. That a text encoder leaves the rest of a CLIP folder where it is needs no table of warnings.
os.environ |= {"HF_HUB_OFFLINE": "1", "GOMP_SPINCOUNT": "3000", "TRANSFORMERS_VERBOSITY": "error"}

import numpy as np
import psutil
import torch
from PIL import Image


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "eval"))

import evaluate
import generate
import lift_utils
import report
from lift_utils import fail
from loss import describe_device
from small_models import FEATURES


ROOT = Path(lift_utils.__file__).parent
BATCH = 32
DRAWN_AT_ONCE = 100

start = time.perf_counter()


def say(message: str) -> None:
    minutes, seconds = divmod(int(time.perf_counter() - start), 60)
    print(f"[{minutes:2d}:{seconds:02d}] {message}", flush=True)


# ------------------------------------------------------------------------------------------------------- the arguments


def make_parser(description: str, output_dir: str, **defaults: int) -> argparse.ArgumentParser:
    """The flags of all demos.

    Args:
        defaults: Of `teacher_steps`, `student_steps`, `samples` and `inference_steps`.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=lift_utils.HelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path(output_dir), help="where everything goes")
    parser.add_argument("--teacher_steps", type=int, help="optimizer steps of the teacher")
    parser.add_argument("--student_steps", type=int, help="of each student")
    parser.add_argument("--samples", type=int, help="images drawn from each model")
    parser.add_argument("--inference_steps", type=int, help="steps per image")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.set_defaults(**defaults)
    return parser


def parse(parser: argparse.ArgumentParser, input_args: list[str] | None, most_samples: int) -> argparse.Namespace:
    """Parse the command line, or `input_args`; numbers must be positive."""
    args = parser.parse_args(input_args)
    for name, value in vars(args).items():
        if isinstance(value, int) and value < 1:
            fail(f"--{name} {value} is too small; pass at least 1")
    if not 2 * FEATURES <= args.samples <= most_samples:
        fail(f"--samples {args.samples} does not do for {FEATURES} features; pass {2 * FEATURES} to {most_samples}")
    return args


def keep_settings(args: argparse.Namespace) -> None:
    """Write down what the results depend on; refuse to go on with a folder that was started otherwise."""
    free = ("output_dir", "seeds", "threads")
    settings = {name: value for name, value in vars(args).items() if name not in free}
    path = args.output_dir / "settings.json"
    if path.exists():
        before = json.loads(path.read_text())
        for name, value in settings.items():
            if before.get(name) != value:
                fail(f"--{name} {value} was {before.get(name)} in {args.output_dir}; pass a new --output_dir")
    write(path, json.dumps(settings, indent=2))


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text)
    temporary.replace(path)


# -------------------------------------------------------------------------------------------------------- the training


def save_images(folder: Path, images: np.ndarray) -> Path:
    """Grey uint8 images (N, H, W) as a folder of PNGs, unless it is there."""
    if not folder.exists():
        temporary = folder.with_name(f".{folder.name}")
        temporary.mkdir(parents=True, exist_ok=True)
        for number, pixels in enumerate(images):
            Image.fromarray(pixels).save(temporary / f"{number:05d}.png")
        temporary.rename(folder)
    return folder


def train(args: argparse.Namespace, script: str, run: str, steps: int, flags: list) -> Path:
    """Launch a training script as a user does, unless the run is finished; one that was stopped goes on."""
    folder = args.output_dir / run
    if (folder / "done").exists():
        return folder
    say(f"{run}: {steps} steps")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_cpu_threads_per_process"]
    command += [args.threads, "--num_processes", 1, "--num_machines", 1, "--mixed_precision", "no"]
    command += ["--dynamo_backend", "no", ROOT / script, "--output_dir", folder.resolve(), *flags]
    command += ["--train_data_dir", args.output_dir / "images", "--dataloader_num_workers", 0]
    command += ["--cache_dir", args.output_dir / "cache", "--max_train_steps", steps]
    command += ["--train_batch_size", BATCH, "--gradient_accumulation_steps", 1, "--ema_decay", 0.99]
    command += ["--lr_scheduler", "cosine", "--lr_warmup_steps", max(1, steps // 20)]
    command += ["--checkpointing_steps", 100, "--checkpoints_total_limit", 1, "--resume_from_checkpoint", "latest"]
    command += ["--num_inference_steps", args.inference_steps, "--report_to", "none"]
    end_training_into(folder, script)
    # In a session of its own, so that Ctrl-C reaches the demo alone, which then lets the training save its step.
    process = subprocess.Popen([str(part) for part in command], start_new_session=True)
    try:
        if process.wait() != 0:
            fail(f"the training of {folder} ended with exit status {process.returncode}; its messages are above")
    except KeyboardInterrupt:
        say("stopping; the training saves its step")
        end_training_into(folder, script)
        raise
    (folder / "done").touch()
    return folder


def end_training_into(folder: Path, script: str) -> None:
    """End trainings into this folder, such as one that a killed demo left behind; SIGTERM makes them save first."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if str(ROOT / script) in words and str(folder.resolve()) in words:
            found.append(process)
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate()
    psutil.wait_procs(found, timeout=60)


def training_seconds(run: Path) -> float:
    """The time between the logged steps: neither start-up nor interruptions."""
    rows = lift_utils.read_metrics(run / "metrics.jsonl")
    steps = [0] + [row["step"] for row in rows]
    return sum((step - before) * BATCH / row["images_per_second"] for before, step, row in zip(steps, steps[1:], rows))


# -------------------------------------------------------------------------------------------------------- the measures


def measure(
    args: argparse.Namespace,
    title: str,
    runs: dict[str, Path],
    real: list[Path],
    reference: Path,
    facts: dict[str, str],
    drawing: tuple = (),
    scoring: tuple = (),
    reporting: tuple = (),
) -> None:
    """Draw samples of every model, measure them, write the report.

    Args:
        runs: The teacher's folder and the students'.
        real: Folders of real images, measured beside the samples.
        reference: Folder of the images that all are compared with.
        facts: What else results.md says of how it was made.
        drawing: Flags for generate.py and report.py.
        scoring: Flags for evaluate.py.
        reporting: Flags for report.py.
    """
    folder = args.output_dir
    drawing = ("--num_inference_steps", args.inference_steps, *drawing)
    for name, run in runs.items():
        say(f"samples of {name}")
        flags = ("--output_dir", folder / "samples" / name, "--num_images", args.samples, *drawing)
        call(generate, "--model", run, "--batch_size", DRAWN_AT_ONCE, *flags)
    say("figures")
    samples = [folder / "samples" / name for name in runs]
    flags = ("--features", folder / "classifier.pt", "--statistics_dir", folder / "statistics", *scoring)
    call(evaluate, "--images", *real, *samples, "--reference", reference, "--output", folder / "quality", *flags)
    say("report")
    teacher, *students = runs.values()
    flags = ("--results", folder / "quality.json", "--title", title, *drawing, *reporting)
    call(report, "--teacher", teacher, "--students", *students, "--output_dir", folder, *flags)

    seconds = ", ".join(f"{name} {training_seconds(run):.0f} s" for name, run in runs.items())
    facts = {
        "budget": f"teacher {args.teacher_steps} steps, students {args.student_steps} steps, of {BATCH} images",
        "training": seconds,
        "machine": f"{describe_device(torch.device('cpu'))}, {args.threads} thread(s)",
        "versions": ", ".join(f"{library} {version(library)}" for library in ("torch", "diffusers")),
        **facts,
    }
    notes = "\n".join(f"- {name}: {value}" for name, value in facts.items())
    write(folder / "results.md", f"{(folder / 'report.md').read_text()}\n## How it was made\n\n{notes}\n")
    say(f"done; read {folder / 'index.html'} or {folder / 'results.md'}")


def call(script, *flags) -> None:
    """Run a script of eval/ as its command line does."""
    script.main(script.parse_args([str(flag) for flag in flags]))


# ------------------------------------------------------------------------------------------------------------- the run


def main(args: argparse.Namespace, run: Callable[[argparse.Namespace], None]) -> None:
    """Set up, and let Ctrl-C or SIGTERM stop the demo so that it can go on."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    torch.set_num_threads(args.threads)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    with (args.output_dir / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fail(f"--output_dir {args.output_dir} is in use by another demo; wait for it, or pass another folder")
        try:
            keep_settings(args)
            run(args)
        except KeyboardInterrupt:
            say("stopped; the same command goes on from here")
            sys.exit(130)
