"""One training step of each script against a plain one, written from the publications: losses, parts and gradients.

The plain steps share no formula with what they check: they loop over samples, channels and groups, in float64. They
take each model's float32 output, whose arithmetic is not the subject. Noise and timesteps are those of the script:
drawn again from the same seed, in the same order. The weights of the terms are the scripts' defaults on one side and
the published numbers on the other.
"""

import copy
import inspect
import math

from common.sd3_text import TextLayout

import pytest
import torch
from conftest import inputs_of
from diffusers import (
    DDPMScheduler,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
)

import train_lift_dit
import train_lift_sd3
import train_lift_sd21
import train_lift_sdxl
import train_lift_unet
from lift_utils import FeatureModel, make_kd_loss
from tiny_models import TINY_DIT, TINY_SD3, TINY_UNET


CPU = torch.device("cpu")
SEED = 5

# Rounding in float32 is 6e-8 an operation. It grows by the sums of a backward pass, where a slope near 1 is compared
# with 1, and where a difference of means is divided by a variance of 1e-4. The largest that was seen is 4e-6.
RELATIVE = 1e-5


# -------------------------------------------------------------------------------------------------------- both sides


def record_inputs(model: torch.nn.Module) -> list[dict[str, torch.Tensor]]:
    """A list that gets the arguments of each of the model's forward passes, by name."""
    calls: list[dict[str, torch.Tensor]] = []
    signature = inspect.signature(model.forward)

    def record(module, arguments, named):
        bound = signature.bind(*arguments, **named).arguments
        calls.append({name: value for name, value in bound.items() if name != "return_dict"})

    model.register_forward_pre_hook(record, with_kwargs=True)
    return calls


def forward(model: torch.nn.Module, names: list[str], inputs: dict, item: int = 0) -> tuple[torch.Tensor, list]:
    """A model's output, and the outputs of its named modules, in float64."""
    outputs = {}

    def keep(module, arguments, output):
        outputs[module] = output[item] if isinstance(output, tuple) else output

    modules = [model.get_submodule(name) for name in names]
    hooks = [module.register_forward_hook(keep) for module in modules]
    output = model(**inputs).sample
    for hook in hooks:
        hook.remove()
    return output.double(), [outputs[module] for module in modules]


class Step:
    """A script's step and the models of the plain one, whose inputs are those that the script has made.

    Args:
        student: The model to train.
        teacher: The frozen one.
        pairs: `(student module, teacher module)` of the feature term.
        projections: One per pair, or `None`.
        item: Which of a module's outputs is its feature.
    """

    def __init__(self, student, teacher, pairs, projections=None, item=0):
        self.ours, self.theirs = ([pair[side] for pair in pairs] for side in (0, 1))
        self.item = item
        self.student = FeatureModel(student, self.ours, projections, item=item).train()
        self.plain = copy.deepcopy(self.student).eval()
        self.teacher = FeatureModel(teacher.requires_grad_(False), self.theirs, item=item).eval()

    def run(self, compute_losses, batch, progress, **values) -> None:
        """The script's step; what it fed to the models is then in `inputs`."""
        calls = [record_inputs(model.model) for model in (self.student, self.teacher)]
        torch.manual_seed(SEED)
        self.loss, self.logs = compute_losses(self.student, self.teacher, batch, progress, **values)
        ((self.inputs,), (theirs,)) = calls
        torch.testing.assert_close(self.inputs, theirs, rtol=0, atol=0)
        torch.manual_seed(SEED)  # for the plain step, which draws the same

    def check_inputs(self, **expected: torch.Tensor) -> None:
        """The models got these inputs; embeddings and noisy images up to the rounding of float32."""
        inputs = dict(self.inputs)
        inputs |= inputs.pop("added_cond_kwargs", {})
        assert inputs.keys() == expected.keys()
        for name, value in expected.items():
            if value.is_floating_point():
                torch.testing.assert_close(inputs[name].double(), value.double(), rtol=RELATIVE, atol=RELATIVE)
            else:
                assert torch.equal(inputs[name], value)

    def outputs(self) -> tuple[torch.Tensor, torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
        """The plain student's output, the teacher's, and the pairs of their features, in float64."""
        output, features = forward(self.plain.model, self.ours, self.inputs, self.item)
        features = [project(feature) for project, feature in zip(self.plain.projections, features)]
        with torch.no_grad():
            teacher_output, teacher_features = forward(self.teacher.model, self.theirs, self.inputs, self.item)
        pairs = [(ours.double(), theirs.double()) for ours, theirs in zip(features, teacher_features)]
        return output, teacher_output, pairs

    def compare(self, expected: dict[str, torch.Tensor]) -> None:
        """The script's loss, logs and gradients are the plain step's."""
        assert self.logs["loss"] is self.loss and self.logs.keys() == expected.keys()
        for name, value in expected.items():
            assert self.logs[name].item() == pytest.approx(value.item(), rel=RELATIVE, abs=1e-12), name
        self.loss.backward()
        expected["loss"].backward()
        found, plain = (
            {name: parameter.grad for name, parameter in model.named_parameters()}
            for model in (self.student, self.plain)
        )
        largest = max(gradient.abs().max().item() for gradient in plain.values() if gradient is not None)
        assert largest > 0
        for name, gradient in plain.items():
            assert (gradient is None) == (found[name] is None), name
            if gradient is not None:
                # To a share of the tensor's largest entry. Where that is itself no more than rounding, as for biases
                # of keys, which a softmax does not see, a share of the largest of all stands for it.
                scale = max(gradient.abs().max().item(), 1e-2 * largest)
                assert (found[name] - gradient).abs().max() <= RELATIVE * scale, name
        assert all(parameter.grad is None for parameter in self.teacher.parameters())


def near(teacher: torch.nn.Module, size: float = 0.1) -> torch.nn.Module:
    """A copy of a model with some noise on its weights: a student that has come close to its teacher."""
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += size * parameter.std(correction=0) * torch.randn_like(parameter)
    return student


def keep_blocks(model: torch.nn.Module, kept: list[int]) -> torch.nn.Module:
    """A copy of a transformer with these blocks alone."""
    student = type(model).from_config({**model.config, "num_layers": len(kept)})
    state = {key: value for key, value in model.state_dict().items() if not key.startswith("transformer_blocks.")}
    for index, block in enumerate(kept):
        for key, value in model.transformer_blocks[block].state_dict().items():
            state[f"transformer_blocks.{index}.{key}"] = value
    student.load_state_dict(state)
    return student


# --------------------------------------------------------------------------------------------------- the publications


def output_term(
    student: torch.Tensor, teacher: torch.Tensor, group_size: int | None, power: int
) -> dict[str, torch.Tensor]:
    """L = coarse + w · fine between two outputs (B, C, H, W), and what is logged of it.

    In every sample and channel the elements are ranked by their squared error and cut into groups (PLACE), or are one
    group (LIFT). In each group the teacher is regressed on the student: t ≈ a · s + b.
    """
    slopes, intercepts, residuals = [], [], []
    for sample in range(student.shape[0]):
        for channel in range(student.shape[1]):
            s, t = student[sample, channel].flatten(), teacher[sample, channel].flatten()
            # The ranks of float32, so that rounding does not decide between two almost equal errors.
            errors = (s.detach().float() - t.float()).square().tolist()
            ranks = sorted(range(len(errors)), key=lambda element: errors[element]) if group_size else [*range(len(s))]
            size = group_size or len(ranks)
            for start in range(0, len(ranks), size):
                group = ranks[start : start + size]
                x, y = s[group], t[group]
                variance = ((x - x.mean()) ** 2).mean()
                # The library scales the gradient down in flatter groups than this; it is to leave these as they are.
                assert variance > 1e-4 * ((y - y.mean()) ** 2).mean()
                a = ((x - x.mean()) * (y - y.mean())).mean() / (variance + 1e-7)
                b = y.mean() - a * x.mean()
                slopes.append(a)
                intercepts.append(b)
                residuals.append(a.detach() * x + b.detach() - y)
    a, b = torch.stack(slopes), torch.stack(intercepts)
    coarse = (abs(a - 1) ** power).mean() + (abs(b) ** power).mean()
    fine = (torch.cat(residuals) ** 2).mean()
    a, b = a.detach(), b.detach()
    weight = 1 - min(1.0, (abs(a - 1).mean() + abs(b).mean()).item())
    logs = {"kd": coarse + weight * fine, "coarse": coarse, "fine": fine, "weight": torch.tensor(weight)}
    for name, value in (("slope", a), ("intercept", b)):
        logs |= {f"{name}_mean": value.mean(), f"{name}_std": ((value - value.mean()) ** 2).mean().sqrt()}
    return {**logs, "kd_mse": ((student - teacher) ** 2).mean(), "teacher_finite": torch.tensor(1.0)}


def mean_square(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    return ((first - second) ** 2).mean()


def kept_signal(first: float, last: float, steps: int, power: int = 1) -> torch.Tensor:
    """ᾱ of each timestep, where β, or for a power of 2 its square root (Stable Diffusion), rises linearly."""
    betas = torch.linspace(first ** (1 / power), last ** (1 / power), steps, dtype=torch.float64) ** power
    return (1 - betas).cumprod(0)


def add_noise(clean, noise, kept) -> torch.Tensor:
    """√ᾱ · x_0 + √(1 - ᾱ) · ε with ᾱ (B,)."""
    kept = kept.view(-1, 1, 1, 1)
    return kept.sqrt() * clean + (1 - kept).sqrt() * noise


def velocity(clean, noise, kept) -> torch.Tensor:
    """√ᾱ · ε - √(1 - ᾱ) · x_0 with ᾱ (B,)."""
    kept = kept.view(-1, 1, 1, 1)
    return kept.sqrt() * noise - (1 - kept).sqrt() * clean


def draw_latents(moments: torch.Tensor, random_flip: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents of cached moments (B, flips, 2, C, h, w), flipped or not, and noise, in the order of the scripts."""
    flips = torch.rand(len(moments)) < 0.5
    chosen = [rows[int(flip and random_flip)] for rows, flip in zip(moments, flips)]
    mean, std = torch.stack([row[0] for row in chosen]), torch.stack([row[1] for row in chosen])
    latents = mean.double() + std.double() * torch.randn(mean.shape).double()
    return latents, torch.randn(mean.shape).double()


def make_loss(args):
    """The output term as a script's `main` makes it."""
    return make_kd_loss(args.kd_loss, args.group_size, args.group_by, args.coarse_norm, args.kd_weighting)


KINDS = [pytest.param("place", 16, id="place"), pytest.param("lift", None, id="lift")]


# -------------------------------------------------------------------------------------------------------- the scripts


@pytest.mark.parametrize("widths", [[16, 32], [8, 16]], ids=["near", "narrow"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize(("kind", "group_size"), KINDS)
def test_pixel_step(kind, group_size, reduction, widths):
    """ε-MSE + L + 1e-6 · FitNet, each summed over a sample's elements, on antithetic timesteps."""
    torch.manual_seed(0)
    teacher = UNet2DModel(**TINY_UNET)
    student = near(teacher) if widths == [16, 32] else UNet2DModel(**{**TINY_UNET, "block_out_channels": widths})
    names = ["down_blocks.0", "mid_block", "up_blocks.1"]
    projections = [torch.nn.Conv2d(widths[level], [16, 32][level], 1) for level in (0, 1, 0)]
    step = Step(student, teacher, [(name, name) for name in names], projections)

    flags = ["--pretrained_teacher_model", "any", "--dry_run", "--kd_loss", kind]
    args = train_lift_unet.parse_args(flags + (["--reduction", "mean"] if reduction == "mean" else []))
    assert args.reduction == reduction and args.antithetic_timesteps
    images = torch.randint(256, (5, 1, 16, 16), dtype=torch.uint8)
    step.run(
        train_lift_unet.compute_losses,
        {"images": images},
        0.25,
        inputs_of=inputs_of(
            train_lift_unet,
            (1, 16, 16),
            {"steps": 1000, "random_flip": True, "antithetic_timesteps": args.antithetic_timesteps},
            scheduler=DDPMScheduler(),
        ),
        kd_loss=make_loss(args),
        lambdas=(args.lambda_task, args.lambda_kd_output, args.lambda_kd_feat),
        reduction=args.reduction,
    )

    flips = torch.rand(5, 1, 1, 1) < 0.5
    clean = torch.where(flips, images.flip(-1), images).double() / 127.5 - 1
    noise = torch.randn(5, 1, 16, 16).double()
    drawn = torch.randint(1000, (5,)).tolist()
    timesteps = torch.tensor([*drawn[:3], 999 - drawn[0], 999 - drawn[1]])
    step.check_inputs(sample=add_noise(clean, noise, kept_signal(1e-4, 0.02, 1000)[timesteps]), timestep=timesteps)

    prediction, teacher_prediction, features = step.outputs()
    parts = output_term(prediction, teacher_prediction, group_size, power=1)
    assert (parts["weight"] > 0.05) == ((kind, widths) != ("lift", [8, 16]))  # which is too far from its teacher
    task = feat = 0
    for sample in range(5):  # sums over a sample, the mean over the batch
        task = task + ((prediction[sample] - noise[sample]) ** 2).sum() / 5
        for ours, theirs in features:
            feat = feat + ((ours[sample] - theirs[sample]) ** 2).sum() / 5
    parts["kd"] = 256 * parts["kd"]
    if reduction == "mean":
        task, parts["kd"] = task / 256, parts["kd"] / 256
        feat = sum(mean_square(*pair) for pair in features)
    step.compare({"loss": task + parts["kd"] + 1e-6 * feat, "task": task, **parts, "feat": feat})


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(("kind", "group_size"), KINDS)
@pytest.mark.parametrize("script", [train_lift_sd21, train_lift_sdxl], ids=["sd21", "sdxl"])
def test_latent_unet_step(script, kind, group_size, prediction_type):
    """MSE of noise or velocity + L + the MSE of paired blocks, one of them by a 1x1 convolution."""
    torch.manual_seed(0)
    config = {"sample_size": 8, "block_out_channels": [8, 16, 16], "attention_head_dim": [1, 2, 2]}
    config |= {"down_block_types": ["CrossAttnDownBlock2D"] * 2 + ["DownBlock2D"], "norm_num_groups": 4}
    config |= {"up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 2, "cross_attention_dim": 16}
    if script is train_lift_sdxl:  # which takes pooled embeddings and an image's size, too
        config |= {"addition_embed_type": "text_time", "addition_time_embed_dim": 4}
        config |= {"projection_class_embeddings_input_dim": 20 + 6 * 4}
    teacher = UNet2DConditionModel(**config, layers_per_block=1)
    pairs = [("down_blocks.0", "down_blocks.0"), ("up_blocks.2", "up_blocks.2"), ("conv_in", "up_blocks.1")]
    projections = [torch.nn.Identity(), torch.nn.Identity(), torch.nn.Conv2d(8, 16, 1)]
    step = Step(near(teacher), teacher, pairs, projections)

    args = script.parse_args(["--dry_run", "--kd_loss", kind])
    own = {"text": torch.randn(4, 77, 16), "pooled": torch.randn(4, 20)}
    batch = {"moments": torch.randn(4, 2, 2, 4, 8, 8).abs(), **own, "time_ids": 32 * torch.rand(4, 6)}
    no_text = {"text": torch.randn(77, 16), "pooled": torch.randn(20)}
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    step.run(
        script.compute_losses,
        batch,
        0.25,
        inputs_of=inputs_of(
            script,
            (4, 8, 8),
            {"steps": 1000, "random_flip": True, "caption_dropout": 0.5},
            scheduler=DDPMScheduler(**betas, prediction_type=prediction_type),
            encoders=None,
            no_text=no_text if script is train_lift_sdxl else no_text["text"],
        ),
        kd_loss=make_loss(args),
        lambdas=(args.lambda_task, args.lambda_kd_output, args.lambda_kd_feat),
    )

    latents, noise = draw_latents(batch["moments"], random_flip=True)
    timesteps = torch.randint(1000, (4,))
    dropped = (torch.rand(4, 1, 1) < 0.5).flatten().tolist()
    assert True in dropped and False in dropped
    texts = {
        name: torch.stack([no_text[name] if drop else rows[sample] for sample, drop in enumerate(dropped)])
        for name, rows in own.items()
    }
    kept = kept_signal(0.00085, 0.012, 1000, power=2)[timesteps]
    noisy = add_noise(latents, noise, kept)
    added = {"text_embeds": texts["pooled"], "time_ids": batch["time_ids"]} if script is train_lift_sdxl else {}
    step.check_inputs(sample=noisy, timestep=timesteps, encoder_hidden_states=texts["text"], **added)

    prediction, teacher_prediction, features = step.outputs()
    target = noise if prediction_type == "epsilon" else velocity(latents, noise, kept)
    task = mean_square(prediction, target)
    parts = output_term(prediction, teacher_prediction, group_size, power=1)
    assert parts["weight"] > 0.05
    feat = sum(mean_square(*pair) for pair in features)
    step.compare({"loss": task + parts["kd"] + feat, "task": task, **parts, "feat": feat})


class ReverseStep:
    """p(x_{t-1} | x_t) of improved DDPM (Nichol and Dhariwal, 2021) at one timestep, in float64."""

    def __init__(self, timestep: int, steps: int):
        betas = torch.linspace(1e-4, 0.02, steps, dtype=torch.float64).tolist()
        bars = [math.prod(1 - beta for beta in betas[: index + 1]) for index in range(steps)]
        posterior = [beta * (1 - before) / (1 - bar) for beta, before, bar in zip(betas, [1.0, *bars], bars)]
        posterior[0] = posterior[1]  # its own is 0
        self.beta, self.bar = betas[timestep], bars[timestep]
        self.before = bars[timestep - 1] if timestep else 1.0
        self.logs = math.log(posterior[timestep]), math.log(betas[timestep])

    def mean(self, clean: torch.Tensor, noisy: torch.Tensor) -> torch.Tensor:
        """Of q(x_{t-1} | x_t, x_0)."""
        of_clean = math.sqrt(self.before) * self.beta / (1 - self.bar)
        of_noisy = math.sqrt(1 - self.beta) * (1 - self.before) / (1 - self.bar)
        return of_clean * clean + of_noisy * noisy

    def predicted(self, noise, variance, noisy) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean, which is not to learn, and log-variance of a model's prediction."""
        clean = (noisy - math.sqrt(1 - self.bar) * noise.detach()) / math.sqrt(self.bar)
        share = (variance + 1) / 2
        return self.mean(clean, noisy), share * self.logs[1] + (1 - share) * self.logs[0]


def kl_in_bits(mean, log, other_mean, other_log) -> torch.Tensor:
    """KL of N(mean, exp(log)) to N(other_mean, exp(other_log)), the mean over all elements."""
    ratio = torch.exp(torch.as_tensor(log) - other_log)
    nats = 0.5 * (ratio - 1 - torch.log(ratio) + (mean - other_mean) ** 2 / torch.exp(torch.as_tensor(other_log)))
    return nats.mean() / math.log(2)


def likelihood_in_bits(clean, mean, log) -> torch.Tensor:
    """-log of the share of a Gaussian in the bin of each element: 2/255 wide, open beyond ±0.999."""

    def above(value):
        return 0.5 * torch.erfc((value - mean) / torch.exp(0.5 * log) / math.sqrt(2))

    lower, upper = clean - 1 / 255, clean + 1 / 255
    # As 1 - (1 - share): the tail above is exact where the mean lies below, and the other way round.
    inside = torch.where(clean > mean, above(lower) - above(upper), (1 - above(upper)) - (1 - above(lower)))
    below_upper = 0.5 * torch.erfc((mean - upper) / torch.exp(0.5 * log) / math.sqrt(2))
    share = torch.where(clean > 0.999, above(lower), torch.where(clean < -0.999, below_upper, inside))
    return -torch.log(share.clamp(min=1e-12)).mean() / math.log(2)


def without_outliers(tokens: torch.Tensor) -> torch.Tensor:
    """Tokens (N, C) of one sample, zeros where they are more than two standard deviations from the mean."""
    distance = abs(tokens.detach() - tokens.detach().mean())
    return torch.where(distance <= 2 * tokens.detach().std(correction=0), tokens, 0.0)


@pytest.mark.parametrize("steps", [1000, 4])
@pytest.mark.parametrize(("kind", "group_size"), KINDS)
def test_dit_step(kind, group_size, steps):
    """0.1 · (task + vb) + 0.9 · (L + kd_vb) + β · feat, β = 1e-2 · (1 - progress), with L in the l2 norm."""
    torch.manual_seed(0)
    teacher = DiTTransformer2DModel(**TINY_DIT)
    student = near(keep_blocks(teacher, [1, 3, 5, 7]), 0.02)
    train_lift_dit.keep_labels(student)
    pairs = [(f"transformer_blocks.{index}", f"transformer_blocks.{2 * index + 1}") for index in range(4)]
    step = Step(student, teacher, pairs)

    args = train_lift_dit.parse_args(["--student", "d4", "--dry_run", "--kd_loss", kind])
    batch = {"moments": torch.randn(6, 2, 2, 4, 8, 8).abs(), "labels": torch.tensor([0, 1, 2, 3, 500, 999])}
    scheduler = DDPMScheduler(num_train_timesteps=steps)
    step.run(
        train_lift_dit.compute_losses,
        batch,
        0.25,
        inputs_of=inputs_of(
            train_lift_dit,
            (4, 8, 8),
            {"steps": steps, "random_flip": args.random_flip, "label_dropout": 0.5},
            scheduler=scheduler,
            encoders=None,
            null_class=1000,
        ),
        kd_loss=make_loss(args),
        kd_alpha=args.kd_alpha,
        lambda_kd_feat=args.lambda_kd_feat,
        process=train_lift_dit.ReverseProcess(scheduler, CPU),
    )

    latents, noise = draw_latents(batch["moments"], random_flip=True)
    timesteps = torch.randint(steps, (6,))
    assert (0 in timesteps) == (steps == 4) and timesteps.max() > 0
    dropped = (torch.rand(6) < 0.5).tolist()
    assert True in dropped and False in dropped
    labels = torch.tensor([1000 if drop else own for drop, own in zip(dropped, batch["labels"].tolist())])
    noisy = add_noise(latents, noise, kept_signal(1e-4, 0.02, steps)[timesteps])
    step.check_inputs(hidden_states=noisy, timestep=timesteps, class_labels=labels)

    output, teacher_output, features = step.outputs()
    prediction, variance = output[:, :4], output[:, 4:]
    teacher_prediction, teacher_variance = teacher_output[:, :4], teacher_output[:, 4:]
    task = mean_square(prediction, noise)
    parts = output_term(prediction, teacher_prediction, group_size, power=2)
    assert parts["weight"] > 0.05
    vb = kd_vb = 0
    for sample, timestep in enumerate(timesteps.tolist()):
        reverse = ReverseStep(timestep, steps)
        clean, noised = latents[sample], step.inputs["hidden_states"][sample].double()
        ours = reverse.predicted(prediction[sample], variance[sample], noised)
        theirs = reverse.predicted(teacher_prediction[sample], teacher_variance[sample], noised)
        if timestep == 0:
            vb = vb + likelihood_in_bits(clean, *ours) / 6
        else:
            vb = vb + kl_in_bits(reverse.mean(clean, noised), reverse.logs[0], *ours) / 6
        kd_vb = kd_vb + kl_in_bits(*theirs, *ours) / 6
    feat = 0
    for ours, theirs in features:
        for sample in range(6):
            pair = without_outliers(ours[sample]), without_outliers(theirs[sample])
            assert (pair[0] == 0).any() and (pair[1] == 0).any()
            feat = feat + mean_square(*pair) / 6 / 4
    loss = 0.1 * (task + vb) + 0.9 * (parts["kd"] + kd_vb) + 0.01 * 0.75 * feat
    step.compare({"loss": loss, "task": task, "vb": vb, **parts, "kd_vb": kd_vb, "feat": feat})


@pytest.mark.parametrize("scheme", ["logit_normal", "mode", "cosmap"])
@pytest.mark.parametrize(("kind", "group_size"), KINDS)
def test_sd3_step(kind, group_size, scheme):
    """The flow-matching velocity, weighted by the scheme, + L on it + 0.1 · the relative error of image tokens."""
    torch.manual_seed(0)
    teacher = SD3Transformer2DModel(**TINY_SD3)
    for block in teacher.transformer_blocks:  # nearly closed gates would make all blocks the same
        torch.nn.init.normal_(block.norm1.linear.bias)
    pairs = [(f"transformer_blocks.{index}", f"transformer_blocks.{2 * index + 1}") for index in range(3)]
    step = Step(near(keep_blocks(teacher, [1, 3, 5]), 0.02), teacher, pairs, item=1)

    args = train_lift_sd3.parse_args(["--dry_run", "--kd_loss", kind, "--weighting_scheme", scheme])
    batch = {"moments": torch.randn(4, 2, 2, 4, 8, 8).abs(), "text_encoder_3": torch.randn(4, 8, 48)}
    for name, width in (("text_encoder", 12), ("text_encoder_2", 20)):
        batch |= {name: torch.randn(4, 77, width), f"{name}.pooled": torch.randn(4, width)}
    no_text = torch.randn(85, 48), torch.randn(32)
    noise_levels = {name: getattr(args, name) for name in train_lift_sd3.NOISE_FLAGS}
    step.run(
        train_lift_sd3.compute_losses,
        batch,
        0.25,
        inputs_of=inputs_of(
            train_lift_sd3,
            (4, 8, 8),
            {"random_flip": True, "caption_dropout": 0.5, **noise_levels},
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            encoders=None,
            no_text=no_text,
            layout=TextLayout.of(TINY_SD3, 8),
        ),
        kd_loss=make_loss(args),
        lambdas=(args.lambda_task, args.lambda_kd_output, args.lambda_kd_feat),
        weighting_scheme=scheme,
    )

    latents, noise = draw_latents(batch["moments"], random_flip=True)
    # The share of the way from noise to data, of 1000 levels σ, which the shift moves towards the noise.
    # cosmap's density is a weight of the loss, as in Diffusers' own script.
    shares = torch.randn(4).sigmoid() if scheme == "logit_normal" else torch.rand(4)
    if scheme == "mode":
        shares = 1 - shares - 1.29 * ((torch.pi / 2 * shares).cos() ** 2 - 1 + shares)
    levels = [(1000 - int(share * 1000)) / 1000 for share in shares.tolist()]
    sigmas = torch.tensor([3 * level / (1 + 2 * level) for level in levels], dtype=torch.float64)
    dropped = (torch.rand(4, 1) < 0.5).flatten().tolist()
    assert True in dropped and False in dropped
    texts, pooled = [], []
    for sample, drop in enumerate(dropped):
        clip = torch.cat([batch["text_encoder"][sample], batch["text_encoder_2"][sample]], dim=1)
        clip = torch.cat([clip, torch.zeros(77, 48 - 32)], dim=1)
        texts.append(no_text[0] if drop else torch.cat([clip, batch["text_encoder_3"][sample]]))
        own = torch.cat([batch["text_encoder.pooled"][sample], batch["text_encoder_2.pooled"][sample]])
        pooled.append(no_text[1] if drop else own)
    step.check_inputs(
        hidden_states=torch.stack([(1 - s) * x + s * n for s, x, n in zip(sigmas, latents, noise)]),
        timestep=1000 * sigmas,
        encoder_hidden_states=torch.stack(texts),
        pooled_projections=torch.stack(pooled),
    )

    prediction, teacher_prediction, features = step.outputs()
    task = feat = 0
    for sample, sigma in enumerate(sigmas.tolist()):
        weight = 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2)) if scheme == "cosmap" else 1
        task = task + weight * mean_square(prediction[sample], noise[sample] - latents[sample]) / 4
        for ours, theirs in features:
            feat = feat + mean_square(ours[sample], theirs[sample]) / (theirs[sample] ** 2).mean() / 4 / 3
    parts = output_term(prediction, teacher_prediction, group_size, power=1)
    assert parts["weight"] > 0.05
    step.compare({"loss": task + parts["kd"] + 0.1 * feat, "task": task, **parts, "feat": feat})
