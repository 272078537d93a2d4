"""HDF5 recordings as RVT and eTraM distribute them: events/{x,y,p,t}, optional scalars height and width."""

from collections.abc import Iterator
from pathlib import Path

import h5py
import hdf5plugin
import numpy as np

from data_prep.errors import RecordingError
from data_prep.events import Events
from data_prep.formats.recording import GEN4_SIZE, Recording, Writer

EVENTS_AT_ONCE = 1 << 20
COLUMNS = ("t", "x", "y", "p")


class H5Reader(Recording):
    format = "h5"

    def __init__(self, path: Path) -> None:
        with self._open(path) as file:
            if "CD/events" in file:
                raise RecordingError(f"{path} is Metavision's HDF5 (CD/events), compressed with the ECF codec (filter 0x8ECF). "
                                     "Convert it to .raw or .dat with Metavision's tools first")
            group = file.get("events")
            missing = [c for c in COLUMNS if not isinstance(group, h5py.Group) or c not in group]
            if missing:
                raise RecordingError(f"{path} lacks {', '.join(f'events/{c}' for c in missing)}. A recording has the columns "
                                     "events/t, x, y and p")
            lengths = {c: len(group[c]) for c in COLUMNS}
            if len(set(lengths.values())) > 1:
                raise RecordingError(f"{path}: the columns of events/ differ in length ({lengths}). The file is damaged: copy "
                                     "it again")
            height, width = (int(np.asarray(group[k]).item()) if k in group else size
                             for k, size in zip(("height", "width"), GEN4_SIZE, strict=True))
            super().__init__(path, height, width)

    @staticmethod
    def _open(path: Path) -> h5py.File:
        try:
            return h5py.File(path, "r")
        except OSError as error:
            raise RecordingError(f"{path} cannot be opened as HDF5 ({error}). It may be cut off: copy it again") from error

    def _decoded(self) -> Iterator[Events]:
        with self._open(self.path) as file:
            group = file["events"]
            for i in range(0, len(group["t"]), EVENTS_AT_ONCE):
                try:
                    t, x, y, p = (group[c][i : i + EVENTS_AT_ONCE] for c in COLUMNS)
                except OSError as error:
                    raise RecordingError(f"{self.path}: events {i} and on cannot be read ({error}). A compression filter may "
                                         "be missing, "
                                         "or the file is damaged") from error
                # Wide and signed first: a negative or large coordinate must count as outside, not wrap into the sensor.
                yield Events(t.astype(np.int64), _pixel(x), _pixel(y), (p > 0).astype(np.uint8))


def _pixel(column: np.ndarray) -> np.ndarray:
    return column if column.dtype == np.uint16 else np.clip(column, -1, 65535).astype(np.int64).astype(np.uint16)


class H5Writer(Writer):
    """Events to events/{t,x,y,p}, compressed, with height and width; grows as it is written."""

    def __init__(self, path: Path, height: int, width: int) -> None:
        self.file = h5py.File(path, "w")
        group = self.file.create_group("events")
        for name, kind in zip(COLUMNS, ("<i8", "<u2", "<u2", "u1"), strict=True):
            group.create_dataset(name, (0,), kind, maxshape=(None,), chunks=(1 << 16,),
                                 **hdf5plugin.Blosc(cname="lz4", shuffle=hdf5plugin.Blosc.SHUFFLE))
        group["height"], group["width"] = height, width
        self.group = group

    def write(self, events: Events) -> None:
        n = len(self.group["t"])
        for name, column in events._asdict().items():
            self.group[name].resize((n + column.size,))
            self.group[name][n:] = column

    def close(self) -> None:
        self.file.close()
