"""The method: curriculum, branches, selection, advantage and objective."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from b2ray.config.section import Positive, Section

if TYPE_CHECKING:
    from b2ray.config import Config

StepKind = Literal["none", "inverse_gradient", "noise", "displacement"]
StepList = Annotated[tuple[Annotated[float, Field(ge=0)], ...], Field(min_length=1)]


class Curriculum(Section):
    """Backward progressive training: how many of the last denoising steps each stage trains."""

    stages: Positive = 100
    """How many stages the run has."""
    start: float | None = Field(None, gt=0)
    """Length of the first interval: a number of steps, or below 1 a fraction of T; empty means all
    T."""
    end: float | None = Field(None, gt=0)
    """Length of the last interval, given in the same way."""
    growth: float = Field(1.0, gt=0)
    """Exponent of the growth over the run: 1 is linear; above 1 the interval stays short for
    longer."""
    extend: Literal["calendar", "spread"] = "calendar"
    """When the interval grows. `calendar`: with the number of the stage. `spread`: by one step
    whenever the branches of a group have less than `min_share` of the variance of their prompt's
    rewards (`branch/within_share`), on average over `patience` stages at one length. The share is
    measured as soon as a prompt has two groups in a stage and the `advantage.window` earlier stages
    that drew the prompt."""
    min_share: float = Field(0.2, gt=0, lt=1)
    """With `extend=spread`, the share of the variance below which the interval grows; `b2ray check
    --variance` measures the share for every length."""
    patience: Positive = 3
    """With `extend=spread`, how many stages the share is averaged over."""

    @model_validator(mode="after")
    def _whole_steps(self) -> Self:
        for field in ("start", "end"):
            steps = getattr(self, field)
            if steps is not None and steps >= 1 and steps != int(steps):
                raise ValueError(
                    f"curriculum.{field} is {steps}: give a whole number of steps, "
                    "or a fraction of T below 1"
                )
        return self


def curriculum_problem(config: Config) -> str | None:
    """Say why the curriculum does not fit the number of steps or the number of branches."""
    start, end = config.interval_bounds
    steps = config.sampling.steps
    if max(start, end) > steps:
        return (
            f"curriculum.start..end is {start}..{end} but sampling.steps is {steps}: "
            "an interval cannot be longer than T; lower it or raise sampling.steps"
        )
    if end < start:
        return f"curriculum.end ({end}) is below curriculum.start ({start}): swap them"
    if config.curriculum.extend == "spread" and config.branching.branches < 2:
        return (
            "curriculum.extend is spread but branching.branches is 1: without branches there "
            "is no spread to go by; use at least 2, or curriculum.extend=calendar"
        )
    return None


class Branching(Section):
    """Branch-based sampling: how many groups and branches there are, and how they are divided into
    calls."""

    images: Positive = 1280
    """Final images (reward queries) per stage; as many whole groups as fit are sampled. With
    demonstrations half of them are the policy's own, and half are demonstrations."""
    branches: Positive = 5
    """K, the continuations that share one prefix."""
    unit_groups: Positive = 8
    """Groups per work unit: their prefixes are one batch, which is dispatched and retried as a
    whole."""
    branch_batch: Positive = 20
    """Branches per denoising call."""


def branching_problem(config: Config) -> str | None:
    """Say why the number of branches does not fit the pictures of a stage or the advantage."""
    if config.branching.branches > config.branching.images:
        return (
            f"branching.branches is {config.branching.branches} but branching.images is "
            f"{config.branching.images}: not one group fits; raise images"
        )
    comparison = (
        "advantage.center=group"
        if config.advantage.center == "group"
        else "selection.kind=best_worst with require_pair"
        if config.selection.kind == "best_worst" and config.selection.require_pair
        else None
    )
    if config.branching.branches < 2 and comparison:
        return (
            f"branching.branches is {config.branching.branches} but {comparison} compares the "
            "branches of one group: use at least 2, or --preset=ddpo"
        )
    return None


class Selection(Section):
    """Which leaves of a group are trained on."""

    kind: Literal["all", "best_worst"] = "best_worst"
    """Train on every leaf, or on the best and the worst leaf of each group."""
    best_above: float | None = None
    """Keep the best leaf only if its advantage is at least this."""
    worst_below: float | None = None
    """Keep the worst leaf only if its advantage is below this."""
    require_pair: bool = False
    """Train on a group only if both its best and its worst leaf are kept."""
    min_gap: float = Field(1e-6, ge=0)
    """Groups whose best and worst rewards differ by no more than this are skipped: they carry no
    signal."""


def selection_problem(config: Config) -> str | None:
    """Say why the thresholds of the selection contradict each other."""
    best, worst = config.selection.best_above, config.selection.worst_below
    if best is not None and worst is not None and worst > best:
        return (
            f"selection.worst_below ({worst}) is above selection.best_above ({best}): "
            "the thresholds overlap; make worst_below the smaller one"
        )
    return None


class Advantage(Section):
    """How the advantage is computed: how much better a leaf is than expected."""

    center: Literal["group", "prompt"] = "group"
    """Subtract the mean of the leaf's own group, or of its prompt's window."""
    scale: Literal["prompt", "group"] = "prompt"
    """Divide by the standard deviation of the prompt's window, or by that of the leaf's own group,
    as GRPO does: then every group counts the same, even one whose leaves hardly differ."""
    window: int = Field(8, ge=0)
    """How many earlier stages of the same prompt count in the mean and the standard deviation."""
    min_count: int = Field(2, ge=2)
    """If a prompt has fewer rewards than this, the statistics of all prompts are used instead."""
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
    2305.16381). It holds the policy near the base model, most of all where a step has little noise.
    Above 0 it costs one more forward pass in learning."""
    beta: float = Field(0.1, gt=0)
    """For dpo: how much a preference weighs per nat of a whole step's log-likelihood; less lets the
    policy move further from the base model."""
    step_weights: StepKind | StepList = "none"
    """How the steps of a trajectory are weighted. `none`: all alike. `inverse_gradient`: by the
    inverse of how strongly a step's density depends on the predicted noise, as the last steps
    otherwise dominate the early ones. `noise`: by that, times how far a step's noise moves the
    picture, as TempFlow-GRPO does (arXiv 2508.04324). `displacement`: by how far a step moves the
    latents. A list of T numbers, beginning with the first step: how much the gradients of each step
    count (all 1 is inverse_gradient); `b2ray check --variance` says which numbers fit a model and
    its rewards. A step of weight 0 is not trained, unless kl_weight is above 0."""

    @field_validator("step_weights", mode="before")
    @classmethod
    def _word(cls, value: object) -> object:
        # The command line makes a list of every value where one is allowed.
        if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str):
            return value[0]
        return value

    def trains(self, step: int) -> bool:
        """Whether a step contributes to the loss.

        Args:
            step: its number, from 0 to T - 1.
        """
        weights = self.step_weights
        return isinstance(weights, str) or self.kl_weight > 0 or weights[step] > 0


def step_weights_problem(config: Config) -> str | None:
    """Say why a list of step weights does not fit the steps that are trained."""
    weights, steps = config.objective.step_weights, config.sampling.steps
    if isinstance(weights, str):
        return None
    if len(weights) != steps:
        return (
            f"objective.step_weights has {len(weights)} numbers but sampling.steps is {steps}: "
            "give one for each step, or inverse_gradient"
        )
    interval, _ = config.interval_bounds
    if not any(weights[steps - interval :]):
        return (
            f"objective.step_weights is 0 in all of the last {interval} steps, which are "
            "the first interval: nothing would be trained; make one larger, or raise "
            "curriculum.start"
        )
    return None


def preference_problem(config: Config) -> str | None:
    """Say why the selection yields no pairs for an objective that learns from preferences."""
    if config.objective.kind != "dpo":
        return None
    selects_pairs = config.selection.kind == "best_worst" and config.selection.require_pair
    if selects_pairs and config.advantage.center == "group":
        return None
    return (
        "objective.kind is dpo, which learns from the best and the worst leaf of a group: set "
        "selection.kind=best_worst, selection.require_pair=true and advantage.center=group, "
        "or use --preset=d3po"
    )
