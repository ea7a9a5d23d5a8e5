"""What an adapter costs: added to outputs or folded into weights, and switched off and on.

    python benchmarks/adapter.py [--model b2ray/shapes/weights/base] [--latents 32] [--rounds 15]

One thread, processor time, both ways by turns in one process; docs/performance.md has the table.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from tables import fill, markdown
from turns import by_turns, quartiles

from b2ray.diffusion.policy import Policy
from b2ray.options import parse

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
PROMPT = "a red circle above a blue square"
SWITCHES = 20


def main() -> None:
    """Measure, print, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="b2ray/shapes/weights/base")
    parser.add_argument("--latents", type=int, default=32, help="a call's")
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args()
    torch.set_num_threads(1)
    apart, folded = (policy(given.model, way) for way in (False, True))
    compared = {
        "forward": {"apart": forward(apart, given), "folded": forward(folded, given)},
        "forward and back": {"apart": back(apart, given), "folded": back(folded, given)},
        "off and on": {"by the UNet": by_unet(apart), "by its layers": by_layers(apart)},
    }
    rows = [row(what, given.rounds, ways) for what, ways in compared.items()]
    found = markdown(["what", "one way, ms", "the other, ms", "ratio (quartiles)"], rows)
    print(found)
    fill(PAGE, {"adapter": found})


def policy(model: str, folded: bool) -> Policy:
    """The model with an adapter whose output is not zero."""
    words = [f"--model.path={model}", "--model.lora.rank=8", f"--model.lora.folded={folded}"]
    made = Policy(parse(words).config, torch.device("cpu"))
    rng = np.random.default_rng(0)
    state = made.lora_state()
    made.bind({k: (v + 0.01 * rng.normal(size=v.shape)).astype("f4") for k, v in state.items()})
    return made


def forward(made: Policy, given: argparse.Namespace) -> Callable[[], None]:
    """A guided evaluation of some latents."""
    x = torch.randn(given.latents, *made.latent_shape, generator=torch.Generator().manual_seed(0))
    i = torch.full((given.latents,), 3)

    def call() -> None:
        with torch.no_grad():
            made.predict(i, x, [PROMPT] * given.latents)

    return call


def back(made: Policy, given: argparse.Namespace) -> Callable[[], None]:
    """The same with the gradients of the adapter."""
    x = torch.randn(given.latents, *made.latent_shape, generator=torch.Generator().manual_seed(0))
    i = torch.full((given.latents,), 3)
    return lambda: made.predict(i, x, [PROMPT] * given.latents).sum().backward()


def by_unet(made: Policy) -> Callable[[], None]:
    """The adapter switched off and on by diffusers' own methods, several times."""
    unet = made.pipeline.unet

    def call() -> None:
        for _ in range(SWITCHES):
            unet.disable_adapters()
            unet.enable_adapters()

    return call


def by_layers(made: Policy) -> Callable[[], None]:
    """The same by `Policy.reference`."""

    def call() -> None:
        for _ in range(SWITCHES):
            with made.reference():
                pass

    return call


def row(what: str, rounds: int, ways: Mapping[str, Callable[[], None]]) -> list[str]:
    """Medians of two ways, by turns, and the ratio within each round."""
    times = by_turns(ways, rounds)
    one, other = times.values()
    scale = 1000 / (SWITCHES if what == "off and on" else 1)
    cells = [f"{name}: {scale * np.median(found):.1f}" for name, found in times.items()]
    return [what, *cells, quartiles(other / one)]


if __name__ == "__main__":
    main()
