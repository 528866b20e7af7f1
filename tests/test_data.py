"""The data: every kind of image comes out the same way, and what cannot be read is named, not met in training."""

import errno
import io
import itertools
import os
import re
import shutil
import struct
from types import SimpleNamespace

from common.batches import endless_batches, make_dataloader
from common.data import load_images
from common.images import open_image
from common.training import make_accelerator, seed_step

import datasets
import numpy as np
import pytest
import torch
from accelerate import PartialState
from conftest import inputs_of
from PIL import Image, ImageOps

import train_lift_unet


@pytest.fixture
def load(tmp_path):
    """`load("--flag", value, ...)` parses a command line and makes its dataset, of 16 x 16 pixels."""

    def load_dataset(*flags, channels=1, resolution=16) -> datasets.Dataset:
        fixed = ("--pretrained_teacher_model", "x", "--cache_dir", tmp_path / "cache", "--dataloader_num_workers", 0)
        args = train_lift_unet.parse_args([str(flag) for flag in (*fixed, *flags)])
        return train_lift_unet.make_dataset(args, channels, resolution, resolution)[0]

    return load_dataset


def stack(dataset) -> torch.Tensor:
    return torch.stack([dataset[index]["images"] for index in range(len(dataset))])


def halves(width: int = 16, height: int = 16, mode: str = "L") -> Image.Image:
    """White above, black below."""
    pixels = np.zeros((height, width), dtype=np.uint8)
    pixels[: height // 2] = 255
    return Image.fromarray(pixels).convert(mode)


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


# ----------------------------------------------------------------------------------------------------- kinds of images


@pytest.mark.parametrize("channels", [1, 3])
def test_every_mode_becomes_uint8(load, tmp_path, channels):
    folder = tmp_path / "images"
    folder.mkdir()
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA"):
        halves(mode=mode).save(folder / f"{mode}.png")
    halves(mode="RGB").convert("CMYK").save(folder / "cmyk.jpg", quality=100)
    sixteen_bits = np.asarray(halves(), dtype=np.uint16) * 257
    Image.fromarray(sixteen_bits).save(folder / "16 bits.png")
    Image.fromarray(sixteen_bits.astype(np.int32)).save(folder / "integers.tif")
    assert Image.open(folder / "16 bits.png").mode == "I;16" and Image.open(folder / "cmyk.jpg").mode == "CMYK"

    images = stack(load("--train_data_dir", folder, channels=channels))
    assert images.shape == (9, channels, 16, 16) and images.dtype == torch.uint8
    expected = torch.zeros(16, 16, dtype=torch.uint8)
    expected[:8] = 255
    assert (images.int() - expected.int()).abs().max() <= 3  # JPEG; the others are exact
    exact = (images == expected).flatten(1).all(1)
    assert exact.sum() >= 8


def test_sixteen_bits_keep_their_range():
    levels = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    image = open_image({"bytes": encode(Image.fromarray(levels)), "path": None}, "L")
    ours = np.asarray(image, dtype=int)
    assert ours[0, 0] == 0 and ours[-1, -1] == 255
    assert np.abs(ours - levels / 257).max() <= 1 and len(np.unique(ours)) == 256


def test_floating_point_pixels_do_not_become_black(load, images, tmp_path, capsys):
    """They may be of any range."""
    folder = shutil.copytree(images, tmp_path / "images")
    Image.fromarray(np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)).save(folder / "floats.tif")
    assert len(load("--train_data_dir", folder, "--max_unreadable", 0.1)) == len(list(images.iterdir()))
    assert "skipping 1 of 97 images, which cannot be read" in capsys.readouterr().out


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
def test_what_is_transparent_is_white(mode):
    """A black square on a ground that is black, too, and transparent."""
    image = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (4, 4, 12, 12))
    if mode == "RGB":  # one colour of it is transparent
        image = Image.new("RGB", (16, 16), (1, 2, 3))
        image.paste((0, 0, 0), (4, 4, 12, 12))
        data = encode(image, transparency=(1, 2, 3))
    else:
        data = encode(image.convert(mode))
    for wanted in ("L", "RGB"):
        pixels = np.asarray(open_image({"bytes": data, "path": None}, wanted)).reshape(16, 16, -1)
        assert (pixels[4:12, 4:12] == 0).all() and (pixels[:4] == 255).all() and (pixels[:, 12:] == 255).all()


def test_colours_keep_their_order(load, tmp_path):
    for name, colour in (("a", (255, 0, 0)), ("b", (0, 255, 0)), ("c", (0, 0, 255))):
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.new("RGB", (16, 16), colour).save(tmp_path / "images" / f"{name}.png")
    images = stack(load("--train_data_dir", tmp_path / "images", channels=3))
    assert torch.equal(images.float().mean((2, 3)), 255 * torch.eye(3))
    grey = stack(load("--train_data_dir", tmp_path / "images"))[:, 0, 0, 0]
    assert grey.tolist() == [76, 150, 29]  # luma, not a channel


@pytest.mark.parametrize(
    ("orientation", "stored"),
    [
        (1, None),
        (3, Image.Transpose.ROTATE_180),
        (4, Image.Transpose.FLIP_TOP_BOTTOM),
        (6, Image.Transpose.ROTATE_90),
        (8, Image.Transpose.ROTATE_270),
    ],
)
def test_photographs_come_out_upright(orientation, stored):
    """A camera stores the picture as its sensor lay, and the orientation beside it."""
    image = halves(40, 16)
    exif = Image.Exif()
    exif[0x0112] = orientation
    jpeg = encode(image if stored is None else image.transpose(stored), "JPEG", quality=95, exif=exif)
    record = {"bytes": jpeg, "path": None}
    (pixels,) = train_lift_unet.load_examples({"x": [record]}, column="x", mode="L", size=16)["images"]
    assert pixels.shape == (1, 16, 16)
    assert pixels[:, :7].min() > 240 and pixels[:, 9:].max() < 15


@pytest.mark.parametrize("malformed", [(0x128, 8, struct.pack("<hH", -1, 0)), (0x128, 4, struct.pack("<I", 70_000))])
def test_a_photograph_with_a_malformed_tag_comes_out_upright(malformed):
    """Some cameras write them. Pillow can read these, and cannot write them again."""
    tags = [(0x112, 3, struct.pack("<HH", 6, 0)), malformed]
    entries = b"".join(struct.pack("<HHI", tag, kind, 1) + value for tag, kind, value in tags)
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0)
    jpeg = encode(halves(40, 16).transpose(Image.Transpose.ROTATE_90), "JPEG", quality=95)
    jpeg = jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + jpeg[2:]
    with pytest.raises((struct.error, TypeError, ValueError, OverflowError)):
        ImageOps.exif_transpose(Image.open(io.BytesIO(jpeg)))
    record = {"bytes": jpeg, "path": None}
    (pixels,) = train_lift_unet.load_examples({"x": [record]}, column="x", mode="L", size=16)["images"]
    assert pixels[:, :7].min() > 240 and pixels[:, 9:].max() < 15


@pytest.mark.parametrize("size", [(80, 32), (32, 80), (16, 16), (7, 5), (16, 900)])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_centre_is_kept(size, channels):
    """The shorter side is fitted and the rest cropped on both sides: a white square in the middle fills the image."""
    width, height = size
    side = min(size)
    pixels = np.zeros((height, width), dtype=np.uint8)
    top, left = (height - side) // 2, (width - side) // 2
    pixels[top : top + side, left : left + side] = 255
    mode = "L" if channels == 1 else "RGB"
    record = {"bytes": encode(Image.fromarray(pixels).convert(mode)), "path": None}
    (image,) = train_lift_unet.load_examples({"x": [record]}, column="x", mode=mode, size=16)["images"]
    assert image.shape == (channels, 16, 16) and image.dtype == torch.uint8
    assert image[:, 2:-2, 2:-2].min() > 240


# ----------------------------------------------------------------------------------------------- where images are from


def test_all_files_of_a_folder_are_used_whatever_their_names(load, tmp_path):
    folder = tmp_path / "test images [1]"
    for name in ("train/a.png", "train/b.png", "test/a.png", "val_1/a.png", "a_test.png", "validation.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        halves().save(folder / name)
    assert len(load("--train_data_dir", folder)) == 6


def test_metadata_leave_no_image_out(load, tmp_path):
    """They say nothing that is trained on; `datasets` would drop what they do not list."""
    (tmp_path / "images").mkdir()
    for number in range(3):
        halves().save(tmp_path / "images" / f"{number}.png")
    metadata = tmp_path / "images" / "metadata.jsonl"
    metadata.write_text('{"file_name": "1.png", "text": "a caption"}\n')
    assert len(load("--train_data_dir", tmp_path / "images")) == 3
    metadata.write_text('{"picture_file_name": "1.png"}\n{"picture_file_name": "2.png"}\n')
    assert len(load("--train_data_dir", tmp_path / "images", "--image_column", "picture")) == 2


def test_of_splits_only_train_is_used(load, tmp_path):
    for name in ("train/a.png", "train/more/b.png", "test/a.png", "val/a.png"):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        halves().save(tmp_path / "data" / name)
    (tmp_path / "data" / ".cache" / "huggingface").mkdir(parents=True)  # as `hf download --local-dir` leaves it
    assert len(load("--train_data_dir", tmp_path / "data")) == 2


def test_linked_folders_are_followed(load, tmp_path, caplog):
    PartialState()  # which the logger needs
    for name in ("data/a/0.png", "elsewhere/b/1.png", "further/2.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        halves().save(tmp_path / name)
    (tmp_path / "data" / "b").symlink_to(tmp_path / "elsewhere" / "b")
    (tmp_path / "elsewhere" / "b" / "c").symlink_to(tmp_path / "further")  # a link in a linked folder
    assert len(load("--train_data_dir", tmp_path / "data")) == 3
    stream, _ = load_images(None, None, str(tmp_path / "data"), None, {"image_column": "image"}, streaming=True)
    names = [os.path.relpath(row["image"]["path"], tmp_path) for row in stream]
    assert names == ["data/a/0.png", "data/b/1.png", "data/b/c/2.png"]
    assert "images come in the order of their folders and names" in caplog.text  # which a stream does not mix
    for name in ("elsewhere/b", "further"):  # links alone: none of their own files
        (tmp_path / "links" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "links" / name).symlink_to(tmp_path / name)
    assert len(load("--train_data_dir", tmp_path / "links")) == 3  # the second twice, by two ways
    (tmp_path / "further" / "up").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SystemExit, match=r"does not load: .*leads back to a folder above it.*up"):
        load("--train_data_dir", tmp_path / "data")


def test_a_folder_that_cannot_be_read_is_not_taken_for_an_empty_one(load, tmp_path, monkeypatch):
    for name in ("a/0.png", "b/1.png"):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        halves().save(tmp_path / "data" / name)
    scan = os.scandir

    def refuse(path):
        if str(path).endswith("/b"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(SystemExit, match=r"--train_data_dir .* does not load: .*Permission denied.*b"):
        load("--train_data_dir", tmp_path / "data")


def test_several_metadata_files_have_one_order(tmp_path):
    """`datasets` reads them in the order of a set, which is another one in each process."""
    PartialState()  # which the logger needs
    for name in "abcde":
        (tmp_path / "data" / name).mkdir(parents=True)
        halves().save(tmp_path / "data" / name / "0.png")
        (tmp_path / "data" / name / "metadata.jsonl").write_text(f'{{"file_name": "0.png", "text": "{name}"}}')
    columns = {"image_column": "image", "caption_column": "text"}
    for cache in "xyz":
        dataset, _ = load_images(None, None, str(tmp_path / "data"), str(tmp_path / cache), columns)
        assert dataset["text"][:] == [*"abcde"]
    with pytest.raises(SystemExit, match=r"holds 5 metadata files, .* drop --streaming, or make one of them"):
        load_images(None, None, str(tmp_path / "data"), None, columns, streaming=True)


@pytest.fixture
def parquet(tmp_path):
    """`parquet({"column": rows})` writes a dataset folder as the Hub keeps it and returns it."""

    def write(columns: dict) -> str:
        folder = tmp_path / "hub-style"
        (folder / "data").mkdir(parents=True)
        kinds = {name: datasets.Value("int64") if name == "label" else datasets.Image() for name in columns}
        table = datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))
        table.to_parquet(str(folder / "data" / "train-00000-of-00001.parquet"))
        return str(folder)

    return write


def test_a_dataset_by_its_name_and_column(load, parquet):
    levels = [10, 200, 90]
    rows = [{"bytes": encode(Image.new("L", (20, 20), level)), "path": None} for level in levels]
    folder = parquet({"label": [0, 1, 2], "picture": rows})
    images = stack(load("--dataset_name", folder, "--image_column", "picture"))
    assert images.shape == (3, 1, 16, 16) and images.flatten(1).float().mean(1).tolist() == levels


def test_images_that_a_table_names_may_be_exchanged(load, tmp_path):
    """What is cached of the images follows them, though the table is the same."""
    (tmp_path / "table").mkdir()
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    for path in paths:
        halves().save(path)
    (tmp_path / "table" / "train.csv").write_text("\n".join(["image", *map(str, paths)]) + "\n")
    flags = ("--dataset_name", tmp_path / "table")
    before = load(*flags)
    assert load(*flags)._fingerprint == before._fingerprint and (stack(before)[:, 0, 0, 0] == 255).all()
    Image.new("L", (20, 24)).save(paths[1])
    after = load(*flags)
    assert after._fingerprint != before._fingerprint and stack(after)[:, 0, 0, 0].tolist() == [255, 0, 255]
    paths[1].write_bytes(b"half a file")  # found, though this row of the table was checked before
    assert len(load(*flags, "--max_unreadable", 0.5)) == 2


@pytest.mark.parametrize("column", ["image", "Picture"])
def test_a_wrong_column_lists_the_right_ones(load, parquet, column):
    folder = parquet({"label": [0], "picture": [{"bytes": encode(halves()), "path": None}]})
    with pytest.raises(SystemExit, match=f"^error: --image_column {column} is not in the data.*label, picture$"):
        load("--dataset_name", folder, "--image_column", column)


def test_a_column_of_something_else(load, parquet):
    folder = parquet({"label": [0], "picture": [{"bytes": encode(halves()), "path": None}]})
    with pytest.raises(SystemExit, match=r"^error: --image_column label holds .*int64.*; pass") as error:
        load("--dataset_name", folder, "--image_column", "label")
    assert "\n" not in str(error.value)


def test_folders_within_the_folder(load, images, tmp_path):
    """Classes and depth do not matter; and a folder above called `test` does not make this a test split."""
    folder = tmp_path / "test" / "digits"
    for index, path in enumerate(sorted(images.iterdir())[:12]):
        target = folder / ("ones", "twos", "deeper/threes")[index % 3]
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    dataset = load("--train_data_dir", folder)
    assert len(dataset) == 12 and dataset[0].keys() == {"images"}


def test_the_sample_is_the_seeds(load, images):
    def sample(*flags):
        return stack(load("--train_data_dir", images, *flags))

    everything = sample()
    ours = sample("--max_train_samples", 20, "--seed", 1)
    assert len(everything) == 96 and len(ours) == 20
    assert torch.equal(sample("--max_train_samples", 20, "--seed", 1), ours)
    assert not torch.equal(sample("--max_train_samples", 20, "--seed", 2), ours)
    assert not torch.equal(everything[:20], ours)  # not simply the first
    assert len({tuple(image.flatten().tolist()) for image in ours}) == 20
    assert len(sample("--max_train_samples", 500)) == 96


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "--train_data_dir .* is no folder; pass a folder of images"),
        ({}, "--train_data_dir .* is empty; put images into it"),
        ({"notes.txt": b"no image", "table.csv": b"a,b\n1,2\n"}, "--train_data_dir .*"),
        ({"a.png": b"", "b.png": b"text"}, "--train_data_dir .*2 of 2 images cannot be read"),
    ],
    ids=["missing", "empty", "without images", "without an image that can be read"],
)
def test_a_folder_without_images_is_one_line(load, tmp_path, content, message):
    folder = tmp_path / "images"
    if content is not None:
        folder.mkdir()
        for name, data in content.items():
            (folder / name).write_bytes(data)
    with pytest.raises(SystemExit, match=f"^error: {message}") as error:
        load("--train_data_dir", folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


# ------------------------------------------------------------------------------------------------------ damaged images


@pytest.fixture
def damaged(images, tmp_path):
    """A folder of 16 digits, and beside them four files that are no images any more."""
    folder = tmp_path / "damaged"
    folder.mkdir()
    for path in sorted(images.iterdir())[:16]:
        shutil.copy(path, folder)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8))
    (folder / "cut.png").write_bytes(encode(noise)[:-2000])
    (folder / "cut.jpg").write_bytes(encode(noise, "JPEG")[:1500])
    (folder / "text.png").write_text("not an image")
    (folder / "zero.png").touch()
    return folder


@pytest.mark.parametrize("workers", [0, 2])
def test_a_few_damaged_images_are_named_and_skipped(load, images, damaged, capfd, workers):
    flags = ("--train_data_dir", damaged, "--max_unreadable", 0.2, "--dataloader_num_workers", workers)
    dataset = load(*flags)
    output = capfd.readouterr().out
    assert "skipping 4 of 20 images" in output
    assert all(name in output for name in ("cut.png", "cut.jpg", "text.png", "zero.png"))
    assert "000.png" not in output
    good = [np.asarray(Image.open(path)) for path in sorted(images.iterdir())[:16]]
    assert torch.equal(stack(dataset), torch.from_numpy(np.stack(good)).unsqueeze(1))
    assert all(item["images"].shape == (1, 16, 16) for item in torch.utils.data.DataLoader(dataset, batch_size=None))


@pytest.mark.parametrize("share", [None, 0.19, 0])
def test_too_many_damaged_images_end_the_run(load, damaged, share):
    flags = () if share is None else ("--max_unreadable", share)
    with pytest.raises(SystemExit, match=r"^error: --train_data_dir \S+damaged: 4 of 20 images") as error:
        load("--train_data_dir", damaged, *flags)
    message = str(error.value)
    assert all(name in message for name in ("cut.png", "cut.jpg", "text.png", "zero.png"))
    assert f"--max_unreadable {0.01 if share is None else float(share)}" in message and "repair or remove" in message
    assert "\n" not in message


@pytest.mark.parametrize("workers", [0, 2])
def test_a_drive_that_does_not_answer_makes_no_image_unreadable(load, images, monkeypatch, workers):
    """The run ends, and the next one reads what the drive did not give."""
    flags, opened = ("--train_data_dir", images, "--dataloader_num_workers", workers), Image.open

    def fail_once(file):
        if str(file).endswith("003.png"):
            raise OSError(errno.EIO, "Input/output error")
        return opened(file)

    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", fail_once)
        with pytest.raises(SystemExit) as end:
            load(*flags, "--max_unreadable", 0.5)
    assert re.match(r"error: --train_data_dir .*003.png cannot be read now: .*Input/output error", end.value.code)
    assert "see that all files can be read" in end.value.code and "\n" not in end.value.code
    assert len(load(*flags, "--max_unreadable", 0)) == len(list(images.iterdir()))


def test_one_among_many_is_within_the_default(load, images, tmp_path, capsys):
    folder = shutil.copytree(images, tmp_path / "many")
    for index in range(4):
        halves().save(folder / f"more-{index}.png")
    (folder / "torn.png").write_bytes((folder / "000.png").read_bytes()[:60])
    assert len(load("--train_data_dir", folder)) == 100  # 1 of 101
    assert "torn.png" in capsys.readouterr().out
    (folder / "torn.jpg").write_bytes(b"\xff\xd8")
    with pytest.raises(SystemExit, match="2 of 102 images cannot be read"):
        load("--train_data_dir", folder)


def test_damaged_rows_of_a_dataset(load, parquet, capsys):
    """Rows without a file name are named by their number; a row may also hold no image at all."""
    good = {"bytes": encode(halves()), "path": None}
    rows = [good, {"bytes": b"nothing", "path": None}, good, {"bytes": b"nothing", "path": "named.png"}, None, good]
    folder = parquet({"image": rows})
    dataset = load("--dataset_name", folder, "--max_unreadable", 0.5)
    output = capsys.readouterr().out
    assert "skipping 3 of 6 images" in output
    assert "row 1" in output and "named.png" in output and "row 4" in output
    assert stack(dataset).shape == (3, 1, 16, 16)


def test_images_are_checked_once(load, damaged, monkeypatch):
    """A second run on the same files takes over what the first found; a file that changed is looked at again."""
    opened = []
    original = Image.open
    monkeypatch.setattr(Image, "open", lambda file: opened.append(file) or original(file))
    flags = ("--train_data_dir", damaged, "--max_unreadable", 0.5)
    assert len(load(*flags)) == 16 and len(opened) == 20
    assert len(load(*flags)) == 16 and len(opened) == 20
    halves().save(damaged / "zero.png")
    assert len(load(*flags)) == 17 and len(opened) == 40


# -------------------------------------------------------------------------------------------------------- small images


def test_images_that_will_be_enlarged_are_counted(load, images, tmp_path, caplog):
    """The shorter side decides, of the image as it stands upright; one that cannot be read is not small."""
    PartialState()  # which the logger needs
    folder = shutil.copytree(images, tmp_path / "mixed")
    halves(40, 12).save(folder / "wide.png")
    halves(9, 40).save(folder / "tall.png")
    (folder / "torn.png").write_bytes(b"no image")

    def said(*flags, **options) -> list[str]:
        caplog.clear()
        load("--train_data_dir", folder, "--max_unreadable", 0.1, *flags, **options)
        return [record.getMessage().removeprefix("[RANK 0] ") for record in caplog.records]

    for _ in range(2):  # the second time by what the first has kept
        assert said() == [
            "2 of 99 images (2.0%) are smaller than 16 pixels and will be enlarged; the smallest side is 9"
        ]
    assert said(resolution=8) == []
    (line,) = said(resolution=32)
    assert line.startswith("98 of 99 images (99.0%) are smaller than 32 pixels")


# ------------------------------------------------------------------------------------------------------------ the flip


@pytest.fixture
def shown(monkeypatch):
    """`shown(images, step, ...)` is what the student gets to see, before noise, at a step of the run."""
    monkeypatch.setattr(train_lift_unet, "add_noise", lambda scheduler, images, noise, timesteps: (images, noise))

    def show(images: torch.Tensor, step: int, seed: int = 0, random_flip: bool = True) -> torch.Tensor:
        seen = []

        def student(sample, timestep):
            seen.append(sample)
            return torch.zeros_like(sample), []

        draws = {"steps": 1000, "random_flip": random_flip, "antithetic_timesteps": True}
        inputs = inputs_of(train_lift_unet, images.shape[1:], draws, scheduler=None)
        seed_step(seed, step, 0, 0)
        train_lift_unet.compute_losses(
            student, None, {"images": images}, 0.5, inputs, None, (1.0, 1.0, 1.0), reduction="sum"
        )
        return seen[0]

    return show


def test_each_access_flips_anew(shown):
    images = torch.zeros(8, 1, 4, 4, dtype=torch.uint8)
    images[..., 0] = 255  # white at the left
    steps = [shown(images, step) for step in range(1, 41)]
    flipped = torch.stack([seen[:, 0, 0, 3] > 0 for seen in steps])  # (steps, images)
    assert ((flipped.float().mean(0) > 0.25) & (flipped.float().mean(0) < 0.75)).all()  # every image both ways
    assert ((flipped.sum(1) > 0) & (flipped.sum(1) < 8)).float().mean() > 0.8  # and not a whole batch at once
    for seen in steps:
        left, right = seen[:, :, :, 0], seen[:, :, :, 3]
        assert torch.equal(left, -right) and (seen[..., 1:3] == -1).all()
    assert torch.equal(shown(images, 7), steps[6])
    assert not torch.equal(shown(images, 7, seed=1), steps[6])
    assert all((shown(images, step, random_flip=False)[..., 0] == 1).all() for step in range(1, 11))


# ----------------------------------------------------------------------------------------------------------- the order


def test_the_order_is_another_in_each_epoch_and_the_seeds(tmp_path):
    def epochs(seed: int, count: int) -> list[list[int]]:
        """Of 11 rows, in batches of 4."""
        accelerator = make_accelerator(str(tmp_path), "none", seed, 1, None, False)
        loader = accelerator.prepare(make_dataloader([*range(11)], 4, 0, accelerator))
        no_signal = SimpleNamespace(alone=False, check=lambda: None)
        batches = itertools.islice(endless_batches(loader, 0, no_signal), 2 * count)
        rows = [row for batch in batches for row in batch.tolist()]
        return [rows[start : start + 8] for start in range(0, len(rows), 8)]

    found = epochs(0, 20)
    assert all(len({*rows}) == 8 for rows in found) and len({*map(tuple, found)}) == 20
    assert all(rows != sorted(rows) for rows in found) and {*itertools.chain(*found)} == {*range(11)}
    assert epochs(0, 2) == found[:2]
    assert not {*map(tuple, found)} & {*map(tuple, epochs(1, 20))}  # no epoch of one seed is one of the next


def test_a_batch_larger_than_the_data_names_the_processes():
    two = SimpleNamespace(num_processes=2, device=torch.device("cpu"))
    says = "--train_batch_size 4 on each of 2 processes is more than the 6 images; pass a smaller one"
    with pytest.raises(SystemExit, match=says):
        make_dataloader(torch.arange(6), 4, 0, two)
