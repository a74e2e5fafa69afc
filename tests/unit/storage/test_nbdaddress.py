"""NBD URIs: what they name, and what is refused."""

from __future__ import annotations

import contextlib
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cowslice.errors import BadOption
from cowslice.storage.nbdaddress import NbdAddress, parse_nbd_uri

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@pytest.mark.parametrize(
    "uri, address",
    [
        ("nbd://host", NbdAddress("", host="host", hostname="host")),
        ("NBD://Host/", NbdAddress("", host="host", hostname="host")),
        ("nbd://host:99/an%20export", NbdAddress("an export", host="host", port=99, hostname="host")),
        ("nbd://[::1]:99/a/b", NbdAddress("a/b", host="::1", port=99, hostname="::1")),
        ("nbd://", NbdAddress("", host="localhost")),
        ("nbd+unix:///?socket=/run/s", NbdAddress("", path="/run/s")),
        ("nbd+unix:///disk?socket=a+b%26c", NbdAddress("disk", path="a+b&c")),
        ("nbds://host/x", NbdAddress("x", host="host", tls=True, hostname="host")),
        (
            "nbds+unix:///x?socket=/s&tls-hostname=vm&tls-certificates=/etc/pki&tls-verify-peer=false",
            NbdAddress("x", path="/s", tls=True, hostname="vm", certificates="/etc/pki", verify_peer=False),
        ),
    ],
)
def test_a_uri_names_a_server_and_an_export(uri: str, address: NbdAddress) -> None:
    assert parse_nbd_uri(uri) == address


@given(export=text, path=text.filter(bool))
def test_any_name_and_any_path_can_be_quoted(export: str, path: str) -> None:
    parsed = parse_nbd_uri(f"nbd+unix:///{quote(export)}?socket={quote(path)}")
    assert (parsed.export, parsed.path) == (export, path)


@pytest.mark.parametrize(
    "uri",
    ["", "disk.qcow2", "http://host", "nbd:host:10809", "nbd+vsock://2/", "nbd+unix:///x", "nbd+unix://host/?socket=s",
     "nbd://host?socket=/s", "nbd://host:port/", "nbd://host:99999", "nbd://[::1", "nbd://user:secret@host/",
     "nbd://host/#x", "nbd://host/%ff", "nbd://host/\n", "nbd://host/?tls-hostname=x", "nbds://host/?tls-psk-file=k",
     "nbds://host/?tls-verify-peer=perhaps", "nbd+unix:///?socket=a&socket=b"],
)
def test_what_is_not_understood_is_refused(uri: str) -> None:
    with pytest.raises(BadOption) as refused:
        parse_nbd_uri(uri)
    assert "secret" not in str(refused.value)
    assert str(refused.value).isprintable()


beginnings = st.sampled_from(["", "nbd://", "nbds://[", "nbd+unix:///?socket="])


@given(beginnings, st.text(max_size=40))
def test_any_text_is_an_address_or_a_bad_option(beginning: str, rest: str) -> None:
    with contextlib.suppress(BadOption):
        assert parse_nbd_uri(beginning + rest)
