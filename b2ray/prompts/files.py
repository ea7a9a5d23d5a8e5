"""Prompts from .txt, .jsonl and .csv files in UTF-8, with or without a byte order mark.

A .txt file has one prompt per line, and lines that start with # are comments. A .jsonl file has one
object per line, and a .csv file has a header. Both have a field `prompt` and may have a field
`weight`, which is 1 if it is missing, null or an empty cell. Other fields are ignored.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from b2ray.errors import ConfigError

Entry = tuple[int, Any, Any]  # line number; prompt and weight as in the file, None if missing


class _LineError(Exception):
    """An error in a line of the file."""

    def __init__(self, line: int, problem: str) -> None:
        super().__init__(f"line {line}: {problem}")


def read_file(field: str, path: str, file: Path) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """Read the prompts and weights of a file.

    A prompt that occurs twice with the same weight counts once. Two different weights for a prompt
    are an error, because adding them or choosing one of them would be a guess.

    Args:
        field: name of the configuration's field, for messages.
        path: value of the field, for messages.
        file: path of the file.

    Returns:
        The prompts in the order of the file, and their weights.

    Raises:
        ConfigError: the file cannot be read, or the line that the sentence names is wrong.
    """
    parse = _FORMATS.get(file.suffix.lower())
    if parse is None:
        raise ConfigError(
            f"{field}: {path!r} is no .txt, .jsonl or .csv file; rename or convert it to one"
        )
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{field}: {path!r} cannot be read as UTF-8 text: {error}") from error
    prompts: dict[str, tuple[int, float]] = {}  # prompt -> line and weight of its first occurrence
    try:
        for line, raw, weight in parse(text):
            _add(prompts, line, _prompt(line, raw), _weight(line, weight))
    except _LineError as error:
        raise ConfigError(f"{field}: {path!r}, {error}") from error
    if not prompts:
        raise ConfigError(f"{field}: {path!r} has no prompts; write one a line")
    return tuple(prompts), tuple(weight for _, weight in prompts.values())


def _add(prompts: dict[str, tuple[int, float]], line: int, prompt: str, weight: float) -> None:
    """Add a prompt; it is an error if it is already there with another weight."""
    first_line, first_weight = prompts.setdefault(prompt, (line, weight))
    if first_weight != weight:
        raise _LineError(
            line,
            f"{prompt!r} has weight {weight:g} here and {first_weight:g} on line "
            f"{first_line}; keep one",
        )


def _prompt(line: int, raw: Any) -> str:
    """Check the prompt of a line and remove the spaces around it."""
    if raw is None:
        raise _LineError(line, "there is no `prompt`")
    if not isinstance(raw, str):
        raise _LineError(line, f"`prompt` is {raw!r}; write it as text in quotes")
    if not raw.strip():
        raise _LineError(line, "`prompt` is empty; write one or delete the line")
    return raw.strip()


def _weight(line: int, raw: Any) -> float:
    """Check the weight of a line, which is 1 if it is missing."""
    if raw is None:
        return 1.0
    # In Python a bool is an int. The comparison also refuses NaN and ints that no float can hold.
    number = isinstance(raw, int | float) and not isinstance(raw, bool)
    if not number or not 0 < raw <= sys.float_info.max:
        raise _LineError(
            line, f"`weight` is {raw!r}; give a positive finite number, or leave it out"
        )
    return float(raw)


def _lines(text: str) -> Iterator[Entry]:
    """Parse a .txt file."""
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip() and not line.strip().startswith("#"):
            yield number, line, None


def _objects(text: str) -> Iterator[Entry]:
    """Parse a .jsonl file."""
    # splitlines would also split at line separators that JSON allows inside a string.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", error)  # without the decoder's own line number
            raise _LineError(number, f"not JSON ({reason}); write one object a line") from error
        if not isinstance(entry, dict):
            raise _LineError(number, f'no object; write {{"prompt": "…"}}, not {line.strip()}')
        yield number, entry.get("prompt"), entry.get("weight")


def _rows(text: str) -> Iterator[Entry]:
    """Parse a .csv file."""
    reader = csv.reader(io.StringIO(text), strict=True, skipinitialspace=True)
    header: list[str] = []
    try:
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            if not header:
                header = [cell.strip() for cell in cells]
                if "prompt" not in header:
                    raise _LineError(
                        reader.line_num,
                        f"the header {','.join(header)!r} has no column `prompt`; name one so, "
                        "columns separated by commas",
                    )
                continue
            if len(cells) > len(header):
                raise _LineError(
                    reader.line_num,
                    f"{len(cells)} cells under a header of {len(header)}; put a prompt that has a "
                    "comma in double quotes",
                )
            row = dict(zip(header, cells, strict=False))
            weight = row.get("weight", "").strip()
            yield reader.line_num, row.get("prompt"), _number(weight) if weight else None
    except csv.Error as error:
        raise _LineError(reader.line_num, f"not CSV ({error})") from error


def _number(cell: str) -> float | str:
    """The number in a cell; the cell itself if it is none, for `_weight` to report."""
    try:
        return float(cell)
    except ValueError:
        return cell


_FORMATS = {".txt": _lines, ".jsonl": _objects, ".csv": _rows}
