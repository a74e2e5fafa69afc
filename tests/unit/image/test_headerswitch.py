"""The first cluster is replaced whole, whatever moment the power fails at."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from cowslice.errors import BadOption
from cowslice.format.extensions import BitmapsPointer, Extension, ExtensionType, encode_feature_names, with_extension
from cowslice.format.first_cluster import FirstCluster, decode_first_cluster, encode_first_cluster, lay_out
from cowslice.format.header import Autoclear, Header, Incompatible
from cowslice.format.limits import HEADER_LENGTH_V2
from cowslice.image.headerswitch import is_whole, rearranged, switch_first_cluster
from cowslice.storage import MemoryStorage, Storage
from cowslice.testing.crash import CrashRecord, LyingStorage, crash_states

OTHER = 0x12345678  # a type that nobody knows


@dataclass
class Layer:
    storage: Storage
    first: FirstCluster

    def adopt(self, first: FirstCluster) -> None:
        self.first = first


def header(*, version: int = 3, cluster_bits: int = 16, data_file: bool = False, bitmaps: bool = False) -> Header:
    fields = {"l1_size": 1, "l1_table_offset": 1 << 16, "refcount_table_offset": 2 << 16, "refcount_table_clusters": 1}
    if version == 2:
        return Header(version=2, cluster_bits=cluster_bits, size=1 << 20, header_length=HEADER_LENGTH_V2, tail=b"",
                      **fields)
    return Header(version=3, cluster_bits=cluster_bits, size=1 << 20,
                  incompatible=Incompatible.DATA_FILE if data_file else Incompatible(0),
                  autoclear=Autoclear.BITMAPS if bitmaps else Autoclear(0), **fields)


LENGTHS = st.one_of(st.just(0), st.integers(1, 200), st.integers(200, 1023))


@st.composite
def first_clusters(draw: st.DrawFn) -> FirstCluster:
    """All that can be in the first cluster, of either version, short or long."""
    version = draw(st.sampled_from([2, 3, 3]))
    extensions: tuple[Extension, ...] = ()
    if kind := draw(st.sampled_from([b"", b"raw", b"qcow2"])):
        extensions = with_extension(extensions, ExtensionType.BACKING_FORMAT, kind)
    data = draw(LENGTHS) if version == 3 else 0
    pointer = draw(st.none() | st.integers(1, 9)) if version == 3 else None
    if version == 3 and draw(st.booleans()):
        extensions = with_extension(extensions, ExtensionType.FEATURE_NAMES, encode_feature_names().payload)
    if data:
        extensions = with_extension(extensions, ExtensionType.DATA_FILE, draw(st.sampled_from([b"d", b"e"])) * data)
    if pointer is not None:
        named = BitmapsPointer(pointer, 4096 * pointer, pointer << 16).encode()
        extensions = with_extension(extensions, ExtensionType.BITMAPS, named.payload)
    if length := draw(LENGTHS):
        extensions += (Extension(OTHER, b"o" * length),)
    name = draw(st.sampled_from([b"a", b"b"])) * draw(LENGTHS)
    return lay_out(header(version=version, data_file=bool(data), bitmaps=pointer is not None), extensions, name)


def meaning(first: FirstCluster) -> tuple[object, ...]:
    """All that it says, but for where in the cluster it says it."""
    told = replace(first.header, header_length=104 if first.header.version == 3 else HEADER_LENGTH_V2, tail=b"",
                   backing_file_offset=0)
    return told, first.extensions, first.raw_backing_name


def crashed(old: FirstCluster, new: FirstCluster, *lies: int) -> list[FirstCluster]:
    """What can be read after a crash while one takes the place of the other."""
    record = CrashRecord()
    content = encode_first_cluster(old).ljust(1 << old.header.cluster_bits, b"\0")
    layer = Layer(LyingStorage(record.storage(content), *lies), old)
    switch_first_cluster(layer, new)  # type: ignore[arg-type]
    assert layer.first == new
    return [decode_first_cluster(state.storage().read(0, len(content))) for state in crash_states(record, limit=24)]


@given(first_clusters(), first_clusters())
def test_a_crash_leaves_the_old_or_the_new(old: FirstCluster, new: FirstCluster) -> None:
    assume(is_whole(old, new))
    assert {meaning(old), meaning(new)} >= {meaning(one) for one in crashed(old, new)}


@given(first_clusters(), first_clusters())
def test_where_version_3_is_either_there_is_always_a_way(old: FirstCluster, new: FirstCluster) -> None:
    assert is_whole(old, new) or (old.header.version, new.header.version) == (2, 2)


@given(first_clusters(), first_clusters())
def test_without_a_crash_it_is_the_new_one_and_nothing_else(old: FirstCluster, new: FirstCluster) -> None:
    storage = MemoryStorage(encode_first_cluster(old).ljust(1 << 16, b"\0"))
    switch_first_cluster(Layer(storage, old), new)  # type: ignore[arg-type]
    assert storage.read(0, 1 << 16) == encode_first_cluster(new).ljust(1 << 16, b"\0")


def test_without_its_first_barrier_a_name_can_be_torn() -> None:
    table = (encode_feature_names(),)
    old = lay_out(header(data_file=True), with_extension(table, ExtensionType.DATA_FILE, b"d" * 700))
    new = rearranged(old, extensions=with_extension(table, ExtensionType.DATA_FILE, b"e" * 700))
    assert any(one.data_file_name not in (old.data_file_name, new.data_file_name) for one in crashed(old, new, 0))
    assert {one.data_file_name for one in crashed(old, new)} == {old.data_file_name, new.data_file_name}


def test_in_a_cluster_without_room_beside_it_says_so() -> None:
    old = lay_out(header(cluster_bits=10), (), b"a" * 700)
    assert not is_whole(old, rearranged(old, raw_backing_name=b"b" * 700))
    assert is_whole(old, rearranged(old, raw_backing_name=b"b" * 300))
    assert is_whole(old, rearranged(old, raw_backing_name=b""))


def test_in_a_cluster_of_one_sector_it_is_always_whole() -> None:
    old = lay_out(header(cluster_bits=9), (), b"a" * 380)
    assert is_whole(old, rearranged(old, raw_backing_name=b"b" * 300))


def test_a_last_record_that_ends_with_the_cluster_leaves_the_next_one_alone() -> None:
    old = lay_out(header(cluster_bits=10), (Extension(OTHER, bytes(300)),))
    new = FirstCluster(old.header, (Extension(OTHER, b"x" * (1024 - old.header.header_length - 8)),))
    storage = MemoryStorage(encode_first_cluster(old).ljust(1024, b"\0") + b"next")
    switch_first_cluster(Layer(storage, old), new)  # type: ignore[arg-type]
    assert storage.read(0, 1028) == encode_first_cluster(new) + b"next"


def test_a_name_that_does_not_fit_is_refused() -> None:
    first = lay_out(Header(version=3, cluster_bits=9, size=1 << 20), ())
    with pytest.raises(BadOption):
        rearranged(first, raw_backing_name=b"x" * 400)
