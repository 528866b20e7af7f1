"""Nothing hangs, no NaN is silent, nothing is lost: how a run ends by an error, by a signal, and by a full disk."""

import argparse
import errno
import importlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import common.data
from common import checkpoints
from common.checkpoints import list_checkpoints, load_checkpoint
from common.data import ReadError, measure_images
from common.ending import Stopped, StopSignals
from common.full import end_in_one_line
from common.memory import fits_the_gpu
from common.metrics import read_metrics
from common.ranges import RANGES, Range

import datasets
import pytest
import torch
from conftest import ROOT, TWO_PROCESSES, run_file, wait_until

import train_lift_unet


SCRIPTS = ("train_lift_unet", "train_lift_sd21", "train_lift_dit", "train_lift_sd3", "train_lift_sdxl")
SHORT = [
    *("--train_batch_size", 40, "--logging_steps", 1, "--checkpointing_steps", 2, "--dataloader_num_workers", 0),
    *("--num_validation_images", 1, "--num_inference_steps", 1, "--report_to", "none", "--max_train_steps", 6),
]
LATEST = ("--resume_from_checkpoint", "latest")


@pytest.fixture
def command(teacher, images):
    """`command(output_dir, *flags)` is the command line of a short run of the pixel script."""

    def command_for(output_dir: Path, *flags) -> list[str]:
        source = ("--pretrained_teacher_model", teacher, "--student", 0.5, "--train_data_dir", images)
        return [str(part) for part in (*source, "--output_dir", output_dir, *SHORT, *flags)]

    return command_for


@pytest.fixture
def refused(run, command, tmp_path):
    """`refused(*flags)` runs into `tmp_path / "student"`, must fail, and returns the one line."""

    def refuse(*flags) -> str:
        with pytest.raises(SystemExit) as error:
            run("train_lift_unet", *command(tmp_path / "student", *flags))
        assert str(error.value).startswith("error: ") and "\n" not in str(error.value)
        assert not [
            name for name in ("unet", "model_index.json", "README.md") if (tmp_path / "student" / name).exists()
        ]
        return str(error.value)

    return refuse


@pytest.fixture
def start(command):
    """`start(output_dir, *flags)` starts the pixel script in a process group of its own; in the end it is killed."""
    processes = []

    def start_process(output_dir: Path, *flags, program: tuple = (ROOT / "train_lift_unet.py",), **options):
        process = subprocess.Popen(
            [sys.executable, *program, *command(output_dir, *flags)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONFAULTHANDLER": "1"},
            text=True,
            start_new_session=True,
            **options,
        )
        processes.append(process)
        return process

    yield start_process
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def in_step(path: Path, step: int, statement: str) -> tuple[Path]:
    """A program, written to the path, that is the pixel script but for a statement at the beginning of a step."""
    path.write_text(
        "import time, train_lift_unet as script\n"
        "losses, calls = script.compute_losses, []\n"
        "def compute_losses(*arguments, **options):\n"
        "    calls.append(1)\n"
        f"    if len(calls) == {step}: {statement}\n"
        "    return losses(*arguments, **options)\n"
        "script.compute_losses = compute_losses\n"
        "script.main(script.parse_args())\n"
    )
    return (path,)


def end(process: subprocess.Popen, number: signal.Signals) -> tuple[str, float]:
    """Send a signal to the whole group, as job managers do; what was printed, and the seconds it took."""
    then = time.monotonic()
    os.killpg(process.pid, number)
    output = process.communicate(timeout=60)[0]
    assert "Traceback" not in output, output
    return output, time.monotonic() - then


# ----------------------------------------------------------------------------------------------- a NaN is never silent


@pytest.mark.parametrize("steps", [2, 3, 6])
def test_a_short_run_that_diverges_ends_as_an_error(refused, tmp_path, steps):
    message = refused("--learning_rate", 1e6, "--max_train_steps", steps, "--checkpointing_steps", 100)
    assert "the loss or its gradient was not finite" in message and "lower --learning_rate" in message
    assert read_metrics(tmp_path / "student" / "metrics.jsonl")[-1]["skipped_in_a_row"] == steps - 1
    assert not list_checkpoints(tmp_path / "student")


def test_one_bad_step_at_the_end_of_a_long_run_is_no_error(run, command, tmp_path, monkeypatch):
    compute_losses, calls = train_lift_unet.compute_losses, []

    def last_is_nan(*arguments, **options):
        loss, logs = compute_losses(*arguments, **options)
        calls.append(float("nan") if len(calls) == 5 else 1.0)
        return loss * calls[-1], {**logs, "loss": logs["loss"] * calls[-1]}

    monkeypatch.setattr(train_lift_unet, "compute_losses", last_is_nan)
    run("train_lift_unet", *command(tmp_path / "student"))
    assert (tmp_path / "student" / "model_index.json").exists()


def test_a_teacher_that_stops_being_finite_is_named(refused, monkeypatch):
    """Its weights are finite, its output is not, as when float16 overflows."""
    forward = train_lift_unet.UNet2DModel.forward

    def overflowing(self, *arguments, **options):
        output = forward(self, *arguments, **options)
        wide = self.config.block_out_channels[0] == 16  # the student's are half of that
        return (output[0] * float("inf"),) if wide and isinstance(output, tuple) else output  # not in a pipeline

    monkeypatch.setattr(train_lift_unet.UNet2DModel, "forward", overflowing)
    message = refused()
    assert "the output of --pretrained_teacher_model was not finite for 6 steps" in message and "fp16" in message


@pytest.mark.parametrize("whose", ["student", "ema"])
def test_weights_that_are_not_finite_are_not_saved(refused, tmp_path, monkeypatch, whose):
    """The loss stays finite: the weights are spoilt after the last step that looks at them."""
    save = train_lift_unet.save_train_state

    def spoil(output_dir, train_state, limit):
        if train_state.step == 4:
            model = train_state.student.model
            weights = train_state.ema.shadow_params if whose == "ema" else list(model.parameters())
            weights[0].data[0] = float("nan")
        save(output_dir, train_state, limit)

    monkeypatch.setattr(train_lift_unet, "save_train_state", spoil)
    message = refused("--checkpoints_total_limit", 1)
    assert "weights are not finite after step 4" in message and "lower --learning_rate" in message
    (checkpoint,) = list_checkpoints(tmp_path / "student")
    assert checkpoint.name == "checkpoint-2" and load_checkpoint(checkpoint)[1]["step"] == 2


# ------------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("script", [*SCRIPTS, "generate", "evaluate", "report"])
def test_every_number_has_a_range(script, monkeypatch):
    parsers = []

    def keep(parser, arguments=None):
        parsers.append(parser)
        raise SystemExit

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", keep)
    with pytest.raises(SystemExit):
        importlib.import_module(script).parse_args([])
    numbers = [action for action in parsers[0]._actions if action.type in (int, float)]
    assert len(numbers) >= 5
    for action in numbers:
        assert action.dest in RANGES, action.dest
        assert action.default is None or action.default in RANGES[action.dest], action.dest


@pytest.mark.parametrize(
    ("which", "inside", "outside", "text"),
    [
        (Range(0, 1, without_high=True), (0, 0.999), (1, -0.1, float("nan")), "at least 0 and less than 1"),
        (Range(0, without_low=True), (1e-30, 1e30), (0, -1, float("inf"), float("nan")), "more than 0"),
        (Range(-float("inf")), (-1e30, 0), (float("inf"), -float("inf"), float("nan")), "a finite number"),
        (Range(1, 3), (1, 3), (0, 4), "at least 1 and at most 3"),
    ],
)
def test_ranges(which, inside, outside, text):
    assert all(value in which for value in inside) and not any(value in which for value in outside)
    assert str(which) == text


# ------------------------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_in_the_steps_saves_what_is_done(start, tmp_path, number):
    """Between two micro-batches, too: the step that is begun is given up, and the one before is saved."""
    folder = tmp_path / "student"
    flags = ("--dataloader_num_workers", 2, "--max_train_steps", 1000, "--gradient_accumulation_steps", 50)
    process = start(folder, *flags, "--checkpointing_steps", 1000)
    wait_until(lambda: read_metrics(folder / "metrics.jsonl"), process)
    output, seconds = end(process, number)
    assert process.returncode == 128 + number and f"{number.name}: saved step" in output and seconds < 15
    done = read_metrics(folder / "metrics.jsonl")[-1]["step"]
    assert [path.name for path in list_checkpoints(folder)] == [f"checkpoint-{done}"]


def test_a_signal_before_the_steps_ends_at_once_and_leaves_nothing(start, tmp_path):
    folder = tmp_path / "student"
    process = start(folder, "--student_init", "diffusion")
    wait_until(lambda: (folder / ".lock").exists(), process)
    output, _ = end(process, signal.SIGTERM)
    assert process.returncode == 128 + signal.SIGTERM
    assert "SIGTERM: no step was done; the same command starts again" in output
    assert not folder.exists()


@pytest.mark.parametrize("place", ["open", "lockf", "gethostname"])
def test_a_signal_while_the_folder_is_locked_leaves_nothing(tmp_path, monkeypatch, place):
    owner = {"open": Path, "lockf": checkpoints.fcntl, "gethostname": checkpoints.socket}[place]
    function = getattr(owner, place)

    def interrupted(*arguments, **options):
        function(*arguments, **options)
        raise Stopped(signal.SIGTERM)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(owner, place, interrupted)
        checkpoints.lock_output(tmp_path / "student")
    assert (tmp_path / "student" / ".lock").exists()
    checkpoints.unlock_output()
    assert not (tmp_path / "student").exists()


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, capsys):
    """As scratch folders of clusters may be."""

    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(checkpoints.fcntl, "lockf", refuse)
    checkpoints.lock_output(tmp_path)
    assert "without locks: start no second run there" in capsys.readouterr().out
    assert f"process {os.getpid()} on " in (tmp_path / ".lock").read_text()


def test_a_signal_stops_the_sampling_and_saves(start, run, command, tmp_path):
    folder = tmp_path / "student"
    slow = ("--num_inference_steps", 200, "--num_validation_images", 32, "--validation_steps", 2)
    process = start(folder, *slow, "--checkpointing_steps", 4, "--max_train_steps", 4)
    wait_until(lambda: len(read_metrics(folder / "metrics.jsonl")) == 2, process)
    time.sleep(1)
    assert len(read_metrics(folder / "metrics.jsonl")) == 2  # it is sampling
    _, seconds = end(process, signal.SIGTERM)
    assert process.returncode == 128 + signal.SIGTERM and seconds < 15
    assert [path.name for path in list_checkpoints(folder)] == ["checkpoint-2"]
    assert [path.name for path in (folder / "samples").iterdir()] == ["step-000000.png"]

    # Again in the last validation: the result is not there yet, and the next run makes up for its samples.
    quick = ("--max_train_steps", 4, "--checkpointing_steps", 4)
    process = start(folder, *slow[:4], "--validation_steps", 100, *quick, *LATEST)
    wait_until(lambda: len(list_checkpoints(folder)) == 2, process)
    time.sleep(1)
    end(process, signal.SIGINT)
    assert process.returncode == 128 + signal.SIGINT and not (folder / "model_index.json").exists()
    run("train_lift_unet", *command(folder, *quick, *LATEST))
    assert (folder / "samples" / "step-000004.png").exists() and (folder / "model_index.json").exists()
    assert [row["step"] for row in read_metrics(folder / "metrics.jsonl")] == [1, 2, 3, 4]


def test_a_run_that_waits_for_its_workers_can_be_stopped(start, tmp_path):
    folder, program = tmp_path / "student", tmp_path / "waiting.py"
    program.write_text(
        "import time, train_lift_unet as script\n"
        "script.load_pixels = lambda *arguments: time.sleep(600)\n"
        "script.main(script.parse_args())\n"
    )
    process = start(folder, "--dataloader_num_workers", 2, program=(program,))
    wait_until(lambda: (folder / "metrics.jsonl").exists(), process)
    time.sleep(2)
    output, seconds = end(process, signal.SIGINT)
    assert process.returncode == 128 + signal.SIGINT and seconds < 15
    assert "SIGINT: no step was done" in output and not list_checkpoints(folder)


@pytest.mark.parametrize(("number", "slow"), [(signal.SIGTERM, 48), (signal.SIGINT, 0)], ids=["half", "all"])
def test_a_run_that_checks_images_can_be_stopped(start, tmp_path, number, slow):
    """Two processes check half of the images each; one that is done waits for more work, with a lock in its hands."""
    program = tmp_path / "checking.py"
    program.write_text(
        "import pathlib, time, train_lift_unet as script\n"
        "from common import data\n"
        "measure = data._measure\n"
        "def slow(record):\n"
        f"    if int(pathlib.Path(record['path']).stem) >= {slow}:\n"
        f"        pathlib.Path('{tmp_path}', 'slow').touch()\n"
        "        time.sleep(600)\n"
        "    return measure(record)\n"
        "data._measure = slow\n"
        "script.main(script.parse_args())\n"
    )
    process = start(tmp_path / "student", "--dataloader_num_workers", 2, program=(program,))
    wait_until((tmp_path / "slow").exists, process)
    time.sleep(1)
    output, seconds = end(process, number)
    assert process.returncode == 128 + number and seconds < 15
    assert f"{number.name}: no step was done; the same command starts again" in output


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_among_the_images_ends_the_check_whatever_has_been_run_before(workers):
    """Here the handlers of signals are those of a run, which its processes inherit."""
    before = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)}
    rows = datasets.Dataset.from_dict({"image": [{"path": str(index), "bytes": None} for index in range(8)]})
    try:
        StopSignals(1)
        for _ in range(5 if workers else 1):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(common.data, "open_image", fail_to_read)
                with pytest.raises(ReadError, match="cannot be read now"):
                    measure_images(rows, "image", workers)
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def fail_to_read(record, mode):
    raise OSError(errno.EIO, "Input/output error")


def test_a_second_interrupt_leaves_at_once(start, tmp_path):
    """The first one waits for the end of a step, which is made to hang."""
    folder = tmp_path / "student"
    process = start(folder, program=in_step(tmp_path / "slow.py", 2, "time.sleep(600)"))
    wait_until(lambda: read_metrics(folder / "metrics.jsonl"), process)
    time.sleep(1)
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(2)
    assert process.poll() is None
    _, seconds = end(process, signal.SIGINT)
    assert process.returncode == -signal.SIGINT and seconds < 5


@pytest.mark.parametrize("spread", [(), ("--fsdp",)], ids=["ddp", "fsdp"])
def test_two_processes_leave_together(start, tmp_path, spread):
    folder = tmp_path / "student"
    flags = ("--train_batch_size", 8, "--max_train_steps", 1000, "--checkpointing_steps", 1000, *spread)
    program = ("-m", *TWO_PROCESSES, ROOT / "train_lift_unet.py")
    process = start(folder, *flags, program=program)
    wait_until(lambda: read_metrics(folder / "metrics.jsonl"), process)
    then = time.monotonic()
    os.killpg(process.pid, signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode != 0 and time.monotonic() - then < 30, output
    assert "SIGTERM: saved step" in output
    done = read_metrics(folder / "metrics.jsonl")[-1]["step"]
    assert [path.name for path in list_checkpoints(folder)] == [f"checkpoint-{done}"]


@pytest.mark.parametrize("end, code", [("", 0), ("sys.exit(3)", 3)], ids=["returns", "exits"])
def test_two_processes_end_however_slow_the_threads_of_their_group_are(tmp_path, end, code):
    """The threads get time of the CPU where the main one waits, and Python's lock where that gives it up."""
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys, torch\n"
        "from torch import distributed\n"
        "from common.ending import StopSignals\n"
        "def gather():\n"
        "    distributed.all_gather([torch.zeros(1) for _ in range(2)], torch.zeros(1))\n"
        "def main():\n"
        "    stop = StopSignals(2)\n"
        "    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(1, 1))\n"
        "    sys.setswitchinterval(1e6)\n"
        "    cpu = {min(os.sched_getaffinity(0))}\n"
        "    for thread in map(int, os.listdir('/proc/self/task')):\n"
        "        os.sched_setaffinity(thread, cpu)\n"
        "        os.setpriority(os.PRIO_PROCESS, thread, 19 * (thread != os.getpid()))\n"
        "    gather()\n"
        "    distributed.destroy_process_group()\n"
        f"    {end}\n"
        "distributed.init_process_group('gloo')\n"
        "main()\n"
    )
    finished = run_file("-m", *TWO_PROCESSES, program, timeout=120, PYTHONPATH=str(ROOT))
    assert (finished.returncode == 0) == (code == 0), finished.stdout
    assert len(re.findall(f"exitcode *: {code} ", finished.stdout)) == (2 if code else 0), finished.stdout


def test_a_hang_shows_where_each_process_stands(tmp_path):
    """Tests that wait for a process say more than that it did not end."""
    program = tmp_path / "program.py"
    program.write_text(
        "import subprocess, sys, time\n"
        "def rest():\n    time.sleep(600)\n"
        "def launch():\n    for process in [subprocess.Popen([*sys.orig_argv, 'child']) for _ in range(2)]:\n"
        "        process.wait()\n"
        "print('begun', flush=True)\n"
        "rest() if sys.argv[1:] else launch()\n"
    )
    with pytest.raises(pytest.fail.Exception) as failed:
        run_file(program, timeout=8)
    assert failed.value.msg.count("begun") == 3
    assert failed.value.msg.count("in rest") == 2 and failed.value.msg.count("in launch") == 1


# -------------------------------------------------------------------------------------- folders, disks, and exceptions


def test_a_folder_has_one_run_at_a_time(start, refused, run, command, tmp_path):
    folder = tmp_path / "student"
    process = start(folder, "--max_train_steps", 1000, "--checkpointing_steps", 1000)
    wait_until(lambda: read_metrics(folder / "metrics.jsonl"), process)
    message = refused(*LATEST)
    assert f"--output_dir {folder} is in use by process {process.pid} on " in message
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert (folder / ".lock").exists()  # a dead process does not hold it
    run("train_lift_unet", *command(folder, "--max_train_steps", 1, *LATEST))
    assert len(read_metrics(folder / "metrics.jsonl")) == 1


def test_a_full_disk_ends_with_one_line_and_keeps_the_last_checkpoint(run, start, command, tmp_path):
    """A limit on the size of a file fails a write as a full disk does: in the midst of it."""
    folder = tmp_path / "student"
    run("train_lift_unet", *command(folder, "--max_train_steps", 2))
    limit = 100_000  # the weights are 54 kB, the moments twice that

    def limit_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    process = start(folder, "--max_train_steps", 4, *LATEST, preexec_fn=limit_files)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 1 and "Traceback" not in output
    last = output.strip().splitlines()[-1]
    assert last.startswith(f"error: --output_dir {folder} cannot take checkpoint-4: ") and "are whole" in last
    assert "too large" in last.lower() and " bytes (" in last
    assert [path.name for path in list_checkpoints(folder)] == ["checkpoint-2"]
    assert load_checkpoint(folder / "checkpoint-2")[1]["step"] == 2 and not list(folder.glob(".tmp*"))
    run("train_lift_unet", *command(folder, "--max_train_steps", 4, *LATEST))  # where there is room again


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(28, "No space left on device"), r"--output_dir /tmp or --cache_dir None: .*No space.*make room"),
        (torch.OutOfMemoryError("CUDA out of memory."), r"--train_batch_size 4 does not fit the GPU: CUDA out of mem"),
        (
            RuntimeError("CUDA error: out of memory\nCUDA kernel errors"),
            "--train_batch_size 4 does not .*: CUDA error",
        ),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), "--train_batch_size 4 does not fit"),
        (
            RuntimeError("GET was unable to find an engine to execute this computation"),
            "--train_batch_size 4 does not",
        ),
    ],
    ids=["disk", "memory", "memory of CUDA itself", "memory of cuBLAS", "memory of cuDNN"],
)
def test_what_is_full_is_said_in_one_line(error, line):
    @end_in_one_line
    def main(args):
        raise error

    with pytest.raises(SystemExit, match=f"^error: {line}"):
        main(argparse.Namespace(output_dir="/tmp", cache_dir=None, train_batch_size=4))


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory."),
            "error: a grid does not fit the GPU: CUDA out of memory; pass less",
        ),
        (
            RuntimeError("CUDA error: out of memory\n"),
            "error: a grid does not fit the GPU: CUDA error: out of memory; pass",
        ),
        (RuntimeError("CUDA error: an illegal memory access"), None),
    ],
    ids=["PyTorch's", "CUDA's", "another"],
)
def test_what_does_not_fit_the_gpu_is_named(error, line):
    with (
        pytest.raises(SystemExit if line else RuntimeError, match=line or "illegal"),
        fits_the_gpu("a grid", "pass less"),
    ):
        raise error


@pytest.mark.parametrize(
    "error", [FileNotFoundError(2, "No such file or directory"), RuntimeError("CUDA error: an illegal memory access")]
)
def test_other_errors_stay_what_they_are(error):
    @end_in_one_line
    def main(args):
        raise error

    with pytest.raises(type(error)) as raised:
        main(argparse.Namespace())
    assert raised.value is error


def test_an_exception_in_a_step_ends_the_process_whatever_its_workers_do(start, tmp_path):
    program = in_step(tmp_path / "failing.py", 3, "raise RuntimeError('in step three')")
    process = start(tmp_path / "student", "--dataloader_num_workers", 2, program=program)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 1 and "RuntimeError: in step three" in output
    assert [path.name for path in list_checkpoints(tmp_path / "student")] == ["checkpoint-2"]
    assert json.loads((tmp_path / "student" / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 2
