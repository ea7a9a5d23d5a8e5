"""What later stages train on again: the choice, and the file of a checkpoint."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from b2ray.algorithm.replay import FILE, ReplayEntry, largest, load, save
from b2ray.config import Config
from b2ray.config.load import validated
from b2ray.diffusion.trajectory import Trajectory, from_wire, to_wire


def config(stages: int = 2, trajectories: int = 3, **sections: object) -> Config:
    needed = {"prompts": {"train": "p"}, "rewards": [{"name": "r", "kind": "clip"}]}
    replay = {"stages": stages, "trajectories": trajectories}
    return validated({**needed, "replay": replay, **sections})


def kept(stage: int, *advantages: float) -> list[ReplayEntry]:
    return [ReplayEntry(stage, f"p{j}", a, 2, (stage, j)) for j, a in enumerate(advantages)]


def places(found: list[ReplayEntry]) -> list[tuple[int, int]]:
    return [k.trajectory for k in found]


def test_the_largest_of_either_sign_are_left_in_their_order():
    trained = kept(0, 0.1, -3.0, 0.5, 2.0, -1.0)
    assert places(largest(trained, 1, config())) == [(0, 1), (0, 3), (0, 4)]


def test_those_of_earlier_stages_stay_as_long_as_they_may():
    trained = kept(0, 5.0) + kept(1, 0.5, 0.4) + kept(2, 0.1)
    assert places(largest(trained, 2, config())) == [(0, 0), (1, 0), (1, 1)]
    assert places(largest(trained, 3, config())) == [(1, 0), (1, 1), (2, 0)]
    assert places(largest(trained, 4, config())) == [(2, 0)]
    assert largest(trained, 5, config()) == []


def test_of_equal_ones_the_later_stage_comes_first_then_the_earlier_place():
    trained = kept(0, 1.0, -1.0) + kept(1, 1.0, -1.0, 1.0, 1.0)
    assert places(largest(trained, 2, config())) == [(1, 0), (1, 1), (1, 2)]
    assert places(largest(trained, 2, config(trajectories=5)))[0] == (0, 0)


def test_nothing_is_left_without_replay_and_after_the_last_stage():
    trained = kept(0, 1.0)
    assert largest(trained, 1, config(stages=0)) == []
    assert largest(trained, 1, config(curriculum={"stages": 1})) == []
    assert len(largest(trained, 1, config(curriculum={"stages": 2}))) == 1


def test_pairs_stay_together():
    pairs = config(trajectories=5, preset="d3po")
    trained = kept(0, 0.1, -9.0, 2.0, -2.0) + kept(1, 0.3, -0.3, 3.0, -0.1)
    assert places(largest(trained, 2, pairs)) == [(0, 0), (0, 1), (1, 2), (1, 3)]


@given(
    st.lists(st.lists(st.sampled_from([-2.0, -1.0, 0.5, 1.0, 2.0]), max_size=6), max_size=6),
    st.integers(1, 3),
    st.integers(1, 7),
)
def test_a_run_keeps_no_more_and_none_older_than_it_may(rounds, stages, most):
    settings, left = config(stages, most), []
    for stage, advantages in enumerate(rounds):
        trained = [*left, *kept(stage, *advantages)]
        left = largest(trained, stage + 1, settings)
        young = [k for k in trained if stage + 1 - k.stage <= stages]
        assert len(left) == min(most, len(young))
        weak = [abs(k.advantage) for k in young if k not in left]
        assert min((abs(k.advantage) for k in left), default=0) >= max(weak, default=0)
        assert all(a.stage <= b.stage for a, b in pairwise(left))


def arrays(dtype: torch.dtype, n: int, version: int) -> Trajectory:
    generator = torch.Generator().manual_seed(n)
    latents = torch.randn(n + 1, 4, 2, 2, generator=generator).to(dtype)
    log_probs = torch.randn(n, generator=generator).numpy()
    return Trajectory(to_wire(latents), log_probs, version)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_file_reads_back_exactly(tmp_path: Path, dtype: torch.dtype):
    saved = [
        ReplayEntry(3, "a cat, “sitting”", float(np.float32(1 / 3)), 2, arrays(dtype, 2, 2)),
        ReplayEntry(4, "a dog", -5.0, 7, arrays(dtype, 7, 4)),
    ]
    save(tmp_path, saved)
    found = load(tmp_path)
    for one, other in zip(found, saved, strict=True):
        assert {**vars(one), "trajectory": 0} == {**vars(other), "trajectory": 0}
        ours, theirs = one.trajectory, other.trajectory
        assert ours.version == theirs.version
        for a, b in ((ours.latents, theirs.latents), (ours.log_probs, theirs.log_probs)):
            assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
        assert from_wire(ours.latents).dtype == dtype


def test_the_same_trajectories_give_the_same_bytes(tmp_path: Path):
    files = []
    for name in "ab":
        (tmp_path / name).mkdir()
        many = [ReplayEntry(s, "p", s / 7, 2, arrays(torch.float32, 2, s)) for s in range(12)]
        save(tmp_path / name, many)
        files.append((tmp_path / name / FILE).read_bytes())
    assert files[0] == files[1]
    assert [k.stage for k in load(tmp_path / "a")] == [*range(12)]


def test_nothing_makes_no_file(tmp_path: Path):
    save(tmp_path, [])
    assert load(tmp_path) == [] and not (tmp_path / FILE).exists()
