"""Threads of one connection: as many as its work needs, up to a number; and the bound on what is under way.

It does not know what the work is. Each connection has its own, so that a client whose work is slow, or who does not
take its answers, holds up nobody else.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue

Task = Callable[[], None]


class Workers:
    """Run tasks in up to `most` threads, hired when they are needed. A task must not raise; any thread hands it in."""

    def __init__(self, most: int, name: str) -> None:
        self._most = most
        self._name = name
        self._tasks: SimpleQueue[Task | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._undone = 0  # tasks that wait or are under way
        self._lock = threading.Lock()

    def submit(self, task: Task) -> None:
        """Have it done by a thread that is free, else by a new one, else by the first that is free again.

        Where the system has no thread for it, it is done before this returns.
        """
        with self._lock:
            self._undone += 1
            if self._undone > len(self._threads) and len(self._threads) < self._most:
                self._hire()
            alone = not self._threads
        if alone:
            self._do(task)
        else:
            self._tasks.put(task)

    def end(self) -> None:
        """Return when all that was handed in is done and every thread has gone."""
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads:
            thread.join()
        self._threads.clear()

    def _hire(self) -> None:
        thread = threading.Thread(target=self._work, name=f"{self._name}-{len(self._threads)}", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # the system has no more threads: those that are there will do
            return
        self._threads.append(thread)

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            self._do(task)
            del task  # it may hold a large payload

    def _do(self, task: Task) -> None:
        task()
        with self._lock:
            self._undone -= 1


class InFlight:
    """How much of one connection is under way: at most `requests`, and at most `most_bytes` unless it is one alone."""

    def __init__(self, requests: int, most_bytes: int) -> None:
        self._requests_left = requests
        self._bytes_left = most_bytes
        self._most = requests
        self._changed = threading.Condition()

    @property
    def empty(self) -> bool:
        """Whether nothing is under way."""
        return self._requests_left == self._most

    def enter(self, size: int) -> None:
        """Wait until a request of that many bytes has room."""
        with self._changed:
            self._changed.wait_for(lambda: self.empty or (self._requests_left > 0 and self._bytes_left >= size))
            self._requests_left -= 1
            self._bytes_left -= size

    def leave(self, size: int) -> None:
        """One is over."""
        with self._changed:
            self._requests_left += 1
            self._bytes_left += size
            self._changed.notify()
