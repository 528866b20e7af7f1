"""What `--dry_run --num_processes N` says of a process's memory, against two real processes on CPUs.

And the page of such numbers that benchmarks/scale.py writes.
"""

import copy
import json
import os
import re
import socket
import time
from pathlib import Path

from common.costs import Encoding, estimate_activations
from common.estimates import ModelCosts, estimate_memory, print_cache_estimate
from common.sharding import Whole, count_whole
from common.teacher_weights import count_bytes
from common.training import make_accelerator, make_optimizer, prepare_models, trained_parameters

import pytest
import scale
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from conftest import PLAN, ROOT, LiveBytes
from diffusers import SD3Transformer2DModel, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from full_models import save_sd21
from torch.distributed.tensor import DTensor
from torch.multiprocessing import start_processes
from torch.multiprocessing.reductions import StorageWeakRef

import train_lift_sd3
import train_lift_sd21
from lift_utils import FeatureModel


SD = {
    "sample_size": 16,
    "block_out_channels": [64, 128],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "attention_head_dim": [2, 4],
    "cross_attention_dim": 64,
    "norm_num_groups": 8,
}
SD3 = {
    "sample_size": 8,
    "num_layers": 4,
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "joint_attention_dim": 48,
    "caption_projection_dim": 128,
    "pooled_projection_dim": 32,
    "pos_embed_max_size": 8,
    "in_channels": 4,
    "out_channels": 4,
}
MODELS = {
    "sd21": (UNet2DConditionModel, SD, train_lift_sd21.example_inputs),
    "sd3": (SD3Transformer2DModel, SD3, lambda model: train_lift_sd3.example_inputs(model, 8)),
}


def make(name: str, layers: int | None = None) -> torch.nn.Module:
    """A student, or with so many layers a teacher, on the default device."""
    kind, config, _ = MODELS[name]
    return kind.from_config(config | ({"num_layers": layers} if layers else {}))


def local_bytes(tensors: list[torch.Tensor]) -> int:
    """What this process holds of tensors, spread or not."""
    return sum((each.to_local() if isinstance(each, DTensor) else each).nbytes for each in tensors)


def measure(name: str, precision: str, checkpointing: bool, fsdp: bool, folder: Path) -> dict[str, int]:
    """Bytes on this process by the estimate's parts, of a student's second step beside a teacher, and the most."""
    for state in (AcceleratorState, GradientState):
        state._reset_state()
    accelerator = make_accelerator(str(folder), "none", 0, 1, precision, False, fsdp=fsdp)
    torch.manual_seed(0)
    dtype = {"bf16": torch.bfloat16}.get(precision, torch.float32)
    student = FeatureModel(make(name), [])
    teacher = FeatureModel(make(name, 6 if name == "sd3" else None).to(dtype).requires_grad_(False), [])
    prepare_models(student, teacher, accelerator, checkpointing, False, False, fsdp)
    trained = trained_parameters(student.model)
    optimizer = make_optimizer(student, 1e-4, (0.9, 0.999), 0.0, 1e-8, False)
    model = accelerator.prepare_model(student, evaluation_mode=fsdp)
    average = EMAModel(trained, foreach=True)
    shapes = MODELS[name][2](student.model)
    inputs = {key: torch.ones(1, *each.shape[1:], dtype=each.dtype) for key, each in shapes.items()}
    halves = {key: each.to(dtype) if each.is_floating_point() else each for key, each in inputs.items()}

    def step() -> None:
        with torch.no_grad():
            target, _ = teacher(**halves)
        prediction, _ = model(**inputs)
        accelerator.backward((prediction - target).square().mean())

    step()
    optimizer.step()
    average.step(trained)
    moments = [each for state in optimizer.state.values() for each in state.values() if each.ndim]
    gradients = [weight.grad for weight in trained]
    held = {
        "trained weights (fp32)": trained,
        "gradients (fp32)": gradients,
        "optimizer moments": moments,
        "averaged weights": average.shadow_params,
        "teacher weights": [*teacher.parameters()],
    }
    measured = {part: local_bytes(tensors) for part, tensors in held.items()}
    live = LiveBytes()
    live.add(*(each for tensors in held.values() for each in tensors))
    views = StorageWeakRef(gradients[0].untyped_storage()) if not fsdp else None
    held.clear()
    gradients.clear()  # but for what holds them otherwise
    optimizer.zero_grad()
    assert views is None or not views.expired()  # DDP's bucket stays
    with live:
        step()
        optimizer.step()
        optimizer.zero_grad()
        average.step(trained)
    return {**measured, "sum": live.most}


CASES = [
    ("sd3", "no", False, True),
    ("sd3", "bf16", True, True),
    ("sd21", "bf16", False, True),
    ("sd3", "no", True, False),
]


def run_cases(rank: int, port: int, folder: Path) -> None:
    """What one of two processes does: all cases, one after the other."""
    where = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ.update(where, RANK=str(rank), LOCAL_RANK=str(rank))
    PartialState._reset_state()
    measured = [measure(*case, folder) for case in CASES]
    (folder / f"{rank}.json").write_text(json.dumps(measured))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> dict[tuple, list[dict[str, int]]]:
    """Of each case, what both processes hold. They are forked, which saves the time of their imports."""
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    group = start_processes(run_cases, (port, folder), nprocs=2, join=False, start_method="fork")
    deadline = time.monotonic() + 300
    try:
        while not group.join(1):  # raises what one of them raises
            assert time.monotonic() < deadline
    finally:
        for process in group.processes:
            process.kill()
    return dict(zip(CASES, zip(*(json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)))))


def estimate(name: str, precision: str, checkpointing: bool, fsdp: bool) -> tuple[str, dict[str, int]]:
    with torch.device("meta"):
        student, teacher = make(name), make(name, 6 if name == "sd3" else None)
    inputs = MODELS[name][2](student)
    _, *activations = estimate_activations(lambda: copy.deepcopy(student), checkpointing, 1, precision, **inputs)
    held = count_bytes(teacher, None, precision)
    whole = count_whole(student, teacher, held) if fsdp else None
    plan = PLAN._replace(batch_size=1, mixed_precision=precision, use_ema=True, processes=2)
    return estimate_memory(plan, ModelCosts(0, activations, student.num_parameters(), teacher_bytes=held, whole=whole))


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_two_processes_hold_what_the_estimate_says(measured, case):
    """Each part, and the most at once, to 10 %."""
    _, parts = estimate(*case)
    parts["sum"] = sum(parts.values())
    for real in measured[case]:
        assert len(real.keys() & parts.keys()) >= 5  # gradients are not there whenever most is held
        for part in real.keys() & parts.keys():
            assert parts[part] == pytest.approx(real[part], rel=0.1), part


# -------------------------------------------------------------------------------------------------------- known values


class BasicTransformerBlock(torch.nn.Sequential):
    """One of the blocks that come together, by its name."""


def blocks_and_rest(rest: int = 8) -> torch.nn.Module:
    """Blocks of 4 x 4 and 4 x 8 weights, and a layer beside them."""
    blocks = (BasicTransformerBlock(torch.nn.Linear(4, width, bias=False)) for width in (4, 8))
    return torch.nn.Sequential(*blocks, torch.nn.Linear(4, rest, bias=False))


def test_two_blocks_and_the_rest_are_whole_at_once():
    assert count_whole(blocks_and_rest(), None, 0) == (4 * (32 + 2 * 32), 4 * (32 + 2 * 32), 0)
    assert count_whole(blocks_and_rest(100), None, 0).weights == 4 * (400 + 400)  # itself, and the buffer it was in
    teacher = blocks_and_rest()
    assert count_whole(blocks_and_rest(), teacher, 2 * 80).teacher == 2 * (32 + 2 * 32)  # held in half precision
    student = blocks_and_rest().bfloat16().requires_grad_(False)
    student[0].append(torch.nn.Linear(4, 4, bias=False))  # as adapters are: in float32, and they alone learn
    assert count_whole(student, None, 0) == (2 * 32 + 2 * (2 * 16 + 4 * 16), 2 * 4 * 16, 0)


def test_blocks_within_blocks_come_on_their_own():
    outer = BasicTransformerBlock(torch.nn.Linear(4, 2, bias=False), BasicTransformerBlock(torch.nn.Linear(2, 4)))
    assert count_whole(torch.nn.Sequential(outer), None, 0).weights == 4 * 2 * (2 * 4 + 4)


AVERAGED = PLAN._replace(use_ema=True)
SPREAD = AVERAGED._replace(processes=8)
COSTS = ModelCosts(0, (10, 0), 800, teacher_bytes=1600, encoding=Encoding(7))


def test_what_is_spread_is_divided_and_the_rest_is_not():
    costs = COSTS._replace(whole=Whole(40, 30, 50))
    moment, parts = estimate_memory(SPREAD, costs)
    assert moment == "after the forward pass"
    assert parts == {
        "trained weights (fp32)": 400,
        "frozen weights of the student": 0,
        "optimizer moments": 800,
        "averaged weights": 400,
        "teacher weights": 200,
        "encoders' weights": 7,
        "tables of positions": 0,
        "student activations, batch 2": 10,
        "copies of the weights for autocast": 1600,
        "features of both models and gradients": 0,
        "weights that are whole for a while": 40,  # the student's: the teacher's are not at that time
    }
    moment, parts = estimate_memory(SPREAD, costs._replace(whole=Whole(40, 30, 5000)))
    assert moment == "while the teacher predicts" and parts["weights that are whole for a while"] == 5000
    assert "student activations, batch 2" not in parts
    moment, parts = estimate_memory(SPREAD, costs._replace(activations=(10, 1)))
    assert moment == "after the backward pass"
    assert "copies of the weights for autocast" not in parts  # it recomputes them
    assert parts["weights that are whole for a while"] == 40
    moment, parts = estimate_memory(SPREAD._replace(mixed_precision="no"), costs._replace(activations=(10, 20)))
    assert moment == "after the backward pass"
    assert parts["gradients (fp32)"] == 400
    assert parts["gradients that are not spread yet"] == 30


def test_without_spreading_nothing_is_divided_and_gradients_stay():
    one, several = (estimate_memory(plan, COSTS) for plan in (AVERAGED, SPREAD))
    assert one[0] == "after the backward pass"
    assert several[0] == "while weights are averaged"  # one process has let its gradients go by then
    assert several[1]["gradients (fp32)"] == one[1]["gradients (fp32)"] == 3200
    same = one[1].keys() & several[1].keys()
    assert {name: one[1][name] for name in same} == {name: several[1][name] for name in same}


def test_one_process_has_nobody_to_spread_to():
    assert estimate_memory(AVERAGED, COSTS._replace(whole=Whole(40, 30, 50))) == estimate_memory(AVERAGED, COSTS)


def test_a_teacher_that_is_gone_is_nowhere():
    """It was cached beforehand, and is neither held nor whole for a while."""
    gone = SPREAD._replace(live_teacher=False)
    _, parts = estimate_memory(gone, COSTS._replace(whole=Whole(40, 30, 5000)))
    assert parts["teacher weights"] == 0 and parts["weights that are whole for a while"] == 40


# ----------------------------------------------------------------------------------------------------------- a dry run


def test_a_dry_run_says_for_how_many_processes_it_is(run, teacher, capsys):
    def dry_run(*flags) -> tuple[str, dict[str, float]]:
        fixed = ("--pretrained_teacher_model", teacher, "--student", 0.5, "--lambda_kd_feat", 0, "--cache_teacher", 2)
        run("train_lift_unet", *fixed, "--dry_run", *flags)
        text = capsys.readouterr().out
        found = re.findall(r"^  (.*?)  +([\d.,]+(?:e-\d+)?) (?:MiB|min|h)$", text, re.M)
        return text, {name: float(number.replace(",", "")) for name, number in found}

    text, one = dry_run()
    assert "memory at its peak" in text and "time, estimated" in text
    text, four = dry_run("--fsdp", "--num_processes", 4)
    assert "memory of each of 4 processes at its peak" in text
    assert "time of each of 4 processes, without what they send, estimated" in text
    assert four["optimizer moments"] == pytest.approx(one["optimizer moments"] / 4, abs=0.1)
    assert "weights that are whole for a while" in four and "weights that are whole for a while" not in one
    text, plain = dry_run("--num_processes", 4)
    assert plain["optimizer moments"] == one["optimizer moments"]
    assert "weights that are whole for a while" not in plain


def test_the_cache_is_filled_by_all(capsys):
    plan = PLAN._replace(cached_draws=2, images=1000, mixed_precision="no")
    costs = ModelCosts(0, (0, 0), 1, teacher_macs=10**12, teacher_bytes=2**20, outputs=100, decoding=2 * 2**20)
    minutes = []
    for processes in (1, 4):
        print_cache_estimate(plan._replace(processes=processes), costs)
        text = capsys.readouterr().out
        assert text.startswith("beforehand, the teacher and what decodes its samples: 3.0 MiB\n")
        minutes.append(float(re.search(r"([\d.]+) min", text)[1]))
    assert minutes[0] == pytest.approx(4 * minutes[1], rel=0.01)


# ------------------------------------------------------------------------------------------------ benchmarks/scale.py


RESULTS = ROOT / "benchmarks" / "results" / "scale.json"


def test_the_page_says_what_the_results_say(tmp_path):
    rows = json.loads(RESULTS.read_text())
    scale.write_markdown(rows, tmp_path / "page.md")
    assert (tmp_path / "page.md").read_text() == RESULTS.with_suffix(".md").read_text()
    assert [(row["teacher"], row["student"]) for row in rows] == [each[1:3] for each in scale.list_students()]
    tables = [line for line in (tmp_path / "page.md").read_text().splitlines() if line.startswith("|")]
    assert max(line.count("|") for line in tables) == 7  # six columns


def test_the_results_are_those_of_a_dry_run(run, tmp_path, capsys):
    row = next(row for row in json.loads(RESULTS.read_text()) if row["student"] == "bk_extreme")
    flags = (*row["flags"].split(), "--fsdp", "--num_processes", 8)
    run("train_lift_sd21", "--pretrained_teacher_model", save_sd21(tmp_path / "sd21"), "--dry_run", *flags)
    most = float(re.search(r"  sum +([\d.,]+) MiB", capsys.readouterr().out)[1].replace(",", ""))
    assert most == pytest.approx(row["memory"]["FSDP2, 8"]["sum"] / 2**20, abs=0.1)


def test_what_is_sent_grows_with_the_share_of_the_others():
    costs = ModelCosts(0, (0, 0), trained=1000, teacher_bytes=2000)
    sent = scale.count_sent(PLAN, costs)
    assert sent["DDP, 2"] == 4000 and sent["DDP, 8"] == 7000
    assert sent["FSDP2, 2"] == 7000 and sent["FSDP2, 4"] == 10_500
    assert scale.count_sent(PLAN._replace(accumulation_steps=4), costs)["FSDP2, 2"] == 28_000


def test_the_smallest_set_up_has_the_fewest_gpus():
    def smallest(alone: float, narrow: float, spread: float) -> tuple[str, str]:
        sizes = {"one process": alone, "one process, 8-bit Adam": narrow, **{f"FSDP2, {n}": spread for n in (2, 4, 8)}}
        return scale.find_smallest({name: {"sum": size * 2**30} for name, size in sizes.items()})

    assert smallest(9, 8, 5) == ("1 × 12 GB", "one process")
    assert smallest(11, 9, 5) == ("1 × 12 GB", "one process, 8-bit Adam")
    assert smallest(30, 25, 9) == ("2 × 12 GB", "FSDP2, 2")
    assert smallest(60, 50, 40) == ("1 × 80 GB", "one process")
    with pytest.raises(ValueError, match="no set-up"):
        smallest(900, 900, 900)
