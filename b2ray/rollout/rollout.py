"""The rollout of work units: prefix -> branches -> scores, on any sampler and any scorer.

Demonstrations go the same way up to their trajectories: their latents stand for the prefix, and the
trajectories to them for the branches.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import ray

from b2ray.actors.messages import Answer, BranchesMade, PrefixesMade, Scored, request
from b2ray.actors.sampler import Sampler
from b2ray.actors.scorer import Scorer
from b2ray.algorithm.branching import WorkUnit
from b2ray.fleet.slots import Call, Slot
from b2ray.rollout.stragglers import Stragglers
from b2ray.rollout.work import (
    LeafKey,
    LeafRange,
    Step,
    Work,
    is_demonstration,
    name_of,
    picture_files,
)

# Ranges whose pictures wait for a scorer: samplers that are faster than the scorers pause here,
# instead of filling the object store.
MOST_UNSCORED = 32


class RolloutPlan:
    """Prefix -> branches -> scores for every work unit; demonstrations are never scored.

    A prefix is a reference that any sampler can branch from: a sampler first takes ranges of
    prefixes that it made, then a new unit, and when units run out, ranges of prefixes made
    elsewhere. The last prefixes are made first of all, so that at the end every sampler finds
    branches to make. Pictures go to a scorer of each role as soon as they exist. How the work is
    cut does not depend on who does it.

    Args:
        units: the work units, all of one policy version.
        branch_batch: leaves per call.
        scorers: the rewards that each role of scorers has loaded.
        rewards: the rewards that are wanted.
        record: whether trajectories are kept.
        embed: whether scorers are asked for embeddings.
        keep_pictures: of how many leaves at the beginning pictures are kept.
        trees: of how many groups at the beginning thumbnails are kept.
        progress: called with the number of leaves that have all their scores, or need none.

    Attributes:
        version: the policy version of all units.
        scores: by reward, then leaf; see `reward_table`.
        trajectories: references by leaf, if they are recorded.
        pictures: (unit index, first leaf) -> the pictures of the ranges to be kept.
        thumbnails: (group over all units, branch or `FORK`) -> a small picture file.
        divergences: of a demonstration's leaf, how far the policy is from it, in nats.
        unet_evals: guided UNet evaluations of samplers.
        unet_seconds: seconds in which samplers computed the UNet, of all of them together.
        bytes_moved: bytes that samplers put into the object store, by kind.
        began: when the first call was handed out (`time.perf_counter`); before that None.
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
        trees: int = 0,
        progress: Callable[[int], Any] = lambda _: None,
    ) -> None:
        self.units, self.batch, self.rewards = units, branch_batch, list(rewards)
        self.version = units[0].version
        self.record, self.embed, self.keep_pictures = record, embed, keep_pictures
        self.progress, self.trees = progress, trees
        self.scores: dict[str, dict[LeafKey, float]] = defaultdict(dict)
        self.trajectories: dict[LeafKey, Any] = {}
        self.divergences: dict[LeafKey, float] = {}
        self.pictures: dict[tuple[int, int], np.ndarray] = {}
        self.thumbnails: dict[tuple[int, int], bytes] = {}
        self.unet_evals, self.unet_seconds = 0, 0.0
        self.bytes_moved: Counter[str] = Counter(prefixes=0, pictures=0, trajectories=0)
        self.seconds = 0.0
        self.began: float | None = None
        self._scorers = [role for role, names in scorers.items() if set(names) & set(rewards)]
        self._embeddings: dict[str, dict[LeafKey, np.ndarray]] = defaultdict(dict)
        self._samplers: set[int] = set()
        self._stragglers = Stragglers()
        self._maker: dict[int, int] = {}  # sampler that made the prefix, by unit index
        self._prefixes: dict[int, Any] = {}
        # Units without a prefix, ranges that can be branched, and those that wait for a prefix.
        self._new: deque[WorkUnit] = deque(units)
        self._open: dict[int, deque[LeafRange]] = {}
        self._waiting: dict[int, list[LeafRange]] = {u.index: self._ranges(u) for u in units}
        # Ranges whose pictures wait for a role, and the roles that each range still waits for.
        self._unscored: dict[str, deque[tuple[LeafRange, Any]]] = {
            role: deque() for role in self._scorers
        }
        self._roles_left = {
            leaves.key: set() if is_demonstration(u) else set(self._scorers)
            for u in units
            for leaves in self._ranges(u)
        }
        self._remaking: set[LeafKey] = set()
        self._bytes: dict[tuple[Any, ...], int] = {}
        self._before: dict[int, int] = {}  # leaves in earlier units
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

    def _ranges(self, unit: WorkUnit) -> list[LeafRange]:
        return [LeafRange(unit, low, high) for low, high in unit.ranges(self.batch)]

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

        # Branches of prefixes that this sampler made, unless the last new prefixes are to be made.
        own = next((u for u in self._open if self._maker[u] == slot.index), None)
        if self._new and (own is None or len(self._new) <= len(self._samplers)):
            return self._prefix(self._new.popleft())
        if own is None and self._open:
            own = max(self._open, key=lambda u: len(self._open[u]))
        if own is None or not self._is_worth_sending(slot.index):
            return None
        return self._branches(own, slot)

    def _is_worth_sending(self, sampler: int) -> bool:
        """Whether a sampler should take one of the last branch calls."""
        if self._new:
            return True
        count = sum(map(len, self._open.values())) + sum(map(len, self._waiting.values()))
        if count > 2 * len(self._samplers):
            return True
        return self._stragglers.should_take(sampler, count, self.batch)

    def _prefix(self, unit: WorkUnit) -> Call:
        if is_demonstration(unit):
            asked = request(Sampler.encode_demonstrations, unit, picture_files(unit))
            doing = f"encoding {name_of(unit)}"
        else:
            asked, doing = request(Sampler.denoise_prefix, unit), f"denoising {name_of(unit)}"
        return Call("sampler", [asked], doing, self.version, Work(Step.PREFIX, unit))

    def _branches(self, index: int, slot: Slot) -> Call:
        leaves = self._open[index].popleft()
        if not self._open[index]:
            del self._open[index]
        unit, low, high = leaves.unit, leaves.low, leaves.high
        prefix, trajectories = self._prefixes[index], len(leaves) if self.record else 0
        if is_demonstration(unit):
            doing = f"making trajectories of {leaves}"
            asked = request(Sampler.trajectories_to_demonstrations, unit, prefix, low, high)
        else:
            doing = f"denoising {leaves}"
            decode = bool(self._roles_left.get(leaves.key)) or self._is_kept(leaves)
            trees = self.trees - self._first_group(unit)
            trees = trees if decode and low < trees * unit.branches else 0
            asked = request(
                Sampler.denoise_branches, unit, prefix, low, high, self.record, decode, trees
            )
        asked = asked.with_objects(1 + trajectories)  # the pictures, and a trajectory a leaf
        self._stragglers.sent(slot.index, len(leaves))
        work = Work(Step.BRANCHES, unit, leaves)
        return Call("sampler", [asked], doing, self.version, work)

    def _is_kept(self, leaves: LeafRange) -> bool:
        """Whether the pictures of a range are kept."""
        return leaves.low + self._before[leaves.unit.index] < self.keep_pictures

    def _first_group(self, unit: WorkUnit) -> int:
        """Groups in earlier units."""
        return self._before[unit.index] // unit.branches

    def _score(self, role: str) -> Call:
        leaves, pictures = self._unscored[role].popleft()
        unit = leaves.unit
        prompts = [unit.groups[g].prompt for g, _ in unit.leaves(leaves.low, leaves.high)]
        asked = request(Scorer.score, pictures, prompts, self.rewards, self.embed)
        return Call(role, [asked], f"scoring {leaves}", work=Work(Step.SCORES, unit, leaves))

    # --- taking back ---------------------------------------------------------------------------

    def done(self, call: Call, slot: Slot, answer: Answer, results: Sequence[Any]) -> None:
        """Pass the result of a step to the next one."""
        unit, leaves = call.work.unit, call.work.leaves
        if isinstance(answer, PrefixesMade):
            self._take_prefix(unit, slot, answer, results[0])
        elif isinstance(answer, BranchesMade):
            self._take_branches(leaves, slot, answer, results)
        elif isinstance(answer, Scored):
            self._take_scores(call.role, leaves, answer)
        self.unet_evals += answer.receipt.unet_evals
        self.unet_seconds += answer.receipt.unet_seconds

    def _take_prefix(self, unit: WorkUnit, slot: Slot, answer: PrefixesMade, latents: Any) -> None:
        self._prefixes[unit.index], self._maker[unit.index] = latents, slot.index
        self._bytes["prefix", unit.index] = answer.nbytes
        self.bytes_moved["prefixes"] += answer.nbytes
        ranges = self._waiting.pop(unit.index, [])
        if ranges:
            self._open.setdefault(unit.index, deque()).extend(ranges)

    def _take_branches(
        self, leaves: LeafRange, slot: Slot, answer: BranchesMade, results: Sequence[Any]
    ) -> None:
        unit, (pictures, *trajectories) = leaves.unit, results
        self._stragglers.done(slot.index, len(leaves), answer.receipt.seconds)
        self._bytes["pictures", *leaves.key] = answer.picture_nbytes
        self._bytes["branches", *leaves.key] = answer.nbytes
        self.bytes_moved.update(pictures=answer.picture_nbytes, trajectories=answer.nbytes)
        for leaf, divergence in enumerate(answer.divergences, leaves.low):
            self.divergences[unit.index, leaf] = divergence
        for (group, branch), picture in answer.thumbnails.items():
            self.thumbnails[self._first_group(unit) + group, branch] = picture
        for leaf, ref in zip(range(leaves.low, leaves.high), trajectories, strict=self.record):
            self.trajectories[unit.index, leaf] = ref

        self._remaking.discard(leaves.key)
        roles = self._roles_left.get(leaves.key)
        if roles is None:
            return  # made again for its trajectories alone
        if self._is_kept(leaves):
            self.pictures[leaves.key] = ray.get(pictures)
        for role in sorted(roles):
            self._unscored[role].append((leaves, pictures))
        if not roles:
            self._complete(leaves)

    def _take_scores(self, role: str, leaves: LeafRange, answer: Scored) -> None:
        roles = self._roles_left.get(leaves.key)
        if roles is None or role not in roles:
            return  # scored twice, because another role's pictures were lost and made again
        keys = [(leaves.unit.index, leaf) for leaf in range(leaves.low, leaves.high)]
        for name, values in answer.scores.items():
            for key, value in zip(keys, values, strict=True):
                self.scores[name][key] = float(value)
        if answer.embeddings is not None:
            self._embeddings[role] |= dict(zip(keys, answer.embeddings, strict=True))
        roles.remove(role)
        if not roles:
            self._complete(leaves)

    def _complete(self, leaves: LeafRange) -> None:
        del self._roles_left[leaves.key]
        self._bytes.pop(("pictures", *leaves.key), None)
        self.seconds = time.perf_counter() - (self.began or 0)
        self.progress(len(leaves))

    # --- what is lost is made again ------------------------------------------------------------

    def lost(self, call: Call) -> None:
        """Make a lost prefix or lost pictures again, from the same seeds."""
        work: Work = call.work
        index = work.unit.index
        if work.step == Step.PREFIX:
            self._new.appendleft(work.unit)
            return
        assert work.leaves is not None
        if work.step == Step.BRANCHES:
            self._waiting.setdefault(index, []).extend([*self._open.pop(index, ()), work.leaves])
            if self._prefixes.pop(index, None) is not None:
                self._new.appendleft(work.unit)
        else:
            for queue in self._unscored.values():  # these wait with the same lost pictures
                for entry in [e for e in queue if e[0] == work.leaves]:
                    queue.remove(entry)
            self._branch_again(work.leaves)

    def again(self, leaves: Iterable[tuple[int, int]]) -> None:
        """Make the trajectories of these leaves (group over all units, branch) again."""
        for group, branch in leaves:
            index, leaf = self._key(group, branch)
            unit = next(u for u in self.units if u.index == index)
            around = next(r for r in self._ranges(unit) if r.low <= leaf < r.high)
            if around.key not in self._remaking:
                self._remaking.add(around.key)
                self._branch_again(around)

    def _branch_again(self, leaves: LeafRange) -> None:
        index = leaves.unit.index
        if index in self._prefixes:
            queue = self._open.setdefault(index, deque())
            if leaves not in queue:
                queue.appendleft(leaves)
        elif leaves not in self._waiting.setdefault(index, []):  # the prefix is being made again
            self._waiting[index].append(leaves)

    # --- the results ---------------------------------------------------------------------------

    def reward_table(self, name: str) -> np.ndarray:
        """Scores of one reward, float64, shape (G, K), in the order of the policy's own groups."""
        scores = self.scores[name]
        rows = [
            [scores[u.index, g * u.branches + k] for k in range(u.branches)]
            for u in self.units
            if not is_demonstration(u)
            for g in range(len(u.groups))
        ]
        return np.array(rows, dtype=np.float64)

    def vectors(self) -> np.ndarray | None:
        """Embeddings of all leaves by the first role that has them, float32, shape (N, D)."""
        roles = (r for r in self._scorers if r in self._embeddings)
        vectors = self._embeddings[role] if (role := next(roles, None)) else None
        return None if vectors is None else np.stack([vectors[key] for key in sorted(vectors)])

    def leaf(self, group: int, branch: int) -> Any:
        """Reference of the trajectory of a leaf; `group` counts over all units."""
        return self.trajectories[self._key(group, branch)]

    def keep(self, leaves: Iterable[tuple[int, int]]) -> None:
        """Drop the trajectories of all leaves but these (group over all units, branch)."""
        keys = [self._key(group, branch) for group, branch in leaves]
        share = len(keys) / max(1, len(self.trajectories))
        self.trajectories = {key: self.trajectories[key] for key in keys}
        for name in self._bytes:
            if name[0] == "branches":
                self._bytes[name] = int(self._bytes[name] * share)

    def _key(self, group: int, branch: int) -> LeafKey:
        for unit in self.units:
            if group < len(unit.groups):
                return unit.index, group * unit.branches + branch
            group -= len(unit.groups)
        raise IndexError(f"no group {group} beyond the last unit")
