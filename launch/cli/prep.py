"""`evspan prep`: recordings -> shards, and small tools around recordings."""

import sys
import time
from pathlib import Path

import hydra
import numpy as np
from evspan.conf.schema.cluster import Scheduler
from evspan.conf.schema.prep import PrepConfig
from evspan.launch.cli.command import Parser, hydra_task, run_command, run_hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

ConfigStore.instance().store(name="prep_schema", node=PrepConfig)

HELP = """evspan prep: recordings -> shards of histogram frames

  evspan prep source=RAW output=SHARDS [dataset=NAME] [key=value ...]
      RAW has train/ val/ test/ with recordings (.raw, .dat, .h5, .hdf5) and their boxes side by side: X_td.dat and X_bbox.npy.
      One file or a flat folder counts as test; LIST.txt or .csv names a recording a line: split path [boxes.npy].
      Run again, it does only what is missing or has changed.

  tools
      evspan prep info RECORDING                   format, sensor, time span, counts, rate
      evspan prep decode RECORDING OUT.h5          any format to HDF5 with events/{t,x,y,p}
      evspan prep preview INPUT OUT.png|gif|mp4    frames with boxes, of a recording or of shards
      evspan prep status SHARDS [--source RAW]     what is done, what is missing, who is at work on it
      evspan prep verify SHARDS [--source RAW]     checksums, structure, frames recomputed; prep redoes what is damaged
      evspan prep report SHARDS [OUT.html]         counts, sizes, rates, drops and pictures on one page, odd things first
      evspan prep export-rvt SHARDS OUT            shards of frames.mode=rvt to the folders that RVT reads

  examples
      evspan prep source=raw output=shards
      evspan prep source=/data/gen4 output=/scratch/gen4 dataset=gen4 processes=8
      evspan prep source=drive.raw output=drive frames.downsample=1
      evspan prep source=/data/gen4 output=/scratch/gen4 dataset=gen4 cluster=slurm cluster.partition=cpu

  choices (each a file in conf/GROUP/)
      dataset=simulated          simulated | gen4 | etram | etram3 | gen4_rvt
      cluster=local              local: processes on this machine | slurm: a job array; cluster.dry_run=true shows what it
                                 would submit, --cfg job all keys (partition, account, timeout_min, cpus_per_task, ...)

  keys
      frames.mode=exact          exact | rvt: RVT's frames to the last bit, with dataset=gen4_rvt
      frames.downsample=2        1 | 2 | 4: full, half or quarter resolution
      frames.downsample_by=sum   sum | nearest
      frames.window_ms=50        time that a frame spans
      frames.bins=10             time bins per frame and polarity
      frames.cutoff=10           counts saturate here, 1 to 255
      dataset.classes=[a,b]      names of class 0, 1, ... of your own boxes, with dataset.labels.class_map={0:0,3:1}
      dataset.labels.label_every_ms=100    50: a label on every frame, where they are dense enough
      dataset.labels.min_side=0  drop smaller boxes; more filters: data_prep/README.md
      processes=0                with cluster=local; 0: one per core
      codec=fast                 fast | small: through zstd, smaller and slower to read
      shard_mib=2048             several recordings share a file up to this size
      max_invalid_fraction=0.01     refuse a recording with a larger share of events outside the sensor

  evspan prep --cfg job ...        shows the config that these arguments make; conf/schema/prep.py explains every key
  evspan prep --hydra-help         how overrides work
"""


def _prep(config: PrepConfig) -> None:
    from evspan.data_prep.prepare import prepare
    from evspan.launch.slurm.prep_array import on_slurm

    began = time.perf_counter()
    report = prepare(config, on_slurm if config.cluster.scheduler is Scheduler.slurm else None)
    recordings, frames = (
        report.manifest.recordings,
        sum(r.frames for r in report.manifest.recordings),
    )
    for name, why in sorted(report.prepared.items()):
        if why != "new":
            print(f"prepared again: {name} ({why})")
    for name in report.removed:
        print(f"removed: {name} (no longer in the source)")
    if not report.prepared and not report.removed:
        print(
            f"{config.output}: nothing to do, {_count(len(recordings), 'recording')} with {frames} frames as they should be"
        )
        return
    classes = {
        name: sum(r.boxes_per_class[name] for r in recordings) for name in report.manifest.classes
    }
    print(
        f"{config.output}: {len(report.prepared)} of {_count(len(recordings), 'recording')} prepared in "
        f"{time.perf_counter() - began:.1f} s; {frames} frames, {sum(r.labelled_frames for r in recordings)} of them labelled, "
        f"{sum(classes.values())} boxes ({', '.join(f'{n} {name}' for name, n in classes.items())}), "
        f"{sum(r.events for r in recordings) / 1e6:.1f} M events"
    )


def decode(argv: list[str]) -> None:
    parser = Parser(
        "evspan prep decode",
        description="Any recording to HDF5 with events/{t,x,y,p} and height, width.",
        epilog="example: evspan prep decode drive_td.dat drive_td.h5",
    )
    parser.add_argument("recording", type=Path)
    parser.add_argument("out", type=Path, help="a file ending in .h5")
    given = parser.parse_args(argv)
    from evspan.conf.errors import UserError
    from evspan.data_prep.recordings.open import open_recording, open_writer
    from evspan.data_prep.shards.atomic import written_whole

    if given.out.suffix != ".h5":
        raise UserError(
            f"{given.out} does not end in .h5; decode writes HDF5: evspan prep decode {given.recording} "
            f"{given.recording.with_suffix('.h5')}"
        )
    recording = open_recording(given.recording)
    if given.out.exists() and given.out.samefile(given.recording):
        raise UserError(f"{given.out} is the recording itself; name another file")
    with (
        written_whole(given.out) as beside,
        open_writer(beside, recording.height, recording.width) as writer,
    ):
        for events in recording.chunks():
            writer.write(events)
    print(f"{given.out}: {recording.events} events{_dropped(recording.dropped)}")


def info(argv: list[str]) -> None:
    parser = Parser(
        "evspan prep info",
        description="What a recording holds.",
        epilog="example: evspan prep info drive.raw",
    )
    parser.add_argument("recording", type=Path)
    given = parser.parse_args(argv)
    from evspan.data_prep.labels.box_files import find_boxes, read_boxes
    from evspan.data_prep.recordings.open import open_recording

    recording, brighter = open_recording(given.recording), 0
    per_slice: dict[int, int] = {}
    for events in recording.chunks():
        brighter += int(events.p.sum(dtype=np.int64))
        for slice_, n in zip(*np.unique(events.t // 10_000, return_counts=True), strict=True):
            per_slice[int(slice_)] = per_slice.get(int(slice_), 0) + int(n)
    span = (recording.last_us - recording.first_us) / 1e6
    print(
        f"file      {given.recording} ({given.recording.stat().st_size / 1e6:.1f} MB)\nformat    {recording.format}\n"
        f"sensor    {recording.width} x {recording.height}"
    )
    print(f"events    {recording.events}{_dropped(recording.dropped)}")
    if recording.events:
        print(f"time      {recording.first_us} to {recording.last_us} us, {span:.3f} s")
        print(
            f"rate      {recording.events / max(span, 1e-6) / 1e6:.2f} M events/s on average, "
            f"{max(per_slice.values()) / 1e4:.2f} in the busiest 10 ms"
        )
        print(f"brighter  {brighter / recording.events:.1%}")
    boxes = find_boxes(given.recording)
    print(f"boxes     {f'{read_boxes(boxes).size} in {boxes.name}' if boxes else 'none beside it'}")


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'s' if number != 1 else ''}"


def _dropped(dropped: dict[str, int]) -> str:
    told = [f"{n} {reason.replace('_', ' ')}" for reason, n in dropped.items() if n]
    return f" ({', '.join(told)})" if told else ""


def preview(argv: list[str]) -> None:
    from evspan.launch.cli.prep_preview import main

    main(argv)


def report(argv: list[str]) -> None:
    from evspan.launch.cli.prep_report import main

    main(argv)


def export_rvt(argv: list[str]) -> None:
    from evspan.data_prep.shards.export_rvt import main

    main(argv)


def status(argv: list[str]) -> None:
    from evspan.data_prep.shards.status import main

    main(argv)


def verify(argv: list[str]) -> None:
    from evspan.data_prep.shards.verify import main

    main(argv)


TOOLS = {
    "decode": decode,
    "info": info,
    "preview": preview,
    "export-rvt": export_rvt,
    "report": report,
    "status": status,
    "verify": verify,
}


def main(argv: list[str] | None = None) -> None:
    @hydra.main(version_base="1.3", config_path="pkg://evspan.conf", config_name="prep")
    @hydra_task
    def task(raw: DictConfig) -> None:
        _prep(OmegaConf.to_object(raw))  # type: ignore[arg-type]  # __post_init__ checks run here

    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in TOOLS:
        run_command(lambda: TOOLS[argv[0]](argv[1:]))
    else:
        run_hydra(task, argv or ["--help"], prog="evspan prep", help=HELP)


if __name__ == "__main__":
    main()
