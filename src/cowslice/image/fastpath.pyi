from typing import TYPE_CHECKING

from cowslice.cache.slicemap import SliceMap
from cowslice.image.inflated import InflatedClusters
from cowslice.storage.base import Storage

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

class FastPath:
    size: int
    def __init__(self) -> None: ...
    def add_qcow2(
        self,
        slices: SliceMap,
        *,
        size: int,
        data: Storage | None,
        cluster_bits: int,
        extended_l2: bool,
        version: int,
        data_file: bool,
        opaque: bool,
        inflated: InflatedClusters | None = None,
        number: int = 0,
    ) -> None: ...
    def add_raw(self, *, size: int, data: Storage) -> None: ...
    def read_into(self, offset: int, buffer: WriteableBuffer, start: int = 0) -> int: ...
    def read_many(self, offsets: ReadableBuffer, length: int, out: WriteableBuffer, depth: int = 1) -> list[int]: ...
    def close(self) -> None: ...
