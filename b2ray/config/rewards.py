"""Rewards, the demonstrations that may take their place, and the evaluation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from b2ray.config.section import Name, Positive, Section

if TYPE_CHECKING:
    from b2ray.config import Config

# The two measures of how different a prompt's pictures are (`evaluation.evaluate.diversity`).
DIVERSITY = ("pairwise", "vendi")
# The keys of summary.json, which also has a key for each held-out reward.
SUMMARY_WORDS = (
    *("name", "seed", "stages", "reward", "diversity", "reward_queries"),
    *("unet_evals", "seconds", "files", "evaluations"),
)


class Workers(Section):
    """How many actors a role has, and what each of them reserves."""

    count: Positive = 1
    """How many actors this role has."""
    cpus: float = Field(0.5, ge=0)
    """Logical CPUs that Ray reserves for each."""
    gpus: float = Field(0.0, ge=0)
    """GPUs (or a fraction) for each; 0 runs on the CPU."""


class RewardWorkers(Workers):
    """The actors of a single reward, and their environment."""

    runtime_env: dict[str, Any] = Field({})
    """Ray's runtime_env for these processes, for example {"pip": [...]}: packages that the rest of
    the run does not have, or has in another version. Passwords and tokens are refused in it."""


class Reward(Section):
    """A reward: which model scores pictures, and how its scores count."""

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
    """Before it is weighted, a score is divided by this number or, with `window`, standardised over
    this reward's own scores of the last stages (`advantage.window`)."""
    batch: Positive = 32
    """Pictures per call of the reward model."""
    options: dict[str, Any] = Field({})
    """Settings of this kind of reward; docs/howto/rewards.md lists them."""
    workers: RewardWorkers | None = None
    """Processes of its own, with their own number, devices and Python environment; empty:
    fleet.scorers compute it together with the other rewards."""


class Demonstrations(Section):
    """Example pictures that take the place of rewards (SQIL, arXiv 1905.11108): their trajectories
    count 1, and the policy's own 0."""

    path: str | None = Field(None, min_length=1)
    """Folder of .png, .jpg or .webp pictures with captions: a metadata.jsonl with `file_name` and
    `text`, or a .txt file of the same name beside each picture. Use it with --preset=sqil and
    without rewards."""


class Evaluation(Section):
    """What is measured on fixed seeds; nothing of it is trained on."""

    every: int = Field(10, ge=0)
    """Stages from one evaluation to the next (0: only before and after the run)."""
    images: Positive = 64
    """Pictures of each evaluation during the run, on the training prompts."""
    final_images: Positive = 256
    """Pictures of the evaluations before and after the run, on each prompt set."""
    batch: Positive = 32
    """Pictures per denoising call."""
    previews: int = Field(8, ge=0)
    """Pictures of each evaluation that are kept and shown."""
    trees: int = Field(2, ge=0)
    """Groups of each stage that the run's page shows in small pictures: the image predicted at the
    fork, the leaves, and their rewards (0: none)."""
    heldout_rewards: tuple[Reward, ...] = ()
    """Rewards that are only measured and never trained on."""


def source_problem(config: Config) -> str | None:
    """Say what is missing from the rewards or demonstrations that the run learns from, or what
    does not fit them."""
    if config.demonstrations.path is None:
        if config.prompts.train is None:
            return "prompts.train is missing: set it in the file or with --prompts.train=…"
        if not config.rewards:
            return (
                "rewards is empty: give at least 1 in the file or with --rewards=…, or a "
                "folder of pictures to learn from with --demonstrations.path=…"
            )
        return None
    # With demonstrations nothing is compared, and all trajectories are trained on.
    reason = f"but demonstrations.path is {config.demonstrations.path!r}"
    if config.rewards:
        return (
            f"rewards has {len(config.rewards)} {reason}, whose pictures are learnt from instead: "
            "move them to evaluation.heldout_rewards, where they are measured"
        )
    if config.branching.branches != 1:
        return (
            f"branching.branches is {config.branching.branches} {reason}: without rewards there "
            "is nothing to compare branches by; use 1, or --preset=sqil"
        )
    if config.selection.kind != "all":
        return (
            f"selection.kind is {config.selection.kind} {reason}: every trajectory is trained "
            "on; use all, or --preset=sqil"
        )
    if config.branching.images < 2:
        return f"branching.images is 1 {reason}: half of them are; use at least 2"
    return None


def name_problem(config: Config) -> str | None:
    """Say which reward has a name that another reward or a key of the summary has."""
    names = [r.name for r in config.all_rewards]
    duplicate = next((n for n in names if names.count(n) > 1), None)
    if duplicate:
        return f"reward name {duplicate!r} is used twice: names must differ in logs"
    reserved = {"mean", "step", *DIVERSITY, *SUMMARY_WORDS}
    clash = next((n for n in names if n in reserved), None)
    return f"reward name {clash!r} is a word of the summary: choose another" if clash else None
