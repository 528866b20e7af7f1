# Copyright 2026 The LIFT and PLACE distillation authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""How is a run saved so that a kill at any instant cannot damage it, and how does it go on?

A checkpoint is written into `.tmp-<step>`, completed by a manifest of sizes and SHA-256 sums, flushed to disk and only
then renamed to `checkpoint-<step>`. A kill at any instant leaves whole checkpoints and rubbish under dot names.
"""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from common.arguments import fail

import torch
from accelerate.optimizer import AcceleratedOptimizer
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file

from lift_utils import FeatureModel


def prepare_output(path: str, resume_from: str | None, is_main_process: bool) -> Path:
    """The output folder, which can be written to and holds no other run; rubbish of killed saves is removed.

    Args:
        path: `--output_dir`.
        resume_from: `--resume_from_checkpoint`, `None` for a new run.
        is_main_process: The one that may remove.
    """
    output_dir = Path(path)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        (output_dir / ".writable").touch()
        (output_dir / ".writable").unlink(missing_ok=True)
    except OSError as error:
        fail(f"--output_dir {output_dir} cannot be written to: {error.strerror}; pass another folder")
    if resume_from is None and list_checkpoints(output_dir):
        fail(f"--output_dir {output_dir} holds another run; add --resume_from_checkpoint latest, or pass a new folder")
    if is_main_process:
        sweep(output_dir)
    return output_dir


class TrainState(NamedTuple):
    """All that a run needs to continue exactly. Random states are not in it: see [`common.training.seed_step`]."""

    student: FeatureModel  # unwrapped
    optimizer: AcceleratedOptimizer  # as returned by Accelerator.prepare
    lr_scheduler: torch.optim.lr_scheduler.LambdaLR
    ema: EMAModel | None
    scaler: torch.amp.GradScaler | None
    skipped: torch.Tensor  # (2,): steps skipped in all and in a row, see `common.training.guarded_step`


def save_train_state(output_dir: Path, step: int, train_state: TrainState, limit: int | None) -> None:
    """Write everything into `checkpoint-<step>`. The main process calls this, the others wait.

    Args:
        limit: How many checkpoints to keep; `None` keeps all.
    """
    moments, optimizer = flatten_optimizer(train_state.optimizer)
    tensors = {"student": train_state.student.state_dict(), "optimizer": moments}
    state = {
        "step": step,
        "config": dict(train_state.student.model.config),
        "optimizer": optimizer,
        "lr_scheduler": train_state.lr_scheduler.state_dict(),
        "scaler": train_state.scaler and train_state.scaler.state_dict(),
        "skipped": train_state.skipped.tolist(),
    }
    if train_state.ema is not None:
        tensors["ema"] = {str(index): tensor for index, tensor in enumerate(train_state.ema.shadow_params)}
        state["ema_step"] = train_state.ema.optimization_step
    save_checkpoint(output_dir, step, tensors, state, limit)


def load_train_state(output_dir: Path, resume_from: str | None, train_state: TrainState) -> int:
    """Continue from the checkpoint that `--resume_from_checkpoint` asks for; returns the number of steps done."""
    found = find_checkpoint(output_dir, resume_from) if resume_from else None
    if found is None:
        return 0
    tensors, state = found
    config = json.loads(json.dumps(dict(train_state.student.model.config)))
    different = [key for key in config if not key.startswith("_") and config[key] != state["config"].get(key)]
    saved, expected = (
        {key: tensor.shape for key, tensor in weights.items()}
        for weights in (tensors["student"], train_state.student.state_dict())
    )
    if different or saved != expected or ("ema" in tensors) != (train_state.ema is not None):
        what = ", ".join(different) or "the features, adapters or averaged weights"
        fail(f"--resume_from_checkpoint {resume_from} is of another student ({what} differ); pass the run's own flags")
    kind = state["optimizer"]["kind"]
    if kind != flatten_optimizer(train_state.optimizer)[1]["kind"]:
        fail(f"--resume_from_checkpoint {resume_from} is of {kind}; pass --use_8bit_adam as the run did, or leave it")
    train_state.student.load_state_dict(tensors["student"])
    restore_optimizer(train_state.optimizer, tensors["optimizer"], state["optimizer"])
    # The place in the schedule is the checkpoint's, the learning rate is this run's: it may have been lowered.
    scheduler = train_state.lr_scheduler
    scheduler.load_state_dict({**state["lr_scheduler"], "base_lrs": scheduler.base_lrs})
    for group, peak, factor in zip(train_state.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas):
        group["lr"] = peak * factor(scheduler.last_epoch)
    if train_state.scaler is not None and state["scaler"]:
        train_state.scaler.load_state_dict(state["scaler"])
    train_state.skipped.copy_(torch.tensor(state["skipped"]))
    if train_state.ema is not None:
        for index, parameter in enumerate(train_state.ema.shadow_params):
            parameter.copy_(tensors["ema"][str(index)])
        train_state.ema.optimization_step = state["ema_step"]
    return state["step"]


def flatten_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """An optimizer's state as named tensors for safetensors and a JSON-serialisable rest."""
    state = optimizer.state_dict()
    entries = {}
    for index, values in state["state"].items():
        # bitsandbytes puts its 8-bit tensors into an inner dict, and takes them back without it.
        for part in (values, *(value for value in values.values() if isinstance(value, dict))):
            entries |= {f"{index}.{key}": value for key, value in part.items() if not isinstance(value, dict)}
    tensors = {key: value for key, value in entries.items() if isinstance(value, torch.Tensor)}
    scalars = {key: value for key, value in entries.items() if key not in tensors}
    return tensors, {"kind": type(getattr(optimizer, "optimizer", optimizer)).__name__, "scalars": scalars}


def restore_optimizer(
    optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor], rest: dict[str, Any]
) -> None:
    """Load what [`flatten_optimizer`] returned. Settings such as the betas stay as they are."""
    state: dict[int, dict[str, Any]] = {}
    for key, value in {**tensors, **rest["scalars"]}.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Folders named `checkpoint-<step>`, oldest first."""
    folders = [path for path in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(folders, key=lambda path: int(path.name.split("-")[1]))


def sweep(output_dir: Path) -> None:
    """Remove what killed saves and prunings left behind."""
    for path in [*output_dir.glob(".tmp-*"), *output_dir.glob(".del-*")]:
        shutil.rmtree(path, ignore_errors=True)


def save_checkpoint(
    output_dir: Path, step: int, tensors: dict[str, dict[str, torch.Tensor]], state: dict[str, Any], limit: int | None
) -> Path:
    """Write `checkpoint-<step>` so that a kill cannot corrupt it, then delete the oldest beyond `limit`.

    Checkpoints of later steps go too: they are damaged, or of a course that this run has left.

    Args:
        tensors: One safetensors file per entry.
        state: Everything else, JSON-serialisable.
        limit: How many checkpoints to keep; `None` keeps all.
    """
    folder, temporary = output_dir / f"checkpoint-{step}", output_dir / f".tmp-{step}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for name, group in tensors.items():
        # Optimizers may share one tensor between entries, which safetensors refuses: copy each.
        copies = {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in group.items()}
        save_file(copies, temporary / f"{name}.safetensors")
    (temporary / "state.json").write_text(json.dumps(state))
    manifest = {path.name: {"bytes": path.stat().st_size, "sha256": hash_file(path)} for path in temporary.iterdir()}
    (temporary / "manifest.json").write_text(json.dumps(manifest, indent=2))
    for path in [*temporary.iterdir(), temporary]:
        flush(path)
    if folder.exists():
        folder.rename(output_dir / f".del-{step}")
    temporary.rename(folder)
    flush(output_dir)
    names = [path.name for path in list_checkpoints(output_dir)]
    newest = names.index(folder.name) + 1
    for name in [*names[newest:], *(names[: max(0, newest - limit)] if limit is not None else [])]:
        (output_dir / name).rename(output_dir / name.replace("checkpoint", ".del"))
    sweep(output_dir)
    return folder


def load_checkpoint(folder: Path) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, Any]]:
    """Read what [`save_checkpoint`] wrote.

    Raises:
        ValueError: A file is missing, or its size or SHA-256 sum is not the manifest's.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        for name, expected in manifest.items():
            path = folder / name
            if path.stat().st_size != expected["bytes"] or hash_file(path) != expected["sha256"]:
                raise ValueError(f"{path} is damaged")
    except (OSError, KeyError, TypeError, AttributeError) as error:  # the manifest may be what is damaged
        raise ValueError(f"{folder} is incomplete: {error}") from error
    tensors = {path.stem: load_file(path) for path in folder.glob("*.safetensors")}
    return tensors, json.loads((folder / "state.json").read_text())


def find_checkpoint(output_dir: Path, resume_from: str) -> tuple[dict, dict] | None:
    """The contents of the checkpoint that `--resume_from_checkpoint` asks for; `None` where "latest" finds none.

    "latest" passes over damaged checkpoints, and says so; one that is named must be whole.
    """
    if resume_from != "latest":
        candidates = [path for path in (output_dir / resume_from, Path(resume_from)) if path.is_dir()][:1]
        if not candidates:
            fail(
                f'--resume_from_checkpoint {resume_from} is no folder in {output_dir}; pass "latest" or drop the flag'
            )
    else:
        candidates = reversed(list_checkpoints(output_dir))
    for folder in candidates:
        try:
            return load_checkpoint(folder)
        except ValueError as error:
            if resume_from != "latest":
                fail(f'--resume_from_checkpoint {resume_from}: {error}; pass "latest" for the newest whole one')
            print(f"passing over {folder.name}: {error}", flush=True)
    return None


def hash_file(path: Path) -> str:
    """The SHA-256 sum of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


def flush(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
