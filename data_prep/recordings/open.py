"""Opens recordings of every format for reading, and new ones for writing."""

from collections.abc import Callable, Sequence
from pathlib import Path

from evspan.conf.errors import RecordingError
from evspan.conf.schema.prep import TimeUnit
from evspan.data_prep.foreign_content import HDF5_SIGNATURE, describe_foreign_content
from evspan.data_prep.recordings.aedat4 import MAGIC as AEDAT4_MAGIC
from evspan.data_prep.recordings.aedat4 import Aedat4Reader
from evspan.data_prep.recordings.base import Recording, Writer
from evspan.data_prep.recordings.dat import DatReader, DatWriter
from evspan.data_prep.recordings.evt2 import Evt2Reader
from evspan.data_prep.recordings.evt3 import Evt3Reader, Evt3Writer
from evspan.data_prep.recordings.evt21 import Evt21Reader
from evspan.data_prep.recordings.h5 import H5Reader, H5Writer
from evspan.data_prep.recordings.header import raw_format
from evspan.data_prep.recordings.npz import NpzReader, holds_event_arrays
from evspan.data_prep.recordings.text import TextReader, read_text_head

TEXT_SUFFIXES = (".csv", ".txt")
# Files of these may contain anything: in a folder, only those that hold events are recordings.
AMBIGUOUS_SUFFIXES = (*TEXT_SUFFIXES, ".npz")
OWN_SUFFIXES = (".raw", ".dat", ".h5", ".hdf5", ".aedat4")
SUFFIXES = (*OWN_SUFFIXES, *AMBIGUOUS_SUFFIXES)
BOXES_ARCHIVE = "_bbox.npz"  # boxes under a suffix that is not read
GIT_LFS = b"version https://git-lfs"
HEADER_START = b"% "
# Of a whole file. A format without such bytes needs no entry.
FIRST_BYTES = {
    ".raw": HEADER_START,
    ".dat": HEADER_START,
    ".h5": HDF5_SIGNATURE,
    ".hdf5": HDF5_SIGNATURE,
    ".aedat4": AEDAT4_MAGIC,
}
RAW_READERS: dict[str, Callable[..., Recording]] = {
    "evt3": Evt3Reader,
    "evt21": Evt21Reader,
    "evt2": Evt2Reader,
}
WRITERS: dict[str, Callable[[Path, int, int], Writer]] = {
    ".raw": Evt3Writer,
    ".dat": DatWriter,
    ".h5": H5Writer,
}


def holds_events(path: Path) -> bool:
    """Whether a file with one of AMBIGUOUS_SUFFIXES is a recording, by its content.

    A pointer of Git LFS is one, whatever the file was: it must not be left out silently.

    Raises:
        OSError: the file cannot be read.
    """
    if path.name.lower().endswith(BOXES_ARCHIVE):
        return False
    with path.open("rb") as file:
        start = file.read(len(GIT_LFS))
    if start == GIT_LFS:
        return True
    if path.suffix.lower() in TEXT_SUFFIXES:
        return read_text_head(path).has_events
    return holds_event_arrays(path)


def open_recording(
    path: str | Path,
    *,
    unstated_size: Sequence[int] | None = None,
    time_unit: TimeUnit | None = None,
) -> Recording:
    """Opens a recording with the reader for its suffix and header.

    Args:
        unstated_size: height and width of the sensor, for a file that does not state them.
        time_unit: of a text file's or NumPy archive's times; None: what is certain of them.

    Raises:
        RecordingError: no such file, an unknown suffix or format, or a header without the
            necessary fields.
    """
    path = Path(path)
    suffixes = ", ".join(SUFFIXES)
    if not path.is_file():
        raise RecordingError(f"{path} is no file. Give a recording: one of {suffixes}")
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        problem = f"has the suffix {path.suffix or '(none)'}; recordings have one of {suffixes}"
        description = describe_foreign_content(path)
        if description:
            problem += f". It {description}"
        raise RecordingError(f"{path} {problem}")
    require_own_content(path)
    size = None
    if unstated_size:
        height, width = unstated_size
        size = (height, width)
    if suffix == ".raw":
        return _open_raw(path, size)
    if suffix == ".dat":
        return DatReader(path, unstated_size=size)
    if suffix == ".aedat4":
        return Aedat4Reader(path, unstated_size=size)
    if suffix in TEXT_SUFFIXES:
        return TextReader(path, unstated_size=size, time_unit=time_unit)
    if suffix == ".npz":
        return NpzReader(path, unstated_size=size, time_unit=time_unit)
    return H5Reader(path, unstated_size=size)


def require_own_content(path: Path) -> None:
    """Refuses a file that contains something else than its suffix says.

    Raises:
        RecordingError: it is a Git LFS pointer, compressed, a web page, ...
    """
    expected = FIRST_BYTES.get(path.suffix.lower())
    if expected is None:
        return
    description = describe_foreign_content(path, expected=expected)
    if description:
        raise RecordingError(f"{path} {description}")


def _open_raw(path: Path, size: tuple[int, int] | None) -> Recording:
    name = raw_format(path)
    if name in RAW_READERS:
        return RAW_READERS[name](path, unstated_size=size)
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
