"""`cowslice convert`: the words, and what becomes of the target when something stops the work."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from cowslice.cli.creating import asks_for_keys, check_format, create_options, join, parse_keys, say_keys
from cowslice.cli.images import open_image
from cowslice.cli.options import CACHE_MODES, Allowed, Given, chain, common, image_format, name_image, snapshot_name
from cowslice.cli.output import warn
from cowslice.errors import BadOption
from cowslice.units import parse_size

if TYPE_CHECKING:
    from cowslice.image.image import Image
    from cowslice.ops.convert import ConvertOptions

EPILOG = """\b
Examples:
  cowslice convert -p disk.qcow2 disk.raw
  cowslice convert -l before-upgrade disk.qcow2 old.raw
  cowslice convert -c -O qcow2 -o compression_type=zstd disk.raw small.qcow2
  cowslice convert disk.qcow2 - | zstd > disk.raw.zst
  cowslice convert -n disk.qcow2 /dev/vg0/disk        (into what is there already)
  cowslice convert -n --target-image-opts disk.raw driver=qcow2,file.filename=there.qcow2
  cowslice convert -r 100M disk.qcow2 /dev/vg0/disk   (at most 100 MiB in a second)
  cowslice convert part1.qcow2 part2.qcow2 whole.raw  (one behind the other)

\b
A new target appears under its name only when it is complete; Ctrl-C leaves nothing behind.
Exit status: 0 done, 1 failed, 64 usage, 130 interrupted."""


@dataclass(frozen=True, slots=True)
class Wish:
    """What was said about a qcow2 target."""

    texts: tuple[str, ...] = ()
    backing: str | None = None
    backing_format: str | None = None
    compress: bool = False
    replace_data_file: bool = False
    bitmaps: bool = False


@dataclass(frozen=True, slots=True)
class There:
    """What was said about a target that exists."""

    image_opts: bool
    is_zero: bool
    compress: bool
    bitmaps: bool


@click.command("convert", epilog=EPILOG)
@image_format
@click.option("-O", "target_format", metavar="FORMAT", help="Format of the target: raw (the default) or qcow2.")
@click.option("-o", "texts", multiple=True, metavar="KEY=VALUE,...", help="Options of a qcow2 target; 'help' lists "
              "them.")
@click.option("-B", "backing", metavar="FILE", help="Backing file of a qcow2 target: what SOURCE leaves to its own "
              "backing file is not copied.")
@click.option("-F", "backing_format", metavar="FORMAT", help="Format of that backing file.")
@click.option("-c", "compress", is_flag=True, help="Compress each cluster of a qcow2 target.")
@click.option("--replace-data-file", is_flag=True, help="Empty a data file of the target that is there already.")
@click.option("--bitmaps", is_flag=True, help="Copy the persistent bitmaps of SOURCE as well.")
@click.option("--skip-broken-bitmaps", "skip_broken", is_flag=True, help="With --bitmaps: warn of those that cannot be "
              "used, and copy the others.")
@click.option("-S", "sparse", metavar="SIZE",
              help="Zeros of at least this size become a hole; 0 writes everything.  [default: 4k]")
@click.option("-C", "offload", is_flag=True, help="Let the system copy into a raw target what lies plainly in files; "
              "only zeros that the maps know become holes.")
@click.option("-r", "rate", metavar="RATE", default="0", help="Copy at most this many bytes in a second; 0 for any.")
@click.option("-m", "workers", type=click.IntRange(0, 16), default=0, metavar="NUMBER",
              help="Requests under way at once, 1 to 16. Default: one for each processor.")
@click.option("-p", "progress", is_flag=True, help="Show progress.")
@click.option("-l", "snapshot", metavar="SNAPSHOT", help="Copy this internal snapshot: its id or name, or "
              "snapshot.id=ID, or snapshot.name=NAME.")
@click.option("-n", "existing", is_flag=True, help="Write into a target that exists, and do not make one.")
@click.option("--target-image-opts", is_flag=True, help="With -n: TARGET is 'driver=qcow2,file.filename=PATH,...'.")
@click.option("--target-is-zero", is_flag=True, help="With -n: the target reads as zeros, so zeros need no writing.")
@click.option("--salvage", is_flag=True, help="Sectors that cannot be read become zeros.")
@click.option("-t", "target_cache", type=click.Choice(CACHE_MODES), default="unsafe", show_default=True,
              help="'unsafe' does not wait until the target is stable.")
@click.option("-T", "source_cache", type=click.Choice(CACHE_MODES), default="writeback",
              help="'none' reads around the page cache.")
@click.option("-W", "out_of_order", is_flag=True, help="Accepted: data is written in no order anyway.")
@common
@chain
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@click.argument("target")
def command(
    sources: tuple[str, ...], target: str, format_name: str | None, target_format: str | None, texts: tuple[str, ...],
    backing: str | None, backing_format: str | None, compress: bool, replace_data_file: bool, bitmaps: bool,
    skip_broken: bool, sparse: str | None, offload: bool, rate: str, workers: int, progress: bool,
    snapshot: str | None, existing: bool, target_image_opts: bool, target_is_zero: bool, salvage: bool,
    target_cache: str, source_cache: str, out_of_order: bool, image_opts: bool, objects: tuple[str, ...],
    force_share: bool, quiet: bool, allowed: Allowed,
) -> None:
    """Copy the disks SOURCE, one behind another, into TARGET; a raw one may be '-', standard output."""
    from cowslice.ops.convert import ConvertOptions

    if target_image_opts and (target_format or not existing):
        raise BadOption("--target-image-opts describes an image that exists, format and all, expected -n and no -O")
    target_format = target_format or "raw"
    check_format(target_format, "-O")
    if offload:
        _refuse_offload(compress=compress, sparse=sparse, salvage=salvage)
        if target_image_opts or target_format == "qcow2":
            raise BadOption("-C copies into raw files and devices, expected no qcow2 target beside it")
    if asks_for_keys(texts):
        say_keys(target_format)
        return
    if skip_broken and not bitmaps:
        raise BadOption("--skip-broken-bitmaps speaks of bitmaps that are copied, expected --bitmaps beside it")
    wish = Wish(texts, backing, backing_format, compress, replace_data_file, bitmaps)
    _refuse("qcow2" if target_image_opts else target_format, wish, sources, target, snapshot=snapshot,
            existing=existing, target_is_zero=target_is_zero)
    options = ConvertOptions(workers=workers, sparse=parse_size(sparse or "4k", "-S"), salvage=salvage,
                             rate=parse_size(rate, "-r"), offload=offload)
    given = Given(format_name=format_name, image_opts=image_opts, objects=objects, force_share=force_share,
                  allowed=allowed, direct=source_cache in ("none", "directsync"))
    with ExitStack() as stack:
        # Every cluster is read once: keeping decompressed ones would only cost memory and time.
        disks = [stack.enter_context(open_image(source, given, warmup="off", decompressed_cache_size=0,
                                                snapshot=snapshot_name(snapshot)))
                 for source in sources]
        if compress or any(disk.format == "qcow2" for disk in disks):
            _share_one_arena()
        if bitmaps:
            from cowslice.ops.bitmapcopy import check_bitmaps

            check_bitmaps(disks[0], skip_broken=skip_broken)
        if target_image_opts or (target_format == "qcow2" and existing):
            there = There(target_image_opts, target_is_zero, compress, bitmaps)
            _convert_into(disks, target, options, given, there, progress=progress and not quiet)
            return
        if target_format == "qcow2":
            copy_to_qcow2(disks, target, options, wish, given, sync=target_cache != "unsafe",
                          progress=progress and not quiet)
            return
        copy_to_raw(disks, target, options, existing=existing, is_zero=target_is_zero,
                    sync=target_cache != "unsafe", progress=progress and not quiet)


def copy_to_raw(
    disks: list[Image], target: str, options: ConvertOptions, *, existing: bool, is_zero: bool, sync: bool,
    progress: bool,
) -> None:
    """Copy into a raw file, new or `existing`, or with '-' to standard output."""
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
        refuse_sources(target, descriptors(disks))
        file = raw_target(target, size, existing=existing, is_zero=is_zero, sync=sync)
        stack.enter_context(file)
        advance = stack.enter_context(maybe_shown("converting", progress))
        convert(disks, file, options, progress=advance, warn=warn)


def _refuse(
    target_format: str, wish: Wish, sources: tuple[str, ...], target: str, *, snapshot: str | None, existing: bool,
    target_is_zero: bool,
) -> None:
    if target_format == "qcow2":
        _refuse_qcow2(wish, sources, target, existing=existing)
    elif wish != Wish():
        raise BadOption("-o, -B, -F, -c, --bitmaps and --replace-data-file are for qcow2 targets, expected -O qcow2 "
                        "beside them")
    if len(sources) > 1 and snapshot:
        raise BadOption("-l names a snapshot of one disk, but there are several sources")
    if target_is_zero and not existing:
        raise BadOption("--target-is-zero speaks of a target that exists, expected -n beside it")
    if target == "-" and existing:
        raise BadOption("-n wants a file or device to write into, not standard output")
    if target == "-" and sys.stdout.isatty():
        raise BadOption("standard output is a terminal, expected a pipe or a file")


def _refuse_qcow2(wish: Wish, sources: tuple[str, ...], target: str, *, existing: bool) -> None:
    if existing and wish != Wish(compress=wish.compress, bitmaps=wish.bitmaps):
        raise BadOption("-n takes an image as it is, expected no -o, -B, -F or --replace-data-file beside it")
    if target == "-":
        raise BadOption("a qcow2 image is not written front to back, expected a file, not standard output")
    if len(sources) > 1 and wish.backing is not None:
        raise BadOption("-B names a backing file of one disk, but there are several sources")
    if len(sources) > 1 and wish.bitmaps:
        raise BadOption("--bitmaps copies those of one disk, but there are several sources")


def _refuse_offload(*, compress: bool, sparse: str | None, salvage: bool) -> None:
    for flag, given in (("-c", compress), ("-S", sparse is not None), ("--salvage", salvage)):
        if given:
            raise BadOption(f"-C and {flag} exclude each other: what the system copies is not looked at")


def _convert_into(
    disks: list[Image], target: str, options: ConvertOptions, given: Given, there: There, *, progress: bool
) -> None:
    """Write over an image that is there; its backing and data files pass the gate as those of a source do."""
    from cowslice.cli.progress import maybe_shown
    from cowslice.ops.bitmapcopy import check_target, copy_bitmaps
    from cowslice.ops.compressedinto import convert_compressed_into
    from cowslice.ops.convert import convert
    from cowslice.ops.imagetarget import ImageTarget
    from cowslice.ops.rawtarget import refuse_sources

    how = Given(format_name=None if there.image_opts else "qcow2", image_opts=there.image_opts, objects=given.objects,
                allowed=given.allowed)
    refuse_sources(name_image(target, how).name, descriptors(disks))
    with open_image(target, how, writable=True, warmup="off") as image, maybe_shown("converting", progress) as advance:
        if there.bitmaps:
            check_target(disks[0], image)
        if there.compress:
            convert_compressed_into(disks, image, options, target_is_zero=there.is_zero, progress=advance)
        else:
            wanted = ImageTarget(image, sum(disk.size for disk in disks), is_zero=there.is_zero)
            convert(disks, wanted, options, progress=advance, warn=warn)
        if there.bitmaps:
            copy_bitmaps(disks[0], image, warn=warn)


def copy_to_qcow2(
    disks: list[Image], target: str, options: ConvertOptions, wish: Wish, given: Given, *, sync: bool, progress: bool
) -> None:
    """Copy into a new qcow2 image."""
    from cowslice.cli.progress import maybe_shown
    from cowslice.image.backing import check_backing
    from cowslice.image.creation import new_image
    from cowslice.image.targets import refuse_data_content
    from cowslice.ops.qcow2convert import check_compressible, convert_to_qcow2
    from cowslice.ops.rawtarget import refuse_sources

    fields = parse_keys("qcow2", wish.texts, given.objects)
    if fields.pop("size", None) is not None:
        raise BadOption("-o has a size, but a copy has the size of its source")
    join(fields, "backing_file", wish.backing, "-B")
    join(fields, "backing_format", wish.backing_format, "-F")
    made = create_options("qcow2", fields, allowed=given.allowed, sync=sync,
                          replace_data_file=wish.replace_data_file)
    if wish.bitmaps and made.version < 3:
        raise BadOption("--bitmaps needs a target of version 3, expected no compat=0.10 beside it")
    if wish.compress:
        check_compressible(made)
    refuse_sources(target, descriptors(disks))
    refuse_data_content(target, made)
    size = made.check_size(sum(disk.size for disk in disks))
    backing_size = check_backing(made, target) if made.backing_file is not None else 0
    with maybe_shown("converting", progress) as advance, new_image(target, size, made) as image:
        convert_to_qcow2(disks, image, options, made, compress=wish.compress, backing_size=backing_size,
                         bitmaps=wish.bitmaps, progress=advance, warn=warn)


def descriptors(disks: list[Image]) -> list[int]:
    """Of every file that the disks are read from."""
    return [storage.fileno() for disk in disks for layer in disk.layers for storage in (layer.storage, layer.data)]


def _share_one_arena() -> None:
    """Let all threads of this process take memory from one place, where the C library can be told so.

    Each thread's own arena would give the memory of every decompressed cluster back to the system and fetch it again: a
    third of the system time of converting a compressed image.
    """
    import ctypes

    tell = getattr(ctypes.CDLL(None), "mallopt", None)
    if tell is not None:
        tell(_M_ARENA_MAX, 1)


_M_ARENA_MAX = -8  # malloc.h
