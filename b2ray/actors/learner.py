"""The learner: updates the LoRA on a stage's selected trajectories."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import ray

from b2ray.actors.messages import Bound, DryRun, LearnerLoaded, Updated
from b2ray.actors.worker import Worker, device, remote_method
from b2ray.algorithm.replay import ReplayEntry
from b2ray.config import Config
from b2ray.diffusion.lora_file import State, digest
from b2ray.diffusion.trajectory import Selected, Trajectory
from b2ray.imports import gc_paused

Entry = tuple[str, float, int, Any]  # prompt, advantage, interval, ref of a `Trajectory`
Arrays = dict[str, Any] | None  # rank 0's; the other ranks' are proven equal by their digests


class Learner(Worker):
    """The policy that is trained, or one rank of it, with the same weights as the others.

    All ranks get the same calls in the same order. An update leaves each one version on, or all
    are to be replaced and restored.
    """

    role = "learner"

    @remote_method("loading the model")
    def load(
        self, config: Config, prompts: Sequence[str], rank: int = 0, address: str = ""
    ) -> LearnerLoaded:
        """Meet the other ranks, load the model, add a fresh LoRA (version 0), encode the prompts.

        Args:
            config: `learner.ranks` says how many ranks there are.
            prompts: all that trajectories can have.
            rank: which of them this is.
            address: "host:port" of rank 0; empty for a single rank.
        """
        # Heavy, and the driver imports this module.
        with gc_paused():
            from b2ray.diffusion.policy import Policy
            from b2ray.objectives.ranks import Ranks
            from b2ray.objectives.update import Updater

        timer, place = self.timer(), device(config.learner.threads)
        self.observe(config)
        self.ranks = Ranks(
            rank,
            config.learner.ranks,
            address,
            config.fleet.stall_timeout,
            # NCCL refuses ranks that share a GPU.
            place if config.fleet.learner.gpus >= 1 else None,
        )
        self.policy = Policy(config, place, decoder=False)
        self.policy.prepare(prompts)
        self.updater = Updater(self.policy, config, self.ranks)
        self.version = 0
        count = sum(p.numel() for p in self.updater.parameters.values())
        elements = math.prod(self.policy.latent_shape)
        return LearnerLoaded(self.receipt(timer), count, elements)

    @remote_method("reading its weights", objects=2)
    def state(self) -> tuple[Bound, Arrays, Arrays]:
        """The answer, the LoRA, and the optimizer's state; the arrays come from rank 0 only."""
        timer = self.timer()
        weights = self.policy.lora_state()
        answer = Bound(self.receipt(timer), digest(weights))
        return answer, *self._arrays(weights)

    @remote_method("restoring a committed stage")
    def restore(self, version: int, weights: State, optimizer: State) -> Bound:
        """Become the policy of a committed stage."""
        timer = self.timer()
        bound = self.updater.restore(weights, optimizer)
        self.version = version
        return Bound(self.receipt(timer), bound)

    @remote_method("updating the policy", objects=2)
    def update(
        self,
        stage: int,
        selected: Sequence[Entry],
        max_lag: int,
        replayed: Sequence[ReplayEntry] = (),
    ) -> tuple[Updated, Arrays, Arrays]:
        """Train on one stage; returns the answer, the LoRA and the optimizer's state, as `state`.

        The figures are those of all ranks; the receipt's UNet evaluations are this rank's.

        Args:
            stage: keys the order of the trajectories.
            selected: in the order of the driver's, which fixes the batches.
            max_lag: largest number of versions that a trajectory may be behind.
            replayed: trajectories of earlier stages, which are trained on, too; each may be behind
                by its age in stages more.
        """
        timer = self.timer()
        lags: list[int] = []
        items = [self._selected(entry, max_lag, lags) for entry in selected]
        for old in replayed:
            entry = old.prompt, old.advantage, old.interval, old.trajectory
            items.append(self._selected(entry, max_lag, [], stage - old.stage))
        figures = self.updater.update(stage, items, fresh=lambda: self.ranks.mean(lags) == 0)
        figures["fleet/lag"] = self.ranks.mean(lags)
        self.version += 1
        weights = self.policy.lora_state()
        answer = Updated(self.receipt(timer), digest(weights), figures)
        return answer, *self._arrays(weights)

    @remote_method("trying an update")
    def dry_run(self, selected: Sequence[Entry]) -> DryRun:
        """What an update would see, without changing anything (`Updater.dry_run`)."""
        timer = self.timer()
        items = [self._selected(entry, 0, []) for entry in selected]
        drift = self.updater.dry_run(items)
        return DryRun(self.receipt(timer), drift)

    def _arrays(self, weights: dict[str, Any]) -> tuple[Arrays, Arrays]:
        """The LoRA and the optimizer's state, of rank 0."""
        return (None, None) if self.ranks.rank else (weights, self.updater.optimizer_state())

    def _selected(self, entry: Entry, max_lag: int, lags: list[int], age: int = 0) -> Selected:
        """An entry whose trajectory is fetched when needed, its lag noted."""
        prompt, advantage, interval, ref = entry
        # Every stage makes one version, so in its own stage it was behind by `age` less.
        allowed = max_lag + min(age, self.updater.config.replay.stages)

        def fetch() -> Trajectory:
            trajectory = ray.get(ref)
            lag = self.version - trajectory.version
            lags.append(lag)
            if not age <= lag <= allowed:
                raise ValueError(
                    f"a trajectory of policy version {trajectory.version} reached the learner "
                    f"at version {self.version}; a lag of {age} to {allowed} is allowed"
                )
            return trajectory

        return Selected(prompt, advantage, interval, fetch, age)
