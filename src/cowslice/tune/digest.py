"""What of an advice is kept of each of hundreds of disks: the settings and their forecasts, without the columns that
they were computed from.

What must hold: two studies of the same disk, trace and storage make equal digests, wherever they were made.
"""

from __future__ import annotations

from dataclasses import dataclass

from cowslice.format.geometry import Geometry
from cowslice.tune.advise import Advice, Choice, Line
from cowslice.tune.wording import verdict


@dataclass(frozen=True, slots=True)
class Digest:
    """The settings of one disk, as in its Advice; `verdict` is "starved", "wasteful" or "right".

    `arrivals` are requests per second, None where no times are known; `full_coverage` bytes of QEMU's whole map.
    """

    name: str
    path: str
    geometry: Geometry
    full_coverage: int
    arrivals: float | None
    lines: tuple[Line, ...]
    qemu: Choice
    qemu_today: Choice
    ours: Choice
    verdict: str
    too_short: str


def digest(advice: Advice) -> Digest:
    """Keep what is small."""
    e = advice.evidence
    return Digest(name=e.name, path=e.path, geometry=e.curves.geometry, full_coverage=e.today.full_coverage,
                  arrivals=e.habits.arrivals, lines=advice.lines, qemu=advice.qemu, qemu_today=advice.qemu_today,
                  ours=advice.ours, verdict=verdict(advice), too_short=advice.too_short)
