"""Configurations with the names that the version before had."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from b2ray.config import legacy
from b2ray.config.legacy import updated, updated_words
from b2ray.config.load import overridden, parse, validated
from b2ray.errors import ConfigError
from b2ray.tracking.folder import open_run

LEAST = {"prompts": {"train": "animals"}, "rewards": [{"name": "clip", "kind": "clip"}]}


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    """No old name was seen before."""
    monkeypatch.setattr(legacy, "_warned", set())


def test_old_names_work_in_files_and_on_the_command_line_with_one_warning(tmp_path, capsys):
    file = tmp_path / "old.yaml"
    old = {"learner": {"passes": 5, "lr": 1e-3}, "model": {"lora": {"folded": True}}}
    file.write_text(yaml.safe_dump({**LEAST, **old}))
    config = parse([f"--config={file}"]).config
    assert (config.learner.inner_epochs, config.learner.lr) == (5, 1e-3)
    assert config.model.lora.merged
    assert overridden(LEAST, ["--learner.passes=7"]).learner.inner_epochs == 7
    said = capsys.readouterr().err
    assert said.count("learner.passes is called learner.inner_epochs now") == 1
    assert "model.lora.folded is called model.lora.merged now" in said


def test_an_old_name_lies_over_a_presets_value():
    values = {**LEAST, "preset": "ddpo_sf", "learner": {"passes": 3}}
    assert validated({**LEAST, "preset": "ddpo_sf"}).learner.inner_epochs == 1
    assert validated(values).learner.inner_epochs == 3


def test_both_names_are_refused():
    with pytest.raises(ConfigError, match=r"learner\.inner_epochs is given twice, once by its"):
        updated({"learner": {"passes": 3, "inner_epochs": 2}})
    for words in (
        ["--learner.passes=3", "--learner.inner_epochs=2"],
        ["--learner.inner_epochs", "2", "--learner.passes", "3"],
    ):
        with pytest.raises(ConfigError, match=r"learner\.inner_epochs is given twice, once by its"):
            updated_words(words)


def test_prefixes_of_their_own_stage_alone_are_what_there_is():
    assert updated({"prefix": {"policy": "current", "stages": None}, "seed": 1}) == {"seed": 1}
    assert updated_words(["--prefix.policy=current", "--seed=1"]) == ["--seed=1"]
    assert updated_words(["--prefix.policy", "current", "--seed", "1"]) == ["--seed", "1"]
    for refused in (
        lambda: updated({"prefix": {"policy": "reuse", "stages": 4}}),
        lambda: updated_words(["--prefix.policy=base"]),
        lambda: updated_words(["--prefix.policy", "reuse"]),
    ):
        with pytest.raises(ConfigError, match=r"prefix.policy is .*decided_against\.md\); leave"):
            refused()


def test_a_run_folder_of_the_version_before_is_the_same_run(tmp_path: Path):
    """Its config.yaml has the old names, and is left as it is."""
    config = validated({**LEAST, "runs": str(tmp_path), "name": "mine"})
    with open_run(config) as folder:
        saved = folder.path / "config.yaml"
        values = yaml.safe_load(saved.read_text())
        values["learner"]["passes"] = values["learner"].pop("inner_epochs")
        values["model"]["lora"]["folded"] = values["model"]["lora"].pop("merged")
        values["prefix"] = {"policy": "current", "stages": None}
        saved.write_text(yaml.safe_dump(values))
        (folder.path / "checkpoints" / "stage-00001").mkdir(parents=True)
        before = saved.read_text()
    with open_run(config) as folder:
        assert folder.committed == 1 and saved.read_text() == before
