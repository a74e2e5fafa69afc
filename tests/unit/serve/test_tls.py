"""TLS: who gets in, who does not, and what is wrong with a directory of certificates."""

from __future__ import annotations

import os
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import cowslice
from cowslice.errors import BadOption, CryptoError, RemoteProtocolError, StorageError
from cowslice.nbd.events import Need, Ready, Refused, StartTls
from cowslice.nbd.opening import Opening, TlsWish, Wish
from cowslice.nbd.wire import Answer, Command
from cowslice.serve import tlskeys
from cowslice.serve.listing import list_exports
from cowslice.serve.server import Server, serve
from cowslice.serve.stream import TlsStream
from cowslice.serve.tls import PSK_CIPHERS, Certificates, PresharedKeys, read_keys, server_context
from cowslice.serve.transmission import Limits
from tests.unit.serve.certificates import Authority, trusting
from tests.unit.serve.rawclient import PATIENCE, RawClient, model

needs_ctypes = pytest.mark.skipif(
    hasattr(ssl.SSLContext, "set_psk_server_callback"), reason="this Python has a call of its own")
IMAGE = model("NNZ.NNNNNNNN")
CONTENT = IMAGE.over(b"")


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("pki")
    ours, theirs = Authority.new("ours"), Authority.new("theirs")
    ours.put(place / "server", side="server")
    ours.put(place / "client", side="client")
    ours.put(place / "nobody", side="")
    ours.put(place / "expired", side="client", days=-1)
    theirs.put(place / "stranger", side="client")
    (place / "stranger" / "ca-cert.pem").write_bytes((place / "server" / "ca-cert.pem").read_bytes())
    theirs.put(place / "mistrusting", side="")
    return place


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[cowslice.Image]:
    (tmp_path / "disk.qcow2").write_bytes(IMAGE.file)
    with cowslice.open(tmp_path / "disk.qcow2") as opened:
        yield opened


@pytest.fixture
def server(disk: cowslice.Image, pki: Path) -> Iterator[Server]:
    reports: list[str] = []
    with serve(disk, host="127.0.0.1", port=0, tls=Certificates(pki / "server"), report=reports.append) as running:
        yield running


class TlsClient(RawClient):
    """A raw client that starts TLS first."""

    def __init__(self, server: Server, context: ssl.SSLContext) -> None:
        self.context = context
        super().__init__(connected(server))

    def _open(self, wish: Wish) -> tuple[object, bytes]:  # type: ignore[override]
        opening = Opening(Wish(wish.export, tls=TlsWish.ALWAYS, extended=False))
        while not isinstance(event := opening.next_event(), Ready):
            self.socket.sendall(opening.data_to_send())
            if isinstance(event, StartTls):
                self.socket = self.context.wrap_socket(self.socket, server_hostname="127.0.0.1")
                opening.tls_started()
            elif isinstance(event, Need):
                data = self.socket.recv(4096)
                if not data:
                    raise ConnectionError("closed")
                opening.receive(data)
            else:
                raise AssertionError(event)
        return event.session, opening.take_leftover()


def connected(server: Server) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(server.uri.rpartition(":")[2].rstrip("/"))), PATIENCE)


def test_a_client_with_a_certificate_gets_every_byte(server: Server, pki: Path) -> None:
    client = TlsClient(server, trusting(pki / "client"))
    assert server.uri.startswith("nbds://")
    assert client.session.tls
    assert client.read(0, len(CONTENT)).data == CONTENT
    client.socket.close()


def test_many_requests_pass_through_tls_side_by_side(server: Server, pki: Path) -> None:
    """Answers are sent by many threads while another receives: OpenSSL must see one of them at a time."""
    client = TlsClient(server, trusting(pki / "client"))
    # Each in a record of its own, all before the first answer is taken: a client in Python must not do both at once.
    for n in range(300):
        client.ask(Command.READ, n * 1000, 60_000)
    replies = client.answers(300)
    assert all(replies[n + 1].data == CONTENT[n * 1000 : n * 1000 + 60_000] for n in range(300))
    client.socket.close()


@pytest.mark.parametrize("who", ["nobody", "stranger", "expired"])
def test_who_cannot_show_a_good_certificate_stays_out(server: Server, pki: Path, who: str) -> None:
    with pytest.raises((OSError, EOFError)):
        TlsClient(server, trusting(pki / who)).read(0, 1)


def test_a_certificate_that_was_taken_back_stays_out(disk: cowslice.Image, tmp_path: Path) -> None:
    authority = Authority.new("ours")
    authority.put(tmp_path / "pki", side="server")
    for name in ("good", "bad"):
        authority.put(tmp_path / name, side="client")
    authority.revoke(tmp_path / "pki", tmp_path / "bad" / "client-cert.pem")
    with serve(disk, port=0, tls=Certificates(tmp_path / "pki"), report=lambda what: None) as server:
        client = TlsClient(server, trusting(tmp_path / "good"))
        assert client.read(0, 10).data == CONTENT[:10]
        client.socket.close()
        with pytest.raises((OSError, EOFError)):
            TlsClient(server, trusting(tmp_path / "bad")).read(0, 1)


def test_a_client_does_not_trust_a_server_of_another_authority(server: Server, pki: Path) -> None:
    with pytest.raises(ssl.SSLCertVerificationError):
        TlsClient(server, trusting(pki / "mistrusting"))


def test_without_verification_anybody_gets_in(disk: cowslice.Image, pki: Path) -> None:
    with serve(disk, port=0, tls=Certificates(pki / "server", verify_peer=False)) as server:
        client = TlsClient(server, trusting(pki / "nobody"))
        assert client.read(0, 10).data == CONTENT[:10]
        client.socket.close()


def test_without_tls_nothing_is_told(server: Server) -> None:
    opening, plain = Opening(Wish(extended=False, structured=False)), connected(server)
    while isinstance(event := opening.next_event(), Need):
        plain.sendall(opening.data_to_send())
        opening.receive(plain.recv(4096))
    assert isinstance(event, Refused)
    assert event.answer == Answer.ERR_TLS_REQD
    plain.close()


def test_one_who_stalls_inside_the_tls_handshake_is_put_out(disk: cowslice.Image, pki: Path) -> None:
    limits = Limits(handshake_timeout=0.3)
    with serve(disk, port=0, tls=Certificates(pki / "server"), limits=limits, report=lambda what: None) as server:
        plain = connected(server)
        plain.sendall(b"\0\0\0\3IHAVEOPT\0\0\0\5\0\0\0\0")
        assert plain.recv(18)
        assert plain.recv(20)
        plain.sendall(b"\x16\x03\x01")  # the beginning of a handshake, and nothing more
        while plain.recv(100):
            pass
        plain.close()


def test_an_idle_client_inside_tls_is_put_out(disk: cowslice.Image, pki: Path) -> None:
    reports: list[str] = []
    with serve(disk, port=0, tls=Certificates(pki / "server"), limits=Limits(idle_timeout=0.2),
               report=reports.append) as server:
        client = TlsClient(server, trusting(pki / "client"))
        assert client.read(0, 10).data == CONTENT[:10]
        assert client.ended()
        client.socket.close()
    assert reports == ["client 1: nothing came or went for too long"]


def test_a_server_ends_although_clients_stall_inside_tls(server: Server, pki: Path) -> None:
    client = TlsClient(server, trusting(pki / "client"))
    client.socket.sendall(b"".join(client.request(Command.READ, 0, len(CONTENT)) for _ in range(30)))
    time.sleep(0.1)
    server.close(grace=0.2)
    assert not [one for one in threading.enumerate() if one.name.startswith(("cowslice-nbd", "client"))]
    client.socket.close()


def test_what_a_server_has_is_listed_through_tls(server: Server, pki: Path) -> None:
    address = "127.0.0.1", int(server.uri.rpartition(":")[2].rstrip("/"))
    found = list_exports(address, tls=trusting(pki / "client"), hostname="localhost")
    assert [(one.name, one.contexts) for one in found] == [("", ("base:allocation",))]
    with pytest.raises(RemoteProtocolError, match="TLS"):
        list_exports(address)
    with pytest.raises(CryptoError):
        list_exports(address, tls=trusting(pki / "client"), hostname="elsewhere")
    with pytest.raises(CryptoError):
        list_exports(address, tls=trusting(pki / "mistrusting"), hostname="localhost")


def test_a_server_that_is_not_there_cannot_be_listed(tmp_path: Path) -> None:
    with pytest.raises(StorageError):
        list_exports(str(tmp_path / "none"))


def test_a_server_that_says_nothing_is_given_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(StorageError, match="did not answer"):
        list_exports(("127.0.0.1", silent.getsockname()[1]), timeout=0.2)


@pytest.mark.parametrize("missing", ["ca-cert.pem", "server-cert.pem", "server-key.pem"])
def test_a_file_that_is_missing_is_named(pki: Path, tmp_path: Path, missing: str) -> None:
    for name in {"ca-cert.pem", "server-cert.pem", "server-key.pem"} - {missing}:
        os.symlink(pki / "server" / name, tmp_path / name)
    with pytest.raises(BadOption, match=missing):
        server_context(Certificates(tmp_path))


@pytest.mark.parametrize("spoiled", ["ca-cert.pem", "server-cert.pem", "server-key.pem"])
def test_a_file_that_is_no_certificate_is_refused(pki: Path, tmp_path: Path, spoiled: str) -> None:
    for name in ("ca-cert.pem", "server-cert.pem", "server-key.pem"):
        (tmp_path / name).write_bytes((pki / "server" / name).read_bytes())
    (tmp_path / spoiled).write_text("nonsense")
    with pytest.raises(CryptoError):
        server_context(Certificates(tmp_path))


def test_keys_are_read(tmp_path: Path) -> None:
    (tmp_path / "keys.psk").write_text("# people\nann:00112233445566778899aabbccddeeff\n\nbob:" + "ab" * 32 + "\n")
    assert read_keys(tmp_path) == {"ann": bytes.fromhex("00112233445566778899aabbccddeeff"), "bob": b"\xab" * 32}


@pytest.mark.parametrize("text", ["", "ann", "ann:xyz", "ann:00", ":" + "00" * 16, "\xff"])
def test_what_are_no_keys_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "keys.psk").write_bytes(text.encode("latin-1"))
    with pytest.raises(BadOption) as caught:
        read_keys(tmp_path)
    assert "xyz" not in str(caught.value)


@needs_ctypes
def test_keys_are_refused_where_openssl_cannot_be_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "keys.psk").write_text("ann:" + "00" * 16)
    monkeypatch.setattr(tlskeys, "_openssl", lambda: None)
    with pytest.raises(BadOption, match=r"needs CPython 3\.13"):
        server_context(PresharedKeys(tmp_path))


@needs_ctypes
def test_a_context_that_does_not_answer_as_itself_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stranger:
        @staticmethod
        def SSL_CTX_ctrl(context: int, command: int, number: int, pointer: None) -> int:
            return ssl.TLSVersion.TLSv1_3

    (tmp_path / "keys.psk").write_text("ann:" + "00" * 16)
    monkeypatch.setattr(tlskeys, "_openssl", lambda: Stranger)
    with pytest.raises(BadOption, match="not laid out as expected"):
        server_context(PresharedKeys(tmp_path))


def test_the_ciphers_for_keys_are_there_and_forget() -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(PSK_CIPHERS)
    names = [cipher["name"] for cipher in context.get_ciphers() if not cipher["name"].startswith("TLS_")]
    assert names
    assert all(name.startswith(("ECDHE-PSK", "DHE-PSK")) and "NULL" not in name for name in names)


def test_stopping_never_goes_on_in_plain_text(pki: Path) -> None:
    """`shutdown` of Python's TLS socket forgets that there is TLS: ours must not."""
    left, right = socket.socketpair()
    context = server_context(Certificates(pki / "server"))
    stream = TlsStream(context.wrap_socket(left, server_side=True, do_handshake_on_connect=False))
    stream.stop_reading()
    stream.abort()
    assert stream.socket._sslobj is not None  # type: ignore[attr-defined]
    with pytest.raises(OSError):
        stream.send([b"secret"])
    right.setblocking(False)
    assert right.recv(100) == b""
    stream.close()
    right.close()
