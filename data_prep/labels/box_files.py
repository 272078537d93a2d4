"""Box files: `X_bbox.npy` beside the recording `X_td.*`, in Prophesee's layout."""

from pathlib import Path

import numpy as np
from evspan.conf.errors import BoxesError
from numpy.typing import NDArray

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
    path = recording.with_name(f"{recording_name(recording)}_bbox.npy")
    return path if path.is_file() else None


def read_boxes(path: str | Path) -> NDArray:
    """Boxes in RAW_BOX, sorted by time. Fields may come in any order, `ts` for t and `confidence` for class_confidence.

    Raises:
        BoxesError: no .npy of a structured array, fields missing, or values that are no boxes. Nothing is unpickled.
    """
    raw = _mapped(path)
    there = raw.dtype.names or ()
    boxes = np.zeros(raw.size, RAW_BOX)
    missing = []
    for name in FIELDS:
        source = name if name in there else OLDER_NAMES.get(name, name)
        if source in there:
            boxes[name] = _values(path, raw[source], source, RAW_BOX[name])
        elif name in OPTIONAL:
            boxes[name] = OPTIONAL[name]
        else:
            missing.append(name)
    if missing:
        raise BoxesError(
            f"{path} lacks the field{'s' if len(missing) > 1 else ''} {', '.join(missing)}; it has "
            f"{', '.join(there)}. Boxes need {', '.join(n for n in FIELDS if n not in OPTIONAL)}"
        )
    return boxes[np.argsort(boxes["t"], kind="stable")]


def _mapped(path: str | Path) -> NDArray:
    """The file's array, mapped: a damaged header that tells a size beyond the file's costs no memory."""
    try:
        raw = np.lib.format.open_memmap(path, mode="r")
    except FileNotFoundError as error:
        raise BoxesError(
            f"{path} is not there. Give a box file (a structured .npy with {', '.join(FIELDS)})"
        ) from error
    except PermissionError:
        raise
    except Exception as error:  # a damaged header makes numpy raise a dozen kinds
        raise BoxesError(
            f"{path} is no plain .npy array ({error}). Save the boxes as a structured array with the fields "
            f"{', '.join(FIELDS)}"
        ) from error
    if raw.dtype.names is None or raw.ndim != 1:
        raise BoxesError(
            f"{path} holds {raw.dtype} of shape {raw.shape}, not a structured array of boxes with the fields "
            f"{', '.join(FIELDS)}"
        )
    return raw


def _values(path: str | Path, values: NDArray, name: str, kind: np.dtype) -> NDArray:
    """One field of all boxes as `kind`. Raises BoxesError where that would change a number beyond rounding."""
    if values.dtype.kind not in "iuf" or values.ndim != 1:
        raise BoxesError(
            f"{path}: field {name!r} holds {values.dtype} of shape {values.shape[1:]}, not a number per box"
        )
    with np.errstate(over="ignore"):
        if kind.kind == "f":
            values, wanted = values.astype(kind), "finite"
            fits = np.isfinite(values)
        elif name in ("t", "ts"):
            values, wanted = (
                np.rint(values) if values.dtype.kind == "f" else values,
                "from 0 to 2**63 us",
            )
            fits = (values >= 0) & (values < 2.0**63)
        else:
            wanted = "a whole number from 0 to 2**32 - 1"
            fits = (values >= 0) & (values < 2.0**32) & (values == np.floor(values))
    if not fits.all():
        first = int(np.argmin(fits))
        raise BoxesError(
            f"{path}: {fits.size - np.count_nonzero(fits)} of {fits.size} boxes have a {name} that does not fit, "
            f"first {values[first]} in row {first}; it must be {wanted}. Remove or mend these rows"
        )
    return values.astype(kind)


def write_boxes(path: str | Path, boxes: NDArray) -> None:
    np.save(path, boxes.astype(RAW_BOX))
