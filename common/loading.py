# Copyright 2026 The LIFT and PLACE distillation authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""How is a model read, from a folder or from the Hub, and what does it say where it cannot be?"""

import functools
import logging
import os
import pickle
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from common.errors import first_line

from huggingface_hub import list_repo_files
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import SafetensorError


logger = logging.getLogger(__name__)  # not Accelerate's, which says nothing before a run is set up: eval/ loads too

# What an OSError comes from where a file of weights is damaged or refused, and not just missing.
UNREADABLE = (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, LookupError, ValueError)


def explain(error: Exception, variant: str | None, expected: str) -> str:
    """What an error of `from_pretrained` says, and a remedy.

    Args:
        variant: `--variant`.
        expected: The remedy where something else is there.
    """
    if any(isinstance(cause, LocalEntryNotFoundError) for cause in causes_of(error)):
        return f"it is no folder, and the Hub cannot be reached. Remedy: check its name and the network; {expected}"
    other = variant is None and lacks_weights(error)
    hint = "pass --variant fp16 if its files have that in their names; else " * other
    return f"{first_line(error)} Remedy: {hint}{expected}"


def lacks_weights(error: Exception) -> bool:
    """Whether an error of `from_pretrained` says that there is no file of weights, in a folder or on the Hub."""
    return re.search(r"(no|a) file named \S*model\S*\.(safetensors|bin)", first_line(error)) is not None


def list_parts(index: dict[str, Any]) -> dict[str, str | None]:
    """The class of each part that a model_index.json names; `None` of those that are left out."""
    return {name: part[1] for name, part in index.items() if isinstance(part, list) and name[0] != "_"}


def causes_of(error: BaseException) -> list[BaseException]:
    """The error, and those that led to it."""
    causes, cause = [error], error.__cause__ or error.__context__
    while cause is not None:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    return causes


def read_weights(load: Callable, path: str, **options: Any) -> Any:
    """`load(path, **options)`, a `from_pretrained`, by safetensors files, or where there are none by `.bin` files.

    A warning names them in one line. Diffusers and Transformers read them by `torch.load(weights_only=True)`, which
    runs none of their code.

    Args:
        load: Of a Diffusers or Transformers model, or of a pipeline.

    Raises:
        OSError: `load` fails, for whatever reason.
    """
    name = f"{path}/{options['subfolder']}" if "subfolder" in options else path
    # By itself Transformers asks a service to convert such a repository, and waits for it.
    os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"
    missing = []
    with _no_complaints():
        # Diffusers takes None for a pipeline of both kinds, and its own `.bin` files in shards for False alone.
        for use_safetensors in (True, None, False):
            try:
                loaded = load(path, use_safetensors=use_safetensors, **options)
            except Exception as error:  # reading a damaged pickle may fail in any way
                causes = [cause for cause in causes_of(error) if not isinstance(cause, OSError)]
                if not isinstance(error, OSError) or any(isinstance(cause, UNREADABLE) for cause in causes):
                    raise OSError(_why_unreadable(name, error)) from error
                missing.append(error)
            else:
                if not use_safetensors:
                    _say_bin(name)
                return loaded
    raise missing[0]


def read_variant(load: Callable, path: str, variant: str | None, **options: Any) -> Any:
    """[`read_weights`] of a variant, or of the usual files where other models of the pipeline have it alone."""
    try:
        return read_weights(load, path, variant=variant, **options)
    except OSError as error:
        if variant is None or not lacks_weights(error) or not _has_variant(path, variant, options.get("revision")):
            raise
        with suppress(OSError):
            loaded = read_weights(load, path, **options)
            name = f"{path}/{options.get('subfolder', '')}"
            logger.warning(f"{name} has no {variant} variant: reading its usual weights")
            return loaded
        raise


def _has_variant(path: str, variant: str, revision: str | None) -> bool:
    """Whether some file of a folder or of a repository is of the variant; no, where the Hub cannot be asked."""
    try:
        folder = Path(path)
        local = (file.name for file in folder.rglob("*"))
        names = local if folder.is_dir() else list_repo_files(path, revision=revision)
        return any(re.search(rf"\.{re.escape(variant)}[.-]", name) for name in names)
    except Exception:  # of whichever HTTP library
        return False


@contextmanager
def _no_complaints() -> Iterator[None]:
    """Without what Diffusers logs of a model that has no safetensors files, as an error."""

    def is_other(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(("An error occurred while trying to fetch", "Defaulting to unsafe"))

    theirs = logging.getLogger("diffusers.models.modeling_utils")
    theirs.addFilter(is_other)
    try:
        yield
    finally:
        theirs.removeFilter(is_other)


@functools.cache  # a model may be loaded for every validation
def _say_bin(name: str) -> None:
    logger.warning(f"{name} has no safetensors weights: reading .bin files by torch.load(weights_only=True)")


def _why_unreadable(name: str, error: Exception) -> str:
    for cause in causes_of(error):
        if isinstance(cause, pickle.UnpicklingError):
            # Its first paragraph advises to load them all the same; the reason follows.
            paragraphs = [text.strip() for text in str(cause).split("\n\n") if text.strip()]
            reason = f": {paragraphs[1].splitlines()[0]}" if len(paragraphs) > 1 else ""
            what = f"the .bin files of {name} hold more than weights"
            return f"{what}, so torch.load(weights_only=True) refuses them{reason}"
    known = isinstance(error, (OSError, ValueError))  # whose message says what is wrong
    return first_line(error) if known else f"{name} cannot be read: {type(error).__name__}: {first_line(error)}"
