"""sweep.yaml: what is varied, what is compared, how many runs go at a time.

Every field of the file that is not named here is the configuration's own and holds for all trials.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from b2ray.config import Config
from b2ray.config.section import Name, Positive, Section
from b2ray.discretion import shown
from b2ray.errors import ConfigError
from b2ray.options import sentence


class Draw(Section):
    """A distribution that a field's values are drawn from; one of these."""

    uniform: tuple[float, float] | None = None
    """Any number between two."""
    log_uniform: tuple[float, float] | None = None
    """Any number between two above 0, every order of magnitude as likely."""
    integer: tuple[int, int] | None = None
    """A whole number between two, both included."""
    choice: Annotated[tuple[Any, ...], Field(min_length=1)] | None = None
    """One of a list."""

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        given = [k for k in type(self).model_fields if getattr(self, k) is not None]
        if len(given) != 1:
            raise ValueError(f"give one of {', '.join(type(self).model_fields)}, not {given}")
        low, high = self.uniform or self.log_uniform or self.integer or (0, 1)
        if low >= high:
            raise ValueError(f"{given[0]} goes from {low:g} to {high:g}: put the smaller one first")
        if self.log_uniform and low <= 0:
            raise ValueError(f"log_uniform begins at {low:g}: begin above 0")
        return self


class StopEarly(Section):
    """Asynchronous successive halving (ASHA, arXiv 1810.05934): at `after` stages, at `factor`
    times as many, and so on, a trial goes on only if it is among the best of those that came so
    far."""

    after: Positive
    """Stages that every trial has at least."""
    factor: int = Field(3, ge=2)
    """At each of these points the best one in so many goes on."""


class Sweep(Section):
    """What the file says of the sweep itself."""

    name: Name
    """The sweep's name: its folder in `runs`, and the parent run's name in MLflow."""
    config: str | None = None
    """The configuration file that the trials start from, unless the command line names one."""
    metric: str = Field(min_length=1)
    """What is compared: a figure of metrics.jsonl at the last stage that has it, such as
    heldout/judge, or a place in summary.json, such as judge.train.after."""
    mode: Literal["max", "min"] = "max"
    """Whether more of it is better, or less."""
    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field({})
    """Field → list of values; every combination is a trial."""
    sample: dict[str, Draw] = Field({})
    """Field → distribution that values are drawn from, `samples` times; each draw goes with every
    combination of the grid."""
    samples: Positive | None = None
    """How many draws."""
    sample_seed: int = Field(0, ge=0, lt=2**32)
    """Seed of the draws."""
    parallel: Positive | Literal["auto"] = "auto"
    """Runs at a time; `auto`: as many as the cluster holds."""
    stop_early: StopEarly | None = None
    """Whether trials that do badly are stopped before their last stage; empty: none is."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for problem in (self._fields_problem(), self._samples_problem(), self._early_problem()):
            if problem:
                raise ValueError(problem)
        return self

    def _fields_problem(self) -> str | None:
        if not self.swept:
            return (
                "nothing is varied: give a grid such as {seed: [0, 1, 2]}, or sample with samples"
            )
        both = next((f for f in self.grid if f in self.sample), None)
        if both:
            return f"{both} is in grid and in sample: leave it in one of them"
        place = next((f for f in self.swept if f in ("name", "runs")), None)
        if place:
            return f"{place} cannot be varied: every trial has a folder of its own anyway"
        outer = next((f for f in self.swept for g in self.swept if g.startswith(f"{f}.")), None)
        if outer:
            return f"{outer} and a field of it are both varied: leave one of them out"
        for field, values in self.grid.items():
            twice = next((v for i, v in enumerate(values) if v in values[:i]), None)
            if twice is not None:
                return f"grid.{field} has {shown(field, twice)} twice: give every value once"
        return None

    def _samples_problem(self) -> str | None:
        if self.sample and self.samples is None:
            return "samples is missing: say how often sample is drawn from, such as samples: 8"
        if self.samples is not None and not self.sample:
            return (
                f"samples is {self.samples} but sample is empty: give distributions, or no number"
            )
        return None

    def _early_problem(self) -> str | None:
        if self.stop_early is None:
            return None
        if "/" not in self.metric:
            return (
                f"stop_early needs a figure that is known while a run goes on, but metric is "
                f"{self.metric!r}, which is in summary.json: use one of metrics.jsonl, such as "
                "heldout/judge or reward/mean"
            )
        if len(self.grid.get("seed", [])) > 1 or "seed" in self.sample:
            return (
                "stop_early goes with one seed: of a setting's seeds it would stop the unlucky "
                "ones, and the mean be that of the others; leave it out, or take seed out of the "
                "grid"
            )
        return None

    @field_validator("grid", mode="before")
    @classmethod
    def _numbers(cls, grid: Any) -> Any:
        """1e-3 is a text in YAML 1.1, which wants 1.0e-3; here it is the number that is meant."""
        if not isinstance(grid, Mapping):
            return grid
        for field, values in grid.items():
            if not isinstance(values, list):
                raise ValueError(
                    f"grid.{field} is {shown(field, values)}: give a list of values, under the "
                    "field's whole name such as learner.lr"
                )
        return {field: [_number(v) for v in values] for field, values in grid.items()}

    @property
    def swept(self) -> tuple[str, ...]:
        """The fields that are varied: drawn ones, then those of the grid."""
        return (*self.sample, *self.grid)


def _number(value: Any) -> Any:
    number = isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value)
    return float(value) if number else value


def split(values: Mapping[str, Any], where: str) -> tuple[Sweep, dict[str, Any]]:
    """What a file says of the sweep, and what it sets of the configuration.

    Args:
        where: the file, for messages.

    Raises:
        ConfigError: a field of the sweep is wrong, or one is neither's.
    """
    own = {k: v for k, v in values.items() if k in Sweep.model_fields}
    for field, example in (("name", "name: rates"), ("metric", "metric: heldout/judge")):
        if field not in own:
            raise ConfigError(f"{where}: {field} is missing: write for example `{example}`")
    rest = {k: v for k, v in values.items() if k not in own}
    for key, value in rest.items():
        if key not in Config.model_fields:
            fields = ", ".join(Sweep.model_fields)
            raise ConfigError(
                f"{where}: {key} is neither a field of a sweep ({fields}) nor of a configuration "
                f"(value {shown(key, value)})"
            )
    try:
        return Sweep(**own), rest
    except ValidationError as error:
        raise ConfigError(f"{where}: {sentence(error)}") from error
