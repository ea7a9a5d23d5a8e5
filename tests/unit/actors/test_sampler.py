"""The sampler's thumbnails of the first groups, without Ray."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from b2ray.actors.sampler import Sampler
from b2ray.algorithm.branching import Group, WorkUnit
from b2ray.diffusion.noise import Domain
from b2ray.diffusion.pictures import FORK
from b2ray.diffusion.trajectory import from_wire
from tests.models import PROMPTS, config

BRANCHES = 3
GROUPS = tuple(Group(i, p) for i, p in enumerate(PROMPTS))
UNIT = WorkUnit(0, Domain.TRAIN, 0, 0, branches=3, fork=2, groups=GROUPS)


@pytest.fixture(scope="module")
def sampler(models: Path) -> Sampler:
    made = Sampler()
    made.load(config(models, sampling__steps=4), PROMPTS)
    made.bind(0, made.policy.lora_state())
    return made


@pytest.fixture(scope="module")
def prefix(sampler: Sampler) -> np.ndarray:
    return sampler.denoise_prefix(UNIT)[1]


def pixels(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)))


def test_leaves_are_the_pictures_and_the_fork_is_what_the_model_foresees(
    sampler, prefix, monkeypatch
):
    decoded, true = [], sampler.policy.decode
    monkeypatch.setattr(sampler.policy, "decode", lambda x: decoded.append(x) or true(x))
    answer, pictures, *_ = sampler.denoise_branches(UNIT, prefix, 0, 9, True, True, 2)
    small = answer.thumbnails
    assert set(small) == {(g, k) for g in (0, 1) for k in (FORK, 0, 1, 2)}
    for g in (0, 1):
        for k in range(BRANCHES):
            np.testing.assert_array_equal(pixels(small[g, k]), pictures[g * BRANCHES + k])
    policy, x = sampler.policy, from_wire(prefix[:2])
    i = torch.full((2,), UNIT.fork)
    with torch.no_grad():
        foreseen, _ = policy.schedule.predicted_image(i, x, policy.predict(i, x, PROMPTS[:2]))
    torch.testing.assert_close(decoded[1], foreseen)  # the second call's: the first has all leaves
    assert not torch.allclose(decoded[1], decoded[0][[0, BRANCHES]], atol=0.1)
    for g, expected in enumerate(true(decoded[1])):
        np.testing.assert_array_equal(pixels(small[g, FORK]), expected)


@pytest.mark.parametrize(
    ("low", "high", "kept"),
    [(0, 2, {(0, FORK), (0, 0), (0, 1)}), (2, 4, {(0, 2), (1, FORK), (1, 0)}), (6, 9, set())],
)
def test_a_part_of_the_leaves_has_its_part_of_the_pictures(sampler, prefix, low, high, kept):
    answer, *_ = sampler.denoise_branches(UNIT, prefix, low, high, True, True, 2)
    assert set(answer.thumbnails) == kept


def test_small_pictures_cost_no_evaluation_and_change_nothing(sampler, prefix):
    plain, pictures, *leaves = sampler.denoise_branches(UNIT, prefix, 0, 9, True)
    answer, same, *others = sampler.denoise_branches(UNIT, prefix, 0, 9, True, True, 3)
    assert plain.thumbnails == {}
    assert answer.receipt.unet_evals == plain.receipt.unet_evals == 9 * 2
    np.testing.assert_array_equal(same, pictures)
    for a, b in zip(leaves, others, strict=True):
        assert a.latents.tobytes() == b.latents.tobytes()
        assert a.log_probs.tobytes() == b.log_probs.tobytes()
