"""Fences in a plain list: what the compiled ones are held against, and what tests of their users take."""

from __future__ import annotations


class ListFences:
    """Spans of host bytes with a kind each; every question looks at all of them."""

    def __init__(self) -> None:
        self.spans: list[tuple[int, int, int]] = []

    def add(self, start: int, length: int, kind: int) -> None:
        """Fence a span. Touching another one is the caller's fault."""
        assert self.hit(start, length) is None, f"two fences touch at {start:#x}"
        self.spans.append((start, length, kind))

    def remove(self, start: int, length: int) -> None:
        """Take the fence of exactly this span away."""
        self.spans = [span for span in self.spans if span[:2] != (start, length)]

    def hit(self, start: int, length: int) -> tuple[int, int, int] | None:
        """Return the lowest fence (start, length, kind) that the span touches."""
        touched = (span for span in self.spans if span[0] < start + length and start < span[0] + span[1])
        return min(touched, default=None)
