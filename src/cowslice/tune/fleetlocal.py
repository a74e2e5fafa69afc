"""A fleet studied on all cores of this machine, each disk in one of a few processes.

It does not know what a study is. What must hold: a process that dies takes no more than its own disk with it, that disk
is tried again, and no process outlives the call, however that ends.
"""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from cowslice.errors import StorageError
from cowslice.tune.calibrate import Calibration
from cowslice.tune.fleetlist import Broken
from cowslice.tune.fleetstudy import Job, Studied, broken, study

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

ATTEMPTS = 3  # of a disk whose process died; a cluster of dask gives up as late
_READY = "ready"

Outcome = Studied | Broken
OnDone = Callable[[int], None]


class LocalCrew:
    """The cores of this machine."""

    def measure(self, function: Callable[[Sequence[str]], Calibration], names: Sequence[str]) -> Calibration:
        """Run it here."""
        return function(names)

    def run(self, jobs: Sequence[Job], on_done: OnDone) -> list[Outcome]:
        """Study all; outcomes stand in the order of the jobs. `on_done` is told how many are done.

        Raises StorageError where no process can be started.
        """
        return _Round(jobs, on_done).outcomes()


class _Round:
    def __init__(self, jobs: Sequence[Job], on_done: OnDone) -> None:
        self._jobs = jobs
        self._on_done = on_done
        self._done: dict[int, Outcome] = {}
        self._waiting = deque(range(len(jobs)))
        self._deaths = [0] * len(jobs)
        self._unborn = 0  # processes that died before they could do anything
        self._workers: list[_Worker] = []

    def outcomes(self) -> list[Outcome]:
        from multiprocessing.connection import wait

        try:
            for _ in range(min(len(self._jobs), len(os.sched_getaffinity(0)))):
                self._hire()
            while len(self._done) < len(self._jobs):
                ready = set(wait([worker.connection for worker in self._workers]))
                for worker in [worker for worker in self._workers if worker.connection in ready]:
                    self._hear(worker)
            return [self._done[number] for number in range(len(self._jobs))]
        finally:
            for worker in self._workers:
                worker.end()

    def _hear(self, worker: _Worker) -> None:
        """Take what a process says, and give it the next disk; or put another in the place of a dead one."""
        try:
            said = worker.connection.recv()
        except (EOFError, OSError):
            self._workers.remove(worker)
            self._bury(worker)
            if self._waiting:
                self._hire()
            return
        worker.ready = True
        if worker.number is not None:
            self._finish(worker.number, said)
        worker.number = self._waiting.popleft() if self._waiting else None
        if worker.number is not None:
            worker.give(self._jobs[worker.number])

    def _hire(self) -> None:
        with _undisturbed():
            self._workers.append(_Worker())

    def _bury(self, worker: _Worker) -> None:
        fate = worker.end()
        number = worker.number
        if number is None:
            self._unborn += not worker.ready
            if self._unborn >= ATTEMPTS:
                raise StorageError(f"cannot start a process to study disks in: it {fate}",
                                   hint="A script calls this below: if __name__ == '__main__'.")
            return
        self._deaths[number] += 1
        if self._deaths[number] < ATTEMPTS:
            self._waiting.append(number)
            return
        member = self._jobs[number].member
        self._finish(number, broken(member, StorageError(
            f"'{member.image}' could not be studied: {ATTEMPTS} processes ended at it, the last one {fate}",
            hint="There may be too little memory.")))

    def _finish(self, number: int, outcome: Outcome) -> None:
        self._done[number] = outcome
        self._on_done(len(self._done))


class _Worker:
    """One process, the number of the job that it has, and whether it could begin at all."""

    def __init__(self) -> None:
        import multiprocessing

        context = multiprocessing.get_context("spawn")  # a fork would inherit locks that other threads hold
        self.connection, theirs = context.Pipe()
        self.number: int | None = None
        self.ready = False
        self._process = context.Process(target=_work, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()

    def give(self, job: Job) -> None:
        with suppress(OSError):  # it is dead, which the next look at its connection tells
            self.connection.send(job)

    def end(self) -> str:
        """End the process, whatever it does, and say how it ended."""
        alive = self._process.is_alive()
        self.connection.close()
        if alive:
            self._process.kill()
        self._process.join()
        code = self._process.exitcode or 0
        return f"was ended by signal {-code}" if code < 0 else f"ended with status {code}"


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Keep Ctrl-C back until the block ends, and for ever from a process that starts in it: we are told, and end it.

    A process inherits which signals are blocked; here another thread may be given one, so that it is noted too.
    """
    came: list[int] = []
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    in_main = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGINT, lambda number, frame: came.append(number)) if in_main else None
    try:
        yield
    finally:
        if handler is not None:
            signal.signal(signal.SIGINT, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if came:
            signal.raise_signal(signal.SIGINT)


def _work(connection: Connection[Any, Any]) -> None:
    """What a process does: one disk after another, until nobody wants more."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    connection.send(_READY)
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        connection.send(study(job))


def _end_with_parent() -> None:
    """A study may take hours, and nobody wants it when whoever asked is gone."""
    from multiprocessing import parent_process
    from multiprocessing.connection import wait

    parent = parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
