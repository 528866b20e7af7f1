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

from typing import NamedTuple, TypeVar

from common.errors import fail

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


def _find_blocks(model: torch.nn.Module) -> list[torch.nn.Module]:
    """What comes together on its own, inner blocks before the ones around them."""
    return [module for module in reversed([*model.modules()]) if type(module).__name__ in BLOCKS]


def shard(model: FeatureModel, device: torch.device) -> None:
    """Spread a model over all processes, in place. What it trains starts as it is on the first of them.

    The run ends where it has none of the [`BLOCKS`].

    Args:
        model: With its weights on any device.
        device: Where the shares go.
    """
    blocks = _find_blocks(model.model)
    if not blocks:  # all of its weights would come together at once, as without the flag
        remedy = "add the class of its blocks to BLOCKS in common/sharding.py, or drop the flag"
        fail(f"--fsdp knows no block of a {type(model.model).__name__}; {remedy}")
    mesh = init_device_mesh(device.type, (PartialState().num_processes,))
    for parameter in (parameter for parameter in model.parameters() if parameter.requires_grad):
        whole = parameter.data.to(device)
        torch.distributed.broadcast(whole, 0)
        parameter.data.copy_(whole)
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


class Whole(NamedTuple):
    """Bytes on each process of what is whole for a while, of models that [`shard`] spreads: the most at once."""

    weights: int  # of the student, in its passes
    gradients: int  # of the student, in its backward pass
    teacher: int  # weights, in its forward pass


def count_whole(student: torch.nn.Module, teacher: torch.nn.Module | None, teacher_bytes: int) -> Whole:
    """What is whole at once of two models on the meta device, which are not spread yet.

    Weights arrive in a buffer and are copied out of it. The rest of a model does so first, and is then whole for all
    of a pass, beside two blocks' weights: forward, a block's buffer stays until the next one's is there; backward, the
    buffer of the block to come fills while this one computes. A block's gradients wait in a buffer until they are
    spread, which is while those of the next one are computed: two blocks' again.

    Args:
        student: In the dtypes that it trains with.
        teacher: In any dtype, or `None`.
        teacher_bytes: Of its weights as they are held, 0 without one on the device.
    """
    (rest, rest_gradients), (block, block_gradients) = _count_units(student)
    weights, gradients = rest + max(rest, 2 * block), rest_gradients + 2 * block_gradients
    if not teacher_bytes:
        return Whole(weights, gradients, 0)
    (rest, _), (block, _) = _count_units(teacher)
    share = (rest + max(rest, 2 * block)) / sum(parameter.nbytes for parameter in teacher.parameters())
    return Whole(weights, gradients, round(share * teacher_bytes))


def _count_units(model: torch.nn.Module) -> tuple[tuple[int, int], tuple[int, int]]:
    """Bytes of weights and of gradients: of a model without its blocks, and of its largest block."""
    counted: set[torch.nn.Parameter] = set()
    units = []
    for module in (*_find_blocks(model), model):
        unit = [parameter for parameter in module.parameters() if parameter not in counted]
        counted.update(unit)
        trained = sum(parameter.nbytes for parameter in unit if parameter.requires_grad)
        units.append((sum(parameter.nbytes for parameter in unit), trained))
    *blocks, rest = units
    return rest, max(blocks, default=(0, 0))
