# Copyright 2026 The LIFT and PLACE distillation authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Generate images with a diffusion pipeline so that others can reproduce them: a PNG per image, and a manifest.

The model is a folder or Hub id of a pipeline. For pixel U-Nets, Stable Diffusion 1.x/2.x and XL, DiT and Stable
Diffusion 3, sampler, steps and guidance are by default those of the published protocol, listed in eval/README.md. Any
other pipeline of Diffusers that draws by prompts, by class labels or by neither makes images by its own call and
defaults.

    accelerate launch eval/generate.py --model student --output_dir images --num_images 50000
    accelerate launch eval/generate.py --model student --output_dir images --prompt_file captions.txt --resize 256

The noise of image i depends on --seed and i alone and is made on the CPU. It does not depend on the batch size, the
number of processes or the device. Pipelines other than those five draw their own, which depends on --dtype, too. The
images are exactly the same for any number of processes. Another --batch_size changes the last bits of matrix products:
at most one grey level, in float32 on a CPU. Image i gets the prompt or class of number i, modulo their count.

Latents are decoded one by one, in float32 unless --vae_dtype says otherwise. The text encoders of Stable Diffusion 3
are on the device only while they encode the prompts of the next thousand images, each prompt by itself, and the other
parts only while they make the images.

A checkpoint of a training that goes on has the student alone, and its average, which is taken where there is one:

    accelerate launch eval/generate.py --model run/checkpoint-500 --base teacher --output_dir images --num_images 64

A PNG appears under its name once it is complete. The same command continues a stopped run and replaces damaged images.
It refuses a folder whose manifest.json has other settings. Raise --num_images to add images to a folder.
"""

import argparse
import hashlib
import inspect
import json
import logging
import math
import platform
import sys
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path

import diffusers
import numpy as np
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler, SchedulerMixin
from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match
from PIL import Image
from tqdm.auto import tqdm


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.arguments import HelpFormatter, check_values
from common.cache import identify
from common.checkpoints import check_ended, hash_file
from common.classes import find_class
from common.errors import fail, first_line
from common.finite import first_non_finite
from common.folders import check_writable
from common.full import end_in_one_line
from common.loading import explain, list_parts, read_weights
from common.processes import TIMEOUT, check_connected
from common.students import public_config
from common.teachers import DDPM_NOISE, PREDICTIONS
from common.texts import read_lines
from common.training import place_seed


# The published protocol of each kind: the sampler, steps, guidance.
PROTOCOLS = {
    "DDPMPipeline": ("ddim", 100, None),
    "DDIMPipeline": ("ddim", 100, None),
    "StableDiffusionPipeline": ("pndm", 25, 7.5),
    "StableDiffusionXLPipeline": ("euler", 50, 5.0),
    "DiTPipeline": ("ddpm", 250, 1.5),
    "StableDiffusion3Pipeline": ("euler", 28, 7.0),
}
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")  # of Stable Diffusion 3
# Images whose prompts are encoded at a time. Embeddings of Stable Diffusion 3 take up to 5 MiB a prompt: those of
# 30,000 would not fit into memory.
PIECE = 1000
SAMPLERS = {
    "ddpm": "DDPMScheduler",
    "ddim": "DDIMScheduler",
    "ddim_quad": "QuadraticDDIM",
    "pndm": "PNDMScheduler",
    "euler": "EulerDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
}
FLOW_SAMPLERS = {"euler": "FlowMatchEulerDiscreteScheduler", "heun": "FlowMatchHeunDiscreteScheduler"}
EXPECTED = f"pass a pipeline folder or Hub id of a {', '.join(PROTOCOLS)} or another that draws by prompts or classes"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Schedulers that draw noise on the way, but not from the generator of each image.
UNSEEDED = ("DPMSolverSDEScheduler",)
# Settings of a model that the other parts of its pipeline ask for.
SHARED_WITH_BASE = "in_channels", "cross_attention_dim", "joint_attention_dim", "pooled_projection_dim"
SHARED_WITH_BASE += ("projection_class_embeddings_input_dim",)
OLD_NAMES = {"Transformer2DModel": "DiTTransformer2DModel"}  # in published pipelines
LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "numpy", "pillow")
MANIFEST = {  # by JSON Schema: what is read from one
    "type": "object",
    "properties": {
        "num_images": {"type": "integer", "minimum": 0},
        "prompts": {"type": "array", "items": {"type": "string"}, "minItems": 1},
    },
    "required": ["num_images"],
}


# ------------------------------------------------------------------------------------------------------- the arguments


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line, or `input_args`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--model", required=True, help="pipeline folder or Hub id, or a checkpoint-N of a training")
    parser.add_argument("--base", help="of a checkpoint: the pipeline whose other parts it takes, as the teacher's")
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")
    parser.add_argument("--variant", help="weights variant, e.g. fp16")
    parser.add_argument("--output_dir", required=True, type=as_path, help="folder for the images and manifest.json")
    parser.add_argument("--num_images", type=int, help="images to generate (default: 50000, or one per prompt)")
    parser.add_argument("--prompt_file", type=as_path, help="a prompt per line; image i gets line i modulo the count")
    parser.add_argument(
        "--classes",
        nargs="+",
        help="numbers or names of the classes for image 0, 1, ... (default: all classes)",
    )
    parser.add_argument(
        "--sampler",
        choices=("as_saved", *SAMPLERS),
        help="as_saved: the one saved with the pipeline (default: the protocol's)",
    )
    parser.add_argument("--num_inference_steps", type=int, help="denoising steps (default: the protocol's)")
    parser.add_argument("--guidance_scale", type=float, help="1 is no guidance (default: the protocol's)")
    parser.add_argument(
        "--max_sequence_length",
        type=int,
        help="tokens of T5, as in the model's training (default: the pipeline's, 256 for Stable Diffusion 3)",
    )
    parser.add_argument("--no_t5", action="store_true", help="leave T5 out, of a checkpoint that was trained so")
    parser.add_argument(
        "--dtype", default="float32", choices=tuple(DTYPES), help="dtype of the weights, but the VAE's"
    )
    parser.add_argument(
        "--vae_dtype",
        choices=tuple(DTYPES),
        help="dtype of the VAE (default: float32); a half halves its memory, and may cost a grey level or two",
    )
    parser.add_argument("--batch_size", type=int, default=16, help="images per batch in each process")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise")
    parser.add_argument(
        "--resolution", type=int, help="pixels per side, for text-to-image models (default: the model's)"
    )
    parser.add_argument("--resize", type=int, help="resize images to this side (bicubic) before they are saved")
    args = parser.parse_args(input_args)
    check_values(args)
    return args


def as_path(text: str) -> Path:
    """A flag's path. `Path("")` would be the working folder."""
    if not text:
        raise argparse.ArgumentTypeError('"" is empty; pass a path')
    return Path(text)


def read_json(path: Path, schema: dict) -> dict:
    """What a JSON file says.

    Raises:
        ValueError: It is no JSON, or not what the JSON Schema asks for.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    error = best_match(Draft202012Validator(schema).iter_errors(content))
    if error is not None:
        raise ValueError(f"{error.json_path}: {first_line(error)}")
    return content


def read_prompts(path: Path) -> list[str]:
    """The lines of a prompt file. An empty line is an error: its image would be unconditional."""
    try:
        prompts = read_lines(path)
    except (OSError, UnicodeDecodeError) as error:
        fail(f"--prompt_file {path} cannot be read: {first_line(error)}; pass a text file, a prompt per line")
    if prompts == [""]:
        fail(f"--prompt_file {path} is empty; put a prompt on each line")
    if "" in prompts:
        fail(f"--prompt_file {path} has no prompt on line {prompts.index('') + 1}; remove the line or fill it")
    return prompts


# -------------------------------------------------------------------------------------------------------- the pipeline


class QuadraticDDIM(DPMSolverMultistepScheduler):
    """DDIM, which this solver is by order 1, at timesteps whose square roots are evenly spaced up to 80 % of all.

    So DDIM's authors draw CIFAR-10 ("quad"), and Diff-Pruning after them. Timesteps that come twice change nothing,
    and are left out.
    """

    def set_timesteps(self, num_inference_steps: int, device: torch.device | None = None) -> None:
        roots = np.linspace(0, math.sqrt(0.8 * self.config.num_train_timesteps), num_inference_steps)
        super().set_timesteps(device=device, timesteps=np.unique((roots**2).astype(int))[::-1].tolist())


def call_of(kind: type) -> Mapping[str, inspect.Parameter]:
    """The arguments of the call of a pipeline's class, by name."""
    return inspect.signature(kind.__call__).parameters


def draws(kind: type | None) -> bool:
    """Whether a class is a pipeline that makes images of prompts, of class labels, or of nothing but noise."""
    if not (isinstance(kind, type) and issubclass(kind, DiffusionPipeline)):
        return False
    takes, conditions = call_of(kind), {"prompt", "class_labels"}
    needs = {name for name, each in takes.items() if each.default is each.empty and each.kind != each.VAR_KEYWORD}
    conditional = not takes.keys().isdisjoint(conditions)
    return "generator" in takes and needs <= {"self", *conditions} and (conditional or "batch_size" in takes)


def condition_of(pipeline: DiffusionPipeline) -> str | None:
    """What a pipeline draws: "prompts", "classes", or `None` where it is unconditional."""
    takes = call_of(type(pipeline))
    if "prompt" in takes:
        return "prompts"
    return "classes" if "class_labels" in takes and count_classes(pipeline) else None


def load_pipeline(args: argparse.Namespace, device: torch.device, flag: str = "--model") -> DiffusionPipeline:
    """Load the pipeline of `args.model`, in `--dtype` and `--vae_dtype`, to the device, with the flags' sampler.

    Sets the flags that were not passed to their defaults in `args`: `sampler`, `num_inference_steps`,
    `guidance_scale`, `vae_dtype`, `resolution` of a Stable Diffusion, and `max_sequence_length` where the pipeline
    takes it. Ends the process if the model does not load or a flag does not suit it.

    Args:
        args: The flags.
        device: Where the pipeline goes.
        flag: That the model comes from, for messages.
    """
    checkpoint = as_checkpoint(args, flag)
    source = args.base if checkpoint is not None else args.model
    flag, folder = "--base" if checkpoint is not None else flag, Path(source)
    if not folder.is_dir() and (folder.is_absolute() or source.startswith(".") or source.count("/") > 1):
        fail(f"{flag} {source} is not a folder; {EXPECTED}")
    check_ended(folder, f"{flag} {source}")
    torch.backends.cudnn.allow_tf32 = False  # as in the training: float32 is not the tensor cores' shorter kind
    try:
        parts = DiffusionPipeline.load_config(source, revision=args.revision)
        kind = parts.get("_class_name") if isinstance(parts, dict) else None
        known = kind in PROTOCOLS
        if not known and not draws(getattr(diffusers, str(kind), None)):
            fail(f"{flag} {source} is a {kind}; {EXPECTED}")
        if not known and args.vae_dtype not in (None, args.dtype):
            fail(f"--vae_dtype {args.vae_dtype} is not --dtype {args.dtype}, in which a {kind} decodes; drop the flag")
        args.vae_dtype = args.vae_dtype or ("float32" if known else args.dtype)
        # Missing parts must be passed as None, e.g. the text encoders of Stable Diffusion 3. The safety checker is not
        # loaded: the images that it paints black would count against the model.
        absent = [name for name, part in parts.items() if part == [None, None] or name == "safety_checker"]
        if args.no_t5:
            absent += find_t5(parts, f"{flag} {source}")
        options = {"revision": args.revision, "variant": args.variant}
        options["torch_dtype"] = {"default": DTYPES[args.dtype], "vae": DTYPES[args.vae_dtype]}
        if checkpoint is not None:
            student = load_student(checkpoint, DTYPES[args.dtype])
            check_base(source, args.revision, parts, *next(iter(student.items())))
            options |= student
        pipeline = read_weights(getattr(diffusers, kind).from_pretrained, source, **options, **dict.fromkeys(absent))
        pipeline.id2label = parts.get("id2label")  # which a DiTPipeline does not keep whole
        if checkpoint is not None and (checkpoint / "lora").is_dir():
            averaged = checkpoint / "lora_ema"
            pipeline.load_lora_weights(averaged if averaged.is_dir() else checkpoint / "lora")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        variant = "" if flag == "--students" else args.variant  # report.py has a flag for that of the teacher alone
        fail(f"{flag} {source} does not load: {explain(error, variant, EXPECTED)}")
    check_model(pipeline, f"{flag} {source}")
    defaults = {name: parameter.default for name, parameter in call_of(type(pipeline)).items()}
    own = "as_saved", defaults.get("num_inference_steps"), defaults.get("guidance_scale")
    sampler, steps, guidance = PROTOCOLS.get(kind, own)
    if "guidance_scale" not in defaults and args.guidance_scale is not None:
        fail(f"--guidance_scale {args.guidance_scale} is for prompts and classes; {source} has none, drop the flag")
    if "height" not in defaults and args.resolution is not None:
        fail(f"--resolution {args.resolution} is for text-to-image models; {source} has one size, pass --resize")
    if "max_sequence_length" in defaults:
        args.max_sequence_length = args.max_sequence_length or defaults["max_sequence_length"]
    elif args.max_sequence_length is not None:
        what = f"--max_sequence_length {args.max_sequence_length}"
        fail(f"{what} is for Stable Diffusion 3 and others that take it; drop the flag")
    args.sampler = args.sampler or sampler
    args.num_inference_steps = args.num_inference_steps or steps
    args.guidance_scale = guidance if args.guidance_scale is None else args.guidance_scale
    if known and condition_of(pipeline) == "prompts":
        factor = pipeline.vae_scale_factor
        args.resolution = args.resolution or denoiser(pipeline).config.sample_size * factor
        if args.resolution % (2 * factor):
            fail(f"--resolution {args.resolution} does not fit the VAE; pass a multiple of {2 * factor}")
        config = denoiser(pipeline).config
        most = factor * config.patch_size * config.pos_embed_max_size if "pos_embed_max_size" in config else None
        if most is not None and args.resolution > most:
            fail(f"--resolution {args.resolution} is more than the model takes; pass {most} at most")
    pipeline.scheduler = make_sampler(pipeline, args.sampler)
    most = pipeline.scheduler.config.get("num_train_timesteps")
    if most is not None and (args.num_inference_steps or 0) > most:
        fail(f"--num_inference_steps {args.num_inference_steps} is more than the {most} of its schedule; pass {most}")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def find_t5(parts: dict[str, list], subject: str) -> list[str]:
    """The names of T5 and its tokenizer in a Stable Diffusion 3, which does without them. Others end the process."""
    names = [name for name in ("text_encoder_3", "tokenizer_3") if name in parts]
    if not names:
        fail(f"--no_t5 is for Stable Diffusion 3, which {subject} is not; drop it")
    return names


def as_checkpoint(args: argparse.Namespace, flag: str) -> Path | None:
    """The folder of a training's checkpoint, `None` for a pipeline; `--base` goes with the first alone."""
    folder, base = Path(args.model), getattr(args, "base", None)
    if not (folder / "state.json").is_file():
        if base is not None:
            fail(f"--base {base} is for a checkpoint-N folder, which {flag} {args.model} is not; drop it")
        return None
    if base is None:
        remedy = "add --base, its teacher's pipeline" if flag == "--model" else "let the run end"
        fail(f"{flag} {args.model} is a checkpoint, which has the student alone; {remedy}")
    return folder


def load_student(checkpoint: Path, dtype: torch.dtype) -> dict[str, torch.nn.Module]:
    """The student of a checkpoint, with averaged weights where there are some, by its name in a pipeline."""
    for name in ("unet_ema", "transformer_ema", "unet", "transformer"):
        if (checkpoint / name).is_dir():
            kind = getattr(diffusers, read_json(checkpoint / name / "config.json", {"type": "object"})["_class_name"])
            return {name.removesuffix("_ema"): kind.from_pretrained(checkpoint, subfolder=name, torch_dtype=dtype)}
    fail(f"--model {checkpoint} holds no student; pass another checkpoint")


def check_base(base: str, revision: str | None, parts: dict[str, list], name: str, student: torch.nn.Module) -> None:
    """End the process where a student does not fit into the pipeline `--base`.

    Args:
        parts: The base's model_index.json.
        name: That of the student in a pipeline of its own.
    """
    kind, theirs = type(student).__name__, (parts.get(name) or [None, None])[1]
    if OLD_NAMES.get(theirs, theirs) != kind:
        has = f"a {theirs}" if theirs else "none"
        fail(f"--base {base}: the checkpoint's {name} is a {kind}, and it has {has}; pass the teacher's pipeline")
    try:
        config = type(student).load_config(base, subfolder=name, revision=revision)
    except OSError:  # old pixel pipelines of the Hub have the U-Net beside model_index.json
        config = type(student).load_config(base, revision=revision)
    for key in SHARED_WITH_BASE:
        if key in config and config[key] != student.config.get(key):
            values = f"{key} {student.config.get(key)}, and its own has {config[key]}"
            fail(f"--base {base}: the checkpoint's {name} has {values}; pass the teacher's pipeline")


def check_model(pipeline: DiffusionPipeline, subject: str) -> None:
    """End the process if a pipeline can make no images.

    Args:
        subject: The line's beginning: the flag and its value.
    """
    for name, part in pipeline.components.items():
        broken = first_non_finite(part.state_dict()) if isinstance(part, torch.nn.Module) else None
        if broken is not None:
            fail(f"{subject}: its {name} has weights that are not finite ({broken} …); pass a model that is whole")
    known, scheduled = type(pipeline).__name__ in PROTOCOLS, hasattr(pipeline, "scheduler")
    if not scheduled or not (hasattr(pipeline, "unet") or hasattr(pipeline, "transformer")):
        fail(f"{subject} is a {type(pipeline).__name__} without a scheduler, U-Net or transformer; {EXPECTED}")
    size = denoiser(pipeline).config.get("sample_size")
    sides = size if isinstance(size, (list, tuple)) else [size]
    if (known or size is not None) and not all(isinstance(side, int) and side > 0 for side in sides):
        fail(f"{subject} has {size!r} as the sample_size of its config; correct it")
    config, kind = pipeline.scheduler.config, type(pipeline.scheduler).__name__
    if config.get("stochastic_sampling"):
        fail(f"{subject} has a {kind} with stochastic_sampling, whose noise cannot be seeded per image; switch it off")
    if known and not is_sd3(pipeline):
        predicts = config.get("prediction_type", "epsilon")
        if kind not in DDPM_NOISE or predicts not in PREDICTIONS:
            fail(f"{subject} has a {kind} that predicts {predicts}; pass a model with a scheduler such as DDPM's")


def shift_of(pipeline: DiffusionPipeline) -> float:
    """What the latents of its VAE are shifted by; other pipelines than Stable Diffusion 3 do not shift them."""
    return (pipeline.vae.config.get("shift_factor") or 0.0) if is_sd3(pipeline) else 0.0


def is_sd3(pipeline: DiffusionPipeline) -> bool:
    """Whether it is a Stable Diffusion 3, whose prompts are encoded apart; others have three text encoders, too."""
    return type(pipeline).__name__ == "StableDiffusion3Pipeline"


def denoiser(pipeline: DiffusionPipeline) -> torch.nn.Module:
    """The pipeline's U-Net or transformer."""
    return pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer


def make_sampler(pipeline: DiffusionPipeline, name: str) -> SchedulerMixin:
    """The sampler of this name, with the noise schedule that was saved with the pipeline."""
    # Published configs leave out what was the default of their class. It is kept, as it is in a student's config.
    config = public_config(pipeline.scheduler.config)
    kind = type(pipeline.scheduler).__name__
    flow = is_sd3(pipeline) or kind.startswith("FlowMatch")
    if name == "as_saved":
        if kind in UNSEEDED:
            fail(f"--sampler as_saved is a {kind}, whose noise cannot be seeded per image; pass another, such as ddim")
        return pipeline.scheduler
    if flow and name not in FLOW_SAMPLERS:
        fail(f"--sampler {name} is not for flow matching; pass as_saved, {' or '.join(FLOW_SAMPLERS)}")
    if not flow and kind not in DDPM_NOISE:
        fail(f"--sampler {name} does not go on with the noise of a {kind}; pass as_saved")
    made = QuadraticDDIM if name == "ddim_quad" else getattr(diffusers, (FLOW_SAMPLERS if flow else SAMPLERS)[name])
    takes = inspect.signature(made.__init__).parameters
    if config.get("rescale_betas_zero_snr") and "rescale_betas_zero_snr" not in takes:
        fail(f"--sampler {name} has no noise schedule of zero terminal SNR, as was saved; pass ddim or as_saved")
    if name == "pndm" and config.get("prediction_type") == "sample":
        fail("--sampler pndm is not for a model that predicts the sample; pass ddim or as_saved")
    changes = {}
    if name == "ddim" or (hasattr(pipeline, "vae") and not flow and "clip_sample" not in config):
        # DDIM as published does not clip; Diffusers', which does by default, leaves noise. Latents have no bounds.
        changes["clip_sample"] = False
    if name in ("ddim", "pndm") and config.get("timestep_spacing") == "linspace":
        changes["timestep_spacing"] = "leading"  # they take steps of one whole length, which linspace's are not
    if name == "ddim_quad":
        changes |= {"solver_order": 1, "algorithm_type": "dpmsolver++", "final_sigmas_type": "zero"}
    if name == "pndm":
        changes["skip_prk_steps"] = True  # as published for latents: each step calls the model once
    if name == "ddpm" and learns_variance(pipeline):  # as DiT's authors sample
        changes |= {"variance_type": "learned_range", "timestep_spacing": "linspace"}
    return made.from_config(config, **changes)


def learns_variance(pipeline: DiffusionPipeline) -> bool:
    """Whether the model is a DiT that predicts the variance too. Other pipelines take it off by themselves."""
    config = pipeline.transformer.config if type(pipeline).__name__ == "DiTPipeline" else None
    return config is not None and config.out_channels == 2 * config.in_channels


def count_classes(pipeline: DiffusionPipeline) -> int | None:
    """How many classes a model was trained with; `None` or 0 for none."""
    config = denoiser(pipeline).config
    return config.get("num_embeds_ada_norm") or config.get("num_class_embeds")


def find_classes(pipeline: DiffusionPipeline, classes: list[str] | None) -> list[int]:
    """The numbers of the classes, which are given as numbers or names; all of the pipeline's for `None`.

    Args:
        pipeline: Of [`load_pipeline`].
        classes: `--classes`.
    """
    count = count_classes(pipeline)
    # Not DiTPipeline's `labels`: of two classes of one name, as ImageNet's cranes, they have one alone.
    names = {int(number): name for number, name in (pipeline.id2label or {}).items()}
    if classes is None:
        return sorted(names) or list(range(count))
    return [find_class(entry, count, names, "--classes") for entry in classes]


def find_conditions(pipeline: DiffusionPipeline, args: argparse.Namespace) -> list | None:
    """The prompts or the class numbers for the images, `None` for an unconditional model."""
    condition = condition_of(pipeline)
    for flag, needed in (("prompt_file", "prompts"), ("classes", "classes")):
        value = getattr(args, flag)
        if value is not None and condition != needed:
            what = f"takes {condition}" if condition else "is unconditional"
            value = " ".join(value) if isinstance(value, list) else value
            fail(f"--{flag} {value} does not fit: {args.model} {what}; drop the flag")
    if condition == "prompts" and args.prompt_file is None:
        fail("--prompt_file is missing: a text-to-image model needs prompts; pass a text file, a prompt per line")
    if condition == "prompts":
        return read_prompts(args.prompt_file)
    return find_classes(pipeline, args.classes) if condition else None


# --------------------------------------------------------------------------------------------------------- the prompts

Text = tuple[torch.Tensor, torch.Tensor]  # a prompt's embeddings (1, L, D) and pooled embeddings (1, P), on the CPU


@torch.no_grad()
def encode_prompts(
    pipeline: DiffusionPipeline, prompts: list[str], args: argparse.Namespace, silent: bool = True
) -> dict[str, Text]:
    """What the text encoders of Stable Diffusion 3 make of each prompt, and of "" where there is guidance.

    Each prompt is encoded by itself: what comes out does not depend on the others.

    Args:
        pipeline: With its text encoders on its device.
        prompts: Each once.
        args: With `guidance_scale` and `max_sequence_length`.
        silent: Whether no progress is shown.
    """
    options = {"do_classifier_free_guidance": False, "max_sequence_length": args.max_sequence_length}
    unguided = [""] if args.guidance_scale > 1 and "" not in prompts else []
    texts = {}
    for prompt in tqdm([*unguided, *prompts], desc="Prompts", disable=silent, leave=False):
        embeddings, _, pooled, _ = pipeline.encode_prompt(prompt, None, None, pipeline.device, **options)
        texts[prompt] = embeddings.cpu(), pooled.cpu()
    return texts


def take_text_encoders(pipeline: DiffusionPipeline) -> dict[str, torch.nn.Module]:
    """Take the text encoders out of a Stable Diffusion 3 pipeline; by name. Of other pipelines, none."""
    if not is_sd3(pipeline):
        return {}
    encoders = {name: getattr(pipeline, name) for name in TEXT_ENCODERS if getattr(pipeline, name) is not None}
    for name in encoders:
        setattr(pipeline, name, None)
    return encoders


def encode_apart(
    pipeline: DiffusionPipeline,
    encoders: dict[str, torch.nn.Module],
    prompts: list[str],
    args: argparse.Namespace,
    device: torch.device,
    silent: bool,
) -> dict[str, Text]:
    """[`encode_prompts`] with nothing but the text encoders on the device; then they make room for all else.

    Args:
        encoders: From [`take_text_encoders`].
    """
    pipeline.to("cpu", silence_dtype_warnings=True)
    for name, encoder in encoders.items():
        setattr(pipeline, name, encoder.to(device))
    texts = encode_prompts(pipeline, prompts, args, silent)
    for encoder in take_text_encoders(pipeline).values():
        encoder.to("cpu")
    pipeline.to(device)
    return texts


# ---------------------------------------------------------------------------------------------------------- the images


def seeded(seed: int, index: int) -> torch.Generator:
    """The random generator of image `index`. It is on the CPU, so that the noise is the same on any device."""
    return torch.Generator().manual_seed(place_seed(seed, index))


@torch.no_grad()
def generate_images(
    pipeline: DiffusionPipeline,
    indices: list[int],
    conditions: list | None,
    args: argparse.Namespace,
    texts: dict[str, Text] | None = None,
) -> list[Image.Image]:
    """Generate the images of these numbers as one batch.

    Args:
        pipeline: From [`load_pipeline`].
        indices: Numbers of the images.
        conditions: Prompts or class numbers; image i gets number i, modulo their count. `None` for none.
        args: With `seed`, `num_inference_steps`, `guidance_scale`, `resolution`, `resize` and `max_sequence_length`.
        texts: The encoded prompts of a Stable Diffusion 3 without text encoders.
    """
    generators = [seeded(args.seed, index) for index in indices]
    batch = conditions and [conditions[index % len(conditions)] for index in indices]
    if type(pipeline).__name__ not in PROTOCOLS:
        return resize_images(call_pipeline(pipeline, batch, generators, args), args.resize)
    if hasattr(pipeline, "text_encoder"):
        if is_sd3(pipeline):
            texts = texts or encode_prompts(pipeline, list(dict.fromkeys(batch)), args)
            prompts = choose_texts(texts, batch, args.guidance_scale, denoiser(pipeline).device)
        else:
            prompts = {"prompt": batch}
        # By itself the pipeline makes noise in the model's dtype: with the same seed, other noise than in float32.
        model, side = denoiser(pipeline), args.resolution // pipeline.vae_scale_factor
        latents = make_noise((1, model.config.in_channels, side, side), generators)
        latents = pipeline(
            **prompts,
            latents=latents.to(model.dtype),
            height=args.resolution,
            width=args.resolution,
            num_inference_steps=args.num_inference_steps,
            guidance_scale=args.guidance_scale,
            generator=generators,
            output_type="latent",
        ).images
        pixels = decode(pipeline, latents)
    else:
        # Diffusers' pipelines of these two kinds work with some of the samplers only. DiTPipeline also passes no
        # generator to them, and takes 1000 as the null class of every model.
        if hasattr(pipeline, "transformer"):
            model = pipeline.transformer
            predict = guided_dit(pipeline, torch.tensor(batch, device=model.device), args.guidance_scale)
        else:
            model = pipeline.unet
            predict = plain_unet(model)
        side = model.config.sample_size
        shape = (1, model.config.in_channels, *((side, side) if isinstance(side, int) else side))
        pixels = denoise(predict, pipeline.scheduler, shape, generators, args.num_inference_steps, model.device)
        if hasattr(pipeline, "vae"):
            pixels = decode(pipeline, pixels)
    check_images(pixels, args)
    images = pipeline.numpy_to_pil((pixels / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy())
    return resize_images(images, args.resize)


def check_images(pixels: torch.Tensor, args: argparse.Namespace) -> None:
    """End the process if pixels are not finite: as PNGs they would be black, and count against the model."""
    if not torch.isfinite(pixels).all():
        halves = [f"--{name} float16" for name in ("dtype", "vae_dtype") if getattr(args, name) == "float16"]
        remedy = f"drop {' and '.join(halves)}, in which it may overflow" if halves else "pass another model"
        fail(f"--model {args.model} makes images that are not finite; {remedy}")


def resize_images(images: list[Image.Image], side: int | None) -> list[Image.Image]:
    """The images at `--resize`; as they are for `None`."""
    return images if side is None else [image.resize((side, side), Image.Resampling.BICUBIC) for image in images]


def call_pipeline(
    pipeline: DiffusionPipeline, batch: list | None, generators: list[torch.Generator], args: argparse.Namespace
) -> list[Image.Image]:
    """Images by the pipeline's own call, for the kinds without a protocol here.

    Args:
        batch: A prompt or a class number per image; `None` for none.
        generators: One per image.
        args: As for [`generate_images`].
    """
    flags = ("num_inference_steps", "guidance_scale", "max_sequence_length")
    settings = {
        **{flag: getattr(args, flag) for flag in flags},
        **dict.fromkeys(("height", "width"), args.resolution),
        **dict.fromkeys(("prompt", "class_labels"), batch),
        "output_type": "np",
        "use_resolution_binning": False,  # it would round --resolution to a size of its own
        "batch_size": len(generators),
        "generator": generators,
    }
    takes = call_of(type(pipeline))
    settings = {name: value for name, value in settings.items() if name in takes and value is not None}
    try:
        images = pipeline(**settings).images
        check_images(torch.as_tensor(images), args)
        return pipeline.numpy_to_pil(images)
    except (ValueError, TypeError, AttributeError) as error:  # it needs an image, say, or makes a video
        fail(f"--model {args.model} makes no images as a {type(pipeline).__name__}: {first_line(error)}; {EXPECTED}")


def choose_texts(
    texts: dict[str, Text], prompts: list[str], guidance_scale: float, device: torch.device
) -> dict[str, torch.Tensor]:
    """Arguments of StableDiffusion3Pipeline: a row per prompt, and as many of "" where there is guidance."""
    chosen = {"": prompts} | ({"negative_": [""] * len(prompts)} if guidance_scale > 1 else {})
    return {
        f"{sign}{name}": torch.cat([texts[prompt][item] for prompt in entries]).to(device)
        for sign, entries in chosen.items()
        for item, name in enumerate(("prompt_embeds", "pooled_prompt_embeds"))
    }


def decode(pipeline: DiffusionPipeline, latents: torch.Tensor) -> torch.Tensor:
    """Pixels, float32 (N, C, H, W), of scaled latents (N, c, h, w); one by one, because decoding takes much memory."""
    vae = pipeline.vae
    latents = latents.to(vae.dtype) / vae.config.scaling_factor + shift_of(pipeline)
    return torch.cat([vae.decode(each).sample.float() for each in latents.split(1)])


def make_noise(shape: tuple[int, ...], generators: list[torch.Generator]) -> torch.Tensor:
    """Noise of the images, float32 (len(generators), *shape[1:]) on the CPU; `shape` has a first dimension of 1."""
    return torch.cat([torch.randn(shape, generator=generator) for generator in generators])


def denoise(
    predict: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    scheduler: SchedulerMixin,
    shape: tuple[int, ...],
    generators: list[torch.Generator],
    steps: int,
    device: torch.device,
) -> torch.Tensor:
    """Run the sampler on noise from the generators.

    Args:
        predict: Takes noisy images and a timestep; returns the model's prediction in float32.
        scheduler: The sampler.
        shape: Of one image or its latents, with a first dimension of 1.
        generators: One per image.
        steps: Denoising steps.
        device: Of the model.

    Returns:
        float32 (len(generators), *shape[1:]).
    """
    noise = make_noise(shape, generators).to(device)
    scheduler.set_timesteps(steps, device=device)
    noisy = noise * scheduler.init_noise_sigma
    options = {"generator": generators} if "generator" in inspect.signature(scheduler.step).parameters else {}
    for step in scheduler.timesteps:
        output = predict(scheduler.scale_model_input(noisy, step), step)
        noisy = scheduler.step(output, step, noisy, **options).prev_sample
    return noisy


def plain_unet(model: torch.nn.Module) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The prediction of an unconditional U-Net, for [`denoise`]."""
    return lambda noisy, step: model(noisy.to(model.dtype), step).sample.float()


def guided_dit(
    pipeline: DiffusionPipeline, labels: torch.Tensor, guidance_scale: float
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The prediction of a DiT with classifier-free guidance, for [`denoise`].

    Guidance changes the noise only. The variance, if the model predicts it, is the conditional one.

    Args:
        pipeline: A DiTPipeline.
        labels: Class numbers (N,).
        guidance_scale: 1 or less is no guidance.
    """
    model, channels, count = pipeline.transformer, pipeline.transformer.config.in_channels, len(labels)
    guided = guidance_scale > 1
    if guided:
        labels = torch.cat([labels, torch.full_like(labels, model.config.num_embeds_ada_norm)])

    def predict(noisy: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        both = torch.cat([noisy, noisy]) if guided else noisy
        output = model(both.to(model.dtype), timestep=step.expand(len(both)), class_labels=labels).sample.float()
        prediction, variance = output[:, :channels], output[:count, channels:]
        if guided:
            conditional, unconditional = prediction.chunk(2)
            prediction = unconditional + guidance_scale * (conditional - unconditional)
        if pipeline.scheduler.config.get("variance_type") != "learned_range":
            return prediction
        return torch.cat([prediction, variance], dim=1)

    return predict


def image_path(folder: Path, index: int) -> Path:
    """The file of image `index`."""
    return folder / f"{index:06d}.png"


def is_complete(path: Path) -> bool:
    """Whether the file exists and decodes to its last pixel."""
    try:
        with Image.open(path) as image:
            image.load()
    except (OSError, SyntaxError, ValueError):  # Pillow raises these for missing and for damaged files
        return False
    return True


def save_image(image: Image.Image, path: Path) -> None:
    """Write the PNG completely or not at all."""
    temporary = path.with_name(f".{path.name}")
    image.save(temporary, format="PNG")
    temporary.replace(path)


# -------------------------------------------------------------------------------------------------------- the manifest


def digest_model(args: argparse.Namespace) -> str:
    """The commit on the Hub, or the SHA-256 sum over the names and contents of the files of the pipeline's parts.

    A checkpoint has such sums itself; those of `--base`, or its commit, follow.
    """
    source = args.base or args.model
    checkpoint = f"sha256:{hash_file(Path(args.model) / 'manifest.json')} on " if args.base else ""
    folder = Path(source)
    if not folder.is_dir():
        return checkpoint + identify(source, args.revision, [])["commit"]
    index = folder / "model_index.json"
    parts = [name for name, kind in list_parts(json.loads(index.read_text())).items() if kind is not None]
    files = [index, *(path for part in parts for path in sorted((folder / part).rglob("*")) if path.is_file())]
    if not all((folder / part).is_dir() for part in parts):  # old pixel pipelines have theirs beside model_index.json
        files += sorted(path for path in folder.iterdir() if path.suffix in (".json", ".bin", ".safetensors"))
    listing = "".join(f"{path.relative_to(folder)} {hash_file(path)}\n" for path in files)
    return f"{checkpoint}sha256:{hashlib.sha256(listing.encode()).hexdigest()}"


def make_manifest(
    pipeline: DiffusionPipeline, conditions: list | None, args: argparse.Namespace, device: torch.device
) -> dict:
    """All settings that affect the images, as JSON types."""
    flags = "num_images", "variant", "sampler", "num_inference_steps", "guidance_scale", "dtype", "batch_size", "seed"
    scheduler = {key: value for key, value in pipeline.scheduler.config.items() if not key.startswith("_")}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    manifest = {
        "model": args.model,
        "contents": digest_model(args),
        "pipeline": type(pipeline).__name__,
        **{flag: getattr(args, flag) for flag in (*flags, "resolution", "resize", "max_sequence_length")},
        "no_t5": args.no_t5 or None,  # as a manifest of an earlier version has it
        "vae_dtype": args.vae_dtype if hasattr(pipeline, "vae") else None,
        "scheduler": {"class": type(pipeline.scheduler).__name__, **scheduler},
        **({condition_of(pipeline): conditions} if conditions else {}),
        "device": f"{device.type}: {name}",
        "versions": {"python": platform.python_version(), **{library: version(library) for library in LIBRARIES}},
    }
    return json.loads(json.dumps(manifest, default=str))


def save_manifest(manifest: dict, args: argparse.Namespace) -> None:
    """Write manifest.json. Ends the process if the folder holds images that were made with other settings."""
    folder, path = args.output_dir, args.output_dir / "manifest.json"
    has_images = any(image.name[0] != "." for image in folder.glob("*.png"))  # hidden ones are unfinished
    if has_images and path.exists():
        saved = read_manifest(folder, "--output_dir")
        for key in sorted(manifest.keys() | saved.keys()):
            new, old = manifest.get(key), saved.get(key)
            older = key == "variant" and key not in saved  # of a version that did not write it
            if key in ("model", "device", "num_images") or new == old or older:
                continue
            files = {"contents": f"--model {args.model}", "prompts": f"--prompt_file {args.prompt_file}"}
            name = f"{files[key]}: its {key}" if key in files else f"--{key}"
            if isinstance(new, dict) and isinstance(old, dict):
                part = next(part for part in sorted(new | old) if new.get(part) != old.get(part))
                name, new, old = f"{key} ({part})", new.get(part), old.get(part)
            values = f"is {new} but was {old}" if key not in ("contents", "prompts") else "differ from those"
            fail(f"{name} {values} for the images in {folder}; pass the same again, or a new --output_dir")
        if manifest["num_images"] < saved["num_images"]:
            counts = f"--num_images {manifest['num_images']} is fewer than the {saved['num_images']} of {folder}"
            fail(f"{counts}; pass as many or more, or a new folder")
    elif has_images:
        fail(f"--output_dir {folder} holds images of another origin (no manifest.json); pass a new folder")
    temporary = path.with_name(".manifest.json")
    temporary.write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def read_manifest(folder: Path, flag: str) -> dict:
    """The folder's manifest.json; empty if it has none.

    Args:
        flag: That the folder comes from, for messages.
    """
    path = folder / "manifest.json"
    if not path.exists():
        return {}
    try:
        return read_json(path, MANIFEST)
    except (OSError, ValueError) as error:
        remedy = "generate the images into a new folder, or remove it"
        fail(f"{flag} {folder} has a damaged manifest.json: {first_line(error)}; {remedy}")


# ------------------------------------------------------------------------------------------------------------- the run


MEMORY = "--batch_size {batch_size} does not fit the GPU: {error}; lower it, or pass --dtype bfloat16"
DISK = "--output_dir {output_dir}: {error} ({free:,} bytes are free); make room; the same command goes on"


@partial(end_in_one_line, memory=MEMORY, disk=DISK)
def main(args: argparse.Namespace) -> None:
    """Generate the missing images."""
    # PartialState alone would not connect processes on a CPU. They wait for each other at the end.
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=TIMEOUT)])
    check_connected(accelerator.num_processes)
    logging.basicConfig(format="%(message)s", level="WARNING" if accelerator.is_main_process else "ERROR")
    check_writable(f"--output_dir {args.output_dir}", args.output_dir)
    pipeline = load_pipeline(args, torch.device("cpu"))
    conditions = find_conditions(pipeline, args)
    if args.num_images is None:
        args.num_images = len(conditions) if args.prompt_file else 50_000
    if accelerator.is_main_process:
        try:
            args.output_dir.mkdir(parents=True, exist_ok=True)
            save_manifest(make_manifest(pipeline, conditions, args, accelerator.device), args)
        except OSError as error:
            fail(f"--output_dir {args.output_dir} cannot be written to: {error.strerror}; pass another folder")
        for path in args.output_dir.glob(".*.png"):  # unfinished images of a killed run
            path.unlink()
    accelerator.wait_for_everyone()

    # The batches are those of an uninterrupted run: an image in another batch would differ in the last bits.
    batches = [
        list(range(start, min(start + args.batch_size, args.num_images)))
        for start in range(0, args.num_images, args.batch_size)
    ]
    mine = batches[accelerator.process_index :: accelerator.num_processes]
    size = max(1, PIECE // args.batch_size)
    pieces = [mine[start : start + size] for start in range(0, len(mine), size)]
    encoders, texts, silent = take_text_encoders(pipeline), None, not accelerator.is_main_process
    if not encoders:  # else it follows them
        pipeline.to(accelerator.device)
    title = f"Images ({accelerator.num_processes} processes)" if accelerator.num_processes > 1 else "Images"
    with tqdm(total=sum(map(len, mine)), desc=title, disable=silent, smoothing=0) as progress:
        for piece in pieces:
            missing = {i for batch in piece for i in batch if not is_complete(image_path(args.output_dir, i))}
            todo = [batch for batch in piece if missing.intersection(batch)]
            progress.update(sum(map(len, piece)) - sum(map(len, todo)))
            if todo and encoders:
                prompts = list(dict.fromkeys(conditions[i % len(conditions)] for batch in todo for i in batch))
                texts = encode_apart(pipeline, encoders, prompts, args, accelerator.device, silent)
            if piece is pieces[-1]:
                encoders.clear()
            for batch in todo:
                images = dict(zip(batch, generate_images(pipeline, batch, conditions, args, texts)))
                for index in sorted(missing.intersection(batch)):
                    save_image(images[index], image_path(args.output_dir, index))
                progress.update(len(batch))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        print(f"{args.num_images} images in {args.output_dir}", flush=True)
    accelerator.end_training()


if __name__ == "__main__":
    main(parse_args())
