"""`options` of each kind of reward, as models; nothing heavy is imported to check them."""

from __future__ import annotations

from pydantic import Field

from b2ray.config import Positive, Section


class NoOptions(Section):
    """This kind has no options."""


class AestheticOptions(Section):
    head: str | None = None
    """File with the linear head, if `path` is a plain CLIP model; empty: the head is in `path`."""


class ImageRewardOptions(Section):
    file: str = "ImageReward.pt"
    """Name of the weights in `path`; ignored if `path` has model.safetensors."""
    tokenizer: str = "google-bert/bert-base-uncased"
    """BERT's vocabulary: a hub id or a local folder; ignored if `path` has one."""


class PickScoreOptions(Section):
    processor: str | None = None
    """Where the tokenizer and the image processor are; empty: in `path`."""


class HpsOptions(Section):
    file: str = "HPS_v2.1_compressed.pt"
    """Name of the open_clip weights in `path`; ignored if `path` has model.safetensors."""
    processor: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    """The CLIPModel whose configuration, tokenizer and image processor fit the weights."""


class BertScoreOptions(Section):
    text_model: str = "microsoft/deberta-xlarge-mnli"
    """Encoder whose hidden states are compared: a hub id or a local folder."""
    layer: int | None = Field(None, ge=0)
    """Which hidden states, counted from 0 (the embeddings); empty: bert_score's choice for the
    model, or its last layer."""
    max_new_tokens: Positive = 30
    """Longest caption."""


class JpegOptions(Section):
    quality: int = Field(95, ge=1, le=100)
    """JPEG quality."""


class HttpOptions(Section):
    url: str = Field(pattern=r"^https?://")
    """Address that pictures are posted to."""
    timeout: float = Field(60.0, gt=0)
    """Seconds for one answer."""
    retries: int = Field(4, ge=0)
    """Times a request is sent again after no answer, or a 429 or 5xx one."""
    token_env: str | None = Field(None, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    """Name of the environment variable, of the scorer's process, that holds a bearer token."""


OPTIONS: dict[str, type[Section]] = {
    "aesthetic": AestheticOptions,
    "bertscore": BertScoreOptions,
    "clip": NoOptions,
    "hps": HpsOptions,
    "http": HttpOptions,
    "imagereward": ImageRewardOptions,
    "jpeg_compressibility": JpegOptions,
    "jpeg_incompressibility": JpegOptions,
    "pickscore": PickScoreOptions,
}
