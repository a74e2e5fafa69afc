"""What a server answers to one option, gathered until its final ACK.

It knows neither the option's order nor bytes on their way. Limits on number and bytes bound the memory that a hostile
server can make a client hold; a breach is a `BadPayload`.
"""

from __future__ import annotations

from cowslice.nbd.events import BlockSizes, Context, ListedExport, Session, fault_of_block_sizes
from cowslice.nbd.options import BadPayload, decode_context, decode_info, decode_server
from cowslice.nbd.wire import MAX_SIZE, Answer, ExportFlag, InfoType, Mode, Option, shown, word

MAX_ANSWER = 1 << 16  # bytes of one answer; strings end at 4096
MAX_ANSWERS = 1 << 16  # answers to one option, that is exports in a list
MAX_ANSWER_BYTES = 1 << 24  # of all answers to one option together

_BELONGS = {
    Answer.SERVER: (Option.LIST,),
    Answer.INFO: (Option.INFO, Option.GO),
    Answer.META_CONTEXT: (Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT),
}


class Answers:
    """The answers to one option so far."""

    __slots__ = ("_bytes", "_count", "_export", "_sizes", "_texts", "contexts", "exports")

    def __init__(self) -> None:
        self.exports: list[ListedExport] = []
        self.contexts: list[Context] = []
        self._export: tuple[int, int] | None = None
        self._sizes: BlockSizes | None = None
        self._texts: dict[int, str] = {}
        self._count = 0
        self._bytes = 0

    def check_length(self, length: int) -> None:
        """Refuse an answer by its header, before it is stored."""
        if length > MAX_ANSWER:
            raise BadPayload(f"an answer has {length} bytes, expected up to {MAX_ANSWER}")

    def add(self, option: int, answer: int, payload: bytes) -> None:
        """Take one answer that is neither an ACK nor a refusal."""
        if option not in _BELONGS.get(Answer(answer) if answer in _KNOWN else Answer.ACK, ()):
            raise BadPayload(f"answer {word(answer, Answer)} does not belong to {word(option, Option)}")
        self._count += 1
        self._bytes += len(payload)
        if self._count > MAX_ANSWERS or self._bytes > MAX_ANSWER_BYTES:
            raise BadPayload(f"{word(option, Option)} has more than {MAX_ANSWERS} answers or {MAX_ANSWER_BYTES} bytes")
        if answer == Answer.SERVER:
            self.exports.append(ListedExport(*decode_server(payload)))
        elif answer == Answer.META_CONTEXT:
            self.contexts.append(Context(*decode_context(payload)))
        else:
            self._add_info(payload)

    def _add_info(self, payload: bytes) -> None:
        kind, told = decode_info(payload)
        if isinstance(told, str):
            self._texts[kind] = told
        elif kind == InfoType.EXPORT:
            self.add_export(told[0], told[1])
        elif kind == InfoType.BLOCK_SIZE:
            fault = fault_of_block_sizes(told[0], told[1], told[2])
            if fault:
                raise BadPayload(fault)
            self._sizes = BlockSizes(told[0], told[1], told[2])

    def add_export(self, size: int, flags: int) -> None:
        """Take size and transmission flags of the export."""
        if size > MAX_SIZE:
            raise BadPayload(f"the export has {size} bytes, expected up to {MAX_SIZE}")
        if not flags & ExportFlag.HAS_FLAGS:
            raise BadPayload(f"transmission flags are {flags:#x}, expected bit 0 set")
        self._export = size, flags

    def selected(self, queries: tuple[str, ...]) -> tuple[Context, ...]:
        """The contexts that the server selected: distinct, and only what we asked for."""
        for context in self.contexts:
            if context.name not in queries:
                raise BadPayload(f"context '{shown(context.name)}' was selected, nobody asked for it")
        ids = {context.id for context in self.contexts}
        names = {context.name for context in self.contexts}
        if len(ids) < len(self.contexts) or len(names) < len(self.contexts):
            raise BadPayload("a context was selected twice")
        return tuple(self.contexts)

    def session(self, name: str, *, mode: Mode, contexts: tuple[Context, ...], tls: bool) -> Session:
        """What transmission will be like. A flag is dropped that the style of replies, or another flag, rules out."""
        if self._export is None:
            raise BadPayload("the export was accepted without its size")
        size, flags = self._export
        if mode is Mode.SIMPLE:
            flags &= ~int(ExportFlag.SEND_DF)
        if mode is not Mode.EXTENDED or not contexts:
            flags &= ~int(ExportFlag.BLOCK_STATUS_PAYLOAD)
        if not flags & ExportFlag.SEND_WRITE_ZEROES:
            flags &= ~int(ExportFlag.SEND_FAST_ZERO)
        return Session(
            name=self._texts.get(InfoType.NAME, name), size=size, flags=flags, mode=mode, contexts=contexts,
            block_sizes=self._sizes or BlockSizes(), description=self._texts.get(InfoType.DESCRIPTION, ""), tls=tls,
        )


_KNOWN = frozenset(int(answer) for answer in Answer)
