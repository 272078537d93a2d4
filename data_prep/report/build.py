"""Writes the report of a prepared dataset as one HTML file."""

from dataclasses import dataclass
from pathlib import Path

from evspan.conf.errors import UserError
from evspan.data_prep.report.findings import findings
from evspan.data_prep.report.page import page
from evspan.data_prep.report.survey import FRAMES_PER_RECORDING, survey
from evspan.data_prep.shards.atomic import atomic_write

SUFFIXES = (".html", ".htm")


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Which dataset to report on, how thoroughly, and where the page goes."""

    shards: Path  # a folder that evspan prep wrote
    out: Path | None = None  # default: SHARDS_report.html next to the folder
    split: str | None = None  # only this one
    recording: str | None = None  # only recordings of this name
    frames_per_recording: int = FRAMES_PER_RECORDING  # frames that are decoded, evenly spaced

    @property
    def page_path(self) -> Path:
        """Where the page is written."""
        root = self.shards.resolve()
        return self.out or root.with_name(f"{root.name}_report.html")


@dataclass(frozen=True)
class ReportSummary:
    """What was written, and the sentences of the page's warnings."""

    path: Path
    recordings: int
    warnings: list[str]


def write_report(options: ReportOptions) -> ReportSummary:
    """Reads the dataset and writes the page; a page that exists is replaced as a whole.

    Raises:
        UserError: options that do not fit.
        ShardError: no prepared dataset, no such recording, or a damaged shard.
    """
    out = options.page_path
    if out.suffix.lower() not in SUFFIXES:
        raise UserError(f"{out} does not end in .html; give the page a name that does")
    if out.resolve().is_relative_to(options.shards.resolve()):
        raise UserError(
            f"{out} lies inside {options.shards}, where evspan prep allows no other files; "
            "name a place outside"
        )
    if options.frames_per_recording < 1:
        raise UserError(f"--frames-per-recording {options.frames_per_recording}: give 1 or more")
    surveyed = survey(
        options.shards,
        split=options.split,
        name=options.recording,
        frames_per_recording=options.frames_per_recording,
    )
    warnings = findings(surveyed)
    with atomic_write(out) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(page(surveyed, warnings))
    return ReportSummary(out, len(surveyed.recordings), warnings)
