"""The update of a stage: AdamW on the LoRA, over (trajectory, step) rows of the interval."""

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
from b2ray.objectives.batch import Batch, batch_of
from b2ray.objectives.densities import Densities
from b2ray.objectives.ranks import Ranks
from b2ray.objectives.step_weights import step_sizes, step_weights
from b2ray.objectives.steps import SampledSteps, draw, trained_steps
from b2ray.objectives.update_metrics import UpdateMetrics

MAX_SKIPPED = 3  # optimizer steps in a row with non-finite gradients, after which the update fails
TrajectorySteps = tuple[Selected, SampledSteps]  # a trajectory and those of its steps to train on
TrainingUnit = list[TrajectorySteps]  # trajectories that have to be in the same batch


class Updater:
    """A policy with its optimizer, which a stage's update changes.

    With several ranks, each rank fetches and computes its share of every batch. Gradients and
    figures are summed over the ranks, so that all ranks take the same steps and raise the same
    errors.

    Args:
        policy: the policy that is trained.
        config: the run's configuration.
        ranks: the communication with the other ranks; None for a single rank.
    """

    def __init__(self, policy: Policy, config: Config, ranks: Ranks | None = None) -> None:
        self.policy, self.config, self.ranks = policy, config, ranks or Ranks()
        self.loss_function = OBJECTIVES[config.objective.kind]
        self.elements = elements = math.prod(policy.latent_shape)
        # A density is a mean over the elements, so the gradient of each element is too small for
        # float16 unless the loss is scaled up.
        self.loss_scale = float(elements) if policy.dtype == torch.float16 else 1.0
        self.step_weights = step_weights(policy, config)
        self.step_sizes = step_sizes(policy, config, self.step_weights)
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
        """Train the policy on a stage's selection.

        Every inner epoch contains every trajectory once, in an order keyed by (seed, stage, epoch)
        and in batches of nearly equal size. A batch has an objective's pairs whole: the best and
        the worst leaf of a group, or with demonstrations one trajectory of the policy and one
        demonstration. Replayed trajectories are spread over all batches.

        Args:
            stage: index of the stage, which keys the order and sets the learning rate.
            selected: the selection, the same on every rank.
            fresh: called on every rank after the first batch has been fetched; returns whether the
                present weights sampled all of its trajectories that are not replayed. If not, their
                drift is measured but never raises an error. The drift of replayed trajectories is
                not measured.

        Returns:
            The figures of the update by name (`UpdateMetrics.figures`).

        Raises:
            ValueError: the stored densities do not fit the policy, or gradients stay non-finite.
            RankLost: another rank failed.
        """
        metrics = UpdateMetrics(self.policy.schedule.steps, self.ranks, self.policy.device)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, stage)
        if not any(self._trained_steps(s) for s in selected):
            return metrics.figures()
        if self.config.learner.recompute_log_probs:
            selected = self._rescored(selected)
        # Trajectories that belong together form a unit, which no batch and no share separates.
        units = self._units(selected)
        size = self.config.learner.batch
        batches = 1 if size == "all" else math.ceil(len(selected) / size)
        first = True
        for epoch in range(self.config.learner.inner_epochs):
            sampled = self._sample_steps(units, stage, epoch)
            for batch in self._batches(sampled, stage, epoch, min(batches, len(units))):
                share = [s for unit in self.ranks.share(batch) for s in unit]
                # The gradient is divided by the number of all trained steps, also of those that
                # were not sampled and those of other ranks.
                count = sum(len(self._trained_steps(s)) for unit in batch for s, _ in unit)
                # The drift is measured before the first optimizer step, when ratios should be 1.
                check = fresh if first else None
                self._optimizer_step(self._microbatches(share), count, metrics, check)
                first = False
        return metrics.figures()

    def dry_run(self, selected: Sequence[Selected]) -> dict[int, float]:
        """Compute the densities of a selection without changing the policy.

        One microbatch also runs the backward pass, so that as much memory is used as in an update.

        Args:
            selected: the selection, the same on every rank.

        Returns:
            Mean |ratio - 1| over the trajectories, by the index of the trained step.
        """
        microbatches = list(self._microbatches(self._all_steps(self.ranks.share(selected))))
        drift, count = torch.zeros(2, self.policy.schedule.steps)
        with torch.no_grad():
            for m in microbatches:
                log_prob = self.policy.log_prob(m.step, m.x, m.next_latents, m.prompts)
                distance = ((log_prob - m.old).exp() - 1).abs()
                drift.index_add_(0, m.step.cpu(), distance.cpu())
                count.index_add_(0, m.step.cpu(), torch.ones(len(distance)))
        for m in microbatches[:1]:
            log_prob = self.policy.log_prob(m.step, m.x, m.next_latents, m.prompts)
            log_prob.sum().backward()
        self.optimizer.zero_grad(set_to_none=True)
        self.ranks.sum([drift, count])
        return {
            step: float(drift[step] / count[step]) for step in count.nonzero().flatten().tolist()
        }

    def _trained_steps(self, selected: Selected) -> list[int]:
        return trained_steps(selected.interval, self.trained)

    def _all_steps(self, selected: Sequence[Selected]) -> list[TrajectorySteps]:
        return [(s, SampledSteps.all_of(self._trained_steps(s))) for s in selected]

    def _sample_steps(
        self, units: Sequence[list[Selected]], stage: int, epoch: int
    ) -> list[TrainingUnit]:
        """Sample the steps that an epoch trains on, the same ones for all trajectories of a unit.

        A loss on pairs compares the same step of both trajectories.
        """
        random = generator(self.config.seed, Domain.STEPS, stage, epoch)
        sampled_units = []
        for unit in units:
            steps = self._trained_steps(unit[0])
            count = self.config.learner.drawn_steps(len(steps))
            sampled = draw(steps, [self.step_sizes[j] for j in steps], count, random)
            sampled_units.append([(s, sampled) for s in unit])
        return sampled_units

    def _units(self, selected: Sequence[Selected]) -> list[list[Selected]]:
        """Put trajectories together that have to be in the same batch.

        For a loss on pairs these are the best and the worst leaf of a group. With demonstrations
        they are a trajectory of the policy and a demonstration, so that every batch has as many of
        each. Otherwise every trajectory is a unit by itself.
        """
        demonstrated = bool(self.config.demonstrations.path)
        if not self.loss_function.pairs and not demonstrated:
            return [[s] for s in selected]
        pairs = [list(selected[j : j + 2]) for j in range(0, len(selected), 2)]
        if demonstrated:
            if any([s.advantage for s in pair] != [-1.0, 1.0] for pair in pairs):
                raise ValueError("after each trajectory of the policy's own comes a demonstration")
            return pairs
        if any(len({s.prompt for s in pair}) != 1 or len(pair) != 2 for pair in pairs):
            raise ValueError("the objective needs the best and the worst leaf of every group")
        return [sorted(pair, key=lambda s: -s.advantage) for pair in pairs]

    def _batches(
        self, units: Sequence[TrainingUnit], stage: int, epoch: int, count: int
    ) -> Iterator[list[TrainingUnit]]:
        """Split the units of an epoch into `count` batches of nearly equal size, at random.

        The first batch has units of this stage, because only on them the drift is measured.
        """
        random = generator(self.config.seed, Domain.ORDER, stage, epoch)
        own = [unit for unit in units if not unit[0][0].age]
        replayed = [unit for unit in units if unit[0][0].age]
        own_parts = np.array_split(random.permutation(len(own)), count)
        # Reversed, because the first parts of a split are the larger ones.
        replayed_parts = np.array_split(random.permutation(len(replayed)), count)[::-1]
        for a, b in zip(own_parts, replayed_parts, strict=True):
            yield [own[j] for j in sorted(a)] + [replayed[j] for j in sorted(b)]

    def _microbatches(self, share: Sequence[TrajectorySteps]) -> Iterator[Batch]:
        """Fetch a share of a batch and split its rows into UNet calls; an empty share has none."""
        size = self.config.learner.microbatch
        if self.loss_function.pairs:
            size = max(2, size - size % 2)
        if share:
            total = self.policy.schedule.steps
            batch = batch_of(share, total, self.step_weights, self.policy.device)
            yield from batch.slices(size)

    @torch.no_grad()
    def _rescored(self, selected: Sequence[Selected]) -> list[Selected]:
        """Recompute the densities of a selection with the learner's weights and batch shape.

        All trajectories have the same interval, because replayed ones are never re-scored.
        """
        batch, steps = self.config.learner.batch, self._trained_steps(selected[0])
        size = len(selected) if batch == "all" else batch
        log_probs = torch.zeros(len(selected), len(steps))
        for low in range(0, len(selected), size):
            share = self.ranks.share(range(low, min(low + size, len(selected))))
            parts = [
                self.policy.log_prob(m.step, m.x, m.next_latents, m.prompts)
                for m in self._microbatches(self._all_steps([selected[j] for j in share]))
            ]
            if parts:
                # The rows of a batch are ordered by step and then by trajectory.
                log_probs[list(share)] = torch.cat(parts).reshape(-1, len(share)).T.cpu()
        # One rank has the values of a trajectory, and the other ranks have zeros.
        self.ranks.sum([log_probs])
        positions = [j - self.policy.schedule.steps + selected[0].interval for j in steps]
        return [
            replace(s, fetch=partial(_with_log_probs, s.fetch, positions, row))
            for s, row in zip(selected, log_probs.numpy(), strict=True)
        ]

    def _optimizer_step(
        self,
        microbatches: Iterable[Batch],
        count: int,
        metrics: UpdateMetrics,
        fresh: Callable[[], bool] | None,
    ) -> None:
        """Take an optimizer step on a batch.

        Args:
            microbatches: this rank's share of the batch.
            count: number of rows that the batch represents, over all ranks.
            metrics: gets the figures of the step.
            fresh: as in `update` for the first batch, whose drift is measured; None for others.
        """
        # Forward and backward passes add up the gradients of this rank.
        self.optimizer.zero_grad(set_to_none=True)
        for m in microbatches:
            output = self.policy.predict(m.step, m.x, m.prompts)
            output.retain_grad()
            densities, kl = self._densities(m, output)
            loss, clipped = self.loss_function.loss(densities, self.config.objective, self.elements)
            loss = loss * m.weight
            if kl is not None:
                loss = loss + self.config.objective.kl_weight * kl
                metrics.add_kl(kl, m.scale)
            # Dividing the sum by the row count of the whole batch gives the mean over the batch,
            # however it is split into shares and microbatches.
            scaled_loss = (loss * m.scale).sum() / count * self.loss_scale
            with self.policy.clock:  # nearly all of the backward pass is the UNet's
                scaled_loss.backward()
            log_ratio = densities.log_prob.detach() - m.old
            metrics.add(m.step, log_ratio, clipped, None if fresh is None else m.own)
            if output.grad is not None:
                metrics.add_gradient(m.step, output.grad * (count / self.loss_scale))
        # The drift has to be checked before the weights change.
        if fresh is not None:
            metrics.share_drift()
            if fresh():
                self._check_drift(metrics)
        # All ranks sum their gradients and take the same step, or skip it if it is not finite.
        self._sum_gradients()
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
        metrics.step(norm)

    def _sum_gradients(self) -> None:
        """Sum the gradients over the ranks and undo the scaling of the loss."""
        if self.ranks.world > 1:  # a rank with an empty share has no gradients
            for parameter in self.parameters.values():
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        self.ranks.sum(gradients)
        if self.loss_scale != 1:
            for gradient in gradients:
                gradient /= self.loss_scale

    def _densities(
        self, batch: Batch, output: torch.Tensor
    ) -> tuple[Densities, torch.Tensor | None]:
        """Compute the densities of a batch from the policy's guided output for it.

        Returns:
            The densities, and the divergence of each row from the base model with gradients, shape
            (N,), or None if `objective.kl_weight` is 0.
        """
        schedule, weight = self.policy.schedule, self.config.objective.kl_weight
        log_prob = schedule.log_prob(batch.step, batch.x, output, batch.next_latents)
        if not weight and not self.loss_function.reference:
            return Densities(log_prob, batch.old, batch.advantage), None
        with torch.no_grad(), self.policy.reference():
            base = self.policy.predict(batch.step, batch.x, batch.prompts)
        reference = schedule.log_prob(batch.step, batch.x, base, batch.next_latents)
        kl = schedule.kl(batch.step, batch.x, output, base) if weight else None
        return Densities(log_prob, batch.old, batch.advantage, reference), kl

    def _check_drift(self, metrics: UpdateMetrics) -> None:
        """Raise an error if the ratio before the update is not 1, as the same weights make it."""
        clip = self.config.objective.clip_nats / self.elements
        allowed = self.config.learner.max_ratio_drift * clip
        if not metrics.drift_mean <= allowed:
            raise ValueError(
                f"before the update the mean |ratio - 1| is {metrics.drift_mean:.2e}, more than "
                f"learner.max_ratio_drift allows ({allowed:.2e}): set "
                "learner.recompute_log_probs=true if the samplers compute in low precision"
            )

    def optimizer_state(self) -> dict[str, np.ndarray]:
        """A copy of AdamW's moments and step counts as arrays by "parameter/entry"."""
        entries = {}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                entries[f"{name}/{key}"] = value.detach().cpu().numpy().copy()
        return entries

    def restore(self, weights: State, optimizer: State) -> str:
        """Restore the policy and the optimizer from a committed stage.

        Args:
            weights: the LoRA's values.
            optimizer: the result of `optimizer_state`.

        Returns:
            The digest of the policy's LoRA.
        """
        digest = self.policy.bind(weights)
        self.optimizer.state.clear()
        for key, value in optimizer.items():
            name, entry = key.rsplit("/", 1)
            parameter = self.parameters[name]
            tensor = torch.from_numpy(np.array(value))
            # AdamW keeps its step counts on the CPU.
            if entry != "step":
                tensor = tensor.to(parameter.device)
            self.optimizer.state[parameter][entry] = tensor
        return digest


def learning_rate(config: Config, stage: int) -> float:
    """The learning rate of a stage, which depends on the stage alone, also after resuming."""
    progress = stage / config.curriculum.stages
    return config.learner.lr * (1 - progress if config.learner.lr_schedule == "linear" else 1)


def _with_log_probs(
    fetch: Callable[[], Trajectory], positions: list[int], values: np.ndarray
) -> Trajectory:
    """Fetch a trajectory and replace its densities at these positions, counted from its fork."""
    trajectory = fetch()
    log_probs = trajectory.log_probs.copy()
    log_probs[positions] = values
    return replace(trajectory, log_probs=log_probs)
