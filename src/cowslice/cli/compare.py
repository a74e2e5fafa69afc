"""`cowslice compare`: the words, and nothing of the work."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from cowslice.cli.images import open_image
from cowslice.cli.options import CACHE_MODES, Allowed, Given, chain, common
from cowslice.cli.output import complain, paint, say
from cowslice.errors import BadOption, CowsliceError

if TYPE_CHECKING:
    from cowslice.image.image import Image
    from cowslice.ops.compare import CompareResult

SAME, DIFFERENT, CANNOT_OPEN, CANNOT_MAP, CANNOT_READ = range(5)

EPILOG = """\b
Examples:
  cowslice compare disk.qcow2 disk.raw
  cowslice compare -f raw -F qcow2 a.img b.img && echo equal
  cowslice compare -s before.qcow2 after.qcow2        (also sizes and allocation)

\b
Exit status: 0 same content, 1 different, 2 an image cannot be opened,
  3 a map cannot be read, 4 content cannot be read, 64 usage."""


@click.command("compare", epilog=EPILOG)
@click.option("-f", "first_format", metavar="FORMAT", help="Format of the first image: qcow2 or raw. Default: look.")
@click.option("-F", "second_format", metavar="FORMAT", help="Format of the second image.")
@click.option("-s", "strict", is_flag=True, help="Also compare sizes and the state of every extent.")
@click.option("-p", "progress", is_flag=True, help="Show progress.")
@click.option("-T", "cache_mode", type=click.Choice(CACHE_MODES), default="writeback",
              help="'none' reads around the page cache.")
@click.option("-m", "workers", type=click.IntRange(1, 16), default=2, show_default=True, help="Threads.")
@common
@chain
@click.argument("one")
@click.argument("other")
def command(
    one: str, other: str, first_format: str | None, second_format: str | None, strict: bool, progress: bool,
    cache_mode: str, workers: int, image_opts: bool, objects: tuple[str, ...], force_share: bool, quiet: bool,
    allowed: Allowed,
) -> int:
    """Tell whether the disks ONE and OTHER have the same content.

    Of two sizes, the longer disk is the same when the rest of it reads as zeros.
    """
    from contextlib import ExitStack

    direct = cache_mode in ("none", "directsync")
    with ExitStack() as stack:
        try:
            disks = [
                stack.enter_context(open_image(name, Given(
                    format_name=format_name, image_opts=image_opts, objects=objects, force_share=force_share,
                    allowed=allowed, direct=direct), warmup="off"))
                for name, format_name in ((one, first_format), (other, second_format))
            ]
        except BadOption:
            raise
        except CowsliceError as error:
            complain(str(error), error.hint)
            return CANNOT_OPEN
        return _compare(disks[0], disks[1], strict=strict, workers=workers, progress=progress, quiet=quiet)


def _compare(one: Image, other: Image, *, strict: bool, workers: int, progress: bool, quiet: bool) -> int:
    from cowslice.cli.progress import maybe_shown
    from cowslice.ops.compare import MapFailed, ReadFailed, compare

    try:
        with maybe_shown("comparing", progress and not quiet) as advance:
            result = compare(one, other, strict=strict, workers=workers, progress=advance)
    except MapFailed as error:
        complain(f"cannot read a map: {error}")
        return CANNOT_MAP
    except ReadFailed as error:
        complain(f"cannot read: {error}")
        return CANNOT_READ
    if not quiet:
        _say(result, one.size, other.size)
    return SAME if result.difference is None else DIFFERENT


def _say(result: CompareResult, one: int, other: int) -> None:
    difference = result.difference
    if result.sizes_differ and (difference is None or difference.what != "size"):
        say(f"The sizes differ ({one} and {other} bytes); only zeros count as equal behind the shorter disk.")
    if difference is None:
        say(paint("The disks have the same content.", "green"))
    elif difference.what == "size":
        say(paint(f"The sizes differ: {one} and {other} bytes.", "red"))
    else:
        what = "content differs" if difference.what == "content" else "allocation differs"
        say(paint(f"The {what} at offset {difference.offset} ({difference.offset:#x}).", "red"))
