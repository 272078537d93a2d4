"""`make demo`: the whole way on simulated recordings, by the commands that a user would give, timed, in one table."""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from evspan.conf.errors import UserError
from evspan.launch.cli.command import run_command

TRAIN, HELD_OUT, SECONDS = 10, 2, 10  # recordings, and the length of each
ENOUGH = 0.5  # AP50 on the held-out recordings; less, and something is wrong
ROWS = {
    "ap": "AP 0.50:0.95",
    "ap50": "AP50",
    "ap_small": "AP small",
    "ap_medium": "AP medium",
    "ap_large": "AP large",
}
TIMES = "times.json"  # part -> seconds; also the sign that the folder is a demo's

DESCRIPTION = f"""Simulates {TRAIN} + {HELD_OUT} recordings, prepares them, trains on {TRAIN}, scores the {HELD_OUT} held-out ones
and draws detections over one of them. Starts from nothing: what an earlier demo left in the folder is removed."""


class Part(NamedTuple):
    name: str
    arguments: list[str]  # of `evspan`
    makes: Path  # removed before the part runs

    def __str__(self) -> str:
        return shlex.join(["evspan", *self.arguments])


def parts(folder: Path) -> list[Part]:
    raw, shards, run, evaluation, detections = (
        folder / n for n in ("raw", "shards", "run", "evaluation", "detections")
    )
    return [
        Part(
            "simulate",
            [
                "simulate",
                str(raw),
                "--recordings",
                f"train={TRAIN},val={HELD_OUT}",
                "--seconds",
                str(SECONDS),
            ],
            raw,
        ),
        Part(
            "prep",
            [
                "prep",
                f"source={raw}",
                f"output={shards}",
                "dataset=simulated",
                "frames.downsample=4",
            ],
            shards,
        ),
        Part(
            "train", ["train", "experiment=demo", f"dataset.root={shards}", f"run_dir={run}"], run
        ),
        Part(
            "evaluate",
            [
                "evaluate",
                str(run),
                "dataset=simulated",
                f"dataset.root={shards}",
                "evaluation.split=val",
                "parallel.ranks=2",
                f"output={evaluation}",
            ],
            evaluation,
        ),
        Part(
            "infer",
            [
                "infer",
                str(run),
                str(raw / "val" / "val_000_td.raw"),
                "--output",
                str(detections),
            ],
            detections,
        ),
    ]


def run_parts(todo: list[Part], folder: Path, keep: bool) -> dict[str, float]:
    """Seconds per part. One that has ended well counts as done, with the time it took; any other runs from nothing."""
    times = _times(folder) if keep else {}
    for part in todo:
        if part.name not in times:
            shutil.rmtree(part.makes, ignore_errors=True)
            for later in todo[todo.index(part) :]:  # they were made from what is made anew now
                times.pop(later.name, None)
            _write_times(folder, times)
            print(f"\n== {part.name}: {part}", flush=True)
            began = time.perf_counter()
            code = subprocess.run(
                [sys.executable, "-m", "evspan.launch", *part.arguments]
            ).returncode
            if code:
                _failed(part, code, folder)
            times[part.name] = time.perf_counter() - began
            _write_times(folder, times)
    return times


def _failed(part: Part, code: int, folder: Path) -> NoReturn:
    how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
    go_on = [os.path.relpath(sys.executable), "-m", "evspan.launch.demo", str(folder), "--continue"]
    print(
        f"error: the demo's part {part.name} {how}; what it said is above. Repeat it alone: {part}\n"
        f"or go on with the demo from there: {shlex.join(go_on)}",
        file=sys.stderr,
        flush=True,
    )
    sys.exit(code if code > 0 else 128 - code)


def _times(folder: Path) -> dict[str, float]:
    try:
        return json.loads((folder / TIMES).read_text())
    except FileNotFoundError:
        return {}


def _write_times(folder: Path, times: dict[str, float]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / TIMES).write_text(json.dumps(times, indent=1) + "\n")


def read_metrics(folder: Path) -> dict[str, float | None]:
    """Shares from 0 to 1 of ROWS; None where there are no such boxes."""
    raw: dict[str, Any] = json.loads((folder / "evaluation" / "metrics.json").read_text())
    return {name: raw[name] for name in ROWS}


def table(metrics: dict[str, float | None], times: dict[str, float], folder: Path) -> str:
    """What the demo reached, how long each part took, and where to look."""
    lines = [
        f"{HELD_OUT} held-out recordings of {SECONDS} s, detector trained on {TRAIN} others",
        "",
    ]
    shares = {words: metrics[name] for name, words in ROWS.items()}
    lines += [
        f"  {words:14}{'-' if share is None else format(share, '.3f'):>8}"
        for words, share in shares.items()
    ]
    lines += ["", *(f"  {name:14}{seconds:>8.1f} s" for name, seconds in times.items())]
    lines += [f"  {'together':14}{sum(times.values()):>8.1f} s", ""]
    overlays = sorted((folder / "detections").glob("*_overlay.*"))
    logs, board = folder / "run" / "tensorboard", Path(sys.executable).with_name("tensorboard")
    watch = [os.path.relpath(board) if board.exists() else "tensorboard", "--logdir", str(logs)]
    lines += [
        f"  {'overlay':14}{overlays[0] if overlays else '-'}",
        f"  {'TensorBoard':14}{logs}",
        f"  {'to watch it':14}{shlex.join(watch)}",
    ]
    return "\n".join(lines)


def last_line(metrics: dict[str, float | None], times: dict[str, float]) -> str:
    return f"demo: ap={metrics['ap'] or 0:.3f} ap50={metrics['ap50'] or 0:.3f} seconds={sum(times.values()):.0f}"


def demo(folder: Path, keep: bool) -> int:
    """Run what is to be run, print the table; the exit code.

    Raises:
        UserError: the folder holds something that no demo made.
    """
    todo = parts(folder)
    foreign = [p.makes for p in todo if p.makes.exists()] if not (folder / TIMES).exists() else []
    if foreign:
        raise UserError(
            f"{foreign[0]} is there, but not from a demo ({folder / TIMES} is missing). Move it away, or name "
            "another folder: python -m evspan.launch.demo FOLDER"
        )
    times = run_parts(todo, folder, keep)
    metrics = read_metrics(folder)
    print(f"\n{table(metrics, times, folder)}\n", flush=True)
    enough = (metrics["ap50"] or 0) >= ENOUGH
    if not enough:
        print(
            f"error: AP50 is {metrics['ap50'] or 0:.3f}, below {ENOUGH:.2f}: the detector has not learnt enough. Look at "
            "loss/total in TensorBoard, and at the overlay",
            file=sys.stderr,
            flush=True,
        )
    print(last_line(metrics, times), flush=True)
    return 0 if enough else 1


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m evspan.launch.demo", description=DESCRIPTION)
    parser.add_argument(
        "folder", nargs="?", type=Path, default=Path("demo"), metavar="FOLDER", help="default: demo"
    )
    parser.add_argument(
        "--continue",
        dest="keep",
        action="store_true",
        help="use the parts that an earlier demo finished, with the times they took",
    )
    given = parser.parse_args(argv)
    code = 0

    def run() -> None:
        nonlocal code
        code = demo(given.folder, given.keep)

    run_command(run)
    sys.exit(code)


if __name__ == "__main__":
    main()
