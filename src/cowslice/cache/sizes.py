"""How large the metadata caches of one image are: QEMU's options, defaults and rules as one pure function.

It does not know what a cache holds or how it evicts. What QEMU silently raises (to two L2 entries, to four refcount
blocks) is refused here with a sentence, so that a budget that was asked for is never exceeded; `qemu=True` tells
QEMU's own effective numbers instead.
"""

from __future__ import annotations

from dataclasses import dataclass

from cowslice.errors import BadOption
from cowslice.format.geometry import Geometry
from cowslice.units import KiB, MiB, div_ceil, format_size, is_power_of_two, parse_size, round_up

DEFAULT_L2_CACHE_SIZE = 32 * MiB  # QEMU's upper bound on Linux; holds the map of 256 GiB at 64 KiB clusters
PARTIAL_ENTRY_SIZE = 4 * KiB  # the unit of a miss when the map does not fit: one block of most host file systems
MIN_ENTRY_SIZE = 512  # one sector, the smallest read that every disk can do
MIN_L2_ENTRIES = 2  # QEMU holds two slices at once while it copies from one cluster to another
MIN_REFCOUNT_ENTRIES = 4  # QEMU's smallest refcount cache, in refcount blocks of one cluster
MAX_ENTRIES = (1 << 31) - 1  # QEMU counts entries in a signed 32-bit integer

Size = int | str | None


@dataclass(frozen=True, slots=True)
class CacheSizes:
    """Effective sizes of the caches of one image, all in bytes unless they say entries."""

    l2_cache_size: int
    l2_cache_entry_size: int
    l2_entries: int
    refcount_cache_size: int
    refcount_entries: int
    full_coverage: int
    covered: int

    @property
    def covers_disk(self) -> bool:
        """True when every L2 table fits, so that nothing is ever evicted."""
        return self.l2_cache_size >= self.full_coverage

    @property
    def total(self) -> int:
        """Bytes that both caches take when they are full."""
        return self.l2_cache_size + self.refcount_cache_size


@dataclass(frozen=True, slots=True)
class _Wish:
    """What the caller asked for, in bytes; None is 'not given'."""

    total: int | None
    l2: int | None
    refcount: int | None
    entry: int | None


def plan_cache_sizes(size: int, geometry: Geometry, *, cache_size: Size = None, l2_cache_size: Size = None,
                     refcount_cache_size: Size = None, l2_cache_entry_size: Size = None,
                     qemu: bool = False) -> CacheSizes:
    """Compute the cache sizes of a disk of `size` guest bytes from the four options, in bytes or as "1M".

    `full_coverage` is what the L2 tables of the whole disk need, `covered` the guest bytes whose map fits.
    Raises BadOption when values contradict each other or cannot work; with `qemu=True` too small ones are raised to
    QEMU's minima as QEMU does, even above `cache_size`.
    """
    wish = _Wish(_bytes(cache_size, "cache-size"), _bytes(l2_cache_size, "l2-cache-size"),
                 _bytes(refcount_cache_size, "refcount-cache-size"),
                 _bytes(l2_cache_entry_size, "l2-cache-entry-size"))
    _check_contradictions(wish)
    need = round_up(div_ceil(size, geometry.cluster_size) * geometry.l2_entry_size, geometry.cluster_size)
    l2, refcount = _divide(wish, need=need, least_refcount=MIN_REFCOUNT_ENTRIES * geometry.cluster_size)
    entry = _default_entry(l2, need, geometry.cluster_size) if wish.entry is None else wish.entry
    _check_entry(entry, geometry.cluster_size)
    l2_entries, refcount_entries = l2 // entry, refcount // geometry.cluster_size
    if qemu:
        l2_entries, refcount_entries = max(MIN_L2_ENTRIES, l2_entries), max(MIN_REFCOUNT_ENTRIES, refcount_entries)
    else:
        _check_minima(wish, l2=l2, refcount=refcount, entry=entry, need=need, cluster_size=geometry.cluster_size)
    if max(l2_entries, refcount_entries) > MAX_ENTRIES:
        raise BadOption(f"a cache of {max(l2_entries, refcount_entries)} entries is too large, "
                        f"expected at most {MAX_ENTRIES} entries")
    l2_bytes = l2_entries * entry if qemu else l2
    return CacheSizes(
        l2_cache_size=l2_bytes, l2_cache_entry_size=entry, l2_entries=l2_entries,
        refcount_cache_size=refcount_entries * geometry.cluster_size, refcount_entries=refcount_entries,
        full_coverage=need, covered=min(size, l2_bytes // geometry.l2_entry_size * geometry.cluster_size))


def _bytes(value: Size, name: str) -> int | None:
    return None if value is None else parse_size(value, name)


def _check_contradictions(wish: _Wish) -> None:
    if wish.total is None:
        return
    if wish.l2 is not None and wish.refcount is not None:
        raise BadOption("cache-size, l2-cache-size and refcount-cache-size are all given, expected at most two of "
                        "them: the total follows from its parts")
    for name, part in (("l2-cache-size", wish.l2), ("refcount-cache-size", wish.refcount)):
        if part is not None and part > wish.total:
            raise BadOption(f"{name} is {part}, expected at most cache-size, which is {wish.total}")


def _divide(wish: _Wish, *, need: int, least_refcount: int) -> tuple[int, int]:
    """Bytes for the L2 and for the refcount cache, before any minimum."""
    l2 = min(need, DEFAULT_L2_CACHE_SIZE if wish.l2 is None else wish.l2)
    if wish.total is None:
        return l2, wish.refcount or least_refcount
    if wish.l2 is not None:
        return l2, wish.total - l2
    if wish.refcount is not None:
        return wish.total - wish.refcount, wish.refcount
    if wish.total >= need + least_refcount:
        return need, wish.total - need
    refcount = min(wish.total, least_refcount)
    return wish.total - refcount, refcount


def _default_entry(l2: int, need: int, cluster_size: int) -> int:
    """The seed's default: small slices whenever the cache does not cover the disk."""
    return min(cluster_size, PARTIAL_ENTRY_SIZE) if l2 < need else cluster_size


def _check_entry(entry: int, cluster_size: int) -> None:
    if not is_power_of_two(entry) or not MIN_ENTRY_SIZE <= entry <= cluster_size:
        raise BadOption(f"l2-cache-entry-size is {entry}, expected a power of two from {MIN_ENTRY_SIZE} to the "
                        f"cluster size, which is {cluster_size}")


def _check_minima(wish: _Wish, *, l2: int, refcount: int, entry: int, need: int, cluster_size: int) -> None:
    """Refuse what could not keep its word: a cache without room for its minimum of entries."""
    least_refcount = MIN_REFCOUNT_ENTRIES * cluster_size
    if refcount < least_refcount:
        raise BadOption(_refcount_sentence(wish, refcount, least_refcount))
    if l2 >= min(need, MIN_L2_ENTRIES * entry):
        return
    if wish.total is not None and wish.l2 is None:
        raise BadOption(
            f"cache-size is {format_size(wish.total)}, of which refcount blocks take {format_size(refcount)} and leave "
            f"{format_size(l2)} for L2 slices, expected room for at least {MIN_L2_ENTRIES} of {format_size(entry)}",
            hint="give l2-cache-size instead, or a larger cache-size")
    raise BadOption(f"l2-cache-size is {format_size(l2)}, expected room for at least {MIN_L2_ENTRIES} entries of "
                    f"{format_size(entry)}")


def _refcount_sentence(wish: _Wish, refcount: int, least: int) -> str:
    expected = f"expected at least {MIN_REFCOUNT_ENTRIES} clusters, {format_size(least)}"
    if wish.refcount is not None:
        return f"refcount-cache-size is {format_size(refcount)}, {expected}"
    assert wish.total is not None
    return (f"cache-size is {format_size(wish.total)}, "
            f"which leaves {format_size(refcount)} for refcount blocks, {expected}")
