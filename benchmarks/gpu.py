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

    1  each script, 20 steps in bf16 and in fp16: is all finite, does the loss fall?
    2  memory and speed of SD 2.1 -> bk_tiny at 512 pixels, and of DiT-XL/2 -> d14
    3  memory and speed of half SD3-medium at 512 pixels: whole, and as LoRA with --share_backbone
    4  xformers, compile, 8-bit AdamW and a cached teacher, by step.py
    5  a run that is killed and resumed, beside one that is not
    6  tests/test_gpu.py

The models have random weights (random_teachers.py), nothing is downloaded. Each slice writes a JSON list and keeps
each run as soon as it is done: the same command goes on where it was stopped. Slices 2 and 3 hold a run to the memory
of a card of 12, 16 or 24 GiB, its CUDA context included, and double the batch until it does not fit.
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
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.arguments import fail
from common.metrics import read_metrics

from dry_runs import estimate
from safetensors.torch import load_file

from device import describe_device
from random_teachers import SIZES, list_flags
from small_runs import ROOT, SCRIPTS
from step import Done, prepare_inputs, write_json


Result = dict[str, Any]
RESULTS = ROOT / "benchmarks" / "results" / "gpu"
ON_GPU = torch.cuda.is_available()
BATCH = {"unet": 32, "sd21": 4, "dit": 16, "sd3": 2}  # of slice 1
LARGEST_BATCH = 64 if ON_GPU else 1
PUBLISHED = {"sd21": (50_000, 128), "dit": (100_000, 256), "sd3": (50_000, 32)}  # steps, images per step
WEIGHTS = {"unet": "unet", "sd21": "unet", "dit": "transformer", "sd3": "transformer"}  # the student's folder
# Dense, half precision, in TFLOP/s, by NVIDIA's data sheets and white papers. The first name that is found counts.
PEAKS = {"H100 PCIe": 756.0, "H100": 989.4, "H200": 989.4, "A100": 312.0, "RTX 4090": 165.2, "RTX 3060": 25.5}
SAVING = "--use_8bit_adam --gradient_checkpointing"


class Case(NamedTuple):
    """What slices 2 and 3 measure, at growing batches."""

    script: str
    name: str
    flags: str
    limits: tuple[int | None, ...]  # GiB of the cards, growing; None is the whole GPU
    first_batch: int = 1


MEMORY = {
    2: (
        Case("sd21", "bk_tiny", f"--mixed_precision fp16 --cache_latents {SAVING}", (12, 24)),
        Case("dit", "d14", "--mixed_precision bf16 --cache_latents --use_8bit_adam", (12, 24, None), 8),
    ),
    3: (
        Case("sd3", "half, shared LoRA", f"--mixed_precision bf16 {SAVING} --lora_rank 64 --share_backbone", (12, 16)),
        Case("sd3", "half, whole", f"--mixed_precision bf16 {SAVING}", (16, 24)),
        Case("sd3", "half, LoRA", f"--mixed_precision bf16 {SAVING} --lora_rank 64", (12, 16), 4),
    ),
}
# Of slice 4: arguments of step.py, each a grid.
GRIDS = (
    "--script sd21 --cache latents teacher --batch 8 --precision fp16 --compile off on",
    "--script sd21 --cache latents --batch 8 --precision fp16 --optimizer 8bit",
    "--script sd21 --cache latents --batch 8 --precision fp16 -- --enable_xformers_memory_efficient_attention",
    "--script dit --cache latents teacher --batch 16 --precision bf16 --compile off on",
    "--script sd3 --cache latents teacher --batch 4 --precision bf16 --optimizer 8bit -- --gradient_checkpointing",
    "--script unet --cache none teacher --batch 32 --precision bf16",
)
STEPS, SETTLED = 12, 4  # of a run of slices 2 and 3, and of these those before the speed is taken


# ------------------------------------------------------------------------------------------------- in a run's process


def train(script: str, flags: list[str], gibibytes: int | None) -> Result:
    """Run a script's `main` up to where it would save its last step; returns its metrics and peaks of memory.

    Args:
        flags: Of the script.
        gibibytes: The card's memory, `None` for all that there is.
    """
    context = 0
    if ON_GPU:
        torch.cuda.init()
        free, total = torch.cuda.mem_get_info()
        context = total - free  # of a process alone on the GPU
        if gibibytes is not None:
            torch.cuda.set_per_process_memory_fraction((gibibytes * 2**30 - context) / total)
    module = importlib.import_module(f"train_lift_{script}")

    compute_losses, found = module.compute_losses, {}

    def start(*arguments: Any, **settings: Any) -> tuple:
        if ON_GPU and not found:
            found["peak before the steps MiB"] = torch.cuda.max_memory_allocated() / 2**20
            torch.cuda.reset_peak_memory_stats()
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
        minutes: After which no run is started any more.
    """

    def __init__(self, path: Path, minutes: float):
        self.path, self.minutes, self.started = path, minutes, time.monotonic()
        kept = next((each for each in (path, RESULTS / path.name) if each.exists()), None)
        self.found: list[Result] = json.loads(kept.read_text(encoding="utf-8")) if kept else []

    def get(self, settings: Result, measure: Callable[[], Result]) -> Result:
        """The result with these settings, measured now unless it is there; one that failed is measured anew."""
        device = describe_device(torch.device("cuda" if ON_GPU else "cpu"))
        settings = settings | {"device": device, "torch": torch.__version__}
        for old in self.found:
            if settings.items() <= old.items() and ("error" not in old or fits_not(old)):
                return old
        self.check_time()
        started = time.time()
        print(f"{time.strftime('%H:%M:%S')} {' '.join(map(str, settings.values()))}", flush=True)
        found = settings | measure()
        found["seconds"] = time.time() - started
        self.found = [old for old in self.found if not settings.items() <= old.items()] + [found]
        write_json(self.path, self.found)
        print(f"  {summarise(found)}", flush=True)
        return found

    def check_time(self) -> None:
        """End the process where the minutes are over."""
        if time.monotonic() > self.started + 60 * self.minutes:
            raise SystemExit(f"{self.minutes:g} minutes are over; the same command goes on with {self.path.stem}")


def summarise(found: Result) -> str:
    """A result's numbers in a line."""
    numbers = {name: f"{value:.4g}" for name, value in found.items() if isinstance(value, float)}
    return ", ".join(f"{name} {value}" for name, value in (numbers | {"error": found.get("error", "none")}).items())


def fits_not(found: Result) -> bool:
    """Whether a run ended because the GPU's memory was too small."""
    return "does not fit the GPU" in found.get("error", "")


def run_apart(script: str, size: str, inputs: Path, flags: list[str], gibibytes: int | None = None) -> Result:
    """[`train`] in a process of its own; of one that fails, the "error", its last line.

    Args:
        size: Of the models.
        inputs: Folder of teachers and images. Caches are kept there, too.
        flags: Beside those that say what is trained on what.
        gibibytes: See [`train`].
    """
    prepare_inputs(script, size, inputs)
    with tempfile.TemporaryDirectory(dir=inputs) as folder:
        flags = [*common_flags(script, size, inputs), "--output_dir", f"{folder}/student", *flags]
        options = json.dumps({"script": script, "flags": flags, "gibibytes": gibibytes, "output": folder})
        finished = run_python("benchmarks/gpu.py", "--in_process", options)
        if finished.returncode == 0:
            return json.loads((Path(folder) / "measured.json").read_text())
    return {"error": finished.stdout.strip().rpartition("\n")[2]}


def common_flags(script: str, size: str, inputs: Path) -> list[str]:
    """What all runs of a script have in common."""
    return [
        *list_flags(script, size, inputs),
        *("--cache_dir", str(inputs / "cache"), "--report_to", "none", "--logging_steps", "1"),
        *("--gradient_accumulation_steps", "1", "--dataloader_num_workers", "4" if ON_GPU else "0"),
    ]


def run_python(*command: str) -> subprocess.CompletedProcess:
    """A Python process in the repository's root, its output kept."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, **options)


# ---------------------------------------------------------------------------------------------------------- the slices


def check_losses(results: Results, size: str, inputs: Path) -> None:
    """Slice 1: twenty steps of each script in each half precision; without a GPU, float32 instead of fp16."""
    for script, precision in itertools.product(SCRIPTS, ("bf16", "fp16" if ON_GPU else "no")):

        def measure(script: str = script, precision: str = precision) -> Result:
            flags = ["--mixed_precision", precision, "--max_train_steps", "20", "--use_8bit_adam"]
            flags += [
                "--train_batch_size",
                str(BATCH[script]),
                *(["--gradient_checkpointing"] if script == "sd3" else []),
            ]
            found = run_apart(script, size, inputs, flags)
            if "error" in found:
                return found
            losses = [row["loss"] for row in found.pop("rows")]  # a value that is not finite is null there
            finite = [loss for loss in losses if loss is not None]
            first, last = statistics.mean(finite[:5]), statistics.mean(finite[-5:])
            return found | {"losses": losses, "not finite": losses.count(None), "falls by": 1 - last / first}

        results.get({"script": script, "size": size, "precision": precision}, measure)


def measure_memory(number: int, results: Results, size: str, inputs: Path) -> None:
    """Slices 2 and 3: for each card the batches that fit, their memory, speed, and what --dry_run says."""
    total = torch.cuda.get_device_properties(0).total_memory / 2**30 if ON_GPU else math.inf
    for case in MEMORY[number]:
        batch = case.first_batch if ON_GPU else 1
        for limit in case.limits if ON_GPU else (None,):
            if limit is not None and limit > total:
                continue
            while batch <= LARGEST_BATCH:
                settings = {"script": case.script, "size": size, "case": case.name, "flags": case.flags}
                settings |= {"limit GiB": limit, "batch": batch}
                if "error" in results.get(settings, lambda at=(case, batch, limit): run_case(*at, size, inputs)):
                    break  # a larger card may take this batch
                batch *= 2


def run_case(case: Case, batch: int, limit: int | None, size: str, inputs: Path) -> Result:
    """A run of slices 2 and 3 at one batch: its memory and speed, beside the estimates."""
    flags = [*case.flags.split(), "--train_batch_size", str(batch)]
    if not ON_GPU:
        flags = ["bf16" if flag == "fp16" else flag for flag in flags]
    found = run_apart(case.script, size, inputs, [*flags, "--max_train_steps", str(STEPS)], limit)
    if "error" in found:
        return found
    speeds = [row["images_per_second"] for row in found.pop("rows")[SETTLED:]]
    steps, images = PUBLISHED[case.script]
    speed = statistics.median(speeds)
    found |= {"images per second": speed, "hours for the recipe": steps * images / speed / 3600}
    dry = [*list_flags(case.script, size, inputs)[4:], *flags, "--gradient_accumulation_steps", "1"]
    teacher = inputs / f"{case.script}-{size}"
    estimated = estimate(case.script, teacher, shlex.join([*dry, "--max_train_steps", "1"]))
    teraflops = estimated["FLOPs"] / batch * speed / 1e12
    found |= {"estimated GiB": estimated["GiB"], "TFLOP/s": teraflops}
    peak = next((peak for name, peak in PEAKS.items() if ON_GPU and name in torch.cuda.get_device_name()), None)
    return found | ({"share of the peak": teraflops / peak} if peak else {})


def time_steps(results: Results, size: str, inputs: Path) -> None:
    """Slice 4: step.py, which keeps its own list. Without a GPU, its first grid in what a CPU computes."""
    for grid in GRIDS if ON_GPU else GRIDS[3:4]:
        results.check_time()
        grid = grid if ON_GPU else grid.replace("--compile off on", "").replace("--batch 16", "--batch 2 --steps 2")
        own, _, passed = grid.partition(" -- ")
        flags = [*own.split(), "--size", size, "--json", str(results.path.resolve()), "--inputs", str(inputs)]
        finished = run_python("benchmarks/step.py", *flags, *(["--", *passed.split()] if passed else []))
        print(finished.stdout, flush=True)
        if finished.returncode != 0:
            print(f"error: the grid {grid} ended with exit code {finished.returncode}", flush=True)


def kill_and_resume(results: Results, size: str, inputs: Path) -> None:
    """Slice 5: the student of a run that is killed and resumed, beside that of one that is not."""
    for script in ("unet", "sd21"):
        size = size if size == "tiny" else "small"  # large enough, and quick to save

        def measure(script: str = script, size: str = size) -> Result:
            prepare_inputs(script, size, inputs)
            precision = "fp16" if ON_GPU else "no"
            with tempfile.TemporaryDirectory(dir=inputs) as folder:
                command = [sys.executable, f"train_lift_{script}.py", *common_flags(script, size, inputs)]
                command += ["--mixed_precision", precision, "--max_train_steps", "40", "--checkpointing_steps", "5"]
                command += ["--train_batch_size", "2", "--resume_from_checkpoint", "latest", "--output_dir"]
                whole, killed = Path(folder) / "whole", Path(folder) / "killed"
                run_until(lambda rows: False, [*command, str(whole)])
                step = run_until(lambda rows: len(rows) >= 12, [*command, str(killed)])
                run_until(lambda rows: False, [*command, str(killed)])
                ends = [run / "model_index.json" for run in (whole, killed)]
                if step >= 40 or not all(end.exists() for end in ends):
                    return {"error": f"the run was to be killed, and was at step {step}; finished: {ends}"}
                return {"killed after step": step} | compare(script, whole, killed)

        results.get({"script": script, "size": size}, measure)


def run_until(enough: Callable[[list[Result]], bool], command: list[str]) -> int:
    """Start a training and kill it once it has logged enough, if it ever has; returns the last step it logged."""
    path = Path(command[-1]) / "metrics.jsonl"
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        if enough(read_metrics(path)):
            process.send_signal(signal.SIGKILL)
        time.sleep(0.05)
    rows = read_metrics(path)
    return rows[-1]["step"] if rows else 0


def compare(script: str, *runs: Path) -> Result:
    """How far two runs' students and last losses are apart."""
    weights = [load_file(next((run / WEIGHTS[script]).glob("*.safetensors"))) for run in runs]
    largest = max((weights[0][name] - weights[1][name]).abs().max().item() for name in weights[0])
    losses = [read_metrics(run / "metrics.jsonl")[-1]["loss"] for run in runs]
    return {"largest difference of a weight": largest, "last losses": losses}


def run_tests(results: Results, size: str, inputs: Path) -> None:
    """Slice 6: the tests of what a GPU shows, which have their own sizes and inputs."""

    def measure() -> Result:
        finished = run_python("-m", "pytest", "-q", "tests/test_gpu.py")
        last = finished.stdout.strip().rpartition("\n")[2]
        return {"result": last} if finished.returncode == 0 else {"error": last}

    results.get({"tests": "tests/test_gpu.py"}, measure)


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line, or `input_args`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slice", type=int, choices=range(1, 7), help="which one")
    parser.add_argument("--size", default="full", choices=SIZES, help="of the models (default: full)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the JSON lists")
    parser.add_argument("--inputs", type=Path, default=ROOT / "runs" / "gpu", help="folder of teachers and images")
    parser.add_argument("--in_process", help=argparse.SUPPRESS)  # a run: what `run_apart` gives its process
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no run after them (default: no end)")
    args = parser.parse_args(input_args)
    if args.slice is None and args.in_process is None:
        fail("--slice is not given; pass 1 to 6, or run benchmarks/gpu.sh all")
    if args.size == "full" and not ON_GPU and args.in_process is None:
        fail("--size full needs a GPU, and there is none; pass --size tiny")
    return args


def main(args: argparse.Namespace) -> None:
    """Run a slice, or in a run's process that run alone."""
    if args.in_process:
        options = json.loads(args.in_process)
        found = train(options["script"], options["flags"], options["gibibytes"])
        (Path(options["output"]) / "measured.json").write_text(json.dumps(found))
        return
    names = {1: "losses", 2: "memory", 3: "memory-sd3", 4: "steps", 5: "resume", 6: "tests"}
    inputs = args.inputs.resolve()
    inputs.mkdir(parents=True, exist_ok=True)
    results = Results(args.output / f"{names[args.slice]}.json", args.minutes)
    if args.slice in MEMORY:
        measure_memory(args.slice, results, args.size, inputs)
    else:
        slices = {1: check_losses, 4: time_steps, 5: kill_and_resume, 6: run_tests}
        slices[args.slice](results, args.size, inputs)


if __name__ == "__main__":
    main(parse_args())
