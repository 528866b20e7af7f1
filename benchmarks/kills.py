# Copyright 2026 The LIFT and PLACE distillation authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""What a kill costs: runs are killed at random instants and started again, until they end as if nothing had happened.

    python benchmarks/kills.py                                # 50 kills of each script
    python benchmarks/kills.py --kills 5 --scripts unet sd21 --output /tmp/kills.json

Tiny pipelines and random images are made for each script, and each of its cases runs once undisturbed. Then the same
command runs in a new folder with a new cache. It is killed by SIGKILL, data workers and all, after a random delay in a
phase that is drawn too, and starts again: until it ends by itself. Then every file must be as in the undisturbed run's
folder: weights, averaged weights, the last checkpoint, samples, and metrics.jsonl but for the speed. That is repeated
until there are kills enough. Anything else is a failure, and the exit code is 1: another exit code than 0, a run that
hangs, a file that differs, is missing or left over.

The phase of a kill is read from what it leaves behind: the table says where kills fell, not where they were aimed.
"""

import argparse
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerContext
from pathlib import Path

import torch
from tqdm.auto import tqdm

from device import describe_device
from fork_server import make_fork_server
from small_runs import (
    CACHED,
    CACHED_TEACHER,
    MOST,
    PHASES,
    PLAIN,
    ROOT,
    SCRIPTS,
    Aim,
    Case,
    SmallRun,
    differences,
    make_case,
    run_once,
    run_undisturbed,
    set_environment,
)


IMAGES = 600  # with a cache: more than a shard of it holds, so that kills fall between shards, too


@dataclass
class Tally:
    """What has happened to the runs of a script."""

    phases: Counter[str] = field(default_factory=Counter)  # of the kills
    runs: int = 0  # starts
    finished: int = 0  # of these, those that ended by themselves
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0


def make_cases(script: str, folder: Path, images: int = IMAGES) -> dict[str, Case]:
    """The command lines that a script is tried with, by names.

    Args:
        script: Of SCRIPTS.
        folder: For teachers and images.
        images: Of a case with a cache.
    """
    cached = make_case(script, folder, images, *MOST, *(CACHED_TEACHER if script == "unet" else CACHED))
    return {"plain": make_case(script, folder, 24, *PLAIN), "most": cached}


def draw_aim(draw: random.Random, run: SmallRun, visits: dict[str, list[float]], kills: Counter[str]) -> Aim:
    """A phase that the run has before it, rather one of few kills so far, and an instant in it.

    Args:
        draw: Draws.
        run: Is about to start.
        visits: Of the undisturbed run.
        kills: By phase.
    """
    phases = [phase for phase in PHASES if phase in visits.keys() & run.ahead()]
    (phase,) = draw.choices(phases, [(1 + kills[phase]) ** -2 for phase in phases])
    visit = draw.randint(1, len(visits[phase]))
    return Aim(phase, visit, draw.random() * visits[phase][visit - 1])


def kill_runs(
    context: ForkServerContext, case: Case, folder: Path, kills: int, seed: str, killed: Callable[[], object]
) -> Tally:
    """Kill runs of a case so many times, and let each of them end.

    Args:
        context: Of [`make_fork_server`].
        case: The command.
        folder: For the runs.
        kills: How many.
        seed: Decides the phases and the delays.
        killed: Called after each kill.
    """
    folder.mkdir()
    tally, then, draw = Tally(), time.monotonic(), random.Random(seed)
    whole, visits = run_undisturbed(context, case, folder / "whole")
    while tally.phases.total() < kills:
        run = SmallRun(case, folder / f"run-{tally.finished}", whole.shards)
        code = -signal.SIGKILL
        while code == -signal.SIGKILL:
            aim = draw_aim(draw, run, visits, tally.phases)
            # With all its steps done a run has little before it that is new: every other time it may end.
            if tally.phases.total() == kills or ("steps" not in run.ahead() and draw.random() < 0.5):
                aim = None
            tally.runs += 1
            try:
                code, _ = run_once(context, run, aim)
            except TimeoutError as error:
                code = None
                tally.failures.append(f"{run.folder.name}: {error}\n{run.printed()[-3000:]}")
            if code == -signal.SIGKILL:
                tally.phases[run.phase()] += 1
                killed()
        tally.finished += 1
        if code == 0:
            tally.failures += [f"{run.folder.name}: {what}" for what in differences(run.output_dir, whole.output_dir)]
        elif code is not None:
            tally.failures.append(f"{run.folder.name}: exit code {code}\n{run.printed()[-3000:]}")
        shutil.rmtree(run.folder)
    tally.seconds = time.monotonic() - then
    return tally


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line, or `input_args`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="of each script, over its cases (default: 50)")
    parser.add_argument("--seed", type=int, default=0, help="of the phases and the delays (default: 0)")
    parser.add_argument("--scripts", nargs="+", default=SCRIPTS, choices=SCRIPTS, help="(default: all)")
    output = ROOT / "benchmarks" / "results" / "kills-cpu.json"
    parser.add_argument("--output", type=Path, default=output, help="JSON file of the results")
    return parser.parse_args(input_args)


def main(args: argparse.Namespace) -> None:
    """Kill runs of all scripts, print the table, and write the JSON."""
    set_environment()
    context = make_fork_server()
    result = {
        "device": describe_device(torch.device("cpu")),
        "torch": torch.__version__,
        "seed": args.seed,
        "scripts": {script: {} for script in args.scripts},
    }
    with tempfile.TemporaryDirectory() as temporary, tqdm(total=args.kills * len(args.scripts)) as progress:
        for script in args.scripts:
            cases = make_cases(script, Path(temporary))
            for number, (name, case) in enumerate(cases.items()):
                progress.set_description(f"{script}, {name}")
                kills = (args.kills + number) // len(cases)
                seed = f"{args.seed} {script} {name}"
                tally = kill_runs(context, case, Path(temporary) / f"{script}-{number}", kills, seed, progress.update)
                result["scripts"][script][name] = {
                    "flags": " ".join(case.flags[4:]),  # without the temporary folders
                    "kills": tally.phases.total(),
                    "by phase": {phase: tally.phases[phase] for phase in PHASES},
                    "runs": tally.runs,
                    "finished": tally.finished,
                    "failures": tally.failures,
                    "seconds": round(tally.seconds, 1),
                }
                for failure in tally.failures:
                    progress.write(f"{script}, {name}, {failure}")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=2) + "\n")

    print(f"\n{result['device']}, torch {result['torch']}: kills by phase, runs that ended by themselves, failures\n")
    print(f"| script | case | kills | {' | '.join(PHASES)} | runs | finished | failures | seconds |")
    print(f"|---|---|{'--:|' * (len(PHASES) + 5)}")
    failed = 0
    for script, rows in result["scripts"].items():
        for name, row in rows.items():
            failed += len(row["failures"])
            counts = [row["kills"], *row["by phase"].values(), row["runs"], row["finished"], len(row["failures"])]
            print(f"| {script} | {name} | {' | '.join(map(str, counts))} | {row['seconds']:.0f} |")
    if failed:
        sys.exit(f"error: {failed} failures, all in {args.output}")


if __name__ == "__main__":
    main(parse_args())
