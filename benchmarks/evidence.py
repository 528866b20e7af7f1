# Copyright 2026 The LIFT and PLACE distillation authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Which loss helps, where, and why: experiments on small pixel U-Nets of garments, from the same teacher.

    python benchmarks/evidence.py                            # every experiment; with nothing left to run, its results
    python benchmarks/evidence.py --only tiny --jobs 2
    python benchmarks/evidence.py --scale gpu --minutes 9    # on one GPU; the same command goes on

Stopped, it goes on with the runs that it was in; a line of runs.jsonl is kept for each that is finished. Where an
experiment searches the learning rate, each row has its own, on seeds that are not reported: it is halved and doubled
until the best lies between two worse. The published table, with published teachers, is that of published.py.

A table has means ± standard errors over the seeds, and mean differences of runs of the same seed, with the interval
that holds them in 95 % of cases (Student's t). Only experiments with all their runs have a table and figures.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMPipeline
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "eval"))

from common.errors import fail

from seeds import cell, interval, mean_and_error
from study import ROOT, SCALES, TIMESTEPS, WIDTHS, Run, Study, TimeUp, run_of, sample, set_environment, teachers_of


Flags = dict[str, Any]
Values = dict[str, dict[int, dict[str, Any]]]  # lines by row and seed
SEARCH_SAMPLES = 1000
SHOWN = 24  # samples of each row in the picture


class Search(NamedTuple):
    """How a learning rate is found for each row."""

    steps: int  # of its runs, unless the row has its own
    seeds: tuple[int, ...] = (100,)  # none that is reported
    first: float = 16e-3  # is halved and doubled


class Experiment(NamedTuple):
    """Runs that are compared, and what is said of them."""

    question: str
    rows: dict[str, Flags]  # flags by the name of the row
    seeds: tuple[int, ...]
    shared: Flags  # of all rows
    compared_with: tuple[tuple[str, ...], ...]  # of each group of rows, the others are compared with the best
    search: Search | None = None  # of the learning rates; `None` where the flags say them
    samples: int = 2000
    teachers: dict[str, str] | None = None  # by the name of the row; None is "teacher" for all
    scale: str = "cpu"
    pairs: tuple[tuple[str, str], ...] = ()  # of rows whose differences are written, too


# Cached draws have no pairs of timesteps, so that live ones have none either.
PASSES = {"max_train_samples": 8000, "antithetic_timesteps": False}
# Students of 1.6 % draw noise until about 3,000 steps. The cached teacher's draws come three times or more: see the
# experiments on draws and on fresh ones.
LONG = {**PASSES, "max_train_steps": 6000, "train_batch_size": 32, "lr_warmup_steps": 200, "checkpointing_steps": 1000}
LONGER = {**LONG, "max_train_steps": 12_000, "checkpointing_steps": 2000}
PRUNED = {**LONG, "student_init": "magnitude", "checkpointing_steps": 2000}
SMALL = {"student": 0.3125, "max_train_steps": 2000, "checkpointing_steps": 500}
# A search by fewer steps than those of the reported runs may find rates that are too high, as it did for mse in the
# first experiments: see the one on rates.
SHORT_SEARCH, FULL_SEARCH = Search(3000), Search(6000, seeds=(100, 101), first=8e-3)
CACHED = {"cache_teacher": 8}
NO_TEACHER = {
    "none": {"kd_loss": "none"},
    "none, min-SNR": {"kd_loss": "none", "snr_gamma": 5},
    "none, rms": {"kd_loss": "none", "task_loss": "rms"},
}
LOSSES = {
    **NO_TEACHER,
    "mse": {"kd_loss": "mse", **CACHED},
    "mse, min-SNR": {"kd_loss": "mse", "snr_gamma": 5, **CACHED},
    "rms": {"kd_loss": "rms", **CACHED},
    "rms, rms": {"kd_loss": "rms", "task_loss": "rms", **CACHED},
    "FitNet": {"kd_loss": "mse", "lambda_kd_output": 0, "lambda_kd_feat": 1},
    "mse + FitNet": {"kd_loss": "mse", "lambda_kd_feat": 1e-6},
    "lift": {"kd_loss": "lift", **CACHED},
    "place": {"kd_loss": "place", **CACHED},
    "place, l2": {"kd_loss": "place", "coarse_norm": "l2", **CACHED},
    "place, rms": {"kd_loss": "place", "task_loss": "rms", **CACHED},
    "place + FitNet": {"kd_loss": "place", "lambda_kd_feat": 1e-6},
}
# The best rates from a random start, of 6,000 steps for students of 1.6 % and of 1,000 for those of 16 %.
TINY_RATES = {"none": 0.016, "none, rms": 0.004, "mse": 0.008, "rms": 0.004, "rms, rms": 0.004}
TINY_RATES |= {"lift": 0.008, "place": 0.008, "place, rms": 0.008}
SMALL_RATES = {"none": 0.004, "none, rms": 0.008, "mse": 0.008, "rms": 0.008}
SMALL_RATES |= {"lift": 0.004, "place": 0.008, "place, rms": 0.004}
DECIDING_PAIRS = *(("place", other) for other in ("mse", "lift", "rms", "none", "none, rms")), ("mse", "none")
DECIDING_PAIRS += tuple(("rms", other) for other in ("mse", "none", "none, rms"))
DECIDING_PAIRS += tuple(("place, rms", other) for other in ("mse", "none, rms"))


def tiny_experiment(shared: Flags, search: Search, names: tuple[str, ...] = tuple(LOSSES)) -> Experiment:
    """Losses and their controls on the student of 1.6 %."""
    others = "mse", "lift", "none", "none, rms", "rms", "rms, rms", "mse, min-SNR"
    pairs = tuple(("place", other) for other in others)
    pairs += ("lift", "mse"), ("mse", "none"), ("none, rms", "none"), ("none, min-SNR", "none")
    pairs += ("mse, min-SNR", "mse"), ("place, l2", "place"), ("rms, rms", "rms"), ("place, rms", "place")
    pairs += ("rms, rms", "place, rms"), ("rms, rms", "none, rms"), ("place, rms", "none, rms")
    pairs += ("mse + FitNet", "mse"), *(("place + FitNet", other) for other in ("place", "mse + FitNet", "none, rms"))
    question = f"Which loss helps a student of 1.6 % of the teacher, in {shared['max_train_steps']:,} steps, "
    question += f"at learning rates searched by {search.steps:,}?"
    rows = {name: LOSSES[name] for name in names}
    compared = ("mse",), tuple(name for name in NO_TEACHER if name in rows)
    pairs = tuple(pair for pair in pairs if rows.keys() >= {*pair})
    return Experiment(question, rows, (0, 1, 2, 3, 4), shared, compared, search, pairs=pairs)


def small_experiment() -> Experiment:
    """The losses that decide, on a student ten times as large."""
    names = ("none", "none, rms", "mse", "rms", "FitNet", "lift", "place", "place, rms")
    rows, compared = {name: LOSSES[name] for name in names}, (("mse",), ("none", "none, rms"))
    question = "Which loss helps a student of 16 % of the teacher, from a random start?"
    return Experiment(question, rows, (0, 1, 2, 3, 4), {**LONG, **SMALL}, compared, Search(1000), pairs=DECIDING_PAIRS)


def pruned_experiment(size: str, shared: Flags, rates: dict[str, float]) -> Experiment:
    """The losses that decide, from a pruned start, at the best rates from a random one."""
    names = ("none", "none, rms", "mse", "rms", "lift", "place", "place, rms")
    rows = {name: {**LOSSES[name], "learning_rate": rates[name]} for name in names}
    question = (
        f"Which loss helps a student of {size} of the teacher, pruned from it, at the best rates of a random start?"
    )
    compared = ("mse",), ("none", "none, rms")
    return Experiment(question, rows, (0, 1, 2, 3, 4), {**PRUNED, **shared}, compared, pairs=DECIDING_PAIRS)


def pruned_rates_experiment() -> Experiment:
    """Half and twice the rates of the losses that decide on a pruned student; of mse, which fails there, more."""
    others = {"none, rms": (0.002, 0.008), "mse": (0.002, 0.004, 0.016, 0.032), "rms": (0.008, 0.016)}
    others |= {"place": (0.004, 0.016)}
    rows = {}
    for loss, rates in others.items():
        rows[loss] = {**LOSSES[loss], "learning_rate": TINY_RATES[loss]}
        for rate in rates:
            rows[f"{loss} at {rate:g}"] = {**LOSSES[loss], "learning_rate": rate}
    question = "Do the learning rates decide which loss helps a student of 1.6 % of the teacher, pruned from it?"
    compared = tuple(tuple(row for row in rows if row.split(" at")[0] == loss) for loss in ("mse", "none, rms"))
    pairs = tuple(("place", row) for row in rows if row != "place")
    return Experiment(question, rows, (0, 1, 2), PRUNED, compared, pairs=pairs)


def draws_experiment() -> Experiment:
    """A student of 6 % for 21 passes over 3,000 images: the teacher live, and cached for fewer draws than passes."""
    shared = {"max_train_samples": 3000, "max_train_steps": 1000, "kd_loss": "mse", "student": 0.25}
    rows = {
        "live": {"antithetic_timesteps": False},
        **{f"{count} draw{'s' * (count > 1)}": {"cache_teacher": count} for count in (16, 4, 1)},
    }
    question = "How many draws of a cached teacher are enough?"
    return Experiment(question, rows, (0, 1, 2), shared, (("live",),))


def fresh_experiment() -> Experiment:
    """Losses whose rows elsewhere have a teacher cached for eight draws, each of which comes three times."""
    rows = {"none, rms at 0.002": {**NO_TEACHER["none, rms"], "learning_rate": 0.002}}
    for loss in ("mse", "place"):
        rows[f"{loss}, 8 draws at 0.008"] = {**LOSSES[loss], "learning_rate": 0.008}
        for rate in (0.004, 0.008, 0.016):
            rows[f"{loss}, live at {rate:g}"] = {"kd_loss": loss, "learning_rate": rate}
    question = "Does a student of 1.6 % of the teacher learn more from noise that is always new, in 6,000 steps?"
    compared = tuple(row for row in rows if row.startswith("mse, live")), ("none, rms at 0.002",)
    pairs = tuple((f"{loss}, live at 0.008", f"{loss}, 8 draws at 0.008") for loss in ("mse", "place"))
    pairs += tuple(("place, live at 0.008", other) for other in ("mse, live at 0.008", "none, rms at 0.002"))
    return Experiment(question, rows, (0, 1, 2), LONG, compared, pairs=pairs)


def teachers_experiment() -> Experiment:
    """The same student, 1.6 % of the largest of three teachers."""
    rows, teachers = {}, {}
    for teacher, width, size in (("sixteenth", 0.5, "71k"), ("quarter", 0.25, "280k"), ("teacher", 0.125, "1.1M")):
        for loss in ("FitNet", "mse", "place", "rms"):
            rows[f"{loss}, {size}"], teachers[f"{loss}, {size}"] = {**LOSSES[loss], "student": width}, teacher
    question, compared = "Does a larger teacher help the same student?", (("mse, 1.1M",),)
    pairs = tuple((f"{loss}, 1.1M", f"{loss}, 71k") for loss in ("FitNet", "mse", "place", "rms"))
    pairs += tuple(
        (f"place, {size}", f"{other}, {size}") for size in ("71k", "280k", "1.1M") for other in ("mse", "rms")
    )
    return Experiment(question, rows, (0, 1, 2), LONG, compared, SHORT_SEARCH, teachers=teachers, pairs=pairs)


def rates_experiment() -> Experiment:
    """Learning rates about those that the search found by half the steps, and the smallest teacher."""
    rows, teachers = {}, {}
    for loss, size, teacher, rates in (
        ("none, rms", "", "teacher", (0.002, 0.004, 0.008)),
        ("mse", "", "teacher", (0.004, 0.008, 0.016, 0.032)),
        ("rms", "", "teacher", (0.008, 0.016)),
        ("place", "", "teacher", (0.004, 0.008, 0.016)),
        ("mse + FitNet", "", "teacher", (0.016, 0.032)),
        ("place + FitNet", "", "teacher", (0.004, 0.008)),
        ("mse", ", 71k", "sixteenth", (0.008, 0.016, 0.032)),
    ):
        for rate in rates:
            name = f"{loss}{size} at {rate:g}"
            flags = {"student": 0.125 / WIDTHS[teacher], "learning_rate": rate}
            rows[name], teachers[name] = {**LOSSES[loss], **flags}, teacher
    question = "Do the learning rates decide which loss helps a student of 1.6 % of the teacher, in 6,000 steps?"
    compared = tuple(tuple(row for row in rows if row.startswith(f"{loss} at")) for loss in ("mse", "none, rms"))
    pairs = tuple((f"mse at {rate:g}", f"mse, 71k at {rate:g}") for rate in (0.008, 0.016, 0.032))
    pairs += tuple((row, "mse at 0.008") for row in ("place at 0.008", "rms at 0.008", "rms at 0.016", "mse at 0.032"))
    pairs += (("place + FitNet at 0.008", "mse + FitNet at 0.016"),)
    pairs += tuple(("place at 0.008", other) for other in ("rms at 0.008", "none, rms at 0.002"))
    return Experiment(question, rows, (0, 1, 2), LONG, compared, teachers=teachers, pairs=pairs)


def longer_rates_experiment() -> Experiment:
    """Plain distillation and PLACE for twice the steps, at a rate that the search of the shortest runs passed by."""
    rates = ("mse", 0.032), ("mse", 0.008), ("place", 0.008)
    rows = {f"{loss} at {rate:g}": {**LOSSES[loss], "learning_rate": rate} for loss, rate in rates}
    question = "Does the learning rate decide between mse and PLACE, for a student of 1.6 %, in 12,000 steps?"
    compared, pairs = (("mse at 0.032", "mse at 0.008"),), (("place at 0.008", "mse at 0.008"),)
    return Experiment(question, rows, (0, 1, 2), LONGER, compared, pairs=pairs)


def long_experiment() -> Experiment:
    """Losses that decide, for three times the steps, each at its best rate of 6,000 steps."""
    losses = "none, rms", "mse", "rms, rms", "place", "place, rms"
    rows = {loss: {**LOSSES[loss], "learning_rate": TINY_RATES[loss]} for loss in losses}
    shared = {**LONG, "max_train_steps": 18_000, "checkpointing_steps": 3000}
    question = "Which loss helps a student of 1.6 % of the teacher, in 18,000 steps, at the best rates of 6,000?"
    pairs = *(("place", other) for other in ("none, rms", "rms, rms")), ("rms, rms", "none, rms")
    pairs += tuple(("place, rms", other) for other in ("place", "none, rms", "rms, rms"))
    pairs += tuple((other, "mse") for other in ("place", "place, rms", "rms, rms", "none, rms"))
    return Experiment(question, rows, (0, 1, 2, 3, 4), shared, (("mse",), ("none, rms",)), pairs=pairs)


def ablations_experiment() -> Experiment:
    """PLACE's choices, one at a time, on the student of 1.6 %, at the rate that is the best for it and for LIFT."""
    rows = {"place": {}, "groups of 4": {"group_size": 4}, "groups of 64": {"group_size": 64}}
    rows |= {"one group (lift)": {"kd_loss": "lift"}, "groups by position": {"group_by": "position"}}
    rows |= {name.replace("_", " "): {"kd_weighting": name} for name in ("constant", "linear", "cosine")}
    rows |= {"coarse only": {"kd_weighting": "coarse_only"}, "fine only": {"kd_weighting": "fine_only"}}
    shared = {**LONG, **CACHED, "kd_loss": "place", "learning_rate": TINY_RATES["place"], "checkpointing_steps": 2000}
    question = "Which of PLACE's choices matter, for a student of 1.6 % of the teacher?"
    pairs = tuple((row, "place") for row in rows if row != "place")
    return Experiment(question, rows, (0, 1, 2, 3, 4), shared, (("place",),), pairs=pairs)


def batches_experiment() -> Experiment:
    """PLACE and mse by small batches, which the experiment on rates has run, and by large ones, for as many steps."""
    rows = {}
    for batch in (32, 128):
        for loss in ("mse", "place"):
            rows[f"{loss}, batch {batch}"] = {"kd_loss": loss, "train_batch_size": batch}
    shared = {**LONG, **CACHED, "learning_rate": TINY_RATES["mse"]}
    question = "Does PLACE's noise matter less in large batches, in as many steps, at the best rate of both by 32?"
    pairs = tuple((f"place, batch {batch}", f"mse, batch {batch}") for batch in (32, 128))
    pairs += tuple((f"{loss}, batch 128", f"{loss}, batch 32") for loss in ("mse", "place"))
    return Experiment(question, rows, (0, 1, 2), shared, (("mse, batch 32",),), pairs=pairs)


def large_experiment() -> Experiment:
    """Twenty times the steps at 32 pixels: a student of 1.6 % of the largest of three teachers, which all run live."""
    rows, teachers = {name: dict(flags) for name, flags in NO_TEACHER.items()}, {}
    for teacher, width, size in (("teacher", 0.5, "1.1M"), ("fourfold", 0.25, "4.4M"), ("sixteenfold", 0.125, "18M")):
        losses = ("FitNet", "mse", "rms", "place")
        for loss in (*losses, "mse, min-SNR", "lift", "place + FitNet") if teacher == "sixteenfold" else losses:
            rows[f"{loss}, {size}"], teachers[f"{loss}, {size}"] = {**LOSSES[loss], "student": width}, teacher
    rows = {name: {key: flags[key] for key in flags if key not in CACHED} for name, flags in rows.items()}
    teachers |= dict.fromkeys(NO_TEACHER, "sixteenfold")
    shared = {"student": 0.125, "max_train_steps": 20_000, "train_batch_size": 96, "checkpointing_steps": 4000}
    shared |= {"lr_warmup_steps": 500, "ema_decay": 0.999, "dataloader_num_workers": 1}
    question = "Which loss helps a student of 1.6 %, and what does a larger teacher do?"
    compared = ("mse, 18M",), tuple(NO_TEACHER)
    return Experiment(question, rows, (0, 1, 2), shared, compared, Search(20_000), 10_000, teachers, "gpu")


EXPERIMENTS: dict[str, Callable[[], Experiment]] = {
    "tiny-tuned": partial(tiny_experiment, LONG, FULL_SEARCH),
    "long": long_experiment,
    "tiny": partial(tiny_experiment, LONG, SHORT_SEARCH),
    "tiny-longer": partial(
        tiny_experiment, LONGER, SHORT_SEARCH, ("none, rms", "mse", "rms, rms", "place", "place, rms")
    ),
    "rates": rates_experiment,
    "rates-longer": longer_rates_experiment,
    "draws": draws_experiment,
    "fresh": fresh_experiment,
    "teachers": teachers_experiment,
    "ablations": ablations_experiment,
    "batches": batches_experiment,
    "small": small_experiment,
    "tiny-pruned": partial(pruned_experiment, "1.6 %", {}, TINY_RATES),
    "pruned-rates": pruned_rates_experiment,
    "small-pruned": partial(pruned_experiment, "16 %", SMALL, SMALL_RATES),
    "large": large_experiment,
}


# ------------------------------------------------------------------------------------------------------------ the runs


def list_runs(name: str, experiment: Experiment) -> list[Run]:
    """All runs of an experiment, seed by seed, so that a stopped one has whole seeds."""
    return [
        Run(name, row, seed, {**experiment.shared, **flags}, experiment.samples, teacher_of(experiment, row))
        for seed in experiment.seeds
        for row, flags in experiment.rows.items()
    ]


def search_rate(name: str, experiment: Experiment, row: str, lines: dict[str, dict]) -> tuple[float, list[Run]]:
    """A row's best learning rate so far, and the runs that the search needs next: none where it is finished."""
    steps, seeds, best = experiment.search
    flags = {**without_checkpoints(experiment.shared), "max_train_steps": steps, **experiment.rows[row]}
    tried: dict[float, list[Run]] = {}
    while not {best, best / 2, best * 2} <= tried.keys():
        for rate in (best, best / 2, best * 2):
            what = f"{name}-search", f"{row} {rate:g}"
            options = {**flags, "learning_rate": rate}, SEARCH_SAMPLES, teacher_of(experiment, row)
            tried[rate] = [Run(*what, seed, *options) for seed in seeds]
        left = [run for runs in tried.values() for run in runs if run.key not in lines]
        if left:
            return best, left
        distances = {rate: [lines[run.key]["figures"]["fd_50"] for run in runs] for rate, runs in tried.items()}
        best = min(distances, key=lambda rate: np.mean(distances[rate]))
    return best, []


def list_search(name: str, experiment: Experiment, lines: dict[str, dict]) -> list[Run]:
    """The runs that the search for the learning rates needs next, shorter to measure."""
    rows = experiment.rows if experiment.search else ()
    return [run for row in rows for run in search_rate(name, experiment, row, lines)[1]]


def teacher_of(experiment: Experiment, row: str) -> str:
    """The name of a row's teacher."""
    return experiment.teachers[row] if experiment.teachers else "teacher"


def without_checkpoints(flags: Flags) -> Flags:
    """The flags of a run of which only the end is measured."""
    return {name: value for name, value in flags.items() if name != "checkpointing_steps"}


def tune(name: str, experiment: Experiment, lines: dict[str, dict]) -> Experiment | None:
    """The experiment with each row's best learning rate of the search; `None` while that is not finished."""
    if not experiment.search:
        return experiment
    found = {row: search_rate(name, experiment, row, lines) for row in experiment.rows}
    if any(left for _, left in found.values()):
        return None
    rows = {row: {**flags, "learning_rate": found[row][0]} for row, flags in experiment.rows.items()}
    return experiment._replace(rows=rows)


# -------------------------------------------------------------------------------------------------------- the results


def collect(name: str, experiment: Experiment, lines: dict[str, dict]) -> Values | None:
    """The experiment's lines; `None` unless all are there."""
    values: Values = {}
    for run in list_runs(name, experiment):
        if run.key not in lines:
            return None
        values.setdefault(run.name, {})[run.seed] = lines[run.key]
    return values


def figures_of(lines: dict[int, dict[str, Any]], name: str) -> list[Any]:
    """A figure of a row's runs, seed by seed."""
    return [lines[seed]["figures"][name] for seed in sorted(lines)]


def make_table(experiment: Experiment, values: Values) -> str:
    """The experiment as Markdown."""
    means = {row: np.mean(figures_of(found, "fd_50")) for row, found in values.items()}
    best = [min(group, key=means.get) for group in experiment.compared_with]
    heads = ["run", "Fréchet, 50 steps", "10 steps", "kernel · 10³", *(f"difference to `{row}`" for row in best)]
    text = f"{experiment.question} Seeds: {len(experiment.seeds)}.\n\n| {' | '.join(heads)} |\n"
    text += f"|---|{'--:|' * (len(heads) - 1)}\n"
    for row, found in values.items():
        cells = [row, *(cell(figures_of(found, name)) for name in ("fd_50", "fd_10"))]
        cells.append(cell([1000 * value for value in figures_of(found, "kid_50")]))
        cells += [difference(values, row, other) if other != row else "–" for other in best]
        text += f"| {' | '.join(cells)} |\n"
    return text


def difference(values: Values, row: str, other: str, figure: str = "fd_50") -> str:
    """A row's distance less that of another one, over runs of the same seed; kernel distances times 1000."""
    scale, digits = (1000, 0) if figure.startswith("kid") else (1, 2)
    scaled = ([scale * value for value in figures_of(values[name], figure)] for name in (row, other))
    return interval(*scaled, digits)


def count_means(values: Values, pixels: int) -> str:
    """How many runs of each row have learned the mean of the noise, which decides how bright an image is.

    Of noise of N pixels the mean has the variance 1 / N. So large is the error of a student that does not see it, in
    the mean of its prediction where all is noise; one has learned it if its error is less than half of that. The error
    is to the teacher. The smallest one sees half of it itself, so rows of its students are left out.
    """
    at = TIMESTEPS.index(950)
    learned = {
        row: [shift[at] < 0.5 / pixels for shift in figures_of(found, "shifts")]
        for row, found in values.items()
        if all(line["teacher"] != "sixteenth" for line in found.values())
    }
    return ", ".join(f"{row} {sum(each)} of {len(each)}" for row, each in learned.items())


def explain(experiment: Experiment, values: Values, noise: float) -> str:
    """The differences of other pairs, and which errors to the teacher the distance goes along with, as Markdown.

    Args:
        noise: The distance of white noise: rows beyond it have learned nothing that it measures.
    """
    text = ""
    for pair in experiment.pairs:
        by_10, by_50, kernel_10, kernel_50 = (
            difference(values, *pair, figure) for figure in ("fd_10", "fd_50", "kid_10", "kid_50")
        )
        text += f"- `{pair[0]}` less `{pair[1]}`: {by_50} by 50 steps, {by_10} by 10; "
        text += f"kernel distance · 10³ {kernel_50}, {kernel_10}\n"
    pixels = SCALES[experiment.scale].side ** 2
    text += f"\nRuns that have learned the mean of the noise: {count_means(values, pixels)}.\n"
    if experiment.teachers:
        return text
    means = {row: np.mean(figures_of(found, "fd_50")) for row, found in values.items()}
    text += "\nSpearman's correlation of the Fréchet distance with the error to the teacher, by timestep:\n\n"
    text += f"| sampling steps, runs | {' | '.join(map(str, TIMESTEPS))} |\n|---|{'--:|' * len(TIMESTEPS)}\n"
    for which, limit in (("all", np.inf), ("of rows nearer than white noise", noise)):
        kept = [found for row, found in values.items() if means[row] < limit]
        if not kept or (len(kept) == len(values) and limit < np.inf):  # nothing to say, or nothing new
            continue
        errors = np.array([error for found in kept for error in figures_of(found, "errors")])
        for steps in (50, 10):
            distances = [distance for found in kept for distance in figures_of(found, f"fd_{steps}")]
            ranks = [stats.spearmanr(distances, error).statistic for error in errors.T]
            cells = " | ".join(f"{rank:+.2f}" for rank in ranks)
            text += f"| {steps}, {which}: {len(distances)} | {cells} |\n"
    return text


def describe_teachers(experiment: Experiment, lines: dict[str, dict]) -> str:
    """The distances of the teachers' own samples, as Markdown."""
    of_scale = teachers_of(SCALES[experiment.scale])
    own = {line["name"]: line["figures"] for line in lines.values() if line["experiment"] == of_scale}
    names = dict.fromkeys(experiment.teachers.values())
    cells = (f"{own[name]['parameters']:,} parameters {own[name]['fd_50']:.1f}" for name in names)
    return f"Distances of the teachers themselves, 50 steps: {', '.join(cells)}.\n"


def describe_bounds(results: Path) -> str:
    """The distances of real images and of white noise, at each size of images that was run, as Markdown."""
    text = ""
    for path in sorted(results.glob("bounds-*.json")):
        side = path.stem.removeprefix("bounds-")
        bounds = ", ".join(f"{name} {distance:.2f}" for name, distance in json.loads(path.read_text()).items())
        text += f"Fréchet distances at {side} pixels: {bounds}. Students beyond the latter are no nearer than it.\n\n"
    return text


def draw_figures(experiment: Experiment, values: Values, path: Path) -> None:
    """The distance during the training, the error to the teacher and the gradient by timestep, one panel each."""
    count = 3 + bool(experiment.teachers)
    figure = Figure(figsize=(5 * count, 4.5), layout="constrained")
    panels = figure.subplots(1, count)
    if experiment.teachers:
        draw_ends(values, panels[3])
    for at, (row, found) in enumerate(values.items()):
        style = {"label": row, "color": f"C{at % 10}", "linestyle": ("-", "--")[at // 10]}
        curves = figures_of(found, "curve")
        if curves[0]:
            steps = sorted(set.intersection(*({*map(int, curve)} for curve in curves)))
            band = np.array([[curve[str(step)] for step in steps] for curve in curves])
            panels[0].plot(steps, band.mean(0), **style)
            panels[0].fill_between(steps, band.min(0), band.max(0), color=style["color"], alpha=0.1)
        panels[1].plot(TIMESTEPS, np.mean(figures_of(found, "errors"), axis=0), **style)
        panels[2].plot(TIMESTEPS, np.mean(figures_of(found, "gradients"), axis=0), **style)
    titles = (
        "Fréchet distance, 10 steps: mean and range of the seeds",
        "Error to the teacher",
        "Share of the gradient in the output",
    )
    for panel, title, label in zip(panels, titles, ("training step", "timestep", "timestep")):
        panel.set(title=title, xlabel=label, yscale="linear" if panel is panels[0] else "log")
    figure.legend(*panels[1].get_legend_handles_labels(), loc="outside right center", fontsize="small")
    figure.suptitle(experiment.question)
    figure.savefig(path, dpi=80)


def draw_samples(name: str, experiment: Experiment, study: Study, path: Path) -> None:
    """Samples of each row by 50 steps, from the same noise, above unseen images.

    They are of one seed: the first of which most rows lie in this folder. Rows that were run in another are left out.
    """
    lines, found = study.finished(), {seed: {} for seed in experiment.seeds}
    for run in list_runs(name, experiment):
        folder = study.folder_of(run_of(lines[run.key]))
        if folder.exists():
            found[run.seed][run.name] = folder
    strips = {}
    for row, folder in max(found.values(), key=len).items():
        pipeline = DDPMPipeline.from_pretrained(folder)
        sampler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=study.scale.clip_sample)
        strips[row] = sample(pipeline.unet.eval(), sampler, 50, SHOWN)[:, 0]
    draw_strips(strips, study, path)


def draw_strips(strips: dict[str, torch.Tensor], study: Study, path: Path) -> None:
    """A row of each strip, (SHOWN, side, side), under its name, above unseen images."""
    strips["unseen images"] = torch.from_numpy(np.load(study.folder / "unseen.npy")[:SHOWN])
    figure = Figure(figsize=(12, 0.6 * len(strips)), layout="constrained")
    for panel, (row, images) in zip(figure.subplots(len(strips), squeeze=False)[:, 0], strips.items()):
        panel.imshow(torch.cat(list(images), dim=1), cmap="gray", vmin=0, vmax=255)
        panel.set_ylabel(row, rotation=0, ha="right", va="center")
        panel.set(xticks=[], yticks=[])
    figure.savefig(path, dpi=80)


def draw_ends(values: Values, panel: Axes) -> None:
    """The distance of each loss by what its rows' names end with: "loss, size" of the teacher, or "loss at rate"."""
    of, label = ", ", "parameters of the teacher"
    if any(" at " in row for row in values):
        of, label = " at ", "learning rate"
    names = [row.rpartition(of) for row in values]
    for loss in dict.fromkeys(loss for loss, _, end in names if re.fullmatch(r"[\d.]+[kM]?", end)):
        ends = [end for other, _, end in names if other == loss]
        means = [mean_and_error(figures_of(values[f"{loss}{of}{end}"], "fd_50")) for end in ends]
        panel.errorbar(ends, *np.transpose(means), label=loss, marker="o", capsize=3)
    panel.set(title="Fréchet distance, 50 steps: mean ± its error", xlabel=label)
    panel.legend(fontsize="small")


def report(name: str, lines: dict[str, dict], results: Path) -> str:
    """An experiment's part of the page; its figures are drawn beside it."""
    experiment = tune(name, EXPERIMENTS[name](), lines)
    values = collect(name, experiment, lines) if experiment is not None else None
    if values is None:
        return f"## {name}\n\n{EXPERIMENTS[name]().question} Not finished.\n"
    text = f"## {name}\n\n{make_table(experiment, values)}"
    if experiment.pairs:
        bounds = json.loads((results / f"bounds-{SCALES[experiment.scale].side}.json").read_text())
        text += f"\n{explain(experiment, values, bounds['white noise'])}"
    if experiment.teachers:
        text += f"\n{describe_teachers(experiment, lines)}"
    if experiment.search:
        chosen = ", ".join(f"{row} {flags['learning_rate']:g}" for row, flags in experiment.rows.items())
        by = f"in {experiment.search.steps:,} steps of seed {' and '.join(map(str, experiment.search.seeds))}"
        text += f"\nLearning rates, each better than its half and its double {by}: {chosen}.\n"
    if all("gradients" in line["figures"] for found in values.values() for line in found.values()):
        draw_figures(experiment, values, results / f"{name}.png")
        text += f"\n![{experiment.question}]({name}.png)\n"
    if (results / f"{name}-samples.png").exists():
        text += f"\n![Samples of one seed from the same noise, above unseen images]({name}-samples.png)\n"
    return text


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line, or `input_args`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=tuple(EXPERIMENTS), help="run these (default: all of the scale)")
    parser.add_argument("--no_runs", action="store_true", help="only write the results of what is finished")
    parser.add_argument(
        "--scale",
        choices=tuple(SCALES),
        default="cpu",
        help="cpu: 16 pixels; gpu: 32, and it needs one (default: cpu)",
    )
    parser.add_argument("--minutes", type=float, help="stop after these; the same command goes on (default: never)")
    parser.add_argument("--folder", type=Path, default=Path("evidence"), help="of teachers, students and caches")
    results = ROOT / "benchmarks" / "results" / "evidence"
    parser.add_argument("--results", type=Path, default=results, help="of the lines, the page and the figures")
    parser.add_argument("--jobs", type=int, help="runs side by side, a CPU thread each (default: 2; on a GPU 8)")
    args = parser.parse_args(input_args)
    args.jobs = SCALES[args.scale].jobs if args.jobs is None else args.jobs
    if args.jobs < 1:
        fail(f"--jobs {args.jobs} is too few; pass at least 1")
    if args.minutes is not None and args.minutes <= 0:
        fail(f"--minutes {args.minutes} is no time; pass more, or leave it out")
    others = [name for name in args.only or () if EXPERIMENTS[name]().scale != args.scale]
    if others:
        fail(f"--only {others[0]} is of another scale; pass --scale {EXPERIMENTS[others[0]]().scale}")
    if args.scale == "gpu" and not args.no_runs and not torch.cuda.is_available():
        fail("--scale gpu needs a GPU, and there is none; pass --scale cpu")
    return args


def main(args: argparse.Namespace) -> None:
    """Run what is left, then write the results."""
    args.results.mkdir(parents=True, exist_ok=True)
    scale = SCALES[args.scale]
    study = Study(args.folder / args.scale, args.results / "runs.jsonl", args.jobs, scale, args.minutes)
    try:
        for name in () if args.no_runs else args.only or EXPERIMENTS:
            experiment = EXPERIMENTS[name]()
            if experiment.scale == args.scale:
                while runs := list_search(name, experiment, study.finished()):
                    study.run_all(runs)
                tuned, picture = tune(name, experiment, study.finished()), args.results / f"{name}-samples.png"
                if study.run_all(list_runs(name, tuned)):
                    draw_samples(name, tuned, study, picture)
    except TimeUp:
        why = f"{args.minutes:g} minutes are over" if study.deadline else "stopped"
        print(f"{why}; the same command goes on", file=sys.stderr)
    lines = study.finished()
    parts = [report(name, lines, args.results) for name in EXPERIMENTS]
    page = "# Experiments on small pixel U-Nets\n\nWritten by `python benchmarks/evidence.py` from runs.jsonl.\n\n"
    page += (
        "Samples are by DDIM: at 16 pixels it clips, as Diffusers' by default; at 32 it does not, as published.\n\n"
    )
    page += describe_bounds(args.results)
    page += "\n".join(parts)
    (args.results / "README.md").write_text(page, encoding="utf-8")
    print(page)


if __name__ == "__main__":
    flags = parse_args()
    set_environment(SCALES[flags.scale].device)
    main(flags)
