"""Several processes, by DistributedDataParallel and by --fsdp, do what one process does."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

from common.ending import Stopped, StopSignals
from common.metrics import read_metrics
from common.reporting import share_of
from common.sharding import shard

import numpy as np
import pytest
import torch
from conftest import ALONE, ROOT, TWO_PROCESSES, run_file, run_several
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from lift_utils import FeatureModel


SCRIPTS = {
    "unet": ("--student", 0.5, "--num_validation_images", 3, "--reduction", "mean"),
    "sd21": ("--student", "bk_small", "--cache_latents", "--validation_prompts", "a bag", "a shirt", "a shoe"),
    "dit": ("--keep_blocks", "1,3", "--cache_latents"),
    "sd3": ("--student", "half", "--cache_latents", "--max_sequence_length", 8, "--validation_prompts", "a bag"),
    "sdxl": ("--student", "extreme", "--cache_latents", "--validation_prompts", "a bag"),
}
# A cached teacher's draws are those of the image, so they do not depend on who has it.
CACHED = ("--cache_teacher", 1, "--lambda_kd_feat", 0)
LORA = ("--lora_rank", 2, "--gradient_checkpointing")
LIVE = {  # the teacher is spread, too
    "unet": ("--lambda_kd_feat", 0.1),
    "dit": ("--lambda_kd_feat", 0.1, "--gradient_checkpointing"),
    "sd21": LORA,
    "sd3": LORA,
}


@pytest.fixture(scope="module")
def command(teachers, images, captioned, articles, tmp_path_factory):
    """`command(script, output_dir, batch, *flags)`: a script's name and its flags, for two steps."""
    data = {"unet": images, "sd21": captioned, "dit": articles, "sd3": captioned, "sdxl": captioned}
    cache = tmp_path_factory.mktemp("cache")

    def make(script: str, output_dir: Path, batch: int, *flags) -> tuple:
        source = ("--pretrained_teacher_model", teachers[script], "--train_data_dir", data[script])
        steps = ("--max_train_steps", 2, "--checkpointing_steps", 1, "--logging_steps", 1, "--validation_steps", 2)
        rest = ("--gradient_accumulation_steps", 1, "--num_inference_steps", 1, "--dataloader_num_workers", 0)
        where = ("--output_dir", output_dir, "--cache_dir", cache, "--report_to", "none", "--learning_rate", 1e-4)
        size = ("--train_batch_size", batch)
        return f"train_lift_{script}", *source, *steps, *rest, *where, *size, *SCRIPTS[script], *flags

    return make


@pytest.fixture(scope="module")
def runs(command, tmp_path_factory) -> Path:
    """A folder of runs on one process and on two: SCRIPT-one, -ddp and -fsdp, -live-ddp and -live-fsdp.

    The one by --fsdp goes on from a checkpoint of the run on one process, but for the pixel script's.
    """
    folder = tmp_path_factory.mktemp("runs")
    run_several([command(script, folder / f"{script}-one", 4, *CACHED) for script in SCRIPTS], folder)
    commands = []
    for script in SCRIPTS:
        commands.append(command(script, folder / f"{script}-ddp", 2, *CACHED))
        flags = (*CACHED, "--fsdp", "--resume_from_checkpoint", "latest")
        if script != "unet":
            begin(folder / f"{script}-one", folder / f"{script}-fsdp")
        commands.append(command(script, folder / f"{script}-fsdp", 2, *flags))
    for script, flags in LIVE.items():
        commands += [
            command(script, folder / f"{script}-live-ddp", 2, *flags),
            command(script, folder / f"{script}-live-fsdp", 2, *flags, "--fsdp"),
        ]
    printed = run_several(commands, folder, prefix=("-m", *TWO_PROCESSES))
    assert printed.count("2 × cpu") == len(commands)
    return folder


def begin(run: Path, folder: Path) -> Path:
    """Copy what a run had after its first step into a new folder; returns that."""
    shutil.copytree(run / "checkpoint-1", folder / "checkpoint-1")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text(lines[0])
    return folder


def assert_same(one: Path, other: Path, tolerance: float = 1e-5) -> None:
    """Losses, gradient norms, all saved tensors, configs and samples are those of the other run, but for rounding.

    Args:
        tolerance: Of weights, of which two steps change each by 2e-4 at most.
    """
    for ours, theirs in zip(read_metrics(one / "metrics.jsonl"), read_metrics(other / "metrics.jsonl"), strict=True):
        assert ours.keys() == theirs.keys()
        # The deviations are means of those among each process's groups.
        for name in ours.keys() - {"images_per_second", "slope_std", "intercept_std"}:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5), name
    files = {path.relative_to(one) for path in one.rglob("*") if path.is_file() and path.name != ".lock"}
    assert {path for path in files if path.name == "model_index.json"}
    for file in files - {Path("samples") / "step-000000.png"}:  # a resumed run has none
        ours, theirs = one / file, other / file
        if file.suffix == ".safetensors":
            ours, theirs = load_file(ours), load_file(theirs)
            assert {name: value.dtype for name, value in ours.items()} == {
                name: value.dtype for name, value in theirs.items()
            }
            for name, value in ours.items():
                torch.testing.assert_close(value, theirs[name], rtol=1e-3, atol=tolerance, msg=f"{file}: {name}")
        elif file.name == "config.json":
            assert json.loads(ours.read_text()) == json.loads(theirs.read_text())
        elif file.name == "samples.png":
            difference = np.abs(np.array(Image.open(ours), dtype=float) - np.array(Image.open(theirs)))
            assert difference.mean() < 0.5
        else:
            assert theirs.exists()


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_two_processes_do_what_one_does(runs, script, engine):
    """At the same global batch, PLACE's adaptive weight among all that is logged."""
    assert "weight" in read_metrics(runs / f"{script}-one" / "metrics.jsonl")[-1]
    assert_same(runs / f"{script}-one", runs / f"{script}-{engine}")


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_checkpoint_of_spread_weights_resumes_on_one_process(runs, run, command, tmp_path, script):
    folder = begin(runs / f"{script}-fsdp", tmp_path / "resumed")
    run(*command(script, folder, 4, *CACHED, "--resume_from_checkpoint", "latest"))
    assert_same(runs / f"{script}-one", folder)


@pytest.mark.parametrize("script", LIVE)
def test_a_spread_teacher_teaches_the_same(runs, script):
    """Features and LoRA among it, with and without gradient checkpointing."""
    assert_same(runs / f"{script}-live-ddp", runs / f"{script}-live-fsdp")


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_student_of_spread_weights_loads(runs, script):
    DiffusionPipeline.from_pretrained(runs / f"{script}-fsdp")


def test_micro_batches_add_up_to_the_batch(runs, run, command, tmp_path):
    """But for the adaptive weight, which each micro-batch has for itself."""
    flags = ("--kd_weighting", "constant", *CACHED)
    run(*command("unet", tmp_path / "whole", 4, *flags))
    run(*command("unet", tmp_path / "parts", 2, *flags, "--gradient_accumulation_steps", 2))
    assert_same(tmp_path / "whole", tmp_path / "parts")


# ----------------------------------------------------------------------------------------------------------- samples


@pytest.mark.parametrize(("count", "processes"), [(1, 1), (5, 1), (5, 2), (2, 3), (1, 4), (8, 4)])
def test_processes_draw_equally_many_samples(count, processes):
    ranks = [SimpleNamespace(num_processes=processes, process_index=rank) for rank in range(processes)]
    shares = [share_of(count, rank) for rank in ranks]
    assert len({len(share) for share in shares}) == 1
    assert [sample for share in shares for sample in share][:count] == [*range(count)]


def test_processes_leave_the_sampling_together(monkeypatch):
    """At the model's next forward pass, and the model is as before."""
    model, stop = torch.nn.Linear(1, 1), StopSignals(1)
    stop.alone, answers = False, iter([False, True])

    def check():
        passes.append(model)
        if next(answers):
            raise Stopped(15)

    def sample(model: torch.nn.Module, count: int) -> None:
        for _ in range(count):
            model(torch.ones(1))

    passes: list[torch.nn.Module] = []
    monkeypatch.setattr(stop, "check", check)
    with pytest.raises(Stopped):
        stop.leave_together(sample)(model, count=5)
    assert len(passes) == 2 and not model._forward_pre_hooks


# ----------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ((), "--fsdp spreads models over processes, and there is one; launch more with --multi_gpu, or drop it"),
        (("--use_8bit_adam",), "--fsdp with --use_8bit_adam: its moments cannot be spread"),
        (("--teacher_dtype", "nf4"), "--fsdp with --teacher_dtype nf4: compressed weights cannot be spread"),
        (("--offload_teacher", "--dry_run"), "--fsdp with --offload_teacher: spread weights stay on the GPUs"),
    ],
)
def test_what_does_not_go_with_spread_weights_is_refused(run, command, tmp_path, flags, says):
    with pytest.raises(SystemExit, match=f"error: {says}"):
        run(*command("unet", tmp_path / "student", 4, "--fsdp", *flags))


def test_a_shared_backbone_cannot_be_spread(run, command, tmp_path):
    flags = (*LORA, "--share_backbone", "--fsdp")
    with pytest.raises(SystemExit, match="--share_backbone needs a teacher whole on each process, without --fsdp"):
        run(*command("sd3", tmp_path / "student", 4, *flags))


def test_processes_that_would_each_train_alone_are_refused(command, tmp_path):
    """Where there is no GPU, Accelerate takes each for the only one, unless it is to use the CPU."""
    name, *flags = command("unet", tmp_path / "student", 4)
    finished = run_file("-m", *TWO_PROCESSES, ROOT / f"{name}.py", *flags, **ALONE)
    assert finished.returncode == 1 and not (tmp_path / "student").exists()
    says = "error: 2 processes and no GPU: each would work alone; set ACCELERATE_USE_CPU=true, or see nvidia-smi\n"
    assert says in finished.stdout


@pytest.mark.parametrize("engine", ["FSDP", "DEEPSPEED"])
def test_engines_of_the_accelerate_config_are_refused(run, command, tmp_path, monkeypatch, engine):
    """On the CPU Accelerate would pass over them in silence."""
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")
    says = f"the accelerate config asks for {engine}, .* set distributed_type to MULTI_GPU there, and pass --fsdp"
    with pytest.raises(SystemExit, match=says):
        run(*command("unet", tmp_path / "student", 4))


def test_a_model_of_unknown_blocks_is_refused():
    """Nothing of it would be spread during a pass."""
    with pytest.raises(SystemExit, match="--fsdp knows no block of a Linear; add the class of its blocks to BLOCKS"):
        shard(FeatureModel(torch.nn.Linear(2, 2), []), torch.device("cpu"))
