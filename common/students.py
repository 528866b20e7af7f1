# Copyright 2026 The LIFT and PLACE distillation authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""How does a student get the teacher's blocks, and which features of the two are compared?"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from common.checkpoints import list_checkpoints
from common.errors import fail, first_line

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from torch.utils._pytree import tree_leaves

from lift_utils import FeatureModel, check_group_size


logger = get_logger(__name__)


def public_config(config: dict[str, Any]) -> dict[str, Any]:
    """A Diffusers config without its private entries: "_use_default_values" makes `from_config` ignore overrides."""
    return {key: value for key, value in config.items() if not key.startswith("_")}


def check_groups(group_size: int | None, elements: int) -> None:
    """End the run where groups of `--group_size` do not divide a channel; `None` is for losses without groups."""
    if group_size is not None:
        try:
            check_group_size(group_size, elements)
        except ValueError as error:
            fail(f"--group_size {group_size}: {error}")


def match_blocks(
    student: torch.nn.Module, teacher_state: dict[str, torch.Tensor], blocks: dict[str, str] | None = None
) -> dict[str, str]:
    """Which of the teacher's tensors each of the student's is to be copied from, by name.

    A student that is wider than its teacher is an error: what is wider could not be copied.

    Args:
        student: The model to fill. It may be on the meta device.
        teacher_state: The teacher's state dict.
        blocks: `{"student.prefix": "teacher.prefix"}`. Every tensor under a student prefix must find its counterpart
            there. `None` matches each tensor whose name and shape both models share.

    Raises:
        ValueError: A prefix names nothing, a tensor lacks a counterpart of its shape, or one is larger than the
            teacher's of its name.
    """
    state = student.state_dict()
    if blocks is None:
        for key in state.keys() & teacher_state.keys():
            ours, theirs = tuple(state[key].shape), tuple(teacher_state[key].shape)
            if any(side > other for side, other in zip(ours, theirs)):
                raise ValueError(f'"{key}" of shape {ours} is wider than the teacher\'s of shape {theirs}')
        return {key: key for key in state if key in teacher_state and teacher_state[key].shape == state[key].shape}
    source = {}
    for prefix, teacher_prefix in blocks.items():
        keys = [key for key in state if key == prefix or key.startswith(prefix + ".")]
        if not keys:
            raise ValueError(f'the student has no block "{prefix}"')
        source |= {key: teacher_prefix + key[len(prefix) :] for key in keys}
    for key, teacher_key in source.items():
        if teacher_key not in teacher_state:
            raise ValueError(f'the teacher has no "{teacher_key}" to copy into the student\'s "{key}"')
        shape, teacher_shape = tuple(state[key].shape), tuple(teacher_state[teacher_key].shape)
        if shape != teacher_shape:
            raise ValueError(
                f'"{key}" of shape {shape} cannot take the teacher\'s "{teacher_key}" of shape {teacher_shape}'
            )
    return source


def copy_blocks(
    student: torch.nn.Module, teacher_state: dict[str, torch.Tensor], blocks: dict[str, str] | None = None
) -> list[str]:
    """Copy teacher weights into the student, in place, and return the names of the tensors that stay as they were.

    The arguments and errors are those of [`match_blocks`].
    """
    source = match_blocks(student, teacher_state, blocks)
    student.load_state_dict({key: teacher_state[teacher_key] for key, teacher_key in source.items()}, strict=False)
    return [key for key in student.state_dict() if key not in source]


def share_blocks(student: torch.nn.Module, teacher_state: dict[str, torch.Tensor], blocks: dict[str, str]) -> None:
    """Make the teacher's own tensors the student's, in place: no weight of the student takes memory.

    The modules stay two models' own. Adapters that are added to the student's are therefore always on in the student
    and never in the teacher, also while gradient checkpointing runs a block again.

    Args:
        student: On the meta device. The blocks must cover all of it.

    Raises:
        ValueError: As [`match_blocks`].
    """
    source = match_blocks(student, teacher_state, blocks)
    student.load_state_dict({key: teacher_state[name] for key, name in source.items()}, assign=True)


# A run asks twice, before its data are read and after, and a pass on the meta device is slow.
KNOWN_SHAPES: dict[tuple, list[torch.Size]] = {}


def feature_shapes(
    model: torch.nn.Module, names: list[str], inputs: dict[str, torch.Tensor], item: int = 0
) -> list[torch.Size]:
    """The shapes of a model's features. The arguments are those of [`pair_features`].

    Raises:
        ValueError: A feature does not exist.
    """
    known = dict(model.named_modules())
    for name in names:
        if name not in known:
            raise ValueError(f'it pairs features of "{name}", which does not exist')
    sizes = tuple((value.shape, value.dtype) for value in tree_leaves(inputs) if torch.is_tensor(value))
    key = type(model), model.to_json_string(), tuple(names), item, sizes
    if key not in KNOWN_SHAPES:
        with torch.device("meta"), torch.no_grad():
            replica = FeatureModel(type(model).from_config(model.config), names, item=item)
            KNOWN_SHAPES[key] = [feature.shape for feature in replica(**inputs)[1]]
    return KNOWN_SHAPES[key]


def count_features(
    teacher: torch.nn.Module, pairs: list[list[str]], inputs: dict[str, torch.Tensor], item: int = 0
) -> int:
    """Elements of the teacher's features, to whose widths the student's are projected, of one image."""
    return sum(shape.numel() for shape in feature_shapes(teacher, [theirs for _, theirs in pairs], inputs, item))


def pair_features(
    student: torch.nn.Module,
    teacher: torch.nn.Module | None,
    pairs: list[list[str]],
    inputs: dict[str, torch.Tensor],
    always_project: bool = False,
    item: int = 0,
) -> tuple[FeatureModel, FeatureModel | None]:
    """Both models with their features, the student's projected to the teacher's widths (FitNet).

    Feature maps (B, C, H, W) get a 1x1 convolution, tokens (B, N, C) a linear layer.

    Args:
        student: A Diffusers model, without adapters.
        pairs: `[student module, teacher module]` each.
        inputs: Arguments of the forward pass of both, on the meta device: nothing is computed.
        always_project: Whether features of equal width are projected too.
        item: Which of a submodule's outputs to take where it returns several.

    Raises:
        ValueError: A feature does not exist, or two that are paired differ in more than their width.
    """
    if teacher is None or not pairs:
        return FeatureModel(student, []), teacher and FeatureModel(teacher, [])
    student_names, teacher_names = ([pair[side] for pair in pairs] for side in (0, 1))
    shapes = feature_shapes(student, student_names, inputs, item)
    teacher_shapes = feature_shapes(teacher, teacher_names, inputs, item)
    projections: list[torch.nn.Module] = []
    for pair, shape, teacher_shape in zip(pairs, shapes, teacher_shapes):
        channel = 1 if len(shape) == 4 else -1
        width, teacher_width = shape[channel], teacher_shape[channel]
        if len(shape) != len(teacher_shape) or shape.numel() // width != teacher_shape.numel() // teacher_width:
            raise ValueError(f"the features {pair} are {tuple(shape)} and {tuple(teacher_shape)}, which are no pair")
        if width == teacher_width and not always_project:
            projections.append(torch.nn.Identity())
        elif channel == 1:
            projections.append(torch.nn.Conv2d(width, teacher_width, 1))
        else:
            projections.append(torch.nn.Linear(width, teacher_width))
    return (
        FeatureModel(student, student_names, projections, item=item),
        FeatureModel(teacher, teacher_names, item=item),
    )


@torch.no_grad()
def measure_influence(blocks: torch.nn.ModuleList, run: Callable[[], Any], item: int = 0) -> list[float]:
    """How much each transformer block changes its tokens: 1 - cosine of input and output, the mean of all passes.

    The block influence of ShortGPT (Men et al., 2024): the blocks of least influence are the first to go.

    Args:
        blocks: Their forward takes `hidden_states` (B, N, C), by name or first.
        run: Forward passes of the whole model on data.
        item: Which of a block's outputs are the tokens where it returns several.
    """
    sums, calls = [0.0] * len(blocks), [0] * len(blocks)

    def record(index: int, module: torch.nn.Module, inputs: tuple, named: dict[str, Any], output: Any) -> None:
        before = named["hidden_states"] if "hidden_states" in named else inputs[0]
        after = output[item] if isinstance(output, tuple) else output
        sums[index] += 1 - torch.cosine_similarity(before.float(), after.float(), dim=-1).mean().item()
        calls[index] += 1

    hooks = [block.register_forward_hook(partial(record, i), with_kwargs=True) for i, block in enumerate(blocks)]
    run()
    for hook in hooks:
        hook.remove()
    return [total / count for total, count in zip(sums, calls)]


def choose_once(
    path: Path,
    depth: int,
    measure: Callable[[], tuple[list[float], list[int]]],
    resume_from: str | None,
    accelerator: Accelerator,
) -> list[int]:
    """The blocks that a student keeps: the main process chooses, every other one and a resumed run read its choice.

    Where two blocks are almost equal, other rounding would choose others, which no checkpoint fits.

    Args:
        path: Where the choice is kept, in the run's folder.
        depth: The number of blocks.
        measure: Returns the influence of each block of the teacher, and the blocks to keep.
        resume_from: `--resume_from_checkpoint`.
    """
    with accelerator.main_process_first():
        resumes = resume_from is not None and list_checkpoints(path.parent)  # else it is of a run that failed
        if path.exists() and (resumes or not accelerator.is_main_process):
            try:
                kept = json.loads(path.read_text(encoding="utf-8"))["kept"]
                if len(kept) != depth:
                    raise ValueError(f"it keeps {len(kept)} blocks")
            except (OSError, ValueError, KeyError, TypeError) as error:
                found = f"--student_depth {depth} does not go with {path}: {first_line(error)}"
                fail(f"{found}; pass the same depth as before, or another --output_dir to choose anew")
            return kept
        influence, kept = measure()
        if accelerator.is_main_process:
            temporary = path.with_name(f".{path.name}")
            temporary.write_text(json.dumps({"influence": influence, "kept": kept}), encoding="utf-8")
            temporary.replace(path)
        return kept


def is_narrower(student: torch.nn.Module, teacher: torch.nn.Module) -> bool:
    """Whether the student has the teacher's layers, each at most as wide."""
    shapes, teacher_shapes = (
        {key: tensor.shape for key, tensor in model.state_dict().items()} for model in (student, teacher)
    )
    return shapes.keys() == teacher_shapes.keys() and all(
        len(shape) == len(teacher_shapes[key]) and all(a <= b for a, b in zip(shape, teacher_shapes[key]))
        for key, shape in shapes.items()
    )


def read_blocks(keep_blocks: str, teacher_depth: int) -> list[int]:
    """The blocks that `--keep_blocks` lists in ascending order; the teacher has blocks 0 to `teacher_depth` - 1."""
    try:
        kept = [int(number) for number in keep_blocks.split(",")]
    except ValueError:
        fail(f"--keep_blocks {keep_blocks} is no list of blocks; pass numbers such as 0,2,4")
    missing = [block for block in kept if not 0 <= block < teacher_depth]
    if missing:
        fail(f"--keep_blocks {keep_blocks}: there is no block {missing[0]}; pass some of 0 to {teacher_depth - 1}")
    if kept != sorted(set(kept)):
        fail(f"--keep_blocks {keep_blocks} does not ascend; pass each block once, in the teacher's order")
    return kept


def spaced_blocks(depth: int, teacher_depth: int) -> list[int]:
    """`depth` of the teacher's blocks, evenly spaced, its last among them: TinyDiT-D14 (2i + 1) and D7 (4i + 3)."""
    return [(index + 1) * teacher_depth // depth - 1 for index in range(depth)]


def fill_from_blocks(
    student: torch.nn.Module, teacher: torch.nn.Module, blocks: dict[str, str] | None, random: bool
) -> None:
    """Copy the teacher's blocks (see [`copy_blocks`]) and say what starts from random weights; all where `random`.

    Raises:
        ValueError: As [`copy_blocks`].
    """
    if random:
        logger.info("the student starts from random weights")
        return
    fresh = copy_blocks(student, teacher.state_dict(), blocks)
    weights = {name: tensor.numel() for name, tensor in student.state_dict().items()}
    say = logger.warning if 2 * sum(map(weights.get, fresh)) > sum(weights.values()) else logger.info
    say(f"{len(fresh)} tensors of the student start from random weights: {', '.join(fresh) or 'none'}")
