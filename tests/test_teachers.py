"""What teachers the scripts and eval/ take: safetensors or .bin weights, all of them finite, of DDPM's noise."""

import builtins
import hashlib
import json
import pickle
import shutil
from pathlib import Path

from common.finite import first_non_finite
from common.loading import explain
from common.teachers import (
    DDPM_NOISE,
    TeacherSource,
    load_frozen,
    load_noise_schedule,
    load_part,
    load_weights,
    vae_factor,
)

import numpy as np
import pytest
import torch
from conftest import STEADY, run_file
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    UniPCMultistepScheduler,
)
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTextModel, CLIPTokenizer, T5EncoderModel

from tiny_models import (
    save_dit_pipeline,
    save_pixel_pipeline,
    save_sd3_pipeline,
    save_sd_pipeline,
    save_sdxl_pipeline,
)


SHORT = [
    *("--train_batch_size", 4, "--gradient_accumulation_steps", 1, "--max_train_steps", 2, "--logging_steps", 1),
    *("--num_inference_steps", 1, "--report_to", "none", "--dataloader_num_workers", 0, "--learning_rate", 1e-3),
]
CAPTIONS = ("--validation_prompts", "a dark bag", "--resolution", 32)
SCRIPTS = {  # how to make a teacher, the fixture of the data, flags, and the parts of the teacher that are read
    "unet": (save_pixel_pipeline, "images", ("--student", 0.5, "--num_validation_images", 1), [""]),
    "sd21": (save_sd_pipeline, "captioned", ("--student", "bk_tiny", *CAPTIONS), ["unet", "vae", "text_encoder", ""]),
    "dit": (save_dit_pipeline, "articles", ("--student", "d4"), ["transformer", "vae"]),
    "sd3": (
        *(save_sd3_pipeline, "captioned", ("--student", "half", "--max_sequence_length", 8, *CAPTIONS)),
        ["transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3", ""],
    ),
}
BIN = "has no safetensors weights: reading .bin files by torch.load(weights_only=True)"


def source_of(folder: Path) -> TeacherSource:
    return TeacherSource(str(folder), None, None, "pass another")


def test_a_hub_that_cannot_be_reached():
    """The name may be that of a folder, misspelt."""
    source = TeacherSource("nobody", None, None, "pass another")
    says = "nobody does not load: it is no folder, and the Hub cannot be reached. Remedy: check its name and the net"
    with pytest.raises(SystemExit, match=says):
        load_part(source, UNet2DConditionModel, "unet")


def test_weights_of_a_variant_alone(sd_teacher, tmp_path):
    """As many repositories have them: what is missing is the flag."""
    folder = Path(shutil.copytree(sd_teacher, tmp_path / "teacher"))
    name = "diffusion_pytorch_model.safetensors"
    (folder / "unet" / name).rename(folder / "unet" / name.replace(".safe", ".fp16.safe"))
    with pytest.raises(SystemExit, match="Remedy: pass --variant fp16 if its files have that in their names;"):
        load_part(source_of(folder), UNet2DConditionModel, "unet")
    load_part(source_of(folder)._replace(variant="fp16"), UNet2DConditionModel, "unet")


def test_a_part_without_the_variant_is_read_by_its_usual_files(sd_teacher, tmp_path, caplog):
    """As Diffusers reads a pipeline of which some parts alone have the variant; one that no part has is refused."""
    folder = Path(shutil.copytree(sd_teacher, tmp_path / "teacher"))
    source, name = source_of(folder)._replace(variant="fp16"), "diffusion_pytorch_model.fp16.safetensors"
    with pytest.raises(SystemExit, match=r"does not load: .* no file named \S*\.fp16\.safetensors"):
        load_part(source, AutoencoderKL, "vae")
    shutil.copy(folder / "unet" / "diffusion_pytorch_model.safetensors", folder / "unet" / name)
    vae = load_part(source, AutoencoderKL, "vae")
    assert "/vae has no fp16 variant: reading its usual weights" in caplog.text
    expected = load_part(source_of(sd_teacher), AutoencoderKL, "vae").state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in vae.state_dict().items())
    (folder / "vae" / name).write_bytes(b"damaged")
    with pytest.raises(SystemExit, match="does not load"):
        load_part(source, AutoencoderKL, "vae")


def test_the_variant_is_named_where_the_hub_has_no_other_weights():
    error = OSError("a/b does not appear to have a file named diffusion_pytorch_model.bin.")
    assert explain(error, None, "pass another").endswith("else pass another")
    assert "--variant fp16" in explain(error, None, "x") and "--variant" not in explain(error, "fp16", "x")


def test_a_scheduler_whose_package_is_missing_is_said(distil, tmp_path):
    teacher = save_sd_pipeline(tmp_path / "teacher")
    for name, key in (("model_index.json", "scheduler"), ("scheduler/scheduler_config.json", "_class_name")):
        path = teacher / name
        kind = "DPMSolverSDEScheduler"
        value = ["diffusers", kind] if key == "scheduler" else kind
        path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    line = one_line(distil, "sd21", teacher)
    assert "DPMSolverSDEScheduler requires the torchsde library" in line and "; or pass a" in line


def to_bin(folder: Path, shards: int = 1) -> Path:
    """Replace the safetensors files of a pipeline or model by .bin files, as older repositories have them."""
    for path in folder.rglob("*.safetensors"):
        state, stem = load_file(path), path.stem.replace("model", "pytorch_model", path.stem == "model")
        path.unlink()
        if shards == 1:
            torch.save(state, path.with_name(f"{stem}.bin"))
            continue
        names = [f"{stem}-{number:05d}-of-{shards:05d}.bin" for number in range(1, shards + 1)]
        places = {key: names[index % shards] for index, key in enumerate(state)}
        for name in names:
            torch.save({key: state[key] for key, place in places.items() if place == name}, path.with_name(name))
        index = {"metadata": {"total_size": sum(each.nbytes for each in state.values())}, "weight_map": places}
        path.with_name(f"{stem}.bin.index.json").write_text(json.dumps(index))
    return folder


def edit(path: Path, **changes) -> Path:
    """Change a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return path


@pytest.fixture
def distil(run, request, tmp_path):
    """`distil(kind, teacher, *flags, name="student")` runs two steps of a script and returns the output folder."""

    def distil_from(kind: str, teacher: Path, *flags, name: str = "student") -> Path:
        _, data, usual, _ = SCRIPTS[kind]
        source = ("--pretrained_teacher_model", teacher, "--train_data_dir", request.getfixturevalue(data))
        places = ("--output_dir", tmp_path / name, "--cache_dir", tmp_path / "cache")
        run(f"train_lift_{kind}", *source, *places, *usual, *SHORT, *flags)
        return tmp_path / name

    return distil_from


@pytest.fixture
def said(caplog):
    """`said()` lists the models that were said to be read from .bin files since it was called last."""

    def names() -> list[str]:
        found = [message.removesuffix(BIN).strip() for message in caplog.messages if message.endswith(BIN)]
        caplog.clear()
        return found

    return names


def one_line(call, *arguments, **options) -> str:
    """The one line that the call ends with."""
    with pytest.raises(SystemExit) as ended:
        call(*arguments, **options)
    assert isinstance(ended.value.code, str), ended.value  # with a message, the exit code is 1
    assert ended.value.code.startswith("error: ") and "\n" not in ended.value.code, ended.value.code
    return ended.value.code


# ------------------------------------------------------------------------------------------------------- .bin weights


@pytest.mark.parametrize("kind", SCRIPTS)
def test_a_teacher_of_bin_files_makes_the_same_student(kind, distil, said, tmp_path, capfd):
    make, *_, parts = SCRIPTS[kind]
    teacher = make(tmp_path / "teacher")
    twin = to_bin(shutil.copytree(teacher, tmp_path / "twin"))
    assert not list(twin.rglob("*.safetensors")) and list(twin.rglob("*.bin"))
    first = distil(kind, teacher, *STEADY, name="first")
    assert said() == []
    second = distil(kind, twin, *STEADY, name="second")
    assert sorted(said()) == sorted(f"{twin}/{part}".rstrip("/") for part in parts)
    assert "An error occurred" not in capfd.readouterr().err  # Diffusers logs what we look for first
    files = {path.relative_to(first) for path in first.rglob("*.safetensors")}
    assert {path.relative_to(second) for path in second.rglob("*.safetensors")} == files and len(files) >= 4
    assert not list(second.rglob("*.bin"))  # what we write is safetensors
    rows = [(each / "metrics.jsonl").read_text().splitlines() for each in (first, second)]
    losses = [[json.loads(line)["loss"] for line in lines] for lines in rows]
    # Not bit for bit: a CPU's kernels may round by where the weights lie in memory, which the two formats differ in.
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(losses[0]) == 2
    for path in files:
        one, other = load_file(first / path), load_file(second / path)
        torch.testing.assert_close(other, one, rtol=0, atol=1e-4)  # a tenth of the first step


def test_bin_files_in_shards_of_a_variant_and_mixed(said, tmp_path):
    """Each is read as the whole safetensors file would be, by part and by pipeline."""
    teacher = save_sd_pipeline(tmp_path / "teacher")
    whole = StableDiffusionPipeline.from_pretrained(teacher)
    folders = {
        "shards": to_bin(shutil.copytree(teacher, tmp_path / "shards"), shards=3),
        "mixed": shutil.copytree(teacher, tmp_path / "mixed"),
        "variant": to_bin(shutil.copytree(teacher, tmp_path / "variant")),
    }
    to_bin(folders["mixed"] / "text_encoder")
    for path in folders["variant"].rglob("*.bin"):
        path.rename(path.with_suffix(".fp16.bin"))
    kinds = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
    for name, folder in folders.items():
        source = source_of(folder)._replace(variant="fp16" if name == "variant" else None)
        pipeline = load_weights(source, DiffusionPipeline)
        assert said() == [str(folder)]
        for part, kind in kinds.items():
            expected = getattr(whole, part).state_dict()
            for model in (load_part(source, kind, part), getattr(pipeline, part)):
                state = model.state_dict()
                assert state.keys() == expected.keys()
                assert all(torch.equal(state[key], expected[key]) for key in state), (name, part)
        assert said() == [f"{folder}/{part}" for part in kinds if name != "mixed" or part == "text_encoder"]
        load_frozen(source, CLIPTextModel, "text_encoder", torch.device("cpu"), torch.float32)
        assert said() == []  # once is enough


def test_safetensors_are_preferred(said, tmp_path):
    """Beside whole ones a .bin file is not touched; damaged ones are an error, and not replaced by it."""
    teacher = save_pixel_pipeline(tmp_path / "teacher")
    weights = teacher / "unet" / "diffusion_pytorch_model.safetensors"
    (weights.with_suffix(".bin")).write_bytes(b"no weights")
    assert load_part(source_of(teacher), UNet2DModel, "unet")
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.write_bytes(weights.read_bytes()[:-8])
    assert "diffusion_pytorch_model.safetensors" in one_line(load_part, source_of(teacher), UNet2DModel, "unet")
    assert said() == []


@pytest.mark.parametrize("content", [b"", b"torn", None], ids=["empty", "torn", "cut"])
def test_damaged_bin_files_are_said(content, tmp_path):
    teacher = to_bin(save_sd_pipeline(tmp_path / "teacher"))
    for part, kind in (("unet", UNet2DConditionModel), ("text_encoder", CLIPTextModel)):
        (path,) = (teacher / part).glob("*.bin")
        path.write_bytes(path.read_bytes()[:-100] if content is None else content)
        assert one_line(load_part, source_of(teacher), kind, part).startswith(
            f"error: --pretrained_teacher_model {teacher} does not load: "
        )


def test_no_weights_at_all(tmp_path):
    teacher = save_sd_pipeline(tmp_path / "teacher")
    for path in teacher.rglob("*.safetensors"):
        path.unlink()
    for part, kind in (("vae", AutoencoderKL), ("text_encoder", CLIPTextModel)):
        assert "no file named" in one_line(load_part, source_of(teacher), kind, part)


def test_a_refusal_of_the_library_is_passed_on(tmp_path, monkeypatch):
    """Transformers has a rule of its own, on the version of torch."""

    def refuse():
        raise ValueError("we now require users to upgrade torch")

    monkeypatch.setattr("transformers.modeling_utils.check_torch_load_is_safe", refuse)
    teacher = to_bin(save_sd_pipeline(tmp_path / "teacher"))
    line = one_line(load_part, source_of(teacher), CLIPTextModel, "text_encoder")
    assert "we now require users to upgrade torch" in line and str(teacher) in line


# ----------------------------------------------------------------------------------------------------- planted pickles


class Planted:
    """Creates a file when it is unpickled without care."""

    def __init__(self, place: Path):
        self.place = str(place)

    def __reduce__(self):
        return builtins.open, (self.place, "w")


@pytest.fixture
def plant(request, tmp_path):
    """`plant(file)` replaces a file by a pickle that would create a file; at the end that is seen not to exist.

    It is in the archive that torch writes or, where the test asks for it, a bare pickle.
    """
    trap, planted, archive = tmp_path / "created", [], getattr(request, "param", "archive") == "archive"

    def replace(path: Path) -> None:
        torch.save({"conv_in.weight": Planted(trap)}, path)
        if not archive:
            path.write_bytes(pickle.dumps({"conv_in.weight": Planted(trap)}, protocol=2))
        planted.append(path)

    yield replace
    assert planted and not trap.exists()
    if archive:
        torch.load(planted[0], weights_only=False)
    else:
        pickle.loads(planted[0].read_bytes())
    assert trap.exists()  # it would have worked


PARTS = [(kind, part) for kind, (*_, parts) in SCRIPTS.items() for part in parts if part] + [("unet", "unet")]


@pytest.mark.parametrize(("kind", "part"), PARTS, ids=str)
def test_a_planted_pickle_in_a_teacher_is_refused(kind, part, distil, plant, tmp_path):
    teacher = to_bin(SCRIPTS[kind][0](tmp_path / "teacher"))
    (path,) = (teacher / part).glob("*.bin")
    plant(path)
    line = one_line(distil, kind, teacher)
    assert line.startswith(f"error: --pretrained_teacher_model {teacher} does not load: the .bin files of {teacher}")
    assert "hold more than weights" in line and "Remedy: " in line


@pytest.mark.parametrize("plant", ["archive", "pickle"], indirect=True)
def test_a_planted_pickle_in_shards_is_refused(plant, tmp_path):
    teacher = to_bin(save_sd_pipeline(tmp_path / "teacher"), shards=2)
    for part, kind in (("unet", UNet2DConditionModel), ("text_encoder", CLIPTextModel)):
        plant(sorted((teacher / part).glob("*.bin"))[1])
        assert "hold more than weights" in one_line(load_part, source_of(teacher), kind, part)


def test_a_planted_pickle_in_the_vae_of_dit_is_refused(distil, plant, tmp_path):
    teacher = save_dit_pipeline(tmp_path / "teacher")
    vae = to_bin(shutil.copytree(teacher / "vae", tmp_path / "vae"))
    plant(vae / "diffusion_pytorch_model.bin")
    assert one_line(distil, "dit", teacher, "--vae", vae).startswith(f"error: --vae {vae} does not load: the .bin")


@pytest.mark.parametrize("plant", ["archive", "pickle"], indirect=True)
@pytest.mark.parametrize("kind", SCRIPTS)
def test_a_planted_pickle_is_refused_by_generate(kind, run, plant, tmp_path):
    make, *_ = SCRIPTS[kind]
    model = to_bin(make(tmp_path / "model"))
    plant(sorted(model.rglob("*.bin"))[0])
    line = one_line(run, "generate", "--model", model, "--output_dir", tmp_path / "images")
    assert line.startswith(f"error: --model {model} does not load: the .bin files of {model} hold more than weights")
    assert not (tmp_path / "images").exists()


@pytest.fixture(scope="module")
def clip(tmp_path_factory, sd_teacher) -> Path:
    """A tiny CLIP of .bin weights."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = CLIPTokenizer.from_pretrained(sd_teacher / "tokenizer")
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = {**shape, **ends, "vocab_size": len(tokenizer), "max_position_embeddings": 24}
    vision = {**shape, "image_size": 32, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder)
    return to_bin(folder)


@pytest.fixture
def score(run, captioned, tmp_path):
    """`score(clip_model)` measures a folder of images with prompts; returns its row."""
    images = tmp_path / "images"
    images.mkdir()
    for index, path in enumerate(sorted(captioned.glob("*.png"))[:8]):
        Image.open(path).save(images / f"{index:06d}.png")
    (images / "manifest.json").write_text(json.dumps({"num_images": 8, "prompts": ["a dark bag", "a bright sneaker"]}))

    def measure(clip_model: Path) -> dict:
        model = ("--metrics", "clip_score", "--clip_model", clip_model)
        run("evaluate", "--images", images, *model, "--output", tmp_path / "results")
        return json.loads((tmp_path / "results.json").read_text())["rows"][0]

    return measure


def test_the_clip_score_by_bin_files(score, clip, said):
    assert -1 < score(clip)["clip_score"] < 1 and said() == [str(clip)]


@pytest.mark.parametrize("plant", ["archive", "pickle"], indirect=True)
def test_a_planted_pickle_is_refused_by_evaluate(score, clip, plant, tmp_path):
    model = shutil.copytree(clip, tmp_path / "clip")
    plant(model / "pytorch_model.bin")
    assert one_line(score, model).startswith(f"error: --clip_model {model} does not load: the .bin files of {model}")
    assert not (tmp_path / "results.json").exists()


def test_a_planted_pickle_in_a_checkpoint_is_refused(distil, plant, teacher):
    """In place of its weights, with a manifest that fits; one beside them is not looked at."""
    folder = distil("unet", teacher, "--checkpointing_steps", 1) / "checkpoint-1"
    plant(folder / "pytorch_model.bin")
    plant(folder / "optimizer.pt")
    again = ("--checkpointing_steps", 1, "--discard_later_checkpoints", "--resume_from_checkpoint")
    distil("unet", teacher, *again, "checkpoint-1")
    for path in sorted(folder.rglob("*.safetensors")):
        before = path.read_bytes(), (folder / "manifest.json").read_text()
        plant(path)
        line = one_line(distil, "unet", teacher, *again, "checkpoint-1")
        assert line.startswith("error: --resume_from_checkpoint checkpoint-1: ")
        entry = {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        edit(folder / "manifest.json", **{str(path.relative_to(folder)): entry})
        line = one_line(distil, "unet", teacher, *again, "checkpoint-1")
        assert line.startswith("error: --resume_from_checkpoint checkpoint-1: ")
        path.write_bytes(before[0])
        (folder / "manifest.json").write_text(before[1])


def test_a_planted_pickle_as_a_user_sees_it(plant, images, tmp_path):
    """A process of its own: one line, no traceback."""
    teacher = to_bin(save_pixel_pipeline(tmp_path / "teacher"))
    plant(teacher / "unet" / "diffusion_pytorch_model.bin")
    flags = ("--pretrained_teacher_model", teacher, "--train_data_dir", images, "--output_dir", tmp_path / "output")
    finished = run_file("train_lift_unet.py", *flags)
    assert finished.returncode == 1 and "Traceback" not in finished.stdout, finished.stdout
    assert finished.stdout.count("error: ") == 1 and not (tmp_path / "output").exists(), finished.stdout


# -------------------------------------------------------------------------------------- what the end of a run needs


@pytest.mark.parametrize("kind", ["sd21", "sdxl", "sd3"])
def test_a_part_that_the_end_alone_reads_is_looked_for_at_the_start(kind, run, request, tmp_path):
    """What is saved has all of the teacher's parts: those that training does without, too."""
    make = {"sd21": save_sd_pipeline, "sdxl": save_sdxl_pipeline, "sd3": save_sd3_pipeline}[kind]
    teacher = make(tmp_path / "teacher")
    edit(teacher / "model_index.json", image_encoder=["transformers", "CLIPVisionModelWithProjection"])
    data = ("--train_data_dir", request.getfixturevalue("captioned"), "--output_dir", tmp_path / "student")
    student = () if kind == "sd3" else ("--student", "bk_tiny" if kind == "sd21" else "extreme")
    flags = ("--pretrained_teacher_model", teacher, *data, *student, *SHORT, *CAPTIONS)
    line = one_line(run, f"train_lift_{kind}", *flags)
    assert line.startswith(f"error: --pretrained_teacher_model {teacher} does not load: ") and "no file" in line
    assert not (tmp_path / "student").exists()


# ---------------------------------------------------------------------------------------------------- noise schedules


def with_scheduler(folder: Path, scheduler) -> Path:
    """Give a pipeline folder another scheduler."""
    shutil.rmtree(folder / "scheduler")
    scheduler.save_pretrained(folder / "scheduler")
    edit(folder / "model_index.json", scheduler=["diffusers", type(scheduler).__name__])
    return folder


REFUSED = {
    "flow": (FlowMatchEulerDiscreteScheduler(), "has a FlowMatchEulerDiscreteScheduler, which is not DDPM's noise"),
    "sigmas": (UniPCMultistepScheduler(use_flow_sigmas=True), "has a UniPCMultistepScheduler with flow sigmas"),
    "flow_prediction": (
        UniPCMultistepScheduler(prediction_type="flow_prediction"),
        "has a UniPCMultistepScheduler that predicts flow_prediction",
    ),
    "unknown": (PNDMScheduler(prediction_type="score"), "has a PNDMScheduler that predicts score"),
    "edm": (EDMEulerScheduler(), "has a EDMEulerScheduler, which is not DDPM's noise"),
    "continuous": (
        EulerDiscreteScheduler(timestep_type="continuous"),
        "has a EulerDiscreteScheduler with continuous timesteps, which is not DDPM's noise",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("kind", ["unet", "sd21", "dit"])
def test_another_noise_than_ddpms_is_refused(kind, name, distil, tmp_path):
    scheduler, message = REFUSED[name]
    teacher = with_scheduler(SCRIPTS[kind][0](tmp_path / "teacher"), scheduler)
    for dry in ((), ("--dry_run",)):
        line = one_line(distil, kind, teacher, *dry)
        assert line.startswith(f"error: --pretrained_teacher_model {teacher} {message}") and "; pass a" in line
    assert not (tmp_path / "student").exists()


@pytest.mark.parametrize("kind", [DDPMScheduler, DDIMScheduler, PNDMScheduler, EulerDiscreteScheduler])
@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction", "sample"])
def test_a_schedule_is_read_from_any_sampler(kind, predicts, tmp_path):
    if (kind, predicts) == (PNDMScheduler, "sample"):
        predicts = "epsilon"  # which PNDM does not sample
    theirs = kind(num_train_timesteps=500, beta_end=0.03, beta_schedule="scaled_linear", prediction_type=predicts)
    theirs.save_pretrained(tmp_path / "scheduler")
    path = tmp_path / "scheduler" / "scheduler_config.json"
    by_hand = {key: value for key, value in json.loads(path.read_text()).items() if key != "_class_name"}
    for _ in range(2):
        schedule = load_noise_schedule(source_of(tmp_path), kind)
        assert type(schedule) is DDPMScheduler and schedule.config.prediction_type == predicts
        assert torch.equal(schedule.alphas_cumprod, theirs.alphas_cumprod) and len(schedule) == 500
        path.write_text(json.dumps(by_hand))
    assert kind.__name__ in DDPM_NOISE


def test_a_schedule_that_a_config_leaves_out_is_its_classs(tmp_path):
    """Published configs leave out defaults, and Heun's are not DDPM's."""
    theirs = HeunDiscreteScheduler()
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text('{"prediction_type": "v_prediction"}')
    schedule = load_noise_schedule(source_of(tmp_path), HeunDiscreteScheduler)
    assert torch.equal(schedule.alphas_cumprod, theirs.alphas_cumprod)
    assert not torch.equal(schedule.alphas_cumprod, DDPMScheduler().alphas_cumprod)
    assert schedule.config.prediction_type == "v_prediction"


def test_a_schedule_of_wrong_values(tmp_path):
    DDPMScheduler().save_pretrained(tmp_path / "scheduler")
    edit(tmp_path / "scheduler" / "scheduler_config.json", beta_schedule="wavy")
    line = one_line(load_noise_schedule, source_of(tmp_path), DDPMScheduler)
    assert "its DDPMScheduler: wavy" in line and line.endswith("; pass another")
    edit(tmp_path / "scheduler" / "scheduler_config.json", beta_schedule="sigmoid")  # which DDIM does not know
    line = one_line(load_noise_schedule, source_of(tmp_path), DDPMScheduler)
    assert "its DDPMScheduler: sigmoid is not implemented" in line and line.endswith("; pass another")


# ----------------------------------------------------------------------------------------------------- finite weights


def spoil(folder: Path, value: float, key: str = "") -> str:
    """Set a weight of a model's folder, the first of a key with `key` in it; returns its name."""
    (path,) = folder.glob("*.safetensors")
    state = load_file(path)
    key = next(name for name in state if key in name and state[name].is_floating_point())
    state[key].view(-1)[-1] = value
    path.unlink()
    torch.save(state, path.with_name("pytorch_model.bin" if path.stem == "model" else f"{path.stem}.bin"))
    return key


SPOILT = [(kind, part) for kind, part in PARTS if (kind, part) != ("sd3", "text_encoder_2")]


@pytest.mark.parametrize(("kind", "part"), SPOILT, ids=str)
def test_teachers_that_are_not_finite_are_refused(kind, part, distil, tmp_path):
    teacher = SCRIPTS[kind][0](tmp_path / "teacher")
    key = spoil(teacher / part, float("nan") if part in ("unet", "transformer") else float("-inf"))
    line = one_line(distil, kind, teacher)
    what = f"error: --pretrained_teacher_model {teacher}: its {part} has weights that are not finite ({key} …); "
    assert line.startswith(what) and "pass" in line.removeprefix(what) and "--mixed_precision" not in line


def test_the_vae_of_dit_is_finite(distil, tmp_path):
    teacher = save_dit_pipeline(tmp_path / "teacher")
    key = spoil(teacher / "vae", float("inf"), key="decoder.conv_in")
    other = save_dit_pipeline(tmp_path / "other")
    line = one_line(distil, "dit", other, "--vae", teacher / "vae")
    assert line.startswith(f"error: --vae {teacher / 'vae'} has weights that are not finite ({key} …); ")


def test_weights_too_large_for_half_precision(tmp_path):
    """They are finite in the file, so float32 and bfloat16 hold them."""
    teacher, cpu = save_sd3_pipeline(tmp_path / "teacher"), torch.device("cpu")
    for part, kind in (("vae", AutoencoderKL), ("text_encoder_3", T5EncoderModel)):
        key = spoil(teacher / part, 1e6)
        for dtype in (torch.float32, torch.bfloat16):
            model = load_frozen(source_of(teacher), kind, part, cpu, dtype)
            assert model.state_dict()[key].max() == torch.tensor(1e6).to(dtype)
        line = one_line(load_frozen, source_of(teacher), kind, part, cpu, torch.float16)
        assert f"its {part} has weights that are not finite ({key} …)" in line
        assert "pass --mixed_precision bf16 or no" in line


def test_pixels_per_latent():
    levels = {"down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3}
    vae = AutoencoderKL(block_out_channels=[8, 8, 8], norm_num_groups=4, **levels)
    latents = vae.encode(torch.zeros(1, 3, 32, 32)).latent_dist.mean
    assert vae_factor(vae) == 32 // latents.shape[-1] == 4


def test_first_non_finite(monkeypatch):
    tensors = {"whole": torch.ones(3), "count": torch.arange(3), "half": torch.ones(2, dtype=torch.float16)}
    tensors |= {"none": torch.zeros(0), "scalar": torch.tensor(1.0, dtype=torch.bfloat16)}
    assert first_non_finite(tensors) is None and first_non_finite({}) is None
    assert first_non_finite({"count": torch.arange(3)}) is None
    for value in (np.nan, np.inf, -np.inf):
        late = {"late": torch.tensor([[0.0, value]]), "later": torch.tensor(value)}
        assert first_non_finite({**tensors, **late}) == "late"
    reads = []
    item = torch.Tensor.item
    monkeypatch.setattr(torch.Tensor, "item", lambda tensor: reads.append(tensor) or item(tensor))
    first_non_finite({str(number): torch.ones(2) for number in range(100)})
    assert len(reads) == 1
