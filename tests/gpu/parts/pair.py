"""Two ranks on one GPU against one rank: data parallel, and one sequence over both ranks.

NCCL refuses two ranks on one GPU, so gloo connects them.
"""

from dataclasses import replace

from gpu import processes
from gpu.rank import Settings

LARGEST_DIFFERENCE = 1e-4  # of a loss, relative; the first steps of a run
TIMEOUT = 90
RESERVED = 260  # seconds for the parts that follow


def run(context):
    """Adds the rows."""
    if "hotcoco" in context.missing:  # the trainer evaluates with it
        context.report.skipped("pair", "", "package hotcoco is not installed")
        return
    alone = Settings(
        shards=str(context.datasets["small"]),
        run_dir=str(context.folder / "pair"),
        device=context.device.type,
        attention=True,
        steps=4,
    )
    try:
        expected = processes.run_ranks("pair", [alone], TIMEOUT)["losses"]
    except processes.ProcessFailedError as error:
        context.report.failed("pair", "one rank", error)
        return
    layouts = [(1, "auto"), (2, "transpose"), (2, "relay")]
    for sequence, exchange in layouts[1:2] if context.tiny else layouts:
        if not context.tiny and context.report.left < RESERVED:
            context.report.skipped("pair", exchange, f"{context.report.left:.0f} s are left")
            continue
        _layout(context, alone, expected, sequence, exchange)


def _layout(context, alone, expected, sequence, exchange):
    label = f"two ranks against one, sequence = {sequence}, {exchange}"
    ranks = [
        replace(alone, rank=rank, ranks=2, sequence=sequence, exchange=exchange)
        for rank in range(2)
    ]
    try:
        losses = processes.run_ranks("pair", ranks, TIMEOUT)["losses"]
    except processes.ProcessFailedError as error:
        context.report.failed("pair", label, error)
        return
    differences = [abs(a - b) / abs(b) for a, b in zip(losses, expected, strict=True)]
    largest = max(differences)
    context.report.compared("pair", label, largest < LARGEST_DIFFERENCE, largest_difference=largest)
