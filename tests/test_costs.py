"""What the dry run says of multiply-accumulates and activations, against known values and real runs on a CPU."""

import re
from functools import partial

from common.costs import dtype_of, estimate_activations, profile_forward
from common.estimates import estimate_memory, print_memory_estimate
from common.students import count_features

import pytest
import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel, UNet2DModel
from full_models import SD21

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
        sizes = {"student": 2**20, "teacher_bytes": 2**20, "batch_size": 2, "features": features}
        how = {"mixed_precision": "bf16", "use_8bit_adam": True, "use_ema": False, "keeps_gradients": keeps_gradients}
        print_memory_estimate(*estimate_memory((kept * 2**20, recomputed * 2**20), **sizes, **how))
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
    settings = {"mixed_precision": "no", "use_8bit_adam": False, "use_ema": True, "keeps_gradients": False}
    print_memory_estimate(*estimate_memory((2**20, 0), student=2**20, teacher_bytes=0, batch_size=2, **settings))
    text = capsys.readouterr().out
    assert "memory at its peak, after the backward pass, estimated" in text
    assert re.findall(r"(\S+) MiB", text) == ["4.0", "8.0", "4.0", "4.0", "20.0"]
