"""From `-o key=value,...` of a target to the options with which an image is made, and the listing of what there is.

It does not make anything. Keys are those of qemu-img; a key may be given twice, then the last one counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cowslice.cli.options import NOTHING_MORE, Allowed, parse_keyval, secret_of
from cowslice.cli.output import say, say_fields, warn
from cowslice.errors import BadOption

if TYPE_CHECKING:
    from cowslice.image.createoptions import CreateOptions

FORMATS = ("qcow2", "raw")


@dataclass(frozen=True, slots=True)
class Key:
    """One key of -o: the field of CreateOptions that it sets, how its text is read, and what it means."""

    field: str
    kind: str
    meaning: str
    raw: bool = False


KEYS = {
    "backing_file": Key("backing_file", "path", "the image that shows through where nothing was written"),
    "backing_fmt": Key("backing_format", "text", "its format: qcow2 or raw"),
    "cluster_size": Key("cluster_size", "size", "512 to 2M; 64k"),
    "compat": Key("compat", "text", "0.10 (v2) or 1.1 (v3)"),
    "compression_type": Key("compression_type", "text", "zlib or zstd"),
    "data_file": Key("data_file", "path", "the file that keeps guest data"),
    "data_file_raw": Key("data_file_raw", "switch", "keep the data file a valid raw disk"),
    "encrypt.cipher-alg": Key("cipher_alg", "text", "cipher of LUKS, such as aes-256"),
    "encrypt.cipher-mode": Key("cipher_mode", "text", "its mode: xts, cbc, ctr, ecb"),
    "encrypt.format": Key("encryption", "text", "luks, or aes, which is weak"),
    "encrypt.hash-alg": Key("hash_alg", "text", "hash of the key derivation"),
    "encrypt.iter-time": Key("iter_time", "number", "milliseconds that opening takes; 2000"),
    "encrypt.ivgen-alg": Key("ivgen_alg", "text", "plain64, plain or essiv"),
    "encrypt.ivgen-hash-alg": Key("ivgen_hash_alg", "text", "hash of essiv"),
    "encrypt.key-secret": Key("secret", "secret", "id of the --object secret with the passphrase"),
    "encryption": Key("encryption", "switch", "the same as encrypt.format=aes"),
    "extended_l2": Key("extended_l2", "switch", "32 subclusters in each cluster"),
    "extent_size_hint": Key("extent_size_hint", "size", "for the file system: the size of its extents", raw=True),
    "lazy_refcounts": Key("lazy_refcounts", "switch", "postpone refcount updates"),
    "nocow": Key("nocow", "switch", "for the file system: no copy on write", raw=True),
    "preallocation": Key("preallocation", "text", "off, metadata, falloc or full", raw=True),
    "refcount_bits": Key("refcount_bits", "number", "1, 2, 4 ... 64; 16"),
    "size": Key("size", "size", "size of the disk", raw=True),
}
SLOT_KEYS = {
    "encrypt.iter-time": KEYS["encrypt.iter-time"],
    "encrypt.keyslot": Key("keyslot", "number", "0 to 7; by default the first free one, or those of old-secret"),
    "encrypt.new-secret": Key("new_secret", "secret", "id of the --object secret with another passphrase"),
    "encrypt.old-secret": Key("old_secret", "secret", "id of the --object secret with the one to erase"),
    "encrypt.state": Key("state", "text", "active adds a passphrase, inactive erases one"),
}


def say_keys(format_name: str) -> None:
    """Print the keys that -o takes for a format."""
    say(f"Options of a new {format_name} image, as -o KEY=VALUE,...")
    say_fields(((f"{name}=<{key.kind}>", key.meaning) for name, key in _keys_of(format_name)), indent=2)


def asks_for_keys(texts: Iterable[str]) -> bool:
    """Whether one of the -o arguments is a call for help."""
    return any(text in ("help", "?") for text in texts)


def check_format(name: str, what: str) -> None:
    """Raise BadOption unless images of this format can be made."""
    if name not in FORMATS:
        raise BadOption(f"{what} is '{name}', expected qcow2 or raw")


def parse_keys(
    format_name: str, texts: Iterable[str], objects: Iterable[str], *, more: Mapping[str, Key] | None = None
) -> dict[str, Any]:
    """The fields of CreateOptions and of `more` keys, and `size` as text, that the -o arguments give.

    Raises BadOption.
    """
    given: dict[str, str] = {}
    for text in texts:
        given.update(parse_keyval(text, "-o"))
    if "encryption" in given and "encrypt.format" in given:
        raise BadOption("-o has both encryption and encrypt.format, expected one of them")
    keys = dict(_keys_of(format_name)) | dict(more or {})
    fields: dict[str, Any] = {}
    for name, value in given.items():
        if name not in keys:
            raise BadOption(f"-o has '{name}', which no {format_name} image has", hint="-o help lists what there is.")
        fields[keys[name].field] = _read(keys[name], name, value, objects)
    return fields


def create_options(
    format_name: str, fields: dict[str, Any], *, allowed: Allowed = NOTHING_MORE,
    check_backing: bool = True, replace_data_file: bool = False, sync: bool = True,
) -> CreateOptions:
    """The record that these fields give. Raises BadOption."""
    from cowslice.image.createoptions import CreateOptions

    gate = allowed.gate()
    chosen = {name: value for name, value in fields.items() if name != "size"}
    return CreateOptions(format=format_name, gate=gate, check_backing=check_backing, sync=sync, on_warning=warn,
                         replace_data_file=replace_data_file, **chosen)


def join(fields: dict[str, Any], name: str, value: str | None, flag: str) -> None:
    """A field may be given by its own flag or by -o, not by both."""
    if value is None:
        return
    if name in fields:
        raise BadOption(f"{flag} and the same in -o are both given, expected one of them")
    fields[name] = value


def _keys_of(format_name: str) -> Iterator[tuple[str, Key]]:
    return ((name, key) for name, key in KEYS.items() if format_name == "qcow2" or key.raw)


def _read(key: Key, name: str, value: str, objects: Iterable[str]) -> Any:
    if key.kind == "switch":
        if value not in ("on", "off", "true", "false", "yes", "no"):
            raise BadOption(f"{name} is '{value}', expected on or off")
        on = value in ("on", "true", "yes")
        return ("aes" if on else None) if name == "encryption" else on
    if key.kind == "number":
        if not value.isascii() or not value.isdigit():
            raise BadOption(f"{name} is '{value}', expected a whole number")
        return int(value[:20])
    return secret_of(value, objects, name) if key.kind == "secret" else value
