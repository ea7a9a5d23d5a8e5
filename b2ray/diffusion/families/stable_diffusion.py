"""Stable Diffusion 1.x and 2.x: one CLIP text encoder, its last hidden states."""

from __future__ import annotations

from typing import Any

from b2ray.diffusion.families import Condition
from b2ray.diffusion.families.text import token_ids

TOKENIZERS = ("tokenizer",)
ENCODERS = ("text_encoder",)
MARK = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"


def encode(pipeline: Any, prompt: str | None, height: int, width: int) -> Condition:
    """As `b2ray.diffusion.families.Family.encode`; no prompt is the empty one."""
    encoder = pipeline.text_encoder
    ids = token_ids(pipeline.tokenizer, prompt or "").to(encoder.device)
    return Condition(encoder(ids)[0][0], {})
