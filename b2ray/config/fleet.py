"""Settings that do not change the result: the fleet's sizes and time limits, and tracking."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from b2ray.config.rewards import Workers
from b2ray.config.section import Name, Positive, Section


class Samplers(Section):
    """How many samplers there are, and what each of them reserves."""

    min: Positive = 1
    """Samplers without which the run does not go on."""
    max: Positive | Literal["auto"] = 2
    """Samplers that are asked for. Those that fit on no node wait for one, which an autoscaler sees
    as demand. `auto`: as many as the nodes have room for, one per free GPU, as nodes come and
    go."""
    cpus: float = Field(0.5, ge=0)
    """Logical CPUs that Ray reserves for each."""
    gpus: float = Field(0.0, ge=0)
    """GPUs (or a fraction) for each; 0 runs on the CPU."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.max == "auto" and self.cpus == self.gpus == 0:
            raise ValueError("max is auto, but cpus and gpus are 0: any number has room; set one")
        if self.max != "auto" and self.max < self.min:
            raise ValueError(f"max is {self.max}, below min, which is {self.min}: raise max")
        return self


class LearnerWorker(Section):
    """What each rank of the learner reserves."""

    cpus: float = Field(0.5, ge=0)
    """Logical CPUs that Ray reserves for each rank of the learner."""
    gpus: float = Field(0.0, ge=0)
    """GPUs (or a fraction) for each rank of the learner; 0 runs on the CPU."""


class Fleet(Section):
    """Numbers of actors, what they reserve, and time limits; nothing here changes the result."""

    samplers: Samplers = Samplers()
    scorers: Workers = Workers(count=1, cpus=0.25)
    learner: LearnerWorker = LearnerWorker()
    address: str | None = None
    """A Ray cluster to join; empty starts Ray here, or joins the job's own (RAY_ADDRESS)."""
    wait_for_nodes: float = Field(0.0, ge=0)
    """Seconds to wait for nodes that an autoscaler still has to start; 0 refuses a cluster without
    room for the run at once."""
    start_timeout: float = Field(300.0, gt=0)
    """Seconds that an actor may take to start, and again to load its model."""
    stall_timeout: float = Field(900.0, gt=0)
    """Stop if nothing has finished for this many seconds."""
    retries: int = Field(3, ge=0)
    """How often a call is repeated after its worker died, and how often in a row a worker is
    restarted."""
    max_deaths: Positive = 50
    """Deaths of workers within `death_window` after which the run gives up."""
    max_preemptions: Positive = 1000
    """The same for deaths of workers whose node was taken away."""
    death_window: float = Field(600.0, gt=0)
    """Seconds over which deaths are counted."""


class Tracking(Section):
    """Logging to MLflow, and the trace of a stage."""

    uri: str | None = None
    """Tracking server, without a password; empty means MLFLOW_TRACKING_URI, else a SQLite file
    beside the runs."""
    experiment: str = "b2ray"
    """MLflow experiment."""
    trace: Positive | None = None
    """A stage, counted from 1, whose work is traced: every actor writes what its processor or GPU
    did to runs/NAME/traces, for chrome://tracing or ui.perfetto.dev. Costs time in that stage."""
    parent: str | None = None
    """Id of the MLflow run that this one belongs to; a sweep sets it for its trials."""
    register_as: Name | None = None
    """Name in MLflow's model registry under which a finished run's LoRA becomes the next version;
    empty: it is logged with the run and not registered."""
    system: float = Field(10.0, ge=0, le=3600)
    """Seconds between readings of how busy every machine of the run is (processors, memory, GPUs,
    disk, network), MLflow's system metrics; 0: none."""
