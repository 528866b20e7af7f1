"""Streamed data: the order, how a run goes on in it, what stands in for unusable images, and what is refused."""

import importlib
import io
import itertools
import json
import pickle
import re
import shutil
import tarfile
import zipfile
from collections import Counter
from functools import partial
from pathlib import Path

import common.bookmarks
import common.fetching
from common.captions import find_no_caption
from common.classes import find_wrong_label
from common.data import load_images
from common.fetching import fetch
from common.images import load_pixels, open_image
from common.metrics import read_metrics
from common.streaming import StreamedDataset, StreamLoader, StreamPart

import datasets
import fsspec
import pytest
import torch
from accelerate import PartialState
from datasets.packaged_modules.webdataset import webdataset
from diffusers import DDPMPipeline
from PIL import Image
from safetensors.torch import load_file

import streams
import train_lift_unet
from fork_server import make_fork_server
from kills import kill_runs
from small_runs import FLAGS, STUDENTS, Case
from tiny_models import save_dit_pipeline, save_sd3_pipeline, save_sdxl_pipeline


CPU = torch.device("cpu")
COUNT = 40  # images, 10 a shard


def picture(number: int, size: int = 32) -> bytes:
    """A PNG whose brightness says which one it is."""
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), (number, number, number)).save(buffer, "PNG")
    return buffer.getvalue()


def write_shard(path: Path, samples: dict[str, dict[str, bytes]]) -> None:
    """A webdataset shard: the files of each sample by their extension."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as shard:
        for key, files in samples.items():
            for extension, content in files.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(content)
                shard.addfile(info, io.BytesIO(content))


def sample(number: int, **files: bytes) -> dict[str, bytes]:
    return {"png": picture(number), "txt": f"a bag {number}".encode(), "cls": str(number % 4).encode(), **files}


@pytest.fixture(autouse=True)
def state() -> None:
    """What Accelerate's loggers ask for."""
    PartialState()


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """Four webdataset shards of ten images, with captions and classes."""
    folder = tmp_path_factory.mktemp("shards")
    for first in range(0, COUNT, 10):
        samples = {f"{number:03d}": sample(number) for number in range(first, first + 10)}
        write_shard(folder / f"{first:03d}.tar", samples)
    return folder


@pytest.fixture(scope="module")
def tables(tmp_path_factory) -> Path:
    """The same images as four Parquet files, which `load_dataset` takes for a dataset as on the Hub."""
    folder = tmp_path_factory.mktemp("tables")
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    for first in range(0, COUNT, 10):
        rows = [{"image": {"bytes": picture(n), "path": None}, "text": f"a bag {n}"} for n in range(first, first + 10)]
        datasets.Dataset.from_list(rows, features=features).to_parquet(folder / f"train-{first:03d}.parquet")
    return folder


def load_examples(batch: dict[str, list], column: str) -> dict[str, list]:
    return {"images": load_pixels(batch[column], "L", 8)}


def open_stream(folder: Path, output_dir: Path, hub: bool = False, **settings) -> StreamedDataset:
    column = "image" if hub else "png"
    where = (str(folder), None, None) if hub else (None, None, str(folder))
    stream, source = load_images(*where, str(output_dir / "cache"), {"image_column": column}, streaming=True)
    known = {"max_unreadable": 0.01, "seed": 0, "shuffle_buffer": 7, "output_dir": str(output_dir)}
    return StreamedDataset(stream, source, partial(load_examples, column=column), column, **known | settings)


def numbers_of(batches, count: int) -> list[list[int]]:
    """Which images the next batches are of."""
    return [batch["images"][:, 0, 4, 4].tolist() for batch in itertools.islice(batches, count)]


def flat(batches: list[list[int]]) -> list[int]:
    return [number for batch in batches for number in batch]


# ----------------------------------------------------------------------------------------------------------- the order


@pytest.mark.parametrize("hub", [False, True])
def test_a_pass_has_each_image_once_and_each_pass_another_order(shards, tables, tmp_path, hub):
    folder = tables if hub else shards
    batches = StreamLoader(open_stream(folder, tmp_path, hub), 4, 0, CPU).batches_from(0)
    passes = [flat(numbers_of(batches, COUNT // 4)) for _ in range(3)]
    assert all(sorted(numbers) == list(range(COUNT)) for numbers in passes)
    assert passes[0] != passes[1] != passes[2]
    shard_orders = [list(dict.fromkeys(number // 10 for number in numbers)) for numbers in passes]
    assert len(set(map(tuple, shard_orders))) > 1
    again = StreamLoader(open_stream(folder, tmp_path, hub, seed=1), 4, 0, CPU).batches_from(0)
    assert flat(numbers_of(again, COUNT // 4)) != passes[0]


@pytest.mark.parametrize("hub", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_goes_on_exactly_where_it_stopped(shards, tables, tmp_path, monkeypatch, workers, hub):
    """Over the end of passes, with bookmarks and without them; batches of 3 do not divide a pass."""
    monkeypatch.setattr(common.bookmarks, "BOOKMARK_ROWS", 10)
    folder = tables if hub else shards

    def batches_from(done: int, output_dir: Path):
        return StreamLoader(open_stream(folder, output_dir, hub), 3, workers, CPU).batches_from(done)

    whole = numbers_of(batches_from(0, tmp_path / "whole"), 34)
    assert set(Counter(flat(whole)).values()) <= {2, 3, 4}  # 102 of 40 images; workers take turns
    for done in (1, 12, 13, 26, 27) if workers == 0 else (13, 26):
        assert numbers_of(batches_from(done, tmp_path / "whole"), 34 - done) == whole[done:]
    assert numbers_of(batches_from(27, tmp_path / "other"), 7) == whole[27:]
    files = sorted((tmp_path / "whole" / ".stream").rglob("*.jsonl"))
    assert [path.name for path in files] == [f"rank-0-worker-{worker}.jsonl" for worker in range(max(1, workers))]
    torn = files[0].read_text()
    files[0].write_text(torn[: len(torn) * 2 // 3])  # as a kill leaves it
    assert numbers_of(batches_from(27, tmp_path / "whole"), 7) == whole[27:]


def test_bookmarks_leave_little_to_read(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(common.bookmarks, "BOOKMARK_ROWS", 10)
    read, opened = [], StreamedDataset.read

    def counted(self, stream):
        for row in opened(self, stream):
            read.append(row)
            yield row

    monkeypatch.setattr(StreamedDataset, "read", counted)
    whole = numbers_of(StreamLoader(open_stream(shards, tmp_path), 4, 0, CPU).batches_from(0), 60)
    for done in (13, 29, 55):
        read.clear()
        assert (
            numbers_of(StreamLoader(open_stream(shards, tmp_path), 4, 0, CPU).batches_from(done), 1)[0] == whole[done]
        )
        assert len(read) <= 10 + 2 * 7 + 4


@pytest.mark.parametrize("hub", [False, True])
@pytest.mark.parametrize("world", [2, 3])  # by shards, and by rows, since 3 does not divide 4
def test_processes_share_a_pass(shards, tables, tmp_path, monkeypatch, world, hub):
    monkeypatch.setattr(common.bookmarks, "BOOKMARK_ROWS", 10)
    parts = []
    for rank in range(world):
        part = StreamPart(open_stream(tables if hub else shards, tmp_path, hub), 1, rank, world, tmp_path / "marks", 0)
        numbers = flat(numbers_of(iter(part), 2 * COUNT // world))
        parts.append(numbers[: COUNT // world])
        rows = [row[part.dataset.image_column] for row in itertools.islice(part.rows(0, 17), 5)]
        assert [open_image(row, "L").getpixel((0, 0)) for row in rows] == numbers[17:22]
    assert len(set(flat(parts))) == len(flat(parts)) == COUNT // world * world
    if world == 2:
        assert set(flat(parts)) == set(range(COUNT))


def test_bookmarks_of_other_data_do_not_count(shards, tmp_path, monkeypatch):
    """A run that was ended early, other images under the same names, and a new run into the same folder."""
    monkeypatch.setattr(common.bookmarks, "BOOKMARK_ROWS", 10)
    folder = tmp_path / "shards"
    folder.mkdir()
    for name in ("000", "010"):
        shutil.copy(shards / f"{name}.tar", folder)
    numbers_of(StreamLoader(open_stream(folder, tmp_path / "run"), 4, 0, CPU).batches_from(0), 5)
    for name, other in (("000", "020"), ("010", "030")):
        shutil.copy(shards / f"{other}.tar", folder / f"{name}.tar")
    whole = numbers_of(StreamLoader(open_stream(folder, tmp_path / "run"), 4, 0, CPU).batches_from(0), 9)
    loader = StreamLoader(open_stream(folder, tmp_path / "run"), 4, 0, CPU)
    assert set(flat(whole)) == set(range(20, 40)) and numbers_of(loader.batches_from(5), 4) == whole[5:]


def test_there_are_no_more_workers_than_shards(shards, tmp_path):
    assert StreamLoader(open_stream(shards, tmp_path), 4, 9, CPU).num_workers == 4
    assert StreamLoader(open_stream(shards, tmp_path), 4, 9, CPU, rank=1, world=2).num_workers == 2


def test_a_part_of_a_stream_can_be_sent_to_a_worker(shards, tmp_path):
    """Where workers are not forked: they start from what is pickled."""
    part = StreamPart(open_stream(shards, tmp_path), 4, 0, 1, tmp_path / "marks", 3)
    sent = pickle.loads(pickle.dumps(part))
    assert numbers_of(iter(sent), 4) == numbers_of(iter(part), 4)


def test_another_order_is_named(shards, tmp_path, caplog):
    done = StreamLoader(open_stream(shards, tmp_path), 4, 0, CPU)
    numbers_of(done.batches_from(0), 1)
    assert len(numbers_of(done.batches_from(1), 1)) == 1
    assert "no bookmark" not in caplog.text
    numbers_of(StreamLoader(open_stream(shards, tmp_path, shuffle_buffer=8), 4, 0, CPU).batches_from(1), 1)
    assert "all before batch 1 is read again" in caplog.text and "--dataloader_num_workers" in caplog.text


def test_files_out_of_an_archive_are_fetched(tmp_path):
    """As those of a dataset on the Hub that are files by themselves."""
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for number in range(8):
            archive.writestr(f"{number}.png", picture(number))
    rows = [{"png": {"path": f"zip://{number}.png::{tmp_path}/images.zip", "bytes": None}} for number in range(8)]
    dataset = open_stream_of(rows, tmp_path)
    assert sorted(numbers_of(StreamLoader(dataset, 8, 0, CPU).batches_from(0), 1)[0]) == list(range(8))
    rows[3]["png"]["path"] = f"zip://other.png::{tmp_path}/images.zip"
    with pytest.raises(SystemExit, match=r"other\.png.* is out of reach: .*--resume_from_checkpoint latest"):
        numbers_of(StreamLoader(open_stream_of(rows, tmp_path), 8, 0, CPU).batches_from(0), 1)


def test_a_network_that_is_down_for_a_while_is_waited_for(tmp_path, monkeypatch):
    """Not for a file that is not there."""
    (tmp_path / "file").write_bytes(b"here")
    attempts, waits, opens = [], [], fsspec.open

    def fails_twice(path, mode):
        attempts.append(path)
        if len(attempts) <= 2:
            raise ConnectionError("no network")
        return opens(path, mode)

    monkeypatch.setattr(common.fetching.fsspec, "open", fails_twice)
    monkeypatch.setattr(common.fetching.time, "sleep", waits.append)
    assert fetch(f"file://{tmp_path}/file", "--a b") == b"here" and waits == [1, 5]
    with pytest.raises(SystemExit, match=r"--a b: file://.*other is out of reach: .*--resume_from_checkpoint latest"):
        fetch(f"file://{tmp_path}/other", "--a b")
    assert waits == [1, 5]
    attempts.clear()
    monkeypatch.setattr(common.fetching, "WAITS", (7,))
    with pytest.raises(SystemExit, match="is out of reach: no network"):
        fetch(f"file://{tmp_path}/file", "--a b")
    assert waits == [1, 5, 7]


def test_images_of_the_hub_come_undecoded(images, tmp_path, monkeypatch):
    """`datasets` decodes those of a repository of image files by threads, which a cast of the column does not undo."""
    load = datasets.load_dataset

    def as_from_the_hub(**options):
        return load(**options).decode(num_threads=2)

    monkeypatch.setattr(datasets, "load_dataset", as_from_the_hub)
    dataset = open_stream(images, tmp_path, hub=True)
    (row,) = dataset.head(1)
    assert row["image"].keys() == {"path", "bytes"}
    assert len(numbers_of(StreamLoader(dataset, 4, 0, CPU).batches_from(0), 2)[0]) == 4


def test_the_benchmark(tmp_path, capsys):
    flags = ("--shards", "2", "--images", "120", "--passes", "0.5", "--output", str(tmp_path / "streams.json"))
    streams.main(streams.parse_args([*flags]))
    (row,) = json.loads((tmp_path / "streams.json").read_text())["rows"]
    assert row["images"] == 240 and row["images done"] == 120
    assert "| skipped, images per second |" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------- unusable images


def open_stream_of(rows: list[dict], output_dir: Path, **settings) -> StreamedDataset:
    features = datasets.Features({name: datasets.Value("string") for name in rows[0]})
    features["png"] = datasets.Image(decode=False)
    stream = datasets.Dataset.from_list(rows, features=features).to_iterable_dataset()
    known = {"max_unreadable": 0.01, "seed": 0, "shuffle_buffer": 7, "output_dir": str(output_dir)}
    return StreamedDataset(stream, "--a b", partial(load_examples, column="png"), "png", **known | settings)


def records(count: int, broken: tuple[int, ...] = ()) -> list[dict]:
    files = [b"\x89PNG" if number in broken else picture(number) for number in range(count)]
    return [{"png": {"path": f"{number}.png", "bytes": data}} for number, data in enumerate(files)]


@pytest.mark.parametrize("size", [1, 2])
def test_an_unusable_batch_leaves_its_place_to_the_next_image_that_is_usable(tmp_path, size):
    """In the same order, and the image that stands in comes in its own place, too."""
    rows, broken = records(20, (3, 4, 11)), {3, 4, 11}
    whole = flat(numbers_of(StreamLoader(open_stream_of(records(20), tmp_path), 1, 0, CPU).batches_from(0), 40))
    expected = []
    for first in range(0, 40, size):
        usable = [n for n in whole[first : first + size] if n not in broken] or [
            next(n for n in whole[first:] if n not in broken)
        ]
        batch = enumerate(whole[first : first + size])
        expected.append([usable[place % len(usable)] if n in broken else n for place, n in batch])
    loader = StreamLoader(open_stream_of(rows, tmp_path), size, 0, CPU)
    assert numbers_of(loader.batches_from(0), 40 // size - 1) == expected[:-1]
    assert numbers_of(loader.batches_from(6), 4) == expected[6:10]


def test_an_unusable_image_leaves_its_place_to_another_of_the_batch(tmp_path, capsys):
    whole = numbers_of(StreamLoader(open_stream_of(records(20), tmp_path), 4, 0, CPU).batches_from(0), 10)
    batches = numbers_of(StreamLoader(open_stream_of(records(20, (3, 11)), tmp_path), 4, 0, CPU).batches_from(0), 10)
    for before, after in zip(whole, batches):
        usable = [number for number in before if number not in (3, 11)]
        assert after == [n if n in usable else usable[place % len(usable)] for place, n in enumerate(before)]
    assert not {3, 11} & set(flat(batches))
    assert "takes the place of 3.png, of those that cannot be read" in capsys.readouterr().out


def test_shards_must_begin_with_whole_samples(tmp_path):
    """By the first five `datasets` decides which files a sample has."""
    samples = {str(number): sample(number) for number in range(8)}
    del samples["3"]["txt"]
    write_shard(tmp_path / "0.tar", samples)
    columns = {"image_column": "png", "caption_column": "txt"}
    says = "does not load: .*; pass whole shards, whose first five samples have the same kinds of files"
    with pytest.raises(SystemExit, match=says):
        load_images(None, None, str(tmp_path), str(tmp_path / "cache"), columns, streaming=True)
    samples = {str(number): sample(number) for number in range(8)}
    del samples["6"]["txt"]  # a later one is skipped
    write_shard(tmp_path / "0.tar", samples)
    stream, _ = load_images(None, None, str(tmp_path), str(tmp_path / "cache"), columns, streaming=True)
    assert [row["txt"] is None for row in stream] == [number == 6 for number in range(8)]


@pytest.mark.parametrize("extension", ["txt", "cls"])
def test_a_damaged_caption_or_class_counts_as_missing(tmp_path, capsys, monkeypatch, extension):
    samples = {str(number): sample(number) for number in range(8)}
    samples["6"][extension] = b"caf\xe9"  # Latin-1, and no number
    write_shard(tmp_path / "0.tar", samples)
    columns = {"image_column": "png", f"{extension}_column": extension}
    stream, source = load_images(None, None, str(tmp_path), str(tmp_path / "cache"), columns, streaming=True)
    load, fault = partial(load_examples, column="png"), partial(find_missing, column=extension)
    known = {"max_unreadable": 0.01, "seed": 0, "shuffle_buffer": 7, "output_dir": str(tmp_path / "run")}
    dataset = StreamedDataset(stream, source, load, "png", find_fault=fault, **known)
    numbers = flat(numbers_of(StreamLoader(dataset, 4, 0, CPU).batches_from(0), 2))
    assert sorted({*numbers}) == [0, 1, 2, 3, 4, 5, 7] and len(numbers) == 8
    assert "takes the place of 6.png, of those that miss it" in capsys.readouterr().out
    monkeypatch.setattr(webdataset.WebDataset, "DECODERS", webdataset.DECODERS)  # as where a worker is not forked
    rows = list(dataset.read(dataset.stream))
    assert [row[extension] is None for row in rows] == [number == 6 for number in range(8)]


def find_missing(row: dict, column: str) -> str | None:
    return "miss it" if row[column] is None else None


def test_too_many_unusable_images_end_the_run(tmp_path):
    dataset = open_stream_of(records(20, (3, 11)), tmp_path, max_unreadable=0.0)
    with pytest.raises(SystemExit, match=r"--a b: 1 of \d+ images cannot be used.*raise --max_unreadable 0\.0"):
        numbers_of(StreamLoader(dataset, 4, 0, CPU).batches_from(0), 9)
    dataset = open_stream_of(records(4, (0, 1, 2, 3)), tmp_path)
    with pytest.raises(SystemExit, match="11 of 11 images cannot be used"):
        numbers_of(StreamLoader(dataset, 4, 0, CPU).batches_from(0), 9)
    dataset = open_stream_of(records(4, (0, 1, 2, 3)), tmp_path, max_unreadable=1.0)
    with pytest.raises(SystemExit, match="none of many images in a row can be used, see above; repair or remove"):
        numbers_of(StreamLoader(dataset, 4, 2, CPU).batches_from(0), 9)  # a worker's message comes through


def test_what_is_wrong_with_a_row():
    captioned = partial(find_no_caption, caption_column="text")
    assert captioned({"text": "a bag"}) is None
    assert captioned({"text": " "}) == captioned({"text": None}) == "have no caption"
    labelled = partial(find_wrong_label, label_column="cls", numbers=[4, 2], num_classes=4)
    assert labelled({"cls": 1}) is None
    assert all("none of the model's 0 to 3" in labelled({"cls": label}) for label in (0, -1, None))


def test_first_rows_are_usable_ones(tmp_path):
    rows = [{**row, "text": text} for row, text in zip(records(6), [None, "", "a", "b", "c", "d"])]
    dataset = open_stream_of(rows, tmp_path, find_fault=partial(find_no_caption, caption_column="text"))
    assert [row["text"] for row in dataset.head(3)] == ["a", "b", "c"]
    chosen = [row["images"][0, 4, 4].item() for row in dataset.sample(3)]
    assert len(set(chosen)) == 3 and set(chosen) <= {2, 3, 4, 5}
    dataset = open_stream_of(rows[:2], tmp_path, find_fault=partial(find_no_caption, caption_column="text"))
    with pytest.raises(SystemExit, match="has no images that can be trained on"):
        dataset.head(3)


# ------------------------------------------------------------------------------------------------------------ refusals


def test_a_stream_smaller_than_a_batch(shards, tmp_path):
    with pytest.raises(SystemExit, match=r"--train_batch_size 41 is more than the 40 images.*pass a smaller one"):
        numbers_of(StreamLoader(open_stream(shards, tmp_path), 41, 0, CPU).batches_from(0), 1)
    with pytest.raises(SystemExit, match=r"--train_batch_size 21 is more than the 20 images that a data worker"):
        numbers_of(StreamLoader(open_stream(shards, tmp_path), 21, 2, CPU).batches_from(0), 1)


def test_a_shard_that_breaks_off(shards, tmp_path):
    for path in shards.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    broken = tmp_path / "020.tar"
    broken.write_bytes(broken.read_bytes()[:5000])
    with pytest.raises(SystemExit, match=r"--train_data_dir .*: reading stopped at .*--resume_from_checkpoint latest"):
        numbers_of(StreamLoader(open_stream(tmp_path, tmp_path / "run"), 4, 0, CPU).batches_from(0), 20)


SCRIPTS = ("unet", "sd21", "sdxl", "dit", "sd3")
WITHOUT = {("unet", "--cache_latents"), ("unet", "--aspect_ratio_buckets"), ("dit", "--aspect_ratio_buckets")}


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--cache_latents",), r"--cache_latents with --streaming: it encodes all images before the first step; drop"),
        (("--cache_teacher", "2", "--lambda_kd_feat", "0"), r"--cache_teacher 2 with --streaming: it predicts on all"),
        (("--aspect_ratio_buckets", "auto"), r"--aspect_ratio_buckets auto with --streaming: it sorts all images"),
        (("--max_train_samples", "8"), r"--max_train_samples 8 with --streaming.*--max_train_steps"),
        (("--num_train_epochs", "1"), r"--num_train_epochs 1\.0 with --streaming.*pass --max_train_steps"),
        (("--shuffle_buffer", "0"), r"--shuffle_buffer 0 is out of range; pass at least 1"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_what_does_not_go_with_a_stream(shards, capsys, script, flags, message):
    command = ["--streaming", "--train_data_dir", str(shards), "--pretrained_teacher_model", "x"]
    command += ["--student_depth", "2"] if script == "dit" else []
    command += ["--no-cache_latents"] if script == "sd3" else []
    parse_args = importlib.import_module(f"train_lift_{script}").parse_args
    assert parse_args(command).streaming
    with pytest.raises(SystemExit) as refused:
        parse_args([*command, *flags])
    if (script, flags[0]) in WITHOUT:
        assert f"unrecognized arguments: {flags[0]}" in capsys.readouterr().err
    else:
        assert re.search(message, str(refused.value))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"image_column": "jpg"}, r"--image_column jpg is not in the data; choose one of png, txt, cls"),
        ({"image_column": "cls"}, r"--image_column cls holds Value\('int64'\); pass the column of the images"),
        ({"image_column": "png", "caption_column": "cls"}, r"--caption_column cls holds .*; pass a column of strings"),
    ],
)
def test_columns_of_shards(shards, tmp_path, columns, message):
    with pytest.raises(SystemExit, match=message):
        load_images(None, None, str(shards), str(tmp_path), columns, streaming=True)


def test_shards_that_do_not_load(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"no archive")
    with pytest.raises(SystemExit, match=r"--train_data_dir .* does not load: .*; pass whole shards"):
        load_images(None, None, str(tmp_path), str(tmp_path / "cache"), {"image_column": "png"}, streaming=True)


# ---------------------------------------------------------------------------------------------------------- whole runs


SHORT = (
    *("--train_batch_size", 4, "--gradient_accumulation_steps", 1, "--max_train_steps", 2, "--logging_steps", 1),
    *("--num_inference_steps", 1, "--report_to", "none", "--streaming", "--image_column", "png"),
)


def test_a_streamed_run_that_was_stopped_ends_as_one_that_was_not(run, teacher, shards, tmp_path, monkeypatch):
    """12 steps of 4 images are more than a pass over 40."""
    seen, load = [], StreamedDataset.load_rows

    def load_noted(self, rows, following):
        seen.append([row["png"]["path"] for row in rows])
        return load(self, rows, following)

    monkeypatch.setattr(StreamedDataset, "load_rows", load_noted)

    def distil(name: str, steps: int, *flags) -> Path:
        command = ("--pretrained_teacher_model", teacher, "--train_data_dir", shards, "--student", 0.5, *SHORT)
        command += ("--num_validation_images", 1, "--shuffle_buffer", 6, "--dataloader_num_workers", 0)
        run("train_lift_unet", *command, "--output_dir", tmp_path / name, "--max_train_steps", steps, *flags)
        return tmp_path / name

    whole = distil("whole", 12)
    order = seen.copy()
    assert len(order) == 12 and len(set(map(tuple, order))) == 12
    seen.clear()
    distil("parts", 7)
    resumed = distil("parts", 12, "--resume_from_checkpoint", "latest")
    assert seen == order
    file = "unet/diffusion_pytorch_model.safetensors"
    assert (whole / file).read_bytes() == (resumed / file).read_bytes()
    assert DDPMPipeline.from_pretrained(whole)(num_inference_steps=1, output_type="np").images.shape[-1] == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_data_that_break_off_lose_no_step(run, teacher, shards, tmp_path, caplog, workers):
    """The steps that are done are saved before the run ends with the message."""
    data = tmp_path / "shards"
    data.mkdir()
    for path in shards.iterdir():
        (data / path.name).write_bytes(path.read_bytes())
    whole = (data / "020.tar").read_bytes()
    (data / "020.tar").write_bytes(whole[:5000])
    command = ("--pretrained_teacher_model", teacher, "--train_data_dir", data, "--student", 0.5, *SHORT)
    command += ("--num_validation_images", 1, "--shuffle_buffer", 6, "--dataloader_num_workers", workers)
    command += ("--output_dir", tmp_path / "run", "--max_train_steps", 12, "--checkpointing_steps", 12)
    caplog.set_level("INFO")
    with pytest.raises(SystemExit, match=r"--train_data_dir .*: reading stopped at .*--resume_from_checkpoint latest"):
        run("train_lift_unet", *command)
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    done = int(checkpoint.name.removeprefix("checkpoint-"))
    assert 0 < done < 12 and f"the data cannot be read: saved step {done}; go on with" in caplog.text
    (data / "020.tar").write_bytes(whole)
    run("train_lift_unet", *command, "--resume_from_checkpoint", "latest")
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 12


def test_a_killed_streamed_run_ends_as_if_nothing_had_happened(teacher, shards, tmp_path, monkeypatch):
    """With two workers, over the end of their passes."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    flags = ("--pretrained_teacher_model", str(teacher), "--train_data_dir", str(shards), *FLAGS, *STUDENTS["unet"])
    flags += ("--streaming", "--image_column", "png", "--shuffle_buffer", "6", "--dataloader_num_workers", "2")
    case = Case("unet", (*flags, "--train_batch_size", "8", "--num_inference_steps", "1"))
    tally = kill_runs(make_fork_server(), case, tmp_path / "runs", kills=1, seed="stream", killed=lambda: None)
    assert tally.failures == [] and tally.phases.total() == 1


@pytest.fixture(scope="module")
def teachers(tmp_path_factory, sd_teacher) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("teachers")
    savers = {"sdxl": save_sdxl_pipeline, "dit": save_dit_pipeline, "sd3": save_sd3_pipeline}
    return {"sd21": sd_teacher, **{name: save(folder / name) for name, save in savers.items()}}


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        ("sd21", ("--student", "bk_base", "--caption_column", "txt")),
        ("sdxl", ("--student", "extreme", "--caption_column", "txt")),
        ("dit", ("--student_depth", 2, "--label_column", "cls", "--validation_classes", 1)),
        ("sd3", ("--student_depth", 2, "--caption_column", "txt", "--no-cache_latents", "--max_sequence_length", 8)),
    ],
)
def test_every_script_trains_on_a_stream(run, teachers, shards, tmp_path, caplog, script, flags):
    """DiT and SD3 choose blocks by their influence on images of the stream; captions of it are the prompts."""
    caplog.set_level("INFO")
    source = ("--pretrained_teacher_model", teachers[script], "--train_data_dir", shards)
    command = (*source, "--output_dir", tmp_path / "student", *SHORT, "--dataloader_num_workers", 0, *flags)
    run(f"train_lift_{script}", *command)
    part = "unet" if script in ("sd21", "sdxl") else "transformer"
    weights = load_file(tmp_path / "student" / part / "diffusion_pytorch_model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
    assert "a stream of images; 4 images a step; step 0 of 2" in caplog.text


def test_pruning_by_images_of_a_stream(run, teacher, shards, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(
        train_lift_unet, "prune_width", lambda *arguments: shown.append(arguments[3].keywords["images"])
    )
    source = ("--pretrained_teacher_model", teacher, "--train_data_dir", shards, "--student", 0.5)
    how = ("--student_init", "diffusion", "--num_validation_images", 1, "--dataloader_num_workers", 0)
    run("train_lift_unet", *source, "--output_dir", tmp_path / "student", *SHORT, *how, "--max_train_steps", 1)
    assert [images.shape for images in shown] == [(16, 1, 16, 16)]
