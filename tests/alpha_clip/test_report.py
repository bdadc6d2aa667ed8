import base64
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from alpha_clip.report import Report


class Page(HTMLParser):
    """Collects what a browser would show."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.words: list[str] = []
        self.images: list[dict[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "img":
            self.images.append(dict(attrs))

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def show(report: Report, folder: Path) -> Page:
    report.write(folder / "page.html")
    page = Page()
    page.feed((folder / "page.html").read_text(encoding="utf-8"))
    return page


def test_parts_appear_in_order(tmp_path: Path) -> None:
    report = Report("Title")
    report.heading("First")
    report.text("some words")
    report.table(["way", "share"], [["alpha", "0.9"], ["crop", "0.4"]])
    report.code("alpha-clip demo")
    page = show(report, tmp_path)
    shown = [w.strip() for w in page.words if w.strip()]
    expected = ["Title", "First", "some words", "way", "share", "alpha", "0.9", "crop", "0.4"]
    assert [w for w in shown if w in expected][-9:] == expected
    assert page.tags.count("tr") == 3
    assert page.tags.count("pre") == 1


def test_everything_is_escaped(tmp_path: Path) -> None:
    evil = '<script>alert("x")</script>&"'
    picture = tmp_path / "a.png"
    Image.new("RGB", (2, 2)).save(picture)
    report = Report(evil)
    report.heading(evil)
    report.text(evil)
    report.code(evil)
    report.table([evil], [[evil]])
    report.picture(picture, evil)
    page = show(report, tmp_path)
    assert "script" not in page.tags
    assert page.words.count(evil) == 7
    assert page.images[0]["alt"] == evil


def test_the_page_needs_no_other_file(tmp_path: Path) -> None:
    picture = tmp_path / "a.png"
    Image.new("RGB", (5, 4), "red").save(picture)
    report = Report("Title")
    report.picture(picture, "red")
    (image,) = show(report, tmp_path).images
    source = str(image["src"])
    assert base64.b64decode(source.removeprefix("data:image/png;base64,")) == picture.read_bytes()
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://|<link|<script", text)


def test_two_reports_share_nothing(tmp_path: Path) -> None:
    first, second = Report("one"), Report("two")
    first.text("only in the first")
    assert "only in the first" not in show(second, tmp_path).words


def test_a_missing_picture_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Report("Title").picture(tmp_path / "none.png", "nothing")
