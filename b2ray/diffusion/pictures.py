"""Picture files: reading of demonstrations, and thumbnails for branch trees."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageOps

FORK = -1  # the branch number of the picture that the prefix predicts
THUMBNAIL = 128  # pixels of a thumbnail's longer side, at the most
UNCHANGED = 64  # up to this size a thumbnail is the picture itself


def thumbnail(picture: np.ndarray) -> bytes:
    """A small file of a picture: a PNG if the picture is small already, else a JPEG.

    Args:
        picture: uint8, shape (height, width, 3).
    """
    image, file = Image.fromarray(picture), io.BytesIO()
    if max(image.size) <= UNCHANGED:
        image.save(file, format="PNG")
    else:
        image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
        image.save(file, format="JPEG", quality=85)
    return file.getvalue()


def fitted(file: bytes, height: int, width: int) -> np.ndarray:
    """Decode a picture file, scale it until it covers the wanted size, and crop its centre.

    Args:
        file: the content of the file.
        height: height of the result in pixels.
        width: width of the result in pixels.

    Returns:
        uint8, shape (height, width, 3), with transparent parts on white.
    """
    picture = decoded(file)
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        background = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(background, picture)
    cropped = ImageOps.fit(picture.convert("RGB"), (width, height), Image.Resampling.LANCZOS)
    return np.asarray(cropped)


def decoded(file: bytes) -> Image.Image:
    """Decode a picture file, rotated as its EXIF orientation says."""
    with Image.open(io.BytesIO(file)) as picture:
        return ImageOps.exif_transpose(picture)
