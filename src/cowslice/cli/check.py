"""`cowslice check`: the words, and nothing of the work."""

from __future__ import annotations

import click

from cowslice.cli import checkout, exitcodes
from cowslice.cli.options import CACHE_MODES, Given, common, file_options, image_format, name_image, output_format
from cowslice.cli.output import complain
from cowslice.errors import NotAnImage

EPILOG = """\b
Examples:
  cowslice check disk.qcow2
  cowslice check --output=json disk.qcow2 | jq '.leaks // 0'
  cowslice check -U running.qcow2        (a snapshot of a moving target: leaks are to be expected)

\b
Exit status: 0 clean, 1 the check could not be completed, 2 corrupt,
  3 leaked clusters but no corruption, 63 the format cannot be checked, 64 usage."""


@click.command("check", epilog=EPILOG)
@image_format
@output_format
@click.option("-r", "repair", metavar="leaks|all", help="Refused: this program does not write to images yet.")
@click.option("-p", "progress", is_flag=True, help="Show progress.")
@click.option("-T", "cache_mode", type=click.Choice(CACHE_MODES), default="writeback",
              help="'none' reads around the page cache.")
@click.option("-m", "workers", type=click.IntRange(1, 16), default=2, show_default=True, help="Threads.")
@common
@click.argument("image")
def command(
    image: str, format_name: str | None, output: str, repair: str | None, progress: bool, cache_mode: str, workers: int,
    image_opts: bool, objects: tuple[str, ...], force_share: bool, quiet: bool,
) -> int:
    """Look for leaks and corruption in IMAGE, a qcow2 file. Nothing is changed and nothing it names is opened.

    Every finding says which host cluster is concerned and who claims it; totals are those of 'qemu-img check'.
    """
    if repair is not None:
        complain(f"'-r {repair}' is refused: this program does not write to images, it only reports",
                 "Repair with 'qemu-img check -r', after making a copy.")
        return exitcodes.FAILED
    given = Given(format_name=format_name, image_opts=image_opts, objects=objects, force_share=force_share,
                  direct=cache_mode in ("none", "directsync"))
    named = name_image(image, given)
    options = file_options(named, given)
    if options.format_name not in (None, "qcow2"):
        return _unsupported(named.name, options.format_name or "")
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


def _unsupported(name: str, format_name: str) -> int:
    complain(f"'{name}' has format {format_name}, which holds nothing to check", "Only qcow2 images can be checked.")
    return checkout.UNSUPPORTED
