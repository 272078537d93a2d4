"""Trees of RVT's preprocessing: writes a small one, compares two."""

from pathlib import Path

import h5py
import hdf5plugin
import numpy as np
from evspan.data_prep.labels.box_files import RAW_BOX


def write_rvt_tree(root, recordings, split="train"):
    """As RVT's preprocess_dataset.py lays it out; frame values are the recording's number."""
    for number, (name, frames) in enumerate(recordings.items(), 1):
        labels = root / split / name / "labels_v2"
        frame_folder = "event_representations_v2/stacked_histogram_dt=50_nbins=10"
        (root / split / name / frame_folder).mkdir(parents=True)
        labels.mkdir()
        rows = np.zeros(3, RAW_BOX)  # two boxes in the first labelled frame, one in the second
        rows["t"] = [100_000, 100_000, 150_000]
        rows["x"] = [10, 20, 30]
        rows["class_id"] = [0, 1, 2]
        rows["w"] = 40
        rows["h"] = 50
        np.savez(labels / "labels.npz", labels=rows, objframe_idx_2_label_idx=np.array([0, 2]))
        np.save(labels / "timestamps_us.npy", np.array([100_000, 150_000]))
        folder = root / split / name / frame_folder
        np.save(folder / "timestamps_us.npy", 50_000 * np.arange(1, frames + 1))
        np.save(folder / "objframe_idx_2_repr_idx.npy", np.array([1, 2]))
        with h5py.File(folder / "event_representations_ds2_nearest.h5", "w") as file:
            file.create_dataset(
                "data",
                data=np.full((frames, 20, 18, 32), number, np.uint8),
                chunks=(1, 20, 18, 32),
                **hdf5plugin.Blosc(cname="zstd"),
            )
    return root


def files(folder: Path) -> list[str]:
    """Relative paths of all files except locks."""
    return sorted(
        str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p.name != ".lock"
    )


def assert_same_tree(ours: Path, theirs: Path) -> None:
    """The same files, arrays and dtypes, and the same chunks and filters of the frames."""
    assert files(ours) == files(theirs)
    for name in files(theirs):
        mine = ours / name
        other = theirs / name
        if name.endswith(".npz"):
            with np.load(mine) as a, np.load(other) as b:
                assert a.files == b.files
                for key in b.files:
                    assert_same(a[key], b[key], f"{name}/{key}")
        elif name.endswith(".npy"):
            assert_same(np.load(mine), np.load(other), name)
        else:
            with h5py.File(mine) as a, h5py.File(other) as b:
                assert [*a] == [*b] == ["data"]
                assert_same(a["data"][:], b["data"][:], name)
                assert layout(a["data"]) == layout(b["data"]), name


def assert_same(ours: np.ndarray, theirs: np.ndarray, name: str) -> None:
    """The same dtype, shape and bytes."""
    assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape), name
    assert ours.tobytes() == theirs.tobytes(), name


def layout(data: h5py.Dataset) -> tuple:
    """Chunks, maximum shape, filters and fill value."""
    created = data.id.get_create_plist()
    filters = [created.get_filter(i)[:3] for i in range(created.get_nfilters())]
    return data.chunks, data.maxshape, filters, data.fillvalue
