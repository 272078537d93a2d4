"""Runs as batch jobs, without SLURM: the script that sbatch gets, what is requeued, sweeps, and the same on this machine."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from evspan.conf.compose import (
    compose,
    config_dir_options,
    expand_sweep,
    replace_override,
)
from evspan.conf.errors import IO_EXIT_CODE
from evspan.conf.schema.cluster import ClusterConfig, Container, Scheduler
from evspan.conf.schema.training import TrainConfig
from evspan.launch.cli import submit, sweep
from evspan.launch.slurm import watchdog
from evspan.launch.slurm.hydra_plugin import cluster_overrides
from evspan.launch.slurm.rank_task import RankNote, read_notes, seconds_early, write_note
from evspan.launch.slurm.requeue import (
    DO_NOT_REQUEUE,
    Decision,
    JobEnd,
    RequeueRule,
    decide,
    main,
    newest_step,
)
from evspan.launch.slurm.sbatch import JobArray, job_name, script
from evspan.launch.slurm.watchdog import end_lines, lead_s, watchdog_lines
from evspan.launch.sweep.plan import PlannedRun, SweepSettings, assign_folders, plan_sweep
from evspan.launch.sweep.submit import record_plan
from evspan.pipeline.history import (
    Activity,
    append,
    attempts,
    faults_in_a_row,
    read,
    read_activity,
    read_progress,
    time_limits_in_a_row,
    write_activity,
    write_progress,
)
from support.refusals import refused_by

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SHARD_FRAMES = {"train": [24, 20], "val": [12]}
HOSTILE = [
    "two words",
    "it's",
    '"quoted"',
    "$(touch {marker})",
    "`touch {marker}`",
    "; touch {marker}",
    "a\nb",
    "\\",
    "ünï",
    "$HOME",
    "*",
]


def tiny(shards: Path, run: Path, *more: str) -> list[str]:
    """Overrides of a run of two steps."""
    return [
        f"dataset.root={shards}",
        f"run_dir={run}",
        "size=micro",
        "model.head.num_classes=3",
        "training.max_steps=2",
        "training.batch_size=2",
        "training.sequence_length=2",
        "training.num_workers=1",
        "training.evaluate_every=0",
        "training.log_every=1",
        "checkpoint.every=1",
        *more,
    ]


# -- the history -------------------------------------------------------------------------------------------------
def test_a_half_written_line_is_skipped(tmp_path):
    append(tmp_path, "start", step=0, attempt=1)
    with (tmp_path / "history.jsonl").open("a") as file:
        file.write('{"event": "sav')
    assert [e["event"] for e in read(tmp_path)] == ["start"]
    append(tmp_path, "running")
    assert [e["event"] for e in read(tmp_path)] == ["start", "running"]
    assert read(tmp_path / "nowhere") == []
    assert read_progress(tmp_path) == {}
    write_progress(tmp_path, {"step": 3, "of": 9})
    assert read_progress(tmp_path)["step"] == 3


@pytest.mark.parametrize(
    ("events", "faults"),
    [
        ("s0 f0 s0 f0 s0 f0", 3),
        ("s0 f0 s0 v5 s5 f5", 1),
        ("s0 f0 s0 f4 s4 f4", 2),
        ("s0 f0 s0 f0 s0 s0 f0", 3),
        ("s0 f0 s0 f0 s0 f0 a0 s0 f0", 1),
        ("s0", 0),
        ("", 0),
    ],
)
def test_faults_are_counted_where_no_step_was_completed(tmp_path, events, faults):
    names = {"s": "start", "f": "fault", "v": "saved", "a": "submitted"}
    for word in events.split():
        append(tmp_path, names[word[0]], step=int(word[1:]))
    assert faults_in_a_row(read(tmp_path)) == faults
    assert attempts(read(tmp_path)) == events.count("s")


def test_a_time_limit_counts_once_for_each_attempt(tmp_path):
    """It is recorded before it is reached, and again at the end of the attempt."""
    for expected in (1, 2, 3):
        append(tmp_path, "start", step=20)
        append(tmp_path, "time_limit", step=20)
        append(tmp_path, "time_limit", step=20)
        assert time_limits_in_a_row(read(tmp_path)) == expected
    append(tmp_path, "start", step=20)
    append(tmp_path, "time_limit", step=30)
    assert time_limits_in_a_row(read(tmp_path)) == 1


def test_a_run_does_not_end_where_its_activity_cannot_be_written(tmp_path, caplog):
    for _ in range(3):
        write_activity(tmp_path / "file" / "below", Activity.saving, 3)
        write_progress(tmp_path / "file" / "below", {"step": 3})
    assert len(caplog.messages) == 2
    assert all("the run goes on" in message for message in caplog.messages)


def test_a_damaged_note_counts_as_none(tmp_path, capsys):
    write_note(tmp_path, MISTAKE)
    write_note(tmp_path / "nowhere", MISTAKE)
    (tmp_path / "rank-00.json").write_text("")
    (tmp_path / "rank-02.json").write_text('{"code": 1}')
    assert read_notes(tmp_path) == [MISTAKE]
    output = capsys.readouterr().out
    assert "rank-00.json is not JSON: it is empty" in output
    assert output.count("is not used") == 2


# -- requeue -----------------------------------------------------------------------------------------------------
MISTAKE, LOST = (
    RankNote("rank-01", 2, "training.x is wrong; set it right", "n2"),
    RankNote("rank-00", 69, "rank 1 is gone", "n1"),
)
NO_ANSWER = RankNote("rank-01", IO_EXIT_CODE, "a.h5 cannot be read now: Stale file handle", "n2")
SAVED, DEFECT = RankNote("rank-00", 75, "", "n1"), RankNote("rank-01", 1, "ValueError: no", "n2")


def rule(run: Path, *, max_retries: int = 3, requeue_after_fault: bool = True) -> RequeueRule:
    return RequeueRule(str(run), str(run / "%j.%t"), 2, max_retries, requeue_after_fault)


@pytest.mark.parametrize(
    ("notes", "code", "state", "requeue", "last_event", "reason"),
    [
        ([], 0, "RUNNING", False, None, "done"),
        ([], 0, "CANCELLED", False, None, "CANCELLED"),  # srun says 0 where SLURM kills its ranks
        ([SAVED], 75, "RUNNING", True, "requeued", "saved"),
        ([SAVED], 75, "CANCELLED", False, None, "CANCELLED"),  # a cancelled job stays cancelled
        ([SAVED], 75, "COMPLETING", False, None, "ended"),
        ([LOST], 137, "RUNNING", True, "requeued", "rank 1 is gone"),
        ([LOST], 137, "NODE_FAIL", False, None, "NODE_FAIL"),
        ([LOST, DEFECT], 69, "RUNNING", True, "requeued", "rank-01 on n2: ValueError: no"),
        ([LOST, MISTAKE], 69, "RUNNING", False, "failed", "set it right"),
        ([LOST, NO_ANSWER], 69, "RUNNING", True, "requeued", "rank-01 on n2: a.h5 cannot be read"),
        ([], 127, "RUNNING", True, "requeued", "python: not found"),
        ([DEFECT], 1, "RUNNING", True, "requeued", "rank-00 left no note"),
        ([SAVED, LOST], 137, "RUNNING", True, "requeued", "rank 1 is gone"),
    ],
)
def test_what_is_requeued(tmp_path, notes, code, state, requeue, last_event, reason):
    log = tmp_path / "log"
    log.write_text("slurm says\npython: not found\n\n")
    decision = decide(rule(tmp_path), JobEnd(notes, code, state, [log, log]))
    assert decision.requeue is requeue
    assert reason in decision.reason
    assert (read(tmp_path)[-1]["event"] if read(tmp_path) else None) == last_event


def test_a_rank_that_ended_while_it_started_is_named_not_those_that_were_killed_for_it(tmp_path):
    """srun kills the others a minute after the first has ended, or they miss it themselves."""
    logs = [tmp_path / f"{rank}.out" for rank in range(4)]
    logs[0].write_text(
        "srun: error: n1: task 0: Exited with exit code 1\n"
        "evspan: run: fault 1 of 3 at step 0: rank-00 left no note; requeued\n"
        "srun: error: n2: tasks 2-3: Exited with exit code 1\n"
        "srun: First task exited 60s ago\n"
        "srun: error: n1: tasks 0-1: Killed\n"
    )
    for number in (2, 3):
        logs[number].write_text(f"SystemExit: broken {number}\n")
    ended = f"rank-02 left no note; {logs[2]} ends with: SystemExit: broken 2"
    decision = decide(rule(tmp_path), JobEnd([], 137, "RUNNING", logs))
    assert f"fault 1 of 3 at step 0: {ended}; " in decision.reason
    missed = RankNote("rank-00", 69, "rank 0 of 4 waited up to 60 s", "n1")
    decision = decide(rule(tmp_path), JobEnd([missed], 69, "RUNNING", logs))
    assert f"step 0: rank 0 of 4 waited up to 60 s; {ended}; " in decision.reason


def test_three_faults_at_one_step_are_enough(tmp_path):
    checkpoint = tmp_path / "checkpoints" / "step-00000040"
    checkpoint.mkdir(parents=True)
    (checkpoint / "meta.json").write_text('{"step": 40, "config": {}}')
    (tmp_path / "checkpoints" / "latest").write_text("step-00000040\n")
    assert newest_step(tmp_path) == 40
    for number in (1, 2, 3):
        append(tmp_path, "start", step=40)
        decision = decide(rule(tmp_path), JobEnd([DEFECT], 1, "RUNNING"))
        assert decision.requeue is (number < 3)
    assert "3 times in a row at step 40" in decision.reason
    assert read(tmp_path)[-1]["event"] == "failed"
    append(tmp_path, "start", step=40)
    never = rule(tmp_path, max_retries=9, requeue_after_fault=False)
    assert decide(never, JobEnd([DEFECT], 1, "RUNNING")).requeue is False


@pytest.mark.parametrize(
    ("notes", "code", "before", "last_event"),
    [
        ([], None, "start", "requeued"),  # the ranks still run
        ([SAVED], 75, "start saved", "requeued"),
        ([LOST], 137, "start", "requeued"),
        ([LOST, MISTAKE], None, "start", "failed"),
        ([], None, "start done", "done"),  # SLURM has not noticed that the ranks have ended
        ([SAVED], 75, "start saved cancelled", "cancelled"),
        ([], None, "start done submitted start", "requeued"),
    ],
)
def test_what_a_time_limit_requeues(tmp_path, notes, code, before, last_event):
    for event in before.split():
        append(tmp_path, event, step=0)
    decision = decide(rule(tmp_path), JobEnd(notes, code, "COMPLETING", time_limit=True))
    assert decision.requeue is (last_event == "requeued")
    assert read(tmp_path)[-1]["event"] == last_event
    assert not [event for event in read(tmp_path) if event["event"] == "fault"]


def test_time_limits_without_a_further_checkpoint_end_the_run(tmp_path):
    """Only those in a row at one step, since it was submitted; and never the first one."""
    reached = JobEnd([], None, "RUNNING", time_limit=True)

    def limit_at(step: int, max_retries: int = 3) -> Decision:
        checkpoint = tmp_path / "checkpoints" / f"step-{step:08d}"
        checkpoint.mkdir(parents=True, exist_ok=True)
        (checkpoint / "meta.json").write_text(json.dumps({"step": step, "config": {}}))
        (tmp_path / "checkpoints" / "latest").write_text(f"{checkpoint.name}\n")
        append(tmp_path, "start", step=step)
        append(tmp_path, "running", step=step)
        write_activity(tmp_path, Activity.evaluating, step)
        return decide(rule(tmp_path, max_retries=max_retries), reached)

    assert all(limit_at(step, max_retries=1).requeue for step in (0, 10, 20))
    assert limit_at(20).requeue
    assert read(tmp_path)[-1]["reason"] == "time limit reached while evaluating"
    decision = limit_at(20)
    assert not decision.requeue
    assert "reached while evaluating, 3 times in a row at step 20. Submit" in decision.reason
    assert "longer cluster.timeout_min, or a smaller checkpoint.every" in decision.reason
    assert read(tmp_path)[-1]["event"] == "failed"
    append(tmp_path, "submitted")
    assert limit_at(20).requeue


def test_what_an_attempt_was_doing(tmp_path):
    assert read_activity(tmp_path) is Activity.starting
    write_activity(tmp_path, Activity.saving, 3)  # of an earlier attempt
    time.sleep(0.01)
    append(tmp_path, "start", step=3)
    assert read_activity(tmp_path) is Activity.starting
    append(tmp_path, "running", step=3)
    assert read_activity(tmp_path) is Activity.training
    write_activity(tmp_path, Activity.images, 4)
    assert read_activity(tmp_path) is Activity.images
    append(tmp_path, "requeued", step=4)
    assert read_activity(tmp_path) is Activity.starting


@pytest.mark.parametrize(
    ("code", "state", "reason", "left", "is_limit"),
    [
        ("limit", "RUNNING", "None", "5", True),
        ("75", "COMPLETING", "TimeLimit", "", True),
        ("75", "TIMEOUT", "None", "", True),
        ("75", "RUNNING", "None", "100", True),
        ("140", "RUNNING", "None", "100", True),  # ended by the signal before it could handle it
        ("75", "RUNNING", "None", "111", False),
        ("75", "RUNNING", "None", "", False),
        ("75", "", "", "50", True),
        ("1", "RUNNING", "None", "100", False),
    ],
)
def test_when_the_time_limit_is_reached(
    tmp_path, monkeypatch, capsys, code, state, reason, left, is_limit
):
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    with_delay = replace(rule(tmp_path), signal_delay_s=20)
    (tmp_path / "runs.json").write_text(json.dumps([asdict(with_delay)]))
    assert main([str(tmp_path / "runs.json"), "0", code, state, reason, left]) == 0
    assert ("time limit" in capsys.readouterr().out) is is_limit


@pytest.mark.parametrize("code", ["75", "143"])
@pytest.mark.parametrize("state", ["COMPLETING", "DEADLINE", "NODE_FAIL", "CANCELLED", "PENDING"])
def test_a_job_that_slurm_ends_is_not_at_its_time_limit(tmp_path, monkeypatch, code, state):
    """After scancel, the end of the job is now, so it has no time left."""
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    with_delay = replace(rule(tmp_path), signal_delay_s=20)
    (tmp_path / "runs.json").write_text(json.dumps([asdict(with_delay)]))
    argv = [str(tmp_path / "runs.json"), "0", code, state, "None", "-1"]
    assert main(argv) == DO_NOT_REQUEUE
    assert not read(tmp_path)


def test_the_requeue_command_of_the_batch_script(tmp_path, monkeypatch, capsys):
    """Only the notes of this attempt and of this array element count."""
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
    for attempt, message in (("8.0", "of the attempt before"), ("8.1", "of this one")):
        folder = tmp_path / "run" / "attempts" / attempt
        folder.mkdir(parents=True)
        (folder / "rank-00.json").write_text(
            json.dumps({"code": 1, "message": message, "host": "n1"})
        )
    runs = tmp_path / "runs.json"
    logs = tmp_path / "50%jobs"
    logs.mkdir()
    (logs / "8.1").write_text("no such file\n")
    about = {
        "run": str(tmp_path / "run"),
        "log": str(logs / "%j.%t"),
        "ranks": 2,
        "max_retries": 3,
        "requeue_after_fault": True,
    }
    runs.write_text(json.dumps([{**about, "run": "other"}, about]))
    assert main([str(runs), "1", "1", "RUNNING"]) == 0
    output = capsys.readouterr().out
    assert "of this one" in output
    assert f"{logs / '8.1'} ends with: no such file" in output
    assert main([str(runs), "1", "0", "RUNNING"]) == DO_NOT_REQUEUE


# -- the batch script --------------------------------------------------------------------------------------------
def test_nodes_follow_from_ranks():
    config = ClusterConfig(gpus_per_node=8)
    assert [config.nodes(ranks) for ranks in (1, 8, 16)] == [(1, 1), (1, 8), (2, 8)]
    assert ClusterConfig(ranks_per_node=2).nodes(4) == (2, 2)
    assert ClusterConfig().nodes(2) == (2, 1)
    with pytest.raises(Exception, match="parallel.ranks=8 or 16"):
        config.nodes(12)


def written(marker: Path, tmp_path: Path, **keys) -> str:
    config = ClusterConfig(scheduler=Scheduler.slurm, **keys)
    run = PlannedRun(tmp_path / "run", [], TrainConfig())
    return script(JobArray([run], config, 2, 4, tmp_path / "folder", "evspan-x"))


def test_values_cannot_inject(tmp_path, monkeypatch):
    """The script runs, with an srun of ours: values arrive unchanged, and are not executed."""
    monkeypatch.setattr(watchdog, "DECISION_PAUSE_S", 0)  # no Python has such a name
    marker = tmp_path / "injected"
    values = {f"V{i}": text.format(marker=marker) for i, text in enumerate(HOSTILE)}
    one_line = [text.format(marker=marker) for text in HOSTILE if "\n" not in text]
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    (bin_ / "srun").write_text('#!/bin/sh\nenv -0 > "$OUTPUT"\nexit 0\n')
    (bin_ / "scontrol").write_text("#!/bin/sh\necho JobState=RUNNING\n")
    for program in ("srun", "scontrol"):
        (bin_ / program).chmod(0o755)
    for value in one_line:
        text = written(
            marker,
            tmp_path,
            environment=[f"{k}={v}" for k, v in values.items()],
            partition=re.sub(r"[\s,]+", "_", value),  # of a list
            account=value,
            constraint=value,
            qos=value,
            sbatch_args=[f"mail-user={value}"],
            python=value,
        )
        output = tmp_path / "environment"
        environment = {
            "PATH": f"{bin_}:{os.environ['PATH']}",
            "OUTPUT": str(output),
            "SLURM_JOB_ID": "1",
        }
        subprocess.run(
            ["bash"], input=text, text=True, env=environment, timeout=120, capture_output=True
        )
        got = dict(entry.split("=", 1) for entry in output.read_text().split("\0") if "=" in entry)
        assert {key: got[key] for key in values} == values
        assert not marker.exists()
        header = [line for line in text.splitlines() if line.startswith("#SBATCH")]
        assert sum("--partition=" in line for line in header) == 1


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"partition": "a\n#SBATCH --uid=0"}, "cluster.partition"),
        ({"sbatch_args": ["x\ny=1"]}, "cluster.sbatch_args"),
        ({"sbatch_args": ["mail-user=a\nb"]}, "cluster.sbatch_args"),
        ({"environment": ["A B=1"]}, "cluster.environment"),
        ({"image": "x.sif"}, "container=apptainer"),
        ({"timeout_min": 1, "signal_delay_s": 60}, "lower signal_delay_s"),
        ({"gpus_per_node": 2, "ranks_per_node": 4}, "each rank needs one"),
        ({"max_retries": 0}, "1 or more"),
    ],
)
def test_what_no_quoting_can_correct_is_refused(keys, message):
    with pytest.raises(Exception, match=message):
        ClusterConfig(**keys)


def test_the_script_has_the_values_of_the_config(tmp_path):
    text = written(
        tmp_path,
        tmp_path,
        partition="gpu",
        gpus_per_node=4,
        cpus_per_task=6,
        mem_gb=60,
        timeout_min=720,
        signal_delay_s=90,
        setup=["module load cuda"],
        sbatch_args=["mail-type=END", "exclusive"],
    )
    for line in (
        "--partition=gpu",
        "--gpus-per-node=4",
        "--cpus-per-task=6",
        "--mem=61440MB",
        "--time=720",
        "--nodes=2",
        "--ntasks-per-node=4",
        "--signal=USR2@90",
        "--requeue",
        "--mail-type=END",
        "--exclusive",
    ):
        assert f"#SBATCH {line}" in text
    # srun passes the environment of the script, which `setup` may change.
    order = ("export SLURM_EXPORT_ENV=ALL", "module load cuda", "srun")
    assert sorted(order, key=text.index) == list(order)
    assert "--cpus-per-task=6" in next(
        line for line in text.splitlines() if line.startswith("srun")
    )
    subprocess.run(["bash", "-n"], input=text, text=True, check=True, timeout=120)


@pytest.mark.parametrize(
    ("container", "image"),
    [(Container.apptainer, "my image.sif"), (Container.pyxis, "my image.sqsh")],
)
def test_a_container_is_one_key(tmp_path, container, image):
    text = written(
        tmp_path, tmp_path, container=container, image=image, mounts=["/data:/in"], gpus_per_node=4
    )
    subprocess.run(["bash", "-n"], input=text, text=True, check=True, timeout=120)
    run = tmp_path / "run"
    ranks = next(line for line in text.splitlines() if line.startswith("srun"))
    if container is Container.apptainer:
        assert "apptainer exec --nv" in ranks
        assert "--bind /data:/in" in ranks
        assert "'my image.sif' python -u -m evspan.launch.slurm.submitted_task" in ranks
        assert f"--bind {run}" in ranks
    else:
        assert f"'--container-image={Path.cwd() / 'my image.sqsh'}'" in ranks
        assert f"{run}:{run},/data:/in" in ranks
        # The requeue command runs inside, too, also next to the ranks.
        assert "should_requeue() { srun --overlap --ntasks=1 --nodes=1 '--container-im" in text


def fake_slurm(folder: Path, srun: str, end: str, state: str) -> dict[str, str]:
    """Programs for a batch script: the environment with them. end: a shell word, the job's end."""
    folder.mkdir()
    (folder / "srun").write_text(f"#!/bin/bash\n{srun}\n")
    (folder / "scontrol").write_text(
        f"""#!/bin/bash
case $1 in
    show) echo "JobId=7 JobName=x JobState={state} Reason=None EndTime={end} PreemptTime=None" ;;
    requeue)
        if [[ -e {folder}/away ]]; then rm {folder}/away; exit 1; fi
        echo "$2" >> {folder}/requeued
        if [[ -e {folder}/pid ]]; then kill "$(cat {folder}/pid)"; fi
        exit 0
        ;;
esac
"""
    )
    for program in ("srun", "scontrol"):
        (folder / program).chmod(0o755)
    return {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "SLURM_JOB_ID": "7",
        "SLURM_ARRAY_JOB_ID": "6",
        "SLURM_ARRAY_TASK_ID": "0",
        "START": str(int(time.time())),
    }


# Ranks that hang, whatever Python is doing. Bash itself waits, so that a signal ends it at once.
HANGS = """
echo $EVSPAN_JOB_END > {folder}/end
mkfifo {folder}/never
echo $$ > {folder}/pid
read -rt 60 <> {folder}/never
touch {folder}/finished
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("srun", "end", "state", "requeued", "code"),
    [
        (HANGS, "$((START + 4))", "RUNNING", True, 143),
        # An administrator has changed the limit.
        (HANGS, "$((START + 600 - 200 * ($(date +%s) - START)))", "RUNNING", True, 143),
        (HANGS, "$(date -d @$((START + 4)) +%Y-%m-%dT%H:%M:%S)", "RUNNING", True, 143),
        ("sleep 3; exit 2", "$((START + 1))", "COMPLETING", False, 2),
        ("sleep 3; exit 0", "Unknown", "RUNNING", False, 0),
        ("exit 75", "$((START + 999))", "RUNNING", True, 75),
    ],
)
def test_the_watchdog(tmp_path, srun, end, state, requeued, code):
    """In the real script, with SLURM's programs replaced."""
    run = PlannedRun(tmp_path / "run", [], TrainConfig())
    cluster = ClusterConfig(scheduler=Scheduler.slurm, signal_delay_s=4, setup=["set -eu"])
    array = JobArray([run], cluster, 1, 1, tmp_path / "scripts", "evspan-x")
    array.folder.mkdir()
    text = script(array).replace("poll=60", "poll=1")
    (array.folder / "runs.json").write_text(json.dumps([asdict(rule(tmp_path / "run"))]))
    programs = tmp_path / "bin"
    environment = fake_slurm(programs, srun.format(folder=programs), end, state)
    # The timeout: it does not wait for a watchdog that waits for the end of the job.
    result = subprocess.run(
        ["bash", "-s"], input=text, text=True, env=environment, timeout=120, capture_output=True
    )
    assert result.returncode == code, result.stderr
    assert not (programs / "finished").exists(), "it waited for the ranks"
    assert (programs / "requeued").exists() is requeued, result.stdout + result.stderr
    if requeued:
        assert (programs / "requeued").read_text() == "6_0\n" * (1 + (code == 143))
    if code == 143:
        assert read(tmp_path / "run")[-1]["reason"] == "time limit reached while starting"
        assert (programs / "end").read_text().strip().isdecimal()


@pytest.mark.parametrize(("state_after", "requeues"), [("RUNNING", 1), ("COMPLETING", 0)])
def test_a_requeue_that_slurm_does_not_answer_is_tried_again(
    tmp_path, monkeypatch, state_after, requeues
):
    """Unless the job has been cancelled since."""
    programs = tmp_path / "bin"
    environment = fake_slurm(programs, "", "Unknown", f"$(cat {programs}/state)")
    (programs / "away").touch()
    (programs / "state").write_text("RUNNING")
    monkeypatch.setattr(watchdog, "REQUEUE_PAUSE_S", 0)
    change = f"should_requeue() {{ echo {state_after} > {programs}/state; }}"
    setup = watchdog_lines("true", DO_NOT_REQUEUE, 4)
    lines = [line for line in setup if line not in ("watch_time_limit &", "disown")]
    text = "\n".join(["sleep 9 &", *lines, change, "(exit 75)", *end_lines(DO_NOT_REQUEUE)])
    result = subprocess.run(
        ["bash", "-s"], input=text, text=True, env=environment, timeout=120, capture_output=True
    )
    assert result.returncode == 75, result.stderr
    assert not (programs / "away").exists()
    assert (programs / "requeued").exists() is bool(requeues), result.stderr


@pytest.mark.parametrize(
    ("decisions", "code", "state", "requeues"),
    [
        ("1 0", 69, "RUNNING", True),
        ("1 3", 69, "RUNNING", False),
        ("1", 75, "RUNNING", True),  # the ranks have saved
        ("1", 75, "PREEMPTED", True),
        ("1", 75, "CANCELLED", False),
        ("1", 69, "RUNNING", False),
        ("3", 75, "RUNNING", False),
    ],
)
def test_a_decision_that_fails_is_repeated(tmp_path, monkeypatch, decisions, code, state, requeues):
    """The command exits with these codes, one after the other, the last one for ever."""
    programs = tmp_path / "bin"
    environment = fake_slurm(programs, "", "Unknown", state)
    monkeypatch.setattr(watchdog, "DECISION_PAUSE_S", 0)
    decide_so = f"""
should_requeue() {{
    local left=($(cat {programs}/decisions))
    echo "${{left[@]:1}}" > {programs}/decisions
    if ((${{#left[@]}} == 1)); then echo "${{left[0]}}" > {programs}/decisions; fi
    return "${{left[0]}}"
}}"""
    (programs / "decisions").write_text(decisions)
    setup = watchdog_lines("true", DO_NOT_REQUEUE, 4)
    lines = [line for line in setup if line not in ("watch_time_limit &", "disown")]
    script_end = [f"(exit {code})", *end_lines(DO_NOT_REQUEUE)]
    text = "\n".join(["sleep 9 &", *lines, decide_so, *script_end])
    result = subprocess.run(
        ["bash", "-s"], input=text, text=True, env=environment, timeout=120, capture_output=True
    )
    assert result.returncode == code, result.stderr
    assert (programs / "requeued").exists() is requeues, result.stderr


@pytest.mark.parametrize(
    ("number", "left", "early"),
    [
        (signal.SIGUSR2, 50, 30),  # a job of a minute
        (signal.SIGUSR2, 20, 0),
        (signal.SIGUSR2, -5, 0),  # the limit was changed
        (signal.SIGUSR2, 3000, 0),  # a preemption
        (signal.SIGTERM, 50, 0),
    ],
)
def test_a_signal_that_slurm_sends_early(number, left, early):
    env = {"EVSPAN_JOB_END": str(int(time.time()) + left), "EVSPAN_SIGNAL_DELAY_S": "20"}
    assert early - 2 < seconds_early(number, env) <= early or early == seconds_early(number, env)
    assert seconds_early(number, {"EVSPAN_JOB_END": "Unknown"}) == 0


def test_the_watchdog_leaves_the_ranks_time_to_save():
    delays = (1, 2, 4, 10, 20, 60, 120, 600)
    assert [lead_s(delay) for delay in delays] == [1, 1, 2, 5, 5, 15, 30, 30]


def test_a_job_name_is_valid_for_slurm():
    assert job_name(Path("runs/my run; $(x)")) == "evspan-my-run-x-"


# -- arguments of the command ------------------------------------------------------------------------------------
def test_combinations_and_quoting(tmp_path, shards):
    argv = ["a=1,2", "--config-dir", str(tmp_path), "b='x,y'", "c=3"]
    expansion = expand_sweep(argv)
    assert config_dir_options(argv) == ["--config-dir", str(tmp_path)]
    assert expansion.swept_keys == ["a"]
    assert expansion.combinations == [["a=1", "b='x,y'", "c=3"], ["a=2", "b='x,y'", "c=3"]]
    name = tmp_path / "it's a, folder=(1)"
    overrides = replace_override(tiny(shards, tmp_path / "x"), "run_dir", str(name))
    config = compose(TrainConfig, overrides)
    assert config.run_dir == str(name)


def test_a_config_folder_of_the_user(tmp_path, shards):
    (tmp_path / "cluster").mkdir()
    (tmp_path / "cluster" / "mine.yaml").write_text(
        "scheduler: slurm\npartition: fast\nranks_per_node: 2\n"
    )
    overrides = tiny(shards, tmp_path, "cluster=mine", "parallel.ranks=2")
    config = compose(TrainConfig, ["--config-dir", str(tmp_path), *overrides])
    assert config.cluster.partition == "fast"
    assert config.cluster.nodes(2) == (1, 2)


def test_the_same_overrides_keep_their_folder():
    table = []
    assert assign_folders(table, [["a=1"], ["a=2"]]) == ["0", "1"]
    assert assign_folders(table, [["a=2"], ["a=3"], ["a=1"]]) == ["1", "2", "0"]
    assert [row["overrides"] for row in table] == [["a=1"], ["a=2"], ["a=3"]]


@pytest.mark.parametrize(
    ("command", "more", "message"),
    [
        (submit.main, ["optimizer.lr=1e-3,2e-3"], "evspan sweep"),
        (submit.main, ["cluster.partiton=x"], "cluster.partition"),
        (submit.main, ["cluster=nowhere"], "gpu_nodes"),
        (submit.main, ["--partition=x"], "no option"),
        (submit.main, ["--cfg", "job"], "cluster.dry_run=true"),
        (submit.main, ["parallel.ranks=3", "cluster.ranks_per_node=2"], "parallel.ranks=2 or 4"),
        (sweep.main, ["optimizer.lr=a,b"], "none of the 2 runs"),
    ],
)
def test_mistakes_end_in_one_line(tmp_path, shards, capsys, command, more, message):
    words = tiny(shards, tmp_path / "run", "training.batch_size=6", *more)
    assert message in refused_by(command, capsys, *words)
    assert not (tmp_path / "run").exists()


# -- on this machine ---------------------------------------------------------------------------------------------
def evspan(*words: str, timeout: int = 150) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "evspan.launch", *words],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=timeout,
    )


@pytest.mark.timeout(300)
def test_a_sweep_on_this_machine(tmp_path, shards):
    """A wrong value fails its run alone; the same again does only what is not done."""
    words = [
        "sweep",
        *tiny(shards, tmp_path / "sweep", "cluster=local", "seed=1", "optimizer.lr=1e-3,-1"),
    ]
    done = evspan(*words)
    assert done.returncode == 1, done.stderr
    assert [e["event"] for e in read(tmp_path / "sweep" / "0")][-1] == "done"
    failed = read(tmp_path / "sweep" / "1")[-1]
    assert failed["event"] == "failed"
    assert "optimizer.lr" in failed["message"]
    stamp = (tmp_path / "sweep" / "0" / "checkpoints" / "latest").stat().st_mtime_ns
    assert "done already" in evspan(*words).stdout
    assert (tmp_path / "sweep" / "0" / "checkpoints" / "latest").stat().st_mtime_ns == stamp


def test_repeating_a_sweep_leaves_the_states_of_its_runs(tmp_path, shards):
    """Run 1 trains or is done, and its dataset cannot be opened where the command is repeated."""
    sweep = tmp_path / "sweep"
    words = tiny(Path(f"{shards},{tmp_path / 'gone'}"), sweep)
    settings = SweepSettings(sweep, compose(TrainConfig, []).cluster)
    expansion = expand_sweep(words)
    first = plan_sweep(expansion, [], settings)
    assert [row["error"] is None for row in first.table] == [True, False]
    record_plan(first)
    assert [event["event"] for event in read(sweep / "1")] == ["failed"]
    append(sweep / "1", "start", step=0)
    append(sweep / "1", "done", step=1)
    again = plan_sweep(expansion, [], settings)
    assert [*again.refused] == [sweep / "1"]
    assert [row["error"] for row in again.table] == [None, None]
    record_plan(again)
    assert read(sweep / "1")[-1]["event"] == "done"


@pytest.mark.timeout(300)
def test_flags_of_hydras_launcher_are_bare_names():
    parameters = {"exclusive": True, "mail_type": "END", "contiguous": False, "comment": None}
    overrides = cluster_overrides({"additional_parameters": parameters})
    cluster = compose(TrainConfig, ["cluster=slurm", *overrides]).cluster
    assert cluster.sbatch_args == ["exclusive", "mail-type=END"]


def test_hydras_multirun_gives_each_run_a_folder(tmp_path, shards):
    words = [
        "train",
        "--multirun",
        *tiny(shards, tmp_path / "many", "training.max_steps=1", "seed=1,2"),
    ]
    done = evspan(*words)
    assert done.returncode == 0, done.stderr
    seeds = [json.loads((tmp_path / "many" / n / "config.json").read_text())["seed"] for n in "01"]
    assert seeds == [1, 2]
