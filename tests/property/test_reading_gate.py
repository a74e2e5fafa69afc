"""No name, however it is spelt, leads the default gate out of the image's folder."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import cowslice
from cowslice.format.entries import Kind
from cowslice.image.gate import FolderGate, Permit, Role, resolve, root_of
from cowslice.testing.model import Cell, build_image
from tests.unit.image.conftest import GEOMETRY

PARTS = ("..", ".", "", "sub", "out", "loop", "missing", "base.raw", "etc", "passwd", "~", "a:b", "file:", "\n", "%2e")
names = st.one_of(
    st.lists(st.sampled_from(PARTS), min_size=1, max_size=8).map("/".join),
    st.binary(min_size=1, max_size=40).filter(lambda name: b"\0" not in name).map(os.fsdecode),
)


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A folder with a link out of it, a link to itself, and something secret beside it."""
    with tempfile.TemporaryDirectory(prefix="cowslice-") as name:
        inside = Path(name).resolve() / "images"
        (inside / "sub").mkdir(parents=True)
        (inside / "out").symlink_to("/")
        (inside / "loop").symlink_to("loop")
        (inside / "base.raw").write_bytes(b"public" * 1000)
        (inside.parent / "base.raw").write_bytes(b"secret" * 1000)
        yield inside


@given(name=names)
def test_a_permitted_name_leads_under_the_folder(folder: Path, name: str) -> None:
    image = str(folder / "top.qcow2")
    try:
        reference = resolve(Role.BACKING, name, None, image=image, root=root_of(image))
    except cowslice.ReferenceRefused:
        return
    if isinstance(FolderGate().judge(reference), Permit):
        assert reference.local
        assert os.path.realpath(reference.target).startswith(f"{folder}/")


@given(name=names)
def test_an_image_with_any_backing_name_opens_or_is_refused_and_never_shows_a_secret(folder: Path, name: str) -> None:
    image = build_image(GEOMETRY, [Cell(Kind.UNALLOCATED)], size=4096, backing=(os.fsencode(name), b"raw"))
    (folder / "top.qcow2").write_bytes(image.file)
    try:
        with cowslice.open(folder / "top.qcow2") as disk:
            seen = disk.read(0, disk.size)
    except cowslice.CowsliceError as error:
        assert str(error).isprintable()
        return
    assert seen in (bytes(4096), (b"public" * 1000)[:4096])


@given(name=names)
def test_a_relative_name_beside_a_remote_image_stays_on_its_server_and_in_its_folder(name: str) -> None:
    image = "https://host/images/top.qcow2"
    try:
        reference = resolve(Role.BACKING, name, None, image=image, root=root_of(image))
    except cowslice.ReferenceRefused:
        return
    if isinstance(FolderGate().judge(reference), Permit):
        assert reference.target.startswith("https://host/images/")
        assert ".." not in reference.target.split("/")
