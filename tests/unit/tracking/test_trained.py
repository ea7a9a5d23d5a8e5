"""Which LoRA a run has so far; reading it touches nothing."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from b2ray.diffusion import lora_file
from b2ray.errors import ConfigError
from b2ray.tracking.trained import find_trained
from tests.models import trained_run


def weights(value: float) -> dict[str, np.ndarray]:
    return {"block.to_q.lora_A.weight": np.full((2, 3), value, np.float32)}


@pytest.fixture
def run(models, tmp_path):
    """Make a run with 3 stages in tmp_path; `finished` or after its second stage."""

    def make(*stages: dict[str, np.ndarray], finished: bool, name: str = "mine"):
        return trained_run(models, tmp_path, name, *stages, finished=finished)

    return make


def value(found) -> float:
    return float(found.weights["block.to_q.lora_A.weight"][0, 0])


def test_a_finished_run_has_its_lora(run, tmp_path):
    run(weights(2), weights(3), finished=True)
    found = find_trained("mine", str(tmp_path))
    assert (value(found), found.stage) == (3, 3)
    assert str(found) == "mine, stage 3 of 3"


def test_an_unfinished_run_has_that_of_its_last_commit(run, tmp_path):
    path = run(weights(1), weights(2), finished=False)
    found = find_trained("mine", str(tmp_path))
    assert (value(found), found.stage) == (2, 2)
    assert str(found) == "mine, stage 2 of 3"
    lora_file.save(path / "lora", weights(9), found.config.model.lora)  # killed before its summary
    assert value(find_trained("mine", str(tmp_path))) == 2


def test_an_earlier_stage_that_is_kept_can_be_asked_for(run, tmp_path):
    run(weights(2), weights(3), finished=True)
    found = find_trained("mine", str(tmp_path), 2)
    assert (value(found), found.stage) == (2, 2)
    assert value(find_trained("mine", str(tmp_path), 3)) == 3
    with pytest.raises(ConfigError, match="has no stage 1: those that are kept are 2, 3"):
        find_trained("mine", str(tmp_path), 1)


def test_the_folder_names_a_run_too(run, tmp_path):
    assert value(find_trained(str(run(weights(3), finished=True)), "elsewhere")) == 3


def test_nothing_in_the_folder_changes(run):
    path = run(weights(1), weights(2), finished=False)
    (path / "checkpoints" / "stage-00003.part").mkdir()
    (path / "metrics.jsonl").write_text('{"step": 3}\nhalf a li')

    def everything() -> dict[str, str]:
        files = [p for p in path.rglob("*") if p.is_file()]
        return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}

    before = everything()
    find_trained(str(path), "")
    assert everything() == before
    assert (path / "checkpoints" / "stage-00003.part").is_dir()


def test_a_run_that_is_not_there_is_named_with_those_that_are(run, tmp_path):
    run(weights(1), finished=False, name="a")
    run(weights(1), finished=False, name="b")
    with pytest.raises(ConfigError, match=r"there is no run 'c': neither c nor .*/c has .* a, b$"):
        find_trained("c", str(tmp_path))
    with pytest.raises(ConfigError, match=r"has a config.yaml$"):
        find_trained("c", str(tmp_path / "none"))


def test_a_run_without_a_commit_has_nothing_yet(run, tmp_path):
    run(finished=False)
    with pytest.raises(ConfigError, match="has no committed stage yet"):
        find_trained("mine", str(tmp_path))


def test_a_broken_file_is_a_sentence(run, tmp_path):
    path = run(weights(1), finished=False)
    file = path / "checkpoints" / "stage-00001" / lora_file.FILE
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ConfigError, match="cannot be read as safetensors"):
        find_trained("mine", str(tmp_path))
