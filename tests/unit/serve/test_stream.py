"""What one send is given leaves in one piece."""

from __future__ import annotations

import socket
import threading
import time

import pytest

from cowslice.serve.stream import Stream


@pytest.fixture
def pair() -> tuple[Stream, socket.socket]:
    left, right = socket.socketpair()
    left.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    return Stream(left), right


def test_many_parts_leave_in_order_however_few_the_socket_takes(pair: tuple[Stream, socket.socket]) -> None:
    stream, other = pair
    parts = [bytes([n % 256]) * (n % 700) for n in range(3000)]
    sending = threading.Thread(target=stream.send, args=(parts,))
    sending.start()
    expected, got = b"".join(parts), b""
    while len(got) < len(expected):
        got += other.recv(1000)
    sending.join()
    assert got == expected
    stream.close()
    other.close()


def test_messages_of_many_threads_do_not_mix(pair: tuple[Stream, socket.socket]) -> None:
    stream, other = pair
    letters = b"abcdefgh"
    sending = [threading.Thread(target=stream.send, args=([bytes([one]) * 30_000, bytes([one]) * 30_000],))
               for one in letters]
    for thread in sending:
        thread.start()
    got = b""
    while len(got) < len(letters) * 60_000:
        got += other.recv(1 << 16)
    for thread in sending:
        thread.join()
    blocks = {got[n : n + 60_000] for n in range(0, len(got), 60_000)}
    assert blocks == {bytes([one]) * 60_000 for one in letters}
    stream.close()
    other.close()


def test_nobody_waits_beyond_the_deadline(pair: tuple[Stream, socket.socket]) -> None:
    stream, other = pair
    stream.set_deadline(time.monotonic() + 0.05)
    with pytest.raises(TimeoutError):
        stream.recv(1)
    with pytest.raises(TimeoutError):
        stream.set_deadline(time.monotonic() - 1)
    stream.close()
    other.close()


def test_an_abort_frees_who_waits_to_send(pair: tuple[Stream, socket.socket]) -> None:
    stream, other = pair
    stream.begin_transmission(0)
    faults: list[OSError] = []

    def send() -> None:
        try:
            stream.send([bytes(10 << 20)])
        except OSError as fault:
            faults.append(fault)

    sending = threading.Thread(target=send)
    sending.start()
    other.recv(1000)
    stream.abort()
    sending.join(20)
    assert len(faults) == 1
    stream.close()
    other.close()


def test_what_was_sent_arrives_where_more_had_come_than_anybody_read() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening, socket.socket() as theirs:
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        theirs.connect(listening.getsockname())
        stream = Stream(listening.accept()[0])
        stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        stream.send([bytes(300_000)])
        theirs.sendall(b"unread")

        def end() -> None:
            stream.settle(30)
            stream.close()

        ending = threading.Thread(target=end)
        ending.start()
        came = 0
        while data := theirs.recv(4096):
            came += len(data)
        ending.join()
    assert came == 300_000
