"""What a run asks of Ray: the roles of its actors, their resources, and a session for them."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from b2ray.actors.learner import Learner
from b2ray.actors.messages import Place, Request, request
from b2ray.actors.sampler import Sampler
from b2ray.actors.scorer import Scorer
from b2ray.algorithm.cost import plan_cost
from b2ray.config import Config
from b2ray.fleet.capacity import ResourceRequest, refuse_shortage
from b2ray.fleet.session import MIN_OBJECT_STORE, StopFlag, session
from b2ray.fleet.slots import Role
from b2ray.fleet.teams import most, team_maker
from b2ray.prompts import PromptSets

SCORER = "scorer"


def scorer_roles(config: Config) -> dict[str, list[str]]:
    """The names of the rewards that each role of scorers loads, in the order of the rewards.

    Rewards share the role `scorer`; one with `workers` has a role of its own.
    """
    roles: dict[str, list[str]] = {}
    for reward in config.all_rewards:
        role = SCORER if reward.workers is None else f"{SCORER} {reward.name}"
        roles.setdefault(role, []).append(reward.name)
    return roles


def resource_requests(config: Config, trains: bool = True) -> list[ResourceRequest]:
    """What each role of a run asks for; a run that does not train has no learner."""
    fleet = config.fleet
    learner, samplers, shared = fleet.learner, fleet.samplers, fleet.scorers
    requests = []
    if trains:
        ranks = config.learner.ranks
        requests.append(
            ResourceRequest(
                "learner", "fleet.learner", 1, 1, learner.cpus, learner.gpus, {}, together=ranks
            )
        )
    low, high = samplers.min, None if samplers.max == "auto" else samplers.max
    requests.append(
        ResourceRequest("sampler", "fleet.samplers", low, high, samplers.cpus, samplers.gpus, {})
    )
    if SCORER in scorer_roles(config):
        n = shared.count
        requests.append(
            ResourceRequest(SCORER, "fleet.scorers", n, n, shared.cpus, shared.gpus, {})
        )
    for reward in config.all_rewards:
        own = reward.workers
        if own is not None:
            role, field = f"{SCORER} {reward.name}", f"the workers of reward {reward.name!r}"
            requests.append(
                ResourceRequest(
                    role, field, own.count, own.count, own.cpus, own.gpus, own.runtime_env
                )
            )
    return requests


def run_session(
    config: Config, together: int = 1, trains: bool = True
) -> contextlib.AbstractContextManager[StopFlag]:
    """Ray for a run's actors (`fleet.session`).

    Args:
        config: the run's configuration.
        together: how many such runs go side by side.
        trains: whether they have a learner.
    """
    requests = resource_requests(config, trains)
    cpus = sum((r.most or r.least) * r.together * r.cpus for r in requests)
    # Two stages' objects of every run, and on a laptop, whose stages are a few megabytes, no less
    # than Ray works well with.
    store = max(MIN_OBJECT_STORE, 2 * plan_cost(config).bytes_per_stage)
    return session(config.fleet.address, cpus * together, store * together)


def refuse_small_cluster(config: Config, trains: bool = True) -> None:
    """Refuse a cluster on which the run's actors cannot all be placed (`refuse_shortage`)."""
    refuse_shortage(resource_requests(config, trains), config.fleet.wait_for_nodes)


def roles(config: Config, prompts: PromptSets, requests: Sequence[ResourceRequest]) -> list[Role]:
    """The roles of a run's actors, with what loads each and what gives it weights.

    Args:
        config: the run's configuration.
        prompts: samplers encode all of them ahead, the learner those that are trained on.
        requests: what each role asks for.

    Raises:
        ConfigError: Ray refuses a role's runtime environment.
    """
    trained = list(prompts.trained())
    evaluated = [p for texts in prompts.evaluated().values() for p in texts]
    sampled = list(dict.fromkeys([*evaluated, *trained]))
    scorers = scorer_roles(config)

    def load_sampler(places: Sequence[Place]) -> list[Request]:
        return [request(Sampler.load, config, sampled)]

    def load_learner(places: Sequence[Place]) -> list[Request]:
        if len(places) == 1:
            return [request(Learner.load, config, trained)]
        address = f"{places[0].address}:{places[0].port}"
        return [
            request(Learner.load, config, trained, rank, address) for rank in range(len(places))
        ]

    def role(wanted: ResourceRequest) -> Role:
        size = most(wanted, requests)
        if wanted.role == "sampler":
            return Role(
                wanted,
                size,
                team_maker(Sampler, wanted),
                load_sampler,
                bind=lambda w: request(Sampler.bind, w.version, w.lora),
            )
        if wanted.role == "learner":
            return Role(
                wanted,
                size,
                team_maker(Learner, wanted),
                load_learner,
                bind=lambda w: request(Learner.restore, w.version, w.lora, w.optimizer),
            )
        load_scorer = request(Scorer.load, config, scorers[wanted.role])
        return Role(wanted, size, team_maker(Scorer, wanted), lambda _: [load_scorer])

    return [role(wanted) for wanted in requests]
