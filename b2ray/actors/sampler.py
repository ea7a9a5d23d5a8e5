"""The sampler: denoises prefixes and branches of work units with the weights it was given."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from b2ray.actors.worker import Receipt, Worker, device, guarded
from b2ray.branching import WorkUnit
from b2ray.config import Config
from b2ray.diffusion.lora_file import State
from b2ray.diffusion.noise import INITIAL, PREFIX, normal
from b2ray.diffusion.trajectory import Trajectory, from_wire, to_wire


class Sampler(Worker):
    """A policy whose results depend on its weights and the work unit alone."""

    role = "sampler"

    @guarded("loading the model")
    def load(self, config: Config, prompts: list[str]) -> Receipt:
        """Load the model; the receipt names its device and the prompts that it cuts off."""
        from b2ray.diffusion.policy import Policy  # heavy, and the driver imports this module

        began = time.perf_counter()
        self.policy = Policy(config, device(config.cpu_threads))
        self.policy.prepare(prompts)
        cut = self.policy.too_long(prompts)
        return self.receipt(began, too_long=cut, device=str(self.policy.device))

    @guarded("binding new weights")
    def bind(self, version: int, weights: State) -> Receipt:
        """Put the LoRA of a policy version into the model; the receipt has what is bound there."""
        began = time.perf_counter()
        digest = self.policy.bind(weights)
        self.version = version
        return self.receipt(began, digest=digest)

    @guarded("denoising a prefix")
    def denoise_prefix(self, unit: WorkUnit) -> tuple[Receipt, np.ndarray]:
        """x at the fork step for each group of the unit, shape (G, C, H, W)."""
        began, evals = self._begin(unit)
        leaves = [(group.index, PREFIX) for group in unit.groups]
        x = from_wire(self._noise(unit, leaves, INITIAL))
        rollout = self.policy.denoise(
            x,
            [group.prompt for group in unit.groups],
            0,
            unit.fork,
            lambda step: self._noise(unit, leaves, step + 1),
        )
        latents = to_wire(rollout.latents[:, -1])
        return self._done(began, evals, bytes=latents.nbytes), latents

    @guarded("denoising branches")
    def denoise_branches(
        self, unit: WorkUnit, prefix: np.ndarray, low: int, high: int, record: bool
    ) -> tuple[Any, ...]:
        """The unit's leaves low .. high - 1 from the fork to pictures, in one batch.

        Returns:
            The receipt, the pictures (uint8, (B, height, width, 3)), and, if they are to be
            recorded, B trajectories.
        """
        began, evals = self._begin(unit)
        rows = unit.leaves(low, high)
        groups = [unit.groups[g] for g, _ in rows]
        # Branch words start above the prefix's.
        leaves = [(unit.groups[g].index, PREFIX + 1 + k) for g, k in rows]
        rollout = self.policy.denoise(
            from_wire(prefix[[g for g, _ in rows]]),
            [group.prompt for group in groups],
            unit.fork,
            self.policy.schedule.steps,
            lambda step: self._noise(unit, leaves, step + 1),
        )
        pictures = self.policy.decode(rollout.latents[:, -1])
        size = {"picture_bytes": pictures.nbytes}
        if not record:
            return self._done(began, evals, **size), pictures
        latents, log_probs = to_wire(rollout.latents), rollout.log_probs.cpu().numpy()
        # Copies: a view would make Ray ship the whole batch with every trajectory.
        trajectories = [
            Trajectory(latents[b].copy(), log_probs[b].copy(), self.version)
            for b in range(len(rows))
        ]
        size["bytes"] = latents.nbytes + log_probs.nbytes
        return self._done(began, evals, **size), pictures, *trajectories

    def _begin(self, unit: WorkUnit) -> tuple[float, int]:
        if unit.version != self.version:
            raise ValueError(
                f"the unit is for policy version {unit.version}, bound is {self.version}"
            )
        return time.perf_counter(), self.policy.unet_evals

    def _done(self, began: float, evals: int, **values: int) -> Receipt:
        return self.receipt(began, self.policy.unet_evals - evals, **values)

    def _noise(self, unit: WorkUnit, leaves: list[tuple[int, int]], step: int) -> np.ndarray:
        shape = self.policy.latent_shape
        return normal(unit.seed, unit.domain, unit.stage, leaves, step, shape)
