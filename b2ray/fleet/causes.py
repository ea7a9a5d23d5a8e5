"""The first cause of a failed call, out of the exceptions that Ray raises for it."""

from __future__ import annotations

from typing import Any

import ray
from ray.exceptions import RayTaskError

from b2ray.errors import ConfigError, WorkerError
from b2ray.fleet.slots import Call, Slot


def final_error(slot: Slot, call: Call, error: Exception) -> Exception:
    """The error that ends the run after a call has failed, in the worker's own words.

    Args:
        slot: the slot that made the call.
        call: the call.
        error: what `ray.get` raised for its answer.
    """
    cause = raised(error)
    if isinstance(cause, ConfigError):
        return ConfigError(str(cause))
    if isinstance(cause, WorkerError):
        return WorkerError(str(slot), slot.where, cause.doing, cause.cause, cause.details)
    return WorkerError(str(slot), slot.where, call.doing, first_line(error), str(error))


def raised(error: Exception) -> Exception:
    """The exception that a worker raised, without the one in which Ray wraps it."""
    cause = error.cause if isinstance(error, RayTaskError) else None
    return cause if isinstance(cause, Exception) else error


def error_of(ref: Any) -> Exception | None:
    """The exception that `ray.get` raises for a reference; None if it raises none."""
    try:
        ray.get(ref)
    except Exception as error:
        return error
    return None


def first_line(error: Exception) -> str:
    """The type of an exception and the first line of its text."""
    return f"{type(error).__name__}: {_lines(error)[0]}"


def last_line(error: Exception) -> str:
    """The last line of an exception's text: with a trace, the exception that was raised last."""
    return _lines(error)[-1]


def _lines(error: Exception) -> list[str]:
    return [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
