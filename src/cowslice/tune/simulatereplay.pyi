import numpy as np
from numpy.typing import NDArray

class Replay:
    def add(
        self,
        first: NDArray[np.uint64],
        last: NDArray[np.uint64],
        writes: NDArray[np.uint8],
        missed: NDArray[np.uint16],
    ) -> None: ...
    @property
    def counts(self) -> tuple[int, int, int, int]: ...

class QemuReplay(Replay):
    def __init__(self, span_bits: int, *, slices: int, entries: int) -> None: ...

class MapReplay(Replay):
    def __init__(
        self,
        span_bits: int,
        *,
        budget: int,
        policy: str,
        sizes: NDArray[np.uint16],
        mapped: NDArray[np.uint8],
        entry_bytes: int,
        group: int,
        per_table: int,
        readahead: bool,
    ) -> None: ...

def weigh(
    table: bytearray | bytes | memoryview,
    slice_bytes: int,
    cluster_bits: int,
    extended: bool,
    sizes: NDArray[np.uint16],
) -> None: ...
def directory_bytes(slices: int) -> int: ...
