# Copyright 2026 The LIFT and PLACE distillation authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Distil a pixel diffusion U-Net (UNet2DModel in a DDPM or DDIM pipeline) into a narrower one with LIFT and PLACE.

The student is the teacher's config with narrower blocks, filled with the teacher's most important channels. It learns
from the data and from the teacher's prediction. The folder that comes out loads with `DDPMPipeline.from_pretrained`
and `DDIMPipeline.from_pretrained`. On a GPU, the 1.6 % student of a CelebA-64 teacher, with the published settings:

    accelerate launch --mixed_precision no train_lift_unet.py --pretrained_teacher_model path/or/hub-id \\
        --train_data_dir celeba64 --student extreme --max_train_steps 500000 --output_dir celeba64-extreme

On a CPU, in a minute: a small teacher from scratch, then a student of half its width.

    echo '{"config": {"sample_size": 16, "in_channels": 1, "out_channels": 1, "block_out_channels": [16, 32],
        "down_block_types": ["DownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D", "UpBlock2D"],
        "norm_num_groups": 4}}' > teacher.json
    accelerate launch --cpu train_lift_unet.py --kd_loss none --student teacher.json --train_data_dir images \\
        --max_train_steps 20 --train_batch_size 16 --output_dir teacher
    accelerate launch --cpu train_lift_unet.py --pretrained_teacher_model teacher --student 0.5 \\
        --train_data_dir images --max_train_steps 20 --train_batch_size 16 --output_dir student
"""

import argparse
import json
import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from common.arguments import (
    HelpFormatter,
    add_shared_arguments,
    check_args,
    describe_run,
    plan_run,
    tracked_flags,
)
from common.batches import endless_batches, make_dataloader
from common.cache import cache_encodings
from common.card import write_model_card
from common.checkpoints import prepare_output
from common.costs import dtype_of
from common.data import choose_samples, drop_unreadable, load_images
from common.ending import Stopped, StopSignals
from common.errors import fail
from common.estimates import count_costs, print_estimates
from common.full import end_in_one_line
from common.hub import create_hub_repo, push_to_hub
from common.images import flip_rows, load_pixels
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
from common.reporting import gather_samples, grid_path, log_validation, share_of
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
from common.teachers import TeacherSource, check_weights, load_weights, make_noise_schedule, min_snr_weights
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
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel
from diffusers.training_utils import EMAModel
from PIL import Image
from tqdm.auto import tqdm

from lift_utils import FeatureModel, KDLoss, make_kd_loss, prediction_error


logger = get_logger(__name__)

PARTS = ("unet", "scheduler")  # of a pipeline of pixels
EXPECTED = "pass a DDPM/DDIM pipeline, a folder or a Hub id, or the folder of a UNet2DModel"

# A preset says what a JSON file says: {"width": fraction, "config": {overrides}, "blocks": {...}, "features": [...]}.
# Of the CelebA-64 DDPM (78.7M parameters, blocks of 128, 256, 256, 256, 512) these keep 44.3M, 19.7M, 9.7M and 1.2M;
# `extreme` is `pruned_90` with normalisation groups of four channels, like the teacher's, instead of one.
STUDENTS = {
    "pruned_30": {"width": 0.7},
    "pruned_50": {"width": 0.5},
    "pruned_70": {"width": 0.3},
    "pruned_90": {"width": 0.1},
    "extreme": {"width": 0.125, "config": {"norm_num_groups": 4}},
}

# The published recipe of the pixel U-Net: the defaults of shared flags.
RECIPE = {
    "output_dir": "lift-unet",
    "random_flip": True,
    "train_batch_size": 96,
    "max_train_steps": 100_000,
    "learning_rate": 2e-4,
}


# ------------------------------------------------------------------------------------------------------- the arguments


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line (or `input_args`); the defaults are the published recipe of the pixel U-Net."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    switch = argparse.BooleanOptionalAction
    groups = add_shared_arguments(parser)
    add_streaming_arguments(groups["data"])

    group = groups["models"]
    group.add_argument("--pretrained_teacher_model", help="DDPM/DDIM pipeline or UNet2DModel: a folder or a Hub id")
    group.add_argument("--student", default="extreme", help=f"{', '.join(STUDENTS)}, a width fraction, or a JSON file")
    group.add_argument(
        "--student_init",
        default="magnitude",
        choices=("magnitude", "diffusion", "random"),
        help="keep the teacher's channels of largest weights, or of largest effect on its loss; or start fresh",
    )
    group.add_argument(
        "--prediction_type",
        default="epsilon",
        choices=("epsilon", "v_prediction", "sample"),
        help="what a model without a teacher predicts, or a teacher without a scheduler; others say it in theirs",
    )

    group = groups["data"]
    group.add_argument("--train_data_dir", help="folder of images, with or without sub-folders")
    group.add_argument("--resolution", type=int, help="side of the training images (default: the model's sample_size)")

    group = groups["distillation"]
    group.add_argument(
        "--reduction", default="sum", choices=("sum", "mean"), help="of every term over a sample's elements"
    )
    group.add_argument("--snr_gamma", type=float, help="weigh timesteps by min-SNR-γ, of which 5 is usual")
    group.add_argument("--lambda_task", type=float, default=1.0, help="weight of the loss on the data")
    group.add_argument("--lambda_kd_output", type=float, default=1.0, help="weight of the output term")
    group.add_argument("--lambda_kd_feat", type=float, default=1e-6, help="weight of the block features (FitNet)")
    group.add_argument(
        "--antithetic_timesteps",
        action=switch,
        default=True,
        help="pair each timestep t with T - 1 - t in the batch (not with --cache_teacher)",
    )

    group = groups["logging"]
    group.add_argument("--num_validation_images", type=int, default=8, help="columns of the sample grid")
    group.add_argument("--num_inference_steps", type=int, default=50, help="DDIM steps per sample")

    parser.set_defaults(**RECIPE)
    args = parser.parse_args(input_args)
    check_args(args)
    check_streaming(vars(args))
    if args.kd_loss != "none" and args.pretrained_teacher_model is None:
        fail(f"--kd_loss {args.kd_loss} needs a teacher; add --pretrained_teacher_model, or pass --kd_loss none")
    if args.pretrained_teacher_model is None and not args.student.endswith(".json"):
        fail(f"--student {args.student} is relative to a teacher; without one, pass a JSON file with a whole config")
    return args


# ---------------------------------------------------------------------------------------------------------- the models


def load_teacher(source: TeacherSource, prediction_type: str) -> tuple[UNet2DModel, DDPMScheduler]:
    """The teacher U-Net in float32 on the CPU, and the noise schedule it was trained with.

    Args:
        prediction_type: What a U-Net without a scheduler is taken to predict.
    """
    if Path(source.path).is_dir() and not (Path(source.path) / "model_index.json").exists():
        parts = {"unet": load_weights(source, UNet2DModel)}
    else:
        parts = load_weights(source, DiffusionPipeline).components
    unet, scheduler = parts.get("unet"), parts.get("scheduler")
    if not isinstance(unet, UNet2DModel):
        fail(f"--pretrained_teacher_model {source.path} holds no UNet2DModel; pass a pixel DDPM or DDIM pipeline")
    others = [name for name, part in parts.items() if part is not None and name not in PARTS]
    if others:
        remedy = "pass a model of pixels, or see docs/adapting.md for others"
        fail(f"--pretrained_teacher_model {source.path} has a {others[0]} beside its UNet2DModel; {remedy}")
    check_weights(unet.float(), f"--pretrained_teacher_model {source.path}: its unet")
    if scheduler is None:
        logger.warning(f"{source.path} has no scheduler: assuming 1000 linear steps that predict {prediction_type}")
        return unet, make_scheduler(prediction_type)
    return unet, make_noise_schedule(source, type(scheduler), scheduler.config)


def make_scheduler(prediction_type: str) -> DDPMScheduler:
    """DDPM's schedule, for models without a teacher."""
    return DDPMScheduler(num_train_timesteps=1000, prediction_type=prediction_type)


def read_student(student: str) -> dict:
    """The recipe that `--student` names: a preset, a width fraction, or a JSON file."""
    otherwise = "a fraction such as 0.5, or a .json file"
    try:
        width = float(student)
    except ValueError:
        return read_recipe(student, STUDENTS, ("width", "config", "blocks", "features"), otherwise)
    if not 0 < width <= 1:
        fail(f"--student {student} is unknown; pass {', '.join(STUDENTS)}, {otherwise}")
    return {"width": width}


def student_config(teacher_config: dict, recipe: dict) -> dict:
    """The teacher's config with the recipe's width and overrides."""
    config = override_config(UNet2DModel, public_config(teacher_config), recipe)
    if "width" not in recipe:
        return config
    narrow, groups = narrow_widths(teacher_config["block_out_channels"], recipe, config["norm_num_groups"] or 1)
    attended = [width for width, kind in zip(narrow, config["down_block_types"]) if "Attn" in kind]
    attended += narrow[-1:] if config.get("add_attention", True) else []
    head = config.get("attention_head_dim") or 1
    if attended and min(attended) < head:
        raise ValueError(f"its width leaves {min(attended)} channels to attention heads of {head}; pass a larger one")
    config |= {"block_out_channels": narrow, "norm_num_groups": groups}
    if config.get("time_embedding_dim") and "time_embedding_dim" not in recipe.get("config", {}):
        config["time_embedding_dim"] = 4 * narrow[0]
    return config


def build_student(teacher: UNet2DModel | None, args: argparse.Namespace) -> tuple[UNet2DModel, dict]:
    """The student, not yet filled, and its recipe with the pairs of the feature term."""
    recipe = read_student(args.student)
    with model_errors_end(f"--student {args.student} gives no UNet2DModel", "correct its config"):
        config = student_config(dict(teacher.config) if teacher is not None else {}, recipe)
        if args.resolution is not None:
            config["sample_size"] = args.resolution
        with torch.device("meta"):
            student = UNet2DModel.from_config(config)
    for key in ("in_channels", "out_channels"):
        if teacher is not None and student.config[key] != teacher.config[key]:
            fail(f"--student {args.student} has {key} {student.config[key]}; keep the teacher's {teacher.config[key]}")
    if teacher is not None and len(student.up_blocks) < len(teacher.up_blocks) and "blocks" not in recipe:
        if args.student_init != "random" and not keeps_widths(student, teacher):
            fail(f"--student {args.student}: with fewer levels other widths prune nothing; pass --student_init random")
        recipe = {**pair_levels(student, teacher), **recipe}
    if teacher is not None and args.student_init != "random":
        with model_errors_end(f"--student {args.student}", 'correct its "blocks", or pass --student_init random'):
            match_blocks(student, teacher.state_dict(), recipe.get("blocks"))
        if is_pruned(student, teacher, recipe, args.student_init):
            check_prunable(teacher)
    subject = f"--student {args.student} of --pretrained_teacher_model {args.pretrained_teacher_model}"
    with model_errors_end(f"{subject} has no fitting size", "correct its config"):
        check_sizes(student, teacher, args.group_size if args.kd_loss == "place" else None, subject)
    check_forward(student, example_inputs(student), f"--student {args.student}")

    if teacher is None or args.kd_loss == "none" or args.lambda_kd_feat == 0:
        recipe = {**recipe, "features": []}
    if "features" not in recipe:
        names = [name for name, _ in student.named_modules()]
        blocks = [name for name in names if re.fullmatch(r"(down|up)_blocks\.\d+|mid_block", name)]
        recipe = {**recipe, "features": [[name, name] for name in blocks]}
    if recipe["features"]:  # wrong pairs end the run here
        with model_errors_end(f"--student {args.student}", FEATURES_REMEDY):
            pair_features(student, skeleton(teacher), recipe["features"], example_inputs(student), always_project=True)
    return UNet2DModel.from_config(student.config), recipe


def check_sizes(student: UNet2DModel, teacher: UNet2DModel | None, group_size: int | None, subject: str) -> None:
    """Refuse sizes with which no step could be taken.

    Args:
        group_size: Of PLACE, `None` for other losses.
        subject: The flags that the student comes from, with their values.
    """
    config = student.config
    if config.sample_size is None:
        fail("--resolution is not given and the model's config has no sample_size; pass --resolution")
    factor = 2 ** (max(len(model.config.block_out_channels) for model in (student, teacher) if model) - 1)
    if any(side % factor for side in image_size(student)):
        fail(
            f"--resolution {config.sample_size}, given or of {subject}, is not divisible by the U-Net's downsampling; "
            f"pass a multiple of {factor}"
        )
    if config.in_channels != config.out_channels or config.in_channels not in (1, 3):
        fail(
            f"{subject}: the U-Net maps {config.in_channels} channels to {config.out_channels}; choose one that maps "
            "1 to 1 (grey) or 3 to 3 (RGB)"
        )
    if config.class_embed_type is not None or config.num_class_embeds is not None:
        fail(f"{subject} is class-conditional; pass an unconditional one: this script distils no others")
    check_groups(group_size, math.prod(image_size(student)))


def fill_student(
    student: UNet2DModel,
    teacher: UNet2DModel,
    recipe: dict,
    student_init: str,
    scheduler: DDPMScheduler,
    dataset: datasets.Dataset,
    seed: int,
    device: torch.device,
) -> None:
    """Put the teacher's weights into the student as `--student_init` and the recipe say."""
    if not is_pruned(student, teacher, recipe, student_init):
        return fill_from_blocks(student, teacher, recipe.get("blocks"), random=student_init == "random")
    accumulate = None
    if student_init == "diffusion":
        streamed = isinstance(dataset, StreamedDataset)
        items = dataset.sample(16) if streamed else choose_samples(dataset, 16, seed)
        batch = torch.stack([item["images"] for item in items])
        accumulate = partial(accumulate_gradients, scheduler=scheduler, images=batch.to(device) / 127.5 - 1)
    side = 2 ** len(teacher.config.block_out_channels)
    sample = torch.zeros(1, teacher.config.in_channels, side, side)
    example = sample, torch.zeros(1, dtype=torch.long)
    with fits_the_gpu(f"--student_init {student_init}: a step of the teacher, 16 images,", "pass magnitude"):
        prune_width(student, teacher, example, accumulate, scheduler.config.num_train_timesteps)


def accumulate_gradients(model: UNet2DModel, scheduler: DDPMScheduler, images: torch.Tensor) -> None:
    """Diff-Pruning's criterion (Fang et al., NeurIPS 2023): gradients of the task loss, summed over timesteps.

    Timesteps rise from 0, a batch each, until the loss falls under 5 % of its largest: those say little.

    Args:
        images: (B, C, H, W) in [-1, 1].
    """
    model.to(images.device)
    largest = 0.0
    total = scheduler.config.num_train_timesteps
    for step in tqdm(range(0, total, max(1, total // 64)), desc="Measuring channels"):
        timesteps = torch.full((len(images),), step, device=images.device)
        noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(step)).to(images.device)
        noisy, target = add_noise(scheduler, images, noise, timesteps)
        loss = F.mse_loss(model(noisy, timesteps).sample, target)
        largest = max(largest, loss.item())
        if loss.item() < 0.05 * largest:
            break
        loss.backward()
    model.cpu()


def skeleton(unet: UNet2DModel) -> UNet2DModel:
    """The U-Net without its weights, on the meta device."""
    with torch.device("meta"):
        return UNet2DModel.from_config(unet.config)


def image_size(unet: UNet2DModel) -> tuple[int, int]:
    """Height and width of the U-Net's images."""
    size = unet.config.sample_size
    return (size, size) if isinstance(size, int) else tuple(size)


def example_inputs(unet: UNet2DModel) -> dict[str, torch.Tensor]:
    """Arguments of the U-Net's forward pass on one image, on the meta device."""
    with torch.device("meta"):
        sample = torch.zeros(1, unet.config.in_channels, *image_size(unet))
        return {"sample": sample, "timestep": torch.zeros(1)}


# ------------------------------------------------------------------------------------------------------------ the data


def make_dataset(
    args: argparse.Namespace, channels: int, height: int, width: int
) -> tuple[datasets.Dataset | StreamedDataset, dict[str, Any]]:
    """A dataset of `{"images": uint8 (channels, height, width)}`, without unreadable images.

    Returns:
        The dataset, and what identifies its contents in a cache.
    """
    resolution = height if height == width else [(height, width)]
    column, mode = args.image_column, "L" if channels == 1 else "RGB"
    folders = args.dataset_name, args.dataset_config_name, args.train_data_dir, args.cache_dir
    load = partial(load_examples, column=column, mode=mode, size=resolution)
    # `datasets` keeps no image that metadata do not list. They are read where they name the column alone.
    unused = {"drop_labels": True, "drop_metadata": column == "image"}
    if args.streaming:
        stream, source = load_images(*folders, {"image_column": column}, streaming=True, **unused)
        how = args.image_column, args.max_unreadable, args.seed, args.shuffle_buffer, args.output_dir
        return StreamedDataset(stream, source, load, *how), {}
    dataset, source = load_images(*folders, {"image_column": column}, **unused)
    dataset = choose_samples(dataset, args.max_train_samples, args.seed)
    dataset = drop_unreadable(dataset, column, source, args.max_unreadable, args.dataloader_num_workers, resolution)
    contents = {"data": dataset._fingerprint, "image": column, "resolution": resolution}
    return dataset.with_transform(load), contents


def load_examples(
    batch: dict[str, list], column: str, mode: str, size: int | list[tuple[int, int]]
) -> dict[str, list[torch.Tensor]]:
    """Decode, resize to cover the size and crop the centre."""
    return {"images": load_pixels(batch[column], mode, size)}


# ------------------------------------------------------------------------------------------------------- the algorithm


def add_noise(
    scheduler: DDPMScheduler, samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy samples and what the model must predict on them, (B, C, H, W)."""
    noisy = scheduler.add_noise(samples, noise, timesteps)
    if scheduler.config.prediction_type == "v_prediction":
        return noisy, scheduler.get_velocity(samples, noise, timesteps)
    return noisy, noise if scheduler.config.prediction_type == "epsilon" else samples


def sample_timesteps(count: int, steps: int, antithetic: bool, device: torch.device) -> torch.Tensor:
    """Timesteps (B,), uniform over the steps; where `antithetic`, the second half mirrors the first."""
    timesteps = torch.randint(steps, (count,), device=device)
    if antithetic:
        half = timesteps[: (count + 1) // 2]
        timesteps = torch.cat([half, steps - 1 - half])[:count]
    return timesteps


def make_draws(
    count: int,
    device: torch.device,
    shape: tuple[int, int, int],
    steps: int,
    random_flip: bool,
    antithetic_timesteps: bool,
) -> dict[str, torch.Tensor]:
    """All that is random in a batch: which images are flipped, (B,), their noise (B, C, H, W), and timesteps (B,).

    Args:
        count: B.
        shape: Of an image, (C, H, W).
        steps: Of the noise schedule.
    """
    flips = torch.rand(count, device=device) < 0.5 if random_flip else torch.zeros(count, dtype=bool, device=device)
    noise = torch.randn(count, *shape, device=device)
    return {"flips": flips, "noise": noise, "timesteps": sample_timesteps(count, steps, antithetic_timesteps, device)}


def make_inputs(
    batch: Batch, scheduler: DDPMScheduler, draw: Callable[[int, torch.device], dict[str, torch.Tensor]]
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A model's inputs, and what it must predict on them, (B, C, H, W).

    Args:
        draw: [`make_draws`] with the settings of the run, for a batch that has none.
    """
    images = batch["images"].float() / 127.5 - 1
    draws = batch["draws"] if "draws" in batch else draw(len(images), images.device)
    images = flip_rows(images, draws["flips"])
    noisy, target = add_noise(scheduler, images, draws["noise"], draws["timesteps"])
    return {"sample": noisy, "timestep": draws["timesteps"]}, target


def compute_losses(
    student: FeatureModel,
    teacher: FeatureModel | None,
    batch: Batch,
    progress: float,
    inputs_of: Callable[[Batch], tuple[dict[str, torch.Tensor], torch.Tensor]],
    kd_loss: KDLoss | None,
    lambdas: tuple[float, float, float],
    reduction: str,
    task_loss: str = "mse",
    snr_weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """One micro-batch's loss and its parts, as tensors that stay on the device.

    Args:
        teacher: `None` without distillation, and for batches with the "teacher"'s prediction.
        batch: With "images", uint8, (B, C, H, W).
        progress: Share of the run that is done, for the scheduled weights.
        inputs_of: [`make_inputs`] with all but the batch.
        kd_loss: Between the outputs of student and teacher; `None` without distillation.
        lambdas: Weights of the task term, the output term and the feature term.
        reduction: "sum" or "mean" of every term over a sample's elements.
        task_loss: "mse" or "rms", on the data.
        snr_weights: Of the timesteps, (T,), in the terms on the data and on the teacher's output; `None` is without.
    """
    inputs, target = inputs_of(batch)  # the same for student and teacher

    def scale(term: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
        return term * of[0].numel() if reduction == "sum" else term

    lambda_task, lambda_kd_output, lambda_kd_feat = lambdas
    if kd_loss is not None:  # first: what the teacher works with is gone when the student's activations come
        teacher_prediction, teacher_features = predict(teacher, inputs, batch)
    prediction, features = student(**inputs)
    weights = snr_weights[inputs["timestep"]] if snr_weights is not None else None
    task = scale(prediction_error(prediction, target, task_loss, weights), prediction)
    loss, logs = lambda_task * task, {"task": task}

    if kd_loss is not None:
        kd, parts = kd_loss(prediction, teacher_prediction, progress, weights)
        kd = scale(kd, prediction)
        loss = loss + lambda_kd_output * kd
        logs |= {"kd": kd, **parts}
        if features:
            pairs = zip(features, teacher_features)
            feat = sum(scale(F.mse_loss(ours.float(), theirs.float()), ours) for ours, theirs in pairs)
            loss = loss + lambda_kd_feat * feat
            logs["feat"] = feat

    return loss, {"loss": loss, **logs}


# ---------------------------------------------------------------------------------------------- samples and the result


@torch.no_grad()
def sample_images(
    unet: UNet2DModel,
    scheduler: DDPMScheduler,
    seed: int,
    count: int,
    num_inference_steps: int,
    accelerator: Accelerator,
) -> list[Image.Image]:
    """Samples by DDIM from the noise that the seed fixes, the same for every model, whatever its precision.

    It does not clip, as published: to clip the image that is expected and not the noise leaves some of that.
    """
    sampler = DDIMScheduler.from_config(scheduler.config, clip_sample=False)
    sampler.set_timesteps(min(num_inference_steps, sampler.config.num_train_timesteps))
    shape = count, unet.config.in_channels, *image_size(unet)
    images = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    images = images[share_of(count, accelerator)].to(accelerator.device)
    for step in sampler.timesteps:
        images = sampler.step(unet(images, step).sample.float(), step, images).prev_sample
    pixels = (images / 2 + 0.5).clamp(0, 1).cpu().permute(0, 2, 3, 1).numpy()
    return gather_samples(DDIMPipeline.numpy_to_pil(pixels), count)


def save_pipeline(
    student: UNet2DModel, teacher: UNet2DModel | None, scheduler: DDPMScheduler, args: argparse.Namespace
) -> None:
    """The pipeline folder with its scheduler, model card, sample grid and curves."""
    output_dir = Path(args.output_dir)
    DDPMPipeline(unet=student, scheduler=scheduler).save_pretrained(output_dir)
    count = student.num_parameters()
    if teacher is None:
        facts = [f"- Trained from scratch, {count:,} parameters."]
    else:
        share = count / teacher.num_parameters()
        facts = [
            f"- Teacher: `{args.pretrained_teacher_model}`, {teacher.num_parameters():,} parameters.",
            f"- Student: {count:,} parameters, {share:.1%} of the teacher's "
            f"(`--student {args.student} --student_init {args.student_init}`).",
        ]
    height, width = image_size(student)
    facts.append(f"- Images of {height} × {width} pixels; {args.reduction} reduction of all losses.")
    usage = "from diffusers import DDIMPipeline\n\n"
    usage += f'pipeline = DDIMPipeline.from_pretrained("{args.hub_model_id or output_dir.resolve().name}")\n'
    usage += "pipeline.scheduler.register_to_config(clip_sample=False)  # as DDIM is published\n"
    usage += "image = pipeline().images[0]"
    kind, tags = "An unconditional diffusion model", ["unconditional-image-generation"]
    write_model_card(output_dir, kind, facts, describe_run(args), usage, tags)
    logger.info(f"the model is in {output_dir}: see README.md, or draw by eval/generate.py --model {output_dir}")


def print_dry_run(student: UNet2DModel, teacher: UNet2DModel | None, recipe: dict, args: argparse.Namespace) -> None:
    """Print parameters, MACs, a memory estimate and the student's config."""
    plan, count, inputs = plan_run(args), student.num_parameters(), example_inputs(student)
    models = partial(skeleton, student), skeleton(teacher) if teacher is not None else None
    costs = count_costs(plan, *models, inputs, recipe.get("features", []))
    print(f"student: {count:,} parameters, {costs.macs:,} MACs per image and forward pass")
    if teacher is not None:
        total = teacher.num_parameters()
        print(f"teacher: {total:,} parameters, {costs.teacher_macs:,} MACs; the student is {count / total:.2%} of it")
    print_estimates(plan, costs)
    print(json.dumps(public_config(student.config), indent=2))


# ------------------------------------------------------------------------------------------------------------- the run


@end_in_one_line
def main(args: argparse.Namespace) -> None:
    """Set up, train, save."""
    # ---- models
    scale = 1.0 if args.reduction == "sum" else 2.0**16
    how = args.gradient_accumulation_steps, args.mixed_precision, args.allow_tf32, args.dry_run, args.fsdp, scale
    accelerator = make_accelerator(args.output_dir, args.report_to, args.seed, *how)
    stop = StopSignals(accelerator.num_processes)
    args.mixed_precision = accelerator.mixed_precision  # which the accelerate config may have set
    teacher, teacher_shape, scheduler = None, None, make_scheduler(args.prediction_type)
    if args.pretrained_teacher_model is not None:
        source = TeacherSource(args.pretrained_teacher_model, args.teacher_revision, args.variant, EXPECTED)
        teacher, scheduler = load_teacher(source, args.prediction_type)
    seed_step(args.seed)
    unet, recipe = build_student(teacher, args)
    if teacher is not None:
        teacher.register_to_config(sample_size=unet.config.sample_size)  # its samples are as large as the student's
        teacher_shape = skeleton(teacher)
    if args.dry_run:
        return print_dry_run(unet, teacher, recipe, args)

    # ---- output
    output_dir = prepare_output(args.output_dir, args.resume_from_checkpoint, accelerator.is_main_process)
    if args.push_to_hub and accelerator.is_main_process:
        args.hub_model_id = create_hub_repo(args.hub_model_id, output_dir, args.hub_private_repo)

    # ---- data
    device, dtype = accelerator.device, dtype_of(accelerator.mixed_precision)
    with accelerator.main_process_first():
        dataset, contents = make_dataset(args, unet.config.in_channels, *image_size(unet))

    # ---- student
    if teacher is not None:
        fill_student(unet, teacher, recipe, args.student_init, scheduler, dataset, args.seed, device)

    # ---- draws and samples
    draw = partial(
        make_draws,
        shape=(unet.config.in_channels, *image_size(unet)),
        steps=scheduler.config.num_train_timesteps,
        random_flip=args.random_flip,
        antithetic_timesteps=args.antithetic_timesteps,
    )
    inputs_of = partial(make_inputs, scheduler=scheduler, draw=draw)
    sample = partial(
        stop.leave_together(sample_images),
        scheduler=scheduler,
        seed=args.seed,
        count=args.num_validation_images,
        num_inference_steps=args.num_inference_steps,
        accelerator=accelerator,
    )

    # ---- teacher
    if args.kd_loss == "none":
        teacher = None
    if teacher is not None:
        first = torch.device("cpu") if args.fsdp and not args.cache_teacher else device
        teacher = hold_teacher(teacher, args.teacher_dtype, dtype, first, args.offload_teacher)
    teacher_samples, passes = [], args.cache_teacher or 1
    if args.cache_teacher:
        parts = ["unet" if (Path(source.path) / "unet").is_dir() else "."]
        key = contents | {"scheduler": public_config(scheduler.config)}
        settings = {"cache_dir": args.cache_dir, "batch_size": args.train_batch_size}
        cache = partial(cache_encodings, **settings, num_workers=args.dataloader_num_workers, accelerator=accelerator)
        how = passes, args.seed, args.cache_teacher_dtype, source, parts, key, cache, device
        dataset = cache_predictions(dataset, teacher, inputs_of, draw, *how)
        with fits_the_gpu("the grid of the teacher's samples", "pass fewer --num_validation_images"):
            teacher_samples, teacher = sample(teacher), None
    dataloader = make_dataloader(dataset, args.train_batch_size, args.dataloader_num_workers, accelerator)
    length = args.max_train_steps, args.num_train_epochs, len(dataloader) / passes
    args.max_train_steps = count_steps(*length, accelerator)

    student, teacher_model = pair_features(
        unet, teacher, recipe["features"], example_inputs(unet), always_project=True
    )
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
    losses_of = partial(
        compute_losses,
        student,
        teacher_model,
        inputs_of=inputs_of,
        kd_loss=make_kd_loss(args.kd_loss, args.group_size, args.group_by, args.coarse_norm, args.kd_weighting),
        lambdas=(args.lambda_task, args.lambda_kd_output, args.lambda_kd_feat),
        task_loss=args.task_loss,
        snr_weights=min_snr_weights(scheduler, args.snr_gamma, device),
        reduction=args.reduction,
    )
    shown = teacher_samples, sample, None, None, output_dir, accelerator  # no VAE, and a row per model
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
        save_pipeline(unet, teacher_shape, scheduler, args)
        if args.push_to_hub:
            push_to_hub(output_dir, args.hub_model_id, stop)
    accelerator.end_training()


if __name__ == "__main__":
    main(parse_args())
