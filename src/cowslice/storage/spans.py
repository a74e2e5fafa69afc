"""Spans of a storage, and how many small reads become few large ones.

Pure arithmetic: it does not know what a storage is.
A merged read covers every span it was made from, and none is larger than `most` unless one span alone is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Span:
    """`length` bytes from `offset` that are all data, or all a hole that reads as zeros without being stored."""

    offset: int
    length: int
    data: bool

    @property
    def end(self) -> int:
        return self.offset + self.length


@dataclass(frozen=True, slots=True)
class MergedRead:
    """One read of `length` bytes at `offset` that serves the spans numbered `members`."""

    offset: int
    length: int
    members: tuple[int, ...]


def plan_merged_reads(spans: Sequence[tuple[int, int]], *, gap: int, most: int) -> list[MergedRead]:
    """Plan reads that serve all (offset, length) spans, reading through gaps of up to `gap` bytes.

    Ascending by offset. Spans may overlap and come in any order; empty ones belong to no read.
    """
    order = sorted((n for n, span in enumerate(spans) if span[1] > 0), key=lambda n: spans[n])
    merged: list[MergedRead] = []
    members: list[int] = []
    start = end = 0
    for n in order:
        offset, length = spans[n]
        if members and (offset > end + gap or max(end, offset + length) - start > most):
            merged.append(MergedRead(start, end - start, tuple(members)))
            members = []
        if not members:
            start = end = offset
        members.append(n)
        end = max(end, offset + length)
    if members:
        merged.append(MergedRead(start, end - start, tuple(members)))
    return merged


def batches(reads: Sequence[MergedRead], most: int) -> Iterator[list[MergedRead]]:
    """Cut a list of reads into lists of at most `most` bytes together, or of one read that is larger."""
    batch: list[MergedRead] = []
    total = 0
    for one in reads:
        if batch and total + one.length > most:
            yield batch
            batch, total = [], 0
        batch.append(one)
        total += one.length
    if batch:
        yield batch
