"""Shards, manifests and RVT trees that cannot be opened now: nothing is called damaged, nothing changes."""

import errno
import shutil
from pathlib import Path

import numpy as np
import pytest
from evspan.conf.errors import IO_EXIT_CODE, ShardError
from evspan.conf.schema.prep import DatasetConfig, DatasetKind
from evspan.data_prep.hdf5_files import UnavailableFileError
from evspan.data_prep.labels.box_files import read_boxes, write_boxes
from evspan.data_prep.prepare import prepare
from evspan.data_prep.recordings import sources
from evspan.data_prep.shards import atomic, pack, reading, rvt_tree
from evspan.data_prep.shards.status import status
from evspan.data_prep.shards.verify import verify
from evspan.launch.cli.prep import main
from evspan.pipeline.data.datasets import open_dataset
from support.prepared import assert_sound, copied, make_source, prep_config
from support.rvt_tree import write_rvt_tree
from support.small_shards import CLASSES

ERRORS = (
    errno.EAGAIN,
    errno.ENOLCK,
    errno.EOPNOTSUPP,
    524,  # ENOTSUPP of NFS
    errno.EACCES,
    errno.EMFILE,
    errno.ENFILE,
    errno.ESTALE,
    errno.EIO,
    errno.ENOMEM,
)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unavailable")
    source = make_source(folder / "source")
    prepare(prep_config(source, folder / "out"))
    return source, folder / "out"


def fails_with(number: int):
    def open_(path, *_, **__):
        raise OSError(number, f"Unable to open file (errno = {number})", str(path))

    return open_


def state(folder: Path) -> dict[Path, tuple[int, int]]:
    """Inode and time of every file."""
    files = [path for path in folder.rglob("*") if path.name != ".lock"]
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}


@pytest.mark.parametrize("number", ERRORS)
def test_shards_that_cannot_be_opened_are_not_damaged(prepared, monkeypatch, number):
    source, output = prepared
    before = state(output)
    monkeypatch.setattr(reading, "open_hdf5_for_reading", fails_with(number))
    for call in (
        lambda: verify(output, processes=1),
        lambda: prepare(prep_config(source, output)),
        lambda: status(output),
        lambda: open_dataset(DatasetConfig(root=str(output)), "train"),
        lambda: reading.open_group(output, reading_entry(output)),
    ):
        with pytest.raises(UnavailableFileError) as error:
            call()
        message = str(error.value)
        assert str(output) in message
        assert "\n" not in message
        assert "damaged" not in message
        assert "elete" not in message
    assert state(output) == before


@pytest.fixture
def to_redo(prepared, tmp_path):
    """A source and its prepared folder. All recordings have to be prepared again."""
    source, output = copied(prepared[0], tmp_path / "source"), copied(prepared[1], tmp_path / "out")
    for path in source.rglob("*_bbox.npy"):
        boxes = read_boxes(path)
        boxes["track_id"] += 100
        write_boxes(path, boxes)
    return source, output


def unreadable_group(monkeypatch) -> type[Exception]:
    """A recording that stays in its shard, or a part, cannot be copied."""
    monkeypatch.setattr(pack, "find_group", fails_with(errno.EIO))
    return UnavailableFileError


def full_disk(monkeypatch) -> type[Exception]:
    """From the first shard on. HDF5 writes much of it when the file is closed."""
    write = atomic.Disk.write

    def full(disk, data):
        if Path(disk.name).parent.parent.name != pack.PARTS:
            disk.error = OSError(errno.ENOSPC, "No space left on device")
        return write(disk, data)

    monkeypatch.setattr(atomic.Disk, "write", full)
    return atomic.NoSpaceError


@pytest.mark.parametrize("failure", [unreadable_group, full_disk])
def test_a_dataset_stays_usable_where_its_first_shard_cannot_be_written(
    to_redo, monkeypatch, failure
):
    source, output = to_redo
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    with monkeypatch.context() as patch:
        error = failure(patch)
        with pytest.raises(error):
            prepare(prep_config(source, output))
    for path, content in before.items():
        assert path.read_bytes() == content
    for split in ("train", "val"):
        open_dataset(DatasetConfig(root=str(output)), split)
    assert not verify(output, processes=1).damaged
    prepare(prep_config(source, output))
    assert_sound(output)
    assert prepare(prep_config(source, output)).prepared == {}


def reading_entry(output):
    from evspan.data_prep.shards.format import load_manifest

    return load_manifest(output).recordings[0]


def test_the_command_ends_with_one_line(prepared, monkeypatch, capsys):
    _, output = prepared
    monkeypatch.setattr(reading, "open_hdf5_for_reading", fails_with(errno.ESTALE))
    for arguments in (["verify", str(output), "--processes", "1"], ["status", str(output)]):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == IO_EXIT_CODE
        lines = capsys.readouterr().err.splitlines()
        assert [line for line in lines if line.startswith("error")] == lines[-1:]
        assert "cannot be read now" in lines[-1]


def test_a_shard_on_a_disk_that_is_not_mounted_is_not_redone(prepared, tmp_path):
    source, output = prepared
    shard = output / "val" / "00000.h5"
    kept = shard.rename(tmp_path / "kept.h5")
    try:
        shard.symlink_to(output / "not_mounted.h5")
        for call in (
            lambda: verify(output, processes=1),
            lambda: prepare(prep_config(source, output)),
        ):
            with pytest.raises(UnavailableFileError, match="not mounted"):
                call()
        assert shard.is_symlink()
        shard.unlink()
        shard.symlink_to(kept)
        for call in (
            lambda: verify(output, processes=1),
            lambda: prepare(prep_config(source, output)),
        ):
            with pytest.raises(ShardError, match=r"leads out of .* through a link, to"):
                call()
    finally:
        shard.unlink()
        kept.rename(shard)


def test_a_manifest_that_leads_elsewhere_changes_nothing(prepared, tmp_path):
    source, output = prepared
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "00007.h5").write_bytes(b"precious")
    manifest = output / "manifest.json"
    good = manifest.read_text()
    try:
        manifest.write_text(good.replace('"train/00000.h5"', '"../victim/00007.h5"'))
        for call in (
            lambda: prepare(prep_config(source, output)),
            lambda: verify(output, processes=1),
            lambda: open_dataset(DatasetConfig(root=str(output)), "train"),
        ):
            with pytest.raises(ShardError, match=r"recording 'a': shard is '../victim/00007.h5'"):
                call()
        assert (victim / "00007.h5").read_bytes() == b"precious"
    finally:
        manifest.write_text(good)


def opened_tree(root):
    config = DatasetConfig(root=str(root), kind=DatasetKind.rvt_tree, classes=CLASSES)
    return open_dataset(config, "train")


def test_trees_that_cannot_be_opened_are_not_damaged(tmp_path, monkeypatch):
    root = write_rvt_tree(tmp_path / "tree", {"a": 4})
    monkeypatch.setattr(rvt_tree, "open_hdf5_for_reading", fails_with(errno.EIO))
    for call in (lambda: opened_tree(root), lambda: verify(root, processes=1)):
        with pytest.raises(UnavailableFileError, match="cannot be read now"):
            call()


def edit(root: Path, name: str, change) -> None:
    path = next(root.rglob(name))
    if path.suffix == ".npz":
        with np.load(path) as stored:
            arrays = dict(stored)
        change(arrays)
        np.savez(path, **arrays)
    else:
        np.save(path, change(np.load(path)), allow_pickle=True)


def set_label(field, value):
    def change(arrays):
        arrays["labels"][field][1] = value

    return change


TREE_DAMAGES = {
    "is missing": lambda root: next(root.rglob("objframe_idx_2_repr_idx.npy")).unlink(),
    "has classes 0 to 3, dataset.classes has 3": lambda root: edit(
        root, "labels.npz", set_label("class_id", 3)
    ),
    "1 of 3 boxes are not finite": lambda root: edit(root, "labels.npz", set_label("w", np.nan)),
    "labels of one frame have different times": lambda root: edit(
        root, "labels.npz", set_label("t", 7)
    ),
    "4 frames have 3 timestamps": lambda root: edit(
        root / "train/a/event_representations_v2", "timestamps_us.npy", lambda a: a[:3]
    ),
    "leads to 9 of 4": lambda root: edit(
        root, "objframe_idx_2_repr_idx.npy", lambda a: np.array([1, 9])
    ),
    "end up to 50000 us from the times of their labels": lambda root: edit(
        root, "objframe_idx_2_repr_idx.npy", lambda a: np.array([0, 1])
    ),
    "never unpickled": lambda root: edit(
        root, "objframe_idx_2_repr_idx.npy", lambda a: np.array([{}, 1], object)
    ),
    "frames end 50000 to 50000 us apart, the folder's name says 20000|RVT's frames": lambda root: (
        next(root.rglob("stacked_*")).rename(
            root / "train/a/event_representations_v2/stacked_histogram_dt=20_nbins=10"
        )
    ),
    "frames have 20 channels, the folder's name 8": lambda root: next(
        root.rglob("stacked_*")
    ).rename(root / "train/a/event_representations_v2/stacked_histogram_dt=50_nbins=4"),
}


@pytest.mark.parametrize("message", TREE_DAMAGES)
def test_damage_to_a_tree_names_the_recording(tmp_path, message, capsys):
    root = write_rvt_tree(tmp_path / "tree", {"a": 4})
    TREE_DAMAGES[message](root)
    with pytest.raises(ShardError, match=message) as error:
        opened_tree(root)
    assert str(root / "train" / "a") in str(error.value)
    if "classes" not in message:
        report = verify(root, processes=1)
        assert report.damaged.keys() == {"train/a"}
        assert report.is_tree


def test_recordings_of_two_configs_are_not_mixed(tmp_path):
    root = write_rvt_tree(tmp_path / "tree", {"a": 4, "b": 3})
    frames = next((root / "train" / "b").rglob("*.h5"))
    frames.rename(frames.with_name("event_representations.h5"))
    with pytest.raises(ShardError, match="boxes|have different frames"):
        opened_tree(root)


def moved_split(root: Path, split: str, target: Path) -> None:
    """Moves a split's folder to another disk, and links it."""
    (root / split).rename(target)
    (root / split).symlink_to(target)


def test_a_split_may_lie_on_another_disk_for_reading(prepared, tmp_path):
    source, output = prepared
    root = Path(shutil.copytree(output, tmp_path / "out"))
    moved_split(root, "train", tmp_path / "disk")
    assert len(open_dataset(DatasetConfig(root=str(root)), "train").recordings) == 3
    assert not verify(root, processes=1).damaged
    assert status(root).complete
    with pytest.raises(ShardError, match=r"train leads out of .* through a link, to"):
        prepare(prep_config(source, root))
    shard = tmp_path / "disk" / "00000.h5"
    shard.symlink_to(shard.rename(tmp_path / "elsewhere.h5"))
    with pytest.raises(ShardError, match="only the whole folder train may be a link"):
        open_dataset(DatasetConfig(root=str(root)), "train")


def test_a_split_of_a_tree_may_lie_on_another_disk(tmp_path):
    root = write_rvt_tree(tmp_path / "tree", {"a": 4, "b": 4})
    moved_split(root, "train", tmp_path / "disk")
    assert len(opened_tree(root).recordings) == 2
    assert len(verify(root, processes=1).results) == 2
    folder = tmp_path / "disk" / "a"
    folder.symlink_to(folder.rename(tmp_path / "elsewhere"))
    with pytest.raises(ShardError, match="only the whole folder train may be a link"):
        opened_tree(root)


def test_a_source_that_cannot_be_listed_is_no_damage(prepared, monkeypatch):
    source, output = prepared
    monkeypatch.setattr(sources, "files_of", fails_with(errno.EIO))
    for call in (lambda: verify(output, source, processes=1), lambda: status(output, source)):
        with pytest.raises(UnavailableFileError, match="cannot be read now: Input/output error"):
            call()
