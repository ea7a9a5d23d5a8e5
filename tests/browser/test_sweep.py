"""MLflow's pages of a real sweep, in a real browser: the parent, and its trials beneath it."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import yaml

from tests.browser.conftest import Finished, Opened, execute, has_lines

SWEEP = {
    "config": "configs/quickstart.yaml",
    "metric": "heldout/judge",
    "grid": {"learner.lr": [2.0e-3, 4.0e-3]},
    "tracking": {"experiment": "sweeps"},
}
TRIALS = ("lr0.002", "lr0.004")


@pytest.fixture(scope="module")
def swept(server: str, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Two trials of the embedded model, by the command."""
    runs = tmp_path_factory.mktemp("sweep")
    file = runs / "rates.yaml"
    file.write_text(yaml.safe_dump(SWEEP))
    execute(f"--sweep={file}", runs=runs, name="rates", uri=server)
    return Finished(runs / "rates", server)


@pytest.fixture
def visit(swept: Finished, mlflow_page: Callable[..., Opened]) -> Callable[[str], Opened]:
    """Open a page of the sweep's experiment."""
    return lambda path: mlflow_page(swept.server, swept.experiment + path)


def open_sweep(opened: Opened) -> None:
    """Show the trials in a list of runs, which has the sweep alone at first."""
    page = opened.page
    sweep = page.locator(".ag-pinned-left-cols-container .ag-row", has_text="rates")
    sweep.wait_for()
    for trial in TRIALS:
        assert not page.get_by_role("link", name=trial, exact=True).is_visible()
    sweep.locator("button").first.click()
    for trial in TRIALS:
        page.get_by_role("link", name=trial, exact=True).wait_for()


def test_the_list_shows_trials_beneath_their_sweep(visit, shot) -> None:
    found = visit("/runs")
    open_sweep(found)
    found.page.mouse.move(0, 0)
    shot(found.page, "mlflow-sweep-list")


def test_the_sweeps_page_says_which_setting_was_best(visit, swept, shot) -> None:
    page = visit(f"/runs/{swept.run_id}").page
    page.get_by_text("rates: heldout/judge, maximum is best.").wait_for()
    found = json.loads((swept.folder / "sweep.json").read_text())
    shown = [row.inner_text().split() for row in page.locator("td").locator("..").all()]
    for setting in found["settings"]:
        cells = [str(setting["values"]["learner.lr"]), f"{setting['mean']:.4g}", *["1", "of", "1"]]
        assert cells in shown
    page.get_by_text(f"best/{found['metric']}").wait_for()
    for trial in TRIALS:
        page.get_by_role("link", name=trial).wait_for()
    shot(page, "mlflow-sweep")


def test_a_trials_page_leads_to_its_sweep(visit, swept) -> None:
    trial = Finished(swept.folder / TRIALS[0], swept.server)
    page = visit(f"/runs/{trial.run_id}").page
    page.get_by_role("link", name="rates").click()
    page.get_by_text("rates: heldout/judge, maximum is best.").wait_for()


def test_the_charts_compare_the_trials(visit, shot) -> None:
    found = visit("/runs")
    open_sweep(found)
    found.page.locator("label:has(input[name=runs-view-mode][value=CHART])").click()
    found.page.get_by_placeholder("Search metric charts").fill("eval/heldout/judge")
    for trial in TRIALS:
        found.page.get_by_text(f"{trial} (eval/heldout/judge)", exact=True).wait_for()
    has_lines(found, len(TRIALS))
    shot(found.page, "mlflow-sweep-charts")
