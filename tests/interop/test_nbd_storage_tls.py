"""Exports behind TLS: opened when both sides can show who they are, and by nobody else."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from cowslice.errors import BadOption, CryptoError, StorageError
from cowslice.storage import NbdStorage, Storage, WindowStorage
from cowslice.testing import peers
from cowslice.testing.contracts import Make, ReadOnlyStorageContract, numbered_paths
from tests.unit.serve.certificates import Authority

pytestmark = peers.needs("nbdkit")
CONTENT = random.Random(8).randbytes(3 << 20)


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("pki")
    ours, theirs = Authority.new("ours"), Authority.new("theirs")
    ours.put(place / "server", side="server")
    ours.put(place / "client", side="client")
    ours.put(place / "trusting", side="")
    theirs.put(place / "mistrusting", side="client")
    return place


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("disk") / "disk"
    path.write_bytes(CONTENT)
    return path


@pytest.fixture(scope="module")
def uri(disk: Path, pki: Path) -> Iterator[str]:
    """An export of a server that insists on TLS and on a certificate of the client."""
    tls = "--tls=require", f"--tls-certificates={pki / 'server'}", "--tls-verify-peer"
    with peers.nbdkit(*tls, "file", disk) as uri:
        yield uri.replace("nbd+", "nbds+")


def credentials(place: Path) -> dict[str, Path]:
    return {"ca": place / "ca-cert.pem", "cert": place / "client-cert.pem", "key": place / "client-key.pem"}


def test_certificates_may_be_options_or_a_directory_in_the_uri(uri: str, pki: Path) -> None:
    ways = NbdStorage(uri, **credentials(pki / "client")), NbdStorage(f"{uri}&tls-certificates={pki / 'client'}")
    for storage in ways:
        with storage:
            assert storage.read(0, len(CONTENT)) == CONTENT
            assert storage._session.tls


def test_a_server_of_a_stranger_is_refused(uri: str, pki: Path) -> None:
    with pytest.raises(CryptoError, match="certificate"):
        NbdStorage(uri, **credentials(pki / "mistrusting"))


def test_without_an_authority_those_of_the_system_are_trusted_and_ours_is_not(uri: str) -> None:
    with pytest.raises(CryptoError, match="certificate"):
        NbdStorage(uri)


def test_a_certificate_for_another_name_is_refused(uri: str, pki: Path) -> None:
    with pytest.raises(CryptoError, match="'elsewhere'"):
        NbdStorage(f"{uri}&tls-hostname=elsewhere", **credentials(pki / "client"))


def test_a_check_is_left_out_only_when_that_is_said(uri: str, pki: Path) -> None:
    wrong = f"{uri}&tls-hostname=elsewhere&tls-verify-peer=false"
    with NbdStorage(wrong, **credentials(pki / "client")) as storage:
        assert storage.read(7, 7) == CONTENT[7:14]


def test_who_shows_no_certificate_gets_nothing(uri: str, pki: Path) -> None:
    with pytest.raises((CryptoError, StorageError)):
        NbdStorage(f"{uri}&tls-certificates={pki / 'trusting'}").read(0, 1)


def test_in_clear_the_server_says_that_it_wants_tls(uri: str) -> None:
    with pytest.raises(StorageError, match="refuses export") as refused:
        NbdStorage(uri.replace("nbds+", "nbd+"))
    assert "nbds:" in refused.value.hint


def test_a_server_without_tls_is_not_spoken_to_in_clear(disk: Path, pki: Path) -> None:
    with peers.nbdkit("file", disk) as plain, pytest.raises(StorageError, match="refuses TLS"):
        NbdStorage(plain.replace("nbd+", "nbds+"), **credentials(pki / "client"))


def test_files_that_cannot_be_used_are_named(uri: str, pki: Path, disk: Path, tmp_path: Path) -> None:
    with pytest.raises(BadOption, match="there is no"):
        NbdStorage(uri, ca=tmp_path / "missing")
    with pytest.raises(CryptoError, match=str(disk)):
        NbdStorage(uri, ca=disk)
    with pytest.raises(BadOption, match="twice"):
        NbdStorage(f"{uri}&tls-certificates={pki / 'client'}", ca=disk)


class TestTls(ReadOnlyStorageContract):
    @pytest.fixture
    def make(self, pki: Path, tmp_path: Path) -> Iterator[Make]:
        places = numbered_paths(tmp_path)
        encrypted = "--tls=require", f"--tls-certificates={pki / 'server'}"
        served: dict[bytes, str] = {}
        with contextlib.ExitStack() as stack:
            def make(content: bytes) -> Storage:
                if content not in served:
                    path = Path(next(places))
                    path.write_bytes(content)
                    served[content] = stack.enter_context(peers.nbdkit(*encrypted, "file", path))
                tls = served[content].replace("nbd+", "nbds+")
                return WindowStorage(NbdStorage(tls, **credentials(pki / "client")), size=len(content))

            yield make


def test_much_goes_both_ways_at_once(pki: Path, tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(len(CONTENT)))
    served = peers.nbdkit("--tls=require", f"--tls-certificates={pki / 'server'}", "file", path)
    options = credentials(pki / "client")
    with served as uri, NbdStorage(uri.replace("nbd+", "nbds+"), "r+", **options) as storage:
        storage.pwrite(0, CONTENT)
        storage.sync()
        assert storage.read(0, len(CONTENT)) == CONTENT
    assert path.read_bytes() == CONTENT
