"""Prompt sets: from a file (`files.py`), or built in, made from their rules (`templates.py`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from b2ray.errors import ConfigError
from b2ray.options import find
from b2ray.prompts.files import read_file
from b2ray.prompts.templates import BUILT_IN

if TYPE_CHECKING:
    from b2ray.demonstrations import Demonstration


@dataclass(frozen=True)
class PromptSet:
    """Prompts, each once.

    Attributes:
        texts: the prompts.
        weights: how often training draws each, up to a common factor; equal if left out.
    """

    texts: tuple[str, ...]
    weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not self.weights:
            object.__setattr__(self, "weights", (1.0,) * len(self.texts))


@dataclass(frozen=True)
class PromptSets:
    """The prompts of a run.

    Attributes:
        demonstrations: pictures with captions, where they stand in the place of rewards.
    """

    train: PromptSet
    heldout: PromptSet | None = None
    demonstrations: tuple[Demonstration, ...] = ()

    def evaluated(self) -> dict[str, tuple[str, ...]]:
        """What an evaluation looks at, by the name of the set; weights play no part in it."""
        sets = {"train": self.train, "heldout": self.heldout}
        return {name: found.texts for name, found in sets.items() if found}

    def trained(self) -> tuple[str, ...]:
        """All prompts that trajectories can have."""
        captions = [d.caption for d in self.demonstrations]
        return tuple(dict.fromkeys([*self.train.texts, *captions]))


def read(field: str, value: str) -> PromptSet:
    """The built-in set of this name, or the set in this file.

    Args:
        field: the configuration's field, for messages.
        value: a key of `templates.BUILT_IN`, or the path of a .txt, .jsonl or .csv file.

    Raises:
        ConfigError: one sentence that names the field, the file, the line and the remedy.
    """
    if value in BUILT_IN:
        return PromptSet(BUILT_IN[value]())
    file = find(value)
    if file is None or not file.is_file():
        raise ConfigError(
            f"{field}: there is no file {value!r}, and no built-in set of that name; give a .txt, "
            f".jsonl or .csv file, or one of {', '.join(BUILT_IN)}"
        )
    return PromptSet(*read_file(field, value, file))
