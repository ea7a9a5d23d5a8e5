"""The ways a run ends early, and the exit code each one has."""

from __future__ import annotations

EXIT_DONE = 0
EXIT_CONFIG = 2
EXIT_WORKER = 3
EXIT_STOPPED = 75  # sysexits.h EX_TEMPFAIL: try again, the run is resumable


class ConfigError(Exception):
    """The configuration or the cluster cannot do what is asked: one sentence with the remedy."""


class WorkerError(Exception):
    """A worker failed in a way that trying again cannot mend. Keeps the first cause as text.

    Plain strings only, so that it crosses process boundaries even where the original exception
    cannot be pickled.
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
    """Another rank of the learner is gone or late: the first cause is with that one."""


class Stopped(Exception):
    """A signal asked the run to stop; the last committed stage stands."""
