"""What a run will cost, against figures computed by hand or reported by runs."""

from __future__ import annotations

import pytest

from b2ray.algorithm.cost import Cost, plan_cost
from b2ray.config import Config
from b2ray.config.load import validated


def config(**sections: object) -> Config:
    return validated(
        {"prompts": {"train": "p"}, "rewards": [{"name": "r", "kind": "clip"}], **sections}
    )


RELEASED = {"preset": "b2_released", "model": {"dtype": "float16"}}


def test_the_released_run():
    cost = plan_cost(config(**RELEASED))
    # 15 stages with n = 14, then 14, 14, 15, 14, 14, 14 with n = 15 … 20.
    n = 15 * 14 + 14 * 15 + 14 * 16 + 15 * 17 + 14 * (18 + 19 + 20)
    assert cost.reward_queries == 128_000
    assert cost.unet_evals_sampling == 256 * (100 * 20 - n) + 1280 * n
    assert cost.unet_evals_learning == 2 * 512 * n
    assert cost.unet_evals == cost.unet_evals_sampling + cost.unet_evals_learning
    # The shared prefix saves 12 % of the sampling.
    assert 1 - cost.unet_evals_sampling / (128_000 * 20) == pytest.approx(0.12, abs=0.005)


def test_a_run_that_was_made():
    """The demo once had 5,760 reward queries and 68,688 evaluations for each of its seeds."""
    cost = plan_cost(
        config(
            sampling={"steps": 10, "guidance": 2.0},
            curriculum={"stages": 45, "start": 0.9},
            branching={"images": 128, "branches": 8},
            learner={"passes": 1},
        )
    )
    assert (cost.reward_queries, cost.unet_evals) == (5_760, 68_688)


def test_ddpo_trains_all_steps_of_all_leaves():
    cost = plan_cost(config(preset="ddpo"))
    assert cost.unet_evals_sampling == 100 * 1280 * 20
    assert cost.unet_evals_learning == 2 * 100 * 1280 * 20


def test_one_branch_has_one_leaf_to_train_on():
    one = {"advantage": {"center": "prompt"}, "branching": {"images": 10, "branches": 1}}
    cost = plan_cost(config(**one, curriculum={"stages": 1, "start": 4, "end": 4}))
    assert cost.unet_evals_learning == 2 * 10 * 4


def test_what_is_replayed_is_learnt_again_at_the_longest_intervals():
    """Of 8 leaves a stage; intervals 1, 2, 3, 4: earlier ones' 0, 8, 12 and 12 at the most."""
    same = {
        "preset": "bpt_only",
        "sampling": {"steps": 4, "guidance": 1.0},
        "curriculum": {"stages": 4, "start": 1, "end": 4},
        "branching": {"images": 8, "branches": 1},
        "learner": {"passes": 2},
    }
    plain, more = (
        plan_cost(config(**same, replay=r)) for r in ({}, {"stages": 2, "trajectories": 12})
    )
    again = 8 * 1 + (8 * 2 + 4 * 1) + (8 * 3 + 4 * 2)
    assert more.unet_evals_learning == plain.unet_evals_learning + 2 * again
    assert more.unet_evals_sampling == plain.unet_evals_sampling
    assert more.reward_queries == plain.reward_queries
    assert more.unet_forwards == plain.unet_forwards + 3 * 2 * again
    assert more.bytes_per_stage == plain.bytes_per_stage + 12 * (5 * 4 * 4 * 64 * 64 + 4 * 4)


def test_images_that_fill_no_group_are_not_sampled():
    cost = plan_cost(config(branching={"images": 14, "branches": 4}, curriculum={"stages": 2}))
    assert cost.reward_queries == 2 * 12


def test_steps_too_narrow_to_train_cost_sampling_alone():
    fixed = config(curriculum={"stages": 1, "start": 1, "end": 1})
    assert plan_cost(fixed, untrained=1).unet_evals_learning == 0
    assert plan_cost(fixed, untrained=2).unet_evals_learning == 0
    assert plan_cost(fixed, untrained=1).unet_evals_sampling == plan_cost(fixed).unet_evals_sampling


def test_steps_without_weight_are_not_learnt_unless_held():
    weights = {"step_weights": [1.0, 1.0, 0.0, 0.0]}
    assert forwards(objective=weights).unet_evals_learning == 4
    assert forwards(objective=weights | {"kl_weight": 0.1}).unet_evals_learning == 2 * 12
    assert forwards(objective=weights).unet_evals_sampling == forwards().unet_evals_sampling


def forwards(**sections: object) -> Cost:
    """Of 2 groups of 2, one pass, 3 of 4 steps: 2 + 12 sampled, 12 learnt, 8 + 8 evaluated."""
    return plan_cost(
        config(
            **{
                "sampling": {"steps": 4, "guidance": 1.0},
                "curriculum": {"stages": 1, "start": 3, "end": 3},
                "branching": {"images": 4, "branches": 2},
                "learner": {"passes": 1},
                "evaluation": {"images": 1, "final_images": 2},
                **sections,
            }
        )
    )


def test_a_backward_pass_counts_as_two():
    assert forwards().unet_forwards == 14 + 3 * 12 + 16
    assert forwards(model={"gradient_checkpointing": True}).unet_forwards == 14 + 4 * 12 + 16
    again = forwards(learner={"passes": 1, "recompute_log_probs": True})
    assert (again.unet_forwards, again.unet_evals_learning) == (14 + 4 * 12 + 16, 24)
    guided = forwards(sampling={"steps": 4, "guidance": 1.1})
    assert guided.unet_forwards == 2 * forwards().unet_forwards
    assert guided.unet_evals == forwards().unet_evals


def test_hours_are_work_by_speed():
    assert forwards().hours(forward_tflop=3600.0, sustained_tflops=2.0) == 66 / 2


def test_demonstrations_are_followed_and_learnt_from_but_not_scored():
    shown = config(
        rewards=[],
        preset="sqil",
        demonstrations={"path": "folder"},
        sampling={"steps": 4},
        curriculum={"stages": 2, "start": 3, "end": 3},
        branching={"images": 10},
        learner={"passes": 3},
    )
    cost = plan_cost(shown, latent=(4, 8, 8))
    assert cost.reward_queries == 0
    assert cost.unet_evals_sampling == 2 * (5 * 4 + 5 * 3)
    assert cost.unet_evals_learning == 2 * 3 * 10 * 3
    latent = 4 * 4 * 8 * 8
    assert cost.bytes_per_stage == 5 * 2 * latent + 10 * (4 * latent + 4 * 3)


@pytest.mark.parametrize(
    ("every", "stages", "pictures"), [(0, 9, 0), (3, 9, 2), (3, 10, 3), (1, 2, 1), (10, 9, 0)]
)
def test_evaluations_in_between(every, stages, pictures):
    cost = plan_cost(
        config(
            sampling={"steps": 2},
            curriculum={"stages": stages},
            evaluation={"every": every, "images": 7, "final_images": 5},
            prompts={"train": "p", "heldout": "q"},
        )
    )
    # The long evaluations have at least as many pictures as the short ones.
    assert cost.unet_evals_evaluation == 2 * (2 * 2 * 7 + pictures * 7)


def test_bytes_of_a_stage():
    prefix = leaf = 2 * 4 * 64 * 64
    trajectory, picture = 21 * leaf + 4 * 20, 3 * 512 * 512
    assert plan_cost(config(**RELEASED)).bytes_per_stage == (
        256 * prefix + 1280 * (trajectory + picture)
    )
    small = config(**RELEASED, sampling={"height": 64, "width": 32})
    assert plan_cost(small).bytes_per_stage == 256 * (2 * 4 * 32) + 1280 * (
        21 * 2 * 4 * 32 + 80 + 3 * 64 * 32
    )
    assert plan_cost(small, latent=(4, 8, 4), picture=(64, 32)) == plan_cost(small)
    assert plan_cost(small, latent=(8, 8, 4)).bytes_per_stage > plan_cost(small).bytes_per_stage
