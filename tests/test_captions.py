"""Captions in .txt files beside the images, and prompts in a file: both train as the same text elsewhere does."""

import json
import logging
import shutil
from pathlib import Path

import pytest
from accelerate import PartialState
from conftest import run_file
from PIL import Image
from safetensors.torch import load_file

import train_lift_sd3
import train_lift_sd21
import train_lift_sdxl


PLACES = ("", "bags", "bags/new")  # of the images, by thirds
SHORT = [
    *("--train_batch_size", 4, "--gradient_accumulation_steps", 1, "--max_train_steps", 2, "--logging_steps", 1),
    *("--num_inference_steps", 1, "--report_to", "none", "--dataloader_num_workers", 0, "--lambda_kd_feat", 0),
]


@pytest.fixture
def texts(captioned, tmp_path) -> Path:
    """The images of `captioned` in a folder and its sub-folders, each with its caption in a .txt file."""
    folder = tmp_path / "texts"
    for index, line in enumerate((captioned / "metadata.jsonl").read_text().splitlines()):
        row = json.loads(line)
        place = folder / PLACES[index // 16]
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(captioned / row["file_name"], place)
        (place / row["file_name"]).with_suffix(".txt").write_text(f"\n {row['text']}\n")
    return folder


def listed(folder: Path) -> Path:
    """The same folder with the captions in a metadata.jsonl, in the order of the images' names, and no .txt files."""
    twin = folder.with_name("listed")
    shutil.copytree(folder, twin, ignore=shutil.ignore_patterns("*.txt"))
    paths = sorted(folder.rglob("*.png"), key=str)
    rows = [(str(path.relative_to(folder)), path.with_suffix(".txt").read_text().strip()) for path in paths]
    lines = [json.dumps({"file_name": name, "text": text}) for name, text in rows]
    (twin / "metadata.jsonl").write_text("\n".join(lines))
    return twin


@pytest.fixture
def load(sd_teacher, tmp_path, caplog):
    """`load(folder, *flags)` is the captions of Stable Diffusion's dataset, and what identifies it in a cache."""
    PartialState()  # which the logger needs
    caplog.set_level(logging.INFO)
    source = train_lift_sd21.TeacherSource(str(sd_teacher), None, None, train_lift_sd21.EXPECTED)
    tokenizer = train_lift_sd21.load_tokenizer(source)

    def load_captions(folder: Path, *flags) -> tuple[list[str], dict]:
        fixed = ("--train_data_dir", folder, "--cache_dir", tmp_path / "cache", "--resolution", 32)
        args = train_lift_sd21.parse_args([str(flag) for flag in (*fixed, "--dataloader_num_workers", 0, *flags)])
        dataset, contents = train_lift_sd21.make_dataset(args, tokenizer)
        assert dataset[0]["images"].shape == (3, 32, 32)
        return list(dataset.with_format(None)[args.caption_column]), contents

    return load_captions


@pytest.mark.parametrize(("script", "part", "student"), [("sdxl", "unet", "extreme"), ("sd3", "transformer", "third")])
def test_texts_and_a_file_of_prompts_train_as_metadata_and_prompts(
    run, teachers, texts, tmp_path, script, part, student
):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a dark bag\n\n  a coat \n\n")
    made = []
    for name, folder, given in (("a", texts, [prompts]), ("b", listed(texts), ["a dark bag", "a coat"])):
        source = ("--pretrained_teacher_model", teachers[script], "--train_data_dir", folder, "--student", student)
        where = ("--output_dir", tmp_path / name, "--cache_dir", tmp_path / "cache")
        run(f"train_lift_{script}", *source, *where, *SHORT, "--resolution", 32, "--validation_prompts", *given)
        made.append(load_file(tmp_path / name / part / "diffusion_pytorch_model.safetensors"))
    assert made[0].keys() == made[1].keys() and all(made[0][key].equal(made[1][key]) for key in made[0])
    assert Image.open(tmp_path / "a" / "samples.png") == Image.open(tmp_path / "b" / "samples.png")


def test_captions_are_in_the_order_of_the_images(load, texts, capsys):
    expected = [path.with_suffix(".txt").read_text().strip() for path in sorted(texts.rglob("*.png"), key=str)]
    assert len(set(expected)) > 5
    assert load(texts)[0] == expected
    assert load(texts, "--caption_column", "prompt")[0] == expected
    first = min(texts.glob("*.txt"))
    first.write_text("\ufeffun été", encoding="utf-8")  # as Windows' editor writes it
    assert load(texts)[0][0] == "un été"
    assert "skipping" not in capsys.readouterr().out


@pytest.mark.parametrize("content", [None, "", " \n"], ids=["missing", "empty", "blank"])
def test_an_image_without_text_has_no_caption(load, texts, capsys, content):
    text = texts / "bags" / "00020.txt"
    text.unlink() if content is None else text.write_text(content)
    problem = (
        "1 of 48 images have no caption: .*bags/00020.png; repair or remove them, or raise --max_unreadable 0.01$"
    )
    with pytest.raises(SystemExit, match=problem):
        load(texts)
    assert len(load(texts, "--max_unreadable", 0.03)[0]) == 47
    assert "skipping 1 of 48 images, which have no caption" in capsys.readouterr().out


def test_a_folder_that_metadata_do_not_name_is_not_left_out_in_silence(load, texts):
    twin = listed(texts)
    lines = (twin / "metadata.jsonl").read_text().splitlines()
    (twin / "metadata.jsonl").write_text("\n".join(line for line in lines if '"bags/' not in line))
    with pytest.raises(SystemExit, match=r"32 of 48 images have no caption: .*/bags/.*raise --max_unreadable 0\.01"):
        load(twin)


def test_metadata_wins_and_says_so(load, texts, caplog):
    plain, metadata = listed(texts), texts / "metadata.jsonl"
    metadata.write_text((plain / "metadata.jsonl").read_text().replace("photo", "picture"))
    assert all("picture" in caption for caption in load(texts)[0])
    (line,) = (record.getMessage() for record in caplog.records if ".txt" in record.getMessage())
    assert f"--train_data_dir {texts}: the captions are those of metadata.jsonl; .txt files are not read" in line
    caplog.clear()
    load(plain)
    assert ".txt" not in caplog.text
    with pytest.raises(SystemExit, match="--caption_column caption is not in the data; choose one of image, text"):
        load(texts, "--caption_column", "caption")


def test_a_changed_text_is_another_content_in_a_cache(load, texts, tmp_path):
    _, before = load(texts)
    assert load(texts)[1] == before
    # The same in another process: of several, the first makes the data and the others find it.
    program = tmp_path / "other.py"
    program.write_text(
        "import accelerate, sys, common.captions as captions; accelerate.PartialState()\n"
        "columns = {'image_column': 'image', 'caption_column': 'text'}\n"
        "print('is', captions.load_captioned(None, None, *sys.argv[1:], columns, 0.01)[0]._fingerprint)\n"
    )
    output = run_file(program, texts, tmp_path / "cache", PYTHONPATH=".").stdout
    assert f"is {before['data']}" in output
    text = texts / "bags" / "00020.txt"
    text.write_text(text.read_text().replace("photo", "sketch"))
    captions, after = load(texts)
    assert after != before and sum("sketch" in caption for caption in captions) == 1


@pytest.mark.parametrize("script", [train_lift_sd21, train_lift_sd3, train_lift_sdxl])
def test_prompts_come_from_files_and_the_command(script, tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffa bag\r\n\r\n a coat\u2028in red \r\n".encode())

    def prompts(*values) -> list[str] | None:
        return script.parse_args(["--dry_run", *values]).validation_prompts

    assert prompts() is None
    assert prompts("--validation_prompts", "", str(tmp_path / "a.txt"), "a.txt file") == [
        "",
        "a bag",
        "a coat\u2028in red",
        "a.txt file",
    ]
