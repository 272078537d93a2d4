"""What a run tells: TensorBoard on rank 0, and a line on the console now and then."""

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch.utils.tensorboard import SummaryWriter

Layout = Mapping[
    str, Mapping[str, Sequence[str]]
]  # category -> chart -> tags of the scalars in it, as regular expressions


class Monitor:
    """Scalars, pictures and console lines of one run. On ranks other than the first it keeps silent."""

    def __init__(self, run: Path, *, enabled: bool, resume_step: int = 0) -> None:
        self.enabled = enabled
        # purge_step: what a killed run logged after its last checkpoint is told again, so it must not stay.
        purge = resume_step + 1 if resume_step else None
        self.writer: SummaryWriter | None = None
        if enabled:
            self.writer = SummaryWriter(str(run / "tensorboard"), purge_step=purge, flush_secs=20)

    def layout(self, charts: Layout) -> None:
        """What the page "Custom Scalars" shows together. Once per run."""
        if self.writer:
            self.writer.add_custom_scalars(
                {
                    category: {title: ["Multiline", [*tags]] for title, tags in of.items()}
                    for category, of in charts.items()
                }
            )

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        if self.writer:
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)

    def histograms(self, values: Mapping[str, ArrayLike], step: int) -> None:
        if self.writer:
            for name, of in values.items():
                self.writer.add_histogram(name, np.asarray(of), step)

    def pr_curve(
        self,
        name: str,
        true_positives: NDArray,
        false_positives: NDArray,
        false_negatives: NDArray,
        precision: NDArray,
        recall: NDArray,
        step: int,
    ) -> None:
        """All (n,), n up to 127, at thresholds that go in equal steps from 0 to 1."""
        if self.writer:
            nothing = np.zeros_like(
                true_positives
            )  # of a detector there are no true negatives to count
            self.writer.add_pr_curve_raw(
                name,
                true_positives,
                false_positives,
                nothing,
                false_negatives,
                precision,
                recall,
                step,
                num_thresholds=len(recall),
            )

    def picture(self, name: str, rgb: NDArray[np.uint8], step: int) -> None:
        """rgb: (H, W, 3)."""
        if self.writer:
            self.writer.add_image(name, rgb, step, dataformats="HWC")

    def text(self, name: str, markdown: str, step: int) -> None:
        if self.writer:
            self.writer.add_text(name, markdown, step)

    def say(self, line: str) -> None:
        if self.enabled:
            print(line, flush=True, file=sys.stdout)

    def flush(self) -> None:
        """Everything told so far is in its file, whatever becomes of this process."""
        if self.writer:
            self.writer.flush()

    def close(self) -> None:
        """What is told from here on is lost: the writer would open another file, and purge what lies before it."""
        if self.writer:
            self.writer.close()
            self.writer = None


class Stopwatch:
    """Splits time since the last `report` into waiting for data and the rest."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self.began, self.waited, self.frames = time.perf_counter(), 0.0, 0

    def wait(self, since: float) -> None:
        self.waited += time.perf_counter() - since

    def report(self) -> tuple[float, float, float]:
        """(frames per second, share of the time spent waiting for data, seconds) since the last report."""
        passed = max(time.perf_counter() - self.began, 1e-9)
        out = self.frames / passed, self.waited / passed, passed
        self._reset()
        return out
