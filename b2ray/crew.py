"""The actors of a run as the algorithm needs them: roll out, evaluate, update, sync."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray

from b2ray.actors.learner import Learner
from b2ray.actors.sampler import Sampler
from b2ray.actors.scorer import Scorer
from b2ray.actors.worker import Memory
from b2ray.branching import RewardWindow, WorkUnit
from b2ray.config import Config
from b2ray.errors import ConfigError, WorkerError
from b2ray.evaluation import Evaluated, evaluated, evaluation_units
from b2ray.fleet.dispatch import Dispatcher
from b2ray.fleet.plans import LearnerCall, Ready, Rollout
from b2ray.fleet.session import Need, StopFlag, needs, scorers
from b2ray.fleet.slots import Role, Weights
from b2ray.prompts import PromptSets
from b2ray.rewards import refuse_constant
from b2ray.rewards.combine import Statistics, combine

MAX_LAG = 0  # versions that a trajectory may be behind the learner


@dataclass(frozen=True)
class Updated:
    """What a stage's update says of itself."""

    figures: dict[str, float]
    unet_evals: int


class Crew:
    """Samplers, scorers and the learner of one run."""

    def __init__(self, config: Config, prompts: PromptSets, stop: StopFlag) -> None:
        self.config = config
        everything = [p for prompts in prompts.evaluated().values() for p in prompts]
        self.scorers = scorers(config)
        with_weights: dict[str, tuple[type, tuple[Any, ...], str]] = {
            "sampler": (Sampler, (config, everything), "bind"),
            "learner": (Learner, (config, list(prompts.train.texts)), "restore"),
        }
        roles = []
        for need in needs(config):
            actor, args, sync = with_weights.get(
                need.role, (Scorer, (config, self.scorers.get(need.role)), None)
            )
            roles.append(Role(need.role, need.count, _maker(actor, need), args, sync))
        self.dispatcher = Dispatcher(
            roles,
            stop,
            start_timeout=config.fleet.start_timeout,
            stall_timeout=config.fleet.stall_timeout,
            retries=config.fleet.retries,
        )

    def fresh(self) -> None:
        """Version 0: the learner's first LoRA, bound everywhere."""
        call = LearnerCall("state", (), "reading the first weights")
        self.dispatcher.run(call)
        self._take(call)
        self.sync()

    def restored(
        self, version: int, digest: str, weights: dict[str, Any], optimizer: dict[str, Any]
    ) -> None:
        """A committed version, bound everywhere."""
        self.dispatcher.weights = Weights(version, digest, ray.put(weights), ray.put(optimizer))
        self.sync()

    def rollout(self, units: Sequence[WorkUnit], progress: Callable[[int], Any]) -> Rollout:
        """Sample and score a stage; every sampler is used, none matters."""
        names = [r.name for r in self.config.rewards]
        batch = self.config.branching.branch_batch
        plan = Rollout(units, batch, self.scorers, names, record=True, progress=progress)
        self.dispatcher.run(plan)
        for name in names:
            try:
                refuse_constant(name, plan.reward_table(name))
            except ValueError as error:
                raise WorkerError("scorer", "any node", "scoring a stage", str(error)) from error
        return plan

    def total_reward(
        self, rollout: Rollout, earlier: RewardWindow
    ) -> tuple[np.ndarray, RewardWindow]:
        """The weighted sum that is trained on, float64, shape (G, K), and the window of each
        reward's own scores with this stage in it."""
        rewards = self.config.rewards
        tables = {r.name: rollout.reward_table(r.name) for r in rewards}
        names = [r.name for r in rewards if r.scale == "window"]
        window = earlier
        if names:
            window = earlier.with_stage(names, np.stack([tables[n].ravel() for n in names]))
        return combine(rewards, tables, window.statistics(2)), window

    def evaluate(
        self,
        prompts: Sequence[str],
        which: int,
        count: int,
        reference: Statistics | None,
        progress: Callable[[int], Any],
    ) -> Evaluated:
        """Figures of the current policy on a prompt set, fixed seeds (`b2ray.evaluation`)."""
        units = evaluation_units(self.config, prompts, which, self.weights.version, count)
        plan = Rollout(
            units,
            self.config.evaluation.batch,
            self.scorers,
            [r.name for r in self.config.all_rewards],
            record=False,
            embed=True,
            keep_pictures=self.config.evaluation.previews,
            progress=progress,
        )
        self.dispatcher.run(plan)
        return evaluated(self.config, plan, reference)

    def update(
        self, stage: int, interval: int, selected: Sequence[tuple[str, float, Any]]
    ) -> Updated:
        """One update of the learner; its weights become the fleet's."""
        args = (stage, interval, list(selected), MAX_LAG)
        call = LearnerCall("update", args, f"updating on stage {stage}")
        self.dispatcher.run(call)
        self._take(call)
        assert call.receipt is not None
        return Updated(call.receipt.values["figures"], call.receipt.unet_evals)

    def rehearse(
        self, units: Sequence[WorkUnit], interval: int
    ) -> tuple[dict[str, np.ndarray], dict[int, float]]:
        """Work units through every actor as in a stage, without an update.

        Returns:
            Scores of every reward, also of those that are held out, each of shape (G, K); and
            `Updater.rehearse`'s drift, on as many leaves as an optimizer step has.
        """
        names = [r.name for r in self.config.all_rewards]
        batch = self.config.branching.branch_batch
        plan = Rollout(units, batch, self.scorers, names, record=True, embed=True)
        self.dispatcher.run(plan)
        scores = {n: plan.reward_table(n) for n in names}
        prompts = [group.prompt for unit in units for group in unit.groups]
        leaves = np.argwhere(np.ones_like(scores[names[0]]))[: self.config.learner.batch]
        selected = [(prompts[g], 1.0, plan.leaf(g, k)) for g, k in leaves.tolist()]
        call = LearnerCall("rehearse", (interval, selected), "rehearsing an update", wanted=1)
        self.dispatcher.run(call)
        assert call.receipt is not None
        return scores, call.receipt.values["drift"]

    def elements(self) -> int:
        """Elements of a latent, as the learner has it."""
        learner = next(r for r in self.dispatcher.receipts if r.role == "learner")
        return int(learner.values["elements"])

    def memory(self) -> dict[str, Memory]:
        """The largest use of memory so far of each actor, by its slot."""
        asked = {str(s): s.actor.memory.remote() for s in self.dispatcher.slots}
        found = ray.get(list(asked.values()), timeout=self.config.fleet.start_timeout)
        return dict(zip(asked, found, strict=True))

    def sync(self) -> None:
        """Wait until every slot has loaded and bound the current weights, proven by digest."""
        self.dispatcher.run(Ready(self.dispatcher))

    @property
    def weights(self) -> Weights:
        """The current policy version."""
        assert self.dispatcher.weights is not None
        return self.dispatcher.weights

    def reward_figures(self, rollout: Rollout, total: np.ndarray) -> dict[str, float]:
        """Mean of each reward, as it was scored, and of the sum over the stage's samples."""
        means = {f"reward/{r.name}": rollout.reward_table(r.name) for r in self.config.rewards}
        means["reward/mean"] = total
        return {name: float(table.mean()) for name, table in means.items()}

    def fleet_figures(self, images_per_second: float) -> dict[str, float]:
        """How the fleet is, and how fast per GPU: an overlap that needs one more may not pay."""
        gpus = sum(need.count * need.gpus for need in needs(self.config))
        per_gpu = {"throughput/images_per_second_per_gpu": images_per_second / gpus} if gpus else {}
        return {
            **per_gpu,
            "throughput/images_per_second": images_per_second,
            "fleet/ready": float(len(self.dispatcher.ready("sampler"))),
            "fleet/replaced": float(self.dispatcher.replaced),
        }

    def close(self) -> None:
        """End the actors."""
        self.dispatcher.close()

    def _take(self, call: LearnerCall) -> None:
        assert call.receipt is not None
        lora, optimizer = call.results
        self.dispatcher.weights = Weights(
            call.receipt.version, call.receipt.values["digest"], lora, optimizer
        )


def _maker(actor: type, need: Need) -> Callable[[], Any]:
    options: dict[str, Any] = {"num_cpus": need.cpus, "num_gpus": need.gpus}
    if need.runtime_env:
        options["runtime_env"] = dict(need.runtime_env)
    try:
        # A worker that Ray restarts by itself would come back without weights: slots are replaced.
        remote = ray.remote(max_restarts=0, max_task_retries=0, **options)(actor)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{need.field}: runtime_env is refused by Ray: {error}") from error
    return lambda: remote.remote()
