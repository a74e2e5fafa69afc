"""Where the bytes of an image live: files, memory, anything remote, and wrappers that stack on them."""

from cowslice.storage.base import Storage
from cowslice.storage.direct import aligned_buffer
from cowslice.storage.file import FileStorage
from cowslice.storage.locate import local_path, locate
from cowslice.storage.memory import MemoryStorage
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
    "Span",
    "Storage",
    "WindowStorage",
    "WrappedStorage",
    "aligned_buffer",
    "local_path",
    "locate",
]
