"""Numbers, flags and fixed layouts of the NBD protocol; every field is big-endian.

It knows no order of messages and keeps no state. Sources: the NBD specification (doc/proto.md of the nbd project) and
its branch extension-ext-header for everything called extended.
"""

from __future__ import annotations

import errno
from enum import IntEnum, IntFlag
from struct import Struct

NBD_MAGIC = 0x4E42444D41474943  # "NBDMAGIC"
OPTION_MAGIC = 0x49484156454F5054  # "IHAVEOPT"
OLDSTYLE_MAGIC = 0x0000420281861253
OPTION_REPLY_MAGIC = 0x0003E889045565A9
REQUEST_MAGIC = 0x25609513
EXTENDED_REQUEST_MAGIC = 0x21E41C71
SIMPLE_REPLY_MAGIC = 0x67446698
STRUCTURED_REPLY_MAGIC = 0x668E33EF
EXTENDED_REPLY_MAGIC = 0x6E8A278C

GREETING = Struct(">QQH")  # magic, option magic, handshake flags
CLIENT_FLAGS = Struct(">I")
OPTION = Struct(">QII")  # magic, option, length
OPTION_REPLY = Struct(">QIII")  # magic, option, answer, length
OLD_EXPORT = Struct(">QH")  # what answers EXPORT_NAME: size, flags; then OLD_PADDING zeroes
OLD_PADDING = 124
COMPACT_REQUEST = Struct(">IHHQQI")  # magic, flags, command, cookie, offset, length
EXTENDED_REQUEST = Struct(">IHHQQQ")
SIMPLE_REPLY = Struct(">IIQ")  # magic, error, cookie
STRUCTURED_REPLY = Struct(">IHHQI")  # magic, flags, chunk, cookie, length
EXTENDED_REPLY = Struct(">IHHQQQ")  # magic, flags, chunk, cookie, offset of the request, length
U16 = Struct(">H")
U32 = Struct(">I")
U64 = Struct(">Q")
HOLE = Struct(">QI")  # offset, length
ERROR = Struct(">IH")  # error, length of the message
STATUS_EXTENT = Struct(">II")  # length, status
EXTENDED_STATUS = Struct(">II")  # context, number of extents
EXTENDED_EXTENT = Struct(">QQ")

MAX_STRING = 4096  # the specification's limit for every string
MAX_OPTION_KEPT = 1 << 20  # a larger option is skipped, not stored: no real one comes near
MAX_OPTION = 1 << 25  # a larger option is an attack: QEMU draws the line there too
MAX_OPTIONS = 4096  # options in one handshake; a client that lists thousands of exports needs some
MAX_QUERIES = 1024  # in one LIST or SET_META_CONTEXT
MAX_CONTEXTS = 256  # selected at once: each one costs a chunk in every block status reply
MAX_PAYLOAD = 1 << 25  # of one request: what the specification wants every server to take
MAX_STATUS_EXTENTS = 1 << 17  # in one chunk: 1 MiB of compact descriptors; the specification's end is 2^20
MAX_STATUS_EXTENTS_TAKEN = 1 << 20  # in one chunk from a server: the specification's end
MAX_MINIMUM_BLOCK = 1 << 16
MAX_SIZE = (1 << 63) - 1  # of an export; what an off_t can say
U16_MAX = (1 << 16) - 1
U32_MAX = (1 << 32) - 1
SHOWN_NAME = 80  # characters of a name that somebody sent us, in a message


class HandshakeFlag(IntFlag):
    """What the server says about the handshake; the client answers with the same bits."""

    FIXED_NEWSTYLE = 1
    NO_ZEROES = 2


# A plain number: the complement of an IntFlag knows no bits beyond its members.
KNOWN_HANDSHAKE_FLAGS = int(HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES)


class Option(IntEnum):
    """What a client asks for before transmission."""

    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10
    EXTENDED_HEADERS = 11


class Answer(IntEnum):
    """Types of replies to an option; bit 31 is set in those that refuse it."""

    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    ERR_UNSUP = 0x80000001
    ERR_POLICY = 0x80000002
    ERR_INVALID = 0x80000003
    ERR_PLATFORM = 0x80000004
    ERR_TLS_REQD = 0x80000005
    ERR_UNKNOWN = 0x80000006
    ERR_SHUTDOWN = 0x80000007
    ERR_BLOCK_SIZE_REQD = 0x80000008
    ERR_TOO_BIG = 0x80000009
    ERR_EXT_HEADER_REQD = 0x8000000A


ANSWER_IS_ERROR = 1 << 31


class InfoType(IntEnum):
    """What one INFO answer tells."""

    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


class ExportFlag(IntFlag):
    """What an export can do: the transmission flags."""

    HAS_FLAGS = 1 << 0
    READ_ONLY = 1 << 1
    SEND_FLUSH = 1 << 2
    SEND_FUA = 1 << 3
    ROTATIONAL = 1 << 4
    SEND_TRIM = 1 << 5
    SEND_WRITE_ZEROES = 1 << 6
    SEND_DF = 1 << 7
    CAN_MULTI_CONN = 1 << 8
    SEND_RESIZE = 1 << 9
    SEND_CACHE = 1 << 10
    SEND_FAST_ZERO = 1 << 11
    BLOCK_STATUS_PAYLOAD = 1 << 12


class Command(IntEnum):
    """What a request wants done."""

    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    CACHE = 5
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7


class CommandFlag(IntFlag):
    """How a request wants it done."""

    FUA = 1 << 0
    NO_HOLE = 1 << 1
    DF = 1 << 2
    REQ_ONE = 1 << 3
    FAST_ZERO = 1 << 4
    PAYLOAD_LEN = 1 << 5


REPLY_DONE = 1  # flag of the last chunk of a reply


class Chunk(IntEnum):
    """Types of structured and extended reply chunks; bit 15 is set in errors."""

    NONE = 0
    OFFSET_DATA = 1
    OFFSET_HOLE = 2
    BLOCK_STATUS = 5
    BLOCK_STATUS_EXT = 6
    ERROR = 0x8001
    ERROR_OFFSET = 0x8002


CHUNK_IS_ERROR = 1 << 15


class NbdError(IntEnum):
    """The protocol's error numbers: fixed, whatever the system calls them."""

    EPERM = 1
    EIO = 5
    ENOMEM = 12
    EINVAL = 22
    ENOSPC = 28
    EOVERFLOW = 75
    ENOTSUP = 95
    ESHUTDOWN = 108


class Mode(IntEnum):
    """How replies look, in the order of what they can say."""

    SIMPLE = 0
    STRUCTURED = 1
    EXTENDED = 2


BASE_ALLOCATION = "base:allocation"
ALLOCATION_DEPTH = "qemu:allocation-depth"
DIRTY_BITMAP = "qemu:dirty-bitmap:"  # followed by the bitmap's name
STATE_HOLE = 1  # of base:allocation: not allocated
STATE_ZERO = 2  # of base:allocation: reads as zeroes
STATE_DIRTY = 1  # of qemu:dirty-bitmap

_BY_ERRNO = {
    errno.EPERM: NbdError.EPERM,
    errno.EROFS: NbdError.EPERM,
    errno.EIO: NbdError.EIO,
    errno.ENOMEM: NbdError.ENOMEM,
    errno.EINVAL: NbdError.EINVAL,
    errno.ENOSPC: NbdError.ENOSPC,
    errno.EDQUOT: NbdError.ENOSPC,
    errno.EFBIG: NbdError.ENOSPC,
    errno.EOVERFLOW: NbdError.EOVERFLOW,
    errno.EOPNOTSUPP: NbdError.ENOTSUP,
    errno.ESHUTDOWN: NbdError.ESHUTDOWN,
}
_ERRNO_OF = {
    NbdError.EPERM: errno.EPERM,
    NbdError.EIO: errno.EIO,
    NbdError.ENOMEM: errno.ENOMEM,
    NbdError.EINVAL: errno.EINVAL,
    NbdError.ENOSPC: errno.ENOSPC,
    NbdError.EOVERFLOW: errno.EOVERFLOW,
    NbdError.ENOTSUP: errno.EOPNOTSUPP,
    NbdError.ESHUTDOWN: errno.ESHUTDOWN,
}
_ERROR_VALUES = frozenset(int(error) for error in NbdError)


def error_from_errno(number: int) -> NbdError:
    """The protocol's error for a system error number; EIO for one that it has no word for."""
    return _BY_ERRNO.get(number, NbdError.EIO)


def errno_from_error(error: NbdError) -> int:
    """The system's error number for the protocol's error."""
    return _ERRNO_OF[error]


def error_from_wire(value: int) -> NbdError:
    """The error that a server sent; EINVAL for a number the specification does not know, as it asks."""
    return NbdError(value) if value in _ERROR_VALUES else NbdError.EINVAL


def word(value: int, kind: type[IntEnum]) -> str:
    """The name of a number for a message: "GO", or "77" for one without a name."""
    known = kind._value2member_map_.get(value)
    return known.name if isinstance(known, IntEnum) else str(value)


def cut(text: str, length: int = MAX_STRING) -> bytes:
    """The UTF-8 bytes of a message, at most `length` of them and never half a character."""
    return text.encode("utf-8", "replace")[:length].decode("utf-8", "ignore").encode()


def shown(name: str) -> str:
    """A name that came from outside, short and without control characters."""
    short = name if len(name) <= SHOWN_NAME else name[: SHOWN_NAME - 3] + "..."
    return "".join(letter if letter.isprintable() else "?" for letter in short)
