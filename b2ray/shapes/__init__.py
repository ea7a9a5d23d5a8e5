"""The embedded world: captions, pictures, an exact judge, and a small text-to-image model.

Importing this package needs numpy and Pillow only; the weights are ordinary diffusers and
transformers folders.
"""

from __future__ import annotations

from pathlib import Path

from b2ray.shapes.captions import Caption, Thing, all_captions
from b2ray.shapes.judge import Judge
from b2ray.shapes.render import render, render_batch

WEIGHTS = Path(__file__).parent / "weights"
BASE = WEIGHTS / "base"
"""A folder for ``diffusers.StableDiffusionPipeline.from_pretrained``."""
REWARD = WEIGHTS / "reward"
"""A folder for ``transformers.CLIPModel.from_pretrained`` and ``CLIPProcessor``."""
AESTHETIC = WEIGHTS / "aesthetic"
"""A folder for a reward of kind `aesthetic`."""
IMAGEREWARD = WEIGHTS / "imagereward"
"""A folder for a reward of kind `imagereward`."""
PROMPTS = Path(__file__).parent / "prompts"
"""``train.txt`` (8 captions), ``train32.txt`` (32) and ``heldout.txt`` (64), one a line."""

__all__ = [
    "AESTHETIC",
    "BASE",
    "IMAGEREWARD",
    "PROMPTS",
    "REWARD",
    "WEIGHTS",
    "Caption",
    "Judge",
    "Thing",
    "all_captions",
    "render",
    "render_batch",
]
