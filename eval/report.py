# Copyright 2026 The LIFT and PLACE distillation authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""One HTML page about a teacher and its students: their samples from the same noise, size, speed and quality.

    python eval/report.py --teacher teacher --students student-a student-b --results results.json --output_dir report

writes report/index.html, a page in one file, and report.md, the same as Markdown with PNGs beside it. It shows:

- samples of all models, made as by generate.py with the same flags and defaults; a column per noise;
- a table of size, speed and quality, and two with all figures. Quality is read from the JSON of evaluate.py; latency
  and peak memory are measured here, each model in a process of its own;
- the curves of metrics.jsonl, from the students' folders or from --runs;
- the mean squared difference between student and teacher by timestep, on the same noisy inputs;
- PLACE's error groups: which elements of a prediction are fitted together, from the smallest errors to the largest.

The noisy inputs are made from --images, or from the teacher's samples.
"""

import argparse
import base64
import dataclasses
import html
import json
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils import recursively_apply, send_to_device
from accelerate.utils.memory import clear_device_cache
from diffusers import DDPMScheduler, DiffusionPipeline
from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor
from tqdm.auto import tqdm


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.arguments import HelpFormatter, check_values
from common.costs import profile_forward
from common.errors import fail, first_line
from common.folders import check_writable
from common.full import end_in_one_line
from common.images import open_image
from common.metrics import plot_curves, read_metrics
from common.reporting import labelled_grid
from common.teachers import vae_factor

import generate
from evaluate import label_folders, list_images
from lift_utils import check_group_size
from result_tables import COLUMNS, as_markdown, is_inception, judge, list_remarks, make_tables


# What is alike in all runs: "loss", "kd", "coarse" and "fine" mean something else under every --kd_loss.
CURVES = ("task", "kd_mse", "feat", "grad_norm", "weight", "slope_mean", "intercept_mean")
SMOOTHING = 0.1  # each point of a curve is the mean of the last 10 % of the rows up to it
# By which images of a model were made.
SETTINGS = ("sampler", "num_inference_steps", "guidance_scale", "variant", "dtype", "resolution")
NOISE = -1  # in place of an image's number: seeds the noise of the inputs
FIGURE = {"type": ["number", "null"]}
RESULTS = {  # by JSON Schema: what is read of evaluate.py's JSON
    "type": "object",
    "properties": {
        "extractor": {"type": ["object", "null"], "properties": {"name": {"type": "string"}}, "required": ["name"]},
        "reference": {
            "type": ["object", "null"],
            "properties": {"source": {"type": "string"}, "images": {"type": "integer"}},
            "required": ["source", "images"],
        },
        "rows": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "name": {"type": "string"},
                    "contents": {"type": ["string", "null"]},
                    "remarks": {"type": "array", "items": {"type": "string"}},
                    **{key: FIGURE for key, (_, style, _) in COLUMNS.items() if style},
                },
                "required": ["name", "contents", "remarks"],
            },
        },
    },
    "required": ["extractor", "reference", "rows"],
}


class Inputs(NamedTuple):
    """Noisy inputs at a grid of timesteps, and the model's conditions, all on the CPU."""

    images: list[Image.Image]  # N, without noise
    noisy: torch.Tensor  # float32 (T, N, C, h, w)
    timesteps: torch.Tensor  # (T,)
    conditions: dict[str, Any]  # tensors (N, ...), or dictionaries of such, by the name of the model's argument


@dataclasses.dataclass
class Comparison:
    """What was made with the teacher and the students. The dictionaries have an entry per model, the teacher first."""

    flags: argparse.Namespace  # generate.py's for the teacher
    conditions: list | None  # prompts or class numbers
    labels: dict[str, int]  # class numbers by name; empty if the classes have no names
    kind: tuple  # the teacher's, from `prediction_kind`
    inputs: Inputs
    samples: dict[str, list[Image.Image]] = dataclasses.field(default_factory=dict)
    facts: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)  # size and costs
    predictions: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)  # of comparable models only
    contents: dict[str, str] = dataclasses.field(default_factory=dict)  # hashes of the models' files
    settings: dict[str, list] = dataclasses.field(default_factory=dict)  # of each model: its SETTINGS
    remarks: list[str] = dataclasses.field(default_factory=list)


# ------------------------------------------------------------------------------------------------------- the arguments


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line, or `input_args`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--teacher", required=True, help="pipeline folder or Hub id")
    parser.add_argument("--teacher_revision", help="its branch, tag or commit on the Hub")
    parser.add_argument("--variant", help="its weights variant, e.g. fp16")
    parser.add_argument("--students", required=True, nargs="+", help="pipeline folders or Hub ids of the same kind")
    parser.add_argument("--names", nargs="+", help="names of the students (default: those of their folders)")
    parser.add_argument("--results", type=generate.as_path, help="JSON of evaluate.py that has rows of these models")
    parser.add_argument(
        "--runs", nargs="+", type=generate.as_path, help="folders with a metrics.jsonl (default: the students')"
    )
    parser.add_argument(
        "--images", type=generate.as_path, help="real images for the noisy inputs (default: the teacher's samples)"
    )
    parser.add_argument(
        "--output_dir", type=generate.as_path, default=Path("report"), help="folder for the page and the PNGs"
    )
    parser.add_argument("--columns", type=int, default=8, help="samples of each model, and noisy inputs")
    parser.add_argument("--timesteps", type=int, default=10, help="timesteps at which predictions are compared")
    parser.add_argument("--group_size", type=int, default=16, help="elements per PLACE group")
    parser.add_argument(
        "--latency_images", type=int, default=10, help="images to time, one by one, after one to warm up"
    )
    parser.add_argument(
        "--prompt_file", type=generate.as_path, help="text file with a prompt per line, for text-to-image models"
    )
    parser.add_argument("--classes", nargs="+", help="numbers or names of classes, for class-conditional models")
    parser.add_argument("--sampler", choices=("as_saved", *generate.SAMPLERS), help="(default: the protocol's)")
    parser.add_argument("--num_inference_steps", type=int, help="denoising steps (default: the protocol's)")
    parser.add_argument("--guidance_scale", type=float, help="1 is no guidance (default: the protocol's)")
    parser.add_argument("--dtype", default="float32", choices=tuple(generate.DTYPES), help="dtype of the weights")
    parser.add_argument(
        "--resolution", type=int, help="pixels per side, for text-to-image models (default: the teacher's)"
    )
    parser.add_argument("--max_sequence_length", type=int, help="T5 tokens of Stable Diffusion 3 (default: 256)")
    parser.add_argument("--no_t5", action="store_true", help="Stable Diffusion 3 without its largest text encoder")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise")
    parser.add_argument("--title", help="title of the page (default: the models' names)")
    args = parser.parse_args(input_args)
    check_values(args)
    args.names = args.names or [Path(os.path.abspath(student)).name for student in args.students]
    if len(args.names) != len(args.students) or len({*args.names, "teacher"}) != len(args.names) + 1:
        fail(f"--names {' '.join(args.names)}: pass one for each of --students, all different and none 'teacher'")
    given = args.runs is not None
    if not given:
        runs = zip(args.names, args.students)
        args.runs = {name: Path(folder) for name, folder in runs if (Path(folder) / "metrics.jsonl").exists()}
    else:
        args.runs = dict(zip(label_folders(args.runs, "--runs"), args.runs))
    for run in args.runs.values():
        if not read_run(run, "--runs" if given else "--students") and given:
            fail(f"--runs {run} has no metrics.jsonl with a row in it; pass a training's output folder")
    return args


def read_run(run: Path, flag: str) -> list[dict[str, float]]:
    """The rows of a run's metrics.jsonl. Ends the process if they are damaged.

    Args:
        run: Its folder.
        flag: That the folder comes from, for messages.
    """
    try:
        rows = read_metrics(run / "metrics.jsonl")
        for number, row in enumerate(rows, start=1):
            wrong = [key for key in CURVES if not isinstance(row.get(key), (int, float, NoneType))]
            if wrong:
                raise ValueError(f"row {number} of metrics.jsonl has no number as {wrong[0]}")
    except (OSError, ValueError) as error:
        remedy = "repair it, or pass other --runs"
        fail(f"{flag} {run} has a metrics.jsonl that cannot be read: {first_line(error)}; {remedy}")
    return rows


def flags_of(model: str, args: argparse.Namespace) -> argparse.Namespace:
    """The flags of generate.py for one model."""
    command = ["--model", model, "--output_dir", str(args.output_dir)]
    flags = ("prompt_file", "sampler", "num_inference_steps", "guidance_scale", "dtype", "resolution", "seed")
    for name in (*flags, "max_sequence_length"):
        value = getattr(args, name)
        command += [] if value is None else [f"--{name}", str(value)]
    command += ["--no_t5"] if args.no_t5 else []
    if model == args.teacher:
        of_teacher = {"--revision": args.teacher_revision, "--variant": args.variant}
        command += [word for flag, value in of_teacher.items() if value is not None for word in (flag, value)]
    return generate.parse_args([*command, *(["--classes", *args.classes] if args.classes else [])])


def load_model(
    flags: argparse.Namespace, device: torch.device, count: int, flag: str
) -> tuple[DiffusionPipeline, list | None, tuple, dict | None]:
    """Load a pipeline to the device. That of Stable Diffusion 3 comes without its text encoders, the largest part.

    Args:
        flags: generate.py's, whose defaults are set.
        device: Of the pipeline.
        count: Images; the prompts of so many are encoded.
        flag: That the model comes from, for messages.

    Returns:
        The pipeline, its prompts or class numbers, its [`prediction_kind`], and the encoded prompts: `None` of others.
    """
    pipeline = generate.load_pipeline(flags, torch.device("cpu"), flag)
    if type(pipeline).__name__ not in generate.PROTOCOLS:
        kinds = ", ".join(generate.PROTOCOLS)
        fail(f"{flag} {flags.model} is a {type(pipeline).__name__}; the report takes {kinds}: pass one of them")
    conditions, kind = generate.find_conditions(pipeline, flags), prediction_kind(pipeline)
    encoders, texts = generate.take_text_encoders(pipeline), None
    if encoders:
        prompts = list(dict.fromkeys(conditions[:count]))
        texts = generate.encode_apart(pipeline, encoders, prompts, flags, device, silent=True)
    return pipeline.to(device), conditions, kind, texts


# ------------------------------------------------------------------------------------------------------------ the cost


def flag_of(name: str) -> str:
    """The flag that a model comes from."""
    return "--teacher" if name == "teacher" else "--students"


def measure_cost(name: str, model: str, args: argparse.Namespace, threads: int) -> dict[str, float]:
    """Measure seconds per image, and peak bytes beyond those that the process held before it loaded the model.

    Images are generated one by one. The fastest one counts, because other work of the machine only adds time.

    Args:
        name: Of the model in the report.
        model: Pipeline folder or Hub id.
        args: The flags of the report.
        threads: CPU threads.

    Returns:
        "seconds" and "bytes".
    """
    torch.set_num_threads(threads)
    device = pick_device()
    before = peak_bytes(device)
    flags = flags_of(model, args)
    pipeline, conditions, _, texts = load_model(flags, device, 1 + args.latency_images, flag_of(name))
    if device.type == "cuda":  # else encoders that are gone would count
        torch.cuda.reset_peak_memory_stats(device)
    seconds = []
    for index in range(1 + args.latency_images):
        start = time.perf_counter()
        generate.generate_images(pipeline, [index], conditions, flags, texts)  # returns images, so the device is done
        seconds.append(time.perf_counter() - start)
    return {"seconds": min(seconds[1:]), "bytes": peak_bytes(device) - before}


def peak_bytes(device: torch.device) -> int:
    """The most bytes that this process has held so far, on the GPU or in main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status").read_text()  # getrusage() would include the parent process
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


def pick_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def measure_costs(models: dict[str, str], args: argparse.Namespace) -> dict[str, dict]:
    """Call [`measure_cost`] for each model in a new process, so that the models do not affect each other."""
    costs = {}
    for name, model in tqdm(models.items(), desc="Time and memory"):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            try:
                costs[name] = pool.submit(measure_cost, name, model, args, torch.get_num_threads()).result()
            except BrokenProcessPool:
                why = "its process was killed, perhaps because memory ran out"
                fail(f"{flag_of(name)} {model} could not be measured: {why}")
    return costs


def count_macs(pipeline: DiffusionPipeline, inputs: Inputs) -> int:
    """Multiply-accumulates of one forward pass on one image."""
    model = generate.denoiser(pipeline)
    with torch.device("meta"):
        skeleton = type(model).from_config(model.config)
        noisy = torch.empty_like(inputs.noisy[0, :1], device="meta")
        conditions = recursively_apply(lambda value: torch.empty_like(value[:1], device="meta"), inputs.conditions)
        first = "sample" if hasattr(pipeline, "unet") else "hidden_states"
        return profile_forward(
            skeleton, **{first: noisy}, timestep=torch.zeros(1, dtype=inputs.timesteps.dtype), **conditions
        )[0]


# ----------------------------------------------------------------------------------------------------- the predictions


@torch.no_grad()
def make_inputs(
    pipeline: DiffusionPipeline,
    images: list[Image.Image],
    conditions: list | None,
    texts: dict[str, generate.Text] | None,
    flags: argparse.Namespace,
    count: int,
) -> Inputs:
    """Add noise to images as in the teacher's training, at evenly spaced timesteps.

    Args:
        pipeline: The teacher.
        images: N of them, of the model's size: see [`fit_images`].
        conditions: Prompts or class numbers; image i gets number i, modulo their count. `None` for none.
        texts: The encoded prompts of a Stable Diffusion 3.
        flags: generate.py's, with `seed`.
        count: T, the number of timesteps.
    """
    batch = conditions and [conditions[index % len(conditions)] for index in range(len(images))]
    clean, named = encode(pipeline, images), {}
    device = generate.denoiser(pipeline).device
    generator = generate.seeded(flags.seed, NOISE)
    noise = torch.randn(clean.shape, generator=generator)
    shares = (torch.arange(count) + 0.5) / count
    if hasattr(pipeline, "text_encoder_3"):
        timesteps, sigmas = shares * pipeline.scheduler.config.num_train_timesteps, shares[:, None, None, None, None]
        noisy = (1 - sigmas) * clean + sigmas * noise
        text, pooled = (torch.cat([texts[prompt][item] for prompt in batch]) for item in (0, 1))
        named = {"encoder_hidden_states": text, "pooled_projections": pooled}
    else:
        scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
        timesteps = (shares * scheduler.config.num_train_timesteps).long()
        noisy = torch.stack([scheduler.add_noise(clean, noise, step.expand(len(clean))) for step in timesteps])
        if hasattr(pipeline, "text_encoder_2"):
            text, _, pooled, _ = pipeline.encode_prompt(batch, device=device, do_classifier_free_guidance=False)
            side = clean.shape[-1] * pipeline.vae_scale_factor
            sizes = torch.tensor([[side, side, 0, 0, side, side]]).float().expand(len(batch), -1)
            named = {"encoder_hidden_states": text, "added_cond_kwargs": {"text_embeds": pooled, "time_ids": sizes}}
        elif hasattr(pipeline, "text_encoder"):
            named = {"encoder_hidden_states": pipeline.encode_prompt(batch, device, 1, False)[0]}
        elif batch:
            named = {"class_labels": torch.tensor(batch)}
    return Inputs(images, noisy, timesteps, send_to_device(named, "cpu"))


def fit_images(pipeline: DiffusionPipeline, images: list[Image.Image], flags: argparse.Namespace) -> list[Image.Image]:
    """Images of any size at the size and in the colours of the model."""
    vae, config = getattr(pipeline, "vae", None), generate.denoiser(pipeline).config
    channels = config.in_channels if vae is None else vae.config.in_channels
    factor = 1 if vae is None or flags.resolution else vae_factor(vae)
    sides = flags.resolution or config.sample_size
    height, width = (factor * side for side in ((sides, sides) if isinstance(sides, int) else sides))
    mode = "L" if channels == 1 else "RGB"
    return [image.convert(mode).resize((width, height), Image.Resampling.BICUBIC) for image in images]


def encode(pipeline: DiffusionPipeline, images: list[Image.Image]) -> torch.Tensor:
    """What the model adds noise to: pixels or latents, float32 (N, C, h, w) on the CPU, of images of its size."""
    clean, vae = torch.stack(list(map(pil_to_tensor, images))).float() / 127.5 - 1, getattr(pipeline, "vae", None)
    if vae is None:
        return clean
    latents = vae.encode(clean.to(vae.device, vae.dtype)).latent_dist.mode().float().cpu()
    return (latents - generate.shift_of(pipeline)) * vae.config.scaling_factor


@torch.no_grad()
def predict(pipeline: DiffusionPipeline, inputs: Inputs) -> torch.Tensor:
    """The model's predictions, float32 (T, N, C, h, w) on the CPU, without the variance that a DiT predicts."""
    model = generate.denoiser(pipeline)

    def place(value: torch.Tensor) -> torch.Tensor:
        return value.to(model.device, model.dtype if value.is_floating_point() else None)

    conditions = recursively_apply(place, inputs.conditions)
    predictions = []
    for step, noisy in zip(inputs.timesteps, inputs.noisy):
        steps = step.expand(len(noisy)).to(model.device)
        output = model(noisy.to(model.device, model.dtype), timestep=steps, **conditions).sample
        predictions.append(output[:, : noisy.shape[1]].float().cpu())
    return torch.stack(predictions)


def prediction_kind(pipeline: DiffusionPipeline) -> tuple:
    """The properties that two models must share for their predictions to be compared; the first is their class.

    They predict the same quantity, of the same inputs and conditions.
    """
    config, kind = generate.denoiser(pipeline).config, type(pipeline).__name__.replace("DDIM", "DDPM")
    side = None if hasattr(pipeline, "text_encoder") else config.sample_size
    conditions = ("num_embeds_ada_norm", "cross_attention_dim", "joint_attention_dim", "pooled_projection_dim")
    predicts = pipeline.scheduler.config.get("prediction_type")
    with_t5 = getattr(pipeline, "text_encoder_3", None) is not None
    return kind, predicts, config.in_channels, side, with_t5, *(config.get(key) for key in conditions)


def error_groups(student: torch.Tensor, teacher: torch.Tensor, group_size: int) -> torch.Tensor:
    """The number of the PLACE group that each element belongs to. Group 0 has the smallest errors.

    Args:
        student: Prediction (C, h, w).
        teacher: Prediction of the same shape.
        group_size: Elements per group.

    Returns:
        Integers (C, h, w).
    """
    errors = (student - teacher).square().flatten(1)
    order = errors.sort(dim=-1, stable=True).indices  # as lift_place_loss sorts them
    ranks = torch.empty_like(order).scatter_(1, order, torch.arange(order.shape[1]).expand_as(order))
    return (ranks // group_size).view(student.shape)


# -------------------------------------------------------------------------------------------------------- the pictures


def plot_groups(predictions: dict[str, torch.Tensor], inputs: Inputs, group_size: int) -> Image.Image:
    """A row per student: the first image, its noisy version, and a colour map of the groups of each channel.

    The timestep is the middle one.
    """
    middle = len(inputs.timesteps) // 2
    noisy, teacher = inputs.noisy[middle, 0], predictions["teacher"][middle, 0]
    shown = ((noisy[:3].mean(0) / 4 + 0.5).clamp(0, 1) * 255).byte().numpy()
    rows = []
    for name, prediction in predictions.items():
        if name == "teacher":
            continue
        groups = error_groups(prediction[middle, 0], teacher, group_size)[:4]
        colours = colormaps["viridis"](groups / max(1, groups.max().item()))[..., :3]
        maps = [Image.fromarray((colour * 255).astype("uint8")) for colour in colours]
        rows.append((name, [inputs.images[0], Image.fromarray(shown), *maps]))
    columns = ["image", f"noisy, t = {inputs.timesteps[middle]:.0f}"]
    columns += [f"channel {channel}" for channel in range(len(rows[0][1]) - 2)]
    return labelled_grid(rows, scale=scale_of(inputs.images[0], 128), columns=columns)


def scale_of(image: Image.Image, side: int) -> int:
    """The factor that enlarges a small image to about this width."""
    return max(1, side // image.width)


def plot_errors(predictions: dict[str, torch.Tensor], inputs: Inputs, path: Path) -> dict[str, list[float]]:
    """Plot the mean squared difference to the teacher by timestep to a PNG; returns the values by student."""
    errors = {
        name: (prediction - predictions["teacher"]).square().mean(dim=(1, 2, 3, 4)).tolist()
        for name, prediction in predictions.items()
        if name != "teacher"
    }
    figure = Figure(figsize=(8.4, 3.4), layout="constrained")
    axis = figure.subplots()
    for index, (name, values) in enumerate(errors.items()):
        axis.semilogy(inputs.timesteps.tolist(), values, label=name, color=f"C{index}", marker=".", linewidth=1)
    axis.set_xlabel("timestep (noise to the right)")
    axis.set_ylabel("mean squared difference")
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=9)
    figure.savefig(path, dpi=120)
    return errors


def smooth(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    """Rows of a metrics.jsonl with the values of curves averaged over the last rows, see `SMOOTHING`."""
    smoothed = [{key: row[key] for key in ("step", "max_grad_norm") if key in row} for row in rows]
    ends = np.arange(1, len(rows) + 1)
    starts = ends - np.maximum(1, np.round(SMOOTHING * ends).astype(int))
    for key in CURVES:
        values = np.array([np.nan if row.get(key) is None else row[key] for row in rows])
        finite = np.isfinite(values)
        sums, counts = (np.cumsum([0, *column]) for column in (np.where(finite, values, 0), finite))
        for row, total, count in zip(smoothed, sums[ends] - sums[starts], counts[ends] - counts[starts]):
            row |= {key: total / count} if count else {}
    return smoothed


# ------------------------------------------------------------------------------------------------------------ the page


def read_results(path: Path) -> dict:
    """Read the JSON of evaluate.py."""
    try:
        return generate.read_json(path, RESULTS)
    except (OSError, ValueError) as error:
        fail(f"--results {path} cannot be read: {first_line(error)}; pass a JSON file of evaluate.py")


def find_rows(results: dict, comparison: Comparison, path: Path) -> dict[str, dict]:
    """The rows of results by name, first those of images without a model, then those of the models.

    A model's row is found by the hash of its files. Of several it is that of most images that were made as those of
    the report; a single one may be of others, which a remark then says. Ends the process if there is no row of these
    models, or none that is meant.

    Args:
        results: From [`read_results`].
        comparison: Of the models.
        path: Of the results, for the message.
    """
    found = {}
    for name, digest in comparison.contents.items():
        rows = [row for row in results["rows"] if row["contents"] == digest]
        same = [row for row in rows if [row.get(setting) for setting in SETTINGS] == comparison.settings[name]]
        if len(rows) > 1 and not same:
            names = ", ".join(row["name"] for row in rows)
            remedy = "pass the flags of one, such as --sampler and --dtype, or results with one of them"
            fail(f"--results {path} has several rows of {name}, {names}, and none is made as here; {remedy}")
        if rows and not same:
            made = ", ".join(f"{setting} {rows[0].get(setting)}" for setting in SETTINGS)
            remarks = [*rows[0]["remarks"], f"all quality: of images by {made}, unlike those shown here"]
            found[name] = {**rows[0], "remarks": remarks}
        elif rows:
            found[name] = max(same, key=lambda row: row.get("images", 0))
    if not found:
        fail(f"--results {path} has no row of these models; measure images that generate.py made with them")
    return {row["name"]: row for row in results["rows"] if row["contents"] is None} | found


def as_html(table: list[list[str]]) -> str:
    """A table in HTML, which scrolls sideways on a narrow screen."""
    lines = [
        "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>"
        for tag, row in zip(["th"] + ["td"] * len(table), table)
    ]
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222;
  background: #fff; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2em; }
table { border-collapse: collapse; margin: 1em 0; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { padding: .35em .6em; border-bottom: 1px solid #ddd; text-align: right; }
th { vertical-align: bottom; } td { white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
.wide { overflow-x: auto; } img { max-width: 100%; height: auto; } li, p { max-width: 46em; }
"""


class Section(NamedTuple):
    """A part of the page, in the order in which it is shown."""

    heading: str
    pictures: list[Path]
    tables: list[list[list[str]]]
    remarks: list[str]


def make_page(title: str, sections: list[Section]) -> str:
    """The report as an HTML page in one file."""
    body = [f"<h1>{html.escape(title)}</h1>"]
    for section in sections:
        heading = html.escape(section.heading)
        body.append(f"<section><h2>{heading}</h2>")
        for path in section.pictures:
            data = base64.b64encode(path.read_bytes()).decode()
            body.append(f'<div class="wide"><img alt="{heading}" src="data:image/png;base64,{data}"></div>')
        body += [as_html(table) for table in section.tables]
        remarks = "".join(f"<li>{html.escape(remark)}</li>" for remark in section.remarks)
        body.append(f"<ul>{remarks}</ul></section>" if remarks else "</section>")
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    head += f"<title>{html.escape(title)}</title><style>{STYLE}</style>"
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>{"".join(body)}</body></html>\n'


def make_markdown(title: str, sections: list[Section]) -> str:
    """The report in Markdown, for a README or a model card. The pictures are files beside it."""
    parts = [f"# {title}"]
    for section in sections:
        parts.append(f"## {section.heading}")
        parts += [f"![{section.heading}]({path.name})" for path in section.pictures]
        parts += [as_markdown(table) for table in section.tables]
        parts += ["\n".join(f"- {remark}" for remark in section.remarks)] if section.remarks else []
    return "\n\n".join(parts) + "\n"


# ------------------------------------------------------------------------------------------------------------- the run


def compare_models(models: dict[str, str], args: argparse.Namespace) -> Comparison:
    """Load the models one after the other, the teacher first; collect samples, size and predictions of each.

    Sets `resolution` in `args`, so that the students' images are as large as the teacher's.
    """
    comparison = None
    for name, model in tqdm(models.items(), desc="Samples and predictions"):
        flags = flags_of(model, args)
        pipeline, conditions, kind, texts = load_model(flags, pick_device(), args.columns, flag_of(name))
        samples = generate.generate_images(pipeline, list(range(args.columns)), conditions, flags, texts)
        if comparison is None:
            images = fit_images(pipeline, real_images(args) or samples, flags)
            inputs = make_inputs(pipeline, images, conditions, texts, flags, args.timesteps)
            comparison = Comparison(flags, conditions, getattr(pipeline, "labels", {}), kind, inputs)
            args.resolution = flags.resolution
            try:
                check_group_size(args.group_size, inputs.noisy[0, 0, 0].numel())
            except ValueError as error:
                fail(f"--group_size {args.group_size}: {error}")
        if kind[0] != comparison.kind[0]:
            fail(f"--students {model} is a {type(pipeline).__name__}, unlike the teacher; pass models of one kind")
        inputs = comparison.inputs
        if kind == comparison.kind:
            comparison.predictions[name] = predict(pipeline, inputs)
        else:
            other = "does not predict the same quantity of the same inputs as the teacher"
            comparison.remarks.append(f"{name} {other} and is not shown.")
            images = fit_images(pipeline, inputs.images[:1], flags)
            inputs = make_inputs(pipeline, images, conditions, texts, flags, 1)
        comparison.samples[name] = samples
        comparison.facts[name] = {
            "parameters": generate.denoiser(pipeline).num_parameters(),
            "macs": count_macs(pipeline, inputs),
        }
        comparison.contents[name] = generate.digest_model(flags)
        comparison.settings[name] = [getattr(flags, setting) for setting in SETTINGS]
        del pipeline
        clear_device_cache(garbage_collection=True)
    return comparison


def real_images(args: argparse.Namespace) -> list[Image.Image]:
    """Images of `--images`, RGB, evenly spaced over the folder, one per column; none without the flag."""
    files, images = list_images(args.images, "--images") if args.images else [], []
    count = min(args.columns, len(files))
    for path in (files[index * len(files) // count] for index in range(count)):
        try:
            images.append(open_image({"path": str(path), "bytes": None}, "RGB"))
        except Exception:  # decoders raise many kinds of errors on damaged files
            fail(f"--images {args.images}: {path} cannot be read; repair or remove it")
    return images


def label_columns(comparison: Comparison, columns: int) -> list[str] | None:
    """The prompt or the class of each column of the samples."""
    conditions = comparison.conditions
    if conditions is None:
        return None
    entries = [conditions[index % len(conditions)] for index in range(columns)]
    if all(isinstance(entry, int) for entry in entries):
        names = {number: name for name, number in reversed(comparison.labels.items())}  # the first of its synonyms
        return [names.get(entry, f"class {entry}") for entry in entries]
    return entries


def make_pictures(comparison: Comparison, args: argparse.Namespace) -> tuple[dict[str, list[Path]], dict]:
    """Write the PNGs.

    Returns:
        Their paths by kind, an empty list where there is nothing to show; and the students' errors by timestep.
    """
    predictions, folder = comparison.predictions, args.output_dir
    rows = list(comparison.samples.items())
    scale = scale_of(rows[0][1][0], 96)
    labelled_grid(rows, scale, label_columns(comparison, args.columns)).save(folder / "samples.png")
    pictures, errors = {"samples": [folder / "samples.png"], "curves": [], "errors": [], "groups": []}, {}
    runs = {name: smooth(read_metrics(run / "metrics.jsonl")) for name, run in args.runs.items()}
    keys = [key for key in CURVES if any(key in row for logged in runs.values() for row in logged)]
    if keys:
        pictures["curves"] = [folder / "curves.png"]
        plot_curves(runs, keys, folder / "curves.png")
    if len(predictions) > 1:
        pictures |= {"errors": [folder / "errors.png"], "groups": [folder / "groups.png"]}
        errors = plot_errors(predictions, comparison.inputs, folder / "errors.png")
        plot_groups(predictions, comparison.inputs, args.group_size).save(folder / "groups.png")
    return pictures, errors


def make_sections(
    comparison: Comparison,
    pictures: dict[str, list[Path]],
    rows: dict[str, dict],
    results: dict | None,
    args: argparse.Namespace,
) -> list[Section]:
    """The contents of the page.

    Args:
        comparison: From [`compare_models`], its facts with costs.
        pictures: From [`make_pictures`].
        rows: From [`find_rows`]; empty without results.
        results: From [`read_results`].
        args: The flags.
    """
    flags, conditions, device = comparison.flags, comparison.conditions, pick_device()
    settings = f"{flags.sampler}, {flags.num_inference_steps} steps"
    settings += f", guidance {flags.guidance_scale}" if flags.guidance_scale is not None else ""
    samples = [f"Samples: a column per noise; seed {args.seed}, {settings}, {args.dtype}."]
    if args.prompt_file:
        samples += [f"Prompt {number}: {prompt}" for number, prompt in enumerate(conditions[: args.columns], 1)]

    summary, *figures = make_tables(comparison.facts, rows, results is not None and is_inception(results))
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)"
    measured = (
        f"Time and memory: {where}, {args.dtype}. Whole images, one by one ({settings}), each model in a process "
    )
    measured += (
        f"of its own; the fastest of {args.latency_images} after one to warm up. Memory is the peak beyond what "
    )
    measured += "the process held before it loaded the model."
    if comparison.kind[0] == "StableDiffusion3Pipeline":
        measured += " Both without the text encoders; on a CPU, memory is with them."

    training = ["No curves: no folder of --runs or --students has a metrics.jsonl."]
    if pictures["curves"]:
        training = [f"Each point is the mean of the last {SMOOTHING:.0%} of the rows that the run has logged so far."]
    origin = f"images of {args.images}" if args.images else "the teacher's samples"
    errors = [f"Student and teacher get the same noisy inputs, made from {origin}.", *comparison.remarks]
    if args.images and conditions:
        whose = "prompts" if args.prompt_file else "classes"
        errors.append(f"The images have the {whose} of the samples, which may not be their own.")
    groups = (
        f"Each channel's {comparison.inputs.noisy[0, 0, 0].numel()} elements, sorted by squared error and cut into "
    )
    groups += f"groups of {args.group_size}. Dark: the group of the smallest errors; yellow: that of the largest."
    return [
        Section(
            "Teacher and students",
            pictures["samples"],
            [summary],
            [*judge(comparison.facts, rows)[1], *quality_notes(rows, results), *samples],
        ),
        Section("All figures", [], [table for table in figures if table], [measured]),
        Section("Training", pictures["curves"], [], training),
        Section("Error by timestep", pictures["errors"], [], errors),
        Section("PLACE's error groups", pictures["groups"], [], [groups] if pictures["groups"] else []),
    ]


def quality_notes(rows: dict[str, dict], results: dict | None) -> list[str]:
    """How the distances were measured, and remarks on the rows."""
    if results is None:
        return ["No quality: pass the JSON of evaluate.py as --results."]
    reference, extractor, notes = results["reference"], results["extractor"], []
    if reference is not None:
        count = f"{reference['images']:,} images" if reference["images"] else "published statistics"
        features = f", in features of {extractor['name']}" if extractor is not None else ""
        notes.append(f"Distances: to {count} ({reference['source']}){features}.")
    if not is_inception(results):
        notes.append("They are not Inception FID: do not compare them with published figures.")
    return notes + list_remarks(rows)


MEMORY = "--columns {columns} does not fit the GPU: {error}; lower it, or pass --dtype bfloat16"
DISK = "--output_dir {output_dir}: {error} ({free:,} bytes are free); make room"


@partial(end_in_one_line, memory=MEMORY, disk=DISK)
def main(args: argparse.Namespace) -> None:
    """Measure the models and write the report."""
    models = {"teacher": args.teacher, **dict(zip(args.names, args.students))}
    check_writable(f"--output_dir {args.output_dir}", args.output_dir)
    results = read_results(args.results) if args.results else None
    comparison = compare_models(models, args)
    rows = find_rows(results, comparison, args.results) if results is not None else {}
    for name, cost in measure_costs(models, args).items():
        comparison.facts[name] |= cost
    args.output_dir.mkdir(parents=True, exist_ok=True)
    pictures, errors = make_pictures(comparison, args)
    sections = make_sections(comparison, pictures, rows, results, args)
    title = args.title or f"{', '.join(args.names)} against {Path(os.path.abspath(args.teacher)).name}"
    (args.output_dir / "index.html").write_text(make_page(title, sections), encoding="utf-8")
    (args.output_dir / "report.md").write_text(make_markdown(title, sections), encoding="utf-8")
    timesteps = comparison.inputs.timesteps.tolist()
    summary = {"facts": comparison.facts, "timesteps": timesteps, "errors": errors}
    (args.output_dir / "report.json").write_text(json.dumps(summary, indent=2))
    print(f"{args.output_dir / 'index.html'}", flush=True)


if __name__ == "__main__":
    main(parse_args())
