"""The teacher's predictions, cached: the live teacher's on the same draws, computed once, shared, and resumed."""

import gc
import importlib
import json
import re
import shutil
from pathlib import Path

import common.cache
from common.teacher_cache import DrawnDataset

import pytest
import torch
from conftest import TWO_PROCESSES, launch, metrics, same, weights, without_time
from diffusers import DDPMPipeline, DiffusionPipeline
from PIL import Image

from lift_utils import FeatureModel


SHORT = (
    *("--train_batch_size", 4, "--gradient_accumulation_steps", 1, "--max_train_steps", 2, "--logging_steps", 1),
    *("--num_inference_steps", 1, "--report_to", "none", "--dataloader_num_workers", 0, "--lambda_kd_feat", 0),
)
SCRIPTS = {
    "unet": ("--student", 0.5, "--num_validation_images", 2),
    "sd21": ("--student", "bk_small", "--cache_latents", "--validation_prompts", "a bag"),
    "dit": ("--keep_blocks", "1,3", "--random_flip"),  # its VAE encodes in each step
    "sd3": ("--student", "half", "--max_sequence_length", 8, "--validation_prompts", "a bag"),
    "sdxl": ("--student", "extreme", "--cache_latents", "--validation_prompts", "a bag"),
}


@pytest.fixture
def distil(run, teachers, images, captioned, articles, tmp_path):
    """`distil(script, *flags)` trains with a cached teacher; returns the output folder. The cache is the test's."""
    data = {"unet": images, "sd21": captioned, "dit": articles, "sd3": captioned, "sdxl": captioned}

    def start(script: str, *flags, output_dir: str = "student") -> Path:
        folder = tmp_path / output_dir
        source = ("--pretrained_teacher_model", teachers[script], "--train_data_dir", data[script])
        where = ("--output_dir", folder, "--cache_dir", tmp_path / "cache", "--cache_teacher", 2)
        run(f"train_lift_{script}", *source, *where, *SHORT, *SCRIPTS[script], *flags)
        return folder

    return start


def shards(tmp_path: Path) -> dict[str, list[str]]:
    """The shards of the predictions by their folders, without those of encodings."""
    folders = [path.parent for path in (tmp_path / "cache" / "lift-encodings").glob("*/key.json")]
    folders = [folder for folder in folders if '"draws"' in (folder / "key.json").read_text()]
    return {folder.name: sorted(path.name for path in folder.glob("rows-*")) for folder in folders}


# ------------------------------------------------------------------------------------------------------ the same loss


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    ("dtype", "kind", "tolerance"), [("fp32", "place", 1e-5), ("fp16", "mse", 1e-3), ("bf16", "mse", 1e-2)]
)
def test_the_loss_and_its_gradient_are_the_live_teachers(
    distil, teachers, monkeypatch, script, dtype, kind, tolerance
):
    """On the same draws, up to the precision in which predictions are stored.

    Of PLACE in float32 alone: its l1 norm has a sign as its gradient, and its groups are in the errors' order, which
    rounding may change.
    """
    module = importlib.import_module(f"train_lift_{script}")
    losses = module.compute_losses
    pipeline = DiffusionPipeline.from_pretrained(teachers[script])
    live = FeatureModel((pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer).eval(), [])
    seen = []

    def spied(student, teacher, batch, *others, **options):
        assert teacher is None  # it has been freed
        live.to(batch["teacher"].device)
        results = []
        for model, rows in ((None, batch), (live, {name: batch[name] for name in batch.keys() - {"teacher"}})):
            loss, logs = losses(student, model, rows, *others, **options)
            weights = [weight for weight in student.parameters() if weight.requires_grad]
            gradient = torch.autograd.grad(loss, weights, allow_unused=True, retain_graph=True)
            results.append((loss, logs, torch.cat([each.flatten() for each in gradient if each is not None])))
        (cached, logs, gradient), (expected, live_logs, live_gradient) = results
        torch.testing.assert_close(cached, expected, rtol=tolerance, atol=0)
        assert (gradient - live_gradient).norm() <= tolerance * live_gradient.norm()
        assert logs.keys() == live_logs.keys() and "kd_mse" in logs
        seen.append(batch["teacher"].dtype)
        return cached, logs

    monkeypatch.setattr(module, "compute_losses", spied)
    distil(script, "--cache_teacher_dtype", dtype, "--kd_loss", kind)
    assert seen == [{"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]] * 2


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_teacher_is_gone_in_the_steps(distil, monkeypatch, script):
    """The student's class is the teacher's: one such model has weights then."""
    module, alive = importlib.import_module(f"train_lift_{script}"), []
    losses = module.compute_losses

    def spied(student, *others, **options):
        gc.collect()
        models = [each for each in gc.get_objects() if type(each) is type(student.model)]
        alive.append([each for each in models if not any(weight.is_meta for weight in each.parameters())])
        assert alive[-1] == [student.model]
        return losses(student, *others, **options)

    monkeypatch.setattr(module, "compute_losses", spied)
    distil(script)
    assert len(alive) == 2


def test_draws_are_the_seeds_whoever_makes_them():
    """Those of a row and a pass, in whatever order and process; other ones in another pass, row or seed."""

    def draw(count: int, device: torch.device) -> dict[str, torch.Tensor]:
        return {"noise": torch.randn(count, 3, device=device), "timesteps": torch.randint(1000, (count,))}

    rows = [{"x": torch.tensor(row)} for row in range(5)]
    drawn = DrawnDataset(rows, 3, 7, draw)
    assert len(drawn) == 15
    torch.manual_seed(0)
    before = torch.get_rng_state()
    noise = [drawn[index]["draws"]["noise"] for index in range(15)]
    assert torch.equal(torch.get_rng_state(), before)  # a step's own draws go on as they would
    assert [drawn[index]["x"].item() for index in range(15)] == [*range(5)] * 3
    assert len({tuple(each.tolist()) for each in noise}) == 15
    loader = torch.utils.data.DataLoader(drawn, batch_size=4, num_workers=2)
    again = torch.cat([batch["draws"]["noise"] for batch in loader])
    assert torch.equal(again, torch.stack(noise))
    more, other = DrawnDataset(rows, 4, 7, draw), DrawnDataset(rows, 3, 8, draw)
    assert all(torch.equal(more[index]["draws"]["noise"], noise[index]) for index in range(15))
    assert not torch.equal(other[0]["draws"]["noise"], noise[0])


# --------------------------------------------------------------------------------------------------- computed once


def test_runs_share_it_and_more_draws_go_on_from_fewer(distil, tmp_path, monkeypatch):
    """Another student, loss and learning rate ask the teacher nothing; a third draw per image asks for that alone."""
    monkeypatch.setattr(common.cache, "CACHE_SHARD", 40)  # of 96 images: a pass ends within a shard
    distil("unet")
    ((name, first),) = shards(tmp_path).items()
    # A list of Diffusers' own whose order is another one in each process.
    assert "_use_default_values" not in (tmp_path / "cache" / "lift-encodings" / name / "key.json").read_text()
    assert first == [f"rows-{start:09d}" for start in (0, 40, 80, 96, 136, 176)]
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.arrow")}
    changes = ("--student", 0.25, "--kd_loss", "mse", "--learning_rate", 1e-3, "--train_batch_size", 8)
    distil("unet", *changes, output_dir="other")
    distil("unet", "--cache_teacher", 3, output_dir="more")
    assert shards(tmp_path) == {name: [*first, *(f"rows-{start:09d}" for start in (192, 232, 272))]}
    assert all(path.stat().st_mtime_ns == time for path, time in written.items())


@pytest.fixture
def keys_of(distil, monkeypatch):
    """`keys_of(script, *flags)` is the keys of a run's caches as JSON, the predictions' last; the run ends there."""

    def find(script: str, *flags) -> list[str]:
        keys = []

        def spied(dataset, load_encoder, key, *others, **options):
            keys.append(json.dumps(key, sort_keys=True))
            if "draws" in key:
                raise SystemExit
            return common.cache.cache_encodings(dataset, load_encoder, key, *others, **options)

        monkeypatch.setattr(f"train_lift_{script}.cache_encodings", spied)
        with pytest.raises(SystemExit):
            distil(script, *flags)
        assert [key for key in keys if '"draws"' in key] == keys[-1:] != []
        return keys

    return find


def test_what_shapes_a_prediction_makes_another_cache(keys_of):
    changes = (
        (),
        ("--seed", 1),
        ("--cache_teacher_dtype", "bf16"),
        ("--resolution", 8, "--group_size", 8),
        ("--no-random_flip",),
        ("--mixed_precision", "bf16"),
    )
    keys = [keys_of("unet", *flags)[-1] for flags in changes]
    assert len({*keys}) == len(keys)


@pytest.mark.parametrize("script", SCRIPTS)
def test_other_images_or_parts_of_the_teacher_make_other_caches(keys_of, teachers, script):
    """Of predictions and encodings: those of other images, or by another VAE, would else be taken for them."""
    flags = ("--cache_latents",) if script == "dit" else ()
    keys, fewer = keys_of(script, *flags), keys_of(script, *flags, "--max_train_samples", 8)
    assert len(keys) == len(fewer) and all((key in fewer) == ('"prompts"' in key) for key in keys)
    encodings = "".join(key for key in keys[:-1] if '"prompts"' not in key)
    for folder in (path for path in teachers[script].iterdir() if path.is_dir()):
        named = f'"{folder.name}' if folder.name == "scheduler" else f'"{folder.name}/'  # by its config, by its files
        assert named in keys[-1]
        assert (named in encodings) == (folder.name not in ("scheduler", "unet", "transformer"))
    assert str(teachers[script].resolve()) in keys[-1]
    if script != "unet":  # a teacher of one precision predicts otherwise on latents of another
        assert keys_of(script, *flags, "--teacher_dtype", "fp32", "--mixed_precision", "bf16")[-1] != keys[-1]


def test_what_stands_for_no_caption_makes_another_cache(keys_of, teachers, tmp_path):
    """SDXL's pipeline says whether it is zeros, in a file of no part."""
    teacher = shutil.copytree(teachers["sdxl"], tmp_path / "teacher")
    key = keys_of("sdxl", "--pretrained_teacher_model", teacher)[-1]
    index = json.loads((teacher / "model_index.json").read_text())
    changed = index | {"force_zeros_for_empty_prompt": not index.get("force_zeros_for_empty_prompt", True)}
    (teacher / "model_index.json").write_text(json.dumps(changed))
    assert keys_of("sdxl", "--pretrained_teacher_model", teacher)[-1] != key


# ------------------------------------------------------------------------------------------------------ whole runs


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_resumed_run_equals_an_uninterrupted_one(distil, tmp_path, script):
    flags = ("--max_train_steps", 3, "--checkpointing_steps", 2)
    whole = distil(script, *flags, output_dir="whole")
    resumed = tmp_path / "resumed"
    shutil.copytree(whole / "checkpoint-2", resumed / "checkpoint-2")
    shutil.copy(whole / "metrics.jsonl", resumed)
    distil(script, *flags, "--resume_from_checkpoint", "latest", output_dir="resumed")
    assert same(weights(resumed), weights(whole))
    assert without_time(resumed) == without_time(whole) and len(metrics(whole)) == 3
    grids = [Image.open(folder / "samples" / "step-000003.png") for folder in (whole, resumed)]
    assert list(grids[0].getdata()) == list(grids[1].getdata())  # the teacher's samples among them


def test_the_grid_shows_the_teacher_that_is_gone(distil, run, tmp_path, monkeypatch):
    import common.reporting

    shown = []
    sample_models = common.reporting.sample_models

    def spied(sample, teacher, *others):
        samples = sample_models(sample, teacher, *others)
        shown.append((teacher, list(samples)))
        return samples

    monkeypatch.setattr("common.reporting.sample_models", spied)
    distil("unet")
    assert [models for _, models in shown] == [["teacher", "student"], ["teacher", "student", "EMA student"]]
    assert all(teacher is None for teacher, _ in shown)
    card = (tmp_path / "student" / "README.md").read_text()
    assert "cached for 2 draws per image" in card
    assert re.search(r"Teacher: `.*`, 176,849 parameters", card)


def test_an_epoch_is_a_pass_over_the_images(distil):
    """Of 96 images, not of their draws: 1.5 epochs of 24 batches are 36 steps."""
    folder = distil("unet", "--num_train_epochs", 1.5)
    assert metrics(folder)[-1]["step"] == 36


def test_two_processes_fill_it_and_train(teachers, images, tmp_path):
    command = ("train_lift_unet.py", "--pretrained_teacher_model", teachers["unet"], "--train_data_dir", images)
    command += ("--output_dir", tmp_path / "student", "--cache_dir", tmp_path / "cache", "--cache_teacher", 4)
    finished = launch(*command, *SHORT, *SCRIPTS["unet"], prefix=TWO_PROCESSES)
    assert finished.returncode == 0, finished.stdout
    assert "96 images, 12 batches an epoch" in finished.stdout  # of 2 x 4 images
    assert [len(rows) for rows in shards(tmp_path).values()] == [4]
    rows = metrics(tmp_path / "student")
    assert len(rows) == 2 and all(row["kd_mse"] > 0 for row in rows)


def test_a_teacher_that_overflows_the_storage_is_named(distil, teachers, tmp_path):
    teacher = shutil.copytree(teachers["unet"], tmp_path / "loud")
    unet = DDPMPipeline.from_pretrained(teacher).unet
    unet.conv_out.weight.data *= 1e7
    unet.save_pretrained(teacher / "unet")
    says = "error: --cache_teacher_dtype fp16: the teacher's prediction is not finite; pass --cache_teacher_dtype bf16"
    with pytest.raises(SystemExit, match=says):
        distil("unet", "--pretrained_teacher_model", teacher)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_dry_run_says_what_it_takes(run, teachers, capsys, script):
    flags = ("--pretrained_teacher_model", teachers[script], "--dry_run", "--lambda_kd_feat", 0, *SCRIPTS[script][:2])
    run(f"train_lift_{script}", *flags)
    live = capsys.readouterr().out
    run(f"train_lift_{script}", *flags, "--cache_teacher", 3, "--max_train_samples", 2048)
    cached = capsys.readouterr().out
    assert "teacher weights" in live and "teacher weights" not in cached
    # Three predictions per image in float16: 1 x 16 x 16, 4 x 8 x 8, twice that with DiT's variance, 4 x 8 x 8.
    outputs = {"unet": 256, "sd21": 256, "dit": 512, "sd3": 256, "sdxl": 256}[script]
    size = 3 * 2048 * outputs * 2 / 2**20
    assert f"cached beforehand, for 2,048 images: {size:,.1f} MiB" in cached
    assert cached.count(" min\n") == 2


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (
            ["--lambda_kd_feat", 1e-6],
            "--cache_teacher 2 keeps predictions alone, --lambda_kd_feat 1e-06 needs features",
        ),
        (["--kd_loss", "none"], "--cache_teacher 2 with --kd_loss none, which asks no teacher"),
        (["--cache_teacher", 0], "--cache_teacher 0 is out of range; pass at least 1"),
    ],
    ids=lambda flags: flags[0] if isinstance(flags, list) else "",
)
def test_what_does_not_go_with_it_is_refused(distil, flags, says):
    with pytest.raises(SystemExit, match=f"^error: {re.escape(says)}"):
        distil("unet", *flags)
