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
import copy
import importlib.util
import json
import math
import os
import re
import shlex
import shutil
import signal
import sys
import threading
import time
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from accelerate import skip_first_batches
from accelerate.logging import get_logger
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel
from diffusers.models.attention_processor import Attention
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from PIL import Image
from torchvision.transforms import v2
from tqdm.auto import tqdm

import lift_utils
from lift_utils import FeatureModel, check_group_size, fail, lift_place_loss


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
    for name, value in vars(args).items():
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value < 0:
            fail(f"--{name} {value} is negative; pass a positive number")
    counts = "train_batch_size gradient_accumulation_steps max_train_steps checkpointing_steps logging_steps"
    counts += " validation_steps num_validation_images num_inference_steps checkpoints_total_limit max_train_samples"
    for name in counts.split():
        if getattr(args, name) == 0:
            fail(f"--{name} 0 is too small; pass at least 1")
    if args.kd_loss != "none" and args.pretrained_teacher_model is None:
        fail(f"--kd_loss {args.kd_loss} needs a teacher; add --pretrained_teacher_model, or pass --kd_loss none")
    if args.pretrained_teacher_model is None and not args.student.endswith(".json"):
        fail(f"--student {args.student} is relative to a teacher; without one, pass a JSON file with a whole config")
    if not args.dry_run:
        if (args.dataset_name is None) == (args.train_data_dir is None):
            fail("--dataset_name or --train_data_dir must say where the images are: pass one of them")
        if args.train_data_dir is not None and not Path(args.train_data_dir).is_dir():
            fail(f"--train_data_dir {args.train_data_dir} is no folder; pass a folder of images")
        if args.train_data_dir is not None and not any(Path(args.train_data_dir).iterdir()):
            fail(f"--train_data_dir {args.train_data_dir} is empty; put images into it")
    if args.enable_xformers_memory_efficient_attention:
        if not torch.cuda.is_available():
            fail("--enable_xformers_memory_efficient_attention needs a CUDA device; drop it: attention is SDPA then")
        if importlib.util.find_spec("xformers") is None:
            fail("--enable_xformers_memory_efficient_attention needs xformers; pip install xformers, or drop it")
    if args.use_8bit_adam and importlib.util.find_spec("bitsandbytes") is None:
        fail("--use_8bit_adam needs bitsandbytes; pip install bitsandbytes, or drop the flag")
    if args.report_to not in ("all", "none") and importlib.util.find_spec(args.report_to) is None:
        fail(f"--report_to {args.report_to} is not installed; pip install {args.report_to}, or pass none")


# ---------------------------------------------------------------------------------------------------------- the models


def load_teacher(args: argparse.Namespace) -> tuple[UNet2DModel, DDPMScheduler]:
    """The teacher U-Net in float32 on the CPU, and the noise schedule it was trained with."""
    source = args.pretrained_teacher_model
    where = {"revision": args.teacher_revision, "variant": args.variant, "use_safetensors": True}
    folder = Path(source)
    if not folder.is_dir() and (folder.is_absolute() or source.startswith(".") or source.count("/") > 1):
        fail(f"--pretrained_teacher_model {source} is no folder; pass a pipeline or UNet2DModel folder, or a Hub id")
    try:
        if folder.is_dir() and not (folder / "model_index.json").exists():
            unet, scheduler = UNet2DModel.from_pretrained(source, **where), None
        else:
            pipeline = DiffusionPipeline.from_pretrained(source, **where)
            unet, scheduler = getattr(pipeline, "unet", None), pipeline.scheduler
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        fail(
            f"--pretrained_teacher_model {source} does not load: {reason} "
            "Pass a DDPM/DDIM pipeline or UNet2DModel with safetensors weights: a folder or a Hub id."
        )
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
    if args.student in STUDENTS:
        return STUDENTS[args.student]
    if args.student.endswith(".json"):
        try:
            recipe = json.loads(Path(args.student).read_text())
        except (OSError, ValueError) as error:
            fail(f"--student {args.student} cannot be read: {error}; pass a JSON object")
        unknown = set(recipe) - {"width", "config", "blocks", "features"} if isinstance(recipe, dict) else {"a list"}
        if unknown:
            fail(f'--student {args.student} holds {sorted(unknown)}; use "width", "config", "blocks" and "features"')
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
    """The teacher's config with the recipe's width and overrides.

    Widths are rounded up to whole normalisation groups. Where that would make different widths equal, which takes the
    shortcut convolution out of a block, there are fewer groups.
    """
    # "_use_default_values" among the private entries would make from_config ignore overrides.
    config = {key: value for key, value in teacher_config.items() if not key.startswith("_")}
    config |= recipe.get("config", {})
    if "width" not in recipe:
        return config
    widths, most = teacher_config["block_out_channels"], config["norm_num_groups"] or 1
    fixed = "norm_num_groups" in recipe.get("config", {})
    for groups in [most] if fixed else [groups for groups in range(most, 0, -1) if most % groups == 0]:
        narrow = [math.ceil(width * recipe["width"] / groups) * groups for width in widths]
        if len(set(narrow)) == len(set(widths)):
            break
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
    for pair in features:
        for model, name in zip((student, teacher), pair):
            if name not in dict(model.named_modules()):
                fail(f'--student {args.student} pairs features of "{name}", which does not exist; give "features"')
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
    elif "blocks" not in recipe and is_narrower(student, teacher):
        accumulate = None
        if args.student_init == "diffusion":
            batch = torch.stack([item["images"] for item in dataset.select(range(min(len(dataset), 16)))])
            accumulate = partial(accumulate_gradients, scheduler=scheduler, images=batch.to(device) / 127.5 - 1)
        prune_width(student, teacher, accumulate)
    else:
        try:
            fresh = lift_utils.copy_blocks(student, teacher.state_dict(), recipe.get("blocks"))
        except ValueError as error:
            fail(f'--student {args.student}: {error}; correct its "blocks"')
        logger.info(f"{len(fresh)} tensors of the student start from random weights: {', '.join(fresh) or 'none'}")


def is_narrower(student: UNet2DModel, teacher: UNet2DModel) -> bool:
    """Whether the student has the teacher's layers, each at most as wide."""
    ours, theirs = student.state_dict(), teacher.state_dict()
    return ours.keys() == theirs.keys() and all(
        len(ours[key].shape) == len(theirs[key].shape)
        and all(a <= b for a, b in zip(ours[key].shape, theirs[key].shape))
        for key in ours
    )


def prune_width(student: UNet2DModel, teacher: UNet2DModel, accumulate=None) -> None:
    """Fill the student with the teacher's most important channels, over torch-pruning's dependency graph.

    Coupled layers (residual and skip connections, attention, time embedding) keep the same channels. Channels compete
    within the student's normalisation groups and attention heads, which therefore stay parts of the teacher's.

    Args:
        accumulate: Puts gradients into a copy of the teacher; channels are then ranked by |weight · gradient| (Taylor)
            instead of by the magnitude of their weights.
    """
    import torch_pruning as tp

    if teacher.config.time_embedding_type != "positional":
        fail("--student_init can prune models with a positional time embedding only; pass --student_init random")
    pruned = copy.deepcopy(teacher).eval()
    importance = (
        tp.importance.GroupMagnitudeImportance() if accumulate is None else tp.importance.GroupTaylorImportance()
    )
    if accumulate is not None:
        accumulate(pruned)
    config = teacher.config
    example = torch.zeros(1, config.in_channels, *_pair(config.sample_size)), torch.zeros(1, dtype=torch.long)
    graph = tp.DependencyGraph().build_dependency(pruned, example_inputs=example)
    names = {module: name for name, module in pruned.named_modules()}

    for group in graph.get_all_groups(ignored_layers=[pruned.conv_out]):
        members = [dependency.target.module for dependency, _ in group]
        keep = student.get_submodule(names[members[0]]).weight.shape[0]
        parts = kept_parts = 1
        for module in members:
            name = names.get(module, "")
            if isinstance(module, torch.nn.GroupNorm):
                parts = kept_parts = student.get_submodule(name).num_groups
            elif name.endswith(".to_q"):
                attention = name.removesuffix(".to_q")
                parts = pruned.get_submodule(attention).heads
                kept_parts = student.get_submodule(attention).heads
                break
        scores = importance(group)
        kept = set(keep_channels(scores, keep, parts, kept_parts).tolist())
        group.prune([index for index in range(len(scores)) if index not in kept])

    state = pruned.state_dict()
    state.update(fit_time_embedding(student, teacher, state))
    for name, module in student.named_modules():
        if isinstance(module, Attention):
            # Attention divides by the root of the head's width: keep dividing by the teacher's.
            wider = teacher.get_submodule(name)
            factor = math.sqrt(module.inner_dim / module.heads / (wider.inner_dim / wider.heads))
            for key in ("weight", "bias"):
                if f"{name}.to_q.{key}" in state:
                    state[f"{name}.to_q.{key}"] = state[f"{name}.to_q.{key}"] * factor
    student.load_state_dict(state)


def keep_channels(scores: torch.Tensor, keep: int, parts: int, kept_parts: int) -> torch.Tensor:
    """Indices, ascending, of the best `keep` channels: the best `kept_parts` of `parts`, equally many from each."""
    if len(scores) % parts or keep % kept_parts:
        parts = kept_parts = 1
    table = scores.view(parts, -1)
    best = table.sum(1).topk(kept_parts).indices.sort().values
    inside = table[best].topk(keep // kept_parts, dim=1).indices.sort(dim=1).values
    return (best.unsqueeze(1) * table.shape[1] + inside).flatten()


def fit_time_embedding(student: UNet2DModel, teacher: UNet2DModel, state: dict) -> dict[str, torch.Tensor]:
    """Weights with which the narrower sinusoid enters the time embedding as the teacher's did.

    A narrower sinusoid has other frequencies, so no choice of columns is exact: the first layer is refitted by least
    squares over all timesteps.
    """
    weight, bias = state["time_embedding.linear_1.weight"], state["time_embedding.linear_1.bias"]
    steps = torch.arange(teacher.config.num_train_timesteps or 1000)
    wide, narrow = teacher.time_proj(steps).double(), student.time_proj(steps).double()
    narrow = torch.cat([narrow, torch.ones_like(narrow[:, :1])], dim=1)
    wanted = wide @ weight.double().T + bias.double()
    # Neighbouring low frequencies are nearly collinear: rcond keeps their weights small.
    solution = torch.linalg.lstsq(narrow, wanted, rcond=1e-4, driver="gelsd").solution.to(weight.dtype)
    return {"time_embedding.linear_1.weight": solution[:-1].T, "time_embedding.linear_1.bias": solution[-1]}


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
    try:
        if args.dataset_name is not None:
            source = f"--dataset_name {args.dataset_name}"
            dataset = datasets.load_dataset(
                args.dataset_name, args.dataset_config_name, split="train", cache_dir=args.cache_dir
            )
        else:
            source = f"--train_data_dir {args.train_data_dir}"
            dataset = datasets.load_dataset(
                "imagefolder", data_dir=args.train_data_dir, split="train", cache_dir=args.cache_dir, drop_labels=True
            )
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        fail(f"{source} does not load: {str(error).strip().splitlines()[0]}; pass a folder of images or a Hub dataset")
    column = args.image_column
    if column not in dataset.column_names:
        fail(f"--image_column {column} is not in the data; choose one of {', '.join(dataset.column_names)}")
    if args.max_train_samples is not None and args.max_train_samples < len(dataset):
        dataset = dataset.shuffle(seed=args.seed).select(range(args.max_train_samples))

    dataset = lift_utils.drop_unreadable(dataset.select_columns(column), column, source, args)
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
    images: torch.Tensor,
    scheduler: DDPMScheduler,
    args: argparse.Namespace,
    progress: float,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """One micro-batch's loss and its parts, as tensors that stay on the device.

    Args:
        images: uint8, (B, C, H, W).
        progress: Share of the run that is done, for the scheduled weights.
    """
    images = images.float() / 127.5 - 1
    batch, device, steps = len(images), images.device, scheduler.config.num_train_timesteps
    if args.random_flip:
        images = torch.where(torch.rand(batch, 1, 1, 1, device=device) < 0.5, images.flip(-1), images)
    noise = torch.randn_like(images)
    timesteps = torch.randint(steps, (batch,), device=device)
    if args.antithetic_timesteps:
        half = timesteps[: (batch + 1) // 2]
        timesteps = torch.cat([half, steps - 1 - half])[:batch]
    noisy, target = noise_images(scheduler, images, noise, timesteps)
    scale = images[0].numel() if args.reduction == "sum" else 1

    prediction, features = student(noisy, timesteps)
    prediction = prediction.float()
    task = F.mse_loss(prediction, target) * scale
    loss, logs = args.lambda_task * task, {"task": task}

    if args.kd_loss != "none":
        with torch.no_grad():
            wanted, wanted_features = teacher(noisy.to(next(teacher.parameters()).dtype), timesteps)
        if args.kd_loss == "mse":
            kd = F.mse_loss(prediction, wanted.float()) * scale
        else:
            parts = lift_place_loss(
                prediction,
                wanted,
                group_size=args.group_size if args.kd_loss == "place" else None,
                norm=args.coarse_norm,
                weighting=fine_weighting(args.kd_weighting, progress),
                group_by=args.group_by,
            )
            kd = (parts.fine if args.kd_weighting == "fine_only" else parts.loss) * scale
            logs |= {"coarse": parts.coarse, "fine": parts.fine, "weight": parts.weight}
            for name, value in (("slope", parts.slope), ("intercept", parts.intercept)):
                logs |= {f"{name}_mean": value.mean(), f"{name}_std": value.std(correction=0)}
        loss = loss + args.lambda_kd_output * kd
        logs["kd"] = kd
        if features:
            pairs = zip(features, wanted_features)
            feat = sum(
                F.mse_loss(ours.float(), theirs.float()) * (ours[0].numel() if args.reduction == "sum" else 1)
                for ours, theirs in pairs
            )
            loss = loss + args.lambda_kd_feat * feat
            logs["feat"] = feat

    return loss, {"loss": loss, **logs}


def fine_weighting(kind: str, progress: float) -> str | float:
    """`lift_place_loss`'s weighting for a --kd_weighting at a share of the run."""
    schedule = {
        "linear": progress,
        "cosine": (1 - math.cos(math.pi * progress)) / 2,
        "coarse_only": 0.0,
        "fine_only": 1.0,
    }
    return schedule.get(kind, kind)


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


def log_validation(models: dict, cache: dict, ema, scheduler, args, trackers: list, step: int) -> None:
    """Samples of teacher, student and EMA student from the same noise, in one labelled grid.

    Args:
        cache: Keeps the teacher's samples between calls.
    """
    if models["teacher"] is not None and "teacher" not in cache:
        cache["teacher"] = sample_images(models["teacher"], scheduler, args)
    rows = {**cache, "student": sample_images(models["student"], scheduler, args)}
    if ema is not None:
        with lift_utils.averaged_weights(ema, models["student"]):
            rows["EMA student"] = sample_images(models["student"], scheduler, args)
    grid = lift_utils.labelled_grid(rows, scale=max(1, 64 // rows["student"][0].width))
    folder = Path(args.output_dir) / "samples"
    folder.mkdir(exist_ok=True)
    grid.save(folder / f"step-{step:06d}.png")
    for tracker in trackers:
        if tracker.name in ("tensorboard", "wandb"):
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"samples": np.array(grid)[None]}, step=step, **layout)


def save_pipeline(student: UNet2DModel, teacher: UNet2DModel | None, scheduler, args: argparse.Namespace) -> None:
    """The pipeline folder with its scheduler, model card, sample grid and curves."""
    output_dir = Path(args.output_dir)
    DDPMPipeline(unet=student, scheduler=scheduler).save_pretrained(output_dir)
    shutil.copy(max((output_dir / "samples").glob("step-*.png")), output_dir / "samples.png")
    rows = lift_utils.read_metrics(output_dir / "metrics.jsonl")
    keys = [key for key in ("loss", "task", "kd", "coarse", "fine", "weight") if key in rows[-1]]
    lift_utils.plot_curves({"student": rows}, keys, output_dir / "curves.png")

    ours = student.num_parameters()
    name = args.pretrained_teacher_model
    if teacher is None:
        facts = [f"- Trained from scratch, {ours:,} parameters."]
    else:
        share = ours / teacher.num_parameters()
        facts = [
            f"- Teacher: `{name}`, {teacher.num_parameters():,} parameters.",
            f"- Student: {ours:,} parameters, {share:.1%} of the teacher's "
            f"(`--student {args.student}`, initialised by {args.student_init}).",
        ]
    method = {
        "place": f"PLACE, group size {args.group_size} by {args.group_by}, {args.coarse_norm} coarse term, "
        f"{args.kd_weighting} weight",
        "lift": f"LIFT, {args.coarse_norm} coarse term, {args.kd_weighting} weight",
        "mse": "mean squared error to the teacher's output",
        "none": "none: the loss on the data alone",
    }[args.kd_loss]
    facts += [
        f"- Distillation: {method}; λ_task {args.lambda_task}, λ_output {args.lambda_kd_output}, "
        f"λ_features {args.lambda_kd_feat}, {args.reduction} reduction.",
        f"- Data: `{args.dataset_name or Path(args.train_data_dir).name}`, {student.config.sample_size} pixels.",
        f"- Training: {args.max_train_steps} steps of {args.train_batch_size * args.gradient_accumulation_steps} "
        f"images per process, learning rate {args.learning_rate}, seed {args.seed}"
        + (f", weights averaged with decay {args.ema_decay}." if args.use_ema else "."),
    ]
    text = "\n".join(
        [
            f"# {output_dir.resolve().name}",
            "\nAn unconditional diffusion model, made with LIFT and PLACE (arXiv 2605.19729).\n",
            *facts,
            "\n![Samples of each model from the same noise](samples.png)\n\n![Curves](curves.png)\n\n```python",
            "from diffusers import DDIMPipeline\n",
            f'image = DDIMPipeline.from_pretrained("{args.hub_model_id or output_dir.name}")().images[0]',
            "```\n\nThe command:\n\n```",
            shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            "```",
        ]
    )
    on_hub = name is not None and not Path(name).exists()
    tags = ["diffusers", "unconditional-image-generation", "knowledge-distillation", "lift-place"]
    lift_utils.write_model_card(output_dir, text, tags, base_model=name if on_hub else None)


def print_dry_run(student: UNet2DModel, teacher: UNet2DModel | None, args: argparse.Namespace) -> None:
    """Print parameters, MACs, a memory estimate and the student's config."""
    count, total = student.num_parameters(), 0
    with torch.device("meta"):
        example = torch.zeros(1, student.config.in_channels, *_pair(student.config.sample_size)), torch.zeros(1)
        ours = UNet2DModel.from_config(student.config).train()
        theirs = UNet2DModel.from_config(teacher.config).requires_grad_(False) if teacher is not None else None
    if args.gradient_checkpointing:
        ours.enable_gradient_checkpointing()
    macs, kept = lift_utils.profile_forward(ours, *example)
    print(f"student: {count:,} parameters, {macs:,} MACs per image and forward pass")
    if theirs is not None:
        total = teacher.num_parameters()
        macs, _ = lift_utils.profile_forward(theirs, *example)
        print(f"teacher: {total:,} parameters, {macs:,} MACs; the student is {count / total:.2%} of it")
    lift_utils.print_memory_estimate(args, count, total, kept)
    print(student.to_json_string())


# ------------------------------------------------------------------------------------------------------------- the run


def pair_features(
    student: UNet2DModel, teacher: UNet2DModel | None, features: list[list[str]]
) -> tuple[FeatureModel, FeatureModel | None]:
    """Both models with their features; 1x1 convolutions take the student's to the teacher's widths (FitNet)."""
    if teacher is None:
        return FeatureModel(student, []), None
    models = [FeatureModel(model, [pair[side] for pair in features]) for side, model in enumerate((student, teacher))]
    example = torch.zeros(1, student.config.in_channels, *_pair(student.config.sample_size)), torch.zeros(1)
    with torch.no_grad():
        shapes = [[feature.shape for feature in model(*example)[1]] for model in models]
    for pair, ours, theirs in zip(features, *shapes):
        if ours[2:] != theirs[2:]:
            fail(
                f"the features {pair} have sizes {tuple(ours[2:])} and {tuple(theirs[2:])}; pair equal ones, or pass "
                "--lambda_kd_feat 0"
            )
    projections = [torch.nn.Conv2d(ours[1], theirs[1], 1) for ours, theirs in zip(*shapes)]
    models[0].projections = torch.nn.ModuleList(projections)
    return models[0], models[1]


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

    # ---- student, optimizer, average
    if teacher is not None:
        fill_student(student, teacher, scheduler, dataset, args, accelerator.device)
    unet = student
    student, teacher_model = pair_features(unet, teacher, features)
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if args.enable_xformers_memory_efficient_attention:
        for model in filter(None, (unet, teacher)):
            model.enable_xformers_memory_efficient_attention()
    if teacher is not None:
        dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
        teacher_model.requires_grad_(False).eval().to(accelerator.device, dtype)
    if args.compile:
        for model in filter(None, (student, teacher_model)):
            model.compile()
    optimizer = lift_utils.make_optimizer(student.parameters(), args)
    lr_scheduler = get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=args.max_train_steps,
    )
    student, optimizer, dataloader = accelerator.prepare(student, optimizer, dataloader)
    ema = EMAModel(unet.parameters(), decay=args.ema_decay, foreach=True) if args.use_ema else None
    skipped = torch.zeros(2, device=accelerator.device)

    training = lift_utils.Training(
        accelerator.unwrap_model(student), optimizer, lr_scheduler, ema, accelerator.scaler, skipped
    )

    # ---- resume
    first_step = 0
    if args.resume_from_checkpoint:
        first_step = lift_utils.load_training(output_dir, args.resume_from_checkpoint, training)
    if accelerator.is_main_process:
        lift_utils.rewind_metrics(output_dir / "metrics.jsonl", first_step)
        accelerator.init_trackers("lift-unet", {key: value for key, value in vars(args).items() if value is not None})
    validate = partial(
        log_validation, {"teacher": teacher, "student": unet}, {}, ema, scheduler, args, accelerator.trackers
    )
    logger.info(
        f"{len(dataset)} images, {len(dataloader)} batches an epoch, step {first_step} of {args.max_train_steps}"
    )

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
            images = next(batches)["images"]
            # After the batch: a dataloader draws a random number whenever it starts an epoch or resumes in one.
            lift_utils.seed_step(args.seed, step, micro_step, accelerator.process_index)
            with accelerator.accumulate(student):
                loss, logs = compute_losses(
                    student, teacher_model, images, scheduler, args, step / args.max_train_steps
                )
                accelerator.backward(loss)
                losses.append({name: value.detach() for name, value in logs.items()})
        grad_norm = accelerator.clip_grad_norm_(student.parameters(), args.max_grad_norm)
        losses = {name: torch.stack([parts[name] for parts in losses]).mean() for name in losses[0]}
        finite = torch.isfinite(accelerator.reduce(losses["loss"], "mean")) & torch.isfinite(grad_norm)
        lift_utils.guarded_step(optimizer, finite, skipped)
        lr_scheduler.step()
        optimizer.zero_grad()
        if ema is not None:
            ema.step(unet.parameters())
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
            ema.copy_to(unet.parameters())
        save_pipeline(unet, teacher, scheduler, args)
        if args.push_to_hub:
            lift_utils.push_to_hub(output_dir, args.hub_model_id)
    accelerator.end_training()


if __name__ == "__main__":
    main(parse_args())
