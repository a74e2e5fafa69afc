"""`cowslice serve`: the words, and what is said about where it listens.

It does not know NBD. Flags and defaults are those of qemu-nbd where that has them.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any

import click

from cowslice.cli import exitcodes
from cowslice.cli.options import CACHE_MODES, Given, chain, common, image_format
from cowslice.cli.output import exact_size, printable, say, warn
from cowslice.cli.serving import Wanted, address, client_tls, credentials, left_out, limits_of, open_exports, secrets
from cowslice.cli.termination import Ending, Terminated

if TYPE_CHECKING:
    from cowslice.serve.listeners import Listener
    from cowslice.serve.server import Server

EPILOG = """\b
Examples:
  cowslice serve -k /run/vm.sock vm.qcow2            (ends when the last client has left)
  cowslice serve -t -e 8 -k /run/vm.sock vm.qcow2    (up to 8 clients at once, until it is told to end)
  cowslice serve -t -b ::1 root=root.qcow2 data=data.qcow2
  cowslice serve -t -k /run/vm.sock -l before-upgrade vm.qcow2
  cowslice serve -t -k /run/vm.sock -A -B daily vm.qcow2
  cowslice serve -t --tls-creds /etc/pki/qemu vm.qcow2
  cowslice serve -t -k /run/vm.sock --metrics 9184 vm.qcow2
  cowslice serve -t -k /run/vm.sock --capture vm.trace vm.qcow2
  cowslice serve -L -k /run/vm.sock                  (what a server offers)

\b
Then, for example:
  nbdinfo --map 'nbd+unix:///?socket=/run/vm.sock'
  nbdcopy 'nbd+unix:///?socket=/run/vm.sock' vm.raw

\b
With socket activation (LISTEN_FDS) it takes the sockets it is given instead of -p, -b and -k.
SIGTERM, SIGINT and SIGHUP end it, and all that clients were answered is then in the image. Another one changes nothing:
SIGQUIT ends at once, and what no client flushed may be lost.
Exit status: 0 ended as it should, 1 failed, 64 usage."""


@click.command("serve", epilog=EPILOG)
@click.option("-k", "--socket", "unix", metavar="PATH", help="Listen on this Unix socket.")
@click.option("-p", "--port", type=click.IntRange(0, 65535), metavar="PORT",
              help="Listen on this TCP port; 0: any.  [default: 10809]")
@click.option("-b", "--bind", "host", metavar="ADDRESS",
              help="Listen on this address; '::' is every one.  [default: 0.0.0.0]")
@click.option("-e", "--shared", "--max-clients", "max_clients", type=click.IntRange(0), default=1, show_default=True,
              metavar="NUMBER", help="Clients at once; 0: any number.")
@click.option("-t/ ", "--persistent/--once", default=False,
              help="Go on, or end, when the last client has left.  [default: once]")
@click.option("-x", "--export-name", "name", metavar="NAME", help="Name of the export.  [default: none]")
@click.option("-D", "--description", default="", metavar="TEXT", help="Description of the export.")
@click.option("-r", "--read-only", is_flag=True, help="Serve for reading only, as without --writable.")
@click.option("--writable", is_flag=True, help="Let clients write.")
@click.option("-l", "--load-snapshot", "snapshot", metavar="SNAPSHOT",
              help="Serve this internal snapshot: its id or name, or snapshot.id=ID, or snapshot.name=NAME.")
@click.option("--all-snapshots", is_flag=True, help="Serve every internal snapshot as well, as NAME@SNAPSHOT.")
@click.option("-A", "--allocation-depth", is_flag=True, help="Offer the context qemu:allocation-depth.")
@click.option("-B", "--bitmap", "bitmaps", multiple=True, metavar="NAME",
              help="Offer the context qemu:dirty-bitmap:NAME; may be repeated.")
@click.option("--cache", "cache_mode", type=click.Choice(CACHE_MODES), default="writeback", show_default=True,
              help="'none' and 'directsync' read and write around the page cache; with 'writethrough' and 'directsync' "
              "a change is stable before it is answered. 'unsafe' is 'writeback' here: no flush is left out.")
@click.option("-n", "--nocache", is_flag=True, help="The same as --cache=none.")
@click.option("--tls-creds", metavar="ID|DIR", help="Only speak TLS: the id of an --object tls-creds-x509 or "
              "tls-creds-psk, or a directory with ca-cert.pem, server-cert.pem and server-key.pem.")
@click.option("--tls-hostname", metavar="NAME", help="With -L: the name that the server's certificate must have.")
@click.option("--handshake-limit", type=click.FloatRange(0), default=10, show_default=True, metavar="SECONDS",
              help="For a client to get ready; 0: no limit.")
@click.option("--idle-timeout", type=click.FloatRange(0), default=0, show_default=True, metavar="SECONDS",
              help="For a client that asks nothing, or takes no answer; 0: no limit.")
@click.option("--max-request", default="32M", show_default=True, metavar="SIZE",
              help="Longest read or write of one request.")
@click.option("--max-in-flight", type=click.IntRange(1), default=128, show_default=True, metavar="NUMBER",
              help="Requests of one client under way at once.")
@click.option("--max-in-flight-bytes", default="64M", show_default=True, metavar="SIZE",
              help="What they may add up to.")
@click.option("--poll-max-ns", type=click.IntRange(0, 1_000_000_000), default=100_000, show_default=True,
              metavar="NANOSECONDS", help="How long to wait awake for a client that goes on asking; "
              "0: sleep at once.")
@click.option("--metrics", metavar="[HOST:]PORT",
              help="Show counts for people, and at /metrics for Prometheus, at this HTTP address.")
@click.option("--capture", metavar="FILE", help="Record what clients ask in this new file, for `cowslice tune`.")
@click.option("--fork", is_flag=True, help="Go into the background once clients can connect.")
@click.option("--pid-file", metavar="PATH", help="Keep the process number in this file.")
@click.option("-L", "--list", "listing", is_flag=True, help="List what the server at -k, or -b and -p, offers.")
@click.option("-v", "--verbose", is_flag=True, help="Accepted: faults are always told.")
@click.option("--aio", "_aio", type=click.Choice(["threads", "native", "io_uring"]),
              help="Accepted: threads read and write, whatever it says.")
@click.option("--discard", type=click.Choice(["ignore", "off", "unmap", "on"]),
              help="Whether what clients discard gives its space back (unmap, on) or stays as it is (ignore, off).  "
              "[default: unmap]")
@click.option("--detect-zeroes", type=click.Choice(["off", "on", "unmap"]),
              help="Look for zeros in what clients write: keep their space (on), or give it back (unmap).  "
              "[default: off]")
@left_out
@image_format
@common
@chain
@click.argument("images", nargs=-1, metavar="[NAME=]IMAGE...")
def command(images: tuple[str, ...], **given: Any) -> int | None:
    """Serve disks to NBD clients, by default read-only: to virtual machines, nbdcopy, qemu-img, or the kernel.

    Several images need names, by which clients ask for them: NAME=IMAGE. A path with a '=' in it is written with a '/'
    before that, as in ./a=b.qcow2.
    """
    wanted = Wanted(**{key: value for key, value in given.items() if not key.startswith("_")})
    if wanted.writable and (wanted.read_only or wanted.snapshot is not None or wanted.all_snapshots):
        raise click.UsageError("--writable excludes -r, -l and --all-snapshots: a snapshot never changes")
    if wanted.listing:
        if images:
            raise click.UsageError("-L takes no IMAGE: it asks a server")
        return _list(wanted)
    if not images:
        raise click.UsageError("Missing argument '[NAME=]IMAGE...'")
    return _serve(images, wanted)


def _serve(images: tuple[str, ...], wanted: Wanted) -> int | None:
    from cowslice.cli.daemon import fork
    from cowslice.serve.listeners import activated

    inherited = activated()  # before the process has another number than its sockets were announced to
    background = fork() if wanted.fork else None  # now, while there are no threads
    ending: Ending = click.get_current_context().obj
    with suppress(Terminated), ExitStack() as stack:
        try:
            server = _started(images, wanted, inherited, stack)
            if background is not None:
                background.ready()
            server.wait()
        finally:
            ending.hold()  # also where the last client has left: what clients wrote is brought in order
    return None


def _started(images: tuple[str, ...], wanted: Wanted, inherited: list[Listener], stack: ExitStack) -> Server:
    """Start the server and all that belongs to it, and say where that is."""
    from cowslice.cli.daemon import pid_file

    server = _start(images, wanted, inherited, stack)
    stack.enter_context(pid_file(wanted.pid_file))
    lines = _where(server)
    if wanted.metrics is not None:
        lines.append(f"{_show_metrics(wanted.metrics, server, stack)}  metrics")
    if not wanted.quiet:
        for line in lines:
            say(line)
    sys.stdout.flush()
    return server


def _start(images: tuple[str, ...], wanted: Wanted, inherited: list[Listener], stack: ExitStack) -> Server:
    """Open everything and begin to listen. What is opened belongs to `stack`."""
    from cowslice.serve.server import Server

    limits = limits_of(wanted)
    tls = None if wanted.tls_creds is None else credentials(wanted.tls_creds, wanted.objects, endpoint="server")
    given = Given(
        format_name=wanted.format_name, image_opts=wanted.image_opts, objects=secrets(wanted.objects),
        force_share=wanted.force_share, allowed=wanted.allowed,
        direct=wanted.nocache or wanted.cache_mode in ("none", "directsync"))
    exports = open_exports(images, wanted, given, stack)
    listeners = _listen(wanted, inherited)
    for listener in listeners:
        stack.callback(listener.close)
    server = Server(exports, listeners, tls=tls, limits=limits, max_clients=wanted.max_clients,
                    persistent=wanted.persistent, report=warn)
    return stack.enter_context(server)


def _listen(wanted: Wanted, inherited: list[Listener]) -> list[Listener]:
    from cowslice.serve.listeners import listen_tcp, listen_unix

    if inherited:
        if wanted.unix is not None or wanted.host is not None or wanted.port is not None:
            raise click.UsageError("-k, -b and -p exclude socket activation, which already says where to listen")
        return inherited
    place = address(wanted, any_host="0.0.0.0")
    return [listen_unix(place)] if isinstance(place, str) else listen_tcp(*place)


def _show_metrics(place: str, server: Server, stack: ExitStack) -> str:
    """Begin to show what the server counts; the URL."""
    from cowslice.serve.page import MetricsServer

    return stack.enter_context(MetricsServer(place, server.metrics)).url


def _where(server: Server) -> list[str]:
    exports = list(server.exports.values())
    lines = []
    for number, uri in enumerate(server.uris):
        export = exports[number % len(exports)]
        way = "writable" if export.writable else "read-only"
        lines.append(printable(f"{uri}  {exact_size(export.disk.size)}, {way}, {export.disk.path}"))
    return lines


def _list(wanted: Wanted) -> int:
    """Ask a server what it has and say so."""
    from cowslice.serve.listing import list_exports

    place = address(wanted, any_host="localhost")
    tls = None if wanted.tls_creds is None else client_tls(wanted.tls_creds, wanted.objects)
    hostname = wanted.tls_hostname or ("localhost" if isinstance(place, str) else place[0])
    found = list_exports(place, tls=tls, hostname=hostname)
    say(f"exports available: {len(found)}")
    for export in found:
        say(printable(f" export: '{export.name}'"))
        if export.description:
            say(printable(f"  description: {export.description}"))
        if export.session is not None:
            sizes = export.session.block_sizes
            say(f"  size: {exact_size(export.session.size)}")
            say(f"  flags: {int(export.session.flags):#x} ({_names(export.session.flags)})")
            say(f"  block sizes: {sizes.minimum}, {sizes.preferred}, {sizes.maximum} (least, best, most)")
            say(f"  replies: {export.session.mode.name.lower()}")
        for context in export.contexts:
            say(printable(f"  context: {context}"))
    return exitcodes.OK


def _names(flags: int) -> str:
    """The names of the transmission flags that are set, in words."""
    from cowslice.nbd.wire import ExportFlag

    return ", ".join(name.lower().replace("_", "-") for name, flag in ExportFlag.__members__.items() if flags & flag)
