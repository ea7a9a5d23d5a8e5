"""One policy, one set of sampled trajectories, and new updaters at the same first weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

from b2ray.diffusion.policy import Policy
from b2ray.diffusion.trajectory import Selected, Trajectory
from b2ray.objectives.update import Updater
from tests.models import PROMPTS, config, rollout, selection

STEPS, INTERVAL = 4, 3
PROMPTS_7 = [*PROMPTS, *PROMPTS, PROMPTS[0]]
ADVANTAGES_7 = [1.0, -0.5, 2.0, -1.5, 0.3, -0.7, 0.9]
# One kernel shape for sampling and learning is not wanted here: drift is tested by itself.
ANY_DRIFT = {"learner__max_ratio_drift": 1e9}
ONE_STEP = {"learner__inner_epochs": 1, "learner__batch": "all", "learner__max_grad_norm": 1e9}


@pytest.fixture(scope="module")
def policy(models) -> Policy:
    """One policy for all tests; `updater` puts its first weights back."""
    return Policy(config(models, sampling__steps=STEPS), torch.device("cpu"))


@pytest.fixture(scope="module")
def first_weights(policy) -> dict[str, np.ndarray]:
    # Not the initial adapter: its output is zero, and half of its gradient with it.
    rng = np.random.default_rng(0)
    return {
        n: (0.1 * rng.normal(size=v.shape)).astype(np.float32)
        for n, v in policy.lora_state().items()
    }


@pytest.fixture
def updater(models, policy, first_weights) -> Callable[..., Updater]:
    """A new updater at the first weights; keywords are configuration."""

    def make(**over: object) -> Updater:
        policy.bind(first_weights)
        settings = {"sampling__steps": STEPS, "learner__batch": 3, **ANY_DRIFT, **over}
        return Updater(policy, config(models, **settings))

    return make


@pytest.fixture(scope="module")
def sampled(policy, first_weights) -> list[Trajectory]:
    policy.bind(first_weights)
    return rollout(policy, PROMPTS_7, INTERVAL)


@pytest.fixture(scope="module")
def selected(sampled) -> list[Selected]:
    return selection(sampled, PROMPTS_7, ADVANTAGES_7)


def gradients(updater: Updater) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in updater.parameters.values()])


def seen_steps(updater: Updater, selected: Sequence[Selected]) -> set[int]:
    """The steps that the UNet is asked for in an update."""
    steps: list[int] = []
    predict = updater.policy.predict
    updater.policy.predict = lambda i, *rest: steps.extend(i.tolist()) or predict(i, *rest)
    try:
        updater.update(0, selected)
    finally:
        del updater.policy.predict
    return set(steps)
