"""`cowslice check`: the words, and nothing of the work."""

from __future__ import annotations

import click

from cowslice.cli import checkout
from cowslice.cli.options import CACHE_MODES, Given, common, file_options, image_format, name_image, output_format
from cowslice.cli.output import complain
from cowslice.errors import NotAnImage

EPILOG = """\b
Examples:
  cowslice check disk.qcow2
  cowslice check --output=json disk.qcow2 | jq '.leaks // 0'
  cowslice check -U running.qcow2        (a snapshot of a moving target: leaks are to be expected)
  cowslice check -r all --dry-run disk.qcow2
  cowslice check -r all disk.qcow2       (writes disk.qcow2.undo first)
  cowslice check --undo disk.qcow2       (takes that back, while nothing else has changed)

\b
Exit status: 0 clean, 1 the check could not be completed, 2 corrupt,
  3 leaked clusters but no corruption, 63 the format cannot be checked, 64 usage."""


@click.command("check", epilog=EPILOG)
@image_format
@output_format
@click.option("-r", "repair", type=click.Choice(["leaks", "all"]),
              help="Repair: clusters counted too high, or all that can be repaired.")
@click.option("--dry-run", is_flag=True, help="With -r: show what would change, and change nothing.")
@click.option("--undo", is_flag=True, help="Take the last repair back.")
@click.option("--journal", metavar="PATH",
              help="The undo journal of -r or --undo. Default: IMAGE.undo beside the image.")
@click.option("-p", "progress", is_flag=True, help="Show progress.")
@click.option("-T", "cache_mode", type=click.Choice(CACHE_MODES), default="writeback",
              help="'none' reads around the page cache.")
@click.option("-m", "workers", type=click.IntRange(1, 16), default=2, show_default=True, help="Threads.")
@common
@click.argument("image")
def command(
    image: str, format_name: str | None, output: str, repair: str | None, dry_run: bool, undo: bool,
    journal: str | None, progress: bool, cache_mode: str, workers: int, image_opts: bool, objects: tuple[str, ...],
    force_share: bool, quiet: bool,
) -> int:
    """Look for leaks and corruption in IMAGE, a qcow2 file. Without -r nothing is changed; what it names stays closed.

    Every finding says which host cluster is concerned and who claims it; totals are those of 'qemu-img check'.
    After a repair the status is that of a second check.
    """
    _check_words(repair=repair, dry_run=dry_run, undo=undo, journal=journal)
    if force_share and (undo or (repair and not dry_run)):
        raise click.UsageError("-U only reads, so it cannot go with -r or --undo")
    given = Given(format_name=format_name, image_opts=image_opts, objects=objects, force_share=force_share,
                  direct=cache_mode in ("none", "directsync"))
    named = name_image(image, given)
    options = file_options(named, given)
    if options.format_name not in (None, "qcow2"):
        return _unsupported(named.name, options.format_name or "")
    if undo:
        from cowslice.cli.repairing import undo_repair

        return undo_repair(named.name, journal=journal, direct=options.direct, quiet=quiet)
    if repair:
        from cowslice.cli.repairing import Wanted, repair_image

        return repair_image(named.name, Wanted(repair, dry_run, journal or "", workers, progress and not quiet),
                            direct=options.direct, output=output, quiet=quiet,
                            locking="force-share" if options.force_share else True)
    return _check(named.name, direct=options.direct, force_share=options.force_share, workers=workers,
                  progress=progress and not quiet, output=output, quiet=quiet)


def _check(
    name: str, *, direct: bool, force_share: bool, workers: int, progress: bool, output: str, quiet: bool
) -> int:
    from cowslice.ops.check import check
    from cowslice.storage.locate import locate

    with locate(name, direct=direct, locking="force-share" if force_share else True) as storage:
        try:
            if progress:
                from cowslice.cli.progress import shown

                with shown("checking", "tables") as advance:
                    report = check(storage, workers=workers, progress=advance)
            else:
                report = check(storage, workers=workers)
        except NotAnImage:
            return _unsupported(name, "raw")
    return checkout.say_report(report, report.findings, report.untold, name=name, output=output, quiet=quiet)


def _check_words(*, repair: str | None, dry_run: bool, undo: bool, journal: str | None) -> None:
    if undo and (repair or dry_run):
        raise click.UsageError("--undo takes a repair back, so it cannot go with -r or --dry-run")
    if dry_run and not repair:
        raise click.UsageError("--dry-run goes with -r leaks or -r all")
    if journal is not None and (dry_run or not (repair or undo)):
        raise click.UsageError("--journal goes with --undo, or with a -r that is no dry run")


def _unsupported(name: str, format_name: str) -> int:
    complain(f"'{name}' has format {format_name}, which holds nothing to check", "Only qcow2 images can be checked.")
    return checkout.UNSUPPORTED
