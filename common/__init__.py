# Copyright 2026 The LIFT and PLACE distillation authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""What the training scripts share and is not the method: a question a file. The method is lift_utils.py."""

import logging
import os


# The CPU's threads wait for each other by spinning, here for microseconds, not milliseconds: where other jobs share
# the cores, a step took several times as long (docs/evidence.md). libgomp reads it with torch; a user's value stays.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

# On some CPUs bitsandbytes, which Diffusers imports, warns of a kernel that nothing here uses. To be heard in time,
# our own imports come before those of Diffusers: see pyproject.toml.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
