# Copyright 2026 The LIFT and PLACE distillation authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""What does the model card of a student say, so that another person can repeat the run?"""

import os
import platform
import re
import shlex
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from common.arguments import RunFacts
from common.changes import read_changes
from common.metrics import plot_curves, read_metrics

import torch
from accelerate.state import AcceleratorState
from huggingface_hub import (
    ModelCard,
    ModelCardData,
    get_hf_file_metadata,
    get_token,
    hf_hub_download,
    hf_hub_url,
    metadata_load,
    try_to_load_from_cache,
)
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id


CURVES = "loss", "task", "kd", "kd_mse", "feat", "coarse", "fine", "weight", "grad_norm"
LIBRARIES = ("torch", "diffusers", "accelerate", "transformers")
SECRET = re.compile(r"(TOKEN|KEY|SECRET|PASSWORD)$")  # names of variables


def write_model_card(
    output_dir: Path, kind: str, facts: list[str], run: RunFacts, usage: str, tags: list[str]
) -> None:
    """Write the curves and README.md: what the student is, how it was made, how to use it.

    Args:
        output_dir: With metrics.jsonl and samples.png.
        kind: The sentence's beginning, e.g. "An unconditional diffusion model".
        facts: What is known of teacher and student, a line each.
        run: What is known of the run.
        usage: Python code.
        tags: For the Hub, beside those that every student gets.
    """
    rows, state = read_metrics(output_dir / "metrics.jsonl"), AcceleratorState()
    curves = [key for key in CURVES if rows and key in rows[-1]]
    if curves:  # else metrics.jsonl was moved away from a finished run
        plot_curves({"student": rows}, curves, output_dir / "curves.png")
    text = "\n".join(
        [
            f"# {output_dir.resolve().name}",
            f"\n{kind}, made with LIFT and PLACE (arXiv 2605.19729).\n",
            *facts,
            *run.lines,
            *(f"- Other flags {line}." for line in read_changes(output_dir)),
            *describe_machine(state, training_hours(rows, run.images * state.num_processes)),
            "\n![Samples](samples.png)" + "\n\n![Curves](curves.png)" * bool(curves) + f"\n\n```python\n{usage}\n```",
            f"\nThe command:\n\n```\n{launch_command(state)}\n```",
        ]
    )
    text = without_secrets(text)
    if any(word.startswith("--push") for word in sys.argv):  # a reader on the Hub need not know these folders
        text = without_folders(text)
    tags = ["diffusers", *tags, "knowledge-distillation", "lift-place"]
    data = ModelCardData(library_name="diffusers", tags=tags, **describe_origin(run))
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n").save(output_dir / "README.md")


def describe_origin(run: RunFacts) -> dict[str, Any]:
    """The metadata of base model and licence: by the teacher's card, and `--license` before that."""
    if run.teacher is None:
        return {"license": run.license}
    theirs, on_hub = read_metadata(run.teacher, run.revision), not Path(run.teacher).exists()
    origin = {"base_model": run.teacher if on_hub else _as_repositories(theirs.get("base_model"))}
    if run.license is not None:
        return {**origin, "license": run.license}
    link = theirs.get("license_link")
    if link is not None and "://" not in str(link):  # a file beside the teacher's card
        link = f"https://huggingface.co/{run.teacher}/blob/{run.revision or 'main'}/{link}" if on_hub else None
    return {**origin, **{key: theirs.get(key) for key in ("license", "license_name")}, "license_link": link}


def _as_repositories(base: Any) -> list[str] | str | None:
    """The base models of a card that may be on the Hub, which refuses a card with others, such as local paths."""
    valid = [name for name in (base if isinstance(base, list) else [base]) if _may_be_repository(name)]
    return (valid or None) if isinstance(base, list) else next(iter(valid), None)


def _may_be_repository(name: Any) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return isinstance(name, str)


def read_metadata(model: str, revision: str | None) -> dict[str, Any]:
    """The metadata of a model's card, its folder's or the Hub's; none where there is no card, or the Hub is silent."""
    try:
        path = Path(model) / "README.md"
        if not Path(model).exists():
            path = try_to_load_from_cache(model, path.name, revision=revision)
        if not isinstance(path, (str, Path)):
            # Without a connection this fails at once. The download alone would try again for half a minute.
            get_hf_file_metadata(hf_hub_url(model, "README.md", revision=revision), timeout=5)
            path = hf_hub_download(model, "README.md", revision=revision)
        return metadata_load(path) or {}
    except Exception:  # of whichever library is behind the connection or the YAML; the student is worth more
        return {}


def describe_machine(state: AcceleratorState, hours: float) -> list[str]:
    """Hardware, precision, time and versions as lines of a model card."""
    device = state.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
    time = f"{hours:.3g} hours" if hours >= 1 else f"{60 * hours:.2g} minutes"
    versions = [f"Python {platform.python_version()}", *(f"{library} {version(library)}" for library in LIBRARIES)]
    return [
        f"- Hardware: {state.num_processes} × {name}, mixed precision {state.mixed_precision}; {time} of training, "
        "all parts of the run together.",
        f"- Versions: {', '.join(versions)}.",
    ]


def training_hours(rows: list[dict[str, float]], images: int) -> float:
    """Hours that the steps took, of all parts of a run, with the checkpoints and samples between them.

    Args:
        rows: Of metrics.jsonl.
        images: Of a step, in all processes.
    """
    before = [0, *(row["step"] for row in rows)]
    speeds = [row.get("images_per_second") for row in rows]
    return sum((row["step"] - last) * images / speed for row, last, speed in zip(rows, before, speeds) if speed) / 3600


def launch_command(state: AcceleratorState) -> str:
    """The command of this run, with what `accelerate launch` was told or read from its config."""
    count, precision, on_cpu = state.num_processes, state.mixed_precision, state.device.type == "cpu"
    command = f"accelerate launch --num_processes {count} --mixed_precision {precision}"
    if on_cpu and count > 1:  # which `accelerate launch` does not start
        command = f"ACCELERATE_USE_CPU=true ACCELERATE_MIXED_PRECISION={precision} torchrun --nproc_per_node {count}"
    elif on_cpu or count > 1:
        command += " --cpu" if on_cpu else " --multi_gpu"
    return f"{command} {shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])}"


def without_secrets(text: str) -> str:
    """The text without access tokens, and without the name of the home folder in front of paths."""
    tokens = [get_token(), *(value for name, value in os.environ.items() if SECRET.search(name))]
    for token in tokens:
        if token and len(token) >= 8:
            text = text.replace(token, "REMOVED")
    text = re.sub(r"\bhf_[A-Za-z0-9]{20,}", "REMOVED", text)
    home = os.path.expanduser("~").rstrip("/")
    return re.sub(rf"(?<=[\s`='\"]){re.escape(home)}/", "~/", text) if home else text


def without_folders(text: str) -> str:
    """The text with the last names alone of absolute paths, and of those in the home folder."""
    text = re.sub(r"(?<=['\"`])~?/[^'\"`\n]*/(?=[^'\"`/\n]+/?['\"`])", "", text)  # these may have spaces
    return re.sub(r"(?<=[\s`=])~?/[^\s`'\"]*/(?=[^\s`'\"/])", "", text)
