"""`cowslice convert`: the words, and what becomes of the target when something stops the work."""

from __future__ import annotations

import ctypes
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING

import click

from cowslice.cli import exitcodes
from cowslice.cli.images import open_image
from cowslice.cli.options import CACHE_MODES, Given, chain, common, image_format, snapshot_name
from cowslice.cli.output import warn
from cowslice.cli.termination import Terminated, ending_on_sigterm
from cowslice.errors import BadOption, UnsupportedImage
from cowslice.units import parse_size

if TYPE_CHECKING:
    from cowslice.image.image import Image
    from cowslice.ops.convert import ConvertOptions

EPILOG = """\b
Examples:
  cowslice convert -p disk.qcow2 disk.raw
  cowslice convert -l before-upgrade disk.qcow2 old.raw
  cowslice convert disk.qcow2 - | zstd > disk.raw.zst
  cowslice convert -n disk.qcow2 /dev/vg0/disk        (into what is there already)
  cowslice convert part1.qcow2 part2.qcow2 whole.raw  (one behind the other)

\b
A new target appears under its name only when it is complete; Ctrl-C leaves nothing behind.
Exit status: 0 done, 1 failed, 64 usage, 130 interrupted."""


@click.command("convert", epilog=EPILOG)
@image_format
@click.option("-O", "target_format", metavar="FORMAT", default="raw", show_default=True,
              help="Format of the target: raw.")
@click.option("-S", "sparse", metavar="SIZE", default="4k", show_default=True,
              help="Zeros of at least this size become a hole; 0 writes everything.")
@click.option("-m", "workers", type=click.IntRange(0, 16), default=0, metavar="NUMBER",
              help="Requests under way at once, 1 to 16. Default: one for each processor.")
@click.option("-p", "progress", is_flag=True, help="Show progress.")
@click.option("-l", "snapshot", metavar="SNAPSHOT", help="Copy this internal snapshot: its id or name, or "
              "snapshot.id=ID, or snapshot.name=NAME.")
@click.option("-n", "existing", is_flag=True, help="Write into a target that exists, and do not make one.")
@click.option("--target-is-zero", is_flag=True, help="With -n: the target reads as zeros, so zeros need no writing.")
@click.option("--salvage", is_flag=True, help="Sectors that cannot be read become zeros.")
@click.option("-t", "target_cache", type=click.Choice(CACHE_MODES), default="unsafe", show_default=True,
              help="'unsafe' does not wait until the target is stable.")
@click.option("-T", "source_cache", type=click.Choice(CACHE_MODES), default="writeback",
              help="'none' reads around the page cache.")
@click.option("-W", "out_of_order", is_flag=True, help="Accepted: writing a file is never in order.")
@common
@chain
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@click.argument("target")
def command(
    sources: tuple[str, ...], target: str, format_name: str | None, target_format: str, sparse: str, workers: int,
    progress: bool, snapshot: str | None, existing: bool, target_is_zero: bool, salvage: bool, target_cache: str,
    source_cache: str, out_of_order: bool, image_opts: bool, objects: tuple[str, ...], force_share: bool, quiet: bool,
    allowed: tuple[str, ...], allow_any: bool,
) -> int | None:
    """Copy the disks SOURCE, one behind another, into the raw file TARGET; '-' is standard output."""
    from cowslice.ops.convert import ConvertOptions

    _refuse(target_format, sources, target, snapshot=snapshot, existing=existing, target_is_zero=target_is_zero)
    options = ConvertOptions(workers=workers, sparse=parse_size(sparse, "-S"), salvage=salvage)
    given = Given(format_name=format_name, image_opts=image_opts, objects=objects, force_share=force_share,
                  allowed=allowed, allow_any=allow_any, direct=source_cache in ("none", "directsync"))
    _share_one_arena()
    try:
        with ending_on_sigterm(), ExitStack() as stack:
            # Every cluster is read once: keeping decompressed ones would only cost memory and time.
            disks = [stack.enter_context(open_image(source, given, warmup="off", decompressed_cache_size=0,
                                                    snapshot=snapshot_name(snapshot)))
                     for source in sources]
            _convert(disks, target, options, existing=existing, is_zero=target_is_zero, sync=target_cache != "unsafe",
                     progress=progress and not quiet)
    except Terminated:
        return exitcodes.TERMINATED
    return None


def _convert(
    disks: list[Image], target: str, options: ConvertOptions, *, existing: bool, is_zero: bool, sync: bool,
    progress: bool,
) -> None:
    from cowslice.cli.progress import maybe_shown
    from cowslice.ops.convert import convert
    from cowslice.ops.rawtarget import Stream, raw_target, refuse_sources

    size = sum(disk.size for disk in disks)
    with ExitStack() as stack:
        if target == "-":
            stream = stack.enter_context(Stream(sys.stdout.fileno()))
            advance = stack.enter_context(maybe_shown("converting", progress))
            convert(disks, stream, options, progress=advance, warn=warn)
            return
        refuse_sources(target, [layer.storage.fileno() for disk in disks for layer in disk.layers]
                       + [layer.data.fileno() for disk in disks for layer in disk.layers])
        file = raw_target(target, size, existing=existing, is_zero=is_zero, sync=sync)
        stack.enter_context(file)
        advance = stack.enter_context(maybe_shown("converting", progress))
        convert(disks, file, options, progress=advance, warn=warn)


def _refuse(
    target_format: str, sources: tuple[str, ...], target: str, *, snapshot: str | None, existing: bool,
    target_is_zero: bool,
) -> None:
    if target_format != "raw":
        raise UnsupportedImage(f"'-O {target_format}' is refused: this program writes raw targets only",
                               hint="Use 'qemu-img convert' for other target formats.")
    if len(sources) > 1 and snapshot:
        raise BadOption("-l names a snapshot of one disk, but there are several sources")
    if target_is_zero and not existing:
        raise BadOption("--target-is-zero speaks of a target that exists, expected -n beside it")
    if target == "-" and existing:
        raise BadOption("-n wants a file or device to write into, not standard output")
    if target == "-" and sys.stdout.isatty():
        raise BadOption("standard output is a terminal, expected a pipe or a file")


def _share_one_arena() -> None:
    """Let all threads of this process take memory from one place, where the C library can be told so.

    Each thread's own arena would give the memory of every decompressed cluster back to the system and fetch it again: a
    third of the system time of converting a compressed image.
    """
    tell = getattr(ctypes.CDLL(None), "mallopt", None)
    if tell is not None:
        tell(_M_ARENA_MAX, 1)


_M_ARENA_MAX = -8  # malloc.h
