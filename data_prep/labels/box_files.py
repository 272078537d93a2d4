"""Box files: `X_bbox.npy` next to the recording `X_td.*`, in Prophesee's layout."""

from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from evspan.conf.errors import BoxesError
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
OLDER_NAMES = {"t": "ts", "class_confidence": "confidence"}
OPTIONAL = {"track_id": 0, "class_confidence": 1.0}
REQUIRED = tuple(name for name in FIELDS if name not in OPTIONAL)
RECORDING_ENDINGS = (
    "_td.dat.h5",
    "_td.dat",
    "_td.h5",
    "_td.raw",
    "_td.hdf5",
    ".raw",
    ".dat",
    ".h5",
    ".hdf5",
)


def recording_name(path: Path) -> str:
    """The name that a recording and its box file share: `X` of `X_td.raw`."""
    for ending in RECORDING_ENDINGS:
        if path.name.endswith(ending):
            return path.name.removesuffix(ending)
    return path.stem


def find_boxes(recording: Path) -> Path | None:
    """The box file next to a recording; None where there is none."""
    path = recording.with_name(f"{recording_name(recording)}_bbox.npy")
    return path if path.is_file() else None


def empty_boxes() -> BoxArray:
    """(0,) RAW_BOX, of a recording without a box file."""
    return np.zeros(0, RAW_BOX)


def read_boxes(path: str | Path) -> BoxArray:
    """Reads a box file.

    Fields may come in any order, `ts` instead of t and `confidence` instead of class_confidence.
    Missing optional fields (`OPTIONAL`) get their default.

    Returns:
        (N,) RAW_BOX, sorted by time; boxes of one time in the order of the file.

    Raises:
        BoxesError: the file is no structured array, lacks a field, or has values that do not fit.
    """
    raw = _mapped(path)
    present = raw.dtype.names or ()
    boxes = np.zeros(raw.size, RAW_BOX)
    missing: list[str] = []
    for name in FIELDS:
        source = name if name in present else OLDER_NAMES.get(name, name)
        if source in present:
            boxes[name] = _values(path, raw[source], source, RAW_BOX[name])
        elif name in OPTIONAL:
            boxes[name] = OPTIONAL[name]
        else:
            missing.append(name)
    if missing:
        fields = "field" if len(missing) == 1 else "fields"
        raise BoxesError(
            f"{path} lacks the {fields} {', '.join(missing)}; it has {', '.join(present)}. Boxes "
            f"need {', '.join(REQUIRED)}"
        )
    return boxes[np.argsort(boxes["t"], kind="stable")]


def _mapped(path: str | Path) -> NDArray[np.void]:
    """The file's array, memory-mapped: a damaged header with a huge size allocates nothing."""
    try:
        raw = np.lib.format.open_memmap(path, mode="r")
    except FileNotFoundError as error:
        raise BoxesError(
            f"{path} is not there. Give a box file (a structured .npy with {', '.join(FIELDS)})"
        ) from error
    except PermissionError:
        raise
    except Exception as error:  # a damaged header makes numpy raise a dozen types
        raise BoxesError(
            f"{path} is no plain .npy array ({error}). Save the boxes as a structured array with "
            f"the fields {', '.join(FIELDS)}"
        ) from error
    if raw.dtype.names is None or raw.ndim != 1:
        raise BoxesError(
            f"{path} holds {raw.dtype} of shape {raw.shape}, not a structured array of boxes with "
            f"the fields {', '.join(FIELDS)}"
        )
    return raw


def _values(path: str | Path, values: NDArray[Any], name: str, kind: np.dtype[Any]) -> NDArray[Any]:
    """Converts one field of all boxes to `kind`.

    Args:
        values: (N,) integers or floats.

    Raises:
        BoxesError: the conversion would change a number by more than rounding.
    """
    if values.dtype.kind not in "iuf" or values.ndim != 1:
        raise BoxesError(
            f"{path}: field {name!r} holds {values.dtype} of shape {values.shape[1:]}, not a "
            "number per box"
        )
    with np.errstate(over="ignore"):
        if kind.kind == "f":
            values = values.astype(kind)
            expected = "finite"
            fits = np.isfinite(values)
        elif name in ("t", "ts"):
            values = np.rint(values) if values.dtype.kind == "f" else values
            expected = "from 0 to 2**63 us"
            fits = (values >= 0) & (values < 2.0**63)
        else:
            expected = "a whole number from 0 to 2**32 - 1"
            fits = (values >= 0) & (values < 2.0**32) & (values == np.floor(values))
    if not fits.all():
        first = int(np.argmin(fits))
        unfit = int(np.count_nonzero(~fits))
        raise BoxesError(
            f"{path}: {unfit} of {fits.size} boxes have a {name} that does not fit, first "
            f"{values[first]} in row {first}; it must be {expected}. Remove or correct these rows"
        )
    return values.astype(kind)


def write_boxes(path: str | Path, boxes: BoxArray) -> None:
    """Writes a box file; fields are converted to RAW_BOX."""
    np.save(path, boxes.astype(RAW_BOX))
