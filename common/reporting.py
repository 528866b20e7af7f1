# Copyright 2026 The LIFT and PLACE distillation authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""What does a run show of its samples, and of the blocks that it has chosen?"""

import math
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

from common.costs import dtype_of
from common.training import averaged_weights, trained_parameters

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.tracking import GeneralTracker
from accelerate.utils import gather_object
from diffusers.training_utils import EMAModel
from PIL import Image, ImageDraw, ImageFont


def grid_path(output_dir: Path, step: int) -> Path:
    """Where the sample grid of a step is kept."""
    return output_dir / "samples" / f"step-{step:06d}.png"


def sample_models(
    sample: Callable[[torch.nn.Module], list[Image.Image]],
    teacher: torch.nn.Module | None,
    student: torch.nn.Module,
    ema: EMAModel | None,
    teacher_samples: list[Image.Image],
) -> dict[str, list[Image.Image]]:
    """Samples of the teacher, the student and the student with averaged weights, by the names that a grid shows.

    Args:
        sample: From a model in eval mode to its samples, the same noise for every model.
        teacher: `None` where there is none any more: its samples are those that it has left.
        teacher_samples: Empty at first. It keeps the teacher's samples, which do not change, between calls.
    """
    if teacher is not None and not teacher_samples:
        teacher_samples += sample(teacher)
    samples, training = {"teacher": teacher_samples} if teacher_samples else {}, student.training
    try:  # a run may go on without samples
        samples["student"] = sample(student.eval())
        if ema is not None and ema.optimization_step:  # before the first step they are the student's
            with averaged_weights(ema, trained_parameters(student)):
                samples["EMA student"] = sample(student)
    finally:
        student.train(training)
    return samples


@contextmanager
def autocast_of(model: torch.nn.Module, accelerator: Accelerator) -> Iterator[None]:
    """The run's autocast, but for a teacher in the other half precision, with which that fails: it casts by itself.

    The model's predictions come in float32, because samplers keep their latents in the dtype of the prediction.
    """

    def widen(module: torch.nn.Module, inputs: tuple, outputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return outputs[0].float(), *outputs[1:]

    other = {torch.float16, torch.bfloat16} - {dtype_of(accelerator.mixed_precision)}
    hook = model.register_forward_hook(widen)
    try:
        with nullcontext() if model.dtype in other else accelerator.autocast():
            yield
    finally:
        hook.remove()


def share_of(count: int, accelerator: Accelerator) -> list[int]:
    """Which of the samples this process draws. All draw equally many: the last one may be drawn more than once."""
    each = math.ceil(count / accelerator.num_processes)
    first = each * accelerator.process_index
    return [min(sample, count - 1) for sample in range(first, first + each)]


def gather_samples(samples: list[Image.Image], count: int) -> list[Image.Image]:
    """All samples, on all processes, from those that each has drawn as [`share_of`] says."""
    return gather_object(samples)[:count]


def log_validation(
    teacher: torch.nn.Module | None,
    student: torch.nn.Module,
    ema: EMAModel | None,
    teacher_samples: list[Image.Image],
    sample: partial,
    load_vae: Callable[[], torch.nn.Module] | None,
    labels: list[str] | None,
    output_dir: Path,
    accelerator: Accelerator,
    step: int,
) -> None:
    """Samples of teacher, student and EMA student from the same noise, in one labelled grid.

    Args:
        teacher_samples: Keeps the teacher's samples between calls.
        sample: A script's `sample_images` with all but the model and the VAE.
        load_vae: Loads the VAE, which is freed when this returns; `None` for models of pixels.
        labels: The prompts or classes, a row each, with a column per model; without them a model is a row.
    """
    if load_vae is not None:
        sample = partial(sample, vae=load_vae().to(accelerator.device))
    samples = sample_models(sample, teacher, student, ema, teacher_samples)
    rows, columns = list(samples.items()), None
    if labels is not None:
        rows = [(label, [images[row] for images in samples.values()]) for row, label in enumerate(labels)]
        columns = list(samples)
    grid = labelled_grid(rows, scale=max(1, 64 // rows[0][1][0].width), columns=columns)
    save_grid(grid, output_dir, step, accelerator.trackers)


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
    """Keep a grid of samples as samples.png and as samples/step-<step>.png, and show it in the trackers.

    All processes may call this: the main one does it.
    """
    if not PartialState().is_main_process:
        return
    path, temporary = grid_path(output_dir, step), output_dir / "samples.tmp"
    path.parent.mkdir(exist_ok=True)
    # The step's own file comes last: where it is, a resumed run draws no grid for this step.
    for each in (output_dir / "samples.png", path):
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
