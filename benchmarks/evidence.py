# Copyright 2026 The LIFT and PLACE distillation authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""What helps, measured: trainings in the small set-up of study.py, a JSON line each, and the tables made of them.

    python benchmarks/evidence.py                            # every experiment; with nothing left to run, its tables
    python benchmarks/evidence.py --only draws --jobs 2

Stopped, it goes on with the run that it was in. A table has means ± standard errors over the seeds, and the mean
difference to its first row, of the same seed, with the interval that holds it in 95 % of cases (Student's t).
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.arguments import fail

from study import ROOT, Run, Study, cell, set_environment


class Experiment(NamedTuple):
    """Runs that are compared, and what is said of them."""

    question: str
    rows: dict[str, dict[str, Any]]  # flags by the name of the row; the first one is what the others are compared with
    seeds: tuple[int, ...]
    shared: dict[str, Any]  # flags of all rows


def draws_experiment() -> Experiment:
    """A student of 6 % for 21 passes over 3,000 images: the teacher live, and cached for fewer draws than passes."""
    shared = {"max_train_samples": 3000, "max_train_steps": 1000, "kd_loss": "mse", "student": 0.25}
    rows = {"live": {}, **{f"{count} draw{'s' * (count > 1)}": {"cache_teacher": count} for count in (16, 4, 1)}}
    return Experiment("How many draws of a cached teacher are enough?", rows, (0, 1, 2), shared)


EXPERIMENTS: dict[str, Callable[[], Experiment]] = {"draws": draws_experiment}


def runs_of(name: str, experiment: Experiment) -> list[Run]:
    """All runs of an experiment, seed by seed, so that a stopped one has whole seeds."""
    rows = experiment.rows.items()
    return [Run(name, row, seed, {**experiment.shared, **flags}) for seed in experiment.seeds for row, flags in rows]


def make_table(name: str, experiment: Experiment, lines: dict[str, dict]) -> str:
    """The finished runs of an experiment as Markdown."""
    first, values = next(iter(experiment.rows)), {}
    for run in runs_of(name, experiment):
        if run.key in lines:
            values.setdefault(run.name, {})[run.seed] = lines[run.key]
    columns = "| | seeds | Fréchet, 50 steps | 10 steps | kernel · 10³ | difference to the first |"
    head = f"{columns}\n|---|--:|--:|--:|--:|--:|"
    rows = [experiment.question, "", head]
    for row, found in values.items():
        cells = [cell([line["figures"][key] for line in found.values()]) for key in ("fd_50", "fd_10")]
        kernel = cell([1000 * line["figures"]["kid_50"] for line in found.values()])
        both = sorted(found.keys() & values.get(first, {}).keys()) if row != first else []
        pairs = [found[seed]["figures"]["fd_50"] - values[first][seed]["figures"]["fd_50"] for seed in both]
        rows.append(f"| {row} | {len(found)} | {' | '.join(cells)} | {kernel} | {interval(pairs)} |")
    return "\n".join(rows)


def interval(differences: list[float]) -> str:
    """The mean of paired differences and its 95 % interval."""
    if len(differences) < 2:
        return "–"
    mean, error = np.mean(differences), stats.sem(differences)
    reach = error * stats.t.ppf(0.975, len(differences) - 1)
    return f"{mean:+.2f} ({mean - reach:+.2f} to {mean + reach:+.2f})"


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line, or `input_args`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=tuple(EXPERIMENTS), help="these experiments (default: all)")
    parser.add_argument("--folder", type=Path, default=Path("evidence"), help="of teachers, students and caches")
    results = ROOT / "benchmarks" / "results" / "evidence"
    parser.add_argument("--results", type=Path, default=results, help="of the lines and tables")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, a CPU thread each (default: 2)")
    args = parser.parse_args(input_args)
    if args.jobs < 1:
        fail(f"--jobs {args.jobs} is too few; pass at least 1")
    return args


def main(args: argparse.Namespace) -> None:
    """Run what is left, then write the tables."""
    set_environment()
    args.results.mkdir(parents=True, exist_ok=True)
    study = Study(args.folder, args.results / "runs.jsonl", args.jobs)
    tables = []
    for name in args.only or EXPERIMENTS:
        experiment = EXPERIMENTS[name]()
        study.run_all(runs_of(name, experiment))
        tables.append(make_table(name, experiment, study.finished()))
    text = "\n\n".join(tables) + "\n"
    if not args.only:
        (args.results / "tables.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main(parse_args())
