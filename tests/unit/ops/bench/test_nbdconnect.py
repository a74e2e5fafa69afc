"""The way to transmission: with real servers, and with some that are none."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

import pytest

from cowslice.errors import BadOption, RemoteProtocolError, StorageError
from cowslice.nbd.wire import Mode
from cowslice.ops.bench.nbdconnect import connect, disconnect
from cowslice.testing.peers import nbdkit, needs


def test_an_encrypted_export_is_refused() -> None:
    with pytest.raises(BadOption, match="not encrypted"):
        connect("nbds://localhost")


@needs("nbdkit")
@pytest.mark.parametrize("structured", [True, False])
def test_transmission_begins_with_the_replies_that_were_wanted(structured: bool) -> None:
    with nbdkit("memory", "1M") as uri:
        channel, session = connect(uri, structured=structured)
        disconnect(channel)
    assert session.size == 1 << 20
    assert session.mode is (Mode.STRUCTURED if structured else Mode.SIMPLE)
    assert channel.fileno() == -1


@needs("nbdkit")
def test_an_export_that_is_not_there_is_told_with_the_servers_words() -> None:
    only_one = ("exportname-strict=true", "exportname=vm")
    with (
        nbdkit("--exportname=vm", "--filter=exportname", "memory", "1M", *only_one) as uri,
        pytest.raises(StorageError, match="refuses export 'other'"),
    ):
        connect(uri.replace("///", "///other"))


def test_nobody_there_is_told() -> None:
    with pytest.raises(StorageError, match=r"cannot connect to '.*/nowhere/socket': No such file"):
        connect("nbd+unix:///?socket=/nowhere/socket")


@pytest.mark.parametrize("said, fault", [(b"SSH-2.0-whatever-it-is", RemoteProtocolError), (b"", RemoteProtocolError)])
def test_a_server_of_something_else_is_told(said: bytes, fault: type[Exception], tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
        listening.listen()

        def greet() -> None:
            with listening.accept()[0] as client:
                client.sendall(said)
                client.shutdown(socket.SHUT_WR)
                client.recv(1)

        thread = threading.Thread(target=greet)
        thread.start()
        with pytest.raises(fault, match="server broke the NBD protocol"):
            connect(f"nbd+unix:///?socket={tmp_path}/socket")
        thread.join()
