"""The stochastic DDIM step and its log-density, from one table that sampler and learner share.

The symbols are those of the DDIM paper (arXiv 2010.02502): a_t is the cumulative product of
alphas. The transition x_t -> x_{t'} has mean sqrt(a_t')·x0 + sqrt(1 - a_t' - s²)·eps and standard
deviation s = eta·sqrt((1 - a_t')/(1 - a_t))·sqrt(1 - a_t/a_t') (equations 12 and 16).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from diffusers import DDIMScheduler

from b2ray.errors import ConfigError

# Below this standard deviation rounding errors dominate the density, so such steps are sampled but
# not trained.
MIN_SIGMA = 1e-4


@dataclass(frozen=True)
class Schedule:
    """A table of T denoising steps, of which step T - 1 ends at the image.

    All tensors have shape (T,); `timesteps` is int64, the others are float32.

    Attributes:
        timesteps: t_i, the timestep at which step i starts.
        alpha: a_t at the start of each step.
        alpha_next: a_t' at the end of each step.
        sigma: standard deviation of each step's transition.
        prediction: what the model predicts: epsilon, v_prediction or sample.
        clip_x0: bound to which the predicted x0 is clipped; None if it is not clipped.
    """

    timesteps: torch.Tensor
    alpha: torch.Tensor
    alpha_next: torch.Tensor
    sigma: torch.Tensor
    prediction: str
    clip_x0: float | None

    @classmethod
    def from_config(cls, config: Mapping[str, Any], steps: int, eta: float) -> Self:
        """Make the table for a model's own scheduler configuration.

        Args:
            config: `pipeline.scheduler.config` (of any diffusers scheduler for the model).
            steps: T, the number of denoising steps.
            eta: stochasticity, from 0 (deterministic) to 1.

        Raises:
            ConfigError: the transitions of these settings have no Gaussian density, or the model
                has too few timesteps.
        """
        # DDIM clips x0 by default. Other schedulers do not, and lack the field.
        scheduler = DDIMScheduler.from_config(
            dict(config), clip_sample=config.get("clip_sample", False)
        )
        conf = scheduler.config
        if conf.thresholding:
            raise ConfigError(
                "the model's scheduler has thresholding=True, whose step has no Gaussian density: "
                "set it to false in scheduler_config.json"
            )
        if conf.prediction_type not in ("epsilon", "v_prediction", "sample"):
            raise ConfigError(
                f"the model's scheduler has prediction_type={conf.prediction_type!r}: "
                "epsilon, v_prediction and sample are supported"
            )
        if steps > conf.num_train_timesteps:
            raise ConfigError(
                f"sampling.steps is {steps}, but the model was trained with "
                f"{conf.num_train_timesteps} timesteps: use fewer"
            )
        scheduler.set_timesteps(steps)
        t = scheduler.timesteps
        if t.max() >= conf.num_train_timesteps:
            raise ConfigError(
                f"sampling.steps is {steps}: with the scheduler's steps_offset the first "
                "timestep is beyond the model's table; use fewer"
            )
        t_next = t - conf.num_train_timesteps // steps
        alpha = scheduler.alphas_cumprod[t]
        if conf.prediction_type == "epsilon" and alpha.min() <= 0:
            raise ConfigError(
                "the model's scheduler has rescale_betas_zero_snr=True with epsilon prediction, "
                "which at pure noise says nothing of the image: use prediction_type=v_prediction"
            )
        # The condition uses the unclamped index: only a step beyond the table ends at the image.
        alpha_next = torch.where(
            t_next >= 0,
            scheduler.alphas_cumprod[t_next.clamp(min=0)],
            scheduler.final_alpha_cumprod,
        )
        variance = (1 - alpha_next) / (1 - alpha) * (1 - alpha / alpha_next)
        sigma = eta * variance.clamp(min=0) ** 0.5
        clip = conf.clip_sample_range if conf.clip_sample else None
        return cls(t, alpha, alpha_next, sigma, conf.prediction_type, clip)

    def to(self, device: torch.device | str) -> Schedule:
        """Copy the table to a device."""
        return replace(
            self,
            timesteps=self.timesteps.to(device),
            alpha=self.alpha.to(device),
            alpha_next=self.alpha_next.to(device),
            sigma=self.sigma.to(device),
        )

    @property
    def steps(self) -> int:
        """T, the number of denoising steps."""
        return len(self.timesteps)

    @property
    def trainable(self) -> tuple[bool, ...]:
        """For each step, whether its density is wide enough to train."""
        return tuple((self.sigma >= MIN_SIGMA).tolist())

    def sensitivity(self) -> torch.Tensor:
        """How strongly each step's density depends on the model's output, shape (T,).

        This is |d mean / d output| / sigma, which is |d log p / d output| without the factor of
        the step's own noise. The mean is linear in x0 and eps (equation 12 of the DDIM paper), and
        both are linear in the model's output. The value is infinite where sigma is 0.
        """
        a, a_next = self.alpha, self.alpha_next
        x0_weight, eps_weight = a_next.sqrt(), (1 - a_next - self.sigma**2).clamp(min=0).sqrt()
        if self.prediction == "epsilon":
            slope = eps_weight - x0_weight * ((1 - a) / a).sqrt()
        elif self.prediction == "v_prediction":
            slope = eps_weight * a.sqrt() - x0_weight * (1 - a).sqrt()
        else:
            slope = x0_weight - eps_weight * (a / (1 - a)).sqrt()
        return slope.abs() / self.sigma

    def reach(self) -> torch.Tensor:
        """How far each step's noise moves the latents, relative to their signal, shape (T,).

        This is sigma / sqrt(a_t'), where sqrt(a_t') is the factor of the image after the step.
        """
        return self.sigma / self.alpha_next.sqrt()

    def predicted_image(
        self, i: torch.Tensor, x: torch.Tensor, output: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The image and the noise that the model's output implies.

        Args:
            i: step indices, int64, shape (B,).
            x: latents at t_i, shape (B, C, H, W).
            output: the model's guided output for `x`, same shape.

        Returns:
            x0, clipped if the table says so, and eps; float32, same shape as x.
        """
        x, output = x.float(), output.float()
        a = _column(self.alpha[i])
        b = 1 - a
        if self.prediction == "epsilon":
            x0, eps = (x - b.sqrt() * output) / a.sqrt(), output
        elif self.prediction == "v_prediction":
            x0, eps = a.sqrt() * x - b.sqrt() * output, a.sqrt() * output + b.sqrt() * x
        else:
            x0, eps = output, (x - a.sqrt() * output) / b.sqrt()
        return (x0 if self.clip_x0 is None else x0.clamp(-self.clip_x0, self.clip_x0)), eps

    def mean(self, i: torch.Tensor, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """Mean of the transition of step i, float32; arguments as in `predicted_image`."""
        return self._transition_mean(i, *self.predicted_image(i, x, output))

    def noised(self, i: torch.Tensor, x0: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """A sample of q(x_t | x_0) at the start of step i (equation 4), float32.

        Args:
            i: step indices, int64, shape (B,).
            x0: latents of pictures, shape (B, C, H, W).
            noise: standard normal noise, same shape.
        """
        a = _column(self.alpha[i])
        return a.sqrt() * x0.float() + (1 - a).sqrt() * noise.float()

    def posterior(self, i: torch.Tensor, x: torch.Tensor, x0: torch.Tensor) -> torch.Tensor:
        """Mean of q(x_{t'} | x_t, x_0) for step i (equation 7), float32.

        The standard deviation is sigma.

        Args:
            i, x: as in `predicted_image`.
            x0: latents of the picture of which x is a noisy version, same shape.
        """
        a, x0 = _column(self.alpha[i]), x0.float()
        return self._transition_mean(i, x0, (x.float() - a.sqrt() * x0) / (1 - a).sqrt())

    def _transition_mean(
        self, i: torch.Tensor, x0: torch.Tensor, eps: torch.Tensor
    ) -> torch.Tensor:
        """Mean of the transition of step i for an image and noise (equation 12)."""
        a_next, sigma = _column(self.alpha_next[i]), _column(self.sigma[i])
        return a_next.sqrt() * x0 + (1 - a_next - sigma**2).clamp(min=0).sqrt() * eps

    def step(
        self, i: torch.Tensor, x: torch.Tensor, output: torch.Tensor, noise: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sample the transition of step i.

        The sample is rounded to the dtype of `x` before its density is computed, so that computing
        the density of the stored sample again gives the same value.

        Args:
            i, x, output: as in `predicted_image`.
            noise: standard normal noise, same shape as x.

        Returns:
            The next latents in the dtype of x, and their log-density as in `log_prob`, shape (B,).
        """
        mean = self.mean(i, x, output)
        next_latents = self.draw(i, mean, noise, x.dtype)
        return next_latents, self._gaussian_log_prob(i, mean, next_latents)

    def draw(
        self, i: torch.Tensor, mean: torch.Tensor, noise: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        """A sample of the transition of step i with this mean, rounded to the dtype."""
        return (mean + _column(self.sigma[i]) * noise.float()).to(dtype)

    def log_prob(
        self, i: torch.Tensor, x: torch.Tensor, output: torch.Tensor, next_latents: torch.Tensor
    ) -> torch.Tensor:
        """Log-density of `next_latents` under the transition of step i.

        The Gaussian log-density is averaged over the elements of a latent, as in the implementation
        of arXiv 2305.13301.

        Args:
            i, x, output: as in `predicted_image`.
            next_latents: latents after the step, same shape as x.

        Returns:
            float32, shape (B,); zero where sigma is below `MIN_SIGMA`.
        """
        return self._gaussian_log_prob(i, self.mean(i, x, output), next_latents)

    def kl(
        self, i: torch.Tensor, x: torch.Tensor, output: torch.Tensor, reference: torch.Tensor
    ) -> torch.Tensor:
        """KL divergence of the transition of step i from that of a reference model.

        Both transitions are Gaussians with the same sigma, so the divergence is
        |mean - mean_ref|² / (2 sigma²), averaged over the elements of a latent as in `log_prob`.

        Args:
            i, x, output: as in `predicted_image`.
            reference: the reference model's guided output for `x`, same shape.

        Returns:
            float32, shape (B,); zero where sigma is below `MIN_SIGMA`.
        """
        return self._gaussian_kl(i, self.mean(i, x, output) - self.mean(i, x, reference))

    def kl_of_posterior(
        self, i: torch.Tensor, x: torch.Tensor, output: torch.Tensor, x0: torch.Tensor
    ) -> torch.Tensor:
        """KL divergence of `posterior` from the transition of step i.

        Args:
            i, x, output, x0: as in `predicted_image` and `posterior`.

        Returns:
            As `kl`.
        """
        return self._gaussian_kl(i, self.mean(i, x, output) - self.posterior(i, x, x0))

    def _gaussian_kl(self, i: torch.Tensor, mean_difference: torch.Tensor) -> torch.Tensor:
        """KL divergence of two transitions of step i, from the difference of their means."""
        sigma = self.sigma[i]
        clamped = _column(sigma.clamp(min=MIN_SIGMA))
        divergence = mean_difference**2 / (2 * clamped**2)
        return divergence.mean(dim=(1, 2, 3)) * (sigma >= MIN_SIGMA)

    def _gaussian_log_prob(
        self, i: torch.Tensor, mean: torch.Tensor, next_latents: torch.Tensor
    ) -> torch.Tensor:
        """Log-density of latents under the transition of step i with this mean; see `log_prob`."""
        sigma = self.sigma[i]
        clamped = _column(sigma.clamp(min=MIN_SIGMA))
        log_density = (
            -((next_latents.float() - mean) ** 2) / (2 * clamped**2)
            - clamped.log()
            - 0.5 * math.log(2 * math.pi)
        )
        return log_density.mean(dim=(1, 2, 3)) * (sigma >= MIN_SIGMA)


def _column(values: torch.Tensor) -> torch.Tensor:
    """Values of shape (B,) as (B, 1, 1, 1), for products with latents."""
    return values[:, None, None, None]
