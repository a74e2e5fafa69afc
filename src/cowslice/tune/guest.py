"""What one guest does to its disk: its trace, or a workload by name, or what is assumed where nobody knows.

It does not know the disk but for its size.
"""

from __future__ import annotations

from dataclasses import dataclass

from cowslice.errors import BadOption
from cowslice.tune.synthetic import synthetic
from cowslice.tune.trace import FORMATS, RequestSource, open_trace
from cowslice.units import TiB

ASSUMED = "uniform"
ASSUMPTION = ("No trace was given, so this assumes reads of 4 KiB all over the disk, every place as likely: the worst "
              "case for a cache. Tell what the guest does by --trace, or by --workload.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Guest:
    """Where a guest's requests come from. With neither `trace` nor `workload`, ASSUMED is.

    `trace` is a path or URL, `trace_format` one of FORMATS or None to look, `disk` which disk of a trace of several.
    """

    trace: str | None = None
    trace_format: str | None = None
    disk: str | None = None
    skip_bad: bool = False
    workload: str | None = None

    @property
    def assumption(self) -> str:
        """What is assumed of the guest, or ''."""
        return ASSUMPTION if self.trace is None and self.workload is None else ""

    def check(self) -> None:
        """Raise BadOption for what is wrong on every disk."""
        if self.trace_format is not None and self.trace_format not in FORMATS:
            raise BadOption(f"format is '{self.trace_format}', expected one of {', '.join(FORMATS)}")
        if self.workload is not None:
            synthetic(self.workload, size=TiB)

    def requests(self, size: int) -> RequestSource:
        """Return its requests on a disk of `size` bytes. Raises what opening the trace raises, and BadOption."""
        if self.trace is None:
            return synthetic(ASSUMED if self.workload is None else self.workload, size=size)
        return open_trace(self.trace, format=self.trace_format, skip_bad=self.skip_bad, disk=self.disk)
