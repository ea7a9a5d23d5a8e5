"""What a stage cost: work, bytes through the object store, the UNet's share of the time, memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from b2ray.config import Config
from b2ray.diffusion.lora_file import State
from b2ray.rollout.rollout import RolloutPlan
from b2ray.rollout.stage import UpdateResult
from b2ray.rollout.workers import Workers


def counters(
    queries: int, rollout: RolloutPlan, update: UpdateResult, weights: Sequence[State]
) -> dict[str, float]:
    """What a stage adds to a run's counters, by the names of metrics.jsonl.

    Args:
        queries: pictures that were scored for training.
        rollout: the stage's.
        update: the stage's.
        weights: the new LoRA and the optimizer's state.
    """
    nbytes = {
        **rollout.bytes_moved,
        "learnt": rollout.recorded,  # trajectories of the stage that the learner read
        "weights": sum(array.nbytes for state in weights for array in state.values()),
    }
    return {
        "cost/reward_queries": float(queries),
        "cost/unet_evals": float(rollout.unet_evals + update.unet_evals),
        "cost/unet_backwards": update.figures["policy/rows"],
        "cost/trained_leaves": float(update.leaves),
        **{f"cost/bytes_{kind}": float(count) for kind, count in nbytes.items()},
    }


def stage_figures(
    config: Config, workers: Workers, rollout: RolloutPlan, update: UpdateResult
) -> dict[str, float]:
    """Figures of a stage's time, throughput, fleet and memory, by the names of metrics.jsonl."""
    pictures = config.groups * config.branching.branches
    return {
        "time/sample": rollout.seconds,
        "time/update": update.seconds,
        **workers.figures(pictures / rollout.seconds),
        **unet_shares(rollout, update, config.learner.ranks),
        **memory_peaks(workers.dispatcher.peaks),
    }


def unet_shares(rollout: RolloutPlan, update: UpdateResult, ranks: int) -> dict[str, float]:
    """Share of their phase in which samplers, and the learner's ranks, computed the UNet.

    The rest is waiting, decoding, noise and arithmetic around the UNet, and messages.
    """
    phases = {
        "sampler": (rollout.unet_seconds, rollout.samplers * rollout.seconds),
        "learner": (update.unet_seconds, ranks * update.seconds),
    }
    return {f"time/unet_share_{role}": a / b for role, (a, b) in phases.items() if b > 0}


def memory_peaks(peaks: Mapping[str, int]) -> dict[str, float]:
    """The most memory that a process of each role has had so far, in GiB.

    Args:
        peaks: bytes by role: of the GPU if the process has used one.
    """
    return {f"memory/{role.replace(' ', '_')}": peak / 2**30 for role, peak in peaks.items()}
