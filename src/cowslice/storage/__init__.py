"""Where the bytes of an image live: files, memory, anything remote, and wrappers that stack on them."""

from cowslice.storage.base import Storage
from cowslice.storage.direct import aligned_buffer
from cowslice.storage.file import FileStorage
from cowslice.storage.memory import MemoryStorage
from cowslice.storage.spans import Span

__all__ = ["FileStorage", "MemoryStorage", "Span", "Storage", "aligned_buffer"]
