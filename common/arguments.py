# Copyright 2026 The LIFT and PLACE distillation authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Which flags do the training scripts share, what values may they have, and how does a run end on a wrong one?"""

import argparse
import importlib.util
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from common.attention import check_xformers
from common.errors import fail
from common.estimates import RunPlan
from common.folders import check_data_dir, check_writable
from common.ranges import ANY, RANGES

import torch
from accelerate.tracking import LOGGER_TYPE_TO_CLASS


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the docstring's lines and adds the default of each flag that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        silent = action.default is None or action.default is False
        return action.help if silent else super()._get_help_string(action)


def add_shared_arguments(parser: argparse.ArgumentParser) -> dict[str, argparse._ArgumentGroup]:
    """Add the flags that every training script has; the script adds its own to the returned groups.

    Their defaults are those of plain training. A script sets the published recipe with `parser.set_defaults`.

    Returns:
        The groups of flags by their key: "models", "data", "distillation", "training", "logging".
    """
    switch = argparse.BooleanOptionalAction

    models = parser.add_argument_group("models")
    models.add_argument("--teacher_revision", help="branch, tag or commit of the teacher on the Hub")
    models.add_argument("--variant", help="weights variant of the teacher, e.g. fp16")
    dtypes = "of the teacher's weights in the training (default: the run's precision); fp8 and nf4 compute in that"
    models.add_argument("--teacher_dtype", choices=("fp32", "fp16", "bf16", "fp8", "nf4"), help=dtypes)
    offload = "keep its weights on the CPU and move them layer by layer (not for a DiT)"
    models.add_argument("--offload_teacher", action="store_true", help=offload)

    data = parser.add_argument_group("data")
    data.add_argument("--dataset_name", help="dataset on the Hub")
    data.add_argument("--dataset_config_name", help="its configuration")
    data.add_argument("--image_column", default="image", help="column of the images")
    data.add_argument("--cache_dir", help="where datasets keeps its files, and cached encodings go")
    data.add_argument("--max_train_samples", type=int, help="train on this many images only, chosen by the seed")
    data.add_argument(
        "--max_unreadable", type=float, default=0.01, help="largest share of images that may be skipped as unusable"
    )
    data.add_argument("--random_flip", action=switch, default=False, help="flip images horizontally at random")
    workers = min(4, os.cpu_count() or 1)
    data.add_argument("--dataloader_num_workers", type=int, default=workers, help="image decoders: one a core, to 4")

    kd = parser.add_argument_group("distillation")
    term = "teacher's term; place is the published one, rms was better at 16 %% of a teacher, see README.md"
    kd.add_argument("--kd_loss", default="place", choices=("place", "lift", "mse", "rms", "none"), help=term)
    kd.add_argument("--task_loss", default="mse", choices=("mse", "rms"), help="data's term; rms: its root per image")
    draws = "run the teacher only before the training, for this many draws of noise per image"
    kd.add_argument("--cache_teacher", type=int, metavar="DRAWS", help=draws)
    kd.add_argument("--cache_teacher_dtype", default="fp16", choices=("fp32", "fp16", "bf16"), help="of what it keeps")
    kd.add_argument("--group_size", type=int, default=16, help="elements per PLACE group")
    kd.add_argument("--group_by", default="error", choices=("error", "position"), help="how PLACE groups elements")
    norm = "coarse term's norm; published: l1, for DiT l2"
    kd.add_argument("--coarse_norm", default="l1", choices=("l1", "l2"), help=norm)
    kd.add_argument(
        "--kd_weighting",
        default="adaptive",
        choices=("adaptive", "constant", "linear", "cosine", "coarse_only", "fine_only"),
        help="weight of the fine term: adaptive: by the distance; constant: 1; linear, cosine: rising over the run; "
        "coarse_only: 0; fine_only: the fine term without the coarse one",
    )

    training = parser.add_argument_group("training")
    training.add_argument("--output_dir", help="where the student, checkpoints and metrics go")
    training.add_argument("--seed", type=int, default=0, help="seed of everything random")
    training.add_argument("--train_batch_size", type=int, default=4, help="images per device and micro-batch")
    training.add_argument("--gradient_accumulation_steps", type=int, default=1, help="micro-batches per step")
    training.add_argument("--max_train_steps", type=int, default=50_000, help="optimizer steps of the whole run")
    training.add_argument("--num_train_epochs", type=float, help="passes over the images, not --max_train_steps")
    training.add_argument("--learning_rate", type=float, default=5e-5, help="peak learning rate")
    training.add_argument(
        "--lr_scheduler",
        default="constant",
        choices=("constant", "constant_with_warmup", "linear", "cosine", "polynomial", "cosine_to_half"),
        help="learning rate schedule",
    )
    training.add_argument("--lr_warmup_steps", type=int, default=0, help="optimizer steps of warm-up")
    training.add_argument("--adam_beta1", type=float, default=0.9, help="decay of the first moment")
    training.add_argument("--adam_beta2", type=float, default=0.999, help="decay of the second moment")
    training.add_argument("--adam_weight_decay", type=float, default=0.0, help="decoupled weight decay")
    training.add_argument("--adam_epsilon", type=float, default=1e-8, help="added to Adam's denominator")
    training.add_argument("--max_grad_norm", type=float, default=1.0, help="clip the gradient to this norm")
    training.add_argument("--use_8bit_adam", action="store_true", help="keep AdamW's moments in 8 bits (bitsandbytes)")
    training.add_argument("--use_ema", action=switch, default=True, help="save a moving average of the weights")
    term = "its decay, or (1 + step) / (10 + step) while that is less"
    training.add_argument("--ema_decay", type=float, default=0.9999, help=term)
    training.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"), help="default: the accelerate config's")
    training.add_argument("--allow_tf32", action="store_true", help="compute float32 by TF32 (RTX 30 and later)")
    training.add_argument("--gradient_checkpointing", action="store_true", help="recompute activations to save memory")
    training.add_argument(
        "--enable_xformers_memory_efficient_attention", action="store_true", help="xformers' attention, not SDPA"
    )
    training.add_argument("--compile", action="store_true", help="torch.compile teacher and student")
    spread = "spread the weights of teacher and student over all processes (FSDP2)"
    training.add_argument("--fsdp", action="store_true", help=spread)

    logs = parser.add_argument_group("checkpoints, logs and the Hub")
    logs.add_argument("--checkpointing_steps", type=int, help="steps between checkpoints (default: half an hour)")
    logs.add_argument("--checkpoints_total_limit", type=int, default=3, help="keep this many checkpoints, the newest")
    logs.add_argument("--resume_from_checkpoint", help='a checkpoint folder, or "latest" (anew if there is none)')
    logs.add_argument(
        "--discard_later_checkpoints", action="store_true", help="resume from an older one and remove the newer ones"
    )
    logs.add_argument("--logging_steps", type=int, default=10, help="optimizer steps between rows of metrics.jsonl")
    logs.add_argument("--report_to", default="tensorboard", help='a tracker of Accelerate, "all" or "none"')
    logs.add_argument("--validation_steps", type=int, help="steps between sample grids (default: half an hour)")
    logs.add_argument("--push_to_hub", action="store_true", help="upload the student (log in first: hf auth login)")
    logs.add_argument("--hub_model_id", help="repository to push to (default: the output folder's name)")
    logs.add_argument("--hub_private_repo", action="store_true", help="make it private (else: as your account has it)")
    logs.add_argument("--license", help="of the student, an id of the Hub, e.g. apache-2.0 (default: the teacher's)")
    logs.add_argument("--dry_run", action="store_true", help="estimate sizes, MACs, memory and hours, and stop")
    logs.add_argument("--num_processes", type=int, help="with --dry_run: estimate for so many processes, not one")
    return {"models": models, "data": data, "distillation": kd, "training": training, "logging": logs}


def check_values(args: argparse.Namespace) -> None:
    """Refuse numbers out of their [`RANGES`], and empty strings."""
    for name, value in vars(args).items():
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value not in RANGES.get(name, ANY):
            fail(f"--{name} {value} is out of range; pass {RANGES.get(name, ANY)}")
        # An empty prompt is one, and asks for an image without guidance.
        if value == "" or (isinstance(value, list) and "" in value and name != "validation_prompts"):
            fail(f'--{name} "" is empty; pass a value, or drop the flag')


def check_args(args: argparse.Namespace) -> None:
    """Refuse wrong values of the shared flags before anything is loaded."""
    check_values(args)
    weights = {name: value for name, value in vars(args).items() if name.startswith("lambda_")}
    if args.kd_loss == "none":
        weights = {name: value for name, value in weights.items() if name == "lambda_task"}
    if "lambda_task" in weights and not any(weights.values()):
        fail(f"--lambda_task 0 with --kd_loss {args.kd_loss} leaves nothing to learn from; raise one of the weights")
    if args.cache_teacher is not None:
        check_cached_teacher(args)
    if getattr(args, "snr_gamma", None) is not None and args.kd_loss in ("place", "lift"):
        fail(f"--snr_gamma {args.snr_gamma} is not for --kd_loss {args.kd_loss}; pass mse, rms or none, or drop it")
    for flag, usual, losses in (("kd_weighting", "adaptive", ("place", "lift")), ("group_by", "error", ("place",))):
        if getattr(args, flag) != usual and args.kd_loss not in losses:
            given = f"--{flag} {getattr(args, flag)}"
            fail(f"{given} has no effect with --kd_loss {args.kd_loss}; drop it, or pass --kd_loss {losses[0]}")
    if args.dry_run and args.num_train_epochs is not None:
        fail(f"--num_train_epochs {args.num_train_epochs} with --dry_run, which reads no data; pass --max_train_steps")
    if not args.dry_run:
        if args.num_processes is not None:
            fail(f"--num_processes {args.num_processes} is for --dry_run; drop it, and pass it to the launcher")
        if (args.dataset_name is None) == (args.train_data_dir is None):
            fail("--dataset_name or --train_data_dir must say where the images are: pass one of them")
        if args.train_data_dir is not None:
            check_data_dir(args.train_data_dir, args.output_dir, args.cache_dir)
        teacher = args.pretrained_teacher_model
        if teacher is not None and Path(teacher).resolve() == Path(args.output_dir).resolve():
            which = "is --pretrained_teacher_model, which it would overwrite"
            fail(f"--output_dir {args.output_dir} {which}; pass another folder")
        if args.cache_dir is not None:
            check_writable(f"--cache_dir {args.cache_dir}", Path(args.cache_dir))
        if args.hub_model_id is not None and not args.push_to_hub:
            fail(f"--hub_model_id {args.hub_model_id} without --push_to_hub uploads nothing; add it, or drop the flag")
    if args.license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", args.license):
        fail(f"--license {args.license} is no licence's id on the Hub; pass one such as apache-2.0 or openrail++")
    if args.enable_xformers_memory_efficient_attention:
        if not torch.cuda.is_available():
            fail("--enable_xformers_memory_efficient_attention needs a CUDA device; drop it: attention is SDPA then")
        check_xformers()
    if args.offload_teacher and not (torch.cuda.is_available() or args.dry_run):
        fail("--offload_teacher needs a CUDA device to move the teacher to; drop it")
    if args.offload_teacher and args.teacher_dtype == "nf4":
        fail("--offload_teacher with --teacher_dtype nf4: 4-bit weights do not move; pass fp8, or drop one of them")
    if args.offload_teacher and args.compile:
        fail("--offload_teacher with --compile: its weights move while they are compiled; drop one of them")
    if args.teacher_dtype == "fp8" and args.compile and args.cache_teacher is None:
        fail("--teacher_dtype fp8 with --compile: layers that cast their weights do not compile; drop one of them")
    for flag, given in (("--use_8bit_adam", args.use_8bit_adam), ("--teacher_dtype nf4", args.teacher_dtype == "nf4")):
        if given and importlib.util.find_spec("bitsandbytes") is None:
            fail(f"{flag} needs bitsandbytes; pip install bitsandbytes, or drop the flag")
    if args.fsdp:
        check_sharded(args)
    if getattr(args, "lora_rank", 0) and importlib.util.find_spec("peft") is None:
        fail(f"--lora_rank {args.lora_rank} needs peft; pip install peft, or drop the flag")
    if args.report_to not in ("all", "none", *LOGGER_TYPE_TO_CLASS):
        fail(f"--report_to {args.report_to} is no tracker; pass {', '.join(LOGGER_TYPE_TO_CLASS)}, all or none")
    if args.report_to not in ("all", "none") and importlib.util.find_spec(args.report_to) is None:
        fail(f"--report_to {args.report_to} is not installed; pip install {args.report_to}, or pass none")


def check_sharded(args: argparse.Namespace) -> None:
    """Refuse what `--fsdp` does not go with."""
    reasons = {"--use_8bit_adam": (args.use_8bit_adam, "its moments cannot be spread; spread ones are small")}
    if args.cache_teacher is None:  # else it is whole, and gone before the training
        flag = f"--teacher_dtype {args.teacher_dtype}"
        reasons[flag] = args.teacher_dtype in ("fp8", "nf4"), "compressed weights cannot be spread"
        reasons["--offload_teacher"] = args.offload_teacher, "spread weights stay on the GPUs"
    for flag, (given, why) in reasons.items():
        if given:
            fail(f"--fsdp with {flag}: {why}; drop one of them")


def check_cached_teacher(args: argparse.Namespace) -> None:
    """Refuse what the teacher's cached predictions do not go with."""
    given = f"--cache_teacher {args.cache_teacher}"
    if args.kd_loss == "none":
        fail(f"{given} with --kd_loss none, which asks no teacher; drop it, or pass another --kd_loss")
    if args.lambda_kd_feat > 0:
        remedy = "pass --lambda_kd_feat 0, or drop --cache_teacher"
        fail(f"{given} keeps predictions alone, --lambda_kd_feat {args.lambda_kd_feat} needs features; {remedy}")


def plan_run(args: argparse.Namespace) -> RunPlan:
    """What the flags say of a run's costs, for `--dry_run`."""
    return RunPlan(
        batch_size=args.train_batch_size,
        accumulation_steps=args.gradient_accumulation_steps,
        steps=args.max_train_steps,
        mixed_precision=args.mixed_precision,
        gradient_checkpointing=args.gradient_checkpointing,
        use_8bit_adam=args.use_8bit_adam,
        use_ema=args.use_ema,
        live_teacher=args.kd_loss != "none" and args.cache_teacher is None,
        cached_draws=args.cache_teacher,
        cached_dtype=args.cache_teacher_dtype,
        images=args.max_train_samples,
        processes=args.num_processes or 1,
        teacher_dtype=args.teacher_dtype,
        offload_teacher=args.offload_teacher,
        fsdp=args.fsdp,
    )


def tracked_flags(args: argparse.Namespace) -> dict[str, Any]:
    """The flags as trackers take them: TensorBoard refuses lists and None."""
    flags = {key: value for key, value in vars(args).items() if value is not None}
    return {key: value if isinstance(value, (int, float, str)) else str(value) for key, value in flags.items()}


class RunFacts(NamedTuple):
    """What the model card says of a run by its flags."""

    lines: list[str]  # of the distillation, the data and the training
    teacher: str | None  # its folder or Hub id
    revision: str | None  # of the teacher on the Hub
    license: str | None  # --license
    images: int  # that a process takes in a step


def describe_run(args: argparse.Namespace) -> RunFacts:
    """What a model card says of the distillation, the data and the training."""
    method = {
        "place": f"PLACE, group size {args.group_size} by {args.group_by}, {args.coarse_norm} coarse term, "
        f"{args.kd_weighting} weight",
        "lift": f"LIFT, {args.coarse_norm} coarse term, {args.kd_weighting} weight",
        "mse": "mean squared error to the teacher's output",
        "rms": "root mean squared error of each image to the teacher's output",
        "none": "none: the loss on the data alone",
    }[args.kd_loss]
    gamma = getattr(args, "snr_gamma", None)
    method += f"; {args.task_loss} on the data" + (f"; min-SNR-{gamma:g} weights" if gamma is not None else "")
    if args.cache_teacher:
        method += f", the teacher's predictions cached for {args.cache_teacher} draws per image"
    weights = [f"{name} {value}" for name, value in vars(args).items() if name.startswith("lambda_")]
    average = f", weights averaged with decay {args.ema_decay}" if args.use_ema else ""
    part = f", {args.dataset_config_name}" if args.dataset_name and args.dataset_config_name else ""
    images = args.train_batch_size * args.gradient_accumulation_steps
    lines = [
        f"- Distillation: {method}; {', '.join(weights)}.",
        f"- Data: `{args.dataset_name or Path(os.path.abspath(args.train_data_dir)).name}`{part}.",
        f"- Training: {args.max_train_steps} steps of {images} images per process, learning rate "
        f"{args.learning_rate}, seed {args.seed}{average}.",
    ]
    if getattr(args, "aspect_ratio_buckets", None):
        sizes = ", ".join(f"{height} x {width}" for height, width in args.aspect_ratio_buckets)
        lines.append(f"- Trained in aspect-ratio buckets (height x width): {sizes}.")
    if getattr(args, "lora_rank", 0):
        merged = "merged here; `lora/` has the adapter and the model that it belongs to"
        lines.append(f"- Trained by LoRA of rank {args.lora_rank}, {merged}.")
    return RunFacts(lines, args.pretrained_teacher_model, args.teacher_revision, args.license, images)
