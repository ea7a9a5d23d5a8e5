"""How well the fleet keeps samplers busy: real actors and the real dispatcher, simulated work.

Samplers, scorers and the learner sleep instead of computing, so that many fit one machine and what
is left is the fleet's own cost.

    python -m benchmarks.fleet scale     # 1 to 64 samplers: how near to ideal, driver time per unit
    python -m benchmarks.fleet sharing   # idle time at a stage's end, with and without sharing
    python -m benchmarks.fleet overlap   # when sampling beside the update (max_lag 1) pays
    python -m benchmarks.fleet memory    # the driver's memory over stages

Stages are those of the released experiments: 256 groups of 5 branches in units of 8 groups, 20
branches a call (`sharing` also with 10), except that `scale` gives every sampler 6 units.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import psutil
import ray

from b2ray.actors.messages import Answer, BranchesMade, PrefixesMade, Request, Scored, request
from b2ray.actors.worker import Worker
from b2ray.algorithm.branching import Group, WorkUnit, cut
from b2ray.config import Fleet
from b2ray.diffusion.noise import Domain
from b2ray.fleet.capacity import ResourceRequest
from b2ray.fleet.dispatch import Dispatcher
from b2ray.fleet.plans import Ready, SingleCall
from b2ray.fleet.roster import Roster
from b2ray.fleet.session import StopFlag
from b2ray.fleet.slots import Call, Role, Slot
from b2ray.fleet.teams import most, team_maker
from b2ray.rollout.rollout import RolloutPlan

BRANCHES = 5


class SimulatedSampler(Worker):
    """Sleeps for the UNet evaluations of its calls."""

    def load(self, seconds: float, slower: Sequence[float]) -> Answer:
        """`seconds` per evaluation of one latent; sampler i of the cluster is `slower[i]` times."""
        self.seconds, self.slower = seconds, slower
        self.version = 0  # the one that the units are for
        return Answer(self.receipt(self.timer()))

    def set_index(self, index: int) -> None:
        self.seconds *= self.slower[index % len(self.slower)]

    def denoise_prefix(self, unit: WorkUnit) -> tuple[PrefixesMade, np.ndarray]:
        timer = self.timer()
        time.sleep(self.seconds * len(unit.groups) * unit.fork)
        latents = np.zeros((len(unit.groups), 4), np.float32)
        return PrefixesMade(self.receipt(timer), latents.nbytes), latents

    def denoise_branches(
        self, unit: WorkUnit, prefix: np.ndarray, low: int, high: int, *_: Any
    ) -> tuple[Any, ...]:
        timer = self.timer()
        time.sleep(self.seconds * (high - low) * (STEPS - unit.fork))
        trajectories = [np.zeros(16, np.float32) for _ in range(high - low)]
        pictures = np.zeros((high - low, 4), np.uint8)
        return BranchesMade(self.receipt(timer)), pictures, *trajectories


class SimulatedScorer(Worker):
    """Scores at once."""

    def load(self) -> Answer:
        return Answer(self.receipt(self.timer()))

    def score(
        self, images: np.ndarray, prompts: Sequence[str], names: Sequence[str], embed: bool
    ) -> Scored:
        timer = self.timer()
        scores = {"simulated": np.zeros(len(prompts), np.float32)}
        return Scored(self.receipt(timer), scores, None)


class SimulatedLearner(Worker):
    """Sleeps for an update."""

    def load(self, seconds: float) -> Answer:
        self.seconds = seconds
        return Answer(self.receipt(self.timer()))

    def update(self) -> Answer:
        timer = self.timer()
        time.sleep(self.seconds)
        return Answer(self.receipt(timer))


STEPS = 20  # T


def units(groups: int, fork: int) -> list[WorkUnit]:
    """A stage's work."""
    drawn = [Group(i, "a prompt") for i in range(groups)]
    return cut(drawn, 8, WorkUnit(0, Domain.TRAIN, 0, 0, BRANCHES, fork))


class Watched(RolloutPlan):
    """Notes when each sampler's last call ended."""

    def __init__(self, work: Sequence[WorkUnit], batch: int = 20) -> None:
        super().__init__(work, batch, {"scorer": ["simulated"]}, ["simulated"], record=True)
        self.ended: dict[int, float] = defaultdict(float)

    def done(self, call: Call, slot: Slot, answer: Answer, results: Sequence[Any]) -> None:
        super().done(call, slot, answer, results)
        if slot.role.name == "sampler":
            self.ended[slot.index] = time.perf_counter()

    def idle(self, samplers: int) -> float:
        """Share of the stage that samplers spent waiting for its end."""
        assert self.began is not None
        end = max(self.ended.values())
        waited = [end - self.ended.get(i, self.began) for i in range(samplers)]
        return sum(waited) / samplers / (end - self.began)


class Unshared(Watched):
    """Every sampler branches its own prefixes only."""

    def next_call(self, slot: Slot) -> Call | None:
        if slot.role.name == "sampler":
            mine = [u for u in self._open if self._maker[u] == slot.index]
            self.began = self.began or time.perf_counter()
            if mine:
                return self._branches(mine[0], slot)
            return self._prefix(self._new.popleft()) if self._new else None
        return super().next_call(slot)


class SimulatedFleet:
    """A dispatcher with sleeping actors, all loaded."""

    def __init__(
        self, samplers: int, seconds: float, slower: Sequence[float] = (1.0,), update: float = 0.0
    ) -> None:
        def role(name: str, actor: type, count: int, load: Request) -> Role:
            need = ResourceRequest(name, name, count, count, 0.01, 0.0, {})
            make = team_maker(actor, need)
            return Role(need, most(need, [need]), make, lambda _: [load])

        roles = [
            role(
                "sampler",
                SimulatedSampler,
                samplers,
                request(SimulatedSampler.load, seconds, slower),
            ),
            role("scorer", SimulatedScorer, 1, request(SimulatedScorer.load)),
            role("learner", SimulatedLearner, 1, request(SimulatedLearner.load, update)),
        ]
        self.roster = Roster(roles, Fleet(start_timeout=600))
        self.dispatcher = Dispatcher(self.roster, StopFlag(), 600)
        self.dispatcher.run(Ready(self.roster))
        for slot in self.roster.ready("sampler"):
            assert slot.team is not None
            ray.get(slot.team.members[0].set_index.remote(slot.index))

    def close(self) -> None:
        self.roster.close()


def scale(seconds: float) -> None:
    """1 to 64 samplers, `seconds` of simulated work per branch call."""
    print("| samplers | units | ideal | took | of ideal | driver per unit |\n|" + "---|" * 6)
    each = seconds / (20 * 14)
    for samplers in (1, 2, 4, 8, 16, 32, 64):
        fleet = SimulatedFleet(samplers, each)
        fleet.dispatcher.run(Watched(units(8 * samplers, 19)))  # an actor's first calls are slower
        work = units(6 * 8 * samplers, fork=6)
        total = sum(each * len(u.groups) * (u.fork + BRANCHES * (STEPS - u.fork)) for u in work)
        plan = Watched(work)
        began, cpu = time.perf_counter(), time.thread_time()
        fleet.dispatcher.run(plan)
        took, cpu = time.perf_counter() - began, time.thread_time() - cpu
        ideal = total / samplers
        print(
            f"| {samplers} | {len(work)} | {ideal:.1f} s | {took:.1f} s | {ideal / took:.1%} | "
            f"{1000 * cpu / len(work):.2f} ms |",
            flush=True,
        )
        fleet.close()


def sharing(repeats: int) -> None:
    """8 samplers, the slowest half as fast as the fastest."""
    samplers, slower = 8, [1, 1, 1.1, 1.2, 1.3, 1.5, 1.7, 2]
    fleet = SimulatedFleet(samplers, 0.002, slower)
    fleet.dispatcher.run(Watched(units(64, 19)))  # the first calls of an actor are slower
    print("| branches a call | interval | | stage | idle at its end |\n|" + "---|" * 5)
    for batch in (20, 10):
        for interval in (14, 20):
            work = units(256, STEPS - interval)
            for name, kind in (("shared", Watched), ("not shared", Unshared)):
                found = []
                for _ in range(repeats):
                    plan = kind(work, batch)
                    fleet.dispatcher.run(plan)
                    found.append((plan.seconds, plan.idle(samplers)))
                stage, idle = np.median(np.array(found), axis=0)
                print(f"| {batch} | {interval} | {name} | {stage:.1f} s | {idle:.1%} |", flush=True)
    fleet.close()


def overlap() -> None:
    """Updates that take a quarter of the sampling up to twice as long."""
    samplers, stages, images = 4, 4, 256 * BRANCHES
    print(
        "Images per second and GPU: the learner on a GPU of its own (N + 1), or on one that also "
        "samples (N).\n\n| update / sampling | lag 0, N GPUs | lag 0, N + 1 | lag 1, N + 1 |\n|"
        + "---|"
        * 4
    )
    for share in (0.25, 0.5, 1.0, 2.0):
        work = units(256, fork=6)
        seconds = 0.0002
        sampling = seconds * 256 * (6 + BRANCHES * 14) / samplers
        fleet = SimulatedFleet(samplers, seconds, update=share * sampling)

        def update() -> SingleCall:
            return SingleCall("learner", request(SimulatedLearner.update), "updating")

        began = time.perf_counter()
        for _ in range(stages):
            fleet.dispatcher.run(Watched(work))
            fleet.dispatcher.run(update())
        apart = (time.perf_counter() - began) / stages
        fleet.dispatcher.run(Watched(work))
        began = time.perf_counter()
        for _ in range(stages):
            fleet.dispatcher.run(update(), Watched(work))
        beside = (time.perf_counter() - began) / stages
        rates = [images / apart / samplers, images / apart / (samplers + 1)]
        rates.append(images / beside / (samplers + 1))
        print(f"| {share:g} | " + " | ".join(f"{r:.0f}" for r in rates) + " |", flush=True)
        fleet.close()


def memory(stages: int) -> None:
    """The driver's resident memory as stages pass."""
    fleet, work, process = SimulatedFleet(4, 0.0), units(256, fork=6), psutil.Process()
    print("| stages | driver's memory |\n|---|---|")
    for stage in range(1, stages + 1):
        fleet.dispatcher.run(Watched(work))
        if stage in (1, 10) or stage % (stages // 5) == 0:
            print(f"| {stage} | {process.memory_info().rss / 2**20:.0f} MiB |", flush=True)
    fleet.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fleet", description=__doc__.splitlines()[0]
    )
    parser.add_argument("what", choices=["scale", "sharing", "overlap", "memory"])
    parser.add_argument("--seconds", type=float, default=1.0, help="of a branch call, for scale")
    parser.add_argument("--repeats", type=int, default=3, help="for sharing; medians are shown")
    parser.add_argument("--stages", type=int, default=200, help="for memory")
    options = parser.parse_args()
    ray.init(
        address="local",
        num_cpus=8,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
    )
    if options.what == "scale":
        scale(options.seconds)
    elif options.what == "sharing":
        sharing(options.repeats)
    elif options.what == "overlap":
        overlap()
    else:
        memory(options.stages)


if __name__ == "__main__":
    main()
