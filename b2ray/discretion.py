"""Passwords and tokens: kept out of configurations, and so out of config.yaml, logs and MLflow."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

# user:password@ of an address; on the web a user's name alone may be a token, too.
_PASSWORD = re.compile(
    r"(?<=://)([^\s/?#@:]*:[^\s/?#]+|(?<=http://)[^\s/?#]+|(?<=https://)[^\s/?#]+)@"
)
SHOWN = 200  # characters of a refused value
_SECRETS = {"apikey", "key", "passphrase", "passwd", "password", "pat", "pwd", "secret", "token"}


def masked(text: str) -> str:
    """The text, with stars for the user and password of every address in it."""
    return _PASSWORD.sub("***@", text)


def shown(field: object, value: object) -> str:
    """A refused value for a message: its beginning, unless it may be a secret."""
    if _is_secret(str(field).rpartition(".")[2]):
        return "***"
    text = masked(repr(value))
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


def first_secret(values: Mapping[str, Any]) -> str | None:
    """The first field that holds a secret: an address with a password, or an environment variable
    that is called a token, key or the like."""
    return next((field for field, text in _texts(values) if _holds_secret(field, text)), None)


def _holds_secret(field: str, text: str) -> bool:
    variable = re.search(r"\.env_vars\.([^.]+)$", field)
    # The path of a file with a secret is none.
    by_name = variable and text and not text.startswith("/") and _is_secret(variable[1])
    return bool(by_name or _PASSWORD.search(text))


def _is_secret(name: str) -> bool:
    return any(word in _SECRETS for word in re.split(r"[^a-z]+", name.lower()))


def _texts(value: Any, field: str = "") -> Iterator[tuple[str, str]]:
    """Every text in nested settings with its place."""
    if isinstance(value, str):
        yield field, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _texts(inner, f"{field}.{key}".lstrip("."))
    elif isinstance(value, list | tuple):
        for i, inner in enumerate(value):
            yield from _texts(inner, f"{field}.{i}")
