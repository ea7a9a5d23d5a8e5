"""How far ratios are from 1 before any update, by precision and batch shape.

    python benchmarks/precision.py [--model b2ray/shapes/weights/base] [--steps 20] [--leaves 32]

Branches are sampled in one batch and scored again as the learner does it: in calls of the same
shape, and in calls of `--microbatch`. Any difference is rounding. docs/models.md has the table.
"""

from __future__ import annotations

import argparse
import math

import numpy as np
import torch

from b2ray.diffusion.noise import INITIAL, PREFIX, Domain, normal
from b2ray.diffusion.policy import Policy
from b2ray.options import parse

PROMPTS = ["a red circle above a blue square", "a green cross left of a yellow triangle"]
JOINT_NATS = 1.6384  # DDPO's clip range: 1e-4 per element of a latent of 16,384


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="b2ray/shapes/weights/base")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--leaves", type=int, default=32)
    parser.add_argument("--microbatch", type=int, default=4)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{arguments.model}, T = {arguments.steps}, {arguments.leaves} leaves in a batch\n")
    print("| precision | learner's batch | mean | worst step | largest | share of the clip range |")
    print("|---|---|---|---|---|---|")
    for dtype in ("float32", "bfloat16", "float16"):
        policy = make(arguments, dtype)
        latents, log_probs, prompts = sample(policy, arguments.leaves)
        for size in (arguments.leaves, arguments.microbatch):
            print(line(dtype, size, policy, drift(policy, latents, log_probs, prompts, size)))


def make(arguments: argparse.Namespace, dtype: str) -> Policy:
    """The model with a LoRA whose output is not zero."""
    config = parse(
        [
            *(f"--model.path={arguments.model}", f"--model.dtype={dtype}"),
            *(f"--sampling.steps={arguments.steps}", "--sampling.guidance=5"),
        ]
    ).config
    policy = Policy(config, torch.device(arguments.device))
    rng = np.random.default_rng(0)
    state = policy.lora_state()
    policy.bind({k: (v + 0.01 * rng.normal(size=v.shape)).astype("f4") for k, v in state.items()})
    return policy


def sample(policy: Policy, leaves: int) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Latents (B, T + 1, C, H, W) and log-densities (B, T) of whole trajectories."""
    keys = [(group, PREFIX + 1) for group in range(leaves)]

    def noise(word: int) -> np.ndarray:
        return normal(0, Domain.TRAIN, 0, keys, word, policy.latent_shape)

    prompts = [PROMPTS[i % 2] for i in range(leaves)]
    start = torch.from_numpy(noise(INITIAL))
    found = policy.denoise(start, prompts, 0, policy.schedule.steps, lambda s: noise(s + 1))
    return found.latents, found.log_probs, prompts


@torch.no_grad()
def drift(
    policy: Policy, latents: torch.Tensor, old: torch.Tensor, prompts: list[str], size: int
) -> torch.Tensor:
    """|ratio - 1| of every step, shape (B, T), scored again in calls of `size`."""
    off = torch.zeros_like(old)
    for step in range(policy.schedule.steps):
        for low in range(0, len(latents), size):
            rows = slice(low, low + size)
            i = torch.full((len(latents[rows]),), step, device=latents.device)
            x, following = latents[rows, step], latents[rows, step + 1]
            new = policy.log_prob(i, x, following, prompts[rows])
            off[rows, step] = ((new - old[rows, step]).exp() - 1).abs()
    return off.cpu()


def line(dtype: str, size: int, policy: Policy, off: torch.Tensor) -> str:
    """One line of the table."""
    clip = JOINT_NATS / math.prod(policy.latent_shape)
    steps = off.mean(0)
    worst = int(steps.argmax())
    cells = [
        dtype,
        str(size),
        f"{off.mean():.1e}",
        f"{steps[worst]:.1e} (step {worst + 1} of {len(steps)})",
        f"{off.max():.1e}",
        f"{off.mean() / clip:.2%}",
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
