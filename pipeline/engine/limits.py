"""What ends a run before `training.max_steps`: epochs, hours, and an AP that no longer rises.

What they count is saved in every checkpoint and in the metrics of every evaluated one, so that a
run that continues counts on. All ranks decide alike: they have the same metrics and steps, and
agree on the time.
"""

import math
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from evspan.conf.schema.training import TrainConfig, TrainingConfig
from evspan.conf.text import plural
from evspan.pipeline.data.datasets import Dataset
from evspan.pipeline.engine.best_checkpoint import EVALUATION_ID, comparable
from evspan.pipeline.engine.signals import any_rank

LIMITS = "limits"  # key of meta.json and of a checkpoint's metrics.json
SECONDS_PER_HOUR = 3600


def frames_of(dataset: Dataset) -> int:
    """The frames of an epoch: all of the training split."""
    return sum(recording.frames for recording in dataset.recordings)


def total_steps(training: TrainingConfig, frames: int) -> int:
    """The steps of a whole run: `max_steps`, or those of `max_epochs` if they are fewer.

    Args:
        frames: of the training split, which is an epoch whatever the sampling draws.
    """
    if not training.max_epochs:
        return training.max_steps
    lanes = training.batch_size * training.gradient_accumulation_steps
    steps = math.ceil(training.max_epochs * frames / (lanes * training.sequence_length))
    return max(1, min(training.max_steps, steps))


def with_total_steps(config: TrainConfig, frames: int) -> TrainConfig:
    """The config with `total_steps` as its `training.max_steps`, which the schedule follows."""
    steps = total_steps(config.training, frames)
    return replace(config, training=replace(config.training, max_steps=steps))


class RunLimits:
    """Counts hours and evaluations of a run, over all its attempts.

    The time counts that led to the newest checkpoint: steps that were lost do not.

    Args:
        config: with the real number of steps, from `with_total_steps`. frames: of an epoch.

    Attributes:
        reason: why the run ends with this step; empty while it does not.
        remedies: overrides with which the run goes on.
    """

    def __init__(self, config: TrainingConfig, frames: int) -> None:
        self.config = config
        self.frames = frames
        self.reason = ""
        self.remedies: list[str] = []
        self.earlier_seconds = 0.0  # of earlier attempts
        self.started = time.monotonic()
        self.best_ap = -1.0  # lower than any AP
        self.without_better = 0  # evaluations since the one with the best AP
        self.evaluation = ""  # EVALUATION_ID of these evaluations; empty before the first one

    @property
    def seconds(self) -> float:
        """Of all attempts."""
        return self.earlier_seconds + time.monotonic() - self.started

    def is_last(self, step: int) -> bool:
        """Whether the run ends with this step."""
        return step >= self.config.max_steps or bool(self.reason)

    def check_time(self, device: torch.device) -> None:
        """At the end of a step whose values the host reads. A collective if `max_hours` is set."""
        hours = self.config.max_hours
        if hours and any_rank(
            self.seconds >= hours * SECONDS_PER_HOUR, device, name="whether time is up"
        ):
            self._end_by_time()

    def evaluated(self, ap: float | None, evaluation: str) -> None:
        """After an evaluation, on every rank. The count begins again with another evaluation.

        Args:
            ap: the same on all; None: there is none.
            evaluation: its EVALUATION_ID, the same on all.
        """
        if not comparable(evaluation, self.evaluation):
            self.best_ap = -1.0
            self.without_better = 0
        self.evaluation = evaluation
        if ap is not None and ap > self.best_ap:
            self.best_ap = ap
            self.without_better = 0
        else:
            self.without_better += 1
        self._end_by_patience()

    def to_json(self) -> dict[str, Any]:
        """The counts, for meta.json of a checkpoint."""
        return {
            "frames": self.frames,
            "seconds": round(self.seconds, 3),
            "best_ap": self.best_ap,
            "without_better": self.without_better,
            EVALUATION_ID: self.evaluation,
        }

    def to_metrics(self) -> dict[str, Any]:
        """The counts, for a checkpoint's metrics.json: without the time unless it is limited.

        So the metrics of two equal runs are equal.
        """
        counts = self.to_json()
        if not self.config.max_hours:
            del counts["seconds"]
        return counts

    def resume(self, saved: Mapping[str, Any], evaluated: Mapping[str, Any]) -> None:
        """Counts on.

        Args:
            saved: `to_json` in meta.json; {} in a checkpoint of an earlier version.
            evaluated: `to_metrics` after the evaluation of this checkpoint; {} without one. The
                same on every rank.
        """
        counts = {**saved, **evaluated}
        self.earlier_seconds = float(counts.get("seconds", 0.0))
        self.best_ap = float(counts.get("best_ap", -1.0))
        self.without_better = int(counts.get("without_better", 0))
        self.evaluation = str(counts.get(EVALUATION_ID, ""))
        hours = self.config.max_hours
        if hours and self.earlier_seconds >= hours * SECONDS_PER_HOUR:
            self._end_by_time()
        self._end_by_patience()

    def _end_by_time(self) -> None:
        hours = self.config.max_hours
        self.reason = f"training.max_hours={hours:g} have passed"
        # It may be another rank's clock that has reached it. The next attempt must not train on.
        self.earlier_seconds += max(0.0, hours * SECONDS_PER_HOUR - self.seconds)
        self.remedies.append(f"training.max_hours={2 * self.seconds / SECONDS_PER_HOUR:.3g}")

    def _end_by_patience(self) -> None:
        if self.config.patience and self.without_better >= self.config.patience:
            count = plural(self.without_better, "evaluation")
            self.reason = f"no better AP in {count} (training.patience)"
            self.remedies.append(f"training.patience={2 * self.without_better}")
