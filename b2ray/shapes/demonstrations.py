"""``python -m b2ray.shapes.demonstrations FOLDER`` draws pictures that show their captions.

The folder has the form that ``demonstrations.path`` expects: numbered PNG files and a
``metadata.jsonl``.
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
    """Draw the folder that the command line describes, and return the exit code."""
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
    """Write pictures of captions, which are used in turn, and `metadata.jsonl`.

    Args:
        folder: the folder, which is made if need be.
        captions: the captions; blank ones are ignored.
        count: number of pictures.
        seed: seed of the pictures.

    Raises:
        ValueError: a line is no caption of this world.
    """
    parsed = [Caption.parse(text) for text in captions if text.strip()]
    repeated = [parsed[i % len(parsed)] for i in range(count)]
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i, (caption, picture) in enumerate(
        zip(repeated, render_batch(repeated, seed), strict=True)
    ):
        name = f"{i:04d}.png"
        Image.fromarray(picture).save(folder / name)
        lines.append(json.dumps({"file_name": name, "text": caption.text}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
