"""`evspan convert`: published checkpoints of RVT to weights files and back."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from evspan.conf.errors import UserError
from evspan.conf.presets import size_names, size_of
from evspan.conf.schema.prep import FrameMode
from evspan.data_prep.shards.atomic import written_whole
from evspan.launch.cli.command import Parser, run_command

if TYPE_CHECKING:
    from evspan.pipeline.weights import Weights

SUFFIXES = (".safetensors", ".ckpt")
DESCRIPTION = """Weights between RVT's form and ours, to the last bit.

SOURCE is a published Lightning checkpoint (.ckpt: tensors under state_dict, named mdl.*), a run
folder (its newest checkpoint), a checkpoint folder, or a .safetensors file. No code of it runs.

OUT.safetensors    for evaluate, infer, checkpoint.init_from and pipeline.load_detector
OUT.ckpt           for RVT's own code: torch.load(OUT)['state_dict'], load_from_checkpoint

Width, depth, blocks, scales, attention, classes and input channels are inferred from names and
shapes; dim_head comes from the size (conf/size) of the same width. Values that weights do not fix
are RVT's, unless an option gives another: gen4's frames at half resolution, or gen1's at full
resolution where there are two classes."""
EXAMPLES = """examples:
  evspan convert rvt-t.ckpt rvt-t.safetensors
  evspan convert runs/tiny tiny.ckpt
  evspan convert etram.ckpt etram.safetensors --classes pedestrian,vehicle,micro_mobility
  evspan convert mine.ckpt mine.safetensors --dataset gen4 --classes left,right   # 2 classes"""


def convert(given: argparse.Namespace) -> None:
    """Reads weights in either form and writes them in the form that the suffix of `out` names."""
    check_out(given.out, given.overwrite)
    if given.window_ms not in (None, 50) and given.mode != "exact":
        raise UserError(
            f"--window-ms {given.window_ms} needs --mode exact: RVT's frames span 50 ms"
        )
    from evspan.pipeline.inference.trained_detector import check_fit
    from evspan.pipeline.rvt_checkpoint import KnownFacts, open_weights, save_published
    from evspan.pipeline.weights import save_weights

    weights = open_weights(
        given.source,
        KnownFacts(
            size=given.model,
            dim_head=given.dim_head,
            dataset=given.dataset,
            classes=given.classes,
            downsample=given.downsample,
            mode=given.mode and FrameMode[given.mode],
            window_ms=given.window_ms,
        ),
    )
    try:
        check_fit(weights)
    except UserError as error:
        raise UserError(f"{given.source}: {error}") from error
    with written_whole(given.out) as beside:
        (save_weights if given.out.suffix == ".safetensors" else save_published)(beside, weights)
    print(f"{given.source} -> {given.out}: {_told(weights)}")


def check_out(out: Path, overwrite: bool) -> None:
    """Raises UserError where `out` has another suffix, or exists and is not to be replaced."""
    if out.suffix not in SUFFIXES:
        raise UserError(
            f"{out} ends in none of {', '.join(SUFFIXES)}, which say what to write; name it so"
        )
    if out.is_dir():
        raise UserError(f"{out} is a folder. Give another name")
    if out.exists() and not overwrite:
        raise UserError(f"{out} is there. Give another name, or --overwrite to replace it")


def _told(weights: "Weights") -> str:
    model, frames = weights.model, weights.frames
    scales = "/".join(str(2 ** (stage + 1)) for stage in model.fpn.in_stages)
    return (
        f"{size_of(model)} (embed_dim {model.backbone.embed_dim}, "
        f"dim_head {model.backbone.dim_head}, "
        f"{sum(t.numel() for t in weights.tensors.values()) / 1e6:.1f} M values), strides {scales}"
        f"{', small-object attention' if model.fpn.enable_small_object_attention else ''}, "
        f"{model.head.num_classes} classes ({', '.join(weights.classes)}), step {weights.step}\n"
        f"  frames: {frames.mode.name}, {frames.window_ms} ms in {frames.bins} bins, "
        f"1/{frames.downsample} of the sensor's "
        f"resolution; partition_split_32 {model.backbone.partition_split_32}"
    )


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
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it is there")
    parser.add_argument(
        "--classes",
        type=_names,
        metavar="NAME,...",
        help="in the order of their ids (default: the dataset's)",
    )
    frames = parser.add_argument_group("the frames that it was trained on")
    frames.add_argument(
        "--mode", choices=[m.name for m in FrameMode], help="how events were counted (default: rvt)"
    )
    frames.add_argument(
        "--downsample",
        type=int,
        metavar="N",
        help="1, 2 or 4: 1/N of the sensor's resolution (default: the dataset's)",
    )
    frames.add_argument("--window-ms", type=int, metavar="MS", help="of a frame (default: 50)")
    as_rvt = parser.add_argument_group(
        "the network; with any of these, what a file of ours tells of itself is left aside"
    )
    as_rvt.add_argument(
        "--model", choices=size_names(), help="the size, instead of the one recognised"
    )
    as_rvt.add_argument(
        "--dim-head",
        type=int,
        metavar="N",
        help="channels of an attention head, for a width of no size",
    )
    as_rvt.add_argument(
        "--dataset",
        choices=["gen4", "gen1"],
        help="as RVT trained on it: classes, downsample and partition_split_32 "
        "(gen4: 2, 2; gen1: 1, 1)",
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    """Runs `evspan convert`."""
    given = _parser().parse_args(argv)
    run_command(lambda: convert(given))


if __name__ == "__main__":
    main()
