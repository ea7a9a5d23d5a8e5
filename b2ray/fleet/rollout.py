"""The rollout of work units: prefix -> branches -> scores, on any sampler and any scorer.

Demonstrations go the same way up to their trajectories: their latents are the prefix, and what
leads to them are the branches.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import ray

from b2ray.actors.worker import Receipt
from b2ray.branching import WorkUnit
from b2ray.demonstrations import files_of
from b2ray.diffusion.noise import Domain
from b2ray.fleet.pace import Pace
from b2ray.fleet.slots import Call, Slot

Range = tuple[WorkUnit, int, int]
Leaf = tuple[int, int]  # unit index, leaf within the unit

# Ranges whose pictures wait for a scorer: samplers that are faster than the scorers pause here,
# instead of filling the object store.
MOST_UNSCORED = 32

PREFIXES = ("denoise_prefix", "gather_prefixes", "encode_demonstrations")
BRANCHES = ("denoise_branches", "follow_demonstrations")


class Rollout:
    """Prefix -> branches -> scores for every work unit; demonstrations are never scored.

    A prefix is a ref that any sampler can branch from: a sampler first takes ranges of prefixes it
    made, then a new unit, and when units run out, ranges of prefixes made elsewhere. The last
    prefixes are made first of all, so that at the end there are branches for everybody. Pictures go
    to a scorer of each role as soon as they exist. How the work is cut does not depend on who does
    it.

    Args:
        units: what is rolled out.
        branch_batch: leaves per call.
        scorers: the rewards that each role of scorers has loaded.
        rewards: the rewards that are wanted.
        record: keep trajectories.
        embed: ask scorers for embeddings.
        keep_pictures: of how many leaves at the beginning pictures are kept.
        kept: by unit index, refs of its groups' prefixes where they are there already; refs of the
            driver's own, which no node takes along.
        trees: of how many groups at the beginning small pictures are kept.
        progress: called with the number of leaves that have all their scores, or need none.

    Attributes:
        version: of the policy that all units are for.
        scores: by reward, then leaf; see `reward_table`.
        trajectories: leaf -> ref, if recorded.
        pictures: (unit index, first leaf) -> the pictures of the ranges to be kept.
        small: (group over all units, branch or `trees.FORK`) -> a small picture's file.
        apart: of a demonstration's leaf, how far the policy is from it (`Policy.demonstrate`).
        unet_seconds: that samplers were at work on the UNet, added up.
        moved: bytes that samplers put into the object store, by kind.
        prefixes_made: that serve in other stages too.
        began: when the first call was handed out; before that None.
        seconds: from then to the last leaf so far that has its scores.
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
        kept: Mapping[int, Sequence[Any]] = MappingProxyType({}),
        trees: int = 0,
        progress: Callable[[int], Any] = lambda _: None,
    ) -> None:
        self.units, self.batch, self.rewards = units, branch_batch, list(rewards)
        self.version = units[0].version
        self.record, self.embed, self.keep_pictures = record, embed, keep_pictures
        self.progress, self.trees = progress, trees
        self._kept = kept
        self.scores: dict[str, dict[Leaf, float]] = defaultdict(dict)
        self.trajectories: dict[Leaf, Any] = {}
        self.apart: dict[Leaf, float] = {}
        self.pictures: dict[tuple[int, int], np.ndarray] = {}
        self.small: dict[tuple[int, int], bytes] = {}
        self.unet_evals, self.unet_seconds = 0, 0.0
        self.moved: Counter[str] = Counter(prefixes=0, pictures=0, trajectories=0)
        self.prefixes_made = 0
        self.seconds = 0.0
        self.began: float | None = None
        self._scorers = [role for role, names in scorers.items() if set(names) & set(rewards)]
        self._embeddings: dict[str, dict[Leaf, np.ndarray]] = defaultdict(dict)
        self._samplers: set[int] = set()
        self._pace = Pace()
        self._maker: dict[int, int] = {}
        self._prefixes: dict[int, Any] = {}
        # Units without a prefix, ranges that can be branched, and those that wait for a prefix.
        self._new: deque[WorkUnit] = deque(units)
        self._open: dict[int, deque[Range]] = {}
        self._waiting: dict[int, list[Range]] = {
            u.index: [(u, low, high) for low, high in u.ranges(branch_batch)] for u in units
        }
        # Ranges whose pictures wait for a role, and the roles that each range still waits for.
        self._unscored: dict[str, deque[tuple[Range, Any]]] = {r: deque() for r in self._scorers}
        self._roles_left = {
            (u.index, low): set() if _is_shown(u) else set(self._scorers)
            for u in units
            for low, _ in u.ranges(branch_batch)
        }
        self._remaking: set[tuple[int, int]] = set()
        self._before: dict[int, int] = {}  # leaves in earlier units
        self._bytes: dict[tuple[Any, ...], int] = {}
        count = 0
        for unit in units:
            self._before[unit.index] = count
            count += len(unit.groups) * unit.branches

    @property
    def finished(self) -> bool:
        """Whether every leaf is made and has its scores, and its trajectory where it was lost."""
        return not self._roles_left and not self._remaking

    @property
    def samplers(self) -> int:
        """How many samplers took part."""
        return len(self._samplers)

    @property
    def recorded(self) -> int:
        """Bytes of the trajectories that are kept."""
        return sum(size for key, size in self._bytes.items() if key[0] == "branches")

    @property
    def held(self) -> int:
        """Bytes of the prefixes, pictures and trajectories that are kept."""
        return sum(self._bytes.values())

    # --- handing out ---------------------------------------------------------------------------

    def next_call(self, slot: Slot) -> Call | None:
        """Work for a sampler or a scorer."""
        role = slot.role.name
        if role in self._unscored:
            return self._score(role) if self._unscored[role] else None
        if role != "sampler" or slot.version != self.version:
            return None
        if any(len(q) >= MOST_UNSCORED for q in self._unscored.values()):
            return None
        self.began = self.began or time.perf_counter()
        self._samplers.add(slot.index)
        mine = next((u for u in self._open if self._maker[u] == slot.index), None)
        if self._new and (mine is None or len(self._new) <= len(self._samplers)):
            return self._prefix(self._new.popleft())
        if mine is None and self._open:
            mine = max(self._open, key=lambda u: len(self._open[u]))
        if mine is None or not self._worth(slot.index):
            return None
        call = self._branches(mine)
        self._pace.sent(slot.index, call.leaves[1] - call.leaves[0])
        return call

    def _worth(self, sampler: int) -> bool:
        """Whether a sampler should take one of the last branch calls."""
        if self._new:
            return True
        count = sum(map(len, self._open.values())) + sum(map(len, self._waiting.values()))
        if count > 2 * len(self._samplers):
            return True
        return self._pace.worth(sampler, count, self.batch)

    def _prefix(self, unit: WorkUnit) -> Call:
        if _is_shown(unit):
            args, doing = (unit, files_of(unit)), f"encoding {_name(unit)}"
            return Call("sampler", "encode_demonstrations", args, 2, doing, unit)
        kept = self._kept.get(unit.index)
        if kept is not None:
            doing = f"gathering the prefixes of {_name(unit)}"
            return Call("sampler", "gather_prefixes", (unit, *kept), 2, doing, unit)
        return Call("sampler", "denoise_prefix", (unit,), 2, f"denoising {_name(unit)}", unit)

    def _branches(self, index: int) -> Call:
        unit, low, high = self._open[index].popleft()
        if not self._open[index]:
            del self._open[index]
        args: tuple[Any, ...] = (unit, self._prefixes[index], low, high)
        if _is_shown(unit):
            method, doing = "follow_demonstrations", "following"
        else:
            method, doing = "denoise_branches", "denoising"
            pictures = bool(self._roles_left.get((index, low))) or self._is_kept(unit, low)
            args += (self.record, pictures)
            trees = self.trees - self._first_group(unit)
            if pictures and low < trees * unit.branches:
                args += (trees,)
        results = 2 + (high - low if self.record else 0)
        doing = f"{doing} leaves {low}-{high - 1} of {_name(unit)}"
        return Call("sampler", method, args, results, doing, unit, (low, high))

    def _is_kept(self, unit: WorkUnit, low: int) -> bool:
        """Whether the pictures of a range are kept."""
        return low + self._before[unit.index] < self.keep_pictures

    def _first_group(self, unit: WorkUnit) -> int:
        """Groups in earlier units."""
        return self._before[unit.index] // unit.branches

    def _score(self, role: str) -> Call:
        (unit, low, high), pictures = self._unscored[role].popleft()
        prompts = [unit.groups[g].prompt for g, _ in unit.leaves(low, high)]
        args = (pictures, prompts, self.rewards, self.embed)
        doing = f"scoring leaves {low}-{high - 1} of {_name(unit)}"
        return Call(role, "score", args, 1, doing, unit, (low, high))

    # --- taking back ---------------------------------------------------------------------------

    def done(self, call: Call, slot: Slot, receipt: Receipt, results: Sequence[Any]) -> None:
        """Pass the result of one step of the graph to the next."""
        assert call.unit is not None
        unit, (low, high) = call.unit, call.leaves
        size = receipt.values.get("bytes", 0)
        if call.method in PREFIXES:
            self._prefixes[unit.index], self._maker[unit.index] = results[0], slot.index
            self._bytes["prefix", unit.index] = size
            self.moved["prefixes"] += size
            ranges = self._waiting.pop(unit.index, [])
            if ranges:
                self._open.setdefault(unit.index, deque()).extend(ranges)
        elif call.method in BRANCHES:
            self._pace.done(slot.index, high - low, receipt.seconds)
            pictures = receipt.values.get("picture_bytes", 0)
            self._bytes["pictures", unit.index, low] = pictures
            self._bytes["branches", unit.index, low] = size
            self.moved.update(pictures=pictures, trajectories=size)
            for leaf, apart in enumerate(receipt.values.get("apart", ()), low):
                self.apart[unit.index, leaf] = apart
            for (group, branch), picture in receipt.values.get("small", {}).items():
                self.small[self._first_group(unit) + group, branch] = picture
            self._take_branches((unit, low, high), results)
        else:
            self._take_scores(call.role, (unit, low, high), receipt)
        self.unet_evals += receipt.unet_evals
        self.unet_seconds += receipt.unet_seconds

    def _take_branches(self, done: Range, results: Sequence[Any]) -> None:
        unit, low, high = done
        key = (unit.index, low)
        for leaf, ref in zip(range(low, high), results[1:], strict=self.record):
            self.trajectories[unit.index, leaf] = ref
        self._remaking.discard(key)
        roles = self._roles_left.get(key)
        if roles is None:
            return  # made again for its trajectories alone
        if self._is_kept(unit, low):
            self.pictures[key] = ray.get(results[0])
        for role in sorted(roles):
            self._unscored[role].append((done, results[0]))
        if not roles:
            self._complete(done)

    def _take_scores(self, role: str, scored: Range, receipt: Receipt) -> None:
        unit, low, high = scored
        left = self._roles_left.get((unit.index, low))
        if left is None or role not in left:
            return  # scored twice, because another role's pictures were lost and made again
        for name, values in receipt.values["scores"].items():
            for leaf, value in zip(range(low, high), values, strict=True):
                self.scores[name][unit.index, leaf] = float(value)
        if receipt.values["embeddings"] is not None:
            for leaf, vector in zip(range(low, high), receipt.values["embeddings"], strict=True):
                self._embeddings[role][unit.index, leaf] = vector
        left.remove(role)
        if not left:
            self._complete(scored)

    def _complete(self, done: Range) -> None:
        unit, low, high = done
        del self._roles_left[unit.index, low]
        self._bytes.pop(("pictures", unit.index, low), None)
        self.seconds = time.perf_counter() - (self.began or 0)
        self.progress(high - low)

    # --- what is lost is made again ------------------------------------------------------------

    def lost(self, call: Call) -> None:
        """Make a lost prefix or lost pictures again, from the same seeds."""
        assert call.unit is not None
        again = (call.unit, *call.leaves)
        index = call.unit.index
        if call.method in PREFIXES:
            self._new.appendleft(call.unit)
        elif call.method in BRANCHES:
            self._waiting.setdefault(index, []).extend([*self._open.pop(index, ()), again])
            if self._prefixes.pop(index, None) is not None:
                self._new.appendleft(call.unit)
        elif call.method == "score":
            for queue in self._unscored.values():  # these wait with the same lost pictures
                for entry in [e for e in queue if e[0] == again]:
                    queue.remove(entry)
            self._branch_again(again)

    def again(self, leaves: Iterable[tuple[int, int]]) -> None:
        """Make the trajectories of these leaves (group over all units, branch) again."""
        for group, branch in leaves:
            index, leaf = self._place(group, branch)
            unit = next(u for u in self.units if u.index == index)
            low, high = next(r for r in unit.ranges(self.batch) if r[0] <= leaf < r[1])
            if (index, low) not in self._remaking:
                self._remaking.add((index, low))
                self._branch_again((unit, low, high))

    def _branch_again(self, lost: Range) -> None:
        index = lost[0].index
        if index in self._prefixes:
            queue = self._open.setdefault(index, deque())
            if lost not in queue:
                queue.appendleft(lost)
        elif lost not in self._waiting.setdefault(index, []):  # the prefix is being made again
            self._waiting[index].append(lost)

    # --- the results ---------------------------------------------------------------------------

    def reward_table(self, name: str) -> np.ndarray:
        """Scores of one reward, float64, shape (G, K), in the order of the policy's own groups."""
        found = self.scores[name]
        rows = [
            [found[u.index, g * u.branches + k] for k in range(u.branches)]
            for u in self.units
            if not _is_shown(u)
            for g in range(len(u.groups))
        ]
        return np.array(rows, dtype=np.float64)

    def vectors(self) -> np.ndarray | None:
        """Embeddings of all leaves by the first role that has them, float32, shape (N, D)."""
        found = next((self._embeddings[r] for r in self._scorers if r in self._embeddings), None)
        return None if found is None else np.stack([found[key] for key in sorted(found)])

    def leaf(self, group: int, branch: int) -> Any:
        """Ref of the trajectory of a leaf; `group` counts over all units."""
        return self.trajectories[self._place(group, branch)]

    def keep(self, leaves: Iterable[tuple[int, int]]) -> None:
        """Drop the trajectories of all leaves but these (group over all units, branch)."""
        kept = [self._place(group, branch) for group, branch in leaves]
        share = len(kept) / max(1, len(self.trajectories))
        self.trajectories = {leaf: self.trajectories[leaf] for leaf in kept}
        for key in self._bytes:
            if key[0] == "branches":
                self._bytes[key] = int(self._bytes[key] * share)

    def _place(self, group: int, branch: int) -> Leaf:
        for unit in self.units:
            if group < len(unit.groups):
                return unit.index, group * unit.branches + branch
            group -= len(unit.groups)
        raise IndexError(f"no group {group} beyond the last unit")


def _is_shown(unit: WorkUnit) -> bool:
    """Whether a unit is of demonstrations, not of what the policy draws."""
    return unit.domain == Domain.DEMONSTRATE


def _name(unit: WorkUnit) -> str:
    return f"unit {unit.index} of stage {unit.stage}"
