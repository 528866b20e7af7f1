# Copyright 2026 The LIFT and PLACE distillation authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Can xformers compute a model's attention here?"""

import importlib.util

from common.errors import fail, first_line

import torch


def check_xformers() -> None:
    """End the run where xformers is missing, or its kernels, which are built for one version of torch, do not load."""
    flag = "--enable_xformers_memory_efficient_attention"
    if importlib.util.find_spec("xformers") is None:
        fail(f"{flag} needs xformers; pip install it as requirements.txt has it, or drop the flag")
    from xformers import _cpp_lib

    if _cpp_lib._cpp_library_load_exception is not None:
        why = f"xformers' kernels do not load beside torch {torch.__version__}"
        fail(f"{flag}: {why}; install the pair in requirements.txt, or drop the flag: attention is SDPA then")


def use_xformers(model: torch.nn.Module, mixed_precision: str) -> None:
    """Let a Diffusers model compute its attention by xformers, or end the run where it cannot."""
    remedy = "drop --enable_xformers_memory_efficient_attention: attention is SDPA then, which needs as little memory"
    if getattr(model.config, "qk_norm", None) is not None and mixed_precision != "no":
        # Normalised queries and keys come in float32 beside half-precision values, which xformers refuses.
        fail(f"--mixed_precision {mixed_precision} with xformers does not go with the model's qk_norm; {remedy}")
    try:
        model.enable_xformers_memory_efficient_attention()
    except Exception as error:  # of whatever kernel has tried it
        fail(f"xformers cannot compute this model's attention: {first_line(error)}; {remedy}")
