# Copyright 2026 The LIFT and PLACE distillation authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""How is a finished student saved, and how does it get to the Hub?"""

from pathlib import Path

from common.ending import Stopped
from common.errors import fail, first_line

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import create_repo, upload_folder


def save_with_variant(pipeline: DiffusionPipeline, output_dir: Path, fp16_variant: bool) -> None:
    """Save a pipeline in float32, and where asked for its fp16 variant beside that; its models change in place."""
    models = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    for model in models:
        model.float()
    pipeline.save_pretrained(output_dir)
    if not fp16_variant:
        return
    configs = {path: path.read_bytes() for path in output_dir.glob("*/config.json")}
    for model in models:
        model.half()
    pipeline.save_pretrained(output_dir, variant="fp16")
    # Transformers notes the last dtype, and would load the float32 text encoders in it.
    for path, content in configs.items():
        path.write_bytes(content)


def create_hub_repo(repo_id: str | None, output_dir: Path, private: bool) -> str:
    """Create the repository unless it exists, before a run is spent on it; returns its full id.

    Args:
        repo_id: `--hub_model_id`; `None` for the output folder's name.
    """
    repo_id = repo_id or output_dir.resolve().name
    try:
        return create_repo(repo_id, private=private, exist_ok=True).repo_id
    except Exception as error:  # without a connection, an error of whichever HTTP library the client is built on
        remedy = "log in with `hf auth login`, or check --hub_model_id"
        fail(f"--push_to_hub cannot create {repo_id}: {first_line(error)}; {remedy}")


def push_to_hub(output_dir: Path, repo_id: str) -> None:
    """Upload the finished pipeline without checkpoints, logs and hidden files. The token is the one of the login."""
    ignored = ["checkpoint-*", ".*", "logs/*"]
    text = "End of training"
    try:
        upload_folder(repo_id=repo_id, folder_path=output_dir, commit_message=text, ignore_patterns=ignored)
    except Stopped as stopped:
        print(f"{stopped.received.name}: the student is saved, but not uploaded; --resume_from_checkpoint latest does")
        raise
    except Exception as error:
        remedy = "it is whole: add --resume_from_checkpoint latest"
        fail(f"--push_to_hub cannot upload {output_dir}: {first_line(error)}; {remedy}")
