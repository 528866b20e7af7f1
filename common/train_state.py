# Copyright 2026 The LIFT and PLACE distillation authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""What does a run need to go on exactly, and how is it put into a checkpoint and taken out of it?"""

import hashlib
import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from common.checkpoints import discard, find_checkpoint, list_checkpoints, save_checkpoint, step_of
from common.ending import Stopped, end_workers
from common.errors import fail
from common.finite import first_non_finite
from common.sharding import gather, spread_like

import torch
from accelerate import Accelerator, PartialState
from accelerate.logging import get_logger
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import gather_object
from diffusers.training_utils import EMAModel

from lift_utils import FeatureModel


logger = get_logger(__name__)

WEIGHTS = "diffusion_pytorch_model"  # of a model, as Diffusers names its file


class RunningMeans:
    """Means of what each step logs, from one row of metrics.jsonl to the next, equal on all processes.

    They stay on the device until they are read. A value that is not finite does not count: `skipped` tells of it.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self.sums: torch.Tensor | None = None  # of the values by name, and below them how many they are
        self.saved: dict[str, Any] = {}

    def add(self, values: dict[str, torch.Tensor]) -> None:
        """Count a step's scalars in. The names are the same in each step."""
        row = torch.stack([value.detach().float() for value in values.values()])
        finite = torch.isfinite(row)
        step = torch.stack([torch.where(finite, row, 0), finite.float()])
        if self.sums is None:
            before = zip(*(self.saved.get(name, (0.0, 0.0)) for name in values))
            self.names, self.sums = list(values), torch.tensor(list(before), device=row.device)
        self.sums += step

    def read(self) -> dict[str, float]:
        """The means, NaN where no value was finite, in a single read from the device; the next ones start anew."""
        sums, counts = self.sums.tolist()
        self.sums.zero_()
        return {name: total / count if count else math.nan for name, total, count in zip(self.names, sums, counts)}

    def state_dict(self) -> dict[str, Any]:
        """Sum and count of each value, for a checkpoint between two rows."""
        return self.saved if self.sums is None else dict(zip(self.names, zip(*self.sums.tolist())))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a [`state_dict`]."""
        self.saved, self.sums = state, None


@dataclass
class TrainState:
    """All that a run needs to continue exactly. Random states are not in it: see [`common.training.seed_step`]."""

    student: FeatureModel  # unwrapped
    optimizer: AcceleratedOptimizer  # as returned by Accelerator.prepare
    lr_scheduler: torch.optim.lr_scheduler.LambdaLR
    ema: EMAModel | None
    scaler: torch.amp.GradScaler | None
    skipped: torch.Tensor  # (2,): steps skipped in all and in a row, see `common.training.guarded_step`
    blocks: dict[str, str] | None  # of the teacher that the student started from, see `common.students.match_blocks`
    means: RunningMeans = field(default_factory=RunningMeans)  # of the steps since the last row of metrics.jsonl
    saved: int = 0  # the step of the newest checkpoint

    @property
    def step(self) -> int:
        """Steps done."""
        return self.lr_scheduler.last_epoch


def save_train_state(output_dir: Path, train_state: TrainState, limit: int | None) -> None:
    """Write everything into `checkpoint-<step>`. All processes call this, and the main one writes.

    Weights that are not finite end the run, and the checkpoints stay.

    Args:
        limit: How many checkpoints to keep; `None` keeps all.
    """
    step, model = train_state.step, train_state.student.model
    files = student_files(train_state.student, train_state.ema)
    weights = {name: gather(tensors) for name, tensors in files.items()}
    moments, optimizer = flatten_optimizer(train_state.optimizer)
    moments = gather(moments)
    train_state.saved = step
    if not PartialState().is_main_process:
        return
    state = {
        "step": step,
        "config": {key: value for key, value in model.config.items() if not key.startswith("_")},
        "blocks": _digest(train_state.blocks),
        "optimizer": optimizer,
        "lr_scheduler": train_state.lr_scheduler.state_dict(),
        "scaler": train_state.scaler and train_state.scaler.state_dict(),
        "skipped": train_state.skipped.tolist(),
        "means": train_state.means.state_dict(),
    }
    if train_state.ema is not None:
        state["ema_step"] = train_state.ema.optimization_step
    for name, tensors in weights.items():
        check_finite(tensors, "ema" if "_ema/" in name else "student", step)
    configs = {
        f"{Path(name).parent}/config.json": model.to_json_string() for name in weights if name.endswith(WEIGHTS)
    }
    # A bad step's weights may be ruined: they are not to drive out the last good ones.
    kept = None if train_state.skipped[1] else limit
    save_checkpoint(output_dir, step, {**weights, "optimizer": moments}, state, kept, configs)


def _digest(blocks: dict[str, str] | None) -> str | None:
    """What tells one choice of the teacher's blocks from another, shorter than the choice."""
    return blocks and hashlib.sha256(json.dumps(blocks, sort_keys=True).encode()).hexdigest()


def student_files(student: FeatureModel, ema: EMAModel | None) -> dict[str, dict[str, torch.Tensor]]:
    """The student's own tensors by the files of a checkpoint, which Diffusers loads.

    The model is in "unet" or "transformer", with averaged weights in "unet_ema" or "transformer_ema". Under LoRA it is
    the model without adapters, which are in "lora" and "lora_ema" as `load_lora_weights` takes them. The projections
    of features, which belong to no model, are in "projections".
    """
    model = student.model
    part = "unet" if "UNet" in type(model).__name__ else "transformer"
    weights = model.state_dict()
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    averages = {"_ema": dict(zip(trained, ema.shadow_params))} if ema is not None else {}
    files = {}
    for suffix, changed in {"": {}, **averages}.items():
        held = {**weights, **changed}
        adapters = {name: tensor for name, tensor in held.items() if ".lora_" in name}
        if not adapters or not suffix:
            own = {name.replace(".base_layer.", "."): held[name] for name in held.keys() - adapters.keys()}
            files[f"{part}{suffix}/{WEIGHTS}"] = dict(sorted(own.items()))
        if adapters:
            named = {f"{part}.{name.replace('.default.', '.')}": tensor for name, tensor in adapters.items()}
            files[f"lora{suffix}/pytorch_lora_weights"] = named
    projections = student.projections.state_dict()
    return {**files, "projections": projections} if projections else files


def check_finite(weights: dict[str, torch.Tensor], name: str, step: int) -> None:
    """End the run where weights are not finite.

    Args:
        name: Whose they are, "student" or "ema".
    """
    wrong = first_non_finite(weights)
    if wrong is not None:
        whose = {"student": "the student's weights", "ema": "the averaged weights"}[name]
        fail(
            f"{whose} are not finite after step {step} ({wrong}): the run has diverged; lower --learning_rate, or "
            "pass --mixed_precision no; nothing was saved, and checkpoints are as they were"
        )


def save_and_leave(
    output_dir: Path, train_state: TrainState, limit: int | None, accelerator: Accelerator, stopped: Stopped
) -> NoReturn:
    """Save the steps done, unless they are, and end the run as what stopped it says.

    Args:
        limit: How many checkpoints to keep; `None` keeps all.
        stopped: A signal, or the end of the data.
    """
    end_workers()  # here, because torch would wait five seconds for each of those that wait for something else
    if train_state.step > train_state.saved:
        save_train_state(output_dir, train_state, limit)
    accelerator.wait_for_everyone()
    saved = f"saved step {train_state.step}; go on with --resume_from_checkpoint latest"
    begun = "no step was done; the same command starts again"
    logger.info(f"{stopped.reason}: {saved if train_state.step else begun}")
    accelerator.end_training()
    sys.exit(stopped.code)


@torch.no_grad()
def load_train_state(output_dir: Path, resume_from: str | None, discard_later: bool, train_state: TrainState) -> int:
    """Continue from the checkpoint that `--resume_from_checkpoint` asks for; returns the number of steps done.

    Args:
        discard_later: Whether there may be newer ones, which are removed.
    """
    found = find_checkpoint(output_dir, resume_from, discard_later) if resume_from else None
    steps = gather_object([found[1]["step"] if found else 0]) if resume_from else [0]
    if len(set(steps)) > 1:  # each on a machine with a folder of its own, or one could not read it
        folder = "--output_dir must be one folder for all processes, that all can read"
        fail(f"--resume_from_checkpoint {resume_from}: processes find checkpoints of the steps {steps}; {folder}")
    if found is None:
        return 0
    tensors, state = found
    config = json.loads(json.dumps(dict(train_state.student.model.config)))
    different = [key for key in config if not key.startswith("_") and config[key] != state["config"].get(key)]
    blocks = _digest(train_state.blocks)
    if state.get("blocks", blocks) != blocks:  # older checkpoints do not say
        different.append("the teacher's blocks that it keeps")
    weights, moments = student_files(train_state.student, train_state.ema), tensors.pop("optimizer")
    saved, expected = (
        {name: {key: tensor.shape for key, tensor in file.items()} for name, file in files.items()}
        for files in (tensors, weights)
    )
    if different or saved != expected:
        what = ", ".join(different) or "the features, adapters or averaged weights"
        fail(f"--resume_from_checkpoint {resume_from} is of another student ({what} differ); pass the run's own flags")
    kind = state["optimizer"]["kind"]
    if kind != flatten_optimizer(train_state.optimizer)[1]["kind"]:
        fail(f"--resume_from_checkpoint {resume_from} is of {kind}; pass --use_8bit_adam as the run did, or leave it")
    for name, file in weights.items():
        for key, tensor in file.items():
            tensor.copy_(spread_like(tensors[name][key], tensor))
    restore_optimizer(train_state.optimizer, moments, state["optimizer"])
    # The place in the schedule is the checkpoint's, the learning rate is this run's: it may have been lowered.
    scheduler = train_state.lr_scheduler
    scheduler.load_state_dict({**state["lr_scheduler"], "base_lrs": scheduler.base_lrs})
    for group, peak, factor in zip(train_state.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas):
        group["lr"] = peak * factor(scheduler.last_epoch)
    if train_state.scaler is not None and state["scaler"]:
        train_state.scaler.load_state_dict(state["scaler"])
    train_state.skipped.copy_(torch.tensor(state["skipped"]))
    train_state.means.load_state_dict(state["means"])
    if train_state.ema is not None:
        train_state.ema.optimization_step = state["ema_step"]
    train_state.saved = state["step"]
    if discard_later and PartialState().is_main_process:  # else `latest` would go on from them until the next save
        discard(output_dir, [path.name for path in list_checkpoints(output_dir) if step_of(path) > state["step"]])
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
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    for key, value in {**tensors, **rest["scalars"]}.items():
        index, name = key.split(".", 1)
        spread = spread_like(value, weights[int(index)]) if isinstance(value, torch.Tensor) else value
        state.setdefault(int(index), {})[name] = spread
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
