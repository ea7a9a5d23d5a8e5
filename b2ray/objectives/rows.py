"""Trajectories as the rows of UNet calls: one for each step that is trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from b2ray.diffusion.trajectory import Selected, from_wire
from b2ray.objectives.steps import Drawn


@dataclass(frozen=True)
class Rows:
    """(Trajectory, step) rows, step by step, then by trajectory: everything has length N.

    Attributes:
        step: index of the denoising step, int64.
        x: latents at the step, (N, C, H, W).
        following: latents that were sampled from there, likewise.
        old: log-density of that, as it was sampled.
        advantage: of the row's trajectory.
        weight: of the row in the objective.
        scale: how many rows it stands for, as not every step is drawn.
        own: whether the trajectory is the stage's own, bool.
    """

    step: torch.Tensor
    x: torch.Tensor
    following: torch.Tensor
    old: torch.Tensor
    advantage: torch.Tensor
    weight: torch.Tensor
    scale: torch.Tensor
    own: torch.Tensor
    prompts: list[str]

    def slices(self, size: int) -> Iterator[Rows]:
        """Cut into UNet calls of at most `size` rows."""
        for low in range(0, len(self.prompts), size):
            part: dict[str, Any] = {
                f.name: getattr(self, f.name)[low : low + size] for f in fields(self)
            }
            yield Rows(**part)


def rows_of(
    batch: Sequence[tuple[Selected, Drawn]],
    total: int,
    step_weights: torch.Tensor | None,
    device: torch.device,
) -> Rows:
    """The rows of a batch, which is fetched; trajectories may have different intervals.

    Args:
        batch: at least one trajectory, each with those of its steps that are trained.
        total: T.
        step_weights: weight of each of T steps; None weighs a trajectory's steps by how far they
            move its latents, |x_t - x_{t-1}|², with mean 1 (arXiv 2607.07693).
        device: where the rows are put.
    """
    chosen = [s for s, _ in batch]
    trajectories = [s.fetch() for s in chosen]
    latents = [from_wire(t.latents) for t in trajectories]
    forks = [total - s.interval for s in chosen]
    steps = [list(drawn.steps) for _, drawn in batch]
    if step_weights is None:
        weights = [
            _moves(x, [j - fork for j in own])
            for x, fork, own in zip(latents, forks, steps, strict=True)
        ]
    else:
        weights = [step_weights.cpu()[own] for own in steps]
    # (step, trajectory, position among the trajectory's drawn steps), step by step.
    order = sorted((j, b, p) for b, own in enumerate(steps) for p, j in enumerate(own))
    return Rows(
        step=torch.tensor([j for j, _, _ in order]).to(device),
        x=torch.stack([latents[b][j - forks[b]] for j, b, _ in order]).to(device),
        following=torch.stack([latents[b][j - forks[b] + 1] for j, b, _ in order]).to(device),
        old=torch.tensor([float(trajectories[b].log_probs[j - forks[b]]) for j, b, _ in order]).to(
            device
        ),
        advantage=torch.tensor([chosen[b].advantage for _, b, _ in order]).to(device),
        weight=torch.stack([weights[b][p] for _, b, p in order]).to(device),
        scale=torch.tensor([batch[b][1].scale[p] for _, b, p in order]).to(device),
        own=torch.tensor([chosen[b].age == 0 for _, b, _ in order]).to(device),
        prompts=[chosen[b].prompt for _, b, _ in order],
    )


def _moves(latents: torch.Tensor, steps: list[int]) -> torch.Tensor:
    """Squared distance of each of these steps over their mean."""
    moved = (latents[1:].float() - latents[:-1].float()).square().mean((1, 2, 3))[steps]
    return moved / moved.mean().clamp(min=1e-12)
