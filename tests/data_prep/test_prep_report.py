"""`evspan prep report`: its numbers against plain counts.

The page is complete in itself, safe against markup in names, and written quickly.
"""

import base64
import io
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from xml.etree import ElementTree

import h5py
import numpy as np
import pytest
from evspan.conf.text import plural
from evspan.data_prep.draw import draw_boxes, draw_label, frame_to_rgb
from evspan.data_prep.frames.codec import FrameEncoder
from evspan.data_prep.prepare import prepare
from evspan.data_prep.report.findings import findings
from evspan.data_prep.report.number_format import percent, short
from evspan.data_prep.report.plots import round_ticks
from evspan.data_prep.report.survey import survey
from evspan.data_prep.shards.format import BOX, FRAME_SHAPE, MANIFEST, Manifest, RecordingEntry
from evspan.launch.cli.prep_report import main
from PIL import Image
from support.prepared import entries, prep_config
from support.report_page import Page

HEIGHT, WIDTH, BINS, CUTOFF = 40, 60, 2, 5
SVG = 'xmlns="http://www.w3.org/2000/svg"'
CLASSES = ["car", "bar"]


# -- datasets, written straight to the contract ---------------------------------------------------
def counted(seed=0, n=20, mean=0.02):
    return (
        np.random.default_rng(seed)
        .poisson(mean, (n, 2 * BINS, HEIGHT, WIDTH))
        .clip(max=CUTOFF)
        .astype(np.uint8)
    )


def box(frame, class_id=0, x=5, y=6, w=20, h=10):
    return frame, (50_000 * (frame + 1), x, y, w, h, class_id, 0)


def write_dataset(root: Path, recordings: dict[str, dict], classes=CLASSES) -> Path:
    """Writes a dataset by the definition of its format.

    Args:
        recordings: by split/name: frames, boxes [(frame, row)], labelled [frame, ...], and values
            of its entry.
    """
    listed = []
    for number, (key, values) in enumerate(recordings.items()):
        split, name = key.split("/", 1)
        frames = values.pop("frames", counted(number))
        boxes = values.pop("boxes", [])
        labelled = values.pop("labelled", [])
        n = len(frames)
        encode = FrameEncoder()
        codes = [encode(frame).copy() for frame in frames]
        (root / split).mkdir(parents=True, exist_ok=True)
        shard = f"{split}/{number:05d}.h5"
        with h5py.File(root / shard, "w") as file:
            group = file.create_group(f"group{number}")
            group["frames"] = np.concatenate([*codes, np.zeros(0, np.uint8)])
            group["frame_start"] = np.cumsum([0, *map(len, codes)])
            group["end_us"] = 50_000 * np.arange(1, n + 1)
            group["boxes"] = np.array([row for _, row in sorted(boxes)], BOX)
            group["box_start"] = np.searchsorted(sorted(f for f, _ in boxes), np.arange(n + 1))
            group["labelled"] = np.isin(np.arange(n), labelled)
            group.attrs[FRAME_SHAPE] = frames.shape[1:]
        listed.append(
            RecordingEntry(
                **{
                    "name": name,
                    "split": split,
                    "shard": shard,
                    "group": f"group{number}",
                    "frames": n,
                    "labelled_frames": len(labelled),
                    "boxes": len(boxes),
                    "height": frames.shape[2],
                    "width": frames.shape[3],
                    "sensor_height": 80,
                    "sensor_width": 120,
                    "first_us": 0,
                    "last_us": 50_000 * n,
                    "events": 2 * int(frames.sum()),
                    "source_xxh3": str(number),
                    **values,
                }
            )
        )
    config = {
        "frames": {
            "window_ms": 50,
            "bins": BINS,
            "cutoff": CUTOFF,
            "downsample": 2,
            "mode": "exact",
            "downsample_by": "sum",
        },
        "dataset": {"name": "made", "labels": {"min_side": 20}},
    }
    root.mkdir(exist_ok=True)
    (root / MANIFEST).write_text(
        Manifest(
            software="test", config=config, config_hash="0", classes=classes, recordings=listed
        ).to_json()
    )
    return root


def usual() -> dict[str, dict]:
    return {
        "train/a": {
            "boxes": [box(1), box(1, 1), box(3), box(9, 1, w=34, h=34)],
            "labelled": [1, 3, 5, 9],
        },
        "train/b": {"boxes": [box(0)], "labelled": [0]},
        "val/c": {"boxes": [box(2), box(2, 1)], "labelled": [2, 4]},
    }


@pytest.fixture
def report(tmp_path, capsys):
    def call(root, *options):
        """Make the page of a dataset; (the page, standard output)."""
        capsys.readouterr()
        main([str(root), str(tmp_path / "page.html"), *options])
        return Page(tmp_path / "page.html"), capsys.readouterr().out

    return call


@pytest.fixture(scope="module")
def shards(source, tmp_path_factory):
    output = tmp_path_factory.mktemp("shards")
    prepare(prep_config(source, output, labels={"min_side": 14, "label_every_ms": 50}))
    return output


# -- numbers --------------------------------------------------------------------------------------
def plain(stored, manifest_entries, keys):
    """The expected numbers of the tables for the recordings `keys`, counted frame by frame."""
    out: dict[str, float] = defaultdict(float)
    for key in keys:
        columns = stored[key]
        entry = manifest_entries[key]
        out["seconds"] += (entry["last_us"] - entry["first_us"]) / 1e6
        out["events"] += entry["events"]
        out["boxes dropped"] += sum(entry["dropped_boxes"].values())
        out["events dropped"] += (
            entry["dropped_events"]["outside_sensor"] + entry["dropped_events"]["before_first_time"]
        )
        for i, labelled in enumerate(columns["labelled"].tolist()):
            boxes = columns["boxes"][columns["box_start"][i] : columns["box_start"][i + 1]]
            out["frames"] += 1
            out["labelled"] += labelled
            out["without boxes"] += labelled and not len(boxes)
            out["boxes"] += len(boxes)
            for row in boxes:
                out[("ball", "box", "bar")[row["class_id"]]] += 1
            code = columns["frames"][columns["frame_start"][i] : columns["frame_start"][i + 1]]
            out["bytes"] += len(code)
            out["empty"] += not len(code)
    return out


def stored_columns(output):
    found = {}
    for path in sorted(output.glob("*/[0-9]*.h5")):
        with h5py.File(path, "r") as file:
            for name, group in file.items():
                found[f"{path.parent.name}/{name}"] = {column: group[column][:] for column in group}
    return found


def require_agreement(row, expected):
    for name in (
        "frames",
        "labelled",
        "without boxes",
        "boxes",
        "boxes dropped",
        "events",
        "events dropped",
    ):
        assert int(row[name]) == expected[name], name
    assert float(row["seconds"]) == pytest.approx(expected["seconds"])
    for name, part, whole in (
        ("fraction labelled", "labelled", "frames"),
        ("labels/s", "labelled", "seconds"),
        ("events/s", "events", "seconds"),
        ("frames empty", "empty", "frames"),
    ):
        assert float(row[name]) == pytest.approx(expected[part] / expected[whole]), name
    assert float(row["kB/frame"]) == pytest.approx(expected["bytes"] / expected["frames"] / 1000)


def test_tables_agree_with_plain_counts_over_the_shards(shards, report):
    page, _ = report(shards)
    stored = stored_columns(shards)
    listed = entries(shards)
    rows = page.rows("recording-table")
    assert set(rows) == {key.split("/")[1] for key in stored} | {"total"}
    assert len(stored) == 5
    for key in stored:
        row = rows[key.split("/")[1]]
        expected = plain(stored, listed, [key])
        require_agreement(row, expected)
        assert row["split"] == key.split("/")[0]
        assert [int(row[c]) for c in ("ball", "box", "bar")] == [
            expected[c] for c in ("ball", "box", "bar")
        ]
    everything = plain(stored, listed, stored)
    assert everything["boxes"] > 10
    assert everything["boxes dropped"] > 0
    require_agreement(rows["total"], everything)
    splits = page.rows("split-table")
    assert list(splits) == ["train", "val", "test", "total"]
    for split in ("train", "val", "test"):
        require_agreement(
            splits[split], plain(stored, listed, [k for k in stored if k.startswith(split)])
        )
    require_agreement(splits["total"], everything)
    classes = page.rows("class-table")
    for name in ("ball", "box", "bar"):
        assert (
            int(classes[name]["boxes"])
            == everything[name]
            == sum(int(classes[name][s]) for s in ("train", "val", "test"))
        )
        assert (
            int(classes[name]["train"])
            == plain(stored, listed, [k for k in stored if k.startswith("train")])[name]
        )
    for split in ("train", "val", "test"):
        assert classes["total"][split] == splits[split]["boxes"]


def nearest(values, value):
    return min(values, key=lambda candidate: abs(candidate - value))


def test_sizes_of_boxes_agree_with_plain_counts(tmp_path, report):
    rng = np.random.default_rng(3)
    sides = 2 ** rng.uniform(0, 9.5, (200, 2))
    boxes = [
        box(int(i % 20), int(i % 2), w=np.float32(w), h=np.float32(h))
        for i, (w, h) in enumerate(sides)
    ]
    boxes += [
        box(3, w=32, h=32),
        box(3, w=96, h=96),
        box(4, w=16, h=64),
        box(4, w=0, h=5),
        box(5, w=3000, h=3000),
    ]
    page, _ = report(
        write_dataset(tmp_path / "d", {"train/a": {"boxes": boxes, "labelled": list(range(20))}})
    )
    area = [float(row[3]) * float(row[4]) for _, row in boxes]
    tips = "\n".join(page.titles["sizes"])
    bars = re.findall(r"^([\d.e+]+) to ([\d.e+]+) pixels: (\d+) boxes$", tips, re.MULTILINE)
    assert len(bars) == len(page.titles["sizes"])
    exact = [2 ** (k / 4) for k in range(45)]
    assert sum(int(n) for *_, n in bars) == len(boxes)
    for low, high, number in bars:
        first = nearest(exact, float(low))
        last = nearest(exact, float(high))
        if first == 1:
            first = 0
        if last == 2048:
            last = np.inf
        assert int(number) == sum(first <= a**0.5 < last for a in area)
    sizes = [[0, 0, 0], [0, 0, 0]]
    for (_, row), a in zip(boxes, area, strict=True):
        size = int(a >= 1024) + int(a >= 9216)
        sizes[row[5]][size] += 1
    rows = page.rows("class-table")
    assert [[int(rows[c][s]) for s in ("small", "medium", "large")] for c in CLASSES] == sizes
    assert min(map(min, sizes)) > 5


def test_counts_of_decoded_frames_agree_with_plain_counts(tmp_path, report):
    frames = counted(1, 20, mean=2.0)
    page, _ = report(
        write_dataset(tmp_path / "d", {"test/a": {"frames": frames}}), "--frames-per-recording", "4"
    )
    cells = frames[[2, 7, 12, 17]].reshape(-1)
    tips = "\n".join(page.titles["counts"])
    numbers = re.findall(r"^([\d\u202f]+) cells count (\d+)", tips, re.MULTILINE)
    assert len(numbers) == len(page.titles["counts"])
    counts = {int(value): int(number.replace("\u202f", "")) for number, value in numbers}
    assert counts == {value: int((cells == value).sum()) for value in range(1, CUTOFF + 1)}
    row = page.rows("recording-table")["a"]
    assert float(row["at cutoff"]) == pytest.approx((cells == CUTOFF).sum() / (cells > 0).sum())
    assert "4 decoded frames, up to 4 of each recording" in page.text


def test_events_over_time_are_exact_where_all_frames_are_decoded(tmp_path):
    frames = counted(2, 20, mean=0.3)
    frames[4:8] = counted(3, 4, mean=3)
    frames[12] = 0
    root = write_dataset(
        tmp_path / "d", {"train/a": {"frames": frames, "labelled": [3, 4], "events": 123_456}}
    )
    curve = survey(root, frames_per_recording=20).recordings[0].curve
    per_frame = frames.reshape(20, -1).sum(1)
    np.testing.assert_allclose(curve.events, per_frame * 123_456 / per_frame.sum())
    np.testing.assert_allclose(curve.edges_s, 0.05 * np.arange(21))
    np.testing.assert_allclose(curve.rate, 20 * curve.events)
    assert curve.labelled.tolist() == np.isin(np.arange(20), [3, 4]).tolist()
    assert curve.frames.tolist() == [1] * 20


@pytest.mark.parametrize("mean", [0.01, 0.1, 1.0])
def test_events_over_time_are_close_where_few_frames_are_decoded(tmp_path, mean):
    frames = np.concatenate([counted(i, 1, mean=mean * (1 + i % 50 / 10)) for i in range(600)])
    root = write_dataset(tmp_path / "d", {"train/a": {"frames": frames}})
    recording = survey(root, frames_per_recording=8).recordings[0]
    exact = frames.reshape(120, 5, -1).sum((1, 2), dtype=np.int64)  # 120 bins of five frames
    assert recording.curve.events.sum() == pytest.approx(recording.entry.events)
    np.testing.assert_allclose(
        recording.curve.events, 2.0 * exact, rtol=0.15, atol=0.02 * exact.max()
    )


def test_frames_that_cover_half_of_a_recording_get_half_of_its_events(tmp_path):
    root = write_dataset(tmp_path / "d", {"train/a": {"events": 1000, "last_us": 2_000_000}})
    assert survey(root).recordings[0].curve.events.sum() == pytest.approx(500)


def test_drops_are_listed_by_reason_with_their_setting(tmp_path, report):
    page, _ = report(
        write_dataset(
            tmp_path / "d",
            {
                "train/a": {
                    "boxes": [box(1)],
                    "labelled": [1],
                    "events": 900,
                    "dropped_boxes": {"boxes_under_min_side": 3, "boxes_of_other_classes": 6},
                    "dropped_events": {"outside_sensor": 100, "late_timestamps_raised": 7},
                }
            },
        )
    )
    boxes = page.rows("box-drops")
    events = page.rows("event-drops")
    assert {k: (v["number"], float(v["fraction"])) for k, v in boxes.items()} == {
        "kept": ("1", 0.1),
        "under min side min_side = 20": ("3", 0.3),
        "of other classes": ("6", 0.6),
    }
    assert {k: (v["number"], float(v["fraction"])) for k, v in events.items()} == {
        "kept": ("900", 0.9),
        "outside sensor": ("100", 0.1),
        "late timestamps raised kept, their time corrected": ("7", 0.007),
    }
    assert page.rows("recording-table")["a"]["events dropped"] == "100"


# -- images -------------------------------------------------------------------------------------
def image_of(data_uri: str) -> np.ndarray:
    png = base64.b64decode(data_uri.removeprefix("data:image/png;base64,"))
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def test_the_sheet_shows_frames_with_their_boxes(tmp_path, report):
    frames = counted(5, 20, mean=0.01)
    page, _ = report(
        write_dataset(
            tmp_path / "d",
            {
                "train/a": {
                    "frames": frames,
                    "boxes": [box(7), box(7, 1, x=30, y=20)],
                    "labelled": [7, 9],
                },
                "val/b": {"labelled": [11]},
            },
        )
    )
    (about, source), (other, _) = page.images
    assert about == "train/a, 0.40 s, 2 boxes"
    assert other == "val/b, 0.60 s, 0 boxes"
    image = image_of(source)
    corners = [[5, 6, 25, 16], [30, 20, 50, 30]]
    expected = draw_boxes(frame_to_rgb(frames[7]), corners, CLASSES, upscale=2)
    expected = draw_label(expected, "0.40 s")
    assert image.shape == expected.shape
    assert abs(image.astype(int) - expected).mean() < 4
    assert abs(255 - expected.astype(int)).mean() > 15


def test_wide_frames_are_drawn_smaller_and_keep_lone_events(tmp_path, report):
    frames = np.zeros((1, 2 * BINS, 100, 1501), np.uint8)
    frames[0, 0, 50, 901] = 1
    page, _ = report(
        write_dataset(
            tmp_path / "d",
            {
                "test/a": {
                    "frames": frames,
                    "boxes": [box(0, x=300, y=30, w=60, h=60)],
                    "labelled": [0],
                }
            },
        )
    )
    image = image_of(page.images[0][1]).astype(int)
    assert image.shape == (33, 500, 3)
    assert image[16, 300, 0] - image[16, 300, 1] > 60  # red
    assert image[25, 100, 1] - image[25, 100, 0] > 100
    assert image[25, 110].tolist() == [255, 255, 255]


# -- the page itself ------------------------------------------------------------------------------
def test_the_page_is_whole_and_needs_nothing_else(shards, report):
    page, _ = report(shards)
    assert page.source.startswith("<!DOCTYPE html>")
    assert len(page.images) > 5
    assert all(src.startswith("data:image/png;base64,") for _, src in page.images)
    bare = re.sub(r'src="data:[^"]*"', "", page.source).replace(SVG, "")
    assert re.findall(r"https?:|file:|url\(|@import|//|\bhref|\bsrc", bare) == []
    assert [tag for tag, _ in page.tags if tag in ("link", "iframe", "object", "base")] == []


def test_charts_are_sound_svg_with_axes_and_tooltips(shards, report):
    page, _ = report(shards)
    charts = page.charts()
    drawn = [c for c in charts if c.get("class") == "chart"]
    assert len(drawn) == 9
    assert len(charts) == 14
    for chart in charts:
        assert chart.tag == "{http://www.w3.org/2000/svg}svg"
        assert chart.get("aria-label")
        assert chart.findall(".//{*}title")
        _, _, width, height = map(float, chart.get("viewBox").split())
        for shape in chart.findall(".//{*}rect"):
            x, y, w, h = (float(shape.get(k)) for k in ("x", "y", "width", "height"))
            assert min(x, y, w, h) >= 0
            assert x + w <= width + 0.2
            assert y + h <= height + 0.2
        assert "nan" not in ElementTree.tostring(chart, "unicode")
    assert all(c.findall(".//{*}text[@class='label end']") for c in drawn)


def test_names_cannot_inject(tmp_path, report):
    name = '<script>alert("1")</script>'
    broken = "\x1b]0;pwned\udcff\n"
    root = write_dataset(
        tmp_path / "<b>d&amp;",
        {
            f"train/{name}": {"boxes": [box(1, 0)], "labelled": [1]},
            f"val/{broken}": {"labelled": [2]},
        },
        classes=[name, "a'b&c"],
    )
    page, out = report(root)
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert not [tag for tag, _ in page.tags if tag == "b"]
    assert page.rows("recording-table").keys() == {name, "\ufffd]0;pwned\ufffd\ufffd", "total"}
    assert list(page.rows("class-table")) == [name, "a'b&c", "total"]
    assert page.text.count("<b>d&amp;") == 2
    assert len(page.charts()) == 7
    assert "\x1b" not in page.source + out


def test_a_dataset_without_recordings(tmp_path, report):
    page, out = report(write_dataset(tmp_path / "d", {}))
    assert "The dataset holds no recordings." in page.text
    assert page.tables == {}
    assert "0 recordings, 1 warning" in out


def test_recordings_without_boxes_labels_frames_or_events(tmp_path, report):
    page, _ = report(
        write_dataset(
            tmp_path / "d",
            {
                "test/a": {},
                "test/b": {
                    "frames": np.zeros((1, 2 * BINS, HEIGHT, WIDTH), np.uint8),
                    "last_us": 0,
                },
                "test/c": {"frames": np.zeros((0, 2 * BINS, HEIGHT, WIDTH), np.uint8), "events": 5},
            },
        )
    )
    rows = page.rows("recording-table")
    assert "There are no boxes." in page.text
    assert rows["b"]["events/s"] == rows["c"]["fraction labelled"] == ""
    assert float(rows["b"]["frames empty"]) == 1
    assert len(page.images) == 7


@pytest.mark.slow
def test_many_recordings_get_a_row_each_and_few_charts_and_pictures(tmp_path, report):
    root = write_dataset(
        tmp_path / "d",
        {
            f"train/r{i:03d}": {"frames": counted(i, 3), "boxes": [box(1)], "labelled": [1]}
            for i in range(60)
        },
    )
    page, _ = report(root)
    assert len(page.rows("recording-table")) == 61
    assert len(page.images) == 24
    assert len([c for c in page.charts() if c.get("class") == "chart"]) == 3 + 12 + 1
    assert "12 of 60 recordings are shown" in page.text


def test_only_the_sampled_and_drawn_frames_are_decoded(tmp_path, report, capsys):
    """All others are damaged: to decode one of them is an error."""
    root = write_dataset(tmp_path / "d", {"test/a": {"frames": counted(0, 100)}})
    sampled = {int((i + 0.5) * 100 / 8) for i in range(8)}
    drawn = {int((i + 0.5) * 100 / 6) for i in range(6)}
    decoded = sampled | drawn
    with h5py.File(root / "test" / "00000.h5", "r+") as file:
        group = file["group0"]
        start = group["frame_start"][:]
        code = group["frames"][:]
        for i in set(range(100)) - decoded:
            code[start[i]] = 254  # one more event in the cell before the first
        group["frames"][:] = code
    page, _ = report(root)
    assert page.rows("recording-table")["a"]["frames"] == "100"
    with pytest.raises(SystemExit) as exit_:
        report(root, "--frames-per-recording", "9")
    assert exit_.value.code == 2
    assert "are damaged" in capsys.readouterr().err


def test_split_and_recording_choose(tmp_path, report):
    root = write_dataset(tmp_path / "d", usual())
    page, out = report(root, "--split", "val")
    assert list(page.rows("split-table")) == ["val", "total"]
    assert "There is no split" not in out
    page, _ = report(root, "--recording", "b")
    assert list(page.rows("recording-table")) == ["b", "total"]
    assert "recording b only" in page.text


# -- warnings -------------------------------------------------------------------------------------
def test_nothing_stands_out_of_a_sound_dataset(tmp_path, report):
    page, out = report(
        write_dataset(
            tmp_path / "d", {**usual(), "train/b": {"boxes": [box(0, 1)], "labelled": [0]}}
        )
    )
    assert "Nothing stands out." in page.text
    assert out.endswith("3 recordings, no warnings\n")


EMPTY = np.zeros((20, 2 * BINS, HEIGHT, WIDTH), np.uint8)
MANY_BOXES = [box(i % 20) for i in range(150)]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"val/c": None}, "There is no split val: nothing to score training with."),
        (
            {"val/c": {"source_xxh3": "0", **usual()["val/c"]}},
            "train/a, val/c are the same recording, in different splits: scores will be too high.",
        ),
        (
            {"train/e": {"source_xxh3": "0", **usual()["train/b"]}},
            "train/a, train/e are the same recording.",
        ),
        (
            {"train/e": {"frames": counted(1)[:, :, :20], **usual()["train/b"]}},
            "Frames are of 2 sizes (60 x 40: train/a, train/b and 1 more; 60 x 20: train/e); "
            "a model is trained on one.",
        ),
        ({"train/b": {}}, "1 recording of 2 in train without labels: b."),
        (
            {f"train/x{i}": {} for i in range(6)},
            "6 recordings of 8 in train without labels: x0, x1, x2, x3 and 2 more.",
        ),
        (
            {"train/b": {"labelled": [4]}},
            "1 recording of 2 in train labelled, but without a single box: b.",
        ),
        ({"val/c": {"boxes": [box(1)], "labelled": [1]}}, "val has no boxes of class bar."),
        (
            {"val/c": {"boxes": [box(1, 1), *MANY_BOXES], "labelled": list(range(20))}},
            "In val, class bar has 1 box of 151 (0.66 %).",
        ),
        (
            {
                "train/b": {
                    "frames": np.concatenate((counted(1)[:12], EMPTY[:8])),
                    **usual()["train/b"],
                }
            },
            "1 recording with many frames without events: train/b (40 %).",
        ),
        (
            {
                "train/b": {
                    "dropped_events": {"outside_sensor": 30},
                    "events": 970,
                    **usual()["train/b"],
                }
            },
            "1 recording with many events outside the sensor, which were dropped: train/b (3 %).",
        ),
        (
            {
                "train/b": {
                    "dropped_events": {"late_timestamps_raised": 50},
                    "events": 1000,
                    **usual()["train/b"],
                }
            },
            "1 recording with many timestamps that ran backwards or were far ahead: train/b (5 %).",
        ),
        (
            {"train/b": {"events": 3, **usual()["train/b"]}},
            "Far fewer events per second than the median of 0.0",
        ),
        ({"train/b": {"events": 10**7, **usual()["train/b"]}}, ": train/b (10 M)."),
        (
            {"train/b": {"frames": counted(1, mean=4.0), "events": 4000, **usual()["train/b"]}},
            " of the cells that have events are at the cutoff of 5",
        ),
        (
            {"train/b": {"dropped_boxes": {"boxes_under_min_side": 1}, **usual()["train/b"]}},
            "12 % of the boxes were dropped: under min side (1 of 8).",
        ),
        (
            {
                "train/b": {
                    "dropped_boxes": {
                        "boxes_under_min_side": 7,
                        "boxes_between_labelled_frames": 900,
                    },
                    **usual()["train/b"],
                }
            },
            "50 % of the boxes that remain after thinning were dropped: under min side (7 of 14).",
        ),
    ],
)
def test_warnings_in_words(tmp_path, changes, expected):
    recordings = {**usual(), **changes}
    sentences = findings(
        survey(
            write_dataset(
                tmp_path / "d", {k: dict(v) for k, v in recordings.items() if v is not None}
            )
        )
    )
    assert len([s for s in sentences if expected in s]) == 1, sentences


def test_intended_drops_are_no_warning(tmp_path):
    """Thinned labels, and classes that were left out."""
    drops = {"boxes_between_labelled_frames": 1000, "boxes_of_other_classes": 7}
    recordings = usual()
    recordings["train/a"]["dropped_boxes"] = drops
    assert not [
        f for f in findings(survey(write_dataset(tmp_path / "d", recordings))) if "dropped" in f
    ]


# -- the command ----------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.timeout(240)
def test_as_typed_it_writes_next_to_the_folder(shards):
    result = subprocess.run(
        [sys.executable, "-m", "evspan.launch", "prep", "report", str(shards)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parents[2],
    )
    out = shards.with_name(f"{shards.name}_report.html")
    assert (result.returncode, result.stderr) == (0, "")
    first, *warnings = result.stdout.splitlines()
    assert first == f"{out}: 5 recordings, {plural(len(warnings), 'warning')}"
    assert warnings
    assert all(w.strip() in Page(out).text for w in warnings)


def damage_columns(root):
    with h5py.File(root / "train" / "00000.h5", "r+") as file:
        file["group0"]["box_start"][3] = 90


def damage_boxes(root):
    with h5py.File(root / "train" / "00000.h5", "r+") as file:
        boxes = file["group0"]["boxes"][:]
        boxes["class_id"][0] = 7
        file["group0"]["boxes"][:] = boxes


def cut(root):
    path = root / "train" / "00000.h5"
    path.write_bytes(path.read_bytes()[:3000])


def lose_column(root):
    with h5py.File(root / "train" / "00000.h5", "r+") as file:
        del file["group0"]["labelled"]


def lose_shard(root):
    (root / "train" / "00000.h5").unlink()


@pytest.mark.parametrize("damage", [damage_columns, damage_boxes, cut, lose_column, lose_shard])
def test_a_damaged_shard_ends_in_one_line_and_leaves_the_page_as_it_was(tmp_path, damage, capsys):
    root = write_dataset(tmp_path / "d", usual())
    out = tmp_path / "out" / "page.html"
    out.parent.mkdir()
    out.write_text("before")
    damage(root)
    with pytest.raises(SystemExit) as exit_:
        main([str(root), str(out)])
    err = capsys.readouterr().err
    assert exit_.value.code == 2
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1
    assert "00000.h5" in err
    assert out.read_text() == "before"
    assert list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere",), "nowhere holds no manifest.json, so it is no prepared dataset"),
        (("d", "page.pdf"), "page.pdf does not end in .html"),
        (("d", "d/page.html"), "lies inside d, where evspan prep allows no other files"),
        (
            ("d", "--recording", "z"),
            "has no recording 'z' in any split; there are: train/a, train/b, val/c",
        ),
        (("d", "--split", "test"), "has no recording in split test"),
        (("d", "--frames-per-recording", "0"), "--frames-per-recording 0: give 1 or more"),
        (("d", "--split", "trian"), "--help shows how"),
        ((), "required: SHARDS"),
    ],
)
def test_mistakes_end_in_one_line(tmp_path, monkeypatch, arguments, message, capsys):
    write_dataset(tmp_path / "d", usual())
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_:
        main(list(arguments))
    err = capsys.readouterr().err
    assert exit_.value.code == 2
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1
    assert message in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (7, "7"),
        (999.4, "999"),
        (999.6, "1.00 k"),
        (1234, "1.23 k"),
        (56_780_000, "56.8 M"),
        (999_600_000, "1.00 G"),
        (0.25, "0.25"),
    ],
)
def test_short_numbers(value, text):
    assert short(value) == text


@pytest.mark.parametrize(
    ("fraction", "text"),
    [
        (0, "0 %"),
        (1e-6, "under 0.001 %"),
        (3.14e-5, "0.0031 %"),
        (0.042, "4.2 %"),
        (0.0994, "9.9 %"),
        (0.0996, "10 %"),
        (0.97, "97 %"),
        (1, "100 %"),
    ],
)
def test_percent(fraction, text):
    assert percent(fraction) == text


@pytest.mark.parametrize("high", [0.003, 1, 7, 10, 99, 100, 101, 2.5e6, 1e12])
def test_ticks_are_round_and_reach_the_highest_value(high):
    ticks = round_ticks(high)
    assert ticks[0] == 0
    assert ticks[-1] >= high * (1 - 1e-9) > ticks[-2]
    assert 3 <= len(ticks) <= 6
    assert round_ticks(0) == [0.0, 1.0]
