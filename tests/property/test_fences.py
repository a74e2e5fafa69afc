"""Fences say of every byte what a plain dictionary of bytes says."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cowslice.image.fences import Fences

spans = st.tuples(st.integers(0, 60), st.integers(0, 12))
changes = st.lists(st.tuples(spans, st.one_of(st.none(), st.integers(0, 5))), max_size=60)


@given(changes, st.lists(spans, min_size=1, max_size=20))
def test_fences_say_what_a_dictionary_of_bytes_says(
    made: list[tuple[tuple[int, int], int | None]], asked: list[tuple[int, int]]
) -> None:
    fences, kinds = Fences(), {}
    for (start, length), kind in made:
        for byte in range(start, start + length):
            kinds.pop(byte, None)
            if kind is not None:
                kinds[byte] = kind
        if kind is None:
            fences.remove(start, length)
        else:
            fences.add(start, length, kind)
    for start, length in asked:
        held = [byte for byte in range(start, start + length) if byte in kinds]
        hit = fences.hit(start, length)
        assert (hit is not None) == bool(held)
        if hit is not None:
            assert hit[0] <= held[0] < hit[0] + hit[1]
            assert hit[2] == kinds[held[0]]
