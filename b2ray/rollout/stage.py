"""One stage on the workers: roll out, update, and the trajectories that are replayed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import ray

from b2ray.actors.learner import Learner
from b2ray.actors.messages import Answer, DryRun, Updated, request
from b2ray.algorithm.branching import RewardWindow, SelectedLeaf, WorkUnit
from b2ray.algorithm.replay import ReplayEntry, ages, largest
from b2ray.config import Config
from b2ray.errors import WorkerError
from b2ray.fleet.plans import SingleCall
from b2ray.rewards import refuse_constant
from b2ray.rewards.combine import combine
from b2ray.rollout.plans import Update
from b2ray.rollout.rollout import RolloutPlan
from b2ray.rollout.versions import PolicyVersions
from b2ray.rollout.workers import Workers

Progress = Callable[[int], Any]  # called with a number of leaves that are done


@dataclass(frozen=True)
class UpdateResult:
    """What a stage's update tells of itself.

    Attributes:
        leaves: trajectories that were trained on, the replayed ones included.
        figures: by the names of metrics.jsonl.
        unet_evals: guided UNet evaluations of one latent.
        seconds: of the slowest rank.
        unet_seconds: in which ranks computed the UNet, of all of them together.
    """

    leaves: int
    figures: Mapping[str, float]
    unet_evals: int
    seconds: float
    unet_seconds: float


@dataclass(frozen=True)
class StageRewards:
    """The rewards of a stage's leaves.

    Attributes:
        total: the weighted sum that is trained on, float64, shape (G, K).
        tables: each reward as it was scored, by name, of the same shape.
        window: scores of earlier stages and of this one, for rewards with `scale=window`.
    """

    total: np.ndarray
    tables: Mapping[str, np.ndarray]
    window: RewardWindow

    def figures(self) -> dict[str, float]:
        """Mean of each reward, and of the sum, over the stage's leaves."""
        tables = {f"reward/{name}": table for name, table in self.tables.items()}
        return {name: float(t.mean()) for name, t in {**tables, "reward/mean": self.total}.items()}


class StageRunner:
    """Carries stages out on the workers.

    Attributes:
        replay: entries that the next stage replays, with references of the driver's own.
    """

    def __init__(self, config: Config, workers: Workers, versions: PolicyVersions) -> None:
        self.config, self.workers, self.versions = config, workers, versions
        self.replay: list[ReplayEntry] = []

    def restore_replay(self, entries: Sequence[ReplayEntry]) -> None:
        """Take over what a commit says that the next stage replays."""
        self.replay = [replace(e, trajectory=ray.put(e.trajectory)) for e in entries]

    def replay_arrays(self) -> list[ReplayEntry]:
        """The entries that the next stage replays, with the arrays of their trajectories."""
        trajectories = ray.get([entry.trajectory for entry in self.replay])
        return [replace(e, trajectory=t) for e, t in zip(self.replay, trajectories, strict=True)]

    def roll_out(self, units: Sequence[WorkUnit], progress: Progress) -> RolloutPlan:
        """Sample and score a stage's work units; returns the finished plan."""
        self.workers.gauges.phase("sampling")
        plan = self._plan(units, progress)
        self.workers.run(plan)
        return plan

    def rewards(self, rollout: RolloutPlan, window: RewardWindow) -> StageRewards:
        """The rewards of a finished rollout.

        Args:
            rollout: the stage's.
            window: scores of earlier stages, for rewards with `scale=window`.

        Raises:
            WorkerError: a reward is the same for all pictures.
        """
        rewards = self.config.rewards
        tables = {r.name: rollout.reward_table(r.name) for r in rewards}
        for name, table in tables.items():
            try:
                refuse_constant(name, table)
            except ValueError as error:
                raise WorkerError("scorer", "any node", "scoring a stage", str(error)) from error
        names = [r.name for r in rewards if r.scale == "window"]
        if names:
            window = window.with_stage(names, np.stack([tables[n].ravel() for n in names]))
        return StageRewards(combine(rewards, tables, window.statistics(2)), tables, window)

    def update(
        self,
        stage: int,
        interval: int,
        rollout: RolloutPlan,
        selected: Sequence[SelectedLeaf],
        next_units: Sequence[WorkUnit],
        progress: Progress,
    ) -> tuple[UpdateResult, RolloutPlan | None]:
        """One update of the learner; beside it the next stage is sampled, if that may lag.

        Entries of earlier stages are replayed, and new ones kept for the next stage.

        Args:
            stage: its number.
            interval: n.
            rollout: the stage's.
            selected: the leaves that are trained on, in this order.
            next_units: work units of the next stage, for the weights before the update; or none.
            progress: told of their leaves.

        Returns:
            What the update tells, and the next stage's rollout if it was made.
        """
        self.workers.gauges.phase("learning")
        rollout.keep((leaf.group, leaf.branch) for leaf in selected)
        replayed = self.replay
        own = [
            ReplayEntry(stage, leaf.prompt, leaf.advantage, interval, (leaf.group, leaf.branch))
            for leaf in selected
        ]
        plan = Update(
            stage,
            interval,
            rollout,
            selected,
            self.config.learner.max_lag,
            self.versions.take,
            sample_from=self.versions.sample_from,
            meanwhile=next_units[0].version if next_units else rollout.version,
            replayed=replayed,
            keep=largest([*replayed, *own], stage + 1, self.config),
        )
        ahead = self._plan(next_units, progress) if next_units else None
        self.workers.run(plan, rollout, *([ahead] if ahead else []))
        self.replay = plan.replay

        answer = _updated(plan.answer)
        age = ages(stage, replayed) if self.config.replay.stages else {}
        receipt = answer.receipt
        result = UpdateResult(
            leaves=len(selected) + len(replayed),
            figures={**answer.figures, **age},
            unet_evals=receipt.unet_evals,
            seconds=receipt.seconds,
            unet_seconds=receipt.unet_seconds,
        )
        return result, ahead

    def dry_run(
        self, units: Sequence[WorkUnit], interval: int
    ) -> tuple[dict[str, np.ndarray], Mapping[int, float]]:
        """Take work units through every actor as in a stage, without an update.

        Returns:
            Scores of every reward, also of those that are held out, each of shape (G, K); and the
            drift of `Updater.dry_run`, on at most as many leaves as an optimizer step has.
        """
        names = [r.name for r in self.config.all_rewards]
        batch = self.config.branching.branch_batch
        plan = RolloutPlan(units, batch, self.workers.scorers, names, record=True, embed=True)
        self.workers.run(plan)
        scores = {name: plan.reward_table(name) for name in names}

        prompts = [group.prompt for unit in units for group in unit.groups]
        leaves = [(g, k) for g in range(len(prompts)) for k in range(units[0].branches)]
        size = self.config.learner.batch
        stride = 1 if size == "all" else math.ceil(len(leaves) / size)
        entries = [(prompts[g], 1.0, interval, plan.leaf(g, k)) for g, k in leaves[::stride]]
        call = SingleCall("learner", request(Learner.dry_run, entries), "trying an update")
        self.workers.run(call)
        assert isinstance(call.answer, DryRun)
        return scores, call.answer.drift

    def _plan(self, units: Sequence[WorkUnit], progress: Progress) -> RolloutPlan:
        """The plan of a stage's work units, for the version that they are for."""
        self.versions.sample_from(units[0].version)
        branching = self.config.branching
        return RolloutPlan(
            units,
            branching.branch_batch,
            self.workers.scorers,
            [r.name for r in self.config.rewards],
            record=True,
            trees=self.config.evaluation.trees if branching.branches > 1 else 0,
            progress=progress,
        )


def _updated(answer: Answer | None) -> Updated:
    assert isinstance(answer, Updated)
    return answer
