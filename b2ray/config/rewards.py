"""Rewards, the pictures that may stand in their place, and what is only measured."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from b2ray.config.section import Name, Positive, Section


class Workers(Section):
    count: Positive = 1
    """Actors of this role."""
    cpus: float = Field(0.5, ge=0)
    """Logical CPUs that Ray reserves for each."""
    gpus: float = Field(0.0, ge=0)
    """GPUs (or a fraction) for each; 0 runs on the CPU."""


class RewardWorkers(Workers):
    runtime_env: dict[str, Any] = Field({})
    """Ray's runtime_env for these processes, for example {"pip": [...]}: packages that the rest of
    the run does not have, or has in another version. Passwords and tokens are refused in it."""


class Reward(Section):
    name: Name
    """The name in logs and figures."""
    kind: str
    """A built-in reward, or your own function or class as `module:name`."""
    path: str | None = None
    """The reward model: a local folder or a hub id; empty is the kind's usual one."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    weight: float = 1.0
    """Factor in the sum that is trained on."""
    scale: Annotated[float, Field(gt=0)] | Literal["window"] = 1.0
    """Before it is weighted a score is divided by this number, or, with `window`, standardised over
    this reward's own scores of the last stages (`advantage.window`)."""
    batch: Positive = 32
    """Pictures per call of the reward model."""
    options: dict[str, Any] = Field({})
    """Settings of this kind of reward; docs/rewards.md lists them."""
    workers: RewardWorkers | None = None
    """Processes of its own, with their own number, devices and Python environment; empty: scored in
    fleet.scorers, with the other rewards."""


class Demonstrations(Section):
    """Pictures that are liked, in the place of rewards (SQIL, arXiv 1905.11108): their trajectories
    count 1 and the policy's own 0."""

    path: str | None = Field(None, min_length=1)
    """Folder of .png, .jpg or .webp pictures with captions: a metadata.jsonl with `file_name` and
    `text`, or a .txt file of the same name beside each picture. Goes with --preset=sqil and without
    rewards."""


class Evaluation(Section):
    """Measured on fixed seeds; never trained on."""

    every: int = Field(10, ge=0)
    """Evaluate after every so many stages (0: only before and after)."""
    images: Positive = 64
    """Pictures at the evaluations in between, on the training prompts."""
    final_images: Positive = 256
    """Pictures before and after the run, on each prompt set."""
    batch: Positive = 32
    """Pictures per denoising call."""
    previews: int = Field(8, ge=0)
    """Pictures of each evaluation that are kept and shown."""
    trees: int = Field(2, ge=0)
    """Groups of each stage whose branches are kept in small pictures, for the run's page: the image
    that the prefix foresees, the leaves, and what they got (0: none)."""
    heldout_rewards: tuple[Reward, ...] = ()
    """Rewards that are measured and never trained on."""
