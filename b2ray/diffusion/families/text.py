"""Tokenization of prompts, which all families share."""

from __future__ import annotations

from typing import Any

import torch


def token_ids(tokenizer: Any, prompt: str) -> torch.Tensor:
    """Token ids of a prompt, padded or cut off at the tokenizer's limit, int64, shape (1, L)."""
    tokens = tokenizer(
        prompt,
        padding="max_length",
        truncation=True,
        max_length=tokenizer.model_max_length,
        return_tensors="pt",
    )
    return tokens.input_ids
