"""A tiny prepared dataset, written straight to the shard contract: bright rectangles that move."""

import json
from dataclasses import asdict
from pathlib import Path

import h5py
import numpy as np
import xxhash
from evspan.data_prep.frames.codec import FrameEncoder
from evspan.data_prep.shards.format import BOX, FRAME_SHAPE, MANIFEST, Manifest, RecordingEntry
from support.sealed import COLUMNS, IGNORE_COLUMNS, checksum, seal_rows

HEIGHT, WIDTH, BINS = 60, 100, 2
DENSITY = 0.05  # background events per value
CLASSES = ["ball", "box", "bar"]
FRAMES = {
    "window_ms": 50,
    "bins": BINS,
    "cutoff": 10,
    "downsample": 4,
    "mode": "exact",
    "downsample_by": "sum",
}


def recording(
    rng: np.random.Generator,
    count: int,
    every: int = 2,
    *,
    height: int = HEIGHT,
    width: int = WIDTH,
    bins: int = BINS,
    density: float = DENSITY,
):
    """frames (N, 2*bins, H, W), boxes per frame, labelled: every `every`-th frame."""
    frames = rng.poisson(density, (count, 2 * bins, height, width)).astype(np.uint8)
    tracks = []
    for _ in range(2):
        corner = rng.uniform(10, 70, 2) * (1, 0.5)
        speed = rng.uniform(-2, 2, 2)
        size = rng.uniform(10, 24, 2)
        tracks.append((corner, speed, size, rng.integers(3)))
    boxes = []
    for t in range(count):
        rows = []
        for track, (corner, speed, (w, h), class_id) in enumerate(tracks):
            x, y = np.clip(corner + t * speed, 0, (width - w, height - h))
            frames[t, class_id % (2 * bins), int(y) : int(y + h), int(x) : int(x + w)] += 5
            rows.append((50_000 * (t + 1), x, y, w, h, class_id, track))
        boxes.append(np.array(rows, BOX))
    labelled = np.arange(count) % every == every - 1
    kept = [b if keep else b[:0] for b, keep in zip(boxes, labelled, strict=True)]
    return frames, kept, labelled


def add_regions(group: h5py.Group, rng: np.random.Generator) -> int:
    """Adds up to two ignore regions to each labelled frame of a recording; returns their number."""
    labelled = group["labelled"][:]
    counts = np.where(labelled, rng.integers(0, 3, len(labelled)), 0)
    regions = np.zeros(counts.sum(), BOX)
    regions["t_us"] = np.repeat(group["end_us"][:], counts)
    for side, (low, high) in {"x": (0, 60), "y": (0, 40), "w": (5, 40), "h": (5, 20)}.items():
        regions[side] = rng.uniform(low, high, regions.size)
    regions["class_id"] = -1
    if regions.size:
        group["ignore"] = regions
        group["ignore_start"] = np.cumsum([0, *counts])
    return regions.size


def write_small_shards(
    root: Path,
    counts: dict[str, list[int]],
    seed: int = 0,
    every: int = 2,
    *,
    height: int = HEIGHT,
    width: int = WIDTH,
    bins: int = BINS,
    density: float = DENSITY,
    regions: bool = False,
) -> Path:
    """Writes shards.

    counts: split -> frames of each recording. every: distance of labels. regions: with ignore
    regions.
    """
    rng = np.random.default_rng(seed)
    entries = []
    labels = {"crop": False, "class_map": {}}
    dataset = {"name": "small", "classes": CLASSES, "labels": labels}
    config = {"frames": {**FRAMES, "bins": bins}, "dataset": dataset}
    for split, lengths in counts.items():
        (root / split).mkdir(parents=True)
        with h5py.File(root / split / "00000.h5", "w") as file:
            for i, count in enumerate(lengths):
                frames, boxes, labelled = recording(
                    rng, count, every, height=height, width=width, bins=bins, density=density
                )
                name = f"{split}_{i:03d}"
                group = file.create_group(name)
                encode = FrameEncoder()
                codes = [encode(frame).copy() for frame in frames]
                group["frames"] = np.concatenate(codes)
                group["frame_start"] = np.cumsum([0, *map(len, codes)])
                group.attrs[FRAME_SHAPE] = frames.shape[1:]
                group["end_us"] = 50_000 * np.arange(1, count + 1)
                group["boxes"] = np.concatenate(boxes)
                group["box_start"] = np.cumsum([0, *(len(b) for b in boxes)])
                group["labelled"] = labelled
                num_regions = add_regions(group, rng) if regions else 0
                names = COLUMNS + IGNORE_COLUMNS if num_regions else COLUMNS
                columns = {"code": group["frames"][:]}
                columns |= {column: group[column][:] for column in names}
                frames_xxh3, group_xxh3 = checksum(columns)
                kept = np.concatenate(boxes)["class_id"]
                entries.append(
                    RecordingEntry(
                        name=name,
                        split=split,
                        shard=f"{split}/00000.h5",
                        group=name,
                        frames=count,
                        labelled_frames=int(labelled.sum()),
                        boxes=sum(map(len, boxes)),
                        ignore_regions=num_regions,
                        height=height,
                        width=width,
                        sensor_height=4 * height,
                        sensor_width=4 * width,
                        first_us=0,
                        last_us=50_000 * count - 1,
                        events=int(frames.sum()),
                        boxes_per_class={
                            name: int((kept == i).sum()) for i, name in enumerate(CLASSES)
                        },
                        frames_xxh3=frames_xxh3,
                        group_xxh3=group_xxh3,
                    )
                )
                group.attrs["entry"] = np.bytes_(json.dumps(asdict(entries[-1])))
                group.attrs["config"] = np.bytes_(json.dumps(config))
                seal_rows(group, asdict(entries[-1]))
    manifest = Manifest(
        software="test",
        config=config,
        config_hash=xxhash.xxh3_64_hexdigest(json.dumps(config, sort_keys=True).encode()),
        classes=CLASSES,
        recordings=entries,
    )
    (root / MANIFEST).write_text(manifest.to_json())
    return root
