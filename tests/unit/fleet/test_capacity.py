"""What fits on which nodes."""

from __future__ import annotations

import pytest

from b2ray.fleet.capacity import (
    ResourceRequest,
    most_of_each,
    room_for,
    shortage,
    side_by_side,
)
from b2ray.fleet.nodes import NodeResources
from b2ray.rollout.roles import resource_requests
from tests.models import config


def need(
    role: str, least: int = 1, most: int | None = 1, gpus: float = 0.0, **over
) -> ResourceRequest:
    return ResourceRequest(
        role, f"fleet.{role}s", least, most, over.pop("cpus", 0.5), gpus, {}, **over
    )


def rooms(*gpus: float) -> list[NodeResources]:
    return [NodeResources(f"node{i}", f"host{i}", 4.0, g) for i, g in enumerate(gpus)]


def test_what_fits_has_no_shortage():
    wanted = [need("learner", gpus=1), need("sampler", 3, 3, gpus=1), need("scorer", cpus=4)]
    assert shortage(wanted, rooms(2, 2, 0)) is None


def test_a_shortage_names_role_field_and_nodes():
    wanted = [need("learner", gpus=1), need("sampler", 4, 4, gpus=1)]
    found = shortage(wanted, rooms(2, 2))
    assert found is not None
    assert "all 4 of sampler" in found and "0.5 CPU and 1 GPU" in found
    assert "host0 node0: 4 CPU, 2 GPU; host1" in found and "lower fleet.samplers" in found


def test_gpus_on_two_nodes_are_no_room_for_one_actor():
    assert shortage([need("learner", gpus=2)], rooms(1, 1)) is not None


def test_ranks_stay_on_one_node():
    learner = need("learner", gpus=1, together=2)
    assert shortage([learner], rooms(1, 1)) is not None
    assert shortage([learner], rooms(1, 2)) is None
    assert "2 times 0.5 CPU and 1 GPU on one node" in str(shortage([learner], rooms(1, 1)))


def test_parts_of_a_gpu_add_up():
    wanted = [need("learner", gpus=0.4), need("sampler", gpus=0.4), need("scorer", gpus=0.2)]
    assert shortage(wanted, rooms(1)) is None
    assert shortage([*wanted, need("more", gpus=0.1)], rooms(1)) is not None


@pytest.mark.parametrize(("gpus", "expected"), [((2,), 1), ((2, 2), 3), ((1,), 0), ((0, 4), 3)])
def test_elastic_samplers_take_what_the_others_leave(gpus, expected):
    sampler = need("sampler", 1, None, gpus=1)
    assert room_for(sampler, [need("learner", gpus=1), sampler], rooms(*gpus)) == expected


def test_cpus_bound_elastic_samplers_too():
    sampler = need("sampler", 1, None, cpus=1.5)
    assert room_for(sampler, [need("learner", cpus=1), sampler], rooms(0)) == 2


def run(most: int | None, gpus: float = 1.0) -> list[ResourceRequest]:
    return [need("learner", gpus=gpus), need("sampler", 1, most, gpus=gpus)]


@pytest.mark.parametrize(
    ("most", "gpus", "expected"), [(3, (8,), 2), (3, (4, 3), 1), (None, (8,), 4), (3, (3,), 0)]
)
def test_runs_side_by_side_have_all_that_they_ask_for(most, gpus, expected):
    assert side_by_side([run(most)] * 5, rooms(*gpus)) == expected


@pytest.mark.parametrize(
    ("most", "gpus", "expected"),
    [(3, (8,), 3), (3, (6,), 2), (None, (8,), 3), (None, (4,), 1), (5, (3,), None)],
)
def test_samplers_are_shared_out_so_that_nobody_waits(most, gpus, expected):
    assert most_of_each("sampler", [run(most)] * 2, rooms(*gpus)) == expected


def test_what_only_evaluates_asks_for_no_learner(models):
    found = config(models, fleet__samplers__max=3)
    whole, without = resource_requests(found), resource_requests(found, trains=False)
    assert [n.role for n in whole] == ["learner", "sampler", "scorer"]
    assert without == whole[1:]
