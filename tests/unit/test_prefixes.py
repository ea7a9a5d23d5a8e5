"""Prefixes that serve in several stages: their names, how long they serve, their file."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from b2ray.branching import draw_groups
from b2ray.config import Config
from b2ray.diffusion.trajectory import Prefix
from b2ray.options import validated
from b2ray.prefixes import Pool, kept_from, needed, packed, unpacked
from b2ray.prompts import PromptSet

PROMPTS = PromptSet(("a", "b", "c", "d", "e"))


def config(policy: str = "base", stages: int | None = None, **sections: object) -> Config:
    values = {
        "prompts": {"train": "p"},
        "rewards": [{"name": "r", "kind": "clip"}],
        "curriculum": {"stages": 10, "start": 6},
        "branching": {"images": 21, "branches": 3},
        "prefix": {"policy": policy, **({"stages": stages} if stages else {})},
    }
    return validated({**values, **sections})


def test_the_current_policys_prefixes_have_no_names():
    settings = config("current")
    pool = Pool(settings, PROMPTS)
    for stage in (0, 7):
        drawn = draw_groups(settings.seed, stage, PROMPTS.texts, 7, PROMPTS.weights)
        assert pool.groups(stage) == pool.new(stage) == drawn
        assert all(group.prefix is None for group in drawn)


def test_with_reuse_the_following_stages_have_the_groups_of_the_one_that_sampled():
    pool = Pool(config("reuse", 3), PROMPTS)
    plain = Pool(config("current"), PROMPTS)
    for stage in range(10):
        origin = stage - stage % 4
        groups = pool.groups(stage)
        assert [(g.index, g.prompt) for g in groups] == [
            (g.index, g.prompt) for g in plain.groups(origin)
        ]
        assert [g.prefix for g in groups] == [(origin, j) for j in range(7)]
        assert pool.new(stage) == (groups if stage == origin else [])


def test_with_the_base_model_a_stage_draws_its_own_prompts():
    pool, plain = Pool(config("base"), PROMPTS), Pool(config("current"), PROMPTS)
    for stage in range(10):
        assert [g.prompt for g in pool.groups(stage)] == [g.prompt for g in plain.groups(stage)]


@given(
    st.lists(st.sampled_from([0.5, 1.0, 3.0]), min_size=1, max_size=9),
    st.integers(1, 12),
    st.integers(0, 2**30),
)
def test_the_base_models_prefixes_are_made_once_and_serve_from_then_on(weights, groups, seed):
    prompts = PromptSet(tuple(f"p{j}" for j in range(len(weights))), tuple(weights))
    settings = config(branching={"images": groups, "branches": 1}, preset="bpt_only", seed=seed)
    pool, made = Pool(settings, prompts), {}
    for stage in range(10):
        found = pool.groups(stage)
        # No two groups of a stage have the same prefix: they would differ by nothing.
        assert len({g.prefix for g in found}) == groups
        for group in pool.new(stage):
            assert group.prefix == (stage, group.index) and group.prefix not in made
            made[group.prefix] = group.prompt
        assert all(made[g.prefix] == g.prompt for g in found)
    # As many of each prompt as the stage with the most of its groups has.
    most = Counter()
    for stage in range(10):
        most |= Counter(g.prompt for g in pool.groups(stage))
    assert Counter(made.values()) == most


def test_a_resumed_run_names_them_alike():
    pool, resumed = Pool(config(), PROMPTS), Pool(config(), PROMPTS)
    walked = [pool.groups(stage) for stage in range(10)]
    assert resumed.groups(9) == walked[9] and resumed.groups(3) == walked[3]
    assert [g.prefix[0] for g in walked[0]] == [0] * 7
    assert {g.prefix[0] for g in walked[9]} > {0}


def test_they_are_kept_as_far_back_as_the_interval_grows_while_they_serve():
    """T = 20; the interval goes from 6 to 20 in ten stages: 6, 7, 9, 10, 12, 13, 15, 16, 18, 19."""
    assert [kept_from(config("reuse", 3), made) for made in (0, 4, 8)] == [10, 4, 1]
    assert kept_from(config("base"), 0) == kept_from(config("base"), 5) == 1
    by_spread = {"extend": "spread", "patience": 2, "stages": 10, "start": 6}
    adapted = config("reuse", 3, curriculum=by_spread)
    # It grows by a step every other stage at the most.
    assert [kept_from(adapted, made) for made in (0, 4, 8)] == [13, 11, 10]


def test_they_are_needed_while_they_serve_and_not_after_the_last_stage():
    reuse, base = config("reuse", 2), config("base")
    assert [needed(reuse, 3, stage) for stage in range(3, 8)] == [True] * 3 + [False] * 2
    assert all(needed(base, 0, stage) for stage in range(10))
    assert not needed(base, 0, 10) and not needed(reuse, 9, 10)
    assert not needed(config("current"), 0, 1)


def prefix(fill: int, first: int = 2, dtype: type = np.float32) -> Prefix:
    return Prefix(
        np.full((3, 4, 2, 2), fill, dtype) * np.arange(1, 4, dtype=dtype)[:, None, None, None],
        first,
    )


def test_a_prefix_is_forked_where_it_has_latents():
    found = prefix(1)
    assert [float(found.at(step).flat[0]) for step in (2, 3, 4)] == [1, 2, 3]
    for step in (1, 5):
        with pytest.raises(ValueError, match=rf"a fork at step {step}, but the prefix has 2\.\.4"):
            found.at(step)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.uint16])
def test_a_file_reads_back_exactly(tmp_path: Path, dtype):
    saved = {
        (stage, g): prefix(stage * 8 + g, stage, dtype) for stage in (1, 3) for g in (0, 5, 11)
    }
    files = []
    for stage in (1, 3):
        files.append(tmp_path / f"{stage}.safetensors")
        of_stage = {o: p for o, p in saved.items() if o[0] == stage}
        files[-1].write_bytes(packed(of_stage))
        assert packed(dict(reversed(of_stage.items()))) == packed(of_stage)
    found = unpacked(files)
    assert found.keys() == saved.keys()
    for origin, one in saved.items():
        a, b = found[origin].latents, one.latents
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
        assert found[origin].first == one.first
