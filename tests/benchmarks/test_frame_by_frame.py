"""The benchmarks' frame-by-frame detector is the same network as ours and the published one."""

import numpy as np
import pytest
import torch
from evspan.conf.schema.training import BackboneConfig, HeadConfig, ModelConfig
from evspan.pipeline.model.detector import Detector
from evspan.pipeline.model.loss import detection_loss
from frame_by_frame import FrameByFrame

CHANNELS = 4
H, W = 60, 120  # padded to 64 x 128
STEPS = 5
LANES = 2


def relative(got, expected):
    return ((got - expected).norm() / expected.norm().clamp(min=1e-12)).item()


def both_sides():
    torch.manual_seed(0)
    backbone = BackboneConfig(embed_dim=8, dim_head=4, ls_init_value=0.5, num_blocks=[1, 2, 1, 1])
    config = ModelConfig(backbone=backbone, head=HeadConfig(num_classes=2))
    ours = Detector(config, CHANNELS)
    theirs = FrameByFrame(config, CHANNELS)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def some_frames(seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 11, (STEPS, LANES, CHANNELS, H, W), dtype=torch.uint8, generator=g)


def some_boxes(counts, most):
    """(n, most, 5) class, cx, cy, w, h; zeros beyond each count."""
    rng = np.random.default_rng(0)
    boxes = torch.zeros(len(counts), most, 5)
    for row, count in zip(boxes, counts, strict=True):
        row[:count, 0] = torch.from_numpy(rng.integers(0, 2, count))
        row[:count, 1] = torch.from_numpy(rng.uniform(5, W - 5, count))
        row[:count, 2] = torch.from_numpy(rng.uniform(5, H - 5, count))
        row[:count, 3:] = torch.from_numpy(rng.uniform(6, 50, (count, 2)))
    return boxes


@pytest.mark.slow
@pytest.mark.parametrize("counts", [(4, 0, 1, 7), (0, 0, 0, 0)], ids=["some boxes", "no boxes"])
def test_same_loss_gradients_and_statistics(counts):
    ours, theirs = both_sides()
    lanes = [[], [0, 1], [], [1], [0]]
    boxes = some_boxes(counts, 7)
    labelled = torch.tensor([[lane in frame for lane in range(LANES)] for frame in lanes])
    raw, _ = ours(some_frames(), ours.initial_state(LANES, H, W), labelled=labelled)
    expected = detection_loss(
        raw, boxes, torch.tensor(counts), ours.geometry(H, W), ours.config.head
    )
    expected.total.backward()
    got, _ = theirs.losses(some_frames(), None, lanes, boxes)
    got["loss"].backward()
    for name, value in (
        ("loss", expected.total),
        ("iou_loss", expected.iou),
        ("conf_loss", expected.objectness),
        ("cls_loss", expected.classes),
    ):
        assert got[name].item() == pytest.approx(value.item(), rel=1e-4), name
    mine = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        assert relative(parameter.grad, mine[name].grad) < 1e-4, name
    buffers = dict(ours.named_buffers())
    for name, buffer in theirs.named_buffers():
        torch.testing.assert_close(buffer, buffers[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.slow
def test_same_predictions_frame_by_frame_with_the_state_carried():
    ours, theirs = (model.eval() for model in both_sides())
    state = ours.initial_state(LANES, H, W)
    other = None
    with torch.inference_mode():
        for frames in some_frames(seed=1):
            expected, state = ours.step(frames, state)
            got, other = theirs.step(frames, other)
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_the_published_numbers(parity_dir):
    parity = {p.stem: dict(np.load(p)) for p in (parity_dir / "parity_small").glob("*.npz")}
    theirs = FrameByFrame(ModelConfig(backbone=BackboneConfig(embed_dim=16, dim_head=8)), 20)
    theirs.load_state_dict({k: torch.from_numpy(v) for k, v in parity["weights"].items()})
    inputs = parity["train_input"]
    expected = parity["train_expected"]
    positions = list(
        zip(inputs["target_frame_t"].tolist(), inputs["target_sample_b"].tolist(), strict=True)
    )
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    lanes = [[b for t, b in sorted(positions) if t == frame] for frame in range(4)]
    losses, _ = theirs.losses(
        torch.from_numpy(inputs["events_uint8"]),
        None,
        lanes,
        torch.from_numpy(inputs["targets"])[order],
    )
    for name, got in losses.items():
        assert got.item() == pytest.approx(expected[f"loss/{name}"].item(), rel=1e-4), name
    losses["loss"].backward()
    for name, parameter in theirs.named_parameters():
        assert relative(parameter.grad, torch.from_numpy(parity["train_grads"][name])) < 1e-4, name


def test_what_it_does_not_support_is_refused():
    config = ModelConfig()
    config.fpn.enable_small_object_attention = True
    with pytest.raises(ValueError, match="without attention"):
        FrameByFrame(config, CHANNELS)
