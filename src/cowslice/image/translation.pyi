from cowslice.cache.slicemap import SliceMap
from cowslice.codec.evp import EvpCipher
from cowslice.image.inflated import InflatedClusters
from cowslice.storage.base import Storage

class Translation:
    size: int
    writes_in_place: bool
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
        cipher: EvpCipher | None = None,
        guest_sectors: bool = False,
        inflated: InflatedClusters | None = None,
        number: int = 0,
        zstd: bool = False,
    ) -> None: ...
    def add_raw(self, *, size: int, data: Storage) -> None: ...
