"""The real trainer on one rank: NCCL, every ZeRO stage and precision, both engines."""

from gpu import processes
from gpu.rank import Settings

TIMEOUT = 150


def run(context):
    """Adds the rows."""
    if "hotcoco" in context.missing:  # the trainer evaluates with it
        context.report.skipped("engine", "", "package hotcoco is not installed")
        return
    small = context.datasets["small"]
    cases = [
        {"precision": "bf16"},
        {"precision": "fp32", "engine": "plain"},
    ]
    if not context.tiny:
        cases += [
            {"precision": "fp32"},
            {"precision": "bf16", "engine": "plain"},
            {"precision": "fp32", "stage": 0},
            {"precision": "bf16", "stage": 3},
            {"precision": "tf32"},
            {"precision": "bf16", "cuda_graphs": True},
        ]
    for number, case in enumerate(cases):
        _case(context, f"small-{number}", small, lanes=4, frames=4, **case)
    if context.tiny:
        return
    gen4 = context.datasets["gen4"]
    for number, engine in enumerate(("deepspeed", "plain")):
        sizes = {"size": "base", "lanes": 24, "frames": 5, "steps": 8}
        _case(context, f"gen4-{number}", gen4, precision="bf16", engine=engine, **sizes)
    sizes = {"size": "base", "lanes": 4, "frames": 20, "steps": 8, "attention": True}
    _case(context, "gen4-attention", gen4, precision="bf16", **sizes)


def _case(context, name, shards, **case):
    details = " ".join(f"{key}={value}" for key, value in case.items())
    label = f"{shards.parent.name}: {details}"
    if case.get("engine", "deepspeed") == "deepspeed" and "deepspeed" in context.missing:
        context.report.skipped("engine", label, "package deepspeed is not installed")
        return
    if not context.tiny and context.report.left < 100:
        context.report.skipped("engine", label, f"{context.report.left:.0f} s are left")
        return
    steps = {"steps": 2} if context.tiny else {}
    settings = Settings(
        shards=str(shards),
        run_dir=str(context.folder / f"engine-{name}"),
        device=context.device.type,
        **{**case, **steps},
    )
    try:
        values = processes.result(processes.start("steps", settings), TIMEOUT)
    except processes.ProcessFailedError as error:
        context.report.failed("engine", label, error)
        return
    context.report.compared("engine", label, values.pop("finite"), **values)
