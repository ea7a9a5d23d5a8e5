"""What an operator sees: every gauge complete, and true to the fleet."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest
from ray.util.metrics import Gauge

from b2ray.fleet.gauges import NAMES, PHASES, Gauges
from b2ray.fleet.slots import SlotState


@pytest.fixture
def seen(monkeypatch):
    """(name, tags) -> value, where Ray would have sent it."""
    found: dict[tuple[str, frozenset], float] = {}

    def record(self: Gauge, value: float, tags: dict[str, str] | None) -> None:
        final = self._get_final_tags(tags)
        assert set(final) == set(self._tag_keys), self._name
        found[self._name, frozenset((k, v) for k, v in final.items() if k != "run")] = value
        assert final["run"] == "mine"

    monkeypatch.setattr(Gauge, "_record", record)
    return found


def value(seen, name: str, **tags: str) -> float:
    return seen[name, frozenset(tags.items())]


def test_a_stage_and_a_look_at_the_fleet_set_every_gauge(seen):
    gauges = Gauges("mine", timed=["scorer"])
    gauges.phase("learning")
    figures = {"fleet/lag": 1.0, "throughput/images_per_second": 7.5, "reward/mean": -0.2}
    gauges.stage(4, figures)
    slots = [
        ("sampler", SlotState.READY),
        ("sampler", SlotState.READY),
        ("sampler", SlotState.DEAD),
    ]
    slots.append(("scorer", SlotState.SYNCING))
    roster = SimpleNamespace(
        slots=[SimpleNamespace(role=SimpleNamespace(name=r), state=s) for r, s in slots],
        roles=[SimpleNamespace(name=r) for r in ("sampler", "scorer")],
        replaced=Counter(sampler=3),
    )
    plans = [SimpleNamespace(held=100), SimpleNamespace(held=20), SimpleNamespace()]
    gauges.update(SimpleNamespace(roster=roster, seconds={"scorer": 0.5}, idle=2.0, plans=plans))
    assert {name for name, _ in seen} == set(NAMES)
    assert [value(seen, "b2ray_phase", phase=p) for p in PHASES] == [0, 0, 1, 0, 0]
    assert value(seen, "b2ray_slots", role="sampler", state="ready") == 2
    assert value(seen, "b2ray_slots", role="sampler", state="dead") == 1
    assert value(seen, "b2ray_slots", role="sampler", state="loading") == 0
    assert value(seen, "b2ray_replaced", role="sampler") == 3
    assert value(seen, "b2ray_reward_seconds", role="scorer") == 0.5
    assert value(seen, "b2ray_bytes_in_flight") == 120
    assert value(seen, "b2ray_idle_seconds") == 2.0
    assert value(seen, "b2ray_stage") == 4 and value(seen, "b2ray_lag") == 1
    assert value(seen, "b2ray_images_per_second") == 7.5
    assert value(seen, "b2ray_reward_mean") == -0.2
