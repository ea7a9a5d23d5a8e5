"""An argument parser that reports an error in one sentence instead of a page of usage."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from b2ray.errors import ConfigError


class SentenceParser(argparse.ArgumentParser):
    """Raises `ConfigError` where argparse would print its usage and end the process.

    Args:
        hint: where to read more; it follows the message in brackets.
        options: passed on to `argparse.ArgumentParser`.
    """

    def __init__(self, hint: str, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)
        self._hint = hint

    def error(self, message: str) -> NoReturn:
        """Raise a `ConfigError` with the message and the hint."""
        raise ConfigError(f"{message} ({self._hint})")
