"""RVT's preparation of Gen4 recordings, written after its rules: the reference of `prep_speed.py`.

    .venv/bin/python tests/benchmarks/rvt_way.py RAW OUT [--processes 2]

The steps and libraries (torch, h5py, Blosc) are those of its preprocess_dataset.py: labels are
filtered and thinned; all times are loaded and made monotonic; each window's events are read from
HDF5, counted at full resolution with `put_`, clamped, reduced to half resolution by `interpolate`,
and appended to an HDF5 file. `test_rvt_way.py` compares it with the published output.
"""

import argparse
import os
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import h5py
import hdf5plugin  # noqa: F401  registers Blosc
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

BINS = 10
CUTOFF = 10
WINDOW_US = 50_000
HEIGHT = 720
WIDTH = 1280
FIRST_LABEL_US = 100_000
JITTER_US = 2000
MIN_SIDE = 5
CLASSES = 3
# Level 1, byte shuffle.
BLOSC_ZSTD = {"compression": 32001, "compression_opts": (0, 0, 0, 0, 1, 1, 5)}
REPRESENTATION = Path("event_representations_v2") / "stacked_histogram_dt=50_nbins=10"


# -- labels ----------------------------------------------------------------------------------------
def filtered(labels: np.ndarray, train: bool) -> np.ndarray:
    """The labels that are kept, cropped to the frame (in place). train: drops wide ones too."""
    labels = labels[labels["class_id"] < CLASSES]
    right = np.clip(labels["x"] + labels["w"], 0, WIDTH - 1)
    bottom = np.clip(labels["y"] + labels["h"], 0, HEIGHT - 1)
    labels["x"] = np.clip(labels["x"], 0, WIDTH - 1)
    labels["y"] = np.clip(labels["y"], 0, HEIGHT - 1)
    labels["w"] = right - labels["x"]
    labels["h"] = bottom - labels["y"]
    labels = labels[(labels["w"] > 0) & (labels["h"] > 0)]
    labels = labels[(labels["w"] >= MIN_SIDE) & (labels["h"] >= MIN_SIDE)]
    if train:
        labels = labels[labels["w"] <= 9 * WIDTH // 10]
    return labels


def labelled_times(labels: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """(F,) times of labelled frames in us, and the number of 50 ms windows between each two."""
    times = np.unique(labels["t"])
    period = np.median(np.diff(times))
    base = int({60: 6, 30: 3}[int(np.rint(1e6 / period))] * period)
    first = np.searchsorted(times, FIRST_LABEL_US)
    kept = [times[first]]
    windows = []
    for time in times[first + 1 :]:
        distance = time - kept[-1]
        periods = round(distance / base)
        if abs(distance - periods * base) <= JITTER_US:
            kept.append(time)
            windows.append(2 * periods)
    return np.asarray(kept), windows


def frame_ends(labelled_us: np.ndarray, windows: list[int]) -> np.ndarray:
    """(N,) int64 ends of all windows in us."""
    ends = list(reversed(range(int(labelled_us[0]), 0, -WINDOW_US)))[1:-1]
    for start, stop, count in zip(labelled_us[:-1], labelled_us[1:], windows, strict=True):
        ends.extend(np.linspace(start, stop, count + 1).astype(np.int64)[:-1])
    return np.asarray([*ends, labelled_us[-1]], np.int64)


# -- frames ----------------------------------------------------------------------------------------
def histogram(
    x: Tensor, y: Tensor, p: Tensor, t: Tensor, height: int = HEIGHT, width: int = WIDTH
) -> Tensor:
    """Counts the events of one window.

    Args:
        x, y, p, t: (N,) int64.

    Returns:
        (2 * BINS, height, width) uint8.
    """
    counts = torch.zeros((2, BINS, height, width), dtype=torch.uint8)
    if x.numel():
        assert p.min() >= 0
        assert p.max() <= 1
        fraction = (t - t[0]) / max(t[-1] - t[0], torch.tensor(1))
        bin_ = torch.clamp((fraction * BINS).floor(), max=BINS - 1)
        area = height * width
        index = x.long() + width * y.long() + area * bin_.long() + BINS * area * p.long()
        counts.put_(index, torch.ones_like(index, dtype=torch.uint8), accumulate=True)
    return torch.clamp(counts, min=0, max=CUTOFF).reshape(2 * BINS, height, width)


def half_resolution(frame: Tensor) -> Tensor:
    """(C, H, W) -> (C, H / 2, W / 2)."""
    return interpolate(frame[None], scale_factor=0.5, mode="nearest-exact")[0]


def write_frames(recording: Path, out: Path, ends: np.ndarray) -> int:
    """Writes the frames of the windows that end at `ends`. Returns the number of counted events."""
    shape = (2 * BINS, HEIGHT // 2, WIDTH // 2)
    unfinished = out.with_name(f"{out.stem}_in_progress{out.suffix}")
    with h5py.File(recording, "r") as source, h5py.File(unfinished, "w") as target:
        events = source["events"]
        height = int(events["height"][()]) if "height" in events else HEIGHT
        width = int(events["width"][()]) if "width" in events else WIDTH
        times = np.maximum.accumulate(np.asarray(events["t"]))
        first = np.searchsorted(times, ends - WINDOW_US, side="left")
        last = np.searchsorted(times, ends, side="right")
        data = target.create_dataset(
            "data", (1, *shape), "uint8", chunks=(1, *shape), maxshape=(None, *shape), **BLOSC_ZSTD
        )
        for i, (start, stop) in enumerate(zip(first, last, strict=True)):
            x = as_int64(events["x"][start:stop])
            y = as_int64(events["y"][start:stop])
            p = torch.clamp(as_int64(events["p"][start:stop]), min=0)
            t = as_int64(times[start:stop])
            frame = half_resolution(histogram(x, y, p, t, height, width))
            data.resize(i + 1, axis=0)
            data[i : i + 1] = frame.numpy()
    os.rename(unfinished, out)
    return int((last - first).sum())


def as_int64(values: np.ndarray) -> Tensor:
    """An array as an int64 tensor."""
    return torch.from_numpy(np.asarray(values, dtype=np.int64))


# -- recordings ------------------------------------------------------------------------------------
def prepare_recording(recording: Path, out: Path) -> int:
    """Prepares `.../train/X_td.h5`, with `X_bbox.npy` in the same folder, to the folder `out`.

    Writes nothing if no label is left. Returns the number of counted events.
    """
    boxes = np.load(recording.with_name(recording.name.replace("_td.h5", "_bbox.npy")))
    labels = filtered(boxes, train=recording.parent.name == "train")
    if not labels.size:
        return 0
    labelled_us, windows = labelled_times(labels)
    ends = frame_ends(labelled_us, windows)
    per_frame = [labels[labels["t"] == time] for time in labelled_us]
    (out / "labels_v2").mkdir(parents=True)
    np.savez(
        out / "labels_v2" / "labels.npz",
        labels=np.concatenate(per_frame),
        objframe_idx_2_label_idx=np.cumsum([0, *map(len, per_frame[:-1])]),
    )
    np.save(out / "labels_v2" / "timestamps_us.npy", labelled_us)
    folder = out / REPRESENTATION
    folder.mkdir(parents=True)
    np.save(folder / "timestamps_us.npy", ends)
    np.save(folder / "objframe_idx_2_repr_idx.npy", np.searchsorted(ends, labelled_us))
    return write_frames(recording, folder / "event_representations_ds2_nearest.h5", ends)


def _prepare_below(source: Path, out: Path, recording: Path) -> int:
    torch.set_num_threads(1)
    name = recording.name.removesuffix("_td.h5")
    return prepare_recording(recording, out / recording.relative_to(source).with_name(name))


def prepare(source: Path, out: Path, processes: int = 1) -> int:
    """Prepares `source/{train,val,test}/*_td.h5`. Returns the number of counted events."""
    work = partial(_prepare_below, source, out)
    recordings = sorted(source.glob("*/*_td.h5"))
    if processes == 1:
        return sum(map(work, recordings))
    with get_context("spawn").Pool(processes) as pool:
        return sum(pool.imap_unordered(work, recordings))


def main() -> None:
    """Prepares a tree."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("raw", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--processes", type=int, default=1)
    args = parser.parse_args()
    print(f"{prepare(args.raw, args.out, args.processes)} events")


if __name__ == "__main__":
    main()
