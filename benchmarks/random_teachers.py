# Copyright 2026 The LIFT and PLACE distillation authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Teachers of random weights in three sizes, with images to train on: what a benchmark of whole runs needs, no Hub.

    python benchmarks/random_teachers.py --script sd3 --size full --images 64 --folder inputs

`tiny` is for tests, `small` takes about a second per step on a CPU, `full` are the published sizes. Those are made on
the GPU, if there is one, and written in half precision. SD3 has no T5 encoder there: 4.7 billion parameters only to
encode random captions.
"""

import argparse
import sys
from pathlib import Path

import torch


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.errors import fail

from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from full_models import CELEBA, DIT_XL, SD3_MEDIUM, SD21, SDXL, make_vae
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from small_runs import SCRIPTS, TEACHERS, write_images
from tiny_models import TOKENS, WORDS, make_tokenizer


SIZES = ("tiny", "small", "full")
SMALL = {
    "unet": {**CELEBA, "block_out_channels": [64, 128, 128, 128, 256]},
    "sd21": {
        **SD21,
        "sample_size": 16,
        "block_out_channels": [40, 80, 160, 160],
        "norm_num_groups": 4,
        "cross_attention_dim": 128,
    },
    "dit": {**DIT_XL, "sample_size": 16, "num_attention_heads": 4, "attention_head_dim": 48},
    "sd3": {
        **SD3_MEDIUM,
        "sample_size": 16,
        "num_layers": 12,
        "num_attention_heads": 5,
        "caption_projection_dim": 320,
        "joint_attention_dim": 256,
        "pooled_projection_dim": 160,
        "pos_embed_max_size": 64,
    },
    "sdxl": {
        **SDXL,
        "sample_size": 16,
        "block_out_channels": [40, 80, 160],
        "norm_num_groups": 4,
        "cross_attention_dim": 160,
        "projection_class_embeddings_input_dim": 6 * 256 + 96,
    },
}
FULL = {"unet": CELEBA, "sd21": SD21, "dit": DIT_XL, "sd3": SD3_MEDIUM, "sdxl": SDXL}
# Of images; others: 128.
SIDES = {"full": {"unet": 64, "sd21": 512, "dit": 256, "sd3": 512, "sdxl": 1024}, "small": {"unet": 64}}
# Of the training script: the student, and of the samples, which are not what is measured, as few as can be.
FLAGS = {
    "unet": ("--student", "extreme", "--num_validation_images", "1"),
    "sd21": ("--student", "bk_tiny", "--validation_prompts", "a bag"),
    "dit": ("--student", "d14", "--validation_classes", "0"),
    "sd3": ("--student", "half", "--validation_prompts", "a bag", "--no_t5"),
    "sdxl": ("--student", "koala_700m", "--validation_prompts", "a bag"),
}
TINY_FLAGS = {
    "unet": ("--student", "0.5", "--num_validation_images", "1"),
    "dit": ("--keep_blocks", "1,3", "--validation_classes", "0"),
}
MORE_FLAGS = {"sd3": {"small": ("--max_sequence_length", "16"), "full": ("--resolution", "512")}}


def list_flags(script: str, size: str, folder: Path) -> list[str]:
    """The training script's flags for what [`write_inputs`] has written into the folder."""
    flags = TINY_FLAGS.get(script, FLAGS[script]) if size == "tiny" else FLAGS[script]
    flags += MORE_FLAGS.get(script, {}).get(size, ())
    teacher, images = folder / f"{script}-{size}", folder / f"{script}-{size}-images"
    source = ("--pretrained_teacher_model", str(teacher), "--train_data_dir", str(images))
    return [*source, *flags, "--num_inference_steps", "1"]


def write_inputs(script: str, size: str, images: int, folder: Path) -> None:
    """Write a teacher and images for a script, unless they are there.

    Args:
        script: Of SCRIPTS.
        size: Of SIZES.
        images: How many.
    """
    teacher, data = folder / f"{script}-{size}", folder / f"{script}-{size}-images"
    if not (teacher / "model_index.json").exists():  # which comes last
        if size == "tiny":
            TEACHERS[script](teacher)
        else:
            make_pipeline(script, size).save_pretrained(teacher)
    if not data.exists():
        side = None if size == "tiny" else SIDES[size].get(script, 128)
        write_images(script, data, images, side)


def make_pipeline(script: str, size: str) -> DiffusionPipeline:
    """The teacher's pipeline with random weights, on the GPU if there is one, in half precision where it is full."""
    config, narrower = (FULL[script], 1) if size == "full" else (SMALL[script], 8)
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16 if size == "full" else torch.float32)
    try:
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            models = make_models(script, config, narrower)
    finally:
        torch.set_default_dtype(before)
    if script == "unet":
        return DDPMPipeline(*models, DDPMScheduler())
    if script == "dit":
        return DiTPipeline(*models, DDIMScheduler(clip_sample=False))
    tokenizer = make_tokenizer(WORDS, TOKENS if size == "small" else 77)
    if script == "sd21":
        unet, vae, text_encoder = models
        scheduler = DDIMScheduler(1000, 0.00085, 0.012, "scaled_linear", clip_sample=False, steps_offset=1)
        parts = vae, text_encoder, tokenizer, unet, scheduler, None, None
        return StableDiffusionPipeline(*parts, requires_safety_checker=False)
    denoiser, vae, *clips = models
    if script == "sdxl":
        noise = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
        parts = vae, *clips, tokenizer, tokenizer, denoiser, EulerDiscreteScheduler(**noise, steps_offset=1)
        return StableDiffusionXLPipeline(*parts, add_watermarker=False)
    texts = clips[0], tokenizer, clips[1], tokenizer, None, None
    return StableDiffusion3Pipeline(denoiser, FlowMatchEulerDiscreteScheduler(shift=3.0), vae, *texts)


def make_models(script: str, config: dict, narrower: int) -> tuple[torch.nn.Module, ...]:
    """The denoiser, the VAE and the text encoders of a pipeline, as far as it has them."""
    if script == "unet":
        return (UNet2DModel(**config),)
    if script == "sd21":
        width = config["cross_attention_dim"]
        text = make_clip(CLIPTextModel, width, layers=23, heads=16, narrower=narrower)
        return UNet2DConditionModel(**config), make_vae(4, narrower), text
    if script == "dit":
        return DiTTransformer2DModel(**config), make_vae(4, narrower)
    sizes = ((768, 12, 12), (1280, 32, 20)) if narrower == 1 else ((64, 12, 4), (96, 12, 4))
    if script == "sdxl":
        first, denoiser, channels = CLIPTextModel, UNet2DConditionModel, 4
    else:
        first, denoiser, channels = CLIPTextModelWithProjection, SD3Transformer2DModel, 16
    kinds = first, CLIPTextModelWithProjection
    clips = [make_clip(kind, *size, narrower=narrower) for kind, size in zip(kinds, sizes)]
    return denoiser(**config), make_vae(channels, narrower), *clips


def make_clip(kind: type, width: int, layers: int, heads: int, narrower: int) -> torch.nn.Module:
    """A text encoder; a small one has no words but the tokenizer's."""
    tokenizer = make_tokenizer(WORDS, TOKENS)
    last = len(tokenizer) - 1
    text = CLIPTextConfig(
        vocab_size=49408 if narrower == 1 else len(tokenizer),
        hidden_size=width,
        projection_dim=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=77 if narrower == 1 else TOKENS,
        **{f"{name}_token_id": last for name in ("bos", "eos", "pad")},
    )
    return kind(text)


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line, or `input_args`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--script", required=True, choices=SCRIPTS, help="whose teacher")
    parser.add_argument("--size", default="small", choices=SIZES, help="of the models (default: small)")
    parser.add_argument("--images", type=int, default=64, help="how many (default: 64)")
    parser.add_argument("--folder", type=Path, required=True, help="where to write the teacher and the images")
    args = parser.parse_args(input_args)
    if args.images < 1:
        fail(f"--images {args.images} is out of range; pass 1 or more")
    return args


if __name__ == "__main__":
    args = parse_args()
    write_inputs(args.script, args.size, args.images, args.folder)
