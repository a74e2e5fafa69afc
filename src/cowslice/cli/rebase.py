"""`cowslice rebase`: the words, and nothing of the work."""

from __future__ import annotations

import click

from cowslice.cli.images import describe, explained
from cowslice.cli.options import CACHE_MODES, Allowed, Given, chain, changing, image_format

EPILOG = """\b
Examples:
  cowslice rebase -b other.qcow2 -F qcow2 disk.qcow2  (the disk reads as before)
  cowslice rebase -b "" disk.qcow2                    (needs no backing file any more)
  cowslice rebase -c -b "" disk.qcow2                 (what is copied is compressed)
  cowslice rebase -u -b moved/base.raw -F raw disk.qcow2

\b
A relative BASE is stored as it is, and means a file beside FILE. After Ctrl-C FILE has its old backing file.
Exit status: 0 done, 1 failed, 64 usage, 130 interrupted."""


@click.command("rebase", epilog=EPILOG)
@image_format
@click.option("-b", "backing", metavar="BASE", help="The new backing file, '' for none.")
@click.option("-F", "backing_format", metavar="FORMAT", help="Its format: qcow2 or raw.")
@click.option("-u", "unsafe", is_flag=True, help="Change the header only: for a file that was moved or converted.")
@click.option("-c", "compress", is_flag=True, help="Compress whole clusters that are copied into FILE.")
@click.option("-p", "progress", is_flag=True, help="Show progress.")
@click.option("-t", "cache", type=click.Choice(CACHE_MODES), default="writeback",
              help="'none' reads and writes around the page cache.")
@click.option("-T", "source_cache", type=click.Choice(CACHE_MODES), default="writeback",
              help="Accepted: backing files are read as -t says.")
@changing
@chain
@click.argument("file")
def command(
    file: str, format_name: str | None, backing: str | None, backing_format: str | None, unsafe: bool, compress: bool,
    progress: bool, cache: str, source_cache: str, image_opts: bool, objects: tuple[str, ...], quiet: bool,
    allowed: Allowed,
) -> None:
    """Give FILE another backing file, and copy into it what the two show differently."""
    from cowslice.cli.progress import maybe_shown
    from cowslice.ops.rebase import Backing, rebase

    if backing is None and not unsafe:
        raise click.UsageError("Missing option '-b': the new backing file, or '' for none")
    if unsafe and compress:
        raise click.UsageError("-c compresses what is copied, but -u copies nothing: give one of them")
    wanted = Backing(backing or "", backing_format or None)
    given = Given(format_name=format_name, image_opts=image_opts, objects=objects, allowed=allowed,
                  direct=cache in ("none", "directsync"))
    with explained(), maybe_shown("rebasing", progress and not quiet) as advance:
        name, options = describe(file, given)
        rebase(name, options, wanted, unsafe=unsafe, compress=compress, progress=advance)
