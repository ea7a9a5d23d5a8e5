"""The disturbed runs: what happens in each, one after another, at different stages."""

from __future__ import annotations

from dataclasses import dataclass

from tests.chaos import faults
from tests.chaos.faults import Strike

RANKS = {"learner.ranks": 2, "fleet.learner.gpus": 1}
LATE = {"learner.max_lag": 1, "replay.stages": 2, "replay.trajectories": 12}


@dataclass(frozen=True)
class Fault:
    """A row of the table: what is done in a run, and which slots have to come back."""

    name: str
    strike: Strike
    slots: tuple[str, ...]


SAMPLER = (
    Fault(
        "a sampler is killed in a prefix",
        Strike("denoise_prefix", faults.kill_it, stage=1),
        ("sampler 0",),
    ),
    Fault(
        "a sampler is killed in its branches",
        Strike("denoise_branches", faults.kill_it, stage=2),
        ("sampler 0",),
    ),
    Fault(
        "a sampler is killed while it binds weights",
        Strike("bind", faults.kill_it, stage=3),
        ("sampler 0",),
    ),
)
OTHERS = (
    Fault(
        "a scorer is killed while it scores",
        Strike("score", faults.kill_it, stage=1),
        ("scorer 0",),
    ),
    Fault(
        "the learner is killed in an update",
        Strike("update", faults.kill_it, stage=2),
        ("learner 0",),
    ),
    Fault(
        "a sampler and the scorer are killed at once",
        Strike(
            "denoise_branches", faults.both(faults.kill_it, faults.kill_role("scorer")), stage=3
        ),
        ("sampler 0", "scorer 0"),
    ),
)
# The sampler of the first node's loss has sampled what is replayed when the second one is lost.
REPLAYED = (
    Fault(
        "the node with the selected trajectories is lost while the next stage is sampled "
        "(max_lag 1)",
        Strike("update", faults.kill_node_of("sampler"), stage=1),
        ("sampler 0",),
    ),
    Fault(
        "the learner is killed in an update that replays",
        Strike("update", faults.kill_it, stage=2),
        ("learner 0",),
    ),
    Fault(
        "the node that sampled what is replayed is lost in an update",
        Strike("update", faults.kill_node_of("sampler"), stage=3),
        ("sampler 0",),
    ),
)
RUNS: dict[str, tuple[tuple[Fault, ...], dict[str, object]]] = {
    "sampler": (SAMPLER, {}),
    "others": (OTHERS, {}),
    "replayed": (REPLAYED, LATE),
    "prefix-node": (
        (
            Fault(
                "the node with the only copy of a prefix is lost",
                Strike("denoise_branches", faults.kill_its_node, stage=1),
                ("sampler 0",),
            ),
        ),
        {},
    ),
    "learner-node": (
        (
            Fault(
                "the learner's node is lost in an update",
                Strike("update", faults.kill_its_node, stage=1),
                ("learner 0",),
            ),
        ),
        {},
    ),
    "trajectories-node": (
        (
            Fault(
                "the node with the selected trajectories is lost in an update",
                Strike("update", faults.kill_node_of("sampler"), stage=1),
                ("sampler 0",),
            ),
        ),
        {},
    ),
    "rank": (
        (
            Fault(
                "a rank of the learner is killed in an update",
                Strike("update", faults.kill_last_rank, stage=1),
                ("learner 0",),
            ),
        ),
        RANKS,
    ),
    "drains": (
        (
            Fault(
                "the sampler's node drains",
                Strike("denoise_branches", faults.drain_its_node, stage=1),
                ("sampler 0",),
            ),
        ),
        {},
    ),
}
