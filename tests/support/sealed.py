"""Checksums of shards as data_prep/shards/format.py and checksums.py define them."""

from itertools import pairwise

import h5py
import numpy as np
import xxhash

IGNORE_COLUMNS = ("ignore", "ignore_start")  # of a recording with ignore regions
COLUMNS = ("frame_start", "end_us", "boxes", "box_start", "labelled")


def checksum(columns: dict[str, np.ndarray]) -> tuple[str, str]:
    """(frames_xxh3, group_xxh3) as data_prep/shards/format.py defines them."""
    frames = xxhash.xxh3_64_hexdigest(columns["code"].tobytes())
    present = [name for name in (*COLUMNS, *IGNORE_COLUMNS) if name in columns]
    rest = b"".join(columns[name].tobytes() for name in present)
    return frames, xxhash.xxh3_64_hexdigest(frames.encode() + rest)


def seal_rows(group: h5py.Group, entry: dict) -> None:
    """Writes the checksums that are verified while reading, as shards/checksums.py defines them."""
    names = ["frame_start", "end_us", "box_start", "labelled", "frame_xxh3", "box_xxh3"]
    rows_of = [("frame_xxh3", "frames", "frame_start"), ("box_xxh3", "boxes", "box_start")]
    if "ignore" in group:
        names += ["ignore_start", "ignore_xxh3"]
        rows_of.append(("ignore_xxh3", "ignore", "ignore_start"))
    for name, rows_name, start_name in rows_of:
        rows = group[rows_name][:]
        start = group[start_name][:]
        sums = [
            xxhash.xxh3_64_intdigest(rows[first:last].tobytes()) for first, last in pairwise(start)
        ]
        if name in group:
            del group[name]
        group[name] = np.array(sums, np.uint64)
    digest = xxhash.xxh3_64(entry["group_xxh3"].encode())
    digest.update(f"{entry['split']}/{entry['name']}".encode())
    shape = (group.attrs["frame_shape"][0], entry["height"], entry["width"])
    digest.update(np.array([*shape, entry["first_us"]], np.int64).tobytes())
    for name in names:
        digest.update(group[name][:].tobytes())
    group.attrs["index_xxh3"] = np.bytes_(digest.hexdigest())
