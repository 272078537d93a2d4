"""The recordings of a source: folders by the published naming, and explicit lists."""

import os

import numpy as np
import pytest
from evspan.conf.errors import RecordingError
from evspan.data_prep.labels.box_files import find_boxes, read_boxes, write_boxes
from evspan.data_prep.prepare import prepare
from evspan.data_prep.recordings.sources import find_sources
from evspan.data_prep.shards.verify import verify
from evspan.data_prep.simulator import simulate
from evspan.launch.cli.prep import main
from support.prepared import SCENE, contents, entries, prep_config


@pytest.fixture
def folder(tmp_path):
    """Empty files of every published name, in several folders."""
    for name in (
        "day1/a_td.dat",
        "day1/a_bbox.npy",
        "day2/b_td.h5",
        "day2/b_bbox.npy",
        "c_td.dat.h5",
        "c_bbox.npy",
        "d_td.raw",
        "d_bbox.npy",
        "plain.raw",
        "odd name, really.raw",
        "labels/of plain.npy",
        "notes.md",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def listed(folder, text: str, name: str = "list.txt"):
    (folder / name).write_text(text)
    return [(s.key, s.path, s.boxes, s.relative) for s in find_sources(folder / name)]


# -- folders --------------------------------------------------------------------------------------
@pytest.mark.parametrize("ending", ["_td.dat", "_td.h5", "_td.dat.h5", "_td.raw"])
def test_a_recording_and_its_boxes_are_paired_by_the_published_naming(tmp_path, ending):
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        (tmp_path / split / f"moor_2019{ending}").touch()
        (tmp_path / split / "moor_2019_bbox.npy").touch()
    (tmp_path / "val" / "moor_2019_bbox.npy").unlink()
    train, val = find_sources(tmp_path)
    assert (train.key, train.boxes, train.relative) == (
        "train/moor_2019",
        tmp_path / "train" / "moor_2019_bbox.npy",
        f"train/moor_2019{ending}",
    )
    assert (val.key, val.boxes) == ("val/moor_2019", None)


def test_one_file_and_a_flat_folder_count_as_test(folder):
    (one,) = find_sources(folder / "d_td.raw")
    assert (one.key, one.boxes, one.relative) == ("test/d", folder / "d_bbox.npy", "d_td.raw")
    assert [s.key for s in find_sources(folder)] == [
        "test/c",
        "test/d",
        "test/odd name, really",
        "test/plain",
    ]


# -- lists ----------------------------------------------------------------------------------------
def test_a_list_names_recordings_anywhere_and_boxes_of_any_name(folder):
    text = f"""# split path boxes
    train  day1/a_td.dat
    train\tday2/b_td.h5   labels/../c_bbox.npy  # not its own
    val    {folder}/c_td.dat.h5 -

    test   plain.raw      day1/a_bbox.npy
    test, "odd name, really.raw", labels/of plain.npy
    """
    assert listed(folder, text) == [
        ("train/a", folder / "day1/a_td.dat", folder / "day1/a_bbox.npy", "day1/a_td.dat"),
        ("train/b", folder / "day2/b_td.h5", folder / "labels/../c_bbox.npy", "day2/b_td.h5"),
        ("val/c", folder / "c_td.dat.h5", None, f"{folder}/c_td.dat.h5"),
        ("test/plain", folder / "plain.raw", folder / "day1/a_bbox.npy", "plain.raw"),
        (
            "test/odd name, really",
            folder / "odd name, really.raw",
            folder / "labels/of plain.npy",
            "odd name, really.raw",
        ),
    ]


def test_a_table_with_a_heading_as_other_programs_write_it(folder):
    text = "\ufeffsplit,path,boxes\r\ntrain,day1/a_td.dat,\r\nval, d_td.raw ,c_bbox.npy\r\n"
    assert [(key, boxes) for key, _, boxes, _ in listed(folder, text, "list.csv")] == [
        ("train/a", folder / "day1/a_bbox.npy"),
        ("val/d", folder / "c_bbox.npy"),
    ]


def test_names_that_collide_are_corrected_by_a_link(folder):
    (folder / "other").mkdir()
    (folder / "other" / "a.raw").touch()
    (folder / "list.txt").write_text("train day1/a_td.dat\n\ntrain other/a.raw\n")
    with pytest.raises(
        RecordingError,
        match=r"line 3: .*other/a.raw would be recording train/a, as .*a_td.dat in line 1 is",
    ):
        find_sources(folder / "list.txt")
    os.symlink(folder / "other" / "a.raw", folder / "a_of_other.raw")
    assert [key for key, *_ in listed(folder, "train day1/a_td.dat\ntrain a_of_other.raw")] == [
        "train/a",
        "train/a_of_other",
    ]
    assert [key for key, *_ in listed(folder, "train day1/a_td.dat\nval other/a.raw")] == [
        "train/a",
        "val/a",
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "training plain.raw",
            r"split 'training' is none of train, val, test\. Write one of these",
        ),
        (
            "train gone.raw",
            r"recording .*/gone\.raw is not there\. Correct the line: "
            r"paths are absolute, or start at .* folder /",
        ),
        ("train day1", r"recording .*/day1 is a folder\. Correct the line"),
        ("train plain.raw gone.npy", r"box file .*/gone\.npy is not there\. Correct the line"),
        ("train notes.md", r"notes\.md is no recording \(\.raw, \.dat, \.h5, \.hdf5, "),
        ("plain.raw", r"1 field where a line is: split path \[boxes\.npy\]"),
        ("train odd name, really.raw", r"split 'train odd name' is none of"),
        (
            "train plain.raw day1/a_bbox.npy more",
            r"4 fields where a line is: .*\. Write paths that contain blanks",
        ),
    ],
)
def test_mistakes_name_the_line_and_the_remedy(folder, line, message):
    (folder / "list.txt").write_text(f"# a comment\nval d_td.raw\n{line}\n")
    with pytest.raises(RecordingError, match=rf"^{folder}/list\.txt, line 3: .*{message}"):
        find_sources(folder / "list.txt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "lists no recordings"),
        (b"# nothing\n\n", "lists no recordings"),
        (b"train \xff\xfe\n", r"is not UTF-8 text .* at byte 6"),
        (b"train," + b"x" * 200_000, "line 1: field larger than field limit"),
    ],
)
def test_a_file_that_is_no_list(folder, content, message):
    (folder / "list.csv").write_bytes(content)
    with pytest.raises(RecordingError, match=message):
        find_sources(folder / "list.csv")


# -- the whole way --------------------------------------------------------------------------------
@pytest.mark.timeout(240)
def test_a_listed_source_is_prepared_and_verified_as_a_folder_is(tmp_path):
    raw = tmp_path / "raw"
    simulate(raw / "train" / "a_td.raw", seconds=0.4, seed=0, config=SCENE)
    simulate(raw / "val" / "b_td.dat", seconds=0.3, seed=1, config=SCENE)
    prepare(prep_config(raw, tmp_path / "reference"))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (raw / "train" / "a_bbox.npy").rename(elsewhere / "boxes of a.npy")
    (tmp_path / "list.csv").write_text(
        f"train,raw/train/a_td.raw,elsewhere/boxes of a.npy\nval,{raw}/val/b_td.dat\n"
    )
    output = tmp_path / "out"
    config = prep_config(tmp_path / "list.csv", output)
    assert prepare(config).prepared == dict.fromkeys(("train/a", "val/b"), "new")
    assert [e["source"] for e in entries(output).values()] == [
        "raw/train/a_td.raw",
        f"{raw}/val/b_td.dat",
    ]
    assert len(contents(output)["train/a"]["boxes"]) > 0
    report = verify(output, tmp_path / "list.csv", sample=None, processes=1)
    assert report.damaged == {}
    frames = {key: entry["frames"] for key, entry in entries(output).items()}
    assert {key: result.compared for key, result in report.results.items()} == frames
    assert prepare(config).prepared == {}

    boxes = read_boxes(elsewhere / "boxes of a.npy")
    boxes["track_id"] += 7
    write_boxes(elsewhere / "boxes of a.npy", boxes)
    assert prepare(config).prepared == {"train/a": "the box file has changed"}
    assert contents(output)["train/a"]["boxes"]["track_id"].min() >= 7
    (tmp_path / "list.csv").write_text(f"train,raw/train/a_td.raw,-\nval,{raw}/val/b_td.dat\n")
    assert prepare(config).prepared == {"train/a": "it has no box file any more"}
    assert entries(output)["train/a"]["boxes"] == 0
    assert not contents(output)["train/a"]["labelled"].any()

    boxes["track_id"] -= 7
    # The folder is complete again, and reuses the shards that were prepared from the list.
    write_boxes(raw / "train" / "a_bbox.npy", boxes)
    assert find_boxes(raw / "train" / "a_td.raw") is not None
    assert prepare(prep_config(raw, output)).prepared == {"train/a": "the box file has changed"}
    for key, columns in contents(tmp_path / "reference").items():
        for name, values in columns.items():
            np.testing.assert_array_equal(
                contents(output)[key][name], values, err_msg=f"{key} {name}"
            )


def test_the_command_ends_in_one_line_that_names_the_line(folder, capsys):
    (folder / "list.txt").write_text("train gone.raw\n")
    with pytest.raises(SystemExit) as exit_:
        main([f"source={folder / 'list.txt'}", f"output={folder / 'out'}", "processes=1"])
    err = capsys.readouterr().err
    assert exit_.value.code == 2
    assert err.startswith(f"error: {folder}/list.txt, line 1: recording ")
    assert err.count("\n") == 1
    assert not (folder / "out").exists()


def test_pointers_of_git_lfs_under_one_name_are_named_as_such(tmp_path):
    for name in ("a_td.dat", "a_td.h5", "a_bbox.npy"):
        (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\nsize 9\n")
    with pytest.raises(RecordingError, match=r"a_td\.dat is a Git LFS pointer.* git lfs pull"):
        find_sources(tmp_path)


def test_a_folder_is_listed_once_for_all_recordings_of_a_list(folder, monkeypatch):
    lines = []
    for i in range(5):
        (folder / f"r{i}.raw").touch()
        lines.append(f"train r{i}.raw")
    calls = []
    real = os.listdir
    monkeypatch.setattr(os, "listdir", lambda path: calls.append(path) or real(path))
    assert len(listed(folder, "\n".join(lines))) == 5
    assert len(calls) == 1
