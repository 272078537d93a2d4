"""Measures how a detector trained on one simulated domain does on others, by augmentation.

    .venv/bin/python tests/benchmarks/generalisation.py [--folder DIR] [--steps N] [--seeds N]
        [--trained-on DOMAIN] [--domains A,B,...] [--presets none,standard,strong] [KEY=VALUE ...]

Simulates recordings of each domain (`evspan simulate --domain`), trains the baseline of the
learning study on the training recordings of one, once for each preset (`augmentation=PRESET`) and
seed, and evaluates every run on the held-out recordings of all domains. The presets of a seed have
the same weights at the start and read the same frames, so their differences are paired. Writes
DIR/report.md and report.json: AP in points with 95 % intervals over the seeds. The same command
continues with what is not finished; more seeds, presets or domains add runs. KEY=VALUE is passed to
every run. --report: starts nothing.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from evspan.conf.compose import replace_override
from evspan.conf.errors import UserError
from evspan.conf.text import plural
from evspan.data_prep.simulator.domains import DOMAINS
from evspan.launch.cli.command import Parser, run_command
from learning.intervals import Interval, interval, paired
from learning.plan import CONF

PLAN = "plan.json"
METRICS = {"ap": "AP", "ap50": "AP50"}
SCENE = ["--width", "256", "--height", "192", "--objects", "3,6", "--scales", "1,2", "--seed", "1"]
PREPARE = ["dataset=simulated", "frames.downsample=2"]


@dataclass(frozen=True)
class Setting:
    """What all runs of a folder have in common."""

    trained_on: str
    steps: int
    train: int  # recordings
    val: int
    seconds: float
    overrides: list[str]


@dataclass(frozen=True)
class Study:
    """The runs: every preset with seeds 0, 1, ... The first preset is what others are compared to."""

    folder: Path
    setting: Setting
    seeds: int
    presets: list[str]
    domains: list[str]  # evaluated

    def run(self, preset: str, seed: int) -> Path:
        """The folder of a run."""
        return self.folder / "runs" / f"{preset}-{seed}"

    def shards(self, domain: str) -> Path:
        """The shards of a domain."""
        return self.folder / "domains" / domain / "shards"


def main(argv: list[str]) -> None:
    """Runs the study."""
    args = _parser().parse_intermixed_args(argv)
    run_command(lambda: run_study(study_from(args), report_only=args.report))


def study_from(args: argparse.Namespace) -> Study:
    """Raises UserError where an option makes no sense."""
    if min(args.steps, args.seeds, args.train, args.val) < 1:
        raise UserError("--steps, --seeds, --train and --val: give 1 or more")
    domains = list(dict.fromkeys([args.trained_on, *args.domains.split(",")]))
    unknown = [domain for domain in domains if domain not in DOMAINS]
    if unknown:
        raise UserError(f"unknown domains {unknown}; choose from {', '.join(DOMAINS)}")
    setting = Setting(
        trained_on=args.trained_on,
        steps=args.steps,
        train=args.train,
        val=args.val,
        seconds=args.seconds,
        overrides=args.overrides,
    )
    return Study(args.folder, setting, args.seeds, args.presets.split(","), domains)


def run_study(study: Study, *, report_only: bool) -> None:
    """Makes what is missing, and writes the report."""
    _check_setting(study)
    if not report_only:
        for domain in study.domains:
            make_domain(study, domain)
        for seed in range(study.seeds):
            for preset in study.presets:
                train(study, preset, seed)
                for domain in study.domains:
                    evaluate(study, preset, seed, domain)
    print(write_report(study))


def make_domain(study: Study, domain: str) -> None:
    """Simulates and prepares the recordings of a domain; what is there stays."""
    setting = study.setting
    raw = study.shards(domain).parent / "raw"
    counts = f"val={setting.val}"
    if domain == setting.trained_on:
        counts = f"train={setting.train},{counts}"
    seconds = f"{setting.seconds:g}"
    _evspan(
        *("simulate", str(raw), "--domain", domain, "--recordings", counts),
        *("--seconds", seconds, "--processes", "1", *SCENE),
    )
    paths: list[str] = replace_override(PREPARE, "source", str(raw))
    _evspan("prep", *replace_override(paths, "output", str(study.shards(domain))), "processes=1")


def train(study: Study, preset: str, seed: int) -> None:
    """Trains a run to its end, from its newest checkpoint."""
    run = study.run(preset, seed)
    done = run / "trained"
    if done.exists():
        return
    overrides = [
        "experiment=bench/baseline",
        f"augmentation={preset}",
        f"training.max_steps={study.setting.steps}",
        "training.evaluate_every=0",
        "training.log_images_every=0",
        f"seed={seed}",
        *study.setting.overrides,
    ]
    overrides = replace_override(overrides, "run_dir", str(run))
    root = study.shards(study.setting.trained_on)
    _evspan(
        "train", "--config-dir", str(CONF), *replace_override(overrides, "dataset.root", str(root))
    )
    done.touch()


def evaluate(study: Study, preset: str, seed: int, domain: str) -> None:
    """Evaluates a run on the held-out recordings of a domain."""
    run = study.run(preset, seed)
    output = _results(run, domain)
    if (output / "metrics.json").exists():
        return
    overrides = ["evaluation.write_detections=false", "evaluation.split=val"]
    for override in study.setting.overrides:
        if override.startswith(("evaluation.", "parallel.threads=")):
            overrides.append(override)
    overrides = replace_override(overrides, "output", str(output))
    _evspan(
        "evaluate",
        str(run),
        *replace_override(overrides, "dataset.root", str(study.shards(domain))),
    )


# -- the report ------------------------------------------------------------------------------------
def write_report(study: Study) -> str:
    """Writes report.md and report.json from the evaluations that there are; returns the text."""
    setting = study.setting
    lines = [
        f"Trained on {setting.trained_on} for {setting.steps} steps, {_seeds_text(study)}; "
        "held-out recordings of each domain; mean and 95 % interval over the seeds, points of 100."
    ]
    report: dict[str, Any] = {"setting": asdict(setting), "values": {}}
    for metric, heading in METRICS.items():
        values = {
            (p, d): _values(study, p, d, metric) for p in study.presets for d in study.domains
        }
        report["values"][metric] = {f"{p} on {d}": v for (p, d), v in values.items()}
        lines += ["", _row([heading, *study.domains]), _row(["---"] * (1 + len(study.domains)))]
        for preset in study.presets:
            cells = [_cell(values[preset, domain]) for domain in study.domains]
            lines.append(_row([preset, *cells]))
        base = study.presets[0]
        for preset in study.presets[1:]:
            cells = []
            for domain in study.domains:
                difference = paired(values[preset, domain], values[base, domain])
                cells.append(_difference(difference))
            lines.append(_row([f"{preset} less {base}, paired", *cells]))
    text = "\n".join(lines)
    study.folder.mkdir(parents=True, exist_ok=True)
    (study.folder / "report.md").write_text(text + "\n")
    (study.folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    return text


def _seeds_text(study: Study) -> str:
    """The seeds that are finished: with an evaluation of every preset in every domain."""
    finished = set(range(study.seeds))
    metric = next(iter(METRICS))
    for preset in study.presets:
        for domain in study.domains:
            finished &= _values(study, preset, domain, metric).keys()
    if len(finished) == study.seeds:
        return plural(study.seeds, "seed")
    return f"{len(finished)} of {plural(study.seeds, 'seed')} finished, some cells with more"


def _values(study: Study, preset: str, domain: str, metric: str) -> dict[int, float]:
    """Seed -> value, of the evaluations that there are."""
    values = {}
    for seed in range(study.seeds):
        path = _results(study.run(preset, seed), domain) / "metrics.json"
        if path.exists():
            value = json.loads(path.read_text())[metric]
            if value is not None:
                values[seed] = float(value)
    return values


def _cell(values: dict[int, float]) -> str:
    return interval(list(values.values())).points() if values else "-"


def _difference(difference: Interval | None) -> str:
    return difference.points(signed=True) if difference else "-"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _results(run: Path, domain: str) -> Path:
    return run / f"on-{domain}"


def _check_setting(study: Study) -> None:
    """Raises UserError where the folder was begun with another setting."""
    path = study.folder / PLAN
    setting = asdict(study.setting)
    if not path.exists():
        study.folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(setting, indent=1) + "\n")
    stored = json.loads(path.read_text())
    changed = [f"{key} {stored.get(key)}" for key in setting if stored.get(key) != setting[key]]
    if changed:
        raise UserError(f"{path} has {', '.join(changed)}; give the same, or another --folder")


def _evspan(*arguments: str) -> None:
    print(f"== evspan {' '.join(arguments[:2])}", flush=True)
    result = subprocess.run(
        [sys.executable, "-m", "evspan.launch", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if result.returncode:
        print(result.stdout, file=sys.stderr)
        raise UserError(f"evspan {arguments[0]} ended with exit code {result.returncode}")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        "generalisation.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("overrides", nargs="*", metavar="KEY=VALUE")
    add("--folder", type=Path, default=Path("bench/generalisation"))
    add("--trained-on", default="default", metavar="DOMAIN")
    add("--domains", default="night,driving,fast", metavar="A,B", help="evaluated too")
    add(
        "--presets", default="none,standard,strong", metavar="A,B", help="the first is the baseline"
    )
    add("--seeds", type=int, default=3, metavar="N")
    add("--steps", type=int, default=600, metavar="N", help="optimizer updates of a run")
    add("--train", type=int, default=24, metavar="N", help="recordings to train on")
    add("--val", type=int, default=6, metavar="N", help="held-out recordings of each domain")
    add("--seconds", type=float, default=10.0, metavar="S", help="length of a recording")
    add("--report", action="store_true", help="report what is finished, start nothing")
    return parser


if __name__ == "__main__":
    main(sys.argv[1:])
