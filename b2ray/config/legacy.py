"""Fields by the names that the previous version used: they still work, with a warning."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from b2ray.errors import ConfigError

RENAMED = {
    "learner.passes": "learner.inner_epochs",
    "model.lora.folded": "model.lora.merged",
}
# Fields that were removed, each with the value that had no effect. A field with this value is
# dropped, and one with another value is refused.
REMOVED = {"prefix.policy": "current", "prefix.stages": None}
# Why the fields of a section were removed, and what to do.
WHY = {
    "prefix": "prefixes that serve in several stages are gone, as nothing was ever won by them "
    "(docs/explanation/decided_against.md); leave it out",
}
_warned: set[str] = set()


def updated(values: Mapping[str, Any]) -> dict[str, Any]:
    """The nested values of a configuration with each field under its present name.

    Raises:
        ConfigError: a removed field has a value that had an effect, or a field is given under both
            of its names.
    """
    result = dict(values)
    for old, new in RENAMED.items():
        if _has(result, old):
            if _has(result, new):
                raise _given_twice(old, new)
            _warn(old, new)
            result = _with(_without(result, old), new, _get(result, old))
    for old, harmless in REMOVED.items():
        if _has(result, old):
            _refuse(old, _get(result, old), harmless)
            result = _without(result, old)
    return result


def updated_words(argv: Sequence[str]) -> list[str]:
    """The words of a command line with each field under its present name.

    Raises:
        ConfigError: a removed field has a value that had an effect, or a field is given under both
            of its names.
    """
    words: list[str] = []
    names = {word.partition("=")[0].removeprefix("--") for word in argv if word.startswith("--")}
    following = iter(argv)
    for word in following:
        name, equals, value = word.partition("=")
        field = name.removeprefix("--")
        if name.startswith("--") and field in RENAMED:
            if RENAMED[field] in names:
                raise _given_twice(field, RENAMED[field])
            _warn(field, RENAMED[field])
            words.append(f"--{RENAMED[field]}{equals}{value}")
        elif name.startswith("--") and field in REMOVED:
            _refuse(field, value if equals else next(following, ""), REMOVED[field])
        else:
            words.append(word)
    return words


def _given_twice(old: str, new: str) -> ConfigError:
    return ConfigError(f"{new} is given twice, once by its old name {old}: leave one out")


def _refuse(field: str, value: object, harmless: object) -> None:
    if value != harmless:
        raise ConfigError(f"{field} is {value!r}, but {WHY[field.partition('.')[0]]}")


def _warn(old: str, new: str) -> None:
    if old not in _warned:
        _warned.add(old)
        line = f"b2ray: {old} is called {new} now; the old name works until the next version"
        print(line, file=sys.stderr)


def _has(values: Mapping[str, Any], field: str) -> bool:
    section, _, rest = field.partition(".")
    if section not in values:
        return False
    return not rest or (isinstance(values[section], Mapping) and _has(values[section], rest))


def _get(values: Mapping[str, Any], field: str) -> Any:
    section, _, rest = field.partition(".")
    return _get(values[section], rest) if rest else values[section]


def _with(values: Mapping[str, Any], field: str, value: Any) -> dict[str, Any]:
    section, _, rest = field.partition(".")
    inner = _with(values.get(section, {}), rest, value) if rest else value
    return {**values, section: inner}


def _without(values: Mapping[str, Any], field: str) -> dict[str, Any]:
    """The values without a field, and without its section if that is empty then."""
    section, _, rest = field.partition(".")
    others = {key: value for key, value in values.items() if key != section}
    inner = _without(values[section], rest) if rest else {}
    return {**others, section: inner} if inner else others
