"""The `evspan` command. Imports the module of a command only when that command runs."""

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, NamedTuple

from evspan.launch.cli.command import checked_output, fail
from evspan.launch.logging_config import configure_logging

if TYPE_CHECKING:
    from evspan.launch.cli.grammar import Options


class Command(NamedTuple):
    """A line of the help, and what to call."""

    entry: str  # "module:function", called with the arguments after the command's name
    summary: str

    def load(self) -> Callable[[list[str]], object]:
        """The function; imports its module."""
        module, function = self.entry.split(":")
        main: Callable[[list[str]], object] = getattr(import_module(module), function)
        return main


COMMANDS = {
    "simulate": Command("evspan.launch.cli.simulate:main", "simulated recordings with boxes"),
    "prep": Command(
        "evspan.launch.cli.prep:main",
        "recordings -> shards of frames; decode, look at and draw recordings",
    ),
    "labels": Command(
        "evspan.launch.cli.labels:main",
        "labels of COCO, YOLO, VOC, CVAT, CSV and MOT in and out",
    ),
    "train": Command("evspan.launch.cli.train:main", "shards -> a trained detector"),
    "submit": Command(
        "evspan.launch.cli.submit:main",
        "train as a SLURM job on any number of nodes, requeued after preemption",
    ),
    "sweep": Command(
        "evspan.launch.cli.sweep:main",
        "a run for each combination of values, as an array of jobs",
    ),
    "status": Command(
        "evspan.launch.cli.status:main",
        "the runs of a sweep: state, step, AP, time left, node, requeues",
    ),
    "logs": Command("evspan.launch.cli.logs:main", "print the logs of a run's ranks"),
    "cancel": Command("evspan.launch.cli.cancel:main", "cancel a run's job, or those of a sweep"),
    "report": Command(
        "evspan.launch.cli.report:main",
        "a sweep's runs by AP, with curves, as text and HTML; TensorBoard's HParams",
    ),
    "doctor": Command(
        "evspan.launch.cli.doctor:main",
        "check this machine and, in a job, the cluster; each finding has its remedy",
    ),
    "evaluate": Command("evspan.launch.cli.evaluate:main", "a trained detector and shards -> AP"),
    "infer": Command(
        "evspan.launch.cli.infer:main",
        "a trained detector and a recording -> detections and a video",
    ),
    "smoke": Command(
        "evspan.launch.cli.smoke:main",
        "check that every layout of this machine's ranks computes what one rank computes",
    ),
    "bench": Command(
        "evspan.launch.cli.bench:main",
        "measure training step, loader and inference of a config on this machine",
    ),
    "convert": Command(
        "evspan.launch.cli.convert:main", "RVT's published checkpoints <-> weights files"
    ),
    "export": Command(
        "evspan.launch.cli.export:main",
        "a trained detector -> its streaming step as ONNX or torch.export file",
    ),
    "completion": Command(
        "evspan.launch.cli.completion:main", "prints a script that completes commands in a shell"
    ),
}
_SUMMARIES = "\n".join(f"  {name:11}{command.summary}" for name, command in COMMANDS.items())
HELP = f"""evspan: event-camera detectors, from recordings to detections

  evspan COMMAND ...

{_SUMMARIES}

  evspan help COMMAND       what it does, examples, the most important options; also COMMAND --help
  evspan --version

arguments
  Commands that have a config take key=value: prep, train, evaluate, submit, sweep,
  bench.
      evspan train experiment=demo dataset.root=shards training.max_steps=200
  The others, and the tools of prep, take options with dashes.
      evspan simulate raw --recordings train=8,val=2
  The checkpoint RUN is the first argument of evaluate, infer and export: a run folder (its newest
  checkpoint), one of its checkpoints, or a .safetensors file.
      evspan evaluate RUN dataset.root=shards
      evspan infer RUN RECORDING... --output out

example
  evspan simulate raw --recordings train=8,val=2
  evspan prep source=raw output=shards dataset=simulated frames.downsample=4
  evspan train experiment=demo dataset.root=shards run_dir=runs/demo
  evspan evaluate runs/demo dataset.root=shards
  evspan infer runs/demo raw/val/val_000_td.raw --output out

EVSPAN_DEBUG=1 shows the traceback of an error."""


def main(argv: list[str] | None = None) -> None:
    """The entry point: runs the command that the arguments name; sys.argv for None."""
    configure_logging()
    with checked_output():
        dispatch(sys.argv[1:] if argv is None else argv)


def dispatch(argv: list[str]) -> None:
    """Prints the help or the version, or runs a command; `argv` is what follows `evspan`."""
    name = argv[0] if argv else "--help"
    if name in ("-h", "--help"):
        print(HELP)
    elif name in ("-V", "--version"):
        print(f"evspan {_version()}")
    elif name == "help":
        show_help(argv[1:])
    else:
        run(argv)


def show_help(words: list[str]) -> None:
    """The help of a command, `evspan help train`, or of a subcommand, `evspan help prep info`."""
    if words:
        run([*words, "--help"])
    else:
        print(HELP)


def run(argv: list[str]) -> None:
    """Checks the grammar of a command's arguments and runs it; argv[0] is its name."""
    name = argv[0]
    if name not in COMMANDS:
        fail(_unknown_command(name))
    from evspan.launch.cli.grammar import correct

    correction = correct(argv, options_of)
    if correction:
        fail(correction.message)
    COMMANDS[name].load()(argv[1:])


def options_of(words: Sequence[str]) -> "Options":
    """The options of the parser of a command, or of a subcommand such as ("prep", "info")."""
    from evspan.launch.cli.command import parser_of
    from evspan.launch.cli.grammar import Options

    options = Options({}, {}, [])
    parser = parser_of(COMMANDS[words[0]].load(), words[1:])
    for action in parser._actions:  # argparse has no public list
        choices = [str(choice) for choice in action.choices or ()]
        if not action.option_strings:
            options.positionals[action.dest] = choices
        elif action.nargs == 0:
            options.flags.extend(action.option_strings)
        else:
            options.options.update(dict.fromkeys(action.option_strings, choices))
    return options


def _unknown_command(name: str) -> str:
    import difflib

    message = f"there is no command {name!r}"
    near = difflib.get_close_matches(name, [*COMMANDS, "help", "--help", "--version"], 1)
    if near:
        message += f"; did you mean {near[0]!r}?"
    else:
        message += "."
    return f"{message} There are: {', '.join(COMMANDS)}"


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("evspan")
    except PackageNotFoundError:
        return "(not installed)"
