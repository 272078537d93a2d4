"""Forward, loss and backward by size, precision and batch, against the frame-by-frame version."""

import time
from functools import partial
from typing import NamedTuple

import torch
from evspan.pipeline.model.backbone import Execution
from evspan.pipeline.model.detector import Detector
from gpu import measure, models


class Case(NamedTuple):
    """Sizes of a step."""

    size: str
    lanes: int
    frames: int


class Way(NamedTuple):
    """How a step is computed. autocast: float32 weights, as training in fp16 has them."""

    name: str
    dtype: torch.dtype
    tf32: bool = False
    autocast: bool = False
    compiled: bool = False


WAYS = (
    Way("fp32", torch.float32),
    Way("tf32", torch.float32, tf32=True),
    Way("bf16", torch.bfloat16, tf32=True),
    Way("fp16", torch.float16, tf32=True, autocast=True),
    Way("bf16, compiled", torch.bfloat16, tf32=True, compiled=True),
)
FRAME_SIZE = (360, 640)
TINY_FRAME_SIZE = (96, 160)


def run(context):
    """Adds the rows."""
    cases = [Case("base", 24, 5), Case("base", 4, 5), Case("base", 4, 20), Case("tiny", 24, 5)]
    if context.tiny:
        cases = [Case("micro", 2, 2)]
    for case in cases:
        frame_size = TINY_FRAME_SIZE if context.tiny else FRAME_SIZE
        inputs = models.step_inputs(case.frames, case.lanes, frame_size, context.device)
        for way in WAYS:
            if not context.on_gpu and way.name not in ("fp32", "bf16"):
                continue
            if way.compiled and (case is not cases[0] or context.report.left < 240):
                continue
            if not context.tiny and context.report.left < 120:
                return
            _ours(context, case, way, inputs)
        if case.lanes * case.frames <= 20 or context.tiny:
            for use_tf32 in (False, True):
                if use_tf32 and not context.on_gpu:
                    continue
                _frame_by_frame(context, case, use_tf32, inputs)


def _label(case, text):
    return f"{case.size}, B = {case.lanes}, T = {case.frames}, {text}"


def _ours(context, case, way, inputs):
    label = _label(case, way.name)
    device = context.device
    try:
        measure.reset_peak(device)
        torch.manual_seed(0)
        execution = Execution(compile=way.compiled)
        model = Detector(models.model_config(case.size), models.CHANNELS, execution=execution)
        model.to(device)
        if way.dtype != torch.float32 and not way.autocast:
            models.cast(model, way.dtype)
        model.train()
        with measure.tf32(way.tf32):
            step = partial(_step, model, inputs, way)
            started = time.perf_counter()
            step()
            measure.synchronize(device)
            first = time.perf_counter() - started
            seconds = measure.seconds(step, device, repeats=2 if context.tiny else 8)
            counted = measure.counts(step, device)
            places = {}
            if context.on_gpu and way.name == "bf16":
                places = measure.wait_places(step)
        flops = _flops(model, inputs, way, device)
    except RuntimeError as error:  # also out of memory
        context.report.failed("steps", label, error)
        return
    values = {
        "ms": 1e3 * seconds,
        "frames_per_s": case.lanes * case.frames / seconds,
        "first_s": first,
        "gib": measure.peak_gib(device),
        **counted,
    }
    peak = device_peak(context, way)
    if peak and flops:
        values["mfu"] = flops / seconds / peak
    if places:
        values["waits_at"] = str(places)
    context.report.measured("steps", label, **values)


def _step(model, inputs, way):
    model.zero_grad(set_to_none=True)
    device = inputs.frames.device
    state_dtype = torch.float32 if way.autocast else way.dtype
    with torch.autocast(device.type, dtype=way.dtype, enabled=way.autocast):
        loss = models.total_loss(model, inputs, state_dtype)
    loss.backward()


def _flops(model, inputs, way, device):
    """FLOPs of a step, counted by torch with its formulas for products, attention and LSTM."""
    if way.compiled:
        return 0
    from evspan.pipeline.benchmark.flops import count_flops

    return count_flops(partial(_step, model, inputs, way)).total


def device_peak(context, way):
    """FLOP/s of the device in the precision of `way`; 0 if it is not in the table."""
    if not context.on_gpu:
        return 0
    from evspan.pipeline.benchmark.peaks import device_peak_flops

    return device_peak_flops(torch.cuda.get_device_name(), way.dtype, tf32=way.tf32) or 0


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

    with measure.tf32(use_tf32):
        seconds = measure.seconds(step, device, repeats=3, warm_up=1)
        counted = measure.counts(step, device)
    context.report.measured(
        "steps",
        label,
        ms=1e3 * seconds,
        frames_per_s=case.lanes * case.frames / seconds,
        gib=measure.peak_gib(device),
        **counted,
    )
