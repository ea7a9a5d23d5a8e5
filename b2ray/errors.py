"""The errors that end a run early, and the exit codes of the commands."""

from __future__ import annotations

EXIT_DONE = 0
EXIT_CONFIG = 2
EXIT_WORKER = 3
EXIT_STOPPED = 75  # sysexits.h EX_TEMPFAIL: try again, the run is resumable


class ConfigError(Exception):
    """The configuration or the cluster is not fit for the task: one sentence with the remedy."""


class WorkerError(Exception):
    """A worker failed in a way that repeating its call cannot mend.

    It holds only strings, so that it can be sent to another process even if the original exception
    cannot be pickled.

    Attributes:
        role: the kind of worker, or one of them, such as `sampler 0`.
        where: the machine and the process.
        doing: what it was doing, such as `loading`.
        cause: the first cause.
        details: more about it, such as a trace; may be empty.
    """

    def __init__(self, role: str, where: str, doing: str, cause: str, details: str = "") -> None:
        super().__init__(role, where, doing, cause, details)
        self.role, self.where, self.doing, self.cause, self.details = (
            role,
            where,
            doing,
            cause,
            details,
        )

    def __str__(self) -> str:
        return f"{self.role} on {self.where} failed while {self.doing}: {self.cause}"


class RankLost(Exception):
    """Another rank of the learner has ended or is late, and the cause is to be looked for there."""


class Stopped(Exception):
    """A signal asked the run to stop; it can be resumed from its last committed stage."""
