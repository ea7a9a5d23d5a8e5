"""The plan of an update: the learner's call, and leaves that are made again for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import ray

from b2ray.actors.learner import Learner
from b2ray.actors.messages import Answer, request
from b2ray.algorithm.branching import SelectedLeaf
from b2ray.algorithm.replay import ReplayEntry
from b2ray.fleet import nodes
from b2ray.fleet.plans import SingleCall, fetched
from b2ray.fleet.slots import Call, Slot
from b2ray.rollout.rollout import RolloutPlan


class Update(SingleCall):
    """An update on selected leaves of a rollout; leaves that are lost are branched again.

    Drive it together with the rollout.

    Args:
        stage: its number.
        interval: n.
        rollout: the stage's.
        selected: the leaves that are trained on, in this order.
        max_lag: largest number of versions that a trajectory may be behind.
        on_answer: as in `SingleCall`.
        sample_from: called with the version that samplers need: the rollout's while leaves of it
            are made again, and then that of the rollout that goes on beside the update.
        meanwhile: that version.
        replayed: entries of earlier stages, with references of the driver's own, which no node's
            loss takes along.
        keep: what the next stage replays: entries of earlier stages, then this stage's, which have
            (group, branch) in the place of a trajectory.

    Attributes:
        replay: `keep` with references of the driver's own, once the update is finished.
    """

    def __init__(
        self,
        stage: int,
        interval: int,
        rollout: RolloutPlan,
        selected: Sequence[SelectedLeaf],
        max_lag: int,
        on_answer: Callable[[Answer, Sequence[Any]], object],
        sample_from: Callable[[int], object] = lambda _: None,
        meanwhile: int = 0,
        replayed: Sequence[ReplayEntry] = (),
        keep: Sequence[ReplayEntry] = (),
    ) -> None:
        super().__init__("learner", None, f"updating on stage {stage}", on_answer)
        self.stage, self.interval, self.max_lag = stage, interval, max_lag
        self.rollout, self.selected = rollout, selected
        self.replay: list[ReplayEntry] = []
        self._sample_from, self._meanwhile = sample_from, meanwhile
        self._replayed, self._keep = list(replayed), list(keep)

    def next_call(self, slot: Slot) -> Call | None:
        """The update, as soon as all its trajectories exist."""
        if not self._may_send(slot) or not self.rollout.finished:
            return None
        self._sample_from(self._meanwhile)
        entries = [
            (leaf.prompt, leaf.advantage, self.interval, self.rollout.leaf(leaf.group, leaf.branch))
            for leaf in self.selected
        ]
        self.request = request(Learner.update, self.stage, entries, self.max_lag, self._replayed)
        return super().next_call(slot)

    def done(self, call: Call, slot: Slot, answer: Answer, results: Sequence[Any]) -> None:
        """Take the answer. What is replayed next is fetched first: as long as there is no answer,
        lost leaves can still be made again."""
        earlier = [entry for entry in self._keep if entry.stage < self.stage]
        own = self._keep[len(earlier) :]
        refs = [self.rollout.leaf(*entry.trajectory) for entry in own]
        trajectories = fetched(refs, "trajectories to be replayed", call, slot) if refs else []
        self.replay = [
            *earlier,
            *(replace(e, trajectory=ray.put(t)) for e, t in zip(own, trajectories, strict=True)),
        ]
        super().done(call, slot, answer, results)

    def lost(self, call: Call) -> None:
        """Trajectories went with their node: those leaves are branched again."""
        super().lost(call)
        leaves = [(leaf.group, leaf.branch) for leaf in self.selected]
        gone = nodes.lost([self.rollout.leaf(*leaf) for leaf in leaves])
        # The learner misses one: if none seems lost, a dead node still counts as alive.
        if not any(gone):
            gone = [True] * len(gone)
        self.rollout.again(leaf for leaf, is_gone in zip(leaves, gone, strict=True) if is_gone)
        self._sample_from(self.rollout.version)
