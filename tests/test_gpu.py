"""What only a GPU would show, as far as it can be tested without one."""

import argparse
import sys
import types

from common.arguments import check_xformers
from common.training import make_accelerator, prepare_models

import pytest
import torch
from diffusers import SD3Transformer2DModel, UNet2DModel

from lift_utils import FeatureModel
from tiny_models import TINY_SD3, TINY_UNET


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


# ----------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize("allowed", [False, True])
def test_tf32_is_what_the_flag_says(tmp_path, allowed):
    """cudnn's own default lets convolutions run in TF32 whatever matrix products do."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        make_accelerator(str(tmp_path), "none", 0, 1, "no", allow_tf32=allowed)
        assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == allowed
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def test_waits_buffers_and_scale(tmp_path):
    accelerator = make_accelerator(str(tmp_path), "none", 0, 1, "no", allow_tf32=False, loss_scale=1.0)
    assert accelerator.init_handler.timeout.total_seconds() >= 3600
    assert accelerator.ddp_handler.broadcast_buffers is False and accelerator.ddp_handler.gradient_as_bucket_view
    assert accelerator.scaler_handler.init_scale == 1.0 and accelerator.dataloader_config.non_blocking
