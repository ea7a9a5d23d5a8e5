"""A Stable Diffusion pipeline as a policy that denoises latents and decodes pictures."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from b2ray.config import Config
from b2ray.diffusion import lora
from b2ray.diffusion.clock import Clock
from b2ray.diffusion.families import Condition
from b2ray.diffusion.load import load_pipeline
from b2ray.diffusion.lora_file import State
from b2ray.diffusion.schedule import Schedule
from b2ray.errors import ConfigError

Noise = Callable[[int], np.ndarray]  # step index -> standard normal noise, float32, (B, C, H, W)


@dataclass(frozen=True)
class TrajectoryBatch:
    """The result of denoising a batch of B latents from step `first` to step `last`.

    Attributes:
        latents: x at t_first .. t_last in the policy's dtype, shape (B, last - first + 1, C, H, W).
        log_probs: log-density of each sampled step, float32, shape (B, last - first).
        predicted: x0 as predicted at t_first, float32, shape (B, C, H, W); None without steps.
    """

    latents: torch.Tensor
    log_probs: torch.Tensor
    predicted: torch.Tensor | None = None


class Policy:
    """pi_theta(x_{t-1} | x_t, prompt) of a pipeline with a LoRA on its UNet.

    Args:
        config: the run's configuration, of which the model, the sampling and the seed are used.
        device: the device on which the policy runs.
        decoder: whether `decode` will be called; if not, the VAE stays off the device.

    Raises:
        ConfigError: the model cannot be loaded, or cannot make pictures of the configured size.
    """

    def __init__(self, config: Config, device: torch.device, decoder: bool = True) -> None:
        self.config, self.device = config, device
        self.dtype = getattr(torch, config.model.dtype)
        self.guidance = config.sampling.guidance
        self.pipeline, self.family = load_pipeline(config.model)
        self.latent_shape = _latent_shape(self.pipeline, config)
        self._prepare_frozen(decoder)
        self._prepare_unet()
        table = Schedule.from_config(
            self.pipeline.scheduler.config, config.sampling.steps, config.sampling.eta
        )
        self.schedule = table.to(device)
        self._conditions: dict[str | None, Condition] = {}
        self.unet_evals = (
            0  # guided evaluations of one latent: both halves of guidance count as one
        )
        self.clock = Clock(device)  # measures the time of the UNet alone

    def bind(self, weights: State) -> str:
        """Replace the values of the LoRA and return the digest of the new ones (`lora.bind`)."""
        return lora.bind(self.pipeline.unet, weights)

    def lora_state(self) -> dict[str, np.ndarray]:
        """A copy of the LoRA's values as float32 arrays."""
        return lora.state(self.pipeline.unet)

    @contextlib.contextmanager
    def reference(self) -> Iterator[None]:
        """A context in which the adapter is switched off, so that the policy is the base model."""
        for layer in self._adapted:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in self._adapted:
                layer.enable_adapters(True)

    def too_long(self, prompts: Sequence[str]) -> list[str]:
        """The prompts whose end a tokenizer cuts off."""
        tokenizers = [getattr(self.pipeline, name) for name in self.family.TOKENIZERS]
        return [
            p
            for p in prompts
            if any(len(t(p, truncation=False).input_ids) > t.model_max_length for t in tokenizers)
        ]

    @torch.no_grad()
    def prepare(self, prompts: Sequence[str]) -> None:
        """Encode prompts in advance.

        Each prompt is encoded once and alone, so that its encoding does not depend on a batch.
        """
        new = [p for p in dict.fromkeys([None, *prompts]) if p not in self._conditions]
        if not new:
            return
        names, size = self.family.ENCODERS, self.picture_size
        with self._on_device(*(getattr(self.pipeline, name) for name in names)):
            for prompt in new:
                condition = self.family.encode(self.pipeline, prompt, *size)
                self._conditions[prompt] = Condition(
                    condition.text.to(self.device),
                    {name: row.to(self.device) for name, row in condition.added.items()},
                )

    @property
    def known(self) -> list[str]:
        """The prompts that have been encoded, in the order of their first encoding."""
        return [p for p in self._conditions if p is not None]

    def encode(self, prompts: Sequence[str | None]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The conditions of B prompts, of which None is the unconditional one.

        Returns:
            The text, shape (B, L, D), and the added conditions by name, each of shape (B, …).
        """
        self.prepare([p for p in prompts if p is not None])
        rows = [self._conditions[p] for p in prompts]
        added = {name: torch.stack([r.added[name] for r in rows]) for name in rows[0].added}
        return torch.stack([r.text for r in rows]), added

    def predict(self, i: torch.Tensor, x: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """The UNet's guided output (arXiv 2207.12598, equation 6).

        Sampling and re-scoring both call this method, so that their densities agree.

        Args:
            i: step index of each row, int64, shape (B,).
            x: latents, shape (B, C, H, W).
            prompts: B prompts.

        Returns:
            float32, shape (B, C, H, W).
        """
        t = self.schedule.timesteps[i]
        self.unet_evals += len(x)
        if self.guidance <= 1:
            return self._unet(x, t, prompts)
        # One call computes both halves of guidance.
        doubled_prompts = [*([None] * len(prompts)), *prompts]
        output = self._unet(torch.cat([x, x]), torch.cat([t, t]), doubled_prompts)
        unconditional, conditional = output.chunk(2)
        guided = unconditional + self.guidance * (conditional - unconditional)
        rescale = self.config.sampling.guidance_rescale
        if rescale == 0:
            return guided
        # arXiv 2305.08891, equations 15 and 16.
        rescaled = guided * (_std(conditional) / _std(guided))
        return rescale * rescaled + (1 - rescale) * guided

    @torch.no_grad()
    def denoise(
        self, x: torch.Tensor, prompts: Sequence[str], first: int, last: int, noise: Noise
    ) -> TrajectoryBatch:
        """Sample the steps first .. last - 1.

        Args:
            x: latents at t_first, shape (B, C, H, W).
            prompts: B prompts.
            first: index of the first step.
            last: index after the last step.
            noise: the noise of each step.

        Raises:
            ValueError: the latents are not finite, because the model overflows in its precision.
        """
        x = x.to(self.device, self.dtype)
        latents, log_probs, predicted = [x], [], None
        for step in range(first, last):
            i = torch.full((len(x),), step, dtype=torch.int64, device=self.device)
            output = self.predict(i, x, prompts)
            if step == first:
                predicted, _ = self.schedule.predicted_image(i, x, output)
            step_noise = torch.from_numpy(noise(step)).to(self.device)
            x, log_prob = self.schedule.step(i, x, output, step_noise)
            latents.append(x)
            log_probs.append(log_prob)
        self._check_finite(x, "latents")
        empty = torch.empty(len(x), 0, device=self.device)
        densities = torch.stack(log_probs, 1) if log_probs else empty
        return TrajectoryBatch(torch.stack(latents, 1), densities, predicted)

    @torch.no_grad()
    def demonstrate(
        self, x0: torch.Tensor, prompts: Sequence[str], first: int, start: np.ndarray, noise: Noise
    ) -> tuple[TrajectoryBatch, torch.Tensor]:
        """Sample trajectories that end at given pictures, with their densities under the policy.

        The picture is noised to t_first by q(x_t | x_0). Then every step is a sample of the exact
        posterior q(x_{t'} | x_t, x_0), which is what the policy would do if it knew the picture.

        Args:
            x0: latents of the pictures (`latents_of`), shape (B, C, H, W).
            prompts: B prompts.
            first: index of the first step.
            start: standard normal noise of x at t_first, float32, shape (B, C, H, W).
            noise: the noise of each step.

        Returns:
            The same as `denoise`, and the mean of `Schedule.kl_of_posterior` over the steps,
            float32, shape (B,).

        Raises:
            ValueError: the densities are not finite, because the model overflows in its precision.
        """
        schedule, x0 = self.schedule, x0.to(self.device)
        i = torch.full((len(x0),), first, dtype=torch.int64, device=self.device)
        x = schedule.noised(i, x0, torch.from_numpy(start).to(self.device)).to(self.dtype)
        latents, log_probs, divergences = [x], [], []
        for step in range(first, schedule.steps):
            i = torch.full_like(i, step)
            output = self.predict(i, x, prompts)
            step_noise = torch.from_numpy(noise(step)).to(self.device)
            next_latents = schedule.draw(i, schedule.posterior(i, x, x0), step_noise, x.dtype)
            log_probs.append(schedule.log_prob(i, x, output, next_latents))
            divergences.append(schedule.kl_of_posterior(i, x, output, x0))
            latents.append(next_latents)
            x = next_latents
        batch = TrajectoryBatch(torch.stack(latents, 1), torch.stack(log_probs, 1))
        self._check_finite(batch.log_probs, "densities of demonstrations")
        return batch, torch.stack(divergences, 1).mean(1)

    def log_prob(
        self, i: torch.Tensor, x: torch.Tensor, next_latents: torch.Tensor, prompts: Sequence[str]
    ) -> torch.Tensor:
        """Log-density of stored steps under the current weights.

        Args:
            i, x, prompts: as in `predict`.
            next_latents: latents after the step, same shape as x.

        Returns:
            float32, shape (B,).
        """
        return self.schedule.log_prob(i, x, self.predict(i, x, prompts), next_latents)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> np.ndarray:
        """Decode final latents (B, C, H, W) to uint8 pictures of shape (B, height, width, 3)."""
        pictures = self._with_vae(lambda dtype: self._decode(latents, dtype))
        levels = ((pictures / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
        return levels.permute(0, 2, 3, 1).cpu().numpy()

    @torch.no_grad()
    def latents_of(self, pictures: np.ndarray) -> torch.Tensor:
        """Encode pictures to x_0: the mode of the VAE's distribution, scaled.

        Args:
            pictures: uint8, shape (B, height, width, 3), of the policy's `picture_size`.

        Returns:
            float32 on the CPU, shape (B, C, H, W).

        Raises:
            ValueError: the latents are not finite.
        """
        levels = torch.from_numpy(pictures).to(self.device).permute(0, 3, 1, 2)
        latents = self._with_vae(lambda dtype: self._encode(levels.float() / 127.5 - 1, dtype))
        if not latents.isfinite().all():
            raise ValueError("the VAE's latents of a demonstration are not finite")
        return latents.cpu()

    @property
    def picture_size(self) -> tuple[int, int]:
        """(height, width) of the policy's pictures in pixels."""
        _, height, width = self.latent_shape
        factor = self.pipeline.vae_scale_factor
        return height * factor, width * factor

    # --- preparation ---------------------------------------------------------------------------

    def _prepare_frozen(self, decoder: bool) -> None:
        """Set the VAE's precision, freeze it and the text encoders, and put them on the device."""
        model, vae = self.config.model, self.pipeline.vae
        upcast = self.dtype == torch.float16 and vae.config.force_upcast
        auto = "float32" if upcast else model.dtype
        dtype = getattr(torch, auto if model.vae_dtype == "auto" else model.vae_dtype)
        if vae.dtype != dtype:
            vae.to(dtype=dtype)
        if model.vae_slicing:
            vae.enable_slicing()
        if model.vae_tiling:
            vae.enable_tiling()
        frozen = [vae, *(getattr(self.pipeline, name) for name in self.family.ENCODERS)]
        for module in frozen:
            module.requires_grad_(False).eval()
        if not model.offload:
            for module in frozen if decoder else frozen[1:]:
                module.to(self.device)

    def _prepare_unet(self) -> None:
        """Put the UNet on the device and give it a LoRA and the configured optimizations."""
        model, unet = self.config.model, self.pipeline.unet
        unet.to(self.device)
        if model.channels_last:
            unet.to(memory_format=torch.channels_last)
        lora.add(unet, model.lora, self.config.seed)
        self._adapted = lora.layers(unet)
        unet.eval()
        if model.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        if model.compile:
            unet.compile()

    @contextlib.contextmanager
    def _on_device(self, *modules: torch.nn.Module) -> Iterator[None]:
        """A context in which modules are on the device, even with `model.offload`."""
        if not self.config.model.offload:
            yield
            return
        for module in modules:
            module.to(self.device)
        try:
            yield
        finally:
            for module in modules:
                module.to("cpu")

    # --- calls ---------------------------------------------------------------------------------

    def _check_finite(self, values: torch.Tensor, name: str) -> None:
        if not values.isfinite().all():
            raise ValueError(
                f"{name} are not finite: the UNet overflows in {self.config.model.dtype}; use "
                "model.dtype=bfloat16 or float32"
            )

    def _unet(
        self, x: torch.Tensor, t: torch.Tensor, prompts: Sequence[str | None]
    ) -> torch.Tensor:
        text, added = self.encode(prompts)
        kwargs: dict[str, Any] = {"added_cond_kwargs": added} if added else {}
        with self.clock:
            output = self.pipeline.unet(x, t, encoder_hidden_states=text, **kwargs).sample
        return output.float()

    def _with_vae(self, run: Callable[[torch.dtype], torch.Tensor]) -> torch.Tensor:
        """Call `run` with the VAE's precision, and again with float32 if float16 overflows."""
        vae = self.pipeline.vae
        with self._on_device(vae):
            output = run(vae.dtype)
            if vae.dtype == torch.float16 and not output.isfinite().all():
                vae.float()  # for this call alone, so that no call depends on an earlier one
                output = run(torch.float32)
                vae.half()
        return output

    def _encode(self, pictures: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        vae = self.pipeline.vae
        mode = vae.encode(pictures.to(dtype)).latent_dist.mode()
        return mode.float() * vae.config.scaling_factor

    def _decode(self, latents: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        vae = self.pipeline.vae
        scaled = latents.to(self.device, torch.float32) / vae.config.scaling_factor
        return vae.decode(scaled.to(dtype)).sample.float()


def _latent_shape(pipeline: Any, config: Config) -> tuple[int, int, int]:
    """(C, H, W) of one latent for pictures of the configured size."""
    unet, factor = pipeline.unet.config, pipeline.vae_scale_factor
    default = unet.sample_size
    default_sizes = (default, default) if isinstance(default, int) else tuple(default)
    # The UNet halves its input between its blocks, and has to double it again.
    multiple = factor * 2 ** (len(unet.block_out_channels) - 1)
    sizes = []
    for field, default_size in zip(("height", "width"), default_sizes, strict=True):
        pixels = getattr(config.sampling, field) or default_size * factor
        if pixels % factor or (pixels != default_size * factor and pixels % multiple):
            raise ConfigError(
                f"sampling.{field} is {pixels}: this model makes pictures in multiples of "
                f"{multiple} pixels; use {max(1, round(pixels / multiple)) * multiple}"
            )
        sizes.append(pixels // factor)
    return unet.in_channels, *sizes


def _std(x: torch.Tensor) -> torch.Tensor:
    """Standard deviation of each row of (B, C, H, W), shape (B, 1, 1, 1)."""
    return x.std(dim=(1, 2, 3), keepdim=True)
