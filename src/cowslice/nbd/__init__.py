"""The NBD protocol without sockets: bytes in, events out, and the other way round.

Both halves of fixed newstyle NBD with simple, structured and extended replies. It does not know that sockets, TLS
libraries or images exist: no I/O, no clock, no randomness.
"""

from cowslice.nbd.client_handshake import ClientHandshake
from cowslice.nbd.client_side import ClientTransmission
from cowslice.nbd.events import (
    NEED_DATA,
    Aborted,
    Accepted,
    BadRequest,
    BlockSizes,
    Completed,
    Context,
    ContextsListed,
    Described,
    Disconnect,
    Export,
    ExportsListed,
    Greeted,
    ListedExport,
    Need,
    Negotiated,
    OptionAnswered,
    Ready,
    Refused,
    Request,
    Session,
    StartTls,
    TlsPolicy,
    export_flags,
)
from cowslice.nbd.handshake import ServerHandshake
from cowslice.nbd.opening import Opening, TlsWish, Wish
from cowslice.nbd.replies import Data, Hole, Replies
from cowslice.nbd.server_side import ServerTransmission

__all__ = [
    "NEED_DATA",
    "Aborted",
    "Accepted",
    "BadRequest",
    "BlockSizes",
    "ClientHandshake",
    "ClientTransmission",
    "Completed",
    "Context",
    "ContextsListed",
    "Data",
    "Described",
    "Disconnect",
    "Export",
    "ExportsListed",
    "Greeted",
    "Hole",
    "ListedExport",
    "Need",
    "Negotiated",
    "Opening",
    "OptionAnswered",
    "Ready",
    "Refused",
    "Replies",
    "Request",
    "ServerHandshake",
    "ServerTransmission",
    "Session",
    "StartTls",
    "TlsPolicy",
    "TlsWish",
    "Wish",
    "export_flags",
]
