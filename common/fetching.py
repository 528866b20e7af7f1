# Copyright 2026 The LIFT and PLACE distillation authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""How is a file fetched over a network that may be down for a while?"""

import time

from common.errors import fail, first_line

import fsspec


WAITS = (1, 5, 25, 125, 600)  # seconds between attempts: minutes without a network are no reason to end a run of days


def fetch(path: str, source: str) -> bytes:
    """The bytes of a file on another machine, or inside an archive.

    Args:
        path: As `fsspec` takes it, such as "hf://datasets/owner/name/a.jpg".
        source: The flag and value it came from, for messages.
    """
    for wait in (*WAITS, None):
        try:
            with fsspec.open(path, "rb") as file:
                return file.read()
        except Exception as error:
            if wait is None or isinstance(error, FileNotFoundError):
                # No row to skip: the next time it may be there, and the run would not be the same.
                remedy = "see that it is there; --resume_from_checkpoint latest then goes on"
                fail(f"{source}: {path} is out of reach: {first_line(error)}; {remedy}")
            time.sleep(wait)
