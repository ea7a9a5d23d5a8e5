"""The figures that an update reports."""

from __future__ import annotations

import math

import torch

from b2ray.objectives.ranks import Ranks


class UpdateMetrics:
    """Running sums for the figures of an update, of this rank alone until they are shared.

    The sums are kept on the device of the rows, so that nothing waits for a GPU before the end.

    Args:
        steps: T, the number of denoising steps.
        ranks: the communication with the other ranks.
        device: the device of the rows.
    """

    def __init__(self, steps: int, ranks: Ranks, device: torch.device) -> None:
        self.ranks = ranks
        with device:
            self.count = torch.zeros(steps)
            self.clipped = torch.zeros(steps)
            self.squared_grad = torch.zeros(steps)
            self.kl = torch.zeros((), dtype=torch.float64)
            self.kl_reference = torch.zeros(2, dtype=torch.float64)  # sum, number of rows
            self.drift = torch.zeros(2)  # sum of |ratio - 1|, number of rows
            self.drift_max = torch.zeros(())
        self.norms: list[torch.Tensor] = []

    def add(
        self,
        step: torch.Tensor,
        log_ratio: torch.Tensor,
        clipped: torch.Tensor,
        drift: torch.Tensor | None,
    ) -> None:
        """Add N rows of a batch.

        Args:
            step: index of each row's denoising step, int64, shape (N,).
            log_ratio: log-density under the trained weights minus that under the sampling ones,
                shape (N,).
            clipped: whether the gradient of each row was clipped away, bool, shape (N,).
            drift: for the batch before the first optimizer step, the rows whose distance of the
                ratio from 1 is measured, bool, shape (N,); None for other batches.
        """
        self.count.index_add_(0, step, torch.ones_like(log_ratio))
        self.clipped.index_add_(0, step, clipped.float())
        # John Schulman's unbiased estimate of KL(old || new) with low variance.
        self.kl += (log_ratio.exp() - 1 - log_ratio).sum()
        if drift is not None and drift.any():
            distance = (log_ratio.exp() - 1).abs()[drift]
            self.drift += torch.stack([distance.sum(), torch.ones_like(distance).sum()])
            self.drift_max = torch.maximum(self.drift_max, distance.max())

    def add_kl(self, kl: torch.Tensor, scale: torch.Tensor) -> None:
        """Add the divergence from the base model of N rows.

        Args:
            kl: divergence of each row, shape (N,).
            scale: number of rows that each row represents, shape (N,).
        """
        self.kl_reference += torch.stack([(kl.detach() * scale).sum(), scale.sum()])

    def add_gradient(self, step: torch.Tensor, gradient: torch.Tensor) -> None:
        """Add the gradients of N rows.

        Args:
            step: index of each row's denoising step, int64, shape (N,).
            gradient: gradient of each row's own loss by its guided output, shape (N, C, H, W).
        """
        self.squared_grad.index_add_(0, step, (gradient**2).sum((1, 2, 3)))

    def step(self, norm: torch.Tensor) -> None:
        """Count an optimizer step, which is skipped if the norm of its gradient is not finite."""
        self.norms.append(norm.detach())

    def share_drift(self) -> None:
        """Sum the drift over the ranks; to be called once, before the drift is read."""
        self.ranks.sum([self.drift])
        self.drift_max = self.ranks.largest(self.drift_max)

    @property
    def drift_mean(self) -> float:
        """Mean |ratio - 1| over the rows that are measured; 0 if there are none."""
        return float(self.drift[0] / self.drift[1].clamp(min=1))

    def figures(self) -> dict[str, float]:
        """The figures over the rows of all ranks; to be called once, at the end."""
        self.ranks.sum([self.count, self.clipped, self.squared_grad, self.kl, self.kl_reference])
        total = float(self.count.sum())
        if total == 0:
            return {"policy/updates": 0.0, "policy/rows": 0.0}
        finite_norms = [n for n in torch.stack(self.norms).tolist() if math.isfinite(n)]
        drift = {
            "policy/ratio_drift": self.drift_mean,
            "policy/ratio_drift_max": float(self.drift_max),
        }
        divergence, count = self.kl_reference.tolist()
        reference = {"policy/kl_reference": divergence / count} if count else {}
        figures = {
            "policy/updates": float(len(finite_norms)),
            "policy/rows": total,
            "policy/skipped_updates": float(len(self.norms) - len(finite_norms)),
            **(drift if self.drift[1] else {}),
            "policy/clip_fraction": float(self.clipped.sum()) / total,
            "policy/approx_kl": float(self.kl) / total,
            **reference,
            "policy/grad_norm": sum(finite_norms) / max(1, len(finite_norms)),
        }
        for step in self.count.nonzero().flatten().tolist():
            figures[f"policy/clip_fraction/step_{step:02d}"] = float(
                self.clipped[step] / self.count[step]
            )
            figures[f"policy/grad_norm/step_{step:02d}"] = float(
                (self.squared_grad[step] / self.count[step]).sqrt()
            )
        return figures
