from collections.abc import Callable
from typing import Final

from cowslice.image.fastpath import FastPath
from cowslice.serve.nbd_inflight import InFlight

ENDS: Final[tuple[str, ...]]

class Loop(InFlight):
    room: int
    refusing: bool
    def __init__(
        self,
        descriptor: int,
        fast: FastPath,
        *,
        mode: int,
        size: int,
        writable: bool = ...,
        writethrough: bool = ...,
        max_request: int = ...,
        most_requests: int = ...,
        most_bytes: int = ...,
        poll_max_ns: int = ...,
        handover: Callable[[int, int, int, int, int, bytes, int, int], object],
    ) -> None: ...
    def refuse(self) -> None: ...
    def run(self, leftover: bytes = b"") -> str: ...
