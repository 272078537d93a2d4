"""HDF5 recordings: reads the layouts of `h5_layouts` block by block, writes events/{t,x,y,p}."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any

import h5py
import hdf5plugin
import numpy as np
from evspan.conf.errors import RecordingError, UserError
from evspan.conf.text import printable
from evspan.data_prep.hdf5_files import (
    UnsafeDatasetError,
    is_damage,
    open_hdf5_for_reading,
    unavailable,
)
from evspan.data_prep.recordings.base import Recording, Writer
from evspan.data_prep.recordings.columns import pixel
from evspan.data_prep.recordings.events import Events
from evspan.data_prep.recordings.h5_layouts import Layout, checked_length, find_layout
from evspan.data_prep.recordings.polarity import BRIGHTER, PolarityCoding
from evspan.data_prep.shards.atomic import Disk
from numpy.typing import NDArray


class Compression(Enum):
    """How written events are compressed. Bytes per event and speeds: README.md."""

    gzip = "gzip"  # every HDF5 library reads it
    lz4 = "lz4"  # Blosc: several times as fast, and readers need its plugin (hdf5plugin)
    none = "none"


COMPRESSION_OPTIONS: dict[Compression, Mapping[str, Any]] = {
    Compression.gzip: {"compression": "gzip", "compression_opts": 1, "shuffle": True},
    Compression.lz4: hdf5plugin.Blosc(cname="lz4", shuffle=hdf5plugin.Blosc.SHUFFLE),
    Compression.none: {},
}
FEW_EVENTS = 1024  # of which as a rule both polarities are
WRITTEN_TYPES = {"t": "<i8", "x": "<u2", "y": "<u2", "p": "u1"}
WRITTEN_CHUNK = 1 << 16
LATEST_US = 1 << 53  # 285 years: times beyond are not in microseconds


class H5Reader(Recording):
    """Reads all layouts, block by block."""

    format = "h5"

    def __init__(
        self,
        path: Path,
        events_at_once: int | None = None,
        *,
        unstated_size: tuple[int, int] | None = None,
    ) -> None:
        with _opened(path) as file, _readable(path, "the list of columns"):
            layout = find_layout(path, file)
            self.size = checked_length(path, layout)
            self.events_at_once = events_at_once or layout.events_at_once()
            self.offset_us = layout.offset_us
        size = layout.stated_size or unstated_size
        super().__init__(path, *(size or layout.likely_size), size_is_assumed=size is None)

    def _decoded(self) -> Iterator[Events]:
        with _opened(self.path) as file:
            with _readable(self.path, "the list of columns"):
                layout = find_layout(self.path, file)
            polarity = self._polarity_coding(layout)
            for first in range(0, self.size, self.events_at_once):
                with _readable(self.path, f"events {first} and on"):
                    t, x, y, p = layout.read(first, first + self.events_at_once)
                yield Events(self._times(t, first), pixel(x), pixel(y), polarity.decode(p, first))

    def _times(self, t: NDArray[Any], first: int) -> NDArray[np.int64]:
        """Times of the events `first` and on, with the file's offset."""
        latest = max(int(t.max()), -int(t.min()))
        if latest + abs(self.offset_us) > LATEST_US:
            raise RecordingError(
                f"{self.path}: events {first} and on have times from {t.min()} to {t.max()}, which "
                "are not microseconds. Convert the column t to integer microseconds"
            )
        times = t.astype(np.int64, copy=False)
        return times + self.offset_us if self.offset_us else times

    def _polarity_coding(self, layout: Layout) -> PolarityCoding:
        """The coding of the column p, from its first two different values."""
        values: set[int] = set()
        first = 0
        last = min(FEW_EVENTS, self.events_at_once)
        while first < self.size:
            with _readable(self.path, f"polarities of events {first} and on"):
                p = layout.read_polarity(first, last)
            first = last
            last += self.events_at_once
            values |= {int(p.min()), int(p.max())}
            if len(values) > 1:
                if (min(values), max(values)) not in BRIGHTER:  # for the refusal
                    values.update(np.unique(p).tolist())
                break
        return PolarityCoding(self.path, sorted(values))


@contextmanager
def _readable(path: Path, place: str) -> Iterator[None]:
    """Raises UserErrors for whatever h5py raises; of a damaged file that is a dozen kinds.

    Raises:
        RecordingError: the file is damaged, or refused.
        UnavailableFileError: it cannot be read now.
    """
    try:
        yield
    except UnsafeDatasetError as error:
        raise RecordingError(str(error)) from error
    except UserError:
        raise
    except Exception as error:
        if not is_damage(error):
            raise unavailable(path, error) from error
        reason = printable(" ".join(str(error).split()))
        raise RecordingError(
            f"{path}: {place} cannot be read as HDF5 ({reason}). The file is cut off or damaged: "
            "copy it again"
        ) from error


@contextmanager
def _opened(path: Path) -> Iterator[h5py.File]:
    with _readable(path, "the file"):
        file = open_hdf5_for_reading(path)
    try:
        yield file
    finally:
        file.close()


class H5Writer(Writer):
    """Writes events/{t,x,y,p}, compressed, with height and width.

    Other programs open these files: by default they need no plugin of HDF5.
    """

    earliest_us = -LATEST_US

    def __init__(
        self,
        path: Path,
        height: int,
        width: int,
        *,
        compression: Compression = Compression.gzip,
    ) -> None:
        super().__init__(path, height, width)
        self.disk = Disk(path, "w+")
        self.file = h5py.File(self.disk, "w")
        self.group = self.file.create_group("events")
        for name, dtype in WRITTEN_TYPES.items():
            self.group.create_dataset(
                name,
                (0,),
                dtype,
                maxshape=(None,),
                chunks=(WRITTEN_CHUNK,),
                **COMPRESSION_OPTIONS[compression],
            )
        self.group["height"] = height
        self.group["width"] = width

    def _write(self, events: Events) -> None:
        written = len(self.group["t"])
        for name, column in events._asdict().items():
            self.group[name].resize((written + column.size,))
            self.group[name][written:] = column
        self.disk.check()

    def close(self) -> None:
        """Closes the file and checks that everything reached the disk."""
        self.file.close()
        self.disk.close()
        self.disk.check()
