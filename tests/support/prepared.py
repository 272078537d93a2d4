"""A small source of simulated recordings, and the contents of prepared folders, read by h5py."""

import json
import shutil
from pathlib import Path

import h5py
import hdf5plugin  # noqa: F401  registers the codec of the frames
import numpy as np
from evspan.conf.schema.prep import DatasetConfig, FrameConfig, LabelConfig, PrepConfig
from evspan.data_prep.simulator import CLASSES, SimulatorConfig, simulate
from support.sealed import COLUMNS, checksum

HEIGHT, WIDTH = 160, 200
SCENE = SimulatorConfig(height=HEIGHT, width=WIDTH, min_objects=1, max_objects=3)
RECORDINGS = {
    "train/a_td.raw": 0.52,
    "train/b_td.dat": 0.31,
    "train/c_td.h5": 0.25,
    "val/d_td.raw": 0.35,
    "test/plain.raw": 0.22,
}
KEYS = ["train/a", "train/b", "train/c", "val/d", "test/plain"]


def make_source(folder: Path) -> Path:
    """Simulates the recordings; test/plain has no boxes."""
    for seed, (name, seconds) in enumerate(RECORDINGS.items()):
        simulate(folder / name, seconds=seconds, seed=seed, config=SCENE)
    (folder / "test" / "plain_bbox.npy").unlink()
    return folder


def prep_config(
    source: Path,
    output: Path,
    *,
    labels: dict | None = None,
    processes: int = 1,
    frames: dict | None = None,
    **values,
) -> PrepConfig:
    """A config of the source. labels, frames: keys of LabelConfig and FrameConfig."""
    dataset = DatasetConfig(
        name="simulated",
        classes=list(CLASSES),
        labels=LabelConfig(**{"class_map": {0: 0, 1: 1, 2: 2}, **(labels or {})}),
    )
    return PrepConfig(
        source=str(source),
        output=str(output),
        dataset=dataset,
        processes=processes,
        frames=FrameConfig(**{"bins": 3, **(frames or {})}),
        **values,
    )


def copied(source: Path, target: Path) -> Path:
    """Copies a folder and the times of its files."""
    return Path(shutil.copytree(source, target))


def frames_in(group: h5py.Group) -> np.ndarray:
    """(N, 2 * bins, H, W) uint8, decoded by the numpy lines of data_prep/frames/codec.py."""
    step = np.append(np.arange(1, 255), [0, 254])
    shape = tuple(group.attrs["frame_shape"])
    start = group["frame_start"][:]
    codes = group["frames"][:]
    frames = np.zeros((len(start) - 1, *shape), np.uint8)
    for frame, first, last in zip(frames, start, start[1:], strict=False):
        code = codes[first:last]
        cell = np.cumsum(step[code]) - 1
        counts = np.bincount(cell[code != 255], minlength=frame.size)
        frame[:] = counts.astype(np.uint8).reshape(shape)
    return frames


def contents(output: Path) -> dict[str, dict[str, np.ndarray]]:
    """The datasets of every recording in the shards, by split/recording.

    `frames` are decoded; `code` is the stored form.
    """
    result: dict[str, dict[str, np.ndarray]] = {}
    for path in sorted(output.glob("*/[0-9]*.h5")):
        with h5py.File(path, "r") as file:
            for name, group in file.items():
                result[f"{path.parent.name}/{name}"] = {
                    "frames": frames_in(group),
                    "code": group["frames"][:],
                    **{column: group[column][:] for column in COLUMNS},
                }
    return result


def manifest(output: Path) -> dict:
    """The parsed manifest."""
    return json.loads((output / "manifest.json").read_text())


def entries(output: Path) -> dict[str, dict]:
    """The manifest's entries by split/recording."""
    return {f"{r['split']}/{r['name']}": r for r in manifest(output)["recordings"]}


def assert_sound(output: Path) -> None:
    """If there is a manifest, all its recordings exist and have its checksums."""
    if (output / "manifest.json").exists():
        stored = contents(output)
        for key, entry in entries(output).items():
            assert checksum(stored[key]) == (entry["frames_xxh3"], entry["group_xxh3"])


def assert_same(output: Path, other: Path) -> None:
    """The same datasets, shards and manifest, except the times of the source's files."""
    mine = contents(output)
    theirs = contents(other)
    assert mine.keys() == theirs.keys()
    for key, columns in mine.items():
        for name, values in columns.items():
            np.testing.assert_array_equal(values, theirs[key][name], err_msg=f"{key}/{name}")
    actual = manifest(output)
    expected = manifest(other)
    for recording in (*actual["recordings"], *expected["recordings"]):
        del recording["source_mtime_ns"]
    assert actual == expected
    assert _files(output) == _files(other)


def _files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
