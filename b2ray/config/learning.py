"""The update: the replay of earlier trajectories, and the optimizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from b2ray.config.section import Positive, Section

if TYPE_CHECKING:
    from b2ray.config import Config


class Replay(Section):
    """Training again on trajectories of earlier stages, beside a stage's own: more learning from
    the same reward queries (arXiv 2607.07693)."""

    stages: int = Field(0, ge=0)
    """For how many stages after its own a trajectory may be replayed; 0: no replay."""
    trajectories: Positive = 64
    """The most trajectories that a stage replays: of those that the stage before it trained on, the
    ones with the largest |advantage|. They keep the advantages and densities of their own stage;
    PPO's ratio corrects their age."""


def replay_problem(config: Config) -> str | None:
    """Say which other setting rules out replay."""
    replay, kind = config.replay, config.objective.kind
    if not replay.stages:
        return None
    if config.demonstrations.path:
        return (
            f"replay.stages is {replay.stages} but demonstrations.path is "
            f"{config.demonstrations.path!r}: every trajectory counts 1 or 0 there, none more "
            "than another; set replay.stages=0"
        )
    if config.learner.recompute_log_probs:
        return (
            f"replay.stages is {replay.stages} and learner.recompute_log_probs is true: "
            "recomputing would take the learner's weights for the older ones that sampled; set "
            "learner.recompute_log_probs=false, or replay.stages=0"
        )
    if kind == "policy_gradient":
        return (
            f"replay.stages is {replay.stages} but objective.kind is policy_gradient, which "
            "has no ratio to correct the age of what is replayed: use objective.kind=ppo, or "
            "replay.stages=0"
        )
    if kind == "dpo" and replay.trajectories < 2:
        return (
            f"replay.trajectories is {replay.trajectories} but objective.kind is dpo, which "
            "learns from pairs: use at least 2, or replay.stages=0"
        )
    return None


class Learner(Section):
    """The optimizer."""

    lr: float = Field(1e-4, gt=0)
    """Learning rate of AdamW."""
    lr_schedule: Literal["constant", "linear"] = "constant"
    """Keep the rate, or let it fall in a straight line from stage to stage, to 0 after the last."""
    weight_decay: float = Field(1e-4, ge=0)
    """Decoupled weight decay."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are scaled down to this norm."""
    inner_epochs: Positive = 2
    """Passes over a stage's selected trajectories."""
    batch: Positive | Literal["all"] = 128
    """Trajectories per optimizer step, in parts of nearly equal size; `all`: one step per pass."""
    timestep_fraction: float = Field(1.0, gt=0, le=1)
    """Share of a trajectory's trained steps that one pass is computed on, which saves as much of
    the learner's work. The steps are drawn anew for each trajectory, those with large gradients
    more often, and weighted by 1 / probability, so that the gradient's mean is that of all
    steps."""
    microbatch: Positive = 16
    """(Trajectory, step) rows per UNet call."""
    recompute_log_probs: bool = False
    """Compute the old log-probabilities again in the learner, at its batch shape, instead of using
    the sampler's; costs one more forward pass."""
    max_ratio_drift: float = Field(0.1, gt=0)
    """Largest mean |ratio - 1| before the first update, as a fraction of the clip range."""
    max_lag: int = Field(0, ge=0, le=1)
    """Versions that a trajectory may be behind the weights that learn from it; 1 lets the next
    stage's sampling overlap the update. Replayed trajectories may be `replay.stages` further
    behind."""
    threads: Positive = 1
    """torch threads of the learner on a CPU; sums over more threads round differently."""
    ranks: Positive = 1
    """Processes that share every optimizer step's trajectories and add up their gradients; sums
    over more ranks round differently."""

    def drawn_steps(self, trained: int) -> int:
        """How many steps of a trajectory one pass is computed on.

        Args:
            trained: how many steps of the trajectory are trained.
        """
        return min(trained, max(1, round(self.timestep_fraction * trained)))


def learner_problem(config: Config) -> str | None:
    """Say why the learner can have neither this lag nor these ranks."""
    if config.learner.max_lag and config.learner.recompute_log_probs:
        return (
            f"learner.max_lag is {config.learner.max_lag} and learner.recompute_log_probs is "
            "true: recomputing would take the learner's weights for the older ones that "
            "sampled; set learner.recompute_log_probs=false, or learner.max_lag=0"
        )
    if config.learner.ranks > 1 and config.fleet.learner.cpus == config.fleet.learner.gpus == 0:
        return (
            f"learner.ranks is {config.learner.ranks} but fleet.learner.cpus and .gpus are 0: "
            "ranks are placed together by what they ask for; set one"
        )
    return None
