"""The comparison of methods: what is declared is fair and runs, and its figures are right."""

from __future__ import annotations

import numpy as np
import pytest
from efficiency.report import Curve, interval, reaches
from efficiency.trials import DECLARED, METHODS, Trial, settings, tuning

from b2ray.options import parse


def parsed(trial: Trial, tmp_path):
    return parse(trial.command(tmp_path, [])[3:]).config


@pytest.mark.parametrize("method", METHODS)
def test_every_setting_of_a_method_is_a_configuration(method, tmp_path):
    for setting in settings(method):
        config = parsed(Trial(method, setting, 7), tmp_path)
        assert config.seed == 7
        flat = config.model_dump()
        for key, value in setting:
            section, field = key.split(".")
            assert flat[section][field] == value


def test_all_methods_have_about_the_same_queries_and_as_many_trials(tmp_path):
    found = [parsed(tuning(m)[0], tmp_path) for m in METHODS]
    queries = [c.curriculum.stages * c.groups * c.branching.branches for c in found]
    assert max(queries) < 1.02 * min(queries)
    assert len({len(settings(m)) for m in METHODS}) == 1
    assert not set(DECLARED["tuning_seeds"]) & set(DECLARED["seeds"])
    assert len(DECLARED["seeds"]) >= 5


def test_every_trial_has_a_folder_of_its_own():
    trials = [t for m in METHODS for t in tuning(m)]
    assert len({t.name for t in trials}) == len(trials)


def test_an_interval_is_students():
    mean, half = interval([1.0, 2.0, 3.0])
    assert (mean, half) == pytest.approx((2.0, 4.3027 / 3**0.5), rel=1e-4)
    assert np.isnan(interval([1.0])[1])


def curve(*judge: float) -> Curve:
    queries = 100.0 * np.arange(len(judge))
    return Curve(queries, 10 * queries, np.zeros(len(judge)), np.array(judge))


def test_a_level_is_reached_between_two_evaluations():
    curves = [curve(0.2, 0.3, 0.5), curve(0.4, 0.5, 0.7)]  # means 0.3, 0.4, 0.6
    assert reaches(curves, 0.5) == pytest.approx((150.0, 1500.0))
    assert reaches(curves, 0.3) == (0.0, 0.0)
    assert reaches(curves, 0.7) is None
