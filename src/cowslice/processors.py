"""How many processors this process may use: the one answer for all who start threads."""

from __future__ import annotations

import os
from functools import cache


@cache
def cores() -> int:
    """Processors that this process may use, as it was when first asked."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
