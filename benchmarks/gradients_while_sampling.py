"""Learning without a second forward, by gradients taken while sampling: what would it cost?

    python benchmarks/gradients_while_sampling.py [--latents 32] [--rounds 15]

A sampler that keeps, for each trajectory, the gradient of its log-density by the adapter needs no
forward pass in learning: once the rewards are there, the update is the sum of these gradients times
the advantages. That is the score function estimator, one optimizer step a stage. Here one denoising
step is done both ways by turns, one thread, processor time; both give the same gradient, or the
script ends. docs/performance.md has the table.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import torch
from adapter import PROMPT, policy
from peft.tuners.lora import Linear
from tables import fill, markdown
from turns import by_turns, quartiles

from b2ray.diffusion import lora
from b2ray.diffusion.policy import Policy

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
STEP = 3


class PerTrajectory(torch.autograd.Function):
    """A linear map with an adapter, W·x + s·B·A·x, whose gradients by A and B stay apart.

    Rows are both halves of guidance, one after the other: trajectory j has rows j and N + j.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, graph: torch.Tensor, layer: Linear) -> torch.Tensor:
        """`graph` is a scalar that needs a gradient, so that there is a backward pass."""
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        down = x @ a.T
        ctx.save_for_backward(x, down)
        ctx.layer = layer
        return layer.base_layer(x) + layer.scaling["default"] * (down @ b.T)

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        x, down = ctx.saved_tensors
        layer = ctx.layer
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        up = layer.scaling["default"] * (g @ b)
        halves = lambda t: t.unflatten(0, (2, -1))  # noqa: E731
        layer.each_a += torch.einsum("hntr,hnti->nri", halves(up), halves(x))
        scaled = layer.scaling["default"] * halves(g)
        layer.each_b += torch.einsum("hnto,hntr->nor", scaled, halves(down))
        return g @ layer.base_layer.weight + up @ a, None, None


def main() -> None:
    """Measure, print, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--latents", type=int, default=32, help="a call's")
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args()
    torch.set_num_threads(1)
    plain, apart = (policy("b2ray/shapes/weights/base", False) for _ in range(2))
    taken_apart(apart, given.latents)
    rng = torch.Generator().manual_seed(0)
    x, after = (torch.randn(given.latents, *plain.latent_shape, generator=rng) for _ in range(2))
    advantage = torch.randn(given.latents, generator=rng)
    same(plain, apart, x, after, advantage)
    ways = {
        "forward alone, as in sampling": lambda: density(plain, x, after),
        "forward and back, as in learning": lambda: learnt(plain, x, after, advantage),
        "forward and back, gradients apart": lambda: gathered(apart, x, after),
    }
    found = table(ways, given.rounds, given.latents)
    print(found)
    fill(PAGE, {"gradients": found})


def taken_apart(made: Policy, latents: int) -> None:
    """Have the policy's layers keep the gradient of every trajectory."""
    for parameter in lora.parameters(made.pipeline.unet).values():
        parameter.requires_grad_(False)
    graph = torch.zeros((), requires_grad=True)
    for layer in lora.layers(made.pipeline.unet):
        assert isinstance(layer, Linear)
        for name, adapter in (("each_a", layer.lora_A), ("each_b", layer.lora_B)):
            setattr(layer, name, torch.zeros(latents, *adapter["default"].weight.shape))
        layer.forward = MethodType(lambda self, x: PerTrajectory.apply(x, graph, self), layer)


def density(made: Policy, x: torch.Tensor, after: torch.Tensor) -> None:
    """A step's log-densities."""
    with torch.no_grad():
        made.log_prob(torch.full((len(x),), STEP), x, after, [PROMPT] * len(x))


def learnt(made: Policy, x: torch.Tensor, after: torch.Tensor, advantage: torch.Tensor) -> None:
    """The gradient of a step's log-densities times their advantages."""
    found = made.log_prob(torch.full((len(x),), STEP), x, after, [PROMPT] * len(x))
    (found * advantage).sum().backward()


def gathered(made: Policy, x: torch.Tensor, after: torch.Tensor) -> None:
    """The gradients of a step's log-densities, added to each trajectory's own."""
    made.log_prob(torch.full((len(x),), STEP), x, after, [PROMPT] * len(x)).sum().backward()


def same(
    plain: Policy, apart: Policy, x: torch.Tensor, after: torch.Tensor, advantage: torch.Tensor
) -> None:
    """Both ways give one gradient.

    Raises:
        AssertionError: if they do not.
    """
    learnt(plain, x, after, advantage)
    gathered(apart, x, after)
    layers = zip(lora.layers(plain.pipeline.unet), lora.layers(apart.pipeline.unet), strict=True)
    for one, other in layers:
        for name, adapter in (("each_a", one.lora_A), ("each_b", one.lora_B)):
            wanted = adapter["default"].weight.grad
            found = torch.einsum("n,nij->ij", advantage, getattr(other, name))
            torch.testing.assert_close(
                found, wanted, rtol=1e-3, atol=1e-5 * float(wanted.abs().max())
            )


def table(ways: dict[str, Callable[[], None]], rounds: int, latents: int) -> str:
    """Milliseconds a latent, medians, and their ratios to the first within each round."""
    times = by_turns(ways, rounds)
    first = next(iter(times.values()))
    rows = [
        [name, f"{1000 * np.median(found) / latents:.2f}", quartiles(found / first)]
        for name, found in times.items()
    ]
    return markdown(["a denoising step", "ms a latent", "ratio (quartiles)"], rows)


if __name__ == "__main__":
    main()
