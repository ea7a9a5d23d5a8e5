"""Passwords and tokens are kept out of configurations, and so out of files, logs and MLflow."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from b2ray.config import Config

# The part user:password@ of an address; in a web address the user alone may be a token, too.
_PASSWORD = re.compile(
    r"(?<=://)([^\s/?#@:]*:[^\s/?#]+|(?<=http://)[^\s/?#]+|(?<=https://)[^\s/?#]+)@"
)
MAX_QUOTED = 200  # characters of a refused value in a message
_SECRETS = {"apikey", "key", "passphrase", "passwd", "password", "pat", "pwd", "secret", "token"}


def masked(text: str) -> str:
    """The text with stars in place of the user and password of every address."""
    return _PASSWORD.sub("***@", text)


def shown(field: object, value: object) -> str:
    """A refused value as messages quote it: only its beginning, and stars if it may be a secret.

    Args:
        field: the dotted name of the field.
        value: its value.
    """
    if _is_secret(str(field).rpartition(".")[2]):
        return "***"
    text = masked(repr(value))
    return text if len(text) <= MAX_QUOTED else f"{text[:MAX_QUOTED]}…"


def first_secret(values: Mapping[str, Any]) -> str | None:
    """The dotted name of the first field that holds a secret; None if there is none.

    A secret is an address with a password, or an environment variable whose name has a word such as
    token or key.
    """
    return next((field for field, text in _texts(values) if _holds_secret(field, text)), None)


def secret_problem(config: Config) -> str | None:
    """Say which field holds a password or token."""
    field = first_secret(config.model_dump(mode="json"))
    if field is None:
        return None
    return (
        f"{field} holds a password or token, which would be written to config.yaml: leave it "
        "out and set it in the environment (docs/explanation/security.md says how)"
    )


def _holds_secret(field: str, text: str) -> bool:
    variable = re.search(r"\.env_vars\.([^.]+)$", field)
    # The path of a file that holds a secret is no secret itself.
    is_named_so = variable and text and not text.startswith("/") and _is_secret(variable[1])
    return bool(is_named_so or _PASSWORD.search(text))


def _is_secret(name: str) -> bool:
    return any(word in _SECRETS for word in re.split(r"[^a-z]+", name.lower()))


def _texts(value: Any, field: str = "") -> Iterator[tuple[str, str]]:
    """Every text in nested settings, as pairs of (dotted name of the field, text)."""
    if isinstance(value, str):
        yield field, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _texts(inner, f"{field}.{key}".lstrip("."))
    elif isinstance(value, list | tuple):
        for i, inner in enumerate(value):
            yield from _texts(inner, f"{field}.{i}")
