"""Opens recordings of every format for reading, and new ones for writing."""

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
    """Opens a recording with the reader for its suffix and header.

    Raises:
        RecordingError: no such file, an unknown suffix or format, or a header without the
            necessary fields.
    """
    path = Path(path)
    suffixes = ", ".join(SUFFIXES)
    if not path.is_file():
        raise RecordingError(f"{path} is no file. Give a recording: one of {suffixes}")
    suffix = path.suffix.lower()
    if suffix == ".raw":
        return _open_raw(path)
    if suffix == ".dat":
        return DatReader(path)
    if suffix in (".h5", ".hdf5"):
        return H5Reader(path)
    raise RecordingError(
        f"{path} has the suffix {path.suffix or '(none)'}; recordings have one of {suffixes}"
    )


def _open_raw(path: Path) -> Recording:
    name = raw_format(path)
    if name in RAW_READERS:
        return RAW_READERS[name](path)
    problem = "has no header that names its format"
    if name:
        problem = f"is in format {name.upper()[:20]}"
    readable = ", ".join(name.upper() for name in RAW_READERS)
    raise RecordingError(
        f"{path} {problem}; {readable} can be read. Convert it to .dat: "
        f"metavision_file_to_dat -i {path}"
    )


def open_writer(path: str | Path, height: int, width: int) -> Writer:
    """Opens a new recording: EVT3 for .raw, CD events for .dat, events/{t,x,y,p} for .h5.

    Args:
        height, width: of the sensor, in pixels.

    Returns:
        A context manager with `write(events)`.

    Raises:
        RecordingError: another suffix, or a sensor that the format cannot address.
    """
    path = Path(path)
    if path.suffix not in WRITERS:
        raise RecordingError(f"{path}: events are written as one of {', '.join(WRITERS)}")
    return WRITERS[path.suffix](path, height, width)
