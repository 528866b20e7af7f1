"""Stable Diffusion 3's script: run as a user does, then what it saved is loaded and run."""

import gc
import json
import re
import shutil
from pathlib import Path

import common.sd3_text
from common.adapters import add_adapters
from common.sd3_text import CLIPS, T5, TEXT_ENCODERS, TextEncoders, TextLayout, join_text, load_tokenizer, tokenize
from common.students import copy_blocks, pair_features, share_blocks
from common.teachers import TeacherSource

import pytest
import torch
from conftest import (
    STEADY,
    copy_script,
    digest,
    is_depth_pruned,
    launch,
    metrics,
    same,
    weights,
    without_time,
)
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from full_models import SD3_MEDIUM, SD35_LARGE, SD35_MEDIUM
from huggingface_hub.errors import GatedRepoError
from PIL import Image
from safetensors.torch import load_file

import train_lift_sd3
from tiny_models import TINY_SD3, save_sd3_pipeline


SHORT = [
    *("--train_batch_size", 4, "--gradient_accumulation_steps", 1, "--max_train_steps", 3, "--logging_steps", 1),
    *("--dataloader_num_workers", 0, "--num_inference_steps", 2, "--report_to", "none", "--learning_rate", 1e-3),
    *("--max_sequence_length", 8),
]
TEXT_PARTS = [f"{kind}{number}" for number in ("", "_2", "_3") for kind in ("text_encoder", "tokenizer")]
LAYOUT = TextLayout.of(TINY_SD3, 8)
SD35 = {"dual_attention_layers": [0, 1, 2, 3], "qk_norm": "rms_norm"}


@pytest.fixture(scope="session")
def sd3_teacher(tmp_path_factory) -> Path:
    return save_sd3_pipeline(tmp_path_factory.mktemp("sd3"))


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def distil(run, sd3_teacher, captioned, cache, tmp_path):
    """`distil(*flags)` runs three steps into a new folder and returns it."""
    # Garbage collection takes much of the time of tiny runs.
    gc.freeze()

    def distil_into(*flags, output_dir=tmp_path / "student") -> Path:
        run(
            "train_lift_sd3",
            *("--pretrained_teacher_model", sd3_teacher, "--train_data_dir", captioned, "--output_dir", output_dir),
            *("--cache_dir", cache, *SHORT, *flags),
        )
        return output_dir

    return distil_into


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in metrics(folder)]


def config(folder: Path) -> dict:
    return json.loads((folder / "transformer" / "config.json").read_text())


def embeddings() -> dict[str, torch.Tensor]:
    """Random embeddings of two prompts, for pipelines that Diffusers itself cannot give strings."""
    draw = torch.Generator().manual_seed(1)
    width, pooled = TINY_SD3["joint_attention_dim"], TINY_SD3["pooled_projection_dim"]
    return {
        **{f"{sign}prompt_embeds": torch.randn(2, 12, width, generator=draw) for sign in ("", "negative_")},
        **{f"{sign}pooled_prompt_embeds": torch.randn(2, pooled, generator=draw) for sign in ("", "negative_")},
    }


def forward(transformer: SD3Transformer2DModel) -> torch.Tensor:
    draw = torch.Generator().manual_seed(2)
    shapes = {"hidden_states": (2, 4, 8, 8), "encoder_hidden_states": (2, 9, 48), "pooled_projections": (2, 32)}
    inputs = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    with torch.no_grad():
        return transformer.eval()(timestep=torch.tensor([100.0, 900.0]), return_dict=False, **inputs)[0]


# --------------------------------------------------------------------------------------------------- as a user does it


def test_from_random_weights_to_student_by_accelerate_launch(run, captioned, cache, sd3_teacher, tmp_path):
    """A teacher trained by the script itself, then the docstring's command where nothing but the script is."""
    data = ("--train_data_dir", captioned, "--cache_dir", cache, *SHORT)
    scratch = ("--pretrained_teacher_model", sd3_teacher, "--student", "whole", "--student_init", "random")
    before, teacher = digest(sd3_teacher), tmp_path / "teacher"
    run("train_lift_sd3", *scratch, "--kd_loss", "none", *data, "--output_dir", teacher)
    assert weights(teacher).keys() == weights(sd3_teacher).keys()
    moved = [key for key, value in weights(teacher).items() if not torch.equal(value, weights(sd3_teacher)[key])]
    assert len(moved) >= len(weights(teacher)) - 1  # the positions are no weights
    assert digest(sd3_teacher) == before
    before = digest(teacher)

    copy_script("train_lift_sd3", tmp_path)
    flags = ("--pretrained_teacher_model", "teacher", "--student", "third", "--output_dir", "student")
    prompts = ("--validation_prompts", "a photo of a bag", "a photo of a sneaker")
    finished = launch("train_lift_sd3.py", *data, *flags, *prompts, "--report_to", "tensorboard", cwd=tmp_path)
    assert finished.returncode == 0, finished.stdout
    assert "kd=" in finished.stdout and "feat=" in finished.stdout  # beside the progress bar
    assert digest(teacher) == before

    student = tmp_path / "student"
    assert [row["step"] for row in metrics(student)] == [1, 2, 3]
    logged = {"loss", "task", "kd", "feat", "coarse", "fine", "weight", "lr", "grad_norm", "images_per_second"}
    assert logged | {"slope_mean", "slope_std", "intercept_mean", "intercept_std"} <= metrics(student)[-1].keys()
    assert list((student / "logs" / "lift").glob("events.out.tfevents*"))
    card = (student / "README.md").read_text()
    facts = ("library_name: diffusers", "`teacher`", "PLACE, group size 16", "samples.png", "blocks 2, 5 of 6")
    for fact in facts:
        assert fact in card
    grid = Image.open(student / "samples.png")
    assert grid.height >= 2 * 64 and grid.width >= 3 * 64  # two prompts; teacher, student, EMA student

    pipeline = StableDiffusion3Pipeline.from_pretrained(student)
    assert pipeline.transformer.config.num_layers == 2 and pipeline.transformer.config.sample_size == 8
    assert same(pipeline.transformer.state_dict(), weights(student))
    images = pipeline("a photo of a bag", num_inference_steps=2, output_type="np").images
    assert images.shape == (1, 32, 32, 3) and 0 <= images.min() <= images.max() <= 1
    for name in ("vae", "text_encoder", "text_encoder_2", "text_encoder_3"):
        theirs = getattr(StableDiffusion3Pipeline.from_pretrained(teacher), name).state_dict()
        assert same(getattr(pipeline, name).state_dict(), theirs)


@pytest.mark.parametrize("flags", [("--mixed_precision", "bf16"), ("--teacher_dtype", "fp16")], ids=" ".join)
def test_a_student_starts_from_the_teachers_own_weights(distil, sd3_teacher, flags):
    """And not from what the run, or --teacher_dtype, rounds the teacher's to."""
    folder = distil("--student", "whole", "--learning_rate", 0, *flags)
    assert same(weights(folder), weights(sd3_teacher))


# ----------------------------------------------------------------------------------------------------- what is trained


@pytest.mark.parametrize(
    "flags",
    [
        ["--kd_loss", "lift", "--coarse_norm", "l2", "--weighting_scheme", "mode", "--mode_scale", 0.8],
        ["--kd_loss", "mse", "--lambda_kd_feat", 0, "--weighting_scheme", "cosmap"],
        ["--kd_loss", "none", "--weighting_scheme", "cosmap"],
        ["--group_size", 64, "--group_by", "position", "--logit_mean", -0.5, "--logit_std", 2],
        ["--kd_weighting", "coarse_only", "--no-use_ema", "--weighting_scheme", "none"],
        ["--kd_weighting", "fine_only", "--gradient_accumulation_steps", 2, "--caption_dropout", 1],
        ["--student_init", "random", "--random_flip", "--gradient_checkpointing"],
        ["--use_8bit_adam", "--lr_scheduler", "cosine", "--lr_warmup_steps", 1],
        ["--mixed_precision", "bf16", "--no-cache_latents", "--random_flip"],
        ["--resolution", 16, "--max_train_samples", 24, "--no_t5", "--save_fp16_variant"],
    ],
    ids=lambda flags: " ".join(map(str, flags)),
)
def test_flags_train_a_student_that_loads(distil, flags):
    folder = distil(*flags)
    after = weights(folder)
    shape = SD3Transformer2DModel.from_config({**TINY_SD3, "num_layers": 3}).state_dict()
    assert {key: value.shape for key, value in after.items()} == {key: value.shape for key, value in shape.items()}
    assert all(torch.isfinite(value).all() and value.dtype == torch.float32 for value in after.values())
    moments = load_file(folder / "checkpoint-3" / "optimizer.safetensors")
    moments = [value for key, value in moments.items() if key.endswith((".exp_avg", ".state1"))]
    # Softmax does not see the biases of the keys, and nothing sees the last block's queries of the text.
    assert len(moments) == len(after) - 1 and sum(bool(value.any()) for value in moments) >= len(moments) - 8
    rows = metrics(folder)
    assert len(rows) == 3 and all(row["loss"] > 0 and row["skipped"] == 0 for row in rows)
    assert ("coarse" in rows[0]) == ("mse" not in flags and "none" not in flags[:2])
    assert ("feat" in rows[0]) == ("mse" not in flags and "none" not in flags[:2])
    if "coarse_only" in flags:
        assert rows[0]["weight"] == 0
    without = {"text_encoder_3": None, "tokenizer_3": None} if "--no_t5" in flags else {}
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, **without)
    assert (folder / "text_encoder_3").exists() != bool(without)
    assert pipeline.transformer.config.sample_size == (4 if "--resolution" in flags else 8)
    assert pipeline("a bag", num_inference_steps=1, max_sequence_length=8).images[0].width in (16, 32)
    if "--save_fp16_variant" in flags:
        options = {"variant": "fp16", "torch_dtype": torch.float16, **without}
        half = StableDiffusion3Pipeline.from_pretrained(folder, **options)
        halved = half.transformer.state_dict()
        assert all(torch.equal(value.half(), halved[key]) for key, value in after.items())


def test_the_loss_falls_and_every_weight_moves(distil, sd3_teacher):
    flags = ("--student", "sixth", "--max_train_steps", 60, "--ema_decay", 0.9, "--lambda_task", 0)
    folder = distil(*flags, "--learning_rate", 3e-3)
    rows = metrics(folder)

    def mean(key, part):
        return sum(row[key] for row in rows[part]) / len(rows[part])

    first, last = slice(0, 5), slice(-10, None)
    assert mean("loss", last) < 0.7 * mean("loss", first) and mean("feat", last) < mean("feat", first)
    trained, averaged = (
        SD3Transformer2DModel.from_pretrained(folder / "checkpoint-60", subfolder=subfolder).state_dict()
        for subfolder in ("transformer", "transformer_ema")  # as in a pipeline
    )
    start = {key.replace("blocks.5.", "blocks.0."): value for key, value in weights(sd3_teacher).items()}
    still = [key for key, value in trained.items() if torch.equal(value, start[key])]
    assert all(key in ("pos_embed.pos_embed",) or key.endswith(("_k.bias", "_k_proj.bias")) for key in still), still
    saved = weights(folder)
    assert same(saved, averaged) and not same(saved, trained)


def test_a_whole_student_starts_as_the_teacher(distil, monkeypatch):
    """Both see the same noise, noise level and dropped captions, and tokens are paired with tokens: no distance."""
    drawn = []
    monkeypatch.setattr("common.reporting.save_grid", lambda grid, *rest: drawn.append(grid))
    flags = ("--student", "whole", "--learning_rate", 0, "--caption_dropout", 0.5, "--validation_steps", 2)
    folder = distil(*flags, "--kd_loss", "mse", "--validation_prompts", "a bag")
    assert all(row["kd"] == 0 and row["feat"] == 0 and row["task"] > 0.1 for row in metrics(folder))
    assert len(drawn) == 3  # and from the same noise come the same pictures
    grid = drawn[-1].convert("L")
    pixels = torch.tensor(list(grid.tobytes())).view(grid.height, grid.width)[26:90].float()
    painted = [column for column in range(grid.width) if (pixels[:, column] == 255).float().mean() < 0.5]
    starts = [column for column in painted if column - 1 not in painted]
    teacher, student, averaged = (pixels[:, start : start + 64] for start in starts)
    assert teacher.std() > 1
    assert (teacher - student).abs().max() <= 2 and (teacher - averaged).abs().max() <= 2


def test_compiled_equals_eager(distil, compile_quickly, tmp_path):
    teacher = save_sd3_pipeline(tmp_path / "teacher", num_layers=1)
    flags = ("--pretrained_teacher_model", teacher, "--student", "whole", "--lora_rank", 2, "--share_backbone")
    eager = distil(*flags, output_dir=tmp_path / "eager")
    assert not compile_quickly
    compiled = distil(*flags, "--compile", output_dir=tmp_path / "compiled")
    assert len(compile_quickly) == 2
    assert losses(eager) == pytest.approx(losses(compiled), rel=1e-3)
    assert weights(compiled).keys() == weights(eager).keys()


# ------------------------------------------------------------------------------------------------------- flow matching


def noise_levels(*flags: str) -> dict:
    args = train_lift_sd3.parse_args(["--dry_run", *flags])
    return {name: getattr(args, name) for name in train_lift_sd3.NOISE_FLAGS}


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_noise_and_target_are_the_schedulers(shift):
    """Noised as `scale_noise` does; the exact velocity leads an Euler step to sigma 0 back to the clean latents."""
    torch.manual_seed(0)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    sigmas, timesteps = train_lift_sd3.find_sigmas(scheduler, torch.rand(16))
    assert torch.equal(timesteps, sigmas.flatten() * 1000) and len(timesteps.unique()) > 8
    latents, noise = torch.randn(16, 4, 8, 8), torch.randn(16, 4, 8, 8)
    noisy, velocity = train_lift_sd3.add_noise(latents, noise, sigmas)
    torch.testing.assert_close(noisy, scheduler.scale_noise(latents, timesteps, noise))
    for row in range(4):
        sampler = FlowMatchEulerDiscreteScheduler(shift=shift)
        sampler.sigmas, sampler.timesteps = torch.tensor([sigmas[row].item(), 0]), timesteps[row : row + 1]
        clean = sampler.step(velocity[row], timesteps[row], noisy[row]).prev_sample
        torch.testing.assert_close(clean, latents[row], rtol=1e-4, atol=1e-5)


def test_noise_levels_follow_the_flags():
    """Uniform draws reach the whole shifted schedule, logit_normal ones gather where its mean says."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)

    def mean(*flags) -> float:
        torch.manual_seed(0)
        how = {"shape": (1, 1, 1), "random_flip": False, "caption_dropout": 0.0, **noise_levels(*flags)}
        shares = train_lift_sd3.make_draws(20_000, torch.device("cpu"), **how)["shares"]
        sigmas, _ = train_lift_sd3.find_sigmas(scheduler, shares)
        assert set(sigmas.flatten().tolist()) <= set(scheduler.sigmas.tolist())
        return sigmas.mean().item()

    assert mean("--weighting_scheme", "none") == pytest.approx(scheduler.sigmas.mean().item(), abs=0.01)
    # A larger share of the way stands further down the schedule, which begins with pure noise.
    low, middle, high = (mean("--logit_mean", value) for value in ("1", "0", "-1"))
    assert low < middle - 0.1 < high - 0.2
    assert mean("--logit_std", "90") > 0  # shares that round to 1 stay inside the schedule


# --------------------------------------------------------------------------------------------- what the encoders give


def place(pipeline: Path) -> TeacherSource:
    return TeacherSource(str(pipeline), None, None, train_lift_sd3.EXPECTED)


def encode(pipeline: Path, texts: list[str], prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    source = place(pipeline)
    tokenizers = {name: load_tokenizer(source, name, LAYOUT.t5_tokens) for name in texts}
    encoders = TextEncoders(source, texts, torch.device("cpu"), torch.float32)
    return join_text(encoders(tokenize(tokenizers, prompts)), LAYOUT)


@pytest.mark.parametrize("texts", [[*CLIPS, T5], [*CLIPS]])
def test_text_is_encoded_as_by_the_pipeline(sd3_teacher, texts):
    prompts = ["a photo of a dark bag", "", "sneaker " * 40]
    without = {} if len(texts) == 3 else {"text_encoder_3": None, "tokenizer_3": None}
    pipeline = StableDiffusion3Pipeline.from_pretrained(sd3_teacher, **without)
    with torch.no_grad():
        expected = pipeline.encode_prompt(prompts, None, None, max_sequence_length=8)
    text, pooled = encode(sd3_teacher, texts, prompts)
    assert torch.equal(text, expected[0]) and torch.equal(pooled, expected[2])
    # The empty caption is the pipeline's negative prompt.
    assert torch.equal(text[1], expected[1][0]) and torch.equal(pooled[1], expected[3][0])


def test_an_absent_t5_leaves_zeros_in_its_place(sd3_teacher):
    prompts = ["a photo of a dark bag", ""]
    whole, pooled = encode(sd3_teacher, [*TEXT_ENCODERS], prompts)
    assert whole[:, :24, :32].any(1).all() and not whole[:, :24, 32:].any() and whole[:, 24:].any(1).all()
    text, rest = encode(sd3_teacher, [*CLIPS], prompts)
    assert torch.equal(text[:, :24], whole[:, :24]) and not text[:, 24:].any() and torch.equal(rest, pooled)


def test_a_pipeline_without_t5(distil, tmp_path):
    teacher = save_sd3_pipeline(tmp_path / "few", absent=(3,))
    folder = distil("--pretrained_teacher_model", teacher)
    assert len(metrics(folder)) == 3 and not (folder / "text_encoder_3").exists()
    without = {"text_encoder_3": None, "tokenizer_3": None}
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, **without)
    assert all(f"{part}=None" in (folder / "README.md").read_text() for part in without)
    assert len(pipeline("a bag", num_inference_steps=1).images) == 1


def test_latents_are_scaled_and_shifted(sd3_teacher):
    """What the encoders give is what the pipeline's own decoding undoes."""
    encoders = train_lift_sd3.Encoders(place(sd3_teacher), [], torch.device("cpu"), torch.bfloat16)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    vae = AutoencoderKL.from_pretrained(sd3_teacher / "vae")
    with torch.no_grad():
        expected = vae.encode(images / 127.5 - 1).latent_dist
    mean, std = encoders.encode_images(images).unbind(1)
    assert mean.dtype == torch.float32  # whatever the run's precision
    torch.testing.assert_close(mean / 1.5305 + 0.0609, expected.mean)
    torch.testing.assert_close(std / 1.5305, expected.std)


# ----------------------------------------------------------------------------------------------------------- the cache


def test_cached_equals_uncached(distil, tmp_path):
    flags = ("--random_flip", "--max_train_steps", 4, *STEADY)
    cached = distil(*flags, output_dir=tmp_path / "cached")
    computed = distil(*flags, "--no-cache_latents", output_dir=tmp_path / "computed")
    assert losses(cached) == pytest.approx(losses(computed), rel=1e-4)
    assert len(set(losses(cached))) == 4


def test_a_cache_is_read_without_loading_its_encoder(distil, tmp_path, monkeypatch):
    loaded = []

    class Counted(train_lift_sd3.Encoders):
        def __init__(self, *values):
            loaded.append("vae")
            super().__init__(*values)

    class CountedTexts(TextEncoders):
        def __init__(self, source, names, *rest):
            loaded.extend(names)
            super().__init__(source, names, *rest)

    monkeypatch.setattr(train_lift_sd3, "Encoders", Counted)
    for module in (train_lift_sd3, common.sd3_text):
        monkeypatch.setattr(module, "TextEncoders", CountedTexts)
    flags = ("--validation_prompts", "a bag", "--cache_dir", tmp_path / "cache", "--max_train_steps", 1)
    first = distil(*flags, output_dir=tmp_path / "first")
    texts = [*TEXT_ENCODERS]
    assert loaded == ["vae", *[name for text in texts for name in (text, text)]]  # the data, then the prompts
    loaded.clear()
    again = distil(*flags, output_dir=tmp_path / "again")
    assert loaded == [] and losses(again) == losses(first)
    distil(*flags, "--no_t5", output_dir=tmp_path / "without")
    assert loaded == []  # each part has a cache of its own
    distil(*flags, "--max_sequence_length", 6, output_dir=tmp_path / "shorter")
    assert loaded == ["text_encoder_3", "text_encoder_3"]
    loaded.clear()
    distil(*flags, "--random_flip", output_dir=tmp_path / "flipped")
    assert loaded == ["vae"]


# -------------------------------------------------------------------------------------------------------- resumed runs


@pytest.mark.parametrize(
    "flags",
    [(), ("--lora_rank", 2, "--share_backbone"), ("--student_depth", 2, "--no-cache_latents", "--random_flip")],
    ids=str,
)
def test_resumed_equals_uninterrupted(distil, tmp_path, flags):
    flags = (*flags, "--max_train_steps", 4, "--checkpointing_steps", 2)
    whole = distil(*flags, output_dir=tmp_path / "whole")
    expected = weights(whole), losses(whole)
    shutil.rmtree(whole / "checkpoint-4")
    shutil.rmtree(whole / "transformer")
    distil(*flags, "--resume_from_checkpoint", "latest", output_dir=whole)
    assert same(weights(whole), expected[0]) and losses(whole) == expected[1] and len(expected[1]) == 4


# ------------------------------------------------------------------------------------------------------------ adapters


def test_lora_saves_adapter_base_and_merged_pipeline(distil, sd3_teacher):
    folder = distil("--lora_rank", 4, "--keep_blocks", "0,3,5", "--ema_decay", 0.1)
    base = weights(folder / "lora")
    assert is_depth_pruned(base, weights(sd3_teacher), [0, 3, 5])
    adapter = load_file(folder / "lora" / "pytorch_lora_weights.safetensors")
    assert all(value.any() for key, value in adapter.items() if "lora_A" in key)
    # The last block has no output for the text, and its queries of the text reach nothing.
    idle = [key for key, value in adapter.items() if "lora_B" in key and not value.any()]
    assert all("transformer_blocks.2.attn.add_q_proj" in key for key in idle)
    blocks = {key.split(".")[2] for key in adapter}
    assert blocks == {"0", "1", "2"}  # the student's own numbers
    changed = {key for key, value in weights(folder).items() if not torch.equal(value, base[key])}
    assert changed and all(key.startswith("transformer_blocks.") and key.endswith(".weight") for key in changed)

    merged = StableDiffusion3Pipeline.from_pretrained(folder)
    adapted = StableDiffusion3Pipeline.from_pretrained(
        folder, transformer=SD3Transformer2DModel.from_pretrained(folder / "lora" / "transformer")
    )
    plain = forward(adapted.transformer)
    adapted.load_lora_weights(folder / "lora")
    torch.testing.assert_close(forward(adapted.transformer), forward(merged.transformer), rtol=1e-4, atol=1e-5)
    assert (forward(merged.transformer) - plain).abs().max() > 1e-3
    assert len(merged("a bag", num_inference_steps=1).images) == 1


@pytest.mark.parametrize("transformer", [{}, SD35], ids=["3", "3.5"])
def test_a_shared_backbone_equals_two_models(distil, tmp_path, transformer):
    """Number for number: every logged value, the adapter, its moments, its average, the merged pipeline."""
    teacher = save_sd3_pipeline(tmp_path / "teacher", **transformer)
    before = digest(teacher)
    flags = ("--pretrained_teacher_model", teacher, "--lora_rank", 4, "--gradient_checkpointing", "--student", "half")
    two = distil(*flags, output_dir=tmp_path / "two")
    one = distil(*flags, "--share_backbone", output_dir=tmp_path / "one")
    assert without_time(one) == without_time(two)
    assert len(set(losses(one))) == 3
    files = [path.relative_to(two) for path in sorted(two.rglob("*.safetensors"))]
    assert len(files) == 11 and Path("lora/pytorch_lora_weights.safetensors") in files
    for file in files:
        assert same(load_file(one / file), load_file(two / file)), file
    assert config(one) == config(two) and digest(teacher) == before


def test_shared_weights_are_held_once(sd3_teacher):
    """The student has no memory of its own but the adapters', and they are never on in the teacher."""
    teacher = SD3Transformer2DModel.from_pretrained(sd3_teacher / "transformer")
    expected = forward(teacher)
    recipe = train_lift_sd3.depth_recipe([1, 4, 5], teacher.config)
    with torch.device("meta"):
        student = SD3Transformer2DModel.from_config({**teacher.config, **recipe["config"]})
    share_blocks(student, teacher.state_dict(), recipe["blocks"])
    places = {tensor.data_ptr() for tensor in teacher.state_dict().values()}
    assert {tensor.data_ptr() for tensor in student.state_dict().values()} < places
    add_adapters(student, 4, train_lift_sd3.LORA_TARGETS, torch.float32)
    own = {name for name, tensor in student.state_dict().items() if tensor.data_ptr() not in places}
    assert own and all("lora_" in name for name in own)
    assert {name for name, weight in student.named_parameters() if weight.requires_grad} == own
    for name, weight in student.named_parameters():
        if "lora_B" in name:
            weight.data.normal_()
    assert torch.equal(forward(teacher), expected) and not torch.equal(forward(student), expected)
    assert not any("lora_" in name for name in teacher.state_dict())
    student.double()  # as saving does: the teacher keeps its own precision
    assert torch.equal(forward(teacher), expected)


# -------------------------------------------------------------------------------------------------------- the students


@pytest.mark.parametrize(
    ("layout", "teacher_parameters", "students"),
    [
        (SD3_MEDIUM, 2_028_328_000, {"half": 1_008_559_168, "third": 668_636_224, "sixth": 328_713_280}),
        (SD35_MEDIUM, 2_243_171_520, {"half": 1_107_717_952, "third": 734_742_080, "sixth": 361_766_208}),
        (SD35_LARGE, 8_056_627_520, {"half": 4_009_633_600, "third": 2_518_635_840, "sixth": 1_240_637_760}),
    ],
    ids=["3-medium", "3.5-medium", "3.5-large"],
)
def test_presets_of_the_released_models(layout, teacher_parameters, students):
    with torch.device("meta"):
        teacher = SD3Transformer2DModel(**layout)
    assert teacher.num_parameters() == teacher_parameters
    for preset, parameters in {"whole": teacher_parameters, **students}.items():
        recipe = train_lift_sd3.read_student(preset, None, None, teacher.config)
        kept = recipe["kept"]
        assert kept[-1] == layout["num_layers"] - 1 and len(set(kept)) == len(kept)
        with torch.device("meta"):
            student = SD3Transformer2DModel(**{**layout, **recipe["config"]})
        assert student.num_parameters() == parameters
        assert copy_blocks(student, teacher.state_dict(), recipe["blocks"]) == []


@pytest.mark.parametrize(
    ("flags", "kept"),
    [
        (["--student", "whole"], [0, 1, 2, 3, 4, 5]),
        (["--student", "third"], [2, 5]),
        (["--student", "sixth"], [5]),
        (["--keep_blocks", "0,2,5"], [0, 2, 5]),
        ([], [1, 3, 5]),
    ],
    ids=str,
)
def test_students_are_the_teachers_blocks(distil, tmp_path, flags, kept):
    """SD3.5's layout: the blocks with a second attention keep it where they come to stand, in config and weights."""
    teacher = save_sd3_pipeline(tmp_path / "teacher", **SD35)
    folder = distil("--pretrained_teacher_model", teacher, *flags, "--learning_rate", 0, "--max_train_steps", 1)
    assert is_depth_pruned(weights(folder), weights(teacher), kept)
    dual = [index for index, block in enumerate(kept) if block < 4]
    assert config(folder)["dual_attention_layers"] == dual and config(folder)["num_layers"] == len(kept)
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder)
    assert [block.use_dual_attention for block in pipeline.transformer.transformer_blocks] == [
        index in dual for index in range(len(kept))
    ]
    assert [block.context_pre_only for block in pipeline.transformer.transformer_blocks][-1]
    assert len(pipeline("a photo of a bag", num_inference_steps=1).images) == 1


def test_depth_is_measured_on_the_teacher_as_it_is_held(distil, monkeypatch):
    """One that does not fit the GPU in the run's precision is compressed before its blocks are measured, too."""
    hold, held = train_lift_sd3.hold_teacher, []

    def noted(teacher, teacher_dtype, working, device, offload):
        held.append((teacher_dtype, offload))
        return hold(teacher, teacher_dtype, working, device, offload)

    monkeypatch.setattr(train_lift_sd3, "hold_teacher", noted)
    distil("--student_depth", 4, "--teacher_dtype", "bf16", "--max_train_steps", 1)
    assert held == [("bf16", False)] * 2


def test_depth_by_influence_drops_what_does_nothing(distil, tmp_path, capsys):
    """A block whose gates are shut does not change the image tokens: it must be the first to go."""
    teacher = save_sd3_pipeline(tmp_path / "teacher")
    model = SD3Transformer2DModel.from_pretrained(teacher / "transformer")
    for block in (0, 3):
        torch.nn.init.zeros_(model.transformer_blocks[block].norm1.linear.weight)
        torch.nn.init.zeros_(model.transformer_blocks[block].norm1.linear.bias)
    model.save_pretrained(teacher / "transformer")
    flags = ("--pretrained_teacher_model", teacher, "--learning_rate", 0, "--max_train_steps", 1)
    folder = distil(*flags, "--student_depth", 4)
    found = json.loads((folder / "blocks.json").read_text())
    assert found["kept"] == [1, 2, 4, 5]
    assert found["influence"][0] == pytest.approx(0, abs=1e-6) and found["influence"][1] > 1e-3
    assert is_depth_pruned(weights(folder), weights(teacher), found["kept"])
    assert "kept: [1, 2, 4, 5]" in capsys.readouterr().out
    assert "blocks 1, 2, 4, 5 of 6" in (folder / "README.md").read_text()
    assert Image.open(folder / "influence.png").width > 300


def test_json_student_with_blocks_and_features(distil, sd3_teacher, tmp_path):
    recipe = {
        "config": {"num_layers": 2},
        "blocks": {"transformer_blocks.1": "transformer_blocks.5", "proj_out": "proj_out"},
        "features": [["transformer_blocks.0", "transformer_blocks.3"]],
    }
    path = tmp_path / "student.json"
    path.write_text(json.dumps(recipe))
    folder = distil("--student", path, "--learning_rate", 0)
    assert metrics(folder)[0]["feat"] > 0
    ours, theirs = weights(folder), weights(sd3_teacher)
    for key in ours:
        source = key.replace("blocks.1.", "blocks.5.")
        copied = key.startswith(("transformer_blocks.1.", "proj_out.", "pos_embed.pos_embed"))
        assert copied == torch.equal(ours[key], theirs[source]) or key.endswith(".bias"), key


def test_json_student_without_blocks_has_features_of_the_same_number(distil, tmp_path):
    path = tmp_path / "student.json"
    path.write_text(json.dumps({"config": {"num_layers": 2}}))
    assert all(row["feat"] > 0 for row in metrics(distil("--student", path)))


def test_features_are_the_image_tokens(sd3_teacher):
    teacher = SD3Transformer2DModel.from_pretrained(sd3_teacher / "transformer")
    with torch.device("meta"):
        inputs = {"hidden_states": torch.zeros(1, 4, 8, 8), "encoder_hidden_states": torch.zeros(1, 9, 48)}
        inputs |= {"pooled_projections": torch.zeros(1, 32), "timestep": torch.zeros(1)}
    pairs = [["transformer_blocks.1", "transformer_blocks.1"], ["transformer_blocks.5", "transformer_blocks.5"]]
    student, _ = pair_features(teacher, teacher, pairs, inputs, item=1)
    real = {name: torch.randn(2, *tensor.shape[1:]) for name, tensor in inputs.items()}
    prediction, features = student(**real)
    assert [tuple(feature.shape) for feature in features] == [(2, 16, 16), (2, 16, 16)]  # 16 patches of width 16
    embedded = teacher.time_text_embed(real["timestep"], real["pooled_projections"])
    patches = teacher.proj_out(teacher.norm_out(features[-1], embedded)).view(2, 4, 4, 2, 2, 4)
    torch.testing.assert_close(patches.permute(0, 5, 1, 3, 2, 4).reshape(2, 4, 8, 8), prediction)


# ------------------------------------------------------------------------------------------------------- what it shows


def test_dry_run_tells_sizes_and_stops(run, sd3_teacher, tmp_path, capsys):
    def dry_run(*flags) -> dict[str, float]:
        where = ("--pretrained_teacher_model", sd3_teacher, "--output_dir", tmp_path / "none")
        run("train_lift_sd3", *where, "--dry_run", *flags)
        text = capsys.readouterr().out
        ours = SD3Transformer2DModel(**{**TINY_SD3, "num_layers": 3}).num_parameters()
        theirs = SD3Transformer2DModel(**TINY_SD3).num_parameters()
        for fact in (f"student: {ours:,} parameters", f"teacher: {theirs:,}", f"{ours / theirs:.2%}", "MACs"):
            assert fact in text
        assert '"num_layers": 3' in text
        lines = [line.rsplit(maxsplit=2) for line in text.splitlines() if line.startswith("  ") and "MiB" in line]
        return {name.strip(): float(size.replace(",", "")) for name, size, _ in lines}

    def beforehand(batch: int) -> float:
        run("train_lift_sd3", "--pretrained_teacher_model", sd3_teacher, "--dry_run", "--encoding_batch_size", batch)
        line = rf"^beforehand, one encoder at a time, batch {batch}: ([\d.]+) MiB for the vae$"
        return float(re.search(line, capsys.readouterr().out, re.M)[1])

    assert "encoders' weights" not in dry_run()
    pipeline = StableDiffusion3Pipeline.from_pretrained(sd3_teacher)
    texts = sum(getattr(pipeline, name).num_parameters() for name in TEXT_ENCODERS)
    weights = dry_run("--no-cache_latents", "--mixed_precision", "bf16")["encoders' weights"]
    assert weights == pytest.approx((4 * pipeline.vae.num_parameters() + 2 * texts) / 2**20, abs=0.06)
    size = 4 * 4 * pipeline.vae.config.block_out_channels[0] * 32 * 32 / 2**20  # of an image, in float32
    assert beforehand(64) - beforehand(1) == pytest.approx(63 * size, abs=0.11)
    assert dry_run("--lambda_kd_feat", 0).keys() < dry_run().keys() >= {"features of both models and gradients"}
    two, one = dry_run("--lora_rank", 2), dry_run("--lora_rank", 2, "--share_backbone")
    frozen = two.pop("frozen weights of the student")
    assert frozen == pytest.approx(
        SD3Transformer2DModel(**{**TINY_SD3, "num_layers": 3}).num_parameters() / 2**18, abs=0.06
    )
    table = SD3Transformer2DModel(**TINY_SD3).pos_embed.pos_embed.nbytes / 2**20
    both = two.pop("tables of positions")
    assert both == pytest.approx(2 * table, abs=0.06)  # the student's and the teacher's
    assert one.pop("tables of positions") == pytest.approx(table, abs=0.06)  # which are the same
    assert one.pop("sum") == pytest.approx(two.pop("sum") - frozen - table, abs=0.16) and one == two
    half = dry_run("--lora_rank", 2, "--mixed_precision", "bf16")  # frozen, it is in the teacher's precision
    assert half["tables of positions"] == pytest.approx(both / 2, abs=0.06)
    wide = dry_run("--lora_rank", 2, "--mixed_precision", "bf16", "--teacher_dtype", "fp32")
    assert wide["tables of positions"] == pytest.approx(1.5 * table, abs=0.06)
    moved = dry_run("--offload_teacher")
    assert moved["tables of positions"] == pytest.approx(table, abs=0.06) and "teacher weights" not in moved
    cached = "--cache_teacher", 2, "--lambda_kd_feat", 0
    alone = dry_run("--lora_rank", 2, "--share_backbone", *cached)  # it keeps what it shared when the teacher goes
    assert alone["frozen weights of the student"] == frozen and "teacher weights" not in alone
    assert alone["tables of positions"] == pytest.approx(table, abs=0.06)
    assert not (tmp_path / "none").exists()


def test_long_captions_are_counted(distil, captioned, tmp_path, caplog):
    folder = tmp_path / "long"
    shutil.copytree(captioned, folder)
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    for line in lines[:3]:
        line["text"] = "a dark bag " * 12
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    distil("--train_data_dir", folder, "--max_sequence_length", 16, "--max_train_steps", 1)
    said = [record.getMessage() for record in caplog.records if "are cut there" in record.getMessage()]
    assert len(said) == 1
    for name, limit in (("text_encoder", 24), ("text_encoder_2", 24), ("text_encoder_3", 16)):
        assert f"3 of 48 at {limit} tokens for {name}" in said[0]


# ----------------------------------------------------------------------------------------------------------- bad input


def test_images_without_a_caption(distil, captioned, tmp_path, capsys):
    folder = tmp_path / "some"
    shutil.copytree(captioned, folder)
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    lines[0]["text"], lines[1]["text"] = " ", ""
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    with pytest.raises(SystemExit, match=r"2 of 48 images.* have no caption"):
        distil("--train_data_dir", folder)
    distil("--train_data_dir", folder, "--max_unreadable", 0.1, "--max_train_steps", 1)
    assert "skipping 2 of 48 images" in capsys.readouterr().out


def test_a_gated_teacher_says_what_to_do(run, captioned, tmp_path, monkeypatch):
    class Refused(GatedRepoError):
        def __init__(self):
            Exception.__init__(self, "Access to model is restricted")

    def refuse(*args, **options):
        try:
            raise Refused
        except GatedRepoError as error:
            raise OSError("You are trying to access a gated repo") from error

    monkeypatch.setattr(train_lift_sd3.DiffusionPipeline, "load_config", refuse)
    with pytest.raises(SystemExit) as error:
        run("train_lift_sd3", "--train_data_dir", captioned, "--output_dir", tmp_path / "student")
    message = str(error.value)
    assert "stable-diffusion-3-medium-diffusers is gated; accept its terms at https://huggingface.co/" in message
    assert "hf auth login" in message and "\n" not in message
