"""The scorer: rates pictures with rewards that share its process."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from b2ray.actors.messages import Answer, Scored
from b2ray.actors.worker import Worker, device, remote_method
from b2ray.config import Config
from b2ray.rewards import Panel


class Scorer(Worker):
    """Some of the run's rewards, trained on or held out, on one device."""

    role = "scorer"

    @remote_method("loading the rewards")
    def load(self, config: Config, names: Sequence[str]) -> Answer:
        """Load the rewards of these names."""
        timer = self.timer()
        self.observe(config)
        specs = [r for r in config.all_rewards if r.name in names]
        self.panel = Panel(specs, device(config.cpu_threads))
        return Answer(self.receipt(timer))

    @remote_method("scoring pictures")
    def score(
        self, images: np.ndarray, prompts: Sequence[str], names: Sequence[str], embed: bool
    ) -> Scored:
        """Rate pictures with those rewards of `names` that are loaded here.

        Args:
            images: uint8, shape (N, height, width, 3).
            prompts: the prompt of each.
            names: rewards that are wanted.
            embed: whether embeddings are wanted, too.
        """
        timer = self.timer()
        loaded = [n for n in names if n in self.panel.rewards]
        scores = self.panel.score(images, prompts, loaded)
        embeddings = self.panel.embed(images) if embed else None
        return Scored(self.receipt(timer), scores, embeddings)
