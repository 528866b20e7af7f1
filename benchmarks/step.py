# Copyright 2026 The LIFT and PLACE distillation authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""What a training step costs beyond the work that it cannot avoid.

A script's own `main` runs on a teacher of random weights and random images (random_teachers.py). Its steps are timed
as a whole, with data loading, the loss, clipping, averaging and logging. Between them the parts are timed alone, on
the same models and inputs. The bound is the sum of the parts that no distillation can avoid: the encoders where
nothing is cached, the teacher's forward pass where it is not cached, the student's forward and backward pass, and the
optimizer's step. Timed beside them are the loss between the two outputs, and clipping with averaging. Steps and parts
take turns, so that a busy machine slows both. The aim: a step costs at most 1.03 times its bound.

On a GPU, and with several threads, what is measured is the time that passes. With one thread on a CPU it is the
processor's time that the process takes, so that other work on the machine does not count.

    python benchmarks/step.py                          # each script's small models, by what is cached
    python benchmarks/step.py --script unet --size full --cache none --batch 4
    python benchmarks/step.py --script all --cache none latents teacher --batch 1 4 16 --precision no bf16 \\
        --compile off on --optimizer adamw 8bit --json cells.json

All values of the flags are combined to a grid. Each cell is a process of its own, and --json keeps each as soon as it
is done: the same command goes on where it was stopped, and cells of other commands stay. A table of all cells is
written beside it, cells.md. Flags after `--` go to the training script, in every cell: `-- --gradient_checkpointing`.

Nothing is compared in features (--lambda_kd_feat 0), so that the cells differ only in what is cached:

    none     encoders and teacher run in every step
    latents  --cache_latents: the encoders have run before the training (the pixel script has none)
    teacher  that, and --cache_teacher 1: the teacher has, too
"""

import argparse
import contextlib
import importlib
import itertools
import json
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import torch


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.errors import fail
from common.teacher_cache import Batch, predict

from accelerate.optimizer import AcceleratedOptimizer
from diffusers.training_utils import EMAModel

from device import describe_device
from lift_utils import FeatureModel, KDLoss
from random_teachers import SIZES, list_flags
from small_runs import SCRIPTS
from turns import run_in_turns, wait_for_turn


CACHES = {
    "none": (),
    "latents": ("--cache_latents",),
    "teacher": ("--cache_latents", "--cache_teacher", "1"),
}
# What makes two cells the same.
SETTINGS = ("script", "size", "cache", "batch", "precision", "compile", "optimizer", "flags", "steps", "threads")
SETTINGS += ("device", "torch")
ENCODERS, TEACHER, STUDENT = "encoders", "teacher forward", "student forward and backward"
OPTIMIZER, LOSS, AVERAGE, WHOLE = "optimizer step", "loss", "clipping and average", "whole step"
BOUND = (ENCODERS, TEACHER, STUDENT, OPTIMIZER)
IMAGES = 64
FITS_NOT = "does not fit the GPU"  # as the scripts say it
LIMIT = 3600  # seconds for the cells that start side by side
# With these glibc keeps freed memory, as the CUDA allocator does. Otherwise page faults are timed with the work.
KEEP_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": "8589934592",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "268435456",
}


# ------------------------------------------------------------------------------------------------- in a cell's process


class Done(Exception):
    """Raised to leave the training loop once enough steps are timed."""


def synchronize() -> None:
    """Wait until the GPU is idle, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def counts_processor() -> bool:
    """Whether the processor's time is measured, and not the time that passes."""
    return torch.get_num_threads() == 1 and not torch.cuda.is_available()


def peak_memory() -> float:
    """The most that was allocated on the GPU, or without one that the process has held, in MiB."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Probe:
    """Replaces a script's `compute_losses` with a function that times each step and then, alone, its parts.

    Args:
        script: The training script's module. Its functions are replaced for good.
        steps: Steps to time.
        warmup: Steps before them. After these, and before any part is timed alone, the memory is read.
    """

    def __init__(self, script: ModuleType, steps: int, warmup: int):
        self.steps, self.warmup, self.done = steps, warmup, 0
        self.start: float | None = None
        self.clock = time.process_time if counts_processor() else time.perf_counter
        self.seconds: dict[str, list[float]] = {}
        self.compute_losses, script.compute_losses = script.compute_losses, self.step
        self.guarded_step, script.guarded_step = script.guarded_step, self.keep_optimizer
        self.make_average, script.EMAModel = script.EMAModel, self.keep_average
        self.average: EMAModel | None = None

    def time(self, name: str, function: Callable[[], object]) -> None:
        """Call the function and keep the seconds it took."""
        synchronize()
        start = self.clock()
        function()
        synchronize()
        self.seconds.setdefault(name, []).append(self.clock() - start)

    def keep_average(self, parameters: list[torch.nn.Parameter], **options: Any) -> EMAModel:
        """Stands in for `EMAModel`, and keeps it with what it averages."""
        self.averaged, self.average = parameters, self.make_average(parameters, **options)
        return self.average

    def keep_optimizer(self, optimizer: AcceleratedOptimizer, *step: torch.Tensor) -> None:
        """Stands in for `guarded_step`, and keeps the optimizer with the step's gradients."""
        if self.done >= self.warmup:  # before, they would count as memory of the run
            self.optimizer = optimizer
            self.parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            self.gradients = [parameter.grad for parameter in self.parameters]
        self.guarded_step(optimizer, *step)

    def step(
        self,
        student: FeatureModel,
        teacher: FeatureModel | None,
        batch: Batch,
        progress: float,
        inputs_of: Callable[[Batch], tuple],
        kd_loss: KDLoss,
        **settings: Any,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Stands in for `compute_losses`, which is called once per step, right after the data loading."""
        synchronize()
        now = self.clock()
        if self.start is None and torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()  # of what came before: samples, caches
        if self.start is not None:
            self.done += 1
            if self.done == 1:
                self.first_step_ended = time.time()
            if self.done == self.warmup:
                self.peak = peak_memory()
                wait_for_turn()
            if self.done > self.warmup:
                self.seconds.setdefault(WHOLE, []).append(now - self.start)
                self.time_parts(student, teacher)
                if self.done == self.warmup + 1:  # the parts' first run may compile or allocate
                    self.seconds.clear()
            if self.done == self.warmup + 1 + self.steps:
                raise Done

        def keep_made(batch: Batch) -> tuple:
            self.batch, self.inputs_of, self.inputs = batch, inputs_of, (made := inputs_of(batch))[0]
            return made

        def keep_outputs(prediction: torch.Tensor, *others: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            self.kd_loss, self.outputs = kd_loss, (prediction.detach(), *others)
            return kd_loss(prediction, *others)

        synchronize()
        self.start = self.clock()
        functions = {"inputs_of": keep_made, "kd_loss": keep_outputs}
        return self.compute_losses(student, teacher, batch, progress, **functions, **settings)

    def time_parts(self, student: FeatureModel, teacher: FeatureModel | None) -> None:
        """Time the parts of the last step, on its inputs."""

        def forward_backward() -> None:
            prediction, features = student(**self.inputs)
            torch.autograd.backward([prediction, *features], [torch.ones_like(x) for x in (prediction, *features)])

        def loss_alone() -> None:
            prediction, *others = self.outputs
            loss, _ = self.kd_loss(prediction.requires_grad_(), *others)
            torch.autograd.grad(loss, prediction)

        def clip_and_average() -> None:
            torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
            if self.average is not None:
                self.average.step(self.averaged)

        if self.inputs_of.keywords.get("encoders") is not None:
            self.time(ENCODERS, lambda: self.inputs_of(self.batch))
        if teacher is not None:
            self.time(TEACHER, lambda: predict(teacher, self.inputs, self.batch))
        self.time(STUDENT, forward_backward)
        for parameter, gradient in zip(self.parameters, self.gradients):
            # While a gradient scaler looks for its scale, gradients are infinite; this step is not skipped.
            parameter.grad = gradient.nan_to_num_(0, 0, 0) if gradient is not None else None
        self.time(OPTIMIZER, self.optimizer.optimizer.step)
        self.time(AVERAGE, clip_and_average)
        self.optimizer.optimizer.zero_grad()
        self.time(LOSS, loss_alone)


def script_flags(cell: dict[str, Any], inputs: Path, output: Path, warmup: int) -> list[str]:
    """The command line of the training script for a cell."""
    cached = CACHES[cell["cache"]]
    if cell["script"] == "unet":
        cached = tuple(flag for flag in cached if flag != "--cache_latents")
    elif cell["script"] == "sd3" and cell["cache"] == "none":
        cached = ("--no-cache_latents",)  # it caches by default
    return [
        *list_flags(cell["script"], cell["size"], inputs),
        *("--output_dir", str(output / "student"), "--cache_dir", str(output / "cache"), "--report_to", "none"),
        *("--train_batch_size", str(cell["batch"]), "--gradient_accumulation_steps", "1", "--lambda_kd_feat", "0"),
        *("--max_train_steps", str(warmup + cell["steps"] + 2), "--dataloader_num_workers", "0"),
        *("--mixed_precision", cell["precision"], *cached),
        *(("--compile",) if cell["compile"] == "on" else ()),
        *(("--use_8bit_adam",) if cell["optimizer"] == "8bit" else ()),
        *shlex.split(cell["flags"]),
    ]


def run_cell(cell: dict[str, Any], inputs: Path, output: Path, warmup: int) -> dict[str, Any]:
    """Train, and return what was measured.

    Args:
        cell: Its settings.
        inputs: The folder of the teacher and the images.
        output: An empty folder.
        warmup: Steps that are not timed.
    """
    script = importlib.import_module(f"train_lift_{cell['script']}")
    args = script.parse_args(script_flags(cell, inputs, output, warmup))
    probe = Probe(script, cell["steps"], warmup)
    with contextlib.suppress(Done):
        script.main(args)
    seconds = {name: statistics.median(values) for name, values in probe.seconds.items()}
    parts = [probe.seconds[name] for name in BOUND if name in seconds]
    # Each step is compared with the parts timed right after it: both see the machine in the same state.
    ratios = [whole / sum(alone) for whole, *alone in zip(probe.seconds[WHOLE], *parts)]
    return {
        "milliseconds": {name: 1000 * value for name, value in seconds.items()},
        "whole / bound": statistics.median(ratios),
        "loss / whole": seconds[LOSS] / seconds[WHOLE],
        "images per second": cell["batch"] / seconds[WHOLE],
        "peak memory MiB": probe.peak,
        "first step ended": probe.first_step_ended,
    }


# ------------------------------------------------------------------------------------------------------------ the grid


def list_cells(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The settings of all cells of the grid."""
    scripts = SCRIPTS if "all" in args.script else args.script
    gpu = torch.cuda.is_available()
    same = {"size": args.size, "flags": shlex.join(args.flags), "steps": args.steps, "threads": args.threads}
    same |= {"device": describe_device(torch.device("cuda" if gpu else "cpu")), "torch": torch.__version__}
    axes = {"script": scripts, "cache": args.cache, "batch": args.batch, "precision": args.precision}
    axes |= {"compile": args.compile, "optimizer": args.optimizer}
    cells = [dict(zip(axes, values)) | same for values in itertools.product(*axes.values())]
    return [cell for cell in cells if (cell["script"], cell["cache"]) != ("unet", "latents")]


def identify(cell: dict[str, Any]) -> tuple:
    """What makes two cells the same."""
    return tuple(cell[name] for name in SETTINGS)


def measure(cells: list[dict[str, Any]], inputs: Path, warmup: int, seconds: float) -> Iterator[dict[str, Any]]:
    """Run cells side by side, in processes of their own, which time their steps in turns.

    Yields:
        What was measured of each. Of one that did not end well, the "error", its last line; the end of its output is
        printed, unless it was that the GPU's memory is too small.
    """
    with tempfile.TemporaryDirectory() as folder:
        commands = []
        for number, cell in enumerate(cells):
            (Path(folder) / str(number)).mkdir()
            options = {"cell": cell, "inputs": str(inputs), "output": f"{folder}/{number}", "warmup": warmup}
            commands.append([sys.executable, __file__, "--in_process", json.dumps(options)])
        environment = {**KEEP_MEMORY, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(cells[0]["threads"])}
        started = time.time()
        for number, finished in enumerate(run_in_turns(commands, Path.cwd(), environment, seconds)):
            measured = read_measured(finished, Path(folder) / str(number), identify(cells[number]))
            if "error" not in measured:
                measured["seconds to the end of the first step"] = measured.pop("first step ended") - started
            yield measured


def read_measured(finished: subprocess.CompletedProcess, folder: Path, name: object) -> dict[str, Any]:
    """What a process has measured, by its file "measured.json", or an "error", its last line.

    The end of its output is printed then, unless the error is that the GPU's memory is too small.

    Args:
        folder: Of the file.
        name: What to call the process.
    """
    if finished.returncode == 0:
        return json.loads((folder / "measured.json").read_text())
    last = finished.stdout.strip().rpartition("\n")[2] or f"exit code {finished.returncode}"
    if FITS_NOT in last and "--train_batch_size" in last:  # a step, and no grid of samples or cache
        return {"error": FITS_NOT, "message": last}
    print(f"{name} ended with\n{finished.stdout[-3000:]}", file=sys.stderr, flush=True)
    return {"error": last}


def write_json(path: Path, cells: list[dict[str, Any]]) -> None:
    """Replace a file's JSON at once: a run that is stopped leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(json.dumps(cells, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)


def run_cells(
    wanted: list[dict[str, Any]],
    path: Path | None,
    inputs: Path,
    warmup: int,
    command: str,
    at_once: int,
    seconds: float = LIMIT,
) -> list[dict[str, Any]]:
    """Measure the cells that the file has not yet; returns the file's and the wanted ones, each once.

    Args:
        path: The JSON file, if there is one. It is written whenever a cell is done.
        command: Is kept with the cells that are measured now.
        at_once: Cells that start side by side.
        seconds: They have to end.
    """
    kept = json.loads(path.read_text(encoding="utf-8")) if path and path.exists() else []
    known = {identify(cell): cell for cell in kept}
    missing = [cell for cell in wanted if not is_measured(known.get(identify(cell), {"error": "none yet"}))]
    teachers = sorted({(cell["script"], cell["size"]) for cell in missing})
    with ThreadPoolExecutor(at_once) as pool:
        errors = dict(zip(teachers, pool.map(lambda teacher: prepare_inputs(*teacher, inputs), teachers)))
    for start in range(0, len(missing), at_once):
        cells, failed = missing[start : start + at_once], {}
        for number, cell in enumerate(cells, start + 1):
            name = " ".join(str(cell[axis]) for axis in SETTINGS[:8])
            print(f"{number} of {len(missing)}: {name}", file=sys.stderr, flush=True)
            if error := errors[cell["script"], cell["size"]]:
                failed[identify(cell)] = cell | {"command": command, "error": error}
        known |= failed
        cells = [cell for cell in cells if identify(cell) not in failed]
        for cell, found in zip(cells, measure(cells, inputs, warmup, seconds)):
            known[identify(cell)] = cell | {"command": command} | found
            if path:
                write_json(path, list(known.values()))
    return list(known.values())


def is_measured(found: dict[str, Any]) -> bool:
    """Whether this is a result: numbers, or that the GPU's memory is too small."""
    return found.get("error", FITS_NOT) == FITS_NOT


def prepare_inputs(script: str, size: str, inputs: Path) -> str | None:
    """Write a script's teacher and images in a process of its own: none of its memory stays.

    Returns:
        The last line that it printed, if it failed.
    """
    if not (inputs / f"{script}-{size}-images").exists():
        file = Path(__file__).with_name("random_teachers.py")
        flags = ("--script", script, "--size", size, "--images", str(IMAGES), "--folder", str(inputs))
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        finished = subprocess.run([sys.executable, str(file), *flags], **options)
        if finished.returncode != 0:
            return f"{script}'s teacher: {(finished.stdout.strip() or 'killed').splitlines()[-1]}"


# ---------------------------------------------------------------------------------------------------------- the tables


def make_tables(cells: list[dict[str, Any]]) -> str:
    """A Markdown table per script, and the speed-ups of a cached teacher."""
    text = ""
    parts = *BOUND, LOSS, AVERAGE, WHOLE
    heads = ("cell", *(f"{name}, ms" for name in parts), "step / bound", "images / s", "peak MiB", "first step, s")
    for script in dict.fromkeys(cell["script"] for cell in cells):
        text += f"\n### `train_lift_{script}.py`\n\n"
        text += f"| {' | '.join(heads)} |\n|---|{'--:|' * (len(heads) - 1)}\n"
        for cell in (cell for cell in cells if cell["script"] == script):
            if "error" in cell:
                text += f"| {describe(cell)} | {cell['error']} |{' |' * (len(heads) - 2)}\n"
                continue
            milliseconds = [cell["milliseconds"].get(name) for name in parts]
            row = [describe(cell), *("–" if value is None else f"{value:.1f}" for value in milliseconds)]
            row += [f"{cell['whole / bound']:.3f}", f"{cell['images per second']:.2f}"]
            row += [f"{cell['peak memory MiB']:,.0f}", f"{cell['seconds to the end of the first step']:.0f}"]
            text += f"| {' | '.join(row)} |\n"
    return text + make_speedups(cells)


def describe(cell: dict[str, Any]) -> str:
    """What tells a cell from the others in its table."""
    words = [cell["size"], f"cache {cell['cache']}", f"batch {cell['batch']}"]
    words += [{"no": "fp32"}.get(cell["precision"], cell["precision"])]
    words += ["compiled"] if cell["compile"] == "on" else []
    words += ["8-bit AdamW"] if cell["optimizer"] == "8bit" else []
    return ", ".join(words) + (f", `{cell['flags']}`" if cell["flags"] else "")


def make_speedups(cells: list[dict[str, Any]]) -> str:
    """How much faster a step is with the teacher cached than with it live, everything else being equal."""
    measured = {identify(cell): cell for cell in cells if "error" not in cell}
    text = ""
    for cell in measured.values():
        if cell["cache"] == "teacher":
            live = [measured.get(identify(cell | {"cache": name})) for name in ("none", "latents")]
            own = cell["milliseconds"][WHOLE]
            found = [f"{other['milliseconds'][WHOLE] / own:.2f}" if other else "–" for other in live]
            name = describe(cell).replace(" cache teacher,", "")
            if any(live):
                text += f"| {cell['script']}: {name} | {' | '.join(found)} |\n"
    head = "\n### Speed-up by a cached teacher, compared with\n\n| cell | nothing cached | latents cached |\n"
    return f"{head}|---|--:|--:|\n{text}" if text else ""


def write_markdown(path: Path, cells: list[dict[str, Any]]) -> None:
    """The tables, below what they were made on and by."""
    machines: dict[tuple, dict[str, None]] = {}
    for cell in cells:
        machine = cell["device"], cell["threads"], cell["torch"], cell["steps"]
        machines.setdefault(machine, {})[f"{cell['script']} {cell['size']}"] = None
    text = "# Training steps and their parts\n\nMade by\n\n```bash\n"
    text += "\n".join(dict.fromkeys(cell["command"] for cell in cells)) + "\n```\n\n"
    for (device, threads, version, steps), models in machines.items():
        of = f": {', '.join(models)}" if len(machines) > 1 else ""
        text += f"- {device}, threads: {threads}, torch {version}; medians of {steps} steps, one run{of}.\n"
    if not torch.cuda.is_available():
        text += "- With one thread, times are the process's own on its processor: other work does not count.\n"
    text += "- step / bound: median ratio of a whole step to the sum of its first four parts.\n"
    memory = "allocated on the GPU" if torch.cuda.is_available() else "of the process"
    text += f"- peak: {memory}, up to the last step of the warm-up.\n"
    text += "- first step: seconds that passed from the start of the process to this step's end, with all caching.\n"
    path.write_text(text + make_tables(cells), encoding="utf-8")


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line, or `input_args`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--script", nargs="+", default=["all"], choices=[*SCRIPTS, "all"], help="default: all")
    parser.add_argument("--size", default="small", choices=SIZES, help="of the models (default: small)")
    parser.add_argument("--cache", nargs="+", default=[*CACHES], choices=[*CACHES], help="default: all three")
    parser.add_argument("--batch", nargs="+", type=int, default=[4], help="images per step (default: 4)")
    parser.add_argument("--precision", nargs="+", default=["no"], choices=("no", "bf16", "fp16"), help="default: no")
    parser.add_argument("--compile", nargs="+", default=["off"], choices=("off", "on"), help="default: off")
    parser.add_argument("--optimizer", nargs="+", default=["adamw"], choices=("adamw", "8bit"), help="default: adamw")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of a cell (default: 10)")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them (default: 2)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (default: torch's)")
    parser.add_argument("--side_by_side", type=int, default=1, help="cells that start at once (default: 1)")
    parser.add_argument("--json", type=Path, help="keep the cells in this file, and a table beside it")
    parser.add_argument("--inputs", type=Path, help="keep the teachers and images in this folder (default: nowhere)")
    parser.add_argument("--in_process", help=argparse.SUPPRESS)  # one cell: what `measure` gives its process
    parser.add_argument("flags", nargs="*", help="after --: flags for the training script")
    args = parser.parse_args(input_args)
    for name in ("steps", "warmup", "threads", "side_by_side"):
        if getattr(args, name) < 1:
            fail(f"--{name} {getattr(args, name)} is out of range; pass 1 or more")
    if not 1 <= min(args.batch) <= max(args.batch) <= IMAGES:
        fail(f"--batch {args.batch} is out of range; pass 1 to {IMAGES}, the number of images")
    if "none" in [args.flags[at + 1] for at, flag in enumerate(args.flags[:-1]) if flag == "--kd_loss"]:
        fail("--kd_loss none has no loss to time; pass place, lift or mse")
    return args


def name_command(words: list[str]) -> str:
    """The command as another machine would run it: without the folder of the inputs."""
    at = words.index("--inputs") if "--inputs" in words else len(words)
    return f"python benchmarks/step.py {shlex.join(words[:at] + words[at + 2 :])}".rstrip()


def main(args: argparse.Namespace, command: str) -> None:
    """Measure the grid and print its tables, or in a cell's process that cell alone."""
    if args.in_process:
        options = json.loads(args.in_process)
        output = Path(options["output"])
        found = run_cell(options["cell"], Path(options["inputs"]), output, options["warmup"])
        (output / "measured.json").write_text(json.dumps(found))
        return
    with tempfile.TemporaryDirectory() as folder:
        inputs = args.inputs or Path(folder)
        cells = run_cells(list_cells(args), args.json, inputs, args.warmup, command, args.side_by_side)
    print(make_tables(cells))
    if args.json:
        write_markdown(args.json.with_suffix(".md"), cells)
    failed = [cell for cell in cells if not is_measured(cell)]
    if failed:
        fail(f"{len(failed)} of {len(cells)} cells ended with an error; the same command measures them again")


if __name__ == "__main__":
    main(parse_args(), name_command(sys.argv[1:]))
