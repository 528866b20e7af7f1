# Copyright 2026 The LIFT and PLACE distillation authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Steps per second of `train_lift_sd21.py` with and without --cache_latents, on the same machine.

    python benchmarks/cache.py
    python benchmarks/cache.py --scale 4 --resolution 256 -- --train_batch_size 4 --student bk_small

The pipeline has random weights and the layout of Stable Diffusion 2.1, with every width divided by --scale. VAE, text
encoder and U-Net keep their depths, and so about their shares of the multiply-accumulates (MACs), which are printed
beside those of the original at 512 pixels. The training script runs with and without the cache in turns, and its
metrics.jsonl says how fast; each run counts with its median step. Filling the cache is not timed: it passes each image
through the encoders once, as one epoch without the cache does. Flags after `--` go to the training script.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.costs import profile_forward
from common.errors import fail
from common.metrics import read_metrics

import train_lift_sd21
from device import describe_device


TOKENS = 8  # of a caption such as "image 3"; the original has 77, and sixteen times the pixels


def make_models(
    scale: int, resolution: int, vocabulary: int, tokens: int
) -> tuple[AutoencoderKL, CLIPTextModel, UNet2DConditionModel]:
    """The VAE, text encoder and U-Net of Stable Diffusion 2.1-base on the meta device.

    Args:
        scale: Divides all widths.
        resolution: Side of the images, in pixels.
        vocabulary: Number of different tokens.
        tokens: Tokens of a caption.
    """
    width = 1024 // scale
    with torch.device("meta"):
        vae = AutoencoderKL(
            block_out_channels=[channels // scale for channels in (128, 256, 512, 512)],
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
            layers_per_block=2,
            norm_num_groups=max(1, 32 // scale),
            sample_size=resolution,
        )
        text = CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=23,
            num_attention_heads=16,
            max_position_embeddings=tokens,
            **{f"{name}_token_id": vocabulary - 1 for name in ("bos", "eos", "pad")},
        )
        unet = UNet2DConditionModel(
            sample_size=resolution // 8,
            block_out_channels=[channels // scale for channels in (320, 640, 1280, 1280)],
            attention_head_dim=[5, 10, 20, 20],  # UNet2DConditionModel reads it as the number of heads
            norm_num_groups=max(1, 32 // scale),
            cross_attention_dim=width,
            use_linear_projection=True,
        )
        return vae, CLIPTextModel(text), unet


def count_macs(
    vae: AutoencoderKL, text_encoder: CLIPTextModel, unet: UNet2DConditionModel, args: argparse.Namespace
) -> dict[str, int]:
    """MACs of a training step per image, without the cache. A backward pass counts as two forward passes.

    Args:
        vae: On the meta device, as the other two.
        text_encoder: Gives the tokens of a caption too.
        unet: The teacher.
        args: Flags of the training script, which builds the student.
    """
    args = argparse.Namespace(**{**vars(args), "resolution": vae.config.sample_size})
    student, _ = train_lift_sd21.build_student(unet, vae, args)
    side, tokens = vae.config.sample_size, text_encoder.config.max_position_embeddings
    with torch.device("meta"):
        image, ids = torch.zeros(1, 3, side, side), torch.zeros(1, tokens, dtype=torch.long)

    def macs(model: torch.nn.Module, **inputs: torch.Tensor) -> int:
        return profile_forward(model.requires_grad_(False), **inputs)[0]

    inputs = train_lift_sd21.example_inputs(unet) | {"encoder_hidden_states": text_encoder(ids)[0]}
    return {
        "VAE's encoder": macs(vae.encoder, sample=image),
        "text encoder": macs(text_encoder, input_ids=ids),
        "teacher": macs(unet, **inputs),
        "student, forward and backward": 3 * macs(student, **inputs),
    }


def write_inputs(folder: Path, scale: int, resolution: int, images: int) -> None:
    """Write a pipeline of random weights, and random images with captions."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    numbered = {token: index for index, token in enumerate(vocabulary)}
    tokenizer = CLIPTokenizer(vocab=numbered, merges=[], model_max_length=TOKENS)  # a token per letter
    torch.manual_seed(0)
    skeletons = make_models(scale, resolution, len(tokenizer), TOKENS)
    vae, unet = (type(model).from_config(model.config) for model in (skeletons[0], skeletons[2]))
    text_encoder = type(skeletons[1])(skeletons[1].config)
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )
    parts = (vae, text_encoder, tokenizer, unet, scheduler, None, None)
    StableDiffusionPipeline(*parts, requires_safety_checker=False).save_pretrained(folder / "teacher")
    (folder / "images").mkdir()
    lines = []
    for index in range(images):
        pixels = np.random.default_rng(index).integers(0, 256, (resolution, resolution, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{index}.png")
        lines.append(json.dumps({"file_name": f"{index}.png", "text": f"image {index % 10}"}))
    (folder / "images" / "metadata.jsonl").write_text("\n".join(lines))


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line, or `input_args`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=int, default=8, help="number that divides the original's widths (default: 8)")
    parser.add_argument("--resolution", type=int, default=128, help="side of the images in pixels (default: 128)")
    parser.add_argument("--steps", type=int, default=12, help="timed steps of each run (default: 12)")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them (default: 3)")
    parser.add_argument("--runs", type=int, default=2, help="runs with and without the cache (default: 2)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("flags", nargs="*", help="after --: flags for the training script")
    args = parser.parse_args(input_args)
    if args.scale not in (1, 2, 4, 8):
        fail(f"--scale {args.scale} does not divide the widths and their groups; pass 1, 2, 4 or 8")
    return args


def main(args: argparse.Namespace) -> None:
    """Run the trainings, print the speeds, and write the JSON."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_inputs(folder, args.scale, args.resolution, images=64)
        flags = ["--pretrained_teacher_model", folder / "teacher", "--train_data_dir", folder / "images"]
        flags += ["--cache_dir", folder / "cache", "--train_batch_size", 8, "--gradient_accumulation_steps", 1]
        flags += ["--max_train_steps", args.warmup + args.steps, "--logging_steps", 1, "--report_to", "none"]
        flags += ["--dataloader_num_workers", 0, "--num_inference_steps", 1, *args.flags]
        flags = [str(flag) for flag in flags]
        script_args = train_lift_sd21.parse_args(flags)
        scaled = count_macs(*make_models(args.scale, args.resolution, 1000, TOKENS), script_args)
        original = count_macs(*make_models(1, 512, 49408, 77), script_args)

        environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1"}
        environment["ACCELERATE_USE_CPU"] = str(not torch.cuda.is_available())
        speeds: dict[str, list[float]] = {"without": [], "with": []}
        for turn in range(args.runs):
            for name, measured in speeds.items():
                output_dir = folder / f"{name}-{turn}"
                cached = ["--cache_latents"] if name == "with" else []
                command = [sys.executable, train_lift_sd21.__file__, "--output_dir", str(output_dir), *flags, *cached]
                finished = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
                if finished.returncode != 0:
                    fail(f"the training {name} the cache failed:\n{finished.stdout.decode()[-2000:]}")
                rows = read_metrics(output_dir / "metrics.jsonl")[args.warmup :]
                images = statistics.median(row["images_per_second"] for row in rows)
                batch = script_args.train_batch_size * script_args.gradient_accumulation_steps
                measured.append(images / batch)
                print(f"{name} --cache_latents: {measured[-1]:.3f} steps per second", flush=True)

    ratio = statistics.median(speeds["with"]) / statistics.median(speeds["without"])
    result = {
        "device": describe_device(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        "threads": args.threads,
        "torch": torch.__version__,
        "student": script_args.student,
        "flags": " ".join(args.flags),
        "scale": args.scale,
        "resolution": args.resolution,
        "batch": script_args.train_batch_size,
        "steps timed": args.steps,
        "steps per second": speeds,
        "ratio": ratio,
        "MACs per image and step": {"here": scaled, "Stable Diffusion 2.1 at 512 pixels": original},
    }
    print(f"\n{result['device']}, {args.threads} threads, torch {torch.__version__}, {script_args.student}\n")
    print("| share of a step's MACs | here | Stable Diffusion 2.1, 512 px |\n|---|--:|--:|")
    for name in scaled:
        print(
            f"| {name} | {scaled[name] / sum(scaled.values()):.1%} | {original[name] / sum(original.values()):.1%} |"
        )
    print(f"\nsteps per second with / without --cache_latents: {ratio:.2f}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main(parse_args())
