"""Stage ``prompts``: the captions that runs train on and those they are held to."""

from __future__ import annotations

from pathlib import Path

from b2ray.shapes import PROMPTS, WEIGHTS
from b2ray.shapes.build.common import Settings, write_text
from b2ray.shapes.captions import Caption, choose


def build(settings: Settings) -> None:
    """Writes ``train.txt``, ``train32.txt`` (the same 8 and 24 more) and ``heldout.txt``.

    The files lie in the package's own ``prompts`` folder when the weights go to theirs, else in
    ``prompts`` beside the weights' folders.
    """
    few = choose(8, settings.seed + 7)
    more = [*few, *choose(24, settings.seed + 8, exclude=few)]
    held_out = choose(64, settings.seed + 9, exclude=more)
    folder = PROMPTS if settings.out == WEIGHTS.resolve() else settings.out / "prompts"
    _write(folder / "train.txt", few)
    _write(folder / "train32.txt", more)
    _write(folder / "heldout.txt", held_out)


def _write(path: Path, captions: list[Caption]) -> None:
    write_text(path, "".join(f"{caption.text}\n" for caption in captions))
