"""What is measured: settings of a run, and the work of one of its stages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import MappingProxyType

from b2ray.config import Config
from b2ray.config.load import parse

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"


@dataclass(frozen=True)
class Workload:
    """Settings that are measured.

    Attributes:
        rivals: who does the same, beside b2ray and its floor: `released`, `peer`.
        fields: over the quickstart's, as on the command line.
    """

    name: str
    rivals: tuple[str, ...]
    fields: Mapping[str, object]

    def command(self, layout: Mapping[str, object]) -> list[str]:
        """Words of `python -m b2ray.run`; evaluations are as small as they can be."""
        whole = {**LEAST, **self.fields, **layout}
        return [f"--config={QUICKSTART}", *(f"--{k}={v}" for k, v in whole.items())]

    def config(self, layout: Mapping[str, object] = MappingProxyType({})) -> Config:
        """The run's configuration."""
        return parse(self.command(layout)).config


LEAST = {
    "evaluation.every": 0,
    "evaluation.images": 2,
    "evaluation.final_images": 2,
    "evaluation.previews": 0,
    "evaluation.heldout_rewards": "[]",
}


def layout(cores: int) -> dict[str, object]:
    """A sampler, a scorer and a rank of the learner for every core, of one thread each."""
    return {
        "fleet.scorers.count": cores,
        "fleet.samplers.min": cores,
        "fleet.samplers.max": cores,
        "learner.ranks": cores,
        "learner.threads": 1,
        "cpu_threads": 1,
    }


PLAIN = {
    "objective.step_weights": "none",
    "objective.kl_weight": 0,
    "learner.timestep_fraction": 1,
    "model.lora.rank": 4,
    "model.lora.alpha": 4,
}
WORKLOADS = (
    # As the demo is: configs/quickstart.yaml.
    Workload("quickstart", (), {}),
    # Twice its pictures in calls twice as large: two cores have one branch call each in both.
    Workload(
        "128 pictures, calls of 64",
        (),
        {
            **{"branching.images": 128, "branching.unit_groups": 8, "branching.branch_batch": 64},
            **{"learner.batch": 32, "learner.microbatch": 64},
        },
    ),
    # The released experiments' lengths: T = 20, the last 14, five branches, best and worst leaf,
    # two passes, 128 trajectories a step; a tenth of their pictures.
    Workload(
        "B², T = 20, n = 14, K = 5",
        ("released",),
        {
            **PLAIN,
            **{"sampling.steps": 20, "sampling.guidance": 5},
            **{"curriculum.start": 14, "curriculum.end": 14, "selection.kind": "best_worst"},
            **{"branching.images": 120, "branching.branches": 5},
            **{"branching.unit_groups": 12, "branching.branch_batch": 60},
            **{"learner.inner_epochs": 2, "learner.batch": 128, "learner.microbatch": 112},
        },
    ),
    # DDPO with the settings of trl's trainer: every step of every picture, once.
    Workload(
        "DDPO, T = 10",
        ("peer",),
        {
            **PLAIN,
            **{"preset": "ddpo", "sampling.steps": 10, "sampling.guidance": 5},
            **{"curriculum.start": 10, "curriculum.end": 10},
            **{"branching.images": 128, "branching.branches": 1},
            **{"branching.unit_groups": 64, "branching.branch_batch": 64},
            **{"learner.lr": 3e-4, "learner.inner_epochs": 1, "learner.batch": 32},
            **{"learner.microbatch": 80},
        },
    ),
)


def quick(workload: Workload) -> Workload:
    """The same in seconds, to see that everything runs."""
    branches = min(2, workload.config().branching.branches)
    small = {
        **PLAIN,
        **{"sampling.steps": 4, "curriculum.start": 4 // branches, "curriculum.end": 4 // branches},
        **{"branching.images": 8, "branching.branches": branches},
        **{"branching.unit_groups": 2, "branching.branch_batch": 4},
        **{"learner.inner_epochs": 1, "learner.batch": 4, "learner.microbatch": 4},
    }
    return replace(workload, fields={**workload.fields, **small})


@dataclass(frozen=True)
class Work:
    """One stage's work, for the UNet in guided evaluations of one latent.

    Attributes:
        sampled: forward alone: prefixes and branches.
        scored_again: forward alone, in learning: old densities, and the base model's.
        trained: forward and backward.
        pictures: decoded, and scored.
    """

    sampled: int
    scored_again: int
    trained: int
    pictures: int

    @property
    def evaluations(self) -> int:
        """What the run counts as `cost/unet_evals`."""
        return self.sampled + self.scored_again + self.trained

    def share(self, rank: int, world: int) -> Work:
        """What one of `world` processes does, that all do it."""
        whole = [getattr(self, f.name) for f in fields(self)]
        return Work(*(n // world + (rank < n % world) for n in whole))


def work(config: Config) -> Work:
    """A stage of a run whose interval stays as it is, unless rewards tie: none ties here.

    Every step is trained, as Stable Diffusion's schedules have it.
    """
    start, end = config.interval_bounds
    if start != end or config.replay.stages:
        raise ValueError("the work of a stage is counted for an interval that stays as it is")
    groups, branches, n = config.groups, config.branching.branches, start
    pictures = groups * branches
    leaves = pictures if config.selection.kind == "all" else groups * min(2, branches)
    learner, objective = config.learner, config.objective
    trained = leaves * learner.drawn_steps(n) * learner.inner_epochs
    reference = trained * (objective.kl_weight > 0 or objective.kind == "dpo")
    return Work(
        sampled=groups * (config.sampling.steps - n) + pictures * n,
        scored_again=reference + leaves * n * learner.recompute_log_probs,
        trained=trained,
        pictures=pictures,
    )
