# Copyright 2026 The LIFT and PLACE distillation authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""How does a run end by a signal, and how do its data workers end, whatever ends it?"""

import atexit
import multiprocessing.util
import os
import signal
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from common.errors import first_line
from common.memory import fits_the_gpu, is_out_of_memory
from common.processes import TIMEOUT

import multiprocess
import multiprocess.context
import torch


SECOND_SIGNAL = 1.0  # seconds: launchers pass on a signal that the whole group has got, which is no second one


class Stopped(SystemExit):
    """A signal has ended what was going on. Where nothing catches it, it ends the process with the signal's code."""

    def __init__(self, received: signal.Signals):
        super().__init__(128 + received)
        self.reason = signal.Signals(received).name


class OutOfData(Stopped):
    """The data cannot be read on: the steps that are done can be saved, and the process ends with this message."""

    def __init__(self, message: str):
        SystemExit.__init__(self, message)
        self.reason = "the data cannot be read"


class StopSignals:
    """SIGTERM and Ctrl+C, which end a run where that loses nothing.

    Before the steps a signal ends the process at once, and later what is [`interruptible`]. Else it is noted, and
    [`check`] raises [`Stopped`] where the state can be saved. A second Ctrl+C ends the process at once, unsaved.

    Args:
        num_processes: Several of them leave together.
    """

    def __init__(self, num_processes: int):
        self.alone, self.process = num_processes == 1, os.getpid()
        self.group = self.world = None
        if not self.alone:
            self.group = torch.distributed.new_group(backend="gloo", timeout=TIMEOUT)
            # The threads of a group need Python's lock to end, and the group waits for them. Python's references to it
            # give up the lock for that; DDP's do not, and must not be the last: the process would never end.
            self.world = torch.distributed.group.WORLD
            atexit.register(self._let_groups_go)
        self.received: signal.Signals | None = None
        self.since, self.at_once, self.started = 0.0, True, False
        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, self._receive)

    def _receive(self, number: int, frame: Any) -> None:
        if os.getpid() != self.process:
            return  # just forked, see leave_signals_to_the_run
        second = self.received is not None and time.monotonic() > self.since + SECOND_SIGNAL
        if second and number == signal.SIGINT:
            for child in (*multiprocessing.active_children(), *multiprocess.active_children()):
                child.kill()
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif self.received is None:
            self.received, self.since = signal.Signals(number), time.monotonic()
            if not self.started:  # by os.write: what the signal came into may have been a print
                os.write(2, f"\n{self.received.name}: no step was done; the same command starts again\n".encode())
            if self.at_once:
                raise Stopped(self.received)

    def _let_groups_go(self) -> None:  # while Python still runs: threads that then wait for its lock are aborted
        self.group = self.world = None

    def agree(self, value: bool) -> bool:
        """What the main process says, on all processes. They must call this together."""
        if self.alone:
            return value
        flag = torch.tensor(value)
        torch.distributed.broadcast(flag, 0, group=self.group)
        return bool(flag)

    def let_steps_finish(self) -> None:
        """From here on a signal waits for [`check`]."""
        self.at_once, self.started = False, True

    def check(self) -> None:
        """Leave if a signal has come. Several processes must call this together: they leave if one of them has one."""
        if self.alone:
            number = self.received
        else:  # on the CPU, so that nothing waits for a device
            flag = torch.tensor(self.received or 0)
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX, group=self.group)
            number = flag.item()
        if number:
            raise Stopped(signal.Signals(number))

    def interruptible(self, work: Callable) -> Callable:
        """`work` as a function that a signal ends at once by [`Stopped`]. It must leave nothing half done."""

        def interrupted(*arguments: Any, **options: Any) -> Any:
            if self.received is not None:
                raise Stopped(self.received)
            before, self.at_once = self.at_once, True
            try:
                return work(*arguments, **options)
            finally:
                self.at_once = before

        return interrupted

    def leave_together(self, sample: Callable) -> Callable:
        """`sample`, a function of a model, as one that a signal ends at the model's next forward pass.

        All processes must call it, and the model in it equally often. One that is alone ends it at once.
        """
        if self.alone:
            return self.interruptible(sample)

        def checked(model: torch.nn.Module, *arguments: Any, **options: Any) -> Any:
            handle = model.register_forward_pre_hook(lambda *_: self.check(), prepend=True)
            try:
                return sample(model, *arguments, **options)
            finally:
                handle.remove()

        return checked

    def attempt(self, work: Callable, step: int) -> None:
        """Do `work`, part of which a signal may end. Where there are several processes, the run then goes on.

        One that does not fit the GPU ends the run before the first step, and where other processes wait for its part.
        """
        remedy = "pass fewer --validation_prompts, --validation_classes or --num_validation_images"
        try:
            with fits_the_gpu("the sample grid", remedy) if step == 0 or not self.alone else nullcontext():
                work(step=step)
        except Stopped:
            if self.alone:
                raise
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            print(f"step {step} has no sample grid, which does not fit the GPU: {first_line(error)}", flush=True)
        torch.cuda.empty_cache()  # a grid takes other sizes than a step


def leave_signals_to_the_run() -> None:
    """Ignore signals in a process that a run has forked, such as those of `datasets`: the run gets them, and ends it.

    One that died of them might hold a lock, or leave work undone for which the run would wait for ever.
    """
    for each in (signal.SIGTERM, signal.SIGINT):
        if getattr(signal.getsignal(each), "__func__", None) is StopSignals._receive:
            signal.signal(each, signal.SIG_IGN)


os.register_at_fork(after_in_child=leave_signals_to_the_run)
# `datasets` ends its processes by SIGTERM, which they now ignore, and which Python may lose in one that just started.
multiprocess.context.ForkProcess.terminate = multiprocess.context.ForkProcess.kill


def outlive_signals(worker: int) -> None:
    """Keep a data worker alive when a whole job gets a signal: the process it serves saves first, then ends it."""
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, signal.SIG_IGN)


@atexit.register
def end_workers() -> None:
    """End the data workers that are still there, whatever has ended the run.

    Later handlers run first: this one runs before that of multiprocessing, imported above, which would ask the workers
    to end by the very signal that they ignore, and wait for ever.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch takes a worker's end for an error
    # Else torch tells its workers to end, by a lock that a killed one may still hold: it would wait for ever.
    torch.utils.data._utils.python_exit_status = True
    workers = multiprocessing.active_children()
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.join()
