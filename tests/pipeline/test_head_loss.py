"""Assignment and losses against plain per-frame definitions; size weights; suppression; global batch norm."""

import math

import pytest
import torch
import torch.nn.functional as F
from evspan.conf.schema.training import HeadConfig, SizeWeighting
from evspan.pipeline.benchmark.operations import OperatorCounter
from evspan.pipeline.model import assignment as assignment_module
from evspan.pipeline.model.assignment import assign
from evspan.pipeline.model.head import YOLOXHead, cells, decode
from evspan.pipeline.model.loss import detection_loss, size_weights
from evspan.pipeline.model.norm import ONE_RANK, BatchNorm2d, global_batch_norms
from evspan.pipeline.model.postprocess import detections, nms
from torch._subclasses.fake_tensor import is_fake

GEOMETRY = ((8, 12, 8), (4, 6, 16), (2, 3, 32))
CELLS = sum(h * w for h, w, _ in GEOMETRY)
CLASSES = 3


def some_batch(frames, most, seed=0):
    g = torch.Generator().manual_seed(seed)
    raw = torch.randn(frames, CELLS, 5 + CLASSES, generator=g)
    counts = torch.randint(0, most + 1, (frames,), generator=g)
    boxes = torch.rand(frames, most, 5, generator=g) * torch.tensor(
        [0, 96, 64, 50, 50]
    ) + torch.tensor([0, 0, 0, 4.0, 4.0])
    boxes[..., 0] = torch.randint(0, CLASSES, (frames, most), generator=g)
    return raw, boxes, counts


def iou_of(a, b):
    wide = [
        min(a[i] + a[i + 2] / 2, b[i] + b[i + 2] / 2)
        - max(a[i] - a[i + 2] / 2, b[i] - b[i + 2] / 2)
        for i in (0, 1)
    ]
    shared = max(wide[0], 0) * max(wide[1], 0)
    return shared / (a[2] * a[3] + b[2] * b[3] - shared)


def decode_one_by_one(raw):
    out, cell = raw.clone(), 0
    for h, w, stride in GEOMETRY:
        for i in range(h):
            for j in range(w):
                out[:, cell, 0] = (raw[:, cell, 0] + j) * stride
                out[:, cell, 1] = (raw[:, cell, 1] + i) * stride
                out[:, cell, 2:4] = raw[:, cell, 2:4].exp() * stride
                out[:, cell, 4:] = 1 / (1 + (-raw[:, cell, 4:]).exp())
                cell += 1
    return out


def logarithm(x):
    return math.log(x) if x > math.exp(-100) else -100.0


def assign_one_by_one(raw, boxes, config):
    """SimOTA of one frame (Ge et al. 2021): {cell: (box, iou)}, of equal costs the first cell and the first box; and by how much
    its closest decision was taken, equality aside."""
    places = [
        ((j + 0.5) * s, (i + 0.5) * s, s)
        for h, w, s in GEOMETRY
        for i in range(h)
        for j in range(w)
    ]
    predicted, boxes = decode_one_by_one(raw[None])[0].tolist(), boxes.tolist()
    near = [
        [max(abs(x - b[1]), abs(y - b[2])) < config.center_radius * s for x, y, s in places]
        for b in boxes
    ]
    candidates = [c for c in range(len(places)) if any(row[c] for row in near)]
    scores = {c: [math.sqrt(k * predicted[c][4]) for k in predicted[c][5:]] for c in candidates}
    costs, chosen, slack = [], {}, [math.inf]
    for g, box in enumerate(boxes):
        ious, cost = {c: iou_of(box[1:], predicted[c][:4]) for c in candidates}, {}
        for c in candidates:
            bce = sum(-logarithm(s if k == int(box[0]) else 1 - s) for k, s in enumerate(scores[c]))
            cost[c] = bce - 3 * math.log(ious[c] + 1e-8) + 1e6 * (not near[g][c])
        costs.append(cost)
        total = sum(sorted(ious.values(), reverse=True)[: config.candidate_top_k])
        k, order = max(1, int(total)), sorted(candidates, key=cost.__getitem__)
        slack += [abs(total - round(total))] * (round(total) > 1)
        slack += [cost[b] - cost[a] for a, b in zip(order[k - 1 :], order[k : k + 1], strict=False)]
        for c in order[:k]:
            chosen.setdefault(c, []).append(g)
    best = {}
    for c, gs in chosen.items():
        order = sorted(range(len(boxes)), key=lambda g: costs[g][c])
        best[c] = gs[0] if len(gs) == 1 else order[0]
        if len(gs) > 1:
            slack.append(costs[order[1]][c] - costs[order[0]][c])
    slack = min(s for s in slack if s > 0)
    return {c: (g, iou_of(boxes[g][1:], predicted[c][:4])) for c, g in best.items()}, slack


def assert_assigned_alike(raw, boxes, counts, config=None):
    """Returns how many positives were compared."""
    config = config or HeadConfig()
    actual, positives = assign(raw, boxes, counts, GEOMETRY, config), 0
    for i, count in enumerate(counts.tolist()):
        expected, slack = assign_one_by_one(raw[i].double(), boxes[i, :count].double(), config)
        assert slack > 1e-5, "choose other random numbers: the difference is below float32"
        chosen = actual.foreground[i].nonzero()[:, 0].tolist()
        assert {c: actual.box[i, c].item() for c in chosen} == {
            c: g for c, (g, _) in expected.items()
        }
        for cell, (_, iou) in expected.items():
            assert actual.iou[i, cell].item() == pytest.approx(iou, rel=1e-3, abs=1e-6)
        positives += len(expected)
    return positives


@pytest.mark.parametrize("at_once", [1, 2**22], ids=["frame by frame", "together"])
def test_assignment_agrees_with_one_frame_at_a_time(at_once, monkeypatch):
    monkeypatch.setattr(assignment_module, "PAIRS_AT_ONCE", at_once)
    assert assert_assigned_alike(*some_batch(12, 6)) > 30


SCENES = {  # centre, size: what a box's four numbers are multiplied with and added to
    "ordinary": ((96, 64), (0, 0), (50, 50), (4, 4)),
    "crowded": ((20, 12), (30, 30), (40, 40), (4, 4)),
    "half outside": ((300, 300), (-100, -100), (60, 60), (4, 4)),
    "below a pixel": ((96, 64), (0, 0), (0.9, 0.9), (0.01, 0.01)),
    "huge": ((96, 64), (0, 0), (5000, 5000), (100, 100)),
}


@pytest.mark.parametrize(
    ("scene", "dtype"),
    [*((scene, torch.float32) for scene in SCENES), ("ordinary", torch.bfloat16)],
)
def test_assignment_of_0_to_300_boxes_in_one_batch(scene, dtype):
    counts = torch.tensor([30, 0, 1, 300, 7, 90, 2, 0])
    g = torch.Generator().manual_seed(1)
    raw = torch.randn(len(counts), CELLS, 5 + CLASSES, generator=g).to(dtype)
    boxes = torch.rand(len(counts), 300, 5, generator=g)  # padding looks like boxes
    span, start, sizes, least = (torch.tensor(t) for t in SCENES[scene])
    boxes[..., 1:3] = boxes[..., 1:3] * span + start
    boxes[..., 3:] = boxes[..., 3:] * sizes + least
    boxes[..., 0] = torch.randint(0, CLASSES, boxes.shape[:2], generator=g)
    assert assert_assigned_alike(raw, boxes, counts) > 15


def test_of_equal_costs_the_first_cell_and_the_first_box_count():
    """Raw zeros are alike in all cells; boxes on corners of cells, of even sizes, some of them twice."""
    g = torch.Generator().manual_seed(0)
    boxes = torch.zeros(20, 12, 5)
    boxes[..., 1] = 8.0 * torch.randint(0, 13, (20, 12), generator=g)
    boxes[..., 2] = 8.0 * torch.randint(0, 9, (20, 12), generator=g)
    boxes[..., 3:] = 2.0 ** torch.randint(2, 7, (20, 12, 1), generator=g)
    boxes[:, 6:9] = boxes[:, :3]
    assert (
        assert_assigned_alike(torch.zeros(20, CELLS, 5 + CLASSES), boxes, torch.full((20,), 12))
        > 100
    )


def test_identical_boxes_share_nothing():
    raw, boxes, _ = some_batch(3, 40)
    boxes[:] = boxes[:, :1]
    assert assert_assigned_alike(raw, boxes, torch.tensor([40, 2, 1])) >= 3
    assert (assign(raw, boxes, torch.tensor([40, 2, 1]), GEOMETRY, HeadConfig()).box == 0).all()


def test_boxes_far_outside_are_nobodys():
    raw, boxes, _ = some_batch(2, 5)
    boxes[..., 1:3] -= 1000
    assert not assign(raw, boxes, torch.tensor([5, 1]), GEOMETRY, HeadConfig()).foreground.any()


@pytest.mark.parametrize(
    "options",
    [
        {"center_radius": 2.3},
        {"center_radius": 0.4},
        {"candidate_top_k": 3},
        {"candidate_top_k": 500},
    ],
)
def test_assignment_under_other_options(options):
    assert assert_assigned_alike(*some_batch(6, 9, seed=5), HeadConfig(**options)) > 15  # type: ignore[call-arg]


def test_a_frame_is_assigned_alike_with_any_other_frames():
    raw, boxes, counts = some_batch(5, 30)
    more = torch.cat((boxes, torch.rand(5, 200, 5)), 1)
    whole = assign(raw, more, counts, GEOMETRY, HeadConfig())
    for i in range(5):
        alone = assign(
            raw[i : i + 1],
            boxes[i : i + 1, : max(1, counts[i])],
            counts[i : i + 1],
            GEOMETRY,
            HeadConfig(),
        )
        assert torch.equal(alone.foreground[0], whole.foreground[i])
        chosen = alone.foreground[0]
        assert torch.equal(alone.box[0, chosen], whole.box[i, chosen])
        assert torch.equal(alone.iou[0, chosen], whole.iou[i, chosen])


def test_the_host_never_waits_and_few_operators_run():
    """Whatever the number of frames and boxes. The limit is slightly above what the loss needs today."""
    counted = []
    for frames, most in ((1, 1), (9, 40), (0, 3), (3, 0)):
        raw, boxes, counts = some_batch(frames, max(1, most), seed=2)
        raw, boxes, counts = raw.requires_grad_(), boxes[:, :most], counts.clamp(max=most)
        detection_loss(
            raw, boxes, counts, GEOMETRY, HeadConfig(size_aware_loss=True)
        ).total.backward()  # fills caches
        with OperatorCounter() as seen:
            detection_loss(
                raw, boxes, counts, GEOMETRY, HeadConfig(size_aware_loss=True)
            ).total.backward()
        assert not seen.waits, seen.waits
        counted.append(seen.operators.total())
    assert max(counted) <= 205, counted


def test_waits_are_seen():
    x = torch.arange(4.0)
    for wait in (
        lambda: x[x > 1],
        lambda: x.sum().item(),
        lambda: bool(x.sum() > 1),
        lambda: F.one_hot(x.long()),
        lambda: x.masked_select(x > 1),
        lambda: x.clone().index_put_((x > 1,), x[0]),
        lambda: x.nonzero(),
    ):
        with OperatorCounter() as seen:
            wait()
        assert seen.waits
    with OperatorCounter() as seen:
        torch.where(x > 1, x, x + 1)
    assert not seen.waits
    assert seen.operators == {"aten::gt": 1, "aten::add": 1, "aten::where": 1}


def test_what_is_kept_per_geometry_is_fit_for_training_whoever_asked_first():
    for geometry, first in ((((3, 5, 8),), "inference"), (((5, 3, 8),), "export")):
        raw = torch.ones(1, 15, 6)
        if first == "inference":
            with torch.inference_mode():
                out = decode(raw, geometry).clone()
        else:
            out = torch.export.export(Decoder(geometry), (torch.zeros(1, 15, 6),)).module()(raw)
        raw.requires_grad_()
        expected = decode(raw, geometry)
        expected.sum().backward()
        torch.testing.assert_close(out, expected.detach())
        assert not is_fake(cells(geometry, raw.device))
        assert not cells(geometry, raw.device).is_inference()


class Decoder(torch.nn.Module):
    def __init__(self, geometry):
        super().__init__()
        self.geometry = geometry

    def forward(self, raw):
        return decode(raw, self.geometry)


def size_weight_one_by_one(area, config):
    """The weight of one box's IoU loss by the definition of each mode."""
    largest = config.size_aware_weight
    if config.size_aware_mode is SizeWeighting.exponential:
        weight = largest * math.exp(-area / config.small_threshold)
    elif config.size_aware_mode is SizeWeighting.linear:
        weight = 1 + largest * (1 - area / config.medium_threshold)
    elif area <= config.small_threshold:
        weight = largest
    elif area <= config.medium_threshold:
        weight = (largest + 1) / 2
    else:
        weight = 1
    return min(max(weight, 1), largest)


def loss_one_by_one(raw, boxes, counts, config):
    """Sums of the three parts over all frames, number of positives, by definition."""
    parts, positives = [0.0, 0.0, 0.0], 0
    decoded = decode_one_by_one(raw)
    for i in range(len(raw)):
        matched, _ = assign_one_by_one(raw[i].detach(), boxes[i, : counts[i]], config)
        positives += len(matched)
        for c in range(CELLS):
            parts[1] = parts[1] + F.binary_cross_entropy_with_logits(
                raw[i, c, 4], raw.new_tensor(float(c in matched))
            )
        for c, (g, iou) in matched.items():
            box = boxes[i, g]
            w = 1.0
            if config.size_aware_loss:
                w = size_weight_one_by_one(box[3].item() * box[4].item(), config)
            parts[0] = parts[0] + 5 * w * (1 - iou_of(box[1:], decoded[i, c, :4]) ** 2)
            target = F.one_hot(box[0].long(), CLASSES) * iou
            parts[2] = parts[2] + F.binary_cross_entropy_with_logits(
                raw[i, c, 5:], target, reduction="sum"
            )
    return parts, positives


@pytest.mark.parametrize("mode", [None, *SizeWeighting])
def test_losses_and_gradient_agree_with_the_definition(mode):
    config = HeadConfig()
    if mode is not None:
        # Of the 11 boxes, 4 are below, 4 between and 3 above these thresholds.
        config = HeadConfig(
            size_aware_loss=True, size_aware_mode=mode, small_threshold=400, medium_threshold=1200
        )
    raw, boxes, counts = some_batch(4, 4, seed=1)
    assert counts.tolist() == [3, 1, 3, 4]
    wide = raw.double().requires_grad_()
    raw.requires_grad_()
    parts, positives = loss_one_by_one(wide, boxes.double(), counts, config)
    actual = detection_loss(raw, boxes, counts, GEOMETRY, config)
    for own, expected in zip((actual.iou, actual.objectness, actual.classes), parts, strict=True):
        assert own.item() == pytest.approx(expected.item() / positives, rel=1e-5)
    assert (actual.positives.item(), actual.boxes.item()) == (positives, counts.sum().item())
    expected = torch.autograd.grad(sum(parts) / positives, wide)[0]
    torch.testing.assert_close(
        torch.autograd.grad(actual.total, raw)[0].double(), expected, rtol=1e-4, atol=1e-6
    )


def test_losses_of_two_ranks_add_up_to_those_of_one():
    raw, boxes, counts = some_batch(6, 4)
    whole = detection_loss(raw, boxes, counts, GEOMETRY, HeadConfig())
    ranks = (slice(0, 1), slice(1, 6))

    def losses(rank, reduction):
        return detection_loss(
            raw[rank],
            boxes[rank],
            counts[rank],
            GEOMETRY,
            HeadConfig(),
            sum_over_ranks=reduction,
        )

    local_values = []
    for rank in ranks:
        losses(rank, lambda values: local_values.append(values) or values)
    assert len(local_values) == len(ranks)  # one reduction each
    parts = [losses(rank, lambda _: sum(local_values)) for rank in ranks]
    torch.testing.assert_close(parts[0].total + parts[1].total, whole.total)
    for part in parts:
        for name in ("iou", "objectness", "classes", "positives", "boxes"):
            torch.testing.assert_close(getattr(part, name), getattr(whole, name))


@pytest.mark.parametrize(("frames", "most"), [(0, 3), (3, 0), (0, 0)])
def test_nothing_to_find_still_has_a_gradient(frames, most):
    raw = torch.randn(frames, CELLS, 5 + CLASSES, requires_grad=True)
    actual = detection_loss(
        raw,
        torch.zeros(frames, most, 5),
        torch.zeros(frames, dtype=torch.long),
        GEOMETRY,
        HeadConfig(size_aware_loss=True),
    )
    actual.total.backward()
    assert actual.positives == 0
    assert actual.iou == 0
    assert actual.classes == 0
    assert actual.total.isfinite()
    assert raw.grad.isfinite().all()


def test_a_background_cell_that_overflows_does_not_reach_the_gradient():
    raw, boxes, counts = some_batch(2, 3)
    counts[:] = 3
    taken = assign(raw, boxes, counts, GEOMETRY, HeadConfig()).foreground
    free = (~taken[0]).nonzero()[-1, 0]
    raw[0, free, 2:4] = 200.0  # exp overflows float32
    raw.requires_grad_()
    detection_loss(raw, boxes, counts, GEOMETRY, HeadConfig()).total.backward()
    assert raw.grad.isfinite().all()


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("exponential", [2.0, 1.2130613, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("step", [2.0, 2.0, 2.0, 1.5, 1.5, 1.5, 1.0]),
        ("linear", [2.0, 2.0, 2.0, 2.0, 1.5, 1.0, 1.0]),
    ],
)
def test_size_weights(mode, expected):
    config = HeadConfig(size_aware_weight=2.0, size_aware_mode=SizeWeighting(mode))
    areas = [0.0, 512.0, 32.0**2, 1500.0, 0.75 * 96.0**2, 96.0**2, 96.0**2 + 1]
    actual = size_weights(torch.tensor(areas), config)
    torch.testing.assert_close(actual, torch.tensor(expected))
    definition = [size_weight_one_by_one(area, config) for area in areas]
    assert definition == pytest.approx(expected)
    every = size_weights(torch.linspace(0, 20_000, 500), config)
    assert (every.diff() <= 0).all()
    assert every.min() == 1
    assert every.max() == 2


def test_decode_and_prior():
    raw = torch.randn(2, CELLS, 5 + CLASSES)
    torch.testing.assert_close(decode(raw, GEOMETRY), decode_one_by_one(raw))
    head = YOLOXHead((4, 8, 16), 8, CLASSES).eval()
    out = head([torch.randn(2, c, h, w) for c, (h, w, _) in zip((4, 8, 16), GEOMETRY, strict=True)])
    assert out.shape == (2, CELLS, 5 + CLASSES)
    assert all(
        torch.allclose(c.bias, torch.tensor(-math.log(99)))
        for c in (*head.obj_preds, *head.cls_preds)
    )


def nms_one_by_one(boxes, scores, kinds, threshold):
    kept = []
    for i in sorted(range(len(boxes)), key=lambda i: -scores[i]):

        def centred(k):
            x1, y1, x2, y2 = boxes[k].tolist()
            return [(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1]

        if all(kinds[i] != kinds[k] or iou_of(centred(i), centred(k)) <= threshold for k in kept):
            kept.append(i)
    return kept


@pytest.mark.parametrize("count", [0, 1, 30, 600])  # 600: more than a block
def test_suppression_agrees_with_the_definition(count):
    g = torch.Generator().manual_seed(count)
    corner, size = (
        torch.rand(count, 2, generator=g) * 100,
        torch.rand(count, 2, generator=g) * 30 + 5,
    )
    boxes = torch.cat((corner, corner + size), 1).double()
    scores, kinds = torch.rand(count, generator=g), torch.randint(0, 3, (count,), generator=g)
    expected = nms_one_by_one(boxes, scores.tolist(), kinds.tolist(), 0.4)
    assert nms(boxes, scores, kinds, 0.4).tolist() == expected
    assert nms(boxes, scores, kinds, 0.4, limit=7).tolist() == expected[:7]


def test_detections_are_sorted_thresholded_and_capped():
    decoded = decode(torch.randn(2, CELLS, 5 + CLASSES), GEOMETRY)
    for frame in detections(decoded, confidence_threshold=0.2, nms_threshold=0.5, max_detections=9):
        score = frame[:, 4] * frame[:, 5]
        assert 0 < len(frame) <= 9
        assert (score >= 0.2).all()
        assert (score.diff() <= 0).all()
    assert [
        f.shape for f in detections(decoded, confidence_threshold=0.9999, nms_threshold=0.5)
    ] == [(0, 7), (0, 7)]


def test_global_batch_norm_agrees_with_torch():
    torch.manual_seed(0)
    x = torch.randn(4, 5, 3, 2) * 3 + 100  # far from zero: a sum of squares would cancel
    own, theirs = BatchNorm2d(5), torch.nn.BatchNorm2d(5)
    global_batch_norms(own, ONE_RANK)
    results, weights = [], torch.randn_like(x)
    for norm in (own, theirs):
        leaf = x.clone().requires_grad_()
        y = norm(leaf)
        results.append(
            (
                y,
                *torch.autograd.grad((y * weights).sum(), [leaf, norm.weight, norm.bias]),
                *norm.buffers(),
            )
        )
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_batch_norm_of_no_frames_leaves_its_statistics():
    for ranks in (None, ONE_RANK):
        norm = BatchNorm2d(5)
        global_batch_norms(norm, ranks)
        norm.running_mean.fill_(3.0)
        y = norm(torch.zeros(0, 5, 3, 2, requires_grad=True))
        y.sum().backward()
        assert y.shape == (0, 5, 3, 2)
        assert (norm.running_mean == 3).all()
        assert (norm.running_var == 1).all()
        assert norm.num_batches_tracked == 0
        assert (norm.weight.grad == 0).all()


@pytest.mark.parametrize("ranks", [None, ONE_RANK])
@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("maps", [torch.bfloat16, torch.float16])
def test_batch_norm_takes_half_precision_maps_and_parameters(maps, parameters, ranks):
    torch.manual_seed(0)
    x = torch.randn(6, 5, 4, 3) * 2 + 1
    weights = torch.randn_like(x)
    results = []
    for dtype_of_maps, dtype_of_parameters in ((maps, parameters), (torch.float64, torch.float64)):
        norm = BatchNorm2d(5)
        norm.weight.data = torch.linspace(0.5, 2, 5).to(dtype_of_parameters)
        norm.bias.data = torch.linspace(-1, 1, 5).to(dtype_of_parameters)
        if dtype_of_maps == torch.float64:
            norm.double()
        else:
            global_batch_norms(norm, ranks)
        leaf = x.to(dtype_of_maps).requires_grad_()
        y = norm(leaf)
        assert y.dtype == dtype_of_maps
        norm.eval()
        assert norm(leaf).dtype == dtype_of_maps
        gradients = torch.autograd.grad(
            (y * weights.to(y.dtype)).sum(), [leaf, norm.weight, norm.bias]
        )
        assert [g.dtype for g in gradients[1:]] == [dtype_of_parameters] * 2
        results.append((y, *gradients, norm.running_mean, norm.running_var))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=2e-2, atol=5e-2)
