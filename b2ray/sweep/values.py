"""The values of each trial: a grid's combinations, draws from distributions, and their names."""

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

LONGEST = 24  # characters of a text in a trial's name
LONGEST_NAME = 80  # as a run's
TRIES = 50  # draws for each that is asked for, where some come twice


@dataclass(frozen=True)
class Point:
    """A trial's values.

    Attributes:
        name: says the values; the same in a file that has more of them.
        values: by field, drawn ones first.
    """

    name: str
    values: Mapping[str, Any]

    def nested(self) -> dict[str, Any]:
        """The values as a configuration's file has them."""
        found: dict[str, Any] = {}
        for field, value in self.values.items():
            *sections, last = field.split(".")
            place = found
            for section in sections:
                place = place.setdefault(section, {})
            place[last] = value
        return found


def points(sweep: Sweep) -> Iterator[Point]:
    """Every draw with every combination of the grid."""
    grid = [dict(zip(sweep.grid, v, strict=True)) for v in itertools.product(*sweep.grid.values())]
    for number, drawn in enumerate(draws(sweep)):
        for values in grid:
            words = [f"{number:03d}"] if sweep.sample else []
            both = {**drawn, **values}
            words += [f"{_short(f, sweep)}{_said(v)}" for f, v in both.items()]
            yield Point(_joined(words), both)


def draws(sweep: Sweep) -> list[dict[str, Any]]:
    """What is drawn: all different, and the first ones the same however many are asked for. One
    empty draw if nothing is to be drawn."""
    if not sweep.sample or sweep.samples is None:
        return [{}]
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(sweep.sample_seed))
    space = {field: _distribution(draw) for field, draw in sweep.sample.items()}
    found: list[dict[str, Any]] = []
    for _ in range(TRIES * sweep.samples):
        numbers = study.ask(space).params
        drawn = {field: _drawn(draw, numbers[field]) for field, draw in sweep.sample.items()}
        if drawn not in found:
            found.append(drawn)
        if len(found) == sweep.samples:
            return found
    raise ConfigError(
        f"samples is {sweep.samples} but sample has only {len(found)} different values: lower "
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
    # Four digits are more than a comparison can tell apart, and can be read in a name.
    return number if draw.integer is not None else float(f"{number:.4g}")


def _short(field: str, sweep: Sweep) -> str:
    """A field's last word, if no other has the same."""
    last = field.rpartition(".")[2]
    others = [f.rpartition(".")[2] for f in sweep.swept]
    return last if others.count(last) == 1 else field


def _said(value: Any) -> str:
    """A value in characters of a folder's name, with a digest where that loses something."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return repr(value).replace("+", "")
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
    plain = re.sub(r"[^A-Za-z0-9._]+", "-", text).strip("-")
    return (
        plain if plain == text and len(plain) <= LONGEST else f"{plain[:LONGEST]}-{_digest(text)}"
    )


def _joined(words: list[str]) -> str:
    name = "_".join(words)
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 7]}-{_digest(name)}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:6]
