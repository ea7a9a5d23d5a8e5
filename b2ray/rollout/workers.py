"""The workers of one run, and the fleet that keeps them alive."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from b2ray.actors.messages import (
    CallTimed,
    LearnerLoaded,
    Memory,
    Request,
    SamplerLoaded,
    request,
)
from b2ray.actors.system_metrics import Reading
from b2ray.actors.worker import Worker
from b2ray.config import Config
from b2ray.fleet.dispatch import Dispatcher, Plan
from b2ray.fleet.gauges import Gauges
from b2ray.fleet.plans import OnEach, Ready
from b2ray.fleet.roster import Event, Roster
from b2ray.fleet.session import StopFlag
from b2ray.fleet.tracing import Tracing
from b2ray.prompts import PromptSets
from b2ray.rollout.roles import resource_requests, roles, scorer_roles

STARTS_WITHIN = 60.0  # seconds after which an actor that has no node counts as one without room


class Workers:
    """Samplers, scorers and the learner of one run.

    Attributes:
        scorers: the rewards that each role of scorers has loaded.
        roster: their slots.
        dispatcher: what drives plans on them.
        gauges: what operators see of them.
        tracing: has them traced in one stage.

    Args:
        config: the run's configuration.
        prompts: what is sampled and trained on; all are encoded ahead.
        stop: asked about every second while the workers are at work.
        trains: whether there is a learner; without one the workers can only evaluate.
        on_event: called when something happens to a slot.
        on_readings: called with the system metrics of the workers' machines.
    """

    def __init__(
        self,
        config: Config,
        prompts: PromptSets,
        stop: StopFlag,
        trains: bool = True,
        on_event: Callable[[Event], object] = lambda _: None,
        on_readings: Callable[[Sequence[Reading]], object] = lambda _: None,
    ) -> None:
        self.config, self.scorers = config, scorer_roles(config)
        self._requests = resource_requests(config, trains)
        self.gauges = Gauges(config.name, timed=self.scorers)
        self.roster = Roster(roles(config, prompts, self._requests), config.fleet, on_event)
        self.dispatcher = Dispatcher(
            self.roster, stop, config.fleet.stall_timeout, self.gauges.update, on_readings
        )
        self.tracing = Tracing(self.roster, config.tracking.trace, config.fleet.stall_timeout)
        self.gauges.phase("starting")

    def run(self, *plans: Plan) -> None:
        """Drive plans to their ends (`Dispatcher.run`)."""
        self.dispatcher.run(*plans)

    def wait_for_weights(self) -> None:
        """Wait until the least of every role is loaded and all have bound their weights."""
        self.run(Ready(self.roster))

    def wait_for_all(self) -> None:
        """The same also for slots beyond the least, if there are nodes for them."""
        self.run(Ready(self.roster, patience=STARTS_WITHIN))

    def close(self) -> None:
        """End the actors."""
        self.roster.close()

    # --- what they tell ------------------------------------------------------------------------

    @property
    def sampler(self) -> SamplerLoaded:
        """What a sampler told when it had loaded its model."""
        answer = self.roster.loaded_answers["sampler"]
        assert isinstance(answer, SamplerLoaded)
        return answer

    @property
    def learner(self) -> LearnerLoaded:
        """What the learner told when it had loaded its model."""
        answer = self.roster.loaded_answers["learner"]
        assert isinstance(answer, LearnerLoaded)
        return answer

    def memory(self) -> dict[str, Memory]:
        """The most memory that each actor has used so far, by its slot."""
        return self.roster.memory()

    def time_call(self, role: str, rows: int) -> float | None:
        """Seconds of one UNet call of so many latents, while all actors of the role are as busy.

        The learner's includes the backward pass.

        Returns:
            The slowest actor's; None if one has no memory for it.
        """
        asked: Request = request(Worker.time_call, rows, role == "learner")
        count = len(self.roster.ready(role))
        plan = OnEach(role, count, asked, f"timing a call of {rows} latents")
        self.run(plan)
        seconds = [a.seconds for a in plan.answers if isinstance(a, CallTimed)]
        known = [s for s in seconds if s is not None]
        return max(known) if len(known) == len(seconds) else None

    def figures(self, images_per_second: float) -> dict[str, float]:
        """The state of the fleet, and a stage's throughput, also per GPU that is in use."""
        gpus = {r.role: r.gpus * r.together for r in self._requests}
        used = sum(gpus[s.role.name] for s in self.roster.slots if s.places)
        per_gpu = {"throughput/images_per_second_per_gpu": images_per_second / used} if used else {}
        return {
            **per_gpu,
            "throughput/images_per_second": images_per_second,
            "fleet/ready": float(len(self.roster.ready("sampler"))),
            "fleet/replaced": float(self.roster.replaced.total()),
        }
