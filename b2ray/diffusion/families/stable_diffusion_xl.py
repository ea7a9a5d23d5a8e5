"""Stable Diffusion XL: two text encoders, and picture sizes as added conditions.

The text is the penultimate hidden states of both encoders side by side; the pooled projection of
the second and six sizes in pixels go in with the timestep (arXiv 2307.01952, section 2).
"""

from __future__ import annotations

from typing import Any

import torch

from b2ray.diffusion.families import Condition
from b2ray.diffusion.families.text import token_ids

TOKENIZERS = ("tokenizer", "tokenizer_2")
ENCODERS = ("text_encoder", "text_encoder_2")
MARK = "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight"


def encode(pipeline: Any, prompt: str | None, height: int, width: int) -> Condition:
    """As `b2ray.diffusion.families.Family.encode`.

    No prompt is all zeros if the pipeline is made so (`force_zeros_for_empty_prompt`), else the
    empty prompt. Pictures are said to be uncropped and of their own size.
    """
    hidden = []
    for tokenizer, encoder in (
        (pipeline.tokenizer, pipeline.text_encoder),
        (pipeline.tokenizer_2, pipeline.text_encoder_2),
    ):
        ids = token_ids(tokenizer, prompt or "").to(encoder.device)
        output = encoder(ids, output_hidden_states=True)
        hidden.append(output.hidden_states[-2][0])
    text, pooled = torch.cat(hidden, dim=-1), output.text_embeds[0]
    if prompt is None and pipeline.config.force_zeros_for_empty_prompt:
        text, pooled = torch.zeros_like(text), torch.zeros_like(pooled)
    sizes = torch.tensor([height, width, 0, 0, height, width], dtype=text.dtype, device=text.device)
    return Condition(text, {"text_embeds": pooled, "time_ids": sizes})
