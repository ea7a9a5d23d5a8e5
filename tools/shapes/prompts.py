"""Stage ``prompts`` chooses the captions for training and for held-out evaluation."""

from __future__ import annotations

from pathlib import Path

from b2ray.shapes import PROMPTS, WEIGHTS
from b2ray.shapes.captions import Caption, choose
from tools.shapes.common import Settings, write_text


def build(settings: Settings) -> None:
    """Write ``train.txt``, ``train32.txt`` (the same 8 captions and 24 more) and ``heldout.txt``.

    If the weights are written to the package's own folder, so are the prompts. Otherwise they are
    written to a folder ``prompts`` beside the weights.
    """
    train8 = choose(8, settings.seed + 7)
    train32 = [*train8, *choose(24, settings.seed + 8, exclude=train8)]
    heldout = choose(64, settings.seed + 9, exclude=train32)
    folder = PROMPTS if settings.out == WEIGHTS.resolve() else settings.out / "prompts"
    _write(folder / "train.txt", train8)
    _write(folder / "train32.txt", train32)
    _write(folder / "heldout.txt", heldout)


def _write(path: Path, captions: list[Caption]) -> None:
    write_text(path, "".join(f"{caption.text}\n" for caption in captions))
