"""A backing name is replaced whole, whatever moment the power fails at."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cowslice.errors import BadOption
from cowslice.format.extensions import Extension, ExtensionType, encode_feature_names, with_extension
from cowslice.format.first_cluster import FirstCluster, decode_first_cluster, encode_first_cluster, lay_out
from cowslice.format.header import Header
from cowslice.image.renaming import renamed, switch_backing_name
from cowslice.storage.memory import MemoryStorage


class Kept(MemoryStorage):
    """Keeps its content as it was after each write, and while each write of several sectors was half done."""

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self.seen: list[bytes] = []

    def pwrite(self, offset: int, data: object) -> None:
        view = bytes(data)  # type: ignore[call-overload]
        for at in range(0, len(view), 512):
            super().pwrite(offset + at, view[at : at + 512])
            self.seen.append(self.read(0, self.length()))


@dataclass
class Layer:
    storage: Kept
    first: FirstCluster

    def adopt(self, first: FirstCluster) -> None:
        self.first = first


NAMES = st.one_of(st.just(0), st.integers(1, 200), st.integers(200, 1023))


def _extensions(kind: bytes | None) -> tuple[Extension, ...]:
    return with_extension((encode_feature_names(),), ExtensionType.BACKING_FORMAT, kind)


@given(st.lists(st.tuples(NAMES, st.sampled_from([b"raw", b"qcow2"])), min_size=2, max_size=5))
def test_at_any_moment_the_image_has_the_old_name_or_the_new_one(steps: list[tuple[int, bytes]]) -> None:
    header = Header(version=3, cluster_bits=16, size=1 << 20, l1_size=1, l1_table_offset=1 << 16,
                    refcount_table_offset=2 << 16, refcount_table_clusters=1)
    first = lay_out(header, _extensions(None))
    layer = Layer(Kept(encode_first_cluster(first).ljust(1 << 16, b"\0")), first)
    for number, (length, kind) in enumerate(steps):
        name = bytes([97 + number]) * length
        before = (layer.first.backing_name, layer.first.backing_format)
        after = (name or None, kind.decode() if name else None)
        layer.storage.seen.clear()
        switch_backing_name(layer, renamed(layer.first, _extensions(kind if name else None), name))  # type: ignore[arg-type]
        for content in layer.storage.seen:
            read = decode_first_cluster(content)
            assert (read.backing_name, read.backing_format) in (before, after)
        assert decode_first_cluster(layer.storage.read(0, 1 << 16)) == layer.first
        assert (layer.first.backing_name, layer.first.backing_format) == after


def test_a_name_that_does_not_fit_is_refused() -> None:
    first = lay_out(Header(version=3, cluster_bits=9, size=1 << 20), ())
    with pytest.raises(BadOption):
        renamed(first, (), b"x" * 400)
