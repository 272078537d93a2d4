"""Forward, loss and backward by size, precision and batch, against the frame-by-frame version."""

import time
from functools import partial
from typing import NamedTuple

import torch
from evspan.conf.errors import ConfigError
from evspan.conf.schema.training import Precision
from evspan.pipeline.benchmark.peaks import device_peak
from evspan.pipeline.benchmark.timing import synchronize
from evspan.pipeline.model.backbone import Execution
from evspan.pipeline.model.detector import Detector
from evspan.pipeline.model.flops import ModelFlops, frame_counts
from gpu import measure, models


class Case(NamedTuple):
    """Sizes of a step."""

    size: str
    lanes: int
    frames: int


class Variant(NamedTuple):
    """How a step is computed. precision: of training."""

    name: str
    precision: Precision
    compiled: bool = False

    @property
    def dtype(self):
        """Of the weights."""
        return torch.bfloat16 if self.precision is Precision.bf16 else torch.float32


VARIANTS = (
    Variant("bf16", Precision.bf16),
    Variant("tf32", Precision.tf32),
    Variant("fp32", Precision.fp32),
)
COMPILED = Variant("bf16, compiled", Precision.bf16, compiled=True)
CASES = (Case("base", 24, 5), Case("base", 4, 5), Case("base", 4, 20), Case("tiny", 24, 5))
RESERVED = 100  # seconds for the parts that follow
FRAME_SIZE = (360, 640)
TINY_FRAME_SIZE = (96, 160)


def run(context):
    """Adds the rows."""
    for case in [Case("micro", 2, 2)] if context.tiny else CASES:
        if not context.tiny and context.report.left < RESERVED:
            context.report.skipped("steps", _label(case, ""), f"{context.report.left:.0f} s left")
            continue
        _case(context, case)


def run_compiled(context):
    """Adds the row of a compiled step. Nothing bounds the compiler's time, so this comes last."""
    _ours(context, CASES[0], COMPILED, _inputs(context, CASES[0]))


def _case(context, case):
    inputs = _inputs(context, case)
    for variant in VARIANTS:
        if context.on_gpu or variant.precision is not Precision.tf32:
            _ours(context, case, variant, inputs)
    if case.lanes * case.frames <= 20:
        _frame_by_frame(context, case, context.on_gpu, inputs)


def _inputs(context, case):
    frame_size = TINY_FRAME_SIZE if context.tiny else FRAME_SIZE
    return models.step_inputs(case.frames, case.lanes, frame_size, context.device)


def _label(case, text):
    return f"{case.size}, B = {case.lanes}, T = {case.frames}, {text}"


def _ours(context, case, variant, inputs):
    label = _label(case, variant.name)
    device = context.device
    try:
        measure.reset_peak(device)
        torch.manual_seed(0)
        execution = Execution(compile=variant.compiled)
        model = Detector(models.model_config(case.size), models.CHANNELS, execution=execution)
        model.to(device)
        if variant.precision is Precision.bf16:
            models.cast(model, variant.dtype)
        model.train()
        with measure.tf32(variant.precision is not Precision.fp32):
            step = partial(_step, model, inputs, variant.dtype)
            started = time.perf_counter()
            step()
            synchronize(device)
            first = time.perf_counter() - started
            seconds = measure.seconds(step, device, repeats=2 if context.tiny else 8)
            counted = measure.counts(step, device)
    except torch.cuda.OutOfMemoryError:
        context.report.skipped("steps", label, "it needs more memory")
        return
    except RuntimeError as error:
        _failed(context, label, error)
        return
    values = {
        "ms": 1e3 * seconds,
        "frames_per_s": case.lanes * case.frames / seconds,
        "first_s": first,
        "gib": measure.peak_gib(device),
        **counted,
    }
    if context.on_gpu:
        values["mfu"] = _mfu(model, inputs, variant.precision, seconds)
    context.report.measured("steps", label, **values)


def _failed(context, label, error):
    """Adds a row; torch.compile needs a C compiler, which a machine may lack."""
    if "compiler" in str(error):
        context.report.skipped("steps", label, measure.error_text(error))
    else:
        context.report.failed("steps", label, error)


def _step(model, inputs, dtype):
    model.zero_grad(set_to_none=True)
    models.total_loss(model, inputs, dtype).backward()


def _mfu(model, inputs, precision, seconds):
    """Fraction of the GPU's peak; -1 if that is not known."""
    counts = frame_counts(inputs.labelled.cpu(), inputs.labelled.cpu()[:0])
    flops = ModelFlops(model, *inputs.frames.shape[-2:]).of(counts).total
    try:
        return flops / seconds / device_peak(inputs.frames.device, precision).flops
    except ConfigError:
        return -1.0


def _frame_by_frame(context, case, use_tf32, inputs):
    """The detector as the published code runs it, in float32."""
    from frame_by_frame import FrameByFrame

    label = _label(case, "frame by frame, " + ("tf32" if use_tf32 else "fp32"))
    device = context.device
    measure.reset_peak(device)
    model = FrameByFrame(models.model_config(case.size), models.CHANNELS).to(device).train()
    lanes_by_frame = [row.nonzero().flatten().tolist() for row in inputs.labelled]

    def step():
        model.zero_grad(set_to_none=True)
        losses, _ = model.losses(inputs.frames, None, lanes_by_frame, inputs.boxes)
        losses["loss"].backward()

    try:
        with measure.tf32(use_tf32):
            seconds = measure.seconds(step, device, repeats=3, warm_up=1)
            counted = measure.counts(step, device)
    except RuntimeError as error:
        context.report.failed("steps", label, error)
        return
    context.report.measured(
        "steps",
        label,
        ms=1e3 * seconds,
        frames_per_s=case.lanes * case.frames / seconds,
        gib=measure.peak_gib(device),
        **counted,
    )
