"""Checks Evspan on one GPU: does everything run, are the numbers right, and how fast is it?

    python tests/gpu/check.py [--minutes 8] [--output DIR] [--parity DIR] [--only PART ...]
    python tests/gpu/check.py --device cpu --tiny      the same parts, small, without a GPU

Needs a torch that can use the GPU (2.6 or newer) and the packages of pyproject.toml; no network.
Where an optional package is missing, the rows that need it report that they were skipped. A part
that fails does not stop the others. The last lines are a summary; DIR/gpu_check.json has all rows,
DIR/errors.txt the tracebacks of those that failed.
"""

import argparse
import gc
import importlib
import os
import shutil
import sys
import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # this file is gpu.check

from gpu import machine  # noqa: E402
from gpu.report import FAILED, SKIPPED, Report  # noqa: E402

# In this order: what decides whether training works comes first, what may leave the GPU in a bad
# state comes after all that runs in this process. Seconds that must be left for a part to begin:
# those that it and the parts after it need at least.
PARTS = {
    "parity": 60,
    "gradients": 60,
    "engine": 200,
    "pair": 200,
    "data": 150,
    "inference": 150,
    "steps": 100,
    "kernels": 100,
    "learning": 60,
    "export": 15,
    "compiled": 60,
}


@dataclass(frozen=True)
class Context:
    """What every part receives.

    device: "cuda" or "cpu". tiny: small sizes and few repeats. parity: folder of the published
    numbers, which may be missing. folder: temporary files.
    """

    device: Any  # torch.device; torch is imported after the environment is set
    tiny: bool
    parity: Path
    folder: Path
    report: Report
    missing: list[str]
    datasets: Any  # Datasets

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.type == "cuda"


# Part -> the simulated datasets that it uses.
DATASETS = {
    "engine": ("small", "gen4"),
    "pair": ("small",),
    "data": ("gen4",),
    "inference": ("gen4",),
    "learning": ("learning",),
}


def needed_datasets(parts: list[str]) -> list[str]:
    """The datasets of the parts, each once, in the order of need."""
    names: list[str] = []
    for part, datasets in DATASETS.items():
        if part in parts:
            names += datasets
    return list(dict.fromkeys(names))


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small sizes, few repeats")
    parser.add_argument("--minutes", type=float, default=8, help="of the whole check (default 8)")
    parser.add_argument("--output", type=Path, default=Path("gpu_check"), metavar="DIR")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    parser.add_argument(
        "--parity",
        type=Path,
        default=Path(os.environ.get("EVSPAN_PARITY", HERE.parents[2] / "shared" / "parity")),
        metavar="DIR",
        help="folder that contains parity_small/ (default: $EVSPAN_PARITY)",
    )
    return parser.parse_args()


def check_device(name: str) -> None:
    """Ends the command with a message where torch cannot use the GPU."""
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        build = torch.version.cuda or "none: this build has no CUDA"
        sys.exit(
            f"error: torch {torch.__version__} sees no GPU (its CUDA: {build}; nvidia-smi shows "
            "the driver's). Install a torch that fits the driver, or try the check itself with "
            "--device cpu --tiny"
        )


def run_parts(names: list[str], context: Context) -> None:
    """Runs the parts; an error in one becomes a failed row."""
    report = context.report
    for name, needed in PARTS.items():
        if name not in names:
            continue
        if not context.tiny and report.left < needed:
            report.skipped(name, "", f"{report.left:.0f} s are left, {needed} s are needed")
            continue
        try:
            importlib.import_module(f"gpu.parts.{name}").run(context)
        except ModuleNotFoundError as error:
            if (error.name or "").split(".")[0] in context.missing:
                report.skipped(name, "", f"package {error.name} is not installed")
            else:
                report.failed(name, "", error)
        except Exception as error:
            traceback.print_exc()
            report.failed(name, "", error)
        free_memory(context)


def free_memory(context: Context) -> None:
    """Returns the GPU memory of a part: the next one may run in other processes.

    After an error on the device it cannot be returned. Parts in other processes run all the same.
    """
    gc.collect()
    if context.on_gpu:
        import torch

        try:
            torch.cuda.empty_cache()
        except RuntimeError:
            traceback.print_exc()


def print_summary(report: Report) -> bool:
    """Prints the whole table by part; returns whether nothing failed."""
    print("\n" + "=" * 100)
    print("  ".join(f"{name} {value}" for name, value in report.machine.items()))
    for row in report.rows:
        print(row)
    failed = report.with_status(FAILED)
    skipped = report.with_status(SKIPPED)
    print(
        f"\n{len(report.rows)} rows: {len(failed)} failed, {len(skipped)} skipped; "
        f"{report.elapsed:.0f} s; {report.write()}"
    )
    return not failed


def main() -> None:
    """Runs the command."""
    arguments = parse_arguments()
    # Before CUDA 12.6 a second profile after a CUDA graph crashes without these.
    os.environ.setdefault("TEARDOWN_CUPTI", "0")
    os.environ.setdefault("DISABLE_CUPTI_LAZY_REINIT", "1")
    if arguments.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # other processes may use the cores
    folder = Path(tempfile.mkdtemp(prefix="evspan-gpu-check-"))
    datasets = None
    try:
        missing = machine.prepare_imports(folder / "site")
        check_device(arguments.device)
        arguments.output.mkdir(parents=True, exist_ok=True)
        import torch

        description = machine.describe_machine(arguments.device, missing)
        report = Report(60 * arguments.minutes, arguments.output, description)
        from gpu.datasets import FULL, TINY, Datasets

        datasets = Datasets(
            folder, TINY if arguments.tiny else FULL, needed_datasets(arguments.only)
        )
        context = Context(
            device=torch.device(arguments.device),
            tiny=arguments.tiny,
            parity=arguments.parity.resolve(),
            folder=folder,
            report=report,
            missing=missing,
            datasets=datasets,
        )
        run_parts(arguments.only, context)
        passed = print_summary(report)
    finally:
        if datasets is not None:
            datasets.close()
        shutil.rmtree(folder, ignore_errors=True)
    sys.exit(not passed)


if __name__ == "__main__":
    main()
