"""The stochastic DDIM step and its log-density, on one table that sampler and learner share.

Symbols as in the DDIM paper (arXiv 2010.02502): a_t is the cumulative product of alphas; the
transition x_t -> x_{t'} has mean sqrt(a_t')·x0 + sqrt(1 - a_t' - s²)·eps and standard deviation
s = eta·sqrt((1 - a_t')/(1 - a_t))·sqrt(1 - a_t/a_t') (equations 12 and 16).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from diffusers import DDIMScheduler

from b2ray.errors import ConfigError

# Below this the density is so narrow that rounding decides it: such steps are sampled, not trained.
MIN_SIGMA = 1e-4


@dataclass(frozen=True)
class Schedule:
    """T denoising steps. Row i goes from timestep t_i to t_{i+1}; row T - 1 ends at the image.

    All tensors have shape (T,); `timesteps` is int64, the others are float32.
    """

    timesteps: torch.Tensor
    alpha: torch.Tensor
    alpha_next: torch.Tensor
    sigma: torch.Tensor
    prediction: str
    clip_x0: float | None

    @classmethod
    def from_config(cls, config: Mapping[str, Any], steps: int, eta: float) -> Self:
        """The table for a model's own scheduler configuration.

        Args:
            config: `pipeline.scheduler.config` (of any diffusers scheduler for the model).
            steps: T.
            eta: stochasticity, 0..1.

        Raises:
            ConfigError: for settings whose transition has no Gaussian density here.
        """
        # Other schedulers do not clip x0 and do not write the field; DDIM's own default is to clip.
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
        # Chosen on the unclamped index: only a step that really leaves the table ends at the image.
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
        """The same table on a device."""
        return replace(
            self,
            timesteps=self.timesteps.to(device),
            alpha=self.alpha.to(device),
            alpha_next=self.alpha_next.to(device),
            sigma=self.sigma.to(device),
        )

    @property
    def steps(self) -> int:
        """T."""
        return len(self.timesteps)

    @property
    def trainable(self) -> tuple[bool, ...]:
        """For each step whether its density is wide enough to train."""
        return tuple((self.sigma >= MIN_SIGMA).tolist())

    def sensitivity(self) -> torch.Tensor:
        """|d log p / d output| of a step up to its own noise, |d mean / d output| / sigma, (T,).

        The mean is linear in x0 and eps (equation 12 of the DDIM paper), and both are in the
        model's output; infinite where sigma is 0.
        """
        a, a_next = self.alpha, self.alpha_next
        of_x0, of_eps = a_next.sqrt(), (1 - a_next - self.sigma**2).clamp(min=0).sqrt()
        if self.prediction == "epsilon":
            slope = of_eps - of_x0 * ((1 - a) / a).sqrt()
        elif self.prediction == "v_prediction":
            slope = of_eps * a.sqrt() - of_x0 * (1 - a).sqrt()
        else:
            slope = of_x0 - of_eps * (a / (1 - a)).sqrt()
        return slope.abs() / self.sigma

    def reach(self) -> torch.Tensor:
        """How far a step's noise moves the latents, in units of the picture that is in them: its
        sigma over the signal's share after the step, sqrt(a_t'), shape (T,)."""
        return self.sigma / self.alpha_next.sqrt()

    def predicted_image(
        self, i: torch.Tensor, x: torch.Tensor, output: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(x0, eps) that the model's output stands for, float32.

        Args:
            i: step indices, int64, shape (B,).
            x: latents at t_i, shape (B, C, H, W).
            output: the model's guided output for them, same shape.
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
        """Mean of the transition out of step i, float32; arguments as `predicted_image`."""
        return self._towards(i, *self.predicted_image(i, x, output))

    def noised(self, i: torch.Tensor, x0: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """A sample of q(x_t | x_0) at the start of step i (equation 4), float32.

        Args:
            i: step indices, int64, shape (B,).
            x0: latents of pictures, shape (B, C, H, W).
            noise: standard normal, same shape.
        """
        a = _column(self.alpha[i])
        return a.sqrt() * x0.float() + (1 - a).sqrt() * noise.float()

    def posterior(self, i: torch.Tensor, x: torch.Tensor, x0: torch.Tensor) -> torch.Tensor:
        """Mean of q(x_{t'} | x_t, x_0) out of step i (equation 7), float32; its spread is sigma.

        Args:
            i, x: as `predicted_image`.
            x0: latents of the picture that x is a noisy version of, same shape.
        """
        a, x0 = _column(self.alpha[i]), x0.float()
        return self._towards(i, x0, (x.float() - a.sqrt() * x0) / (1 - a).sqrt())

    def _towards(self, i: torch.Tensor, x0: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
        a_next, sigma = _column(self.alpha_next[i]), _column(self.sigma[i])
        return a_next.sqrt() * x0 + (1 - a_next - sigma**2).clamp(min=0).sqrt() * eps

    def step(
        self, i: torch.Tensor, x: torch.Tensor, output: torch.Tensor, noise: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sample the transition.

        The sample is rounded to the dtype of `x` first and scored after that, so that scoring the
        stored sample again gives the same density.

        Args:
            i, x, output: as `predicted_image`.
            noise: standard normal, same shape as x.

        Returns:
            The next latents in the dtype of x, and their log-density as `log_prob`, shape (B,).
        """
        mean = self.mean(i, x, output)
        following = self.draw(i, mean, noise, x.dtype)
        return following, self._density(i, mean, following)

    def draw(
        self, i: torch.Tensor, mean: torch.Tensor, noise: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        """A sample around the mean of a transition out of step i, rounded to the dtype."""
        return (mean + _column(self.sigma[i]) * noise.float()).to(dtype)

    def log_prob(
        self, i: torch.Tensor, x: torch.Tensor, output: torch.Tensor, following: torch.Tensor
    ) -> torch.Tensor:
        """Log-density of `following` under the transition out of step i.

        The Gaussian log-density averaged over the latent's elements (arXiv 2305.13301's
        implementation), float32, shape (B,). Zero where sigma is below `MIN_SIGMA`.
        """
        return self._density(i, self.mean(i, x, output), following)

    def kl(
        self, i: torch.Tensor, x: torch.Tensor, output: torch.Tensor, reference: torch.Tensor
    ) -> torch.Tensor:
        """KL divergence of the transition out of step i from the one that `reference` gives.

        Both are Gaussians of the same sigma: |mean - mean_ref|² / (2 sigma²), averaged over the
        latent's elements as `log_prob` is; float32, shape (B,), zero where sigma is below
        `MIN_SIGMA`. Arguments as `predicted_image`.
        """
        return self._apart(i, self.mean(i, x, output) - self.mean(i, x, reference))

    def kl_of_posterior(
        self, i: torch.Tensor, x: torch.Tensor, output: torch.Tensor, x0: torch.Tensor
    ) -> torch.Tensor:
        """KL divergence of `posterior` from the transition out of step i, in the form of `kl`."""
        return self._apart(i, self.mean(i, x, output) - self.posterior(i, x, x0))

    def _apart(self, i: torch.Tensor, means: torch.Tensor) -> torch.Tensor:
        """KL divergence of two transitions out of step i whose means differ by `means`."""
        sigma = self.sigma[i]
        safe = _column(sigma.clamp(min=MIN_SIGMA))
        return (means**2 / (2 * safe**2)).mean(dim=(1, 2, 3)) * (sigma >= MIN_SIGMA)

    def _density(
        self, i: torch.Tensor, mean: torch.Tensor, following: torch.Tensor
    ) -> torch.Tensor:
        sigma = self.sigma[i]
        safe = _column(sigma.clamp(min=MIN_SIGMA))
        log_density = (
            -((following.float() - mean) ** 2) / (2 * safe**2)
            - safe.log()
            - 0.5 * math.log(2 * math.pi)
        )
        return log_density.mean(dim=(1, 2, 3)) * (sigma >= MIN_SIGMA)


def _column(values: torch.Tensor) -> torch.Tensor:
    return values[:, None, None, None]
