"""Every training command of README.md and docs/ is one that runs: as a dry run, on teachers of the full size."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from diffusers import (
    AutoencoderKL,
    DDPMPipeline,
    DDPMScheduler,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
)
from test_dit import FULL as DIT_XL
from test_sd3 import MEDIUM
from test_sd21 import SD21
from transformers import CLIPTextConfig, T5Config

from tiny_models import TINY_UNET


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FILES = {  # that the commands name; the pages say what they hold
    "student.json": {"config": {"layers_per_block": 1}},
    "teacher.json": {"config": TINY_UNET},
}
T5_XXL = {"d_model": 4096, "num_layers": 24, "num_heads": 64, "d_ff": 10240, "feed_forward_proj": "gated-gelu"}
NEEDS_CUDA = {"--enable_xformers_memory_efficient_attention"}


def training_commands() -> list[tuple[str, str]]:
    """Page and command, from the script's name on, with continued lines joined."""
    found = []
    for page in PAGES:
        text = page.read_text().replace("\\\n", " ")
        found += [(page.name, match) for match in re.findall(r"train_lift_(?:unet|sd21|dit|sd3)\.py --[^\n`]*", text)]
    return list(dict.fromkeys(found))


def save_skeleton(folder: Path, pipeline: str, parts: dict[str, tuple[str, object]]) -> Path:
    """A pipeline folder with the configs of its parts and no weights, which is all that a dry run reads."""
    index = {"_class_name": pipeline, "_diffusers_version": "0.42.1"}
    for name, (library, part) in parts.items():
        index[name] = [library, type(part).__name__.replace("Config", "")]
        (part.save_config if library == "diffusers" else part.save_pretrained)(folder / name)
    text_models = {"CLIPText": "CLIPTextModelWithProjection" if "3" in pipeline else "CLIPTextModel"}
    text_models["T5"] = "T5EncoderModel"
    for value in index.values():
        if isinstance(value, list):
            value[1] = text_models.get(value[1], value[1])
    for name in [name for name in parts if name.startswith("text_encoder")]:
        index[name.replace("text_encoder", "tokenizer")] = ["transformers", "PreTrainedTokenizerFast"]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="module")
def teachers(tmp_path_factory) -> dict[str, Path]:
    """SD 2.1-base, DiT-XL/2 and SD3-medium without weights; a small DDPM with random ones, which its script reads."""
    folder = tmp_path_factory.mktemp("full-size")

    def vae(channels: int) -> AutoencoderKL:
        blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
        return AutoencoderKL(block_out_channels=[128, 256, 512, 512], latent_channels=channels, **blocks)

    blocks = {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}
    ddpm = UNet2DModel(sample_size=32, block_out_channels=[64, 128], **blocks)
    DDPMPipeline(ddpm, DDPMScheduler()).save_pretrained(folder / "ddpm")
    with torch.device("meta"):
        unet = ("diffusers", UNet2DConditionModel(**SD21))
        dit = ("diffusers", DiTTransformer2DModel(**DIT_XL))
        mmdit = ("diffusers", SD3Transformer2DModel(**MEDIUM))
        vae4, vae16 = ("diffusers", vae(4)), ("diffusers", vae(16))
    noise, flow = ("diffusers", DDPMScheduler()), ("diffusers", FlowMatchEulerDiscreteScheduler(shift=3.0))
    text = ("transformers", CLIPTextConfig(hidden_size=1024, num_hidden_layers=23, num_attention_heads=16))
    texts = {
        "text_encoder": ("transformers", CLIPTextConfig(hidden_size=768, projection_dim=768)),
        "text_encoder_2": ("transformers", CLIPTextConfig(hidden_size=1280, projection_dim=1280)),
        "text_encoder_3": ("transformers", T5Config(**T5_XXL)),
    }
    sd21 = {"unet": unet, "vae": vae4, "text_encoder": text, "scheduler": noise}
    sd3 = {"transformer": mmdit, "vae": vae16, **texts, "scheduler": flow}
    dit_parts = {"transformer": dit, "vae": vae4, "scheduler": noise}
    return {
        "train_lift_unet": folder / "ddpm",
        "train_lift_sd21": save_skeleton(folder / "sd21", "StableDiffusionPipeline", sd21),
        "train_lift_dit": save_skeleton(folder / "dit", "DiTPipeline", dit_parts),
        "train_lift_sd3": save_skeleton(folder / "sd3", "StableDiffusion3Pipeline", sd3),
    }


@pytest.mark.parametrize(("page", "command"), training_commands(), ids=lambda value: value[:60])
def test_a_documented_command_runs(run, teachers, tmp_path, monkeypatch, capsys, page, command):
    name, *flags = shlex.split(command)
    script = name.removesuffix(".py")
    flags = [flag for flag in flags if flag not in NEEDS_CUDA]
    if "none" not in flags:  # as in --kd_loss none
        flags += ["--pretrained_teacher_model", teachers[script]]
    monkeypatch.chdir(tmp_path)
    for file, content in FILES.items():
        Path(file).write_text(json.dumps(content))
    run(script, *flags, "--dry_run")
    text = capsys.readouterr().out
    assert re.search(r"student: [\d,]+ parameters, [\d,]+ MACs", text) and re.search(r"sum +[\d,.]+ MiB", text)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(FILES)  # a dry run leaves nothing behind


def test_the_pages_have_commands_of_every_script():
    scripts = {command.split(".py")[0] for _, command in training_commands()}
    assert scripts == {path.stem for path in ROOT.glob("train_lift_*.py")}
    assert any(page == "README.md" for page, _ in training_commands())
