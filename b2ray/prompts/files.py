"""Prompts from files: .txt, .jsonl and .csv, all UTF-8, with or without a byte order mark.

A .txt file has one prompt a line; lines that start with # are comments. A .jsonl file has one
object a line and a .csv file a header; both have `prompt`, may have `weight` (1 where it is left
out, null or an empty cell), and anything else in them is ignored.
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

Entry = tuple[int, Any, Any]  # line, prompt, weight; both as they stand there, None if missing


class _Problem(Exception):
    """What is wrong with a line."""

    def __init__(self, line: int, what: str) -> None:
        super().__init__(f"line {line}: {what}")


def read_file(field: str, path: str, file: Path) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """(prompts, weights) of a file, in its order.

    A prompt that stands twice with the same weight is one; with two weights it is refused, because
    adding them and choosing one would both be guesses.

    Args:
        field, path: the configuration's field and value, for messages.
        file: where the value was found.

    Raises:
        ConfigError: one sentence with the line.
    """
    entries = _FORMATS.get(file.suffix.lower())
    if entries is None:
        raise ConfigError(
            f"{field}: {path!r} is no .txt, .jsonl or .csv file; rename or convert it to one"
        )
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{field}: {path!r} cannot be read as UTF-8 text: {error}") from error
    found: dict[str, tuple[int, float]] = {}
    try:
        for line, raw, weight in entries(text):
            _add(found, line, _prompt(line, raw), _weight(line, weight))
    except _Problem as problem:
        raise ConfigError(f"{field}: {path!r}, {problem}") from problem
    if not found:
        raise ConfigError(f"{field}: {path!r} has no prompts; write one a line")
    return tuple(found), tuple(weight for _, weight in found.values())


def _add(found: dict[str, tuple[int, float]], line: int, prompt: str, weight: float) -> None:
    first, before = found.setdefault(prompt, (line, weight))
    if before != weight:
        raise _Problem(
            line,
            f"{prompt!r} has weight {weight:g} here and {before:g} on line {first}; keep one",
        )


def _prompt(line: int, raw: Any) -> str:
    if raw is None:
        raise _Problem(line, "there is no `prompt`")
    if not isinstance(raw, str):
        raise _Problem(line, f"`prompt` is {raw!r}; write it as text in quotes")
    if not raw.strip():
        raise _Problem(line, "`prompt` is empty; write one or delete the line")
    return raw.strip()


def _weight(line: int, raw: Any) -> float:
    if raw is None:
        return 1.0
    # A bool is an int to Python; the comparison also refuses NaN and whole numbers beyond floats.
    number = isinstance(raw, int | float) and not isinstance(raw, bool)
    if not number or not 0 < raw <= sys.float_info.max:
        raise _Problem(line, f"`weight` is {raw!r}; give a positive finite number, or leave it out")
    return float(raw)


def _lines(text: str) -> Iterator[Entry]:
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip() and not line.strip().startswith("#"):
            yield number, line, None


def _objects(text: str) -> Iterator[Entry]:
    # Not splitlines: it would also cut at line separators that JSON allows inside a string.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", error)  # without the decoder's own line number
            raise _Problem(number, f"not JSON ({reason}); write one object a line") from error
        if not isinstance(found, dict):
            raise _Problem(number, f'no object; write {{"prompt": "…"}}, not {line.strip()}')
        yield number, found.get("prompt"), found.get("weight")


def _rows(text: str) -> Iterator[Entry]:
    reader = csv.reader(io.StringIO(text), strict=True, skipinitialspace=True)
    header: list[str] = []
    try:
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            if not header:
                header = [cell.strip() for cell in cells]
                if "prompt" not in header:
                    raise _Problem(
                        reader.line_num,
                        f"the header {','.join(header)!r} has no column `prompt`; name one so, "
                        "columns separated by commas",
                    )
                continue
            if len(cells) > len(header):
                raise _Problem(
                    reader.line_num,
                    f"{len(cells)} cells under a header of {len(header)}; put a prompt that has a "
                    "comma in double quotes",
                )
            row = dict(zip(header, cells, strict=False))
            weight = row.get("weight", "").strip()
            yield reader.line_num, row.get("prompt"), _number(weight) if weight else None
    except csv.Error as error:
        raise _Problem(reader.line_num, f"not CSV ({error})") from error


def _number(cell: str) -> float | str:
    try:
        return float(cell)
    except ValueError:
        return cell


_FORMATS = {".txt": _lines, ".jsonl": _objects, ".csv": _rows}
