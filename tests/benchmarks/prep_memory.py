"""Measures peak memory of `evspan prep` and its processes, on long and on short recordings.

    .venv/bin/python tests/benchmarks/prep_memory.py [--seconds 10 60] [--folder DIR]

Prepares two recordings at once on two processes, each of 1280 x 720 pixels and about 3 million
events per second. Prints the peak resident memory of all processes together (sampled every 10 ms;
shared pages count once per process) and the ratio.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import psutil

MOST_RATIO = 1.5


class Peak(NamedTuple):
    """Peak memory of a command. processes: their number at the peak."""

    mb: float
    processes: int
    seconds: float


def resident_mb(process: psutil.Process) -> float:
    """Resident memory of a process; 0 if it has ended."""
    try:
        return process.memory_info().rss / 1e6
    except psutil.NoSuchProcess:
        return 0.0


def family(process: psutil.Process) -> list[psutil.Process]:
    """A process and all its descendants; none if it has ended."""
    try:
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def simulated(folder: Path, seconds: float) -> Path:
    """Simulates a recording in a source folder, and links a second one to the same files."""
    arguments = [str(folder), "--recordings", "train=1", "--seconds", str(seconds)]
    subprocess.run(
        [sys.executable, "-m", "evspan.launch", "simulate", *arguments],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    train = folder / "train"
    for suffix in ("td.raw", "bbox.npy"):
        (train / f"train_001_{suffix}").hardlink_to(train / f"train_000_{suffix}")
    return folder


def peak_of_prep(source: Path, output: Path) -> Peak:
    """Runs `evspan prep` and samples its memory."""
    start = time.perf_counter()
    words = ["prep", f"source={source}", f"output={output}", "dataset=simulated", "processes=2"]
    command = subprocess.Popen(
        [sys.executable, "-m", "evspan.launch", *words], stdout=subprocess.DEVNULL
    )
    process = psutil.Process(command.pid)
    peak = 0.0
    processes = 0
    while command.poll() is None:
        members = family(process)
        total = sum(map(resident_mb, members))
        if total > peak:
            peak = total
            processes = len(members)
        time.sleep(0.01)
    assert command.returncode == 0
    return Peak(peak, processes, time.perf_counter() - start)


def main() -> None:
    """Prints the peaks; exit code 1 if the ratio is above the target."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--seconds", type=float, nargs=2, default=(10, 60), metavar=("SHORT", "LONG")
    )
    parser.add_argument(
        "--folder",
        type=Path,
        help="for 2 GB of recordings and shards (default: the system's temporary folder)",
    )
    args = parser.parse_args()
    peaks = []
    with TemporaryDirectory(dir=args.folder) as folder:
        for seconds in args.seconds:
            source = simulated(Path(folder) / f"raw{seconds:g}", seconds)
            peak = peak_of_prep(source, Path(folder) / f"shards{seconds:g}")
            peaks.append(peak.mb)
            size = (source / "train" / "train_000_td.raw").stat().st_size / 1e6
            print(
                f"2 recordings of {seconds:g} s, {size:.0f} MB each: peak {peak.mb:.0f} MB in "
                f"{peak.processes} processes, {peak.seconds:.1f} s",
                flush=True,
            )
    print(f"ratio {peaks[1] / peaks[0]:.2f} (at most {MOST_RATIO})")
    sys.exit(peaks[1] > MOST_RATIO * peaks[0])


if __name__ == "__main__":
    main()
