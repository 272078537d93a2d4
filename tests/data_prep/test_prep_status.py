"""The output of `evspan prep status` for a prepared folder, at rest, at work, interrupted and damaged."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from evspan.conf.errors import RecordingError
from evspan.conf.lock_holder import Holder
from evspan.data_prep.labels.box_files import read_boxes, write_boxes
from evspan.data_prep.prepare import prepare
from evspan.data_prep.shards.atomic import locked
from evspan.data_prep.shards.status import status
from evspan.data_prep.simulator import simulate
from evspan.launch.cli.prep import main
from support.prepared import KEYS, SCENE, copied, entries, make_source, prep_config

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_source(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def prepared(source, tmp_path_factory):
    output = tmp_path_factory.mktemp("prepared")
    prepare(prep_config(source, output))
    return output


@pytest.fixture
def mine(source, prepared, tmp_path):
    return copied(source, tmp_path / "source"), copied(prepared, tmp_path / "out")


@pytest.fixture
def status_command(capsys):
    """(exit code, lines) of the command."""

    def call(*arguments):
        capsys.readouterr()
        code = 0
        try:
            main(["status", *map(str, arguments)])
        except SystemExit as exit_:
            code = exit_.code
        out, err = capsys.readouterr()
        return code, (out + err).splitlines()

    return call


def row(lines: list[str], name: str) -> dict[str, str]:
    heading = re.split(r"  +", lines[1].strip())
    cells = next(re.split(r"  +", line.strip()) for line in lines if re.match(rf"{name}\b", line))
    return dict(zip(heading, cells[1:], strict=True))


def times_of(folder: Path) -> dict[Path, int]:
    return {p: p.stat().st_mtime_ns for p in (folder, *folder.rglob("*"))}


# -- at rest -----------------------------------------------------------------------------------------------------
def test_a_complete_dataset(source, prepared, status_command):
    before, all_entries = times_of(prepared), entries(prepared).values()
    code, lines = status_command(prepared, "--source", source)
    assert code == 0
    assert lines[0] == str(prepared)
    assert lines[-1] == "complete"
    for name in ("train", "val", "test", "all"):
        own = [e for e in all_entries if name in (e["split"], "all")]
        found, count = row(lines, name), str(len(own))
        assert (found["recordings"], found["done"], found["in parts"], found["missing"]) == (
            count,
            count,
            "0",
            "0",
        )
        assert (found["frames"], found["boxes"]) == (
            str(sum(e["frames"] for e in own)),
            str(sum(e["boxes"] for e in own)),
        )
        size = sum(
            p.stat().st_size for p in prepared.glob("*/*.h5") if name in (p.parent.name, "all")
        )
        assert found["size"] == f"{size / 1000:.1f} kB"
    assert re.fullmatch(r"last written: (train|val|test)/00000.h5, \d+ \S+ ago", lines[-2])
    assert times_of(prepared) == before
    code, lines = status_command(prepared)
    assert code == 0
    assert lines[-1] == "complete; --source RAW also shows whether the source has more recordings"


def test_recordings_that_are_new_changed_or_gone(mine, status_command):
    source, output = mine
    simulate(source / "val" / "new_td.raw", seconds=0.2, seed=9, config=SCENE)
    os.utime(source / "train" / "a_td.raw", ns=(1, 2_000_000_000))
    (source / "train" / "c_td.h5").unlink()
    code, lines = status_command(output, "--source", source)
    assert code == 3
    assert lines[-1] == "not complete: run the same evspan prep again"
    assert [line for line in lines if re.match("missing|changed|not in", line)] == [
        "missing: val/new",
        "changed: train/a",
        "not in source: train/c",
    ]
    assert row(lines, "train")["done"] == "1"
    assert row(lines, "val")["missing"] == "1"
    assert row(lines, "all")["recordings"] == "6"
    assert status_command(output)[0] == 0  # it does not know
    prepare(prep_config(source, output))
    assert status_command(output, "--source", source)[0] == 0


def test_box_files_that_are_new_changed_or_gone(mine, status_command):
    source, output = mine
    boxes = read_boxes(source / "val" / "d_bbox.npy")
    write_boxes(source / "test" / "plain_bbox.npy", boxes)
    (source / "train" / "b_bbox.npy").unlink()
    boxes["track_id"] += 1
    write_boxes(source / "val" / "d_bbox.npy", boxes)
    code, lines = status_command(output, "--source", source)
    assert code == 3
    assert "changed: train/b, val/d, test/plain" in lines
    assert row(lines, "all")["changed"] == "3"
    prepare(prep_config(source, output))
    assert status_command(output, "--source", source)[0] == 0


def test_of_many_missing_recordings_the_first_are_named(source, tmp_path, status_command):
    raw, output = copied(source, tmp_path / "raw"), tmp_path / "out"
    prepare(prep_config(raw, output))
    for i in range(12):
        os.link(raw / "test" / "plain.raw", raw / "test" / f"r{i:02d}.raw")
    lines = status_command(output, "--source", raw)[1]
    assert "missing: test/r00, test/r01, test/r02, test/r03, test/r04 and 7 more" in lines
    assert row(lines, "test")["missing"] == row(lines, "all")["missing"] == "12"


def test_lost_shards_marks_and_a_lost_manifest(mine, status_command):
    source, output = mine
    (output / "val" / "00000.h5").unlink()
    (output / ".damaged").write_text('{"train/b": "the frames have another checksum"}')
    code, lines = status_command(output)
    assert code == 3
    assert "missing: val/d" in lines
    assert "damaged: train/b (the frames have another checksum)" in lines
    assert row(lines, "train")["damaged"] == row(lines, "all")["damaged"] == "1"
    assert row(lines, "all")["done"] == "3"
    prepare(prep_config(source, output))
    (output / "manifest.json").unlink()
    code, lines = status_command(output)
    assert code == 3
    assert "there is no manifest.json: it is written last" in lines
    assert row(lines, "all")["done"] == "5"


def test_parts_that_wait_for_a_bad_recording(source, tmp_path, status_command):
    raw, output = copied(source, tmp_path / "raw"), tmp_path / "out"
    good = (raw / "train" / "b_td.dat").read_bytes()
    (raw / "train" / "b_td.dat").write_bytes(good[:-3])
    with pytest.raises(RecordingError):
        prepare(prep_config(raw, output))
    code, lines = status_command(output, "--source", raw)
    assert code == 3
    assert "missing: train/b" in lines
    assert "in parts: train/a, train/c, val/d, test/plain" in lines
    assert (row(lines, "train")["in parts"], row(lines, "all")["done"]) == ("2", "0")
    assert not [line for line in lines if line.startswith(("at work", "was killed"))]
    code, lines = status_command(output)
    assert code == 3
    assert row(lines, "all")["recordings"] == "4"


@pytest.mark.parametrize("name", ["gone", "source"])
def test_a_folder_of_something_else(source, tmp_path, status_command, name):
    folder = {"gone": tmp_path / "gone", "source": source}[name]
    code, (line,) = status_command(folder)
    assert code == 2
    assert line.startswith(
        f"error: {folder} holds nothing of evspan prep. Name the folder that was its output"
    )
    assert not (tmp_path / "gone").exists()


# -- at work -----------------------------------------------------------------------------------------------------
SLOW = """
import sys, time
sys.path.insert(0, "tests")
from pathlib import Path
from support.prepared import prep_config
from evspan.data_prep import workers
from evspan.data_prep.shards import write as store
from evspan.data_prep.prepare import prepare

def slow(source, part, *more):
    if source.name == "b":
        with store.atomic_hdf5(part):
            time.sleep(60)
    return store.prepare_recording(source, part, *more)

workers.prepare_recording = slow
prepare(prep_config(Path(sys.argv[1]), Path(sys.argv[2])))
"""


def wait_until(condition, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "this took too long"
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_preparation_at_work_and_after_it_was_killed(source, tmp_path, status_command):
    raw, output = copied(source, tmp_path / "raw"), tmp_path / "out"
    (raw / "val" / "d_td.raw").unlink()
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, str(raw), str(output)], cwd=ROOT, stdout=subprocess.DEVNULL
    )
    try:
        wait_until(lambda: list((output / ".parts" / "train").glob(".b.*.writing.h5")))
        code, lines = status_command(output, "--source", raw)
        assert code == 3
        assert lines[-1] == "not complete: wait"
        (line,) = [line for line in lines if line.startswith("at work")]
        assert re.fullmatch(
            rf"at work: process {process.pid} on {socket.gethostname()}, since \d+ s; writing train/b",
            line,
        )
        assert "in parts: train/c" in lines
        assert "missing: train/a, train/b, test/plain" in lines
        assert [line for line in lines if line.startswith("last written: .parts/train/c.h5, ")]
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(120)
    code, lines = status_command(output, "--source", raw)
    assert code == 3
    assert f"was killed: process {process.pid} on {socket.gethostname()}" in lines
    assert lines[-1] == "not complete: run the same evspan prep again"
    prepare(prep_config(raw, output))
    code, lines = status_command(output, "--source", raw)
    assert code == 0
    assert "was killed" not in " ".join(lines)


def test_status_keeps_nobody_from_the_lock_and_nobody_keeps_status_from_its_work(mine):
    source, output = mine
    with locked(output, "evspan prep verify"):
        result = status(output, source)
        assert result.lock.at_work.startswith(
            f"process {os.getpid()} on {socket.gethostname()} (evspan prep verify), since "
        )
        assert not result.complete
        assert set(result.state.values()) == {"done"}
    assert status(output, source).complete
    assert prepare(prep_config(source, output)).prepared == {}


def test_a_process_on_another_machine_cannot_be_asked(mine, status_command):
    source, output = mine
    (output / ".lock").write_text("process 4242 on node7\n")
    code, lines = status_command(output)
    assert code == 3
    assert "at work, or killed there: process 4242 on node7" in lines
    prepare(prep_config(source, output))
    assert status_command(output)[0] == 0


def test_a_verification_that_was_killed_leaves_a_complete_dataset(mine, status_command):
    source, output = mine
    killed = f"process 4242424 on {socket.gethostname()} (evspan prep verify)"
    (output / ".lock").write_text(f"{killed}\n")
    code, lines = status_command(output, "--source", source)
    assert (code, lines[-1]) == (0, "complete")
    assert f"was killed: {killed}" in lines
    (source / "train" / "c_td.h5").unlink()
    assert status_command(output, "--source", source)[0] == 3


def hold(folder: Path, **changes) -> Path:
    """Writes the lock file of a process, as on a file system without flock."""
    holder = replace(Holder.current("evspan prep"), **changes)
    path = folder / ".locks" / "000001"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(holder.to_json()))
    return path


def test_the_holder_of_the_shared_lock_is_asked(mine, status_command):
    """Where flock is missing or local to a node, .lock alone does not show who is at work."""
    _source, output = mine
    (output / ".lock").write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
    hold(output)
    code, lines = status_command(output)
    assert (code, lines[-1]) == (3, "not complete: wait")
    (line,) = [line for line in lines if line.startswith("at work: ")]
    assert f"(process {os.getpid()} on {socket.gethostname()}" in line
    (output / ".lock").write_text("")
    elsewhere = {"host": "node7", "boot": "another", "pid": 4242, "started": 1, "job": ""}
    path = hold(output, **elsewhere)
    code, lines = status_command(output)
    assert code == 3
    assert [line for line in lines if line.startswith("at work, or killed there: evspan prep by")]
    (output / ".lock").write_text("process 4242 on node7\n")
    an_hour_ago = time.time() - 3600
    os.utime(path, (an_hour_ago, an_hour_ago))  # a process at work renews it every 15 s
    code, lines = status_command(output)
    assert code == 0
    assert [line for line in lines if re.match(r"was killed: .*\(process 4242 on node7", line)]
    (output / ".lock").write_text("process 77 on node9\n")  # where flock is enough
    code, lines = status_command(output)
    assert code == 3
    assert "at work, or killed there: process 77 on node9" in lines
    path.write_text('{"released": 1}')
    (output / ".lock").write_text("")
    assert status_command(output)[0] == 0


def test_state_is_in_the_order_of_splits(source, prepared):
    assert list(status(prepared, source).state) == KEYS
