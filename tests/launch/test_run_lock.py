"""One writer per folder: who gets the lock, when it is taken over, and what a loser is told."""

import errno
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from evspan.conf import folder_lock, lock_holder
from evspan.conf.folder_lock import LOCKS, FolderInUseError, FolderLock, holder_of
from evspan.conf.lock_holder import Holder, Liveness
from evspan.pipeline import run_lock
from evspan.pipeline.history import append
from evspan.pipeline.run_lock import (
    HELD_LOCK,
    RunLock,
    attempt_lock,
    end_if_taken_over,
    results_lock,
    training_lock,
)
from support.lock_race import Contenders, assert_one_winner

DEAD_PID = 2**22 + 1  # above the kernel's largest process id
SLURM_JOB = {"SLURM_JOB_ID": "7", "SLURM_CLUSTER_NAME": "c1"}


@pytest.fixture(autouse=True)
def _no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*os.environ]:
        if name.startswith("SLURM_") or name == HELD_LOCK:
            monkeypatch.delenv(name)


def leave_lock(folder: Path, age_s: float = 0.0, **values: object) -> Holder:
    """Writes the lock of a process that does not release it. Returns the process."""
    holder = replace(Holder.current("evspan train"), **values)
    (folder / LOCKS).mkdir(parents=True, exist_ok=True)
    path = folder / LOCKS / "000005"
    path.write_text(json.dumps(holder.to_json()))
    os.utime(path, (time.time() - age_s,) * 2)
    return holder


def elsewhere(**values: object) -> dict[str, object]:
    """Values of a holder on another machine."""
    return {"host": "n9", "boot": "other", **values}


def dead_here() -> dict[str, object]:
    """Values of a process of this machine that was killed."""
    return {"pid": DEAD_PID, "started": 4711}


def quick(monkeypatch: pytest.MonkeyPatch, **seconds: float) -> None:
    """Shortens the times of the lock."""
    for name, value in seconds.items():
        monkeypatch.setattr(folder_lock, name, value)


# -- one winner ----------------------------------------------------------------------------------
def race(folder: Path, races: int, contenders: int) -> None:
    with Contenders(contenders) as processes:
        for number in range(races):
            contested = folder / str(number)
            if number % 2:
                leave_lock(contested, **dead_here())
            assert_one_winner(processes.race(contested))
            # The next holder comes after a release by the winner.
            assert_one_winner(processes.race(contested))


def test_one_of_several_processes_gets_the_lock(tmp_path):
    """Also where the last holder was killed, or has released it."""
    race(tmp_path, races=10, contenders=4)


@pytest.mark.soak
@pytest.mark.timeout(240)
def test_a_thousand_races(tmp_path):
    race(tmp_path, races=500, contenders=6)


def test_the_refusal_names_the_holder_and_the_remedy(tmp_path):
    with FolderLock(tmp_path, "evspan train"), pytest.raises(FolderInUseError) as refused:
        FolderLock(tmp_path, "evspan submit").__enter__()
    message = str(refused.value)
    assert str(tmp_path) in message
    assert f"evspan train by {Holder.current('').user}" in message
    assert f"process {os.getpid()} on " in message
    assert re.search(r"since 20\d\d-\d\d-\d\d \d\d:\d\d:\d\d\. Wait until it has ended", message)
    assert f"kill -TERM {os.getpid()}" in message
    assert "\n" not in message
    with FolderLock(tmp_path, "evspan train"):  # it was released
        pass


def test_a_hostile_lock_file_reaches_no_terminal(tmp_path):
    leave_lock(tmp_path, purpose="\x1b]0;x\x07\n", user="\u202e", **elsewhere())
    with pytest.raises(FolderInUseError) as refused:
        FolderLock(tmp_path, "evspan train").__enter__()
    assert str(refused.value).isprintable()


# -- take-over -----------------------------------------------------------------------------------
def test_a_killed_holder_of_this_machine_is_replaced_at_once(tmp_path):
    code = (
        "import sys, time; from evspan.conf.folder_lock import FolderLock\n"
        "FolderLock(sys.argv[1], 'evspan train').__enter__(); print('held', flush=True)\n"
        "time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "held\n"
        with pytest.raises(FolderInUseError, match=f"process {process.pid} on"):
            FolderLock(tmp_path, "evspan train").__enter__()
        process.kill()
        process.wait()
    started = time.monotonic()
    with FolderLock(tmp_path, "evspan train"):
        assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    ("values", "liveness"),
    [
        ({}, Liveness.running),
        ({"started": 1}, Liveness.ended),  # the process id was given to another process
        (dead_here(), Liveness.ended),
        ({"namespace": "pid:[1]", **dead_here()}, Liveness.unknown),  # of a container
        ({"boot": "", **dead_here()}, Liveness.unknown),
        (elsewhere(), Liveness.unknown),  # a host of the same name is not the same machine
        ({"boot": "other"}, Liveness.unknown),
    ],
)
def test_who_is_alive(values, liveness):
    here = Holder.current("evspan train")
    assert replace(here, **values).liveness(here) is liveness


@pytest.mark.parametrize(
    ("answer", "liveness"),
    [
        ("JobId=7 JobState=RUNNING Restarts=0", Liveness.unknown),
        ("JobId=7 JobState=COMPLETING Restarts=0", Liveness.unknown),
        ("JobId=7 JobState=RUNNING Restarts=1", Liveness.ended),
        ("JobId=7 JobState=PENDING Restarts=1", Liveness.ended),
        ("JobId=7 JobState=NODE_FAIL Restarts=0", Liveness.ended),
        ("slurm_load_jobs error: Invalid job id specified", Liveness.ended),
        ("slurm_load_jobs error: Unable to contact slurm controller", Liveness.unknown),
        (None, Liveness.unknown),
    ],
)
@pytest.mark.parametrize("cluster", ["c1", "c2"])
def test_slurm_is_asked_about_jobs_of_its_cluster(monkeypatch, answer, liveness, cluster):
    def run(*command: str) -> str | None:
        return "ClusterName             = c1\n" if command[-1] == "config" else answer

    monkeypatch.setattr(lock_holder, "_run", run)
    holder = replace(Holder.current(""), **elsewhere(job="7", cluster=cluster))
    expected = liveness if cluster == "c1" else Liveness.unknown
    assert holder.liveness(Holder.current("")) is expected


def test_a_requeued_job_replaces_its_own_earlier_attempt_only(tmp_path, monkeypatch):
    for name, value in SLURM_JOB.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    monkeypatch.setattr(lock_holder, "_run", lambda *_: None)
    for name, values in {
        "same": {"job": "7", "restart": 2},
        "later": {"job": "7", "restart": 3},
        "other": {"job": "8", "restart": 1},
        "cluster": {"job": "7", "restart": 1, "cluster": "c2"},
    }.items():
        leave_lock(tmp_path / name, **{"cluster": "c1", **elsewhere(**values)})
        with pytest.raises(FolderInUseError):
            FolderLock(tmp_path / name, "evspan train").__enter__()
    leave_lock(tmp_path, **elsewhere(job="7", restart=1, cluster="c1"))
    started = time.monotonic()
    with FolderLock(tmp_path, "evspan train"):
        assert time.monotonic() - started < 10


def test_an_attempt_that_is_still_ending_gets_time(tmp_path, monkeypatch):
    quick(monkeypatch, DYING_S=30.0, POLL_S=0.05)
    code = "import sys, time; print('up', flush=True); time.sleep(60)"
    for name, value in {**SLURM_JOB, "SLURM_RESTART_COUNT": "1"}.items():
        monkeypatch.setenv(name, value)
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        started = lock_holder.start_ticks(process.pid)
        leave_lock(tmp_path, pid=process.pid, started=started, restart=0)
        killer = subprocess.Popen(["sh", "-c", f"sleep 0.5; kill -9 {process.pid}"])
        with FolderLock(tmp_path, "evspan train"):
            assert process.wait(120) == -9
        killer.wait()
        # One that cannot be killed does not stop the job for ever.
        quick(monkeypatch, DYING_S=0.1)
        leave_lock(tmp_path / "stuck", restart=0)
        with FolderLock(tmp_path / "stuck", "evspan train"):
            pass


def test_a_lock_that_is_not_renewed_is_watched_and_taken_over(tmp_path, monkeypatch):
    quick(monkeypatch, WATCH_S=0.3, POLL_S=0.05)
    leave_lock(tmp_path, age_s=folder_lock.STALE_S - 20, **elsewhere())
    with pytest.raises(FolderInUseError, match="on n9"):
        FolderLock(tmp_path, "evspan train").__enter__()
    leave_lock(tmp_path, age_s=folder_lock.STALE_S + 1, **elsewhere())
    with FolderLock(tmp_path, "evspan train") as lock:
        assert lock.number == 6
        assert os.listdir(tmp_path / LOCKS) == ["000006"]


def test_a_holder_that_renews_its_lock_while_it_is_watched_keeps_it(tmp_path, monkeypatch):
    quick(monkeypatch, WATCH_S=5.0, POLL_S=0.05)
    leave_lock(tmp_path, age_s=9999, **elsewhere())
    path = tmp_path / LOCKS / "000005"
    toucher = subprocess.Popen(["sh", "-c", f"sleep 0.3; touch {path}"])
    with pytest.raises(FolderInUseError, match="on n9"):
        FolderLock(tmp_path, "evspan train").__enter__()
    toucher.wait()


def test_a_clock_that_differs_from_the_file_systems_does_not_age_a_lock(tmp_path, monkeypatch):
    leave_lock(tmp_path, **elsewhere(time=time.time() - 1e6))
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 1e6)
    with pytest.raises(FolderInUseError):
        FolderLock(tmp_path, "evspan train").__enter__()


def test_whoever_was_paused_while_it_decided_does_no_harm(tmp_path):
    """Its number was used, released and removed meanwhile."""
    leave_lock(tmp_path, **dead_here())
    late = FolderLock(tmp_path, "evspan train")
    with FolderLock(tmp_path, "evspan train"):
        pass
    with FolderLock(tmp_path, "evspan train") as held:
        assert os.listdir(tmp_path / LOCKS) == ["000007"]
        assert not late._create(6)
        assert held.is_held()
        assert os.listdir(tmp_path / LOCKS) == ["000007"]


# -- damage and faults ---------------------------------------------------------------------------
@pytest.mark.parametrize("text", ["{", "[1]", '{"pid": "x"}', "\0" * 400, "[" * 9000])
def test_a_damaged_lock_file_refuses_until_it_is_old(tmp_path, monkeypatch, text):
    quick(monkeypatch, PARTIAL_S=0.05, WATCH_S=0.1, POLL_S=0.05)
    leave_lock(tmp_path)
    path = tmp_path / LOCKS / "000005"
    path.write_text(text)
    with pytest.raises(FolderInUseError, match="remove that file if no such process runs"):
        FolderLock(tmp_path, "evspan train").__enter__()
    os.utime(path, (0, 0))
    with FolderLock(tmp_path, "evspan train"):
        pass


def test_without_hard_links_one_process_gets_the_lock(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with FolderLock(tmp_path, "evspan train"), pytest.raises(FolderInUseError):
        FolderLock(tmp_path, "evspan train").__enter__()
    with FolderLock(tmp_path, "evspan train") as lock:
        assert lock.number == 2


def test_a_link_whose_answer_was_lost_counts(tmp_path, monkeypatch):
    """An NFS client repeats a request that the server has carried out."""
    link = os.link

    def lost(source: Path, target: Path) -> None:
        link(source, target)
        raise FileExistsError(errno.EEXIST, "File exists")

    monkeypatch.setattr(os, "link", lost)
    with FolderLock(tmp_path, "evspan train") as lock:
        assert lock.is_held()


def test_a_full_disk_ends_no_run_and_keeps_no_lock(tmp_path, monkeypatch):
    ended: list[int] = []
    quick(monkeypatch, BEAT_S=0.02)
    with FolderLock(tmp_path, "evspan train", end=ended.append):

        def full(*_: object, **__: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "utime", full)
            time.sleep(0.1)
        monkeypatch.setattr(Path, "write_text", full)
    monkeypatch.undo()
    assert not ended
    assert os.stat(tmp_path / LOCKS / "000001").st_size == 0
    quick(monkeypatch, PARTIAL_S=0.05)
    with FolderLock(tmp_path, "evspan train"):
        pass


def test_the_lock_is_renewed(tmp_path, monkeypatch):
    quick(monkeypatch, BEAT_S=0.02)
    with FolderLock(tmp_path, "evspan train"):
        path = tmp_path / LOCKS / "000001"
        os.utime(path, (0, 0))
        end = time.monotonic() + 120
        while path.stat().st_mtime == 0:
            assert time.monotonic() < end
            time.sleep(0.01)


def test_a_process_whose_lock_was_taken_over_ends(tmp_path, monkeypatch, capsys):
    ended: list[int] = []
    quick(monkeypatch, BEAT_S=0.02)
    with FolderLock(tmp_path, "evspan train", end=ended.append) as lock:
        assert lock.is_held()
        (tmp_path / LOCKS / "000002").write_text(json.dumps(lock.holder.to_json()))
        assert not lock.is_held()
        end = time.monotonic() + 120
        while not ended:
            assert time.monotonic() < end
            time.sleep(0.01)
    assert ended == [69]
    assert "was taken over by another process" in capsys.readouterr().err
    assert holder_of(tmp_path) == lock.holder  # the release is of its own file


# -- runs ----------------------------------------------------------------------------------------
def test_ranks_share_the_lock_of_the_command_that_started_them(tmp_path, monkeypatch):
    with RunLock(tmp_path, "evspan train") as lock:
        with RunLock(tmp_path / ".." / tmp_path.name, "evspan train"):
            pass
        assert holder_of(tmp_path) is not None
        code = (
            "import sys; from evspan.pipeline.run_lock import attempt_lock\n"
            "with attempt_lock(sys.argv[1], is_main=True): pass"
        )
        command = [sys.executable, "-c", code, str(tmp_path)]
        shared = {**os.environ, **lock.environment()}
        assert subprocess.run(command, env=shared).returncode == 0
        other = subprocess.run(command, capture_output=True, text=True)
        assert "FolderInUseError" in other.stderr
        assert f"process {os.getpid()} on" in other.stderr
        assert holder_of(tmp_path) is not None
    assert holder_of(tmp_path) is None
    monkeypatch.setenv(HELD_LOCK, "of another folder")
    with RunLock(tmp_path, "evspan train"):
        assert holder_of(tmp_path) is not None


def test_ranks_other_than_the_first_need_no_lock(tmp_path):
    with attempt_lock(tmp_path, is_main=True), attempt_lock(tmp_path, is_main=False):
        pass
    with attempt_lock(tmp_path / "none", is_main=False):
        assert not (tmp_path / "none").exists()


def test_an_attempt_of_a_job_waits_for_its_submission(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr(run_lock, "ATTEMPT_WAIT_S", 20.0)
    quick(monkeypatch, POLL_S=0.02)
    leave_lock(tmp_path, purpose="evspan submit", **elsewhere())
    path = tmp_path / LOCKS / "000005"
    released = subprocess.Popen(["sh", "-c", f"sleep 0.3; echo '{{\"released\": 1}}' > {path}"])
    with attempt_lock(tmp_path, is_main=True):
        assert released.wait(120) == 0


def test_a_command_in_a_job_waits_as_a_rank_does(tmp_path, monkeypatch, caplog):
    """It may follow a job whose processes were killed on another node."""
    leave_lock(tmp_path, **elsewhere())
    assert training_lock(tmp_path).wait_s == 0
    with pytest.raises(FolderInUseError, match="free after about 4 minutes"):
        training_lock(tmp_path).__enter__()
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    quick(monkeypatch, POLL_S=0.02, STALE_S=0.1, WATCH_S=0.1)
    with caplog.at_level("INFO", "evspan"), training_lock(tmp_path):
        assert "on n9) since" in caplog.messages[0]
        assert re.search(r"waiting up to (299|300) s for evspan train", caplog.messages[0])


def test_two_evaluations_do_not_mix_their_results(tmp_path):
    """Nor does one with training, which writes to RUN/evaluation."""
    append(tmp_path, "start", step=0)
    with results_lock(tmp_path / "evaluation-val", is_main=True):
        lost = FolderLock(tmp_path / "evaluation-val", "evspan evaluate")
        with pytest.raises(FolderInUseError, match="evspan evaluate"):
            lost.__enter__()
        with FolderLock(tmp_path, "evspan train"):
            pass
    leave_lock(tmp_path, **elsewhere())
    with pytest.raises(FolderInUseError), results_lock(tmp_path / "evaluation", is_main=True):
        pass
    with results_lock(tmp_path / "elsewhere", is_main=False):
        assert not (tmp_path / "elsewhere").exists()


def test_nothing_is_written_after_a_take_over(tmp_path, monkeypatch):
    ended: list[int] = []
    monkeypatch.setattr(run_lock, "exit_now", ended.append)
    end_if_taken_over(tmp_path)  # never held
    with RunLock(tmp_path, "evspan train"):
        end_if_taken_over(tmp_path)
        assert not ended
        (tmp_path / LOCKS / "000009").write_text("{}")
        end_if_taken_over(tmp_path)
        assert ended == [69]
