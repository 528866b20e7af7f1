# Copyright 2026 The LIFT and PLACE distillation authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Runs of the scripts in processes forked from one that has imported everything: a start takes no ten seconds."""

import atexit
import importlib
import multiprocessing
import os
import sys
import traceback
from multiprocessing import forkserver
from pathlib import Path


# What runs import, at their start and on their way. The server imports it once.
MODULES = (
    *(
        "train_lift_unet",
        "train_lift_sd21",
        "train_lift_dit",
        "train_lift_sd3",
        "train_lift_sdxl",
        "generate",
        "evaluate",
        "report",
    ),
    *("bitsandbytes", "datasets.packaged_modules.imagefolder.imagefolder", "multiprocess.pool"),
    *("matplotlib.figure", "matplotlib.backends.backend_agg"),
)


def make_fork_server(modules: tuple[str, ...] = MODULES) -> multiprocessing.context.ForkServerContext:
    """A context whose processes have imported the modules; the folders of these must be in `sys.path`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, *modules])
    # Until Python 3.13 the server does not take over sys.path, and passes over modules that it does not find.
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    try:
        forkserver.ensure_running()
    finally:
        del os.environ["PYTHONPATH"]
        if before is not None:
            os.environ["PYTHONPATH"] = before
    return context


def start_run(
    context: multiprocessing.context.BaseContext,
    script: str,
    arguments: list[str],
    output: Path,
    cwd: Path,
    environment: dict[str, str] | None = None,
) -> multiprocessing.process.BaseProcess:
    """Start `python script.py *arguments`; the process leads a group of its own, as a job's does.

    Args:
        context: Of [`make_fork_server`], or another one that starts with a new process.
        script: The module's name.
        arguments: The command line after it.
        output: A file for all that it prints.
        cwd: The folder it runs in.
        environment: Variables beside those that this process had when the server started.
    """
    arguments = [str(argument) for argument in arguments]
    process = context.Process(target=_run, args=(script, arguments, output, cwd, environment or {}))
    process.start()
    return process


def _run(script: str, arguments: list[str], output: Path, cwd: Path, environment: dict[str, str]) -> None:
    """What the interpreter does with a script, its end included: a process of multiprocessing ends in another way."""
    os.setsid()
    multiprocessing.set_start_method(None, force=True)  # the default again: data workers are not to be this server's
    os.environ.update(environment)
    os.chdir(cwd)
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.argv = [f"{script}.py", *arguments]
    code = 0
    try:
        module = importlib.import_module(script)
        module.main(module.parse_args(arguments))
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
