"""From a name that a person wrote to the storage it means: a path, a file URL, or anything fsspec opens.

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
_NBD = re.compile(r"nbds?(?:\+[a-z]+)?:", re.IGNORECASE)


def locate(
    name: str | os.PathLike[str],
    mode: Mode = "r",
    *,
    direct: bool = False,
    locking: Locking = True,
    options: Mapping[str, Any] | None = None,
) -> Storage:
    """Open what `name` means. `mode`, `direct` and `locking` are those of FileStorage, `options` those of fsspec.

    A path that looks like a URL is written with `./` before it. Raises BadOption, ReadOnly or StorageError.
    """
    path = local_path(name)
    if path is not None:
        return FileStorage(path, mode, direct=direct, locking=locking)
    url = os.fspath(name)
    if mode != "r":
        raise ReadOnly(f"cannot open '{url}' for writing: what is not a local file can only be read")
    if direct:
        raise BadOption(f"direct was asked for '{url}', expected it only with a local file or block device")
    from cowslice.storage.remote import FsspecStorage  # here: a local file should not pay for it

    return FsspecStorage(url, options=options)


def local_path(name: str | os.PathLike[str]) -> str | None:
    """Return the path that `name` means here, or None if it is a URL of something else.

    Raises BadOption for descriptions (`json:`) and network devices (`nbd:`), which are not files.
    """
    text = os.fspath(name)
    if not isinstance(name, str):
        return text
    if text.startswith("json:"):
        raise BadOption(f"name is '{text}', expected a path or a URL, not a JSON description (a path? write ./{text})")
    if _NBD.match(text):
        raise BadOption(f"name is '{text}', expected a path or a URL, not an NBD export (a path? write ./{text})")
    if text[:5].lower() == "file:":
        return _path_of_url(text)
    return None if _URL.match(text) else text


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
