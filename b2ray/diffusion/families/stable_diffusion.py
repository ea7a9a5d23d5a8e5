"""Stable Diffusion 1.x and 2.x: the last hidden states of one CLIP text encoder."""

from __future__ import annotations

from typing import Any

from b2ray.diffusion.families import Condition
from b2ray.diffusion.families.text import token_ids

TOKENIZERS = ("tokenizer",)
ENCODERS = ("text_encoder",)
MARK = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"


def encode(pipeline: Any, prompt: str | None, height: int, width: int) -> Condition:
    """Encode a prompt as `b2ray.diffusion.families.Family.encode` describes.

    None is encoded as the empty prompt.
    """
    encoder = pipeline.text_encoder
    ids = token_ids(pipeline.tokenizer, prompt or "").to(encoder.device)
    return Condition(encoder(ids)[0][0], {})
