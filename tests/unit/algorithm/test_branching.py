"""Groups, work units, advantages and selection (method.md §3; its defects by number)."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from b2ray.algorithm.branching import (
    Group,
    RewardWindow,
    WorkUnit,
    advantages,
    draw_groups,
    select,
    spread,
)
from b2ray.config import Advantage, Selection
from b2ray.diffusion.noise import Domain
from b2ray.tracking.folder import RunState

RELEASED = Selection(best_above=0.5, worst_below=-0.5)


def window_of(prompts, rewards, stages=8) -> RewardWindow:
    return RewardWindow(stages).with_stage(prompts, np.asarray(rewards, float))


def scored(rewards, prompts=None, **config) -> np.ndarray:
    rewards = np.asarray(rewards, float)
    prompts = prompts or ["p"] * len(rewards)
    return advantages(rewards, prompts, window_of(prompts, rewards), Advantage(**config))


def chosen(rewards, advantage=None, **config) -> list[list[int]]:
    rewards = np.asarray(rewards, float)
    advantage = rewards if advantage is None else np.asarray(advantage, float)
    return select(rewards, advantage, Selection(**config)).astype(int).tolist()


# --- advantages ------------------------------------------------------------------------------


@given(
    luck=st.lists(st.floats(-5, 5), min_size=4, max_size=4),
    seed=st.integers(0, 99),
)
def test_prefix_luck_cancels_up_to_the_windows_scale(luck, seed):
    rewards = np.random.default_rng(seed).normal(size=(4, 5))
    lucky = rewards + np.array(luck)[:, None]
    prompts = ["a", "b", "a", "b"]
    window = window_of(prompts, rewards)
    config = Advantage(center="group")
    np.testing.assert_allclose(
        advantages(lucky, prompts, window, config),
        advantages(rewards, prompts, window, config),
        atol=1e-4,
    )


def test_a_group_centred_advantage_is_the_distance_to_the_group_in_the_prompts_spread():
    rewards = [[1.0, 2.0, 3.0], [11.0, 12.0, 13.0]]
    std = np.std([1, 2, 3, 11, 12, 13], ddof=1)
    expected = np.array([[-1, 0, 1], [-1, 0, 1]]) / std
    np.testing.assert_allclose(scored(rewards), expected, rtol=1e-6)


def test_scaled_by_its_own_group_every_group_counts_the_same():
    rewards = [[1.0, 2.0, 3.0], [110.0, 120.0, 130.0], [5.0, 5.0, 5.0]]
    found = scored(rewards, scale="group")
    std = (2 / 3) ** 0.5
    np.testing.assert_allclose(found, [[-1 / std, 0, 1 / std]] * 2 + [[0, 0, 0]], rtol=1e-6)


def test_a_prompt_centred_advantage_is_the_z_score_over_all_groups_of_the_prompt():
    rewards = np.array([[1.0, 2.0], [5.0, 6.0], [7.0, 1.0]])
    found = scored(rewards, ["a", "b", "a"], center="prompt")
    of_a = np.array([1, 2, 7, 1])
    expected = (rewards[[0, 2]] - of_a.mean()) / of_a.std(ddof=1)
    np.testing.assert_allclose(found[[0, 2]], expected, rtol=1e-6)
    np.testing.assert_allclose(found[1], [-(0.5**0.5), 0.5**0.5], rtol=1e-6)


def test_released_z_scores_look_at_this_stage_and_eight_earlier_ones():
    window = RewardWindow(8)
    for stage in range(12):
        window = window.with_stage(["p"], np.array([[float(stage), stage + 0.5]]))
    seen = np.array([[s, s + 0.5] for s in range(3, 12)]).ravel()
    now = np.array([[11.0, 11.5]])
    found = advantages(now, ["p"], window, Advantage(center="prompt"))
    np.testing.assert_allclose(found, (now - seen.mean()) / seen.std(ddof=1), rtol=1e-6)


def test_a_stage_without_a_prompt_does_not_push_its_rewards_out():
    window = window_of(["a"], [[1.0, 2.0]], stages=1)
    for _ in range(5):
        window = window.with_stage(["b"], np.array([[0.0, 1.0]]))
    assert window.rewards["a"] == [[1.0, 2.0]]


@pytest.mark.parametrize("center", ["group", "prompt"])
def test_advantages_are_clamped(center):
    rewards = np.zeros((1, 200))
    rewards[0, :2] = 100, -100
    found = scored(rewards, center=center)
    assert (found[0, 0], found[0, 1]) == (5, -5)
    assert np.abs(scored(rewards, center=center, clamp=2.0)).max() == 2


def test_one_sample_of_the_only_prompt_gives_zero_not_nan():  # defect 3
    assert scored([[3.0]], center="prompt").tolist() == [[0.0]]


def test_a_prompt_with_too_few_samples_is_measured_by_all_prompts():  # defect 3
    rewards = [[1.0], [2.0], [3.0]]
    found = scored(rewards, ["a", "b", "c"], center="prompt", min_count=2)
    np.testing.assert_allclose(found, [[-1], [0], [1]])


def test_a_prompt_whose_rewards_are_all_alike_gives_zero():
    assert scored([[0.1] * 3] * 2).tolist() == [[0] * 3] * 2
    assert scored([[0.1] * 3] * 2, center="prompt").tolist() == [[0] * 3] * 2


# --- the window ------------------------------------------------------------------------------


def test_a_stage_done_again_counts_once():  # defect 10
    before = window_of(["a", "b"], [[1.0, 2.0], [3.0, 4.0]])
    copy = json.dumps(before.rewards)
    first = before.with_stage(["a", "a"], np.array([[5.0, 6.0], [7.0, 8.0]]))
    assert json.dumps(before.rewards) == copy
    again = before.with_stage(["a", "a"], np.array([[5.0, 6.0], [7.0, 8.0]]))
    assert first == again
    assert again.rewards["a"] == [[1.0, 2.0], [5.0, 6.0, 7.0, 8.0]]


@pytest.mark.parametrize("stages", [0, 1, 8])
def test_a_window_holds_this_stage_and_that_many_earlier_ones(stages):
    window = RewardWindow(stages)
    for stage in range(stages + 3):
        window = window.with_stage(["p"], np.array([[float(stage)]]))
    assert window.rewards["p"] == [[float(s)] for s in range(2, stages + 3)]


def test_a_window_survives_the_commit_exactly():
    rewards = np.random.default_rng(0).normal(size=(3, 5)) / 3
    window = window_of(["a", "b", "a"], rewards).with_stage(["b"], rewards[:1])
    state = RunState(stage=2, version=2, digest="d", window=window, counters={"seconds": 0.1})
    again = RunState.from_json(state.to_json())
    assert again == state
    assert again.window.statistics(2) == window.statistics(2)


# --- selection -------------------------------------------------------------------------------


def test_the_best_and_the_worst_of_each_group_are_kept():
    assert chosen([[1, 3, 2], [5, 5, 4]]) == [[1, 1, 0], [1, 0, 1]]


def test_groups_that_tie_are_skipped():  # defect 2
    assert chosen([[2, 2, 2], [1, 2, 3]]) == [[0, 0, 0], [1, 0, 1]]
    assert chosen([[2, 2, 2]], kind="all") == [[0, 0, 0]]
    assert chosen([[2, 2 + 1e-9]]) == [[0, 0]]
    assert chosen([[2, 2.4], [2, 2.6]], min_gap=0.5) == [[0, 0], [1, 1]]


def test_released_thresholds_include_plus_half_and_exclude_minus_half():
    released = {"best_above": 0.5, "worst_below": -0.5}
    rewards = [[0.0, 1.0]] * 5
    z = [[-0.5, 0.5], [-0.51, 0.5], [-0.51, 0.49], [-0.4, 0.4], [0.6, 0.7]]
    assert chosen(rewards, z, **released) == [[0, 1], [1, 1], [1, 0], [0, 0], [0, 1]]


def test_a_pair_is_kept_whole_or_not_at_all():
    z = [[-1, 1], [-1, 0.4], [0.1, 1]]
    kept = chosen([[0, 1]] * 3, z, best_above=0.5, worst_below=-0.5, require_pair=True)
    assert kept == [[1, 1], [0, 0], [0, 0]]


def test_all_keeps_every_leaf():
    assert chosen([[1, 3, 2], [0, 0, 1]], kind="all") == [[1, 1, 1], [1, 1, 1]]


def test_without_branches_all_keeps_all_and_released_thresholds_still_filter():
    rewards = [[3.0], [1.0], [2.0]]
    z = scored(rewards, center="prompt")
    assert select(np.array(rewards), z, Selection(kind="all")).all()
    assert select(np.array(rewards), z, RELEASED).tolist() == [[True], [True], [False]]


@given(groups=st.integers(1, 9), branches=st.integers(1, 9), seed=st.integers(0, 99))
def test_any_number_of_leaves_works(groups, branches, seed):  # defect 1
    rewards = np.random.default_rng(seed).integers(0, 3, (groups, branches)).astype(float)
    prompts = [f"p{g % 2}" for g in range(groups)]
    z = advantages(rewards, prompts, window_of(prompts, rewards), Advantage(center="prompt"))
    assert z.shape == rewards.shape
    assert z.dtype == np.float32
    assert np.isfinite(z).all()
    for config in (Selection(), RELEASED, Selection(kind="all")):
        kept = select(rewards, z, config)
        assert kept.shape == rewards.shape
        window = RewardWindow(0).with_stage(["p"] * len(rewards), rewards)
        assert np.isfinite(list(spread(rewards, kept, window).values())).all()
        if config.kind == "best_worst":
            assert (kept.sum(axis=1) <= 2).all()


def test_an_empty_selection_is_no_error():  # defect 1
    rewards = np.ones((3, 2))
    kept = select(rewards, np.zeros((3, 2)), Selection())
    assert not kept.any()
    assert np.argwhere(kept).tolist() == []
    assert spread(rewards, kept, RewardWindow(0))["branch/pair_rate"] == 0


def test_the_spread_within_and_between_groups():
    rewards = np.array([[0.0, 2.0], [10.0, 12.0]])
    window = RewardWindow(0).with_stage(["p", "p"], rewards)
    found = spread(rewards, np.array([[True, True], [True, False]]), window)
    assert found == {
        # Branches vary by 2; means of 1 and 11 vary by 50, of which 1 is by the branches.
        "branch/within_share": pytest.approx(2 / (2 + 49)),
        "branch/within_std": 1.0,
        "branch/between_std": 5.0,
        "branch/pair_rate": 0.5,
        "branch/selected": 0.75,
    }


def test_what_prompts_differ_by_is_no_part_of_the_branches_share():
    rewards = np.array([[0.0, 2.0], [4.0, 6.0], [100.0, 102.0], [104.0, 106.0]])
    window = RewardWindow(0).with_stage(["a", "a", "b", "b"], rewards)
    chosen = np.ones_like(rewards, bool)
    # Within every group 2; means of 1 and 5 vary by 8, of which 1 is by the branches.
    assert spread(rewards, chosen, window)["branch/within_share"] == pytest.approx(2 / 9)


def test_a_prompt_with_one_group_a_stage_has_a_share_from_the_second_stage_on():
    rewards = np.array([[0.0, 2.0]])
    chosen = np.ones_like(rewards, bool)
    window = RewardWindow(8).with_stage(["a"], rewards)
    assert "branch/within_share" not in spread(rewards, chosen, window)
    window = window.with_stage(["a"], rewards + 4)
    assert spread(rewards + 4, chosen, window)["branch/within_share"] == pytest.approx(2 / 9)


def test_the_variance_of_a_prompt_does_not_depend_on_the_fork():
    draw = np.random.default_rng(0)
    for between, within in ((0.0, 1.0), (0.6, 0.8), (0.96, 0.28)):
        means = between * draw.standard_normal((4000, 1))
        rewards = means + within * draw.standard_normal((4000, 4))
        window = RewardWindow(0).with_stage([str(g % 1000) for g in range(4000)], rewards)
        assert window.variance(4) == pytest.approx(1, abs=0.06)


# --- groups and units ------------------------------------------------------------------------


@given(prompts=st.integers(1, 12), count=st.integers(1, 40), stage=st.integers(0, 5))
def test_every_prompt_is_drawn_before_one_is_drawn_again(prompts, count, stage):
    names = [f"p{i}" for i in range(prompts)]
    groups = draw_groups(3, stage, names, count)
    assert [g.index for g in groups] == list(range(count))
    times = Counter(g.prompt for g in groups)
    assert max(times.values()) - min(times.get(n, 0) for n in names) <= 1


def test_groups_depend_on_seed_and_stage_alone():
    names = [f"p{i}" for i in range(50)]
    assert draw_groups(1, 2, names, 20) == draw_groups(1, 2, names, 20)
    assert draw_groups(1, 2, names, 20) == draw_groups(1, 2, names, 30)[:20]
    assert draw_groups(1, 2, names, 20) != draw_groups(1, 3, names, 20)
    assert draw_groups(1, 2, names, 20) != draw_groups(2, 2, names, 20)


def test_equal_weights_change_nothing():
    names = [f"p{i}" for i in range(7)]
    for weights in ((1.0,) * 7, (0.3,) * 7):
        assert draw_groups(4, 1, names, 40, weights) == draw_groups(4, 1, names, 40)
    # Pinned: a run that is resumed with a later version goes on with the same groups.
    drawn = [g.prompt for g in draw_groups(0, 3, names, 9)]
    assert drawn == ["p2", "p0", "p4", "p5", "p3", "p1", "p6", "p0", "p3"]


WEIGHTS = st.lists(st.floats(1e-3, 1e3) | st.sampled_from([1e-300, 1e300]), min_size=2, max_size=12)


@given(weights=WEIGHTS, count=st.integers(1, 60), stage=st.integers(0, 5))
def test_a_prompt_is_drawn_as_often_as_its_weight_says(weights, count, stage):
    names = [f"p{i}" for i in range(len(weights))]
    groups = draw_groups(3, stage, names, count, weights)
    assert [g.index for g in groups] == list(range(count))
    times = Counter(g.prompt for g in groups)
    total = sum(w / max(weights) for w in weights)
    for name, weight in zip(names, weights, strict=True):
        assert abs(times[name] - count * weight / max(weights) / total) < 1 + 1e-6


def test_a_share_below_one_is_met_over_the_stages():
    weights = {"rare": 0.1, "a": 1.0, "b": 2.0, "c": 2.0}
    draws = [draw_groups(0, s, list(weights), 10, list(weights.values())) for s in range(2000)]
    times = Counter(g.prompt for groups in draws for g in groups)
    for name, weight in weights.items():
        assert times[name] / 2000 == pytest.approx(10 * weight / 5.1, abs=0.04)
    # The place within a stage says nothing about the prompt.
    first = Counter(groups[0].prompt for groups in draws)
    assert first["a"] / 2000 == pytest.approx(1 / 5.1, abs=0.03)


def test_a_weighted_draw_depends_on_seed_and_stage_alone():
    names, weights = [f"p{i}" for i in range(50)], [1.0 + i for i in range(50)]
    draw = draw_groups(1, 2, names, 20, weights)
    assert draw == draw_groups(1, 2, names, 20, weights)
    assert draw != draw_groups(1, 3, names, 20, weights)
    assert draw != draw_groups(2, 2, names, 20, weights)


@given(groups=st.integers(1, 9), branches=st.integers(1, 9), batch=st.integers(1, 30))
def test_ranges_cover_every_leaf_once_in_order(groups, branches, batch):
    unit = WorkUnit(
        seed=0,
        domain=Domain.TRAIN,
        stage=0,
        version=0,
        index=0,
        groups=tuple(Group(g, "p") for g in range(groups)),
        branches=branches,
        fork=0,
    )
    ranges = list(unit.ranges(batch))
    assert all(0 < high - low <= batch for low, high in ranges)
    leaves = [leaf for low, high in ranges for leaf in unit.leaves(low, high)]
    assert leaves == [(g, k) for g in range(groups) for k in range(branches)]
