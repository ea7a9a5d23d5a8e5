"""What the calls of a rollout do: steps of work units, and ranges of their leaves."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from b2ray.algorithm.branching import WorkUnit
from b2ray.diffusion.noise import Domain
from b2ray.errors import ConfigError
from b2ray.prompts.demonstrations import FIELD

LeafKey = tuple[int, int]  # unit index, leaf within the unit


@dataclass(frozen=True)
class LeafRange:
    """Leaves low .. high - 1 of a work unit: what one call makes or scores."""

    unit: WorkUnit
    low: int
    high: int

    @property
    def key(self) -> LeafKey:
        """What tells it from the other ranges of a rollout."""
        return self.unit.index, self.low

    def __len__(self) -> int:
        return self.high - self.low

    def __str__(self) -> str:
        return f"leaves {self.low}-{self.high - 1} of {name_of(self.unit)}"


class Step(Enum):
    """The steps of a work unit's way."""

    PREFIX = "prefix"
    BRANCHES = "branches"
    SCORES = "scores"


@dataclass(frozen=True)
class Work:
    """What a call of a rollout does: one step of a unit, or of some of its leaves."""

    step: Step
    unit: WorkUnit
    leaves: LeafRange | None = None


def is_demonstration(unit: WorkUnit) -> bool:
    """Whether a unit is of demonstrations, not of what the policy samples."""
    return unit.domain == Domain.DEMONSTRATE


def name_of(unit: WorkUnit) -> str:
    return f"unit {unit.index} of stage {unit.stage}"


def picture_files(unit: WorkUnit) -> list[bytes]:
    """The picture files of a unit of demonstrations, as they are.

    Raises:
        ConfigError: one of them is gone.
    """
    files = []
    for group in unit.groups:
        try:
            files.append(Path(group.picture).read_bytes())
        except OSError as error:
            raise ConfigError(
                f"{FIELD}: {group.picture} cannot be read any more ({error.strerror}): put it back "
                "and resume"
            ) from error
    return files
