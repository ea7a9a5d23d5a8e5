"""Asking Ray for the actors of a slot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from b2ray.errors import ConfigError
from b2ray.fleet.capacity import Need, room_for
from b2ray.fleet.nodes import Room
from b2ray.fleet.slots import Team


def most(need: Need, wanted: Sequence[Need]) -> Callable[[Sequence[Room]], int]:
    """How many slots of a need are asked for, on a cluster with these rooms."""
    if need.most is not None:
        return lambda _: need.most or 0
    return lambda rooms: max(need.least, room_for(need, wanted, rooms))


def team_maker(actor: type, need: Need) -> Callable[[], Team]:
    """A function that asks Ray for the actors of one slot, without waiting.

    Raises:
        ConfigError: Ray refuses the need's runtime_env.
    """
    options: dict[str, Any] = {"num_cpus": need.cpus, "num_gpus": need.gpus}
    if need.runtime_env:
        options["runtime_env"] = dict(need.runtime_env)
    try:
        # An actor that Ray restarts by itself would come back without weights: slots are replaced.
        remote = ray.remote(max_restarts=0, max_task_retries=0, **options)(actor)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{need.field}: runtime_env is refused by Ray: {error}") from error
    return (lambda: _one(remote)) if need.together == 1 else (lambda: _ranks(remote, need))


def _one(remote: Any) -> Team:
    member = remote.remote()
    return Team([member], lambda: ray.kill(member))


def _ranks(remote: Any, need: Need) -> Team:
    """Single samplers pack onto any node; ranks that average gradients need one node."""
    bundle = {k: v for k, v in (("CPU", need.cpus), ("GPU", need.gpus)) if v}
    group = placement_group([bundle] * need.together, strategy="STRICT_PACK")
    members = [
        remote.options(
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                placement_group=group, placement_group_bundle_index=rank
            )
        ).remote()
        for rank in range(need.together)
    ]

    def end() -> None:
        for member in members:
            ray.kill(member)
        remove_placement_group(group)

    return Team(members, end)
