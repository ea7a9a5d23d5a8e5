"""The Grafana dashboard and the alerts: they ask for metrics that the driver exports."""

from __future__ import annotations

import json
import re
from itertools import combinations

import pytest

from tests.unit.deploy.manifests import DEPLOY, documents

BOARD = json.loads((DEPLOY / "grafana.json").read_text(encoding="utf-8"))
PANELS = BOARD["panels"]
RULES = [r for g in documents("prometheus.yaml")[1]["spec"]["groups"] for r in g["rules"]]
QUERIES = [t["expr"] for p in PANELS for t in p["targets"]] + [r["expr"] for r in RULES]
VARIABLES = {v["name"]: v for v in BOARD["templating"]["list"]}


def test_every_metric_is_one_of_the_drivers():
    gauges = pytest.importorskip("b2ray.fleet.gauges")
    exported = {f"ray_{name}" for name in gauges.NAMES}
    asked = {m for q in QUERIES for m in re.findall(r"\bray_\w+", q)}
    assert asked <= exported


def test_every_query_has_a_metric_and_whole_brackets():
    for query in QUERIES:
        assert re.search(r"\bray_b2ray_\w+", query)
        for opening, closing in ("()", "{}", "[]"):
            assert query.count(opening) == query.count(closing)


def test_panels_ask_for_the_chosen_run_at_the_chosen_source():
    assert VARIABLES["datasource"]["type"] == "datasource"
    assert VARIABLES["run"]["query"]["query"] == "label_values(ray_b2ray_stage, run)"
    for panel in PANELS:
        for target in panel["targets"]:
            assert target["datasource"]["uid"] == "${datasource}"
            assert 'run=~"$run"' in target["expr"]


def test_panels_have_their_own_places():
    assert len({p["id"] for p in PANELS}) == len(PANELS)
    for panel in PANELS:
        place = panel["gridPos"]
        assert place["x"] >= 0 and place["x"] + place["w"] <= 24  # the grid's width
    for a, b in combinations((p["gridPos"] for p in PANELS), 2):
        beside = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        above = a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]
        assert beside or above
