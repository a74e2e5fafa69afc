"""The rules of one L1 or L2 entry in plain words: the truth for every entry that the compiled count hands back.

It does not know where the tables lie or how counts are kept. The order of the rules is that of `qemu-img check`, so
that both count the same number of corruptions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from cowslice.format.entries import (
    ALL_SUBCLUSTERS,
    COMPRESSED,
    COPIED,
    L1_OFFSET_MASK,
    L1_RESERVED_MASK,
    L2_OFFSET_MASK,
    L2_RESERVED_MASK,
    ZERO,
    compressed_span,
)
from cowslice.format.geometry import SUBCLUSTERS, Geometry

# Stored refcount of a host cluster, None where it cannot be read.
StoredCount = Callable[[int], int | None]


@dataclass(frozen=True, slots=True)
class EntryRules:
    """What an entry is held against. `active`: it belongs to the active disk, whose copied flags must be right."""

    geometry: Geometry
    data_file: bool
    active: bool
    file_length: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """What breaks a rule, and the host span (offset, length) that counts as referenced, or None."""

    faults: tuple[str, ...]
    span: tuple[int, int] | None


def is_owned(word: int, rules: EntryRules) -> bool:
    """Whether a standard or extended entry has a host cluster, by the reading of QEMU's check."""
    if word & L2_OFFSET_MASK:
        return True
    zero = word & ZERO and not rules.geometry.extended_l2
    return bool(rules.data_file and word & COPIED and not zero)


def start_cluster(word: int, rules: EntryRules) -> int:
    """The host cluster under which an entry is judged: where its span starts, 0 when it has none."""
    if word & COMPRESSED:
        return compressed_span(word, rules.geometry.cluster_bits)[0] >> rules.geometry.cluster_bits
    return (word & L2_OFFSET_MASK) >> rules.geometry.cluster_bits


def judge_entry(word: int, bitmap: int, rules: EntryRules, stored: StoredCount) -> Verdict:
    """Hold one L2 entry against every rule."""
    if word & COMPRESSED:
        return _judge_compressed(word, bitmap, rules)
    faults = []
    if reserved := word & L2_RESERVED_MASK:
        faults.append(f"reserved bits {reserved:#x} are set")
    if not is_owned(word, rules):
        if bitmap & ALL_SUBCLUSTERS:
            faults.append(f"subclusters {bitmap & ALL_SUBCLUSTERS:#010x} are allocated, but there is no host cluster")
        return Verdict(tuple(faults), None)
    if both := bitmap >> SUBCLUSTERS & bitmap:
        faults.append(f"subclusters {both:#010x} are both allocated and zero")
    span, misplaced = _place(word, rules)
    faults.extend(misplaced)
    faults.extend(_copied_faults(word, rules, stored))
    return Verdict(tuple(faults), span)


def end_fault(offset: int, length: int, rules: EntryRules) -> str:
    """Why a span cannot be referenced: it ends a cluster or more beyond the file; '' when it can."""
    beyond = offset + length - rules.file_length
    if beyond < rules.geometry.cluster_size:
        return ""
    return f"it points at {offset:#x}, beyond the end of the file at {rules.file_length:#x}"


def l1_faults(word: int, geometry: Geometry) -> Iterator[str]:
    """What breaks a rule in one L1 entry alone."""
    offset = word & L1_OFFSET_MASK
    if reserved := word & L1_RESERVED_MASK:
        yield f"reserved bits {reserved:#x} are set"
    if not geometry.is_aligned(offset):
        yield f"the L2 table at {offset:#x} is not aligned to a cluster"


def _judge_compressed(word: int, bitmap: int, rules: EntryRules) -> Verdict:
    faults = []
    if word & COPIED:
        faults.append("the copied flag is set on a compressed cluster")
    if rules.data_file:
        faults.append("it is compressed, but guest data lies in an external file")
        return Verdict(tuple(faults), None)
    if bitmap:
        faults.append(f"it is compressed, but has the subcluster bitmap {bitmap:#018x}")
        return Verdict(tuple(faults), None)
    span = compressed_span(word, rules.geometry.cluster_bits)
    if fault := end_fault(*span, rules):
        return Verdict((*faults, fault), None)
    return Verdict(tuple(faults), span)


def _place(word: int, rules: EntryRules) -> tuple[tuple[int, int] | None, list[str]]:
    """The span that a cluster with a place refers to in the image file, and what is wrong with that place."""
    offset, size = word & L2_OFFSET_MASK, rules.geometry.cluster_size
    faults = []
    if not rules.geometry.is_aligned(offset):
        faults.append(f"host offset {offset:#x} is not aligned to clusters of {size:#x} bytes")
    if rules.data_file:
        return None, faults
    if fault := end_fault(offset, size, rules):
        return None, [*faults, fault]
    return (offset, size), faults


def _copied_faults(word: int, rules: EntryRules, stored: StoredCount) -> Iterator[str]:
    if not rules.active:
        return
    count = 1 if rules.data_file else stored((word & L2_OFFSET_MASK) >> rules.geometry.cluster_bits)
    if count is not None and (count == 1) != bool(word & COPIED):
        yield f"the copied flag is {'set' if word & COPIED else 'clear'}, but the refcount is {count}"
