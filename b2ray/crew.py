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
from b2ray.branching import WorkUnit
from b2ray.config import Config
from b2ray.errors import WorkerError
from b2ray.evaluation import Evaluated, evaluate, total_reward
from b2ray.fleet.dispatch import Dispatcher
from b2ray.fleet.plans import LearnerCall, Ready, Rollout
from b2ray.fleet.session import StopFlag, shapes
from b2ray.fleet.slots import Role, Weights
from b2ray.prompts import PromptSets
from b2ray.rewards import refuse_constant

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
        loads: dict[str, tuple[Any, tuple[Any, ...], str | None]] = {
            "sampler": (Sampler, (config, everything), "bind"),
            "scorer": (Scorer, (config,), None),
            "learner": (Learner, (config,), "restore"),
        }
        roles = []
        for name, count, cpus, gpus in shapes(config.fleet):
            actor, load_args, sync = loads[name]
            roles.append(Role(name, count, _maker(actor, cpus, gpus), load_args, sync))
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
        plan = Rollout(units, batch, names, record=True, progress=progress)
        self.dispatcher.run(plan)
        for name in names:
            try:
                refuse_constant(name, plan.reward_table(name))
            except ValueError as error:
                raise WorkerError("scorer", "any node", "scoring a stage", str(error)) from error
        return plan

    def total_reward(self, rollout: Rollout) -> np.ndarray:
        """The weighted sum that is trained on, float64, shape (G, K)."""
        names = [r.name for r in self.config.rewards]
        return total_reward(self.config, {n: rollout.reward_table(n) for n in names})

    def evaluate(
        self, prompts: Sequence[str], which: int, count: int, progress: Callable[[int], Any]
    ) -> Evaluated:
        """Figures of the current policy on a prompt set, fixed seeds."""
        version = self.weights.version
        run = self.dispatcher.run
        return evaluate(run, self.config, prompts, which, version, count, progress)

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

    def sync(self) -> None:
        """Wait until every slot has loaded and bound the current weights, proven by digest."""
        self.dispatcher.run(Ready(self.dispatcher))

    @property
    def weights(self) -> Weights:
        """The current policy version."""
        assert self.dispatcher.weights is not None
        return self.dispatcher.weights

    def reward_figures(self, rollout: Rollout) -> dict[str, float]:
        """Mean of each reward over the stage's samples."""
        means = {f"reward/{r.name}": rollout.reward_table(r.name) for r in self.config.rewards}
        means["reward/mean"] = self.total_reward(rollout)
        return {name: float(table.mean()) for name, table in means.items()}

    def fleet_figures(self, images_per_second: float) -> dict[str, float]:
        """How the fleet is, and how fast per GPU: an overlap that needs one more may not pay."""
        gpus = sum(count * each for _, count, _, each in shapes(self.config.fleet))
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


def _maker(actor: type, cpus: float, gpus: float) -> Callable[[], Any]:
    # A worker that Ray restarts by itself would come back without weights: slots are replaced.
    remote = ray.remote(num_cpus=cpus, num_gpus=gpus, max_restarts=0, max_task_retries=0)(actor)
    return lambda: remote.remote()
