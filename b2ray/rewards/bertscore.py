"""Caption BERTScore: how much of the prompt a captioning model finds in the picture.

The reward is that of arXiv 2305.13301, section 5.3: the BERTScore recall (arXiv 1904.09675) of the
prompt in the picture's caption. It is computed as in the package `bert_score`, without idf and
without rescaling.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoTokenizer,
    GPT2Tokenizer,
    RobertaTokenizer,
)
from transformers.utils import logging

from b2ray.config import Reward, Section
from b2ray.diffusion import pretrained
from b2ray.rewards.options import BertScoreOptions

PAPER_CAPTIONER = "Salesforce/blip-image-captioning-large"
# The layers that bert_score chose for their correlation with human judgements.
LAYERS = {
    "bert-base-uncased": 9,
    "bert-large-uncased": 18,
    "deberta-base-mnli": 9,
    "deberta-large-mnli": 18,
    "deberta-xlarge-mnli": 40,
    "distilbert-base-uncased": 5,
    "roberta-base": 10,
    "roberta-large": 17,
    "roberta-large-mnli": 19,
}
LONGEST_TEXT = 512  # tokens


class BertScore:
    """BERTScore recall of each prompt in its picture's caption, at most 1.

    Args:
        spec: the reward's specification; `spec.path` is the captioner's folder or hub id.
        options: a `BertScoreOptions`.
        device: the device of both models.

    Raises:
        ConfigError: a model cannot be loaded.
    """

    def __init__(self, spec: Reward, options: Section, device: torch.device) -> None:
        assert isinstance(options, BertScoreOptions)
        self.captioner = Captioner(spec, options, device)
        self.encoder = Encoder(spec, options, device)

    def score(self, images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        """Recalls up to 1; arguments as in `b2ray.rewards.RewardModel`."""
        captions = self.captioner.captions(images)
        texts = list(dict.fromkeys([*captions, *prompts]))  # many pictures have the same prompt
        encoded = dict(zip(texts, self.encoder.encode(texts), strict=True))
        pairs = zip(captions, prompts, strict=True)
        return np.array([recall(encoded[c], encoded[p]) for c, p in pairs], np.float32)


class Captioner:
    """A captioning model, with greedy decoding so that a picture always gets the same caption."""

    def __init__(self, spec: Reward, options: BertScoreOptions, device: torch.device) -> None:
        path = spec.path or PAPER_CAPTIONER
        source, kwargs = pretrained.source(path, spec.revision)
        try:
            self.model = _complete_model(AutoModelForImageTextToText, source, **kwargs).to(device)
            self.processor = AutoImageProcessor.from_pretrained(source, **kwargs)
            self.tokenizer = AutoTokenizer.from_pretrained(source, **kwargs)
        except Exception as error:  # the loaders raise whatever their files provoke
            raise pretrained.refusal(
                f"reward {spec.name!r}:", path, "a captioner", error
            ) from error
        self.limit, self.device = options.max_new_tokens, device

    @torch.inference_mode()
    def captions(self, images: np.ndarray) -> list[str]:
        """A caption for each picture; uint8, shape (N, height, width, 3)."""
        # Every family of captioners has its own preprocessing.
        pictures = [Image.fromarray(image) for image in images]
        pixels = self.processor(images=pictures, return_tensors="pt").pixel_values
        tokens = self.model.generate(
            pixel_values=pixels.to(self.device),
            max_new_tokens=self.limit,
            do_sample=False,
            num_beams=1,
        )
        texts = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [text.strip() for text in texts]


class Encoded:
    """The n encoded tokens of a text.

    Args:
        vectors: unit vectors, float32, shape (n, D).
        words: which tokens are words, and not [CLS] or [SEP], bool, shape (n,).
    """

    def __init__(self, vectors: torch.Tensor, words: torch.Tensor) -> None:
        self.vectors, self.words = vectors, words


class Encoder:
    """The first layers of a text encoder, up to the one whose hidden states are compared."""

    def __init__(self, spec: Reward, options: BertScoreOptions, device: torch.device) -> None:
        path = options.text_model
        source, kwargs = pretrained.source(path)
        try:
            config = AutoConfig.from_pretrained(source, **kwargs)
            # As in bert_score, the layers above are not even constructed.
            config.num_hidden_layers = _layer(path, options.layer, config.num_hidden_layers)
            self.model = _complete_model(AutoModel, source, config=config, **kwargs).to(device)
            self.tokenizer = AutoTokenizer.from_pretrained(source, **kwargs)
        except Exception as error:  # the loaders raise whatever their files provoke
            field = f"reward {spec.name!r}: options.text_model"
            raise pretrained.refusal(field, path, "a text encoder", error) from error
        self.device = device
        self.marks = torch.tensor([self.tokenizer.cls_token_id, self.tokenizer.sep_token_id])

    @torch.inference_mode()
    def encode(self, texts: Sequence[str]) -> list[Encoded]:
        """Encode texts into their tokens, including [CLS] and [SEP]."""
        texts = [text.strip() for text in texts]
        if isinstance(self.tokenizer, GPT2Tokenizer | RobertaTokenizer):
            # Their vocabularies contain most words with a space in front; bert_score adds it, too.
            texts = [f" {text}" if text else text for text in texts]
        tokens = self.tokenizer(
            texts,
            padding=True,
            padding_side="right",
            truncation=True,
            max_length=min(self.tokenizer.model_max_length, LONGEST_TEXT),
            return_tensors="pt",
        )
        states = self.model(
            input_ids=tokens.input_ids.to(self.device),
            attention_mask=tokens.attention_mask.to(self.device),
        ).last_hidden_state
        vectors = torch.nn.functional.normalize(states, dim=-1).cpu()
        words = ~torch.isin(tokens.input_ids, self.marks)
        lengths = tokens.attention_mask.sum(dim=1).tolist()
        return [Encoded(vectors[i, :n], words[i, :n]) for i, n in enumerate(lengths)]


def recall(caption: Encoded, prompt: Encoded) -> float:
    """Mean over the prompt's words of the highest cosine with any token of the caption.

    A word may match the caption's [CLS] or [SEP]. The recall is 0 if either text has no words.
    """
    if not (caption.words.any() and prompt.words.any()):
        return 0.0
    best = (prompt.vectors @ caption.vectors.T).amax(dim=1)
    return float(best[prompt.words].mean())


def _layer(path: str, option: int | None, layers: int) -> int:
    """The layer that the option names, or bert_score's choice, or the last of `layers`."""
    layer = LAYERS.get(path.rstrip("/").rpartition("/")[2], layers) if option is None else option
    if not 0 <= layer <= layers:
        raise ValueError(f"options.layer is {layer}, but it has {layers} layers: use 0 to {layers}")
    return layer


def _complete_model(kind: Any, source: str, **kwargs: Any) -> Any:
    """Load a model whose file has all weights, except those of a pooler, which is not used.

    Args:
        kind: the class of the model.
        source: a local folder or a hub id.
        kwargs: further arguments of `from_pretrained`.
    """
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # unused layers would be reported as a problem
    try:
        model, report = kind.from_pretrained(
            source, dtype=torch.float32, output_loading_info=True, **kwargs
        )
    finally:
        logging.set_verbosity(verbosity)
    missing = sorted(key for key in report["missing_keys"] if "pooler" not in key)
    if missing:
        raise ValueError(f"its weights lack {missing[0]} and {len(missing) - 1} more")
    return model.eval().requires_grad_(False)
