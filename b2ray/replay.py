"""Trajectories of earlier stages that are trained on again: which, and how they are kept on disk.

Needs neither torch nor Ray.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.numpy

from b2ray.config import Config
from b2ray.diffusion.trajectory import Trajectory

FILE = "replay.safetensors"


@dataclass(frozen=True)
class Kept:
    """A trajectory that a later stage trains on again.

    Attributes:
        stage: that it was sampled for.
        prompt: its group's.
        advantage: in its own stage.
        interval: n, how many steps it has.
        trajectory: the `Trajectory`, or where to get it.
    """

    stage: int
    prompt: str
    advantage: float
    interval: int
    trajectory: Any


def largest(trained: Sequence[Kept], stage: int, config: Config) -> list[Kept]:
    """What a stage trains on again: the largest |advantage|, in the order that was given.

    Of equal ones the later stage's come first, then those that stand first. Where the objective
    learns from pairs, entries 2j and 2j + 1 are one, and go by the larger of their two.

    Args:
        trained: what the stage before trained on again, then its own.
        stage: the number of the stage that would train on them; beyond the last there is none.
        config: `replay` says how old and how many they may be.
    """
    replay, together = config.replay, 2 if config.objective.kind == "dpo" else 1
    if stage >= config.curriculum.stages:
        return []
    young = [k for k in trained if stage - k.stage <= replay.stages]
    visits = [young[j : j + together] for j in range(0, len(young), together)]

    def rank(j: int) -> tuple[float, int, int]:
        return -max(abs(k.advantage) for k in visits[j]), -visits[j][0].stage, j

    chosen = sorted(range(len(visits)), key=rank)[: replay.trajectories // together]
    return [k for j in sorted(chosen) for k in visits[j]]


def ages(stage: int, replayed: Sequence[Kept]) -> dict[str, float]:
    """Figures: how many trajectories a stage trains on again, and their mean age in stages."""
    found = [stage - k.stage for k in replayed]
    age = {"replay/age": sum(found) / len(found)} if found else {}
    return {"replay/trajectories": float(len(found)), **age}


def save(folder: Path, kept: Sequence[Kept]) -> None:
    """Write trajectories with their arrays into a checkpoint, if there are any.

    Latents stay as they travel (`diffusion.trajectory.to_wire`). The same give the same bytes.
    """
    if not kept:
        return
    tensors, notes = {}, []
    for j, one in enumerate(kept):
        found: Trajectory = one.trajectory
        latents, log_probs = _names(j)
        tensors[latents], tensors[log_probs] = found.latents, found.log_probs
        notes.append({**vars(one), "trajectory": found.version})
    # One entry only: safetensors writes several in random order.
    metadata = {"kept": json.dumps(notes, sort_keys=True)}
    (folder / FILE).write_bytes(safetensors.numpy.save(tensors, metadata=metadata))


def load(folder: Path) -> list[Kept]:
    """Read what `save` wrote; a checkpoint without such a file has nothing to train on again."""
    file = folder / FILE
    if not file.exists():
        return []
    with safetensors.safe_open(file, framework="numpy") as stored:
        notes = json.loads(stored.metadata()["kept"])
        for j, note in enumerate(notes):
            latents, log_probs = map(stored.get_tensor, _names(j))
            note["trajectory"] = Trajectory(latents, log_probs, note["trajectory"])
    return [Kept(**note) for note in notes]


def _names(j: int) -> tuple[str, str]:
    return f"{j:05d}.latents", f"{j:05d}.log_probs"
