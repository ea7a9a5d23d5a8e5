"""What actors answer: one frozen dataclass for each kind of call, and how calls are named.

An answer is small. Large arrays are further results of the same call, so that they stay in Ray's
object store and the driver sees that a call succeeded without fetching them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Concatenate, ParamSpec

import numpy as np

from b2ray.actors.system_metrics import Reading

P = ParamSpec("P")


@dataclass(frozen=True)
class Receipt:
    """What every call tells of itself.

    Attributes:
        role: the role of the actor, such as `sampler`.
        where: its host and process.
        version: the policy version that the actor has bound.
        seconds: how long the call took.
        unet_evals: guided UNet evaluations of one latent that it made.
        unet_seconds: of `seconds` those in which the device computed the UNet.
        peak: bytes of memory that the process has had at most: of the GPU if it has used one.
        readings: system metrics of the actor's machine since the receipt before.
    """

    role: str
    where: str
    version: int
    seconds: float
    unet_evals: int = 0
    unet_seconds: float = 0.0
    peak: int = 0
    readings: tuple[Reading, ...] = ()


@dataclass(frozen=True)
class Answer:
    """The first result of every call; of a call that has nothing else to tell, all of it."""

    receipt: Receipt


@dataclass(frozen=True)
class Place:
    """Where an actor runs.

    Attributes:
        node: Ray's id of the node.
        host: name of the machine.
        pid: id of the process.
        address: of the node, for other nodes.
        port: a port of the node that was free a moment ago.
        gpus: ids of the GPUs that Ray reserved.
        log: file that the process's standard error goes to; empty if unknown.
    """

    node: str
    host: str
    pid: int
    address: str
    port: int
    gpus: tuple[str, ...]
    log: str

    def __str__(self) -> str:
        return f"{self.host} (pid {self.pid}, node {self.node[:6]})"


@dataclass(frozen=True)
class Placed(Answer):
    """An actor has started."""

    place: Place


@dataclass(frozen=True)
class Bound(Answer):
    """Weights are in the model; `digest` is that of what is bound there."""

    digest: str


@dataclass(frozen=True)
class SamplerLoaded(Answer):
    """A sampler has its model.

    Attributes:
        device: torch's name of the device.
        picture_size: (height, width) of the pictures, in pixels.
        too_long: the prompts whose end the tokenizer cuts off.
    """

    device: str
    picture_size: tuple[int, int]
    too_long: Sequence[str]


@dataclass(frozen=True)
class LearnerLoaded(Answer):
    """A learner has its model.

    Attributes:
        parameters: how many numbers of the LoRA are trained.
        elements: how many elements a latent has.
    """

    parameters: int
    elements: int


@dataclass(frozen=True)
class PrefixesMade(Answer):
    """The prefixes of a unit's groups were denoised, or its demonstrations encoded.

    Attributes:
        nbytes: of the latents that came with the answer.
    """

    nbytes: int


@dataclass(frozen=True)
class BranchesMade(Answer):
    """Leaves of a unit were denoised, or trajectories to its demonstrations made.

    Attributes:
        nbytes: of the trajectories that came with the answer.
        picture_nbytes: of the pictures that came with it.
        thumbnails: small picture files by (position of the group in the unit, branch); the branch
            `diffusion.pictures.FORK` stands for the prefix's own picture.
        divergences: of each demonstration, how far the policy is from it
            (`Policy.demonstrate`), in nats.
    """

    nbytes: int = 0
    picture_nbytes: int = 0
    thumbnails: Mapping[tuple[int, int], bytes] = field(default_factory=dict)
    divergences: Sequence[float] = ()


@dataclass(frozen=True)
class Scored(Answer):
    """Pictures were rated.

    Attributes:
        scores: by reward, float32, shape (N,).
        embeddings: unit vectors, float32, shape (N, D); None if none were asked for, or no reward
            of the actor has them.
    """

    scores: Mapping[str, np.ndarray]
    embeddings: np.ndarray | None


@dataclass(frozen=True)
class Updated(Bound):
    """A stage was trained on; `figures` are the update's, by the names of metrics.jsonl."""

    figures: Mapping[str, float]


@dataclass(frozen=True)
class DryRun(Answer):
    """What an update would have seen: mean |ratio - 1| of each trained step before it."""

    drift: Mapping[int, float]


@dataclass(frozen=True)
class CallTimed(Answer):
    """Seconds of one UNet call; None if there is no memory for it."""

    seconds: float | None


@dataclass(frozen=True)
class Memory:
    """The most memory that a process has used so far.

    Attributes:
        where: the process.
        device: whose memory it is: a GPU, or the machine's main memory.
        peak: bytes.
        total: bytes that the device has.
    """

    where: str
    device: str
    peak: int
    total: int


@dataclass(frozen=True)
class Request:
    """A method of an actor's class with its arguments, to be called on any actor of that class.

    Attributes:
        objects: how many results the call has beside its answer.
    """

    method: str
    args: tuple[Any, ...]
    objects: int = 0

    def with_objects(self, count: int) -> Request:
        """The same call where its arguments say how many further results it has."""
        return replace(self, objects=count)


def request(
    method: Callable[Concatenate[Any, P], Any], *args: P.args, **kwargs: P.kwargs
) -> Request:
    """The request to call a method, such as `request(Sampler.bind, 3, weights)`.

    mypy holds the arguments against the method's own; in the place of an array a Ray reference to
    it may stand, which is `Any` to mypy. Arguments are passed by position.
    """
    assert not kwargs, f"{method.__name__} takes its arguments by position"
    return Request(method.__name__, args, getattr(method, "objects", 0))
