"""The experiments of benchmarks/evidence.py: what is chosen, compared and drawn, and how a run is measured."""

import itertools
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

import evidence
import samplers
import study
from tiny_models import save_pixel_pipeline


ROWS = {loss: {"kd_loss": loss} for loss in ("none", "mse", "rms")}
EXPERIMENT = evidence.Experiment("Which one?", ROWS, (0, 1, 2), {"student": 0.5}, (("mse", "none"),))
DISTANCES = {"none": (9, 9, 9), "mse": (4, 5, 6), "rms": (3, 5, 4)}


def line_of(run: study.Run, distance: float) -> dict:
    figures = {
        "fd_50": distance,
        "fd_10": 2 * distance,
        "kid_50": distance / 1000,
        "kid_10": distance,
        "curve": {"5": 8.0, "10": 7.0},
    }
    figures |= {"errors": [0.1] * len(study.TIMESTEPS), "gradients": [1 / 11] * len(study.TIMESTEPS)}
    figures["shifts"] = [distance / 2560] * len(study.TIMESTEPS)  # half the variance of the mean where it is 5
    return {**run._asdict(), "figures": figures}


def by_key(lines: list[dict]) -> dict[str, dict]:
    return {study.run_of(line).key: line for line in lines}


@pytest.fixture
def page(tmp_path, monkeypatch):
    """Writes the results of the lines; returns the page."""

    def write(lines: list[dict], experiment: evidence.Experiment) -> str:
        (tmp_path / "runs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        monkeypatch.setattr(evidence, "EXPERIMENTS", {"one": lambda: experiment})
        monkeypatch.setattr(study, "make_fork_server", None)  # nothing is run
        flags = ["--no_runs", "--results", str(tmp_path), "--folder", str(tmp_path / "study")]
        evidence.main(evidence.parse_args(flags))
        return (tmp_path / "README.md").read_text()

    return write


def test_runs_are_compared_by_seed_with_the_best_of_a_group(page, tmp_path):
    lines = [line_of(run, DISTANCES[run.name][run.seed]) for run in evidence.list_runs("one", EXPERIMENT)]
    text = page(lines, EXPERIMENT)
    # the differences -1, 0, -2: their mean -1, its standard error 1 / √3, and t(2) = 4.303
    assert "| rms | 4.0 ± 0.6 | 8.0 ± 1.2 | 4.0 ± 0.6 | -1.00 (-3.48 to +1.48) |" in text
    assert "| mse | 5.0 ± 0.6 | 10.0 ± 1.2 | 5.0 ± 0.6 | – |" in text and "difference to `mse`" in text
    assert "Seeds: 3." in text and "![Which one?](one.png)" in text
    assert np.array(Image.open(tmp_path / "one.png").convert("L")).std() > 5  # something is drawn
    assert "Not finished" in page(lines[1:], EXPERIMENT) and "Spearman" not in text

    (tmp_path / "bounds-16.json").write_text('{"real images": 0.1, "white noise": 8.0}')
    for line in lines:  # the error at the noisy end grows with the distance, that at the other end falls
        line["figures"]["errors"] = [1 / line["figures"]["fd_50"], *[line["figures"]["fd_50"]] * 10]
    text = page(lines, EXPERIMENT._replace(pairs=(("none", "rms"),)))
    assert "Runs that have learned the mean of the noise: none 0 of 3, mse 1 of 3, rms 2 of 3.\n" in text
    assert "- `none` less `rms`: +5.00 (+2.52 to +7.48) by 50 steps, +10.00 (+5.03 to +14.97) by 10; " in text
    assert re.search(r"by 10; kernel distance · 10³ \+5 \(\+3 to \+7\), \+5000 \(\+2516 to \+7484\)\n", text)
    for which in ("all: 9", "of rows nearer than white noise: 6"):
        for steps in (50, 10):
            assert f"| {steps}, {which} | -1.00 | +1.00 |{' +1.00 |' * 9}\n" in text


def test_each_row_gets_a_learning_rate_between_two_worse_on_another_seed(page):
    experiment = EXPERIMENT._replace(search=evidence.Search(5))
    best, found, rounds = {"none": 16e-3, "mse": 8e-3, "rms": 64e-3}, [], []
    while search := evidence.list_search("one", experiment, by_key(found)):
        assert evidence.tune("one", experiment, by_key(found)) is None
        assert {run.seed for run in search}.isdisjoint(experiment.seeds)
        for run in search[:4]:  # stopped after four
            off = abs(np.log2(run.flags["learning_rate"] / best[run.name.split()[0]]))
            found.append(line_of(run, off))
        rounds.append(len(search))
    assert sum(min(count, 4) for count in rounds) == len(found) == 3 + 4 + 5
    tuned = evidence.tune("one", experiment, by_key(found))
    assert {row: flags["learning_rate"] for row, flags in tuned.rows.items()} == best
    assert tuned.rows["none"]["kd_loss"] == "none"
    lines = [line_of(run, DISTANCES[run.name][run.seed]) for run in evidence.list_runs("one", tuned)]
    assert "in 5 steps of seed 100: none 0.016, mse 0.008, rms 0.064." in page(found + lines, experiment)


def test_a_search_takes_the_mean_of_its_seeds(page):
    """By its first seed alone it would take 2."""
    distances = {0.5: (6, 6), 1: (5, 5), 2: (1, 11), 4: (7, 7)}
    rows = {"mse": {"kd_loss": "mse"}}
    search = evidence.Search(5, seeds=(100, 101), first=2.0)
    experiment, found = EXPERIMENT._replace(rows=rows, compared_with=(("mse",),), search=search), []
    while runs := evidence.list_search("one", experiment, by_key(found)):
        found += [line_of(run, distances[run.flags["learning_rate"]][run.seed - 100]) for run in runs]
    tuned = evidence.tune("one", experiment, by_key(found))
    assert len(found) == 2 * len(distances) and tuned.rows["mse"]["learning_rate"] == 1
    lines = [line_of(run, 1) for run in evidence.list_runs("one", tuned)]
    assert "its half and its double in 5 steps of seed 100 and 101: mse 1." in page(found + lines, experiment)


def test_what_two_experiments_share_runs_once(page):
    """A run is known by what shapes its figures, not by its name, its experiment or a flag that is the default."""
    lines = [line_of(run, DISTANCES[run.name][run.seed]) for run in evidence.list_runs("other", EXPERIMENT)]
    rows = {"nothing": {"kd_loss": "none", "student_init": "random"}, "squares": {"kd_loss": "mse"}}
    experiment = EXPERIMENT._replace(rows=rows, compared_with=(("squares",),))
    assert "| nothing | 9.0 ± 0.0 |" in page(lines, experiment)
    for other in ({"samples": 10}, {"teachers": dict.fromkeys(rows, "quarter")}, {"shared": {"student": 0.25}}):
        assert "Not finished" in page(lines, experiment._replace(**other))


def test_a_row_keeps_its_own_steps_while_its_rate_is_searched():
    experiment = EXPERIMENT._replace(search=evidence.Search(5), rows={"short": {}, "long": {"max_train_steps": 50}})
    steps = {run.name.split()[0]: run.flags["max_train_steps"] for run in evidence.list_search("one", experiment, {})}
    assert steps == {"short": 5, "long": 50}


def test_distances_are_drawn_by_the_size_of_the_teacher(page, tmp_path):
    rows = {f"{loss}, {size}": {"kd_loss": loss} for loss in ("mse", "rms") for size in ("71k", "280k")}
    teachers = {row: "quarter" if row.endswith("280k") else "sixteenth" for row in rows}
    experiment = EXPERIMENT._replace(rows=rows, compared_with=(("mse, 71k",),), teachers=teachers)
    lines = [line_of(run, run.seed + len(run.name)) for run in evidence.list_runs("one", experiment)]
    for name, size, distance in (("quarter", 280177, 2.0), ("sixteenth", 71033, 3.0)):
        own = line_of(study.Run(study.teachers_of(study.SCALES["cpu"]), name, 0, {}, teacher=name), distance)
        own["figures"]["parameters"] = size
        lines.append(own)
    text = page(lines, experiment)
    assert "themselves, 50 steps: 71,033 parameters 3.0, 280,177 parameters 2.0." in text
    image = Image.open(tmp_path / "one.png").convert("L")
    assert np.array(image.crop((3 * image.width // 4, 0, image.width, image.height))).std() > 5


def test_distances_are_drawn_by_the_learning_rate(page, tmp_path):
    rows = {
        f"{loss} at {rate}": {"kd_loss": loss, "learning_rate": rate} for loss in ("mse", "rms") for rate in (1, 2)
    }
    experiment = EXPERIMENT._replace(rows=rows, compared_with=(("mse at 1", "mse at 2"), ("rms at 1", "rms at 2")))
    lines = [line_of(run, run.seed + run.flags["learning_rate"]) for run in evidence.list_runs("one", experiment)]
    text = page(lines, experiment)
    assert "| difference to `mse at 1` | difference to `rms at 1` |" in text
    panel = Figure().subplots()
    evidence.draw_ends(evidence.collect("one", experiment, by_key(lines)), panel)
    assert panel.get_legend_handles_labels()[1] == ["mse", "rms"] and panel.get_xlabel() == "learning rate"
    assert [list(drawn.lines[0].get_ydata()) for drawn in panel.containers] == [[2, 3], [2, 3]]


@pytest.mark.parametrize("name", evidence.EXPERIMENTS)
def test_experiments_are_command_lines_of_the_script(name, tmp_path):
    experiment = evidence.EXPERIMENTS[name]()
    (tmp_path / "0.png").touch()
    for run in evidence.list_runs(name, experiment) + evidence.list_search(name, experiment, {}):
        flags = {"train_data_dir": tmp_path, "pretrained_teacher_model": tmp_path, **study.flags_of(run)}
        words = [word for key, value in flags.items() for word in study.flag_of(key, value)]
        args = study.train_lift_unet.parse_args(words)
        assert args.cache_teacher is None or (args.kd_loss != "none" and not args.lambda_kd_feat)
        assert run.teacher in study.WIDTHS and experiment.scale in study.SCALES
    rows = {row for group in experiment.compared_with for row in group}
    assert rows <= set(experiment.rows)


@pytest.mark.parametrize(("name", "rates"), [("tiny-tuned", evidence.TINY_RATES), ("small", evidence.SMALL_RATES)])
def test_experiments_without_a_search_take_the_rates_that_one_has_found(name, rates):
    found = study.Study(
        evidence.ROOT, evidence.ROOT / "benchmarks/results/evidence/runs.jsonl", 1, study.SCALES["cpu"]
    )
    tuned = evidence.tune(name, evidence.EXPERIMENTS[name](), found.finished())
    assert rates == {row: tuned.rows[row]["learning_rate"] for row in rates}


def test_questions_name_the_share_of_the_teacher_that_students_have():
    """Channels are rounded to the groups of the normalisation, so a width does not tell it."""
    lines = (evidence.ROOT / "benchmarks" / "results" / "evidence" / "runs.jsonl").read_text().splitlines()
    runs = [json.loads(line) for line in lines]
    (teacher,) = (run["figures"]["parameters"] for run in runs if run["name"] == "teacher")
    named = set()
    for run in runs:
        if run["experiment"] not in evidence.EXPERIMENTS:  # a search, or one of earlier times
            continue
        share = re.search(r"a student of ([\d.]+) %", evidence.EXPERIMENTS[run["experiment"]]().question)
        if share:
            named.add(run["experiment"])
            digits = len(share[1].partition(".")[2])
            assert f"{100 * run['figures']['parameters'] / teacher:.{digits}f}" == share[1]
    assert named >= {"tiny", "tiny-longer", "small"}


@pytest.mark.parametrize(
    ("name", "count", "share"), [("teachers", 3, 0.0164), ("rates", 2, 0.0164), ("large", 3, 0.0159)]
)
def test_teachers_of_other_sizes_have_the_same_student(name, count, share, tmp_path):
    """The share is of the largest teacher."""
    experiment = evidence.EXPERIMENTS[name]()
    (tmp_path / "0.png").touch()
    pairs = {(run.teacher, run.flags["student"]) for run in evidence.list_runs(name, experiment)}
    sizes, students = {}, []
    for teacher, student in pairs:
        config = study.teacher_config(teacher, study.SCALES[experiment.scale])
        with torch.device("meta"):
            skeleton = study.UNet2DModel.from_config(config)
        sizes[teacher] = skeleton.num_parameters()
        words = ["--pretrained_teacher_model", str(tmp_path), "--train_data_dir", str(tmp_path)]
        args = study.train_lift_unet.parse_args([*words, "--student", str(student), "--student_init", "random"])
        students.append(study.train_lift_unet.build_student(skeleton, args)[0])
    assert len(pairs) == len(sizes) == count and len({str(student.config) for student in students}) == 1
    assert students[0].num_parameters() / max(sizes.values()) == pytest.approx(share, rel=0.01)
    for row in experiment.rows:
        size = row.rpartition(", ")[2]
        if size[-1] in "kM":
            count = sizes[evidence.teacher_of(experiment, row)]
            assert f"{count / 1e3:.0f}k" == size or size in (f"{count / 1e6:.1f}M", f"{count / 1e6:.0f}M")


def test_students_are_told_from_noise(page, classifier, tmp_path):
    """The page says how far real images and white noise are, which are measured once."""
    images = np.random.default_rng(0).integers(0, 60, (48, 16, 16), dtype=np.uint8)
    small = study.Study(classifier.parent, tmp_path / "runs.jsonl", 1, study.SCALES["cpu"])
    small.write_bounds(images[:24], images[24:])
    found = json.loads((tmp_path / "bounds-16.json").read_text())
    assert 0 < 10 * found["real images"] < found["white noise"]
    small.write_bounds(images[:4], images[24:])
    assert json.loads((tmp_path / "bounds-16.json").read_text()) == found
    bounds = f"real images {found['real images']:.2f}, white noise {found['white noise']:.2f}"
    assert bounds in page([], EXPERIMENT)


def test_a_row_of_samples_is_drawn_of_each_run_that_is_in_the_folder(page, tmp_path):
    small = study.Study(tmp_path, tmp_path / "runs.jsonl", 1, study.SCALES["cpu"])
    runs = evidence.list_runs("one", EXPERIMENT)
    lines = [line_of(run, 1.0) for run in runs]
    assert "one-samples.png" not in page(lines, EXPERIMENT)
    for run in runs[:2]:
        save_pixel_pipeline(small.folder_of(run))
    np.save(tmp_path / "unseen.npy", np.full((24, 16, 16), 200, dtype=np.uint8))
    picture = tmp_path / "one-samples.png"
    evidence.draw_samples("one", EXPERIMENT, small, picture)
    with Image.open(picture) as image:
        assert image.height == round(80 * 0.6 * 3)  # two rows of samples, one of photographs
        assert np.array(image.convert("L"))[-20:].mean() > 100
    assert "](one-samples.png)" in page(lines, EXPERIMENT)


def test_images_are_shrunk_or_framed():
    images = np.full((2, 28, 28), 200, dtype=np.uint8)
    assert study.fit_images(images, 16).shape == (2, 16, 16) and study.fit_images(images, 16).min() == 200
    framed = study.fit_images(images, 32)
    assert framed.shape == (2, 32, 32) and (framed[:, 2:-2, 2:-2] == 200).all() and framed.sum() == images.sum()


# ------------------------------------------------------------------------------------------------------------- slices


def test_a_slice_of_time_keeps_what_is_finished(page, tmp_path, monkeypatch, capsys):
    """The time is up in the second of three runs: the first has its line, the third does not begin."""
    begun = []

    def measure(self, run: study.Run, *args) -> dict:
        begun.append(run.name)
        if len(begun) == 2:
            self.deadline = time.monotonic()
            raise study.TimeUp
        with self.lines.open("a") as file:
            file.write(json.dumps(line_of(run, 1.0)) + "\n")
        return {"fd_50": 1.0}

    page([], EXPERIMENT._replace(seeds=(0,)))
    (tmp_path / "study" / "cpu").mkdir(parents=True)
    np.save(tmp_path / "study" / "cpu" / "unseen.npy", np.zeros((24, 16, 16), dtype=np.uint8))
    monkeypatch.setattr(study, "make_fork_server", lambda modules: None)
    monkeypatch.setattr(study.Study, "prepare", lambda self, teachers: None)
    monkeypatch.setattr(study.Study, "run", measure)
    flags = ["--minutes", "9", "--jobs", "1", "--results", str(tmp_path), "--folder", str(tmp_path / "study")]
    evidence.main(evidence.parse_args(flags))
    assert begun == ["none", "mse"] and "9 minutes are over; the same command goes on" in capsys.readouterr().err
    assert [json.loads(line)["name"] for line in (tmp_path / "runs.jsonl").read_text().splitlines()] == ["none"]
    evidence.main(evidence.parse_args(flags))
    assert begun == ["none", "mse", "mse", "rms"] and "Seeds: 1." in (tmp_path / "README.md").read_text()


def test_a_teacher_is_trained_where_it_is_missing_and_measured_once(tmp_path, monkeypatch):
    """Whoever has the stored lines alone, in a new folder, needs the teacher again."""
    calls = []

    def measure(self, run: study.Run, folder, flags) -> dict:
        calls.append("measured")
        self.lines.write_text(json.dumps(line_of(run, 1.0)) + "\n")

    monkeypatch.setattr(study.Study, "train", lambda self, folder, flags: calls.append(folder.name))
    monkeypatch.setattr(study.Study, "run", measure)
    small = study.Study(tmp_path, tmp_path / "runs.jsonl", 1, study.SCALES["cpu"])
    small.train_teacher("quarter")
    small.train_teacher("quarter")
    assert calls == ["quarter", "measured", "quarter"]


def started(method: str, target, *args) -> multiprocessing.process.BaseProcess:
    process = multiprocessing.get_context(method).Process(target=target, args=args)
    process.start()
    return process


def test_what_runs_when_the_time_is_up_is_asked_to_end(tmp_path):
    slow = started("spawn", time.sleep, 600)
    with pytest.raises(study.TimeUp):
        study.Study(tmp_path, tmp_path / "runs.jsonl", 1, study.SCALES["cpu"], minutes=0.01).complete(lambda: slow)
    assert slow.exitcode == -signal.SIGTERM


def test_a_signal_ends_what_runs(tmp_path):
    """Trainings lead groups of their own: a closed terminal alone would leave them there."""
    slow, before = started("spawn", time.sleep, 600), signal.getsignal(signal.SIGHUP)
    small = study.Study(tmp_path, tmp_path / "runs.jsonl", 1, study.SCALES["cpu"])
    with small.stopped_by_signals(), ThreadPoolExecutor(1) as pool:
        job = pool.submit(small.complete, lambda: slow)
        os.kill(os.getpid(), signal.SIGHUP)
        with pytest.raises(study.TimeUp):
            job.result(60)
    assert slow.exitcode == -signal.SIGTERM and signal.getsignal(signal.SIGHUP) is before


def test_a_failing_run_is_named_at_once(tmp_path, monkeypatch):
    """It is not hidden by an earlier one that the end of the time stops."""

    def run(self, run: study.Run, *args) -> dict:
        if run.name == "mse":
            raise SystemExit("error: mse ended with exit code 1")
        time.sleep(2)
        raise study.TimeUp

    monkeypatch.setattr(study, "make_fork_server", lambda modules: None)
    monkeypatch.setattr(study.Study, "prepare", lambda self, teachers: None)
    monkeypatch.setattr(study.Study, "run", run)
    small = study.Study(tmp_path, tmp_path / "runs.jsonl", 2, study.SCALES["cpu"])
    with pytest.raises(SystemExit, match="mse ended with exit code 1"):
        small.run_all(evidence.list_runs("one", EXPERIMENT)[:2])


def test_steps_at_which_a_slice_ended_are_in_no_curve(page):
    runs = evidence.list_runs("one", EXPERIMENT)
    lines = [line_of(run, 1.0) for run in runs]
    lines[0]["figures"]["curve"]["7"] = 3.0
    page(lines, EXPERIMENT)
    assert study.interval_of(["--checkpointing_steps", "50"]) == 50 and study.interval_of(["--seed", "1"]) == 1


def test_exit_codes_are_right_where_processes_end_at_one_time(tmp_path):
    """multiprocessing by itself takes about one in ten of these for a failure: two threads read its exit code."""
    four = study.Study(tmp_path, tmp_path / "runs.jsonl", 4, study.SCALES["cpu"])
    with ThreadPoolExecutor(four.jobs) as pool:
        codes = list(pool.map(lambda _: four.complete(lambda: started("forkserver", int)), range(200)))
    assert codes == [0] * 200


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--jobs", "0"], "--jobs 0 is too few; pass at least 1"),
        (["--minutes", "0"], "--minutes 0.0 is no time; pass more, or leave it out"),
        (["--only", "large"], "--only large is of another scale; pass --scale gpu"),
        (["--scale", "gpu", "--only", "tiny"], "--only tiny is of another scale; pass --scale cpu"),
        (["--scale", "gpu"], "--scale gpu needs a GPU, and there is none; pass --scale cpu"),
    ],
)
def test_what_cannot_be_run_is_refused(flags, says, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=f"error: {says}"):
        evidence.parse_args(flags)


# ------------------------------------------------------------------------------------------------- what is measured


def test_a_run_is_measured_with_its_checkpoints(run, teacher, images, classifier, tmp_path, monkeypatch):
    unseen = np.random.default_rng(0).integers(0, 256, (24, 16, 16), dtype=np.uint8)
    np.save(tmp_path / "unseen.npy", unseen)
    student = tmp_path / "student"
    words = ["--pretrained_teacher_model", str(teacher), "--train_data_dir", str(images), "--student", "0.5"]
    words += ["--output_dir", str(student), "--max_train_steps", "4", "--checkpointing_steps", "2", "--kd_loss", "mse"]
    words += ["--train_batch_size", "2", "--num_validation_images", "1", "--num_inference_steps", "1"]
    words += ["--cache_dir", str(tmp_path / "cache"), "--report_to", "none", "--lambda_kd_feat", "0"]
    run("train_lift_unet", *words)
    monkeypatch.setattr(study, "SAMPLING_STEPS", (2,))
    monkeypatch.setattr(study, "SAMPLE_BATCH", 12)
    monkeypatch.setattr(study, "CURVE_SAMPLES", 24)
    threads = torch.get_num_threads()
    study.measure(student, teacher, classifier.parent, 24, words, tmp_path / "figures.json")
    torch.set_num_threads(threads)
    found = json.loads((tmp_path / "figures.json").read_text())
    assert found["fd_2"] > 0 and list(found["curve"]) == ["2", "4"]
    assert found["curve"]["4"] != found["curve"]["2"]
    for name in ("errors", "shifts", "gradients"):
        assert len(found[name]) == len(study.TIMESTEPS) and min(found[name]) > 0
    assert sum(found["gradients"]) == pytest.approx(1)


def test_students_are_sampled_in_other_ways(page, classifier, tmp_path, monkeypatch):
    """Each by every sampler, once; a line for each that is finished."""
    experiment = EXPERIMENT._replace(rows={loss: {"kd_loss": loss} for loss in ("none", "mse", "place")})
    folder = tmp_path / "study" / "cpu"
    small = study.Study(folder, tmp_path / "runs.jsonl", 1, study.SCALES["cpu"])
    runs = evidence.list_runs("one", experiment)
    page([line_of(run, 1.0) for run in runs], experiment)
    monkeypatch.setattr(samplers, "EXPERIMENTS", evidence.EXPERIMENTS)
    flags = ["--experiment", "one", "--results", str(tmp_path), "--folder", str(folder.parent), "--jobs", "1"]
    with pytest.raises(SystemExit, match=r"^error: --folder has no row with all its students; run the experiment by"):
        samplers.main(samplers.parse_args(flags))
    for at, model in enumerate((folder / "teacher", *map(small.folder_of, runs))):
        save_pixel_pipeline(model)
        (model / "place.txt").write_text(str(at))
    classifier.rename(folder / "classifier.pt")
    ramps = np.linspace(0, 1, 256).reshape(16, 16) * np.random.default_rng(0).uniform(100, 255, (24, 1, 1))
    np.save(folder / "unseen.npy", ramps.astype(np.uint8))

    steps = {name: sampler._replace(steps=sampler.steps // 10) for name, sampler in samplers.SAMPLERS.items()}
    monkeypatch.setattr(samplers, "SAMPLERS", steps)
    monkeypatch.setattr(samplers, "SAMPLES", 12)
    threads = torch.get_num_threads()
    noisy = samplers.measure(folder / "teacher", folder, "DDIM, 10 from 999")
    torch.set_num_threads(threads)
    assert noisy["distance"] > 0 and noisy["noise"] == 1  # it is random

    def measure(model, folder, name: str) -> dict[str, float]:
        at = int((model / "place.txt").read_text())
        return {"distance": at + steps[name].steps, "noise": at / 100}

    monkeypatch.setattr(samplers, "ProcessPoolExecutor", lambda jobs, context: ThreadPoolExecutor(jobs))
    monkeypatch.setattr(samplers, "measure", measure)
    samplers.main(samplers.parse_args([*flags, "--samplers", samplers.PUBLISHED]))
    lines = (tmp_path / "samplers-one.jsonl").read_text().splitlines()
    assert len(lines) == 1 + len(runs)
    assert f"\n| | {samplers.PUBLISHED} |\n" in (tmp_path / "samplers-one.md").read_text()
    samplers.main(samplers.parse_args(flags))
    lines = (tmp_path / "samplers-one.jsonl").read_text().splitlines()
    assert len(lines) == len(steps) * (1 + len(runs))
    text = (tmp_path / "samplers-one.md").read_text()
    assert "| none | 14.0 ± 1.7 | 9.0 ± 1.7 | 9.0 ± 1.7 | 5.0 ± 1.7 | 5.0 ± 1.7 | 9.0 ± 1.7 |" in text
    assert "| the teacher | 10.0 |" in text and "| place | 6 ± 2 |" in text
    assert "| none | +2.00 (+2.00 to +2.00) |" in text

    monkeypatch.setattr(samplers, "measure", None)  # nothing is left
    (tmp_path / "samplers-one.jsonl").write_text("".join(f"{line}\n" for line in reversed(lines)))
    picture = tmp_path / "samplers-one.png"
    for _ in range(2):  # the second time without students, as on another machine
        drawn = picture.read_bytes()
        samplers.main(samplers.parse_args(flags))
        assert (tmp_path / "samplers-one.md").read_text() == text and picture.read_bytes() == drawn
        shutil.rmtree(folder / "runs", ignore_errors=True)


@pytest.mark.parametrize(
    "name", ["tiny-tuned", "tiny-longer", "tiny-pruned", "pruned-rates", "small", "ablations", "long"]
)
def test_the_page_of_samplers_says_what_was_measured(name):
    results = evidence.ROOT / "benchmarks" / "results" / "evidence" / f"samplers-{name}.jsonl"
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    runs = evidence.list_runs(name, evidence.EXPERIMENTS[name]())
    counts = Counter((line["name"], line["sampler"]) for line in lines)
    # Learning rates are compared by the paper's sampler alone.
    wanted = [samplers.PUBLISHED] if name == "pruned-rates" else samplers.SAMPLERS
    missing = {key for run in runs for key in itertools.product([run.name], wanted) if key not in counts}
    # What was measured before there was this sampler, of students that are gone.
    assert missing <= {
        (run.name, samplers.PUBLISHED) for run in runs if name in ("tiny-tuned", "tiny-longer", "small")
    }
    seeds = len({run.seed for run in runs})
    assert all(count == (1 if row == samplers.TEACHER else seeds) for (row, _), count in counts.items())
    assert samplers.describe(name, lines) == results.with_suffix(".md").read_text()


def test_ddim_can_start_later_with_the_same_steps():
    schedule = study.DDPMScheduler()
    first = {}
    for name, sampler in samplers.SAMPLERS.items():
        made = sampler.make(schedule)
        made.set_timesteps(sampler.steps)
        first[name] = f"{len(made.timesteps)} from {made.timesteps[0]}"
    assert [name.split(", ")[1] for name in first] == list(first.values())


def test_noise_is_rougher_than_photographs():
    ramp, flat = torch.linspace(0, 255, 256).view(1, 16, 16), torch.full((1, 16, 16), 7.0)
    noise = torch.randn(1, 64, 64, generator=torch.Generator().manual_seed(0)) * 9
    assert samplers.roughness(noise[None]).item() == pytest.approx(2 / math.pi**0.5, rel=0.02)
    found = samplers.roughness(torch.stack([ramp, ramp / 10, flat]))
    assert found.tolist() == pytest.approx([8.5 / ramp.std().item()] * 2 + [0], rel=1e-3)


def test_gradients_go_where_the_loss_weighs(teacher, tmp_path):
    """A loss of one size per element has its gradient where an element has an error, not where the error is large."""
    (tmp_path / "0.png").touch()
    source = ["--pretrained_teacher_model", str(teacher), "--train_data_dir", str(tmp_path), "--lambda_task", "0"]
    original = study.UNet2DModel.from_pretrained(teacher, subfolder="unet").eval()
    smaller = save_pixel_pipeline(tmp_path / "other", block_out_channels=[8, 16])
    other = study.UNet2DModel.from_pretrained(smaller, subfolder="unet").eval()
    images = torch.rand(44, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 255
    shares = {}
    for loss in ("mse", "rms"):
        shares[loss] = study.share_gradients(other, original, images, [*source, "--kd_loss", loss])
    assert np.ptp(shares["rms"]) < 1e-4  # each sample's gradient has the same norm
    assert np.ptp(shares["mse"]) > 100 * np.ptp(shares["rms"])
