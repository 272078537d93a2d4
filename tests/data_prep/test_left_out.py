"""What a source holds beside readable recordings is reported or refused, and never taken for removed."""

import errno
import os
from pathlib import Path

import pytest
from evspan.conf.errors import RecordingError, ShardError, UserError
from evspan.data_prep import prepare as prepare_module
from evspan.data_prep.labels import box_files
from evspan.data_prep.labels.box_files import find_boxes
from evspan.data_prep.labels.missing import missing_labels
from evspan.data_prep.prepare import prepare
from evspan.data_prep.recordings.left_out import files_of
from evspan.data_prep.recordings.sources import find_sources, unused_files
from evspan.data_prep.shards.atomic import file_xxh3
from evspan.data_prep.simulator import simulate
from evspan.launch.cli.prep import main
from support.prepared import SCENE, contents, entries, manifest, prep_config


def touched(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Two small recordings with boxes outside of the source."""
    folder = tmp_path_factory.mktemp("store")
    for seed, name in enumerate("ab"):
        simulate(folder / f"{name}_td.h5", seconds=0.12, seed=seed, config=SCENE)
    return folder


@pytest.fixture
def linked(store, tmp_path):
    """A source of links to copies of the stored files, and the folder of these."""
    disk = tmp_path / "disk"
    disk.mkdir()
    train = tmp_path / "source" / "train"
    train.mkdir(parents=True)
    for path in store.iterdir():
        (disk / path.name).write_bytes(path.read_bytes())
        (train / path.name).symlink_to(disk / path.name)
    return tmp_path / "source", disk


# -- links that lead nowhere ----------------------------------------------------------------------
@pytest.mark.parametrize("gone", ["b_td.h5", "a_bbox.npy"])
def test_a_link_that_leads_nowhere_stops_prep_and_changes_nothing(linked, tmp_path, gone, capsys):
    source, disk = linked
    output = tmp_path / "out"
    prepare(prep_config(source, output))
    before = (manifest(output), contents(output).keys())
    (disk / gone).rename(tmp_path / gone)
    with pytest.raises(RecordingError, match=rf"train/{gone} -> {disk}/{gone}\. Nothing was chan"):
        prepare(prep_config(source, output))
    assert (manifest(output), contents(output).keys()) == before
    (tmp_path / gone).rename(disk / gone)
    report = prepare(prep_config(source, output))
    assert (report.prepared, report.removed) == ({}, [])


def test_all_dangling_links_are_counted(tmp_path):
    train = touched(tmp_path, "train/good.raw") / "train"
    for name in ("a.raw", "b_td.DAT", "good_bbox.npy", "d_BBOX.NPY", "e.h5"):
        (train / name).symlink_to("gone")
    (train / "notes").symlink_to("gone")
    with pytest.raises(RecordingError, match=r"^5 links .*a\.raw -> gone.* and 2 more\."):
        find_sources(tmp_path)


def test_a_link_to_itself_and_a_link_for_a_split_are_dangling(tmp_path):
    touched(tmp_path, "train/a.raw", "list/a.raw")
    (tmp_path / "val").symlink_to(tmp_path / "unmounted")
    with pytest.raises(RecordingError, match=r"/val -> .*unmounted"):
        find_sources(tmp_path)
    (tmp_path / "val").unlink()
    (tmp_path / "train" / "loop.raw").symlink_to("loop.raw")
    with pytest.raises(RecordingError, match=r"loop\.raw -> loop\.raw"):
        find_sources(tmp_path)
    (tmp_path / "list" / "b.raw").symlink_to("gone.raw")
    (tmp_path / "list" / "list.txt").write_text("train a.raw\ntrain b.raw\n")
    with pytest.raises(RecordingError, match=r"b\.raw -> gone\.raw"):
        find_sources(tmp_path / "list" / "list.txt")
    (tmp_path / "source").symlink_to("gone")
    with pytest.raises(RecordingError, match=r"source -> gone"):
        find_sources(tmp_path / "source")


def test_an_empty_split_is_removed_only_when_that_is_confirmed(linked, tmp_path):
    source, _ = linked
    output = tmp_path / "out"
    touched(source, "val/v.raw")
    os.replace(source / "train" / "b_td.h5", source / "val" / "b_td.h5")
    (source / "val" / "v.raw").unlink()
    prepare(prep_config(source, output))
    before = manifest(output)
    (source / "val" / "b_td.h5").unlink()
    with pytest.raises(ShardError, match=r"1 recording of val .*\(val/b\) not in source .* 0 of"):
        prepare(prep_config(source, output))
    assert manifest(output) == before
    assert prepare(prep_config(source, output, allow_removal=True)).removed == ["val/b"]
    assert entries(output).keys() == {"train/a"}


# -- files that cannot be read now ----------------------------------------------------------------
def test_a_file_that_cannot_be_read_now_is_neither_removed_nor_damaged(
    linked, tmp_path, monkeypatch
):
    source, disk = linked
    output = tmp_path / "out"
    prepare(prep_config(source, output))
    before = manifest(output)
    plain = file_xxh3
    for name in ("b_td.h5", "a_bbox.npy"):
        os.utime(disk / name, (1, 1))  # so that it is read
        for code in (errno.EACCES, errno.EMFILE, errno.ESTALE, errno.EIO):

            def failing(path: Path, name: str = name, code: int = code) -> str:
                if path.name == name:
                    raise OSError(code, os.strerror(code), str(path))
                return plain(path)

            monkeypatch.setattr(prepare_module, "file_xxh3", failing)
            message = rf"{name} cannot be read now: {os.strerror(code)}\."
            with pytest.raises(UserError, match=message):
                prepare(prep_config(source, output))
            assert manifest(output) == before


def test_a_box_file_that_cannot_be_opened_now_fails_its_recording_alone(
    linked, tmp_path, monkeypatch
):
    source, _ = linked
    plain = box_files.read_array

    def failing(path, *args, **kwargs):
        if Path(path).name == "a_bbox.npy":
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(path))
        return plain(path, *args, **kwargs)

    monkeypatch.setattr(box_files, "read_array", failing)
    with pytest.raises(RecordingError, match=r"^1 of 2 .*; 1 are done.* read now: Too many open"):
        prepare(prep_config(source, tmp_path / "out"))
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_recording_and_a_box_file_that_are_both_empty_are_both_named(tmp_path):
    source = touched(tmp_path / "source", "train/a_td.raw", "train/a_bbox.npy")
    with pytest.raises(RecordingError, match=r"a_td\.raw is empty .*a_bbox\.npy .* is empty"):
        prepare(prep_config(source, tmp_path / "out"))


# -- names ----------------------------------------------------------------------------------------
def test_suffixes_and_endings_count_in_any_case(tmp_path):
    touched(tmp_path, "train/A_TD.RAW", "train/A_BBOX.NPY", "train/b_td.Dat", "train/b_bbox.npy")
    touched(tmp_path, "train/c.HDF5", "train/B_bbox.npy", "train/d_td.DAT.H5")
    found = {s.name: s.boxes and s.boxes.name for s in find_sources(tmp_path)}
    assert found == {"A": "A_BBOX.NPY", "b": "b_bbox.npy", "c": None, "d": None}
    for path in (tmp_path / "train").glob("*_[Tt][Dd].*"):
        boxes = find_boxes(path)
        assert (boxes and boxes.name) == found[path.name.split("_")[0]]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (b"_td.h5", r"_td\.h5 has no name before its ending"),
        (b"_TD.RAW", r"_TD\.RAW has no name before its ending"),
        (b"caf\xe9_td.h5", r"caf\\xe9_td\.h5: the file name is not UTF-8\. Rename it"),
    ],
)
def test_names_that_no_shard_can_hold_end_in_one_line(tmp_path, name, message, capsys):
    touched(tmp_path, "train/a.raw")
    Path(os.fsdecode(os.fsencode(tmp_path / "train") + b"/" + name)).touch()
    with pytest.raises(RecordingError, match=message):
        find_sources(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        main([f"source={tmp_path}", f"output={tmp_path}_out", "dataset=simulated"])
    assert capsys.readouterr().err.count("\n") == 1


def test_a_list_may_not_name_a_recording_of_dots(tmp_path):
    touched(tmp_path, ".._td.h5")
    (tmp_path / "list.txt").write_text("train .._td.h5\n")
    with pytest.raises(RecordingError, match="has no name before its ending"):
        find_sources(tmp_path / "list.txt")


# -- unused files ---------------------------------------------------------------------------------
def test_each_kind_of_unused_file_has_one_line(tmp_path):
    touched(tmp_path, "train/a_td.dat", "train/a_bbox.npy", "train/notes.md")
    assert unused_files(tmp_path) == []
    touched(tmp_path, "train/day/b_td.RAW", "train/night/deep/c_td.h5", "train/day/.hidden.raw")
    touched(tmp_path, "val/d_td.raw.gz", "train/e.zip", "train/a_td_bbox.npy", "val/f_bbox.npz")
    touched(tmp_path, "val/g.raw", "train/._a_td.dat", "other/h.raw", "train/.trash/i.raw")
    touched(tmp_path, "test.tar.gz")
    os.mkfifo(tmp_path / "train" / "pipe.raw")
    (tmp_path / "validation").symlink_to("gone")
    assert unused_files(tmp_path) == [
        "left out, being in none of train/, val/, test/: other/h.raw",
        "left out, in sub-folders: train/day/b_td.RAW and 1 more. Move them up, or name them in "
        "a list: source=LIST.txt",
        "left out, compressed: train/e.zip and 2 more. Unpack them (gunzip, unzstd)",
        "left out, box files of no recording: train/a_td_bbox.npy and 1 more. The box file of "
        "X_td.* is X_bbox.npy; source=LIST.txt names others; of an .npz, save the array of boxes "
        "with numpy.save",
        "left out, links to files that are not there: validation",
        "left out, hidden: train/._a_td.dat",
    ]
    assert [source.key for source in find_sources(tmp_path)] == ["train/a", "val/g"]


def test_a_source_without_recordings_is_refused_with_what_it_has_instead(tmp_path):
    touched(tmp_path, "train/day/a.raw", "train/b.raw.zst")
    with pytest.raises(RecordingError, match=r"no recordings .*train/day/a\.raw.*compressed: tr"):
        find_sources(tmp_path)


def test_recordings_without_boxes_are_missed_by_split_with_the_commands_that_label_them(tmp_path):
    paths = [("test", Path("raw/test/t.raw")), ("val", Path("raw/val/v.raw"))]
    paths += [("train", Path(f"raw/train/{name}_td.raw")) for name in "abcd"]
    lines = list(missing_labels(paths, Path("raw"), any_labelled=True).values())
    assert [line.split(";")[0] for line in lines] == [
        "train: 4 recordings without a box file (a_bbox.npy next to a_td.raw): a, b, c and 1 more",
        "val: 1 recording without a box file (v_bbox.npy next to v.raw): v",
    ]
    assert "evspan labels export raw/train/a_td.raw PICTURES" in lines[0]
    assert "evspan labels import FILE raw/train" in lines[0]
    assert "evspan labels pseudo RUN raw OUT --split train" in lines[0]
    assert len(missing_labels(paths, Path("raw"), any_labelled=False)) == 3
    assert not missing_labels(paths[:1], Path("raw"), any_labelled=True)


def test_a_name_with_control_characters_is_escaped(tmp_path):
    touched(tmp_path, "train/a.raw", "train/\x1b[31mb.gz")
    assert "train/\\x1b[31mb.gz" in unused_files(tmp_path)[0]
    assert files_of(tmp_path / "train").compressed == [tmp_path / "train" / "\x1b[31mb.gz"]
