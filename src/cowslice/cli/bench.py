"""`cowslice bench`: how fast an image is read or written, as `qemu-img bench`; `bench table`: the published tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from cowslice.cli import exitcodes
from cowslice.cli.benchnbd import bench_nbd, table_over_nbd
from cowslice.cli.images import open_image
from cowslice.cli.options import (
    CACHE_MODES,
    Given,
    chain,
    common,
    image_format,
    output_format,
)
from cowslice.cli.output import exact_size, say, say_fields, say_json, say_table
from cowslice.errors import BadOption
from cowslice.units import format_size, parse_size

if TYPE_CHECKING:
    from cowslice.ops.bench.image import BenchOptions

EPILOG = """\b
Examples:
  cowslice bench disk.qcow2                            75000 reads of 4 KiB in a row, 64 at once
  cowslice bench --random -d 1 --l2-cache-size 1M disk.qcow2
  cowslice bench -w --pattern=165 --flush-interval=1000 scratch.qcow2   writes over what the disk holds
  cowslice bench table --short                         the rows of 4 KiB slices, in about a minute
  cowslice bench table --layout random --output=json --plot table.svg
  cowslice bench nbd nbd://localhost                   the answers of an NBD server"""

TABLE_EPILOG = """\b
Examples:
  cowslice bench table --short
  cowslice bench table --layout random -d 1 --rounds 7
  cowslice bench table --image vm.qcow2 --output=json > vm.json
  cowslice bench table --storage-latency 1 --short     every read takes a millisecond more, for both engines
  cowslice bench table --over nbd --output=json        our server beside qemu-nbd, asked from outside

\b
Both engines read the same offsets: multiples of a stride, modulo the disk. The stride of each cell is searched for
which an LRU cache of that cell's size hits as often as with uniform random reads. 'cold' is the beginning, from an
empty cache without warm-up; 'warm' is what follows. 'plain' is the same loop on a raw file of equal size.
Over NBD the clients read at random themselves, so there is no stride. The same clients also ask a server that does
nothing: what they reach there, and how far that is ahead of qemu-nbd ('at most'), no server exceeds."""


class Bench(click.Group):
    """`bench table` and `bench nbd` are verbs of their own; any other first word is the image of a plain bench."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] in self.commands:
            return super().resolve_command(ctx, args)
        return "image", bench_one, args

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        wants_group = not args or args[0] in ("-h", "--help", *self.commands)
        return super().parse_args(ctx, args if wants_group else ["--", *args])


@click.group("bench", cls=Bench, epilog=EPILOG, context_settings={"ignore_unknown_options": True})
def command() -> None:
    """Measure reading and writing.

    'cowslice bench IMAGE' takes the options of 'qemu-img bench' (see 'cowslice bench IMAGE --help'); 'cowslice bench
    table' measures the published tables of slice and cache sizes beside QEMU; 'cowslice bench nbd URI' measures an NBD
    server.
    """


command.add_command(bench_nbd)


@click.command("bench", epilog=EPILOG)
@image_format
@output_format
@click.option("-c", "count", default=75_000, show_default=True, metavar="COUNT", help="Requests.")
@click.option("-d", "depth", default=64, show_default=True, metavar="DEPTH", help="Requests under way at once.")
@click.option("-s", "length", default="4k", show_default=True, metavar="SIZE", help="Bytes of a request.")
@click.option("-S", "step", default="0", metavar="STEP", help="From one request to the next; 0: its size.")
@click.option("-o", "offset", default="0", metavar="OFFSET", help="Where the first request is.")
@click.option(
    "-t", "cache_mode", type=click.Choice(CACHE_MODES), default="writeback", help="'none' goes around the page cache."
)
@click.option("-w", "write", is_flag=True, help="Write: what the disk holds there is lost.")
@click.option("--pattern", type=int, default=0, metavar="BYTE", help="What is written: 0 to 255.")
@click.option("--flush-interval", type=int, default=0, metavar="COUNT", help="Flush after so many writes; 0: never.")
@click.option("--no-drain", is_flag=True, help="Flush while the next writes are under way, not between them.")
@click.option("--random", "at_random", is_flag=True, help="Uniform random offsets instead of steps.")
@click.option("--seed", default=0, help="Of the random offsets.")
@click.option("--l2-cache-size", metavar="SIZE", help="As in QEMU: the most that the map may take.")
@click.option("--l2-cache-entry-size", metavar="SIZE", help="As in QEMU: the unit of a metadata read.")
@click.option(
    "--warmup",
    type=click.Choice(["auto", "off", "full"]),
    default="auto",
    show_default=True,
    help="Read the map first.",
)
@chain
@common
@click.argument("image")
def bench_one(image: str, output: str, write: bool, force_share: bool, quiet: bool, **given: Any) -> int:
    """Read IMAGE COUNT times, or write to it, and say how long that took."""
    if write and force_share:
        raise click.UsageError("-U does not go with -w, which needs the image alone")
    from cowslice.ops.bench.image import bench_image

    options = _requests(write, given)
    named = Given(
        format_name=given["format_name"],
        image_opts=given["image_opts"],
        objects=given["objects"],
        force_share=force_share,
        allowed=given["allowed"],
        direct=given["cache_mode"] in ("none", "directsync"),
    )
    sizes = {name: given[name] for name in ("l2_cache_size", "l2_cache_entry_size") if given[name] is not None}
    with open_image(image, named, writable=write, warmup=given["warmup"], **sizes) as disk:
        if given["warmup"] == "full":
            disk.wait_warm()
        result = bench_image(disk, options)
    if not quiet:
        _say_result(result, output, "writes/s" if write else "reads/s")
    return exitcodes.OK


def _requests(write: bool, given: dict[str, Any]) -> BenchOptions:
    from cowslice.ops.bench.image import BenchOptions

    return BenchOptions(
        count=given["count"],
        depth=given["depth"],
        length=parse_size(given["length"], "-s"),
        step=parse_size(given["step"], "-S"),
        offset=parse_size(given["offset"], "-o"),
        random=given["at_random"],
        seed=given["seed"],
        write=write,
        pattern=given["pattern"],
        flush_interval=given["flush_interval"],
        drain=not given["no_drain"],
    )


def _say_result(result: Any, output: str, unit: str) -> None:
    if output == "json":
        say_json(
            {
                "seconds": result.seconds,
                "requests": result.requests,
                "bytes": result.bytes,
                "rate": result.rate,
                "hits": result.hits,
                "misses": result.misses,
                "metadata-bytes-read": result.metadata_bytes,
            }
        )
        return
    say(f"Run completed in {result.seconds:.3f} seconds.")
    looked = max(result.hits + result.misses, 1)
    say_fields(
        [
            (unit, f"{result.rate:,.0f}"),
            ("throughput", f"{format_size(int(result.bytes / result.seconds))}/s"),
            ("metadata cache", f"{result.hits / looked:.1%} hits, {exact_size(result.metadata_bytes)} read"),
        ]
    )


@command.command("table", epilog=TABLE_EPILOG)
@output_format
@click.option(
    "--layout",
    type=click.Choice(["sequential", "random", "fragments"]),
    help="Order of the clusters in the file.  [default: sequential; over NBD also random, with 4 KiB slices]",
)
@click.option(
    "--cluster-size", type=click.Choice(["both", "64k", "256k"]), default="both", show_default=True, help="Which table."
)
@click.option("-d", "--depth", default=32, show_default=True, help="Reads under way at once.")
@click.option("--rounds", default=5, show_default=True, help="Alternating runs of each engine; medians are shown.")
@click.option("--requests", default=100_000, show_default=True, help="Reads of a warm stretch; a fifth of that cold.")
@click.option("--size", default="40G", show_default=True, help="Of the disk that is made.")
@click.option(
    "--image", type=click.Path(exists=True, dir_okay=False), help="Measure this fully populated image instead."
)
@click.option(
    "--directory", type=click.Path(exists=True, file_okay=False), help="Where images are made. Default: /dev/shm."
)
@click.option("--populate", is_flag=True, help="Really write the data clusters, instead of leaving holes.")
@click.option("--sequential", is_flag=True, help="Sequential reads of 256 KiB instead of random ones of 4 KiB.")
@click.option(
    "--storage-latency",
    "latency",
    default=0,
    metavar="MS",
    help="Delay every read of both engines by so many milliseconds.",
)
@click.option(
    "--aio",
    type=click.Choice(["threads", "io_uring", "best"]),
    help="QEMU's way to read; 'best': the faster one of each cell, over NBD only.  [default: threads; over NBD: best]",
)
@click.option(
    "--over",
    type=click.Choice(["calls", "nbd"]),
    default="calls",
    show_default=True,
    help="'calls' reads within the process, as 'qemu-img bench' does; 'nbd' serves the image and asks from outside.",
)
@click.option("--seconds", default=1.0, show_default=True, help="Over NBD: how long each run of a client takes.")
@click.option("--no-peer", is_flag=True, help="Leave QEMU out.")
@click.option("--short", is_flag=True, help="Only the rows of 4 KiB slices, fewer reads and rounds.")
@click.option("--plot", metavar="FILE", help="Also draw it: .png or .svg.")
@click.option("-p", "progress", is_flag=True, help="Show progress.")
def table(
    output: str,
    plot: str | None,
    progress: bool,
    short: bool,
    size: str,
    cluster_size: str,
    latency: int,
    no_peer: bool,
    over: str,
    seconds: float,
    aio: str | None,
    **chosen: Any,
) -> int:
    """Measure the published tables of L2 slice and cache sizes on this machine.

    Makes a fully populated 40 GB image (its data is a hole, so it takes some megabytes) and reads it through the
    metadata cache at every size of the tables, in turn with 'qemu-img bench' where that is installed; or, over NBD,
    serves it in turn with 'qemu-nbd' to fio, nbdcopy and 'cowslice bench nbd'.
    """
    if short:
        chosen["rounds"], chosen["requests"] = min(chosen["rounds"], 3), min(chosen["requests"], 30_000)
    shared = {
        "short": short,
        "size": _whole_gigabytes(size),
        "cluster_bits": {"both": (16, 18), "64k": (16,), "256k": (18,)}[cluster_size],
        "peer": not no_peer,
    }
    told = _progress if progress else None
    if over == "nbd":
        given = {**chosen, "--plot": plot, "--storage-latency": latency}
        return table_over_nbd({**shared, "aio": aio or "best", "seconds": seconds}, given, output, told)
    chosen["layout"] = chosen["layout"] or "sequential"
    return _table_of_calls({**shared, "aio": aio or "threads", "latency_ms": latency, **chosen}, output, plot, told)


def _whole_gigabytes(text: str) -> int:
    size = parse_size(text, "--size")
    if size < 1 << 30 or size % (1 << 30):
        raise BadOption(f"--size is '{text}', expected whole gigabytes")
    return size


def _table_of_calls(chosen: dict[str, Any], output: str, plot: str | None, told: Any) -> int:
    from cowslice.ops.bench.picture import check_plot_path, draw_table
    from cowslice.ops.bench.table import TableOptions, measure_table

    if plot:
        check_plot_path(plot)
    if chosen["aio"] == "best":
        raise BadOption("--aio is 'best', expected threads or io_uring except with '--over nbd'")
    measured = measure_table(TableOptions(**chosen), told)
    if output == "json":
        say_json(measured.as_json())
    else:
        _say_measured(measured)
    if plot:
        draw_table(measured, plot)
    return exitcodes.OK


def _progress(done: int, of: int, what: str) -> None:
    click.echo(f"{done + 1}/{of} {what}", err=True)


def _say_measured(measured: Any) -> None:
    o = measured.options
    say(
        f"{o['layout']} layout, {format_size(o['size'])} disk, depth {o['depth']}, "
        f"median of {o['rounds']} alternating rounds"
    )
    say(f"{measured.machine}; {measured.peer or 'no QEMU'}{', aio=' + o['aio'] if measured.peer else ''}")
    heads = (
        "clusters",
        "slice",
        "cache",
        "published",
        "QEMU cold",
        "warm",
        "cowslice cold",
        "warm",
        "ratio cold",
        "warm",
        "QEMU hits",
        "our hits",
        "metadata read",
        "plain",
        "share",
    )
    say_table(heads, [_row(cell) for cell in measured.cells], right="r" * len(heads))


def _row(cell: Any) -> tuple[str, ...]:
    def rate(value: float | None) -> str:
        return "-" if value is None else f"{value:,.0f}"

    def ratio(value: float | None) -> str:
        return "-" if value is None else f"{value:.1f}x"

    def share(value: float | None) -> str:
        return "-" if value is None else f"{value:.0%}"

    return (
        format_size(1 << cell.cluster_bits),
        format_size(cell.entry_bytes),
        format_size(cell.cache_bytes),
        f"{cell.published:,}",
        rate(cell.peer_cold),
        rate(cell.peer_warm),
        rate(cell.ours_cold),
        rate(cell.ours_warm),
        ratio(cell.ratio_cold),
        ratio(cell.ratio_warm),
        share(cell.peer_hit),
        share(cell.hit_warm),
        format_size(cell.metadata_bytes_cold + cell.metadata_bytes_warm),
        rate(cell.ceiling),
        share(cell.ceiling_share),
    )
