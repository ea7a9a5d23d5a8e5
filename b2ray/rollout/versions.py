"""Policy versions: which is the newest, from which one samplers sample, and who has bound what."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ray

from b2ray.actors.learner import Learner
from b2ray.actors.messages import Answer, Bound, request
from b2ray.actors.worker import UNBOUND
from b2ray.diffusion.lora_file import State, digest
from b2ray.fleet.plans import SingleCall
from b2ray.fleet.slots import Weights
from b2ray.rollout.workers import Workers


class PolicyVersions:
    """The versions of the policy that are still in use. Nothing else decides who binds which.

    The driver keeps its own copy of each: an object of the learner's would go with its node.

    Args:
        workers: who binds them.
        max_lag: how many versions older than the newest may still be sampled from.
    """

    def __init__(self, workers: Workers, max_lag: int) -> None:
        self._workers, self._max_lag = workers, max_lag
        self._versions: dict[int, Weights] = {}
        self._arrays: tuple[State, State] | None = None

    @property
    def newest(self) -> Weights:
        """The newest version."""
        return self._versions[max(self._versions)]

    @property
    def newest_number(self) -> int:
        """Its number; `UNBOUND` where no weights were ever bound, which is the base model."""
        return max(self._versions, default=UNBOUND)

    @property
    def arrays(self) -> tuple[State, State]:
        """The newest version's LoRA and optimizer state, by parameter name."""
        assert self._arrays is not None, "no version was published yet"
        return self._arrays

    def start(self) -> None:
        """Publish version 0: the learner's fresh LoRA."""
        doing = "reading the first weights"
        self._workers.run(SingleCall("learner", request(Learner.state), doing, self.take))
        self.publish()

    def restore(
        self, version: int, bound: str, weights: State, optimizer: State, before: State | None
    ) -> None:
        """Publish a committed version.

        Args:
            version: its number.
            bound: its digest.
            weights: its LoRA.
            optimizer: its optimizer's state.
            before: the LoRA of the version before it, from which a stage that lags is sampled;
                None if it is not known.
        """
        if before is not None:
            refs = ray.put(dict(before)), ray.put({})
            self._versions[version - 1] = Weights(version - 1, digest(before), *refs)
        self._add(version, bound, dict(weights), dict(optimizer))
        self.publish()

    def take(self, answer: Answer, results: Sequence[Any]) -> None:
        """Take a version that the learner made: its answer, its LoRA, its optimizer's state."""
        assert isinstance(answer, Bound)
        lora, optimizer = results
        self._add(answer.receipt.version, answer.digest, lora, optimizer)

    def publish(self) -> None:
        """Wait until the fleet has bound the newest version, proven by its digest."""
        self._workers.gauges.phase("syncing")
        self.sample_from(self.newest.version)
        self._workers.wait_for_weights()

    def sample_from(self, version: int) -> None:
        """Have samplers bind a version before their next work."""
        self._workers.roster.weights["sampler"] = self._versions[version]

    def _add(self, version: int, bound: str, lora: State, optimizer: State) -> None:
        refs = ray.put(lora), ray.put(optimizer)
        # Read back, the arrays are those in shared memory and not a second copy.
        self._arrays = ray.get(refs[0]), ray.get(refs[1])
        self._versions[version] = Weights(version, bound, *refs)
        for old in sorted(self._versions)[: -1 - self._max_lag]:
            del self._versions[old]
        self._workers.roster.weights["learner"] = self._versions[version]
