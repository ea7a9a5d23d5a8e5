"""Gauges for operators, exported through Ray's metrics; in Prometheus their names have `ray_`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from ray.util.metrics import Gauge

from b2ray.fleet.slots import SlotState

if TYPE_CHECKING:
    from b2ray.fleet.dispatch import Dispatcher

_GAUGES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "b2ray_phase": ("1 for what the run does now, else 0", ("phase",)),
    "b2ray_stage": ("committed stages", ()),
    "b2ray_slots": ("slots of a role in a state", ("role", "state")),
    "b2ray_replaced": ("actors replaced so far", ("role",)),
    "b2ray_lag": ("policy versions that trajectories were behind, mean of the last update", ()),
    "b2ray_bytes_in_flight": ("bytes of prefixes, pictures and trajectories that are kept", ()),
    "b2ray_images_per_second": ("pictures sampled and scored per second in the last stage", ()),
    "b2ray_reward_seconds": ("seconds of the last scoring call", ("role",)),
    "b2ray_idle_seconds": ("seconds since any call of the fleet finished", ()),
    "b2ray_reward_mean": ("mean trained reward of the last stage", ()),
}
NAMES = tuple(_GAUGES)
PHASES = ("starting", "sampling", "learning", "syncing", "evaluating")
# The metrics of a stage that are also gauges.
FIGURES = {
    "b2ray_lag": "fleet/lag",
    "b2ray_images_per_second": "throughput/images_per_second",
    "b2ray_reward_mean": "reward/mean",
}


class Gauges:
    """The gauges of a run, each of which has the run's name as a tag.

    Args:
        run: the run's name.
        timed: roles whose seconds of the last call are exported as `b2ray_reward_seconds`.
    """

    def __init__(self, run: str, timed: Collection[str]) -> None:
        self._timed = timed
        self._gauges = {}
        for name, (text, tags) in _GAUGES.items():
            gauge = Gauge(name, description=text, tag_keys=("run", *tags))
            gauge.set_default_tags({"run": run})
            self._gauges[name] = gauge

    def set(self, name: str, value: float, **tags: str) -> None:
        """Set a gauge to a value.

        Args:
            name: one of `NAMES`.
            value: the value.
            tags: its tags beside the run's name.
        """
        self._gauges[name].set(float(value), tags=tags)

    def phase(self, current: str) -> None:
        """Set what the run does now, one of `PHASES`."""
        for phase in PHASES:
            self.set("b2ray_phase", phase == current, phase=phase)

    def stage(self, stage: int, figures: Mapping[str, float]) -> None:
        """Set the gauges of a committed stage.

        Args:
            stage: how many stages are committed.
            figures: the metrics of the stage, by name.
        """
        self.set("b2ray_stage", stage)
        for gauge, figure in FIGURES.items():
            if figure in figures:
                self.set(gauge, figures[figure])

    def update(self, dispatcher: Dispatcher) -> None:
        """Set the gauges of the fleet's state; called about every second."""
        roster = dispatcher.roster
        states = Counter((slot.role.name, slot.state) for slot in roster.slots)
        for role in (r.name for r in roster.roles):
            for state in SlotState:
                self.set("b2ray_slots", states[role, state], role=role, state=state.value)
            self.set("b2ray_replaced", roster.replaced[role], role=role)
            if role in self._timed and role in dispatcher.seconds:
                self.set("b2ray_reward_seconds", dispatcher.seconds[role], role=role)
        self.set("b2ray_idle_seconds", dispatcher.idle)
        self.set("b2ray_bytes_in_flight", sum(getattr(p, "held", 0) for p in dispatcher.plans))
