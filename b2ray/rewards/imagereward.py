"""ImageReward: how well people would like a picture for its prompt.

The model of Xu et al., ImageReward: Learning and Evaluating Human Preferences for Text-to-Image
Generation, 2023, is a BLIP whose text encoder reads the prompt with cross-attention to the picture.
A linear head maps the first token to the score, which is standardised over the paper's own data.
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

from b2ray.config import Reward
from b2ray.diffusion import pretrained
from b2ray.rewards import head
from b2ray.rewards.checkpoint import Tensors, fill, read, shape
from b2ray.rewards.options import ImageRewardOptions
from b2ray.rewards.preprocess import to_pixels

USUAL = "zai-org/ImageReward"
MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Mean and standard deviation of the head's raw output over the paper's data."""
TOKENS = 35
"""Length of the longest prompt, including its start and end tokens."""

_VISION, _TEXT, _HEAD = "blip.visual_encoder.", "blip.text_encoder.", "mlp.layers."
_RENAMED = (  # parts of `Network`'s keys → parts of the released file's keys
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
# Keys that the score does not need: BLIP's contrastive projections, and a buffer in older files.
_UNUSED = {
    *(f"blip.{side}_proj.{kind}" for side in ("vision", "text") for kind in ("weight", "bias")),
    f"{_TEXT}embeddings.position_ids",
}
_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "vocab.txt")


class Network(nn.Module):
    """Maps a picture and a prompt to a raw score, before standardisation.

    Args:
        vision: configuration of the vision model.
        text: configuration of the text encoder.
        widths: the six widths of the head.
    """

    def __init__(
        self, vision: BlipVisionConfig, text: BlipTextConfig, widths: tuple[int, ...]
    ) -> None:
        super().__init__()
        self.vision = BlipVisionModel(vision)
        self.text = BlipTextModel(text, add_pooling_layer=False)
        self.head = head.make(widths)

    def forward(self, pixels: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Raw scores of pictures for their prompts.

        Args:
            pixels: normalised pictures, float32, shape (N, 3, size, size).
            ids: token ids of the prompts, int64, shape (N, tokens).
            mask: attention mask of the prompts, int64, shape (N, tokens).

        Returns:
            float32, shape (N,).
        """
        image_states = self.vision(pixel_values=pixels).last_hidden_state
        return self.read(image_states, ids, mask)

    def read(
        self, image_states: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """Raw scores from the vision model's hidden states of pictures.

        Args:
            image_states: float32, shape (N, patches + 1, width).
            ids, mask: as in `forward`.

        Returns:
            float32, shape (N,).
        """
        states = self.text(
            input_ids=ids, attention_mask=mask, encoder_hidden_states=image_states, is_decoder=False
        ).last_hidden_state
        return self.head(states[:, 0]).squeeze(1)


def released(key: str) -> str:
    """The key of the released file for a key of `Network`."""
    for part, released_part in _RENAMED:
        key = key.replace(part, released_part)
    return key


def configs(tensors: Tensors, heads: dict[str, int]) -> tuple[BlipVisionConfig, BlipTextConfig]:
    """The configurations of a released file, derived from the shapes of its tensors.

    Args:
        tensors: the tensors of the file.
        heads: number of attention heads of `vision_config` and `text_config`, which no shape
            contains. By default heads are 64 wide, as in the released model.

    Returns:
        The configurations of the vision model and of the text encoder.

    Raises:
        ValueError: a tensor is missing, or a width is not divisible by the number of heads.
    """

    def layers(prefix: str) -> int:
        return len({k.removeprefix(prefix).split(".")[0] for k in tensors if k.startswith(prefix)})

    def head_count(part: str, width: int) -> int:
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
        num_attention_heads=head_count("vision_config", width),
        image_size=isqrt(positions - 1) * patch,
        patch_size=patch,
        layer_norm_eps=1e-6,
    )
    vocabulary, width = shape(tensors, f"{_TEXT}embeddings.word_embeddings.weight")
    first_layer = f"{_TEXT}encoder.layer.0."
    text = BlipTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        encoder_hidden_size=shape(tensors, f"{first_layer}crossattention.self.key.weight")[1],
        intermediate_size=shape(tensors, f"{first_layer}intermediate.dense.weight")[0],
        num_hidden_layers=layers(f"{_TEXT}encoder.layer."),
        num_attention_heads=head_count("text_config", width),
        max_position_embeddings=shape(tensors, f"{_TEXT}embeddings.position_embeddings.weight")[0],
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        sep_token_id=None,
    )
    return vision, text


class ImageReward:
    """The released file, the same as model.safetensors, or a smaller model with the same keys.

    Args:
        spec: the reward's specification; `spec.path` is the model's folder or hub id.
        options: the names of the weights and of the vocabulary.
        device: the device of the model.

    Raises:
        ConfigError: the model cannot be loaded.
    """

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
            raise pretrained.refusal(field, path, "an ImageReward", error) from error
        self.device = device
        self.size = self.network.vision.config.image_size
        self.limit = min(TOKENS, config.max_position_embeddings)

    @torch.inference_mode()
    def score(self, images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        """Scores that are about N(0, 1) over the paper's data.

        The arguments are those of `b2ray.rewards.RewardModel`.
        """
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
    """Load the model of a folder or hub id in float32.

    Raises:
        ValueError: there is no weights file, or one of its keys is missing or unknown.
    """
    names = ("model.safetensors", name)
    file = next(filter(None, (pretrained.file(path, n, revision) for n in names)), None)
    if file is None:
        raise ValueError(f"neither {names[0]} nor {names[1]} is there")
    tensors = read(file)
    heads = _heads(pretrained.file(path, "config.json", revision))
    network = Network(*configs(tensors, heads), head.widths(tensors, _HEAD))
    fill(network, tensors, released, _UNUSED)
    return network.eval().requires_grad_(False)


def _heads(config: Path | None) -> dict[str, int]:
    """The numbers of attention heads in a file of a `BlipConfig`, if there is one."""
    values: dict[str, Any] = json.loads(config.read_text(encoding="utf-8")) if config else {}
    sections = {section: values.get(section, {}) for section in ("vision_config", "text_config")}
    name = "num_attention_heads"
    return {section: int(fields[name]) for section, fields in sections.items() if name in fields}


def _tokenizer(path: str, revision: str | None, usual: str) -> PreTrainedTokenizerBase:
    """The tokenizer in the folder, or else BERT's with BLIP's two special tokens."""
    if any(pretrained.file(path, name, revision) for name in _TOKENIZERS):
        source, kwargs = pretrained.source(path, revision)
        return AutoTokenizer.from_pretrained(source, **kwargs)
    source, kwargs = pretrained.source(usual)
    try:
        tokenizer = BertTokenizer.from_pretrained(source, **kwargs)
    except Exception as error:
        raise pretrained.refusal("options.tokenizer", usual, "BERT's vocabulary", error) from error
    tokenizer.add_special_tokens({"bos_token": "[DEC]", "additional_special_tokens": ["[ENC]"]})
    return tokenizer
