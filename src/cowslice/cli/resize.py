"""`cowslice resize`: the words."""

from __future__ import annotations

import click

from cowslice.cli.images import open_image
from cowslice.cli.options import Allowed, Given, chain, common, image_format
from cowslice.cli.output import say
from cowslice.errors import BadOption, CowsliceError
from cowslice.units import SECTOR, parse_size, round_up

EPILOG = """\b
Examples:
  cowslice resize disk.qcow2 +10G
  cowslice resize --preallocation=falloc disk.qcow2 80G
  cowslice resize --shrink disk.qcow2 -- -10G

\b
Resize the file systems inside with their own tools: before the disk shrinks, and after it has grown.
Exit status: 0 done, 1 failed, 64 usage, 130 interrupted."""


@click.command("resize", epilog=EPILOG)
@image_format
@click.option("--shrink", is_flag=True, help="Permit a smaller disk: what lies behind its end is lost.")
@click.option("--preallocation", metavar="MODE", default="off", show_default=True,
              type=click.Choice(["off", "metadata", "falloc", "full"]), help="Of what is added.")
@common
@chain
@click.argument("image")
@click.argument("size")
def command(
    image: str, size: str, format_name: str | None, shrink: bool, preallocation: str, image_opts: bool,
    objects: tuple[str, ...], force_share: bool, quiet: bool, allowed: Allowed,
) -> None:
    """Give the disk IMAGE another SIZE, such as 40G; +SIZE or -SIZE add to the size that it has."""
    if force_share:
        raise click.UsageError("-U does not go with resize, which needs the image alone")
    given = Given(format_name=format_name, image_opts=image_opts, objects=objects, allowed=allowed)
    with open_image(image, given, writable=True, warmup="off") as disk:
        try:
            disk.resize(_wanted(size, disk.size), shrink=shrink, preallocation=preallocation)
        except CowsliceError as error:
            error.hint = error.hint.replace("shrink=True", "--shrink")
            raise
    if not quiet:
        say("Image resized.")


def _wanted(text: str, size: int) -> int:
    """The size that a SIZE argument means, whole sectors. Raises BadOption."""
    sign = {"+": 1, "-": -1}.get(text[:1], 0)
    number = parse_size(text[1:] if sign else text, "SIZE")
    wanted = size + sign * number if sign else number
    if wanted < 0:
        raise BadOption(f"SIZE is {text}, but the disk has only {size} bytes")
    return round_up(wanted, SECTOR)
