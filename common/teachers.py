# Copyright 2026 The LIFT and PLACE distillation authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""How are the parts of the teacher's pipeline loaded, and what does a run say where that fails?"""

import inspect
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from common.errors import fail, first_line
from common.finite import first_non_finite
from common.loading import causes_of, explain, list_parts, read_variant
from common.students import public_config

import diffusers
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DiffusionPipeline, ModelMixin, SchedulerMixin
from diffusers.training_utils import compute_snr
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError


# Schedulers of the noise that DDPM adds. EDM's is called compatible too, but has no betas.
DDPM_NOISE = {kind.__name__ for kind in DDPMScheduler().compatibles} - {"EDMEulerScheduler"}
PREDICTIONS = ("epsilon", "v_prediction", "sample")


class TeacherSource(NamedTuple):
    """Where the teacher's pipeline is, and what it is expected to be."""

    path: str  # --pretrained_teacher_model: a folder or a Hub id
    revision: str | None  # --teacher_revision
    variant: str | None  # --variant
    expected: str  # the remedy where something else is there, e.g. "pass a DDPM pipeline"
    converter: str | None = None  # the pipeline class of Diffusers that reads a single file, if one does


def load_from(source: TeacherSource, load: Callable, **options: Any) -> Any:
    """`load(source.path, **options)`, a `from_pretrained` or `load_config`; its error says what is wrong."""
    path, folder = source.path, Path(source.path)
    if folder.is_file():
        remedy = source.expected
        if source.converter is not None:
            convert = f"{source.converter}.from_single_file({path!r}).save_pretrained('teacher')"
            remedy = f"convert it once in Python, by diffusers.{convert}, then pass the folder teacher"
        fail(f"--pretrained_teacher_model {path} is a single file and no folder; {remedy}")
    if not folder.is_dir() and (folder.is_absolute() or path.startswith(".") or path.count("/") > 1):
        fail(f"--pretrained_teacher_model {path} is no folder; {source.expected}")
    try:
        return load(path, revision=source.revision, **options)
    except (OSError, ValueError, LookupError, AttributeError, TypeError, ZeroDivisionError, ImportError) as error:
        causes = causes_of(error)
        if any(isinstance(cause, GatedRepoError) for cause in causes):
            remedy = f"accept its terms at https://huggingface.co/{path}, then log in with `hf auth login`"
            fail(f"--pretrained_teacher_model {path} is gated; {remedy}")
        if any(isinstance(cause, RepositoryNotFoundError) for cause in causes):
            fail(f"--pretrained_teacher_model {path} is not on the Hub, or private; {source.expected}")
        fail(f"--pretrained_teacher_model {path} does not load: {explain(error, source.variant, source.expected)}")


def load_weights(source: TeacherSource, kind: type, **options: Any) -> Any:
    """The teacher's pipeline, or a model, of this class. See [`load_from`] and [`read_variant`]."""
    return load_from(source, partial(read_variant, kind.from_pretrained), variant=source.variant, **options)


def check_weights(model: torch.nn.Module, subject: str, wider: str = "--mixed_precision bf16 or no") -> None:
    """End the run where a model has weights that are infinite or NaN.

    Args:
        subject: The line's beginning: the flag, its value, and which model it is.
        wider: The flag, and those of its values, that would hold larger numbers than float16 does.
    """
    weights = model.state_dict()
    name = first_non_finite(weights)
    if name is None:
        return
    remedy = "pass a model whose weights are whole"
    if weights[name].dtype == torch.float16:
        remedy = f"pass {wider}, which hold larger numbers; if that does not help, {remedy}"
    fail(f"{subject} has weights that are not finite ({name} …); {remedy}")


def check_parts(
    source: TeacherSource, required: dict[str, str | None], optional: dict[str, str | None] | None = None
) -> dict[str, str]:
    """The class names of a pipeline's parts; the run ends where one is missing or of another class.

    Args:
        required: The class of each part that must be there, `None` where any will do.
        optional: The same of each part that may be missing.
    """
    index = load_from(source, DiffusionPipeline.load_config)
    if not isinstance(index, dict):
        fail(f"--pretrained_teacher_model {source.path} has a model_index.json that lists no parts; {source.expected}")
    kinds = {name: kind for name, kind in list_parts(index).items() if kind is not None}
    present = {name: kind for name, kind in (optional or {}).items() if name in kinds}
    for name, kind in {**required, **present}.items():
        if name not in kinds or kind not in (None, kinds[name]):
            what = f"a {index.get('_class_name')} with {kinds.get(name, 'no')} {name}"
            fail(f"--pretrained_teacher_model {source.path} is {what}; {source.expected}")
    return kinds


def find_sampler(source: TeacherSource, name: str | None) -> type[SchedulerMixin]:
    """The class of the pipeline's scheduler. One that is not Diffusers', or lacks a package, ends the run."""
    if not hasattr(diffusers, name or ""):
        fail(f"--pretrained_teacher_model {source.path} has an unknown scheduler, {name}; {source.expected}")
    kind = getattr(diffusers, name)
    try:
        hasattr(kind, "load_config")  # where a package is missing, Diffusers has a stand-in that says which
    except ImportError as error:
        fail(f"--pretrained_teacher_model {source.path}: {first_line(error)}; or {source.expected}")
    return kind


def load_part(source: TeacherSource, kind: type, name: str) -> Any:
    """One part of the teacher's pipeline; models come in float32 on the CPU. See [`load_from`].

    Args:
        kind: The part's class, of Diffusers or Transformers.
        name: Its folder in the pipeline.
    """
    if not issubclass(kind, torch.nn.Module):
        return load_from(source, kind.from_pretrained, subfolder=name)
    model = load_weights(source, kind, subfolder=name).float()
    check_weights(model, f"--pretrained_teacher_model {source.path}: its {name}")
    return model


def find_weights(source: TeacherSource, models: dict[str, type], known: Iterable[str]) -> None:
    """End the run at its beginning where weights are missing that it may read at its end alone.

    So it is of the encoders of what an earlier run has cached: their files are looked for, on the Hub they are
    downloaded; no weight is read. And of what training does without, such as a safety checker.

    Args:
        models: Of Transformers: the class of each by its folder in the pipeline.
        known: The parts of the pipeline that the script knows.
    """
    for name, kind in models.items():
        load_weights(source, kind, subfolder=name, device_map="meta")
    load_weights(source, DiffusionPipeline, **dict.fromkeys(known))


def load_skeleton(source: TeacherSource, kind: type, name: str) -> torch.nn.Module:
    """A Diffusers model of the teacher's pipeline without its weights, on the meta device."""

    def load(path: str, **options: Any) -> torch.nn.Module:
        with torch.device("meta"):
            return kind.from_config(kind.load_config(path, **options))

    model = load_from(source, load, subfolder=name)
    size = getattr(model.config, "sample_size", None)
    if not all(
        isinstance(side, int) and side > 0 for side in ([size] if not isinstance(size, (list, tuple)) else size)
    ):
        fail(f"--pretrained_teacher_model {source.path}: its {name} has sample_size {size!r}; {source.expected}")
    return model


def load_frozen(
    source: TeacherSource, kind: type, name: str, device: torch.device, dtype: torch.dtype
) -> torch.nn.Module:
    """A part of the teacher's pipeline for forward passes only, on the device in the dtype.

    It is read in that dtype: in float32, the T5 of Stable Diffusion 3 would first take 19 GB of the CPU's memory.
    """
    options = {"torch_dtype" if issubclass(kind, ModelMixin) else "dtype": dtype}
    model = freeze(load_weights(source, kind, subfolder=name, **options), device, dtype)
    check_weights(model, f"--pretrained_teacher_model {source.path}: its {name}")
    return model


def make_noise_schedule(source: TeacherSource, sampler: type, config: dict[str, Any]) -> DDPMScheduler:
    """The noise schedule that the teacher was trained with. One that adds noise otherwise than DDPM ends the run.

    Args:
        sampler: The class of the teacher's scheduler.
        config: Its settings, which may name another class.
    """
    kinds = sampler.__name__, config.get("_class_name", sampler.__name__)
    kind = next((kind for kind in kinds if kind not in DDPM_NOISE), kinds[0])
    predicts = config.get("prediction_type", "epsilon")
    others = {
        " with flow sigmas": config.get("use_flow_sigmas"),
        " with continuous timesteps": config.get("timestep_type") == "continuous",
        f" that predicts {predicts}": predicts not in PREDICTIONS,
        " of num_train_timesteps 0": config.get("num_train_timesteps", 1000) == 0,
    }
    other = "".join(text for text, holds in others.items() if holds)
    if kind not in DDPM_NOISE or other:
        fail(
            f"--pretrained_teacher_model {source.path} has a {kind}{other}, which is not DDPM's noise; "
            f"{source.expected}, with a scheduler of {', '.join(PREDICTIONS[:-1])} or {PREDICTIONS[-1]} such as DDPM's"
        )
    own = inspect.signature(sampler.__init__).parameters  # a config may leave out what is the default of its class
    defaults = {key: own[key].default for key in ("beta_start", "beta_end", "beta_schedule") if key in own}
    try:
        schedule = DDPMScheduler.from_config(defaults | public_config(config))
        DDIMScheduler.from_config(schedule.config)  # by which pixel models are drawn: it knows fewer schedules
        return schedule
    except (ValueError, TypeError, AttributeError, NotImplementedError) as error:
        fail(f"--pretrained_teacher_model {source.path}: its {kind}: {first_line(error)}; {source.expected}")


def min_snr_weights(scheduler: DDPMScheduler, gamma: float | None, device: torch.device) -> torch.Tensor | None:
    """Weights of the timesteps, (T,), on the device: min-SNR-γ (Hang et al., ICCV 2023) for what is predicted.

    Args:
        gamma: γ, the signal-to-noise ratio from which on a timestep weighs no more; `None` is without weights.
    """
    if gamma is None:
        return None
    snr = compute_snr(scheduler, torch.arange(scheduler.config.num_train_timesteps))
    clipped = snr.clamp(max=gamma)
    weights = {
        "epsilon": torch.where(snr > 0, clipped / snr, 1.0),  # in the limit of no signal
        "v_prediction": clipped / (snr + 1),
        "sample": clipped,
    }
    return weights[scheduler.config.prediction_type].to(device)


def load_noise_schedule(source: TeacherSource, sampler: type) -> DDPMScheduler:
    """[`make_noise_schedule`] by the pipeline's folder "scheduler"."""
    return make_noise_schedule(source, sampler, load_from(source, sampler.load_config, subfolder="scheduler"))


def freeze(model: torch.nn.Module, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
    """The model on the device in the dtype, ready for nothing but forward passes."""
    # Diffusers' own `to` warns of a dtype. In this order the device never holds float32.
    return torch.nn.Module.to(model.requires_grad_(False).eval(), dtype).to(device)


def vae_factor(vae: ModelMixin) -> int:
    """Pixels per latent, along each side."""
    return 2 ** (len(vae.config.block_out_channels) - 1)
