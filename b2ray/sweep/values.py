"""The values of every trial: combinations of the grid, draws from distributions, and names."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from b2ray.errors import ConfigError
from b2ray.sweep.spec import Draw, Sweep

LONGEST = 24  # the most characters of one value in the name of a trial
LONGEST_NAME = 80  # the most characters of the name of a run
TRIES = 50  # how many draws are made for each that is wanted, because some occur twice


@dataclass(frozen=True)
class Point:
    """The values of one trial.

    Attributes:
        name: made of the values alone, so that it stays the same when more values are added to the
            sweep's file.
        values: the values by field, beginning with those that are drawn.
    """

    name: str
    values: Mapping[str, Any]

    def nested(self) -> dict[str, Any]:
        """Return the values as nested sections, as in a configuration file."""
        values: dict[str, Any] = {}
        for field, value in self.values.items():
            *sections, last = field.split(".")
            section_values = values
            for section in sections:
                section_values = section_values.setdefault(section, {})
            section_values[last] = value
        return values


def points(sweep: Sweep) -> Iterator[Point]:
    """Combine every draw with every combination of the grid."""
    grid = [dict(zip(sweep.grid, v, strict=True)) for v in itertools.product(*sweep.grid.values())]
    for number, drawn in enumerate(draws(sweep)):
        for values in grid:
            words = [f"{number:03d}"] if sweep.sample else []
            combined = {**drawn, **values}
            words += [f"{_short(f, sweep)}{_as_name(v)}" for f, v in combined.items()]
            yield Point(_joined(words), combined)


def draws(sweep: Sweep) -> list[dict[str, Any]]:
    """Draw `sweep.samples` different values for the sampled fields.

    More samples with the same seed begin with the same draws.

    Returns:
        The values by field for each draw; a single empty draw if no field is sampled.

    Raises:
        ConfigError: the distributions do not have so many different values.
    """
    if not sweep.sample or sweep.samples is None:
        return [{}]
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(sweep.sample_seed))
    space = {field: _distribution(draw) for field, draw in sweep.sample.items()}
    different: list[dict[str, Any]] = []
    for _ in range(TRIES * sweep.samples):
        numbers = study.ask(space).params
        drawn = {field: _drawn(draw, numbers[field]) for field, draw in sweep.sample.items()}
        if drawn not in different:
            different.append(drawn)
        if len(different) == sweep.samples:
            return different
    raise ConfigError(
        f"samples is {sweep.samples} but sample has only {len(different)} different values: lower "
        "samples, or move them to grid"
    )


def _distribution(draw: Draw) -> Any:
    from optuna.distributions import FloatDistribution, IntDistribution

    if draw.choice is not None:
        return IntDistribution(0, len(draw.choice) - 1)
    if draw.integer is not None:
        return IntDistribution(*draw.integer)
    low, high = draw.uniform or draw.log_uniform or (0.0, 1.0)
    return FloatDistribution(low, high, log=draw.log_uniform is not None)


def _drawn(draw: Draw, number: float) -> Any:
    if draw.choice is not None:
        return draw.choice[int(number)]
    # Four digits are finer than any comparison, and short enough for a name.
    return number if draw.integer is not None else float(f"{number:.4g}")


def _short(field: str, sweep: Sweep) -> str:
    """Return the last part of a field's name, or all of it if another field ends the same."""
    last = field.rpartition(".")[2]
    others = [f.rpartition(".")[2] for f in sweep.swept]
    return last if others.count(last) == 1 else field


def _as_name(value: Any) -> str:
    """Write a value in the characters of a folder's name, with a digest if that loses anything."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return repr(value).replace("+", "")
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
    plain = re.sub(r"[^A-Za-z0-9._]+", "-", text).strip("-")
    return (
        plain if plain == text and len(plain) <= LONGEST else f"{plain[:LONGEST]}-{_digest(text)}"
    )


def _joined(words: list[str]) -> str:
    """Join words to a name, which is cut off and gets a digest if it is too long."""
    name = "_".join(words)
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 7]}-{_digest(name)}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:6]
