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
import shlex
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any


# Flags that leave what a run learns as it is, and those of the student: a checkpoint of another one is refused.
INCIDENTAL = {
    *("output_dir", "cache_dir", "num_train_epochs", "dry_run"),
    *("checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint", "discard_later_checkpoints"),
    *("logging_steps", "report_to", "push_to_hub", "hub_model_id", "hub_private_repo", "license"),
    *("validation_steps", "validation_prompts", "validation_classes", "num_validation_images"),
    *("num_inference_steps", "guidance_scale", "save_fp16_variant", "cache_latents", "encoding_batch_size"),
    *("dataloader_num_workers", "gradient_checkpointing", "enable_xformers_memory_efficient_attention", "compile"),
    *("fsdp", "offload_teacher", "allow_tf32"),
    *("student", "student_init", "keep_blocks", "student_depth", "lora_rank", "share_backbone"),
}


def keep_flags(output_dir: Path, flags: dict[str, Any], first_step: int) -> str | None:
    """Add the flags of a part of a run to flags.json where they are others; returns how they differ from those before.

    Args:
        output_dir: Of the run.
        flags: By name, JSON-serialisable, without those that are `None`.
        first_step: Steps done before. Parts that began there or later, and were killed, are forgotten.
    """
    parts = [part for part in _read_parts(output_dir) if part["first_step"] < first_step]
    now = {name: value for name, value in flags.items() if name not in INCIDENTAL}
    other = not parts or parts[-1]["flags"] != now
    if other:
        parts.append({"first_step": first_step, "flags": now})
    temporary = output_dir / ".flags.json"
    temporary.write_text(json.dumps(parts, indent=2) + "\n", encoding="utf-8")
    temporary.replace(output_dir / "flags.json")
    return _describe(*parts[-2:]) if other and len(parts) > 1 else None


def read_changes(output_dir: Path) -> list[str]:
    """What has changed between the parts of a run, a line each."""
    return [_describe(*pair) for pair in pairwise(_read_parts(output_dir))]


def _read_parts(output_dir: Path) -> list[dict[str, Any]]:
    with suppress(OSError, ValueError, TypeError, KeyError):  # none of an earlier version; a damaged one says nothing
        parts = json.loads((output_dir / "flags.json").read_text(encoding="utf-8"))
        return [{"first_step": int(part["first_step"]), "flags": dict(part["flags"])} for part in parts]
    return []


def _describe(before: dict[str, Any], after: dict[str, Any]) -> str:
    old, new = before["flags"], after["flags"]
    changed = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    values = (f"--{name} {_quote(new.get(name))} (before: {_quote(old.get(name))})" for name in changed)
    return f"from step {after['first_step'] + 1} on {', '.join(values)}"


def _quote(value: Any) -> str:
    return shlex.quote(str(value))
