"""Packing loses nothing, tells the truth about runs, and is as small as the formats promise."""

import random
import struct

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cowslice.cache.packing import PackedSlice

COPIED = 1 << 63
COMPRESSED = 1 << 62
cluster_bits = st.sampled_from([9, 12, 14, 16, 18, 21])
lengths = st.sampled_from([1, 2, 64, 128, 256, 512])


@st.composite
def runs_of_clusters(draw):
    """Words as an allocator leaves them: runs of host clusters, holes, zero clusters, compressed ones, rare rubbish."""
    bits, count = draw(cluster_bits), draw(lengths)
    rng = random.Random(draw(st.integers(0, 1 << 32)))
    kinds = draw(st.lists(st.sampled_from("nnnzhcpr"), min_size=1, max_size=4))
    longest = draw(st.sampled_from([1, 2, 20, 600]))
    words = []
    while len(words) < count:
        words += a_run(rng, rng.choice(kinds), rng.randint(1, longest), bits)
    return bits, words[:count]


def a_run(rng, kind, length, bits):
    start = rng.randrange(1, 1 << rng.choice([4, 20, 55 - bits]))
    tag = rng.choice([0, COPIED])
    if kind == "n":
        return [tag | (start + i) << bits for i in range(length)]
    if kind == "p":
        return [tag | 1 | (start + i) << bits for i in range(length)]
    if kind == "z":
        return [1] * length
    if kind == "h":
        return [0] * length
    if kind == "c":
        place = 62 - (bits - 8)
        return [COMPRESSED | rng.randrange(1 << (bits - 8)) << place | rng.randrange(1 << min(place, 40))
                for _ in range(length)]
    return [rng.getrandbits(64)]


def bytes_of(words, bitmaps=None):
    if bitmaps is None:
        return struct.pack(f">{len(words)}Q", *words)
    return b"".join(struct.pack(">QQ", w, b) for w, b in zip(words, bitmaps, strict=True))


@given(runs_of_clusters())
def test_every_word_comes_back(slice_):
    bits, words = slice_
    packed = PackedSlice(bytes_of(words), bits)
    assert [packed.locate(i)[0] for i in range(len(words))] == words


def continues(before, after, bits):
    """The obvious meaning of "one run": the same kind, and the next host cluster where there is one."""
    if before & COMPRESSED or after & COMPRESSED:
        return False
    if before & ~(COPIED | 1) == 0:
        return after == before
    return after == before + (1 << bits)


@given(runs_of_clusters())
def test_a_run_never_reaches_past_what_continues(slice_):
    bits, words = slice_
    packed = PackedSlice(bytes_of(words), bits)
    for i in range(0, len(words), 7):
        run = packed.locate(i)[2]
        assert 1 <= run <= len(words) - i
        assert all(continues(words[j - 1], words[j], bits) for j in range(i + 1, i + run))


@given(runs_of_clusters(), st.integers(1, 600))
def test_a_run_is_exact_up_to_what_was_wanted(slice_, want):
    bits, words = slice_
    packed = PackedSlice(bytes_of(words), bits)
    if packed.form == "raw":
        return
    for i in range(0, len(words), 5):
        true = 1
        while i + true < len(words) and continues(words[i + true - 1], words[i + true], bits):
            true += 1
        assert min(packed.locate(i, want)[2], want) == min(true, want)


@given(runs_of_clusters(), st.lists(st.integers(0, (1 << 64) - 1), min_size=1, max_size=20), st.integers(0, 1 << 32))
def test_extended_entries_come_back_with_their_bitmaps(slice_, pool, seed):
    bits, words = slice_
    rng = random.Random(seed)
    bitmaps = [rng.choice(pool) for _ in words]
    packed = PackedSlice(bytes_of(words, bitmaps), bits, True)
    located = [packed.locate(i) for i in range(len(words))]
    assert [(w, b) for w, b, _ in located] == list(zip(words, bitmaps, strict=True))
    for i, (_, bitmap, run) in enumerate(located):
        assert set(bitmaps[i:i + run]) == {bitmap}


@given(runs_of_clusters(), st.lists(st.integers(0, (1 << 64) - 1), min_size=1, max_size=20), st.booleans())
def test_all_at_once_is_the_same_as_one_by_one(slice_, pool, extended):
    bits, words = slice_
    bitmaps = [pool[i % len(pool)] for i in range(len(words))] if extended else None
    packed = PackedSlice(bytes_of(words, bitmaps), bits, extended)
    assert packed.unpacked() == [packed.locate(i)[:2] for i in range(len(words))]


@pytest.mark.parametrize("size", [0, 4, 7, 24, 513 * 8, 1024 * 8])
def test_what_is_no_slice_is_refused(size):
    with pytest.raises(ValueError, match=str(size)):
        PackedSlice(bytes(size), 16)


@pytest.mark.parametrize("bits", [-1, 8, 22, 1000])
def test_impossible_clusters_are_refused(bits):
    with pytest.raises(ValueError, match=str(bits)):
        PackedSlice(bytes(64), bits)


@given(st.lists(st.integers(0, (1 << 64) - 1), min_size=64, max_size=64))
@example([(1 << 64) - 1] * 64)
@example([COPIED] + [COPIED | i << 16 for i in range(1, 64)])
def test_any_words_at_all_come_back(words):
    packed = PackedSlice(bytes_of(words), 16)
    assert [packed.locate(i)[0] for i in range(64)] == words


@pytest.mark.parametrize("layout,form,most", [
    ("sequential", "sloped", 8),
    ("jitter", "sloped", 512),
    ("fragments", "runheads", 400),
    ("megabytes", "extents", 16 * 2 * 5),
    ("shuffled", "line", 1280),
])
def test_each_layout_gets_the_form_that_fits_it(layout, form, most):
    rng = random.Random(1)
    disk = 655_360
    hosts = {
        "sequential": lambda: range(1000, 1512),
        "jitter": lambda: [1000 + i + rng.randrange(-32, 32) for i in range(512)],
        "fragments": lambda: [4 * f + i for f in rng.sample(range(disk // 4), 128) for i in range(4)],
        "megabytes": lambda: [16 * f + i for f in rng.sample(range(disk // 16), 32) for i in range(16)],
        "shuffled": lambda: rng.sample(range(disk), 512),
    }[layout]()
    packed = PackedSlice(bytes_of([COPIED | h << 16 for h in hosts]), 16)
    assert packed.form == form
    assert packed.payload_bytes <= most
