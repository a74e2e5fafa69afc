"""What a door exports is a promise: the lists below change by intention only."""

from __future__ import annotations

import importlib
import tomllib
from types import ModuleType

import pytest

import cowslice
from tests.house.source_tree import ROOT

SURFACE = {
    "cowslice": """
        BadOption Closed CorruptImage CowsliceError CryptoError Deny DenyGate Extent FolderGate Gate Image ImageError
        InternalError LocalProtocolError Locked MalformedImage MalformedTrace NoSpace NotAnImage OutOfRange Permit
        PermitGate ProtocolError ReadOnly Reference ReferenceRefused RemoteProtocolError RequestError Role
        ShortRead StorageError
        TraceError UnsupportedImage create open serve
    """,
    "cowslice.nbd": """
        Aborted Accepted BadRequest BlockSizes ClientHandshake ClientTransmission Completed Context ContextsListed Data
        Described Disconnect Export ExportsListed Greeted Hole ListedExport NEED_DATA Need Negotiated Opening
        OptionAnswered Ready Refused Replies Request ServerHandshake ServerTransmission Session StartTls TlsPolicy
        TlsWish Wish export_flags
    """,
    "cowslice.storage": """
        Counts CountingStorage FileStorage FsspecStorage LimitedStorage MemoryStorage NbdStorage Span Storage
        WindowStorage WrappedStorage aligned_buffer local_path locate
    """,
    "cowslice.tune": """
        Advice Broken Calibration Choice Curve Curves Fleet Member Replayed Requests Sentence Studied advice curves
        fleet fleet_sentences open_trace parse_device replay sentences
    """,
}


@pytest.mark.parametrize("door", SURFACE)
def test_a_door_exports_exactly_what_was_promised(door: str) -> None:
    exported = importlib.import_module(door).__all__
    assert sorted(exported) == sorted(SURFACE[door].split())


@pytest.mark.parametrize("door", SURFACE)
def test_everything_exported_is_there_and_nothing_else_looks_public(door: str) -> None:
    module = importlib.import_module(door)
    ours = (name for name, value in vars(module).items() if getattr(value, "__module__", "").startswith("cowslice"))
    visible = {name for name in ours if not name.startswith("_") and not isinstance(vars(module)[name], ModuleType)}
    assert visible | set(module.__all__) == set(module.__all__)
    assert all(getattr(module, name) is not None for name in module.__all__)


@pytest.mark.parametrize("door", SURFACE)
def test_everything_exported_says_what_it_is(door: str) -> None:
    module = importlib.import_module(door)
    assert not [name for name in module.__all__ if not getattr(module, name).__doc__]


def test_the_version_is_that_of_the_distribution() -> None:
    described = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert cowslice.__version__ == described["project"]["version"]
