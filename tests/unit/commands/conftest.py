"""Runs to export and sample from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from b2ray.config import Lora
from b2ray.diffusion import lora
from tests.models import pipeline, random_lora, trained_run

LORA = {"model__lora__rank": 2, "model__lora__alpha": 3.0}


@pytest.fixture(scope="session")
def weights() -> dict[str, np.ndarray]:
    """A LoRA for the small model."""
    unet = pipeline().unet
    lora.add(unet, Lora(rank=2, alpha=3.0), 0)
    return random_lora(lora.state(unet))


@pytest.fixture(scope="session")
def runs(models: Path, weights, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs `done` (3 stages), `going` (2 of 3) and `begun` (none)."""
    folder = tmp_path_factory.mktemp("trained")
    for name, stages in (("done", 1), ("going", 2), ("begun", 0)):
        done = name == "done"
        trained_run(models, folder, name, *[weights] * stages, finished=done, **LORA)
    return folder
