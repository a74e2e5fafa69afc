"""`cowslice measure`: the words, and what comes out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from cowslice.cli.creating import asks_for_keys, check_format, create_options, parse_keys, say_keys
from cowslice.cli.images import open_image
from cowslice.cli.options import Allowed, Given, chain, common, image_format, output_format, snapshot_name
from cowslice.cli.output import say, say_json
from cowslice.units import parse_size

if TYPE_CHECKING:
    from cowslice.ops.measure import Measured

EPILOG = """\b
Examples:
  cowslice measure -O qcow2 --size 40G
  cowslice measure -O qcow2 -o cluster_size=2M disk.raw
  cowslice measure --output=json -O qcow2 -l before-upgrade disk.qcow2

\b
Exit status: 0 done, 1 failed, 64 usage."""


@click.command("measure", epilog=EPILOG)
@image_format
@output_format
@click.option("-O", "target_format", metavar="FORMAT", default="raw", show_default=True,
              help="Format of the image that would be made: qcow2 or raw.")
@click.option("-o", "texts", multiple=True, metavar="KEY=VALUE,...", help="Options of that image; 'help' lists them.")
@click.option("-s", "--size", metavar="SIZE", help="Measure an empty disk of this size.")
@click.option("-l", "snapshot", metavar="SNAPSHOT", help="Measure this internal snapshot of IMAGE.")
@common
@chain
@click.argument("image", required=False)
def command(
    image: str | None, format_name: str | None, output: str, target_format: str, texts: tuple[str, ...],
    size: str | None, snapshot: str | None, image_opts: bool, objects: tuple[str, ...], force_share: bool,
    quiet: bool, allowed: Allowed,
) -> None:
    """Say how large a new image would be: empty with --size, or as a copy of IMAGE, and when it is full."""
    from cowslice.ops.measure import measure

    check_format(target_format, "-O")
    if asks_for_keys(texts):
        say_keys(target_format)
        return
    if (size is None) == (image is None):
        raise click.UsageError("Give either --size or an IMAGE")
    options = create_options(target_format, parse_keys(target_format, texts, objects), check_backing=False)
    if image is None:
        measured = measure(options, size=parse_size(size or 0, "--size"))
    else:
        given = Given(format_name=format_name, image_opts=image_opts, objects=objects, force_share=force_share,
                      allowed=allowed)
        with open_image(image, given, warmup="off", snapshot=snapshot_name(snapshot)) as disk:
            measured = measure(options, source=disk)
    if not quiet:
        _say(measured, output)


def _say(measured: Measured, output: str) -> None:
    if output == "json":
        shown = {"required": measured.required, "fully-allocated": measured.fully_allocated}
        say_json(shown if measured.bitmaps is None else {**shown, "bitmaps": measured.bitmaps})
        return
    say(f"required size: {measured.required}")
    say(f"fully allocated size: {measured.fully_allocated}")
    if measured.bitmaps is not None:
        say(f"bitmaps size: {measured.bitmaps}")
