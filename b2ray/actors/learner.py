"""The learner: updates the LoRA on a stage's selected trajectories."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import ray

from b2ray.actors.worker import Mark, Receipt, Worker, device, guarded
from b2ray.config import Config
from b2ray.diffusion.lora_file import State, digest
from b2ray.diffusion.trajectory import Selected, Trajectory
from b2ray.imports import uncollected
from b2ray.replay import Kept

Entry = tuple[str, float, int, Any]  # prompt, advantage, interval, ref of a `Trajectory`
Result = tuple[Receipt, dict[str, Any] | None, dict[str, Any] | None]


class Learner(Worker):
    """The policy that is trained, or one rank of it, with the same weights as the others.

    All ranks get the same calls in the same order. An update leaves each one version on, or all
    are to be replaced and restored.
    """

    role = "learner"

    @guarded("loading the model")
    def load(
        self, config: Config, prompts: Sequence[str], rank: int = 0, address: str = ""
    ) -> Receipt:
        """Meet the other ranks, load the model, add a fresh LoRA (version 0), encode the prompts.

        Args:
            config: `learner.ranks` says how many ranks there are.
            prompts: all that trajectories can have.
            rank: which of them this is.
            address: "host:port" of rank 0; empty for a single rank.
        """
        # Heavy, and the driver imports this module.
        with uncollected():
            from b2ray.diffusion.policy import Policy
            from b2ray.objectives.ranks import Ranks
            from b2ray.objectives.update import Updater

        mark, place = self.mark(), device(config.learner.threads)
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
        return self.receipt(mark, parameters=count, elements=elements)

    @guarded("reading its weights")
    def state(self) -> Result:
        """A receipt with the digest, the LoRA, and the optimizer's state; both from rank 0 only."""
        return self._result(self.mark())

    @guarded("restoring a committed stage")
    def restore(self, version: int, weights: State, optimizer: State) -> Receipt:
        """Become the policy of a committed stage."""
        mark = self.mark()
        bound = self.updater.restore(weights, optimizer)
        self.version = version
        return self.receipt(mark, digest=bound)

    @guarded("updating the policy")
    def update(
        self,
        stage: int,
        selected: Sequence[Entry],
        max_lag: int,
        replayed: Sequence[Kept] = (),
    ) -> Result:
        """Train one stage; returns what `state` returns, with the update's figures.

        The figures are those of all ranks; the receipt's UNet evaluations are this rank's.

        Args:
            stage: keys the order of the trajectories.
            selected: in the order of the driver's, which fixes the batches.
            max_lag: largest number of versions that a trajectory may be behind.
            replayed: of earlier stages, trained on beside them; refs of trajectories that may be
                behind by their age in stages more.
        """
        mark = self.mark()
        lags: list[int] = []
        items = [self._selected(entry, max_lag, lags) for entry in selected]
        for kept in replayed:
            entry = kept.prompt, kept.advantage, kept.interval, kept.trajectory
            items.append(self._selected(entry, max_lag, [], stage - kept.stage))
        figures = self.updater.update(stage, items, fresh=lambda: self.ranks.mean(lags) == 0)
        figures["fleet/lag"] = self.ranks.mean(lags)
        self.version += 1
        return self._result(mark, figures=figures)

    @guarded("rehearsing an update")
    def rehearse(self, selected: Sequence[Entry]) -> Receipt:
        """What an update would see, without one: the receipt has `Updater.rehearse`'s drift."""
        mark = self.mark()
        items = [self._selected(entry, 0, []) for entry in selected]
        drift = self.updater.rehearse(items)
        return self.receipt(mark, drift=drift)

    def _result(self, mark: Mark, **values: Any) -> Result:
        weights = self.policy.lora_state()
        receipt = self.receipt(mark, digest=digest(weights), **values)
        # The digests prove that the other ranks' are equal.
        if self.ranks.rank:
            return receipt, None, None
        return receipt, weights, self.updater.optimizer_state()

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
