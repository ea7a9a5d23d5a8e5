"""MLflow's own pages of a real run, in a real browser."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.browser.conftest import Finished, Opened, has_lines


@pytest.fixture(scope="session")
def run_path(finished: Finished) -> str:
    return f"{finished.experiment}/runs/{finished.run_id}"


@pytest.fixture
def visit(finished: Finished, mlflow_page: Callable[..., Opened]) -> Callable[[str], Opened]:
    """Open a page of the server that has the run."""
    return lambda path: mlflow_page(finished.server, path)


def is_drawn(opened: Opened, selector: str, least: int) -> None:
    """Wait until so many pictures have arrived."""
    opened.page.wait_for_function(
        "([s, n]) => [...document.querySelectorAll(s)].filter(i => i.naturalWidth > 0).length >= n",
        arg=[selector, least],
    )


def test_the_overview_tells_what_the_run_was(visit, run_path, shot) -> None:
    found = visit(run_path)
    body = found.page.locator("body")
    for text in ("b2ray.preset", "b2ray/shapes/weights/base", "ray.version", "judge, which is not"):
        body.get_by_text(text).first.wait_for()
    shot(found.page, "mlflow-overview")


def test_the_charts_show(visit, run_path, shot) -> None:
    found = visit(f"{run_path}/model-metrics")
    has_lines(found, 3)
    found.page.get_by_text("between_std").first.wait_for()
    shot(found.page, "mlflow-charts")


def test_the_pictures_show_as_a_series(visit, run_path, shot) -> None:
    found = visit(f"{run_path}/model-metrics")
    found.page.get_by_placeholder("Search metric charts").fill("preview")
    found.page.get_by_text("preview_train").first.wait_for()
    is_drawn(found, "img[src*='get-artifact']", 1)
    # In the small panel MLflow's list of parameters is above it.
    found.page.locator("[data-component-id=fullscreen_button_chartcard]").first.click()
    picture = found.page.get_by_role("dialog").locator("img").last
    picture.scroll_into_view_if_needed()
    shot(found.page, "mlflow-pictures")


def test_the_machine_shows(visit, run_path, shot) -> None:
    found = visit(f"{run_path}/system-metrics")
    found.page.get_by_text("system/node_0").first.wait_for()
    found.page.get_by_text("cpu_utilization_percentage").first.wait_for()
    has_lines(found, 1)
    shot(found.page, "mlflow-system")


def test_the_table_shows_with_its_pictures(visit, run_path, shot) -> None:
    found = visit(f"{run_path}/artifacts/evaluation.json")
    for column in ("before", "after", "clip before"):
        found.page.get_by_text(column, exact=True).first.wait_for()
    is_drawn(found, "img[src*='get-artifact']", 4)
    shot(found.page, "mlflow-table")


def test_the_report_shows_as_an_artifact(visit, run_path, shot) -> None:
    found = visit(f"{run_path}/artifacts/report.html")
    inside = found.page.frame_locator("iframe").first
    inside.locator(".verdict").wait_for()
    shot(found.page, "mlflow-report")


def test_the_registered_model_shows_with_its_signature(visit, finished, shot) -> None:
    found = visit("/#/models/shapes/versions/1")
    found.page.get_by_text("Inputs (1)").wait_for()
    found.page.get_by_text("b2ray.run").first.wait_for()
    shot(found.page, "mlflow-model")


def test_runs_can_be_compared_picture_by_picture(visit, run_path, shot) -> None:
    experiment = run_path.partition("/runs/")[0]
    found = visit(f"{experiment}/runs?compareRunsMode=ARTIFACT")
    found.page.get_by_text("evaluation.json").first.wait_for()
    found.page.get_by_text("Compare: ").click()
    found.page.get_by_text("after", exact=True).first.click()
    is_drawn(found, "img[src*='get-artifact']", 1)
    shot(found.page, "mlflow-compare")
