# Copyright 2026 The LIFT and PLACE distillation authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""What does --student ask for, and does a model come of it?"""

import inspect
import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from common.errors import fail, first_line

import torch
from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match


WHOLE_BLOCK = re.compile(r"transformer_blocks\.\d+")
# What a JSON file may say of a student, by JSON Schema. Each script takes some of the keys.
KEYS = {
    "config": {"type": "object"},
    "blocks": {"type": "object", "minProperties": 1, "additionalProperties": {"type": "string"}},
    "features": {
        "type": "array",
        "items": {"type": "array", "items": {"type": "string"}, "minItems": 2, "maxItems": 2},
    },
    "width": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
    "levels": {"type": "integer", "minimum": 1},
}


def read_recipe(
    student: str, presets: dict[str, dict], keys: tuple[str, ...], otherwise: str = "or a .json file"
) -> dict[str, Any]:
    """The recipe that `--student` names: a preset's, or that of a JSON file.

    Args:
        keys: Those of [`KEYS`] that the JSON file may have.
        otherwise: What to pass where no preset will do.
    """
    if student in presets:
        return presets[student]
    if not student.endswith(".json"):
        fail(f"--student {student} is unknown; pass {', '.join(presets)}, {otherwise}")
    try:
        recipe = json.loads(Path(student).read_text(), parse_constant=_refuse_constant)
    except (OSError, ValueError, RecursionError) as error:
        fail(f"--student {student} cannot be read: {first_line(error)}; pass a JSON object")
    schema = {"type": "object", "properties": {key: KEYS[key] for key in keys}, "additionalProperties": False}
    error = best_match(Draft202012Validator(schema).iter_errors(recipe))
    if error is not None:
        where = "".join(f"[{part!r}]" for part in error.absolute_path).replace("'", '"') or "the file"
        known = " and ".join(", ".join(f'"{key}"' for key in keys).rsplit(", ", 1))
        fail(f"--student {student} is no recipe: {where}: {first_line(error)}; use {known} as the docs say")
    return recipe


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def override_config(kind: type, config: dict[str, Any], recipe: dict[str, Any]) -> dict[str, Any]:
    """The config of a model class with the recipe's overrides.

    Raises:
        ValueError: An override is none of the class's settings, which Diffusers would drop, leaves no layer, or gives
            widths beside a "width".
    """
    overrides = recipe.get("config", {})
    unknown = [key for key in overrides if key not in inspect.signature(kind.__init__).parameters]
    if unknown:
        raise ValueError(f"the config of a {kind.__name__} has no {', '.join(unknown)}")
    if "width" in recipe and "block_out_channels" in overrides:
        raise ValueError('both "width" and "block_out_channels" say how wide it is')
    if overrides.get("num_layers", 1) < 1:
        raise ValueError(f"num_layers is {overrides['num_layers']}")
    return config | overrides


@contextmanager
def model_errors_end(subject: str, remedy: str) -> Iterator[None]:
    """End the run with one line where a model cannot be built or run: wrong settings fail anywhere in its code.

    Args:
        subject: The line's beginning: the flag and its value, and what they do not fit.
        remedy: Its end.
    """
    try:
        yield
    except Exception as error:
        fail(f"{subject}: {first_line(error)}; {remedy}")


def pair_blocks(recipe: dict[str, Any], *depths: int) -> list[list[str]]:
    """The feature pairs of a recipe without any: each transformer block and the teacher's that it starts from.

    Args:
        recipe: Without "blocks" a block starts from the teacher's of the same number.
        depths: Numbers of blocks, of student and teacher.
    """
    same = [f"transformer_blocks.{index}" for index in range(min(depths))]
    pairs = recipe.get("blocks", dict(zip(same, same))).items()
    return [[*pair] for pair in pairs if all(map(WHOLE_BLOCK.fullmatch, pair))]


FEATURES_REMEDY = 'correct its "features", or pass --lambda_kd_feat 0'


def check_forward(model: torch.nn.Module, inputs: dict[str, torch.Tensor], subject: str) -> None:
    """End the run where the model, on the meta device, does not take its inputs. See [`model_errors_end`]."""
    with model_errors_end(f"{subject}: the model does not run", "correct its config"), torch.no_grad():
        model(**inputs)


def narrow_widths(widths: list[int], recipe: dict[str, Any], groups: int | None) -> tuple[list[int], int]:
    """Block widths reduced to the recipe's "width", rounded up to whole normalisation groups, and how many these are.

    Where rounding would make different widths equal, which takes the shortcut convolution out of a block, there are
    fewer groups, unless the recipe's "config" says how many.

    Args:
        groups: Of the teacher; not needed where the recipe says them.

    Raises:
        ValueError: Rounding gives the whole widths.
    """
    fraction, own = recipe["width"], recipe.get("config", {}).get("norm_num_groups")
    for number in [own] if own else [number for number in range(groups, 0, -1) if groups % number == 0]:
        narrow = [math.ceil(width * fraction / number) * number for width in widths]
        if len(set(narrow)) == len(set(widths)):
            break
    if fraction < 1 and narrow == list(widths):
        raise ValueError(f"its width {fraction:g} is rounded up to the whole {narrow}, in groups of {number} channels")
    return narrow, number
