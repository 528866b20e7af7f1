"""Cached encodings: computed once, resumable, and the same data as without a cache."""

import json
import os
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import common.cache
from common.metrics import read_metrics
from common.teachers import TeacherSource
from common.training import seed_step

import datasets
import pytest
import torch
from accelerate import Accelerator
from conftest import STEADY, TWO_PROCESSES, inputs_of, launch
from PIL import Image, ImageOps
from safetensors.torch import load_file

import train_lift_sd21
from tiny_models import save_sd_pipeline


SHORT = [
    *("--train_batch_size", 4, "--gradient_accumulation_steps", 1, "--max_train_steps", 3, "--logging_steps", 1),
    *("--num_inference_steps", 1, "--report_to", "none", "--dataloader_num_workers", 0, "--student", "bk_extreme"),
    *("--lambda_kd_feat", 0, "--validation_prompts", "a bag"),
]


# -------------------------------------------------------------------------------------------- the files, by themselves


class Encoder:
    """Stands for the models: counts how often it is loaded, and which rows it gets."""

    def __init__(self, fail_at: int | None = None, dtype: torch.dtype = torch.float32):
        self.loaded, self.rows, self.batches, self.fail_at, self.dtype = 0, [], [], fail_at, dtype

    def load(self):
        self.loaded += 1
        return self.encode

    def encode(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        numbers = batch["x"].tolist()
        if self.fail_at in numbers:
            raise KeyboardInterrupt
        self.rows += numbers
        self.batches.append(len(numbers))
        x = batch["x"].to(self.dtype)
        return {"square": x.square(), "table": x[:, None, None] * torch.ones(2, 3, dtype=self.dtype)}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """`cache(encoder, rows=10, ...)` encodes the numbers up to `rows` in shards of four, batches of three."""
    monkeypatch.setattr(common.cache, "CACHE_SHARD", 4)

    def encode(encoder, rows=10, key=None, rank=0, world=1, workers=0) -> datasets.Dataset:
        numbers = datasets.Dataset.from_dict({"x": [float(row) for row in range(rows)]}).with_format("torch")
        process = SimpleNamespace(
            process_index=rank, num_processes=world, is_local_main_process=rank == 0, wait_for_everyone=lambda: None
        )
        key = key or {"model": "a"}
        return common.cache.cache_encodings(numbers, encoder.load, key, tmp_path / "cache", 3, workers, process)

    return encode


def shards(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache").glob("lift-encodings/*/rows-*"))


def assert_rows(dataset, rows: int, dtype: torch.dtype = torch.float32) -> None:
    assert len(dataset) == rows
    for index in range(rows):
        row = dataset[index]
        assert row["square"].shape == () and row["square"].dtype == row["table"].dtype == dtype
        assert row["square"] == index**2 and (row["table"] == index).all() and row["table"].shape == (2, 3)


@pytest.mark.parametrize("workers", [0, 2])
def test_rows_come_back_in_order_and_the_models_run_once(cache, tmp_path, workers):
    encoder = Encoder()
    assert_rows(cache(encoder, workers=workers), 10)
    assert encoder.loaded == 1 and encoder.rows == [*range(10)] and encoder.batches == [3, 1, 3, 1, 2]
    assert len(shards(tmp_path)) == 3
    again = cache(encoder)
    assert_rows(again, 10)
    assert encoder.loaded == 1
    assert again.cache_files and all(Path(file["filename"]).exists() for file in again.cache_files)  # memory-mapped
    batch = next(iter(torch.utils.data.DataLoader(again, batch_size=5)))
    assert batch["table"].shape == (5, 2, 3) and batch["square"].tolist() == [0, 1, 4, 9, 16]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_what_it_is(cache, dtype):
    assert_rows(cache(Encoder(dtype=dtype)), 10, dtype)


def test_an_interrupted_cache_goes_on_where_it_stopped(cache, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        cache(Encoder(fail_at=6))
    (first,) = shards(tmp_path)
    written = {path: path.stat().st_mtime_ns for path in first.iterdir()}
    half = first.with_name(".rows-000000004-1")  # as a kill in the middle of writing leaves it
    half.mkdir()
    (half / "data-00000-of-00001.arrow").write_bytes(b"half")
    encoder = Encoder()
    assert_rows(cache(encoder), 10)
    assert encoder.rows == [8, 9, 4, 5, 6, 7]
    assert {path: path.stat().st_mtime_ns for path in first.iterdir()} == written
    assert len(shards(tmp_path)) == 3 and list(first.parent.glob(".rows*")) == [half]


def test_what_overflows_is_not_kept(cache, tmp_path):
    encoder = Encoder(dtype=torch.float16)
    encode = encoder.encode
    encoder.encode = lambda batch: {"moments": torch.full((len(batch["x"]), 2), torch.inf), **encode(batch)}
    with pytest.raises(SystemExit, match='its "moments" are not finite; pass --mixed_precision bf16 or no'):
        cache(encoder)
    assert not shards(tmp_path)


def test_temporary_files_of_two_machines_have_two_names(tmp_path, monkeypatch):
    """On a disk that they share, where their processes have one number."""
    names = []
    monkeypatch.setattr(datasets.Dataset, "save_to_disk", lambda _, path: names.append(path) or Path(path).mkdir())
    for name in ("rows-0", "rows-0.again"):
        common.cache._write_shard(tmp_path / name, [b"x"])
    assert len({name.split("-")[-1] for name in names}) == 2


def test_a_disk_without_room_is_refused_before_it_is_full(cache, tmp_path, monkeypatch, capsys):
    """What is left to encode counts, by the bytes of its first rows."""
    with pytest.raises(KeyboardInterrupt):
        cache(Encoder(fail_at=6))
    row = sum(len(data) for data in datasets.load_from_disk(shards(tmp_path)[0])["tensors"]) / 4
    encoder = Encoder()
    monkeypatch.setattr(common.cache.shutil, "disk_usage", lambda path: SimpleNamespace(free=6 * row - 1))
    with pytest.raises(SystemExit, match=r"--cache_dir .*cache takes .* for this cache, .* free .* larger disk"):
        cache(encoder)
    assert encoder.rows == [8, 9] and len(shards(tmp_path)) == 1
    monkeypatch.setattr(common.cache.shutil, "disk_usage", lambda path: SimpleNamespace(free=6 * row))
    assert_rows(cache(encoder), 10)
    assert "0 MB in all" in capsys.readouterr().err


def test_two_runs_may_fill_one_cache(cache, tmp_path):
    """The other run finishes a shard while this one computes it."""
    cache(Encoder())
    (other, *rest) = shards(tmp_path)
    aside = other.rename(tmp_path / "aside")
    for shard in rest:
        shutil.rmtree(shard)

    class Slow(Encoder):
        def encode(self, batch):
            if aside.exists():
                aside.rename(other)
            return super().encode(batch)

    assert_rows(cache(Slow()), 10)
    assert len(shards(tmp_path)) == 3 and not list(other.parent.glob(".rows*"))


@pytest.mark.parametrize("workers", [0, 2])
def test_runs_side_by_side_share_the_work(cache, tmp_path, workers):
    """The second begins at the end. Here it does all that is left while the first computes its first batch."""
    other = Encoder()

    class First(Encoder):
        def encode(self, batch):
            if not other.loaded:
                cache(other, rows=40)
            return super().encode(batch)

    first = First()
    assert_rows(cache(first, rows=40, workers=workers), 40)
    assert other.rows[:4] == [36, 37, 38, 39] and sorted(other.rows) == [*range(40)]
    assert len(first.rows) <= 4 * (1 + 2 * workers)  # what its workers had been asked for


def test_a_lost_shard_is_computed_again(cache, tmp_path):
    cache(Encoder())
    shutil.rmtree(shards(tmp_path)[1])
    encoder = Encoder()
    assert_rows(cache(encoder), 10)
    assert encoder.rows == [4, 5, 6, 7]


def test_processes_share_the_work(cache, tmp_path):
    """Each takes every n-th shard, whatever the others have done; a process without a shard loads nothing."""
    encoders = [Encoder() for _ in range(4)]
    for rank in (3, 2, 1):
        # It would wait for the others here. What they have written is missing on a machine with a folder of its own.
        with pytest.raises(SystemExit, match=r"--cache_dir .* lacks what other processes have written; pass one that"):
            cache(encoders[rank], rank=rank, world=4)
    assert_rows(cache(encoders[0], rank=0, world=4), 10)
    assert [encoder.rows for encoder in encoders] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9], []]
    assert [encoder.loaded for encoder in encoders] == [1, 1, 1, 0]
    assert len(shards(tmp_path)) == 3


def test_what_another_process_has_swept_is_no_error(tmp_path):
    common.cache._sweep(SimpleNamespace(glob=lambda pattern: [tmp_path / "gone"]))


def test_another_key_is_another_cache(cache, tmp_path):
    cache(Encoder())
    for key in ({"model": "b"}, {"model": "a", "resolution": 64}):
        encoder = Encoder()
        assert_rows(cache(encoder, key=key), 10)
        assert encoder.loaded == 1
    encoder = Encoder()
    cache(encoder, key={"resolution": 64, "model": "a"})  # the order of its entries does not matter
    assert encoder.loaded == 0
    folders = list((tmp_path / "cache" / "lift-encodings").iterdir())
    assert len(folders) == 3
    assert {"model": "a", "version": common.cache.CACHE_VERSION} in [
        json.loads((folder / "key.json").read_text()) for folder in folders
    ]


# --------------------------------------------------------------------------------------------- what the key is made of


@pytest.fixture
def encode(captioned, sd_teacher, tmp_path, run):
    """`encode(*flags)` caches the data as the script does; returns the rows, the prompts' embeddings, the folders."""

    def encode_data(*flags, teacher=sd_teacher, images=captioned, dtype=torch.float32):
        fixed = ("--pretrained_teacher_model", teacher, "--train_data_dir", images, "--cache_latents")
        fixed += ("--cache_dir", tmp_path / "cache", "--resolution", 32, "--dataloader_num_workers", 0)
        args = train_lift_sd21.parse_args([str(flag) for flag in (*fixed, *flags)])
        source = TeacherSource(str(teacher), args.teacher_revision, args.variant, train_lift_sd21.EXPECTED)
        tokenizer = train_lift_sd21.load_tokenizer(source)
        dataset, contents = train_lift_sd21.make_dataset(args, tokenizer)
        cache = partial(
            common.cache.cache_encodings,
            cache_dir=args.cache_dir,
            batch_size=args.encoding_batch_size,
            num_workers=0,
            accelerator=Accelerator(),
        )
        inputs = dataset, ["", "a bag"], contents, tokenizer, source, args.resolution, args.random_flip, cache
        encoded, text = train_lift_sd21.encode_dataset(*inputs, torch.device("cpu"), dtype)
        return encoded, text, {path.name for path in (tmp_path / "cache" / "lift-encodings").iterdir()}

    return encode_data


def test_the_key_names_everything_that_shapes_the_data(encode, captioned, sd_teacher, tmp_path, monkeypatch):
    """The same command finds its cache; whatever changes the moments or the embeddings makes another."""
    teacher = shutil.copytree(sd_teacher, tmp_path / "teacher")
    images = shutil.copytree(captioned, tmp_path / "images")
    sources = {"teacher": teacher, "images": images}
    known = encode(**sources)[2]
    assert len(known) == 2  # the data and the prompts
    constructed = []
    original = train_lift_sd21.Encoders
    monkeypatch.setattr(
        train_lift_sd21, "Encoders", lambda *a, **options: constructed.append(options) or original(*a, **options)
    )

    def new(*flags, **options) -> int:
        nonlocal known
        before = known
        constructed.clear()
        known = encode(*flags, **{**sources, **options})[2]
        assert before <= known and len(constructed) == len(known) - len(before)
        return len(known) - len(before)

    assert new() == 0
    assert new("--train_batch_size", 2, "--seed", 3, "--student", "bk_base", "--encoding_batch_size", 5) == 0
    assert new("--resolution", 64) == 1  # the prompts' stay
    assert new("--random_flip") == 1
    assert new("--max_train_samples", 8) == 1
    assert new("--max_train_samples", 8, "--seed", 1) == 1
    assert new(dtype=torch.bfloat16) == 2

    metadata = images / "metadata.jsonl"
    metadata.write_text(metadata.read_text().replace("bag", "sack"))
    assert new() == 1
    Image.new("RGB", (32, 32), "red").save(images / "00000.png")
    assert new() == 1
    assert new() == 0
    weights = teacher / "vae" / "diffusion_pytorch_model.safetensors"
    status = weights.stat()
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns + 1_000_000_000))
    assert new() == 2
    (teacher / "unet" / "config.json").touch()  # the U-Net has no part in it
    assert new() == 0
    assert new(teacher=save_sd_pipeline(tmp_path / "other")) == 2


def test_the_cache_holds_what_the_encoders_say(encode, captioned, sd_teacher):
    encoded, text, _ = encode("--random_flip", "--encoding_batch_size", 7)
    assert len(encoded) == 48 and encoded[0]["moments"].shape == (2, 2, 4, 8, 8)
    pipeline = train_lift_sd21.StableDiffusionPipeline.from_pretrained(sd_teacher)
    rows = [json.loads(line) for line in (captioned / "metadata.jsonl").read_text().splitlines()]
    for index in (0, 13, 47):
        image = Image.open(captioned / rows[index]["file_name"])
        for flip, view in enumerate((image, ImageOps.mirror(image))):
            pixels = pipeline.image_processor.preprocess(view)
            with torch.no_grad():
                latents = pipeline.vae.encode(pixels).latent_dist
            wanted = torch.stack([latents.mean[0], latents.std[0]]) * pipeline.vae.config.scaling_factor
            torch.testing.assert_close(encoded[index]["moments"][flip], wanted, rtol=1e-4, atol=1e-5)
        caption = pipeline.encode_prompt(rows[index]["text"], "cpu", 1, False)[0][0]
        torch.testing.assert_close(encoded[index]["text"], caption.detach(), rtol=1e-4, atol=1e-5)
    for row, prompt in zip(text, ("", "a bag")):
        wanted = pipeline.encode_prompt(prompt, "cpu", 1, False)[0][0]
        torch.testing.assert_close(row, wanted.detach(), rtol=1e-4, atol=1e-5)


def test_bfloat16_is_kept(encode):
    encoded, text, _ = encode("--max_train_samples", 4, dtype=torch.bfloat16)
    assert encoded[0]["moments"].dtype == encoded[0]["text"].dtype == text.dtype == torch.bfloat16
    assert encoded[0]["moments"].shape == (1, 2, 4, 8, 8)


# ------------------------------------------------------------------------------------------------------------ in a run


@pytest.fixture
def distil(run, sd_teacher, captioned, tmp_path):
    """`distil("name", *flags)` runs three steps into a new folder and returns its metrics."""

    def distil_into(name: str, *flags) -> list[dict]:
        source = ("--pretrained_teacher_model", sd_teacher, "--train_data_dir", captioned)
        source += ("--cache_dir", tmp_path / "cache", "--output_dir", tmp_path / name)
        run("train_lift_sd21", *source, *SHORT, *flags)
        return read_metrics(tmp_path / name / "metrics.jsonl")

    return distil_into


@pytest.mark.parametrize("flags", [(), ("--random_flip",)], ids=["as they are", "flipped"])
def test_cached_and_uncached_runs_see_the_same_data(distil, monkeypatch, flags):
    seen: dict[str, list] = {}
    add_noise = train_lift_sd21.add_noise

    def record(name):
        def recorded(scheduler, latents, noise, timesteps):
            seen.setdefault(name, []).append(latents)
            return add_noise(scheduler, latents, noise, timesteps)

        monkeypatch.setattr(train_lift_sd21, "add_noise", recorded)

    record("plain")
    plain = distil("plain", *STEADY, *flags)
    record("cached")
    cached = distil("cached", "--cache_latents", *STEADY, *flags)
    torch.testing.assert_close(seen["cached"], seen["plain"], rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(cached, plain):
        for key in ("loss", "task", "kd", "coarse", "fine"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-5)
    assert len({row["loss"] for row in plain}) == len(plain) == 3

    monkeypatch.setattr(train_lift_sd21, "Encoders", None)  # loading them again would be a TypeError
    record("again")
    again = distil("again", "--cache_latents", *STEADY, *flags)
    assert [row["loss"] for row in again] == [row["loss"] for row in cached]
    assert all(map(torch.equal, seen["again"], seen["cached"]))


@pytest.mark.parametrize(("script", "student"), [("sd21", "bk_extreme"), ("sdxl", "extreme"), ("sd3", "half")])
def test_what_the_end_alone_needs_is_missed_before_the_first_step(run, teachers, captioned, tmp_path, script, student):
    """Where an earlier run has cached what the text encoders give, they are read for the result alone."""
    teacher, cache = shutil.copytree(teachers[script], tmp_path / "teacher"), ("--cache_dir", tmp_path / "cache")
    flags = ("--pretrained_teacher_model", teacher, "--train_data_dir", captioned, *cache, "--cache_latents")
    flags = (f"train_lift_{script}", *SHORT, "--student", student, "--max_train_steps", 1, *flags, "--output_dir")
    run(*flags, tmp_path / "first")
    (teacher / "text_encoder" / "model.safetensors").unlink()
    with pytest.raises(
        SystemExit, match=r"^error: --pretrained_teacher_model \S+ does not load: .*text_encoder|no file"
    ):
        run(*flags, tmp_path / "second")
    assert not (tmp_path / "second").exists()


def test_what_does_not_fit_the_gpu_is_named(distil, monkeypatch):
    def full(*inputs, **options):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with monkeypatch.context() as patch:
        patch.setattr(train_lift_sd21.Encoders, "encode_images", full)
        with pytest.raises(SystemExit, match=r"^error: --encoding_batch_size 3 does not fit the GPU: CUDA out of mem"):
            distil("encoding", "--cache_latents", "--encoding_batch_size", 3)
    with monkeypatch.context() as patch:
        patch.setattr("common.teacher_cache.predict", full)
        with pytest.raises(SystemExit, match=r"^error: --train_batch_size 4 does not fit the GPU: CUDA out of memory"):
            distil("caching", "--cache_latents", "--cache_teacher", 1, "--lambda_kd_feat", 0)
    with monkeypatch.context() as patch:
        patch.setattr(train_lift_sd21, "sample_images", full)
        with pytest.raises(SystemExit, match=r"^error: the sample grid does not fit .* fewer --validation_prompts"):
            distil("sampling", "--cache_latents")
        with pytest.raises(SystemExit, match=r"^error: the grid of the teacher's samples does not fit"):
            distil("sampling", "--cache_latents", "--cache_teacher", 1, "--lambda_kd_feat", 0)
    with monkeypatch.context() as patch:
        patch.setattr("common.teacher_weights.freeze", full)
        with pytest.raises(
            SystemExit, match=r"^error: the teacher does not fit .* pass --teacher_dtype or --offload_"
        ):
            distil("holding", "--cache_latents")


def test_each_access_draws_from_the_cached_moments_anew(monkeypatch):
    monkeypatch.setattr(train_lift_sd21, "add_noise", lambda scheduler, latents, *others: (latents, latents))
    mean = torch.stack([torch.zeros(4, 8, 8), torch.full((4, 8, 8), 100.0)])  # as it is, and flipped
    moments = torch.stack([mean, torch.full_like(mean, 2.0)], dim=1)
    batch = {"moments": torch.stack([moments] * 6), "text": torch.zeros(6, 24, 16)}
    seen = []

    def student(sample, timestep, encoder_hidden_states):
        seen.append(sample)
        return torch.zeros_like(sample), []

    draws = {"steps": 1000, "random_flip": True, "caption_dropout": 0.0}
    settings = {"scheduler": None, "encoders": None, "no_text": torch.zeros(24, 16)}
    inputs = inputs_of(train_lift_sd21, (4, 8, 8), draws, **settings)
    for step in (*range(1, 31), 1):
        seed_step(0, step, 0, 0)
        train_lift_sd21.compute_losses(student, None, batch, 0.5, inputs, None, (1.0, 1.0, 1.0))
    assert torch.equal(seen[0], seen[-1])
    views = torch.stack(seen[:-1])  # (steps, images, C, h, w)
    flipped = views.mean((2, 3, 4)) > 50
    assert ((flipped.float().mean(0) > 0.2) & (flipped.float().mean(0) < 0.8)).all()
    drawn = views - 100 * flipped[:, :, None, None, None]
    assert drawn.std() == pytest.approx(2, rel=0.02) and drawn.mean().abs() < 0.02
    assert drawn.std(0).min() > 0.5  # every element, from step to step


def test_two_processes_write_one_cache_and_train(sd_teacher, captioned, tmp_path):
    source = ("--pretrained_teacher_model", sd_teacher, "--train_data_dir", captioned, "--cache_latents")
    command = ("train_lift_sd21.py", *source, "--output_dir", tmp_path / "student", "--cache_dir", tmp_path / "cache")
    finished = launch(*command, *SHORT, prefix=TWO_PROCESSES)
    assert finished.returncode == 0, finished.stdout
    assert "48 images, 6 batches an epoch" in finished.stdout  # of 2 x 4 images
    folders = [*(tmp_path / "cache" / "lift-encodings").iterdir()]
    assert len(folders) == 2
    assert (
        sorted(path.name for folder in folders for path in folder.iterdir())
        == ["key.json"] * 2 + ["rows-000000000"] * 2
    )
    rows = read_metrics(tmp_path / "student" / "metrics.jsonl")
    assert len(rows) == 3 and all(row["loss"] > 0 for row in rows)
    assert load_file(tmp_path / "student" / "unet" / "diffusion_pytorch_model.safetensors")
