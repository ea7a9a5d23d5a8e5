"""The dispatcher on Ray, with actors that do what they should not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from b2ray.actors.messages import Answer, Request, request
from b2ray.config import Fleet
from b2ray.errors import ConfigError, Stopped, WorkerError
from b2ray.fleet import roster
from b2ray.fleet.capacity import ResourceRequest
from b2ray.fleet.dispatch import Dispatcher
from b2ray.fleet.plans import Ready
from b2ray.fleet.roster import Event, Roster
from b2ray.fleet.session import StopFlag
from b2ray.fleet.slots import Call, Role, Slot, SlotState, Weights
from b2ray.fleet.teams import team_maker
from tests.ray.odd import Late, Odd, Unborn
from tests.runner import Cluster


class Once:
    """A plan of one call."""

    def __init__(self, *args: str) -> None:
        self.args, self.sent, self.answer, self.remade = args, False, None, 0

    @property
    def finished(self) -> bool:
        return self.answer is not None

    def next_call(self, slot: Slot) -> Call | None:
        if self.sent:
            return None
        self.sent = True
        return Call("odd", [request(Odd.work, *self.args)], "working")

    def done(self, call: Call, slot: Slot, answer: Answer, results: Sequence[Any]) -> None:
        self.answer = answer

    def lost(self, call: Call) -> None:
        self.remade += 1


class Many:
    """A plan of several calls."""

    def __init__(self, calls: Sequence[tuple[str, ...]]) -> None:
        self.left, self.wanted, self.pids = list(calls), len(calls), []

    @property
    def finished(self) -> bool:
        return len(self.pids) == self.wanted

    def next_call(self, slot: Slot) -> Call | None:
        if not self.left or slot.role.name != "odd":
            return None
        asked = request(Odd.work, *self.left.pop())
        return Call("odd", [asked], f"working, {len(self.left)} left")

    def done(self, call: Call, slot: Slot, answer: Answer, results: Sequence[Any]) -> None:
        self.pids.append(answer.pid)

    def lost(self, call: Call) -> None:
        raise AssertionError("nothing is lost")


@pytest.fixture
def dispatcher(cluster: Cluster):
    """Makes a dispatcher with a role of odd actors; ends them after the test."""
    made: list[Roster] = []

    def make(
        least: int = 1, most: int = 1, ranks: int = 1, bind: bool = False, **fleet: Any
    ) -> Dispatcher:
        cpus = fleet.pop("cpus", 0.1)
        need = ResourceRequest("odd", "fleet.odd", least, most, cpus, 0.0, {}, together=ranks)
        role = Role(
            need,
            fleet.pop("sizes", lambda rooms: most),
            team_maker(fleet.pop("actor", Odd), need),
            lambda places: [request(Odd.load, rank) for rank in range(len(places))],
            (lambda w: request(Odd.bind, w.version, w.lora)) if bind else None,
        )
        on_event = fleet.pop("on_event", lambda _: None)
        settings = Fleet(**{"stall_timeout": 60.0, "retries": 2, **fleet})
        made.append(Roster([role], settings, on_event))
        return Dispatcher(made[-1], StopFlag(), settings.stall_timeout)

    yield make
    for one in made:
        one.close()


def test_a_bug_ends_the_run_with_its_place_and_trace(dispatcher):
    with pytest.raises(WorkerError) as caught:
        dispatcher().run(Once("raise"))
    assert "odd 0 on " in str(caught.value) and "(pid " in caught.value.where
    assert "ZeroDivisionError: a bug" in caught.value.cause
    assert "raise ZeroDivisionError" in caught.value.details


def test_a_configuration_that_an_actor_refuses_is_one(dispatcher):
    with pytest.raises(ConfigError, match="steps is 3"):
        dispatcher().run(Once("refuse"))


def test_an_actor_that_cannot_be_made_is_not_made_again_and_again(dispatcher):
    found = dispatcher(actor=Unborn)
    with pytest.raises(WorkerError, match="while starting: ImportError: no module named reward"):
        found.run(Once("work"))
    assert found.roster.replaced.total() == 0


def test_a_killed_actor_is_replaced_and_its_call_done_again(dispatcher, tmp_path):
    events: list[Event] = []
    found = dispatcher(on_event=events.append)
    found.run(Ready(found.roster))
    first = found.roster.slots[0].places[0].pid
    plan = Once("die once", str(tmp_path / "note"))
    found.run(plan)
    assert plan.answer.pid != first
    assert [e.what for e in events] == ["ready", "died", "ready"]
    died, back = events[1:]
    assert died.doing == "working" and f"pid {first}" in died.where and back.seconds > 0
    assert found.roster.replaced == {"odd": 1}


def test_one_that_always_dies_ends_the_run_with_the_first_cause_and_the_log(dispatcher):
    with pytest.raises(WorkerError) as caught:
        dispatcher(retries=1).run(Once("die"))
    words = str(caught.value)
    assert "failed while working: ActorDiedError" in words
    assert "the first of 2" in words and "log: /" in words


def test_the_death_of_a_rank_replaces_all_and_is_the_cause(dispatcher, tmp_path):
    """The other rank's own complaint, that a peer is gone, comes first and is not the cause."""
    events: list[Event] = []
    found = dispatcher(ranks=2, on_event=events.append)
    found.run(Ready(found.roster))
    before = {p.pid for p in found.roster.slots[0].places}
    plan = Once("rank 1 dies once", str(tmp_path / "note"))
    found.run(plan)
    assert before.isdisjoint({p.pid for p in found.roster.slots[0].places})
    died = next(e for e in events if e.what == "died")
    assert "ActorDiedError" in died.cause


def test_ranks_that_end_with_different_weights_end_the_run(dispatcher):
    with pytest.raises(WorkerError, match="digests digest 0, digest 1"):
        dispatcher(ranks=2).run(Once("different ranks"))


def test_other_weights_than_the_learners_end_the_run(dispatcher):
    found = dispatcher(bind=True)
    found.roster.weights["odd"] = Weights(3, "the learner's", "what arrived", None)
    with pytest.raises(WorkerError, match="digest what arrived, the learner's are the learner's"):
        found.run(Ready(found.roster))


def test_one_that_joins_late_is_brought_to_the_current_version(dispatcher):
    size = [1]
    found = dispatcher(least=1, most=2, bind=True, sizes=lambda rooms: size[0])
    found.roster.weights["odd"] = Weights(0, "a", "a", None)
    found.run(Ready(found.roster))
    found.roster.weights["odd"] = Weights(1, "b", "b", None)
    size[0] = 2
    found.roster._looked = 0.0
    found.run(Ready(found.roster, patience=30))
    assert [s.version for s in found.roster.slots] == [1, 1]
    assert [s.state for s in found.roster.slots] == [SlotState.READY] * 2


def test_those_without_room_are_taken_back_when_their_node_will_not_come(dispatcher):
    size = [12]
    found = dispatcher(least=1, cpus=1.0, sizes=lambda rooms: size[0])
    found.run(Once("work"))
    states = [s.state for s in found.roster.slots]
    assert len(states) == 12 and SlotState.STARTING in states
    size[0] = 1
    found.roster._looked = 0.0
    found.run(Once("work"))
    assert len(found.roster.slots) < 12
    assert SlotState.STARTING not in [s.state for s in found.roster.slots]


def made(name: str, least: int, most: int, cpus: float, actor: type = Odd) -> Role:
    """A role of actors that load without arguments and have no weights."""
    need = ResourceRequest(name, name, least, most, cpus, 0.0, {})
    return Role(need, lambda rooms: most, team_maker(actor, need), lambda _: [Request("load", ())])


@pytest.fixture
def joined(cluster: Cluster):
    """Four odd ones are ready, with two of the node's eight CPUs each or fewer; then others are
    wanted, too. Gives what happened, by then and after much work more."""
    rosters: list[Roster] = []

    def run(cpus: float, other: Role) -> tuple[Roster, list[Event]]:
        events: list[Event] = []
        found = Roster([made("odd", 1, 4, cpus)], Fleet(stall_timeout=60), events.append)
        rosters.append(found)
        dispatcher = Dispatcher(found, StopFlag(), 60)
        dispatcher.run(Ready(found, patience=30))
        found.roles, found._looked = [*found.roles, other], 0.0
        dispatcher.run(Ready(found), Many([("work",)] * 40))
        assert not [e for e in events if e.what == "died"]
        return found, [e for e in events if e.what == "left"]

    yield run
    for one in rosters:
        one.close()


def test_one_beyond_the_least_gives_way_to_one_that_is_needed(joined, monkeypatch):
    """Samplers may have taken all the room when the learner needs a new place."""
    monkeypatch.setattr(roster, "GIVE_WAY", 2.0)
    found, left = joined(2.0, made("needed", 1, 1, 3.0))
    assert found.ready("needed")
    assert len(left) == 2 and all(e.cause == "makes room for needed 0" for e in left)
    assert len(found.ready("odd")) == 2


def test_nobody_gives_way_to_one_that_has_room_and_is_slow_to_start(joined, monkeypatch):
    monkeypatch.setattr(roster, "GIVE_WAY", 1.0)
    found, left = joined(1.0, made("late", 1, 1, 1.0, Late))
    assert found.ready("late")
    assert left == [] and len(found.ready("odd")) == 4


def test_no_room_for_one_that_is_needed_is_said_with_what_it_asks(dispatcher):
    found = dispatcher(cpus=1000.0, start_timeout=2.0)
    with pytest.raises(WorkerError, match=r"asks for 1000 CPU and 0 GPU \(nodes: .* 8 CPU"):
        found.run(Once("work"))


def test_nothing_finishing_ends_the_run_with_what_was_in_flight(dispatcher):
    found = dispatcher(stall_timeout=3.0)
    found.run(Ready(found.roster))
    with pytest.raises(WorkerError, match=r"stall_timeout = 3 s; in flight: odd 0 working"):
        found.run(Once("hang"))


def test_a_signal_stops_it(dispatcher):
    found = dispatcher()
    found.run(Ready(found.roster))
    found.stop.signal = "SIGTERM"
    with pytest.raises(Stopped):
        found.run(Once("hang"))


def test_a_node_that_goes_is_left_after_the_call(dispatcher, monkeypatch):
    """Its actors finish, take nothing new and start elsewhere (here: on the only node, again)."""
    events: list[Event] = []
    found = dispatcher(on_event=events.append)
    found.run(Ready(found.roster))
    place = found.roster.slots[0].places[0]
    monkeypatch.setattr(roster.nodes, "draining", lambda: {place.node})
    found.roster._looked = 0.0
    plan = Once("work")
    found.roster.look()
    monkeypatch.undo()
    found.run(plan)
    assert plan.answer.pid != place.pid
    assert [e.what for e in events] == ["ready", "drains", "left", "ready"]
    assert isinstance(events[0], Event)
