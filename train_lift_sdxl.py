# Copyright 2026 The LIFT and PLACE distillation authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Distil Stable Diffusion XL (UNet2DConditionModel) into a smaller latent U-Net with LIFT and PLACE.

The student is the teacher's config with fewer or narrower blocks, filled with the teacher's. It learns from images
with captions, from the teacher's prediction and from the teacher's block outputs. The folder that comes out is a whole
pipeline: `StableDiffusionXLPipeline.from_pretrained`. A student of the shape of KOALA-700M, on a GPU:

    accelerate launch --mixed_precision fp16 train_lift_sdxl.py --student koala_700m --train_data_dir images \\
        --vae madebyollin/sdxl-vae-fp16-fix --cache_latents --use_8bit_adam --gradient_checkpointing \\
        --output_dir sdxl-koala-700m

`images` holds pictures and a metadata.jsonl with a line {"file_name": "a.jpg", "text": "a caption"} for each, or
beside each a.jpg a file a.txt with its caption. The U-Net is told the size of each picture and where it was cropped,
as in Diffusers' script for SDXL. The teacher's scheduler says whether the models predict noise or velocity.

On a CPU, in minutes: demos/fashion_sdxl.py trains a small autoencoder, two text encoders and a teacher for images of
32 pixels, and distils it with this script.
"""

import argparse
import copy
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
from common.images import choose_size, covering_size, fit_image, flip_rows, flip_views, open_image, random_flips
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
    freeze,
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
from common.vae import identify_vae, load_vae

import datasets
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import recursively_apply, send_to_device
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DiffusionPipeline,
    SchedulerMixin,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.training_utils import EMAModel
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from lift_utils import FeatureModel, KDLoss, make_kd_loss, prediction_error


logger = get_logger(__name__)

TEACHER = "stabilityai/stable-diffusion-xl-base-1.0"
EXPECTED = f"pass a Stable Diffusion XL pipeline: a folder, or a Hub id such as {TEACHER}"
CONVERTER = "StableDiffusionXLPipeline"  # of a teacher in a single file
PARTS = {  # of the pipeline, and their classes where no other will do
    "unet": "UNet2DConditionModel",
    "vae": "AutoencoderKL",
    "text_encoder": "CLIPTextModel",
    "text_encoder_2": "CLIPTextModelWithProjection",
    "tokenizer": None,
    "tokenizer_2": None,
    "scheduler": None,
}
TEXT_ENCODERS = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}


def thinned_student(depths: list[int | list[int]], up_depths: list[list[int]]) -> dict:
    """A student in the manner of SSD-1B (Gupta et al., 2024): all residual layers but one, fewer transformer blocks.

    A transformer keeps its first blocks; of the middle block the first residual layer is left.

    Args:
        depths: Transformer blocks of each down block, or of each of its transformers.
        up_depths: Those of the up blocks, from the inside out.
    """
    config = {"transformer_layers_per_block": depths, "reverse_transformer_layers_per_block": up_depths}
    return {"config": config | {"mid_block_type": "UNetMidBlock2D"}}


def koala_student(depths: list[int], mid: bool = False) -> dict:
    """A student in the manner of KOALA (Lee et al., NeurIPS 2024): the outer levels, a layer less in each block.

    Each down block keeps the first of two pairs of a residual layer and a transformer, each up block two of three, the
    last of them the teacher's third. A transformer keeps its first blocks. `mid` keeps the middle block.

    Args:
        depths: Transformer blocks of each transformer, by level. Of two levels the innermost first pair comes from the
            teacher's second, which has inputs of the right width.
    """
    levels, offset = len(depths), 3 - len(depths)
    blocks = {name: name for name in ("conv_in", "time_embedding", "add_embedding", "conv_norm_out", "conv_out")}
    features = []
    for level in range(levels):
        down, up, source = f"down_blocks.{level}", f"up_blocks.{level}", f"up_blocks.{level + offset}"
        layers = ["resnets", "attentions"]
        for layer in layers if level > 0 else layers[:1]:
            blocks[f"{down}.{layer}.0"] = f"{down}.{layer}.0"
        for layer in layers if level < levels - 1 else layers[:1]:
            first = 1 if offset and level == 0 else 0
            blocks |= {f"{up}.{layer}.0": f"{source}.{layer}.{first}", f"{up}.{layer}.1": f"{source}.{layer}.2"}
        if level < levels - 1:
            blocks |= {f"{down}.downsamplers": f"{down}.downsamplers", f"{up}.upsamplers": f"{source}.upsamplers"}
            features.append([down, down])
        elif offset:  # the teacher's block goes on to downsample
            features.append([f"{down}.attentions.0.proj_out", f"{down}.attentions.1.proj_out"])
        else:
            features.append([down, down])
        features.append([up, source])
    config = {"layers_per_block": 1, "transformer_layers_per_block": depths}
    config["reverse_transformer_layers_per_block"] = None  # which a teacher like SSD-1B has
    if mid:
        blocks["mid_block"] = "mid_block"
        features.append(["mid_block", "mid_block"])
    else:
        config["mid_block_type"] = None
    return {"levels": levels, "config": config, "blocks": blocks, "features": features}


# A preset says what a JSON file says: {"levels": outer levels kept, "width": fraction, "config": {overrides},
# "blocks": {...}, "features": [...]}. Of SDXL's 2,567M they keep 1,331M, 745M, 1,161M, 783M, 84M, 226M and all.
STUDENTS = {
    "ssd_1b": thinned_student([1, [2, 2], [4, 4]], [[4, 4, 10], [2, 1, 1], 1]),
    "vega": thinned_student([1, [1, 1], [2, 2]], [[2, 2, 2], [1, 1, 1], 1]),
    "koala_1b": koala_student([1, 2, 6], mid=True),
    "koala_700m": koala_student([1, 2, 5]),
    "extreme": koala_student([1, 1]),
    "width_80": {"width": 80 / 320},
    "whole": {},
}

# The published recipe of SD 2.1-base, for want of one for SDXL: the defaults of shared flags.
RECIPE = {
    "output_dir": "lift-sdxl",
    "gradient_accumulation_steps": 32,
    "adam_weight_decay": 1e-2,
    "encoding_batch_size": 4,
    "num_inference_steps": 25,
    "guidance_scale": 5.0,
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
    group.add_argument("--pretrained_teacher_model", default=TEACHER, help="Stable Diffusion XL: a folder or a Hub id")
    group.add_argument(
        "--vae",
        help="another VAE: a folder or a Hub id, such as madebyollin/sdxl-vae-fp16-fix (default: the teacher's)",
    )
    group.add_argument("--student", default="koala_700m", help=f"{', '.join(STUDENTS)}, or a JSON file")
    group.add_argument(
        "--student_init",
        default="teacher",
        choices=("teacher", "random"),
        help="take the teacher's blocks, or for narrower students its channels of largest weights; or start fresh",
    )

    groups["data"].add_argument(
        "--cache_latents", action="store_true", help="run the VAE and the text encoders once, before the training"
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
    sampler = find_sampler(source, check_parts(source, PARTS)["scheduler"])
    return sampler, load_noise_schedule(source, sampler)


def check_teacher(teacher: UNet2DConditionModel, vae: AutoencoderKL, source: TeacherSource) -> None:
    """Refuse teachers that take other inputs than SDXL's, or give more than a prediction."""
    config, latents = teacher.config, vae.config.latent_channels
    inputs = "class_embed_type", "num_class_embeds", "time_cond_proj_dim"
    extra = [key for key in inputs if config[key] is not None]
    if extra or config.addition_embed_type != "text_time":
        what = f"has {extra[0]}" if extra else "does not take the size of an image (text_time)"
        fail(f"--pretrained_teacher_model {source.path}: its U-Net {what}; {source.expected}")
    if config.in_channels != latents or config.out_channels != latents:
        what = f"maps {config.in_channels} channels to {config.out_channels}, and not {latents} to {latents}"
        fail(f"--pretrained_teacher_model {source.path}: its U-Net {what}; {source.expected}")
    if vae.config.get("latents_mean") is not None:
        remedy = "pass --vae, the folder or Hub id of another, such as madebyollin/sdxl-vae-fp16-fix"
        fail(f"--pretrained_teacher_model {source.path}: its VAE has latents_mean, which has no effect here; {remedy}")
    texts = [load_from(source, CLIPTextConfig.from_pretrained, subfolder=name) for name in TEXT_ENCODERS]
    widths = sum(text.hidden_size for text in texts), texts[1].projection_dim
    if widths != (config.cross_attention_dim, pooled_width(teacher)):
        what = f"takes embeddings of {config.cross_attention_dim} and pooled ones of {pooled_width(teacher)}"
        what += f", its text encoders give {widths[0]} and {widths[1]}"
        fail(f"--pretrained_teacher_model {source.path}: its U-Net {what}; {source.expected}")


def pooled_width(unet: UNet2DConditionModel) -> int:
    """The width of the pooled text embeddings that a U-Net takes beside the six numbers of an image's size."""
    return unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim


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
        config |= {"transformer_layers_per_block": config["transformer_layers_per_block"][:levels]}
        if config.get("reverse_transformer_layers_per_block"):  # of the up blocks, from the innermost on
            outer = config["reverse_transformer_layers_per_block"][-levels:]
            config |= {"reverse_transformer_layers_per_block": outer}
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
    conditions = "cross_attention_dim", "projection_class_embeddings_input_dim"
    conditions += "addition_embed_type", "addition_time_embed_dim"
    for key in ("in_channels", "out_channels", *conditions):
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
    inputs = example_inputs(teacher, side=2 ** len(teacher.config.block_out_channels))
    prune_width(student, teacher, recursively_apply(torch.zeros_like, inputs, device="cpu"))


def example_inputs(unet: UNet2DConditionModel, side: int | None = None) -> dict[str, Any]:
    """Arguments of the U-Net's forward pass on one image, on the meta device.

    Args:
        side: Of the latents (default: the U-Net's).
    """
    side = side or unet.config.sample_size
    with torch.device("meta"):
        return {
            "sample": torch.zeros(1, unet.config.in_channels, side, side),
            "timestep": torch.zeros(1),
            "encoder_hidden_states": torch.zeros(1, 77, unet.config.cross_attention_dim),
            "added_cond_kwargs": {"text_embeds": torch.zeros(1, pooled_width(unet)), "time_ids": torch.zeros(1, 6)},
        }


# ------------------------------------------------------------------------------------------------------------ the data


def make_dataset(
    args: argparse.Namespace, tokenizers: list[CLIPTokenizer]
) -> tuple[datasets.Dataset | StreamedDataset, dict[str, Any]]:
    """A dataset of `{"images": uint8 (3, H, W), "time_ids": (6,), "input_ids": (2, 77)}` of the images that will do.

    Returns:
        The dataset, and what distinguishes its contents from others'; its "buckets" are those of [`sort_by_bucket`].
    """
    size = args.aspect_ratio_buckets or args.resolution
    columns = {"image_column": args.image_column, "caption_column": args.caption_column}
    folders = args.dataset_name, args.dataset_config_name, args.train_data_dir, args.cache_dir
    load = partial(load_examples, **columns, size=size, tokenizers=tokenizers)
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

    report_long_captions(dataset[args.caption_column], {"text_encoder": tokenizers[0]})
    return dataset.with_transform(load), contents


def load_examples(
    batch: dict[str, list],
    image_column: str,
    caption_column: str,
    size: int | list[tuple[int, int]],
    tokenizers: list[CLIPTokenizer],
) -> dict[str, list[torch.Tensor]]:
    """Decode, resize and crop the centre, see [`fit_image`]; tokenize."""
    images = [open_image(record, "RGB") for record in batch[image_column]]
    return {
        "images": [pil_to_tensor(fit_image(image, size)) for image in images],
        "time_ids": [make_time_ids(image.height, image.width, size) for image in images],
        "input_ids": list(tokenize(tokenizers, batch[caption_column])),
    }


def make_time_ids(height: int, width: int, size: int | list[tuple[int, int]]) -> torch.Tensor:
    """What SDXL is told of an image, (6,): its size, the corner of the crop, and the size that it is trained with.

    The corner is that of the resized image, as in Diffusers' script for SDXL. Heights come before widths.

    Args:
        height: Of the image as it is stored, in pixels.
        width: Likewise.
        size: Of the training images, see [`fit_image`].
    """
    chosen = choose_size(height, width, size)
    corner = [round((whole - kept) / 2) for whole, kept in zip(covering_size(height, width, chosen), chosen)]
    return torch.tensor([height, width, *corner, *chosen], dtype=torch.float32)


def load_tokenizers(source: TeacherSource) -> list[CLIPTokenizer]:
    """The teacher's tokenizers; one whose files are missing loads all the same, without words and without a limit."""
    tokenizers = [load_part(source, CLIPTokenizer, name) for name in ("tokenizer", "tokenizer_2")]
    if any(tokenizer.model_max_length > 1_000_000 for tokenizer in tokenizers):
        fail(f"--pretrained_teacher_model {source.path} lacks files of its tokenizers; {source.expected}")
    return tokenizers


def tokenize(tokenizers: list[CLIPTokenizer], captions: list[str]) -> torch.Tensor:
    """Each tokenizer's ids, (B, 2, 77), padded and cut to its length."""
    padded = [
        tokenizer(
            captions, padding="max_length", truncation=True, max_length=tokenizer.model_max_length, return_tensors="pt"
        )["input_ids"]
        for tokenizer in tokenizers
    ]
    return torch.stack(padded, dim=1)


def vae_dtype(vae: AutoencoderKL, dtype: torch.dtype) -> torch.dtype:
    """What the VAE computes in. SDXL's own overflows in float16."""
    return torch.float32 if dtype == torch.float16 and vae.config.force_upcast else dtype


class Encoders:
    """The frozen VAE, if asked for, and text encoders, in the precision of the run, on its device."""

    def __init__(self, source: TeacherSource, vae: AutoencoderKL | None, device: torch.device, dtype: torch.dtype):
        self.device, self.vae = device, None
        if vae is not None:
            self.vae = freeze(copy.deepcopy(vae), device, vae_dtype(vae, dtype))
        self.models = [load_frozen(source, kind, name, device, dtype) for name, kind in TEXT_ENCODERS.items()]

    @torch.no_grad()
    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        """Mean and standard deviation of the scaled latents, (B, 2, C, h, w), of uint8 images (B, 3, H, W)."""
        images = (images.to(self.device).float() / 127.5 - 1).to(self.vae.dtype)
        latents = self.vae.encode(images).latent_dist
        return torch.stack([latents.mean, latents.std], dim=1) * self.vae.config.scaling_factor

    @torch.no_grad()
    def encode_text(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """Embeddings "text", (B, 77, D), and "pooled" ones, (B, P), of token ids (B, 2, 77)."""
        ids = input_ids.to(self.device).unbind(1)
        outputs = [model(each, output_hidden_states=True) for model, each in zip(self.models, ids)]
        text = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        return {"text": text, "pooled": outputs[1].text_embeds}


def blank_first(text: Batch, source: TeacherSource) -> Batch:
    """The embeddings of prompts, the first of which is the empty one, with that as the pipeline has it.

    It is zeros where the pipeline says so, as SDXL's does.
    """
    if not load_from(source, DiffusionPipeline.load_config).get("force_zeros_for_empty_prompt", True):
        return text
    return {name: torch.cat([torch.zeros_like(rows[:1]), rows[1:]]) for name, rows in text.items()}


def encode_dataset(
    dataset: datasets.Dataset,
    prompts: list[str],
    contents: dict[str, Any],
    tokenizers: list[CLIPTokenizer],
    source: TeacherSource,
    vae_path: str | None,
    vae: AutoencoderKL,
    resolution: int,
    random_flip: bool,
    cache: Callable[..., datasets.Dataset],
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[datasets.Dataset, dict[str, torch.Tensor]]:
    """The dataset as `{"moments": (flips, 2, C, h, w), "time_ids": (6,), "text": (77, D), "pooled": (P,)}`.

    The VAE and the text encoders run once; they are freed before this returns.

    Args:
        contents: What distinguishes the dataset's contents from others'.
        vae_path: Of the VAE, `None` for the teacher's.
        vae: In float32 on the CPU.
        cache: [`cache_encodings`] with all but the data, the encoders and the key.

    Returns:
        The dataset, and the "text" and "pooled" embeddings of the prompts.
    """

    def load_encoders() -> Callable[[Batch], Batch]:
        encoders = Encoders(source, vae, device, dtype)

        def encode(batch: Batch) -> Batch:
            moments = [encoders.encode_images(view) for view in flip_views(batch["images"], both=random_flip)]
            encoded = {"moments": torch.stack(moments, dim=1), "time_ids": batch["time_ids"]}
            return encoded | encoders.encode_text(batch["input_ids"])

        return encode

    def load_text_encoders() -> Callable[[torch.Tensor], Batch]:
        return Encoders(source, None, device, dtype).encode_text

    texts = [*TEXT_ENCODERS, "tokenizer", "tokenizer_2"]
    key = identify(source.path, source.revision, texts) | {"dtype": str(dtype), "variant": source.variant}
    views = {"resolution": resolution, "crop": "centre", "both flips": random_flip}
    encoded = cache(dataset, load_encoders, {**key, "vae": identify_vae(source, vae_path), **views, **contents})
    text = cache(tokenize(tokenizers, prompts), load_text_encoders, {**key, "prompts": prompts})
    return encoded, {name: torch.stack(list(rows)) for name, rows in text[:].items()}


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


def encode_batch(batch: Batch, encoders: Encoders | None, flips: torch.Tensor) -> tuple[torch.Tensor, Batch]:
    """Moments (B, 2, C, h, w) and text embeddings of a batch, cached or computed now; flipped or not."""
    if encoders is None:
        return batch["moments"][torch.arange(len(flips), device=flips.device), flips.long()], batch
    return encoders.encode_images(flip_rows(batch["images"], flips)), encoders.encode_text(batch["input_ids"])


def make_inputs(
    batch: Batch,
    scheduler: DDPMScheduler,
    encoders: Encoders | None,
    no_text: Batch,
    draw: Callable[..., dict[str, torch.Tensor]],
) -> tuple[dict[str, Any], torch.Tensor]:
    """A model's inputs, and what it must predict on them, (B, C, h, w).

    Args:
        batch: With "time_ids", (B, 6), and "images", uint8, (B, 3, H, W), and "input_ids", (B, 2, 77); or with cached
            "moments", (B, flips, 2, C, h, w), "text", (B, 77, D), and "pooled", (B, P).
        encoders: `None` for a cached batch.
        no_text: The "text" and "pooled" embeddings of no caption, (77, D) and (P,).
        draw: [`make_draws`] with the settings of the run, for a batch that has none.
    """
    rows = batch["moments" if encoders is None else "images"]
    shape = latent_shape(batch, None if encoders is None else encoders.vae)
    draws = batch["draws"] if "draws" in batch else draw(len(rows), rows.device, shape=shape)
    moments, text = encode_batch(batch, encoders, draws["flips"])
    mean, std = moments.float().unbind(1)
    latents = mean + std * draws["vae_noise"]
    noisy, target = add_noise(scheduler, latents, draws["noise"], draws["timesteps"])
    embeddings = torch.where(draws["dropped"][:, None, None], no_text["text"], text["text"])
    pooled = torch.where(draws["dropped"][:, None], no_text["pooled"], text["pooled"])
    inputs = {"sample": noisy, "timestep": draws["timesteps"], "encoder_hidden_states": embeddings}
    return inputs | {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": batch["time_ids"]}}, target


def compute_losses(
    student: FeatureModel,
    teacher: FeatureModel | None,
    batch: Batch,
    progress: float,
    inputs_of: Callable[[Batch], tuple[dict[str, Any], torch.Tensor]],
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
    text: Batch,
    seed: int,
    num_inference_steps: int,
    guidance_scale: float,
    accelerator: Accelerator,
) -> list[Image.Image]:
    """One sample per prompt by the teacher's sampler, from the noise that the seed fixes, the same for every model.

    Args:
        vae: In float32, on the device.
        scheduler: The teacher's.
        text: Embeddings of no caption and of the prompts: "text", (1 + N, 77, D), and "pooled", (1 + N, P).
    """
    count = len(text["text"]) - 1
    mine = share_of(count, accelerator)
    rows = [0, *(1 + row for row in mine)]
    text = {name: given[rows].to(accelerator.device) for name, given in text.items()}
    shape = (count, unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))[mine].to(accelerator.device)
    pipeline = StableDiffusionXLPipeline(vae, None, None, None, None, unet, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    seed_step(seed)  # samplers may draw noise of their own
    with autocast_of(unet, accelerator):
        latents = pipeline(
            prompt_embeds=text["text"][1:],
            negative_prompt_embeds=text["text"][:1].expand(len(mine), -1, -1),
            pooled_prompt_embeds=text["pooled"][1:],
            negative_pooled_prompt_embeds=text["pooled"][:1].expand(len(mine), -1),
            latents=noise,
            num_inference_steps=min(num_inference_steps, scheduler.config.num_train_timesteps),
            guidance_scale=guidance_scale,
            output_type="latent",
        ).images
    latents = latents.float() / vae.config.scaling_factor
    images = torch.cat([vae.decode(image).sample for image in latents.split(1)])  # one by one: decoding takes memory
    return gather_samples(pipeline.image_processor.postprocess(images), count)


def save_pipeline(
    student: UNet2DConditionModel,
    teacher: UNet2DConditionModel,
    vae: AutoencoderKL,
    source: TeacherSource,
    args: argparse.Namespace,
) -> None:
    """The pipeline folder: the student's U-Net, the VAE, the teacher's other parts, model card, grid and curves.

    Args:
        teacher: Its skeleton.
        vae: In float32 on the CPU.
    """
    output_dir = Path(args.output_dir)
    if args.lora_rank:
        student = save_adapter(student, output_dir / "lora", "unet", StableDiffusionXLPipeline)
    pipeline = load_weights(source, DiffusionPipeline, unet=student, vae=vae)
    save_with_variant(pipeline, output_dir, args.save_fp16_variant)

    count, total = student.num_parameters(), teacher.num_parameters()
    facts = [
        f"- Teacher: `{args.pretrained_teacher_model}`, a U-Net of {total:,} parameters.",
        f"- Student: a U-Net of {count:,} parameters, {count / total:.1%} of the teacher's "
        f"(`--student {args.student} --student_init {args.student_init}`).",
        f"- Images of {args.resolution} pixels, {args.caption_dropout:.0%} of the captions dropped.",
    ]
    usage = "from diffusers import StableDiffusionXLPipeline\n\n"
    name = args.hub_model_id or output_dir.resolve().name
    usage += f'image = StableDiffusionXLPipeline.from_pretrained("{name}")("a prompt").images[0]'
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
    dtype = dtype_of(plan.mixed_precision)
    batch = args.encoding_batch_size if args.cache_latents else plan.batch_size
    encoding = estimate_image_encoding(vae, vae_dtype(vae, dtype), args.resolution, batch)
    for name, kind in TEXT_ENCODERS.items():
        config = load_from(source, CLIPTextConfig.from_pretrained, subfolder=name)
        with torch.device("meta"):
            text_encoder = kind(config)
        encoding = together(encoding, estimate_text_encoding(text_encoder, dtype, config.max_position_embeddings))
    if args.cache_latents:
        print(f"beforehand, VAE and text encoders at once, batch {batch}: {encoding.peak / 2**20:,.1f} MiB")
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
    vae = load_vae(source, args.vae, teacher_shape.config.out_channels, skeleton=args.dry_run)
    args.resolution = args.resolution or default_resolution(teacher_shape, vae)
    check_teacher(teacher_shape, vae, source)
    student_shape, recipe = build_student(teacher_shape, vae, args)
    group_size = args.group_size if args.kd_loss == "place" else None
    how = args.resolution, vae_factor(vae), group_size, size_multiple(student_shape, vae)
    args.aspect_ratio_buckets = read_buckets(args.aspect_ratio_buckets, *how)
    if args.dry_run:
        return print_dry_run(student_shape, teacher_shape, vae, recipe, source, args)
    tokenizers = load_tokenizers(source)
    find_weights(source, TEXT_ENCODERS, PARTS)

    # ---- output
    output_dir = prepare_output(args.output_dir, args.resume_from_checkpoint, accelerator.is_main_process)
    if args.push_to_hub and accelerator.is_main_process:
        args.hub_model_id = create_hub_repo(args.hub_model_id, output_dir, args.hub_private_repo)

    # ---- data
    device, dtype = accelerator.device, dtype_of(accelerator.mixed_precision)
    with accelerator.main_process_first():
        dataset, contents = make_dataset(args, tokenizers)
    prompts = args.validation_prompts or first_captions(dataset, args.caption_column)
    workers, encoders = args.dataloader_num_workers, None
    cache = partial(cache_encodings, cache_dir=args.cache_dir, num_workers=workers, accelerator=accelerator)
    if args.cache_latents:
        inputs = dataset, ["", *prompts], contents, tokenizers, source, args.vae, vae, args.resolution
        how = args.random_flip, partial(cache, batch_size=args.encoding_batch_size), device, dtype
        dataset, text = encode_dataset(*inputs, *how)
    else:
        encoders = Encoders(source, vae, device, dtype)
        text = send_to_device(encoders.encode_text(tokenize(tokenizers, ["", *prompts])), "cpu")
    text = blank_first(text, source)

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
    how = {"scheduler": scheduler, "encoders": encoders, "draw": draw}
    how["no_text"] = {name: rows[0].to(device) for name, rows in text.items()}
    inputs_of = partial(make_inputs, **how)
    how = {"text": text, "seed": args.seed, "num_inference_steps": args.num_inference_steps}
    how |= {"scheduler": load_part(source, sampler, "scheduler"), "guidance_scale": args.guidance_scale}
    sample = partial(stop.leave_together(sample_images), **how, accelerator=accelerator)
    teacher_samples, passes = [], args.cache_teacher or 1
    if args.cache_teacher:
        key = contents | {
            "scheduler": public_config(scheduler.config),
            "vae": [identify_vae(source, args.vae), str(dtype)],
            "blank": not text["text"][0].any().item(),  # as model_index.json says
        }
        how = passes, args.seed, args.cache_teacher_dtype, source, [*PARTS], key
        how += partial(cache, batch_size=args.train_batch_size), device, partial(latent_shape, vae=vae)
        dataset = cache_predictions(dataset, teacher, inputs_of, draw, *how)
        with fits_the_gpu("the grid of the teacher's samples", "pass fewer --validation_prompts"):
            teacher_samples, teacher = sample(teacher, vae=copy.deepcopy(vae).to(device)), None
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
    shown = teacher_samples, sample, partial(copy.deepcopy, vae), prompts, output_dir, accelerator
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
        save_pipeline(unet, teacher_shape, vae, source, args)
        if args.push_to_hub:
            push_to_hub(output_dir, args.hub_model_id, stop)
    accelerator.end_training()


if __name__ == "__main__":
    main(parse_args())
