"""Links of the documentation lead somewhere; those that leave it have a sound form."""

from __future__ import annotations

import posixpath
import re
from urllib.parse import urlsplit

import pytest

from tests.docs.pages import PAGES, ROOT, headings, links, spans
from tests.docs.rules import missing

CARD = "b2ray/shapes/weights/README.md"


@pytest.mark.parametrize("page", [*PAGES, CARD])
def test_links_lead_to_what_is_there(page: str) -> None:
    for link in links(page):
        if re.match(r"\w+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = posixpath.normpath(posixpath.join(posixpath.dirname(page), path)) if path else page
        assert (ROOT / target).is_file(), f"{page}: {link} leads to no file"
        if anchor:
            known = headings(target)
            assert anchor in known, f"{page}: {link} leads to no heading of {', '.join(known)}"


@pytest.mark.parametrize("page", [*PAGES, CARD])
def test_external_links_have_a_sound_form(page: str) -> None:
    for link in links(page):
        if not re.match(r"\w+:", link):
            continue
        found = urlsplit(link)
        assert found.scheme == "https", f"{page}: {link}"
        assert re.fullmatch(r"[a-z0-9.-]+\.[a-z]{2,}", found.netloc), f"{page}: {link}"
        if found.netloc == "arxiv.org":
            assert re.fullmatch(r"/abs/\d{4}\.\d{4,5}", found.path), f"{page}: {link}"


@pytest.mark.parametrize("page", PAGES)
def test_code_spans_name_what_is_there(page: str) -> None:
    for span in spans(page):
        assert missing(span, ROOT) == [], f"{page}: `{span}`"
