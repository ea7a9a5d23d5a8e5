"""Errors of actors' methods: what crosses to the driver as it is, and what is wrapped."""

from __future__ import annotations

import os

import pytest
from ray.exceptions import ObjectLostError, OwnerDiedError

from b2ray.actors.worker import Worker, remote_method
from b2ray.errors import ConfigError, RankLost, WorkerError


class Failing(Worker):
    role = "failing"

    @remote_method("failing")
    def fail(self, error: Exception) -> None:
        raise error


@pytest.mark.parametrize(
    "error",
    [
        ObjectLostError("00", "", ""),
        OwnerDiedError("00", "", ""),
        RankLost("rank 1"),
        ConfigError("a field"),
        WorkerError("a", "b", "c", "d"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_the_driver_has_a_remedy_for_crosses_as_it_is(error):
    with pytest.raises(type(error)) as caught:
        Failing().fail(error)
    assert caught.value is error


def test_anything_else_says_where_it_was_and_brings_its_trace():
    with pytest.raises(WorkerError) as caught:
        Failing().fail(KeyError("latents"))
    assert caught.value.role == "failing" and caught.value.doing == "failing"
    assert f"pid {os.getpid()}" in caught.value.where
    assert caught.value.cause == "KeyError: 'latents'"
    assert "raise error" in caught.value.details
