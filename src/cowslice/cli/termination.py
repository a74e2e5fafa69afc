"""Signals that end a command: the first one unwinds it, and those that follow wait until it has unwound.

What must hold: nothing but SIGQUIT and SIGKILL cuts short what a command does once it is to end, because then it brings
in order what it wrote. SIGINT and SIGHUP stay ignored where who started us wants that, as `nohup` and shells do.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PATIENCE = (b"cowslice: ending already, as soon as what was written is in order; SIGQUIT (Ctrl-\\) would end at once "
             b"and lose it\n")


class Terminated(KeyboardInterrupt):
    """A signal arrived: unwind. Code that knows Ctrl-C knows this."""


class Ending:
    """What signals have asked of one command. `number` is that of the first one, 0 as long as there was none."""

    def __init__(self) -> None:
        self.number = 0
        self._held = False
        self._told = False

    @property
    def status(self) -> int:
        """The exit status of a command that a signal ended."""
        return 128 + (self.number or signal.SIGINT)

    def hold(self) -> None:
        """Let no signal raise any more: the command ends of its own."""
        self._held = True

    def arrived(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal. Who swallowed the exception of an earlier one is given another."""
        self.number = self.number or number
        if not self._held and not _is_unwinding():
            raise Terminated
        if not self._told:
            self._told = True
            with suppress(OSError):  # not through sys.stderr, which may be in the middle of a word
                os.write(2, _PATIENCE)


@contextmanager
def ended_by_signals() -> Iterator[Ending]:
    """Raise Terminated from the block on the first of SIGNALS. Only the main thread can ask for it.

    Behind a block that was asked to end they are ignored: another one must not change the status of a process that has
    nothing left to do.
    """
    ending = Ending()
    if threading.current_thread() is not threading.main_thread():
        yield ending
        return
    before = {number: signal.signal(number, ending.arrived) for number in SIGNALS
              if number == signal.SIGTERM or signal.getsignal(number) is not signal.SIG_IGN}
    try:
        yield ending
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if ending.number else handler)


def _is_unwinding() -> bool:
    """Whether what runs now is run because of a Terminated: closes files, removes what is incomplete."""
    fault = sys.exc_info()[1]
    while fault is not None and not isinstance(fault, Terminated):
        fault = fault.__context__
    return fault is not None
