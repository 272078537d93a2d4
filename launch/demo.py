"""The demo: simulate, prepare, train, evaluate and infer, with the commands of a user."""

import json
import logging
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from evspan.conf.errors import UserError
from evspan.pipeline.parallel.gpus import gpu_count

TRAIN_RECORDINGS = 10
VAL_RECORDINGS = 2  # not seen in training
SECONDS = 10  # of each recording
REQUIRED_AP50 = 0.5  # on the recordings of val; a lower one means that something is wrong
CPU_RANKS = 2
LANES = 4  # training.batch_size of the demo, which the ranks divide
METRICS = ("ap", "ap50", "ap_small", "ap_medium", "ap_large")  # keys of metrics.json
TIMES = "times.json"  # seconds per part; a folder without this file is not a demo's
MODULE = "evspan.launch.cli.demo"

logger = logging.getLogger(__name__)


class Part(NamedTuple):
    """A command of the demo. output: removed before the part runs."""

    name: str
    arguments: list[str]  # of `evspan`
    output: Path

    def __str__(self) -> str:
        return shlex.join(["evspan", *self.arguments])


class PartFailedError(Exception):
    """A command of the demo failed. exit_code: for the demo itself."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True)
class DemoResult:
    """What the demo achieved.

    Attributes:
        metrics: METRICS on the recordings of val, 0 to 1; None where there are no such boxes.
        times: seconds per part.
    """

    folder: Path
    metrics: dict[str, float | None]
    times: dict[str, float]

    @property
    def passed(self) -> bool:
        """Whether the detector has learnt enough."""
        return (self.metrics["ap50"] or 0) >= REQUIRED_AP50


def demo_ranks(gpus: int) -> int:
    """The number of ranks on a machine with `gpus` GPUs: one for each, if that divides LANES."""
    if not gpus:
        return CPU_RANKS
    return max(ranks for ranks in range(1, min(gpus, LANES) + 1) if LANES % ranks == 0)


def demo_parts(folder: Path, ranks: int) -> list[Part]:
    """The commands of the demo in their order. ranks: of training and evaluation."""
    raw = folder / "raw"
    shards = folder / "shards"
    run = folder / "run"
    evaluation = folder / "evaluation"
    detections = folder / "detections"

    simulate = ["simulate", str(raw)]
    simulate += ["--recordings", f"train={TRAIN_RECORDINGS},val={VAL_RECORDINGS}"]
    simulate += ["--seconds", str(SECONDS)]
    prep = ["prep", f"source={raw}", f"output={shards}", "dataset=simulated"]
    prep += ["frames.downsample=4"]
    train = ["train", "experiment=demo", f"dataset.root={shards}", f"run_dir={run}"]
    train += [f"parallel.ranks={ranks}"]
    evaluate = ["evaluate", str(run), f"parallel.ranks={ranks}", f"output={evaluation}"]
    infer = ["infer", str(run), str(raw / "val" / "val_000_td.raw")]
    infer += ["--output", str(detections), "--overwrite"]  # a part may be repeated
    return [
        Part("simulate", simulate, raw),
        Part("prep", prep, shards),
        Part("train", train, run),
        Part("evaluate", evaluate, evaluation),
        Part("infer", infer, detections),
    ]


def run_demo(folder: Path, keep: bool) -> DemoResult:
    """Runs the demo in `folder`.

    Args:
        keep: use the parts that an earlier demo has completed there.

    Raises:
        UserError: the folder contains files that are not a demo's.
        PartFailedError: a command failed.
    """
    parts = demo_parts(folder, demo_ranks(gpu_count(os.environ)))
    if not (folder / TIMES).exists():
        _refuse_foreign_files(folder, parts)
    times = run_parts(parts, folder, keep)
    return DemoResult(folder, read_metrics(folder), times)


def _refuse_foreign_files(folder: Path, parts: Sequence[Part]) -> None:
    for part in parts:
        if part.output.exists():
            raise UserError(
                f"{part.output} exists, but it is not a demo's ({folder / TIMES} is missing). Move "
                f"it away, or name another folder: python -m {MODULE} FOLDER"
            )


def run_parts(parts: Sequence[Part], folder: Path, keep: bool) -> dict[str, float]:
    """Runs the parts; returns the seconds that each took.

    Args:
        keep: do not repeat the parts that an earlier demo has completed, with the times they took.

    Raises:
        PartFailedError: a command failed.
    """
    times = _read_times(folder) if keep else {}
    for number, part in enumerate(parts):
        if part.name in times:
            continue
        shutil.rmtree(part.output, ignore_errors=True)
        for later in parts[number:]:  # they used the output that is replaced
            times.pop(later.name, None)
        _write_times(folder, times)
        times[part.name] = _run_part(part, folder)
        _write_times(folder, times)
    return times


def _run_part(part: Part, folder: Path) -> float:
    """Runs a part; returns its seconds."""
    logger.info("\n== %s: %s", part.name, part)
    started = time.perf_counter()
    command = [sys.executable, "-m", "evspan.launch", *part.arguments]
    code = subprocess.run(command).returncode
    if code:
        raise _part_failed(part, code, folder)
    return time.perf_counter() - started


def _part_failed(part: Part, code: int, folder: Path) -> PartFailedError:
    """code: return code of the process; negative if a signal killed it."""
    how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
    python = os.path.relpath(sys.executable)
    resume = shlex.join([python, "-m", MODULE, str(folder), "--continue"])
    message = (
        f"the demo's part {part.name} {how}; its messages are above. Repeat it alone: {part}\n"
        f"or continue the demo from there: {resume}"
    )
    return PartFailedError(message, code if code > 0 else 128 - code)


def _read_times(folder: Path) -> dict[str, float]:
    try:
        times: dict[str, float] = json.loads((folder / TIMES).read_text())
    except FileNotFoundError:
        return {}
    return times


def _write_times(folder: Path, times: dict[str, float]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / TIMES).write_text(json.dumps(times, indent=1) + "\n")


def read_metrics(folder: Path) -> dict[str, float | None]:
    """METRICS of the demo's evaluation, 0 to 1; None where there are no such boxes."""
    contents: dict[str, Any] = json.loads((folder / "evaluation" / "metrics.json").read_text())
    return {name: contents[name] for name in METRICS}
