"""Damage to shards: each kind is found, reported, marked, and redone alone by the next preparation."""

import io
import json
import multiprocessing
import os
import re
import shutil
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from evspan.conf.errors import ShardError, UserError
from evspan.conf.schema.prep import Codec, FrameMode
from evspan.data_prep.labels.box_files import read_boxes, write_boxes
from evspan.data_prep.prepare import prepare
from evspan.data_prep.shards.atomic import locked
from evspan.data_prep.shards.check import Task, sampled_frames
from evspan.data_prep.shards.format import RecordingEntry
from evspan.data_prep.shards.verify import verify as verify_shards
from evspan.data_prep.simulator import simulate
from evspan.launch.cli.prep import main
from evspan.launch.cli.prep_verify import print_report
from support.prepared import (
    KEYS,
    SCENE,
    assert_same,
    assert_sound,
    contents,
    copied,
    entries,
    make_source,
    prep_config,
)
from support.sealed import COLUMNS, checksum, seal_rows

REDONE = "evspan prep verify found it damaged"


def verify(root, source=None, **options) -> dict[str, str]:
    """What is damaged; prints what the command prints."""
    report = verify_shards(root, source, **options)
    print_report(root, report, has_source=source is not None)
    return report.damaged


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_source(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def prepared(source, tmp_path_factory):
    output = tmp_path_factory.mktemp("prepared")
    prepare(prep_config(source, output))
    return output


@pytest.fixture(scope="module")
def other_run(tmp_path_factory):
    """Other recordings of the same names, another config."""
    folder = tmp_path_factory.mktemp("other")
    for seed, name in enumerate(("a_td.raw", "b_td.dat", "c_td.h5")):
        simulate(folder / "raw" / "train" / name, seconds=0.3, seed=50 + seed, config=SCENE)
    prepare(prep_config(folder / "raw", folder / "same"))
    prepare(prep_config(folder / "raw", folder / "coarse", frames={"bins": 2}))
    return folder


@pytest.fixture
def mine(source, prepared, tmp_path):
    return copied(source, tmp_path / "source"), copied(prepared, tmp_path / "out")


def shard(output):
    return output / "train" / "00000.h5"


def flip(path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x5A
    path.write_bytes(data)


def flip_stored(path, name: str, byte: int) -> None:
    """A byte of a dataset, where it lies in the file: HDF5 itself never notices."""
    with h5py.File(path, "r") as file:
        dataset = file[name]
        start = (
            dataset.id.get_chunk_info(0).byte_offset if dataset.chunks else dataset.id.get_offset()
        )
    flip(path, start + byte)


def change(name: str, edit):
    """A writer's mistake: a column that HDF5 stores well."""

    def damage(output):
        with h5py.File(shard(output), "r+") as file:
            values = file[name][:]
            edit(values)
            file[name][:] = values

    return damage


def invert(values):
    values[:] = ~values


def set_item(index, value):
    def edit(values):
        values[index] = value

    return edit


def set_field(name, value):
    def edit(values):
        values[name][0] = value

    return edit


def replace_column(name, values):
    def damage(output):
        with h5py.File(shard(output), "r+") as file:
            del file[name]
            file[name] = values

    return damage


def lose(name):
    def damage(output):
        with h5py.File(shard(output), "r+") as file:
            del file[name]

    return damage


def edit_attribute(group, name, edit):
    def damage(output):
        with h5py.File(shard(output), "r+") as file:
            old = file[group].attrs[name]
            if isinstance(old, bytes):
                file[group].attrs[name] = np.bytes_(edit(old.decode()).encode())
            else:
                file[group].attrs[name] = edit(old)

    return damage


DAMAGES = {  # what is done to the shard of train/a, b and c; which of them it hits; the message of verify
    "a byte of the frames": (
        lambda o: flip_stored(shard(o), "b/frames", 100),
        "b",
        "the frames have the checksum",
    ),
    "a byte of a box's width": (
        lambda o: flip_stored(shard(o), "a/boxes", 16),
        "a",
        "labelled have the checksum",
    ),
    "a byte of a box's time": (
        lambda o: flip_stored(shard(o), "a/boxes", 1),
        "a",
        "boxes have another time than the end",
    ),
    "a low byte of a time": (
        lambda o: flip_stored(shard(o), "c/end_us", 0),
        "c",
        "checksum|another time",
    ),
    "a high byte of a time": (
        lambda o: flip_stored(shard(o), "b/end_us", 5),
        "b",
        "end_us does not increase",
    ),
    "where a frame starts": (
        lambda o: flip_stored(shard(o), "a/frame_start", 26),
        "a",
        "frame_start does not lead from 0 up to",
    ),
    "where boxes start": (
        change("a/box_start", set_item(1, 2**40)),
        "a",
        "box_start does not lead from 0 up to",
    ),
    "boxes of frames that have no label": (
        change("a/labelled", invert),
        "a",
        "frames are labelled|boxes lie on frames that",
    ),
    "a class too many": (
        change("c/boxes", set_field("class_id", 3)),
        "c",
        "1 of .* boxes have a class that the dataset lacks",
    ),
    "a box outside the frame": (
        change("c/boxes", set_field("x", -4)),
        "c",
        "1 of .* boxes lie outside the frame",
    ),
    "a box without a size": (
        change("c/boxes", set_field("w", np.nan)),
        "c",
        "1 of .* boxes are not finite",
    ),
    "a column of another type": (
        replace_column("b/labelled", np.zeros(7, np.uint8)),
        "b",
        "labelled is uint8 .* of bool",
    ),
    "a column lost": (lose("b/box_start"), "b", "box_start missing"),
    "a group lost": (lose("b"), "b", "train/00000.h5 does not hold it"),
    "an attribute that is no JSON": (
        edit_attribute("a", "entry", lambda v: v[:50]),
        "a",
        "train/00000.h5 cannot be read",
    ),
    "counts in the attribute": (
        edit_attribute("b", "entry", lambda v: v.replace('"events": ', '"events": 9')),
        "b",
        "the shard and the manifest differ in events",
    ),
    "the size of frames": (
        edit_attribute("b", "frame_shape", lambda v: v // 2),
        "b",
        r"have the shape \(3, .* of \(6, ",
    ),
    "cut short": (
        lambda o: os.truncate(shard(o), shard(o).stat().st_size // 2),
        "abc",
        "cannot be read: .*truncated file",
    ),
    "cut to nothing": (lambda o: os.truncate(shard(o), 0), "abc", "cannot be read"),
    "deleted": (lambda o: shard(o).unlink(), "abc", "train/00000.h5 is not there"),
}


def raw_groups(output: Path) -> dict[str, bytes]:
    """Every group that can be read, as its bytes."""
    found = {}
    for path in sorted(output.glob("*/[0-9]*.h5")):
        try:
            with h5py.File(path, "r") as file:
                for name, group in file.items():
                    columns = sorted((k, v[:].tobytes()) for k, v in group.items())
                    found[f"{path.parent.name}/{name}"] = repr(
                        (columns, sorted(map(str, group.attrs.items())))
                    ).encode()
        except OSError:
            pass
    return found


def assert_mended(
    source, output, prepared, damaged: list[str], before: dict[str, bytes], **config
) -> None:
    """The next preparation does these again and leaves the others as they are, after which all is sound."""
    report = prepare(prep_config(source, output, **config))
    assert report.prepared.keys() == set(damaged)
    assert not report.removed
    after = raw_groups(output)
    assert all(after[key] == before[key] for key in KEYS if key not in damaged)
    assert_same(output, prepared)
    assert verify(output, source, sample=None, processes=1) == {}
    assert prepare(prep_config(source, output, **config)).prepared == {}


# -- sound -------------------------------------------------------------------------------------------------------
def test_a_sound_dataset_is_left_as_it_is(source, prepared, capsys):
    before = {p: p.stat().st_mtime_ns for p in prepared.rglob("*") if p.name != ".lock"}
    assert verify(prepared, processes=1) == {}
    out = capsys.readouterr().out.splitlines()
    assert sorted(line.split("] ")[1] for line in out[:5]) == sorted(
        f"{key}: sound" for key in KEYS
    )
    assert out[5:] == [
        f"{prepared}: 5 of 5 recordings are sound; 0 frames of 0 compared with the recordings (--source RAW "
        "compares a few of each)"
    ]
    assert verify(prepared, source, sample=2, processes=1) == {}
    assert capsys.readouterr().out.endswith(
        "5 of 5 recordings are sound; 10 frames of 5 compared with the recordings\n"
    )
    assert verify(prepared, source, sample=None, processes=1) == {}
    frames = sum(e["frames"] for e in entries(prepared).values())
    assert capsys.readouterr().out.endswith(
        f"; {frames} frames of 5 compared with the recordings\n"
    )
    assert {p: p.stat().st_mtime_ns for p in prepared.rglob("*") if p.name != ".lock"} == before


def test_frames_of_rvt_are_compared_as_rvt_makes_them(source, tmp_path):
    labelled = copied(source, tmp_path / "source")
    shutil.rmtree(labelled / "test")
    config = prep_config(labelled, tmp_path / "out", frames={"mode": FrameMode.rvt, "bins": 10})
    prepare(config)
    assert verify(tmp_path / "out", labelled, sample=None, processes=1) == {}
    with h5py.File(shard(tmp_path / "out"), "r+") as file:
        rewrite(file["a"], frame=1)
    damaged = verify(tmp_path / "out", labelled, sample=None, processes=1)
    assert list(damaged) == ["train/a"]
    assert "frames differ from the recording's, first 1" in damaged["train/a"]
    assert prepare(config).prepared == {"train/a": REDONE}
    assert verify(tmp_path / "out", labelled, sample=None, processes=1) == {}


def test_a_moved_recording_and_a_renamed_shard_are_no_damage(mine):
    source, output = mine
    shard(output).rename(output / "train" / "00007.h5")
    (source / "train" / "b_td.dat").rename(source / "train" / "b.dat")
    (source / "train" / "c_td.h5").touch()
    assert prepare(prep_config(source, output)).prepared == {}
    assert entries(output)["train/a"]["shard"] == "train/00007.h5"
    assert verify(output, source, processes=1) == {}


# -- damaged -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_found_and_redone_alone(mine, prepared, name):
    source, output = mine
    damage, hit, pattern = DAMAGES[name]
    before = raw_groups(output)
    damage(output)
    damaged = verify(output, processes=1)
    assert list(damaged) == [f"train/{n}" for n in hit]
    for why in damaged.values():
        assert re.search(pattern, why), why
    assert_mended(source, output, prepared, list(damaged), before)


def test_compressed_frames_are_verified_too(source, tmp_path):
    config = prep_config(source, tmp_path / "out", codec=Codec.small)
    prepare(config)
    assert verify(tmp_path / "out", source, processes=1) == {}
    shutil.copytree(tmp_path / "out", tmp_path / "reference")
    flip_stored(shard(tmp_path / "out"), "b/frames", 3000)
    assert list(verify(tmp_path / "out", processes=1)) == ["train/b"]
    assert prepare(config).prepared == {"train/b": REDONE}
    assert_same(tmp_path / "out", tmp_path / "reference")


def rewrite(group: h5py.Group, frame: int) -> None:
    """A frame other than the recording's, with checksums that agree: what no checksum can find."""
    codes, start = group["frames"][:], group["frame_start"][:]
    codes[start[frame]] ^= 1  # one cell further, or nearer
    group["frames"][:] = codes
    seal(group)


def seal(group: h5py.Group) -> None:
    """Gives a group the checksums of its contents, as data_prep/shards/format.py defines them."""
    entry = json.loads(group.attrs["entry"])
    columns = {"code": group["frames"][:], **{name: group[name][:] for name in COLUMNS}}
    entry["frames_xxh3"], entry["group_xxh3"] = checksum(columns)
    group.attrs["entry"] = np.bytes_(json.dumps(entry))
    seal_rows(group, entry)
    manifest_path = Path(group.file.filename).parent.parent / "manifest.json"
    manifest_content = json.loads(manifest_path.read_text())
    for recording in manifest_content["recordings"]:
        if (recording["split"], recording["name"]) == (entry["split"], entry["name"]):
            recording |= {k: entry[k] for k in ("frames_xxh3", "group_xxh3")}
    manifest_path.write_text(json.dumps(manifest_content, indent=1, sort_keys=True) + "\n")


def test_frames_that_the_recording_does_not_give_are_found_by_recomputing(mine, prepared, capsys):
    source, output = mine
    before = raw_groups(output)
    with h5py.File(shard(output), "r+") as file:
        n, middle = len(file["a/end_us"]), 4
        rewrite(file["a"], frame=middle)
    assert_sound(output)
    assert verify(output, processes=1) == {}  # the checksums agree
    entry = RecordingEntry(**entries(output)["train/a"])

    def is_sampled(seed):
        return middle in sampled_frames(Task(output, entry, {}, None, "", 3, seed))

    hit = next(seed for seed in range(100) if is_sampled(seed))
    miss = next(seed for seed in range(100) if not is_sampled(seed))
    copies = [copied(output, output.with_name(name)) for name in ("hit", "miss")]
    damaged = verify(copies[0], source, sample=3, seed=hit, processes=1)
    assert damaged == {
        "train/a": f"1 of 3 compared frames differ from the recording's, first {middle}"
    }
    assert verify(copies[1], source, sample=3, seed=miss, processes=1) == {}
    damaged = verify(output, source, sample=None, processes=1)
    assert damaged == {
        "train/a": f"1 of {n} compared frames differ from the recording's, first {middle}"
    }
    assert_mended(source, output, prepared, ["train/a"], before)


def test_samples_depend_on_the_seed_and_on_the_recording(mine):
    _source, output = mine
    entry = RecordingEntry(**entries(output)["train/a"])

    def sampled(seed, count, name="a"):
        return sampled_frames(Task(output, replace(entry, name=name), {}, None, "", count, seed))

    assert sampled(0, 3) == sampled(0, 3)
    assert len(set(sampled(0, 3))) == 3
    assert len({tuple(sampled(seed, 3)) for seed in range(20)}) > 10
    assert len({tuple(sampled(0, 3, name)) for name in "abcdefgh"}) > 4
    assert sampled(0, 1000) == list(range(entry.frames))
    assert sampled(0, 0) == []
    assert set().union(*(sampled(seed, 3) for seed in range(100))) == set(range(entry.frames))


@pytest.mark.parametrize("run", ["same", "coarse"])
def test_a_shard_of_another_run_is_found_and_redone_alone(mine, prepared, other_run, run):
    source, output = mine
    before = raw_groups(output)
    shutil.copy(shard(other_run / run), shard(output))
    damaged = verify(output, processes=1)
    assert list(damaged) == ["train/a", "train/b", "train/c"]
    assert_mended(source, output, prepared, list(damaged), before)


def test_a_shard_of_another_split_is_found_and_redone_alone(mine, prepared):
    source, output = mine
    before = raw_groups(output)
    shutil.copy(output / "val" / "00000.h5", shard(output))
    damaged = verify(output, processes=1)
    assert damaged == {f"train/{n}": "train/00000.h5 does not hold it" for n in "abc"}
    assert_mended(source, output, prepared, list(damaged), before)


def test_an_only_shard_that_is_of_other_recordings_is_redone(source, tmp_path, other_run):
    flat, output = copied(source / "val", tmp_path / "flat"), tmp_path / "out"
    prepare(prep_config(flat, output))
    shutil.copytree(output, tmp_path / "reference")
    shutil.copytree(other_run / "raw" / "train", tmp_path / "others")
    prepare(prep_config(tmp_path / "others", tmp_path / "out2"))
    shutil.copy(tmp_path / "out2" / "test" / "00000.h5", output / "test" / "00000.h5")
    assert verify(output, processes=1) == {"test/d": "test/00000.h5 does not hold it"}
    config = prep_config(flat, output, allow_removal=True)  # of the others
    assert prepare(config).prepared == {"test/d": REDONE}
    assert_same(output, tmp_path / "reference")
    assert verify(output, flat, processes=1) == {}


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_several_damages_at_once_by_several_processes(mine, prepared):
    source, output = mine
    before = raw_groups(output)
    flip_stored(shard(output), "b/frames", 50)
    (output / "val" / "00000.h5").unlink()
    damaged = verify(output, source, processes=2)
    assert damaged.keys() == {"train/b", "val/d"}
    assert_mended(source, output, prepared, list(damaged), before)


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_any_byte_of_a_shard(mine, prepared):
    """Wherever the damage is, it is reported, or nothing that is read has changed; and prep mends what is marked."""
    source, output = mine
    good, stored, rng = shard(output).read_bytes(), contents(output), np.random.default_rng(0)
    found = 0
    used = np.flatnonzero(np.frombuffer(good, np.uint8))
    for offset in rng.choice(used, 30).tolist():
        shard(output).write_bytes(good)
        flip(shard(output), offset)
        damaged = verify(
            output, sample=0, processes=1
        )  # whose Python may not be open to others: no more to compile
        if damaged:
            found += 1
            assert prepare(prep_config(source, output)).prepared.keys() == damaged.keys()
            assert_sound(output)
        for key, columns in contents(output).items():
            for name, values in columns.items():
                np.testing.assert_array_equal(values, stored[key][name])
    assert found > 10


# -- a source that has changed -----------------------------------------------------------------------------------
def test_a_recording_that_has_changed_since(mine, tmp_path):
    source, output = mine
    before = raw_groups(output)
    path = source / "train" / "b_td.dat"
    about, data = path.stat(), bytearray(path.read_bytes())
    data[-4] ^= 1  # of the same size and time: what prep knows it by
    path.write_bytes(data)
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))
    assert prepare(prep_config(source, output)).prepared == {}
    assert verify(output, processes=1) == {}
    assert verify(output, source, processes=1) == {
        "train/b": f"the recording {path} has changed since"
    }
    assert prepare(prep_config(source, output)).prepared == {"train/b": REDONE}
    assert all(raw_groups(output)[key] == before[key] for key in KEYS if key != "train/b")
    assert verify(output, source, sample=None, processes=1) == {}
    prepare(prep_config(source, tmp_path / "again"))
    assert_same(output, tmp_path / "again")


def test_a_longer_recording_other_boxes_and_one_that_is_gone(mine, capsys):
    source, output = mine
    simulate(source / "train" / "b_td.dat", seconds=0.4, seed=77, config=SCENE)
    boxes = read_boxes(source / "val" / "d_bbox.npy")
    write_boxes(source / "val" / "d_bbox.npy", boxes[:-1])
    (source / "test" / "plain.raw").unlink()
    damaged = verify(output, source, processes=1)
    assert damaged == {
        "train/b": f"the recording {source / 'train' / 'b_td.dat'} has changed since",
        "val/d": f"the box file {source / 'val' / 'd_bbox.npy'} has changed since",
    }
    assert (
        f"test/plain: sound, but not compared with its recording: {source} does not have it"
        in capsys.readouterr().out
    )
    report = prepare(prep_config(source, output, allow_removal=True))
    assert (report.prepared, report.removed) == (
        {"train/b": REDONE, "val/d": REDONE},
        ["test/plain"],
    )
    assert verify(output, source, sample=None, processes=1) == {}


# -- marks -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("step", ["gather", "_write_manifest"])
def test_marks_last_until_prep_has_redone_what_they_name(mine, prepared, monkeypatch, step):
    source, output = mine
    before = raw_groups(output)
    flip_stored(shard(output), "b/frames", 100)
    why = verify(output, processes=1)["train/b"]
    assert json.loads((output / ".damaged").read_text()) == {"train/b": why}
    flip_stored(
        shard(output), "b/frames", 100
    )  # sound again, yet who knows of what kind the disk is
    for _ in range(2):
        assert verify(output, processes=1) == {"train/b": f"marked earlier: {why}"}

    def full(*_):
        raise UserError("no more")

    with monkeypatch.context() as patch:
        patch.setattr(f"evspan.data_prep.prepare.{step}", full)
        with pytest.raises(UserError, match="no more"):
            prepare(prep_config(source, output))
    assert (output / ".damaged").exists()
    assert_mended(source, output, prepared, ["train/b"], before)
    assert not (output / ".damaged").exists()


def test_a_marked_recording_is_prepared_from_its_source_not_its_frames(mine, prepared):
    source, output = mine
    before = raw_groups(output)
    with h5py.File(shard(output), "r+") as file:
        rewrite(file["a"], frame=2)
    assert list(verify(output, source, sample=None, processes=1)) == ["train/a"]
    boxes = read_boxes(source / "train" / "a_bbox.npy")
    write_boxes(source / "train" / "a_bbox.npy", boxes)  # as it was, yet a reason to look
    assert_mended(source, output, prepared, ["train/a"], before)


def test_damaged_marks_are_refused(mine):
    source, output = mine
    (output / ".damaged").write_text("[")
    for call in (lambda: verify(output, processes=1), lambda: prepare(prep_config(source, output))):
        with pytest.raises(
            ShardError, match=r"\.damaged is damaged .* Delete it and run evspan prep verify"
        ):
            call()


def test_prep_and_verify_keep_out_of_each_others_way(mine):
    source, output = mine
    with locked(output), pytest.raises(UserError, match="is being written to by process"):
        verify(output, processes=1)
    holder = r"written to by process \d+ on \S+ \(evspan prep verify\)\."
    with locked(output, "evspan prep verify"), pytest.raises(UserError, match=holder):
        prepare(prep_config(source, output))


def verify_as_nobody(output, send) -> None:
    if os.getuid() == 0:  # whom no permission stops
        os.setuid(65534)
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(out):
        damaged = verify(
            output, sample=0, processes=1
        )  # whose Python may not be open to others: no more to compile
    send.send((list(damaged), out.getvalue()))


def verified_by_nobody(output: Path) -> tuple[list[str], str]:
    """The damaged recordings and the output of `verify` in a process of another user."""
    receive, send = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("spawn").Process(
        target=verify_as_nobody, args=(output, send)
    )
    child.start()
    assert receive.poll(40)
    damaged, out = receive.recv()
    child.join(120)
    return damaged, out


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_folder_that_may_only_be_read_is_verified_without_marks(prepared):
    with tempfile.TemporaryDirectory() as folder:  # pytest's own folders are closed to other users
        Path(folder).chmod(0o755)
        output = copied(prepared, Path(folder) / "out")
        flip_stored(shard(output), "b/frames", 100)
        output.chmod(0o555)
        damaged, out = verified_by_nobody(output)
        assert damaged == ["train/b"]
        assert "1 damaged, and not marked, since you may not write to it" in out
        assert not (output / ".damaged").exists()


def lock_of_another_user(output: Path) -> None:
    output.chmod(0o777)
    (output / ".lock").touch()
    (output / ".lock").chmod(0o644)


def unreadable_lock(output: Path) -> None:
    output.chmod(0o777)
    (output / ".lock").touch()
    (output / ".lock").chmod(0o600)


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.skipif(os.getuid() != 0, reason="needs files of another user")
@pytest.mark.parametrize("shared", [lock_of_another_user, unreadable_lock])
def test_a_folder_that_several_users_write_to_is_verified_by_each(prepared, shared):
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        output = copied(prepared, Path(folder) / "out")
        flip_stored(shard(output), "b/frames", 100)
        shared(output)
        damaged, out = verified_by_nobody(output)
        assert damaged == ["train/b"]
        if shared is lock_of_another_user:
            assert "1 damaged, and marked" in out
            assert (output / ".damaged").exists()
        else:
            assert ".lock cannot be opened (Permission denied). Ask its owner to run chmod" in out
            assert "1 damaged, and not marked" in out
            assert not (output / ".damaged").exists()


# -- the command -------------------------------------------------------------------------------------------------
def typed(*arguments):
    """The exit code of evspan prep, in this process."""
    try:
        main([str(a) for a in arguments])
    except SystemExit as exit_:
        return exit_.code
    return 0


def test_exit_codes_and_what_is_said(mine, capsys):
    source, output = mine
    assert (
        typed("verify", output, "--source", source, "--processes", 1, "--seed", 3, "--sample", 1)
        == 0
    )
    capsys.readouterr()
    flip_stored(shard(output), "b/frames", 100)
    assert typed("verify", output, "--source", source, "--processes", 1) == 1
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert err == ""
    assert [line.split(": ")[1] for line in lines if "train/b: " in line] == ["damaged"]
    assert (
        lines[-1]
        == f"{output}: 1 damaged, and marked: run the same evspan prep again, which prepares only them"
    )
    assert typed("verify", source) == 2
    assert "holds no manifest.json, so it is no prepared dataset" in capsys.readouterr().err
    assert typed("verify", output, "--source", output / "gone") == 2
    assert "is not there" in capsys.readouterr().err
    assert (
        typed("verify", output, "--source", source / "train") == 2
    )  # a flat folder: test/a and so on
    assert "has none of the recordings of" in capsys.readouterr().err
    assert typed("verify", output, "--sample", "-1") == 2
    assert capsys.readouterr().err.startswith(
        "error: argument --sample: -1 is negative; evspan prep verify --help"
    )
