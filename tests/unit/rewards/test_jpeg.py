"""Sizes of JPEG files."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from b2ray.config import Reward
from b2ray.errors import ConfigError
from b2ray.rewards import check, load

NOISE = np.random.default_rng(0).integers(0, 256, (1, 64, 48, 3), dtype=np.uint8)
IMAGES = np.concatenate([np.zeros_like(NOISE), NOISE, NOISE // 4])


def scores(kind: str, **options: int) -> np.ndarray:
    spec = Reward(name="jpeg", kind=f"jpeg_{kind}", options=options)
    return load(spec, torch.device("cpu")).score(IMAGES, [""] * len(IMAGES))


@pytest.mark.parametrize("options", [{}, {"quality": 30}])
def test_the_score_is_the_size_of_the_file_in_kilobytes(tmp_path, options):
    sizes = []
    for image in IMAGES:
        Image.fromarray(image).save(tmp_path / "i.jpg", quality=options.get("quality", 95))
        sizes.append((tmp_path / "i.jpg").stat().st_size / 1000)
    found = scores("incompressibility", **options)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, sizes, rtol=1e-6)
    np.testing.assert_array_equal(scores("compressibility", **options), -found)
    assert found[0] < found[2] < found[1]


def test_the_quality_is_a_percentage():
    with pytest.raises(ConfigError, match=r"'jpeg': options\.quality is 101: .*less than or equal"):
        check(Reward(name="jpeg", kind="jpeg_compressibility", options={"quality": 101}))
