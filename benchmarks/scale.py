# Copyright 2026 The LIFT and PLACE distillation authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""What each process holds and sends, with students of published teachers on 1, 2, 4 and 8 GPUs, by DDP and by FSDP2.

    python benchmarks/scale.py              # writes benchmarks/results/scale.json and scale.md, in some minutes

Nothing is trained or measured: these are the estimates of `--dry_run --num_processes N`, with and without `--fsdp`.
The teachers are configs without weights (full_models.py), but for the pixel one.
"""

import argparse
import contextlib
import importlib
import io
import itertools
import json
import os
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

from accelerate.state import AcceleratorState, GradientState
from dry_runs import BLOCKS, SD3, UNETS, WIDTHS, XL, save_teachers
from tqdm.auto import tqdm


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("ACCELERATE_USE_CPU", "true")

from common.estimates import ModelCosts, RunPlan, estimate_memory  # noqa: E402


HALF = "--mixed_precision fp16 --cache_latents --use_ema --gradient_checkpointing"
PROCESSES = 2, 4, 8
CARDS = (12, 24), (48, 80)  # GiB that a GPU has, and what is tried where eight of those are too small
# What docs/evidence.md measured beyond the estimate, at most, and room for the CUDA context.
MARGIN, CONTEXT = 1.11, 2**30
NAMES = {
    "celeba": "DDPM of CelebA, 64 pixels",
    "sd21": "Stable Diffusion 2.1, 512 pixels",
    "sdxl": "Stable Diffusion XL, 1024 pixels",
    "dit": "DiT-XL/2, 256 pixels",
    "sd3-medium": "Stable Diffusion 3 medium, 512 pixels",
    "sd3.5-large": "Stable Diffusion 3.5 large, 512 pixels",
}


def list_students() -> list[tuple[str, str, str, str]]:
    """Script, teacher, student and the other flags of each."""
    students = [("unet", "celeba", student, "--gradient_checkpointing") for student in UNETS]
    students += [("sd21", "sd21", student, HALF) for student in (*BLOCKS, *WIDTHS)]
    students += [("sdxl", "sdxl", student, HALF) for student in XL]
    students += [("dit", "dit", student, HALF) for student in ("d19", "d14", "d7", "d4")]
    students += [("sd3", "sd3-medium", student, SD3) for student in ("half", "third", "sixth")]
    return [*students, ("sd3", "sd3.5-large", "half", SD3)]


def read_costs(script: str, teacher: Path, flags: str) -> tuple[RunPlan, ModelCosts]:
    """What a dry run gives [`print_estimates`]: the models are profiled once, not for each number of processes."""
    module = importlib.import_module(f"train_lift_{script}")
    command = ["--pretrained_teacher_model", str(teacher), *shlex.split(flags), "--dry_run", "--fsdp"]
    args = module.parse_args([*command, "--num_processes", "2"])
    for state in (AcceleratorState, GradientState):  # which would keep the precision of the run before
        state._reset_state()
    with mock.patch.object(module, "print_estimates") as estimate, contextlib.redirect_stdout(io.StringIO()):
        module.main(args)
    return estimate.call_args.args


def estimate_all(plan: RunPlan, costs: ModelCosts) -> dict[str, dict[str, Any]]:
    """Moment and bytes by part of each set-up."""
    alone, unspread = plan._replace(processes=1), costs._replace(whole=None)
    setups = {"one process": (alone, unspread)}
    setups["one process, 8-bit Adam"] = alone._replace(use_8bit_adam=True), unspread
    setups |= {f"DDP, {processes}": (plan._replace(processes=processes), unspread) for processes in PROCESSES}
    setups |= {f"FSDP2, {processes}": (plan._replace(processes=processes), costs) for processes in PROCESSES}
    found = {}
    for name, setup in setups.items():
        moment, parts = estimate_memory(*setup)
        parts = {part: size for part, size in parts.items() if size}
        found[name] = {"moment": moment, "parts": parts, "sum": sum(parts.values())}
    return found


def count_sent(plan: RunPlan, costs: ModelCosts) -> dict[str, int]:
    """Bytes that each process sends in a step, by rings, in which it passes on all but its own share.

    DDP reduces the gradients once in a step and hands the sums round. FSDP2 gathers the student's weights for the
    forward and for the backward pass, the teacher's for its only one, and reduces gradients, in each micro-batch.
    """
    weights = 4 * costs.trained
    whole = {"DDP": 2 * weights, "FSDP2": plan.accumulation_steps * (2 * weights + costs.teacher_bytes + weights)}
    return {f"{how}, {n}": size * (n - 1) // n for how, size in whole.items() for n in PROCESSES}


def find_smallest(memory: dict[str, dict[str, Any]]) -> tuple[str, str]:
    """The fewest GPUs that take a student, of the smallest size, and by which of the set-ups."""
    alone = "one process", "one process, 8-bit Adam"
    for cards, count in itertools.product(CARDS, (1, *PROCESSES)):
        for card, how in itertools.product(cards, alone if count == 1 else [f"FSDP2, {count}"]):
            if MARGIN * memory[how]["sum"] + CONTEXT <= card * 2**30:
                return f"{count} × {card} GB", how
    raise ValueError("no set-up is large enough")


def write_markdown(rows: list[dict[str, Any]], path: Path) -> None:
    """The tables."""
    setups = "one process", f"DDP, {PROCESSES[0]}", *(f"FSDP2, {processes}" for processes in PROCESSES)
    head = ["one process", "DDP, 2 to 8", *setups[2:]]
    lines = [INTRODUCTION]

    def add_table(titles: list[str], body: list[list[str]]) -> None:
        cells = [titles, ["---", *["--:"] * (len(titles) - 1)], *body]
        lines.extend(["", *("| " + " | ".join(row) + " |" for row in cells)])

    def name(row: dict[str, Any]) -> str:
        return f"{row['teacher']} `{row['student']}`, {row['parameters'] / 1e6:,.1f}M"

    lines += ["", "## Sums, in GiB"]
    add_table(
        ["student", *head],
        [[name(row), *(f"{row['memory'][each]['sum'] / 2**30:,.1f}" for each in setups)] for row in rows],
    )
    lines += ["", "## The smallest set-up", "", SMALLEST]
    body = []
    for row in rows:
        size = f"{row['memory'][row['smallest by']]['sum'] / 2**30:,.1f} GiB"
        eight = f"{row['memory']['one process, 8-bit Adam']['sum'] / 2**30:,.1f} GiB"
        body.append([name(row), row["smallest"], row["smallest by"], size, eight])
    add_table(["student", "smallest", "by", "there, per GPU", "one process, 8-bit Adam"], body)
    lines += ["", "## By part, in MiB", "", "A dash is a part that is not there in the moment of the most."]
    for row in rows:
        cells = [row["memory"][each] for each in setups]
        parts = list(dict.fromkeys(part for cell in cells for part in cell["parts"]))
        lines += ["", f"### {NAMES[row['teacher']]}: `{row['student']}`", "", f"`{row['flags']}`"]
        body = [[part, *(_mebibytes(cell["parts"].get(part)) for cell in cells)] for part in parts]
        body.append(["**sum**", *(_mebibytes(cell["sum"]) for cell in cells)])
        body.append(["the moment", *(cell["moment"] for cell in cells)])
        add_table(["part", *head], body)
    lines += ["", "## A step's communication on paper", "", COMMUNICATION]
    for how in ("DDP", "FSDP2"):
        body = []
        for row in rows:
            sent = [f"{row['sent'][f'{how}, {processes}'] / 2**30:,.1f}" for processes in PROCESSES]
            body.append([name(row), str(row["micro-batches"]), *sent])
        add_table([f"{how}, GiB per step", "micro-batches", *map(str, PROCESSES)], body)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _mebibytes(size: int | None) -> str:
    return "–" if size is None else f"{size / 2**20:,.0f}"


INTRODUCTION = """# What a process holds and sends, by the number of processes

*Written by `python benchmarks/scale.py`. **All of it is estimated**: nothing here was measured on a GPU.*

Each process has a GPU of its own, and the batch that the page of its target names, with gradient checkpointing, the
moving average and AdamW in float32: `--use_8bit_adam` does not go with `--fsdp`. DDP, which is what several processes
are by default, holds everything on each of them. FSDP2 (`--fsdp`) divides by their number the student's weights,
gradients, moments and average, and the teacher's weights. Activations are of a process's own images: nothing divides
them. `--dry_run --num_processes 4` prints the estimate of any other student, with `--fsdp` for FSDP2.

`tests/test_scale.py` holds the estimate to two real processes on a CPU (gloo), with small models. Each part was what
it says, and the sum was within 10 % of the most that lived at once. Not included are the teacher's working set, the
CUDA context, and what NCCL holds for itself.

- **DDP** adds no copy of gradients, which are views of its buckets. But the buckets stay, so that gradients are held
  in the forward pass too, and while weights are averaged, which takes as much once more.
- **FSDP2** adds what is whole for a while. That is the rest of a model beside its blocks, and two of its largest
  blocks: the one that computes, and the one that PyTorch fetches meanwhile. In the backward pass two blocks' gradients
  come on top: those being computed, and those being reduced.
- **What does not shrink** without checkpointing is autocast's copies of all trained weights in half precision: the
  backward pass needs them."""
SMALLEST = f"""The fewest GPUs that take the student at the batch of its page, of 12 or 24 GB, or else of 48 or 80.
They have room for {MARGIN} times the estimate, which is the most that was
[measured](../../docs/evidence.md#on-a-gpu) on one GPU, and for 1 GiB of the CUDA context. One GPU has 8-bit Adam where
it has to. A smaller batch, LoRA and `--cache_teacher` take less: see the pages of the targets. What is held
beforehand, while the data are encoded, is not counted: for SDXL on 12 GB pass `--encoding_batch_size 1`."""
COMMUNICATION = """Bytes that each of N processes sends in a step. A collective passes shares around a ring, so that
each process sends (N - 1)/N of what it is about. P are the student's parameters, in float32; T are the bytes of the
teacher's weights.

- **DDP** reduces the gradients once in a step and hands the sums round: 2 (N - 1)/N · 4P. It does so after the last
  micro-batch.
- **FSDP2** gathers the student's weights for the forward and again for the backward pass, gathers the teacher's for
  its forward pass, and reduces the gradients into shares: (N - 1)/N · (4P + 4P + T + 4P), in each micro-batch.

Both grow with (N - 1)/N: from 2 to 8 processes by three quarters, and to no more than twice the bytes of two. What
grows without end is the number of messages, N - 1 for a collective. DDP has few buckets, of 25 MB; FSDP2 has three
collectives for each of the student's blocks and one for each of the teacher's, so small blocks wait for the network's
latency rather than for its bandwidth. With one micro-batch in a step FSDP2 sends 1.5 times what DDP does, and the
teacher's weights. With many it sends that as many times: with `--fsdp` take a `--train_batch_size` as large as fits
and few `--gradient_accumulation_steps`."""


def main(args: argparse.Namespace) -> None:
    """Estimate all, and write the JSON and the page."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        teachers = save_teachers(Path(folder))
        for script, teacher, student, more in tqdm(list_students(), desc="dry runs"):
            flags = f"--student {student} {more}"
            plan, costs = read_costs(script, teachers[teacher], flags)
            row = {"script": script, "teacher": teacher, "student": student, "flags": flags}
            row |= {"parameters": costs.trained, "micro-batches": plan.accumulation_steps}
            row["memory"] = estimate_all(plan, costs)
            row["sent"] = count_sent(plan, costs)
            row["smallest"], row["smallest by"] = find_smallest(row["memory"])
            rows.append(row)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    write_markdown(rows, args.output.with_suffix(".md"))


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = ROOT / "benchmarks" / "results" / "scale.json"
    parser.add_argument("--output", type=Path, default=default, help="JSON file to write, and the page beside it")
    return parser.parse_args()


if __name__ == "__main__":
    main(parse_args())
