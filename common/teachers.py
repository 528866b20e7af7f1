# Copyright 2026 The LIFT and PLACE distillation authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""How are the parts of the teacher's pipeline loaded, and what does a run say where that fails?"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from common.arguments import fail, first_line

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ModelMixin
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from safetensors import SafetensorError


class TeacherSource(NamedTuple):
    """Where the teacher's pipeline is, and what it is expected to be."""

    path: str  # --pretrained_teacher_model: a folder or a Hub id
    revision: str | None  # --teacher_revision
    variant: str | None  # --variant
    expected: str  # the remedy where something else is there, e.g. "pass a DDPM pipeline"


def load_from(source: TeacherSource, load: Callable, **options: Any) -> Any:
    """`load(source.path, **options)`, a `from_pretrained` or `load_config`; its error says what is wrong."""
    path, folder = source.path, Path(source.path)
    if not folder.is_dir() and (folder.is_absolute() or path.startswith(".") or path.count("/") > 1):
        fail(f"--pretrained_teacher_model {path} is no folder; {source.expected}")
    try:
        return load(path, revision=source.revision, **options)
    except (OSError, ValueError, KeyError, AttributeError, TypeError, SafetensorError) as error:
        causes, cause = [error], error.__cause__ or error.__context__
        while cause is not None:
            causes.append(cause)
            cause = cause.__cause__ or cause.__context__
        if any(isinstance(cause, GatedRepoError) for cause in causes):
            remedy = f"accept its terms at https://huggingface.co/{path}, then log in with `hf auth login`"
            fail(f"--pretrained_teacher_model {path} is gated; {remedy}")
        if any(isinstance(cause, RepositoryNotFoundError) for cause in causes):
            fail(f"--pretrained_teacher_model {path} is not on the Hub, or private; {source.expected}")
        fail(f"--pretrained_teacher_model {path} does not load: {first_line(error)} Remedy: {source.expected}")


def check_parts(
    source: TeacherSource, required: dict[str, str | None], optional: dict[str, str] | None = None
) -> dict[str, str]:
    """The class names of a pipeline's parts; the run ends where one is missing or of another class.

    Args:
        required: The class of each part that must be there, `None` where any will do.
        optional: The class of each part that may be missing.
    """
    index = load_from(source, DiffusionPipeline.load_config)
    if not isinstance(index, dict):
        fail(f"--pretrained_teacher_model {source.path} has a model_index.json that lists no parts; {source.expected}")
    kinds = {name: part[1] for name, part in index.items() if isinstance(part, list) and part[1] is not None}
    present = {name: kind for name, kind in (optional or {}).items() if name in kinds}
    for name, kind in {**required, **present}.items():
        if name not in kinds or kind not in (None, kinds[name]):
            what = f"a {index.get('_class_name')} with {kinds.get(name, 'no')} {name}"
            fail(f"--pretrained_teacher_model {source.path} is {what}; {source.expected}")
    return kinds


def load_part(source: TeacherSource, kind: type, name: str) -> Any:
    """One part of the teacher's pipeline; models come in float32 on the CPU. See [`load_from`].

    Args:
        kind: The part's class, of Diffusers or Transformers.
        name: Its folder in the pipeline.
    """
    if not issubclass(kind, torch.nn.Module):
        return load_from(source, kind.from_pretrained, subfolder=name)
    options = {"subfolder": name, "variant": source.variant, "use_safetensors": True}
    return load_from(source, kind.from_pretrained, **options).float()


def load_skeleton(source: TeacherSource, kind: type, name: str) -> torch.nn.Module:
    """A Diffusers model of the teacher's pipeline without its weights, on the meta device."""
    config = load_from(source, kind.load_config, subfolder=name)
    with torch.device("meta"):
        return kind.from_config(config)


def load_frozen(
    source: TeacherSource, kind: type, name: str, device: torch.device, dtype: torch.dtype
) -> torch.nn.Module:
    """A part of the teacher's pipeline for forward passes only, on the device in the dtype.

    It is read in that dtype: in float32, the T5 of Stable Diffusion 3 would first take 19 GB of the CPU's memory.
    """
    options = {"subfolder": name, "variant": source.variant, "use_safetensors": True}
    options["torch_dtype" if issubclass(kind, ModelMixin) else "dtype"] = dtype
    return freeze(load_from(source, kind.from_pretrained, **options), device, dtype)


def freeze(model: torch.nn.Module, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
    """The model on the device in the dtype, ready for nothing but forward passes."""
    # Diffusers' own `to` warns of a dtype. In this order the device never holds float32.
    return torch.nn.Module.to(model.requires_grad_(False).eval(), dtype).to(device)


def vae_factor(vae: AutoencoderKL) -> int:
    """Pixels per latent, along each side."""
    return 2 ** (len(vae.config.block_out_channels) - 1)
