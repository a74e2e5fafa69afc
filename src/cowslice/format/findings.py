"""What is wrong, or worth saying, about a structure: one record per fact, gathered instead of raised.

It does not know the structures. A fatal finding turns into the ImageError that a strict decoder raises; text that came
from the image never reaches a message unescaped.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from cowslice.errors import CorruptImage, ImageError, MalformedImage, NotAnImage, UnsupportedImage
from cowslice.format.limits import MAX_QUOTED_TEXT


class Fault(Enum):
    """How bad a finding is. The first four stop an open; UNSAFE only forbids writing; the last two forbid nothing."""

    NOT_AN_IMAGE = "not an image"
    MALFORMED = "malformed"
    UNSUPPORTED = "unsupported"
    CORRUPT = "corrupt"
    UNSAFE = "unsafe to write"
    UNUSABLE = "unusable part"
    NOTE = "note"


@dataclass(frozen=True, slots=True)
class Finding:
    """One fact. `offset` is the field's place in the host file in bytes, or -1; `features` only for UNSUPPORTED."""

    fault: Fault
    message: str
    where: str = "header"
    field: str = ""
    offset: int = -1
    features: tuple[str, ...] = ()

    @property
    def fatal(self) -> bool:
        """Whether the image cannot be opened because of this."""
        return self.fault not in (Fault.UNSAFE, Fault.UNUSABLE, Fault.NOTE)

    @property
    def forbids_writing(self) -> bool:
        """Whether the image must not be changed because of this, except by a repair."""
        return self.fatal or self.fault is Fault.UNSAFE

    def error(self) -> ImageError:
        """The exception that says the same."""
        if self.fault is Fault.NOT_AN_IMAGE:
            return NotAnImage(self.message)
        if self.fault is Fault.UNSUPPORTED:
            return UnsupportedImage(self.message, features=self.features)
        if self.fault is Fault.CORRUPT:
            return CorruptImage(self.message, structure=self.where, offset=self.offset)
        return MalformedImage(self.message, where=self.where, field=self.field)


def raise_first(findings: Iterable[Finding]) -> None:
    """Raise the first fatal finding, if there is one."""
    for finding in findings:
        if finding.fatal:
            raise finding.error()


def escaped(raw: bytes) -> str:
    """Text from an image, made safe for a terminal and a log line: one line, printable, cut to MAX_QUOTED_TEXT."""
    text = raw[: MAX_QUOTED_TEXT * 4].decode("utf-8", "backslashreplace")
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
    return shown if len(shown) <= MAX_QUOTED_TEXT else shown[: MAX_QUOTED_TEXT - 3] + "..."


def overlaps(spans: Iterable[tuple[str, int, int]]) -> list[tuple[str, str, int]]:
    """Pairs of (name, offset, length) spans that share bytes, as (first, second, offset where the second starts).

    Spans of no length never overlap. Each span is compared with the one that reaches farthest before it.
    """
    found = []
    last_name, last_end = "", 0
    for name, offset, length in sorted((s for s in spans if s[2] > 0), key=lambda s: s[1]):
        if offset < last_end:
            found.append((last_name, name, offset))
        if offset + length > last_end:
            last_name, last_end = name, offset + length
    return found
