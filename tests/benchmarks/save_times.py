"""Measures what a checkpoint costs a training step: none, synchronous and asynchronous saves.

python tests/benchmarks/save_times.py --help
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from evspan.launch.cli.command import Parser, run_command

DESCRIPTION = """Trains a detector on the CPU, one lane of two small frames a step, and saves a checkpoint before
every N steps. Three trainers take turns: without saves, with synchronous and with asynchronous ones.
Prints the median wall time of N steps with their save, up to the commit, and of the save alone, for
which the step waits; and the CPU time of the training thread, which other load does not change."""
EXAMPLES = """examples:
  python tests/benchmarks/save_times.py --sizes tiny,base
  python tests/benchmarks/save_times.py --sizes micro --rounds 2     # a small version"""
KINDS = ("none", "synchronous", "asynchronous")


class Turns:
    """A trainer, and the times of its turns in seconds.

    Attributes:
        saves: of the call that saves. whole: of a save and the steps behind it. own: the CPU time
            of the training thread in them.
    """

    def __init__(self, trainer: Any, kind: str) -> None:
        self.trainer = trainer
        self.kind = kind
        self.batches = trainer.loader.batches(0)
        self.saves: list[float] = []
        self.whole: list[float] = []
        self.own: list[float] = []

    def take(self, every: int) -> None:
        """Saves, and trains the steps until the next save."""
        ready = [next(self.batches) for _ in range(every)]
        started = time.perf_counter()
        own_started = time.thread_time()
        if self.kind != "none":
            self.trainer._save()
        self.saves.append(time.perf_counter() - started)
        for batch in ready:
            self.trainer.micro_batch(batch)
            self.trainer.step += 1
            self.trainer._advance_save()
        self.trainer._read_pending()
        self.trainer._end_save()
        self.whole.append(time.perf_counter() - started)
        self.own.append(time.thread_time() - own_started)


def table(sizes: list[str], every: int, rounds: int) -> str:
    """The times, a row for each size and kind."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from evspan.pipeline.engine.trainer import Trainer
    from support.counted_step import StepOptions, write_shards
    from support.one_rank import open_one_rank

    lines = [
        f"| size | saves | MB | ms of a save | ms of {every} steps and a save | ratio "
        "| CPU ms of the training thread | ratio |",
        "|---|---|" + "---:|" * 6,
    ]
    with tempfile.TemporaryDirectory() as folder, open_one_rank() as world:
        shards = write_shards(Path(folder) / "shards", StepOptions())
        for size in sizes:
            turns = []
            for kind in KINDS:
                config = _config(shards, Path(folder) / f"{size}-{kind}", size, kind)
                turns.append(Turns(Trainer(config, world), kind))
            for number in range(rounds + 1):
                for turn in turns:
                    turn.take(every)
                    if number == 0:  # a warm-up
                        for times in (turn.saves, turn.whole, turn.own):
                            times.clear()
            lines += [_row(size, turn, turns[0]) for turn in turns]
            for turn in turns:
                turn.batches.close()
                turn.trainer.close()
    return "\n".join(lines) + "\n"


def _row(size: str, turn: Turns, without: Turns) -> str:
    files = Path(turn.trainer.run_dir).rglob("step-*/*")
    newest = sum(file.stat().st_size for file in files) / 1e6
    whole = median(turn.whole)
    own = median(turn.own)
    return (
        f"| {size} | {turn.kind} | {newest:.0f} | {1000 * median(turn.saves):.0f} "
        f"| {1000 * whole:.0f} | {whole / median(without.whole):.3f} "
        f"| {1000 * own:.0f} | {own / median(without.own):.3f} |"
    )


def _config(shards: Path, run: Path, size: str, kind: str) -> Any:
    from evspan.conf.compose import compose
    from evspan.conf.schema.training import TrainConfig

    asynchronous = "true" if kind == "asynchronous" else "false"
    return compose(
        TrainConfig,
        [
            *(f"size={size}", f"dataset.root={shards}", f"run_dir={run}"),
            *("training.engine=plain", "deepspeed=zero0", "parallel.device=cpu"),
            *("training.batch_size=1", "training.sequence_length=2", "training.num_workers=0"),
            *("model.head.num_classes=3", "checkpoint.keep=1"),
            f"checkpoint.asynchronous={asynchronous}",
        ],
    )


def main() -> None:
    """Prints the table."""
    parser = Parser(
        "save_times.py",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--sizes", default="tiny", metavar="A,B", help="(default: tiny)")
    parser.add_argument("--every", type=int, default=10, metavar="N", help="steps (default: 10)")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="turns (default: 7)")
    args = parser.parse_args()
    print(table(args.sizes.split(","), args.every, args.rounds))


if __name__ == "__main__":
    run_command(main)
