"""From a sweep's file to the configurations of its trials, and what is refused."""

from __future__ import annotations

import re

import pytest
import yaml

from b2ray.config.load import parse, read_words, resolved
from b2ray.errors import EXIT_CONFIG, EXIT_DONE, ConfigError
from b2ray.run import main
from b2ray.sweep.trials import plan
from b2ray.tracking.folder import RunState, open_run

LR = {"log_uniform": [1e-4, 1e-2]}


def test_every_combination_is_a_trial_with_its_own_folder(planned, tmp_path):
    found = planned()
    assert [t.name for t in found.trials] == [
        "lr0.001_seed0",
        "lr0.001_seed1",
        "lr0.003_seed0",
        "lr0.003_seed1",
    ]
    assert [(t.config.learner.lr, t.config.seed) for t in found.trials] == [
        (1e-3, 0),
        (1e-3, 1),
        (3e-3, 0),
        (3e-3, 1),
    ]
    assert found.folder == tmp_path / "runs" / "rates"
    assert {t.path for t in found.trials} == {found.folder / t.name for t in found.trials}
    assert found.trials[1].setting == {"learner.lr": 1e-3}


def test_a_trial_is_the_run_of_its_values(planned):
    trial = planned().trials[3]
    alone = parse(["--config=configs/quickstart.yaml", "--learner.lr=3e-3", "--seed=1"]).config
    assert trial.config.identity() == alone.identity()


def test_trials_are_tracked_where_other_runs_are(planned, tmp_path, monkeypatch):
    assert planned().trials[0].config.tracking.uri == f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@host")
    file = tmp_path / "sweep.yaml"
    trial = plan(read_words([f"--sweep={file}", f"--runs={tmp_path}"])).trials[0]
    assert trial.config.tracking.uri is None  # its process has the variable, its file has not


@pytest.mark.parametrize(
    ("words", "fields", "passes"),
    [
        ((), {}, 2),
        ((), {"learner": {"inner_epochs": 3}}, 3),
        (("--learner.inner_epochs=4",), {"learner": {"inner_epochs": 3}}, 4),
    ],
)
def test_the_command_line_is_over_the_file_and_it_over_the_configuration(
    planned, words, fields, passes
):
    trial = planned(*words, **fields).trials[0]
    assert (trial.config.learner.inner_epochs, trial.config.learner.lr) == (passes, 1e-3)


@pytest.mark.parametrize("preset", ["b2", "ddpo"])
def test_a_preset_that_is_varied_is_as_on_the_command_line(planned, preset):
    trial = planned(grid={"preset": [preset]}, learner={"inner_epochs": 2}).trials[0]
    words = ["--config=configs/quickstart.yaml", "--learner.inner_epochs=2", f"--preset={preset}"]
    assert trial.config.identity() == parse(words).config.identity()


def test_of_several_presets_the_last_counts_below_its_own_fields():
    rest = {"prompts": {"train": "p"}, "rewards": [{"name": "clip", "kind": "clip"}]}
    low = {**rest, "preset": "ddpo", "branching": {"images": 99}}
    found = resolved(low, {"preset": "b2", "branching": {"branches": 5}}, {"seed": 3})
    assert found.branching.images == 99  # a file's own field that the preset leaves alone
    assert (found.preset, found.branching.branches, found.seed) == ("b2", 5, 3)


def test_values_of_several_fields_at_once(planned):
    values = [{"start": 0.5, "end": 0.9}, {"start": 0.9, "end": 0.9}]
    found = planned(grid={"curriculum": values})
    assert [t.config.interval_bounds for t in found.trials] == [(5, 9), (9, 9)]
    assert len({t.name for t in found.trials}) == 2
    assert all(re.fullmatch(r"curriculum[A-Za-z0-9._-]+", t.name) for t in found.trials)


def test_names_stay_when_the_grid_grows(planned):
    few = {t.name: t.values for t in planned().trials}
    more = planned(grid={"learner.lr": ["1e-3", 2e-3, 3e-3], "seed": [0, 1, 2]})
    assert {t.name: t.values for t in more.trials if t.name in few} == few


def test_fields_with_the_same_last_word_keep_their_sections(planned):
    found = planned(grid={"fleet.samplers.cpus": [1], "fleet.learner.cpus": [0.5, 1.0]})
    assert found.trials[0].name == "fleet.samplers.cpus1_fleet.learner.cpus0.5"


def test_draws_are_within_bounds_and_the_same_when_more_are_asked_for(planned):
    sample = {"learner.lr": LR, "learner.inner_epochs": {"integer": [1, 3]}}
    few = planned(grid={"seed": [0, 1]}, sample=sample, samples=3).trials
    more = planned(grid={"seed": [0, 1]}, sample=sample, samples=20).trials
    assert [t.config for t in more[:6]] == [t.config for t in few]
    drawn = {(t.config.learner.lr, t.config.learner.inner_epochs) for t in more}
    assert len(drawn) == 20 and len(more) == 40
    assert all(1e-4 <= lr <= 1e-2 for lr, _ in drawn)
    assert {passes for _, passes in drawn} == {1, 2, 3}
    assert min(lr for lr, _ in drawn) < 1e-3 < max(lr for lr, _ in drawn)


def test_another_sample_seed_draws_others(planned):
    def first(**fields: object) -> float:
        found = planned(grid=None, sample={"learner.lr": LR}, samples=1, **fields)
        return found.trials[0].config.learner.lr

    assert first() != first(sample_seed=1)


def test_a_choice_is_drawn_as_it_stands(planned):
    choice = {"curriculum": {"choice": [{"start": 0.5, "end": 0.9}, {"start": 0.9, "end": 0.9}]}}
    found = planned(grid=None, sample=choice, samples=2)
    assert {t.config.interval_bounds for t in found.trials} == {(5, 9), (9, 9)}


REFUSED = [
    ({"metric": None}, "metric is missing: write for example `metric: heldout/judge`"),
    ({"name": None}, "name is missing"),
    ({"name": "a/b"}, "name is 'a/b'"),
    ({"metric": "heldout/jugde"}, "trial lr0.001_seed0: metric is 'heldout/jugde'"),
    ({"metric": "jugde"}, "metric is 'jugde', which is no figure of metrics.jsonl"),
    ({"metric": "held/judge"}, "figures begin with branch/"),
    ({"mode": "most"}, "mode is 'most'"),
    ({"learnr": {"lr": 1}}, "learnr is neither a field of a sweep"),
    ({"learner": {"rate": 1}}, "trial lr0.001_seed0: learner.rate is not a field"),
    ({"grid": {"learner.lr": [1e-3, -1.0]}}, "trial lr-1.0: learner.lr is -1.0"),
    ({"grid": {"learner.rate": [1]}}, "trial rate1: learner.rate is not a field (value 1)"),
    ({"grid": {"learner.lr": 1e-3}}, "grid.learner.lr is 0.001: give a list of values"),
    ({"grid": {"seed": []}}, "grid.seed is []"),
    ({"grid": {"seed": [0, 1, 0]}}, "grid.seed has 0 twice"),
    ({"grid": {"learner.lr": ["1e-3", 0.001]}}, "grid.learner.lr has 0.001 twice"),
    ({"grid": {}}, "nothing is varied"),
    ({"grid": {"name": ["a", "b"]}}, "name cannot be varied"),
    ({"grid": {"learner": [{"lr": 1}], "learner.lr": [1]}}, "learner and a field of it are both"),
    ({"sample": {"learner.lr": LR}, "samples": 2}, "learner.lr is in grid and in sample"),
    ({"samples": 2}, "samples is 2 but sample is empty"),
    ({"grid": None, "sample": {"learner.lr": LR}}, "samples is missing"),
    ({"grid": None, "sample": {"learner.lr": {}}, "samples": 2}, "give one of uniform"),
    (
        {"grid": None, "sample": {"learner.lr": {"uniform": [2, 1]}}, "samples": 2},
        "uniform goes from 2 to 1",
    ),
    (
        {"grid": None, "sample": {"learner.lr": {"log_uniform": [0, 1]}}, "samples": 2},
        "log_uniform begins at 0",
    ),
    (
        {"grid": None, "sample": {"seed": {"integer": [0, 1]}}, "samples": 3},
        "samples is 3 but sample has only 2 different values",
    ),
    ({"parallel": 0}, "parallel is 0"),
    ({"stop_early": {"after": 2}}, "stop_early goes with one seed"),
    (
        {"grid": {"learner.lr": [1, 2]}, "metric": "reward.after", "stop_early": {"after": 2}},
        "stop_early needs a figure that is known while a run goes on",
    ),
    ({"config": "no.yaml"}, "--config no.yaml: there is no such file"),
    ({"model": {"path": "/no/model"}}, "trial lr0.001_seed0: model.path: there is no file"),
]


@pytest.mark.parametrize(("fields", "words"), REFUSED, ids=[w for _, w in REFUSED])
def test_what_is_wrong_is_said_in_one_sentence(planned, tmp_path, fields, words):
    with pytest.raises(ConfigError) as error:
        planned(**fields)
    assert words in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("metric", ["reward/mean", "eval/heldout/judge", "judge.train.after"])
def test_figures_and_places_in_the_summary_are_metrics(planned, metric):
    assert planned(metric=metric).sweep.metric == metric


def test_what_is_varied_cannot_be_given(planned):
    with pytest.raises(ConfigError, match=r"learner\.lr is varied by the sweep and given as"):
        planned("--learner.lr=1e-3")


def test_a_trial_whose_folder_has_another_configuration_is_named(planned):
    trial = planned().trials[1]
    with open_run(trial.config) as folder:
        folder.commit(RunState(0), {}, {})
    assert planned().trials[1] == trial
    with pytest.raises(ConfigError, match=r"lr0\.001_seed1: .*\(learner\.inner_epochs was 2, is 3"):
        planned(learner={"inner_epochs": 3})


def test_the_command_refuses_and_prints(planned, tmp_path, capsys):
    planned("--name=other")
    file = f"--sweep={tmp_path / 'sweep.yaml'}"
    assert main([file, f"--runs={tmp_path}", "--seed=3"]) == EXIT_CONFIG
    assert "seed is varied by the sweep" in capsys.readouterr().err
    assert main([file, f"--runs={tmp_path}", "--print-config", "--name=other"]) == EXIT_DONE
    shown = list(yaml.safe_load_all(capsys.readouterr().out))
    assert [s["name"] for s in shown][-1] == "lr0.003_seed1"
    assert {s["runs"] for s in shown} == {str(tmp_path / "other")}
    with pytest.raises(ConfigError, match="go with `b2ray run`"):
        parse([file])
