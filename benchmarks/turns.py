# Copyright 2026 The LIFT and PLACE distillation authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Processes that start side by side, and are timed one after the other.

Most of a short run on a GPU is its start: imports, weights, caches, compiling. The starts may overlap, what is timed
may not. So each process waits before it, until all others wait too or have ended.
"""

import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path


TURN = "LIFT_BENCHMARK_TURN"  # in a process's environment: the folder by which it waits
PAUSE = 0.05  # seconds
STARTS = 0.6  # of the seconds: how long processes may start


def wait_for_turn() -> None:
    """Wait until no other process of [`run_in_turns`] runs. A process that was started otherwise goes on at once."""
    if TURN not in os.environ:
        return
    turn = Path(os.environ[TURN])
    (turn / "ready").touch()
    while not (turn / "go").exists():
        time.sleep(PAUSE)


def run_in_turns(
    commands: list[list[str]], folder: Path, environment: dict[str, str], seconds: float, timed: bool = True
) -> Iterator[subprocess.CompletedProcess]:
    """Start the commands at once; each has its turn when all are ready, in their order, and ends with it.

    Args:
        folder: Where they are started.
        environment: Theirs, beside this process's own.
        seconds: After which those that have not ended are killed; those that are not ready after [`STARTS`] of them
            are killed then, so that the others are timed.
        timed: Whether they wait for a turn.

    Yields:
        What each has printed, errors among it, and its exit code, in their order and as soon as it has ended.
    """
    started = time.monotonic()
    deadline = started + seconds
    with tempfile.TemporaryDirectory() as turns:
        processes: list[tuple[subprocess.Popen, Path]] = []
        try:
            for number, command in enumerate(commands):
                turn = Path(turns) / str(number)
                turn.mkdir()
                options = {"cwd": folder, "env": {**os.environ, **environment, TURN: str(turn)}}
                with (turn / "output.txt").open("wb") as output:
                    process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, **options)
                processes.append((process, turn))
            while timed and any(starts(*each) for each in processes) and time.monotonic() < started + STARTS * seconds:
                time.sleep(PAUSE)
            for process, turn in processes if timed else ():
                if starts(process, turn):
                    process.kill()
            for command, (process, turn) in zip(commands, processes):
                (turn / "go").touch()
                end_by(process, deadline)
                text = (turn / "output.txt").read_text(encoding="utf-8", errors="replace")
                yield subprocess.CompletedProcess(command, process.wait(), text)
        finally:
            for process, _ in processes:
                process.kill()


def starts(process: subprocess.Popen, turn: Path) -> bool:
    """Whether it is not ready yet, and has not ended."""
    return process.poll() is None and not (turn / "ready").exists()


def end_by(process: subprocess.Popen, deadline: float) -> None:
    """Wait for the process until the deadline, then kill it."""
    try:
        process.wait(max(deadline - time.monotonic(), PAUSE))
    except subprocess.TimeoutExpired:
        process.kill()
