"""Whatever is wrong with a command ends it with one line that names flag, value and remedy, and changes no file.

A case is a line in one of the tables. Each runs in a process forked from one that has imported the scripts.
"""

import fcntl
import hashlib
import io
import json
import os
import re
import shlex
import shutil
import signal
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, LDMPipeline, UNet2DModel, VQModel
from PIL import Image
from safetensors.torch import load_file, save_file

from fork_server import make_fork_server, start_run
from tiny_models import (
    TINY_UNET,
    save_dit_pipeline,
    save_pixart_pipeline,
    save_pixel_pipeline,
    save_sd3_pipeline,
    save_sd_pipeline,
    save_sdxl_pipeline,
)


UNET, SD, DIT, SD3, XL = (f"train_lift_{kind}" for kind in ("unet", "sd21", "dit", "sd3", "sdxl"))
GENERATE, EVALUATE, REPORT = "generate", "evaluate", "report"
ALL, LATENT, CAPTIONED, DEEP = (UNET, SD, DIT, SD3, XL), (SD, DIT, SD3, XL), (SD, SD3, XL), (DIT, SD3)
BOTH_SD, LOADING = (SD, XL), (*ALL, GENERATE)
ONE_LEVEL = {"block_out_channels": [8], "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]}
WEIGHTED, SAMPLED = (UNET, SD, SD3, XL), (*LATENT, GENERATE, REPORT)  # by --lambda_task; with --guidance_scale

# Commands that succeed in two steps. A case's flags take the place of these; ^--flag takes one away. The feature term
# is off because it makes up most of the time that a student takes.
SHORT = (
    " --output_dir student --train_batch_size 2 --gradient_accumulation_steps 1 --max_train_steps 2 --logging_steps 1"
    " --checkpointing_steps 1 --num_inference_steps 1 --report_to none --dataloader_num_workers 0"
    " --lambda_kd_feat 0 --cache_dir {scratch} --pretrained_teacher_model {teacher} --train_data_dir {data}"
)
BASE = {
    UNET: "--student 0.5 --num_validation_images 1" + SHORT,
    SD: "--student bk_base --validation_prompts bag ''" + SHORT,
    DIT: "--student d4 --validation_classes 1" + SHORT,
    SD3: "--student half --validation_prompts bag '' --max_sequence_length 8 --no-cache_latents" + SHORT,
    XL: "--student extreme --validation_prompts bag ''" + SHORT,
    GENERATE: "--model {teacher} --output_dir student --num_images 2 --num_inference_steps 1",
    EVALUATE: "--images {dark} --reference {bright} --features {pool} --output results --statistics_dir {scratch}",
    REPORT: "--teacher {teacher} --students {teacher} --names twin --output_dir report --num_inference_steps 1"
    " --columns 2 --timesteps 2 --latency_images 1",
}
TEACHERS = {UNET: "pixel", SD: "sd", DIT: "dit", SD3: "sd3", XL: "sdxl", GENERATE: "pixel", REPORT: "pixel"}
DATA = {UNET: "digits", DIT: "classes", **dict.fromkeys(CAPTIONED, "captioned")}
MODEL_FLAGS = {**dict.fromkeys(ALL, "--pretrained_teacher_model"), GENERATE: "--model", REPORT: "--teacher"}
PARTS = {**dict.fromkeys((UNET, SD, XL, GENERATE, REPORT), "unet"), **dict.fromkeys(DEEP, "transformer")}

# A line that says what to do has one of these.
REMEDIES = re.compile(
    r"\b(pass|drop|add|use|choose|correct|keep|put|repair|remove|raise|lower|install|wait|make|give|check|rename|run|move|switch|nearest|must|return|measure|convert|unpack)\b"
)


# ----------------------------------------------------------------------------------------------------- prepared inputs


def picture(seed: int, size: int = 16, mode: str = "L", low: int = 0, high: int = 256) -> bytes:
    """A PNG of noise."""
    channels = {"L": (), "RGB": (3,)}[mode]
    pixels = np.random.default_rng(seed).integers(low, high, (size, size, *channels), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def rows(*entries: dict) -> str:
    """JSON lines: one entry each, with the name of an image."""
    return "".join(json.dumps({"file_name": f"{index}.png", **row}) + "\n" for index, row in enumerate(entries))


def write_tree(content: dict[str, str | bytes], folder: Path) -> None:
    folder.mkdir()
    for name, data in content.items():
        write(folder / name, data)


def write(path: Path, content: Any) -> None:
    """A file of text or bytes; of JSON where it is neither."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = content if isinstance(content, (str, bytes)) else json.dumps(content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def save_pool(path: Path) -> None:
    """Features for evaluate.py: the mean colours of an image's quarters."""

    class Pool(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.adaptive_avg_pool2d(images, 2).flatten(1) / 255

    torch.jit.script(Pool()).save(str(path))


def save_ldm_pipeline(path: Path) -> None:
    levels = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    vqvae = VQModel(**levels, block_out_channels=[8, 8], norm_num_groups=4, latent_channels=3)
    unet = UNet2DModel(**{**TINY_UNET, "in_channels": 3, "out_channels": 3})
    LDMPipeline(vqvae, unet, DDIMScheduler(clip_sample=False)).save_pretrained(path)


ALONE = "^--features ^--reference"  # for figures of evaluate.py that need neither
PICTURES = {f"{index}.png": picture(index) for index in range(6)}
COLOURED = {f"{index}.png": picture(index, 32, "RGB") for index in range(6)}
CAPTIONS = [{"text": f"a photo of bag {index}"} for index in range(6)]
ROW = {"name": "a", "contents": "sha256:0", "remarks": []}
RESULTS = {"rows": [ROW], "extractor": {"name": "a"}, "reference": {"source": "b", "images": 1}}

# What a case may name as {name}: a function that writes it, the files of a folder, or the content of a file.
INPUTS: dict[str, Callable[[Path], Any] | dict | str | bytes] = {
    "pixel": save_pixel_pipeline,
    "sd": save_sd_pipeline,
    "dit": save_dit_pipeline,
    "sd3": save_sd3_pipeline,
    "sdxl": save_sdxl_pipeline,
    "ldm": save_ldm_pipeline,
    "scaled": partial(save_pixel_pipeline, resnet_time_scale_shift="scale_shift"),
    "scaled_sd": partial(save_sd_pipeline, resnet_time_scale_shift="scale_shift"),
    "scaled_sdxl": partial(save_sdxl_pipeline, resnet_time_scale_shift="scale_shift"),
    "learned_variance": partial(save_pixel_pipeline, out_channels=2),
    "two_channels": partial(save_pixel_pipeline, in_channels=2, out_channels=2),
    "conditional": partial(save_pixel_pipeline, num_class_embeds=10),
    "inpainting": partial(save_sd_pipeline, in_channels=9),
    "upscaler": partial(save_sd_pipeline, num_class_embeds=10),
    "few_steps": partial(save_sd_pipeline, time_cond_proj_dim=8),
    "few_steps_xl": partial(save_sdxl_pipeline, time_cond_proj_dim=8),
    "one_layer": partial(save_sd_pipeline, layers_per_block=1),
    "two_levels": partial(
        save_sd_pipeline,
        block_out_channels=[8, 16],
        attention_head_dim=[1, 2],
        down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"],
        up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"],
    ),
    "pixart": save_pixart_pipeline,
    "triple": partial(save_dit_pipeline, out_channels=12),
    "digits": PICTURES,
    "captioned": {**COLOURED, "metadata.jsonl": rows(*CAPTIONS)},
    "classes": {f"{'bag' if index % 2 else 'coat'}/{index}.png": data for index, data in enumerate(COLOURED.values())},
    "empty": {},
    "words": {"notes.txt": "no image", "table.csv": "a,b\n1,2\n"},
    "packed": {"images.zip": b"PK\x03\x04"},
    "sharded": {"0.tar": "", "1.tar": ""},
    "parquet": {"0.parquet": ""},
    "phone": {"0.heic": "", "1.HEIC": "", "2.avif": ""},
    "file": "",
    "binary": b"\x80\xff\x00",
    "broken": {"a.png": b"", "b.png": "text", "bag/c.png": b"\x89PNG"},
    "few_broken": {**PICTURES, "bad.png": b"\x89PNG no more"},
    "strings": {**COLOURED, "metadata.jsonl": rows(*({"kind": "bag"} for _ in range(6)))},
    "numbers": {**COLOURED, "metadata.jsonl": rows({"kind": 3, "gap": None}, *[{"kind": 1000, "gap": 4}] * 5)},
    "dark": {f"{index:06d}.png": picture(index, 12, "RGB", high=200) for index in range(20)},
    "bright": {f"{index:06d}.png": picture(index, 12, "RGB", low=90) for index in range(20)},
    "mixed": {"a.png": picture(0, 12, "RGB"), "b.png": picture(1, 12, "RGB"), "wide.png": picture(2, 20, "RGB")},
    "single": {"a.png": picture(0, 12, "RGB")},
    "large": {f"{index}.png": picture(index, 16, "RGB") for index in range(20)},
    "pool": save_pool,
    "identity_pt": lambda path: torch.jit.script(torch.nn.Identity()).save(str(path)),
    "array_npz": lambda path: np.savez(path, np.zeros(3)),
    "flat_npz": lambda path: np.savez(path, mu=np.zeros(12), sigma=np.zeros(12)),
    "other_npz": lambda path: np.savez(path, mu=np.zeros(5), sigma=np.eye(5)),
    "keyed_npz": lambda path: np.savez(path, mu=np.zeros(12), sigma=np.eye(12), key=np.array("[1]")),
    "partly_npz": lambda path: np.savez(path, mu=np.zeros(12), sigma=np.eye(12), key=np.array('{"crop": 3}')),
    "torn_npz": b"PK\x03\x04",
    "one_safetensors": b"\x80\xff\x00",
    "blank_txt": "\n \n",
    "binary_txt": b"\x80\xff\x00",
    "folder_txt": lambda path: write_tree({"a": ""}, path),
    "prompts": "a bag\na sneaker\n",
    "gap": "a bag\n\na sneaker\n",
    "prompted": {**COLOURED, "manifest.json": {"num_images": 6, "prompts": ["a bag"]}},
    "unfinished": {**PICTURES, "manifest.json": {"num_images": 7}},
    "list_json": [],
    "shallow_json": {"config": {"layers_per_block": 1}},
    "nothing_json": {},
    "bare_json": {"rows": [{}]},
    "strange_json": {**RESULTS, "rows": ["a"]},
    "others_json": RESULTS,
    "features_json": {"features": [["transformer_blocks.0", "transformer_blocks.0"]]},
    "binary_json": b"\x80\xff\x00",
    "deep_json": "[" * 100_000,
    "folder_json": lambda path: write_tree({"a": ""}, path),
    "rowless": {"metrics.jsonl": ""},
    "torn_rows": {"metrics.jsonl": '{"step": 1, "loss": 1}\n{"step": 2,\n{"step": 3, "loss": 1}\n'},
    "listed_rows": {"metrics.jsonl": "[1]\n[2]\n"},
    "stepless_rows": {"metrics.jsonl": '{"loss": 1}\n{"loss": 2}\n'},
    "wordy_rows": {"metrics.jsonl": '{"step": 1, "task": "high"}\n'},
}


class Copy(NamedTuple):
    """An input with some of its files changed.

    A change is: `None` removes a file or folder, text or bytes replace it, a number cuts it to so many bytes, a
    dictionary changes entries of its JSON (`...` removes one), and a function does what it does. In paths, {part} is
    the folder of the model that is distilled.
    """

    source: str
    changes: dict[str, Any]


def change(path: Path, how: Any) -> None:
    if how is None:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    elif isinstance(how, int):
        os.truncate(path, how)
    elif isinstance(how, dict):
        content = json.loads(path.read_text()) | how
        write(path, {key: value for key, value in content.items() if value is not ...})
    elif callable(how):
        how(path)
    else:
        write(path, how)


def cut_weights(path: Path) -> None:
    save_file({name: tensor[:1].clone() for name, tensor in load_file(path).items()}, path)


def ruin_weights(path: Path) -> None:
    weights = load_file(path)
    next(iter(weights.values())).fill_(torch.nan)
    save_file(weights, path)


def plant(path: Path) -> None:
    """A pickle whose loading leaves a file."""

    class Planted:
        def __reduce__(self):
            return open, ("planted", "w")

    torch.save({"weight": Planted()}, path)


def append_line(path: Path, line: str) -> None:
    path.write_text(path.read_text() + line)


def flip_last_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def make_flow(path: Path) -> None:
    FlowMatchEulerDiscreteScheduler().save_pretrained(path.parent)


# ---------------------------------------------------------------------------------------------------------- the tables


# Scripts, flag, values, and what they may be. Each script gets one of the values at least, and each value a script.
NUMBERS = [
    (ALL, "learning_rate", "inf nan -1", "at least 0"),
    (ALL, "adam_beta1", "1 nan", "at least 0 and less than 1"),
    (ALL, "adam_beta2", "-0.1 1.5", "at least 0 and less than 1"),
    (ALL, "adam_epsilon", "0 inf", "more than 0"),
    (ALL, "adam_weight_decay", "nan -0.5", "at least 0"),
    (ALL, "ema_decay", "2 1 -0.5", "at least 0 and less than 1"),
    (ALL, "max_unreadable", "5 nan", "at least 0 and at most 1"),
    (ALL, "num_train_epochs", "0 nan", "more than 0"),
    (ALL, "max_grad_norm", "0 nan", "more than 0"),
    (ALL, "lambda_kd_feat", "-1 inf", "at least 0"),
    (WEIGHTED, "lambda_kd_output", "nan", "at least 0"),
    (WEIGHTED, "lambda_task", "inf", "at least 0"),
    (DIT, "kd_alpha", "1.5 nan", "at least 0 and at most 1"),
    (DIT, "label_dropout", "2 nan", "at least 0 and at most 1"),
    (CAPTIONED, "caption_dropout", "1.5 nan -1", "at least 0 and at most 1"),
    (SAMPLED, "guidance_scale", "nan -1", "at least 0"),
    (SD3, "logit_std", "0 -1", "more than 0"),
    (SD3, "logit_mean", "inf", "finite"),
    (SD3, "mode_scale", "nan", "finite"),
    ((*ALL, GENERATE, EVALUATE, REPORT), "seed", "-1 4294967296", "at least 0 and at most"),
    ((*ALL, REPORT), "group_size", "1 0 -16", "at least 2"),
    (ALL, "max_train_steps", "0", "at least 1"),
    (ALL, "train_batch_size", "0", "at least 1"),
    (ALL, "gradient_accumulation_steps", "0", "at least 1"),
    (ALL, "checkpointing_steps", "0", "at least 1"),
    (ALL, "checkpoints_total_limit", "0", "at least 1"),
    (ALL, "logging_steps", "0", "at least 1"),
    (ALL, "validation_steps", "0", "at least 1"),
    (ALL, "max_train_samples", "0", "at least 1"),
    (ALL, "lr_warmup_steps", "-1", "at least 0"),
    (ALL, "dataloader_num_workers", "-1 100000", "at least 0 and at most"),
    ((*ALL, GENERATE, REPORT), "num_inference_steps", "0 5000", "at least 1 and at most"),
    ((UNET, SD, SD3, XL, GENERATE, REPORT), "resolution", "0 100000", "at least 1 and at most"),
    (UNET, "num_validation_images", "0", "at least 1"),
    (LATENT, "encoding_batch_size", "0", "at least 1"),
    (CAPTIONED, "lora_rank", "-1", "at least 0"),
    ((SD3, GENERATE, REPORT), "max_sequence_length", "0 513 10000", "at least 1 and at most"),
    (GENERATE, "num_images", "0 -1", "at least 1"),
    ((GENERATE, EVALUATE), "batch_size", "0", "at least 1"),
    (GENERATE, "resize", "0 100000", "at least 1 and at most"),
    (EVALUATE, "num_workers", "-1", "at least 0"),
    (EVALUATE, "features_size", "0 100000", "at least 1 and at most"),
    (EVALUATE, "reference_resolution", "0 100000", "at least 1 and at most"),
    (REPORT, "columns", "0", "at least 1"),
    (REPORT, "timesteps", "0", "at least 1"),
    (REPORT, "latency_images", "0", "at least 1"),
]

# Scripts, flags, and what argparse itself says.
USAGE = [
    (ALL, "--learning_rate fast", "argument --learning_rate: invalid float value: 'fast'"),
    (ALL, "--learning_rate -inf", "argument --learning_rate: expected one argument"),
    (ALL, "--max_train_steps 1.5", "argument --max_train_steps: invalid int value: '1.5'"),
    (ALL, "--kd_loss kl", "argument --kd_loss: invalid choice: 'kl'"),
    (ALL, "--mixed_precision fp8", "argument --mixed_precision: invalid choice: 'fp8'"),
    ((*ALL, GENERATE, EVALUATE, REPORT), "--no_such_flag 1", "unrecognized arguments: --no_such_flag 1"),
    (CAPTIONED, "--validation_prompts", "argument --validation_prompts: expected at least one argument"),
    (CAPTIONED, "--lora_rank 1.5", "argument --lora_rank: invalid int value: '1.5'"),
    (DEEP, "--student_depth two", "argument --student_depth: invalid int value: 'two'"),
    (DEEP, "--keep_blocks -1,2", "argument --keep_blocks: expected one argument"),
    (GENERATE, "^--model", "the following arguments are required: --model"),
    ((GENERATE, REPORT), "--sampler best", "argument --sampler: invalid choice: 'best'"),
    (EVALUATE, "--metrics fid nosuch", "invalid choice: 'nosuch' (choose from"),
    (REPORT, "^--students", "the following arguments are required: --students"),
    ((GENERATE, REPORT), "--output_dir ''", 'argument --output_dir: "" is empty; pass a path'),
    ((GENERATE, REPORT), "--prompt_file ''", 'argument --prompt_file: "" is empty; pass a path'),
    (EVALUATE, "--images ''", 'argument --images: "" is empty; pass a path'),
    (EVALUATE, "--output ''", 'argument --output: "" is empty; pass a path'),
    (EVALUATE, "--features ''", 'argument --features: "" is empty; pass a path'),
    (REPORT, "--runs ''", 'argument --runs: "" is empty; pass a path'),
]

# Scripts, the content of a JSON file for --student, and what the line says.
STUDENTS = [
    (UNET, "{", "cannot be read"),
    (SD, "", "cannot be read"),
    (DIT, [1], "object"),
    (SD3, "7", "object"),
    (SD, "null", "object"),
    (UNET, '{"config": {"sample_size": NaN}}', "cannot be read"),
    (ALL, {"blocs": {}}, "blocs"),
    (UNET, {"config": []}, '"config"'),
    (SD, {"config": [1]}, '"config"'),
    (ALL, {"config": {"nope": 1}}, "nope"),
    (DIT, {"blocks": []}, '"blocks"'),
    (SD3, {"blocks": {}}, '"blocks"'),
    (UNET, {"blocks": {"a": 1}}, '"blocks"'),
    (ALL, {"blocks": {"nowhere": "x"}}, 'no block "nowhere"'),
    (SD, {"features": "x"}, '"features"'),
    (UNET, {"features": [["mid_block"]]}, '"features"'),
    (ALL, {"features": [["nowhere", "mid_block"]]}, '"nowhere", which does not exist; correct its "features"'),
    (ALL, {"config": {"in_channels": 3}}, "in_channels", "3", "keep the teacher's"),
    (ALL, {"config": {"in_channels": -1}}, "correct"),
    (DIT, {"config": {"in_channels": "x"}}, "correct"),
    (UNET, {"width": "a"}, '"width"'),
    (UNET, {"width": 0}, '"width"'),
    (UNET, {"width": 2}, '"width"'),
    (UNET, {"width": 0.9, "config": {"norm_num_groups": 16}}, "is rounded up to the whole [16, 32], in groups of 16"),
    (UNET, {"width": 0.5, "config": {"block_out_channels": [8, 16]}}, 'both "width" and "block_out_channels"'),
    (UNET, {"levels": 1}, "levels"),
    (UNET, {"features": [["mid_block", "nothing"]]}, 'features of "nothing", which does not exist'),
    (UNET, {"features": [["conv_in", "mid_block"]]}, "which are no pair; correct"),
    (UNET, {"config": {"block_out_channels": "x"}}, "correct"),
    (UNET, {"config": {"block_out_channels": []}}, "correct"),
    (UNET, {"config": {"block_out_channels": [16]}}, "correct"),
    (UNET, {"config": {"block_out_channels": [-16, -32]}}, "correct"),
    (UNET, {"config": {"block_out_channels": [64, 128]}}, "wider"),
    (UNET, {"config": {"block_out_channels": [2**40, 2**40]}}, "correct"),
    (UNET, {"config": {"layers_per_block": 0}}, "correct"),
    (UNET, {"config": {"layers_per_block": -1}}, "correct"),
    (UNET, {"config": {"attention_head_dim": 0}}, "correct"),
    (UNET, {"config": {"norm_num_groups": 0}}, "correct"),
    (UNET, {"config": {"down_block_types": ["NoSuchBlock", "DownBlock2D"]}}, "NoSuchBlock"),
    (UNET, {"config": {"act_fn": "nosuch"}}, "nosuch"),
    (UNET, {"config": {"sample_size": "x"}}, "correct"),
    (UNET, {"config": {"sample_size": 15}}, "15", "2"),
    (UNET, {"config": {"out_channels": 2}}, "out_channels", "keep the teacher's 1"),
    (UNET, {"config": {"num_class_embeds": 10}}, "class-conditional"),
    (BOTH_SD, {"levels": "three"}, '"levels"'),
    (BOTH_SD, {"levels": 0}, '"levels"'),
    (BOTH_SD, {"levels": 1.5}, '"levels"'),
    (SD, {"levels": 99}, "does not fit the teacher of 4 levels"),
    (XL, {"levels": 99}, "does not fit the teacher of 3 levels"),
    (BOTH_SD, {"levels": 2, "width": 0.5}, 'with "levels" other widths prune nothing; pass --student_init random'),
    (SD, {"levels": 2, "config": {"block_out_channels": [4, 8]}}, "other widths prune nothing"),
    (UNET, {"config": ONE_LEVEL}, "with fewer levels other widths prune nothing; pass --student_init random"),
    (XL, {"config": {"transformer_layers_per_block": "x"}}, "correct"),
    (XL, {"config": {"transformer_layers_per_block": [1]}}, "correct"),
    (XL, {"config": {"addition_embed_type": None}}, "its addition_embed_type is None; keep the teacher's text_time"),
    (XL, {"config": {"addition_time_embed_dim": 2}}, "its addition_time_embed_dim is 2; keep the teacher's"),
    (XL, {"config": {"projection_class_embeddings_input_dim": 7}}, "keep the teacher's"),
    (XL, {"config": {"attention_head_dim": [1, 0, 1]}}, "correct"),
    (BOTH_SD, {"width": 0}, '"width"'),
    (BOTH_SD, {"config": {"block_out_chanels": [8, 16, 32, 32]}}, "has no block_out_chanels"),
    (SD, {"config": {"in_channels": 9}}, "its in_channels is 9; keep the teacher's 4"),
    (SD, {"config": {"cross_attention_dim": 32}}, "its cross_attention_dim is 32; keep the teacher's 16"),
    (SD, {"config": {"block_out_channels": [6, 16, 32, 32]}}, "num_channels (6) must be divisible"),
    (SD, {"width": 0.5, "config": {"block_out_channels": [8, 16, 32, 32]}}, 'both "width" and "block_out_channels"'),
    (SD, {"config": {"block_out_channels": [16, 32, 64, 64]}}, "wider"),
    (BOTH_SD, {"config": {"layers_per_block": 0}}, "correct"),
    (BOTH_SD, {"config": {"norm_num_groups": 0}}, "correct"),
    (SD, {"blocks": {"nowhere": "conv_in"}}, 'no block "nowhere"'),
    (SD, {"features": [["down_blocks.9", "down_blocks.0"]]}, 'features of "down_blocks.9", which does not exist'),
    (SD, {"features": [["conv_in", "nothing"]]}, 'features of "nothing", which does not exist'),
    (SD, {"features": [["conv_in", "down_blocks.2"]]}, "which are no pair; correct"),
    (DIT, {"config": {"num_blocks": 3}}, "has no num_blocks"),
    (DIT, {"config": {"in_channels": 3, "num_layers": 2}}, "its in_channels is 3; keep the teacher's 4"),
    (DIT, {"blocks": {"transformer_blocks.0": "transformer_blocks.9"}}, 'the teacher has no "transformer_blocks.9'),
    (DIT, {"config": {"num_layers": 2}, "features": [["transformer_blocks.7"] * 2]}, '"transformer_blocks.7"'),
    (DEEP, {"config": {"num_layers": 0}}, "correct"),
    (DIT, {"config": {"num_layers": "x"}}, "correct"),
    (DEEP, {"config": {"num_attention_heads": 0}}, "correct"),
    (SD3, {"config": {"attention_head_dim": -8}}, "correct"),
    (DEEP, {"config": {"patch_size": 0}}, "correct"),
    (DIT, {"config": {"attention_head_dim": 64}}, "wider"),
    (DIT, {"config": {"norm_type": "nosuch"}}, "correct"),
    (SD3, {"config": {"depth": 3}}, "has no depth"),
    (SD3, {"config": {"num_attention_heads": 1}, "features": []}, "does not fit the teacher"),
    (SD3, {"blocks": {"transformer_blocks.9": "transformer_blocks.0"}}, 'no block "transformer_blocks.9"'),
    (SD3, {"config": {"num_layers": 2}, "blocks": {"transformer_blocks.1": "transformer_blocks.1"}}, "cannot take"),
    (SD3, {"features": [["transformer_blocks.0", "transformer_blocks.6"]]}, '"transformer_blocks.6", which does not'),
    (SD3, {"config": {"dual_attention_layers": "x"}}, "correct"),
    (SD3, {"features": [["transformer_blocks.0.attn"] * 2]}, "transformer_blocks.0.attn; pass whole blocks"),
    (SD3, {"features": [["transformer_blocks.0.norm1"] * 2]}, "transformer_blocks.0.norm1; pass whole blocks"),
]

INDEX = "model_index.json"
SCHEDULE = "scheduler/scheduler_config.json"
VAE = "vae/diffusion_pytorch_model.safetensors"
ENCODER = "text_encoder/model.safetensors"
WEIGHTS = "{part}/diffusion_pytorch_model.safetensors"
PICKLE = "{part}/diffusion_pytorch_model.bin"
NULL = [None, None]
SDXL = {INDEX: {"text_encoder_2": ["transformers", "CLIPTextModel"]}}
FLOW = {
    INDEX: {"scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]},
    SCHEDULE: make_flow,
}
SAFETY = ["stable_diffusion", "StableDiffusionSafetyChecker"]  # which no step needs
TEXTLESS = {f"{kind}{number}": NULL for kind in ("text_encoder", "tokenizer") for number in ("", "_2", "_3")}

# Scripts, what is wrong with the teacher, further flags, and what the line says.
DAMAGED_TEACHERS = [
    (LOADING, {INDEX: None}, "", "does not load"),
    ((SD, GENERATE), {INDEX: "{"}, "", "does not load"),
    (UNET, {INDEX: "[]"}, "", ""),
    (SD, {INDEX: "[]"}, "", "lists no parts; pass"),
    ((DIT, GENERATE), {INDEX: "{}"}, "", ""),
    ((UNET, SD3), {INDEX: b"\x80\xff"}, "", "does not load"),
    ((UNET, DIT, REPORT), {"{part}": None}, "", "does not load"),
    (SD3, {"{part}/config.json": None}, "", "does not load"),
    ((UNET, SD3), {"{part}/config.json": "{"}, "", "does not load"),
    ((SD, DIT, GENERATE), {"{part}/config.json": "[]"}, "", "does not load"),
    (LOADING, {"{part}/config.json": {"sample_size": "x"}}, "", "{it}"),
    ((UNET, SD), {WEIGHTS: None}, "", "does not load", "no file named diffusion_pytorch_model.safetensors"),
    (LOADING, {WEIGHTS: 1000}, "", "does not load"),
    (SD3, {WEIGHTS: 0}, "", "does not load"),
    ((UNET, SD, SD3), {WEIGHTS: cut_weights}, "", "does not load"),
    ((*LOADING, REPORT), {WEIGHTS: ruin_weights}, "", "not finite"),
    (LOADING, {WEIGHTS: None, PICKLE: plant}, "", "weights_only=True"),
    (UNET, {"scheduler": None}, "", "does not load"),
    ((SD, GENERATE), {"scheduler": None}, "", "no file named scheduler_config.json"),
    ((DIT, SD3), {SCHEDULE: "{"}, "", "does not load"),
    ((UNET, SD), {SCHEDULE: {"num_train_timesteps": 0}}, "", "num_train_timesteps"),
    (SD3, {SCHEDULE: {"num_train_timesteps": 0}}, "", "does not load"),
    ((UNET, SD, DIT, GENERATE), FLOW, "", "FlowMatchEulerDiscreteScheduler"),
    (SD3, {INDEX: {"scheduler": ["diffusers", "DDPMScheduler"]}}, "", "has a DDPMScheduler"),
    ((UNET, SD, DIT, GENERATE), {SCHEDULE: {"prediction_type": "flow"}}, "", "flow"),
    (SD3, {SCHEDULE: {"use_dynamic_shifting": True}}, "", "FlowMatchEulerDiscreteScheduler with use_dynamic_shifting"),
    ((SD, DIT), {INDEX: {"scheduler": ["own", "MyScheduler"]}}, "", "an unknown scheduler, MyScheduler; pass"),
    (SD, {INDEX: {"scheduler": ...}}, "", "with no scheduler; pass"),
    (SD, {INDEX: {"scheduler": NULL}}, "", "with no scheduler; pass"),
    (DIT, {INDEX: {"scheduler": NULL}}, "", "scheduler"),
    (SD, {INDEX: {"vae": ...}}, "", "with no vae; pass"),
    (DIT, {INDEX: {"vae": NULL}}, "", "has no vae; pass --vae, or a DiTPipeline"),
    (SD3, {INDEX: {"vae": NULL}}, "", "with no vae; pass"),
    ((SD, DIT), {"vae": None}, "", "does not load: Error no file named config.json"),
    (SD3, {VAE: 100}, "", "does not load"),
    (LATENT, {VAE: ruin_weights}, "", "its vae has weights that are not finite"),
    (XL, {INDEX: {"text_encoder_2": NULL}}, "", "with no text_encoder_2; pass"),
    (XL, {INDEX: {"tokenizer_2": ...}}, "", "with no tokenizer_2; pass"),
    (XL, {INDEX: {"scheduler": ["own", "MyScheduler"]}}, "", "an unknown scheduler, MyScheduler; pass"),
    (XL, {INDEX: {"vae": NULL}}, "", "with no vae; pass"),
    (XL, {"text_encoder_2": None}, "", "its text encoders give"),
    (XL, {"tokenizer_2": None}, "", "lacks files of its tokenizers; pass"),
    (XL, {"text_encoder_2/model.safetensors": ruin_weights}, "", "its text_encoder_2 has weights that are not finite"),
    (XL, {"text_encoder_2/model.safetensors": None}, "", "no file named model.safetensors"),
    (XL, {"text_encoder_2/config.json": {"projection_dim": 8}}, "", "pooled ones of"),
    (XL, {"vae": None}, "", "does not load"),
    (XL, FLOW, "", "FlowMatchEulerDiscreteScheduler"),
    (XL, {SCHEDULE: {"num_train_timesteps": 0}}, "", "num_train_timesteps"),
    (SD, SDXL, "", "two text encoders (SDXL); run train_lift_sdxl.py, or pass"),
    (SD, {INDEX: {"tokenizer": ...}}, "", "with no tokenizer; pass"),
    (SD, {"tokenizer": None}, "", "lacks files of its tokenizer; pass"),
    (SD3, {"tokenizer": None}, "", "lacks its tokenizer; pass"),
    (SD, {INDEX: {"safety_checker": SAFETY}}, "", "does not load", "no file named model.safetensors"),
    (SD, {"text_encoder": None}, "", "no file named model.safetensors"),
    (SD, {"text_encoder": None}, "--cache_latents", "no file named model.safetensors"),
    (SD3, {"text_encoder": None}, "", "text_encoder"),
    (SD, {ENCODER: ""}, "", "does not load"),
    (SD3, {ENCODER: None}, "", "no file named model.safetensors"),
    (CAPTIONED, {ENCODER: ruin_weights}, "", "its text_encoder has weights that are not finite"),
    (SD3, {INDEX: TEXTLESS}, "", "lacks its text_encoder, as T5 alone may; pass"),
    (SD3, {INDEX: {"text_encoder_2": NULL, "tokenizer_2": NULL}}, "", "lacks its text_encoder_2"),
    (BOTH_SD, {"unet/config.json": {"sample_size": [8, 12]}}, "", "the sample_size [8, 12]", "pass --resolution"),
    (SD3, {"text_encoder/config.json": {"projection_dim": 8}}, "", "its CLIP encoders give 32 and 28"),
    (XL, {"vae/config.json": {"latents_mean": [1.0] * 4}}, "--dry_run", "its VAE has latents_mean", "pass --vae"),
    (SD, {"unet/config.json": {"cross_attention_dim": 24}}, "--dry_run", "takes embeddings of 24, its text enc"),
    (SD3, {"text_encoder_3/config.json": {"d_model": 64}}, "", "its T5 gives 64; pass --no_t5"),
    (SD3, {"transformer/config.json": {"in_channels": 3}}, "", "maps 3 channels to 4"),
    (SD3, {"tokenizer_3": None}, "", "tokenizer_3"),
    (GENERATE, {WEIGHTS: flip_last_bit}, "--output_dir {generated}", "its contents differ from those for"),
    ((GENERATE, REPORT), {SCHEDULE: {"num_train_timesteps": 20}}, "--num_inference_steps 50", "the 20 of its sched"),
    ((GENERATE, REPORT), {INDEX: None, "checkpoint-2/state.json": "{}"}, "", "is a run that has not ended", "let it"),
]

COLUMN = "--caption_column text"


def captions(**entries) -> dict[str, str]:
    """The change of a metadata.jsonl to these entries for each image."""
    return {"metadata.jsonl": rows(*[entries] * 6)}


# Scripts, what is wrong with the images, further flags, and what the line says.
DAMAGED_DATA = [
    (SD, {"metadata.jsonl": None}, "", "--caption_column text is not in the data"),
    (SD3, {"metadata.jsonl": ""}, "", "--train_data_dir {it}"),
    (SD, {"metadata.jsonl": "{"}, "", "--train_data_dir {it} does not load"),
    (SD, {"metadata.jsonl": "[1]\n[2]\n"}, "", "--train_data_dir {it} does not load"),
    (SD, captions(), COLUMN, "text is not in the data; choose one of image, or give it in the folder's metadata"),
    (SD, captions(text=7), COLUMN, "text holds Value('int64'); pass a column of strings"),
    (SD, captions(text=["a"]), COLUMN, "text holds List(Value('string')); pass a column of strings"),
    (SD, captions(text=None), COLUMN, "text holds Value('null'); pass a column of strings"),
    (SD, {"metadata.jsonl": rows({"text": 7}, *CAPTIONS[1:])}, "", "--train_data_dir {it} does not load"),
    (SD, {"metadata.jsonl": rows({"text": " "}, *CAPTIONS[1:])}, "", "1 of 6 images have no caption", "0.png"),
    (SD3, {"metadata.jsonl": rows(*CAPTIONS[:5])}, "", "1 of 6 images have no caption", "5.png"),
    (CAPTIONED, {"0.png": None}, "", "--train_data_dir {it}", "1 of 6 images cannot be read", "0.png"),
    (SD, {"0.png": 60, "1.png": 60}, "--max_unreadable 0.2", "2 of 6 images cannot be read", "1.png"),
    ((UNET, SD), {}, "--output_dir {it}", "--output_dir {it}", "--train_data_dir"),
    ((UNET, SD), {}, "--output_dir {it}/student", "--output_dir {it}/student is in --train_data_dir {it}", "outside"),
    ((UNET, SD), {}, "--cache_dir {it}/cache", "--cache_dir {it}/cache is in --train_data_dir {it}", "folder outside"),
    (SD, {"metadata.jsonl": None, "0.txt": "a bag"}, "", "5 of 6 images have no caption: {it}/1.png, {it}/2.png"),
    (SD3, {"metadata.jsonl": None, "0.txt": b"\xff\xfea"}, "", "{it}/0.txt cannot be read: 'utf-8' codec"),
    (SD, {"metadata.jsonl": None, "0.txt": Path.mkdir, "1.txt": "a bag"}, "", "{it}/0.txt cannot be read: [Errno 21]"),
    (CAPTIONED, {"metadata.jsonl": None, "0.txt": " "}, COLUMN, "text is not in the data", ".txt file beside each"),
    (SD, {"metadata.jsonl": None, "0.txt": "a bag"}, "--caption_column image", "pass a column of strings"),
    (SD, {"metadata.jsonl": None, "0.txt": "a bag"}, "--image_column x", "--image_column x is not in the data"),
    (UNET, {"0.png": "no image"}, "", "1 of 6 images cannot be read", "or raise --max_unreadable 0.01"),
    (DIT, {"coat/0.png": 60}, "", "--train_data_dir {it}", "1 of 6 images cannot be read", "coat/0.png"),
    (DIT, {"bag/metadata.jsonl": "{"}, "", "--train_data_dir {it} does not load"),
]

RESUME = "--resume_from_checkpoint"
LATEST = f"{RESUME} latest --max_train_steps 3"
UNLISTED = {"checkpoint-2/manifest.json": "{}", "checkpoint-2/unet/diffusion_pytorch_model.safetensors": 99}
NONE_WHOLE = {"checkpoint-1/manifest.json": None, "checkpoint-2/manifest.json": None}
PLAIN = {"checkpoint-1": None, "checkpoint-2": None}
NAMED = f"{RESUME} checkpoint-2 --max_train_steps 3"

# Scripts, what is wrong with the folder of an earlier run, further flags, and what the line says.
DAMAGED_RUNS = [
    (ALL, {}, "", "--output_dir {it} holds another run", LATEST.split(" --max")[0]),
    (ALL, PLAIN, "", "--output_dir {it} holds a pipeline, without checkpoints to go on from; pass a new folder"),
    (UNET, PLAIN, LATEST, "--output_dir {it} holds a pipeline, without checkpoints"),
    ((UNET, SD3), {}, f"{RESUME} checkpoint-7", "checkpoint-7 is no folder"),
    ((UNET, DIT), {}, f"{LATEST} --no-use_ema", "is of another student", "pass the run's own flags"),
    (UNET, {}, f"{LATEST} --lambda_kd_feat 1", "is of another student"),
    (UNET, {}, f"{LATEST} --student 0.25", "latest is of another student", "block_out_channels"),
    (SD3, {}, f"{LATEST} --student third", "is of another student", "num_layers"),
    (DIT, {}, f"{LATEST} ^--student --keep_blocks 0,3,5,7", "is of another student", "the teacher's blocks"),
    (SD3, {}, f"{LATEST} ^--student --keep_blocks 0,3,5", "is of another student", "the teacher's blocks"),
    (CAPTIONED, {}, f"{LATEST} --lora_rank 2", "is of another student", "adapters", "pass the run's own flags"),
    (UNET, {}, f"{RESUME} checkpoint-1 --resolution 32", "checkpoint-1 is older than checkpoint-2"),
    (UNET, {}, f"{LATEST} --use_8bit_adam", "is of AdamW", "--use_8bit_adam"),
    (UNET, {}, f"{RESUME} {{it}}/metrics.jsonl", "is no folder"),
    (UNET, {}, f"{RESUME} {{it}}", "incomplete"),
    (UNET, {}, f"{RESUME} {{it}}/checkpoint-2/unet/diffusion_pytorch_model.safetensors", "is no folder"),
    (UNET, {"checkpoint-2/manifest.json": None}, NAMED, "incomplete", "latest"),
    (UNET, {"checkpoint-2/manifest.json": "{"}, NAMED, "latest"),
    (UNET, {"checkpoint-2/manifest.json": b"\xff"}, NAMED, "latest"),
    (UNET, {"checkpoint-2/manifest.json": "[]"}, NAMED, "incomplete", "latest"),
    (UNET, {"checkpoint-2/manifest.json": "7"}, NAMED, "incomplete", "latest"),
    (UNET, UNLISTED, NAMED, "incomplete", "latest"),
    (
        UNET,
        {"checkpoint-2/manifest.json": {"unet/diffusion_pytorch_model.safetensors": ...}},
        NAMED,
        "another student",
    ),
    (UNET, {"checkpoint-2/manifest.json": {"state.json": {"bytes": "x"}}}, NAMED, "latest"),
    (UNET, {"checkpoint-2/manifest.json": {"../../file": {"bytes": 0, "sha256": ""}}}, NAMED, "latest"),
    (UNET, {"checkpoint-2/unet/diffusion_pytorch_model.safetensors": 99}, NAMED, "damaged", "latest"),
    (UNET, {"checkpoint-2/optimizer.safetensors": flip_last_bit}, NAMED, "damaged", "latest"),
    (UNET, {"checkpoint-2/unet_ema/config.json": None}, NAMED, "incomplete", "latest"),
    (UNET, {"checkpoint-2/state.json": "{"}, NAMED, "damaged", "latest"),
    (UNET, PLAIN, "--pretrained_teacher_model {it}", "--output_dir {it}", "--pretrained_teacher_model"),
    (SD, PLAIN, "--pretrained_teacher_model {it} --student whole", "--output_dir {it}", "--pretrained_teacher_model"),
    (UNET, NONE_WHOLE, LATEST, "--resume_from_checkpoint latest: no checkpoint in {it} is whole", "remove them"),
    ((UNET, DIT), {"metrics.jsonl": lambda path: append_line(path, "{\n7\n{}\n")}, LATEST, "metrics.jsonl"),
    (UNET, {"metrics.jsonl": "no JSON\nat all\n"}, LATEST, "metrics.jsonl"),
    (UNET, {"metrics.jsonl": "[1]\n[2]\n"}, LATEST, "metrics.jsonl"),
    (UNET, {"metrics.jsonl": '{"loss": 1}\n{"loss": 1}\n'}, LATEST, "metrics.jsonl"),
    (UNET, {"metrics.jsonl": '{"step": "two"}\n{"step": null}\n'}, LATEST, "metrics.jsonl"),
    (UNET, {"metrics.jsonl": b"\xff\xfe\x00\n\x80\n"}, LATEST, "metrics.jsonl"),
]

# Scripts, what is wrong with a folder of generated images, further flags, and what the line says.
DAMAGED_IMAGES = [
    (GENERATE, {}, "--seed 1", "--seed is 1 but was 0"),
    (GENERATE, {}, "--num_inference_steps 3", "--num_inference_steps is 3 but was 1"),
    (GENERATE, {}, "--sampler ddpm", "--sampler is ddpm but was ddim"),
    (GENERATE, {}, "--batch_size 3", "--batch_size is 3 but was 16"),
    (GENERATE, {}, "--resize 8", "--resize is 8 but was None"),
    (GENERATE, {}, "--dtype bfloat16", "--dtype is bfloat16 but was float32"),
    (GENERATE, {}, "--num_images 1", "--num_images 1 is fewer than the 2"),
    (GENERATE, {"manifest.json": None}, "", "--output_dir {it} holds images of another origin"),
    (GENERATE, {"manifest.json": "{"}, "", "{it} has a damaged manifest.json"),
    (GENERATE, {"manifest.json": "[]"}, "", "{it} has a damaged manifest.json"),
    (GENERATE, {"manifest.json": b"\xff"}, "", "{it} has a damaged manifest.json"),
    (GENERATE, {"manifest.json": {"num_images": "two"}}, "", "{it} has a damaged manifest.json"),
    (EVALUATE, {"manifest.json": "{"}, "", "{it} has a damaged manifest.json"),
    (EVALUATE, {"manifest.json": "[]"}, "", "{it} has a damaged manifest.json"),
    (EVALUATE, {"manifest.json": {"num_images": "two"}}, "", "{it} has a damaged manifest.json"),
    (
        EVALUATE,
        {"manifest.json": {"prompts": 7}},
        "--metrics clip_score ^--features ^--reference",
        "{it} has a damaged manifest.json",
    ),
    (EVALUATE, {"manifest.json": {"num_images": 3}}, "", "--images {it} holds 2 of the 3 images of its manifest"),
    (EVALUATE, {"000001.png": 60}, "", "--images {it}", "000001.png cannot be read; repair or remove"),
    (EVALUATE, {"000001.png": None}, "", "--images {it} holds 1 of the 2 images of its manifest"),
]

# Scripts, flags, and what the line says.
CASES = [
    # empty strings
    (ALL, "--resume_from_checkpoint ''"),
    (ALL, "--student ''"),
    (ALL, "--output_dir ''"),
    (ALL, "--pretrained_teacher_model ''"),
    (ALL, "--train_data_dir ''"),
    (UNET, "--dataset_name '' ^--train_data_dir"),
    (SD, "--image_column ''"),
    (DIT, "--cache_dir ''"),
    (SD3, "--variant ''"),
    (UNET, "--teacher_revision ''"),
    (SD, "--hub_model_id ''"),
    (DIT, "--report_to ''"),
    (SD3, "--caption_column ''"),
    (DIT, "--label_column ''"),
    (DIT, "--vae ''"),
    (DIT, "--validation_classes ''"),
    (DEEP, "^--student --keep_blocks ''"),
    (GENERATE, "--model ''"),
    (GENERATE, "--model {dit} --classes ''"),
    (EVALUATE, "--reference ''"),
    (EVALUATE, "--clip_model ''"),
    (REPORT, "--teacher ''"),
    (REPORT, "--students ''"),
    (REPORT, "--names ''"),
    (ALL, "--license 'Apache 2.0'", "--license Apache 2.0 is no licence's id on the Hub; pass one such as"),
    (SD, "--license ''"),
    (ALL, "--num_processes 4", "--num_processes 4 is for --dry_run", "drop it, and pass it to the launcher"),
    (ALL, "--num_processes 0 --dry_run", "--num_processes 0 is out of range", "pass at least 1"),
    (ALL, "--num_train_epochs 2 --dry_run", "--num_train_epochs 2.0 with --dry_run", "pass --max_train_steps"),
    # which student
    ((UNET, SD3), "--student nan", "unknown"),
    (ALL, "--student tiny", "--student tiny is unknown; pass ", ".json file"),
    ((UNET, DIT), "--student 2", "unknown"),
    ((SD, DIT), "--student missing.json", "cannot be read"),
    (UNET, "--student {binary_json}", "cannot be read"),
    (SD, "--student {deep_json}", "cannot be read"),
    (DIT, "--student {folder_json}", "cannot be read"),
    (SD3, "--student {digits}", "unknown"),
    (UNET, "--student 0", "unknown"),
    (UNET, "--student 1e-9"),
    (UNET, "--student 1.5", "unknown; pass pruned_30"),
    (UNET, "--student -0.5", "unknown"),
    (UNET, "--student inf", "unknown"),
    (SD, "--student bk_huge", "unknown; pass bk_base"),
    (SD, "--pretrained_teacher_model {two_levels} --student bk_tiny", "bk_tiny does not fit the teacher of 2 levels"),
    (SD, "--pretrained_teacher_model {two_levels} --student bk_extreme", "bk_extreme does not fit the teacher"),
    (SD, "--pretrained_teacher_model {one_layer}", "--student bk_base does not fit the teacher: the teacher has no"),
    (DIT, "--student d14", "--student d14: the teacher has 8 blocks; keep 1 to 8"),
    (DIT, "--student tiny", "pass d19, d14, d7, d4, or a .json file"),
    (SD3, "--student tiny", "pass whole, half, third, sixth, or a .json file"),
    (DIT, "--student d4 --keep_blocks 1,2", "--student d4 and --keep_blocks 1,2"),
    (DIT, "^--student", "--student, --keep_blocks and --student_depth", "nothing says which blocks"),
    (SD3, "--student half --keep_blocks 0,5", "--student half and --keep_blocks 0,5 both say which blocks"),
    (SD3, "^--student --student_depth 2 --keep_blocks 0,5", "--keep_blocks 0,5 and --student_depth 2 both say"),
    (DEEP, "^--student --keep_blocks 2,0", "does not ascend"),
    (DEEP, "^--student --keep_blocks 0,0", "pass each block once"),
    (DEEP, "^--student --keep_blocks=-1,5", "--keep_blocks -1,5: there is no block -1"),
    (DEEP, "^--student --keep_blocks one", "is no list of blocks"),
    (SD3, "^--student --keep_blocks 0,", "is no list of blocks"),
    (SD3, "^--student --keep_blocks 0,x", "is no list of blocks"),
    (DIT, "^--student --keep_blocks 1.5", "is no list of blocks"),
    (DIT, "^--student --keep_blocks 0,8", "there is no block 8; pass some of 0 to 7"),
    (SD3, "^--student --keep_blocks 0,6", "there is no block 6; pass some of 0 to 5"),
    (SD3, "^--student --keep_blocks 0,0,5", "pass each block once"),
    (SD3, "^--student --keep_blocks 3,0,5", "ascend"),
    (SD3, "^--student --keep_blocks 0,3", "the student's last block must be the teacher's last, 5"),
    (DEEP, "^--student --student_depth 0"),
    (DEEP, "^--student --student_depth -1"),
    (DIT, "^--student --student_depth 9", "--student_depth 9: the teacher has 8 blocks; keep 1 to 8"),
    (SD3, "^--student --student_depth 7", "--student_depth 7 is not possible; pass 1 to the teacher's 6"),
    (UNET, "^--pretrained_teacher_model", "--kd_loss place needs a teacher"),
    (UNET, "^--pretrained_teacher_model --kd_loss none", "--student 0.5", "without one, pass a JSON file"),
    (UNET, "^--pretrained_teacher_model --kd_loss none --student {list_json}", "--student {list_json}", "object"),
    (UNET, "^--pretrained_teacher_model --kd_loss none --student {nothing_json}", "--resolution is not given"),
    (DIT, "^--pretrained_teacher_model --kd_loss none --student x.json", "--vae is not given and there is no teacher"),
    (DIT, "^--pretrained_teacher_model --kd_loss none --student x.json --vae none", "--student x.json cannot be read"),
    # flags that do not go together, or with this machine
    (ALL, "--mixed_precision fp16", "GPU"),
    (ALL, "--enable_xformers_memory_efficient_attention", "needs a CUDA device"),
    (ALL, "--report_to nosuch", "--report_to nosuch is no tracker; pass aim, comet_ml"),
    ((UNET, SD), "--report_to aim.b", "--report_to aim.b is no tracker; pass"),
    (DIT, "--report_to trackio", "--report_to trackio is not installed; pip install trackio"),
    (ALL, "--hub_model_id me/student", "--hub_model_id me/student without --push_to_hub uploads nothing; add it"),
    (UNET, "--pretrained_teacher_model {pixel} --student 0.1", "its width leaves 4 channels to attention heads of 8"),
    ((UNET, SD3), "--push_to_hub --hub_model_id me/student", "--push_to_hub", "me/student"),
    (DIT, "--push_to_hub --hub_model_id a/b/c", "a/b/c"),
    (WEIGHTED, "--kd_loss none --lambda_task 0", "--lambda_task 0", "--kd_loss none"),
    (WEIGHTED, "--lambda_task 0 --lambda_kd_output 0 --lambda_kd_feat 0", "--lambda_task 0", "learn"),
    (DIT, "--vae none --cache_latents", "--cache_latents has nothing to do with --vae none"),
    (DIT, "--vae none", "--vae none makes 4 channels"),
    ((DIT, XL), "--vae /no/such/vae", "does not load"),
    ((DIT, XL), "--vae {empty}", "does not load"),
    ((DIT, XL), "--vae {pixel}/unet", "does not load"),
    (DIT, "--validation_classes unicorn", "is no class"),
    (DIT, "--validation_classes 1000", "is no class"),
    (CAPTIONED, "--lora_rank 2 --student_init random", "--lora_rank 2 trains adapters alone", "tensors are random"),
    (UNET, "--pretrained_teacher_model {ldm}", "has a vqvae beside its UNet2DModel; pass a model of pixels"),
    (UNET, "--pretrained_teacher_model {scaled}", "--student_init can prune models", "that is added, not scaled by"),
    (UNET, "--pretrained_teacher_model {scaled} --dry_run", "can prune models", "pass --student_init random"),
    (
        SD,
        "--pretrained_teacher_model {scaled_sd} --student width_160",
        "can prune models",
        "pass --student_init random",
    ),
    (XL, "--pretrained_teacher_model {scaled_sdxl} --student width_80", "can prune models", "--student_init random"),
    (SD, "--lora_rank 2 --student {shallow_json}", "--lora_rank 2 trains adapters alone", "tensors are random"),
    (SD3, "--share_backbone", "--share_backbone needs --lora_rank"),
    (SD3, "--share_backbone --lora_rank 2 --kd_loss none", "--share_backbone needs a --kd_loss with a teacher"),
    (SD3, "--share_backbone --lora_rank 2 --student_init random", "--share_backbone needs --student_init teacher"),
    (SD3, "--share_backbone --lora_rank 2 --student {features_json}", "--share_backbone", "not a JSON file"),
    (UNET, "--resolution 15", "--resolution 15", "is not divisible by the U-Net's downsampling; pass a multiple of 2"),
    (SD, "--resolution 24", "--resolution 24 is not divisible by VAE and U-Net; pass a multiple of 32"),
    (XL, "--resolution 20", "--resolution 20 is not divisible by VAE and U-Net; pass a multiple of"),
    (XL, "--student koala", "--student koala is unknown; pass ssd_1b, vega"),
    (XL, "--pretrained_teacher_model {sd}", "is a StableDiffusionPipeline with no text_encoder_2; pass"),
    (XL, "--pretrained_teacher_model {one_safetensors}", "diffusers.StableDiffusionXLPipeline.from_single_file("),
    (XL, "--snr_gamma 0", "--snr_gamma 0.0 is out of range"),
    (UNET, "--kd_loss mse --kd_weighting fine_only", "--kd_weighting fine_only has no effect with --kd_loss mse"),
    (UNET, "--kd_loss lift --group_by position", "--group_by position has no effect with --kd_loss lift; drop it"),
    (XL, "--aspect_ratio_buckets 16,72", "--aspect_ratio_buckets"),
    (XL, "--aspect_ratio_buckets 96,96;32,32", "the bucket 96,96 has not about the area of --resolution 32; pass"),
    (SD, "--resolution 2", "--resolution 2 is not divisible by VAE and U-Net; pass a multiple of 32"),
    (SD3, "--resolution 20", "--resolution 20 is not divisible by VAE and patches; pass a multiple of 8"),
    (SD3, "--resolution 128", "more patches than the teacher's 8; pass 64 at most"),
    (UNET, "--group_size 24", "--group_size 24", "does not divide the 256 elements"),
    (LATENT, "--group_size 24", "--group_size 24", "does not divide the 64 elements"),
    # prompts
    (CAPTIONED, "--validation_prompts none.txt", "--validation_prompts none.txt is no file; pass a text file"),
    (SD, "--validation_prompts {folder_txt}", "--validation_prompts {folder_txt} is no file"),
    (SD3, "--validation_prompts bag {blank_txt}", "--validation_prompts {blank_txt} is empty; put a prompt on"),
    (SD, "--validation_prompts {binary_txt}", "--validation_prompts {binary_txt} cannot be read: 'utf-8' codec"),
    # teachers
    (ALL, "--pretrained_teacher_model /no/such/teacher", "is no folder; pass a"),
    ((UNET, SD3), "--pretrained_teacher_model {empty}", "does not load"),
    ((UNET, SD), "--pretrained_teacher_model {digits}", "does not load"),
    ((UNET, DIT), "--pretrained_teacher_model {file}", "is a single file and no folder; pass a"),
    (SD, "--pretrained_teacher_model {one_safetensors}", "diffusers.StableDiffusionPipeline.from_single_file("),
    (SD3, "--pretrained_teacher_model {one_safetensors}", "diffusers.StableDiffusion3Pipeline.from_single_file("),
    ((SD, DIT), "--pretrained_teacher_model nobody/nothing", "does not load"),
    (UNET, "--pretrained_teacher_model nobody", "does not load"),
    (SD3, "--pretrained_teacher_model a/b/c/d", "is no folder"),
    (UNET, "--variant nosuch", "--pretrained_teacher_model {teacher} does not load", "variant=nosuch"),
    (LATENT, "--variant nosuch", "--pretrained_teacher_model {teacher} does not load", ".nosuch.safetensors"),
    (UNET, "--pretrained_teacher_model {sd}", "UNet2DModel"),
    (SD, "--pretrained_teacher_model {pixel}", "is a DDPMPipeline with UNet2DModel unet; pass a Stable Diffusion"),
    (DIT, "--pretrained_teacher_model {pixel}", "is a DDPMPipeline"),
    (SD3, "--pretrained_teacher_model {sd}", "is a StableDiffusionPipeline with"),
    (UNET, "--pretrained_teacher_model {learned_variance}", "maps 1 channels to 2"),
    (UNET, "--pretrained_teacher_model {two_channels}", "maps 2 channels to 2"),
    (UNET, "--pretrained_teacher_model {conditional}", "class-conditional"),
    (SD, "--pretrained_teacher_model {inpainting}", "its U-Net maps 9 channels to 4"),
    (SD, "--pretrained_teacher_model {upscaler}", "its U-Net has num_class_embeds"),
    (SD, "--pretrained_teacher_model {few_steps}", "its U-Net has time_cond_proj_dim, so it is for"),
    (XL, "--pretrained_teacher_model {few_steps_xl}", "its U-Net has time_cond_proj_dim; pass"),
    (DIT, "--pretrained_teacher_model {triple}", "4 channels become 12"),
    # data
    (ALL, "^--train_data_dir", "--dataset_name or --train_data_dir", "pass one of them"),
    (ALL, "--dataset_name some/set", "--dataset_name", "--train_data_dir", "pass one of them"),
    ((UNET, SD), "--dataset_name nobody/nothing ^--train_data_dir", "does not load"),
    (ALL, "--train_data_dir /no/such/images", "is no folder"),
    (DIT, "--train_data_dir {file}", "is no folder"),
    (ALL, "--train_data_dir {empty}", "is empty"),
    (ALL, "--train_data_dir {words}", "holds no images; pass a folder of images"),
    ((UNET, SD), "--train_data_dir {packed}", "holds no images; unpack what is in it"),
    ((UNET, DIT), "--train_data_dir {sharded}", "holds no images; add --streaming"),
    (SD3, "--train_data_dir {parquet}", "holds no images; pass the folder of its .parquet files as --dataset_name"),
    ((UNET, XL), "--train_data_dir {phone}", "holds no images but 2 .heic and 1 .avif files; convert them to JPEG"),
    (UNET, "--train_data_dir {broken}", "3 of 3 images cannot be read", "repair or remove"),
    (ALL, "--image_column picture", "--image_column picture is not in the data; choose one of"),
    (CAPTIONED, "--image_column text", "6 of 6 images cannot be read", "--train_data_dir {data}"),
    (CAPTIONED, "--caption_column prompt", "--caption_column prompt is not in the data; choose one of image, text"),
    (CAPTIONED, "--caption_column image", "pass a column of strings"),
    (ALL, "--train_batch_size 7", "--train_batch_size 7 is more than the 6 images"),
    ((DIT, SD3), "--max_train_samples 1", "--train_batch_size 2 is more than the 1 images"),
    ((UNET, SD), "--cache_dir {file}", "--cache_dir {file}"),
    ((UNET, DIT), "--cache_dir {file}/cache", "--cache_dir {file}/cache cannot be written to"),
    (SD3, "--cache_latents --cache_dir {file}", "--cache_dir {file}"),
    (DIT, "--train_data_dir {captioned}", "--label_column label is not in the data"),
    (DIT, "--train_data_dir {digits}", "--label_column label is not in the data", "of each class into a sub-folder"),
    (DIT, "--train_data_dir {strings} --label_column kind", "--label_column kind holds Value('string')"),
    (DIT, "--train_data_dir {numbers} --label_column kind", "the first 1000 in row 1; correct them"),
    (DIT, "--train_data_dir {numbers} --label_column gap", "1 of 6 labels are none of the model's 0 to 999"),
    # the output folder
    ((UNET, SD3), "--output_dir {file}", "cannot be written to"),
    (ALL, "--output_dir {file}/student", "cannot be written to"),
    (ALL, "--output_dir {held}", "is in use"),
    ((UNET, SD), f"--output_dir {{held}} {LATEST}", "is in use"),
    ((UNET, SD3), f"{RESUME} {{empty}}", "incomplete"),
    ((SD, DIT), f"{RESUME} {{file}}", "is no folder"),
    # generate.py
    (GENERATE, "--model {empty}", "does not load"),
    (GENERATE, "--base {pixel}", "--base {pixel} is for a checkpoint-N folder", "drop it"),
    (GENERATE, "--model /nowhere", "is not a folder; pass a pipeline folder"),
    (GENERATE, "--model {file}"),
    (GENERATE, "--model nobody/nothing", "does not load"),
    (GENERATE, "--model {pixel}/unet", "does not load"),
    (GENERATE, "--model {sd}", "--prompt_file is missing"),
    (GENERATE, "--model {sd} --prompt_file {gap}", "has no prompt on line 2"),
    (GENERATE, "--model {sd} --prompt_file {file}", "is empty"),
    (GENERATE, "--model {sd} --prompt_file none.txt", "cannot be read"),
    (GENERATE, "--model {sd} --prompt_file {binary}", "cannot be read"),
    (GENERATE, "--model {sd} --prompt_file {empty}", "cannot be read"),
    (GENERATE, "--model {sd} --prompt_file {prompts} --resolution 30", "does not fit the VAE; pass a multiple of 8"),
    (GENERATE, "--model {sd} --prompt_file {prompts} --classes 1", "does not fit", "takes prompts"),
    (GENERATE, "--model {sd} --prompt_file {prompts} --max_sequence_length 8", "is for Stable Diffusion 3"),
    (GENERATE, "--model {sd3} --prompt_file {prompts} --sampler ddim", "--sampler ddim is not for flow matching"),
    (GENERATE, "--model {sd3} --prompt_file {prompts} --resolution 128", "--resolution 128"),
    (GENERATE, "--model {dit} --classes 1000", "--classes 1000 is no class"),
    (GENERATE, "--model {dit} --classes cat", "--classes cat is no class"),
    (GENERATE, "--model {dit} --classes=-1", "--classes -1 is no class"),
    (GENERATE, "--guidance_scale 2", "--guidance_scale 2.0 is for prompts and classes"),
    (GENERATE, "--resolution 32", "--resolution 32 is for text-to-image"),
    (GENERATE, "--prompt_file {prompts}", "is unconditional; drop the flag"),
    (GENERATE, "--classes 1", "--classes 1", "is unconditional; drop the flag"),
    (GENERATE, "--model {pixart}", "--prompt_file is missing"),
    (GENERATE, "--model {pixart} --vae_dtype float16", "--vae_dtype float16 is not --dtype float32"),
    (REPORT, "--teacher {pixart} --prompt_file {prompts}", "is a PixArtSigmaPipeline; the report takes", "pass one"),
    (GENERATE, "--variant nosuch", "--model {teacher} does not load"),
    (GENERATE, "--output_dir {file}", "cannot be written to"),
    (GENERATE, "--output_dir {file}/images", "cannot be written to"),
    (GENERATE, "--output_dir {digits}", "holds images of another origin"),
    # evaluate.py
    (EVALUATE, "--images {empty}", "holds no images"),
    (EVALUATE, "--images nowhere", "is not a folder"),
    (EVALUATE, "--images {file}", "is not a folder"),
    (EVALUATE, "--images {mixed}", "mixes sizes, 12x12 and 20x20", "wide.png"),
    (EVALUATE, "--reference {mixed}", "mixes sizes", "pass --reference_resolution"),
    (EVALUATE, "--reference {broken}", "cannot be read; repair or remove"),
    (EVALUATE, "--reference {empty}", "holds no images"),
    (EVALUATE, "--reference {single}", "holds 1 image; pass at least 2"),
    (EVALUATE, "--images {few_broken}", "bad.png cannot be read; repair or remove"),
    (EVALUATE, "--images {single}", "holds 1 image; pass at least 2, and for FID more than 12"),
    (EVALUATE, "--images {unfinished}", "holds 6 of the 7 images of its manifest"),
    (EVALUATE, "--images {dark} {dark}", "is passed twice"),
    (EVALUATE, "--images {large}", "is 16x16 and the reference 12x12; pass --features_size"),
    (EVALUATE, "--reference no/such", "--reference no/such is not a folder, and does not load as a dataset"),
    (EVALUATE, "--reference {file}", "--reference {file}"),
    (EVALUATE, "--reference no.npz", "cannot be read"),
    (EVALUATE, "--reference {array_npz}", "cannot be read"),
    (EVALUATE, "--reference {torn_npz}", "cannot be read"),
    (EVALUATE, "--reference {flat_npz}", "cannot be read"),
    (EVALUATE, "--reference {keyed_npz}", "cannot be read"),
    (EVALUATE, "--reference {partly_npz}", "holds features of another network"),
    (EVALUATE, "--reference {other_npz}", "has 5 features, and the network 12"),
    (EVALUATE, "--reference clean-fid:cifar10", "is not clean-fid:NAME:RESOLUTION:SPLIT; pass"),
    (EVALUATE, "--reference clean-fid:cifar10:32:train", "holds features by Inception, not by", "drop --features"),
    (EVALUATE, "--metrics fid cmmd --reference {other_npz}", "holds features of one network, and --metrics cmmd fid"),
    (EVALUATE, "--features nowhere.pt", "does not load"),
    (EVALUATE, "--features {binary}", "does not load"),
    (EVALUATE, "--features {empty}", "does not load"),
    (EVALUATE, "--features {identity_pt}", "returns (20, 3, 12, 12) for 20 images"),
    (EVALUATE, "^--features --features_size 8", "--features_size 8 is for --features"),
    (EVALUATE, "--reference_filter bicubic", "--reference_filter bicubic is for --reference_resolution; pass that"),
    (EVALUATE, "^--features --reference clean-fid:cifar10:32:train --reference_resolution 16", "is for images, not"),
    (EVALUATE, "^--features --inception {file}", "--inception {file} does not load"),
    (EVALUATE, "^--features --inception {pool}", "must have the name inception-2015-12-05.pt"),
    (EVALUATE, f"{ALONE} --metrics clip_score pickscore", "--metrics clip_score pickscore needs prompts"),
    (EVALUATE, ALONE + " --images {prompted} --metrics clip_score --clip_model {empty}", "{empty} does not load"),
    (EVALUATE, ALONE + " --images {prompted} --metrics pickscore --pickscore_model no/no", "no/no does not load"),
    (EVALUATE, "--clip_model {empty}", "--clip_model {empty} is for --metrics clip_score; add"),
    (EVALUATE, "--metrics cmmd", "--features", "is for --metrics fid kid inception_score precision recall; add"),
    (EVALUATE, "--metrics fid fd_dinov2 --dinov2_model {empty}", "--dinov2_model {empty} does not load"),
    (EVALUATE, "--metrics fid fd_dinov2 --dinov2_model {sd}/text_encoder", "a model of type clip_text_model; pass"),
    (EVALUATE, "--metrics fid cmmd --cmmd_model nobody/nothing", "--cmmd_model nobody/nothing does not load"),
    (EVALUATE, "--metrics fid cmmd --cmmd_model {dit}", "--cmmd_model {dit} does not load"),
    (EVALUATE, "^--reference", "--metrics fid kid precision recall compare with real images; pass them as"),
    (EVALUATE, "--metrics inception_score", "--reference", "is not used by --metrics inception_score; drop it"),
    (EVALUATE, "--output {file}/results", "cannot be written to"),
    (EVALUATE, "--statistics_dir {file}", "cannot be written to"),
    # report.py
    (REPORT, "--teacher {empty}", "does not load"),
    (REPORT, "--teacher /nowhere", "is not a folder"),
    (REPORT, "--students {empty}", "does not load"),
    (REPORT, "--students {dit}", "--students {dit} is a DiTPipeline, unlike the teacher; pass models of one kind"),
    (REPORT, "--students {pixel} {pixel} --names one", "--names one: pass one for each of --students"),
    (REPORT, "--students {pixel} {pixel} --names one one", "--names one one: pass one for each of --students"),
    (REPORT, "--names teacher", "all different and none 'teacher'"),
    (REPORT, "--runs {empty}", "has no metrics.jsonl with a row"),
    (REPORT, "--runs {rowless}", "has no metrics.jsonl with a row"),
    (REPORT, "--runs {torn_rows}", "metrics.jsonl"),
    (REPORT, "--runs {listed_rows}", "metrics.jsonl"),
    (REPORT, "--runs {stepless_rows}", "metrics.jsonl"),
    (REPORT, "--runs {wordy_rows}", "metrics.jsonl"),
    (REPORT, "--group_size 7", "--group_size 7", "does not divide the 256 elements"),
    (REPORT, "--results none.json", "cannot be read"),
    (REPORT, "--results {list_json}", "cannot be read"),
    (REPORT, "--results {bare_json}", "cannot be read"),
    (REPORT, "--results {strange_json}", "cannot be read"),
    (REPORT, "--results {binary_json}", "cannot be read"),
    (REPORT, "--results {deep_json}", "cannot be read"),
    (REPORT, "--results {others_json}", "has no row of these models"),
    (REPORT, "--images {empty}", "holds no images"),
    (REPORT, "--images {broken}", "cannot be read; repair or remove"),
    (REPORT, "--guidance_scale 2", "--guidance_scale 2.0 is for prompts and classes"),
    (REPORT, "--teacher {sd}", "--prompt_file is missing"),
    (REPORT, "--output_dir {file}", "cannot be written to"),
    (REPORT, "--output_dir {file}/report", "cannot be written to"),
]


class Case(NamedTuple):
    script: str
    flags: str
    says: tuple[str, ...]
    it: Copy | str | bytes | list | dict | None = None  # what {it} stands for: a copy, or the content of a JSON file

    def __str__(self) -> str:
        """The same in every process, as xdist needs it."""
        changes = self.it.changes if isinstance(self.it, Copy) else {"": self.it or ""}
        parts = (f"{name} {how.__name__ if callable(how) else how}".strip() for name, how in changes.items())
        return " ".join([self.script, self.flags, *parts])[:120]


def each(scripts: str | tuple[str, ...]) -> tuple[str, ...]:
    return (scripts,) if isinstance(scripts, str) else scripts


def list_cases() -> list[Case]:
    """All tables as one."""
    cases = []
    for scripts, flag, values, says in NUMBERS:
        scripts, values = each(scripts), values.split()
        for turn in range(max(len(scripts), len(values))):
            flags = f"--{flag} {values[turn % len(values)]}"
            cases.append(Case(scripts[turn % len(scripts)], flags, ("is out of range", says)))
    for scripts, recipe, *says in STUDENTS:
        flags = "--student {it} --lambda_kd_feat 1"
        cases += [Case(script, flags, (*says,), recipe) for script in each(scripts)]
    for scripts, changes, flags, *says in DAMAGED_TEACHERS:
        for script in each(scripts):
            cases.append(Case(script, f"{MODEL_FLAGS[script]} {{it}} {flags}", (*says,), Copy("teacher", changes)))
    for scripts, changes, flags, *says in DAMAGED_DATA:
        for script in each(scripts):
            cases.append(Case(script, f"--train_data_dir {{it}} {flags}", (*says,), Copy("data", changes)))
    for scripts, changes, flags, *says in DAMAGED_RUNS:
        for script in each(scripts):
            cases.append(Case(script, f"--output_dir {{it}} {flags}", (*says,), Copy("run", changes)))
    for script, changes, flags, *says in DAMAGED_IMAGES:
        flag = "--output_dir" if script == GENERATE else "--images"
        cases.append(Case(script, f"{flag} {{it}} {flags}", (*says,), Copy("generated", changes)))
    for scripts, flags, *says in CASES:
        cases += [Case(script, flags, (*says,)) for script in each(scripts)]
    return cases


# ------------------------------------------------------------------------------------------------------------ the runs


class Inputs:
    """The inputs of a script by name, each made when a case first asks for it."""

    def __init__(self, laboratory: "Laboratory", script: str, it: Any = None):
        self.laboratory, self.script, self.it = laboratory, script, it

    def __getitem__(self, name: str) -> Path:
        if name == "it":
            return self.laboratory.make(self.script, self.it)
        if name == "scratch":
            return self.laboratory.scratch
        return self.laboratory.input(self.script, name)


class Laboratory:
    """Runs commands in processes forked from one that has imported the scripts, on inputs that it makes."""

    def __init__(self, folder: Path):
        self.root, self.scratch = folder / "inputs", folder / "scratch"
        self.root.mkdir()
        self.scratch.mkdir()
        self.output = self.scratch / "output.txt"
        self.context = make_fork_server()
        self.locks, self.sums = [], {}

    def run(self, script: str, command: list[str], cwd: Path, limit: int = 60) -> tuple[int, str]:
        """The exit code of a command, and what it printed. It must end within so many seconds."""
        process = start_run(self.context, script, command, self.output, cwd)
        process.join(limit)
        text = self.output.read_text()
        if process.exitcode is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.join()
            pytest.fail(f"{script} {shlex.join(command)} does not end:\n{text}")
        return process.exitcode, text

    def command(self, script: str, flags: str, it: Any = None) -> list[str]:
        """The base command of a script with other flags."""
        inputs, given = Inputs(self, script, it), {}
        for part in shlex.split(f"{BASE[script]} {flags}".format_map(inputs)):
            if part.startswith("^--"):
                given.pop(part[1:], None)
            elif part.startswith("--"):
                given.pop(part, None)
                values = given.setdefault(part, [])
            else:
                values.append(part)
        return [part for flag, values in given.items() for part in (flag, *values)]

    def input(self, script: str, name: str) -> Path:
        """The path of a prepared input. Three of them a script has of its own kind."""
        name = {"teacher": TEACHERS, "data": DATA}.get(name, {}).get(script, name)
        if name in ("run", "held"):
            return self.earlier_run(script, name)
        if name == "generated":
            return self.earlier_run(GENERATE, "run")
        path = self.root / re.sub(r"_(json|npz|pt|txt|safetensors)$", r".\1", name)
        if not path.exists():
            content = INPUTS[name]
            if callable(content):
                content(path)
            elif isinstance(content, dict) and path.suffix != ".json":
                write_tree(content, path)
            else:
                write(path, content)
        return path

    def earlier_run(self, script: str, name: str) -> Path:
        """What the script's base command leaves; in "held", another process goes on with it."""
        path = self.root / f"{name}-{script}"
        if path.exists():
            return path
        if name == "held":
            shutil.copytree(self.earlier_run(script, "run"), path)
            self.locks.append((path / ".lock").open("a"))
            fcntl.lockf(self.locks[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
            return path
        code, text = self.run(script, self.command(script, f"--output_dir {path}"), self.scratch, limit=300)
        assert code == 0, text
        return path

    def make(self, script: str, it: Any) -> Path:
        """The path of a changed copy, or of a file of JSON."""
        path = self.root / f"{script}-{hashlib.sha256(repr(it).encode()).hexdigest()[:8]}"
        if not isinstance(it, Copy):
            path = path.with_suffix(".json")
        if path.exists():
            return path
        if not isinstance(it, Copy):
            write(path, it)
            return path
        shutil.copytree(self.input(script, it.source), path)
        for name, how in it.changes.items():
            change(path / name.format(part=PARTS.get(script)), how)
        return path

    def listing(self, *folders: Path) -> dict[str, tuple]:
        """All files under the folders, with sizes and SHA-256 sums, but locks. Only what has changed is read again."""
        found = {}
        for folder in folders:
            for place, names, files in os.walk(folder):
                found |= {os.path.join(place, name): () for name in names}
                for path in (os.path.join(place, name) for name in files if name != ".lock"):
                    state = os.lstat(path)
                    key = path, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns
                    if key not in self.sums:
                        self.sums[key] = hashlib.sha256(Path(path).read_bytes()).hexdigest()
                    found[path] = state.st_size, self.sums[key]
        return found


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("malformed")
    with pytest.MonkeyPatch.context() as patch:  # the server takes its environment with it
        for name, value in {"OMP_NUM_THREADS": "1", "HF_HOME": folder / "home", "TORCH_HOME": folder / "home"}.items():
            patch.setenv(name, str(value))
        yield Laboratory(folder)


def names_a_flag(line: str, command: list[str], flags: list[str]) -> bool:
    """Whether the line names one of the flags, with a value that the command gives it where it takes any."""
    values: dict[str, list[str]] = {}
    for part in command:
        if part.startswith("--"):
            given = values.setdefault(part, [])
        else:
            given.append(part or '""')
            with suppress(ValueError):
                given.append(str(float(part)))
    return any(f"{flag} {value}".strip() in line for flag in flags for value in values.get(flag) or [""])


@pytest.mark.parametrize("script", BASE)
def test_the_base_command_succeeds(laboratory, script, tmp_path):
    """So that each case fails for what is wrong with it."""
    code, text = laboratory.run(script, laboratory.command(script, ""), tmp_path, limit=300)
    assert code == 0, text
    assert "error: " not in text and "Traceback" not in text


@pytest.mark.parametrize("case", list_cases(), ids=str)
def test_one_line_and_no_file_changed(laboratory, case, tmp_path):
    command = laboratory.command(case.script, case.flags, case.it)
    inputs = Inputs(laboratory, case.script, case.it)
    says = [piece.format_map(inputs) for piece in case.says]
    before = laboratory.listing(laboratory.root, tmp_path)
    code, text = laboratory.run(case.script, command, tmp_path)
    assert "Traceback" not in text, text
    line = text.splitlines()[-1] if text else ""
    assert code == 1 and line.startswith("error: "), text
    assert all(piece in line for piece in says), line
    flags = re.findall(r"--\w+", " ".join([*case.says, re.sub(r"\^--\w+", "", case.flags)]))
    assert names_a_flag(line, command, flags) or any(piece.startswith("--") for piece in case.says), line
    assert REMEDIES.search(line), line
    assert laboratory.listing(laboratory.root, tmp_path) == before


@pytest.mark.parametrize(
    "case",
    [Case(script, flags, (says,)) for scripts, flags, says in USAGE for script in each(scripts)],
    ids=str,
)
def test_argparse_says_what_it_expects(laboratory, case, tmp_path):
    code, text = laboratory.run(case.script, laboratory.command(case.script, case.flags), tmp_path)
    line = text.splitlines()[-1]
    assert code == 2 and line.startswith(f"{case.script}.py: error: ") and case.says[0] in line, text
    assert "Traceback" not in text and not list(tmp_path.iterdir())
