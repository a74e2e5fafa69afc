"""What is pasted means, by QEMU's own rules, what was meant."""

from __future__ import annotations

import xml.etree.ElementTree as xml

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cowslice.cache.sizes import plan_cache_sizes
from cowslice.format.geometry import Geometry
from cowslice.tune.paste import Pastes, libvirt_size, option_size, pastes
from cowslice.units import GiB, KiB, MiB, parse_size


def made(path: str = "/vm/a.qcow2", cache: int = MiB, entry: int = 4 * KiB, full: int = 5 * MiB) -> Pastes:
    return pastes(path, Geometry(16), qemu=(cache, entry), ours=512 * KiB, full_coverage=full)


@given(st.integers(0, 1 << 50))
def test_a_size_is_told_exactly(size: int) -> None:
    assert parse_size(option_size(size)) == size


def test_a_comma_in_a_name_is_doubled() -> None:
    assert "file=/vm/a,,b.qcow2,format" in made("/vm/a,b.qcow2").drive
    assert "filename=/vm/a,,b.qcow2,l2" in made("/vm/a,b.qcow2").blockdev
    assert "filename=/vm/a,,b.qcow2,l2" in made("/vm/a,b.qcow2").cowslice


@pytest.mark.parametrize("path", ["/a'b", '/a"b', "/a\\b", "/a\nb", "/ä"])
def test_the_python_line_names_the_file(path: str) -> None:
    call = made(path).python
    assert eval(call, {"cowslice": type("door", (), {"open": staticmethod(lambda name, **_: name)})}) == path


@given(st.integers(64 * KiB, 64 * MiB), st.sampled_from([12, 14, 16, 18, 21]))
def test_libvirts_size_leaves_what_was_meant_for_l2_tables(cache: int, cluster_bits: int) -> None:
    geometry = Geometry(cluster_bits)
    full = plan_cache_sizes(400 * GiB, geometry, qemu=True).full_coverage
    cache = min(cache, full)
    sizes = plan_cache_sizes(400 * GiB, geometry, cache_size=libvirt_size(cache, geometry), qemu=True)
    assert sizes.l2_cache_size // sizes.l2_cache_entry_size == max(2, cache // sizes.l2_cache_entry_size)


def test_libvirts_words_are_xml() -> None:
    root = xml.fromstring(made().libvirt)
    assert root.findtext("metadata_cache/max_size") == str(MiB + 256 * KiB)


@pytest.mark.parametrize("cache, entry, noted", [
    (MiB, 4 * KiB, False), (MiB, 512, True), (5 * MiB, 64 * KiB, False), (5 * MiB, 4 * KiB, True),
])  # fmt: skip
def test_what_libvirt_cannot_say_is_noted(cache: int, entry: int, noted: bool) -> None:
    assert bool(made(cache=cache, entry=entry).libvirt_note) is noted
