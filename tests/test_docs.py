"""Every training command of README.md and docs/ is one that runs: as a dry run, on teachers of the full size.

What docs/adapting.md names is there.
"""

import ast
import importlib
import json
import re
import shlex
from pathlib import Path

import diffusers
import pytest
import scale
from conftest import ROOT
from full_models import SD3_MEDIUM, save_ddpm, save_dit, save_sd3, save_sd21, save_sdxl

from tiny_models import TINY_UNET


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FILES = {  # that the commands name; the pages say what they hold
    "student.json": {"config": {"layers_per_block": 1}},
    "teacher.json": {"config": TINY_UNET},
}


def training_commands() -> list[tuple[str, str]]:
    """Page and command, from the script's name or the precision before it on, with continued lines joined."""
    found = []
    for page in PAGES:
        text = page.read_text().replace("\\\n", " ")
        command = r"(?:--mixed_precision \w+ )?train_lift_(?!pixart|ldm)\w+\.py --[^\n`]*"
        found += [(page.name, match) for match in re.findall(command, text)]
    return list(dict.fromkeys(found))


@pytest.fixture(scope="module")
def teachers(tmp_path_factory) -> dict[str, Path]:
    """SD 2.1-base, DiT-XL/2 and SD3-medium without weights; a small DDPM with random ones, which its script reads."""
    folder = tmp_path_factory.mktemp("full-size")
    blocks = {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}
    return {
        "train_lift_unet": save_ddpm(folder / "ddpm", sample_size=32, block_out_channels=[64, 128], **blocks),
        "train_lift_sd21": save_sd21(folder / "sd21"),
        "train_lift_sdxl": save_sdxl(folder / "sdxl"),
        "train_lift_dit": save_dit(folder / "dit"),
        "train_lift_sd3": save_sd3(folder / "sd3", SD3_MEDIUM),
    }


@pytest.mark.parametrize(("page", "command"), training_commands(), ids=lambda value: value[:60])
def test_a_documented_command_runs(run, teachers, tmp_path, monkeypatch, capsys, page, command):
    script = re.search(r"train_lift_\w+", command)[0]
    flags = shlex.split(command.replace(f"{script}.py ", ""))
    if "--vae" in flags:  # one that is on the Hub
        del flags[flags.index("--vae") : flags.index("--vae") + 2]
    if "none" not in flags:  # as in --kd_loss none
        flags += ["--pretrained_teacher_model", teachers[script]]
    monkeypatch.chdir(tmp_path)
    for file, content in FILES.items():
        Path(file).write_text(json.dumps(content))
    run(script, *flags, "--dry_run")
    text = capsys.readouterr().out
    assert re.search(r"student: [\d,]+ parameters, [\d,]+ MACs", text) and re.search(r"sum +[\d,.]+ MiB", text)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(FILES)  # a dry run leaves nothing behind
    if "--lora_rank" in flags:  # these aim at 12 GB, where the data are encoded too
        held = [re.search(rf"^{moment}.* ([\d,.]+) MiB", text, re.M)[1] for moment in ("beforehand", "  sum")]
        assert max(scale.MARGIN * float(each.replace(",", "")) * 2**20 for each in held) + scale.CONTEXT < 12 * 2**30


def test_the_pages_have_commands_of_every_script():
    scripts = {re.search(r"train_lift_\w+", command)[0] for _, command in training_commands()}
    assert scripts == {path.stem for path in ROOT.glob("train_lift_*.py")}
    assert any(page == "README.md" for page, _ in training_commands())


# -------------------------------------------------------------------------------------------------- docs/adapting.md


ADAPTING = (ROOT / "docs" / "adapting.md").read_text()
PROSE = re.sub(r"^```.*?^```", "", ADAPTING, flags=re.M | re.S)
SCRIPTS = sorted(ROOT.glob("train_lift_*.py"))


def defined_in(path: Path) -> set[str]:
    """The functions and classes of a file, and what it imports by name."""
    body = ast.parse(path.read_text()).body
    named = {alias.name for node in body if isinstance(node, ast.ImportFrom) for alias in node.names}
    return named | {node.name for node in body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


def identifiers_in(source: str) -> set[str]:
    """All names that stand in a program: of functions, classes, variables, parameters and attributes."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        names |= {getattr(node, field, None) for field in ("name", "id", "arg", "attr")}
    return names - {None}


def test_the_functions_of_the_table_are_in_every_script():
    """But for those that the sentence below it excepts."""
    rows = PROSE.split("| function |")[1].split("\n\n")[0].splitlines()[2:]
    functions = [name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])]
    assert len(functions) > 15
    without = re.findall(r"`(\w+)`", PROSE.split("Not in every script are")[1].split("\n\n")[0])
    have = {path: defined_in(path) for path in SCRIPTS}
    assert {name for name in functions if not all(name in names for names in have.values())} == set(without)
    assert all(any(name in names for names in have.values()) for name in functions)


def test_every_name_in_adapting_exists(capsys):
    """Flags, files, and what stands in backticks as a name in the code."""
    flags = set()
    for path in SCRIPTS:
        with pytest.raises(SystemExit):
            importlib.import_module(path.stem).parse_args(["--help"])
        flags |= set(re.findall(r"--[a-z0-9_]+", capsys.readouterr().out))
    sources = [path.read_text() for path in (*SCRIPTS, *(ROOT / "common").glob("*.py"), ROOT / "lift_utils.py")]
    known = set().union(*map(identifiers_in, sources), dir(diffusers), dir(diffusers.ModelMixin))
    named = re.findall(r"`([^`\n]+)`", PROSE)
    assert len(named) > 60
    for text in named:
        if text.startswith("--"):
            assert text.split()[0] in flags, text
        elif text.endswith((".py", "/")):
            assert (ROOT / text).exists(), text
        elif name := re.match(r"\.?([A-Za-z_]\w*)", text):
            assert name[1] in known | {"None", "vqvae"}, text  # the example's own


def test_the_imports_of_adapting_work():
    blocks = re.findall(r"^```python\n(.*?)^```", ADAPTING, flags=re.M | re.S)
    imports = [line for block in blocks for line in block.splitlines() if line.startswith(("import ", "from "))]
    assert len(imports) >= 4
    exec("\n".join(imports), {})
