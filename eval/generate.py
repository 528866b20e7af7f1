# Copyright 2026 The LIFT and PLACE distillation authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Generate images with a diffusion pipeline so that others can reproduce them: a PNG per image, and a manifest.

The model is a folder or Hub id of one of four kinds: pixel U-Net, Stable Diffusion 1.x/2.x, DiT, Stable Diffusion 3.
By default sampler, steps and guidance are those of the kind's published protocol, listed in eval/README.md.

    accelerate launch eval/generate.py --model student --output_dir images --num_images 50000
    accelerate launch eval/generate.py --model student --output_dir images --prompt_file captions.txt --resize 256

The noise of image i depends on --seed and i alone and is made on the CPU. It does not depend on the batch size, the
number of processes or the device. The images are exactly the same for any number of processes. Another --batch_size
changes the last bits of matrix products: at most one grey level, in float32 on a CPU. Image i gets the prompt or class
of number i, modulo their count.

A PNG appears under its name once it is complete. The same command continues a stopped run and replaces damaged images.
It refuses a folder whose manifest.json has other settings. Raise --num_images to add images to a folder.
"""

import argparse
import hashlib
import inspect
import json
import platform
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import diffusers
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline, SchedulerMixin
from PIL import Image
from safetensors import SafetensorError
from tqdm.auto import tqdm


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.arguments import HelpFormatter, fail, first_line
from common.cache import identify
from common.checkpoints import hash_file


# The published protocol of each kind: the condition, the sampler, steps, guidance.
PROTOCOLS = {
    "DDPMPipeline": (None, "ddim", 100, None),
    "DDIMPipeline": (None, "ddim", 100, None),
    "StableDiffusionPipeline": ("prompts", "pndm", 25, 7.5),
    "DiTPipeline": ("classes", "ddpm", 250, 1.5),
    "StableDiffusion3Pipeline": ("prompts", "euler", 28, 7.0),
}
T5_TOKENS = 256  # default of StableDiffusion3Pipeline
SAMPLERS = {
    "ddpm": "DDPMScheduler",
    "ddim": "DDIMScheduler",
    "pndm": "PNDMScheduler",
    "euler": "EulerDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
}
FLOW_SAMPLERS = {"euler": "FlowMatchEulerDiscreteScheduler", "heun": "FlowMatchHeunDiscreteScheduler"}
EXPECTED = f"pass a pipeline folder or Hub id of a {', '.join(PROTOCOLS)}"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "numpy", "pillow")


# ------------------------------------------------------------------------------------------------------- the arguments


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line, or `input_args`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--model", required=True, help="pipeline folder or Hub id")
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")
    parser.add_argument("--variant", help="weights variant, e.g. fp16")
    parser.add_argument("--output_dir", required=True, type=Path, help="folder for the images and manifest.json")
    parser.add_argument("--num_images", type=int, help="images to generate (default: 50000, or one per prompt)")
    parser.add_argument("--prompt_file", type=Path, help="a prompt per line; image i gets line i modulo their count")
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
        help="T5 tokens of Stable Diffusion 3, as in its training (default: 256)",
    )
    parser.add_argument("--dtype", default="float32", choices=tuple(DTYPES), help="dtype of the weights")
    parser.add_argument("--batch_size", type=int, default=16, help="images per batch in each process")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise")
    parser.add_argument(
        "--resolution", type=int, help="pixels per side, for text-to-image models (default: the model's)"
    )
    parser.add_argument("--resize", type=int, help="resize images to this side (bicubic) before they are saved")
    args = parser.parse_args(input_args)
    for name in ("num_images", "num_inference_steps", "batch_size", "resolution", "resize", "max_sequence_length"):
        value = getattr(args, name)
        if value is not None and value < 1:
            fail(f"--{name} {value} is too small; pass at least 1")
    return args


def read_prompts(path: Path) -> list[str]:
    """The lines of a prompt file. An empty line is an error: its image would be unconditional."""
    try:
        prompts = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        fail(f"--prompt_file {path} cannot be read: {first_line(error)}; pass a text file, a prompt per line")
    if not prompts:
        fail(f"--prompt_file {path} is empty; put a prompt on each line")
    if "" in prompts:
        fail(f"--prompt_file {path} has no prompt on line {prompts.index('') + 1}; remove the line or fill it")
    return prompts


# -------------------------------------------------------------------------------------------------------- the pipeline


def load_pipeline(args: argparse.Namespace, device: torch.device) -> DiffusionPipeline:
    """Load the pipeline of `--model` in `--dtype` to the device, with the sampler of the flags.

    Sets the flags that were not passed to their defaults in `args`: `sampler`, `num_inference_steps`,
    `guidance_scale`, `resolution` of a text-to-image model, and `max_sequence_length` of Stable Diffusion 3. Ends the
    process if the model does not load or a flag does not suit it.
    """
    source, folder = args.model, Path(args.model)
    if not folder.is_dir() and (folder.is_absolute() or source.startswith(".") or source.count("/") > 1):
        fail(f"--model {source} is not a folder; {EXPECTED}")
    try:
        parts = DiffusionPipeline.load_config(source, revision=args.revision)
        kind = parts.get("_class_name") if isinstance(parts, dict) else None
        if kind not in PROTOCOLS:
            fail(f"--model {source} is a {kind}; {EXPECTED}")
        # Missing parts must be passed as None, e.g. the text encoders of Stable Diffusion 3. The safety checker is not
        # loaded: the images that it paints black would count against the model.
        absent = [name for name, part in parts.items() if part == [None, None] or name == "safety_checker"]
        options = {"revision": args.revision, "variant": args.variant, "use_safetensors": True}
        if args.dtype != "float32":
            options["torch_dtype"] = DTYPES[args.dtype]
        pipeline = getattr(diffusers, kind).from_pretrained(source, **options, **dict.fromkeys(absent))
    except (OSError, ValueError, KeyError, AttributeError, TypeError, SafetensorError) as error:
        fail(f"--model {source} does not load: {first_line(error)} Remedy: {EXPECTED}")
    condition, sampler, steps, guidance = PROTOCOLS[kind]
    if condition is None and args.guidance_scale is not None:
        fail(f"--guidance_scale {args.guidance_scale} is for prompts and classes; {source} has none, drop the flag")
    if condition != "prompts" and args.resolution is not None:
        fail(f"--resolution {args.resolution} is for text-to-image models; {source} has one size, pass --resize")
    if kind == "StableDiffusion3Pipeline":
        args.max_sequence_length = args.max_sequence_length or T5_TOKENS
    elif args.max_sequence_length is not None:
        fail(f"--max_sequence_length {args.max_sequence_length} is for Stable Diffusion 3; drop the flag")
    args.sampler = args.sampler or sampler
    args.num_inference_steps = args.num_inference_steps or steps
    args.guidance_scale = guidance if args.guidance_scale is None else args.guidance_scale
    if condition == "prompts":
        factor = pipeline.vae_scale_factor
        args.resolution = args.resolution or denoiser(pipeline).config.sample_size * factor
        if args.resolution % (2 * factor):
            fail(f"--resolution {args.resolution} does not fit the VAE; pass a multiple of {2 * factor}")
    if kind == "StableDiffusion3Pipeline" and pipeline.vae.config.shift_factor is None:
        pipeline.vae.register_to_config(shift_factor=0.0)  # the pipeline adds it, and fails on None
    pipeline.scheduler = make_sampler(pipeline, args.sampler)
    pipeline.set_progress_bar_config(disable=True)
    for name, part in pipeline.components.items():
        # Text encoders load in the dtype they were saved in. The VAE of a pixel-space DiT is exact in float32 only.
        if isinstance(part, torch.nn.Module) and (args.dtype == "float32" or (kind, name) == ("DiTPipeline", "vae")):
            torch.nn.Module.to(part, torch.float32)
    return pipeline.to(device)


def denoiser(pipeline: DiffusionPipeline) -> torch.nn.Module:
    """The pipeline's U-Net or transformer."""
    return pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer


def make_sampler(pipeline: DiffusionPipeline, name: str) -> SchedulerMixin:
    """The sampler of this name, with the noise schedule that was saved with the pipeline."""
    config, flow = pipeline.scheduler.config, hasattr(pipeline, "text_encoder_3")
    if config.get("stochastic_sampling"):
        fail("--model's scheduler has stochastic_sampling, whose noise cannot be seeded per image; switch it off")
    if name == "as_saved":
        return pipeline.scheduler
    if flow and name not in FLOW_SAMPLERS:
        fail(f"--sampler {name} is not for flow matching; pass as_saved, {' or '.join(FLOW_SAMPLERS)}")
    changes = {}
    if hasattr(pipeline, "vae") and not flow and "clip_sample" not in config:
        changes["clip_sample"] = False  # DDIM and DDPM clip by default, but latents have no bounds
    if name == "pndm":
        changes["skip_prk_steps"] = True  # as published for latents: each step calls the model once
    if name == "ddpm" and learns_variance(pipeline):
        changes["variance_type"] = "learned_range"
    return getattr(diffusers, (FLOW_SAMPLERS if flow else SAMPLERS)[name]).from_config(config, **changes)


def learns_variance(pipeline: DiffusionPipeline) -> bool:
    """Whether the model is a DiT that predicts the variance too."""
    config = pipeline.transformer.config if hasattr(pipeline, "transformer") else None
    return config is not None and config.out_channels == 2 * config.in_channels


def find_classes(pipeline: DiffusionPipeline, classes: list[str] | None) -> list[int]:
    """The numbers of the classes, which are given as numbers or names; all of the pipeline's for `None`."""
    count = pipeline.transformer.config.num_embeds_ada_norm
    if classes is None:
        return sorted(set(pipeline.labels.values())) or list(range(count))
    numbers = [int(entry) if entry.isdecimal() else pipeline.labels.get(entry, -1) for entry in classes]
    for entry, number in zip(classes, numbers):
        if not 0 <= number < count:
            fail(f"--classes {entry} is not a class of the model; pass numbers below {count}, or names of its classes")
    return numbers


def find_conditions(pipeline: DiffusionPipeline, args: argparse.Namespace) -> list | None:
    """The prompts or the class numbers for the images, `None` for an unconditional model."""
    condition = PROTOCOLS[type(pipeline).__name__][0]
    for flag, needed in (("prompt_file", "prompts"), ("classes", "classes")):
        value = getattr(args, flag)
        if value is not None and condition != needed:
            what = f"takes {condition}" if condition else "is unconditional"
            fail(f"--{flag} {value} does not fit: {args.model} {what}; drop the flag")
    if condition == "prompts" and args.prompt_file is None:
        fail("--prompt_file is missing: a text-to-image model needs prompts; pass a text file, a prompt per line")
    if condition == "prompts":
        return read_prompts(args.prompt_file)
    return find_classes(pipeline, args.classes) if condition else None


# ---------------------------------------------------------------------------------------------------------- the images


def seeded(seed: int, index: int) -> torch.Generator:
    """The random generator of image `index`. It is on the CPU, so that the noise is the same on any device."""
    digest = hashlib.sha256(repr((seed, index)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@torch.no_grad()
def generate_images(
    pipeline: DiffusionPipeline, indices: list[int], conditions: list | None, args: argparse.Namespace
) -> list[Image.Image]:
    """Generate the images of these numbers as one batch.

    Args:
        pipeline: From [`load_pipeline`].
        indices: Numbers of the images.
        conditions: Prompts or class numbers; image i gets number i, modulo their count. `None` for none.
        args: With `seed`, `num_inference_steps`, `guidance_scale`, `resolution`, `resize` and `max_sequence_length`.
    """
    generators = [seeded(args.seed, index) for index in indices]
    batch = conditions and [conditions[index % len(conditions)] for index in indices]
    if hasattr(pipeline, "text_encoder"):
        tokens = {"max_sequence_length": args.max_sequence_length} if args.max_sequence_length else {}
        # By itself the pipeline makes noise in the model's dtype: with the same seed, other noise than in float32.
        model, side = denoiser(pipeline), args.resolution // pipeline.vae_scale_factor
        latents = make_noise((1, model.config.in_channels, side, side), generators)
        images = pipeline(
            prompt=batch,
            latents=latents.to(model.dtype),
            height=args.resolution,
            width=args.resolution,
            num_inference_steps=args.num_inference_steps,
            guidance_scale=args.guidance_scale,
            generator=generators,
            **tokens,
        ).images
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
            pixels = pipeline.vae.decode(pixels / pipeline.vae.config.scaling_factor).sample
        images = pipeline.numpy_to_pil((pixels / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy())
    if args.resize is not None:
        images = [image.resize((args.resize, args.resize), Image.Resampling.BICUBIC) for image in images]
    return images


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
    """The commit on the Hub, or the SHA-256 sum over the names and contents of the files of the pipeline's parts."""
    folder = Path(args.model)
    if not folder.is_dir():
        return identify(args.model, args.revision, [])["commit"]
    index = folder / "model_index.json"
    parts = [name for name, part in json.loads(index.read_text()).items() if isinstance(part, list)]
    files = [index, *(path for part in parts for path in sorted((folder / part).rglob("*")) if path.is_file())]
    listing = "".join(f"{path.relative_to(folder)} {hash_file(path)}\n" for path in files)
    return f"sha256:{hashlib.sha256(listing.encode()).hexdigest()}"


def make_manifest(pipeline: DiffusionPipeline, conditions: list | None, args: argparse.Namespace) -> dict:
    """All settings that affect the images, as JSON types."""
    flags = ("num_images", "sampler", "num_inference_steps", "guidance_scale", "dtype", "batch_size", "seed")
    device = next(iter(part for part in pipeline.components.values() if isinstance(part, torch.nn.Module))).device
    scheduler = {key: value for key, value in pipeline.scheduler.config.items() if not key.startswith("_")}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    manifest = {
        "model": args.model,
        "contents": digest_model(args),
        "pipeline": type(pipeline).__name__,
        **{flag: getattr(args, flag) for flag in (*flags, "resolution", "resize", "max_sequence_length")},
        "scheduler": {"class": type(pipeline.scheduler).__name__, **scheduler},
        **({PROTOCOLS[type(pipeline).__name__][0]: conditions} if conditions else {}),
        "device": f"{device.type}: {name}",
        "versions": {"python": platform.python_version(), **{library: version(library) for library in LIBRARIES}},
    }
    return json.loads(json.dumps(manifest, default=str))


def save_manifest(manifest: dict, folder: Path) -> None:
    """Write manifest.json. Ends the process if the folder holds images that were made with other settings."""
    path = folder / "manifest.json"
    if path.exists():
        saved = read_manifest(folder)
        for key in sorted(manifest.keys() | saved.keys()):
            new, old = manifest.get(key), saved.get(key)
            if key in ("model", "device", "num_images") or new == old:
                continue
            name = {"contents": "--model's files", "prompts": "the prompts of --prompt_file"}.get(key, f"--{key}")
            if isinstance(new, dict) and isinstance(old, dict):
                part = next(part for part in sorted(new | old) if new.get(part) != old.get(part))
                name, new, old = f"{key} ({part})", new.get(part), old.get(part)
            values = f"is {new} but was {old}" if key not in ("contents", "prompts") else "differ from those"
            fail(f"{name} {values} for the images in {folder}; pass the same again, or a new --output_dir")
        if manifest["num_images"] < saved.get("num_images", 0):
            counts = f"--num_images {manifest['num_images']} is fewer than the {saved['num_images']} of {folder}"
            fail(f"{counts}; pass as many or more, or a new folder")
    elif any(folder.glob("*.png")):
        fail(f"--output_dir {folder} holds images of another origin (no manifest.json); pass a new folder")
    temporary = path.with_name(".manifest.json")
    temporary.write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def read_manifest(folder: Path) -> dict:
    """The folder's manifest.json; empty if it has none."""
    path = folder / "manifest.json"
    if not path.exists():
        return {}
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        fail(f"{path} is damaged: {first_line(error)}; generate the images into a new folder")
    return manifest if isinstance(manifest, dict) else {}


# ------------------------------------------------------------------------------------------------------------- the run


def main(args: argparse.Namespace) -> None:
    """Generate the missing images."""
    accelerator = Accelerator()  # PartialState alone would not connect processes on a CPU
    pipeline = load_pipeline(args, accelerator.device)
    conditions = find_conditions(pipeline, args)
    if args.num_images is None:
        args.num_images = len(conditions) if args.prompt_file else 50_000
    if accelerator.is_main_process:
        try:
            args.output_dir.mkdir(parents=True, exist_ok=True)
            save_manifest(make_manifest(pipeline, conditions, args), args.output_dir)
        except OSError as error:
            fail(f"--output_dir {args.output_dir} cannot be written to: {error.strerror}; pass another folder")
        for path in args.output_dir.glob(".*.png"):  # unfinished images of a killed run
            path.unlink()
    accelerator.wait_for_everyone()

    # The batches never change: an image in another batch would differ in the last bits.
    batches = [
        list(range(start, min(start + args.batch_size, args.num_images)))
        for start in range(0, args.num_images, args.batch_size)
    ]
    mine = batches[accelerator.process_index :: accelerator.num_processes]
    title = f"Images ({accelerator.num_processes} processes)" if accelerator.num_processes > 1 else "Images"
    with tqdm(total=sum(map(len, mine)), desc=title, disable=not accelerator.is_main_process, smoothing=0) as progress:
        for batch in mine:
            missing = [index for index in batch if not is_complete(image_path(args.output_dir, index))]
            if missing:
                images = dict(zip(batch, generate_images(pipeline, batch, conditions, args)))
                for index in missing:
                    save_image(images[index], image_path(args.output_dir, index))
            progress.update(len(batch))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        print(f"{args.num_images} images in {args.output_dir}", flush=True)
    accelerator.end_training()


if __name__ == "__main__":
    main(parse_args())
