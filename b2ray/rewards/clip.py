"""CLIP score: the cosine between a picture's and its prompt's embedding; and PickScore."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

from b2ray import hub
from b2ray.config import Reward, Section
from b2ray.rewards.tower import Tower

PAPER_MODEL = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


class Clip(Tower):
    """Any `CLIPModel`; the paper's ViT-H-14 unless the specification names another."""

    wanted = "a CLIPModel"
    usual = PAPER_MODEL

    def __init__(self, spec: Reward, options: Section, device: torch.device) -> None:
        path = spec.path or self.usual
        try:
            model = self._model(path, spec.revision, options)
            # Only some kinds have the option.
            elsewhere = getattr(options, "processor", None)
            source, where = hub.source(elsewhere) if elsewhere else hub.source(path, spec.revision)
            self.tokenizer = AutoTokenizer.from_pretrained(source, **where)
            processor = AutoImageProcessor.from_pretrained(source, **where)
        except Exception as error:  # the loaders raise whatever their files provoke
            raise hub.refusal(f"reward {spec.name!r}:", path, self.wanted, error) from error
        self.model = model.to(device).eval().requires_grad_(False)
        self.device = device
        self.size = model.config.vision_config.image_size
        self.mean, self.std = processor.image_mean, processor.image_std
        self._texts: dict[str, torch.Tensor] = {}

    def _model(self, path: str, revision: str | None, options: Section) -> CLIPModel:
        source, where = hub.source(path, revision)
        return CLIPModel.from_pretrained(source, use_safetensors=True, dtype=torch.float32, **where)

    def score(self, images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        """Cosines in -1..1; arguments as `b2ray.rewards.Scorer`."""
        pictures = torch.from_numpy(self.embed(images)).to(self.device)
        texts = torch.stack([self._text(p) for p in prompts])
        return (pictures * texts).sum(dim=1).cpu().numpy()

    def _features(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.model.get_image_features(pixel_values=pixels).pooler_output

    @torch.inference_mode()
    def _text(self, prompt: str) -> torch.Tensor:
        """Unit embedding of one prompt, shape (D,); encoded once, alone, and kept."""
        if prompt not in self._texts:
            limit = self.model.config.text_config.max_position_embeddings
            tokens = self.tokenizer(
                prompt, truncation=True, max_length=limit, padding="max_length", return_tensors="pt"
            ).to(self.device)
            features = self.model.get_text_features(
                input_ids=tokens.input_ids, attention_mask=tokens.attention_mask
            ).pooler_output
            self._texts[prompt] = torch.nn.functional.normalize(features, dim=1)[0]
        return self._texts[prompt]


class PickScore(Clip):
    """A `CLIPModel` trained on people's choices between two pictures (arXiv 2305.01569, eq. 1)."""

    usual = "yuvalkirstain/PickScore_v1"

    def score(self, images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        """Cosines times the model's own scale, about 18 to 24."""
        return super().score(images, prompts) * float(self.model.logit_scale.exp())
