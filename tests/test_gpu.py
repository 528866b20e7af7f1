"""What only a GPU would show, as far as it can be tested without one."""

import argparse
import importlib
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, partialmethod
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from common.adapters import add_adapters
from common.attention import check_xformers
from common.costs import dtype_of
from common.images import flip_views
from common.sd3_text import T5, TextLayout, join_text
from common.students import pair_features
from common.teacher_weights import hold_teacher
from common.teachers import TeacherSource, load_part, load_skeleton
from common.training import make_accelerator, prepare_models, warn_of_bf16

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils.operations import convert_outputs_to_fp32
from conftest import inputs_of
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    SchedulerMixin,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from lift_utils import FeatureModel, make_kd_loss
from tiny_models import (
    TINY_SD3,
    TINY_UNET,
    save_dit_pipeline,
    save_pixel_pipeline,
    save_sd3_pipeline,
    save_sd_pipeline,
    save_sdxl_pipeline,
)


# ----------------------------------------------------------------------------------------------------------- xformers


def test_xformers_whose_kernels_do_not_load_is_refused(monkeypatch):
    check_xformers()  # as installed, they do
    broken = types.ModuleType("xformers._cpp_lib")
    broken._cpp_library_load_exception = OSError("libcudart.so.12: cannot open shared object file")
    monkeypatch.setitem(sys.modules, "xformers._cpp_lib", broken)
    monkeypatch.setattr(sys.modules["xformers"], "_cpp_lib", broken, raising=False)
    with pytest.raises(SystemExit, match=r"^error: --enable_xformers.* do not load beside torch 2.*drop the flag"):
        check_xformers()


@pytest.mark.parametrize(
    ("model", "precision", "line"),
    [
        (
            lambda: UNet2DModel(**TINY_UNET),
            "no",
            "xformers cannot compute this model's attention: .*; drop --enable_xf",
        ),
        (lambda: SD3Transformer2DModel(**TINY_SD3, qk_norm="rms_norm"), "bf16", "bf16 .*qk_norm; drop --enable_xf"),
    ],
    ids=["no device", "qk_norm in half precision"],
)
def test_attention_that_xformers_cannot_compute_is_said_in_one_line(model, precision, line):
    accelerator = argparse.Namespace(mixed_precision=precision, device=torch.device("cpu"))
    with pytest.raises(SystemExit, match=f"^error: .*{line}") as error:
        prepare_models(FeatureModel(model(), []), None, accelerator, False, xformers=True, compiled=False)
    assert "\n" not in str(error.value)


def test_a_teacher_that_float16_cannot_hold_is_refused():
    """With the flag that says so, and values of it that help."""
    both = "--teacher_dtype bf16 or fp32"
    for flag, given, working, remedy in (
        ("mixed_precision", None, "fp16", "--mixed_precision bf16 or no"),
        ("mixed_precision", "fp8", "fp16", "--mixed_precision bf16 or no"),
        ("teacher_dtype", "fp16", "no", both),
        ("teacher_dtype", "fp16", "fp16", both),
    ):
        teacher = UNet2DModel(**TINY_UNET)
        teacher.conv_in.weight.data[0] = 1e6
        line = rf"^error: --{flag} fp16: .* not finite \(conv_in.weight …\); pass {remedy}, which"
        with pytest.raises(SystemExit, match=line):
            hold_teacher(teacher, given, WORKING[working], torch.device("cpu"), offload=False)


# ----------------------------------------------------------------------------------------------------------- settings


@pytest.fixture
def no_accelerator() -> None:
    """Forget the precision of a run before: there is one for a whole process."""
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("no_accelerator")
@pytest.mark.parametrize("allowed", [False, True])
def test_tf32_is_what_the_flag_says(tmp_path, allowed):
    """cudnn's own default lets convolutions run in TF32 whatever matrix products do."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        make_accelerator(str(tmp_path), "none", 0, 1, "no", allow_tf32=allowed)
        assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == allowed
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize("own", [False, True])
def test_a_gpu_that_imitates_bf16_is_named(own, monkeypatch, caplog):
    PartialState()  # which the logger needs
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: own or including_emulation)
    for precision, device, said in (("bf16", "cuda", not own), ("fp16", "cuda", False), ("bf16", "cpu", False)):
        caplog.clear()
        warn_of_bf16(types.SimpleNamespace(mixed_precision=precision, device=torch.device(device)))
        assert ("only imitates it" in caplog.text) == said


@pytest.mark.usefixtures("no_accelerator")
def test_waits_buffers_and_scale(tmp_path):
    accelerator = make_accelerator(str(tmp_path), "none", 0, 1, "no", allow_tf32=False, loss_scale=1.0)
    assert accelerator.init_handler.timeout.total_seconds() >= 3600
    assert accelerator.ddp_handler.broadcast_buffers is False and accelerator.ddp_handler.gradient_as_bucket_view
    assert accelerator.autocast_handler.cache_enabled is False
    assert accelerator.scaler_handler.init_scale == 1.0 and accelerator.dataloader_config.non_blocking


# ------------------------------------------------------------------------------------------------- devices and dtypes


STUDENTS = {"unet": "0.5", "sd21": "whole", "sd3": "half", "sdxl": "whole"}
WORKING = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Step(NamedTuple):
    """All that `compute_losses` of a script is given, but the kind of the distillation loss."""

    script: types.ModuleType
    student: FeatureModel
    teacher: FeatureModel
    batch: dict[str, torch.Tensor]
    inputs_of: partial
    settings: dict[str, Any]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A tiny pipeline for each script."""
    blocks = {
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    }
    sizes = {"block_out_channels": [8, 16], "attention_head_dim": [1, 2], "layers_per_block": 1}
    makers = {
        "unet": save_pixel_pipeline,
        "sd21": partial(save_sd_pipeline, **blocks, **sizes),
        "dit": partial(save_dit_pipeline, num_layers=2),
        "sd3": partial(save_sd3_pipeline, num_layers=2),
        "sdxl": partial(save_sdxl_pipeline, **blocks, **sizes, transformer_layers_per_block=1),
    }
    return {name: save(tmp_path_factory.mktemp(name)) for name, save in makers.items()}


class OneDevice(TorchDispatchMode):
    """Refuses convolutions of tensors on two devices, which fake tensors let through."""

    def __torch_dispatch__(
        self, func: Callable, types: tuple[type, ...], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        tensors = [each for each in args if isinstance(each, torch.Tensor)]
        if func is torch.ops.aten.convolution.default and len({tensor.device for tensor in tensors}) > 1:
            raise RuntimeError("a convolution found two different devices")
        return func(*args, **(kwargs or {}))


@contextmanager
def fake_cuda() -> Iterator[None]:
    """Tensors that say they are on a GPU and hold nothing: what is computed on them is their device, dtype and shape.

    As on a GPU, what mixes devices or dtypes raises. Autocast asks for a GPU twice.
    """
    with (
        mock.patch("torch.cuda.amp.common.amp_definitely_not_available", return_value=False),
        mock.patch("torch.cuda.is_bf16_supported", return_value=True),
        FakeTensorMode(),
        OneDevice(),
    ):
        yield


def put(value: Any, device: str) -> Any:
    """The same with fake tensors on the device, through containers and objects of ours, in place where it can be."""
    if isinstance(value, torch.Tensor):
        kind = torch.nn.Parameter if isinstance(value, torch.nn.Parameter) else torch.Tensor.requires_grad_
        return kind(torch.empty(value.shape, dtype=value.dtype, device=device), value.requires_grad)
    if isinstance(value, torch.device):
        return torch.device(device)
    if isinstance(value, torch.nn.Module):  # its own `to` cannot put fake tensors in the place of others
        for module in value.modules():
            for tensors in (module._parameters, module._buffers):
                tensors.update(put(tensors, device))
        return value
    if type(value) is dict:
        return {name: put(each, device) for name, each in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*[put(each, device) for each in value])
    if isinstance(value, (list, tuple)):
        return type(value)(put(each, device) for each in value)
    if isinstance(value, SchedulerMixin) or type(value).__module__.startswith(("train_lift_", "common.")):
        for name, each in vars(value).items():
            setattr(value, name, put(each, device))
    return value


def make_step(
    name: str, folder: Path, precision: str, cached: bool, lora_rank: int = 0, compiled: bool = False
) -> Step:
    """A script's models and inputs as its `main` makes them, on the CPU, with features in pairs.

    Args:
        compiled: With gradient checkpointing, too.
    """
    script = importlib.import_module(f"train_lift_{name}")
    rank = ["--lora_rank", str(lora_rank)] if lora_rank else []
    student = ["--keep_blocks", "1"] if name == "dit" else ["--student", STUDENTS[name]]
    args = script.parse_args(["--pretrained_teacher_model", str(folder), "--dry_run", *rank, *student])
    accelerator = argparse.Namespace(mixed_precision=precision, device=torch.device("cpu"))
    source = TeacherSource(str(folder), None, None, script.EXPECTED)
    make = {"unet": unet_step, "dit": dit_step, "sd3": sd3_step}.get(name, latent_unet_step)
    dtype = dtype_of(accelerator.mixed_precision)
    step = make(script, args, source, accelerator.device, dtype, cached)
    hold_teacher(step.teacher.model, None, dtype, accelerator.device, offload=False)
    prepare_models(step.student, step.teacher, accelerator, compiled, xformers=False, compiled=compiled)
    return step


def unet_step(
    script: types.ModuleType,
    args: argparse.Namespace,
    source: TeacherSource,
    device: torch.device,
    dtype: torch.dtype,
    cached: bool,
) -> Step:
    teacher, scheduler = script.load_teacher(source, "epsilon")
    unet, recipe = script.build_student(teacher, args)
    inputs = script.example_inputs(unet)
    models = pair_features(unet, teacher, recipe["features"], inputs, always_project=True)
    batch = {"images": torch.zeros(4, 1, 16, 16, dtype=torch.uint8)}
    draws = {"steps": 1000, "random_flip": True, "antithetic_timesteps": True}
    inputs = inputs_of(script, (1, 16, 16), draws, scheduler=scheduler)
    return Step(script, *models, batch, inputs, {"lambdas": (1.0, 1.0, 1.0), "reduction": "sum"})


def latent_unet_step(
    script: types.ModuleType,
    args: argparse.Namespace,
    source: TeacherSource,
    device: torch.device,
    dtype: torch.dtype,
    cached: bool,
) -> Step:
    """Of Stable Diffusion 2.1, and of SDXL, which has a second text encoder and the images' sizes, too."""
    (_, scheduler), args.resolution = script.check_pipeline(source), 32
    vae, xl = load_part(source, AutoencoderKL, "vae"), script.__name__ == "train_lift_sdxl"
    shape, recipe = script.build_student(load_skeleton(source, UNet2DConditionModel, "unet"), vae, args)
    teacher, unet = load_part(source, UNet2DConditionModel, "unet"), UNet2DConditionModel.from_config(shape.config)
    if args.lora_rank:
        add_adapters(unet, args.lora_rank, script.LORA_TARGETS, dtype)
    models = pair_features(unet, teacher, recipe["features"], script.example_inputs(unet))
    encoders = script.Encoders(source, *([vae] if xl else []), device, dtype)
    images, ids = torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.zeros(4, *[2] * xl, 24, dtype=torch.long)
    batch, text = {"images": images, "input_ids": ids}, encoders.encode_text(ids)
    text = text if xl else {"text": text}
    if cached:
        moments = [encoders.encode_images(view) for view in flip_views(images, both=True)]
        batch, encoders = {"moments": torch.stack(moments, dim=1), **text}, None
    if xl:
        batch["time_ids"] = torch.zeros(4, 6)
    no_text = {name: rows[0] for name, rows in text.items()}
    draws = {"steps": 1000, "random_flip": True, "caption_dropout": 0.1}
    how = {"scheduler": scheduler, "encoders": encoders}
    how["no_text"] = no_text if xl else no_text["text"]
    return Step(script, *models, batch, inputs_of(script, (4, 8, 8), draws, **how), {"lambdas": (1.0, 1.0, 1.0)})


def dit_step(
    script: types.ModuleType,
    args: argparse.Namespace,
    source: TeacherSource,
    device: torch.device,
    dtype: torch.dtype,
    cached: bool,
) -> Step:
    shape, recipe = script.build_student(load_skeleton(source, DiTTransformer2DModel, "transformer"), args)
    teacher = load_part(source, DiTTransformer2DModel, "transformer")
    transformer = DiTTransformer2DModel.from_config(shape.config)
    script.keep_labels(transformer)
    models = pair_features(transformer, teacher, recipe["features"], script.example_inputs(transformer))
    encoders = script.Encoders(load_part(source, AutoencoderKL, "vae"), device, dtype)
    images, labels = torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.zeros(4, dtype=torch.long)
    batch = {"images": images, "labels": labels}
    if cached:
        moments = [encoders.encode_images(view) for view in flip_views(images, both=True)]
        batch, encoders = {"moments": torch.stack(moments, dim=1), "labels": labels}, None
    scheduler = script.load_schedulers(source, DDIMScheduler, "epsilon")[0]
    draws = {"steps": 1000, "random_flip": True, "label_dropout": 0.1}
    inputs = inputs_of(script, (4, 8, 8), draws, scheduler=scheduler, encoders=encoders, null_class=1000)
    settings = {"kd_alpha": 0.9, "lambda_kd_feat": 1.0, "process": script.ReverseProcess(scheduler, device)}
    return Step(script, *models, batch, inputs, settings)


def sd3_step(
    script: types.ModuleType,
    args: argparse.Namespace,
    source: TeacherSource,
    device: torch.device,
    dtype: torch.dtype,
    cached: bool,
) -> Step:
    args.resolution, args.max_sequence_length = 32, 16
    names = script.check_pipeline(source, no_t5=False)[1]
    teacher_shape = load_skeleton(source, SD3Transformer2DModel, "transformer")
    shape, recipe = script.build_student(teacher_shape, load_skeleton(source, AutoencoderKL, "vae"), args)
    teacher = load_part(source, SD3Transformer2DModel, "transformer")
    transformer = SD3Transformer2DModel.from_config(shape.config)
    if args.lora_rank:
        add_adapters(transformer, args.lora_rank, script.LORA_TARGETS, dtype)
    inputs = script.example_inputs(transformer, args.max_sequence_length)
    models = pair_features(transformer, teacher, recipe["features"], inputs, item=1)
    encoders = script.Encoders(source, names, device, dtype)
    images = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    tokens = {name: torch.zeros(4, 16 if name == T5 else 24, dtype=torch.long) for name in names}
    batch, text = {"images": images, **tokens}, encoders.encode_text(tokens)
    layout = TextLayout.of(teacher_shape.config, args.max_sequence_length)
    no_text = tuple(embeddings[0] for embeddings in join_text(text, layout))
    if cached:
        moments = [encoders.encode_images(view) for view in flip_views(images, both=True)]
        batch, encoders = {"moments": torch.stack(moments, dim=1), **text}, None
    draws = {flag: getattr(args, flag) for flag in script.NOISE_FLAGS} | {"caption_dropout": 0.1, "random_flip": True}
    how = {"scheduler": script.load_scheduler(source, device), "encoders": encoders, "layout": layout}
    settings = {"lambdas": (1.0, 1.0, 1.0), "weighting_scheme": args.weighting_scheme}
    return Step(script, *models, batch, inputs_of(script, (4, 8, 8), draws, no_text=no_text, **how), settings)


def put_step(step: Step, precision: str) -> Step:
    """All of a step on the fake GPU but DDPM's schedule, which stays on the CPU, and the student as if prepared.

    Accelerate's autocast is around the student's forward pass alone, whose outputs it converts to float32.
    """
    student, teacher, batch, settings = put((step.student, step.teacher, step.batch, step.settings), "cuda")
    inputs, scheduler = dict(step.inputs_of.keywords), step.inputs_of.keywords["scheduler"]
    place = "cuda" if isinstance(scheduler, FlowMatchEulerDiscreteScheduler) else "cpu"
    inputs = {name: put(value, place if name == "scheduler" else "cuda") for name, value in inputs.items()}
    inputs = partial(step.script.make_inputs, **inputs)
    if precision != "no":
        forward = torch.autocast("cuda", WORKING[precision])(FeatureModel.forward)
        student.forward = types.MethodType(convert_outputs_to_fp32(forward), student)
    return Step(step.script, student, teacher, batch, inputs, settings)


def losses_of(step: Step) -> dict[str, torch.Tensor]:
    """The loss, as the differentiable "total", and its parts."""
    settings = {"inputs_of": step.inputs_of, "kd_loss": make_kd_loss("place"), **step.settings}
    total, logs = step.script.compute_losses(step.student.train(), step.teacher, step.batch, 0.5, **settings)
    return {"total": total, **logs}


def check_scalars(values: dict[str, torch.Tensor]) -> None:
    for name, value in values.items():
        assert (value.device.type, value.dtype, value.shape) == ("cuda", torch.float32, ()), name


@pytest.mark.parametrize("precision", WORKING)
@pytest.mark.parametrize(
    ("name", "cached", "lora_rank"),
    [
        ("unet", False, 0),
        *[(name, cached, 0) for name in ("sd21", "dit", "sd3", "sdxl") for cached in (True, False)],
        *[(name, True, 2) for name in ("sd21", "sd3")],
    ],
)
def test_a_step_mixes_no_devices_and_no_dtypes(folders, name, cached, lora_rank, precision):
    step = make_step(name, folders[name], precision, cached, lora_rank)
    assert {weight.dtype for weight in step.teacher.parameters()} == {WORKING[precision]}
    trained = {weight.dtype for weight in step.student.parameters() if weight.requires_grad}
    frozen = {weight.dtype for weight in step.student.parameters() if not weight.requires_grad}
    assert trained == {torch.float32} and frozen == ({WORKING[precision]} if lora_rank else set())
    with fake_cuda():
        losses = losses_of(put_step(step, precision))
    assert losses["total"].requires_grad and {"task", "kd", "feat", "coarse", "loss"} <= losses.keys()
    check_scalars(losses)


@pytest.mark.parametrize("precision", WORKING)
@pytest.mark.parametrize("kind", ["place", "lift", "mse"])
def test_output_terms_are_float32_on_the_device(kind, precision):
    with fake_cuda():
        student = torch.zeros(2, 4, 8, 8, device="cuda", requires_grad=True)  # a prepared student gives float32
        loss, logs = make_kd_loss(kind)(student, torch.zeros_like(student, dtype=WORKING[precision]), 0.5)
    assert loss.requires_grad
    check_scalars({"loss": loss, **logs})


def test_what_is_misplaced_or_of_another_dtype_fails(folders):
    """The tests above can fail."""

    def fails_with(change: Callable[[Step], None]) -> str:
        step = make_step("sd21", folders["sd21"], "bf16", cached=True)
        with fake_cuda():
            step = put_step(step, "bf16")
            change(step)
            with pytest.raises(RuntimeError) as error:
                losses_of(step)
        return str(error.value)

    devices = "two different devices"
    assert devices in fails_with(lambda step: step.inputs_of.keywords.update(no_text=torch.zeros(24, 16)))
    assert devices in fails_with(lambda step: put(step.teacher.model.conv_in, "cpu"))
    assert devices in fails_with(lambda step: put(step.student.model.time_embedding, "cpu"))

    def widen(step: Step) -> None:
        layer = step.teacher.model.conv_out
        layer._parameters.update({name: put(weight.float(), "cuda") for name, weight in layer.named_parameters()})

    assert "should be the same" in fails_with(widen)


@pytest.mark.parametrize("name", ["dit", "sd3"])  # which capture whole checkpointed blocks
def test_compiled_and_checkpointed_is_one_graph(folders, name, monkeypatch):
    """A recomputed block captures no feature a second time, which would split the graph or lose the feature."""
    compile_module, graphs = FeatureModel.compile, []

    def trace(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    monkeypatch.setattr(FeatureModel, "compile", partialmethod(compile_module, backend=trace, fullgraph=True))
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        step = make_step(name, folders[name], "no", cached=True, compiled=compiled)
        torch.manual_seed(0)
        losses = losses_of(step)
        losses["total"].backward()
        gradients = {key: weight.grad for key, weight in step.student.named_parameters() if weight.grad is not None}
        results.append(({key: value.detach() for key, value in losses.items()}, gradients))
    assert graphs and results[0][1]
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-5)
