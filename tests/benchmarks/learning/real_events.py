"""Detections per frame on real recordings without boxes: a measure of false alarms.

Recordings that have no object of the simulated classes should give none.
"""

import json
from pathlib import Path

from evspan.conf.atomic_files import replace_file
from evspan.launch.cli.main import main as evspan

CONFIDENCE = 0.3
SECONDS = 5  # of each recording, at most
SUFFIXES = (".raw", ".dat", ".h5", ".hdf5", ".aedat4")
SUMMARY = "summary.json"  # written last


def main(run: str, recordings: str, folder: str, device: str) -> None:
    """Detects objects, and writes the number of detections of every frame to FOLDER/summary.json."""
    counts: dict[str, list[int]] = {}
    Path(folder).mkdir(parents=True, exist_ok=True)
    for path in sorted(Path(recordings).iterdir()):
        if path.suffix.lower() not in SUFFIXES:
            continue
        lines = Path(folder, f"{path.stem}.json")
        words = [
            *("infer", run, str(path), "--output", folder, "--overwrite", "--no-video"),
            *("--json", str(lines), "--confidence", str(CONFIDENCE), "--seconds", str(SECONDS)),
            *("--device", "cuda" if device == "gpu" else device),
        ]
        try:
            evspan(words)
        except SystemExit as ended:
            if ended.code:
                raise
        texts = lines.read_text().splitlines()
        counts[path.name] = [len(json.loads(text)["detections"]) for text in texts if text.strip()]
    if not counts:
        raise SystemExit(f"error: {recordings} has no recordings ({', '.join(SUFFIXES)})")
    replace_file(Path(folder, SUMMARY), json.dumps({"per_frame": counts}) + "\n")


def detections_per_frame(folder: Path) -> float | None:
    """The mean over all frames of all recordings; None before `main` has run."""
    try:
        by_recording = json.loads((folder / SUMMARY).read_text())["per_frame"]
    except FileNotFoundError:
        return None
    counts = [count for counts in by_recording.values() for count in counts]
    return sum(counts) / len(counts) if counts else None
