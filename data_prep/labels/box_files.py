"""Box files: `X_bbox.npy` next to the recording `X_td.*`, in Prophesee's layout.

A row whose optional boolean field `ignore` is true is an ignore region: something may be there, and
nothing is learned or scored in it. Its class does not matter. A region without an area only marks
the time of a labelled frame, which may have no boxes: a negative.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeAlias

import numpy as np
from evspan.conf.errors import BoxesError
from evspan.conf.schema.prep import TimeUnit
from evspan.conf.text import printable
from evspan.data_prep.foreign_content import TO_H5, describe_foreign_content
from evspan.data_prep.recordings.links import require_targets, stat_of
from numpy.typing import NDArray

BoxArray: TypeAlias = NDArray[np.void]  # (N,) structured, dtype RAW_BOX
RAW_BOX = np.dtype(
    [
        ("t", "<i8"),
        ("x", "<f4"),
        ("y", "<f4"),
        ("w", "<f4"),
        ("h", "<f4"),
        ("class_id", "<u4"),
        ("track_id", "<u4"),
        ("class_confidence", "<f4"),
    ]
)  # t in us; x, y: top left; pixels of the sensor
FIELDS = RAW_BOX.names or ()
FORM = f"Save the boxes as a structured array with the fields {', '.join(FIELDS)}"
OLDER_NAMES = {"t": "ts", "class_confidence": "confidence"}
MAGIC = b"\x93NUMPY"  # first bytes of an .npy file
ZIP = "is a ZIP archive"
LONGEST_CAUSE = 200  # characters of numpy's message, which may repeat the file's header
NO_TRACK = 2**32 - 1  # track_id of a box without a track; -1 in files of signed numbers
IGNORE = "ignore"  # optional boolean field: the row is an ignore region
NO_CLASS = 2**32 - 1  # class_id of an ignore region
OPTIONAL = {"track_id": 0, "class_confidence": 1.0}
REQUIRED = tuple(name for name in FIELDS if name not in OPTIONAL)
RAW_LABEL = np.dtype([*RAW_BOX.descr, (IGNORE, "?")])  # of a file with ignore regions
BOXES_ENDING = "_bbox.npy"
RECORDING_ENDINGS = (
    "_td.dat.h5",
    "_td.dat",
    "_td.h5",
    "_td.raw",
    "_td.hdf5",
    "_td.aedat4",
    "_td.csv",
    "_td.txt",
    "_td.npz",
    ".raw",
    ".dat",
    ".h5",
    ".hdf5",
)


class LabelRows(NamedTuple):
    """The rows of a box file, each sorted by time.

    boxes: (N,) RAW_BOX. regions: (R,) RAW_BOX, the ignore regions, of class NO_CLASS.
    """

    boxes: BoxArray
    regions: BoxArray

    @property
    def times(self) -> NDArray[np.int64]:
        """(N + R,) the times of all rows in microseconds, sorted."""
        times: NDArray[np.int64] = self.boxes["t"]
        if not self.regions.size:
            return times
        return np.sort(np.concatenate((times, self.regions["t"])), kind="stable")


def recording_name(path: Path) -> str:
    """The name that a recording and its box file share: `X` of `X_td.raw`, `X_TD.RAW`."""
    for ending in RECORDING_ENDINGS:
        if path.name.lower().endswith(ending):
            return path.name[: -len(ending)]
    return path.stem


def find_boxes(recording: Path, listed: dict[Path, dict[str, Path]] | None = None) -> Path | None:
    """The box file next to a recording; None where there is none.

    Args:
        listed: the box files of each folder that was listed, for repeated calls.

    Raises:
        RecordingError: the box file is a link without a target.
        OSError: the folder or the target of a link cannot be read now.
    """
    path = recording.with_name(recording_name(recording) + BOXES_ENDING)
    if stat_of(path) is None:  # perhaps in another case, from another system
        if stat_of(path.parent) is None:
            return None
        listed = {} if listed is None else listed
        if path.parent not in listed:
            siblings = [path.with_name(name) for name in os.listdir(path.parent)]
            listed[path.parent] = boxes_in(siblings)
        other = listed[path.parent].get(recording_name(recording))
        if other is None:
            return None
        path = other
    require_targets([path])
    return path if path.is_file() else None


def boxes_in(paths: Iterable[Path]) -> dict[str, Path]:
    """The box files among the entries of a folder, by the name of their recording.

    The ending counts in any case; of `X_bbox.npy` and `X_BBOX.NPY` the first is taken.
    """
    boxes: dict[str, Path] = {}
    for path in sorted(paths, key=lambda path: not path.name.endswith(BOXES_ENDING)):
        if path.name.lower().endswith(BOXES_ENDING):
            boxes.setdefault(path.name[: -len(BOXES_ENDING)], path)
    return boxes


def empty_boxes() -> BoxArray:
    """(0,) RAW_BOX, of a recording without a box file."""
    return np.zeros(0, RAW_BOX)


def read_boxes(
    path: str | Path, *, time_unit: TimeUnit = TimeUnit.us, offset_us: int = 0
) -> BoxArray:
    """Reads the boxes of a box file, without its ignore regions; as `read_labels`.

    Returns:
        (N,) RAW_BOX, sorted by time; boxes of one time in the order of the file.
    """
    return read_labels(path, time_unit=time_unit, offset_us=offset_us).boxes


def read_labels(
    path: str | Path, *, time_unit: TimeUnit = TimeUnit.us, offset_us: int = 0
) -> LabelRows:
    """Reads a box file.

    Fields may come in any order, `ts` instead of t and `confidence` instead of class_confidence.
    Missing optional fields (`OPTIONAL`), and confidences that are not finite, get their default.
    A negative track_id or NaN becomes NO_TRACK; tracks whose ids do not fit are numbered again.

    Args:
        time_unit: of the times in the file.
        offset_us: is added to the times; the sums may be negative.

    Returns:
        Boxes and ignore regions; rows of one time are in the order of the file.

    Raises:
        BoxesError: the file is no structured array, lacks a field, or has values that do not fit.
        OSError: the file cannot be read now.
    """
    raw = read_array(path)
    in_file = _present_fields(path, raw.dtype.names or ())
    ignored = _ignored(path, raw)
    boxes = np.zeros(raw.size, RAW_BOX)
    for name, default in OPTIONAL.items():
        boxes[name] = default
    for name, source in in_file.items():
        _require_numbers(path, raw[source], source)
        if name == "t":
            boxes[name] = _times(path, raw[source], source, time_unit, offset_us)
        elif name == "track_id":
            boxes[name] = _tracks(raw[source])
        elif name == "class_confidence":
            boxes[name] = np.where(np.isfinite(raw[source]), raw[source], OPTIONAL[name])
        elif name == "class_id":
            boxes[name] = NO_CLASS
            boxes[name][~ignored] = _values(path, raw[source][~ignored], source, RAW_BOX[name])
        else:
            boxes[name] = _values(path, raw[source], source, RAW_BOX[name])
    order = np.argsort(boxes["t"], kind="stable")
    boxes = boxes[order]
    if not ignored.any():
        return LabelRows(boxes, empty_boxes())
    ignored = ignored[order]
    return LabelRows(boxes[~ignored], boxes[ignored])


def _present_fields(path: str | Path, present: tuple[str, ...]) -> dict[str, str]:
    """The name in the file of each of FIELDS that it has."""
    in_file: dict[str, str] = {}
    for name in FIELDS:
        source = name if name in present else OLDER_NAMES.get(name, name)
        if source in present:
            in_file[name] = source
    missing = [name for name in REQUIRED if name not in in_file]
    if missing:
        fields = "field" if len(missing) == 1 else "fields"
        raise BoxesError(
            f"{path} lacks the {fields} {', '.join(missing)}; it has {', '.join(present)}. Boxes "
            f"need {', '.join(REQUIRED)}"
        )
    return in_file


def read_array(path: str | Path) -> NDArray[np.void]:
    """(N,) the structured array of an .npy file. Nothing is unpickled, and no header is believed.

    Raises:
        BoxesError: it is another file, a damaged one, or another array.
        OSError: the file cannot be read now.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            return _read_npy(path, file, os.fstat(file.fileno()).st_size)
    except FileNotFoundError as error:
        raise BoxesError(
            f"{path} is not there. Give a box file (a structured .npy with {', '.join(FIELDS)})"
        ) from error
    except IsADirectoryError as error:
        raise _no_array(path, "it is a folder") from error


def _read_npy(path: Path, file: BinaryIO, size: int) -> NDArray[np.void]:
    foreign = describe_foreign_content(path, expected=MAGIC).removesuffix(f". {TO_H5}")
    if foreign.startswith(ZIP):
        foreign += ". Of an .npz, save the array of boxes with numpy.save"
    if foreign:
        raise BoxesError(f"{path} is no plain .npy array: it {foreign}. {FORM}")
    try:
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_2_0
        if version == (1, 0):
            read_header = np.lib.format.read_array_header_1_0
        shape, _, dtype = read_header(file)
    except OSError:
        raise
    except Exception as error:  # a damaged header makes numpy raise a dozen types
        raise _no_array(path, printable(str(error).split("\n")[0][:LONGEST_CAUSE])) from error
    if dtype.hasobject:
        raise _no_array(path, "it holds pickled Python objects, which are not loaded")
    if dtype.names is None or len(shape) != 1:
        raise BoxesError(
            f"{path} holds {dtype} of shape {shape}, not a structured array of boxes with "
            f"the fields {', '.join(FIELDS)}"
        )
    expected = shape[0] * dtype.itemsize
    data = size - file.tell()
    if shape[0] < 0 or expected != data or (shape[0] and not expected):
        raise _no_array(
            path,
            f"its header states {shape[0]} boxes of "
            f"{dtype.itemsize} bytes, and {data} bytes follow instead of {expected}: it is cut "
            "off or damaged",
        )
    boxes: NDArray[np.void] = np.fromfile(file, dtype, shape[0])
    return boxes


def _no_array(path: Path, problem: str) -> BoxesError:
    return BoxesError(f"{path} is no plain .npy array ({problem}). {FORM}")


def _ignored(path: str | Path, raw: NDArray[np.void]) -> NDArray[np.bool_]:
    """(N,) which rows are ignore regions."""
    if IGNORE not in (raw.dtype.names or ()):
        return np.zeros(raw.size, bool)
    values = raw[IGNORE]
    if values.ndim == 1 and values.dtype.kind in "biuf":
        ignored: NDArray[np.bool_] = values != 0
        if np.isin(values, (0, 1)).all():
            return ignored
    raise BoxesError(
        f"{path}: field {IGNORE!r} holds {values.dtype} of shape {values.shape[1:]} with other "
        "values than true and false; it marks the rows that are ignore regions"
    )


def _require_numbers(path: str | Path, values: NDArray[Any], name: str) -> None:
    if values.dtype.kind not in "iuf" or values.ndim != 1:
        raise BoxesError(
            f"{path}: field {name!r} holds {values.dtype} of shape {values.shape[1:]}, not a "
            "number per box"
        )


def _times(
    path: str | Path, values: NDArray[Any], name: str, unit: TimeUnit, offset_us: int
) -> NDArray[np.int64]:
    """(N,) microseconds, rounded, with the offset. values: (N,) integers or floats."""
    if values.dtype.kind == "f" or unit is not TimeUnit.us:
        values = np.rint(values.astype(np.float64) * unit.in_us)
    fits = (values >= 0) & (values < 2.0**63 - max(0, offset_us))
    _require_fit(path, values, name, fits, "from 0 to 2**63 us")
    times: NDArray[np.int64] = values.astype(np.int64) + offset_us
    return times


def _tracks(values: NDArray[Any]) -> NDArray[np.uint32]:
    """(N,) track ids. values: (N,) integers or floats, of any size."""
    if values.dtype.kind == "f":
        values = values.astype(np.float64)
    has_track = (values >= 0) & (values != NO_TRACK)
    fits = has_track & (values < 2.0**31) & (values == np.floor(values))
    ids = np.full(values.size, NO_TRACK, np.uint32)
    kept = values[has_track]
    if not fits[has_track].all():  # numbered in the order of their ids: equal ones stay equal
        kept = np.unique(kept, return_inverse=True)[1]
    ids[has_track] = kept
    return ids


def _values(path: str | Path, values: NDArray[Any], name: str, kind: np.dtype[Any]) -> NDArray[Any]:
    """Converts one field of all boxes to `kind`.

    Args:
        values: (N,) integers or floats.

    Raises:
        BoxesError: the conversion would change a number by more than rounding.
    """
    with np.errstate(over="ignore"):
        if kind.kind == "f":
            values = values.astype(kind)
            _require_fit(path, values, name, np.isfinite(values), "finite")
        else:
            fits = (values >= 0) & (values < 2.0**32) & (values == np.floor(values))
            _require_fit(path, values, name, fits, "a whole number from 0 to 2**32 - 1")
    return values.astype(kind)


def _require_fit(
    path: str | Path, values: NDArray[Any], name: str, fits: NDArray[np.bool_], expected: str
) -> None:
    if fits.all():
        return
    first = int(np.argmin(fits))
    unfit = int(np.count_nonzero(~fits))
    raise BoxesError(
        f"{path}: {unfit} of {fits.size} boxes have a {name} that does not fit, first "
        f"{values[first]} in row {first}; it must be {expected}. Remove or correct these rows"
    )


def write_boxes(path: str | Path, boxes: BoxArray, regions: BoxArray | None = None) -> None:
    """Writes a box file; fields are converted to RAW_BOX.

    Args:
        regions: (R,) ignore regions; with any, the file has the field `ignore`, and its rows are
            sorted by time.
    """
    if regions is None or not regions.size:
        np.save(path, boxes.astype(RAW_BOX))
        return
    rows = np.zeros(boxes.size + regions.size, RAW_LABEL)
    for name in FIELDS:
        rows[name] = np.concatenate((boxes[name], regions[name]))
    rows["class_id"][boxes.size :] = NO_CLASS
    rows[IGNORE][boxes.size :] = True
    np.save(path, rows[np.argsort(rows["t"], kind="stable")])
