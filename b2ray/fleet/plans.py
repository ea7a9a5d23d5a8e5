"""Plans: what a stage asks of the fleet, as a graph of calls."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from b2ray.actors.worker import Receipt
from b2ray.branching import WorkUnit
from b2ray.errors import StageLost
from b2ray.fleet.dispatch import Dispatcher
from b2ray.fleet.slots import Call, Slot, SlotState

Range = tuple[WorkUnit, int, int]


class Rollout:
    """Prefix -> branches -> scores for every work unit.

    A prefix is a ref that any sampler can branch from: a sampler first takes ranges of prefixes it
    made, then a new unit, and when units run out, ranges of prefixes made elsewhere. Pictures go to
    a scorer of each role as soon as they exist. How the work is cut does not depend on who does it.

    Args:
        units: what is rolled out.
        branch_batch: leaves per call.
        scorers: the rewards that each role of scorers has loaded.
        rewards: the rewards that are wanted.
        record: keep trajectories.
        embed: ask scorers for embeddings.
        keep_pictures: of how many leaves at the beginning pictures are kept.
        progress: called with the number of leaves that have all their scores.

    Attributes:
        scores: by reward, unit index and leaf; see `reward_table`.
        trajectories: (unit index, leaf) -> ref, if recorded.
        pictures: (unit index, first leaf) -> ref of the pictures of the ranges to be kept.
    """

    def __init__(
        self,
        units: Sequence[WorkUnit],
        branch_batch: int,
        scorers: Mapping[str, Sequence[str]],
        rewards: Sequence[str],
        *,
        record: bool,
        embed: bool = False,
        keep_pictures: int = 0,
        progress: Callable[[int], Any] = lambda _: None,
    ) -> None:
        self.units, self.batch, self.rewards = units, branch_batch, list(rewards)
        self.record, self.embed, self.keep, self.progress = record, embed, keep_pictures, progress
        self.scores: dict[str, dict[tuple[int, int], float]] = defaultdict(dict)
        self._scorers = [role for role, names in scorers.items() if set(names) & set(rewards)]
        self._embeddings: dict[str, dict[tuple[int, int], np.ndarray]] = defaultdict(dict)
        self.trajectories: dict[tuple[int, int], Any] = {}
        self.pictures: dict[tuple[int, int], Any] = {}
        self.unet_evals = 0
        self._prefixes: dict[int, Any] = {}
        self._maker: dict[int, int] = {}
        self._new: deque[WorkUnit] = deque(units)
        self._ranges: deque[Range] = deque()
        self._waiting: dict[int, list[Range]] = {
            u.index: [(u, low, high) for low, high in u.ranges(branch_batch)] for u in units
        }
        # Ranges whose pictures wait for a role, and the roles that each range still waits for.
        self._unscored: dict[str, deque[tuple[Range, Any]]] = {r: deque() for r in self._scorers}
        self._roles_left = {
            (u.index, low): set(self._scorers) for u in units for low, _ in u.ranges(branch_batch)
        }

    @property
    def finished(self) -> bool:
        """Whether every leaf has its scores."""
        return not self._roles_left

    def next_call(self, slot: Slot) -> Call | None:
        """Work for a sampler or a scorer."""
        role = slot.role.name
        if role in self._unscored:
            return self._score(role) if self._unscored[role] else None
        if role != "sampler":
            return None
        mine = next((r for r in self._ranges if self._maker[r[0].index] == slot.index), None)
        if mine is not None:
            return self._branches(mine)
        if self._new:
            unit = self._new.popleft()
            return Call("sampler", "denoise_prefix", (unit,), 2, f"denoising {_name(unit)}", unit)
        return self._branches(self._ranges[0]) if self._ranges else None

    def done(self, call: Call, slot: Slot, receipt: Receipt, results: Sequence[Any]) -> None:
        """Pass the result of one step of the graph to the next."""
        assert call.unit is not None
        unit, (low, high) = call.unit, call.leaves
        self.unet_evals += receipt.unet_evals
        if call.method == "denoise_prefix":
            self._prefixes[unit.index], self._maker[unit.index] = results[0], slot.index
            self._ranges.extend(self._waiting.pop(unit.index))
        elif call.method == "denoise_branches":
            for leaf, ref in zip(range(low, high), results[1:], strict=self.record):
                self.trajectories[unit.index, leaf] = ref
            for role in sorted(self._roles_left.get((unit.index, low), ())):
                self._unscored[role].append(((unit, low, high), results[0]))
        else:
            self._take_scores(call.role, unit, low, receipt)

    def lost(self, call: Call) -> None:
        """Make a lost prefix or lost pictures again, from the same seeds."""
        assert call.unit is not None
        unit, (low, high) = call.unit, call.leaves
        if call.method == "denoise_branches":
            waiting = [r for r in self._ranges if r[0].index == unit.index]
            for r in waiting:
                self._ranges.remove(r)
            again = self._waiting.setdefault(unit.index, [])
            again.extend([*waiting, (unit, low, high)])
            if self._prefixes.pop(unit.index, None) is not None:
                self._new.appendleft(unit)
        elif call.method == "score" and (unit, low, high) not in self._ranges:
            for queue in self._unscored.values():  # these wait with the same lost pictures
                for entry in [e for e in queue if e[0] == (unit, low, high)]:
                    queue.remove(entry)
            if unit.index in self._prefixes:
                self._ranges.appendleft((unit, low, high))
            elif (unit, low, high) not in self._waiting[unit.index]:  # the prefix is made again
                self._waiting[unit.index].append((unit, low, high))

    def reward_table(self, name: str) -> np.ndarray:
        """Scores of one reward, float64, shape (G, K), in the order of the groups."""
        found = self.scores[name]
        rows = [
            [found[u.index, g * u.branches + k] for k in range(u.branches)]
            for u in self.units
            for g in range(len(u.groups))
        ]
        return np.array(rows, dtype=np.float64)

    def vectors(self) -> np.ndarray | None:
        """Embeddings of all leaves by the first role that has them, float32, shape (N, D)."""
        found = next((self._embeddings[r] for r in self._scorers if r in self._embeddings), None)
        return None if found is None else np.stack([found[key] for key in sorted(found)])

    def leaf(self, group: int, branch: int) -> Any:
        """Ref of the trajectory of a leaf; `group` counts over all units."""
        for unit in self.units:
            if group < len(unit.groups):
                return self.trajectories[unit.index, group * unit.branches + branch]
            group -= len(unit.groups)
        raise IndexError(f"no group {group} beyond the last unit")

    def _branches(self, chosen: Range) -> Call:
        self._ranges.remove(chosen)
        unit, low, high = chosen
        args = (unit, self._prefixes[unit.index], low, high, self.record)
        results = 2 + (high - low if self.record else 0)
        doing = f"denoising leaves {low}-{high - 1} of {_name(unit)}"
        return Call("sampler", "denoise_branches", args, results, doing, unit, (low, high))

    def _score(self, role: str) -> Call:
        (unit, low, high), pictures = self._unscored[role].popleft()
        if low + self._before(unit) < self.keep:
            self.pictures[unit.index, low] = pictures
        prompts = [unit.groups[g].prompt for g, _ in unit.leaves(low, high)]
        args = (pictures, prompts, self.rewards, self.embed)
        doing = f"scoring leaves {low}-{high - 1} of {_name(unit)}"
        return Call(role, "score", args, 1, doing, unit, (low, high))

    def _before(self, unit: WorkUnit) -> int:
        """Leaves in the units before this one."""
        return sum(len(u.groups) * u.branches for u in self.units if u.index < unit.index)

    def _take_scores(self, role: str, unit: WorkUnit, low: int, receipt: Receipt) -> None:
        left = self._roles_left.get((unit.index, low))
        if left is None or role not in left:
            return  # scored twice, because another role's pictures were lost and made again
        count = 0
        for name, values in receipt.values["scores"].items():
            count = len(values)
            for j, value in enumerate(values):
                self.scores[name][unit.index, low + j] = float(value)
        if receipt.values["embeddings"] is not None:
            for j, vector in enumerate(receipt.values["embeddings"]):
                self._embeddings[role][unit.index, low + j] = vector
        left.remove(role)
        if not left:
            del self._roles_left[unit.index, low]
            self.progress(count)


@dataclass
class LearnerCall:
    """One call of the learner; if it dies, a new learner at the same version does it again."""

    method: str
    args: tuple[Any, ...]
    doing: str
    wanted: int = 3  # results: the receipt, the LoRA, the optimizer's state
    receipt: Receipt | None = None
    results: Sequence[Any] = field(default_factory=tuple)
    _sent: bool = False

    @property
    def finished(self) -> bool:
        """Whether the learner has answered."""
        return self.receipt is not None

    def next_call(self, slot: Slot) -> Call | None:
        """The call, once."""
        if self._sent or slot.role.name != "learner":
            return None
        self._sent = True
        return Call("learner", self.method, self.args, self.wanted, self.doing)

    def done(self, call: Call, slot: Slot, receipt: Receipt, results: Sequence[Any]) -> None:
        """Take the answer."""
        self.receipt, self.results = receipt, results

    def lost(self, call: Call) -> None:
        """The trajectories are gone: only doing the stage again brings them back."""
        raise StageLost("selected trajectories were lost with their node")


@dataclass
class Ready:
    """Wait until every slot is at the current weights."""

    dispatcher: Dispatcher

    @property
    def finished(self) -> bool:
        """Whether all are."""
        d = self.dispatcher
        version = d.weights.version if d.weights else None
        return all(
            s.state == SlotState.READY
            and (s.role.sync_method is None or version is None or s.version == version)
            for s in d.slots
        )

    def next_call(self, slot: Slot) -> Call | None:
        """Nothing: loading and binding is the dispatcher's own work."""
        return None

    def done(self, call: Call, slot: Slot, receipt: Receipt, results: Sequence[Any]) -> None:
        """Never called: nothing was handed out."""

    def lost(self, call: Call) -> None:
        """Never called: nothing was handed out."""


def _name(unit: WorkUnit) -> str:
    return f"unit {unit.index} of stage {unit.stage}"
