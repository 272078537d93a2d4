"""The formula of the detector's FLOPs against what torch's FlopCounterMode counts."""

import math
import re

import pytest
import torch
from evspan.conf.schema.training import (
    BackboneConfig,
    FpnConfig,
    ModelConfig,
    Precision,
    TrainingConfig,
)
from evspan.pipeline.benchmark.peaks import Peak
from evspan.pipeline.data.batch import Batch
from evspan.pipeline.engine.utilization import (
    MFU,
    TERAFLOPS,
    Utilization,
    flops_line,
    flops_table,
    training_peak,
)
from evspan.pipeline.model.detector import Detector
from evspan.pipeline.model.flops import (
    ATTENTION,
    NECK,
    NO_FRAMES,
    FrameCounts,
    ModelFlops,
    frame_counts,
)
from evspan.pipeline.parallel.world import World
from support.counted_flops import detector_flops

HEIGHT, WIDTH = 90, 250  # padded
MICRO = BackboneConfig(embed_dim=16, dim_head=8)
MODELS = {
    "plain": ModelConfig(backbone=MICRO, fpn=FpnConfig(depth=0.33)),
    "deeper, depthwise": ModelConfig(
        backbone=BackboneConfig(embed_dim=16, dim_head=16, num_blocks=[1, 2, 1, 1], dws_conv=True),
        fpn=FpnConfig(depth=0.67),
    ),
    "attention": ModelConfig(
        backbone=MICRO, fpn=FpnConfig(depth=0.33, enable_small_object_attention=True)
    ),
    "attention, 4 scales, window 4": ModelConfig(
        backbone=MICRO,
        fpn=FpnConfig(
            depth=0.33,
            in_stages=[1, 2, 3, 4],
            enable_small_object_attention=True,
            temporal_window=4,
        ),
    ),
    "spatial attention": ModelConfig(
        backbone=MICRO,
        fpn=FpnConfig(depth=0.33, enable_small_object_attention=True, attention_temporal=False),
    ),
}


def mask(looks_back: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Labelled frames of 2 lanes, of which some are not needed, and `following` as by default."""
    labelled = torch.zeros(7, 2, dtype=torch.bool)
    labelled[3, 0] = labelled[1, 1] = labelled[2, 1] = True
    return labelled, torch.ones(looks_back, 2, dtype=torch.bool)


def formula(model: ModelConfig, labelled: torch.Tensor, freeze: tuple[str, ...] = ()):
    with torch.device("meta"):
        detector = Detector(model, 4)
    for name, parameter in detector.named_parameters():
        parameter.requires_grad_(not name.startswith(freeze))
    following = torch.ones(model.fpn.looks_back, labelled.shape[1], dtype=torch.bool)
    return ModelFlops(detector, HEIGHT, WIDTH).of(frame_counts(labelled, following))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "freeze"),
    [
        *((name, ()) for name in MODELS),
        ("attention", ("backbone.",)),
        ("attention", ("backbone.stages.0", "fpn.")),
    ],
)
def test_the_formula_gives_what_the_counter_counts(name, freeze):
    model = MODELS[name]
    labelled, _ = mask(model.fpn.looks_back)
    counted = detector_flops(model, (*labelled.shape, 4, HEIGHT, WIDTH), labelled, freeze)
    flops = formula(model, labelled, freeze)
    assert (flops.frames, flops.labelled) == (counted.frames, counted.labelled) == (14, 3)
    counted_parts = {part.name: part for part in counted.parts}
    parts = {part.name: part for part in flops.parts}
    has_attention = model.fpn.enable_small_object_attention
    assert set(parts) - set(counted_parts) == ({ATTENTION} if has_attention else set())
    for part_name, expected in counted_parts.items():
        got = parts[part_name]
        if part_name == NECK and has_attention:
            # The counter has both as one part, and the product of two kernels once per call.
            attention = parts[ATTENTION]
            assert attention.forward > 0
            once, backward_once = kernel_products(model)
            if "fpn." in freeze:
                backward_once = 0
            assert got.forward + attention.forward == expected.forward - once
            assert got.backward + attention.backward == expected.backward - backward_once
        else:
            backward = expected.backward - depthwise_excess(model, part_name, labelled, freeze)
            assert (got.forward, got.backward) == (expected.forward, backward), part_name


def kernel_products(model: ModelConfig) -> tuple[int, int]:
    """FLOPs of a call, forward and backward, that multiply spatial attention's kernels and biases on 2 scales."""
    forward = 0
    backward = 0
    for stage in model.fpn.in_stages[:2]:
        channels = model.backbone.dims[stage - 1]
        per_scale = channels // 3
        middle = 3 * per_scale // 4
        kernels = 2 * 3 * middle * per_scale * channels * 9
        biases = 2 * middle * 3 * per_scale
        forward += kernels + biases
        backward += 2 * kernels + biases  # one of a bias's gradients is an outer product
    return forward, backward


def depthwise_excess(model: ModelConfig, part: str, labelled, freeze) -> int:
    """What FlopCounterMode counts too much: it takes a depthwise kernel's gradient for that of a dense one."""
    if not (model.backbone.dws_conv and part.endswith("LSTM")):
        return 0
    stage = int(part.split()[1])
    if any(f"backbone.stages.{stage - 1}.lstm".startswith(start) for start in freeze):
        return 0
    channels = model.backbone.dims[stage - 1]
    cells = (128 // 2 ** (stage + 1)) * (256 // 2 ** (stage + 1))
    forward = labelled.numel() * cells * 2 * channels * 9
    return (channels - 1) * forward


def test_frames_that_the_neck_runs_on_are_those_of_the_detector():
    for looks_back in (0, 1, 2, 3):
        labelled, following = mask(looks_back)
        rows = Detector.look_back_rows(labelled, following, looks_back)
        counts = frame_counts(labelled, following)
        assert counts == FrameCounts(14, len(rows.needed), 3, 2)
    assert frame_counts(labelled, following, begins=False).sequences == 0


def test_flops_of_several_micro_batches_add_up():
    labelled, following = mask(2)
    counts = frame_counts(labelled, following)
    with torch.device("meta"):
        flops = ModelFlops(Detector(MODELS["attention"], 4), HEIGHT, WIDTH)
    assert flops.of(counts + counts).total == 2 * flops.of(counts).total
    assert flops.of(NO_FRAMES).total == 0


# -- by time, and against the peak ---------------------------------------------------------------------
def batch_of(labelled: torch.Tensor, following: torch.Tensor) -> Batch:
    unused = torch.empty(0)
    return Batch(unused, unused, labelled, following, unused, unused, unused)


@pytest.mark.slow
def test_mfu_is_the_flops_of_the_batches_by_time_and_peak():
    labelled, following = mask(2)
    with torch.device("meta"):
        flops = ModelFlops(Detector(MODELS["attention"], 4), HEIGHT, WIDTH)
    utilization = Utilization(flops, Peak(5e9, "here"), begins=True)
    for _ in range(3):
        utilization.add(batch_of(labelled, following))
    total = 3 * detector_flops(MODELS["attention"], (7, 2, 4, HEIGHT, WIDTH), labelled).total
    values = utilization.read(0.5)
    assert values[TERAFLOPS] == pytest.approx(total / 0.5 / 1e12, rel=0.01)
    assert values[MFU] == pytest.approx(total / 0.5 / 5e9, rel=0.01)
    assert utilization.read(0.5) == {TERAFLOPS: 0.0, MFU: 0.0}  # since the last reading


def test_an_unknown_peak_is_logged_and_gives_no_mfu(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Fast 9000")
    world = World(0, 1, 0, 1, torch.device("cuda", 0))
    caplog.set_level("INFO", logger="evspan")
    training = TrainingConfig(precision=Precision.bf16)
    assert training_peak(training, world, steps=100) is None
    assert "MFU is not reported: the peak of Fast 9000 in bf16 is not known" in caplog.text
    known = TrainingConfig(precision=Precision.bf16, peak_tflops=200)
    assert training_peak(known, world, steps=100) == Peak(200e12, "training.peak_tflops")
    assert training_peak(known, world, steps=5) is None  # too few to be of use
    with torch.device("meta"):
        flops = ModelFlops(Detector(MODELS["plain"], 4), HEIGHT, WIDTH)
    values = Utilization(flops, None, begins=True).read(1.0)
    assert math.isnan(values[MFU])


def test_flops_are_summarised_by_part():
    with torch.device("meta"):
        flops = ModelFlops(Detector(MODELS["attention"], 4), HEIGHT, WIDTH)
    of_frame = flops.of(FrameCounts(1, 1, 1, 0))
    line = flops_line(of_frame, Peak(98.2e9, "measured"))
    parts = dict(re.findall(r"([a-z][a-z -]*) (\d+) %", line))
    assert [*parts] == ["backbone", "neck", "small-object attention", "head"]
    assert sum(int(percent) for percent in parts.values()) == pytest.approx(100, abs=2)
    assert line.startswith(f"{of_frame.total / 1e9:.3g} GFLOP a labelled frame")
    assert line.endswith("a rank's peak is 98.2 GFLOP/s (measured)")
    rows = flops_table(of_frame).splitlines()
    assert len(rows) == 2 + 8 + 3 + 1
    assert (
        rows[-1] == f"| all | {of_frame.forward / 1e9:.3g} | {of_frame.total / 1e9:.3g} | 100 % |"
    )
