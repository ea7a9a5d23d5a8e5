"""Common parts of the stages: settings, data, training, and atomic writing of folders."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from b2ray.shapes.captions import Caption, all_captions


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of a build.

    Attributes:
        out: folder of the weights.
        seed: seed of everything random.
        scale: factor on the steps and pictures of every stage: 1.0 for the shipped weights, and a
            few thousandths for a smoke test.
    """

    out: Path
    seed: int = 0
    scale: float = 1.0

    @property
    def base(self) -> Path:
        """Folder of the base pipeline."""
        return self.out / "base"

    @property
    def reward(self) -> Path:
        """Folder of the CLIP reward."""
        return self.out / "reward"

    @property
    def aesthetic(self) -> Path:
        """Folder of the aesthetic predictor."""
        return self.out / "aesthetic"

    @property
    def imagereward(self) -> Path:
        """Folder of the ImageReward."""
        return self.out / "imagereward"

    @property
    def facts(self) -> Path:
        """Folder of the measured figures, with one JSON file per stage."""
        return self.out / "facts"

    def count(self, full: int, least: int = 2) -> int:
        """The number of steps or pictures of this build, of ``full`` ones without scaling."""
        return max(least, round(full * self.scale))


def begin(settings: Settings, stage: int) -> np.random.Generator:
    """Limit torch to one thread, seed it, and make a numpy generator, both by (seed, stage)."""
    torch.set_num_threads(1)
    torch.manual_seed(settings.seed * 1_000 + stage)
    return np.random.default_rng((settings.seed, stage))


def draw_captions(count: int, rng: np.random.Generator) -> list[Caption]:
    """Draw captions uniformly, with replacement."""
    captions = all_captions()
    return [captions[i] for i in rng.integers(len(captions), size=count)]


def to_tensor(images: np.ndarray) -> torch.Tensor:
    """Convert uint8 ``(N, 32, 32, 3)`` to float32 ``(N, 3, 32, 32)`` from −1 to 1."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_pixels(images: torch.Tensor) -> np.ndarray:
    """Convert float ``(N, 3, H, W)`` from −1 to 1 to uint8 ``(N, H, W, 3)``."""
    levels = ((images.clamp(-1, 1) + 1) * 127.5).round()
    return levels.permute(0, 2, 3, 1).to(torch.uint8).numpy()


def train(
    name: str,
    parameters: list[torch.nn.Parameter],
    steps: int,
    rate: float,
    loss_of: Callable[[int], torch.Tensor],
    after: Callable[[int], None] | None = None,
) -> float:
    """Train with AdamW, a short warm-up, a cosine decay to zero, and gradients clipped to norm 1.

    Args:
        name: title of the progress bar.
        parameters: the parameters that are trained.
        steps: number of steps.
        rate: the highest learning rate.
        loss_of: computes the scalar loss of a step.
        after: called with the index of a step after the weights have been updated.

    Returns:
        The loss, averaged over the last tenth of the steps.
    """
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    warmup = min(100, steps // 10 + 1)
    recent: list[float] = []
    with tqdm(range(steps), desc=name, mininterval=2, smoothing=0.05) as bar:
        for step in bar:
            decay = 0.5 * (1 + np.cos(np.pi * step / steps))
            optimizer.param_groups[0]["lr"] = rate * min(1.0, (step + 1) / warmup) * decay
            loss = loss_of(step)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            if after:
                after(step)
            recent = [*recent, float(loss.detach())][-max(1, steps // 10) :]
            if step % 10 == 0:
                bar.set_postfix(loss=f"{np.mean(recent[-50:]):.4f}")
    return float(np.mean(recent))


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Yield an empty folder beside ``target``, which replaces it when the block succeeds.

    The path from which a configuration was loaded is removed from the folder's JSON files.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    fresh.mkdir()
    try:
        yield fresh
        for path in fresh.rglob("*.json"):
            _forget_origin(path)
        for path in fresh.rglob("*.safetensors"):
            path.chmod(0o644)  # safetensors writes files that only their owner may read
        if target.exists():
            old = target.with_name(f"{fresh.name}.old")
            os.rename(target, old)
            os.rename(fresh, target)
            shutil.rmtree(old)
        else:
            os.rename(fresh, target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def write_text(target: Path, text: str) -> None:
    """Write a file atomically: beside ``target``, to which it is then renamed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    fresh.write_text(text, encoding="utf-8")
    os.replace(fresh, target)


def _forget_origin(path: Path) -> None:
    """Remove the path from which a configuration was loaded."""
    config = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(config, dict) and config.pop("_name_or_path", None) is not None:
        write_text(path, json.dumps(config, indent=2) + "\n")
