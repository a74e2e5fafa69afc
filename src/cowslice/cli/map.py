"""`cowslice map`: the words, and how a map looks."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from itertools import chain as chained
from itertools import islice
from typing import TYPE_CHECKING

import click

from cowslice.cli.images import open_image
from cowslice.cli.options import Allowed, Given, chain, common, image_format, output_format
from cowslice.cli.output import paint, printable, say
from cowslice.units import format_size, parse_size

if TYPE_CHECKING:
    from cowslice.image.mapping import Extent

EPILOG = """\b
Examples:
  cowslice map disk.qcow2
  cowslice map -s 1G -l 64M disk.qcow2
  cowslice map --output=json disk.qcow2 | jq '[.[] | select(.data) | .length] | add'

\b
Exit status: 0 done, 1 failed, 64 usage."""

# Columns are as wide as the first rows need: the rest streams, however long the map is.
_LOOKED_AT = 4096


@click.command("map", epilog=EPILOG)
@image_format
@output_format
@click.option("-s", "--start-offset", "start", metavar="SIZE", default="0", help="Begin at this guest offset.")
@click.option("-l", "--max-length", "length", metavar="SIZE", help="Show at most this much of the disk.")
@common
@chain
@click.argument("image")
def command(
    image: str, format_name: str | None, output: str, start: str, length: str | None, image_opts: bool,
    objects: tuple[str, ...], force_share: bool, quiet: bool, allowed: Allowed,
) -> None:
    """Show where each part of the guest disk IMAGE is stored: in which file of the chain, and where in it."""
    from cowslice.ops.map import map_extents

    given = Given(format_name=format_name, image_opts=image_opts, objects=objects, force_share=force_share,
                  allowed=allowed)
    first = parse_size(start, "--start-offset")
    most = None if length is None else parse_size(length, "--max-length")
    # The map needs no key: content stays closed.
    with open_image(image, given, warmup="off") as disk:
        extents = map_extents(disk, start=first, length=most)
        if output == "json":
            _say_json(extents)
        elif not quiet:
            _say_table(extents)


def _say_json(extents: Iterable[Extent]) -> None:
    """One extent a line, as qemu-img prints them."""
    from cowslice.ops.map import extent_json

    before = "["
    for extent in extents:
        sys.stdout.write(f"{before}{json.dumps(extent_json(extent), separators=(', ', ': '))}")
        before = ",\n"
    sys.stdout.write("[]\n" if before == "[" else "]\n")


def _say_table(extents: Iterable[Extent]) -> None:
    from cowslice.ops.map import extent_state

    rest = iter(extents)
    known = list(islice(rest, _LOOKED_AT))
    width = max([len(f"{extent.end:#x}") for extent in known] + [6])
    say(paint(f"{'offset':>{width}}  {'length':>10}  {'state':<14}  {'depth':>5}  {'at':>{width}}  file", "bold"))
    for extent in chained(known, rest):
        at = "" if extent.offset is None else f"{extent.offset:#x}"
        name = printable(extent.filename or "")
        what = f"{format_size(extent.length):>10}  {extent_state(extent):<14}  {extent.depth:>5}"
        say(f"{extent.start:>#{width}x}  {what}  {at:>{width}}  {name}".rstrip())
