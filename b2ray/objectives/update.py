"""One stage's update: AdamW on the LoRA over (trajectory, step) pairs of the interval."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from b2ray.config import Config
from b2ray.diffusion import lora
from b2ray.diffusion.lora_file import State
from b2ray.diffusion.noise import Domain, generator
from b2ray.diffusion.policy import Policy
from b2ray.diffusion.trajectory import Selected, Trajectory, from_wire
from b2ray.objectives import OBJECTIVES
from b2ray.objectives.ranks import Ranks

MAX_SKIPPED = 3  # updates in a row with a gradient that is not finite, before giving up


@dataclass(frozen=True)
class _Pairs:
    """(trajectory, step) pairs of a batch, step by step: all rows have length N."""

    step: torch.Tensor
    x: torch.Tensor
    following: torch.Tensor
    old: torch.Tensor
    advantage: torch.Tensor
    prompts: list[str]

    def slices(self, size: int) -> Iterator[_Pairs]:
        for low in range(0, len(self.step), size):
            s = slice(low, low + size)
            yield _Pairs(
                self.step[s],
                self.x[s],
                self.following[s],
                self.old[s],
                self.advantage[s],
                self.prompts[s],
            )


class Updater:
    """The policy, its optimizer, and how a stage changes them.

    With several ranks each fetches and computes its share of every batch; sums over the ranks make
    gradients, figures and refusals the same everywhere, so that all take the same steps.
    """

    def __init__(self, policy: Policy, config: Config, ranks: Ranks | None = None) -> None:
        self.policy, self.config, self.ranks = policy, config, ranks or Ranks()
        self.objective = OBJECTIVES[config.objective.kind]
        elements = math.prod(policy.latent_shape)
        self.clip = config.objective.clip_nats / elements
        # A density is a mean over the elements, so each one's gradient is too small for float16.
        self.loss_scale = float(elements) if policy.dtype == torch.float16 else 1.0
        self.step_weights = _step_weights(policy, config)
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
        interval: int,
        selected: Sequence[Selected],
        fresh: Callable[[], bool] = lambda: True,
    ) -> dict[str, float]:
        """Train on a stage's selection, in place; returns the figures of the update.

        Every pass visits every trajectory once, in an order keyed by (seed, stage, pass), in
        batches of nearly equal size, so that none is left over.

        Args:
            stage: keys the order, and sets the learning rate.
            interval: n.
            selected: the same on every rank.
            fresh: asked on every rank when the first batch has been fetched: whether these very
                weights sampled all of it. If not, its drift is measured, but never refused.

        Raises:
            ValueError: if the stored densities do not fit the policy, or gradients stay
                non-finite.
            RankLost: if another rank fails.
        """
        meter = _Meter(self.policy.schedule.steps, self.ranks)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, stage)
        steps = len(self._trained_steps(interval))
        if not steps:
            return meter.figures()
        if self.config.learner.recompute_log_probs:
            selected = self._rescored(interval, selected)
        parts = math.ceil(len(selected) / self.config.learner.batch)
        first = True
        for epoch in range(self.config.learner.passes):
            order = generator(self.config.seed, Domain.ORDER, stage, epoch).permutation(
                len(selected)
            )
            for batch in np.array_split(order, parts) if parts else ():
                mine = self.ranks.share([selected[j] for j in sorted(batch)])
                micros = self._microbatches(interval, mine)
                self._optimizer_step(micros, steps * len(batch), meter, fresh if first else None)
                first = False
        return meter.figures()

    def rehearse(self, interval: int, selected: Sequence[Selected]) -> dict[int, float]:
        """Mean |ratio - 1| of each trained step before any update; changes nothing.

        One microbatch also goes backward, so that the memory of an update has been seen.
        """
        micros = list(self._microbatches(interval, self.ranks.share(selected)))
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

    def _trained_steps(self, interval: int) -> list[int]:
        """The interval's steps whose density is wide enough, counted from the fork."""
        return [j for j, wide in enumerate(self.policy.schedule.trainable[-interval:]) if wide]

    def _microbatches(self, interval: int, batch: Sequence[Selected]) -> Iterator[_Pairs]:
        """The pairs of a batch; none of an empty one."""
        if batch:
            yield from self._pairs(interval, batch).slices(self.config.learner.microbatch)

    def _pairs(self, interval: int, batch: Sequence[Selected]) -> _Pairs:
        """The batch's trainable steps, ordered by step, then by trajectory."""
        fork = self.policy.schedule.steps - interval
        steps = self._trained_steps(interval)
        trajectories = [s.fetch() for s in batch]
        latents = torch.stack([from_wire(t.latents) for t in trajectories])
        old = torch.from_numpy(np.stack([t.log_probs for t in trajectories]))
        advantage = torch.tensor([s.advantage for s in batch])
        device = self.policy.device
        return _Pairs(
            step=torch.tensor([fork + j for j in steps]).repeat_interleave(len(batch)).to(device),
            x=torch.cat([latents[:, j] for j in steps]).to(device),
            following=torch.cat([latents[:, j + 1] for j in steps]).to(device),
            old=torch.cat([old[:, j] for j in steps]).to(device),
            advantage=advantage.repeat(len(steps)).to(device),
            prompts=[s.prompt for s in batch] * len(steps),
        )

    @torch.no_grad()
    def _rescored(self, interval: int, selected: Sequence[Selected]) -> list[Selected]:
        """The selection with densities of the weights as they are, at the learner's batch shape."""
        size, steps = self.config.learner.batch, self._trained_steps(interval)
        rows = torch.zeros(len(selected), len(steps))
        for low in range(0, len(selected), size):
            mine = self.ranks.share(range(low, min(low + size, len(selected))))
            found = [
                self.policy.log_prob(m.step, m.x, m.following, m.prompts)
                for m in self._microbatches(interval, [selected[j] for j in mine])
            ]
            if found:
                rows[list(mine)] = torch.cat(found).reshape(-1, len(mine)).T.cpu()
        # Every row has one rank's values and the others' zeros.
        self.ranks.sum([rows])
        return [
            replace(s, fetch=partial(_scored, s.fetch, steps, row))
            for s, row in zip(selected, rows.numpy(), strict=True)
        ]

    def _optimizer_step(
        self,
        micros: Iterable[_Pairs],
        count: int,
        meter: _Meter,
        fresh: Callable[[], bool] | None,
    ) -> None:
        """One step on a batch of `count` pairs, of which `micros` are this rank's.

        `fresh` is given for the first batch, whose drift is measured (see `update`).
        """
        self.optimizer.zero_grad(set_to_none=True)
        for micro in micros:
            output = self.policy.predict(micro.step, micro.x, micro.prompts)
            output.retain_grad()
            log_prob = self.policy.schedule.log_prob(micro.step, micro.x, output, micro.following)
            loss, clipped = self.objective(log_prob, micro.old, micro.advantage, self.clip)
            loss = loss * self.step_weights[micro.step]
            if self.config.objective.kl_weight:
                kl = self._kl(micro, output)
                loss = loss + self.config.objective.kl_weight * kl
                meter.add_kl(kl)
            # The sum over the true count: batches, shares and microbatches of any size weigh the
            # same, and the ranks' gradients add up.
            (loss.sum() / count * self.loss_scale).backward()
            meter.add(micro.step, log_prob.detach() - micro.old, clipped, fresh is not None)
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

    def _kl(self, pairs: _Pairs, output: torch.Tensor) -> torch.Tensor:
        """Divergence of each pair's step from the base model's, with gradients, shape (N,)."""
        with torch.no_grad(), self.policy.reference():
            reference = self.policy.predict(pairs.step, pairs.x, pairs.prompts)
        return self.policy.schedule.kl(pairs.step, pairs.x, output, reference)

    def _refuse_drift(self, meter: _Meter) -> None:
        """Before any update the ratio is 1, or the sampler did not use these weights."""
        allowed = self.config.learner.max_ratio_drift * self.clip
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


def _step_weights(policy: Policy, config: Config) -> torch.Tensor:
    """Weight of each step in the loss, mean 1 over the steps that can be trained, shape (T,)."""
    schedule = policy.schedule
    if config.objective.step_weights == "none":
        return torch.ones_like(schedule.sigma)
    trainable = torch.tensor(schedule.trainable, device=schedule.sigma.device)
    weights = torch.where(trainable, 1 / schedule.sensitivity(), 0.0)
    return weights / weights[trainable].mean()


def _scored(fetch: Callable[[], Trajectory], steps: list[int], row: np.ndarray) -> Trajectory:
    """A trajectory with other densities at these steps."""
    trajectory = fetch()
    log_probs = trajectory.log_probs.copy()
    log_probs[steps] = row
    return replace(trajectory, log_probs=log_probs)


class _Meter:
    """Figures of an update, summed on the way; this rank's, until they are shared."""

    def __init__(self, steps: int, ranks: Ranks) -> None:
        self.ranks = ranks
        self.count = torch.zeros(steps)
        self.clipped = torch.zeros(steps)
        self.squared_grad = torch.zeros(steps)
        self.kl = torch.zeros((), dtype=torch.float64)
        self.kl_reference = torch.zeros((), dtype=torch.float64)
        self.norms: list[float] = []
        self.drift, self.drift_max = torch.zeros(2), torch.zeros(())

    def add(
        self,
        step: torch.Tensor,
        log_ratio: torch.Tensor,
        clipped: torch.Tensor,
        drift: bool,
    ) -> None:
        step, log_ratio = step.cpu(), log_ratio.cpu()
        self.count.index_add_(0, step, torch.ones(len(step)))
        self.clipped.index_add_(0, step, clipped.float().cpu())
        # John Schulman's unbiased estimate of KL(old || new) with low variance.
        self.kl += (log_ratio.exp() - 1 - log_ratio).sum()
        if drift:
            off = (log_ratio.exp() - 1).abs()
            self.drift += torch.tensor([off.sum(), len(off)])
            self.drift_max = torch.maximum(self.drift_max, off.max())

    def add_kl(self, kl: torch.Tensor) -> None:
        """Divergence of each pair from the base model."""
        self.kl_reference += kl.detach().sum().cpu()

    def add_gradient(self, step: torch.Tensor, gradient: torch.Tensor) -> None:
        """Gradient of each pair's own loss by its guided output, shape (N, C, H, W)."""
        self.squared_grad.index_add_(0, step.cpu(), (gradient**2).sum((1, 2, 3)).cpu())

    def step(self, norm: torch.Tensor) -> None:
        self.norms.append(float(norm))

    def share_drift(self) -> None:
        """Add up what the ranks have seen of the drift: once, before it is read."""
        self.ranks.sum([self.drift])
        self.drift_max = self.ranks.largest(self.drift_max)

    @property
    def drift_mean(self) -> float:
        return float(self.drift[0] / self.drift[1])

    def figures(self) -> dict[str, float]:
        """Means over all pairs of all ranks, and per denoising step: once, at the end."""
        self.ranks.sum([self.count, self.clipped, self.squared_grad, self.kl, self.kl_reference])
        total = float(self.count.sum())
        if total == 0:
            return {"policy/updates": 0.0}
        finite = [n for n in self.norms if math.isfinite(n)]
        reference = {"policy/kl_reference": float(self.kl_reference) / total}
        figures = {
            "policy/updates": float(len(finite)),
            "policy/skipped_updates": float(len(self.norms) - len(finite)),
            "policy/ratio_drift": self.drift_mean,
            "policy/ratio_drift_max": float(self.drift_max),
            "policy/clip_fraction": float(self.clipped.sum()) / total,
            "policy/approx_kl": float(self.kl) / total,
            **(reference if self.kl_reference else {}),
            "policy/grad_norm": sum(finite) / max(1, len(finite)),
        }
        for step in self.count.nonzero().flatten().tolist():
            figures[f"policy/clip_fraction/step_{step:02d}"] = float(
                self.clipped[step] / self.count[step]
            )
            figures[f"policy/grad_norm/step_{step:02d}"] = float(
                (self.squared_grad[step] / self.count[step]).sqrt()
            )
        return figures
