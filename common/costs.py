# Copyright 2026 The LIFT and PLACE distillation authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""What does a model cost: multiply-accumulates, activations, and the memory of a training step?"""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode


# What Diffusers recomputes as one piece under gradient checkpointing.
CHECKPOINTED = re.compile(r"(^|\.)(resnets|transformer_blocks)\.\d+$")


def profile_forward(model: torch.nn.Module, **inputs: torch.Tensor) -> tuple[int, int, int]:
    """What a forward pass costs, without computing anything.

    Args:
        model: A model on the meta device.
        inputs: Meta tensors for its forward.

    Returns:
        Multiply-accumulates; the bytes of activations kept for the backward pass; and the most bytes that one block
        keeps, which gradient checkpointing brings back for a while.
    """
    parameters = {id(parameter) for parameter in model.parameters()}
    kept: dict[int, tuple[torch.Tensor, int]] = {}
    before: dict[torch.nn.Module, int] = {}
    largest = 0

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        base = tensor if tensor._base is None else tensor._base
        if id(base) not in parameters:
            # Holding the tensor keeps its id from being given to another one.
            kept[id(base)] = (base, base.numel() * base.element_size())
        return tensor

    def size() -> int:
        return sum(size for _, size in kept.values())

    def enter(module: torch.nn.Module, inputs: Any) -> None:
        before[module] = size()

    def leave(module: torch.nn.Module, inputs: Any, outputs: Any) -> None:
        nonlocal largest
        largest = max(largest, size() - before[module])

    for name, module in model.named_modules():
        if CHECKPOINTED.search(name):
            module.register_forward_pre_hook(enter)
            module.register_forward_hook(leave)
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        FlopCounterMode(display=False) as flops,
    ):
        model(**inputs)
    return flops.get_total_flops() // 2, size(), largest


def estimate_activations(
    make: Callable[[], torch.nn.Module], checkpointing: bool, **inputs: torch.Tensor
) -> tuple[int, int, int]:
    """MACs, kept and recomputed bytes of a training step's forward pass on one image: see [`profile_forward`].

    Args:
        make: Builds the model on the meta device.
        checkpointing: Whether its blocks are recomputed.
        inputs: Meta tensors for its forward.
    """
    macs, kept, largest = profile_forward(make().train(), **inputs)
    if not checkpointing:
        return macs, kept, 0
    model = make().train()
    model.enable_gradient_checkpointing()
    return macs, profile_forward(model, **inputs)[1], largest


def print_memory_estimate(
    activations: tuple[int, int],
    student: int,
    teacher: int,
    batch_size: int,
    mixed_precision: str | None,
    use_8bit_adam: bool,
    use_ema: bool,
    trained: int | None = None,
    encoders: int = 0,
) -> None:
    """Print what a training step holds, by part, in MiB.

    Args:
        activations: Bytes that one image's forward pass keeps in float32: all those kept to the backward pass, and
            those of the block that gradient checkpointing recomputes, 0 without. See [`profile_forward`].
        student: Parameters of the student.
        teacher: Parameters of the teacher, 0 without one.
        batch_size: Images per device and micro-batch.
        mixed_precision: "fp16", "bf16", "no" or `None`.
        use_8bit_adam: Whether the optimizer keeps its moments in 8 bits.
        use_ema: Whether there is a moving average of the trained weights.
        trained: Parameters that learn, if not all of the student's; those that do not are held like the teacher's.
        encoders: Parameters of what encodes images and captions in every step.
    """
    half = mixed_precision in ("fp16", "bf16")
    width = 2 if half else 4
    trained = student if trained is None else trained
    kept, recomputed = (batch_size * size * width // 4 for size in activations)
    parts = {
        "trained weights (fp32)": 4 * trained,
        "their copies for autocast": 2 * trained if half else 0,
        "frozen weights of the student": width * (student - trained),
        "gradients (fp32)": 4 * trained,
        "optimizer moments": (2 if use_8bit_adam else 8) * trained,
        "averaged weights": 4 * trained if use_ema else 0,
        f"student activations, batch {batch_size}": kept,
        "the block being recomputed": recomputed,
        "teacher weights": width * teacher,
        "encoders' weights": width * encoders,
    }
    print("memory, estimated, without the teacher's working set and the CUDA context:")
    for name, size in [*parts.items(), ("sum", sum(parts.values()))]:
        if size:
            print(f"  {name:<40}{size / 2**20:>12,.1f} MiB")
