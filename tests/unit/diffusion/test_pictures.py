"""Picture files: how demonstrations are fitted to the model's size, and thumbnails."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from b2ray.diffusion.pictures import THUMBNAIL, UNCHANGED, fitted, thumbnail


def picture(height: int, width: int) -> np.ndarray:
    """A gradient: what a photograph is to a compressor, nearly."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 // width, y * 255 // height, (x + y) % 256], -1).astype(np.uint8)


def opened(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content))


@pytest.mark.parametrize("size", [(8, 8), (UNCHANGED, 20)])
def test_a_small_picture_is_kept_exactly(size):
    found = opened(thumbnail(picture(*size)))
    assert found.format == "PNG"
    np.testing.assert_array_equal(np.asarray(found), picture(*size))


@pytest.mark.parametrize(("size", "kept"), [((512, 512), (128, 128)), ((256, 1024), (32, 128))])
def test_a_large_picture_is_made_thumbnail(size, kept):
    content = thumbnail(picture(*size))
    found = opened(content)
    assert found.format == "JPEG" and max(found.size) == THUMBNAIL
    assert (found.height, found.width) == kept
    assert len(content) < 12_000
    expected = picture(*size)[:: size[0] // kept[0], :: size[1] // kept[1]]
    assert np.abs(np.asarray(found.convert("RGB")).astype(float) - expected)[..., 0].mean() < 8


def encoded(picture: Image.Image, form: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()


def test_a_picture_of_the_right_size_is_not_touched():
    pixels = np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8)
    np.testing.assert_array_equal(fitted(encoded(Image.fromarray(pixels)), 16, 24), pixels)


def test_pictures_are_cut_evenly_around_their_centre():
    pixels = np.zeros((10, 30, 3), np.uint8)
    pixels[:, 10:20] = 255
    found = fitted(encoded(Image.fromarray(pixels)), 10, 10)
    assert found.shape == (10, 10, 3) and found.min() == 255
    tall = fitted(encoded(Image.fromarray(pixels.swapaxes(0, 1))), 20, 20)
    # The edges of the white are blurred by the enlargement.
    assert tall.shape == (20, 20, 3) and tall[5:-5].min() == 255 and tall[0].max() < 255


def test_transparency_is_white_and_cameras_are_turned():
    glass = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    assert fitted(encoded(glass), 4, 4).min() == 255
    palette = Image.new("P", (4, 4))
    assert fitted(encoded(palette, transparency=0), 4, 4).min() == 255
    pixels = np.zeros((4, 8, 3), np.uint8)
    pixels[:, 4:] = 255
    turned = Image.Exif()
    turned[0x0112] = 6  # the camera lay on its side: rows become columns
    found = fitted(encoded(Image.fromarray(pixels), exif=turned), 8, 4)
    assert found[:4].max() == 0 and found[4:].min() == 255


def test_pictures_of_other_modes_are_read():
    assert fitted(encoded(Image.new("L", (4, 4), 100)), 4, 4).tolist() == [[[100] * 3] * 4] * 4
    assert fitted(encoded(Image.new("CMYK", (4, 4)), "JPEG"), 4, 4).min() == 255
