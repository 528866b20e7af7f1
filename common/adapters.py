# Copyright 2026 The LIFT and PLACE distillation authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""How does a student train LoRA adapters in place of its weights, and how is it saved?"""

import copy
from pathlib import Path

from common.errors import fail
from common.students import match_blocks

import torch
from diffusers import DiffusionPipeline
from diffusers.training_utils import cast_training_params


def check_adapted(
    rank: int, student: torch.nn.Module, teacher: torch.nn.Module, blocks: dict[str, str] | None, student_init: str
) -> None:
    """End the run where adapters would freeze weights that are random.

    Args:
        rank: Of the adapters.
        student: A skeleton.
        teacher: Its skeleton.
        blocks: See [`match_blocks`].
        student_init: "teacher" or "random".
    """
    taken = match_blocks(student, teacher.state_dict(), blocks) if student_init == "teacher" else {}
    fresh = [name for name in student.state_dict() if name not in taken]
    if fresh:
        random = f"{len(fresh)} of the student's tensors are random, {fresh[0]} among them"
        remedy = "pass --student_init teacher and a student of the teacher's layers, or drop it"
        fail(f"--lora_rank {rank} trains adapters alone, and {random}; {remedy}")


def add_adapters(model: torch.nn.Module, rank: int, target_modules: list[str], dtype: torch.dtype) -> None:
    """Freeze a Diffusers model in the dtype and give some of its layers LoRA adapters in float32, in place.

    Args:
        target_modules: Ends of the names of the layers.
    """
    from peft import LoraConfig

    torch.nn.Module.to(model.requires_grad_(False), dtype)  # Diffusers' own `to` warns of a dtype
    model.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=target_modules))
    cast_training_params(model, dtype=torch.float32)


def save_adapter(
    model: torch.nn.Module, folder: Path, part: str, pipeline: type[DiffusionPipeline]
) -> torch.nn.Module:
    """Save the LoRA adapter and the model it belongs to; returns that model with the adapter merged, on the CPU.

    Args:
        part: The model's name in the pipeline, "unet" or "transformer".
        pipeline: Its class, with LoRA loading.
    """
    from peft.utils import get_peft_model_state_dict

    model.to("cpu").float()  # in float32 it may not fit beside the teacher
    # In peft's own names: Diffusers' older ones cover the attention alone, and of a mixture it loads one part.
    pipeline.save_lora_weights(folder, **{f"{part}_lora_layers": get_peft_model_state_dict(model)})
    merged = copy.deepcopy(model)
    merged.fuse_lora()
    for each in (model, merged):
        each.unload_lora()
    model.save_pretrained(folder / part)
    return merged
