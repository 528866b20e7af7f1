# Copyright 2026 The LIFT and PLACE distillation authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""What does a model cost: multiply-accumulates, activations, and the memory of a training step?"""

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from accelerate.utils import recursively_apply
from diffusers import ModelMixin
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel


# What Diffusers recomputes as one piece under gradient checkpointing.
CHECKPOINTED = re.compile(r"(^|\.)(resnets|transformer_blocks)\.\d+$")


# What the flags call the dtypes.
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def dtype_of(mixed_precision: str | None) -> torch.dtype:
    """What a run computes in, and what frozen models are kept in.

    Args:
        mixed_precision: "fp16", "bf16", "no" or `None`.
    """
    return DTYPES.get(mixed_precision, torch.float32)


def profile_forward(model: torch.nn.Module, dtype: torch.dtype = torch.float32, **inputs: Any) -> tuple[int, int, int]:
    """What a forward pass costs on a GPU, without computing anything and without one.

    Fake tensors stand for those on the GPU: they have a dtype and a size, follow CUDA's autocast rules, and hold
    nothing. Attention is the memory-efficient one, of which all of SDPA's fast kernels keep as much.

    Args:
        model: A model on the meta device, which stays as it is.
        dtype: Of autocast; float32 is without it.
        inputs: Meta tensors, or dictionaries of them, for its forward. Floating-point ones are in this dtype.

    Returns:
        Multiply-accumulates; the bytes kept for the backward pass, without the weights and their copies for autocast;
        and the most bytes that one block keeps, which gradient checkpointing brings back for a while.
    """
    model = copy.deepcopy(model)
    before: dict[torch.nn.Module, int] = {}
    largest = 0

    def enter(module: torch.nn.Module, inputs: Any) -> None:
        before[module] = kept.bytes()

    def leave(module: torch.nn.Module, inputs: Any, outputs: Any) -> None:
        nonlocal largest
        largest = max(largest, kept.bytes() - before[module])

    for name, module in model.named_modules():
        if CHECKPOINTED.search(name):
            module.register_forward_pre_hook(enter)
            module.register_forward_hook(leave)
    with _no_gpu(), FakeTensorMode():
        kept = _KeptStorages(_put_on_fake_gpu(model))
        inputs = recursively_apply(partial(_fake_input, dtype=dtype), inputs)
        with (
            FlopCounterMode(display=False) as flops,
            _cuda_autocast(dtype),
            _EfficientAttention(),
            kept,
            torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda tensor: tensor),
        ):
            model(**inputs)
    return flops.get_total_flops() // 2, kept.bytes(), largest


@contextmanager
def _no_gpu() -> Iterator[None]:
    """No GPU for fake tensors, which would otherwise take a real one's memory, where maybe a training has it all."""
    available, torch.cuda.is_available = torch.cuda.is_available, lambda: False
    try:
        yield
    finally:
        torch.cuda.is_available = available


def _fake_input(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    kind = dtype if tensor.is_floating_point() else tensor.dtype
    return torch.empty(tensor.shape, dtype=kind, device="cuda")


def _put_on_fake_gpu(model: torch.nn.Module) -> list[torch.Tensor]:
    """Fake tensors in the place of the model's own, which `Module.to` cannot put there; returns them."""
    weights = []
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")
                if isinstance(tensor, torch.nn.Parameter):
                    fake = torch.nn.Parameter(fake, tensor.requires_grad)
                tensors[name] = fake
                weights.append(fake)
    return weights


@contextmanager
def _cuda_autocast(dtype: torch.dtype) -> Iterator[None]:
    """CUDA's autocast, which `torch.autocast` leaves out where there is no GPU; nothing for float32."""
    if dtype == torch.float32:
        yield
        return
    enabled, before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", dtype)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        torch.set_autocast_enabled("cuda", enabled)
        torch.set_autocast_dtype("cuda", before)


class _EfficientAttention(TorchFunctionMode):
    """SDPA by its memory-efficient kernel: without a GPU to ask, SDPA would make the whole matrix of scores."""

    def __torch_function__(
        self, func: Callable, types: tuple[type, ...], values: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention or kwargs.get("attn_mask") is not None or len(values) != 3:
            return func(*values, **kwargs)
        if torch.is_autocast_enabled("cuda"):
            values = tuple(tensor.to(torch.get_autocast_dtype("cuda")) for tensor in values)
        options = kwargs.get("dropout_p", 0.0), kwargs.get("is_causal", False)
        attend = torch.ops.aten._scaled_dot_product_efficient_attention
        return attend(*values, None, True, *options, scale=kwargs.get("scale"))[0]


class _KeptStorages(TorchDispatchMode):
    """Counts what autograd keeps, each storage once, without the weights and what autocast makes of them.

    Args:
        weights: Parameters and buffers.
    """

    def __init__(self, weights: list[torch.Tensor]):
        super().__init__()
        # Holding the tensors keeps a storage's number from being given to another one.
        self.weights = {self.number(tensor): tensor for tensor in weights}
        self.kept: dict[int, torch.Tensor] = {}

    @staticmethod
    def number(tensor: torch.Tensor) -> int:
        return tensor.untyped_storage()._cdata

    def __torch_dispatch__(
        self, func: Callable, types: tuple[type, ...], values: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*values, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and self.number(values[0]) in self.weights:
            self.weights[self.number(output)] = output
        return output

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.number(tensor) not in self.weights:
            self.kept[self.number(tensor)] = tensor
        return tensor

    def bytes(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in self.kept.values())


def estimate_activations(
    make: Callable[[], torch.nn.Module],
    checkpointing: bool,
    batch_size: int,
    mixed_precision: str | None,
    **inputs: Any,
) -> tuple[int, int, int]:
    """MACs of a forward pass on one image, and what a batch's keeps and recomputes: see [`profile_forward`].

    Args:
        make: Builds the model on the meta device.
        checkpointing: Whether its blocks are recomputed.
        batch_size: Images per device and micro-batch.
        mixed_precision: "fp16", "bf16", "no" or `None`.
        inputs: Meta tensors for its forward on one image.
    """
    dtype = dtype_of(mixed_precision)
    inputs = recursively_apply(lambda tensor: tensor.expand(batch_size, *tensor.shape[1:]), inputs)
    macs, kept, largest = profile_forward(make().train(), dtype, **inputs)
    if not checkpointing:
        return macs // batch_size, kept, 0
    model = make().train()
    # The state of the random numbers is no fake tensor.
    recompute = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    model.enable_gradient_checkpointing(recompute)
    return macs // batch_size, profile_forward(model, dtype, **inputs)[1], largest


class Encoding(NamedTuple):
    """What it costs to encode images and captions, without gradients; see [`estimate_image_encoding`]."""

    weights: int = 0  # bytes of the encoders
    working_set: int = 0  # bytes beside them, while a batch of images is encoded
    macs: int = 0  # multiply-accumulates of an image and its caption

    @property
    def peak(self) -> int:
        """Bytes of weights and working set."""
        return self.weights + self.working_set


NO_ENCODING = Encoding()


def estimate_image_encoding(vae: ModelMixin, dtype: torch.dtype, resolution: int, batch_size: int) -> Encoding:
    """What encoding images costs: the weights of the whole VAE, and the work of its encoder.

    It holds most at the end of its first block, all of it as large as the images and as wide as the block: what the
    block was given and, if there was a layer before, its last layer; what that layer's convolutions give; the sum of
    these two; and the sum scaled. tests/test_costs.py counts them.

    Args:
        vae: In float32; its weights are not read.
        dtype: What it computes in.
        resolution: Of square images, in pixels.
        batch_size: Images at a time.
    """
    full_size = 3 + min(vae.config.layers_per_block, 2)
    elements = full_size * vae.config.block_out_channels[0] * batch_size * resolution**2
    image = torch.zeros(1, vae.config.in_channels, resolution, resolution, device="meta")
    macs, *_ = profile_forward(vae.encoder, sample=image)
    return Encoding(vae.num_parameters() * dtype.itemsize, elements * dtype.itemsize, macs)


def estimate_decoding(vae: ModelMixin, resolution: int) -> int:
    """Bytes of a VAE that decodes one image, as the sample grids do: its weights and its working set, in float32.

    It holds most in the first layer of its last block, all of it as large as the image: what that is given, as wide as
    the block before, and what normalisation and activation make of it; or what it is given and four tensors of its own
    width. tests/test_costs.py counts them.

    Args:
        vae: Its weights are not read.
        resolution: Of a square image, in pixels.
    """
    width, before = [*vae.config.block_out_channels, vae.config.block_out_channels[0]][:2]
    return 4 * (vae.num_parameters() + max(3 * before, before + 4 * width) * resolution**2)


def estimate_text_encoding(model: PreTrainedModel, dtype: torch.dtype, tokens: int) -> Encoding:
    """What a text encoder costs. Its working set does not count: it is small beside the weights.

    Args:
        model: On the meta device.
        dtype: What it computes in.
        tokens: Of a caption, with what fills it up.
    """
    macs, *_ = profile_forward(model, input_ids=torch.zeros(1, tokens, dtype=torch.long, device="meta"))
    return Encoding(model.num_parameters() * dtype.itemsize, 0, macs)


def together(*encodings: Encoding) -> Encoding:
    """What encoders cost that are in memory at once."""
    return Encoding(*map(sum, zip(*encodings)))
