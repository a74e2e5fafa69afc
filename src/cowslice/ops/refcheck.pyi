from _typeshed import ReadableBuffer, WriteableBuffer

UNREADABLE: int
SATURATED: int

class Trail:
    follows: int
    fresh: int

class Tally:
    first: int
    clusters: int
    def __init__(self, first: int, clusters: int, limit: int) -> None: ...
    def load(self, cluster: int, block: ReadableBuffer, order: int) -> None: ...
    def unreadable(self, cluster: int, clusters: int) -> int: ...
    def add(self, cluster: int, clusters: int = 1, times: int = 1) -> tuple[int, int]: ...
    def get(self, cluster: int) -> tuple[int, int]: ...
    @property
    def passed(self) -> tuple[tuple[int, int], tuple[int, int]]: ...
    def mismatch(
        self, cluster: int, *, leaks: bool = True, corruptions: bool = True
    ) -> tuple[int, int, int, int] | None: ...
    def put(
        self,
        cluster: int,
        block: WriteableBuffer,
        order: int,
        *,
        up: bool = False,
        down: bool = False,
        fresh: bool = False,
    ) -> tuple[int, int]: ...
    def highest(self) -> int: ...
    def scan(
        self,
        table: ReadableBuffer,
        *,
        cluster_bits: int,
        extended: bool,
        data_file: bool,
        file_length: int,
        active: bool,
        shared: bool,
        times: int = 1,
        visits: int = 1,
        copied: int = 0,
        described: int = 0,
        trail: Trail | None = None,
    ) -> tuple[list[int], list[tuple[int, int, int]], int, int, int, int]: ...

class Owners:
    clusters: int
    def __init__(self, clusters: int) -> None: ...
    def own(self, cluster: int, clusters: int = 1) -> bool: ...
    def scan(self, table: ReadableBuffer, *, cluster_bits: int) -> tuple[int, int] | None: ...
    def agree(self, cluster: int, clusters: int, block: ReadableBuffer | None, order: int) -> bool: ...
    def highest(self) -> int: ...
