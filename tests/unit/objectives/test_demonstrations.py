"""With demonstrations every optimizer batch is half of them, half of the policy's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from b2ray.diffusion.trajectory import Selected
from b2ray.objectives.ranks import Ranks
from b2ray.objectives.update import Updater

SHOWN = {
    "preset": "sqil",
    "rewards": "[]",
    "demonstrations__path": "folder",
    "branching__branches": 1,
}


class ShareOf(Ranks):
    """One of several ranks, whose sums are its own values."""

    def __init__(self, rank: int, world: int) -> None:
        super().__init__()
        self.place = rank, world

    def share(self, items: Sequence) -> Sequence:
        rank, world = self.place
        return items[rank::world]


@pytest.fixture
def halves(sampled, selected) -> list[Selected]:
    """Six trajectories: each of the policy's own with a demonstration after it."""
    return [replace(s, advantage=(-1.0, 1.0)[j % 2]) for j, s in enumerate(selected[:6])]


def batches(
    learner: Updater, selected: Sequence[Selected], monkeypatch: pytest.MonkeyPatch
) -> list[list[int]]:
    """Which trajectories each optimizer step fetched."""
    found: list[list[int]] = []
    fetched: list[int] = []
    counted = [
        replace(s, fetch=lambda j=j, s=s: fetched.append(j) or s.fetch())
        for j, s in enumerate(selected)
    ]
    step: Callable[..., None] = learner._optimizer_step

    def noting(*args: object) -> None:
        fetched.clear()
        step(*args)
        found.append(list(fetched))

    monkeypatch.setattr(learner, "_optimizer_step", noting)
    learner.update(0, counted)
    return found


@pytest.mark.parametrize(("batch", "sizes"), [(2, [2] * 3), (3, [4, 2]), (6, [6]), ("all", [6])])
def test_every_batch_is_half_demonstrations(updater, halves, monkeypatch, batch, sizes):
    learner = updater(**SHOWN, learner__batch=batch, learner__inner_epochs=2)
    found = batches(learner, halves, monkeypatch)
    assert [len(b) for b in found] == sizes * 2
    for b in found:
        assert sum(halves[j].advantage for j in b) == 0
        assert all(j ^ 1 in b for j in b)
    assert sorted(j for b in found for j in b) == sorted([*range(6)] * 2)


def test_so_is_every_ranks_share(updater, halves, monkeypatch):
    shares = []
    for rank in range(2):
        learner = updater(**SHOWN, learner__batch=6, learner__inner_epochs=1)
        learner.ranks = ShareOf(rank, 2)
        shares += batches(learner, halves, monkeypatch)
    assert sorted(len(s) for s in shares) == [2, 4]
    assert all(sum(halves[j].advantage for j in s) == 0 for s in shares)
    assert sorted(j for s in shares for j in s) == [*range(6)]


def test_demonstrations_become_likelier_than_the_own(updater, halves):
    learner = updater(
        **SHOWN,
        learner__batch=6,
        learner__inner_epochs=2,
        learner__lr=1e-4,
        objective__clip_nats=1e6,
    )

    def gap() -> float:
        return likelihood(learner, halves[1::2]) - likelihood(learner, halves[::2])

    before = gap()
    learner.update(0, halves)
    assert gap() > before


def likelihood(learner: Updater, selected: Sequence[Selected]) -> float:
    microbatches = learner._microbatches(learner._all_steps(selected))
    policy = learner.policy
    return sum(
        float(policy.log_prob(m.step, m.x, m.next_latents, m.prompts).detach().sum())
        for m in microbatches
    )


@pytest.mark.parametrize("keep", [slice(0, 5), slice(1, None), slice(0, None, 2)])
def test_trajectories_without_a_partner_are_refused(updater, halves, keep):
    with pytest.raises(ValueError, match="comes a demonstration"):
        updater(**SHOWN).update(0, halves[keep])
