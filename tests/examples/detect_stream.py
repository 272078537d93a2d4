"""Prints the detections of a recording, of a file that a camera is writing, or of arrays.

python tests/examples/detect_stream.py runs/base drive.raw
python tests/examples/detect_stream.py runs/base camera.raw --follow 5
python tests/examples/detect_stream.py runs/base drive.raw --arrays
"""

import argparse
from collections.abc import Iterator

from evspan.data_prep.recordings.events import Events
from evspan.data_prep.recordings.open import open_recording
from evspan.pipeline import load_detector


def blocks_of(path: str) -> Iterator[Events]:
    """Blocks of events, as the library of a camera hands them over: (t, x, y, p) arrays."""
    yield from open_recording(path).chunks(10_000)


def main(argv: list[str] | None = None) -> None:
    """Runs the program."""
    parser = argparse.ArgumentParser(description="Prints the detections of a recording.")
    parser.add_argument("run", help="a run folder, a checkpoint or a .safetensors file")
    parser.add_argument("recording")
    parser.add_argument("--confidence", type=float, default=0.3)
    parser.add_argument("--follow", type=float, metavar="SECONDS", help="the file still grows")
    parser.add_argument("--arrays", action="store_true", help="hand the events over in arrays")
    args = parser.parse_args(argv)

    detector = load_detector(args.run)
    if args.arrays:
        sensor = open_recording(args.recording)
        stream = detector.stream(
            blocks_of(args.recording),
            sensor_size=(sensor.height, sensor.width),
            confidence_threshold=args.confidence,
        )
    else:
        stream = detector.stream(
            args.recording, confidence_threshold=args.confidence, follow_s=args.follow
        )
    for time_us, detections in stream:
        for box in detections:
            name = detector.class_name(box["class_id"])
            x, y, w, h = (round(float(box[side])) for side in "xywh")
            print(f"{time_us} us: {name} {box['class_confidence']:.2f} at {x}, {y}, {w} x {h}")


if __name__ == "__main__":
    main()
