# Copyright 2026 The LIFT and PLACE distillation authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""How do captions become what a Stable Diffusion 3 transformer takes, by any of its three text encoders?"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from common.cache import JoinedDataset, identify
from common.errors import fail
from common.teachers import TeacherSource, load_from, load_frozen, load_part

import datasets
import torch
import torch.nn.functional as F
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)


class TextEncoder(NamedTuple):
    """The classes that make up a text encoder."""

    config: type[PretrainedConfig]
    model: type[PreTrainedModel]
    tokenizer: type[PreTrainedTokenizerBase]
    tokenizer_name: str  # the tokenizer's folder in the pipeline


class TextLayout(NamedTuple):
    """The sizes of a transformer's text inputs."""

    width: int  # of the embeddings: its config's `joint_attention_dim`
    t5_tokens: int  # --max_sequence_length

    @classmethod
    def of(cls, config: dict, t5_tokens: int) -> "TextLayout":
        """The layout of a transformer's config."""
        return cls(config["joint_attention_dim"], t5_tokens)


# By their folders in the pipeline. T5 may be absent.
CLIPS = ("text_encoder", "text_encoder_2")
T5 = "text_encoder_3"
TEXT_ENCODERS = {
    CLIPS[0]: TextEncoder(CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer, "tokenizer"),
    CLIPS[1]: TextEncoder(CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer, "tokenizer_2"),
    T5: TextEncoder(T5Config, T5EncoderModel, T5TokenizerFast, "tokenizer_3"),
}


def check_text_widths(source: TeacherSource, names: list[str], config: dict) -> None:
    """Refuse a transformer that does not take what its pipeline's text encoders give.

    Args:
        names: The text encoders in use.
        config: The transformer's.
    """
    width, pooled_width = config["joint_attention_dim"], config["pooled_projection_dim"]
    configs = {name: _load_config(source, name) for name in names}
    clips = [configs[name] for name in CLIPS]
    clip_width, clip_pooled = sum(clip.hidden_size for clip in clips), sum(clip.projection_dim for clip in clips)
    takes = f"--pretrained_teacher_model {source.path}: its transformer takes embeddings of {width}"
    if clip_pooled != pooled_width or clip_width > width:
        fail(
            f"{takes} and pooled ones of {pooled_width}; its CLIP encoders give {clip_width} and {clip_pooled}; "
            f"{source.expected}"
        )
    if T5 in configs and configs[T5].d_model != width:
        fail(f"{takes}, its T5 gives {configs[T5].d_model}; pass --no_t5")


def load_text_skeleton(source: TeacherSource, name: str) -> PreTrainedModel:
    """A text encoder on the meta device, from its config alone."""
    config = _load_config(source, name)
    with torch.device("meta"):
        return TEXT_ENCODERS[name].model(config)


def _check_folder(source: TeacherSource, name: str) -> None:
    """Refuse a pipeline on the disk without a part that its index lists: Transformers would take a default's place."""
    if Path(source.path).is_dir() and not (Path(source.path) / name).is_dir():
        fail(f"--pretrained_teacher_model {source.path} lacks its {name}; {source.expected}")


def _load_config(source: TeacherSource, name: str) -> PretrainedConfig:
    _check_folder(source, name)
    return load_from(source, TEXT_ENCODERS[name].config.from_pretrained, subfolder=name)


def load_tokenizer(source: TeacherSource, name: str, t5_tokens: int) -> PreTrainedTokenizerBase:
    """A text encoder's tokenizer, whose `model_max_length` is the number of tokens that the encoder gets.

    One whose files are missing loads all the same, without words.
    """
    part = TEXT_ENCODERS[name]
    _check_folder(source, part.tokenizer_name)
    tokenizer = load_part(source, part.tokenizer, part.tokenizer_name)
    if name == T5:
        tokenizer.model_max_length = t5_tokens
    elif tokenizer.model_max_length > 1_000_000:
        fail(f"--pretrained_teacher_model {source.path} lacks files of its {part.tokenizer_name}; {source.expected}")
    return tokenizer


def tokenize(tokenizers: dict[str, PreTrainedTokenizerBase], captions: list[str]) -> dict[str, torch.Tensor]:
    """Each text encoder's token ids, (B, its length), padded and cut."""
    return {
        name: tokenizer(
            captions, padding="max_length", truncation=True, max_length=tokenizer.model_max_length, return_tensors="pt"
        )["input_ids"]
        for name, tokenizer in tokenizers.items()
    }


class TextEncoders:
    """Frozen text encoders of a pipeline.

    Args:
        names: Which of them.
        device: Where they run.
        dtype: What they compute in. T5 overflows in float16: it gets bfloat16 then.
    """

    def __init__(self, source: TeacherSource, names: list[str], device: torch.device, dtype: torch.dtype):
        self.device, self.models = device, {}
        for name in names:
            safe = torch.bfloat16 if name == T5 and dtype == torch.float16 else dtype
            self.models[name] = load_frozen(source, TEXT_ENCODERS[name].model, name, device, safe)

    @torch.no_grad()
    def __call__(self, tokens: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Each encoder's embeddings, (B, L, W), and the CLIP encoders' pooled ones, (B, P), of token ids (B, L)."""
        encoded = {}
        for name, model in self.models.items():
            if name == T5:
                encoded[name] = model(tokens[name].to(self.device))[0]
            else:
                output = model(tokens[name].to(self.device), output_hidden_states=True)
                encoded |= {name: output.hidden_states[-2], f"{name}.pooled": output.text_embeds}
        return encoded


def cache_text(
    dataset: datasets.Dataset,
    prompts: list[str],
    contents: dict[str, str],
    tokenizers: dict[str, PreTrainedTokenizerBase],
    source: TeacherSource,
    cache: Callable,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[list[datasets.Dataset], dict[str, torch.Tensor]]:
    """What [`TextEncoders`] returns for the captions, a dataset per encoder, and for the prompts.

    The encoders run one after the other. Each has a cache of its own: another T5, or none, leaves the others as they
    are. Zeros are not stored.

    Args:
        contents: What identifies the dataset. Its captions are in the column `contents["caption"]`.
        cache: [`common.cache.cache_encodings`] with the settings of the run.
    """
    encoded, text = [], []
    for name, tokenizer in tokenizers.items():
        load_encoder = partial(TextEncoders, source, [name], device, dtype)
        key = identify(source.path, source.revision, [name, TEXT_ENCODERS[name].tokenizer_name])
        key |= {"part": name, "variant": source.variant, "dtype": str(dtype), "tokens": tokenizer.model_max_length}
        load_tokens = partial(_load_tokens, column=contents["caption"], tokenizers={name: tokenizer})
        encoded.append(cache(dataset.with_transform(load_tokens), load_encoder, key | contents))
        tokens = tokenize({name: tokenizer}, prompts)[name]
        text.append(cache([{name: ids} for ids in tokens], load_encoder, key | {"prompts": prompts}))
    rows = JoinedDataset(text)
    return encoded, torch.utils.data.default_collate([rows[index] for index in range(len(rows))])


def _load_tokens(
    batch: dict[str, list], column: str, tokenizers: dict[str, PreTrainedTokenizerBase]
) -> dict[str, list[torch.Tensor]]:
    return {name: list(tokens) for name, tokens in tokenize(tokenizers, batch[column]).items()}


def join_text(encoded: dict[str, torch.Tensor], layout: TextLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings (B, 77 + T, D) and pooled embeddings (B, P) in StableDiffusion3Pipeline's layout.

    The CLIP encoders' widths stand side by side, filled up to T5's; its tokens follow. Zeros stand for an absent T5.

    Args:
        encoded: What [`TextEncoders`] returns.
    """
    tokens = torch.cat([encoded[name] for name in CLIPS], dim=-1)
    pooled = torch.cat([encoded[f"{name}.pooled"] for name in CLIPS], dim=-1)
    tokens, t5 = F.pad(tokens, (0, layout.width - tokens.shape[-1])), encoded.get(T5)
    if t5 is None:
        t5 = tokens.new_zeros(len(tokens), layout.t5_tokens, layout.width)
    return torch.cat([tokens, t5.to(tokens.dtype)], dim=1), pooled
