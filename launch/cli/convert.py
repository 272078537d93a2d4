"""`evspan convert`: published checkpoints of RVT to weights files and back."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from evspan.conf.errors import UserError
from evspan.conf.presets import size_names, size_of
from evspan.conf.schema.prep import FrameMode
from evspan.launch.cli.command import Parser, reported_errors
from evspan.launch.output_streams import drop_lost_output
from evspan.pipeline.known_facts import KnownFacts

if TYPE_CHECKING:
    from evspan.pipeline.weights import Weights

SUFFIXES = (".safetensors", ".ckpt")
RVT_WINDOW_MS = 50
DESCRIPTION = """Converts weights between RVT's format and ours, bit for bit.

SOURCE is a published Lightning checkpoint (.ckpt: tensors under state_dict, named mdl.*), a run
folder (its newest checkpoint), a checkpoint folder, or a .safetensors file. Code in it is not run.

OUT.safetensors    for evaluate, infer, checkpoint.init_from and pipeline.load_detector
OUT.ckpt           for RVT's own code: torch.load(OUT)['state_dict'], load_from_checkpoint

Width, depth, blocks, scales, attention, classes and input channels are inferred from names and
shapes; dim_head is that of the size (conf/size) with the same width. Values that weights do not
show are RVT's unless an option sets them: gen4's frames at half resolution, or with two classes
gen1's at full resolution."""
EXAMPLES = """examples:
  evspan convert rvt-t.ckpt rvt-t.safetensors
  evspan convert runs/tiny tiny.ckpt
  evspan convert etram.ckpt etram.safetensors --classes pedestrian,vehicle,micro_mobility
  evspan convert mine.ckpt mine.safetensors --dataset gen4 --classes left,right   # 2 classes"""


@dataclass(frozen=True)
class ConvertOptions:
    """Options of `evspan convert`. overwrite: replace `output` if it exists."""

    source: Path
    output: Path
    overwrite: bool
    facts: KnownFacts


def convert(options: ConvertOptions) -> None:
    """Checks the options, converts, and prints what the weights contain.

    Raises:
        UserError: an option is wrong, or the source cannot be converted.
    """
    check_output(options.output, options.overwrite)
    check_window(options.facts)
    from evspan.pipeline.convert import convert_weights

    weights = convert_weights(options.source, options.output, options.facts)
    print(
        f"{options.source} -> {options.output}: {_model_line(weights)}\n  {_frames_line(weights)}"
    )


def check_output(path: Path, overwrite: bool) -> None:
    """Raises UserError: the suffix names no format, or the path exists and must not be replaced."""
    if path.suffix not in SUFFIXES:
        raise UserError(
            f"{path} ends in none of {', '.join(SUFFIXES)}, which select the format; "
            "give it such a name"
        )
    if path.is_dir():
        raise UserError(f"{path} is a folder. Give another name")
    if path.exists() and not overwrite:
        raise UserError(f"{path} is there. Give another name, or --overwrite to replace it")


def check_window(facts: KnownFacts) -> None:
    """Raises UserError: a window that only exact frames can have, without --mode exact."""
    if facts.window_ms in (None, RVT_WINDOW_MS) or facts.mode is FrameMode.exact:
        return
    raise UserError(
        f"--window-ms {facts.window_ms} needs --mode exact: RVT's frames span {RVT_WINDOW_MS} ms"
    )


def _model_line(weights: "Weights") -> str:
    model = weights.model
    num_values = sum(tensor.numel() for tensor in weights.tensors.values())
    strides = "/".join(str(2 ** (stage + 1)) for stage in model.fpn.in_stages)
    parts = [
        f"{size_of(model)} (embed_dim {model.backbone.embed_dim}, "
        f"dim_head {model.backbone.dim_head}, {num_values / 1e6:.1f} M values)",
        f"strides {strides}",
    ]
    if model.fpn.enable_small_object_attention:
        parts.append("small-object attention")
    parts.append(f"{model.head.num_classes} classes ({', '.join(weights.classes)})")
    parts.append(f"step {weights.step}")
    return ", ".join(parts)


def _frames_line(weights: "Weights") -> str:
    frames = weights.frames
    return (
        f"frames: {frames.mode.name}, {frames.window_ms} ms in {frames.bins} bins, "
        f"1/{frames.downsample} of the sensor's resolution; "
        f"partition_split_32 {weights.model.backbone.partition_split_32}"
    )


def parse_options(argv: list[str] | None) -> ConvertOptions:
    """Options from the arguments after `evspan convert`; sys.argv for None."""
    args = _parser().parse_args(argv)
    facts = KnownFacts(
        size=args.model,
        dim_head=args.dim_head,
        dataset=args.dataset,
        classes=args.classes,
        mode=FrameMode[args.mode] if args.mode else None,
        downsample=args.downsample,
        window_ms=args.window_ms,
    )
    return ConvertOptions(args.source, args.out, args.overwrite, facts)


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if not all(names) or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not of the form car,pedestrian (each name once)"
        )
    return names


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        "evspan convert",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=Path, metavar="SOURCE")
    parser.add_argument(
        "out", type=Path, metavar="OUT", help="a name ending in .safetensors or .ckpt"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    parser.add_argument(
        "--classes",
        type=_names,
        metavar="NAME,...",
        help="in the order of their ids (default: the dataset's)",
    )
    _add_frames(parser)
    _add_network(parser)
    return parser


def _add_frames(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the frames that the weights were trained on")
    modes = [mode.name for mode in FrameMode]
    group.add_argument("--mode", choices=modes, help="how events were counted (default: rvt)")
    group.add_argument(
        "--downsample",
        type=int,
        metavar="N",
        help="1, 2 or 4: 1/N of the sensor's resolution (default: the dataset's)",
    )
    group.add_argument(
        "--window-ms",
        type=int,
        metavar="MS",
        help=f"time span of a frame (default: {RVT_WINDOW_MS})",
    )


def _add_network(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "the network; with any of these, the description in a file of ours is ignored"
    )
    group.add_argument(
        "--model", choices=size_names(), help="the size, instead of the inferred one"
    )
    group.add_argument(
        "--dim-head",
        type=int,
        metavar="N",
        help="channels of an attention head, for a width that no size has",
    )
    group.add_argument(
        "--dataset",
        choices=["gen4", "gen1"],
        help="RVT's settings for it: classes, downsample and partition_split_32 "
        "(gen4: 2, 2; gen1: 1, 1)",
    )


def main(argv: list[str] | None = None) -> None:
    """Runs `evspan convert`."""
    with reported_errors():
        options = parse_options(argv)
        drop_lost_output()
        convert(options)


if __name__ == "__main__":
    main()
