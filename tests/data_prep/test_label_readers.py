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
from evspan.data_prep.recordings.open import open_writer
from evspan.launch.cli.main import main
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


def one_box(*names: str, size: tuple[int, int] | None = None, bbox=(10, 20, 30, 40), **keys):
    """COCO: images of these names, each with the same box."""
    images = [{"file_name": name} for name in names]
    if size is not None:
        images = [{**image, "width": size[0], "height": size[1]} for image in images]
    boxes = [
        {"image_id": i, "category_id": 10, "bbox": list(bbox), **keys} for i in range(len(names))
    ]
    return coco(images, boxes)


def write_recording(path: Path, width: int, height: int) -> Path:
    """A recording without events, which states the size of its sensor."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open_writer(path, height, width):
        return path


# -- names ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("drive_000000050000us.png", FrameName("drive", time_us=50_000)),
        ("images/train/my_drive_2_000000050000us.jpg", FrameName("my_drive_2", time_us=50_000)),
        ("1a2b3c4d-drive_000000050000us.png", FrameName("drive", time_us=50_000)),  # Label Studio
        ("6c3c5e3c__drive_000000050000us.png", FrameName("drive", time_us=50_000)),
        ("0badcafe__1a2b3c4d-drive_000000050000us.png", FrameName("drive", time_us=50_000)),
        ("x/0badca__drive_000000050000us.png", FrameName("drive", time_us=50_000)),
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


@pytest.mark.parametrize(
    ("prefixes", "recording"),
    [
        (("1a2b3c4d-", "5e6f7a8b-"), "drive"),
        (("6c3c5e3c__", "a1f09b22__"), "drive"),
        (("0badcafe__1a2b3c4d-", "a1f09b22__5e6f7a8b-"), "drive"),
        (("28112024-", "28112024-"), "28112024-drive"),
        (("6c3c5e3c__28112024-", "a1f09b22__28112024-"), "28112024-drive"),
    ],
)
def test_a_prefix_that_images_share_belongs_to_the_recording(tmp_path, prefixes, recording):
    """Label Studio gives each image a prefix of its own."""
    names = [prefix + frame_file("drive", i + 1) for i, prefix in enumerate(prefixes)]
    _, files = imported(write(tmp_path / "c.json", one_box(*names)), tmp_path / "out")
    assert list(files) == [recording]
    assert files[recording]["t"].tolist() == [1, 2]


def test_a_prefix_of_a_single_image_stays_where_the_recording_has_it(tmp_path):
    path = write(tmp_path / "c.json", one_box(frame_file("28112024-night", 100_000)))
    _, files = imported(path, tmp_path / "elsewhere")
    assert list(files) == ["night"]
    recording = write_recording(tmp_path / "out/28112024-night_td.raw", 640, 480)
    _, files = imported(path, tmp_path / "out")
    assert list(files) == ["28112024-night"]
    _, files = imported(path, tmp_path / "third", recording=recording)
    assert list(files) == ["28112024-night"]


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


CVAT_BOX = 'label="car" xtl="1" ytl="2" xbr="10" ybr="20"'


@pytest.mark.parametrize(
    ("shapes", "problem"),
    [
        (
            f'<polygon label="car" points="1,1;5,1;5,5"/><mask/><box {CVAT_BOX}/>',
            "2 shapes, the first in image 2, cannot be read: 1 polygon, 1 mask",
        ),
        (f'<box {CVAT_BOX} rotation="90.00"/>', "1 shape, the first in image 2, .* 1 rotated box"),
        (f'<tag label="car"/><box {CVAT_BOX} rotation="0.00"/>', ""),
    ],
)
def test_cvat_images_with_other_shapes_do_not_become_negatives(tmp_path, shapes, problem):
    first, second = frame_file("drive", 50_000), frame_file("drive", 100_000)
    text = f"""<annotations><meta/><image id="0" name="{first}"><box {CVAT_BOX}/></image>
    <image id="1" name="{second}">{shapes}</image></annotations>"""
    path = write(tmp_path / "a.xml", text)
    if not problem:
        summary, _ = imported(path, tmp_path / "out")
        assert (summary.boxes, summary.empty) == (2, 0)
        return
    with pytest.raises(LabelsError, match=problem):
        imported(path, tmp_path / "out")


@pytest.mark.parametrize(
    ("shape", "kind"),
    [
        ('<polygon frame="10" outside="0" points="1,1;5,1;5,5"/>', "polygon"),
        ('<skeleton frame="10"><points frame="10" points="1,1"/></skeleton>', "skeleton"),
        ('<box frame="10" xtl="1" ytl="2" xbr="10" ybr="20" rotation="12.5"/>', "rotated box"),
    ],
)
def test_cvat_tracks_of_other_shapes_are_refused(tmp_path, shape, kind):
    track = f'<track id="8" label="car">{shape}</track></annotations>'
    path = write(tmp_path / "a.xml", CVAT_VIDEO.replace("</annotations>", track))
    with pytest.raises(LabelsError, match=f"1 shape, the first in track 2, .* 1 {kind}"):
        imported(path, tmp_path / "a_bbox.npy", timing=Timing(50_000))


def cvat_project(*tasks: str) -> str:
    """A video export of a project: CVAT_VIDEO's task once for each name."""
    start, end = CVAT_VIDEO.index("<task>"), CVAT_VIDEO.index("</task>") + len("</task>")
    task = CVAT_VIDEO[start:end].replace("<name>t</name>", "<name>{}</name>")
    described = "".join(task.format(name) for name in tasks)
    project = f"<project><name>p</name><tasks>{described}</tasks></project>"
    return CVAT_VIDEO[:start] + project + CVAT_VIDEO[end:]


def test_a_cvat_project_of_one_task_has_the_frames_of_the_task(tmp_path):
    task = write(tmp_path / "task.xml", CVAT_VIDEO)
    project = write(tmp_path / "project.xml", cvat_project("drive"))
    options = {"timing": Timing(50_000), "size": (1280, 720)}
    expected, (task_boxes,) = _summary_and_boxes(task, tmp_path / "task", options)
    summary, (boxes,) = _summary_and_boxes(project, tmp_path / "project", options)
    assert (summary.frames, summary.scaled) == (4, {(640, 480)})
    assert (summary.frames, summary.scaled) == (expected.frames, expected.scaled)
    assert boxes.tolist() == task_boxes.tolist()


def _summary_and_boxes(path, folder, options):
    summary, files = imported(path, folder / "a_bbox.npy", **options)
    return summary, files.values()


def test_a_cvat_project_of_several_videos_is_refused(tmp_path):
    path = write(tmp_path / "a.xml", cvat_project("drive1", "drive2"))
    problem = r"2 tasks of a project \(drive1, drive2\).* Export the tasks one by one"
    with pytest.raises(LabelsError, match=problem):
        imported(path, tmp_path / "a_bbox.npy", timing=Timing(50_000))
    second = '<track id="8" label="car" task_id="2"/></annotations>'
    text = CVAT_VIDEO.replace('label="car"', 'label="car" task_id="1"')
    path = write(tmp_path / "b.xml", text.replace("</annotations>", second))
    with pytest.raises(LabelsError, match="2 tasks of a project.* one by one"):
        imported(path, tmp_path / "a_bbox.npy", timing=Timing(50_000))


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


def test_boxes_of_resized_images_are_scaled_to_the_recording_in_the_output_folder(tmp_path):
    """An image of 640 x 640 of a sensor of 1280 x 720, as Roboflow stretches it."""
    name = "drive_000000100000us_png.rf.0a1b.jpg"
    content = one_box(name, size=(640, 640), bbox=(320, 320, 64, 64))
    path = write(tmp_path / "c.json", content)
    for folder in ("folder", "file"):
        write_recording(tmp_path / folder / "train/drive_td.raw", 1280, 720)
        write_recording(tmp_path / folder / "train/other.raw", 640, 640)
    for out in ("folder/train", "file/train/drive_bbox.npy"):
        summary, files = imported(path, tmp_path / out)
        assert (summary.scaled, summary.unscaled) == ({(640, 640)}, set())
        assert rows(files["drive"], "x", "y", "w", "h") == [(640, 360, 128, 72)]


def test_boxes_of_images_of_the_sensors_size_stay_as_they_are(tmp_path):
    bbox = (10.123456, 20.7, 1e-3, 700.25)
    path = write(tmp_path / "c.json", one_box(frame_file("a", 1), size=(1280, 721), bbox=bbox))
    write_recording(tmp_path / "out/a.raw", 1280, 721)
    summary, files = imported(path, tmp_path / "out")
    _, expected = imported(path, tmp_path / "elsewhere")
    assert (summary.scaled, summary.unscaled) == (set(), set())
    assert files["a"].tolist() == expected["a"].tolist()
    assert rows(files["a"], "x", "y", "w", "h") == [tuple(np.float32(bbox).tolist())]


def test_boxes_of_tables_without_an_image_size_stay_as_they_are(tmp_path):
    path = write(tmp_path / "a.csv", "time_us,x,y,w,h,class\n100000,-5,1,700,500,car\n")
    write_recording(tmp_path / "out/a.raw", 640, 480)
    summary, files = imported(path, tmp_path / "out")
    assert rows(files["a"], "x", "y", "w", "h") == [(-5, 1, 700, 500)]
    assert not summary.unscaled


@pytest.mark.parametrize("content", [None, "% evt 4.0\n% end\n"], ids=["none", "unreadable"])
def test_the_import_reports_that_the_size_of_the_sensor_is_not_known(tmp_path, capsys, content):
    path = write(tmp_path / "c.json", one_box(frame_file("drive", 1), size=(640, 640)))
    if content:
        write(tmp_path / "out/drive.raw", content)
    main(["labels", "import", str(path), str(tmp_path / "out")])
    expected = (
        "boxes are in pixels of images of 640 x 640; if the sensor has another size, give --size"
    )
    assert expected in capsys.readouterr().out
    main(["labels", "import", str(path), str(tmp_path / "other"), "--size", "640x640"])
    assert "in pixels of" not in capsys.readouterr().out


def test_the_recording_gives_its_size_where_the_unit_of_its_times_is_not_certain(tmp_path):
    events = "".join(f"{i / 1000:.3f},{i % 640},{i % 480},{i % 2}\n" for i in range(3000))
    recording = write(tmp_path / "drive.csv", "# width 640 height 480\n" + events)
    path = write(tmp_path / "c.json", one_box(frame_file("drive", 1), size=(320, 240)))
    _, files = imported(path, tmp_path / "out", recording=recording)
    assert rows(files["drive"], "x", "y", "w", "h") == [(20, 40, 60, 80)]


AUGMENTED = [f"drive_000000100000us_png.rf.{key}.jpg" for key in ("aaaa1111", "bbbb2222")]


def augmented(folder: Path, name: str) -> Path:
    """Two images of one frame, each with a box."""
    a, b = AUGMENTED
    if name == "coco":
        return write(folder / "c.json", one_box(a, b))
    if name == "csv":
        heading = "filename,width,height,class,xmin,ymin,xmax,ymax\n"
        lines = "".join(f"{image},640,640,car,1,2,10,20\n" for image in AUGMENTED)
        return write(folder / "a.csv", heading + lines)
    if name == "cvat":
        images = "".join(f'<image id="0" name="{k}"><box {CVAT_BOX}/></image>' for k in AUGMENTED)
        return write(folder / "a.xml", f"<annotations><meta/>{images}</annotations>")
    for image in AUGMENTED:
        text = f"<annotation><filename>{image}</filename></annotation>"
        write(folder / "voc" / f"{image}.xml", text)
    return folder / "voc"


@pytest.mark.parametrize("name", ["coco", "csv", "cvat", "voc"])
def test_augmented_copies_are_not_merged_into_one_frame(tmp_path, name):
    path = augmented(tmp_path, name)
    assert recognise(path) == name
    problem = (
        rf"{AUGMENTED[0]} and {AUGMENTED[1]} are of one frame, drive at 100000 us \(1 such frame\)"
        ".* of augmented copies keep the first"
    )
    with pytest.raises(LabelsError, match=problem):
        imported(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_labels_of_one_image_in_two_files_are_merged(tmp_path):
    for name in ("a", "b"):
        write(tmp_path / f"coco/{name}.json", one_box(frame_file("drive", 100_000)))
    summary, _ = imported(tmp_path / "coco", tmp_path / "out")
    assert (summary.frames, summary.boxes) == (1, 2)


@pytest.mark.parametrize(("rotation", "is_read"), [(0.0, True), (90.0, False)])
def test_a_rotated_box_in_coco_is_refused(tmp_path, rotation, is_read):
    """CVAT writes the box before its rotation."""
    content = one_box(frame_file("a", 1), attributes={"rotation": rotation})
    path = write(tmp_path / "c.json", content)
    if is_read:
        assert imported(path, tmp_path / "out")[0].boxes == 1
        return
    with pytest.raises(LabelsError, match=r"annotations\[0\] is a box that is rotated by 90.0"):
        imported(path, tmp_path / "out")


@pytest.mark.parametrize(
    ("categories", "used", "expected"),
    [
        ([("objects", "none"), ("car", "objects"), ("bus", "objects")], 1, ["car", "bus"]),
        ([("car", "none"), ("car", "car")], 1, ["car"]),
        ([("objects", "none"), ("car", "objects")], 0, ["objects", "car"]),
        ([("person", "person"), ("rider", "person")], 1, ["person", "rider"]),
    ],
    ids=["root", "root_of_one_name", "used", "own_supercategory"],
)
def test_a_category_that_only_groups_others_is_no_class(tmp_path, categories, used, expected):
    content = one_box(frame_file("a", 1))
    rows = [
        {"id": i, "name": name, "supercategory": group}
        for i, (name, group) in enumerate(categories)
    ]
    content["categories"] = rows
    content["annotations"][0]["category_id"] = used
    summary, files = imported(write(tmp_path / "c.json", content), tmp_path / "out")
    assert list(summary.boxes_per_class) == expected
    assert files["a"]["class_id"].tolist() == [expected.index(categories[used][0])]


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


def test_yolo_track_ids_are_no_confidences(tmp_path):
    """As CVAT writes them: `class cx cy w h track_id`."""
    folder = yolo_folder(tmp_path / "yolo", images=True)
    boxes = "0 0.5 0.5 0.25 0.5 {}\n0 0.2 0.2 0.25 0.25 {}\n0 0.7 0.7 0.1 0.1\n"
    write(folder / "labels/train/a_000000100000us.txt", boxes.format(0, 1))
    write(folder / "labels/train/a_000000200000us.txt", boxes.format(1, 12))
    _, files = imported(folder, tmp_path / "out", keep_empty=False)
    assert rows(files["a"], "track_id", "class_confidence") == [
        (track, 1) for track in (0, 1, NO_TRACK, 1, 12, NO_TRACK)
    ]


@pytest.mark.parametrize("values", ["7.5", "-0.5", "0.5\n0 0.5 0.5 0.1 0.1 7", "2 3"])
def test_yolo_confidences_over_1_are_refused(tmp_path, values):
    folder = yolo_folder(tmp_path / "yolo", images=True)
    write(folder / "labels/train/a_000000100000us.txt", f"0 0.5 0.5 0.1 0.1 {values}\n")
    with pytest.raises(LabelsError, match=r"100000us.txt, line \d: the confidence is .* 0 to 1"):
        imported(folder, tmp_path / "out")


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


def write_videos(folder: Path, name: str) -> Path:
    """Labels of two recordings, which neither the frames nor one file's content names."""
    for sequence in ("drive1", "drive2"):
        if name == "csv":
            write(folder / f"{sequence}.csv", "time_us,x,y,w,h,class\n100000,1,1,20,20,car\n")
        elif name == "mot":
            write(folder / sequence / "gt/gt.txt", "1,1,1,1,20,20,1,1,1\n")
        else:
            write(folder / name.format(sequence), CVAT_VIDEO)
    return folder


@pytest.mark.parametrize("name", ["csv", "mot", "{}.xml", "{}/annotations.xml"])
def test_files_of_several_recordings_are_not_merged_into_one_box_file(tmp_path, name):
    folder = write_videos(tmp_path / "labels", name)
    with pytest.raises(UserError, match=r"labels of 2 recordings \(.*drive1.*drive2.*\)"):
        imported(folder, tmp_path / "out/drive1_bbox.npy", timing=Timing(50_000))
    assert not (tmp_path / "out").exists()


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


@pytest.mark.parametrize("out", [".", "a_bbox.npy", "../train", "../../link"])
def test_class_names_lie_in_the_source_for_a_relative_output(tmp_path, monkeypatch, out):
    (tmp_path / "own/train").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "own/train")
    path = write(tmp_path / "c.json", one_box(frame_file("a", 1)))
    monkeypatch.chdir(tmp_path / "own/train")
    summary, _ = imported(path, Path(out))
    assert summary.source.resolve() == tmp_path / "own"
    assert (tmp_path / "own/classes.txt").read_text() == "car\nperson\n"
    assert (tmp_path / "own/train/a_bbox.npy").is_file()


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
        ("a.json", '[{"id": 1, "data": {"image": "a.png"}}]', "Label Studio's own JSON.* as COCO"),
        ("a.json", '[{"id": 1, "annotations": []}]', "Label Studio's own JSON.* as COCO"),
        ("a.json", '[{"image_id": 1, "bbox": [1, 2, 3, 4]}]', "list of detections"),
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
