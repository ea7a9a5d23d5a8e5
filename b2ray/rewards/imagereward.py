"""ImageReward: how well people would like a picture for its prompt.

Xu et al., ImageReward: Learning and Evaluating Human Preferences for Text-to-Image Generation,
2023. A BLIP whose text encoder reads the prompt while looking at the picture, and a linear head on
its first token, standardised over the paper's own data.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import (
    AutoTokenizer,
    BertTokenizer,
    BlipTextConfig,
    BlipTextModel,
    BlipVisionConfig,
    BlipVisionModel,
    PreTrainedTokenizerBase,
)
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from b2ray import hub
from b2ray.config import Reward
from b2ray.rewards import head
from b2ray.rewards.checkpoint import Tensors, fill, read, shape
from b2ray.rewards.options import ImageRewardOptions
from b2ray.rewards.preprocess import to_pixels

USUAL = "zai-org/ImageReward"
MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Of the head's raw output over the paper's data."""
TOKENS = 35
"""Longest prompt, with its start and end."""

_VISION, _TEXT, _HEAD = "blip.visual_encoder.", "blip.text_encoder.", "mlp.layers."
_RENAMED = (  # `Network`'s words → the released file's
    ("vision.embeddings.class_embedding", f"{_VISION}cls_token"),
    ("vision.embeddings.position_embedding", f"{_VISION}pos_embed"),
    ("vision.embeddings.patch_embedding.", f"{_VISION}patch_embed.proj."),
    ("vision.encoder.layers.", f"{_VISION}blocks."),
    ("vision.post_layernorm.", f"{_VISION}norm."),
    (".layer_norm", ".norm"),
    (".self_attn.projection.", ".attn.proj."),
    (".self_attn.qkv.", ".attn.qkv."),
    ("text.", _TEXT),
    ("head.", _HEAD),
)
# BLIP's contrastive projections, and a buffer of older versions: the score does not use them.
_UNUSED = {
    *(f"blip.{side}_proj.{kind}" for side in ("vision", "text") for kind in ("weight", "bias")),
    f"{_TEXT}embeddings.position_ids",
}
_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "vocab.txt")


class Network(nn.Module):
    """Picture and prompt to one number, not yet standardised."""

    def __init__(
        self, vision: BlipVisionConfig, text: BlipTextConfig, widths: tuple[int, ...]
    ) -> None:
        super().__init__()
        self.vision = BlipVisionModel(vision)
        self.text = BlipTextModel(text, add_pooling_layer=False)
        self.head = head.make(widths)

    def forward(self, pixels: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Args: pixels (N, 3, size, size), ids and mask (N, tokens); returns (N,)."""
        seen = self.vision(pixel_values=pixels).last_hidden_state
        return self.read(seen, ids, mask)

    def read(self, seen: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """From the vision model's tokens (N, patches + 1, width) on."""
        states = self.text(
            input_ids=ids, attention_mask=mask, encoder_hidden_states=seen, is_decoder=False
        ).last_hidden_state
        return self.head(states[:, 0]).squeeze(1)


def released(key: str) -> str:
    """A key of `Network` as the released file has it."""
    for ours, theirs in _RENAMED:
        key = key.replace(ours, theirs)
    return key


def configs(tensors: Tensors, heads: dict[str, int]) -> tuple[BlipVisionConfig, BlipTextConfig]:
    """The sizes of a released file, from its tensors' shapes.

    Args:
        heads: attention heads of `vision_config` and `text_config`, which no shape tells; those
            that are not given are 64 wide, as in the released model.
    """

    def layers(prefix: str) -> int:
        return len({k.removeprefix(prefix).split(".")[0] for k in tensors if k.startswith(prefix)})

    def split(part: str, width: int) -> int:
        count = heads.get(part, width // 64)
        if count < 1 or width % count:
            raise ValueError(
                f"{count} attention heads do not divide the width {width}: a config.json beside "
                f"the weights has to name {part}.num_attention_heads"
            )
        return count

    _, positions, width = shape(tensors, f"{_VISION}pos_embed")
    patch = shape(tensors, f"{_VISION}patch_embed.proj.weight")[-1]
    vision = BlipVisionConfig(
        hidden_size=width,
        intermediate_size=shape(tensors, f"{_VISION}blocks.0.mlp.fc1.weight")[0],
        num_hidden_layers=layers(f"{_VISION}blocks."),
        num_attention_heads=split("vision_config", width),
        image_size=isqrt(positions - 1) * patch,
        patch_size=patch,
        layer_norm_eps=1e-6,
    )
    words, width = shape(tensors, f"{_TEXT}embeddings.word_embeddings.weight")
    first = f"{_TEXT}encoder.layer.0."
    text = BlipTextConfig(
        vocab_size=words,
        hidden_size=width,
        encoder_hidden_size=shape(tensors, f"{first}crossattention.self.key.weight")[1],
        intermediate_size=shape(tensors, f"{first}intermediate.dense.weight")[0],
        num_hidden_layers=layers(f"{_TEXT}encoder.layer."),
        num_attention_heads=split("text_config", width),
        max_position_embeddings=shape(tensors, f"{_TEXT}embeddings.position_embeddings.weight")[0],
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        sep_token_id=None,
    )
    return vision, text


class ImageReward:
    """The released file, a twin of it as model.safetensors, or a smaller one with the same keys."""

    def __init__(self, spec: Reward, options: ImageRewardOptions, device: torch.device) -> None:
        path = spec.path or USUAL
        try:
            self.network = _network(path, spec.revision, options.file).to(device)
            self.tokenizer = _tokenizer(path, spec.revision, options.tokenizer)
            config = self.network.text.config
            if len(self.tokenizer) != config.vocab_size:
                raise ValueError(
                    f"the tokenizer has {len(self.tokenizer)} words, but the weights are for "
                    f"{config.vocab_size}"
                )
        except Exception as error:  # the loaders raise whatever their files provoke
            field = f"reward {spec.name!r}:"
            raise hub.refusal(field, path, "an ImageReward", error) from error
        self.device = device
        self.size = self.network.vision.config.image_size
        self.limit = min(TOKENS, config.max_position_embeddings)

    @torch.inference_mode()
    def score(self, images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        """About N(0, 1) over the paper's data; arguments as `b2ray.rewards.Scorer`."""
        pixels = to_pixels(images, self.size, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, self.device)
        tokens = self.tokenizer(
            list(prompts),
            truncation=True,
            max_length=self.limit,
            padding="max_length",
            return_tensors="pt",
        ).to(self.device)
        raw = self.network(pixels, tokens.input_ids, tokens.attention_mask)
        return ((raw - MEAN) / STD).cpu().numpy()


def _network(path: str, revision: str | None, name: str) -> Network:
    """The weights of a folder or hub id in float32; a key too many or too few is a ValueError."""
    names = ("model.safetensors", name)
    file = next(filter(None, (hub.file(path, n, revision) for n in names)), None)
    if file is None:
        raise ValueError(f"neither {names[0]} nor {names[1]} is there")
    tensors = read(file)
    heads = _heads(hub.file(path, "config.json", revision))
    network = Network(*configs(tensors, heads), head.widths(tensors, _HEAD))
    fill(network, tensors, released, _UNUSED)
    return network.eval().requires_grad_(False)


def _heads(config: Path | None) -> dict[str, int]:
    """Attention heads that a configuration like `BlipConfig`'s names."""
    values: dict[str, Any] = json.loads(config.read_text(encoding="utf-8")) if config else {}
    parts = {part: values.get(part, {}) for part in ("vision_config", "text_config")}
    name = "num_attention_heads"
    return {part: int(given[name]) for part, given in parts.items() if name in given}


def _tokenizer(path: str, revision: str | None, usual: str) -> PreTrainedTokenizerBase:
    """The folder's own, or BERT's with BLIP's two special tokens."""
    if any(hub.file(path, name, revision) for name in _TOKENIZERS):
        source, where = hub.source(path, revision)
        return AutoTokenizer.from_pretrained(source, **where)
    source, where = hub.source(usual)
    try:
        tokenizer = BertTokenizer.from_pretrained(source, **where)
    except Exception as error:
        raise hub.refusal("options.tokenizer", usual, "BERT's vocabulary", error) from error
    tokenizer.add_special_tokens({"bos_token": "[DEC]", "additional_special_tokens": ["[ENC]"]})
    return tokenizer
