"""Sums over processes, and ranks that fail: the others get an error of their own, in time."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from b2ray.errors import RankLost
from b2ray.objectives.ranks import Ranks
from tests.processes import free_port, on_ranks

SOON = 2.0  # seconds, the time-out where one is to be met


def sums(ranks: Ranks) -> tuple[list[tuple[torch.dtype, list]], float, float, float]:
    mine = 1.0 + ranks.rank
    tensors = [
        torch.full((2, 3), mine),
        torch.tensor(10 * mine, dtype=torch.float64),
        torch.full((5,), 0.5 * mine, dtype=torch.float16),
        torch.full((4, 2), mine).T,
    ]
    ranks.sum(tensors)
    largest = ranks.largest(torch.tensor(-mine))
    broken = ranks.largest(torch.tensor(float("nan") if ranks.rank else 0.0))
    found = [(t.dtype, t.tolist()) for t in tensors]
    return found, ranks.mean([mine] * ranks.rank), float(largest), float(broken)


@pytest.mark.parametrize("world", [2, 3])
def test_sums_are_in_place_over_any_shapes_and_kinds(world):
    total = float(sum(range(1, world + 1)))
    weighted = sum((r + 1.0) * r for r in range(world)) / sum(range(world))
    for found, mean, largest, broken in on_ranks(world, sums):
        assert found == [
            (torch.float32, [[total] * 3] * 2),
            (torch.float64, 10 * total),
            (torch.float16, [0.5 * total] * 5),
            (torch.float32, [[total] * 4] * 2),
        ]
        assert mean == pytest.approx(weighted)
        assert largest == -1
        assert broken != broken


def test_one_rank_needs_no_process_group():
    ranks, values = Ranks(), torch.tensor([1.0, 2.0])
    ranks.sum([values])
    assert values.tolist() == [1.0, 2.0]
    assert (ranks.mean([1, 2]), ranks.mean([])) == (1.5, 0.0)
    assert float(ranks.largest(torch.tensor(-3.0))) == -3.0
    assert ranks.share([1, 2, 3]) == [1, 2, 3]
    assert not dist.is_initialized()
    ranks.close()


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 8])
def test_shares_are_a_partition_of_nearly_equal_parts(count):
    shares = [list(share(rank, 3, list(range(count)))) for rank in range(3)]
    assert sorted(j for part in shares for j in part) == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def share(rank: int, world: int, items: list[int]) -> list[int]:
    """A rank's share, without a process group."""
    ranks = Ranks()
    ranks.rank, ranks.world = rank, world
    return list(ranks.share(items))


# --- ranks that fail -------------------------------------------------------------------------


def killed(ranks: Ranks) -> str:
    if ranks.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    ranks.sum([torch.ones(3)])
    return "summed"


def failed(ranks: Ranks) -> str:
    if ranks.rank == 1:
        raise ValueError("a fault of this rank's own")
    ranks.sum([torch.ones(3)])
    return "summed"


def left(ranks: Ranks) -> str:
    ranks.sum([torch.ones(1)])  # all have met
    if ranks.rank == 1:
        ranks.close()
        return "left"
    ranks.sum([torch.ones(3)])
    return "summed"


def slow(ranks: Ranks) -> str:
    if ranks.rank == 1:
        time.sleep(1.5 * SOON)
    ranks.sum([torch.ones(3)])
    return "summed"


@pytest.mark.parametrize(
    ("fault", "world"), [(killed, 2), (killed, 3), (failed, 3), (left, 3), (slow, 2)]
)
def test_the_others_fail_in_time(fault, world):
    ends = on_ranks(world, fault, timeout=SOON if fault is slow else 60.0)
    assert all(isinstance(end, RankLost) for j, end in enumerate(ends) if j != 1)
    assert f"rank 0 of {world} is alone while summing" in str(ends[0])
    assert (fault, type(ends[1])) in {
        (killed, type(None)),
        (failed, ValueError),
        (left, str),
        (slow, RankLost),
    }


def test_a_rank_that_never_comes_is_not_waited_for_for_ever():
    ends = on_ranks(2, killed, timeout=SOON, late=1)
    assert [type(e) for e in ends] == [RankLost]
    assert "while meeting at 127.0.0.1" in str(ends[0])


def test_a_meeting_that_nobody_holds_is_not_waited_for_for_ever():
    with pytest.raises(RankLost, match="rank 1 of 2 is alone while meeting"):
        Ranks(1, 2, f"127.0.0.1:{free_port()}", timeout=1.0)
