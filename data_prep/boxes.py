"""Box files: `X_bbox.npy` beside the recording `X_td.*`, in Prophesee's layout."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import BoxesError

RAW_BOX = np.dtype([("t", "<i8"), ("x", "<f4"), ("y", "<f4"), ("w", "<f4"), ("h", "<f4"), ("class_id", "<u4"),
                    ("track_id", "<u4"), ("class_confidence", "<f4")])  # t in us; x, y: top left; pixels of the sensor
OLDER_NAMES = {"t": "ts", "class_confidence": "confidence"}
OPTIONAL = {"track_id": 0, "class_confidence": 1.0}
RECORDING_ENDINGS = ("_td.dat.h5", "_td.dat", "_td.h5", "_td.raw", "_td.hdf5", ".raw", ".dat", ".h5", ".hdf5")


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
    try:
        raw = np.load(path, allow_pickle=False)
    except FileNotFoundError as error:
        raise BoxesError(f"{path} is not there. Give a box file ({RAW_BOX.names} as a structured .npy)") from error
    except (ValueError, OSError, EOFError) as error:
        raise BoxesError(f"{path} is no plain .npy array ({error}). Save the boxes as a structured array with the fields "
                         f"{', '.join(RAW_BOX.names or ())}") from error
    if not isinstance(raw, np.ndarray) or raw.dtype.names is None or raw.ndim != 1:
        raise BoxesError(f"{path} holds {getattr(raw, 'dtype', type(raw))} of shape {getattr(raw, 'shape', '?')}, not a "
                         "structured array of boxes "
                         f"with the fields {', '.join(RAW_BOX.names or ())}")
    boxes = np.zeros(raw.size, RAW_BOX)
    missing = []
    for name in RAW_BOX.names or ():
        source = name if name in raw.dtype.names else OLDER_NAMES.get(name, name)
        if source in raw.dtype.names:
            if raw[source].dtype.kind not in "iuf":
                raise BoxesError(f"{path}: field {source!r} holds {raw[source].dtype}, not numbers")
            boxes[name] = raw[source]
        elif name in OPTIONAL:
            boxes[name] = OPTIONAL[name]
        else:
            missing.append(name)
    if missing:
        raise BoxesError(f"{path} lacks the field{'s' if len(missing) > 1 else ''} {', '.join(missing)}; it has "
                         f"{', '.join(raw.dtype.names)}. "
                         f"Boxes need {', '.join(n for n in RAW_BOX.names or () if n not in OPTIONAL)}")
    bad = ~np.isfinite(np.stack([boxes[k] for k in "xywh"])).all(0)
    if bad.any():
        raise BoxesError(f"{path}: {int(bad.sum())} of {boxes.size} boxes hold x, y, w or h that is not finite, first in row "
                         f"{int(np.argmax(bad))}. "
                         "Remove or mend these rows")
    return boxes[np.argsort(boxes["t"], kind="stable")]


def write_boxes(path: str | Path, boxes: NDArray) -> None:
    np.save(path, boxes.astype(RAW_BOX))
