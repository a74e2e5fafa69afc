"""Numbers of the protocol that compiled code has to repeat."""

from __future__ import annotations

from operator import attrgetter

import pytest

from cowslice.nbd import wire
from cowslice.serve.nbd_frames import numbers


@pytest.mark.parametrize("name, number", numbers().items())
def test_compiled_code_says_the_number_that_the_protocol_says(name: str, number: int) -> None:
    assert number == int(attrgetter(name)(wire))
