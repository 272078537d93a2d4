"""`evspan export`: the streaming step of a trained detector as ONNX or torch.export file."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from evspan.conf.errors import UserError
from evspan.data_prep.shards.atomic import written_whole
from evspan.launch.cli.command import Parser, run_command

if TYPE_CHECKING:
    from evspan.conf.schema.prep import FrameConfig

GEN4 = (720, 1280)  # pixels of the sensor
DESCRIPTION = """The detector's step for one frame, state in and state out, as a file that runs without Evspan.

OUT.onnx   for onnxruntime and other runtimes of ONNX; needs pip install 'evspan[export]'
OUT.pt2    for torch.export.load(OUT).module(), and for AOTInductor

inputs     frames (B, 2*bins, H, W) uint8; stage1_hidden, stage1_cell, ..., stage4_cell; with attention over time previous0,
           previous1: the frames before. All zero at a recording's start.
outputs    decoded (B, cells, 5 + classes): cx cy w h in pixels of the frames, objectness, class scores; then next_stage1_hidden,
           ...: the state to hand in with the next frame, in the order of the inputs.
Sizes are fixed. Confidence threshold and non-maximum suppression are not in the file: how many boxes they leave depends on the
data, and runtimes have their own. The file's metadata `evspan` (JSON) tells classes, frames and the usual thresholds.

The written file is run for a few frames against the detector; where they differ by more than float noise, it is not kept."""
EXAMPLES = """examples:
  evspan export runs/tiny tiny.onnx
  evspan export weights.safetensors tiny.pt2 --height 240 --width 320 --batch 4"""


def choose_size(given: argparse.Namespace, config: "FrameConfig") -> tuple[int, int, int, int]:
    """(B, 2 * bins, H, W) of the frames. Raises UserError."""
    for name, number in (
        ("--height", given.height),
        ("--width", given.width),
        ("--batch", given.batch),
    ):
        if number is not None and number < 1:
            raise UserError(f"{name} is {number}; give 1 or more")
    if (given.height is None) != (given.width is None):
        raise UserError(
            "give --height and --width of the frames both, or neither for a Gen4 sensor's"
        )
    height, width = (
        (given.height, given.width)
        if given.height
        else (side // config.downsample for side in GEN4)
    )
    return given.batch, config.channels, height, width


def check_output(path: Path) -> None:
    """Raises UserError: a name that says no format, or a format whose packages are missing."""
    if path.suffix not in (".onnx", ".pt2"):
        raise UserError(f"{path} ends in neither .onnx nor .pt2; name the output so")
    if path.is_dir():
        raise UserError(f"{path} is a folder. Give another name")
    if path.suffix == ".onnx":
        try:
            import onnx  # noqa: F401
            import onnxruntime  # noqa: F401
            import onnxscript  # noqa: F401
        except ModuleNotFoundError as error:
            raise UserError(
                f"ONNX needs the package {error.name}, which is not installed: pip install 'evspan[export]', "
                f"or name the output {path.with_suffix('.pt2')}"
            ) from error


def export(given: argparse.Namespace) -> None:
    check_output(given.output)
    from evspan.pipeline.inference import exported_step as engine
    from evspan.pipeline.inference.trained_detector import detector_from
    from evspan.pipeline.weights import load_weights

    weights = load_weights(given.checkpoint)
    size = choose_size(given, weights.frames)
    detector = detector_from(weights)
    about = engine.about(weights, detector.initial_state(size[0], *size[2:]))
    onnx = given.output.suffix == ".onnx"
    write, run, runtime = (
        (engine.write_onnx, engine.run_onnx, "onnxruntime")
        if onnx
        else (engine.write_pt2, engine.run_pt2, "torch.export.load")
    )
    program = engine.trace(detector, size)
    with written_whole(given.output) as beside:
        write(program, beside, about)
        most = engine.check(run(beside), detector, size, cutoff=weights.frames.cutoff)
    print(
        f"{given.output}: {weights.model.name}, step {weights.step}, {given.output.stat().st_size / 1e6:.1f} MB; frames {size} "
        f"uint8 and {len(about['inputs']) - 1} tensors of state"
    )
    print(
        f"{runtime} against the detector over {engine.STEPS} frames, the largest difference: {engine.told(most)}"
    )


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
        metavar="CHECKPOINT",
        help="a run folder (its newest checkpoint), a checkpoint folder, or a .safetensors file",
    )
    parser.add_argument(
        "output", type=Path, metavar="OUT", help="what to write, ending in .onnx or .pt2"
    )
    parser.add_argument(
        "--height", type=int, metavar="H", help="of the frames (default: 720 / their downsample)"
    )
    parser.add_argument(
        "--width", type=int, metavar="W", help="of the frames (default: 1280 / their downsample)"
    )
    parser.add_argument(
        "--batch", type=int, default=1, metavar="B", help="recordings side by side (default: 1)"
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    given = _parser().parse_args(argv)
    run_command(lambda: export(given))


if __name__ == "__main__":
    main()
