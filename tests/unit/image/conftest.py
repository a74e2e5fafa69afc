"""Small images that the tests of this room share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from cowslice.format.entries import Kind
from cowslice.format.geometry import Geometry
from cowslice.testing.model import Cell, ModelImage, build_image

GEOMETRY = Geometry(12)
Maker = Callable[..., ModelImage]


@pytest.fixture
def make(tmp_path: Path) -> Maker:
    """Write an image of the given kinds of clusters into the test's folder and return its model."""

    def write(name: str, kinds: Sequence[Kind], *, backing: bytes | str = b"", backing_format: bytes = b"qcow2",
              salt: int = 1, data_file: bytes = b"", size: int | None = None) -> ModelImage:
        raw_name = backing.encode() if isinstance(backing, str) else backing
        image = build_image(
            GEOMETRY, [Cell(kind) for kind in kinds], size=size or len(kinds) * GEOMETRY.cluster_size, salt=salt,
            backing=(raw_name, backing_format) if raw_name else None, data_file=data_file)
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(image.file)
        return image

    return write
