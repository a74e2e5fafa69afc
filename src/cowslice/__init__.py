"""cowslice: the qcow2 engine for Python.

The public door. `create` makes an image, `open` gives an Image, `serve` gives images to NBD clients; everything else
here is what these take, give or raise.
"""

from __future__ import annotations

TYPE_CHECKING = False  # what is public is imported when it is asked for: `import cowslice` costs nothing
if TYPE_CHECKING:
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
        MalformedTrace,
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
        TraceError,
        UnsupportedImage,
    )
    from cowslice.image.creation import create
    from cowslice.image.gate import Deny, DenyGate, FolderGate, Gate, Permit, PermitGate, Reference, Role
    from cowslice.image.image import Image
    from cowslice.image.mapping import Extent
    from cowslice.ops.opening import open_image as open
    from cowslice.serve.server import serve

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
    "MalformedTrace",
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
    "TraceError",
    "UnsupportedImage",
    "create",
    "open",
    "serve",
]

_HOMES = {
    "Image": "cowslice.image.image",
    "create": "cowslice.image.creation",
    "Extent": "cowslice.image.mapping",
    **dict.fromkeys(("DenyGate", "Deny", "FolderGate", "Gate", "Permit", "PermitGate", "Reference", "Role"),
                    "cowslice.image.gate"),
}  # fmt: skip


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'cowslice' has no attribute '{name}'")
    from importlib import import_module

    if name == "serve":  # a package that can be called
        return import_module("cowslice.serve")
    home = import_module("cowslice.ops.opening" if name == "open" else _HOMES.get(name, "cowslice.errors"))
    found: object = getattr(home, "open_image" if name == "open" else name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
