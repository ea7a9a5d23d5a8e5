"""The scorer: rates pictures with every reward of the run."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from b2ray.actors.worker import Receipt, Worker, device, guarded
from b2ray.config import Config
from b2ray.rewards import Panel


class Scorer(Worker):
    """The trained and the held-out rewards on one device."""

    role = "scorer"

    @guarded("loading the rewards")
    def load(self, config: Config) -> Receipt:
        """Load every reward of the run."""
        began = time.perf_counter()
        specs = [*config.rewards, *config.evaluation.heldout_rewards]
        self.panel = Panel(specs, device(config.cpu_threads))
        return self.receipt(began)

    @guarded("scoring pictures")
    def score(
        self, images: np.ndarray, prompts: Sequence[str], names: Sequence[str], embed: bool
    ) -> Receipt:
        """Scores by reward name, float32 (N,), and embeddings if asked for, in the receipt."""
        began = time.perf_counter()
        scores = self.panel.score(images, prompts, names)
        embeddings = self.panel.embed(images) if embed else None
        return self.receipt(began, scores=scores, embeddings=embeddings)
