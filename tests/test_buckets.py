"""Aspect-ratio buckets: where images go, what a batch holds, and that runs with them are like any other runs."""

import importlib
import io
import json
import logging
import re
import shutil
import socket
from pathlib import Path

from common.batches import make_dataloader
from common.buckets import BucketBatchSampler, read_buckets
from common.cache import collate_alike
from common.data import drop_unreadable, load_images
from common.images import choose_size, load_pixels

import numpy as np
import pytest
import torch
from accelerate import Accelerator, DataLoaderConfiguration, PartialState
from conftest import STEADY, metrics, same, weights, without_time
from diffusers import DiffusionPipeline
from PIL import Image
from torch.utils.data import RandomSampler
from torchvision.transforms import v2

import train_lift_sd21
from fork_server import make_fork_server, start_run
from lift_utils import FeatureModel
from tiny_models import save_pixart_pipeline


SHORT = (
    *("--train_batch_size", 4, "--gradient_accumulation_steps", 1, "--max_train_steps", 6, "--logging_steps", 1),
    *("--num_inference_steps", 1, "--report_to", "none", "--dataloader_num_workers", 0, "--lambda_kd_feat", 0),
    *("--validation_prompts", "a bag", "--aspect_ratio_buckets", "auto", "--learning_rate", 1e-3),
)
SCRIPTS = {
    "sd21": ("--student", "bk_extreme"),
    "sd3": ("--student", "half", "--max_sequence_length", 8, "--no-cache_latents"),
}
SDXL = ("--student", "extreme")  # test_sdxl.py has more of it
# Of the photographs, (height, width): how many, and to which of the buckets of "auto" at 32 pixels they belong.
PHOTOS = {(40, 40): (9, (32, 32)), (40, 60): (6, (32, 48)), (75, 50): (5, (48, 32)), (20, 80): (2, (16, 48))}
COUNTS = [[16, 48, 2], [32, 32, 9], [32, 48, 6], [48, 32, 5]]


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """A folder of 22 images of noise in four shapes, mixed, with captions."""
    folder, draw = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    sizes = [size for size, (count, _) in PHOTOS.items() for _ in range(count)]
    lines = []
    for index in draw.permutation(len(sizes)):
        name = f"{len(lines):02d}.png"
        Image.fromarray(draw.integers(0, 256, (*sizes[index], 3), dtype=np.uint8)).save(folder / name)
        lines.append(json.dumps({"file_name": name, "text": f"a bag {len(lines)}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def distil(run, teachers, photos, tmp_path):
    """`distil(script, "name", *flags)` trains with buckets into a new folder and returns it."""

    def start(script: str, name: str = "student", *flags) -> Path:
        folder = tmp_path / name
        source = ("--pretrained_teacher_model", teachers[script], "--train_data_dir", photos)
        where = ("--output_dir", folder, "--cache_dir", tmp_path / "cache")
        run(f"train_lift_{script}", *source, *where, *SHORT, *SCRIPTS.get(script, SDXL), *flags)
        return folder

    return start


def record(pixels: np.ndarray) -> dict:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


# ----------------------------------------------------------------------------------------------------------- an image


@pytest.mark.parametrize(
    ("image", "bucket"),
    [((40, 40), (32, 32)), ((50, 41), (32, 32)), ((40, 60), (32, 48)), ((300, 190), (48, 32)), ((9, 90), (16, 48))],
)
def test_an_image_goes_where_its_shape_is_nearest_and_is_not_distorted(image, bucket):
    """It covers its bucket, the centre is kept, and what was square still is."""
    height, width = image
    buckets = read_buckets("auto", 32, 4, 16, 8)
    assert choose_size(height, width, buckets) == bucket
    pixels, side = np.zeros((height, width), dtype=np.uint8), min(image) // 2
    top, left = (height - side) // 2, (width - side) // 2
    pixels[top : top + side, left : left + side] = 255
    (loaded,) = load_pixels([record(pixels)], "L", buckets)
    assert loaded.shape == (1, *bucket) and loaded.dtype == torch.uint8
    white = loaded[0] > 127
    rows, columns = white.any(1).nonzero().flatten(), white.any(0).nonzero().flatten()
    scale = max(bucket[0] / height, bucket[1] / width)
    assert len(rows) == pytest.approx(side * scale, abs=1.5) and len(columns) == pytest.approx(side * scale, abs=1.5)
    for seen, whole in ((rows, bucket[0]), (columns, bucket[1])):
        assert (seen[0] + seen[-1]).item() == pytest.approx(whole - 1, abs=1.5)


@pytest.mark.parametrize("shape", [(16, 16), (31, 16), (16, 33), (47, 101), (101, 47), (7, 5), (640, 427)])
def test_squares_are_what_they_were(shape):
    """Bit for bit what torchvision makes by the shorter side; one bucket that is a square gives the same."""
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    steps = v2.Resize(16, v2.InterpolationMode.LANCZOS), v2.CenterCrop(16), v2.PILToTensor()
    expected = v2.Compose(steps)(Image.fromarray(pixels))
    for size in (16, [(16, 16)]):
        assert torch.equal(load_pixels([record(pixels)], "RGB", size)[0], expected)


@pytest.mark.parametrize("group_size", [None, 4, 16, 32, 64])
@pytest.mark.parametrize(("resolution", "factor", "multiple"), [(512, 8, 32), (512, 8, 64), (1024, 8, 16)])
def test_auto_gives_sizes_of_one_area_that_go_with_the_models_and_the_groups(resolution, factor, multiple, group_size):
    buckets = read_buckets("auto", resolution, factor, group_size, multiple)
    assert len(buckets) >= 5 and (resolution, resolution) in buckets
    for height, width in buckets:
        assert height % multiple == width % multiple == 0
        assert (height * width // factor**2) % (group_size or 1) == 0
        assert height * width == pytest.approx(resolution**2, rel=0.2)


def test_a_list_is_taken_as_it_is():
    assert read_buckets("512,512; 448,576", 512, 8, 16, 32) == [(512, 512), (448, 576)]
    assert read_buckets(None, 512, 8, 16, 32) is None


# ------------------------------------------------------------------------------------------------------------ a batch


def epochs(count: int, processes: int = 1, rank: int = 0, skip: int = 0, passes: int = 1) -> list[list[list[int]]]:
    """The batches of rows that a process gets in each epoch, by a dataloader as Accelerate prepares it."""
    from accelerate.data_loader import prepare_data_loader, skip_first_batches

    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True))
    loader = make_dataloader([*range(22 * passes)], 4, 0, accelerator, COUNTS)
    how = {"num_processes": processes, "process_index": rank, "use_seedable_sampler": True, "data_seed": 7}
    loader, found = prepare_data_loader(loader, **how), []
    for epoch in range(count):
        loader.set_epoch(epoch)
        batches = skip_first_batches(loader, skip) if skip else loader
        found.append([batch.tolist() for batch in batches])
        assert len(found[-1]) == len(loader) - skip
    return found


def bucket_of(row: int) -> int:
    return int(np.searchsorted(np.cumsum([count for *_, count in COUNTS]), row % 22, side="right"))


def test_a_batch_has_one_bucket_and_every_image_its_turn():
    found = epochs(30)
    for batches in found:
        assert sorted(bucket_of(batch[0]) for batch in batches) == [1, 1, 2, 3]  # 9, 6 and 5 images; 2 fill none
        assert all(len({bucket_of(row) for row in batch}) == 1 and len(batch) == 4 for batch in batches)
        rows = [row for batch in batches for row in batch]
        assert len(set(rows)) == len(rows) == 16
    assert {row for batches in found for batch in batches for row in batch} == {*range(2, 22)}
    assert found[0] != found[1] and epochs(2) == found[:2]


def test_processes_share_the_batches():
    whole, halves = epochs(3), [epochs(3, 2, rank) for rank in (0, 1)]
    for batches, ours, theirs in zip(whole, *halves):
        assert len(ours) == len(theirs) == 2
        assert [batch for pair in zip(ours, theirs) for batch in pair] == batches
    for parts, processes in ((whole, 1), (halves[0], 2)):  # as a resumed run begins
        assert epochs(3, processes, 0, skip=1) == [batches[1:] for batches in parts]


def test_the_order_is_that_of_a_run_without_buckets():
    """Of the same seed; with a single bucket, the batches are the same."""
    order = torch.randperm(10, generator=torch.Generator().manual_seed(3)).tolist()
    sampler = BucketBatchSampler(RandomSampler(range(10), generator=torch.Generator().manual_seed(3)), 4, [10])
    assert list(sampler) == [order[:4], order[4:8]] and len(sampler) == 2


def test_several_passes_fill_batches_together():
    """Two images drawn four times are eight rows: what --cache_teacher makes of them."""
    (batches,) = epochs(1, passes=4)
    assert sum(bucket_of(batch[0]) == 0 for batch in batches) == 2
    assert all(len({bucket_of(row) for row in batch}) == 1 for batch in batches)


def test_rows_of_several_shapes_are_encoded_apart():
    rows = [{"images": torch.full((3, *size), index), "more": {"x": index}} for index, size in enumerate(SIZES)]
    batches = collate_alike(rows)
    assert [tuple(batch["images"].shape) for batch in batches] == [(2, 3, 4, 8), (1, 3, 8, 4), (2, 3, 4, 8)]
    assert [index for batch in batches for index in batch["more"]["x"].tolist()] == [0, 1, 2, 3, 4]
    assert [batch.tolist() for batch in collate_alike([*torch.arange(4).reshape(2, 2)])] == [[[0, 1], [2, 3]]]


SIZES = [(4, 8), (4, 8), (8, 4), (4, 8), (4, 8)]


# -------------------------------------------------------------------------------------------------------------- a run


@pytest.mark.parametrize("script", SCRIPTS)
def test_live_and_cached_runs_are_one(distil, monkeypatch, caplog, tmp_path, script):
    """The same batches, of every bucket that fills one; the student loads and keeps the square as its size."""
    module = importlib.import_module(f"train_lift_{script}")
    add_noise, seen = module.add_noise, {}

    def recorded(*inputs):
        latents = inputs[1] if script == "sd21" else inputs[0]
        seen[name].append(latents)
        return add_noise(*inputs)

    monkeypatch.setattr(module, "add_noise", recorded)
    caplog.set_level(logging.INFO)
    rows = {}
    for name, flags in (("live", STEADY), ("cached", ("--cache_latents", *STEADY))):
        seen[name] = []
        rows[name] = metrics(distil(script, name, *flags))
    for cached, live in zip(seen["cached"], seen["live"]):
        torch.testing.assert_close(cached, live, rtol=1e-4, atol=1e-5)
    for cached, live in zip(rows["cached"], rows["live"]):
        assert all(cached[key] == pytest.approx(live[key], rel=1e-5) for key in ("loss", "task", "kd", "kd_mse"))
    card = (tmp_path / "live" / "README.md").read_text()
    assert "buckets (height x width): 32 x 32, 48 x 32, 32 x 48, 48 x 16, 16 x 48." in card
    assert {tuple(latents.shape) for latents in seen["live"]} == {(4, 4, 8, 8), (4, 4, 8, 12), (4, 4, 12, 8)}
    assert len(rows["live"]) == 6
    assert "images by bucket, height x width: 16 x 48: 2, 32 x 32: 9, 32 x 48: 6, 48 x 32: 5" in caplog.text
    assert "are not trained on: 16 x 48: 2" in caplog.text and "22 images, 4 batches an epoch" in caplog.text
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "live")
    assert (pipeline.unet if script == "sd21" else pipeline.transformer).config.sample_size == 8


@pytest.mark.parametrize(("script", "flags"), [("sd21", ()), ("sdxl", ()), ("sd3", ("--cache_latents",))])
def test_a_cached_teacher_is_the_live_one(distil, teachers, monkeypatch, script, flags):
    """On the same draws, whose noise has the size of the row; with and without cached latents beside it."""
    module = importlib.import_module(f"train_lift_{script}")
    losses, pipeline = module.compute_losses, DiffusionPipeline.from_pretrained(teachers[script])
    live = FeatureModel((pipeline.transformer if script == "sd3" else pipeline.unet).eval(), [])
    shapes = set()

    def spied(student, teacher, batch, *others, **options):
        cached, logs = losses(student, teacher, batch, *others, **options)
        uncached = {key: batch[key] for key in batch.keys() - {"teacher"}}
        torch.testing.assert_close(cached, losses(student, live, uncached, *others, **options)[0], rtol=1e-5, atol=0)
        shapes.add(tuple(batch["teacher"].shape))
        return cached, logs

    monkeypatch.setattr(module, "compute_losses", spied)
    flags += ("--cache_teacher", 2, "--cache_teacher_dtype", "fp32", "--max_train_steps", 10)
    distil(script, "student", *flags)
    assert shapes == {(4, 4, 8, 8), (4, 4, 8, 12), (4, 4, 12, 8), (4, 4, 4, 12)}  # two images, twice, fill a batch


RESUMED = {
    "sd21": ("--random_flip", "--dataloader_num_workers", 2, "--gradient_accumulation_steps", 3),
    "sdxl": ("--cache_latents", "--random_flip"),
    "sd3": ("--cache_latents", "--cache_teacher", 2),
}


@pytest.mark.parametrize("script", RESUMED)
def test_a_resumed_run_equals_an_uninterrupted_one(distil, tmp_path, script):
    """Within an epoch, and over its end."""
    flags = ("--max_train_steps", 4, "--checkpointing_steps", 3, *RESUMED[script])
    whole = distil(script, "whole", *flags)
    resumed = tmp_path / "resumed"
    shutil.copytree(whole / "checkpoint-3", resumed / "checkpoint-3")
    shutil.copy(whole / "metrics.jsonl", resumed)
    distil(script, "resumed", *flags, "--resume_from_checkpoint", "latest")
    assert_same(resumed, whole, 4)


def test_two_processes_resume_exactly(teachers, photos, tmp_path):
    """In a step they may have batches of different buckets."""
    context = make_fork_server(("train_lift_sd21", "datasets.packaged_modules.imagefolder.imagefolder"))
    source = ("--pretrained_teacher_model", teachers["sd21"], "--train_data_dir", photos, *SHORT, *SCRIPTS["sd21"])
    source += (
        "--cache_dir",
        tmp_path / "cache",
        "--cache_latents",
        "--max_train_steps",
        3,
        "--checkpointing_steps",
        1,
    )
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"

    def train(folder: Path, *flags) -> None:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        command, processes = [*source, "--output_dir", folder, *flags], []
        for rank in ("0", "1"):
            where = tmp_path / f"{folder.name}-{rank}.txt", tmp_path, {**shared, "RANK": rank, "LOCAL_RANK": rank}
            processes.append(start_run(context, "train_lift_sd21", command, *where))
        for process in processes:
            process.join(300)
        for process in processes:  # one that waits for another that has failed
            process.kill()
            process.join()
        text = (tmp_path / f"{folder.name}-0.txt").read_text()
        assert [process.exitcode for process in processes] == [0, 0], text
        assert "22 images, 2 batches an epoch" in text

    train(whole)
    shutil.copytree(whole / "checkpoint-1", resumed / "checkpoint-1")
    shutil.copy(whole / "metrics.jsonl", resumed)
    train(resumed, "--resume_from_checkpoint", "latest")
    assert_same(resumed, whole, 3)


def assert_same(ours: Path, theirs: Path, steps: int) -> None:
    """Both folders hold the same student and the same curves."""
    assert same(weights(ours), weights(theirs))
    assert without_time(ours) == without_time(theirs) and len(metrics(ours)) == steps


def test_other_buckets_are_other_data_for_a_cache(photos, sd_teacher, tmp_path):
    """And none are what they were: the square's caches stay."""
    source, found = train_lift_sd21.TeacherSource(str(sd_teacher), None, None, ""), []
    flags = ("--train_data_dir", photos, "--cache_dir", tmp_path, "--resolution", 32, "--dataloader_num_workers", 0)
    for buckets in (None, [(32, 32), (32, 48)], [(32, 48), (32, 32)], [(32, 32), (32, 48), (48, 32)]):
        args = train_lift_sd21.parse_args([str(flag) for flag in flags])
        args.aspect_ratio_buckets = buckets
        dataset, contents = train_lift_sd21.make_dataset(args, train_lift_sd21.load_tokenizer(source))
        found.append(json.dumps(contents))
        assert len(dataset) == 22 and ("buckets" in contents) == (buckets is not None)
    square, two, turned, three = found
    assert two == turned and len({square, two, three}) == 3


def test_the_influence_of_blocks_is_measured_on_every_bucket(distil, monkeypatch, capsys):
    monkeypatch.setitem(SCRIPTS, "sd3", ("--student_depth", 2, "--max_sequence_length", 8, "--cache_latents"))
    monkeypatch.setattr("train_lift_sd3.plot_influence", lambda *arguments: None)
    folder = distil("sd3", "student", "--max_train_steps", 1)
    assert "influence of the teacher's blocks on 22 images" in capsys.readouterr().out
    assert len(metrics(folder)) == 1


# -------------------------------------------------------------------------------------------------- what does not fit


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("32,32;32", "Invalid bucket format: '32'. Expected 'height,width'; pass auto, or sizes such as"),
        ("square", "Invalid bucket format: 'square'. Expected 'height,width'; pass auto, or sizes such as"),
        ("0,32", "Invalid integer in bucket pair '0,32': Bucket dimensions must be positive integers; pass auto"),
        ("32,36", "the bucket 32,36 is not divisible by the models; pass multiples of 8"),
        ("32,32;16,72", "the bucket 16,72 has more patches along a side than the teacher; pass sides of 64 at most"),
        (
            "24,40",
            "the bucket 24,40 with --group_size 16: group_size 16 does not divide the 60 elements of a channel;",
        ),
    ],
)
def test_sizes_that_do_not_fit_are_one_line(given, says):
    with pytest.raises(SystemExit, match=f"^error: --aspect_ratio_buckets {given}: {re.escape(says)}") as error:
        read_buckets(given, 32, 4, 16, 8, 64)
    assert "\n" not in str(error.value)


def test_groups_are_of_place_alone():
    assert read_buckets("24,40", 32, 4, None, 8) == [(24, 40)]


def test_buckets_have_about_one_area():
    """The dry run's memory and the grid are those of the resolution."""
    assert read_buckets("16,40;40,48", 32, 4, None, 8) == [(16, 40), (40, 48)]
    for given in ("16,24", "40,64"):
        with pytest.raises(SystemExit, match=f"bucket {given} has not about the area of --resolution 32; pass sizes"):
            read_buckets(given, 32, 4, None, 8)


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("dry", [(), ("--dry_run",)])
def test_every_bucket_is_checked_before_the_data_are_read(distil, tmp_path, script, dry):
    for given, says in (
        ("32,32;24,40", "the bucket 24,40 with --group_size 16"),
        ("36,32", "the bucket 36,32 is not"),
    ):
        with pytest.raises(SystemExit, match=f"^error: --aspect_ratio_buckets {given}: {says}"):
            distil(script, "student", "--aspect_ratio_buckets", given, *dry)
    with pytest.raises(SystemExit, match=r'^error: --aspect_ratio_buckets "" is empty'):
        distil(script, "student", "--aspect_ratio_buckets", "")
    assert not (tmp_path / "student").exists()


def test_sides_beyond_the_teachers_positions_are_refused(distil):
    with pytest.raises(SystemExit, match=r"^error: --aspect_ratio_buckets 16,72: the bucket 16,72 has more patches"):
        distil("sd3", "student", "--aspect_ratio_buckets", "16,72")


def test_a_dry_run_is_that_of_the_square(run, teachers, capsys):
    printed = []
    for flags in ((), ("--aspect_ratio_buckets", "auto")):
        run("train_lift_sd3", "--pretrained_teacher_model", teachers["sd3"], *SCRIPTS["sd3"], "--dry_run", *flags)
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] and "MACs" in printed[0]


def test_no_bucket_that_fills_a_batch_is_one_line(distil):
    says = (
        "--train_batch_size 10: the buckets fill 0 whole batches, fewer than there are processes (1); pass a smaller"
    )
    with pytest.raises(SystemExit, match=f"^error: {re.escape(says)}"):
        distil("sd21", "student", "--train_batch_size", 10)


def test_images_smaller_than_their_bucket_are_counted(photos, tmp_path, caplog):
    """Those of 40 x 60 pixels are, those of 75 x 50 not."""
    PartialState()  # which the logger needs
    dataset, source = load_images(None, None, str(photos), str(tmp_path), {"image_column": "image"})
    drop_unreadable(dataset, "image", source, 0.0, 0, [(32, 32), (48, 64), (48, 32), (16, 48)])
    says = "6 of 22 images (27.3%) are smaller than their bucket and will be enlarged; the smallest side is 40"
    assert says in caplog.text


def test_pixart_takes_squares_alone(run, photos, tmp_path):
    source = ("--pretrained_teacher_model", save_pixart_pipeline(tmp_path / "pixart"), "--train_data_dir", photos)
    with pytest.raises(SystemExit, match=r"^error: --aspect_ratio_buckets auto is for models whose positions"):
        run("train_lift_pixart", *source, "--output_dir", tmp_path / "student", "--aspect_ratio_buckets", "auto")
