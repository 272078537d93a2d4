"""Sensor files in, events out, and back: `open_recording`, `open_writer`."""

from collections.abc import Callable
from pathlib import Path

from evspan.conf.errors import RecordingError
from evspan.data_prep.recordings.base import Recording, Writer
from evspan.data_prep.recordings.dat import DatReader, DatWriter
from evspan.data_prep.recordings.evt2 import Evt2Reader
from evspan.data_prep.recordings.evt3 import Evt3Reader, Evt3Writer
from evspan.data_prep.recordings.evt21 import Evt21Reader
from evspan.data_prep.recordings.h5 import H5Reader, H5Writer
from evspan.data_prep.recordings.header import raw_format

SUFFIXES = (".raw", ".dat", ".h5", ".hdf5")
RAW_READERS: dict[str, Callable[[Path], Recording]] = {
    "evt3": Evt3Reader,
    "evt21": Evt21Reader,
    "evt2": Evt2Reader,
}
WRITERS: dict[str, Callable[[Path, int, int], Writer]] = {
    ".raw": Evt3Writer,
    ".dat": DatWriter,
    ".h5": H5Writer,
}


def open_recording(path: str | Path) -> Recording:
    """A reader by suffix and header.

    Raises:
        RecordingError: no such file, an unknown suffix or format, or a header that does not say what is needed.
    """
    path = Path(path)
    if not path.is_file():
        raise RecordingError(f"{path} is no file. Give a recording: one of {', '.join(SUFFIXES)}")
    if path.suffix == ".raw":
        kind = raw_format(path)
        if kind not in RAW_READERS:
            told = (
                f"is in format {kind.upper()[:20]}"
                if kind
                else "has no header that names its format"
            )
            raise RecordingError(
                f"{path} {told}; {', '.join(k.upper() for k in RAW_READERS)} can be read. Convert it to .dat: "
                f"metavision_file_to_dat -i {path}"
            )
        return RAW_READERS[kind](path)
    if path.suffix == ".dat":
        return DatReader(path)
    if path.suffix in (".h5", ".hdf5"):
        return H5Reader(path)
    raise RecordingError(
        f"{path} has the suffix {path.suffix or '(none)'}; recordings have one of {', '.join(SUFFIXES)}"
    )


def open_writer(path: str | Path, height: int, width: int) -> Writer:
    """A context manager with `write(events)`: EVT3 for .raw, CD events for .dat, events/{t,x,y,p} for .h5."""
    path = Path(path)
    if path.suffix not in WRITERS:
        raise RecordingError(f"{path}: events are written as one of {', '.join(WRITERS)}")
    return WRITERS[path.suffix](path, height, width)
