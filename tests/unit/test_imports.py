"""Imports without garbage collection."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from b2ray import rewards
from b2ray.actors.learner import Learner
from b2ray.actors.sampler import Sampler
from b2ray.imports import gc_paused
from tests.models import PROMPTS, config


@pytest.fixture(autouse=True)
def thawed():
    yield
    gc.unfreeze()
    gc.enable()


class Ring:
    def __init__(self) -> None:
        self.me = self


def test_nothing_is_collected_inside_and_what_is_there_is_left_alone_afterwards() -> None:
    with gc_paused():
        assert not gc.isenabled()
        kept = weakref.ref(Ring())
    assert gc.isenabled() and gc.get_freeze_count() > 0
    gc.collect()
    assert kept() is not None
    later = weakref.ref(Ring())
    gc.collect()
    assert later() is None


def test_it_goes_on_after_an_import_that_fails() -> None:
    with pytest.raises(ImportError), gc_paused():
        import b2ray.no_such_module  # noqa: F401
    assert gc.isenabled()


def test_a_process_that_does_not_collect_stays_so() -> None:
    gc.disable()
    with gc_paused():
        pass
    assert not gc.isenabled()


def test_actors_import_so(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def watched(where: str):
        @contextlib.contextmanager
        def inside() -> Iterator[None]:
            seen.append(where)
            yield

        return inside

    for where in ("actors.sampler", "actors.learner", "actors.worker", "rewards"):
        monkeypatch.setattr(f"b2ray.{where}.gc_paused", watched(where))
    small = config(models)
    Sampler().load(small, PROMPTS)
    Learner().load(small, PROMPTS)
    rewards.load(small.rewards[0], torch.device("cpu"))
    assert seen == ["actors.sampler", "actors.worker", "actors.learner", "actors.worker", "rewards"]
