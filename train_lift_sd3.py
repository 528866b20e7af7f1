# Copyright 2026 The LIFT and PLACE distillation authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Distil Stable Diffusion 3 or 3.5 (SD3Transformer2DModel, rectified flow) into a shallower MMDiT with LIFT and PLACE.

The student is the teacher's config with fewer joint blocks, filled with the teacher's. It learns the velocity from
images with captions, from the teacher's velocity and from the image tokens of the teacher's blocks. The folder that
comes out is a whole pipeline: `StableDiffusion3Pipeline.from_pretrained`. Half of SD3-medium's depth, on 24 GB:

    accelerate launch --mixed_precision bf16 train_lift_sd3.py --student half --train_data_dir images \\
        --resolution 512 --use_8bit_adam --gradient_checkpointing --output_dir sd3-half

and on 12 GB, with one set of weights for teacher and student:

    accelerate launch --mixed_precision bf16 train_lift_sd3.py --student half --train_data_dir images \\
        --resolution 512 --lora_rank 64 --share_backbone --no_t5 --gradient_checkpointing --output_dir sd3-half-lora

`images` holds pictures and a metadata.jsonl with a line {"file_name": "a.jpg", "text": "a caption"} for each. The VAE
and the text encoders run once, beforehand, one after the other; none of them is in memory during training. The default
teacher is gated: accept its terms on the Hub, then log in with `hf auth login`. Without distillation the script trains
a pipeline's own transformer: `--kd_loss none --student whole --student_init random`.
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
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    ModelMixin,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from diffusers.optimization import get_scheduler
from diffusers.training_utils import (
    EMAModel,
    cast_training_params,
    compute_density_for_timestep_sampling,
    compute_loss_weighting_for_sd3,
)
from PIL import Image
from torchvision.transforms import v2
from tqdm.auto import tqdm
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

import lift_utils
from lift_utils import FeatureModel, check_group_size, fail


logger = get_logger(__name__)

TEACHER = "stabilityai/stable-diffusion-3-medium-diffusers"
EXPECTED = (
    f"pass a Stable Diffusion 3 or 3.5 pipeline with safetensors weights: a folder, or a Hub id such as {TEACHER}"
)
PARTS = {  # of the pipeline, and their classes where no other will do
    "transformer": "SD3Transformer2DModel",
    "vae": "AutoencoderKL",
    "scheduler": None,
}
CLIPS = ("text_encoder", "text_encoder_2")
T5 = "text_encoder_3"
TEXT_ENCODERS = {  # any of them may be absent: config, model, tokenizer and its place in the pipeline
    CLIPS[0]: (CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer, "tokenizer"),
    CLIPS[1]: (CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer, "tokenizer_2"),
    T5: (T5Config, T5EncoderModel, T5TokenizerFast, "tokenizer_3"),
}
CLIP_TOKENS = 77  # of the zeros that stand for absent CLIP encoders

# One of so many joint blocks is kept, evenly spaced, the last among them: of the 2,028.3M parameters of SD3-medium
# 1,008.6M, 668.6M and 328.7M; of the 2,243.2M of SD3.5-medium 1,107.7M, 734.7M and 361.8M; of the 8,056.6M of
# SD3.5-large 4,009.6M, 2,518.6M and 1,240.6M.
STUDENTS = {"whole": {"one_of": 1}, "half": {"one_of": 2}, "third": {"one_of": 3}, "sixth": {"one_of": 6}}

# What the blocks of teacher and student have in common.
OUTER = ("pos_embed", "time_text_embed", "context_embedder", "norm_out", "proj_out")

LORA_TARGETS = [
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
    *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    *("attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0"),
    *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
]

# Images on which --student_depth measures what each block does.
INFLUENCE_IMAGES = 64

SHOWN = ("loss", "coarse", "fine", "weight")  # beside the progress bar


# ------------------------------------------------------------------------------------------------------- the arguments


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line (or `input_args`); the defaults are ours, as nobody has published a recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=lift_utils.HelpFormatter)
    switch = argparse.BooleanOptionalAction

    group = parser.add_argument_group("models")
    group.add_argument("--pretrained_teacher_model", default=TEACHER, help="SD 3 or 3.5: a folder or Hub id")
    group.add_argument("--teacher_revision", help="branch, tag or commit of the teacher on the Hub")
    group.add_argument("--variant", help="weights variant of the teacher, e.g. fp16")
    group.add_argument("--student", help=f"{', '.join(STUDENTS)} of the blocks, or a JSON file (default: half)")
    group.add_argument(
        "--keep_blocks", help="instead: the teacher's blocks to keep, e.g. 0,5,11,23; its last among them"
    )
    group.add_argument(
        "--student_depth", type=int, help="instead: so many blocks, those of most influence on the data"
    )
    group.add_argument(
        "--student_init", default="teacher", choices=("teacher", "random"), help="the teacher's blocks, or fresh ones"
    )
    group.add_argument("--no_t5", action="store_true", help="leave the T5 encoder out: zeros stand for it")
    group.add_argument("--max_sequence_length", type=int, default=256, help="tokens of the T5 encoder")

    group = parser.add_argument_group("data")
    group.add_argument("--dataset_name", help="dataset on the Hub")
    group.add_argument("--dataset_config_name", help="its configuration")
    group.add_argument("--train_data_dir", help="folder of images with captions in its metadata.jsonl")
    group.add_argument("--image_column", default="image", help="column of the images")
    group.add_argument("--caption_column", default="text", help="column of the captions")
    group.add_argument("--cache_dir", help="where datasets keeps its files, and cached encodings go")
    group.add_argument("--max_train_samples", type=int, help="train on so many images, chosen by the seed")
    group.add_argument(
        "--max_unreadable", type=float, default=0.01, help="share of images to leave out as unreadable or uncaptioned"
    )
    group.add_argument("--resolution", type=int, help="side of the training images (default: the teacher's)")
    group.add_argument("--random_flip", action=switch, default=False, help="mirror images at random")
    group.add_argument("--caption_dropout", type=float, default=0.1, help="share of captions emptied, for guidance")
    group.add_argument(
        "--cache_latents", action=switch, default=True, help="run the VAE and the text encoders once, beforehand"
    )
    group.add_argument("--encoding_batch_size", type=int, default=4, help="images at a time while doing so")
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
    group.add_argument(
        "--lambda_kd_feat", type=float, default=0.1, help="weight of the blocks' image tokens, relative"
    )
    group.add_argument(
        "--weighting_scheme",
        default="logit_normal",
        choices=("sigma_sqrt", "logit_normal", "mode", "cosmap", "none"),
        help="how noise levels are drawn (logit_normal, mode) or the loss on the data is weighted (the others)",
    )
    group.add_argument("--logit_mean", type=float, default=0.0, help="mean of logit_normal")
    group.add_argument("--logit_std", type=float, default=1.0, help="standard deviation of logit_normal")
    group.add_argument("--mode_scale", type=float, default=1.29, help="scale of mode")

    group = parser.add_argument_group("training")
    group.add_argument("--output_dir", default="lift-sd3", help="where the student, checkpoints and metrics go")
    group.add_argument("--seed", type=int, default=0, help="of everything random")
    group.add_argument("--train_batch_size", type=int, default=4, help="images per device and micro-batch")
    group.add_argument("--gradient_accumulation_steps", type=int, default=8, help="micro-batches per step")
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
    group.add_argument(
        "--share_backbone", action="store_true", help="with --lora_rank: hold the teacher's weights once, for both"
    )
    group.add_argument("--use_8bit_adam", action="store_true", help="keep AdamW's moments in 8 bits (bitsandbytes)")
    group.add_argument("--use_ema", action=switch, default=True, help="save a moving average of the weights")
    group.add_argument("--ema_decay", type=float, default=0.9999, help="its decay, reached by warm-up")
    group.add_argument(
        "--mixed_precision", choices=("no", "fp16", "bf16"), help="default: the accelerate config's; bf16 is advised"
    )
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
    group.add_argument("--num_inference_steps", type=int, default=28, help="steps of the teacher's sampler")
    group.add_argument("--guidance_scale", type=float, default=7.0, help="classifier-free guidance of the samples")
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
    """Refuse what can be seen to be wrong before anything is loaded; no choice of blocks means `--student half`."""
    # The one flag that may be negative.
    lift_utils.check_args(argparse.Namespace(**{**vars(args), "logit_mean": 0.0}))
    if not args.caption_dropout <= 1:
        fail(f"--caption_dropout {args.caption_dropout} is no share of the captions; pass one such as 0.1")
    if args.lora_rank and importlib.util.find_spec("peft") is None:
        fail(f"--lora_rank {args.lora_rank} needs peft; pip install peft, or drop the flag")
    choices = {name: getattr(args, name) for name in ("student", "keep_blocks", "student_depth")}
    given = [f"--{name} {value}" for name, value in choices.items() if value is not None]
    if len(given) > 1:
        fail(f"{' and '.join(given)} both say which blocks the student has; pass one of them")
    if not given:
        args.student = "half"
    if args.keep_blocks is not None and not all(part.strip().isdecimal() for part in args.keep_blocks.split(",")):
        fail(f"--keep_blocks {args.keep_blocks} is no list of blocks; pass numbers such as 0,5,11,23")
    if not 0 < args.max_sequence_length <= 512:
        fail(f"--max_sequence_length {args.max_sequence_length} is not what the pipeline takes; pass 1 to 512")
    if args.share_backbone:
        needed = {
            "--lora_rank": args.lora_rank > 0,
            "--student_init teacher": args.student_init == "teacher",
            "a --kd_loss with a teacher": args.kd_loss != "none",
            "blocks of the teacher, not a JSON file": not (args.student or "").endswith(".json"),
        }
        missing = [name for name, met in needed.items() if not met]
        if missing:
            fail(f"--share_backbone needs {missing[0]}: the two may differ by adapters only; pass that, or drop it")


# ---------------------------------------------------------------------------------------------------------- the models


def check_pipeline(args: argparse.Namespace) -> tuple[str, list[str]]:
    """Refuse pipelines with other parts than those this script distils.

    Returns:
        The name of the sampler's class, and the text encoders that are there and wanted.
    """
    source = args.pretrained_teacher_model
    parts = lift_utils.from_teacher(args, DiffusionPipeline.load_config, EXPECTED)
    if not isinstance(parts, dict):
        fail(f"--pretrained_teacher_model {source} has a model_index.json that lists no parts; {EXPECTED}")
    kinds = {name: part[1] for name, part in parts.items() if isinstance(part, list)}
    texts = [name for name in TEXT_ENCODERS if kinds.get(name) is not None]
    expected = PARTS | {name: TEXT_ENCODERS[name][1].__name__ for name in texts}
    for name, kind in expected.items():
        if kinds.get(name) is None or kind not in (None, kinds[name]):
            fail(
                f"--pretrained_teacher_model {source} is a {parts.get('_class_name')} with {kinds.get(name) or 'no'} "
                f"{name}; {EXPECTED}"
            )
    scheduler = lift_utils.from_teacher(
        args, FlowMatchEulerDiscreteScheduler.load_config, EXPECTED, subfolder="scheduler"
    )
    odd = [key for key in ("use_dynamic_shifting", "invert_sigmas") if scheduler.get(key)]
    if odd or not kinds["scheduler"].startswith("FlowMatch") or not hasattr(diffusers, kinds["scheduler"]):
        what = f"{kinds['scheduler']}" + (f" with {odd[0]}" if odd else "")
        fail(f"--pretrained_teacher_model {source} has a {what}, not SD3's sigmas; give it a FlowMatchEuler scheduler")
    if args.no_t5 and T5 in texts:
        texts.remove(T5)
    if not texts:
        remedy = "drop --no_t5" if args.no_t5 else EXPECTED
        fail(f"--pretrained_teacher_model {source} has no text encoder to take captions; {remedy}")
    return kinds["scheduler"], texts


def check_teacher(teacher: SD3Transformer2DModel, vae: AutoencoderKL, texts: list[str], args) -> None:
    """Refuse teachers whose parts do not fit together."""
    config, latents = teacher.config, vae.config.latent_channels
    misfit = f"--pretrained_teacher_model {args.pretrained_teacher_model}: its transformer"
    if config.in_channels != latents or teacher.out_channels != latents:
        fail(
            f"{misfit} maps {config.in_channels} channels to {teacher.out_channels}, which is no velocity on the "
            f"{latents} channels of its VAE; {EXPECTED}"
        )
    sizes = {name: text_sizes(args, name) for name in texts}
    clips = [size for name, size in sizes.items() if name in CLIPS]
    tokens, pooled = (sum(widths) for widths in zip((0, 0), *clips))
    fits = pooled == config.pooled_projection_dim if len(clips) == 2 else pooled <= config.pooled_projection_dim
    if not fits or tokens > config.joint_attention_dim:
        fail(
            f"{misfit} takes embeddings of {config.joint_attention_dim} and pooled ones of "
            f"{config.pooled_projection_dim}; its CLIP encoders give {tokens} and {pooled}; {EXPECTED}"
        )
    if T5 in sizes and sizes[T5][0] != config.joint_attention_dim:
        fail(f"{misfit} takes embeddings of {config.joint_attention_dim}, its T5 gives {sizes[T5][0]}; pass --no_t5")


def text_sizes(args: argparse.Namespace, name: str) -> tuple[int, int]:
    """Widths of a text encoder's embeddings per token and of its pooled embedding."""
    config = lift_utils.from_teacher(args, TEXT_ENCODERS[name][0].from_pretrained, EXPECTED, subfolder=name)
    return (config.d_model, 0) if name == T5 else (config.hidden_size, config.projection_dim)


def spread_blocks(depth: int, teacher_depth: int) -> list[int]:
    """So many of the teacher's blocks, evenly spaced, its last among them."""
    return [(index + 1) * teacher_depth // depth - 1 for index in range(depth)]


def kept_blocks(teacher: SD3Transformer2DModel, args: argparse.Namespace, recipe: dict | None) -> list[int] | None:
    """The teacher's blocks that the flags keep, ascending; `None` for a JSON student.

    Where `--student_depth` chooses, it is an even spread that stands for the choice.
    """
    depth = len(teacher.transformer_blocks)
    if args.student_depth is not None:
        if not 0 < args.student_depth <= depth:
            fail(f"--student_depth {args.student_depth} is not possible; pass 1 to the teacher's {depth}")
        return spread_blocks(args.student_depth, depth)
    if args.keep_blocks is None:
        return spread_blocks(max(1, depth // recipe["one_of"]), depth) if "one_of" in recipe else None
    kept = [int(part) for part in args.keep_blocks.split(",")]
    for block in kept:
        if block >= depth:
            fail(f"--keep_blocks {args.keep_blocks}: there is no block {block}; the teacher has 0 to {depth - 1}")
        if kept.count(block) > 1:
            fail(f"--keep_blocks {args.keep_blocks} repeats block {block}; name each once")
    if kept != sorted(kept) or kept[-1] != depth - 1:
        remedy = f"the student's last block must be the teacher's last, {depth - 1}"
        fail(f"--keep_blocks {args.keep_blocks} does not ascend to {depth - 1}; {remedy}")
    return kept


def depth_recipe(teacher: SD3Transformer2DModel, kept: list[int]) -> dict:
    """What a JSON file would say of the student that keeps these blocks of the teacher.

    Blocks with a second attention over the image (SD3.5) are listed by position, so their list follows the blocks.
    """
    dual = set(teacher.config.dual_attention_layers)
    return {
        "config": {
            "num_layers": len(kept),
            "dual_attention_layers": [index for index, block in enumerate(kept) if block in dual],
        },
        "blocks": {name: name for name in OUTER}
        | {f"transformer_blocks.{index}": f"transformer_blocks.{block}" for index, block in enumerate(kept)},
        "kept": kept,
    }


def build_student(teacher: SD3Transformer2DModel, vae: AutoencoderKL, args: argparse.Namespace, kept=None):
    """The student on the meta device and its recipe, both checked against the skeletons of the teacher's parts.

    Args:
        kept: The blocks that `--student_depth` has chosen, once it has.
    """
    recipe = None
    if args.student is not None:
        recipe = lift_utils.read_recipe(args, STUDENTS, ("config", "blocks", "features"))
        if recipe is None:
            fail(f"--student {args.student} is unknown; pass {', '.join(STUDENTS)}, or a .json file")
    kept = kept or kept_blocks(teacher, args, recipe)
    if kept is not None:
        recipe = depth_recipe(teacher, kept)
    misfit = f"{'the student' if args.student is None else f'--student {args.student}'} does not fit the teacher"
    # "_use_default_values" among the private entries would make from_config ignore overrides.
    config = {key: value for key, value in teacher.config.items() if not key.startswith("_")}
    try:
        overrides = recipe.get("config", {})
        unknown = [key for key in overrides if key not in config]
        if unknown:
            raise ValueError(f"the transformer's config has no {', '.join(unknown)}")
        config |= overrides | {"sample_size": args.resolution // lift_utils.vae_factor(vae)}
        with torch.device("meta"):
            student = SD3Transformer2DModel.from_config(config)
        if args.student_init == "teacher" and "blocks" in recipe:
            lift_utils.copy_blocks(student, teacher.state_dict(), recipe["blocks"])
        check_sizes(student, vae, args)
        with torch.no_grad():
            student(**example_inputs(student, args))
    except (ValueError, TypeError, AttributeError, ZeroDivisionError, KeyError, IndexError, RuntimeError) as error:
        fail(f"{misfit}: {lift_utils.reason(error)}; correct the JSON file, or pass a preset")
    for key in ("in_channels", "out_channels", "joint_attention_dim", "pooled_projection_dim"):
        if student.config[key] != teacher.config[key]:
            fail(f"{misfit}: its {key} is {student.config[key]}; keep the teacher's {teacher.config[key]}")
    if "features" not in recipe:
        pairs = [list(pair) for pair in recipe.get("blocks", {}).items() if pair[0].startswith("transformer_blocks.")]
        recipe = {**recipe, "features": pairs}
    if args.kd_loss == "none" or args.lambda_kd_feat == 0:
        recipe = {**recipe, "features": []}
    lift_utils.pair_features(student, teacher, recipe["features"], example_inputs(student, args), item=1)
    return student, recipe


def check_sizes(student: SD3Transformer2DModel, vae: AutoencoderKL, args: argparse.Namespace) -> None:
    """Refuse resolutions and groups with which no step could be taken."""
    factor, most = lift_utils.vae_factor(vae) * student.config.patch_size, student.config.pos_embed_max_size
    if args.resolution % factor:
        fail(f"--resolution {args.resolution} is not divisible by VAE and patches; pass a multiple of {factor}")
    if args.resolution > factor * most:
        fail(
            f"--resolution {args.resolution} has more patches than the teacher's {most}; pass {factor * most} at most"
        )
    if args.kd_loss == "place":
        try:
            check_group_size(args.group_size, student.config.sample_size**2)
        except ValueError as error:
            fail(f"--group_size {args.group_size}: {error}")


def choose_blocks(dataset, config: dict, scheduler, no_text, encoders, args, accelerator) -> list[int]:
    """The `--student_depth` blocks of the teacher that change the image tokens most, its last always among them.

    The choice is kept as blocks.json, which a resumed run reads, and drawn as influence.png.
    """
    path, device = Path(args.output_dir) / "blocks.json", accelerator.device
    if path.exists():
        return json.loads(path.read_text())["kept"]
    dtype = lift_utils.working_dtype(accelerator)
    teacher = load_frozen(args, SD3Transformer2DModel, "transformer", device, dtype)
    lift_utils.seed_step(args.seed)
    rows = torch.utils.data.Subset(dataset, torch.randperm(len(dataset))[:INFLUENCE_IMAGES].tolist())

    def run() -> None:
        for batch in torch.utils.data.DataLoader(rows, batch_size=args.train_batch_size):
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            inputs, *_ = draw_inputs(batch, encoders, no_text, scheduler, config, args)
            teacher(**cast(inputs, dtype))

    influence = lift_utils.measure_influence(teacher.transformer_blocks, run, item=1)
    last = len(influence) - 1
    best = sorted(range(last), key=lambda block: influence[block], reverse=True)
    kept = sorted([*best[: args.student_depth - 1], last])
    table = ", ".join(f"{block}: {value:.3g}" for block, value in enumerate(influence))
    print(f"influence of the teacher's blocks on {len(rows)} images: {table}\nkept: {kept}", flush=True)
    lift_utils.plot_influence(influence, kept, path.with_name("influence.png"))
    path.write_text(json.dumps({"influence": influence, "kept": kept}))
    return kept


def fill_student(student: SD3Transformer2DModel, teacher: SD3Transformer2DModel, recipe: dict, args) -> None:
    """Put the teacher's weights into the student as `--student_init` and the recipe say."""
    if args.student_init == "random":
        logger.info("the student starts from random weights")
    else:
        fresh = lift_utils.copy_blocks(student, teacher.state_dict(), recipe.get("blocks"))
        logger.info(f"{len(fresh)} tensors of the student start from random weights: {', '.join(fresh) or 'none'}")


def share_weights(config: dict, teacher: SD3Transformer2DModel, recipe: dict) -> SD3Transformer2DModel:
    """A student whose tensors are the teacher's own: no weight of it takes memory.

    Its modules are its own. Adapters that are added to them are therefore always on in the student and never in the
    teacher, also while gradient checkpointing runs a block again.
    """
    with torch.device("meta"):
        student = SD3Transformer2DModel.from_config(config)
    weights = teacher.state_dict()
    source = {
        key: weights[block + key[len(prefix) :]]
        for key in student.state_dict()
        for prefix, block in recipe["blocks"].items()
        if key.startswith(prefix + ".")
    }
    student.load_state_dict(source, assign=True)
    return student


def add_adapters(student: SD3Transformer2DModel, rank: int, dtype: torch.dtype) -> None:
    """Freeze the student and give the attention and feed-forward layers of its blocks LoRA adapters in float32."""
    from peft import LoraConfig

    torch.nn.Module.to(student.requires_grad_(False), dtype)  # Diffusers' own `to` warns of a dtype
    student.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=LORA_TARGETS))
    cast_training_params(student, dtype=torch.float32)


def example_inputs(transformer: SD3Transformer2DModel, args: argparse.Namespace) -> dict[str, torch.Tensor]:
    """Arguments of the transformer's forward pass on one image, on the meta device."""
    config, side = transformer.config, transformer.config.sample_size
    with torch.device("meta"):
        return {
            "hidden_states": torch.zeros(1, config.in_channels, side, side),
            "timestep": torch.zeros(1),
            "encoder_hidden_states": torch.zeros(
                1, CLIP_TOKENS + args.max_sequence_length, config.joint_attention_dim
            ),
            "pooled_projections": torch.zeros(1, config.pooled_projection_dim),
        }


# ------------------------------------------------------------------------------------------------------------ the data


def make_dataset(args: argparse.Namespace, tokenizers: dict) -> tuple[datasets.Dataset, dict]:
    """A dataset of undecoded images with captions, and what tells its contents from others'.

    Unreadable images and images without a caption are left out.
    """
    caption = args.caption_column
    dataset, contents = lift_utils.load_captioned(args)

    captions, cut = list(dataset[caption]), []
    for name, tokenizer in tokenizers.items():
        limit = token_limit(tokenizer, name, args)
        long = sum(
            len(ids) > limit
            for start in range(0, len(captions), 10_000)
            for ids in tokenizer(captions[start : start + 10_000], verbose=False)["input_ids"]
        )
        if long:
            cut.append(f"{long} of {len(captions)} at {limit} tokens for {name}")
    if cut:
        logger.warning(f"captions are longer than a text encoder takes and are cut there: {', '.join(cut)}")
    return dataset, contents


def load_examples(
    batch: dict, args: argparse.Namespace, tokenizers: dict, images: bool
) -> dict[str, list[torch.Tensor]]:
    """What a part of the dataset's columns becomes: `{"images": uint8 (3, H, W)}`, `{encoder: token ids}`, or both."""
    loaded = {name: list(tokens) for name, tokens in tokenize(tokenizers, batch[args.caption_column], args).items()}
    if images:
        size = args.resolution
        transform = v2.Compose([v2.Resize(size, v2.InterpolationMode.LANCZOS), v2.CenterCrop(size), v2.PILToTensor()])
        loaded["images"] = [transform(lift_utils.open_image(record, "RGB")) for record in batch[args.image_column]]
    return loaded


def token_limit(tokenizer, name: str, args: argparse.Namespace) -> int:
    return args.max_sequence_length if name == T5 else tokenizer.model_max_length


def tokenize(tokenizers: dict, captions: list[str], args: argparse.Namespace) -> dict[str, torch.Tensor]:
    """Each text encoder's token ids, (B, its length), padded and cut."""
    return {
        name: tokenizer(
            captions,
            padding="max_length",
            truncation=True,
            max_length=token_limit(tokenizer, name, args),
            return_tensors="pt",
        )["input_ids"]
        for name, tokenizer in tokenizers.items()
    }


def load_tokenizer(args: argparse.Namespace, name: str):
    """A text encoder's tokenizer; one whose files are missing loads all the same, without words."""
    *_, kind, place = TEXT_ENCODERS[name]
    tokenizer = lift_utils.load_part(args, kind, place, EXPECTED)
    if name != T5 and tokenizer.model_max_length > 1_000_000:
        fail(f"--pretrained_teacher_model {args.pretrained_teacher_model} lacks files of its {place}; {EXPECTED}")
    return tokenizer


def load_frozen(args: argparse.Namespace, kind, name: str, device: torch.device, dtype: torch.dtype):
    """A part of the teacher's pipeline, read in the dtype: half of a T5-XXL in float32 is memory enough."""
    options = {"subfolder": name, "variant": args.variant, "use_safetensors": True}
    options["torch_dtype" if issubclass(kind, ModelMixin) else "dtype"] = dtype
    return lift_utils.freeze(lift_utils.from_teacher(args, kind.from_pretrained, EXPECTED, **options), device, dtype)


class Encoders:
    """The frozen VAE, in float32, and text encoders, in the precision of the run, on its device.

    Args:
        parts: Which of them.
    """

    def __init__(self, args: argparse.Namespace, parts: list[str], device: torch.device, dtype: torch.dtype):
        self.device = device
        self.models = {}
        for name in parts:
            if name == "vae":
                self.models[name] = load_frozen(args, AutoencoderKL, name, device, torch.float32)
            else:
                # T5 overflows in float16.
                safe = torch.bfloat16 if name == T5 and dtype == torch.float16 else dtype
                self.models[name] = load_frozen(args, TEXT_ENCODERS[name][1], name, device, safe)

    @torch.no_grad()
    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        """Mean and standard deviation of the scaled latents, (B, 2, C, h, w), of uint8 images (B, 3, H, W)."""
        vae = self.models["vae"]
        latents = vae.encode(images.to(self.device).float() / 127.5 - 1).latent_dist
        mean = latents.mean - (vae.config.shift_factor or 0)
        return torch.stack([mean, latents.std], dim=1) * vae.config.scaling_factor

    @torch.no_grad()
    def encode_text(self, tokens: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Each encoder's embeddings, (B, L, W), and the CLIP encoders' pooled ones, (B, P), of token ids (B, L)."""
        encoded = {}
        for name, model in self.models.items():
            if name == T5:
                encoded[name] = model(tokens[name].to(self.device))[0]
            elif name in CLIPS:
                output = model(tokens[name].to(self.device), output_hidden_states=True)
                encoded |= {name: output.hidden_states[-2], f"{name}.pooled": output.text_embeds}
        return encoded


class Joined(torch.utils.data.Dataset):
    """Datasets of the same rows with other columns each, as one."""

    def __init__(self, parts: list[datasets.Dataset]):
        self.parts = parts

    def __len__(self) -> int:
        return len(self.parts[0])

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: value for part in self.parts for name, value in part[index].items()}


def cache_encodings(dataset, prompts: list[str], contents: dict, tokenizers: dict, args, accelerator, dtype):
    """The dataset as `{"moments": (flips, 2, C, h, w)}` with the embeddings of each text encoder, and the prompts'.

    The VAE and the text encoders run one after the other, once; they are gone when this returns. Each has a cache of
    its own: another T5, or none, leaves the others as they are. Zeros are not stored.
    """

    def encoders(part: str):
        models = Encoders(args, [part], accelerator.device, dtype)

        def encode(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            if part != "vae":
                return models.encode_text(batch)
            views = [batch["images"]] + ([batch["images"].flip(-1)] if args.random_flip else [])
            return {"moments": torch.stack([models.encode_images(view) for view in views], dim=1)}

        return encode

    def cached(part: str, rows, key: dict):
        folders = [part] if part == "vae" else [part, TEXT_ENCODERS[part][3]]
        key |= lift_utils.identify(args.pretrained_teacher_model, args.teacher_revision, folders)
        key |= {"part": part, "variant": args.variant}
        return lift_utils.cache_encodings(rows, partial(encoders, part), key, args, accelerator)

    shown = {"resolution": args.resolution, "crop": "centre", "both flips": args.random_flip}
    images = dataset.with_transform(partial(load_examples, args=args, tokenizers={}, images=True))
    encoded, texts = [cached("vae", images, shown | contents)], []
    for name, tokenizer in tokenizers.items():
        read = {"dtype": str(dtype), "tokens": token_limit(tokenizer, name, args)}
        view = partial(load_examples, args=args, tokenizers={name: tokenizer}, images=False)
        encoded.append(cached(name, dataset.with_transform(view), read | contents))
        tokens = tokenize({name: tokenizer}, prompts, args)[name]
        texts.append(cached(name, [{name: ids} for ids in tokens], read | {"prompts": prompts}))
    return Joined(encoded), torch.utils.data.default_collate([*map(Joined(texts).__getitem__, range(len(prompts)))])


# ------------------------------------------------------------------------------------------------------- the algorithm


def join_text(encoded: dict[str, torch.Tensor], config: dict, args: argparse.Namespace) -> tuple[torch.Tensor, ...]:
    """Embeddings (B, 77 + T, D) and pooled embeddings (B, P) in StableDiffusion3Pipeline's layout.

    The CLIP encoders' widths stand side by side, filled up to T5's; its tokens follow. Zeros stand for what is absent.

    Args:
        encoded: What [`Encoders.encode_text`] returns.
        config: The transformer's.
    """
    clips, t5 = [name for name in CLIPS if name in encoded], encoded.get(T5)
    width, total = config["joint_attention_dim"], config["pooled_projection_dim"]
    if clips:
        tokens = torch.cat([encoded[name] for name in clips], dim=-1)
        pooled = torch.cat([encoded[f"{name}.pooled"] for name in clips], dim=-1)
        # Without the first encoder, the second keeps its place: the first's embeddings are as wide as its pooled one.
        left = total - pooled.shape[-1] if CLIPS[0] not in clips else 0
        tokens = F.pad(tokens, (left, width - left - tokens.shape[-1]))
        pooled = F.pad(pooled, (left, total - left - pooled.shape[-1]))
    else:
        tokens, pooled = t5.new_zeros(len(t5), CLIP_TOKENS, width), t5.new_zeros(len(t5), total)
    if t5 is None:
        t5 = tokens.new_zeros(len(tokens), args.max_sequence_length, width)
    return torch.cat([tokens, t5.to(tokens.dtype)], dim=1), pooled


def encode_batch(batch: dict[str, torch.Tensor], encoders, args) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Moments (B, 2, C, h, w) and text embeddings of a batch, cached or computed now; images flipped or not."""
    rows = batch["images" if encoders is not None else "moments"]
    flip = torch.rand(len(rows), device=rows.device) < 0.5
    if not args.random_flip:
        flip = torch.zeros_like(flip)
    if encoders is None:
        return rows[torch.arange(len(rows), device=rows.device), flip.long()], batch
    images = torch.where(flip[:, None, None, None], rows.flip(-1), rows)
    return encoders.encode_images(images), encoders.encode_text(batch)


def draw_sigmas(scheduler, count: int, args, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise levels (B, 1, 1, 1) and timesteps (B,) of the scheduler, its shift included, by `--weighting_scheme`."""
    share = compute_density_for_timestep_sampling(
        args.weighting_scheme, count, args.logit_mean, args.logit_std, args.mode_scale, device
    )
    steps = len(scheduler.sigmas)
    index = (share * steps).long().clamp(0, steps - 1)  # a share may round to 1
    return scheduler.sigmas[index][:, None, None, None], scheduler.timesteps[index]


def noise_latents(
    latents: torch.Tensor, noise: torch.Tensor, sigmas: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents on the straight way to the noise, and the velocity along it, which the model must predict."""
    return (1 - sigmas) * latents + sigmas * noise, noise - latents


def cast(inputs: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The model's inputs in the dtype; timesteps stay what they are, which bfloat16 could not tell apart."""
    return {name: tensor if name == "timestep" else tensor.to(dtype) for name, tensor in inputs.items()}


def draw_inputs(
    batch: dict[str, torch.Tensor], encoders, no_text, scheduler, config: dict, args
) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """The model's inputs on noise drawn now, the velocity to predict on them and the noise levels.

    Captions are dropped here: for student and teacher alike.
    """
    moments, encoded = encode_batch(batch, encoders, args)
    mean, std = moments.float().contiguous().unbind(1)  # randn_like follows the layout in memory
    latents = mean + std * torch.randn_like(mean)
    count, device = len(latents), latents.device
    noise = torch.randn_like(latents)
    sigmas, timesteps = draw_sigmas(scheduler, count, args, device)
    noisy, target = noise_latents(latents, noise, sigmas)
    dropped = torch.rand(count, 1, device=device) < args.caption_dropout
    text, pooled = join_text(encoded, config, args)
    inputs = {
        "hidden_states": noisy,
        "timestep": timesteps,
        "encoder_hidden_states": torch.where(dropped[:, None], no_text[0], text),
        "pooled_projections": torch.where(dropped, no_text[1], pooled),
    }
    return inputs, target, sigmas


def compute_losses(
    student: FeatureModel,
    teacher: FeatureModel | None,
    batch: dict[str, torch.Tensor],
    progress: float,
    encoders: Encoders | None,
    no_text: tuple[torch.Tensor, torch.Tensor],
    scheduler: FlowMatchEulerDiscreteScheduler,
    config: dict,
    args: argparse.Namespace,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """One micro-batch's loss and its parts, as tensors that stay on the device.

    Args:
        batch: With "images" and token ids, or with cached "moments" and embeddings.
        progress: Share of the run that is done, for the scheduled weights.
        encoders: `None` for a cached batch.
        no_text: Embeddings of the empty caption, (77 + T, D) and (P,).
        scheduler: With its sigmas and timesteps on the device.
        config: The teacher's.
    """
    inputs, target, sigmas = draw_inputs(batch, encoders, no_text, scheduler, config, args)
    prediction, features = student(**inputs)
    weights = compute_loss_weighting_for_sd3(args.weighting_scheme, sigmas)
    task = (weights * (prediction.float() - target).square()).mean()
    loss, logs = args.lambda_task * task, {"task": task}

    if args.kd_loss != "none":
        with torch.no_grad():
            wanted, wanted_features = teacher(**cast(inputs, next(teacher.parameters()).dtype))
        kd, parts = lift_utils.output_term(prediction, wanted, args, progress)
        loss = loss + args.lambda_kd_output * kd
        logs |= {"kd": kd, **parts}
        if features:
            pairs = [(ours.float(), theirs.float()) for ours, theirs in zip(features, wanted_features)]
            # Tokens grow by orders of magnitude over the depth: each pair's error is relative to its teacher's tokens.
            feat = sum(F.mse_loss(ours, theirs) / theirs.square().mean() for ours, theirs in pairs) / len(pairs)
            loss = loss + args.lambda_kd_feat * feat
            logs["feat"] = feat

    return loss, {"loss": loss, **logs}


# ---------------------------------------------------------------------------------------------- samples and the result


@torch.no_grad()
def sample_images(
    transformer: SD3Transformer2DModel, vae, scheduler, text: tuple[torch.Tensor, torch.Tensor], args, accelerator
) -> list[Image.Image]:
    """One sample per prompt by the teacher's sampler, from the noise that `--seed` fixes, the same for every model.

    Args:
        text: Embeddings and pooled embeddings of the empty caption and of the prompts, (1 + N, ...).
    """
    training, count, side = transformer.training, len(text[0]) - 1, args.resolution // lift_utils.vae_factor(vae)
    shape = (count, transformer.config.in_channels, side, side)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(args.seed)).to(accelerator.device)
    pipeline = StableDiffusion3Pipeline(transformer.eval(), scheduler, vae, None, None, None, None, None, None)
    pipeline.set_progress_bar_config(disable=True)
    text, pooled = (embeddings.float() for embeddings in text)  # the pipeline keeps the latents in their dtype
    with accelerator.autocast():
        latents = pipeline(
            prompt_embeds=text[1:],
            negative_prompt_embeds=text[:1].expand(count, -1, -1),
            pooled_prompt_embeds=pooled[1:],
            negative_pooled_prompt_embeds=pooled[:1].expand(count, -1),
            height=args.resolution,
            width=args.resolution,
            latents=noise,
            num_inference_steps=args.num_inference_steps,
            guidance_scale=args.guidance_scale,
            output_type="latent",
        ).images
    latents = latents.float() / vae.config.scaling_factor + (vae.config.shift_factor or 0)
    images = torch.cat([vae.decode(image).sample for image in latents.split(1)])  # one by one: decoding takes memory
    transformer.train(training)
    return pipeline.image_processor.postprocess(images)


def log_validation(teacher, student, ema, cache, sampler, text, prompts, args, accelerator, step: int) -> None:
    """Samples of teacher, student and EMA student side by side, a row per prompt, all from the same noise.

    Args:
        cache: Keeps the teacher's samples between calls.
        sampler: The teacher's scheduler.
        text: Embeddings and pooled embeddings of the empty caption and of the prompts.
    """
    vae = load_frozen(args, AutoencoderKL, "vae", accelerator.device, torch.float32)
    text = tuple(embeddings.to(accelerator.device) for embeddings in text)

    def sample(transformer):
        return sample_images(transformer, vae, sampler, text, args, accelerator)

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


def save_pipeline(
    student: SD3Transformer2DModel,
    teacher: SD3Transformer2DModel,
    recipe: dict,
    texts: list[str],
    args: argparse.Namespace,
) -> None:
    """The pipeline folder: the student's transformer, the teacher's other parts, model card, sample grid and curves.

    Args:
        teacher: Its skeleton.
        texts: The text encoders that the student was trained with: the pipeline has no others.
    """
    output_dir = Path(args.output_dir)
    if args.lora_rank:
        student = save_adapter(student, output_dir / "lora")
    options = {"transformer": student, "variant": args.variant, "use_safetensors": True}
    # Diffusers wants to be told of what is not there, when it loads the student too.
    absent = [part for name in TEXT_ENCODERS if name not in texts for part in (name, TEXT_ENCODERS[name][3])]
    options |= dict.fromkeys(absent)
    pipeline = lift_utils.from_teacher(args, DiffusionPipeline.from_pretrained, EXPECTED, **options)
    models = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    for model in models:
        model.float()
    pipeline.save_pretrained(output_dir)
    if args.save_fp16_variant:
        configs = {path: path.read_bytes() for path in output_dir.glob("*/config.json")}
        for model in models:
            model.half()
        pipeline.save_pretrained(output_dir, variant="fp16")
        # Transformers notes the last dtype, and would load the float32 text encoders in it.
        for path, content in configs.items():
            path.write_bytes(content)

    ours, theirs = student.num_parameters(), teacher.num_parameters()
    kept = (
        f"blocks {', '.join(map(str, recipe['kept']))} of {len(teacher.transformer_blocks)}"
        if "kept" in recipe
        else ""
    )
    facts = [
        f"- Teacher: `{args.pretrained_teacher_model}`, an MMDiT of {theirs:,} parameters.",
        f"- Student: an MMDiT of {ours:,} parameters, {ours / theirs:.1%} of the teacher's "
        f"({kept or f'`--student {args.student}`'}, initialised by {args.student_init}).",
        f"- Images of {args.resolution} pixels, {args.caption_dropout:.0%} of the captions dropped, noise levels "
        f"by {args.weighting_scheme}; captions by {', '.join(texts)}.",
    ]
    if args.lora_rank:
        facts.append(
            f"- Trained by LoRA of rank {args.lora_rank}, merged here; `lora/` has the adapter and its transformer."
        )
    name = args.hub_model_id or output_dir.name
    usage = "from diffusers import StableDiffusion3Pipeline\n\n"
    given = "".join(f", {part}=None" for part in absent)
    usage += f'image = StableDiffusion3Pipeline.from_pretrained("{name}"{given})("a prompt").images[0]'
    lift_utils.write_model_card(output_dir, args, "A text-to-image model", facts, usage, ["text-to-image"])


def save_adapter(student: SD3Transformer2DModel, folder: Path) -> SD3Transformer2DModel:
    """Save the LoRA adapter and its transformer; returns that one with the adapter merged, on the CPU."""
    from peft.utils import get_peft_model_state_dict

    student.to("cpu").float()  # in float32 it may not fit beside the teacher
    StableDiffusion3Pipeline.save_lora_weights(folder, transformer_lora_layers=get_peft_model_state_dict(student))
    merged = copy.deepcopy(student)
    merged.fuse_lora()
    for transformer in (student, merged):
        transformer.unload_lora()
    student.save_pretrained(folder / "transformer")
    return merged


def print_dry_run(student, teacher, vae, texts: list[str], args: argparse.Namespace) -> None:
    """Print parameters, MACs, a memory estimate and the student's config. All models are skeletons."""
    ours, theirs, inputs = student.num_parameters(), teacher.num_parameters(), example_inputs(student, args)
    macs, *_ = lift_utils.profile_forward(teacher.requires_grad_(False), **inputs)
    print(f"teacher: {theirs:,} parameters, {macs:,} MACs per image of {args.resolution} pixels and forward pass")

    def make() -> SD3Transformer2DModel:
        with torch.device("meta"):
            model = SD3Transformer2DModel.from_config(student.config)
            if args.lora_rank:
                add_adapters(model, args.lora_rank, torch.float32)
        return model

    macs, *activations = lift_utils.estimate_activations(make, args.gradient_checkpointing, **inputs)
    print(f"student: {ours:,} parameters, {macs:,} MACs; {ours / theirs:.2%} of the teacher")
    if args.student_depth is not None:
        print("the sizes are those of evenly spaced blocks: a run chooses them by their influence on its data")
    parameters = [(parameter.numel(), parameter.requires_grad) for parameter in make().parameters()]
    trained = sum(count for count, learns in parameters if learns)
    held = trained if args.share_backbone else sum(count for count, _ in parameters)
    width = 2 if args.mixed_precision in ("fp16", "bf16") else 4
    encoders = {"vae": vae.num_parameters()}
    for name in texts:
        kind, model, *_ = TEXT_ENCODERS[name]
        config = lift_utils.from_teacher(args, kind.from_pretrained, EXPECTED, subfolder=name)
        with torch.device("meta"):
            encoders[name] = model(config).num_parameters()
    if args.cache_latents:
        largest = max(encoders, key=encoders.get)
        print(f"beforehand, one encoder at a time: {width * encoders[largest] / 2**20:,.1f} MiB for the {largest}")
    shown = theirs if args.kd_loss != "none" else 0
    in_memory = 0 if args.cache_latents else sum(encoders.values())
    lift_utils.print_memory_estimate(args, activations, held, shown, trained, in_memory)
    print(json.dumps({key: value for key, value in student.config.items() if not key.startswith("_")}, indent=2))


# ------------------------------------------------------------------------------------------------------------- the run


def main(args: argparse.Namespace) -> None:
    """Set up, train, save."""
    # ---- models
    accelerator = lift_utils.make_accelerator(args)
    sampler, texts = check_pipeline(args)
    teacher_shape = lift_utils.load_skeleton(args, SD3Transformer2DModel, "transformer", EXPECTED)
    vae_shape = lift_utils.load_skeleton(args, AutoencoderKL, "vae", EXPECTED)
    args.resolution = args.resolution or teacher_shape.config.sample_size * lift_utils.vae_factor(vae_shape)
    check_teacher(teacher_shape, vae_shape, texts, args)
    student_shape, recipe = build_student(teacher_shape, vae_shape, args)
    if args.dry_run:
        return print_dry_run(student_shape, teacher_shape, vae_shape, texts, args)
    scheduler = lift_utils.load_part(args, FlowMatchEulerDiscreteScheduler, "scheduler", EXPECTED)
    for name in ("sigmas", "timesteps"):
        setattr(scheduler, name, getattr(scheduler, name).to(accelerator.device))
    tokenizers = {name: load_tokenizer(args, name) for name in texts}
    dtype = lift_utils.working_dtype(accelerator)

    # ---- output
    output_dir = lift_utils.prepare_output(args)
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    if accelerator.is_main_process:
        lift_utils.sweep(output_dir)
        if not args.resume_from_checkpoint:
            (output_dir / "blocks.json").unlink(missing_ok=True)
        if args.push_to_hub:
            args.hub_model_id = lift_utils.create_hub_repo(
                args.hub_model_id or output_dir.resolve().name, args.hub_private_repo
            )

    # ---- data
    with accelerator.main_process_first():
        dataset, contents = make_dataset(args, tokenizers)
    prompts = args.validation_prompts or [*dataset.with_format(None)[:4][args.caption_column]]
    if args.cache_latents:
        encoders = None
        dataset, text = cache_encodings(dataset, ["", *prompts], contents, tokenizers, args, accelerator, dtype)
    else:
        encoders = Encoders(args, ["vae", *texts], accelerator.device, dtype)
        dataset = dataset.with_transform(partial(load_examples, args=args, tokenizers=tokenizers, images=True))
        text = encoders.encode_text(tokenize(tokenizers, ["", *prompts], args))
    config = dict(teacher_shape.config)
    text = join_text(text, config, args)
    no_text = tuple(embeddings[0].to(accelerator.device) for embeddings in text)
    dataloader = lift_utils.make_dataloader(dataset, args, accelerator)

    # ---- student
    if args.student_depth is not None:
        with accelerator.main_process_first():
            kept = choose_blocks(dataset, config, scheduler, no_text, encoders, args, accelerator)
        student_shape, recipe = build_student(teacher_shape, vae_shape, args, kept)
    lift_utils.seed_step(args.seed)
    if args.share_backbone:
        teacher = load_frozen(args, SD3Transformer2DModel, "transformer", accelerator.device, dtype)
        transformer = share_weights(student_shape.config, teacher, recipe)
    else:
        teacher = lift_utils.load_part(args, SD3Transformer2DModel, "transformer", EXPECTED)
        transformer = SD3Transformer2DModel.from_config(student_shape.config)
        fill_student(transformer, teacher, recipe, args)
    if args.kd_loss == "none":
        teacher = None
    if args.lora_rank:  # seeded anew, so that the adapters do not depend on how the student was made
        lift_utils.seed_step(args.seed)
        add_adapters(transformer, args.lora_rank, dtype)
    student, teacher_model = lift_utils.pair_features(
        transformer, teacher, recipe["features"], example_inputs(transformer, args), item=1
    )
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
    losses_of = partial(
        compute_losses,
        student,
        teacher_model,
        encoders=encoders,
        no_text=no_text,
        scheduler=scheduler,
        config=config,
        args=args,
    )
    sampler = lift_utils.load_part(args, getattr(diffusers, sampler), "scheduler", EXPECTED)
    validate = partial(log_validation, teacher, transformer, ema, {}, sampler, text, prompts, args, accelerator)

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
        save_pipeline(transformer, teacher_shape, recipe, texts, args)
        if args.push_to_hub:
            lift_utils.push_to_hub(output_dir, args.hub_model_id)
    accelerator.end_training()


if __name__ == "__main__":
    main(parse_args())
