"""Runs the learning study: makes recordings, trains every run of the plan, writes the report."""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from evspan.conf.errors import UserError
from evspan.launch.cli.command import Parser, run_command
from evspan.launch.sweep.registry import SWEEP, Run, read_runs
from learning import mixed_lanes
from learning.plan import CONF, DEFAULT_VARIANTS, LENGTHS, RUNS, VARIANTS, Plan
from learning.recordings import FULL, QUICK, Recordings, RecordingSet, recordings_in
from learning.report import COMPARED, finished_runs, measured, write_report

DESCRIPTION = f"""Makes a fixed set of simulated recordings with many small, crossing and stopping objects (once;
verified by hash at every use). Trains variants with equal budgets and seeds on it, the baseline with
several sequence lengths at equal frames and steps, and the longest sequences with gradients cut
after several BPTT lengths. Writes FOLDER/{FULL.name}/report.md (AP, AP of small and of still
objects, with intervals over seeds), report.json and curves.svg. The same command continues with
what is not finished; more seeds, variants or lengths add runs."""
EXAMPLES = """variants:
{variants}

examples:
  python tests/benchmarks/learn.py --quick               # a small version
  python tests/benchmarks/learn.py --folder bench --seeds 3     # hours on 2 cores
  python tests/benchmarks/learn.py --variants baseline,attention --lengths none --bptt none
  python tests/benchmarks/learn.py --report              # starts nothing
  python tests/benchmarks/learn.py --variants baseline,attention cluster=gpu_nodes

KEY=VALUE is passed to every run; cluster=gpu_nodes makes the runs a SLURM array."""


@dataclass(frozen=True)
class Defaults:
    """What the options are when they are not given."""

    recordings: Recordings
    seeds: int
    steps: int
    variants: tuple[str, ...]
    lengths: tuple[int, ...]
    bptt_lengths: tuple[int, ...]


FULL_STUDY = Defaults(FULL, 3, 600, DEFAULT_VARIANTS, LENGTHS, LENGTHS)
QUICK_STUDY = Defaults(QUICK, 2, 60, ("baseline", "size_aware_attention"), (2, 10), ())


@dataclass(frozen=True)
class Options:
    """The command line. report_only: start no run."""

    plan: Plan
    recordings: Recordings
    report_only: bool


def main(argv: list[str]) -> None:
    """Runs the study and exits with its code: 0 when every run of the plan is finished."""
    args = _parser().parse_intermixed_args(argv)
    run_command(lambda: sys.exit(run_study(options_from(args))))


def options_from(args: argparse.Namespace) -> Options:
    """Raises UserError where an option makes no sense."""
    defaults = QUICK_STUDY if args.quick else FULL_STUDY
    plan = Plan(
        folder=args.folder / defaults.recordings.name,
        seeds=_or_default(args.seeds, defaults.seeds),
        steps=_or_default(args.steps, defaults.steps),
        frames=args.frames,
        evaluations=args.evaluations,
        variants=tuple(dict.fromkeys(_or_default(args.variants, defaults.variants))),
        lengths=_lengths("--lengths", args.lengths, defaults.lengths),
        bptt_lengths=_lengths("--bptt", args.bptt, defaults.bptt_lengths),
        extra=tuple(args.overrides),
    )
    return Options(plan, defaults.recordings, args.report)


def _or_default(value, default):
    return default if value is None else value


def _lengths(option: str, words: list[str] | None, default: tuple[int, ...]) -> tuple[int, ...]:
    if words is None:
        return default
    for word in words:
        if not word.isdigit() or int(word) < 1:
            raise UserError(
                f"{option}: {word!r} is not a number of frames; give for example 2,10, or none"
            )
    return tuple(dict.fromkeys(int(word) for word in words))


def run_study(options: Options) -> int:
    """The exit code: 0 when every run is finished, or submitted and not waited for."""
    plan = options.plan
    runs_folder = plan.folder / RUNS
    if options.report_only and not (runs_folder / SWEEP).exists():
        raise UserError(f"{runs_folder} has no runs to report; leave out --report to start them")
    recordings = recordings_in(plan.folder, options.recordings)
    code = 0 if options.report_only else _train(plan, recordings)
    runs, note = read_runs(runs_folder)
    if not finished_runs(plan, runs):
        print(f"no run is finished yet: evspan status {runs_folder}")
        return code
    if not options.report_only:
        _evaluate_still_objects(plan, recordings, runs)
    text = write_report(plan, recordings, runs)
    print(f"\n{text}\n{plan.folder / 'report.md'}, report.json, curves.svg", flush=True)
    if note:
        print(f"note: {note}; states are read from the runs' files")
    return code


def _train(plan: Plan, recordings: RecordingSet) -> int:
    """Trains every run that is not finished, on the cluster that the overrides choose."""
    from evspan.conf.compose import replace_override
    from evspan.conf.hydra_adapter import Expansion
    from evspan.launch.local import sequential
    from evspan.launch.sweep.submit import submit_sweep

    clusters = [override for override in plan.extra if override.startswith("cluster=")]
    common = [] if clusters else ["cluster=local"]
    common = replace_override(common, "dataset.root", str(recordings.shards))
    common = replace_override(common, "run_dir", str(plan.folder / RUNS))
    if clusters not in ([], ["cluster=local"]) and any(map(mixed_lanes.is_mixed, plan.variants)):
        raise UserError(
            f"{clusters[0]}: variants that mix lanes run on this machine only. Choose others with "
            "--variants, or leave out cluster="
        )
    sequential.train_command = mixed_lanes.train_command
    combinations = [[*overrides, *common] for overrides in plan.all_runs()]
    return submit_sweep(Expansion(combinations, plan.keys()), ["--config-dir", str(CONF)])


def _evaluate_still_objects(plan: Plan, recordings: RecordingSet, runs: Sequence[Run]) -> None:
    """Scores still and moving objects apart, which the evaluations during training do not."""
    overrides = ["evaluation.write_detections=false", f"dataset.root={recordings.shards}"]
    for override in plan.extra:
        if override.startswith(("evaluation.", "parallel.threads=")):
            overrides.append(override)
    for run in finished_runs(plan, runs):
        if set(COMPARED) <= measured(run).keys():
            continue
        command = [sys.executable, "-m", "evspan.launch", "evaluate", str(run.folder)]
        if mixed_lanes.is_mixed(run.overrides["experiment"]):
            command = [sys.executable, mixed_lanes.__file__, "evaluate", str(run.folder)]
        code = subprocess.run([*command, *overrides], stdout=subprocess.DEVNULL).returncode
        if code:
            print(
                f"{run.folder}: evspan evaluate ended with exit code {code}; "
                "the report has no still objects of this run",
                file=sys.stderr,
            )


def _parser() -> argparse.ArgumentParser:
    variants = "\n".join(f"  {name:32}{change}" for name, change in VARIANTS.items())
    parser = Parser(
        "learn.py",
        description=DESCRIPTION,
        epilog=EXAMPLES.format(variants=variants),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    lengths = ",".join(map(str, LENGTHS))
    add = parser.add_argument
    add("overrides", nargs="*", metavar="KEY=VALUE", help="overrides for every run")
    add("--folder", type=Path, default=Path("bench"), help="output folder (default: bench)")
    add("--seeds", type=int, metavar="N", help="seeds of every variant and length (default: 3)")
    add("--steps", type=int, metavar="N", help="optimizer updates of a run (default: 600)")
    add("--frames", type=int, default=40, metavar="N", help="frames per step (default: 40)")
    add("--evaluations", type=int, default=4, metavar="N", help="per run (default: 4)")
    add("--variants", type=_words, metavar="A,B", help="or none (default: the first six)")
    add("--lengths", type=_words, metavar="N,M", help=f"or none (default: {lengths})")
    add("--bptt", type=_words, metavar="N,M", help=f"BPTT lengths, or none (default: {lengths})")
    add("--quick", action="store_true", help="a small set, 2 seeds, 60 steps, few variants")
    add("--report", action="store_true", help="report what is finished, start nothing")
    return parser


def _words(text: str) -> list[str]:
    return [] if text == "none" else text.split(",")
