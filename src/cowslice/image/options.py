"""How an image is opened, as one frozen record, and what the cache options mean for a whole chain.

It opens nothing. Option names are those of QEMU with underscores; sizes are bytes or text such as "1M".
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TypedDict

from cowslice.cache.sizes import DEFAULT_L2_CACHE_SIZE, PARTIAL_ENTRY_SIZE, Size, plan_cache_sizes
from cowslice.errors import BadOption
from cowslice.format.geometry import Geometry
from cowslice.image.decompressed import DEFAULT_BUDGET
from cowslice.image.gate import FolderGate, Gate
from cowslice.image.punching import Punching
from cowslice.storage.base import Storage
from cowslice.units import KiB, parse_size

Source = str | os.PathLike[str] | Storage
Secret = str | bytes | Callable[[str], str | bytes | None]
DEFAULT_REFCOUNT_CACHE = 256 * KiB
MAX_DEPTH = 256  # each layer costs a descriptor and an L1 table of up to 32 MiB; usual limits allow 1024 descriptors
POLICIES = ("clock2q+", "lru")
WARMUPS = ("auto", "off", "full")
DISCARDS = ("ignore", "unmap")
DETECT_ZEROES = ("off", "on", "unmap")


class Named(Enum):
    """The default of `backing` and `data_file`: what the image itself names, if the gate permits it."""

    NAMED = "named by the image"


NAMED = Named.NAMED


class OpenKeywords(TypedDict, total=False):
    """The keywords of `cowslice.open`, for type checkers and editors: the fields of OpenOptions."""

    format: str | None
    force_share: bool
    direct: bool
    cache_size: Size
    l2_cache_size: Size
    refcount_cache_size: Size
    l2_cache_entry_size: Size
    cache_clean_interval: int
    decompressed_cache_size: int | str
    warmup: str
    readahead: bool
    policy: str
    gate: Gate
    snapshot: str | None
    secret: Secret | None
    max_key_rounds: int | None
    backing: Source | Named | None
    backing_format: str | None
    data_file: Source | Named
    metadata_only: bool
    max_depth: int
    on_warning: Callable[[str], None] | None
    discard: str
    discard_no_unref: bool
    pass_discard_request: bool | None
    pass_discard_snapshot: bool
    pass_discard_other: bool
    detect_zeroes: str


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenOptions:
    """Every option of `cowslice.open`, which explains them. Raises BadOption for a value that can never work."""

    format: str | None = None
    force_share: bool = False
    direct: bool = False
    cache_size: Size = None
    l2_cache_size: Size = None
    refcount_cache_size: Size = None
    l2_cache_entry_size: Size = None
    cache_clean_interval: int = 600
    decompressed_cache_size: int | str = DEFAULT_BUDGET
    warmup: str = "auto"
    readahead: bool = True
    policy: str = "clock2q+"
    gate: Gate = field(default_factory=FolderGate)
    snapshot: str | None = None
    secret: Secret | None = field(default=None, repr=False)
    max_key_rounds: int | None = None
    backing: Source | Named | None = NAMED
    backing_format: str | None = None
    data_file: Source | Named = NAMED
    metadata_only: bool = False
    max_depth: int = MAX_DEPTH
    on_warning: Callable[[str], None] | None = None
    discard: str = "unmap"
    discard_no_unref: bool = False
    pass_discard_request: bool | None = None
    pass_discard_snapshot: bool = True
    pass_discard_other: bool = False
    detect_zeroes: str = "off"
    writable: bool = False

    def __post_init__(self) -> None:
        _one_of("format", self.format, (None, "qcow2", "raw"))
        _one_of("backing_format", self.backing_format, (None, "qcow2", "raw"))
        _one_of("warmup", self.warmup, WARMUPS)
        _one_of("policy", self.policy, POLICIES)
        _one_of("discard", self.discard, DISCARDS)
        _one_of("detect_zeroes", self.detect_zeroes, DETECT_ZEROES)
        if self.detect_zeroes == "unmap" and self.discard == "ignore":
            raise BadOption("detect_zeroes is 'unmap', expected 'on' or 'off' beside discard 'ignore'")
        self._check_writable()
        if self.backing_format and (self.backing is None or self.backing is NAMED):
            raise BadOption(f"backing_format is '{self.backing_format}', expected it only beside a backing file that "
                            "you name")
        _whole("cache-clean-interval", self.cache_clean_interval, 0, (1 << 32) - 1)
        _whole("max_depth", self.max_depth, 1, 1 << 20)
        if self.max_key_rounds is not None:
            _whole("max_key_rounds", self.max_key_rounds, 1, 1 << 62)

    @property
    def punching(self) -> Punching:
        """Which space leaves the file as soon as it is free; that of requests as `discard` says, unless told."""
        request = self.pass_discard_request
        return Punching(request=self.discard == "unmap" if request is None else request,
                        snapshot=self.pass_discard_snapshot, other=self.pass_discard_other)

    def _check_writable(self) -> None:
        """What makes no sense together with writing."""
        if not self.writable:
            return
        for name, given in (("snapshot", self.snapshot is not None), ("force_share", self.force_share),
                            ("backing", self.backing is None)):
            if given:
                raise BadOption(f"{name} is given, expected it only with mode 'r'")


@dataclass(frozen=True, slots=True)
class ChainCache:
    """The memory budget that a chain shares, and the unit of a metadata read of each layer, in bytes."""

    budget: int
    entry_bytes: tuple[int, ...]
    refcounts: int = DEFAULT_REFCOUNT_CACHE


def plan_chain_cache(disks: Sequence[tuple[int, Geometry]], options: OpenOptions) -> ChainCache:
    """Divide nothing: give all layers one budget, as large as QEMU would give the top one alone.

    `disks` are (guest bytes, geometry) of the qcow2 layers, top first; the options are judged by the top one.
    Reads use whole clusters when the maps of all layers fit together, else slices of 4 KiB. Raises BadOption.
    """
    if not disks:
        return ChainCache(DEFAULT_L2_CACHE_SIZE, ())
    size, geometry = disks[0]
    top = plan_cache_sizes(size, geometry, cache_size=options.cache_size, l2_cache_size=options.l2_cache_size,
                           refcount_cache_size=options.refcount_cache_size,
                           l2_cache_entry_size=options.l2_cache_entry_size)
    budget = _budget(options, top.refcount_cache_size)
    covers = sum(plan_cache_sizes(size, geometry).full_coverage for size, geometry in disks) <= budget
    given = options.l2_cache_entry_size
    most = parse_size(given, "l2-cache-entry-size") if given is not None else None
    unit = most or (PARTIAL_ENTRY_SIZE if not covers else max(geometry.cluster_size for _, geometry in disks))
    units = tuple(min(unit, geometry.cluster_size) for _, geometry in disks)
    return ChainCache(budget, units, top.refcount_cache_size)


def _budget(options: OpenOptions, refcount_cache_size: int) -> int:
    """What was asked for, undiminished by the size of the top disk: a lower layer may need more."""
    if options.l2_cache_size is not None:
        return parse_size(options.l2_cache_size, "l2-cache-size")
    if options.cache_size is not None:
        return parse_size(options.cache_size, "cache-size") - min(
            refcount_cache_size, parse_size(options.cache_size, "cache-size"))
    return DEFAULT_L2_CACHE_SIZE


def _whole(name: str, value: object, least: int, most: int) -> None:
    if not isinstance(value, int) or not least <= value <= most:
        raise BadOption(f"{name} is {value!r}, expected a whole number from {least} to {most}")


def _one_of(name: str, value: object, allowed: Sequence[object]) -> None:
    if value not in allowed:
        expected = ", ".join("None" if one is None else f"'{one}'" for one in allowed)
        raise BadOption(f"{name} is {value!r}, expected one of {expected}")
