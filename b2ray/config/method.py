"""The method: curriculum, branches, selection, advantage, objective and optimizer."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from b2ray.config.section import Positive, Section

StepKind = Literal["none", "inverse_gradient", "noise", "displacement"]
StepList = Annotated[tuple[Annotated[float, Field(ge=0)], ...], Field(min_length=1)]


class Curriculum(Section):
    """Backward progressive training: stage to interval."""

    stages: Positive = 100
    """How many stages the run has."""
    start: float | None = Field(None, gt=0)
    """The first interval: a number of steps, or below 1 a fraction of T; empty means all T."""
    end: float | None = Field(None, gt=0)
    """The last interval, likewise."""
    growth: float = Field(1.0, gt=0)
    """Exponent of the growth over the run: 1 is linear, more stays late for longer."""
    extend: Literal["calendar", "spread"] = "calendar"
    """When the interval grows: by the calendar, or by a step whenever the branches of a group have
    less than `min_share` of their prompt's variance in the mean of `patience` stages at one length
    (`branch/within_share`), measured once a prompt has had two groups in a stage and the
    `advantage.window` before it that drew the prompt."""
    min_share: float = Field(0.2, gt=0, lt=1)
    """See `extend`; `b2ray check --variance` measures the share for every length."""
    patience: Positive = 3
    """See `extend`."""


class Branching(Section):
    """Branch-based sampling: groups, forks and how they are cut into calls."""

    images: Positive = 1280
    """Final images (reward queries) per stage; as many whole groups as fit are sampled. With
    demonstrations half of them are the policy's own, and half are demonstrations."""
    branches: Positive = 5
    """K, the continuations that share one prefix."""
    unit_groups: Positive = 8
    """Groups per work unit: the prefix batch, and what is dispatched, retried and replayed."""
    branch_batch: Positive = 20
    """Branches per denoising call."""


class Prefix(Section):
    """Who samples the prefixes, and for how many stages they serve (docs/prefixes.md)."""

    policy: Literal["current", "base", "reuse"] = "current"
    """The stage's own policy, as in the paper; the base model, whose prefixes serve again in every
    later stage that draws their prompt; or reuse, the policy of an earlier stage, whose groups the
    next `stages` stages take up again. What serves again costs no denoising."""
    stages: Positive | None = None
    """For reuse: for how many stages after its own a prefix serves again, with its prompt."""

    def drawn(self, stage: int) -> int:
        """The stage that drew the groups of a stage: itself, unless it reuses an earlier one's."""
        return stage - stage % (1 + self.stages) if self.stages else stage


class Selection(Section):
    """Which leaves of a group are trained on."""

    kind: Literal["all", "best_worst"] = "best_worst"
    """Every leaf, or the best and the worst of each group."""
    best_above: float | None = None
    """Keep the best leaf only if its advantage is at least this."""
    worst_below: float | None = None
    """Keep the worst leaf only if its advantage is below this."""
    require_pair: bool = False
    """Train on a group only if both its best and its worst leaf are kept."""
    min_gap: float = Field(1e-6, ge=0)
    """Groups whose rewards spread by no more than this carry no signal and are skipped."""


class Advantage(Section):
    """How much better than expected a leaf is."""

    center: Literal["group", "prompt"] = "group"
    """Subtract the mean of the leaf's own group, or of its prompt's window."""
    scale: Literal["prompt", "group"] = "prompt"
    """Divide by the spread of the prompt's window, or of the leaf's own group (GRPO's): then every
    group counts the same, also one whose leaves hardly differ."""
    window: int = Field(8, ge=0)
    """Earlier stages whose rewards of the same prompt count in the mean and the spread."""
    min_count: int = Field(2, ge=2)
    """With fewer rewards of a prompt than this, the statistics of all prompts stand in."""
    clamp: float = Field(5.0, gt=0)
    """Largest absolute advantage."""


class Objective(Section):
    """What the update maximises."""

    kind: Literal["ppo", "policy_gradient", "dpo"] = "ppo"
    """PPO-clip (DDPO-IS, B²), the plain policy gradient (DDPO-SF; DPOK with a KL weight), or
    direct preference optimisation on the best and the worst leaf of each group (D3PO)."""
    clip_nats: float = Field(1.6384, gt=0)
    """Clip range in nats of a whole step's log-likelihood. Divided by the number of latent elements
    it is the usual range: 1.6384 is DDPO's 1e-4 on Stable Diffusion's 16 384 elements, and the
    same joint range on a model of any other size."""
    kl_weight: float = Field(0.0, ge=0)
    """Weight of the KL divergence from the base model, per latent element, as in DPOK (arXiv
    2305.16381): holds the policy near the base model, most of all where a step has little noise.
    Above 0 it costs one more forward pass in learning."""
    beta: float = Field(0.1, gt=0)
    """For dpo: how strongly a preference speaks, per nat of a whole step's log-likelihood; less
    lets the policy go further from the base model."""
    step_weights: StepKind | StepList = "none"
    """Weigh the steps of a trajectory alike (none); by the inverse of how strongly a step's density
    depends on the predicted noise: the last steps otherwise drown out the early ones; by that times
    how far a step's noise moves the picture (noise; as TempFlow-GRPO does, arXiv 2508.04324): a
    step decides what its noise can change; or by how far a step moves the latents (displacement).
    Or a list of T numbers, the first step's first: how much the gradients of each are to count
    (all 1: inverse_gradient); `b2ray check --variance` says which fit a model and its rewards. A
    step of weight 0 is not trained, unless kl_weight holds it."""

    @field_validator("step_weights", mode="before")
    @classmethod
    def _word(cls, value: object) -> object:
        # The command line makes a list of every value where one is allowed.
        if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str):
            return value[0]
        return value

    def trains(self, step: int) -> bool:
        """Whether a step is in the loss at all."""
        weights = self.step_weights
        return isinstance(weights, str) or self.kl_weight > 0 or weights[step] > 0


class Replay(Section):
    """Trajectories of earlier stages that are trained on again beside a stage's own: more learning
    from the same reward queries (arXiv 2607.07693)."""

    stages: int = Field(0, ge=0)
    """For how many stages after its own a trajectory may be trained on again; 0: for none."""
    trajectories: Positive = 64
    """How many a stage trains on again at most: of what the stage before it trained on, those with
    the largest |advantage|. They keep the advantages and densities of their own stage; PPO's ratio
    corrects their age."""


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
    passes: Positive = 2
    """Passes over a stage's selected trajectories."""
    batch: Positive | Literal["all"] = 128
    """Trajectories per optimizer step, in parts of nearly equal size; `all`: one step a pass."""
    timestep_fraction: float = Field(1.0, gt=0, le=1)
    """Share of a trajectory's trained steps that one pass is computed on: drawn anew for each
    trajectory, a step the more often the larger its gradient is, and weighed by 1 over its chance,
    so that the gradient's mean is that of all steps. Saves as much of the learner's work."""
    microbatch: Positive = 16
    """(Trajectory, step) rows per UNet call."""
    recompute_log_probs: bool = False
    """Compute the old log-probabilities again in the learner, at its batch shape, instead of using
    the sampler's; costs one more forward pass."""
    max_ratio_drift: float = Field(0.1, gt=0)
    """Largest mean |ratio - 1| before the first update, as a fraction of the clip range."""
    max_lag: int = Field(0, ge=0, le=1)
    """Versions that a trajectory may be behind the weights that learn from it; 1 lets the next
    stage's sampling overlap the update. What is replayed may be `replay.stages` further behind."""
    threads: Positive = 1
    """torch threads of the learner on a CPU; sums over more threads round differently."""
    ranks: Positive = 1
    """Processes that share every optimizer step's trajectories and add up their gradients; sums
    over more ranks round differently."""

    def drawn_steps(self, trained: int) -> int:
        """How many of a trajectory's trained steps a pass is computed on."""
        return min(trained, max(1, round(self.timestep_fraction * trained)))
