"""`b2ray sample`: pictures with and without a run's LoRA from the same seeds."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from pydantic import ValidationError
from tqdm import tqdm

from b2ray.commands.common import Parser, add_run, execute, quiet
from b2ray.config import Config, Sampling
from b2ray.diffusion.noise import INITIAL, PREFIX, Domain, normal
from b2ray.errors import ConfigError
from b2ray.options import sentence
from b2ray.prompts import read
from b2ray.tracking.show import COLUMNS, ROWS, save_png, sheet
from b2ray.tracking.trained import Trained, find_trained

if TYPE_CHECKING:
    from b2ray.diffusion.policy import Policy


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit code of `b2ray.errors`."""
    return execute(_parser(), sample, argv)


def sample(args: argparse.Namespace) -> None:
    """Draw, save and say where.

    Raises:
        ConfigError: the run, the model or an option does not allow it.
    """
    prompts = tuple(dict.fromkeys(args.prompt))
    if args.prompts:
        prompts = tuple(dict.fromkeys((*prompts, *read("--prompts", args.prompts).texts)))
    if not prompts:
        raise ConfigError("nothing to draw: give --prompt TEXT or --prompts FILE")
    found = find_trained(args.run, args.runs, args.stage)
    config = _settings(found.config, args)
    page, folder = _places(found, args.output)
    policy = _load(config, args.device)
    for prompt in policy.too_long(prompts):
        print(f"the model reads only the beginning of {prompt!r}")

    rows = [(prompt, args.seed + i) for prompt in prompts for i in range(args.count)]
    nothing = {n: np.zeros_like(v) for n, v in found.weights.items()}
    pictures = {}
    with tqdm(total=2 * len(rows) * config.sampling.steps, unit="step") as bar:
        for title, weights in (("without", nothing), ("with", found.weights)):
            bar.set_description(f"{title} the LoRA")
            policy.bind(weights)
            pictures[title] = draw(policy, rows, config.evaluation.batch, bar)
    _save(page, folder, rows, pictures, found)


def draw(policy: Policy, rows: Sequence[tuple[str, int]], batch: int, bar: Any) -> np.ndarray:
    """A picture for each (prompt, seed): uint8, shape (N, height, width, 3).

    A seed gives the same noise for every prompt.

    Args:
        batch: pictures per denoising call.
        bar: moved on by one for every step of every picture.
    """
    parts = [_draw_batch(policy, rows[i : i + batch], bar) for i in range(0, len(rows), batch)]
    return np.concatenate(parts)


def _draw_batch(policy: Policy, rows: Sequence[tuple[str, int]], bar: Any) -> np.ndarray:
    import torch

    leaf = [(0, PREFIX + 1)]

    def noise(word: int) -> np.ndarray:
        shape = policy.latent_shape
        return np.concatenate([normal(s, Domain.SAMPLE, 0, leaf, word, shape) for _, s in rows])

    def of_step(step: int) -> np.ndarray:
        bar.update(len(rows))
        return noise(step + 1)

    x, prompts = torch.from_numpy(noise(INITIAL)), [prompt for prompt, _ in rows]
    rollout = policy.denoise(x, prompts, 0, policy.schedule.steps, of_step)
    return policy.decode(rollout.latents[:, -1])


def _settings(config: Config, args: argparse.Namespace) -> Config:
    """The run's configuration with what the command line says of sampling."""
    given = {f: getattr(args, f) for f in ("steps", "guidance", "eta")}
    given = {field: value for field, value in given.items() if value is not None}
    try:
        sampling = Sampling(**{**config.sampling.model_dump(), **given})
    except ValidationError as error:
        raise ConfigError(f"--{sentence(error)}") from error
    # Not validated as a whole: without noise (eta 0) nothing can be trained, but drawn.
    model = config.model.model_copy(update={"compile": False})  # too slow for a few pictures
    return config.model_copy(update={"sampling": sampling, "model": model})


def _load(config: Config, device: str) -> Policy:
    import torch

    quiet()
    from b2ray.diffusion.policy import Policy

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"--device {device!r} cannot be used: {reason}") from error
    return Policy(config, place)


def _places(found: Trained, given: str | None) -> tuple[Path, Path]:
    """The sheet's file and the folder of the single pictures."""
    if given and given.endswith(".png"):
        return Path(given).expanduser(), Path(given).expanduser().with_suffix("")
    folder = Path(given).expanduser() if given else _next(found.path / "samples")
    return folder / "sheet.png", folder


def _next(folder: Path) -> Path:
    """A numbered folder that is not there yet."""
    taken = [int(p.name) for p in folder.glob("*") if p.name.isdigit()]
    return folder / f"{max(taken, default=0) + 1:03d}"


def _save(
    page: Path,
    folder: Path,
    rows: Sequence[tuple[str, int]],
    pictures: dict[str, np.ndarray],
    found: Trained,
) -> None:
    prompts = list(dict.fromkeys(prompt for prompt, _ in rows))
    for title, drawn in pictures.items():
        for (prompt, seed), picture in zip(rows, drawn, strict=True):
            name = f"{prompts.index(prompt):02d}_seed{seed}_{title}.png"
            save_png(Image.fromarray(picture), folder / name)
    titles = {"without": "without the LoRA", "with": f"with it: {found}"}
    blocks = [(titles[title], drawn) for title, drawn in pictures.items()]
    save_png(sheet([prompt for prompt, _ in rows], blocks), page)
    print(f"side by side  {page}")
    if len(prompts) > ROWS or len(rows) > COLUMNS * len(prompts):
        print(f"              (the first {ROWS} prompts and {COLUMNS} seeds)")
    print(f"one by one    {folder}")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="b2ray sample",
        description="Draw pictures with and without a run's LoRA from the same seeds, with the "
        "steps that training takes. What is not given is as in the run's configuration.",
    )
    add_run(parser)
    parser.add_argument(
        "--prompt", action="append", default=[], metavar="TEXT", help="may be given several times"
    )
    parser.add_argument("--prompts", metavar="FILE", help="a file or built-in set of prompts")
    parser.add_argument(
        "--seed", type=_whole(0), default=0, metavar="N", help="of the first picture of a prompt"
    )
    parser.add_argument(
        "--count", type=_whole(1), default=4, metavar="N", help="seeds per prompt, from --seed on"
    )
    parser.add_argument("--steps", type=int, metavar="T", help="denoising steps")
    parser.add_argument("--guidance", type=float, metavar="W", help="guidance scale")
    parser.add_argument("--eta", type=float, help="noise of the steps: 1 as in training, 0 none")
    parser.add_argument(
        "--output",
        metavar="PATH",
        help="a .png file for the sheet, or a folder (default: a new one in RUN/samples); files "
        "of the same names are replaced",
    )
    parser.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1, …; auto takes a GPU if there is one"
    )
    return parser


def _whole(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least {least}")
        return int(text)

    return number
