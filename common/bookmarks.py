# Copyright 2026 The LIFT and PLACE distillation authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Where in a stream does a run go on, without reading all that comes before?"""

import json
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple


# There is one after so many rows at the earliest: about as many are read in vain when a run goes on.
BOOKMARK_ROWS = 1000


class Bookmark(NamedTuple):
    """Where a block of a worker's rows, those of one buffer, begins."""

    row: int = 0  # how many rows the worker has yielded before it, in all passes
    number: int = 0  # of the pass
    block: int = 0  # of the pass
    state: dict | None = None  # of the stream, by its `state_dict`; `None` is the beginning of the pass


class Bookmarks:
    """A worker's bookmarks in a file, to which lines are only added. They are true of every run with that order.

    Args:
        path: The file. Lines that a kill has cut off do not count.
    """

    def __init__(self, path: Path):
        self.path, self.marks = path, []
        with suppress(FileNotFoundError):
            for line in path.read_text().splitlines():
                with suppress(ValueError, TypeError):
                    self.marks.append(Bookmark(*json.loads(line)))
        self.last = max((mark.row for mark in self.marks), default=-BOOKMARK_ROWS)

    def before(self, row: int) -> Bookmark:
        """The last one that is not after a row."""
        return max((mark for mark in self.marks if mark.row <= row), default=Bookmark(), key=lambda mark: mark.row)

    def add(self, mark: Bookmark) -> None:
        """Write one, unless the last is near or later. Where that fails a run loses nothing but time."""
        if mark.row >= self.last + BOOKMARK_ROWS:
            self.last = mark.row
            with suppress(OSError):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("a") as file:
                    file.write(json.dumps(mark) + "\n")


def forget_bookmarks(folder: Path, rank: int) -> None:
    """Remove what a process of an earlier run has left: that one may have had other data under the same names."""
    for path in folder.glob(f"rank-{rank}-*.jsonl"):
        path.unlink()
