"""The simulated datasets of the check, made in the background while the kernels are measured."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from gpu import processes


@dataclass(frozen=True)
class Plan:
    """What is simulated. size: (height, width) of the sensor."""

    train: int
    val: int
    seconds: float
    size: tuple[int, int]
    downsample: int


FULL = {
    "small": Plan(train=4, val=1, seconds=2, size=(192, 256), downsample=2),
    "gen4": Plan(train=8, val=2, seconds=3, size=(720, 1280), downsample=2),
    "learning": Plan(train=12, val=3, seconds=10, size=(720, 1280), downsample=4),
}
LONGEST_WAIT = 120  # seconds

# One dataset serves all parts.
TINY = {
    name: Plan(train=2, val=1, seconds=1, size=(192, 256), downsample=2)
    for name in ("small", "gen4", "learning")
}


class Datasets:
    """Starts simulations, and waits for one when it is used.

    Args:
        folder: receives them.
        plans: FULL or TINY.
        names: of the datasets to start now, in the order of need.
    """

    def __init__(self, folder: Path, plans: dict[str, Plan], names: Iterable[str]) -> None:
        self.folder = folder
        self.running: dict[str, processes.Started] = {}
        self.folders: dict[str, Path] = {}
        self.shards: dict[Path, Path] = {}  # by folder
        started: dict[Plan, str] = {}
        for name in names:
            plan = plans[name]
            first = started.setdefault(plan, name)
            self.folders[name] = folder / first
            if first == name:
                self.running[name] = processes.start_simulation(
                    self.folders[name],
                    train=plan.train,
                    val=plan.val,
                    seconds=plan.seconds,
                    size=plan.size,
                    downsample=plan.downsample,
                )
            else:
                self.running[name] = self.running[first]

    def __getitem__(self, name: str) -> Path:
        """The shards of a dataset, when they are complete."""
        folder = self.folders[name]
        if folder not in self.shards:
            self.running[name].wait(LONGEST_WAIT)
            self.shards[folder] = folder / "shards"
        return self.shards[folder]

    def close(self) -> None:
        """Ends the simulations that are still running."""
        for process in self.running.values():
            process.kill()
