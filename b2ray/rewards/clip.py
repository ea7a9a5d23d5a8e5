"""CLIP score, the cosine of a picture's and its prompt's embeddings; and PickScore."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

from b2ray.config import Reward, Section
from b2ray.diffusion import pretrained
from b2ray.rewards.tower import Tower

PAPER_MODEL = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


class Clip(Tower):
    """CLIP score of any `CLIPModel`; by default of the paper's ViT-H-14.

    Args:
        spec: the reward's specification; `spec.path` is the model's folder or hub id.
        options: the options of the reward's kind.
        device: the device of the model.

    Raises:
        ConfigError: the model cannot be loaded.
    """

    wanted = "a CLIPModel"
    """What `spec.path` has to be, for messages."""
    usual = PAPER_MODEL
    """The default of `spec.path`."""

    def __init__(self, spec: Reward, options: Section, device: torch.device) -> None:
        path = spec.path or self.usual
        try:
            model = self._model(path, spec.revision, options)
            # Not all kinds have the option.
            processor_path = getattr(options, "processor", None)
            source, kwargs = (
                pretrained.source(processor_path)
                if processor_path
                else pretrained.source(path, spec.revision)
            )
            self.tokenizer = AutoTokenizer.from_pretrained(source, **kwargs)
            processor = AutoImageProcessor.from_pretrained(source, **kwargs)
        except Exception as error:  # the loaders raise whatever their files provoke
            raise pretrained.refusal(f"reward {spec.name!r}:", path, self.wanted, error) from error
        self.model = model.to(device).eval().requires_grad_(False)
        self.device = device
        self.size = model.config.vision_config.image_size
        self.mean, self.std = processor.image_mean, processor.image_std
        self._texts: dict[str, torch.Tensor] = {}

    def _model(self, path: str, revision: str | None, options: Section) -> CLIPModel:
        """Load the model in float32 on the CPU."""
        source, kwargs = pretrained.source(path, revision)
        return CLIPModel.from_pretrained(
            source, use_safetensors=True, dtype=torch.float32, **kwargs
        )

    def score(self, images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        """Cosines from -1 to 1; arguments as in `b2ray.rewards.RewardModel`."""
        pictures = torch.from_numpy(self.embed(images)).to(self.device)
        texts = torch.stack([self._text(p) for p in prompts])
        return (pictures * texts).sum(dim=1).cpu().numpy()

    def _features(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.model.get_image_features(pixel_values=pixels).pooler_output

    @torch.inference_mode()
    def _text(self, prompt: str) -> torch.Tensor:
        """Unit embedding of one prompt, shape (D,); each prompt is encoded once and by itself."""
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
        """Cosines times the model's logit scale, about 18 to 24; arguments as in `Clip.score`."""
        return super().score(images, prompts) * float(self.model.logit_scale.exp())
