"""Resizing on the device against Pillow's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor

from b2ray.rewards.preprocess import to_pixels

CPU = torch.device("cpu")
PLAIN = ([0.0] * 3, [1.0] * 3)


def pictures(count: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth colours with hard edges: like a picture, and unkind to a resizer."""
    rng = np.random.default_rng(seed)
    smooth = rng.uniform(0, 255, (count, 5, 5, 3)).astype(np.uint8)
    grown = [
        np.asarray(Image.fromarray(s).resize((width, height), Image.Resampling.BILINEAR))
        for s in smooth
    ]
    images = np.stack(grown)
    images[:, height // 3 : height // 2, width // 4 : width // 2] = 255
    images[:, : height // 5, width // 2 :] = 0
    return images


def levels(images: np.ndarray, size: int) -> np.ndarray:
    """Our result as 8-bit levels, (N, size, size, 3)."""
    pixels = to_pixels(images, size, *PLAIN, CPU) * 255
    return pixels.round().permute(0, 2, 3, 1).numpy().astype(int)


def pillows(images: np.ndarray, size: int) -> np.ndarray:
    resized = [Image.fromarray(i).resize((size, size), Image.Resampling.BICUBIC) for i in images]
    return np.stack([np.asarray(i) for i in resized]).astype(int)


@pytest.mark.parametrize(("side", "size"), [(512, 224), (256, 224), (64, 16), (100, 33)])
def test_downsampling_is_pillows_within_one_level(side, size):
    images = pictures(2, side, side)
    difference = np.abs(levels(images, size) - pillows(images, size))
    assert difference.max() <= 1
    assert (difference == 0).mean() >= 0.988


def test_noise_is_resized_within_one_level_too():
    images = np.random.default_rng(0).integers(0, 256, (2, 128, 128, 3), dtype=np.uint8)
    assert np.abs(levels(images, 56) - pillows(images, 56)).max() <= 1


@pytest.mark.parametrize(("side", "size"), [(32, 224), (16, 24)])
def test_upsampling_is_pillows_within_one_level(side, size):
    images = pictures(2, side, side)
    assert np.abs(levels(images, size) - pillows(images, size)).max() <= 1


def test_pictures_of_the_right_size_are_untouched():
    images = pictures(2, 16, 16)
    np.testing.assert_array_equal(levels(images, 16), images)


@pytest.mark.parametrize(
    ("height", "width"), [(48, 96), (96, 48), (33, 40), (24, 41), (24, 48), (25, 24)]
)
def test_other_shapes_are_cropped_as_clips_processor_does(height, width):
    images = pictures(2, height, width)
    processor = CLIPImageProcessor(
        size={"shortest_edge": 24},
        crop_size={"height": 24, "width": 24},
        do_normalize=False,
    )
    theirs = processor([Image.fromarray(i) for i in images], return_tensors="np").pixel_values
    ours = to_pixels(images, 24, *PLAIN, CPU).numpy()
    assert ours.shape == theirs.shape == (2, 3, 24, 24)
    assert np.abs(ours - theirs).max() * 255 < 1.01


def test_channels_are_normalised_one_by_one():
    images = np.full((1, 4, 4, 3), 255, np.uint8)
    pixels = to_pixels(images, 4, [0.0, 0.5, 1.0], [1.0, 0.25, 2.0], CPU)
    assert pixels.dtype == torch.float32
    assert pixels[0, :, 0, 0].tolist() == [1.0, 2.0, 0.0]


def test_a_picture_does_not_depend_on_its_neighbours():
    images = pictures(3, 50, 50)
    together = to_pixels(images, 16, *PLAIN, CPU)
    for row in range(3):
        assert torch.equal(to_pixels(images[row : row + 1], 16, *PLAIN, CPU)[0], together[row])
