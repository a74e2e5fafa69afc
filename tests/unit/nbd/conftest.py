"""The ways to feed a message, as a fixture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.unit.nbd.talk import WAYS

Feed = Callable[[Any, bytes], list[Any]]


@pytest.fixture(params=WAYS, ids=lambda way: way.__name__)
def feed(request: pytest.FixtureRequest) -> Feed:
    way: Feed = request.param
    return way
