# Copyright 2026 The LIFT and PLACE distillation authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""LIFT and PLACE, coarse-to-fine knowledge distillation of diffusion models: the method, and nothing else.

Source: "LIFT and PLACE: A Simple, Stable, and Effective Knowledge Distillation Framework for Lightweight Diffusion
Models", arXiv 2605.19729, CVPR 2026. This file needs torch and the standard library only. Copy it to use the loss in
a training loop of your own:

    loss = lift_place_loss(student_prediction, teacher_prediction, group_size=16).loss
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch


# A slope is cov / var, so its gradient grows like 1 / var: a flat student (a zero-initialised output layer) would meet
# gradients of 1e5. Where the student's variance in a group is below this share of the teacher's (a standard deviation
# below 1 %), the gradient of the group's slope is scaled down as if it were that share. The slope itself stays what it
# is: a bound on its value would give a nearly flat student slopes near 1, and hold it there.
MIN_VARIANCE_RATIO = 1e-4


class LiftPlaceLoss(NamedTuple):
    """The loss and its parts, in float32 (float64 for float64 inputs). G is the number of groups per channel."""

    loss: torch.Tensor  # scalar, differentiable
    coarse: torch.Tensor  # scalar, differentiable: distance of the fits from slope 1 and intercept 0
    fine: torch.Tensor  # scalar, differentiable: mean squared residual of the fits
    weight: torch.Tensor  # scalar in [0, 1], detached: what `fine` is multiplied by
    slope: torch.Tensor  # (B, C, G), detached
    intercept: torch.Tensor  # (B, C, G), detached


def lift_place_loss(
    student: torch.Tensor,
    teacher: torch.Tensor,
    group_size: int | None = 16,
    norm: str = "l1",
    weighting: str | float = "adaptive",
    group_by: str = "error",
    eps: float = 1e-7,
    reduction: str = "mean",
) -> LiftPlaceLoss:
    """Coarse-to-fine distillation loss between two predictions on the same noisy input (arXiv 2605.19729).

    Each group of elements gets the least-squares line `teacher ≈ slope · student + intercept`. The line's distance
    from (1, 0) is the coarse, easy error; what the line leaves over is the fine, hard error; the closer the lines are
    to (1, 0), the more the fine error counts. The arithmetic is float32 whatever the inputs' dtype, float64 for
    float64.

    Args:
        student: Prediction of shape (B, C, *spatial), any floating dtype. Gradients flow into it alone.
        teacher: Prediction of the same shape. Treated as a constant.
        group_size: Elements per group, a divisor of the spatial size; 16 in the published runs (PLACE). `None` makes
            each channel of each sample one group (LIFT).
        norm: Of the lines' distances from (1, 0) in the coarse term: "l1", or "l2" for their squares.
        weighting: "adaptive" for `1 - min(1, mean|slope - 1| + mean|intercept|)`, always an L1 distance and averaged
            over all processes of a distributed run, which must call this together with batches of one size; "constant"
            for 1; or a number in [0, 1]. Under gradient accumulation it is one weight per micro-batch.
        group_by: "error" groups elements of similar squared error, "position" groups neighbours in memory.
        eps: Added to the student's variance.
        reduction: "mean", or "sum" for the sum over a sample's elements averaged over the batch (C · N · mean).

    Returns:
        A [`LiftPlaceLoss`]. A NaN in the input makes the loss and the weight NaN: it is never hidden.

    Raises:
        ValueError: Shapes differ or lack a spatial dimension of two elements, a dtype is not floating, `group_size`
            does not divide the spatial size or is below 2, or an option is unknown.
    """
    _check_arguments(student, teacher, group_size, norm, weighting, group_by, reduction)
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    s = student.to(dtype).flatten(2)
    t = teacher.detach().to(dtype).flatten(2)

    if group_size is not None:
        if group_by == "error":
            # Stable, so that ties (all errors equal, say) give the same groups on every run.
            order = (s.detach() - t).square().sort(dim=-1, stable=True).indices
            s, t = s.gather(-1, order), t.gather(-1, order)
        s, t = s.unflatten(-1, (-1, group_size)), t.unflatten(-1, (-1, group_size))
    else:
        s, t = s.unsqueeze(-2), t.unsqueeze(-2)

    slope, intercept = _fit(s, t, eps)
    power = 1 if norm == "l1" else 2
    coarse = ((slope - 1).abs().pow(power) + intercept.abs().pow(power)).mean()
    slope, intercept = slope.detach(), intercept.detach()
    fine = (slope.unsqueeze(-1) * s + intercept.unsqueeze(-1) - t).square().mean()

    if weighting == "adaptive":
        weight = _adaptive_weight(slope, intercept)
    else:
        weight = torch.full_like(coarse.detach(), 1.0 if weighting == "constant" else weighting)

    loss = coarse + weight * fine
    if reduction == "sum":
        loss = loss * student[0].numel()
    return LiftPlaceLoss(loss, coarse, fine, weight, slope, intercept)


def _fit(s: torch.Tensor, t: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Least-squares slope and intercept of t on s over the last dimension, from population moments."""
    s_mean, t_mean = s.mean(-1), t.mean(-1)
    s_centred, t_centred = s - s_mean.unsqueeze(-1), t - t_mean.unsqueeze(-1)
    variance = s_centred.square().mean(-1)
    slope = (s_centred * t_centred).mean(-1) / (variance + eps)
    least = MIN_VARIANCE_RATIO * t_centred.square().mean(-1)
    damping = ((variance + eps) / (torch.maximum(variance, least) + eps)).detach()
    slope = slope.detach() + damping * (slope - slope.detach())
    return slope, t_mean - slope * s_mean


def _adaptive_weight(slope: torch.Tensor, intercept: torch.Tensor) -> torch.Tensor:
    distance = (slope - 1).abs().mean() + intercept.abs().mean()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(distance)
        distance = distance / torch.distributed.get_world_size()
    # A tensor clamp keeps NaN; Python's min(1.0, nan) is 1.0 and would turn it into a weight of 0.
    return 1 - distance.clamp(max=1)


def _check_arguments(
    student: torch.Tensor,
    teacher: torch.Tensor,
    group_size: int | None,
    norm: str,
    weighting: str | float,
    group_by: str,
    reduction: str,
) -> None:
    if student.shape != teacher.shape or student.ndim < 3 or student.numel() == 0:
        raise ValueError(
            f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must have one shape (B, C, *spatial), "
            "with at least one spatial dimension and no empty one"
        )
    for name, tensor in (("student", student), ("teacher", teacher)):
        if not tensor.is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype}; pass a floating-point prediction, e.g. {name}.float()")
    elements = student[0, 0].numel()
    if elements < 2:
        raise ValueError(f"{tuple(student.shape)} has one element per channel: there is nothing to fit; use plain MSE")
    if group_size is not None:
        check_group_size(group_size, elements)
    if weighting not in ("adaptive", "constant") and (isinstance(weighting, str) or not 0 <= weighting <= 1):
        raise ValueError(f'weighting is {weighting!r}; choose "adaptive", "constant" or a number in [0, 1]')
    for name, value, choices in (
        ("norm", norm, ("l1", "l2")),
        ("group_by", group_by, ("error", "position")),
        ("reduction", reduction, ("mean", "sum")),
    ):
        if value not in choices:
            raise ValueError(f"{name} is {value!r}; choose {choices[0]!r} or {choices[1]!r}")


def check_group_size(group_size: int, elements: int) -> None:
    """Raise a ValueError that names the nearest possible group sizes unless `group_size` > 1 divides `elements`."""
    if group_size > 1 and elements % group_size == 0:
        return
    divisors = [size for size in range(2, elements + 1) if elements % size == 0]
    below = [size for size in divisors if size < group_size][-1:]
    above = [size for size in divisors if size > group_size][:1]
    nearest = " or ".join(str(size) for size in below + above)
    why = "leaves nothing to fit in a group" if group_size < 2 else f"does not divide the {elements} elements"
    raise ValueError(f"group_size {group_size} {why} of a channel; the nearest that does: {nearest}")


# ----------------------------------------------------------------------------------- the output term of a training run

# (student_prediction, teacher_prediction, progress, weights=None) -> (loss, its parts to log). `progress` is the share
# of the training steps that are done, in [0, 1]; `weights` are those of the samples, (B,).
KDLoss = Callable[..., tuple[torch.Tensor, dict[str, torch.Tensor]]]


def make_kd_loss(
    kind: str,
    group_size: int = 16,
    group_by: str = "error",
    norm: str = "l1",
    weighting: str = "adaptive",
) -> KDLoss | None:
    """The loss between the student's and the teacher's output, built once for a training run.

    Args:
        kind: "place", "lift", plain distillation by "mse" or "rms", or "none", which gives `None`.
        group_size: Elements per group of PLACE. The other kinds do not use it.
        group_by: See [`lift_place_loss`].
        norm: See [`lift_place_loss`].
        weighting: Weight of the fine term: "adaptive", "constant" (1), "linear" or "cosine" (rising from 0 to 1 over
            the run), "coarse_only" (0), or "fine_only" (the fine term alone, without the coarse one).

    Returns:
        A function of two predictions (B, C, *spatial), the progress and, for "mse" and "rms", weights of the samples
        (B,). It returns the mean loss, a differentiable scalar, and what to log, scalars that stay on the device: its
        parts by name, and whatever the kind "kd_mse", and "teacher_finite": 1 where all of the teacher's output is.
    """
    if kind == "none":
        return None
    if kind in ("mse", "rms"):
        return partial(_plain_loss, kind)

    def kd_loss(
        student: torch.Tensor, teacher: torch.Tensor, progress: float, weights: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        if weights is not None:
            raise ValueError(f"{kind} compares a batch's groups, and has no weights of samples; use mse or rms")
        parts = lift_place_loss(
            student,
            teacher,
            group_size=group_size if kind == "place" else None,
            norm=norm,
            weighting=fine_weighting(weighting, progress),
            group_by=group_by,
        )
        logs = {"coarse": parts.coarse, "fine": parts.fine, "weight": parts.weight}
        logs |= _plain_loss("mse", student.detach(), teacher, progress)[1]
        for name, value in (("slope", parts.slope), ("intercept", parts.intercept)):
            logs |= {f"{name}_mean": value.mean(), f"{name}_std": value.std(correction=0)}
        return parts.fine if weighting == "fine_only" else parts.loss, logs

    return kd_loss


def _plain_loss(
    kind: str, student: torch.Tensor, teacher: torch.Tensor, progress: float, weights: torch.Tensor | None = None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    logs = {"kd_mse": prediction_error(student, teacher), "teacher_finite": torch.isfinite(teacher).all().float()}
    return prediction_error(student, teacher, kind, weights), logs


def prediction_error(
    prediction: torch.Tensor, target: torch.Tensor, kind: str = "mse", weights: torch.Tensor | None = None
) -> torch.Tensor:
    """The batch's mean of each sample's mean square ("mse") or its root ("rms"), in float32, by weights (B,)."""
    error = (prediction.float() - target.float()).square().flatten(1).mean(1)
    error = (error + 1e-8).sqrt() if kind == "rms" else error
    return (error if weights is None else weights * error).mean()


def fine_weighting(weighting: str, progress: float) -> str | float:
    """What [`lift_place_loss`] takes as `weighting` at a share of the run, for a `weighting` of [`make_kd_loss`]."""
    schedule = {"linear": progress, "cosine": (1 - math.cos(math.pi * progress)) / 2}
    schedule |= {"coarse_only": 0.0, "fine_only": 1.0}
    return schedule.get(weighting, weighting)


# ---------------------------------------------------------------------------------------------------- feature capture


class FeatureModel(torch.nn.Module):
    """A model that returns `(prediction, features)`: its output sample and the outputs of the named submodules.

    The features are outputs of the forward pass, so DistributedDataParallel sees them and `compile()` can trace them.
    Optional projections (FitNet, one per name) are trained with the model and never saved into it.

    Args:
        model: A Diffusers model whose forward takes `return_dict`.
        names: Submodules whose outputs are captured.
        projections: One module per name, applied to its feature.
        item: Which of a submodule's outputs to take where it returns several.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        names: list[str],
        projections: list[torch.nn.Module] | None = None,
        item: int = 0,
    ):
        super().__init__()
        self.model = model
        self.names = names
        self.item = item
        self.projections = torch.nn.ModuleList(projections or [torch.nn.Identity() for _ in names])
        self._captured: dict[str, torch.Tensor] = {}
        self._capturing = False  # outside of this forward, as when samples are drawn, the model is only itself
        for name in names:
            model.get_submodule(name).register_forward_hook(partial(self._capture, name))

    def _capture(self, name: str, module: torch.nn.Module, inputs: Any, output: Any) -> None:
        if self._capturing:
            self._captured[name] = output[self.item] if isinstance(output, tuple) else output

    def forward(self, *args, **kwargs) -> tuple[torch.Tensor, list[torch.Tensor]]:
        self._capturing = True
        prediction = self.model(*args, return_dict=False, **kwargs)[0]
        self._capturing = False
        features = [project(self._captured[name]) for name, project in zip(self.names, self.projections)]
        self._captured.clear()
        return prediction, features
