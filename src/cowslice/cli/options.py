"""Options that several verbs share, named and meant as in qemu-img, and what they become.

It does not know what a verb does with them. A bad value is a BadOption or a click.UsageError, which end with status 64.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click

from cowslice.errors import BadOption

if TYPE_CHECKING:
    from cowslice.image.gate import Gate
    from cowslice.image.options import OpenOptions

F = TypeVar("F", bound=Callable[..., Any])
MAX_SECRET_FILE = 1 << 20  # a passphrase or key file is never longer

CACHE_MODES = ("none", "writeback", "unsafe", "directsync", "writethrough")


def output_format(command: F) -> F:
    """--output=human|json."""
    return click.option("--output", type=click.Choice(["human", "json"]), default="human", show_default=True,
                        help="For people, or for programs.")(command)


def image_format(command: F) -> F:
    """-f FORMAT of an image that is read."""
    return click.option("-f", "format_name", metavar="FORMAT",
                        help="Format of the image: qcow2 or raw. Default: look.")(command)


def common(command: F) -> F:
    """--image-opts, --object, -U and -q: what every verb of qemu-img takes."""
    return _image_opts("IMAGE")(_objects(_force_share(_quiet(command))))


def changing(command: F) -> F:
    """--image-opts, --object and -q: what every verb of qemu-img takes that writes to an image."""
    return _image_opts("FILE")(_objects(_quiet(command)))


def _image_opts(argument: str) -> Callable[[F], F]:
    return click.option("--image-opts", is_flag=True, help=f"{argument} is 'driver=qcow2,file.filename=PATH,...'.")


_objects = click.option("--object", "objects", multiple=True, metavar="OBJECT",
                        help="'secret,id=ID,data=TEXT' or 'secret,id=ID,file=PATH': a passphrase, named by "
                             "encrypt.key-secret=ID.")
_force_share = click.option("-U", "--force-share", is_flag=True, help="Read even while another program writes.")
_quiet = click.option("-q", "--quiet", is_flag=True, help="Print no result, only errors.")


def chain(command: F) -> F:
    """What the image names may be opened, as one record `allowed`: --allow DIR, --allow-any and --allow-network."""
    @wraps(command)
    def with_allowed(*positional: Any, allowed: tuple[str, ...], allow_any: bool, allow_network: bool,
                     **named: Any) -> Any:
        return command(*positional, allowed=Allowed(allowed, allow_any, allow_network), **named)

    made = cast(F, with_allowed)
    for option in reversed((
        click.option("--allow", "allowed", multiple=True, metavar="DIR", type=click.Path(file_okay=False),
                     help="Also follow backing and data files under DIR. Default: only under the image's own folder."),
        click.option("--allow-any", is_flag=True,
                     help="Follow any local file that the image names. Only for images you trust."),
        click.option("--allow-network", is_flag=True,
                     help="Follow URLs that the image names (nbd:, http:, s3: and more). Only for images you trust."),
    )):
        made = option(made)
    return made


@dataclass(frozen=True, slots=True)
class Allowed:
    """What an image may name beside what lies in its own folder."""

    folders: tuple[str, ...] = ()
    any_file: bool = False
    network: bool = False

    def gate(self) -> Gate:
        """The gate that permits it."""
        from cowslice.image.gate import FolderGate, PermitGate

        if self.any_file:
            return PermitGate(network=self.network)
        return FolderGate(self.folders, network=self.network)


NOTHING_MORE = Allowed()
HOW_TO_PERMIT = "If you trust the image, permit it: a file with --allow DIR or --allow-any, a URL with --allow-network."


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """The shared options as they were given on the command line."""

    format_name: str | None = None
    image_opts: bool = False
    objects: tuple[str, ...] = ()
    force_share: bool = False
    allowed: Allowed = NOTHING_MORE
    direct: bool = False


@dataclass(frozen=True, slots=True)
class Named:
    """One image named on the command line: its path or URL, and the options that came with the name."""

    name: str
    options: dict[str, str]

    @property
    def shown(self) -> str:
        """The name as results repeat it."""
        return self.name


def snapshot_name(text: str | None) -> str | None:
    """What -l names: an id or name, plain or behind snapshot.id= or snapshot.name=."""
    if text is None:
        return None
    for prefix in ("snapshot.id=", "snapshot.name="):
        if text.startswith(prefix):
            return text[len(prefix) :]
    return text


def parse_keyval(text: str, what: str) -> dict[str, str]:
    """'a=1,b=2' as a dictionary; ',,' is a comma inside a value. Raises BadOption that names `what`."""
    parsed: dict[str, str] = {}
    for part in _split_commas(text):
        key, equals, value = part.partition("=")
        if not equals or not key:
            raise BadOption(f"{what} has '{part}', expected KEY=VALUE separated by commas")
        parsed[key] = value
    return parsed


def name_image(text: str, given: Given) -> Named:
    """What an IMAGE argument names. Raises BadOption for descriptions that do not name a file."""
    if not given.image_opts:
        return Named(text, {"driver": given.format_name} if given.format_name else {})
    if given.format_name:
        raise click.UsageError("-f and --image-opts exclude each other: write driver=FORMAT")
    options = parse_keyval(text, "--image-opts")
    name = options.pop("file.filename", None) or options.pop("filename", None)
    if not name:
        raise BadOption("--image-opts names no file, expected file.filename=PATH")
    protocol = options.pop("file.driver", "file")
    if protocol not in ("file", "host_device", "http", "https"):
        raise BadOption(f"file.driver is '{protocol}', expected file, host_device, http or https")
    if options.pop("file.locking", "on") == "off":
        options.setdefault("force-share", "on")
    return Named(name, options)


@dataclass(frozen=True, slots=True)
class FileOptions:
    """How one file is opened that is only looked at as a file: by `info` and `check`."""

    format_name: str | None
    force_share: bool
    direct: bool


def file_options(named: Named, given: Given) -> FileOptions:
    """The options of a file whose content stays closed. Raises BadOption for one that no image has."""
    taken = _taken_options(named.options, given)
    force_share = taken.get("force_share", given.force_share)
    return FileOptions(taken.get("format"), force_share, taken.get("direct", given.direct))


def open_options(named: Named, given: Given, **more: Any) -> OpenOptions:
    """The options with which the library opens a named image. Raises BadOption for an option that it does not know."""
    from cowslice.image.options import OpenOptions

    taken = _taken_options(named.options, given)
    fields: dict[str, Any] = {"gate": given.allowed.gate(), "force_share": given.force_share, "direct": given.direct}
    return OpenOptions(**{**fields, **taken, **more})


_SIZES = ("cache-size", "l2-cache-size", "refcount-cache-size", "l2-cache-entry-size")
_DISCARDS = {"on": "unmap", "off": "ignore"}  # what QEMU calls the same
# Options of qemu's qcow2 driver that are accepted, because what a disk holds does not depend on them.
_WITHOUT_EFFECT = ("lazy-refcounts", "overlap-check", "read-only", "auto-read-only", "node-name", "cache.no-flush")
_SWITCHES = ("force-share", "discard-no-unref", "pass-discard-request", "pass-discard-snapshot", "pass-discard-other")


def _taken_options(options: dict[str, str], given: Given) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for key, value in options.items():
        if key == "driver":
            fields["format"] = value
        elif key in _SIZES:
            fields[key.replace("-", "_")] = value
        elif key == "cache-clean-interval":
            fields["cache_clean_interval"] = _whole_number(value, key)
        elif key in _SWITCHES:
            fields[key.replace("-", "_")] = _switch(value, key)
        elif key == "discard":
            fields["discard"] = _DISCARDS.get(value, value)
        elif key == "detect-zeroes":
            fields["detect_zeroes"] = value
        elif key == "cache.direct":
            fields["direct"] = _switch(value, key)
        elif key == "encrypt.key-secret":
            fields["secret"] = secret_of(value, given.objects)
        elif key == "backing":
            _expect_null(value)
            fields["backing"] = None
        elif key in ("backing.file.filename", "backing.filename"):
            fields["backing"] = value
        elif key == "backing.driver":
            fields["backing_format"] = value
        elif key in ("data-file.filename", "data-file.file.filename"):
            fields["data_file"] = value
        elif key not in _WITHOUT_EFFECT and key not in ("encrypt.format", "data-file.driver", "backing.file.driver"):
            raise BadOption(f"--image-opts has '{key}', which is no option of an image that is read")
    return fields


def secret_of(name: str, objects: Iterable[str], key: str = "encrypt.key-secret") -> bytes:
    """The passphrase of the --object that has this id. Raises BadOption when there is none, or it cannot be used."""
    for text in objects:
        kind, _, rest = text.partition(",")
        if kind not in ("secret", "qom-type=secret"):
            raise BadOption(f"--object is '{kind}', expected secret")
        fields = parse_keyval(rest, "--object")
        if fields.get("id") == name:
            return _secret_bytes(fields)
    raise BadOption(f"{key} is '{name}', expected the id of an --object secret",
                    hint=f"Add --object secret,id={name},file=PATH.")


def _secret_bytes(fields: dict[str, str]) -> bytes:
    form = fields.get("format", "raw")
    if form not in ("raw", "base64"):
        raise BadOption(f"--object secret has format '{form}', expected raw or base64")
    if "keyid" in fields:
        raise BadOption("--object secret has a keyid, but encrypted secrets are not supported")
    if ("data" in fields) == ("file" in fields):
        raise BadOption("--object secret needs either data=TEXT or file=PATH")
    raw = os.fsencode(fields["data"]) if "data" in fields else _secret_file(fields["file"])
    if form == "raw":
        return raw
    from base64 import b64decode

    try:
        return b64decode(raw, validate=False)
    except ValueError:
        raise BadOption("--object secret says format=base64, but its data is not that") from None


def _secret_file(path: str) -> bytes:
    from cowslice.errors import StorageError

    try:
        with open(path, "rb") as file:
            return file.read(MAX_SECRET_FILE)
    except OSError as error:
        raise StorageError.of(error, "read the secret in", path) from error


def _split_commas(text: str) -> list[str]:
    """Parts between single commas; two commas stand for one."""
    parts = [part.replace("\0", ",") for part in text.replace(",,", "\0").split(",")]
    return [part for part in parts if part]


def _switch(value: str, key: str) -> bool:
    if value not in ("on", "off", "true", "false", "yes", "no"):
        raise BadOption(f"{key} is '{value}', expected on or off")
    return value in ("on", "true", "yes")


def _whole_number(value: str, key: str) -> int:
    if not value.isascii() or not value.isdigit():
        raise BadOption(f"{key} is '{value}', expected a whole number")
    return int(value)


def _expect_null(value: str) -> None:
    if value not in ("", "null"):
        raise BadOption(f"backing is '{value}', expected null, or backing.file.filename=PATH")
