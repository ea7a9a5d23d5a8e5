"""Pipelines of Stable Diffusion's shapes with random weights."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from b2ray.shapes import BASE
from benchmarks.costs.unets import SD1, SDXL
from tools.shapes.words import make_tokenizer


def make(family: str, small: bool, dtype: torch.dtype) -> Any:
    """A pipeline of the family's shape with random weights."""
    share = 16 if small else 1
    xl = family == "sdxl"
    shape = dict(SDXL if xl else SD1)
    channels = shape.get("block_out_channels", [320, 640, 1280, 1280])
    shape["block_out_channels"] = [c // share for c in channels]
    if small:
        shape |= {"attention_head_dim": 2, "norm_num_groups": 10}
    parts: dict[str, Any] = {
        "vae": vae(share),
        "tokenizer": make_tokenizer(),
        "text_encoder": CLIPTextModel(text(768, 12)),
        "unet": UNet2DConditionModel(**shape),
        "scheduler": DDIMScheduler.from_pretrained(BASE / "scheduler"),
    }
    if xl:
        second = CLIPTextModelWithProjection(text(1280, 20))
        parts |= {"text_encoder_2": second, "tokenizer_2": make_tokenizer()}
        return StableDiffusionXLPipeline(**parts, add_watermarker=False).to(dtype)
    none = {"safety_checker": None, "feature_extractor": None}
    return StableDiffusionPipeline(**parts, **none, requires_safety_checker=False).to(dtype)


def vae(share: int) -> AutoencoderKL:
    """Stable Diffusion's decoder and encoder: eight pixels to an element of a latent."""
    return AutoencoderKL(
        block_out_channels=[c // share for c in (128, 256, 512, 512)],
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=min(32, 128 // share),
    )


def text(width: int, heads: int) -> CLIPTextConfig:
    """A text encoder of CLIP's width; its vocabulary does not matter here."""
    tokens = make_tokenizer()
    return CLIPTextConfig(
        vocab_size=len(tokens),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=12,
        num_attention_heads=heads,
        projection_dim=width,
        max_position_embeddings=tokens.model_max_length,
        bos_token_id=tokens.bos_token_id,
        eos_token_id=tokens.eos_token_id,
        pad_token_id=tokens.pad_token_id,
    )
