"""``python -m b2ray.shapes.demonstrations FOLDER``: pictures that show their captions.

Draws a folder as ``demonstrations.path`` wants it: numbered PNG files and a ``metadata.jsonl``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from b2ray.shapes import PROMPTS
from b2ray.shapes.captions import Caption
from b2ray.shapes.render import render_batch


def main(arguments: Sequence[str] | None = None) -> int:
    """Draws the folder; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m b2ray.shapes.demonstrations")
    parser.add_argument("folder", type=Path, help="a folder that is empty, or not there yet")
    parser.add_argument("--count", type=int, default=64, help="pictures (default: 64)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--captions",
        type=Path,
        default=PROMPTS / "train.txt",
        help="a file with one a line, drawn in turn (default: the embedded training captions)",
    )
    args = parser.parse_args(arguments)
    if args.folder.exists() and any(args.folder.iterdir()):
        print(f"{args.folder} is not empty: give another folder, or delete it.", file=sys.stderr)
        return 2
    draw(args.folder, args.captions.read_text(encoding="utf-8").split("\n"), args.count, args.seed)
    print(f"{args.count} pictures and their captions are in {args.folder}")
    return 0


def draw(folder: Path, captions: Sequence[str], count: int, seed: int = 0) -> None:
    """Writes `count` pictures of the captions, taken in turn, and `metadata.jsonl`.

    Raises:
        ValueError: a line is no caption of this world.
    """
    known = [Caption.parse(text) for text in captions if text.strip()]
    chosen = [known[i % len(known)] for i in range(count)]
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i, (caption, picture) in enumerate(zip(chosen, render_batch(chosen, seed), strict=True)):
        name = f"{i:04d}.png"
        Image.fromarray(picture).save(folder / name)
        lines.append(json.dumps({"file_name": name, "text": caption.text}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
