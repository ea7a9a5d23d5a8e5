"""The cost of a run, counted from its configuration before anything starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from b2ray.algorithm.curriculum import longest
from b2ray.config import Config

BACKWARD = 2  # a backward pass is about as much work as two forward passes
LATENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
VAE_SCALE = 8  # pixels of a picture per element of a latent, in Stable Diffusion's VAEs


@dataclass(frozen=True)
class Cost:
    """The work of a run. A UNet evaluation is of one latent with guidance, as in `cost/unet_evals`.

    The numbers for learning are upper bounds: fewer leaves are trained on if rewards are equal or
    below a threshold, and replayed trajectories may be of stages with shorter intervals. They are
    what a run reports if all leaves, or the best and the worst without thresholds, are trained on,
    without replay, and no rewards are equal.

    Attributes:
        reward_queries: pictures scored for training; none with demonstrations.
        unet_evals_sampling: evaluations for prefixes, branches and densities of demonstrations.
        unet_evals_learning: forward passes of the updates, including those of the base model.
        unet_evals_evaluation: evaluations for pictures on fixed seeds; a run does not report them.
        unet_forwards: all of this work in UNet calls on one latent, including backward passes.
        bytes_per_stage: bytes that the largest stage puts into Ray's object store: prefixes,
            trajectories and pictures of every leaf, and replayed trajectories. The files of
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
        """What a run reports as `cost/unet_evals` at its end."""
        return self.unet_evals_sampling + self.unet_evals_learning

    def hours(self, forward_tflop: float, sustained_tflops: float) -> float:
        """Hours for the UNet alone; text encoders, VAE, rewards and waiting come on top.

        Args:
            forward_tflop: work of one UNet forward pass on one latent, in TFLOP.
            sustained_tflops: speed that all GPUs together really reach, in TFLOP per second.
        """
        return self.unet_forwards * forward_tflop / sustained_tflops / 3600


def plan_cost(
    config: Config,
    latent: tuple[int, int, int] | None = None,
    picture: tuple[int, int] | None = None,
    untrained: int = 0,
) -> Cost:
    """Count the cost of a whole run.

    Args:
        config: the run's configuration.
        latent: (C, H, W) of a latent; by default 4 channels and an eighth of the picture.
        picture: (height, width) in pixels; by default the configured size, or 512 where it is
            empty.
        untrained: how many of the last steps have too little noise to be trained
            (`Schedule.trainable`); none with Stable Diffusion's own schedules.
    """
    # The numbers of a stage.
    stages, steps, learner = config.curriculum.stages, config.sampling.steps, config.learner
    groups, branches = config.groups, config.branching.branches
    images = groups * branches
    demonstrations = groups if config.demonstrations.path else 0
    all_leaves = images + demonstrations
    leaves = all_leaves if config.selection.kind == "all" else groups * min(2, branches)
    intervals = [longest(config, stage) for stage in range(stages)]

    # The interval of every trajectory that is trained on, and how many of its steps are.
    trained_intervals = [
        n for stage in range(stages) for n in _trained(config, leaves, intervals[: stage + 1])
    ]
    trains = [config.objective.trains(step) for step in range(steps - untrained)]
    counts = [sum(trains[steps - n :]) for n in trained_intervals]

    # UNet evaluations of every kind.
    sampling = sum(groups * (steps - n) + all_leaves * n for n in intervals)
    rescoring = sum(counts) * learner.recompute_log_probs
    updating = sum(learner.drawn_steps(count) for count in counts) * learner.inner_epochs
    evaluation = _evaluated_pictures(config) * steps
    # Gradient checkpointing computes the forward pass once more in the backward pass.
    per_update = 1 + BACKWARD + config.model.gradient_checkpointing
    objective = config.objective
    reference = updating * (objective.kl_weight > 0 or objective.kind == "dpo")
    evals = sampling + rescoring + reference + evaluation + per_update * updating
    return Cost(
        reward_queries=0 if demonstrations else stages * images,
        unet_evals_sampling=sampling,
        unet_evals_learning=rescoring + reference + updating,
        unet_evals_evaluation=evaluation,
        unet_forwards=evals * (2 if config.sampling.guidance > 1 else 1),
        bytes_per_stage=_stored(config, intervals, latent, picture),
    )


def _trained(config: Config, leaves: int, intervals: Sequence[int]) -> list[int]:
    """The interval of each trajectory that a stage trains on, at the most.

    The latest trajectories that may be replayed have the longest intervals.

    Args:
        config: the run's configuration.
        leaves: the most leaves that a stage selects.
        intervals: of this stage and all before it, this stage's last.
    """
    replay, (*earlier, n) = config.replay, intervals
    replayable = [m for m in earlier[::-1][: replay.stages] for _ in range(leaves)]
    return [n] * leaves + replayable[: replay.trajectories]


def _evaluated_pictures(config: Config) -> int:
    """How many pictures a run evaluates.

    Both prompt sets are evaluated before and after the run, and the training prompts during it.
    """
    evaluation, stages = config.evaluation, config.curriculum.stages
    sets = 2 if config.prompts.heldout else 1
    during = (stages - 1) // evaluation.every if evaluation.every else 0
    final_images = max(evaluation.final_images, evaluation.images)
    return 2 * sets * final_images + during * evaluation.images


def _stored(
    config: Config,
    intervals: Sequence[int],
    latent: tuple[int, int, int] | None,
    picture: tuple[int, int] | None,
) -> int:
    """The bytes of `Cost.bytes_per_stage`."""
    n = max(intervals)
    height, width = picture or (config.sampling.height or 512, config.sampling.width or 512)
    c, h, w = latent or (4, height // VAE_SCALE, width // VAE_SCALE)
    latent_bytes = c * h * w * LATENT_BYTES[config.model.dtype]
    log_probs, pixels = 4 * n, 3 * height * width
    trajectory = (n + 1) * latent_bytes + log_probs
    if config.demonstrations.path:  # nothing is decoded, and x_0 is float32
        return config.groups * (latent_bytes + 4 * c * h * w + 2 * trajectory)
    replayed = config.replay.trajectories * trajectory if config.replay.stages else 0
    leaf = trajectory + pixels
    return config.groups * (latent_bytes + config.branching.branches * leaf) + replayed
