"""Prompt sets, which are read from a file (`files.py`) or built in (`templates.py`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from b2ray.config.paths import find
from b2ray.errors import ConfigError
from b2ray.prompts.files import read_file
from b2ray.prompts.templates import BUILT_IN

if TYPE_CHECKING:
    from b2ray.prompts.demonstrations import Demonstration


@dataclass(frozen=True)
class PromptSet:
    """A set of prompts.

    Attributes:
        texts: the prompts, each of which occurs once.
        weights: how often training draws each prompt, up to a common factor. Without weights all
            prompts are drawn equally often.
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
        train: the prompts of training.
        heldout: the prompts of held-out evaluations.
        demonstrations: pictures with captions, for training on demonstrations instead of rewards.
    """

    train: PromptSet
    heldout: PromptSet | None = None
    demonstrations: tuple[Demonstration, ...] = ()

    def evaluated(self) -> dict[str, tuple[str, ...]]:
        """The prompts of an evaluation by the name of their set; evaluations ignore the weights."""
        sets = {"train": self.train, "heldout": self.heldout}
        return {name: prompts.texts for name, prompts in sets.items() if prompts}

    def trained(self) -> tuple[str, ...]:
        """All prompts that a trajectory of training can have, including captions."""
        captions = [d.caption for d in self.demonstrations]
        return tuple(dict.fromkeys([*self.train.texts, *captions]))


def read(field: str, value: str) -> PromptSet:
    """Read a prompt set.

    Args:
        field: name of the configuration's field, for messages.
        value: a key of `templates.BUILT_IN`, or the path of a .txt, .jsonl or .csv file.

    Raises:
        ConfigError: there is no such set or file, or the file is wrong; the sentence names the
            field, the file, the line and the remedy.
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
