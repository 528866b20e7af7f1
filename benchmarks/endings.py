# Copyright 2026 The LIFT and PLACE distillation authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""How runs end: finished ones one after the other, and interrupted ones wherever a signal meets them.

    python benchmarks/endings.py                              # 50 finished runs of each script, and all signals
    python benchmarks/endings.py --only runs --runs 2 --scripts unet --output /tmp/endings.json

Finished runs: tiny runs with data workers, each `python train_lift_<script>.py` in a process of its own, because it
is the interpreter's end that is tested. Each must end with exit code 0. The time from the last file of the pipeline to
the end of the process is kept, and every process of the run must be gone then.

Signals: SIGTERM and Ctrl+C (SIGINT), sent to a run and its data workers as a terminal or a job manager does, in each
phase of a run. The run must end with 128 + the signal's number, and with a checkpoint of the last step that it has
done; in the final save it must complete that, and end with 0. Then the same command must end with exit code 0 and with
the files of an undisturbed run, byte for byte. Before the signal the run is held for a moment: the phase is sure.

The exit code is 1 if a run hangs, ends in another way, or loses a step.
"""

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import psutil
import torch
from tqdm.auto import tqdm

from device import describe_device
from fork_server import make_fork_server
from small_runs import (
    CACHED,
    LIMIT,
    MOST,
    PHASES,
    ROOT,
    SCRIPTS,
    Case,
    SmallRun,
    differences,
    held,
    make_case,
    run_once,
    run_undisturbed,
    set_environment,
    signal_group,
    watch,
)


SIGNALS = (signal.SIGTERM, signal.SIGINT)
SHORT = ("--max_train_steps", "3", "--dataloader_num_workers", "2")
# Phases long enough to be met: many images to encode in small batches, many steps of sampling. And steps to be lost.
LONG = (*MOST, "--checkpointing_steps", "2", "--num_inference_steps", "40")
LONG_CACHE = (*CACHED, "--encoding_batch_size", "8")
FINAL = ("final save", "end")  # phases which a run completes
HANGS = 120.0  # seconds from a signal, or from the pipeline's last file, after which a run counts as hanging


def make_finishing_case(script: str, folder: Path) -> Case:
    """A command that ends soon. One of the scripts has the cache, the average and the optimizer of 8 bits as well."""
    more = (*CACHED, "--use_8bit_adam", "--use_ema") if script == "sd21" else ()
    return make_case(script, folder, 24, *SHORT, *more)


def make_interrupted_case(script: str, folder: Path) -> Case:
    """A command whose phases are long."""
    if script == "unet":
        return make_case(script, folder, 24, *LONG, "--num_validation_images", "8")
    return make_case(script, folder, 600, *LONG, *LONG_CACHE)


def start_process(run: SmallRun) -> subprocess.Popen:
    """Start a run as a user does. Its process leads a group of its own."""
    run.starts()
    command = [sys.executable, str(ROOT / f"train_lift_{run.case.script}.py"), *run.case.flags]
    with run.printed_to.open("w") as printed:
        return subprocess.Popen(
            command, cwd=run.folder, stdout=printed, stderr=subprocess.STDOUT, start_new_session=True
        )


def end_process(process: subprocess.Popen) -> None:
    """Kill a run that has not ended."""
    if process.poll() is None:
        signal_group(process, signal.SIGKILL)
        process.wait()


def is_gone(group: int) -> bool:
    """Whether no process of a group lives five seconds after its leader has ended; what does is killed."""
    deadline = time.monotonic() + 5
    while members := [process for process in psutil.process_iter() if is_member(process, group)]:
        if time.monotonic() > deadline:
            for process in members:
                process.kill()
            return False
        psutil.wait_procs(members, 0.1)
    return True


def is_member(process: psutil.Process, group: int) -> bool:
    """Whether a process is in a group, and alive."""
    with suppress(ProcessLookupError, psutil.NoSuchProcess):
        return os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE
    return False


def finish_run(run: SmallRun) -> tuple[float | None, list[str]]:
    """Let a run end by itself.

    Returns:
        Seconds from the last file of the pipeline to the end of the process, and what is wrong.
    """
    process = start_process(run)
    try:
        code = process.wait(LIMIT)
        ended = time.time()
        if code != 0:
            return None, [f"exit code {code}\n{run.printed()[-3000:]}"]
        wrong = [] if is_gone(process.pid) else ["it has left processes behind"]
    except subprocess.TimeoutExpired:
        return None, [f"it has not ended after {LIMIT:.0f} seconds; it is in the phase {run.phase()}"]
    finally:
        end_process(process)
    seconds = ended - (run.output_dir / "README.md").stat().st_mtime
    return seconds, wrong + [f"its end took {seconds:.0f} seconds"] * (seconds > HANGS)


def interrupt_run(run: SmallRun, phase: str, number: signal.Signals) -> tuple[int | None, float | None, list[str]]:
    """Start a run, and send it a signal in a phase.

    Returns:
        The exit code, the seconds from the signal to the end, and what is wrong.
    """
    process, sent = start_process(run), None

    def is_there() -> bool:
        if phase == "start-up" and not (run.output_dir / ".lock").exists():
            return False  # imports are no phase of the script: its handlers are there when it has locked the folder
        return run.phase() == phase and (phase != "steps" or run.last_row() > run.last_checkpoint())  # unsaved steps

    try:
        for _ in watch(run, lambda: process.poll() is None, LIMIT):
            if sent is None and is_there():
                with held(process):
                    if is_there():
                        signal_group(process, number)
                        sent = time.monotonic()
            if sent is not None and time.monotonic() > sent + HANGS:
                raise TimeoutError(f"it has not ended {HANGS:.0f} seconds after the signal, in phase {run.phase()}")
        seconds = None if sent is None else time.monotonic() - sent
        wrong = [] if is_gone(process.pid) else ["it has left processes behind"]
    except TimeoutError as error:
        return None, None, [str(error)]
    finally:
        end_process(process)
    if sent is None:
        wrong.append(f"it ended with {process.returncode} before it was met in the phase {phase}")
    elif process.returncode != (0 if phase in FINAL else 128 + number):
        wrong.append(f"exit code {process.returncode}\n{run.printed()[-3000:]}")
    return process.returncode, seconds, wrong


def try_signal(
    context: ForkServerContext, whole: SmallRun, folder: Path, phase: str, number: signal.Signals
) -> dict[str, Any]:
    """Interrupt a run, look at what it has saved, and let the same command end.

    Args:
        context: Of [`make_fork_server`].
        whole: The undisturbed run of the case.
        folder: For this run.
        phase: Of PHASES.
        number: The signal.
    """
    run = SmallRun(whole.case, folder, whole.shards)
    code, seconds, failures = interrupt_run(run, phase, number)
    done, saved = run.last_row(), run.last_checkpoint()
    if saved < done:
        failures.append(f"{done} steps were done, {saved} are saved")
    try:
        resumed, _ = run_once(context, run)
        if resumed != 0:
            failures.append(f"resumed: exit code {resumed}\n{run.printed()[-3000:]}")
        else:
            failures += [f"resumed: {what}" for what in differences(run.output_dir, whole.output_dir)]
    except TimeoutError as error:
        resumed = None
        failures.append(f"resumed: {error}")
    shutil.rmtree(run.folder)
    return {
        "script": run.case.script,
        "signal": number.name,
        "phase": phase,
        "exit code": code,
        "seconds": None if seconds is None else round(seconds, 2),
        "steps done": done,
        "steps saved": saved,
        "resumed": resumed,
        "failures": failures,
    }


def measure_runs(scripts: list[str], count: int, folder: Path) -> dict[str, dict[str, Any]]:
    """Finished runs of each script, one after the other."""
    results = {}
    with tqdm(total=count * len(scripts), desc="finished runs") as progress:
        for script in scripts:
            case, then, ends, failures = make_finishing_case(script, folder), time.monotonic(), [], []
            for number in range(count):
                run = SmallRun(case, folder / f"finished-{script}-{number}")
                end, wrong = finish_run(run)
                ends += [] if end is None else [end]
                for what in wrong:
                    failures.append(f"run {number}: {what}")
                    progress.write(f"{script}, {failures[-1]}")
                shutil.rmtree(run.folder)
                progress.update()
            results[script] = {
                "flags": " ".join(case.flags[4:]),  # without the temporary folders
                "runs": count,
                "slowest end": round(max(ends), 2) if ends else None,
                "median end": round(statistics.median(ends), 2) if ends else None,
                "failures": failures,
                "seconds": round(time.monotonic() - then, 1),
            }
    return results


def measure_signals(scripts: list[str], folder: Path) -> list[dict[str, Any]]:
    """Each signal in each phase of each script."""
    context, results = make_fork_server(), []
    with tqdm(total=len(scripts) * len(SIGNALS) * (len(PHASES) - 1), desc="signals") as progress:
        for script in scripts:
            case = make_interrupted_case(script, folder)
            whole, visits = run_undisturbed(context, case, folder / f"whole-{script}")
            for phase in PHASES[:-1]:
                for number in SIGNALS if phase in visits else ():
                    row = try_signal(context, whole, folder / f"{script}-{phase}-{number}", phase, number)
                    results.append(row)
                    for failure in row["failures"]:
                        progress.write(f"{script}, {phase}, {number.name}: {failure}")
                progress.update(len(SIGNALS))
    return results


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line, or `input_args`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=50, help="finished runs of each script (default: 50)")
    parser.add_argument("--scripts", nargs="+", default=SCRIPTS, choices=SCRIPTS, help="(default: all)")
    parser.add_argument("--only", choices=["runs", "signals"], help="one of the two measurements")
    output = ROOT / "benchmarks" / "results" / "endings-cpu.json"
    parser.add_argument("--output", type=Path, default=output, help="JSON file of the results")
    return parser.parse_args(input_args)


def main(args: argparse.Namespace) -> None:
    """Measure, print the tables, and write the JSON."""
    set_environment()
    result: dict[str, Any] = {"device": describe_device(torch.device("cpu")), "torch": torch.__version__}
    with tempfile.TemporaryDirectory() as temporary:
        if args.only != "signals":
            result["runs"] = measure_runs(args.scripts, args.runs, Path(temporary))
        if args.only != "runs":
            result["signals"] = measure_signals(args.scripts, Path(temporary))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=2) + "\n")

    failures = []
    print(f"\n{result['device']}, torch {result['torch']}")
    if "runs" in result:
        print("\nFinished runs: seconds from the pipeline's last file to the end of the process\n")
        print("| script | runs | slowest | median | failures |\n|---|--:|--:|--:|--:|")
    for script, row in result.get("runs", {}).items():
        failures += [f"{script}, {failure}" for failure in row["failures"]]
        counts = row["runs"], row["slowest end"], row["median end"], len(row["failures"])
        print(f"| {script} | {' | '.join(map(str, counts))} |")
    if "signals" in result:
        print(
            "\nSignals: exit code and seconds to the end, steps done and saved, exit code of the same command after\n"
        )
        print("| script | phase | signal | exit code | seconds | done | saved | resumed | failures |")
        print("|---|---|---|--:|--:|--:|--:|--:|--:|")
    for row in result.get("signals", []):
        where = f"{row['script']} | {row['phase']} | {row['signal']}"
        failures += [f"{where}: {failure}" for failure in row["failures"]]
        values = [row[key] for key in ("exit code", "seconds", "steps done", "steps saved", "resumed")]
        print(f"| {where} | {' | '.join(map(str, values))} | {len(row['failures'])} |")
    if failures:
        print("", *failures, sep="\n")
        sys.exit(f"error: {len(failures)} failures, all in {args.output}")


if __name__ == "__main__":
    main(parse_args())
