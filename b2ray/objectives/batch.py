"""The inputs of an update's UNet calls, with one row per trained step of a trajectory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from b2ray.diffusion.trajectory import Selected, from_wire
from b2ray.objectives.steps import SampledSteps


@dataclass(frozen=True)
class Batch:
    """N rows, each a (trajectory, step) pair, ordered by step and then by trajectory.

    Attributes:
        step: index of the denoising step, int64, shape (N,).
        x: latents before the step, shape (N, C, H, W).
        next_latents: latents that were sampled from `x`, same shape.
        old: log-density of `next_latents` when it was sampled, float32, shape (N,).
        advantage: advantage of the trajectory, float32, shape (N,).
        weight: weight of the row in the loss, float32, shape (N,).
        scale: number of rows that the row represents, because steps are sampled, shape (N,).
        own: whether this stage sampled the trajectory (it is not replayed), bool, shape (N,).
        prompts: the prompts of the trajectories, length N.
    """

    step: torch.Tensor
    x: torch.Tensor
    next_latents: torch.Tensor
    old: torch.Tensor
    advantage: torch.Tensor
    weight: torch.Tensor
    scale: torch.Tensor
    own: torch.Tensor
    prompts: list[str]

    def slices(self, size: int) -> Iterator[Batch]:
        """Split the batch into batches of at most `size` rows."""
        for low in range(0, len(self.prompts), size):
            columns: dict[str, Any] = {
                f.name: getattr(self, f.name)[low : low + size] for f in fields(self)
            }
            yield Batch(**columns)


def batch_of(
    selection: Sequence[tuple[Selected, SampledSteps]],
    total: int,
    step_weights: torch.Tensor | None,
    device: torch.device,
) -> Batch:
    """Fetch trajectories and make a batch of their trained steps.

    Args:
        selection: at least one trajectory, each with its sampled steps. The trajectories may have
            different intervals.
        total: T, the number of denoising steps.
        step_weights: weight of each of the T steps, shape (T,). None weights the steps of each
            trajectory by how far they move its latents, |x_t - x_{t-1}|², with mean 1
            (arXiv 2607.07693).
        device: the device of the batch.
    """
    selected = [s for s, _ in selection]
    trajectories = [s.fetch() for s in selected]
    latents = [from_wire(t.latents) for t in trajectories]
    forks = [total - s.interval for s in selected]
    steps = [list(sampled.steps) for _, sampled in selection]
    if step_weights is None:
        weights = [
            _displacements(x, [j - fork for j in indices])
            for x, fork, indices in zip(latents, forks, steps, strict=True)
        ]
    else:
        weights = [step_weights.cpu()[indices] for indices in steps]
    # Triples (step j, trajectory b, position p among the trajectory's sampled steps), by step.
    order = sorted((j, b, p) for b, indices in enumerate(steps) for p, j in enumerate(indices))
    return Batch(
        step=torch.tensor([j for j, _, _ in order]).to(device),
        x=torch.stack([latents[b][j - forks[b]] for j, b, _ in order]).to(device),
        next_latents=torch.stack([latents[b][j - forks[b] + 1] for j, b, _ in order]).to(device),
        old=torch.tensor([float(trajectories[b].log_probs[j - forks[b]]) for j, b, _ in order]).to(
            device
        ),
        advantage=torch.tensor([selected[b].advantage for _, b, _ in order]).to(device),
        weight=torch.stack([weights[b][p] for _, b, p in order]).to(device),
        scale=torch.tensor([selection[b][1].scale[p] for _, b, p in order]).to(device),
        own=torch.tensor([selected[b].age == 0 for _, b, _ in order]).to(device),
        prompts=[selected[b].prompt for _, b, _ in order],
    )


def _displacements(latents: torch.Tensor, steps: list[int]) -> torch.Tensor:
    """Squared distance between the latents before and after each step, divided by the mean."""
    distances = (latents[1:].float() - latents[:-1].float()).square().mean((1, 2, 3))[steps]
    return distances / distances.mean().clamp(min=1e-12)
