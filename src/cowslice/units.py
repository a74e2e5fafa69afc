"""Bytes, sizes that people write, and the three roundings that everybody needs.

Suffixes are powers of 1024, as in qemu-img: `b` (ignored), `k`, `M`, `G`, `T`, `P`, `E`.
"""

from __future__ import annotations

from cowslice.errors import BadOption

KiB = 1 << 10
MiB = 1 << 20
GiB = 1 << 30
TiB = 1 << 40
SECTOR = 512

_SUFFIXES = {"": 0, "k": 10, "m": 20, "g": 30, "t": 40, "p": 50, "e": 60}
# No size has more than 19 digits; a longer number is not worth the time that reading it takes.
_SIZE = r"\s*(\d{1,19})(\.\d{1,19})?\s*(?:([kmgtpe])(?:i?b)?|b)?\s*"
_NAMES = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")


def div_ceil(n: int, d: int) -> int:
    return -(-n // d)


def round_up(n: int, step: int) -> int:
    return -(-n // step) * step


def is_power_of_two(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


def parse_size(text: str | int, name: str = "size") -> int:
    """Bytes of "64k", "1.5G", "10 MiB" or 4096. Raises BadOption that names `name`."""
    if isinstance(text, int) and not isinstance(text, bool):
        size = text
    else:
        size = _size_of_words(str(text), name)
    if size < 0:
        raise BadOption(f"{name} is {size}, expected a size of zero or more bytes")
    if size >= 1 << 63:
        raise BadOption(f"{name} is '{text}', expected less than 8 EiB")
    return size


def _size_of_words(text: str, name: str) -> int:
    import re  # here, because `check` of a sound image ends before re would be imported

    match = re.fullmatch(_SIZE, text, re.IGNORECASE | re.ASCII)
    if not match:
        raise BadOption(f"{name} is '{text}', expected a size such as 65536, 64k, 1.5G or 2T")
    whole, fraction, suffix = match.groups(default="")
    scale = 1 << _SUFFIXES[suffix.lower()]
    if fraction and scale == 1:
        raise BadOption(f"{name} is '{text}', expected a whole number of bytes, or a suffix such as k or M")
    return int(whole) * scale + (int(float(fraction) * scale) if fraction else 0)


def format_size(size: int) -> str:
    """A size people can read: 65536 -> '64 KiB', 1610612736 -> '1.5 GiB'. Three digits, four when they are whole."""
    power = min((size.bit_length() - 1) // 10, len(_NAMES) - 1) if size > 0 else 0
    value = size / (1 << 10 * power)
    # Three digits of 999.7 would be "1e+03".
    return f"{value:.3g} {_NAMES[power]}" if value < 999.5 else f"{int(value)} {_NAMES[power]}"
