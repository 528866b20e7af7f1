# Copyright 2026 The LIFT and PLACE distillation authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""One HTML page about a teacher and its students: what they draw from the same noise, what they cost, how they learned
and where they still differ.

    python eval/report.py --teacher teacher --students student-a student-b --results results.json --output_dir report

writes report/index.html, which holds its pictures and needs no other file, and the same as report.md with PNGs:

- samples: one noise per column, through generate.py's functions, with its flags and its defaults;
- a table of quality, from the JSON of evaluate.py, against parameters, multiply-accumulates, latency and peak memory,
  which are measured here, each model in a process of its own;
- the curves of metrics.jsonl, from the students' folders or from --runs;
- the mean squared difference between teacher and student by timestep, on the same noisy inputs;
- PLACE's error groups: which elements of a prediction it fits together, from the least wrong to the most.

The noisy inputs are made of --images, or else of the teacher's own samples.
"""

import argparse
import base64
import gc
import html
import json
import multiprocessing
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import DDPMScheduler
from PIL import Image


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import generate
import lift_utils
from evaluate import format_cell, list_images, list_remarks, title_of
from lift_utils import fail


CURVES = ("loss", "task", "kd", "coarse", "fine", "weight", "slope_mean", "intercept_mean")
SMOOTHING = 0.1  # of a run's logged rows: each point of a curve is the mean of the last so many
NOISE = -1  # stands for the number of the image whose generator draws the noise of the inputs
# Of the quality columns, those that a row of evaluate.py may have.
QUALITY = ("images", "fid", "kid", "inception_score", "precision", "recall", "clip_score")


class Inputs(NamedTuple):
    """Noisy inputs at a grid of timesteps, and what the model is conditioned on; all of them on the CPU."""

    images: list[Image.Image]  # the clean ones
    noisy: torch.Tensor  # float32 (T, N, C, h, w)
    timesteps: torch.Tensor  # (T,)
    conditions: dict[str, torch.Tensor]  # by the names of the model's arguments, (N, ...)


# ------------------------------------------------------------------------------------------------------- the arguments


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line, or `input_args`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=lift_utils.HelpFormatter)
    parser.add_argument("--teacher", required=True, help="pipeline folder or Hub id")
    parser.add_argument("--students", required=True, nargs="+", help="pipeline folders or Hub ids of the same kind")
    parser.add_argument("--names", nargs="+", help="of the students (default: their folders')")
    parser.add_argument("--results", type=Path, help="JSON of evaluate.py; its rows are found by the models' contents")
    parser.add_argument("--runs", nargs="+", type=Path, help="folders with metrics.jsonl (default: the students')")
    parser.add_argument("--images", type=Path, help="real images for the noisy inputs (default: teacher's samples)")
    parser.add_argument("--output_dir", type=Path, default=Path("report"), help="where the page and the PNGs go")
    parser.add_argument("--columns", type=int, default=8, help="samples of each model, and images of the noisy inputs")
    parser.add_argument("--timesteps", type=int, default=10, help="points of the error by timestep")
    parser.add_argument("--group_size", type=int, default=16, help="elements per PLACE group")
    parser.add_argument("--latency_images", type=int, default=10, help="single images to time, after one to warm up")
    parser.add_argument("--prompt_file", type=Path, help="a prompt per line, for text-to-image models")
    parser.add_argument("--classes", nargs="+", help="numbers or names of classes, for class-conditional models")
    parser.add_argument("--sampler", choices=("as_saved", *generate.SAMPLERS), help="default: the protocol's")
    parser.add_argument("--num_inference_steps", type=int, help="default: the protocol's")
    parser.add_argument("--guidance_scale", type=float, help="default: the protocol's; 1 is none")
    parser.add_argument("--dtype", default="float32", choices=tuple(generate.DTYPES), help="of the weights")
    parser.add_argument("--resolution", type=int, help="side that a text-to-image model draws (default: its own)")
    parser.add_argument("--max_sequence_length", type=int, help="T5 tokens of Stable Diffusion 3 (default: 256)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("--title", help="of the page (default: the models' names)")
    args = parser.parse_args(input_args)
    for name in ("columns", "timesteps", "latency_images"):
        if getattr(args, name) < 1:
            fail(f"--{name} {getattr(args, name)} is too small; pass at least 1")
    args.names = args.names or [Path(student).name for student in args.students]
    if len(args.names) != len(args.students) or len({*args.names, "teacher"}) != len(args.names) + 1:
        fail(f"--names {' '.join(args.names)} must be one for each of --students, all different and none 'teacher'")
    if args.runs is None:
        runs = zip(args.names, args.students)
        args.runs = {name: Path(folder) for name, folder in runs if (Path(folder) / "metrics.jsonl").exists()}
    else:
        args.runs = {run.resolve().name: run for run in args.runs}
        for run in args.runs.values():
            if not lift_utils.read_metrics(run / "metrics.jsonl"):
                fail(f"--runs {run} has no metrics.jsonl with a row in it; pass a training's output folder")
    return args


def flags_of(model: str, args: argparse.Namespace) -> argparse.Namespace:
    """generate.py's flags for one model."""
    command = ["--model", model, "--output_dir", str(args.output_dir)]
    flags = ("prompt_file", "sampler", "num_inference_steps", "guidance_scale", "dtype", "resolution", "seed")
    for name in (*flags, "max_sequence_length"):
        value = getattr(args, name)
        command += [] if value is None else [f"--{name}", str(value)]
    return generate.parse_args([*command, *(["--classes", *args.classes] if args.classes else [])])


# ------------------------------------------------------------------------------------------------------------ the cost


def measure_cost(model: str, args: argparse.Namespace, threads: int) -> dict[str, float]:
    """Seconds per image, drawn one by one, and peak bytes beyond what the process held before the model was loaded.

    The fastest image counts: whatever else the machine does only adds to the time.
    """
    torch.set_num_threads(threads)
    device = pick_device()
    before = peak_bytes(device)
    flags = flags_of(model, args)
    pipeline = generate.load_pipeline(flags, device)
    conditions = generate.find_conditions(pipeline, flags)
    seconds = []
    for index in range(1 + args.latency_images):
        start = time.perf_counter()
        generate.draw_images(pipeline, [index], conditions, flags)  # ends in images, so nothing is left to wait for
        seconds.append(time.perf_counter() - start)
    return {"seconds": min(seconds[1:]), "bytes": peak_bytes(device) - before}


def peak_bytes(device: torch.device) -> int:
    """The most that this process has held so far: on the GPU, or resident in memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status").read_text()  # getrusage() would inherit the peak of the parent process
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


def pick_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def measure_costs(models: dict[str, str], args: argparse.Namespace) -> dict[str, dict]:
    """[`measure_cost`] of each model in a new process, so that none profits or suffers from another."""
    costs = {}
    for name, model in models.items():
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            try:
                costs[name] = pool.submit(measure_cost, model, args, torch.get_num_threads()).result()
            except BrokenProcessPool:
                fail(f"{model} could not be measured: its process was killed, for want of memory perhaps")
    return costs


def count_macs(pipeline, inputs: Inputs) -> int:
    """Multiply-accumulates of one forward pass on one image."""
    model = generate.denoiser(pipeline)
    with torch.device("meta"):
        skeleton = type(model).from_config(model.config)
        noisy = torch.empty_like(inputs.noisy[0, :1], device="meta")
        conditions = {name: torch.empty_like(value[:1], device="meta") for name, value in inputs.conditions.items()}
        first = "sample" if hasattr(pipeline, "unet") else "hidden_states"
        return lift_utils.profile_forward(
            skeleton, **{first: noisy}, timestep=torch.zeros(1, dtype=inputs.timesteps.dtype), **conditions
        )[0]


# ----------------------------------------------------------------------------------------------------- the predictions


@torch.no_grad()
def make_inputs(
    pipeline, images: list[Image.Image], conditions: list | None, flags: argparse.Namespace, count: int
) -> Inputs:
    """Noisy inputs of the teacher's kind at `count` timesteps, evenly spread.

    Args:
        conditions: Prompts or class numbers; image i gets the i-th, over and over.
    """
    given = conditions and [conditions[index % len(conditions)] for index in range(len(images))]
    clean, named = encode(pipeline, images, flags), {}
    device = generate.denoiser(pipeline).device
    generator = generate.seeded(flags.seed, NOISE)
    noise = torch.randn(clean.shape, generator=generator)
    shares = (torch.arange(count) + 0.5) / count
    if hasattr(pipeline, "text_encoder_3"):
        timesteps, sigmas = shares * pipeline.scheduler.config.num_train_timesteps, shares[:, None, None, None, None]
        noisy = (1 - sigmas) * clean + sigmas * noise
        length = flags.max_sequence_length
        options = {"do_classifier_free_guidance": False, "max_sequence_length": length}
        text = pipeline.encode_prompt(given, None, None, device, **options)
        named = {"encoder_hidden_states": text[0], "pooled_projections": text[2]}
    else:
        scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
        timesteps = (shares * scheduler.config.num_train_timesteps).long()
        noisy = torch.stack([scheduler.add_noise(clean, noise, step.expand(len(clean))) for step in timesteps])
        if hasattr(pipeline, "text_encoder"):
            named = {"encoder_hidden_states": pipeline.encode_prompt(given, device, 1, False)[0]}
        elif given:
            named = {"class_labels": torch.tensor(given)}
    return Inputs(images, noisy, timesteps, {name: value.cpu() for name, value in named.items()})


def encode(pipeline, images: list[Image.Image], flags: argparse.Namespace) -> torch.Tensor:
    """Images, brought to the model's size, as what it adds noise to: float32 (N, C, h, w) on the CPU."""
    from torchvision.transforms.v2.functional import pil_to_tensor

    vae, config = getattr(pipeline, "vae", None), generate.denoiser(pipeline).config
    channels = config.in_channels if vae is None else vae.config.in_channels
    side = flags.resolution or config.sample_size * (lift_utils.vae_factor(vae) if vae else 1)
    mode = "L" if channels == 1 else "RGB"
    pixels = [pil_to_tensor(image.convert(mode).resize((side, side), Image.Resampling.BICUBIC)) for image in images]
    clean = torch.stack(pixels).float() / 127.5 - 1
    if vae is None:
        return clean
    latents = vae.encode(clean.to(vae.device, vae.dtype)).latent_dist.mode().float().cpu()
    return (latents - (vae.config.get("shift_factor") or 0)) * vae.config.scaling_factor


@torch.no_grad()
def predict(pipeline, inputs: Inputs) -> torch.Tensor:
    """The model's predictions on the inputs, float32 (T, N, C, h, w) on the CPU; without the variance of a DiT."""
    model = generate.denoiser(pipeline)
    conditions = {
        name: value.to(model.device, model.dtype if value.is_floating_point() else None)
        for name, value in inputs.conditions.items()
    }
    found = []
    for step, noisy in zip(inputs.timesteps, inputs.noisy):
        steps = step.expand(len(noisy)).to(model.device)
        output = model(noisy.to(model.device, model.dtype), timestep=steps, **conditions).sample
        found.append(output[:, : noisy.shape[1]].float().cpu())
    return torch.stack(found)


def prediction_kind(pipeline) -> tuple:
    """What must be equal for two models' predictions to be compared."""
    config, kind = generate.denoiser(pipeline).config, type(pipeline).__name__.replace("DDIM", "DDPM")
    side = None if hasattr(pipeline, "text_encoder") else config.sample_size
    return kind, pipeline.scheduler.config.get("prediction_type"), config.in_channels, side


def error_groups(student: torch.Tensor, teacher: torch.Tensor, group_size: int) -> torch.Tensor:
    """Which of PLACE's groups each element belongs to, 0 for that of the smallest errors.

    Args:
        student: Predictions (C, h, w), as `teacher`.

    Returns:
        Integers (C, h, w).
    """
    errors = (student - teacher).square().flatten(1)
    order = errors.sort(dim=-1, stable=True).indices  # as lift_place_loss sorts them
    ranks = torch.empty_like(order).scatter_(1, order, torch.arange(order.shape[1]).expand_as(order))
    return (ranks // group_size).view(student.shape)


# -------------------------------------------------------------------------------------------------------- the pictures


def draw_groups(predictions: dict[str, torch.Tensor], inputs: Inputs, group_size: int) -> Image.Image:
    """The image, its noisy version, and the groups of each channel as a colour map; a row per student.

    At the middle timestep of the grid, on the first image.
    """
    from matplotlib import colormaps

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
    return lift_utils.labelled_grid(rows, scale=scale_of(inputs.images[0], 128), columns=columns)


def scale_of(image: Image.Image, side: int) -> int:
    """The factor that brings a small image to about this side."""
    return max(1, side // image.width)


def plot_errors(predictions: dict[str, torch.Tensor], inputs: Inputs, path: Path) -> dict[str, list[float]]:
    """Mean squared difference to the teacher by timestep, to a PNG; returns the values."""
    from matplotlib.figure import Figure

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
    """The rows of a metrics.jsonl, each value the mean of the last few rows that have it."""
    window, smoothed = round(SMOOTHING * len(rows)) or 1, []
    for end in range(1, len(rows) + 1):
        recent = rows[max(0, end - window) : end]
        held = {key: [row[key] for row in recent if row.get(key) is not None] for key in rows[end - 1]}
        means = {key: statistics.mean(values) for key, values in held.items() if values}
        smoothed.append(means | {"step": rows[end - 1]["step"]})
    return smoothed


# ------------------------------------------------------------------------------------------------------------ the page


def read_quality(path: Path | None, contents: dict[str, str]) -> tuple[dict[str, dict], list[str], bool]:
    """Rows of evaluate.py's results, remarks, and whether the features are Inception's.

    The rows are each model's, by its name here, after those of images that no model drew, by their folder's.
    """
    if path is None:
        return {}, ["No quality: pass the JSON of evaluate.py as --results."], True
    try:
        results = json.loads(path.read_text())
        rows = {row["contents"]: row for row in results["rows"]}
        real = {row["name"]: row for row in results["rows"] if row["contents"] is None}
        extractor, reference = results["extractor"]["name"], results["reference"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        fail(f"--results {path} cannot be read: {lift_utils.reason(error)}; pass a JSON file of evaluate.py")
    found = {name: rows[digest] for name, digest in contents.items() if digest in rows}
    if not found:
        fail(f"--results {path} has no row of these models; measure images that generate.py drew from them")
    found = real | found
    notes = [f"Quality: features by {extractor}, against {reference['source']}, {reference['images']:,} images."]
    inception = extractor.startswith("Inception")
    notes += [] if inception else ["The distance is no Inception FID and compares with no published figure."]
    return found, notes + list_remarks(found), inception


def make_table(facts: dict[str, dict], quality: dict[str, dict], inception: bool) -> list[list[str]]:
    """A head and a row per model, after those of images that no model drew."""
    keys = [key for key in QUALITY if any(row.get(key) is not None for row in quality.values())]
    titles = [title_of(key, inception) for key in keys]
    rows = [["", *titles, "parameters", "share", "GMACs per pass", "latency per image", "peak memory"]]
    for name in [*(name for name in quality if name not in facts), *facts]:
        cells = [name, *(format_cell(key, quality.get(name, {}).get(key)) for key in keys)]
        if name in facts:
            fact = facts[name]
            cells += [f"{fact['parameters']:,}", f"{fact['parameters'] / facts['teacher']['parameters']:.1%}"]
            cells += [f"{fact['macs'] / 1e9:.4g}", f"{fact['seconds']:.3g} s", f"{fact['bytes'] / 2**20:,.0f} MiB"]
        rows.append(cells + ["–"] * (len(rows[0]) - len(cells)))
    return rows


def as_html(rows: list[list[str]]) -> str:
    lines = [
        "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>"
        for tag, row in zip(["th"] + ["td"] * len(rows), rows)
    ]
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


def as_markdown(rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---|" + "--:|" * (len(rows[0]) - 1), *lines[1:]])


STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222;
  background: #fff; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2em; }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { padding: .35em .6em; border-bottom: 1px solid #ddd; text-align: right; }
th { vertical-align: bottom; } td { white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
.wide { overflow-x: auto; } img { max-width: 100%; height: auto; } li, p { max-width: 46em; }
"""


class Section(NamedTuple):
    """A part of the page."""

    heading: str
    table: list[list[str]]
    remarks: list[str]
    pictures: list[Path]


def make_page(title: str, sections: list[Section]) -> str:
    """A self-contained page."""
    body = [f"<h1>{html.escape(title)}</h1>"]
    for section in sections:
        heading = html.escape(section.heading)
        body.append(f"<section><h2>{heading}</h2>{as_html(section.table) if section.table else ''}")
        for path in section.pictures:
            data = base64.b64encode(path.read_bytes()).decode()
            body.append(f'<div class="wide"><img alt="{heading}" src="data:image/png;base64,{data}"></div>')
        remarks = "".join(f"<li>{html.escape(remark)}</li>" for remark in section.remarks)
        body.append(f"<ul>{remarks}</ul></section>")
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    head += f"<title>{html.escape(title)}</title><style>{STYLE}</style>"
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>{"".join(body)}</body></html>\n'


def make_markdown(title: str, sections: list[Section]) -> str:
    """The same for a README or a model card, beside the pictures."""
    parts = [f"# {title}"]
    for section in sections:
        parts.append(f"## {section.heading}")
        parts += [as_markdown(section.table)] if section.table else []
        parts += [f"![{section.heading}]({path.name})" for path in section.pictures]
        parts += ["\n".join(f"- {remark}" for remark in section.remarks)] if section.remarks else []
    return "\n\n".join(parts) + "\n"


# ------------------------------------------------------------------------------------------------------------- the run


def look_at_models(models: dict[str, str], args: argparse.Namespace) -> dict[str, Any]:
    """Samples, facts and predictions of each model, which are loaded one after the other, the teacher first."""
    found: dict[str, Any] = {"samples": {}, "facts": {}, "predictions": {}, "contents": {}, "remarks": []}
    for name, model in models.items():
        flags = flags_of(model, args)
        pipeline = generate.load_pipeline(flags, pick_device())
        conditions = generate.find_conditions(pipeline, flags)
        images = generate.draw_images(pipeline, list(range(args.columns)), conditions, flags)
        if name == "teacher":
            real = [lift_utils.open_image({"path": str(path), "bytes": None}, "RGB") for path in real_images(args)]
            inputs = make_inputs(pipeline, real or images, conditions, flags, args.timesteps)
            args.resolution = flags.resolution  # the students draw as large as the teacher
            found |= {"inputs": inputs, "kind": prediction_kind(pipeline), "conditions": conditions, "flags": flags}
            found["labels"] = getattr(pipeline, "labels", {})
            try:
                lift_utils.check_group_size(args.group_size, inputs.noisy[0, 0, 0].numel())
            except ValueError as error:
                fail(f"--group_size {args.group_size}: {error}")
        elif prediction_kind(pipeline)[0] != found["kind"][0]:
            fail(f"--students {model} is a {type(pipeline).__name__}, unlike the teacher; pass models of one kind")
        if prediction_kind(pipeline) == found["kind"]:
            found["predictions"][name] = predict(pipeline, found["inputs"])
        else:
            found["remarks"].append(f"{name} predicts something else than the teacher: left out.")
        found["samples"][name] = images
        found["facts"][name] = {
            "parameters": generate.denoiser(pipeline).num_parameters(),
            "macs": count_macs(pipeline, found["inputs"]),
        }
        found["contents"][name] = generate.digest_model(flags)
        del pipeline
        gc.collect()
        torch.cuda.empty_cache()
    return found


def real_images(args: argparse.Namespace) -> list[Path]:
    """As many images of `--images` as there are columns, from all over the folder; none without the flag."""
    files = list_images(args.images, "--images") if args.images else []
    return files[:: max(1, len(files) // args.columns)][: args.columns]


def label_columns(found: dict, args: argparse.Namespace) -> list[str] | None:
    """What the columns of the samples are conditioned on."""
    conditions = found["conditions"]
    if conditions is None:
        return None
    given = [conditions[index % len(conditions)] for index in range(args.columns)]
    if all(isinstance(entry, int) for entry in given):
        names = {number: name for name, number in reversed(found["labels"].items())}  # the first of its synonyms
        return [names.get(entry, f"class {entry}") for entry in given]
    return given


def draw_pictures(found: dict, args: argparse.Namespace) -> tuple[dict[str, list[Path]], dict]:
    """The PNGs by their kind, none where there is nothing to draw, and the students' errors by timestep."""
    predictions, folder = found["predictions"], args.output_dir
    rows = list(found["samples"].items())
    scale = scale_of(rows[0][1][0], 96)
    lift_utils.labelled_grid(rows, scale, label_columns(found, args)).save(folder / "samples.png")
    pictures, errors = {"samples": [folder / "samples.png"], "curves": [], "errors": [], "groups": []}, {}
    runs = {name: smooth(lift_utils.read_metrics(run / "metrics.jsonl")) for name, run in args.runs.items()}
    keys = [key for key in CURVES if any(key in row for logged in runs.values() for row in logged)]
    if keys:
        pictures["curves"] = [folder / "curves.png"]
        lift_utils.plot_curves(runs, keys, folder / "curves.png")
    if len(predictions) > 1:
        pictures |= {"errors": [folder / "errors.png"], "groups": [folder / "groups.png"]}
        errors = plot_errors(predictions, found["inputs"], folder / "errors.png")
        draw_groups(predictions, found["inputs"], args.group_size).save(folder / "groups.png")
    return pictures, errors


def make_sections(found: dict, pictures: dict[str, list[Path]], args: argparse.Namespace) -> list[Section]:
    """What the page says."""
    flags, conditions, device = found["flags"], found["conditions"], pick_device()
    settings = f"{flags.sampler}, {flags.num_inference_steps} steps"
    settings += f", guidance {flags.guidance_scale}" if flags.guidance_scale is not None else ""
    samples = [f"Seed {args.seed}, {settings}, {args.dtype}; a column per noise."]
    if args.prompt_file:
        samples += [f"Prompt {number}: {prompt}" for number, prompt in enumerate(conditions[: args.columns], 1)]

    quality, notes, inception = found["quality"]
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)"
    cost = f"Latency and memory: {where}, {args.dtype}, whole images one by one ({settings}), the fastest of "
    cost += f"{args.latency_images} after one to warm up, in a process of its own; "
    cost += "memory beyond what it held before loading."

    training = ["No curves: no folder of --runs or --students has a metrics.jsonl."]
    if pictures["curves"]:
        training = [f"Each point is the mean of the last {SMOOTHING:.0%} of the run's logged rows."]
    origin = f"images of {args.images}" if args.images else "the teacher's samples"
    errors = [f"Student against teacher on the same noisy inputs of {origin}.", *found["remarks"]]
    groups = f"Each channel's {found['inputs'].noisy[0, 0, 0].numel()} elements, sorted by squared error and cut into "
    groups += f"groups of {args.group_size}: dark is the group of the smallest errors, yellow that of the largest."
    return [
        Section("Samples", [], samples, pictures["samples"]),
        Section("Quality and cost", make_table(found["facts"], quality, inception), [*notes, cost], []),
        Section("Training", [], training, pictures["curves"]),
        Section("Error by timestep", [], errors, pictures["errors"]),
        Section("PLACE's error groups", [], [groups] if pictures["groups"] else [], pictures["groups"]),
    ]


def main(args: argparse.Namespace) -> None:
    """Measure, draw, write the page."""
    models = {"teacher": args.teacher, **dict(zip(args.names, args.students))}
    for model in models.values():  # before minutes are spent
        flags_of(model, args)
    try:
        args.output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"--output_dir {args.output_dir} cannot be written to: {error.strerror}; pass another folder")
    found = look_at_models(models, args)
    found["quality"] = read_quality(args.results, found["contents"])
    for name, cost in measure_costs(models, args).items():
        found["facts"][name] |= cost
    pictures, errors = draw_pictures(found, args)
    sections = make_sections(found, pictures, args)
    title = args.title or f"{', '.join(args.names)} against {Path(args.teacher).name}"
    (args.output_dir / "index.html").write_text(make_page(title, sections), encoding="utf-8")
    (args.output_dir / "report.md").write_text(make_markdown(title, sections), encoding="utf-8")
    summary = {"facts": found["facts"], "timesteps": found["inputs"].timesteps.tolist(), "errors": errors}
    (args.output_dir / "report.json").write_text(json.dumps(summary, indent=2))
    print(f"{args.output_dir / 'index.html'}", flush=True)


if __name__ == "__main__":
    main(parse_args())
