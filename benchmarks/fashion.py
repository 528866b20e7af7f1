# Copyright 2026 The LIFT and PLACE distillation authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Fashion-MNIST (Xiao et al., 2017) as captioned image folders, and the parts of a pipeline trained on it.

An autoencoder, a tokenizer and a text encoder, each trained on a CPU in a minute or less and saved by
`save_pretrained`: what the training scripts take as given in a latent text-to-image model. A part that its folder
already holds is loaded instead. benchmarks/fashion_sd21.py shows their use.
"""

import gzip
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image


sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lift_utils import fail


CLASSES = ["t-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]
DEBIAN = "dataset-fashion-mnist"  # the Debian package, 30 MB
INSTALLED = Path("/usr/share/datasets/fashion-mnist")


# ------------------------------------------------------------------------------------------------------------ the data


def find_fashion_mnist(cache: Path) -> Path:
    """The folder of the four gzipped files: Debian's, installed or unpacked into `cache`, which needs no root."""
    unpacked = cache / INSTALLED.relative_to("/")
    for folder in (INSTALLED, unpacked):
        if (folder / "t10k-labels-idx1-ubyte.gz").exists():
            return folder
    cache.mkdir(parents=True, exist_ok=True)
    try:
        subprocess.run(["apt-get", "download", DEBIAN], cwd=cache, check=True, capture_output=True)
        package = next(cache.glob(f"{DEBIAN}_*.deb"))
        subprocess.run(["dpkg", "-x", package, cache], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError, StopIteration) as error:
        fail(
            f"Fashion-MNIST is not at hand and apt-get cannot fetch it ({error}); install Debian's {DEBIAN}, or put "
            f"the four .gz files of github.com/zalandoresearch/fashion-mnist into {unpacked}"
        )
    return unpacked


def read_fashion_mnist(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images, uint8 (N, 28, 28), and labels (N,) of the split "train" or "t10k", from the IDX files."""

    def read(name: str, header: int) -> np.ndarray:
        with gzip.open(folder / f"{split}-{name}-ubyte.gz") as file:
            return np.frombuffer(file.read(), np.uint8, offset=header)

    return read("images-idx3", 16).reshape(-1, 28, 28), read("labels-idx1", 8)


def caption(label: int, image: np.ndarray) -> str:
    """A caption that says what can be seen: the class, and whether it is dark or bright."""
    tone = "bright" if image[image > 32].mean() > 150 else "dark"
    return f"a photo of a {tone} {CLASSES[label]}"


def pad(images: np.ndarray, side: int = 32) -> np.ndarray:
    """The 28 pixels centred on black, uint8 (N, side, side)."""
    margin = (side - 28) // 2
    return np.pad(images, ((0, 0), (margin, margin), (margin, margin)))


def write_captioned(folder: Path, images: np.ndarray, labels: np.ndarray, side: int = 32) -> Path:
    """An image folder with captions in metadata.jsonl: RGB PNGs, the 28 pixels centred on black."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for index, (pixels, label) in enumerate(zip(images, labels)):
        Image.fromarray(pad(pixels[None], side)[0]).convert("RGB").save(folder / f"{index:05d}.png")
        lines.append(json.dumps({"file_name": f"{index:05d}.png", "text": caption(label, pixels)}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


# ----------------------------------------------------------------------------------------------------------- the parts


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


def save_whole(model, folder: Path) -> None:
    """`model.save_pretrained(folder)`, whole or not at all."""
    temporary = folder.with_name(f".{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
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
    save_whole(vae, folder)
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


def train_text_encoder(
    folder: Path,
    images: np.ndarray,
    captions: list[str],
    tokenizer,
    steps: int = 400,
    seed: int = 0,
    width: int = 64,
    projection: bool = False,
):
    """A CLIP text encoder of two layers, trained with an image encoder on the pairs unless the folder holds it.

    The contrastive loss of CLIP (Radford et al., 2021), but for captions that several images of a batch share: these
    images are all right for it. The image encoder is dropped.

    Args:
        images: Grey, uint8 (N, H, W); `captions` has one for each.
        projection: Make a CLIPTextModelWithProjection, as Stable Diffusion 3 has them, instead of a CLIPTextModel.
    """
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    kind = CLIPTextModelWithProjection if projection else CLIPTextModel
    if folder.exists():
        return kind.from_pretrained(folder).eval()
    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        projection_dim=width,
        intermediate_size=4 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    text_encoder = kind(config)
    seen = torch.nn.Sequential(
        *(torch.nn.Conv2d(3, 16, 3, stride=2, padding=1), torch.nn.ReLU()),
        *(torch.nn.Conv2d(16, 32, 3, stride=2, padding=1), torch.nn.ReLU()),
        *(torch.nn.Conv2d(32, 64, 3, stride=2, padding=1), torch.nn.ReLU()),
        *(torch.nn.Flatten(), torch.nn.LazyLinear(width)),
    )
    seen(as_inputs(images[:1]))  # shapes the last layer
    # What compares the two: CLIP's learned temperature, and a projection unless the text encoder has one.
    compare = torch.nn.Linear(1 if projection else width, width, bias=False)
    temperature = torch.nn.Parameter(torch.tensor(2.0))
    parts = torch.nn.ModuleList([text_encoder, seen, compare, torch.nn.ParameterList([temperature])])
    ids = tokenizer(
        captions, padding="max_length", truncation=True, max_length=tokenizer.model_max_length, return_tensors="pt"
    )["input_ids"]
    for step in optimize(parts, steps, learning_rate=2e-3):
        chosen = torch.randint(len(images), (64,))
        output = text_encoder(ids[chosen])
        texts = output.text_embeds if projection else compare(output.pooler_output)
        pictures = seen(as_inputs(images[chosen.numpy()]))
        logits = temperature.exp() * F.normalize(texts, dim=-1) @ F.normalize(pictures, dim=-1).T
        same = (ids[chosen][:, None] == ids[chosen]).all(-1).float()
        targets = same / same.sum(-1, keepdim=True)
        step((F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2)
    text_encoder.eval()
    save_whole(text_encoder, folder)
    return text_encoder


def save_sd_pipeline(folder: Path, vae, text_encoder, tokenizer, seed: int = 0, **unet) -> Path:
    """A StableDiffusionPipeline of these parts and a random U-Net in the four-level layout of Stable Diffusion.

    Args:
        unet: Overrides of the U-Net's config.
    """
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    if folder.exists():
        return folder
    torch.manual_seed(seed)
    config = {
        "sample_size": vae.config.sample_size // 2 ** (len(vae.config.block_out_channels) - 1),
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
    model = UNet2DConditionModel(**config, **unet)
    pipeline = StableDiffusionPipeline(
        vae, text_encoder, tokenizer, model, scheduler, None, None, requires_safety_checker=False
    )
    save_whole(pipeline, folder)
    return folder


def save_sd3_pipeline(folder: Path, vae, text_encoder, tokenizer, seed: int = 0, **transformer) -> Path:
    """A StableDiffusion3Pipeline of these parts and a random MMDiT; it has no T5.

    Diffusers takes string prompts with both CLIP encoders only, so the one encoder stands in both places.

    Args:
        text_encoder: A CLIPTextModelWithProjection.
        transformer: Overrides of the MMDiT's config.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    if folder.exists():
        return folder
    torch.manual_seed(seed)
    config = {
        "sample_size": vae.config.sample_size // 2 ** (len(vae.config.block_out_channels) - 1),
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
    model = SD3Transformer2DModel(**{**config, **transformer})
    vae.register_to_config(shift_factor=0.0)  # the pipeline adds it, and fails without
    clip = (text_encoder, tokenizer)
    pipeline = StableDiffusion3Pipeline(model, FlowMatchEulerDiscreteScheduler(), vae, *clip, *clip, None, None)
    save_whole(pipeline, folder)
    return folder


# ------------------------------------------------------------------------------------------------------ the classifier

FEATURES = 32  # few, so that a covariance from some hundred samples is well conditioned


class Classifier(torch.nn.Module):
    """Ten logits and, before the last layer, the features in which images are compared."""

    def __init__(self, side: int = 32):
        super().__init__()
        self.body = torch.nn.Sequential(
            *(torch.nn.Conv2d(1, 16, 3, padding=1), torch.nn.ReLU(), torch.nn.MaxPool2d(2)),
            *(torch.nn.Conv2d(16, 32, 3, padding=1), torch.nn.ReLU(), torch.nn.MaxPool2d(2)),
            *(torch.nn.Flatten(), torch.nn.Linear(32 * (side // 4) ** 2, FEATURES)),
        )
        self.head = torch.nn.Linear(FEATURES, len(CLASSES))

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.body(images)
        return self.head(F.relu(features)), features


@torch.no_grad()
def classify(classifier: Classifier, images: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Classes (N,) and features (N, FEATURES) of grey uint8 images (N, H, W)."""
    parts = [classifier(as_inputs(batch)[:, :1]) for batch in np.array_split(images, -(-len(images) // 500))]
    logits, features = (torch.cat(part) for part in zip(*parts))
    return logits.argmax(-1), features


def train_classifier(path: Path, images: np.ndarray, labels: np.ndarray, steps: int = 1000, seed: int = 0):
    """A classifier of grey uint8 images (N, H, W), trained unless the .safetensors file holds it."""
    from safetensors.torch import load_file, save_file

    torch.manual_seed(seed)
    classifier = Classifier(images.shape[-1])
    if path.exists():
        classifier.load_state_dict(load_file(path))
        return classifier.eval()
    targets = torch.from_numpy(labels.astype(np.int64))
    for step in optimize(classifier, steps, learning_rate=3e-3):
        chosen = torch.randint(len(images), (64,))
        step(F.cross_entropy(classifier(as_inputs(images[chosen.numpy()])[:, :1])[0], targets[chosen]))
    temporary = path.with_name(f".{path.name}")
    save_file(classifier.state_dict(), temporary)
    temporary.replace(path)
    return classifier.eval()
