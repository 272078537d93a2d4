"""Evaluation and streaming as on a GPU: waits per batch, one device, precision, CUDA graphs.

The GPU is emulated. CUDA graphs are a tape of the operators that capturing them saw, played back on
the same memory: what a graph cannot repeat, because the host decides it, gives other results here.
"""

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from evspan.conf.errors import UserError
from evspan.conf.schema.prep import DatasetConfig, FrameConfig
from evspan.conf.schema.training import (
    BackboneConfig,
    EvaluationConfig,
    FpnConfig,
    HeadConfig,
    ModelConfig,
    Precision,
)
from evspan.launch.cli.infer import main
from evspan.pipeline import load_detector
from evspan.pipeline.benchmark.operations import WAITING_OPERATORS
from evspan.pipeline.data.datasets import open_dataset
from evspan.pipeline.inference import streaming, streaming_detector
from evspan.pipeline.inference.detect import WorkTimer, detect
from evspan.pipeline.inference.precision import run_precision
from evspan.pipeline.inference.streaming import evaluate_split
from evspan.pipeline.inference.streaming_detector import StreamingDetector, StreamingOptions
from evspan.pipeline.inference.trained_detector import detector_from
from evspan.pipeline.model.detector import Detector
from evspan.pipeline.model.head import decode
from evspan.pipeline.model.norm import BatchNorm2d
from evspan.pipeline.model.postprocess import DetectionLimits, select
from evspan.pipeline.tensor_files import save_tensors
from evspan.pipeline.weights import HEADER_KEY, Weights, load_weights, save_weights
from safetensors import safe_open
from support.emulated_device import emulated_gpu, is_supported
from support.refusals import refused_by
from support.small_shards import BINS, CLASSES, HEIGHT, WIDTH, write_small_shards
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CPU = torch.device("cpu")
LIMITS = DetectionLimits(0.2, 0.45)
needs_emulation = pytest.mark.skipif(not is_supported(), reason="torch before 2.9")


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def gpu(monkeypatch):
    """An emulated GPU. Its tensors have no inference mode: gradients are off instead."""
    mode = torch.autograd.grad_mode.inference_mode

    def enter(self):
        self.before = torch.is_grad_enabled()
        torch.set_grad_enabled(False)

    monkeypatch.setattr(mode, "__enter__", enter)
    monkeypatch.setattr(mode, "__exit__", lambda self, *_: torch.set_grad_enabled(self.before))
    # Operators of other threads would not reach the emulation.
    monkeypatch.setattr(streaming, "READ_THREADS", 0)
    with emulated_gpu() as gpu:
        yield gpu


def some_weights(precision: Precision = Precision.bf16) -> Weights:
    """Random, with attention over time, and scores that lie far apart."""
    torch.manual_seed(0)
    model = ModelConfig(
        backbone=BackboneConfig(embed_dim=8, dim_head=4, ls_init_value=0.5, partition_split_32=1),
        fpn=FpnConfig(enable_small_object_attention=True),
        head=HeadConfig(num_classes=3),
    )
    frames = FrameConfig(bins=BINS, downsample=4)
    detector = Detector(model, frames.channels)
    for name, parameter in detector.named_parameters():
        if name.endswith("gate"):
            torch.nn.init.constant_(parameter, 0.7)
        elif "preds" in name and name.endswith("weight"):
            torch.nn.init.normal_(parameter, std=2.0)
        elif "obj_preds" in name or "cls_preds" in name:
            torch.nn.init.zeros_(parameter)
    return Weights(detector.state_dict(), model, frames, CLASSES, 7, precision)


def some_frames(count: int, lanes: int = 1) -> torch.Tensor:
    """(count, lanes, 2 * bins, H, W) uint8."""
    g = torch.Generator().manual_seed(3)
    rates = torch.full((count, lanes, 2 * BINS, HEIGHT, WIDTH), 0.3)
    return torch.poisson(rates, generator=g).to(torch.uint8)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = write_small_shards(tmp_path_factory.mktemp("shards"), {"val": [7, 12, 1, 5]})
    return open_dataset(DatasetConfig(root=str(root)), "val")


def evaluate(data, device=CPU, precision=Precision.auto, **settings):
    config = EvaluationConfig(
        **{"batch_size": 3, "sequence_length": 4, "confidence_threshold": 0.2, **settings}
    )
    detector = detector_from(some_weights(), device=device, precision=precision)
    return evaluate_split(detector, data, config, device=device, recordings=data.recordings)


def assert_same_results(actual, expected, **tolerance):
    assert [r.name for r in actual] == [r.name for r in expected]
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.frames == theirs.frames
        for a, b in zip(ours.boxes, theirs.boxes, strict=True):
            np.testing.assert_array_equal(a, b)
        for rows, others in zip(ours.detections, theirs.detections, strict=True):
            np.testing.assert_allclose(rows, others, **tolerance)


# -- evaluation ----------------------------------------------------------------------------------
@pytest.mark.parametrize("reading_threads", [0, 3])
def test_reading_ahead_changes_nothing(data, monkeypatch, reading_threads):
    expected = evaluate(data)
    assert sum(len(rows) for r in expected for rows in r.detections) > 20
    monkeypatch.setattr(streaming, "CPU_READ_THREADS", reading_threads)
    assert_same_results(evaluate(data), expected, rtol=0, atol=0)


def test_an_error_of_a_reading_thread_is_raised(data):
    def broken(rows):
        raise OSError("the disk is gone")

    bad = replace(data, recordings=[replace(data.recordings[1], read_frames=broken)])
    with pytest.raises(OSError, match="the disk is gone"):
        evaluate(bad)


@pytest.mark.slow
@needs_emulation
def test_evaluation_on_a_gpu_waits_once_per_batch_and_gives_the_same(data, gpu):
    expected = evaluate(data)
    with gpu.counting() as counts:
        actual = evaluate(data, gpu.device, Precision.fp32)
    assert_same_results(actual, expected, rtol=1e-4, atol=1e-3)
    batches = 3  # of 4 frames: lanes of 12, 7 and 5 + 1 frames
    waits = {line: n for line, n in counts.waits.items() if "host_copy.py" in line}
    assert sum(waits.values()) == batches, counts.table()
    # Before and after the batches: weights to the GPU, zero state.
    during = {line: n for line, n in counts.waits.items() if "streaming.py" in line}
    assert not during, counts.table()
    others = counts.waits.total() - batches
    weights = len(some_weights().tensors)
    assert others <= weights, counts.table()
    frames = sum(len(r.codes(0, r.frames).code) for r in data.recordings)
    pinned = [c for c in counts.copies if c.direction == "H2D" and c.pinned]
    sent = [c.num_bytes for c in pinned if "encoded.py" in c.line]
    assert len(sent) == batches
    assert frames < sum(sent) < frames + 1000 * batches


@pytest.mark.slow
@needs_emulation
def test_evaluation_in_bfloat16_is_close_and_only_the_norms_stay_in_float32(data, gpu, monkeypatch):
    expected = evaluate(data)
    decoded = []

    def spy(raw, geometry):
        assert raw.dtype == torch.bfloat16
        decoded.append(decode(raw, geometry))
        return decoded[-1]

    monkeypatch.setattr("evspan.pipeline.model.detector.decode", spy)
    detector = detector_from(some_weights(), device=gpu.device)
    assert detector.precision is Precision.bf16
    state = detector.initial_state(1, HEIGHT, WIDTH)
    assert {t.dtype for stage in state.stages for t in stage} == {torch.bfloat16}
    actual = evaluate(data, gpu.device)
    assert {t.dtype for t in decoded} == {torch.float32}
    norms = {
        id(parameter)
        for module in detector.modules()
        if isinstance(module, BatchNorm2d)
        for parameter in module.parameters()
    }
    for parameter in detector.parameters():
        expected_dtype = torch.float32 if id(parameter) in norms else torch.bfloat16
        assert parameter.dtype == expected_dtype
    # bfloat16 keeps 8 bits: about as many detections.
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.frames == theirs.frames
        count = sum(map(len, theirs.detections))
        assert sum(map(len, ours.detections)) == pytest.approx(count, rel=0.25, abs=3)


# -- precision -----------------------------------------------------------------------------------
def test_norms_keep_all_bits_in_bfloat16():
    weights = some_weights()
    for tensor in weights.tensors.values():
        if tensor.is_floating_point():
            tensor += 0.1 + torch.rand_like(tensor)
    detector = detector_from(weights, precision=Precision.bf16)
    norms = [name for name, m in detector.named_modules() if isinstance(m, BatchNorm2d)]
    tensors = detector.state_dict()
    for name, tensor in tensors.items():
        stored = weights.tensors[name]
        if name.rpartition(".")[0] in norms:
            assert torch.equal(tensor, stored), name
            is_counter = not tensor.is_floating_point()
            assert is_counter or not torch.equal(tensor, tensor.bfloat16().float()), name
        else:
            assert torch.equal(tensor, stored.to(torch.bfloat16)), name


def test_a_weights_file_holds_the_precision_of_training(tmp_path):
    path = tmp_path / "w.safetensors"
    for precision in (Precision.bf16, Precision.tf32):
        save_weights(path, some_weights(precision))
        assert load_weights(path).precision is precision
        assert load_detector(path).precision is Precision.fp32, "on a CPU"
    assert load_detector(path, precision="bf16").precision is Precision.bf16
    with pytest.raises(UserError, match="the precision is fp8; give one of auto, fp32, tf32, bf16"):
        load_detector(path, precision="fp8")


@pytest.mark.parametrize("older", [None, "fp16"])
def test_a_weights_file_of_an_older_version_is_read(tmp_path, older):
    path = tmp_path / "w.safetensors"
    weights = some_weights()
    save_weights(path, weights)
    with safe_open(path, "pt") as opened:
        description = json.loads(opened.metadata()[HEADER_KEY])
    description["precision"] = older
    if older is None:
        del description["precision"]
    save_tensors(path, weights.tensors, {HEADER_KEY: json.dumps(description)})
    assert load_weights(path).precision is Precision.fp32


@pytest.mark.parametrize(
    ("configured", "trained", "device", "capability", "expected"),
    [
        ("auto", "bf16", "cpu", None, "fp32"),
        ("auto", "bf16", "cuda", (9, 0), "bf16"),
        ("auto", "bf16", "cuda", (7, 0), "fp32"),
        ("auto", "tf32", "cuda", (9, 0), "tf32"),
        ("bf16", "fp32", "cpu", None, "bf16"),
        ("fp32", "bf16", "cuda", (9, 0), "fp32"),
    ],
)
def test_precision_follows_training_on_a_gpu(
    monkeypatch, configured, trained, device, capability, expected
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    chosen = run_precision(Precision[configured], Precision[trained], torch.device(device))
    assert chosen is Precision[expected]


# -- streaming -----------------------------------------------------------------------------------
class Tape(TorchDispatchMode):
    """Records operators; `replay` runs them again on the tensors that they had.

    Raises:
        AssertionError: an operator waits for a value.
    """

    def __init__(self) -> None:
        super().__init__()
        self.recorded = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func._schema.name not in WAITING_OPERATORS, f"{func} waits for the device"
        out = func(*args, **(kwargs or {}))
        # A reshape is a view or a copy.
        if not func.is_view or not shares_memory(out, args):
            self.recorded.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, out in self.recorded:
            again = func(*args, **kwargs)
            for target, value in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(target, torch.Tensor) and target is not value:
                    target.copy_(value)


def shares_memory(out, args) -> bool:
    """Whether a tensor of `out` lies in the memory of one of `args`."""
    addresses = [
        {t.untyped_storage().data_ptr() for t in tree_leaves(tree) if isinstance(t, torch.Tensor)}
        for tree in (out, args)
    ]
    return bool(addresses[0] & addresses[1])


@pytest.fixture
def graphs_on_cpu(monkeypatch):
    """Numbers of captures and replays."""
    counts = {"captures": 0, "replays": 0}

    def capture(work, device):
        for _ in range(3):
            work()
        with Tape() as tape:
            outputs = work()
        counts["captures"] += 1

        def replay():
            counts["replays"] += 1
            tape.replay()

        return replay, outputs

    monkeypatch.setattr(streaming_detector, "capture", capture)
    monkeypatch.setattr(streaming_detector, "require_cuda_graphs", lambda device: None)
    return counts


def with_and_without_graph(
    detector: Detector, options: StreamingOptions
) -> tuple[StreamingDetector, StreamingDetector]:
    """Two that run the same operators. Calls of fewer frames than expected run without a graph."""
    graphed = options._replace(cuda_graphs=True)
    plain = graphed._replace(frames_per_call=100)
    return StreamingDetector(detector, graphed), StreamingDetector(detector, plain)


@pytest.mark.parametrize(("lanes", "per_call"), [(1, 1), (2, 1), (1, 3)])
def test_a_graph_gives_what_the_operators_give(graphs_on_cpu, lanes, per_call):
    detector = detector_from(some_weights())
    frames = some_frames(3 * per_call + (per_call > 1), lanes)  # the last call has fewer frames
    options = StreamingOptions(lanes, HEIGHT, WIDTH, LIMITS, per_call)
    graphed, plain = with_and_without_graph(detector, options)
    seen = []
    for _ in range(2):
        for part in torch.split(frames, per_call):
            expected = plain.start(part).read()
            actual = graphed.start(part).read()
            assert len(actual) == len(expected) == lanes * len(part)
            for rows, others in zip(actual, expected, strict=True):
                torch.testing.assert_close(rows, others, rtol=0, atol=0)
            seen.append(torch.cat(expected))
        plain.reset()
        graphed.reset()
    assert graphs_on_cpu == {"captures": 1, "replays": 6}
    calls = len(seen) // 2
    assert len(seen[0]) > 5
    assert not torch.equal(seen[0], seen[1]), "frames and state matter"
    for first, second in zip(seen[:calls], seen[calls:], strict=True):
        assert torch.equal(first, second), "reset is the start"


def test_a_graph_that_needs_more_rounds_repeats_the_selection(graphs_on_cpu, monkeypatch):
    monkeypatch.setattr("evspan.pipeline.model.postprocess.ROUNDS", 1)
    monkeypatch.setattr(streaming_detector, "select", partial(select, rounds=1))
    detector = detector_from(some_weights())
    options = StreamingOptions(1, HEIGHT, WIDTH, DetectionLimits(0.0, 0.1))
    graphed, plain = with_and_without_graph(detector, options)
    for frame in some_frames(3):
        (expected,) = plain.detect(frame)
        (rows,) = graphed.detect(frame)
        torch.testing.assert_close(rows, expected, rtol=0, atol=0)


def test_cuda_graphs_are_refused_on_a_cpu(tmp_path, capsys):
    path = tmp_path / "w.safetensors"
    save_weights(path, some_weights())
    with pytest.raises(UserError, match="CUDA graphs need a GPU, the detector is on cpu"):
        load_detector(path).frame_stream(1, HEIGHT, WIDTH, cuda_graphs=True)
    recording = tmp_path / "a.raw"
    recording.write_text("% evt 3.0\n% format EVT3;height=240;width=320\n% end\n")
    message = refused_by(main, capsys, path, recording, "--device", "cpu", "--cuda-graphs")
    assert "CUDA graphs need a GPU" in message


def test_streams_give_what_step_by_step_gives():
    detector = detector_from(some_weights())
    stream = detector.frame_stream(2, HEIGHT, WIDTH, confidence_threshold=0.3, nms_threshold=0.5)
    state = detector.initial_state(2, HEIGHT, WIDTH)
    for frame in some_frames(3, lanes=2):
        with torch.inference_mode():
            expected, state = detector.detect(
                frame, state, confidence_threshold=0.3, nms_threshold=0.5
            )
        for rows, others in zip(stream.detect(frame), expected, strict=True):
            torch.testing.assert_close(rows, others, rtol=1e-4, atol=1e-3)


@pytest.mark.slow
@needs_emulation
def test_streaming_on_a_gpu_waits_once_per_call(gpu):
    frames = some_frames(4)
    expected = detector_from(some_weights()).frame_stream(1, HEIGHT, WIDTH)
    expected_rows = [rows for frame in frames for rows in expected.detect(frame)]
    detector = detector_from(some_weights(), device=gpu.device, precision=Precision.fp32)
    stream = detector.frame_stream(1, HEIGHT, WIDTH)
    actual = []
    for frame in frames:
        with gpu.counting() as counts:
            actual += stream.detect(frame)
        assert counts.waits.total() == 1, counts.table()
        assert counts.copied_bytes("H2D", pinned=False) == 0, counts.table()
    state = detector.initial_state(1, HEIGHT, WIDTH)
    frame = frames[0].to(gpu.device)
    with torch.inference_mode():
        with gpu.counting() as counts:
            _, state = detector.step(frame, state)
        assert counts.waits.total() == 0, counts.table()
        with gpu.counting() as counts:
            detector.detect(frame, state)
        assert counts.waits.total() == 1, counts.table()
    for rows, others in zip(actual, expected_rows, strict=True):
        torch.testing.assert_close(rows, others, rtol=1e-4, atol=1e-3)


@pytest.mark.slow
@needs_emulation
def test_infer_on_a_gpu_waits_once_per_call(gpu):
    frames = [(50_000 * (i + 1), frame[0].numpy()) for i, frame in enumerate(some_frames(6))]
    options = {
        "confidence": 0.2,
        "nms": 0.45,
        "frames_per_call": 3,
        "downsample": 4,
        "sensor": (4 * HEIGHT, 4 * WIDTH),
    }
    expected = list(detect(detector_from(some_weights()), frames, clock=WorkTimer(), **options))
    detector = detector_from(some_weights(), device=gpu.device, precision=Precision.fp32)
    with gpu.counting() as counts:
        actual = list(detect(detector, frames, clock=WorkTimer(), **options))
    assert counts.waits.total() == 2, counts.table()
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.end_us == theirs.end_us
        np.testing.assert_allclose(ours.boxes["x"], theirs.boxes["x"], rtol=1e-3, atol=1e-2)
