from typing import Any, Protocol

from cowslice.cache.slicecache import SliceCache as SliceCache
from cowslice.cache.stores import Stores

class _Readable(Protocol):
    alignment: int
    def fileno(self) -> int: ...
    def read_into(self, offset: int, buffer: bytearray) -> Any: ...

class SliceMap(Stores):
    cache: SliceCache
    clusters: int
    slice_clusters: int
    def __init__(
        self,
        cache: SliceCache,
        *,
        cluster_bits: int,
        extended_l2: bool,
        l1: bytes,
        clusters: int,
        entry_bytes: int,
        storage: _Readable,
        l1_offset: int = 0,
        readahead: bool = True,
    ) -> None: ...
    def lookup(self, cluster: int, want: int = 0x7FFFFFFF) -> tuple[int, int, int]: ...
    def resident(self, cluster: int) -> bool: ...
    def residency(self, cells: int) -> bytes: ...
    def warm(self) -> int: ...
    def stop(self) -> None: ...
