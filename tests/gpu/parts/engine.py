"""The real trainer on one rank: NCCL, every ZeRO stage and precision, both engines."""

import os

from gpu import processes
from gpu.rank import Settings
from gpu.report import FAILED

TIMEOUT = 120
RESERVED = 300  # seconds for the parts that follow
STEPS = 10
LARGEST_DIFFERENCE = {"fp32": 1e-3, "bf16": 2e-2}  # of the losses after the same steps, relative

# Steps of base on simulated Gen4 recordings: the speed of training.
GEN4_CASES = (
    {"lanes": 24, "frames": 5},
    {"lanes": 24, "frames": 5, "engine": "plain"},
    {"lanes": 4, "frames": 20, "attention": True},
)
# micro on small frames: every way of training, compared with the first of its precision.
SMALL_CASES = (
    {"precision": "bf16"},
    {"precision": "fp32", "engine": "plain"},
    {"precision": "fp32"},
    {"precision": "bf16", "cuda_graphs": True},
    {"precision": "bf16", "engine": "plain"},
    {"precision": "bf16", "stage": 3},
    {"precision": "fp32", "stage": 0},
    {"precision": "tf32"},
)
TINY_CASES = ({"precision": "fp32"}, {"precision": "fp32", "engine": "plain"})


def run(context):
    """Adds the rows."""
    if "hotcoco" in context.missing:  # the trainer evaluates with it
        context.report.skipped("engine", "", "package hotcoco is not installed")
        return
    first, *others = TINY_CASES if context.tiny else SMALL_CASES
    losses = {}
    _small(context, first, losses)
    if context.on_gpu and context.report.rows[-1].status == FAILED:
        # A virtual machine may not have what torch's expandable segments need.
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:False"
        _small(context, first, losses)
    if not context.tiny:
        for case in GEN4_CASES:
            _case(context, "gen4", {"size": "base", "precision": "bf16", **case})
    for case in others:
        _small(context, case, losses)


def _small(context, case, losses):
    """losses: precision -> of the first case, which later ones are compared with."""
    _case(context, "small", {"size": "micro", "lanes": 4, "frames": 4, **case}, losses)


def _case(context, dataset, case, losses=None):
    label = f"{dataset}: " + " ".join(f"{key}={value}" for key, value in case.items())
    reason = _reason_to_skip(context, case)
    if reason:
        context.report.skipped("engine", label, reason)
        return
    try:
        settings = Settings(
            shards=str(context.datasets[dataset]),
            run_dir=str(context.folder / f"engine-{len(context.report.rows)}"),
            device=context.device.type,
            steps=2 if context.tiny else STEPS,
            **case,
        )
        timeout = TIMEOUT if context.tiny else min(TIMEOUT, context.report.left - 20)
        values = processes.run("steps", settings, timeout)
    except processes.ProcessFailedError as error:
        context.report.failed("engine", label, error)
        return
    passed = values.pop("finite") and not values.get("graphs_left_out")
    limit = LARGEST_DIFFERENCE.get(settings.precision)
    if losses is not None and limit is not None:
        expected = losses.setdefault(settings.precision, values["loss"])
        values["difference"] = abs(values["loss"] - expected) / abs(expected)
        passed = passed and values["difference"] < limit
    context.report.compared("engine", label, passed, **values)


def _reason_to_skip(context, case):
    """Why a case cannot run; empty if it can."""
    if case.get("engine", "deepspeed") == "deepspeed" and "deepspeed" in context.missing:
        return "package deepspeed is not installed"
    if not context.tiny and context.report.left < RESERVED:
        return f"{context.report.left:.0f} s are left"
    return ""
