"""Does it learn? Trains `micro` on simulated recordings for the rest of the time; reports AP."""

from gpu import processes
from gpu.rank import Settings

SECONDS = 90
START_AND_EVALUATE = 35  # seconds in addition to the training
ENOUGH_SECONDS = 60  # of training, after which REQUIRED_AP50 must be reached
REQUIRED_AP50 = 0.1  # an untrained detector has 0


def run(context):
    """Adds the row."""
    if "hotcoco" in context.missing:
        context.report.skipped("learning", "AP", "package hotcoco is not installed")
        return
    shards = context.datasets["learning"]
    seconds = 0.0 if context.tiny else min(SECONDS, context.report.left - START_AND_EVALUATE)
    settings = Settings(
        shards=str(shards),
        run_dir=str(context.folder / "learning"),
        device=context.device.type,
        engine="plain" if "deepspeed" in context.missing else "deepspeed",
        precision="fp32" if context.tiny else "bf16",
        lanes=4,
        frames=2 if context.tiny else 5,
        attention=True,
        seconds=seconds,
        steps=2,
    )
    timeout = 100 if context.tiny else context.report.left - 5
    try:
        values = processes.run("learn", settings, timeout)
    except processes.ProcessFailedError as error:
        context.report.failed("learning", "micro", error)
        return
    label = f"micro, {seconds:.0f} s of training"
    passed = seconds < ENOUGH_SECONDS or values["ap50"] >= REQUIRED_AP50
    context.report.compared("learning", label, passed, **values)
