"""Who belongs to a fleet: images found in a folder with their traces; lists as they are meant, or refused by line."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cowslice.errors import BadOption, CowsliceError, StorageError
from cowslice.tune import fleetlist
from cowslice.tune.fleetlist import MAGIC, Broken, Member, members
from cowslice.tune.study import Setting
from cowslice.units import KiB, MiB


def touch(folder: Path, *names: str, content: bytes = b"") -> None:
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)


def listed(folder: Path, text: str | bytes) -> tuple[Member | Broken, ...]:
    (folder / "disks.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    return members(folder / "disks.csv")


def test_a_folder_gives_its_images_in_order_with_the_traces_named_like_them(tmp_path: Path) -> None:
    touch(tmp_path, "b.qcow2", "a.img", "sub/disk", "c.qcow2", content=MAGIC)
    touch(tmp_path, "b.log", "a.img.trace.zst", "sub/disk.csv.gz", "other.log", "notes.txt", "c.qcow2.bak", "c.txt")
    at = {name: str(tmp_path / name) for name in ("a.img", "b.qcow2", "c.qcow2", "sub/disk")}
    assert members(tmp_path) == (
        Member(at["a.img"], at["a.img"] + ".trace.zst"), Member(at["b.qcow2"], str(tmp_path / "b.log")),
        Member(at["c.qcow2"]), Member(at["sub/disk"], at["sub/disk"] + ".csv.gz"))  # fmt: skip


def test_a_file_that_is_named_like_an_image_is_one_whatever_it_holds(tmp_path: Path) -> None:
    touch(tmp_path, "torn.qcow2", "raw.img")
    assert members(tmp_path) == (Member(str(tmp_path / "torn.qcow2")),)


def test_a_second_name_of_a_file_is_no_second_disk(tmp_path: Path) -> None:
    touch(tmp_path, "a.qcow2", content=MAGIC)
    os.link(tmp_path / "a.qcow2", tmp_path / "hard.qcow2")
    (tmp_path / "soft.qcow2").symlink_to("a.qcow2")
    assert members(tmp_path) == (Member(str(tmp_path / "a.qcow2")),)


def test_what_is_no_file_is_never_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.qcow2")
    with pytest.raises(BadOption, match="has no image"):
        members(tmp_path)


def test_several_traces_beside_one_image_are_not_chosen_from(tmp_path: Path) -> None:
    touch(tmp_path, "a.qcow2", content=MAGIC)
    touch(tmp_path, "a.log", "a.qcow2.csv")
    (broken,) = members(tmp_path)
    assert isinstance(broken, Broken)
    assert "several traces beside it ('a.log', 'a.qcow2.csv')" in broken.error


def test_a_link_that_leads_nowhere_is_named(tmp_path: Path) -> None:
    (tmp_path / "gone.qcow2").symlink_to("nowhere")
    (broken,) = members(tmp_path)
    assert isinstance(broken, Broken)
    assert "No such file" in broken.error


def test_a_list_of_names_is_a_list_of_images_beside_it(tmp_path: Path) -> None:
    text = "# two disks\n\na.qcow2\r\n/srv/b.qcow2\nhttp://host/c.qcow2\n"
    assert listed(tmp_path, text) == (Member(str(tmp_path / "a.qcow2")), Member("/srv/b.qcow2"),
                                      Member("http://host/c.qcow2"))


def test_a_line_may_name_a_trace_and_a_disk_in_it(tmp_path: Path) -> None:
    text = 'a.qcow2, a.log\n"odd, name.qcow2",all.csv,7\nc.qcow2,,\n'
    at = [str(tmp_path / name) for name in ("a.qcow2", "a.log", "odd, name.qcow2", "all.csv", "c.qcow2")]
    assert listed(tmp_path, text) == (Member(at[0], at[1]), Member(at[2], at[3], "7"), Member(at[4]))


def test_a_heading_names_columns_and_todays_sizes_of_each_disk(tmp_path: Path) -> None:
    text = "image,l2-cache-size,l2-cache-entry-size\na.qcow2,2M,64k\nb.qcow2\n"
    assert listed(tmp_path, text) == (
        Member(str(tmp_path / "a.qcow2"), today=Setting(l2_cache_size=2 * MiB, l2_cache_entry_size=64 * KiB)),
        Member(str(tmp_path / "b.qcow2")))  # fmt: skip


def test_any_file_name_can_stand_in_a_list(tmp_path: Path) -> None:
    (member,) = listed(tmp_path, b"caf\xe9 \xc3\xa9.qcow2\n")
    assert isinstance(member, Member)
    assert os.fsencode(member.image).endswith(b"/caf\xe9 \xc3\xa9.qcow2")


@pytest.mark.parametrize("text, line, told", [
    ("a,b,c,d\n", 1, "4 values, expected at most 3"), ("a\n,b\n", 2, "no image"), ("a\n\nb\na\n", 4, "image of line 1"),
    ("./a\na\n", 2, "image of line 1"), ("a,,7\n", 1, "disk '7' of no trace"), ('"a\n', 1, "comma-separated"),
    ('"a"b\n', 1, "comma-separated"), ("a\0b\n", 1, "printable"), ("a\x1b[2J\n", 1, "printable"),
    ("image,speed\n", 1, "the heading has 'speed'"), ("image,image\n", 1, "the heading has 'image'"),
    ("image,l2-cache-size\na,much\n", 2, "much"), ("json:{}\n", 1, "JSON"), ("a\nnbd:host:10809\n", 2, "nbd"),
])  # fmt: skip
def test_a_line_that_is_not_understood_is_refused_by_its_number(
    tmp_path: Path, text: str, line: int, told: str
) -> None:
    with pytest.raises(BadOption, match=rf"disks\.csv', line {line}: ") as caught:
        listed(tmp_path, text)
    assert told in str(caught.value)
    assert str(caught.value).isprintable()


def test_a_list_at_a_url_has_no_folder_for_relative_names(tmp_path: Path) -> None:
    (tmp_path / "disks").write_text("/srv/a.qcow2\n")
    assert members(f"local://{tmp_path}/disks") == (Member("/srv/a.qcow2"),)
    (tmp_path / "disks").write_text("/srv/a.qcow2\nb.qcow2\n")
    with pytest.raises(BadOption, match=r"line 2: 'b\.qcow2' is relative"):
        members(f"local://{tmp_path}/disks")


def test_a_list_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleetlist, "MOST_DISKS", 2)
    with pytest.raises(BadOption, match="line 3: the list goes on"):
        listed(tmp_path, "a\nb\nc\n")
    monkeypatch.setattr(fleetlist, "MOST_LIST_BYTES", 4)
    with pytest.raises(BadOption, match="longer than 4 bytes"):
        listed(tmp_path, "a\nb\nc\n")


def test_nobody_is_refused(tmp_path: Path) -> None:
    for source in (tmp_path, tmp_path / "empty"):
        (tmp_path / "empty").touch()
        with pytest.raises(BadOption, match="has no image"):
            members(source)
    with pytest.raises(StorageError, match="No such file"):
        members(tmp_path / "nowhere")


_WORDS = st.sampled_from(["image", ",", '"', "\n", "#", "trace", "disk", "cache-size", "1M", "a", "json:", "://", " "])


@given(content=st.binary(max_size=200) | st.lists(_WORDS, max_size=30).map(lambda words: "".join(words).encode()))
def test_whatever_a_list_holds_it_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    folder = tmp_path_factory.mktemp("list")
    try:
        found = listed(folder, content)
    except CowsliceError:
        return
    images = [member.image for member in found if isinstance(member, Member)]
    assert len(images) == len(set(images)) == len(found) > 0
    assert all("://" in image or os.path.isabs(image) for image in images)
