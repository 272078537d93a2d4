"""The kernels that decide whether anything runs: LSTM and attention at the sizes of a large batch.

A stage-1 map of 384 x 640 pixels has 15,360 cells, so 24 lanes are 368,640 sequences for the LSTM,
and 120 frames of it are 30,720 attention windows of 60 cells per head pair.
"""

import copy

import torch
import torch.nn.functional as F
from evspan.pipeline.benchmark.timing import synchronize
from gpu import measure

CELLS_OF_STAGE_1 = 96 * 160
CHECKED_CELLS = 200  # compared with the CPU
TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}


def run(context):
    """Adds the rows."""
    with measure.tf32(False):
        _run(context)


def _run(context):
    torch.manual_seed(0)
    if context.on_gpu:  # before cuDNN 9.13 torch's LSTM in bf16 goes frame by frame
        bf16 = torch.zeros(1, device=context.device, dtype=torch.bfloat16)
        fused = str(torch.cudnn_is_acceptable(bf16))
        context.report.measured("kernels", "cuDNN takes bf16", fused=fused)
    if context.tiny:
        lstm_cases = [("small", 16, 60, 3)]
        window_counts = [100]
        dtypes = [torch.float32, torch.bfloat16]
    else:
        lstm_cases = [
            ("1 lane of stage 1", 64, CELLS_OF_STAGE_1, 5),
            ("65,535 cells", 64, 65535, 5),
            ("65,536 cells", 64, 65536, 5),
            ("24 lanes of stage 1", 64, 24 * CELLS_OF_STAGE_1, 5),
            ("24 lanes of stage 4", 512, 24 * 240, 5),
            ("40 frames", 64, 7680, 40),
        ]
        window_counts = [65535, 65536, 120 * 256 * 3]
        dtypes = list(TOLERANCE)
    for case in lstm_cases:
        for dtype in dtypes:
            _lstm(context, *case, dtype)
    for windows in window_counts:
        for dtype in dtypes:
            _torch_attention(context, windows, dtype)
    for windows in window_counts:
        _attention(context, windows)


def _lstm(context, name, dim, cells, steps, dtype):
    """The detector's LSTM on some cells, forward and backward, against float32 on the CPU."""
    from evspan.pipeline.model.lstm import CellLSTM
    from evspan.pipeline.model.state import StageState

    device = context.device
    text = str(dtype).removeprefix("torch.")
    label = f"LSTM, {name}, dim {dim}, T = {steps}, {text}"
    lstm = CellLSTM(dim, dws_conv=False)
    on_device = copy.deepcopy(lstm).to(device, dtype)
    try:
        x = torch.randn(steps, 1, 1, cells, dim, device=device, dtype=dtype, requires_grad=True)
        zeros = [torch.randn(1, dim, 1, cells, device=device, dtype=dtype) for _ in range(2)]
        state = StageState(*zeros)
        y, _ = on_device(x, state)
        y.float().square().mean().backward()
        rows = torch.randint(0, cells, (CHECKED_CELLS,))
        some_state = StageState(*(t[..., rows].float().cpu() for t in state))
        expected, _ = lstm(x.detach()[:, :, :, rows].float().cpu(), some_state)
        error = measure.relative_error(y[:, :, :, rows].float(), expected)
        finite = bool(x.grad.isfinite().all())

        def step():
            on_device(x, state)[0].float().sum().backward()

        seconds = measure.seconds(step, device, repeats=4)
    except RuntimeError as failure:
        context.report.failed("kernels", label, failure)
        return
    passed = finite and error < TOLERANCE[dtype]
    context.report.compared("kernels", label, passed, error=error, ms=1e3 * seconds)


def _torch_attention(context, windows, dtype):
    """torch's kernel alone, to know its limit. A failure is a measurement, not a fault of ours."""
    text = str(dtype).removeprefix("torch.")
    label = f"torch's attention, {windows} windows of 60 cells, {text}"
    try:
        shape = (windows, 2, 60, 32)
        q = torch.randn(shape, device=context.device, dtype=dtype, requires_grad=True)
        F.scaled_dot_product_attention(q, q, q).float().sum().backward()
        synchronize(context.device)
    except RuntimeError as failure:
        context.report.measured("kernels", label, refused=measure.error_text(failure))
        return
    context.report.measured("kernels", label, runs="yes")


def _attention(context, windows):
    """The detector's own attention block over as many windows, against the CPU."""
    from evspan.conf.schema.training import BackboneConfig
    from evspan.pipeline.model.backbone import PartitionAttention

    label = f"attention block, {windows} windows of 60 cells"
    config = BackboneConfig(embed_dim=64, dim_head=32, ls_init_value=1.0)
    block = PartitionAttention(64, config, grid=False, first_norm=True)
    on_device = copy.deepcopy(block).to(context.device)
    try:
        x = torch.randn(windows, 6, 10, 64, device=context.device, requires_grad=True)
        y = on_device(x, (6, 10))
        y.square().mean().backward()
        rows = torch.randint(0, windows, (min(windows, 50),))
        error = measure.relative_error(y[rows], block(x.detach()[rows].cpu(), (6, 10)))
        finite = bool(x.grad.isfinite().all())
    except RuntimeError as failure:
        context.report.failed("kernels", label, failure)
        return
    context.report.compared("kernels", label, finite and error < 1e-3, error=error)
