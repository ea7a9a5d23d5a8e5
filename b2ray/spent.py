"""What a stage spent: time in the UNet, bytes through the object store, memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from b2ray.diffusion.lora_file import State


class Sampled(Protocol):
    """What is known of a stage's sampling: `fleet.rollout.Rollout`."""

    seconds: float
    unet_seconds: float

    @property
    def samplers(self) -> int:
        """How many took part."""
        ...


class Learnt(Protocol):
    """What is known of a stage's update: `crew.Updated`."""

    @property
    def seconds(self) -> float: ...

    @property
    def unet_seconds(self) -> float: ...


def shares(sampled: Sampled, learnt: Learnt, ranks: int) -> dict[str, float]:
    """Share of their phase that samplers, and the learner's ranks, were at work on the UNet.

    The rest is waiting, decoding, noise and arithmetic around the UNet, and messages.
    """
    phases = {
        "sampler": (sampled.unet_seconds, sampled.samplers * sampled.seconds),
        "learner": (learnt.unet_seconds, ranks * learnt.seconds),
    }
    return {f"time/unet_share_{role}": a / b for role, (a, b) in phases.items() if b > 0}


def peaks(found: Mapping[str, int]) -> dict[str, float]:
    """Most memory that a process of each role has had so far, in GiB: the GPU's if it has one."""
    return {f"memory/{role.replace(' ', '_')}": b / 2**30 for role, b in found.items()}


def moved(kinds: Mapping[str, int], learnt: int, weights: Sequence[State]) -> dict[str, float]:
    """Bytes that went through the object store in a stage.

    Args:
        kinds: what samplers returned: prefixes, pictures, trajectories.
        learnt: trajectories of the stage that the learner read.
        weights: the new LoRA and the optimizer's state.
    """
    size = sum(array.nbytes for state in weights for array in state.values())
    whole = {**kinds, "learnt": learnt, "weights": size}
    return {f"cost/bytes_{kind}": float(count) for kind, count in whole.items()}
