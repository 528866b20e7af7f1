"""The first demo and the benchmarks, run as the Makefile runs them but with a small budget."""

import importlib
import json
import re
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, run_file
from diffusers import DDIMPipeline
from PIL import Image

import demo
import digits
import gpu
import random_teachers
import step
import turns
from result_tables import as_markdown, tables_from_files


def test_a_demo_reads_the_student_before_it_trains_the_teacher(tmp_path):
    with pytest.raises(SystemExit, match=r"--student .*nosuch\.json"):
        digits.parse_args(["--student", str(tmp_path / "nosuch.json")])
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match=r"--output_dir .* cannot be written to: .*file is no folder; pass another"):
        demo.main(digits.parse_args(["--output_dir", str(tmp_path / "file" / "demo")]), digits.run)


def test_demo_from_nothing(in_process, costs_here, tmp_path, monkeypatch):
    """A few steps of everything. Of the trainings one is launched, as all would be; the others run in this process."""
    trainings, run_here = [], demo.subprocess.Popen

    def launch_the_first(command, **options):
        trainings.append(command)
        return (run_here if trainings[1:] else subprocess.Popen)(command, **options)

    monkeypatch.setattr(demo.subprocess, "Popen", launch_the_first)
    flags = ["--teacher_steps", 3, "--student_steps", 2, "--samples", 64, "--inference_steps", 2, "--threads", 1]
    flags = [str(flag) for flag in ("--output_dir", tmp_path / "demo", *flags)]
    demo.main(digits.parse_args(flags), digits.run)
    assert len(trainings) == 5 and len(in_process) == 4
    folder = tmp_path / "demo"
    quality = json.loads((folder / "quality.json").read_text())
    rows = {row["name"]: row for row in quality["rows"]}
    assert list(rows) == ["real", "teacher", *(f"{kd}-0" for kd in ("none", "mse", "lift", "place"))]
    facts = json.loads((folder / "report.json").read_text())["facts"]
    assert facts["teacher"]["parameters"] == 2_469_729 and facts["place-0"]["parameters"] < 0.06 * 2_469_729
    assert all(np.isfinite(row["fid"]) for row in rows.values())
    assert rows["real"]["fid"] < min(row["fid"] for name, row in rows.items() if name != "real")
    assert rows["teacher"]["sampler"] == "ddim" and rows["teacher"]["num_inference_steps"] == 2
    text = (folder / "results.md").read_text()
    tables = tables_from_files(folder / "report.json", folder / "quality.json")
    assert "not Inception FID" in text and all(as_markdown(table) in text for table in tables)
    assert text.count("\n| ") == 7 + 7 + 6 and all(len(table[0]) <= 6 for table in tables)
    assert "- budget: teacher 3 steps, students 2 steps" in text
    assert Image.open(folder / "samples.png").width > 16 * 96 and Image.open(folder / "curves.png").width > 700
    assert DDIMPipeline.from_pretrained(folder / "place-0")(num_inference_steps=1).images

    finished = run_file("demos/digits.py", *flags, "--teacher_steps", 4)
    assert finished.returncode == 1 and "--teacher_steps 4 was 3" in finished.stdout


def test_demos_and_benchmarks_do_not_import_each_other():
    """But for the data and the small classifier, which a benchmark may take from the demos."""
    names = {folder: {path.stem for path in (ROOT / folder).glob("*.py")} for folder in ("demos", "benchmarks")}
    names["demos"] -= {"fashion", "small_models"}
    for folder, other in (("demos", "benchmarks"), ("benchmarks", "demos")):
        for path in (ROOT / folder).glob("*.py"):
            imported = re.findall(r"^\s*(?:from|import) (\w+)", path.read_text(), re.M)
            assert not names[other] & set(imported), path


def test_loss_benchmark_prints_a_table(tmp_path):
    path = tmp_path / "loss.json"
    finished = run_file("benchmarks/loss.py", "--threads", 1, "--warmup", 0, "--repeats", 1, "--json", path)
    assert finished.returncode == 0, finished.stdout
    rows = json.loads(path.read_text())["rows"]
    assert len(rows) == 5 and all(row["place_ms"] > 0 for row in rows)
    assert finished.stdout.count("\n| ") == 1 + len(rows)


def test_step_benchmark_measures_a_grid_once(tmp_path, monkeypatch, capsys):
    path, inputs = tmp_path / "cells.json", tmp_path / "inputs"
    random_teachers.write_inputs("sd21", "tiny", 8, inputs)
    flags = ["--script", "sd21", "--size", "tiny", "--cache", "none", "teacher", "--batch", "2", "--steps", "2"]
    flags += ["--warmup", "1", "--threads", "1", "--json", str(path), "--inputs", str(inputs)]
    step.main(step.parse_args(flags), step.name_command(flags))
    text, table = path.read_text(), path.with_suffix(".md").read_text()
    live, cached = json.loads(text)
    assert (live["cache"], cached["cache"]) == ("none", "teacher") and live["batch"] == 2
    assert set(live["milliseconds"]) - set(cached["milliseconds"]) == {"encoders", "teacher forward"}
    for cell in (live, cached):
        assert cell["whole / bound"] > 0.5 and 0 < cell["loss / whole"] < 1 < cell["peak memory MiB"]
        assert cell["seconds to the end of the first step"] > cell["milliseconds"]["whole step"] / 1000
        assert "--threads 1" in cell["command"] and "--inputs" not in cell["command"]
    speedup = live["milliseconds"]["whole step"] / cached["milliseconds"]["whole step"]
    assert f"| sd21: tiny, batch 2, fp32 | {speedup:.2f} | – |" in table and table.count("\n| tiny, cache ") == 2
    assert table.endswith(capsys.readouterr().out.rstrip("\n") + "\n")

    monkeypatch.setattr(step, "measure", None)  # all is there
    step.main(step.parse_args(flags), "another command")
    assert path.read_text() == text
    with pytest.raises(SystemExit, match="--kd_loss none has no loss to time"):
        step.parse_args(["--", "--kd_loss", "none"])
    with pytest.raises(SystemExit, match=r"--batch \[65\] is out of range; pass 1 to 64"):
        step.parse_args(["--batch", "65"])


def test_step_benchmark_says_which_machine_timed_which_models(tmp_path):
    """Where one file has cells of several; the figures that are stored are such a file."""
    cells = json.loads((ROOT / "benchmarks" / "results" / "steps-cpu.json").read_text())
    step.write_markdown(tmp_path / "all.md", cells)
    lines = (tmp_path / "all.md").read_text().splitlines()
    first, second = (line for line in lines if "medians of" in line)
    assert "Xeon" in first and first.endswith("one run: unet small, sd21 small, dit small, sd3 small, unet full.")
    assert "EPYC" in second and second.endswith("one run: dit full, sd21 full.")
    step.write_markdown(tmp_path / "one.md", cells[:1])
    assert "medians of 5 steps, one run.\n" in (tmp_path / "one.md").read_text()


@pytest.mark.parametrize("script", step.SCRIPTS)
def test_step_benchmark_caches_what_a_cell_says(script, tmp_path):
    images = tmp_path / f"{script}-small-images"
    images.mkdir()
    (images / "0.png").touch()
    module, found = importlib.import_module(f"train_lift_{script}"), {}
    for cell in step.list_cells(step.parse_args(["--script", script, "--batch", "3", "--optimizer", "8bit"])):
        args = module.parse_args(step.script_flags(cell, tmp_path, tmp_path, 2))
        assert args.use_8bit_adam and args.train_batch_size == 3 and args.lambda_kd_feat == 0
        found[cell["cache"]] = (getattr(args, "cache_latents", None), args.cache_teacher)
    expected = {"none": (False, None), "latents": (True, None), "teacher": (True, 1)}
    assert found == ({"none": (None, None), "teacher": (None, 1)} if script == "unet" else expected)


def test_gpu_benchmark_runs_without_one_and_once(tmp_path, monkeypatch):
    inputs = tmp_path / "inputs"
    random_teachers.write_inputs("dit", "tiny", 16, inputs)
    monkeypatch.setattr(gpu, "SCRIPTS", ("dit",))
    monkeypatch.setattr(gpu, "RESULTS", tmp_path)  # what is stored there is taken over
    flags = ["--slice", "1", "--size", "tiny", "--output", str(tmp_path), "--inputs", str(inputs)]
    gpu.main(gpu.parse_args(flags))
    found = json.loads((tmp_path / "losses.json").read_text())
    ways = ("bf16 --use_8bit_adam", "no --use_8bit_adam", "bf16 --fsdp")
    assert [each["flags"] for each in found] == [f"--mixed_precision {way}" for way in ways]
    for each in found:
        assert len(each["losses"]) == 20 and each["not finite"] == 0 and each["falls by"] > 0

    monkeypatch.setattr(gpu, "run_wave", None)  # all is there
    gpu.main(gpu.parse_args(flags))
    assert json.loads((tmp_path / "losses.json").read_text()) == found
    with pytest.raises(SystemExit, match="too little of the 0 minutes is left; the same command goes on with resume"):
        gpu.main(gpu.parse_args([*flags, "--slice", "5", "--minutes", "0"]))
    with pytest.raises(SystemExit, match="--size full needs a GPU"):
        gpu.parse_args(["--slice", "1"])


def test_gpu_benchmark_finds_the_largest_batch_that_fits(tmp_path, monkeypatch):
    tried = []

    def run_wave(runs: list[gpu.Run], *where) -> list[dict]:
        tried.append([(run.gibibytes, run.settings["batch"]) for run in runs])
        steps = {"1": 9.0, "4": 9.0, "8": 9.0, "12": 0.1, "16": 3.0, "20": 5.0}  # it waits for its turn in step 9
        rows = [{"step": int(number), "images_per_second": speed} for number, speed in steps.items()]
        fits = [run.settings["batch"] < run.gibibytes / 2 for run in runs]
        return [{"rows": rows} if each else {"error": step.FITS_NOT} for each in fits]

    monkeypatch.setattr(gpu, "ON_GPU", True)
    monkeypatch.setattr(gpu, "LARGEST_BATCH", 64)
    monkeypatch.setattr(gpu, "run_wave", run_wave)
    monkeypatch.setattr(gpu, "prepare_inputs", lambda *options: None)
    monkeypatch.setattr(gpu, "describe_device", lambda device: "a GPU")
    monkeypatch.setattr(gpu.os, "cpu_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(total_memory=50 * 2**30))
    case = gpu.Case("sd21", "bk_tiny", "", {12: 4, 18: 16, 24: 2, 60: 1})
    monkeypatch.setattr(gpu, "MEMORY", {2: (case,)})
    for _ in range(2):  # the second time all is there, what did not fit among it
        results = gpu.Results(tmp_path / "memory.json", 1)
        gpu.measure_memory(2, results, "tiny", tmp_path)
        assert tried == [  # as many at once as the GPU holds; each step is the next batch of every card
            [(12, 4), (12, 8), (18, 16)],
            [(18, 32), (24, 2)],
            [(24, 4)],
            [(18, 8), (24, 8)],
            [(24, 16)],
        ]
    found = {(each["limit GiB"], each["batch"]): each for each in results.found}
    assert found[12, 4]["images per second"] == 4 and found[12, 8]["error"] == step.FITS_NOT


def test_a_teacher_that_cannot_be_written_leaves_the_other_runs(tmp_path, monkeypatch):
    def run_program(command: list[str], **options) -> subprocess.CompletedProcess:
        failed = "sdxl" in command
        return subprocess.CompletedProcess(command, int(failed), "Traceback\nValueError: no such width\n" * failed)

    monkeypatch.setattr(step.subprocess, "run", run_program)
    monkeypatch.setattr(gpu, "run_wave", lambda runs, *where: [{"rows": []} for _ in runs])
    results = gpu.Results(tmp_path / "losses.json", 8)
    runs = [gpu.Run({"script": script}, script, []) for script in ("unet", "sdxl")]
    good, bad = gpu.run_all(results, runs, "tiny", tmp_path, lambda run, found: found)
    assert "error" not in good and bad["error"] == "sdxl's teacher: ValueError: no such width"


def test_gpu_benchmark_takes_no_other_error_for_a_lack_of_memory(tmp_path, monkeypatch):
    """It says nothing of the batch: neither half of it is tried, nor is it kept as a result."""
    tried = []

    def run_wave(runs: list[gpu.Run], *where) -> list[dict]:
        tried.extend(run.settings["batch"] for run in runs)
        return [{"error": "exit code -9"} for _ in runs]

    monkeypatch.setattr(gpu, "run_wave", run_wave)
    monkeypatch.setattr(gpu, "prepare_inputs", lambda *options: None)
    monkeypatch.setattr(gpu, "MEMORY", {2: (gpu.Case("sd21", "bk_tiny", "", {12: 1}),)})
    for _ in range(2):
        gpu.measure_memory(2, gpu.Results(tmp_path / "memory.json", 1), "tiny", tmp_path)
    assert tried == [1, 1]
    texts = "the sample grid does not fit the GPU: CUDA", "--train_batch_size 4 does not fit the GPU: CUDA"
    ends = [subprocess.CompletedProcess([], 1, text) for text in texts]
    assert [step.is_measured(step.read_measured(end, tmp_path, "a run")) for end in ends] == [False, True]


def test_a_slice_ends_soon_after_its_minutes(tmp_path, monkeypatch):
    results = gpu.Results(tmp_path / "memory.json", 8)
    assert results.seconds_left() == gpu.LIMIT
    results.started -= 7 * 60
    results.check_time()
    results.started -= 30  # what starts now would be killed while it starts
    assert 100 < results.seconds_left() < 115
    with pytest.raises(SystemExit, match="too little of the 8 minutes is left; the same command goes on with memory"):
        results.check_time()
    monkeypatch.setattr(gpu, "TESTS", "tests/no_such_tests.py")
    monkeypatch.setattr(gpu.Results, "seconds_left", lambda results, most: 0.1)
    gpu.run_tests(results, "tiny", tmp_path)
    assert "timed out after 0.1 seconds" in results.found[0]["error"]


def test_tests_that_a_gpu_leaves_out_exist():
    for test in gpu.CPU_ONLY:
        path, _, name = test.partition("::")
        assert path in gpu.TESTS and f"\ndef {name}(" in (ROOT / path).read_text()


def test_gpu_benchmark_goes_on_with_stored_steps(tmp_path, monkeypatch):
    """Where the folder of the results is a new one."""
    monkeypatch.setattr(gpu, "RESULTS", tmp_path / "stored")
    wanted = step.list_cells(
        step.parse_args(["--script", "dit", "--cache", "latents", "--batch", "2", "--steps", "2", "--size", "tiny"])
    )
    kept = {"error": step.FITS_NOT, "command": "benchmarks/gpu.sh 4"}
    step.write_json(tmp_path / "stored" / "steps.json", [cell | kept for cell in wanted])
    monkeypatch.setattr(gpu, "GRIDS", ("--script dit --cache latents --batch 32",))
    monkeypatch.setattr(step, "measure", None)  # all is there
    gpu.time_steps(gpu.Results(tmp_path / "new" / "steps.json", 1), "tiny", tmp_path)
    assert json.loads((tmp_path / "new" / "steps.json").read_text())[0]["error"] == step.FITS_NOT


def test_gpu_benchmark_adds_estimates(tmp_path):
    settings = {"script": "unet", "device": "NVIDIA H200", "flags": "--mixed_precision bf16", "batch": 32}
    results = gpu.Results(tmp_path / "memory.json", 1)
    results.found = [{**settings, "images per second": 100.0}, {**settings, "error": step.FITS_NOT}]
    gpu.add_estimates(results)
    measured, failed = json.loads((tmp_path / "memory.json").read_text())
    assert 1000 < measured["estimated MiB"] < 2000
    assert measured["share of the peak"] == pytest.approx(measured["TFLOP/s"] / 989.4)
    assert failed == {**settings, "error": step.FITS_NOT}
    with pytest.raises(SystemExit, match="--estimates is for the slices 1, 2, 3 and 7; --slice is 5"):
        gpu.parse_args(["--slice", "5", "--estimates"])


def test_processes_start_side_by_side_and_are_timed_in_turns(tmp_path):
    code = (
        "import sys, time; sys.path.insert(0, 'benchmarks'); from turns import wait_for_turn\n"
        "log = open(sys.argv[1], 'a'); log.write('start\\n'); log.flush(); time.sleep(0.2); wait_for_turn()\n"
        "log.write(sys.argv[2] + '\\n'); log.flush(); time.sleep(0.3); print('said', sys.argv[2])\n"
        "log.write(sys.argv[2] + '\\n'); log.close()"
    )
    log = tmp_path / "log.txt"
    commands = [[sys.executable, "-c", code, str(log), name] for name in "abc"]
    commands += [[sys.executable, "-c", "raise SystemExit('error: it ended early')"]]
    ended = list(turns.run_in_turns(commands, ROOT, {}, 60))
    assert log.read_text().split() == ["start"] * 3 + ["a", "a", "b", "b", "c", "c"]
    assert [each.returncode for each in ended] == [0, 0, 0, 1]
    assert [each.stdout.strip() for each in ended] == ["said a", "said b", "said c", "error: it ended early"]
    endless = [sys.executable, "-c", "import time; print('here', flush=True); time.sleep(60)"]
    for timed in (True, False):
        (killed,) = turns.run_in_turns([endless], ROOT, {}, 2, timed)
        assert killed.returncode == -signal.SIGKILL and killed.stdout == "here\n"


def test_one_slow_start_takes_no_turn_from_the_others(tmp_path):
    code = (
        "import sys; sys.path.insert(0, 'benchmarks'); from turns import wait_for_turn; wait_for_turn(); print('done')"
    )
    commands = [[sys.executable, "-c", "import time; time.sleep(60)"], [sys.executable, "-c", code]]
    slow, ready = turns.run_in_turns(commands, ROOT, {}, 10)
    assert slow.returncode == -signal.SIGKILL and (ready.returncode, ready.stdout) == (0, "done\n")


def test_step_benchmark_keeps_other_cells_where_one_fails(tmp_path, monkeypatch, capsys):
    errors = iter(({"error": "error: a flag"}, {"error": step.FITS_NOT}))
    monkeypatch.setattr(step, "prepare_inputs", lambda *options: None)
    monkeypatch.setattr(step, "measure", lambda cells, *options: [next(errors) for _ in cells])
    flags = ["--script", "dit", "--cache", "none", "latents", "--side_by_side", "2"]
    args = step.parse_args([*flags, "--json", str(tmp_path / "cells.json"), "--inputs", str(tmp_path)])
    with pytest.raises(SystemExit, match="1 of 2 cells ended with an error; the same command measures them again"):
        step.main(args, "a command")
    assert "| error: a flag |" in capsys.readouterr().out
    errors = iter(({"error": step.FITS_NOT},))  # the other one is a result
    step.main(args, "a command")
