"""The base model, its adapter, the prompts, and the denoising process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from b2ray.config.section import Positive, Section

if TYPE_CHECKING:
    from b2ray.config import Config


class Lora(Section):
    """The low-rank adapter that is trained."""

    rank: Positive = 4
    """Rank of the low-rank update."""
    alpha: float = Field(4.0, gt=0)
    """Scale: the update is multiplied by alpha / rank."""
    targets: tuple[str, ...] = Field(("to_q", "to_k", "to_v", "to_out.0"), min_length=1)
    """Module names in the UNet that get an adapter (the attention's q, k, v and out)."""
    merged: bool = False
    """Compute each adapted linear map with one weight, base + adapter, instead of adding the
    adapter's output: fewer and larger operations, faster on a CPU
    (docs/explanation/decided_against.md). In float32 only: the sum in half precision would round
    small updates away."""


class Model(Section):
    """The base model and its adapter."""

    path: str = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    """A Stable Diffusion 1.x, 2.x or XL pipeline: a hub id, a local folder, or one .safetensors
    file. A relative path is looked up from the working directory, then from where b2ray is
    installed."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    variant: str | None = None
    """Which of several weights of a folder or hub id, for example `fp16`."""
    config: str | None = None
    """For a single .safetensors file: the hub id or folder whose configuration files describe it;
    empty lets diffusers choose, which asks the hub."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the frozen weights and stored latents; densities and LoRA stay float32."""
    vae_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the decoder; auto is `dtype`, or float32 where float16 overflows."""
    channels_last: bool = False
    """Keep the UNet's weights in channels-last order, which some GPUs convolve faster."""
    compile: bool = False
    """Compile the UNet with torch.compile: minutes at the start, faster calls after."""
    gradient_checkpointing: bool = False
    """Compute the UNet's activations again when learning instead of keeping them: less memory."""
    offload: bool = False
    """Keep the text encoders and the VAE off the GPU while they are idle."""
    vae_slicing: bool = False
    """Decode one picture at a time: less memory."""
    vae_tiling: bool = False
    """Decode large pictures in overlapping tiles: less memory, faint seams."""
    lora: Lora = Lora()

    @model_validator(mode="after")
    def _merged_in_float32(self) -> Self:
        if self.lora.merged and self.dtype != "float32":
            raise ValueError(
                f"model.lora.merged is true with model.dtype={self.dtype}, which would round small "
                "updates away: set model.lora.merged=false, or model.dtype=float32"
            )
        return self


class Prompts(Section):
    """The prompts to train on, and those for evaluation only."""

    train: str | None = None
    """The prompts that training draws from: a .txt file with one on each line, a .jsonl or .csv
    file with `prompt` and, if wanted, `weight`, or a built-in set such as `template1.train` or
    `animals`. May be left out with demonstrations, whose captions are the prompts then."""
    heldout: str | None = None
    """Unseen prompts for evaluation only, given in the same way, for example `template1.test`."""


class Sampling(Section):
    """The denoising process."""

    steps: int = Field(20, ge=2)
    """T, the number of denoising steps."""
    guidance: float = Field(5.0, ge=0)
    """Classifier-free guidance scale; at 1 or less the unconditional half is not computed."""
    guidance_rescale: float = Field(0.0, ge=0, le=1)
    """How much of the guided output's standard deviation is set back to the conditional one's
    (arXiv 2305.08891, section 3.4); 0.7 suits schedules that end in pure noise."""
    eta: float = Field(1.0, ge=0, le=1)
    """Stochasticity of the DDIM step; 1 is ancestral sampling. 0 has no density to train."""
    height: Positive | None = None
    """Height of the pictures in pixels; empty is the model's own."""
    width: Positive | None = None
    """Width of the pictures in pixels; empty is the model's own."""


def sampling_problem(config: Config) -> str | None:
    """Say why the sampled steps cannot be trained."""
    if config.sampling.eta == 0:
        return "sampling.eta is 0: the steps have no density to train; use up to 1.0"
    return None
