"""`evspan status`, `logs` and `cancel`, with runs' files and SLURM's queue."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from evspan.conf.errors import UserError
from evspan.launch.cli import cancel, logs, status
from evspan.launch.slurm.client import Queued, queued
from evspan.launch.sweep import logs as sweep_logs
from evspan.launch.sweep.cancel import cancel_runs
from evspan.launch.sweep.registry import (
    describe,
    differing_keys,
    find_runs,
    format_duration,
    read_runs,
    short_names,
)
from evspan.launch.sweep.state import State, events_of_submission, infer_state
from evspan.launch.sweep.status import status_rows
from evspan.pipeline.history import HISTORY, PROGRESS, append, read, write_progress
from evspan.pipeline.metrics_log import MetricsLog
from evspan.pipeline.run_lock import RunLock
from support.slurm_cluster import Cluster

ROOT = Path(__file__).parents[2]
NOW = time.time()


def make_run(
    folder: Path, *events: str, job: str | None = "17", overrides=(), ap=None, **progress
) -> Path:
    """Events a minute apart, the last of them a minute ago; 'start 40' is one of step 40."""
    folder.mkdir(parents=True)
    began = NOW - 60 * len(events) - 60
    if job:
        about = {"job": job, "overrides": list(overrides), "nodes": 1, "ranks": 1, "time": began}
        (folder / "submitted.json").write_text(json.dumps(about))
    for i, text in enumerate(events):
        event, _, step = text.partition(" ")
        values: dict = {
            "start": {"of": 1000, "host": "n1", "job": job or "", "attempt": 1, "pid": os.getpid()},
            "fault": {"message": "rank-01 on n2: killed", "code": 137},
            "failed": {"message": "loss is not finite", "code": 2},
        }.get(event, {})
        append(folder, event, **values, step=int(step or 0), time=began + 60 * (i + 1))
    if progress:
        write_progress(folder, {"of": 1000, **progress})
    if ap is not None:
        (folder / "evaluation").mkdir()
        (folder / "evaluation" / "metrics.json").write_text(
            json.dumps({"ap": ap, "ap50": 2 * ap, "ap_small": None, "step": 1})
        )
    return folder


def make_sweep(folder: Path) -> Path:
    """A finished run, one that is running, one with a misspelt key."""
    make_run(folder / "0", "submitted", "start", "running 1", "done 1000", job="17_0", ap=0.412)
    make_run(
        folder / "1",
        "submitted",
        "start",
        "running 1",
        job="17_1",
        step=40,
        seconds_per_step=2.0,
        loss=3.5,
    )
    append(folder / "2", "failed", step=0, message="optimizer.learn is no key", code=2)
    runs = [
        {"folder": str(i), "overrides": [f"optimizer.lr={lr}", "seed=1"], "error": None}
        for i, lr in enumerate((1e-3, 1e-4))
    ]
    runs.append(
        {
            "folder": "2",
            "overrides": ["optimizer.learn=1", "seed=1"],
            "error": "optimizer.learn is no key",
        }
    )
    (folder / "sweep.json").write_text(json.dumps({"runs": runs}))
    return folder


@pytest.fixture
def no_slurm(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")


@pytest.fixture
def run_cli(capsys):
    """(exit code, lines) of a command."""

    def call(command, *arguments):
        capsys.readouterr()
        code = 0
        try:
            command.main([str(argument) for argument in arguments])
        except SystemExit as exit_:
            code = exit_.code
        out, err = capsys.readouterr()
        return code, (out + err).splitlines()

    return call


def row(lines: list[str], name: str) -> dict[str, str]:
    """Heading -> cell of a line of a table, by the position of the columns; cells may be empty."""
    heading = next(line for line in lines if line.startswith("run "))
    line = next(line for line in lines if re.match(rf"{re.escape(name)}(\s|$)", line))
    words = [(m.group(), m.start(), m.end()) for m in re.finditer(r"\S+( \S+)*", heading)]
    cells = [(m.group(), m.start(), m.end()) for m in re.finditer(r"\S+( \S+)*", line)]
    return {
        word: next((c for c, a, b in cells if a < end and b > start), "")
        for word, start, end in words
    }


# -- states ------------------------------------------------------------------------------------------------------
def events_of(words: str) -> list[dict]:
    return [
        {"event": word, "time": float(i), "job": "7", "host": "n1"}
        for i, word in enumerate(words.split())
    ]


def task(state: str, reason: str = "(None)") -> Queued:
    return Queued("7", state, reason, "")


@pytest.mark.parametrize(
    ("events", "queue", "expected"),
    [
        ("submitted", task("PENDING", "(Priority)"), ("waiting", "Priority")),
        ("submitted", task("PENDING", "(None)"), ("waiting", "")),
        ("submitted", task("CONFIGURING"), ("waiting", "configuring")),
        ("submitted", task("RUNNING", "n1"), ("running", "starting")),
        ("submitted start", task("RUNNING", "n1"), ("running", "starting")),
        ("submitted start running", task("RUNNING", "n1"), ("running", "")),
        (
            "start submitted running",
            task("RUNNING", "n1"),
            ("running", ""),
        ),  # it started before sbatch's caller had recorded it
        ("start running", task("SUSPENDED", "n1"), ("running", "suspended")),
        ("start running", task("COMPLETING", "n1"), ("running", "completing")),
        ("start running saved", task("RUNNING", "n1"), ("saved", "ending")),
        ("start running saved", task("COMPLETING", "n1"), ("saved", "ending")),
        ("start running saved requeued", task("PENDING", "(BeginTime)"), ("requeued", "BeginTime")),
        (
            "start running",
            task("PENDING", "(BeginTime)"),
            ("requeued", "BeginTime"),
        ),  # a node has died without a record
        (
            "start running fault requeued",
            task("REQUEUE_HOLD", "(JobHoldMaxRequeue)"),
            ("requeued", "requeue_hold"),
        ),
        ("start running saved requeued", task("RUNNING", "n1"), ("running", "starting")),
        ("start running saved requeued start", task("RUNNING", "n1"), ("running", "starting")),
        ("start running saved requeued start running", task("RUNNING", "n1"), ("running", "")),
        ("start running done", task("COMPLETING", "n1"), ("done", "")),
        ("start running done", None, ("done", "")),
        ("start running done", task("COMPLETED", "n1"), ("done", "")),
        ("failed", task("RUNNING", "n1"), ("failed", "")),
        ("start running fault failed", None, ("failed", "")),
        ("start running saved requeued failed", task("FAILED"), ("failed", "")),
        ("submitted cancelled", None, ("cancelled", "")),
        ("start running cancelled", task("COMPLETING", "n1"), ("cancelled", "")),
        (
            "start running cancelled saved",
            task("CANCELLED"),
            ("cancelled", ""),
        ),  # it saved on the way out
        (
            "start running cancelled",
            task("RUNNING", "n1"),
            ("running", "starting"),
        ),  # SLURM has not carried it out
        ("start running", task("CANCELLED"), ("cancelled", "by scancel")),
        ("start running", task("OUT_OF_MEMORY"), ("lost", "SLURM ended it: OUT_OF_MEMORY")),
        ("start running", None, ("lost", "not in SLURM's queue")),
        ("submitted", None, ("lost", "not in SLURM's queue")),
        ("start running fault requeued", None, ("lost", "not in SLURM's queue")),
        ("start running saved", None, ("saved", "not in the queue")),
        ("start running done submitted start", task("RUNNING", "n1"), ("running", "starting")),
    ],
)
def test_states_of_jobs(events, queue, expected):
    state, reason = infer_state(events_of(events), "7", queue, queue_read=True)
    assert (state.value, reason) == expected


@pytest.mark.parametrize(
    ("events", "job", "expected"),
    [
        ("submitted", "7", "waiting"),
        ("start", "7", "running"),
        ("start running", "7", "running"),
        ("start saved", "7", "saved"),
        ("start running fault", "7", "requeued"),
        ("start saved requeued", "7", "requeued"),
        ("start done", "7", "done"),
        ("start running", "", "running"),
        ("start saved", "", "saved"),
        ("start running saved start running", "", "running"),
        ("start failed", "", "failed"),
        ("start failed start", "", "running"),
        ("start cancelled", "7", "cancelled"),
    ],
)
def test_states_by_files_alone(events, job, expected):
    assert infer_state(events_of(events), job, None, queue_read=False)[0].value == expected


@pytest.mark.parametrize(
    ("queue", "expected"),
    [
        (task("COMPLETING", "n1"), "time limit reached while saving"),
        (task("PENDING", "(BeginTime)"), "time limit reached while saving, BeginTime"),
        (task("PENDING", "(None)"), "time limit reached while saving"),
    ],
)
@pytest.mark.parametrize("words", ["start running time_limit", "submitted time_limit"])
def test_a_requeue_shows_its_reason(words, queue, expected):
    requeued = {"event": "requeued", "time": 9.0, "reason": "time limit reached while saving"}
    events = [*events_of(words), requeued]
    assert infer_state(events, "7", queue, queue_read=True) == (State.requeued, expected)
    assert infer_state(events, "7", None, queue_read=False).reason.endswith("while saving")


def test_a_process_of_this_machine_that_is_gone_is_lost():
    ended = subprocess.Popen(["true"])
    ended.wait(120)
    start = {"event": "start", "time": time.time(), "host": socket.gethostname(), "job": ""}
    assert infer_state([{**start, "pid": ended.pid}], "", None, queue_read=False) == (
        State.lost,
        f"process {ended.pid} has ended",
    )
    # A process that began days after the run is another one with the same id.
    reused = {**start, "time": 1.0, "pid": os.getpid()}
    assert infer_state([reused], "", None, queue_read=False)[0] is State.lost
    assert (
        infer_state([{**start, "pid": os.getpid()}], "", None, queue_read=False)[0] is State.running
    )
    assert (
        infer_state([{**start, "pid": ended.pid, "host": "elsewhere"}], "", None, queue_read=False)[
            0
        ]
        is State.running
    )
    assert (
        infer_state(
            [{**start, "pid": ended.pid}, {"event": "done", "time": 2.0}],
            "",
            None,
            queue_read=False,
        )[0]
        is State.done
    )


def test_events_before_a_submission_do_not_count():
    events = [{"event": "start", "job": "7", "time": 1.0}, {"event": "failed", "time": 2.0}]
    assert events_of_submission(events, {"job": "8", "time": 3.0}) == []
    assert events_of_submission(events, {"job": "7", "time": 3.0}) == events  # clocks differ
    again = [
        *events,
        {"event": "start", "job": "8", "time": 2.9},
        {"event": "running", "time": 3.5},
    ]
    assert events_of_submission(again, {"job": "8", "time": 3.0}) == again[2:]
    unheard = [*events, {"event": "failed", "time": 3.5}]  # before its start
    assert events_of_submission(unheard, {"job": "8", "time": 3.0}) == unheard[2:]
    assert events_of_submission(events, {}) == events


def test_a_run_started_on_this_machine_after_a_job_is_no_job(tmp_path, no_slurm):
    run = make_run(tmp_path / "run", "submitted", "start", "failed")
    append(run, "start", step=0, of=10, attempt=2, host="elsewhere", job="", pid=1)
    (observed,), note = read_runs(run)
    assert (observed.job, observed.state, observed.requeues, note) == ("", State.running, 1, "")


# -- finding -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("make", "part"),
    [
        (lambda p: None, "does not exist. Give the folder of a run (its run_dir) or of a sweep"),
        (lambda p: p.write_text("x"), "is a file"),
        (lambda p: p.mkdir(), "contains no run. Give the folder of a run (it has history"),
    ],
)
@pytest.mark.parametrize("command", [status, logs, cancel])
def test_a_folder_without_a_run_gives_one_line(tmp_path, run_cli, command, make, part):
    make(tmp_path / "x")
    code, lines = run_cli(command, tmp_path / "x")
    assert code == 2
    assert len(lines) == 1
    assert lines[0].startswith(f"error: {tmp_path / 'x'} ")
    assert part in lines[0]


def test_runs_come_in_the_order_of_their_numbers(tmp_path):
    for i in (10, 9, 1, 2):
        make_run(tmp_path / str(i), "done")
    (tmp_path / "other").mkdir()
    assert [run.name for run in find_runs(tmp_path)] == ["1", "2", "9", "10"]
    (run,) = find_runs(tmp_path / "9")
    assert (run.folder, run.name) == (tmp_path / "9", "9")


def test_overrides_that_differ(tmp_path, no_slurm):
    runs, _ = read_runs(make_sweep(tmp_path / "sweep"))
    assert differing_keys(runs) == ["optimizer.lr", "optimizer.learn"]
    assert differing_keys(runs[:1]) == ["optimizer.lr", "seed"]
    assert short_names(["optimizer.lr", "model.fpn.depth", "seed", "x.lr"]) == [
        "optimizer.lr",
        "depth",
        "seed",
        "x.lr",
    ]


@pytest.mark.parametrize(
    "name",
    [
        "1/history.jsonl",
        "1/progress.json",
        "1/submitted.json",
        "0/evaluation/metrics.json",
        "sweep.json",
    ],
)
def test_half_written_files_are_tolerated(tmp_path, no_slurm, name):
    sweep = make_sweep(tmp_path / "sweep")
    path = sweep / name
    whole = path.read_bytes()
    for end in range(0, len(whole), 7):
        path.write_bytes(whole[:end] + b"\xff" * (end % 2))
        runs, _ = read_runs(sweep)
        assert [run.name for run in runs] == ["0", "1", "2"]
        assert status_rows(runs)
        assert runs[0].state is State.done
    path.unlink()
    assert len(read_runs(sweep)[0]) == 3


def test_a_run_that_has_only_its_config_is_unknown(tmp_path, no_slurm):
    (tmp_path / "config.json").write_text('{"training": {"max_steps": 70}}')
    (run,), note = read_runs(tmp_path)
    assert (run.state, run.max_steps, run.step, run.reason, note) == (
        State.unknown,
        70,
        None,
        f"no {HISTORY}",
        "",
    )


# -- status ------------------------------------------------------------------------------------------------------
def test_the_table(tmp_path, no_slurm, run_cli):
    sweep = make_sweep(tmp_path / "sweep")
    code, lines = run_cli(status, sweep)
    assert code == 0
    first, second, third = (row(lines, name) for name in "012")
    assert (first["lr"], first["state"], first["step"], first["AP"]) == (
        "0.001",
        "done",
        "1000/1000",
        "0.412",
    )
    assert (second["state"], second["step"], second["node"], second["requeues"]) == (
        "running",
        "40/1000",
        "n1",
        "0",
    )
    assert second["ETA"] == "32 min"  # 960 steps of 2 s
    assert (third["learn"], third["state"], third["last error"]) == (
        "1",
        "failed",
        "optimizer.learn is no key",
    )
    assert "seed" not in lines[0]
    assert lines[-2:] == [
        "3 runs: 1 running, 1 done, 1 failed",
        "note: squeue is not on the PATH; the states come from the runs' files",
    ]


def test_status_as_json(tmp_path, no_slurm, run_cli):
    code, lines = run_cli(status, make_sweep(tmp_path / "sweep"), "--json")
    contents = json.loads("\n".join(lines))
    assert code == 0
    assert [run["state"] for run in contents["runs"]] == ["done", "running", "failed"]
    assert contents["runs"][1]["overrides"] == {"optimizer.lr": "0.0001", "seed": "1"}
    assert contents["runs"][1]["eta_s"] == pytest.approx(1920, abs=60)
    assert contents["note"] == "squeue is not on the PATH"


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--every", "0"], "--every is 0; give 1 s or more"),
        (["--json", "--watch"], "not allowed with"),
    ],
)
def test_status_refuses(tmp_path, run_cli, arguments, part):
    code, (line,) = run_cli(status, make_run(tmp_path / "run", "done"), *arguments)
    assert code == 2
    assert part in line


@pytest.mark.timeout(240)
def test_watch_ends_with_the_run(tmp_path, no_slurm, run_cli):
    run = make_run(tmp_path / "run", "start", "running 1", job="")
    with ending(run):
        code, lines = run_cli(status, run, "--watch", "--every", "1")
    states = [
        re.split("  +", line)[1]
        for line in lines
        if line.startswith("run  ") and "state" not in line
    ]
    assert code == 0
    assert states[0] == "running"
    assert states[-1] == "done"
    assert states.count("done") == 1


def test_the_newest_record_decides_the_step(tmp_path, no_slurm):
    run = make_run(
        tmp_path / "run", "start", "running 1", "requeued 50", "start 50", "running 51", job=""
    )
    write_progress(
        run, {"step": 90, "of": 1000, "time": NOW - 250, "seconds_per_step": 1.0}
    )  # of the first attempt
    (observed,), _ = read_runs(run)
    assert (observed.step, observed.max_steps, observed.requeues) == (51, 1000, 1)
    assert observed.eta_s == 949
    write_progress(run, {"step": 60, "of": 1000, "time": NOW, "seconds_per_step": None})
    assert (read_runs(run)[0][0].step, read_runs(run)[0][0].eta_s) == (60, None)


def test_a_silent_run_is_reported(tmp_path, no_slurm):
    (tmp_path / "run").mkdir()
    append(
        tmp_path / "run", "start", step=0, of=10, host="elsewhere", job="", time=time.time() - 6010
    )
    append(tmp_path / "run", "running", step=1, time=time.time() - 6000)
    (run,), _ = read_runs(tmp_path / "run")
    assert (run.state, run.reason) == (State.running, "silent for 100 min")
    append(tmp_path / "run", "saved", step=2)
    assert read_runs(tmp_path / "run")[0][0].reason == ""


def test_errors_of_others_are_harmless_to_a_terminal(tmp_path, no_slurm, run_cli):
    run = make_run(tmp_path / "run", job="", overrides=())
    append(run, "failed", step=3, message="bad\n\033[2Jnews\x07", code=2)
    code, lines = run_cli(status, run)
    assert code == 0
    assert len(lines) == 2
    assert lines[1].endswith("bad �[2Jnews�")
    assert describe(read_runs(run)[0][0]) == "failed at step 3: bad �[2Jnews�"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (-3, "0 s"),
        (119, "119 s"),
        (120, "2 min"),
        (7199, "120 min"),
        (7200, "2.0 h"),
        (200_000, "2.3 days"),
    ],
)
def test_spans(seconds, words):
    assert format_duration(seconds) == words


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_the_commands_load_no_torch(tmp_path):
    run = make_run(tmp_path / "run", "start", "done", job="")
    script = (
        "import sys; from evspan.launch.cli import cancel, logs, report, status; p = sys.argv[1:]; status.main(p); cancel.main(p); "
        "report.main(p); assert not {'torch', 'hydra', 'deepspeed'} & set(sys.modules)"
    )
    process = subprocess.run(
        [sys.executable, "-c", script, str(run)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (process.returncode, process.stderr) == (0, "")


# -- logs --------------------------------------------------------------------------------------------------------
@pytest.fixture
def logged(tmp_path):
    run = make_run(tmp_path / "sweep" / "3", "start", "running 1", "done 1000")
    (run / "logs").mkdir()
    for rank in (0, 1, 10):
        (run / "logs" / f"rank-{rank:02d}.log").write_text(
            "".join(f"{rank}: line {i}\n" for i in range(30)) + "end"
        )
    return run


def test_logs_of_a_rank_and_of_all(logged, run_cli):
    whole = [f"0: line {i}" for i in range(30)] + ["end"]
    assert run_cli(logs, logged) == (0, whole)
    assert run_cli(logs, logged, "--lines", 2) == (0, whole[-2:])
    assert run_cli(logs, logged, "--lines", 0) == (0, [])
    assert run_cli(logs, logged, "--rank", 10, "-n", 2) == (0, ["10: line 29", "end"])
    assert run_cli(logs, logged, "--all", "--lines", 1) == (
        0,
        ["[rank 0] end", "[rank 1] end", "[rank 10] end"],
    )
    assert run_cli(logs, logged, "--follow", "-n", 1) == (
        0,
        ["end", f"{logged}: done at step 1000 of 1000"],
    )


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--rank", 2], "has no log of rank 2; give one of 0, 1, 10"),
        (["--rank", -1], "--rank is -1; give 0 or more"),
        (["--lines", -1], "--lines is -1"),
        (["--rank", 1, "--all"], "not allowed with"),
    ],
)
def test_missing_logs_and_bad_options(logged, run_cli, arguments, part):
    code, (line,) = run_cli(logs, logged, *arguments)
    assert code == 2
    assert part in line


def test_logs_of_a_sweep_or_of_no_log(logged, tmp_path, no_slurm, run_cli):
    code, (line,) = run_cli(logs, logged.parent)
    assert code == 2
    assert f"is a sweep of 1 run; name one: {logged}" in line
    code, (line,) = run_cli(logs, make_run(tmp_path / "waits", "submitted"))
    assert code == 2
    assert line.endswith("has no logs: it is waiting at step 0; --follow waits for them")
    code, (line,) = run_cli(logs, make_run(tmp_path / "here", "start", job=""))
    assert code == 2
    assert f"{tmp_path / 'here'} has no logs: it is " in line


@pytest.mark.timeout(240)
def test_a_closed_pipe_ends_logs_quietly(logged):
    (logged / "logs" / "rank-00.log").write_text("line\n" * 100_000)
    command = [
        sys.executable,
        "-c",
        "from evspan.launch.cli.logs import main; main()",
        str(logged),
    ]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert process.stdout.readline() == b"line\n"
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(120) == 141
    finally:
        process.kill()


@contextmanager
def ending(run: Path, seconds: float = 1.5):
    """Another process ends the run after some seconds."""
    script = f"import time; time.sleep({seconds}); from evspan.pipeline.history import append; append({str(run)!r}, 'done', step=1000)"
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT)
    try:
        yield
    finally:
        process.wait(120)


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_follow_waits_for_a_log_and_ends_with_the_run(tmp_path, monkeypatch, run_cli, no_slurm):
    monkeypatch.setattr(sweep_logs, "STATE_S", 0.5)
    run = make_run(tmp_path / "run", "start", job="17")
    script = f"""
import os, time
os.makedirs({str(run / "logs")!r})
for rank in (0, 1):
    with open({str(run / "logs")!r} + f"/rank-0{{rank}}.log", "w") as file:
        for text in ("a", "b\\nc", "\\nlast"):
            time.sleep(0.3)
            print(text, end="", file=file, flush=True)
"""
    writer = subprocess.Popen([sys.executable, "-c", script])
    try:
        with ending(run, 3.5):
            code, lines = run_cli(logs, run, "--follow", "--all")
    finally:
        writer.wait(120)
    assert code == 0
    assert lines[-1] == f"{run}: done at step 1000 of 1000"
    for rank in (0, 1):
        mine = [line for line in lines if line.startswith(f"[rank {rank}] ")]
        assert mine == [f"[rank {rank}] {text}" for text in ("ab", "c", "last")]


def test_following_metrics_reads_each_line_once_when_the_file_is_replaced(tmp_path):
    """A resume writes a shorter file, and steps after it have new lines."""
    log = MetricsLog(tmp_path, enabled=True)
    reader = sweep_logs.LogReader(log.path, "", replaced=True)
    steps = []

    def read():
        steps.extend(json.loads(line)["step"] for line in reader.lines())

    for step in range(1, 7):
        log.write("train", step, {"loss": 1.0})
    read()
    resumed = MetricsLog(tmp_path, enabled=True, resume_step=4)
    for step in range(5, 9):
        resumed.write("train", step, {"loss": 123.456})
    read()
    resumed.write("train", 9, {"loss": 2.0})
    read()
    read()
    assert steps == [1, 2, 3, 4, 5, 6, 5, 6, 7, 8, 9]


# -- cancel ------------------------------------------------------------------------------------------------------
def test_nothing_to_cancel_is_no_error(tmp_path, no_slurm, run_cli):
    run = make_run(tmp_path / "run", "start", "done 1000")
    assert run_cli(cancel, run) == (0, [f"nothing to cancel: {run} is done at step 1000 of 1000"])
    make_run(tmp_path / "other", "start", "failed 3")
    assert run_cli(cancel, tmp_path) == (0, ["nothing to cancel: 2 runs: 1 done, 1 failed"])
    assert [e["event"] for e in read(run)] == ["start", "done"]


def test_a_job_cannot_be_cancelled_without_slurm(tmp_path, no_slurm, run_cli):
    run = make_run(tmp_path / "run", "start")
    code, (line,) = run_cli(cancel, run)
    assert code == 2
    assert (
        line == "error: squeue is not on the PATH; run it where SLURM's commands reach the cluster"
    )
    assert [e["event"] for e in read(run)] == ["start"]


def test_cancel_explains_how_to_end_a_local_run(tmp_path, no_slurm, run_cli):
    run = make_run(tmp_path / "run", "start", "running 1", job="")
    code, (line,) = run_cli(cancel, run)
    assert code == 0
    assert line == (
        f"{run}: runs on n1 without SLURM; on that machine, kill -TERM {os.getpid()} saves and ends it, "
        "Ctrl-C ends it at once"
    )
    (tmp_path / "sweep.json").write_text('{"runs": [{"folder": "later", "overrides": []}]}')
    with RunLock(tmp_path, "evspan sweep"):
        code, lines = run_cli(cancel, tmp_path)
    assert code == 0
    assert f"{tmp_path / 'later'}: is not a SLURM job and has not started" in "\n".join(lines)


def test_runs_that_no_command_starts_are_not_waited_for(tmp_path, no_slurm, run_cli):
    make_run(tmp_path / "0", "start", "running 1", "done 1000", job="")
    rows = [{"folder": name, "overrides": [f"seed={name}"]} for name in "01"]
    (tmp_path / "sweep.json").write_text(json.dumps({"runs": rows}))
    with RunLock(tmp_path, "evspan sweep"):
        states = {run.name: run.state for run in read_runs(tmp_path).runs}
    assert states == {"0": State.done, "1": State.waiting}
    code, lines = run_cli(status, tmp_path, "--watch")  # ends
    assert code == 0
    assert "unknown (not submitted)" in "\n".join(lines)
    _, lines = run_cli(cancel, tmp_path)
    assert lines == ["nothing to cancel: 2 runs: 1 done, 1 unknown"]


def test_a_damaged_table_of_ranks_hides_no_other(tmp_path, no_slurm, run_cli):
    for name in "01":
        run = make_run(tmp_path / name, "start", "running 1", job="")
        (run / "ranks.json").write_text('{"step": 5, "time": 1.0, "ranks": [{"rank": 0}]}')
    (tmp_path / "0" / "ranks.json").write_text("{")
    code, lines = run_cli(status, tmp_path, "--ranks")
    assert code == 0
    assert lines[0].startswith(f"0: {tmp_path}/0/ranks.json is not JSON")
    assert lines[1].startswith("1: ")
    _, lines = run_cli(status, tmp_path, "--ranks", "--json")
    first, second = json.loads("\n".join(lines))["runs"]
    assert "is not JSON" in first["problem"]
    assert second["step"] == 5
    code, lines = run_cli(status, tmp_path / "0", "--ranks")
    assert code == 2


# -- on the cluster ----------------------------------------------------------------------------------------------
@pytest.fixture
def slurm(cluster: Cluster, monkeypatch):
    monkeypatch.setenv("SLURM_CONF", str(cluster.conf))
    yield cluster
    cluster.end_jobs()


def sbatch(slurm: Cluster, *options: str) -> str:
    return slurm.ask(
        "sbatch", "--parsable", "--output=/dev/null", *options, "--wrap=sleep 120"
    ).strip()


def submitted(folder: Path, job: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "submitted.json").write_text(
        json.dumps({"job": job, "overrides": [], "time": time.time()})
    )
    append(folder, "submitted", job=job)
    return folder


def until(condition, seconds: float = 20):
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "this took too long"
        time.sleep(0.05)
    return value


@pytest.mark.timeout(240)
def test_status_and_cancel_of_real_jobs(slurm, tmp_path, run_cli):
    runs, array, waiting = tmp_path / "runs", sbatch(slurm, "--array=0-1"), sbatch(slurm, "--hold")
    first, _, held = (
        submitted(runs / str(i), job) for i, job in enumerate((f"{array}_0", f"{array}_1", waiting))
    )
    until(
        lambda: (
            [run.state for run in read_runs(runs)[0]]
            == [State.running, State.running, State.waiting]
        )
    )
    lines = run_cli(status, runs)[1]
    assert row(lines, "0")["state"] == "running (starting)"
    assert row(lines, "0")["node"] in (
        "n1",
        "n2",
    )
    assert row(lines, "2")["state"] == "waiting (JobHeldUser)"
    assert lines[-1] == "3 runs: 1 waiting, 2 running"
    append(first, "start", step=3, of=10, attempt=1, host="n1", job=f"{array}_0")
    append(first, "running", step=4)
    assert row(run_cli(status, runs)[1], "0")["state"] == "running"

    assert run_cli(cancel, held) == (
        0,
        [f"{held}: cancelled SLURM job {waiting}, which was waiting (JobHeldUser)"],
    )
    code, lines = run_cli(cancel, runs)
    assert code == 0
    assert len(lines) == 2
    assert lines[0].endswith("which was running at step 4 of 10")
    until(
        lambda: (
            {slurm.jobs().get(job) for job in (f"{array}_0", f"{array}_1", waiting)}
            <= {"CANCELLED", None}
        )
    )
    assert [run.state for run in read_runs(runs)[0]] == [State.cancelled] * 3
    assert [e["event"] for e in read(held)] == ["submitted", "cancelled"]
    assert run_cli(cancel, runs) == (0, ["nothing to cancel: 3 runs: 3 cancelled"])


@pytest.mark.timeout(240)
def test_jobs_that_slurm_ended_or_does_not_have(slurm, tmp_path):
    job = sbatch(slurm)
    run = submitted(tmp_path / "run", job)
    until(lambda: read_runs(run)[0][0].state is State.running)
    slurm.ask("scancel", job)
    until(lambda: read_runs(run)[0][0].state is State.cancelled)
    assert read_runs(run)[0][0].reason == "by scancel"
    assert set(queued([job, "4000000", f"{job}_7"])) == {job}
    assert queued(["4000000"]) == {}
    assert queued([]) == {}
    (run / "submitted.json").write_text(json.dumps({"job": "4000000", "time": NOW - 60}))
    (observed,), note = read_runs(run)
    assert (observed.state, observed.reason, note) == (State.lost, "not in SLURM's queue", "")


@pytest.mark.timeout(240)
def test_a_controller_that_does_not_answer(slurm, tmp_path, monkeypatch, run_cli):
    run, conf = make_run(tmp_path / "tiny", "start", "running 1"), tmp_path / "slurm.conf"
    conf.write_text(
        "Nonsense=1\n"
    )  # one that is down takes squeue 20 s to notice, and ends it the same way
    monkeypatch.setenv("SLURM_CONF", str(conf))
    code, lines = run_cli(status, run)
    assert code == 0
    assert row(lines, "tiny")["state"] == "running"
    assert lines[-1].startswith("note: squeue failed: ")
    with pytest.raises(
        UserError, match="squeue failed.*run it where SLURM's commands reach the cluster"
    ):
        cancel_runs(run)
    assert PROGRESS not in os.listdir(run)
