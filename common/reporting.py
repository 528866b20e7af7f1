# Copyright 2026 The LIFT and PLACE distillation authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""What does a run show: metrics, curves and grids of samples?"""

import json
import math
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common.arguments import fail, first_line
from common.training import averaged_weights, trained_parameters

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from diffusers.training_utils import EMAModel
from PIL import Image, ImageDraw, ImageFont
from tqdm.auto import tqdm


SHOWN = ("loss", "coarse", "fine", "weight")  # beside the progress bar
UNLOGGED = ("teacher_finite",)


def grid_path(output_dir: Path, step: int) -> Path:
    """Where the sample grid of a step is kept."""
    return output_dir / "samples" / f"step-{step:06d}.png"


def gather_logs(accelerator: Accelerator, tensors: dict[str, torch.Tensor]) -> dict[str, float]:
    """Scalar tensors of this step, averaged over the processes, in a single read from the device."""
    values = accelerator.reduce(torch.stack([tensor.detach().float() for tensor in tensors.values()]), "mean")
    return dict(zip(tensors, values.tolist()))


class MetricsLog:
    """Where the steps of a run are logged: metrics.jsonl, the trackers and the progress bar.

    Args:
        output_dir: Of the metrics.jsonl. A resumed run continues it after `first_step`; later sample grids go too.
        accelerator: Its trackers are initialised here.
        flags: What the trackers show as the settings of the run.
        steps: Of the whole run.
        first_step: Steps done before.
        images: That a process takes in a step.
    """

    def __init__(
        self,
        output_dir: Path,
        accelerator: Accelerator,
        flags: dict[str, Any],
        steps: int,
        first_step: int,
        images: int,
    ):
        self.path, self.accelerator = output_dir / "metrics.jsonl", accelerator
        self.images_per_step = images * accelerator.num_processes
        if accelerator.is_main_process:
            rewind_metrics(self.path, first_step)
            for path in (output_dir / "samples").glob("step-*.png"):
                if path > grid_path(output_dir, first_step):
                    path.unlink()
            accelerator.init_trackers("lift", flags)
        hidden = not accelerator.is_local_main_process
        self.progress_bar = tqdm(total=steps, initial=first_step, desc="Steps", disable=hidden)
        self.since = time.perf_counter(), first_step

    def write(self, step: int, tensors: dict[str, torch.Tensor], learning_rate: float) -> dict[str, float]:
        """Log a step's values, with the images per second since the last one; returns the values of [`gather_logs`].

        Args:
            tensors: Scalars of this process. Those in [`UNLOGGED`] are for the run itself.
        """
        gathered = gather_logs(self.accelerator, tensors)
        values = {name: value for name, value in gathered.items() if name not in UNLOGGED} | {"lr": learning_rate}
        then, last_step = self.since
        self.since = time.perf_counter(), step
        values["images_per_second"] = (step - last_step) * self.images_per_step / (self.since[0] - then)
        self.progress_bar.set_postfix({key: f"{values[key]:.3g}" for key in SHOWN if key in values})
        if self.accelerator.is_main_process:
            append_metrics(self.path, {"step": step, **values})
            self.accelerator.log(values, step=step)
        return gathered


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
    """One small plot per metric over the steps, up to four in a row, one line per run, to a PNG."""
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
        axis.set_title(key)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    if len(runs) > 1:
        figure.legend(lines.values(), lines.keys(), loc="outside right upper", fontsize=9)
    figure.savefig(path, dpi=120)


def sample_models(
    sample: Callable[[torch.nn.Module], list[Image.Image]],
    teacher: torch.nn.Module | None,
    student: torch.nn.Module,
    ema: EMAModel | None,
    teacher_samples: list[Image.Image],
) -> dict[str, list[Image.Image]]:
    """Samples of the teacher, the student and the student with averaged weights, by the names that a grid shows.

    Args:
        sample: From a model to its samples, the same noise for every model.
        teacher_samples: Empty at first. It keeps the teacher's samples, which do not change, between calls.
    """
    if teacher is not None and not teacher_samples:
        teacher_samples += sample(teacher)
    samples = {"teacher": teacher_samples} if teacher is not None else {}
    samples["student"] = sample(student)
    if ema is not None:
        with averaged_weights(ema, trained_parameters(student)):
            samples["EMA student"] = sample(student)
    return samples


def sample_grid(samples: dict[str, list[Image.Image]], labels: list[str]) -> Image.Image:
    """A column per model, a row per prompt or class, from what [`sample_models`] returns."""
    rows = [(label, [images[row] for images in samples.values()]) for row, label in enumerate(labels)]
    return labelled_grid(rows, scale=max(1, 64 // rows[0][1][0].width), columns=list(samples))


def labelled_grid(
    rows: list[tuple[str, list[Image.Image]]], scale: int = 1, columns: list[str] | None = None
) -> Image.Image:
    """One row of equally large PIL images per label, on white, with the labels at the left.

    Args:
        rows: A label and its images each. Long labels are broken into lines.
        scale: Whole factor by which small images are enlarged.
        columns: Labels above the columns. Those wider than an image are broken into lines, three at most.
    """
    font, line = ImageFont.load_default(14), 18
    labels = [textwrap.fill(label, 28, max_lines=6, placeholder=" …") for label, _ in rows]
    width, height = (side * scale for side in rows[0][1][0].size)
    heights = [max(height, line * (label.count("\n") + 1)) + 4 for label in labels]
    margin = 12 + max(int(font.getlength(part)) for label in labels for part in label.split("\n"))
    titles = [textwrap.fill(label, max(12, width // 7), max_lines=3, placeholder=" …") for label in columns or []]
    parts = [part for title in titles for part in title.split("\n")]
    step = max([width, *(int(font.getlength(part)) + 6 for part in parts)]) + 2
    top = 6 + line * max(title.count("\n") + 1 for title in titles) if titles else 0
    grid = Image.new("RGB", (margin + max(len(images) for _, images in rows) * step, top + sum(heights)), "white")
    draw = ImageDraw.Draw(grid)
    for column, title in enumerate(titles):
        place = (margin + column * step + width // 2, top // 2)
        draw.text(place, title, fill="black", font=font, anchor="mm", align="center")
    for label, (_, images), row_height in zip(labels, rows, heights):
        draw.text((6, top + row_height // 2), label, fill="black", font=font, anchor="lm")
        for column, image in enumerate(images):
            enlarged = image.convert("RGB").resize((width, height), Image.Resampling.NEAREST)
            grid.paste(enlarged, (margin + column * step, top + 2))
        top += row_height
    return grid


def save_grid(grid: Image.Image, output_dir: Path, step: int, trackers: list[GeneralTracker]) -> None:
    """Keep a grid of samples as samples/step-<step>.png and as samples.png, and show it in the trackers."""
    path = grid_path(output_dir, step)
    path.parent.mkdir(exist_ok=True)
    for each in (path, output_dir / "samples.png"):
        temporary = each.with_suffix(".tmp")
        grid.save(temporary, format="png")
        temporary.replace(each)
    for tracker in trackers:
        if tracker.name in ("tensorboard", "wandb"):
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"samples": np.array(grid)[None]}, step=step, **layout)


def plot_influence(influence: list[float], kept: list[int], path: Path) -> None:
    """The influence of each block as a bar, those that the student keeps in another colour, to a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(4, 0.3 * len(influence)), 2.8), layout="constrained")
    axis = figure.subplots()
    for label, chosen, colour in (("kept", True, "C0"), ("dropped", False, "0.8")):
        blocks = [block for block in range(len(influence)) if (block in kept) == chosen]
        axis.bar(blocks, [influence[block] for block in blocks], color=colour, label=label)
    axis.set_xlabel("block of the teacher")
    axis.set_ylabel("1 - cosine(input, output)")
    axis.legend(fontsize=7)
    figure.savefig(path, dpi=120)
