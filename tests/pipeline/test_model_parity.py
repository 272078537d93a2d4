"""The detector against numbers of the published implementation: forward, losses, assignments, every gradient."""

import numpy as np
import pytest
import torch
from evspan.conf.schema.training import BackboneConfig, HeadConfig, ModelConfig
from evspan.pipeline.model.assignment import assign
from evspan.pipeline.model.detector import Detector
from evspan.pipeline.model.loss import detection_loss
from evspan.pipeline.model.postprocess import detections
from evspan.pipeline.model.state import state_tensors


@pytest.fixture(scope="module")
def parity(parity_dir):
    folder = parity_dir / "parity_small"
    return {p.stem: dict(np.load(p)) for p in folder.glob("*.npz")}


@pytest.fixture
def detector(parity):
    model = Detector(
        ModelConfig(
            backbone=BackboneConfig(embed_dim=16, dim_head=8), head=HeadConfig(num_classes=3)
        ),
        20,
    )
    model.load_state_dict({k: torch.from_numpy(v) for k, v in parity["weights"].items()})
    return model


def close(actual, expected, tolerance):
    np.testing.assert_allclose(np.asarray(actual.detach()), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("together", [True, False], ids=["all frames at once", "frame by frame"])
def test_forward(detector, parity, together):
    frames = torch.from_numpy(parity["eval_input"]["events_uint8"])
    detector.eval()
    state = detector.initial_state(1, 192, 320)
    start, no_start, labelled = (
        torch.tensor([True]),
        torch.tensor([False]),
        torch.ones(4, 1, dtype=torch.bool),
    )
    with torch.no_grad():
        if together:
            raw, state = detector(frames, state, starts=start, labelled=labelled)
        else:
            parts = []
            for t in range(4):
                part, state = detector(
                    frames[t : t + 1], state, starts=no_start if t else start, labelled=labelled[:1]
                )
                parts.append(part)
                for k, stage in enumerate(state.stages, 1):
                    close(stage.hidden, parity["eval_states"][f"t{t}.stage{k}.h"], 1e-4)
                    close(stage.cell, parity["eval_states"][f"t{t}.stage{k}.c"], 1e-4)
            raw = torch.cat(parts)
    decoded = detector.decode(raw, 192, 320)
    found = detections(decoded, confidence_threshold=0.1, nms_threshold=0.45, max_detections=10_000)
    for t in range(4):
        expected = parity["eval_outputs"][f"t{t}.decoded"][0]
        close(decoded[t, :, 4:], expected[:, 4:], 1e-4)
        np.testing.assert_allclose(
            decoded[t, :, :4], expected[:, :4], rtol=1e-5, atol=1e-3
        )  # pixels; float noise is 4e-4
        np.testing.assert_allclose(
            found[t],
            parity["eval_outputs"][f"t{t}.detections_conf0.1_nms0.45"],
            rtol=1e-5,
            atol=2e-3,
        )


def test_neck(detector, parity):
    detector.eval()
    for t in range(4):
        stages = [torch.from_numpy(parity["eval_states"][f"t{t}.stage{k}.h"]) for k in (2, 3, 4)]
        with torch.no_grad():
            out = detector.fpn(stages, lambda xs: [(x, None) for x in xs])
        for i, stride in enumerate((8, 16, 32)):
            close(out[i], parity["eval_outputs"][f"t{t}.fpn{i}_stride{stride}"], 1e-4)


def test_training_step(detector, parity):
    inputs, expected = parity["train_input"], parity["train_expected"]
    frames = torch.from_numpy(inputs["events_uint8"])
    places = list(
        zip(inputs["target_frame_t"].tolist(), inputs["target_sample_b"].tolist(), strict=True)
    )
    order = sorted(range(len(places)), key=lambda i: places[i])  # ours come in (t, b) order
    labelled = torch.zeros(4, 2, dtype=torch.bool)
    for t, b in places:
        labelled[t, b] = True
    boxes = torch.from_numpy(inputs["targets"])[order]
    counts = (boxes.abs().sum(-1) > 0).sum(1)
    detector.train()
    raw, state = detector(
        frames,
        detector.initial_state(2, 192, 320),
        starts=torch.tensor([True, True]),
        labelled=labelled,
    )
    geometry = detector.geometry(192, 320)

    assignment = assign(raw, boxes, counts, geometry, detector.config.head)
    for row, i in enumerate(order):
        cells = assignment.foreground[row].nonzero()[:, 0]
        np.testing.assert_array_equal(cells, expected[f"assign/{i}/fg_anchor_idx"])
        np.testing.assert_array_equal(assignment.box[row, cells], expected[f"assign/{i}/gt_idx"])
        close(assignment.iou[row, cells], expected[f"assign/{i}/iou"], 1e-5)

    losses = detection_loss(raw, boxes, counts, geometry, detector.config.head)
    for name, actual in (
        ("loss", losses.total),
        ("iou_loss", losses.iou),
        ("conf_loss", losses.objectness),
        ("cls_loss", losses.classes),
    ):
        assert actual.item() == pytest.approx(expected[f"loss/{name}"].item(), rel=1e-4), name
    losses.total.backward()
    for name, parameter in detector.named_parameters():
        wanted = torch.from_numpy(parity["train_grads"][name])
        error = (parameter.grad - wanted).norm() / wanted.norm().clamp(min=1e-12)
        assert error < 1e-4, f"{name}: {error}"
    for name, buffer in detector.named_buffers():
        if f"bn_after/{name}" in expected:
            np.testing.assert_allclose(
                buffer, expected[f"bn_after/{name}"], rtol=1e-4, atol=1e-5, err_msg=name
            )
    for k, (hidden, cell) in enumerate(state.stages, 1):
        assert hidden.sum().item() == pytest.approx(
            expected[f"final_state/stage{k}/h_sum"].item(), rel=1e-3, abs=1e-2
        )
        assert cell.sum().item() == pytest.approx(
            expected[f"final_state/stage{k}/c_sum"].item(), rel=1e-3, abs=1e-2
        )
    assert all(t.isfinite().all() for t in state_tensors(state))


def test_parameter_names_are_the_published_ones(parity_dir):
    listed = {}
    for line in (parity_dir / "rvt_tiny_gen4_state_dict.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, shape, _ = line.split("\t")
            listed[name] = tuple(int(n) for n in shape.strip("()").split(",") if n.strip())
    with torch.device("meta"):
        ours = Detector(ModelConfig(), 20).state_dict()
    assert {k: tuple(v.shape) for k, v in ours.items()} == listed


@pytest.mark.parametrize(
    ("embed", "head", "depth", "count"),
    [(32, 32, 0.33, 4_405_336), (48, 24, 0.33, 9_870_456), (64, 32, 0.67, 18_536_856)],
)
def test_parameter_counts(embed, head, depth, count):
    config = ModelConfig(backbone=BackboneConfig(embed_dim=embed, dim_head=head))
    config.fpn.depth = depth
    with torch.device("meta"):
        assert sum(p.numel() for p in Detector(config, 20).parameters()) == count
