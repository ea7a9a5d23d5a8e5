"""Demonstrations: a folder of good pictures with captions (SQIL, arXiv 1905.11108).

The captions are in metadata.jsonl, with one object of `file_name` and `text` per line (the
imagefolder convention of the datasets library), or otherwise in a .txt file of the same name beside
each picture. The driver reads the pictures from its disk when a stage needs them, and sends the
files unchanged.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from PIL import Image
from tqdm import tqdm

from b2ray.config.paths import find
from b2ray.diffusion.pictures import decoded
from b2ray.errors import ConfigError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
METADATA = "metadata.jsonl"
FIELD = "demonstrations.path"


@dataclass(frozen=True)
class Demonstration:
    """A picture with its caption.

    Attributes:
        file: path of the picture.
        caption: the caption, which is the prompt of its trajectories.
        size: (height, width) of the picture in pixels.
    """

    file: Path
    caption: str
    size: tuple[int, int]


def read_folder(path: str) -> tuple[Demonstration, ...]:
    """Read the demonstrations of a folder, in the order of metadata.jsonl or of the file names.

    Every picture is decoded once, so that a broken file is noticed before a run starts.

    Args:
        path: path of the folder.

    Raises:
        ConfigError: the folder or a file in it is wrong; the sentence names it and the remedy.
    """
    folder = find(path)
    if folder is None or not folder.is_dir():
        raise ConfigError(
            f"{FIELD}: there is no folder {path!r}; make one with pictures and their captions, as "
            "docs/howto/demonstrations.md says"
        )
    try:
        has_metadata = (folder / METADATA).is_file()
        entries = list(_from_metadata(folder) if has_metadata else _from_text_files(folder))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{FIELD}: {path!r} cannot be read: {error}") from error
    if not entries:
        raise ConfigError(
            f"{FIELD}: {path!r} has no pictures; put {', '.join(SUFFIXES)} files and their "
            "captions there"
        )
    bar = tqdm(entries, desc="reading demonstrations", unit="picture", delay=2, leave=False)
    return tuple(Demonstration(file, caption, _size(file)) for file, caption in bar)


def _from_metadata(folder: Path) -> Iterator[tuple[Path, str]]:
    """Pictures and captions of metadata.jsonl, which has to list all pictures of the folder."""
    listed = set()
    text = (folder / METADATA).read_text(encoding="utf-8-sig")
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        place = f"{FIELD}: {folder / METADATA}, line {number}"
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{place} is not JSON; write one object a line") from error
        values = entry if isinstance(entry, dict) else {}
        name, caption = values.get("file_name"), _caption(values.get("text"))
        if not isinstance(name, str) or not name or not caption:
            raise ConfigError(
                f'{place} needs a file and a caption: {{"file_name": "…", "text": "…"}}'
            )
        # Files outside of the folder may not exist on other machines, or may be private.
        inside = not PurePosixPath(name).is_absolute() and ".." not in PurePosixPath(name).parts
        if "\0" in name or not inside or Path(name).suffix.lower() not in SUFFIXES:
            raise ConfigError(
                f"{place}: {name!r} is no picture in the folder; name a {', '.join(SUFFIXES)} file "
                "in it"
            )
        file = folder / name
        if not file.is_file():
            raise ConfigError(f"{place}: there is no file {name!r}; delete the line, or add it")
        listed.add(file)
        yield file, caption
    for file in _pictures(folder):
        if file not in listed:
            raise ConfigError(
                f"{FIELD}: {file} has no caption; add a line for it to {METADATA}, or take it out"
            )


def _from_text_files(folder: Path) -> Iterator[tuple[Path, str]]:
    """Pictures with the captions in the .txt files beside them."""
    for file in _pictures(folder):
        text = file.with_suffix(".txt")
        if not text.is_file():
            raise ConfigError(
                f"{FIELD}: {file} has no caption; write one to {text.name} beside it, or name all "
                f"in {METADATA}"
            )
        try:
            caption = _caption(text.read_text(encoding="utf-8-sig"))
        except UnicodeDecodeError as error:
            raise ConfigError(f"{FIELD}: {text} is not UTF-8 text; save it as that") from error
        if not caption:
            raise ConfigError(f"{FIELD}: {text} is empty; write the picture's caption there")
        yield file, caption


def _pictures(folder: Path) -> list[Path]:
    return sorted(f for f in folder.iterdir() if f.suffix.lower() in SUFFIXES and f.is_file())


def _caption(raw: object) -> str:
    """A caption with single spaces; empty if the value is no text."""
    return " ".join(raw.split()) if isinstance(raw, str) else ""


def _size(file: Path) -> tuple[int, int]:
    """(height, width) of a picture, which is decoded as a check."""
    try:
        width, height = decoded(file.read_bytes()).size
    except (OSError, EOFError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"{FIELD}: {file} cannot be read as a picture ({reason}); save it anew, or take it out"
        ) from error
    return height, width


def too_small(known: Sequence[Demonstration], size: tuple[int, int]) -> str | None:
    """Describe the pictures that have to be enlarged.

    Args:
        known: the demonstrations.
        size: (height, width) of the model's pictures in pixels.

    Returns:
        A sentence for a warning, or None if no picture has to be enlarged.
    """
    height, width = size
    small = [d for d in known if d.size[0] < height or d.size[1] < width]
    if not small:
        return None
    first = small[0]
    return (
        f"{len(small)} of {len(known)} demonstrations are smaller than the model's pictures "
        f"({width} × {height}) and are enlarged, which blurs them; the first: {first.file} "
        f"({first.size[1]} × {first.size[0]})"
    )
