"""--teacher_dtype and --offload_teacher: in what precision, and where, a teacher's weights are held."""

import copy
import json
import re
import weakref
from pathlib import Path

from common.metrics import read_metrics
from common.teacher_weights import count_bytes, hold_teacher
from common.training import make_accelerator, prepare_models

import pytest
import torch
from diffusers import DiTTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel, UNet2DModel
from PIL import Image
from safetensors.torch import load_file

from lift_utils import FeatureModel
from tiny_models import TINY_DIT, TINY_SD3, TINY_UNET, save_dit_pipeline, save_sd3_pipeline


CPU = torch.device("cpu")
SHORT = (
    *("--train_batch_size", 4, "--gradient_accumulation_steps", 1, "--max_train_steps", 2, "--logging_steps", 1),
    *("--num_inference_steps", 1, "--report_to", "none", "--dataloader_num_workers", 0),
)
# Wide enough for blocks of 64 weights.
WIDE = {"attention_head_dim": 64, "num_layers": 2}
MODELS = {
    "unet": lambda: UNet2DModel(**{**TINY_UNET, "block_out_channels": [64, 64], "attention_head_dim": 64}),
    "sd21": lambda: UNet2DConditionModel(
        sample_size=8,
        block_out_channels=[64, 64],
        down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"],
        up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"],
        layers_per_block=1,
        cross_attention_dim=64,
    ),
    "dit": lambda: DiTTransformer2DModel(**{**TINY_DIT, **WIDE}),
    "sd3": lambda: SD3Transformer2DModel(**{**TINY_SD3, **WIDE, "caption_projection_dim": 128}),
}


def inputs(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A forward pass on two images, whose timesteps bfloat16 would not tell apart."""
    torch.manual_seed(1)
    config, side = model.config, model.config.sample_size
    image, times = torch.randn(2, config.in_channels, side, side), torch.tensor([995.0, 996.0])
    if isinstance(model, UNet2DModel):
        return {"sample": image, "timestep": times}
    if isinstance(model, UNet2DConditionModel):
        return {"sample": image, "timestep": times, "encoder_hidden_states": torch.randn(2, 7, 64)}
    if isinstance(model, DiTTransformer2DModel):
        return {"hidden_states": image, "timestep": times.long(), "class_labels": torch.tensor([0, 1])}
    text = torch.randn(2, 9, config.joint_attention_dim), torch.randn(2, config.pooled_projection_dim)
    return {"hidden_states": image, "timestep": times, "encoder_hidden_states": text[0], "pooled_projections": text[1]}


@pytest.mark.parametrize("name", MODELS)
def test_predictions_stay_near_and_weights_get_small(name):
    """Each narrower form is further from float32 and takes fewer bytes, as many as estimated."""
    torch.manual_seed(0)
    model = MODELS[name]()
    features = ["mid_block"] if name in ("unet", "sd21") else ["transformer_blocks.1"]
    with torch.no_grad():
        expected = model.eval()(**inputs(model)).sample
        errors, sizes = {}, {}
        for dtype in ("fp32", "fp16", "bf16", "fp8", "nf4"):
            teacher = copy.deepcopy(model)
            sizes[dtype] = count_bytes(teacher, dtype, "bf16")
            hold_teacher(teacher, dtype, torch.bfloat16, CPU, offload=False)
            held = sum(weight.numel() * weight.itemsize for weight in teacher.parameters())
            scales = sum(
                layer.weight.quant_state.absmax.nbytes
                for layer in teacher.modules()
                if hasattr(getattr(layer, "weight", None), "quant_state")
            )
            prediction, captured = FeatureModel(teacher, features)(**inputs(model))
            assert torch.isfinite(prediction).all() and len(captured) == 1
            errors[dtype] = ((prediction.float() - expected).norm() / expected.norm()).item()
            assert held + scales == pytest.approx(sizes[dtype], rel=0.03)
            assert not any(weight.requires_grad for weight in teacher.parameters()) and not teacher.training
            assert teacher.num_parameters() == model.num_parameters()
    assert errors["fp32"] == 0 < errors["fp16"] < errors["bf16"] < errors["fp8"] < 0.2 and errors["nf4"] < 0.35
    assert sizes["fp32"] == 2 * sizes["fp16"] == 2 * sizes["bf16"] > 2 * sizes["fp8"]
    assert sizes["nf4"] < sizes["bf16"]


@pytest.mark.parametrize("dtype", ["fp32", "fp8", "nf4"])
def test_a_teacher_that_is_gone_is_freed_before_the_first_step(dtype, tmp_path):
    """Its hooks and its compressed weights point at it, and it at them."""
    accelerator = make_accelerator(str(tmp_path), "none", 0, 1, "no", False)
    teacher = hold_teacher(MODELS["unet"](), dtype, torch.float32, CPU, offload=False)
    weights = [weakref.ref(weight) for weight in teacher.parameters()]
    del teacher
    prepare_models(FeatureModel(UNet2DModel(**TINY_UNET), []), None, accelerator, False, False, False)
    assert weights and not any(weight() is not None for weight in weights)


def test_without_a_choice_it_is_the_runs_precision():
    for working in (torch.float32, torch.bfloat16):
        teacher = hold_teacher(MODELS["unet"](), None, working, CPU, offload=False)
        assert {weight.dtype for weight in teacher.parameters()} == {working}
        assert teacher(**inputs(teacher)).sample.dtype == working


@pytest.mark.parametrize("name", ["unet", "sd21", "sd3"])
def test_offloaded_layers_compute_the_same(name):
    """Moved from the CPU to the CPU: what a GPU would get."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():
        expected = model(**inputs(model)).sample
        teacher = hold_teacher(copy.deepcopy(model), None, torch.float32, CPU, offload=True)
        assert torch.equal(teacher(**inputs(model)).sample, expected)


# ---------------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture
def distil(run, tmp_path):
    """`distil(script, teacher, data, *flags)` trains two steps; returns the output folder."""

    def start(script: str, teacher: Path, data: Path, *flags, output_dir: str = "student") -> Path:
        where = ("--output_dir", tmp_path / output_dir, "--cache_dir", tmp_path / "cache")
        source = ("--pretrained_teacher_model", teacher, "--train_data_dir", data)
        run(f"train_lift_{script}", *source, *where, *SHORT, *flags)
        return tmp_path / output_dir

    return start


@pytest.fixture(scope="module")
def wide_sd3(tmp_path_factory) -> Path:
    return save_sd3_pipeline(tmp_path_factory.mktemp("sd3"), **WIDE, caption_projection_dim=128)


@pytest.fixture
def source_of(teachers, wide_sd3, images, captioned, articles, tmp_path):
    """`source_of(script)` is a teacher with layers that nf4 takes, data, and the student's flags."""

    def find(script: str) -> tuple:
        if script == "dit":
            return save_dit_pipeline(tmp_path / "dit", **WIDE), articles, "--keep_blocks", "1"
        if script == "unet":
            return teachers["unet"], images, "--student", 0.5, "--num_validation_images", 2
        flags = ("--cache_latents", "--validation_prompts", "a bag")
        if script == "sd3":
            return wide_sd3, captioned, "--student", "half", "--max_sequence_length", 8, *flags
        return teachers[script], captioned, "--student", {"sd21": "bk_small", "sdxl": "extreme"}[script], *flags

    return find


@pytest.mark.parametrize("script", ["unet", "sd21", "dit", "sd3", "sdxl"])
def test_runs_with_a_compressed_teacher(distil, source_of, script):
    """They train nearly on the float32 teacher's loss, from its weights, and show the teacher in the grid."""

    def sizes(folder: Path) -> list[tuple[str, str]]:
        return re.findall(r"([\d,]{5,}) parameters|([\d.]+%) of the teacher", (folder / "README.md").read_text())

    source, first = source_of(script), "samples/step-000000.png"
    whole = distil(script, *source, output_dir="whole")
    expected = read_metrics(whole / "metrics.jsonl")[0]
    for dtype in ("bf16", "fp8", "nf4"):
        narrow = distil(script, *source, "--teacher_dtype", dtype, output_dir=dtype)
        row = read_metrics(narrow / "metrics.jsonl")[0]
        assert row["task"] == pytest.approx(expected["task"], rel=1e-5)  # of the same student
        assert row["kd_mse"] == pytest.approx(expected["kd_mse"], rel=0.25) and row["feat"] > 0
        assert Image.open(narrow / first).size == Image.open(whole / first).size
        assert sizes(narrow) == sizes(whole) != []
        part = "transformer" if script in ("dit", "sd3") else "unet"
        weights = load_file(next((narrow / part).glob("*.safetensors")))
        assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


@pytest.mark.parametrize("script", ["unet", "sd21", "dit", "sd3", "sdxl"])
def test_a_teacher_in_the_other_half_precision(distil, source_of, script):
    """Where autocast fails on it: what it takes in training and for its samples, it casts by itself."""
    student = distil(script, *source_of(script), "--mixed_precision", "bf16", "--teacher_dtype", "fp16")
    assert (student / "samples" / "step-000000.png").exists()
    assert json.loads((student / "metrics.jsonl").read_text().splitlines()[0])["feat"] > 0


def test_a_cache_of_a_narrower_teacher_is_another_one(distil, source_of, tmp_path):
    flags = (*source_of("unet"), "--cache_teacher", 1, "--lambda_kd_feat", 0)
    for dtype in ("fp32", "fp8", "nf4"):
        distil("unet", *flags, "--teacher_dtype", dtype, output_dir=dtype)
    assert len(list((tmp_path / "cache" / "lift-encodings").iterdir())) == 3


@pytest.mark.parametrize(
    ("script", "flags", "says"),
    [
        ("unet", ["--offload_teacher"], "--offload_teacher needs a CUDA device to move the teacher to; drop it"),
        ("dit", ["--offload_teacher", "--dry_run", "--student", "d7"], "--offload_teacher does not go with a DiT"),
        ("unet", ["--offload_teacher", "--dry_run", "--compile"], "--offload_teacher with --compile"),
        ("unet", ["--teacher_dtype", "fp8", "--compile"], "--teacher_dtype fp8 with --compile"),
        ("unet", ["--offload_teacher", "--dry_run", "--teacher_dtype", "nf4"], "--offload_teacher with --teacher_dt"),
        (
            "sd3",
            ["--share_backbone", "--lora_rank", 2, "--teacher_dtype", "nf4"],
            "--share_backbone needs a teacher in the run's precision on the device",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(distil, teacher, images, script, flags, says):
    with pytest.raises(SystemExit, match=f"^error: {re.escape(says)}"):
        distil(script, teacher, images, *flags)


@pytest.mark.parametrize(("flags", "size"), [(["nf4"], "nf4"), (["fp8"], "fp8"), (["fp32"], "fp32")])
def test_a_dry_run_counts_the_bytes(run, teacher, capsys, flags, size):
    run(
        "train_lift_unet",
        "--pretrained_teacher_model",
        teacher,
        "--dry_run",
        "--student",
        0.5,
        "--teacher_dtype",
        *flags,
    )
    model = UNet2DModel.from_pretrained(teacher, subfolder="unet")
    printed = re.search(r"teacher weights +([\d.]+) MiB", capsys.readouterr().out).group(1)
    assert float(printed) == pytest.approx(count_bytes(model, size, "no") / 2**20, abs=0.06)
