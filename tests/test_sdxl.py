"""Stable Diffusion XL's script: launched as a user does, then the pipelines that it saved are loaded and run."""

import json
import re
import shutil
from pathlib import Path

from common.students import is_narrower, match_blocks, pair_features
from common.teachers import TeacherSource

import numpy as np
import pytest
import torch
from conftest import STEADY, copy_script, digest, launch, metrics, weights
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from full_models import SDXL, make_vae
from PIL import Image
from safetensors.torch import load_file

import train_lift_sd21
import train_lift_sdxl
from tiny_models import save_sd_pipeline, save_sdxl_pipeline
from train_lift_sdxl import STUDENTS


SHORT = [
    *("--train_batch_size", 4, "--gradient_accumulation_steps", 1, "--max_train_steps", 2, "--logging_steps", 1),
    *("--num_inference_steps", 1, "--report_to", "none", "--dataloader_num_workers", 0, "--learning_rate", 1e-3),
]
PROMPTS = ("--validation_prompts", "a dark bag")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return save_sdxl_pipeline(tmp_path_factory.mktemp("sdxl"))


@pytest.fixture
def distil(run, teacher, captioned, tmp_path):
    """`distil(*flags)` runs two steps into a new folder and returns it."""

    def distil_into(*flags, output_dir=tmp_path / "student") -> Path:
        source = ("--pretrained_teacher_model", teacher, "--train_data_dir", captioned, "--student", "koala_700m")
        run("train_lift_sdxl", *source, "--output_dir", output_dir, *SHORT, *PROMPTS, *flags)
        return output_dir

    return distil_into


def generate(folder: Path, **options) -> np.ndarray:
    """An image, (32, 32, 3) in [0, 1], by a pipeline folder."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False, **options)
    pipeline.set_progress_bar_config(disable=True)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).to(pipeline.unet.dtype)
    return pipeline("a photo of a bag", num_inference_steps=2, latents=latents, output_type="np").images[0]


# --------------------------------------------------------------------------------------------------- as a user does it


def test_from_teacher_to_student_by_accelerate_launch(teacher, captioned, tmp_path):
    """In a folder that holds nothing but the script, lift_utils.py and common/."""
    copy_script("train_lift_sdxl", tmp_path)
    before = digest(teacher)
    flags = ("--pretrained_teacher_model", teacher, "--student", "koala_1b", "--train_data_dir", captioned)
    finished = launch("train_lift_sdxl.py", *flags, "--output_dir", "student", *SHORT, *PROMPTS, cwd=tmp_path)
    assert finished.returncode == 0, finished.stdout
    assert "kd=" in finished.stdout and "feat=" in finished.stdout  # beside the progress bar
    assert digest(teacher) == before

    student = tmp_path / "student"
    assert [row["step"] for row in metrics(student)] == [1, 2]
    assert all(0 < row[name] < np.inf for row in metrics(student) for name in ("loss", "kd", "feat", "grad_norm"))
    image = generate(student)
    assert image.shape == (32, 32, 3) and 0 <= image.min() < image.max() <= 1
    for part in ("text_encoder/model", "text_encoder_2/model", "vae/diffusion_pytorch_model"):
        ours, theirs = (load_file(folder / f"{part}.safetensors") for folder in (student, teacher))
        if part == "text_encoder/model":  # by the names of Transformers 4
            ours = {name.removeprefix("text_model."): tensor for name, tensor in ours.items()}
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert {path.name for path in teacher.iterdir()} <= {path.name for path in student.iterdir()}
    names = ["force_zeros_for_empty_prompt", "_class_name"]
    ours, theirs = (json.loads((folder / "model_index.json").read_text()) for folder in (student, teacher))
    assert [ours[name] for name in names] == [theirs[name] for name in names] == [True, "StableDiffusionXLPipeline"]
    card = (student / "README.md").read_text()
    for fact in (
        "--student koala_1b",
        "32 pixels",
        'StableDiffusionXLPipeline.from_pretrained("student")("a prompt")',
    ):
        assert fact in card
    grid = Image.open(student / "samples.png")
    assert grid.height == 24 + 64 + 4 and grid.width >= 3 * 64  # teacher, student, EMA student


def test_samples_are_of_the_runs_resolution_and_decoded_one_by_one(distil, decoded):
    """At --resolution the teacher's samples, too: a student that is the teacher draws the same."""
    flags = ("--student", "whole", "--learning_rate", 0, "--resolution", 64)
    distil(*flags, "--validation_prompts", "a dark bag", "a bright sneaker")
    assert len(decoded) >= 6 and {tuple(latents.shape) for latents in decoded} == {(1, 4, 16, 16)}
    teacher, student = decoded[:2], decoded[2:4]
    assert all(torch.allclose(one, other, atol=1e-4) for one, other in zip(teacher, student))
    assert (teacher[0] - teacher[1]).abs().max() > 0.01


@pytest.mark.parametrize(
    "flags",
    [
        ["--student", "ssd_1b", "--cache_latents", "--random_flip", "--mixed_precision", "bf16"],
        ["--student", "extreme", "--gradient_checkpointing", "--save_fp16_variant", "--kd_loss", "rms"],
        ["--student", "width_80", "--kd_loss", "lift", "--cache_teacher", 1, "--lambda_kd_feat", 0],
        ["--student", "vega", "--kd_loss", "none", "--caption_dropout", 0.5],
    ],
    ids=lambda flags: flags[1],
)
def test_flags_train_a_student_that_loads(distil, teacher, tmp_path, flags):
    folder = distil(*flags, "--cache_dir", tmp_path / "cache")
    ours, theirs = (
        set(weights(each)["up_blocks.1.resnets.0.conv1.weight"].flatten().tolist()) for each in (folder, teacher)
    )
    assert len(ours & theirs) < 0.01 * len(ours)  # each weight has moved, maybe to another's value
    assert all(0 < row["grad_norm"] < np.inf for row in metrics(folder))
    options = {"variant": "fp16"} if "--save_fp16_variant" in flags else {}
    assert generate(folder, **options).shape == (32, 32, 3)


def test_lora_is_saved_in_both_forms(distil):
    folder = distil("--lora_rank", 2, "--learning_rate", 1e-2, "--max_train_steps", 3)
    base, merged = weights(folder / "lora"), weights(folder)
    assert sum(not torch.equal(base[name], merged[name]) for name in base) > 40
    unet = UNet2DConditionModel.from_pretrained(folder / "lora" / "unet")
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, unet=unet, add_watermarker=False)
    pipeline.load_lora_weights(folder / "lora")
    inputs = {
        "sample": torch.randn(1, 4, 8, 8),
        "timestep": torch.tensor([700]),
        "encoder_hidden_states": torch.randn(1, 24, 32),
        "added_cond_kwargs": {"text_embeds": torch.randn(1, 20), "time_ids": torch.tensor([[32.0, 32, 0, 0, 32, 32]])},
    }
    with torch.no_grad():
        adapted = pipeline.unet(**inputs).sample
        both = UNet2DConditionModel.from_pretrained(folder / "unet")(**inputs).sample
    torch.testing.assert_close(adapted, both, rtol=1e-4, atol=1e-4)


def test_a_resumed_run_equals_an_uninterrupted_one(distil, tmp_path):
    flags = ["--lora_rank", 2, "--cache_latents", "--random_flip", "--cache_dir", tmp_path / "cache"]
    flags += ["--max_train_steps", 3, "--checkpointing_steps", 2]
    whole = distil(*flags, output_dir=tmp_path / "whole")
    resumed = tmp_path / "resumed"
    shutil.copytree(whole, resumed, ignore=shutil.ignore_patterns("vae", "checkpoint-3", "model_index.json"))
    distil(*flags, "--resume_from_checkpoint", "latest", output_dir=resumed)
    assert digest(resumed / "checkpoint-3") == digest(whole / "checkpoint-3")
    assert digest(resumed / "unet") == digest(whole / "unet")


# -------------------------------------------------------------------------------------------------------- the students


SIZES = {
    "whole": 2_567_463_684,
    "ssd_1b": 1_331_334_404,
    "vega": 745_225_604,
    "koala_1b": 1_161_184_324,
    "koala_700m": 782_822_724,
    "extreme": 84_371_524,
    "width_80": 226_296_164,
}


@pytest.fixture(scope="module")
def full_size() -> tuple[UNet2DConditionModel, AutoencoderKL]:
    with torch.device("meta"):
        return UNet2DConditionModel(**SDXL), make_vae(4)


@pytest.mark.parametrize("preset", STUDENTS)
def test_presets_of_sdxl(full_size, preset):
    unet, vae = full_size
    args = train_lift_sdxl.parse_args(["--dry_run", "--student", preset])
    args.resolution = 1024
    student, recipe = train_lift_sdxl.build_student(unet, vae, args)
    assert student.num_parameters() == SIZES[preset] and student.config.sample_size == 128
    narrow = preset == "width_80"
    pair, _ = pair_features(student, unet, recipe["features"], train_lift_sdxl.example_inputs(student))
    kinds = {type(layer) for layer in pair.projections}
    assert kinds == {torch.nn.Conv2d if narrow else torch.nn.Identity}
    assert len(pair.projections) == (2 if preset == "extreme" else 3) * 2 + (student.mid_block is not None)
    if narrow:
        assert is_narrower(student, unet)
    else:  # every tensor comes from the teacher
        assert len(match_blocks(student, unet.state_dict(), recipe.get("blocks"))) == len(student.state_dict())


@pytest.mark.parametrize("preset", ["koala_1b", "koala_700m", "extreme"])
def test_a_teacher_that_is_thinned_itself_gives_the_same_students(preset):
    """SSD-1B and Vega say the depths of their up blocks, which would not be those of the student."""
    config = {**SDXL, "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1]}
    ours, plain = (train_lift_sdxl.student_config(each, STUDENTS[preset]) for each in (config, SDXL))
    with torch.device("meta"):
        ours, plain = (UNet2DConditionModel.from_config(each).state_dict() for each in (ours, plain))
    assert {name: value.shape for name, value in ours.items()} == {name: value.shape for name, value in plain.items()}


def test_the_outer_levels_of_a_teacher_that_is_thinned_itself():
    """Its up blocks are listed from the innermost on: the outer ones are the last."""
    config = {**SDXL, "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1]}
    ours = train_lift_sdxl.student_config(config, {"levels": 2})
    assert ours["reverse_transformer_layers_per_block"] == [[2, 1, 1], 1]


@pytest.mark.parametrize("script", [train_lift_sd21, train_lift_sdxl])
def test_widths_are_of_whole_groups_of_the_student(script):
    config = script.student_config(SDXL, {"width": 0.25, "config": {"norm_num_groups": 16}})
    assert config["block_out_channels"] == [80, 160, 320] and config["norm_num_groups"] == 16


@pytest.mark.parametrize("preset", STUDENTS)
def test_a_student_of_the_teachers_blocks_computes(teacher, preset):
    """The blocks come from where the map says, and what a thinned transformer keeps are its first."""
    unet = UNet2DConditionModel.from_pretrained(teacher / "unet")
    recipe = STUDENTS[preset]
    student = UNet2DConditionModel.from_config(train_lift_sdxl.student_config(dict(unet.config), recipe))
    train_lift_sdxl.fill_student(student, unet, recipe, "teacher")
    ours, theirs = student.state_dict(), unet.state_dict()
    if preset == "width_80":
        name = "mid_block.resnets.0.conv1.weight"
        assert set(ours[name].flatten().tolist()) <= set(theirs[name].flatten().tolist())
        assert student.num_parameters() < 0.5 * unet.num_parameters()
    else:
        source = match_blocks(student, theirs, recipe.get("blocks"))
        assert all(torch.equal(ours[name], theirs[source[name]]) for name in ours)
    if preset.startswith("koala"):
        name = "up_blocks.0.attentions.{}.transformer_blocks.4.ff.net.2.weight"
        assert torch.equal(ours[name.format(1)], theirs[name.format(2)])
        assert not torch.equal(ours[name.format(1)], theirs[name.format(1)])
    inputs = {
        "sample": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([5, 900]),
        "encoder_hidden_states": torch.randn(2, 24, 32),
        "added_cond_kwargs": {"text_embeds": torch.randn(2, 20), "time_ids": torch.rand(2, 6) * 32},
    }
    with torch.no_grad():
        prediction, other = student(**inputs).sample, unet(**inputs).sample
    assert torch.isfinite(prediction).all() and torch.equal(prediction, other) == (preset == "whole")


# ------------------------------------------------------------------------------------------- what the U-Net is given


@pytest.mark.parametrize("size", [(80, 32), (33, 70), (32, 32), (7, 5), (16, 901)])
def test_time_ids_are_those_of_diffusers_script(size):
    """There the image is resized and cropped by torchvision, and the corner is half of what is too much."""
    from torchvision.transforms.v2 import functional

    width, height = size
    resized = functional.resize(Image.new("RGB", size), 32)
    corner = [max(0, round((side - 32) / 2.0)) for side in (resized.height, resized.width)]
    assert train_lift_sdxl.make_time_ids(height, width, 32).tolist() == [height, width, *corner, 32, 32]


def test_time_ids_of_a_bucket_have_its_size():
    """The width of the image is fitted, and 20 of 30 rows are kept."""
    assert train_lift_sdxl.make_time_ids(60, 80, [(32, 32), (20, 40)]).tolist() == [60, 80, 0, 5, 32, 32]
    assert train_lift_sdxl.make_time_ids(120, 160, [(20, 40)]).tolist() == [120, 160, 5, 0, 20, 40]


def test_buckets_train_alike_live_and_cached(distil, tmp_path):
    (tmp_path / "images").mkdir()
    colours, rows = np.random.default_rng(0).integers(0, 256, (8, 4, 4, 3), dtype=np.uint8), []
    for index, colour in enumerate(colours):
        size = (48, 16) if index % 2 else (40, 44)
        Image.fromarray(colour).resize(size).save(tmp_path / "images" / f"{index}.png")
        rows.append({"file_name": f"{index}.png", "text": "a dark bag"})
    (tmp_path / "images" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = ("--train_data_dir", tmp_path / "images", "--aspect_ratio_buckets", "32,32;16,48")
    flags += ("--cache_dir", tmp_path / "cache", "--train_batch_size", 2, *STEADY)
    flags += ("--random_flip", "--caption_dropout", 0.5, "--lambda_kd_feat", 0)
    live = distil(*flags, output_dir=tmp_path / "live")
    cached = distil(*flags, "--cache_latents", output_dir=tmp_path / "cached")
    losses = [[row["loss"] for row in metrics(folder)] for folder in (live, cached)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and len(losses[0]) == 2


def test_rows_tell_the_size_of_the_stored_image(teacher, tmp_path):
    tokenizers = train_lift_sdxl.load_tokenizers(TeacherSource(str(teacher), None, None, "pass another"))
    Image.new("RGB", (64, 40)).save(tmp_path / "a.png")
    batch = {"image": [{"path": str(tmp_path / "a.png"), "bytes": None}], "text": ["a bag"]}
    row = train_lift_sdxl.load_examples(batch, "image", "text", 32, tokenizers)
    assert row["images"][0].shape == (3, 32, 32) and row["input_ids"][0].shape == (2, 24)
    assert row["time_ids"][0].tolist() == [40, 64, 0, 10, 32, 32]


@pytest.mark.parametrize("zeros", [True, False])
def test_text_is_encoded_as_the_pipeline_does(teacher, tmp_path, zeros):
    folder = shutil.copytree(teacher, tmp_path / "teacher")
    index = json.loads((folder / "model_index.json").read_text()) | {"force_zeros_for_empty_prompt": zeros}
    (folder / "model_index.json").write_text(json.dumps(index))
    source = TeacherSource(str(folder), None, None, "pass another")
    encoders = train_lift_sdxl.Encoders(source, None, CPU, torch.float32)
    ids = train_lift_sdxl.tokenize(train_lift_sdxl.load_tokenizers(source), ["", "a dark bag"])
    text = train_lift_sdxl.blank_first(encoders.encode_text(ids), source)

    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    prompt, no_prompt, pooled, no_pooled = pipeline.encode_prompt("a dark bag", do_classifier_free_guidance=True)
    torch.testing.assert_close(text["text"], torch.cat([no_prompt, prompt]), rtol=0, atol=1e-6)
    torch.testing.assert_close(text["pooled"], torch.cat([no_pooled, pooled]), rtol=0, atol=1e-6)
    assert (text["text"][0].abs().max() == 0) == zeros


def test_velocity_teachers_train(distil, tmp_path, monkeypatch):
    errors, add_noise = [], train_lift_sdxl.add_noise

    def spied(scheduler, samples, noise, timesteps):
        noisy, target = add_noise(scheduler, samples, noise, timesteps)
        signal = scheduler.alphas_cumprod[timesteps][:, None, None, None]
        errors.append((target - signal.sqrt() * noise + (1 - signal).sqrt() * samples).abs().max().item())
        return noisy, target

    monkeypatch.setattr(train_lift_sdxl, "add_noise", spied)
    velocity = save_sdxl_pipeline(tmp_path / "velocity", prediction_type="v_prediction")
    flags = ("--pretrained_teacher_model", velocity, "--student", "whole", "--learning_rate", 0)
    folder = distil(*flags, "--max_train_steps", 1, "--cache_latents", "--cache_dir", tmp_path / "cache")
    assert metrics(folder)[-1]["kd_mse"] < 1e-10 and max(errors) < 1e-5  # the whole student is the teacher


@pytest.mark.parametrize(("upcast", "dtype"), [(True, torch.float32), (False, torch.float16)])
def test_a_vae_that_overflows_stays_in_float32(teacher, upcast, dtype):
    source = TeacherSource(str(teacher), None, None, "pass another")
    vae = AutoencoderKL.from_pretrained(teacher / "vae")
    vae.register_to_config(force_upcast=upcast)
    encoders = train_lift_sdxl.Encoders(source, vae, CPU, torch.float16)
    assert encoders.vae.dtype == dtype and encoders.models[1].dtype == torch.float16 and vae.dtype == torch.float32
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        expected = vae.encode(images / 127.5 - 1).latent_dist
    expected = 0.18215 * torch.stack([expected.mean, expected.std], dim=1)
    tolerance = 1e-5 if upcast else 1e-2
    torch.testing.assert_close(encoders.encode_images(images).float(), expected, rtol=tolerance, atol=tolerance)


def test_another_vae_is_used_and_saved(distil, tmp_path):
    vae = save_sdxl_pipeline(tmp_path / "other", block_out_channels=[8, 16, 32]) / "vae"
    model = AutoencoderKL.from_pretrained(vae)
    for parameter in model.parameters():
        parameter.data.mul_(1.1)
    model.save_pretrained(tmp_path / "vae")
    flags = ("--cache_latents", "--cache_dir", tmp_path / "cache", "--max_train_steps", 1)
    own = distil(*flags, output_dir=tmp_path / "own")
    folder = distil(*flags, "--vae", tmp_path / "vae")
    ours, theirs = weights(folder, "vae"), weights(tmp_path, "vae")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert metrics(folder)[0]["task"] != metrics(own)[0]["task"]  # another cache


# ------------------------------------------------------------------------------------------------- dry run, and errors


def test_dry_run_needs_no_weights(run, teacher, tmp_path, capsys):
    configs = tmp_path / "configs"
    shutil.copytree(teacher, configs, ignore=shutil.ignore_patterns("*.safetensors", "tokenizer*"))
    fixed = ("--pretrained_teacher_model", configs, "--dry_run", "--student", "koala_700m")
    run("train_lift_sdxl", *fixed)
    text = capsys.readouterr().out
    parts = {name: float(size) for name, size in re.findall(r"^  (\S.*?)\s+([\d.]+) MiB$", text, re.M)}
    pipeline = StableDiffusionXLPipeline.from_pretrained(teacher, add_watermarker=False)
    encoders = sum(model.num_parameters() for model in (pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2))
    assert parts["encoders' weights"] == pytest.approx(4 * encoders / 2**20, abs=0.06)
    assert f"teacher: {pipeline.unet.num_parameters():,} parameters" in text and "32 pixels" in text
    run("train_lift_sdxl", *fixed, "--cache_latents", "--mixed_precision", "fp16")
    text = capsys.readouterr().out
    assert "encoders' weights" not in text
    beforehand = re.search(r"^beforehand, VAE and text encoders at once, batch 4: ([\d.]+) MiB$", text, re.M)
    narrow = encoders - pipeline.vae.num_parameters()  # the VAE overflows in float16: it computes in float32
    size = 4 * 4 * 4 * pipeline.vae.config.block_out_channels[0] * 32 * 32
    whole = 4 * pipeline.vae.num_parameters() + 2 * narrow + size
    assert float(beforehand[1]) == pytest.approx(whole / 2**20, abs=0.06)


@pytest.mark.parametrize(
    ("unet", "problem"),
    [
        ({"in_channels": 9}, "its U-Net maps 9 channels to 4, and not 4 to 4"),
        ({"addition_embed_type": None}, r"its U-Net does not take the size of an image \(text_time\)"),
        ({"num_class_embeds": 10}, "its U-Net has num_class_embeds"),
        ({"cross_attention_dim": 16}, ".* embeddings of 16 and pooled ones of 20, its text encoders give 32 and 20"),
        ({"projection_class_embeddings_input_dim": 50}, ".* pooled ones of 26, its text encoders give 32 and 20"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_other_unets_are_refused(distil, tmp_path, unet, problem):
    folder = save_sdxl_pipeline(tmp_path / "teacher", **unet)
    with pytest.raises(SystemExit, match=rf"--pretrained_teacher_model {folder}: {problem}") as ended:
        distil("--pretrained_teacher_model", folder)
    assert "\n" not in ended.value.code and "pass a Stable Diffusion XL pipeline" in ended.value.code


def test_other_pipelines_are_refused(distil, teacher, sd_teacher, tmp_path):
    with pytest.raises(SystemExit, match=r"is a StableDiffusionPipeline with no text_encoder_2; pass a"):
        distil("--pretrained_teacher_model", sd_teacher)
    refiner = shutil.copytree(teacher, tmp_path / "refiner")
    index = json.loads((refiner / "model_index.json").read_text()) | {"text_encoder": [None, None]}
    (refiner / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(SystemExit, match=r"with no text_encoder; pass a Stable Diffusion XL pipeline"):
        distil("--pretrained_teacher_model", refiner)
    with pytest.raises(SystemExit, match=r"--vae .*missing does not load: .*; pass an AutoencoderKL"):
        distil("--vae", tmp_path / "missing")
    other = save_sd_pipeline(tmp_path / "sd") / "unet"
    with pytest.raises(SystemExit, match=r"--vae .*unet does not load: it is a UNet2DConditionModel"):
        distil("--vae", other)
    with pytest.raises(SystemExit, match=r"--student koala is unknown; pass ssd_1b, vega, koala_1b"):
        distil("--student", "koala")
