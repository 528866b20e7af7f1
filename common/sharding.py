# Copyright 2026 The LIFT and PLACE distillation authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""How are a model's weights spread over the processes, and how do they come together again?

By PyTorch's `fully_shard` (FSDP2), on CPUs and GPUs alike: each process keeps its share of every weight, and of what
the optimizer and the average hold for it. A block's weights come together for its forward and its backward pass.
"""

from typing import TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.optimizer import AcceleratedOptimizer
from diffusers import ModelMixin
from diffusers.training_utils import EMAModel
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from lift_utils import FeatureModel


Model = TypeVar("Model", bound=ModelMixin)

# What comes together at once: the blocks that these models consist of, and the rest of a model. A DiT calls the
# embeddings within its first block on their own.
BLOCKS = ("BasicTransformerBlock", "JointTransformerBlock", "ResnetBlock2D", "CombinedTimestepLabelEmbeddings")


def shard(model: FeatureModel, device: torch.device) -> None:
    """Spread a model over all processes, in place. What it trains starts as it is on the first of them.

    Args:
        model: With its weights on any device.
        device: Where the shares go.
    """
    mesh = init_device_mesh(device.type, (PartialState().num_processes,))
    for parameter in (parameter for parameter in model.parameters() if parameter.requires_grad):
        whole = parameter.data.to(device)
        torch.distributed.broadcast(whole, 0)
        parameter.data.copy_(whole)
    modules = [*model.model.modules()]
    blocks = [module for module in reversed(modules) if type(module).__name__ in BLOCKS]  # inner ones come first
    projections = [module for module in model.projections if [*module.parameters()]]
    # Samples are drawn by the model alone, so it is the root, not what captures its features. And it lets go of its
    # weights after each forward pass: when averaged ones take their place, it must not keep the old ones.
    for module in (*blocks, model.model, *projections):
        name = type(module).__name__
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
        type(module).__name__ = name  # which Diffusers writes into the config


def prepare(
    student: FeatureModel,
    optimizer: torch.optim.Optimizer,
    dataloader: torch.utils.data.DataLoader,
    accelerator: Accelerator,
) -> tuple[torch.nn.Module, AcceleratedOptimizer, torch.utils.data.DataLoader]:
    """What `Accelerator.prepare` does, but for DistributedDataParallel where the student is spread."""
    student = accelerator.prepare_model(student, evaluation_mode=is_sharded(student.model))
    return student, *accelerator.prepare(optimizer, dataloader)


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether [`shard`] has spread this model."""
    return isinstance(model, FSDPModule)


def gather(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Whole tensors of what is spread, on the CPU of the main process; the others get none. All must call this.

    Without sharding they are what they were.
    """
    whole = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()  # one at a time: together they may not fit the device
            tensor = tensor.cpu() if PartialState().is_main_process else None
        whole[name] = tensor
    return {name: tensor for name, tensor in whole.items() if tensor is not None}


def gather_model(model: Model, ema: EMAModel | None) -> Model:
    """A trained model, with its averaged weights if there are any. All processes must call this.

    One that is spread comes out as it would be without, on the CPU of the main process.
    """
    if ema is not None:
        ema.foreach = False  # PyTorch has no `_foreach_copy_` of weights that are spread
        ema.copy_to([parameter for parameter in model.parameters() if parameter.requires_grad])
    if not is_sharded(model):
        return model
    weights = gather(model.state_dict())
    if not PartialState().is_main_process:
        return model
    plain = type(model).__mro__[2].from_config(model.config)  # after FSDPModule comes the model's own class
    for name, config in getattr(model, "peft_config", {}).items():
        plain.add_adapter(config, name)
    plain.load_state_dict(weights)
    return plain


def spread_like(tensor: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """A whole tensor, which every process has, spread as the other one is."""
    if not isinstance(other, DTensor) or tensor.shape != other.shape:
        return tensor
    tensor = tensor.to(other.device)
    return distribute_tensor(tensor, other.device_mesh, other.placements, src_data_rank=None)


def clip_gradients(model: torch.nn.Module, max_norm: float, accelerator: Accelerator) -> torch.Tensor:
    """Clip the gradient of all weights together to a norm; returns the norm before, a scalar equal on all ranks."""
    norm = accelerator.clip_grad_norm_(model.parameters(), max_norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
