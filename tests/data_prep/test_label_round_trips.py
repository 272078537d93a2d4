"""Boxes and frames to other tools and back: each format, and the frame that an image shows."""

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from evspan.conf.errors import UserError
from evspan.conf.schema.prep import DatasetConfig, FrameConfig, LabelConfig, PrepConfig, TimeUnit
from evspan.data_prep.labels.box_files import (
    NO_TRACK,
    RAW_BOX,
    LabelRows,
    read_boxes,
    read_labels,
    write_boxes,
)
from evspan.data_prep.labels.interchange.exporting import ExportOptions, export_labels
from evspan.data_prep.labels.interchange.formats import FORMATS, recognise
from evspan.data_prep.labels.interchange.importing import ImportOptions, import_labels
from evspan.data_prep.labels.interchange.pictures import PictureOptions
from evspan.data_prep.prepare import prepare
from evspan.data_prep.recordings.open import open_recording
from evspan.data_prep.shards.format import load_manifest
from evspan.data_prep.shards.reading import open_group, read_frames, read_stored_boxes
from evspan.data_prep.simulator import SimulatorConfig, simulate
from evspan.launch.cli.main import main
from PIL import Image
from pycocotools.coco import COCO
from support.event_files import concatenated

CLASSES = ["car", "person", "bicycle"]
WIDTH, HEIGHT = 640, 480
TRACKLESS = {"yolo"}
WITHOUT_REGIONS = {"yolo"}


def boxes_of(seed: int, *, tracks: bool = True, confidence: bool = False):
    """Random boxes of some tracks with gaps, at irregular times; two per track and time never."""
    rng = np.random.default_rng(seed)
    rows = []
    for time in sorted(rng.choice(200, 12, replace=False) * 10_000 + 50_000):
        for track in rng.choice(6, rng.integers(1, 5), replace=False):
            x, y = rng.uniform(0, 500), rng.uniform(0, 400)
            w, h = rng.uniform(3, 130), rng.uniform(3, 70)
            rows.append((time, x, y, w, h, track % 3, track + 3, 1.0))
    boxes = np.array(rows, RAW_BOX)
    if not tracks:
        boxes["track_id"] = NO_TRACK
    if confidence:
        boxes["class_confidence"] = rng.uniform(0.01, 0.99, boxes.size).astype(np.float32)
    return boxes


def in_order(boxes):
    return np.sort(boxes, order=["t", "class_id", "x", "y"])


def assert_same(found, expected, *, tolerance: float, tracks: bool = True):
    found, expected = in_order(found), in_order(expected)
    for name in ("t", "class_id", *(["track_id"] if tracks else [])):
        assert found[name].tolist() == expected[name].tolist()
    for name in ("x", "y", "w", "h"):
        assert np.abs(found[name] - expected[name]).max() <= tolerance, name
    np.testing.assert_allclose(found["class_confidence"], expected["class_confidence"], rtol=1e-6)


def exported(source: Path, out: Path, **options):
    return export_labels(ExportOptions(source=source, out=out, **options))


def imported(labels: Path, out: Path, **options):
    return import_labels(ImportOptions(labels=labels, out=out, **options))


# -- boxes ----------------------------------------------------------------------------------------
def write_sources(folder: Path) -> dict[str, LabelRows]:
    """Two recordings; the first one with ignore regions and a labelled frame without boxes."""
    folder.mkdir()
    (folder / "classes.txt").write_text("\n".join(CLASSES))
    regions = boxes_of(7)[:3]
    empty = np.zeros(1, RAW_BOX)
    empty["t"] = 2_500_000
    write_boxes(folder / "a_bbox.npy", boxes_of(1), np.concatenate((regions, empty)))
    write_boxes(folder / "b_c_bbox.npy", boxes_of(2))
    return {name: read_labels(folder / f"{name}_bbox.npy") for name in ("a", "b_c")}


def first_seen(rows: dict[str, LabelRows]) -> list[str]:
    """The classes in the order in which they first appear, recording by recording."""
    ids = np.concatenate([of_recording.boxes["class_id"] for of_recording in rows.values()])
    return list(dict.fromkeys(CLASSES[class_id] for class_id in ids))


@pytest.mark.parametrize("name", FORMATS)
def test_boxes_come_back_from_every_format(tmp_path, name):
    expected = write_sources(tmp_path / "boxes")
    summary = exported(tmp_path / "boxes", tmp_path / "out", format=name, size=(WIDTH, HEIGHT))
    assert summary.unsupported == (3 if name in WITHOUT_REGIONS else 0)
    assert recognise(tmp_path / "out") == name
    back = imported(tmp_path / "out", tmp_path / "back")
    assert (tmp_path / "back/classes.txt").read_text().split() == (
        first_seen(expected) if name in ("voc", "csv") else CLASSES
    )
    order = list(back.boxes_per_class)
    for recording, rows in expected.items():
        found = read_labels(tmp_path / "back" / f"{recording}_bbox.npy")
        assert found.times.tolist() and set(found.times) == set(rows.times)
        boxes = found.boxes.copy()
        boxes["class_id"] = [CLASSES.index(order[k]) for k in found.boxes["class_id"]]
        assert_same(
            boxes,
            rows.boxes,
            tolerance=1e-4 if name == "yolo" else 0.0,
            tracks=name not in TRACKLESS,
        )
        if name not in WITHOUT_REGIONS:
            has_area = rows.regions["w"] > 0
            kept = found.regions[found.regions["w"] > 0]
            assert kept[["t", "x", "y", "w", "h"]].tolist() == (
                rows.regions[has_area][["t", "x", "y", "w", "h"]].tolist()
            )


@pytest.mark.parametrize("name", sorted(set(FORMATS) - WITHOUT_REGIONS))
@pytest.mark.parametrize("confidence", [False, True], ids=["labels", "detections"])
def test_regions_among_boxes_without_tracks_come_back(tmp_path, name, confidence):
    """As `labels pseudo` writes them."""
    boxes = boxes_of(3, tracks=False, confidence=confidence)
    regions = boxes_of(7)[:3]
    write_boxes(tmp_path / "a_bbox.npy", boxes, regions)
    options = {"size": (WIDTH, HEIGHT), "classes": CLASSES}
    exported(tmp_path / "a_bbox.npy", tmp_path / "out", format=name, **options)
    imported(tmp_path / "out", tmp_path / "b_bbox.npy")
    found = read_labels(tmp_path / "b_bbox.npy")
    assert found.boxes.size == boxes.size
    kept = found.regions[found.regions["w"] > 0]
    assert kept[["t", "x", "y", "w", "h"]].tolist() == regions[["t", "x", "y", "w", "h"]].tolist()


def test_the_frame_rate_of_a_sequence_is_that_of_its_frames(tmp_path):
    boxes = boxes_of(3)[:3]
    boxes["t"] = [50_000, 100_000, 150_000]
    write_boxes(tmp_path / "a_bbox.npy", boxes)
    exported(tmp_path / "a_bbox.npy", tmp_path / "out", format="mot", classes=CLASSES)
    assert "frameRate=20\n" in next((tmp_path / "out").rglob("seqinfo.ini")).read_text()


@pytest.mark.slow
def test_images_have_the_sensors_size_where_the_recording_does_not_state_it(tmp_path, caplog):
    path = tmp_path / "a.csv"
    path.write_text("".join(f"{t},{t % 300},{t % 200},1\n" for t in range(0, 300_000, 50)))
    draw = PictureOptions(sensor_size=(HEIGHT, WIDTH), time_unit=TimeUnit.us)
    exported(path, tmp_path / "out", pictures=draw, size=(WIDTH, HEIGHT))
    image = next((tmp_path / "out").rglob("*.png"))
    assert Image.open(image).size == (WIDTH, HEIGHT)
    assert not caplog.messages
    exported(path, tmp_path / "assumed", pictures=PictureOptions(time_unit=TimeUnit.us))
    assert any("1280" in message for message in caplog.messages)


@pytest.mark.parametrize("name", FORMATS)
def test_detections_keep_their_confidences(tmp_path, name):
    boxes = boxes_of(3, tracks=False, confidence=True)
    write_boxes(tmp_path / "a_bbox.npy", boxes)
    exported(
        tmp_path / "a_bbox.npy",
        tmp_path / "out",
        format=name,
        size=(WIDTH, HEIGHT),
        classes=CLASSES,
    )
    imported(tmp_path / "out", tmp_path / "b_bbox.npy", classes=CLASSES)
    found = read_boxes(tmp_path / "b_bbox.npy")
    assert_same(found, boxes, tolerance=1e-4 if name == "yolo" else 0.0, tracks=False)
    if name not in {"cvat", "yolo"}:  # a box without a track is a track of its own in CVAT
        assert set(found["track_id"]) == {NO_TRACK}


def test_detections_under_a_confidence_are_left_out(tmp_path):
    boxes = boxes_of(3, confidence=True)
    write_boxes(tmp_path / "a_bbox.npy", boxes)
    exported(tmp_path / "a_bbox.npy", tmp_path / "a.csv", format="csv", confidence=0.5)
    kept = int(np.count_nonzero(boxes["class_confidence"] >= 0.5))
    assert sum(",class_" in line for line in (tmp_path / "a.csv").read_text().splitlines()) == kept


def test_pycocotools_reads_the_coco_file(tmp_path, capsys):
    expected = write_sources(tmp_path / "boxes")
    exported(tmp_path / "boxes", tmp_path / "a.json", format="coco", size=(WIDTH, HEIGHT))
    coco = COCO(str(tmp_path / "a.json"))
    assert [row["name"] for row in coco.loadCats(coco.getCatIds())] == [*CLASSES, "ignore"]
    image = coco.loadImgs(coco.getImgIds())[0]
    first = expected["a"].boxes[expected["a"].boxes["t"] == expected["a"].times[0]]
    annotations = coco.loadAnns(coco.getAnnIds(imgIds=image["id"], iscrowd=False))
    assert len(annotations) == first.size
    assert np.float32([row["bbox"] for row in annotations]).tolist() == first[
        ["x", "y", "w", "h"]
    ].view().tolist() or sorted(
        np.float32([row["bbox"] for row in annotations]).tolist()
    ) == sorted([list(row) for row in first[["x", "y", "w", "h"]].tolist()])


def test_cvat_hides_a_track_in_its_gaps(tmp_path):
    boxes = np.zeros(2, RAW_BOX)
    boxes["t"], boxes["w"], boxes["h"], boxes["class_confidence"] = [100_000, 300_000], 5, 5, 1
    boxes["track_id"] = 4
    empty = np.zeros(2, RAW_BOX)
    empty["t"] = 200_000, 400_000
    write_boxes(tmp_path / "a_bbox.npy", boxes, empty)
    exported(tmp_path / "a_bbox.npy", tmp_path / "out", format="cvat", classes=["car"])
    root = ElementTree.parse(tmp_path / "out/a/annotations.xml").getroot()
    (track,) = root.findall("track")
    assert track.attrib["id"] == "4" and track.attrib["label"] == "car"
    assert [(box.get("frame"), box.get("outside")) for box in track] == [
        *(("0", "0"), ("1", "1")),
        *(("2", "0"), ("3", "1")),
    ]


def test_yolo_without_a_size_is_refused(tmp_path):
    write_boxes(tmp_path / "a_bbox.npy", boxes_of(1))
    with pytest.raises(UserError, match="Give --size WxH, or the recording"):
        exported(tmp_path / "a_bbox.npy", tmp_path / "out", format="yolo")


def test_files_are_not_overwritten(tmp_path):
    write_boxes(tmp_path / "a_bbox.npy", boxes_of(1))
    exported(tmp_path / "a_bbox.npy", tmp_path / "a.json", format="coco")
    with pytest.raises(UserError, match=r"a.json is there already. .* --overwrite"):
        exported(tmp_path / "a_bbox.npy", tmp_path / "a.json", format="coco")


# -- frames ---------------------------------------------------------------------------------------
SCENE = SimulatorConfig(height=160, width=200, min_objects=1, max_objects=2)


@pytest.fixture(scope="module")
def recording(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("raw") / "drive_td.raw"
    simulate(path, seconds=0.72, seed=3, config=SCENE)
    path.with_name("drive_bbox.npy").rename(path.with_name("truth.npy"))
    return path


def fingerprint(drawn) -> list[int]:
    """A box x, y, w, h that depends on which pixels are set; drawn: (H, W) bool."""
    left = int(np.count_nonzero(drawn[:, :100]))
    right = int(np.count_nonzero(drawn[:, 100:]))
    return [1, 1, 5 + left % 190, 5 + right % 150]


def label_images(folder: Path, out: Path) -> None:
    """A labelling tool: each image gets a box that depends on what it shows."""
    images = []
    annotations = []
    for i, path in enumerate(sorted(folder.glob("*.png"))):
        pixels = np.asarray(Image.open(path).convert("RGB"))
        height, width = pixels.shape[:2]
        images.append({"id": i, "file_name": path.name, "width": width, "height": height})
        box = fingerprint((pixels != 255).any(2))
        annotations.append({"id": i, "image_id": i, "category_id": 1, "bbox": box})
    categories = [{"id": 1, "name": "all"}]
    out.write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories})
    )


def test_an_image_shows_the_events_of_the_window_that_its_name_ends(recording, tmp_path):
    summary = exported(recording, tmp_path / "pictures")
    events = concatenated(open_recording(recording).chunks())
    first = int(events.t[0])
    names = sorted(path.name for path in (tmp_path / "pictures/images").iterdir())
    ends = [first + k * 100_000 for k in range(1, 8)]
    assert names == [f"drive_{end:012d}us.png" for end in ends]
    assert summary.images == len(names)
    for end, name in zip(ends, names, strict=True):
        expected = np.zeros((160, 200), bool)
        inside = (events.t >= end - 50_000) & (events.t < end)
        expected[events.y[inside], events.x[inside]] = True
        pixels = np.asarray(Image.open(tmp_path / "pictures/images" / name))
        assert np.array_equal((pixels != 255).any(2), expected)


@pytest.mark.parametrize(("every_ms", "offset_us"), [(None, 0), (50, 0), (None, 3000)])
def test_labels_of_images_lie_on_the_frames_that_the_images_show(
    recording, tmp_path, every_ms, offset_us
):
    """From the recording to the shards: each stored frame is the image that its box was drawn on."""
    raw = tmp_path / "raw/train"
    raw.mkdir(parents=True)
    (raw / recording.name).write_bytes(recording.read_bytes())
    pictures = PictureOptions(every_ms=every_ms)
    exported(raw / recording.name, tmp_path / "pictures", pictures=pictures)
    label_images(tmp_path / "pictures/images", tmp_path / "labels.json")
    arguments = ["labels", "import", str(tmp_path / "labels.json"), str(raw)]
    main([*arguments, "--offset-us", str(offset_us)] if offset_us else arguments)
    label_every_ms = every_ms or 100
    labels = LabelConfig(label_every_ms=label_every_ms)
    config = PrepConfig(
        source=str(tmp_path / "raw"),
        output=str(tmp_path / "shards"),
        dataset=DatasetConfig(labels=labels),
        frames=FrameConfig(downsample=1, bins=2),
        processes=1,
    )
    prepare(config)
    (entry,) = load_manifest(tmp_path / "shards").recordings
    group = open_group(tmp_path / "shards", entry)
    labelled = np.flatnonzero(group["labelled"][:])
    boxes = [read_stored_boxes(group, i, i + 1) for i in labelled]
    frames = [read_frames(group, i, i + 1)[0].any(0) for i in labelled]
    group.file.close()
    assert len(labelled) == len(list((tmp_path / "pictures/images").iterdir()))
    matches = []
    for (box,), frame in zip(boxes, frames, strict=True):
        matches.append([box[side] for side in "xywh"] == fingerprint(frame))
    assert all(matches) if not offset_us else not any(matches)


@pytest.mark.parametrize("name", FORMATS)
def test_frames_with_labels_are_imported_without_options(recording, tmp_path, name):
    boxes = read_boxes(recording.with_name("truth.npy"))
    write_boxes(tmp_path / "drive_bbox.npy", boxes)
    summary = exported(
        tmp_path / "drive_bbox.npy",
        tmp_path / "out",
        format=name,
        frames=recording,
        classes=["ball", "box", "person"],
    )
    assert summary.images == summary.frames > 3
    assert summary.boxes + summary.unpictured == boxes.size
    imported(tmp_path / "out", tmp_path / "back")
    found = read_boxes(tmp_path / "back/drive_bbox.npy")
    expected = boxes[np.isin(boxes["t"], found["t"])]
    cut = (expected["x"] >= 0) & (expected["y"] >= 0)
    cut &= (expected["x"] + expected["w"] <= 200) & (expected["y"] + expected["h"] <= 160)
    assert cut.any()
    found = found[np.isin(found["t"], expected["t"][cut])]
    for box in expected[cut]:
        same = found["t"] == box["t"]
        for side in "xywh":
            same &= np.abs(found[side] - box[side]) < 1e-4
        assert same.sum() == 1


def test_a_folder_of_recordings_without_boxes_gives_images_of_all(recording, tmp_path):
    for name in ("a.raw", "b_td.raw"):
        (tmp_path / "raw").mkdir(exist_ok=True)
        (tmp_path / "raw" / name).write_bytes(recording.read_bytes())
    summary = exported(tmp_path / "raw", tmp_path / "out", pictures=PictureOptions(every_ms=300))
    assert (summary.recordings, summary.images) == (2, 4)
    names = {path.name.split("_")[0] for path in (tmp_path / "out/images").iterdir()}
    assert names == {"a", "b"}


def one_label(path: Path) -> Path:
    """A box file with one box, at 0.3 s."""
    path.parent.mkdir(parents=True, exist_ok=True)
    box = np.zeros(1, RAW_BOX)
    box["t"], box["w"], box["h"], box["class_confidence"] = 300_000, 20, 30, 1
    write_boxes(path, box)
    return path


def drawn_width(out: Path) -> int:
    """Of the one image."""
    (image,) = (out / "images").iterdir()
    return Image.open(image).size[0]


def splits_of_one_name(root: Path) -> None:
    """train/drive, and a val/drive of another sensor, without box files."""
    for split, width in (("train", 200), ("val", 240)):
        (root / split).mkdir(parents=True)
        config = SimulatorConfig(height=160, width=width, min_objects=1, max_objects=1)
        simulate(root / split / "drive_td.raw", seconds=0.5, seed=3, config=config)
        (root / split / "drive_bbox.npy").unlink()


def test_a_text_next_to_a_recording_is_not_drawn(recording, tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "drive.raw").symlink_to(recording)
    (raw / "drive.txt").write_text("Recorded on the A1, rain.\n")
    (raw / "._drive_td.raw").write_bytes(b"\0\5\26\7")
    boxes = one_label(tmp_path / "drive_bbox.npy")
    summary = exported(boxes, tmp_path / "out", format="coco", frames=raw)
    assert (summary.images, drawn_width(tmp_path / "out")) == (1, 200)


@pytest.mark.parametrize(("split", "width"), [("train", 200), ("val", 240)])
def test_of_recordings_of_one_name_the_one_next_to_the_boxes_is_drawn(tmp_path, split, width):
    splits_of_one_name(tmp_path / "own")
    boxes = one_label(tmp_path / "own" / split / "drive_bbox.npy")
    exported(boxes, tmp_path / "out", format="coco", frames=tmp_path / "own")
    assert drawn_width(tmp_path / "out") == width


def test_recordings_of_one_name_are_listed(tmp_path):
    splits_of_one_name(tmp_path / "own")
    boxes = one_label(tmp_path / "detections/drive_bbox.npy")
    options = {"format": "coco", "frames": tmp_path / "own"}
    problem = (
        r"2 recordings of one name: .*train/drive_td.raw, .*val/drive_td.raw. .* --frames FILE"
    )
    with pytest.raises(UserError, match=problem):
        exported(boxes, tmp_path / "out", **options)
    config = PrepConfig(
        source=str(tmp_path / "own"),
        output=str(tmp_path / "shards"),
        dataset=DatasetConfig(classes=["car"]),
        processes=1,
    )
    prepare(config)
    options["frames"] = tmp_path / "shards"
    problem = "2 recordings of one name: train/drive, val/drive. .* --frames FILE"
    with pytest.raises(UserError, match=problem):
        exported(boxes, tmp_path / "out", **options)


def test_a_recording_whose_name_starts_like_an_upload_comes_back(recording, tmp_path):
    """Label Studio puts 8 hexadecimal digits before the names of uploads."""
    raw = tmp_path / "own/train"
    raw.mkdir(parents=True)
    (raw / "28112024-night_td.raw").symlink_to(recording)
    exported(raw / "28112024-night_td.raw", tmp_path / "out", pictures=PictureOptions(every_ms=500))
    label_images(tmp_path / "out/images", tmp_path / "labels.json")
    imported(tmp_path / "labels.json", raw)
    assert (raw / "28112024-night_bbox.npy").is_file()


def test_shards_are_exported_in_pixels_of_the_sensor(recording, tmp_path):
    raw = tmp_path / "raw/train"
    raw.mkdir(parents=True)
    (raw / recording.name).write_bytes(recording.read_bytes())
    boxes = np.zeros(2, RAW_BOX)
    boxes["t"], boxes["x"], boxes["w"], boxes["h"] = [200_000, 300_000], 10, 21, 31
    write_boxes(raw / "drive_bbox.npy", boxes)
    config = PrepConfig(
        source=str(tmp_path / "raw"),
        output=str(tmp_path / "shards"),
        dataset=DatasetConfig(classes=["car"]),
        frames=FrameConfig(downsample=2, bins=1),
        processes=1,
    )
    prepare(config)
    exported(tmp_path / "shards", tmp_path / "out", format="coco")
    images = sorted((tmp_path / "out/images").iterdir())
    assert [path.name for path in images] == [
        "drive_000000200000us.png",
        "drive_000000300000us.png",
    ]
    assert Image.open(images[0]).size == (200, 160)
    imported(tmp_path / "out", tmp_path / "back")
    assert read_boxes(tmp_path / "back/drive_bbox.npy")[["t", "x", "w", "h"]].tolist() == [
        (200_000, 10, 21, 31),
        (300_000, 10, 21, 31),
    ]


def test_a_labelled_frame_without_boxes_is_a_negative_in_shards(recording, tmp_path):
    raw = tmp_path / "raw/train"
    raw.mkdir(parents=True)
    (raw / recording.name).write_bytes(recording.read_bytes())
    content = {
        "images": [{"id": 1, "file_name": "drive_000000300000us.png", "width": 200, "height": 160}],
        "annotations": [],
        "categories": [{"id": 1, "name": "car"}],
    }
    (tmp_path / "a.json").write_text(json.dumps(content))
    imported(tmp_path / "a.json", raw)
    for crop in (True, False):
        config = PrepConfig(
            source=str(tmp_path / "raw"),
            output=str(tmp_path / f"shards_{crop}"),
            dataset=DatasetConfig(labels=LabelConfig(crop=crop)),
            frames=FrameConfig(downsample=2, bins=1),
            processes=1,
        )
        (entry,) = prepare(config).manifest.recordings
        assert (entry.labelled_frames, entry.boxes, entry.ignore_regions) == (1, 0, 0)
        assert not any(entry.dropped_boxes.values())


def test_without_a_format_the_reason_is_named(recording, tmp_path):
    (tmp_path / "a").mkdir()
    write_boxes(tmp_path / "a" / "drive_bbox.npy", boxes_of(1))
    with pytest.raises(UserError, match=r"has boxes and no events: give the format"):
        exported(tmp_path / "a", tmp_path / "out")
    (tmp_path / "a" / recording.name).symlink_to(recording)
    with pytest.raises(UserError, match=r"--format coco, and --frames .*/a to draw the frames of"):
        exported(tmp_path / "a", tmp_path / "out")
