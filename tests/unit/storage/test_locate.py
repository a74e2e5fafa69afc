"""A name that a person wrote finds its storage."""

from __future__ import annotations

from pathlib import Path

import pytest

from cowslice.errors import BadOption, Locked, ReadOnly, StorageError
from cowslice.storage import FileStorage, FsspecStorage, local_path, locate
from cowslice.storage.file import Mode


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "vm 1.img"
    path.write_bytes(b"content")
    return path


def test_a_path_is_a_file(image: Path) -> None:
    for name in (image, str(image)):
        with locate(name) as storage:
            assert isinstance(storage, FileStorage)
            assert storage.read(0, 7) == b"content"


def test_a_file_url_is_decoded(image: Path) -> None:
    for name in (image.as_uri(), image.as_uri().replace("file://", "file://localhost"), f"FILE:{image}"):
        with locate(name) as storage:
            assert storage.name == str(image)


def test_a_file_url_of_another_machine_is_refused() -> None:
    with pytest.raises(BadOption, match="file:///path"):
        locate("file://elsewhere/image")


def test_mode_direct_and_locking_reach_the_file(image: Path) -> None:
    with locate(image, "r+", direct=True) as storage:
        assert (storage.writable, storage.alignment > 1) == (True, True)
        with pytest.raises(Locked):
            locate(image)
        locate(image, locking="force-share").close()


@pytest.mark.parametrize(
    "name", ["a:b.img", "2026-11-23T06:39.img", "./json:{}", "./nbd:x", "nbdisk.img", "x/http://y", "::", "1://x"]
)
def test_what_is_no_url_is_a_path_colons_and_all(name: str) -> None:
    assert local_path(name) == name


@pytest.mark.parametrize("name", ["http://h/x", "S3://b/k", "simplecache::https://h/x", "memory://x", "git+ssh://h/x"])
def test_what_has_a_scheme_is_a_url(name: str) -> None:
    assert local_path(name) is None


def test_a_path_object_is_a_path_whatever_it_looks_like() -> None:
    assert local_path(Path("json:x")) == "json:x"


@pytest.mark.parametrize("name", ["json:{'driver':'qcow2'}", "nbd:host:10809", "nbd:unix:/run/s", "nbd+unix:/x"])
def test_devices_and_descriptions_are_refused_with_a_way_out(name: str) -> None:
    with pytest.raises(BadOption, match="expected a path or a URL") as refused:
        locate(name)
    assert f"./{name}" in str(refused.value)


def test_the_old_way_to_name_an_nbd_export_is_answered_with_the_new_one() -> None:
    with pytest.raises(BadOption, match=r"nbd://HOST\[:PORT\]/EXPORT or nbd\+unix:///EXPORT\?socket=PATH"):
        locate("nbd:localhost:10809:exportname=disk")


@pytest.mark.parametrize("name", ["nbd://host", "nbd+unix:///?socket=s", "NBDS://host/x", "nbds+unix:///x?socket=/s"])
def test_an_nbd_uri_is_a_url(name: str) -> None:
    assert local_path(name) is None


@pytest.mark.parametrize("mode", ["r", "r+"])
def test_an_nbd_uri_is_opened_over_nbd(mode: Mode) -> None:
    with pytest.raises(StorageError, match=r"cannot open 'nbd\+unix:///\?socket=/nowhere/at/all': No such file"):
        locate("nbd+unix:///?socket=/nowhere/at/all", mode)


def test_an_nbd_export_takes_options_of_its_own() -> None:
    with pytest.raises(BadOption, match=r"\['anon'\], expected some of ca, cert, key"):
        locate("nbd://localhost", options={"anon": True})
    with pytest.raises(BadOption, match="timeout is 0"):
        locate("nbd://localhost", options={"timeout": 0})


def test_an_nbd_export_is_never_made() -> None:
    with pytest.raises(BadOption, match="mode is 'w'"):
        locate("nbd://localhost", "w")


def test_an_nbd_export_has_no_direct_io() -> None:
    with pytest.raises(BadOption, match="direct"):
        locate("nbd://localhost", direct=True)


def test_a_url_opens_over_fsspec() -> None:
    fsspec = pytest.importorskip("fsspec")
    fsspec.filesystem("memory").pipe("memory://locate/x", b"remote")
    with locate("memory://locate/x") as storage:
        assert isinstance(storage, FsspecStorage)
        assert storage.read(0, 6) == b"remote"


def test_a_url_is_never_opened_for_writing() -> None:
    with pytest.raises(ReadOnly, match="s3://b/k"):
        locate("s3://b/k", "r+")


def test_a_url_has_no_direct_io() -> None:
    with pytest.raises(BadOption, match="direct"):
        locate("http://127.0.0.1/x", direct=True)


def test_a_missing_file_is_named() -> None:
    with pytest.raises(StorageError, match="cannot open '/nowhere/at/all': No such file"):
        locate("/nowhere/at/all")
