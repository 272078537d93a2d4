"""Labels of other tools as box files: hand-written files of each format, times, sizes and classes."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from evspan.conf.errors import UserError
from evspan.data_prep.labels.box_files import NO_TRACK, read_array
from evspan.data_prep.labels.interchange.annotations import LabelsError
from evspan.data_prep.labels.interchange.cvat import Shape, interpolated
from evspan.data_prep.labels.interchange.formats import recognise
from evspan.data_prep.labels.interchange.importing import ImportOptions, import_labels
from evspan.data_prep.labels.interchange.names import FrameName, frame_file, parse_frame_name
from evspan.data_prep.labels.interchange.timing import Timing
from PIL import Image


def imported(path: Path, out: Path, **options):
    """The summary, and the rows of each box file by the name of its recording."""
    summary = import_labels(ImportOptions(labels=path, out=out, **options))
    return summary, {
        file.name.removesuffix("_bbox.npy"): read_array(file) for file in summary.files
    }


def rows(boxes, *fields):
    return boxes[list(fields)].tolist()


def objects(boxes):
    """The rows that are no ignore regions."""
    return boxes[~boxes["ignore"]] if "ignore" in boxes.dtype.names else boxes


def coco(images, annotations, categories=("car", "person")):
    return {
        "images": [{"id": i, **image} for i, image in enumerate(images)],
        "categories": [{"id": 10 + i, "name": name} for i, name in enumerate(categories)],
        "annotations": [{"id": i, **annotation} for i, annotation in enumerate(annotations)],
    }


def write(path: Path, text) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text if isinstance(text, str) else json.dumps(text))
    return path


# -- names ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("drive_000000050000us.png", FrameName("drive", time_us=50_000)),
        ("images/train/my_drive_2_000000050000us.jpg", FrameName("my_drive_2", time_us=50_000)),
        ("1a2b3c4d-drive_000000050000us.png", FrameName("drive", time_us=50_000)),  # Label Studio
        ("drive_000000050000us_png.rf.0a1B2c.jpg", FrameName("drive", time_us=50_000)),  # Roboflow
        ("000000050000us.png", FrameName("", time_us=50_000)),
        ("drive/frame_000012.PNG", FrameName("drive", frame=12)),
        ("images/frame_000012.png", FrameName("", frame=12)),
        ("drive_0012.jpg", FrameName("drive", frame=12)),
        ("drive_frame0012.jpg", FrameName("drive", frame=12)),
        ("000012.txt.jpeg", FrameName("000012.txt")),
        ("drive.png", FrameName("drive")),
    ],
)
def test_a_name_carries_recording_and_time_or_number(name, expected):
    assert parse_frame_name(name) == expected


def test_the_names_of_exported_frames_are_read_again():
    dated = [("20241128-night", 50_000), ("19991231-x", 1)]  # no prefix of Label Studio
    for recording, time_us in [("a", 0), ("x_5us", 7), ("drive_12", 10**13), *dated]:
        assert parse_frame_name(frame_file(recording, time_us)) == FrameName(recording, time_us)


# -- CVAT -----------------------------------------------------------------------------------------
def test_tracks_are_interpolated_as_cvat_defines():
    shapes = [
        Shape(2, (0, 0, 10, 10), outside=False),
        Shape(6, (8, 4, 20, 30), outside=False),
        Shape(8, (8, 4, 20, 30), outside=True),
        Shape(11, (1, 1, 2, 2), outside=False),
    ]
    found = {shape.frame: shape.corners for shape in interpolated(shapes, last_frame=13)}
    assert found == {
        2: (0, 0, 10, 10),
        3: (2, 1, 12.5, 15),
        4: (4, 2, 15, 20),
        5: (6, 3, 17.5, 25),
        6: (8, 4, 20, 30),
        7: (8, 4, 20, 30),  # up to the one that is outside
        11: (1, 1, 2, 2),
        12: (1, 1, 2, 2),  # to the end of the task
        13: (1, 1, 2, 2),
    }


CVAT_VIDEO = """<?xml version="1.0" encoding="utf-8"?>
<annotations>
  <version>1.1</version>
  <meta><task><name>t</name><size>4</size><start_frame>10</start_frame><stop_frame>16</stop_frame>
    <frame_filter>step=2</frame_filter>
    <labels><label><name>person</name></label><label><name>car</name></label></labels>
    <original_size><width>640</width><height>480</height></original_size></task></meta>
  <track id="7" label="car" source="manual">
    <box frame="10" outside="0" occluded="0" keyframe="1" xtl="0" ytl="0" xbr="10" ybr="20"/>
    <box frame="14" outside="0" occluded="1" keyframe="1" xtl="40" ytl="0" xbr="50" ybr="20"/>
    <box frame="16" outside="1" occluded="0" keyframe="1" xtl="40" ytl="0" xbr="50" ybr="20"/>
  </track>
</annotations>
"""


def test_cvat_video_with_steps_becomes_boxes_of_a_track(tmp_path):
    path = write(tmp_path / "annotations.xml", CVAT_VIDEO)
    summary, files = imported(path, tmp_path / "a_bbox.npy", timing=Timing(1e6 / 20, 5000))
    assert (tmp_path / "classes.txt").read_text() == "person\ncar\n"
    assert summary.frames == 4 and summary.empty == 1 and summary.tracks == 1
    assert rows(objects(files["a"]), "t", "x", "w", "h", "class_id", "track_id") == [
        (505_000, 0, 10, 20, 1, 7),
        (605_000, 20, 10, 20, 1, 7),
        (705_000, 40, 10, 20, 1, 7),
    ]
    assert files["a"]["t"].tolist() == [505_000, 605_000, 705_000, 805_000]  # the last is empty


def test_cvat_images_carry_times_in_their_names(tmp_path):
    text = """<annotations><version>1.1</version><meta/>
    <image id="0" name="drive_000000050000us.png" width="100" height="50">
      <box label="car" xtl="-5" ytl="2" xbr="10" ybr="20"><attribute name="ignore">true</attribute></box>
      <box label="car" xtl="1.5" ytl="2" xbr="10" ybr="60" occluded="1"/>
    </image><image id="1" name="drive_000000100000us.png" width="100" height="50"/></annotations>"""
    _, files = imported(write(tmp_path / "a.xml", text), tmp_path / "out")
    boxes = files["drive"]
    assert rows(boxes, "t", "x", "y", "w", "h", "ignore") == [
        (50_000, 0, 2, 10, 18, True),
        (50_000, 1.5, 2, 8.5, 48, False),
        (100_000, 0, 0, 0, 0, True),
    ]


# -- MOT ------------------------------------------------------------------------------------------
def test_mot_ground_truth_with_ignored_rows_and_names(tmp_path):
    folder = tmp_path / "MOT17-02"
    write(
        folder / "gt/gt.txt", "1,3,10,20,30,40,1,1,0.9\n3,3,12,20,30,40,1,1,1\n3,4,0,0,5,5,0,8,1\n"
    )
    write(
        folder / "seqinfo.ini",
        "[Sequence]\nname=MOT17-02\nseqLength=3\nimWidth=100\nimHeight=100\nframeRate=30\n",
    )
    assert recognise(folder) == "mot"
    summary, files = imported(folder, tmp_path / "out", timing=Timing(1e6 / 30))
    assert summary.boxes_per_class == {"pedestrian": 2}
    assert summary.ignored == 1 and summary.empty == 1 and summary.frames == 3
    assert rows(files["MOT17-02"], "t", "x", "y", "w", "h", "track_id", "ignore") == [
        (0, 10, 20, 30, 40, 3, False),
        (33_333, 0, 0, 0, 0, NO_TRACK, True),
        (66_667, 12, 20, 30, 40, 3, False),
        (66_667, 0, 0, 5, 5, 4, True),
    ]


def test_mot_detections_have_confidences_and_no_tracks(tmp_path):
    path = write(tmp_path / "seq/det/det.txt", "2,-1,10,20,30,40,0.25,-1,-1,-1\n")
    summary, files = imported(path, tmp_path / "out", timing=Timing(50_000), keep_empty=False)
    assert rows(files["seq"], "t", "class_confidence", "track_id") == [(50_000, 0.25, NO_TRACK)]
    assert summary.boxes_per_class == {"object": 1}


# -- COCO, VOC, YOLO, CSV -------------------------------------------------------------------------
def test_coco_of_several_recordings(tmp_path):
    images = [
        {"file_name": "images/a_000000100000us.png", "width": 200, "height": 100},
        {"file_name": "images/b_000000050000us.png", "width": 200, "height": 100},
        {"file_name": "images/b_000000150000us.png", "width": 200, "height": 100},
    ]
    annotations = [
        {"image_id": 1, "category_id": 11, "bbox": [1, 2, 3, 4], "iscrowd": 0, "track_id": 5},
        {"image_id": 0, "category_id": 10, "bbox": [190, 90, 20.5, 20], "score": 0.5},
        {"image_id": 0, "category_id": 10, "bbox": [0, 0, 8, 8], "iscrowd": 1},
        {"image_id": 0, "category_id": 10, "bbox": [300, 0, 8, 8]},
        {"image_id": 0, "category_id": 10, "bbox": [1, 1, 0, 8]},
    ]
    path = write(tmp_path / "c.json", coco(images, annotations))
    summary, files = imported(path, tmp_path / "raw/train")
    assert (tmp_path / "raw/classes.txt").read_text() == "car\nperson\n"
    assert (summary.clipped, summary.outside, summary.flat, summary.empty) == (1, 1, 1, 1)
    assert rows(files["a"], "t", "x", "y", "w", "h", "class_id", "ignore") == [
        (100_000, 190, 90, 10, 10, 0, False),
        (100_000, 0, 0, 8, 8, 0, True),
    ]
    assert files["a"]["class_confidence"].tolist() == [0.5, 1]
    assert rows(objects(files["b"]), "t", "x", "class_id", "track_id") == [(50_000, 1, 1, 5)]


def test_boxes_of_smaller_images_are_scaled_to_the_sensor(tmp_path):
    image = {"file_name": "a_000000100000us.png", "width": 320, "height": 180}
    annotation = {"image_id": 0, "category_id": 10, "bbox": [10, 20, 30, 40]}
    path = write(tmp_path / "c.json", coco([image], [annotation]))
    summary, files = imported(path, tmp_path / "out", size=(1280, 720))
    assert summary.scaled == {(320, 180)}
    assert rows(files["a"], "x", "y", "w", "h") == [(40, 80, 120, 160)]


@pytest.mark.parametrize(("text", "track"), [("-1", NO_TRACK), ("4", 4), ("1.5", None)])
def test_voc_track_ids(tmp_path, text, track):
    box = "<bndbox><xmin>1</xmin><ymin>2</ymin><xmax>9</xmax><ymax>9</ymax></bndbox>"
    item = f"<object><name>car</name><track_id>{text}</track_id>{box}</object>"
    name = frame_file("a", 1000)
    write(tmp_path / "voc/a.xml", f"<annotation><filename>{name}</filename>{item}</annotation>")
    if track is None:
        with pytest.raises(LabelsError, match="track_id is '1.5'.* whole number"):
            imported(tmp_path / "voc", tmp_path / "out")
        return
    _, files = imported(tmp_path / "voc", tmp_path / "out")
    assert objects(files["a"])["track_id"].tolist() == [track]


def test_voc_difficult_objects_are_ignore_regions(tmp_path):
    text = """<annotation><filename>a_000000100000us.png</filename>
    <size><width>100</width><height>100</height></size>
    <object><name>dog</name><difficult>{}</difficult>
    <bndbox><xmin>1</xmin><ymin>2</ymin><xmax>11</xmax><ymax>22</ymax></bndbox></object></annotation>"""
    write(tmp_path / "voc/a.xml", text.format(0))
    write(tmp_path / "voc/b.xml", text.format(1).replace("1000", "2000").replace("dog", "crowd"))
    assert recognise(tmp_path / "voc") == "voc"
    summary, files = imported(tmp_path / "voc", tmp_path / "out")
    assert summary.boxes_per_class == {"dog": 1}
    assert rows(files["a"], "t", "w", "h", "ignore") == [
        (100_000, 10, 20, False),
        (200_000, 10, 20, True),
    ]


def yolo_folder(folder: Path, *, images: bool) -> Path:
    write(folder / "data.yaml", "train: images/train\nnames: {0: car, 1: person}\n")
    write(folder / "labels/train/a_000000100000us.txt", "1 0.5 0.5 0.25 0.5\n0 0 0 0.5 0.5 0.75\n")
    write(folder / "labels/train/a_000000200000us.txt", "")
    if images:
        (folder / "images/train").mkdir(parents=True)
        for time in (100_000, 200_000, 300_000):
            Image.new("RGB", (200, 100)).save(folder / "images/train" / frame_file("a", time))
    return folder


def test_yolo_takes_the_size_of_its_images(tmp_path):
    folder = yolo_folder(tmp_path / "yolo", images=True)
    assert recognise(folder) == "yolo"
    summary, files = imported(folder, tmp_path / "out")
    assert (summary.frames, summary.empty, summary.clipped) == (3, 2, 1)
    assert rows(objects(files["a"]), "t", "x", "y", "w", "h", "class_id", "class_confidence") == [
        (100_000, 75, 25, 50, 50, 1, 1),
        (100_000, 0, 0, 50, 25, 0, 0.75),
    ]


def test_yolo_without_images_needs_a_size(tmp_path):
    folder = yolo_folder(tmp_path / "yolo", images=False)
    with pytest.raises(LabelsError, match="a_000000100000us.txt .* --size WxH"):
        imported(folder, tmp_path / "out")
    _, files = imported(folder, tmp_path / "out", size=(400, 200))
    assert objects(files["a"])["w"].tolist() == [100, 100]


def test_yolo_images_of_one_name_are_not_mixed_up(tmp_path):
    """As CVAT exports two tasks into folders of their own."""
    folder = yolo_folder(tmp_path / "yolo", images=True)
    shutil.copytree(folder / "labels/train", folder / "labels/second")
    with pytest.raises(LabelsError, match="second/a_000000100000us.txt .*folder by folder"):
        imported(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_csv_columns_are_found_by_their_names(tmp_path):
    path = write(
        tmp_path / "drive.csv",
        "label,xmin,ymin,xmax,ymax,timestamp_ms,width,height\ncar,1,2,4,8,12.5,640,480\n",
    )
    assert recognise(path) == "csv"
    _, files = imported(path, tmp_path / "out")
    assert rows(files["drive"], "t", "x", "y", "w", "h") == [(12_500, 1, 2, 3, 6)]


# -- times ----------------------------------------------------------------------------------------
def numbered(tmp_path) -> Path:
    images = [{"file_name": f"frame_{i:06d}.png"} for i in range(3)]
    annotation = {"image_id": 2, "category_id": 10, "bbox": [10, 20, 30, 40]}
    return write(tmp_path / "c.json", coco(images, [annotation]))


def test_numbered_frames_need_a_period(tmp_path):
    path = numbered(tmp_path)
    with pytest.raises(UserError, match="Give --fps N or --frame-ms MS, and --offset-us"):
        imported(path, tmp_path / "a_bbox.npy")
    _, files = imported(path, tmp_path / "a_bbox.npy", timing=Timing(1e6 / 30, 70))
    assert objects(files["a"])["t"].tolist() == [66_737]


def test_numbered_frames_take_the_times_of_exported_images(tmp_path):
    images = tmp_path / "pictures"
    images.mkdir()
    for time_us in (40_000, 90_000, 150_000):
        (images / frame_file("drive", time_us)).touch()
    _, files = imported(numbered(tmp_path), tmp_path / "out", images=images)
    assert objects(files["drive"])["t"].tolist() == [150_000]


def test_a_recording_without_a_name_is_asked_for(tmp_path):
    with pytest.raises(UserError, match="Give --recording FILE, or a file X_bbox.npy as OUT"):
        imported(numbered(tmp_path), tmp_path / "out", timing=Timing(1e6))


def test_one_box_file_for_the_labels_of_two_recordings_is_refused(tmp_path):
    images = [{"file_name": "a_000000100000us.png"}, {"file_name": "b_000000100000us.png"}]
    with pytest.raises(UserError, match=r"labels of 2 recordings \(a, b\)"):
        imported(write(tmp_path / "c.json", coco(images, [])), tmp_path / "a_bbox.npy")


# -- classes --------------------------------------------------------------------------------------
def test_classes_are_taken_in_the_order_of_the_command(tmp_path):
    image = {"file_name": "a_000000100000us.png"}
    boxes = [{"image_id": 0, "category_id": k, "bbox": [1, 2, 3, 4]} for k in (10, 11, 11)]
    path = write(tmp_path / "c.json", coco([image], boxes))
    _, files = imported(path, tmp_path / "out", classes=["person", "bus", "car"])
    assert files["a"]["class_id"].tolist() == [2, 0, 0]
    with pytest.raises(UserError, match=r"--classes does not name, with their boxes: person \(2\)"):
        imported(path, tmp_path / "other", classes=["car"])
    summary, files = imported(path, tmp_path / "other", classes=["car"], drop_other_classes=True)
    assert files["a"]["class_id"].tolist() == [0] and summary.dropped == {"person": 2}


def test_classes_without_a_list_are_in_the_order_of_their_first_boxes(tmp_path):
    lines = ["time_us,x,y,w,h,class", "100000,1,2,3,4,person", "100000,1,2,3,4,car"]
    path = write(tmp_path / "a.csv", "\n".join([*lines, "200000,1,2,3,4,bus"]))
    summary, files = imported(path, tmp_path / "out")
    assert summary.classes_file.read_text() == "person\ncar\nbus\n"
    assert files["a"]["class_id"].tolist() == [0, 1, 2]
    _, files = imported(path, tmp_path / "other", classes=["bus", "car", "person"])
    assert files["a"]["class_id"].tolist() == [2, 1, 0]


def test_a_second_import_keeps_the_ids_of_the_first(tmp_path):
    for name, category in (("a", 11), ("b", 10)):
        image = {"file_name": f"{name}_000000100000us.png"}
        box = {"image_id": 0, "category_id": category, "bbox": [1, 2, 3, 4]}
        names = ("car", "person") if name == "a" else ("person", "car")
        path = write(tmp_path / f"{name}.json", coco([image], [box], names))
        _, files = imported(path, tmp_path / "raw/train")
        assert files[name]["class_id"].tolist() == [1]
    with pytest.raises(UserError, match="is there already"):
        imported(path, tmp_path / "raw/train")
    with pytest.raises(UserError, match="in another order"):
        imported(path, tmp_path / "raw/train", classes=["person", "car"])


# -- files of others ------------------------------------------------------------------------------
def test_a_document_type_is_refused(tmp_path):
    text = '<!DOCTYPE a [<!ENTITY x "ha"><!ENTITY y "&x;&x;">]><annotations>&y;</annotations>'
    with pytest.raises(LabelsError, match="declares a document type"):
        imported(write(tmp_path / "a.xml", text), tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("a.json", "[]", "list of detections"),
        ("a.json", "{}", "has no list of objects 'images'"),
        ("a.json", '{"images": [}', "is not JSON"),
        ("a.xml", "<annotations>", "is no XML"),
        ("a.xml", "<html></html>", "not <annotations> of CVAT"),
        ("a.csv", "a,b,c\n1,2,3\n", "recognised"),
        ("a.csv", "time_us,x,y,w,h,class\n1,2,3,4,nan,car\n", "line 2: the height is 'nan'"),
        ("a.txt", "1,2,3,4,5,1e99\n", "must be a number"),
        ("a.zip", "PK\x03\x04", "Unpack it"),
        ("a.bin", "\x00\x01", "recognised"),
    ],
)
def test_other_files_are_refused_in_one_line(tmp_path, name, text, problem):
    path = write(tmp_path / name, text)
    with pytest.raises(UserError, match=problem) as error:
        imported(path, tmp_path / "out", timing=Timing(1.0))
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_track_ids_that_do_not_fit_are_numbered(tmp_path):
    path = write(
        tmp_path / "a.csv",
        "time_us,x,y,w,h,class,track_id\n1,2,3,4,5,car,99999999999\n2,2,3,4,5,car,7\n3,2,3,4,5,car,\n",
    )
    _, files = imported(path, tmp_path / "out")
    assert files["a"]["track_id"].tolist() == [1, 0, NO_TRACK]
    assert files["a"].dtype.names == np.dtype(files["a"].dtype).names
