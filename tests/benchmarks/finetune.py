"""Fine-tuning against training from scratch at equal steps, over seeds, on simulated sets.

    python tests/benchmarks/finetune.py --folder bench/finetune --seeds 3 --steps 300

Trains one detector on a set of simulated recordings (the source), then, for every seed, detectors on
a small set of another domain (other noise, contrast, sizes and two of the three classes): from
scratch, from the source's weights, and from them with a frozen first stage and a slower backbone.
A seed draws the same frames and augmentations in every variant, so differences are paired. Writes
FOLDER/report.md. It may be interrupted: the same command continues with what is not finished.
"""

import argparse
import json
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from evspan.conf.errors import UserError
from evspan.launch.cli.command import Parser, run_command
from learning.intervals import CONFIDENCE, interval, paired
from learning.recordings import CONF

SIZE = ["--width", "256", "--height", "192"]
SOURCE = [*SIZE, "--objects", "3,6", "--scales", "1,2", "--noise-hz", "0.1", "--seed", "1"]
TARGET = [
    *(*SIZE, "--objects", "2,4", "--scales", "0.7,1.5", "--noise-hz", "1"),
    *("--contrast-threshold", "0.3", "--seed", "2"),
]
SOURCE_CLASSES = ["dataset=simulated"]
TARGET_CLASSES = ["dataset.classes=[box,bar]", "dataset.labels.class_map={1:0,2:1}"]
SCRATCH = "from scratch"
VARIANTS = {  # name -> overrides; SOURCE_RUN stands for the run on the source
    SCRATCH: [],
    "fine-tuned": ["checkpoint.init_from={source}"],
    "fine-tuned, backbone x 0.1": [
        "checkpoint.init_from={source}",
        'optimizer.lr_multipliers={{"backbone.*": 0.1}}',
    ],
    "fine-tuned, first stage frozen": [
        "checkpoint.init_from={source}",
        'training.freeze=["backbone.stages.0.*"]',
    ],
}
MEASURES = {"ap": "AP", "ap50": "AP50"}


@dataclass(frozen=True)
class Study:
    """What is trained. steps, source_steps: of a run on the target and of the one on the source."""

    folder: Path
    seeds: int
    steps: int
    source_steps: int
    recordings: int
    source_recordings: int
    extra: tuple[str, ...]

    def run_folder(self, variant: str, seed: int) -> Path:
        """Of a run on the target."""
        name = "".join(c if c.isalnum() else "-" for c in variant)
        return self.folder / "runs" / f"{name}-{seed}"


def main(argv: list[str]) -> None:
    """Runs what is missing and writes the report."""
    run_command(lambda: run_study(options_from(argv)))


def options_from(argv: list[str]) -> Study:
    """Raises UserError where an option makes no sense."""
    parser = Parser(
        prog="finetune.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--folder", type=Path, default=Path("bench/finetune"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300, help="of every run on the target")
    parser.add_argument("--source-steps", type=int, default=1200)
    parser.add_argument("--recordings", type=int, default=4, help="training recordings, target")
    parser.add_argument("--source-recordings", type=int, default=24)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="for every run")
    args = parser.parse_intermixed_args(argv)
    counts = ("seeds", "steps", "source_steps", "recordings", "source_recordings")
    for name in counts:
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}; give 1 or more")
    return Study(
        folder=args.folder,
        seeds=args.seeds,
        steps=args.steps,
        source_steps=args.source_steps,
        recordings=args.recordings,
        source_recordings=args.source_recordings,
        extra=tuple(args.overrides),
    )


def run_study(study: Study) -> None:
    """Makes the sets, trains every run that is not finished, writes the report."""
    check_same_study(study)
    source_set = make_set(study, "source", SOURCE, SOURCE_CLASSES, study.source_recordings)
    target_set = make_set(study, "target", TARGET, TARGET_CLASSES, study.recordings)
    source = study.folder / "runs" / "source"
    train(study, source, source_set, 0, study.source_steps, [])
    for seed in range(study.seeds):
        for variant, overrides in VARIANTS.items():
            words = [override.format(source=source) for override in overrides]
            folder = study.run_folder(variant, seed)
            train(
                study, folder, target_set, seed, study.steps, [*words, "model.head.num_classes=2"]
            )
            write_report(study)
    print(write_report(study))


def check_same_study(study: Study) -> None:
    """Refuses a folder of runs with other settings; more seeds are welcome."""
    settings = {
        "steps": study.steps,
        "source_steps": study.source_steps,
        "recordings": study.recordings,
        "source_recordings": study.source_recordings,
        "extra": list(study.extra),
    }
    path = study.folder / "study.json"
    if path.exists() and json.loads(path.read_text()) != settings:
        raise UserError(f"{path} has other settings; give another --folder, or those")
    study.folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings) + "\n")


def make_set(study: Study, name: str, scene: list[str], classes: list[str], number: int) -> Path:
    """The shards of a set, made once."""
    shards = study.folder / name
    if shards.exists():
        return shards
    raw = study.folder / f"{name}-raw"
    writing = study.folder / f"{name}-writing"
    shutil.rmtree(writing, ignore_errors=True)
    splits = f"train={number},val={max(2, number // 4)}"
    evspan("simulate", str(raw), "--recordings", splits, "--seconds", "6", *scene)
    evspan("prep", f"source={raw}", f"output={writing}", "frames.downsample=2", *classes)
    writing.rename(shards)
    shutil.rmtree(raw)
    return shards


def train(
    study: Study, folder: Path, shards: Path, seed: int, steps: int, overrides: list[str]
) -> None:
    """Trains a run, or continues it; does nothing when it is finished."""
    if (folder / "finished").exists():
        return
    evspan(
        "train",
        "--config-dir",
        str(CONF),
        "experiment=bench/baseline",
        "dataset=own",
        f"dataset.root={shards}",
        f"run_dir={folder}",
        f"seed={seed}",
        f"training.max_steps={steps}",
        "training.sequence_length=5",
        "training.batch_size=4",
        "training.evaluate_every=0",
        "training.log_images_every=0",
        *overrides,
        *study.extra,
    )
    (folder / "finished").touch()


def evspan(*words: str) -> None:
    """Runs a command, and stops where it fails."""
    print(f"== evspan {shlex.join(words)}", flush=True)
    code = subprocess.run([sys.executable, "-m", "evspan.launch", *words]).returncode
    if code:
        raise UserError(f"evspan {words[0]} ended with exit code {code}; its output is above")


# -- the report -----------------------------------------------------------------------------------
def measured(study: Study, variant: str, measure: str) -> dict[int, float]:
    """Seed -> value from 0 to 1, of the finished runs."""
    values = {}
    for seed in range(study.seeds):
        folder = study.run_folder(variant, seed)
        if (folder / "finished").exists():
            metrics = json.loads((folder / "evaluation" / "metrics.json").read_text())
            if metrics.get(measure) is not None:
                values[seed] = float(metrics[measure])
    return values


def write_report(study: Study) -> str:
    """Writes report.md; returns its text."""
    headers = []
    for name in MEASURES.values():
        headers += [name, f"{name} against {SCRATCH}"]
    lines = [
        f"# Fine-tuning, {study.steps} steps on {study.recordings} recordings",
        "",
        f"The source: {study.source_steps} steps on {study.source_recordings} recordings of another "
        f"domain. Points of 100, mean ± half of the {CONFIDENCE:.0%} interval over seeds; "
        "differences are paired by seed, and **bold** where the interval excludes zero.",
        "",
        f"| variant | seeds | {' | '.join(headers)} |",
        f"|---|---|{'---|' * len(headers)}",
    ]
    for variant in VARIANTS:
        cells = [variant, str(len(measured(study, variant, "ap")))]
        for measure in MEASURES:
            cells += _cells(study, variant, measure)
        lines.append(f"| {' | '.join(cells)} |")
    text = "\n".join(lines) + "\n"
    (study.folder / "report.md").write_text(text)
    return text


def _cells(study: Study, variant: str, measure: str) -> list[str]:
    values = measured(study, variant, measure)
    if not values:
        return ["", ""]
    mean = interval([*values.values()]).points()
    difference = paired(values, measured(study, SCRATCH, measure))
    if variant == SCRATCH or difference is None:
        return [mean, ""]
    text = difference.points(signed=True)
    return [mean, f"**{text}**" if difference.excludes_zero else text]


if __name__ == "__main__":
    main(sys.argv[1:])
