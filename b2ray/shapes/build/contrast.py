"""What the two contrastive stages share: a small CLIP and its masks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from b2ray.shapes.build.words import CONTEXT
from b2ray.shapes.captions import Caption

PATCH = 4


def make_clip(
    tokenizer: CLIPTokenizer, width: int, heads: int, text_layers: int, vision_layers: int
) -> CLIPModel:
    """A CLIP for 32 × 32 pictures, with random weights."""
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
    """CLIP's mean and standard deviation, at this world's size."""
    return CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, resample=3
    )


def normalise(images: torch.Tensor) -> torch.Tensor:
    """float ``(N, 3, 32, 32)`` from −1 to 1 → the pixel values that CLIP reads."""
    processor = image_processor()
    mean = torch.tensor(processor.image_mean).view(1, 3, 1, 1)
    std = torch.tensor(processor.image_std).view(1, 3, 1, 1)
    return ((images + 1) / 2 - mean) / std


def embed_images(clip: CLIPModel, images: torch.Tensor) -> torch.Tensor:
    """float ``(N, 3, 32, 32)`` from −1 to 1 → unit vectors ``(N, width)``."""
    out = clip.get_image_features(pixel_values=normalise(images)).pooler_output
    return torch.nn.functional.normalize(out, dim=-1)


def embed_texts(clip: CLIPModel, tokenizer: CLIPTokenizer, texts: Sequence[str]) -> torch.Tensor:
    """Captions → unit vectors ``(N, width)``."""
    tokens = tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
    out = clip.get_text_features(
        input_ids=tokens.input_ids, attention_mask=tokens.attention_mask
    ).pooler_output
    return torch.nn.functional.normalize(out, dim=-1)


def same_scene(rows: Sequence[Caption], columns: Sequence[Caption]) -> torch.Tensor:
    """bool ``(rows, columns)``: where two captions tell the same scene, mirrored or not."""
    number: dict[Caption, int] = {}
    left = torch.tensor([number.setdefault(c.scene, len(number)) for c in rows])
    right = torch.tensor([number.setdefault(c.scene, len(number)) for c in columns])
    return left[:, None] == right[None, :]


def other_scenes(logits: torch.Tensor, captions: Sequence[Caption]) -> torch.Tensor:
    """Square logits without the off-diagonal entries that are right too."""
    twins = same_scene(captions, captions) & ~torch.eye(len(captions), dtype=torch.bool)
    return logits.masked_fill(twins, float("-inf"))
