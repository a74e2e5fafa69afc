"""cowslice: the qcow2 engine for Python.

The public door. `open` gives an Image; everything else here is what an Image takes, gives or raises.
"""

from __future__ import annotations

from cowslice.errors import (
    BadOption,
    Closed,
    CorruptImage,
    CowsliceError,
    CryptoError,
    ImageError,
    InternalError,
    LocalProtocolError,
    Locked,
    MalformedImage,
    NoSpace,
    NotAnImage,
    OutOfRange,
    ProtocolError,
    ReadOnly,
    ReferenceRefused,
    RemoteProtocolError,
    RequestError,
    ShortRead,
    StorageError,
    UnsupportedImage,
)
from cowslice.image.gate import Deny, DenyGate, FolderGate, Gate, Permit, PermitGate, Reference, Role
from cowslice.image.image import Image
from cowslice.image.image import open_image as open
from cowslice.image.mapping import Extent

__version__ = "0.1.0"

__all__ = [
    "BadOption",
    "Closed",
    "CorruptImage",
    "CowsliceError",
    "CryptoError",
    "Deny",
    "DenyGate",
    "Extent",
    "FolderGate",
    "Gate",
    "Image",
    "ImageError",
    "InternalError",
    "LocalProtocolError",
    "Locked",
    "MalformedImage",
    "NoSpace",
    "NotAnImage",
    "OutOfRange",
    "Permit",
    "PermitGate",
    "ProtocolError",
    "ReadOnly",
    "Reference",
    "ReferenceRefused",
    "RemoteProtocolError",
    "RequestError",
    "Role",
    "ShortRead",
    "StorageError",
    "UnsupportedImage",
    "open",
]
