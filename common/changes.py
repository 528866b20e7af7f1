# Copyright 2026 The LIFT and PLACE distillation authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""With which other flags did a run go on?"""

import json
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any


# Flags that say what a run learns from what, where a script has them. Those of the student are not among them: a
# checkpoint of another student is refused.
SHAPING = ("pretrained_teacher_model", "teacher_revision", "prediction_type")
SHAPING += ("dataset_name", "dataset_config_name", "train_data_dir", "max_train_samples", "resolution", "random_flip")
SHAPING += ("caption_dropout", "label_dropout", "antithetic_timesteps", "kd_loss", "task_loss", "snr_gamma")
SHAPING += ("group_size", "group_by", "coarse_norm", "kd_weighting", "reduction", "cache_teacher", "kd_alpha")
SHAPING += ("lambda_task", "lambda_kd_output", "lambda_kd_feat", "learning_rate", "seed")
SHAPING += ("train_batch_size", "gradient_accumulation_steps")


def keep_flags(output_dir: Path, flags: dict[str, Any], first_step: int) -> str | None:
    """Add the flags of a part of a run to flags.json where they are others; returns how they differ from those before.

    Args:
        output_dir: Of the run.
        flags: By name, without those that are `None`.
        first_step: Steps done before. Parts that began there or later, and were killed, are forgotten.
    """
    parts = [part for part in _read_parts(output_dir) if part["first_step"] < first_step]
    before, now = _describe(parts), {name: flags.get(name) for name in SHAPING}
    if not parts or any(parts[-1].get(name) != value for name, value in now.items()):
        parts.append({"first_step": first_step, **now})
    temporary = output_dir / ".flags.json"
    temporary.write_text(json.dumps(parts, indent=2) + "\n", encoding="utf-8")
    temporary.replace(output_dir / "flags.json")
    changes = _describe(parts)
    return changes[-1] if len(changes) > len(before) else None


def read_changes(output_dir: Path) -> list[str]:
    """What has changed between the parts of a run, a line each."""
    return _describe(_read_parts(output_dir))


def _read_parts(output_dir: Path) -> list[dict[str, Any]]:
    with suppress(OSError, ValueError, TypeError, KeyError):  # none of an earlier version; a damaged one says nothing
        parts = json.loads((output_dir / "flags.json").read_text(encoding="utf-8"))
        return sorted(parts, key=lambda part: part["first_step"])
    return []


def _describe(parts: list[dict[str, Any]]) -> list[str]:
    lines = []
    for before, after in pairwise(parts):
        changed = [name for name in SHAPING if before.get(name) != after.get(name)]
        values = ", ".join(f"--{name} {after.get(name)} (before: {before.get(name)})" for name in changed)
        if changed:
            lines.append(f"from step {after['first_step'] + 1} on {values}")
    return lines
