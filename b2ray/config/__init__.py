"""What a run is: frozen pydantic models, each field explained beneath itself.

The docstrings are the help of the command line. This module imports neither torch nor ray, so that
a wrong configuration is refused before anything heavy starts. How files, presets and the command
line become a `Config` is in `options.py`.
"""

from __future__ import annotations

import math
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from b2ray.config.fleet import Fleet, LearnerWorker, Samplers, Tracking
from b2ray.config.method import (
    Advantage,
    Branching,
    Curriculum,
    Learner,
    Objective,
    Prefix,
    Replay,
    Selection,
)
from b2ray.config.model import Lora, Model, Prompts, Sampling
from b2ray.config.rewards import (
    Demonstrations,
    Evaluation,
    Reward,
    RewardWorkers,
    Workers,
)
from b2ray.config.section import Name, Positive, Section
from b2ray.discretion import first_secret

__all__ = [
    "SUMMARY_WORDS",
    "Advantage",
    "Branching",
    "Config",
    "Curriculum",
    "Demonstrations",
    "Evaluation",
    "Fleet",
    "Learner",
    "LearnerWorker",
    "Lora",
    "Model",
    "Objective",
    "Prefix",
    "Prompts",
    "Replay",
    "Reward",
    "RewardWorkers",
    "Samplers",
    "Sampling",
    "Section",
    "Selection",
    "Tracking",
    "Workers",
]

Preset = Literal[
    "b2", "b2_released", "bpt_only", "bs_only", "ddpo", "ddpo_sf", "dpok", "d3po", "grpo", "sqil"
]
# summary.json has one entry per held-out reward, beside these.
SUMMARY_WORDS = (
    *("name", "seed", "stages", "reward", "diversity", "reward_queries"),
    *("unet_evals", "seconds", "files", "evaluations"),
)


class Config(BaseSettings):
    """Fine-tune a text-to-image diffusion model against a reward with B²-DiffuRL, on Ray."""

    model_config = SettingsConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    name: Name = "run"
    """The run's name: everything it writes is in runs/NAME."""
    runs: str = Field("runs", pattern=r"^[^\x00]+$")
    """Folder of all runs. In a Ray job with --working-dir a relative one is under $B2RAY_HOME, else
    under the home folder on the head node."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of everything random."""
    cpu_threads: Positive = 1
    """torch threads of each sampler and scorer on a CPU."""
    preset: Preset = "b2"
    """Method of the paper's table: curriculum, branches, selection, advantage and clip range."""
    model: Model = Model()
    prompts: Prompts = Prompts()
    sampling: Sampling = Sampling()
    curriculum: Curriculum = Curriculum()
    branching: Branching = Branching()
    prefix: Prefix = Prefix()
    selection: Selection = Selection()
    advantage: Advantage = Advantage()
    objective: Objective = Objective()
    replay: Replay = Replay()
    learner: Learner = Learner()
    rewards: tuple[Reward, ...] = ()
    """What is trained on: a list of {name, kind, path, weight, …}; on the command line as JSON."""
    demonstrations: Demonstrations = Demonstrations()
    evaluation: Evaluation = Evaluation()
    fleet: Fleet = Fleet()
    tracking: Tracking = Tracking()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        # Environment variables such as NAME or SEED must not reach into a run.
        return (init_settings,)

    @field_validator("curriculum")
    @classmethod
    def _whole_steps(cls, value: Curriculum) -> Curriculum:
        for field in ("start", "end"):
            steps = getattr(value, field)
            if steps is not None and steps >= 1 and steps != int(steps):
                raise ValueError(
                    f"curriculum.{field} is {steps}: give a whole number of steps, "
                    "or a fraction of T below 1"
                )
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for problem in (
            self._source_problem(),
            self._interval_problem(),
            self._prefix_problem(),
            self._signal_problem(),
            self._weights_problem(),
            self._selection_problem(),
            self._pairs_problem(),
            self._learner_problem(),
            self._replay_problem(),
            self.name_problem(),
            self._secret_problem(),
        ):
            if problem:
                raise ValueError(problem)
        return self

    def _source_problem(self) -> str | None:
        """Rewards with prompts, or demonstrations: what there is to learn from."""
        if self.demonstrations.path is None:
            if self.prompts.train is None:
                return "prompts.train is missing: set it in the file or with --prompts.train=…"
            if not self.rewards:
                return (
                    "rewards is empty: give at least 1 in the file or with --rewards=…, or a "
                    "folder of pictures to learn from with --demonstrations.path=…"
                )
            return None
        given = f"but demonstrations.path is {self.demonstrations.path!r}"
        if self.rewards:
            return (
                f"rewards has {len(self.rewards)} {given}, whose pictures are learnt from instead: "
                "move them to evaluation.heldout_rewards, where they are measured"
            )
        if self.branching.branches != 1:
            return (
                f"branching.branches is {self.branching.branches} {given}: without rewards there "
                "is nothing to compare branches by; use 1, or --preset=sqil"
            )
        if self.selection.kind != "all":
            return (
                f"selection.kind is {self.selection.kind} {given}: every trajectory is trained "
                "on; use all, or --preset=sqil"
            )
        if self.branching.images < 2:
            return f"branching.images is 1 {given}: half of them are; use at least 2"
        return None

    def _interval_problem(self) -> str | None:
        start, end = self.interval_bounds
        steps = self.sampling.steps
        if max(start, end) > steps:
            return (
                f"curriculum.start..end is {start}..{end} but sampling.steps is {steps}: "
                "an interval cannot be longer than T; lower it or raise sampling.steps"
            )
        if end < start:
            return f"curriculum.end ({end}) is below curriculum.start ({start}): swap them"
        if self.curriculum.extend == "spread" and self.branching.branches < 2:
            return (
                "curriculum.extend is spread but branching.branches is 1: without branches there "
                "is no spread to go by; use at least 2, or curriculum.extend=calendar"
            )
        return None

    def _prefix_problem(self) -> str | None:
        policy, stages = self.prefix.policy, self.prefix.stages
        if policy == "reuse" and stages is None:
            return (
                "prefix.stages is missing but prefix.policy is reuse: say for how many stages "
                "after its own a prefix serves again, such as --prefix.stages=15"
            )
        if policy != "reuse" and stages is not None:
            return (
                f"prefix.stages is {stages} but prefix.policy is {policy}, which has no such "
                "limit: leave it out, or use prefix.policy=reuse"
            )
        if policy == "current":
            return None
        if self.demonstrations.path:
            return (
                f"prefix.policy is {policy} but demonstrations.path is "
                f"{self.demonstrations.path!r}: half of the trajectories are the current policy's "
                "own from the first step on there; use prefix.policy=current"
            )
        if self.interval_bounds[0] == self.sampling.steps:
            return (
                f"prefix.policy is {policy} but curriculum.start is all of the "
                f"{self.sampling.steps} steps: there is no prefix; lower curriculum.start, or use "
                "prefix.policy=current"
            )
        return None

    def _signal_problem(self) -> str | None:
        if self.sampling.eta == 0:
            return "sampling.eta is 0: the steps have no density to train; use up to 1.0"
        if self.branching.branches > self.branching.images:
            return (
                f"branching.branches is {self.branching.branches} but branching.images is "
                f"{self.branching.images}: not one group fits; raise images"
            )
        needs = (
            "advantage.center=group"
            if self.advantage.center == "group"
            else "selection.kind=best_worst with require_pair"
            if self.selection.kind == "best_worst" and self.selection.require_pair
            else None
        )
        if self.branching.branches < 2 and needs:
            return (
                f"branching.branches is {self.branching.branches} but {needs} compares the "
                "branches of one group: use at least 2, or --preset=ddpo"
            )
        return None

    def _weights_problem(self) -> str | None:
        weights, steps = self.objective.step_weights, self.sampling.steps
        if isinstance(weights, str):
            return None
        if len(weights) != steps:
            return (
                f"objective.step_weights has {len(weights)} numbers but sampling.steps is {steps}: "
                "give one for each step, or inverse_gradient"
            )
        first = steps - self.interval_bounds[0]
        if not any(weights[first:]):
            return (
                f"objective.step_weights is 0 in all of the last {steps - first} steps, which are "
                "the first interval: nothing would be trained; make one larger, or raise "
                "curriculum.start"
            )
        return None

    def _selection_problem(self) -> str | None:
        best, worst = self.selection.best_above, self.selection.worst_below
        if best is not None and worst is not None and worst > best:
            return (
                f"selection.worst_below ({worst}) is above selection.best_above ({best}): "
                "the thresholds overlap; make worst_below the smaller one"
            )
        return None

    def _pairs_problem(self) -> str | None:
        if self.objective.kind != "dpo":
            return None
        pairs = self.selection.kind == "best_worst" and self.selection.require_pair
        if pairs and self.advantage.center == "group":
            return None
        return (
            "objective.kind is dpo, which learns from the best and the worst leaf of a group: set "
            "selection.kind=best_worst, selection.require_pair=true and advantage.center=group, "
            "or use --preset=d3po"
        )

    def _learner_problem(self) -> str | None:
        if self.learner.max_lag and self.learner.recompute_log_probs:
            return (
                f"learner.max_lag is {self.learner.max_lag} and learner.recompute_log_probs is "
                "true: recomputing would take the learner's weights for the older ones that "
                "sampled; set learner.recompute_log_probs=false, or learner.max_lag=0"
            )
        if self.learner.ranks > 1 and self.fleet.learner.cpus == self.fleet.learner.gpus == 0:
            return (
                f"learner.ranks is {self.learner.ranks} but fleet.learner.cpus and .gpus are 0: "
                "ranks are placed together by what they ask for; set one"
            )
        return None

    def _replay_problem(self) -> str | None:
        replay, kind = self.replay, self.objective.kind
        if not replay.stages:
            return None
        if self.demonstrations.path:
            return (
                f"replay.stages is {replay.stages} but demonstrations.path is "
                f"{self.demonstrations.path!r}: every trajectory counts 1 or 0 there, none more "
                "than another; set replay.stages=0"
            )
        if self.learner.recompute_log_probs:
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

    def name_problem(self) -> str | None:
        """What is wrong with the names of rewards, if anything."""
        names = [r.name for r in self.all_rewards]
        twice = next((n for n in names if names.count(n) > 1), None)
        if twice:
            return f"reward name {twice!r} is used twice: names must differ in logs"
        # The summary has one entry per held-out reward beside these.
        taken = {"mean", "pairwise", "vendi", "step", *SUMMARY_WORDS}
        clash = next((n for n in names if n in taken), None)
        return f"reward name {clash!r} is a word of the summary: choose another" if clash else None

    def _secret_problem(self) -> str | None:
        field = first_secret(self.model_dump(mode="json"))
        if field is None:
            return None
        return (
            f"{field} holds a password or token, which would be written to config.yaml: leave it "
            "out and set it in the environment (docs/security.md says how)"
        )

    @property
    def all_rewards(self) -> tuple[Reward, ...]:
        """The rewards that are trained on, then those that are only measured."""
        return (*self.rewards, *self.evaluation.heldout_rewards)

    @property
    def groups(self) -> int:
        """Groups per stage that the policy draws."""
        if self.demonstrations.path:
            return self.branching.images // 2
        return self.branching.images // self.branching.branches

    @property
    def interval_bounds(self) -> tuple[int, int]:
        """First and last interval in steps."""
        steps = self.sampling.steps

        def whole(value: float | None) -> int:
            if value is None:
                return steps
            return max(1, math.floor(value * steps + 0.5)) if value < 1 else int(value)

        return whole(self.curriculum.start), whole(self.curriculum.end)

    def identity(self) -> dict[str, object]:
        """What decides the result: everything but names, places, the fleet and tracking."""
        values = self.model_dump(mode="json", exclude={"name", "runs", "fleet", "tracking"})
        for reward in (*values["rewards"], *values["evaluation"]["heldout_rewards"]):
            del reward["workers"]
        return values
