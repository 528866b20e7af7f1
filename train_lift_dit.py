# Copyright 2026 The LIFT and PLACE distillation authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Distil a DiT (DiTTransformer2DModel, class-conditional) into a shallower one with LIFT and PLACE.

The student is the teacher's config with fewer blocks, filled with some of the teacher's. It learns from labelled
images, from the teacher's noise prediction, its learned variance and its tokens. The folder that comes out is a whole
pipeline: `DiTPipeline.from_pretrained`. Half of DiT-XL/2's blocks, on a GPU:

    accelerate launch --mixed_precision fp16 train_lift_dit.py --student d14 --train_data_dir imagenet/train \\
        --cache_latents --use_8bit_adam --gradient_checkpointing --output_dir dit-d14

`imagenet/train` holds a sub-folder of images per class. Class i is the i-th name in sorted order, as ImageNet has it,
or the name itself where all of them are numbers. Images are resized to the teacher's size.

On a CPU, in a minute: a small teacher of pixels (`--vae none`) from scratch, then a student of every second block.

    echo '{"config": {"sample_size": 16, "in_channels": 3, "out_channels": 6, "patch_size": 4, "num_layers": 4,
        "num_attention_heads": 4, "attention_head_dim": 16}}' > teacher.json
    accelerate launch --cpu train_lift_dit.py --kd_loss none --student teacher.json --vae none \\
        --train_data_dir images --max_train_steps 20 --gradient_accumulation_steps 1 --output_dir teacher
    accelerate launch --cpu train_lift_dit.py --pretrained_teacher_model teacher --vae none --keep_blocks 1,3 \\
        --train_data_dir images --max_train_steps 20 --gradient_accumulation_steps 1 --output_dir student

`DiTPipeline` guides with class 1000 as the null class: leave num_embeds_ada_norm at its default of 1000 to use it.
"""

import argparse
import copy
import inspect
import json
import math
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
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
)
from diffusers.models.embeddings import LabelEmbedding
from diffusers.training_utils import EMAModel
from PIL import Image
from torchvision.transforms import v2
from tqdm.auto import tqdm

import lift_utils
from lift_utils import FeatureModel, check_group_size, fail, get_scheduler


logger = get_logger(__name__)

DIT_XL = "facebook/DiT-XL-2-256"
EXPECTED = f"pass a DiTPipeline with safetensors weights: a folder, or a Hub id such as {DIT_XL}"

# A preset says what a JSON file says, {"depth": evenly spaced blocks, "config": {overrides}, "blocks": {...},
# "features": [...]}. Of DiT-XL/2's 28 blocks d14 keeps 1, 3, 5, ... and d7 keeps 3, 7, 11, ... Of its 749.8M
# parameters they keep 509.7M, 376.3M, 189.5M and 109.4M, as Diffusers counts: it holds an embedding of timesteps and
# labels in every block, where the original, of 675M, has one.
STUDENTS = {f"d{depth}": {"depth": depth} for depth in (19, 14, 7, 4)}

MEASURED_IMAGES = 256  # on which --student_depth measures the influence of the teacher's blocks

SHOWN = ("loss", "coarse", "fine", "weight")  # beside the progress bar


# ------------------------------------------------------------------------------------------------------- the arguments


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line (or `input_args`); the defaults are the published recipe of DiT-XL/2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=lift_utils.HelpFormatter)
    switch = argparse.BooleanOptionalAction

    group = parser.add_argument_group("models")
    group.add_argument(
        "--pretrained_teacher_model", help=f"DiTPipeline: a folder or Hub id (default, but from scratch: {DIT_XL})"
    )
    group.add_argument("--teacher_revision", help="branch, tag or commit of the teacher on the Hub")
    group.add_argument("--variant", help="weights variant of the teacher, e.g. fp16")
    group.add_argument("--vae", help='"none" for pixels, or the folder of an AutoencoderKL (default: the teacher\'s)')
    group.add_argument("--student", help=f"{', '.join(STUDENTS)} of the teacher's blocks, or a JSON file")
    group.add_argument("--keep_blocks", help="or the teacher's blocks to keep, e.g. 0,2,4")
    group.add_argument("--student_depth", type=int, help="or keep the so many blocks that change their tokens most")
    group.add_argument(
        "--student_init",
        default="teacher",
        choices=("teacher", "random"),
        help="take the teacher's blocks, or start fresh",
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
    group.add_argument("--train_data_dir", help="folder with a sub-folder of images per class")
    group.add_argument("--image_column", default="image", help="column of the images")
    group.add_argument("--label_column", default="label", help="column of the classes")
    group.add_argument("--cache_dir", help="where datasets keeps its files, and cached latents go")
    group.add_argument("--max_train_samples", type=int, help="train on so many images, chosen by the seed")
    group.add_argument("--max_unreadable", type=float, default=0.01, help="share of unreadable images to put up with")
    group.add_argument("--random_flip", action=switch, default=True, help="mirror images at random")
    group.add_argument("--label_dropout", type=float, default=0.1, help="share of labels dropped, for guidance")
    group.add_argument("--cache_latents", action="store_true", help="run the VAE once, beforehand")
    group.add_argument("--encoding_batch_size", type=int, default=16, help="images at a time while doing so")
    workers = min(4, os.cpu_count() or 1)
    group.add_argument("--dataloader_num_workers", type=int, default=workers, help="processes that decode images")

    group = parser.add_argument_group("distillation")
    group.add_argument("--kd_loss", default="place", choices=("place", "lift", "mse", "none"), help="output term")
    group.add_argument("--group_size", type=int, default=16, help="elements per PLACE group")
    group.add_argument("--group_by", default="error", choices=("error", "position"), help="how PLACE groups elements")
    group.add_argument("--coarse_norm", default="l2", choices=("l1", "l2"), help="norm of the coarse term")
    group.add_argument(
        "--kd_weighting",
        default="adaptive",
        choices=("adaptive", "constant", "linear", "cosine", "coarse_only", "fine_only"),
        help="weight of the fine term: by distance, 1, rising over the run, 0; or the fine term alone",
    )
    group.add_argument(
        "--kd_alpha", type=float, default=0.9, help="weight of the teacher's output; the data have the rest of 1"
    )
    group.add_argument(
        "--lambda_kd_feat", type=float, default=1e-2, help="weight of the tokens at first; it falls linearly to 0"
    )

    group = parser.add_argument_group("training")
    group.add_argument("--output_dir", default="lift-dit", help="where the student, checkpoints and metrics go")
    group.add_argument("--seed", type=int, default=0, help="of everything random")
    group.add_argument("--train_batch_size", type=int, default=32, help="images per device and micro-batch")
    group.add_argument("--gradient_accumulation_steps", type=int, default=8, help="micro-batches per step")
    group.add_argument("--max_train_steps", type=int, default=100_000, help="optimizer steps in all")
    group.add_argument("--learning_rate", type=float, default=2e-4, help="peak learning rate")
    group.add_argument(
        "--lr_scheduler",
        default="cosine_to_half",
        choices=(
            *("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"),
            "cosine_to_half",
        ),
        help="course of the learning rate over the run",
    )
    group.add_argument("--lr_warmup_steps", type=int, default=0, help="optimizer steps of warm-up")
    group.add_argument("--adam_beta1", type=float, default=0.9, help="decay of the first moment")
    group.add_argument("--adam_beta2", type=float, default=0.999, help="decay of the second moment")
    group.add_argument("--adam_weight_decay", type=float, default=0.0, help="decoupled weight decay")
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
    group.add_argument(
        "--validation_classes", nargs="+", help="rows of the grid, by number or name (default: the first eight)"
    )
    group.add_argument("--num_inference_steps", type=int, default=50, help="steps of the teacher's sampler")
    group.add_argument("--guidance_scale", type=float, default=4.0, help="classifier-free guidance of the samples")
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
    """Refuse what can be seen to be wrong before anything is loaded, and fill in the default teacher."""
    lift_utils.check_args(args)
    for name in ("kd_alpha", "label_dropout"):
        if getattr(args, name) > 1:
            fail(f"--{name} {getattr(args, name)} is more than the whole; pass a share such as 0.1")
    given = [name for name in ("student", "keep_blocks", "student_depth") if getattr(args, name) is not None]
    if len(given) != 1:
        found = " and ".join(f"--{name} {getattr(args, name)}" for name in given) or "nothing"
        fail(f"{found} says which blocks the student has; pass one of --student, --keep_blocks and --student_depth")
    if args.kd_loss != "none" or not (args.student or "").endswith(".json"):
        args.pretrained_teacher_model = args.pretrained_teacher_model or DIT_XL
    if args.pretrained_teacher_model is None and args.vae is None:
        fail('--vae is not given and there is no teacher to take one from; pass "none" for pixels, or a folder')
    if args.vae == "none" and args.cache_latents:
        fail("--cache_latents has nothing to do with --vae none; drop it")


# ---------------------------------------------------------------------------------------------------------- the models


def check_pipeline(args: argparse.Namespace) -> tuple[type, dict[int, str]]:
    """Refuse pipelines that this script does not distil; returns the sampler's class and the names of the classes."""
    if args.pretrained_teacher_model is None:
        return DDIMScheduler, {}
    index = lift_utils.from_teacher(args, DiffusionPipeline.load_config, EXPECTED)
    source = args.pretrained_teacher_model
    kind = index.get("_class_name") if isinstance(index, dict) else "list"
    if kind != "DiTPipeline":
        fail(f"--pretrained_teacher_model {source} is a {kind}; {EXPECTED}")
    parts = {name: part[1] for name, part in index.items() if isinstance(part, list)}
    if parts.get("vae") != "AutoencoderKL" and args.vae is None:
        fail(f"--pretrained_teacher_model {source} has {parts.get('vae') or 'no'} vae; pass --vae, or {EXPECTED[5:]}")
    if not hasattr(diffusers, parts.get("scheduler") or ""):
        fail(f"--pretrained_teacher_model {source} has an unknown scheduler, {parts.get('scheduler')}; {EXPECTED}")
    names = {int(number): name for number, name in (index.get("id2label") or {}).items()}
    return getattr(diffusers, parts["scheduler"]), names


def load_scheduler(args: argparse.Namespace, kind: type):
    """The teacher's noise schedule; without a teacher, DiT's."""
    if args.pretrained_teacher_model is not None:
        return lift_utils.load_part(args, kind, "scheduler", EXPECTED)
    # Clipped guesses of x_0 do not go with the noise that DDIM keeps beside them: guided samples come out glaring.
    return kind(num_train_timesteps=1000, prediction_type=args.prediction_type, clip_sample=False)


def load_vae(args: argparse.Namespace, channels: int) -> AutoencoderKL:
    """The VAE that `--vae` asks for, in float32 on the CPU; in a dry run without the teacher's weights."""
    if args.vae == "none":
        return pixel_vae(channels)
    if args.vae is None:
        load = lift_utils.load_skeleton if args.dry_run else lift_utils.load_part
        return load(args, AutoencoderKL, "vae", EXPECTED).requires_grad_(False).eval()
    try:
        return AutoencoderKL.from_pretrained(args.vae, local_files_only=True, use_safetensors=True).eval()
    except (OSError, ValueError) as error:
        fail(f'--vae {args.vae} does not load: {lift_utils.reason(error)}; pass "none", or an AutoencoderKL\'s folder')


@torch.no_grad()
def pixel_vae(channels: int) -> AutoencoderKL:
    """A VAE that gives images back as they are, so that a pipeline of pixels is a DiTPipeline like any other.

    It carries each channel x as the pair (x, -x), since silu(x) - silu(-x) = x. Two large constants beside them fix
    what the normalisation divides by: the error is about 1e-6. Its residual blocks add nothing.
    """
    width, constant = 2 * channels + 2, 1000.0
    vae = AutoencoderKL(
        in_channels=channels,
        out_channels=channels,
        latent_channels=channels,
        block_out_channels=(width,),
        norm_num_groups=1,
        scaling_factor=1.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )
    pairs = torch.eye(channels).repeat_interleave(2, 0)
    pairs[1::2] *= -1
    for name, parameter in vae.named_parameters():
        if "resnets" in name:
            parameter.zero_()
    for half in (vae.encoder, vae.decoder):
        for part in (half.conv_in, half.conv_out, half.conv_norm_out):
            part.weight.zero_()
            part.bias.zero_()
        half.conv_in.weight[: 2 * channels, :, 1, 1] = pairs
        half.conv_in.bias[-2:] = torch.tensor([constant, -constant])
        half.conv_norm_out.weight.fill_(constant * math.sqrt(2 / width))
        half.conv_out.weight[:channels, : 2 * channels, 1, 1] = pairs.T
    vae.encoder.conv_out.bias[channels:] = -30  # the logarithm of the latents' variance
    return vae.requires_grad_(False).eval()


def depth_recipe(kept: list[int]) -> dict:
    """The recipe of a student whose block i comes from, and is paired with, the teacher's block kept[i]."""
    pairs = [[f"transformer_blocks.{ours}", f"transformer_blocks.{theirs}"] for ours, theirs in enumerate(kept)]
    outside = {name: name for name in ("pos_embed", "proj_out_1", "proj_out_2")}
    return {"kept": kept, "config": {"num_layers": len(kept)}, "blocks": outside | dict(pairs), "features": pairs}


def spaced_blocks(depth: int, of: int) -> list[int]:
    """Evenly spaced blocks, the last among them: the published pairs of TinyDiT-D14 (2i + 1) and D7 (4i + 3)."""
    return [(index + 1) * of // depth - 1 for index in range(depth)]


def read_student(args: argparse.Namespace, depth: int) -> dict:
    """The student's recipe. For `--student_depth` its blocks are not yet the measured ones: see [`choose_blocks`].

    Args:
        depth: Blocks of the teacher, 0 without one.
    """
    if args.keep_blocks is not None:
        try:
            kept = sorted(int(number) for number in args.keep_blocks.split(","))
        except ValueError:
            fail(f"--keep_blocks {args.keep_blocks} is no list of blocks; pass numbers such as 0,2,4")
        missing = [block for block in kept if not 0 <= block < depth]
        if missing:
            fail(f"--keep_blocks {args.keep_blocks}: there is no block {missing[0]}; pass some of 0 to {depth - 1}")
        if len(set(kept)) < len(kept):
            fail(f"--keep_blocks {args.keep_blocks} repeats a block; pass each once")
        return depth_recipe(kept)
    recipe = {"depth": args.student_depth}
    if args.student is not None:
        recipe = lift_utils.read_recipe(args, STUDENTS, ("config", "blocks", "features"))
    if recipe is None:
        fail(f"--student {args.student} is unknown; pass {', '.join(STUDENTS)}, or a .json file")
    if "depth" not in recipe:
        return recipe
    if not 1 <= recipe["depth"] <= depth:
        flag = f"--student {args.student}" if args.student else f"--student_depth {args.student_depth}"
        fail(f"{flag}: the teacher has {depth} blocks; keep 1 to {depth}")
    return depth_recipe(spaced_blocks(recipe["depth"], depth))


def student_config(teacher_config: dict, recipe: dict) -> dict:
    """The teacher's config with the recipe's overrides. `DiTPipeline` wants out_channels spelled out."""
    # "_use_default_values" among the private entries would make from_config ignore overrides.
    config = {key: value for key, value in teacher_config.items() if not key.startswith("_")}
    overrides = recipe.get("config", {})
    unknown = [key for key in overrides if key not in inspect.signature(DiTTransformer2DModel.__init__).parameters]
    if unknown:
        raise ValueError(f"the transformer's config has no {', '.join(unknown)}")
    config |= overrides
    return config | {"out_channels": config.get("out_channels") or config.get("in_channels", 4)}


def build_student(teacher: DiTTransformer2DModel | None, args: argparse.Namespace):
    """The student on the meta device and its recipe, both checked against the teacher's skeleton."""
    recipe = read_student(args, teacher.config.num_layers if teacher is not None else 0)
    misfit = f"--student {args.student} does not fit"
    try:
        with torch.device("meta"):
            config = student_config(dict(teacher.config) if teacher is not None else {}, recipe)
            student = DiTTransformer2DModel.from_config(config)
        if teacher is not None and args.student_init == "teacher" and "blocks" in recipe:
            lift_utils.copy_blocks(student, teacher.state_dict(), recipe["blocks"])
    except (ValueError, TypeError, ZeroDivisionError, KeyError, NotImplementedError) as error:
        fail(f"{misfit}: {lift_utils.reason(error)}; correct the JSON file")
    if teacher is not None:
        theirs = student_config(dict(teacher.config), {})
        for key in ("in_channels", "out_channels", "sample_size", "num_embeds_ada_norm"):
            if student.config[key] != theirs[key]:
                fail(f"{misfit}: its {key} is {student.config[key]}; keep the teacher's {theirs[key]}")
    ours, out = student.config.in_channels, student.config.out_channels
    if out not in (ours, 2 * ours):
        fail(f"{misfit}: {ours} channels become {out}; pass {ours}, or {2 * ours} with a learned variance")
    if teacher is None or args.kd_loss == "none" or args.lambda_kd_feat == 0:
        recipe = {**recipe, "features": []}
    if "features" not in recipe:
        both = range(min(student.config.num_layers, teacher.config.num_layers))
        recipe = {**recipe, "features": [[f"transformer_blocks.{index}"] * 2 for index in both]}
    lift_utils.pair_features(student, teacher, recipe["features"], example_inputs(student))
    return student, recipe


def check_sizes(student: DiTTransformer2DModel, vae: AutoencoderKL, args: argparse.Namespace) -> None:
    """Refuse channels and groups with which no step could be taken."""
    if vae.config.latent_channels != student.config.in_channels or vae.config.in_channels not in (1, 3):
        fail(
            f"--vae {args.vae} makes {vae.config.latent_channels} channels of images with {vae.config.in_channels}, "
            f"the transformer takes {student.config.in_channels}; pass a pair that fits, of grey or RGB images"
        )
    if args.kd_loss == "place":
        try:
            check_group_size(args.group_size, student.config.sample_size**2)
        except ValueError as error:
            fail(f"--group_size {args.group_size}: {error}")


@torch.no_grad()
def choose_blocks(teacher, dataset, encoder, scheduler, args, accelerator) -> list[int]:
    """The teacher's `--student_depth` blocks of largest influence, measured on noisy images of all classes.

    Images, noise and timesteps go by the seed alone: every process, and a resumed run, chooses the same blocks.
    """
    lift_utils.seed_step(args.seed)
    rows = range(0, len(dataset), math.ceil(len(dataset) / MEASURED_IMAGES))
    loader = torch.utils.data.DataLoader(torch.utils.data.Subset(dataset, rows), args.train_batch_size)
    teacher.to(accelerator.device).eval()

    def run() -> None:
        for batch in loader:
            batch = {name: value.to(accelerator.device) for name, value in batch.items()}
            _, noisy, _, timesteps = draw_noisy(batch, encoder, scheduler, args)
            teacher(noisy, timesteps, batch["labels"])

    influence = lift_utils.measure_influence(teacher.transformer_blocks, run)
    by_influence = sorted(range(len(influence)), key=influence.__getitem__)
    kept = sorted(by_influence[-args.student_depth :])
    logger.info(f"influence of the teacher's blocks: {', '.join(f'{value:.4f}' for value in influence)}")
    logger.info(f"the student keeps {', '.join(map(str, kept))}: the same as --keep_blocks {','.join(map(str, kept))}")
    if accelerator.is_main_process:
        lift_utils.plot_influence(influence, kept, Path(args.output_dir) / "influence.png")
    return kept


def fill_student(student: DiTTransformer2DModel, teacher: DiTTransformer2DModel, recipe: dict, args) -> None:
    """Put the teacher's weights into the student as `--student_init` and the recipe say."""
    if args.student_init == "random":
        logger.info("the student starts from random weights")
    else:
        fresh = lift_utils.copy_blocks(student, teacher.state_dict(), recipe.get("blocks"))
        logger.info(f"{len(fresh)} tensors of the student start from random weights: {', '.join(fresh) or 'none'}")


def keep_labels(transformer: DiTTransformer2DModel) -> None:
    """Stop the label embeddings from dropping labels while training, each block others; see [`compute_losses`].

    Only the live modules change: config and weights, the null class's among them, stay as they are.
    """
    for module in transformer.modules():
        if isinstance(module, LabelEmbedding):
            module.dropout_prob = 0.0


def example_inputs(transformer: DiTTransformer2DModel) -> dict[str, torch.Tensor]:
    """Arguments of the transformer's forward pass on one image, on the meta device."""
    side = transformer.config.sample_size
    with torch.device("meta"):
        return {
            "hidden_states": torch.zeros(1, transformer.config.in_channels, side, side),
            "timestep": torch.zeros(1, dtype=torch.long),
            "class_labels": torch.zeros(1, dtype=torch.long),
        }


# ------------------------------------------------------------------------------------------------------------ the data


def make_dataset(args: argparse.Namespace, classes: int, channels: int, side: int):
    """A dataset of `{"images": uint8 (channels, side, side), "labels": int}`, and what tells it from others.

    Args:
        classes: Of the model. A label that is none of 0, ..., classes - 1 ends the run.

    Returns:
        The dataset, its key for the cache, and the names of its classes by number.
    """
    image, column = args.image_column, args.label_column
    dataset, source = lift_utils.load_data(args, ["image_column", "label_column"])
    kind, numbers, names = dataset.features[column], None, {}
    if isinstance(kind, datasets.ClassLabel):
        # Sorted as text, "10" comes before "2".
        numbers = [int(name) for name in kind.names] if all(name.isdecimal() for name in kind.names) else None
        names = dict(zip(numbers or range(len(kind.names)), kind.names))
    elif not (isinstance(kind, datasets.Value) and "int" in kind.dtype):
        fail(f"--label_column {column} holds {kind}; pass a column of class numbers, or a sub-folder per class")
    labels = list(dataset[column])
    if numbers is not None:  # -1 is how `datasets` marks what has no label
        labels = [label if label in (None, -1) else numbers[label] for label in labels]
    wrong = [row for row, label in enumerate(labels) if label is None or not 0 <= label < classes]
    if wrong:
        found = f"{len(wrong)} of {len(labels)} labels are none of the model's 0 to {classes - 1}"
        fail(f"--label_column {column}: {found}, the first {labels[wrong[0]]} in row {wrong[0]}; correct them")
    if names and numbers is None and len(names) != classes:
        logger.warning(f"the data have {len(names)} classes, the model {classes}: class i is the i-th name")
    dataset = lift_utils.drop_unreadable(dataset, image, source, args)
    contents = {"data": dataset._fingerprint, "image": image, "label": column}
    mode = "L" if channels == 1 else "RGB"
    load = partial(load_examples, image=image, label=column, numbers=numbers, mode=mode, side=side)
    return dataset.with_transform(load), contents, names


def load_examples(batch: dict, image: str, label: str, numbers: list[int] | None, mode: str, side: int) -> dict:
    """Decode, resize the shorter side and crop the centre."""
    transform = v2.Compose([v2.Resize(side, v2.InterpolationMode.LANCZOS), v2.CenterCrop(side), v2.PILToTensor()])
    images = [transform(lift_utils.open_image(record, mode)) for record in batch[image]]
    return {"images": images, "labels": [numbers[each] if numbers else each for each in batch[label]]}


class Encoder:
    """The frozen VAE in the precision of the run, on its device; without one, images are their own latents."""

    def __init__(self, vae: AutoencoderKL | None, device: torch.device, dtype: torch.dtype):
        self.device, self.dtype = device, dtype
        self.vae = lift_utils.freeze(copy.deepcopy(vae), device, dtype) if vae is not None else None

    @torch.no_grad()
    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        """Mean and standard deviation of the scaled latents, (B, 2, C, h, w), of uint8 images (B, 1 or 3, H, W)."""
        images = images.to(self.device).float() / 127.5 - 1
        if self.vae is None:
            return torch.stack([images, torch.zeros_like(images)], dim=1)
        latents = self.vae.encode(images.to(self.dtype)).latent_dist
        return torch.stack([latents.mean, latents.std], dim=1) * self.vae.config.scaling_factor


def cache_latents(dataset, vae: AutoencoderKL, contents: dict, side: int, args, accelerator, dtype):
    """The dataset as `{"moments": (flips, 2, C, h, w), "labels": ()}`; the VAE runs once."""

    def load_encoder():
        encoder = Encoder(vae, accelerator.device, dtype)

        def encode(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            views = [batch["images"]] + ([batch["images"].flip(-1)] if args.random_flip else [])
            return {
                "moments": torch.stack([encoder.encode_images(view) for view in views], dim=1),
                "labels": batch["labels"],
            }

        return encode

    key = (
        lift_utils.identify(args.pretrained_teacher_model, args.teacher_revision, ["vae"])
        if args.vae is None
        else lift_utils.identify(args.vae, None, ["."])
    )
    key |= {"dtype": str(dtype), "resolution": side, "crop": "centre", "both flips": args.random_flip}
    return lift_utils.cache_encodings(
        dataset, load_encoder, {**key, "variant": args.variant, **contents}, args, accelerator
    )


# ------------------------------------------------------------------------------------------------------- the algorithm


class ReverseProcess:
    """The Gaussians p(x_{t-1} | x_t) of DDPM with a learned variance (Nichol & Dhariwal, ICML 2021), in float32.

    The model's variance channels v interpolate between the logarithms of the smallest and the largest variance: -1 is
    the posterior's, 1 is β_t. Its mean carries no gradient here: from these Gaussians the variance alone learns.
    """

    def __init__(self, scheduler: DDPMScheduler, device: torch.device):
        betas = scheduler.betas.double()
        kept = (1 - betas).cumprod(0)
        before = F.pad(kept[:-1], (1, 0), value=1.0)
        smallest = betas * (1 - before) / (1 - kept)
        smallest[0] = smallest[1]  # which is 0: its logarithm is not finite
        tables = {
            "signal": kept.sqrt(),
            "noise": (1 - kept).sqrt(),
            "from_clean": betas * before.sqrt() / (1 - kept),
            "from_noisy": (1 - before) * (1 - betas).sqrt() / (1 - kept),
            "smallest": smallest.log(),
            "largest": betas.log(),
        }
        self.tables = {name: table.float().to(device) for name, table in tables.items()}
        self.prediction_type = scheduler.config.prediction_type

    def at(self, name: str, timesteps: torch.Tensor) -> torch.Tensor:
        return self.tables[name][timesteps].view(-1, 1, 1, 1)

    def posterior(self, clean, noisy, timesteps) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log-variance of q(x_{t-1} | x_t, x_0)."""
        mean = self.at("from_clean", timesteps) * clean + self.at("from_noisy", timesteps) * noisy
        return mean, self.at("smallest", timesteps)

    def predicted(self, prediction, variance, noisy, timesteps) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean, detached, and log-variance of the model's p(x_{t-1} | x_t), of the two halves of its output."""
        prediction, noisy = prediction.detach().float(), noisy.float()
        signal, noise = self.at("signal", timesteps), self.at("noise", timesteps)
        if self.prediction_type == "epsilon":
            clean = (noisy - noise * prediction) / signal
        elif self.prediction_type == "v_prediction":
            clean = signal * noisy - noise * prediction
        else:
            clean = prediction
        smallest, largest = self.at("smallest", timesteps), self.at("largest", timesteps)
        return self.posterior(clean, noisy, timesteps)[0], smallest + (variance.float() + 1) / 2 * (largest - smallest)


def gaussian_kl(of: tuple[torch.Tensor, torch.Tensor], to: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """KL(of ‖ to) of Gaussians (mean, log-variance), (B, C, h, w), in bits per dimension, (B,)."""
    (mean, log), (other_mean, other_log) = of, to
    nats = 0.5 * (other_log - log - 1 + (log - other_log).exp() + (mean - other_mean).square() * (-other_log).exp())
    return nats.flatten(1).mean(1) / math.log(2)


def decoder_nll(clean: torch.Tensor, gaussian: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """-log p(x_0) in bits per dimension, (B,), x_0 in bins of 2/255 whose ends reach to infinity (as for pixels)."""
    mean, log_variance = gaussian
    # Mirrored so that both distribution functions are small, where float32 tells them apart.
    side = torch.where(clean > mean, -1.0, 1.0)
    distance, scale = side * (clean - mean), (-0.5 * log_variance).exp() / math.sqrt(2)
    upper = 0.5 * torch.erfc((-distance - 1 / 255) * scale)  # torch.special.ndtr loses the tails
    lower = 0.5 * torch.erfc((-distance + 1 / 255) * scale)
    outer = side * clean  # the bins at ±1 are open, on the side that the mirror may have turned over
    upper = torch.where(outer > 0.999, 1.0, upper)
    lower = torch.where(outer < -0.999, 0.0, lower)
    return -(upper - lower).clamp(min=1e-12).log().flatten(1).mean(1) / math.log(2)


def variational_bound(process: ReverseProcess, prediction, variance, clean, noisy, timesteps) -> torch.Tensor:
    """The variational bound's term at each timestep, averaged over the batch, in bits per dimension.

    KL(q(x_{t-1} | x_t, x_0) ‖ p(x_{t-1} | x_t)), and at t = 0 -log p(x_0 | x_1). The mean is detached: the variance
    channels alone learn from it, as in improved DDPM and DiT.
    """
    model = process.predicted(prediction, variance, noisy, timesteps)
    kl = gaussian_kl(process.posterior(clean, noisy, timesteps), model)
    return torch.where(timesteps == 0, decoder_nll(clean, model), kl).mean()


def variance_kd(process: ReverseProcess, ours, theirs, noisy, timesteps) -> torch.Tensor:
    """KL of the teacher's p(x_{t-1} | x_t) to the student's, averaged over the batch, in bits per dimension.

    It is the variational bound with the teacher in the place of the data. The student's mean is detached: the variance
    channels alone learn from it, the prediction learns from the output term.

    Args:
        ours, theirs: Both halves of the output, (prediction, variance), of student and teacher.
    """
    return gaussian_kl(process.predicted(*theirs, noisy, timesteps), process.predicted(*ours, noisy, timesteps)).mean()


def masked_mse(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """Mean squared difference of tokens (B, N, C) over the elements that are no outlier in either of them.

    An element is an outlier if it is more than two standard deviations from the mean, both over all elements of its
    sample in its own tensor. A transformer's few massive activations would make up most of the difference.
    """
    ours, theirs = ours.float(), theirs.float()
    usual = torch.ones_like(ours, dtype=torch.bool)
    for tokens in (ours.detach(), theirs):
        deviation = (tokens - tokens.mean((1, 2), keepdim=True)).abs()
        usual &= deviation <= 2 * deviation.square().mean((1, 2), keepdim=True).sqrt()
    return ((ours - theirs).square() * usual).sum() / usual.sum().clamp(min=1)


def encode_batch(batch: dict[str, torch.Tensor], encoder: Encoder | None, args) -> torch.Tensor:
    """Moments (B, 2, C, h, w) of a batch, cached or computed now; images flipped or not."""
    labels = batch["labels"]
    flip = torch.rand(len(labels), device=labels.device) < 0.5
    if not args.random_flip:
        flip = torch.zeros_like(flip)
    if encoder is None:
        return batch["moments"][torch.arange(len(labels), device=labels.device), flip.long()]
    return encoder.encode_images(torch.where(flip[:, None, None, None], batch["images"].flip(-1), batch["images"]))


def draw_noisy(batch: dict[str, torch.Tensor], encoder: Encoder | None, scheduler: DDPMScheduler, args):
    """Latents, noisy latents and what the model must predict on them, (B, C, h, w); timesteps (B,)."""
    mean, std = encode_batch(batch, encoder, args).float().contiguous().unbind(1)  # randn_like follows the layout
    latents = mean + std * torch.randn_like(mean)
    noise = torch.randn_like(latents)
    timesteps = torch.randint(scheduler.config.num_train_timesteps, (len(latents),), device=latents.device)
    noisy = scheduler.add_noise(latents, noise, timesteps)
    if scheduler.config.prediction_type == "v_prediction":
        return latents, noisy, scheduler.get_velocity(latents, noise, timesteps), timesteps
    return latents, noisy, noise if scheduler.config.prediction_type == "epsilon" else latents, timesteps


def split_output(output: torch.Tensor, channels: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The prediction and, where the model learned it, the variance."""
    return (output, None) if output.shape[1] == channels else tuple(output.chunk(2, dim=1))


def compute_losses(
    student: FeatureModel,
    teacher: FeatureModel | None,
    batch: dict[str, torch.Tensor],
    progress: float,
    encoder: Encoder | None,
    scheduler: DDPMScheduler,
    process: ReverseProcess,
    null_class: int,
    args: argparse.Namespace,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """One micro-batch's loss and its parts, as tensors that stay on the device.

    (1 - α) · (task + vb) + α · (kd + kd_vb) + β · feat, where β falls from `--lambda_kd_feat` to 0 over the run.

    Args:
        batch: With "labels", and "images" or cached "moments".
        progress: Share of the run that is done, for the scheduled weights.
        encoder: `None` for a cached batch.
        null_class: What a dropped label becomes.
    """
    latents, noisy, target, timesteps = draw_noisy(batch, encoder, scheduler, args)
    dropped = torch.rand(len(latents), device=latents.device) < args.label_dropout
    labels = torch.where(dropped, null_class, batch["labels"])  # the same for student and teacher

    output, features = student(noisy, timesteps, labels)
    prediction, variance = split_output(output, latents.shape[1])
    task = F.mse_loss(prediction.float(), target)
    logs = {"task": task}
    if variance is not None:
        logs["vb"] = variational_bound(process, prediction, variance, latents, noisy, timesteps)
    loss = sum(logs.values())

    if args.kd_loss != "none":
        dtype = next(teacher.parameters()).dtype
        with torch.no_grad():
            output, wanted_features = teacher(noisy.to(dtype), timesteps, labels)
        wanted, wanted_variance = split_output(output, latents.shape[1])
        kd, parts = lift_utils.output_term(prediction, wanted, args, progress)
        logs |= {"kd": kd, **parts}
        if variance is not None:
            ours, theirs = (prediction, variance), (wanted, wanted_variance)
            logs["kd_vb"] = variance_kd(process, ours, theirs, noisy, timesteps)
            kd = kd + logs["kd_vb"]
        loss = (1 - args.kd_alpha) * loss + args.kd_alpha * kd
        if features:
            logs["feat"] = sum(masked_mse(ours, theirs) for ours, theirs in zip(features, wanted_features))
            loss = loss + args.lambda_kd_feat * (1 - progress) * logs["feat"]

    return loss, {"loss": loss, **logs}


# ---------------------------------------------------------------------------------------------- samples and the result


def read_classes(args: argparse.Namespace, classes: int, names: dict[int, str]) -> dict[int, str]:
    """The classes of the sample grid, number and label: `--validation_classes`, or the first eight."""
    numbers = {part.strip(): number for number, name in names.items() for part in [name, *name.split(",")]}
    shown = args.validation_classes or [str(number) for number in sorted(names or range(classes))[:8]]
    found = {}
    for entry in shown:
        number = int(entry) if entry.isdecimal() else numbers.get(entry, -1)
        if not 0 <= number < classes:
            fail(f"--validation_classes {entry} is no class; pass a number below {classes}, or a name of its classes")
        found[number] = names.get(number, f"class {number}")
    return found


@torch.no_grad()
def sample_images(transformer, vae, sampler, labels: list[int], args, accelerator) -> list[Image.Image]:
    """One guided sample per class, from the noise that `--seed` fixes, the same for every model.

    As `DiTPipeline` does it, but the null class is the model's own where that takes 1000 for it.

    Args:
        vae: In float32 on the device.
    """
    training, config, count, device = transformer.training, transformer.config, len(labels), accelerator.device
    transformer.eval()
    lift_utils.seed_step(args.seed)  # samplers may draw noise of their own
    latents = torch.randn(count, config.in_channels, config.sample_size, config.sample_size).to(device)
    classes = torch.tensor([*labels, *[config.num_embeds_ada_norm] * count], device=device)
    sampler.set_timesteps(args.num_inference_steps, device=device)
    for step in sampler.timesteps:
        both = sampler.scale_model_input(latents, step).repeat(2, 1, 1, 1).to(transformer.dtype)
        with accelerator.autocast():
            output = transformer(both, step.expand(2 * count), classes, return_dict=False)[0]
        wanted, unguided = split_output(output.float(), config.in_channels)[0].chunk(2)
        guided = unguided + args.guidance_scale * (wanted - unguided)
        latents = sampler.step(guided, step, latents).prev_sample
    images = vae.decode(latents / vae.config.scaling_factor).sample
    transformer.train(training)
    pixels = (images / 2 + 0.5).clamp(0, 1).cpu().permute(0, 2, 3, 1).numpy()
    return DiTPipeline.numpy_to_pil(pixels)


def log_validation(teacher, student, ema, cache, vae, sampler, shown, args, accelerator, step: int) -> None:
    """Samples of teacher, student and EMA student side by side, a row per class, all from the same noise.

    Args:
        cache: Keeps the teacher's samples between calls.
        sampler: The teacher's scheduler.
        shown: The classes and their labels.
    """
    vae = copy.deepcopy(vae).to(accelerator.device)

    def sample(transformer):
        return sample_images(transformer, vae, sampler, list(shown), args, accelerator)

    if teacher is not None and "teacher" not in cache:
        cache["teacher"] = sample(teacher)
    columns = {"teacher": cache["teacher"]} if teacher is not None else {}
    columns["student"] = sample(student)
    if ema is not None:
        with lift_utils.averaged_weights(ema, list(student.parameters())):
            columns["EMA student"] = sample(student)
    rows = [(label, [images[row] for images in columns.values()]) for row, label in enumerate(shown.values())]
    grid = lift_utils.labelled_grid(rows, scale=max(1, 64 // columns["student"][0].width), columns=list(columns))
    lift_utils.save_grid(grid, Path(args.output_dir), step, accelerator.trackers)


def save_pipeline(student, teacher, recipe: dict, vae, sampler, names: dict[int, str], args) -> None:
    """The pipeline folder with its VAE, scheduler and class names, model card, sample grid and curves.

    Args:
        teacher: Its skeleton, or `None`.
        names: Of the classes, by number.
    """
    output_dir = Path(args.output_dir)
    pipeline = DiTPipeline(student, vae, sampler)
    # The pipeline reads this from its index when it loads, but does not write it there.
    pipeline.register_to_config(id2label={str(number): name for number, name in names.items()})
    pipeline.save_pretrained(output_dir)
    if args.save_fp16_variant:
        for model in (student, vae):
            model.half()
        pipeline.save_pretrained(output_dir, variant="fp16")

    ours = student.num_parameters()
    if teacher is None:
        facts = [f"- Trained from scratch, {ours:,} parameters, {student.config.num_layers} blocks."]
    else:
        theirs = teacher.num_parameters()
        blocks = f"its {teacher.config.num_layers} blocks"
        kept = (
            f"{', '.join(map(str, recipe['kept']))} of {blocks}" if "kept" in recipe else f"{args.student} of {blocks}"
        )
        facts = [
            f"- Teacher: `{args.pretrained_teacher_model}`, {theirs:,} parameters.",
            f"- Student: {ours:,} parameters, {ours / theirs:.1%} of the teacher's: {kept}, initialised by "
            f"{args.student_init}.",
            f"- Weights: {args.kd_alpha} for the teacher's output and variance, the rest of 1 for the data.",
        ]
    side = student.config.sample_size * lift_utils.vae_factor(vae)
    space = "pixels, behind a VAE that changes nothing" if args.vae == "none" else "latents"
    facts.append(f"- Images of {side} pixels as {space}; {args.label_dropout:.0%} of the labels dropped.")
    null, guidance = student.config.num_embeds_ada_norm, args.guidance_scale
    if null != 1000:
        remedy = "cannot guide this model; `sample_images` of train_lift_dit.py can."
        facts.append(f"- The null class is {null}: `DiTPipeline`, which takes 1000 for it, {remedy}")
        guidance = 1.0
    name = args.hub_model_id or output_dir.name
    usage = f'from diffusers import DiTPipeline\n\npipeline = DiTPipeline.from_pretrained("{name}")\n'
    usage += f"image = pipeline(class_labels=[0], guidance_scale={guidance}).images[0]"
    kind = "A class-conditional diffusion transformer"
    lift_utils.write_model_card(output_dir, args, kind, facts, usage, ["class-conditional-image-generation"])


def print_dry_run(student, teacher, vae, args: argparse.Namespace) -> None:
    """Print parameters, MACs, a memory estimate and the student's config. All models are skeletons."""
    ours, theirs, inputs = student.num_parameters(), 0, example_inputs(student)

    def make() -> DiTTransformer2DModel:
        with torch.device("meta"):
            return DiTTransformer2DModel.from_config(student.config)

    macs, *activations = lift_utils.estimate_activations(make, args.gradient_checkpointing, **inputs)
    print(f"student: {ours:,} parameters, {macs:,} MACs per image and forward pass")
    if teacher is not None:
        theirs = teacher.num_parameters()
        macs, *_ = lift_utils.profile_forward(teacher.requires_grad_(False), **inputs)
        print(f"teacher: {theirs:,} parameters, {macs:,} MACs; the student is {ours / theirs:.2%} of it")
    encoders = 0 if args.cache_latents or args.vae == "none" else vae.num_parameters()
    shown = theirs if args.kd_loss != "none" else 0
    lift_utils.print_memory_estimate(args, activations, ours, shown, encoders=encoders)
    print(json.dumps({key: value for key, value in student.config.items() if not key.startswith("_")}, indent=2))


# ------------------------------------------------------------------------------------------------------------- the run


def main(args: argparse.Namespace) -> None:
    """Set up, train, save."""
    # ---- models
    accelerator = lift_utils.make_accelerator(args)
    sampler, names = check_pipeline(args)
    teacher_shape = None
    if args.pretrained_teacher_model is not None:
        teacher_shape = lift_utils.load_skeleton(args, DiTTransformer2DModel, "transformer", EXPECTED)
    student_shape, recipe = build_student(teacher_shape, args)
    vae = load_vae(args, student_shape.config.in_channels)
    check_sizes(student_shape, vae, args)
    if args.dry_run:
        return print_dry_run(student_shape, teacher_shape, vae, args)
    scheduler, sampler = load_scheduler(args, DDPMScheduler), load_scheduler(args, sampler)
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
    classes, side = (
        student_shape.config.num_embeds_ada_norm,
        student_shape.config.sample_size * lift_utils.vae_factor(vae),
    )
    with accelerator.main_process_first():
        dataset, contents, found = make_dataset(args, classes, vae.config.in_channels, side)
    names = names or found
    shown = read_classes(args, classes, names)
    encoder = None
    if args.cache_latents:
        dataset = cache_latents(dataset, vae, contents, side, args, accelerator, dtype)
    else:
        encoder = Encoder(None if args.vae == "none" else vae, accelerator.device, dtype)
    dataloader = lift_utils.make_dataloader(dataset, args, accelerator)

    # ---- student
    teacher = None
    if teacher_shape is not None:
        teacher = lift_utils.load_part(args, DiTTransformer2DModel, "transformer", EXPECTED)
    if args.student_depth is not None:
        chosen = depth_recipe(choose_blocks(teacher, dataset, encoder, scheduler, args, accelerator))
        recipe = {**chosen, "features": chosen["features"] if recipe["features"] else []}
    lift_utils.seed_step(args.seed)
    transformer = DiTTransformer2DModel.from_config(student_shape.config)
    if teacher is not None:
        fill_student(transformer, teacher, recipe, args)
    if args.kd_loss == "none":
        teacher = None
    student, teacher_model = lift_utils.pair_features(
        transformer, teacher, recipe["features"], example_inputs(transformer)
    )
    keep_labels(transformer)
    if args.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    if args.enable_xformers_memory_efficient_attention:
        for model in filter(None, (transformer, teacher)):
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
    process = ReverseProcess(scheduler, accelerator.device)
    losses_of = partial(
        compute_losses,
        student,
        teacher_model,
        encoder=encoder,
        scheduler=scheduler,
        process=process,
        null_class=classes,
        args=args,
    )
    validate = partial(log_validation, teacher, transformer, ema, {}, vae, sampler, shown, args, accelerator)

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
        save_pipeline(transformer, teacher_shape, recipe, vae, sampler, names, args)
        if args.push_to_hub:
            lift_utils.push_to_hub(output_dir, args.hub_model_id)
    accelerator.end_training()


if __name__ == "__main__":
    main(parse_args())
