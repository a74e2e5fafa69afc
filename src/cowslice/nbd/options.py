"""What options and their answers carry, as bytes and as records, for both halves.

It knows no order of messages and does not judge what is asked for. A payload that breaks its layout raises
`BadPayload`, which says how a server answers it.
"""

from __future__ import annotations

from dataclasses import dataclass
from struct import Struct

from cowslice.errors import RemoteProtocolError
from cowslice.nbd.events import check_string
from cowslice.nbd.wire import (
    MAX_QUERIES,
    MAX_STRING,
    OPTION,
    OPTION_MAGIC,
    OPTION_REPLY,
    OPTION_REPLY_MAGIC,
    U16,
    U32,
    Answer,
    InfoType,
    shown,
)

_EXPORT = Struct(">HQH")  # information type, size, flags
_BLOCK_SIZE = Struct(">HIII")  # information type, minimum, preferred, maximum


class BadPayload(RemoteProtocolError):
    """An option's payload is not what it must be. `answer` is what a server replies."""

    def __init__(self, message: str, *, answer: Answer = Answer.ERR_INVALID) -> None:
        super().__init__(message)
        self.answer = answer


@dataclass(frozen=True, slots=True)
class ExportWish:
    """Payload of GO and INFO: an export and what is to be told of it, as `wire.InfoType` numbers."""

    name: str
    wanted: frozenset[int]


@dataclass(frozen=True, slots=True)
class ContextWish:
    """Payload of LIST_META_CONTEXT and SET_META_CONTEXT."""

    name: str
    queries: tuple[str, ...]


class _Fields:
    """Reads one payload from front to back."""

    def __init__(self, payload: bytes, where: str) -> None:
        self._payload = payload
        self._at = 0
        self._where = where

    def take(self, length: int) -> bytes:
        left = len(self._payload) - self._at
        if length > left:
            raise BadPayload(f"{self._where} ends {length - left} bytes too early")
        self._at += length
        return self._payload[self._at - length : self._at]

    def u16(self) -> int:
        return int.from_bytes(self.take(2), "big")

    def u32(self) -> int:
        return int.from_bytes(self.take(4), "big")

    def string(self, length: int) -> str:
        return decode_string(self.take(length), self._where)

    def rest(self) -> bytes:
        return self.take(len(self._payload) - self._at)

    def end(self) -> None:
        left = len(self._payload) - self._at
        if left:
            raise BadPayload(f"{self._where} has {left} bytes too many")


def decode_string(encoded: bytes, where: str) -> str:
    """A string of the protocol: UTF-8 without NUL, up to 4096 bytes. Raises BadPayload."""
    if len(encoded) > MAX_STRING:
        raise BadPayload(
            f"{where} has a string of {len(encoded)} bytes, expected up to {MAX_STRING}", answer=Answer.ERR_TOO_BIG
        )
    try:
        text = encoded.decode()
    except UnicodeDecodeError:
        raise BadPayload(f"{where} has a string that is not UTF-8") from None
    if "\0" in text:
        raise BadPayload(f"{where} has a string with a NUL in it")
    return text


def encode_option(option: int, payload: bytes = b"") -> bytes:
    """An option as a client sends it."""
    return OPTION.pack(OPTION_MAGIC, option, len(payload)) + payload


def encode_answer(option: int, answer: int, payload: bytes = b"") -> bytes:
    """One reply to an option as a server sends it."""
    return OPTION_REPLY.pack(OPTION_REPLY_MAGIC, option, answer, len(payload)) + payload


def encode_export_wish(wish: ExportWish) -> bytes:
    """The payload of GO and INFO."""
    wanted = b"".join(U16.pack(kind) for kind in sorted(wish.wanted))
    return _counted(wish.name) + U16.pack(len(wish.wanted)) + wanted


def decode_export_wish(payload: bytes, where: str) -> ExportWish:
    """Read the payload of GO and INFO. Raises BadPayload."""
    fields = _Fields(payload, where)
    name = fields.string(fields.u32())
    wanted = frozenset(fields.u16() for _ in range(fields.u16()))
    fields.end()
    return ExportWish(name, wanted)


def encode_context_wish(wish: ContextWish) -> bytes:
    """The payload of LIST_META_CONTEXT and SET_META_CONTEXT."""
    queries = b"".join(_counted(query) for query in wish.queries)
    return _counted(wish.name) + U32.pack(len(wish.queries)) + queries


def decode_context_wish(payload: bytes, where: str) -> ContextWish:
    """Read the payload of LIST_META_CONTEXT and SET_META_CONTEXT. Raises BadPayload."""
    fields = _Fields(payload, where)
    name = fields.string(fields.u32())
    count = fields.u32()
    if count > MAX_QUERIES:
        raise BadPayload(f"{where} has {count} queries, expected up to {MAX_QUERIES}", answer=Answer.ERR_TOO_BIG)
    queries = tuple(fields.string(fields.u32()) for _ in range(count))
    fields.end()
    return ContextWish(name, queries)


def encode_server(name: str, description: str) -> bytes:
    """The payload of a SERVER answer: one export of a list."""
    return _counted(name) + check_string(description)


def decode_server(payload: bytes) -> tuple[str, str]:
    """Name and description in a SERVER answer. Raises BadPayload; what follows a name may be no text."""
    fields = _Fields(payload, "an export in the list")
    name = fields.string(fields.u32())
    return name, _display(fields.rest())


def encode_context(context: int, name: str) -> bytes:
    """The payload of a META_CONTEXT answer."""
    return U32.pack(context) + check_string(name)


def decode_context(payload: bytes) -> tuple[int, str]:
    """Id and name in a META_CONTEXT answer. Raises BadPayload."""
    fields = _Fields(payload, "a metadata context")
    return fields.u32(), decode_string(fields.rest(), "a metadata context")


def encode_export_info(size: int, flags: int) -> bytes:
    """The payload of an INFO answer of type EXPORT."""
    return _EXPORT.pack(InfoType.EXPORT, size, flags)


def encode_block_sizes(minimum: int, preferred: int, maximum: int) -> bytes:
    """The payload of an INFO answer of type BLOCK_SIZE."""
    return _BLOCK_SIZE.pack(InfoType.BLOCK_SIZE, minimum, preferred, maximum)


def encode_text_info(kind: InfoType, text: str) -> bytes:
    """The payload of an INFO answer of type NAME or DESCRIPTION."""
    return U16.pack(kind) + check_string(text)


def decode_info(payload: bytes) -> tuple[int, tuple[int, ...] | str]:
    """Type of an INFO answer, and its numbers or its text; () for a type nobody here knows. Raises BadPayload."""
    fields = _Fields(payload, "an INFO answer")
    kind = fields.u16()
    if kind in (InfoType.EXPORT, InfoType.BLOCK_SIZE):
        layout = _EXPORT if kind == InfoType.EXPORT else _BLOCK_SIZE
        if len(payload) != layout.size:
            raise BadPayload(f"an INFO answer of type {kind} has {len(payload)} bytes, expected {layout.size}")
        return kind, layout.unpack(payload)[1:]
    if kind == InfoType.NAME:
        return kind, decode_string(fields.rest(), "the name of an export")
    if kind == InfoType.DESCRIPTION:
        return kind, _display(fields.rest())
    return kind, ()


def decode_error_text(payload: bytes) -> str:
    """The sentence that may come with a refusal, made fit to be shown."""
    return _display(payload)


def _display(encoded: bytes) -> str:
    text = encoded[:MAX_STRING].decode("utf-8", "replace")
    return "".join(letter if letter.isprintable() else " " for letter in text).strip()


def _counted(text: str) -> bytes:
    encoded = check_string(text)
    return U32.pack(len(encoded)) + encoded


def unknown_export(name: str) -> str:
    """The sentence for an export that is not there."""
    return f"there is no export '{shown(name)}'"
