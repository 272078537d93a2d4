"""Checks that every layout of this machine's ranks computes what one rank computes."""

import json
import logging
import math
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from evspan.conf.errors import UserError
from evspan.conf.text import plural
from evspan.launch.local.ranks import run_ranks
from evspan.pipeline.engine.layouts import DeviceInfo, LayoutResult
from evspan.pipeline.parallel.gpus import VISIBLE_DEVICES, gpu_count

LEAST_TOLERANCE = 1e-5  # relative difference between layouts
ROUNDING_FACTOR = 5  # the tolerance is at least this many times the effect of rounding
LARGEST_ROUNDING = 1e-3  # a larger effect is not rounding
MAX_RANKS = 64
MAX_STEPS = 100

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SmokeOptions:
    """What to train.

    Attributes:
        ranks: number of processes, with a GPU each if there are enough.
        steps: optimizer steps per layout.
    """

    ranks: int = 2
    steps: int = 3

    def __post_init__(self) -> None:
        if not 1 <= self.ranks <= MAX_RANKS:
            raise UserError(f"--ranks is {self.ranks}; give 1 to {MAX_RANKS}")
        if not 2 <= self.steps <= MAX_STEPS:
            raise UserError(
                f"--steps is {self.steps}; give 2 to {MAX_STEPS}: runs are resumed half way"
            )


@dataclass(frozen=True)
class SmokeResult:
    """The result of `run_smoke`.

    Attributes:
        exit_code: of the ranks; 0 if all ended well.
        device: None if the ranks ended before they reported it.
        layouts: the reference, the same with other rounding, then the layouts of all ranks.
        seconds: duration of the whole test.
    """

    exit_code: int
    device: DeviceInfo | None
    layouts: list[LayoutResult]
    seconds: float

    @property
    def is_complete(self) -> bool:
        """Whether there is something to compare."""
        return self.device is not None and len(self.layouts) > 1

    @property
    def exact_resume(self) -> bool:
        """Whether resuming must give the same bits, as it does on CPUs."""
        return self.device is not None and not self.device.gpus

    def tolerances(self) -> "Tolerances":
        """The differences that the layouts may have."""
        return tolerances(self.layouts[1])

    def verdicts(self) -> list["Verdict"]:
        """A verdict per layout; empty if there is nothing to compare."""
        if not self.is_complete:
            return []
        allowed = self.tolerances()
        return [judge(layout, allowed, exact=self.exact_resume) for layout in self.layouts]

    @property
    def passed(self) -> bool:
        """Whether all layouts were trained and compute what one rank computes."""
        verdicts = self.verdicts()
        return not self.exit_code and bool(verdicts) and all(v.passed for v in verdicts)


class Tolerances(NamedTuple):
    """Relative differences of losses and gradients: allowed ones, and the effect of rounding."""

    loss: float
    gradients: float
    loss_rounding: float
    gradients_rounding: float


def tolerances(rounding: LayoutResult) -> Tolerances:
    """The allowed differences, from the effect of rounding on this machine.

    In float32, another order of summation changes gradients by about 1e-5, and through Adam the
    losses of later steps.

    Args:
        rounding: one rank that takes its frames one by one instead of all at once.
    """
    return Tolerances(
        loss=_tolerance(rounding.loss),
        gradients=_tolerance(rounding.gradients),
        loss_rounding=rounding.loss,
        gradients_rounding=rounding.gradients,
    )


def _tolerance(rounding: float) -> float:
    if math.isnan(rounding):
        return LEAST_TOLERANCE
    return max(LEAST_TOLERANCE, ROUNDING_FACTOR * min(rounding, LARGEST_ROUNDING))


class Verdict(NamedTuple):
    """Whether a layout computes what one rank computes, in each of four comparisons."""

    loss: bool
    gradients: bool
    resumed: bool
    resumed_other: bool

    @property
    def passed(self) -> bool:
        """Whether it does in all of them."""
        return all(self)


def judge(result: LayoutResult, allowed: Tolerances, *, exact: bool) -> Verdict:
    """Compares a layout's differences with the allowed ones; NaN fails.

    Args:
        exact: whether resuming on the same layout must give the same bits.
    """
    return Verdict(
        loss=result.loss <= allowed.loss and not result.skipped,
        gradients=result.gradients <= allowed.gradients,
        resumed=result.resumed <= (0.0 if exact else allowed.loss),
        resumed_other=result.resumed_other <= allowed.loss,
    )


def run_smoke(options: SmokeOptions, folder: Path) -> SmokeResult:
    """Prepares simulated data, trains one rank, then all layouts of `options.ranks` ranks.

    Args:
        folder: empty; gets the data, the runs and the results.

    Raises:
        UserError: the data could not be simulated.
    """
    started = time.perf_counter()
    variables = device_variables(gpu_count(os.environ), options.ranks)
    logger.info("making recordings and frames in %s", folder)
    make_data(folder, options.ranks)
    device: DeviceInfo | None = None
    layouts: list[LayoutResult] = []
    exit_code = 0
    for world_size in sorted({1, options.ranks}):
        logger.info("training on %s", plural(world_size, "rank"))
        exit_code = _train(options, folder, world_size, variables)
        reported_device, results = read_results(results_file(folder, world_size))
        device = device or reported_device
        layouts += results
        if exit_code:
            break
    return SmokeResult(exit_code, device, layouts, time.perf_counter() - started)


def device_variables(gpus: int, ranks: int) -> dict[str, str]:
    """The environment variables that let all worlds use the same device.

    With fewer GPUs than ranks, that is the CPU, which is logged.
    """
    if not 0 < gpus < ranks:
        return {}
    logger.info(
        "this machine has %s for %d ranks, so the test runs on the CPU; --ranks %d uses the GPUs",
        plural(gpus, "GPU"),
        ranks,
        gpus,
    )
    return {VISIBLE_DEVICES: ""}


def _train(
    options: SmokeOptions, folder: Path, world_size: int, variables: Mapping[str, str]
) -> int:
    """Runs the ranks of a world; returns their exit code. variables: of their environment."""
    threads = max(1, len(os.sched_getaffinity(0)) // options.ranks)
    command = [sys.executable, "-m", "evspan.launch.smoke_rank", str(folder)]
    command += [str(options.ranks), str(options.steps), str(threads)]
    return run_ranks(command, world_size, threads=threads, variables=variables)


def make_data(folder: Path, ranks: int) -> None:
    """Writes FOLDER/shards from simulated recordings of a small sensor.

    Raises:
        UserError: a command failed.
    """
    raw = folder / "raw"
    simulate = ["simulate", str(raw), "--recordings", f"train={ranks + 2},val=1"]
    simulate += ["--seconds", "2", "--width", "256", "--height", "192"]
    simulate += ["--objects", "2,4", "--processes", "1"]
    prep = ["prep", f"source={raw}", f"output={folder / 'shards'}"]
    prep += ["dataset=simulated", "frames.downsample=2", "processes=1"]
    for arguments in (simulate, prep):
        _run_evspan(arguments)


def _run_evspan(arguments: Sequence[str]) -> None:
    command = [sys.executable, "-m", "evspan.launch", *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        lines = (result.stderr or result.stdout).strip().splitlines()
        reason = lines[-1] if lines else f"exit code {result.returncode}"
        raise UserError(f"evspan {arguments[0]} failed: {reason.removeprefix('error: ')}")


# -- results of the ranks --------------------------------------------------------------------------
def results_file(folder: Path, world_size: int) -> Path:
    """The file that rank 0 of a world writes: a DeviceInfo, then a LayoutResult a line, as JSON."""
    return folder / f"results-{world_size}.jsonl"


def read_results(path: Path) -> tuple[DeviceInfo | None, list[LayoutResult]]:
    """The contents of a results file, which may be missing or end early."""
    if not path.exists():
        return None, []
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    if not lines:
        return None, []
    device, *layouts = lines
    return DeviceInfo(**device), [LayoutResult(**layout) for layout in layouts]
