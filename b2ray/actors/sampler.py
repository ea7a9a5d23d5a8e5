"""The sampler: denoises prefixes and branches of work units with the weights it was given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from b2ray.actors.messages import Bound, BranchesMade, PrefixesMade, SamplerLoaded
from b2ray.actors.worker import Timer, Worker, device, remote_method
from b2ray.algorithm.branching import WorkUnit
from b2ray.config import Config
from b2ray.diffusion.lora_file import State
from b2ray.diffusion.noise import INITIAL, PREFIX, normal
from b2ray.diffusion.pictures import FORK, fitted, thumbnail
from b2ray.diffusion.trajectory import Trajectory, from_wire, to_wire
from b2ray.imports import gc_paused

if TYPE_CHECKING:
    from b2ray.diffusion.policy import TrajectoryBatch


class Sampler(Worker):
    """A policy whose results depend on its weights and the work unit alone."""

    role = "sampler"

    @remote_method("loading the model")
    def load(self, config: Config, prompts: Sequence[str]) -> SamplerLoaded:
        """Load the model, and encode the prompts."""
        with gc_paused():  # heavy, and the driver imports this module
            from b2ray.diffusion.policy import Policy

        timer = self.timer()
        self.observe(config)
        self.policy = policy = Policy(config, device(config.cpu_threads))
        policy.prepare(prompts)
        return SamplerLoaded(
            self.receipt(timer),
            device=str(policy.device),
            picture_size=policy.picture_size,
            too_long=policy.too_long(prompts),
        )

    @remote_method("binding new weights")
    def bind(self, version: int, weights: State) -> Bound:
        """Put the LoRA of a policy version into the model."""
        timer = self.timer()
        digest = self.policy.bind(weights)
        self.version = version
        return Bound(self.receipt(timer), digest)

    @remote_method("denoising a prefix", objects=1)
    def denoise_prefix(self, unit: WorkUnit) -> tuple[PrefixesMade, np.ndarray]:
        """x at the fork step for each group of the unit, shape (G, C, H, W)."""
        timer = self._begin(unit)
        leaves = [(group.index, PREFIX) for group in unit.groups]
        rollout = self.policy.denoise(
            from_wire(self._noise(unit, leaves, INITIAL)),
            [group.prompt for group in unit.groups],
            0,
            unit.fork,
            lambda step: self._noise(unit, leaves, step + 1),
        )
        latents = to_wire(rollout.latents[:, -1])
        return PrefixesMade(self.receipt(timer), latents.nbytes), latents

    @remote_method("denoising branches")
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
            unit: the work unit.
            prefix: what `denoise_prefix` returned for the unit, shape (G, C, H, W).
            low: the first leaf.
            high: the leaf after the last one; B = high - low.
            record: whether trajectories are returned.
            decode: whether pictures are returned.
            trees: of how many of the unit's first groups the answer has thumbnails.

        Returns:
            The answer; the pictures (uint8, (B, height, width, 3); None if they are not to be
            decoded); and, if they are to be recorded, B trajectories.
        """
        timer = self._begin(unit)
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
        thumbnails = {}
        if pictures is not None and trees > 0:
            thumbnails = self._thumbnails(rollout, rows, pictures, trees)
        trajectories, size = self._trajectories(rollout) if record else ([], 0)
        answer = BranchesMade(
            self.receipt(timer),
            nbytes=size,
            picture_nbytes=0 if pictures is None else pictures.nbytes,
            thumbnails=thumbnails,
        )
        return answer, pictures, *trajectories

    @remote_method("encoding demonstrations", objects=1)
    def encode_demonstrations(
        self, unit: WorkUnit, files: Sequence[bytes]
    ) -> tuple[PrefixesMade, np.ndarray]:
        """x_0 of the picture of each group of the unit, float32, shape (G, C, H, W).

        Args:
            unit: a unit of demonstrations.
            files: the content of the groups' picture files.
        """
        timer = self._begin(unit)
        size = self.policy.picture_size
        latents = self.policy.latents_of(np.stack([fitted(file, *size) for file in files])).numpy()
        return PrefixesMade(self.receipt(timer), latents.nbytes), latents

    @remote_method("making trajectories to demonstrations")
    def trajectories_to_demonstrations(
        self, unit: WorkUnit, x0: np.ndarray, low: int, high: int
    ) -> tuple[Any, ...]:
        """Trajectories from the fork to the unit's pictures low .. high - 1, in one batch.

        Returns:
            The answer, None in the place of pictures, and B trajectories.
        """
        timer = self._begin(unit)
        groups = unit.groups[low:high]
        leaves = [(group.index, PREFIX + 1) for group in groups]
        rollout, divergences = self.policy.demonstrate(
            from_wire(x0[low:high]),
            [group.prompt for group in groups],
            unit.fork,
            self._noise(unit, leaves, INITIAL),
            lambda step: self._noise(unit, leaves, step + 1),
        )
        trajectories, size = self._trajectories(rollout)
        answer = BranchesMade(self.receipt(timer), nbytes=size, divergences=divergences.tolist())
        return answer, None, *trajectories

    def _thumbnails(
        self,
        rollout: TrajectoryBatch,
        rows: list[tuple[int, int]],
        pictures: np.ndarray,
        trees: int,
    ) -> dict[tuple[int, int], bytes]:
        """Thumbnails of the first groups, by (position of the group, branch or `FORK`).

        The prefix's picture is what the first step of the branches predicted, so that it costs no
        UNet call.
        """
        wanted = [(row, g, k) for row, (g, k) in enumerate(rows) if g < trees]
        thumbnails = {(g, k): thumbnail(pictures[row]) for row, g, k in wanted}
        firsts = [(row, g) for row, g, k in wanted if k == 0]
        if firsts and rollout.predicted is not None:
            forks = self.policy.decode(rollout.predicted[[row for row, _ in firsts]])
            for (_, g), picture in zip(firsts, forks, strict=True):
                thumbnails[g, FORK] = thumbnail(picture)
        return thumbnails

    def _trajectories(self, rollout: TrajectoryBatch) -> tuple[list[Trajectory], int]:
        """The trajectories of a batch, and the bytes of all of them together."""
        latents, log_probs = to_wire(rollout.latents), rollout.log_probs.cpu().numpy()
        # Copies: a view would make Ray ship the whole batch with every trajectory.
        trajectories = [
            Trajectory(x.copy(), p.copy(), self.version)
            for x, p in zip(latents, log_probs, strict=True)
        ]
        return trajectories, latents.nbytes + log_probs.nbytes

    def _begin(self, unit: WorkUnit) -> Timer:
        if unit.version != self.version:
            raise ValueError(
                f"the unit is for policy version {unit.version}, bound is {self.version}"
            )
        return self.timer()

    def _noise(self, unit: WorkUnit, leaves: list[tuple[int, int]], step: int) -> np.ndarray:
        shape = self.policy.latent_shape
        return normal(unit.seed, unit.domain, unit.stage, leaves, step, shape)
