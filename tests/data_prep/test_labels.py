"""Label filters, box by box."""

import numpy as np
import pytest
from evspan.conf.errors import ConfigError
from evspan.conf.schema.prep import DatasetConfig, LabelConfig
from evspan.data_prep.labels.box_files import RAW_BOX, read_boxes
from evspan.data_prep.labels.filters import crop, filter_boxes

H, W = 720, 1280
GEN4 = LabelConfig(
    class_map={0: 0, 1: 1, 2: 2}, min_side=20, min_diagonal=60, max_width_fraction=0.9
)


def boxes_of(*rows) -> np.ndarray:
    """Rows of (x, y, w, h) or (x, y, w, h, class_id); each has its number as track."""
    out = np.zeros(len(rows), RAW_BOX)
    for i, row in enumerate(rows):
        out[i] = (1000 * i, *row[:4], row[4] if len(row) > 4 else 0, i, 0.5)
    return out


def kept(boxes, config, classes=3, split="train"):
    out, dropped = filter_boxes(boxes, config, classes=classes, height=H, width=W, split=split)
    return out["track_id"].tolist(), dropped


def by_hand(box, config: LabelConfig, split: str):
    """(reason, None) or ("", the box) of one box, in float32 as RVT reckons."""
    if int(box["class_id"]) not in config.class_map:
        return "boxes_of_other_classes", None
    corner = {"x": np.float32(box["x"]), "y": np.float32(box["y"])}
    far = {
        "x": np.float32(corner["x"] + np.float32(box["w"])),
        "y": np.float32(corner["y"] + np.float32(box["h"])),
    }
    for axis, size in (("x", W), ("y", H)):
        corner[axis], far[axis] = (
            min(max(v, np.float32(0)), np.float32(size - 1)) for v in (corner[axis], far[axis])
        )
    w, h = far["x"] - corner["x"], far["y"] - corner["y"]
    if not (w > 0 and h > 0):
        return "boxes_outside_the_sensor", None
    if min(w, h) < config.min_side:
        return "boxes_under_min_side", None
    if float(w) ** 2 + float(h) ** 2 < config.min_diagonal**2:
        return "boxes_under_min_diagonal", None
    if split == "train" and w > 0.9 * W:
        return "boxes_over_max_width", None
    return "", (corner["x"], corner["y"], w, h, config.class_map[int(box["class_id"])])


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_all_filters_together_are_those_of_one_box_after_the_other(split):
    rng = np.random.default_rng(0)
    boxes = np.zeros(3_000, RAW_BOX)
    boxes["x"], boxes["y"] = rng.uniform(-200, 1400, 3_000), rng.uniform(-200, 900, 3_000)
    boxes["w"], boxes["h"] = rng.exponential(150, 3_000), rng.exponential(80, 3_000)
    boxes["w"][::50] *= 20
    boxes["class_id"] = rng.integers(0, 7, 3_000)
    boxes["track_id"], boxes["t"] = np.arange(3_000), np.arange(3_000)
    out, dropped = filter_boxes(boxes.copy(), GEN4, classes=3, height=H, width=W, split=split)
    expected, counts = [], dict.fromkeys(dropped, 0)
    for box in boxes:
        reason, own = by_hand(box, GEN4, split)
        if reason:
            counts[reason] += 1
        else:
            expected.append((int(box["t"]), *own, int(box["track_id"])))
    assert dropped == counts
    assert len(out) + sum(dropped.values()) == 3_000
    assert min(counts.values()) > 0
    for name, column in zip(
        ("t", "x", "y", "w", "h", "class_id", "track_id"), zip(*expected, strict=True), strict=True
    ):
        np.testing.assert_array_equal(out[name], column, err_msg=name)
    assert ("boxes_over_max_width" in dropped) == (split == "train")


def test_classes_are_kept_and_renamed():
    boxes = boxes_of(*((100, 100, 80, 80, k) for k in range(7)))
    out, dropped = filter_boxes(
        boxes, LabelConfig(class_map={0: 1, 5: 0, 6: 1}), classes=2, height=H, width=W, split="val"
    )
    assert out["track_id"].tolist() == [0, 5, 6]
    assert out["class_id"].tolist() == [1, 0, 1]
    assert dropped == {"boxes_of_other_classes": 4, "boxes_outside_the_sensor": 0}
    assert boxes["class_id"].tolist() == list(range(7))  # the caller's stay as they are


def test_without_a_map_ids_below_the_number_of_classes_are_kept():
    out, dropped = filter_boxes(
        boxes_of(*((100, 100, 80, 80, k) for k in range(7))),
        LabelConfig(),
        classes=4,
        height=H,
        width=W,
        split="val",
    )
    assert out["class_id"].tolist() == [0, 1, 2, 3]
    assert dropped["boxes_of_other_classes"] == 3


def test_boxes_are_cropped_and_those_outside_dropped():
    rows = [
        (-10, -5, 30, 30),
        (1270, 700, 50, 50),
        (10, 20, 30, 40),
        (-50, 10, 50, 50),
        (1279, 10, 50, 50),
        (5, 719.5, 10, 10),
    ]
    out, dropped = filter_boxes(
        boxes_of(*rows), LabelConfig(class_map={0: 0}), classes=1, height=H, width=W, split="val"
    )
    assert [tuple(float(b[k]) for k in "xywh") for b in out] == [
        (0, 0, 20, 25),
        (1270, 700, 9, 19),
        (10, 20, 30, 40),
    ]
    assert dropped["boxes_outside_the_sensor"] == 3
    without, dropped = filter_boxes(
        boxes_of(*rows),
        LabelConfig(class_map={0: 0}, crop=False),
        classes=1,
        height=H,
        width=W,
        split="val",
    )
    assert len(without) == 6
    assert "boxes_outside_the_sensor" not in dropped
    assert float(without["x"][0]) == -10


def test_the_order_is_classes_crop_side_diagonal_width():
    """A box that several filters would drop counts for the first of them, and sizes are those after cropping."""
    assert kept(boxes_of((-100, 0, 1, 1, 6)), GEN4)[1]["boxes_of_other_classes"] == 1
    ids, dropped = kept(boxes_of((-90, 100, 100, 100)), GEN4)  # 10 of 100 pixels are left
    assert ids == []
    assert dropped["boxes_under_min_side"] == 1
    assert dropped["boxes_under_min_diagonal"] == 0
    ids, dropped = kept(boxes_of((-200, 100, 1390, 19)), GEN4)
    assert dropped["boxes_under_min_side"] == 1
    assert dropped["boxes_over_max_width"] == 0
    ids, dropped = kept(boxes_of((-200, 100, 1350, 100)), GEN4)  # 1150 wide after cropping
    assert ids == [0]


@pytest.mark.parametrize(
    ("row", "stays"),
    [
        ((100, 100, 20, 60), True),
        ((100, 100, 19.9, 60), False),
        ((100, 100, 36, 48), True),
        ((100, 100, 36, 47.9), False),
        ((10, 100, 1152, 50), True),
        ((10, 100, 1152.5, 50), False),
    ],
)
def test_limits_are_inclusive(row, stays):
    assert bool(kept(boxes_of(row), GEN4)[0]) == stays


def test_the_width_filter_is_for_training_only():
    wide = boxes_of((0, 100, 1279, 100))
    for split, stays in (("train", []), ("val", [0]), ("test", [0])):
        assert kept(wide, GEN4, split=split)[0] == stays


def test_filters_that_are_off_say_nothing_of_themselves():
    _, dropped = kept(boxes_of((0, 0, 1, 1)), LabelConfig())
    assert set(dropped) == {"boxes_of_other_classes", "boxes_outside_the_sensor"}
    assert kept(np.zeros(0, RAW_BOX), GEN4)[0] == []


def test_what_is_wrong_with_the_config_is_said():
    with pytest.raises(
        ConfigError, match=r"class_map names class \[3\] but dataset.classes has 2 entries"
    ):
        DatasetConfig(classes=["a", "b"], labels=LabelConfig(class_map={0: 0, 1: 3}))
    for values, part in (
        ({"label_every_ms": 0}, "label_every_ms"),
        ({"min_side": -1}, "min_side"),
        ({"max_width_fraction": 1.5}, "max_width_fraction"),
        ({"max_width_fraction": 0}, "max_width_fraction"),
    ):
        with pytest.raises(ConfigError, match=part):
            LabelConfig(**values)


def test_cropping_is_that_of_the_published_preprocessing(parity_dir):
    """Its stored labels, from the same raw boxes; it drops boxes under 5 pixels and no others of these."""
    config = LabelConfig(class_map={0: 0, 1: 1, 2: 2}, min_side=5, max_width_fraction=0.9)
    checked = 0
    for path in sorted((parity_dir / "prep_fixture" / "output").glob("*/*/labels_v2/labels.npz")):
        split, name = path.parts[-4], path.parts[-3]
        stored = np.load(path)["labels"]
        raw = read_boxes(parity_dir / "prep_fixture" / "input" / split / f"{name}_bbox.npy")
        own, _ = filter_boxes(
            raw[np.isin(raw["t"], stored["t"])], config, classes=3, height=H, width=W, split=split
        )
        for field in ("t", "x", "y", "w", "h", "class_id", "track_id"):
            np.testing.assert_array_equal(own[field], stored[field], err_msg=field)
        checked += len(own)
    assert checked > 90


def test_crop_stays_in_float32():
    out = crop(boxes_of((0.1, 0.2, 0.3, 0.7)), H, W)
    assert out["w"].dtype == np.float32
    assert out["w"][0] == np.float32(np.float32(0.1) + np.float32(0.3)) - np.float32(0.1)
