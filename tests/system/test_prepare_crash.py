"""Preparation that is killed, runs twice at once, or fills the disk: nothing is damaged, and the next run completes it."""

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
from evspan.conf.errors import UserError
from evspan.data_prep.prepare import prepare
from evspan.data_prep.recordings.open import open_writer
from evspan.data_prep.shards.atomic import NoSpaceError, locked
from evspan.data_prep.simulator import simulate
from support.prepared import (
    SCENE,
    assert_same,
    assert_sound,
    copied,
    frames_in,
    prep_config,
)
from support.slow_frames import random_events

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
KEYS = ["dataset=simulated", "dataset.labels.label_every_ms=100", "frames.bins=3", "processes=2"]


@pytest.fixture(scope="module")
def processes():
    """Processes that begin within milliseconds, with everything imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["evspan.data_prep.prepare"])
    return context


def command(source, output, *more: str, **options) -> subprocess.Popen:
    arguments = [f"source={source}", f"output={output}", *KEYS, *more]
    return subprocess.Popen(
        [sys.executable, "-m", "evspan.launch", "prep", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        **options,
    )


def finished(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def wait_until(condition, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "this took too long"
        time.sleep(0.005)


def killed_after(processes, delay: float, config) -> bool:
    """Whether a preparation was still running when it was killed."""
    child = processes.Process(target=prepare, args=(config,))
    child.start()
    child.join(delay)
    child.kill()
    child.join(120)
    return child.exitcode == -signal.SIGKILL


def assert_whole(output: Path) -> None:
    """Every shard that exists is complete."""
    for path in output.glob("*/[0-9]*.h5"):
        with h5py.File(path) as file:
            for group in file.values():
                assert len(frames_in(group)) == len(group["end_us"]) == len(group["labelled"])
    assert_sound(output)


def campaign(
    processes, kills: int, seed: int, output: Path, reference: Path, config, start
) -> None:
    """Kill `kills` preparations at random moments, each continuing from the one before, then let one finish."""
    rng = random.Random(seed)
    start()
    began = time.monotonic()
    child = processes.Process(target=prepare, args=(config,))
    child.start()
    child.join(120)
    whole = time.monotonic() - began
    assert child.exitcode == 0
    assert_same(output, reference)
    start()
    done = 0
    while done < kills:
        if killed_after(processes, rng.uniform(0, whole), config):
            done += 1
        else:
            start()
        assert_whole(output)
    prepare(config)
    assert_same(output, reference)


def remove(output: Path) -> None:
    subprocess.run(["rm", "-rf", str(output)], check=True)


@pytest.mark.timeout(240)
def test_killed_at_random_moments_and_completed_it_gives_the_same_shards(
    source, prepared, processes, tmp_path
):
    output = tmp_path / "out"
    campaign(processes, 6, 0, output, prepared, prep_config(source, output), lambda: remove(output))


def changed_source(source: Path, folder: Path) -> Path:
    """One recording changed, one removed, one new."""
    changed = copied(source, folder)
    simulate(changed / "train" / "b_td.dat", seconds=0.4, seed=9, config=SCENE)
    simulate(changed / "val" / "new_td.raw", seconds=0.3, seed=10, config=SCENE)
    (changed / "train" / "c_td.h5").unlink()
    return changed


@pytest.mark.timeout(240)
@pytest.mark.parametrize("what", ["source", "config"])
def test_killed_while_it_updates(source, prepared, processes, tmp_path, what):
    changed = changed_source(source, tmp_path / "source") if what == "source" else source
    values = {} if what == "source" else {"frames": {"bins": 2, "downsample": 1}}
    output, reference = tmp_path / "out", tmp_path / "reference"
    config = prep_config(changed, output, **values)

    def start(to: Path = output) -> None:
        remove(to)
        copied(prepared, to)

    start(reference)
    prepare(prep_config(changed, reference, **values))
    campaign(processes, 3, 1, output, reference, config, start)


@pytest.mark.soak
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", range(4))
def test_killed_at_many_random_moments(source, prepared, processes, tmp_path, seed):
    output = tmp_path / "out"
    campaign(
        processes, 40, seed, output, prepared, prep_config(source, output), lambda: remove(output)
    )
    changed = changed_source(source, tmp_path / "source")

    def start(to: Path = output) -> None:
        remove(to)
        copied(prepared, to)

    for i, values in enumerate(
        ({}, {"labels": {"min_side": 20.0}}, {"frames": {"bins": 2}, "shard_mib": 1})
    ):
        reference = tmp_path / f"reference{i}"
        start(reference)
        prepare(prep_config(changed, reference, **values))
        campaign(
            processes, 20, seed, output, reference, prep_config(changed, output, **values), start
        )


def children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def workers(pid: int) -> list[int]:
    return [p for p in children(pid) if b"spawn_main" in Path(f"/proc/{p}/cmdline").read_bytes()]


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def at_work(source: Path, output: Path, **options) -> tuple[subprocess.Popen, list[int]]:
    """The command and its worker processes, caught while they write."""
    while True:  # a busy machine may look too late
        process = command(source, output, **options)
        while process.poll() is None and not list(output.glob(".parts/*/.*.writing*")):
            time.sleep(0.002)
        if process.poll() is None:
            return process, workers(process.pid)
        finished(process)
        remove(output)


@pytest.mark.timeout(240)
def test_processes_end_with_the_killed_command_and_the_next_one_completes(
    source, prepared, tmp_path
):
    output = tmp_path / "out"
    process, helpers = at_work(source, output)
    assert helpers
    process.kill()
    finished(process)
    wait_until(lambda: not any(map(running, helpers)), 120)
    code, out, err = finished(command(source, output))
    assert (code, err) == (0, "")
    assert "5 of 5 recordings" in out
    assert_same(output, prepared)


@pytest.mark.timeout(240)
def test_a_killed_worker_ends_in_one_line_with_the_remedy(source, prepared, tmp_path):
    output = tmp_path / "out"
    process, helpers = at_work(source, output)
    os.kill(helpers[0], signal.SIGKILL)
    code, _out, err = finished(process)
    assert code == 2
    assert len(err.splitlines()) == 1
    assert err.startswith("error: one of 2 processes was killed, perhaps because memory ran out")
    assert "processes=1" in err
    prepare(prep_config(source, output))
    assert_same(output, prepared)


@pytest.mark.timeout(240)
def test_interrupted_from_the_keyboard_it_ends_at_once_without_a_traceback(source, tmp_path):
    output = tmp_path / "out"
    process, helpers = at_work(source, output, start_new_session=True)
    os.killpg(process.pid, signal.SIGINT)
    code, _, err = finished(process)
    assert (code, err) == (130, "")
    assert helpers
    assert not any(map(running, helpers))


# -- two at once -------------------------------------------------------------------------------------------------
@pytest.mark.timeout(240)
def test_two_at_once_do_no_damage(source, prepared, tmp_path):
    output = tmp_path / "out"
    both = [command(source, output, "processes=1") for _ in range(2)]
    results = [finished(process) for process in both]
    assert 0 in [code for code, _, _ in results]
    for code, _, err in results:
        assert code == 0 or (
            code == 2 and "is being written to by " in err and len(err.splitlines()) == 1
        )
    assert_same(output, prepared)


def hold(folder: Path) -> None:
    with locked(folder):
        (folder / "held").touch()
        time.sleep(60)


def test_the_second_names_the_first_and_a_lock_ends_with_its_process(processes, tmp_path):
    holder = processes.Process(target=hold, args=(tmp_path,))
    holder.start()
    try:
        wait_until(lambda: (tmp_path / "held").exists())
        with (
            pytest.raises(
                UserError,
                match=rf"is being written to by process {holder.pid} on .*\. Wait until it is done",
            ),
            locked(tmp_path),
        ):
            pass
    finally:
        holder.kill()
        holder.join(120)
    with locked(tmp_path):
        pass


# -- full disk, no permission ------------------------------------------------------------------------------------
@pytest.fixture
def small_disk(tmp_path):
    """A file system of 120 KiB; skips where none can be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=120k", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
    )
    if mounted.returncode:
        pytest.skip(f"mounting a small tmpfs is not permitted here ({mounted.stderr.strip()})")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.timeout(240)
def test_a_full_disk_ends_in_one_line_and_more_space_is_enough_to_continue(
    source, prepared, small_disk
):
    output = small_disk / "out"
    code, _out, err = finished(command(source, output))
    assert code == 2
    assert len(err.splitlines()) == 1
    assert err.startswith("error: ")
    assert "no space left, or the quota is used up. Free some" in err
    assert not (output / "manifest.json").exists()
    assert not list(output.rglob(".*.writing*"))
    with pytest.raises(NoSpaceError, match="no space left"):
        prepare(prep_config(source, output))
    assert_whole(output)
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    prepare(prep_config(source, output))
    assert_same(output, prepared)


def prepare_as_nobody(config, send_pipe) -> None:
    if os.geteuid() == 0:  # root ignores permissions
        os.seteuid(65534)
    try:
        prepare(config)
    except Exception as error:
        send_pipe.send((type(error), str(error)))


@pytest.mark.timeout(240)
def test_decoding_onto_a_full_disk_leaves_nothing(small_disk, tmp_path):
    events = random_events(
        np.random.default_rng(0), 100_000, first=0, last=1_000_000, height=480, width=640
    )
    with open_writer(tmp_path / "a.dat", 480, 640) as writer:
        writer.write(events)
    arguments = ["decode", str(tmp_path / "a.dat"), str(small_disk / "a.h5")]
    done = subprocess.run(
        [sys.executable, "-m", "evspan.launch", "prep", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert not list(small_disk.iterdir())
    assert done.stderr.startswith(f"error: {small_disk / 'a.h5'}: no space left")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.timeout(240)
def test_a_folder_that_may_not_be_written_to(source, processes):
    with tempfile.TemporaryDirectory() as folder:  # pytest's own folders are closed to other users
        open_source, output = copied(source, Path(folder) / "source"), Path(folder) / "out"
        output.mkdir()
        output.chmod(0o555)
        for path in (Path(folder), open_source):
            path.chmod(0o755)
        for target, name in ((output, output), (output / "below", f"output {output / 'below'}")):
            receive, send = multiprocessing.Pipe(duplex=False)
            child = processes.Process(
                target=prepare_as_nobody, args=(prep_config(open_source, target), send)
            )
            child.start()
            assert receive.poll(30)
            kind, message = receive.recv()
            child.join(120)
            assert issubclass(kind, UserError)
            assert message.startswith(f"{name} cannot be ")
            assert message.endswith("(Permission denied). Choose a folder that you may write to")
