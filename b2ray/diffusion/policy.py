"""A Stable Diffusion pipeline as a policy: guided noise, stochastic steps, pictures."""

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

Noise = Callable[[int], np.ndarray]  # step index -> standard normal, float32, (B, C, H, W)


@dataclass(frozen=True)
class Rollout:
    """What denoising from `first` to `last` produced for a batch of B.

    Attributes:
        latents: x at t_first .. t_last, shape (B, last - first + 1, C, H, W), the policy's dtype.
        log_probs: density of each step as sampled, shape (B, last - first), float32.
        predicted: x0 as the model saw it at t_first, (B, C, H, W), float32; None without steps.
    """

    latents: torch.Tensor
    log_probs: torch.Tensor
    predicted: torch.Tensor | None = None


class Policy:
    """pi_theta(x_{t-1} | x_t, prompt) of a pipeline with a LoRA on its UNet.

    Args:
        config: the run's configuration (model, sampling and the LoRA's seed are used).
        device: where it runs.
        decoder: whether it will `decode`; if not, the VAE stays off the device.

    Raises:
        ConfigError: if the model cannot be loaded, or cannot make pictures of the wanted size.
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
        self.unet_evals = 0  # guided evaluations: both halves of guidance together are one
        self.clock = Clock(device)  # runs while the UNet does

    def bind(self, weights: State) -> str:
        """Put a LoRA into the UNet; returns the digest of what is bound (`lora.bind`)."""
        return lora.bind(self.pipeline.unet, weights)

    def lora_state(self) -> dict[str, np.ndarray]:
        """A copy of the LoRA as float32 arrays."""
        return lora.state(self.pipeline.unet)

    @contextlib.contextmanager
    def reference(self) -> Iterator[None]:
        """The base model: the adapter is switched off inside."""
        for layer in self._adapted:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in self._adapted:
                layer.enable_adapters(True)

    def too_long(self, prompts: Sequence[str]) -> list[str]:
        """The prompts that a tokenizer cuts off."""
        tokenizers = [getattr(self.pipeline, name) for name in self.family.TOKENIZERS]
        return [
            p
            for p in prompts
            if any(len(t(p, truncation=False).input_ids) > t.model_max_length for t in tokenizers)
        ]

    @torch.no_grad()
    def prepare(self, prompts: Sequence[str]) -> None:
        """Encode prompts ahead, each once and alone, so that none depends on its neighbours."""
        new = [p for p in dict.fromkeys([None, *prompts]) if p not in self._conditions]
        if not new:
            return
        names, size = self.family.ENCODERS, self.picture_size
        with self._on_device(*(getattr(self.pipeline, name) for name in names)):
            for prompt in new:
                found = self.family.encode(self.pipeline, prompt, *size)
                self._conditions[prompt] = Condition(
                    found.text.to(self.device),
                    {name: row.to(self.device) for name, row in found.added.items()},
                )

    @property
    def known(self) -> list[str]:
        """The prompts that are encoded, in the order in which they were first."""
        return [p for p in self._conditions if p is not None]

    def encode(self, prompts: Sequence[str | None]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Conditions of B prompts (None: unconditional): text (B, L, D), added rows (B, …)."""
        self.prepare([p for p in prompts if p is not None])
        rows = [self._conditions[p] for p in prompts]
        added = {name: torch.stack([r.added[name] for r in rows]) for name in rows[0].added}
        return torch.stack([r.text for r in rows]), added

    def predict(self, i: torch.Tensor, x: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """The UNet's guided output (arXiv 2207.12598, equation 6), float32.

        The same call samples and re-scores, so that both see one density.

        Args:
            i: step index of each row, int64, shape (B,).
            x: latents, shape (B, C, H, W).
            prompts: B prompts.
        """
        t = self.schedule.timesteps[i]
        self.unet_evals += len(x)
        if self.guidance <= 1:
            return self._unet(x, t, prompts)
        both = [*([None] * len(prompts)), *prompts]
        output = self._unet(torch.cat([x, x]), torch.cat([t, t]), both)
        without, with_prompt = output.chunk(2)
        guided = without + self.guidance * (with_prompt - without)
        share = self.config.sampling.guidance_rescale
        if share == 0:
            return guided
        # arXiv 2305.08891, equations 15 and 16.
        rescaled = guided * (_std(with_prompt) / _std(guided))
        return share * rescaled + (1 - share) * guided

    @torch.no_grad()
    def denoise(
        self, x: torch.Tensor, prompts: Sequence[str], first: int, last: int, noise: Noise
    ) -> Rollout:
        """Take the steps first .. last - 1 from latents at t_first.

        Raises:
            ValueError: the latents are not finite: the model overflows in its precision.
        """
        x = x.to(self.device, self.dtype)
        latents, log_probs, predicted = [x], [], None
        for step in range(first, last):
            i = torch.full((len(x),), step, dtype=torch.int64, device=self.device)
            output = self.predict(i, x, prompts)
            if step == first:
                predicted, _ = self.schedule.predicted_image(i, x, output)
            draw = torch.from_numpy(noise(step)).to(self.device)
            x, log_prob = self.schedule.step(i, x, output, draw)
            latents.append(x)
            log_probs.append(log_prob)
        self._refuse_overflow(x, "latents")
        none = torch.empty(len(x), 0, device=self.device)
        densities = torch.stack(log_probs, 1) if log_probs else none
        return Rollout(torch.stack(latents, 1), densities, predicted)

    @torch.no_grad()
    def demonstrate(
        self, x0: torch.Tensor, prompts: Sequence[str], first: int, start: np.ndarray, noise: Noise
    ) -> tuple[Rollout, torch.Tensor]:
        """Trajectories that pictures could have come from, scored as the policy's own are.

        The picture is noised to t_first by q(x_t | x_0), then every step is a sample of the exact
        posterior q(x_{t'} | x_t, x_0): what the policy would do if it knew the picture.

        Args:
            x0: `latents_of` pictures, shape (B, C, H, W).
            prompts: B prompts.
            first: index of the first step.
            start: standard normal, float32, shape (B, C, H, W): the noise of x at t_first.
            noise: that of each step.

        Returns:
            What `denoise` returns, with densities under the policy; and the mean over the steps of
            `Schedule.kl_of_posterior`, float32, shape (B,).
        """
        schedule, x0 = self.schedule, x0.to(self.device)
        i = torch.full((len(x0),), first, dtype=torch.int64, device=self.device)
        x = schedule.noised(i, x0, torch.from_numpy(start).to(self.device)).to(self.dtype)
        latents, log_probs, apart = [x], [], []
        for step in range(first, schedule.steps):
            i = torch.full_like(i, step)
            output = self.predict(i, x, prompts)
            draw = torch.from_numpy(noise(step)).to(self.device)
            following = schedule.draw(i, schedule.posterior(i, x, x0), draw, x.dtype)
            log_probs.append(schedule.log_prob(i, x, output, following))
            apart.append(schedule.kl_of_posterior(i, x, output, x0))
            latents.append(following)
            x = following
        rollout = Rollout(torch.stack(latents, 1), torch.stack(log_probs, 1))
        self._refuse_overflow(rollout.log_probs, "densities of demonstrations")
        return rollout, torch.stack(apart, 1).mean(1)

    def log_prob(
        self, i: torch.Tensor, x: torch.Tensor, following: torch.Tensor, prompts: Sequence[str]
    ) -> torch.Tensor:
        """Log-density of stored steps under the current weights, float32, shape (B,)."""
        return self.schedule.log_prob(i, x, self.predict(i, x, prompts), following)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> np.ndarray:
        """Pictures of final latents (B, C, H, W): uint8, shape (B, height, width, 3), rounded."""
        pictures = self._with_vae(lambda dtype: self._decode(latents, dtype))
        levels = ((pictures / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
        return levels.permute(0, 2, 3, 1).cpu().numpy()

    @torch.no_grad()
    def latents_of(self, pictures: np.ndarray) -> torch.Tensor:
        """x_0 of pictures: the mode of the VAE's distribution, scaled, float32, on the CPU.

        Args:
            pictures: uint8, shape (B, height, width, 3), of the model's own size.

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
        """(height, width) in pixels."""
        _, height, width = self.latent_shape
        factor = self.pipeline.vae_scale_factor
        return height * factor, width * factor

    # --- making ready --------------------------------------------------------------------------

    def _prepare_frozen(self, decoder: bool) -> None:
        model, vae = self.config.model, self.pipeline.vae
        upcast = self.dtype == torch.float16 and vae.config.force_upcast
        auto = "float32" if upcast else model.dtype
        wanted = getattr(torch, auto if model.vae_dtype == "auto" else model.vae_dtype)
        if vae.dtype != wanted:
            vae.to(dtype=wanted)
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
        """Modules on the device for the time of a call, if they are kept off it."""
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

    def _refuse_overflow(self, found: torch.Tensor, what: str) -> None:
        if not found.isfinite().all():
            raise ValueError(
                f"{what} are not finite: the UNet overflows in {self.config.model.dtype}; use "
                "model.dtype=bfloat16 or float32"
            )

    def _unet(
        self, x: torch.Tensor, t: torch.Tensor, prompts: Sequence[str | None]
    ) -> torch.Tensor:
        text, added = self.encode(prompts)
        more: dict[str, Any] = {"added_cond_kwargs": added} if added else {}
        with self.clock:
            output = self.pipeline.unet(x, t, encoder_hidden_states=text, **more).sample
        return output.float()

    def _with_vae(self, run: Callable[[torch.dtype], torch.Tensor]) -> torch.Tensor:
        """What the VAE makes in its precision, or in float32 where float16 overflows."""
        vae = self.pipeline.vae
        with self._on_device(vae):
            found = run(vae.dtype)
            if vae.dtype == torch.float16 and not found.isfinite().all():
                vae.float()  # for this call alone, so that no call depends on those before it
                found = run(torch.float32)
                vae.half()
        return found

    def _encode(self, pictures: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        vae = self.pipeline.vae
        mode = vae.encode(pictures.to(dtype)).latent_dist.mode()
        return mode.float() * vae.config.scaling_factor

    def _decode(self, latents: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        vae = self.pipeline.vae
        scaled = latents.to(self.device, torch.float32) / vae.config.scaling_factor
        return vae.decode(scaled.to(dtype)).sample.float()


def _latent_shape(pipeline: Any, config: Config) -> tuple[int, int, int]:
    """(C, H, W) of one latent for pictures of the wanted size."""
    unet, factor = pipeline.unet.config, pipeline.vae_scale_factor
    own = unet.sample_size
    sizes = (own, own) if isinstance(own, int) else tuple(own)
    # The UNet halves its input between its blocks, and must double it back.
    multiple = factor * 2 ** (len(unet.block_out_channels) - 1)
    wanted = []
    for field, latent in zip(("height", "width"), sizes, strict=True):
        pixels = getattr(config.sampling, field) or latent * factor
        if pixels % factor or (pixels != latent * factor and pixels % multiple):
            raise ConfigError(
                f"sampling.{field} is {pixels}: this model makes pictures in multiples of "
                f"{multiple} pixels; use {max(1, round(pixels / multiple)) * multiple}"
            )
        wanted.append(pixels // factor)
    return unet.in_channels, *wanted


def _std(x: torch.Tensor) -> torch.Tensor:
    return x.std(dim=(1, 2, 3), keepdim=True)
