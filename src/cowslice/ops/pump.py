"""Run the same work on many chunks in a few threads, and stop soundly: on the first failure, and on Ctrl-C.

It does not know what a chunk is. Work runs outside the GIL where the callee lets it; with one worker no thread is made.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

Chunk = TypeVar("Chunk")


class Stopped(Exception):
    """Raised in a worker that waits for its turn after everything was called off."""


class Pump(Generic[Chunk]):
    """Hands chunks to workers in order. `make_work()` is called once in each worker and returns what does a chunk."""

    def __init__(
        self, chunks: Iterator[Chunk], make_work: Callable[[], Callable[[int, Chunk], None]], workers: int
    ) -> None:
        self._chunks = enumerate(chunks)
        self._make_work = make_work
        self._workers = workers
        self._lock = threading.Lock()
        self._turn = threading.Condition()
        self._next_turn = 0
        self._failure: BaseException | None = None
        self.stopped = False

    def run(self) -> None:
        """Do every chunk. Raises the first failure, after all workers have ended."""
        if self._workers <= 1:
            self._work()
        else:
            self._run_threads()
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """Call everything off: no further chunk begins."""
        self.stopped = True
        with self._turn:
            self._turn.notify_all()

    def wait_turn(self, number: int) -> None:
        """Return when every chunk before this one has called `end_turn`. Raises Stopped when that will never be."""
        with self._turn:
            while self._next_turn != number and not self.stopped:
                self._turn.wait()
        if self.stopped:
            raise Stopped

    def end_turn(self) -> None:
        """Let the next chunk have its turn."""
        with self._turn:
            self._next_turn += 1
            self._turn.notify_all()

    def _run_threads(self) -> None:
        threads = [threading.Thread(target=self._work, daemon=True) for _ in range(self._workers)]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join()
        except BaseException:  # Ctrl-C: what is under way may still finish, but no longer than it takes to be noticed
            self.stop()
            for thread in threads:
                thread.join(timeout=2)
            raise

    def _work(self) -> None:
        try:
            work = self._make_work()
            while (job := self._take()) is not None:
                work(*job)
        except Stopped:
            return
        except BaseException as failure:
            with self._lock:
                self._failure = self._failure or failure
            self.stop()

    def _take(self) -> tuple[int, Chunk] | None:
        with self._lock:
            return None if self.stopped else next(self._chunks, None)
