"""The objectives that an update can maximise, one per file, and their names in `OBJECTIVES`."""

from __future__ import annotations

from b2ray.objectives.densities import LossFunction
from b2ray.objectives.dpo import DPO
from b2ray.objectives.policy_gradient import POLICY_GRADIENT
from b2ray.objectives.ppo import PPO

OBJECTIVES: dict[str, LossFunction] = {
    "ppo": PPO,
    "policy_gradient": POLICY_GRADIENT,
    "dpo": DPO,
}
