"""`cowslice bitmap`: the words, in the order in which they were said, and how bitmaps are listed."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import click

from cowslice.cli.images import open_image
from cowslice.cli.options import Allowed, Given, chain, changing, image_format, output_format
from cowslice.cli.output import printable, say_json, say_table
from cowslice.errors import BadOption
from cowslice.units import format_size, parse_size

if TYPE_CHECKING:
    from cowslice.image.image import Image

EPILOG = """\b
Examples:
  cowslice bitmap --add -g 64k disk.qcow2 backup1
  cowslice bitmap --disable disk.qcow2 backup1
  cowslice bitmap --add --disable --merge backup1 --merge backup2 disk.qcow2 both
  cowslice bitmap --merge backup1 -b old.qcow2 -F qcow2 disk.qcow2 both
  cowslice bitmap --list disk.qcow2

\b
A bitmap notes which parts of a disk were changed since it was added or cleared, while it is enabled. What is said is
done in the order in which it is said. A bitmap in use by a writer that did not finish can only be removed.
Exit status: 0 done, 1 failed, 64 usage, 130 interrupted."""

_ACTIONS = ("add", "remove", "clear", "enable", "disable", "merge")


class _InOrder(click.Command):
    """A command that knows in which order its options were given, each as often as it was."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        _, _, order = self.make_parser(ctx).parse_args(args=list(args))
        ctx.meta["order"] = [parameter.name for parameter in order if parameter.name in _ACTIONS]
        return super().parse_args(ctx, args)


@click.command("bitmap", cls=_InOrder, epilog=EPILOG)
@image_format
@click.option("--add", is_flag=True, help="Add BITMAP, enabled and without any mark.")
@click.option("-g", "--granularity", metavar="SIZE", help="With --add: the bytes that one bit covers, a power of two. "
              "Default: the cluster size, 4k to 64k.")
@click.option("--remove", is_flag=True, help="Forget BITMAP.")
@click.option("--clear", is_flag=True, help="Let BITMAP mark nothing.")
@click.option("--enable", is_flag=True, help="Let BITMAP note changes from now on.")
@click.option("--disable", is_flag=True, help="Let BITMAP stay as it is from now on.")
@click.option("--merge", multiple=True, metavar="SOURCE", help="Let BITMAP mark as well what the bitmap SOURCE marks; "
              "may be repeated.")
@click.option("-b", "--source-file", metavar="SOURCE_FILE", help="With --merge: the image that SOURCE belongs to.")
@click.option("-F", "--source-format", metavar="FORMAT", help="With -b: its format.")
@click.option("--list", "wants_list", is_flag=True, help="List the bitmaps of FILE, and how much each marks.")
@output_format
@changing
@chain
@click.argument("file")
@click.argument("bitmap", required=False)
@click.pass_context
def command(
    ctx: click.Context, file: str, bitmap: str | None, format_name: str | None, add: bool, granularity: str | None,
    remove: bool, clear: bool, enable: bool, disable: bool, merge: tuple[str, ...], source_file: str | None,
    source_format: str | None, wants_list: bool, output: str, image_opts: bool, objects: tuple[str, ...], quiet: bool,
    allowed: Allowed,
) -> None:
    """Add, remove, clear, enable, disable or merge the persistent dirty bitmap BITMAP of the qcow2 image FILE."""
    actions: list[str] = ctx.meta["order"]
    _refuse(actions, bitmap, wants_list=wants_list, output=output, granularity=granularity, source_file=source_file,
            source_format=source_format)
    size = None if granularity is None else parse_size(granularity, "-g")
    given = Given(format_name=format_name, image_opts=image_opts, objects=objects, allowed=allowed)
    if wants_list:
        with open_image(file, given, metadata_only=True, warmup="off") as disk:
            _say(disk, as_json=output == "json")
        return
    assert bitmap is not None
    source = Given(format_name=source_format, objects=objects, allowed=allowed)
    with open_image(file, given, writable=True, metadata_only=True, warmup="off") as disk:
        sources = iter(merge)
        for action in actions:
            if action == "merge":
                _merge(disk, bitmap, next(sources), source_file, source)
            elif action == "add":
                disk.add_bitmap(bitmap, granularity=size)
            else:
                getattr(disk, f"{action}_bitmap")(bitmap)


def _merge(disk: Image, bitmap: str, name: str, file: str | None, given: Given) -> None:
    if file is None:
        disk.merge_bitmap(bitmap, name)
        return
    with open_image(file, given, metadata_only=True, warmup="off") as other:
        disk.merge_bitmap(bitmap, name, other)


def _refuse(
    actions: list[str], bitmap: str | None, *, wants_list: bool, output: str, granularity: str | None,
    source_file: str | None, source_format: str | None,
) -> None:
    if wants_list and (actions or bitmap is not None):
        raise click.UsageError("--list takes FILE only, and goes with nothing that changes a bitmap")
    if not wants_list and output != "human":
        raise click.UsageError("--output goes with --list only")
    if not wants_list and not actions:
        raise click.UsageError("Need at least one of --add, --remove, --clear, --enable, --disable, --merge and --list")
    if not wants_list and not bitmap:
        raise click.UsageError("Missing argument 'BITMAP'")
    if granularity is not None and "add" not in actions:
        raise click.UsageError("-g goes with --add only")
    if source_format is not None and source_file is None:
        raise click.UsageError("-F goes with -b only")
    if source_file is not None and "merge" not in actions:
        raise click.UsageError("-b goes with --merge only")


def _say(disk: Image, *, as_json: bool) -> None:
    if disk.header is None:
        raise BadOption(f"'{disk.path}' is raw, expected a qcow2 image: a raw file has no bitmaps")
    shown = [_described(disk, number) for number in range(len(disk.bitmaps))]
    if as_json:
        say_json(shown)
    elif shown:
        say_table(("bitmap", "granularity", "notes changes", "marked"), [
            (printable(one["name"]), format_size(one["granularity"]) if "granularity" in one else "",
             "yes" if "auto" in one["flags"] else "no",
             format_size(one["dirty"]) if "dirty" in one else printable(one["fault"])) for one in shown], right="lrlr")


def _described(disk: Image, number: int) -> dict[str, Any]:
    """Name, flags and granularity as `info` names them; `dirty` in bytes, or the `fault` of one that cannot be used."""
    bitmap = disk.bitmaps[number]
    flags = [name for name, on in (("in-use", bitmap.in_use), ("auto", bitmap.flags & 2)) if on]
    shown: dict[str, Any] = {"name": os.fsdecode(bitmap.name), "flags": flags}
    if bitmap.usable:
        shown["granularity"] = bitmap.granularity
    if bitmap.fault or bitmap.in_use:
        return {**shown, "fault": bitmap.fault or "in use: a writer did not finish it"}
    return {**shown, "dirty": sum(length for _, length in disk.dirty_extents(os.fsdecode(bitmap.name)))}
