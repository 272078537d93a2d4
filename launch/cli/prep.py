"""`evspan prep`: recordings -> shards of frames, and tools for recordings and shards."""

import sys
import time
from collections import Counter
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING

from evspan.conf.errors import require
from evspan.conf.schema.cluster import Scheduler
from evspan.conf.schema.prep import PrepConfig
from evspan.conf.text import plural, printable
from evspan.launch.cli.command import reported_errors
from evspan.launch.cli.config_arguments import config_information, parse_config_arguments
from evspan.launch.output_streams import drop_lost_output

if TYPE_CHECKING:  # not imported for --help
    from evspan.data_prep.prepare import PrepReport
    from evspan.data_prep.shards.format import Manifest
    from evspan.data_prep.workers import Runner

NAMED = 20  # recordings of a split that the summary lists
TOOLS = {  # evspan prep TOOL: its module, imported when the tool runs
    "decode": "evspan.launch.cli.prep_decode",
    "info": "evspan.launch.cli.prep_info",
    "preview": "evspan.launch.cli.prep_preview",
    "export-rvt": "evspan.launch.cli.prep_export_rvt",
    "report": "evspan.launch.cli.prep_report",
    "status": "evspan.launch.cli.prep_status",
    "verify": "evspan.launch.cli.prep_verify",
}

HELP = """evspan prep: recordings -> shards of histogram frames

  evspan prep source=RAW output=SHARDS [dataset=NAME] [key=value ...]
      RAW has train/ val/ test/ with recordings (.raw, .dat, .h5, .hdf5, .aedat4, .csv, .txt,
      .npz), each with its boxes next to it: X_td.dat and X_bbox.npy. One file or a flat folder
      counts as test. LIST.txt or .csv names one recording per line: split path [boxes.npy].
      Run again, it does only what is missing or has changed.

  tools
      evspan prep info RECORDING                   format, sensor, time span, counts, rate
      evspan prep decode RECORDING OUT.h5          any format to HDF5 with events/{t,x,y,p}
      evspan prep preview INPUT OUT.png|gif|mp4    frames with boxes, of a recording or of shards
      evspan prep status SHARDS [--source RAW]     what is done and missing, which process works
      evspan prep verify SHARDS [--source RAW]     checks checksums, structure and frames, and
                                                   marks damage for the next evspan prep
      evspan prep report SHARDS [OUT.html]         counts, sizes, rates, drops and images on one
                                                   page, warnings first
      evspan prep export-rvt SHARDS OUT            shards of frames.mode=rvt to RVT's folders

  examples
      evspan prep source=raw output=shards dataset=simulated
      evspan prep source=/data/gen4 output=/scratch/gen4 dataset=gen4 processes=8
      evspan prep source=drive.raw output=drive frames.downsample=1
      evspan prep source=/data/gen4 output=/scratch/gen4 dataset=gen4 cluster=slurm \\
          cluster.partition=cpu

  choices (each a file in conf/GROUP/)
      dataset=own                own: class names from dataset.classes, or from classes.txt in
                                 RAW, a name per line | simulated | gen4 | etram | etram3 | gen4_rvt
      cluster=local              local: processes on this machine | slurm: a job array;
                                 cluster.dry_run=true shows what it would submit, --cfg job all
                                 keys (partition, account, timeout_min, cpus_per_task, ...)

  keys
      frames.mode=exact          exact | rvt: RVT's frames to the last bit, with dataset=gen4_rvt
      frames.downsample=2        1 | 2 | 4: full, half or quarter resolution
      frames.downsample_by=sum   sum | nearest
      frames.window_ms=50        time span of a frame
      frames.bins=10             time bins per frame and polarity
      frames.cutoff=10           counts saturate at this value, 1 to 255
      dataset.classes=[a,b]      names of class 0, 1, ... of your own boxes, and in quotes
                                 'dataset.labels.class_map={0:0,3:1}': which class_id of the box
                                 files becomes which; it replaces the dataset's map as a whole
      dataset.labels.offset_us=0    added to label times that count from another moment
      dataset.labels.time_unit=us   us | ms | s | ns: of the times in the box files
      dataset.labels.label_every_ms=100    50: a label on every frame, for dense labels
      dataset.labels.min_side=0  drop smaller boxes; more filters: data_prep/README.md
      processes=0                with cluster=local; 0: one per core
      codec=fast                 fast | small: with zstd, smaller and slower to read
      shard_mib=2048             several recordings share a file up to this size
      split=0.8,0.1,0.1          train, val, test by the hash of each recording's name, for a source
                                 without such folders
      allow_removal=false        true: remove recordings that the source no longer has, even if
                                 they are more than half of a split
      max_invalid_fraction=0.01  refuse a recording with a larger fraction of events that are
                                 outside the sensor, or have a wrong time

  evspan prep --cfg job ...      shows the composed config; conf/schema/prep.py explains every key
  evspan prep --hydra-help       how overrides work
"""


def prep(config: PrepConfig) -> None:
    """Prepares the recordings and prints what was done."""
    from evspan.data_prep.prepare import prepare
    from evspan.data_prep.workers import DryRun

    start = time.perf_counter()
    if not config.cluster.dry_run:
        drop_lost_output()
    try:
        report = prepare(config, runner_of(config))
    except DryRun as description:
        print(description)
        return
    print_report(config.output, report, time.perf_counter() - start)


def runner_of(config: PrepConfig) -> "Runner":
    """The runner that `cluster` selects."""
    if config.cluster.scheduler is Scheduler.local:
        from evspan.data_prep.workers import LocalRunner

        return LocalRunner()
    from evspan.launch.slurm.prep_array import SlurmRunner  # imports Submitit

    return SlurmRunner()


def print_assignment(manifest: "Manifest") -> None:
    """Prints the recordings of each split, as `split=` assigned them."""
    from evspan.data_prep.shards.format import SPLITS

    for split in SPLITS:
        names = [printable(recording.name) for recording in manifest.split(split)]
        listed = ", ".join(names[:NAMED])
        if len(names) > NAMED:
            listed += f" and {len(names) - NAMED} more"
        print(f"split={manifest.split_fractions}, {split}: {len(names)} ({listed or 'none'})")


def print_report(output: str, report: "PrepReport", seconds: float) -> None:
    """Prints which recordings were prepared again or removed, and totals."""
    from evspan.data_prep.update_plan import NEW

    recordings = report.manifest.recordings
    frames = sum(r.frames for r in recordings)
    for name, reason in sorted(report.prepared.items()):
        if reason != NEW:
            print(f"prepared again: {name} ({reason})")
    for name in report.removed:
        print(f"removed: {name} (no longer in the source)")
    if report.manifest.split_fractions:
        print_assignment(report.manifest)
    total = plural(len(recordings), "recording")
    if not report.prepared and not report.removed:
        print(f"{output}: nothing to do, {total} with {frames} frames up to date")
        return
    print_left_out(output, report.manifest)
    boxes = dict.fromkeys(report.manifest.classes, 0)
    for recording in recordings:
        for name, count in recording.boxes_per_class.items():
            boxes[name] += count
    per_class = ", ".join(f"{count} {name}" for name, count in boxes.items()) or "no classes"
    labelled = sum(r.labelled_frames for r in recordings)
    events = sum(r.events for r in recordings)
    print(
        f"{output}: {len(report.prepared)} of {total} prepared in {seconds:.1f} s; {frames} "
        f"frames, {labelled} of them labelled, {sum(boxes.values())} boxes ({per_class}), "
        f"{events / 1e6:.1f} M events"
    )


def print_left_out(output: str, manifest: "Manifest") -> None:
    """Prints how many boxes of the source each rule left out; nothing if none did."""
    counts: Counter[str] = Counter()
    for recording in manifest.recordings:
        counts.update(recording.dropped_boxes)
    listed = [
        f"{count} {name.removeprefix('boxes_').replace('_', ' ')}"
        for name, count in counts.most_common()
        if count
    ]
    if listed:
        print(f"boxes left out: {', '.join(listed)}; evspan prep report {output} has the rules")


def main(argv: list[str] | None = None) -> None:
    """Runs the command, or one of its tools."""
    arguments = sys.argv[1:] if argv is None else argv
    with reported_errors():
        if arguments and arguments[0] in TOOLS:
            tool: Callable[[list[str]], None] = import_module(TOOLS[arguments[0]]).main
            tool(arguments[1:])
        else:
            compose_and_prepare(arguments or ["--help"])


def compose_and_prepare(argv: list[str]) -> None:
    """Prepares the recordings with the config that the arguments make."""
    arguments = parse_config_arguments(argv, prog="evspan prep")
    information = config_information(arguments, PrepConfig, HELP)
    if information is not None:
        print(information)
        return
    from evspan.conf.compose import compose

    require(not arguments.multirun, "--multirun is for evspan train; prepare each by a command")
    prep(compose(PrepConfig, arguments.argv))


if __name__ == "__main__":
    main()
