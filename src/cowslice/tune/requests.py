"""What a guest asked for, as columns: the one form that every trace is brought into.

It does not know where requests come from. A chunk is bounded, so that a trace larger than memory streams.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

MOST_IN_CHUNK = 1 << 16  # 2 MiB of columns: large enough that a call per chunk costs nothing, small beside any cache


class Operation(IntEnum):
    """What one request does."""

    READ = 0
    WRITE = 1
    FLUSH = 2
    DISCARD = 3
    ZERO = 4


@dataclass(frozen=True, slots=True)
class Requests:
    """Equally long columns, one row for each request, in the order in which they came.

    `time` is seconds from the start of the trace (float64, NaN where nobody knows), `operation` an Operation (uint8),
    `offset` and `length` are bytes (uint64). A FLUSH has neither offset nor length: both are 0; others have a length.
    """

    time: NDArray[np.float64]
    operation: NDArray[np.uint8]
    offset: NDArray[np.uint64]
    length: NDArray[np.uint64]

    def __len__(self) -> int:
        return len(self.offset)

    def select(self, rows: NDArray[Any] | slice) -> Requests:
        """Return the chosen rows: a mask, indexes, or a slice (which copies nothing)."""
        return Requests(self.time[rows], self.operation[rows], self.offset[rows], self.length[rows])


def joined(chunks: Sequence[Requests]) -> Requests:
    """Return all rows as one chunk, in their order."""
    if len(chunks) == 1:
        return chunks[0]
    return Requests(
        np.concatenate([chunk.time for chunk in chunks], dtype=np.float64) if chunks else np.empty(0),
        np.concatenate([chunk.operation for chunk in chunks]) if chunks else np.empty(0, np.uint8),
        np.concatenate([chunk.offset for chunk in chunks]) if chunks else np.empty(0, np.uint64),
        np.concatenate([chunk.length for chunk in chunks]) if chunks else np.empty(0, np.uint64),
    )


def even_chunks(chunks: Iterable[Requests]) -> Iterator[Requests]:
    """Yield the same rows in chunks of exactly MOST_IN_CHUNK, the last one shorter; none is empty."""
    pending: list[Requests] = []
    have = 0
    for chunk in chunks:
        start = 0
        while have + len(chunk) - start >= MOST_IN_CHUNK:
            end = start + MOST_IN_CHUNK - have
            yield joined([*pending, chunk.select(slice(start, end))])
            pending, have, start = [], 0, end
        if start < len(chunk):
            pending.append(chunk.select(slice(start, None)))
            have += len(chunk) - start
    if pending:
        yield joined(pending)
