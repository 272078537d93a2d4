"""`evspan bench`: measures training step, loader and inference of a config on this machine."""

import json
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from evspan.conf.errors import UserError, require
from evspan.conf.schema.benchmark import BenchConfig, check_one_rank
from evspan.conf.text import plural
from evspan.launch.cli.command import reported_errors
from evspan.launch.cli.config_arguments import config_information, parse_config_arguments
from evspan.launch.cli.table import format_table

if TYPE_CHECKING:
    from evspan.pipeline.benchmark.operations import Operations
    from evspan.pipeline.benchmark.run import BenchmarkResult, Setting
    from evspan.pipeline.benchmark.timing import Spread

HELP = """evspan bench: how fast a config trains, loads and infers on this machine, and its limit

  evspan bench [dataset.root=SHARDS] [experiment=NAME] [key=value ...]
      Takes the arguments of `evspan train`. One rank trains some steps, the loader reads with 1, 2,
      4 ... threads, and the detector runs frame by frame and as in an evaluation. Prints one table:
      ms, frames/s, operators or launches, host waits, memory, FLOPs and MFU (the model's FLOPs by
      time, of what the device can compute), the number of loader threads that the step needs, and
      the limiting resource with what to change. Uses the GPU if there is one.
      Without dataset.root it simulates recordings. Everything is written to a temporary folder,
      which is removed: run_dir is neither read nor written.

  examples
      evspan bench size=micro bench.steps=5
      evspan bench experiment=gen4/base dataset.root=/data/gen4 training.batch_size=24
      evspan bench size=small bench.output=small.json

  choices
      experiment, model, size, dataset, deepspeed: as in evspan help train

  keys
      bench.steps=20             measured optimizer steps
      bench.seconds=30           limit of each of the three measurements
      bench.output=              JSON file for all values
      bench.height=360           pixels of the simulated frames
      bench.width=640
      training.batch_size=8      lanes; those of one rank, as parallel.ranks must be 1
      training.sequence_length=5     frames per chunk
      training.precision=auto    fp32 | tf32 | bf16; auto: bf16 on GPUs that have it, else fp32
      training.num_workers=-1    threads that read frames ahead; -1: follows the cores
      training.peak_tflops=0     dense TFLOP/s of the device in training.precision; 0: the data
                                 sheet of a known GPU, a measured matrix product on a CPU
      parallel.threads=0         CPU threads of the step; 0: all cores
      checkpoint.init_from=      trained weights: NMS then has the candidates of a real detector

  evspan bench --cfg job ...       shows the resulting config; conf/schema/benchmark.py and
                                   training.py explain every key
  evspan bench --hydra-help        how overrides work
"""
HEADINGS = ["", "ms", "5 % - 95 %", "frames/s", ""]
NUMBERS = (1, 2, 3)  # columns


class Row(NamedTuple):
    """A line of the table."""

    name: str
    ms: str = ""
    spread: str = ""
    frames_per_s: str = ""
    note: str = ""


def bench(config: BenchConfig) -> None:
    """Measures, prints the table and writes the JSON file.

    Raises:
        UserError: a value cannot work; see `run_benchmark`.
    """
    from evspan.launch.local.run import check_training, under_launcher

    require(
        not under_launcher(),
        "evspan bench measures one rank; run it without torchrun, and under srun as one task (-n1)",
    )
    check_one_rank(config)
    output = Path(config.bench.output)
    if config.bench.output:
        check_output(output)
    if config.dataset.sources:
        check_training(config)
    from evspan.pipeline.benchmark.run import run_benchmark

    logging.getLogger("evspan.data_prep").setLevel(logging.WARNING)  # of the simulated recordings
    result = run_benchmark(config)
    print("\n".join(report_lines(result)))
    if config.bench.output:
        output.write_text(json.dumps(result.to_json(), indent=1) + "\n")
        print(f"written to {output}")


def check_output(path: Path) -> None:
    """Raises UserError if the file cannot be written, before minutes are spent on measuring."""
    if path.is_dir():
        raise UserError(f"bench.output is {path}, a folder; name a file: bench.output=bench.json")
    if not path.absolute().parent.is_dir():
        raise UserError(
            f"bench.output is {path}, but there is no folder {path.absolute().parent}; make it, or "
            "name another file"
        )


def report_lines(result: "BenchmarkResult") -> list[str]:
    """What was measured: the setting, the table, the limiting resource."""
    rows = [
        *step_rows(result),
        *flops_rows(result),
        *loader_rows(result),
        *inference_rows(result),
    ]
    limit = result.limit
    return [
        *setting_lines(result.setting),
        "",
        *format_table([HEADINGS, *rows], right_aligned=NUMBERS),
        "",
        f"limited by {limit.resource.value}: {limit.reason}.",
        f"to change it: {limit.remedy}.",
    ]


def setting_lines(setting: "Setting") -> list[str]:
    """Machine, model and data."""
    channels, height, width = setting.frame
    return [
        f"{setting.device}; {plural(setting.cores, 'core')}; torch {setting.torch}; "
        f"{setting.precision}",
        f"{setting.model}, {setting.parameters / 1e6:.1f} M parameters, {setting.engine}; "
        f"{plural(setting.batch_size, 'lane')} x {plural(setting.sequence_length, 'frame')} of "
        f"{channels} x {height} x {width}; {setting.data}",
    ]


def step_rows(result: "BenchmarkResult") -> list[Row]:
    """The training step, its parts, what it launches, and its memory."""
    step = result.step
    rows = []
    for name, spread in step.parts.items():
        fraction = spread.median / step.step.median
        rows.append(_timed(f"  {name}", spread, note=f"{fraction:.0%} of the step"))
    peak = f"{_flops_per_s(result.peak.flops)} ({result.peak.source})"
    whole = _timed(
        "training step",
        step.step,
        frames_per_s=step.frames_per_s,
        note=f"MFU {result.mfu:.1%} of {peak}",
    )
    operations = step.operations
    issued = Row("  operators", note=f"{operations.launches:,}")
    if operations.on_gpu:
        issued = Row("  issued by the host", f"{step.host_ms:.1f}", note=_operations(operations))
    return [
        whole,
        *rows,
        issued,
        Row("  host waits", note=_waits(operations)),
        Row("  device computes", f"{operations.busy_ms:.1f}", note=_products(operations)),
        Row("  peak memory", note=f"{step.peak_bytes / 1e6:,.0f} MB"),
    ]


def flops_rows(result: "BenchmarkResult") -> list[Row]:
    """The FLOPs of a micro-batch, by part of the detector."""
    flops = result.step.flops
    labelled = f"{flops.labelled} of {plural(flops.frames, 'frame')} labelled"
    rows = [
        Row(
            "GFLOP of a micro-batch",
            note=f"{flops.forward / 1e9:.3g} forward, {flops.total / 1e9:.3g} with backward; "
            f"{labelled}",
        )
    ]
    for part in flops.parts:
        note = f"{part.forward / 1e9:.3g} forward, {part.total / 1e9:.3g} with backward"
        rows.append(Row(f"  {part.name}", note=f"{note}, {part.total / flops.total:.0%}"))
    return rows


def loader_rows(result: "BenchmarkResult") -> list[Row]:
    """The loader's speed by threads, and how many the step needs."""
    rows = []
    for speed in result.loader:
        name = f"loader, {plural(speed.threads, 'thread')}"
        rows.append(Row(name, frames_per_s=f"{speed.frames_per_s:.0f}"))
    needed = f"more than the {plural(result.setting.cores, 'core')}"
    if result.threads_needed is not None:
        needed = str(result.threads_needed)
    rows.append(
        Row(
            "loader threads needed",
            frames_per_s=f"{result.step.frames_per_s_needed:.0f}",
            note=f"{needed}; training uses {result.num_workers}",
        )
    )
    return rows


def inference_rows(result: "BenchmarkResult") -> list[Row]:
    """Latency of a frame, and evaluation in chunks."""
    streaming = result.streaming
    evaluation = result.evaluation
    candidates = f"{streaming.candidates:.0f} candidates"
    rows = [
        _latency("infer, one frame", streaming.step, _operations(streaming.operations)),
        _latency("infer, with NMS", streaming.detect, candidates),
    ]
    if streaming.detect_graph is not None:
        rows.append(_latency("infer, with NMS, CUDA graph", streaming.detect_graph, candidates))
    return [
        *rows,
        Row(
            "evaluation",
            frames_per_s=f"{evaluation.frames_per_s:.1f}",
            note=f"{plural(evaluation.lanes, 'lane')} x "
            f"{plural(evaluation.chunk_frames, 'frame')}, with reading and NMS",
        ),
    ]


def _flops_per_s(value: float) -> str:
    if value >= 1e12:
        return f"{value / 1e12:.3g} TFLOP/s"
    return f"{value / 1e9:.3g} GFLOP/s"


def _latency(name: str, spread: "Spread", note: str) -> Row:
    return _timed(name, spread, frames_per_s=1000 / spread.median, note=note)


def _timed(name: str, spread: "Spread", *, frames_per_s: float | None = None, note: str) -> Row:
    rate = "" if frames_per_s is None else f"{frames_per_s:.1f}"
    return Row(name, f"{spread.median:.1f}", f"{spread.low:.1f} - {spread.high:.1f}", rate, note)


def _operations(operations: "Operations") -> str:
    if not operations.on_gpu:
        return f"{operations.launches:,} operators"
    return f"{operations.launches:,} launches, {operations.copies:,} copies"


def _waits(operations: "Operations") -> str:
    text = str(operations.waits)
    if operations.wait_places:
        text += f": {_counts(operations.wait_places)}"
    return text


def _counts(places: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in places.items())


def _products(operations: "Operations") -> str:
    return f"{operations.product_fraction:.0%} of it in matrix products"


def main(argv: list[str] | None = None) -> None:
    """Measure with the config that the arguments make; sys.argv for None."""
    arguments = sys.argv[1:] if argv is None else argv
    with reported_errors():
        _bench(arguments)


def _bench(argv: list[str]) -> None:
    arguments = parse_config_arguments(argv, prog="evspan bench")
    information = config_information(arguments, BenchConfig, HELP)
    if information is not None:
        print(information)
        return
    if arguments.multirun:
        raise UserError(
            "evspan bench measures one config; give each config a command of its own, without "
            "--multirun"
        )
    from evspan.conf.compose import compose

    bench(compose(BenchConfig, arguments.argv))


if __name__ == "__main__":
    main()
