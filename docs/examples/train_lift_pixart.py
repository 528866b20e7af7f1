# Copyright 2026 The LIFT and PLACE distillation authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Distil PixArt-Sigma (PixArtTransformer2DModel) into a shallower transformer with LIFT and PLACE.

An example of docs/adapting.md: train_lift_sd21.py for another pipeline. The student keeps some of the teacher's
blocks. It learns from images with captions, from the teacher's prediction and from the teacher's block outputs. The
folder that comes out is a whole pipeline: `PixArtSigmaPipeline.from_pretrained`. Copy the script beside lift_utils.py
and common/:

    accelerate launch --mixed_precision bf16 train_lift_pixart.py --student half --train_data_dir images \\
        --cache_latents --use_8bit_adam --gradient_checkpointing --output_dir pixart-half

`images` holds pictures and a metadata.jsonl with a line {"file_name": "a.jpg", "text": "a caption"} for each. T5's
attention mask goes with the embeddings, into the cache and into each forward pass. A model with a learned variance has
twice as many output channels as latents: LIFT or PLACE compares the noise, and the variance, which PixArtSigmaPipeline
does not use, follows the teacher's.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

from common.arguments import (
    HelpFormatter,
    add_shared_arguments,
    check_args,
    describe_run,
    plan_run,
    tracked_flags,
)
from common.batches import endless_batches, make_dataloader
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
from common.metrics import MetricsLog, mean_over_processes
from common.pace import Due, count_steps, describe_start
from common.recipes import FEATURES_REMEDY, check_forward, model_errors_end, override_config, pair_blocks, read_recipe
from common.reporting import autocast_of, gather_samples, grid_path, log_validation, share_of
from common.sharding import clip_gradients, gather_model, prepare
from common.streaming import StreamedDataset, add_streaming_arguments, check_streaming
from common.students import (
    check_groups,
    fill_from_blocks,
    match_blocks,
    pair_features,
    public_config,
    spaced_blocks,
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
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SchedulerMixin,
)
from diffusers.training_utils import EMAModel
from PIL import Image
from transformers import T5Config, T5EncoderModel, T5TokenizerFast

from lift_utils import FeatureModel, KDLoss, make_kd_loss, prediction_error


logger = get_logger(__name__)

TEACHER = "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS"
EXPECTED = f"pass a PixArt-Sigma pipeline: a folder, or a Hub id such as {TEACHER}"
PARTS = {  # of the pipeline, and their classes where no other will do
    "transformer": None,
    "vae": "AutoencoderKL",
    "text_encoder": "T5EncoderModel",
    "tokenizer": None,
    "scheduler": None,
}

# A preset is the share of the teacher's blocks that is kept. A JSON file may say {"config": {overrides},
# "blocks": {...}, "features": [...]}.
STUDENTS = {"half": {"share": 1 / 2}, "quarter": {"share": 1 / 4}, "whole": {"share": 1}}

# The published recipe of SD 2.1-base, for want of one for PixArt; sampler and guidance are the pipeline's own.
RECIPE = {
    "output_dir": "lift-pixart",
    "gradient_accumulation_steps": 32,
    "adam_weight_decay": 1e-2,
    "encoding_batch_size": 16,
    "num_inference_steps": 20,
    "guidance_scale": 4.5,
}


# ------------------------------------------------------------------------------------------------------- the arguments


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line (or `input_args`); the defaults are SD 2.1-base's recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    groups = add_shared_arguments(parser)
    add_caption_arguments(groups)
    add_streaming_arguments(groups["data"])

    group = groups["models"]
    group.add_argument("--pretrained_teacher_model", default=TEACHER, help="PixArt-Sigma: a folder or a Hub id")
    group.add_argument("--student", default="half", help=f"{', '.join(STUDENTS)}, or a JSON file")
    group.add_argument(
        "--student_init",
        default="teacher",
        choices=("teacher", "random"),
        help="take the teacher's blocks, or start fresh",
    )

    groups["data"].add_argument(
        "--cache_latents", action="store_true", help="run the VAE and the text encoder once, before the training"
    )
    groups["data"].add_argument("--max_sequence_length", type=int, default=300, help="tokens of a caption for T5")
    group = groups["distillation"]
    group.add_argument("--lambda_kd_feat", type=float, default=1.0, help="weight of the block features")
    group.add_argument("--snr_gamma", type=float, help="weigh timesteps by min-SNR-γ, of which 5 is usual")

    parser.set_defaults(**RECIPE)
    args = parser.parse_args(input_args)
    if args.enable_xformers_memory_efficient_attention and args.max_sequence_length % 8:
        length = f"not --max_sequence_length {args.max_sequence_length}"
        fail(f"--enable_xformers_memory_efficient_attention takes masks of a multiple of 8 tokens, {length}; drop it")
    check_args(args)
    check_streaming(vars(args))
    if args.lora_rank:
        fail(f"--lora_rank {args.lora_rank} is for pipelines that load LoRA, which PixArt's does not; drop it")
    if args.aspect_ratio_buckets:
        given = f"--aspect_ratio_buckets {args.aspect_ratio_buckets}"
        fail(f"{given} is for models whose positions are of any size, and PixArt's are of one; drop it")
    args.validation_prompts = read_prompts(args.validation_prompts)
    return args


# ---------------------------------------------------------------------------------------------------------- the models


def check_pipeline(source: TeacherSource) -> tuple[type[SchedulerMixin], DDPMScheduler]:
    """Refuse pipelines that this script does not distil; returns the sampler's class and the noise schedule."""
    kinds = check_parts(source, PARTS)
    if kinds["transformer"] not in ("PixArtTransformer2DModel", "Transformer2DModel"):  # the second is its old name
        fail(f"--pretrained_teacher_model {source.path} has a {kinds['transformer']}; {source.expected}")
    sampler = find_sampler(source, kinds["scheduler"])
    return sampler, load_noise_schedule(source, sampler)


def check_teacher(
    teacher: PixArtTransformer2DModel, vae: AutoencoderKL, resolution: int, source: TeacherSource
) -> None:
    """Refuse teachers that take more than noisy latents and a caption, and images of another size than theirs."""
    config, latents = teacher.config, vae.config.latent_channels
    width = load_from(source, T5Config.from_pretrained, subfolder="text_encoder").d_model
    fits = config.in_channels == latents and config.out_channels in (latents, 2 * latents)
    fits = fits and config.norm_type == "ada_norm_single"
    if not fits or teacher.use_additional_conditions or config.caption_channels != width:
        what = "takes resolution and aspect ratio (as PixArt-alpha's), or other latents or captions than these"
        fail(f"--pretrained_teacher_model {source.path}: its transformer {what}; {source.expected}")
    side = config.sample_size * vae_factor(vae)
    if resolution != side:
        fail(f"--resolution {resolution} is not the teacher's, whose positions are of {side} pixels; pass {side}")


def depth_recipe(kept: list[int]) -> dict:
    """The recipe of a student whose block i comes from, and is paired with, the teacher's block kept[i]."""
    pairs = [[f"transformer_blocks.{index}", f"transformer_blocks.{block}"] for index, block in enumerate(kept)]
    outside = {name: name for name in ("pos_embed", "adaln_single", "caption_projection", "proj_out")}
    outside["scale_shift_table"] = "scale_shift_table"
    return {"config": {"num_layers": len(kept)}, "blocks": outside | dict(pairs), "features": pairs}


def read_student(student: str, teacher_depth: int) -> dict:
    """The recipe that `--student` names: a preset or a JSON file.

    Args:
        teacher_depth: Blocks of the teacher.
    """
    recipe = read_recipe(student, STUDENTS, ("config", "blocks", "features"))
    if "share" not in recipe:
        return recipe
    return depth_recipe(spaced_blocks(max(1, round(recipe["share"] * teacher_depth)), teacher_depth))


def student_config(teacher_config: dict, recipe: dict) -> dict:
    """The teacher's config with the recipe's overrides."""
    return override_config(PixArtTransformer2DModel, public_config(teacher_config), recipe)


def build_student(
    teacher: PixArtTransformer2DModel, args: argparse.Namespace
) -> tuple[PixArtTransformer2DModel, dict]:
    """The student on the meta device, and its recipe with the pairs of the feature term. All models are skeletons."""
    recipe = read_student(args.student, teacher.config.num_layers)
    mismatch, tokens = f"--student {args.student} does not fit the teacher", args.max_sequence_length
    with model_errors_end(mismatch, "pass another preset, or correct the JSON file"):
        config = student_config(dict(teacher.config), recipe)
        with torch.device("meta"):
            student = PixArtTransformer2DModel.from_config(config)
    for key in ("in_channels", "out_channels", "caption_channels", "sample_size", "patch_size"):
        if student.config[key] != teacher.config[key]:
            fail(f"{mismatch}: its {key} is {student.config[key]}; keep the teacher's {teacher.config[key]}")
    if args.student_init == "teacher":
        with model_errors_end(mismatch, "pass another preset, correct the JSON file, or pass --student_init random"):
            match_blocks(student, teacher.state_dict(), recipe.get("blocks"))
    check_sizes(student, args.group_size if args.kd_loss == "place" else None)
    check_forward(student, example_inputs(student, tokens), mismatch)

    if args.kd_loss == "none" or args.lambda_kd_feat == 0:
        recipe = {**recipe, "features": []}
    if "features" not in recipe:
        recipe = {**recipe, "features": pair_blocks(recipe, student.config.num_layers, teacher.config.num_layers)}
    with model_errors_end(mismatch, FEATURES_REMEDY):
        pair_features(student, teacher, recipe["features"], example_inputs(student, tokens))
    return student, recipe


def check_sizes(student: PixArtTransformer2DModel, group_size: int | None) -> None:
    """Refuse sizes with which no step could be taken.

    Args:
        group_size: Of PLACE, `None` for other losses.
    """
    check_groups(group_size, student.config.sample_size**2)


def fill_student(
    student: PixArtTransformer2DModel, teacher: PixArtTransformer2DModel, recipe: dict, student_init: str
) -> None:
    """Put the teacher's weights into the student as `--student_init` and the recipe say."""
    fill_from_blocks(student, teacher, recipe.get("blocks"), random=student_init == "random")


def example_inputs(transformer: PixArtTransformer2DModel, tokens: int) -> dict[str, torch.Tensor]:
    """Arguments of the transformer's forward pass on one image, on the meta device."""
    config, side = transformer.config, transformer.config.sample_size
    with torch.device("meta"):
        return {
            "hidden_states": torch.zeros(1, config.in_channels, side, side),
            "encoder_hidden_states": torch.zeros(1, tokens, config.caption_channels),
            "timestep": torch.zeros(1),
            "encoder_attention_mask": torch.ones(1, tokens, dtype=torch.long),
        }


# ------------------------------------------------------------------------------------------------------------ the data


def make_dataset(
    args: argparse.Namespace, tokenizer: T5TokenizerFast
) -> tuple[datasets.Dataset | StreamedDataset, dict[str, str]]:
    """A dataset of `{"images": uint8 (3, H, W), "tokens": (2, L)}`, without unreadable or uncaptioned images.

    Returns:
        The dataset, and what distinguishes its contents from others'.
    """
    columns = {"image_column": args.image_column, "caption_column": args.caption_column}
    folders = args.dataset_name, args.dataset_config_name, args.train_data_dir, args.cache_dir
    load = partial(load_examples, **columns, size=args.resolution, tokenizer=tokenizer)
    if args.streaming:
        stream, source = load_images(*folders, columns, streaming=True)
        how = args.image_column, args.max_unreadable, args.seed, args.shuffle_buffer, args.output_dir
        captioned = partial(find_no_caption, caption_column=args.caption_column)
        return StreamedDataset(stream, source, load, *how, captioned), {}
    dataset, source = load_captioned(*folders, columns, args.max_unreadable)
    dataset = choose_samples(dataset, args.max_train_samples, args.seed)
    how = args.max_unreadable, args.dataloader_num_workers, args.resolution
    dataset = drop_unreadable(dataset, args.image_column, source, *how)
    dataset = drop_uncaptioned(dataset, **columns, source=source, max_unreadable=args.max_unreadable)
    contents = {"data": dataset._fingerprint, "image": args.image_column, "caption": args.caption_column}

    report_long_captions(dataset[args.caption_column], {"text_encoder": tokenizer})
    return dataset.with_transform(load), contents


def load_examples(
    batch: dict[str, list], image_column: str, caption_column: str, size: int, tokenizer: T5TokenizerFast
) -> dict[str, list[torch.Tensor]]:
    """Decode, resize the shorter side and crop the centre; tokenize."""
    tokens = list(tokenize(tokenizer, batch[caption_column]))
    return {"images": load_pixels(batch[image_column], "RGB", size), "tokens": tokens}


def load_tokenizer(source: TeacherSource, tokens: int) -> T5TokenizerFast:
    """The teacher's tokenizer, whose `model_max_length` is the number of tokens that T5 gets."""
    tokenizer = load_part(source, T5TokenizerFast, "tokenizer")
    tokenizer.model_max_length = tokens
    return tokenizer


def tokenize(tokenizer: T5TokenizerFast, captions: list[str]) -> torch.Tensor:
    """Token ids and T5's attention mask, (B, 2, L), padded and cut to the tokenizer's length."""
    captions = [caption.lower().strip() for caption in captions]  # as the pipeline does, whatever else it cleans
    padded = tokenizer(
        captions, padding="max_length", truncation=True, max_length=tokenizer.model_max_length, return_tensors="pt"
    )
    return torch.stack([padded["input_ids"], padded["attention_mask"]], dim=1)


class Encoders:
    """The frozen VAE, if asked for, and text encoder, in the precision of the run, on its device."""

    def __init__(self, source: TeacherSource, device: torch.device, dtype: torch.dtype, vae: bool = True):
        self.device = device
        half = dtype == torch.float16  # in which T5 and SDXL's VAE, which is PixArt's, overflow
        self.vae = load_frozen(source, AutoencoderKL, "vae", device, torch.float32 if half else dtype) if vae else None
        safe = torch.bfloat16 if half else dtype
        self.text_encoder = load_frozen(source, T5EncoderModel, "text_encoder", device, safe)

    @torch.no_grad()
    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        """Mean and standard deviation of the scaled latents, (B, 2, C, h, w), of uint8 images (B, 3, H, W)."""
        images = (images.to(self.device).float() / 127.5 - 1).to(self.vae.dtype)
        latents = self.vae.encode(images).latent_dist
        return torch.stack([latents.mean, latents.std], dim=1) * self.vae.config.scaling_factor

    @torch.no_grad()
    def encode_text(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        """Embeddings "text", (B, L, D), and their "mask", (B, L), of token ids and mask (B, 2, L)."""
        ids, mask = tokens.to(self.device).unbind(1)
        return {"text": self.text_encoder(ids, attention_mask=mask)[0], "mask": mask}


def encode_dataset(
    dataset: datasets.Dataset,
    prompts: list[str],
    contents: dict[str, str],
    tokenizer: T5TokenizerFast,
    source: TeacherSource,
    resolution: int,
    random_flip: bool,
    cache: Callable[..., datasets.Dataset],
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[datasets.Dataset, dict[str, torch.Tensor]]:
    """The dataset as `{"moments": (flips, 2, C, h, w), "text": (L, D), "mask": (L,)}`, and the prompts' text and mask.

    The VAE and the text encoder run once; they are freed before this returns.

    Args:
        contents: What distinguishes the dataset's contents from others'.
        cache: [`cache_encodings`] with all but the data, the encoders and the key.
    """

    def load_encoders() -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
        encoders = Encoders(source, device, dtype)

        def encode(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            moments = [encoders.encode_images(view) for view in flip_views(batch["images"], both=random_flip)]
            return {"moments": torch.stack(moments, dim=1), **encoders.encode_text(batch["tokens"])}

        return encode

    def load_text_encoder() -> Callable[[torch.Tensor], dict[str, torch.Tensor]]:
        encoders = Encoders(source, device, dtype, vae=False)
        return encoders.encode_text

    key = identify(source.path, source.revision, ["vae", "text_encoder", "tokenizer"])
    key |= {"dtype": str(dtype), "variant": source.variant, "tokens": tokenizer.model_max_length}
    views = {"resolution": resolution, "crop": "centre", "both flips": random_flip}
    encoded = cache(dataset, load_encoders, {**key, **views, **contents})
    text = cache(tokenize(tokenizer, prompts), load_text_encoder, {**key, "prompts": prompts})
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


def encode_batch(
    batch: Batch, encoders: Encoders | None, flips: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Moments (B, 2, C, h, w), text embeddings (B, L, D) and their mask (B, L) of a batch, cached or computed now."""
    if encoders is None:
        moments = batch["moments"][torch.arange(len(flips), device=flips.device), flips.long()]
        return moments, batch["text"], batch["mask"]
    return encoders.encode_images(flip_rows(batch["images"], flips)), *encoders.encode_text(batch["tokens"]).values()


def make_inputs(
    batch: Batch,
    scheduler: DDPMScheduler,
    encoders: Encoders | None,
    no_text: dict[str, torch.Tensor],
    draw: Callable[[int, torch.device], dict[str, torch.Tensor]],
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A model's inputs, and what it must predict on them, (B, C, h, w).

    Args:
        batch: With "images", uint8, (B, 3, H, W), and "tokens", (B, 2, L); or with cached "moments",
            (B, flips, 2, C, h, w), "text", (B, L, D), and "mask", (B, L).
        encoders: `None` for a cached batch.
        no_text: Of the empty caption: "text", (L, D), and "mask", (L,).
        draw: [`make_draws`] with the settings of the run, for a batch that has none.
    """
    rows = batch["moments" if encoders is None else "images"]
    draws = batch["draws"] if "draws" in batch else draw(len(rows), rows.device)
    moments, text, mask = encode_batch(batch, encoders, draws["flips"])
    mean, std = moments.float().unbind(1)
    latents = mean + std * draws["vae_noise"]
    noisy, target = add_noise(scheduler, latents, draws["noise"], draws["timesteps"])
    dropped = draws["dropped"][:, None]
    text, mask = torch.where(dropped[..., None], no_text["text"], text), torch.where(dropped, no_text["mask"], mask)
    inputs = {"hidden_states": noisy, "encoder_hidden_states": text, "encoder_attention_mask": mask}
    return inputs | {"timestep": draws["timesteps"]}, target


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
        teacher_output, teacher_features = predict(teacher, inputs, batch)
    output, features = student(**inputs)
    channels = target.shape[1]
    prediction, variance = output[:, :channels], output[:, channels:]  # the second is empty where none is learned
    weights = snr_weights[inputs["timestep"]] if snr_weights is not None else None
    task = prediction_error(prediction, target, task_loss, weights)
    loss, logs = lambda_task * task, {"task": task}

    if kd_loss is not None:
        kd, parts = kd_loss(prediction, teacher_output[:, :channels], progress, weights)
        loss = loss + lambda_kd_output * kd
        logs |= {"kd": kd, **parts}
        if variance.numel():
            logs["variance"] = F.mse_loss(variance.float(), teacher_output[:, channels:].float())
            loss = loss + lambda_kd_output * logs["variance"]
        if features:
            pairs = zip(features, teacher_features)
            feat = sum(F.mse_loss(ours.float(), theirs.float()) for ours, theirs in pairs)
            loss = loss + lambda_kd_feat * feat
            logs["feat"] = feat

    return loss, {"loss": loss, **logs}


# ---------------------------------------------------------------------------------------------- samples and the result


@torch.no_grad()
def sample_images(
    transformer: PixArtTransformer2DModel,
    vae: AutoencoderKL,
    scheduler: SchedulerMixin,
    text: dict[str, torch.Tensor],
    seed: int,
    num_inference_steps: int,
    guidance_scale: float,
    accelerator: Accelerator,
) -> list[Image.Image]:
    """One sample per prompt by the teacher's sampler, from the noise that the seed fixes, the same for every model.

    Args:
        vae: In float32, on the device.
        scheduler: The teacher's.
        text: Of the empty caption and of the prompts: "text", (1 + N, L, D), and "mask", (1 + N, L).
    """
    count = len(text["mask"]) - 1
    mine = share_of(count, accelerator)
    rows = [0, *(1 + row for row in mine)]
    embeddings, mask = (text[name][rows].to(accelerator.device) for name in ("text", "mask"))
    shape = (count, transformer.config.in_channels, transformer.config.sample_size, transformer.config.sample_size)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))[mine].to(accelerator.device)
    pipeline = PixArtSigmaPipeline(None, None, vae, transformer, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    seed_step(seed)  # samplers may draw noise of their own
    with autocast_of(transformer, accelerator):
        latents = pipeline(
            negative_prompt=None,
            prompt_embeds=embeddings[1:],
            prompt_attention_mask=mask[1:],
            negative_prompt_embeds=embeddings[:1].expand(len(mine), -1, -1),
            negative_prompt_attention_mask=mask[:1].expand(len(mine), -1),
            use_resolution_binning=False,
            latents=noise,
            num_inference_steps=min(num_inference_steps, scheduler.config.num_train_timesteps),
            guidance_scale=guidance_scale,
            output_type="latent",
        ).images
    latents = latents.float() / vae.config.scaling_factor
    images = torch.cat([vae.decode(image).sample for image in latents.split(1)])  # one by one: decoding takes memory
    return gather_samples(pipeline.image_processor.postprocess(images), count)


def save_pipeline(
    student: PixArtTransformer2DModel,
    teacher: PixArtTransformer2DModel,
    source: TeacherSource,
    args: argparse.Namespace,
) -> None:
    """The pipeline folder: the student's transformer, the teacher's other parts, model card, sample grid and curves.

    Args:
        teacher: Its skeleton.
    """
    output_dir = Path(args.output_dir)
    pipeline = load_weights(source, DiffusionPipeline, transformer=student)
    save_with_variant(pipeline, output_dir, args.save_fp16_variant)

    count, total = student.num_parameters(), teacher.num_parameters()
    facts = [
        f"- Teacher: `{args.pretrained_teacher_model}`, a transformer of {total:,} parameters.",
        f"- Student: a transformer of {count:,} parameters, {count / total:.1%} of the teacher's "
        f"(`--student {args.student} --student_init {args.student_init}`).",
        f"- Images of {args.resolution} pixels, {args.caption_dropout:.0%} of the captions dropped.",
    ]
    usage = "from diffusers import PixArtSigmaPipeline\n\n"
    name = args.hub_model_id or output_dir.resolve().name
    usage += f'image = PixArtSigmaPipeline.from_pretrained("{name}")("a prompt").images[0]'
    kind, tags = "A text-to-image model", ["text-to-image"]
    write_model_card(output_dir, kind, facts, describe_run(args), usage, tags)
    logger.info(f"the model is in {output_dir}: see README.md, or draw by eval/generate.py --model {output_dir}")


def print_dry_run(
    student: PixArtTransformer2DModel,
    teacher: PixArtTransformer2DModel,
    vae: AutoencoderKL,
    recipe: dict,
    source: TeacherSource,
    args: argparse.Namespace,
) -> None:
    """Print parameters, MACs, a memory estimate and the student's config. All models are skeletons."""
    plan, count, total = plan_run(args), student.num_parameters(), teacher.num_parameters()
    tokens = args.max_sequence_length

    def make_student() -> PixArtTransformer2DModel:
        with torch.device("meta"):
            return PixArtTransformer2DModel.from_config(student.config)

    costs = count_costs(plan, make_student, teacher, example_inputs(student, tokens), recipe["features"])
    size = f"{total:,} parameters, {costs.teacher_macs:,} MACs"
    print(f"teacher: {size} per image of {args.resolution} pixels and forward pass")
    print(f"student: {count:,} parameters, {costs.macs:,} MACs; {count / total:.2%} of the teacher")
    config = load_from(source, T5Config.from_pretrained, subfolder="text_encoder")
    with torch.device("meta"):
        text_encoder = T5EncoderModel(config)
    batch = args.encoding_batch_size if args.cache_latents else plan.batch_size
    dtype = dtype_of(plan.mixed_precision)
    encoding = together(
        estimate_image_encoding(vae, torch.float32 if dtype == torch.float16 else dtype, args.resolution, batch),
        estimate_text_encoding(text_encoder, dtype, tokens),
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
    source = TeacherSource(args.pretrained_teacher_model, args.teacher_revision, args.variant, EXPECTED)
    sampler, scheduler = check_pipeline(source)
    teacher_shape = load_skeleton(source, PixArtTransformer2DModel, "transformer")
    vae_shape = load_skeleton(source, AutoencoderKL, "vae")
    args.resolution = args.resolution or teacher_shape.config.sample_size * vae_factor(vae_shape)
    check_teacher(teacher_shape, vae_shape, args.resolution, source)
    student_shape, recipe = build_student(teacher_shape, args)
    if args.dry_run:
        return print_dry_run(student_shape, teacher_shape, vae_shape, recipe, source, args)
    tokenizer = load_tokenizer(source, args.max_sequence_length)
    find_weights(source, {"text_encoder": T5EncoderModel}, PARTS)

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
        text = encoders.encode_text(tokenize(tokenizer, ["", *prompts]))

    # ---- student
    seed_step(args.seed)
    transformer = PixArtTransformer2DModel.from_config(student_shape.config)
    teacher = load_part(source, PixArtTransformer2DModel, "transformer")
    fill_student(transformer, teacher, recipe, args.student_init)
    first = torch.device("cpu") if args.fsdp and not args.cache_teacher else device
    how = args.teacher_dtype, dtype, first, args.offload_teacher
    teacher = hold_teacher(teacher, *how) if args.kd_loss != "none" else None

    # ---- teacher, draws and samples
    side, channels = transformer.config.sample_size, transformer.config.in_channels
    how = {"random_flip": args.random_flip, "caption_dropout": args.caption_dropout}
    how |= {"shape": (channels, side, side), "steps": scheduler.config.num_train_timesteps}
    draw, no_text = partial(make_draws, **how), {name: rows[0].to(device) for name, rows in text.items()}
    inputs_of = partial(make_inputs, scheduler=scheduler, encoders=encoders, no_text=no_text, draw=draw)
    how = {"text": text, "seed": args.seed, "num_inference_steps": args.num_inference_steps}
    how |= {"scheduler": load_part(source, sampler, "scheduler"), "guidance_scale": args.guidance_scale}
    sample = partial(stop.leave_together(sample_images), **how, accelerator=accelerator)
    load_vae = partial(load_frozen, source, AutoencoderKL, "vae", device, torch.float32)
    teacher_samples, passes = [], args.cache_teacher or 1
    if args.cache_teacher:
        key = contents | {
            "scheduler": public_config(scheduler.config),
            "tokens": [args.max_sequence_length, str(dtype)],
        }
        how = passes, args.seed, args.cache_teacher_dtype, source, [*PARTS], key
        how += partial(cache, batch_size=args.train_batch_size), device
        dataset = cache_predictions(dataset, teacher, inputs_of, draw, *how)
        teacher_samples += sample(teacher, vae=load_vae())
        teacher = None
    dataloader = make_dataloader(dataset, args.train_batch_size, workers, accelerator)
    length = args.max_train_steps, args.num_train_epochs, len(dataloader) / passes
    args.max_train_steps = count_steps(*length, accelerator)
    inputs = example_inputs(transformer, args.max_sequence_length)
    student, teacher_model = pair_features(transformer, teacher, recipe["features"], inputs)
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
    validate = partial(log_validation, teacher, transformer, ema, *shown)

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
    transformer = gather_model(transformer, ema)
    if accelerator.is_main_process:
        check_finite(dict(transformer.named_parameters()), "student", args.max_train_steps)
        save_pipeline(transformer, teacher_shape, source, args)
        if args.push_to_hub:
            push_to_hub(output_dir, args.hub_model_id, stop)
    accelerator.end_training()


if __name__ == "__main__":
    main(parse_args())
