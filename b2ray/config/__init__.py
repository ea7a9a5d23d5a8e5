"""The configuration of a run: frozen pydantic models, with a docstring beneath each field.

The docstrings are also the help of the command line. This package imports neither torch nor ray, so
that a wrong configuration is refused before anything heavy starts. How files, presets and the
command line become a `Config` is in `load.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, Self

from pydantic import Field, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from b2ray.config.fleet import Fleet, LearnerWorker, Samplers, Tracking
from b2ray.config.learning import Learner, Replay, learner_problem, replay_problem
from b2ray.config.method import (
    Advantage,
    Branching,
    Curriculum,
    Objective,
    Selection,
    branching_problem,
    curriculum_problem,
    preference_problem,
    selection_problem,
    step_weights_problem,
)
from b2ray.config.model import Lora, Model, Prompts, Sampling, sampling_problem
from b2ray.config.rewards import (
    DIVERSITY,
    SUMMARY_WORDS,
    Demonstrations,
    Evaluation,
    Reward,
    RewardWorkers,
    Workers,
    name_problem,
    source_problem,
)
from b2ray.config.secrets import secret_problem
from b2ray.config.section import Name, Positive, Section

__all__ = [
    "DIVERSITY",
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
# Checks of fields that must fit each other. Each is defined beside the section that it is mostly
# about. The user sees the first problem, so the order matters.
_PROBLEMS: tuple[Callable[[Config], str | None], ...] = (
    source_problem,
    curriculum_problem,
    sampling_problem,
    branching_problem,
    step_weights_problem,
    selection_problem,
    preference_problem,
    learner_problem,
    replay_problem,
    name_problem,
    secret_problem,
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
    selection: Selection = Selection()
    advantage: Advantage = Advantage()
    objective: Objective = Objective()
    replay: Replay = Replay()
    learner: Learner = Learner()
    rewards: tuple[Reward, ...] = ()
    """The trained rewards: a list of {name, kind, path, weight, …}; on the command line as JSON."""
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

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for check in _PROBLEMS:
            problem = check(self)
            if problem:
                raise ValueError(problem)
        return self

    @property
    def all_rewards(self) -> tuple[Reward, ...]:
        """The rewards that are trained on, followed by those that are only measured."""
        return (*self.rewards, *self.evaluation.heldout_rewards)

    @property
    def groups(self) -> int:
        """How many groups the policy samples in each stage."""
        if self.demonstrations.path:
            return self.branching.images // 2
        return self.branching.images // self.branching.branches

    @property
    def interval_bounds(self) -> tuple[int, int]:
        """The lengths of the first and of the last interval, in denoising steps."""
        steps = self.sampling.steps

        def in_steps(value: float | None) -> int:
            if value is None:
                return steps
            return max(1, math.floor(value * steps + 0.5)) if value < 1 else int(value)

        return in_steps(self.curriculum.start), in_steps(self.curriculum.end)

    def identity(self) -> dict[str, object]:
        """The values that decide the result of a run, nested like the sections.

        Names and folders, the fleet, the workers of rewards, and tracking are left out.
        """
        values = self.model_dump(mode="json", exclude={"name", "runs", "fleet", "tracking"})
        for reward in (*values["rewards"], *values["evaluation"]["heldout_rewards"]):
            del reward["workers"]
        return values
