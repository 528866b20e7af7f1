# Copyright 2026 The LIFT and PLACE distillation authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""In what precision, and where, are the weights of a teacher held that runs in every step?"""

import logging
import re
from functools import partial
from typing import Any

from common.costs import DTYPES, dtype_of
from common.memory import fits_the_gpu
from common.teachers import check_weights, freeze

import torch


logger = logging.getLogger(__name__)  # not Accelerate's, which says nothing before a run is set up

BLOCK = 64  # weights of nf4 that share a float32 scale
COMPRESSED = {"fp8": 1, "nf4": 0.5 + 4 / BLOCK}  # bytes per weight, by --teacher_dtype


@fits_the_gpu("the teacher", "pass --teacher_dtype or --offload_teacher (not for a DiT)")
def hold_teacher(
    teacher: torch.nn.Module, teacher_dtype: str | None, working: torch.dtype, device: torch.device, offload: bool
) -> torch.nn.Module:
    """The teacher for forward passes alone, which takes inputs of any dtype; it changes in place.

    Float8 weights are those of Diffusers' layerwise casting, nf4 ones those of bitsandbytes, in the linear layers.
    Both are widened for the computation, layer by layer.

    Args:
        teacher: A Diffusers model with plain weights.
        teacher_dtype: "fp32", "fp16", "bf16", "fp8", "nf4", or `None` for `working`.
        working: The precision of the run, in which compressed weights compute.
        device: Where it computes.
        offload: Whether its weights wait in the memory of the CPU, and come to the device layer by layer.
    """
    first, computes = first_place(teacher_dtype, working, device, offload)
    freeze(teacher, first, computes)
    if computes == torch.float16:
        own = teacher_dtype == "fp16"
        flag, others = ("--teacher_dtype", "bf16 or fp32") if own else ("--mixed_precision", "bf16 or no")
        check_weights(teacher, f"{flag} fp16: the teacher", f"{flag} {others}")
    if teacher_dtype in COMPRESSED:
        share = count_compressed(teacher, teacher_dtype) / sum(weight.numel() for weight in teacher.parameters())
        logger.info(f"--teacher_dtype {teacher_dtype} holds {share:.0%} of the teacher's weights")
    if teacher_dtype == "fp8":
        teacher.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=computes)
    elif teacher_dtype == "nf4":
        _quantize(teacher, computes)
    if offload:
        where = {"onload_device": device, "offload_device": torch.device("cpu")}
        teacher.enable_group_offload(**where, offload_type="leaf_level", use_stream=device.type == "cuda")
    else:
        torch.nn.Module.to(teacher, device)  # where bitsandbytes quantizes
    teacher.register_forward_pre_hook(partial(_cast_inputs, computes), with_kwargs=True)
    return teacher


def first_place(
    teacher_dtype: str | None, working: torch.dtype, device: torch.device, offload: bool
) -> tuple[torch.device, torch.dtype]:
    """Where, and in what dtype, a teacher's weights are before [`hold_teacher`] compresses or offloads them."""
    on_cpu = offload or teacher_dtype in COMPRESSED
    return torch.device("cpu") if on_cpu else device, DTYPES.get(teacher_dtype, working)


def _quantize(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Put bitsandbytes' layers of 4 bits in the place of linear ones. They quantize when they are moved."""
    import bitsandbytes as bnb

    model.is_loaded_in_4bit = True  # Diffusers then counts two weights in a byte
    for path, layer in _compressed_layers(model, "nf4").items():
        parent, _, name = path.rpartition(".")
        shape = layer.in_features, layer.out_features, layer.bias is not None
        quantized = bnb.nn.Linear4bit(*shape, compute_dtype=dtype, compress_statistics=False, quant_type="nf4")
        quantized.weight = bnb.nn.Params4bit(
            layer.weight.data, requires_grad=False, compress_statistics=False, quant_type="nf4", module=quantized
        )
        quantized.bias = layer.bias
        setattr(model.get_submodule(parent), name, quantized.eval())


def _compressed_layers(model: torch.nn.Module, teacher_dtype: str | None) -> dict[str, torch.nn.Module]:
    """The layers whose weights are compressed, by their names.

    Diffusers casts no layers of normalisation, those of AdaLN among them, nor the first and the last ones.
    """
    layers = dict(model.named_modules())
    if teacher_dtype == "fp8":
        kinds, skipped = (torch.nn.Linear, torch.nn.Conv2d), re.compile(r"norm|pos_embed|patch_embed|^proj_(in|out)$")
        return {name: each for name, each in layers.items() if isinstance(each, kinds) and not skipped.search(name)}
    if teacher_dtype == "nf4":
        return {name: each for name, each in layers.items() if _fits_nf4(each)}
    return {}


def _fits_nf4(layer: torch.nn.Module) -> bool:
    """Whether bitsandbytes has kernels for it on the CPU too. All large layers of these models are of such widths."""
    return type(layer) is torch.nn.Linear and layer.in_features % BLOCK == layer.out_features % BLOCK == 0


def _cast_inputs(dtype: torch.dtype, model: torch.nn.Module, inputs: tuple, named: dict[str, Any]) -> tuple:
    """Timesteps, which have no second dimension, stay what they are: half precision could not tell them apart."""

    def cast(value: Any) -> Any:
        floats = isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim > 1
        return value.to(dtype) if floats else value

    return tuple(cast(value) for value in inputs), {name: cast(value) for name, value in named.items()}


def count_compressed(teacher: torch.nn.Module, teacher_dtype: str | None) -> int:
    """How many of its weights [`hold_teacher`] compresses."""
    return sum(layer.weight.numel() for layer in _compressed_layers(teacher, teacher_dtype).values())


def count_bytes(teacher: torch.nn.Module, teacher_dtype: str | None, mixed_precision: str | None) -> int:
    """Bytes of a teacher's weights as [`hold_teacher`] holds them on the device.

    Args:
        teacher: It may be on the meta device.
        mixed_precision: "fp16", "bf16", "no" or `None`.
    """
    wide = DTYPES.get(teacher_dtype, dtype_of(mixed_precision)).itemsize
    compressed = count_compressed(teacher, teacher_dtype)
    total = sum(parameter.numel() for parameter in teacher.parameters())
    return round(wide * (total - compressed) + COMPRESSED.get(teacher_dtype, 0) * compressed)
