"""Figures of an update."""

from __future__ import annotations

import math

import torch

from b2ray.objectives.ranks import Ranks


class Meter:
    """Figures of an update, summed on the way; this rank's, until they are shared.

    Summed where the rows are, so that nothing waits for a GPU before the end.
    """

    def __init__(self, steps: int, ranks: Ranks, device: torch.device) -> None:
        self.ranks = ranks
        with device:
            self.count = torch.zeros(steps)
            self.clipped = torch.zeros(steps)
            self.squared_grad = torch.zeros(steps)
            self.kl = torch.zeros((), dtype=torch.float64)
            self.kl_reference = torch.zeros(2, dtype=torch.float64)  # sum, and of how many rows
            self.drift, self.drift_max = torch.zeros(2), torch.zeros(())
        self.norms: list[torch.Tensor] = []

    def add(
        self,
        step: torch.Tensor,
        log_ratio: torch.Tensor,
        clipped: torch.Tensor,
        drift: torch.Tensor | None,
    ) -> None:
        """Take in rows, of which those in `drift` (bool, (N,)) tell how far the ratio is from 1
        before any update."""
        self.count.index_add_(0, step, torch.ones_like(log_ratio))
        self.clipped.index_add_(0, step, clipped.float())
        # John Schulman's unbiased estimate of KL(old || new) with low variance.
        self.kl += (log_ratio.exp() - 1 - log_ratio).sum()
        if drift is not None and drift.any():
            off = (log_ratio.exp() - 1).abs()[drift]
            self.drift += torch.stack([off.sum(), torch.ones_like(off).sum()])
            self.drift_max = torch.maximum(self.drift_max, off.max())

    def add_kl(self, kl: torch.Tensor, scale: torch.Tensor) -> None:
        """Divergence of each pair from the base model, and how many rows the pair stands for."""
        self.kl_reference += torch.stack([(kl.detach() * scale).sum(), scale.sum()])

    def add_gradient(self, step: torch.Tensor, gradient: torch.Tensor) -> None:
        """Gradient of each pair's own loss by its guided output, shape (N, C, H, W)."""
        self.squared_grad.index_add_(0, step, (gradient**2).sum((1, 2, 3)))

    def step(self, norm: torch.Tensor) -> None:
        """An optimizer step, or one that was skipped, with this norm of its gradient."""
        self.norms.append(norm.detach())

    def share_drift(self) -> None:
        """Add up what the ranks have seen of the drift: once, before it is read."""
        self.ranks.sum([self.drift])
        self.drift_max = self.ranks.largest(self.drift_max)

    @property
    def drift_mean(self) -> float:
        """Mean |ratio - 1| of the rows that tell; 0 if none does."""
        return float(self.drift[0] / self.drift[1].clamp(min=1))

    def figures(self) -> dict[str, float]:
        """Means over all rows of all ranks, and per denoising step: once, at the end."""
        self.ranks.sum([self.count, self.clipped, self.squared_grad, self.kl, self.kl_reference])
        total = float(self.count.sum())
        if total == 0:
            return {"policy/updates": 0.0, "policy/rows": 0.0}
        finite = [n for n in torch.stack(self.norms).tolist() if math.isfinite(n)]
        drift = {
            "policy/ratio_drift": self.drift_mean,
            "policy/ratio_drift_max": float(self.drift_max),
        }
        divergence, rows = self.kl_reference.tolist()
        reference = {"policy/kl_reference": divergence / rows} if rows else {}
        figures = {
            "policy/updates": float(len(finite)),
            "policy/rows": total,
            "policy/skipped_updates": float(len(self.norms) - len(finite)),
            **(drift if self.drift[1] else {}),
            "policy/clip_fraction": float(self.clipped.sum()) / total,
            "policy/approx_kl": float(self.kl) / total,
            **reference,
            "policy/grad_norm": sum(finite) / max(1, len(finite)),
        }
        for step in self.count.nonzero().flatten().tolist():
            figures[f"policy/clip_fraction/step_{step:02d}"] = float(
                self.clipped[step] / self.count[step]
            )
            figures[f"policy/grad_norm/step_{step:02d}"] = float(
                (self.squared_grad[step] / self.count[step]).sqrt()
            )
        return figures
