"""`cowslice tune --fleet`: what of the command line a fleet understands, and how it ends.

It does not know how a summary looks, nor who does the work.
"""

from __future__ import annotations

from typing import Any

import click

from cowslice.cli import exitcodes
from cowslice.cli.output import say_json
from cowslice.cli.progress import maybe_shown
from cowslice.cli.tuning import Asked

SOME_BROKEN = 2  # the others were studied


def check_fleet(asked: Asked, images: tuple[str, ...], pictures: dict[str, str | None]) -> None:
    """Refuse what is about one disk. Raises click.UsageError."""
    given = asked.given
    alone: dict[str, Any] = {
        "IMAGE": images, "--trace": asked.traces, "--disk": asked.disks, "--verify": asked.verifies, **pictures,
        "-f": given.format_name, "--image-opts": given.image_opts, "--object": given.objects,
        "--allow": given.allowed.folders, "--allow-any": given.allowed.any_file,
        "--allow-network": given.allowed.network,
    }  # fmt: skip
    for name, value in alone.items():
        if value:
            raise click.UsageError(f"{name} is about one disk, expected it without --fleet: a folder or a list says "
                                   "which images and traces there are, and only their own maps are read")


def tune_fleet(
    source: str, asked: Asked, *, budget: int | None, scheduler: str | None, output: str, quiet: bool
) -> int:
    """Study all disks and show what that comes to; the exit status."""
    from cowslice.cli.fleetout import say_broken, say_fleet
    from cowslice.tune.door import fleet
    from cowslice.tune.fleetsummary import fleet_json

    with maybe_shown("studying disks", asked.shows_progress, unit="disks") as advance:
        found = fleet(source, workload=asked.workload, trace_format=asked.trace_format, skip_bad=asked.skip_bad,
                      device=None if asked.device == "calibrate" else asked.device, depth=asked.depth,
                      force_share=asked.given.force_share, budget=budget, scheduler=scheduler, on_progress=advance,
                      **asked.sizes)
    say_broken(found)
    if output == "json":
        say_json(fleet_json(found))
    elif not quiet:
        say_fleet(found, source)
    if not found.broken:
        return exitcodes.OK
    return SOME_BROKEN if found.disks else exitcodes.FAILED
