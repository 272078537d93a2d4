"""The measurements of `evspan bench`: FLOPs against formulas, peaks, counts, and the limiting resource."""

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from evspan.conf.errors import ConfigError
from evspan.conf.schema.prep import DatasetConfig
from evspan.conf.schema.training import (
    BackboneConfig,
    FpnConfig,
    ModelConfig,
    Precision,
    TrainingConfig,
)
from evspan.pipeline.benchmark import peaks, simulated
from evspan.pipeline.benchmark.limits import Resource, StepBalance, limiting_resource
from evspan.pipeline.benchmark.loading import (
    LoaderSpeed,
    measure_loader,
    thread_numbers,
    threads_needed,
)
from evspan.pipeline.benchmark.operations import (
    CPU_PRODUCTS,
    GPU_PRODUCTS,
    count_operations,
    gpu_operations,
    products_ms,
)
from evspan.pipeline.benchmark.step import PARTS, UPDATE, StepLoop
from evspan.pipeline.benchmark.streaming import first_frames
from evspan.pipeline.benchmark.timing import PartClock, Spread
from evspan.pipeline.data.datasets import open_dataset
from evspan.pipeline.data.loader import Loader
from evspan.pipeline.data.plan import SamplingPlan
from evspan.pipeline.model.detector import Detector
from support.counted_flops import detector_flops, flop_counter
from support.counted_step import StepOptions, open_trainer, step_counts, write_shards
from support.emulated_device import is_supported

SHARD_FRAMES = {"train": [12, 8], "val": [9]}
MICRO = ModelConfig(backbone=BackboneConfig(embed_dim=16, dim_head=8), fpn=FpnConfig(depth=0.33))
DEVICES = pytest.mark.parametrize("device", ["cpu", "meta"])


def forward_and_backward(call, *tensors: torch.Tensor) -> tuple[int, int]:
    """(FLOPs of the forward pass, of the backward pass) with gradients of all tensors."""
    inputs = [t.requires_grad_() for t in tensors]
    counter = flop_counter()
    with counter:
        output = call(*inputs)
        forward = counter.get_total_flops()
        output.sum().backward()
    return forward, counter.get_total_flops() - forward


# -- FLOPs -------------------------------------------------------------------------------------------
@DEVICES
def test_a_convolution_counts_its_definition(device):
    x = torch.ones(2, 6, 12, 20, device=device)
    weight = torch.ones(10, 6, 3, 3, device=device)
    forward, backward = forward_and_backward(
        lambda x, w: F.conv2d(x, w, stride=2, padding=1), x, weight
    )
    output_values = 2 * 10 * 6 * 10
    assert forward == output_values * 6 * 9 * 2
    assert backward == 2 * forward


@DEVICES
def test_attention_counts_its_definition(device):
    batch, heads, queries, keys, channels = 3, 2, 40, 48, 8
    q = torch.ones(batch, heads, queries, channels, device=device)
    k, v = (torch.ones(batch, heads, keys, channels, device=device) for _ in range(2))
    forward, backward = forward_and_backward(F.scaled_dot_product_attention, q, k, v)
    scores = 2 * batch * heads * queries * keys * channels
    assert forward == 2 * scores  # and the weighted values
    assert backward == 2 * forward


@DEVICES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_lstm_counts_its_definition(device, dtype):
    steps, sequences, inputs, hidden = 4, 30, 16, 24

    def tensor(*shape: int) -> torch.Tensor:
        return torch.ones(shape, device=device, dtype=dtype)

    def lstm(x, h, c, of_input, of_hidden, b1, b2):
        weights = [of_input, of_hidden, b1, b2]
        return torch.lstm(x, [h, c], weights, True, 1, 0.0, True, False, False)[0]

    forward, backward = forward_and_backward(
        lstm,
        tensor(steps, sequences, inputs),
        *(tensor(1, sequences, hidden) for _ in range(2)),
        tensor(4 * hidden, inputs),
        tensor(4 * hidden, hidden),
        *(tensor(4 * hidden) for _ in range(2)),
    )
    assert forward == steps * sequences * 2 * 4 * hidden * (inputs + hidden)
    assert backward == 2 * forward


def test_a_cudnn_lstm_counts_its_definition():
    counter = flop_counter()
    formula = counter.flop_registry[torch.ops.aten._cudnn_rnn]
    x = torch.empty(4, 30, 16, device="meta")
    weights = [torch.empty(s, device="meta") for s in [(96, 16), (96, 24), (96,), (96,)]]
    assert formula(x, weights, 4, out_val=None) == 4 * 30 * 2 * 96 * (16 + 24)


@pytest.mark.parametrize(
    ("call", "flops"),
    [
        (lambda: torch.ones(3, 5).addmm_(torch.ones(3, 4), torch.ones(4, 5)), 2 * 3 * 4 * 5),
        (
            lambda: torch.ones(2, 3, 5).baddbmm_(torch.ones(2, 3, 4), torch.ones(2, 4, 5)),
            2 * 2 * 3 * 4 * 5,
        ),
        (
            lambda: torch.ones(3, 5).addbmm_(torch.ones(2, 3, 4), torch.ones(2, 4, 5)),
            2 * 2 * 3 * 4 * 5,
        ),
        (
            lambda: torch.addmm(
                torch.ones(3, 5), torch.ones(3, 4), torch.ones(4, 5), out=torch.ones(3, 5)
            ),
            2 * 3 * 4 * 5,
        ),
        (lambda: torch.addmv(torch.ones(3), torch.ones(3, 4), torch.ones(4)), 2 * 3 * 4),
        (lambda: torch.ones(3, 4).mv(torch.ones(4)), 2 * 3 * 4),
    ],
)
def test_products_in_place_are_counted(call, flops):
    counter = flop_counter()
    with counter:
        call()
    assert counter.get_total_flops() == flops


def test_the_parts_of_the_detector_count_their_formulas():
    steps, lanes, height, width = 3, 2, 64, 128
    flops = detector_flops(MICRO, (steps, lanes, 20, height, width))
    parts = {part.name: part for part in flops.parts}
    frames = steps * lanes
    dims = MICRO.backbone.dims
    for stage, inputs in enumerate([20, *dims[:-1]], 1):
        c = dims[stage - 1]
        stride = 2 ** (stage + 1)
        cells = frames * (height // stride) * (width // stride)
        kernel = 49 if stage == 1 else 9
        group = (height // 64) * (width // 64)  # cells that attend to each other
        linear = 2 * c * (3 * c + c + 2 * 4 * c)  # queries, keys, values; projection; MLP
        attention = 2 * 2 * group * c
        spatial = cells * (2 * kernel * inputs * c + 2 * (linear + attention))
        assert parts[f"stage {stage} spatial"].forward == spatial
        first = 2 * kernel * inputs * c * cells if stage == 1 else 0  # frames have no gradient
        assert parts[f"stage {stage} spatial"].backward == 2 * spatial - first
        lstm = cells * 2 * 2 * c * 4 * c
        assert parts[f"stage {stage} LSTM"].forward == lstm
        # The zero state before the first frame has no gradient.
        assert parts[f"stage {stage} LSTM"].backward == 2 * lstm - lstm // 2 // steps
    for name in ("neck", "head"):
        assert parts[name].backward == 2 * parts[name].forward > 0


@pytest.mark.slow
def test_neck_and_head_count_labelled_frames_only():
    shape = (2, 2, 20, 64, 64)
    labelled = torch.zeros(2, 2, dtype=torch.bool)
    labelled[1, 0] = True
    parts = {p.name: p.total for p in detector_flops(MICRO, shape).parts}
    some = {p.name: p.total for p in detector_flops(MICRO, shape, labelled).parts}
    assert some["head"] * 4 == parts["head"]
    assert some["neck"] * 4 == parts["neck"]
    assert some["stage 3 LSTM"] == parts["stage 3 LSTM"]


def test_the_cpu_kernels_count_what_the_meta_device_counts():
    model = Detector(MICRO, 20).eval()
    frames = torch.zeros(2, 1, 20, 64, 64, dtype=torch.uint8)
    counter = flop_counter()
    with torch.no_grad(), counter:
        model(frames, model.initial_state(1, 64, 64))
    expected = detector_flops(MICRO, tuple(frames.shape)).forward
    # The CPU's blocks fold norms into the linear layers: a few products with vectors.
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.01)


# -- peaks -------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "precision", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989.5),
        ("NVIDIA H100 80GB HBM3", "fp32", 67),
        ("NVIDIA H100 PCIe", "bf16", 756.5),
        ("NVIDIA H100 NVL", "bf16", 835.5),
        ("NVIDIA H200", "bf16", 989.5),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("NVIDIA A100-PCIE-40GB", "fp32", 19.5),
        ("NVIDIA L40S", "bf16", 362),
        ("NVIDIA L40S", "tf32", 183),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2),
        ("NVIDIA GeForce RTX 3090", "bf16", 71),
        ("Tesla V100-SXM2-32GB", "fp32", 15.7),
        ("Tesla V100-PCIE-16GB", "fp32", 14),
        ("Tesla T4", "fp32", 8.1),
    ],
)
def test_peaks_of_data_sheets(name, precision, tflops):
    assert peaks.gpu_peak(name, Precision[precision]).flops == tflops * 1e12


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16"),
        ("NVIDIA A10G", "bf16"),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bf16"),  # a seventh of the GPU
        ("AMD Instinct MI300X", "bf16"),
        ("Tesla V100-SXM2-32GB", "bf16"),
    ],
)
def test_an_unknown_peak_is_refused_with_the_key(name, precision):
    with pytest.raises(
        ConfigError, match=f"{name} in {precision} is not known. Set training.peak_tflops"
    ):
        peaks.gpu_peak(name, Precision[precision])


def test_a_given_peak_replaces_the_table(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 PCIe")
    device = torch.device("cuda")
    assert peaks.device_peak(device, Precision.bf16).flops == 756.5e12
    assert peaks.device_peak(device, Precision.bf16, 100.0).flops == 100e12


def test_a_cpu_is_measured(monkeypatch):
    monkeypatch.setattr(peaks, "MATRIX", 128)
    monkeypatch.setattr(peaks, "MEASURE_S", 0.01)
    peaks._measured_product.cache_clear()
    peak = peaks.device_peak(torch.device("cpu"), Precision.fp32)
    assert 1e8 < peak.flops < 1e14
    assert peak.source == "measured product of 128 x 128 matrices"
    assert peaks.device_peak(torch.device("cpu"), Precision.fp32) == peak  # measured once
    peaks._measured_product.cache_clear()


def test_a_cpu_is_measured_in_the_precision_of_training(monkeypatch):
    measured = []
    monkeypatch.setattr(
        peaks, "measured_product", lambda device, dtype: measured.append(dtype) or 1.0
    )
    for precision in (Precision.fp32, Precision.tf32, Precision.bf16):
        peaks.device_peak(torch.device("cpu"), precision)
    assert measured == [torch.float32, torch.float32, torch.bfloat16]


# -- times and counts --------------------------------------------------------------------------------
def test_a_spread_has_median_and_percentiles():
    spread = Spread.of([float(i) for i in range(101)])
    assert (spread.low, spread.median, spread.high, spread.count) == (5.0, 50.0, 95.0, 101)


class Event:
    """A CUDA event that is reached at the times of `now`, in ms."""

    now = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = Event.now

    def elapsed_time(self, end: "Event") -> float:
        return end.at - self.at


def test_a_clock_adds_up_parts_of_the_same_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    clock = PartClock(torch.device("cuda"))
    for at, part in [(1, "a"), (3, "b"), (10, "a"), (14, ""), (20, "b"), (21, "")]:
        Event.now = float(at)
        clock.mark(part)
    assert clock.read_ms() == {"a": 2 + 4, "b": 7 + 1}
    assert clock.read_ms() == {}


def test_operators_and_waits_are_counted():
    x = torch.ones(4, 4)
    mask = torch.eye(4, dtype=torch.bool)

    def work():
        y = (x @ x).t() + 1  # a product and a sum; transposing is a view
        y[mask]
        return float(y[0, 0])

    operations = count_operations(work, torch.device("cpu"))
    assert operations.launches == 4  # mm, add, index, _local_scalar_dense
    assert operations.wait_places == {"aten::index": 1, "aten::_local_scalar_dense": 1}
    assert operations.waits == 2
    assert 0 < operations.product_ms < operations.busy_ms


def test_a_profile_of_a_gpu_is_counted():
    host = SimpleNamespace(name="CPU")
    device = SimpleNamespace(name="CUDA")

    def event(key, count, device_type, us=0.0, label=False):
        return SimpleNamespace(
            key=key,
            count=count,
            device_type=device_type,
            self_device_time_total=us,
            is_user_annotation=label,
        )

    events = [
        event("cudaLaunchKernel", 40, host),
        event("cudaLaunchKernelExC", 2, host),
        event("cudaMemcpyAsync", 3, host),
        event("cudaStreamSynchronize", 2, host),
        event("cudaDeviceSynchronize", 2, host),
        event("aten::mm", 5, host, us=900.0),
        event("sm90_xmma_gemm_bf16bf16_bf16f32", 5, device, us=3000.0),
        event("vectorized_elementwise_kernel", 30, device, us=1000.0),
        event("Memcpy HtoD (Pinned -> Device)", 3, device, us=7000.0),
        event("Optimizer.step#AdamW.step", 1, device, us=9000.0, label=True),
    ]
    of_nothing = [event("cudaDeviceSynchronize", 2, host)]
    operations = gpu_operations(events, of_nothing, {"loss.py:7": 2})
    assert (operations.launches, operations.copies, operations.waits) == (42, 3, 2)
    assert (operations.busy_ms, operations.product_ms) == (4.0, 3.0)
    assert operations.product_fraction == 0.75


@pytest.mark.parametrize(
    ("products", "names", "others"),
    [
        (
            GPU_PRODUCTS,
            [
                "ampere_sgemm_128x64_tn",
                "void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16>",
                "nvjet_tst_128x64_64x8",
                "void flash::flash_fwd_kernel<...>",
                "fmha_cutlassF_bf16_aligned_64x64_rf_sm80(...)",
                "sm80_xmma_wgrad_implicit_gemm_indexed",
                "void LSTM_elementWise_fp<__half>",
            ],
            [
                "void at::native::vectorized_elementwise_kernel",
                "convertTensor_kernel",
                "layer_norm_grad",
            ],
        ),
        (
            CPU_PRODUCTS,
            [
                "aten::mm",
                "aten::addmm",
                "aten::addmm_",
                "aten::bmm",
                "aten::baddbmm",
                "aten::addbmm_",
                "aten::addmv",
                "aten::mkldnn_convolution",
                "aten::_slow_conv2d_forward",
                "aten::mkldnn_rnn_layer_backward",
                "aten::_scaled_dot_product_flash_attention_for_cpu",
            ],
            [
                "aten::add",
                "aten::mul",
                "aten::native_layer_norm",
                "aten::copy_",
                "aten::clamp_min_",
            ],
        ),
    ],
)
def test_kernels_of_products_are_recognised(products, names, others):
    assert products_ms(dict.fromkeys(names, 1.0), products) == len(names)
    assert products_ms(dict.fromkeys(others, 1.0), products) == 0


@pytest.mark.slow
@pytest.mark.skipif(not is_supported(), reason="torch before 2.9")
def test_measuring_adds_no_work_and_no_wait_to_a_step_on_a_gpu(tmp_path):
    options = StepOptions(precision="bf16")
    shards = write_shards(tmp_path / "shards", options)
    in_training = step_counts(options, shards, tmp_path / "run")
    with open_trainer(options, shards, tmp_path / "other_run") as (gpu, trainer):
        loop = StepLoop(trainer)
        for _ in range(2):
            loop.step()
            gpu.next_step()
        with gpu.counting() as measured:
            loop.step()
        loop.close()
        assert measured.operators.total() == in_training.operators.total() > 1000
        assert measured.waits.total() == in_training.waits.total()
        assert [t for t, _ in loop.clock.marks] == [*PARTS, UPDATE, UPDATE, ""]


# -- loader ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("cores", "numbers"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])]
)
def test_numbers_of_threads(cores, numbers):
    assert thread_numbers(cores) == numbers


@pytest.mark.parametrize(
    ("needed", "threads"),
    [(50, 1), (100, 1), (101, 2), (200, 2), (250, 3), (350, 4), (350.1, None)],
)
def test_threads_that_a_step_needs(needed, threads):
    speeds = [LoaderSpeed(1, 100.0), LoaderSpeed(2, 200.0), LoaderSpeed(4, 350.0)]
    assert threads_needed(speeds, needed) == threads


def test_more_threads_that_are_slower_do_not_count():
    speeds = [LoaderSpeed(1, 100.0), LoaderSpeed(2, 80.0), LoaderSpeed(4, 160.0)]
    assert threads_needed(speeds, 120.0) == 2
    assert threads_needed(speeds, 170.0) is None


@pytest.fixture
def train_data(shards):
    return open_dataset(DatasetConfig(root=str(shards)), "train")


@pytest.mark.parametrize("device", [torch.device("cpu"), torch.device("meta")], ids=str)
def test_the_loader_is_measured_and_left_as_it_was(train_data, device):
    training = TrainingConfig(batch_size=2, sequence_length=2, num_workers=3)
    plan = SamplingPlan(
        [r.frames for r in train_data.recordings],
        [r.labelled for r in train_data.recordings],
        lanes=2,
        sequence_length=2,
        sampling=training.sampling,
        seed=0,
    )
    loader = Loader(train_data, plan, range(2), range(2), training, seed=0)
    speeds = measure_loader(loader, device=device, seconds=0.02, threads=[1, 2])
    assert [speed.threads for speed in speeds] == [1, 2]
    assert all(speed.frames_per_s > 10 for speed in speeds)
    assert loader.config.num_workers == 3


def test_the_first_frames_of_a_recording(train_data):
    recording = train_data.recordings[0]
    part = first_frames(recording, 5)
    assert part.frames == 5
    assert [len(b) for b in part.boxes_of(0, 5)] == [len(b) for b in recording.boxes_of(0, 5)]
    assert first_frames(recording, 100).frames == recording.frames


# -- the limiting resource ---------------------------------------------------------------------------
GPU = StepBalance(
    step_ms=100.0,
    data_wait_ms=1.0,
    to_device_ms=1.0,
    exchange_ms=0.0,
    busy_ms=95.0,
    product_fraction=0.7,
    launches=2800,
    waits=0,
    memory_fraction=0.3,
    threads=2,
    threads_needed=1,
    loader_frames_per_s=3000.0,
    frames_per_s_needed=1200.0,
)
CPU = replace(GPU, busy_ms=None, memory_fraction=None)


@pytest.mark.parametrize(
    ("balance", "resource", "reason", "remedy"),
    [
        (GPU, "compute", "products take 70%", "more GPUs"),
        (CPU, "compute", "products take 70%", "use a GPU"),
        (
            replace(GPU, product_fraction=0.3),
            "memory",
            "70% of the device's time is not",
            "training.compile=true",
        ),
        (
            replace(GPU, busy_ms=40.0),
            "host",
            "computes for 40% .* launches 2,800 kernels",
            "batch_size .memory is 30% used",
        ),
        (
            replace(GPU, busy_ms=40.0, waits=49),
            "host",
            "itself waits 49 times",
            "training.compile=true",
        ),
        (
            replace(GPU, busy_ms=40.0, memory_fraction=0.9),
            "host",
            "computes for 40%",
            "^launch less with training.cuda_graphs=true",
        ),
        (replace(GPU, to_device_ms=20.0), "copy", "20% of a step", "downsample"),
        (replace(GPU, exchange_ms=30.0), "exchange", "30% of a step", "parallel.sequence"),
        (
            replace(GPU, data_wait_ms=50.0, threads_needed=5),
            "loader",
            "50% .* 1200 frames/s",
            "num_workers=5 instead of 2",
        ),
        (
            replace(GPU, data_wait_ms=50.0, threads_needed=None),
            "loader",
            "50%",
            "all cores read 3000 frames/s",
        ),
        (replace(CPU, data_wait_ms=50.0, threads_needed=1), "loader", "50%", "share the cores"),
        (
            replace(GPU, data_wait_ms=50.0, busy_ms=10.0),
            "loader",
            "50%",
            "cores",
        ),  # the first in the way
    ],
)
def test_the_limiting_resource(balance, resource, reason, remedy):
    limit = limiting_resource(balance)
    assert limit.resource is Resource[resource]
    assert re.search(reason, limit.reason)
    assert re.search(remedy, limit.remedy)


# -- simulated data ----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("num_classes", "classes", "class_map"),
    [
        (8, ["ball", "box", "bar"], {0: 0, 1: 1, 2: 2}),
        (2, ["ball", "box"], {0: 0, 1: 1, 2: 1}),
        (1, ["ball"], {0: 0, 1: 0, 2: 0}),
    ],
)
def test_simulated_classes_fit_the_head(num_classes, classes, class_map, tmp_path, monkeypatch):
    simulated_sets = []
    configs = []
    monkeypatch.setattr(
        simulated, "write_recordings", lambda r, processes: simulated_sets.append(r) or []
    )
    monkeypatch.setattr(simulated, "prepare", configs.append)
    dataset = simulated.simulated_dataset(
        tmp_path, height=100, width=200, frames=60, split="test", num_classes=num_classes
    )
    assert dataset.classes == classes
    assert dataset.labels.class_map == class_map
    assert dataset.root == configs[0].output
    (recordings,) = simulated_sets
    assert {r.path.parent.name for r in recordings} == {"train", "val", "test"}
    assert all(r.seconds >= 60 * 0.05 and r.config.height == 200 for r in recordings)
