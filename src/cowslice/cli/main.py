"""The door of the command line: finds the verb, imports only what it needs, turns every fault into a status.

It does not know what a verb does. Nothing but a result goes to standard output, and no traceback is ever shown.
"""

from __future__ import annotations

import sys

from cowslice.cli import exitcodes

TYPE_CHECKING = False  # typing takes as long to import as a check of a sound image
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import TextIO


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and end the process."""
    _open_missing_streams()
    given = list(sys.argv[1:] if arguments is None else arguments)
    status = run(given)
    _give_up_complaints()
    sys.exit(status)


def run(arguments: list[str]) -> int:
    """Run one command and return its exit status. Output that nobody reads any more is no error worth a word."""
    try:
        status = _run(arguments)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return exitcodes.INTERRUPTED
    except BrokenPipeError:
        _silence_output()
        return exitcodes.BROKEN_PIPE
    except OSError as error:
        from cowslice.cli.output import complain

        complain(f"cannot write the result: {error.strerror or error}")
        _silence_output()
        return exitcodes.FAILED
    except Exception as error:
        return _our_fault(error)


def _run(arguments: list[str]) -> int:
    if arguments[:1] == ["check"]:
        from cowslice.cli import quickcheck

        status = quickcheck.run(arguments[1:])
        if status is not None:
            return status
    from cowslice.cli.verbs import run_verb

    return run_verb(arguments)


def _our_fault(error: Exception) -> int:
    """Nothing but errors of our own classes should arrive here: say so, and show where only to who asks."""
    import os

    from cowslice.cli.output import complain

    if os.environ.get("COWSLICE_TRACEBACK"):
        raise error
    complain(f"internal error: {type(error).__name__}: {error}",
             "Please report it, with what COWSLICE_TRACEBACK=1 shows in the environment.")
    return exitcodes.OUR_FAULT


def _open_missing_streams() -> None:
    """Let the first three descriptors lead nowhere where they were closed: else an image would get such a number, and
    what is said to a terminal would be written into it."""
    import os

    while (number := os.open(os.devnull, os.O_RDWR)) < 3:
        os.set_inheritable(number, True)
    os.close(number)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)


def _silence_output() -> None:
    """Standard output is gone: nothing may try to write to it again, not even the interpreter when it ends."""
    sys.stdout = _silenced(sys.stdout)


def _give_up_complaints() -> None:
    """What standard error did not take nobody will read: it must not become the status of the process."""
    try:
        sys.stderr.flush()
    except OSError:
        sys.stderr = _silenced(sys.stderr)


def _silenced(stream: TextIO) -> TextIO | None:
    import os

    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    except (OSError, ValueError):
        return None
    return stream


if __name__ == "__main__":
    main()
