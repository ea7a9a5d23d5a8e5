"""Headless Chromium, a real small run, and a real MLflow server that has it.

Screenshots go to $B2RAY_SCREENSHOTS, or to a folder of pytest's own that its last lines name.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlflow
import pytest

from tests.runner import ROOT
from tests.servers import mlflow_server

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

WITHIN = 120_000  # milliseconds that a page may take to show something on a busy machine
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# MLflow opens its assistant over half of the first page, once.
CALM = "localStorage.setItem('mlflow.assistant.fab.autoOpenedOnFirstLoad_v1', 'true')"
# A run of the embedded model as `make demo` makes it, but short.
SETTINGS = {
    "curriculum.stages": 2,
    "branching.images": 32,
    "evaluation.every": 1,
    "evaluation.images": 32,
    "evaluation.final_images": 32,
    "evaluation.previews": 8,
    "tracking.register_as": "shapes",
    "tracking.system": 1,
}
_shots: list[Path] = []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(item.fspath).is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.timeout(1200))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if _shots:
        terminalreporter.write_line(f"{len(_shots)} screenshots are in {_shots[0].parent}")


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """The system's Chromium; without one these tests are skipped."""
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip(f"no {' or '.join(NAMES)} on the PATH: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    root = ["--no-sandbox"] if os.geteuid() == 0 else []  # as root its sandbox refuses to work
    with sync_playwright() as playwright:
        args = [*root, "--disable-dev-shm-usage"]
        started = playwright.chromium.launch(executable_path=program, args=args, timeout=WITHIN)
        yield started
        started.close()


@pytest.fixture(scope="session")
def shot(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., None]:
    """Keep a screenshot under a name."""
    chosen = os.environ.get("B2RAY_SCREENSHOTS")
    folder = Path(chosen) if chosen else tmp_path_factory.mktemp("screenshots")

    def keep(page: Page, name: str, full: bool = False) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        _shots.append(folder / f"{name}.png")
        page.screenshot(path=_shots[-1], full_page=full, timeout=WITHIN)

    return keep


@dataclass
class Opened:
    """A page and what it did.

    Attributes:
        errors: of its console and its scripts.
        requests: addresses that it asked for, but for what is in the page itself.
    """

    page: Page
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


@pytest.fixture
def opened(browser: Browser) -> Iterator[Callable[..., Opened]]:
    """Open an address in a fresh context, 1200 pixels wide and light unless told otherwise."""
    contexts = []

    def visit(address: str, width: int = 1200, scheme: Any = "light") -> Opened:
        context = browser.new_context(
            viewport={"width": width, "height": 844}, color_scheme=scheme, reduced_motion="reduce"
        )
        contexts.append(context)
        context.set_default_timeout(WITHIN)
        context.set_default_navigation_timeout(WITHIN)
        found = Opened(context.new_page())
        found.page.on(
            "console", lambda m: found.errors.append(m.text) if m.type == "error" else None
        )
        found.page.on("pageerror", lambda e: found.errors.append(str(e)))
        found.page.on(
            "request",
            lambda r: None if r.url.startswith("data:") else found.requests.append(r.url),
        )
        found.page.goto(address)
        return found

    yield visit
    for context in contexts:
        context.close()


@pytest.fixture
def mlflow_page(opened: Callable[..., Opened]) -> Callable[[str, str], Opened]:
    """Open a page of an MLflow server."""

    def go(server: str, path: str) -> Opened:
        found = opened(f"{server}/health", 1440)
        found.page.evaluate(CALM)
        found.page.goto(f"{server}{path}", wait_until="domcontentloaded")
        return found

    return go


def has_lines(opened: Opened, least: int) -> None:
    """Wait until so many charts have a line; a level one has no height, which is no visibility."""
    line = opened.page.locator(".js-plotly-plot .scatterlayer path.js-line")
    line.nth(least - 1).wait_for(state="attached")


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with mlflow_server(tmp_path_factory.mktemp("mlflow")) as address:
        yield address


@dataclass(frozen=True)
class Finished:
    """A finished run or sweep: its folder, and where MLflow has it."""

    folder: Path
    server: str

    @property
    def experiment(self) -> str:
        """The path of its experiment's page."""
        run = mlflow.MlflowClient(self.server).get_run(self.run_id)
        return f"/#/experiments/{run.info.experiment_id}"

    @property
    def run_id(self) -> str:
        return str(json.loads((self.folder / "mlflow.json").read_text())["run_id"])


@pytest.fixture(scope="session")
def finished(server: str, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A short run of the embedded model, by the command, tracked by the server over HTTP."""
    runs = tmp_path_factory.mktemp("runs")
    execute("--config=configs/quickstart.yaml", runs=runs, name="short", uri=server)
    return Finished(runs / "short", server)


def execute(first: str, runs: Path, name: str, uri: str) -> None:
    """The command with `SETTINGS` and these, to its end."""
    values = {**SETTINGS, "runs": runs, "name": name, "tracking.uri": uri}
    words = [first, *(f"--{field}={value}" for field, value in values.items())]
    # On a busy machine Ray's own patience is too short.
    env = {**os.environ, "RAY_raylet_start_wait_time_s": "300"}
    env.pop("RAY_ADDRESS", None)
    command = [sys.executable, "-m", "b2ray.run", *words]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=1000)
    assert done.returncode == 0, done.stderr[-4000:]
