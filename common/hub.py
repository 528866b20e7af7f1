# Copyright 2026 The LIFT and PLACE distillation authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""How is a finished student saved, and how does it get to the Hub?"""

import json
from pathlib import Path

from common.ending import Stopped, StopSignals
from common.errors import fail, first_line
from common.loading import list_parts

import torch
from diffusers import ConfigMixin, DiffusionPipeline
from huggingface_hub import auth_check, create_repo, model_info, upload_folder
from transformers import CLIPTokenizer, T5TokenizerFast


# What a run writes beside the folders of the pipeline's parts; the grids of its samples/ stay here.
SHOWN = ("README.md", "samples.png", "curves.png", "metrics.jsonl", "blocks.json", "influence.png")
# Where the weights of CLIP's models begin in these, and the name that Transformers 4 has after that.
INNER_MODELS = {
    "CLIPTextModel": ("", "text_model."),
    "StableDiffusionSafetyChecker": ("vision_model.", "vision_model."),
}


def save_with_variant(pipeline: DiffusionPipeline, output_dir: Path, fp16_variant: bool) -> None:
    """Save a pipeline in float32, and where asked for its fp16 variant beside that; its parts change in place."""
    for name in pipeline.components:
        for path in (output_dir / name).glob("*.fp16[.-]*"):
            path.unlink()  # it would be an earlier student's
    models = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    for model in models:
        model.float()
    for part in (pipeline, *pipeline.components.values()):
        if isinstance(part, ConfigMixin):  # else the path that it was loaded from, within the user's home, is saved
            part.register_to_config(_name_or_path="")
    _save(pipeline, output_dir)
    if not fp16_variant:
        return
    configs = {path: path.read_bytes() for path in output_dir.glob("*/config.json")}
    for model in models:
        model.half()
    _save(pipeline, output_dir, variant="fp16")
    # Transformers notes the last dtype, and would load the float32 text encoders in it.
    for path, content in configs.items():
        path.write_bytes(content)


def _save(pipeline: DiffusionPipeline, output_dir: Path, variant: str | None = None) -> None:
    pipeline.save_pretrained(output_dir, variant=variant)
    save_for_transformers_4(pipeline, output_dir, variant)
    finish_index(output_dir)


def save_for_transformers_4(pipeline: DiffusionPipeline, output_dir: Path, variant: str | None = None) -> None:
    """Write text encoders, tokenizers and safety checker of a saved pipeline so that Transformers 4 reads them, too.

    Transformers 5 reads both ways. From 5.6 on it saves models of CLIP by other names, unless they were read by these;
    4 would draw random weights for them. It saves CLIP's tokenizer without the files that the class of 4 reads, and
    T5's by a name that in 4 is that of another class.
    """
    for name, part in pipeline.components.items():
        folder, kind = output_dir / name, type(part).__name__
        if kind in INNER_MODELS:
            state = {_name_in_4(key, *INNER_MODELS[kind]): value for key, value in part.state_dict().items()}
            part.save_pretrained(folder, state_dict=state, variant=variant)
        elif isinstance(part, CLIPTokenizer):
            part.backend_tokenizer.model.save(str(folder))
        elif isinstance(part, T5TokenizerFast):
            path = folder / "tokenizer_config.json"
            config = json.loads(path.read_text()) | {"tokenizer_class": "T5TokenizerFast"}
            config["additional_special_tokens"] = config.pop("extra_special_tokens", [])
            path.write_text(json.dumps(config, indent=2) + "\n")


def _name_in_4(key: str, outer: str, inner: str) -> str:
    """The name of a weight in Transformers 4; see [`INNER_MODELS`]."""
    return f"{outer}{inner}{key.removeprefix(outer).removeprefix(inner)}" if key.startswith(outer) else key


def finish_index(output_dir: Path) -> None:
    """Correct the model_index.json of a saved pipeline: T5's tokenizer, and what of `lora/` no pipeline needs.

    Diffusers would download the adapter's own copy of the model with each pipeline: it has the name of weights.
    """
    path = output_dir / "model_index.json"
    index = json.loads(path.read_text().replace('"T5Tokenizer"', '"T5TokenizerFast"'))
    needless = sorted(str(file.relative_to(output_dir)) for file in output_dir.glob("lora/*/*.safetensors*"))
    index |= {"_ignore_files": needless} if needless else {}
    path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def create_hub_repo(repo_id: str | None, output_dir: Path, private: bool) -> str:
    """Create the repository unless it exists, before a run is spent on it; returns its full id.

    Args:
        repo_id: `--hub_model_id`; `None` for the output folder's name.
        private: Else it is what its owner's default is.
    """
    repo_id = repo_id or output_dir.resolve().name
    try:
        repo_id = create_repo(repo_id, private=private or None, exist_ok=True).repo_id
        auth_check(repo_id, write=True)  # one that exists may be another's
        public = private and not model_info(repo_id).private
    except Exception as error:  # without a connection, an error of whichever HTTP library the client is built on
        remedy = "log in with `hf auth login`, or check --hub_model_id"
        fail(f"--push_to_hub cannot create or write to {repo_id}: {first_line(error)}; {remedy}")
    if public:
        remedy = "make it private in its settings, or pass another --hub_model_id"
        fail(f"--hub_private_repo: {repo_id} is there already and is public; {remedy}")
    return repo_id


def push_to_hub(output_dir: Path, repo_id: str, stop: StopSignals) -> None:
    """Upload the finished pipeline, its card and what that shows. The token is the one of the login.

    Whatever else lies in the folder stays here: checkpoints, logs, a cache, the user's own files. Of another student
    the repository keeps no weights in the folders of a pipeline and its adapter, and all that is elsewhere.

    Raises:
        Stopped: A signal has come, now or while the student was saved.
    """
    index = json.loads((output_dir / "model_index.json").read_text())
    parts = list_parts(index)  # absent ones, too
    options = {"commit_message": "End of training", "ignore_patterns": [".*", "*/.*"]}
    options["allow_patterns"] = ["model_index.json", *SHOWN, *(f"{part}/*" for part in (*parts, "lora"))]
    options["delete_patterns"] = [f"{part}/*.safetensors*" for part in (*parts, "lora")]
    try:
        stop.interruptible(upload_folder)(repo_id=repo_id, folder_path=output_dir, **options)
    except Stopped as stopped:
        print(f"{stopped.reason}: the student is saved, but not uploaded; --resume_from_checkpoint latest does")
        raise
    except Exception as error:
        remedy = "it is whole: add --resume_from_checkpoint latest"
        why = " ".join(str(error).split())  # of a card that the Hub refuses, what is wrong comes after the first line
        fail(f"--push_to_hub cannot upload {output_dir}: {why}; {remedy}")
