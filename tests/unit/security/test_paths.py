"""Text of a user's files that becomes a path stays where it belongs, or is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml

from b2ray.commands.export import main as export
from b2ray.config import Config, Prompts, Reward
from b2ray.config.load import parse, validated
from b2ray.config.paths import find
from b2ray.errors import ConfigError
from b2ray.preflight import check_files
from b2ray.prompts import read
from b2ray.run import main
from b2ray.tracking.folder import RunFolder, open_run
from tests.models import arguments, trained_run

LONG = "x" * 5000
OUTSIDE = [
    "../../x",
    "/tmp/x",
    "a/b",
    "..",
    ".",
    "",
    "a\0b",
    "a\nb",
    "~",
    "-x",
    "x" * 81,
    "ä",
    LONG,
]
REST = {"prompts": {"train": "p.txt"}, "rewards": [{"name": "clip", "kind": "clip"}]}


def refused(field: str, **values: object) -> bool:
    """Whether a configuration with these values is refused for this field's."""
    try:
        validated({**REST, **values})
    except ConfigError as error:
        return str(error).startswith(f"{field} is ")
    return False


def test_a_runs_name_is_no_path():
    assert [name for name in OUTSIDE if not refused("name", name=name)] == []


def test_a_rewards_name_is_no_path():
    for name in OUTSIDE:
        named = [{"name": name, "kind": "clip"}]
        assert refused("rewards.0.name", rewards=named), name
        field = "evaluation.heldout_rewards.0.name"
        assert refused(field, evaluation={"heldout_rewards": named}), name


def test_a_presets_name_is_no_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "b2.yaml").write_text("name: read")
    outside = ["../../x", "/tmp/b2", "../presets/b2", "a\0b", LONG, "x", f"{tmp_path}/b2"]
    assert [preset for preset in outside if not refused("preset", preset=preset)] == []


@pytest.mark.parametrize("runs", ["a\0b", LONG, ""])
def test_a_folder_of_runs_that_cannot_be_is_a_sentence(runs):
    with pytest.raises(ConfigError, match=r"^runs is |cannot be written") as caught:
        config = validated({**REST, "runs": runs})
        with open_run(config):
            pass
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["a\0b", LONG, "~nobody-of-this-name/x", "/dev/null/x"])
def test_a_path_that_cannot_be_is_not_there(path):
    assert find(path) is None
    with pytest.raises(ConfigError, match=r"prompts\.train: there is no file"):
        read("prompts.train", path)


@pytest.mark.parametrize("path", ["a\0b", LONG])
def test_no_such_path_brings_the_command_down(path, models, tmp_path, capsys):
    settings = parse(arguments(models, tmp_path, "run")).config.model_dump(mode="json")
    for section, field in (("model", "path"), ("prompts", "train"), ("prompts", "heldout")):
        changed = {**settings, section: {**settings[section], field: path}}
        file = tmp_path / "changed.yaml"
        file.write_text(yaml.safe_dump(changed))
        assert main([f"--config={file}"]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"b2ray: {section}.{field}")
        assert "Traceback" not in said
    assert not (tmp_path / "run").exists()


def test_a_prompt_is_never_a_file_name(tmp_path):
    """Pictures and scores are named by number and set, whatever the prompts and rewards are."""
    config = Config(
        prompts=Prompts(train="p.txt"), rewards=(Reward(name="clip", kind="clip"),), runs="."
    )
    folder = RunFolder(tmp_path / "runs" / "run", config)
    folder.path.mkdir(parents=True)
    prompts = ["../../x", "/etc/passwd", "a\0b", LONG]
    folder.save_scores(0, "train", prompts, {"reward": np.zeros(4), "..": np.zeros(4)})
    written = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert [p.name for p in written] == ["step-00000_train.json"]
    assert all((tmp_path / "runs" / "run") in p.parents for p in written)


def test_a_run_with_such_prompts_stays_in_its_folder(models, tmp_path):
    prompts = ["../../x", "/tmp/x", "x" * 3000, "%2e%2e%2f"]
    (tmp_path / "p.txt").write_text("\n".join(prompts) + "\n")
    argv = arguments(models, tmp_path / "runs", "run", prompts__train=tmp_path / "p.txt")
    config = parse(argv).config
    assert check_files(config).train.texts == tuple(prompts)
    with open_run(config) as folder:
        assert folder.path == tmp_path / "runs" / "run"
    assert {p.name for p in tmp_path.iterdir()} == {"p.txt", "runs"}


def test_a_configuration_from_elsewhere_does_not_export_outside(models, tmp_path, capsys):
    """A run's folder that somebody sent: the name in its config.yaml names the file."""
    weights = {"down.lora_A.weight": np.zeros((1, 1), np.float32)}
    path = trained_run(models, tmp_path, "run", weights)
    settings = yaml.safe_load((path / "config.yaml").read_text())
    for name in ("../../../x", "/tmp/x"):
        (path / "config.yaml").write_text(yaml.safe_dump({**settings, "name": name}))
        assert export([str(path), "--format=kohya"]) == 2
        assert "name is" in capsys.readouterr().err
    assert not list(Path(tmp_path).rglob("x*.safetensors"))
