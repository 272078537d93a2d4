"""Folders of simulated recordings: OUT/train/train_000_td.raw with boxes and parameters, and so on.

A recording is complete when its file of parameters exists, which is written last. OUT/domain.json
has the domain: its name, ranges and values.
"""

import dataclasses
import json
import multiprocessing
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from evspan.conf.errors import UserError
from evspan.conf.text import plural
from evspan.data_prep.labels.classes import CLASSES_FILE
from evspan.data_prep.shards.atomic import atomic_write
from evspan.data_prep.shards.format import SPLITS
from evspan.data_prep.simulator.config import CLASSES, SimulatorConfig
from evspan.data_prep.simulator.domains import Domain
from evspan.data_prep.simulator.recording import SimulationReport, simulate

SIMULATOR_VERSION = 1  # to be raised when the same parameters give other bytes
DOMAIN_FILE = "domain.json"
LATER_PARAMETERS = (  # written where they differ from their defaults
    "hot_pixels",
    "hot_pixel_hz",
    "speed",
    "object_contrast",
    "background_contrast",
    "background_texture",
    "clutter",
    "ego_speed",
    "min_rest_s",
    "max_rest_s",
)
SUFFIXES = {"raw": "_td.raw", "dat": "_td.dat", "h5": "_td.h5"}  # by format


@dataclass(frozen=True)
class RecordingFiles:
    """The files of a simulated recording. `path` is that of the events."""

    path: Path

    @property
    def name(self) -> str:
        """`val_000` of `val_000_td.raw`."""
        return self.path.name.rsplit("_td", 1)[0]

    @property
    def boxes_path(self) -> Path:
        """The box file in the same folder."""
        return self.path.with_name(f"{self.name}_bbox.npy")

    @property
    def parameters_path(self) -> Path:
        """Written last: if it exists, the recording is complete."""
        return self.path.with_name(f"{self.name}_simulation.json")

    def existing_files(self) -> list[Path]:
        """Recordings of this name, in any format."""
        paths = [self.path.with_name(self.name + suffix) for suffix in SUFFIXES.values()]
        return [path for path in paths if path.exists()]

    def remove(self) -> None:
        """Deletes the files. The events go first: without them, the others are no recording."""
        for path in (*self.existing_files(), self.boxes_path, self.parameters_path):
            path.unlink(missing_ok=True)


@dataclass(frozen=True)
class PlannedRecording(RecordingFiles):
    """A recording to simulate."""

    seconds: float
    seed: int
    config: SimulatorConfig

    def parameters(self) -> dict[str, Any]:
        """All that the bytes of the recording depend on, as JSON values."""
        return {
            "version": SIMULATOR_VERSION,
            "format": self.path.suffix[1:],
            "seconds": self.seconds,
            "seed": self.seed,
            **dataclasses.asdict(self.config),
        }

    def written_parameters(self) -> dict[str, Any]:
        """`parameters` as they are stored."""
        defaults = dataclasses.asdict(SimulatorConfig())
        return {
            key: value
            for key, value in self.parameters().items()
            if key not in LATER_PARAMETERS or value != defaults[key]
        }


@dataclass(frozen=True)
class SimulatedSet:
    """Recordings of one kind in a folder, by split."""

    folder: Path
    counts: Mapping[str, int]  # recordings per split
    seconds: float = 10.0  # length of each
    seed: int = 0
    format: str = "raw"  # one of SUFFIXES
    config: SimulatorConfig = field(default_factory=SimulatorConfig)
    domain: Domain | None = None  # from which each recording draws its values, instead of `config`

    def recordings(self) -> list[PlannedRecording]:
        """All of them. The seed of each depends on `seed`, its split and its number alone."""
        planned = []
        for split, count in self.counts.items():
            for index in range(count):
                path = self.folder / split / f"{split}_{index:03d}{SUFFIXES[self.format]}"
                seed = _seed_of(self.seed, split, index)
                config = self.domain.config(seed) if self.domain else self.config
                planned.append(PlannedRecording(path, self.seconds, seed, config))
        return planned

    def unplanned(self) -> list[RecordingFiles]:
        """Recordings in the folder that are named like those of the set, but not part of it.

        Those of the set's splits; of all splits if domain.json has another domain.
        """
        splits = SPLITS if self.has_other_domain() else tuple(self.counts)
        planned = {recording.name for recording in self.recordings()}
        unplanned = {}
        for split in splits:
            for path in sorted((self.folder / split).glob(f"{split}_*")):
                files = RecordingFiles(path)
                if _is_recording_of(split, path.name) and files.name not in planned:
                    unplanned[files.name] = files
        return list(unplanned.values())

    def has_other_domain(self) -> bool:
        """Whether domain.json exists and does not contain the domain of the set."""
        path = self.folder / DOMAIN_FILE
        if not path.exists():
            return False
        try:
            stored = json.loads(path.read_text())
            # Older versions lack the values that were added since: these had the defaults.
            values = dataclasses.asdict(SimulatorConfig()) | stored["values"]
            stored["values"] = {k: v for k, v in values.items() if k not in stored["ranges"]}
        except (ValueError, KeyError, TypeError):
            return True
        return bool(stored != self._domain().to_json())

    def _domain(self) -> Domain:
        return self.domain or Domain(base=self.config)

    def write_classes(self) -> None:
        """Writes classes.txt, from which `evspan prep` takes the names, unless it is there."""
        path = self.folder / CLASSES_FILE
        if path.exists():
            return
        with atomic_write(path) as temporary:
            temporary.write_text("".join(f"{name}\n" for name in CLASSES))

    def write_domain(self) -> None:
        """Writes domain.json."""
        with atomic_write(self.folder / DOMAIN_FILE) as temporary:
            temporary.write_text(json.dumps(self._domain().to_json(), indent=1) + "\n")


@dataclass(frozen=True)
class SimulatedRecording:
    """A recording that was written, and the seconds that it took."""

    planned: PlannedRecording
    report: SimulationReport
    wall_seconds: float


def is_complete(planned: PlannedRecording, *, overwrite: bool = False) -> bool:
    """Whether the recording exists with its boxes, simulated with the same parameters.

    Raises:
        UserError: a file of its name was made in another way, and `overwrite` is false.
    """
    existing = planned.existing_files()
    if not existing:
        return False
    try:
        stored = json.loads(planned.parameters_path.read_text())["parameters"]
    except (OSError, ValueError, KeyError):
        if overwrite:
            return False
        raise UserError(
            f"{existing[0]} exists, but {planned.parameters_path.name} does not contain its "
            "parameters. Give another folder, or --overwrite to replace it"
        ) from None
    # Files of older versions lack the parameters that were added since: these had the defaults.
    stored = dataclasses.asdict(SimulatorConfig()) | stored
    expected = planned.parameters()
    if existing == [planned.path] and stored == expected:
        return planned.boxes_path.exists()
    if overwrite:
        return False
    differences = []
    for key, value in expected.items():
        if stored.get(key) != value:
            differences.append(f"{key} {stored.get(key)} instead of {value}")
    raise UserError(
        f"{existing[0]} exists, made with {', '.join(differences) or 'more than one format'}. "
        "Give another folder, or --overwrite to replace it"
    )


def remove_unplanned(recording_set: SimulatedSet, *, overwrite: bool = False) -> int:
    """Deletes the recordings that `SimulatedSet.unplanned` returns; returns their number.

    Raises:
        UserError: there are some and `overwrite` is false, or one has no file of parameters and
            thus may not be simulated. Nothing is deleted then.
    """
    unplanned = recording_set.unplanned()
    folder = recording_set.folder
    if unplanned and not overwrite:
        remedy = "a larger number in --recordings to keep them"
        if recording_set.has_other_domain():
            remedy = f"the options of its {DOMAIN_FILE}, which has another domain"
        raise UserError(
            f"{folder} contains {plural(len(unplanned), 'recording')} outside this set, the first "
            f"is {unplanned[0].path}. Give another folder, {remedy}, or --overwrite to delete them"
        )
    for files in unplanned:
        if not files.parameters_path.exists():
            raise UserError(
                f"{files.path} is outside this set, and without {files.parameters_path.name} it "
                "may not be simulated: --overwrite does not delete it. Delete or move it"
            )
    for files in unplanned:
        files.remove()
    return len(unplanned)


def write_recording(planned: PlannedRecording) -> SimulatedRecording:
    """Simulates a recording and writes it, its boxes and its parameters."""
    began = time.perf_counter()
    for path in planned.existing_files():
        path.unlink()
    planned.parameters_path.unlink(missing_ok=True)
    report = simulate(
        planned.path, seconds=planned.seconds, seed=planned.seed, config=planned.config
    )
    content = {
        "parameters": planned.written_parameters(),
        "events": report.events,
        "boxes": report.boxes,
    }
    with atomic_write(planned.parameters_path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")
    return SimulatedRecording(planned, report, time.perf_counter() - began)


def write_recordings(
    planned: Sequence[PlannedRecording], processes: int = 0
) -> Iterator[SimulatedRecording]:
    """Writes the recordings in several processes; yields each when it is complete.

    Args:
        planned: in any order.
        processes: recordings at once; 0: one per core.
    """
    workers = min(processes or len(os.sched_getaffinity(0)), len(planned))
    if workers <= 1:
        yield from map(write_recording, planned)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context)
    try:
        futures = [pool.submit(write_recording, recording) for recording in planned]
        for future in as_completed(futures):
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _is_recording_of(split: str, name: str) -> bool:
    """Whether a file has the name of a simulated recording, such as train_000_td.raw."""
    return any(
        re.fullmatch(rf"{split}_\d{{3,}}{re.escape(suffix)}", name) for suffix in SUFFIXES.values()
    )


def _seed_of(seed: int, split: str, index: int) -> int:
    sequence = np.random.SeedSequence([seed, SPLITS.index(split), index])
    return int(sequence.generate_state(1)[0])
