"""The scorer: rates pictures with rewards that share its process."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from b2ray.actors.worker import Receipt, Worker, device, guarded
from b2ray.config import Config
from b2ray.rewards import Panel


class Scorer(Worker):
    """Some of the run's rewards, trained on or held out, on one device."""

    role = "scorer"

    @guarded("loading the rewards")
    def load(self, config: Config, names: Sequence[str]) -> Receipt:
        """Load the rewards of these names."""
        mark = self.mark()
        self.observe(config)
        specs = [r for r in config.all_rewards if r.name in names]
        self.panel = Panel(specs, device(config.cpu_threads))
        return self.receipt(mark)

    @guarded("scoring pictures")
    def score(
        self, images: np.ndarray, prompts: Sequence[str], names: Sequence[str], embed: bool
    ) -> Receipt:
        """Scores by reward name, float32 (N,), and embeddings if asked for, in the receipt.

        Of `names` those that are loaded here are scored.
        """
        mark = self.mark()
        mine = [n for n in names if n in self.panel.rewards]
        scores = self.panel.score(images, prompts, mine)
        embeddings = self.panel.embed(images) if embed else None
        return self.receipt(mark, scores=scores, embeddings=embeddings)
