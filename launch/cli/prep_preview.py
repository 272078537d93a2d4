"""`evspan prep preview`: frames with boxes, of a recording or of shards, as a picture or an animation."""

import argparse
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from evspan.conf.errors import ShardError, UserError
from evspan.conf.schema.prep import FrameConfig
from evspan.data_prep.draw import (
    ANIMATION_SUFFIXES,
    RGB,
    AnimationWriter,
    draw_boxes,
    draw_label,
    frame_to_rgb,
    write_strip,
)
from evspan.data_prep.frames.histogram import frames_of
from evspan.data_prep.frames.windows import window_ends
from evspan.data_prep.labels.box_files import RAW_BOX, find_boxes, read_boxes
from evspan.data_prep.recordings.open import open_recording
from evspan.data_prep.shards.format import (
    MANIFEST,
    SPLITS,
    Manifest,
    RecordingEntry,
    load_manifest,
    open_group,
    read_frames,
)
from evspan.launch.cli.command import Parser, run_command
from numpy.typing import NDArray

SHEET_FRAMES, ANIMATION_FRAMES = 12, 200
SMALL = 400  # pixels; narrower frames are drawn at twice their size

DESCRIPTION = """Frames with their boxes: .png is a sheet of frames spread over the time span, .gif and .mp4 play all of them.

INPUT is a recording (.raw, .dat, .h5; the boxes of X_bbox.npy beside X_td.raw are drawn), a folder that evspan prep
wrote, or one of its shards. More brightness is blue, less is red, both is violet."""
EXAMPLES = """examples:
  evspan prep preview drive_td.raw drive.png
  evspan prep preview still.raw still.png --frames 1 --window-ms 2000
  evspan prep preview drive_td.raw drive.mp4 --from 10 --frames 100 --downsample 1
  evspan prep preview SHARDS sheet.png --split val --recording drive
  evspan prep preview SHARDS/train/00000.h5 shard.gif"""


class Shot(NamedTuple):
    """A frame ready to be drawn. end_us: since the first event. boxes: (N, 4) left, top, right, bottom in pixels of the frame."""

    end_us: int
    frame: NDArray[np.uint8]
    boxes: NDArray[np.float64]
    labels: list[str]

    def draw(self) -> RGB:
        upscale = 2 if self.frame.shape[2] < SMALL else 1
        rgb = draw_boxes(frame_to_rgb(self.frame), self.boxes, self.labels, upscale=upscale)
        return draw_label(rgb, f"{self.end_us / 1e6:.2f} s")


def spread(shots: Iterator[Shot], count: int) -> list[Shot]:
    """Up to `count` of them, evenly spaced, without knowing how many there are; at most 8 * count in memory."""
    kept: list[Shot] = []
    every = 1
    for i, shot in enumerate(shots):
        if i % every == 0:
            kept.append(shot)
        if len(kept) == 8 * count:
            kept, every = kept[::2], 2 * every
    return [kept[i] for i in _evenly(len(kept), count)]


def _evenly(length: int, count: int) -> list[int]:
    return (
        np.unique(np.linspace(0, length - 1, min(count, length)).round().astype(int)).tolist()
        if length
        else []
    )


def recording_shots(
    path: Path, config: FrameConfig, classes: list[str], from_s: float
) -> Iterator[Shot]:
    """All frames of a recording that begin at `from_s` or later; where it has boxes, frames end at their times."""
    recording, box_file = open_recording(path), find_boxes(path)
    boxes = read_boxes(box_file) if box_file else np.zeros(0, RAW_BOX)

    def ends(first_us: int) -> Iterable[int]:
        return window_ends(
            boxes["t"], first_us, window_us=config.window_us, label_every_us=config.window_us
        )

    for end, frame in frames_of(recording, ends, config):
        if end - config.window_us >= recording.first_us + 1e6 * from_s - config.window_us / 2:
            at_end = boxes[boxes["t"] == end]
            yield Shot(
                end - recording.first_us,
                frame,
                _corners(at_end, config.downsample),
                _names(at_end["class_id"], classes),
            )


def shard_shots(
    root: Path, entry: RecordingEntry, classes: list[str], which: list[int]
) -> Iterator[Shot]:
    group = open_group(root, entry)
    try:
        start, end_us = group["box_start"][:], group["end_us"][:]
        for i in which:
            boxes = group["boxes"][start[i] : start[i + 1]]
            end, frame = int(end_us[i]) - entry.first_us, read_frames(group, i, i + 1)[0]
            yield Shot(end, frame, _corners(boxes, 1), _names(boxes["class_id"], classes))
    finally:
        group.file.close()


def _corners(boxes: NDArray, downsample: int) -> NDArray[np.float64]:
    return (
        np.stack(
            (boxes["x"], boxes["y"], boxes["x"] + boxes["w"], boxes["y"] + boxes["h"]), 1
        ).astype(np.float64)
        / downsample
    )


def _names(class_ids: NDArray, classes: list[str]) -> list[str]:
    return [classes[i] if i < len(classes) else f"class {i}" for i in class_ids.tolist()]


def choose_entry(
    manifest: Manifest, root: Path, *, shard: str, split: str | None, name: str | None
) -> RecordingEntry:
    """The recording asked for, or the first one. Raises ShardError when there is none."""
    fitting = [
        r
        for r in manifest.recordings
        if (not shard or r.shard == shard) and split in (None, r.split)
    ]
    entry = next((r for r in fitting if name in (None, r.name)), None)
    if entry is None:
        there = ", ".join(f"{r.split}/{r.name}" for r in manifest.recordings[:10]) or "none"
        wanted = f"recording {name!r}" if name else "recording"
        raise ShardError(
            f"{root / shard} has no {wanted} in {f'split {split}' if split else 'any split'}; there are: {there}"
        )
    return entry


def _prepared_root(path: Path) -> tuple[Path, str] | None:
    """(root of the prepared dataset, shard below it or ""), None when `path` is no part of one."""
    if path.is_dir():
        return path, ""
    root = path.parent.parent
    if path.is_file() and path.suffix == ".h5" and (root / MANIFEST).is_file():
        return root, f"{path.parent.name}/{path.name}"
    return None


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        "evspan prep preview",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("input", type=Path, metavar="INPUT")
    parser.add_argument("out", type=Path, metavar="OUT", help="a file ending in .png, .gif or .mp4")
    parser.add_argument(
        "--recording", metavar="NAME", help="of a prepared dataset (default: its first)"
    )
    parser.add_argument("--split", choices=SPLITS, help="of a prepared dataset (default: any)")
    parser.add_argument(
        "--from",
        dest="from_s",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="since the recording's first event; what is earlier is left out (default: 0)",
    )
    parser.add_argument(
        "--frames",
        type=int,
        metavar="N",
        help=f"at most so many (default: {SHEET_FRAMES} in a .png, {ANIMATION_FRAMES} in an animation)",
    )
    parser.add_argument(
        "--downsample",
        type=int,
        choices=(1, 2, 4),
        help="of a recording; shards have theirs (default: 2)",
    )
    parser.add_argument(
        "--window-ms",
        type=int,
        metavar="MS",
        help="time that a frame of a recording spans (default: 50); longer shows more of a sparse one",
    )
    parser.add_argument(
        "--classes",
        default="",
        metavar="A,B,...",
        help="names of class 0, 1, ... of a recording's boxes",
    )
    return parser


def _open_source(
    given: argparse.Namespace, count: int, sheet: bool
) -> tuple[str, float, Iterator[Shot]]:
    """(what is shown, frames per second, the frames)."""
    prepared = _prepared_root(given.input)
    if prepared is None:
        if given.recording or given.split:
            raise UserError(
                f"--recording and --split choose from a prepared dataset, which {given.input} is not; leave them out"
            )
        window_ms = 50 if given.window_ms is None else given.window_ms
        config = FrameConfig(
            window_ms=window_ms, bins=1, cutoff=255, downsample=given.downsample or 2
        )  # drawn without bins
        shots = recording_shots(
            given.input, config, [c for c in given.classes.split(",") if c], given.from_s
        )
        return (
            given.input.name,
            1000 / config.window_ms,
            iter(spread(shots, count)) if sheet else islice(shots, count),
        )
    if given.downsample or given.window_ms is not None or given.classes:
        raise UserError(
            "--downsample, --window-ms and --classes are for recordings; the frames in "
            f"{given.input} are made already. Leave them out"
        )
    root, shard = prepared
    manifest = load_manifest(root)
    entry = choose_entry(manifest, root, shard=shard, split=given.split, name=given.recording)
    window_ms = int(manifest.config["frames"]["window_ms"])
    later = list(range(round(1000 * given.from_s / window_ms), entry.frames))
    which = [later[i] for i in _evenly(len(later), count)] if sheet else later[:count]
    return (
        f"{entry.split}/{entry.name}",
        1000 / window_ms,
        shard_shots(root, entry, manifest.classes, which),
    )


def preview(given: argparse.Namespace) -> None:
    sheet = given.out.suffix.lower() == ".png"
    if not sheet and given.out.suffix.lower() not in ANIMATION_SUFFIXES:
        raise UserError(
            f"{given.out} ends in none of .png, {', '.join(ANIMATION_SUFFIXES)}; name the picture or animation so"
        )
    count = (
        given.frames if given.frames is not None else SHEET_FRAMES if sheet else ANIMATION_FRAMES
    )
    if count < 1 or given.from_s < 0:
        raise UserError(
            f"--frames {count} --from {given.from_s:g}: give 1 frame or more, and 0 s or later"
        )
    name, fps, shots = _open_source(given, count, sheet)
    first = next(shots, None)
    if first is None:
        raise UserError(f"{name} has no frames from {given.from_s:g} s on; give an earlier --from")
    drawn, boxes = 0, 0

    def pictures() -> Iterator[RGB]:
        nonlocal drawn, boxes
        for shot in chain([first], shots):
            drawn, boxes = drawn + 1, boxes + len(shot.boxes)
            yield shot.draw()

    if sheet:
        write_strip(given.out, list(pictures()))
    else:
        with AnimationWriter(given.out, fps) as animation:
            for picture in pictures():
                animation.add(picture)
    print(f"{given.out}: {drawn} frame{'s' if drawn > 1 else ''} of {name} with {boxes} boxes")


def main(argv: list[str] | None = None) -> None:
    given = _parser().parse_args(argv)
    run_command(lambda: preview(given))


if __name__ == "__main__":
    main()
