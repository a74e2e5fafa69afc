"""The server as a whole: where it listens, whom it lets in, and how it ends."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

import cowslice
from cowslice.errors import BadOption, StorageError
from cowslice.nbd.wire import Command, CommandFlag, ExportFlag
from cowslice.serve.exports import Export
from cowslice.serve.listeners import activated, adopted, listen_tcp, listen_unix
from cowslice.serve.server import Server, serve
from cowslice.serve.stream import Stream
from cowslice.serve.tls import Certificates
from cowslice.serve.transmission import Limits
from cowslice.storage import FileStorage
from cowslice.testing.faults import HeldStorage
from tests.unit.serve.rawclient import PATIENCE, RawClient, connect, connected_to, model, wired

K = 1 << 16
IMAGE = model("NNZ.NNNN")
CONTENT = IMAGE.over(b"")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made = tmp_path / "disk.qcow2"
    made.write_bytes(IMAGE.file)
    return made


@pytest.fixture
def disk(path: Path) -> Iterator[cowslice.Image]:
    with cowslice.open(path) as opened:
        yield opened


@pytest.fixture
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A short path for a socket: the kernel takes 107 bytes."""
    name = f"/tmp/cowslice-test-{os.getpid()}-{time.monotonic_ns()}"
    yield name
    assert not os.path.lexists(name), "the socket's file is left"


def eventually(true: Callable[[], bool]) -> bool:
    end = time.monotonic() + PATIENCE
    while not true() and time.monotonic() < end:
        time.sleep(0.005)
    return true()


def test_a_disk_is_served_by_calling_the_package(disk: cowslice.Image, place: str) -> None:
    with cowslice.serve(disk, unix=place) as server:
        assert server.uri == f"nbd+unix:///?socket={place}"
        assert connect(place).read(5, 50).data == CONTENT[5:55]


@pytest.mark.parametrize("host, family", [("127.0.0.1", "nbd://127.0.0.1:"), ("::1", "nbd://[::1]:")])
def test_a_disk_is_served_over_tcp(disk: cowslice.Image, host: str, family: str) -> None:
    try:
        server = serve(disk, host=host, port=0, name="root disk")
    except BadOption:
        pytest.skip(f"no {host} here")
    with server:
        assert server.uri.startswith(family)
        assert server.uri.endswith("/root%20disk")
        port = int(server.uri.rpartition(":")[2].partition("/")[0])
        with socket.create_connection((host, port), PATIENCE) as connected:
            assert RawClient(connected, export="root disk").read(0, 9).data == CONTENT[:9]


def test_several_disks_are_told_apart_by_name(disk: cowslice.Image, path: Path, place: str) -> None:
    with cowslice.open(path) as other, serve({"a": disk, "b": other}, unix=place) as server:
        assert [uri.partition("?")[0] for uri in server.uris] == ["nbd+unix:///a", "nbd+unix:///b"]
        assert connect(place, export="b").session.name == "b"
        with pytest.raises(AssertionError, match="Refused"):
            connect(place, export="c")


def test_two_exports_of_one_name_are_refused(disk: cowslice.Image, place: str) -> None:
    with pytest.raises(BadOption, match="two exports"):
        serve([Export(disk, "x"), Export(disk, "x")], unix=place)


@pytest.mark.parametrize("options", [
    {}, {"max_clients": -1, "port": 0}, {"port": 70000}, {"host": "no.such.name.invalid"}])
def test_a_server_that_cannot_be_is_refused(disk: cowslice.Image, options: dict[str, object]) -> None:
    with pytest.raises(BadOption):
        serve(disk, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [
    {"handshake_timeout": -1}, {"idle_timeout": float("nan")}, {"max_request": 1}, {"most_requests": 0}, {"workers": 0},
])
def test_a_limit_that_cannot_be_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(BadOption, match=next(iter(options))):
        Limits(**options)  # type: ignore[arg-type]


def test_more_clients_than_allowed_wait_for_their_turn(disk: cowslice.Image, place: str) -> None:
    with serve(disk, unix=place, max_clients=1) as server:
        first = connect(place)
        assert not first.session.flags & ExportFlag.CAN_MULTI_CONN
        came: list[RawClient] = []
        second = threading.Thread(target=lambda: came.append(connect(place)))
        second.start()
        second.join(0.2)
        assert (came, server.connections) == ([], 1)
        first.socket.close()
        second.join(PATIENCE)
        assert came[0].read(0, 3).data == CONTENT[:3]


def test_a_client_counts_before_it_hears_of_it(disk: cowslice.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a server that serves once could end under a client that has just come."""
    counted: list[bool] = []
    with wired(disk) as wire:
        def send(stream: Stream, parts: Sequence[bytes]) -> None:
            counted.append(wire.connection.negotiated)
            plain(stream, parts)

        plain = Stream.send
        monkeypatch.setattr(Stream, "send", send)
        wire.client()
        assert counted[-1]


def test_one_that_serves_once_ends_with_its_last_client(disk: cowslice.Image, place: str) -> None:
    with serve(disk, unix=place, persistent=False) as server:
        looking = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        looking.connect(place)
        looking.close()  # one that only looks in does not count
        first, second = connect(place), connect(place)
        first.socket.close()
        assert not server.wait(0.2)
        assert second.read(0, 3).data == CONTENT[:3]
        second.socket.close()
        assert server.wait(PATIENCE)
        assert not os.path.exists(place)


def test_closing_answers_what_has_come_and_leaves_nothing(path: Path, place: str) -> None:
    held = HeldStorage(FileStorage(path))
    held.release()
    before = _left_of_us()
    with cowslice.open(held, warmup="full") as disk:
        disk.wait_warm()
        server = serve(disk, unix=place)
        clients = [connect(place) for _ in range(3)]
        held.hold()
        for client in clients:
            client.ask(Command.READ, 0, 4096)
        held.wait_for(3)
        closing = threading.Thread(target=server.close)
        closing.start()
        assert eventually(lambda: not os.path.exists(place))
        held.release()
        for client in clients:
            assert client.collect(1).data == CONTENT[:4096]
            assert client.ended()
            client.socket.close()
        closing.join(PATIENCE)
        assert server.wait(0)
        server.close()
    assert _left_of_us() == before


def test_a_client_that_takes_nothing_cannot_keep_the_server_from_ending(disk: cowslice.Image, place: str) -> None:
    server = serve(disk, unix=place)
    client = connect(place)
    client.socket.sendall(b"".join(client.request(Command.READ, 0, 8 * K, flags=CommandFlag.DF) for _ in range(20)))
    strangers = [socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) for _ in range(3)]
    for stranger in strangers:
        stranger.connect(place)
    assert eventually(lambda: server.connections == 4)
    before = _left_of_us()
    server.close(grace=0.2)
    assert len(_left_of_us()) < len(before)
    assert not [one for one in threading.enumerate() if one.name.startswith(("cowslice-nbd", "client"))]


def test_a_socket_that_a_dead_server_left_is_replaced(disk: cowslice.Image, place: str) -> None:
    dead = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    dead.bind(place)
    dead.close()
    with serve(disk, unix=place):
        assert connect(place).read(0, 1).data == CONTENT[:1]


def test_a_socket_that_is_in_use_is_left_alone(disk: cowslice.Image, place: str) -> None:
    with serve(disk, unix=place):
        with pytest.raises(StorageError, match="in use"):
            serve(disk, unix=place)
        assert connect(place).read(0, 1).data == CONTENT[:1]


def test_a_file_is_never_taken_for_a_socket(disk: cowslice.Image, tmp_path: Path) -> None:
    precious = tmp_path / "x"
    precious.write_text("precious")
    with pytest.raises(StorageError):
        serve(disk, unix=precious)
    assert precious.read_text() == "precious"


def test_a_socket_that_somebody_else_put_there_is_not_removed(place: str) -> None:
    listener = listen_unix(place)
    os.unlink(place)
    other = listen_unix(place)
    listener.close()
    assert os.path.exists(place)
    other.close()


def test_a_path_too_long_for_a_socket_is_refused() -> None:
    with pytest.raises(BadOption, match="107"):
        listen_unix("/tmp/" + "x" * 200)


def test_a_port_in_use_is_told() -> None:
    (first,) = listen_tcp("127.0.0.1", 0)
    with pytest.raises(StorageError, match="in use"):
        listen_tcp("127.0.0.1", first.socket.getsockname()[1])
    first.close()


def test_sockets_that_the_system_hands_over_are_found(place: str) -> None:
    """In a process of its own, because the descriptors have fixed numbers."""
    code = (
        "import os, socket, sys, cowslice\n"
        "from cowslice.serve.listeners import activated\n"
        "from cowslice.serve.server import Server\n"
        "from cowslice.serve.exports import Export\n"
        "os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS='1', LISTEN_FDNAMES='x')\n"
        "listeners = activated()\n"
        "assert 'LISTEN_FDS' not in os.environ and not os.get_inheritable(3)\n"
        "with cowslice.open(sys.argv[1]) as disk, Server([Export(disk)], listeners, persistent=False) as server:\n"
        "    print(server.uri, flush=True)\n"
        "    server.wait(30)\n"
    )
    bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    bound.bind(place)
    bound.listen()
    image = f"{place}.qcow2"
    Path(image).write_bytes(IMAGE.file)
    run = (f"import os, sys; os.dup2({bound.fileno()}, 3); "
           f"os.execv(sys.executable, [sys.executable, '-c', {code!r}, {image!r}])")
    with subprocess.Popen([sys.executable, "-c", run], pass_fds=[bound.fileno()], stdout=subprocess.PIPE) as child:
        bound.close()
        assert child.stdout is not None
        assert child.stdout.readline().decode().strip() == f"nbd+unix:///?socket={place}"
        client = connect(place)
        assert client.read(0, 5).data == CONTENT[:5]
        client.socket.close()
        assert child.wait(PATIENCE) == 0
    assert os.path.exists(place), "the file of a socket that was handed over is not ours"
    os.unlink(place)
    os.unlink(image)


@pytest.mark.parametrize("environment, found", [
    ({}, 0),
    ({"LISTEN_PID": "1", "LISTEN_FDS": "1"}, 0),
    ({"LISTEN_PID": str(os.getpid())}, 0),
])
def test_what_is_meant_for_another_process_is_not_taken(environment: dict[str, str], found: int) -> None:
    assert len(activated(environment)) == found
    assert environment == {}


@pytest.mark.parametrize("count", ["0", "-1", "x", "99999", "1 "])
def test_an_impossible_number_of_sockets_is_refused(count: str) -> None:
    with pytest.raises(BadOption, match="LISTEN_FDS"):
        activated({"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": count})


def test_a_descriptor_that_does_not_listen_is_refused() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, pytest.raises(BadOption, match="not a listening"):
        adopted(ours.fileno())
    with open(os.devnull) as file, pytest.raises(BadOption, match="no socket"):
        adopted(file.fileno())


def test_a_server_that_fails_to_start_listens_no_more(disk: cowslice.Image, place: str) -> None:
    with pytest.raises(BadOption, match="server-cert"):
        serve(disk, unix=place, tls=Certificates("/nonexistent"))


def test_faults_of_clients_are_told_to_whoever_wants_to_know(disk: cowslice.Image, place: str) -> None:
    reports: list[str] = []
    with serve(disk, unix=place, report=reports.append):
        client = connect(place)
        client.socket.sendall(b"x" * 28)
        assert client.ended()
    assert [report.startswith("client 1: the client broke the NBD protocol") for report in reports] == [True]


def test_who_cannot_hear_of_faults_holds_up_nobody(disk: cowslice.Image, place: str) -> None:
    def broken(sentence: str) -> None:
        raise BrokenPipeError

    with serve(disk, unix=place, report=broken, max_clients=1):
        for _ in range(3):
            client = connect(place)
            client.socket.sendall(b"x" * 28)
            assert client.ended()
        assert connect(place).read(0, 1).data == CONTENT[:1]


class Exhausted:
    """A listening socket on a system that has no descriptor left."""

    def accept(self) -> None:
        raise OSError(24, "Too many open files")


def test_a_system_without_descriptors_is_told_and_survived(disk: cowslice.Image, place: str) -> None:
    reports: list[str] = []
    with serve(disk, unix=place, report=reports.append) as server:
        server._accept(Exhausted())  # type: ignore[arg-type]
        assert reports == ["cannot accept a client: Too many open files"]
        assert connect(place).read(0, 1).data == CONTENT[:1]


def test_a_system_without_threads_turns_the_client_away(
    disk: cowslice.Image, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reports: list[str] = []
    with serve(disk, unix=place, report=reports.append) as server:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", lambda thread: (_ for _ in ()).throw(RuntimeError("none")))
            turned_away = connected_to(place)
            assert turned_away.recv(1) == b""
            turned_away.close()
        assert reports == ["cannot serve a client: the system has no more threads"]
        client = connect(place)  # held: a client that is forgotten has gone
        assert client.read(0, 1).data == CONTENT[:1]
        assert server.connections == 1


def test_the_same_server_may_be_closed_by_many(disk: cowslice.Image, place: str) -> None:
    server = Server([Export(disk)], [listen_unix(place)])
    closing = [threading.Thread(target=server.close) for _ in range(4)]
    for thread in closing:
        thread.start()
    for thread in closing:
        thread.join(PATIENCE)
    assert server.wait(0)


def _left_of_us() -> list[str]:
    """Descriptors and threads that are there now; the process's own cleaner lives on."""
    threads = [one.name for one in threading.enumerate() if "cleaner" not in one.name]
    return sorted(os.listdir("/proc/self/fd")) + sorted(threads)
