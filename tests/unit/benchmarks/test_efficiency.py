"""The comparison of methods: what is declared is fair and runs, and its figures are right."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext

import numpy as np
import pytest

from b2ray.config.load import parse
from benchmarks.efficiency.curves import Curve, Point, crossing, curve, interval, reaches, shares
from benchmarks.efficiency.report import ablations, beside
from benchmarks.efficiency.trials import (
    ABLATIONS,
    DECLARED,
    DEFAULT,
    METHODS,
    RESULTS,
    Results,
    Trial,
    best,
    reported,
    run_all,
    seeds,
    settings,
    tuning,
)


def parsed(trial: Trial, tmp_path):
    return parse(trial.command(tmp_path, [])[3:]).config


def test_every_setting_of_a_method_is_a_configuration(tmp_path):
    trials = [Trial(method, setting, 7) for method in METHODS for setting in settings(method)]
    for trial in trials:
        config = parsed(trial, tmp_path)
        assert config.seed == 7, trial
        fields = [key.split(".") for key, _ in trial.setting]
        values = [getattr(getattr(config, section), field) for section, field in fields]
        assert values == [value for _, value in trial.setting], trial


def test_an_ablation_changes_the_default_and_nothing_else(tmp_path):
    setting = settings(DEFAULT)[0]
    configs = {
        name: parsed(Trial(name, setting, 7), tmp_path).model_dump()
        for name in (DEFAULT, *ABLATIONS)
    }
    base = configs.pop(DEFAULT)
    assert configs
    assert {name: fields_changed(base, other) for name, other in configs.items()} == {
        name: set(own) for name, own in ABLATIONS.items()
    }


def fields_changed(base: dict, other: dict) -> set[str]:
    """The fields in which a configuration differs, and `rewards`."""
    changed = {
        f"{section}.{field}"
        for section, values in base.items()
        if isinstance(values, dict)
        for field, value in values.items()
        if other[section][field] != value
    }
    return changed | ({"rewards"} if other["rewards"] != base["rewards"] else set())


def test_all_have_about_the_same_queries_and_no_fewer_trials_than_the_default(tmp_path):
    found = [parsed(tuning(m)[0], tmp_path) for m in METHODS]
    queries = [c.curriculum.stages * c.groups * c.branching.branches for c in found]
    assert max(queries) < 1.02 * min(queries)
    assert len(settings(DEFAULT)) == min(len(settings(m)) for m in METHODS) == 4
    for method in METHODS:
        assert not set(DECLARED["tuning_seeds"]) & set(seeds(method))
        assert len(set(seeds(method))) >= 5


def test_every_trial_has_a_folder_of_its_own():
    trials = [t for m in METHODS for t in tuning(m)]
    trials += [Trial(name, settings(DEFAULT)[0], 0) for name in (DEFAULT, *ABLATIONS)]
    assert len({t.name for t in trials}) == len(trials)


def test_an_interval_is_students():
    mean, half = interval([1.0, 2.0, 3.0])
    assert (mean, half) == pytest.approx((2.0, 4.3027 / 3**0.5), rel=1e-4)
    assert np.isnan(interval([1.0])[1])


def points(*judge: float) -> Curve:
    queries = 100.0 * np.arange(len(judge))
    return Curve(queries, 10 * queries, np.zeros(len(judge)), np.array(judge), 1 - np.array(judge))


def test_a_level_is_reached_between_two_evaluations():
    curves = [points(0.2, 0.3, 0.5), points(0.4, 0.5, 0.7)]  # means 0.3, 0.4, 0.6
    assert reaches(curves, "judge", 0.5) == Point(150.0, 1500.0, 0.5)
    assert reaches(curves, "judge", 0.3) == Point(0.0, 0.0, 0.7)
    assert reaches(curves, "judge", 0.7) is None
    assert reaches(curves, "reward", 0.1) is None


def test_a_level_is_reached_between_evaluations_or_never():
    cost, judged = (20.0, 40.0), (0.3, 0.5)
    assert crossing(cost, judged, 0.4) == pytest.approx(30.0)
    assert crossing(cost, judged, 0.2) == 20.0  # before the first stage
    assert crossing(cost, judged, 0.51) is None


def test_shares_are_of_the_other_ones_whole_budget():
    other = [points(0.2, 0.3, 0.4), points(0.2, 0.3, 0.4)]
    quick = [points(0.2, 0.6, 0.8), points(0.2, 0.4, 0.8)]
    found = shares(quick, other, "judge")
    assert found.level == pytest.approx(0.4)
    assert found.there.queries == pytest.approx(100 * 0.2 / 0.3)
    # One seed reaches 0.4 after 50 queries, the other after 100, of 200.
    assert found.queries == pytest.approx((0.25, 0.5))
    assert found.work == pytest.approx((0.25, 0.5))


def test_a_level_that_some_seeds_never_reach_has_no_upper_end():
    other = [points(0.2, 0.3, 0.4), points(0.2, 0.3, 0.4)]
    found = shares([points(0.2, 0.3, 0.3), points(0.2, 0.4, 0.6)], other, "judge")
    assert found.there is not None
    assert found.queries == (pytest.approx(0.5), np.inf)
    assert shares([points(0.2, 0.3, 0.3)] * 2, other, "judge").there is None


def test_a_method_is_held_against_the_default_on_the_seeds_of_both():
    def done(method: str, **judged: float):
        found = []
        for seed, judge in judged.items():
            ends = [(0, 0.3), (100, judge)]
            result = [
                {"reward_queries": q, "unet_evals": q, "unet_backwards": 0, "pairwise": 0.5}
                | {"judge": share, "reward": share}
                for q, share in ends
            ]
            found.append((Trial(method, (), int(seed[1:])), {"points": result}))
        return found

    other = done("GRPO", s1=0.4, s2=0.4, s3=0.9)
    row = beside({"GRPO": other, DEFAULT: done(DEFAULT, s0=0.3, s1=0.5, s2=0.5)})
    assert row == beside({"GRPO": other[:2], DEFAULT: done(DEFAULT, s1=0.5, s2=0.5)})
    assert "| GRPO | judge | 40.0% | 100 | 0.500 | 50 | 50% (50% – 50%) |" in row


def finished(trial: Trial, runs, judge: float) -> None:
    """The folder of a run that has ended."""
    folder = runs / trial.name
    folder.mkdir()
    pair = {"before": 0.3, "after": judge}
    summary = {"reward": pair, "judge": {"train": pair, "heldout": pair}, "seconds": 60.0}
    summary["diversity"] = {"pairwise": pair, "vendi": pair}
    lines = [
        {"eval/train/reward": 0.4, "heldout/judge": 0.3, "diversity/pairwise": 0.6},
        {"cost/reward_queries": 64},
        {
            **{"cost/reward_queries": 128, "cost/unet_evals": 1000, "cost/unet_backwards": 300},
            **{"eval/train/reward": 0.5, "heldout/judge": judge, "diversity/pairwise": 0.5},
        },
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "summary.json").write_text(json.dumps(summary))


def test_a_finished_run_is_a_curve(tmp_path):
    trial = tuning("DDPO-IS")[0]
    assert trial.result(tmp_path, []) is None
    finished(trial, tmp_path, 0.5)
    found = curve(trial.result(tmp_path, []))
    assert found.queries.tolist() == [0, 128] and found.work.tolist() == [0, 1600]
    assert found.reward.tolist() == [0.4, 0.5] and found.judge.tolist() == [0.3, 0.5]
    assert found.pairwise.tolist() == [0.6, 0.5]


def test_what_the_reward_cannot_measure_is_left_out_of_the_ablations():
    def trials(name: str, judge: float, **measured: dict[str, float]):
        found = []
        for seed in (0, 1):
            pair = {"before": 0.3, "after": judge + 0.01 * seed}
            result = {"reward": pair, "judge": {"train": pair, "heldout": pair}}
            point = {"reward_queries": 0, "unet_evals": 3000, "unet_backwards": 0, "pairwise": None}
            point |= {"reward": 0.3, "judge": 0.3}
            found.append((Trial(name, (), seed), {**result, "points": [point], **measured}))
        return found

    none, some = {"diversity": {}}, {"diversity": {"pairwise": {"after": 0.25}}}
    lines = ablations({"a": trials("a", 0.4, **none), "b": trials("b", 0.5, **none)}).splitlines()
    assert lines[2] == "| a | 2 | 0.405 ± 0.064 | 40.5 ± 6.4 | 40.5 ± 6.4 | – | 3 k |"
    assert lines[3] == "| b | 2 | +0.100 ± 0.000 | +10.0 ± 0.0 | +10.0 ± 0.0 | – | 3 k |"
    lines = ablations({"a": trials("a", 0.4, **some)}).splitlines()
    assert lines[2].endswith("| 0.250 ± 0.000 | 3 k |")


def test_results_outlive_their_runs_until_the_settings_change(tmp_path, monkeypatch):
    file, trials = tmp_path / "results.jsonl", tuning("DDPO-IS")
    for trial in trials[1:]:
        finished(trial, tmp_path, 0.6 if trial.setting == trials[2].setting else 0.4)
    results = Results(file)
    assert [results.take(t, tmp_path) is None for t in trials] == [True] + [False] * 7
    assert reported("DDPO-IS", results) == []  # one trial is missing
    finished(trials[0], tmp_path, 0.5)
    results.take(trials[0], tmp_path)

    again = Results(file)
    assert again.known == results.known and len(again.known) == 8
    # The mean over the tuning seeds decides, not the best single run.
    assert best("DDPO-IS", again) == trials[2].setting
    assert [t.seed for t in reported("DDPO-IS", again)] == seeds("DDPO-IS")
    assert Results(file, ["--curriculum.stages=1"]).of(trials[0]) is None
    monkeypatch.setitem(METHODS["DDPO-IS"]["fixed"], "learner.batch", 99)
    assert again.of(trials[0]) is None


@pytest.mark.parametrize("code", [0, 3], ids=["a result that cannot be read", "a failed run"])
def test_a_failure_is_heard_of_before_the_others_have_run(tmp_path, monkeypatch, code):
    begun = []

    def command(trial, runs, more):
        begun.append(trial)
        finished(trial, runs, 0.5)
        (runs / trial.name / "metrics.jsonl").write_text('{"heldout/judge": 0.5}')
        return [sys.executable, "-c", f"import time; time.sleep(0.2); raise SystemExit({code})"]

    monkeypatch.setattr(Trial, "command", command)
    monkeypatch.setattr("benchmarks.efficiency.trials._ray", lambda jobs: nullcontext("nowhere"))
    with pytest.raises(SystemExit if code else KeyError):
        run_all(tuning("GRPO"), Results(tmp_path / "results.jsonl"), tmp_path, 1, "tuning")
    assert 1 <= len(begun) <= 2 < len(tuning("GRPO"))


def test_committed_results_are_of_declared_trials():
    results, names = Results(RESULTS), set()
    for method in METHODS:
        trials = [
            *tuning(method),
            *(Trial(method, s, n) for s in settings(method) for n in seeds(method)),
        ]
        names |= {t.name for t in trials if results.of(t)}
    for name in ABLATIONS:
        trials = [Trial(name, s, n) for s in settings(DEFAULT) for n in seeds(name)]
        names |= {t.name for t in trials if results.of(t)}
    assert names == set(results.known)
