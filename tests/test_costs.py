"""What the dry run says of multiply-accumulates and activations, against known values and real runs on a CPU."""

import re
from functools import partial

from common.costs import (
    Encoding,
    _EfficientAttention,
    _put_on_fake_gpu,
    dtype_of,
    estimate_activations,
    estimate_decoding,
    estimate_image_encoding,
    estimate_text_encoding,
    profile_forward,
    together,
)
from common.estimates import ModelCosts, estimate_memory, print_memory_estimate, print_time_estimate
from common.students import count_features

import pytest
import torch
import torch.nn.functional as F
from conftest import PLAN, LiveBytes
from diffusers import (
    AutoencoderKL,
    DiTTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
)
from full_models import SD21, make_vae
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import CLIPTextConfig, CLIPTextModel

import train_lift_dit
import train_lift_sd3
import train_lift_sd21
import train_lift_unet
from lift_utils import FeatureModel
from tiny_models import TINY_DIT, TINY_SD3, TINY_UNET


def on_meta(kind: type, config: dict) -> torch.nn.Module:
    with torch.device("meta"):
        return kind.from_config(config)


# -------------------------------------------------------------------------------------------------------- known values


class Attention(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = (factor * x for factor in (2, 3, 4))
        return F.scaled_dot_product_attention(query, key, value)


class Blocks(torch.nn.Module):
    """Two blocks of two layers each, the second of them wider."""

    def __init__(self):
        super().__init__()
        pairs = ((torch.nn.Linear(16, width), torch.nn.Linear(width, 16)) for width in (16, 64))
        self.transformer_blocks = torch.nn.ModuleList(torch.nn.Sequential(*pair) for pair in pairs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.transformer_blocks:
            x = block(x)
        return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_layers_keep_their_inputs_in_the_dtype_of_the_run(dtype):
    """Neither the weights nor what autocast makes of them count."""
    with torch.device("meta"):
        blocks, x = Blocks(), torch.zeros(8, 16)
    macs, kept, largest = profile_forward(blocks, dtype, x=x)
    assert macs == 8 * 16 * (2 * 16 + 2 * 64)
    assert kept == 8 * (16 + 16 + 16 + 64) * dtype.itemsize
    assert largest == 8 * (16 + 64) * dtype.itemsize
    assert {weight.device.type for weight in blocks.parameters()} == {"meta"}
    assert not blocks.transformer_blocks[0]._forward_hooks
    assert not torch.is_autocast_enabled("cuda")


def test_a_dry_run_leaves_the_gpu_alone(monkeypatch):
    """A fake tensor asks a real GPU for a context, which has no room where a training has it all."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with torch.device("meta"):
        layer, x = torch.nn.Linear(4, 4), torch.zeros(8, 4)
    assert profile_forward(layer, input=x)[0] == 8 * 4 * 4
    assert torch.cuda.is_available()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_attention_keeps_no_matrix_of_scores(dtype):
    """Queries, keys, values, the output, and float32 sums of 1024 scores; two products of 1024 x 1024 x 8 each."""
    with torch.device("meta"):
        x = torch.zeros(2, 3, 1024, 8, requires_grad=True)
    macs, kept, _ = profile_forward(torch.nn.Sequential(torch.nn.Linear(8, 8), Attention()), dtype, input=x)
    tokens = 2 * 3 * 1024
    assert macs == tokens * 8 * 8 + 2 * tokens * 1024 * 8
    assert kept == pytest.approx(tokens * (5 * 8 * dtype.itemsize + 4), rel=0.01)


def test_stable_diffusion_keeps_what_was_counted_by_other_means():
    """bk_tiny at 512 pixels, batch 4, fp16: 2,831 MiB beside the weights' copies."""
    teacher = dict(on_meta(UNet2DConditionModel, SD21).config)
    config = train_lift_sd21.student_config(teacher, train_lift_sd21.STUDENTS["bk_tiny"])
    make = partial(on_meta, UNet2DConditionModel, config)
    inputs = train_lift_sd21.example_inputs(make())
    macs, kept, largest = estimate_activations(make, False, 4, "fp16", **inputs)
    assert (macs, largest) == (243_019_448_320, 0)
    assert kept / 2**20 == pytest.approx(2831, rel=0.15)


# ---------------------------------------------------------------------------------------------------- real runs on CPU


UNET = {**TINY_UNET, "sample_size": 32, "block_out_channels": [32, 64], "attention_head_dim": 8}
SD = {
    "sample_size": 32,
    "block_out_channels": [32, 64],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "attention_head_dim": [2, 4],
    "cross_attention_dim": 32,
    "norm_num_groups": 8,
}
DIT = {**TINY_DIT, "sample_size": 32, "num_layers": 4, "attention_head_dim": 32}
SD3 = {**TINY_SD3, "sample_size": 32, "num_layers": 3, "attention_head_dim": 32, "caption_projection_dim": 64}
SD3["pos_embed_max_size"] = 16
MODELS = {
    "unet": (UNet2DModel, UNET, train_lift_unet.example_inputs),
    "sd21": (UNet2DConditionModel, SD, train_lift_sd21.example_inputs),
    "dit": (DiTTransformer2DModel, DIT, train_lift_dit.example_inputs),
    "sd3": (SD3Transformer2DModel, SD3, lambda model: train_lift_sd3.example_inputs(model, 32)),
}


def count_on_cpu(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> int:
    """Bytes that autograd keeps of a real forward pass, each piece of memory once, without the weights."""
    kept = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        memory = tensor.untyped_storage()
        kept[memory.data_ptr()] = memory
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**inputs)
    for weight in (*model.parameters(), *model.buffers()):
        kept.pop(weight.untyped_storage().data_ptr(), None)
    return sum(memory.nbytes() for memory in kept.values())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_a_real_run_keeps_what_the_estimate_says(name, checkpointing):
    kind, config, example_inputs = MODELS[name]
    make = partial(on_meta, kind, config)
    inputs = example_inputs(make())
    _, estimate, largest = estimate_activations(make, checkpointing, 2, "no", **inputs)
    model = kind.from_config(config).train()
    if checkpointing:
        model.enable_gradient_checkpointing()
    real = {key: torch.zeros(2, *tensor.shape[1:], dtype=tensor.dtype) for key, tensor in inputs.items()}
    assert estimate == pytest.approx(count_on_cpu(model, real), rel=0.01)
    assert bool(largest) == checkpointing


@pytest.mark.parametrize("name", MODELS)
def test_half_precision_keeps_less_but_not_half(name):
    """What CUDA's autocast computes in float32, such as norms, is kept in float32."""
    kind, config, example_inputs = MODELS[name]
    model = on_meta(kind, config).train()
    whole, half = (profile_forward(model, dtype_of(each), **example_inputs(model))[1] for each in ("no", "fp16"))
    assert 0.5 < half / whole < 0.9


@pytest.mark.parametrize(
    ("name", "features", "item"), [("sd21", ["mid_block", "up_blocks.0"], 0), ("sd3", ["transformer_blocks.1"], 1)]
)
def test_features_are_counted(name, features, item):
    kind, config, example_inputs = MODELS[name]
    inputs = example_inputs(on_meta(kind, config))
    model = FeatureModel(kind.from_config(config), features, item=item)
    _, outputs = model(**{key: torch.zeros_like(tensor, device="cpu") for key, tensor in inputs.items()})
    pairs = [["any", feature] for feature in features]
    assert count_features(on_meta(kind, config), pairs, inputs, item) == sum(each.numel() for each in outputs)


def test_the_estimate_is_of_the_moment_that_holds_most(capsys):
    def parts(
        kept: int, recomputed: int, keeps_gradients: bool, features: int = 2**18
    ) -> tuple[str, dict[str, float]]:
        plan = PLAN._replace(mixed_precision="bf16", use_8bit_adam=True, accumulation_steps=1 + keeps_gradients)
        costs = ModelCosts(0, (kept * 2**20, recomputed * 2**20), 2**20, teacher_bytes=2**20, features=features)
        print_memory_estimate(*estimate_memory(plan, costs))
        head, *lines = capsys.readouterr().out.splitlines()
        return head.split(", ")[1], {name: float(size) for name, size in (line[2:-4].split("  ", 1) for line in lines)}

    held = {"trained weights (fp32)": 4, "optimizer moments": 2, "teacher weights": 1}
    activations, copies = "student activations, batch 2", "copies of the weights for autocast"
    features, gradients = {"features of both models and gradients": 6}, {"gradients of the features": 0.2}
    assert parts(1, 0, False) == (
        "after the forward pass",
        {**held, activations: 1, copies: 2, **features, "sum": 16},
    )
    assert parts(1, 8, False) == (
        "while a block is recomputed",
        {**held, activations: 1, "the block being recomputed": 8, "gradients of the features": 1, "sum": 17},
    )
    assert parts(1, 1, True) == (
        "after the forward pass",  # recomputing leaves no copies
        {**held, "gradients (fp32)": 4, activations: 1, **features, "sum": 18},
    )
    assert parts(1, 2, True, features=2**16) == (  # less than the gradients, which are held anyway
        "while a block is recomputed",
        {**held, "gradients (fp32)": 4, activations: 1, "the block being recomputed": 2, **gradients, "sum": 14.2},
    )


def test_after_the_backward_pass_gradients_count(capsys):
    plan = PLAN._replace(mixed_precision="no", use_ema=True)
    print_memory_estimate(*estimate_memory(plan, ModelCosts(0, (2**20, 0), 2**20)))
    text = capsys.readouterr().out
    assert "memory at its peak, after the backward pass, estimated" in text
    assert re.findall(r"(\S+) MiB", text) == ["4.0", "8.0", "4.0", "4.0", "20.0"]


# ------------------------------------------------------------------------------------------------------------ encoders


def make_small_vae(layers: int) -> AutoencoderKL:
    levels = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    return AutoencoderKL(block_out_channels=[64, 64], layers_per_block=layers, norm_num_groups=8, **levels)


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize(("dtype", "batch"), [(torch.float32, 1), (torch.float32, 3), (torch.bfloat16, 3)])
def test_a_vae_that_encodes_holds_what_the_estimate_says(layers, dtype, batch):
    vae = make_small_vae(layers)
    estimate = estimate_image_encoding(vae, dtype, 96, batch)
    torch.nn.Module.to(vae, dtype)
    images, live = torch.zeros(batch, 3, 96, 96, dtype=dtype), LiveBytes()
    live.add(*vae.parameters())
    weights = live.now()
    with torch.no_grad(), live:
        vae.encode(images)
    assert live.most - weights == pytest.approx(estimate.working_set, rel=0.1)


@pytest.mark.parametrize(
    ("batch", "resolution", "dtype", "size"),
    [(4, 1024, torch.float32, 10_240), (32, 256, torch.float16, 2560), (4, 512, torch.float16, 1280)],
)
def test_the_published_vae_holds_five_tensors_of_full_size(batch, resolution, dtype, size):
    with torch.device("meta"):
        vae = make_vae(4).requires_grad_(False)
    estimate = estimate_image_encoding(vae, dtype, resolution, batch)
    assert estimate.working_set == size * 2**20
    assert estimate.weights == vae.num_parameters() * dtype.itemsize
    torch.nn.Module.to(vae, dtype)
    with FakeTensorMode(), torch.no_grad():
        _put_on_fake_gpu(vae)
        images, live = torch.empty(batch, 3, resolution, resolution, dtype=dtype, device="cuda"), LiveBytes()
        with _EfficientAttention(), live:
            vae.encode(images)
    assert live.most == pytest.approx(estimate.working_set, rel=0.02)


@pytest.mark.parametrize(
    ("widths", "layers"), [([64, 64], 1), ([64, 64], 2), ([32, 64], 1), ([64, 32], 1), ([64, 256], 2)]
)
def test_a_vae_that_decodes_holds_what_the_estimate_says(widths, layers):
    count = len(widths)
    levels = {"down_block_types": ["DownEncoderBlock2D"] * count, "up_block_types": ["UpDecoderBlock2D"] * count}
    vae = AutoencoderKL(block_out_channels=widths, layers_per_block=layers, norm_num_groups=8, **levels)
    side, live = 96 // 2 ** (count - 1), LiveBytes()
    live.add(*vae.parameters())
    with torch.no_grad(), live:
        vae.decode(torch.zeros(1, 4, side, side))
    assert live.most == pytest.approx(estimate_decoding(vae, 96), rel=0.02)


def test_the_published_vae_decodes_in_three_tensors_of_double_width():
    with torch.device("meta"):
        vae = make_vae(4).requires_grad_(False)
    assert estimate_decoding(vae, 1024) == 4 * (vae.num_parameters() + 3 * 256 * 1024**2)
    with FakeTensorMode(), torch.no_grad():
        _put_on_fake_gpu(vae)
        latents, live = torch.empty(1, 4, 128, 128, device="cuda"), LiveBytes()
        with _EfficientAttention(), live:
            vae.decode(latents)
    assert live.most == pytest.approx(estimate_decoding(vae, 1024), rel=0.06)


def test_multiply_accumulates_of_encoders_are_those_of_an_image_and_its_caption():
    vae = make_small_vae(1)
    one, several = (estimate_image_encoding(vae, torch.float32, 64, batch) for batch in (1, 8))
    assert one.macs == several.macs and 8 * one.working_set == several.working_set
    convolutions = [module for module in vae.encoder.down_blocks[0].modules() if isinstance(module, torch.nn.Conv2d)]
    assert one.macs > 64 * 64 * sum(module.weight.numel() for module in convolutions[:2])  # at the full resolution
    config = CLIPTextConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    with torch.device("meta"):
        model = CLIPTextModel(config)
    text = estimate_text_encoding(model, torch.float16, 77)
    products = 2 * 77 * 77 * 32  # of queries with keys, and of their scores with values
    assert text == (2 * model.num_parameters(), 0, 2 * (77 * (4 * 32 * 32 + 2 * 32 * 64) + products))
    assert together(one, text) == tuple(map(sum, zip(one, text)))


@pytest.mark.parametrize("keeps_gradients", [False, True])
def test_encoding_is_a_moment_of_its_own(keeps_gradients):
    plan, costs = PLAN._replace(accumulation_steps=1 + keeps_gradients), ModelCosts(0, (100, 50), 10, teacher_bytes=20)
    moment, parts = estimate_memory(plan, costs._replace(encoding=Encoding(7, 200, 1)))
    gradients = {"gradients (fp32)": 40} if keeps_gradients else {}  # of the micro-batches before
    held = {"trained weights (fp32)": 40, "optimizer moments": 80, "teacher weights": 20, "encoders' weights": 7}
    assert moment == "while images are encoded"
    assert {name: size for name, size in parts.items() if size} == {**held, **gradients, "working set of the VAE": 200}
    moment, parts = estimate_memory(plan, costs._replace(encoding=Encoding(7, 100, 1)))
    assert moment == "while a block is recomputed" and parts["encoders' weights"] == 7


def test_decoding_is_a_moment_of_its_own():
    moment, parts = estimate_memory(PLAN, ModelCosts(0, (100, 50), 10, teacher_bytes=20, decoding=300))
    held = {"trained weights (fp32)": 40, "optimizer moments": 80, "teacher weights": 20}
    assert moment == "while samples are decoded"
    assert {name: size for name, size in parts.items() if size} == {
        **held,
        "VAE that decodes and its working set (fp32)": 300,
    }


@pytest.mark.parametrize(
    ("checkpointing", "adapters", "passes"), [(False, False, 3), (True, False, 4), (False, True, 2), (True, True, 3)]
)
def test_frozen_layers_compute_no_gradients_of_their_weights(capsys, checkpointing, adapters, passes):
    plan = PLAN._replace(accumulation_steps=4, gradient_checkpointing=checkpointing)
    costs = ModelCosts(1000, (0, 0), 1, adapters=adapters, teacher_macs=500)
    for live, teacher_macs in ((True, 500), (False, 0)):
        print_time_estimate(plan._replace(live_teacher=live), costs)
        flops = 2 * 100 * 8 * (passes * 1000 + teacher_macs)
        assert f"100 steps of 8 images are {flops:.2e} FLOPs of student and teacher\n" in capsys.readouterr().out


def test_encoders_that_run_in_every_step_take_time(capsys):
    hours = []
    for encoder_macs in (0, 3500):
        encoding = Encoding(macs=encoder_macs * 10**6)
        print_time_estimate(
            PLAN._replace(steps=10**6), ModelCosts(10**9, (0, 0), 1, teacher_macs=5 * 10**8, encoding=encoding)
        )
        text = capsys.readouterr().out
        hours.append(float(re.search(r"RTX 3060.* ([\d.,]+) h", text)[1]))
    assert "FLOPs of student, teacher and encoders\n" in text
    assert hours[1] == pytest.approx(2 * hours[0], rel=0.1)
