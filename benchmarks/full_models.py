# Copyright 2026 The LIFT and PLACE distillation authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Teachers in the sizes that are published, as pipelines without weights: all that a dry run reads."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDPMPipeline,
    DDPMScheduler,
    DiTTransformer2DModel,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
)
from transformers import CLIPTextConfig, PretrainedConfig, T5Config


# The DDPM of 78.7M parameters for faces of 64 pixels.
CELEBA = {
    "sample_size": 64,
    "block_out_channels": [128, 256, 256, 256, 512],
    "attention_head_dim": None,
    "down_block_types": ["DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"],
}
SD21 = {
    "sample_size": 64,
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
}
SDXL = {
    "sample_size": 128,
    "cross_attention_dim": 2048,
    "attention_head_dim": [5, 10, 20],
    "use_linear_projection": True,
    "block_out_channels": [320, 640, 1280],
    "layers_per_block": 2,
    "transformer_layers_per_block": [1, 2, 10],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
DIT_XL = {"num_attention_heads": 16, "attention_head_dim": 72, "num_layers": 28, "out_channels": 8}
SD3_MEDIUM = {
    "sample_size": 128,
    "num_layers": 24,
    "num_attention_heads": 24,
    "attention_head_dim": 64,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
}
SD35_MEDIUM = {
    **SD3_MEDIUM,
    "dual_attention_layers": [*range(13)],
    "qk_norm": "rms_norm",
    "pos_embed_max_size": 384,
}
SD35_LARGE = {
    **SD3_MEDIUM,
    "num_layers": 38,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "qk_norm": "rms_norm",
}


def save_ddpm(folder: Path, **unet: Any) -> Path:
    """A pixel pipeline with random weights, which its script reads for a dry run too."""
    DDPMPipeline(UNet2DModel(**unet), DDPMScheduler()).save_pretrained(folder)
    return folder


def save_sd21(folder: Path) -> Path:
    """Stable Diffusion 2.1-base."""
    text = CLIPTextConfig(hidden_size=1024, num_hidden_layers=23, num_attention_heads=16, intermediate_size=4096)
    with torch.device("meta"):
        parts = {"unet": UNet2DConditionModel(**SD21), "vae": make_vae(4), "scheduler": DDPMScheduler()}
    return _save(folder, "StableDiffusionPipeline", parts, {"text_encoder": ("CLIPTextModel", text)})


def save_sdxl(folder: Path) -> Path:
    """Stable Diffusion XL base."""
    clips = make_clips()
    texts = {
        "text_encoder": ("CLIPTextModel", clips[0]),
        "text_encoder_2": ("CLIPTextModelWithProjection", clips[1]),
    }
    with torch.device("meta"):
        parts = {"unet": UNet2DConditionModel(**SDXL), "vae": make_vae(4)}
    parts["scheduler"] = EulerDiscreteScheduler()
    return _save(folder, "StableDiffusionXLPipeline", parts, texts)


def save_dit(folder: Path) -> Path:
    """DiT-XL/2 at 256 pixels."""
    with torch.device("meta"):
        parts = {"transformer": DiTTransformer2DModel(**DIT_XL), "vae": make_vae(4), "scheduler": DDPMScheduler()}
    return _save(folder, "DiTPipeline", parts, {})


def save_sd3(folder: Path, transformer: dict[str, Any]) -> Path:
    """A pipeline of Stable Diffusion 3 or 3.5 with this transformer."""
    clips = [("CLIPTextModelWithProjection", config) for config in make_clips()]
    t5 = {"d_model": 4096, "num_layers": 24, "num_heads": 64, "d_ff": 10240, "feed_forward_proj": "gated-gelu"}
    texts = {
        "text_encoder": clips[0],
        "text_encoder_2": clips[1],
        "text_encoder_3": ("T5EncoderModel", T5Config(**t5)),
    }
    with torch.device("meta"):
        parts = {"transformer": SD3Transformer2DModel(**transformer), "vae": make_vae(16)}
    parts["scheduler"] = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return _save(folder, "StableDiffusion3Pipeline", parts, texts)


def make_clips() -> list[CLIPTextConfig]:
    """The two text encoders of Stable Diffusion XL and 3: OpenAI's CLIP-L and OpenCLIP's bigG."""
    layers = {"num_hidden_layers": 12, "num_attention_heads": 12}, {"num_hidden_layers": 32, "num_attention_heads": 20}
    widths = ({"hidden_size": width, "projection_dim": width, "intermediate_size": 4 * width} for width in (768, 1280))
    return [CLIPTextConfig(**layer, **width) for layer, width in zip(layers, widths)]


def make_vae(channels: int, narrower: int = 1) -> AutoencoderKL:
    """The VAE of all published teachers.

    Args:
        channels: Of the latents.
        narrower: Divides its widths, for a small one.
    """
    return AutoencoderKL(
        block_out_channels=[width // narrower for width in (128, 256, 512, 512)],
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        layers_per_block=2,
        norm_num_groups=32 // narrower,
        latent_channels=channels,
    )


def _save(folder: Path, pipeline: str, parts: dict[str, Any], texts: dict[str, tuple[str, PretrainedConfig]]) -> Path:
    """The configs of all parts and the index.

    Args:
        parts: Of Diffusers.
        texts: The class and the config of each text encoder.
    """
    index: dict[str, Any] = {"_class_name": pipeline}
    for name, part in parts.items():
        part.save_config(folder / name)
        index[name] = ["diffusers", type(part).__name__]
    for name, (kind, config) in texts.items():
        config.save_pretrained(folder / name)
        index[name] = ["transformers", kind]
        index[name.replace("text_encoder", "tokenizer")] = ["transformers", "PreTrainedTokenizerFast"]
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder
