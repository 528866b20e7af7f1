# Copyright 2026 The LIFT and PLACE distillation authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""The parts of a pipeline, so small that each trains on a CPU in minutes, saved by `save_pretrained`.

An autoencoder, a tokenizer and CLIP, which the training scripts of latent text-to-image models expect to find in the
teacher, and the classifier whose features the demos measure. What exists already is loaded instead of trained. For
their use see fashion_sd21.py.
"""

import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.teachers import vae_factor


def make_tokenizer(words: list[str], length: int) -> CLIPTokenizer:
    """A tokenizer with one token for each of these words, which spells all others by letters.

    Args:
        words: In lower case.
        length: Tokens of a prompt, at most.
    """
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,'!-"
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters)]
    merges = []
    for word in words:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            merges.append((parts[0], parts[1]))
            parts[:2] = ["".join(parts[:2])]
            vocabulary.append(parts[0])
    vocabulary = [*dict.fromkeys(vocabulary), "<|startoftext|>", "<|endoftext|>"]
    numbered = {token: index for index, token in enumerate(vocabulary)}
    return CLIPTokenizer(vocab=numbered, merges=list(dict.fromkeys(merges)), model_max_length=length)


def as_inputs(images: np.ndarray) -> torch.Tensor:
    """Grey images, uint8 (N, H, W), as input of a model: float32 (N, 3, H, W) in [-1, 1]."""
    return (torch.from_numpy(images).float() / 127.5 - 1)[:, None].expand(-1, 3, -1, -1)


def optimize(model: torch.nn.Module, steps: int, learning_rate: float) -> Iterator[Callable[[torch.Tensor], None]]:
    """Yield, once per step, a function that takes the step when it is called with the loss.

    The optimizer is AdamW; its learning rate rises to `learning_rate` and then falls to zero.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, steps, pct_start=0.1)

    def take(loss: torch.Tensor) -> None:
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()

    for _ in range(steps):
        yield take


def save_parts(folder: Path, *parts: Any) -> None:
    """Call `part.save_pretrained(folder)` for all parts; the folder appears once all are written."""
    temporary = folder.with_name(f".{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    for part in parts:
        part.save_pretrained(temporary)
    temporary.rename(folder)


def train_autoencoder(
    folder: Path,
    images: np.ndarray,
    steps: int = 5000,
    seed: int = 0,
    channels: tuple[int, ...] = (16, 32, 32),
    latent_channels: int = 16,
    batch_size: int = 4,
) -> AutoencoderKL:
    """Train an autoencoder, or load it if the folder exists.

    The loss is the squared error plus a small KL divergence from a normal distribution, without perceptual or
    adversarial terms. Afterwards the latents of 1,000 images have mean 0, and the config's `scaling_factor` is one
    over their standard deviation.

    Args:
        folder: Where it is saved.
        images: Grey, uint8 (N, H, W).
        steps: Training steps.
        seed: Of the weights, the batches and the latents.
        channels: Of each level. Every level but the first halves height and width.
        latent_channels: Channels of the latents.
        batch_size: Images per step. Many steps of few images bring it nearer to the images than few steps of many.
    """
    if folder.exists():
        return AutoencoderKL.from_pretrained(folder).eval()
    torch.manual_seed(seed)
    levels = len(channels)
    vae = AutoencoderKL(
        block_out_channels=channels,
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        latent_channels=latent_channels,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=images.shape[-1],
    )
    for step in optimize(vae, steps, learning_rate=2e-3):
        batch = as_inputs(images[torch.randint(len(images), (batch_size,)).numpy()])
        latents = vae.encode(batch).latent_dist
        error = F.mse_loss(vae.decode(latents.sample()).sample, batch)
        step(error + 1e-5 * latents.kl().mean() / latents.mean[0].numel())
    centre_latents(vae.eval(), as_inputs(images[:1000]))
    save_parts(folder, vae)
    return vae


@torch.no_grad()
def centre_latents(vae: AutoencoderKL, images: torch.Tensor) -> None:
    """Change the encoder's last bias so that every latent channel has mean 0, and the decoder's first bias likewise.

    Decoded images stay the same. This is needed because Stable Diffusion's pipeline scales latents but does not shift
    them. Sets `scaling_factor` too.

    Args:
        vae: Is changed in place.
        images: float32 (N, 3, H, W) in [-1, 1], whose latents are averaged.
    """
    latents = vae.encode(images).latent_dist.sample()
    mean = latents.mean((0, 2, 3))
    vae.quant_conv.bias[: len(mean)] -= mean
    vae.post_quant_conv.bias += vae.post_quant_conv.weight[:, :, 0, 0] @ mean
    vae.register_to_config(scaling_factor=round(1 / (latents - mean[:, None, None]).std().item(), 5))


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, images: np.ndarray) -> np.ndarray:
    """Encode and decode grey images, uint8 (N, H, W); returns the same shape and dtype."""
    decoded = vae.decode(vae.encode(as_inputs(images)).latent_dist.mode()).sample
    return ((decoded.mean(1).clamp(-1, 1) + 1) * 127.5).round().byte().numpy()


def train_clip(
    folder: Path,
    images: np.ndarray,
    captions: list[str],
    tokenizer: CLIPTokenizer,
    steps: int = 400,
    seed: int = 0,
    width: int = 64,
) -> Path:
    """Train a CLIPModel with two layers in each encoder on images with captions, unless the folder exists.

    The loss is CLIP's contrastive loss (Radford et al., 2021), except that all images of a batch that share a caption
    count as right for it. A pipeline's text encoder loads from the folder, as from OpenAI's.

    Args:
        folder: Where model, image processor and tokenizer are saved.
        images: Grey, uint8 (N, side, side); the side is a multiple of 8.
        captions: One for each image.
        tokenizer: From [`make_tokenizer`].
        steps: Training steps.
        seed: Of the weights and the batches.
        width: Hidden size of both encoders, and size of the common embedding.

    Returns:
        The folder.
    """
    if folder.exists():
        return folder
    torch.manual_seed(seed)
    side, length = images.shape[-1], tokenizer.model_max_length
    layers = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {
        **layers,
        "projection_dim": width,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {**layers, "projection_dim": width, "image_size": side, "patch_size": 8}
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=width))
    ids = tokenizer(captions, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    ids = ids["input_ids"]
    for step in optimize(clip, steps, learning_rate=2e-3):
        chosen = torch.randint(len(images), (64,))
        output = clip(input_ids=ids[chosen], pixel_values=as_inputs(images[chosen.numpy()]))
        same = (ids[chosen][:, None] == ids[chosen]).all(-1).float()
        targets = same / same.sum(-1, keepdim=True)
        directions = (output.logits_per_text, output.logits_per_image)
        step(sum(F.cross_entropy(logits, targets) for logits in directions) / 2)
    grey = [0.5] * 3  # [0, 1] to [-1, 1], as `as_inputs`
    processor = CLIPImageProcessor(size={"shortest_edge": side}, crop_size=side, image_mean=grey, image_std=grey)
    save_parts(folder, clip.eval(), processor, tokenizer)
    return folder


def save_sd_pipeline(folder: Path, vae: AutoencoderKL, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer) -> Path:
    """Save a StableDiffusionPipeline of these parts and a random U-Net in the four-level layout of Stable Diffusion.

    Returns:
        The folder. If it exists, nothing is done.
    """
    if folder.exists():
        return folder
    torch.manual_seed(0)
    config = {
        "sample_size": vae.config.sample_size // vae_factor(vae),
        "in_channels": vae.config.latent_channels,
        "out_channels": vae.config.latent_channels,
        "block_out_channels": [32, 64, 96, 96],
        "attention_head_dim": [2, 4, 6, 6],  # UNet2DConditionModel reads it as the number of heads
        "norm_num_groups": 8,
        "cross_attention_dim": text_encoder.config.hidden_size,
        "use_linear_projection": True,
    }
    model = UNet2DConditionModel(**config)
    pipeline = StableDiffusionPipeline(
        vae, text_encoder, tokenizer, model, _noise(), None, None, requires_safety_checker=False
    )
    save_parts(folder, pipeline)
    return folder


def _noise() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
    )


def save_sdxl_pipeline(folder: Path, vae: AutoencoderKL, clip: Path, tokenizer: CLIPTokenizer) -> Path:
    """Save a StableDiffusionXLPipeline of these parts and a random U-Net in its three-level layout.

    Args:
        clip: The folder of [`train_clip`], whose text encoder is used in both places.

    Returns:
        The folder. If it exists, nothing is done.
    """
    if folder.exists():
        return folder
    torch.manual_seed(0)
    encoders = CLIPTextModel.from_pretrained(clip), CLIPTextModelWithProjection.from_pretrained(clip)
    width, time_width = encoders[1].config.hidden_size, 16
    config = {
        "sample_size": vae.config.sample_size // vae_factor(vae),
        "in_channels": vae.config.latent_channels,
        "out_channels": vae.config.latent_channels,
        "block_out_channels": [32, 64, 96],
        "attention_head_dim": [2, 4, 6],  # UNet2DConditionModel reads it as the number of heads
        "transformer_layers_per_block": [1, 2, 6],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "norm_num_groups": 8,
        "cross_attention_dim": 2 * width,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": time_width,
        "projection_class_embeddings_input_dim": 6 * time_width + encoders[1].config.projection_dim,
    }
    parts = (vae, *encoders, tokenizer, tokenizer, UNet2DConditionModel(**config), _noise())
    save_parts(folder, StableDiffusionXLPipeline(*parts, add_watermarker=False))
    return folder


def save_sd3_pipeline(
    folder: Path, vae: AutoencoderKL, text_encoder: CLIPTextModelWithProjection, tokenizer: CLIPTokenizer
) -> Path:
    """Save a StableDiffusion3Pipeline of these parts and a random MMDiT, without T5.

    Diffusers accepts prompts only if both CLIP encoders are present, so the one encoder is used in both places.

    Returns:
        The folder. If it exists, nothing is done.
    """
    if folder.exists():
        return folder
    torch.manual_seed(0)
    config = {
        "sample_size": vae.config.sample_size // vae_factor(vae),
        "in_channels": vae.config.latent_channels,
        "out_channels": vae.config.latent_channels,
        "patch_size": 1,
        "num_layers": 6,
        "num_attention_heads": 4,
        "attention_head_dim": 24,
        "caption_projection_dim": 96,
        "joint_attention_dim": 2 * text_encoder.config.hidden_size,
        "pooled_projection_dim": 2 * text_encoder.config.projection_dim,
        "pos_embed_max_size": 8,
    }
    model = SD3Transformer2DModel(**config)
    vae.register_to_config(shift_factor=0.0)  # the pipeline adds it, and fails on None
    clip = (text_encoder, tokenizer)
    pipeline = StableDiffusion3Pipeline(model, FlowMatchEulerDiscreteScheduler(), vae, *clip, *clip, None, None)
    save_parts(folder, pipeline)
    return folder


FEATURES = 32  # few, so that a few hundred samples give a well-conditioned covariance


class Classifier(torch.nn.Module):
    """Features (N, FEATURES) and logits (N, 10) of images float32 (N, 3, side, side) in [0, 255].

    This is what eval/evaluate.py expects of --features. The images are grey, so only the first channel is used. Over
    the training images each feature has about mean 0 and variance 1.
    """

    def __init__(self, side: int):
        super().__init__()
        self.body = torch.nn.Sequential(
            *(torch.nn.Conv2d(1, 16, 3, padding=1), torch.nn.ReLU(), torch.nn.MaxPool2d(2)),
            *(torch.nn.Conv2d(16, 32, 3, padding=1), torch.nn.ReLU(), torch.nn.MaxPool2d(2)),
            *(torch.nn.Flatten(), torch.nn.Linear(32 * (side // 4) ** 2, FEATURES)),
            torch.nn.BatchNorm1d(FEATURES, affine=False),
        )
        self.head = torch.nn.Linear(FEATURES, 10)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.body(images[:, :1] / 127.5 - 1)
        return features, self.head(F.relu(features))


def train_classifier(path: Path, images: np.ndarray, labels: np.ndarray, steps: int = 1000) -> torch.jit.ScriptModule:
    """Train the classifier for `evaluate.py --features` and save it as TorchScript, or load the file if it exists.

    Args:
        path: The TorchScript file.
        images: Grey, uint8 (N, side, side).
        labels: (N,), from 0 to 9.
        steps: Training steps.
    """
    if not path.exists():
        torch.manual_seed(0)
        classifier, targets = Classifier(images.shape[-1]), torch.from_numpy(labels.astype(np.int64))
        for step in optimize(classifier, steps, learning_rate=3e-3):
            chosen = torch.randint(len(images), (64,))
            _, logits = classifier(torch.from_numpy(images[chosen.numpy()]).float().unsqueeze(1))
            step(F.cross_entropy(logits, targets[chosen]))
        temporary = path.with_name(f".{path.name}")
        torch.jit.script(classifier.eval()).save(str(temporary))
        temporary.replace(path)
    return torch.jit.load(str(path)).eval()


@torch.no_grad()
def accuracy(classifier: torch.nn.Module, images: np.ndarray, labels: np.ndarray) -> float:
    """The share of grey images, uint8 (N, side, side), whose label the classifier predicts."""
    _, logits = classifier(torch.from_numpy(images.copy()).float().unsqueeze(1))
    return (logits.argmax(-1).numpy() == labels).mean().item()
