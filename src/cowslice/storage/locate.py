"""From a name that a person wrote to the storage it means: a path, a file URL, an NBD export, or what fsspec opens.

It does not know what an image may name: names found inside images pass a gate before they come here.
A name is a URL only if it has `://`; every other one is a path, colons and all.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from cowslice.errors import BadOption, ReadOnly
from cowslice.storage.base import Storage
from cowslice.storage.file import FileStorage, Locking, Mode

_URL = re.compile(r"(?:[a-z][a-z0-9+.-]*::)*[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_NBD = re.compile(r"nbds?(?:\+[a-z]+)?:(//)?", re.IGNORECASE)
_NBD_OPTIONS = ("ca", "cert", "key", "timeout", "connections")


def locate(
    name: str | os.PathLike[str],
    mode: Mode = "r",
    *,
    direct: bool = False,
    locking: Locking = True,
    options: Mapping[str, Any] | None = None,
) -> Storage:
    """Open what `name` means. `mode`, `direct` and `locking` are those of FileStorage.

    `options` are those of NbdStorage, or of fsspec. A path that looks like a URL is written with `./` before it.
    Raises BadOption, ReadOnly or StorageError; for an NBD export RemoteProtocolError and CryptoError too.
    """
    path = local_path(name)
    if path is not None:
        return FileStorage(path, mode, direct=direct, locking=locking)
    url = os.fspath(name)
    if direct:
        raise BadOption(f"direct was asked for '{url}', expected it only with a local file or block device")
    if _NBD.match(url):
        return _export(url, mode, options or {})
    if mode != "r":
        raise ReadOnly(f"cannot open '{url}' for writing: over fsspec files can only be read")
    from cowslice.storage.remote import FsspecStorage  # here: a local file should not pay for it

    return FsspecStorage(url, options=options)


def local_path(name: str | os.PathLike[str]) -> str | None:
    """Return the path that `name` means here, or None if it is a URL of something else.

    Raises BadOption for descriptions (`json:`) and for `nbd:HOST:PORT`, which is no URL.
    """
    text = os.fspath(name)
    if not isinstance(name, str):
        return text
    if text.startswith("json:"):
        raise BadOption(f"name is '{text}', expected a path or a URL, not a JSON description (a path? write ./{text})")
    nbd = _NBD.match(text)
    if nbd and not nbd[1]:
        raise BadOption(f"name is '{text}', expected a path or a URL, an NBD export as nbd://HOST[:PORT]/EXPORT or "
                        f"nbd+unix:///EXPORT?socket=PATH (a path? write ./{text})")
    if text[:5].lower() == "file:":
        return _path_of_url(text)
    return None if _URL.match(text) else text


def _export(url: str, mode: Mode, options: Mapping[str, Any]) -> Storage:
    from cowslice.storage.nbd import NbdStorage

    if unknown := options.keys() - _NBD_OPTIONS:
        raise BadOption(f"options for '{url}' have {sorted(unknown)}, expected some of {', '.join(_NBD_OPTIONS)}")
    return NbdStorage(url, mode, **options)


def _path_of_url(text: str) -> str:
    """The path of file:///path and file://localhost/path, percent-decoded, or of file:path, taken as it is."""
    rest = text[5:]
    if not rest.startswith("//"):
        return rest
    host, slash, path = rest[2:].partition("/")
    if host not in ("", "localhost") or not slash:
        raise BadOption(f"name is '{text}', expected file:///path of this machine")
    from urllib.parse import unquote

    return unquote(slash + path)
