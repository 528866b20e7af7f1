# Copyright 2026 The LIFT and PLACE distillation authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""What does a command say where the GPU's memory or a disk is full?"""

import argparse
import errno
import functools
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from common.errors import fail, first_line
from common.memory import is_out_of_memory

from safetensors import SafetensorError
from tqdm import tqdm


MEMORY = (
    "--train_batch_size {train_batch_size} does not fit the GPU: {error}; lower it, or see --dry_run and what "
    "saves memory in docs/training.md"
)
DISK = (
    "--output_dir {output_dir} or --cache_dir {cache_dir}: {error} ({free:,} bytes are free in the first); make room, "
    "then add --resume_from_checkpoint latest; checkpoints are whole"
)


def end_in_one_line(
    main: Callable[[argparse.Namespace], None], memory: str = MEMORY, disk: str = DISK
) -> Callable[[argparse.Namespace], None]:
    """A command's `main`, which ends with one line where a disk or the GPU's memory is full.

    A full disk is what `OSError` or, from within safetensors, its text says: no space, no quota, or too large a file.

    Args:
        main: Takes the flags.
        memory: The line for a full GPU, with flags in braces, and {error}.
        disk: The line for a full disk; {free} are the bytes that `--output_dir` has left.
    """

    @functools.wraps(main)
    def run(flags: argparse.Namespace) -> None:
        try:
            main(flags)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            fail(memory.format(**vars(flags), error=first_line(error).rstrip(".")))
        except (OSError, SafetensorError) as error:
            full = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
            if getattr(error, "errno", None) not in full and not re.search(r"os error (28|122|27)\b", str(error)):
                raise
            folder = Path(getattr(flags, "output_dir", "."))
            free = shutil.disk_usage(folder if folder.exists() else ".").free
            fail(disk.format(**vars(flags), error=first_line(error), free=free))
        finally:
            for bar in list(tqdm._instances):  # else they would be drawn once more after the last line
                bar.close()

    return run
