"""The installed versions work together; README.md and docs/ show what exists and was measured."""

import importlib
import json
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from conftest import ROOT, run_file
from packaging.requirements import Requirement

import evidence
import samplers
import study
import train_lift_unet


def requirements() -> list[Requirement]:
    """Those of this machine."""
    lines = (line.partition("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines())
    required = [Requirement(line) for line in lines if line]
    return [each for each in required if each.marker is None or each.marker.evaluate()]


@pytest.mark.parametrize("requirement", requirements(), ids=lambda requirement: requirement.name)
def test_installed_versions_are_in_the_ranges(requirement):
    assert version(requirement.name) in requirement.specifier
    words = (ROOT / "requirements.lock").read_text().lower().split()
    locked = dict(word.split("==") for word in words if "==" in word)
    assert locked[requirement.name.lower()] in requirement.specifier


def test_torch_torchvision_cleanfid_peft_and_xformers_work_in_one_process():
    code = """
import torch, torchvision, peft, xformers._cpp_lib, xformers.ops, cleanfid.fid, numpy
layer = torch.nn.Sequential(torch.nn.Linear(4, 4))
adapted = peft.get_peft_model(layer, peft.LoraConfig(target_modules=["0"], r=2))
assert any("lora_A" in name for name, _ in adapted.named_parameters())
boxes = torch.tensor([[0.0, 0, 2, 2], [0, 0, 2, 2]])
assert torchvision.ops.nms(boxes, torch.tensor([0.5, 0.9]), 0.5).tolist() == [1]
one, zero = numpy.eye(3), numpy.zeros(3)
assert abs(cleanfid.fid.frechet_distance(zero, one, zero + 2, one) - 12) < 1e-6
assert callable(xformers.ops.memory_efficient_attention)
assert xformers._cpp_lib._cpp_library_load_exception is None  # its kernels are those of this torch
"""
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr


def test_a_mistyped_flag_is_answered_without_warnings():
    """Of every script, in one process: an import that warns does so when it comes first."""
    code = """
import importlib, sys
for name in sys.argv[1:]:
    sys.argv = [f"{name}.py", "--traindatadir", "images"]
    try:
        importlib.import_module(name).parse_args()
    except SystemExit as end:
        print("ended with", end.code, flush=True)
"""
    finished = run_file("-c", code, *SCRIPTS)
    *answers, rest = finished.stdout.split("ended with 2\n")
    assert len(answers) == len(SCRIPTS) and not rest and "warning" not in finished.stdout.lower()
    for script, answer in zip(SCRIPTS, answers):
        assert answer.startswith(f"usage: {script}.py")
        assert answer.endswith("error: unrecognized arguments: --traindatadir images\n")


# ------------------------------------------------------------------------------------------------- README.md and docs/


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = ["train_lift_unet", "train_lift_sd21", "train_lift_dit", "train_lift_sd3", "train_lift_sdxl"]
RESULTS = sorted((ROOT / "demos" / "results").glob("*/results.md"))


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def read_tables(path: Path) -> list[list[str]]:
    """The lines of each Markdown table of a file."""
    tables = [[]]
    for line in [*path.read_text().splitlines(), ""]:
        if line.startswith("|"):
            tables[-1].append(line)
        elif tables[-1]:
            tables.append([])
    return tables[:-1]


def read_links(path: Path) -> list[str]:
    """The targets of a page's links and pictures, without code blocks."""
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.M | re.S)
    return re.findall(r"\]\(([^)\s]+)\)", text)


def headings_of(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)", path.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_in_a_command_exists(script, capsys):
    pages = [*PAGES, ROOT / "eval" / "README.md"]
    commands = [command for page in pages for command in find_commands(page, f"{script}.py")]
    assert len(commands) >= 2
    with pytest.raises(SystemExit):
        importlib.import_module(script).parse_args(["--help"])
    known = set(re.findall(r"--[a-z0-9_]+", capsys.readouterr().out))
    for command in commands:
        assert set(re.findall(r"--[a-z0-9_]+", command)) <= known, command


def find_commands(page: Path, script: str) -> list[str]:
    """The commands of a page that run the script, from its name on, with their continued lines."""
    return re.findall(rf"{re.escape(script)}(?:\\\n|[^\n`])*", page.read_text())


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_relative_link_leads_somewhere(page):
    for link in read_links(page):
        target, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        path = page.parent / target if target else page
        assert path.exists(), link
        assert not anchor or anchor in headings_of(path), link


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_table_has_more_than_six_columns(page):
    for table in read_tables(page):
        assert all(line.count("|") - line.count("\\|") <= 7 for line in table), table[0]


def test_readme_says_what_its_commands_take():
    """The commands of the table of targets, by the dry runs of exactly their flags."""
    readme = (ROOT / "README.md").read_text()
    runs = json.loads((ROOT / "benchmarks" / "results" / "dry-runs.json").read_text())
    memory = {(run["script"], run["flags"]): run["GiB"] for run in runs}
    command = r"`train_lift_(\w+)\.py (?:--pretrained_teacher_model teacher )?(--student \w+) [^`]*`"
    unet, *others = [memory[script, flags] for script, flags in re.findall(command, readme)]
    sd21, sdxl, dit, sd3 = map(round, others)
    assert f"U-Net's\n{unet} GiB are without" in readme
    taken = f"{sd21} GiB (SD 2.1), {sdxl} (SDXL), {dit} (DiT), {sd3} (SD 3)"
    assert f"**As printed the commands take more: {taken}.**" in readme


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 180


@pytest.mark.parametrize("results", RESULTS, ids=lambda path: path.parent.name)
def test_measured_tables_and_samples_are_shown(results):
    """The table of all seeds of each results.md, or its first, is in README.md or docs/, with the samples."""
    table = next((table for table in read_tables(results) if "difference to" in table[0]), read_tables(results)[0])
    assert len(table) >= 5
    shown = [page for page in PAGES if table in read_tables(page)]
    assert shown, "no page has the table"
    pictures = {(page.parent / link).resolve() for page in shown for link in read_links(page)}
    assert results.with_name("samples.png").resolve() in pictures


def read_rows(table: list[str]) -> list[list[str]]:
    """The cells of a table's rows, without its head."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:]]


def test_every_loss_is_shown_with_its_flags_and_its_figures(images, teacher):
    """The figures are those that benchmarks/evidence.py has written, the flags those that it ran."""
    page = ROOT / "benchmarks" / "results" / "evidence" / "README.md"
    measured = {name: cells for name, *cells in read_rows(read_tables(page)[0])}
    (table,) = [table for table in read_tables(ROOT / "docs" / "evidence.md") if "| flags |" in table[0]]
    assert [name for name, *_ in read_rows(table)] == list(evidence.LOSSES) == list(measured)
    for name, _, distance, *differences in read_rows(table):
        assert [distance, *differences] == [measured[name][0], *measured[name][-2:]]
    (short,) = [table for table in read_tables(ROOT / "README.md") if "| flags |" in table[0]]
    source = ["--pretrained_teacher_model", str(teacher), "--train_data_dir", str(images)]
    for name, flags, *_ in read_rows(table) + read_rows(short):
        run = {"lambda_kd_feat": 0, **evidence.LOSSES[name]}
        words = [word for key in run.keys() - evidence.CACHED.keys() for word in study.flag_of(key, run[key])]
        shown, ran = (vars(train_lift_unet.parse_args(source + each)) for each in (flags.strip("`").split(), words))
        assert {key for key in shown if shown[key] != ran[key]} <= {"lambda_kd_feat"}
        assert shown["lambda_kd_feat"] == ran["lambda_kd_feat"] or shown["kd_loss"] == "none"


def test_readme_shows_the_losses_by_the_papers_sampler():
    """The figures of the README's table are those of benchmarks/samplers.py."""
    (table,) = [table for table in read_tables(ROOT / "README.md") if "| flags |" in table[0]]
    pages = {
        name: [
            {row[0]: row[1] for row in read_rows(each)}
            for each in read_tables(ROOT / "benchmarks" / "results" / "evidence" / f"samplers-{name}.md")
            if each[0].startswith(f"| | {samplers.PUBLISHED} |")
        ]
        for name in ("tiny-pruned", "long")
    }
    (pruned, _, leads, *_), (longer, *_) = pages["tiny-pruned"], pages["long"]
    assert len(table) > 8
    for name, _, distance, lead, later in read_rows(table):
        assert (distance, later) == (pruned.get(name, ""), longer.get(name, ""))
        told, written = (re.findall(r"[+-][\d.]+", text) for text in (lead, leads.get(name, "")))
        assert [float(one) for one in told] == pytest.approx([float(one) for one in written], abs=0.051)


def test_the_verdicts_tell_what_was_measured():
    """Each difference, with its interval, is one that benchmarks/evidence.py or a demo has written, rounded."""

    def read_differences(text: str) -> list[list[str]]:
        pattern = r"([+-][\d.]+)\s+\(([+-][\d.]+)\s+to\s+([+-][\d.]+)\)"
        return [list(figures) for figures in re.findall(pattern, text.replace("−", "-"))]

    def rounds_to(written: list[str], told: list[str]) -> bool:
        places = len(told[0].partition(".")[2])
        return all(abs(float(one) - float(other)) < 0.51 * 10**-places for one, other in zip(written, told))

    page = ROOT / "benchmarks" / "results" / "evidence" / "README.md"
    text = (ROOT / "docs" / "evidence.md").read_text()
    heads = "Which loss helps", "Learning rates", "A larger teacher", "A larger student"
    heads += "A pruned start", "The verdict so far", "By the paper's sampler"
    sections = [text.partition(f"\n## {head}\n")[2].partition("\n## ")[0] for head in heads]
    losses, rates, teachers, students, pruned, demos, paper = sections
    samplings = [*page.parent.glob("samplers-*.md")]
    for told, pages, least in (
        (losses, [page, *samplings], 20),
        (rates, [page], 8),
        (teachers, [page], 8),
        (students, [page, page.with_name("samplers-small.md")], 12),
        (pruned, [page, page.with_name("samplers-tiny-pruned.md")], 12),
        (demos, [*RESULTS, *samplings], 12),
        (paper, samplings, 12),
    ):
        written = [figures for each in pages for figures in read_differences(each.read_text())]
        told = read_differences(told)
        assert len(told) >= least
        assert [figures for figures in told if not any(rounds_to(one, figures) for one in written)] == []
    bounds = json.loads(page.with_name("bounds-16.json").read_text())
    for text in (losses, (ROOT / "README.md").read_text()):
        assert f"{bounds['real images']:.2f}" in text and f"{bounds['white noise']:.1f}" in text
