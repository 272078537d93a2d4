"""Peak memory of `evspan prep`, its processes included, on long and on short recordings.

    .venv/bin/python tests/benchmarks/prep_memory.py [--seconds 10 60] [--folder /scratch]

Two recordings at once on two processes, each of 1280 x 720 pixels and about 3 million events a second. Prints the peak of the
resident memory of all processes together (sampled every 10 ms; pages that they share count in each) and the ratio.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

LIMIT = 1.5


def family(pid: int) -> list[int]:
    try:
        children = [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []
    return [pid, *(p for child in children for p in family(child))]


def resident_mb(pid: int) -> float:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096 / 1e6
    except (FileNotFoundError, ProcessLookupError):
        return 0.0


def simulated(folder: Path, seconds: float) -> Path:
    """Two recordings of the same content."""
    arguments = [str(folder), "--recordings", "train=1", "--seconds", str(seconds)]
    subprocess.run(
        [sys.executable, "-m", "evspan.launch.cli.simulate", *arguments],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    for ending in ("td.raw", "bbox.npy"):
        (folder / "train" / f"train_001_{ending}").hardlink_to(
            folder / "train" / f"train_000_{ending}"
        )
    return folder


def peak_mb(source: Path, output: Path) -> tuple[float, int, float]:
    """(peak, processes at that moment, seconds)."""
    began, peak, processes = time.perf_counter(), 0.0, 0
    command = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "evspan.launch",
            "prep",
            f"source={source}",
            f"output={output}",
            "processes=2",
        ],
        stdout=subprocess.DEVNULL,
    )
    while command.poll() is None:
        members = family(command.pid)
        now = sum(map(resident_mb, members))
        if now > peak:
            peak, processes = now, len(members)
        time.sleep(0.01)
    assert command.returncode == 0
    return peak, processes, time.perf_counter() - began


def main() -> None:
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
    given = parser.parse_args()
    peaks = []
    with TemporaryDirectory(dir=given.folder) as folder:
        for seconds in given.seconds:
            source = simulated(Path(folder) / f"raw{seconds:g}", seconds)
            peak, processes, took = peak_mb(source, Path(folder) / f"shards{seconds:g}")
            peaks.append(peak)
            size = (source / "train" / "train_000_td.raw").stat().st_size / 1e6
            print(
                f"2 recordings of {seconds:g} s, {size:.0f} MB each: peak {peak:.0f} MB in {processes} processes, "
                f"{took:.1f} s",
                flush=True,
            )
    print(f"ratio {peaks[1] / peaks[0]:.2f} (at most {LIMIT})")
    sys.exit(peaks[1] > LIMIT * peaks[0])


if __name__ == "__main__":
    main()
