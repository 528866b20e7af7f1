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

`imagenet/train` holds a sub-folder of images per class, with its number or the teacher's word for it as the name.
Other names are numbered in sorted order, as ImageNet has them. Images are resized to the teacher's size.

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
import json
import math
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
from common.cache import cache_encodings
from common.card import write_model_card
from common.checkpoints import prepare_output
from common.classes import find_wrong_label, number_classes, number_labels, read_classes
from common.costs import (
    NO_ENCODING,
    dtype_of,
    estimate_decoding,
    estimate_image_encoding,
)
from common.data import choose_samples, drop_unreadable, load_images, report_unlisted
from common.ending import Stopped, StopSignals
from common.errors import fail
from common.estimates import count_costs, print_estimates
from common.full import end_in_one_line
from common.hub import create_hub_repo, push_to_hub, save_with_variant
from common.images import flip_rows, flip_views, load_pixels, random_flips
from common.loading import list_parts
from common.memory import fits_the_gpu
from common.metrics import MetricsLog, mean_over_processes
from common.pace import Due, count_steps, describe_start
from common.recipes import FEATURES_REMEDY, check_forward, model_errors_end, override_config, pair_blocks, read_recipe
from common.reporting import (
    autocast_of,
    gather_samples,
    grid_path,
    log_validation,
    plot_influence,
    share_of,
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
    spaced_blocks,
)
from common.teacher_cache import Batch, cache_predictions, predict
from common.teacher_weights import hold_teacher
from common.teachers import (
    TeacherSource,
    find_sampler,
    freeze,
    load_from,
    load_noise_schedule,
    load_part,
    load_skeleton,
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
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    SchedulerMixin,
)
from diffusers.models.embeddings import LabelEmbedding
from diffusers.training_utils import EMAModel
from PIL import Image

from lift_utils import FeatureModel, KDLoss, make_kd_loss, prediction_error


logger = get_logger(__name__)

TEACHER = "facebook/DiT-XL-2-256"
EXPECTED = f"pass a DiTPipeline: a folder, or a Hub id such as {TEACHER}"

# A preset says what a JSON file says, {"depth": evenly spaced blocks, "config": {overrides}, "blocks": {...},
# "features": [...]}. Of DiT-XL/2's 28 blocks d14 keeps 1, 3, 5, ... and d7 keeps 3, 7, 11, ... Of its 749.8M
# parameters they keep 509.7M, 376.3M, 189.5M and 109.4M, as Diffusers counts: it holds an embedding of timesteps and
# labels in every block, where the original, of 675M, has one.
STUDENTS = {f"d{depth}": {"depth": depth} for depth in (19, 14, 7, 4)}

# Which of their blocks are compared with which of a teacher's 28, where these are not those that they start from: the
# lists of the method's authors.
PAIRS = {"d19": dict(zip((2, 5, 7, 10, 12, 15, 18), range(3, 28, 4))), "d4": dict(enumerate((1, 8, 15, 22)))}

# The published recipe of DiT-XL/2: the defaults of shared flags.
RECIPE = {
    "random_flip": True,
    "coarse_norm": "l2",
    "output_dir": "lift-dit",
    "train_batch_size": 32,
    "gradient_accumulation_steps": 8,
    "max_train_steps": 100_000,
    "learning_rate": 2e-4,
    "lr_scheduler": "cosine_to_half",
}

INFLUENCE_IMAGES = 256  # on which --student_depth measures the influence of the teacher's blocks


# ------------------------------------------------------------------------------------------------------- the arguments


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line (or `input_args`); the defaults are the published recipe of DiT-XL/2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    groups = add_shared_arguments(parser)
    add_streaming_arguments(groups["data"])

    group = groups["models"]
    group.add_argument(
        "--pretrained_teacher_model",
        help=f"DiTPipeline: a folder or Hub id (default unless trained from scratch: {TEACHER})",
    )
    group.add_argument(
        "--vae", help='"none" for pixels, or an AutoencoderKL, a folder or Hub id (default: the teacher\'s)'
    )
    group.add_argument("--student", help=f"{', '.join(STUDENTS)} of the teacher's blocks, or a JSON file")
    group.add_argument("--keep_blocks", help="or the teacher's blocks to keep, e.g. 0,2,4")
    group.add_argument("--student_depth", type=int, help="or how many to keep: those that change their tokens most")
    group.add_argument(
        "--student_init", default="teacher", choices=("teacher", "random"), help="the teacher's blocks, or start fresh"
    )
    group.add_argument(
        "--prediction_type",
        default="epsilon",
        choices=("epsilon", "v_prediction", "sample"),
        help="what a model without a teacher predicts; with one, the teacher's scheduler says",
    )

    group = groups["data"]
    group.add_argument("--train_data_dir", help="folder with a sub-folder of images per class")
    group.add_argument("--label_column", default="label", help="column of the classes")
    group.add_argument("--label_dropout", type=float, default=0.1, help="share of labels dropped, for guidance")
    group.add_argument("--cache_latents", action="store_true", help="run the VAE once, before the training")
    group.add_argument("--encoding_batch_size", type=int, default=16, help="images at a time for --cache_latents")

    group = groups["distillation"]
    group.add_argument("--snr_gamma", type=float, help="weigh timesteps by min-SNR-γ, of which 5 is usual")
    group.add_argument("--kd_alpha", type=float, default=0.9, help="weight of the teacher, 1 minus that of the data")
    group.add_argument("--lambda_kd_feat", type=float, default=1e-2, help="first weight of the tokens, falling to 0")

    group = groups["logging"]
    group.add_argument(
        "--validation_classes", nargs="+", help="rows of the sample grid, by number or name (default: the first eight)"
    )
    group.add_argument("--num_inference_steps", type=int, default=50, help="steps of the teacher's sampler per sample")
    group.add_argument("--guidance_scale", type=float, default=4.0, help="classifier-free guidance of the samples")
    group.add_argument(
        "--save_fp16_variant", action="store_true", help="save half-precision weights beside the others"
    )

    parser.set_defaults(**RECIPE)
    args = parser.parse_args(input_args)
    from_scratch = args.kd_loss == "none" and (args.student or "").endswith(".json")
    if args.pretrained_teacher_model is None and not from_scratch:
        args.pretrained_teacher_model = TEACHER
    check_args(args)
    check_streaming(vars(args))
    check_script_args(args)
    return args


def check_script_args(args: argparse.Namespace) -> None:
    """Refuse wrong values of this script's own flags before anything is loaded."""
    given = [name for name in ("student", "keep_blocks", "student_depth") if getattr(args, name) is not None]
    if len(given) != 1:
        found = " and ".join(f"--{name} {getattr(args, name)}" for name in given) or "nothing"
        fail(f"{found} says which blocks the student has; pass one of --student, --keep_blocks and --student_depth")
    if args.pretrained_teacher_model is None and args.vae is None:
        fail('--vae is not given and there is no teacher to take one from; pass "none" for pixels, or a folder')
    if args.offload_teacher:
        fail("--offload_teacher does not go with a DiT, which Diffusers does not offload; drop it")
    if args.vae == "none" and args.cache_latents:
        fail("--cache_latents has nothing to do with --vae none; drop it")


# ---------------------------------------------------------------------------------------------------------- the models


def check_pipeline(source: TeacherSource | None, has_vae: bool) -> tuple[type[SchedulerMixin], dict[int, str]]:
    """Refuse pipelines that this script does not distil; returns the sampler's class and the names of the classes.

    Args:
        source: `None` without a teacher, for which there is DDIM.
        has_vae: Whether the VAE comes from elsewhere, by `--vae`.
    """
    if source is None:
        return DDIMScheduler, {}
    index = load_from(source, DiffusionPipeline.load_config)
    kind = index.get("_class_name") if isinstance(index, dict) else "list"
    if kind != "DiTPipeline":
        fail(f"--pretrained_teacher_model {source.path} is a {kind}; {source.expected}")
    parts = list_parts(index)
    vae, scheduler = parts.get("vae"), parts.get("scheduler")
    if vae != "AutoencoderKL" and not has_vae:
        remedy = f"pass --vae, or {source.expected.removeprefix('pass ')}"
        fail(f"--pretrained_teacher_model {source.path} has {vae or 'no'} vae; {remedy}")
    names = {int(number): name for number, name in (index.get("id2label") or {}).items()}
    return find_sampler(source, scheduler), names


def load_schedulers(
    source: TeacherSource | None, sampler: type[SchedulerMixin], prediction_type: str
) -> tuple[DDPMScheduler, SchedulerMixin]:
    """The teacher's noise schedule, for training and for sampling; without a teacher, DiT's.

    Args:
        sampler: The class of the second.
        prediction_type: What a model without a teacher predicts.
    """
    if source is not None:
        return load_noise_schedule(source, sampler), load_part(source, sampler, "scheduler")
    # Clipped guesses of x_0 do not go with the noise that DDIM keeps beside them: guided samples come out glaring.
    options = {"num_train_timesteps": 1000, "prediction_type": prediction_type, "clip_sample": False}
    return DDPMScheduler(**options), sampler(**options)


def depth_recipe(kept: list[int]) -> dict:
    """The recipe of a student whose block i comes from, and is paired with, the teacher's block kept[i]."""
    pairs = [[f"transformer_blocks.{index}", f"transformer_blocks.{block}"] for index, block in enumerate(kept)]
    outside = {name: name for name in ("pos_embed", "proj_out_1", "proj_out_2")}
    return {"kept": kept, "config": {"num_layers": len(kept)}, "blocks": outside | dict(pairs), "features": pairs}


def read_student(student: str | None, keep_blocks: str | None, student_depth: int | None, teacher_depth: int) -> dict:
    """The recipe that the flags ask for; until [`choose_blocks`] has run, evenly spaced blocks stand for its own.

    Args:
        teacher_depth: Blocks of the teacher, 0 without one.
    """
    if keep_blocks is not None:
        return depth_recipe(read_blocks(keep_blocks, teacher_depth))
    recipe = {"depth": student_depth}
    if student is not None:
        recipe = read_recipe(student, STUDENTS, ("config", "blocks", "features"))
    if "depth" not in recipe:
        return recipe
    if not 1 <= recipe["depth"] <= teacher_depth:
        flag = f"--student {student}" if student is not None else f"--student_depth {student_depth}"
        fail(f"{flag}: the teacher has {teacher_depth} blocks; keep 1 to {teacher_depth}")
    recipe = depth_recipe(spaced_blocks(recipe["depth"], teacher_depth))
    if student in PAIRS and teacher_depth == 28:
        recipe["features"] = [[f"transformer_blocks.{block}" for block in pair] for pair in PAIRS[student].items()]
    return recipe


def student_config(teacher_config: dict, recipe: dict) -> dict:
    """The teacher's config with the recipe's overrides, and with out_channels, which `DiTPipeline` reads."""
    config = public_config(teacher_config)
    config = override_config(DiTTransformer2DModel, config, recipe)
    return config | {"out_channels": config.get("out_channels") or config.get("in_channels", 4)}


def build_student(
    teacher: DiTTransformer2DModel | None, args: argparse.Namespace, kept: list[int] | None = None
) -> tuple[DiTTransformer2DModel, dict]:
    """The student on the meta device, and its recipe with the pairs of the feature term.

    Args:
        teacher: Its skeleton, or `None`.
        kept: The blocks that [`choose_blocks`] has chosen, once it has.
    """
    if kept is None:
        depth = teacher.config.num_layers if teacher is not None else 0
        recipe = read_student(args.student, args.keep_blocks, args.student_depth, depth)
    else:
        recipe = depth_recipe(kept)
    mismatch = f"{'the student' if args.student is None else f'--student {args.student}'} does not fit"
    with model_errors_end(mismatch, "correct the JSON file, or pass --student_init random"):
        with torch.device("meta"):
            config = student_config(dict(teacher.config) if teacher is not None else {}, recipe)
            student = DiTTransformer2DModel.from_config(config)
        if teacher is not None and args.student_init == "teacher":
            match_blocks(student, teacher.state_dict(), recipe.get("blocks"))
    if teacher is not None:
        config = student_config(dict(teacher.config), {})
        for key in ("in_channels", "out_channels", "sample_size", "num_embeds_ada_norm"):
            if student.config[key] != config[key]:
                fail(f"{mismatch}: its {key} is {student.config[key]}; keep the teacher's {config[key]}")
    subject = f"--pretrained_teacher_model {args.pretrained_teacher_model}"
    check_sizes(student, args.group_size if args.kd_loss == "place" else None, subject)
    check_forward(student, example_inputs(student), mismatch)

    if teacher is None or args.kd_loss == "none" or args.lambda_kd_feat == 0:
        recipe = {**recipe, "features": []}
    if "features" not in recipe:
        recipe = {**recipe, "features": pair_blocks(recipe, student.config.num_layers, teacher.config.num_layers)}
    with model_errors_end(mismatch, FEATURES_REMEDY):
        pair_features(student, teacher, recipe["features"], example_inputs(student))
    return student, recipe


def check_sizes(student: DiTTransformer2DModel, group_size: int | None, subject: str) -> None:
    """Refuse sizes with which no step could be taken.

    Args:
        group_size: Of PLACE, `None` for other losses.
        subject: The flag that the student comes from, with its value.
    """
    channels, out_channels = student.config.in_channels, student.config.out_channels
    if out_channels not in (channels, 2 * channels):
        fail(
            f"{subject}: the transformer's {channels} channels become {out_channels}; choose one, or a --student, "
            f"that makes {channels} of them, or {2 * channels} with a learned variance"
        )
    check_groups(group_size, student.config.sample_size**2)


@torch.no_grad()
def choose_blocks(
    teacher: DiTTransformer2DModel,
    depth: int,
    dataset: datasets.Dataset,
    batch_size: int,
    inputs_of: Callable[[Batch], tuple],
    seed: int,
    output_dir: Path,
    resume_from: str | None,
    accelerator: Accelerator,
) -> list[int]:
    """The `depth` blocks of the teacher that change their tokens most, measured on noisy images of all classes.

    The choice is kept as blocks.json, see [`choose_once`], and plotted as influence.png.
    """

    def measure() -> tuple[list[float], list[int]]:
        seed_step(seed)
        if isinstance(dataset, StreamedDataset):
            rows = dataset.sample(INFLUENCE_IMAGES)
        else:
            places = range(0, len(dataset), math.ceil(len(dataset) / INFLUENCE_IMAGES))
            rows = torch.utils.data.Subset(dataset, places)
        loader = torch.utils.data.DataLoader(rows, batch_size)
        teacher.to(accelerator.device).eval()

        def run() -> None:
            for batch in loader:
                batch = {name: tensor.to(accelerator.device) for name, tensor in batch.items()}
                teacher(**inputs_of(batch)[0] | {"class_labels": batch["labels"]})  # none of them dropped

        influence = measure_influence(teacher.transformer_blocks, run)
        kept = sorted(sorted(range(len(influence)), key=influence.__getitem__)[-depth:])
        named = ", ".join(map(str, kept))
        logger.info(f"influence of the teacher's blocks: {', '.join(f'{value:.4f}' for value in influence)}")
        logger.info(f"the student keeps {named}: the same as --keep_blocks {named.replace(' ', '')}")
        if accelerator.is_main_process:
            plot_influence(influence, kept, output_dir / "influence.png")
        return influence, kept

    return choose_once(output_dir / "blocks.json", depth, measure, resume_from, accelerator)


def fill_student(
    student: DiTTransformer2DModel, teacher: DiTTransformer2DModel, recipe: dict, student_init: str
) -> None:
    """Put the teacher's weights into the student as `--student_init` and the recipe say."""
    fill_from_blocks(student, teacher, recipe.get("blocks"), random=student_init == "random")


def keep_labels(transformer: DiTTransformer2DModel) -> None:
    """Stop the label embeddings from dropping labels while training, each block others; see [`make_draws`].

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


def make_dataset(
    args: argparse.Namespace, num_classes: int, names: dict[int, str], channels: int, resolution: int
) -> tuple[datasets.Dataset | StreamedDataset, dict[str, str], dict[int, str]]:
    """A dataset of `{"images": uint8 (channels, resolution, resolution), "labels": int}`, without unreadable images.

    Args:
        num_classes: Of the model. A label that is none of 0, ..., num_classes - 1 ends the run.
        names: Of these classes by number, if the teacher's pipeline has them.

    Returns:
        The dataset, what identifies its contents in a cache, and the names of the classes that it has.
    """
    columns = {"image_column": args.image_column, "label_column": args.label_column}
    folders = args.dataset_name, args.dataset_config_name, args.train_data_dir, args.cache_dir
    mode = "L" if channels == 1 else "RGB"
    load = partial(load_examples, **columns, mode=mode, size=resolution)

    def named(numbers: list[int] | None, found: dict[int, str]) -> dict[int, str]:
        # Other classes than the teacher's, which is not asked: the student has these alone.
        own = args.kd_loss == "none" and numbers is None and len(found) not in (0, num_classes)
        return found if own else names or found

    if args.streaming:
        stream, source = load_images(*folders, columns, streaming=True)
        numbers, found = number_labels(stream, args.label_column, num_classes, names)
        how = args.image_column, args.max_unreadable, args.seed, args.shuffle_buffer, args.output_dir
        labelled = partial(find_wrong_label, label_column=args.label_column, numbers=numbers, num_classes=num_classes)
        streamed = StreamedDataset(stream, source, partial(load, numbers=numbers), *how, labelled)
        return streamed, {}, named(numbers, found)
    dataset, source = load_images(*folders, columns)
    if args.train_data_dir is not None:
        report_unlisted(args.train_data_dir, dataset, args.image_column, source, "have no label", args.max_unreadable)
    dataset = choose_samples(dataset, args.max_train_samples, args.seed)
    numbers, found = number_classes(dataset, args.label_column, num_classes, names)
    how = args.max_unreadable, args.dataloader_num_workers, resolution
    dataset = drop_unreadable(dataset, args.image_column, source, *how)
    contents = {"data": dataset._fingerprint, "image": args.image_column, "label": args.label_column}
    contents |= {"classes": str(numbers)} if numbers is not None else {}
    return dataset.with_transform(partial(load, numbers=numbers)), contents, named(numbers, found)


def load_examples(
    batch: dict[str, list], image_column: str, label_column: str, numbers: list[int] | None, mode: str, size: int
) -> dict[str, list]:
    """Decode, resize the shorter side and crop the centre; number the classes as the model does."""
    labels = [numbers[label] if numbers else label for label in batch[label_column]]
    return {"images": load_pixels(batch[image_column], mode, size), "labels": labels}


class Encoders:
    """The frozen VAE in the precision of the run, on its device; without one, images are their own latents."""

    def __init__(self, vae: AutoencoderKL | None, device: torch.device, dtype: torch.dtype):
        self.device, self.dtype = device, dtype
        self.vae = freeze(copy.deepcopy(vae), device, dtype) if vae is not None else None

    @torch.no_grad()
    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        """Mean and standard deviation of the scaled latents, (B, 2, C, h, w), of uint8 images (B, 1 or 3, H, W)."""
        images = images.to(self.device).float() / 127.5 - 1
        if self.vae is None:
            return torch.stack([images, torch.zeros_like(images)], dim=1)
        latents = self.vae.encode(images.to(self.dtype)).latent_dist
        return torch.stack([latents.mean, latents.std], dim=1) * self.vae.config.scaling_factor


def encode_dataset(
    dataset: datasets.Dataset,
    contents: dict[str, str],
    source: TeacherSource | None,
    vae_path: str | None,
    vae: AutoencoderKL,
    resolution: int,
    random_flip: bool,
    cache: Callable[..., datasets.Dataset],
    device: torch.device,
    dtype: torch.dtype,
) -> datasets.Dataset:
    """The dataset as `{"moments": (flips, 2, C, h, w), "labels": ()}`; the VAE runs once.

    Args:
        contents: What identifies the dataset: see [`make_dataset`].
        vae_path: Of the VAE, `None` for the teacher's.
        cache: [`cache_encodings`] with the settings of the run.
    """

    def load_encoders() -> Callable:
        encoders = Encoders(vae, device, dtype)

        def encode(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            moments = [encoders.encode_images(view) for view in flip_views(batch["images"], both=random_flip)]
            return {"moments": torch.stack(moments, dim=1), "labels": batch["labels"]}

        return encode

    key = identify_vae(source, vae_path)
    key |= {"dtype": str(dtype), "resolution": resolution, "crop": "centre", "both flips": random_flip}
    key |= {"variant": source.variant if source is not None else None}
    return cache(dataset, load_encoders, {**key, **contents})


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
    count: int, device: torch.device, shape: tuple[int, int, int], steps: int, random_flip: bool, label_dropout: float
) -> dict[str, torch.Tensor]:
    """All that is random in a batch: flips (B,), two noises (B, C, h, w), timesteps (B,), dropped labels (B,).

    Args:
        count: B.
        shape: Of the latents of an image, (C, h, w).
        steps: Of the noise schedule.
        random_flip: Whether images are flipped.
        label_dropout: Share of the labels that are dropped.
    """
    return {
        "flips": random_flips(count, random_flip, device),
        "vae_noise": torch.randn(count, *shape, device=device),
        "noise": torch.randn(count, *shape, device=device),
        "timesteps": torch.randint(steps, (count,), device=device),
        "dropped": torch.rand(count, device=device) < label_dropout,
    }


def encode_batch(batch: Batch, encoders: Encoders | None, flips: torch.Tensor) -> torch.Tensor:
    """Moments (B, 2, C, h, w) of a batch, cached or computed now; flipped or not."""
    if encoders is None:
        return batch["moments"][torch.arange(len(flips), device=flips.device), flips.long()]
    return encoders.encode_images(flip_rows(batch["images"], flips))


def make_inputs(
    batch: Batch,
    scheduler: DDPMScheduler,
    encoders: Encoders | None,
    null_class: int,
    draw: Callable[[int, torch.device], dict[str, torch.Tensor]],
) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """A model's inputs, what it must predict on them, and the latents without noise, both (B, C, h, w).

    Args:
        batch: With "labels", (B,), and with "images", uint8, (B, 1 or 3, H, W), or cached "moments",
            (B, flips, 2, C, h, w).
        encoders: `None` for a cached batch.
        null_class: What a dropped label becomes.
        draw: [`make_draws`] with the settings of the run, for a batch that has none.
    """
    rows = batch["images" if encoders is not None else "moments"]
    draws = batch["draws"] if "draws" in batch else draw(len(rows), rows.device)
    mean, std = encode_batch(batch, encoders, draws["flips"]).float().unbind(1)
    latents = mean + std * draws["vae_noise"]
    noisy, target = add_noise(scheduler, latents, draws["noise"], draws["timesteps"])
    labels = torch.where(draws["dropped"], null_class, batch["labels"])
    return {"hidden_states": noisy, "timestep": draws["timesteps"], "class_labels": labels}, target, latents


def split_output(output: torch.Tensor, channels: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The prediction and, where the model learned it, the variance."""
    return (output, None) if output.shape[1] == channels else tuple(output.chunk(2, dim=1))


Gaussian = tuple[torch.Tensor, torch.Tensor]  # mean and log-variance, (B, C, h, w) or what broadcasts to it


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
        # Without signal, as at a last timestep of zero SNR, noise does not say what the image is.
        self.says_image = (self.tables["signal"] > 0) | (self.prediction_type != "epsilon")

    def at(self, name: str, timesteps: torch.Tensor) -> torch.Tensor:
        """The values of a table at the timesteps, (B, 1, 1, 1)."""
        return self.tables[name][timesteps].view(-1, 1, 1, 1)

    def posterior(self, clean: torch.Tensor, noisy: torch.Tensor, timesteps: torch.Tensor) -> Gaussian:
        """Mean and log-variance of q(x_{t-1} | x_t, x_0)."""
        mean = self.at("from_clean", timesteps) * clean + self.at("from_noisy", timesteps) * noisy
        return mean, self.at("smallest", timesteps)

    def predicted(
        self, prediction: torch.Tensor, variance: torch.Tensor, noisy: torch.Tensor, timesteps: torch.Tensor
    ) -> Gaussian:
        """Mean, detached, and log-variance of the model's p(x_{t-1} | x_t), of the two halves of its output."""
        prediction, noisy = prediction.detach().float(), noisy.float()
        signal, noise = self.at("signal", timesteps), self.at("noise", timesteps)
        if self.prediction_type == "epsilon":
            clean = (noisy - noise * prediction) / torch.where(signal > 0, signal, 1.0)
        elif self.prediction_type == "v_prediction":
            clean = signal * noisy - noise * prediction
        else:
            clean = prediction
        smallest, largest = self.at("smallest", timesteps), self.at("largest", timesteps)
        return self.posterior(clean, noisy, timesteps)[0], smallest + (variance.float() + 1) / 2 * (largest - smallest)


def gaussian_kl(of: Gaussian, to: Gaussian) -> torch.Tensor:
    """KL(of ‖ to) of Gaussians (mean, log-variance), (B, C, h, w), in bits per dimension, (B,)."""
    (mean, log), (other_mean, other_log) = of, to
    nats = 0.5 * (other_log - log - 1 + (log - other_log).exp() + (mean - other_mean).square() * (-other_log).exp())
    return nats.flatten(1).mean(1) / math.log(2)


def decoder_nll(clean: torch.Tensor, gaussian: Gaussian) -> torch.Tensor:
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


def variational_bound(
    process: ReverseProcess,
    prediction: torch.Tensor,
    variance: torch.Tensor,
    clean: torch.Tensor,
    noisy: torch.Tensor,
    timesteps: torch.Tensor,
) -> torch.Tensor:
    """The variational bound's term at each timestep, averaged over the batch, in bits per dimension.

    KL(q(x_{t-1} | x_t, x_0) ‖ p(x_{t-1} | x_t)), and at t = 0 -log p(x_0 | x_1). The mean is detached: the variance
    channels alone learn from it, as in improved DDPM and DiT. It is 0 where the prediction does not give a mean.
    """
    model = process.predicted(prediction, variance, noisy, timesteps)
    kl = gaussian_kl(process.posterior(clean, noisy, timesteps), model)
    bound = torch.where(timesteps == 0, decoder_nll(clean, model), kl)
    return (bound * process.says_image[timesteps]).mean()


def variance_kd(
    process: ReverseProcess,
    student_output: tuple[torch.Tensor, torch.Tensor],
    teacher_output: tuple[torch.Tensor, torch.Tensor],
    noisy: torch.Tensor,
    timesteps: torch.Tensor,
) -> torch.Tensor:
    """KL of the teacher's p(x_{t-1} | x_t) to the student's, averaged over the batch, in bits per dimension.

    It is the variational bound with the teacher in the place of the data. The student's mean is detached: the variance
    channels alone learn from it, the prediction learns from the output term. It is 0 where there are no means.

    Args:
        student_output: Both halves of its output, (prediction, variance).
        teacher_output: The same of the teacher.
    """
    teacher_gaussian = process.predicted(*teacher_output, noisy, timesteps)
    kl = gaussian_kl(teacher_gaussian, process.predicted(*student_output, noisy, timesteps))
    return (kl * process.says_image[timesteps]).mean()


def masked_mse(student_tokens: torch.Tensor, teacher_tokens: torch.Tensor) -> torch.Tensor:
    """Mean squared difference of tokens (B, N, C), each tensor's own outliers set to 0 (TinyFusion, CVPR 2025).

    An element is an outlier if it is more than two standard deviations from the mean, both over all elements of its
    sample in its own tensor. A transformer's few massive activations would make up most of the difference.
    """

    def without_outliers(tokens: torch.Tensor) -> torch.Tensor:
        deviation = (tokens.detach() - tokens.detach().mean((1, 2), keepdim=True)).abs()
        return tokens * (deviation <= 2 * deviation.square().mean((1, 2), keepdim=True).sqrt())

    return F.mse_loss(without_outliers(student_tokens.float()), without_outliers(teacher_tokens.float()))


def compute_losses(
    student: FeatureModel,
    teacher: FeatureModel | None,
    batch: Batch,
    progress: float,
    inputs_of: Callable[[Batch], tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]],
    kd_loss: KDLoss | None,
    kd_alpha: float,
    lambda_kd_feat: float,
    process: ReverseProcess,
    task_loss: str = "mse",
    snr_weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """One micro-batch's loss and its parts, as tensors that stay on the device.

    (1 - α) · (task + vb) + α · (kd + kd_vb) + β · feat, where β falls from `lambda_kd_feat` to 0 over the run.

    Args:
        teacher: `None` without distillation, and for batches with the "teacher"'s output.
        batch: See [`make_inputs`].
        progress: Share of the run that is done, for the scheduled weights.
        inputs_of: [`make_inputs`] with all but the batch.
        kd_loss: Between the outputs of student and teacher; `None` without distillation.
        kd_alpha: α.
        process: Of the scheduler.
        task_loss: "mse" or "rms", on the data.
        snr_weights: Of the timesteps, (T,), in `task` and `kd`; `None` is without.
    """
    inputs, target, latents = inputs_of(batch)  # the same for student and teacher
    noisy, timesteps = inputs["hidden_states"], inputs["timestep"]

    if kd_loss is not None:  # first: what the teacher works with is gone when the student's activations come
        teacher_output, teacher_features = predict(teacher, inputs, batch)
    output, features = student(**inputs)
    prediction, variance = split_output(output, latents.shape[1])
    weights = snr_weights[timesteps] if snr_weights is not None else None
    task = prediction_error(prediction, target, task_loss, weights)
    logs = {"task": task}
    if variance is not None:
        logs["vb"] = variational_bound(process, prediction, variance, latents, noisy, timesteps)
    loss = sum(logs.values())

    if kd_loss is not None:
        teacher_prediction, teacher_variance = split_output(teacher_output, latents.shape[1])
        kd, parts = kd_loss(prediction, teacher_prediction, progress, weights)
        logs |= {"kd": kd, **parts}
        if variance is not None:
            outputs = (prediction, variance), (teacher_prediction, teacher_variance)
            logs["kd_vb"] = variance_kd(process, *outputs, noisy, timesteps)
            kd = kd + logs["kd_vb"]
        loss = (1 - kd_alpha) * loss + kd_alpha * kd
        if features:
            feat = torch.stack([masked_mse(*pair) for pair in zip(features, teacher_features)]).mean()
            loss = loss + lambda_kd_feat * (1 - progress) * feat
            logs["feat"] = feat

    return loss, {"loss": loss, **logs}


# ---------------------------------------------------------------------------------------------- samples and the result


@torch.no_grad()
def sample_images(
    transformer: DiTTransformer2DModel,
    vae: AutoencoderKL,
    scheduler: SchedulerMixin,
    classes: list[int],
    seed: int,
    num_inference_steps: int,
    guidance_scale: float,
    accelerator: Accelerator,
) -> list[Image.Image]:
    """One guided sample per class by the teacher's sampler, from the noise that the seed fixes, the same for all.

    As `DiTPipeline` does it, but the null class is the model's own where that takes 1000 for it.

    Args:
        vae: In float32, on the device.
        scheduler: The teacher's.
        guidance_scale: 1 or less is no guidance.
    """
    config, count, device = transformer.config, len(classes), accelerator.device
    mine = share_of(count, accelerator)
    seed_step(seed)  # samplers may draw noise of their own
    latents = torch.randn(count, config.in_channels, config.sample_size, config.sample_size)[mine].to(device)
    learned = str(scheduler.config.get("variance_type")).startswith("learned")  # then it takes the variance, too
    labels = [classes[row] for row in mine] + [config.num_embeds_ada_norm] * len(mine)
    labels = torch.tensor(labels, device=device)
    scheduler.set_timesteps(min(num_inference_steps, scheduler.config.num_train_timesteps), device=device)
    latents = latents * scheduler.init_noise_sigma
    for step in scheduler.timesteps:
        both = scheduler.scale_model_input(latents, step).repeat(2, 1, 1, 1).to(transformer.dtype)
        with autocast_of(transformer, accelerator):
            output = transformer(both, step.expand(2 * len(mine)), labels, return_dict=False)[0]
        predictions, variances = split_output(output, config.in_channels)
        guided, unguided = predictions.chunk(2)
        guided = unguided + max(guidance_scale, 1) * (guided - unguided)
        if learned and variances is not None:
            guided = torch.cat([guided, variances.chunk(2)[0]], dim=1)
        latents = scheduler.step(guided, step, latents).prev_sample
    latents = latents / vae.config.scaling_factor
    images = torch.cat([vae.decode(image).sample for image in latents.split(1)])  # one by one: decoding takes memory
    pixels = (images / 2 + 0.5).clamp(0, 1).cpu().permute(0, 2, 3, 1).numpy()
    return gather_samples(DiTPipeline.numpy_to_pil(pixels), count)


def save_pipeline(
    student: DiTTransformer2DModel,
    teacher: DiTTransformer2DModel | None,
    recipe: dict,
    vae: AutoencoderKL,
    sampler: SchedulerMixin,
    names: dict[int, str],
    args: argparse.Namespace,
) -> None:
    """The pipeline folder with its VAE, scheduler and class names, model card, sample grid and curves.

    Args:
        teacher: Its skeleton, or `None`.
        names: Of the classes, by number.
    """
    output_dir = Path(args.output_dir)
    pipeline = DiTPipeline(student, vae, sampler)
    # The pipeline reads this from its index when it loads, but does not write it there.
    pipeline.register_to_config(id2label={str(number): name for number, name in names.items()})
    save_with_variant(pipeline, output_dir, args.save_fp16_variant)

    count = student.num_parameters()
    if teacher is None:
        facts = [f"- Trained from scratch, {count:,} parameters, {student.config.num_layers} blocks."]
    else:
        share = count / teacher.num_parameters()
        kept = ", ".join(map(str, recipe["kept"])) if "kept" in recipe else args.student
        facts = [
            f"- Teacher: `{args.pretrained_teacher_model}`, {teacher.num_parameters():,} parameters.",
            f"- Student: {count:,} parameters, {share:.1%} of the teacher's: {kept} of its "
            f"{teacher.config.num_layers} blocks, `--student_init {args.student_init}`.",
        ]
        if args.kd_loss != "none":
            weights = f"{args.kd_alpha} for the teacher's output and variance, the rest of 1 for the data"
            facts.append(f"- Weights: {weights}.")
    side = student.config.sample_size * vae_factor(vae)
    space = "pixels, behind a VAE that changes nothing" if args.vae == "none" else "latents"
    facts.append(f"- Images of {side} pixels as {space}; {args.label_dropout:.0%} of the labels dropped.")
    null, guidance = student.config.num_embeds_ada_norm, args.guidance_scale
    if null != 1000:
        remedy = "cannot guide this model; `sample_images` of train_lift_dit.py can."
        facts.append(f"- The null class is {null}: `DiTPipeline`, which takes 1000 for it, {remedy}")
        guidance = 1.0
    name = args.hub_model_id or output_dir.resolve().name
    usage = f'from diffusers import DiTPipeline\n\npipeline = DiTPipeline.from_pretrained("{name}")\n'
    usage += f"image = pipeline(class_labels=[0], guidance_scale={guidance}).images[0]"
    kind, tags = "A class-conditional diffusion transformer", ["class-conditional-image-generation"]
    write_model_card(output_dir, kind, facts, describe_run(args), usage, tags)
    logger.info(f"the model is in {output_dir}: see README.md, or draw by eval/generate.py --model {output_dir}")


def print_dry_run(
    student: DiTTransformer2DModel,
    teacher: DiTTransformer2DModel | None,
    vae: AutoencoderKL,
    recipe: dict,
    args: argparse.Namespace,
) -> None:
    """Print parameters, MACs, a memory estimate and the student's config. All models are skeletons."""
    plan, count = plan_run(args), student.num_parameters()

    def make_student() -> DiTTransformer2DModel:
        with torch.device("meta"):
            return DiTTransformer2DModel.from_config(student.config)

    costs = count_costs(plan, make_student, teacher, example_inputs(student), recipe.get("features", []))
    print(f"student: {count:,} parameters, {costs.macs:,} MACs per image and forward pass")
    if teacher is not None:
        total = teacher.num_parameters()
        print(f"teacher: {total:,} parameters, {costs.teacher_macs:,} MACs; the student is {count / total:.2%} of it")
    if args.vae != "none":
        batch = args.encoding_batch_size if args.cache_latents else plan.batch_size
        resolution = student.config.sample_size * vae_factor(vae)
        encoding = estimate_image_encoding(vae, dtype_of(plan.mixed_precision), resolution, batch)
        if args.cache_latents:
            print(f"beforehand, the VAE, batch {batch}: {encoding.peak / 2**20:,.1f} MiB")
            encoding = NO_ENCODING
        costs = costs._replace(encoding=encoding, decoding=estimate_decoding(vae, resolution))
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
    teacher_flags = args.pretrained_teacher_model, args.teacher_revision, args.variant
    source = TeacherSource(*teacher_flags, EXPECTED) if args.pretrained_teacher_model is not None else None
    sampler, names = check_pipeline(source, has_vae=args.vae is not None)
    teacher_shape = load_skeleton(source, DiTTransformer2DModel, "transformer") if source is not None else None
    student_shape, recipe = build_student(teacher_shape, args)
    vae = load_vae(source, args.vae, student_shape.config.in_channels, skeleton=args.dry_run)
    scheduler, sampler = load_schedulers(source, sampler, args.prediction_type)
    if args.dry_run:
        return print_dry_run(student_shape, teacher_shape, vae, recipe, args)

    # ---- output
    output_dir = prepare_output(args.output_dir, args.resume_from_checkpoint, accelerator.is_main_process)
    if args.push_to_hub and accelerator.is_main_process:
        args.hub_model_id = create_hub_repo(args.hub_model_id, output_dir, args.hub_private_repo)

    # ---- data
    device, dtype = accelerator.device, dtype_of(accelerator.mixed_precision)
    num_classes = student_shape.config.num_embeds_ada_norm
    resolution = student_shape.config.sample_size * vae_factor(vae)
    with accelerator.main_process_first():
        dataset, contents, names = make_dataset(args, num_classes, names, vae.config.in_channels, resolution)
    shown = read_classes(args.validation_classes, num_classes, names)
    workers, encoders = args.dataloader_num_workers, None
    cache = partial(cache_encodings, cache_dir=args.cache_dir, num_workers=workers, accelerator=accelerator)
    if args.cache_latents:
        inputs = dataset, contents, source, args.vae, vae, resolution, args.random_flip
        dataset = encode_dataset(*inputs, partial(cache, batch_size=args.encoding_batch_size), device, dtype)
    else:
        encoders = Encoders(vae if args.vae != "none" else None, device, dtype)
    shape = student_shape.config.in_channels, *[student_shape.config.sample_size] * 2
    how = {"random_flip": args.random_flip, "label_dropout": args.label_dropout}
    draw = partial(make_draws, shape=shape, steps=scheduler.config.num_train_timesteps, **how)
    how = {"scheduler": scheduler, "encoders": encoders, "null_class": num_classes, "draw": draw}
    inputs_of = partial(make_inputs, **how)

    # ---- student
    teacher = load_part(source, DiTTransformer2DModel, "transformer") if source is not None else None
    if args.student_depth is not None:
        data = dataset, args.train_batch_size, inputs_of, args.seed, output_dir
        kept = choose_blocks(teacher, args.student_depth, *data, args.resume_from_checkpoint, accelerator)
        student_shape, recipe = build_student(teacher_shape, args, kept)
    seed_step(args.seed)
    transformer = DiTTransformer2DModel.from_config(student_shape.config)
    keep_labels(transformer)
    if teacher is not None:
        fill_student(transformer, teacher, recipe, args.student_init)
    first = torch.device("cpu") if args.fsdp and not args.cache_teacher else device
    how = args.teacher_dtype, dtype, first, args.offload_teacher
    teacher = hold_teacher(teacher, *how) if teacher is not None and args.kd_loss != "none" else None
    how = {"seed": args.seed, "num_inference_steps": args.num_inference_steps, "classes": list(shown)}
    how |= {"guidance_scale": args.guidance_scale, "accelerator": accelerator}
    sample = partial(stop.leave_together(sample_images), scheduler=sampler, **how)
    teacher_samples, passes = [], args.cache_teacher or 1
    if args.cache_teacher:
        key = contents | {
            "scheduler": public_config(scheduler.config),
            "vae": [identify_vae(source, args.vae), str(dtype)],
        }
        how = passes, args.seed, args.cache_teacher_dtype, source, ["transformer"], key
        how += partial(cache, batch_size=args.train_batch_size), device
        dataset = cache_predictions(dataset, teacher, inputs_of, draw, *how)
        with fits_the_gpu("the grid of the teacher's samples", "pass fewer --validation_classes"):
            teacher_samples, teacher = sample(teacher, vae=copy.deepcopy(vae).to(device)), None
    dataloader = make_dataloader(dataset, args.train_batch_size, workers, accelerator)
    length = args.max_train_steps, args.num_train_epochs, len(dataloader) / passes
    args.max_train_steps = count_steps(*length, accelerator)
    student, teacher_model = pair_features(transformer, teacher, recipe["features"], example_inputs(transformer))
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
        kd_alpha=args.kd_alpha,
        lambda_kd_feat=args.lambda_kd_feat,
        process=ReverseProcess(scheduler, device),
        task_loss=args.task_loss,
        snr_weights=min_snr_weights(scheduler, args.snr_gamma, device),
    )
    grid = teacher_samples, sample, partial(copy.deepcopy, vae), list(shown.values()), output_dir, accelerator
    validate = partial(log_validation, teacher, transformer, ema, *grid)

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
        save_pipeline(transformer, teacher_shape, recipe, vae, sampler, names, args)
        if args.push_to_hub:
            push_to_hub(output_dir, args.hub_model_id, stop)
    accelerator.end_training()


if __name__ == "__main__":
    main(parse_args())
