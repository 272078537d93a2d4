"""`evspan prep export-rvt`: the published preprocessing's own output is the oracle, array by array and filter by filter."""

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import hdf5plugin  # noqa: F401  registers Blosc
import numpy as np
import pytest
from evspan.conf.errors import ConfigError, ShardError, UserError
from evspan.conf.schema.prep import (
    DatasetConfig,
    DatasetKind,
    FrameConfig,
    FrameMode,
    LabelConfig,
    PrepConfig,
)
from evspan.data_prep.labels.box_files import RAW_BOX, write_boxes
from evspan.data_prep.prepare import prepare
from evspan.data_prep.recordings.events import Events
from evspan.data_prep.recordings.open import open_writer
from evspan.data_prep.report.survey import survey
from evspan.data_prep.shards.atomic import NoSpaceError, locked
from evspan.data_prep.shards.export_rvt import STAGING, export_rvt
from evspan.launch.cli.prep_export_rvt import main
from evspan.pipeline.data.datasets import open_dataset
from support.prepared import make_source, prep_config
from support.rvt_tree import assert_same, assert_same_tree, files

CLASSES = ["pedestrian", "two_wheeler", "car"]
RVT_LABELS = LabelConfig(
    class_map={0: 0, 1: 1, 2: 2}, min_side=5, max_width_fraction=0.9, label_every_ms=100
)
KEYS = ["train/synth_a_0_1000000", "val/synth_b_0_620000", "test/synth_d_0_300000"]


@pytest.fixture(scope="module")
def fixture(parity_dir) -> Path:
    return parity_dir / "prep_fixture"


@pytest.fixture(scope="module")
def shards(tmp_path_factory, fixture) -> Path:
    """The fixture's inputs, prepared as RVT does it; synth_c has no label of a used class."""
    output = tmp_path_factory.mktemp("shards")
    prepare(
        PrepConfig(
            source=str(fixture / "input"),
            output=str(output),
            processes=1,
            frames=FrameConfig(mode=FrameMode.rvt),
            dataset=DatasetConfig(name="gen4_rvt", classes=CLASSES, labels=RVT_LABELS),
        )
    )
    return output


@pytest.fixture(scope="module")
def exported(tmp_path_factory, shards) -> Path:
    out = tmp_path_factory.mktemp("exported")
    assert sorted(export_rvt(shards, out).written) == sorted(KEYS)
    return out


@pytest.mark.slow
def test_every_array_is_rvts_own(exported, fixture):
    assert_same_tree(exported, fixture / "output")


@pytest.mark.slow
def test_run_again_only_what_is_missing_is_written(exported, shards, fixture, tmp_path):
    out = Path(shutil.copytree(exported, tmp_path / "out"))
    shutil.rmtree(out / KEYS[1])
    before = {name: (out / name).stat().st_mtime_ns for name in files(out)}
    report = export_rvt(shards, out)
    assert report.written == [KEYS[1]]
    assert sorted(report.existing) == sorted([KEYS[0], KEYS[2]])
    assert all((out / name).stat().st_mtime_ns == then for name, then in before.items())
    assert_same_tree(out, fixture / "output")


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_one_split(shards, fixture, tmp_path, split):
    export_rvt(shards, tmp_path / "out", (split,))
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [".lock", split]
    assert_same_tree(tmp_path / "out" / split, fixture / "output" / split)


@pytest.mark.slow
@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_the_tree_opens_as_the_shards_do(shards, exported, split):
    ours = open_dataset(DatasetConfig(root=str(shards), classes=CLASSES), split)
    tree = open_dataset(
        DatasetConfig(root=str(exported), classes=CLASSES, kind=DatasetKind.rvt_tree), split
    )
    assert (
        (tree.height, tree.width, tree.channels)
        == (ours.height, ours.width, ours.channels)
        == (360, 640, 20)
    )
    by_name = {r.name: r for r in ours.recordings if r.labelled.any()}
    assert [r.name for r in tree.recordings] == sorted(by_name)
    for recording in tree.recordings:
        other = by_name[recording.name]
        np.testing.assert_array_equal(
            recording.end_us + recording.clock_us, other.end_us + other.clock_us
        )
        np.testing.assert_array_equal(recording.labelled, other.labelled)
        np.testing.assert_array_equal(recording.box_start, other.box_start)
        everything = slice(0, len(other.end_us))
        np.testing.assert_array_equal(
            recording.read_frames(everything), other.read_frames(everything)
        )
        assert (
            recording.read_boxes(slice(0, None)).tolist()
            == other.read_boxes(slice(0, None)).tolist()
        )


@pytest.mark.slow
def test_full_resolution_keeps_boxes_and_names_its_file_so(fixture, tmp_path):
    source = tmp_path / "raw" / "test"
    source.mkdir(parents=True)
    for path in (fixture / "input" / "test").glob("synth_d*"):
        shutil.copy(path, source)
    prepare(
        PrepConfig(
            source=str(source.parent),
            output=str(tmp_path / "shards"),
            processes=1,
            frames=FrameConfig(mode=FrameMode.rvt, downsample=1),
            dataset=DatasetConfig(classes=CLASSES, labels=RVT_LABELS),
        )
    )
    export_rvt(tmp_path / "shards", tmp_path / "out")
    half, full = fixture / "output" / KEYS[2], tmp_path / "out" / KEYS[2]
    with (
        np.load(half / "labels_v2" / "labels.npz") as expected,
        np.load(full / "labels_v2" / "labels.npz") as actual,
    ):
        assert_same(actual["labels"], expected["labels"], "labels")
    frames = Path("event_representations_v2") / "stacked_histogram_dt=50_nbins=10"
    with (
        h5py.File(half / frames / "event_representations_ds2_nearest.h5") as expected,
        h5py.File(full / frames / "event_representations.h5") as actual,
    ):
        np.testing.assert_array_equal(actual["data"][:, :, 1::2, 1::2], expected["data"][:])


# -- what goes wrong ---------------------------------------------------------------------------------------------
def test_other_frames_are_refused_with_the_remedy(tmp_path):
    source, output = make_source(tmp_path / "raw"), tmp_path / "shards"
    prepare(prep_config(source, output))
    with pytest.raises(ConfigError, match="of mode exact.*frames.mode=rvt"):
        export_rvt(output, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_tree_in_the_place_is_refused_and_left_alone(shards, exported, tmp_path):
    out = Path(shutil.copytree(exported, tmp_path / "out"))
    times = (
        out
        / KEYS[0]
        / "event_representations_v2"
        / "stacked_histogram_dt=50_nbins=10"
        / "timestamps_us.npy"
    )
    np.save(times, np.load(times) + 1)
    before = {name: (out / name).read_bytes() for name in files(out)}
    with pytest.raises(ShardError, match=f"{KEYS[0]} exists already"):
        export_rvt(shards, out)
    assert {name: (out / name).read_bytes() for name in files(out)} == before


def test_a_changed_frame_is_noticed(shards, exported, tmp_path):
    out = Path(shutil.copytree(exported, tmp_path / "out"))
    (path,) = (out / KEYS[1]).rglob("*.h5")
    with h5py.File(path, "r+") as file:
        middle = len(file["data"]) // 2
        file["data"][middle] = file["data"][middle] ^ 1
    with pytest.raises(ShardError, match=f"{KEYS[1]} exists already"):
        export_rvt(shards, out)


@pytest.mark.parametrize(
    ("out", "message"), [("inside", "lies inside the shards"), ("", "lies inside the shards")]
)
def test_the_shards_own_folder_is_refused(shards, out, message):
    with pytest.raises(ShardError, match=message):
        export_rvt(shards, shards / out)


def test_a_damaged_shard_is_named_and_the_recording_is_not_there(shards, tmp_path):
    broken = Path(shutil.copytree(shards, tmp_path / "shards"))
    with h5py.File(broken / "train" / "00000.h5", "r+") as file:
        (group,) = file.values()
        start = group["frame_start"][:]
        group["frames"][start[9] : start[9] + 3000] = 255  # leads past the frame's last cell
    with pytest.raises(ShardError, match="train/00000.h5.*damaged"):
        export_rvt(broken, tmp_path / "out")
    assert files(tmp_path / "out") == []


def command(*arguments) -> list[str]:
    return [sys.executable, "-m", "evspan.launch", "prep", "export-rvt", *map(str, arguments)]


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_the_command_and_its_mistakes(shards, fixture, tmp_path):
    completed = subprocess.run(
        command(shards, tmp_path / "out"), capture_output=True, text=True, timeout=120
    )
    assert completed.returncode == 0 and "3 recordings written" in completed.stdout, (
        completed.stderr
    )
    assert_same_tree(tmp_path / "out", fixture / "output")
    again = subprocess.run(
        command(shards, tmp_path / "out"), capture_output=True, text=True, timeout=120
    )
    assert again.returncode == 0
    assert "0 recordings written" in again.stdout
    assert "3 there already" in again.stdout
    for arguments in (
        (tmp_path, tmp_path / "new"),
        (shards, tmp_path / "new", "--split", "all"),
        (shards,),
    ):
        failed = subprocess.run(command(*arguments), capture_output=True, text=True, timeout=120)
        assert failed.returncode == 2
        assert failed.stderr.startswith("error: ")
        assert failed.stderr.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_what_the_tree_has_no_place_for_is_counted(tmp_path, capsys):
    """Ignore regions at every label, and one labelled frame with nothing else."""
    train = tmp_path / "raw" / "train"
    train.mkdir(parents=True)
    t = np.arange(0, 1_000_000, 100)
    pixel = (t // 100 % 50).astype(np.uint16)
    with open_writer(train / "a_td.h5", 50, 100) as writer:
        writer.write(Events(t, pixel, pixel, (pixel % 2).astype(np.uint8)))
    times = 100_000 + 33_333 * np.arange(25)  # every third one ends a frame
    regions = np.zeros(times.size, RAW_BOX)
    regions["t"] = times
    regions["x"], regions["y"], regions["w"], regions["h"] = 10, 5, 20, 15
    boxes = regions.copy()
    boxes["x"] = 40
    write_boxes(train / "a_bbox.npy", boxes[boxes["t"] != times[6]], regions)
    frames = {"mode": FrameMode.rvt}
    prepare(prep_config(train.parent, tmp_path / "shards", frames=frames))
    arguments = [str(tmp_path / "shards"), str(tmp_path / "tree")]
    for part in ("1 recording written", "1 there already"):
        capsys.readouterr()
        main(arguments)
        out = capsys.readouterr().out
        assert part in out
        assert "left out 9 ignore regions, which RVT's format does not have" in out
        assert "left out 1 labelled frame without boxes, as RVT does" in out


def killed_export(shards: Path, out: Path, path: Path) -> bool:
    """Kills an export into `out` once `path` exists. Whether it was still running."""
    shutil.rmtree(out, ignore_errors=True)
    process = subprocess.Popen(command(shards, out), stdout=subprocess.DEVNULL)
    while process.poll() is None and not path.exists():
        time.sleep(0.0005)
    process.kill()
    return process.wait(timeout=60) == -signal.SIGKILL


ATTEMPTS = 5  # on a busy machine, an export may end before the test sees that its file exists


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("key", KEYS)
def test_killed_while_a_recording_is_written_it_is_absent(shards, fixture, tmp_path, key):
    out = tmp_path / "out"
    staged = out / STAGING / key
    for _ in range(ATTEMPTS):
        if killed_export(shards, out, staged / "labels_v2" / "labels.npz") and staged.exists():
            break
    assert staged.exists(), "no export was killed while it wrote the recording"
    for other in KEYS:
        if KEYS.index(other) < KEYS.index(key):
            assert_same_tree(out / other, fixture / "output" / other)
        else:
            assert not (out / other).exists()
    export_rvt(shards, out)
    assert_same_tree(out, fixture / "output")


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_killed_when_a_recording_appears_it_is_whole(shards, fixture, tmp_path):
    out = tmp_path / "out"
    killed = any(killed_export(shards, out, out / KEYS[0]) for _ in range(ATTEMPTS))
    assert killed, "no export was killed"
    assert_same_tree(out / KEYS[0], fixture / "output" / KEYS[0])
    export_rvt(shards, out)
    assert_same_tree(out, fixture / "output")


def test_two_at_once_one_refuses(shards, tmp_path):
    (tmp_path / "out").mkdir()
    with locked(tmp_path / "out"), pytest.raises(UserError, match="is being written to by process"):
        export_rvt(shards, tmp_path / "out")


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_full_disk_is_reported_and_the_next_run_completes(shards, fixture, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(disk)],
        capture_output=True,
        text=True,
    )
    if mounted.returncode:
        pytest.skip(f"mounting a small tmpfs is not permitted here ({mounted.stderr.strip()})")
    try:
        with pytest.raises(NoSpaceError, match="no space left"):
            export_rvt(shards, disk / "out")
        for key in KEYS:
            if (disk / "out" / key).exists():
                assert_same_tree(disk / "out" / key, fixture / "output" / key)
        assert not (disk / "out" / ".exporting").exists()
        assert not (disk / "out" / KEYS[0]).exists()
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        export_rvt(shards, disk / "out")
        assert_same_tree(disk / "out", fixture / "output")
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_changed_boxes_are_not_exported(shards, tmp_path):
    broken = Path(shutil.copytree(shards, tmp_path / "shards"))
    with h5py.File(broken / "train" / "00000.h5", "r+") as file:
        (group,) = file.values()
        boxes = group["boxes"][:]
        boxes["x"][3] += 1
        group["boxes"][:] = boxes
    with pytest.raises(
        ShardError, match="frame 1 is damaged .its boxes do not have their checksum"
    ):
        export_rvt(broken, tmp_path / "out")
    with pytest.raises(
        ShardError, match="frame 1 is damaged .its boxes do not have their checksum"
    ):
        survey(broken, frames_per_recording=1)
