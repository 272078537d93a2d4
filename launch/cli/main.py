"""The `evspan` command. A part is imported only when it is called, so that the command itself answers at once."""

import sys
from collections.abc import Callable
from importlib import import_module
from typing import NamedTuple

from evspan.launch.cli.command import fail
from evspan.launch.logging_config import configure_logging


class Command(NamedTuple):
    entry: str  # "module:function", called with the arguments after the command's name
    summary: str

    def load(self) -> Callable[[list[str]], object]:
        module, function = self.entry.split(":")
        return getattr(import_module(module), function)


COMMANDS = {
    "simulate": Command(
        "evspan.launch.cli.simulate:main", "make recordings with boxes, to try everything on"
    ),
    "prep": Command(
        "evspan.launch.cli.prep:main",
        "recordings -> shards of frames; decode, look at and draw recordings",
    ),
    "train": Command("evspan.launch.local.run:train", "shards -> a trained detector"),
    "submit": Command(
        "evspan.launch.sweep.submit:submit",
        "train as a SLURM job that comes back after preemption, over any number of nodes",
    ),
    "sweep": Command(
        "evspan.launch.sweep.submit:sweep",
        "a run for each combination of values, as an array of jobs",
    ),
    "status": Command(
        "evspan.launch.cli.status:main",
        "what the runs of a sweep do: state, step, AP, time left, node, requeues",
    ),
    "logs": Command("evspan.launch.cli.logs:main", "what a run's ranks say"),
    "cancel": Command("evspan.launch.cli.cancel:main", "end a run's job, or those of a sweep"),
    "report": Command(
        "evspan.launch.cli.report:main",
        "a sweep's runs by AP, with curves, as text and HTML; TensorBoard's HParams",
    ),
    "doctor": Command(
        "evspan.launch.doctor.checks:main",
        "does this cluster fit? checks here and in a job, each with its remedy",
    ),
    "evaluate": Command("evspan.launch.local.run:evaluate", "a trained detector and shards -> AP"),
    "infer": Command(
        "evspan.launch.cli.infer:main",
        "a trained detector and a recording -> detections and a video",
    ),
    "smoke": Command(
        "evspan.launch.smoke:main",
        "does this machine train? every layout of its ranks against one rank, in minutes",
    ),
    "convert": Command(
        "evspan.launch.cli.convert:main", "RVT's published checkpoints <-> weights files"
    ),
    "export": Command(
        "evspan.launch.cli.export:main",
        "a trained detector -> its streaming step as ONNX or torch.export file",
    ),
}
HELP = f"""evspan: event-camera detectors, from recordings to detections

  evspan COMMAND ...

{chr(10).join(f"  {name:10}{command.summary}" for name, command in COMMANDS.items())}

  evspan COMMAND --help     what it does, examples, the most important options
  evspan --version

example
  evspan simulate raw --recordings train=8,val=2
  evspan prep source=raw output=shards frames.downsample=4
  evspan train experiment=demo dataset.root=shards run_dir=runs/demo
  evspan evaluate checkpoint=runs/demo dataset.root=shards
  evspan infer raw/val/val_000_td.raw --checkpoint runs/demo --output out

EVSPAN_DEBUG=1 shows the traceback of an error."""


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("evspan")
    except PackageNotFoundError:
        return "(not installed)"


def main(argv: list[str] | None = None) -> None:
    configure_logging()
    argv = sys.argv[1:] if argv is None else argv
    name = argv[0] if argv else "--help"
    if name in ("-h", "--help"):
        print(HELP)
    elif name in ("-V", "--version"):
        print(f"evspan {_version()}")
    elif name in COMMANDS:
        COMMANDS[name].load()(argv[1:])
    else:
        import difflib

        near = difflib.get_close_matches(name, [*COMMANDS, "--help", "--version"], 1)
        fail(
            f"there is no command {name!r}{f'; did you mean {near[0]!r}?' if near else '.'} There are: {', '.join(COMMANDS)}"
        )
