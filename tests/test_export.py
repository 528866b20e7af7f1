"""export.py: single files come back bit-equal through Diffusers, and their layouts are those that programs open.

The programs' rules are written here again from their sources, which docs/export.md names, and read the files alone.
"""

import itertools
import json
import re
from pathlib import Path

from common.single_file import convert_pipeline
from common.students import public_config

import pytest
import torch
from conftest import ROOT
from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
from diffusers import StableDiffusionPipeline as SDPipeline
from diffusers import StableDiffusionXLPipeline as XLPipeline
from diffusers.loaders.single_file_utils import infer_diffusers_model_type
from safetensors import safe_open
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

import export
import tiny_models
from train_lift_sd21 import STUDENTS, student_config


NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
XL_BLOCKS = {
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "addition_embed_type": "text_time",
    "use_linear_projection": True,
}
LONE_MID = {"mid_block_type": "UNetMidBlock2D"}
THIN = {"layers_per_block": 1}
# The published U-Nets of these names, by their configs on the Hub.
XL = {
    "sdxl": {"transformer_layers_per_block": [1, 2, 10]},
    "ssd_1b": {
        "transformer_layers_per_block": [0, 2, 4],
        "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
        **LONE_MID,
    },
    "vega": {"transformer_layers_per_block": [1, 1, 2], **LONE_MID},
    "koala_700m": {"transformer_layers_per_block": [1, 2, 5], "mid_block_type": None, **THIN},
    "koala_1b": {"transformer_layers_per_block": [1, 2, 6], **THIN},
}
OWN_XL = {
    "koala_1b without its middle block": {**XL["koala_1b"], "mid_block_type": None},
    "no middle attention": {"transformer_layers_per_block": [1, 2, 4], **LONE_MID},
    "eight transformer blocks": {"transformer_layers_per_block": [1, 2, 8]},
}


# ------------------------------------------------------------------------------------------------ there and back again


def tiny_sd(folder: Path, student: str, act: str) -> Path:
    """A tiny pipeline with one of the script's students and a text encoder of OpenAI's CLIP or OpenCLIP."""
    tiny_models.save_sd_pipeline(folder)
    teacher = UNet2DConditionModel.load_config(folder, subfolder="unet")
    UNet2DConditionModel.from_config(student_config(teacher, STUDENTS[student])).save_pretrained(folder / "unet")
    config = CLIPTextConfig.from_pretrained(folder, subfolder="text_encoder", hidden_act=act)
    CLIPTextModel(config).save_pretrained(folder / "text_encoder")
    return folder


def tiny_xl(folder: Path, prediction: str = "epsilon", **unet) -> Path:
    """A tiny SDXL pipeline whose second text encoder is an OpenCLIP; `unet` overrides its U-Net's config."""
    tiny_models.save_sdxl_pipeline(folder, prediction, **unet)
    torch.manual_seed(0)
    config = CLIPTextConfig.from_pretrained(folder, subfolder="text_encoder_2", hidden_act="gelu")
    CLIPTextModelWithProjection(config).save_pretrained(folder / "text_encoder_2")
    return folder


def there_and_back(kind: type, folder: Path) -> tuple:
    """A pipeline, and what Diffusers reads from the single file by the pipeline's config."""
    pipeline = kind.from_pretrained(folder)
    file = folder / "student.safetensors"
    export.save_whole(convert_pipeline(pipeline, gaps=False), file, {})
    return pipeline, kind.from_single_file(file, config=str(folder), local_files_only=True)


def assert_the_same(pipeline, other) -> None:
    """All weights are equal, the VAE's encoder among them, and so is every bit of an image."""
    for name, part in pipeline.components.items():
        if isinstance(part, torch.nn.Module):
            ours, theirs = part.state_dict(), getattr(other, name).state_dict()
            assert ours.keys() == theirs.keys(), name
            assert all(torch.equal(ours[key], theirs[key]) for key in ours), name
            for parameter in (*part.parameters(), *getattr(other, name).parameters()):
                # Both are mapped files, and where in them a tensor begins, a kernel's last bits depend on.
                parameter.data = parameter.data.clone()
    images = []
    for each in (pipeline, other):
        each.set_progress_bar_config(disable=True)
        noise = torch.Generator().manual_seed(0)
        images.append(each("a dark bag", num_inference_steps=2, generator=noise, output_type="np").images)
    assert images[0].std() > 0 and (images[0] == images[1]).all()


@pytest.mark.parametrize("student", ["whole", "bk_base", "bk_small", "bk_tiny", "bk_extreme", "width_160"])
def test_an_sd_student_comes_back_bit_equal(tmp_path, student):
    act = "quick_gelu" if student in ("whole", "bk_small", "width_160") else "gelu"
    assert_the_same(*there_and_back(SDPipeline, tiny_sd(tmp_path, student, act)))


@pytest.mark.parametrize("student", XL)
def test_an_sdxl_student_comes_back_bit_equal(tmp_path, student):
    """With fewer transformer blocks, for the sake of time."""
    text = json.dumps(XL[student])
    unet = json.loads(re.sub(r"10|[456]", lambda number: "3" if number[0] == "10" else "2", text))
    assert_the_same(*there_and_back(XLPipeline, tiny_xl(tmp_path, **unet)))


def test_an_sdxl_that_predicts_velocity_says_so(tmp_path):
    pipeline, other = there_and_back(XLPipeline, tiny_xl(tmp_path, "v_prediction"))
    assert "v_pred" in convert_pipeline(pipeline, gaps=False)
    assert_the_same(pipeline, other)


def test_diffusers_own_converter_has_one_number_of_resnets(tmp_path):
    """Which ComfyUI counts by level: a file with other numbers is one for it, and not for `from_single_file`."""
    folder = tiny_models.save_sd_pipeline(tmp_path, layers_per_block=[1, 2, 1, 1])
    with pytest.raises(TypeError, match="list"):
        there_and_back(SDPipeline, folder)


def test_half_precision_but_the_vae_of_sdxl(tmp_path):
    for kind, folder in (
        (SDPipeline, tiny_sd(tmp_path / "sd", "bk_tiny", "gelu")),
        (XLPipeline, tiny_xl(tmp_path / "xl")),
    ):
        pipeline, whole = kind.from_pretrained(folder), kind is XLPipeline
        for dtype in (torch.float16, torch.bfloat16):
            for name, tensor in convert_pipeline(pipeline, False, dtype).items():
                kept = whole and dtype == torch.float16 and name.startswith("first_stage_model.")
                assert tensor.dtype == (torch.float32 if kept else dtype), name


# ----------------------------------------------------------------------------- the programs' rules, on the file alone

Shapes = dict[str, tuple[int, ...]]
UNET = "model.diffusion_model."


def places_in(shapes: Shapes) -> dict[str, str | int]:
    """What stands where in the file's U-Net: a convolution, a resnet, transformer blocks (their number), a sampler."""
    places = {}
    for name in shapes:
        found = re.match(rf"{re.escape(UNET)}((?:input|output)_blocks\.\d+\.\d+|middle_block\.\d+)\.(.+)", name)
        if found is None:
            continue
        place, inner = found.groups()
        if block := re.match(r"transformer_blocks\.(\d+)", inner):
            places[place] = max(places.get(place, 0), int(block[1]) + 1)
        elif inner.startswith(("in_layers", "op.", "conv.")):
            places[place] = {"i": "resnet", "o": "down", "c": "up"}[inner[0]]
        elif inner == "weight":
            places[place] = "convolution"
    return places


def build(counts: list[int], down: list[int], mid: int, up: list[int]) -> dict[str, str | int]:
    """What stands where in the original code's UNetModel (`openaimodel.py`, in ComfyUI's form, with depths as lists).

    Args:
        counts: Resnets of each level on the way down; there is one more on the way up.
        down: Transformer blocks behind each of them.
        mid: Transformer blocks of the middle block; -1 is a lone resnet, -2 no middle block.
        up: As `down`, from the lowest level on.
    """
    places, at, depths = {"input_blocks.0.0": "convolution"}, 1, iter(down)
    for level, count in enumerate(counts):
        for depth in itertools.islice(depths, count):
            places |= {f"input_blocks.{at}.0": "resnet"} | ({f"input_blocks.{at}.1": depth} if depth else {})
            at += 1
        if level < len(counts) - 1:
            places[f"input_blocks.{at}.0"] = "down"
            at += 1
    if mid >= -1:
        places["middle_block.0"] = "resnet"
    if mid >= 0:
        places |= {"middle_block.1": mid, "middle_block.2": "resnet"}
    at, depths = 0, iter(up)
    for level in reversed(range(len(counts))):
        for layer in range(counts[level] + 1):
            depth = next(depths)
            places |= {f"output_blocks.{at}.0": "resnet"} | ({f"output_blocks.{at}.1": depth} if depth else {})
            if level and layer == counts[level]:
                places[f"output_blocks.{at}.{2 if depth else 1}"] = "up"
            at += 1
    return places


WHOLE = {
    "SD": build([2] * 4, [1, 1, 1, 1, 1, 1, 0, 0], 1, [0] * 3 + [1] * 9),
    "SDXL": build([2] * 3, [0, 0, 2, 2, 10, 10], 10, [10] * 3 + [2] * 3 + [0] * 3),
    "SSD1B": build([2] * 3, [0, 0, 2, 2, 4, 4], -1, [4, 4, 10, 2, 1, 1, 0, 0, 0]),
    "VEGA": build([2] * 3, [0, 0, 1, 1, 2, 2], -1, [2] * 3 + [1] * 3 + [0] * 3),
}


def comfyui_detects(shapes: Shapes) -> tuple[tuple, dict] | None:
    """ComfyUI's `detect_unet_config`: the numbers that its models are matched by, and what it builds."""
    places = places_in(shapes)

    def depth_at(block: str) -> int:
        depth = places.get(f"{block}.1", 0)
        return depth if isinstance(depth, int) else 0

    first = shapes[f"{UNET}input_blocks.0.0.weight"]
    label = shapes.get(f"{UNET}label_emb.0.0.weight")
    blocks = next(at for at in itertools.count() if f"input_blocks.{at}.0" not in places)  # it stops at a gap
    counts, down, up, text, linear = [0], [], [], None, False
    for at in range(blocks):
        ours, theirs = f"input_blocks.{at}", f"output_blocks.{blocks - at - 1}"
        if places[f"{ours}.0"] == "down":
            counts.append(0)
            up.append(depth_at(theirs))
            continue
        if places[f"{ours}.0"] == "resnet":
            counts[-1] += 1
            down.append(depth_at(ours))
            if depth_at(ours) and text is None:
                text = shapes[f"{UNET}{ours}.1.transformer_blocks.0.attn2.to_k.weight"][1]
                linear = len(shapes[f"{UNET}{ours}.1.proj_in.weight"]) == 2
        if places.get(f"{theirs}.0") == "resnet":
            up.append(depth_at(theirs))
    mid = depth_at("middle_block") or (-1 if "middle_block.0" in places else -2)
    numbers = first[0], first[1], text, linear, label and label[1], tuple(down)
    try:
        return numbers, build(counts, down, mid, up[::-1])
    except StopIteration:
        return numbers, {}


def comfyui_opens(shapes: Shapes, mid_always: bool = False) -> bool:
    """It has SD 1.5 and 2.x of any depth, and five SDXL. Forge's U-Net has a middle block always."""
    (channels, inputs, text, linear, label, down), built = comfyui_detects(shapes)
    known = (text, linear, label) in ((768, False, None), (1024, True, None))
    if (text, linear, label) == (2048, True, 2816):
        known = down in ((0, 0, 2, 2, 10, 10), (0, 0, 2, 2, 4, 4), (0, 0, 1, 1, 2, 2), (0, 2, 5), (0, 2, 6))
    if mid_always:
        built = {**built, "middle_block.0": "resnet"}
    return channels == 320 and inputs == 4 and known and built == places_in(shapes)


def a1111_opens(shapes: Shapes) -> bool:
    """A fixed config by the text encoder; of an SDXL without attention in the middle it removes what SSD-1B lacks."""
    name = "SD"
    if "conditioner.embedders.1.model.ln_final.weight" in shapes:
        attention = f"{UNET}middle_block.1.transformer_blocks.0.attn1.to_q.weight" in shapes
        name = "SDXL" if attention else "SSD1B"
    return shapes[f"{UNET}input_blocks.0.0.weight"][0] == 320 and places_in(shapes) == WHOLE[name]


def sd_cpp_opens(shapes: Shapes) -> bool:
    """stable-diffusion.cpp's `get_sd_version` by names alone, then the blocks and widths that `unet.hpp` makes."""
    names = "\n".join(shapes)
    middle, channels = f"{UNET}middle_block.1." in names, shapes[f"{UNET}input_blocks.0.0.weight"][0]
    multiples = [1, 2, 4]
    if "conditioner.embedders.1" in names:
        second = f"{UNET}output_blocks.3.1.transformer_blocks.1" in names
        expected = WHOLE["SDXL" if middle else "SSD1B" if second else "VEGA"]
        levels = {0: 1, 1: 4, 2: 7}
    elif middle:
        expected, levels, multiples = WHOLE["SD"], {0: 1, 1: 4, 2: 7, 3: 10}, [1, 2, 4, 4]
    else:  # of the tiny U-Nets all but SDXS, which has no attention at the first level
        if f"{UNET}output_blocks.7.1" not in names:
            return False
        thin = build([1] * 3, [1] * 3, -2, [1] * 6)
        old = {"input_blocks": [0, 1, 3, 4, 6, 7], "output_blocks": [0, 1, 3, 4, 6, 7]}
        expected = {}
        for place, what in thin.items():
            blocks, at, inner = place.split(".")
            if what == "up":
                expected[f"output_blocks.{old[blocks][int(at)] + 1}.{1 if at == '1' else 2}"] = what
            else:
                expected[f"{blocks}.{old[blocks][int(at)]}.{inner}"] = what
        levels = {0: 1, 1: 4, 2: 7}
    if places_in(shapes) != expected:
        return False
    widths = [shapes[f"{UNET}input_blocks.{at}.0.out_layers.3.weight"][0] for at in levels.values()]
    return widths == [channels * multiple for multiple in multiples]


def programs_for(shapes: Shapes) -> list[str]:
    opens = {"ComfyUI": comfyui_opens, "Forge": lambda each: comfyui_opens(each, mid_always=True)}
    opens |= {"A1111": a1111_opens, "stable-diffusion.cpp": sd_cpp_opens}
    return [name for name, rule in opens.items() if rule(shapes)]


# ------------------------------------------------------------------------------------------ our layouts by those rules


def full_size(family: export.Family, config: dict, **scheduler) -> SDPipeline | XLPipeline:
    """A pipeline of the full size without weights."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
        levels = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "norm_num_groups": 32}
        types = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
        vae = AutoencoderKL(**levels, **types, latent_channels=4, scaling_factor=family.scaling_factor)
        texts = [CLIPTextModel(CLIPTextConfig(**family.texts[0]))]
        if family is export.SDXL:
            texts.append(CLIPTextModelWithProjection(CLIPTextConfig(**family.texts[1])))
    noise = PNDMScheduler(**{**NOISE, **scheduler})
    if family is export.SDXL:
        return XLPipeline(vae, *texts, None, None, unet, noise)
    return SDPipeline(vae, *texts, None, unet, noise, None, None, requires_safety_checker=False)


def full_unet(family: export.Family) -> dict:
    """The config of the family's U-Net."""
    config = {"attention_head_dim": 8 if family is export.SD1 else [5, 10, 20, 20], **family.unet}
    if family is export.SDXL:
        config |= {**XL_BLOCKS, "block_out_channels": [320, 640, 1280], "attention_head_dim": [5, 10, 20]}
    with torch.device("meta"):
        return public_config(UNet2DConditionModel(**config).config)


ALL = ["ComfyUI", "Forge", "A1111", "stable-diffusion.cpp"]
OPENS = [
    *(
        (family, student, False, programs)
        for family in (export.SD1, export.SD2)
        for student, programs in {
            "whole": ALL,
            "bk_base": ["ComfyUI", "Forge"],
            "bk_small": ["ComfyUI"],
            "bk_tiny": ["ComfyUI"],
            "bk_extreme": ["ComfyUI"],
            "width_256": ["stable-diffusion.cpp"],
        }.items()
    ),
    *((family, "bk_tiny", True, ["stable-diffusion.cpp"]) for family in (export.SD1, export.SD2)),
    (export.SD2, "width_192", False, ["stable-diffusion.cpp"]),
    (export.SD2, "bk_base", True, []),
    (export.SDXL, "sdxl", False, ALL),
    (export.SDXL, "ssd_1b", False, ALL),
    (export.SDXL, "vega", False, ["ComfyUI", "Forge", "stable-diffusion.cpp"]),
    (export.SDXL, "koala_700m", False, ["ComfyUI"]),
    (export.SDXL, "koala_1b", False, ["ComfyUI", "Forge"]),
    (export.SDXL, "koala_1b without its middle block", False, ["ComfyUI"]),
    (export.SDXL, "no middle attention", False, ["ComfyUI", "Forge"]),
    (export.SDXL, "eight transformer blocks", False, []),
]


@pytest.mark.parametrize(
    ("family", "student", "gaps", "programs"), OPENS, ids=lambda value: getattr(value, "name", None)
)
def test_the_programs_that_it_names_detect_the_file_and_build_it(family, student, gaps, programs):
    config = full_unet(family)
    config = config | (XL | OWN_XL)[student] if family is export.SDXL else student_config(config, STUDENTS[student])
    pipeline = full_size(family, config)
    assert export.family_of(pipeline) is family
    assert export.find_obstacle(pipeline, family) is None
    assert export.find_programs(pipeline.unet, family, gaps) == programs
    state = convert_pipeline(pipeline, gaps)
    assert programs_for({name: tuple(tensor.shape) for name, tensor in state.items()}) == programs
    if student in ("whole", "sdxl"):
        assert infer_diffusers_model_type(state) == {"SD 1.x": "v1", "SD 2.x": "v2", "SDXL": "xl_base"}[family.name]


OBSTACLES = [
    ({"width_224": True}, {}, "has 4 heads of 56 channels, the programs' SD 2.x has heads of 64 channels"),
    ({"norm_num_groups": 16}, {}, "its U-Net has norm_num_groups 16, the programs' SD 2.x has 32"),
    ({"in_channels": 9}, {}, "its U-Net has in_channels 9,"),
    ({"up_block_types": ["UpBlock2D", *["SimpleCrossAttnUpBlock2D"] * 3]}, {}, "has a SimpleCrossAttnUpBlock2D"),
    ({}, {"beta_end": 0.02}, "its scheduler has beta_end 0.02, the programs' SD 2.x has 0.012"),
    ({}, {"prediction_type": "sample"}, "it predicts the sample, the programs take noise or velocity"),
]


@pytest.mark.parametrize(("unet", "scheduler", "words"), OBSTACLES, ids=lambda value: str(value)[:40])
def test_what_the_file_cannot_say_is_refused(unet, scheduler, words):
    config = full_unet(export.SD2)
    if unet.pop("width_224", False):
        config = student_config(config, STUDENTS["width_224"])
    pipeline = full_size(export.SD2, config | unet, **{"prediction_type": "epsilon", **scheduler})
    assert words in export.find_obstacle(pipeline, export.SD2)


# --------------------------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> Path:
    """A tiny SD 2.x student: too narrow for any program."""
    return tiny_sd(tmp_path_factory.mktemp("student"), "bk_tiny", "gelu")


@pytest.fixture
def any_size(monkeypatch) -> None:
    """Programs open tiny students, too."""
    monkeypatch.setattr(export, "find_obstacle", lambda pipeline, family: None)
    monkeypatch.setattr(export, "find_programs", lambda unet, family, gaps: ["ComfyUI"])


def refusal(*arguments) -> str:
    with pytest.raises(SystemExit) as ended:
        export.main(export.parse_args([str(argument) for argument in arguments]))
    assert "\n" not in str(ended.value)
    return str(ended.value)


def test_the_command_writes_the_file(student, any_size, tmp_path, capsys):
    file = tmp_path / "models" / "tiny.safetensors"
    export.main(export.parse_args(["--model", str(student), "--output", str(file), "--dtype", "fp16"]))
    assert capsys.readouterr().out == f"{file}: SD 2.x, {file.stat().st_size:,} bytes; opens in ComfyUI\n"
    assert [path.name for path in file.parent.iterdir()] == ["tiny.safetensors"]
    with safe_open(file, "pt") as opened:
        header = opened.metadata()
        assert opened.get_tensor("cond_stage_model.model.positional_embedding").dtype == torch.float16
    assert header["modelspec.architecture"] == "stable-diffusion-v2-512-pruned"
    assert header["modelspec.title"] == student.name and header["modelspec.resolution"] == "32x32"
    again = refusal("--model", student, "--output", file)
    assert again == f"error: --output {file} exists; remove it, or pass another name"


def test_velocity_is_said_where_the_file_cannot(any_size, tmp_path, capsys):
    folder = tiny_models.save_sd_pipeline(tmp_path / "student", prediction_type="v_prediction")
    export.main(export.parse_args(["--model", str(folder), "--output", str(tmp_path / "a.safetensors")]))
    assert "choose v-prediction in the program" in capsys.readouterr().out


def test_velocity_of_sdxl_is_said_where_a_program_does_not_see_it(any_size, tmp_path, capsys, monkeypatch):
    """The others know it by the tensor v_pred."""
    said = {}
    monkeypatch.setattr(export, "find_programs", lambda unet, family, gaps: ["ComfyUI", "A1111"])
    for prediction in ("epsilon", "v_prediction"):
        folder, file = tiny_xl(tmp_path / prediction, prediction), tmp_path / f"{prediction}.safetensors"
        export.main(export.parse_args(["--model", str(folder), "--output", str(file)]))
        said[prediction] = capsys.readouterr().out
    assert all("A1111" in each for each in said.values())
    assert "put a .yaml that says so beside the file" in said["v_prediction"]
    assert "predicts velocity" not in said["epsilon"]


def test_a_value_that_overflows_is_refused(any_size, tmp_path):
    folder = tiny_models.save_sd_pipeline(tmp_path / "student")
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    unet.conv_out.bias.data.fill_(1e5)
    unet.save_pretrained(folder / "unet")
    said = refusal("--model", folder, "--output", tmp_path / "a.safetensors", "--dtype", "fp16")
    assert said.startswith("error: --dtype fp16: model.diffusion_model.out.2.bias is not finite in it; pass bf16")
    assert not (tmp_path / "a.safetensors").exists()


def test_a_full_disk_leaves_nothing_behind(student, any_size, tmp_path, monkeypatch):
    def write_half(state, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "save_file", write_half)
    said = refusal("--model", student, "--output", tmp_path / "a.safetensors")
    assert "No space left on device; make room, or pass another place" in said and not list(tmp_path.iterdir())


REFINER = {"_class_name": "StableDiffusionXLPipeline", "text_encoder": [None, None]}


def save_empty(folder: Path, files: dict[str, str]) -> Path:
    folder.mkdir()
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"pytorch_lora_weights.safetensors": ""}, "is an adapter alone; pass the student's folder around it"),
        ({"state.json": "{}"}, "is a checkpoint of a training; let the run end"),
        ({"checkpoint-2/state.json": "{}"}, "is a run that has not ended, without a pipeline; let it end"),
        ({"model_index.json": '{"_class_name": "StableDiffusion3Pipeline"}'}, "depth from its width"),
        ({"model_index.json": '{"_class_name": "DiTPipeline"}'}, "no program reads a DiT"),
        ({"model_index.json": '{"_class_name": "DDPMPipeline"}'}, "no program reads a U-Net of pixels"),
        ({"model_index.json": '{"_class_name": "FluxPipeline"}'}, "is a FluxPipeline: it has no such file; pass a"),
        ({"model_index.json": json.dumps(REFINER)}, "has no text_encoder, which belongs into the file; pass a whole"),
        ({"model_index.json": "{"}, "does not load"),
        ({"model_index.json": '{"_class_name": "StableDiffusionPipeline"}'}, "does not load"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_other_models_are_refused(tmp_path, files, words):
    folder = save_empty(tmp_path / "model", files)
    said = refusal("--model", folder, "--output", tmp_path / "a.safetensors")
    assert said.startswith(f"error: --model {folder} ") and words in said


def test_other_refusals(student, tmp_path, capsys, monkeypatch):
    file = tmp_path / "a.safetensors"
    assert "its U-Net has norm_num_groups 4" in refusal("--model", student, "--output", file)
    assert "is no safetensors file's name" in refusal("--model", student, "--output", tmp_path / "a.ckpt")
    assert "is no folder; pass a student of" in refusal("--model", tmp_path / "nowhere", "--output", file)
    assert '--output "" is empty' in refusal("--model", student, "--output", "")
    monkeypatch.setattr(export, "find_obstacle", lambda pipeline, family: None)
    said = refusal("--model", student, "--output", file)
    assert "no program opens a U-Net of [8, 16, 32] channels with Layout(widths=(1.0, 2.0, 4.0), down=((1,)," in said
    monkeypatch.setattr(export, "find_programs", lambda unet, family, gaps: [])
    said = refusal("--model", student, "--output", file, "--keep_gaps")
    assert said == f"error: --keep_gaps is for the layout of BK-SDM-Tiny, which --model {student} has not; drop it"
    assert not file.exists()


# ------------------------------------------------------------------------------------------------------ docs/export.md


def test_the_page_has_each_layout_with_the_programs_that_open_it():
    text = (ROOT / "docs" / "export.md").read_text()
    rows = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and len(cells) == 5:
            rows[cells[0].split("`")[1] if "`" in cells[0] else cells[0]] = cells[1:]
    for family, student, gaps, programs in OPENS:
        key = f"{student} --keep_gaps" if gaps else student
        if key in rows:
            assert rows[key] == ["yes" if program in programs else "no" for program in ALL], (family.name, key)
    expected = {
        "whole",
        "bk_base",
        "bk_small",
        "bk_tiny",
        "bk_tiny --keep_gaps",
        "bk_extreme",
        "sdxl",
        "ssd_1b",
        "vega",
    }
    assert expected <= rows.keys()
