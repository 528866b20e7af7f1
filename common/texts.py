# Copyright 2026 The LIFT and PLACE distillation authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Which lines does a text file have?"""

from pathlib import Path


def read_lines(path: Path) -> list[str]:
    """The stripped lines of a text in UTF-8, empty ones among them; an end of line at its end begins no further one.

    Raises:
        OSError: It cannot be read.
        UnicodeDecodeError: It is not UTF-8.
    """
    text = path.read_text(encoding="utf-8-sig")  # Windows puts a mark at the beginning
    # Not by splitlines(), which also splits at separators that captions of the Web hold.
    return [line.strip() for line in text.removesuffix("\n").split("\n")]
