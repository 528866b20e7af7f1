# Copyright 2026 The LIFT and PLACE distillation authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Write a Stable Diffusion 1.x, 2.x or SDXL student as one file for ComfyUI, Forge, A1111 and stable-diffusion.cpp.

The file has the U-Net, the VAE and the text encoders under the names of the original checkpoints:

    python export.py --model student --output student.safetensors --dtype fp16

Each of these programs rebuilds the U-Net from the file by rules of its own. The command says which of them open the
student. It refuses a student that none opens, with the reason. docs/export.md has the rules and their sources.
"""

import argparse
from pathlib import Path
from typing import Any, NamedTuple

from common.arguments import HelpFormatter, check_values
from common.checkpoints import check_ended
from common.costs import DTYPES
from common.errors import fail, first_line
from common.finite import first_non_finite
from common.loading import explain, read_weights
from common.single_file import State, convert_pipeline

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from safetensors import SafetensorError
from safetensors.torch import save_file


PIPELINES = {kind.__name__: kind for kind in (StableDiffusionPipeline, StableDiffusionXLPipeline)}
EXPECTED = "pass a student of Stable Diffusion 1.x, 2.x or SDXL: its pipeline folder or Hub id"
PIXELS = "no program reads a U-Net of pixels; use it with Diffusers"
REFUSED = {
    "StableDiffusion3Pipeline": "ComfyUI takes an SD3's depth from its width (64 channels a block) and "
    "stable-diffusion.cpp builds 24 blocks or more, so neither opens one with fewer; use it with Diffusers",
    "DiTPipeline": "no program reads a DiT, which draws by class labels; use it with Diffusers",
    "DDPMPipeline": PIXELS,
    "DDIMPipeline": PIXELS,
}
SD_CPP = "stable-diffusion.cpp"


# ------------------------------------------------------------------------------------------ what every program expects


class Layout(NamedTuple):
    """What the blocks of a U-Net are."""

    widths: tuple[float, ...]  # of the levels, as multiples of the first
    down: tuple[tuple[int, ...], ...]  # transformer blocks behind each resnet of each level
    mid: int | None  # transformer blocks of the middle block, 0 for a lone resnet, None for no middle block
    up: tuple[tuple[int, ...], ...]  # as `down`, from the lowest level on


SD = Layout((1, 2, 4, 4), ((1, 1), (1, 1), (1, 1), (0, 0)), 1, ((0, 0, 0), (1, 1, 1), (1, 1, 1), (1, 1, 1)))
SD_TINY = Layout((1, 2, 4), ((1,), (1,), (1,)), None, ((1, 1), (1, 1), (1, 1)))  # BK-SDM-Tiny
XL = Layout((1, 2, 4), ((0, 0), (2, 2), (10, 10)), 10, ((10, 10, 10), (2, 2, 2), (0, 0, 0)))
SSD_1B = Layout((1, 2, 4), ((0, 0), (2, 2), (4, 4)), 0, ((4, 4, 10), (2, 1, 1), (0, 0, 0)))
VEGA = Layout((1, 2, 4), ((0, 0), (1, 1), (2, 2)), 0, ((2, 2, 2), (1, 1, 1), (0, 0, 0)))
# ComfyUI tells an SDXL by the transformer blocks on the way down: SDXL, SSD-1B, Vega, KOALA-700M, KOALA-1B.
COMFYUI_XL = ((0, 0, 2, 2, 10, 10), (0, 0, 2, 2, 4, 4), (0, 0, 1, 1, 2, 2), (0, 2, 5), (0, 2, 6))

BLOCK_TYPES = {"CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"}
BLOCK_TYPES |= {"UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None}
# What the file does not say, or the programs do not look up there.
UNET = {
    **{"in_channels": 4, "out_channels": 4, "norm_num_groups": 32, "norm_eps": 1e-5, "act_fn": "silu"},
    **{"flip_sin_to_cos": True, "freq_shift": 0, "time_embedding_type": "positional", "center_input_sample": False},
    **{"resnet_time_scale_shift": "default", "only_cross_attention": False, "dual_cross_attention": False},
    **dict.fromkeys(("class_embed_type", "num_class_embeds", "encoder_hid_dim_type", "time_cond_proj_dim")),
}
VAE = {
    **{"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 4, "norm_num_groups": 32},
    **{"in_channels": 3, "out_channels": 3, "act_fn": "silu", "use_quant_conv": True, "use_post_quant_conv": True},
}
NOISE = {
    **{"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000},
    **{"trained_betas": None, "rescale_betas_zero_snr": False},
}


def clip(width: int, layers: int, act: str) -> dict[str, Any]:
    """The config of a CLIP text encoder of this width."""
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": width // 64}
    return {**sizes, "num_hidden_layers": layers, "hidden_act": act, "max_position_embeddings": 77}


class Family(NamedTuple):
    """A kind of checkpoint."""

    name: str
    architecture: str  # as the ModelSpec standard calls it
    whole: Layout
    heads: int | None  # of every attention layer; None is heads of 64 channels
    scaling_factor: float  # of the VAE
    unet: dict[str, Any]
    texts: list[dict[str, Any]]


CLIP_L = clip(768, 12, "quick_gelu")
PLAIN = {"addition_embed_type": None, "use_linear_projection": False, "cross_attention_dim": 768}
LINEAR = {**PLAIN, "use_linear_projection": True, "cross_attention_dim": 1024}
SIZES = {"addition_embed_type": "text_time", "use_linear_projection": True, "cross_attention_dim": 2048}
SIZES |= {"addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816}
SD1 = Family("SD 1.x", "stable-diffusion-v1", SD, 8, 0.18215, PLAIN, [CLIP_L])
# Of OpenCLIP's 24 layers the pipelines of SD 2.x keep those that are used.
SD2 = Family("SD 2.x", "stable-diffusion-v2-512", SD, None, 0.18215, LINEAR, [clip(1024, 23, "gelu")])
OPEN_CLIP = {**clip(1280, 32, "gelu"), "projection_dim": 1280}
SDXL = Family("SDXL", "stable-diffusion-xl-v1-base", XL, None, 0.13025, SIZES, [CLIP_L, OPEN_CLIP])


def family_of(pipeline: DiffusionPipeline) -> Family:
    """The kind of checkpoint: SD 1.x has OpenAI's CLIP, SD 2.x OpenCLIP, which have different activations."""
    if isinstance(pipeline, StableDiffusionXLPipeline):
        return SDXL
    return SD2 if pipeline.text_encoder.config.hidden_act == "gelu" else SD1


def find_obstacle(pipeline: DiffusionPipeline, family: Family) -> str | None:
    """What every program takes for granted and the pipeline does not have; `None` where there is nothing."""
    unet, noise = pipeline.unet, pipeline.scheduler.config
    encoders = [pipeline.text_encoder, getattr(pipeline, "text_encoder_2", None)]
    parts = [
        ("U-Net", unet.config, {**UNET, **family.unet}),
        ("VAE", pipeline.vae.config, {**VAE, "scaling_factor": family.scaling_factor}),
        ("scheduler", noise, NOISE),
        *(("text encoder", encoder.config.to_dict(), text) for encoder, text in zip(encoders, family.texts)),
    ]
    for name, config, expected in parts:
        for key, value in expected.items():
            found = config.get(key, value)  # an older config lacks what has that default
            if (list(found) if isinstance(found, tuple) else found) != value:
                return f"its {name} has {key} {found}, the programs' {family.name} has {value}"
    others = {*unet.config.down_block_types, *unet.config.up_block_types, unet.config.mid_block_type} - BLOCK_TYPES
    if others:
        return f"its U-Net has a {others.pop()}, which the programs do not know"
    for name, layer in unet.named_modules():
        if isinstance(layer, Attention) and layer.heads != (family.heads or layer.inner_dim / 64):
            expected = f"{family.heads} heads" if family.heads else "heads of 64 channels"
            size = layer.inner_dim // layer.heads
            return f"its {name} has {layer.heads} heads of {size} channels, the programs' {family.name} has {expected}"
    if noise.prediction_type not in ("epsilon", "v_prediction"):
        return f"it predicts the {noise.prediction_type}, the programs take noise or velocity"
    return None


# --------------------------------------------------------------------------------------------- what each program opens


def layout_of(unet: UNet2DConditionModel) -> Layout:
    """The U-Net's layout, by its modules."""

    def depths(block: torch.nn.Module) -> tuple[int, ...]:
        attentions = getattr(block, "attentions", None) or ()
        return tuple(len(each.transformer_blocks) for each in attentions) or (0,) * len(block.resnets)

    widths, mid = unet.config.block_out_channels, unet.mid_block
    down, up = (tuple(map(depths, blocks)) for blocks in (unet.down_blocks, unet.up_blocks))
    return Layout(tuple(width / widths[0] for width in widths), down, None if mid is None else depths(mid)[0], up)


def find_programs(unet: UNet2DConditionModel, family: Family, gaps: bool) -> list[str]:
    """The programs that open a file with this U-Net, provided that there is no [`find_obstacle`].

    Args:
        gaps: Whether the file keeps the numbers of missing layers, see `common.single_file.number_blocks`.
    """
    layout, xl = layout_of(unet), family is SDXL
    whole_width = unet.config.block_out_channels[0] == 320
    if gaps:
        return [SD_CPP] if layout == SD_TINY and not xl else []
    down, programs = sum(layout.down, ()), []
    multiples = all(width.is_integer() for width in layout.widths)
    if whole_width and multiples and (down in COMFYUI_XL if xl else any(down)):
        # Forge has ComfyUI's rules, but builds a middle block into every U-Net.
        programs += ["ComfyUI"] if layout.mid is None else ["ComfyUI", "Forge"]
    if whole_width and layout in ((XL, SSD_1B) if xl else (SD,)):
        programs.append("A1111")
    if layout in ((XL, SSD_1B, VEGA) if xl else (SD,)):
        programs.append(SD_CPP)
    return programs


# --------------------------------------------------------------------------------------------------------- the command


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line, or `input_args`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--model", required=True, help="the student: its pipeline folder or Hub id")
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")
    parser.add_argument("--variant", help="weights variant, e.g. fp16")
    parser.add_argument("--output", required=True, help="the .safetensors file")
    vae = "dtype of the tensors; with fp16 a VAE of SDXL that overflows stays in fp32"
    parser.add_argument("--dtype", default="fp32", choices=tuple(DTYPES), help=vae)
    parser.add_argument(
        "--keep_gaps",
        action="store_true",
        help="number the blocks as if no layer were missing, for BK-SDM-Tiny in stable-diffusion.cpp, not in ComfyUI",
    )
    args = parser.parse_args(input_args)
    check_values(args)
    return args


def load_student(model: str, revision: str | None, variant: str | None) -> DiffusionPipeline:
    """The pipeline, on the CPU. Ends the process where it is none that has an original layout."""
    folder = Path(model)
    if (folder / "pytorch_lora_weights.safetensors").is_file():
        fail(f"--model {model} is an adapter alone; pass the student's folder around it, where it is merged")
    if (folder / "state.json").is_file():
        fail(f"--model {model} is a checkpoint of a training; let the run end, and pass its --output_dir")
    check_ended(folder, f"--model {model}")
    if not folder.is_dir() and (folder.is_absolute() or model.startswith(".") or model.count("/") > 1):
        fail(f"--model {model} is no folder; {EXPECTED}")
    try:
        parts = DiffusionPipeline.load_config(model, revision=revision)
        kind = parts.get("_class_name") if isinstance(parts, dict) else None
        if kind not in PIPELINES:
            fail(f"--model {model} is a {kind}: {REFUSED.get(kind, f'it has no such file; {EXPECTED}')}")
        absent = [name for name, part in parts.items() if part == [None, None] or name == "safety_checker"]
        missing = [name for name in ("unet", "vae", "text_encoder", "text_encoder_2") if name in absent]
        if missing:
            fail(f"--model {model} has no {missing[0]}, which belongs into the file; pass a whole pipeline")
        options = {"revision": revision, "variant": variant, **dict.fromkeys(absent)}
        return read_weights(PIPELINES[kind].from_pretrained, model, **options)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        fail(f"--model {model} does not load: {explain(error, variant, EXPECTED)}")


def describe(pipeline: DiffusionPipeline, family: Family, title: str) -> dict[str, str]:
    """The file's header, by the ModelSpec standard (https://github.com/Stability-AI/ModelSpec)."""
    velocity = pipeline.scheduler.config.prediction_type == "v_prediction"
    architecture = "stable-diffusion-v2-768-v" if family is SD2 and velocity else family.architecture
    pruned = "" if layout_of(pipeline.unet) == family.whole else "-pruned"
    size = pipeline.unet.config.sample_size
    side = size * pipeline.vae_scale_factor if isinstance(size, int) else None
    return {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": architecture + pruned,
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": title,
        "modelspec.prediction_type": "v" if velocity else "epsilon",
        **({"modelspec.resolution": f"{side}x{side}"} if side else {}),
    }


def save_whole(state: State, path: Path, header: dict[str, str]) -> None:
    """Write the file completely or not at all."""
    temporary = path.with_name(f".{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(state, temporary, metadata=header)
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        fail(f"--output {path} cannot be written: {first_line(error)}; make room, or pass another place")


def main(args: argparse.Namespace) -> None:
    """Write the file, and say what opens it."""
    output = Path(args.output)
    if output.suffix != ".safetensors":
        fail(f"--output {output} is no safetensors file's name; pass one that ends with .safetensors")
    if output.exists():
        fail(f"--output {output} exists; remove it, or pass another name")
    pipeline = load_student(args.model, args.revision, args.variant)
    family, unet = family_of(pipeline), pipeline.unet
    obstacle = find_obstacle(pipeline, family)
    if obstacle is not None:
        fail(f"--model {args.model}: {obstacle}, so none of them opens it; use it with Diffusers")
    programs = find_programs(unet, family, args.keep_gaps)
    if args.keep_gaps and not programs:
        fail(f"--keep_gaps is for the layout of BK-SDM-Tiny, which --model {args.model} has not; drop it")
    if not programs:
        what = f"no program opens a U-Net of {unet.config.block_out_channels} channels with {layout_of(unet)}"
        fail(f"--model {args.model}: {what}; use it with Diffusers, or see the layouts in docs/export.md")
    state = convert_pipeline(pipeline, args.keep_gaps, DTYPES[args.dtype])
    broken = first_non_finite(state)
    if broken is not None:
        fail(f"--dtype {args.dtype}: {broken} is not finite in it; pass bf16 or fp32, or a model that is whole")
    save_whole(state, output, describe(pipeline, family, Path(args.model).resolve().name))
    print(f"{output}: {family.name}, {output.stat().st_size:,} bytes; opens in {', '.join(programs)}")
    if pipeline.scheduler.config.prediction_type == "v_prediction" and family is not SDXL:
        print("it predicts velocity, which the file cannot say: choose v-prediction in the program")
    elif pipeline.scheduler.config.prediction_type == "v_prediction" and "A1111" in programs:
        print("it predicts velocity, which A1111 up to 1.10 does not see: put a .yaml that says so beside the file")


if __name__ == "__main__":
    main(parse_args())
