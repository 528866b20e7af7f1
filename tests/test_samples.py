"""What a run shows: the pictures that the pipelines draw, of the student and of its average."""

import importlib
from functools import partial

from common.reporting import autocast_of, sample_models
from common.training import seed_step

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import DDIMPipeline, DiffusionPipeline, EulerAncestralDiscreteScheduler, UNet2DModel
from diffusers.training_utils import EMAModel

from tiny_models import TINY_UNET


PROMPTS = ["a photo of a bag", "a dark sneaker"]


def test_samples_of_the_average_are_the_averages():
    """And the student keeps its own weights."""
    student = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(student.weight, 1.0)
    ema = EMAModel(student.parameters(), foreach=True)
    ema.shadow_params[0].fill_(2.0)

    def show() -> dict[str, list]:
        return sample_models(lambda model: [model.weight.item()], None, student, ema, [0.0])

    assert show() == {"teacher": [0.0], "student": [1.0]}  # before the first step
    ema.optimization_step = 1
    assert show() == {"teacher": [0.0], "student": [1.0], "EMA student": [2.0]}
    assert student.weight.item() == 1.0


def test_predictions_come_in_float32_while_samples_are_drawn():
    """Samplers keep their latents in the dtype of the prediction, which would round them at each step."""
    model = UNet2DModel(**TINY_UNET)
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    inputs = {"sample": torch.randn(1, 1, 16, 16), "timestep": 5, "return_dict": False}
    with torch.no_grad(), autocast_of(model, accelerator):
        widened = model(**inputs)[0]
    with torch.no_grad(), accelerator.autocast():
        plain = model(**inputs)[0]
    AcceleratorState._reset_state(reset_partial_state=True)
    assert (widened.dtype, plain.dtype) == (torch.float32, torch.bfloat16) and torch.equal(widened, plain.float())


@pytest.mark.parametrize(
    ("script", "guidance"), [("unet", None), ("sd21", 5), ("sdxl", 5), ("dit", 5), ("dit", 0.5), ("sd3", 5)]
)
def test_samples_are_the_pipelines(teachers, script, guidance):
    """The pipeline that users load draws the same pictures, in the prompts' order, from the same noise.

    Also by a sampler that adds noise of its own.
    """
    module, options = importlib.import_module(f"train_lift_{script}"), {"add_watermarker": False}
    kind = DDIMPipeline if script == "unet" else DiffusionPipeline
    pipeline = kind.from_pretrained(teachers[script], **options if script == "sdxl" else {})
    pipeline.set_progress_bar_config(disable=True)
    if script == "unet":
        pipeline.scheduler.register_to_config(clip_sample=False)  # as the card says
    if script in ("sd21", "sdxl"):
        pipeline.scheduler = EulerAncestralDiscreteScheduler.from_config(pipeline.scheduler.config)
    model = pipeline.transformer if script in ("dit", "sd3") else pipeline.unet
    draw = partial(
        module.sample_images, model, scheduler=pipeline.scheduler, seed=0, accelerator=Accelerator(cpu=True)
    )
    how = {"num_inference_steps": 3} | ({} if guidance is None else {"guidance_scale": guidance})
    if script == "unet":
        ours, inputs = draw(count=2, **how), {"batch_size": 2, "generator": torch.Generator().manual_seed(0)}
    elif script == "dit":
        ours, inputs = draw(vae=pipeline.vae, classes=[1, 999], **how), {"class_labels": [1, 999]}
    else:
        prompts = {"sd21": (PROMPTS, "cpu", 1, True), "sdxl": (PROMPTS,), "sd3": (PROMPTS, None, None)}[script]
        encoded = pipeline.encode_prompt(*prompts)  # with those of no prompt behind each
        rows = [torch.cat([none[:1], given]) for given, none in zip(encoded[::2], encoded[1::2])]
        text = {"sd21": rows[0], "sdxl": dict(zip(("text", "pooled"), rows)), "sd3": rows}[script]
        size = {"resolution": 32} if script == "sd3" else {}
        ours = draw(vae=pipeline.vae, text=text, **size, **how)
        latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        inputs = {"prompt": PROMPTS, "latents": latents, "height": 32, "width": 32}
    seed_step(0)
    ours, theirs = (
        np.stack([*map(np.asarray, images)]).astype(int) for images in (ours, pipeline(**inputs, **how).images)
    )
    assert ours.shape == theirs.shape and np.abs(ours - theirs).max() <= 1
    assert ours[0].std() > 1 and np.abs(ours[0] - ours[1]).max() > 10
