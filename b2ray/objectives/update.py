"""One stage's update: AdamW on the LoRA over (trajectory, step) rows of the interval."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from b2ray.config import Config
from b2ray.diffusion import lora
from b2ray.diffusion.lora_file import State
from b2ray.diffusion.noise import Domain, generator
from b2ray.diffusion.policy import Policy
from b2ray.diffusion.trajectory import Selected, Trajectory
from b2ray.objectives import OBJECTIVES
from b2ray.objectives.densities import Densities
from b2ray.objectives.meter import Meter
from b2ray.objectives.ranks import Ranks
from b2ray.objectives.rows import Rows, rows_of
from b2ray.objectives.steps import Drawn, draw, trained_steps

MAX_SKIPPED = 3  # updates in a row with a gradient that is not finite, before giving up
Visit = list[tuple[Selected, Drawn]]  # what is trained on together, with its steps


class Updater:
    """The policy, its optimizer, and how a stage changes them.

    With several ranks each fetches and computes its share of every batch; sums over the ranks make
    gradients, figures and refusals the same everywhere, so that all take the same steps.
    """

    def __init__(self, policy: Policy, config: Config, ranks: Ranks | None = None) -> None:
        self.policy, self.config, self.ranks = policy, config, ranks or Ranks()
        self.objective = OBJECTIVES[config.objective.kind]
        self.elements = elements = math.prod(policy.latent_shape)
        # A density is a mean over the elements, so each one's gradient is too small for float16.
        self.loss_scale = float(elements) if policy.dtype == torch.float16 else 1.0
        self.step_weights = _step_weights(policy, config)
        self.step_sizes = _step_sizes(policy, config, self.step_weights)
        self.trained = [
            wide and config.objective.trains(j) for j, wide in enumerate(policy.schedule.trainable)
        ]
        self.parameters = lora.parameters(policy.pipeline.unet)
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(),
            lr=config.learner.lr,
            weight_decay=config.learner.weight_decay,
        )
        self.skipped_in_a_row = 0

    def update(
        self,
        stage: int,
        selected: Sequence[Selected],
        fresh: Callable[[], bool] = lambda: True,
    ) -> dict[str, float]:
        """Train on a stage's selection, in place; returns the figures of the update.

        Every pass visits every trajectory once, in an order keyed by (seed, stage, pass), in
        batches of nearly equal size, so that none is left over. An objective on pairs visits a
        group's best and worst leaf together, one of demonstrations each with one of the policy's
        own. What is replayed is spread over all batches.

        Args:
            stage: keys the order, and sets the learning rate.
            selected: the same on every rank.
            fresh: asked on every rank when the first batch has been fetched: whether these very
                weights sampled all of it that is the stage's own. If not, its drift is measured,
                but never refused. That of what is replayed is not measured.

        Raises:
            ValueError: if the stored densities do not fit the policy, or gradients stay
                non-finite.
            RankLost: if another rank fails.
        """
        meter = Meter(self.policy.schedule.steps, self.ranks, self.policy.device)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, stage)
        if not any(self._steps(s) for s in selected):
            return meter.figures()
        if self.config.learner.recompute_log_probs:
            selected = self._rescored(selected)
        visits = self._visits(selected)
        size = self.config.learner.batch
        parts = 1 if size == "all" else math.ceil(len(selected) / size)
        first = True
        for epoch in range(self.config.learner.passes):
            drawn = self._drawn(visits, stage, epoch)
            for chosen in self._batches(drawn, stage, epoch, min(parts, len(visits))):
                mine = [s for visit in self.ranks.share(chosen) for s in visit]
                count = sum(len(self._steps(s)) for visit in chosen for s, _ in visit)
                check = fresh if first else None
                self._optimizer_step(self._microbatches(mine), count, meter, check)
                first = False
        return meter.figures()

    def rehearse(self, selected: Sequence[Selected]) -> dict[int, float]:
        """Mean |ratio - 1| of each trained step before any update; changes nothing.

        One microbatch also goes backward, so that the memory of an update has been seen.
        """
        micros = list(self._microbatches(self._whole(self.ranks.share(selected))))
        drift, count = torch.zeros(2, self.policy.schedule.steps)
        with torch.no_grad():
            for micro in micros:
                found = self.policy.log_prob(micro.step, micro.x, micro.following, micro.prompts)
                off = ((found - micro.old).exp() - 1).abs()
                drift.index_add_(0, micro.step.cpu(), off.cpu())
                count.index_add_(0, micro.step.cpu(), torch.ones(len(off)))
        for micro in micros[:1]:
            found = self.policy.log_prob(micro.step, micro.x, micro.following, micro.prompts)
            found.sum().backward()
        self.optimizer.zero_grad(set_to_none=True)
        self.ranks.sum([drift, count])
        return {
            step: float(drift[step] / count[step]) for step in count.nonzero().flatten().tolist()
        }

    def _steps(self, selected: Selected) -> list[int]:
        return trained_steps(selected.interval, self.trained)

    def _whole(self, selected: Sequence[Selected]) -> Visit:
        return [(s, Drawn.all_of(self._steps(s))) for s in selected]

    def _drawn(self, visits: Sequence[list[Selected]], stage: int, epoch: int) -> list[Visit]:
        """The visits of a pass with the steps that it trains; those of one visit are the same,
        as an objective on pairs needs them."""
        random = generator(self.config.seed, Domain.STEPS, stage, epoch)
        found = []
        for visit in visits:
            steps = self._steps(visit[0])
            count = self.config.learner.drawn_steps(len(steps))
            drawn = draw(steps, [self.step_sizes[j] for j in steps], count, random)
            found.append([(s, drawn) for s in visit])
        return found

    def _visits(self, selected: Sequence[Selected]) -> list[list[Selected]]:
        """What is trained on together: single trajectories, best and worst leaves of groups, or
        one of the policy's own and a demonstration, so that every batch is half of each."""
        shown = bool(self.config.demonstrations.path)
        if not self.objective.pairs and not shown:
            return [[s] for s in selected]
        halves = [list(selected[j : j + 2]) for j in range(0, len(selected), 2)]
        if shown:
            if any([s.advantage for s in pair] != [-1.0, 1.0] for pair in halves):
                raise ValueError("after each trajectory of the policy's own comes a demonstration")
            return halves
        if any(len({s.prompt for s in pair}) != 1 or len(pair) != 2 for pair in halves):
            raise ValueError("the objective needs the best and the worst leaf of every group")
        return [sorted(pair, key=lambda s: -s.advantage) for pair in halves]

    def _batches(
        self, visits: Sequence[Visit], stage: int, epoch: int, parts: int
    ) -> Iterator[list[Visit]]:
        """One pass in `parts`; the stage's own are in the first, as its drift is theirs."""
        draw = generator(self.config.seed, Domain.ORDER, stage, epoch)
        own = [v for v in visits if not v[0][0].age]
        old = [v for v in visits if v[0][0].age]
        first = np.array_split(draw.permutation(len(own)), parts)
        # The other way round, as the first parts of a split are the larger ones.
        then = np.array_split(draw.permutation(len(old)), parts)[::-1]
        for a, b in zip(first, then, strict=True):
            yield [own[j] for j in sorted(a)] + [old[j] for j in sorted(b)]

    def _microbatches(self, batch: Visit) -> Iterator[Rows]:
        """The rows of a batch, in UNet calls; none of an empty one."""
        size = self.config.learner.microbatch
        if self.objective.pairs:
            size = max(2, size - size % 2)
        if batch:
            total = self.policy.schedule.steps
            rows = rows_of(batch, total, self.step_weights, self.policy.device)
            yield from rows.slices(size)

    @torch.no_grad()
    def _rescored(self, selected: Sequence[Selected]) -> list[Selected]:
        """The selection with densities of the weights as they are, at the learner's batch shape.

        All have one interval: only what is replayed has others, which is never scored again.
        """
        batch, steps = self.config.learner.batch, self._steps(selected[0])
        size = len(selected) if batch == "all" else batch
        rows = torch.zeros(len(selected), len(steps))
        for low in range(0, len(selected), size):
            mine = self.ranks.share(range(low, min(low + size, len(selected))))
            found = [
                self.policy.log_prob(m.step, m.x, m.following, m.prompts)
                for m in self._microbatches(self._whole([selected[j] for j in mine]))
            ]
            if found:
                rows[list(mine)] = torch.cat(found).reshape(-1, len(mine)).T.cpu()
        # Every row has one rank's values and the others' zeros.
        self.ranks.sum([rows])
        places = [j - self.policy.schedule.steps + selected[0].interval for j in steps]
        return [
            replace(s, fetch=partial(_scored, s.fetch, places, row))
            for s, row in zip(selected, rows.numpy(), strict=True)
        ]

    def _optimizer_step(
        self,
        micros: Iterable[Rows],
        count: int,
        meter: Meter,
        fresh: Callable[[], bool] | None,
    ) -> None:
        """One step on a batch that stands for `count` rows; `micros` are this rank's of it.

        `fresh` is given for the first batch, whose drift is measured (see `update`).
        """
        self.optimizer.zero_grad(set_to_none=True)
        for micro in micros:
            output = self.policy.predict(micro.step, micro.x, micro.prompts)
            output.retain_grad()
            densities, kl = self._densities(micro, output)
            loss, clipped = self.objective.loss(densities, self.config.objective, self.elements)
            loss = loss * micro.weight
            if kl is not None:
                loss = loss + self.config.objective.kl_weight * kl
                meter.add_kl(kl, micro.scale)
            # The sum over the true count: batches, shares and microbatches of any size weigh the
            # same, and the ranks' gradients add up.
            whole = (loss * micro.scale).sum() / count * self.loss_scale
            with self.policy.clock:  # the way back is the UNet's but for a few scalars
                whole.backward()
            log_ratio = densities.log_prob.detach() - micro.old
            meter.add(micro.step, log_ratio, clipped, None if fresh is None else micro.own)
            if output.grad is not None:
                meter.add_gradient(micro.step, output.grad * (count / self.loss_scale))
        if fresh is not None:
            meter.share_drift()
            if fresh():
                self._refuse_drift(meter)
        self._add_up_gradients()
        norm = torch.nn.utils.clip_grad_norm_(
            self.parameters.values(), self.config.learner.max_grad_norm
        )
        if torch.isfinite(norm):
            self.optimizer.step()
            self.skipped_in_a_row = 0
        else:
            self.skipped_in_a_row += 1
            if self.skipped_in_a_row >= MAX_SKIPPED:
                raise ValueError(
                    f"the gradient was not finite {MAX_SKIPPED} times in a row: lower learner.lr, "
                    "or use model.dtype=float32"
                )
        meter.step(norm)

    def _add_up_gradients(self) -> None:
        """The batch's gradients on every rank, at their true scale."""
        if self.ranks.world > 1:  # an empty share left none
            for parameter in self.parameters.values():
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        self.ranks.sum(gradients)
        if self.loss_scale != 1:
            for gradient in gradients:
                gradient /= self.loss_scale

    def _densities(self, rows: Rows, output: torch.Tensor) -> tuple[Densities, torch.Tensor | None]:
        """What the objective sees, and, if it counts, each row's divergence from the base model
        with gradients, shape (N,)."""
        schedule, weight = self.policy.schedule, self.config.objective.kl_weight
        log_prob = schedule.log_prob(rows.step, rows.x, output, rows.following)
        if not weight and not self.objective.reference:
            return Densities(log_prob, rows.old, rows.advantage), None
        with torch.no_grad(), self.policy.reference():
            base = self.policy.predict(rows.step, rows.x, rows.prompts)
        reference = schedule.log_prob(rows.step, rows.x, base, rows.following)
        kl = schedule.kl(rows.step, rows.x, output, base) if weight else None
        return Densities(log_prob, rows.old, rows.advantage, reference), kl

    def _refuse_drift(self, meter: Meter) -> None:
        """Before any update the ratio is 1, or the sampler did not use these weights."""
        clip = self.config.objective.clip_nats / self.elements
        allowed = self.config.learner.max_ratio_drift * clip
        if not meter.drift_mean <= allowed:
            raise ValueError(
                f"before the update the mean |ratio - 1| is {meter.drift_mean:.2e}, more than "
                f"learner.max_ratio_drift allows ({allowed:.2e}): set "
                "learner.recompute_log_probs=true if the samplers compute in low precision"
            )

    def optimizer_state(self) -> dict[str, np.ndarray]:
        """AdamW's moments and step counts under the parameters' names."""
        entries = {}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                entries[f"{name}/{key}"] = value.detach().cpu().numpy().copy()
        return entries

    def restore(self, weights: State, optimizer: State) -> str:
        """Continue from a committed stage; returns the digest of the bound weights."""
        digest = self.policy.bind(weights)
        self.optimizer.state.clear()
        for key, value in optimizer.items():
            name, entry = key.rsplit("/", 1)
            parameter = self.parameters[name]
            tensor = torch.from_numpy(np.array(value))
            # AdamW keeps its step counts on the CPU.
            moved = tensor if entry == "step" else tensor.to(parameter.device)
            self.optimizer.state[parameter][entry] = moved
        return digest


def learning_rate(config: Config, stage: int) -> float:
    """The rate of a stage's updates: a function of the stage alone, so that resuming keeps it."""
    done = stage / config.curriculum.stages
    return config.learner.lr * (1 - done if config.learner.lr_schedule == "linear" else 1)


def _step_weights(policy: Policy, config: Config) -> torch.Tensor | None:
    """Weight of each step in the loss, mean 1 over the steps that can be trained, shape (T,).

    None: the steps of each trajectory have weights of their own.
    """
    schedule, kind = policy.schedule, config.objective.step_weights
    if kind == "displacement":
        return None
    if kind == "none":
        return torch.ones_like(schedule.sigma)
    trainable = torch.tensor(schedule.trainable, device=schedule.sigma.device)
    weights = torch.where(trainable, 1 / schedule.sensitivity(), 0.0)
    if kind == "noise":
        weights = weights * schedule.reach()
    elif not isinstance(kind, str):
        weights = weights * torch.tensor(kind, device=weights.device)
    return weights / weights[trainable].mean().clamp(min=1e-12)


def _step_sizes(policy: Policy, config: Config, weights: torch.Tensor | None) -> list[float]:
    """How large each step's gradient is, by its weight and how strongly its density depends on the
    predicted noise: those are drawn more often, as importance sampling asks. The divergence counts
    in all steps alike."""
    sizes = torch.ones_like(policy.schedule.sigma)
    if weights is not None:
        sizes = weights * policy.schedule.sensitivity()
    trainable = torch.tensor(policy.schedule.trainable, device=sizes.device)
    sizes = torch.where(trainable, sizes, 0.0)
    sizes = sizes / sizes.sum().clamp(min=1e-12)
    if config.objective.kl_weight:
        sizes = (sizes + trainable / trainable.sum()) / 2
    return [float(size) for size in sizes]


def _scored(fetch: Callable[[], Trajectory], steps: list[int], row: np.ndarray) -> Trajectory:
    """A trajectory with other densities at these of its steps, counted from its fork."""
    trajectory = fetch()
    log_probs = trajectory.log_probs.copy()
    log_probs[steps] = row
    return replace(trajectory, log_probs=log_probs)
