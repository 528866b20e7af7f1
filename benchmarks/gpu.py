# Copyright 2026 The LIFT and PLACE distillation authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Everything that only a GPU can tell, in slices of under ten minutes each, the most important first.

    benchmarks/gpu.sh all                     # or one slice: benchmarks/gpu.sh 2
    GPU_SIZE=tiny benchmarks/gpu.sh all       # the same with tiny models, also without a GPU: does it run to the end?

    1  each script, 20 steps in bf16, in fp16 and by --fsdp on one GPU: is all finite, does the loss fall?
    2  memory and speed of SD 2.1 -> bk_tiny at 512 pixels, and of DiT-XL/2 -> d14
    3  memory and speed of half SD3-medium at 512 pixels: whole, and as LoRA with --share_backbone
    4  xformers, compile, 8-bit AdamW and a cached teacher, by step.py
    5  a run that is killed and resumed, beside one that is not
    6  tests that have a GPU's part, on it
    7  memory and speed of SDXL -> koala_700m at 1024 pixels: whole, and as LoRA

The models have random weights (random_teachers.py), nothing is downloaded; but slice 6 needs Fashion-MNIST, as all
tests do. Each slice writes a JSON list and keeps each run as soon as it is done: the same command goes on where it was
stopped. Runs start side by side, as many as the GPU holds, and are timed in turns. Slices 2, 3 and 7 hold a run to the
memory of a card of 12, 16 or 24 GiB, its CUDA context included, and double or halve the batch until it is the largest
that fits.
"""

import argparse
import contextlib
import importlib
import itertools
import json
import math
import os
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.attention import check_xformers
from common.errors import fail
from common.metrics import read_metrics

from dry_runs import estimate
from full_models import CELEBA, SD3_MEDIUM, save_ddpm, save_dit, save_sd3, save_sd21, save_sdxl
from safetensors.torch import load_file
from tqdm.auto import tqdm

from device import describe_device
from random_teachers import SIZES, list_flags
from small_runs import ROOT, SCRIPTS
from step import (
    Done,
    is_measured,
    list_cells,
    prepare_inputs,
    read_measured,
    run_cells,
    write_json,
    write_markdown,
)
from step import parse_args as parse_step_args
from turns import run_in_turns, wait_for_turn


Result = dict[str, Any]
RESULTS = ROOT / "benchmarks" / "results" / "gpu"
ON_GPU = torch.cuda.is_available()
BATCH = {"unet": 32, "sd21": 4, "dit": 16, "sd3": 2, "sdxl": 1}  # of slice 1
LARGEST_BATCH = 64 if ON_GPU else 1
# Steps, images per step.
PUBLISHED = {"sd21": (50_000, 128), "dit": (100_000, 256), "sd3": (50_000, 32), "sdxl": (50_000, 128)}
# Dense, half precision, in TFLOP/s, by NVIDIA's data sheets and white papers. The first name that is found counts.
PEAKS = {"H100 PCIe": 756.0, "H100": 989.4, "H200": 989.4, "A100": 312.0, "RTX 4090": 165.2, "RTX 3060": 25.5}
SAVING = "--use_8bit_adam --gradient_checkpointing"
NEEDED = 24  # GiB that a run takes at most, where it is not held to less
LIMIT = 300  # seconds for runs that start side by side
OVER = 80  # seconds that what was started in a slice's minutes may go on after them
SHORTEST = 120  # seconds that full-size models need to start and to be timed


class Case(NamedTuple):
    """What slices 2, 3 and 7 measure."""

    script: str
    name: str
    flags: str
    first_batches: dict[int, int]  # by the GiB of a card; those that --dry_run says are the largest that fit


MEMORY = {
    2: (
        Case("sd21", "bk_tiny", f"--mixed_precision fp16 --cache_latents {SAVING}", {12: 16, 24: 64}),
        Case("dit", "d14", "--mixed_precision bf16 --cache_latents --use_8bit_adam", {12: 16, 24: 64}),
    ),
    3: (
        Case(
            "sd3",
            "half, shared LoRA",
            f"--mixed_precision bf16 {SAVING} --lora_rank 64 --share_backbone",
            {12: 16, 16: 32},
        ),
        Case("sd3", "half, whole", f"--mixed_precision bf16 {SAVING}", {24: 8}),
    ),
    7: (
        Case("sdxl", "koala_700m", f"--mixed_precision fp16 --cache_latents --use_ema {SAVING}", {24: 8}),
        Case(
            "sdxl",
            "koala_700m, LoRA",
            "--mixed_precision fp16 --cache_latents --encoding_batch_size 1 --use_ema --gradient_checkpointing"
            " --lora_rank 16",
            {12: 4},
        ),
    ),
}


class Run(NamedTuple):
    """A training in a process of its own."""

    settings: Result  # what tells it from the others of its slice
    script: str
    flags: list[str]  # beside those that say what is trained on what
    gibibytes: int | None = None  # of the card that it is held to


# Of slice 4: arguments of step.py, each a grid.
GRIDS = (
    "--script dit --cache latents teacher --batch 32 --precision bf16",
    "--script sd21 --cache latents teacher --batch 8 --precision fp16",
    "--script sd21 --cache latents --batch 8 --precision fp16 --optimizer 8bit",
    "--script sd21 --cache latents --batch 8 --precision fp16 -- --enable_xformers_memory_efficient_attention",
    "--script sd3 --cache latents --batch 8 --precision bf16 --optimizer 8bit -- --gradient_checkpointing",
    "--script unet --cache none --batch 32 --precision bf16",
    "--script dit --cache latents --batch 32 --precision bf16 --compile on",
    "--script sd21 --cache latents --batch 8 --precision fp16 --compile on",
    "--script unet --cache none teacher --batch 32 --precision bf16 --compile on",
)
CELL = 16  # GiB that a cell of theirs takes at most
TESTS = "tests/test_gpu.py tests/test_teacher_weights.py tests/test_teacher_cache.py tests/test_losses.py"
CPU_ONLY = (  # of them: bits that repeat, two processes on one GPU, refusals without one, torch of xformers' own build
    "tests/test_teacher_cache.py::test_a_resumed_run_equals_an_uninterrupted_one",
    "tests/test_teacher_cache.py::test_two_processes_fill_it_and_train",
    "tests/test_teacher_weights.py::test_what_does_not_go_together_is_refused",
    "tests/test_gpu.py::test_xformers_whose_kernels_do_not_load_is_refused",
    "tests/test_gpu.py::test_attention_that_xformers_cannot_compute_is_said_in_one_line",
)
STEPS, LOGGED, SETTLED = 20, 4, 2  # of a run of slices 2, 3 and 7: steps, steps per row, rows before its turn


# ------------------------------------------------------------------------------------------------- in a run's process


def train(script: str, flags: list[str], gibibytes: int | None, context: int, turn_at: int | None) -> Result:
    """Run a script's `main` up to where it would save its last step; returns its metrics and peaks of memory.

    Args:
        flags: Of the script.
        gibibytes: The card's memory, `None` for all that there is.
        context: Bytes of it that CUDA takes for the process.
        turn_at: The step before which it waits until no other run is timed; `None`: it does not.
    """
    if ON_GPU and gibibytes is not None:
        total = torch.cuda.mem_get_info()[1]
        torch.cuda.set_per_process_memory_fraction((gibibytes * 2**30 - context) / total)
    module = importlib.import_module(f"train_lift_{script}")
    compute_losses, found, steps = module.compute_losses, {}, itertools.count(1)

    def start(*arguments: Any, **settings: Any) -> tuple:
        step = next(steps)
        if ON_GPU and step == 1:
            found["peak before the steps MiB"] = torch.cuda.max_memory_allocated() / 2**20
            torch.cuda.reset_peak_memory_stats()
        if step == turn_at:
            if ON_GPU:
                torch.cuda.synchronize()
            wait_for_turn()
        return compute_losses(*arguments, **settings)

    def leave(*arguments: Any) -> None:
        raise Done

    module.compute_losses, module.save_train_state = start, leave
    args = module.parse_args(flags)
    with contextlib.suppress(Done):
        module.main(args)
    found["rows"] = read_metrics(Path(args.output_dir) / "metrics.jsonl")
    if ON_GPU:
        found["peak allocated MiB"] = torch.cuda.max_memory_allocated() / 2**20
        found["peak reserved MiB"] = torch.cuda.max_memory_reserved() / 2**20
        found["CUDA context MiB"] = context / 2**20
    return found


# ----------------------------------------------------------------------------------------------- results and processes


class Results:
    """The JSON list of a slice, which is written after each run.

    Args:
        path: Where it is written. Where there is none yet, what RESULTS has by this name is taken over.
        minutes: No run is started that could not end soon after them.
    """

    def __init__(self, path: Path, minutes: float):
        self.path, self.minutes, self.started = path, minutes, time.monotonic()
        kept = next((each for each in (path, RESULTS / path.name) if each.exists()), None)
        self.found: list[Result] = json.loads(kept.read_text(encoding="utf-8")) if kept else []

    def find(self, settings: Result) -> Result | None:
        """The result with these settings, on this device by this torch."""
        settings = self.complete(settings)
        return next((found for found in self.found if settings.items() <= found.items()), None)

    def misses(self, settings: Result) -> bool:
        """Whether there is no result with these settings, or an error; what does not fit the GPU is a result."""
        return not is_measured(self.find(settings) or {"error": "none yet"})

    def keep(self, settings: Result, measured: Result, started: float) -> None:
        """Write what was measured; it replaces a result with these settings.

        Args:
            started: When, in seconds since the epoch.
        """
        settings = self.complete(settings)
        found = settings | measured | {"seconds": time.time() - started}
        self.found = [old for old in self.found if not settings.items() <= old.items()] + [found]
        write_json(self.path, self.found)
        print(f"{time.strftime('%H:%M:%S')} {' '.join(map(str, settings.values()))}: {summarise(found)}", flush=True)

    def complete(self, settings: Result) -> Result:
        """The settings, with the device and torch's version."""
        device = describe_device(torch.device("cuda" if ON_GPU else "cpu"))
        return settings | {"device": device, "torch": torch.__version__}

    def seconds_left(self, most: float = LIMIT) -> float:
        """What is started now may take so long."""
        return min(most, self.started + 60 * self.minutes + OVER - time.monotonic())

    def check_time(self) -> None:
        """End the process where what is started now would be killed before it has measured anything."""
        if self.seconds_left() < SHORTEST:
            few = f"too little of the {self.minutes:g} minutes is left"
            raise SystemExit(f"{few}; the same command goes on with {self.path.stem}")


def summarise(found: Result) -> str:
    """A result's numbers in a line."""
    numbers = {name: f"{value:.4g}" for name, value in found.items() if isinstance(value, float)}
    return ", ".join(f"{name} {value}" for name, value in (numbers | {"error": found.get("error", "none")}).items())


def run_all(
    results: Results,
    runs: list[Run],
    size: str,
    inputs: Path,
    finish: Callable[[Run, Result], Result],
    turn_at: int | None = None,
) -> list[Result]:
    """What the runs have measured, now or before.

    Args:
        size: Of the models.
        inputs: Folder of teachers and images.
        finish: Makes a result of what [`train`] returns.
        turn_at: See [`train`].
    """
    missing = [run for run in runs if results.misses(run.settings)]
    scripts, started = sorted({run.script for run in missing}), time.time()
    with ThreadPoolExecutor(4) as pool:
        errors = pool.map(lambda script: prepare_inputs(script, size, inputs), scripts)
        failed = {script: error for script, error in zip(scripts, errors) if error}
    for run in missing:
        if run.script in failed:
            results.keep(run.settings, {"error": failed[run.script]}, started)
    missing = [run for run in missing if run.script not in failed]
    while missing:
        results.check_time()
        wave, missing = take_wave(missing)
        started = time.time()
        for run, found in zip(wave, run_wave(wave, size, inputs, turn_at, results.seconds_left())):
            results.keep(run.settings, found if "error" in found else finish(run, found), started)
    return [results.find(run.settings) for run in runs]


def take_wave(runs: list[Run]) -> tuple[list[Run], list[Run]]:
    """The runs that the GPU and the cores hold at once, and the others; one run at least."""
    free = torch.cuda.get_device_properties(0).total_memory / 2**30 if ON_GPU else 0
    wave = []
    for run in runs[: max((os.cpu_count() or 1) // 2, 1)]:
        free -= run.gibibytes or NEEDED
        if wave and free < 0:
            break
        wave.append(run)
    return wave, runs[len(wave) :]


def run_wave(runs: list[Run], size: str, inputs: Path, turn_at: int | None, seconds: float) -> Iterator[Result]:
    """[`train`] in processes side by side; of one that fails, or takes too long, the "error", its last line."""
    context = 0
    if ON_GPU:  # of a process alone on the GPU
        query = "import torch; torch.cuda.init(); free, total = torch.cuda.mem_get_info(); print(total - free)"
        context = int(run_python("-c", query).stdout.split()[-1])
    with tempfile.TemporaryDirectory(dir=inputs) as folder:
        commands = []
        for number, run in enumerate(runs):
            output = Path(folder) / str(number)
            output.mkdir()
            flags = [*common_flags(run.script, size, inputs), "--output_dir", str(output / "student")]
            flags += ["--cache_dir", str(output / "cache"), *run.flags]
            options = {"script": run.script, "flags": flags, "gibibytes": run.gibibytes, "turn_at": turn_at}
            options |= {"context": context, "output": str(output)}
            commands.append([sys.executable, "benchmarks/gpu.py", "--in_process", json.dumps(options)])
        ended = run_in_turns(commands, ROOT, {"HF_HUB_OFFLINE": "1"}, seconds, timed=turn_at is not None)
        for number, (run, finished) in enumerate(zip(runs, ended)):
            yield read_measured(finished, Path(folder) / str(number), run.settings)


def common_flags(script: str, size: str, inputs: Path) -> list[str]:
    """What all runs of a script have in common."""
    return [
        *list_flags(script, size, inputs),
        *("--report_to", "none", "--gradient_accumulation_steps", "1", "--dataloader_num_workers", "0"),
    ]


def run_python(*command: str, seconds: float = LIMIT, **environment: str) -> subprocess.CompletedProcess:
    """A Python process in the repository's root, its output kept. One that takes too long is killed.

    Raises:
        subprocess.TimeoutExpired: It was.
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **environment}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "timeout": seconds}
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, **options)


# ---------------------------------------------------------------------------------------------------------- the slices


def check_losses(results: Results, size: str, inputs: Path) -> None:
    """Slice 1: twenty steps of each script in each half precision, and spread by --fsdp over one process.

    Without a GPU, float32 instead of fp16.
    """
    runs = []
    ways = (("bf16", "--use_8bit_adam"), ("fp16" if ON_GPU else "no", "--use_8bit_adam"), ("bf16", "--fsdp"))
    for (precision, way), script in itertools.product(ways, SCRIPTS):
        flags = f"--mixed_precision {precision} {way}" + " --gradient_checkpointing" * (script in ("sd3", "sdxl"))
        settings = {"script": script, "size": size, "precision": precision, "flags": flags, "batch": BATCH[script]}
        flags += f" --train_batch_size {BATCH[script]} --max_train_steps 20 --logging_steps 1"
        runs.append(Run(settings, script, flags.split()))

    def finish(run: Run, found: Result) -> Result:
        losses = [row["loss"] for row in found.pop("rows")]  # a value that is not finite is null there
        finite = [loss for loss in losses if loss is not None]
        first, last = statistics.mean(finite[:5]), statistics.mean(finite[-5:])
        return found | {"losses": losses, "not finite": losses.count(None), "falls by": 1 - last / first}

    run_all(results, runs, size, inputs, finish)


def measure_memory(number: int, results: Results, size: str, inputs: Path) -> None:
    """Slices 2, 3 and 7: for each card the largest batch that fits, its memory and its speed."""
    total = torch.cuda.get_device_properties(0).total_memory / 2**30 if ON_GPU else math.inf
    # Each with the batches that were tried, and whether they fit; None is not known.
    ladders = [(case, limit, {}) for case in MEMORY[number] for limit in case.first_batches if limit <= total]
    ladders = ladders if ON_GPU else ladders[:1]
    while ladders:
        tries = [
            (fits, batch, make_run(case, limit, batch, size))
            for case, limit, fits in ladders
            for batch in next_batches(case.first_batches[limit], fits)
        ]
        found = run_all(results, [run for *_, run in tries], size, inputs, finish_case, SETTLED * LOGGED + 1)
        for (fits, batch, _), result in zip(tries, found):
            fits[batch] = "error" not in result if is_measured(result) else None
        # What failed in another way says nothing of the memory; the same command tries it again.
        ladders = [ladder for ladder in ladders if None not in ladder[2].values() and next_batches(1, ladder[2])]


def next_batches(first: int, fits: dict[int, bool]) -> list[int]:
    """The batches to try next, none once the largest that fits is known.

    Args:
        first: To begin with, beside its double.
        fits: What was tried.
    """
    if not fits:
        first = min(first, LARGEST_BATCH)
        batches = [first, 2 * first]
    elif all(fits.values()):
        batches = [2 * max(fits)]
    else:
        batches = [] if any(fits.values()) else [min(fits) // 2]
    return [batch for batch in batches if 1 <= batch <= LARGEST_BATCH]


def make_run(case: Case, limit: int, batch: int, size: str) -> Run:
    """A run of slices 2, 3 and 7."""
    settings = {"script": case.script, "size": size, "case": case.name, "flags": case.flags}
    settings |= {"limit GiB": limit, "batch": batch}
    flags = case.flags if ON_GPU else case.flags.replace("fp16", "bf16")
    flags += f" --train_batch_size {batch} --max_train_steps {STEPS} --logging_steps {LOGGED}"
    return Run(settings, case.script, flags.split(), limit)


def finish_case(run: Run, found: Result) -> Result:
    """The speed of a run of slices 2, 3 and 7: that of the steps after those in which it waited for its turn."""
    rows = [row for row in found.pop("rows") if row["step"] > (SETTLED + 1) * LOGGED]
    speed = statistics.median(row["images_per_second"] for row in rows)
    steps, images = PUBLISHED[run.script]
    return found | {"images per second": speed, "hours for the recipe": steps * images / speed / 3600}


def add_estimates(results: Results) -> None:
    """What --dry_run says of the runs of slices 1, 2, 3 and 7 that fit; it needs no GPU."""
    with tempfile.TemporaryDirectory() as folder:
        teachers = {
            "unet": save_ddpm(Path(folder) / "unet", **CELEBA),
            "sd21": save_sd21(Path(folder) / "sd21"),
            "dit": save_dit(Path(folder) / "dit"),
            "sd3": save_sd3(Path(folder) / "sd3", SD3_MEDIUM),
            "sdxl": save_sdxl(Path(folder) / "sdxl"),
        }
        for found in tqdm([each for each in results.found if "error" not in each], desc="dry runs"):
            flags = [*list_flags(found["script"], "full", Path())[4:], *found["flags"].split(), "--train_batch_size"]
            flags += [str(found["batch"]), "--gradient_accumulation_steps", "1", "--max_train_steps", "1"]
            estimated = estimate(found["script"], teachers[found["script"]], shlex.join(flags))
            found["estimated MiB"] = estimated["MiB"]
            peaks = [peak for name, peak in PEAKS.items() if name in found["device"]]
            if "images per second" in found and peaks:
                teraflops = estimated["FLOPs"] / found["batch"] * found["images per second"] / 1e12
                found |= {"TFLOP/s": teraflops, "share of the peak": teraflops / peaks[0]}
    write_json(results.path, results.found)


def time_steps(results: Results, size: str, inputs: Path) -> None:
    """Slice 4: the cells of step.py, whose list this is. Without a GPU, its first grid in what a CPU computes."""
    cells, at_once = [], 1
    for grid in GRIDS if ON_GPU else GRIDS[:1]:
        grid = grid if ON_GPU else grid.replace("--batch 32", "--batch 2 --steps 2")
        own, _, passed = grid.partition(" -- ")
        flags = [*own.split(), "--size", size, *(["--", *passed.split()] if passed else [])]
        cells += list_cells(parse_step_args(flags))
    cells = [cell for cell in cells if results.misses(cell) and ("xformers" not in cell["flags"] or has_xformers())]
    cells.sort(key=lambda cell: cell["compile"] != "on")  # which start slowest: while there is most time
    if ON_GPU:
        at_once = max(int(torch.cuda.get_device_properties(0).total_memory / 2**30 / CELL), 1)
        at_once = min(at_once, (os.cpu_count() or 2) // 2)
    write_json(results.path, results.found)  # where `run_cells` looks for what is measured
    write_markdown(results.path.with_suffix(".md"), results.found)
    for start in range(0, len(cells), at_once):
        results.check_time()
        wave, seconds = cells[start : start + at_once], results.seconds_left()
        found = run_cells(wave, results.path, inputs, 3, "benchmarks/gpu.sh 4", at_once, seconds)
        write_markdown(results.path.with_suffix(".md"), found)


def has_xformers() -> bool:
    """Whether its kernels load beside this torch."""
    with contextlib.suppress(SystemExit):
        check_xformers()
        return True
    return False


def kill_and_resume(results: Results, size: str, inputs: Path) -> None:
    """Slice 5: the student of a run that is killed and resumed, beside that of one that is not."""
    size, started = "tiny" if size == "tiny" else "small", time.time()  # large enough, and quick to save
    results.check_time()
    settings = [{"script": script, "size": size} for script in ("unet", "sd21")]
    missing = [each for each in settings if results.misses(each)]
    until = time.monotonic() + results.seconds_left(2 * LIMIT)
    with ThreadPoolExecutor(2 if ON_GPU else 1) as pool:
        found = [*pool.map(lambda each: kill_once(each["script"], size, inputs, until), missing)]
    for each, measured in zip(missing, found):
        results.keep(each, measured, started)


def kill_once(script: str, size: str, inputs: Path, until: float) -> Result:
    """How far a run that is killed and resumed is from one that is not.

    Args:
        until: The time, of `time.monotonic`, at which what still runs is killed for good.
    """
    if error := prepare_inputs(script, size, inputs):
        return {"error": error}
    precision = "fp16" if ON_GPU else "no"
    with tempfile.TemporaryDirectory(dir=inputs) as folder:
        whole, killed = Path(folder) / "whole", Path(folder) / "killed"

        def command(output: Path) -> list[str]:
            flags = ["--output_dir", str(output), "--cache_dir", f"{output}-cache", "--logging_steps", "1"]
            flags += ["--mixed_precision", precision, "--max_train_steps", "40", "--checkpointing_steps", "5"]
            flags += ["--train_batch_size", "2", "--resume_from_checkpoint", "latest"]
            return [sys.executable, f"train_lift_{script}.py", *common_flags(script, size, inputs), *flags]

        def interrupt() -> int:
            step = run_until(lambda rows: len(rows) >= 12, command(killed), killed, until)
            run_until(lambda rows: False, command(killed), killed, until)
            return step

        with ThreadPoolExecutor(2 if ON_GPU else 1) as pool:
            other = pool.submit(run_until, lambda rows: False, command(whole), whole, until)
            step = interrupt()
            other.result()
        ends = [run / "model_index.json" for run in (whole, killed)]
        if step >= 40 or not all(end.exists() for end in ends):
            texts = [(run.parent / f"{run.name}.txt").read_text()[-2000:] for run in (whole, killed)]
            print(*texts, sep="\n", file=sys.stderr, flush=True)
            return {"error": f"killed at step {step} of 40; finished: {[end.exists() for end in ends]}"}
        return {"killed after step": step} | compare(whole, killed)


def run_until(enough: Callable[[list[Result]], bool], command: list[str], output: Path, until: float) -> int:
    """Start a training and kill it once it has logged enough, or at a time; returns the last step it logged."""
    path = output / "metrics.jsonl"
    with (output.parent / f"{output.name}.txt").open("wb") as printed:
        process = subprocess.Popen(command, cwd=ROOT, stdout=printed, stderr=subprocess.STDOUT)
        while process.poll() is None:
            if enough(read_metrics(path)) or time.monotonic() > until:
                process.send_signal(signal.SIGKILL)
            time.sleep(0.05)
    rows = read_metrics(path)
    return rows[-1]["step"] if rows else 0


def compare(*runs: Path) -> Result:
    """How far two runs' U-Nets and last losses are apart."""
    weights = [load_file(next((run / "unet").glob("*.safetensors"))) for run in runs]
    largest = max((weights[0][name] - weights[1][name]).abs().max().item() for name in weights[0])
    losses = [read_metrics(run / "metrics.jsonl")[-1]["loss"] for run in runs]
    return {"largest difference of a weight": largest, "last losses": losses}


def run_tests(results: Results, size: str, inputs: Path) -> None:
    """Slice 6: the tests of what a GPU shows, which have their own sizes and inputs."""
    settings, started = {"tests": TESTS}, time.time()
    if results.misses(settings):
        environment = {"ACCELERATE_USE_CPU": "false"}
        command = ["-m", "pytest", "-q", "-rf", "--numprocesses", "4", *TESTS.split()]
        command += [word for test in CPU_ONLY for word in ("--deselect", test)]
        try:
            finished = run_python(*command, seconds=results.seconds_left(2 * LIMIT), **environment)
        except subprocess.TimeoutExpired as error:
            print((error.stdout or b"").decode(errors="replace")[-5000:], flush=True)  # bytes, whatever was asked for
            return results.keep(settings, {"error": str(error)}, started)
        print(finished.stdout[-5000:], flush=True)
        last = finished.stdout.strip().rpartition("\n")[2]
        results.keep(settings, {"result" if finished.returncode == 0 else "error": last}, started)


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line, or `input_args`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slice", type=int, choices=range(1, 8), help="which one")
    parser.add_argument("--size", default="full", choices=SIZES, help="of the models (default: full)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the JSON lists")
    parser.add_argument("--inputs", type=Path, default=ROOT / "runs" / "gpu", help="folder of teachers and images")
    parser.add_argument("--in_process", help=argparse.SUPPRESS)  # a run: what `run_wave` gives its process
    parser.add_argument(
        "--estimates", action="store_true", help="add what --dry_run says to slice 1, 2, 3 or 7; no GPU"
    )
    minutes = "start no run that would end long after them (default: no end)"
    parser.add_argument("--minutes", type=float, default=math.inf, help=minutes)
    args = parser.parse_args(input_args)
    if args.slice is None and args.in_process is None:
        fail("--slice is not given; pass 1 to 7, or run benchmarks/gpu.sh all")
    if args.estimates and args.slice not in (1, *MEMORY):
        fail(f"--estimates is for the slices 1, 2, 3 and 7; --slice is {args.slice}")
    if args.size == "full" and not ON_GPU and args.in_process is None and not args.estimates:
        fail("--size full needs a GPU, and there is none; pass --size tiny")
    return args


def main(args: argparse.Namespace) -> None:
    """Run a slice, or in a run's process that run alone."""
    if args.in_process:
        options = json.loads(args.in_process)
        if "--fsdp" in options["flags"]:  # one process of a launcher
            with socket.create_server(("127.0.0.1", 0)) as server:
                port = str(server.getsockname()[1])
            os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": port}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "false" if ON_GPU else "true"}
        output = Path(options.pop("output"))
        (output / "measured.json").write_text(json.dumps(train(**options)))
        return
    names = {1: "losses", 2: "memory", 3: "memory-sd3", 4: "steps", 5: "resume", 6: "tests", 7: "memory-sdxl"}
    inputs = args.inputs.resolve()
    inputs.mkdir(parents=True, exist_ok=True)
    results = Results(args.output / f"{names[args.slice]}.json", args.minutes)
    if args.estimates:
        add_estimates(results)
    elif args.slice in MEMORY:
        measure_memory(args.slice, results, args.size, inputs)
    else:
        slices = {1: check_losses, 4: time_steps, 5: kill_and_resume, 6: run_tests}
        slices[args.slice](results, args.size, inputs)


if __name__ == "__main__":
    main(parse_args())
