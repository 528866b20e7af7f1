# Copyright 2026 The LIFT and PLACE distillation authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Do the processes of a launch know of each other, and how long does one wait for the others?"""

from datetime import timedelta

from common.errors import fail

import torch


# While one of them reads the data, draws samples, or writes a checkpoint.
TIMEOUT = timedelta(days=2)


def check_connected(num_processes: int) -> None:
    """End the process if others were launched with it that Accelerate does not count.

    Where there is no GPU it takes each for the only one, unless it is to use the CPU.

    Args:
        num_processes: As Accelerate counts them.
    """
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() != num_processes:
        count = torch.distributed.get_world_size()
        fail(f"{count} processes and no GPU: each would work alone; set ACCELERATE_USE_CPU=true, or see nvidia-smi")
