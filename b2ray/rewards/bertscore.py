"""Caption BERTScore: what a captioner sees in the picture, compared with the prompt.

The reward of arXiv 2305.13301, section 5.3: BERTScore recall (arXiv 1904.09675) of the prompt in
the caption, computed as the package `bert_score` does, without idf and without rescaling.
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

from b2ray import hub
from b2ray.config import Reward, Section
from b2ray.rewards.options import BertScoreOptions

PAPER_CAPTIONER = "Salesforce/blip-image-captioning-large"
# The layers that bert_score chose by their correlation with people's judgements.
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
    """BERTScore recall of each prompt in its picture's caption, at most 1."""

    def __init__(self, spec: Reward, options: Section, device: torch.device) -> None:
        assert isinstance(options, BertScoreOptions)
        self.captioner = Captioner(spec, options, device)
        self.encoder = Encoder(spec, options, device)

    def score(self, images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        """Recalls; arguments as `b2ray.rewards.Scorer`."""
        captions = self.captioner.captions(images)
        texts = list(dict.fromkeys([*captions, *prompts]))  # branches share their prompt
        encoded = dict(zip(texts, self.encoder.encode(texts), strict=True))
        pairs = zip(captions, prompts, strict=True)
        return np.array([recall(encoded[c], encoded[p]) for c, p in pairs], np.float32)


class Captioner:
    """An image-to-text model that needs no question; greedy, so that a caption is a function."""

    def __init__(self, spec: Reward, options: BertScoreOptions, device: torch.device) -> None:
        path = spec.path or PAPER_CAPTIONER
        source, where = hub.source(path, spec.revision)
        try:
            self.model = _whole(AutoModelForImageTextToText, source, **where).to(device)
            self.processor = AutoImageProcessor.from_pretrained(source, **where)
            self.tokenizer = AutoTokenizer.from_pretrained(source, **where)
        except Exception as error:  # the loaders raise whatever their files provoke
            raise hub.refusal(f"reward {spec.name!r}:", path, "a captioner", error) from error
        self.limit, self.device = options.max_new_tokens, device

    @torch.inference_mode()
    def captions(self, images: np.ndarray) -> list[str]:
        """A caption of each uint8 picture of (N, height, width, 3)."""
        # The captioner's own preprocessing: every family has another.
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
    """A text's tokens: unit vectors, float32 (n, D), and which are words, bool (n,)."""

    def __init__(self, vectors: torch.Tensor, words: torch.Tensor) -> None:
        self.vectors, self.words = vectors, words


class Encoder:
    """The first layers of a text encoder."""

    def __init__(self, spec: Reward, options: BertScoreOptions, device: torch.device) -> None:
        path = options.text_model
        source, where = hub.source(path)
        try:
            config = AutoConfig.from_pretrained(source, **where)
            # The layers above are not even made, as in bert_score.
            config.num_hidden_layers = _layer(path, options.layer, config.num_hidden_layers)
            self.model = _whole(AutoModel, source, config=config, **where).to(device)
            self.tokenizer = AutoTokenizer.from_pretrained(source, **where)
        except Exception as error:  # the loaders raise whatever their files provoke
            field = f"reward {spec.name!r}: options.text_model"
            raise hub.refusal(field, path, "a text encoder", error) from error
        self.device = device
        self.marks = torch.tensor([self.tokenizer.cls_token_id, self.tokenizer.sep_token_id])

    @torch.inference_mode()
    def encode(self, texts: Sequence[str]) -> list[Encoded]:
        """The texts' tokens, [CLS] and [SEP] among them."""
        texts = [text.strip() for text in texts]
        if isinstance(self.tokenizer, GPT2Tokenizer | RobertaTokenizer):
            # They know most words by the space before them; bert_score adds it, too.
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
    """Mean over the prompt's words of their best cosine with any of the caption's tokens.

    A word may match the caption's [CLS] or [SEP]. Without a word on either side it is 0.
    """
    if not (caption.words.any() and prompt.words.any()):
        return 0.0
    best = (prompt.vectors @ caption.vectors.T).amax(dim=1)
    return float(best[prompt.words].mean())


def _layer(path: str, asked: int | None, layers: int) -> int:
    chosen = LAYERS.get(path.rstrip("/").rpartition("/")[2], layers) if asked is None else asked
    if not 0 <= chosen <= layers:
        raise ValueError(
            f"options.layer is {chosen}, but it has {layers} layers: use 0 to {layers}"
        )
    return chosen


def _whole(kind: Any, source: str, **where: Any) -> Any:
    """A model of which no weight but an unused pooler's is left at random."""
    loud = logging.get_verbosity()
    logging.set_verbosity_error()  # its report of unused layers looks like trouble
    try:
        model, found = kind.from_pretrained(
            source, dtype=torch.float32, output_loading_info=True, **where
        )
    finally:
        logging.set_verbosity(loud)
    missing = sorted(key for key in found["missing_keys"] if "pooler" not in key)
    if missing:
        raise ValueError(f"its weights lack {missing[0]} and {len(missing) - 1} more")
    return model.eval().requires_grad_(False)
