# Copyright 2026 The LIFT and PLACE distillation authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Under which names do the original Stable Diffusion checkpoints keep a pipeline's tensors?"""

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import DIFFUSERS_TO_LDM_MAPPING


State = dict[str, torch.Tensor]

# Diffusers' own table has the names outside the blocks; those inside are in its converter's code.
RESNET = {
    **{"norm1.": "in_layers.0.", "conv1.": "in_layers.2.", "norm2.": "out_layers.0.", "conv2.": "out_layers.3."},
    **{"time_emb_proj.": "emb_layers.1.", "conv_shortcut.": "skip_connection."},
}
VAE_ATTENTION = {"group_norm.": "norm.", "to_q.": "q.", "to_k.": "k.", "to_v.": "v.", "to_out.0.": "proj_out."}


def number_blocks(unet: UNet2DConditionModel, gaps: bool) -> dict[str, str]:
    """What the beginnings of the names in a U-Net's blocks become: the layers of all blocks are counted through.

    Args:
        gaps: Whether a block keeps the numbers of two resnets down and three up where it has fewer. So does Diffusers'
            conversion script, whose files stable-diffusion.cpp reads. ComfyUI and Diffusers count what is there.
    """
    names, at = {}, 1
    for number, block in enumerate(unet.down_blocks):
        ours = f"down_blocks.{number}"
        for layer in range(len(block.resnets)):
            names[f"{ours}.resnets.{layer}."] = f"input_blocks.{at + layer}.0."
            names[f"{ours}.attentions.{layer}."] = f"input_blocks.{at + layer}.1."
        at += max(len(block.resnets), 2 if gaps else 0)
        names[f"{ours}.downsamplers.0.conv."] = f"input_blocks.{at}.0.op."
        at += 1
    at = 0
    for number, block in enumerate(unet.up_blocks):
        ours = f"up_blocks.{number}"
        for layer in range(len(block.resnets)):
            names[f"{ours}.resnets.{layer}."] = f"output_blocks.{at + layer}.0."
            names[f"{ours}.attentions.{layer}."] = f"output_blocks.{at + layer}.1."
        gap = max(3 - len(block.resnets), 0) if gaps else 0
        at += len(block.resnets) + gap
        # After a gap the script has the place that the first upsampler has in the whole U-Net, without attention.
        place = 2 if hasattr(block, "attentions") and not (gap and number == 0) else 1
        names[f"{ours}.upsamplers.0."] = f"output_blocks.{at - 1}.{place}."
    names |= {f"mid_block.resnets.{number}.": f"middle_block.{2 * number}." for number in (0, 1)}
    return names | {"mid_block.attentions.0.": "middle_block.1."}


def swap(name: str, parts: dict[str, str]) -> str:
    """The name with the first of the parts that is in it replaced."""
    old = next((part for part in parts if part in name), "")
    return name.replace(old, parts[old], 1) if old else name


def convert_unet(unet: UNet2DConditionModel, gaps: bool) -> State:
    """The U-Net's tensors under the names of the original checkpoints. See [`number_blocks`]."""
    table, blocks = DIFFUSERS_TO_LDM_MAPPING["unet"], number_blocks(unet, gaps)
    state = {}
    for name, tensor in unet.state_dict().items():
        inner = swap(name, RESNET) if ".resnets." in name else name
        state[{**table["layers"], **table["addition_embed_type"]}.get(name) or swap(inner, blocks)] = tensor
    return state


def convert_vae(vae: AutoencoderKL) -> State:
    """The VAE's tensors under the original names: its attention is of 1x1 convolutions, its decoder counts upwards."""
    levels = len(vae.config.block_out_channels)
    blocks = {f"mid_block.resnets.{number}.": f"mid.block_{number + 1}." for number in (0, 1)}
    blocks |= {"mid_block.attentions.0.": "mid.attn_1."}
    for level in range(levels):
        for ours, theirs in (("resnets", "block"), ("downsamplers.0", "downsample"), ("upsamplers.0", "upsample")):
            blocks[f"encoder.down_blocks.{level}.{ours}."] = f"encoder.down.{level}.{theirs}."
            blocks[f"decoder.up_blocks.{level}.{ours}."] = f"decoder.up.{levels - 1 - level}.{theirs}."
    state = {}
    for name, tensor in vae.state_dict().items():
        attention = ".attentions." in name
        inner = swap(name, VAE_ATTENTION if attention else {"conv_shortcut.": "nin_shortcut."})
        new = DIFFUSERS_TO_LDM_MAPPING["vae"].get(name) or swap(inner, blocks)
        state[new] = tensor[:, :, None, None] if attention and tensor.ndim == 2 else tensor
    return state


def convert_text(encoder: torch.nn.Module) -> State:
    """A text encoder's tensors: OpenAI's CLIP keeps its names, OpenCLIP has one tensor for query, key and value."""
    state = encoder.state_dict()
    if not hasattr(encoder, "text_model"):  # as Transformers has it from 5.6 on
        state = {f"text_model.{name}": tensor for name, tensor in state.items()}
    if encoder.config.hidden_act != "gelu":
        return {f"transformer.{name}": tensor for name, tensor in state.items()}
    table, new = DIFFUSERS_TO_LDM_MAPPING["openclip"], {}
    for name, tensor in state.items():
        if name in table["layers"]:
            new[table["layers"][name]] = tensor.T if name == "text_projection.weight" else tensor
        elif ".k_proj." not in name and ".v_proj." not in name:
            if ".q_proj." in name:
                tensor = torch.cat([state[name.replace(".q_proj.", f".{each}_proj.")] for each in "qkv"])
            inner = name.replace(".q_proj.", ".in_proj_")
            for ours, theirs in table["transformer"].items():
                inner = inner.replace(ours, theirs)
            new[f"transformer.{inner}"] = tensor
    return {f"model.{name}": tensor for name, tensor in new.items()}


def convert_pipeline(pipeline: DiffusionPipeline, gaps: bool, dtype: torch.dtype = torch.float32) -> State:
    """All tensors of a single file.

    Args:
        pipeline: A StableDiffusionPipeline or StableDiffusionXLPipeline. It may be on the meta device.
        gaps: See [`number_blocks`].
        dtype: Of the tensors, but of the VAE of an SDXL where that overflows in half precision.

    Returns:
        Contiguous tensors by the names of CompVis' and Stability AI's checkpoints.
    """
    xl = isinstance(pipeline, StableDiffusionXLPipeline)
    keep_vae = xl and pipeline.vae.config.force_upcast and dtype == torch.float16
    parts = {
        "model.diffusion_model": convert_unet(pipeline.unet, gaps),
        "first_stage_model": convert_vae(pipeline.vae),
    }
    if xl:
        parts["conditioner.embedders.0"] = convert_text(pipeline.text_encoder)
        parts["conditioner.embedders.1"] = convert_text(pipeline.text_encoder_2)
    else:
        parts["cond_stage_model"] = convert_text(pipeline.text_encoder)
    state = {}
    for prefix, part in parts.items():
        to = torch.float32 if keep_vae and prefix == "first_stage_model" else dtype
        state |= {f"{prefix}.{name}": tensor.to(to).contiguous() for name, tensor in part.items()}
    if xl and pipeline.scheduler.config.prediction_type == "v_prediction":
        state["v_pred"] = torch.zeros(0)  # by its name the programs know
    return state
