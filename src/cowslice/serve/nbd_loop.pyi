from collections.abc import Callable
from typing import Any, Final

from cowslice.image.fastpath import FastPath
from cowslice.serve.nbd_answering import Answering

ENDS: Final[tuple[str, ...]]

class Loop(Answering):
    fault: BaseException | None
    def __init__(
        self,
        descriptor: int,
        fast: FastPath,
        *,
        mode: int,
        size: int,
        writable: bool = ...,
        max_request: int = ...,
        most_requests: int = ...,
        most_bytes: int = ...,
        idle: float = ...,
        poll_max_ns: int = ...,
        handover: Callable[[int, int, int, int, int, bytes], object],
    ) -> None: ...
    def run(self, leftover: bytes = b"") -> str: ...
    def reply(self, *parts: bytes | bytearray | memoryview) -> bool: ...
    def finish(self, length: int) -> None: ...
    def stop(self) -> None: ...
    def abandon(self) -> None: ...
    def counters(self) -> dict[str, Any]: ...
