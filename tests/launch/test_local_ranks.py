"""Ranks on this machine, with small programs as ranks: their environment and how they end. None is left running."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from evspan.conf.errors import IO_EXIT_CODE
from evspan.launch.local.ranks import run_ranks
from support.processes import alive, all_ready, eventually, pids

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

# Starts the ranks as `evspan train` does, in a process of its own, so that signals can be sent to it.
LAUNCHER = """
import sys
from evspan.launch.local.ranks import run_ranks
sys.exit(run_ranks([sys.executable, *sys.argv[3:]], int(sys.argv[1]), remedy="Do it again", grace_s=float(sys.argv[2])))
"""
# What every rank program begins with; `here` is the test's folder.
PRELUDE = """
import os, pathlib, signal, socket, sys, time
from evspan.launch.cli.command import run_command
from evspan.conf.errors import UserError
rank, size, here = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), pathlib.Path(__file__).parent
def ready():
    (here / f"pid-{rank}").write_text(str(os.getpid()))
def wait_for(name):
    while not (here / name).exists():
        time.sleep(0.01)
def fail(error):
    raise error
"""
STUCK = """
for s in (signal.SIGTERM, signal.SIGINT):
    signal.signal(s, lambda number, frame: (here / f"got-{rank}").touch())
ready()
while True: time.sleep(60)
"""


def launched(folder: Path, program: str, ranks: int = 2, grace_s: float = 0.5) -> subprocess.Popen:
    (folder / "program.py").write_text(PRELUDE + program)
    return subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, str(ranks), str(grace_s), str(folder / "program.py")],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(folder: Path, program: str, ranks: int = 2) -> tuple[int, str, str]:
    """Exit code, stdout and stderr; no rank is left."""
    started = launched(folder, program, ranks)
    out, err = started.communicate(timeout=120)
    assert not [pid for pid in pids(folder) if alive(pid)]
    return started.returncode, out, err


# -- the environment of a rank -----------------------------------------------------------------------------------------
def test_ranks_get_torchruns_variables_and_connect_at_the_port(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    program = """
import json
(here / f"env-{rank}").write_text(json.dumps(dict(os.environ, parent=os.getppid(), stdin=sys.stdin.read())))
address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
if rank == 0:  # listens as torch's TCPStore does
    server = socket.socket(socket.AF_INET6)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    server.bind(("::", address[1]))
    server.listen()
    (here / "listening").touch()
    print("rank 0 met rank", sorted(int(server.accept()[0].recv(9)) for _ in range(size - 1)))
else:
    wait_for("listening")
    socket.create_connection(address).send(str(rank).encode())
    print("not shown")
"""
    started = launched(tmp_path, program, ranks=3)
    out, err = started.communicate(timeout=120)
    assert (started.returncode, out, err) == (0, "rank 0 met rank [1, 2]\n", "")
    environments = [json.loads((tmp_path / f"env-{rank}").read_text()) for rank in range(3)]
    for rank, environment in enumerate(environments):
        assert environment["RANK"] == environment["LOCAL_RANK"] == str(rank)
        assert environment["WORLD_SIZE"] == environment["LOCAL_WORLD_SIZE"] == "3"
        assert environment["MASTER_ADDR"] == "127.0.0.1"
        assert environment["MASTER_PORT"] == environments[0]["MASTER_PORT"]
        assert environment["parent"] == started.pid
        assert environment["stdin"] == ""
        assert int(environment["OMP_NUM_THREADS"]) == max(1, len(os.sched_getaffinity(0)) // 3)


def test_the_port_is_reserved_meanwhile(tmp_path):
    started = launched(
        tmp_path,
        "(here / 'port').write_text(os.environ['MASTER_PORT'])\nready()\nwait_for('go')",
        ranks=1,
    )
    all_ready(tmp_path, ranks=1)
    port = (tmp_path / "port").read_text()
    # It is reserved, although no process listens on it.
    for family in (socket.AF_INET, socket.AF_INET6):
        with socket.socket(family) as other, pytest.raises(OSError, match="Address already in use"):
            other.bind(("", int(port)))
    (tmp_path / "go").touch()
    assert started.communicate(timeout=120) == ("", "")
    assert started.returncode == 0


def test_own_threads_are_kept_and_other_programs_are_not_shadowed(tmp_path):
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "__init__.py").write_text("print('the wrong one')")
    program = "print(os.environ['OMP_NUM_THREADS'])\nimport evspan.pipeline\nprint(evspan.pipeline.__file__)"
    (tmp_path / "program.py").write_text(PRELUDE + program)
    launcher = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n" + LAUNCHER
    command = [sys.executable, "-c", launcher, "1", "1", "-m", "program"]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "7", "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.split("\n")[:2] == ["7", str(ROOT / "pipeline" / "__init__.py")], done.stderr


# -- how they end ------------------------------------------------------------------------------------------------
def test_a_rank_that_is_done_early_is_no_failure(tmp_path):
    code, out, err = finished(
        tmp_path, "ready()\nif rank == 0: time.sleep(1.2); print('done')"
    )  # longer than the grace
    assert (code, out, err) == (0, "done\n", "")


def test_a_killed_rank_is_named_and_the_waiting_one_ended(tmp_path):
    program = (
        "if rank == 1: ready(); print('was here'); wait_for('pid-0'); os.kill(os.getpid(), signal.SIGKILL)\n"
        + STUCK
    )
    began = time.monotonic()
    code, _out, err = finished(tmp_path, program)
    assert code == 128 + 9
    assert time.monotonic() - began < 20
    assert "[rank 1] was here\n" in err
    last = err.splitlines()[-1]
    assert last.startswith("error: rank 1 of 2 was killed by SIGKILL")
    assert "memory" in last
    assert last.endswith("Do it again")


def test_a_ranks_traceback_is_shown(tmp_path):
    code, _out, err = finished(
        tmp_path, "if rank == 1: fail(ValueError('of all things'))\n" + STUCK
    )
    assert code == 1
    assert "[rank 1] ValueError: of all things\n" in err
    assert err.splitlines()[-1].startswith("error: rank 1 of 2 ended with exit code 1")


@pytest.mark.parametrize("takes_s", [0.1, 30], ids=["within the grace", "until it is killed"])
def test_the_rank_that_failed_first_is_named_though_it_exits_last(tmp_path, takes_s):
    """One rank's exception closes its connections; the others fail because of that, and exit sooner."""
    program = (
        f"takes_s = {takes_s}"
        + """
ready()
if rank == 1:
    import atexit
    atexit.register(lambda: ((here / "failed").touch(), time.sleep(takes_s)))
    run_command(lambda: fail(ValueError("the cause")))
wait_for("failed")
run_command(lambda: fail(RuntimeError("connection closed by peer")))
"""
    )
    code, _out, err = finished(tmp_path, program)
    assert code == 1
    assert "[rank 1] ValueError: the cause\n" in err
    assert err.splitlines()[-1].startswith("error: rank 1 of 2 ended with exit code 1")


def test_a_users_error_is_reported_once(tmp_path):
    code, out, err = finished(
        tmp_path,
        "ready(); run_command(lambda: fail(UserError('no such shard; prepare it')))",
        ranks=3,
    )
    assert (code, out, err) == (2, "", "error: no such shard; prepare it\n")


def test_a_users_error_of_one_rank_is_reported(tmp_path):
    program = (
        "if rank == 1: print('hello'); run_command(lambda: fail(UserError('shard 7 is damaged; prepare it')))\n"
        + STUCK
    )
    code, out, err = finished(tmp_path, program)
    assert (code, out, err) == (2, "", "error: shard 7 is damaged; prepare it\n")


def test_a_file_system_that_does_not_answer_has_an_exit_code_of_its_own(tmp_path):
    """So that a job is requeued for it."""
    error = "unavailable('7.h5', OSError(116, 'Stale file handle'))"
    program = (
        "from evspan.data_prep.hdf5_files import unavailable\n"
        f"if rank == 1: run_command(lambda: fail({error}))\n" + STUCK
    )
    code, out, err = finished(tmp_path, program)
    assert (code, out) == (IO_EXIT_CODE, "")
    assert err.startswith(
        "error: 7.h5 cannot be read now: Stale file handle. Check the file system"
    )
    assert len(err.splitlines()) == 1


# -- signals -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2], ids=lambda n: n.name
)
def test_a_stop_signal_reaches_all_ranks(tmp_path, number):
    program = """
def stop(number, frame):
    if rank == 0:
        time.sleep(0.8)  # saving takes longer than the grace
    (here / f"stopped-{rank}").write_text(str(number))
    sys.exit(75)
for s in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2): signal.signal(s, stop)
ready()
while True: time.sleep(60)
"""
    started = launched(tmp_path, program)
    all_ready(tmp_path)
    started.send_signal(number)
    assert started.communicate(timeout=120) == ("", "")
    assert started.returncode == 75
    assert [(tmp_path / f"stopped-{rank}").read_text() for rank in range(2)] == [
        str(int(number))
    ] * 2


def test_a_stop_signal_before_there_is_anything_to_save(tmp_path):
    started = launched(tmp_path, "ready()\nwhile True: time.sleep(60)")
    all_ready(tmp_path)
    started.send_signal(signal.SIGTERM)
    err = started.communicate(timeout=120)[1]
    assert started.returncode == 128 + 15
    assert err == "error: ended by SIGTERM; nothing was saved. Do it again\n"


def test_interrupted_ranks_end_even_when_one_ignores_the_signal(tmp_path):
    started = launched(
        tmp_path, "if rank == 0: run_command(lambda: (ready(), time.sleep(60)))\n" + STUCK
    )
    ranks = all_ready(tmp_path)
    started.send_signal(signal.SIGINT)
    assert started.communicate(timeout=120) == ("", "")
    assert started.returncode == 130
    assert not any(map(alive, ranks))


def test_the_terminals_interrupt_reaches_ranks_once_through_their_parent(tmp_path):
    """Ctrl-C goes to the whole foreground process group; ranks have groups of their own."""
    started = launched(tmp_path, STUCK, grace_s=1000)
    ranks = all_ready(tmp_path)
    assert len({os.getpgid(pid) for pid in (*ranks, started.pid)}) == 3
    started.send_signal(signal.SIGINT)
    eventually(lambda: len(list(tmp_path.glob("got-*"))) == 2)
    assert all(map(alive, ranks))  # the grace, which a second one ends
    started.send_signal(signal.SIGINT)
    started.communicate(timeout=120)
    assert started.returncode == 130
    assert not any(map(alive, ranks))


def test_no_rank_outlives_a_killed_parent(tmp_path):
    started = launched(tmp_path, STUCK, ranks=3)
    ranks = all_ready(tmp_path, ranks=3)
    assert all(map(alive, ranks))
    started.kill()
    started.communicate(timeout=120)
    eventually(lambda: not any(map(alive, ranks)), seconds=5)


def test_handlers_are_put_back(capfd):
    before = {
        number: signal.getsignal(number)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    }
    assert run_ranks([sys.executable, "-c", "import os; print('rank', os.environ['RANK'])"], 2) == 0
    assert capfd.readouterr() == ("rank 0\n", "")
    assert before == {number: signal.getsignal(number) for number in before}
