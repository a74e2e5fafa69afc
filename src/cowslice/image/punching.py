"""Which host clusters give their space back to the file system as soon as they are free, by what freed them.

It does not know how space is given back. What is not is used again for other clusters all the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Cause(Enum):
    """What took the last reference off a host cluster."""

    REQUEST = "a discard, or zeros whose space need not be kept"
    SNAPSHOT = "an operation on snapshots, or the emptying of an image after its overlay was committed"
    SHRINKING = "a smaller disk"
    OTHER = "anything else: what was written over, a table that moved"


@dataclass(frozen=True, slots=True)
class Punching:
    """The pass-discard options, with QEMU's meaning. A disk that shrinks always gives space back."""

    request: bool = True
    snapshot: bool = True
    other: bool = False

    def covers(self, cause: Cause) -> bool:
        """Whether space that this freed is given back."""
        return {Cause.REQUEST: self.request, Cause.SNAPSHOT: self.snapshot, Cause.OTHER: self.other}.get(cause, True)
