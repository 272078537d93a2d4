"""Writes a run's TensorBoard event file: scalars, images, histograms, text, custom scalars layout.

Rank 0 writes; on the other ranks every call does nothing.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from evspan.pipeline.evaluation.pr_curves import PrCurve
from numpy.typing import ArrayLike, NDArray
from torch.utils.tensorboard import SummaryWriter

# Category -> chart -> regular expressions for the tags of its scalars.
Layout = Mapping[str, Mapping[str, Sequence[str]]]


class TensorBoardWriter:
    """The event file RUN/tensorboard/events.*.

    Args:
        enabled: False: nothing is written.
        resume_step: of the checkpoint that the run resumes from. TensorBoard hides what an earlier
            attempt wrote for later steps.
    """

    def __init__(self, run: Path, *, enabled: bool, resume_step: int = 0) -> None:
        self.enabled = enabled
        self.summary_writer: SummaryWriter | None = None
        if enabled:
            purge_step = resume_step + 1 if resume_step else None
            self.summary_writer = SummaryWriter(
                str(run / "tensorboard"), purge_step=purge_step, flush_secs=20
            )

    def write_layout(self, layout: Layout) -> None:
        """The charts on the page "Custom Scalars". Once per run."""
        if self.summary_writer is None:
            return
        charts = {}
        for category, tags_by_title in layout.items():
            charts[category] = {
                title: ["Multiline", [*tags]] for title, tags in tags_by_title.items()
            }
        self.summary_writer.add_custom_scalars(charts)

    def write_scalars(self, values: Mapping[str, float], step: int) -> None:
        """One value per tag."""
        if self.summary_writer is not None:
            for tag, value in values.items():
                self.summary_writer.add_scalar(tag, value, step)

    def write_histograms(self, values: Mapping[str, ArrayLike], step: int) -> None:
        """One array of any shape per tag."""
        if self.summary_writer is not None:
            for tag, array in values.items():
                self.summary_writer.add_histogram(tag, np.asarray(array), step)

    def write_pr_curve(self, tag: str, curve: PrCurve, step: int) -> None:
        """At most 127 thresholds, in equal steps from 0 to 1."""
        if self.summary_writer is not None:
            self.summary_writer.add_pr_curve_raw(
                tag,
                curve.true_positives,
                curve.false_positives,
                np.zeros_like(curve.true_positives),  # detection has no true negatives
                curve.missed,
                curve.precision,
                curve.recall,
                step,
                num_thresholds=len(curve.recall),
            )

    def write_image(self, tag: str, rgb: NDArray[np.uint8], step: int) -> None:
        """rgb: (H, W, 3)."""
        if self.summary_writer is not None:
            self.summary_writer.add_image(tag, rgb, step, dataformats="HWC")

    def write_text(self, tag: str, markdown: str, step: int) -> None:
        """For the page "Text"."""
        if self.summary_writer is not None:
            self.summary_writer.add_text(tag, markdown, step)

    def flush(self) -> None:
        """Everything written so far is in the file, even if this process is killed."""
        if self.summary_writer is not None:
            self.summary_writer.flush()

    def close(self) -> None:
        """Later calls do nothing: SummaryWriter would open a second file, which hides the first."""
        if self.summary_writer is not None:
            self.summary_writer.close()
            self.summary_writer = None
