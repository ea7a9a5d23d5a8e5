"""Common parts of the two contrastive stages: a small CLIP, and masks for its logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from b2ray.shapes.captions import Caption
from tools.shapes.words import CONTEXT

PATCH = 4


def make_clip(
    tokenizer: CLIPTokenizer, width: int, heads: int, text_layers: int, vision_layers: int
) -> CLIPModel:
    """Make a CLIP for 32 × 32 pictures, with random weights.

    Args:
        tokenizer: the tokenizer of its text encoder.
        width: width of the hidden states and of the embeddings.
        heads: number of attention heads.
        text_layers: number of layers of the text encoder.
        vision_layers: number of layers of the image tower.
    """
    shared = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_attention_heads": heads,
        "projection_dim": width,
    }
    text = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": CONTEXT,
        "num_hidden_layers": text_layers,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {"image_size": 32, "patch_size": PATCH, "num_hidden_layers": vision_layers}
    config = CLIPConfig(
        text_config={**shared, **text},
        vision_config={**shared, **vision},
        projection_dim=width,
    )
    return CLIPModel(config)


def image_processor() -> CLIPImageProcessorPil:
    """An image processor with CLIP's mean and standard deviation and the size of the pictures."""
    return CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, resample=3
    )


def normalise(images: torch.Tensor) -> torch.Tensor:
    """Convert float ``(N, 3, 32, 32)`` from −1 to 1 to the pixel values that CLIP expects."""
    processor = image_processor()
    mean = torch.tensor(processor.image_mean).view(1, 3, 1, 1)
    std = torch.tensor(processor.image_std).view(1, 3, 1, 1)
    return ((images + 1) / 2 - mean) / std


def embed_images(clip: CLIPModel, images: torch.Tensor) -> torch.Tensor:
    """Unit vectors ``(N, width)`` of pictures, float ``(N, 3, 32, 32)`` from −1 to 1."""
    features = clip.get_image_features(pixel_values=normalise(images)).pooler_output
    return torch.nn.functional.normalize(features, dim=-1)


def embed_texts(clip: CLIPModel, tokenizer: CLIPTokenizer, texts: Sequence[str]) -> torch.Tensor:
    """Unit vectors ``(N, width)`` of captions."""
    tokens = tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
    features = clip.get_text_features(
        input_ids=tokens.input_ids, attention_mask=tokens.attention_mask
    ).pooler_output
    return torch.nn.functional.normalize(features, dim=-1)


def same_scene(rows: Sequence[Caption], columns: Sequence[Caption]) -> torch.Tensor:
    """Whether two captions describe the same scene, mirrored or not; bool ``(rows, columns)``."""
    number: dict[Caption, int] = {}
    left = torch.tensor([number.setdefault(c.scene, len(number)) for c in rows])
    right = torch.tensor([number.setdefault(c.scene, len(number)) for c in columns])
    return left[:, None] == right[None, :]


def other_scenes(logits: torch.Tensor, captions: Sequence[Caption]) -> torch.Tensor:
    """Mask the off-diagonal entries of square logits whose captions describe the same scene."""
    twins = same_scene(captions, captions) & ~torch.eye(len(captions), dtype=torch.bool)
    return logits.masked_fill(twins, float("-inf"))
