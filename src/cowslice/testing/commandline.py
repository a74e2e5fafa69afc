"""Run the command line inside this process, and see what it said and how it ended.

It knows no verb. What needs a process of its own (signals, closed pipes, standard output as bytes) is not for it.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
from dataclasses import dataclass
from typing import Any

from cowslice.cli.main import run


@dataclass(frozen=True, slots=True)
class Said:
    """The end of one command: its status, its result and its complaints."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The result, parsed."""
        return json.loads(self.out)


def cowslice(*arguments: str | os.PathLike[str] | int) -> Said:
    """Run `cowslice ARGUMENTS`."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = run([str(argument) for argument in arguments])
    return Said(status, out.getvalue(), err.getvalue())
