"""Stable Diffusion XL: two text encoders, and picture sizes as added conditions.

The text condition is the concatenation of both encoders' penultimate hidden states. The pooled
projection of the second encoder and six sizes in pixels are embedded together with the timestep
(arXiv 2307.01952, section 2).
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
    """Encode a prompt as `b2ray.diffusion.families.Family.encode` describes.

    None becomes zeros if the pipeline is configured with `force_zeros_for_empty_prompt`, and the
    empty prompt otherwise. The sizes describe an uncropped picture at its original size.
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
    # Original size, position of the crop, target size.
    sizes = torch.tensor([height, width, 0, 0, height, width], dtype=text.dtype, device=text.device)
    return Condition(text, {"text_embeds": pooled, "time_ids": sizes})
