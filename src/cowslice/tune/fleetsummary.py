"""What a fleet comes to: who is starved, who wastes, who could not be studied, and how to share the memory there is.

It studies nothing. "Starved" and "wasteful" are the words of each disk's own advice; the order is by what a change
buys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from cowslice.errors import BadOption
from cowslice.tune.advise import Choice
from cowslice.tune.digest import Digest
from cowslice.tune.fleetlist import Broken
from cowslice.tune.fleetstudy import Studied
from cowslice.tune.sharing import Division, divide, division_json, weights
from cowslice.units import format_size


@dataclass(frozen=True, slots=True)
class Fleet:
    """All disks that could be studied and all that could not, in their order.

    `division` shares the budget, or as much memory as the caches take today; None where nothing can be shared.
    """

    disks: tuple[Studied, ...]
    broken: tuple[Broken, ...]
    division: Division | None

    @property
    def starved(self) -> tuple[Studied, ...]:
        """Disks whose cache is too small: first the one whose advised setting saves most work, all requests counted."""
        shares = self._shares()
        return self._of("starved", lambda disk: shares[disk.path] * (1 / disk.qemu_today.rate - 1 / disk.qemu.rate))

    @property
    def wasteful(self) -> tuple[Studied, ...]:
        """Disks whose cache is larger than it need be: first the one that can give back most bytes."""
        return self._of("wasteful", lambda disk: disk.qemu_today.cache_bytes - disk.qemu.cache_bytes)

    @property
    def right(self) -> tuple[Studied, ...]:
        """Disks whose cache is about right, in their order."""
        return self._of("right", lambda disk: 0)

    def total(self, choice: Callable[[Digest], Choice]) -> int:
        """Bytes of the caches of all disks at that choice of each."""
        return sum(choice(disk.digest).cache_bytes for disk in self.disks)

    def _of(self, verdict: str, gain: Callable[[Digest], float]) -> tuple[Studied, ...]:
        chosen = [disk for disk in self.disks if disk.digest.verdict == verdict]
        return tuple(sorted(chosen, key=lambda disk: -gain(disk.digest)))

    def _shares(self) -> dict[str, float]:
        digests = [disk.digest for disk in self.disks]
        return {disk.path: share for disk, share in zip(digests, weights(digests)[0], strict=True)}


def summarise(outcomes: Iterable[Studied | Broken], budget: int | None = None) -> Fleet:
    """Gather what became of all disks, and share `budget` bytes, or what they take today, among them.

    Raises BadOption where a budget is given that is less than what the disks need to work at all.
    """
    outcomes = tuple(outcomes)
    disks = tuple(outcome for outcome in outcomes if isinstance(outcome, Studied))
    broken = tuple(outcome for outcome in outcomes if isinstance(outcome, Broken))
    return Fleet(disks, broken, _division([disk.digest for disk in disks], budget))


def _division(disks: Sequence[Digest], budget: int | None) -> Division | None:
    if not disks:
        return None
    if budget is not None:
        return divide(disks, budget)
    try:
        return divide(disks, sum(disk.qemu_today.cache_bytes for disk in disks))
    except BadOption:  # caches so small today that one of the engines could not work with them
        return None


def fleet_sentences(fleet: Fleet) -> tuple[str, ...]:
    """What to know about all of them together, most useful first."""
    said = [_counts(fleet), _memory(fleet), _doubts(fleet), _assumed(fleet)]
    return tuple(sentence for sentence in said if sentence)


def fleet_json(fleet: Fleet) -> dict[str, Any]:
    """All of it for scripts: sizes in bytes, times in seconds, rates per second, ratios from 0 to 1."""
    return {
        "summary": {
            "starved": [disk.image for disk in fleet.starved], "wasteful": [disk.image for disk in fleet.wasteful],
            "right": [disk.image for disk in fleet.right], "broken": [disk.image for disk in fleet.broken],
            "bytes": {"today": fleet.total(lambda disk: disk.qemu_today),
                      "advised": fleet.total(lambda disk: disk.qemu), "cowslice": fleet.total(lambda disk: disk.ours)},
            "text": list(fleet_sentences(fleet)),
        },
        "budget": None if fleet.division is None else division_json(fleet.division),
        "disks": [disk.as_json() for disk in fleet.disks],
        "broken": [{"image": disk.image, "error": disk.error, "hint": disk.hint or None, "kind": disk.kind}
                   for disk in fleet.broken],
    }  # fmt: skip


def _counts(fleet: Fleet) -> str:
    counted = ", ".join(f"{len(disks)} {word}" for word, disks in
                        (("starved", fleet.starved), ("wasteful", fleet.wasteful), ("about right", fleet.right)))
    lost = f"; {len(fleet.broken)} could not be studied" if fleet.broken else ""
    return f"{counted}{lost}."


def _memory(fleet: Fleet) -> str:
    if not fleet.disks:
        return ""
    today, advised, ours = (format_size(fleet.total(choice)) for choice in (
        lambda disk: disk.qemu_today, lambda disk: disk.qemu, lambda disk: disk.ours))
    return f"Their caches take {today} today; with the advised settings {advised} in QEMU, or {ours} in cowslice."


def _doubts(fleet: Fleet) -> str:
    short = sum(bool(disk.digest.too_short) for disk in fleet.disks)
    return f"Of {short} the trace is too short to say: record longer ones." if short else ""


def _assumed(fleet: Fleet) -> str:
    assumed = sum(bool(disk.assumption) for disk in fleet.disks)
    return (f"Of {assumed} there is no trace: reads all over the disk are assumed, the worst case for a cache."
            if assumed else "")
