"""`b2ray sample`: draws pictures with and without a run's LoRA from the same seeds."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from b2ray.commands.common import (
    CommandParser,
    add_json,
    add_prompts,
    add_run,
    add_sampling,
    execute,
    numbered,
    quiet,
    whole,
    with_sampling,
)
from b2ray.config import Config
from b2ray.diffusion.noise import INITIAL, PREFIX, Domain, normal
from b2ray.errors import ConfigError
from b2ray.prompts import read
from b2ray.tracking.show import COLUMNS, ROWS, save_png, sheet
from b2ray.tracking.trained import Trained, find_trained

if TYPE_CHECKING:
    from b2ray.diffusion.policy import Policy


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit code, one of `b2ray.errors`."""
    return execute(make_parser(), sample, argv)


def sample(args: argparse.Namespace) -> dict[str, Any]:
    """Draw the pictures, save them, say where, and return what --json prints.

    Raises:
        ConfigError: an option is wrong, there is no such run, or its model cannot be loaded.
    """
    prompts = tuple(dict.fromkeys(args.prompt))
    if args.prompts:
        prompts = tuple(dict.fromkeys((*prompts, *read("--prompts", args.prompts).texts)))
    if not prompts:
        raise ConfigError("nothing to draw: give --prompt TEXT or --prompts FILE")
    trained = find_trained(args.run, args.runs, args.stage)
    config = with_sampling(trained.config, args)
    # Compiling the UNet takes longer than a few pictures do.
    model = config.model.model_copy(update={"compile": False})
    config = config.model_copy(update={"model": model})
    page, folder = _places(trained, args.output)
    policy = _load(config, args.device)
    for prompt in policy.too_long(prompts):
        print(f"the model reads only the beginning of {prompt!r}")

    rows = [(prompt, args.seed + i) for prompt in prompts for i in range(args.count)]
    # A LoRA of zeros leaves the base model as it is.
    zeros = {n: np.zeros_like(v) for n, v in trained.weights.items()}
    pictures = {}
    with tqdm(total=2 * len(rows) * config.sampling.steps, unit="step") as bar:
        for title, weights in (("without", zeros), ("with", trained.weights)):
            bar.set_description(f"{title} the LoRA")
            policy.bind(weights)
            pictures[title] = draw(policy, rows, config.evaluation.batch, bar)
    return {
        **trained.named(),
        "sheet": str(page),
        "pictures": _save(page, folder, rows, pictures, trained),
    }


def draw(policy: Policy, rows: Sequence[tuple[str, int]], batch: int, bar: Any) -> np.ndarray:
    """Draw a picture for each (prompt, seed); a seed gives the same noise for every prompt.

    Args:
        policy: the model with the LoRA.
        rows: the (prompt, seed) of each of N pictures.
        batch: the number of pictures that are denoised together.
        bar: a tqdm bar, which moves by one for every step of every picture.

    Returns:
        The pictures, uint8, shape (N, height, width, 3).
    """
    parts = [_draw_batch(policy, rows[i : i + batch], bar) for i in range(0, len(rows), batch)]
    return np.concatenate(parts)


def _draw_batch(policy: Policy, rows: Sequence[tuple[str, int]], bar: Any) -> np.ndarray:
    import torch

    leaf = [(0, PREFIX + 1)]

    def noise(word: int) -> np.ndarray:
        shape = policy.latent_shape
        return np.concatenate([normal(s, Domain.SAMPLE, 0, leaf, word, shape) for _, s in rows])

    def noise_of_step(step: int) -> np.ndarray:
        bar.update(len(rows))
        return noise(step + 1)

    x, prompts = torch.from_numpy(noise(INITIAL)), [prompt for prompt, _ in rows]
    rollout = policy.denoise(x, prompts, 0, policy.schedule.steps, noise_of_step)
    return policy.decode(rollout.latents[:, -1])


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


def _places(trained: Trained, option: str | None) -> tuple[Path, Path]:
    """Return the file of the sheet, and the folder of the single pictures."""
    if option and option.endswith(".png"):
        return Path(option).expanduser(), Path(option).expanduser().with_suffix("")
    folder = Path(option).expanduser() if option else numbered(trained.path / "samples")
    return folder / "sheet.png", folder


def _save(
    page: Path,
    folder: Path,
    rows: Sequence[tuple[str, int]],
    pictures: dict[str, np.ndarray],
    trained: Trained,
) -> list[dict[str, Any]]:
    """Save the pictures and the sheet, and say where.

    Returns:
        For each picture the prompt, the seed and the files without and with the LoRA.
    """
    prompts = list(dict.fromkeys(prompt for prompt, _ in rows))
    files: list[dict[str, Any]] = [{"prompt": prompt, "seed": seed} for prompt, seed in rows]
    for title, drawn in pictures.items():
        for entry, picture in zip(files, drawn, strict=True):
            number, seed = prompts.index(entry["prompt"]), entry["seed"]
            file = folder / f"{number:02d}_seed{seed}_{title}.png"
            save_png(Image.fromarray(picture), file)
            entry[title] = str(file)
    titles = {"without": "without the LoRA", "with": f"with it: {trained}"}
    blocks = [(titles[title], drawn) for title, drawn in pictures.items()]
    save_png(sheet([prompt for prompt, _ in rows], blocks), page)
    print(f"side by side  {page}")
    if len(prompts) > ROWS or len(rows) > COLUMNS * len(prompts):
        print(f"              (the first {ROWS} prompts and {COLUMNS} seeds)")
    print(f"one by one    {folder}")
    return files


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = CommandParser(
        prog="b2ray sample",
        description="Draw pictures with and without a run's LoRA from the same seeds, with the "
        "steps that training takes. What is not given is as in the run's configuration.",
    )
    add_run(parser)
    parser.add_argument(
        "--prompt",
        action="append",
        default=[],
        metavar="TEXT",
        help="what is drawn; may be given several times",
    )
    add_prompts(parser)
    parser.add_argument(
        "--seed",
        type=whole(0),
        default=0,
        metavar="N",
        help="seed of the first picture of each prompt (default: %(default)s)",
    )
    parser.add_argument(
        "--count",
        type=whole(1),
        default=4,
        metavar="N",
        help="pictures of each prompt, with the seeds from --seed on (default: %(default)s)",
    )
    add_sampling(parser)
    parser.add_argument(
        "--output",
        metavar="PATH",
        help="a .png file for the sheet, or a folder (default: a new one in RUN/samples); files "
        "of the same names are replaced",
    )
    parser.add_argument(
        "--device",
        default="auto",
        metavar="NAME",
        help="cpu, cuda, cuda:1, …; auto, the default, takes a GPU if there is one",
    )
    add_json(parser)
    return parser
