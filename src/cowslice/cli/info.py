"""`cowslice info`: the words, and which statuses they end with."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from cowslice.cli import exitcodes
from cowslice.cli.images import explained
from cowslice.cli.options import Allowed, Given, chain, common, file_options, image_format, name_image, output_format
from cowslice.cli.output import complain, say, say_json
from cowslice.errors import BadOption

if TYPE_CHECKING:
    from cowslice.cli.options import FileOptions
    from cowslice.ops.info import ImageFacts

EPILOG = """\b
Examples:
  cowslice info disk.qcow2
  cowslice info --backing-chain overlay.qcow2
  cowslice info --output=json disk.qcow2 | jq .cowslice.findings

\b
Exit status: 0 done, 1 the image cannot be read or used, 64 usage."""


@click.command("info", epilog=EPILOG)
@image_format
@output_format
@click.option("--backing-chain", "whole_chain", is_flag=True,
              help="Also look at the backing files, which are opened for it.")
@common
@chain
@click.argument("image")
def command(
    image: str, format_name: str | None, output: str, whole_chain: bool, image_opts: bool, objects: tuple[str, ...],
    force_share: bool, quiet: bool, allowed: Allowed,
) -> int:
    """Show what IMAGE is: sizes, features, snapshots, bitmaps, everything that is odd about it, and the metadata cache
    that it wants.

    Nothing that the image names is opened, unless --backing-chain asks for it.
    """
    from cowslice.cli.infoout import as_json, say_facts

    given = Given(format_name=format_name, image_opts=image_opts, objects=objects, force_share=force_share,
                  allowed=allowed)
    named = name_image(image, given)
    options = file_options(named, given)
    wanted = options.format_name
    if wanted not in (None, "qcow2", "raw"):
        raise BadOption(f"the format is '{wanted}', expected qcow2 or raw")
    found = (_chain(named.name, options, given) if whole_chain else [_one(named.name, options)])
    if output == "json":
        shown = [as_json(facts) for facts in found]
        say_json(shown if whole_chain else shown[0])
    elif not quiet:
        for number, facts in enumerate(found):
            if number:
                say()
            say_facts(facts)
    return _status(found)


def _one(name: str, options: FileOptions) -> ImageFacts:
    from cowslice.ops.info import inspect
    from cowslice.storage.locate import locate

    with locate(name, direct=options.direct, locking="force-share" if options.force_share else True) as storage:
        return inspect(storage, format_name=options.format_name)


def _chain(name: str, options: FileOptions, given: Given) -> list[ImageFacts]:
    from cowslice.ops.infochain import inspect_chain

    gate = given.allowed.gate()
    with explained():
        return inspect_chain(name, gate, format_name=options.format_name, force_share=options.force_share)


def _status(found: list[ImageFacts]) -> int:
    for facts in found:
        for finding in facts.findings:
            if finding.fatal:
                complain(f"'{facts.filename}' cannot be opened: {finding.message}")
                return exitcodes.FAILED
    return exitcodes.OK
