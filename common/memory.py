# Copyright 2026 The LIFT and PLACE distillation authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Is the GPU's memory full, and what does a run say where something other than a step does not fit it?"""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from common.errors import fail, first_line

import torch


@contextmanager
def fits_the_gpu(subject: str, remedy: str) -> Iterator[None]:
    """End the run with one line where the GPU's memory runs out inside.

    Args:
        subject: What does not fit: a flag and its value.
        remedy: What to do.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        fail(f"{subject} does not fit the GPU: {first_line(error).rstrip('.')}; {remedy}")


def is_out_of_memory(error: Exception) -> bool:
    """Whether the GPU's memory is full. What CUDA, cuBLAS and cuDNN take by themselves is no `torch.OutOfMemoryError`.

    Of cuDNN the convolutions that find no room are passed over, until none is left.
    """
    own = r"CUDA error: (out of memory|CUBLAS_STATUS_ALLOC_FAILED)|(GET|FIND) was unable to find an engine"
    return isinstance(error, torch.OutOfMemoryError) or re.match(own, str(error)) is not None
