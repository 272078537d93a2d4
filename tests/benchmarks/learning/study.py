"""The learning study: trains and scores what is missing, and writes the page."""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from evspan.conf.atomic_files import replace_file
from evspan.conf.compose import override_key, replace_override
from evspan.conf.errors import UserError, require
from evspan.conf.text import plural
from evspan.launch.cli.command import Parser, run_command
from evspan.pipeline.checkpoint_files import FOLDER, META, checkpoint_name
from learning import other_detectors
from learning.experiments import (
    EXPERIMENTS,
    RESTS_LONG,
    RESTS_TEST,
    SETS,
    Experiment,
    Variant,
    quick_set,
)
from learning.jobs import Job, run_jobs
from learning.page import Key, Results, power_of, write_page
from learning.real_events import SUMMARY, detections_per_frame
from learning.recordings import CONF, Recordings, RecordingSet, recordings_in
from learning.scores import read_score

PROGRAMS = Path(__file__).parent
SETTINGS = "study.json"
PILOT = "pilot.json"
TIMES = "seconds.json"
PILOT_SEEDS = 3
STOPS = 12  # of a run: each stop saves a checkpoint more, and those that are scored must stay
QUICK_SCALE = 0.004
OWN_KEYS = (
    "experiment",
    "seed",
    "run_dir",
    "dataset.root",
    "dataset.roots",
    "parallel.device",
    "training.compile",
    "training.max_steps",
    "training.evaluate_every",
    "checkpoint.every",
    "checkpoint.keep",
    "checkpoint.init_from",
    "parallel.ranks",
    "parallel.sequence",
)
DESCRIPTION = """Experiments on whether attention and long sequences pay, and on generalisation and frame rates.
Simulated recordings are made once and verified by hash. Every run is an ordinary run folder; runs
of a seed read the same frames. Every checkpoint that counts is scored once, with the moving average
of its weights, on 12 held-out recordings or more. FOLDER/report.md has tables and figures, with
intervals over seeds and recordings.

It may be killed at any moment: the same command continues. The most valuable comes first."""
EXAMPLES = """experiments:
{experiments}

examples:
  python tests/benchmarks/learn.py --plan                     # runs and hours; starts nothing
  python tests/benchmarks/learn.py --pilot --hours 1          # how many seeds resolve the intended effects
  python tests/benchmarks/learn.py --hours 6
  python tests/benchmarks/learn.py --only attention --seeds 8 --device cpu
  python tests/benchmarks/learn.py --device gpu --scale 10 --folder bench/gpu
  python tests/benchmarks/learn.py --report                   # from what is there
  python tests/benchmarks/learn.py --quick --only rate        # a small version, minutes

KEY=VALUE is passed to every training run."""


@dataclass(frozen=True)
class Options:
    """The command line.

    Attributes:
        seeds: 0: each experiment's.
        scale: factor on the steps of all runs.
        compile: with torch.compile. Results differ by rounding only, so a folder may have runs of both ways.
    """

    folder: Path
    only: tuple[str, ...]
    seeds: int
    scale: float
    quick: bool
    device: str
    jobs: int
    hours: float
    pilot: bool
    real: Path | None
    compile: bool
    extra: tuple[str, ...]

    def __post_init__(self) -> None:
        unknown = [name for name in self.only if name not in EXPERIMENTS]
        if unknown:
            raise UserError(
                f"--only: no experiment {unknown[0]!r}; choose from {', '.join(EXPERIMENTS)}"
            )
        require(self.seeds >= 0, f"--seeds is {self.seeds}; give 1 or more")
        require(
            0 < self.scale <= 1000, f"--scale is {self.scale:g}; give a factor above 0, up to 1000"
        )
        require(
            math.isfinite(self.hours) and self.hours >= 0,
            f"--hours is {self.hours:g}; give hours, or 0 for no limit",
        )
        require(
            self.jobs >= 0, f"--jobs is {self.jobs}; give 1 or more, or 0: it follows the cores"
        )
        for override in self.extra:
            if "=" not in override:
                raise UserError(f"{override!r} is not KEY=VALUE; --help shows examples")
            if override_key(override) in OWN_KEYS:
                raise UserError(f"{override_key(override)} is set by the study")


@dataclass(frozen=True)
class Run:
    """A run of a variant."""

    experiment: Experiment
    variant: Variant
    seed: int

    @property
    def name(self) -> str:
        return f"{self.experiment.name}/{self.variant.name}-{self.seed}"


class Study:
    """Where everything is, and what has to be done.

    Args:
        options: whose folder is new, or was begun with the same settings.

    Raises:
        UserError: it was begun with others.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        self.folder = options.folder
        self.experiments = [EXPERIMENTS[n] for n in options.only or EXPERIMENTS]
        self._verified: dict[str, RecordingSet] = {}
        self._jobs: dict[str, Job] = {}
        self._uses: dict[str, list[Job]] = {}  # run -> jobs that read its weights
        self._scored: set[Path] = set()

    def check_settings(self) -> None:
        """Writes the settings to a new folder; refuses a folder with others."""
        settings = {
            "scale": self.options.scale,
            "quick": self.options.quick,
            "extra": list(self.options.extra),
        }
        path = self.folder / SETTINGS
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            replace_file(path, json.dumps(settings) + "\n")
        stored = _read_json(path)
        changed = [
            f"{key} {stored.get(key)}" for key in settings if stored.get(key) != settings[key]
        ]
        if changed:
            raise UserError(f"{path} has {', '.join(changed)}; give the same, or another --folder")

    # -- sets --------------------------------------------------------------------------------------
    def recordings(self, name: str) -> Recordings:
        """The recipe of a set."""
        return quick_set(SETS[name]) if self.options.quick else SETS[name]

    def set_folder(self, name: str) -> Path:
        return self.folder.resolve() / "sets" / self.recordings(name).name

    def make_set(self, name: str) -> RecordingSet:
        """Makes a set, or verifies it once."""
        if name not in self._verified:
            self._verified[name] = recordings_in(self.set_folder(name), self.recordings(name))
        return self._verified[name]

    def digests(self) -> dict[str, str]:
        """Name -> hash of the sets that are there."""
        digests = {}
        for name in SETS:
            path = self.set_folder(name) / "set.json"
            if path.exists():
                digests[name] = str(_read_json(path).get("digest"))
        return digests

    # -- runs --------------------------------------------------------------------------------------
    def seeds(self, experiment: Experiment) -> int:
        """Number of seeds that are planned."""
        return self.options.seeds or (1 if self.options.quick else experiment.seeds)

    def runs(self, experiment: Experiment) -> list[Run]:
        """In the order of training: seed by seed, so that the variants can be compared early.

        A pilot's two variants one after the other: runs of one core do not alternate with those of two.
        """
        variants = experiment.variants
        if self.options.pilot:
            starts = {experiment.variant(name).starts_from for name in experiment.pilot}
            variants = tuple(
                variant for variant in variants if variant.name in (*experiment.pilot, *starts)
            )
        runs = [Run(experiment, variant, 0) for variant in variants if variant.once]
        seeds = range(PILOT_SEEDS if self.options.pilot else self.seeds(experiment))
        branches = [
            Run(experiment, variant, seed)
            for seed in seeds
            for variant in variants
            if not variant.once
        ]
        if self.options.pilot:
            branches.sort(key=lambda run: variants.index(run.variant))
        return [*runs, *branches]

    def run_folder(self, run: Run) -> Path:
        return self.folder.resolve() / "runs" / run.name

    def checkpoint(self, run: Run, step: int) -> Path:
        return self.run_folder(run) / FOLDER / checkpoint_name(step)

    def score_folder(self, key: Key) -> Path:
        run = Run(
            EXPERIMENTS[key.experiment], EXPERIMENTS[key.experiment].variant(key.variant), key.seed
        )
        return self.run_folder(run) / "scores" / f"{key.on}-{checkpoint_name(key.step)}"

    def train_words(self, run: Run) -> list[str]:
        """The arguments of `evspan` that train a run."""
        experiment = run.experiment
        variant = run.variant
        steps = experiment.steps_of(variant, self.options.scale)
        scored = experiment.scored_steps(variant, self.options.scale)
        every = math.gcd(*scored) if len(scored) > 1 else max(1, steps // 5)
        ranks = (
            variant.ranks if self.options.device == "cpu" else min(variant.ranks, max(1, _gpus()))
        )
        own = {
            "seed": str(run.seed),
            "training.max_steps": str(steps),
            "training.evaluate_every": "0",
            "evaluation.at_end": "false",
            "training.log_images_every": "0",
            "training.engine": "plain",
            "training.compile": str(self.options.compile).lower(),
            "checkpoint.every": str(every),
            "checkpoint.keep": str(steps // every + STOPS if len(scored) > 1 else 1),
            "parallel.device": self.options.device,
            "parallel.ranks": str(ranks),
            "parallel.sequence": str(ranks),
        }
        if self.options.device == "cpu":
            own |= {"parallel.threads": "1", "training.num_workers": "1"}
        words: list[str] = []
        for override in (*experiment.overrides, *variant.overrides):
            words = [w for w in words if override_key(w) != override_key(override)]
            words.append(override)
        words += [f"{key}={value}" for key, value in own.items()]
        words = [w for w in words if override_key(w) not in map(override_key, self.options.extra)]
        words += self.options.extra
        words = replace_override(words, "run_dir", str(self.run_folder(run)))
        if variant.starts_from:
            base = Run(experiment, experiment.variant(variant.starts_from), 0)
            words = replace_override(words, "checkpoint.init_from", str(self.run_folder(base)))
        shards = [self.set_folder(name) / "set" for name in variant.trained_on]
        if len(shards) == 1:
            words = replace_override(words, "dataset.root", str(shards[0]))
        else:
            roots = ", ".join(f"{{root: {json.dumps(str(path))}}}" for path in shards)
            words += [f"dataset.roots=[{roots}]", "dataset.root=''"]
        return ["train", "--config-dir", str(CONF), *words]

    def train_job(self, run: Run) -> Job:
        """Trains a run to its end. It is done, too, when all that its weights are for is there."""
        if run.name in self._jobs:
            return self._jobs[run.name]
        steps = run.experiment.steps_of(run.variant, self.options.scale)
        done = self.checkpoint(run, steps) / META
        needs: tuple[Job, ...] = ()
        if run.variant.starts_from:
            base = Run(run.experiment, run.experiment.variant(run.variant.starts_from), 0)
            needs = (self.train_job(base),)

        def prepare() -> None:
            for name in run.variant.trained_on:
                self.make_set(name)

        job = Job(
            run.name,
            [*other_detectors.command(run.variant.detector), *self.train_words(run)],
            lambda: done.exists() or self._is_used_up(run),
            self.folder / "logs" / f"{run.name}.log",
            needs,
            run.variant.ranks if self.options.device == "cpu" else 1,
            prepare,
        )
        self._jobs[run.name] = job
        for need in needs:
            self._uses.setdefault(need.name, []).append(job)
        return job

    def _is_used_up(self, run: Run) -> bool:
        """Whether all that its weights are for is there: scores that are kept replace a run."""
        uses = self._uses.get(run.name, [])
        return bool(uses) and all(job.is_done() for job in uses)

    def _is_scored(self, folder: Path) -> bool:
        if folder not in self._scored and read_score(folder) is not None:
            self._scored.add(folder)
        return folder in self._scored

    def score_jobs(self, run: Run, sets: Sequence[str]) -> list[Job]:
        """Score all checkpoints of a run that count, on these sets."""
        jobs = []
        for step in run.experiment.scored_steps(run.variant, self.options.scale):
            for name in sets:
                key = Key(run.experiment.name, run.variant.name, run.seed, name, step)
                folder = self.score_folder(key)
                words = [
                    *(str(self.checkpoint(run, step)), str(self.set_folder(name) / "set")),
                    *(str(folder), "--detector", run.variant.detector),
                    *("evaluation.write_detections=true", f"parallel.device={self.options.device}"),
                ]
                if self.options.device == "cpu":
                    words.append("parallel.threads=1")
                jobs.append(
                    Job(
                        f"{run.name} step {step} on {name}",
                        [sys.executable, str(PROGRAMS / "run_score.py"), *words],
                        partial(self._is_scored, folder),
                        self.folder / "logs" / f"{run.name}.log",
                        (self.train_job(run),),
                        prepare=partial(self.make_set, name),
                    )
                )
        self._uses.setdefault(run.name, []).extend(jobs)
        return jobs

    def real_job(self, run: Run, recordings: Path) -> Job:
        """Runs a detector on recordings without boxes."""
        folder = self.run_folder(run) / "real"
        words = [str(self.run_folder(run)), str(recordings), str(folder), self.options.device]
        job = Job(
            f"{run.name} on recordings without boxes",
            [sys.executable, str(PROGRAMS / "run_real.py"), *words],
            (folder / SUMMARY).exists,
            self.folder / "logs" / f"{run.name}.log",
            (self.train_job(run),),
        )
        self._uses.setdefault(run.name, []).append(job)
        return job

    def jobs(self) -> list[Job]:
        """All of them, the most valuable first."""
        jobs: list[Job] = []
        late: list[Job] = []
        for experiment in self.experiments:
            for run in self.runs(experiment):
                jobs.append(self.train_job(run))
                jobs += self.score_jobs(run, experiment.scored_on)
                if not self.options.pilot:
                    late += self.score_jobs(run, experiment.last_scored_on)
                if self.options.real and experiment.name == "generalisation":
                    late.append(self.real_job(run, self.options.real))
        return [*jobs, *late]

    # -- results -----------------------------------------------------------------------------------
    def results(self) -> Results:
        """All scores that are there, of any number of seeds."""
        scores = {}
        real: dict[tuple[str, int], float] = {}
        for experiment in EXPERIMENTS.values():
            for variant in experiment.variants:
                for folder in sorted(
                    (self.folder / "runs" / experiment.name).glob(f"{variant.name}-*")
                ):
                    number = folder.name.removeprefix(f"{variant.name}-")
                    if not number.isdecimal():
                        continue
                    run = Run(experiment, variant, int(number))
                    for step in experiment.scored_steps(variant, self.options.scale):
                        for name in (*experiment.scored_on, *experiment.last_scored_on):
                            key = Key(experiment.name, variant.name, run.seed, name, step)
                            score = read_score(self.score_folder(key))
                            if score is not None:
                                scores[key] = score
                    per_frame = detections_per_frame(self.run_folder(run) / "real")
                    if per_frame is not None:
                        real[variant.name, run.seed] = per_frame
        pilot = _read_json(self.folder / PILOT) if (self.folder / PILOT).exists() else {}
        seconds = _read_json(self.folder / TIMES) if (self.folder / TIMES).exists() else {}
        chosen = {experiment.name for experiment in self.experiments}
        return Results(
            scores,
            scale=self.options.scale,
            planned={e.name: self.seeds(e) for e in EXPERIMENTS.values()},
            digests=self.digests(),
            pilot=pilot,
            real=real,
            hours=sum(float(s) for job, s in seconds.items() if job.split("/")[0] in chosen) / 3600,
            sets={name: self.recordings(name) for name in SETS},
        )

    def write_page(self) -> str:
        """report.md and its figures, of the experiments that were asked for."""
        return write_page(self.folder, self.experiments, self.results())


@cache
def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); remove it") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} is damaged; remove it")
    return values


def run_study(options: Options) -> int:
    """Runs what is missing. The exit code: 0 when everything that was asked for is done."""
    study = Study(options)
    study.check_settings()
    path = study.folder / TIMES

    def after(name: str, seconds: float) -> None:
        # Read anew: another command may run other experiments in the same folder.
        times = _read_json(path) if path.exists() else {}
        times[name] = round(times.get(name, 0.0) + seconds, 1)
        replace_file(path, json.dumps(times, indent=1) + "\n")

    jobs = study.jobs()
    outcome = run_jobs(
        jobs, options.jobs or _cores(options.device), hours=options.hours, after=after
    )
    if options.pilot:
        _write_pilot(study)
    print(f"\n{study.write_page()}\n{study.folder / 'report.md'}", flush=True)
    missing = sum(not job.is_done() for job in jobs)
    if missing:
        reason = "the time is over" if outcome.stopped else f"{len(outcome.failed)} failed"
        print(
            f"{missing} of {plural(len(jobs), 'job')} are not done: {reason}. "
            "The same command continues"
        )
    return int(bool(missing))


def _cores(device: str) -> int:
    return len(os.sched_getaffinity(0)) if device == "cpu" else 1


def _write_pilot(study: Study) -> None:
    """What the pilot tells of the power, dated, before the other runs."""
    results = study.results()
    stored = _read_json(study.folder / PILOT) if (study.folder / PILOT).exists() else {}
    for experiment in study.experiments:
        powers = power_of(experiment, results)
        if powers and experiment.name not in stored:
            rows = {question: asdict(power) for question, power in powers.items()}
            stored[experiment.name] = {"date": time.strftime("%Y-%m-%d"), "families": rows}
    replace_file(study.folder / PILOT, json.dumps(stored, indent=1) + "\n")


# -- the plan --------------------------------------------------------------------------------------
SCORE_S = {RESTS_TEST: 150, RESTS_LONG: 150}  # one core; others: 30
START_S = 8  # of a run


def plan_table(study: Study) -> str:
    """Runs and hours of every experiment on 2 CPU cores, as a Markdown table."""
    lines = [
        "| experiment | seeds | runs | steps x frames | train, core hours | score, core hours | "
        "hours on 2 cores |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    total = 0.0
    for experiment in study.experiments:
        runs = study.runs(experiment)
        train = sum(_train_seconds(study, run) for run in runs) / 3600
        score = sum(_score_seconds(study, run) for run in runs) / 3600
        sets = experiment.sets([run.variant for run in runs])
        hours = (train + score) / 2 + len(sets) / 60  # a set takes a minute
        total += hours
        lines.append(
            f"| {experiment.name} | {max(run.seed for run in runs) + 1} | {len(runs)} | "
            f"{round(experiment.steps * study.options.scale)} x {experiment.frames} | {train:.1f} | "
            f"{score:.1f} | {hours:.1f} |"
        )
    return "\n".join([*lines, f"\n{total:.1f} hours on 2 cores in all, in this order."])


def _train_seconds(study: Study, run: Run) -> float:
    """Core seconds."""
    steps = run.experiment.steps_of(run.variant, study.options.scale)
    frames = steps * run.experiment.frames_of(run.variant)
    return frames / run.variant.frames_per_s + START_S * run.variant.ranks


def _score_seconds(study: Study, run: Run) -> float:
    steps = len(run.experiment.scored_steps(run.variant, study.options.scale))
    sets = [*run.experiment.scored_on, *run.experiment.last_scored_on]
    return steps * sum(SCORE_S.get(name, 30) for name in sets)


# -- the command -----------------------------------------------------------------------------------
def main(argv: list[str]) -> None:
    """Runs the study; exits with 0 when everything that was asked for is done."""
    args = _parser().parse_intermixed_args(argv)
    run_command(lambda: sys.exit(_main(args)))


def _main(args: argparse.Namespace) -> int:
    options = options_from(args)
    if args.plan:
        print(plan_table(Study(options)))
        return 0
    if args.report:
        study = Study(options)
        if not (study.folder / SETTINGS).exists():
            raise UserError(f"{study.folder} has no runs to report; leave out --report")
        study.check_settings()
        print(f"{study.write_page()}\n{study.folder / 'report.md'}")
        return 0
    return run_study(options)


def options_from(args: argparse.Namespace) -> Options:
    """Raises UserError where an option makes no sense."""
    device = args.device
    if device == "auto":
        device = "gpu" if _gpus() else "cpu"
    folder = args.folder or Path("bench") / ("study-quick" if args.quick else "study")
    default_scale = QUICK_SCALE if args.quick else 1.0
    return Options(
        folder=folder,
        only=tuple(args.only.split(",")) if args.only else (),
        seeds=args.seeds,
        scale=default_scale if args.scale is None else args.scale,
        quick=args.quick,
        device=device,
        jobs=args.jobs,
        hours=args.hours,
        pilot=args.pilot,
        real=args.real,
        compile=args.compile,
        extra=tuple(args.overrides),
    )


def _parser() -> argparse.ArgumentParser:
    experiments = "\n".join(f"  {e.name:16}{e.title}" for e in EXPERIMENTS.values())
    parser = Parser(
        "learn.py",
        description=DESCRIPTION,
        epilog=EXAMPLES.format(experiments=experiments),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("overrides", nargs="*", metavar="KEY=VALUE", help="overrides for every training run")
    add("--folder", type=Path, help="everything is written here (default: bench/study)")
    add("--only", metavar="A,B", help="experiments (default: all)")
    add(
        "--seeds", type=int, default=0, metavar="N", help="of every variant (default: experiment's)"
    )
    add("--scale", type=float, metavar="X", help="factor on the steps of all runs (default: 1)")
    add("--device", choices=["auto", "cpu", "gpu"], default="auto", help="default: auto")
    add("--jobs", type=int, default=0, metavar="N", help="cores at once (default: all; GPU: 1)")
    add("--hours", type=float, default=0.0, metavar="H", help="then save and report (0: no limit)")
    add(
        "--pilot",
        action="store_true",
        help=f"{PILOT_SEEDS} seeds of two variants: how many resolve",
    )
    add("--real", type=Path, metavar="DIR", help="recordings without boxes, for false alarms")
    add("--compile", action="store_true", help="compile training: a third faster on a CPU")
    add("--quick", action="store_true", help="sets of 2 s, a few steps, one seed")
    add("--plan", action="store_true", help="print runs and hours, start nothing")
    add("--report", action="store_true", help="write the page from what is there, start nothing")
    return parser
