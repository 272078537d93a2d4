"""Measures the moving average of the weights: AP against raw weights, and its cost.

python tests/benchmarks/ema.py --help
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from evspan.conf.atomic_files import replace_file
from evspan.conf.errors import UserError
from evspan.launch.cli.command import Parser, run_command
from evspan.pipeline.checkpoint_files import FOLDER, checkpoint_name
from learning.intervals import interval, paired
from learning.recordings import CONF, FULL, QUICK, Recordings, recordings_in

DESCRIPTION = """Trains the learning study's baseline with several seeds, and scores every evaluated checkpoint
twice: with the moving average of the weights (which the training evaluates) and with the raw ones
(evspan evaluate weights=raw). Writes FOLDER/ema/report.md: AP of both by step, their paired difference,
the spread between seeds, and the change between consecutive evaluations. The same command continues
with what is not finished; more seeds add runs.

--cost measures the time of a training step with and without the average instead, in turns."""
EXAMPLES = """examples:
  python tests/benchmarks/ema.py --folder bench --seeds 3 parallel.threads=1     # hours on 2 cores
  python tests/benchmarks/ema.py --quick --seeds 2 --steps 8 --evaluations 2     # a small version
  python tests/benchmarks/ema.py --cost --sizes micro,tiny"""
KINDS = ("ema", "raw")
DECAY = 0.9999
WARM_UP_STEPS = 3
STAGES = {"plain": "zero0", "deepspeed": "zero1"}  # engine -> conf/deepspeed


@dataclass(frozen=True)
class Plan:
    """The runs. extra: overrides for every run. recordings: the set."""

    folder: Path
    seeds: int
    steps: int
    evaluations: int
    extra: tuple[str, ...]
    recordings: Recordings

    def __post_init__(self) -> None:
        for name in ("seeds", "steps", "evaluations"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} is {getattr(self, name)}; give 1 or more")
        if self.evaluations > self.steps:
            raise UserError(f"--evaluations {self.evaluations} are more than --steps {self.steps}")

    @property
    def every(self) -> int:
        """Steps from one evaluation to the next."""
        return self.steps // self.evaluations

    @property
    def evaluated_steps(self) -> list[int]:
        """The steps of all evaluations, the last one included."""
        return sorted({*range(self.every, self.steps + 1, self.every), self.steps})

    def run(self, seed: int) -> Path:
        """The folder of a run."""
        return self.folder / "ema" / f"steps-{self.steps}-seed-{seed}"


# -- training and scoring ----------------------------------------------------------------------
def train(plan: Plan, shards: Path, seed: int) -> None:
    """Trains a run, or what is missing of it."""
    if all(_ap(plan, seed, "ema", step) is not None for step in plan.evaluated_steps):
        return
    _evspan(
        [
            *("train", "--config-dir", str(CONF), "experiment=bench/baseline"),
            *(f"dataset.root={shards}", f"run_dir={plan.run(seed)}", f"seed={seed}"),
            *(f"training.max_steps={plan.steps}", f"training.evaluate_every={plan.every}"),
            *(f"training.ema_decay={DECAY}", f"checkpoint.every={plan.every}"),
            *(f"checkpoint.keep={plan.evaluations + 1}", "evaluation.write_detections=false"),
            *plan.extra,
        ]
    )


def score(plan: Plan, shards: Path, seed: int) -> None:
    """Scores the raw weights of a run's checkpoints, as its training has scored the averages."""
    for step in plan.evaluated_steps:
        if _ap(plan, seed, "raw", step) is None:
            words = [w for w in plan.extra if w.startswith(("evaluation.", "parallel.threads="))]
            _evspan(
                [
                    *("evaluate", str(_checkpoint(plan, seed, step)), f"dataset.root={shards}"),
                    *("weights=raw", f"output={_raw_folder(plan, seed, step)}"),
                    *("evaluation.write_detections=false", *words),
                ]
            )


def _evspan(words: list[str]) -> None:
    code = subprocess.run(
        [sys.executable, "-m", "evspan.launch", *words], stdout=subprocess.DEVNULL
    ).returncode
    if code:
        raise UserError(f"evspan {' '.join(words)} ended with exit code {code}")


def _checkpoint(plan: Plan, seed: int, step: int) -> Path:
    return plan.run(seed) / FOLDER / checkpoint_name(step)


def _raw_folder(plan: Plan, seed: int, step: int) -> Path:
    return plan.run(seed) / "raw" / checkpoint_name(step)


def _ap(plan: Plan, seed: int, kind: str, step: int) -> float | None:
    """The AP of an evaluation; None where it is not there yet."""
    is_raw = kind == "raw"
    folder = _raw_folder(plan, seed, step) if is_raw else _checkpoint(plan, seed, step)
    try:
        metrics = json.loads((folder / "metrics.json").read_text())
    except FileNotFoundError:
        return None
    if not str(metrics["weights"]).startswith(kind):
        raise UserError(f"{folder}/metrics.json is of the weights {metrics['weights']}")
    return float(metrics["ap"] or 0.0)


# -- the report ----------------------------------------------------------------------------------
def report(plan: Plan) -> str:
    """The tables, of the seeds whose evaluations are complete, in points of 100.

    Raises:
        UserError: there is none.
    """
    steps = plan.evaluated_steps
    aps: dict[str, dict[int, list[float]]] = {kind: {} for kind in KINDS}  # seed -> AP by step
    for seed in range(plan.seeds):
        found = {kind: [_ap(plan, seed, kind, step) for step in steps] for kind in KINDS}
        if all(value is not None for values in found.values() for value in values):
            for kind in KINDS:
                aps[kind][seed] = [float(value or 0.0) for value in found[kind]]
    seeds = sorted(aps["ema"])
    if not seeds:
        raise UserError(f"no run in {plan.folder / 'ema'} is complete; leave out --report")
    lines = [
        f"`{plan.recordings.name}`, baseline, {plan.steps} steps, {len(seeds)} seeds, decay {DECAY}. "
        "Points of AP; ± half of the 95 % interval (Student's t over seeds).",
        "",
        "| step | EMA | raw | EMA less raw |",
        "|---:|---:|---:|---:|",
    ]
    for i, step in enumerate(steps):
        at_step = {kind: {seed: aps[kind][seed][i] for seed in seeds} for kind in KINDS}
        cells = [interval(list(at_step[kind].values())).points() for kind in KINDS]
        difference = paired(at_step["ema"], at_step["raw"])
        assert difference is not None
        lines.append(f"| {step} | {cells[0]} | {cells[1]} | {difference.points(signed=True)} |")
    lines += ["", "| spread | EMA | raw | EMA / raw |", "|---|---:|---:|---:|"]
    for name, spread in (
        ("between seeds: standard deviation, mean over the steps", _between_seeds),
        ("between consecutive evaluations: mean change, second half of the run", _between_steps),
    ):
        values = [spread(list(aps[kind].values())) for kind in KINDS]
        lines.append(f"| {name} | {_cell(values[0])} | {_cell(values[1])} | {_ratio(*values)} |")
    return "\n".join(lines) + "\n"


def _between_seeds(runs: Sequence[Sequence[float]]) -> float | None:
    """Standard deviation over the runs, mean over the steps. None for one run."""
    if len(runs) < 2:
        return None
    by_step = zip(*runs, strict=True)
    return statistics.fmean(statistics.stdev(values) for values in by_step)


def _between_steps(runs: Sequence[Sequence[float]]) -> float | None:
    """Mean absolute change from an evaluation to the next. None with too few evaluations."""
    changes = []
    for values in runs:
        late = values[len(values) // 2 :]
        changes += [abs(after - before) for before, after in pairwise(late)]
    return statistics.fmean(changes) if changes else None


def _cell(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f}"


def _ratio(ema: float | None, raw: float | None) -> str:
    return f"{ema / raw:.2f}" if ema is not None and raw else ""


# -- the cost ------------------------------------------------------------------------------------
def cost(sizes: Sequence[str], steps: int) -> str:
    """A table of the times of a step with and without the average, taken in turns."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from evspan.pipeline.engine.trainer import Trainer
    from support.counted_step import StepOptions, write_shards
    from support.one_rank import open_one_rank

    lines = [
        "| size | engine | ms without | ms with | ratio | MB of the average |",
        "|---|---|" + "---:|" * 4,
    ]
    with tempfile.TemporaryDirectory() as folder, open_one_rank() as world:
        shards = write_shards(Path(folder) / "shards", StepOptions())
        for size in sizes:
            for engine in STAGES:
                trainers = []
                for decay in (0.0, DECAY):
                    run = Path(folder) / f"{size}-{engine}-{decay}"
                    trainers.append(Trainer(_cost_config(shards, run, size, engine, decay), world))
                without, averaging = _step_times(trainers, steps)
                average = trainers[1].average
                assert average is not None
                pairs = [*average.trained, *average.buffers]
                megabytes = sum(pair.average.nbytes for pair in pairs) / 1e6
                lines.append(
                    f"| {size} | {engine} | {without:.1f} | {averaging:.1f} "
                    f"| {averaging / without:.3f} | {megabytes:.1f} |"
                )
                for trainer in trainers:
                    trainer.close()
                    trainer.engine.close()
    return "\n".join(lines) + "\n"


def _cost_config(shards: Path, run: Path, size: str, engine: str, decay: float):
    from evspan.conf.compose import compose
    from evspan.conf.schema.training import TrainConfig

    return compose(
        TrainConfig,
        [
            *(f"size={size}", f"dataset.root={shards}", f"run_dir={run}"),
            *(f"training.engine={engine}", f"deepspeed={STAGES[engine]}"),
            *("training.batch_size=1", "training.sequence_length=2", "training.num_workers=0"),
            *("model.head.num_classes=3", f"training.ema_decay={decay}", "parallel.device=cpu"),
        ],
    )


def _step_times(trainers, steps: int) -> list[float]:
    """The median time of a step in ms, per trainer; they take turns."""
    batches = [trainer.loader.batches(0) for trainer in trainers]
    times: list[list[float]] = [[] for _ in trainers]
    for number in range(WARM_UP_STEPS + steps):
        for trainer, own, taken in zip(trainers, batches, times):
            batch = next(own)
            started = time.process_time()
            trainer.micro_batch(batch)
            if number >= WARM_UP_STEPS:
                taken.append(1000 * (time.process_time() - started))
    for own in batches:
        own.close()
    return [statistics.median(taken) for taken in times]


# -- the command ---------------------------------------------------------------------------------
def run(args: argparse.Namespace) -> None:
    """Measures and prints the tables."""
    if args.cost:
        print(cost(args.sizes.split(","), args.cost_steps))
        return
    recordings = QUICK if args.quick else FULL
    folder = args.folder / recordings.name
    extra = tuple(args.overrides)
    plan = Plan(folder, args.seeds, args.steps, args.evaluations, extra, recordings)
    if not args.report:
        shards = recordings_in(folder, recordings).shards.absolute()
        for seed in range(plan.seeds):
            print(f"seed {seed}: {plan.run(seed)}", flush=True)
            train(plan, shards, seed)
            score(plan, shards, seed)
    text = report(plan)
    replace_file(plan.folder / "ema" / "report.md", text)
    print(text)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        "ema.py",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("overrides", nargs="*", metavar="KEY=VALUE", help="overrides for every run")
    add("--folder", type=Path, default=Path("bench"), help="output folder (default: bench)")
    add("--seeds", type=int, default=3, metavar="N", help="number of runs (default: 3)")
    add("--steps", type=int, default=600, metavar="N", help="of a run (default: 600)")
    add("--evaluations", type=int, default=8, metavar="N", help="of a run (default: 8)")
    add("--quick", action="store_true", help="the small set of recordings")
    add("--report", action="store_true", help="report what is finished, start nothing")
    add("--cost", action="store_true", help="measure the time of a step instead")
    add("--sizes", default="micro,tiny", metavar="A,B", help="of --cost (default: micro,tiny)")
    add("--cost-steps", type=int, default=15, metavar="N", help="of --cost (default: 15)")
    return parser


if __name__ == "__main__":
    arguments = _parser().parse_intermixed_args(sys.argv[1:])
    run_command(lambda: run(arguments))
