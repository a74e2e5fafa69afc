"""Chains: what an image names is found, judged, opened in the right format, and closed again."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import cowslice
from cowslice.cache.slicemap import SliceMap
from cowslice.format.entries import Kind
from cowslice.format.header import Autoclear, Incompatible
from cowslice.storage import FileStorage, MemoryStorage
from cowslice.testing.model import cluster_content
from tests.unit.image.conftest import GEOMETRY, Maker

DATA, HOLE, ZERO = Kind.NORMAL, Kind.UNALLOCATED, Kind.ZERO
CLUSTER = GEOMETRY.cluster_size


def set_header(path: Path, offset: int, value: int, length: int = 8) -> None:
    """Overwrite a header field in the file."""
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(value.to_bytes(length, "big"))


def descriptors() -> set[str]:
    return {os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")
            if os.path.exists(f"/proc/self/fd/{fd}")}


def test_unallocated_clusters_read_from_the_backing_file(tmp_path: Path, make: Maker) -> None:
    base = make("base.qcow2", [DATA, DATA, DATA], salt=2)
    top = make("top.qcow2", [DATA, HOLE, ZERO], backing="base.qcow2")
    with cowslice.open(tmp_path / "top.qcow2") as disk:
        assert [layer.format for layer in disk.layers] == ["qcow2", "qcow2"]
        assert disk.read(0, disk.size) == top.over(base.over(b""))


@pytest.mark.parametrize("clusters", [1, 2, 4])
def test_a_backing_file_may_be_shorter_or_longer_than_its_overlay(tmp_path: Path, make: Maker, clusters: int) -> None:
    base = make("base.qcow2", [DATA] * clusters, salt=2)
    top = make("top.qcow2", [HOLE, DATA, HOLE], backing="base.qcow2")
    with cowslice.open(tmp_path / "top.qcow2") as disk:
        assert disk.read(0, disk.size) == top.over(base.over(b""))


def test_a_shorter_backing_file_hides_what_lies_deeper(tmp_path: Path, make: Maker) -> None:
    """The middle layer ends the deeper one's view, as it did for the guest that wrote it."""
    make("deep.qcow2", [DATA, DATA], salt=3)
    make("middle.qcow2", [HOLE], backing="deep.qcow2", salt=2)
    make("top.qcow2", [HOLE, HOLE], backing="middle.qcow2")
    with cowslice.open(tmp_path / "top.qcow2") as disk:
        assert disk.read(0, CLUSTER) == cluster_content(GEOMETRY, 3, 0)
        assert disk.read(CLUSTER, CLUSTER) == bytes(CLUSTER)


@pytest.mark.parametrize("name", ["raw", "file", "host_device"])
def test_a_raw_backing_file_is_read_as_it_is_even_if_it_looks_like_an_image(
        tmp_path: Path, make: Maker, name: str) -> None:
    inner = make("base.raw", [DATA])
    make("top.qcow2", [HOLE], backing="base.raw", backing_format=name.encode())
    with cowslice.open(tmp_path / "top.qcow2") as disk:
        assert disk.layers[1].format == "raw"
        assert disk.read(0, CLUSTER) == inner.file[:CLUSTER]


@pytest.mark.parametrize("content, found", [(b"plain", "raw"), (None, "qcow2")])
def test_a_backing_file_without_a_format_is_probed_and_that_is_said(
        tmp_path: Path, make: Maker, content: bytes | None, found: str) -> None:
    make("base", [DATA])
    if content:
        (tmp_path / "base").write_bytes(content)
    make("top.qcow2", [HOLE], backing="base", backing_format=b"")
    said: list[str] = []
    with cowslice.open(tmp_path / "top.qcow2", on_warning=said.append) as disk:
        assert disk.layers[1].format == found
        assert disk.warnings == tuple(said)
    assert len(said) == 1
    assert f"looks like {found}" in said[0]


def test_a_backing_format_that_is_not_known_is_refused(tmp_path: Path, make: Maker) -> None:
    make("base", [DATA])
    make("top.qcow2", [HOLE], backing="base", backing_format=b"vm\x1bdk")
    with pytest.raises(cowslice.UnsupportedImage, match=r"format 'vm.x1bdk'") as refusal:
        cowslice.open(tmp_path / "top.qcow2")
    assert refusal.value.features == ("backing format vm\\x1bdk",)


def test_a_backing_file_that_is_not_there_is_an_error_of_the_world(tmp_path: Path, make: Maker) -> None:
    make("top.qcow2", [HOLE], backing="base.qcow2")
    with pytest.raises(cowslice.StorageError, match=r"base\.qcow2") as failure:
        cowslice.open(tmp_path / "top.qcow2")
    assert failure.value.errno == 2


def test_a_name_that_cannot_be_opened_is_shown_escaped(tmp_path: Path, make: Maker) -> None:
    make("top.qcow2", [HOLE], backing=b"evil\x1b[2J\nname")
    with pytest.raises(cowslice.StorageError, match="backing file that") as failure:
        cowslice.open(tmp_path / "top.qcow2")
    assert "\x1b" not in str(failure.value)
    assert "\n" not in str(failure.value)


def test_without_the_backing_file_what_it_holds_reads_as_zeros(tmp_path: Path, make: Maker) -> None:
    top = make("top.qcow2", [DATA, HOLE], backing="missing.qcow2")
    with cowslice.open(tmp_path / "top.qcow2", backing=None) as disk:
        assert disk.read(0, disk.size) == top.over(b"")


def test_a_name_outside_the_folder_is_refused_unless_the_gate_permits_it(tmp_path: Path, make: Maker) -> None:
    base = make("base.qcow2", [DATA], salt=2)
    make("images/top.qcow2", [HOLE], backing="../base.qcow2")
    top = tmp_path / "images" / "top.qcow2"
    with pytest.raises(cowslice.ReferenceRefused, match="outside the folder"):
        cowslice.open(top)
    with cowslice.open(top, gate=cowslice.FolderGate([tmp_path])) as disk:
        assert disk.read(0, CLUSTER) == base.over(b"")
    with cowslice.open(top, gate=cowslice.PermitGate()) as disk:
        assert disk.read(0, CLUSTER) == base.over(b"")


def test_an_absolute_name_is_used_as_it_is(tmp_path: Path, make: Maker) -> None:
    base = make("base.qcow2", [DATA], salt=2)
    make("sub/top.qcow2", [HOLE], backing=str(tmp_path / "base.qcow2"))
    with cowslice.open(tmp_path / "sub" / "top.qcow2", gate=cowslice.PermitGate()) as disk:
        assert disk.read(0, CLUSTER) == base.over(b"")


def test_a_relative_name_is_relative_to_the_image_that_holds_it(tmp_path: Path, make: Maker) -> None:
    deep = make("sub/deep.qcow2", [DATA], salt=3)
    make("sub/base.qcow2", [HOLE], backing="deep.qcow2", salt=2)
    make("top.qcow2", [HOLE], backing="sub/base.qcow2")
    with cowslice.open(tmp_path / "top.qcow2") as disk:
        assert disk.read(0, CLUSTER) == deep.over(b"")


def test_a_name_deeper_in_the_chain_may_use_the_whole_folder_of_the_top_image(tmp_path: Path, make: Maker) -> None:
    deep = make("deep.qcow2", [DATA], salt=3)
    make("sub/base.qcow2", [HOLE], backing="../deep.qcow2", salt=2)
    make("top.qcow2", [HOLE], backing="sub/base.qcow2")
    with cowslice.open(tmp_path / "top.qcow2") as disk:
        assert disk.read(0, CLUSTER) == deep.over(b"")


def test_an_image_from_a_storage_names_nothing_relative(make: Maker) -> None:
    top = make("top.qcow2", [HOLE], backing="base.qcow2")
    with pytest.raises(cowslice.ReferenceRefused, match="not opened by a name"):
        cowslice.open(MemoryStorage(top.file))


def test_the_caller_may_name_another_backing_file_without_any_gate(tmp_path: Path, make: Maker) -> None:
    make("top.qcow2", [HOLE], backing="/nowhere")
    content = os.urandom(CLUSTER)
    (tmp_path / "other").write_bytes(content)
    options = {"backing_format": "raw", "gate": cowslice.DenyGate()}
    for other in (tmp_path / "other", MemoryStorage(content)):
        with cowslice.open(tmp_path / "top.qcow2", backing=other, **options) as disk:
            assert disk.read(0, CLUSTER) == content


def test_what_a_replaced_backing_file_names_is_judged_by_its_own_folder(tmp_path: Path, make: Maker) -> None:
    deep = make("else/deep.qcow2", [DATA], salt=3)
    make("else/base.qcow2", [HOLE], backing="deep.qcow2", salt=2)
    make("images/top.qcow2", [HOLE])
    with cowslice.open(tmp_path / "images" / "top.qcow2", backing=tmp_path / "else" / "base.qcow2") as disk:
        assert disk.read(0, CLUSTER) == deep.over(b"")


def test_a_backing_file_is_not_guessed_to_be_raw_for_the_caller(tmp_path: Path, make: Maker) -> None:
    make("top.qcow2", [HOLE])
    with pytest.raises(cowslice.NotAnImage):
        cowslice.open(tmp_path / "top.qcow2", backing=MemoryStorage(bytes(512)))


@pytest.mark.parametrize("name", ["self.qcow2", "./self.qcow2", "link.qcow2", "hard.qcow2"])
def test_a_file_that_is_its_own_backing_file_is_refused_whatever_it_is_called(
        tmp_path: Path, make: Maker, name: str) -> None:
    make("self.qcow2", [HOLE], backing=name)
    (tmp_path / "link.qcow2").symlink_to("self.qcow2")
    (tmp_path / "hard.qcow2").hardlink_to(tmp_path / "self.qcow2")
    with pytest.raises(cowslice.ReferenceRefused, match="its own backing file"):
        cowslice.open(tmp_path / "self.qcow2")


def test_a_loop_of_several_files_is_refused(tmp_path: Path, make: Maker) -> None:
    for name, backing in (("a", "b"), ("b", "c"), ("c", "a")):
        make(name, [HOLE], backing=backing)
    with pytest.raises(cowslice.ReferenceRefused, match="its own backing file"):
        cowslice.open(tmp_path / "a")


def test_a_chain_may_be_as_deep_as_the_limit_and_no_deeper(tmp_path: Path, make: Maker) -> None:
    for level in range(40):
        make(f"{level}", [HOLE], backing=f"{level + 1}", salt=level + 1)
    bottom = make("40", [DATA], salt=99)
    with cowslice.open(tmp_path / "0", max_depth=41) as disk:
        assert len(disk.layers) == 41
        assert disk.read(0, CLUSTER) == bottom.over(b"")
    with pytest.raises(cowslice.UnsupportedImage, match="more than 40 layers"):
        cowslice.open(tmp_path / "0", max_depth=40)


def test_the_data_of_an_external_data_file_is_read_from_it(tmp_path: Path, make: Maker) -> None:
    image = make("top.qcow2", [DATA, ZERO, DATA], data_file=b"data.raw")
    (tmp_path / "data.raw").write_bytes(image.data_file)
    with cowslice.open(tmp_path / "top.qcow2") as disk:
        assert disk.read(0, disk.size) == image.over(b"")
        assert [extent.filename for extent in disk.extents()] == [str(tmp_path / "data.raw"), None,
                                                                  str(tmp_path / "data.raw")]


def test_a_data_file_passes_the_gate_like_a_backing_file(tmp_path: Path, make: Maker) -> None:
    make("top.qcow2", [DATA], data_file=b"/etc/passwd")
    with pytest.raises(cowslice.ReferenceRefused, match="data file '/etc/passwd'"):
        cowslice.open(tmp_path / "top.qcow2")


def test_the_caller_may_name_another_data_file(tmp_path: Path, make: Maker) -> None:
    image = make("top.qcow2", [DATA], data_file=b"/etc/passwd")
    with cowslice.open(tmp_path / "top.qcow2", data_file=MemoryStorage(image.data_file)) as disk:
        assert disk.read(0, disk.size) == image.over(b"")


def test_a_data_file_for_an_image_that_has_none_is_a_bad_option(tmp_path: Path, make: Maker) -> None:
    make("top.qcow2", [DATA])
    with pytest.raises(cowslice.BadOption, match="data_file"):
        cowslice.open(tmp_path / "top.qcow2", data_file=MemoryStorage(b""))


def test_raw_external_data_excludes_a_backing_file(tmp_path: Path, make: Maker) -> None:
    image = make("top.qcow2", [HOLE], data_file=b"data.raw", backing="base.qcow2")
    set_header(tmp_path / "top.qcow2", 88, Autoclear.RAW_EXTERNAL)
    (tmp_path / "data.raw").write_bytes(image.data_file)
    with pytest.raises(cowslice.MalformedImage, match="raw external data and a backing file"):
        cowslice.open(tmp_path / "top.qcow2")


def test_a_dirty_image_is_readable_and_says_so(tmp_path: Path, make: Maker) -> None:
    image = make("top.qcow2", [DATA])
    set_header(tmp_path / "top.qcow2", 72, Incompatible.DIRTY)
    with cowslice.open(tmp_path / "top.qcow2") as disk:
        assert (disk.dirty, disk.corrupt, disk.warnings) == (True, False, ())
        assert disk.read(0, disk.size) == image.over(b"")


def test_an_image_marked_corrupt_is_readable_and_warned_about(tmp_path: Path, make: Maker) -> None:
    image = make("top.qcow2", [DATA])
    set_header(tmp_path / "top.qcow2", 72, Incompatible.CORRUPT)
    said: list[str] = []
    with cowslice.open(tmp_path / "top.qcow2", on_warning=said.append) as disk:
        assert disk.corrupt
        assert disk.read(0, disk.size) == image.over(b"")
    assert len(said) == 1
    assert "marked corrupt" in said[0]


def test_metadata_only_opens_nothing_that_the_image_names_and_reads_no_data(tmp_path: Path, make: Maker) -> None:
    make("top.qcow2", [HOLE, DATA], backing="/nowhere/at/all", data_file=b"/neither")
    with cowslice.open(tmp_path / "top.qcow2", metadata_only=True) as disk:
        assert [(one.start, one.data) for one in disk.extents()] == [(0, False), (CLUSTER, True)]
        for offset in (0, CLUSTER):
            with pytest.raises(cowslice.RequestError, match="metadata only"):
                disk.read(offset, 1)
        with pytest.raises(cowslice.RequestError, match="metadata only"):
            disk.read_many([0], 1, bytearray(1))


def test_every_layer_shares_one_metadata_cache(tmp_path: Path, make: Maker) -> None:
    make("base.qcow2", [DATA], salt=2)
    make("top.qcow2", [HOLE], backing="base.qcow2")
    with cowslice.open(tmp_path / "top.qcow2", l2_cache_size="256k") as disk:
        maps = [layer.slices for layer in disk.layers]  # type: ignore[attr-defined]
        assert all(isinstance(one, SliceMap) and one.cache is disk.cache for one in maps)
        assert disk.cache.budget == 256 << 10


def test_a_failed_open_leaves_no_file_open(tmp_path: Path, make: Maker) -> None:
    make("base.qcow2", [HOLE], backing="missing.qcow2")
    make("top.qcow2", [HOLE], backing="base.qcow2")
    before = descriptors()
    with pytest.raises(cowslice.StorageError):
        cowslice.open(tmp_path / "top.qcow2")
    assert descriptors() == before


def test_closing_closes_every_file_but_not_a_storage_of_the_caller(tmp_path: Path, make: Maker) -> None:
    make("base.qcow2", [DATA])
    make("top.qcow2", [HOLE], backing="base.qcow2")
    before = descriptors()
    with FileStorage(tmp_path / "base.qcow2") as base:
        disk = cowslice.open(tmp_path / "top.qcow2", backing=base)
        disk.close()
        assert base.read(0, 4) == b"QFI\xfb"
    assert descriptors() == before


@pytest.mark.parametrize("option", [{"backing": None}, {"snapshot": "a"}, {"backing": MemoryStorage(b"")}])
def test_a_raw_disk_takes_no_option_of_qcow2(option: dict[str, object]) -> None:
    storage = MemoryStorage(bytes(1024))
    if option == {"backing": None}:
        with cowslice.open(storage, format="raw", **option) as disk:
            assert len(disk.layers) == 1
        return
    with pytest.raises(cowslice.BadOption):
        cowslice.open(storage, format="raw", **option)
