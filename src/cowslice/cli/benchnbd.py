"""`cowslice bench nbd`: how fast an NBD server answers; and how the table over NBD is told."""

from __future__ import annotations

from typing import Any

import click

from cowslice.cli import exitcodes
from cowslice.cli.options import output_format
from cowslice.cli.output import say, say_fields, say_json, say_table, warn
from cowslice.errors import BadOption
from cowslice.units import format_size, parse_size

EPILOG = """\b
Examples:
  cowslice bench nbd nbd://localhost                       random 4 KiB reads, 32 at once, for five seconds
  cowslice bench nbd -d 1 -c 20000 nbd+unix:///vm?socket=/run/vm.sock
  cowslice bench nbd -s 256k --sequential --connections 4 nbd://localhost
  cowslice bench nbd --verify disk.raw nbd://localhost     every byte compared with a raw copy
  cowslice bench nbd --write 30 nbd://localhost            OVERWRITES the export with noise

\b
Latency is from the moment a window of requests is sent to the moment its replies are there. With --verify, writes write
what the raw copy holds, so the export stays as it is."""

_NARROW = 0.9  # a thread that computes for longer than this part of the time may be what is measured


@click.command("nbd", epilog=EPILOG)
@output_format
@click.option("--connections", default=1, show_default=True, metavar="N", help="Each has a thread of its own.")
@click.option("-d", "--depth", default=32, show_default=True, metavar="N", help="Requests under way per connection.")
@click.option("-s", "length", default="4k", show_default=True, metavar="SIZE", help="Bytes of a request.")
@click.option("--sequential", is_flag=True, help="One after another instead of at random.")
@click.option("-S", "step", metavar="STEP", help="From one request to the next, instead of at random.")
@click.option("-o", "offset", default="0", metavar="OFFSET", help="Where the part of the disk begins that is used.")
@click.option("--span", default="0", metavar="SIZE", help="How long it is; 0: to the end.")
@click.option("--write", "writes", default=0, metavar="PERCENT", help="So many requests write. Destroys what is there.")
@click.option("-c", "count", default=0, metavar="COUNT", help="End after so many requests.")
@click.option("-t", "--time", "seconds", type=float, metavar="SECONDS", help="End after so long. [default: 5]")
@click.option("--seed", default=0, help="Of what is random.")
@click.option("--simple", is_flag=True, help="Do not ask for structured replies.")
@click.option(
    "--verify", "content", type=click.Path(exists=True, dir_okay=False), metavar="FILE", help="Raw copy to compare."
)
@click.argument("uri")
def bench_nbd(
    uri: str,
    output: str,
    length: str,
    sequential: bool,
    step: str | None,
    offset: str,
    span: str,
    seconds: float | None,
    simple: bool,
    count: int,
    **chosen: Any,
) -> int:
    """Load the NBD export at URI with requests and say how fast they are answered.

    URI is nbd://HOST[:PORT]/EXPORT or nbd+unix:///EXPORT?socket=PATH.
    """
    from cowslice.ops.bench.nbdbench import LoadOptions, run_load

    if sequential and step:
        raise BadOption("--sequential and -S are both given, expected one of them")
    size = parse_size(length, "-s")
    options = LoadOptions(
        length=size,
        step=size if sequential else parse_size(step or 0, "-S"),
        offset=parse_size(offset, "-o"),
        span=parse_size(span, "--span"),
        seconds=seconds if seconds is not None else 0.0 if count else 5.0,
        count=count,
        structured=not simple,
        **chosen,
    )
    result = run_load(uri, options)
    if output == "json":
        say_json(result.as_json())
    else:
        _say_load(result)
    return exitcodes.FAILED if result.errors else exitcodes.OK


def _say_load(result: Any) -> None:
    from cowslice.ops.bench.nbdbench import PERCENTILES

    say(f"{result.requests:,} requests in {result.seconds:.3f} seconds, {result.mode} replies.")
    fields = [
        ("requests/s", f"{result.rate:,.0f}"),
        ("throughput", f"{format_size(int(result.bytes / result.seconds))}/s"),
        ("latency", "  ".join(f"p{p:g} {format_time(result.percentile(p))}" for p in PERCENTILES)),
        ("generator", f"{result.busy:.0%} of a processor for the busiest connection"),
    ]
    if result.errors:
        fields.append(("errors", f"{result.errors:,}, the first of them {result.first_error}"))
    say_fields(fields)
    if result.busy > _NARROW:
        warn("the generator was busy nearly all the time: the server may be faster than this; use more connections")


def format_time(seconds: float) -> str:
    """A duration that people can read: 12.3 us, 4.5 ms, 2 s."""
    for scale, unit in ((1e-6, "us"), (1e-3, "ms")):
        if seconds < 1000 * scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds:.3g} s"


# -- the table over NBD ------------------------------------------------------------------------------------------------

_ONLY_CALLS = {"depth": 32, "image": None, "populate": False, "sequential": False, "--plot": None,
               "--storage-latency": 0}  # fmt: skip


def table_over_nbd(chosen: dict[str, Any], given: dict[str, Any], output: str, told: Any) -> int:
    """Measure and tell the tables over NBD. `given` are the other words of the command line."""
    from cowslice.ops.bench.nbdtable import NbdTableOptions, measure_nbd_table

    for name, default in _ONLY_CALLS.items():
        if given[name] != default:
            raise BadOption(f"{name if name.startswith('-') else '--' + name} does not go with '--over nbd'")
    kept = {name: given[name] for name in ("rounds", "directory")}
    if given["layout"]:
        kept["layouts"] = (given["layout"],)
    table = measure_nbd_table(NbdTableOptions(**chosen, **kept), told)
    if output == "json":
        say_json(table.as_json())
    else:
        _say_table(table)
    return exitcodes.OK


# "does nothing" answers without reading, and "at most" is how far that is ahead of qemu-nbd with the same client.
_HEADS = ("", "qemu-nbd", "cowslice", "ratio", "does nothing", "at most", "raw file", "share")


def _say_table(table: Any) -> None:
    o = table.options
    say(
        f"{' and '.join(o['layouts'])} layout, {format_size(o['size'])} disk over NBD, "
        f"median of {o['rounds']} alternating rounds of {o['seconds']:g} s"
    )
    say(f"{table.machine}; {table.peer or 'no qemu-nbd'}")
    for name in table.missing:
        warn(f"{name} is not installed or cannot do what is needed: its figures are left out")
    for one in table.measured:
        say()
        kind = f", {one.layout}, {_map(one.covered)}, published {one.published:,}" if one.published else ""
        say(f"{one.what}{kind}{f', qemu-nbd --aio={one.aio}' if one.aio else ''}")
        rows = [_figure_row(figure) for figure in one.figures]
        say_table(_HEADS, rows, right="l" + "r" * (len(_HEADS) - 1), indent=2)
    _say_summary(table.summary)
    _say_losses(table)


def _say_summary(summary: Any) -> None:
    if not summary:
        return
    say()
    rows = []
    for one in summary:
        name = f"{one.name}, {one.layout}, {_map(one.covered)}"
        shares = _share(one.share_least), _share(one.share_median)
        rows.append((name, _times(one.ratio_least), _times(one.ratio_median), _times(one.bound_median), *shares))
    heads = ("over all cells", "ratio least", "median", "at most", "share least", "median")
    say_table(heads, rows, right="lrrrrr")


def _map(covered: bool) -> str:
    return "whole map" if covered else "part of the map"


def _say_losses(table: Any) -> None:
    if not table.peer:
        return
    say()
    if not table.losses:
        say("cowslice is ahead everywhere.")
        return
    say("qemu-nbd is ahead in:")
    for what, figure, ratio in table.losses:
        say(f"  {what}: {figure}, {ratio:.2f}x")


def _figure_row(figure: Any) -> tuple[str, ...]:
    def value(number: float | None) -> str:
        if number is None:
            return "-"
        if figure.unit == "bytes/s":
            return f"{format_size(int(number))}/s"
        return f"{number:.2f} s" if figure.unit == "s" else f"{number:,.0f}"

    ratio, share = _times(figure.ratio), _share(figure.share)
    bound = value(figure.ceiling), _times(figure.bound)
    return figure.name, value(figure.peer), value(figure.ours), ratio, *bound, value(figure.raw), share


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"


def _share(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"
