"""`cowslice serve` as a command: what it prints, whom it serves, and how it ends."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

import cowslice
from cowslice.nbd.wire import Command
from cowslice.testing import peers
from cowslice.tune.trace import open_trace
from tests.unit.serve.certificates import Authority
from tests.unit.serve.rawclient import PATIENCE, RawClient, connect, connected_to, model

IMAGE = model("NNZ.NNNN")
CONTENT = IMAGE.over(b"")
SERVE = (sys.executable, "-m", "cowslice.cli.main", "serve")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(IMAGE.file)
    return path


@pytest.fixture
def place() -> Iterator[str]:
    name = f"/tmp/cowslice-cli-{os.getpid()}-{time.monotonic_ns()}"
    yield name
    assert not os.path.lexists(name), "the socket's file is left"


class Running:
    """A server in a process of its own, once it has said where it listens. `lines` are what it printed."""

    def __init__(self, *arguments: object, lines: int = 1) -> None:
        self.process = subprocess.Popen(
            [*SERVE, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.lines = [self.process.stdout.readline().rstrip() for _ in range(lines)]

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """Send a signal; exit status and what was said on standard error."""
        self.process.send_signal(number)
        return self.wait()

    def wait(self) -> tuple[int, str]:
        _, said = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, said


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*SERVE, *map(str, arguments)], capture_output=True, text=True, timeout=PATIENCE)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_it_says_where_it_listens_and_ends_cleanly_on_a_signal(
    image: Path, place: str, tmp_path: Path, number: int
) -> None:
    pid_file = tmp_path / "pid"
    server = Running("-t", "-k", place, "--pid-file", pid_file, image)
    assert server.lines == [f"nbd+unix:///?socket={place}  512 KiB (524288 bytes), read-only, {image}"]
    assert int(pid_file.read_text()) == server.process.pid
    client = connect(place)
    assert client.read(3, 30).data == CONTENT[3:33]
    assert server.end(number) == (0, "")
    assert client.ended()
    assert not pid_file.exists()


@pytest.mark.parametrize("closed", ["2>&-", "<&- >&- 2>&-", "2> >(exec <&-)"], ids=["stderr", "all", "broken pipe"])
@pytest.mark.parametrize("fork", [(), ("--fork",)], ids=["foreground", "background"])
def test_it_serves_on_where_nobody_hears_what_it_says(
    image: Path, place: str, tmp_path: Path, closed: str, fork: tuple[str, ...]
) -> None:
    before, pid_file = image.read_bytes(), tmp_path / "pid"
    command = ["bash", "-c", f'exec "$@" {closed}', "bash", *SERVE, *fork, "--writable", "-t", "-k", place,
               "--pid-file", str(pid_file), str(image)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process, contextlib.ExitStack() as stack:
        stack.callback(process.kill)
        end = time.monotonic() + PATIENCE
        while not os.path.exists(place) and time.monotonic() < end:
            time.sleep(0.01)
        for _ in range(2):
            with connected_to(place) as garbage:
                garbage.sendall(b"G" * 64)
                while garbage.recv(64):
                    pass
        client = connect(place)
        assert client.read(0, 9).data == CONTENT[:9]
        os.kill(int(pid_file.read_text()), signal.SIGTERM)
        assert client.ended()
        assert process.wait(PATIENCE) == 0
    while os.path.exists(pid_file) and time.monotonic() < end:
        time.sleep(0.01)
    assert image.read_bytes() == before


def test_it_ends_when_the_last_client_has_left(image: Path, place: str) -> None:
    server = Running("-k", place, image)
    connect(place).socket.close()
    assert server.wait() == (0, "")


def test_it_goes_into_the_background_when_it_is_ready(image: Path, place: str, tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    done = run("--fork", "-t", "-k", place, "--pid-file", pid_file, image)
    assert (done.returncode, done.stderr) == (0, "")
    assert connect(place).read(0, 9).data == CONTENT[:9], "at once, without waiting for it"
    pid = int(pid_file.read_text())
    os.kill(pid, signal.SIGTERM)
    end = time.monotonic() + PATIENCE
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < end and os.path.exists(place):
            os.kill(pid, 0)
            time.sleep(0.01)


def test_what_keeps_it_from_the_background_is_told(place: str, tmp_path: Path) -> None:
    done = run("--fork", "-k", place, tmp_path / "missing")
    assert done.returncode == 1
    assert "missing" in done.stderr


def test_several_images_are_served_by_name(image: Path, place: str) -> None:
    server = Running("-t", "-e", "0", "-k", place, f"a={image}", f"b={image}", lines=2)
    assert [line.partition("?")[0] for line in server.lines] == ["nbd+unix:///a", "nbd+unix:///b"]
    assert connect(place, export="b").read(0, 9).data == CONTENT[:9]
    assert server.end()[0] == 0


def test_it_listens_on_tcp(image: Path) -> None:
    server = Running("-t", "-b", "127.0.0.1", "-p", "0", "-x", "disk", image)
    address = server.lines[0].partition("  ")[0]
    port = int(address.removeprefix("nbd://127.0.0.1:").removesuffix("/disk"))
    with socket.create_connection(("127.0.0.1", port), PATIENCE) as connected:
        assert RawClient(connected, export="disk").read(0, 9).data == CONTENT[:9]
    assert server.end()[0] == 0


def test_a_client_that_never_gets_ready_is_put_out(image: Path, place: str) -> None:
    server = Running("-t", "--handshake-limit", "0.2", "-k", place, image)
    with connected_to(place) as silent:
        while silent.recv(64):
            pass  # the greeting, then the end
    status, said = server.end()
    assert (status, said.count("for too long")) == (0, 1)


def test_a_client_that_asks_nothing_is_put_out(image: Path, place: str) -> None:
    server = Running("-t", "--idle-timeout", "0.2", "-k", place, image)
    assert connect(place).ended()
    status, said = server.end()
    assert (status, said.count("for too long")) == (0, 1)


def test_a_server_is_listed(image: Path, place: str) -> None:
    server = Running("-t", "-k", place, "-x", "disk", "-D", "what it is", "-A", image)
    listed = run("-L", "-k", place)
    assert server.end()[0] == 0
    assert (listed.returncode, listed.stderr) == (0, "")
    for said in ("exports available: 1", "export: 'disk'", "description: what it is", "size: 512 KiB (524288 bytes)",
                 "read-only", "context: base:allocation", "context: qemu:allocation-depth"):
        assert said in listed.stdout


@pytest.mark.parametrize("arguments, status, said", [
    (["--writable", "-r", "IMAGE"], 64, "excludes -r"),
    (["--writable", "-l", "x", "IMAGE"], 64, "a snapshot never changes"),
    ([], 64, "Missing argument"),
    (["-L", "IMAGE"], 64, "takes no IMAGE"),
    (["IMAGE", "IMAGE"], 64, "different names"),
    (["-x", "one", "two=IMAGE"], 64, "write one of them"),
    (["-k", "/tmp/never", "-p", "1", "IMAGE"], 64, "excludes"),
    (["-l", "x", "-B", "y", "IMAGE"], 64, "excludes"),
    (["-l", "x", "IMAGE"], 64, "no snapshots"),
    (["-B", "x", "IMAGE"], 64, "no bitmaps"),
    (["--tls-creds", "nothing", "IMAGE"], 64, "tls-creds"),
    (["--tls-creds", "t", "--object", "tls-creds-x509,id=t", "IMAGE"], 64, "dir=PATH"),
    (["--tls-creds", "t", "--object", "tls-creds-x509,id=t,dir=/x,endpoint=client", "IMAGE"], 64, "endpoint"),
    (["--max-request", "1", "IMAGE"], 64, "--max-request"),
    (["-L", "-k", "/nonexistent/socket"], 1, "/nonexistent/socket"),
])
def test_what_cannot_be_is_refused_in_a_sentence(image: Path, arguments: list[str], status: int, said: str) -> None:
    done = run(*(argument.replace("IMAGE", str(image)) for argument in arguments))
    assert (done.returncode, done.stdout) == (status, "")
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_a_pid_file_of_a_running_server_is_not_taken(image: Path, place: str, tmp_path: Path) -> None:
    server = Running("-t", "-k", place, "--pid-file", tmp_path / "pid", image)
    other = run("-t", "-k", f"{place}-2", "--pid-file", tmp_path / "pid", image)
    assert (other.returncode, "is running" in other.stderr) == (64, True)
    assert not os.path.exists(f"{place}-2")
    assert int((tmp_path / "pid").read_text()) == server.process.pid
    assert server.end()[0] == 0


def test_what_it_counts_is_shown(image: Path, place: str) -> None:
    server = Running("-t", "-k", place, "--metrics", "0", image, lines=2)
    url, what = server.lines[1].split("  ")
    assert what == "metrics"
    client = connect(place)
    client.read(0, 4096)
    client.socket.close()
    with urllib.request.urlopen(f"{url}metrics", timeout=PATIENCE) as answer:
        text = answer.read().decode()
    assert 'cowslice_requests_total{export="",command="read"} 1' in text
    assert server.end()[0] == 0


@pytest.mark.parametrize("fork", [(), ("--fork",)], ids=["foreground", "background"])
def test_sockets_of_the_system_are_taken(image: Path, place: str, fork: tuple[str, ...]) -> None:
    code = ("import os, sys; os.dup2(int(sys.argv[1]), 3); os.environ.update(LISTEN_FDS='1', "
            "LISTEN_PID=str(os.getpid())); os.execv(sys.executable, [sys.executable, *sys.argv[2:]])")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as bound:
        bound.bind(place)
        bound.listen()
        number = bound.fileno()

        def start(*more: str) -> subprocess.CompletedProcess[str]:
            command = [sys.executable, "-c", code, str(number), *SERVE[1:], *fork, *more, str(image)]
            return subprocess.run(command, pass_fds=[number], capture_output=True, text=True, timeout=PATIENCE)

        waiting = connected_to(place)  # it waits in the queue, as with a server that is started on demand
        reading = threading.Thread(target=lambda: _read_and_leave(waiting))
        reading.start()
        served, refused = start(), start("-k", "/tmp/elsewhere")
        reading.join()
    assert served.stdout.startswith(f"nbd+unix:///?socket={place}")
    assert (served.returncode, refused.returncode) == (0, 64)
    os.unlink(place)


def _read_and_leave(connected: socket.socket) -> None:
    with connected:
        assert RawClient(connected).read(0, 9).data == CONTENT[:9]


@peers.needs("qemu-img", "qemu-io")
def test_snapshots_are_served_beside_the_disk_or_instead(tmp_path: Path, place: str) -> None:
    path = tmp_path / "disk.qcow2"
    peers.qemu_img("create", "-q", "-f", "qcow2", path, "1M")
    for number, name in ((1, "monday"), (2, "tuesday")):
        peers.qemu_io(path, f"write -P {number} 0 64k")
        peers.qemu_img("snapshot", "-c", name, path)
    peers.qemu_io(path, "write -P 3 0 64k")
    server = Running("-t", "-e", "9", "-k", place, "--all-snapshots", f"vm={path}", lines=3)
    found = {name: connect(place, export=name).read(0, 1).data for name in ("vm", "vm@monday", "vm@tuesday")}
    assert found == {"vm": b"\3", "vm@monday": b"\1", "vm@tuesday": b"\2"}
    assert server.end()[0] == 0
    server = Running("-k", place, "-l", "snapshot.name=monday", path)
    client = connect(place)
    assert client.read(0, 1).data == b"\1"
    client.socket.close()
    assert server.wait()[0] == 0


@peers.needs("nbdinfo")
@pytest.mark.parametrize("creds", [["--tls-creds", "DIR"], ["--object", "tls-creds-x509,id=t,endpoint=server,dir=DIR",
                                                            "--tls-creds", "t"]])
def test_it_speaks_tls(image: Path, tmp_path: Path, creds: list[str]) -> None:
    authority = Authority.new("ours")
    authority.put(tmp_path / "pki", side="server")
    authority.put(tmp_path / "pki", side="client")
    server = Running("-t", "-b", "127.0.0.1", "-p", "0",
                     *(word.replace("DIR", str(tmp_path / "pki")) for word in creds), image)
    uri = server.lines[0].partition("  ")[0]
    assert uri.startswith("nbds://127.0.0.1:")
    peers.run("nbdinfo", f"{uri}?tls-certificates={tmp_path / 'pki'}")
    port = uri.rpartition(":")[2].rstrip("/")
    listed = run("-L", "-b", "127.0.0.1", "-p", port, "--tls-creds", tmp_path / "pki")
    assert "exports available: 1" in listed.stdout
    server.process.stderr.close() if server.process.stderr else None
    server.process.terminate()
    assert server.process.wait(PATIENCE) == 0


@peers.needs("nbdinfo")
def test_it_speaks_tls_with_keys(image: Path, tmp_path: Path) -> None:
    (tmp_path / "keys.psk").write_text("ann:" + "11" * 16)
    creds = ["--object", f"tls-creds-psk,id=t,endpoint=server,dir={tmp_path}", "--tls-creds", "t"]
    server = Running("-t", "-b", "127.0.0.1", "-p", "0", *creds, image)
    port = server.lines[0].partition("  ")[0].rpartition(":")[2].rstrip("/")
    peers.run("nbdinfo", f"nbds://ann@127.0.0.1:{port}/?tls-psk-file={tmp_path / 'keys.psk'}")
    assert server.end() == (0, "")


@peers.needs("qemu-img")
def test_image_options_and_caching_are_those_of_qemu_nbd(image: Path, place: str) -> None:
    server = Running("-k", place, "--cache=none", "--aio=io_uring", "--discard=unmap", "--image-opts",
                     f"driver=qcow2,file.filename={image},l2-cache-size=64k")
    assert "identical" in peers.qemu_img("compare", "-f", "raw", "-F", "qcow2", f"nbd+unix:///?socket={place}", image)
    assert server.wait()[0] == 0


def content_after(image: Path, place: str, *flags: str) -> tuple[bytes, bool]:
    """What the first 64 KiB hold that a client has discarded, and whether zeros written behind them are stored."""
    server = Running("-k", place, "--writable", *flags, image)
    client = connect(place)
    for command, offset, payload in ((Command.WRITE, 0, b"a" * 65536), (Command.TRIM, 0, b""),
                                     (Command.WRITE, 65536, bytes(65536))):
        assert client.collect(client.ask(command, offset, 65536, payload=payload)).error == 0
    client.socket.close()
    assert server.wait()[0] == 0
    with cowslice.open(image) as disk:
        return disk.read(0, 65536), next(disk.extents(65536, 65536)).data


@pytest.mark.parametrize("flags, kept, stored", [
    ([], False, True),
    (["--discard=unmap"], False, True),
    (["--discard=on"], False, True),
    (["--discard=ignore"], True, True),
    (["--discard=off"], True, True),
    (["--detect-zeroes=on", "--cache=writethrough"], False, False),
    (["--detect-zeroes=unmap", "--cache=directsync"], False, False),
])
def test_what_clients_discard_and_zeros_they_write_are_what_the_flags_say(
    tmp_path: Path, place: str, flags: list[str], kept: bool, stored: bool
) -> None:
    image = tmp_path / "new.qcow2"
    cowslice.create(image, 1 << 20, format="qcow2")
    assert content_after(image, place, *flags) == ((b"a" if kept else b"\0") * 65536, stored)


@pytest.mark.parametrize("flag", [
    "-s", "--snapshot", "-c/dev/nbd0", "-d/dev/nbd0", "--offset=512", "-Tx", "-V", "--tls-authz=x", "--selinux-label=x",
])
def test_flags_of_qemu_nbd_that_are_left_out_are_refused_with_what_to_do(image: Path, flag: str) -> None:
    refused = run(flag, image)
    assert (refused.returncode, refused.stdout) == (64, "")
    assert "of qemu-nbd is left out: " in refused.stderr


def test_zeros_cannot_give_space_back_where_discards_do_not(image: Path, place: str) -> None:
    refused = run("-k", place, "--writable", "--discard=ignore", "--detect-zeroes=unmap", image)
    assert refused.returncode == 64
    assert "detect_zeroes is 'unmap'" in refused.stderr


@pytest.mark.parametrize("verb", ["serve", "convert", "commit", "rebase", "dd", "map", "compare", "info"])
def test_a_backing_file_in_the_network_is_followed_where_that_is_permitted(
    image: Path, place: str, tmp_path: Path, verb: str
) -> None:
    overlay, near = tmp_path / "overlay.qcow2", f"/tmp/cowslice-near-{os.getpid()}"
    cowslice.create(overlay, len(CONTENT), format="qcow2", backing_file=f"nbd+unix:///?socket={place}",
                    backing_format="raw", check_backing=False)
    words = {
        "serve": ("-k", near, "-t", "--fork", "--pid-file", tmp_path / "pid", overlay), "compare": (overlay, overlay),
        "convert": (overlay, tmp_path / "copy"), "commit": ("-d", overlay), "rebase": ("-b", "", overlay),
        "dd": (f"if={overlay}", f"of={tmp_path / 'copy'}"), "map": (overlay,), "info": ("--backing-chain", overlay),
    }[verb]
    server = Running("-t", "-e", "0", "--writable", "-k", place, image)
    try:
        command = [*SERVE[:-1], verb, *map(str, words)]
        for more, statuses in ((["--allow-any"], (1, 2)), (["--allow-network"], (0,))):
            done = subprocess.run([*command, *more], capture_output=True, text=True, timeout=PATIENCE)
            assert done.returncode in statuses, done.stderr
            assert ("a URL with --allow-network" in done.stderr) == (0 not in statuses)
        if verb == "serve":
            assert connect(near).read(0, 9).data == CONTENT[:9]
            os.kill(int((tmp_path / "pid").read_text()), signal.SIGTERM)
    finally:
        assert server.end()[0] == 0


@pytest.mark.parametrize("arguments, said", [
    (["--max-request=1"], "--max-request is 1, expected 4 KiB to 1 GiB"),
    (["--max-in-flight-bytes=0"], "--max-in-flight-bytes is 0, expected at least 1"),
    (["--handshake-limit=nan"], "--handshake-limit is nan, expected 0 to"),
    (["--idle-timeout=inf"], "--idle-timeout is inf, expected 0 to"),
    (["-x", "\udcff"], "name of the export '\\udcff': "),
    (["-D", "\udcff"], "-D: "),
    (["-l", "nope"], "snapshot is 'nope', but the image has no snapshots"),
    (["-k", ""], "-k is '', expected the path of a socket"),
    (["--tls-creds=t", "--object=tls-creds-anon,id=t"],
     "--object is 'tls-creds-anon', expected tls-creds-x509 or tls-creds-psk"),
])
def test_what_is_refused_is_named_as_it_was_typed(image: Path, place: str, arguments: list[str], said: str) -> None:
    refused = run(*arguments, *([] if "-k" in arguments else ["-k", place]), image)
    assert (refused.returncode, refused.stdout) == (64, "")
    assert said in refused.stderr


def test_an_ipv6_address_may_stand_in_brackets(image: Path) -> None:
    server = Running("-t", "-b", "[::1]", "-p", "0", image)
    assert server.lines[0].startswith("nbd://[::1]:")
    assert server.end()[0] == 0


def test_a_capture_holds_what_clients_asked(image: Path, place: str, tmp_path: Path) -> None:
    server = Running("-k", place, "--capture", tmp_path / "trace", image)
    client = connect(place)
    assert client.read(4096, 512).error == 0
    client.ask(Command.DISC)
    client.socket.close()
    assert server.wait() == (0, "")
    (asked,) = open_trace(tmp_path / "trace")
    assert (asked.offset.tolist(), asked.length.tolist()) == ([4096], [512])


def test_a_capture_of_several_disks_is_refused(image: Path, place: str, tmp_path: Path) -> None:
    ended = run("-k", place, "--capture", tmp_path / "trace", f"a={image}", f"b={image}")
    assert ended.returncode == 64
    assert "--capture is of one disk" in ended.stderr
