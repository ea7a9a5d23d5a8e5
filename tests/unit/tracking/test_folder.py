"""The run's folder: commits, what resume cuts off, and whose folder it is."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest

from b2ray.algorithm.branching import RewardWindow
from b2ray.algorithm.replay import ReplayEntry
from b2ray.config import (
    Advantage,
    Config,
    Fleet,
    Prompts,
    Reward,
    Samplers,
    Tracking,
)
from b2ray.diffusion.lora_file import FILE, digest
from b2ray.diffusion.trajectory import Trajectory
from b2ray.errors import ConfigError
from b2ray.tracking.folder import RunFolder, RunState, open_run, write_atomically

WEIGHTS = {"a.lora_A.weight": np.arange(6, dtype=np.float32).reshape(2, 3) / 7}
OPTIMIZER = {
    "a.lora_A.weight/step": np.array(3.0, np.float32),
    "a.lora_A.weight/exp_avg": np.full((2, 3), 1e-9, np.float32),
}


def config(tmp_path: Path, **over: object) -> Config:
    rewards = (Reward(name="clip", kind="clip"),)
    values = {"prompts": Prompts(train="p.txt"), "rewards": rewards, "runs": str(tmp_path / "runs")}
    return Config(**{**values, **over})


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    with open_run(config(tmp_path)) as found:
        yield found


def state(stage: int) -> RunState:
    window = RewardWindow(8, {"a cat": [[0.1, 0.2], [1 / 3]]})
    return RunState(
        stage,
        stage,
        "d",
        window,
        RewardWindow(8, {"clip": [[0.5, 1.0]]}),
        {"clip": (0.5, 0.1)},
        {"seconds": 1.5},
        [{"step": 0, "whole": True}],
    )


def stage_done(folder: RunFolder, stage: int) -> None:
    folder.append_metrics(stage, {"reward/mean": stage / 3}, [])
    folder.commit(state(stage), WEIGHTS, OPTIMIZER)


def listing(path: Path) -> dict[str, bytes | None]:
    return {
        str(p.relative_to(path)): p.read_bytes() if p.is_file() else None
        for p in sorted(path.rglob("*"))
    }


# --- commits ---------------------------------------------------------------------------------


def test_a_commit_reads_back_exactly(folder):
    stage_done(folder, 1)
    found = folder.last_commit()
    assert found.state == state(1)
    assert digest(found.weights) == digest(WEIGHTS)
    assert found.optimizer.keys() == OPTIMIZER.keys()
    for name, value in OPTIMIZER.items():
        assert found.optimizer[name].shape == value.shape
        assert found.optimizer[name].tobytes() == value.tobytes()


def test_a_commit_without_optimizer_state_reads_back(folder):
    folder.commit(state(0), WEIGHTS, {})
    assert folder.last_commit().optimizer == {}


def entry(stage: int) -> ReplayEntry:
    latents = np.full((3, 4, 2, 2), stage, np.uint16)
    trajectory = Trajectory(latents, np.full(2, 1 / 3, np.float32), stage)
    return ReplayEntry(stage, "a cat", -0.5, 2, trajectory)


def test_what_is_replayed_is_part_of_the_commit(folder):
    folder.commit(state(1), WEIGHTS, OPTIMIZER, [entry(0), entry(1)])
    found = folder.last_commit().replay
    assert [k.stage for k in found] == [0, 1]
    assert found[1].trajectory.latents.tobytes() == entry(1).trajectory.latents.tobytes()


def test_a_commit_without_anything_to_replay_reads_back(folder):
    """Like every one of a run without replay, and all from before there was any."""
    folder.commit(state(1), WEIGHTS, OPTIMIZER, [entry(0)])
    stage_done(folder, 2)
    assert folder.last_commit().replay == []
    files = {p.name for p in (folder.path / "checkpoints" / "stage-00002").iterdir()}
    assert files == {"state.json", "optimizer.safetensors", FILE}


def test_a_new_run_has_no_commit(folder):
    assert folder.last_commit() is None
    assert folder.metrics() == []
    assert not folder.finished


def test_the_two_newest_checkpoints_are_kept(folder):
    for stage in range(5):
        stage_done(folder, stage)
    kept = sorted(p.name for p in (folder.path / "checkpoints").iterdir())
    assert kept == ["stage-00003", "stage-00004"]
    assert folder.last_commit().state.stage == 4


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    "failing",
    ["os.fsync", "pathlib.Path.write_bytes", "pathlib.Path.write_text", "pathlib.Path.rename"],
)
def test_a_full_disk_leaves_the_stage_before(folder, monkeypatch, failing):
    stage_done(folder, 1)
    before = listing(folder.path / "checkpoints")
    with monkeypatch.context() as patch:
        patch.setattr(failing, full)
        with pytest.raises(ConfigError, match=r"stage 2 .*No space left.*make room and resume"):
            folder.commit(state(2), WEIGHTS, OPTIMIZER, [entry(2)])
    assert listing(folder.path / "checkpoints") == before
    assert folder.last_commit().state == state(1)
    stage_done(folder, 2)
    assert folder.last_commit().state == state(2)


def test_a_full_disk_under_the_figures_is_a_sentence(folder, monkeypatch):
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError, match=r"metrics\.jsonl cannot be written: No space left"):
        folder.append_metrics(1, {}, [])


def test_a_commit_that_died_half_way_is_swept_away(folder):
    stage_done(folder, 1)
    half = folder.path / "checkpoints" / "stage-00002.part"
    half.mkdir()
    (half / "state.json").write_text('{"stage"')
    assert folder.last_commit().state == state(1)
    assert not half.exists()


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "notes.json"
    write_atomically(file, "old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            write_atomically(file, "new")
    assert file.read_text() == "old"


# --- what resume cuts off --------------------------------------------------------------------


def test_lines_beyond_the_commit_are_cut_off(folder):
    stage_done(folder, 0)
    stage_done(folder, 1)
    committed = folder.metrics_file.read_bytes()
    folder.append_metrics(2, {"reward/mean": 9.0}, ["pictures/x.png"])
    folder.last_commit()
    assert folder.metrics_file.read_bytes() == committed
    assert [line["step"] for line in folder.metrics()] == [0, 1]


@pytest.mark.parametrize("half", ['{"step": 1, "ti', "{", '{"step": 2, "time": 1.0, "images": []}'])
def test_a_half_written_line_is_cut_off(folder, half):
    stage_done(folder, 0)
    stage_done(folder, 1)
    committed = folder.metrics_file.read_bytes()
    with folder.metrics_file.open("a") as file:
        file.write(half)
    assert folder.last_commit().state.stage == 1
    assert folder.metrics_file.read_bytes() == committed


def test_a_line_that_is_still_being_written_is_not_read(folder):
    # MLflow's thread reads while the run writes, and a full disk leaves half a line.
    folder.append_metrics(0, {"reward/mean": 0.5}, [])
    with folder.metrics_file.open("a") as file:
        file.write('{"step": 1, "ti')
    assert [line["step"] for line in folder.metrics()] == [0]


def test_figures_without_any_commit_are_cut_off(folder):
    folder.append_metrics(0, {}, [])
    assert folder.last_commit() is None
    assert folder.metrics() == []


def test_figures_keep_their_values(folder):
    folder.append_metrics(3, {"reward/mean": 1 / 3}, ["pictures/a.png"])
    (line,) = folder.metrics()
    assert (line["step"], line["reward/mean"], line["images"]) == (3, 1 / 3, ["pictures/a.png"])
    assert line["time"] > 0


# --- whose folder it is ----------------------------------------------------------------------


def test_a_run_of_another_configuration_is_refused_and_untouched(tmp_path):
    with open_run(config(tmp_path)) as folder:
        stage_done(folder, 0)
    before = listing(folder.path)
    other = config(tmp_path, advantage=Advantage(center="prompt"))
    with (
        pytest.raises(ConfigError, match=r"advantage\.center was 'group', is 'prompt'.*--name"),
        open_run(other),
    ):
        pass
    assert listing(folder.path) == before


@pytest.mark.parametrize(
    "over",
    [
        {"fleet": Fleet(samplers=Samplers(max=7, gpus=1.0), stall_timeout=5.0)},
        {"tracking": Tracking(uri="http://elsewhere", experiment="x")},
    ],
)
def test_the_fleet_and_tracking_may_differ(tmp_path, over):
    with open_run(config(tmp_path)) as folder:
        stage_done(folder, 0)
    before = listing(folder.path)
    with open_run(config(tmp_path, **over)) as again:
        assert again.last_commit().state == state(0)
    assert listing(folder.path) == before


def test_a_folder_that_is_no_run_is_refused_and_untouched(tmp_path):
    mine = tmp_path / "runs" / "run"
    mine.mkdir(parents=True)
    (mine / "thesis.tex").write_text("precious")
    before = listing(tmp_path)
    with pytest.raises(ConfigError, match="no run of b2ray"), open_run(config(tmp_path)):
        pass
    assert listing(tmp_path) == before


def test_a_run_in_use_is_refused_and_free_again_afterwards(tmp_path):
    with open_run(config(tmp_path)) as folder:
        before = listing(folder.path)
        with (
            pytest.raises(ConfigError, match="in use by another process"),
            open_run(config(tmp_path)),
        ):
            pass
        assert listing(folder.path) == before
    with open_run(config(tmp_path)):
        pass


def test_runs_that_is_a_file_is_a_sentence(tmp_path):
    (tmp_path / "runs").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"), open_run(config(tmp_path)):
        pass


@pytest.mark.parametrize("text", ["a: [1", "", "- a"])
def test_a_broken_saved_configuration_is_a_sentence(tmp_path, text):
    with open_run(config(tmp_path)) as folder:
        pass
    (folder.path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.yaml"), open_run(config(tmp_path)):
        pass


def test_the_saved_configuration_is_complete(tmp_path):
    given = config(tmp_path, seed=5)
    with open_run(given) as folder:
        saved = (folder.path / "config.yaml").read_text()
    assert "seed: 5" in saved
    assert "max_ratio_drift" in saved  # a default, which may change with the next version


def test_a_finished_run_has_its_summary(folder):
    write_atomically(folder.summary_file, json.dumps({"name": "run"}))
    assert folder.finished
    assert folder.summary() == {"name": "run"}
