# Copyright 2026 The LIFT and PLACE distillation authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""What comes of a caption or a class in a webdataset shard that does not decode?

It counts as missing, so that another image takes its place. As `datasets` reads it, the stream would end there for
good.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

from datasets.packaged_modules.webdataset.webdataset import WebDataset


def or_missing(decode: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """The decoder, with `None` for what it raises at."""

    @wraps(decode)
    def decode_or_miss(content: bytes) -> Any:
        try:
            return decode(content)
        except Exception:  # decoders raise anything on damaged files
            return None

    return decode_or_miss


FORGIVING = {extension: or_missing(decode) for extension, decode in WebDataset.DECODERS.items()}


def forgive_damage() -> None:
    """Have this process read webdataset shards so; to be called in each that does."""
    WebDataset.DECODERS = FORGIVING
