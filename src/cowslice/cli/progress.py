"""Progress of a long verb on standard error: a bar on a terminal, one line now and then elsewhere.

It does not know what advances. rich is imported only here, and only for a terminal.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Advance = Callable[[int, int], None]
_SECONDS_BETWEEN_LINES = 5.0
_SECONDS_BETWEEN_DRAWINGS = 0.1


@contextmanager
def maybe_shown(doing: str, wanted: bool, *, unit: str = "bytes") -> Iterator[Advance | None]:
    """The callable that shows progress, or None when it is not wanted."""
    if not wanted:
        yield None
        return
    with shown(doing, unit) as advance:
        yield advance


@contextmanager
def shown(doing: str, unit: str = "bytes") -> Iterator[Advance]:
    """A callable `advance(done, total)` that any thread may call often; what it draws is gone when the block ends."""
    with _bar(doing, unit) if sys.stderr.isatty() else _lines(doing) as advance:
        yield advance


@contextmanager
def _lines(doing: str) -> Iterator[Advance]:
    last = time.monotonic()

    def advance(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < _SECONDS_BETWEEN_LINES and done < total:
            return
        last = now
        sys.stderr.write(f"{doing}: {done / total if total else 1:.1%}\n")

    yield advance


@contextmanager
def _bar(doing: str, unit: str) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    speeds = (DownloadColumn(binary_units=True), TransferSpeedColumn()) if unit == "bytes" else ()
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), *speeds, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(doing, total=None)
        last = 0.0

        def advance(done: int, total: int) -> None:
            nonlocal last
            now = time.monotonic()
            if now - last >= _SECONDS_BETWEEN_DRAWINGS or done == total:
                last = now
                progress.update(task, completed=done, total=total)

        yield advance
