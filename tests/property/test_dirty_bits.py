"""Compiled dirty bits say what a set of numbers says."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from hypothesis import given
from hypothesis import strategies as st

from cowslice.image.dirtybits import DirtyBits, Marks
from cowslice.testing.bitmapmodel import PlainDirtyBits

MOST = 40_000  # granules: more than one chunk of bits
SIZES = st.integers(0, MOST * 512)
LENGTHS = st.one_of(st.integers(0, 5000), st.integers(0, MOST * 512))
SPANS = st.tuples(st.just("mark"), st.integers(0, MOST * 512), LENGTHS)
STEPS = st.lists(st.one_of(SPANS, st.tuples(st.just("resize"), SIZES), st.tuples(st.just("clear"))), max_size=12)


@given(SIZES, STEPS, st.integers(0, MOST // 8), st.integers(0, 9000))
def test_bits_are_those_of_a_plain_set(size: int, steps: list[tuple], start: int, length: int) -> None:
    bits, plain = DirtyBits(size, 9), PlainDirtyBits(size, 9)
    for name, *arguments in steps:
        if name == "mark":
            bits.mark_span(*arguments)
            plain.mark_span(*arguments)
        elif name == "resize":
            bits.resize(*arguments)
            plain.resize(*arguments)
        else:
            bits.clear()
            plain.clear()
    whole = plain.read(0, MOST // 8 + 8)
    assert bits.read(0, MOST // 8 + 8) == whole
    assert bits.read(start, length) == plain.read(start, length)
    assert bits.touched(start, length) or not any(bits.read(start, length))
    assert not bits.lost


def test_marks_of_many_threads_are_all_kept() -> None:
    marks, sets = Marks(), [DirtyBits(MOST * 512, 9), DirtyBits(MOST * 512, 12)]
    marks.assign(sets)

    def mark(first: int) -> None:
        for number in range(first, MOST, 8):
            marks.mark_span(number * 512, 1)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(mark, range(8)))
    assert sets[0].read(0, MOST // 8) == b"\xff" * (MOST // 8)
    assert sets[1].read(0, MOST // 64) == b"\xff" * (MOST // 64)


def test_a_few_marks_on_a_huge_disk_take_little_memory() -> None:
    bits = DirtyBits(1 << 48, 16)
    bits.mark_span((1 << 48) - 1, 1)
    bits.mark_span(0, 1)
    assert bits.memory <= 8192
