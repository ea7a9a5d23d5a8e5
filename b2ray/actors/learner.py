"""The learner: updates the LoRA on a stage's selected trajectories."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import ray

from b2ray.actors.worker import Receipt, Worker, device, guarded
from b2ray.config import Config
from b2ray.diffusion.lora_file import State, digest
from b2ray.diffusion.trajectory import Selected, Trajectory


class Learner(Worker):
    """The policy that is trained. A call leaves it one version on, or it is to be restored."""

    role = "learner"

    @guarded("loading the model")
    def load(self, config: Config, prompts: Sequence[str]) -> Receipt:
        """Load the model, add a fresh LoRA (version 0), and encode the prompts."""
        # Heavy, and the driver imports this module.
        from b2ray.diffusion.policy import Policy
        from b2ray.objectives.update import Updater

        began = time.perf_counter()
        self.policy = Policy(config, device(config.learner.threads), decoder=False)
        self.policy.prepare(prompts)
        self.updater = Updater(self.policy, config)
        self.version = 0
        count = sum(p.numel() for p in self.updater.parameters.values())
        elements = math.prod(self.policy.latent_shape)
        return self.receipt(began, parameters=count, elements=elements)

    @guarded("reading its weights")
    def state(self) -> tuple[Receipt, dict[str, Any], dict[str, Any]]:
        """A receipt with the digest, the LoRA, and the optimizer's state."""
        began = time.perf_counter()
        weights = self.policy.lora_state()
        receipt = self.receipt(began, digest=digest(weights))
        return receipt, weights, self.updater.optimizer_state()

    @guarded("restoring a committed stage")
    def restore(self, version: int, weights: State, optimizer: State) -> Receipt:
        """Become the policy of a committed stage."""
        began = time.perf_counter()
        bound = self.updater.restore(weights, optimizer)
        self.version = version
        return self.receipt(began, digest=bound)

    @guarded("updating the policy")
    def update(
        self,
        stage: int,
        interval: int,
        selected: Sequence[tuple[str, float, Any]],
        max_lag: int,
    ) -> tuple[Receipt, dict[str, Any], dict[str, Any]]:
        """Train one stage; returns what `state` returns, with the update's figures.

        Args:
            stage: keys the order of the trajectories.
            interval: n.
            selected: (prompt, advantage, ref of a `Trajectory`), in (group, branch) order.
            max_lag: largest number of versions that a trajectory may be behind.
        """
        began, evals = time.perf_counter(), self.policy.unet_evals
        lags: list[int] = []
        items = [self._selected(entry, max_lag, lags) for entry in selected]
        figures = self.updater.update(stage, interval, items)
        figures["fleet/lag"] = float(sum(lags) / max(1, len(lags)))
        self.version += 1
        weights = self.policy.lora_state()
        receipt = self.receipt(
            began,
            self.policy.unet_evals - evals,
            digest=digest(weights),
            figures=figures,
        )
        return receipt, weights, self.updater.optimizer_state()

    @guarded("rehearsing an update")
    def rehearse(self, interval: int, selected: Sequence[tuple[str, float, Any]]) -> Receipt:
        """What an update would see, without one: the receipt has `Updater.rehearse`'s drift."""
        began, evals = time.perf_counter(), self.policy.unet_evals
        items = [self._selected(entry, 0, []) for entry in selected]
        drift = self.updater.rehearse(interval, items)
        return self.receipt(began, self.policy.unet_evals - evals, drift=drift)

    def _selected(self, entry: tuple[str, float, Any], max_lag: int, lags: list[int]) -> Selected:
        """A (prompt, advantage, ref) whose trajectory is fetched when needed, its lag noted."""
        prompt, advantage, ref = entry

        def fetch() -> Trajectory:
            trajectory = ray.get(ref)
            lag = self.version - trajectory.version
            lags.append(lag)
            if not 0 <= lag <= max_lag:
                raise ValueError(
                    f"a trajectory of policy version {trajectory.version} reached the learner "
                    f"at version {self.version}; the largest lag allowed is {max_lag}"
                )
            return trajectory

        return Selected(prompt, advantage, fetch)
