"""Measures size, write speed and read speed of stored frames by codec.

    .venv/bin/python tests/benchmarks/storage.py [--recording drive_td.raw] [--downsample 2]

Frames of a recording (default: 3 simulated seconds of 1280 x 720) are written to an HDF5 file in
memory, one chunk per frame by general compressors, and by our codec as in shards. They are read
back one by one. Times are processor time of this process, the best of three.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from itertools import count, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import h5py
import hdf5plugin
import numpy as np
from evspan.conf.schema.prep import Codec, FrameConfig
from evspan.data_prep.frames.codec import FrameEncoder
from evspan.data_prep.frames.histogram import frames_of
from evspan.data_prep.recordings.open import open_recording
from evspan.data_prep.shards.format import FRAME_SHAPE
from evspan.data_prep.shards.reading import read_frames
from evspan.data_prep.shards.write import FILTERS, CodeWriter
from evspan.data_prep.simulator import simulate

MOST_FRAMES = 60
BYTE = hdf5plugin.Blosc.SHUFFLE
BIT = hdf5plugin.Blosc.BITSHUFFLE
NONE = hdf5plugin.Blosc.NOSHUFFLE
CODECS = {
    "blosc zstd 1, byte shuffle (RVT)": hdf5plugin.Blosc(cname="zstd", clevel=1, shuffle=BYTE),
    "blosc lz4 5, byte shuffle": hdf5plugin.Blosc(cname="lz4", clevel=5, shuffle=BYTE),
    "blosc lz4 5, no shuffle": hdf5plugin.Blosc(cname="lz4", clevel=5, shuffle=NONE),
    "blosc lz4 9, byte shuffle": hdf5plugin.Blosc(cname="lz4", clevel=9, shuffle=BYTE),
    "blosc lz4 5, bit shuffle": hdf5plugin.Blosc(cname="lz4", clevel=5, shuffle=BIT),
    "blosc lz4hc 5, byte shuffle": hdf5plugin.Blosc(cname="lz4hc", clevel=5, shuffle=BYTE),
    "blosc2 lz4 5, byte shuffle": hdf5plugin.Blosc2(
        cname="lz4", clevel=5, filters=hdf5plugin.Blosc2.SHUFFLE
    ),
    "blosc2 zstd 1, bit shuffle": hdf5plugin.Blosc2(
        cname="zstd", clevel=1, filters=hdf5plugin.Blosc2.BITSHUFFLE
    ),
    "bitshuffle lz4": hdf5plugin.Bitshuffle(cname="lz4"),
    "lz4": hdf5plugin.LZ4(),
    "zstd 1": hdf5plugin.Zstd(clevel=1),
    "gzip 1 (HDF5's own)": {"compression": "gzip", "compression_opts": 1},
    "none": {},
}


class Measurement(NamedTuple):
    """Result of one codec."""

    bytes_per_frame: float
    frames_written_per_s: float
    frames_read_per_s: float


def frames_to_store(path: Path, downsample: int) -> np.ndarray:
    """(N, 20, H, W) uint8 frames of a recording, at most MOST_FRAMES."""
    config = FrameConfig(downsample=downsample)

    def ends(first: int) -> Iterator[int]:
        return count(first + config.window_us, config.window_us)

    frames = frames_of(open_recording(path), ends, config)
    return np.stack([frame for _, frame in islice(frames, MOST_FRAMES)])


def best_seconds(read: Callable[[int], object], num_frames: int) -> float:
    """Best of three times to read all frames one by one."""
    best = float("inf")
    for _ in range(3):
        start = time.process_time()
        for i in range(num_frames):
            read(i)
        best = min(best, time.process_time() - start)
    return best


def measure(frames: np.ndarray, codec: dict) -> Measurement:
    """Measures a general compressor. codec: h5py's options of a dataset."""
    file = h5py.File("in memory", "w", driver="core", backing_store=False)
    start = time.process_time()
    dataset = file.create_dataset(
        "frames", frames.shape, np.uint8, chunks=(1, *frames.shape[1:]), **codec
    )
    for i, frame in enumerate(frames):
        dataset[i] = frame
    write_seconds = time.process_time() - start
    out = np.empty(frames.shape[1:], np.uint8)
    read_seconds = best_seconds(lambda i: dataset.read_direct(out, np.s_[i]), len(frames))
    assert (out == frames[-1]).all()
    size = dataset.id.get_storage_size() / len(frames)
    file.close()
    return Measurement(size, len(frames) / write_seconds, len(frames) / read_seconds)


def measure_ours(frames: np.ndarray, codec: Codec) -> Measurement:
    """Measures our codec in the group of a shard."""
    file = h5py.File("in memory", "w", driver="core", backing_store=False)
    group = file.create_group("recording")
    encode = FrameEncoder()
    encode(frames[0])  # compiles
    lengths = []
    start = time.process_time()
    with CodeWriter(group, FILTERS[codec]) as writer:
        for frame in frames:
            code = encode(frame)
            lengths.append(code.size)
            writer.write(code)
    write_seconds = time.process_time() - start
    group["frame_start"] = np.cumsum([0, *lengths], dtype=np.int64)
    group.attrs[FRAME_SHAPE] = frames.shape[1:]
    read_seconds = best_seconds(lambda i: read_frames(group, i, i + 1), len(frames))
    last = len(frames) - 1
    assert (read_frames(group, last, last + 1)[0] == frames[-1]).all()
    size = group["frames"].id.get_storage_size() / len(frames)
    file.close()
    return Measurement(size, len(frames) / write_seconds, len(frames) / read_seconds)


def main() -> None:
    """Prints a row per codec."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recording", type=Path)
    parser.add_argument("--downsample", type=int, choices=(1, 2, 4), default=2)
    args = parser.parse_args()
    with TemporaryDirectory() as folder:
        path = args.recording or simulate(Path(folder) / "a_td.raw", seconds=3, seed=0).path
        frames = frames_to_store(path, args.downsample)
    print(
        f"{len(frames)} frames {frames.shape[1:]} of {args.recording or 'a simulated recording'}, "
        f"{np.count_nonzero(frames) / frames.size:.1%} of their counts not zero"
    )
    print(f"{'codec':38}{'kB a frame':>12}{'written/s':>12}{'read/s':>12}")
    for codec in Codec:
        print_row(f"a byte per event, codec={codec.name} (ours)", measure_ours(frames, codec))
    for name, options in CODECS.items():
        print_row(name, measure(frames, options))


def print_row(name: str, result: Measurement) -> None:
    """Prints a codec's row."""
    kilobytes = result.bytes_per_frame / 1e3
    speeds = f"{result.frames_written_per_s:12.0f}{result.frames_read_per_s:12.0f}"
    print(f"{name:38}{kilobytes:12.1f}{speeds}", flush=True)


if __name__ == "__main__":
    main()
