"""What a sampler makes of prefixes that serve in several stages, with a real policy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from b2ray.actors.sampler import Sampler
from b2ray.branching import Group, WorkUnit
from b2ray.diffusion.noise import Domain
from b2ray.diffusion.trajectory import Prefix
from tests.models import PROMPTS, config, random_lora


@pytest.fixture(scope="module")
def sampler(models) -> Callable[[str], Sampler]:
    """A sampler of a prefix policy, whose LoRA is far from the base model."""
    known: dict[str, Sampler] = {}

    def make(policy: str) -> Sampler:
        if policy not in known:
            stages = {"prefix__stages": 2} if policy == "reuse" else {}
            over = {"sampling__steps": 6, "prefix__policy": policy, **stages}
            known[policy] = Sampler()
            known[policy].load(config(models, **over), PROMPTS)
            shapes = known[policy].policy.lora_state()
            known[policy].bind(3, random_lora(shapes))
        return known[policy]

    return make


def unit(fork: int, stage: int = 1, version: int = 3, groups: int = 3) -> WorkUnit:
    named = tuple(Group(j, PROMPTS[j % 3], "", (1, j)) for j in range(groups))
    return WorkUnit(7, Domain.TRAIN, stage, version, 0, named, 2, fork)


def test_a_reused_prefix_is_the_current_policys_at_every_step_it_is_kept_for(sampler):
    receipt, *kept = sampler("reuse").denoise_prefixes(unit(4), 1)
    assert receipt.unet_evals == 3 * 4
    assert [p.first for p in kept] == [1, 1, 1]
    assert {p.latents.shape for p in kept} == {(4, 4, 8, 8)}
    for fork in (1, 2, 3, 4):
        _, expected = sampler("current").denoise_prefix(unit(fork))
        gathering, found = sampler("reuse").gather_prefixes(unit(fork, stage=5), *kept)
        assert gathering.unet_evals == 0
        assert (found.dtype, found.tobytes()) == (expected.dtype, expected.tobytes())


def test_the_first_step_can_be_forked(sampler):
    """The interval grew to all steps: what is kept there is the noise alone."""
    receipt, *kept = sampler("reuse").denoise_prefixes(unit(0), 0)
    assert receipt.unet_evals == 0
    _, expected = sampler("current").denoise_prefix(unit(0))
    assert np.stack([p.at(0) for p in kept]).tobytes() == expected.tobytes()


def test_with_base_the_adapter_is_off_for_the_prefix_alone(sampler):
    receipt, *kept = sampler("base").denoise_prefixes(unit(4), 2)
    assert receipt.unet_evals == 3 * 4
    fresh = Sampler()
    fresh.load(sampler("current").policy.config, PROMPTS)
    none = {k: np.zeros_like(v) for k, v in fresh.policy.lora_state().items()}
    fresh.bind(3, none)
    for fork in (2, 3, 4):
        _, expected = fresh.denoise_prefix(unit(fork))
        _, trained = sampler("current").denoise_prefix(unit(fork))
        _, found = sampler("base").gather_prefixes(unit(fork, stage=5), *kept)
        assert found.tobytes() == expected.tobytes() != trained.tobytes()
    # The branches are the current policy's.
    _, found = sampler("base").gather_prefixes(unit(3), *kept)
    ours = sampler("base").denoise_branches(unit(3), found, 0, 6, True)
    theirs = sampler("current").denoise_branches(unit(3), found, 0, 6, True)
    for a, b in zip(ours[2:], theirs[2:], strict=True):
        assert a.latents.tobytes() == b.latents.tobytes()
        assert a.log_probs.tobytes() == b.log_probs.tobytes()


def test_a_prefix_of_the_base_model_is_the_same_whatever_is_bound(sampler, models):
    """So that it can be made again, at a fork that has moved to earlier steps."""
    first = sampler("base").denoise_prefixes(unit(4), 2)[1:]
    other = Sampler()
    other.load(sampler("base").policy.config, PROMPTS)
    other.bind(9, random_lora(other.policy.lora_state(), seed=5))
    again = other.denoise_prefixes(unit(3, version=9), 2)[1:]
    for a, b in zip(first, again, strict=True):
        assert a.latents[:2].tobytes() == b.latents.tobytes()


def test_the_branches_of_another_stage_have_noise_of_their_own(sampler):
    _, *kept = sampler("reuse").denoise_prefixes(unit(4), 4)
    ends = []
    for stage in (1, 2):
        _, prefix = sampler("reuse").gather_prefixes(unit(4, stage=stage), *kept)
        ends.append(sampler("reuse").denoise_branches(unit(4, stage=stage), prefix, 0, 2, True)[2:])
    for a, b in zip(*ends, strict=True):
        assert a.latents[0].tobytes() == b.latents[0].tobytes()
        assert (a.latents[1:] != b.latents[1:]).all(axis=(1, 2, 3)).all()


def test_kept_latents_do_not_share_their_batchs_memory(sampler):
    _, *kept = sampler("reuse").denoise_prefixes(unit(4), 2)
    assert all(isinstance(p, Prefix) and p.latents.base is None for p in kept)
