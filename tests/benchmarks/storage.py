"""What a frame costs on disk and in time, by codec: why shards are stored as they are.

    .venv/bin/python tests/benchmarks/storage.py [--recording drive_td.raw] [--downsample 2]

Frames of a recording (default: 3 simulated seconds of 1280 x 720) are written to an HDF5 file in memory, by general compressors
one chunk a frame, by ours as shards hold them, and read back one by one; seconds are those of this process alone, the best of
three, so that neighbours count little.
"""

import argparse
import time
from functools import partial
from itertools import count, islice
from pathlib import Path
from tempfile import TemporaryDirectory

import h5py
import hdf5plugin
import numpy as np
from evspan.conf.schema.prep import Codec, FrameConfig
from evspan.data_prep.frames.codec import FrameEncoder
from evspan.data_prep.frames.histogram import frames_of
from evspan.data_prep.recordings.open import open_recording
from evspan.data_prep.shards.format import FRAME_SHAPE, read_frames
from evspan.data_prep.shards.write import FILTERS, CodeWriter
from evspan.data_prep.simulator import simulate

MOST_FRAMES = 60
BYTE, BIT, NONE = hdf5plugin.Blosc.SHUFFLE, hdf5plugin.Blosc.BITSHUFFLE, hdf5plugin.Blosc.NOSHUFFLE
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


def frames_to_store(path: Path, downsample: int) -> np.ndarray:
    config = FrameConfig(downsample=downsample)
    made = frames_of(
        open_recording(path),
        lambda first: count(first + config.window_us, config.window_us),
        config,
    )
    return np.stack([frame for _, frame in islice(made, MOST_FRAMES)])


def measured(frames: np.ndarray, codec: dict) -> tuple[float, float, float]:
    """(bytes a frame, frames/s written, frames/s read)."""
    file = h5py.File("in memory", "w", driver="core", backing_store=False)
    began = time.process_time()
    stored = file.create_dataset(
        "frames", frames.shape, np.uint8, chunks=(1, *frames.shape[1:]), **codec
    )
    for i, frame in enumerate(frames):
        stored[i] = frame
    written = time.process_time() - began
    out, best = np.empty(frames.shape[1:], np.uint8), float("inf")
    for _ in range(3):
        began = time.process_time()
        for i in range(len(frames)):
            stored.read_direct(out, np.s_[i])
        best = min(best, time.process_time() - began)
    assert (out == frames[-1]).all()
    size = stored.id.get_storage_size() / len(frames)
    file.close()
    return size, len(frames) / written, len(frames) / best


def measured_ours(frames: np.ndarray, codec: Codec) -> tuple[float, float, float]:
    """The same of a shard's group."""
    group = h5py.File("in memory", "w", driver="core", backing_store=False).create_group(
        "recording"
    )
    encode, lengths = FrameEncoder(), list[int]()
    encode(frames[0])  # compiled by now
    began = time.process_time()
    with CodeWriter(group, FILTERS[codec]) as writer:
        for frame in frames:
            code = encode(frame)
            lengths.append(code.size)
            writer.write(code)
    written = time.process_time() - began
    group["frame_start"] = np.cumsum([0, *lengths], dtype=np.int64)
    group.attrs[FRAME_SHAPE] = frames.shape[1:]
    best = float("inf")
    for _ in range(3):
        began = time.process_time()
        for i in range(len(frames)):
            out = read_frames(group, i, i + 1)
        best = min(best, time.process_time() - began)
    assert (out[0] == frames[-1]).all()
    size = group["frames"].id.get_storage_size() / len(frames)
    group.file.close()
    return size, len(frames) / written, len(frames) / best


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recording", type=Path)
    parser.add_argument("--downsample", type=int, choices=(1, 2, 4), default=2)
    given = parser.parse_args()
    with TemporaryDirectory() as folder:
        path = given.recording or simulate(Path(folder) / "a_td.raw", seconds=3, seed=0).path
        frames = frames_to_store(path, given.downsample)
    print(
        f"{len(frames)} frames {frames.shape[1:]} of {given.recording or 'a simulated recording'}, "
        f"{np.count_nonzero(frames) / frames.size:.1%} of their counts not zero"
    )
    print(f"{'codec':38}{'kB a frame':>12}{'written/s':>12}{'read/s':>12}")
    rows = {
        f"a byte per event, codec={codec.name} (ours)": partial(measured_ours, frames, codec)
        for codec in Codec
    }
    for name, row in (
        rows | {name: partial(measured, frames, codec) for name, codec in CODECS.items()}
    ).items():
        size, written, read = row()
        print(f"{name:38}{size / 1e3:12.1f}{written:12.0f}{read:12.0f}", flush=True)


if __name__ == "__main__":
    main()
