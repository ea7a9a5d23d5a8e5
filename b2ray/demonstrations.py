"""Demonstrations: a folder of pictures that are liked, with captions (SQIL, arXiv 1905.11108).

Captions stand in metadata.jsonl, one object a line with `file_name` and `text` (the imagefolder
convention of the datasets library), or, where there is no such file, in a .txt file of the same
name beside each picture. Pictures are read from the driver's disk whenever a stage wants them and
sent as the files they are.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from b2ray.branching import Group, WorkUnit, cut
from b2ray.config import Config
from b2ray.diffusion.noise import Domain, generator
from b2ray.errors import ConfigError
from b2ray.options import find

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
METADATA = "metadata.jsonl"
FIELD = "demonstrations.path"


@dataclass(frozen=True)
class Demonstration:
    """A picture and its caption.

    Attributes:
        size: (height, width) of the file in pixels.
    """

    file: Path
    caption: str
    size: tuple[int, int]


def read_folder(path: str) -> tuple[Demonstration, ...]:
    """The demonstrations in a folder, in the order of metadata.jsonl or of the files' names.

    Every picture is decoded once, so that a broken one is found before anything starts.

    Raises:
        ConfigError: one sentence with the file and the remedy.
    """
    folder = find(path)
    if folder is None or not folder.is_dir():
        raise ConfigError(
            f"{FIELD}: there is no folder {path!r}; make one with pictures and their captions, as "
            "docs/demonstrations.md says"
        )
    try:
        listed = (folder / METADATA).is_file()
        entries = list(_listed(folder) if listed else _beside(folder))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{FIELD}: {path!r} cannot be read: {error}") from error
    if not entries:
        raise ConfigError(
            f"{FIELD}: {path!r} has no pictures; put {', '.join(SUFFIXES)} files and their "
            "captions there"
        )
    bar = tqdm(entries, desc="reading demonstrations", unit="picture", delay=2, leave=False)
    return tuple(Demonstration(file, caption, _size(file)) for file, caption in bar)


def _listed(folder: Path) -> Iterator[tuple[Path, str]]:
    """Pictures and captions of metadata.jsonl; pictures that it leaves out are refused."""
    named = set()
    text = (folder / METADATA).read_text(encoding="utf-8-sig")
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{FIELD}: {folder / METADATA}, line {number}"
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{where} is not JSON; write one object a line") from error
        values = entry if isinstance(entry, dict) else {}
        name, caption = values.get("file_name"), _words(values.get("text"))
        if not isinstance(name, str) or not name or not caption:
            raise ConfigError(
                f'{where} needs a file and a caption: {{"file_name": "…", "text": "…"}}'
            )
        # A place outside of the folder would be another machine's, or none of this run's business.
        inside = not PurePosixPath(name).is_absolute() and ".." not in PurePosixPath(name).parts
        if "\0" in name or not inside or Path(name).suffix.lower() not in SUFFIXES:
            raise ConfigError(
                f"{where}: {name!r} is no picture in the folder; name a {', '.join(SUFFIXES)} file "
                "in it"
            )
        file = folder / name
        if not file.is_file():
            raise ConfigError(f"{where}: there is no file {name!r}; delete the line, or add it")
        named.add(file)
        yield file, caption
    for file in _pictures(folder):
        if file not in named:
            raise ConfigError(
                f"{FIELD}: {file} has no caption; add a line for it to {METADATA}, or take it out"
            )


def _beside(folder: Path) -> Iterator[tuple[Path, str]]:
    """Pictures with the captions of the .txt files beside them."""
    for file in _pictures(folder):
        text = file.with_suffix(".txt")
        if not text.is_file():
            raise ConfigError(
                f"{FIELD}: {file} has no caption; write one to {text.name} beside it, or name all "
                f"in {METADATA}"
            )
        try:
            caption = _words(text.read_text(encoding="utf-8-sig"))
        except UnicodeDecodeError as error:
            raise ConfigError(f"{FIELD}: {text} is not UTF-8 text; save it as that") from error
        if not caption:
            raise ConfigError(f"{FIELD}: {text} is empty; write the picture's caption there")
        yield file, caption


def _pictures(folder: Path) -> list[Path]:
    return sorted(f for f in folder.iterdir() if f.suffix.lower() in SUFFIXES and f.is_file())


def _words(raw: object) -> str:
    return " ".join(raw.split()) if isinstance(raw, str) else ""


def _size(file: Path) -> tuple[int, int]:
    try:
        width, height = _opened(file.read_bytes()).size
    except (OSError, EOFError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"{FIELD}: {file} cannot be read as a picture ({reason}); save it anew, or take it out"
        ) from error
    return height, width


# --- stages --------------------------------------------------------------------------------------


def draw(seed: int, stage: int, available: int, count: int) -> list[int]:
    """Which demonstrations a stage uses.

    The run goes through all of them again and again, each time in another order, `count` a stage:
    every one is drawn before one is drawn again.

    Args:
        available: how many there are.
        count: how many a stage uses.
    """
    chosen: list[int] = []
    for place in range(stage * count, (stage + 1) * count):
        time, position = divmod(place, available)
        if not chosen or position == 0:
            order = generator(seed, Domain.DEMONSTRATE, time).permutation(available)
        chosen.append(int(order[position]))
    return chosen


def demonstration_units(
    config: Config, known: Sequence[Demonstration], stage: int, version: int, n: int, first: int
) -> list[WorkUnit]:
    """A stage's demonstrations in work units, as many as the policy draws itself.

    Args:
        known: all of them.
        version: of the policy that scores them.
        n: the stage's interval.
        first: index of the first of these units.
    """
    order = draw(config.seed, stage, len(known), config.groups)
    groups = [Group(i, known[j].caption, str(known[j].file)) for i, j in enumerate(order)]
    return cut(
        groups,
        config.branching.unit_groups,
        first,
        seed=config.seed,
        domain=Domain.DEMONSTRATE,
        stage=stage,
        version=version,
        branches=1,
        fork=config.sampling.steps - n,
    )


# --- pictures ------------------------------------------------------------------------------------


def files_of(unit: WorkUnit) -> list[bytes]:
    """The picture files of a unit of demonstrations, as they are.

    Raises:
        ConfigError: one of them is gone.
    """
    found = []
    for group in unit.groups:
        try:
            found.append(Path(group.picture).read_bytes())
        except OSError as error:
            raise ConfigError(
                f"{FIELD}: {group.picture} cannot be read any more ({error.strerror}): put it back "
                "and resume"
            ) from error
    return found


def fitted(file: bytes, height: int, width: int) -> np.ndarray:
    """A picture file at a size: scaled until it covers it, then cut evenly around the centre.

    Returns:
        uint8, shape (height, width, 3); what is transparent lies on white.
    """
    picture = _opened(file)
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        ground = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(ground, picture)
    cover = ImageOps.fit(picture.convert("RGB"), (width, height), Image.Resampling.LANCZOS)
    return np.asarray(cover)


def too_small(known: Sequence[Demonstration], size: tuple[int, int]) -> str | None:
    """A sentence about the pictures that have to be enlarged to (height, width), if there are."""
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


def _opened(file: bytes) -> Image.Image:
    """The decoded picture, turned as its camera says."""
    with Image.open(io.BytesIO(file)) as picture:
        return ImageOps.exif_transpose(picture)
