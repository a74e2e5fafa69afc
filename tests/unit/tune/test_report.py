"""The page: complete, harmless, alone in the world, and drawn by a browser in light and dark, wide and narrow."""

from __future__ import annotations

import re
import zlib
from dataclasses import replace
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import pytest

from cowslice.testing.commandline import cowslice
from cowslice.testing.peers import needs, run
from cowslice.tune.advise import Advice, advise
from cowslice.tune.report import Told, page
from cowslice.tune.verify import Proof
from cowslice.tune.wording import sentences
from tests.unit.tune.evidence import SEED, gathered, loop


@pytest.fixture
def advice(tmp_path: Path) -> Advice:
    return advise(gathered(tmp_path, loop(0.5), layout="random", l2_cache_size="256k"))


class Tags(HTMLParser):
    """Every start tag with its attributes, and whether each that opens is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_all_that_is_advised_stands_on_the_page(advice: Advice) -> None:
    text = page([Told(advice, "assumed & said")])
    for sentence in sentences(advice):
        assert sentence.text.replace("'", "&#x27;").replace(">", "&gt;") in text
    assert "assumed &amp; said" in text
    assert "l2-cache-entry-size=" in text


def test_verified_figures_stand_on_the_page_where_there_are_some(advice: Advice) -> None:
    counted = Proof("qemu", "half", 128 << 10, 4096, 32, 12_345, 0.98765, 0.98766, 6_477.0, 6_512.0)
    uncounted = replace(counted, measured_hits=None)
    text = page([Told(advice, proofs=(counted, uncounted))])
    assert "Replayed 12,345 reads" in text
    row = "<td>QEMU, half</td><td>128 KiB</td><td>4 KiB</td><td>32</td><td>98.77 %</td>"
    assert row + "<td>98.77 %</td><td>6,477</td><td>6,512</td>" in text
    assert row + "<td>\u2013</td>" in text
    assert "Replayed" not in page([Told(advice)])


def test_it_loads_nothing_and_runs_nothing(advice: Advice) -> None:
    text = page([Told(advice)])
    names = {tag for tag, _ in Tags(text).tags}
    assert not names & {"script", "img", "iframe", "object", "embed"}
    assert [attrs.get("href") for tag, attrs in Tags(text).tags if "href" in attrs] == ["data:,"]
    assert "url(" not in text
    assert "@import" not in text


def test_a_name_from_outside_stays_text(advice: Advice) -> None:
    odd = replace(advice.evidence, name='<script>"\x1b\udcff', path="<b>&.qcow2")
    text = page([Told(replace(advice, evidence=odd))])
    assert "<script>" not in text
    assert "<b>" not in text
    assert "&lt;script&gt;&quot;\\x1b\\udcff" in text
    text.encode()


def test_lines_and_marks_are_told_without_colour(advice: Advice) -> None:
    tags = Tags(page([Told(advice)])).tags
    dashes = [attrs.get("stroke-dasharray") for tag, attrs in tags if tag == "path" and attrs.get("class") == "q"]
    entries = len(advice.evidence.curves.by_entry_bytes)
    assert None not in dashes
    assert len(set(dashes[:entries])) == entries
    assert {"T", "A", "F", "C"} <= set(re.findall(r">([A-Z])</text>", page([Told(advice)])))


def test_the_command_writes_it_whole_or_not_at_all(tmp_path: Path, advice: Advice) -> None:
    image, target = tmp_path / "random.qcow2", tmp_path / "page.html"
    command = ("tune", image, "--device", SEED, "--workload", "zipf:requests=5000")
    assert cowslice(*command, "--html", target).status == 0
    assert target.read_text().startswith("<!doctype html>")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.html", "random.qcow2"]
    refused = cowslice(*command, "--html", tmp_path / "nowhere" / "page.html")
    assert (refused.status, refused.out) == (1, "")
    assert "cannot write the page" in refused.err


def first_pixel(picture: bytes) -> tuple[int, ...]:
    """Red, green, blue of the upper left corner of a PNG: there every filter leaves the value itself."""
    content, at = b"", 8
    while at < len(picture):
        length = int.from_bytes(picture[at : at + 4], "big")
        content += picture[at + 8 : at + 8 + length] if picture[at + 4 : at + 8] == b"IDAT" else b""
        at += length + 12
    return tuple(zlib.decompress(content)[1:4])


@needs("chromium")
@pytest.mark.parametrize("scheme, width, ground", [(0, 390, (0x16, 0x16, 0x14)), (1, 1280, (0xFB, 0xFA, 0xF7))])
def test_a_browser_draws_it_dark_or_light(
    advice: Advice, tmp_path: Path, scheme: int, width: int, ground: tuple[int, ...]
) -> None:
    target, picture = tmp_path / "page.html", tmp_path / "page.png"
    target.write_text(page([Told(advice)]))
    run("chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
        f"--user-data-dir={tmp_path / 'profile'}", f"--blink-settings=preferredColorScheme={scheme}",
        f"--window-size={width},900", f"--screenshot={picture}", target.as_uri(), timeout=100)
    assert first_pixel(picture.read_bytes()) == ground


_MEASURE = """
const page = document.querySelector("iframe").contentDocument;
const boxes = [...page.querySelectorAll("svg")].map(chart =>
  [...chart.querySelectorAll("text:not(.mark):not(.name)")].map(text => text.getBoundingClientRect()));
const meet = (a, b) => a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom;
const met = boxes.flatMap(here => here.flatMap((a, n) => here.slice(n + 1).filter(b => meet(a, b))));
const small = boxes.flat().filter(box => box.height < 9);
document.body.textContent = `wide ${page.documentElement.scrollWidth} met ${met.length} small ${small.length} of ` +
  boxes.flat().length;
"""


@needs("chromium")
@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_is_wider_than_the_screen_and_no_axis_is_illegible(advice: Advice, tmp_path: Path, width: int) -> None:
    proofs = [Proof("qemu", "half", 128 << 10, 4096, 32, 12_345, 0.98765, 0.98766, 6_477.0, 6_512.0)]
    told = page([Told(advice, "assumed", proofs), Told(advice)])
    target = tmp_path / "around.html"
    target.write_text(f'<body><iframe style="width:{width}px;height:900px;border:0" srcdoc="{escape(told)}"></iframe>'
                      f"<script>onload = () => {{{_MEASURE}}}</script>")
    done = run("chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--dump-dom",
               f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1400,1000", target.as_uri(), timeout=100)
    found = re.search(rb"wide (\d+) met (\d+) small (\d+) of (\d+)", done.stdout)
    assert found is not None
    wide, met, small, texts = map(int, found.groups())
    assert wide <= width
    assert (met, small) == (0, 0)
    assert texts > 20
