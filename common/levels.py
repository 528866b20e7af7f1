# Copyright 2026 The LIFT and PLACE distillation authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Which of the teacher's tensors and features does a U-Net with fewer levels get, where its recipe does not say?"""

import re

from diffusers import ModelMixin


def keeps_widths(student: ModelMixin, teacher: ModelMixin) -> bool:
    """Whether the student's levels are as wide as the teacher's outer ones: else it can start from few weights."""
    widths = student.config.block_out_channels
    return [*widths] == [*teacher.config.block_out_channels][: len(widths)]


def pair_levels(student: ModelMixin, teacher: ModelMixin) -> dict[str, dict | list]:
    """The "blocks" and "features" of a student that has the teacher's outer levels alone.

    Down blocks are counted from the outside, up blocks from the inside: the student's first is not the teacher's.

    Args:
        student: It may be on the meta device, as the teacher.
        teacher: Of more levels.
    """
    inner = len(teacher.up_blocks) - len(student.up_blocks)

    def name_in_teacher(name: str) -> str:
        return re.sub(r"^up_blocks\.(\d+)", lambda match: f"up_blocks.{int(match[1]) + inner}", name)

    shapes = {name: tensor.shape for name, tensor in teacher.state_dict().items()}
    pairs = {name: (name_in_teacher(name), tensor.shape) for name, tensor in student.state_dict().items()}
    blocks = {name: theirs for name, (theirs, shape) in pairs.items() if shapes.get(theirs) == shape}
    # The student's last down block does not halve what the teacher's does.
    ours = [f"down_blocks.{level}" for level in range(len(student.down_blocks) - 1)]
    ours += [f"up_blocks.{level}" for level in range(len(student.up_blocks))]
    return {"blocks": blocks, "features": [[name, name_in_teacher(name)] for name in ours]}
