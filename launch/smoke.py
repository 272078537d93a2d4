"""`evspan smoke`: this machine trains a few steps under every layout of its ranks, and all must give what one rank gives."""

import argparse
import io
import json
import os
import sys
import time
from contextlib import ExitStack, redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from evspan.conf.errors import UserError
from evspan.launch.cli.command import Parser, run_command
from evspan.launch.local.ranks import run_ranks
from evspan.launch.local.run import under_launcher

LOSS = GRADIENT = (
    1e-5  # relative, what layouts may differ by; or so many times what rounding alone does on one rank:
)
ROUNDING = 5
TOO_MUCH = 1e-3  # for rounding alone
MOST_RANKS = 64

DESCRIPTION = """Trains a few steps of a micro detector, on recordings that it makes, with this machine's ranks cut into
data x sequence in every way, under both exchanges and different ZeRO stages; resumes each from its own
checkpoint and from another layout's. Exit code 0 only if all give the losses and gradients of one rank.
Runs on the GPUs if there are any, else on the CPU."""
EXAMPLES = """examples:
  evspan smoke --ranks 2                      # minutes on 2 cores
  evspan smoke --ranks 4 --keep smoke         # data, runs, curves and the ranks' log stay in smoke/
  CUDA_VISIBLE_DEVICES= evspan smoke          # on the CPU of a machine that has GPUs"""


class Bounds(NamedTuple):
    """What losses and gradients may differ by, relative, and how much of it rounding alone does."""

    loss: float
    gradient: float
    rounding: tuple[float, float]


def bounds(rounding: dict[str, Any]) -> Bounds:
    """Of float32: summing in another order changes gradients by some 1e-5, which Adam hands on to the losses of later steps. How
    much that is here, one rank shows that takes its frames one by one instead of all at once."""

    def allowed(least: float, noise: float) -> float:
        return max(least, ROUNDING * min(noise, TOO_MUCH)) if noise == noise else least

    noise = rounding["loss"], rounding["gradients"]
    return Bounds(allowed(LOSS, noise[0]), allowed(GRADIENT, noise[1]), noise)


def verdicts(row: dict[str, Any], allowed: Bounds, *, exact: bool) -> dict[str, bool]:
    """Column -> whether the layout is as one rank there. exact: resuming must be so to the last bit (not so on GPUs)."""
    return {
        "loss": row["loss"] <= allowed.loss and not row["skipped"],  # nan is not
        "gradients": row["gradients"] <= allowed.gradient,
        "resumed": row["resumed"] <= (0.0 if exact else allowed.loss),
        "resumed_other": row.get("resumed_other", 0.0) <= allowed.loss,
    }


def table(rows: list[dict[str, Any]], allowed: Bounds, *, exact: bool) -> tuple[list[str], bool]:
    """Lines, and whether every row passes."""
    lines, passed = (
        [
            (
                "layout",
                "ZeRO",
                "loss",
                "gradients",
                "resumed",
                "resumed from",
                "frames/s",
                "peak MB",
                "",
            )
        ],
        True,
    )
    for row in rows:
        good = verdicts(row, allowed, exact=exact)
        passed = passed and all(good.values())

        def cell(name: str, row: dict[str, Any] = row, good: dict[str, bool] = good) -> str:
            return (
                f"{'equal' if good[name] else 'DIFFERS'} {row[name]:.0e}" if row[name] else "equal"
            )

        other = f"{row['other']}: {cell('resumed_other')}" if "other" in row else "-"
        alone = row is rows[0]
        lines.append(
            (
                f"{row['layout']}{' (reference)' if alone else ''}",
                str(row["stage"]),
                "-" if alone else cell("loss"),
                "-" if alone else cell("gradients"),
                cell("resumed"),
                other,
                f"{row['speed']:.1f}",
                f"{row['peak'] / 1e6:.0f}",
                "pass" if all(good.values()) else "FAIL",
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return [
        "  ".join(text.ljust(width) for text, width in zip(line, widths)).rstrip() for line in lines
    ], passed


def make_data(folder: Path, ranks: int) -> None:
    """FOLDER/shards, from recordings of a small sensor."""
    import evspan.launch.cli.prep
    import evspan.launch.cli.simulate

    with redirect_stdout(said := io.StringIO()):
        try:
            evspan.launch.cli.simulate.main(
                [
                    str(folder / "raw"),
                    "--recordings",
                    f"train={ranks + 2},val=1",
                    "--seconds",
                    "2",
                    "--width",
                    "256",
                    "--height",
                    "192",
                    "--objects",
                    "2,4",
                    "--processes",
                    "1",
                ]
            )
            evspan.launch.cli.prep.main(
                [
                    f"source={folder / 'raw'}",
                    f"output={folder / 'shards'}",
                    "frames.downsample=2",
                    "processes=1",
                ]
            )
        except SystemExit:
            print(said.getvalue(), file=sys.stderr)
            raise


def smoke(ranks: int, steps: int, folder: Path) -> int:
    """Run it in an empty folder, tell the table; the exit code."""
    began = time.perf_counter()
    print(f"making recordings and frames in {folder}", flush=True)
    make_data(folder, ranks)
    threads = max(1, len(os.sched_getaffinity(0)) // ranks)
    command = [
        sys.executable,
        "-m",
        "evspan.launch.smoke_rank",
        str(folder),
        str(ranks),
        str(steps),
        str(threads),
    ]
    about: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    for world in sorted({1, ranks}):
        print(f"training on {world} rank{'s' * (world > 1)}", flush=True)
        code = run_ranks(command, world, threads=threads)
        told = folder / f"told-{world}.jsonl"
        lines = (
            [json.loads(line) for line in told.read_text().splitlines()] if told.exists() else []
        )
        about, rows = about or (lines[0] if lines else {}), rows + lines[1:]
        if code:
            break
        if 0 < about["gpus"] < ranks:
            raise UserError(
                f"--ranks is {ranks}, but there {'is' if about['gpus'] == 1 else 'are'} {about['gpus']} GPU"
                f"{'s' * (about['gpus'] > 1)}; give --ranks {about['gpus']}, or try the CPU: "
                "CUDA_VISIBLE_DEVICES= evspan smoke"
            )
    passed = _tell(rows, about, steps) if len(rows) > 1 else False
    verdict = f"exit code {code}, see above" if code else "pass" if passed else "FAIL"
    print(f"smoke: {verdict}, {len(rows)} layouts, {time.perf_counter() - began:.0f} s", flush=True)
    return code or int(not passed)


def _tell(rows: list[dict[str, Any]], about: dict[str, Any], steps: int) -> bool:
    allowed, exact = bounds(rows[1]), not about["gpus"]
    lines, passed = table(rows, allowed, exact=exact)
    print(f"\n{about['device']}; {steps} steps in float32, resumed after {steps // 2}\n")
    print("\n".join(lines))
    noise = f"{allowed.rounding[0]:.0e} and {allowed.rounding[1]:.0e}"
    print(
        f"\nequal: losses of all steps within {allowed.loss:.0e}, gradients of the first within {allowed.gradient:.0e}, "
        f"relative;\nthat is {LOSS:.0e}, or {ROUNDING} times what rounding alone changes (one rank, frame by frame: {noise}).\n"
        f"resumed, on the same layout: equal {'to the last bit' if exact else 'as losses are'}. peak: the rank that used most"
    )
    return passed


def _parser() -> argparse.ArgumentParser:
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
        help="processes, a GPU each if there are any (default: 2)",
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=3,
        metavar="N",
        help="optimizer updates per layout (default: 3)",
    )
    parser.add_argument(
        "--keep", type=Path, metavar="DIR", help="leave everything there; a new or empty folder"
    )
    return parser


def check(given: argparse.Namespace) -> None:
    if not 1 <= given.ranks <= MOST_RANKS:
        raise UserError(f"--ranks is {given.ranks}; give 1 to {MOST_RANKS}")
    if not 2 <= given.steps <= 100:
        raise UserError(
            f"--steps is {given.steps}; give 2 to 100: a checkpoint is resumed half way"
        )
    if (
        given.keep
        and given.keep.exists()
        and (not given.keep.is_dir() or any(given.keep.iterdir()))
    ):
        raise UserError(f"--keep {given.keep} is there and not empty; name a new folder")
    if under_launcher():
        raise UserError(
            "evspan smoke starts its ranks itself; run it without torchrun, and under srun as one task (-n1)"
        )


def main(argv: list[str] | None = None) -> None:
    given, code = _parser().parse_args(argv), 0

    def run() -> None:
        nonlocal code
        check(given)
        with ExitStack() as stack:
            folder = given.keep or Path(
                stack.enter_context(TemporaryDirectory(prefix="evspan-smoke-"))
            )
            folder.mkdir(parents=True, exist_ok=True)
            code = smoke(given.ranks, given.steps, folder.absolute())

    run_command(run)
    sys.exit(code)


if __name__ == "__main__":
    main()
