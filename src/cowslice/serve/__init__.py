"""Giving an image to someone else: the NBD server.

Calling this module, as `cowslice.serve(disk, unix="...")`, calls `server.serve`, which see.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from cowslice.serve.server import Server, serve


class _Door(ModuleType):
    """A package and a function of one name: whichever of the two is imported first, both work."""

    def __call__(self, *arguments: Any, **options: Any) -> Server:
        return serve(*arguments, **options)


sys.modules[__name__].__class__ = _Door
