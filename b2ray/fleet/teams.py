"""Ask Ray for the actors of a slot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from b2ray.errors import ConfigError
from b2ray.fleet.capacity import ResourceRequest, room_for
from b2ray.fleet.nodes import NodeResources
from b2ray.fleet.slots import Team


def most(
    request: ResourceRequest, requests: Sequence[ResourceRequest]
) -> Callable[[Sequence[NodeResources]], int]:
    """Make a function of the nodes that returns how many slots of a role to ask for.

    Args:
        request: the request of the role.
        requests: the requests of all roles of the run.
    """
    if request.most is not None:
        return lambda _: request.most or 0
    return lambda cluster: max(request.least, room_for(request, requests, cluster))


def team_maker(actor: type, request: ResourceRequest) -> Callable[[], Team]:
    """Make a function that asks Ray for the actors of a slot, without waiting.

    Args:
        actor: class of the actors.
        request: their resources.

    Raises:
        ConfigError: Ray refuses the runtime_env of the request.
    """
    options: dict[str, Any] = {"num_cpus": request.cpus, "num_gpus": request.gpus}
    if request.runtime_env:
        options["runtime_env"] = dict(request.runtime_env)
    try:
        # An actor that Ray itself restarts would have no weights. The roster replaces it instead.
        remote = ray.remote(max_restarts=0, max_task_retries=0, **options)(actor)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{request.field}: runtime_env is refused by Ray: {error}") from error
    if request.together == 1:
        return lambda: _single(remote)
    return lambda: _ranks(remote, request)


def _single(remote: Any) -> Team:
    """A team of one actor, which Ray may put on any node."""
    member = remote.remote()
    return Team([member], lambda: ray.kill(member))


def _ranks(remote: Any, request: ResourceRequest) -> Team:
    """A team of several actors on the same node, as ranks exchange gradients."""
    bundle = {k: v for k, v in (("CPU", request.cpus), ("GPU", request.gpus)) if v}
    group = placement_group([bundle] * request.together, strategy="STRICT_PACK")
    members = [
        remote.options(
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                placement_group=group, placement_group_bundle_index=rank
            )
        ).remote()
        for rank in range(request.together)
    ]

    def end() -> None:
        for member in members:
            ray.kill(member)
        remove_placement_group(group)

    return Team(members, end)
