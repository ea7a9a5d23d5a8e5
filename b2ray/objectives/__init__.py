"""What an update maximises: one file per objective, by name in `OBJECTIVES`."""

from __future__ import annotations

from b2ray.objectives.densities import Objective
from b2ray.objectives.dpo import DPO
from b2ray.objectives.policy_gradient import POLICY_GRADIENT
from b2ray.objectives.ppo import PPO

OBJECTIVES: dict[str, Objective] = {
    "ppo": PPO,
    "policy_gradient": POLICY_GRADIENT,
    "dpo": DPO,
}
