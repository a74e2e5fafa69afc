"""`cowslice commit`: the words, and nothing of the work."""

from __future__ import annotations

import click

from cowslice.cli.images import describe, explained
from cowslice.cli.options import CACHE_MODES, Allowed, Given, chain, changing, image_format
from cowslice.cli.output import say
from cowslice.units import parse_size

EPILOG = """\b
Examples:
  cowslice commit overlay.qcow2
  cowslice commit -d overlay.qcow2                    (and leave the overlay as it is)
  cowslice commit -b base.qcow2 top.qcow2             (over all that lies between them)
  cowslice commit -r 50M overlay.qcow2                (50 MiB in a second, no more)

\b
The base is stable before the overlay changes: after Ctrl-C the overlay reads as before, and can be committed again.
Exit status: 0 done, 1 failed, 64 usage, 130 interrupted."""


@click.command("commit", epilog=EPILOG)
@image_format
@click.option("-b", "base", metavar="BASE", help="Commit into this file of the backing chain; implies -d. Default: the "
              "direct backing file.")
@click.option("-d", "keep", is_flag=True, help="Leave FILE as it is. Default: it is emptied.")
@click.option("-r", "rate", metavar="RATE", default="0", help="Copy at most this many bytes in a second; 0 for any.")
@click.option("-p", "progress", is_flag=True, help="Show progress.")
@click.option("-t", "cache", type=click.Choice(CACHE_MODES), default="writeback",
              help="'none' reads and writes around the page cache.")
@changing
@chain
@click.argument("file")
def command(
    file: str, format_name: str | None, base: str | None, keep: bool, rate: str, progress: bool, cache: str,
    image_opts: bool, objects: tuple[str, ...], quiet: bool, allowed: Allowed,
) -> None:
    """Copy what FILE holds into its backing file, and empty FILE."""
    from cowslice.cli.progress import maybe_shown
    from cowslice.ops.commit import commit

    limit = parse_size(rate, "-r")
    given = Given(format_name=format_name, image_opts=image_opts, objects=objects, allowed=allowed,
                  direct=cache in ("none", "directsync"))
    with explained(), maybe_shown("committing", progress and not quiet) as advance:
        name, options = describe(file, given)
        commit(name, options, base=base, keep=keep, rate=limit, progress=advance)
    if not quiet:
        say("Image committed.")
