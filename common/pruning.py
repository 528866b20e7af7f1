# Copyright 2026 The LIFT and PLACE distillation authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""How is a narrower U-Net filled with the teacher's most important channels?"""

import copy
import math
from collections.abc import Callable

from common.errors import fail
from common.students import is_narrower

import torch
import torch_pruning as tp
from diffusers.models.attention_processor import Attention


def is_pruned(student: torch.nn.Module, teacher: torch.nn.Module, recipe: dict, student_init: str) -> bool:
    """Whether `--student_init` fills the student with the largest of the teacher's channels, by [`prune_width`].

    Args:
        student: It may be on the meta device, as the teacher.
        teacher: Of the same layers, or others.
        recipe: What a preset or a JSON file says of the student.
        student_init: "random", or how the teacher's weights are chosen.
    """
    narrower = student.num_parameters() < teacher.num_parameters() and is_narrower(student, teacher)
    return student_init != "random" and narrower and "blocks" not in recipe


def check_prunable(teacher: torch.nn.Module) -> None:
    """Refuse a U-Net whose channels cannot be pruned."""
    if teacher.config.time_embedding_type != "positional" or teacher.config.resnet_time_scale_shift != "default":
        only = "models with a positional time embedding that is added, not scaled by"
        fail(f"--student_init can prune {only}; pass --student_init random")


def prune_width(
    student: torch.nn.Module,
    teacher: torch.nn.Module,
    example: tuple[torch.Tensor, ...],
    accumulate: Callable[[torch.nn.Module], None] | None = None,
    timesteps: int = 1000,
) -> None:
    """Fill a narrower U-Net with the teacher's most important channels, over torch-pruning's dependency graph.

    Coupled layers (residual and skip connections, attention, time embedding) keep the same channels. Channels compete
    within the student's normalisation groups and attention heads, which therefore stay parts of the teacher's.

    Args:
        student: A UNet2DModel or UNet2DConditionModel for which [`common.students.is_narrower`] holds.
        teacher: Stays as it is.
        example: Inputs of its forward pass.
        accumulate: Puts gradients into a copy of the teacher; channels are then ranked by |weight · gradient| (Taylor)
            instead of by the magnitude of their weights.
        timesteps: Of the noise schedule.
    """
    check_prunable(teacher)
    pruned = copy.deepcopy(teacher).eval()
    importance = (
        tp.importance.GroupMagnitudeImportance() if accumulate is None else tp.importance.GroupTaylorImportance()
    )
    if accumulate is not None:
        accumulate(pruned)
    graph = tp.DependencyGraph().build_dependency(pruned, example_inputs=example)
    names = {module: name for name, module in pruned.named_modules()}

    for group in graph.get_all_groups(ignored_layers=[pruned.conv_out]):
        layers = [dep.target.module for dep, _ in group if graph.is_out_channel_pruning_fn(dep.handler)]
        root = names[layers[0]]
        keep, scores = student.get_submodule(root).weight.shape[0], importance(group)
        if root.endswith("ff.net.0.proj"):  # GEGLU: each channel beside its gate in the other half
            kept = keep_channels(scores.view(2, -1).sum(0), keep // 2)
            kept = torch.cat([kept, kept + len(scores) // 2])
        else:
            kept = keep_channels(scores, keep, *_count_parts(layers, names, pruned, student))
        group.prune(sorted(set(range(len(scores))) - set(kept.tolist())))

    state = pruned.state_dict()
    state.update(_fit_time_embedding(student, teacher, state, timesteps))
    for name, module in student.named_modules():
        if isinstance(module, Attention):
            # Attention divides by the root of the head's width: keep dividing by the teacher's.
            wider = teacher.get_submodule(name)
            factor = math.sqrt(module.inner_dim / module.heads / (wider.inner_dim / wider.heads))
            for key in ("weight", "bias"):
                if f"{name}.to_q.{key}" in state:
                    state[f"{name}.to_q.{key}"] = state[f"{name}.to_q.{key}"] * factor
    student.load_state_dict(state)


def _count_parts(
    layers: list[torch.nn.Module],
    names: dict[torch.nn.Module, str],
    teacher: torch.nn.Module,
    student: torch.nn.Module,
) -> tuple[int, int]:
    """Into how many heads or normalisation groups the coupled channels fall in the teacher and in the student."""
    for layer in layers:
        name = names.get(layer, "")
        if name.endswith(".to_q"):
            attention = name.removesuffix(".to_q")
            return teacher.get_submodule(attention).heads, student.get_submodule(attention).heads
    for layer in layers:
        if isinstance(layer, torch.nn.GroupNorm):
            groups = student.get_submodule(names[layer]).num_groups
            return groups, groups
    return 1, 1


def keep_channels(scores: torch.Tensor, keep: int, parts: int = 1, kept_parts: int = 1) -> torch.Tensor:
    """Indices, ascending, of the best `keep` channels: the best `kept_parts` of `parts`, equally many from each.

    Where such parts do not exist, say of a student with more or wider heads, all channels compete.
    """
    uneven = len(scores) % parts or keep % kept_parts
    if uneven or kept_parts > parts or keep // kept_parts > len(scores) // parts:
        parts = kept_parts = 1
    table = scores.view(parts, -1)
    best = table.sum(1).topk(kept_parts).indices.sort().values
    inside = table[best].topk(keep // kept_parts, dim=1).indices.sort(dim=1).values
    return (best.unsqueeze(1) * table.shape[1] + inside).flatten()


def _fit_time_embedding(
    student: torch.nn.Module, teacher: torch.nn.Module, state: dict[str, torch.Tensor], timesteps: int
) -> dict[str, torch.Tensor]:
    """Weights with which the narrower sinusoid enters the time embedding as the teacher's did.

    A narrower sinusoid has other frequencies, so no choice of columns is exact: the first layer is refitted by least
    squares over all timesteps.
    """
    if student.time_proj.num_channels == teacher.time_proj.num_channels:
        return {}
    weight, bias = state["time_embedding.linear_1.weight"], state["time_embedding.linear_1.bias"]
    steps = torch.arange(timesteps)
    wide, narrow = teacher.time_proj(steps).double(), student.time_proj(steps).double()
    narrow = torch.cat([narrow, torch.ones_like(narrow[:, :1])], dim=1)
    target = wide @ weight.double().T + bias.double()
    # Neighbouring low frequencies are nearly collinear: rcond keeps their weights small, though the fit is a little
    # worse for it. Sums of large weights that cancel out are mostly rounding errors in half precision.
    solution = torch.linalg.lstsq(narrow, target, rcond=1e-2, driver="gelsd").solution.to(weight.dtype)
    return {"time_embedding.linear_1.weight": solution[:-1].T, "time_embedding.linear_1.bias": solution[-1]}
