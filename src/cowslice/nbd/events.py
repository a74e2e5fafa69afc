"""What the two halves of the protocol say to their callers, and the records that they agree on.

Plain frozen records: it knows no bytes. Offsets and lengths are bytes of the export.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from cowslice.errors import LocalProtocolError
from cowslice.nbd.wire import (
    BASE_ALLOCATION,
    MAX_MINIMUM_BLOCK,
    MAX_PAYLOAD,
    MAX_SIZE,
    MAX_STRING,
    U16_MAX,
    U32_MAX,
    Answer,
    ExportFlag,
    Mode,
    NbdError,
    shown,
)
from cowslice.units import is_power_of_two


class Need(Enum):
    """The event that is none: `NEED_DATA` says that more bytes must come first."""

    DATA = "data"


NEED_DATA = Need.DATA


class TlsPolicy(Enum):
    """OFF refuses TLS; OFFERED takes it and insists only for exports that say so; REQUIRED hides all before it."""

    OFF = "off"
    OFFERED = "offered"
    REQUIRED = "required"


@dataclass(frozen=True, slots=True)
class BlockSizes:
    """Size constraints of an export: alignment, good granularity, largest payload of a request, in bytes.

    Raises LocalProtocolError for what the specification forbids to advertise.
    """

    minimum: int = 1
    preferred: int = 4096
    maximum: int = MAX_PAYLOAD

    def __post_init__(self) -> None:
        fault = fault_of_block_sizes(self.minimum, self.preferred, self.maximum)
        if fault:
            raise LocalProtocolError(fault)


def fault_of_block_sizes(minimum: int, preferred: int, maximum: int) -> str:
    """What the specification ("Size constraints") forbids in these three numbers, as a sentence, or ''."""
    if not is_power_of_two(minimum) or minimum > MAX_MINIMUM_BLOCK:
        return f"minimum block size is {minimum}, expected a power of two up to {MAX_MINIMUM_BLOCK}"
    if not is_power_of_two(preferred) or preferred < max(minimum, 512):
        return f"preferred block size is {preferred}, expected a power of two of at least {max(minimum, 512)}"
    if not preferred <= maximum <= U32_MAX:
        return f"maximum payload is {maximum}, expected {preferred} to {U32_MAX}"
    return ""


def export_flags(*, writable: bool, multi_conn: bool = False) -> int:
    """The transmission flags of an image: those that qemu-nbd sets for a read-only or a writable one."""
    flags = ExportFlag.HAS_FLAGS | ExportFlag.SEND_FLUSH | ExportFlag.SEND_FUA | ExportFlag.SEND_CACHE
    if writable:
        flags |= ExportFlag.SEND_TRIM | ExportFlag.SEND_WRITE_ZEROES | ExportFlag.SEND_FAST_ZERO
    else:
        flags |= ExportFlag.READ_ONLY
    return int(flags | ExportFlag.CAN_MULTI_CONN if multi_conn else flags)


@dataclass(frozen=True, slots=True)
class Export:
    """What a server offers under one name.

    `flags` are `wire.ExportFlag` bits; SEND_DF and BLOCK_STATUS_PAYLOAD are added by what is negotiated. `contexts`
    are the names of its metadata contexts; the position is the id on the wire. `tls_only` hides it from clients without
    TLS. `sizes_required` turns away clients that do not promise to keep the block sizes.
    Raises LocalProtocolError for what cannot be said in the protocol.
    """

    name: str
    size: int
    flags: int = field(default_factory=lambda: export_flags(writable=False))
    description: str = ""
    block_sizes: BlockSizes = BlockSizes()
    contexts: tuple[str, ...] = (BASE_ALLOCATION,)
    tls_only: bool = False
    sizes_required: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.size <= MAX_SIZE:
            raise LocalProtocolError(f"export '{shown(self.name)}' has size {self.size}, expected 0 to {MAX_SIZE}")
        if not 0 <= self.flags <= U16_MAX:
            raise LocalProtocolError(f"export '{shown(self.name)}' has flags {self.flags:#x}, expected 16 bits")
        for text in (self.name, self.description, *self.contexts):
            check_string(text)
        if len(set(self.contexts)) < len(self.contexts) or not all(":" in context for context in self.contexts):
            raise LocalProtocolError(f"contexts of '{shown(self.name)}' are not distinct 'namespace:leaf' names")


def check_string(text: str) -> bytes:
    """The UTF-8 bytes of a string of ours. Raises LocalProtocolError for one the protocol cannot carry."""
    try:
        encoded = text.encode()
    except UnicodeEncodeError:
        raise LocalProtocolError(f"'{shown(text)}' cannot be written in UTF-8") from None
    if len(encoded) > MAX_STRING or b"\0" in encoded:
        raise LocalProtocolError(f"'{shown(text)}' has {len(encoded)} bytes, expected up to {MAX_STRING} and no NUL")
    return encoded


@dataclass(frozen=True, slots=True)
class Context:
    """A metadata context that was agreed on, and the number that stands for it in replies."""

    id: int
    name: str


@dataclass(frozen=True, slots=True)
class Session:
    """All that both sides agreed on when transmission begins. `flags` are the `wire.ExportFlag` bits as advertised.

    `block_sizes` are what the server enforces and the client keeps; `name` is the export's own (canonical) name.
    """

    name: str
    size: int
    flags: int
    mode: Mode = Mode.SIMPLE
    block_sizes: BlockSizes = BlockSizes()
    contexts: tuple[Context, ...] = ()
    description: str = ""
    tls: bool = False


@dataclass(frozen=True, slots=True)
class OptionAnswered:
    """The server answered an option and negotiation goes on; `data_to_send` holds the answer."""

    option: int
    answer: Answer


@dataclass(frozen=True, slots=True)
class StartTls:
    """Upgrade now: send what there is to send, run the TLS handshake, then call `tls_started`."""


@dataclass(frozen=True, slots=True)
class Aborted:
    """The client ended the negotiation: send what there is to send, then close."""


@dataclass(frozen=True, slots=True)
class Negotiated:
    """Transmission begins: send what there is to send. What came after it is in `take_leftover`."""

    session: Session
    export: Export


@dataclass(frozen=True, slots=True)
class Request:
    """A request that keeps every rule. `payload` is what a write brings; `contexts` are the ids a block status wants.

    `length` is the effect length, also where the header said that of a payload. `command` is a `wire.Command`, `flags`
    are `wire.CommandFlag` bits; plain numbers, because a client may send any.
    """

    command: int
    flags: int
    cookie: int
    offset: int
    length: int
    payload: bytes = b""
    contexts: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class BadRequest:
    """A request that breaks a rule: answer it with `error` and `reason`, then go on."""

    request: Request
    error: NbdError
    reason: str


@dataclass(frozen=True, slots=True)
class Disconnect:
    """The client is done: answer what is still under way, then close. There is no reply to this."""


# What the client's half tells


@dataclass(frozen=True, slots=True)
class Greeted:
    """The server said its first word. `fixed` False leaves EXPORT_NAME as the only option."""

    fixed: bool


@dataclass(frozen=True, slots=True)
class Accepted:
    """The server accepted an option that tells nothing."""

    option: int


@dataclass(frozen=True, slots=True)
class Refused:
    """The server refused an option. `answer` is a `wire.Answer`, or another number with bit 31; `reason` may be ''."""

    option: int
    answer: int
    reason: str


@dataclass(frozen=True, slots=True)
class ListedExport:
    """One export of a server's list."""

    name: str
    description: str


@dataclass(frozen=True, slots=True)
class ExportsListed:
    """The answer to LIST."""

    exports: tuple[ListedExport, ...]


@dataclass(frozen=True, slots=True)
class ContextsListed:
    """The answer to LIST_META_CONTEXT (ids mean nothing) or SET_META_CONTEXT (these are selected)."""

    option: int
    contexts: tuple[Context, ...]


@dataclass(frozen=True, slots=True)
class Described:
    """The answer to INFO: what a session with this export would be."""

    session: Session


@dataclass(frozen=True, slots=True)
class Ready:
    """Transmission begins. What came after the negotiation is in `take_leftover`."""

    session: Session


@dataclass(frozen=True, slots=True)
class Completed:
    """A request is answered in full. A READ without `error` has filled its buffer.

    `error_offset` is where it went wrong, where the server says so. `extents` of a BLOCK_STATUS are (length in bytes,
    status) by context id, each list from the request's offset on and not beyond the export; they may cover more or
    less than was asked for.
    """

    cookie: int
    command: int
    error: NbdError | None = None
    reason: str = ""
    error_offset: int | None = None
    extents: Mapping[int, tuple[tuple[int, int], ...]] = field(default_factory=dict)
