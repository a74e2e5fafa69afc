"""`cowslice tune`: the words, and where what is found goes.

It does not know how advice looks. Results go to standard output once all is known; progress goes to standard error.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from cowslice.cli import exitcodes
from cowslice.cli.options import Given, chain, common, image_format, output_format
from cowslice.cli.output import say, say_json, write_whole
from cowslice.cli.tunefleet import check_fleet, tune_fleet
from cowslice.cli.tuning import Asked, Tuned, tuned
from cowslice.units import parse_size

if TYPE_CHECKING:
    from cowslice.tune.calibrate import Calibration

_SIZES = ("cache_size", "l2_cache_size", "refcount_cache_size", "l2_cache_entry_size")

EPILOG = """\b
Examples:
  cowslice tune vm.qcow2                               what uniform random reads would need: the worst case
  cowslice tune vm.qcow2 --trace guest.blkparse        what this guest needs
  cowslice tune vm.qcow2 --trace week.csv.zst --disk 7 --skip-bad
  cowslice tune vm.qcow2 --workload zipf:theta=1.1,write=0.3 --l2-cache-size 2M
  cowslice tune vm.qcow2 --device read4k=177us,read64k=423us,rate4k=56700,rate64k=8090
  cowslice tune a.qcow2 b.qcow2 --trace a.log --trace b.log --budget 8M
  cowslice tune --fleet /srv/images --budget 512M      all disks of a host: who is starved, who wastes
  cowslice tune --fleet disks.csv --scheduler tcp://10.0.0.1:8786 --json
  cowslice tune vm.qcow2 --trace guest.log --html advice.html --png advice.png
  cowslice tune vm.qcow2 --trace guest.log --verify    forecast beside measured
  cowslice tune --json vm.qcow2 | jq -r .paste.drive

\b
How to read it:
  The map of a qcow2 disk is read in pieces ('entries'), and the cache keeps some of them. A request whose piece is
  missing waits for it, in QEMU behind all others that miss. The advised setting is the smallest that gives 95 % of the
  best rate. First touches are left out: no cache avoids them.

\b
Traces: fio iolog, blkparse, QEMU's log, MSR, Alibaba and Tencent CSV, cowslice's captures; plain, gzip or zstd.
Workloads: uniform, zipf, sequential, mixed, phases, boot; then ':KEY=VALUE,...', such as requests, seed, length, write.
The image is only read; for one that is in use add -U.

\b
A fleet: a folder, whose qcow2 images have their traces beside them (vm.qcow2 and vm.log, vm.trace.zst, vm.qcow2.csv),
or a list, a disk a line: IMAGE[,TRACE[,DISK]]; a first line such as image,trace,l2-cache-size names other columns.

\b
Exit status: 0 done, 1 failed, 2 done but for some disks of a fleet, 64 usage."""


@click.command("tune", epilog=EPILOG)
@image_format
@click.option("--trace", "traces", multiple=True, metavar="FILE",
              help="What the guest asked, a file or URL. With several images: one for all, or one for each in order.")
@click.option("--trace-format", metavar="FORMAT", help="Format of the trace. Default: look.")
@click.option("--disk", "disks", multiple=True, metavar="NAME",
              help="Which disk of a trace of several. With several images: one for each.")
@click.option("--skip-bad", is_flag=True, help="Pass over malformed lines of a trace, and count them.")
@click.option("--workload", metavar="DESCRIPTION", help="What the guest does, where there is no trace.")
@click.option("--cache-size", metavar="SIZE", help="Today's setting, as in QEMU.")
@click.option("--l2-cache-size", metavar="SIZE", help="Today's setting, as in QEMU.")
@click.option("--refcount-cache-size", metavar="SIZE", help="Today's setting, as in QEMU.")
@click.option("--l2-cache-entry-size", metavar="SIZE", help="Today's setting, as in QEMU.")
@click.option("--depth", type=click.IntRange(1, 65536), default=32, show_default=True,
              help="Requests that the guest has under way at once.")
@click.option("--device", metavar="CONSTANTS", default="calibrate", show_default=True,
              help="How fast the storage is: measured, or constants as in the examples.")
@click.option("--budget", metavar="SIZE", help="Share so much memory among several images.")
@click.option("--fleet", metavar="DIR|LIST", help="Study all disks of a folder or a list in parallel; one summary.")
@click.option("--scheduler", metavar="ADDRESS", help="Study a fleet on this cluster of dask.distributed.")
@click.option("--verify", "verifies", is_flag=True,
              help="Replay the first 20000 requests as reads, also in QEMU if installed: forecast beside measured.")
@click.option("--html", "page", metavar="FILE", type=click.Path(dir_okay=False),
              help="Also write it as one page that needs nothing else: curves, heat map, packing.")
@click.option("--png", metavar="FILE", type=click.Path(dir_okay=False),
              help="Also draw the curves and the forecast as a picture; needs matplotlib.")
@output_format
@click.option("--json", "wants_json", is_flag=True, help="The same as --output=json.")
@click.option("-p", "progress", is_flag=True, help="Show progress, also where standard error is no terminal.")
@common
@chain
@click.argument("images", nargs=-1, metavar="IMAGE...")
def command(
    images: tuple[str, ...], output: str, wants_json: bool, quiet: bool, progress: bool, budget: str | None,
    page: str | None, png: str | None, fleet: str | None, scheduler: str | None, **chosen: Any,
) -> int:
    """Say which metadata cache IMAGE needs, from its map, what its guest does, and how fast its storage is.

    Shows how many lookups miss at each cache size, the setting to use, what today's gives beside it, and lines to paste
    for QEMU, libvirt and cowslice. With --fleet it does so for all disks of a host and says who is starved, who wastes,
    and how to share the memory there is.
    """
    asked = _asked(chosen, shows_progress=not quiet and (progress or sys.stderr.isatty()))
    limit = None if budget is None else parse_size(budget, "--budget")
    form = "json" if wants_json else output
    if fleet is not None:
        check_fleet(asked, images, {"--html": page, "--png": png})
        return tune_fleet(fleet, asked, budget=limit, scheduler=scheduler, output=form, quiet=quiet)
    if scheduler is not None:
        raise click.UsageError("--scheduler is for a --fleet")
    _check(images, asked, limit)
    if png is not None:
        from cowslice.tune.picture import check_can_draw

        check_can_draw(len(images))
    calibrations: dict[str, Calibration] = {}
    all_tuned = [tuned(number, image, asked, calibrations) for number, image in enumerate(images)]
    _write_pictures(all_tuned, page, png)
    _say_all(all_tuned, limit, form, quiet)
    return exitcodes.OK


def _asked(chosen: dict[str, Any], *, shows_progress: bool) -> Asked:
    own = ("traces", "trace_format", "disks", "skip_bad", "workload", "depth", "device", "verifies")
    given = {name: value for name, value in chosen.items() if name not in own and name not in _SIZES}
    return Asked(given=Given(**given), sizes={name: chosen[name] for name in _SIZES}, shows_progress=shows_progress,
                 **{name: chosen[name] for name in own})


def _check(images: tuple[str, ...], asked: Asked, budget: int | None) -> None:
    """What can be wrong with the command line as a whole."""
    if not images:
        raise click.UsageError("Missing argument 'IMAGE...'.")
    if asked.traces and asked.workload is not None:
        raise click.UsageError("--trace and --workload exclude each other")
    for option, values in (("--trace", asked.traces), ("--disk", asked.disks)):
        if len(values) not in (0, 1, len(images)):
            raise click.UsageError(f"{option} is given {len(values)} times for {len(images)} images, expected it "
                                   "once, or once for each")
    if not asked.traces and (asked.disks or asked.skip_bad or asked.trace_format):
        raise click.UsageError("--disk, --skip-bad and --trace-format need a --trace")
    if budget is not None and len(images) < 2:
        raise click.UsageError("--budget is shared among several images, but there is one")


def _write_pictures(all_tuned: list[Tuned], page: str | None, png: str | None) -> None:
    if page is not None:
        from cowslice.tune.report import Told
        from cowslice.tune.report import page as drawn

        told = [Told(each.advice, each.assumption, each.proofs or ()) for each in all_tuned]
        write_whole(page, drawn(told).encode(), "page")
    if png is not None:
        from cowslice.tune.picture import picture

        write_whole(png, picture([each.advice for each in all_tuned]), "picture")


def _say_all(tuned: list[Tuned], budget: int | None, output: str, quiet: bool) -> None:
    from cowslice.cli.tuneout import say_advice, say_division, say_proofs
    from cowslice.tune.digest import digest
    from cowslice.tune.sharing import divide, division_json

    division = None if budget is None else divide([digest(each.advice) for each in tuned], budget)
    if output == "json":
        told: dict[str, Any] = {"images": [each.as_json() for each in tuned]}
        if division is not None:
            told["budget"] = division_json(division)
        say_json(told if len(tuned) > 1 else told["images"][0])
        return
    for each in () if quiet else tuned:
        say_advice(each.advice, each.assumption)
        if each.proofs is not None:
            say()
            say_proofs(each.proofs)
        if len(tuned) > 1:
            say()
    if division is not None and not quiet:
        say_division(division)
