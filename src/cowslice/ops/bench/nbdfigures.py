"""What a table over NBD says: rates of rounds become medians, ratios of pairs, and a summary.

It measures nothing. What must hold: a ratio compares two runs of the same round, and above 1 is always better for us.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from cowslice.ops.layout import Layout

Round = Mapping[str, Mapping[str, float]]  # rates by server (ours, peer, raw, nothing) and by figure


@dataclass(frozen=True, slots=True)
class Figure:
    """Medians of the rounds for us, the peer, a raw file behind our server, and a server that does nothing (`ceiling`).

    `ratio` is ours to the peer's and `share` ours to the raw file's, medians of the rounds' own; of what is better when
    it is less (`unit` "s"), the other way round: above 1 is always better for us. `bound` is the ceiling to the peer's:
    the ratio that no server can exceed with this client. None where something was not measured.
    """

    name: str
    unit: str
    ours: float
    peer: float | None
    raw: float | None
    ratio: float | None
    share: float | None
    ceiling: float | None = None
    bound: float | None = None


@dataclass(frozen=True, slots=True)
class NbdMeasured:
    """One cell, or one image of its own (`published` 0). `aio` is how QEMU read, '' without it."""

    what: str
    cluster_bits: int
    entry_bytes: int
    cache_bytes: int
    published: int
    covered: bool
    aio: str
    figures: tuple[Figure, ...]
    layout: Layout = "sequential"

    @property
    def named(self) -> str:
        """What tells a cell from those of other layouts."""
        return f"{self.what}, {self.layout}" if self.published else self.what


@dataclass(frozen=True, slots=True)
class Summary:
    """One figure over several cells of one layout: ratios to the peer, shares of the raw file, bounds."""

    name: str
    covered: bool
    ratio_least: float | None
    ratio_median: float | None
    share_least: float | None
    share_median: float | None
    bound_median: float | None = None
    layout: Layout = "sequential"


@dataclass(frozen=True, slots=True)
class NbdTable:
    """What was measured, on what, how, and where the peer is faster: (what, figure, ratio)."""

    options: dict[str, Any]
    machine: str
    peer: str
    missing: tuple[str, ...]
    measured: tuple[NbdMeasured, ...] = field(default_factory=tuple)

    @property
    def losses(self) -> tuple[tuple[str, str, float], ...]:
        """Every figure in which the peer is better, worst first."""
        lost = [(one.named, figure.name, figure.ratio) for one in self.measured for figure in one.figures
                if figure.ratio is not None and figure.ratio < 1]  # fmt: skip
        return tuple(sorted(lost, key=lambda loss: loss[2]))

    @property
    def summary(self) -> tuple[Summary, ...]:
        """Every figure over all cells whose map the cache covers in part, and over all that it covers whole."""
        found: dict[tuple[Layout, bool, str], list[Figure]] = {}
        for one in self.measured:
            for figure in one.figures if one.published else ():
                found.setdefault((one.layout, one.covered, figure.name), []).append(figure)
        ordered = sorted(found, key=lambda key: (key[0] != "sequential", *key))
        return tuple(_summary(*key, found[key]) for key in ordered)

    def as_json(self) -> dict[str, Any]:
        summary = [asdict(one) for one in self.summary]
        return {**asdict(self), "summary": summary, "losses": self.losses}


def figures_of(rounds: Sequence[Round]) -> tuple[Figure, ...]:
    return tuple(_figure(name, rounds) for name in rounds[0]["ours"])


def _figure(name: str, rounds: Sequence[Round]) -> Figure:
    def of(server: str) -> list[float]:
        return [one[server][name] for one in rounds if server in one]

    ours, peer, raw, ceiling = of("ours"), of("peer"), of("raw"), of("nothing")
    less = name.startswith("CPU")
    unit = "s" if less else "bytes/s" if name.startswith("nbdcopy") else "reads/s"
    return Figure(
        name, unit, statistics.median(ours), _median(peer), _median(raw),
        _median_ratio(ours, peer, less=less), _median_ratio(ours, raw, less=less),
        # A server that does nothing never sleeps: its CPU time says nothing.
        *(_above(ceiling, peer) if not less else (None, None)),
    )  # fmt: skip


def _above(ceiling: Sequence[float], peer: Sequence[float]) -> tuple[float | None, float | None]:
    """Median of the server that does nothing, and how far it is ahead of the peer."""
    return _median(ceiling), _median_ratio(ceiling, peer, less=False) if ceiling else None


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def _median_ratio(ours: Sequence[float], others: Sequence[float], *, less: bool) -> float | None:
    """How many times better we are. A rate of nothing counts as almost nothing."""
    if not others:
        return None
    pairs = [(max(a, 1e-9), max(b, 1e-9)) for a, b in zip(ours, others, strict=True)]
    return statistics.median(b / a if less else a / b for a, b in pairs)


def _summary(layout: Layout, covered: bool, name: str, figures: Sequence[Figure]) -> Summary:
    bounds = [figure.bound for figure in figures if figure.bound is not None]
    ratios = [figure.ratio for figure in figures if figure.ratio is not None]
    shares = [figure.share for figure in figures if figure.share is not None]
    return Summary(
        name, covered, min(ratios, default=None), _median(ratios), min(shares, default=None), _median(shares),
        _median(bounds), layout,
    )  # fmt: skip
