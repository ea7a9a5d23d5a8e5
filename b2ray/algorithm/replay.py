"""Replay: which trajectories of earlier stages a stage trains on again, and their file.

This module needs neither torch nor Ray.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from b2ray.config import Config
from b2ray.diffusion.tensors import packed, unpacked
from b2ray.diffusion.trajectory import Trajectory

FILE = "replay.safetensors"
NOTES = "kept"  # the name of the notes in the file's metadata


@dataclass(frozen=True)
class ReplayEntry:
    """A trajectory that may be replayed in a later stage.

    Attributes:
        stage: number of the stage that it was sampled for.
        prompt: the prompt of its group.
        advantage: its advantage in that stage.
        interval: n, how many steps it has.
        trajectory: the `Trajectory`, or a reference to it.
    """

    stage: int
    prompt: str
    advantage: float
    interval: int
    trajectory: Any


def largest(trained: Sequence[ReplayEntry], stage: int, config: Config) -> list[ReplayEntry]:
    """Choose what a stage replays: the entries with the largest |advantage|.

    If advantages are equal, entries of later stages are preferred, then those that stand first in
    `trained`. If the objective learns from pairs, entries 2j and 2j + 1 are a pair, which is chosen
    as a whole by the larger of its two |advantages|.

    Args:
        trained: what the stage before it trained on: first the entries that it replayed, then those
            of its own trajectories.
        stage: number of the stage that would replay them; after the last stage nothing is replayed.
        config: `replay` says how old and how many the entries may be.

    Returns:
        The entries in the order of `trained`.
    """
    replay, size = config.replay, 2 if config.objective.kind == "dpo" else 1
    if stage >= config.curriculum.stages:
        return []
    recent = [entry for entry in trained if stage - entry.stage <= replay.stages]
    units = [recent[j : j + size] for j in range(0, len(recent), size)]

    def rank(j: int) -> tuple[float, int, int]:
        return -max(abs(entry.advantage) for entry in units[j]), -units[j][0].stage, j

    best = sorted(range(len(units)), key=rank)[: replay.trajectories // size]
    return [entry for j in sorted(best) for entry in units[j]]


def ages(stage: int, replayed: Sequence[ReplayEntry]) -> dict[str, float]:
    """Metrics of how many trajectories a stage replays, and of their mean age in stages."""
    stages = [stage - entry.stage for entry in replayed]
    age = {"replay/age": sum(stages) / len(stages)} if stages else {}
    return {"replay/trajectories": float(len(stages)), **age}


def save(folder: Path, entries: Sequence[ReplayEntry]) -> None:
    """Write entries with the arrays of their trajectories into a checkpoint, if there are any.

    Latents are written as they are sent (`diffusion.trajectory.to_wire`). Equal entries give equal
    bytes.

    Args:
        folder: the checkpoint.
        entries: entries whose trajectories are arrays, not references.
    """
    if not entries:
        return
    tensors, notes = {}, []
    for j, entry in enumerate(entries):
        trajectory: Trajectory = entry.trajectory
        latents, log_probs = _names(j)
        tensors[latents], tensors[log_probs] = trajectory.latents, trajectory.log_probs
        notes.append({**vars(entry), "trajectory": trajectory.version})
    text = json.dumps(notes, sort_keys=True)
    (folder / FILE).write_bytes(packed(tensors, {NOTES: text}))


def load(folder: Path) -> list[ReplayEntry]:
    """Read the entries that `save` wrote; there are none if the checkpoint has no such file."""
    file = folder / FILE
    if not file.exists():
        return []
    tensors, metadata = unpacked(file)
    entries = []
    for j, note in enumerate(json.loads(metadata[NOTES])):
        latents, log_probs = _names(j)
        trajectory = Trajectory(tensors[latents], tensors[log_probs], note["trajectory"])
        entries.append(ReplayEntry(**{**note, "trajectory": trajectory}))
    return entries


def _names(j: int) -> tuple[str, str]:
    """The names of the arrays of entry j in the file."""
    return f"{j:05d}.latents", f"{j:05d}.log_probs"
