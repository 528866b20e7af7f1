"""The shape of the repository: a small method, rooms without circles, the scripts side by side."""

import ast
import inspect
import itertools
import re
import sys

import pytest
from conftest import ROOT, run_file


SCRIPTS = sorted(ROOT.glob("train_lift_*.py"))
ROOMS = sorted(path for path in (ROOT / "common").glob("*.py") if path.name != "__init__.py")
MAY_TAKE_FLAGS = {
    *("parse_args", "check_script_args", "build_student", "make_dataset", "save_pipeline", "print_dry_run", "main"),
}


def name_of(path) -> str:
    return path.stem


def imports(path) -> set[str]:
    """The modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    return found


def functions(path) -> dict[str, ast.FunctionDef]:
    """The functions and classes of a file by name, in their order."""
    kinds = (ast.FunctionDef, ast.ClassDef)
    return {node.name: node for node in ast.parse(path.read_text()).body if isinstance(node, kinds)}


def parameters(path) -> list[tuple[str, ast.arg]]:
    """Each parameter of each function and method of a file, with the function's name; lambdas are not among them."""
    return [
        (node.name, argument)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
        for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
    ]


def test_the_method_is_one_small_file_on_torch_and_the_standard_library():
    path = ROOT / "lift_utils.py"
    assert len(path.read_text().splitlines()) <= 300
    assert {module.split(".")[0] for module in imports(path)} - sys.stdlib_module_names == {"torch"}


@pytest.mark.parametrize("path", ROOMS, ids=name_of)
def test_a_room_is_small_and_takes_values(path):
    assert len(path.read_text().splitlines()) < 300
    if path.stem != "arguments":
        assert not [name for name, argument in parameters(path) if argument.arg == "args"]
    assert ast.get_docstring(ast.parse(path.read_text())).count("?") >= 1  # the question it answers


def test_rooms_import_each_other_in_one_direction():
    arrows = {path.stem: {module for module in imports(path) if module.startswith("common.")} for path in ROOMS}
    arrows = {room: {module.removeprefix("common.") for module in modules} for room, modules in arrows.items()}
    assert all(len(modules - {"errors"}) <= 4 for modules in arrows.values())  # any room may say what is wrong
    while arrows:
        leaves = {room for room, modules in arrows.items() if not modules & arrows.keys()}
        assert leaves, f"a circle among {sorted(arrows)}"
        arrows = {room: modules for room, modules in arrows.items() if room not in leaves}


@pytest.mark.parametrize("path", [*SCRIPTS, *ROOMS, ROOT / "lift_utils.py"], ids=name_of)
def test_scripts_stand_alone(path):
    """No script, and nothing that it stands on, imports a script, a demo, a benchmark or eval/."""
    own = {each.stem for folder in (".", "demos", "benchmarks", "eval") for each in (ROOT / folder).glob("*.py")}
    assert imports(path) & (own - {"lift_utils"}) == set()


@pytest.mark.parametrize("path", [*SCRIPTS, *ROOMS, ROOT / "lift_utils.py"], ids=name_of)
def test_every_parameter_has_a_type(path):
    untyped = [(name, argument.arg) for name, argument in parameters(path) if argument.annotation is None]
    assert [pair for pair in untyped if pair[1] not in ("self", "cls")] == []


# -------------------------------------------------------------------------------------------------------- the scripts


@pytest.mark.parametrize("path", SCRIPTS, ids=name_of)
def test_only_few_functions_know_the_flags(path):
    assert {name for name, argument in parameters(path) if argument.arg == "args"} <= MAY_TAKE_FLAGS


@pytest.mark.parametrize("path", SCRIPTS, ids=name_of)
def test_main_can_be_read(path):
    main = functions(path)["main"]
    assert main.end_lineno - main.lineno + 1 <= 160


def test_the_scripts_have_the_same_functions_in_the_same_order():
    order = {path.stem: list(functions(path)) for path in SCRIPTS}
    shared = set.intersection(*map(set, order.values()))
    assert shared >= {
        *("parse_args", "student_config", "build_student", "check_sizes", "fill_student", "example_inputs"),
        *("make_dataset", "load_examples", "compute_losses", "sample_images", "save_pipeline"),
        *("print_dry_run", "main"),
    }
    for ours, theirs in itertools.combinations(order, 2):
        both = set(order[ours]) & set(order[theirs])
        assert [name for name in order[ours] if name in both] == [name for name in order[theirs] if name in both]


def test_what_the_scripts_repeat_is_the_same_text():
    """The loop, the set-up around it, how noise is added, and what both latent U-Nets draw and lose."""
    assert len(SCRIPTS) >= 4
    stretches = (
        ("# ---- output", "# ---- data"),
        ("# ---- optimizer, average", "# ---- what a step"),
        ("# ---- loop", "# ---- result"),
    )
    for start, end in stretches:
        texts = {}
        for path in SCRIPTS:
            main = path.read_text().split("\ndef main(")[1]
            assert main.count(start) == main.count(end) == 1, path.name
            texts[path.name] = inspect.cleandoc(main.split(start)[1].split(end)[0])
        assert len(set(texts.values())) == 1, texts.keys()
    noise = {ast.unparse(functions(path)["add_noise"]) for path in SCRIPTS if "sd3" not in path.name}
    assert len(noise) == 1
    for name in ("compute_losses", "make_draws"):
        bodies = (functions(ROOT / f"train_lift_{script}.py")[name].body for script in ("sd21", "sdxl"))
        ours, theirs = (list(map(ast.unparse, body)) for body in bodies)
        assert ours == theirs, name


@pytest.mark.parametrize("path", SCRIPTS, ids=name_of)
def test_the_docstring_has_a_command_of_the_script(path):
    text = ast.get_docstring(ast.parse(path.read_text()))
    assert re.search(rf"accelerate launch .*{path.name}", text)


@pytest.mark.parametrize("given", [None, "7"])
def test_waiting_threads_spin_shortly_unless_the_user_says_otherwise(given):
    """Set before torch is loaded: libgomp reads it then. What a user has set stays."""
    for path in SCRIPTS:
        text = path.read_text()
        assert text.index("\nfrom common.") < text.index("\nimport torch\n"), path.name
    setting = f"os.environ['GOMP_SPINCOUNT'] = '{given}'" if given else "os.environ.pop('GOMP_SPINCOUNT', None)"
    shown = "print(os.environ['GOMP_SPINCOUNT'], 'torch' in sys.modules)"
    finished = run_file("-c", f"import os, sys; {setting}; import common; {shown}")
    assert finished.stdout.split() == [given or "3000", "False"]
