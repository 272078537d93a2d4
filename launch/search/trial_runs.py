"""How a controller starts, observes and stops the runs of trials: on SLURM or on this machine."""

from dataclasses import dataclass
from typing import Protocol

from evspan.launch.search.study import Trial
from evspan.launch.sweep.plan import PlannedRun
from evspan.launch.sweep.state import State


@dataclass(frozen=True)
class Observation:
    """A run at one moment.

    active: whether it waits or runs, so that it may still change. reason: how it ended, or its
    error; may be empty.
    """

    state: State
    active: bool
    reason: str = ""


class TrialRuns(Protocol):
    """Starts and stops the runs of trials.

    Attributes:
        most_active: runs at the same time.
    """

    most_active: int

    def is_started(self, trial: Trial, run: PlannedRun) -> bool:
        """Whether the run of a trial was started and recorded, by an earlier controller too."""

    def start(self, trial: Trial, run: PlannedRun) -> None:
        """Starts the run, or continues it from its newest checkpoint."""

    def observe(self, runs: list[PlannedRun]) -> list[Observation] | None:
        """The runs in the same order; None where they cannot be observed now."""

    def prune(self, run: PlannedRun, reason: str) -> None:
        """Records that a run is pruned, and asks it to save and end. Called until it has ended."""

    def cancel(self, runs: list[PlannedRun], reason: str) -> None:
        """Ends runs for good and records it."""

    def leave(self) -> str:
        """The controller ends. Runs that can go on without it do.

        Returns:
            What has become of them, such as 'and its jobs go on'.
        """
