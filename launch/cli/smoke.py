"""`evspan smoke`: checks that every layout of this machine's ranks computes what one rank does."""

import argparse
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from evspan.conf.errors import UserError
from evspan.launch.cli.command import Parser, reported_errors
from evspan.launch.cli.table import format_table
from evspan.launch.local.run import under_launcher
from evspan.launch.output_streams import drop_lost_output
from evspan.launch.smoke import (
    LEAST_TOLERANCE,
    ROUNDING_FACTOR,
    SmokeOptions,
    SmokeResult,
    Tolerances,
    Verdict,
    run_smoke,
)
from evspan.pipeline.engine.layouts import LayoutResult

DESCRIPTION = """Trains a few steps of a micro detector, on simulated recordings, with this
machine's ranks in every data x sequence layout, with both exchanges and different ZeRO stages. Each
layout is resumed from its own checkpoint and from that of another layout. The exit code is 0 only
if all give the losses and gradients of one rank. Uses the GPUs if there is one for each rank, else
the CPU."""
EXAMPLES = """examples:
  evspan smoke --ranks 2                  # minutes on 2 cores
  evspan smoke --ranks 4 --keep smoke     # keep data, runs, curves and training log in smoke/
  CUDA_VISIBLE_DEVICES= evspan smoke      # on the CPU of a machine that has GPUs"""
HEADINGS = [
    "layout",
    "ZeRO",
    "loss",
    "gradients",
    "resumed",
    "resumed from",
    "frames/s",
    "peak MB",
    "",
]
NUMBERS = (6, 7)  # columns


@dataclass(frozen=True)
class CommandOptions:
    """Options of `evspan smoke`. keep: folder that keeps all files; None for a temporary one."""

    smoke: SmokeOptions
    keep: Path | None

    def __post_init__(self) -> None:
        if self.keep is None or not self.keep.exists():
            return
        if not self.keep.is_dir() or any(self.keep.iterdir()):
            raise UserError(f"--keep {self.keep} exists and is not empty; name a new folder")


def parse_options(argv: list[str] | None) -> CommandOptions:
    """Options from the arguments after `evspan smoke`; sys.argv for None."""
    parser = Parser(
        "evspan smoke",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--ranks",
        type=int,
        default=2,
        metavar="N",
        help="processes, with a GPU each if there are enough (default: 2)",
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=3,
        metavar="N",
        help="optimizer steps per layout (default: 3)",
    )
    parser.add_argument(
        "--keep", type=Path, metavar="DIR", help="keep all files in this new or empty folder"
    )
    args = parser.parse_args(argv)
    return CommandOptions(SmokeOptions(args.ranks, args.steps), args.keep)


def smoke(options: CommandOptions) -> int:
    """Runs the test and prints its table; returns the exit code.

    Raises:
        UserError: this process is one of several ranks, or the data could not be simulated.
    """
    refuse_ranks()
    with ExitStack() as stack:
        folder = options.keep
        if folder is None:
            temporary = TemporaryDirectory(prefix="evspan-smoke-")
            folder = Path(stack.enter_context(temporary))
        folder.mkdir(parents=True, exist_ok=True)
        result = run_smoke(options.smoke, folder.absolute())
    if result.is_complete:
        print_layouts(result, options.smoke.steps)
    print_verdict(result)
    return result.exit_code or int(not result.passed)


def refuse_ranks() -> None:
    """Raises UserError if torchrun or srun has started this process as one of several ranks."""
    if under_launcher():
        raise UserError(
            "evspan smoke starts its ranks itself; run it without torchrun, and under srun as one "
            "task (-n1)"
        )


def print_layouts(result: SmokeResult, steps: int) -> None:
    """Prints the table of layouts and what `equal` means in it."""
    assert result.device is not None
    allowed = result.tolerances()
    resumed_after = steps // 2
    print(f"\n{result.device.name}; {steps} steps in float32, resumed after {resumed_after}\n")
    print("\n".join(layout_table(result.layouts, result.verdicts())))
    print()
    print("\n".join(legend(allowed, exact=result.exact_resume)))


def layout_table(layouts: list[LayoutResult], verdicts: list[Verdict]) -> list[str]:
    """Lines: the heading, then a layout a line. The first layout is the reference."""
    rows = [HEADINGS]
    for layout, verdict in zip(layouts, verdicts, strict=True):
        rows.append(_row(layout, verdict, is_reference=layout is layouts[0]))
    return format_table(rows, right_aligned=NUMBERS)


def _row(layout: LayoutResult, verdict: Verdict, *, is_reference: bool) -> list[str]:
    name = f"{layout.layout} (reference)" if is_reference else layout.layout
    loss = "-" if is_reference else _cell(layout.loss, verdict.loss)
    gradients = "-" if is_reference else _cell(layout.gradients, verdict.gradients)
    other = "-"
    if layout.other:
        other = f"{layout.other}: {_cell(layout.resumed_other, verdict.resumed_other)}"
    return [
        name,
        str(layout.stage),
        loss,
        gradients,
        _cell(layout.resumed, verdict.resumed),
        other,
        f"{layout.frames_per_s:.1f}",
        f"{layout.peak_bytes / 1e6:.0f}",
        "pass" if verdict.passed else "FAIL",
    ]


def _cell(difference: float, is_equal: bool) -> str:
    if not difference:
        return "equal"
    word = "equal" if is_equal else "DIFFERS"
    return f"{word} {difference:.0e}"


def legend(allowed: Tolerances, *, exact: bool) -> list[str]:
    """Lines under the table. exact: whether resuming must give the same bits."""
    resumed = "equal in all bits" if exact else "equal within the tolerance of losses"
    rounding = f"{allowed.loss_rounding:.0e} and {allowed.gradients_rounding:.0e}"
    return [
        f"equal: losses of all steps within {allowed.loss:.0e}, gradients of the first step within "
        f"{allowed.gradients:.0e}, relative;",
        f"that is {LEAST_TOLERANCE:.0e}, or {ROUNDING_FACTOR} times the effect of rounding (one "
        f"rank, frame by frame: {rounding}).",
        f"resumed, on the same layout: {resumed}. peak: the rank that used most memory",
    ]


def print_verdict(result: SmokeResult) -> None:
    """Prints the last line."""
    verdict = "pass" if result.passed else "FAIL"
    if result.exit_code:
        verdict = f"exit code {result.exit_code}, see above"
    print(f"smoke: {verdict}, {len(result.layouts)} layouts, {result.seconds:.0f} s", flush=True)


def main(argv: list[str] | None = None) -> None:
    """Runs `evspan smoke`."""
    with reported_errors():
        options = parse_options(argv)
        drop_lost_output()
        sys.exit(smoke(options))


if __name__ == "__main__":
    main()
