# Copyright 2026 The LIFT and PLACE distillation authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""How is a run saved so that a kill at any instant cannot damage it, and how does it go on?

A checkpoint is written into `.tmp-<step>`, completed by a manifest of sizes and SHA-256 sums, flushed to disk and only
then renamed to `checkpoint-<step>`. A kill at any instant leaves whole checkpoints and rubbish under dot names.
"""

import atexit
import errno
import hashlib
import json
import os
import re
import shutil
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from common.errors import fail, first_line

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file


try:
    import fcntl
except ModuleNotFoundError:
    fail("native Windows has no such file locks as the runs take on --output_dir; use WSL2")

# What a whole checkpoint has at least.
FILES = {"state.json", "optimizer.safetensors"}

NO_FOLDERS = {errno.EINVAL, errno.EBADF, errno.EOPNOTSUPP}  # what file systems answer that flush no folders
NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}  # what file systems without locks answer

# Output folders that this process locks, with whether it makes them; and the locks, open for as long as it holds them.
FOLDERS: list[tuple[Path, bool]] = []
LOCKS: list[TextIO] = []


def prepare_output(path: str, resume_from: str | None, is_main_process: bool) -> Path:
    """The output folder, which can be written to and no other run holds; rubbish of killed saves is removed.

    Args:
        path: `--output_dir`.
        resume_from: `--resume_from_checkpoint`, `None` for a new run.
        is_main_process: The one that may remove.
    """
    output_dir = Path(path)
    if is_main_process:
        lock_output(output_dir)
    checkpoints = list_checkpoints(output_dir)
    if resume_from is None and checkpoints:
        fail(f"--output_dir {output_dir} holds another run; add --resume_from_checkpoint latest, or pass a new folder")
    if (output_dir / "model_index.json").exists() and not checkpoints:
        fail(f"--output_dir {output_dir} holds a pipeline, without checkpoints to go on from; pass a new folder")
    if is_main_process:
        sweep(output_dir)
    return output_dir


def lock_output(output_dir: Path) -> None:
    """Make the folder, and keep other runs out of it for as long as this process lives.

    A record lock ends with the process, whatever ends it, and processes forked from it do not hold it.
    """
    path = output_dir / ".lock"
    FOLDERS.append((output_dir, not output_dir.exists()))  # before a signal can end this half done
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        lock = path.open("a+")
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        mine = path.exists() and os.path.samestat(os.fstat(lock.fileno()), path.stat())  # else its owner removed it
    except BlockingIOError:
        mine = False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            fail(f"--output_dir {output_dir} cannot be written to: {error.strerror}; pass another folder")
        print(f"--output_dir {output_dir} is on a file system without locks: start no second run there", flush=True)
        mine = True
    if not mine:
        holder = path.read_text().strip() if path.exists() else ""
        remedy = "wait until that ends, or pass another folder"
        fail(f"--output_dir {output_dir} is in use by {holder or 'another run'}; {remedy}")
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    lock.flush()
    LOCKS.append(lock)


@atexit.register
def unlock_output() -> None:
    """Remove this process's lock, and a folder that its run has made and put nothing into."""
    while LOCKS:
        LOCKS.pop().close()
    while FOLDERS:
        output_dir, new = FOLDERS.pop()
        with suppress(OSError), (output_dir / ".lock").open("r+") as lock:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # it may be another run's
            (output_dir / ".lock").unlink()
        with suppress(OSError):
            if new:
                output_dir.rmdir()


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Folders named `checkpoint-<step>`, oldest first."""
    folders = [path for path in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(folders, key=step_of)


def check_ended(output_dir: Path, subject: str) -> None:
    """End the process where a folder is that of a training without its result yet; the subject begins the line."""
    if not (output_dir / "model_index.json").is_file() and (checkpoints := list_checkpoints(output_dir)):
        remedy = f"let it end, or pass {checkpoints[-1]} to eval/generate.py, with --base"
        fail(f"{subject} is a run that has not ended, without a pipeline; {remedy}")


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def sweep(output_dir: Path) -> None:
    """Remove what killed saves and prunings left behind."""
    for path in [*output_dir.glob(".tmp-*"), *output_dir.glob(".del-*")]:
        shutil.rmtree(path, ignore_errors=True)


def save_checkpoint(
    output_dir: Path,
    step: int,
    tensors: dict[str, dict[str, torch.Tensor]],
    state: dict[str, Any],
    limit: int | None,
    texts: dict[str, str] | None = None,
) -> Path:
    """Write `checkpoint-<step>` so that a kill cannot corrupt it, then delete the oldest beyond `limit`.

    Checkpoints of later steps go too: they are damaged, or of a course that this run has left.

    Args:
        tensors: One safetensors file per entry, whose name may be in a folder.
        state: Everything else, JSON-serialisable.
        limit: How many checkpoints to keep; `None` keeps all.
        texts: More files, with what they hold.
    """
    folder, temporary = output_dir / f"checkpoint-{step}", output_dir / f".tmp-{step}"
    shutil.rmtree(temporary, ignore_errors=True)
    needed = sum(tensor.nbytes for group in tensors.values() for tensor in group.values())
    if limit is not None:
        make_room(output_dir, needed)
    try:
        temporary.mkdir(parents=True)
        for name, group in tensors.items():
            # Optimizers may share one tensor between entries, which safetensors refuses: copy each.
            copies = {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in group.items()}
            path = temporary / f"{name}.safetensors"
            path.parent.mkdir(exist_ok=True)
            save_file(copies, path, metadata={"format": "pt"})
        for name, text in {"state.json": json.dumps(state), **(texts or {})}.items():
            (temporary / name).write_text(text)
        files = sorted(path for path in temporary.rglob("*") if path.is_file())
        manifest = {
            path.relative_to(temporary).as_posix(): {"bytes": path.stat().st_size, "sha256": hash_file(path)}
            for path in files
        }
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=2))
        for path in [*temporary.rglob("*"), temporary]:
            flush(path)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        fail(
            f"--output_dir {output_dir} cannot take {folder.name}: {first_line(error)}; make room for {needed:,} "
            f"bytes ({shutil.disk_usage(output_dir).free:,} are free); earlier checkpoints are whole"
        )
    if folder.exists():
        folder.rename(output_dir / f".del-{step}")
    temporary.rename(folder)
    flush(output_dir)
    names = [path.name for path in list_checkpoints(output_dir)]
    newest = names.index(folder.name) + 1
    discard(output_dir, [*names[newest:], *(names[: max(0, newest - limit)] if limit is not None else [])])
    return folder


def discard(output_dir: Path, names: list[str]) -> None:
    """Remove checkpoints; a kill meanwhile leaves rubbish, but none that looks like a checkpoint."""
    for name in names:
        (output_dir / name).rename(output_dir / name.replace("checkpoint", ".del"))
    sweep(output_dir)


def make_room(output_dir: Path, needed: int) -> None:
    """Remove the oldest checkpoints, but never the newest, while fewer bytes are free than another one needs."""
    oldest = list_checkpoints(output_dir)[:-1]
    while oldest and shutil.disk_usage(output_dir).free < needed:
        path = oldest.pop(0)
        print(f"the disk is almost full: {path.name} makes room for the next checkpoint", flush=True)
        discard(output_dir, [path.name])


def load_checkpoint(folder: Path) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, Any]]:
    """Read what [`save_checkpoint`] wrote.

    Raises:
        ValueError: A file is missing, its size or SHA-256 sum is not the manifest's, or it is no safetensors file.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        for name, expected in manifest.items():
            path = folder / name
            if path.stat().st_size != expected["bytes"] or hash_file(path) != expected["sha256"]:
                raise ValueError(f"{path} is damaged")
    except (OSError, KeyError, TypeError, AttributeError) as error:  # the manifest may be what is damaged
        raise ValueError(f"{folder} is incomplete: {error}") from error
    if not manifest.keys() >= FILES:
        raise ValueError(f"{folder} is incomplete: its manifest lacks {', '.join(sorted(FILES - manifest.keys()))}")
    try:
        names = [name.removesuffix(".safetensors") for name in manifest if name.endswith(".safetensors")]
        tensors = {name: load_file(folder / f"{name}.safetensors") for name in names}
    except SafetensorError as error:  # something else was put there, with a manifest that fits
        raise ValueError(f"{folder} holds files that are no safetensors: {error}") from error
    return tensors, json.loads((folder / "state.json").read_text())


def find_checkpoint(output_dir: Path, resume_from: str, discard_later: bool = False) -> tuple[dict, dict] | None:
    """The contents of the checkpoint that `--resume_from_checkpoint` asks for; `None` where "latest" finds none.

    "latest" passes over damaged checkpoints, and says so; one that is named must be whole, and the newest.

    Args:
        discard_later: Whether there may be newer ones.
    """
    if resume_from != "latest":
        candidates = [path for path in (output_dir / resume_from, Path(resume_from)) if path.is_dir()][:1]
        if not candidates:
            fail(
                f'--resume_from_checkpoint {resume_from} is no folder in {output_dir}; pass "latest" or drop the flag'
            )
    else:
        candidates = reversed(list_checkpoints(output_dir))
    for folder in candidates:
        try:
            tensors, state = load_checkpoint(folder)
        except ValueError as error:
            if resume_from != "latest":
                fail(f'--resume_from_checkpoint {resume_from}: {error}; pass "latest" for the newest whole one')
            print(f"passing over {folder.name}: {error}", flush=True)
            continue
        later = [path.name for path in list_checkpoints(output_dir) if step_of(path) > state["step"]]
        if later and resume_from != "latest" and not discard_later:
            fail(
                f"--resume_from_checkpoint {resume_from} is older than {later[-1]}, which would be lost with the "
                "metrics since; pass latest, or --discard_later_checkpoints to lose them"
            )
        return tensors, state
    if list_checkpoints(output_dir):
        fail(
            f"--resume_from_checkpoint latest: no checkpoint in {output_dir} is whole; remove them to start anew, or "
            "pass another --output_dir"
        )
    return None


def hash_file(path: Path) -> str:
    """The SHA-256 sum of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


def flush(path: Path) -> None:
    """Wait until a file is on the disk, or a folder, where the file system can."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not path.is_dir() or error.errno not in NO_FOLDERS:
            raise
    finally:
        os.close(descriptor)
