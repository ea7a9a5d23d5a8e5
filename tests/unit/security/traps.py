"""Models that would run code if they were let: each leaves a mark when it does."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import torch

MODULE = """
from pathlib import Path

Path({mark!r}).touch()


class Trap:
    config_class = None

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        return cls()
"""
AUTO = ("AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoImageProcessor")
AUTO_MAP: dict[str, Any] = dict.fromkeys(AUTO, "trap.Trap")
# Which field of a file names the class; an unknown one leaves only the code that comes along.
CLASS = {
    "config.json": "model_type",
    "tokenizer_config.json": "tokenizer_class",
    "preprocessor_config.json": "image_processor_type",
}


class Bomb:
    """Runs code when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def write_module(folder: Path, mark: Path, name: str = "trap") -> None:
    (folder / f"{name}.py").write_text(MODULE.format(mark=str(mark)))


def edit(file: Path, **values: Any) -> None:
    """Set fields of a JSON file; of an empty one if there is none."""
    old = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**old, **values}))


def set_trap(folder: Path, mark: Path, unknown: bool) -> None:
    """Name code of the folder in all its configuration files.

    Args:
        unknown: call the classes by names that nobody knows, so that only the code is left.
    """
    write_module(folder, mark)
    for name, field in CLASS.items():
        tokenizer = name == "tokenizer_config.json"
        auto = {"AutoTokenizer": ["trap.Trap", "trap.Trap"]} if tokenizer else AUTO_MAP
        edit(folder / name, auto_map=auto, **({field: "Trap"} if unknown else {}))


def write_bomb(file: Path, mark: Path) -> None:
    """A checkpoint as torch writes them, with code in it."""
    torch.save({"weight": torch.zeros(1), "more": Bomb(mark)}, file)


def write_plain_bomb(file: Path, mark: Path) -> None:
    """A pickle that only has the name of a checkpoint."""
    file.write_bytes(pickle.dumps(Bomb(mark)))
