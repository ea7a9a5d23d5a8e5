"""LAION's aesthetic predictor, version 2: how much people like a picture, whatever its prompt.

The score is a linear map of the picture's CLIP embedding, normalised to unit length (Schuhmann et
al., LAION-5B, 2022).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import AutoImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from b2ray.config import Reward
from b2ray.config.paths import find
from b2ray.diffusion import pretrained
from b2ray.rewards import head
from b2ray.rewards.checkpoint import Tensors, fill, read, shape
from b2ray.rewards.options import AestheticOptions
from b2ray.rewards.tower import Tower

USUAL = "shunk031/aesthetics-predictor-v2-sac-logos-ava1-l14-linearMSE"

_HEAD = "layers."
_UNUSED = ("vision_model.embeddings.position_ids",)  # a buffer in older files
_PROCESSORS = ("preprocessor_config.json", "processor_config.json")


class Aesthetic(Tower):
    """A CLIP image tower with a linear head, from one file or from two.

    Args:
        spec: the reward's specification; `spec.path` is the predictor's folder or hub id.
        options: the file of the head, if it has its own.
        device: the device of the model.

    Raises:
        ConfigError: the model cannot be loaded.
    """

    def __init__(self, spec: Reward, options: AestheticOptions, device: torch.device) -> None:
        path = spec.path or USUAL
        try:
            file = pretrained.file(path, "model.safetensors", spec.revision)
            if file is None:
                raise ValueError("model.safetensors is not there")
            tensors = read(file)
            if options.head is None:
                layers = {k: tensors.pop(k) for k in list(tensors) if k.startswith(_HEAD)}
            else:
                layers = _head_file(options.head)
            self.model = _tower(path, spec.revision, tensors).to(device)
            self.head = _linear_head(layers, self.model.config.projection_dim).to(device)
            self.mean, self.std = _statistics(path, spec.revision)
        except Exception as error:  # the loaders raise whatever their files provoke
            field, wanted = f"reward {spec.name!r}:", "an aesthetic predictor"
            raise pretrained.refusal(field, path, wanted, error) from error
        self.device = device
        self.size = self.model.config.image_size

    def score(self, images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        """Scores of about 1 to 10; arguments as in `b2ray.rewards.RewardModel`, prompts unused."""
        vectors = torch.from_numpy(self.embed(images)).to(self.device).double()
        with torch.inference_mode():
            return self.head(vectors).squeeze(1).float().cpu().numpy()

    def _features(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values=pixels).image_embeds


def _tower(path: str, revision: str | None, tensors: Tensors) -> CLIPVisionModelWithProjection:
    """The image tower in float32, without the text half that a CLIPModel also has."""
    source, kwargs = pretrained.source(path, revision)
    config = CLIPVisionConfig.from_pretrained(source, **kwargs)
    config.projection_dim = shape(tensors, "visual_projection.weight")[0]
    model = CLIPVisionModelWithProjection(config)
    text = [k for k in tensors if k.startswith("text_") or k == "logit_scale"]
    fill(model, tensors, unused={*_UNUSED, *text})
    return model.eval().requires_grad_(False)


def _statistics(path: str, revision: str | None) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and standard deviation of each channel: the processor's, or CLIP's without one."""
    if not any(pretrained.file(path, name, revision) for name in _PROCESSORS):
        return OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
    source, kwargs = pretrained.source(path, revision)
    processor = AutoImageProcessor.from_pretrained(source, **kwargs)
    return processor.image_mean, processor.image_std


def _head_file(name: str) -> dict[str, torch.Tensor]:
    """The tensors of a head in its own file."""
    file = find(name)
    if file is None or not file.is_file():
        raise ValueError(f"options.head {name!r} is not a file")
    return read(file)


def _linear_head(tensors: Tensors, width: int) -> torch.nn.Linear:
    """The head as a single linear layer in float64.

    Args:
        tensors: the head's tensors.
        width: width of the tower's embeddings.
    """
    if not tensors:
        raise ValueError("it has no head (options.head names one in its own file)")
    sizes = head.widths(tensors, _HEAD)
    if (sizes[0], sizes[-1]) != (width, 1):
        raise ValueError(
            f"the head maps {sizes[0]} numbers to {sizes[-1]}, but the tower's vectors have {width}"
        )
    layers = head.make(sizes)
    fill(layers, tensors, lambda key: _HEAD + key)
    return head.fold(layers).requires_grad_(False)
