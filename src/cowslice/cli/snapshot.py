"""`cowslice snapshot`: the words, and how snapshots are listed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from cowslice.cli.images import open_image
from cowslice.cli.options import Allowed, Given, chain, common, image_format, output_format
from cowslice.cli.output import say_json

if TYPE_CHECKING:
    from cowslice.format.snapshots import Snapshot

EPILOG = """\b
Examples:
  cowslice snapshot -c before-upgrade disk.qcow2
  cowslice snapshot -l disk.qcow2
  cowslice snapshot -a before-upgrade disk.qcow2
  cowslice snapshot -d before-upgrade disk.qcow2

\b
-a takes an id or a name, -d a name or an id; where both fit, the first of the two is meant.
Exit status: 0 done, 1 failed, 64 usage, 130 interrupted."""


@click.command("snapshot", epilog=EPILOG)
@image_format
@click.option("-l", "wants_list", is_flag=True, help="List the snapshots; the default.")
@click.option("-c", "created", metavar="NAME", help="Keep the disk as it is now under this name.")
@click.option("-a", "applied", metavar="SNAPSHOT", help="Let the disk be again what this snapshot holds.")
@click.option("-d", "deleted", metavar="SNAPSHOT", help="Delete this snapshot.")
@output_format
@click.option("--json", "as_json", is_flag=True, help="The same as --output=json.")
@common
@chain
@click.argument("image")
def command(
    image: str, format_name: str | None, wants_list: bool, created: str | None, applied: str | None,
    deleted: str | None, output: str, as_json: bool, image_opts: bool, objects: tuple[str, ...], force_share: bool,
    quiet: bool, allowed: Allowed,
) -> None:
    """List, take, apply or delete internal snapshots of IMAGE."""
    asked = wants_list + sum(name is not None for name in (created, applied, deleted))
    if asked > 1:
        raise click.UsageError("Give only one of -l, -c, -a and -d")
    changes = asked == 1 and not wants_list
    as_json = as_json or output == "json"
    if as_json and changes:
        raise click.UsageError("--output=json goes with -l only")
    if force_share and changes:
        raise click.UsageError("-U goes with -l only: a snapshot needs the image alone")
    given = Given(format_name=format_name, image_opts=image_opts, objects=objects, force_share=force_share,
                  allowed=allowed)
    if not changes:
        with open_image(image, given, metadata_only=True, warmup="off") as disk:
            _say(disk.snapshots, as_json=as_json, quiet=quiet)
        return
    with open_image(image, given, writable=True, warmup="off") as disk:
        if created is not None:
            disk.snapshot(created)
        elif applied is not None:
            disk.apply_snapshot(applied)
        elif deleted is not None:
            disk.delete_snapshot(deleted)


def _say(snapshots: Sequence[Snapshot], *, as_json: bool, quiet: bool) -> None:
    from cowslice.cli.infoout import say_snapshots, snapshot_json

    if as_json:
        say_json([snapshot_json(one) for one in snapshots])
    elif snapshots and not quiet:
        say_snapshots(snapshots)
