# Copyright 2026 The LIFT and PLACE distillation authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""What is logged of a run's steps, and how is it read and plotted?"""

import json
import math
import time
from pathlib import Path
from typing import Any

from common.changes import keep_flags
from common.errors import fail, first_line
from common.train_state import RunningMeans

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from tqdm.auto import tqdm


logger = get_logger(__name__)

SHOWN = ("loss", "task", "kd", "feat")  # beside the progress bar: the loss and its terms
UNLOGGED = ("teacher_finite",)
TIMED_STEPS = 20  # after which the time of the whole run is said


def mean_over_processes(
    micro_steps: list[dict[str, torch.Tensor]], accelerator: Accelerator
) -> dict[str, torch.Tensor]:
    """Each logged scalar, averaged over the micro-batches of a step and over the processes; it stays on the device."""
    values = torch.stack([torch.stack([value.float() for value in parts.values()]) for parts in micro_steps]).mean(0)
    return dict(zip(micro_steps[0], accelerator.reduce(values, "mean").unbind()))


class MetricsLog:
    """Where the steps of a run are logged: metrics.jsonl, the trackers and the progress bar.

    Args:
        output_dir: Of the metrics.jsonl. A resumed run continues it after `first_step`; later sample grids go too.
        accelerator: Its trackers are initialised here.
        flags: What the trackers show as the settings of the run.
        steps: Of the whole run.
        first_step: Steps done before.
        images: That a process takes in a step.
        means: Of what the steps log.
    """

    def __init__(
        self,
        output_dir: Path,
        accelerator: Accelerator,
        flags: dict[str, Any],
        steps: int,
        first_step: int,
        images: int,
        means: RunningMeans,
    ):
        self.path, self.accelerator, self.means = output_dir / "metrics.jsonl", accelerator, means
        self.images_per_step = images * accelerator.num_processes
        if accelerator.is_main_process:
            flags = {**flags, "num_processes": accelerator.num_processes}
            rewind_metrics(self.path, first_step)
            # One that has no step left learns nothing by them.
            if first_step < steps and (changes := keep_flags(output_dir, flags, first_step)):
                logger.warning(f"the run goes on with other flags, {changes}; its card will say so")
            for path in (output_dir / "samples").glob("step-*.png"):
                step = path.stem.removeprefix("step-")
                if step.isdecimal() and int(step) > first_step:
                    path.unlink()
            undone = {"tensorboard": {"purge_step": first_step + 1}}  # what a killed run has logged since
            accelerator.init_trackers("lift", flags, init_kwargs=undone)
        hidden = not accelerator.is_local_main_process
        self.progress_bar = tqdm(total=steps, initial=first_step, desc="Steps", disable=hidden)
        self.first_step, self.max_grad_norm = first_step, flags["max_grad_norm"]
        self.since = self.start = time.perf_counter(), first_step

    def add(self, values: dict[str, torch.Tensor]) -> None:
        """Count a step's values in, and after a few steps say how long the run will take.

        Args:
            values: Scalars, equal on all processes.
        """
        self.means.add(values)
        self.progress_bar.update()
        steps = self.progress_bar.n - self.first_step
        if steps == 1:  # the first one sets up kernels and workers
            self.start = time.perf_counter(), self.progress_bar.n
        elif steps == 1 + TIMED_STEPS:
            seconds = (time.perf_counter() - self.start[0]) / TIMED_STEPS
            left = tqdm.format_interval(seconds * (self.progress_bar.total - self.progress_bar.n))
            self.progress_bar.write(
                f"a step takes {seconds:.2f} s: {left} to go, and the time of checkpoints and grids"
            )

    def write(self, step: int, skipped: torch.Tensor, learning_rate: float) -> dict[str, float]:
        """Log the means since the last row, with the images per second; returns the means.

        Args:
            skipped: See [`common.training.guarded_step`].
        """
        means = self.means.read()
        means["skipped"], means["skipped_in_a_row"] = skipped.tolist()
        values = {name: value for name, value in means.items() if name not in UNLOGGED}
        values |= {"lr": learning_rate, "max_grad_norm": self.max_grad_norm}
        then, last_step = self.since
        self.since = time.perf_counter(), step
        values["images_per_second"] = (step - last_step) * self.images_per_step / (self.since[0] - then)
        self.progress_bar.set_postfix({key: f"{values[key]:.3g}" for key in SHOWN if key in values})
        if self.accelerator.is_main_process:
            append_metrics(self.path, {"step": step, **values})
            self.accelerator.log(values, step=step)
        return means


def append_metrics(path: Path, row: dict[str, float]) -> None:
    """Add a row to a metrics.jsonl. JSON has no NaN: what is not finite becomes null."""
    with path.open("a") as file:
        file.write(json.dumps({key: value if math.isfinite(value) else None for key, value in row.items()}) + "\n")


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of a metrics.jsonl, without a last line that a kill cut short.

    Raises:
        ValueError: Another line is no row, or the file no text.
    """
    try:
        rows, lines = [], path.read_text().splitlines() if path.exists() else []
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name} is no text") from error
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
        elif row is not None or number < len(lines):
            raise ValueError(f"line {number} of {path.name} is no row of a run")
    return rows


def rewind_metrics(path: Path, step: int) -> None:
    """Drop the rows after `step`, so that a resumed run continues the file without duplicate steps."""
    try:
        rows = [row for row in read_metrics(path) if row["step"] <= step]
    except ValueError as error:
        fail(f"--output_dir {path.parent}: {first_line(error)}; move that file away, or pass a new folder")
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
    temporary.replace(path)


def plot_curves(runs: dict[str, list[dict[str, float]]], keys: list[str], path: Path) -> None:
    """One small plot per metric over the steps, up to four in a row, one line per run, to a PNG.

    A gradient norm has a dotted line at the norm to which it is clipped.
    """
    from matplotlib.figure import Figure

    columns = min(4, len(keys))
    rows = -(-len(keys) // columns)
    figure = Figure(figsize=(3.2 * columns, 2.6 * rows + 0.2), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis in axes[len(keys) :]:
        axis.axis("off")
    lines = {}
    for axis, key in zip(axes, keys):
        for index, (name, logged) in enumerate(runs.items()):
            points = [(row["step"], row[key]) for row in logged if row.get(key) is not None]
            if points:
                marker = "." if len(points) < 2 else None
                (lines[name],) = axis.plot(*zip(*points), color=f"C{index}", linewidth=1, marker=marker)
                if key == "grad_norm":
                    axis.axhline(logged[-1].get("max_grad_norm", math.nan), color=f"C{index}", linestyle=":")
        axis.set_title(key)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    if len(runs) > 1:
        figure.legend(lines.values(), lines.keys(), loc="outside right upper", fontsize=9)
    figure.savefig(path, dpi=120)
