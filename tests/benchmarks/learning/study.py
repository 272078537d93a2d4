"""`evspan bench learn`: does attention pay, and do long sequences? Arms of equal budget and seeds on a fixed simulated set."""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from evspan.conf.errors import UserError
from evspan.launch.cli.command import Parser, fail, run_command
from evspan.launch.sweep.registry import SWEEP, Run, read_runs, split_overrides
from learning.recordings import FULL, QUICK, Made, recordings_in

RUNS = "runs"  # of a benchmark's folder: the sweep
ARMS = {  # tests/benchmarks/learning/conf/experiment/bench
    "baseline": "baseline",
    "size_aware": "+ size-aware loss",
    "attention": "+ attention",
    "size_aware_attention": "+ size-aware loss + attention",
    "attention_published": "+ attention with the published start",
    "attention_published_mixed": "+ attention as published: its start, and a memory that lanes share",
    # What may be the reason of a gain or loss, one thing at a time.
    "attention_mixed": "+ attention with a memory that lanes share",
    "attention_fast_gates": "+ attention whose gates learn ten times as fast",
    "size_aware_attention_published": "+ size-aware loss + attention with the published start",
    "channel": "+ attention, channel part alone",
    "spatial": "+ attention, spatial and channel parts",
    "spatial_published": "+ attention, spatial and channel parts, published start",
    "temporal": "+ attention, temporal and channel parts",
    "temporal_published": "+ attention, temporal and channel parts, published start",
}
USUAL_ARMS = list(ARMS)[:6]
LENGTHS = (2, 5, 10, 20, 40)
ARM_LENGTH = 5  # frames a chunk in all arms
OWN_KEYS = {  # key -> the option that sets it
    "experiment": "--arms",
    "seed": "--seeds",
    "training.max_steps": "--steps",
    "training.sequence_length": "--lengths",
    "training.bptt_frames": "--horizons",
    "training.batch_size": "--frames",
    "training.evaluate_every": "--evaluations",
    "dataset.root": "--folder",
    "run_dir": "--folder",
}

HELP = """evspan bench: does it learn?

  evspan bench learn ...      attention, size-aware loss and sequence length, on a fixed simulated set, with intervals over seeds

examples
  evspan bench learn --quick
  evspan bench learn --help"""
DESCRIPTION = f"""Makes a fixed set of simulated recordings with many small, crossing and stopping objects (once; verified by hash
at every use), trains arms of equal budget and seeds on it, the baseline with sequences of several lengths at equal frames
and steps, and with gradients cut after as many frames in the longest ones. Then FOLDER/{FULL.name}/report.md (AP, AP of
small objects, of still ones where evaluation tells, with intervals over seeds), report.json and curves.svg. The same
command goes on with what is not done; more seeds, arms or lengths add runs."""
EXAMPLES = """arms:
{}

examples:
  evspan bench learn --quick                                     # a small share, to see that it works
  evspan bench learn --folder bench --seeds 3                    # hours on 2 cores
  evspan bench learn --arms baseline,attention,attention_published --lengths none --steps 400
  evspan bench learn --report                                    # what is done so far; starts nothing
  evspan bench learn --seeds 5 cluster=gpu_nodes cluster.partition=gpu     # as an array of SLURM; other keys go to every run"""


@dataclass(frozen=True)
class Plan:
    """What is asked for. frames: of a step, all lanes together. extra: overrides for every run."""

    folder: Path  # of this version of the set
    seeds: int
    steps: int
    frames: int
    evaluations: int
    arms: tuple[str, ...]
    lengths: tuple[int, ...]
    horizons: tuple[int, ...]
    extra: tuple[str, ...]

    def keys(self) -> list[str]:
        """Of the overrides that tell runs apart."""
        extra = [
            key
            for key in (o.lstrip("+").partition("=")[0] for o in self.extra)
            if key.partition(".")[0] != "cluster"
        ]
        return [
            "experiment",
            "training.sequence_length",
            "training.batch_size",
            "training.bptt_frames",
            "training.max_steps",
            "seed",
            *extra,
        ]

    def arm(self, name: str, seed: int) -> list[str]:
        return self._run(f"bench/{name}", ARM_LENGTH, seed)

    def length(self, frames: int, seed: int) -> list[str]:
        return self._run("bench/length", frames, seed)

    def horizon(self, frames: int, seed: int) -> list[str]:
        """In the longest sequences; where all of one counts, it is the run of that length."""
        longest = LENGTHS[-1]
        cut = [f"training.bptt_frames={frames}"] if frames < longest else []
        return [*self._run("bench/length", longest, seed), *cut]

    def _run(self, experiment: str, length: int, seed: int) -> list[str]:
        """Its overrides. As many lanes as make `frames` of them: frames seen and steps are the same for every length."""
        every = max(1, self.steps // self.evaluations)
        return [
            f"experiment={experiment}",
            f"training.sequence_length={length}",
            f"training.batch_size={self.frames // length}",
            f"training.max_steps={self.steps}",
            f"seed={seed}",
            f"training.evaluate_every={every}",
            *self.extra,
        ]

    def all_runs(self) -> list[list[str]]:
        """Seed by seed, so that what is done so far compares."""
        runs = [
            overrides
            for seed in range(self.seeds)
            for overrides in (
                *(self.arm(name, seed) for name in self.arms),
                *(self.length(n, seed) for n in self.lengths),
                *(self.horizon(n, seed) for n in self.horizons),
            )
        ]
        return [
            list(run) for run in dict.fromkeys(map(tuple, runs))
        ]  # the longest horizon is a length

    def found(self, runs: Sequence[Run], overrides: Sequence[str]) -> Run | None:
        """The run of these overrides."""
        keys = self.keys()
        wanted = {key: value for key, value in split_overrides(overrides).items() if key in keys}
        return next((run for run in runs if run.overrides == wanted), None)


def main(argv: list[str]) -> None:
    if argv[:1] == ["learn"]:
        learn(argv[1:])
    elif not argv or {"-h", "--help"} & set(argv):
        print(HELP)
    else:
        fail(f"there is no benchmark {argv[0]!r}; there is: evspan bench learn")


def learn(argv: list[str]) -> None:
    given, code = _parser().parse_intermixed_args(argv), 0

    def run() -> None:
        nonlocal code
        code = _learn(given)

    run_command(run)
    sys.exit(code)


def _parser() -> argparse.ArgumentParser:
    arms = "\n".join(f"  {name:32}{words}" for name, words in ARMS.items())
    parser = Parser(
        "evspan bench learn",
        description=DESCRIPTION,
        epilog=EXAMPLES.format(arms),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="for every run; where they run: cluster=NAME (local)",
    )
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("bench"),
        help="set, runs and report go there (default: bench)",
    )
    parser.add_argument(
        "--seeds", type=int, metavar="N", help="of every arm and length (default: 3)"
    )
    parser.add_argument(
        "--steps", type=int, metavar="N", help="optimizer updates of every run (default: 600)"
    )
    parser.add_argument(
        "--frames",
        type=int,
        default=40,
        metavar="N",
        help="of a step, all lanes together (default: 40)",
    )
    parser.add_argument(
        "--evaluations",
        type=int,
        default=4,
        metavar="N",
        help="of every run, evenly spaced (default: 4)",
    )
    parser.add_argument(
        "--arms", type=_words, metavar="A,B,...", help="or none (default: the first six)"
    )
    parser.add_argument(
        "--lengths",
        type=_words,
        metavar="N,M,...",
        help=f"frames of a sequence, or none (default: {','.join(map(str, LENGTHS))})",
    )
    parser.add_argument(
        "--horizons",
        type=_words,
        metavar="N,M,...",
        help=f"frames that gradients flow back through in sequences of {LENGTHS[-1]}, or none (default: "
        f"{','.join(map(str, LENGTHS))})",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a small set, 2 seeds, 60 steps, arms baseline,size_aware_attention, lengths 2,10, no horizons",
    )
    parser.add_argument("--report", action="store_true", help="only tell what is done so far")
    return parser


def _words(text: str) -> list[str]:
    return [] if text == "none" else text.split(",")


def planned(given: argparse.Namespace) -> Plan:
    """
    Raises:
        UserError: an option makes no sense.
    """
    quick = given.quick
    arms = (
        given.arms
        if given.arms is not None
        else ["baseline", "size_aware_attention"]
        if quick
        else USUAL_ARMS
    )
    asked = (
        given.lengths
        if given.lengths is not None
        else ["2", "10"]
        if quick
        else list(map(str, LENGTHS))
    )
    back = (
        given.horizons if given.horizons is not None else [] if quick else list(map(str, LENGTHS))
    )
    seeds = given.seeds if given.seeds is not None else 2 if quick else 3
    steps = given.steps if given.steps is not None else 60 if quick else 600
    for name, value in (
        ("seeds", seeds),
        ("steps", steps),
        ("frames", given.frames),
        ("evaluations", given.evaluations),
    ):
        if value < 1:
            raise UserError(f"--{name} is {value}; give 1 or more")
    if unknown := [name for name in arms if name not in ARMS]:
        raise UserError(
            f"--arms: there is no arm {unknown[0]!r}; there are: {', '.join(ARMS)}, or none"
        )
    for option, words in (("lengths", asked), ("horizons", back)):
        if wrong := [n for n in words if not n.isdigit() or int(n) < 1]:
            raise UserError(
                f"--{option}: {wrong[0]!r} is no number of frames; give some such as 2,10, or none"
            )
    lengths, horizons = tuple(map(int, asked)), tuple(map(int, back))
    if horizons and max(horizons) > LENGTHS[-1]:
        raise UserError(
            f"--horizons: {max(horizons)} is more than the {LENGTHS[-1]} frames of a sequence; give fewer"
        )
    trained = (*lengths, *([ARM_LENGTH] if arms else []), *([LENGTHS[-1]] if horizons else []))
    if uneven := [n for n in trained if given.frames % n]:
        raise UserError(
            f"--frames {given.frames}: a step of so many frames is no whole number of sequences of {uneven[0]}; "
            "give a multiple of all lengths"
        )
    if not (arms or lengths or horizons):
        raise UserError("--arms none --lengths none --horizons none leaves nothing to run")
    for override in given.overrides:
        key = override.lstrip("+").partition("=")[0]
        if "=" not in override:
            raise UserError(f"{override!r} is no KEY=VALUE; evspan bench learn --help shows how")
        if key in OWN_KEYS:
            raise UserError(f"{key} is the benchmark's own; say it by {OWN_KEYS[key]}")
    folder = given.folder / (QUICK if quick else FULL).name
    return Plan(
        folder,
        seeds,
        steps,
        given.frames,
        given.evaluations,
        tuple(dict.fromkeys(arms)),
        tuple(dict.fromkeys(lengths)),
        tuple(dict.fromkeys(horizons)),
        tuple(given.overrides),
    )


def _learn(given: argparse.Namespace) -> int:
    from learning.report import finished, write_report

    plan = planned(given)
    if given.report and not (plan.folder / RUNS / SWEEP).exists():
        raise UserError(
            f"{plan.folder / RUNS} has no runs to tell of; without --report they are started"
        )
    made, code = recordings_in(plan.folder, QUICK if given.quick else FULL), 0
    if not given.report:
        code = _train(plan, made)
    runs, note = read_runs(plan.folder / RUNS)
    if not finished(plan, runs):
        print(f"none of these runs is done yet: evspan status {plan.folder / RUNS}")
        return code
    if not given.report:
        _break_down(plan, made, runs)
    write_report(plan, made, runs)
    if note:
        print(f"note: {note}; states are what the runs' files tell")
    return code


def _break_down(plan: Plan, made: Made, runs: Sequence[Run]) -> None:
    """Still and moving objects apart, which training's own evaluations do not tell: seconds for each run that is done."""
    from evspan.conf.compose import replaced
    from learning.report import COMPARED, finished, measured

    alike = [
        o for o in plan.extra if o.startswith(("evaluation.", "parallel.threads="))
    ]  # as training evaluated
    arguments = replaced(
        [*alike, "evaluation.write_detections=false"], "dataset.root", str(made.shards)
    )
    for run in finished(plan, runs):
        if set(COMPARED) - measured(run).keys():
            words = ["evaluate", *replaced(arguments, "checkpoint", str(run.folder))]
            if code := subprocess.run(
                [sys.executable, "-m", "evspan.launch", *words], stdout=subprocess.DEVNULL
            ).returncode:
                print(
                    f"{run.folder}: evspan evaluate ended with exit code {code}; nothing is told of its still objects",
                    file=sys.stderr,
                )


def _train(plan: Plan, made: Made) -> int:
    """Every run that is not done, where cluster= says; the exit code, as of `evspan sweep`."""
    from evspan.conf.compose import replaced
    from evspan.launch.sweep.submit import place_sweep

    where = [] if any(o.startswith("cluster=") for o in plan.extra) else ["cluster=local"]
    common = replaced(
        replaced(where, "dataset.root", str(made.shards)), "run_dir", str(plan.folder / RUNS)
    )
    return place_sweep([], [[*overrides, *common] for overrides in plan.all_runs()], plan.keys())
