"""How results look in a terminal, in a pipe and as JSON.

It does not know any verb. Colour appears only on a terminal that wants it; nothing heavy is imported at start.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False  # typing and collections.abc take longer to import than a quick check takes
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import Any, TextIO

_CODES = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "cyan": "36"}


def wants_colour(stream: TextIO) -> bool:
    """Whether the stream is a terminal whose user did not switch colour off (NO_COLOR, TERM=dumb)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def paint(text: str, colour: str, stream: TextIO | None = None) -> str:
    """The text in that colour where the stream (default: standard output) wants it."""
    if not wants_colour(stream or sys.stdout):
        return text
    return f"\x1b[{_CODES[colour]}m{text}\x1b[0m"


def printable(text: str) -> str:
    """Text from outside on one line: control characters and broken Unicode cannot reach the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode("ascii") for c in text)


def say(text: str = "") -> None:
    """Print a line of a result."""
    sys.stdout.write(text + "\n")


def say_json(value: Any) -> None:
    """Print a result as JSON, indented as qemu-img does it. Any file name survives as it is in the file system."""
    import json

    text = json.dumps(value, indent=4)
    sys.stdout.write(text + "\n")


def complain(message: str, hint: str = "") -> None:
    """One sentence on standard error, and below it what to do."""
    more = f"  {printable(hint)}\n" if hint else ""
    _tell(f"{paint('cowslice:', 'red', sys.stderr)} {printable(message)}\n{more}")


def warn(message: str) -> None:
    """One sentence on standard error about something that does not stop the work."""
    _tell(f"{paint('cowslice: warning:', 'yellow', sys.stderr)} {printable(message)}\n")


def _tell(text: str) -> None:
    """Write to standard error. Where nobody reads that, the work and its status say what they would say anyway."""
    from contextlib import suppress

    with suppress(OSError):
        sys.stderr.write(text)


def write_whole(path: str, content: bytes, what: str) -> None:
    """Write a file whole or not at all: an old one stands until the new one is complete. Raises StorageError."""
    from contextlib import suppress

    from cowslice.errors import StorageError

    beside = f"{path}.{os.getpid()}.part"
    try:
        with open(beside, "xb") as file:
            file.write(content)
        os.replace(beside, path)
    except OSError as error:
        raise StorageError.of(error, f"write the {what}", path) from error
    finally:
        with suppress(OSError):
            os.unlink(beside)


def exact_size(size: int) -> str:
    """A size for people who may also need the number: '40 GiB (42949672960 bytes)'."""
    from cowslice.units import format_size

    return f"{format_size(size)} ({size} bytes)" if size >= 1024 else f"{size} bytes"


def say_fields(fields: Iterable[tuple[str, str]], indent: int = 0) -> None:
    """Print 'name: value' lines with the values in one column; a name without a value is a heading."""
    rows = list(fields)
    width = max((len(name) for name, value in rows if value), default=0) + 2
    for name, value in rows:
        if not value:
            say(" " * indent + paint(name, "bold"))
            continue
        say(" " * indent + paint((name + ":").ljust(width), "dim") + value)


def say_table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, right: str = "", indent: int = 0) -> None:
    """Print a table: one heading line, columns as wide as they need. `right` holds 'r' or 'l' for each column."""
    aligned = right.ljust(len(heads), "l")
    widths = [max(len(head), *(len(row[n]) for row in rows), 0) for n, head in enumerate(heads)]

    def line(cells: Sequence[str]) -> str:
        shown = (c.rjust(w) if a == "r" else c.ljust(w) for c, w, a in zip(cells, widths, aligned, strict=True))
        return (" " * indent + "  ".join(shown)).rstrip()

    say(paint(line(heads), "bold"))
    for row in rows:
        say(line(row))
