# Copyright 2026 The LIFT and PLACE distillation authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""`lift_place_loss` against golden data, a reference written with loops, and the properties its definition implies."""

import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed
import torch.multiprocessing

from lift_utils import MIN_VARIANCE_RATIO, LiftPlaceLoss, lift_place_loss


GOLDEN = Path(__file__).parent / "golden"
GOLDEN_ROWS = json.loads((GOLDEN / "lift_place.json").read_text())
ARGUMENTS = ("group_size", "norm", "eps", "weighting", "group_by")

LIFT = {"group_size": None}
PLACE = {"group_size": 16}
BY_POSITION = {"group_size": 16, "group_by": "position"}
GROUPINGS = [
    pytest.param(LIFT, id="lift"),
    pytest.param({"group_size": 4}, id="place-4"),
    pytest.param(PLACE, id="place-16"),
    pytest.param(BY_POSITION, id="position-16"),
]
LIFT_AND_PLACE = [pytest.param(LIFT, id="lift"), pytest.param(PLACE, id="place")]


# ------------------------------------------------------------------------------------------------------------- helpers


def make_pair(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """A student that has come close to its teacher, so that the adaptive weight lies well inside (0, 1)."""
    generator = torch.Generator().manual_seed(seed)
    teacher, noise = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    student = 0.9 * teacher + 0.05 + 0.2 * noise
    return student.to(dtype).requires_grad_(), teacher.to(dtype)


def make_separated_pair(*shape: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A pair whose squared errors keep a distance from each other that no finite difference can bridge."""
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(shape, generator=generator, dtype=torch.float64)
    error = torch.linspace(0.1, 1.0, student.numel(), dtype=torch.float64)
    sign = torch.randn(student.numel(), generator=generator).sign()
    error = (error * sign)[torch.randperm(student.numel(), generator=generator)]
    return student.requires_grad_(), student.detach() + error.view(shape)


def standardise(tensor: torch.Tensor) -> torch.Tensor:
    """Mean 0 and population variance 1 over the last dimension."""
    centred = tensor - tensor.mean(-1, keepdim=True)
    return centred / centred.square().mean(-1, keepdim=True).sqrt()


def make_line(correlation: float, share: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Groups of 16 with a teacher of variance 1 and a student of exactly this share of its standard deviation."""
    generator = torch.Generator().manual_seed(0)
    teacher, noise = standardise(torch.randn(2, 2, 3, 4, 16, generator=generator, dtype=torch.float64))
    noise = standardise(noise - (noise * teacher).mean(-1, keepdim=True) * teacher)
    student = share * (correlation * teacher + (1 - correlation**2) ** 0.5 * noise)
    return (student + 0.2).flatten(2).requires_grad_(), (teacher + 0.3).flatten(2)


def gradient(value: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(value, student)[0]


def numeric_gradient(function, student: torch.Tensor, step: float = 1e-6) -> torch.Tensor:
    """Central differences, one element at a time."""
    steps = step * torch.eye(student.numel(), dtype=student.dtype).view(-1, *student.shape)
    student = student.detach()
    differences = [(function(student + h) - function(student - h)).item() / (2 * step) for h in steps]
    return torch.tensor(differences, dtype=student.dtype).view(student.shape)


def assert_close(actual: torch.Tensor, expected, relative: float) -> None:
    """Equal to a share of the largest expected magnitude: entries near zero carry the rounding of the others."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    scale = expected.abs().max().item()
    torch.testing.assert_close(actual.detach().double(), expected, rtol=0, atol=relative * scale)


def reference(student, teacher, group_size, norm="l1", weighting="adaptive", group_by="error", eps=1e-7):
    """The published definition for (B, C, N), element by element, with its gradient and without a variance bound."""
    students, teachers = student.detach().numpy(), teacher.numpy()
    batch, channels, elements = students.shape
    size = group_size or elements
    fits = []
    for sample, channel in itertools.product(range(batch), range(channels)):
        s, t = students[sample, channel].tolist(), teachers[sample, channel].tolist()
        ranking = list(range(elements))
        if group_by == "error":
            ranking.sort(key=lambda i: (s[i] - t[i]) ** 2)
        for start in range(0, elements, size):
            group = ranking[start : start + size]
            s_mean = sum(s[i] for i in group) / size
            t_mean = sum(t[i] for i in group) / size
            variance = sum((s[i] - s_mean) ** 2 for i in group) / size
            a = sum((s[i] - s_mean) * (t[i] - t_mean) for i in group) / size / (variance + eps)
            fits.append((sample, channel, group, s_mean, t_mean, variance, a, t_mean - a * s_mean))

    slopes, intercepts = np.array([fit[-2] for fit in fits]), np.array([fit[-1] for fit in fits])
    power = {"l1": 1, "l2": 2}[norm]
    coarse = np.mean(abs(slopes - 1) ** power + abs(intercepts) ** power)
    weight = {"adaptive": 1 - min(1, np.mean(abs(slopes - 1)) + np.mean(abs(intercepts))), "constant": 1.0}.get(
        weighting, weighting
    )

    def derivative(x):
        return math.copysign(1, x) if norm == "l1" else 2 * x

    fine, gradients = 0.0, np.zeros_like(students)
    for sample, channel, group, s_mean, t_mean, variance, a, b in fits:
        for i in group:
            s, t = students[sample, channel, i], teachers[sample, channel, i]
            residual = a * s + b - t
            fine += residual**2 / students.size
            d_a = (t - t_mean - 2 * a * (s - s_mean)) / (size * (variance + eps))
            d_b = -s_mean * d_a - a / size
            d_coarse = (derivative(a - 1) * d_a + derivative(b) * d_b) / len(fits)
            gradients[sample, channel, i] = d_coarse + weight * 2 * a * residual / students.size
    groups = (batch, channels, -1)
    return SimpleNamespace(
        loss=coarse + weight * fine,
        coarse=coarse,
        fine=fine,
        weight=weight,
        slope=slopes.reshape(groups),
        intercept=intercepts.reshape(groups),
        gradient=gradients,
    )


def assert_matches(result: LiftPlaceLoss, student: torch.Tensor, expected: SimpleNamespace, relative: float) -> None:
    for name in LiftPlaceLoss._fields:
        assert_close(getattr(result, name), getattr(expected, name), relative)
    assert_close(gradient(result.loss, student).view(expected.gradient.shape), expected.gradient, relative)


def group_order(student, teacher, group_size=None, group_by="error") -> torch.Tensor:
    """The positions (B, C, G, P) of the elements of each group."""
    squared_error = (student.detach() - teacher).flatten(2).numpy() ** 2
    if group_size is None or group_by == "position":
        squared_error = np.zeros_like(squared_error)
    order = torch.from_numpy(np.argsort(squared_error, axis=-1, kind="stable"))
    return order.unflatten(-1, (-1, group_size or order.shape[-1]))


def in_groups(tensor: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    return tensor.flatten(2).gather(-1, order.flatten(2)).view(order.shape)


# ------------------------------------------------------------------------------------------------ golden and reference


@pytest.fixture(scope="module")
def golden_arrays():
    with np.load(GOLDEN / "lift_place.npz") as arrays:
        return dict(arrays)


@pytest.mark.parametrize(("dtype", "relative"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["f64", "f32"])
@pytest.mark.parametrize("layout", ["image", "flat", "video"])
@pytest.mark.parametrize("index", range(len(GOLDEN_ROWS)))
def test_golden(golden_arrays, index, layout, dtype, relative):
    row = GOLDEN_ROWS[index]
    batch, channels, height, width = row["shape"]
    shape = {"image": (height, width), "flat": (height * width,), "video": (2, height // 2, width)}[layout]
    student, teacher = (
        torch.from_numpy(golden_arrays[f"{index}/{name}"]).to(dtype).view(batch, channels, *shape)
        for name in ("student", "teacher")
    )
    student.requires_grad_()
    arrays = {name: golden_arrays[f"{index}/{name}"] for name in ("slope", "intercept", "gradient")}
    parts = {name: row[name] for name in ("loss", "coarse", "fine", "weight")}

    result = lift_place_loss(student, teacher, **{name: row[name] for name in ARGUMENTS if name in row})

    assert {part.dtype for part in result} == {dtype}
    assert result.slope.shape == result.intercept.shape == arrays["slope"].shape
    assert_matches(result, student, SimpleNamespace(**arrays, **parts), relative)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("weighting", ["adaptive", "constant", 0.25])
@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("grouping", GROUPINGS)
def test_element_by_element_reference(grouping, norm, weighting, seed):
    student, teacher = make_pair(2, 3, 32, seed=seed)
    options = {**grouping, "norm": norm, "weighting": weighting, "eps": 1e-3}
    expected = reference(student, teacher, **options)
    assert 0 < expected.weight <= 1
    assert_matches(lift_place_loss(student, teacher, **options), student, expected, 1e-10)


def test_defaults_are_the_published_ones():
    student, teacher = make_pair(2, 3, 8, 8)
    published = lift_place_loss(student, teacher, 16, "l1", "adaptive", "error", 1e-7, "mean")
    assert torch.equal(lift_place_loss(student, teacher).loss, published.loss)


def test_memory_layout_does_not_matter():
    """By position too, which groups neighbours in a contiguous image, not in the storage of a channels_last one."""
    student, teacher = make_pair(2, 4, 8, 8)
    channels_last = student.detach().to(memory_format=torch.channels_last).requires_grad_()
    expected = lift_place_loss(student, teacher, **BY_POSITION)
    result = lift_place_loss(channels_last, teacher.to(memory_format=torch.channels_last), **BY_POSITION)
    assert torch.equal(result.slope, expected.slope)
    assert torch.equal(gradient(result.loss, channels_last), gradient(expected.loss, student))


# ---------------------------------------------------------------------------------------- what the definition promises


@pytest.mark.parametrize("eps", [1e-7, 1e-2])
@pytest.mark.parametrize("grouping", GROUPINGS)
def test_identical_inputs_cost_nothing(grouping, eps):
    student, _ = make_pair(2, 3, 8, 8)
    teacher = student.detach().clone()
    result = lift_place_loss(student, teacher, eps=eps, **grouping)
    groups = in_groups(teacher, group_order(student, teacher, **grouping))
    slope_error = eps / groups.var(-1, correction=0)  # a = var / (var + eps)
    intercept_error = slope_error * groups.mean(-1).abs()
    assert ((1 - result.slope).abs() <= slope_error + 1e-12).all()
    assert (result.intercept.abs() <= intercept_error + 1e-12).all()
    assert result.coarse <= (slope_error + intercept_error).mean() + 1e-12
    assert result.fine <= (slope_error.square() * groups.var(-1, correction=0)).mean() + 1e-12


@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize(("alpha", "beta"), [(0.9, 0.05), (1.2, -0.3), (-2.0, 0.5), (3.0, 10.0)])
def test_affine_teacher_is_recovered(alpha, beta, grouping):
    student, _ = make_pair(2, 3, 8, 8)
    result = lift_place_loss(student, alpha * student.detach() + beta, eps=0.0, **grouping)
    distance = abs(alpha - 1) + abs(beta)
    torch.testing.assert_close(result.slope, torch.full_like(result.slope, alpha), rtol=1e-9, atol=0)
    torch.testing.assert_close(result.intercept, torch.full_like(result.intercept, beta), rtol=1e-9, atol=0)
    assert result.fine < 1e-20
    assert result.coarse.item() == pytest.approx(distance, rel=1e-9)
    assert result.weight.item() == pytest.approx(1 - min(1, distance), rel=1e-9)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("grouping", GROUPINGS)
def test_orthogonality(grouping, seed):
    """Without eps the squared error splits without remainder into fine and what the lines themselves explain."""
    student, teacher = make_pair(2, 3, 8, 8, seed=seed)
    student = 0.5 * student.detach() + 1
    result = lift_place_loss(student, teacher, eps=0.0, **grouping)
    s = in_groups(student, group_order(student, teacher, **grouping))
    explained = ((result.slope.unsqueeze(-1) - 1) * s + result.intercept.unsqueeze(-1)).square().mean()
    assert explained > 0.1 and result.fine > 1e-4
    torch.testing.assert_close((student - teacher).square().mean(), result.fine + explained, rtol=1e-12, atol=0)


@pytest.mark.parametrize("grouping", GROUPINGS)
def test_permuting_positions(grouping):
    student, teacher = make_pair(2, 3, 64)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    permuted = student.detach()[..., order].requires_grad_()
    result = lift_place_loss(student, teacher, **grouping)
    shuffled = lift_place_loss(permuted, teacher[..., order], **grouping)
    if grouping is BY_POSITION:
        assert (shuffled.slope - result.slope).abs().max() > 0.1
        assert (shuffled.loss - result.loss).abs() > 1e-5
    else:
        for name in LiftPlaceLoss._fields:
            assert_close(getattr(shuffled, name), getattr(result, name).detach(), 1e-12)
        assert_close(gradient(shuffled.loss, permuted), gradient(result.loss, student)[..., order], 1e-12)


def test_ties_keep_the_order_of_the_elements():
    """Errors that are all equal sort to the order they came in, so the groups are those by position."""
    student = torch.randint(-8, 8, (2, 3, 4096), generator=torch.Generator().manual_seed(0)).float()
    teacher = student + torch.tensor([1.0, -1.0, -1.0, 1.0]).repeat(1024)
    results = [lift_place_loss(student, teacher, **PLACE) for _ in range(3)]
    for result in [*results, lift_place_loss(student, teacher, **BY_POSITION)]:
        assert torch.equal(result.slope, results[0].slope)
        assert torch.equal(result.loss, results[0].loss)


# ----------------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize("weighting", [0.0, 0.5, "constant"])
def test_gradcheck(weighting, grouping, norm):
    """At eps = 0 the lines minimise `fine`, so it makes no difference that its gradient takes them for constants."""
    student, teacher = make_separated_pair(1, 2, 16)
    options = {**grouping, "norm": norm, "weighting": weighting, "eps": 0.0}
    assert torch.autograd.gradcheck(lambda s: lift_place_loss(s, teacher, **options).loss, student)


@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize("weighting", [0.0, 0.5, "constant"])
def test_fine_takes_the_lines_for_constants(weighting, grouping):
    """A large eps moves the lines off the minimum of `fine`, where a gradient through them would show."""
    student, teacher = make_separated_pair(1, 2, 16)
    options = {**grouping, "eps": 0.5}
    result = lift_place_loss(student, teacher, weighting=weighting, **options)
    order = group_order(student, teacher, **grouping)
    slope, intercept = result.slope.unsqueeze(-1), result.intercept.unsqueeze(-1)

    def residual(s):
        return slope * in_groups(s, order) + intercept - in_groups(teacher, order)

    by_hand = 2 * slope * residual(student) / student.numel()
    assert_close(in_groups(gradient(result.fine, student), order), by_hand, 1e-12)

    def frozen(s):
        coarse = lift_place_loss(s, teacher, weighting=0.0, **options).loss
        return coarse + result.weight * residual(s).square().mean()

    analytic = gradient(lift_place_loss(student, teacher, weighting=weighting, **options).loss, student)
    assert_close(analytic, numeric_gradient(frozen, student), 1e-7)
    if weighting:
        through = numeric_gradient(lambda s: lift_place_loss(s, teacher, weighting=weighting, **options).loss, student)
        assert (analytic - through).abs().max() > 1e-2 * analytic.abs().max()


@pytest.mark.parametrize("grouping", LIFT_AND_PLACE)
def test_adaptive_weight_is_a_constant_of_the_gradient(grouping):
    student, teacher = make_pair(2, 3, 64)
    adaptive = lift_place_loss(student, teacher, **grouping)
    fixed = lift_place_loss(student, teacher, weighting=adaptive.weight.item(), **grouping)
    assert 0.1 < adaptive.weight < 0.9
    assert torch.equal(adaptive.loss, fixed.loss)
    assert torch.equal(gradient(adaptive.loss, student), gradient(fixed.loss, student))


@pytest.mark.parametrize("grouping", LIFT_AND_PLACE)
def test_only_the_student_learns(grouping):
    student, teacher = make_pair(2, 3, 64)
    teacher.requires_grad_()
    result = lift_place_loss(student, teacher, **grouping)
    result.loss.backward()
    assert teacher.grad is None
    assert student.grad.abs().max() > 0
    assert not any(part.requires_grad for part in (result.weight, result.slope, result.intercept))


# ------------------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("grouping", LIFT_AND_PLACE)
def test_sum_is_the_mean_times_the_elements_of_a_sample(grouping, norm):
    student, teacher = make_pair(2, 3, 8, 8)
    mean = lift_place_loss(student, teacher, norm=norm, **grouping)
    total = lift_place_loss(student, teacher, norm=norm, reduction="sum", **grouping)
    assert_close(total.loss, 3 * 8 * 8 * mean.loss.detach(), 1e-14)
    assert_close(gradient(total.loss, student), 3 * 8 * 8 * gradient(mean.loss, student), 1e-14)
    for name in ("coarse", "fine", "weight"):
        assert torch.equal(getattr(total, name), getattr(mean, name))


@pytest.mark.parametrize("grouping", LIFT_AND_PLACE)
def test_adaptive_weight_is_l1_whatever_the_norm(grouping):
    student, teacher = make_pair(2, 3, 64)
    l1, l2 = (lift_place_loss(student, teacher, norm=norm, **grouping) for norm in ("l1", "l2"))
    assert torch.equal(l1.weight, l2.weight)
    torch.testing.assert_close(l1.weight, 1 - l1.coarse.detach())
    assert (l1.coarse - l2.coarse).abs() > 0.05


def test_adaptive_weight_of_a_distant_student_is_zero():
    student, teacher = make_pair(2, 3, 64)
    result = lift_place_loss(student, teacher + 5)
    assert result.weight == 0 and result.fine > 0
    assert torch.equal(result.loss, result.coarse)


@pytest.mark.parametrize(("weighting", "weight"), [("constant", 1.0), (1, 1.0), (0.25, 0.25), (0, 0.0)])
def test_fixed_weights(weighting, weight):
    student, teacher = make_pair(2, 3, 64)
    result = lift_place_loss(student, teacher, weighting=weighting)
    assert result.weight.shape == () and result.weight == weight
    torch.testing.assert_close(result.loss, result.coarse + weight * result.fine)


# ----------------------------------------------------------------------------------------------- precision and devices


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("teacher_dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("student_dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grouping", LIFT_AND_PLACE)
def test_half_precision_is_computed_in_float32(grouping, student_dtype, teacher_dtype, autocast):
    """Even where half precision would overflow: a squared error of 300² is beyond float16."""
    student, teacher = make_pair(2, 3, 8, 8)
    student = (100 * student.detach()).to(student_dtype).requires_grad_()
    teacher = (-100 * teacher).to(teacher_dtype)
    upcast = student.detach().float().requires_grad_()
    expected = lift_place_loss(upcast, teacher.float(), weighting=0.5, **grouping)

    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        result = lift_place_loss(student, teacher, weighting=0.5, **grouping)

    for part, expected_part in zip(result, expected):
        assert part.dtype == torch.float32 and part.isfinite().all()
        assert torch.equal(part, expected_part)
    assert torch.equal(gradient(result.loss, student), gradient(expected.loss, upcast).to(student_dtype))


@pytest.mark.parametrize("grouping", LIFT_AND_PLACE)
def test_no_value_is_read_back(grouping):
    """Meta tensors hold no values: an `.item()`, or a branch on one, would stall a device and raises here."""
    student = torch.empty(2, 3, 8, 8, device="meta", requires_grad=True)
    result = lift_place_loss(student, torch.empty(2, 3, 8, 8, device="meta"), reduction="sum", **grouping)
    result.loss.backward()
    assert {part.device.type for part in result} == {"meta"}
    assert student.grad.shape == student.shape


@pytest.mark.parametrize(("grouping", "backend"), [(PLACE, "inductor"), (LIFT, "aot_eager")], ids=["place", "lift"])
def test_compiles_without_graph_breaks(grouping, backend):
    """PLACE does all that LIFT does and sorts: one of them through the C++ compiler, which takes long, is enough."""
    student, teacher = make_pair(2, 3, 8, 8, dtype=torch.float32)
    expected = lift_place_loss(student, teacher, **grouping)
    with torch._inductor.config.patch(compile_threads=1):  # no pool stays in this process, which other tests fork
        result = torch.compile(lift_place_loss, fullgraph=True, backend=backend)(student, teacher, **grouping)
        torch.testing.assert_close(tuple(result), tuple(expected))
        torch.testing.assert_close(gradient(result.loss, student), gradient(expected.loss, student))


# --------------------------------------------------------------------------------------------------- degenerate inputs


def full(tensor: torch.Tensor, value: float) -> torch.Tensor:
    return torch.full_like(tensor, value)


FLAT_CASES = {
    "zero student": lambda s, t: (0 * s, t),
    "constant student": lambda s, t: (full(s, 0.3), t),
    "large constant student": lambda s, t: (full(s, 1000.1), t),
    "near-constant student": lambda s, t: (0.3 + 1e-4 * s, t),
    "nearly zero student": lambda s, t: (1e-4 * s, t),
    "vanishing student": lambda s, t: (1e-30 * s, t),
    "one flat group": lambda s, t: (s.where(torch.arange(64) >= 16, 0.0), t),
    "constant teacher": lambda s, t: (s, full(t, 0.3)),
    "same constant": lambda s, t: (full(s, 0.3), full(t, 0.3)),
    "two constants": lambda s, t: (full(s, 0.3), full(t, -0.7)),
    "two near-constants": lambda s, t: (0.3 + 1e-4 * s, 0.3 - 1e-4 * t),
    "zeros": lambda s, t: (0 * s, 0 * t),
}


@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize("flatten", FLAT_CASES.values(), ids=FLAT_CASES)
def test_flat_groups_have_bounded_gradients(flatten, grouping):
    """The bound that MIN_VARIANCE_RATIO = r gives, in a group of P elements where the teacher's variance is T.

    The slope: ‖∂a/∂s‖ <= sqrt(T / P) / (r T + eps), which is 10⁴ / sqrt(P) at T = 1, however flat the student.
    The intercept, b = mean(t) − a mean(s): ‖∂b/∂s‖ <= |mean(s)| ‖∂a/∂s‖ + |a| / sqrt(P).
    """
    student, teacher = make_pair(2, 3, 64, dtype=torch.float32)
    student, teacher = flatten(student.detach(), teacher)
    student.requires_grad_()
    result = lift_place_loss(student, teacher, eps=1e-7, **grouping)
    assert all(part.isfinite().all() for part in result)
    assert gradient(result.loss, student).isfinite().all()

    coarse = lift_place_loss(student, teacher, eps=1e-7, weighting=0.0, **grouping).loss
    order = group_order(student, teacher, **grouping)
    # `coarse` is a mean over the groups, so each has but its share of the gradient.
    actual = in_groups(gradient(coarse, student), order).double().norm(dim=-1) * result.slope.numel()
    s, t = in_groups(student.detach(), order).double(), in_groups(teacher, order).double()
    size, variance = s.shape[-1], t.var(-1, correction=0)
    of_slope = (variance / size).sqrt() / (1e-4 * variance + 1e-7)
    of_intercept = s.mean(-1).abs() * of_slope + result.slope.abs() / size**0.5
    assert (actual <= 1.001 * (of_slope + of_intercept) + 1e-6).all()


@pytest.mark.parametrize("share", [0.0101, 0.1, 1.0])
@pytest.mark.parametrize("correlation", [1.0, -0.6])
def test_ordinary_groups_do_not_feel_the_bound(correlation, share):
    """A student from 1 % of the teacher's standard deviation on: equal to the reference, which has no bound."""
    student, teacher = make_line(correlation, share)
    expected = reference(student, teacher, **BY_POSITION)
    assert_matches(lift_place_loss(student, teacher, **BY_POSITION), student, expected, 1e-9)


@pytest.mark.parametrize("share", [0.0099, 0.001, 1e-4])
def test_flatter_groups_keep_their_values_and_get_a_shorter_gradient(share):
    student, teacher = make_line(1.0, share)
    expected = reference(student, teacher, weighting=0.0, **BY_POSITION)
    result = lift_place_loss(student, teacher, weighting=0.0, **BY_POSITION)
    for name in LiftPlaceLoss._fields:
        assert_close(getattr(result, name), getattr(expected, name), 1e-9)
    ratio = gradient(result.loss, student).norm() / torch.from_numpy(expected.gradient).norm()
    assert ratio < 0.99 and ratio == pytest.approx((share**2 + 1e-7) / (MIN_VARIANCE_RATIO + 1e-7), rel=0.1)


@pytest.mark.parametrize("share", [0.001, 0.003, 0.009, 0.02, 0.5])
def test_flat_student_is_drawn_towards_its_teacher(share):
    """Its slope is far above 1, so it must grow. Drawn to zero instead, a zero initialisation would never leave."""
    student, teacher = make_line(1.0, share)
    downhill = -gradient(lift_place_loss(student, teacher, **BY_POSITION).loss, student)
    assert (downhill * standardise(teacher.unflatten(-1, (-1, 16))).flatten(2)).sum() > 0


@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["student", "teacher", "both"])
def test_bad_values_are_never_hidden(where, bad, grouping):
    student, teacher = (tensor.detach().clone() for tensor in make_pair(2, 3, 64))
    for name, tensor in (("student", student), ("teacher", teacher)):
        if where in (name, "both"):
            tensor[1, 2, 7] = bad
    for norm in ("l1", "l2"):
        result = lift_place_loss(student, teacher, norm=norm, **grouping)
        assert result.loss.isnan() and result.weight.isnan()
        for weighting in ("constant", 0.0):
            assert lift_place_loss(student, teacher, norm=norm, weighting=weighting, **grouping).loss.isnan()


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        (torch.zeros(2, 3, 16), torch.zeros(2, 3, 17), r"\(2, 3, 16\).*\(2, 3, 17\)"),
        (torch.zeros(2, 3, 4, 4), torch.zeros(2, 1, 4, 4), r"\(2, 1, 4, 4\).*one shape"),
        (torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 16), "one shape"),
        (torch.zeros(2, 16), torch.zeros(2, 16), "at least one spatial dimension"),
        (torch.zeros(16), torch.zeros(16), "at least one spatial dimension"),
        (torch.zeros(0, 3, 16), torch.zeros(0, 3, 16), "no empty one"),
        (torch.zeros(2, 3, 0), torch.zeros(2, 3, 0), "no empty one"),
        (torch.zeros(2, 3, 16, dtype=torch.int64), torch.zeros(2, 3, 16), r"student is torch.int64; .*student.float"),
        (torch.zeros(2, 3, 16), torch.zeros(2, 3, 16, dtype=torch.uint8), r"teacher is torch.uint8; .*teacher.float"),
    ],
)
def test_bad_tensors_are_refused(student, teacher, message):
    with pytest.raises(ValueError, match=message):
        lift_place_loss(student, teacher)


@pytest.mark.parametrize(
    ("elements", "group_size", "remedy"),
    [
        (16, 1, "nothing to fit.*: 2$"),
        (16, 0, "nothing to fit.*: 2$"),
        (16, -4, "nothing to fit.*: 2$"),
        (16, 3, "16 elements.*: 2 or 4$"),
        (16, 5, "16 elements.*: 4 or 8$"),
        (16, 15, "16 elements.*: 8 or 16$"),
        (16, 17, "16 elements.*: 16$"),
        (36, 10, "36 elements.*: 9 or 12$"),
        (13, 4, "13 elements.*: 13$"),
        (15, 2, "15 elements.*: 3$"),
    ],
)
def test_bad_group_sizes_are_refused_with_the_nearest_good_ones(elements, group_size, remedy):
    student, teacher = make_pair(2, 3, elements)
    with pytest.raises(ValueError, match=f"^group_size {group_size} .*{remedy}"):
        lift_place_loss(student, teacher, group_size=group_size)


@pytest.mark.parametrize(
    ("option", "value", "choices"),
    [
        ("norm", "L1", "l1.*l2"),
        ("norm", None, "l1.*l2"),
        ("group_by", "channel", "error.*position"),
        ("reduction", "none", "mean.*sum"),
        ("weighting", "cosine", "adaptive.*constant.*number in"),
        ("weighting", -0.1, "adaptive.*constant.*number in"),
        ("weighting", 1.5, "adaptive.*constant.*number in"),
        ("weighting", float("nan"), "adaptive.*constant.*number in"),
    ],
)
def test_unknown_options_are_refused(option, value, choices):
    student, teacher = make_pair(2, 3, 16)
    with pytest.raises(ValueError, match=f"^{option} is {value!r}.*{choices}"):
        lift_place_loss(student, teacher, **{option: value})


# --------------------------------------------------------------------------------------------------- several processes


WORLD_SIZE = 2


def make_batch_of_unlike_halves() -> tuple[torch.Tensor, torch.Tensor]:
    student, teacher = make_pair(4, 3, 64)
    return student, teacher * torch.tensor([1.0, 1.0, 1.4, 1.4]).view(4, 1, 1)


def run_on_share(rank: int, folder: str) -> None:
    """One process of a data-parallel run: its share of the batch, its own backward pass."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD_SIZE
    )
    results = {}
    for name, options in (("lift", LIFT), ("place", PLACE)):
        student, teacher = (tensor.detach().chunk(WORLD_SIZE)[rank] for tensor in make_batch_of_unlike_halves())
        student.requires_grad_()
        result = lift_place_loss(student, teacher, **options)
        results[name] = result.weight, gradient(result.loss, student)
    results["world_size"] = torch.distributed.get_world_size()
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_data_parallel_runs_do_not_depend_on_the_split(tmp_path):
    torch.multiprocessing.spawn(run_on_share, args=(str(tmp_path),), nprocs=WORLD_SIZE)
    shares = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(WORLD_SIZE)]
    assert [share["world_size"] for share in shares] == [2, 2]

    student, teacher = make_batch_of_unlike_halves()
    for name, options in (("lift", LIFT), ("place", PLACE)):
        whole = lift_place_loss(student, teacher, **options)
        alone = lift_place_loss(student.chunk(2)[0], teacher.chunk(2)[0], **options)
        assert (alone.weight - whole.weight).abs() > 0.1  # else there would be nothing to agree on
        for share in shares:
            assert_close(share[name][0], whole.weight, 1e-14)
        # The mean over the processes, which is what DistributedDataParallel makes of their gradients.
        assert_close(torch.cat([share[name][1] for share in shares]) / 2, gradient(whole.loss, student), 1e-13)
