"""From the words of `cowslice serve` to what a server is made of: addresses, credentials, exports.

It starts nothing. A bad word is a BadOption or a click.UsageError.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from cowslice.cli.images import open_image
from cowslice.cli.options import Allowed, F, Given, parse_keyval, snapshot_name
from cowslice.cli.output import printable
from cowslice.errors import BadOption

if TYPE_CHECKING:
    import ssl

    from cowslice.image.image import Image
    from cowslice.serve.exports import Export
    from cowslice.serve.tls import Credentials
    from cowslice.serve.transmission import Limits

MOST_SNAPSHOTS = 1000  # each one is an open image of its own
TLS_OBJECTS = ("tls-creds-x509", "tls-creds-psk")
DISCARDS = {"ignore": "ignore", "off": "ignore", "unmap": "unmap", "on": "unmap"}
# Flags of qemu-nbd that are left out, whether they take a value, and what to do instead.
LEFT_OUT = {
    ("-s", "--snapshot"): (False, "make an overlay with `cowslice create -b` and serve that with --writable"),
    ("-c", "--connect"): (True, "let nbd-client or `qemu-nbd -c` connect the kernel to this server"),
    ("-d", "--disconnect"): (True, "nbd-client -d or `qemu-nbd -d` disconnects the kernel"),
    ("-o", "--offset"): (True, "nbdkit with its partition or offset filter serves a part of a disk"),
    ("-T", "--trace"): (True, "--capture and --metrics show what is asked"),
    ("-V", "--version"): (False, "`cowslice --version` shows it"),
    ("--tls-authz",): (True, "a certificate authority of its own says who may connect"),
    ("--selinux-label",): (True, "runcon or the policy gives the process its label"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """The command line, one field for each flag."""

    unix: str | None
    port: int | None
    host: str | None
    max_clients: int
    persistent: bool
    name: str | None
    description: str
    read_only: bool
    writable: bool
    snapshot: str | None
    all_snapshots: bool
    allocation_depth: bool
    bitmaps: tuple[str, ...]
    cache_mode: str
    nocache: bool
    discard: str | None
    detect_zeroes: str | None
    tls_creds: str | None
    tls_hostname: str | None
    handshake_limit: float
    idle_timeout: float
    max_request: str
    max_in_flight: int
    max_in_flight_bytes: str
    poll_max_ns: int
    metrics: str | None
    capture: str | None
    fork: bool
    pid_file: str | None
    listing: bool
    verbose: bool
    format_name: str | None
    image_opts: bool
    objects: tuple[str, ...]
    force_share: bool
    quiet: bool
    allowed: Allowed


def left_out(command: F) -> F:
    """Let each flag of LEFT_OUT be a UsageError that says what to do instead."""
    for names, (has_value, instead) in LEFT_OUT.items():
        def refuse(ctx: click.Context, param: click.Parameter, value: object, *, instead: str = instead) -> None:
            if value:
                raise click.UsageError(f"{'/'.join(param.opts)} of qemu-nbd is left out: {instead}")

        command = click.option(*names, f"_{names[-1].strip('-').replace('-', '_')}", is_flag=not has_value, hidden=True,
                               expose_value=False, callback=refuse)(command)
    return command


def address(wanted: Wanted, *, any_host: str) -> str | tuple[str, int]:
    """The path of the Unix socket, or (host, port) where -b or -p or nothing was said."""
    from cowslice.serve.listeners import DEFAULT_PORT

    if wanted.unix is not None:
        if wanted.host is not None or wanted.port is not None:
            raise click.UsageError("-k excludes -b and -p: a server listens in one place")
        if not wanted.unix:
            raise click.UsageError("-k is '', expected the path of a socket")
        return wanted.unix
    host = wanted.host or any_host
    if host.startswith("[") and host.endswith("]"):  # as URIs write IPv6 addresses
        host = host[1:-1]
    return host, DEFAULT_PORT if wanted.port is None else wanted.port


def limits_of(wanted: Wanted) -> Limits:
    """What one client may ask. Raises BadOption that names the flag."""
    from cowslice.serve.transmission import Limits, check_limit
    from cowslice.units import parse_size

    given: dict[str, tuple[str, Any]] = {
        "handshake_timeout": ("--handshake-limit", wanted.handshake_limit),
        "idle_timeout": ("--idle-timeout", wanted.idle_timeout),
        "max_request": ("--max-request", parse_size(wanted.max_request, "--max-request")),
        "most_requests": ("--max-in-flight", wanted.max_in_flight),
        "most_bytes": ("--max-in-flight-bytes", parse_size(wanted.max_in_flight_bytes, "--max-in-flight-bytes")),
        "poll_max_ns": ("--poll-max-ns", wanted.poll_max_ns),
    }
    for field, (flag, value) in given.items():
        check_limit(field, value, flag)
    return Limits(**{field: value for field, (_, value) in given.items()})


def secrets(objects: tuple[str, ...]) -> tuple[str, ...]:
    """The objects that hold passphrases of images."""
    return tuple(text for text in objects if not text.startswith("tls-"))


def credentials(wanted: str, objects: tuple[str, ...], *, endpoint: str) -> Credentials:
    """What --tls-creds means: the object with this id, else a directory of certificates. Raises BadOption."""
    from cowslice.serve.tls import Certificates

    for text in objects:
        kind, _, rest = text.partition(",")
        if kind.startswith("tls-"):
            fields = parse_keyval(rest, "--object")
            if fields.pop("id", None) == wanted:
                return _of_object(kind, fields, endpoint)
    if not os.path.isdir(wanted):
        raise BadOption(f"--tls-creds is '{wanted}', expected the id of an --object tls-creds-x509 or a directory",
                        hint=f"Add --object tls-creds-x509,id={wanted},endpoint={endpoint},dir=PATH.")
    return Certificates(wanted)


def client_tls(wanted: str, objects: tuple[str, ...]) -> ssl.SSLContext:
    """What a client needs to list a server's exports. Raises BadOption, CryptoError."""
    from cowslice.serve.tls import Certificates
    from cowslice.storage.nbdtls import client_context, find_tls_files

    given = credentials(wanted, objects, endpoint="client")
    if not isinstance(given, Certificates):
        raise BadOption("-L does not take pre-shared keys, expected certificates")
    return client_context(find_tls_files(os.fspath(given.directory)), verify_peer=given.verify_peer)


def _of_object(kind: str, fields: dict[str, str], endpoint: str) -> Credentials:
    from cowslice.serve.tls import Certificates, PresharedKeys

    if kind not in TLS_OBJECTS:
        raise BadOption(f"--object is '{printable(kind)}', expected {' or '.join(TLS_OBJECTS)}")
    place = fields.pop("dir", None)
    if not place:
        raise BadOption(f"--object {kind} needs dir=PATH")
    side = fields.pop("endpoint", endpoint)
    if side != endpoint:
        raise BadOption(f"--object {kind} has endpoint={side}, expected {endpoint}")
    verify = fields.pop("verify-peer", "on")
    if verify not in ("on", "off", "yes", "no", "true", "false"):
        raise BadOption(f"--object {kind} has verify-peer={verify}, expected on or off")
    if fields:
        raise BadOption(f"--object {kind} has '{next(iter(fields))}', expected id, endpoint, dir or verify-peer")
    if kind == "tls-creds-psk":
        return PresharedKeys(place)
    return Certificates(place, verify_peer=verify in ("on", "yes", "true"))


def open_exports(images: tuple[str, ...], wanted: Wanted, given: Given, stack: ExitStack) -> list[Export]:
    """Open every image, and every snapshot that is wanted, as exports. `stack` closes the images."""
    named = _named(images, wanted)
    _refuse_contradictions(named, wanted)
    exports: list[Export] = []
    for name, image in named:
        disk = stack.enter_context(
            open_image(image, given, snapshot=snapshot_name(wanted.snapshot), writable=wanted.writable,
                       **_about_zeros(wanted)))
        if wanted.capture is not None:
            _capture(disk, wanted.capture, stack)
        exports.append(_export(disk, name, wanted, bitmaps=wanted.bitmaps))
        if wanted.all_snapshots:
            exports += [
                _export(stack.enter_context(open_image(image, given, snapshot=snapshot)), called, wanted, bitmaps=())
                for snapshot, called in _snapshots(disk, name)
            ]
    return exports


def _about_zeros(wanted: Wanted) -> dict[str, Any]:
    """What --discard and --detect-zeroes say to the library; what they do not say, --image-opts may."""
    said = {"discard": DISCARDS.get(wanted.discard or ""), "detect_zeroes": wanted.detect_zeroes}
    return {key: value for key, value in said.items() if value is not None}


def _capture(disk: Image, path: str, stack: ExitStack) -> None:
    """Record what the disk is asked, and say at the end if some of it was too fast."""
    from cowslice.cli.output import warn

    capture = disk.capture(path)

    def tell() -> None:
        if capture.lost:
            warn(f"'{path}' misses {capture.lost} requests that came faster than it could take them")

    stack.callback(tell)
    stack.enter_context(capture)


def _named(images: tuple[str, ...], wanted: Wanted) -> list[tuple[str, str]]:
    """(name of the export, image) of each argument."""
    if wanted.image_opts:
        if len(images) > 1:
            raise click.UsageError("--image-opts describes one image, expected no more")
        return [(wanted.name or "", images[0])]
    named = []
    for text in images:
        name, equals, path = text.partition("=")
        has_name = equals and "/" not in name
        named.append((name, path) if has_name else (wanted.name or "", text))
        if has_name and wanted.name is not None:
            raise click.UsageError(f"-x and '{name}=' both name the export: write one of them")
    if len({name for name, _ in named}) < len(named):
        raise click.UsageError("several images need different names: NAME=IMAGE")
    return named


def check_text(flag: str, text: str) -> None:
    """Refuse a text that the protocol cannot carry. Raises BadOption that names the flag."""
    from cowslice.errors import LocalProtocolError
    from cowslice.nbd.events import check_string

    try:
        check_string(text)
    except LocalProtocolError as fault:
        raise BadOption(f"{flag}: {fault}") from None


def _refuse_contradictions(named: list[tuple[str, str]], wanted: Wanted) -> None:
    if len(named) > 1 and (wanted.snapshot is not None or wanted.bitmaps or wanted.description):
        raise click.UsageError("-l, -B and -D are for one image, but several are given")
    if wanted.snapshot is not None and (wanted.bitmaps or wanted.all_snapshots):
        raise click.UsageError("-l excludes -B and --all-snapshots: bitmaps belong to the disk as it is now")
    if wanted.capture is not None and (len(named) > 1 or wanted.all_snapshots):
        raise click.UsageError("--capture is of one disk, but several are given")
    for flag, text in (*((f"name of the export '{printable(name)}'", name) for name, _ in named),
                       ("-D", wanted.description)):
        check_text(flag, text)
    if wanted.tls_hostname is not None:
        raise click.UsageError("--tls-hostname goes with -L only")


def _export(disk: Image, name: str, wanted: Wanted, *, bitmaps: tuple[str, ...]) -> Export:
    from cowslice.serve.exports import Export
    from cowslice.units import parse_size

    return Export(disk, name, description=wanted.description, allocation_depth=wanted.allocation_depth,
                  bitmaps=bitmaps, multi_conn=wanted.max_clients != 1, writable=wanted.writable,
                  writethrough=wanted.cache_mode in ("writethrough", "directsync"),
                  max_request=parse_size(wanted.max_request, "--max-request"))


def _snapshots(disk: Image, name: str) -> list[tuple[str, str]]:
    """(id, export name) of each internal snapshot; by its name where that can be said and is the first such."""
    if len(disk.snapshots) > MOST_SNAPSHOTS:
        raise BadOption(f"'{disk.path}' has {len(disk.snapshots)} snapshots, expected up to {MOST_SNAPSHOTS} with "
                        "--all-snapshots", hint="Serve the one you want with -l.")
    found: dict[str, str] = {}
    for snapshot in disk.snapshots:
        number = os.fsdecode(snapshot.id)
        called = snapshot.name.decode("utf-8", "replace")
        if not called or "\ufffd" in called or "\0" in called or called in found:
            called = number
        found.setdefault(called, number)
    return [(number, f"{name}@{called}") for called, number in found.items()]
