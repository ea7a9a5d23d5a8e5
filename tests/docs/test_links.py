"""Links of the documentation lead somewhere; those that leave it have a sound form."""

from __future__ import annotations

import posixpath
import re
from urllib.parse import urlsplit

import pytest

from tests.docs.pages import PAGES, ROOT, headings, links, spans
from tests.docs.rules import missing

CARD = "b2ray/shapes/weights/README.md"


@pytest.fixture(scope="module")
def linked() -> list[tuple[str, str]]:
    """Every (page, link) of the documentation."""
    pairs = [(page, link) for page in [*PAGES, CARD] for link in links(page)]
    assert len(pairs) > 100
    return pairs


def leaves_the_site(link: str) -> bool:
    return re.match(r"\w+:", link) is not None


def dead_end(page: str, link: str) -> str:
    """Why a link leads nowhere; empty: it leads somewhere."""
    path, _, anchor = link.partition("#")
    target = posixpath.normpath(posixpath.join(posixpath.dirname(page), path)) if path else page
    if not (ROOT / target).is_file():
        return f"{page}: {link} leads to no file"
    if anchor and anchor not in headings(target):
        return f"{page}: {link} leads to no heading of {', '.join(headings(target))}"
    return ""


def is_sound(link: str) -> bool:
    parts = urlsplit(link)
    path = r"/abs/\d{4}\.\d{4,5}" if parts.netloc == "arxiv.org" else r".*"
    host = re.fullmatch(r"[a-z0-9.-]+\.[a-z]{2,}", parts.netloc)
    return parts.scheme == "https" and bool(host) and bool(re.fullmatch(path, parts.path))


def test_links_lead_to_what_is_there(linked: list[tuple[str, str]]) -> None:
    inner = [pair for pair in linked if not leaves_the_site(pair[1])]
    assert [why for page, link in inner if (why := dead_end(page, link))] == []


def test_external_links_have_a_sound_form(linked: list[tuple[str, str]]) -> None:
    outer = [pair for pair in linked if leaves_the_site(pair[1])]
    assert outer
    assert [pair for pair in outer if not is_sound(pair[1])] == []


def test_code_spans_name_what_is_there() -> None:
    coded = [(page, span) for page in PAGES for span in spans(page)]
    assert len(coded) > 100
    assert [(page, span) for page, span in coded if missing(span, ROOT)] == []
