"""`evspan labels`: labels of other tools in and out, and pseudo-labels."""

import argparse
import difflib
import sys
from importlib import import_module
from types import ModuleType

from evspan.launch.cli.command import Parser, reported_errors

TOOLS = {  # evspan labels TOOL: its module, imported when the tool runs
    "import": "evspan.launch.cli.labels_import",
    "export": "evspan.launch.cli.labels_export",
    "pseudo": "evspan.launch.cli.labels_pseudo",
}

DESCRIPTION = """Labels of other tools in and out.

  evspan labels import FILE OUT      COCO, YOLO, Pascal VOC, CVAT, CSV or MOT -> box files for
                                     evspan prep
  evspan labels export SOURCE OUT    boxes, detections and frames -> one of these formats, PNG
  evspan labels pseudo RUN SOURCE OUT  pseudo-labels of a trained detector -> box files

evspan help labels import shows its options."""
EXAMPLES = """examples:
  evspan labels export drive.raw pictures
  evspan labels import annotations.json raw/train
  evspan labels import tracks.xml drive_bbox.npy --fps 30"""


def main(argv: list[str] | None = None) -> None:
    """Runs a tool."""
    arguments = sys.argv[1:] if argv is None else argv
    with reported_errors():
        if arguments and arguments[0] in TOOLS:
            module: ModuleType = import_module(TOOLS[arguments[0]])
            module.main(arguments[1:])
            return
        parser = _parser()
        tool = parser.parse_args(arguments[:1] or ["--help"]).tool
        near = difflib.get_close_matches(tool, TOOLS, 1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        parser.error(f"there is no 'labels {tool}'{hint} There are: {', '.join(TOOLS)}")


def _parser() -> Parser:
    parser = Parser(
        "evspan labels",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("tool", metavar="TOOL", help=" | ".join(TOOLS))
    return parser


if __name__ == "__main__":
    main()
