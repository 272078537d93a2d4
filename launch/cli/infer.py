"""`evspan infer`: a sensor file in, detections and an overlay video out."""

import argparse
import functools
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from evspan.conf.errors import RecordingError, UserError
from evspan.conf.schema.prep import FrameConfig
from evspan.data_prep.draw import ANIMATION_SUFFIXES, AnimationWriter
from evspan.data_prep.frames.histogram import frame_size, frames_of
from evspan.data_prep.labels.box_files import RAW_BOX, find_boxes, read_boxes, recording_name
from evspan.data_prep.recordings.base import Recording, WordReader
from evspan.data_prep.recordings.open import open_recording
from evspan.data_prep.shards.atomic import written_whole
from evspan.launch.cli.command import Parser, run_command
from numpy.typing import NDArray
from tqdm import tqdm

if TYPE_CHECKING:
    from evspan.pipeline.inference.detect import Frame
    from evspan.pipeline.model.detector import Detector
    from evspan.pipeline.weights import Weights

DESCRIPTION = """Detections of a recording, straight from the sensor's file.

RECORDING is a .raw, .dat or .h5 file of any length. It is cut into the windows that the checkpoint was trained
on, from the first event on; the network carries its state from frame to frame. Memory does not grow with the length.

OUT/X_bbox.npy     detections of X.raw: t (end of the window, us), x y w h (pixels of the sensor), class_id (the checkpoint's
                   classes, printed at the end), class_confidence; track_id is 0. Prophesee's form: np.load reads it.
OUT/X_overlay.mp4  events (blue brighter, red darker), detections orange, and green the boxes of X_bbox.npy where that lies
                   beside the recording. A GIF where the program ffmpeg is missing.

--csv has a line per detection, --json one per frame with its latency; --json - writes them to standard output, frame by
frame, which with --follow makes a detector of a camera whose .raw or .dat file is still being written."""
EXAMPLES = """examples:
  evspan infer runs/tiny drive.raw
  evspan infer runs/tiny/checkpoints/step-00001000 drive.raw --confidence 0.3 --video drive.gif
  evspan infer weights.safetensors drive_td.dat --from 60 --seconds 10 --output out
  evspan infer runs/tiny drive.raw --no-video --confidence 0.001     # for scoring
  evspan infer runs/tiny camera.raw --follow 5 --frames-per-call 1 --no-video --json - | your-program"""


def boxes_beside(recording: Path) -> NDArray:
    path = find_boxes(recording)
    return read_boxes(path) if path else np.zeros(0, RAW_BOX)


def windows(
    recording: Recording, config: FrameConfig, *, skip: int = 0, limit: int | None = None
) -> Iterator["Frame"]:
    """The frames of the windows that follow each other from the recording's first event on, without the first `skip`.

    Raises:
        RecordingError: the recording has no events, or ends before the windows asked for.
    """

    def ends(first_us: int) -> Iterator[int]:
        return count(first_us + (skip + 1) * config.window_us, config.window_us)

    end = None
    for end, frame in islice(frames_of(recording, ends, config), limit):
        if recording.last_us < end - config.window_us:  # it has been read to its end
            raise RecordingError(
                f"{recording.path} ends {(recording.last_us - recording.first_us) / 1e6:.2f} s after its first "
                f"event, before {skip * config.window_us / 1e6:.2f} s; begin earlier"
            )
        yield end, frame
    if end is None:
        raise RecordingError(
            f"{recording.path} holds no events. Give another recording, or record it again"
        )


def choose_outputs(given: argparse.Namespace) -> tuple[Path, Path | None]:
    """(detections, video or None).

    Raises:
        UserError: a name that cannot be written, would be taken for the recording's boxes, or needs a program that is missing.
    """
    name, output = recording_name(given.recording), given.output
    detections = (
        output if output.suffix == ".npy" and not output.is_dir() else output / f"{name}_bbox.npy"
    )
    if detections.resolve() == (given.recording.parent / f"{name}_bbox.npy").resolve():
        raise UserError(
            f"{detections} lies beside the recording, where it would be taken for its boxes. Give --output a folder, "
            "or another name ending in .npy"
        )
    video = (
        None
        if given.no_video
        else given.video
        or detections.with_name(
            f"{detections.stem.removesuffix('_bbox')}_overlay{'.mp4' if shutil.which('ffmpeg') else '.gif'}"
        )
    )
    if video and video.suffix.lower() not in ANIMATION_SUFFIXES:
        raise UserError(
            f"--video {video} ends in neither of {', '.join(ANIMATION_SUFFIXES)}; name it so, or give --no-video"
        )
    if video and video.suffix.lower() == ".mp4" and not shutil.which("ffmpeg"):
        raise UserError(
            f"--video {video}: MP4 needs the program ffmpeg, which is not there. Install the Debian package ffmpeg, "
            f"or give --video {video.with_suffix('.gif')}"
        )
    for path in (detections, video):
        if path and path.is_dir():
            raise UserError(f"{path} is a folder. Give another name")
    return detections, video


def _windows_in(seconds: float, config: FrameConfig) -> int:
    return round(1000 * seconds / config.window_ms)


def check_options(given: argparse.Namespace) -> None:
    for name, value in (("--confidence", given.confidence), ("--nms", given.nms)):
        if value is not None and not 0 <= value <= 1:
            raise UserError(f"{name} is {value:g}; give a number from 0 to 1")
    if given.follow is not None and not (math.isfinite(given.follow) and given.follow > 0):
        raise UserError(
            f"--follow is {given.follow:g}; give the seconds without new data after which the recording has ended"
        )
    for name, number in (
        ("--frames-per-call", given.frames_per_call),
        ("--threads", given.threads),
    ):
        if number is not None and number < 1:
            raise UserError(f"{name} is {number}; give 1 or more")
    if not (math.isfinite(given.from_s) and given.from_s >= 0):
        raise UserError(
            f"--from is {given.from_s:g}; give seconds after the recording's first event, 0 or more"
        )
    if given.seconds is not None and not (math.isfinite(given.seconds) and given.seconds > 0):
        raise UserError(
            f"--seconds is {given.seconds:g}; give more than 0, or leave it out for all"
        )


def choose_device(name: str | None) -> Any:
    """Raises UserError when this machine lacks it."""
    import torch

    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
        return device
    except (RuntimeError, AssertionError) as error:  # unknown; not compiled in; no such card
        there = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        raise UserError(
            f"--device {name} cannot be used here; there is {', '.join(there)}"
        ) from error


def load_detector(given: argparse.Namespace, recording: Recording) -> tuple["Weights", "Detector"]:
    """Raises UserError when they are not there, or do not fit the recording or this machine."""
    import torch
    from evspan.pipeline.inference.trained_detector import detector_from
    from evspan.pipeline.weights import load_weights

    weights = load_weights(given.checkpoint)
    config = weights.frames
    if min(frame_size(config, recording.height, recording.width)) < 1:
        raise UserError(
            f"{given.recording} is of a sensor of {recording.width} x {recording.height} pixels: too small for "
            f"{given.checkpoint}, which takes frames of 1/{config.downsample} of that. Give another recording"
        )
    if given.seconds is not None and not _windows_in(given.seconds, config):
        raise UserError(
            f"--seconds is {given.seconds:g}, less than a window of {config.window_ms} ms; give more"
        )
    # One core is left to decoding and drawing: a team of threads as large as the machine would wait for them all the time.
    torch.set_num_threads(given.threads or max(1, len(os.sched_getaffinity(0)) - 1))
    return weights, detector_from(weights, device=choose_device(given.device))


class Done(NamedTuple):
    """frames: how many. per_class: detections. seconds: of work by part; took: of them all together, side by side.

    latencies_ms: of each frame, from when it was there to its detections.
    """

    frames: int
    per_class: NDArray[np.int64]
    seconds: dict[str, float]
    took: float
    latencies_ms: list[float]


def stream(
    given: argparse.Namespace,
    recording: Recording,
    weights: "Weights",
    detector: "Detector",
    outputs: tuple[Path, Path | None],
) -> Done:
    """Decoding, the network and drawing, in a thread each; the files appear when all is done."""
    from evspan.pipeline.inference.detect import Clock, ahead, detect
    from evspan.pipeline.inference.overlay import Overlay
    from evspan.pipeline.inference.writers import CsvFile, DetectionsFile, JsonLines

    config, clock, (detections, video) = weights.frames, Clock(), outputs
    overlay = (
        Overlay(
            config, weights.classes, boxes_beside(given.recording), side_by_side=given.side_by_side
        )
        if video
        else None
    )
    latencies: list[float] = []
    per_class, frames, began = (
        np.zeros(weights.model.head.num_classes, np.int64),
        0,
        time.perf_counter(),
    )
    with ExitStack() as stack:
        enter = stack.enter_context
        rows = enter(closing(DetectionsFile(enter(written_whole(detections)))))
        others: list[CsvFile | JsonLines] = []
        if given.csv:
            others.append(enter(closing(CsvFile(enter(written_whole(given.csv)), weights.classes))))
        if given.json:
            others.append(enter(closing(JsonLines(given.json, weights.classes))))
        animation = (
            enter(AnimationWriter(enter(written_whole(video)), 1000 / config.window_ms))
            if video
            else None
        )
        wanted = windows(
            recording,
            config,
            skip=_windows_in(given.from_s, config),
            limit=None if given.seconds is None else _windows_in(given.seconds, config),
        )
        decoded = enter(closing(ahead(clock.each("decoding", wanted), given.frames_per_call)))
        found = detect(
            detector,
            decoded,
            confidence=given.confidence,
            nms=given.nms,
            frames_per_call=given.frames_per_call,
            downsample=config.downsample,
            sensor=(recording.height, recording.width),
            clock=clock,
        )
        for item in tqdm(
            enter(closing(ahead(found, given.frames_per_call))), unit=" frames", disable=None
        ):
            frames, per_class = (
                frames + 1,
                per_class + np.bincount(item.boxes["class_id"], minlength=per_class.size),
            )
            rows.add(item.boxes)
            latencies.append(item.latency_ms)
            for other in others:
                other.add(item)
            if animation and overlay:
                with clock("drawing"):
                    animation.add(overlay.draw(item))
    return Done(frames, per_class, clock.seconds, time.perf_counter() - began, latencies)


def infer(given: argparse.Namespace) -> None:
    check_options(given)
    recording, outputs = open_recording(given.recording), choose_outputs(given)
    if given.follow is not None:
        if not isinstance(recording, WordReader):
            raise UserError(
                f"--follow: {given.recording} is {recording.format}, which cannot be read while it is written; "
                "record .raw or .dat, or leave out --follow"
            )
        recording.follow(given.follow)
    weights, detector = load_detector(given, recording)
    from evspan.pipeline.inference.detect import class_name

    limits = weights.model.postprocess
    given.confidence = limits.confidence_threshold if given.confidence is None else given.confidence
    given.nms = limits.nms_threshold if given.nms is None else given.nms
    done = stream(given, recording, weights, detector, outputs)
    say = functools.partial(print, file=sys.stderr if str(given.json) == "-" else sys.stdout)
    config, (detections, video), (frames, per_class, seconds, took, latencies) = (
        weights.frames,
        outputs,
        done,
    )
    left_out = "".join(
        f", {n} {reason.replace('_', ' ')}" for reason, n in recording.dropped.items() if n
    )
    say(
        f"{given.recording}: {frames} frames of {config.window_ms} ms, {recording.width} x {recording.height}, "
        f"{recording.events / 1e6:.2f} M events read{left_out}; {given.checkpoint}, step {weights.step}"
    )
    kinds = ", ".join(f"{i} {class_name(weights.classes, i)}: {n}" for i, n in enumerate(per_class))
    say(
        f"{detections}: {per_class.sum()} detections of confidence {given.confidence:g} or more ({kinds})"
    )
    if video:
        boxes = find_boxes(given.recording)
        say(f"{video}: detections orange" + (f", boxes of {boxes.name} green" if boxes else ""))
        if not given.video and video.suffix == ".gif":
            say(
                "  a GIF, since the program ffmpeg is missing; install the Debian package ffmpeg for MP4"
            )
    span = frames * config.window_ms / 1000
    parts = ", ".join(f"{part} {1000 * busy / frames:.1f}" for part, busy in seconds.items())
    say(
        f"{span / took:.1f} x camera pace: {span:.2f} s of recording in {took:.2f} s; ms per frame, side by side: {parts}"
    )
    middle, late = np.percentile(latencies, (50, 99))
    say(
        f"latency of a frame, from when it is there to its detections: median {middle:.1f} ms, 99 % within {late:.1f} ms, "
        f"at most {max(latencies):.1f} ms ({given.frames_per_call} frame{'s' if given.frames_per_call > 1 else ''} a call)"
    )


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        "evspan infer",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "checkpoint",
        type=Path,
        metavar="RUN",
        help="a run folder (its newest checkpoint), a checkpoint folder, or a .safetensors file",
    )
    parser.add_argument("recording", type=Path, metavar="RECORDING")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("detections"),
        metavar="OUT",
        help="folder, or the name of the .npy (default: detections)",
    )
    video = parser.add_mutually_exclusive_group()
    video.add_argument(
        "--video",
        type=Path,
        metavar="FILE",
        help=".mp4 or .gif (default: OUT/X_overlay.mp4, or .gif)",
    )
    video.add_argument("--no-video", action="store_true", help="detections only")
    parser.add_argument(
        "--side-by-side",
        action="store_true",
        help="video: the events alone, and beside them the detections",
    )
    parser.add_argument("--csv", type=Path, metavar="FILE", help="also a line per detection")
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="also a line of JSON per frame; - is standard output",
    )
    parser.add_argument(
        "--follow",
        type=float,
        metavar="SECONDS",
        help="wait for more at the file's end, until none comes for so long (.raw, .dat)",
    )
    parser.add_argument(
        "--confidence",
        type=float,
        metavar="C",
        help="smallest objectness * class score (default: the checkpoint's, often 0.1)",
    )
    parser.add_argument(
        "--nms",
        type=float,
        metavar="IOU",
        help="where detections of a class overlap more, the surest stays (default: the checkpoint's, often 0.45)",
    )
    parser.add_argument(
        "--from",
        type=float,
        default=0.0,
        dest="from_s",
        metavar="SECONDS",
        help="begin so long after the first event, rounded to whole windows (default: 0)",
    )
    parser.add_argument(
        "--seconds", type=float, metavar="N", help="stop after so much of it (default: all)"
    )
    parser.add_argument(
        "--device", metavar="DEVICE", help="cpu, cuda, cuda:1 (default: cuda where there is one)"
    )
    parser.add_argument(
        "--frames-per-call",
        type=int,
        default=4,
        metavar="N",
        help="that the network takes at once; detections do not depend on it (default: 4)",
    )
    parser.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="CPU threads of the network (default: one less than there are cores)",
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    given = _parser().parse_args(argv)
    run_command(lambda: infer(given))


if __name__ == "__main__":
    main()
