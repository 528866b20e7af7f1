# Copyright 2026 The LIFT and PLACE distillation authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Does the sampler decide which loss helps? The students of an experiment of evidence.py, sampled in other ways.

    python benchmarks/samplers.py --folder evidence

The folder is that of evidence.py, with the students in it. Stopped, it goes on with the students that are left.

A sample is called noise if its neighbouring pixels differ more, for its contrast, than those of all but one in a
thousand photographs.
"""

import argparse
import json
import multiprocessing
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, SchedulerMixin, UNet2DModel
from tqdm import tqdm


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "eval"))

from common.errors import fail

from evidence import EXPERIMENTS, SHOWN, draw_strips, list_runs, tune
from figures import frechet_distance
from seeds import cell, interval
from study import ROOT, SCALES, Run, Study, moments_of, run_of, sample, set_environment


SAMPLES = 1000
LATER = 900  # the first timestep of DDIM by 10 steps
TEACHER = "the teacher"
LEADS = "place", "place, rms", "rms"  # rows that the others are compared with


class LaterStart(DDIMScheduler):
    """DDIM that takes its noise for an image of timestep 900: as many steps as of 1,000, less those before."""

    def set_timesteps(self, num_inference_steps: int, device: torch.device | None = None) -> None:
        super().set_timesteps(num_inference_steps, device)
        self.timesteps = self.timesteps[self.timesteps <= LATER]


class Sampler(NamedTuple):
    """A way from noise to an image.

    By default Diffusers' DDIM clips the image that it expects to [-1, 1], and keeps the noise that it expects: the two
    do not add up any more to what it has. DDIM as published does not clip.
    """

    kind: type[SchedulerMixin]
    steps: int
    spacing: str = "leading"
    clip_sample: bool = True

    def make(self, schedule: DDPMScheduler) -> SchedulerMixin:
        changes = {"timestep_spacing": self.spacing, "clip_sample": self.clip_sample}
        return self.kind.from_config(schedule.config, **changes)


PUBLISHED = "DDIM, 100 from 990, not clipped"  # the paper's
SAMPLERS = {
    PUBLISHED: Sampler(DDIMScheduler, 100, clip_sample=False),
    "DDIM, 50 from 980": Sampler(DDIMScheduler, 50),
    "DDIM, 46 from 900": Sampler(LaterStart, 50),
    "DDIM, 10 from 999": Sampler(DDIMScheduler, 10, "trailing"),
    "DDIM, 10 from 900": Sampler(DDIMScheduler, 10),
    "DDPM, 50 from 980": Sampler(DDPMScheduler, 50),
}
PICTURED = PUBLISHED, "DDPM, 50 from 980"  # the first by which all rows are measured


def roughness(images: torch.Tensor) -> torch.Tensor:
    """The mean absolute difference of neighbouring pixels, in standard deviations of the image: (N,) of (N, 1, H, W).

    Of white noise it is 2 / √π, or 1.13.
    """
    across, down = images.diff(dim=-1).abs(), images.diff(dim=-2).abs()
    contrast = images.flatten(1).std(1).clamp_min(1e-6)
    return (across.flatten(1).mean(1) + down.flatten(1).mean(1)) / 2 / contrast


def load(folder: Path, name: str) -> tuple[UNet2DModel, SchedulerMixin]:
    """A pipeline's model, and one of [`SAMPLERS`] with its noise schedule."""
    pipeline = DDPMPipeline.from_pretrained(folder)
    return pipeline.unet.eval(), SAMPLERS[name].make(pipeline.scheduler)


@torch.no_grad()
def measure(folder: Path, study: Path, name: str) -> dict[str, float]:
    """The Fréchet distance of a pipeline's samples to photographs, and the share of them that is noise.

    Args:
        folder: Of the pipeline.
        study: Of the photographs and their classifier.
        name: One of [`SAMPLERS`].
    """
    torch.set_num_threads(1)
    classifier = torch.jit.load(str(study / "classifier.pt")).eval()
    unseen = torch.from_numpy(np.load(study / "unseen.npy")).float().unsqueeze(1)
    images = sample(*load(folder, name), SAMPLERS[name].steps, SAMPLES)
    moments = [moments_of(classifier(pixels)[0].numpy()) for pixels in (images, unseen)]
    noisy = roughness(images) > roughness(unseen).quantile(0.999)
    return {"distance": frechet_distance(*moments[0], *moments[1]), "noise": noisy.float().mean().item()}


def find_students(experiment: str, study: Study) -> Iterator[tuple[Run, Path]]:
    """The runs of an experiment that are finished, and their folders."""
    lines = study.finished()
    tuned = tune(experiment, EXPERIMENTS[experiment](), lines)
    if tuned is None:
        fail(f"--experiment {experiment} is not finished; run benchmarks/evidence.py --only {experiment}")
    for run in list_runs(experiment, tuned):
        yield run, study.folder_of(run_of(lines[run.key])) if run.key in lines else study.folder_of(run)


def is_there(folder: Path) -> bool:
    """Whether the folder has a whole pipeline."""
    return (folder / "model_index.json").exists()


def measure_all(
    models: dict[tuple[str, int], Path], study: Study, results: Path, jobs: int, samplers: list[str]
) -> list[dict[str, Any]]:
    """A line for each model by each sampler, `jobs` side by side; those of the file are kept.

    Args:
        models: Folders by name and seed.
        samplers: Names of [`SAMPLERS`].
    """
    lines = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    done = {(line["name"], line["seed"], line["sampler"]) for line in lines}
    left = [(*model, name) for model in models for name in samplers if (*model, name) not in done]
    absent = {(row, name) for row, seed, name in left if not is_there(models[row, seed])}
    if not lines and len(absent) == len({(row, name) for row, _, name in left}):
        fail("--folder has no row with all its students; run the experiment by benchmarks/evidence.py there")
    for row, name in sorted(absent):  # a row is measured in all of its seeds, or not at all
        print(f"{row}, {name}: left out, not all its students are in --folder; run benchmarks/evidence.py there")
    left = [(row, seed, name) for row, seed, name in left if (row, name) not in absent]
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool, results.open("a") as file:
        waiting = {}
        for name, seed, sampler in left:
            job = pool.submit(measure, models[name, seed], study.folder, sampler)
            waiting[job] = {"name": name, "seed": seed, "sampler": sampler}
        for job in tqdm(as_completed(waiting), total=len(left), desc="Sampling"):
            lines.append({**waiting[job], **job.result()})
            file.write(json.dumps(lines[-1]) + "\n")
            file.flush()
    return lines


def choose_picture(experiment: str, lines: list[dict[str, Any]]) -> str:
    """The sampler of the picture: of [`PICTURED`] the first by which all rows are measured."""
    measured = {(line["name"], line["sampler"]) for line in lines}
    rows = [*EXPERIMENTS[experiment]().rows, TEACHER]
    return next((name for name in PICTURED if all((row, name) in measured for row in rows)), PICTURED[-1])


def describe(experiment: str, lines: list[dict[str, Any]]) -> str:
    """The lines as Markdown: means ± standard errors over the seeds, and differences of equal seeds.

    Of a row whose students were gone when a sampler came to those that are measured, it has none.
    """
    lines = sorted(lines, key=lambda line: line["seed"])
    samplers = [name for name in SAMPLERS if any(line["sampler"] == name for line in lines)]

    def values(row: str, sampler: str, what: str = "distance") -> list[float]:
        return [line[what] for line in lines if (line["name"], line["sampler"]) == (row, sampler)]

    def mean_of(row: str, sampler: str) -> str:
        found = values(row, sampler)
        return cell(found) if found else "–"

    def share_of(row: str, sampler: str) -> str:
        found = [100 * share for share in values(row, sampler, "noise")]
        return cell(found, 0) if found else "–"

    def lead_of(lead: str, row: str, sampler: str) -> str:
        pair = values(lead, sampler), values(row, sampler)
        return interval(*pair) if all(pair) else "–"

    def table(rows: list[str], say: Callable[[str, str], str]) -> str:
        head = f"| | {' | '.join(samplers)} |\n|---|{'--:|' * len(samplers)}\n"
        return head + "".join(f"| {row} | {' | '.join(say(row, name) for name in samplers)} |\n" for row in rows)

    students = list(EXPERIMENTS[experiment]().rows)
    distances, noise = (table([*students, TEACHER], say) for say in (mean_of, share_of))
    text = ""
    for lead in [row for row in LEADS if row in students]:
        leads = table([row for row in students if row != lead], partial(lead_of, lead))
        text += f"\nThe distance of `{lead}` less that of others:\n\n{leads}"
    return (
        f"# Other samplers\n\nThe students of `{experiment}`, {SAMPLES:,} samples each, by `benchmarks/samplers.py`: "
        "steps, and the timestep of the first. Fréchet distances:\n\n"
        f"{distances}\nThe share of samples that is noise, in per cent:\n\n{noise}{text}"
        f"\n![Samples of the first seed, {choose_picture(experiment, lines)}](samplers-{experiment}.png)\n"
    )


@torch.no_grad()
def draw(models: dict[tuple[str, int], Path], study: Study, path: Path, sampler: str) -> None:
    """Samples of each row's first seed by one of [`SAMPLERS`], from the same noise, above unseen images.

    Where one of them was trained on another machine, the picture stays as it is.
    """
    first: dict[str, Path] = {}
    for (name, _), folder in models.items():
        first.setdefault(name, folder)
    if all(map(is_there, first.values())):
        steps = SAMPLERS[sampler].steps
        strips = {name: sample(*load(folder, sampler), steps, SHOWN)[:, 0] for name, folder in first.items()}
        draw_strips(strips, study, path)


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line, or `input_args`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choices = tuple(name for name, make in EXPERIMENTS.items() if "place" in make().rows)
    parser.add_argument("--experiment", default="tiny-tuned", choices=choices, help="(default: tiny-tuned)")
    how = {"nargs": "+", "default": list(SAMPLERS), "choices": tuple(SAMPLERS), "metavar": "SAMPLER"}
    parser.add_argument("--samplers", **how, help=f"of {'; '.join(SAMPLERS)} (default: all)")
    parser.add_argument("--folder", type=Path, default=Path("evidence"), help="that of evidence.py")
    results = ROOT / "benchmarks" / "results" / "evidence"
    parser.add_argument("--results", type=Path, default=results, help="of the lines and the page")
    parser.add_argument("--jobs", type=int, default=2, help="students side by side, a CPU thread each (default: 2)")
    args = parser.parse_args(input_args)
    if args.jobs < 1:
        fail(f"--jobs {args.jobs} is too few; pass at least 1")
    return args


def main(args: argparse.Namespace) -> None:
    """Measure what is left, then write the page."""
    study = Study(args.folder / "cpu", args.results / "runs.jsonl", args.jobs, SCALES["cpu"])
    models = {(run.name, run.seed): folder for run, folder in find_students(args.experiment, study)}
    models = {(TEACHER, 0): study.folder / "teacher", **models}
    path = args.results / f"samplers-{args.experiment}.jsonl"
    lines = measure_all(models, study, path, args.jobs, args.samplers)
    draw(models, study, path.with_suffix(".png"), choose_picture(args.experiment, lines))
    page = describe(args.experiment, lines)
    path.with_suffix(".md").write_text(page, encoding="utf-8")
    print(page)


if __name__ == "__main__":
    flags = parse_args()
    set_environment("cpu")
    main(flags)
