"""The options of each kind of reward, as models that can be checked without heavy imports."""

from __future__ import annotations

from pydantic import Field

from b2ray.config import Positive, Section


class NoOptions(Section):
    """The options of kinds that have none."""


class AestheticOptions(Section):
    head: str | None = None
    """File of the linear head, if `path` is a plain CLIP model; empty means that `path` has it."""


class ImageRewardOptions(Section):
    file: str = "ImageReward.pt"
    """Name of the weights in `path`; ignored if `path` has model.safetensors."""
    tokenizer: str = "google-bert/bert-base-uncased"
    """BERT's vocabulary: a hub id or a local folder; ignored if `path` has one."""


class PickScoreOptions(Section):
    processor: str | None = None
    """Hub id or folder of the tokenizer and the image processor; empty means that of `path`."""


class HpsOptions(Section):
    file: str = "HPS_v2.1_compressed.pt"
    """Name of the open_clip weights in `path`; ignored if `path` has model.safetensors."""
    processor: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    """The CLIPModel whose configuration, tokenizer and image processor fit the weights."""


class BertScoreOptions(Section):
    text_model: str = "microsoft/deberta-xlarge-mnli"
    """Text encoder whose hidden states are compared: a hub id or a local folder."""
    layer: int | None = Field(None, ge=0)
    """Layer whose hidden states are compared, where 0 is the embeddings; empty means bert_score's
    choice for the model, or its last layer."""
    max_new_tokens: Positive = 30
    """Length of the longest caption in tokens."""


class JpegOptions(Section):
    quality: int = Field(95, ge=1, le=100)
    """JPEG quality."""


class HttpOptions(Section):
    url: str = Field(pattern=r"^https?://")
    """Address to which pictures are posted."""
    timeout: float = Field(60.0, gt=0)
    """Seconds to wait for a response."""
    retries: int = Field(4, ge=0)
    """How often a request is repeated after no response or after status 429 or 5xx."""
    token_env: str | None = Field(None, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    """Name of the environment variable of the scorer's process that contains a bearer token."""


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
