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
        --resolution 512 --lora_rank 64 --share_backbone --no_t5 --use_8bit_adam --gradient_checkpointing \\
        --output_dir sd3-half-lora

`images` holds pictures and a metadata.jsonl with a line {"file_name": "a.jpg", "text": "a caption"} for each, or
beside each a.jpg a file a.txt with its caption. The VAE and the text encoders run once, beforehand, one after the
other; none of them is in memory during training. The default teacher is gated: accept its terms on the Hub, then log
in with `hf auth login`. Without distillation the script trains a pipeline's own transformer:
`--kd_loss none --student whole --student_init random`.
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
from common.cache import JoinedDataset, cache_encodings, collate_alike, identify
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
    DTYPES,
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
from common.memory import fits_the_gpu
from common.metrics import MetricsLog, mean_over_processes
from common.pace import Due, count_steps, describe_start
from common.recipes import (
    FEATURES_REMEDY,
    WHOLE_BLOCK,
    check_forward,
    model_errors_end,
    override_config,
    pair_blocks,
    read_recipe,
)
from common.reporting import (
    autocast_of,
    gather_samples,
    grid_path,
    log_validation,
    plot_influence,
    share_of,
)
from common.sd3_text import (
    CLIPS,
    T5,
    TEXT_ENCODERS,
    TextEncoders,
    TextLayout,
    cache_text,
    check_text_widths,
    join_text,
    load_text_skeleton,
    load_tokenizer,
    tokenize,
)
from common.sharding import clip_gradients, gather_model, prepare
from common.streaming import StreamedDataset, add_streaming_arguments, check_streaming
from common.students import (
    check_groups,
    choose_once,
    fill_from_blocks,
    match_blocks,
    measure_influence,
    pair_features,
    public_config,
    read_blocks,
    share_blocks,
    spaced_blocks,
)
from common.teacher_cache import Batch, cache_predictions, predict
from common.teacher_weights import first_place, hold_teacher
from common.teachers import (
    TeacherSource,
    check_parts,
    find_weights,
    load_from,
    load_frozen,
    load_part,
    load_skeleton,
    load_weights,
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
import diffusers
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils.memory import clear_device_cache
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    SchedulerMixin,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from diffusers.training_utils import EMAModel, compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3
from PIL import Image

from lift_utils import FeatureModel, KDLoss, make_kd_loss, prediction_error


logger = get_logger(__name__)

TEACHER = "stabilityai/stable-diffusion-3-medium-diffusers"
EXPECTED = f"pass a Stable Diffusion 3 or 3.5 pipeline: a folder, or a Hub id such as {TEACHER}"
CONVERTER = "StableDiffusion3Pipeline"  # of a teacher in a single file
# Of the pipeline, and their classes where no other will do. T5 may be absent.
PARTS = {"transformer": "SD3Transformer2DModel", "vae": "AutoencoderKL", "scheduler": None}
TEXT_PARTS = {name: part.model.__name__ for name, part in TEXT_ENCODERS.items()}
TEXT_PARTS |= {part.tokenizer_name: None for part in TEXT_ENCODERS.values()}

# One in this many joint blocks is kept, evenly spaced, the last among them: of the 2,028.3M parameters of SD3-medium
# 1,008.6M, 668.6M and 328.7M; of the 2,243.2M of SD3.5-medium 1,107.7M, 734.7M and 361.8M; of the 8,056.6M of
# SD3.5-large 4,009.6M, 2,518.6M and 1,240.6M.
STUDENTS = {"whole": {"one_of": 1}, "half": {"one_of": 2}, "third": {"one_of": 3}, "sixth": {"one_of": 6}}

# The recipe of this project, as the authors report SD3 but have no code for it: the defaults of shared flags.
RECIPE = {
    "output_dir": "lift-sd3",
    "gradient_accumulation_steps": 8,
    "adam_weight_decay": 1e-2,
}

# What teacher and student have outside their blocks.
OUTER = ("pos_embed", "time_text_embed", "context_embedder", "norm_out", "proj_out")

LORA_TARGETS = [
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
    *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    *("attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0"),
    *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
]

# How noise levels are sampled and weighted: arguments of Diffusers' compute_density_for_timestep_sampling.
NOISE_FLAGS = ("weighting_scheme", "logit_mean", "logit_std", "mode_scale")

# What a batch's draws depend on: arguments of [`make_draws`].
DRAW_FLAGS = ("random_flip", "caption_dropout", *NOISE_FLAGS)

# What the samples of a validation depend on: arguments of [`sample_images`].
SAMPLING_FLAGS = ("resolution", "seed", "num_inference_steps", "guidance_scale")

# Images on which --student_depth measures what each block does.
INFLUENCE_IMAGES = 64


# ------------------------------------------------------------------------------------------------------- the arguments


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line (or `input_args`); the defaults are this project's own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    groups = add_shared_arguments(parser)
    add_caption_arguments(groups)
    add_streaming_arguments(groups["data"])

    group = groups["models"]
    group.add_argument("--pretrained_teacher_model", default=TEACHER, help="SD 3 or 3.5: a folder or a Hub id")
    group.add_argument("--student", help=f"{', '.join(STUDENTS)} of the blocks, or a JSON file (default: half)")
    group.add_argument(
        "--keep_blocks", help="instead: the teacher's blocks to keep, e.g. 0,5,11,23; its last among them"
    )
    group.add_argument(
        "--student_depth", type=int, help="instead: this many blocks, those of most influence on the data"
    )
    group.add_argument(
        "--student_init", default="teacher", choices=("teacher", "random"), help="the teacher's blocks, or fresh ones"
    )
    group.add_argument("--no_t5", action="store_true", help="do without the T5 encoder: zeros stand for it")
    group.add_argument("--max_sequence_length", type=int, default=256, help="tokens of the T5 encoder")

    groups["data"].add_argument(
        "--cache_latents",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="run the VAE and the text encoders once, before the training",
    )

    group = groups["distillation"]
    group.add_argument(
        "--lambda_kd_feat", type=float, default=0.1, help="weight of the blocks' image tokens, relative"
    )
    group.add_argument(
        "--weighting_scheme",
        default="logit_normal",
        choices=("logit_normal", "mode", "cosmap", "none"),
        help="how noise levels are sampled (logit_normal, mode) or the loss on the data is weighted (cosmap)",
    )
    group.add_argument("--logit_mean", type=float, default=0.0, help="mean of logit_normal")
    group.add_argument("--logit_std", type=float, default=1.0, help="standard deviation of logit_normal")
    group.add_argument("--mode_scale", type=float, default=1.29, help="scale of mode")

    groups["training"].add_argument(
        "--share_backbone", action="store_true", help="with --lora_rank: hold the teacher's weights once, for both"
    )

    parser.set_defaults(**RECIPE)
    args = parser.parse_args(input_args)
    check_args(args)
    check_streaming(vars(args))
    args.validation_prompts = read_prompts(args.validation_prompts)
    check_script_args(args)
    return args


def check_script_args(args: argparse.Namespace) -> None:
    """Refuse wrong values of this script's own flags; without a choice of blocks, the student is `half`."""
    choices = {name: getattr(args, name) for name in ("student", "keep_blocks", "student_depth")}
    given = [f"--{name} {value}" for name, value in choices.items() if value is not None]
    if len(given) > 1:
        fail(f"{' and '.join(given)} both say which blocks the student has; pass one of them")
    if not given:
        args.student = "half"
    if args.share_backbone:
        needed = {
            "--lora_rank": args.lora_rank > 0,
            "--student_init teacher": args.student_init == "teacher",
            "a --kd_loss with a teacher": args.kd_loss != "none",
            "blocks of the teacher, not a JSON file": not (args.student or "").endswith(".json"),
            "a teacher in the run's precision on the device": not (args.teacher_dtype or args.offload_teacher),
            "a teacher whole on each process, without --fsdp": not args.fsdp,
        }
        missing = [name for name, met in needed.items() if not met]
        if missing:
            fail(f"--share_backbone needs {missing[0]}: the two may differ by adapters only; pass that, or drop it")


# ---------------------------------------------------------------------------------------------------------- the models


def check_pipeline(source: TeacherSource, no_t5: bool) -> tuple[type[SchedulerMixin], list[str]]:
    """Refuse pipelines that this script does not distil; returns the sampler's class and the text encoders in use."""
    kinds = check_parts(source, PARTS, TEXT_PARTS)
    config = load_from(source, FlowMatchEulerDiscreteScheduler.load_config, subfolder="scheduler")
    unsupported = [key for key in ("use_dynamic_shifting", "invert_sigmas") if config.get(key)]
    sampler = kinds["scheduler"]
    if unsupported or not sampler.startswith("FlowMatch") or not hasattr(diffusers, sampler):
        what = sampler + (f" with {unsupported[0]}" if unsupported else "")
        remedy = "not SD3's sigmas; give it a FlowMatchEuler scheduler"
        fail(f"--pretrained_teacher_model {source.path} has a {what}, {remedy}")
    lacking = [name for name in CLIPS if name not in kinds]
    if lacking:  # Diffusers loads such a pipeline, which then takes no prompt
        fail(f"--pretrained_teacher_model {source.path} lacks its {lacking[0]}, as T5 alone may; {source.expected}")
    text_encoders = [name for name in TEXT_ENCODERS if name in kinds and not (no_t5 and name == T5)]
    return getattr(diffusers, sampler), text_encoders


def check_teacher(
    teacher: SD3Transformer2DModel, vae: AutoencoderKL, text_encoders: list[str], source: TeacherSource
) -> None:
    """Refuse teachers whose parts do not fit together."""
    config, latents = teacher.config, vae.config.latent_channels
    if config.in_channels != latents or teacher.out_channels != latents:
        fail(
            f"--pretrained_teacher_model {source.path}: its transformer maps {config.in_channels} channels to "
            f"{teacher.out_channels}, which is no velocity on the {latents} channels of its VAE; {source.expected}"
        )
    check_text_widths(source, text_encoders, config)


def load_scheduler(source: TeacherSource, device: torch.device) -> FlowMatchEulerDiscreteScheduler:
    """The teacher's noise levels and timesteps, on the device: the step picks from them without waiting for it."""
    scheduler = load_part(source, FlowMatchEulerDiscreteScheduler, "scheduler")
    if scheduler.config.num_train_timesteps < 1:
        steps = f"num_train_timesteps {scheduler.config.num_train_timesteps}"
        fail(f"--pretrained_teacher_model {source.path}: its scheduler has {steps}; {source.expected}")
    scheduler.sigmas, scheduler.timesteps = scheduler.sigmas.to(device), scheduler.timesteps.to(device)
    return scheduler


def depth_recipe(kept: list[int], teacher_config: dict) -> dict:
    """What a JSON file would say of the student that keeps these blocks of the teacher, ascending.

    Blocks with a second attention over the image (SD3.5) are listed by position, so their list follows the blocks.
    """
    pairs = {f"transformer_blocks.{index}": f"transformer_blocks.{block}" for index, block in enumerate(kept)}
    dual = [index for index, block in enumerate(kept) if block in teacher_config["dual_attention_layers"]]
    return {
        "config": {"num_layers": len(kept), "dual_attention_layers": dual},
        "blocks": {name: name for name in OUTER} | pairs,
        "kept": kept,
    }


def read_student(
    student: str | None, keep_blocks: str | None, student_depth: int | None, teacher_config: dict
) -> dict:
    """The recipe that the flags ask for; until [`choose_blocks`] has run, evenly spaced blocks stand for its own."""
    depth = teacher_config["num_layers"]
    if student_depth is not None:
        if not 0 < student_depth <= depth:
            fail(f"--student_depth {student_depth} is not possible; pass 1 to the teacher's {depth}")
        return depth_recipe(spaced_blocks(student_depth, depth), teacher_config)
    if keep_blocks is not None:
        kept = read_blocks(keep_blocks, depth)
        if kept[-1] != depth - 1:
            remedy = f"the student's last block must be the teacher's last, {depth - 1}"
            fail(f"--keep_blocks {keep_blocks} does not end with {depth - 1}; {remedy}")
        return depth_recipe(kept, teacher_config)
    recipe = read_recipe(student, STUDENTS, ("config", "blocks", "features"))
    if "one_of" in recipe:
        return depth_recipe(spaced_blocks(max(1, depth // recipe["one_of"]), depth), teacher_config)
    return recipe


def student_config(teacher_config: dict, recipe: dict) -> dict:
    """The teacher's config with the recipe's overrides."""
    return override_config(SD3Transformer2DModel, public_config(teacher_config), recipe)


def build_student(
    teacher: SD3Transformer2DModel, vae: AutoencoderKL, args: argparse.Namespace, kept: list[int] | None = None
) -> tuple[SD3Transformer2DModel, dict]:
    """The student on the meta device, and its recipe with the pairs of the feature term.

    Args:
        teacher: Its skeleton.
        vae: Its skeleton.
        kept: The blocks that [`choose_blocks`] has chosen, once it has.
    """
    if kept is None:
        recipe = read_student(args.student, args.keep_blocks, args.student_depth, teacher.config)
    else:
        recipe = depth_recipe(kept, teacher.config)
    mismatch = f"{'the student' if args.student is None else f'--student {args.student}'} does not fit the teacher"
    group_size = args.group_size if args.kd_loss == "place" else None
    with model_errors_end(mismatch, "correct the JSON file, or pass a preset or --student_init random"):
        config = student_config(dict(teacher.config), recipe)
        with torch.device("meta"):
            student = SD3Transformer2DModel.from_config(config | {"sample_size": args.resolution // vae_factor(vae)})
        if args.student_init == "teacher":
            match_blocks(student, teacher.state_dict(), recipe.get("blocks"))
    if args.lora_rank:
        check_adapted(args.lora_rank, student, teacher, recipe.get("blocks"), args.student_init)
    check_sizes(student, vae, args.resolution, group_size)
    for key in ("in_channels", "out_channels", "joint_attention_dim", "pooled_projection_dim"):
        if student.config[key] != teacher.config[key]:
            fail(f"{mismatch}: its {key} is {student.config[key]}; keep the teacher's {teacher.config[key]}")
    check_forward(student, example_inputs(student, args.max_sequence_length), mismatch)

    if args.kd_loss == "none" or args.lambda_kd_feat == 0:
        recipe = {**recipe, "features": []}
    if "features" not in recipe:
        recipe = {**recipe, "features": pair_blocks(recipe, student.config.num_layers, teacher.config.num_layers)}
    with model_errors_end(mismatch, FEATURES_REMEDY):
        pair_features(student, teacher, recipe["features"], example_inputs(student, args.max_sequence_length), item=1)
    parts = [name for pair in recipe["features"] for name in pair if not WHOLE_BLOCK.fullmatch(name)]
    if parts:  # which may return the text tokens where blocks return the image's
        fail(f'{mismatch}: its "features" name {parts[0]}; pass whole blocks, such as transformer_blocks.3')
    return student, recipe


def check_sizes(student: SD3Transformer2DModel, vae: AutoencoderKL, resolution: int, group_size: int | None) -> None:
    """Refuse sizes with which no step could be taken.

    Args:
        resolution: Side of the training images, in pixels.
        group_size: Of PLACE, `None` for other losses.
    """
    factor, largest = size_limits(student, vae)
    if resolution % factor:
        fail(f"--resolution {resolution} is not divisible by VAE and patches; pass a multiple of {factor}")
    if resolution > largest:
        most = student.config.pos_embed_max_size
        fail(f"--resolution {resolution} has more patches than the teacher's {most}; pass {largest} at most")
    check_groups(group_size, student.config.sample_size**2)


def size_limits(student: SD3Transformer2DModel, vae: AutoencoderKL) -> tuple[int, int]:
    """What the sides of an image must be divisible by, and the longest side that has positions, in pixels."""
    factor = vae_factor(vae) * student.config.patch_size
    return factor, factor * student.config.pos_embed_max_size


def choose_blocks(
    source: TeacherSource,
    depth: int,
    dataset: torch.utils.data.Dataset | StreamedDataset,
    batch_size: int,
    inputs_of: Callable[[Batch], tuple],
    seed: int,
    output_dir: Path,
    resume_from: str | None,
    accelerator: Accelerator,
    teacher_dtype: str | None,
    offload: bool,
) -> list[int]:
    """The `depth` blocks of the teacher that change the image tokens most, its last always among them.

    The choice is kept as blocks.json, see [`choose_once`], and plotted as influence.png.
    """

    def measure() -> tuple[list[float], list[int]]:
        device, dtype = accelerator.device, dtype_of(accelerator.mixed_precision)
        how = teacher_dtype, dtype, device, offload
        teacher = load_frozen(source, SD3Transformer2DModel, "transformer", *first_place(*how))
        with fits_the_gpu(f"--student_depth {depth}: the teacher", "pass --teacher_dtype, or choose by --keep_blocks"):
            model = FeatureModel(hold_teacher(teacher, *how), [])
        seed_step(seed)
        if isinstance(dataset, StreamedDataset):
            rows = dataset.sample(INFLUENCE_IMAGES)
        else:
            rows = torch.utils.data.Subset(dataset, torch.randperm(len(dataset))[:INFLUENCE_IMAGES].tolist())

        def run() -> None:
            for alike in torch.utils.data.DataLoader(rows, batch_size=batch_size, collate_fn=collate_alike):
                for batch in alike:
                    batch = {name: tensor.to(device) for name, tensor in batch.items()}
                    predict(model, inputs_of(batch)[0], batch)

        influence = measure_influence(teacher.transformer_blocks, run, item=1)
        last = len(influence) - 1
        best = sorted(range(last), key=lambda block: influence[block], reverse=True)
        kept = sorted([*best[: depth - 1], last])
        table = ", ".join(f"{block}: {value:.3g}" for block, value in enumerate(influence))
        print(f"influence of the teacher's blocks on {len(rows)} images: {table}\nkept: {kept}", flush=True)
        if accelerator.is_main_process:
            plot_influence(influence, kept, output_dir / "influence.png")
        return influence, kept

    chosen = choose_once(output_dir / "blocks.json", depth, measure, resume_from, accelerator)
    clear_device_cache(garbage_collection=True)  # of the teacher, whose hooks and compressed weights have cycles
    return chosen


def fill_student(
    student: SD3Transformer2DModel, teacher: SD3Transformer2DModel, recipe: dict, student_init: str, shared: bool
) -> None:
    """Put the teacher's weights into the student as `--student_init` and the recipe say.

    Args:
        shared: Whether the student, then on the meta device, holds the teacher's own tensors and no copies.
    """
    if shared:
        return share_blocks(student, teacher.state_dict(), recipe["blocks"])
    fill_from_blocks(student, teacher, recipe.get("blocks"), random=student_init == "random")


def example_inputs(transformer: SD3Transformer2DModel, t5_tokens: int) -> dict[str, torch.Tensor]:
    """Arguments of the transformer's forward pass on one image, on the meta device."""
    config, side = transformer.config, transformer.config.sample_size
    with torch.device("meta"):
        return {
            "hidden_states": torch.zeros(1, config.in_channels, side, side),
            "timestep": torch.zeros(1),
            "encoder_hidden_states": torch.zeros(1, 77 + t5_tokens, config.joint_attention_dim),
            "pooled_projections": torch.zeros(1, config.pooled_projection_dim),
        }


# ------------------------------------------------------------------------------------------------------------ the data


def make_dataset(
    args: argparse.Namespace, tokenizers: dict
) -> tuple[datasets.Dataset | StreamedDataset, dict[str, Any]]:
    """A dataset of images, uint8 (3, H, W), and each text encoder's token ids, and what identifies it in a cache.

    It is without unreadable images and without images that have no caption. Its "buckets" are those of
    [`sort_by_bucket`].
    """
    image, caption = args.image_column, args.caption_column
    size = args.aspect_ratio_buckets or args.resolution
    folders = args.dataset_name, args.dataset_config_name, args.train_data_dir, args.cache_dir
    columns = {"image_column": image, "caption_column": caption}
    load = partial(load_examples, **columns, size=size, tokenizers=tokenizers)
    if args.streaming:
        stream, source = load_images(*folders, columns, streaming=True)
        how = args.image_column, args.max_unreadable, args.seed, args.shuffle_buffer, args.output_dir
        captioned = partial(find_no_caption, caption_column=args.caption_column)
        return StreamedDataset(stream, source, load, *how, captioned), {}
    dataset, source = load_captioned(*folders, columns, args.max_unreadable)
    dataset = choose_samples(dataset, args.max_train_samples, args.seed)
    how = args.max_unreadable, args.dataloader_num_workers, size
    dataset = drop_unreadable(dataset, image, source, *how)
    dataset = drop_uncaptioned(dataset, image, caption, source, args.max_unreadable)
    contents = {"data": dataset._fingerprint, "image": image, "caption": caption}
    if args.aspect_ratio_buckets:
        dataset, buckets = sort_by_bucket(dataset, image, size, args.dataloader_num_workers)
        contents |= {"data": dataset._fingerprint, "buckets": buckets}

    report_long_captions(dataset[caption], tokenizers)
    return dataset.with_transform(load), contents


def load_examples(
    batch: dict[str, list],
    image_column: str,
    caption_column: str,
    size: int | list[tuple[int, int]],
    tokenizers: dict,
) -> dict[str, list[torch.Tensor]]:
    """Decode, resize and crop the centre, see [`load_pixels`]; tokenize."""
    tokens = {name: list(ids) for name, ids in tokenize(tokenizers, batch[caption_column]).items()}
    return {"images": load_pixels(batch[image_column], "RGB", size), **tokens}


class Encoders:
    """The frozen VAE, which computes in float32, and text encoders of the teacher's pipeline.

    Args:
        text_encoders: Which of them to load.
        device: Where they run.
        dtype: What the text encoders compute in.
    """

    def __init__(self, source: TeacherSource, text_encoders: list[str], device: torch.device, dtype: torch.dtype):
        self.device = device
        self.vae = load_frozen(source, AutoencoderKL, "vae", device, torch.float32)
        self.encode_text = TextEncoders(source, text_encoders, device, dtype)

    @torch.no_grad()
    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        """Mean and standard deviation of the scaled latents, (B, 2, C, h, w), of uint8 images (B, 3, H, W)."""
        latents = self.vae.encode(images.to(self.device).float() / 127.5 - 1).latent_dist
        mean = latents.mean - (self.vae.config.shift_factor or 0)
        return torch.stack([mean, latents.std], dim=1) * self.vae.config.scaling_factor


def encode_dataset(
    dataset: datasets.Dataset,
    prompts: list[str],
    contents: dict[str, Any],
    tokenizers: dict,
    source: TeacherSource,
    size: int | list[tuple[int, int]],
    random_flip: bool,
    cache: partial,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[JoinedDataset, dict[str, torch.Tensor]]:
    """The dataset as `{"moments": (flips, 2, C, h, w)}` with each text encoder's embeddings, and those of the prompts.

    The VAE and the text encoders run one after the other, once; they are freed before this returns.

    Args:
        contents: What identifies the dataset: see [`make_dataset`].
        size: See [`load_pixels`].
        cache: [`cache_encodings`] with the settings of the run.
    """

    def load_vae() -> Callable:
        encoders = Encoders(source, [], device, dtype)

        def encode(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            moments = [encoders.encode_images(view) for view in flip_views(batch["images"], random_flip)]
            return {"moments": torch.stack(moments, dim=1)}

        return encode

    key = identify(source.path, source.revision, ["vae"]) | {"part": "vae", "variant": source.variant}
    key |= {"resolution": size, "crop": "centre", "both flips": random_flip}
    columns = {"image_column": contents["image"], "caption_column": contents["caption"]}
    images = dataset.with_transform(partial(load_examples, **columns, size=size, tokenizers={}))
    moments = cache(images, load_vae, key | contents)
    embeddings, text = cache_text(dataset, prompts, contents, tokenizers, source, cache, device, dtype)
    return JoinedDataset([moments, *embeddings]), text


# ------------------------------------------------------------------------------------------------------- the algorithm


def add_noise(latents: torch.Tensor, noise: torch.Tensor, sigmas: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents on the straight way to the noise, and the velocity along it, which the model must predict."""
    return (1 - sigmas) * latents + sigmas * noise, noise - latents


def find_sigmas(scheduler: FlowMatchEulerDiscreteScheduler, shares: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise levels (B, 1, 1, 1) and timesteps (B,) of the scheduler, its shift included.

    Args:
        shares: Of the way through the schedule, (B,).
    """
    steps = len(scheduler.sigmas)
    index = (shares * steps).long().clamp(0, steps - 1)  # a share may round to 1
    return scheduler.sigmas[index][:, None, None, None], scheduler.timesteps[index]


def make_draws(
    count: int,
    device: torch.device,
    shape: tuple[int, int, int],
    random_flip: bool,
    caption_dropout: float,
    **noise_levels: str | float,
) -> dict[str, torch.Tensor]:
    """All that is random in a batch: flips (B,), two noises (B, C, h, w), shares of the schedule (B,).

    And which captions are dropped, (B, 1).

    Args:
        count: B.
        shape: Of the latents of an image, (C, h, w).
        random_flip: Whether images are flipped.
        caption_dropout: Share of the captions that are replaced by the empty one.
        noise_levels: How the shares are sampled (Esser et al., ICML 2024): the flags that [`NOISE_FLAGS`] names.
    """
    return {
        "flips": random_flips(count, random_flip, device),
        "vae_noise": torch.randn(count, *shape, device=device),
        "noise": torch.randn(count, *shape, device=device),
        "shares": compute_density_for_timestep_sampling(batch_size=count, device=device, **noise_levels),
        "dropped": torch.rand(count, 1, device=device) < caption_dropout,
    }


def encode_batch(
    batch: Batch, encoders: Encoders | None, flips: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Moments (B, 2, C, h, w) and text embeddings of a batch, cached or computed now; flipped or not."""
    if encoders is None:
        return batch["moments"][torch.arange(len(flips), device=flips.device), flips.long()], batch
    return encoders.encode_images(flip_rows(batch["images"], flips)), encoders.encode_text(batch)


def make_inputs(
    batch: Batch,
    scheduler: FlowMatchEulerDiscreteScheduler,
    encoders: Encoders | None,
    no_text: tuple[torch.Tensor, torch.Tensor],
    layout: TextLayout,
    draw: Callable[..., dict[str, torch.Tensor]],
) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """A model's inputs on noise, the velocity to predict on them (B, C, h, w), and the sigmas (B, 1, 1, 1).

    Args:
        batch: With "images", uint8, (B, 3, H, W), and each text encoder's token ids, (B, L); or with cached "moments",
            (B, flips, 2, C, h, w), and embeddings.
        scheduler: With its sigmas and timesteps on the device.
        encoders: `None` for a cached batch.
        no_text: Embeddings of the empty caption, (77 + T, D) and (P,).
        draw: [`make_draws`] with the settings of the run, for a batch that has no draws.
    """
    rows = batch["images" if encoders is not None else "moments"]
    shape = latent_shape(batch, None if encoders is None else encoders.vae)
    draws = batch["draws"] if "draws" in batch else draw(len(rows), rows.device, shape=shape)
    moments, encoded = encode_batch(batch, encoders, draws["flips"])
    mean, std = moments.float().unbind(1)
    latents = mean + std * draws["vae_noise"]
    sigmas, timesteps = find_sigmas(scheduler, draws["shares"])
    noisy, target = add_noise(latents, draws["noise"], sigmas)
    dropped, (text, pooled) = draws["dropped"], join_text(encoded, layout)
    inputs = {
        "hidden_states": noisy,
        "timestep": timesteps,
        "encoder_hidden_states": torch.where(dropped[:, None], no_text[0], text),
        "pooled_projections": torch.where(dropped, no_text[1], pooled),
    }
    return inputs, target, sigmas


def relative_mse(student_tokens: torch.Tensor, teacher_tokens: torch.Tensor) -> torch.Tensor:
    """Mean squared difference of tokens (B, N, C), in each sample relative to the teacher's mean square.

    Tokens grow by orders of magnitude over the depth, and differ in size from sample to sample.
    """
    difference, size = (each.square().mean((1, 2)) for each in (student_tokens - teacher_tokens, teacher_tokens))
    return (difference / size).mean()


def compute_losses(
    student: FeatureModel,
    teacher: FeatureModel | None,
    batch: Batch,
    progress: float,
    inputs_of: Callable[[Batch], tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]],
    kd_loss: KDLoss | None,
    lambdas: tuple[float, float, float],
    weighting_scheme: str,
    task_loss: str = "mse",
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """One micro-batch's loss and its parts, as tensors that stay on the device.

    Args:
        teacher: `None` without distillation, and for batches with the "teacher"'s prediction.
        batch: See [`make_inputs`].
        progress: Share of the run that is done, for the scheduled weights.
        inputs_of: [`make_inputs`] with all but the batch.
        kd_loss: Between the outputs of student and teacher; `None` without distillation.
        lambdas: Weights of the task term, the output term and the feature term.
        weighting_scheme: Of the loss on the data.
        task_loss: "mse" or "rms", on the data.
    """
    inputs, target, sigmas = inputs_of(batch)  # the same for student and teacher

    lambda_task, lambda_kd_output, lambda_kd_feat = lambdas
    if kd_loss is not None:  # first: what the teacher works with is gone when the student's activations come
        teacher_prediction, teacher_features = predict(teacher, inputs, batch)
    prediction, features = student(**inputs)
    weights = compute_loss_weighting_for_sd3(weighting_scheme, sigmas)
    task = prediction_error(prediction, target, task_loss, weights.flatten())
    loss, logs = lambda_task * task, {"task": task}

    if kd_loss is not None:
        kd, parts = kd_loss(prediction, teacher_prediction, progress, None)
        loss = loss + lambda_kd_output * kd
        logs |= {"kd": kd, **parts}
        if features:
            pairs = [(ours.float(), theirs.float()) for ours, theirs in zip(features, teacher_features)]
            feat = torch.stack([relative_mse(*pair) for pair in pairs]).mean()
            loss = loss + lambda_kd_feat * feat
            logs["feat"] = feat

    return loss, {"loss": loss, **logs}


# ---------------------------------------------------------------------------------------------- samples and the result


@torch.no_grad()
def sample_images(
    transformer: SD3Transformer2DModel,
    vae: AutoencoderKL,
    scheduler: SchedulerMixin,
    text: tuple[torch.Tensor, torch.Tensor],
    resolution: int,
    seed: int,
    num_inference_steps: int,
    guidance_scale: float,
    accelerator: Accelerator,
) -> list[Image.Image]:
    """One sample per prompt by the teacher's sampler, from the noise that the seed fixes, the same for every model.

    Args:
        vae: In float32, on the device.
        scheduler: The teacher's.
        text: Embeddings and pooled embeddings of the empty caption and of the prompts, (1 + N, ...).
    """
    count, side = len(text[0]) - 1, resolution // vae_factor(vae)
    shape, mine = (count, transformer.config.in_channels, side, side), share_of(count, accelerator)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))[mine].to(accelerator.device)
    pipeline = StableDiffusion3Pipeline(transformer, scheduler, vae, None, None, None, None, None, None)
    pipeline.set_progress_bar_config(disable=True)
    seed_step(seed)  # samplers may draw noise of their own
    # In float32: the pipeline keeps the latents in the embeddings' dtype.
    rows = [0, *(1 + row for row in mine)]
    text, pooled = (embeddings[rows].to(accelerator.device).float() for embeddings in text)
    with autocast_of(transformer, accelerator):
        latents = pipeline(
            prompt_embeds=text[1:],
            negative_prompt_embeds=text[:1].expand(len(mine), -1, -1),
            pooled_prompt_embeds=pooled[1:],
            negative_pooled_prompt_embeds=pooled[:1].expand(len(mine), -1),
            height=resolution,
            width=resolution,
            latents=noise,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            output_type="latent",
        ).images
    latents = latents.float() / vae.config.scaling_factor + (vae.config.shift_factor or 0)
    images = torch.cat([vae.decode(image).sample for image in latents.split(1)])  # one by one: decoding takes memory
    return gather_samples(pipeline.image_processor.postprocess(images), count)


def save_pipeline(
    student: SD3Transformer2DModel,
    teacher: SD3Transformer2DModel,
    recipe: dict,
    text_encoders: list[str],
    source: TeacherSource,
    args: argparse.Namespace,
) -> None:
    """The pipeline folder: the student's transformer, the teacher's other parts, model card, sample grid and curves.

    Args:
        teacher: Its skeleton.
        text_encoders: Those that the student was trained with: the pipeline has no others.
    """
    output_dir = Path(args.output_dir)
    if args.lora_rank:
        student = save_adapter(student, output_dir / "lora", "transformer", StableDiffusion3Pipeline)
    # Diffusers must be given each part that is not there as `None`, whenever it loads the student too.
    unused = [(name, part.tokenizer_name) for name, part in TEXT_ENCODERS.items() if name not in text_encoders]
    absent = [name for pair in unused for name in pair]
    options = {"transformer": student, **dict.fromkeys(absent)}
    save_with_variant(load_weights(source, DiffusionPipeline, **options), output_dir, args.save_fp16_variant)

    count, total = student.num_parameters(), teacher.num_parameters()
    kept = f"`--student {args.student}`"
    if "kept" in recipe:
        kept = f"blocks {', '.join(map(str, recipe['kept']))} of {len(teacher.transformer_blocks)}"
    facts = [
        f"- Teacher: `{args.pretrained_teacher_model}`, an MMDiT of {total:,} parameters.",
        f"- Student: an MMDiT of {count:,} parameters, {count / total:.1%} of the teacher's "
        f"({kept}, `--student_init {args.student_init}`).",
        f"- Images of {args.resolution} pixels, {args.caption_dropout:.0%} of the captions dropped, noise levels "
        f"by {args.weighting_scheme}; captions by {', '.join(text_encoders)}.",
    ]
    given = "".join(f", {name}=None" for name in absent)
    usage = "from diffusers import StableDiffusion3Pipeline\n\n"
    name = args.hub_model_id or output_dir.resolve().name
    usage += f'pipeline = StableDiffusion3Pipeline.from_pretrained("{name}"{given})\n'
    length = f", max_sequence_length={args.max_sequence_length}" if args.max_sequence_length != 256 else ""
    usage += f'image = pipeline("a prompt"{length}).images[0]'
    kind, tags = "A text-to-image model", ["text-to-image"]
    write_model_card(output_dir, kind, facts, describe_run(args), usage, tags)
    logger.info(f"the model is in {output_dir}: see README.md, or draw by eval/generate.py --model {output_dir}")


def print_dry_run(
    student: SD3Transformer2DModel,
    teacher: SD3Transformer2DModel,
    vae: AutoencoderKL,
    recipe: dict,
    text_encoders: list[str],
    source: TeacherSource,
    args: argparse.Namespace,
) -> None:
    """Print parameters, MACs, a memory estimate and the student's config. All models are skeletons."""
    plan, count, total = plan_run(args), student.num_parameters(), teacher.num_parameters()
    inputs = example_inputs(student, args.max_sequence_length)

    def make_student() -> SD3Transformer2DModel:
        with torch.device("meta"):
            model = SD3Transformer2DModel.from_config(student.config)
            if args.lora_rank:
                add_adapters(model, args.lora_rank, LORA_TARGETS, dtype_of(args.mixed_precision))
        return model

    costs = count_costs(plan, make_student, teacher, inputs, recipe["features"], item=1)
    size = f"{total:,} parameters, {costs.teacher_macs:,} MACs"
    print(f"teacher: {size} per image of {args.resolution} pixels and forward pass")
    print(f"student: {count:,} parameters, {costs.macs:,} MACs; {count / total:.2%} of the teacher")
    if args.student_depth is not None:
        print("the sizes are those of evenly spaced blocks: a run chooses them by their influence on its data")
    batch = args.encoding_batch_size if args.cache_latents else plan.batch_size
    encodings = {"vae": estimate_image_encoding(vae, torch.float32, args.resolution, batch)}
    for name in text_encoders:
        model = load_text_skeleton(source, name)
        tokens = args.max_sequence_length if name == T5 else model.config.max_position_embeddings
        encodings[name] = estimate_text_encoding(model, dtype_of(plan.mixed_precision), tokens)
    encoding = together(*encodings.values())
    if args.cache_latents:
        most = max(encodings, key=lambda name: encodings[name].peak)
        size = f"{encodings[most].peak / 2**20:,.1f} MiB"
        print(f"beforehand, one encoder at a time, batch {batch}: {size} for the {most}")
        encoding = NO_ENCODING
    shared = args.share_backbone and plan.live_teacher  # what is frozen is the teacher's then
    tables = student.pos_embed.pos_embed.nbytes
    if plan.live_teacher and not (shared or args.offload_teacher):
        width = DTYPES.get(args.teacher_dtype, dtype_of(plan.mixed_precision)).itemsize
        tables += teacher.pos_embed.pos_embed.nbytes * width // 4
    costs = costs._replace(encoding=encoding, decoding=estimate_decoding(vae, args.resolution), tables=tables)
    costs = costs._replace(frozen=0) if shared else costs
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
    sampler, text_encoders = check_pipeline(source, args.no_t5)
    teacher_shape = load_skeleton(source, SD3Transformer2DModel, "transformer")
    vae_shape = load_skeleton(source, AutoencoderKL, "vae")
    args.resolution = args.resolution or default_resolution(teacher_shape, vae_shape)
    check_teacher(teacher_shape, vae_shape, text_encoders, source)
    student_shape, recipe = build_student(teacher_shape, vae_shape, args)
    group_size = args.group_size if args.kd_loss == "place" else None
    how = args.resolution, vae_factor(vae_shape), group_size, *size_limits(student_shape, vae_shape)
    args.aspect_ratio_buckets = read_buckets(args.aspect_ratio_buckets, *how)
    if args.dry_run:
        return print_dry_run(student_shape, teacher_shape, vae_shape, recipe, text_encoders, source, args)
    scheduler, sampler = load_scheduler(source, accelerator.device), load_part(source, sampler, "scheduler")
    tokenizers = {name: load_tokenizer(source, name, args.max_sequence_length) for name in text_encoders}
    find_weights(source, {name: TEXT_ENCODERS[name].model for name in text_encoders}, [*PARTS, *TEXT_PARTS])

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
        size = args.aspect_ratio_buckets or args.resolution
        inputs = dataset, ["", *prompts], contents, tokenizers, source, size, args.random_flip
        dataset, text = encode_dataset(*inputs, partial(cache, batch_size=args.encoding_batch_size), device, dtype)
    else:
        encoders = Encoders(source, text_encoders, device, dtype)
        text = encoders.encode_text(tokenize(tokenizers, ["", *prompts]))
    layout = TextLayout.of(teacher_shape.config, args.max_sequence_length)
    text = join_text(text, layout)
    shape = student_shape.config.in_channels, *[student_shape.config.sample_size] * 2
    draw = partial(make_draws, shape=shape, **{name: getattr(args, name) for name in DRAW_FLAGS})
    how = {"scheduler": scheduler, "encoders": encoders, "layout": layout, "draw": draw}
    inputs_of = partial(make_inputs, no_text=tuple(embeddings[0].to(device) for embeddings in text), **how)

    # ---- student
    if args.student_depth is not None:
        data = dataset, args.train_batch_size, inputs_of, args.seed, output_dir, args.resume_from_checkpoint
        kept = choose_blocks(source, args.student_depth, *data, accelerator, args.teacher_dtype, args.offload_teacher)
        student_shape, recipe = build_student(teacher_shape, vae_shape, args, kept)
    seed_step(args.seed)
    first = torch.device("cpu") if args.fsdp and not args.cache_teacher else device
    how = args.teacher_dtype, dtype, first, args.offload_teacher
    place = first_place(*how) if args.share_backbone else (torch.device("cpu"), torch.float32)
    teacher = load_frozen(source, SD3Transformer2DModel, "transformer", *place)  # not rounded before it is copied
    with torch.device("meta" if args.share_backbone else "cpu"):
        transformer = SD3Transformer2DModel.from_config(student_shape.config)
    fill_student(transformer, teacher, recipe, args.student_init, args.share_backbone)
    teacher = hold_teacher(teacher, *how) if args.kd_loss != "none" else None
    if args.lora_rank:  # seeded anew, so that the adapters do not depend on how the student was made
        seed_step(args.seed)
        add_adapters(transformer, args.lora_rank, LORA_TARGETS, dtype)
    values = {name: getattr(args, name) for name in SAMPLING_FLAGS} | {"accelerator": accelerator}
    sample = partial(stop.leave_together(sample_images), scheduler=sampler, text=text, **values)
    load_vae = partial(load_frozen, source, AutoencoderKL, "vae", device, torch.float32)
    teacher_samples, passes = [], args.cache_teacher or 1
    if args.cache_teacher:
        key = contents | {"scheduler": public_config(scheduler.config), "text": [*text_encoders, *layout, str(dtype)]}
        how = passes, args.seed, args.cache_teacher_dtype, source, [*PARTS, *TEXT_PARTS], key
        how += partial(cache, batch_size=args.train_batch_size), device, partial(latent_shape, vae=vae_shape)
        dataset = cache_predictions(dataset, teacher, inputs_of, draw, *how)
        with fits_the_gpu("the grid of the teacher's samples", "pass fewer --validation_prompts"):
            teacher_samples, teacher = sample(teacher, vae=load_vae()), None
    dataloader = make_dataloader(dataset, args.train_batch_size, workers, accelerator, contents.get("buckets"))
    length = args.max_train_steps, args.num_train_epochs, len(dataloader) / passes
    args.max_train_steps = count_steps(*length, accelerator)
    inputs = example_inputs(transformer, args.max_sequence_length)
    student, teacher_model = pair_features(transformer, teacher, recipe["features"], inputs, item=1)
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
    how = {"inputs_of": inputs_of, "kd_loss": kd_loss, "lambdas": lambdas, "task_loss": args.task_loss}
    losses_of = partial(compute_losses, student, teacher_model, weighting_scheme=args.weighting_scheme, **how)
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
        save_pipeline(transformer, teacher_shape, recipe, text_encoders, source, args)
        if args.push_to_hub:
            push_to_hub(output_dir, args.hub_model_id, stop)
    accelerator.end_training()


if __name__ == "__main__":
    main(parse_args())
