"""DiT's script: launched as a user does, then the pipelines that it saved are loaded and run."""

import json
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import common.reporting
from common.classes import number_classes, read_classes
from common.students import spaced_blocks
from common.vae import pixel_vae

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator, PartialState
from conftest import (
    TWO_PROCESSES,
    copy_script,
    digest,
    is_depth_pruned,
    launch,
    metrics,
    weights,
    without_time,
)
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, DiTPipeline, DiTTransformer2DModel
from diffusers.models.embeddings import LabelEmbedding
from full_models import DIT_XL
from PIL import Image
from safetensors.torch import load_file

import train_lift_dit
from tiny_models import TINY_DIT, save_dit_pipeline
from train_lift_dit import STUDENTS


SHORT = [
    *("--train_batch_size", 8, "--gradient_accumulation_steps", 1, "--max_train_steps", 3, "--logging_steps", 1),
    *("--num_inference_steps", 1, "--report_to", "none", "--dataloader_num_workers", 0, "--learning_rate", 1e-3),
]


@pytest.fixture(scope="module")
def dit_teacher(tmp_path_factory) -> Path:
    return save_dit_pipeline(tmp_path_factory.mktemp("dit"))


@pytest.fixture
def distil(run, dit_teacher, articles, tmp_path):
    """`distil(*flags)` runs three steps into a new folder and returns it.

    Without a flag that says otherwise the student is d4: every second of the eight blocks.
    """

    def distil_into(*flags, output_dir=tmp_path / "student") -> Path:
        source = [*("--pretrained_teacher_model", dit_teacher, "--train_data_dir", articles)]
        if not {"--student", "--keep_blocks", "--student_depth"} & set(flags):
            source += ["--student", "d4"]
        run("train_lift_dit", *source, "--output_dir", output_dir, *SHORT, *flags)
        return output_dir

    return distil_into


def generate(folder: Path, guidance_scale: float = 2.0, **options) -> np.ndarray:
    """Two images, (2, H, W, C) in [0, 1], by a pipeline folder."""
    pipeline = DiTPipeline.from_pretrained(folder, **options)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    numbers = [*pipeline.labels.values()][:2]
    options = {"num_inference_steps": 2, "generator": generator, "output_type": "np"}
    return pipeline(numbers, guidance_scale=guidance_scale, **options).images


# --------------------------------------------------------------------------------------------------- as a user does it


def test_from_scratch_to_student_by_accelerate_launch(articles, tmp_path):
    """The docstring's two commands, run in a folder that holds nothing but the script, lift_utils.py and common/."""
    copy_script("train_lift_dit", tmp_path)
    config = {**TINY_DIT, "sample_size": 16, "in_channels": 3, "out_channels": 6, "patch_size": 4, "num_layers": 4}
    (tmp_path / "teacher.json").write_text(json.dumps({"config": config}))
    data = ("--train_data_dir", articles, "--vae", "none", *SHORT)
    scratch = ("--kd_loss", "none", "--student", "teacher.json", "--output_dir", "teacher")
    finished = launch("train_lift_dit.py", *data, *scratch, cwd=tmp_path)
    assert finished.returncode == 0, finished.stdout
    before = digest(tmp_path / "teacher")
    assert DiTTransformer2DModel.from_pretrained(tmp_path / "teacher" / "transformer").config.num_layers == 4

    flags = ("--pretrained_teacher_model", "teacher", "--keep_blocks", "1,3", "--output_dir", "student")
    finished = launch("train_lift_dit.py", *data, *flags, "--validation_classes", "bag", 3, cwd=tmp_path)
    assert finished.returncode == 0, finished.stdout
    assert "kd=" in finished.stdout and "feat=" in finished.stdout  # beside the progress bar
    assert digest(tmp_path / "teacher") == before

    student = tmp_path / "student"
    assert [row["step"] for row in metrics(student)] == [1, 2, 3]
    logged = {"loss", "task", "vb", "kd", "kd_vb", "feat", "coarse", "fine", "weight", "lr", "grad_norm"}
    assert logged <= metrics(student)[-1].keys()
    pipeline = DiTPipeline.from_pretrained(student)
    assert pipeline.transformer.config.num_layers == 2
    assert pipeline.get_label_ids(["ankle boot", "trousers"]) == [0, 9]  # in the order of the alphabet
    assert generate(student).shape == (2, 16, 16, 3)

    card = (student / "README.md").read_text()
    for fact in (
        "library_name: diffusers",
        "`teacher`",
        "1, 3 of its 4 blocks",
        "PLACE, group size 16",
        "samples.png",
    ):
        assert fact in card
    assert str(tmp_path) not in card.split("The command:")[0]
    code = card.split("```python\n")[1].split("```")[0].replace('"student"', repr(str(student)))
    assert "DiTPipeline" in code and "guidance_scale=4.0" in code
    variables: dict = {}
    exec(code, variables)
    assert variables["image"].size == (16, 16)
    assert Image.open(student / "samples.png").height >= 2 * 64  # a row per class


def test_grid_columns_start_from_the_same_noise(distil, articles, decoded):
    """With a learning rate of 0 a student of all blocks is the teacher, and its column must be the teacher's."""
    flags = ("--keep_blocks", "0,1,2,3,4,5,6,7", "--learning_rate", 0, "--num_inference_steps", 3)
    folder = distil(*flags, "--validation_steps", 2)
    assert [path.name for path in sorted((folder / "samples").iterdir())] == [
        f"step-00000{step}.png" for step in (0, 2, 3)
    ]
    grid = np.array(Image.open(folder / "samples.png").convert("L")).astype(float)
    ink = grid[24:] < 250
    columns = np.flatnonzero(ink.mean(0) > 0.8)  # the pictures' own columns: images have no white
    blocks = [part for part in np.split(columns, np.flatnonzero(np.diff(columns) > 1) + 1) if len(part) >= 60]
    assert len(blocks) == 3
    pictures = [grid[24:, part[0] : part[0] + 64] for part in blocks]
    assert pictures[0].std() > 5 and {len(latents) for latents in decoded} == {1}  # one by one: decoding takes memory
    assert np.abs(pictures[0] - pictures[1]).max() <= 2 and np.abs(pictures[0] - pictures[2]).max() <= 2


# -------------------------------------------------------------------------------------------------------- the students


@pytest.mark.parametrize(
    ("preset", "parameters"), [("d19", 509_682_848), ("d14", 376_269_728), ("d7", 189_491_360), ("d4", 109_443_488)]
)
def test_presets_of_dit_xl(preset, parameters):
    with torch.device("meta"):
        teacher = DiTTransformer2DModel(**DIT_XL)
    assert teacher.num_parameters() == 749_826_464
    args = train_lift_dit.parse_args(["--student", preset, "--dry_run"])
    student, recipe = train_lift_dit.build_student(teacher, args)
    assert student.num_parameters() == parameters
    assert student.config.num_layers == int(preset[1:])
    assert len(recipe["features"]) == (7 if preset == "d19" else int(preset[1:]))  # as the authors pair them


def test_published_pairs():
    kept = {name: spaced_blocks(recipe["depth"], 28) for name, recipe in STUDENTS.items()}
    assert kept["d14"] == [2 * index + 1 for index in range(14)]
    assert kept["d7"] == [4 * index + 3 for index in range(7)]
    assert kept["d4"] == [6, 13, 20, 27]
    assert kept["d19"] == [0, 1, 3, 4, 6, 7, 9, 10, 12, 13, 15, 16, 18, 19, 21, 22, 24, 25, 27]
    pairs = {name: train_lift_dit.read_student(name, None, None, 28)["features"] for name in STUDENTS}
    numbers = {name: [[int(block.split(".")[1]) for block in pair] for pair in pairs[name]] for name in pairs}
    assert numbers["d14"] == [[index, 2 * index + 1] for index in range(14)]
    assert numbers["d7"] == [[index, 4 * index + 3] for index in range(7)]
    assert numbers["d19"] == [[2, 3], [5, 7], [7, 11], [10, 15], [12, 19], [15, 23], [18, 27]]
    assert numbers["d4"] == [[0, 1], [1, 8], [2, 15], [3, 22]]


@pytest.mark.parametrize(
    ("flags", "kept"),
    [
        (["--student", "d4"], [1, 3, 5, 7]),
        (["--student", "d7"], [0, 1, 2, 3, 4, 5, 7]),
        (["--keep_blocks", "0,3,6"], [0, 3, 6]),
        (["--student_depth", 8], [0, 1, 2, 3, 4, 5, 6, 7]),
    ],
    ids=lambda value: " ".join(map(str, value)),
)
def test_students_start_from_the_teachers_blocks(distil, dit_teacher, flags, kept):
    folder = distil(*flags, "--learning_rate", 0)
    assert is_depth_pruned(weights(folder), weights(dit_teacher), kept)


def idle_teacher(folder: Path, idle: tuple[int, ...]) -> Path:
    """A teacher some of whose blocks change nothing: their gates are zero."""
    save_dit_pipeline(folder)
    transformer = DiTTransformer2DModel.from_pretrained(folder / "transformer")
    for block in idle:
        torch.nn.init.zeros_(transformer.transformer_blocks[block].norm1.linear.weight)
        torch.nn.init.zeros_(transformer.transformer_blocks[block].norm1.linear.bias)
    transformer.save_pretrained(folder / "transformer")
    return folder


def test_depth_by_influence_drops_what_changes_nothing(distil, tmp_path, caplog):
    """Without its idle blocks the student computes what the teacher does."""
    teacher = idle_teacher(tmp_path / "teacher", idle=(1, 2, 4, 5))
    flags = ("--pretrained_teacher_model", teacher, "--student_depth", 4, "--learning_rate", 0)
    with caplog.at_level("INFO"):
        folder = distil(*flags)
    assert "the student keeps 0, 3, 6, 7: the same as --keep_blocks 0,3,6,7" in caplog.text
    assert "0, 3, 6, 7 of its 8 blocks" in (folder / "README.md").read_text()
    bars = np.array(Image.open(folder / "influence.png").convert("RGB"))
    assert len(np.unique(bars.reshape(-1, 3), axis=0)) > 4
    assert all(row["kd"] < 1e-6 and row["feat"] < 1e-6 for row in metrics(folder))
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.tensor([1, 999])
    models = [DiTTransformer2DModel.from_pretrained(path / "transformer").eval() for path in (teacher, folder)]
    torch.testing.assert_close(models[0](*inputs).sample, models[1](*inputs).sample, rtol=1e-4, atol=1e-5)


def test_json_student_with_blocks_and_features(distil, dit_teacher, tmp_path):
    """A narrower feed-forward cannot be asked for, fewer blocks and pairs of one's own choice can."""
    recipe = {
        "config": {"num_layers": 2},
        "blocks": {"transformer_blocks.0": "transformer_blocks.5", "proj_out_2": "proj_out_2"},
        "features": [["transformer_blocks.1", "transformer_blocks.6"]],
    }
    path = tmp_path / "student.json"
    path.write_text(json.dumps(recipe))
    folder = distil("--student", path, "--learning_rate", 0)
    assert metrics(folder)[0]["feat"] > 0
    ours, theirs = weights(folder), weights(dit_teacher)
    for rest in ("attn1.to_q.weight", "norm1.emb.class_embedder.embedding_table.weight"):
        assert torch.equal(ours[f"transformer_blocks.0.{rest}"], theirs[f"transformer_blocks.5.{rest}"])
        for block in range(8):
            assert not torch.equal(ours[f"transformer_blocks.1.{rest}"], theirs[f"transformer_blocks.{block}.{rest}"])
    assert torch.equal(ours["proj_out_2.weight"], theirs["proj_out_2.weight"])
    assert not torch.equal(ours["proj_out_1.weight"], theirs["proj_out_1.weight"])


def test_a_block_is_compared_with_the_one_that_it_starts_from(dit_teacher, tmp_path):
    path = tmp_path / "student.json"
    blocks = {f"transformer_blocks.{at}": f"transformer_blocks.{2 * at + 1}" for at in (0, 1)}
    path.write_text(json.dumps({"config": {"num_layers": 2}, "blocks": {**blocks, "pos_embed": "pos_embed"}}))
    args = train_lift_dit.parse_args(["--student", str(path), "--dry_run"])
    teacher = DiTTransformer2DModel.from_pretrained(dit_teacher / "transformer")
    assert train_lift_dit.build_student(teacher, args)[1]["features"] == [[*pair] for pair in blocks.items()]


def test_narrower_json_student_gets_projected_features(distil, tmp_path):
    path = tmp_path / "student.json"
    path.write_text(json.dumps({"config": {"num_layers": 3, "num_attention_heads": 1}}))
    folder = distil("--student", path)
    state = load_file(folder / "checkpoint-3" / "projections.safetensors")
    assert [tuple(state[f"{index}.weight"].shape) for index in range(3)] == [(16, 8)] * 3
    assert DiTPipeline.from_pretrained(folder).transformer.inner_dim == 8


def test_images_that_metadata_leave_out_are_named(distil, articles, tmp_path):
    """`datasets` drops them in silence."""
    folder = Path(shutil.copytree(articles, tmp_path / "images"))
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.png"))
    (folder / Path(files[0]).with_name("._hidden.png")).touch()  # as macOS leaves them on other systems' disks
    lines = [json.dumps({"file_name": name, "label": number % 10}) for number, name in enumerate(files[2:])]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    with pytest.raises(SystemExit, match=f"2 of {len(files)} images have no label: .*{files[0]}, .*{files[1]};"):
        distil("--train_data_dir", folder)
    distil("--train_data_dir", folder, "--max_unreadable", 0.5)


# ----------------------------------------------------------------------------------------------------- what is trained


@pytest.mark.parametrize(
    "flags",
    [
        ["--kd_loss", "lift", "--coarse_norm", "l1"],
        ["--kd_loss", "mse", "--kd_alpha", 0.5],
        ["--kd_loss", "none", "--student_depth", 3],
        ["--kd_weighting", "constant", "--lambda_kd_feat", 0],
        ["--group_size", 32, "--group_by", "position", "--no-use_ema"],
        ["--student_init", "random", "--gradient_checkpointing"],
        ["--gradient_accumulation_steps", 2, "--no-random_flip", "--max_train_samples", 24],
        ["--use_8bit_adam", "--adam_weight_decay", 0.01],
        ["--mixed_precision", "bf16"],
        ["--cache_latents", "--mixed_precision", "bf16", "--save_fp16_variant"],
    ],
    ids=lambda flags: " ".join(map(str, flags)),
)
def test_flags_train_a_student_that_loads(distil, dit_teacher, tmp_path, flags):
    before = digest(dit_teacher)
    folder = distil(*flags, "--cache_dir", tmp_path / "cache")
    assert digest(dit_teacher) == before
    after = weights(folder)
    assert all(torch.isfinite(value).all() and value.dtype == torch.float32 for value in after.values())
    moments = load_file(folder / "checkpoint-3" / "optimizer.safetensors")
    moments = [value for key, value in moments.items() if key.endswith((".exp_avg", ".state1"))]
    # Softmax does not see the bias of the keys, so its gradient may be zero; every other tensor learns.
    blocks = DiTTransformer2DModel.load_config(folder / "transformer")["num_layers"]
    assert len(moments) >= len(after) and sum(bool(value.any()) for value in moments) >= len(moments) - blocks
    rows = metrics(folder)
    assert len(rows) == 3 and all(row["loss"] > 0 and row["vb"] > 0 and row["skipped"] == 0 for row in rows)
    assert ("coarse" in rows[0]) == ("mse" not in flags and "none" not in flags)
    assert ("kd_vb" in rows[0]) == ("none" not in flags)
    assert ("feat" in rows[0]) == ("none" not in flags and "--lambda_kd_feat" not in flags)
    if "mse" in flags:
        row = rows[-1]  # where the feature term has come down to nothing
        assert row["loss"] == pytest.approx(0.5 * (row["task"] + row["vb"]) + 0.5 * (row["kd"] + row["kd_vb"]))
    if "none" in flags:
        assert rows[0]["loss"] == pytest.approx(rows[0]["task"] + rows[0]["vb"])
    assert np.isfinite(generate(folder)).all()
    if "--save_fp16_variant" in flags:
        half = DiTPipeline.from_pretrained(folder, variant="fp16", torch_dtype=torch.float16).transformer
        torch.testing.assert_close(half.proj_out_2.weight, after["proj_out_2.weight"].half())


def test_the_terms_are_weighted_as_published(distil):
    """(1 - α) · (task + vb) + α · (kd + kd_vb) + β · feat, β linear to 0."""
    rows = metrics(distil("--kd_alpha", 0.7, "--lambda_kd_feat", 3, "--max_train_steps", 4))
    for row in rows:
        share = row["step"] / 4
        expected = 0.3 * (row["task"] + row["vb"]) + 0.7 * (row["kd"] + row["kd_vb"]) + 3 * (1 - share) * row["feat"]
        assert row["loss"] == pytest.approx(expected, rel=1e-5)
        assert row["kd"] == pytest.approx(row["coarse"] + row["weight"] * row["fine"], rel=1e-5)


def test_the_loss_falls_and_the_average_is_saved(distil):
    flags = ("--max_train_steps", 60, "--kd_alpha", 1, "--lambda_kd_feat", 1, "--ema_decay", 0.9)
    folder = distil(*flags, "--learning_rate", 3e-3)
    rows = metrics(folder)

    def mean(key, part):
        return sum(row[key] for row in rows[part]) / len(rows[part])

    first, last = slice(0, 3), slice(-10, None)
    for key in ("loss", "kd", "kd_vb"):
        assert mean(key, last) < 0.6 * mean(key, first), key
    # An outlier of one model counts as a zero against the other's value, which keeps the term from falling far.
    assert mean("feat", last) < 0.9 * mean("feat", first)
    saved = weights(folder)
    for subfolder, equal in (("transformer", False), ("transformer_ema", True)):  # as in a pipeline
        model = DiTTransformer2DModel.from_pretrained(folder / "checkpoint-60", subfolder=subfolder)
        assert torch.equal(saved["proj_out_2.weight"], model.proj_out_2.weight) == equal


def test_the_learning_rate_falls_to_half(distil):
    rates = [row["lr"] for row in metrics(distil("--max_train_steps", 6, "--lr_warmup_steps", 2))]
    cosine = [0.75 + 0.25 * math.cos(math.pi * step / 4) for step in range(5)]
    assert rates == pytest.approx([0.0005, *(1e-3 * factor for factor in cosine)])
    assert rates[-1] == pytest.approx(0.5e-3)


def test_a_warm_up_as_long_as_the_run_is_said(distil, caplog):
    distil("--max_train_steps", 2, "--lr_warmup_steps", 2)
    assert "--lr_warmup_steps 2 leaves none of the 2 steps at the full learning rate; pass fewer" in caplog.text


def test_without_learned_variance(distil, tmp_path):
    """A teacher whose config does not say its out_channels: the student's says it, since DiTPipeline reads it."""
    teacher = save_dit_pipeline(tmp_path / "teacher", out_channels=None)
    folder = distil("--pretrained_teacher_model", teacher)
    rows = metrics(folder)
    assert all(not {"vb", "kd_vb"} & row.keys() and row["loss"] > 0 for row in rows)
    assert DiTPipeline.from_pretrained(folder).transformer.config.out_channels == 4
    assert generate(folder).shape == (2, 32, 32, 3)


def test_the_original_layout_loads(distil, tmp_path):
    """facebook/DiT-XL-2-256 says Transformer2DModel in its config, with fields that DiT has lost since."""
    teacher = save_dit_pipeline(tmp_path / "teacher")
    path = teacher / "transformer" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "_class_name": "Transformer2DModel", "cross_attention_dim": None}))
    folder = distil("--pretrained_teacher_model", teacher)
    assert json.loads((folder / "transformer" / "config.json").read_text())["_class_name"] == "DiTTransformer2DModel"
    assert DiTPipeline.from_pretrained(folder).labels == {"ankle boot": 999, "t-shirt": 0, "tee": 0, "trousers": 1}


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_prediction_types_by_the_schedulers_config(distil, run, articles, tmp_path, prediction_type):
    (tmp_path / "scratch.json").write_text(
        json.dumps({"config": {**TINY_DIT, "in_channels": 1, "out_channels": 2, "num_layers": 2}})
    )
    scratch = ("--kd_loss", "none", "--student", tmp_path / "scratch.json", "--vae", "none", *SHORT)
    scratch += ("--train_data_dir", articles, "--prediction_type", prediction_type)
    run("train_lift_dit", *scratch, "--output_dir", tmp_path / "teacher")
    folder = distil("--pretrained_teacher_model", tmp_path / "teacher", "--keep_blocks", 1)
    for path in (tmp_path / "teacher", folder):
        assert DDIMScheduler.from_pretrained(path, subfolder="scheduler").config.prediction_type == prediction_type
    assert generate(folder).shape == (2, 8, 8, 1)


def test_scratch_in_the_latents_of_a_vae(run, articles, dit_teacher, tmp_path):
    (tmp_path / "scratch.json").write_text(json.dumps({"config": {**TINY_DIT, "num_embeds_ada_norm": 10}}))
    flags = ("--kd_loss", "none", "--student", tmp_path / "scratch.json", "--vae", dit_teacher / "vae", *SHORT)
    flags += ("--train_data_dir", articles, "--cache_latents", "--cache_dir", tmp_path / "cache")
    run("train_lift_dit", *flags, "--output_dir", tmp_path / "student")
    assert generate(tmp_path / "student", guidance_scale=1.0).shape == (2, 32, 32, 3)
    card = (tmp_path / "student" / "README.md").read_text()
    assert "The null class is 10" in card and "guidance_scale=1.0" in card
    flags = ("--pretrained_teacher_model", dit_teacher, "--student", "d4", "--kd_loss", "none", *SHORT)
    run("train_lift_dit", *flags, "--train_data_dir", articles, "--output_dir", tmp_path / "alone")
    card = (tmp_path / "alone" / "README.md").read_text()
    assert "Teacher: `" in card and "for the teacher's output" not in card
    named = {number: name for name, number in DiTPipeline.from_pretrained(tmp_path / "alone").labels.items()}
    assert named == dict(enumerate(sorted(path.name for path in articles.iterdir())))


def test_pixel_vae_changes_nothing():
    for channels in (1, 3):
        vae = pixel_vae(channels)
        images = torch.rand(2, channels, 16, 16) * 2 - 1
        images[0, :, :2] = 1.0
        latents = vae.encode(images).latent_dist
        torch.testing.assert_close(latents.mode(), images, rtol=0, atol=2e-6)
        assert latents.std.max() < 1e-6
        torch.testing.assert_close(vae.decode(3 * images).sample, 3 * images, rtol=0, atol=2e-5)
        half = vae.half().decode(images.half()).sample
        torch.testing.assert_close(half.float(), images, rtol=0, atol=1 / 255)


def test_compiled_equals_eager(distil, compile_quickly, tmp_path):
    eager = distil("--keep_blocks", "1,3", output_dir=tmp_path / "eager")
    assert not compile_quickly
    compiled = distil("--keep_blocks", "1,3", "--compile", output_dir=tmp_path / "compiled")
    assert len(compile_quickly) == 2
    for ours, theirs in zip(metrics(eager), metrics(compiled)):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
    assert weights(compiled).keys() == weights(eager).keys()


def test_checkpointing_changes_nothing(distil, tmp_path):
    plain = distil(output_dir=tmp_path / "plain")
    recomputed = distil("--gradient_checkpointing", output_dir=tmp_path / "recomputed")
    for ours, theirs in zip(metrics(plain), metrics(recomputed)):
        for key in ("loss", "feat", "grad_norm"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4)


# ------------------------------------------------------------------------------------------------------ the loss terms


def reference_bound(betas, kind, clean, noisy, prediction, variance, step) -> float:
    """Bits per dimension of one sample's term of the variational bound, element by element, in Python's floats."""
    kept = [1.0]
    for beta in betas:
        kept.append(kept[-1] * (1 - beta))
    now, before = kept[step + 1], kept[step]

    def posterior_variance(at):
        return betas[at] * (1 - kept[at]) / (1 - kept[at + 1])

    least = math.log(posterior_variance(max(step, 1)))
    most = math.log(betas[step])
    total = 0.0
    elements = list(zip(clean.flatten(), noisy.flatten(), prediction.flatten(), variance.flatten()))
    for x0, xt, output, v in elements:
        if kind == "epsilon":
            guess = (xt - math.sqrt(1 - now) * output) / math.sqrt(now)
        elif kind == "v_prediction":
            guess = math.sqrt(now) * xt - math.sqrt(1 - now) * output
        else:
            guess = output
        first = betas[step] * math.sqrt(before) / (1 - now)
        second = (1 - before) * math.sqrt(1 - betas[step]) / (1 - now)
        mean, log_variance = first * guess + second * xt, (v + 1) / 2 * most + (1 - v) / 2 * least
        if step == 0:
            sigma = math.exp(0.5 * log_variance)

            def below(value, mean=mean, sigma=sigma):
                return 0.5 * math.erfc(-(value - mean) / sigma / math.sqrt(2))

            low = 0.0 if x0 < -0.999 else below(x0 - 1 / 255)
            high = 1.0 if x0 > 0.999 else below(x0 + 1 / 255)
            total -= math.log(max(high - low, 1e-12))
        else:
            truth = first * x0 + second * xt
            ratio = math.exp(least - log_variance)
            total += 0.5 * (log_variance - least - 1 + ratio + (truth - mean) ** 2 / math.exp(log_variance))
    return total / len(elements) / math.log(2)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
def test_the_bound_is_the_references(kind, schedule):
    scheduler = DDPMScheduler(prediction_type=kind, beta_schedule=schedule)
    process = train_lift_dit.ReverseProcess(scheduler, torch.device("cpu"))
    torch.manual_seed(0)
    timesteps = torch.tensor([0, 1, 2, 250, 800, 0, 990])
    clean = (torch.rand(7, 2, 4, 4) * 2 - 1) * 1.05
    clean[[0, 5], :, 0], clean[[0, 5], :, 1] = 1.0, -1.0  # the open bins
    noise = torch.randn(7, 2, 4, 4)
    noisy = scheduler.add_noise(clean, noise, timesteps)
    exact = {"epsilon": noise, "v_prediction": scheduler.get_velocity(clean, noise, timesteps), "sample": clean}[kind]
    prediction = (exact + 0.1 * torch.randn_like(exact)).requires_grad_()
    variance = torch.randn(7, 2, 4, 4).clamp(-1.2, 1.2).requires_grad_()
    betas = scheduler.betas.double().tolist()
    expected = [
        reference_bound(betas, kind, *(part[row].double().detach().numpy() for part in parts), int(timesteps[row]))
        for parts in [(clean, noisy, prediction, variance)]
        for row in range(7)
    ]
    for row in range(7):
        one = slice(row, row + 1)
        ours = train_lift_dit.variational_bound(
            process, prediction[one], variance[one], clean[one], noisy[one], timesteps[one]
        )
        assert ours.item() == pytest.approx(expected[row], rel=2e-3, abs=1e-5), (row, kind)
    whole = train_lift_dit.variational_bound(process, prediction, variance, clean, noisy, timesteps)
    assert whole.item() == pytest.approx(sum(expected) / 7, rel=2e-3)
    whole.backward()
    assert prediction.grad is None  # the variance alone learns
    assert torch.isfinite(variance.grad).all() and variance.grad.flatten(1).any(1).all()


def test_the_bound_is_least_at_the_posterior():
    """With the exact prediction the term is 0 for the posterior's variance, and grows with the variance."""
    scheduler = DDPMScheduler()
    process = train_lift_dit.ReverseProcess(scheduler, torch.device("cpu"))
    clean, noise, timesteps = torch.rand(3, 1, 4, 4) * 2 - 1, torch.randn(3, 1, 4, 4), torch.tensor([10, 100, 500])
    noisy = scheduler.add_noise(clean, noise, timesteps)
    bounds = [
        train_lift_dit.variational_bound(process, noise, torch.full_like(noise, v), clean, noisy, timesteps).item()
        for v in (-1, 0, 1)
    ]
    assert abs(bounds[0]) < 1e-4 and bounds[0] < bounds[1] < bounds[2]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_without_signal_the_bounds_are_finite(prediction_type):
    """At a last timestep of zero SNR predicted noise does not say what the image is, and its terms are 0."""
    scheduler = DDPMScheduler(rescale_betas_zero_snr=True, prediction_type=prediction_type)
    process = train_lift_dit.ReverseProcess(scheduler, torch.device("cpu"))
    torch.manual_seed(0)
    clean, noisy, prediction = (torch.randn(2, 1, 4, 4) for _ in range(3))
    variance, other = (torch.randn(2, 1, 4, 4, requires_grad=True) for _ in range(2))
    for timesteps, counts in ((torch.tensor([999, 999]), prediction_type != "epsilon"), (torch.tensor([5, 9]), True)):
        bound = train_lift_dit.variational_bound(process, prediction, variance, clean, noisy, timesteps)
        outputs = (prediction, variance), (clean, other)
        kd = train_lift_dit.variance_kd(process, *outputs, noisy, timesteps)
        for loss in (bound, kd):
            (gradient,) = torch.autograd.grad(loss, variance, retain_graph=True)
            assert loss.isfinite() and gradient.isfinite().all() and (loss != 0) == counts


def test_samples_start_from_noise_of_the_samplers_size():
    """Euler's is 157 times as large as DDIM's."""
    accelerator = Accelerator(cpu=True)
    config = SimpleNamespace(in_channels=3, sample_size=4, num_embeds_ada_norm=10)
    vae = SimpleNamespace(
        config=SimpleNamespace(scaling_factor=157.0), decode=lambda latents: SimpleNamespace(sample=latents)
    )
    scheduler = SimpleNamespace(config=SimpleNamespace(num_train_timesteps=9, get=lambda name: None), timesteps=[])
    scheduler.set_timesteps, scheduler.init_noise_sigma = lambda steps, device: None, 157.0
    how = (vae, scheduler, [1, 2], 5, 2, 4.0, accelerator)
    images = train_lift_dit.sample_images(SimpleNamespace(config=config), *how)
    train_lift_dit.seed_step(5)
    noise = (torch.randn(2, 3, 4, 4) / 2 + 0.5).clamp(0, 1)
    found = torch.stack([torch.from_numpy(np.array(image)) for image in images]).permute(0, 3, 1, 2)
    assert (found / 255 - noise).abs().max() < 0.003


def test_a_sampler_that_takes_the_variance_gets_it(distil, dit_teacher, tmp_path):
    teacher = shutil.copytree(dit_teacher, tmp_path / "teacher")
    DDPMScheduler(variance_type="learned_range").save_pretrained(teacher / "scheduler")
    index = json.loads((teacher / "model_index.json").read_text())
    (teacher / "model_index.json").write_text(json.dumps({**index, "scheduler": ["diffusers", "DDPMScheduler"]}))
    folder = distil("--pretrained_teacher_model", teacher, "--max_train_steps", 1)
    assert (folder / "samples.png").exists()


def test_variance_kd_is_the_divergence_of_the_two_gaussians():
    scheduler = DDPMScheduler()
    process = train_lift_dit.ReverseProcess(scheduler, torch.device("cpu"))
    torch.manual_seed(0)
    noisy, timesteps = torch.randn(5, 2, 4, 4), torch.tensor([0, 1, 30, 400, 999])
    ours = [torch.randn(5, 2, 4, 4, requires_grad=True) for _ in range(2)]
    theirs = [ours[0].detach() + 0.05 * torch.randn(5, 2, 4, 4), torch.randn(5, 2, 4, 4, requires_grad=True)]
    loss = train_lift_dit.variance_kd(process, ours, theirs, noisy, timesteps)
    gaussians = []
    for prediction, variance in (theirs, ours):
        mean, log_variance = process.predicted(prediction, variance, noisy, timesteps)
        gaussians.append(torch.distributions.Normal(mean.double(), (0.5 * log_variance.double()).exp()))
    expected = torch.distributions.kl_divergence(*gaussians).mean() / math.log(2)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-3)
    loss.backward()
    assert ours[0].grad is None and ours[1].grad.flatten(1).any(1).all()
    assert train_lift_dit.variance_kd(process, theirs, theirs, noisy, timesteps).abs() < 1e-6


def test_the_predicted_mean_is_the_schedulers():
    """DDPMScheduler's own step, without its noise, lands on the same mean."""
    scheduler = DDPMScheduler(clip_sample=False)
    process = train_lift_dit.ReverseProcess(scheduler, torch.device("cpu"))
    torch.manual_seed(0)
    for step in (5, 300, 950):
        noisy, prediction, variance = (torch.randn(1, 2, 4, 4) for _ in range(3))
        mean, log_variance = process.predicted(prediction, variance, noisy, torch.tensor([step]))
        generator = torch.Generator().manual_seed(0)
        ours = scheduler.step(prediction, step, noisy, generator=generator).prev_sample
        noise = torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(0))
        sigma = scheduler._get_variance(step, variance_type="fixed_small").sqrt()
        torch.testing.assert_close(ours - sigma * noise, mean, rtol=1e-3, atol=1e-4)
        theirs = scheduler._get_variance(step, predicted_variance=variance, variance_type="learned_range")
        torch.testing.assert_close(theirs, log_variance, rtol=1e-3, atol=1e-3)


def test_each_tensors_own_outliers_are_masked():
    torch.manual_seed(0)
    ours = torch.randn(2, 5, 8, requires_grad=True)
    theirs = torch.randn(2, 5, 8)
    with torch.no_grad():
        ours[0, 1, 2] = 40.0  # each hides the rest of its sample's outliers, and not the other sample's
        theirs[1, 3, 4] = -40.0
    masked = []
    for tokens in (ours.detach().double().numpy(), theirs.double().numpy()):
        usual = [np.abs(sample - sample.mean()) <= 2 * sample.std() for sample in tokens]
        masked.append(tokens * np.stack(usual))
    loss = train_lift_dit.masked_mse(ours, theirs)
    assert loss.item() == pytest.approx(((masked[0] - masked[1]) ** 2).mean(), rel=1e-5)  # over all 80 elements
    loss.backward()
    kept = torch.tensor(masked[0] != 0)
    torch.testing.assert_close(ours.grad[kept], torch.tensor(2 * (masked[0] - masked[1]) / 80).float()[kept])
    assert not ours.grad[~kept].any() and ours.grad[1, 3, 4] != 0  # the teacher's outlier counts as a zero
    assert train_lift_dit.masked_mse(ours.bfloat16(), theirs.bfloat16()).dtype == torch.float32
    assert torch.isnan(train_lift_dit.masked_mse(torch.full_like(theirs, torch.nan), theirs))


# ---------------------------------------------------------------------------------------------------------- the labels


@pytest.mark.parametrize("share", [0, 0.5, 1])
def test_dropped_labels_are_the_null_class_for_student_and_teacher(distil, monkeypatch, share):
    """What reaches each block's label embedding, in the student, which is in training mode, and in the teacher."""
    seen: dict[bool, list[torch.Tensor]] = {True: [], False: []}
    embed, in_data, losses = torch.nn.Embedding.forward, [], train_lift_dit.compute_losses

    def spied_embed(module, labels):
        if module.num_embeddings == 1001 and recording:
            seen[module.weight.requires_grad].append(labels.clone())
        return embed(module, labels)

    recording: list[int] = []

    def spied_losses(student, teacher, batch, *arguments, **options):
        assert student.training
        in_data.append(batch["labels"])
        recording.append(1)
        result = losses(student, teacher, batch, *arguments, **options)
        recording.clear()
        return result

    monkeypatch.setattr(torch.nn.Embedding, "forward", spied_embed)
    monkeypatch.setattr(train_lift_dit, "compute_losses", spied_losses)
    distil("--label_dropout", share, "--max_train_steps", 4, "--no-use_ema")
    data, steps = torch.stack(in_data), 4
    # A step calls the embedding once per block, and block 0's once more for the output.
    student, teacher = (torch.stack(labels).view(steps, -1, 8) for labels in (seen[True], seen[False]))
    assert student.shape[1] == 5 and teacher.shape[1] == 9
    assert torch.equal(student, student[:, :1].expand_as(student))
    assert torch.equal(teacher, student[:, :1].expand_as(teacher))
    dropped = student[:, 0] == 1000
    assert torch.equal(torch.where(dropped, data, student[:, 0]), data)
    assert {0: dropped.sum() == 0, 0.5: 4 < dropped.sum() < 28, 1: dropped.all()}[share]


def test_the_null_class_stays_usable(distil, tmp_path):
    """It alone learns where all labels are dropped, and guidance by it changes the samples."""
    teacher = weights(save_dit_pipeline(tmp_path / "teacher"))
    folder = distil("--label_dropout", 1, "--no-use_ema")
    for block, source in enumerate((1, 3, 5, 7)):
        name = "norm1.emb.class_embedder.embedding_table.weight"
        ours, theirs = (
            weights(folder)[f"transformer_blocks.{block}.{name}"],
            teacher[f"transformer_blocks.{source}.{name}"],
        )
        assert ours.shape == (1001, 16)
        assert torch.equal(ours[:1000], theirs[:1000]) and not torch.equal(ours[1000], theirs[1000])
    assert not np.allclose(generate(folder, guidance_scale=1.0), generate(folder, guidance_scale=6.0), atol=1e-3)


def test_label_embeddings_do_not_drop_by_themselves():
    model = DiTTransformer2DModel(**TINY_DIT).train()
    config, names = dict(model.config), list(model.state_dict())
    inputs = torch.randn(64, 4, 8, 8), torch.zeros(64, dtype=torch.long), torch.zeros(64, dtype=torch.long)
    assert not torch.equal(model(*inputs).sample, model(*inputs).sample)
    train_lift_dit.keep_labels(model)
    assert torch.equal(model(*inputs).sample, model(*inputs).sample)
    assert dict(model.config) == config and list(model.state_dict()) == names
    tables = [
        module.embedding_table.num_embeddings for module in model.modules() if isinstance(module, LabelEmbedding)
    ]
    assert tables == [1001] * 8


def test_numeric_sub_folders_are_class_numbers(distil, articles, tmp_path, monkeypatch):
    """Sorted as text, 10 comes before 2, and would be class 1."""
    for number, name in ((2, "bag"), (10, "coat"), (207, "dress")):
        shutil.copytree(articles / name, tmp_path / "data" / str(number))
    seen, losses = [], train_lift_dit.compute_losses

    def spied_losses(student, teacher, batch, *arguments, **options):
        seen.append(batch["labels"])
        return losses(student, teacher, batch, *arguments, **options)

    monkeypatch.setattr(train_lift_dit, "compute_losses", spied_losses)
    distil("--train_data_dir", tmp_path / "data", "--train_batch_size", 4, "--max_train_steps", 5)
    assert set(torch.cat(seen).tolist()) == {2, 10, 207}


def test_sub_folders_with_the_teachers_names_are_its_classes(caplog):
    """Not in the order of the names, as without them; a name that is not among them is said."""
    PartialState()  # which Accelerate's loggers need
    known = {0: "sneaker", 1: "bag, handbag", 2: "coat"}

    def number(*names: str) -> tuple:
        features = datasets.Features({"label": datasets.ClassLabel(names=list(names))})
        rows = datasets.Dataset.from_dict({"label": list(range(len(names)))}, features=features)
        return number_classes(rows, "label", 3, known)

    assert number("bag", "coat", "sneaker") == ([1, 2, 0], {1: "bag", 2: "coat", 0: "sneaker"})
    assert number("coat", "handbag")[0] == [2, 1]
    assert number("n01", "n02", "n03") == (None, {0: "n01", 1: "n02", 2: "n03"})
    assert number("2", "0")[0] == [2, 0]
    assert number("bag", "hat")[0] is None
    assert "hat is not one of the teacher's classes, and 1 others are: class i is the i-th name" in caplog.text
    known[0] = "sneaker, bag"  # which may be the first or the second now
    assert number("bag", "coat", "sneaker")[0] is None


# ---------------------------------------------------------------------------------------------------- cache and resume


def test_latents_are_scaled(dit_teacher):
    """As the pipeline's decoding undoes it; without a VAE images are their own latents."""
    vae = AutoencoderKL.from_pretrained(dit_teacher / "vae")
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        expected = vae.encode(images / 127.5 - 1).latent_dist
    latents, pixels = (
        train_lift_dit.Encoders(each, torch.device("cpu"), torch.float32).encode_images(images) for each in (vae, None)
    )
    torch.testing.assert_close(latents / 0.18215, torch.stack([expected.mean, expected.std], dim=1))
    torch.testing.assert_close(pixels, torch.stack([images / 127.5 - 1, torch.zeros(2, 3, 32, 32)], dim=1))


def test_cached_and_uncached_runs_see_the_same_data(distil, tmp_path):
    flags = ("--cache_dir", tmp_path / "cache", "--max_train_steps", 4)
    plain = distil(*flags, output_dir=tmp_path / "plain")
    cached = distil(*flags, "--cache_latents", output_dir=tmp_path / "cached")
    for ours, theirs in zip(metrics(plain), metrics(cached)):
        for key in ("loss", "task", "kd", "feat"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4)
    caches = list((tmp_path / "cache" / "lift-encodings").iterdir())
    assert len(caches) == 1
    distil(*flags, "--cache_latents", "--no-random_flip", output_dir=tmp_path / "unflipped")
    assert len(list((tmp_path / "cache" / "lift-encodings").iterdir())) == 2


def test_a_resumed_run_equals_an_uninterrupted_one(distil, tmp_path):
    flags = ["--student_depth", 3, "--cache_latents", "--cache_dir", tmp_path / "cache"]
    flags += ["--max_train_steps", 3, "--checkpointing_steps", 2]
    flags += ["--train_batch_size", 20]  # two batches an epoch, eight images not in any
    whole = distil(*flags, output_dir=tmp_path / "whole")
    resumed = tmp_path / "resumed"
    shutil.copytree(whole / "checkpoint-2", resumed / "checkpoint-2")
    shutil.copy(whole / "metrics.jsonl", resumed)
    distil(*flags, "--resume_from_checkpoint", "latest", output_dir=resumed)
    assert digest(resumed / "checkpoint-3") == digest(whole / "checkpoint-3") != digest(whole / "checkpoint-2")
    assert digest(resumed / "transformer") == digest(whole / "transformer")
    assert without_time(resumed) == without_time(whole) and len(metrics(whole)) == 3


def test_a_resumed_run_keeps_the_choice_of_blocks(distil, tmp_path, monkeypatch):
    """It reads blocks.json, whatever would be measured now, and measures nothing; a new run measures anew.

    New is also one whose folder has the choice of a run that came to no checkpoint, maybe of another teacher.
    """
    flags = ("--student_depth", 3, "--learning_rate", 0, "--max_train_steps", 2, "--checkpointing_steps", 1)
    path, resume = tmp_path / "student" / "blocks.json", ("--resume_from_checkpoint", "latest")
    path.parent.mkdir()
    path.write_text('{"kept": [0, 1, 2]}')
    monkeypatch.setattr(train_lift_dit, "measure_influence", lambda *_, **__: [0.1, 0.9, 0.2, 0.8, 0.3, 0.7, 0.4, 0.5])
    folder = distil(*flags, *resume)
    chosen = json.loads(path.read_text())
    assert chosen["kept"] == [1, 3, 5] and len(chosen["influence"]) == 8

    def not_again(*arguments, **options):
        raise AssertionError("the influence is measured again")

    monkeypatch.setattr(train_lift_dit, "measure_influence", not_again)
    distil(*flags, *resume, "--max_train_steps", 3)
    assert "1, 3, 5 of its 8 blocks" in (folder / "README.md").read_text()
    assert json.loads(path.read_text()) == chosen

    for content, complaint in (
        ('{"kept": [0, 3, 5]}', "is of another student .the teacher's blocks that it keeps differ"),
        (json.dumps({"kept": [0, 1]}), "it keeps 2 blocks; pass the same depth as before, or another --output_dir"),
        ("{", "--student_depth 3 does not go with .*blocks.json: Expecting property name"),
        ("[]", "--student_depth 3 does not go with .*blocks.json: list indices"),
    ):
        path.write_text(content)
        with pytest.raises(SystemExit, match=complaint):
            distil(*flags, *resume)
    with pytest.raises(AssertionError, match="measured again"):
        distil(*flags, output_dir=tmp_path / "new")


def test_two_processes_choose_the_same_blocks(dit_teacher, articles, tmp_path):
    """The second reads the choice of the first, however differently it would measure. Their steps draw other noise."""
    (tmp_path / "run.py").write_text(
        "import sys, torch.distributed as dist\n"
        f"sys.path.insert(0, {str(Path(train_lift_dit.__file__).parent)!r})\n"
        "import train_lift_dit as script\n"
        "measure, build, draw = script.measure_influence, script.build_student, script.make_draws\n"
        "def say(text):\n"
        "    sys.stdout.write(f'{text}\\n')\n"  # at once: parts of a line would mix with the other process's
        "def measured(*arguments, **options):\n"
        "    say(f'measured by {dist.get_rank()}')\n"
        "    return measure(*arguments, **options)\n"
        "def drawn(*arguments, **options):\n"
        "    draws = draw(*arguments, **options)\n"
        "    say(f'process {dist.get_rank()} draws {draws[\"noise\"].sum()}')\n"
        "    return draws\n"
        "def built(teacher, args, kept=None):\n"
        "    say(f'process {dist.get_rank()} keeps {kept}')\n"
        "    return build(teacher, args, kept)\n"
        "script.measure_influence, script.build_student, script.make_draws = measured, built, drawn\n"
        "script.main(script.parse_args())\n"
    )
    output_dir = tmp_path / "student"
    flags = ("--pretrained_teacher_model", dit_teacher, "--train_data_dir", articles, "--output_dir", output_dir)
    command = (tmp_path / "run.py", *flags, *SHORT, "--student_depth", 3, "--max_train_steps", 1)
    finished = launch(*command, prefix=TWO_PROCESSES)
    assert finished.returncode == 0, finished.stdout
    kept = json.loads((output_dir / "blocks.json").read_text())["kept"]
    assert finished.stdout.count("measured by 0") == 1 and "measured by 1" not in finished.stdout
    assert all(f"process {rank} keeps {kept}" in finished.stdout for rank in (0, 1))
    last = dict(re.findall(r"process (\d) draws (\S+)", finished.stdout))
    assert len(set(last.values())) == 2


# ------------------------------------------------------------------------------------------------------- what it shows


def test_dry_run_needs_no_weights(run, dit_teacher, tmp_path, capsys):
    shutil.copytree(dit_teacher, tmp_path / "teacher", ignore=shutil.ignore_patterns("*.safetensors"))
    flags = ("--pretrained_teacher_model", tmp_path / "teacher", "--output_dir", tmp_path / "none", "--dry_run")
    run("train_lift_dit", *flags, "--student_depth", 2)
    text = capsys.readouterr().out
    ours, theirs = (DiTTransformer2DModel(**{**TINY_DIT, "num_layers": depth}).num_parameters() for depth in (2, 8))
    for fact in (f"student: {ours:,} parameters", f"teacher: {theirs:,}", f"{ours / theirs:.2%}", "MACs", "MiB"):
        assert fact in text
    assert '"num_layers": 2' in text and not (tmp_path / "none").exists()
    assert "FLOPs of student, teacher and encoders" in text and "beforehand" not in text
    run("train_lift_dit", *flags, "--student_depth", 2, "--cache_latents")
    text = capsys.readouterr().out
    assert re.search(r"^beforehand, the VAE, batch 16: [\d.]+ MiB$", text, re.M) and "and encoders" not in text
    (tmp_path / "pixels.json").write_text(json.dumps({"config": {**TINY_DIT, "in_channels": 3, "out_channels": 3}}))
    run("train_lift_dit", "--kd_loss", "none", "--student", tmp_path / "pixels.json", "--vae", "none", "--dry_run")
    assert "encoders" not in capsys.readouterr().out


def test_classes_of_the_grid_by_number_and_name(distil, monkeypatch):
    rows, grid = [], common.reporting.labelled_grid

    def spied_grid(entries, **options):
        rows.append([label for label, _ in entries])
        return grid(entries, **options)

    monkeypatch.setattr(common.reporting, "labelled_grid", spied_grid)
    distil("--validation_classes", "tee", "ankle boot", 5)
    assert rows and all(labels == ["t-shirt, tee", "ankle boot", "class 5"] for labels in rows)


def test_a_name_of_several_classes_is_not_guessed():
    with pytest.raises(SystemExit) as refused:
        read_classes(["5", "crane"], 1000, {134: "crane", 517: "crane", 5: "electric ray"})
    says = "--validation_classes crane is the name of the classes [134, 517]; pass one of these numbers"
    assert refused.value.code == f"error: {says}"


def test_the_teacher_by_default():
    args = train_lift_dit.parse_args(["--student", "d14", "--dry_run"])
    assert args.pretrained_teacher_model == "facebook/DiT-XL-2-256"
