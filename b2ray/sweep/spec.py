"""sweep.yaml: which fields are varied, what is compared, and how many runs go on at the same time.

Every other field of the file is one of the configuration, and holds for all trials.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from b2ray.config import Config
from b2ray.config.load import sentence
from b2ray.config.secrets import shown
from b2ray.config.section import Name, Positive, Section
from b2ray.errors import ConfigError


class Draw(Section):
    """A distribution from which the values of a field are drawn; give exactly one."""

    uniform: tuple[float, float] | None = None
    """Uniform between two numbers."""
    log_uniform: tuple[float, float] | None = None
    """Uniform in the logarithm between two numbers above 0: every order of magnitude is as likely
    as any other."""
    integer: tuple[int, int] | None = None
    """An integer between two, both included."""
    choice: Annotated[tuple[Any, ...], Field(min_length=1)] | None = None
    """One value of a list."""

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        names = [k for k in type(self).model_fields if getattr(self, k) is not None]
        if len(names) != 1:
            raise ValueError(f"give one of {', '.join(type(self).model_fields)}, not {names}")
        low, high = self.uniform or self.log_uniform or self.integer or (0, 1)
        if low >= high:
            raise ValueError(f"{names[0]} goes from {low:g} to {high:g}: put the smaller one first")
        if self.log_uniform and low <= 0:
            raise ValueError(f"log_uniform begins at {low:g}: begin above 0")
        return self


class StopEarly(Section):
    """Asynchronous successive halving (ASHA, arXiv 1810.05934): after `after` stages, after
    `factor` times as many, and so on, a trial goes on only if it is among the best of the trials
    that have come so far."""

    after: Positive
    """The number of stages that every trial has at least."""
    factor: int = Field(3, ge=2)
    """At each of these points, the best 1/`factor` of the trials go on."""


class Sweep(Section):
    """The fields of the sweep itself."""

    name: Name
    """The name of the sweep: its folder in `runs`, and its run in MLflow."""
    config: str | None = None
    """The configuration file that all trials start from, unless the command line names one."""
    metric: str = Field(min_length=1)
    """What is compared: a metric of metrics.jsonl at the last stage that has it, such as
    heldout/judge, or a path in summary.json, such as judge.train.after."""
    mode: Literal["max", "min"] = "max"
    """Whether larger or smaller values are better."""
    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field({})
    """Field → list of values; every combination is a trial."""
    sample: dict[str, Draw] = Field({})
    """Field → distribution from which `samples` values are drawn; every draw is combined with every
    combination of the grid."""
    samples: Positive | None = None
    """The number of draws."""
    sample_seed: int = Field(0, ge=0, lt=2**32)
    """The seed of the draws."""
    parallel: Positive | Literal["auto"] = "auto"
    """How many runs go on at the same time; `auto`: as many as the cluster has resources for."""
    stop_early: StopEarly | None = None
    """Stops trials that are far behind before their last stage; without it none is stopped."""

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
        twice_swept = next((f for f in self.grid if f in self.sample), None)
        if twice_swept:
            return f"{twice_swept} is in grid and in sample: leave it in one of them"
        of_folder = next((f for f in self.swept if f in ("name", "runs")), None)
        if of_folder:
            return f"{of_folder} cannot be varied: every trial has a folder of its own anyway"
        outer = next((f for f in self.swept for g in self.swept if g.startswith(f"{f}.")), None)
        if outer:
            return f"{outer} and a field of it are both varied: leave one of them out"
        for field, values in self.grid.items():
            repeated = next((v for i, v in enumerate(values) if v in values[:i]), None)
            if repeated is not None:
                return f"grid.{field} has {shown(field, repeated)} twice: give every value once"
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
        """Read texts like 1e-3 as numbers, which YAML 1.1 only does for 1.0e-3."""
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
        """The fields that are varied: those that are drawn, then those of the grid."""
        return (*self.sample, *self.grid)


def _number(value: Any) -> Any:
    is_number = isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value)
    return float(value) if is_number else value


def split(values: Mapping[str, Any], where: str) -> tuple[Sweep, dict[str, Any]]:
    """Split the content of a sweep file into the sweep and fields of the configuration.

    Args:
        values: the content of the file.
        where: the file's name, for error messages.

    Returns:
        The sweep, and the fields that the file sets for all trials.

    Raises:
        ConfigError: a field of the sweep is wrong, or a field belongs to neither.
    """
    sweep_fields = {k: v for k, v in values.items() if k in Sweep.model_fields}
    for field, example in (("name", "name: rates"), ("metric", "metric: heldout/judge")):
        if field not in sweep_fields:
            raise ConfigError(f"{where}: {field} is missing: write for example `{example}`")
    config_fields = {k: v for k, v in values.items() if k not in sweep_fields}
    for key, value in config_fields.items():
        if key not in Config.model_fields:
            fields = ", ".join(Sweep.model_fields)
            raise ConfigError(
                f"{where}: {key} is neither a field of a sweep ({fields}) nor of a configuration "
                f"(value {shown(key, value)})"
            )
    try:
        return Sweep(**sweep_fields), config_fields
    except ValidationError as error:
        raise ConfigError(f"{where}: {sentence(error)}") from error
