"""Reference counting over L2 tables in a few obvious lines: what the compiled count is held against.

It judges every entry by the plain rules and counts in a dictionary; it is slow and knows no windows but one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cowslice.format.entries import COMPRESSED, L2_OFFSET_MASK
from cowslice.ops.l2rules import EntryRules, Verdict, is_owned, judge_entry

Entry = tuple[int, int]  # word, subcluster bitmap


@dataclass(slots=True)
class Counted:
    """What a table refers to: references of each cluster, entries that break a rule, and the three totals."""

    references: Counter[int] = field(default_factory=Counter)
    faulty: list[int] = field(default_factory=list)
    overflows: int = 0
    allocated: int = 0
    compressed: int = 0
    fragmented: int = 0


def count_entries(entries: Sequence[Entry], rules: EntryRules, stored: Mapping[int, int], limit: int) -> Counted:
    """Count one table; `stored` holds the refcounts on disk, `limit` the greatest that their width can say."""
    counted = Counted()
    for index, (word, bitmap) in enumerate(entries):
        verdict = judge_entry(word, bitmap, rules, lambda cluster: stored.get(cluster, 0))
        if verdict.faults:
            counted.faulty.append(index)
        count_span(counted, verdict, rules, limit)
    _add_totals(counted, entries, rules)
    return counted


def count_span(counted: Counted, verdict: Verdict, rules: EntryRules, limit: int) -> None:
    """Add one reference to each cluster of a span, up to the limit."""
    if verdict.span is None:
        return
    offset, length = verdict.span
    bits = rules.geometry.cluster_bits
    for cluster in range(offset >> bits, ((offset + length - 1) >> bits) + 1):
        if counted.references[cluster] == limit:
            counted.overflows += 1
        else:
            counted.references[cluster] += 1


def _add_totals(counted: Counted, entries: Sequence[Entry], rules: EntryRules) -> None:
    follows = None
    for word, bitmap in entries:
        if word & COMPRESSED:
            if not rules.data_file and not bitmap:
                counted.allocated += 1
                counted.compressed += 1
                counted.fragmented += 1
        elif is_owned(word, rules):
            offset = word & L2_OFFSET_MASK
            counted.allocated += 1
            # A first cluster at offset 0 (of a data file, or by damage) is followed like any other.
            counted.fragmented += follows is not None and follows != offset
            follows = offset + rules.geometry.cluster_size
