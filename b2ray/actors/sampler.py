"""The sampler: denoises prefixes and branches of work units with the weights it was given."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from b2ray.actors.worker import Mark, Receipt, Worker, device, guarded
from b2ray.branching import WorkUnit
from b2ray.config import Config
from b2ray.demonstrations import fitted
from b2ray.diffusion.lora_file import State
from b2ray.diffusion.noise import INITIAL, PREFIX, normal
from b2ray.diffusion.trajectory import Prefix, Trajectory, from_wire, to_wire
from b2ray.imports import uncollected
from b2ray.trees import FORK, small

if TYPE_CHECKING:
    import torch

    from b2ray.diffusion.policy import Rollout


class Sampler(Worker):
    """A policy whose results depend on its weights and the work unit alone."""

    role = "sampler"

    @guarded("loading the model")
    def load(self, config: Config, prompts: list[str]) -> Receipt:
        """Load the model; the receipt names its device and the prompts that it cuts off."""
        with uncollected():  # heavy, and the driver imports this module
            from b2ray.diffusion.policy import Policy

        mark = self.mark()
        self.observe(config)
        self.policy = Policy(config, device(config.cpu_threads))
        self.policy.prepare(prompts)
        cut = self.policy.too_long(prompts)
        size = self.policy.picture_size
        return self.receipt(mark, too_long=cut, device=str(self.policy.device), picture_size=size)

    @guarded("binding new weights")
    def bind(self, version: int, weights: State) -> Receipt:
        """Put the LoRA of a policy version into the model; the receipt has what is bound there."""
        mark = self.mark()
        digest = self.policy.bind(weights)
        self.version = version
        return self.receipt(mark, digest=digest)

    @guarded("denoising a prefix")
    def denoise_prefix(self, unit: WorkUnit) -> tuple[Receipt, np.ndarray]:
        """x at the fork step for each group of the unit, shape (G, C, H, W)."""
        mark = self._begin(unit)
        latents = to_wire(self._prefix(unit)[:, -1])
        return self.receipt(mark, bytes=latents.nbytes), latents

    @guarded("denoising prefixes for several stages")
    def denoise_prefixes(self, unit: WorkUnit, first: int) -> tuple[Any, ...]:
        """The prefix of each group of the unit, to be forked at any step from `first` to its fork.

        Returns:
            The receipt and G `Prefix`es; sampled by the base model if prefix.policy is base.
        """
        mark = self._begin(unit)
        base = self.policy.config.prefix.policy == "base"
        with self.policy.reference() if base else contextlib.nullcontext():
            latents = to_wire(self._prefix(unit)[:, first:])
        # Copies, as of trajectories.
        each = [Prefix(x.copy(), first) for x in latents]
        return self.receipt(mark, bytes=latents.nbytes), *each

    @guarded("gathering prefixes")
    def gather_prefixes(self, unit: WorkUnit, *kept: Prefix) -> tuple[Receipt, np.ndarray]:
        """What `denoise_prefix` returns, of prefixes that were denoised before."""
        mark = self._begin(unit)
        latents = np.stack([prefix.at(unit.fork) for prefix in kept])
        return self.receipt(mark, bytes=latents.nbytes), latents

    @guarded("denoising branches")
    def denoise_branches(
        self,
        unit: WorkUnit,
        prefix: np.ndarray,
        low: int,
        high: int,
        record: bool,
        decode: bool = True,
        trees: int = 0,
    ) -> tuple[Any, ...]:
        """The unit's leaves low .. high - 1 from the fork to pictures, in one batch.

        Args:
            trees: of how many of the unit's first groups the receipt has small pictures.

        Returns:
            The receipt, the pictures (uint8, (B, height, width, 3); None if they are not to be
            decoded), and, if they are to be recorded, B trajectories.
        """
        mark = self._begin(unit)
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
        pictures = self.policy.decode(rollout.latents[:, -1]) if decode else None
        values: dict[str, Any] = {"picture_bytes": 0 if pictures is None else pictures.nbytes}
        if pictures is not None and trees:
            values["small"] = self._small(rollout, rows, pictures, trees)
        if not record:
            return self.receipt(mark, **values), pictures
        trajectories, values["bytes"] = self._trajectories(rollout)
        return self.receipt(mark, **values), pictures, *trajectories

    @guarded("encoding demonstrations")
    def encode_demonstrations(
        self, unit: WorkUnit, files: Sequence[bytes]
    ) -> tuple[Receipt, np.ndarray]:
        """x_0 of the picture of each group of the unit, float32, shape (G, C, H, W).

        Args:
            files: what stands in the groups' picture files.
        """
        mark = self._begin(unit)
        size = self.policy.picture_size
        latents = self.policy.latents_of(np.stack([fitted(file, *size) for file in files])).numpy()
        return self.receipt(mark, bytes=latents.nbytes), latents

    @guarded("following demonstrations")
    def follow_demonstrations(
        self, unit: WorkUnit, x0: np.ndarray, low: int, high: int
    ) -> tuple[Any, ...]:
        """Trajectories from the fork to the unit's pictures low .. high - 1, in one batch.

        Returns:
            The receipt, with each one's divergence from the policy (`Policy.demonstrate`), no
            pictures (None), and B trajectories.
        """
        mark = self._begin(unit)
        groups = unit.groups[low:high]
        leaves = [(group.index, PREFIX + 1) for group in groups]
        rollout, apart = self.policy.demonstrate(
            from_wire(x0[low:high]),
            [group.prompt for group in groups],
            unit.fork,
            self._noise(unit, leaves, INITIAL),
            lambda step: self._noise(unit, leaves, step + 1),
        )
        trajectories, size = self._trajectories(rollout)
        return self.receipt(mark, bytes=size, apart=apart.tolist()), None, *trajectories

    def _prefix(self, unit: WorkUnit) -> torch.Tensor:
        """x at t_0 .. t_fork for each group of the unit, shape (G, fork + 1, C, H, W)."""
        leaves = [(group.index, PREFIX) for group in unit.groups]
        rollout = self.policy.denoise(
            from_wire(self._noise(unit, leaves, INITIAL)),
            [group.prompt for group in unit.groups],
            0,
            unit.fork,
            lambda step: self._noise(unit, leaves, step + 1),
        )
        return rollout.latents

    def _small(
        self, rollout: Rollout, rows: list[tuple[int, int]], pictures: np.ndarray, trees: int
    ) -> dict[tuple[int, int], bytes]:
        """Small pictures of the first groups, by (position of the group, branch or `FORK`).

        What the first step of the branches predicted is the prefix's image: no UNet call more.
        """
        wanted = [(row, g, k) for row, (g, k) in enumerate(rows) if g < trees]
        found = {(g, k): small(pictures[row]) for row, g, k in wanted}
        firsts = [(row, g) for row, g, k in wanted if k == 0]
        if firsts and rollout.predicted is not None:
            seen = self.policy.decode(rollout.predicted[[row for row, _ in firsts]])
            for (_, g), picture in zip(firsts, seen, strict=True):
                found[g, FORK] = small(picture)
        return found

    def _trajectories(self, rollout: Rollout) -> tuple[list[Trajectory], int]:
        """What was rolled out, one by one, and its bytes."""
        latents, log_probs = to_wire(rollout.latents), rollout.log_probs.cpu().numpy()
        # Copies: a view would make Ray ship the whole batch with every trajectory.
        each = [
            Trajectory(x.copy(), p.copy(), self.version)
            for x, p in zip(latents, log_probs, strict=True)
        ]
        return each, latents.nbytes + log_probs.nbytes

    def _begin(self, unit: WorkUnit) -> Mark:
        if unit.version != self.version:
            raise ValueError(
                f"the unit is for policy version {unit.version}, bound is {self.version}"
            )
        return self.mark()

    def _noise(self, unit: WorkUnit, leaves: list[tuple[int, int]], step: int) -> np.ndarray:
        shape = self.policy.latent_shape
        return normal(unit.seed, unit.domain, unit.stage, leaves, step, shape)
