"""`evspan infer`: sensor files in, detections and overlay videos out."""

import argparse
import math
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TextIO

import numpy as np
from evspan.conf.errors import UserError
from evspan.conf.text import plural
from evspan.data_prep.draw import ANIMATION_SUFFIXES
from evspan.data_prep.labels.box_files import recording_name
from evspan.data_prep.shards.format import SPLITS
from evspan.launch.cli.command import Parser, reported_errors
from evspan.launch.cli.existing_files import add_overwrite_option, require_new
from evspan.launch.cli.recording_options import add_recording_options, sensor_hw, time_unit
from evspan.launch.output_streams import drop_lost_output
from evspan.pipeline.inference.inputs import InferInput, expand_inputs
from evspan.pipeline.inference.options import InferOptions, RecordingFiles, RecordingSummary

DESCRIPTION = """Detections of recordings, straight from the sensor's files.

RUN is a run folder (its newest checkpoint), a checkpoint folder, a .safetensors file, or a .ckpt of
RVT. RECORDING is a file of any format and length, a folder or a list of them (as the source of
evspan prep), a pattern in quotes, or a folder of prepared shards. A recording is cut into the
windows that the checkpoint was trained on, from the first event on; the network carries its state
from frame to frame. Memory does not grow with the length. A recording that cannot be read does not
stop the others; the exit code is 2 then.

OUT/X_bbox.npy     detections of X.raw: t (end of the window, us), x y w h (pixels of the sensor),
                   class_id (the checkpoint's classes, printed at the end), class_confidence;
                   track_id is 0, with --track the number of its track, from 1 on.
                   Prophesee's form: np.load reads it. Of a source with splits, OUT/val/X_bbox.npy.
OUT/X_overlay.mp4  events (blue brighter, red darker), detections of confidence 0.3 or more in a
                   colour per class, and in green the boxes of X_bbox.npy in the recording's
                   folder. A GIF without the program ffmpeg.

--csv has a line per detection, --json one per frame with its latency. --json - writes them to
standard output, frame by frame; with --follow that makes a detector of a camera whose .raw or .dat
file is still being written. Files appear when all is done, and an error leaves the earlier ones;
only --json FILE with --follow, or of a pipe, is written frame by frame."""
EXAMPLES = """examples:
  evspan infer runs/tiny drive.raw
  evspan infer runs/tiny raw/val/*_td.raw --output detections --no-video
  evspan infer runs/tiny raw --split val --output detections          # a folder, or a LIST.txt
  evspan infer runs/tiny shards --split test --no-video               # prepared frames
  evspan infer runs/tiny/checkpoints/step-00001000 drive.raw --confidence 0.3 --video drive.gif
  evspan infer weights.safetensors drive_td.dat --from 60 --seconds 10 --output out
  evspan infer runs/tiny drive.raw --no-video --confidence 0.001     # for scoring
  evspan infer runs/tiny camera.raw --follow 5 --frames-per-call 1 --no-video --json - | program"""


def infer(args: argparse.Namespace) -> None:
    """Runs inference and prints a summary of each recording."""
    options = options_from(args)
    from evspan.pipeline.inference.recordings import infer_recordings

    # Standard output belongs to the JSON lines where they go there.
    output = sys.stdout
    if str(args.json) == "-":
        output = sys.stderr
    else:
        drop_lost_output()
    for summary in infer_recordings(options):
        print_summary(summary, options, output)


def options_from(args: argparse.Namespace) -> InferOptions:
    """Checks the arguments and chooses the names of the files.

    Raises:
        UserError: a value out of range, or a file that cannot be written.
    """
    check_numbers(args)
    inputs = expand_inputs(args.recording, args.split)
    check_one_file_each(args, len(inputs))
    recordings = tuple(choose_files(args, item) for item in inputs)
    require_new(_outputs(recordings), overwrite=args.overwrite)
    return InferOptions(
        checkpoint=args.checkpoint,
        recordings=recordings,
        confidence=args.confidence,
        nms=args.nms,
        start_s=args.from_s,
        seconds=args.seconds,
        follow_s=args.follow,
        frames_per_call=args.frames_per_call,
        device=args.device,
        threads=args.threads,
        precision=args.precision,
        cuda_graphs=args.cuda_graphs,
        side_by_side=args.side_by_side,
        video_confidence=args.video_confidence,
        weights=args.weights,
        track=args.track,
        track_confidence=args.track_confidence,
        sensor_size=sensor_hw(args),
        time_unit=time_unit(args),
    )


def check_numbers(args: argparse.Namespace) -> None:
    """Raises UserError for a number out of its range."""
    fractions = (
        ("--confidence", args.confidence),
        ("--nms", args.nms),
        ("--video-confidence", args.video_confidence),
        ("--track-confidence", args.track_confidence),
    )
    for name, value in fractions:
        if value is not None and not 0 <= value <= 1:
            raise UserError(f"{name} is {value:g}; give a number from 0 to 1")
    if args.follow is not None and not _is_positive(args.follow):
        raise UserError(
            f"--follow is {args.follow:g}; give the seconds without new data after which the "
            "recording has ended"
        )
    for name, number in (("--frames-per-call", args.frames_per_call), ("--threads", args.threads)):
        if number is not None and number < 1:
            raise UserError(f"{name} is {number}; give 1 or more")
    if not (math.isfinite(args.from_s) and args.from_s >= 0):
        raise UserError(
            f"--from is {args.from_s:g}; give seconds after the recording's first event, 0 or more"
        )
    if args.seconds is not None and not _is_positive(args.seconds):
        raise UserError(f"--seconds is {args.seconds:g}; give more than 0, or leave it out for all")


def _is_positive(number: float) -> bool:
    return math.isfinite(number) and number > 0


def check_one_file_each(args: argparse.Namespace, num_recordings: int) -> None:
    """Raises UserError if several recordings would be written to one file."""
    if num_recordings == 1:
        return
    single = {"--video": args.video, "--csv": args.csv, "--json": args.json}
    if _is_file_name(args.output):
        single["--output"] = args.output
    for name, path in single.items():
        if path is not None:
            raise UserError(
                f"{name} {path} is one file, for {plural(num_recordings, 'recording')}; "
                "run evspan infer for each of them"
            )


def _outputs(recordings: Iterable[RecordingFiles]) -> list[Path]:
    """The files that would be replaced. --json to -, a pipe or a device replaces nothing."""
    paths: list[Path] = []
    for files in recordings:
        written = (files.detections, files.video, files.csv, files.json)
        paths += [path for path in written if path and path.is_file()]
    return paths


def choose_files(args: argparse.Namespace, item: InferInput) -> RecordingFiles:
    """The names of the files to write for a recording.

    Raises:
        UserError: a name that cannot be written, or would be taken for the recording's boxes, or
            a pipe or a device as a file that is not written line by line.
    """
    recording = item.path
    detections = args.output
    if not _is_file_name(args.output):
        detections = args.output / f"{item.name}_bbox.npy"
    boxes = recording.parent / f"{recording_name(recording)}_bbox.npy"
    if not item.key and boxes.resolve() == detections.resolve():
        raise UserError(
            f"{detections} is in the folder of the recording, where it would be taken for its "
            "boxes. Give --output a folder, or another name ending in .npy"
        )
    video = None if args.no_video else _choose_video(args.video, detections)
    for path in (detections, video, args.csv, args.json):
        if path and path.is_dir():
            raise UserError(f"{path} is a folder. Give another name")
    for path in (detections, video, args.csv):
        _require_replaceable(path)
    return RecordingFiles(
        recording,
        detections,
        video,
        csv=args.csv,
        json=args.json,
        boxes=item.boxes,
        key=item.key,
    )


def _require_replaceable(path: Path | None) -> None:
    """Raises UserError for a pipe or a device: the complete file would replace it."""
    if path and path.exists() and not path.is_file():
        raise UserError(
            f"{path} is a pipe or a device, which the finished file would replace. Give the name "
            "of a file; --json - writes to standard output, and --json to a pipe, frame by frame"
        )


def _is_file_name(output: Path) -> bool:
    return output.suffix == ".npy" and not output.is_dir()


def _choose_video(video: Path | None, detections: Path) -> Path:
    has_ffmpeg = shutil.which("ffmpeg") is not None
    if video is None:
        suffix = ".mp4" if has_ffmpeg else ".gif"
        return detections.with_name(f"{detections.stem.removesuffix('_bbox')}_overlay{suffix}")
    if video.suffix.lower() not in ANIMATION_SUFFIXES:
        raise UserError(
            f"--video {video} ends in neither of {', '.join(ANIMATION_SUFFIXES)}; "
            "give it such a name, or give --no-video"
        )
    if video.suffix.lower() == ".mp4" and not has_ffmpeg:
        raise UserError(
            f"--video {video}: MP4 needs the program ffmpeg, which is not installed. "
            f"Install the Debian package ffmpeg, or give --video {video.with_suffix('.gif')}"
        )
    return video


def print_summary(summary: RecordingSummary, options: InferOptions, output: TextIO) -> None:
    """Prints what was read, written and found, and the speed."""
    files = summary.files
    dropped = ""
    for reason, number in summary.dropped.items():
        if number:
            dropped += f", {number} {reason.replace('_', ' ')}"
    recording = f"{files.key} in {files.recording}" if files.key else str(files.recording)
    lines = [
        f"{recording}: {plural(summary.frames, 'frame')} of {summary.config.window_ms} ms, "
        f"{summary.width} x {summary.height}, {summary.events / 1e6:.2f} M events read{dropped}; "
        f"{options.checkpoint}, step {summary.step}",
        _detections_line(summary),
    ]
    if files.video:
        shown = max(options.video_confidence, summary.confidence)
        line = f"{files.video}: detections of confidence {shown:g} or more"
        if summary.labels:
            line += f", boxes of {summary.labels.name} in green"
        lines.append(line)
        if files.video.suffix == ".gif" and not shutil.which("ffmpeg"):
            lines.append(
                "  a GIF, since the program ffmpeg is missing; install the Debian package ffmpeg "
                "for MP4"
            )
    lines += [_pace_line(summary), _latency_line(summary, options.frames_per_call)]
    print("\n".join(lines), file=output, flush=True)


def _detections_line(summary: RecordingSummary) -> str:
    classes = []
    for index, (name, number) in enumerate(summary.detections_per_class):
        classes.append(f"{index} {name}: {number}")
    line = (
        f"{summary.files.detections}: {plural(summary.detections, 'detection')} of confidence "
        f"{summary.confidence:g} or more ({', '.join(classes)})"
    )
    if summary.tracks is not None:
        line += f", {plural(summary.tracks, 'track')}"
    return line


def _pace_line(summary: RecordingSummary) -> str:
    recorded_s = summary.frames * summary.config.window_ms / 1000
    parts = []
    for part, seconds in summary.work_seconds.items():
        parts.append(f"{part} {1000 * seconds / summary.frames:.1f}")
    return (
        f"{recorded_s / summary.wall_seconds:.1f} x camera pace: {recorded_s:.2f} s of recording "
        f"in {summary.wall_seconds:.2f} s; ms per frame, side by side: {', '.join(parts)}"
    )


def _latency_line(summary: RecordingSummary, frames_per_call: int) -> str:
    median, percentile_99 = np.percentile(summary.latencies_ms, (50, 99))
    return (
        f"latency of a frame, from its last event to its detections: median {median:.1f} ms, "
        f"99 % within {percentile_99:.1f} ms, at most {max(summary.latencies_ms):.1f} ms "
        f"({plural(frames_per_call, 'frame')} a call)"
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
        help="a run folder (its newest checkpoint), a checkpoint folder, a .safetensors file, or "
        "a .ckpt of RVT",
    )
    parser.add_argument(
        "recording",
        type=Path,
        nargs="+",
        metavar="RECORDING",
        help="a recording, a folder or list of recordings, a pattern in quotes, or prepared shards",
    )
    parser.add_argument(
        "--split",
        choices=SPLITS,
        help="only this split of folders, lists and shards (default: all)",
    )
    add_recording_options(parser)
    add_overwrite_option(parser)
    _add_outputs(parser)
    _add_detection(parser)
    return parser


def _add_outputs(parser: argparse.ArgumentParser) -> None:
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
        help="video: the events alone on the left, with the detections on the right",
    )
    parser.add_argument(
        "--video-confidence",
        type=float,
        default=0.3,
        metavar="C",
        help="video: hide detections of less (default: 0.3)",
    )
    parser.add_argument("--csv", type=Path, metavar="FILE", help="also a line per detection")
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="also a line of JSON per frame; - is standard output. FILE appears when all is done; "
        "with --follow, or where it is a pipe, it grows line by line",
    )


def _add_detection(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--track",
        action="store_true",
        help="number the tracks of objects (ByteTrack's association) in all files: track_id",
    )
    parser.add_argument(
        "--track-confidence",
        type=float,
        default=InferOptions.track_confidence,
        metavar="C",
        help="detections from here on begin tracks, weaker ones only continue them (default: 0.5)",
    )
    parser.add_argument(
        "--weights",
        choices=("ema", "raw"),
        default="ema",
        help="of a checkpoint: the moving average of its weights, where it has one, or those that "
        "the optimizer updates (default: ema)",
    )
    parser.add_argument(
        "--follow",
        type=float,
        metavar="SECONDS",
        help="wait for more data at the end of the file, until none comes for SECONDS (.raw, .dat)",
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
        help="IoU threshold of the per-class NMS (default: the checkpoint's, often 0.45)",
    )
    parser.add_argument(
        "--from",
        type=float,
        default=0.0,
        dest="from_s",
        metavar="SECONDS",
        help="start after the first event, rounded to whole windows (default: 0)",
    )
    parser.add_argument(
        "--seconds", type=float, metavar="N", help="length of the part to read (default: all)"
    )
    parser.add_argument(
        "--device", metavar="DEVICE", help="cpu, cuda, cuda:1 (default: cuda where available)"
    )
    parser.add_argument(
        "--frames-per-call",
        type=int,
        default=4,
        metavar="N",
        help="frames that the network takes at once; the detections are the same up to rounding "
        "(default: 4)",
    )
    parser.add_argument(
        "--precision",
        default="auto",
        metavar="P",
        help="fp32, tf32 or bf16 (default: on a GPU that of training, on a CPU fp32)",
    )
    parser.add_argument(
        "--cuda-graphs",
        action="store_true",
        help="on a GPU: a call is one launch; the detections are the same",
    )
    parser.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="CPU threads of the network (default: one less than the cores)",
    )


def main(argv: list[str] | None = None) -> None:
    """The command."""
    args = _parser().parse_args(argv)
    with reported_errors():
        infer(args)


if __name__ == "__main__":
    main()
