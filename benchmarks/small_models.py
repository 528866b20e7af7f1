# Copyright 2026 The LIFT and PLACE distillation authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""The parts of a pipeline, small enough to train on a CPU in a minute or less, saved by `save_pretrained`.

An autoencoder, a tokenizer and CLIP: what the training scripts take as given in a latent text-to-image model. What is
there already is loaded instead. fashion_sd21.py shows their use.
"""

import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lift_utils import vae_factor


def make_tokenizer(words: list[str], length: int):
    """A CLIPTokenizer that knows these words whole and spells all others."""
    from transformers import CLIPTokenizer

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
    """Grey uint8 images (N, H, W) as a model takes them: float32 (N, 3, H, W) in [-1, 1]."""
    return (torch.from_numpy(images).float() / 127.5 - 1)[:, None].expand(-1, 3, -1, -1)


def optimize(model: torch.nn.Module, steps: int, learning_rate: float) -> Iterator[Callable[[torch.Tensor], None]]:
    """Yields once a step what takes the step, given the loss: AdamW, its rate warming up and falling to zero."""
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


def save_whole(folder: Path, *parts) -> None:
    """`part.save_pretrained(folder)` of all parts, whole or not at all."""
    temporary = folder.with_name(f".{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    for part in parts:
        part.save_pretrained(temporary)
    temporary.rename(folder)


def train_autoencoder(
    folder: Path,
    images: np.ndarray,
    steps: int = 1000,
    seed: int = 0,
    channels: tuple[int, ...] = (16, 32, 32),
    latent_channels: int = 4,
    batch_size: int = 32,
):
    """An AutoencoderKL that halves the sides once per level but the first, trained unless the folder holds it.

    Squared error plus a little of the divergence from a normal distribution, neither perceptual nor adversarial. On
    1,000 of the images the latents' mean is taken off by the layers at the latents, and the config's `scaling_factor`
    is one over their standard deviation.

    Args:
        images: Grey, uint8 (N, H, W).
    """
    from diffusers import AutoencoderKL

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
        step(error + 1e-4 * latents.kl().mean() / latents.mean[0].numel())
    centre_latents(vae.eval(), as_inputs(images[:1000]))
    save_whole(folder, vae)
    return vae


@torch.no_grad()
def centre_latents(vae, images: torch.Tensor) -> None:
    """Give the latents of these images a mean of 0 in every channel, undone before the decoder, and set their scale.

    Stable Diffusion's pipeline scales latents and does not shift them.
    """
    latents = vae.encode(images).latent_dist.sample()
    mean = latents.mean((0, 2, 3))
    vae.quant_conv.bias[: len(mean)] -= mean
    vae.post_quant_conv.bias += vae.post_quant_conv.weight[:, :, 0, 0] @ mean
    vae.register_to_config(scaling_factor=round(1 / (latents - mean[:, None, None]).std().item(), 5))


@torch.no_grad()
def reconstruct(vae, images: np.ndarray) -> np.ndarray:
    """Grey uint8 images (N, H, W), encoded and decoded."""
    decoded = vae.decode(vae.encode(as_inputs(images)).latent_dist.mode()).sample
    return ((decoded.mean(1).clamp(-1, 1) + 1) * 127.5).round().byte().numpy()


def train_clip(
    folder: Path,
    images: np.ndarray,
    captions: list[str],
    tokenizer,
    steps: int = 400,
    seed: int = 0,
    width: int = 64,
) -> Path:
    """A CLIPModel folder, two layers to each encoder, trained on the pairs unless it is there.

    The contrastive loss of CLIP (Radford et al., 2021), but for captions that several images of a batch share: these
    images are all right for it. Text encoders of pipelines load from the folder as they do from OpenAI's.

    Args:
        images: Grey, uint8 (N, side, side), the side a multiple of 8; `captions` has one for each.
    """
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

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
        found = clip(input_ids=ids[chosen], pixel_values=as_inputs(images[chosen.numpy()]))
        same = (ids[chosen][:, None] == ids[chosen]).all(-1).float()
        targets = same / same.sum(-1, keepdim=True)
        pairs = (found.logits_per_text, found.logits_per_image)
        step(sum(F.cross_entropy(logits, targets) for logits in pairs) / 2)
    grey = [0.5] * 3  # [0, 1] to [-1, 1], as `as_inputs`
    processor = CLIPImageProcessor(size={"shortest_edge": side}, crop_size=side, image_mean=grey, image_std=grey)
    save_whole(folder, clip.eval(), processor, tokenizer)
    return folder


def save_sd_pipeline(folder: Path, vae, text_encoder, tokenizer) -> Path:
    """A StableDiffusionPipeline of these parts and a random U-Net in the four-level layout of Stable Diffusion."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    if folder.exists():
        return folder
    torch.manual_seed(0)
    config = {
        "sample_size": vae.config.sample_size // vae_factor(vae),
        "in_channels": vae.config.latent_channels,
        "out_channels": vae.config.latent_channels,
        "block_out_channels": [32, 64, 96, 96],
        "attention_head_dim": [2, 4, 6, 6],  # heads, in fact
        "norm_num_groups": 8,
        "cross_attention_dim": text_encoder.config.hidden_size,
        "use_linear_projection": True,
    }
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
    )
    model = UNet2DConditionModel(**config)
    pipeline = StableDiffusionPipeline(
        vae, text_encoder, tokenizer, model, scheduler, None, None, requires_safety_checker=False
    )
    save_whole(folder, pipeline)
    return folder


def save_sd3_pipeline(folder: Path, vae, text_encoder, tokenizer) -> Path:
    """A StableDiffusion3Pipeline of these parts and a random MMDiT; it has no T5.

    Diffusers takes string prompts with both CLIP encoders only, so the one encoder stands in both places.

    Args:
        text_encoder: A CLIPTextModelWithProjection.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

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
    vae.register_to_config(shift_factor=0.0)  # the pipeline adds it, and fails without
    clip = (text_encoder, tokenizer)
    pipeline = StableDiffusion3Pipeline(model, FlowMatchEulerDiscreteScheduler(), vae, *clip, *clip, None, None)
    save_whole(folder, pipeline)
    return folder


FEATURES = 32  # few, so that a covariance from some hundred samples is well conditioned


class Classifier(torch.nn.Module):
    """Features and ten logits of images as eval/evaluate.py hands them over: float32 (N, 3, side, side) in [0, 255].

    All three channels of a grey image are the same: it looks at the first. Over the images it was trained on, each
    feature has about mean 0 and variance 1.
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
    """What `evaluate.py --features` takes, trained unless the file is there.

    Args:
        images: Grey, uint8 (N, side, side); `labels` (N,) are 0 to 9.
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
    """Share of grey uint8 images (N, side, side) whose label the classifier finds."""
    _, logits = classifier(torch.from_numpy(images.copy()).float().unsqueeze(1))
    return (logits.argmax(-1).numpy() == labels).mean().item()
