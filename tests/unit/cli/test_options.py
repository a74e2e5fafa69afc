"""Shared options become what they say, and a bad one is a sentence."""

from __future__ import annotations

import base64
from pathlib import Path

import click
import pytest

from cowslice.cli.options import Allowed, Given, name_image, open_options, parse_keyval, secret_of
from cowslice.errors import BadOption
from cowslice.image.gate import FolderGate, PermitGate


def test_two_commas_are_one_comma_in_a_value() -> None:
    assert parse_keyval("file.filename=a,,b.img,driver=raw", "x") == {"file.filename": "a,b.img", "driver": "raw"}


@pytest.mark.parametrize("text", ["driver", "=x", "a=1,b"])
def test_a_part_without_a_value_is_refused(text: str) -> None:
    with pytest.raises(BadOption):
        parse_keyval(text, "--image-opts")


def test_a_plain_argument_is_a_file_name_whatever_it_holds() -> None:
    assert name_image("driver=raw,file.filename=x", Given()).name == "driver=raw,file.filename=x"


def test_image_options_become_options_of_opening() -> None:
    given = Given(image_opts=True, objects=("secret,id=s,data=open",))
    named = name_image("driver=qcow2,file.filename=x,l2-cache-size=1M,cache-clean-interval=0,force-share=on,"
                       "encrypt.key-secret=s,backing.file.filename=y,backing.driver=raw", given)
    options = open_options(named, given)
    assert (named.name, options.format, options.l2_cache_size) == ("x", "qcow2", "1M")
    assert (options.cache_clean_interval, options.force_share, options.secret) == (0, True, b"open")
    assert (options.backing, options.backing_format) == ("y", "raw")


@pytest.mark.parametrize("text", [
    "driver=qcow2", "file.filename=x,file.driver=nbd", "file.filename=x,no-such-option=1",
    "file.filename=x,force-share=maybe", "file.filename=x,cache-clean-interval=soon", "file.filename=x,backing=node7",
    "file.filename=x,encrypt.key-secret=s",
])  # fmt: skip
def test_what_cannot_be_meant_is_refused(text: str) -> None:
    given = Given(image_opts=True)
    with pytest.raises(BadOption):
        open_options(name_image(text, given), given)


def test_a_format_and_image_options_exclude_each_other() -> None:
    with pytest.raises(click.UsageError):
        name_image("file.filename=x", Given(image_opts=True, format_name="raw"))


def test_the_gate_is_the_one_that_was_asked_for() -> None:
    assert isinstance(open_options(name_image("x", Given()), Given()).gate, FolderGate)
    assert isinstance(open_options(name_image("x", Given()), Given(allowed=Allowed(any_file=True))).gate, PermitGate)


def test_a_secret_is_text_a_file_or_base64(tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(b"from file\n")
    coded = base64.b64encode(b"\0binary").decode()
    objects = (f"secret,id=a,file={tmp_path}/key", "secret,id=b,data=te,,xt", f"secret,id=c,format=base64,data={coded}")
    assert secret_of("a", objects) == b"from file\n"
    assert secret_of("b", objects) == b"te,xt"
    assert secret_of("c", objects) == b"\0binary"


@pytest.mark.parametrize("text", ["secret,id=s", "secret,id=s,data=x,file=y", "secret,id=s,data=x,keyid=k",
                                  "secret,id=s,data=x,format=hex", "throttle-group,id=s", "secret,id=other,data=x"])
def test_a_secret_that_cannot_be_used_is_refused(text: str) -> None:
    with pytest.raises(BadOption):
        secret_of("s", [text])
