"""The actors of a run as the algorithm needs them: roll out, evaluate, update, sync."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import ray

from b2ray.actors.learner import Learner
from b2ray.actors.sampler import Sampler
from b2ray.actors.scorer import Scorer
from b2ray.actors.worker import UNBOUND, Place, Receipt
from b2ray.branching import RewardWindow, WorkUnit
from b2ray.config import Config
from b2ray.diffusion.lora_file import State, digest
from b2ray.diffusion.trajectory import Prefix
from b2ray.errors import WorkerError
from b2ray.evaluation import Evaluated, evaluated, evaluation_units
from b2ray.fleet.capacity import needs, scorers
from b2ray.fleet.dispatch import Dispatcher
from b2ray.fleet.gauges import Gauges
from b2ray.fleet.plans import LearnerCall, OnEach, Ready, Update
from b2ray.fleet.prefixes import Prefixes
from b2ray.fleet.rollout import Rollout
from b2ray.fleet.roster import Roster
from b2ray.fleet.session import StopFlag
from b2ray.fleet.slots import Role, Weights
from b2ray.fleet.teams import most, team_maker
from b2ray.fleet.tracing import Tracing
from b2ray.prefixes import Origin
from b2ray.prompts import PromptSets
from b2ray.replay import Kept, ages, largest
from b2ray.rewards import refuse_constant
from b2ray.rewards.combine import Statistics, combine

STARTS_WITHIN = 60.0  # seconds after which an actor that has no node counts as one without room


@dataclass(frozen=True)
class Updated:
    """What a stage's update says of itself.

    Attributes:
        leaves: that were trained on, the replayed ones included.
        unet_seconds: that its ranks were at work on the UNet, added up.
    """

    leaves: int
    figures: dict[str, float]
    unet_evals: int
    seconds: float
    unet_seconds: float


class Crew:
    """Samplers, scorers and the learner of one run; without a learner it only evaluates."""

    def __init__(
        self, config: Config, prompts: PromptSets, stop: StopFlag, trains: bool = True
    ) -> None:
        self.config, self._needs = config, needs(config, trains)
        self.scorers = scorers(config)
        self.roster = Roster(self._roles(prompts), config.fleet)
        self.dispatcher = Dispatcher(self.roster, stop, config.fleet.stall_timeout)
        self.tracing = Tracing(self.roster, config.tracking.trace, config.fleet.stall_timeout)
        self.gauges = Gauges(config.name)
        self.dispatcher.watch = self.gauges.watch
        self.gauges.phase("starting")
        # Policy versions that may still be sampled from, oldest first; the last is the newest.
        self._versions: dict[int, Weights] = {}
        self._newest: tuple[State, State] | None = None  # its LoRA and optimizer state
        self.prefixes = Prefixes(config, prompts.train)
        self._kept: list[Kept] = []  # what the next stage trains on again, by refs of the driver's

    def _roles(self, prompts: PromptSets) -> list[Role]:
        config, wanted = self.config, self._needs
        evaluated = [p for texts in prompts.evaluated().values() for p in texts]
        known = list(dict.fromkeys([*evaluated, *prompts.trained()]))

        def learner_args(places: Sequence[Place]) -> list[tuple[Any, ...]]:
            texts = list(prompts.trained())
            if len(places) == 1:
                return [(config, texts)]
            meeting = f"{places[0].address}:{places[0].port}"
            return [(config, texts, rank, meeting) for rank in range(len(places))]

        with_weights: dict[str, Any] = {
            "sampler": (Sampler, lambda _: [(config, known)], "bind"),
            "learner": (Learner, learner_args, "restore"),
        }
        roles = []
        for need in wanted:
            names = self.scorers.get(need.role)
            score = (Scorer, lambda _, names=names: [(config, names)], None)
            actor, args, sync = with_weights.get(need.role, score)
            make = team_maker(actor, need)
            sizes = most(need, wanted)
            roles.append(Role(need.role, need.least, sizes, make, args, need, sync))
        return roles

    # --- policy versions -----------------------------------------------------------------------

    def fresh(self) -> None:
        """Version 0: the learner's first LoRA, bound everywhere."""
        doing = "reading the first weights"
        self.dispatcher.run(LearnerCall("state", (), doing, taken=self._learnt))
        self.sync()

    def restored(
        self,
        version: int,
        bound: str,
        weights: State,
        optimizer: State,
        before: State | None,
        kept: Sequence[Kept],
        prefixes: Mapping[Origin, Prefix],
    ) -> None:
        """A committed version, bound everywhere.

        Args:
            version: the committed version.
            bound: its digest.
            weights: its LoRA.
            optimizer: its optimizer's state.
            before: the LoRA of the version before, from which a stage may be sampled that lags.
            kept: what the next stage trains on again.
            prefixes: those that serve again.
        """
        self.prefixes.take({origin: ray.put(prefix) for origin, prefix in prefixes.items()})
        self._kept = [replace(k, trajectory=ray.put(k.trajectory)) for k in kept]
        if before is not None:
            none = ray.put({})
            old = Weights(version - 1, digest(before), ray.put(dict(before)), none)
            self._versions[version - 1] = old
        self._take(version, bound, dict(weights), dict(optimizer))
        self.sync()

    def sync(self) -> None:
        """Wait until the fleet has bound the newest weights, proven by digest."""
        self.gauges.phase("syncing")
        self._sample_from(self.weights.version)
        self.dispatcher.run(Ready(self.roster))

    def complete(self) -> None:
        """Wait for samplers beyond the least, too, but not for nodes that are not there."""
        self.dispatcher.run(Ready(self.roster, patience=STARTS_WITHIN))

    @property
    def weights(self) -> Weights:
        """The newest policy version."""
        return self._versions[max(self._versions)]

    @property
    def newest(self) -> tuple[State, State]:
        """The newest version's LoRA and optimizer state."""
        assert self._newest is not None
        return self._newest

    @property
    def kept(self) -> list[Kept]:
        """What the next stage trains on again, with its arrays."""
        found = ray.get([k.trajectory for k in self._kept])
        return [replace(k, trajectory=t) for k, t in zip(self._kept, found, strict=True)]

    def _sample_from(self, version: int) -> None:
        self.roster.weights["sampler"] = self._versions[version]

    def _learnt(self, receipt: Receipt, results: Sequence[Any]) -> None:
        lora, optimizer = results
        self._take(receipt.version, receipt.values["digest"], lora, optimizer)

    def _take(self, version: int, bound: str, lora: State, optimizer: State) -> None:
        """A version of the driver's own: objects of the learner would go with its node."""
        refs = ray.put(lora), ray.put(optimizer)
        self._newest = ray.get(refs[0]), ray.get(refs[1])
        self._versions[version] = Weights(version, bound, *refs)
        for old in sorted(self._versions)[: -1 - self.config.learner.max_lag]:
            del self._versions[old]
        self.roster.weights["learner"] = self._versions[version]

    # --- stages --------------------------------------------------------------------------------

    def rollout(self, units: Sequence[WorkUnit], progress: Callable[[int], Any]) -> Rollout:
        """Sample and score a stage; every sampler is used, none matters."""
        self.gauges.phase("sampling")
        plan = self._plan(units, progress)
        self.dispatcher.run(plan)
        return plan

    def _plan(self, units: Sequence[WorkUnit], progress: Callable[[int], Any]) -> Rollout:
        self._sample_from(units[0].version)
        names = [r.name for r in self.config.rewards]
        trees = self.config.evaluation.trees if self.config.branching.branches > 1 else 0
        return self._ready(units, units[0].fork, names, trees=trees, progress=progress)

    def _ready(
        self, units: Sequence[WorkUnit], fork: int, names: Sequence[str], **more: Any
    ) -> Rollout:
        """The rollout of units for training, once the prefixes that several stages share are made.

        Args:
            units: of one stage.
            fork: to which step such prefixes are denoised.
            names: rewards.
        """
        making = self.prefixes.making(units, fork)
        if making is not None:
            self.dispatcher.run(making)
            self.prefixes.take(making.made)
        kept = self.prefixes.of(units)
        batch = self.config.branching.branch_batch
        plan = Rollout(units, batch, self.scorers, names, record=True, kept=kept, **more)
        if making is not None:
            plan.unet_evals, plan.began = making.unet_evals, making.began
            plan.unet_seconds, plan.moved["prefixes"] = making.unet_seconds, making.bytes
            plan.prefixes_made = len(making.made)
        return plan

    def update(
        self,
        stage: int,
        interval: int,
        rollout: Rollout,
        selected: Sequence[tuple[str, float, tuple[int, int]]],
        following: Sequence[WorkUnit],
        progress: Callable[[int], Any],
    ) -> tuple[Updated, Rollout | None]:
        """One update of the learner; beside it, if they may lag, the next stage's units.

        What earlier stages left is trained on again, and something left for the next.

        Args:
            stage: its number.
            interval: n.
            rollout: the stage's.
            selected: (prompt, advantage, (group, branch)), in the order in which they are trained
                on.
            following: work units of the next stage, for the weights before the update.
            progress: as in `rollout`, for them.
        """
        self.gauges.phase("learning")
        rollout.keep(leaf for _, _, leaf in selected)
        found: list[Receipt] = []

        def taken(receipt: Receipt, results: Sequence[Any]) -> None:
            found.append(receipt)
            self._learnt(receipt, results)

        max_lag, replayed = self.config.learner.max_lag, self._kept
        own = [Kept(stage, p, a, interval, leaf) for p, a, leaf in selected]
        plan = Update(
            stage,
            interval,
            rollout,
            selected,
            max_lag,
            taken,
            sample_from=self._sample_from,
            meanwhile=following[0].version if following else rollout.version,
            replayed=replayed,
            keep=largest([*replayed, *own], stage + 1, self.config),
        )
        ahead = self._plan(following, progress) if following else None
        self.dispatcher.run(plan, rollout, *([ahead] if ahead else []))
        self._kept, receipt = plan.kept, found[-1]
        again = ages(stage, replayed) if self.config.replay.stages else {}
        figures = {**receipt.values["figures"], **again}
        took = receipt.unet_evals, receipt.seconds, receipt.unet_seconds
        return Updated(len(selected) + len(replayed), figures, *took), ahead

    def total_reward(
        self, rollout: Rollout, earlier: RewardWindow
    ) -> tuple[np.ndarray, RewardWindow]:
        """The weighted sum that is trained on, float64, shape (G, K), and the window of each
        reward's own scores with this stage in it."""
        rewards = self.config.rewards
        tables = {r.name: rollout.reward_table(r.name) for r in rewards}
        for name, table in tables.items():
            try:
                refuse_constant(name, table)
            except ValueError as error:
                raise WorkerError("scorer", "any node", "scoring a stage", str(error)) from error
        names = [r.name for r in rewards if r.scale == "window"]
        window = earlier
        if names:
            window = earlier.with_stage(names, np.stack([tables[n].ravel() for n in names]))
        return combine(rewards, tables, window.statistics(2)), window

    def evaluate(
        self,
        prompts: Sequence[str],
        which: int,
        count: int,
        reference: Statistics | None,
        progress: Callable[[int], Any],
    ) -> Evaluated:
        """Figures of the newest policy on a prompt set, fixed seeds (`b2ray.evaluation`).

        Where no weights were ever bound it is the base model.
        """
        self.gauges.phase("evaluating")
        version = max(self._versions, default=UNBOUND)
        if self._versions:
            self._sample_from(version)
        units = evaluation_units(self.config, prompts, which, version, count)
        plan = Rollout(
            units,
            self.config.evaluation.batch,
            self.scorers,
            [r.name for r in self.config.all_rewards],
            record=False,
            embed=True,
            keep_pictures=self.config.evaluation.previews,
            progress=progress,
        )
        self.dispatcher.run(plan)
        return evaluated(self.config, plan, reference)

    def rehearse(
        self, units: Sequence[WorkUnit], interval: int
    ) -> tuple[dict[str, np.ndarray], dict[int, float]]:
        """Work units through every actor as in a stage, without an update.

        Returns:
            Scores of every reward, also of those that are held out, each of shape (G, K); and
            `Updater.rehearse`'s drift, on at most as many leaves as an optimizer step has.
        """
        names = [r.name for r in self.config.all_rewards]
        start = self.config.sampling.steps - self.config.interval_bounds[0]
        plan = self._ready(units, start, names, embed=True)
        self.dispatcher.run(plan)
        scores = {n: plan.reward_table(n) for n in names}
        prompts = [group.prompt for unit in units for group in unit.groups]
        leaves = [(g, k) for g in range(len(prompts)) for k in range(units[0].branches)]
        size = self.config.learner.batch
        apart = 1 if size == "all" else math.ceil(len(leaves) / size)
        some = [(prompts[g], 1.0, interval, plan.leaf(g, k)) for g, k in leaves[::apart]]
        call = LearnerCall("rehearse", (some,), "rehearsing an update", wanted=1)
        self.dispatcher.run(call)
        assert call.receipt is not None
        return scores, call.receipt.values["drift"]

    def too_long(self) -> list[str]:
        """Prompts whose end the tokenizer cuts off."""
        return list(self.roster.receipts["sampler"].values["too_long"])

    def picture_size(self) -> tuple[int, int]:
        """(height, width) of the model's pictures, as a sampler has it."""
        height, width = self.roster.receipts["sampler"].values["picture_size"]
        return height, width

    def elements(self) -> int:
        """Elements of a latent, as the learner has it."""
        return int(self.roster.receipts["learner"].values["elements"])

    def time_call(self, role: str, rows: int) -> float | None:
        """Seconds of one UNet call of so many latents, the learner's with the way back, while all
        actors of the role are as busy.

        Returns:
            The slowest slot's; None if one has no memory for it.
        """
        doing, args = f"timing a call of {rows} latents", (rows, role == "learner")
        plan = OnEach(role, len(self.roster.ready(role)), "time_call", args, doing)
        self.dispatcher.run(plan)
        found = [receipt.values["seconds"] for receipt in plan.receipts]
        return None if None in found else max(found)

    def reward_figures(self, rollout: Rollout, total: np.ndarray) -> dict[str, float]:
        """Mean of each reward, as it was scored, and of the sum over the stage's samples."""
        means = {f"reward/{r.name}": rollout.reward_table(r.name) for r in self.config.rewards}
        means["reward/mean"] = total
        return {name: float(table.mean()) for name, table in means.items()}

    def prefix_figures(self, rollout: Rollout) -> dict[str, float]:
        """How many prefixes a stage made, where they serve in others too."""
        shared = self.config.prefix.policy != "current"
        return {"prefix/made": float(rollout.prefixes_made)} if shared else {}

    def fleet_figures(self, images_per_second: float) -> dict[str, float]:
        """How the fleet is, and how fast per GPU: an overlap that needs one more may not pay."""
        placed = [s for s in self.roster.slots if s.places]
        gpus = {n.role: n.gpus * n.together for n in self._needs}
        used = sum(gpus[s.role.name] for s in placed)
        per_gpu = {"throughput/images_per_second_per_gpu": images_per_second / used} if used else {}
        return {
            **per_gpu,
            "throughput/images_per_second": images_per_second,
            "fleet/ready": float(len(self.roster.ready("sampler"))),
            "fleet/replaced": float(self.roster.replaced.total()),
        }

    def close(self) -> None:
        """End the actors."""
        self.roster.close()
