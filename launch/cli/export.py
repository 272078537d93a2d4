"""`evspan export`: the streaming step of a trained detector as an ONNX or torch.export file."""

import argparse
from pathlib import Path

from evspan.conf.errors import UserError
from evspan.launch.cli.command import Parser, reported_errors
from evspan.launch.cli.existing_files import add_overwrite_option, require_new
from evspan.launch.output_streams import drop_lost_output
from evspan.pipeline.inference.options import ExportOptions

DESCRIPTION = """The detector's step for one frame, state in and state out, for use without Evspan.

OUT.onnx   for onnxruntime and other runtimes of ONNX; needs onnx, onnxruntime and onnxscript:
           make setup, or pip install '.[export]' in the checkout of Evspan
OUT.pt2    for torch.export.load(OUT).module(), and for AOTInductor

inputs     frames (B, 2*bins, H, W) uint8; stage1_hidden, stage1_cell, ..., stage4_cell; with
           attention over time previous0, previous1: the frames before. All zero at the start of a
           recording.
outputs    decoded (B, cells, 5 + classes): cx cy w h in pixels of the frames, objectness, class
           scores; then next_stage1_hidden, ...: the state to pass with the next frame, in the
           order of the inputs.
Sizes are fixed. The confidence threshold and non-maximum suppression are not in the file: the
number of boxes that they leave depends on the data, and runtimes have their own. The file's
metadata `evspan` (JSON) contains classes, frames and the usual thresholds.

The written file is run for a few frames against the detector; where they differ by more than float
noise, it is not kept."""
EXAMPLES = """examples:
  evspan export runs/tiny tiny.onnx
  evspan export weights.safetensors tiny.pt2 --height 240 --width 320 --batch 4"""


def export(options: ExportOptions, *, overwrite: bool) -> None:
    """Checks the options, exports, and prints what was written."""
    check_size(options)
    check_output(options.output)
    require_new([options.output], overwrite=overwrite)
    from evspan.pipeline.inference.export import export_detector

    summary = export_detector(options)
    megabytes = options.output.stat().st_size / 1e6
    runtime = "onnxruntime" if options.output.suffix == ".onnx" else "torch.export.load"
    print(
        f"{options.output}: detector of step {summary.step}, {megabytes:.1f} MB; "
        f"frames {summary.frames} uint8 and {summary.num_states} tensors of state\n"
        f"{runtime} against the detector over {summary.checked_frames} frames, "
        f"the largest difference: {summary.differences}"
    )


def check_size(options: ExportOptions) -> None:
    """Raises UserError: a size below 1, or one side without the other."""
    sizes = (
        ("--height", options.height),
        ("--width", options.width),
        ("--batch", options.batch),
    )
    for name, number in sizes:
        if number is not None and number < 1:
            raise UserError(f"{name} is {number}; give 1 or more")
    if (options.height is None) != (options.width is None):
        raise UserError(
            "give both --height and --width of the frames, or neither for a Gen4 sensor's"
        )


def check_output(path: Path) -> None:
    """Raises UserError: no format has this suffix, or packages of the format are missing."""
    if path.suffix not in (".onnx", ".pt2"):
        raise UserError(f"{path} ends in neither .onnx nor .pt2; give it such a name")
    if path.is_dir():
        raise UserError(f"{path} is a folder. Give another name")
    if path.suffix == ".onnx":
        try:
            import onnx  # noqa: F401
            import onnxruntime  # noqa: F401
            import onnxscript  # noqa: F401
        except ModuleNotFoundError as error:
            raise UserError(
                f"ONNX needs the package {error.name}, which is not installed: "
                "pip install '.[export]' in the checkout of Evspan, "
                f"or give the output the name {path.with_suffix('.pt2')}"
            ) from error


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        "evspan export",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "checkpoint",
        type=Path,
        metavar="RUN",
        help="a run folder (its newest checkpoint), a checkpoint folder, a .safetensors file, or "
        "a .ckpt of RVT",
    )
    parser.add_argument("output", type=Path, metavar="OUT", help="a name ending in .onnx or .pt2")
    parser.add_argument(
        "--height", type=int, metavar="H", help="of the frames (default: 720 / their downsample)"
    )
    parser.add_argument(
        "--width", type=int, metavar="W", help="of the frames (default: 1280 / their downsample)"
    )
    parser.add_argument(
        "--weights",
        choices=("ema", "raw"),
        default="ema",
        help="of a checkpoint: the moving average of its weights, where it has one, or those that "
        "the optimizer updates (default: ema)",
    )
    parser.add_argument(
        "--batch", type=int, default=1, metavar="B", help="recordings side by side (default: 1)"
    )
    add_overwrite_option(parser)
    return parser


def main(argv: list[str] | None = None) -> None:
    """The command."""
    args = vars(_parser().parse_args(argv))
    overwrite = args.pop("overwrite")
    options = ExportOptions(**args)
    drop_lost_output()
    with reported_errors():
        export(options, overwrite=overwrite)


if __name__ == "__main__":
    main()
