"""From files, presets and the command line to a configuration."""

from __future__ import annotations

from itertools import permutations
from typing import get_args

import pytest
import yaml

from b2ray import run
from b2ray.config import Preset
from b2ray.config.load import merge, parse, resolved
from b2ray.config.paths import find
from b2ray.errors import EXIT_CONFIG, EXIT_DONE, ConfigError
from b2ray.rewards import check
from b2ray.tracking.folder import dump, open_run

REST = {"prompts": {"train": "p.txt"}, "rewards": [{"name": "clip", "kind": "clip"}]}


@pytest.fixture
def file(tmp_path):
    """Writes a configuration file and returns the option that names it."""

    def write(text: str = "", **sections: object) -> str:
        path = tmp_path / "config.yaml"
        path.write_text(text or yaml.safe_dump(REST | sections))
        return f"--config={path}"

    return write


# --- precedence ------------------------------------------------------------------------------


def test_defaults_are_below_the_files_preset(file):
    assert parse([file(preset="ddpo")]).config.branching.branches == 1


def test_the_files_preset_is_below_the_file(file):
    given = parse([file(preset="ddpo", branching={"branches": 3})]).config
    assert (given.branching.branches, given.selection.kind) == (3, "all")


def test_the_file_is_below_the_command_lines_preset(file):
    given = parse([file(branching={"branches": 3, "images": 30}), "--preset=ddpo"]).config
    assert (given.branching.branches, given.branching.images) == (1, 30)


def test_the_command_lines_preset_is_below_its_fields(file):
    given = parse([file(), "--preset=ddpo", "--branching.branches=4"]).config
    assert (given.preset, given.branching.branches, given.advantage.center) == ("ddpo", 4, "prompt")


def test_nothing_of_the_files_preset_is_left_under_the_command_lines(file):
    presets = get_args(Preset)
    alone = {preset: resolved(REST, {"preset": preset}) for preset in presets}
    assert len({config.model_dump_json() for config in alone.values()}) == len(presets) > 1
    left_over = [
        (below, above)
        for below, above in permutations(presets, 2)
        if resolved(REST | {"preset": below}, {"preset": above}) != alone[above]
    ]
    assert left_over == []
    below, above = presets[:2]
    assert parse([file(preset=below), f"--preset={above}"]).config == alone[above]


def test_sections_merge_field_by_field_and_lists_are_replaced():
    low = {"a": {"x": 1, "y": {"z": 2}}, "b": [1, 2]}
    high = {"a": {"y": {"w": 3}}, "b": [3]}
    assert merge(low, high) == {"a": {"x": 1, "y": {"z": 2, "w": 3}}, "b": [3]}
    assert low == {"a": {"x": 1, "y": {"z": 2}}, "b": [1, 2]}


def test_the_environment_does_not_reach_into_a_run(file, monkeypatch):
    for name, value in {"NAME": "sneaky", "SEED": "7", "RUNS": "/x", "LEARNER": "{}"}.items():
        monkeypatch.setenv(name, value)
    given = parse([file()]).config
    assert (given.name, given.seed, given.runs) == ("run", 0, "runs")


def test_an_option_takes_its_value_after_a_space_too(file):
    assert parse([file(), "--sampling.steps", "7"]).config.sampling.steps == 7


def test_a_value_can_be_emptied(file):
    emptied = parse([file(prompts={"train": "a", "heldout": "b"}), "--prompts.heldout=null"])
    assert emptied.config.prompts.heldout is None


def test_a_name_of_digits_stays_text(file):
    assert parse([file(), "--name=007"]).config.name == "007"


def test_rewards_are_json_on_the_command_line(file):
    given = parse([file(), '--rewards=[{"name": "mine", "kind": "m:C", "weight": 0.5}]']).config
    assert [(r.name, r.kind, r.weight) for r in given.rewards] == [("mine", "m:C", 0.5)]


def test_without_a_file_it_is_the_quickstart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parse([]).config.name == "quickstart"


def test_the_quickstart_with_three_rewards_is_of_its_first_settings():
    config = parse(["--config=configs/quickstart_rewards.yaml"]).config
    assert [r.kind for r in config.rewards] == ["clip", "imagereward", "aesthetic"]
    for reward in config.rewards:
        check(reward)
        assert reward.scale == "window" and reward.path and find(reward.path)
    plain = parse(["--config=configs/quickstart.yaml"]).config
    own = {field for field, value in config if value != getattr(plain, field)}
    method = {"curriculum", "branching", "selection", "objective", "learner"}
    assert own == {"name", "rewards", *method}


# --- bad input -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--sampling.stepz=3"], ["--sampling.stepz=3", "--help"]),
        (["--nonsense=1"], ["--nonsense=1", "--help"]),
        (["words"], ["words", "--help"]),
        (["--samp.steps=3"], ["--samp.steps=3"]),
        (["--sampling.steps"], ["--sampling.steps", "expected one argument"]),
        (["--sampling.steps=abc"], ["sampling.steps is 'abc'", "integer"]),
        (["--sampling=3"], ["sampling"]),
        (["--rewards=[{"], ["rewards"]),
        (['--rewards=[{"name": "a", "kind": "b", "foo": 1}]'], ["rewards.0.foo", "not a field"]),
        (["--config=/nowhere.yaml"], ["--config /nowhere.yaml", "no such file"]),
        (["--config"], ["--config"]),
        (["--config=/"], ["--config /"]),
        (["--resume"], ["--resume", "--name"]),
        (["--preset=reinforce"], ["preset is 'reinforce'", "ddpo"]),
        (["--curriculum.start=99"], ["curriculum", "99", "sampling.steps"]),
    ],
)
def test_a_bad_command_line_is_refused_in_one_sentence(arguments, words):
    with pytest.raises(ConfigError) as caught:
        parse(arguments)
    message = str(caught.value)
    assert "\n" not in message
    assert [w for w in words if w not in message] == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [1", ["config.yaml", "cannot be read as YAML"]),
        ("- a", ["config.yaml", "section"]),
        ("# nothing", ["config.yaml", "section"]),
        ("\x00", ["config.yaml", "cannot be read"]),
        (yaml.safe_dump(REST | {"sampler": {"steps": 3}}), ["sampler is not a field"]),
        (yaml.safe_dump(REST | {"sampling": {"stepz": 3}}), ["sampling.stepz is not a field"]),
        (yaml.safe_dump(REST | {1: 2}), ["1"]),
        (yaml.safe_dump(REST | {"_env_file": "x"}), ["_env_file is not a field"]),
        (yaml.safe_dump(REST | {"name": 12}), ["name is 12", "string"]),
        (yaml.safe_dump(REST | {"preset": ["b2"]}), ["preset is ['b2']"]),
    ],
)
def test_a_bad_file_is_refused_in_one_sentence(file, text, words):
    with pytest.raises(ConfigError) as caught:
        parse([file(text)])
    message = str(caught.value)
    assert "\n" not in message
    assert [w for w in words if w not in message] == []


def test_a_file_that_is_not_utf8_is_refused(tmp_path):
    path = tmp_path / "latin.yaml"
    path.write_bytes("name: übung".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"latin\.yaml cannot be read as YAML"):
        parse([f"--config={path}"])


# --- resume ----------------------------------------------------------------------------------


def test_resume_uses_the_runs_own_configuration(file, tmp_path):
    given = parse([file(), f"--runs={tmp_path}", "--name=mine", "--seed=3", "--preset=ddpo"]).config
    with open_run(given):
        pass
    resumed = parse([f"--runs={tmp_path}", "--name=mine", "--resume"])
    assert resumed.resume
    assert resumed.config == given


def test_resume_with_a_file_uses_the_file(file, tmp_path):
    given = parse([file(seed=3), f"--runs={tmp_path}", "--name=mine"]).config
    with open_run(given):
        pass
    option = file(seed=4)
    resumed = parse([option, f"--runs={tmp_path}", "--name=mine", "--resume"])
    assert resumed.config.seed == 4


def test_resume_finds_a_run_where_it_was_moved_to(file, tmp_path):
    with open_run(parse([file(), f"--runs={tmp_path / 'old'}", "--name=mine"]).config):
        pass
    (tmp_path / "old").rename(tmp_path / "new")
    resumed = parse([f"--runs={tmp_path / 'new'}", "--name=mine", "--resume"])
    assert resumed.config.runs == str(tmp_path / "new")


# --- in a Ray job ----------------------------------------------------------------------------


@pytest.fixture
def job(tmp_path, monkeypatch):
    """The working directory of a job that was submitted with --working-dir."""
    copy = tmp_path / "session_1" / "runtime_resources" / "working_dir_files" / "_ray_pkg_0"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("B2RAY_HOME", raising=False)
    return copy


@pytest.mark.parametrize(
    ("given", "home", "found"),
    [
        ("runs", None, "{tmp}/home/runs"),
        ("runs", "{tmp}/shared", "{tmp}/shared/runs"),
        ("/data/runs", "{tmp}/shared", "/data/runs"),
        ("~/mine", "{tmp}/shared", "{tmp}/home/mine"),
    ],
)
def test_a_job_keeps_its_runs_outside_its_copy(
    file, job, tmp_path, monkeypatch, given, home, found
):
    if home:
        monkeypatch.setenv("B2RAY_HOME", home.format(tmp=tmp_path))
    assert parse([file(), f"--runs={given}"]).config.runs == found.format(tmp=tmp_path)


def test_a_job_resumes_from_where_it_keeps_its_runs(file, job):
    with open_run(parse([file(seed=3), "--name=mine"]).config):
        pass
    assert parse(["--name=mine", "--resume"]).config.seed == 3
    assert list(job.iterdir()) == []


def test_a_job_says_first_where_its_run_is_kept(file, job, tmp_path, capsys):
    assert run.main([file(), "--name=mine"]) == EXIT_CONFIG  # there is no p.txt
    first = capsys.readouterr().err.splitlines()[0]
    assert f"this run is kept in {tmp_path}/home/runs/mine on " in first


def test_a_relative_home_of_runs_is_refused(file, job, monkeypatch):
    monkeypatch.setenv("B2RAY_HOME", "data")
    with pytest.raises(ConfigError, match="B2RAY_HOME is 'data'"):
        parse([file()])


# --- the command -----------------------------------------------------------------------------


def test_the_printed_configuration_reads_back_as_itself(file, tmp_path, capsys):
    arguments = [file(preset="b2_released", seed=5), "--sampling.steps=7", "--learner.lr=1e-5"]
    assert run.main([*arguments, "--print-config"]) == EXIT_DONE
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    again = parse([f"--config={printed}"]).config
    assert again == parse(arguments).config
    assert dump(again) == printed.read_text()


def test_the_command_answers_bad_input_with_one_line_and_its_code(capsys):
    assert run.main(["--sampling.eta=0"]) == EXIT_CONFIG
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("b2ray: sampling.eta is 0")
    assert err.count("\n") == 1


def test_help_lists_fields_with_their_explanations(capsys):
    with pytest.raises(SystemExit) as caught:
        run.main(["--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    for expected in ("--sampling.steps", "number of denoising steps", "--resume", "--print-config"):
        assert expected in shown
