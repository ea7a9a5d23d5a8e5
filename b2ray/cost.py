"""What a run will cost, counted from its configuration before anything starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from b2ray.config import Config
from b2ray.curriculum import interval

BACKWARD = 2  # a backward pass is about as much work as two forward passes
LATENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
VAE_SCALE = 8  # pixels of a picture per element of a latent, in Stable Diffusion's VAEs


@dataclass(frozen=True)
class Cost:
    """A run's work. UNet evaluations are guided ones of one latent, as `cost/unet_evals` counts.

    Learning is an upper bound: groups whose rewards tie, or whose leaves miss a threshold, train
    on fewer leaves, and what is replayed may be of stages with shorter intervals. With
    `selection.kind=all`, or the best and the worst without thresholds, and without replay, it is
    what a run reports, unless rewards tie.

    Attributes:
        reward_queries: pictures scored for training; none with demonstrations.
        unet_evals_sampling: prefixes and branches, and densities of demonstrations.
        unet_evals_learning: forward passes of the update, also those of the base model.
        unet_evals_evaluation: on fixed seeds; a run does not report them.
        unet_forwards: UNet calls on one latent that all of it is worth, backward passes included.
        bytes_per_stage: what the largest stage puts into Ray's object store: prefixes,
            trajectories and pictures of every leaf, and what is replayed. The files of
            demonstrations are not counted.
    """

    reward_queries: int
    unet_evals_sampling: int
    unet_evals_learning: int
    unet_evals_evaluation: int
    unet_forwards: int
    bytes_per_stage: int

    @property
    def unet_evals(self) -> int:
        """What a run reports as `cost/unet_evals` in its end."""
        return self.unet_evals_sampling + self.unet_evals_learning

    def hours(self, forward_tflop: float, sustained_tflops: float) -> float:
        """Time for the UNet alone; text encoders, VAE, rewards and waiting come on top.

        Args:
            forward_tflop: work of one UNet forward pass on one latent, in TFLOP.
            sustained_tflops: what all GPUs together really reach, in TFLOP per second.
        """
        return self.unet_forwards * forward_tflop / sustained_tflops / 3600


def plan_cost(
    config: Config,
    latent: tuple[int, int, int] | None = None,
    picture: tuple[int, int] | None = None,
    untrained: int = 0,
) -> Cost:
    """The cost of a whole run.

    Args:
        config: the run's configuration.
        latent: (C, H, W) of a latent; by default 4 channels and an eighth of the picture.
        picture: (height, width); by default the configured size, or 512 where it is empty.
        untrained: how many of the last steps are too narrow to train
            (`Schedule.trainable`); none with Stable Diffusion's own schedules.
    """
    stages, steps, learner = config.curriculum.stages, config.sampling.steps, config.learner
    groups, branches = config.groups, config.branching.branches
    images = groups * branches
    shown = groups if config.demonstrations.path else 0  # demonstrations of a stage
    leaves = images + shown if config.selection.kind == "all" else groups * min(2, branches)
    intervals = [_interval(config, stage) for stage in range(stages)]
    learnt = [n for stage in range(stages) for n in _learnt(config, leaves, intervals[: stage + 1])]
    trains = [config.objective.trains(step) for step in range(steps - untrained)]
    counts = [sum(trains[steps - n :]) for n in learnt]
    trained = sum(counts)
    sampling = sum(groups * (steps - n) + (images + shown) * n for n in intervals)
    rescoring = trained * learner.recompute_log_probs
    updating = sum(learner.drawn_steps(count) for count in counts) * learner.passes
    evaluation = _evaluated_pictures(config) * steps
    # Checkpointing computes the forward pass again on the way back.
    per_update = 1 + BACKWARD + config.model.gradient_checkpointing
    objective = config.objective
    reference = updating * (objective.kl_weight > 0 or objective.kind == "dpo")
    evals = sampling + rescoring + reference + evaluation + per_update * updating
    return Cost(
        reward_queries=0 if shown else stages * images,
        unet_evals_sampling=sampling,
        unet_evals_learning=rescoring + reference + updating,
        unet_evals_evaluation=evaluation,
        unet_forwards=evals * (2 if config.sampling.guidance > 1 else 1),
        bytes_per_stage=_stored(config, max(intervals), latent, picture),
    )


def _interval(config: Config, stage: int) -> int:
    """n of a stage; one that goes by the spread grows at the most every `patience` stages."""
    curriculum, (start, end) = config.curriculum, config.interval_bounds
    if curriculum.extend == "spread":
        return min(end, start + stage // curriculum.patience)
    return interval(stage, curriculum.stages, start, end, curriculum.growth)


def _learnt(config: Config, leaves: int, intervals: Sequence[int]) -> list[int]:
    """The interval of each leaf that the last of these stages trains on, at the most: the latest
    of those that may be replayed have the longest."""
    replay, (*earlier, n) = config.replay, intervals
    old = [m for m in earlier[::-1][: replay.stages] for _ in range(leaves)]
    return [n] * leaves + old[: replay.trajectories]


def _evaluated_pictures(config: Config) -> int:
    """Pictures on fixed seeds: every set before and after, the training prompts in between."""
    evaluation, stages = config.evaluation, config.curriculum.stages
    sets = 2 if config.prompts.heldout else 1
    between = (stages - 1) // evaluation.every if evaluation.every else 0
    whole = max(evaluation.final_images, evaluation.images)
    return 2 * sets * whole + between * evaluation.images


def _stored(
    config: Config,
    n: int,
    latent: tuple[int, int, int] | None,
    picture: tuple[int, int] | None,
) -> int:
    height, width = picture or (config.sampling.height or 512, config.sampling.width or 512)
    c, h, w = latent or (4, height // VAE_SCALE, width // VAE_SCALE)
    one = c * h * w * LATENT_BYTES[config.model.dtype]
    log_probs, pixels = 4 * n, 3 * height * width
    trajectory = (n + 1) * one + log_probs
    if config.demonstrations.path:  # nothing is decoded, and x_0 is float32
        return config.groups * (one + 4 * c * h * w + 2 * trajectory)
    kept = config.replay.trajectories * trajectory if config.replay.stages else 0
    leaf = trajectory + pixels
    return config.groups * (one + config.branching.branches * leaf) + kept
