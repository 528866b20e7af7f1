# Copyright 2026 The LIFT and PLACE distillation authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Pipelines of random weights in full layout, so small that a training step takes a fraction of a second on a CPU."""

import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    PNDMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "demos"))

from small_models import make_tokenizer


TINY_UNET = {
    "sample_size": 16,
    "in_channels": 1,
    "out_channels": 1,
    "layers_per_block": 1,
    "block_out_channels": [16, 32],
    "norm_num_groups": 4,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
}
TINY_DIT = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 8,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
}
# CLIP encoders of widths 12 and 20, as SD3's have 768 and 1280; T5 of 48.
TINY_SD3 = {
    "sample_size": 8,
    "num_layers": 6,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 48,
    "caption_projection_dim": 16,
    "pooled_projection_dim": 32,
    "pos_embed_max_size": 8,
    "in_channels": 4,
    "out_channels": 4,
}
TINY_PIXART = {
    "sample_size": 8,
    "num_layers": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "cross_attention_dim": 16,
    "caption_channels": 48,
    "in_channels": 4,
    "out_channels": 8,
    "use_additional_conditions": False,
}
CLASS_NAMES = {0: "t-shirt, tee", 1: "trousers", 999: "ankle boot"}
TOKENS = 24  # of a prompt for CLIP
WORDS = ["a", "photo", "of", "dark", "bright", "bag", "sneaker"]


def save_pixel_pipeline(folder: Path, **unet: Any) -> Path:
    """A tiny random DDPMPipeline of 16 grey pixels, attention in the lower of two levels; `unet` overrides config."""
    torch.manual_seed(0)
    DDPMPipeline(UNet2DModel(**{**TINY_UNET, **unet}), DDPMScheduler(num_train_timesteps=1000)).save_pretrained(folder)
    return folder


def save_sd_pipeline(folder: Path, prediction_type: str = "epsilon", **unet: Any) -> Path:
    """A tiny random Stable Diffusion pipeline: 32 pixels, four levels; `unet` overrides its U-Net's config."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer(WORDS, TOKENS)
    vae = _vae()
    config = {
        "sample_size": 8,
        "block_out_channels": [8, 16, 32, 32],
        "attention_head_dim": [1, 2, 4, 4],
        "norm_num_groups": 4,
        "cross_attention_dim": 16,
        "use_linear_projection": True,
    }
    scheduler = PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        steps_offset=1,
        prediction_type=prediction_type,
    )
    model = UNet2DConditionModel(**{**config, **unet})
    text_encoder = CLIPTextModel(_clip_config(model.config.cross_attention_dim, tokenizer))
    parts = (vae, text_encoder, tokenizer, model, scheduler, None, None)
    StableDiffusionPipeline(*parts, requires_safety_checker=False).save_pretrained(folder)
    return folder


def save_sdxl_pipeline(folder: Path, prediction_type: str = "epsilon", **unet: Any) -> Path:
    """A tiny random Stable Diffusion XL pipeline: 32 pixels, three levels; `unet` overrides its U-Net's config."""
    torch.manual_seed(0)
    vae, tokenizer = _vae(force_upcast=True), make_tokenizer(WORDS, TOKENS)
    config = {
        "sample_size": 8,
        "block_out_channels": [8, 16, 32],
        "attention_head_dim": [1, 2, 4],
        "norm_num_groups": 4,
        "cross_attention_dim": 32,
        "transformer_layers_per_block": [1, 2, 10],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 6 * 4 + 20,
    }
    noise = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = EulerDiscreteScheduler(**noise, prediction_type=prediction_type)
    model = UNet2DConditionModel(**{**config, **unet})
    text_encoder = CLIPTextModel(_clip_config(12, tokenizer))
    text_encoder_2, tokenizer_2 = _clip(20)
    parts = (vae, text_encoder, text_encoder_2, tokenizer, tokenizer_2, model, scheduler)
    StableDiffusionXLPipeline(*parts, add_watermarker=False).save_pretrained(folder)
    return folder


def save_dit_pipeline(folder: Path, **transformer: Any) -> Path:
    """A tiny random DiTPipeline of 32 pixels with class names; `transformer` overrides its transformer's config."""
    torch.manual_seed(0)
    vae, model = _vae(), DiTTransformer2DModel(**{**TINY_DIT, **transformer})
    pipeline = DiTPipeline(model, vae, DDIMScheduler(clip_sample=False))
    pipeline.register_to_config(id2label={str(number): name for number, name in CLASS_NAMES.items()})
    pipeline.save_pretrained(folder)
    return folder


def save_sd3_pipeline(folder: Path, absent: tuple[int, ...] = (), shift: float = 3.0, **transformer: Any) -> Path:
    """A tiny random SD3 pipeline: 32 pixels, latents of 8 x 8, six blocks, three text encoders but the `absent`."""
    torch.manual_seed(0)
    vae = _vae(scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False)
    texts = [make(width) for make, width in ((_clip, 12), (_clip, 20), (_t5, 48))]
    texts = [(None, None) if number in absent else text for number, text in enumerate(texts, 1)]
    model = SD3Transformer2DModel(**{**TINY_SD3, **transformer})
    for block in model.transformer_blocks:  # AdaLN's gates of a random model are nearly closed: let the blocks matter
        block.norm1.linear.bias.data.normal_()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    StableDiffusion3Pipeline(model, scheduler, vae, *texts[0], *texts[1], *texts[2]).save_pretrained(folder)
    return folder


def save_pixart_pipeline(folder: Path, **transformer: Any) -> Path:
    """A tiny random PixArt-Sigma pipeline: 32 pixels, four blocks, T5, a learned variance; `transformer` overrides."""
    torch.manual_seed(0)
    text_encoder, tokenizer = _t5(48)
    model = PixArtTransformer2DModel(**{**TINY_PIXART, **transformer})
    PixArtSigmaPipeline(tokenizer, text_encoder, _vae(), model, DPMSolverMultistepScheduler()).save_pretrained(folder)
    return folder


def _vae(**config: Any) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=[8, 8, 16],
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        norm_num_groups=4,
        layers_per_block=1,
        **config,
    )


def _clip_config(width: int, tokenizer: CLIPTokenizer, **config: Any) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **config,
    )


def _clip(width: int) -> tuple[CLIPTextModelWithProjection, CLIPTokenizer]:
    tokenizer = make_tokenizer(WORDS, TOKENS)
    return CLIPTextModelWithProjection(_clip_config(width, tokenizer, projection_dim=width)), tokenizer


def _t5(width: int) -> tuple[T5EncoderModel, T5TokenizerFast]:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(f"▁{word}", -3.0) for word in WORDS] + [(letter, -6.0) for letter in "abcdefghijklmnopqrstuvwxyz-"]
    tokenizer = T5TokenizerFast(vocab=pieces, extra_ids=0)
    config = T5Config(vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    return T5EncoderModel(config), tokenizer
