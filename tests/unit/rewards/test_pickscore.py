"""PickScore against transformers' own logits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPModel, CLIPProcessor

from b2ray.config import Reward
from b2ray.errors import ConfigError
from b2ray.rewards import load
from tests.models import PROMPTS, clip

CPU = torch.device("cpu")
IMAGES = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Weights without a processor, and a processor of their own folder."""
    folder = tmp_path_factory.mktemp("pickscore")
    model, processor = clip(seed=1)
    torch.nn.init.constant_(model.logit_scale, np.log(90))
    model.save_pretrained(folder / "weights")
    processor.save_pretrained(folder / "processor")
    return folder


def spec(parts, **options: str) -> Reward:
    return Reward(name="pick", kind="pickscore", path=str(parts / "weights"), options=options)


def test_it_is_the_diagonal_of_transformers_logits(parts):
    model = CLIPModel.from_pretrained(parts / "weights")
    inputs = CLIPProcessor.from_pretrained(parts / "processor")(
        text=PROMPTS, images=[Image.fromarray(i) for i in IMAGES], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        expected = model(**inputs).logits_per_image.diagonal().numpy()
    found = load(spec(parts, processor=str(parts / "processor")), CPU).score(IMAGES, PROMPTS)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert np.abs(found).max() > 1  # scaled, not a cosine


def test_weights_without_a_processor_need_the_option(parts):
    with pytest.raises(ConfigError, match=r"reward 'pick': .*cannot be loaded as a CLIPModel"):
        load(spec(parts), CPU)
