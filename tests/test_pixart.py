"""docs/examples/train_lift_pixart.py: the worked example of docs/adapting.md runs, as a user copies it."""

import difflib
import json
import re
import shutil

import pytest
import torch
import train_lift_pixart
from conftest import ROOT, copy_script, inputs_of, launch, weights
from diffusers import PixArtSigmaPipeline

from lift_utils import FeatureModel, make_kd_loss
from tiny_models import TINY_PIXART, save_pixart_pipeline


EXAMPLE = ROOT / "docs" / "examples" / "train_lift_pixart.py"
SHORT = [
    *("--train_batch_size", 4, "--gradient_accumulation_steps", 1, "--max_train_steps", 2, "--logging_steps", 1),
    *("--checkpointing_steps", 2, "--dataloader_num_workers", 0, "--num_inference_steps", 1, "--report_to", "none"),
    *("--max_sequence_length", 8, "--validation_prompts", "a dark bag", "--learning_rate", 1e-3, "--no-use_ema"),
]


@pytest.fixture(scope="module")
def pixart(tmp_path_factory):
    return save_pixart_pipeline(tmp_path_factory.mktemp("pixart"))


def test_a_copy_distils_by_accelerate_launch(pixart, captioned, tmp_path):
    copy_script("train_lift_sd21", tmp_path)  # for what stands beside it
    shutil.copy(EXAMPLE, tmp_path)
    flags = ("--pretrained_teacher_model", pixart, "--train_data_dir", captioned, "--output_dir", "student", *SHORT)
    flags += ("--cache_latents", "--cache_dir", "cache")
    finished = launch("train_lift_pixart.py", *flags, cwd=tmp_path)
    assert finished.returncode == 0, finished.stdout
    pipeline = PixArtSigmaPipeline.from_pretrained(tmp_path / "student")
    assert pipeline.transformer.config.num_layers == 2 and pipeline.transformer.config.out_channels == 8
    options = {"num_inference_steps": 1, "use_resolution_binning": False, "output_type": "np"}
    assert pipeline("a bag", **options).images.shape == (1, 32, 32, 3)
    row = json.loads((tmp_path / "student" / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["step"] == 2 and row.keys() >= {"task", "kd", "coarse", "fine", "variance", "feat"}
    assert (tmp_path / "student" / "samples.png").exists() and "PixArt" in (tmp_path / "student/README.md").read_text()

    ours, theirs = weights(tmp_path / "student"), weights(pixart)
    name = "transformer_blocks.{}.attn1.to_q.weight"
    for block, source in ((0, 1), (1, 3)):  # near the teacher's, and trained
        moved = (ours[name.format(block)] - theirs[name.format(source)]).abs()
        assert 0 < moved.max() < 0.01


def test_cached_and_not_is_the_same(run, pixart, captioned, tmp_path):
    flags = ("--pretrained_teacher_model", pixart, "--train_data_dir", captioned, *SHORT)
    flags += ("--cache_dir", tmp_path / "cache", "--caption_dropout", 0.5)
    results = []
    for name, more in (("cached", ["--cache_latents"]), ("now", [])):
        run("train_lift_pixart", *flags, "--output_dir", tmp_path / name, *more)
        results.append([json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()])
    for cached, now in zip(*results):
        assert all(cached[name] == pytest.approx(now[name], rel=1e-4) for name in ("loss", "kd", "variance", "feat"))


def test_tokens_behind_the_mask_do_not_count():
    """And the mask is in both forward passes: other padding leaves the losses, another mask does not."""
    torch.manual_seed(0)
    models = [train_lift_pixart.PixArtTransformer2DModel(**{**TINY_PIXART, "num_layers": count}) for count in (1, 2)]
    student, teacher = (FeatureModel(model.eval(), []) for model in models)
    batch = {"moments": torch.ones(2, 1, 2, 4, 8, 8), "text": torch.randn(2, 6, 48), "mask": torch.ones(2, 6).long()}
    batch["mask"][:, 4:] = 0
    how = {"scheduler": train_lift_pixart.DDPMScheduler(), "encoders": None}
    how |= {"no_text": {"text": torch.zeros(6, 48), "mask": torch.ones(6).long()}}
    draws = {"steps": 1000, "random_flip": False, "caption_dropout": 0.0}
    settings = {
        "inputs_of": inputs_of(train_lift_pixart, (4, 8, 8), draws, **how),
        "kd_loss": make_kd_loss("place", 16, "error", "l1", "adaptive"),
        "lambdas": (1.0, 1.0, 1.0),
    }

    def losses(**changes) -> dict[str, float]:
        torch.manual_seed(1)
        logs = train_lift_pixart.compute_losses(student, teacher, {**batch, **changes}, 0.5, **settings)[1]
        return {name: logs[name].item() for name in ("task", "kd", "variance")}

    padded = batch["text"].clone()
    padded[:, 4:] += 10
    whole = losses()
    assert losses(text=padded) == pytest.approx(whole, rel=1e-5)
    other = losses(mask=torch.ones(2, 6).long())
    assert all(other[name] != pytest.approx(whole[name], rel=1e-6) for name in whole)


def test_captions_are_tokenized_as_by_the_pipeline(pixart):
    pipeline = PixArtSigmaPipeline.from_pretrained(pixart)
    pipeline.tokenizer.model_max_length = 8
    source = train_lift_pixart.TeacherSource(str(pixart), None, None, "")
    encoders = train_lift_pixart.Encoders(source, torch.device("cpu"), torch.float32, vae=False)
    captions = ["A Photo of a bag ", ""]
    text, mask, *_ = pipeline.encode_prompt(captions, False, clean_caption=False, max_sequence_length=8)
    ours = encoders.encode_text(train_lift_pixart.tokenize(pipeline.tokenizer, captions))
    assert torch.allclose(ours["text"], text, atol=1e-5) and torch.equal(ours["mask"], mask)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--resolution", 64], "--resolution 64 is not the teacher's"),
        (["--lora_rank", 2], "--lora_rank 2 is for pipelines that load LoRA"),
        (["--student", "tiny"], "--student tiny is unknown; pass half"),
        (["--group_size", 7], "--group_size 7"),
        (
            ["--enable_xformers_memory_efficient_attention", "--max_sequence_length", 12],
            ".* not --max_sequence_length 12;",
        ),
    ],
)
def test_what_does_not_fit_is_said(run, pixart, captioned, tmp_path, flags, says):
    source = ("--pretrained_teacher_model", pixart, "--train_data_dir", captioned, "--output_dir", tmp_path / "a")
    with pytest.raises(SystemExit, match=f"^error: {says}"):
        run("train_lift_pixart", *source, *SHORT, *flags)


def test_a_teacher_of_the_hub_says_an_older_class(run, pixart, captioned, tmp_path):
    """Transformer2DModel, with fields that PixArt's has lost since. The student says today's."""
    teacher = shutil.copytree(pixart, tmp_path / "teacher")
    for path, changes in (
        (teacher / "model_index.json", {"transformer": ["diffusers", "Transformer2DModel"]}),
        (teacher / "transformer" / "config.json", {"_class_name": "Transformer2DModel", "num_vector_embeds": None}),
    ):
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    flags = ("--train_data_dir", captioned, "--output_dir", tmp_path / "student", *SHORT)
    run("train_lift_pixart", "--pretrained_teacher_model", teacher, *flags)
    index = json.loads((tmp_path / "student" / "model_index.json").read_text())
    assert index["transformer"] == ["diffusers", "PixArtTransformer2DModel"]
    assert PixArtSigmaPipeline.from_pretrained(tmp_path / "student").transformer.config.num_layers == 2


def test_dry_run(run, pixart, capsys):
    run("train_lift_pixart", "--pretrained_teacher_model", pixart, "--student", "quarter", "--dry_run")
    assert re.search(r"student: [\d,]+ parameters, [\d,]+ MACs", capsys.readouterr().out)


def test_the_diff_is_as_long_as_adapting_says():
    """About: train_lift_sd21.py goes on, and the example need not follow each of its lines."""
    nearest = (ROOT / "train_lift_sd21.py").read_text().splitlines()
    lines = [line[0] for line in difflib.unified_diff(nearest, EXAMPLE.read_text().splitlines(), n=0)][2:]
    text = (ROOT / "docs" / "adapting.md").read_text()
    new, gone = map(int, re.search(r"about\s+(\d+) lines are new or changed, and (\d+) go", text).groups())
    assert lines.count("+") == pytest.approx(new, rel=0.2) and lines.count("-") == pytest.approx(gone, rel=0.2)


def test_the_loop_is_that_of_the_scripts():
    loops = [
        path.read_text().split("# ---- loop")[1].split("# ---- result")[0]
        for path in (EXAMPLE, ROOT / "train_lift_sd21.py")
    ]
    assert loops[0] == loops[1]
    draws = [
        path.read_text().split("def make_draws(")[1].split("\ndef ")[0]
        for path in (EXAMPLE, ROOT / "train_lift_sd21.py")
    ]
    assert draws[0] == draws[1]


def test_the_teacher_may_be_cached_and_compressed(run, pixart, captioned, tmp_path):
    """A cached run learns from the live teacher's predictions; the mask and the variance are among them."""
    flags = ("--pretrained_teacher_model", pixart, "--train_data_dir", captioned, *SHORT, "--lambda_kd_feat", 0)
    flags += ("--cache_dir", tmp_path / "cache", "--cache_latents", "--cache_teacher", 2, "--teacher_dtype", "fp8")
    run("train_lift_pixart", *flags, "--output_dir", tmp_path / "student")
    rows = [json.loads(line) for line in (tmp_path / "student" / "metrics.jsonl").read_text().splitlines()]
    assert all(row["kd"] > 0 and row["variance"] > 0 and "feat" not in row for row in rows)
    assert len(list((tmp_path / "cache" / "lift-encodings").iterdir())) == 3  # the data, the prompts, the predictions
