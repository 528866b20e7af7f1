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
import math
import os
import re
import signal
import sys
import threading
import time
from functools import partial
from pathlib import Path

import datasets
import torch
import torch.nn.functional as F
from accelerate import skip_first_batches
from accelerate.logging import get_logger
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from PIL import Image
from torchvision.transforms import v2
from tqdm.auto import tqdm

import lift_utils
from lift_utils import FeatureModel, check_group_size, fail


logger = get_logger(__name__)

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

SHOWN = ("loss", "coarse", "fine", "weight")  # beside the progress bar


# ------------------------------------------------------------------------------------------------------- the arguments


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line (or `input_args`); the defaults are the published recipe of the pixel U-Net."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=lift_utils.HelpFormatter)
    switch = argparse.BooleanOptionalAction

    group = parser.add_argument_group("models")
    group.add_argument("--pretrained_teacher_model", help="DDPM/DDIM pipeline or UNet2DModel: a folder or a Hub id")
    group.add_argument("--teacher_revision", help="branch, tag or commit of the teacher on the Hub")
    group.add_argument("--variant", help="weights variant of the teacher, e.g. fp16")
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
        help="what a model without a teacher predicts; with one, the teacher's scheduler says",
    )

    group = parser.add_argument_group("data")
    group.add_argument("--dataset_name", help="dataset on the Hub")
    group.add_argument("--dataset_config_name", help="its configuration")
    group.add_argument("--train_data_dir", help="folder of images, with or without sub-folders")
    group.add_argument("--image_column", default="image", help="column of the images")
    group.add_argument("--cache_dir", help="where datasets keeps its files")
    group.add_argument("--max_train_samples", type=int, help="train on so many images, chosen by the seed")
    group.add_argument("--max_unreadable", type=float, default=0.01, help="share of unreadable images to put up with")
    group.add_argument("--resolution", type=int, help="side of the training images (default: the model's sample_size)")
    group.add_argument("--random_flip", action=switch, default=True, help="mirror images at random")
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
    group.add_argument(
        "--reduction", default="sum", choices=("sum", "mean"), help="of every term over a sample's elements"
    )
    group.add_argument("--lambda_task", type=float, default=1.0, help="weight of the loss on the data")
    group.add_argument("--lambda_kd_output", type=float, default=1.0, help="weight of the output term")
    group.add_argument("--lambda_kd_feat", type=float, default=1e-6, help="weight of the block features (FitNet)")
    group.add_argument(
        "--antithetic_timesteps", action=switch, default=True, help="pair each timestep t with T - 1 - t in the batch"
    )

    group = parser.add_argument_group("training")
    group.add_argument("--output_dir", default="lift-unet", help="where the student, checkpoints and metrics go")
    group.add_argument("--seed", type=int, default=0, help="of everything random")
    group.add_argument("--train_batch_size", type=int, default=96, help="images per device and micro-batch")
    group.add_argument("--gradient_accumulation_steps", type=int, default=1, help="micro-batches per step")
    group.add_argument("--max_train_steps", type=int, default=100_000, help="optimizer steps in all")
    group.add_argument("--learning_rate", type=float, default=2e-4, help="peak learning rate")
    group.add_argument(
        "--lr_scheduler",
        default="constant",
        choices=("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"),
        help="course of the learning rate over the run",
    )
    group.add_argument("--lr_warmup_steps", type=int, default=0, help="optimizer steps of warm-up")
    group.add_argument("--adam_beta1", type=float, default=0.9, help="decay of the first moment")
    group.add_argument("--adam_beta2", type=float, default=0.999, help="decay of the second moment")
    group.add_argument("--adam_weight_decay", type=float, default=0.0, help="decoupled weight decay; 0 is plain Adam")
    group.add_argument("--adam_epsilon", type=float, default=1e-8, help="added to Adam's denominator")
    group.add_argument("--max_grad_norm", type=float, default=1.0, help="clip the gradient to this norm")
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
    group.add_argument("--num_validation_images", type=int, default=8, help="columns of the grid")
    group.add_argument("--num_inference_steps", type=int, default=50, help="DDIM steps per sample")
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
    if args.kd_loss != "none" and args.pretrained_teacher_model is None:
        fail(f"--kd_loss {args.kd_loss} needs a teacher; add --pretrained_teacher_model, or pass --kd_loss none")
    if args.pretrained_teacher_model is None and not args.student.endswith(".json"):
        fail(f"--student {args.student} is relative to a teacher; without one, pass a JSON file with a whole config")


# ---------------------------------------------------------------------------------------------------------- the models


def load_teacher(args: argparse.Namespace) -> tuple[UNet2DModel, DDPMScheduler]:
    """The teacher U-Net in float32 on the CPU, and the noise schedule it was trained with."""
    source = args.pretrained_teacher_model
    expected = "pass a DDPM/DDIM pipeline or a UNet2DModel with safetensors weights: a folder or a Hub id"
    options = {"variant": args.variant, "use_safetensors": True}
    if Path(source).is_dir() and not (Path(source) / "model_index.json").exists():
        unet, scheduler = lift_utils.from_teacher(args, UNet2DModel.from_pretrained, expected, **options), None
    else:
        pipeline = lift_utils.from_teacher(args, DiffusionPipeline.from_pretrained, expected, **options)
        unet, scheduler = getattr(pipeline, "unet", None), pipeline.scheduler
    if not isinstance(unet, UNet2DModel):
        fail(f"--pretrained_teacher_model {source} holds no UNet2DModel; pass a pixel DDPM or DDIM pipeline")
    if scheduler is None:
        logger.warning(f"{source} has no scheduler: assuming 1000 linear steps that predict {args.prediction_type}")
        return unet, make_scheduler(args.prediction_type)
    return unet, DDPMScheduler.from_config(scheduler.config)


def make_scheduler(prediction_type: str) -> DDPMScheduler:
    """DDPM's schedule, for models without a teacher."""
    return DDPMScheduler(num_train_timesteps=1000, prediction_type=prediction_type)


def read_recipe(args: argparse.Namespace) -> dict:
    """The student's recipe: a preset, a width fraction, or a JSON file."""
    recipe = lift_utils.read_recipe(args, STUDENTS, ("width", "config", "blocks", "features"))
    if recipe is not None:
        return recipe
    try:
        width = float(args.student)
    except ValueError:
        width = 0.0
    if not 0 < width <= 1:
        fail(
            f"--student {args.student} is unknown; pass {', '.join(STUDENTS)}, a fraction such as 0.5, or a .json file"
        )
    return {"width": width}


def student_config(teacher_config: dict, recipe: dict) -> dict:
    """The teacher's config with the recipe's width and overrides."""
    # "_use_default_values" among the private entries would make from_config ignore overrides.
    config = {key: value for key, value in teacher_config.items() if not key.startswith("_")}
    config |= recipe.get("config", {})
    if "width" not in recipe:
        return config
    narrow, groups = lift_utils.narrow_widths(
        teacher_config["block_out_channels"],
        recipe["width"],
        config["norm_num_groups"] or 1,
        fixed="norm_num_groups" in recipe.get("config", {}),
    )
    config |= {"block_out_channels": narrow, "norm_num_groups": groups}
    if config.get("time_embedding_dim"):
        config["time_embedding_dim"] = 4 * narrow[0]
    return config


def build_student(teacher: UNet2DModel | None, args: argparse.Namespace) -> tuple[UNet2DModel, list[list[str]]]:
    """The student, not yet filled, and the pairs `[student module, teacher module]` of the feature term."""
    recipe = read_recipe(args)
    config = student_config(dict(teacher.config) if teacher is not None else {}, recipe)
    if args.resolution is not None:
        config["sample_size"] = args.resolution
    try:
        student = UNet2DModel.from_config(config)
    except (ValueError, TypeError, ZeroDivisionError, KeyError) as error:
        fail(f"--student {args.student} gives no valid UNet2DModel: {error}; check its config")
    check_student(student, teacher, args)

    features = recipe.get("features")
    if features is None:
        blocks = [
            name for name, _ in student.named_modules() if re.fullmatch(r"(down|up)_blocks\.\d+|mid_block", name)
        ]
        features = [[name, name] for name in blocks]
    if teacher is None or args.kd_loss == "none" or args.lambda_kd_feat == 0:
        features = []
    return student, features


def check_student(student: UNet2DModel, teacher: UNet2DModel | None, args: argparse.Namespace) -> None:
    """Refuse sizes with which no step could be taken."""
    config = student.config
    for key in ("in_channels", "out_channels"):
        if teacher is not None and config[key] != teacher.config[key]:
            fail(f"--student {args.student} has {key} {config[key]}; keep the teacher's {teacher.config[key]}")
    if config.sample_size is None:
        fail("--resolution is not given and the model's config has no sample_size; pass --resolution")
    factor = 2 ** (len(config.block_out_channels) - 1)
    if any(side % factor for side in _pair(config.sample_size)):
        fail(
            f"--resolution {config.sample_size} is not divisible by the U-Net's downsampling; pass a multiple of "
            f"{factor}"
        )
    if config.in_channels != config.out_channels or config.in_channels not in (1, 3):
        fail(
            f"the U-Net maps {config.in_channels} channels to {config.out_channels}; choose a "
            "--pretrained_teacher_model or --student that maps 1 to 1 (grey) or 3 to 3 (RGB)"
        )
    if config.class_embed_type is not None or config.num_class_embeds is not None:
        fail("--pretrained_teacher_model is class-conditional; this script distils unconditional models only")
    if args.kd_loss == "place":
        try:
            check_group_size(args.group_size, math.prod(_pair(config.sample_size)))
        except ValueError as error:
            fail(f"--group_size {args.group_size}: {error}")


def fill_student(student, teacher, scheduler, dataset, args: argparse.Namespace, device: torch.device) -> None:
    """Put the teacher's weights into the student as `--student_init` and the recipe say."""
    recipe = read_recipe(args)
    if args.student_init == "random":
        logger.info("the student starts from random weights")
    elif "blocks" not in recipe and lift_utils.is_narrower(student, teacher):
        accumulate = None
        if args.student_init == "diffusion":
            batch = torch.stack([item["images"] for item in dataset.select(range(min(len(dataset), 16)))])
            accumulate = partial(accumulate_gradients, scheduler=scheduler, images=batch.to(device) / 127.5 - 1)
        config = teacher.config
        example = torch.zeros(1, config.in_channels, *_pair(config.sample_size)), torch.zeros(1, dtype=torch.long)
        lift_utils.prune_width(student, teacher, example, accumulate)
    else:
        try:
            fresh = lift_utils.copy_blocks(student, teacher.state_dict(), recipe.get("blocks"))
        except ValueError as error:
            fail(f'--student {args.student}: {error}; correct its "blocks"')
        logger.info(f"{len(fresh)} tensors of the student start from random weights: {', '.join(fresh) or 'none'}")


def accumulate_gradients(model: UNet2DModel, scheduler: DDPMScheduler, images: torch.Tensor) -> None:
    """Diff-Pruning's criterion (Fang et al., NeurIPS 2023): gradients of the task loss, summed over timesteps.

    Timesteps rise from 0, a batch each, until the loss falls under 5 % of its largest: those say little.
    """
    model.to(images.device)
    largest = 0.0
    total = scheduler.config.num_train_timesteps
    for step in tqdm(range(0, total, max(1, total // 64)), desc="Measuring channels"):
        timesteps = torch.full((len(images),), step, device=images.device)
        noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(step)).to(images.device)
        noisy, target = noise_images(scheduler, images, noise, timesteps)
        loss = F.mse_loss(model(noisy, timesteps).sample, target)
        largest = max(largest, loss.item())
        if loss.item() < 0.05 * largest:
            break
        loss.backward()
    model.cpu()


def _pair(size: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


# ------------------------------------------------------------------------------------------------------------ the data


def make_dataset(args: argparse.Namespace, channels: int, resolution: int) -> datasets.Dataset:
    """A dataset of `{"images": uint8 (channels, resolution, resolution)}`; unreadable images are left out."""
    column = args.image_column
    dataset, source = lift_utils.load_data(args, ["image_column"], drop_labels=True)
    dataset = lift_utils.drop_unreadable(dataset, column, source, args)
    return dataset.with_transform(
        partial(load_images, column=column, mode="L" if channels == 1 else "RGB", size=resolution)
    )


def load_images(batch: dict, column: str, mode: str, size: int) -> dict[str, list[torch.Tensor]]:
    """Decode, resize the shorter side and crop the centre."""
    transform = v2.Compose([v2.Resize(size, v2.InterpolationMode.LANCZOS), v2.CenterCrop(size), v2.PILToTensor()])
    return {"images": [transform(lift_utils.open_image(record, mode)) for record in batch[column]]}


# ------------------------------------------------------------------------------------------------------- the algorithm


def noise_images(scheduler: DDPMScheduler, images, noise, timesteps) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy images and what the model must predict on them."""
    noisy = scheduler.add_noise(images, noise, timesteps)
    if scheduler.config.prediction_type == "v_prediction":
        return noisy, scheduler.get_velocity(images, noise, timesteps)
    return noisy, noise if scheduler.config.prediction_type == "epsilon" else images


def compute_losses(
    student: FeatureModel,
    teacher: FeatureModel | None,
    batch: dict[str, torch.Tensor],
    progress: float,
    scheduler: DDPMScheduler,
    args: argparse.Namespace,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """One micro-batch's loss and its parts, as tensors that stay on the device.

    Args:
        batch: With "images", uint8, (B, C, H, W).
        progress: Share of the run that is done, for the scheduled weights.
    """
    images = batch["images"].float() / 127.5 - 1
    count, device, steps = len(images), images.device, scheduler.config.num_train_timesteps
    if args.random_flip:
        images = torch.where(torch.rand(count, 1, 1, 1, device=device) < 0.5, images.flip(-1), images)
    noise = torch.randn_like(images)
    timesteps = torch.randint(steps, (count,), device=device)
    if args.antithetic_timesteps:
        half = timesteps[: (count + 1) // 2]
        timesteps = torch.cat([half, steps - 1 - half])[:count]
    noisy, target = noise_images(scheduler, images, noise, timesteps)

    def scale(term: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
        return term * of[0].numel() if args.reduction == "sum" else term

    prediction, features = student(noisy, timesteps)
    task = scale(F.mse_loss(prediction.float(), target), prediction)
    loss, logs = args.lambda_task * task, {"task": task}

    if args.kd_loss != "none":
        with torch.no_grad():
            wanted, wanted_features = teacher(noisy.to(next(teacher.parameters()).dtype), timesteps)
        kd, parts = lift_utils.output_term(prediction, wanted, args, progress)
        kd = scale(kd, prediction)
        loss = loss + args.lambda_kd_output * kd
        logs |= {"kd": kd, **parts}
        if features:
            pairs = zip(features, wanted_features)
            feat = sum(scale(F.mse_loss(ours.float(), theirs.float()), ours) for ours, theirs in pairs)
            loss = loss + args.lambda_kd_feat * feat
            logs["feat"] = feat

    return loss, {"loss": loss, **logs}


# ---------------------------------------------------------------------------------------------- samples and the result


@torch.no_grad()
def sample_images(unet: UNet2DModel, scheduler: DDPMScheduler, args: argparse.Namespace) -> list[Image.Image]:
    """Samples by DDIM from the noise that `--seed` fixes, the same for every model."""
    training, dtype = unet.training, unet.dtype
    if dtype != torch.float32:  # the pipeline cannot hand out bfloat16 images; widening the weights loses nothing
        unet.float()
    pipeline = DDIMPipeline(unet=unet.eval(), scheduler=DDIMScheduler.from_config(scheduler.config))
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(args.seed)
    images = pipeline(args.num_validation_images, generator, num_inference_steps=args.num_inference_steps).images
    if dtype != torch.float32:
        unet.to(dtype)
    unet.train(training)
    return images


def log_validation(
    teacher, student: UNet2DModel, ema, cache: dict, scheduler, args, trackers: list, step: int
) -> None:
    """Samples of teacher, student and EMA student from the same noise, in one labelled grid.

    Args:
        cache: Keeps the teacher's samples between calls.
    """
    if teacher is not None and "teacher" not in cache:
        cache["teacher"] = sample_images(teacher, scheduler, args)
    rows = {**cache, "student": sample_images(student, scheduler, args)}
    if ema is not None:
        with lift_utils.averaged_weights(ema, list(student.parameters())):
            rows["EMA student"] = sample_images(student, scheduler, args)
    grid = lift_utils.labelled_grid(list(rows.items()), scale=max(1, 64 // rows["student"][0].width))
    lift_utils.save_grid(grid, Path(args.output_dir), step, trackers)


def save_pipeline(student: UNet2DModel, teacher: UNet2DModel | None, scheduler, args: argparse.Namespace) -> None:
    """The pipeline folder with its scheduler, model card, sample grid and curves."""
    output_dir = Path(args.output_dir)
    DDPMPipeline(unet=student, scheduler=scheduler).save_pretrained(output_dir)
    ours = student.num_parameters()
    if teacher is None:
        facts = [f"- Trained from scratch, {ours:,} parameters."]
    else:
        share = ours / teacher.num_parameters()
        facts = [
            f"- Teacher: `{args.pretrained_teacher_model}`, {teacher.num_parameters():,} parameters.",
            f"- Student: {ours:,} parameters, {share:.1%} of the teacher's "
            f"(`--student {args.student}`, initialised by {args.student_init}).",
        ]
    facts.append(f"- Images of {student.config.sample_size} pixels; {args.reduction} reduction of all losses.")
    usage = "from diffusers import DDIMPipeline\n\n"
    usage += f'image = DDIMPipeline.from_pretrained("{args.hub_model_id or output_dir.name}")().images[0]'
    kind, tags = "An unconditional diffusion model", ["unconditional-image-generation"]
    lift_utils.write_model_card(output_dir, args, kind, facts, usage, tags)


def print_dry_run(student: UNet2DModel, teacher: UNet2DModel | None, args: argparse.Namespace) -> None:
    """Print parameters, MACs, a memory estimate and the student's config."""
    count, total, inputs = student.num_parameters(), 0, example_inputs(student)

    def skeleton(model: UNet2DModel) -> UNet2DModel:
        with torch.device("meta"):
            return UNet2DModel.from_config(model.config)

    macs, *activations = lift_utils.estimate_activations(
        partial(skeleton, student), args.gradient_checkpointing, **inputs
    )
    print(f"student: {count:,} parameters, {macs:,} MACs per image and forward pass")
    if teacher is not None:
        total = teacher.num_parameters()
        macs, *_ = lift_utils.profile_forward(skeleton(teacher).requires_grad_(False), **inputs)
        print(f"teacher: {total:,} parameters, {macs:,} MACs; the student is {count / total:.2%} of it")
    lift_utils.print_memory_estimate(args, activations, count, total)
    print(student.to_json_string())


# ------------------------------------------------------------------------------------------------------------- the run


def example_inputs(unet: UNet2DModel) -> dict[str, torch.Tensor]:
    """Arguments of the U-Net's forward pass on one image, on the meta device."""
    with torch.device("meta"):
        sample = torch.zeros(1, unet.config.in_channels, *_pair(unet.config.sample_size))
        return {"sample": sample, "timestep": torch.zeros(1)}


def main(args: argparse.Namespace) -> None:
    """Set up, train, save."""
    # ---- models
    accelerator = lift_utils.make_accelerator(args)
    teacher, scheduler = None, make_scheduler(args.prediction_type)
    if args.pretrained_teacher_model is not None:
        teacher, scheduler = load_teacher(args)
        if args.resolution is not None:
            teacher.register_to_config(sample_size=args.resolution)
    lift_utils.seed_step(args.seed)
    student, features = build_student(teacher, args)
    if args.dry_run:
        return print_dry_run(student, teacher, args)

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
        dataset = make_dataset(args, student.config.in_channels, student.config.sample_size)
    dataloader = lift_utils.make_dataloader(dataset, args, accelerator)

    # ---- student
    if teacher is not None:
        fill_student(student, teacher, scheduler, dataset, args, accelerator.device)
    unet = student
    inputs = example_inputs(unet)
    student, teacher_model = lift_utils.pair_features(unet, teacher, features, inputs, always_project=True)
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if args.enable_xformers_memory_efficient_attention:
        for model in filter(None, (unet, teacher)):
            model.enable_xformers_memory_efficient_attention()
    if teacher is not None:
        lift_utils.freeze(teacher_model, accelerator.device, lift_utils.working_dtype(accelerator))
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
    losses_of = partial(compute_losses, student, teacher_model, scheduler=scheduler, args=args)
    validate = partial(log_validation, teacher, unet, ema, {}, scheduler, args, accelerator.trackers)

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
        save_pipeline(unet, teacher, scheduler, args)
        if args.push_to_hub:
            lift_utils.push_to_hub(output_dir, args.hub_model_id)
    accelerator.end_training()


if __name__ == "__main__":
    main(parse_args())
