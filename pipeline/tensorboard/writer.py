"""Writes a run's TensorBoard event file: scalars, images, histograms, text, custom scalars layout.

Rank 0 writes; on the other ranks every call does nothing.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from evspan.pipeline.evaluation.pr_curves import PrCurve
from numpy.typing import ArrayLike, NDArray
from torch.utils.tensorboard import SummaryWriter

logger = logging.getLogger(__name__)
FLUSH_S = 20
RETRY_S = 60.0  # after an error, until the next file is opened

# Category -> chart -> regular expressions for the tags of its scalars.
Layout = Mapping[str, Mapping[str, Sequence[str]]]


class TensorBoardWriter:
    """The event file RUN/tensorboard/events.*.

    An error of the file system, such as a full disk, does not end the run: it is logged, what is
    written in the next minute is lost, and then a new file is opened.

    Args:
        enabled: False: nothing is written.
        resume_step: of the checkpoint that the run resumes from. TensorBoard hides what an earlier
            attempt wrote for later steps; for 0, all that it wrote.
    """

    def __init__(self, run: Path, *, enabled: bool, resume_step: int = 0) -> None:
        self.enabled = enabled
        self.folder = run / "tensorboard"
        self.summary_writer: SummaryWriter | None = None
        self._closed = not enabled
        self._retry_at = 0.0
        self._has_failed = False
        self._purge_step: int | None = resume_step + 1 if resume_step else 0
        if enabled:
            self._open()

    def write_layout(self, layout: Layout) -> None:
        """The charts on the page "Custom Scalars". Once per run."""
        charts = {}
        for category, tags_by_title in layout.items():
            charts[category] = {
                title: ["Multiline", [*tags]] for title, tags in tags_by_title.items()
            }
        self._write(lambda writer: writer.add_custom_scalars(charts))

    def write_scalars(self, values: Mapping[str, float], step: int) -> None:
        """One value per tag."""

        def write(writer: SummaryWriter) -> None:
            for tag, value in values.items():
                writer.add_scalar(tag, value, step)

        self._write(write)

    def write_histograms(self, values: Mapping[str, ArrayLike], step: int) -> None:
        """One array of any shape per tag."""

        def write(writer: SummaryWriter) -> None:
            for tag, array in values.items():
                writer.add_histogram(tag, np.asarray(array), step)

        self._write(write)

    def write_pr_curve(self, tag: str, curve: PrCurve, step: int) -> None:
        """At most 127 thresholds, in equal steps from 0 to 1."""

        def write(writer: SummaryWriter) -> None:
            writer.add_pr_curve_raw(
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

        self._write(write)

    def write_image(self, tag: str, rgb: NDArray[np.uint8], step: int) -> None:
        """rgb: (H, W, 3)."""
        self._write(lambda writer: writer.add_image(tag, rgb, step, dataformats="HWC"))

    def write_text(self, tag: str, markdown: str, step: int) -> None:
        """For the page "Text"."""
        self._write(lambda writer: writer.add_text(tag, markdown, step))

    def flush(self) -> None:
        """Everything written so far is in the file, even if this process is killed."""
        if self.summary_writer is not None:
            self._write(lambda writer: writer.flush())

    def close(self) -> None:
        """Later calls do nothing: SummaryWriter would open a second file, which hides the first."""
        if self.summary_writer is not None:
            self._write(lambda writer: writer.close())
        self.summary_writer = None
        self._closed = True

    def _write(self, write: Callable[[SummaryWriter], None]) -> None:
        """Calls `write` with the open writer, and logs an error of the file system."""
        if self._closed:
            return
        if self.summary_writer is None and time.monotonic() >= self._retry_at:
            self._open()
        if self.summary_writer is None:
            return
        try:
            write(self.summary_writer)
        except OSError as error:
            self._give_up(error)

    def _open(self) -> None:
        """Opens a new file. Only the first one of an attempt replaces steps of earlier files."""
        try:
            self.summary_writer = SummaryWriter(
                str(self.folder), purge_step=self._purge_step, flush_secs=FLUSH_S
            )
        except OSError as error:
            self._give_up(error)
        else:
            self._purge_step = None

    def _give_up(self, error: OSError) -> None:
        """Leaves the file, whose thread has ended. The first error of an attempt is logged."""
        self.summary_writer = None
        self._retry_at = time.monotonic() + RETRY_S
        if not self._has_failed:
            logger.warning(
                "%s could not be written; the run goes on, and tries again every %.0f s: %s",
                self.folder,
                RETRY_S,
                error.strerror or error,
            )
        self._has_failed = True
