"""The two halves of the protocol against each other, in memory: whatever is asked, both agree on what it means."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import groupby
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from cowslice.errors import LocalProtocolError
from cowslice.nbd import (
    NEED_DATA,
    BlockSizes,
    ClientHandshake,
    ClientTransmission,
    Completed,
    Context,
    Export,
    Hole,
    Negotiated,
    Opening,
    Ready,
    Replies,
    Request,
    ServerHandshake,
    ServerTransmission,
    Session,
    Wish,
    export_flags,
)
from cowslice.nbd.assembly import Coverage
from cowslice.nbd.requests import fault_of
from cowslice.nbd.wire import (
    ALLOCATION_DEPTH,
    BASE_ALLOCATION,
    MAX_PAYLOAD,
    Command,
    CommandFlag,
    ExportFlag,
    Mode,
    NbdError,
)
from tests.unit.nbd.talk import Disk, Server, drain

SIZE = 1 << 14
CONTEXTS = (BASE_ALLOCATION, ALLOCATION_DEPTH, "qemu:dirty-bitmap:monday")

_WISHES = st.builds(
    Wish, export=st.just("disk"), extended=st.booleans(), structured=st.booleans(),
    contexts=st.lists(st.sampled_from((*CONTEXTS, "x:unknown")), unique=True).map(tuple),
)  # fmt: skip
_CUTS = st.integers(0, 1 << 32).map(random.Random)


@st.composite
def _spans(draw: st.DrawFn) -> tuple[int, int]:
    offset = draw(st.integers(0, SIZE - 1))
    return offset, draw(st.integers(1, min(SIZE - offset, 5000)))


def _disk(written: list[tuple[int, int]], granule: int = 1024) -> Disk:
    """Zeroes but for some spans."""
    content = bytearray(SIZE)
    for offset, length in written:
        content[offset : offset + length] = random.Random(offset).randbytes(length)
    return Disk(content, granule)


_WRITTEN = st.lists(_spans(), max_size=4)
_KINDS = st.sampled_from(("read", "write", "zero", "trim", "cache", "flush", "status"))
_STEPS = st.lists(st.tuples(_KINDS, _spans(), st.booleans(), st.sampled_from((None, *NbdError))), max_size=12)


_PIECES = (1, 19, 21, 300, 5000, 1 << 20)  # bytes of one delivery


class Pair:
    """A client and a server with a wire between them that cuts the stream anywhere."""

    def __init__(self, wish: Wish, disk: Disk, cuts: random.Random) -> None:
        offered = Export("disk", SIZE, export_flags(writable=True), contexts=CONTEXTS)
        self.server = Server([offered], {"disk": disk})
        self._cuts = cuts
        opening = Opening(wish)
        self._open(opening)
        self.client = ClientTransmission(self.session, opening.take_leftover())

    def _open(self, opening: Opening) -> None:
        answer = self.server.handshake.data_to_send()
        while True:
            self._deliver(answer, opening.receive)
            event = opening.next_event()
            answer = self.ask(opening.data_to_send())
            if isinstance(event, Ready):
                self.session = event.session
                return
            assert event is NEED_DATA

    def ask(self, data: bytes) -> bytes:
        answers = bytearray()
        self._deliver(data, lambda part: answers.extend(self.server.feed(part)))
        return bytes(answers)

    def _deliver(self, data: bytes, receive: Callable[[bytes], None]) -> None:
        view = memoryview(data)
        while view:
            length = self._cuts.choice(_PIECES)
            receive(bytes(view[:length]))
            view = view[length:]

    def finish(self) -> dict[int, Completed]:
        """Deliver everything, part of it straight into the buffers, and tell what came of each request."""
        answer = memoryview(self.ask(b"".join(bytes(part) for part in self.client.data_to_send())))
        done = {}
        while answer:
            view = self.client.payload_target()
            length = self._cuts.choice(_PIECES)
            if view is not None:
                length = min(length, len(view), len(answer))
                view[:length] = answer[:length]
                self.client.payload_received(length)
            else:
                self.client.receive(answer[:length])
            answer = answer[length:]
            done |= {event.cookie: event for event in drain(self.client)}
        self.client.receive_eof()
        return done


def _start(client: ClientTransmission, step: Any) -> tuple[int, Any]:
    """Send one step's request; its cookie and the buffer of a read."""
    kind, (offset, length), flag, _ = step
    buffer = bytearray(length)
    payload = random.Random(length).randbytes(length)
    if kind == "read":
        df = flag and bool(client.session.flags & ExportFlag.SEND_DF)
        return client.read(offset, memoryview(buffer), df=df), buffer
    if kind == "status" and client.session.contexts:
        return client.block_status(offset, length, one=flag), None
    ask: dict[str, Callable[[], int]] = {
        "write": lambda: client.write(offset, payload, fua=flag),
        "zero": lambda: client.write_zeroes(offset, length, no_hole=flag, fast=not flag),
        "trim": lambda: client.trim(offset, length, fua=flag),
        "cache": lambda: client.cache(offset, length),
    }
    return ask.get(kind, client.flush)(), None


def _joined(extents: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    runs = groupby(extents, key=lambda extent: extent[1])
    return tuple((sum(length for length, _ in run), state) for state, run in runs)


@given(_WISHES, _WRITTEN, _STEPS, _CUTS)
def test_every_request_does_what_it_says_and_every_answer_arrives(
    wish: Wish, written: list[tuple[int, int]], steps: list[Any], cuts: random.Random
) -> None:
    model, disk = _disk(written), _disk(written)
    pair = Pair(wish, disk, cuts)
    failing: dict[int, NbdError] = {}
    disk.verdict = lambda request: (
        (failing[request.cookie], "no luck", request.offset) if request.cookie in failing else None
    )
    started = []
    for step in steps:
        cookie, buffer = _start(pair.client, step)
        started.append((cookie, buffer))
        if step[3] is not None:
            failing[cookie] = step[3]
    done = pair.finish()
    assert list(done) == [cookie for cookie, _ in started]
    for (cookie, buffer), request in zip(started, disk.log, strict=True):
        assert isinstance(request, Request)
        assert done[cookie].error == failing.get(cookie)
        if cookie in failing:
            continue
        model.change(request)
        if buffer is not None:
            assert buffer == model.content[request.offset : request.offset + request.length]
    assert model.content == disk.content


@given(_WRITTEN, _spans(), _CUTS, st.booleans(), st.booleans())
def test_a_block_status_arrives_as_the_disk_sees_it(
    written: list[tuple[int, int]], span: tuple[int, int], cuts: random.Random, extended: bool, one: bool
) -> None:
    disk = _disk(written)
    pair = Pair(Wish("disk", extended=extended, contexts=CONTEXTS), disk, cuts)
    offset, length = span
    cookie = pair.client.block_status(offset, length, one=one)
    extents = pair.finish()[cookie].extents
    request = Request(Command.BLOCK_STATUS, 0, cookie, offset, length)
    for number, name in enumerate(CONTEXTS):
        expected = _joined(disk.extents(request, name))
        assert extents[number] == (expected[:1] if one else expected)


@given(_WRITTEN, st.lists(_spans(), min_size=1, max_size=5), st.booleans(), _CUTS)
def test_chunks_of_many_replies_arrive_in_any_order(
    written: list[tuple[int, int]], spans: list[tuple[int, int]], extended: bool, cuts: random.Random
) -> None:
    mode = Mode.EXTENDED if extended else Mode.STRUCTURED
    session = Session("disk", SIZE, export_flags(writable=False), mode)
    client, replies, disk = ClientTransmission(session), Replies(session), _disk(written, granule=512)
    buffers, chunks = [], []
    for offset, length in spans:
        buffers.append(bytearray(length))
        cookie = client.read(offset, memoryview(buffers[-1]))
        chunks.append(_shuffled_chunks(replies, Request(Command.READ, 0, cookie, offset, length), disk, cuts))
    while chunks:
        at = cuts.randrange(len(chunks))
        client.receive(chunks[at].pop(0))
        drain(client)
        chunks = [left for left in chunks if left]
    client.receive_eof()
    assert buffers == [disk.content[offset : offset + length] for offset, length in spans]


def _shuffled_chunks(replies: Replies, request: Request, disk: Disk, cuts: random.Random) -> list[bytes]:
    """The chunks of one reply, content in any order, the end last."""
    content = []
    for piece in disk.pieces(request.offset, request.length):
        if isinstance(piece, Hole):
            content.append(replies.hole(request, piece.offset, piece.length, done=False))
        else:
            head = replies.data_header(request, piece.offset, piece.length, done=False)
            content.append(head + bytes(piece.payload))
    cuts.shuffle(content)
    return [*content, replies.done(request)]


# Rules


_SESSIONS = st.builds(
    Session, name=st.just("disk"), size=st.sampled_from((0, 100, SIZE, SIZE + 100, 1 << 40, (1 << 63) - 1)),
    flags=st.integers(0, (1 << 13) - 1), mode=st.sampled_from(Mode),
    block_sizes=st.sampled_from((BlockSizes(), BlockSizes(512, 512, 4096), BlockSizes(4096, 65536, 1 << 25))),
    contexts=st.sampled_from(((), (Context(0, BASE_ALLOCATION), Context(4, "x:y")))),
)  # fmt: skip
_NUMBERS = st.one_of(
    st.integers(0, (1 << 64) - 1),
    st.builds(
        lambda base, delta: max(0, base + delta),
        st.sampled_from((0, SIZE, 1 << 32, MAX_PAYLOAD)),
        st.integers(-513, 513),
    ),
)


@given(_SESSIONS, st.integers(0, 9), st.one_of(st.just(0), st.integers(0, 65535)), _NUMBERS, _NUMBERS)
def test_what_a_server_accepts_is_safe_to_carry_out(
    session: Session, command: int, flags: int, offset: int, length: int
) -> None:
    if fault_of(session, Request(command, flags, 1, offset, length)) is not None:
        return
    assert command in set(Command)
    assert offset + length <= session.size or command == Command.DISC
    if command in (Command.WRITE, Command.TRIM, Command.WRITE_ZEROES):
        assert not session.flags & ExportFlag.READ_ONLY
    if command in (Command.READ, Command.WRITE):
        assert length <= session.block_sizes.maximum
    assert offset % session.block_sizes.minimum == 0
    assert not flags & CommandFlag.FUA or session.flags & ExportFlag.SEND_FUA
    assert flags < 32


@given(_SESSIONS, st.sampled_from(Command), st.integers(0, 1 << 17), st.integers(0, 1 << 17), st.booleans())
def test_a_client_sends_exactly_what_a_server_accepts(
    session: Session, command: Command, offset: int, length: int, flag: bool
) -> None:
    if not session.flags & ExportFlag.HAS_FLAGS or command is Command.DISC:
        return
    client, server = ClientTransmission(session), ServerTransmission(session)
    try:
        _ask_for(client, command, offset, length, flag=flag)
    except LocalProtocolError:
        assert client.data_to_send() == []
        flags = _FLAGS.get(command, 0) if flag else 0
        assert fault_of(session, Request(command, flags, 1, offset, length)) is not None
        return
    for part in client.data_to_send():
        server.receive(part)
    (event,) = drain(server)
    assert isinstance(event, Request)
    assert (event.command, event.length) == (command, 0 if command is Command.FLUSH else length)


_FLAGS = {Command.READ: 4, Command.WRITE: 1, Command.TRIM: 1, Command.WRITE_ZEROES: 16, Command.BLOCK_STATUS: 8}


def _ask_for(client: ClientTransmission, command: Command, offset: int, length: int, *, flag: bool) -> None:
    ask: dict[Command, Callable[[], int]] = {
        Command.READ: lambda: client.read(offset, memoryview(bytearray(length)), df=flag),
        Command.WRITE: lambda: client.write(offset, bytes(length), fua=flag),
        Command.FLUSH: client.flush,
        Command.TRIM: lambda: client.trim(offset, length, fua=flag),
        Command.CACHE: lambda: client.cache(offset, length),
        Command.WRITE_ZEROES: lambda: client.write_zeroes(offset, length, fast=flag),
        Command.BLOCK_STATUS: lambda: client.block_status(offset, length, one=flag),
    }
    ask[command]()


# Negotiation

_NAMES = st.sampled_from(("disk", "", "nothing", "ü" * 40))
_QUERIES = st.lists(st.sampled_from((*CONTEXTS, "base:", "qemu:", "x:unknown", "")), max_size=4)
_ASKS = st.one_of(
    st.just(ClientHandshake.structured_replies),
    st.just(ClientHandshake.extended_headers),
    st.just(ClientHandshake.list_exports),
    st.builds(lambda name: lambda client: client.info(name), _NAMES),
    st.builds(lambda name, queries: lambda client: client.list_contexts(name, queries), _NAMES, _QUERIES),
    st.builds(lambda name, queries: lambda client: client.set_contexts(name, queries), _NAMES, _QUERIES),
    st.just(lambda client: client.go("nothing")),
)


@given(st.lists(_ASKS, max_size=12), st.sampled_from(("disk", "")))
def test_after_any_negotiation_both_sides_hold_the_same_session(asks: list[Any], name: str) -> None:
    exports = [Export("disk", SIZE, export_flags(writable=True), "a disk", contexts=CONTEXTS), Export("", 512)]
    server, client = ServerHandshake(exports), ClientHandshake()
    _exchange(client, server)
    for ask in asks:
        try:
            ask(client)
        except LocalProtocolError:
            continue
        _exchange(client, server)
    client.go(name)
    (negotiated, *_), (ready, *_) = _exchange(client, server)
    assert isinstance(negotiated, Negotiated)
    assert isinstance(ready, Ready)
    assert ready.session == negotiated.session


def _exchange(client: ClientHandshake, server: ServerHandshake) -> tuple[list[Any], list[Any]]:
    """Let both talk until both are silent; what each of them told."""
    told_by_server, told_by_client = [], []
    while (answer := server.data_to_send()) or (asked := client.data_to_send()):
        if answer:
            client.receive(answer)
            told_by_client += drain(client)
            continue
        server.receive(asked)
        told_by_server += drain(server)
    return told_by_server, told_by_client


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 8)), max_size=30))
def test_coverage_is_a_set_of_bytes(pieces: list[tuple[int, int]]) -> None:
    coverage, model = Coverage(), set[int]()
    for start, length in pieces:
        piece = set(range(start, start + length))
        assert coverage.add(start, start + length) == model.isdisjoint(piece)
        if model.isdisjoint(piece):
            model |= piece
    whole = range(min(model, default=0), max(model, default=-1) + 1)
    assert coverage.is_whole(whole.start, whole.stop) == (len(model) == len(whole))
    assert coverage.islands == sum(1 for byte in model if byte - 1 not in model)
