"""Which denoising steps does a run's LoRA help in? Pictures with it bound only in some of them.

    python benchmarks/lora_by_step.py RUN [--ranges 0-10 0-5 5-10] [--count 512]

Same seeds as the run's own evaluations; scores of every reward of the run, on both prompt sets.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np
import torch
from tqdm import tqdm

from b2ray.checks import check_files
from b2ray.diffusion.lora_file import State
from b2ray.diffusion.noise import INITIAL, PREFIX, Domain, normal
from b2ray.diffusion.policy import Policy
from b2ray.rewards import Panel
from b2ray.tracking.trained import find_trained

BATCH = 64


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run")
    parser.add_argument("--runs", default="runs")
    parser.add_argument("--ranges", nargs="+", default=["0-0", "0-10", "0-5", "5-10"])
    parser.add_argument("--count", type=int, default=512)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    found = find_trained(arguments.run, arguments.runs)
    sets = check_files(found.config).evaluated()
    policy = Policy(found.config, torch.device(arguments.device))
    panel = Panel(found.config.all_rewards, policy.device)
    names = list(panel.rewards)
    print("| steps with the LoRA | " + " | ".join(f"{n}, {s}" for s in sets for n in names) + " |")
    print("|---" * (1 + len(sets) * len(names)) + "|")
    for text in arguments.ranges:
        low, high = map(int, text.split("-"))
        cells = []
        for which, prompts in enumerate(sets.values()):
            texts = [prompts[i % len(prompts)] for i in range(arguments.count)]
            pictures = draw(policy, found.weights, range(low, high), texts, which)
            scores = panel.score(pictures, texts, names)
            cells += [f"{scores[n].mean():.3f}" for n in names]
        print(f"| {text} | {' | '.join(cells)} |", flush=True)


def draw(
    policy: Policy, weights: State, where: range, prompts: Sequence[str], which: int
) -> np.ndarray:
    """A picture a prompt on the run's evaluation seeds, the LoRA bound in the steps of `where`."""
    nothing = {name: np.zeros_like(value) for name, value in weights.items()}
    parts = []
    for low in tqdm(range(0, len(prompts), BATCH), leave=False):
        rows = range(low, min(low + BATCH, len(prompts)))
        texts = [prompts[i] for i in rows]

        def noise(branch: int, word: int, rows: range = rows) -> np.ndarray:
            leaves = [(i, branch) for i in rows]
            seed, shape = policy.config.seed, policy.latent_shape
            return normal(seed, Domain.EVALUATE, which, leaves, word, shape)

        x = torch.from_numpy(noise(PREFIX, INITIAL))
        for step in range(policy.schedule.steps):
            policy.bind(weights if step in where else nothing)
            leaf = lambda s: noise(PREFIX + 1, s + 1)  # noqa: E731
            x = policy.denoise(x, texts, step, step + 1, leaf).latents[:, -1]
        parts.append(policy.decode(x))
    return np.concatenate(parts)


if __name__ == "__main__":
    main()
