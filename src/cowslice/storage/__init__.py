"""Where the bytes of an image live: files, memory, NBD exports, anything remote, and wrappers that stack on them."""

from __future__ import annotations

import sys
from types import ModuleType

TYPE_CHECKING = False  # each name is imported when it is asked for: a program that wants one pays for one
if TYPE_CHECKING:
    from cowslice.storage.base import Storage
    from cowslice.storage.direct import aligned_buffer
    from cowslice.storage.file import FileStorage
    from cowslice.storage.locate import local_path, locate
    from cowslice.storage.memory import MemoryStorage
    from cowslice.storage.nbd import NbdStorage
    from cowslice.storage.remote import FsspecStorage
    from cowslice.storage.spans import Span
    from cowslice.storage.wrappers import CountingStorage, Counts, LimitedStorage, WindowStorage, WrappedStorage

__all__ = [
    "Counts",
    "CountingStorage",
    "FileStorage",
    "FsspecStorage",
    "LimitedStorage",
    "MemoryStorage",
    "NbdStorage",
    "Span",
    "Storage",
    "WindowStorage",
    "WrappedStorage",
    "aligned_buffer",
    "local_path",
    "locate",
]

_HOMES = {
    "Storage": "base",
    "aligned_buffer": "direct",
    "FileStorage": "file",
    "local_path": "locate",
    "locate": "locate",
    "MemoryStorage": "memory",
    "NbdStorage": "nbd",
    "FsspecStorage": "remote",
    "Span": "spans",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'cowslice.storage' has no attribute '{name}'")
    from importlib import import_module

    found: object = getattr(import_module("cowslice.storage." + _HOMES.get(name, "wrappers")), name)
    globals()[name] = found
    return found


class _Door(ModuleType):
    """Keeps `locate` the function: importing the file of that name would put the module in its place."""

    def __setattr__(self, name: str, value: object) -> None:
        if name != "locate" or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Door
