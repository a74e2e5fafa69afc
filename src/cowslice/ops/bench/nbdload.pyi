from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

LATENCY_BUCKETS: Final[int]
MOST_DEPTH: Final[int]

class Load:
    def __init__(
        self,
        descriptor: int,
        *,
        start: int,
        span: int,
        length: int,
        depth: int,
        first: int = 0,
        step: int = 0,
        seed: int = 0,
        write_percent: int = 0,
        count: int = 0,
        seconds: float = 0.0,
        structured: bool = False,
        content: ReadableBuffer | None = None,
    ) -> None: ...
    def run(self) -> None: ...
    def stop(self) -> None: ...
    def counters(self) -> dict[str, Any]: ...

def latency_floor(bucket: int) -> int: ...
