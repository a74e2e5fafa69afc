"""Process exit statuses that several verbs share.

qemu-img answers a usage error with 1, which is also how `compare` says "different" and `check` says "failed". Here a
usage error is 64 (EX_USAGE of sysexits.h) in every verb, so that no script can take a typing error for a result. A
fault of this program itself is 70 (EX_SOFTWARE).
"""

from __future__ import annotations

OK = 0
FAILED = 1
USAGE = 64
OUR_FAULT = 70
INTERRUPTED = 128 + 2
BROKEN_PIPE = 128 + 13
