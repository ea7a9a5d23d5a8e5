"""What a sweep says at its end."""

from __future__ import annotations

import json
import math

import pytest
from rich.console import Console

from b2ray.evaluation.statistics import mean_interval
from b2ray.sweep.compare import Outcome, State, comparison, description, figure, table
from tests.unit.sweep.conftest import write_lines

DONE = Outcome(State.FINISHED)


@pytest.fixture
def found(planned):
    """Four trials: two finished with lr 0.001, one finished and one failed with 0.003."""

    def make(**fields: object):
        plan = planned(**fields)
        for trial, last in zip(plan.trials, (0.4, 0.6, 0.8, 0.1), strict=True):
            write_lines(trial, 0.3, last, summary={"judge": {"train": {"after": last / 2}}})
        failed = Outcome(State.FAILED, "sampler 0 failed [for good]", "/x/failure.log")
        outcomes = {t.name: DONE for t in plan.trials[:3]} | {plan.trials[3].name: failed}
        return comparison(plan, outcomes)

    return make


def test_a_figure_is_the_last_there_is(planned):
    trial = planned().trials[0]
    assert figure(trial, "heldout/judge") is None and figure(trial, "judge.train.after") is None
    write_lines(trial, 0.3, 0.5, math.nan, summary={"judge": {"train": {"after": 0.25}}})
    assert figure(trial, "judge.train.after") == 0.25
    assert figure(trial, "judge.train") is None and figure(trial, "clip.train.after") is None
    assert figure(trial, "heldout/judge") is None  # the last is no number
    assert figure(trial, "heldout/other") is None


def test_intervals_are_students():
    """Five values whose mean is 3 and whose standard error is 1/√2; t at 97.5 % of 4 is 2.776."""
    low, high = mean_interval([1, 2, 3, 4, 5]) or (0, 0)
    assert (low + high) / 2 == pytest.approx(3)
    assert high - 3 == pytest.approx(2.7764 * math.sqrt(0.5), rel=1e-4)
    assert mean_interval([1.0]) is None


def test_settings_are_compared_over_their_seeds(found):
    result = found()
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    best, second = result["settings"]
    assert result["best"] == best["values"] == {"learner.lr": 3e-3}
    assert (best["n"], best["mean"], best["low"]) == (1, 0.8, None)  # the failed one is left out
    assert (second["n"], second["mean"]) == (2, pytest.approx(0.5))
    assert second["trials"] == ["lr0.001_seed0", "lr0.001_seed1"] and second["each"] == [0.4, 0.6]
    assert second["low"] < 0.5 < second["high"]
    last = result["trials"][-1]
    assert (last["state"], last["figure"], last["stages"]) == ("failed", 0.1, 1)
    assert last["cause"] == "sampler 0 failed [for good]" and last["log"] == "/x/failure.log"


def test_less_can_be_better(found):
    assert found(mode="min")["best"] == {"learner.lr": 1e-3}


def test_the_table_has_a_row_a_setting_and_names_what_failed(found):
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    table(found(), console)
    shown = console.export_text()
    rows = [line for line in shown.splitlines() if line.startswith("│")]
    assert [r.split()[1] for r in rows] == ["0.003", "0.001"]
    assert "0.8" in rows[0] and "1 of 2" in rows[0] and "2 of 2" in rows[1]
    assert "lr0.003_seed1: failed after 1 stages, at 0.1: sampler 0 failed [for good]" in shown


def test_the_description_is_the_same_table_in_markdown(found, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    said = description(found(), 4000)
    rows = [[c.strip() for c in x.split("|")[1:-1]] for x in said.splitlines() if x[:1] == "|"]
    assert rows[0] == ["learner.lr", "mean", "95 % interval", "each", "finished"]
    assert set("".join(rows[1])) == {"-"}
    assert [rows[2][0], rows[2][1], rows[2][4]] == ["0.003", "0.8", "1 of 2"]
    assert [rows[3][0], rows[3][1], rows[3][4]] == ["0.001", "0.5", "2 of 2"]
    assert said.startswith("rates: heldout/judge, maximum is best.\n\n|")
    assert said.endswith(
        "failed after 1 stages, at 0.1: sampler 0 failed [for good] (/x/failure.log)"
    )


def test_a_bar_in_a_value_does_not_end_its_cell(found):
    result = found()
    result["settings"][0]["values"] = {"learner.lr": "a|b"}
    assert "\n| a\\|b " in description(result, 4000)


def test_a_description_that_is_too_long_ends_with_a_whole_line(found):
    whole = description(found(), 4000)
    cut = description(found(), 300)
    assert len(cut) <= 300 < len(whole)
    kept, _, rest = cut.rpartition("\n\n")
    assert rest == "The rest is in sweep.json."
    assert kept == "\n".join(whole.splitlines()[: len(kept.splitlines())])
    assert kept.splitlines()[-1].endswith("|")


def test_seeds_alone_are_one_row(planned, capsys):
    plan = planned(grid={"seed": [0, 1]})
    for trial in plan.trials:
        write_lines(trial, 0.2, 0.4)
    result = comparison(plan, {t.name: DONE for t in plan.trials})
    assert [s["values"] for s in result["settings"]] == [{}]
    table(result)
    assert "2 of 2" in capsys.readouterr().out


def test_without_any_figure_nothing_is_best(planned, capsys):
    plan = planned()
    result = comparison(plan, {t.name: Outcome(State.WAITING) for t in plan.trials})
    assert result["best"] is None and all(s["mean"] is None for s in result["settings"])
    table(result)
    assert "lr0.001_seed0: waiting after 0 stages" in capsys.readouterr().out
