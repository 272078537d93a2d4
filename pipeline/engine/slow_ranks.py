"""Names the ranks whose steps take longer than those of the others.

Rank 0 writes RUN/ranks.json at every logged step, from which `evspan status RUN --ranks` shows a
table:

    {"time": 1764338400.0, "step": 200, "ranks": [
      {"rank": 0, "host": "n1", "device": "GPU 0 NVIDIA H100", "pid": 17, "steps": 8,
       "own_ms": [80.1, 81.0, 85.2], "parts_ms": {"data": 0.1, "forward": 30.2, ...},
       "ratio": 1.0, "slow_since": null}]}
"""

import logging
import math
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from evspan.pipeline.engine.step_clock import OWN_PARTS, StepPart, StepTimes
from evspan.pipeline.history import SLOW_RANK, append_observation, write_ranks
from evspan.pipeline.parallel.reductions import gather_json
from evspan.pipeline.parallel.world import World

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RankPlace:
    """Where a rank runs. device: 'GPU 0 NVIDIA H100 80GB HBM3', or 'CPU'."""

    rank: int
    host: str
    device: str
    pid: int

    def __str__(self) -> str:
        """'rank 3 (node n2, GPU 1 NVIDIA H100 80GB HBM3)'."""
        return f"rank {self.rank} (node {self.host}, {self.device})"


def rank_places(world: World) -> list[RankPlace]:
    """Of all ranks, in their order. A collective."""
    device = "CPU"
    if world.device.type == "cuda":
        device = f"GPU {world.device.index} {torch.cuda.get_device_name(world.device)}"
    own: tuple[str, str, int] = (socket.gethostname(), device, os.getpid())
    gathered = gather_json(own, name="times of the ranks")
    return [RankPlace(rank, host, name, pid) for rank, (host, name, pid) in enumerate(gathered)]


def ratios(times: Sequence[StepTimes]) -> list[float]:
    """Each rank's median step time without waiting, over the median of all ranks'.

    NaN for a rank without measured steps.
    """
    medians = np.array([of_rank.median_ms for of_rank in times])
    known = medians[~np.isnan(medians)]
    if not len(known) or not np.median(known):
        return [math.nan] * len(times)
    return [float(ratio) for ratio in medians / np.median(known)]


def slowest_part(rank: int, times: Sequence[StepTimes]) -> tuple[StepPart, float]:
    """The part in which a rank loses most against the median of all ranks, and how many ms."""
    lost = {}
    for part in OWN_PARTS:
        of_ranks = [of_rank.part_ms(part) for of_rank in times]
        lost[part] = of_ranks[rank] - float(np.nanmedian(of_ranks))
    part = max(lost, key=lambda name: lost[name])
    return part, lost[part]


class SlowRanks:
    """Watches the ranks' times; on rank 0.

    A rank is slow when its steps take more than `factor` times the median of all ranks in all
    reports of the last `for_steps` steps. That is logged, and recorded in the history, once; and
    logged when it is over.

    Args:
        places: of all ranks.
        factor: 0: no rank is slow.
        first_step: of this attempt. Its own report, with what is compiled and allocated, does not
            count.
    """

    def __init__(
        self,
        run_dir: Path,
        places: Sequence[RankPlace],
        *,
        factor: float,
        for_steps: int,
        first_step: int,
    ) -> None:
        self.run_dir = run_dir
        self.places = places
        self.factor = factor
        self.for_steps = for_steps
        self.first_step = first_step
        self.reported_step = first_step - 1
        self.over_since: dict[int, int] = {}  # rank -> last step before it took too long
        self.slow: set[int] = set()  # ranks that were named

    def update(self, step: int, times: Sequence[StepTimes]) -> None:
        """Compares the ranks' times since the last report, and writes them.

        Args:
            step: that is reported.
            times: of all ranks.
        """
        over_median = ratios(times)
        if step > self.first_step:
            for rank, ratio in enumerate(over_median):
                self._compare(rank, ratio, step, times)
        self.reported_step = step
        rows = [
            self._row(rank, ratio, of_rank)
            for rank, (ratio, of_rank) in enumerate(zip(over_median, times, strict=True))
        ]
        write_ranks(self.run_dir, {"step": step, "ranks": rows})

    def _compare(self, rank: int, ratio: float, step: int, times: Sequence[StepTimes]) -> None:
        if math.isnan(ratio):
            return
        if not self.factor or ratio <= self.factor:
            self.over_since.pop(rank, None)
            if rank in self.slow:
                self.slow.remove(rank)
                logger.info("%s is as fast as the others again", self.places[rank])
            return
        since = self.over_since.setdefault(rank, self.reported_step)
        if step - since >= self.for_steps and rank not in self.slow:
            self.slow.add(rank)
            self._warn(rank, ratio, step, times)

    def _warn(self, rank: int, ratio: float, step: int, times: Sequence[StepTimes]) -> None:
        part, lost_ms = slowest_part(rank, times)
        message = (
            f"{self.places[rank]} is slow: {times[rank].median_ms:.0f} ms per step without "
            f"waiting for others, {ratio:.2f} x the median, most of it in {part.value} "
            f"(+{lost_ms:.0f} ms), since step {self.over_since[rank] + 1}"
        )
        logger.warning("%s. All ranks: evspan status %s --ranks", message, self.run_dir)
        append_observation(
            self.run_dir,
            SLOW_RANK,
            step=step,
            rank=rank,
            host=self.places[rank].host,
            ratio=round(ratio, 3),
            part=part.value,
            message=message,
        )

    def _row(self, rank: int, ratio: float, times: StepTimes) -> dict[str, Any]:
        place = self.places[rank]
        parts = {part.value: _rounded(times.part_ms(part)) for part in StepPart}
        since = self.over_since[rank] + 1 if rank in self.slow else None
        return {
            "rank": rank,
            "host": place.host,
            "device": place.device,
            "pid": place.pid,
            "steps": times.steps,
            "own_ms": [_rounded(value) for value in times.own_ms],
            "parts_ms": parts,
            "ratio": _rounded(ratio),
            "slow_since": since,
        }


def rank_scalars(times: Sequence[StepTimes]) -> dict[str, float]:
    """TensorBoard tag -> value: quantiles over the ranks of their median step times.

    Empty for one rank, or if nothing was measured.
    """
    medians = np.array([of_rank.median_ms for of_rank in times])
    if len(medians) < 2 or np.isnan(medians).any():
        return {}
    slowest = int(medians.argmax())
    return {
        "ranks/own_ms_min": float(medians.min()),
        "ranks/own_ms_median": float(np.median(medians)),
        "ranks/own_ms_p90": float(np.quantile(medians, 0.9)),
        "ranks/own_ms_max": float(medians.max()),
        "ranks/slowest_rank": float(slowest),
        "ranks/slowest_over_median": ratios(times)[slowest],
    }


def _rounded(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 3)
