"""The pixel U-Net's script: launched as a user does, then what it saved is loaded and run."""

import json
import math
from pathlib import Path

import common.pruning
from common.costs import profile_forward
from common.pruning import prune_width
from common.students import copy_blocks, fill_from_blocks, is_narrower

import datasets
import pytest
import torch
from accelerate.state import PartialState
from conftest import TWO_PROCESSES, copy_script, digest, launch, metrics, run_several, same, weights, widened
from diffusers import DDIMPipeline, DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train_lift_unet
from lift_utils import FeatureModel
from tiny_models import TINY_UNET


SHORT = [
    *("--train_batch_size", 8, "--max_train_steps", 3, "--logging_steps", 1, "--dataloader_num_workers", 0),
    *("--num_validation_images", 2, "--num_inference_steps", 2, "--report_to", "none", "--learning_rate", 1e-3),
]


EXAMPLE = torch.zeros(1, 1, 16, 16), torch.zeros(1, dtype=torch.long)  # a U-Net's inputs


@pytest.fixture
def distil(run, teacher, images, tmp_path):
    """`distil(*flags)` runs three steps into a new folder and returns it."""

    def distil_into(*flags, output_dir=tmp_path / "student") -> Path:
        run(
            "train_lift_unet",
            *("--pretrained_teacher_model", teacher, "--student", 0.5, "--train_data_dir", images),
            *("--output_dir", output_dir, *SHORT, *flags),
        )
        return output_dir

    return distil_into


# --------------------------------------------------------------------------------------------------- as a user does it


def test_from_scratch_to_student_by_accelerate_launch(images, tmp_path):
    """The docstring's two commands, run in a folder that holds nothing but the script, lift_utils.py and common/."""
    copy_script("train_lift_unet", tmp_path)
    (tmp_path / "teacher.json").write_text(json.dumps({"config": TINY_UNET}))
    data = ("--train_data_dir", images, *SHORT)
    scratch = ("--kd_loss", "none", "--student", "teacher.json", "--output_dir", "teacher")
    finished = launch("train_lift_unet.py", *data, *scratch, cwd=tmp_path)
    assert finished.returncode == 0, finished.stdout
    before = digest(tmp_path / "teacher")

    flags = ("--pretrained_teacher_model", "teacher", "--student", 0.5, "--output_dir", "student")
    finished = launch("train_lift_unet.py", *data, *flags, "--report_to", "tensorboard", cwd=tmp_path)
    assert finished.returncode == 0, finished.stdout
    assert "kd=" in finished.stdout and "feat=" in finished.stdout  # beside the progress bar
    assert digest(tmp_path / "teacher") == before

    student = tmp_path / "student"
    assert [row["step"] for row in metrics(student)] == [1, 2, 3]
    logged = {"loss", "task", "kd", "feat", "coarse", "fine", "weight", "lr", "grad_norm", "images_per_second"}
    logged |= {"slope_mean", "slope_std", "intercept_mean", "intercept_std"}
    assert logged <= metrics(student)[-1].keys()
    events = EventAccumulator(str(student / "logs" / "lift")).Reload().Tags()
    assert events["images"] == ["samples"] and logged <= set(events["scalars"])
    for kind in (DDPMPipeline, DDIMPipeline):
        pipeline = kind.from_pretrained(student)
        assert pipeline.unet.config.block_out_channels == [8, 16]
        image = pipeline(num_inference_steps=2, output_type="np").images
        assert image.shape == (1, 16, 16, 1) and 0 <= image.min() <= image.max() <= 1
    assert set(weights(student)) == set(UNet2DModel(**{**TINY_UNET, "block_out_channels": [8, 16]}).state_dict())

    card = (student / "README.md").read_text()
    for fact in ("library_name: diffusers", "`teacher`", "PLACE, group size 16", "samples.png", "--student 0.5"):
        assert fact in card
    assert str(tmp_path) not in card.split("The command:")[0]
    grid = Image.open(student / "samples.png")
    assert grid.height >= 3 * 64 and grid.width >= 2 * 64  # teacher, student, EMA student; two columns
    assert Image.open(student / "curves.png").width > 1000


def test_two_processes_share_the_batch(teacher, images, tmp_path):
    """A resumed run equals an uninterrupted one."""

    def command(name: str, *flags) -> tuple:
        source = ("--pretrained_teacher_model", teacher, "--student", 0.5, "--train_data_dir", images)
        size = ("--train_batch_size", 4, "--checkpointing_steps", 2)
        return "train_lift_unet", *source, "--output_dir", tmp_path / name, *SHORT, *size, *flags

    resumed = command("parts", "--resume_from_checkpoint", "latest")
    commands = [command("whole"), command("parts", "--max_train_steps", 2), resumed]
    printed = run_several(commands, tmp_path, prefix=("-m", *TWO_PROCESSES))
    assert "96 images, 12 batches an epoch" in printed and "step 2 of 3," in printed  # 12 of 2 x 4 images
    assert same(weights(tmp_path / "parts"), weights(tmp_path / "whole"))
    rows = metrics(tmp_path / "whole")
    assert len(rows) == 3 and [row["loss"] for row in metrics(tmp_path / "parts")] == [row["loss"] for row in rows]


def test_images_that_are_not_square(distil, images, tmp_path):
    """UNet2DModel takes a pair as its sample_size; the teacher's samples are as large as the student's."""
    recipe = tmp_path / "student.json"
    for sides in ([16, 24], [16, 16]):
        recipe.write_text(json.dumps({"config": {"sample_size": sides, "layers_per_block": 1}}))
        folder = distil("--student", recipe, output_dir=tmp_path / f"{sides[1]}")
        pipeline = DDPMPipeline.from_pretrained(folder)
        assert pipeline(num_inference_steps=2, output_type="np").images.shape == (1, *sides, 1)
        assert f"- Images of {sides[0]} × {sides[1]} pixels" in (folder / "README.md").read_text()
        assert all(0 < row["kd"] < math.inf for row in metrics(folder))


def test_without_its_loss_no_teacher_is_held(distil, monkeypatch):
    """It would stay on the device for the whole run; its weights serve to fill the student."""

    def unexpected(*arguments):
        raise AssertionError("the teacher is held")

    monkeypatch.setattr(train_lift_unet, "hold_teacher", unexpected)
    assert len(metrics(distil("--kd_loss", "none"))) == 3


# ----------------------------------------------------------------------------------------------------- what is trained


@pytest.mark.parametrize(
    "flags",
    [
        ["--kd_loss", "lift", "--coarse_norm", "l2"],
        ["--kd_loss", "mse", "--reduction", "mean"],
        ["--kd_loss", "none"],
        ["--group_size", 64, "--group_by", "position"],
        ["--kd_weighting", "constant", "--lambda_kd_feat", 0],
        ["--kd_weighting", "linear", "--no-antithetic_timesteps"],
        ["--kd_weighting", "cosine", "--no-random_flip"],
        ["--kd_weighting", "coarse_only", "--no-use_ema"],
        ["--kd_weighting", "fine_only", "--gradient_accumulation_steps", 2],
        ["--student_init", "random", "--gradient_checkpointing"],
        ["--student_init", "diffusion", "--lr_scheduler", "cosine", "--lr_warmup_steps", 1],
        ["--use_8bit_adam", "--adam_weight_decay", 0.01],
        ["--mixed_precision", "bf16"],
        ["--resolution", 32, "--max_train_samples", 24],
    ],
    ids=lambda flags: " ".join(map(str, flags)),
)
def test_flags_train_a_student_that_loads(distil, flags):
    before = UNet2DModel.from_config({**TINY_UNET, "block_out_channels": [8, 16]}).state_dict()
    folder = distil(*flags)
    after = weights(folder)
    assert {key: value.shape for key, value in after.items()} == {key: value.shape for key, value in before.items()}
    assert all(torch.isfinite(value).all() and value.dtype == torch.float32 for value in after.values())
    moments = load_file(folder / "checkpoint-3" / "optimizer.safetensors")
    moments = [value for key, value in moments.items() if key.endswith((".exp_avg", ".state1"))]
    # Softmax does not see the bias of the keys, so its gradient may be zero; every other tensor learns.
    assert len(moments) >= len(after) and sum(bool(value.any()) for value in moments) >= len(moments) - 4
    rows = metrics(folder)
    assert len(rows) == 3 and all(row["loss"] > 0 and row["skipped"] == 0 for row in rows)
    assert ("coarse" in rows[0]) == ("mse" not in flags and "none" not in flags)
    if "coarse_only" in flags:
        assert rows[0]["weight"] == 0
    if "linear" in flags:
        assert [row["weight"] for row in rows] == pytest.approx([1 / 3, 2 / 3, 1])
    if "cosine" in flags and "--no-random_flip" in flags:
        assert [row["weight"] for row in rows] == pytest.approx([0.25, 0.75, 1])
    assert DDIMPipeline.from_pretrained(folder)(num_inference_steps=1).images


def test_the_loss_falls_and_every_weight_moves(distil, teacher):
    folder = distil("--max_train_steps", 60, "--ema_decay", 0.9, "--lambda_task", 0)
    rows = metrics(folder)

    def mean(key, part):
        return sum(row[key] for row in rows[part]) / len(rows[part])

    first, last = slice(0, 3), slice(-10, None)
    assert mean("loss", last) < 0.6 * mean("loss", first)
    assert mean("coarse", last) < mean("coarse", first) and mean("weight", last) > mean("weight", first)

    student = UNet2DModel.from_config({**TINY_UNET, "block_out_channels": [8, 16]})
    prune_width(student, UNet2DModel.from_pretrained(teacher / "unet"), EXAMPLE)
    trained = load_file(folder / "checkpoint-60" / "unet/diffusion_pytorch_model.safetensors")
    still = [key for key, value in student.state_dict().items() if torch.equal(value, trained[key])]
    # The teacher's key biases start at 0, and softmax does not see them: they alone may stay.
    assert all(key.endswith("to_k.bias") for key in still)
    for subfolder, equal in (("unet", False), ("unet_ema", True)):  # as in a pipeline
        model = UNet2DModel.from_pretrained(folder / "checkpoint-60", subfolder=subfolder)
        assert same(weights(folder), model.state_dict()) == equal


def config_folder(tmp_path: Path, **changes) -> Path:
    folder = tmp_path / "model"
    torch.manual_seed(0)
    UNet2DModel(**{**TINY_UNET, **changes}).save_pretrained(folder)
    return folder


def test_compiled_equals_eager(distil, tmp_path):
    small = {"block_out_channels": [8], "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]}
    teacher = config_folder(tmp_path, **small, add_attention=False)
    flags = ("--pretrained_teacher_model", teacher, "--max_train_steps", 2)
    eager = metrics(distil(*flags, output_dir=tmp_path / "eager"))
    compiled = metrics(distil(*flags, "--compile", output_dir=tmp_path / "compiled"))
    for ours, theirs in zip(eager, compiled):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
    assert weights(tmp_path / "compiled").keys() == weights(tmp_path / "eager").keys()


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_prediction_types_by_the_schedulers_config(distil, run, images, tmp_path, prediction_type):
    recipe = tmp_path / "scratch.json"
    recipe.write_text(json.dumps({"config": TINY_UNET}))
    scratch = ("--train_data_dir", images, "--kd_loss", "none", "--student", recipe, *SHORT)
    run("train_lift_unet", *scratch, "--prediction_type", prediction_type, "--output_dir", tmp_path / "teacher")
    folder = distil("--pretrained_teacher_model", tmp_path / "teacher")
    for pipeline in (tmp_path / "teacher", folder):
        assert DDPMScheduler.from_pretrained(pipeline, subfolder="scheduler").config.prediction_type == prediction_type


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_the_target_is_what_the_scheduler_inverts(prediction_type):
    """The exact prediction must lead the scheduler's own step back to the clean image."""
    scheduler = DDPMScheduler(prediction_type=prediction_type, clip_sample=False)
    images, noise = torch.rand(4, 1, 8, 8) * 2 - 1, torch.randn(4, 1, 8, 8)
    for step in (1, 300, 900):
        noisy, target = train_lift_unet.add_noise(scheduler, images, noise, torch.full((4,), step))
        clean = scheduler.step(target, step, noisy).pred_original_sample
        torch.testing.assert_close(clean, images, rtol=1e-3, atol=1e-3)


# -------------------------------------------------------------------------------------------------------- the students


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [
        ("pruned_30", 44_286_147),
        ("pruned_50", 19_697_795),
        ("pruned_70", 9_729_891),
        ("pruned_90", 1_239_587),
        ("extreme", 1_239_587),
    ],
)
def test_presets_of_the_celeba_ddpm(preset, parameters):
    celeba = {
        "sample_size": 64,
        "block_out_channels": [128, 256, 256, 256, 512],
        "attention_head_dim": None,
        "down_block_types": ["DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"],
    }
    with torch.device("meta"):
        teacher = UNet2DModel(**celeba)
        recipe = train_lift_unet.STUDENTS[preset]
        student = UNet2DModel.from_config(train_lift_unet.student_config(dict(teacher.config), recipe))
    assert teacher.num_parameters() == 78_700_803
    assert student.num_parameters() == parameters
    assert is_narrower(student, teacher)


@pytest.mark.parametrize("init", ["magnitude", "diffusion"])
def test_pruning_finds_the_channels_that_matter(init):
    """Residual, skip, attention and time-embedding channels stay consistent: the function survives."""
    torch.manual_seed(1)
    config = {**TINY_UNET, "attention_head_dim": None, "layers_per_block": 2}
    small = UNet2DModel(**config)
    for weight in small.parameters():
        if weight.ndim > 1:  # equal magnitudes, so that a channel's rank is whether something reads it
            weight.data = weight.data.sign() * weight.data.abs().mean()
    teacher, student = widened(small), UNet2DModel(**config)
    inputs = torch.randn(3, 1, 16, 16), torch.tensor([0, 400, 999])
    torch.testing.assert_close(teacher(*inputs).sample, small(*inputs).sample, rtol=1e-4, atol=1e-5)
    accumulate = None
    if init == "diffusion":
        images = torch.rand(2, 1, 16, 16) * 2 - 1

        def accumulate(model):
            train_lift_unet.accumulate_gradients(model, scheduler=DDPMScheduler(), images=images)

    prune_width(student, teacher, EXAMPLE, accumulate)
    ours, wanted = student(*inputs).sample, small(*inputs).sample
    if init == "magnitude":
        # The narrower sinusoid is fitted with small weights, and therefore not exactly.
        assert (ours - wanted).square().mean() < 1e-5 * wanted.var()
    else:  # copies have an effect through the normalisation's statistics: one or two may outrank an original
        assert (ours - wanted).square().mean() < 1e-3 * wanted.var()


def test_the_images_that_rank_channels_are_chosen_by_the_seed(monkeypatch):
    """The first are of one class, where a folder has a sub-folder for each. Where they do not fit, it says so."""
    rows = datasets.Dataset.from_dict({"dark": [int(row < 32) for row in range(64)]})
    rows = rows.with_transform(lambda batch: {"images": [torch.full((1, 8, 8), 255 * dark) for dark in batch["dark"]]})
    teacher, student = UNet2DModel(**TINY_UNET), UNet2DModel(**TINY_UNET | {"block_out_channels": [8, 16]})
    seen = []

    def note(student, teacher, example, accumulate, timesteps):
        seen.append(accumulate.keywords["images"])

    monkeypatch.setattr(train_lift_unet, "prune_width", note)
    how = {}, "diffusion", DDPMScheduler(), rows
    for seed in (0, 0, 1):
        train_lift_unet.fill_student(student, teacher, *how, seed, torch.device("cpu"))
    assert all(images.shape == (16, 1, 8, 8) and {*images.unique().tolist()} == {-1, 1} for images in seen)
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], seen[2])

    def overflow(*arguments):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(train_lift_unet, "prune_width", overflow)
    with pytest.raises(SystemExit, match=r"--student_init diffusion: .* does not fit the GPU.*pass magnitude"):
        train_lift_unet.fill_student(student, teacher, *how, 0, torch.device("cpu"))


def test_the_time_embedding_is_fitted_over_the_whole_schedule():
    torch.manual_seed(0)
    shape = TINY_UNET | {"norm_num_groups": 4}
    teacher = UNet2DModel(**shape | {"block_out_channels": [64, 64]})
    student = UNet2DModel(**shape | {"block_out_channels": [32, 32]})
    state, steps = teacher.state_dict(), torch.arange(1000, 4000)

    def error(timesteps: int) -> float:
        fitted = common.pruning._fit_time_embedding(student, teacher, state, timesteps)
        weight, bias = (fitted[f"time_embedding.linear_1.{name}"] for name in ("weight", "bias"))
        target = teacher.time_embedding.linear_1(teacher.time_proj(steps))
        return ((student.time_proj(steps) @ weight.T + bias - target).square().mean() / target.var()).item()

    assert error(4000) < 0.5 * error(1000)


@pytest.mark.parametrize("width", [0.5, 0.125])
def test_the_narrower_sinusoid_enters_with_small_weights(width):
    """Sums of large weights that cancel out would be mostly rounding errors in bfloat16."""
    torch.manual_seed(0)
    teacher = UNet2DModel(**{**TINY_UNET, "block_out_channels": [128, 256], "norm_num_groups": 32})
    recipe = {"width": width, "config": {"norm_num_groups": 4}}
    student = UNet2DModel.from_config(train_lift_unet.student_config(dict(teacher.config), recipe))
    prune_width(student, teacher, EXAMPLE)
    layer, steps = student.time_embedding.linear_1, student.time_proj(torch.arange(1000))
    assert layer.weight.abs().max() < 1
    signal = steps @ layer.weight.T
    error = (steps.bfloat16() @ layer.weight.T.bfloat16()).float() - signal
    assert error.std() < 0.02 * signal.std()


@pytest.mark.parametrize("fraction", [1.0, 0.75, 0.25])
@pytest.mark.parametrize("head_dim", [8, None])
def test_pruned_weights_are_the_teachers(fraction, head_dim):
    torch.manual_seed(0)
    teacher = UNet2DModel(**{**TINY_UNET, "block_out_channels": [32, 64], "attention_head_dim": head_dim})
    student = UNet2DModel.from_config(train_lift_unet.student_config(dict(teacher.config), {"width": fraction}))
    assert student.config.block_out_channels == [32 * fraction, 64 * fraction]
    prune_width(student, teacher, EXAMPLE)
    inputs = torch.randn(2, 1, 16, 16), torch.tensor([3, 700])
    if fraction == 1:
        torch.testing.assert_close(student(*inputs).sample, teacher(*inputs).sample, rtol=1e-3, atol=1e-4)
    assert torch.isfinite(student(*inputs).sample).all()
    for name in ("conv_in.weight", "mid_block.resnets.0.conv1.weight", "mid_block.attentions.0.to_v.weight"):
        entries = set(teacher.state_dict()[name].flatten().tolist())
        assert set(student.state_dict()[name].flatten().tolist()) <= entries


@pytest.mark.parametrize("width", [1.0, 0.5])
@pytest.mark.parametrize("head_dim", [2, 16])
def test_a_student_may_have_more_heads_or_wider_ones(width, head_dim):
    torch.manual_seed(0)
    teacher = UNet2DModel(**{**TINY_UNET, "attention_head_dim": 8})
    recipe = {"width": width, "config": {"attention_head_dim": head_dim}}
    student = UNet2DModel.from_config(train_lift_unet.student_config(dict(teacher.config), recipe))
    prune_width(student, teacher, EXAMPLE)
    name = "mid_block.attentions.0.to_v.weight"
    ours, theirs = (set(model.state_dict()[name].flatten().tolist()) for model in (student, teacher))
    assert len(ours) == width**2 * len(theirs) and ours <= theirs


def test_a_student_of_fewer_levels_has_the_outer_ones(teacher, tmp_path):
    """Up blocks are counted from the inside: the student's first is the teacher's second."""
    PartialState()  # which the logger needs
    kinds = {"down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]}
    path = tmp_path / "student.json"
    path.write_text(json.dumps({"config": {**kinds, "block_out_channels": [16]}}))
    args = train_lift_unet.parse_args(
        ["--student", str(path), "--dry_run", "--pretrained_teacher_model", str(teacher)]
    )
    original = UNet2DModel.from_pretrained(teacher / "unet")
    student, recipe = train_lift_unet.build_student(original, args)
    assert recipe["features"] == [["up_blocks.0", "up_blocks.1"]]
    args.resolution = 15  # which the student takes, and the teacher does not
    with pytest.raises(SystemExit, match=r"--resolution 15, given .* is not divisible .*; pass a multiple of 2"):
        train_lift_unet.build_student(original, args)
    fill_from_blocks(student, original, recipe["blocks"], random=False)
    ours, theirs = student.state_dict(), original.state_dict()
    named = {name: name.replace("up_blocks.0", "up_blocks.1") for name in ours}
    alike = [name for name in ours if theirs[named[name]].shape == ours[name].shape]
    assert len(alike) > len(ours) / 2 and "up_blocks.0.resnets.1.conv2.weight" in alike
    assert all(torch.equal(ours[name], theirs[named[name]]) for name in alike if "mid_block" not in name)


def test_a_student_that_starts_mostly_from_random_weights_is_named(teacher, caplog):
    """Equal neighbouring widths take a shortcut out of a block: it has other layers, and is not pruned."""
    PartialState()  # which the logger needs
    original = UNet2DModel.from_pretrained(teacher / "unet")
    for widths, level in (([8, 8], "WARNING"), ([16, 32], "INFO")):
        caplog.clear()
        caplog.set_level("INFO")
        student = UNet2DModel.from_config({**original.config, "block_out_channels": widths})
        fill_from_blocks(student, original, None, random=False)
        assert [record.levelname for record in caplog.records if "start from random" in record.getMessage()] == [level]


def test_what_a_student_says_of_itself_is_kept():
    recipe = {"width": 0.5, "config": {"time_embedding_dim": 128}}
    config = train_lift_unet.student_config({**TINY_UNET, "time_embedding_dim": 64}, recipe)
    assert config["time_embedding_dim"] == 128 and config["block_out_channels"] == [8, 16]


def test_json_student_with_blocks_and_features(distil, teacher, tmp_path):
    """A shallower student: blocks copied by an explicit map, features paired by name."""
    recipe = {
        "config": {"block_out_channels": [16], "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]},
        "blocks": {"conv_in": "conv_in", "down_blocks.0.resnets": "down_blocks.0.resnets"},
        "features": [["down_blocks.0.resnets.0", "down_blocks.0.resnets.0"]],
    }
    path = tmp_path / "student.json"
    path.write_text(json.dumps(recipe))
    folder = distil("--student", path, "--learning_rate", 0, "--lambda_kd_feat", 1)
    assert metrics(folder)[0]["feat"] > 0
    ours, theirs = weights(folder), weights(teacher)
    for key in ours:
        assert key.startswith(tuple(recipe["blocks"])) == torch.equal(ours[key], theirs.get(key, torch.empty(0))) or (
            key.endswith(("norm1.weight", "norm2.weight", "norm_out.weight", ".bias"))
        ), key
    assert DDIMPipeline.from_pretrained(folder).unet.config.block_out_channels == [16]


def test_features_under_compile_and_checkpointing():
    """What FeatureModel returns does not depend on how the model is run."""
    torch.manual_seed(0)
    model = UNet2DModel(**TINY_UNET).train()
    names = ["down_blocks.0", "mid_block", "up_blocks.1"]
    inputs = torch.randn(2, 1, 16, 16), torch.tensor([1, 2])
    features_of = FeatureModel(model, names)
    model(*inputs)  # as when samples are drawn: nothing stays behind
    assert not features_of._captured
    prediction, features = features_of(*inputs)
    assert [tuple(feature.shape[1:]) for feature in features] == [(16, 8, 8), (32, 8, 8), (16, 16, 16)]
    sum(feature.square().mean() for feature in features).backward()
    gradient = model.conv_in.weight.grad.clone()
    for change in ("enable_gradient_checkpointing", "compile"):
        model.zero_grad()
        wrapped = FeatureModel(model, names)
        if change == "compile":
            torch.compiler.reset()  # other tests' models count against the limit of recompilations
            wrapped.compile(fullgraph=True, backend="aot_eager")
        else:
            model.enable_gradient_checkpointing()
        again, features = wrapped(*inputs)
        torch.testing.assert_close(again, prediction, rtol=1e-4, atol=1e-5)
        sum(feature.square().mean() for feature in features).backward()
        torch.testing.assert_close(model.conv_in.weight.grad, gradient, rtol=1e-3, atol=1e-6)
        model.disable_gradient_checkpointing()


def test_copy_blocks_refuses_what_does_not_match():
    student, teacher = UNet2DModel(**TINY_UNET), UNet2DModel(**{**TINY_UNET, "block_out_channels": [16, 64]})
    state = teacher.state_dict()
    fresh = copy_blocks(student, state)
    assert "down_blocks.0.resnets.0.conv1.weight" not in fresh and "mid_block.resnets.0.conv1.weight" in fresh
    assert torch.equal(student.conv_in.weight, teacher.conv_in.weight)
    for blocks, complaint in (
        ({"down_blocks.7": "down_blocks.0"}, 'no block "down_blocks.7"'),
        ({"conv_in": "conv_into"}, 'no "conv_into.weight"'),
        ({"mid_block": "mid_block"}, "shape"),
    ):
        with pytest.raises(ValueError, match=complaint):
            copy_blocks(student, state, blocks)


# ------------------------------------------------------------------------------------------------------- what it shows


def test_dry_run_tells_sizes_and_stops(run, teacher, tmp_path, capsys):
    flags = ("--pretrained_teacher_model", teacher, "--student", 0.5, "--output_dir", tmp_path / "none", "--dry_run")
    run("train_lift_unet", *flags)
    text = capsys.readouterr().out
    ours = UNet2DModel(**{**TINY_UNET, "block_out_channels": [8, 16]}).num_parameters()
    theirs = UNet2DModel(**TINY_UNET).num_parameters()
    for fact in (f"student: {ours:,} parameters", f"teacher: {theirs:,}", f"{ours / theirs:.2%}", "MACs", "MiB"):
        assert fact in text
    assert '"block_out_channels": [\n    8,\n    16\n  ]' in text
    assert not (tmp_path / "none").exists()


def test_macs_and_kept_bytes_of_a_known_layer():
    """A 3 x 3 convolution from 4 to 8 channels on 16 x 16: 16 * 16 * 4 * 8 * 9 MACs; only its input is kept."""
    with torch.device("meta"):
        layer = torch.nn.Conv2d(4, 8, 3, padding=1)
        image = torch.zeros(1, 4, 16, 16)
    assert profile_forward(layer, input=image) == (16 * 16 * 4 * 8 * 9, 4 * 16 * 16 * 4, 0)


def test_grid_rows_start_from_the_same_noise(distil, teacher):
    """With a learning rate of 0 the whole-width student is the teacher, and its row must be the teacher's."""
    folder = distil("--student", 1.0, "--learning_rate", 0, "--validation_steps", 2, "--num_inference_steps", 3)
    assert [path.name for path in sorted((folder / "samples").iterdir())] == [
        f"step-00000{step}.png" for step in (0, 2, 3)
    ]
    image = Image.open(folder / "samples.png").convert("L")
    rows = torch.tensor(list(image.tobytes())).view(image.height, image.width).split(image.height // 3)
    pictures = [row[:, -132:].float() for row in rows]
    assert pictures[0].std() > 20
    assert (pictures[0] - pictures[1]).abs().max() <= 2 and (pictures[0] - pictures[2]).abs().max() <= 2
