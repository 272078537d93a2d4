"""The backbone: the LSTM against a frame-by-frame definition, windows and grids cell by cell, the frame convolution."""

import pytest
import torch
import torch.nn.functional as F
from evspan.conf.errors import ConfigError
from evspan.conf.schema.training import (
    BackboneConfig,
    DeepSpeedConfig,
    ModelConfig,
    TrainConfig,
    TrainingConfig,
)
from evspan.pipeline.benchmark.operations import OperatorCounter
from evspan.pipeline.engine.trainer import _build_detector
from evspan.pipeline.model import backbone as backbone_module
from evspan.pipeline.model import layers
from evspan.pipeline.model import lstm as lstm_module
from evspan.pipeline.model.backbone import (
    Backbone,
    Execution,
    LayerScale,
    PartitionAttention,
    SelfAttention,
)
from evspan.pipeline.model.layers import FrameConv2d
from evspan.pipeline.model.lstm import CellLSTM, even_part, truncated
from evspan.pipeline.model.sequence_protocol import LocalExchange
from evspan.pipeline.model.state import StageState
from evspan.pipeline.parallel.mesh import Mesh
from torch import nn


def lstm_one_by_one(lstm, x, state):
    """Gates of cat[x, h] by one 1x1 convolution per frame: forget, input, output, candidate."""
    h, c = state
    out = []
    for frame in x.permute(0, 1, 4, 2, 3):
        if lstm.conv3x3_dws is not None:
            h = F.conv2d(
                h, lstm.conv3x3_dws.weight, lstm.conv3x3_dws.bias, padding=1, groups=h.shape[1]
            )
        f, i, o, g = F.conv2d(
            torch.cat((frame, h), 1), lstm.conv1x1.weight, lstm.conv1x1.bias
        ).chunk(4, 1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        out.append(h)
    return torch.stack(out).permute(0, 1, 3, 4, 2), StageState(h, c)


@pytest.mark.parametrize("dws_conv", [False, True])
def test_lstm_agrees_with_one_frame_at_a_time(dws_conv):
    torch.manual_seed(0)
    lstm = CellLSTM(6, dws_conv=dws_conv).double()
    x = torch.randn(5, 2, 4, 3, 6, dtype=torch.double, requires_grad=True)
    state = StageState(*torch.randn(2, 2, 6, 4, 3, dtype=torch.double).unbind(0))
    weights = torch.randn(5, 2, 4, 3, 6, dtype=torch.double)
    results = []
    for run in (lstm, lambda *a: lstm_one_by_one(lstm, *a)):
        y, after = run(x, state)
        gradients = torch.autograd.grad(
            (y * weights).sum() + after.cell.sum(), [x, *lstm.parameters()]
        )
        results.append((y, *after, *gradients))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dws_conv", [False, True])
def test_truncated_gradients_are_those_of_chunks_cut_there(dws_conv):
    torch.manual_seed(0)
    lstm, x = (
        CellLSTM(6, dws_conv=dws_conv).double(),
        torch.randn(7, 2, 4, 3, 6, dtype=torch.double, requires_grad=True),
    )
    state = StageState(*torch.randn(2, 2, 6, 4, 3, dtype=torch.double).unbind(0))
    expected, cut, whole = [], state, lstm(x, state)
    for piece in x.split(3):
        y, cut = lstm(piece, StageState(*(t.detach() for t in cut)))
        expected.append(y)
    actual, after = truncated(lstm.recurrence(), 3)(x, state)
    torch.testing.assert_close(actual, whole[0])
    torch.testing.assert_close(after.cell, whole[1].cell)
    weights = torch.randn_like(actual)
    gradients = [
        torch.autograd.grad((y * weights).sum(), [x, *lstm.parameters()])
        for y in (actual, torch.cat(expected), whole[0])
    ]
    for ours, theirs in zip(*gradients[:2], strict=True):
        torch.testing.assert_close(ours, theirs)
    assert not torch.allclose(gradients[0][0], gradients[2][0])


def test_a_new_network_keeps_what_the_forget_bias_says():
    torch.manual_seed(0)
    plain = CellLSTM(6, dws_conv=False)
    torch.manual_seed(0)
    kept = CellLSTM(6, dws_conv=False, forget_bias=2.0)
    more = kept.conv1x1.bias - plain.conv1x1.bias
    torch.testing.assert_close(
        more, torch.tensor([2.0] * 6 + [0.0] * 18)
    )  # order forget, input, output, candidate


def test_lstm_takes_any_subset_of_cells():
    torch.manual_seed(0)
    lstm, x = CellLSTM(6, dws_conv=False), torch.randn(3, 2, 4, 3, 6)
    state = StageState(torch.randn(2, 6, 4, 3), torch.randn(2, 6, 4, 3))
    whole, after = lstm(x, state)
    part, part_after = lstm(x[:, :, 1:2], StageState(*(t[:, :, 1:2] for t in state)))
    torch.testing.assert_close(part, whole[:, :, 1:2])
    torch.testing.assert_close(part_after.cell, after.cell[:, :, 1:2])


def attention_one_by_one(attention, x, scale):
    """One position and head at a time; head-major qkv."""
    groups, positions, dim = x.shape
    d = dim // attention.heads
    qkv = x @ attention.qkv.weight.T + attention.qkv.bias
    out = torch.zeros_like(x)
    for g in range(groups):
        for head in range(attention.heads):
            q, k, v = qkv[g, :, 3 * d * head : 3 * d * (head + 1)].split(d, -1)
            for i in range(positions):
                weights = torch.softmax(
                    torch.stack([q[i] @ k[j] / d**0.5 for j in range(positions)]), 0
                )
                out[g, i, d * head : d * (head + 1)] = sum(
                    weights[j] * v[j] for j in range(positions)
                )
    return (out @ attention.proj.weight.T + attention.proj.bias) * scale.gamma


@pytest.mark.parametrize("small_window", [0, 32], ids=["fused kernel", "plain products"])
def test_attention_agrees_with_the_definition(small_window, monkeypatch):
    monkeypatch.setattr(backbone_module, "SMALL_WINDOW", small_window)
    torch.manual_seed(0)
    attention, x = (
        SelfAttention(8, 4).double(),
        torch.randn(3, 5, 8, dtype=torch.double, requires_grad=True),
    )
    scale = LayerScale(8, 1.0).double()
    nn.init.uniform_(scale.gamma, -1, 1)
    expected = attention_one_by_one(attention, x, scale)
    torch.testing.assert_close(attention(x, scale), expected, rtol=1e-10, atol=1e-12)
    inputs, weights = [x, *attention.parameters(), *scale.parameters()], torch.randn_like(x)
    for a, b in zip(
        torch.autograd.grad((attention(x, scale) * weights).sum(), inputs),
        torch.autograd.grad((expected * weights).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("grid", [False, True])
def test_a_cell_sees_its_window_or_its_grid(grid):
    """Poking one cell changes exactly the cells of its group: neighbours in a window, h/rows and w/columns apart in a grid."""
    torch.manual_seed(0)
    rows, columns, h, w = 2, 3, 6, 12
    block = PartitionAttention(
        8, BackboneConfig(embed_dim=8, dim_head=4, ls_init_value=1.0), grid=grid, first_norm=True
    )
    x = torch.randn(1, h, w, 8)
    poked = x.clone()
    poked[0, 3, 7, 0] += 1
    with torch.no_grad():
        changed = (block(poked, (rows, columns)) - block(x, (rows, columns))).abs().amax(-1)[
            0
        ] > 1e-7
    down, across = h // rows, w // columns
    for i in range(h):
        for j in range(w):
            in_grid = i % down == 3 % down and j % across == 7 % across
            in_window = i // rows == 3 // rows and j // columns == 7 // columns
            same = in_grid if grid else in_window
            assert changed[i, j] == same, (i, j)


@pytest.mark.parametrize("padding", [(0, 0), (5, 9)])
def test_frame_convolution_agrees_with_torch_and_casts_in_parts(padding, monkeypatch):
    monkeypatch.setitem(layers.CAST_AT_ONCE, "cpu", 2 * 3 * 13 * 17 * 4)  # two frames at a time
    torch.manual_seed(0)
    conv = FrameConv2d(3, 4, 7, stride=4, padding=3, bias=False)
    frames = torch.randint(0, 11, (5, 3, 13, 17), dtype=torch.uint8)
    expected = F.conv2d(
        F.pad(frames.float(), (0, padding[1], 0, padding[0])), conv.weight, stride=4, padding=3
    )
    actual, weights = conv(frames, padding), torch.randn_like(expected)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        *(torch.autograd.grad((y * weights).sum(), conv.weight)[0] for y in (actual, expected)),
        rtol=1e-4,
        atol=1e-3,
    )


BACKBONE = BackboneConfig(
    embed_dim=8, dim_head=8, num_blocks=[1, 1, 1, 1], partition_split_32=1, ls_init_value=1.0
)


def a_backbone(execution=None):
    torch.manual_seed(0)
    backbone = Backbone(BACKBONE, 4, execution)
    return backbone, torch.randint(0, 5, (3, 2, 4, 60, 64), dtype=torch.uint8)


def backbone_of_training(**training):
    """As the trainer builds it from these values of `training`."""
    torch.manual_seed(0)
    config = TrainConfig(model=ModelConfig(backbone=BACKBONE), training=TrainingConfig(**training))
    mesh = Mesh(0, 1, 0, 1, (0,), None)
    detector = _build_detector(config, 4, LocalExchange(), mesh, torch.device("cpu"))
    return detector.backbone


def zero_states(backbone):
    """Of two lanes of 60 x 64 pixels."""
    dtype = next(backbone.parameters()).dtype
    states = []
    for dim, stride in zip(backbone.config.dims, backbone.strides, strict=True):
        zeros = torch.zeros(2, dim, 64 // stride, 64 // stride, dtype=dtype)
        states.append(StageState(zeros, zeros))
    return tuple(states)


def features_and_gradients(backbone, frames):
    features, _ = backbone(frames, zero_states(backbone), LocalExchange())
    return [
        *features,
        *torch.autograd.grad(sum(f.square().sum() for f in features), list(backbone.parameters())),
    ]


def test_gradients_flow_back_through_bptt_frames_of_the_config():
    """They are those of chunks of two frames whose state is detached."""
    torch.manual_seed(0)
    frames = torch.randint(0, 5, (6, 2, 4, 60, 64), dtype=torch.uint8)
    whole = features_and_gradients(backbone_of_training().double(), frames)
    actual = features_and_gradients(backbone_of_training(bptt_frames=2).double(), frames)
    backbone = backbone_of_training().double()
    states = zero_states(backbone)
    loss = torch.zeros((), dtype=torch.double)
    for chunk in frames.split(2):
        features, states = backbone(chunk, states, LocalExchange())
        loss = loss + sum(feature.square().sum() for feature in features)
        states = tuple(StageState(s.hidden.detach(), s.cell.detach()) for s in states)
    expected = torch.autograd.grad(loss, list(backbone.parameters()))
    for ours, theirs in zip(actual[4:], expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    for ours, theirs in zip(actual[:4], whole[:4], strict=True):
        torch.testing.assert_close(ours, theirs)
    assert not torch.allclose(actual[4], whole[4], rtol=1e-2)


@pytest.mark.parametrize(
    ("training", "forward", "backward"),
    [
        ({}, [6], []),
        ({"frames_per_call": 4}, [4, 2], []),
        ({"activation_checkpointing": True}, [6], [6]),
        ({"frames_per_call": 4, "activation_checkpointing": True}, [4, 2], [2, 4]),
    ],
    ids=["whole chunk", "parts", "recomputed", "parts recomputed"],
)
def test_the_spatial_parts_run_as_the_config_says(training, forward, backward):
    """Frames of each call, in forward and in the recomputation of backward."""
    backbone = backbone_of_training(**training)
    calls = []

    def counted(spatial):
        def run(x, *layout):
            calls.append(len(x))
            return spatial(x, *layout)

        return run

    for stage in backbone.stages:
        stage.spatial = counted(stage.spatial)
    frames = torch.randint(0, 5, (3, 2, 4, 60, 64), dtype=torch.uint8)
    features, _ = backbone(frames, zero_states(backbone), LocalExchange())
    assert calls == 4 * forward
    calls.clear()
    sum(feature.sum() for feature in features).backward()
    assert calls == 4 * backward


@pytest.mark.parametrize(
    ("frames_per_call", "recompute"), [(1, False), (4, False), (0, True), (4, True)]
)
def test_parts_and_recomputation_change_nothing(frames_per_call, recompute):
    expected = features_and_gradients(*a_backbone())
    execution = Execution(frames_per_call=frames_per_call, activation_checkpointing=recompute)
    for a, b in zip(features_and_gradients(*a_backbone(execution)), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("execution", [Execution(compile=True), Execution(cuda_graphs=True)])
def test_a_compiled_stage_gives_the_same(execution):
    def output_and_gradients(execution):
        backbone, frames = a_backbone(execution)
        stage = backbone.stages[0]  # one is enough, a compiler takes seconds for each
        y = stage.spatial(frames.flatten(0, 1), (2, 2), (4, 0))
        return [
            y,
            *torch.autograd.grad(
                y.square().sum(), [p for n, p in stage.named_parameters() if "lstm" not in n]
            ),
        ]

    compiled = output_and_gradients(execution)
    for a, b in zip(compiled, output_and_gradients(None), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("execution", "options"),
    [
        (Execution(), None),
        (Execution(compile=True), {}),
        (Execution(cuda_graphs=True), {"backend": "cudagraphs"}),
        (Execution(compile=True, cuda_graphs=True), {"mode": "reduce-overhead"}),
    ],
)
def test_cuda_graphs_hold_the_spatial_parts_of_one_chunk(execution, options, monkeypatch):
    compiled = []
    chunks = []

    def compile_nothing(function, **kwargs):
        compiled.append(kwargs)
        return function

    monkeypatch.setattr(torch, "compile", compile_nothing)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: chunks.append(1))
    results = features_and_gradients(*a_backbone(execution))
    assert compiled == ([] if options is None else [{"dynamic": False, **options}] * 4)
    assert len(chunks) == execution.cuda_graphs
    for a, b in zip(results, features_and_gradients(*a_backbone()), strict=True):
        assert torch.equal(a, b)


def test_cuda_graphs_are_refused_where_their_memory_would_be_wrong():
    with pytest.raises(ValueError, match="activation_checkpointing"):
        Execution(cuda_graphs=True, activation_checkpointing=True)
    for training, stage, remedy in (
        ({"activation_checkpointing": True}, 1, "set one of them to false"),
        ({"gradient_accumulation_steps": 2}, 1, "set training.cuda_graphs=false"),
        ({}, 3, "set deepspeed.stage=2"),
    ):
        with pytest.raises(ConfigError, match=remedy):
            TrainConfig(
                training=TrainingConfig(cuda_graphs=True, **training),
                deepspeed=DeepSpeedConfig(stage=stage),
            )
    assert TrainConfig(training=TrainingConfig(cuda_graphs=True)).training.cuda_graphs


def test_half_precision_attends_like_full_precision():
    torch.manual_seed(0)
    attention, scale, x = SelfAttention(16, 8), LayerScale(16, 1.0), torch.randn(2, 40, 16)
    expected = attention(x, scale)
    half = attention.bfloat16()(x.bfloat16(), scale.bfloat16())
    torch.testing.assert_close(half.float(), expected, rtol=0.02, atol=0.02)


def test_parts_are_even_and_within_the_limit():
    for total in range(1, 40):
        for most in range(1, 45):
            size = even_part(total, most)
            count = -(-total // size)
            assert size <= most
            assert count == -(-total // most)
    assert even_part(0, 5) == 1


class NoCPU(torch.overrides.TorchFunctionMode):
    """Tensors on the CPU that say they are elsewhere: the path of a GPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function == torch.Tensor.is_cpu.__get__:  # type: ignore[attr-defined]  # a C descriptor
            return False
        return function(*args, **(kwargs or {}))


def with_operators(run, inputs, parameters):
    """Output and gradients of `run` on the path of a GPU, and the operators' counter."""
    with NoCPU(), OperatorCounter() as counter:
        outputs = run(*inputs)
        total = sum((y * torch.arange(y.numel()).view(y.shape)).sum() for y in outputs)
        gradients = torch.autograd.grad(total, [*inputs, *parameters])
    return [*outputs, *gradients], counter.operators


@pytest.mark.parametrize("cells", [5, 6, 7, 13])
def test_an_lstm_over_more_cells_than_a_call_takes_is_split(cells, monkeypatch):
    torch.manual_seed(0)
    lstm = CellLSTM(4, dws_conv=False)
    inputs = [torch.randn(3, 1, 1, cells, 4), *torch.randn(2, 1, 4, 1, cells)]
    inputs = [t.requires_grad_() for t in inputs]

    def run(x, hidden, cell):
        y, after = lstm(x, StageState(hidden, cell))
        return [y, *after]

    parameters = list(lstm.parameters())
    expected, operators = with_operators(run, inputs, parameters)
    monkeypatch.setattr(lstm_module, "MOST_SEQUENCES", 6)
    actual, operators_with_limit = with_operators(run, inputs, parameters)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert operators["aten::cat"] == 0  # not even the backward of a split into one part
    assert (operators_with_limit != operators) == (cells > 6)
    monkeypatch.setattr(lstm_module, "MOST_SEQUENCES", 2**16 - 1)
    monkeypatch.setattr(lstm_module, "MOST_VALUES", 3 * 4 * 4 * 6)
    assert with_operators(run, inputs, parameters)[1] == operators_with_limit


@pytest.mark.parametrize("groups", [5, 6, 7, 13])
def test_attention_over_more_groups_than_a_call_takes_is_split(groups, monkeypatch):
    torch.manual_seed(0)
    attention, scale = SelfAttention(16, 8), LayerScale(16, 1.0)
    inputs = [torch.randn(groups, 40, 16, requires_grad=True)]
    parameters = [*attention.parameters(), *scale.parameters()]

    def run(x):
        return [attention(x, scale)]

    expected, operators = with_operators(run, inputs, parameters)
    monkeypatch.setattr(backbone_module, "MOST_GROUPS", 6)
    actual, operators_with_limit = with_operators(run, inputs, parameters)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert operators["aten::cat"] == 0  # not even the backward of a split into one part
    assert (operators_with_limit != operators) == (groups > 6)
    monkeypatch.setattr(backbone_module, "MOST_GROUPS", 2**16 - 1)
    monkeypatch.setattr(backbone_module, "MOST_VALUES", 2 * 128 * 32 * 6)
    assert with_operators(run, inputs, parameters)[1] == operators_with_limit
