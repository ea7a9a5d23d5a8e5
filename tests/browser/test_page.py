"""The run's page in a real browser: from disk, without network, for everybody."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe

from b2ray import report
from b2ray.report.watch import server as watch_server
from b2ray.tracking.folder import RunFolder
from tests.browser.conftest import Finished, Opened
from tests.unit.report.runs import event, settings, write_run

LIMIT = 3_000_000  # bytes
WIDTHS = {"wide": 1200, "phone": 390}


def eventful(runs: Path) -> RunFolder:
    """A run with all that a page can have: several rewards, a warning, trouble in the fleet."""
    rewards = [{"name": n, "kind": "jpeg"} for n in ("clip", "mine")]
    folder = write_run(settings(runs, rewards=rewards[:1]), judged=-0.2)
    times = [line["time"] for line in folder.metrics()]
    for what, seconds in (("ready", None), ("died", None), ("ready", 4.5), ("drains", None)):
        folder.append_event(event(what, times[-1], cause="killed", seconds=seconds))
    return folder


@pytest.fixture(scope="session")
def pages(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The page of a real run, and of one to which everything happened."""
    folder = eventful(tmp_path_factory.mktemp("eventful"))
    return {
        "real": finished.folder / report.FILE,
        "eventful": report.write(folder.path, folder.config),
    }


def unfold(opened: Opened) -> None:
    opened.page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true })")


@pytest.mark.parametrize("which", ["real", "eventful"])
def test_it_opens_from_disk_without_errors_or_network(
    pages: dict[str, Path], opened: Callable[..., Opened], which: str
) -> None:
    file = pages[which]
    assert file.stat().st_size < LIMIT
    found = opened(file.as_uri())
    unfold(found)
    found.page.wait_for_load_state("networkidle")
    assert found.requests == [file.as_uri()]
    assert found.errors == []
    assert found.page.get_by_role("heading", level=1).inner_text() in ("short", "mine")
    broken = "[...document.images].filter(i => !i.complete || !i.naturalWidth).length"
    assert found.page.locator("img").count() > 8
    assert found.page.evaluate(broken) == 0


@pytest.mark.parametrize("which", ["real", "eventful"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_everybody_can_read_it(
    pages: dict[str, Path],
    opened: Callable[..., Opened],
    shot: Callable[..., None],
    which: str,
    scheme: str,
    width: str,
) -> None:
    found = opened(pages[which].as_uri(), WIDTHS[width], scheme)
    shot(found.page, f"page-{which}-{scheme}-{width}")
    unfold(found)
    shot(found.page, f"page-{which}-{scheme}-{width}-unfolded", full=True)
    # axe tests contrast, names of pictures and figures, tables, headings, keyboard access and more.
    problems = Axe().run(found.page)
    assert problems.violations_count == 0, problems.generate_report()


@pytest.mark.parametrize("which", ["real", "eventful"])
@pytest.mark.parametrize("width", [390, 320])
def test_a_phone_does_not_scroll_sideways(
    pages: dict[str, Path], opened: Callable[..., Opened], which: str, width: int
) -> None:
    found = opened(pages[which].as_uri(), width)
    unfold(found)
    assert found.page.evaluate("document.documentElement.scrollWidth") <= width


def test_light_and_dark_differ_and_figures_follow(
    pages: dict[str, Path], opened: Callable[..., Opened]
) -> None:
    def colours(scheme: str) -> tuple[str, str]:
        page = opened(pages["real"].as_uri(), scheme=scheme).page
        body = page.evaluate("getComputedStyle(document.body).backgroundColor")
        words = page.locator(".wide svg text").first
        return body, words.evaluate("e => getComputedStyle(e).fill")

    (paper, ink), (dark_paper, dark_ink) = colours("light"), colours("dark")
    assert paper != dark_paper and ink != dark_ink


# --- b2ray watch -------------------------------------------------------------------------------

# The line of a stage, as far as the page's curves need it.
NEXT = {"time/total": 32.0, "reward/mean": 0.5, "cost/reward_queries": 192.0, "interval": 6.0}


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[tuple[RunFolder, str]]:
    """A run after two of its stages, and the address that follows it."""
    folder = write_run(settings(tmp_path), done=2)
    serving = watch_server(folder.path, folder.config, 0)
    thread = threading.Thread(target=serving.serve_forever)
    thread.start()
    yield folder, f"http://127.0.0.1:{serving.server_address[1]}/"
    serving.shutdown()
    serving.server_close()
    thread.join(10)


def test_the_watched_page_shows_a_stage_when_it_is_done(
    watched: tuple[RunFolder, str], opened: Callable[..., Opened], shot: Callable[..., None]
) -> None:
    folder, address = watched
    found = opened(address)
    verdict = found.page.locator(".verdict")
    assert "fter 2 of 6 stages" in verdict.inner_text()
    shot(found.page, "watch-before")
    problems = Axe().run(found.page)
    assert problems.violations_count == 0, problems.generate_report()
    # What a person opened stays open when the page loads itself again.
    last = found.page.get_by_text("The whole configuration")
    last.click()
    folder.append_metrics(3, NEXT, [])
    found.page.get_by_text("fter 3 of 6 stages").first.wait_for()
    assert found.page.locator("details", has=last).get_attribute("open") is not None
    assert all(r.startswith(address) for r in found.requests)
    assert found.errors == []
    shot(found.page, "watch-after")


def test_a_page_that_is_not_to_follow_stays(
    watched: tuple[RunFolder, str], opened: Callable[..., Opened]
) -> None:
    folder, address = watched
    found = opened(address)
    with found.page.expect_response("**/stamp"):  # it looks as long as it may
        pass
    found.page.get_by_label("follow the run").uncheck()
    folder.append_metrics(3, NEXT, [])
    found.page.clock.install()  # so that no time has to pass
    found.page.clock.run_for(60_000)
    assert "fter 2 of 6 stages" in found.page.locator(".verdict").inner_text()
