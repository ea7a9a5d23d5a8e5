"""A Stable Diffusion pipeline as a policy: guided noise, stochastic steps, pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import StableDiffusionPipeline

from b2ray.config import Config
from b2ray.diffusion import lora
from b2ray.diffusion.lora_file import State
from b2ray.diffusion.schedule import Schedule
from b2ray.errors import ConfigError
from b2ray.options import find

Noise = Callable[[int], np.ndarray]  # step index -> standard normal, float32, (B, C, H, W)


@dataclass(frozen=True)
class Rollout:
    """What denoising from `first` to `last` produced for a batch of B.

    Attributes:
        latents: x at t_first .. t_last, shape (B, last - first + 1, C, H, W), the policy's dtype.
        log_probs: density of each step as sampled, shape (B, last - first), float32.
    """

    latents: torch.Tensor
    log_probs: torch.Tensor


class Policy:
    """pi_theta(x_{t-1} | x_t, prompt) of a pipeline with a LoRA on its UNet.

    Args:
        config: the run's configuration (model, sampling and the LoRA's seed are used).
        device: where it runs.

    Raises:
        ConfigError: if the model cannot be loaded as a StableDiffusionPipeline.
    """

    def __init__(self, config: Config, device: torch.device) -> None:
        self.device = device
        self.dtype = getattr(torch, config.model.dtype)
        self.guidance = config.sampling.guidance
        pipeline = load_pipeline(config.model.path, self.dtype)
        self.pipeline = pipeline.to(device)
        for module in (pipeline.vae, pipeline.text_encoder):
            module.requires_grad_(False).eval()
        lora.add(pipeline.unet, config.model.lora, config.seed)
        pipeline.unet.eval()
        table = Schedule.from_config(
            pipeline.scheduler.config, config.sampling.steps, config.sampling.eta
        )
        self.schedule = table.to(device)
        self._embeddings: dict[str, torch.Tensor] = {}
        self.unet_evals = 0  # guided evaluations: both halves of guidance together are one

    def bind(self, weights: State) -> str:
        """Put a LoRA into the UNet; returns the digest of what is bound (`lora.bind`)."""
        return lora.bind(self.pipeline.unet, weights)

    def lora_state(self) -> dict[str, np.ndarray]:
        """A copy of the LoRA as float32 arrays."""
        return lora.state(self.pipeline.unet)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one latent."""
        unet = self.pipeline.unet.config
        size = unet.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return unet.in_channels, height, width

    def too_long(self, prompts: Sequence[str]) -> list[str]:
        """The prompts that the tokenizer cuts off."""
        tokenizer = self.pipeline.tokenizer
        limit = tokenizer.model_max_length
        return [p for p in prompts if len(tokenizer(p, truncation=False).input_ids) > limit]

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> torch.Tensor:
        """Text conditions of shape (B, L, D), each prompt encoded once and kept.

        Prompts are encoded one at a time, so that a condition never depends on its neighbours.
        """
        tokenizer = self.pipeline.tokenizer
        for prompt in dict.fromkeys(prompts):
            if prompt not in self._embeddings:
                ids = tokenizer(
                    prompt,
                    padding="max_length",
                    truncation=True,
                    max_length=tokenizer.model_max_length,
                    return_tensors="pt",
                ).input_ids
                self._embeddings[prompt] = self.pipeline.text_encoder(ids.to(self.device))[0][0]
        return torch.stack([self._embeddings[p] for p in prompts])

    def predict(self, i: torch.Tensor, x: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """The UNet's guided output (arXiv 2207.12598, equation 6), float32.

        The same call samples and re-scores, so that both see one density.

        Args:
            i: step index of each row, int64, shape (B,).
            x: latents, shape (B, C, H, W).
            prompts: B prompts.
        """
        condition, t, unet = self.encode(prompts), self.schedule.timesteps[i], self.pipeline.unet
        self.unet_evals += len(x)
        if self.guidance <= 1:
            return unet(x, t, encoder_hidden_states=condition).sample.float()
        both = torch.cat([self.encode([""]).expand_as(condition), condition])
        output = unet(
            torch.cat([x, x]), torch.cat([t, t]), encoder_hidden_states=both
        ).sample.float()
        without, with_prompt = output.chunk(2)
        return without + self.guidance * (with_prompt - without)

    @torch.no_grad()
    def denoise(
        self, x: torch.Tensor, prompts: Sequence[str], first: int, last: int, noise: Noise
    ) -> Rollout:
        """Take the steps first .. last - 1 from latents at t_first."""
        x = x.to(self.device, self.dtype)
        latents, log_probs = [x], []
        for step in range(first, last):
            i = torch.full((len(x),), step, dtype=torch.int64, device=self.device)
            output = self.predict(i, x, prompts)
            draw = torch.from_numpy(noise(step)).to(self.device)
            x, log_prob = self.schedule.step(i, x, output, draw)
            latents.append(x)
            log_probs.append(log_prob)
        none = torch.empty(len(x), 0, device=self.device)
        return Rollout(torch.stack(latents, 1), torch.stack(log_probs, 1) if log_probs else none)

    def log_prob(
        self, i: torch.Tensor, x: torch.Tensor, following: torch.Tensor, prompts: Sequence[str]
    ) -> torch.Tensor:
        """Log-density of stored steps under the current weights, float32, shape (B,)."""
        return self.schedule.log_prob(i, x, self.predict(i, x, prompts), following)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> np.ndarray:
        """Pictures of final latents (B, C, H, W): uint8, shape (B, height, width, 3), rounded."""
        vae = self.pipeline.vae
        scaled = latents.to(self.device, self.dtype) / vae.config.scaling_factor
        pictures = vae.decode(scaled).sample.float()
        levels = ((pictures / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
        return levels.permute(0, 2, 3, 1).cpu().numpy()


def load_pipeline(path: str, dtype: torch.dtype) -> StableDiffusionPipeline:
    """A StableDiffusionPipeline from a local folder or the hub, without its safety checker."""
    local = find(path)
    try:
        pipeline = StableDiffusionPipeline.from_pretrained(
            str(local or path),
            dtype=dtype,
            safety_checker=None,
            requires_safety_checker=False,
            use_safetensors=True,
            local_files_only=local is not None,
        )
    except Exception as error:  # the loaders raise whatever their files provoke
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"model.path {path!r} cannot be loaded as a StableDiffusionPipeline: {reason}"
        ) from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
