"""Jobs that continue a run or wait for others, without SLURM: decisions, records and scripts."""

import json
import os
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from evspan.conf.compose import CONFIG_FILE, save_config
from evspan.conf.errors import USER_ERROR_EXIT_CODE, UserError
from evspan.conf.schema.cluster import ClusterConfig, CodeSource, Container, Scheduler
from evspan.conf.schema.training import EvaluateConfig, TrainConfig
from evspan.launch.cli import submit
from evspan.launch.cli.grammar import correct
from evspan.launch.cli.main import options_of
from evspan.launch.cli.submit import after_overrides
from evspan.launch.hang import hang_lines
from evspan.launch.search.files import SearchInfo, write_info
from evspan.launch.slurm import client, submit_runs, watchdog
from evspan.launch.slurm.chain import Upstream, check, read_upstream, record, submission
from evspan.launch.slurm.client import Queued
from evspan.launch.slurm.command_job import (
    CommandJob,
    evaluation_mounts,
    requeue_lines,
    submit_command_job,
)
from evspan.launch.slurm.rank_task import RankNote, notes_folder, write_note
from evspan.launch.slurm.requeue import (
    DO_NOT_REQUEUE,
    RUN_HAS_ENDED,
    RequeueRule,
    has_ended,
    main,
)
from evspan.launch.slurm.sbatch import JobArray, script
from evspan.launch.slurm.smoke_run import smoke_run
from evspan.launch.slurm.successor import (
    END,
    REFUSED,
    SUCCESSOR,
    WAIT,
    WAITING,
    WORK_WITH_SUCCESSOR,
)
from evspan.launch.sweep import fail_fast, registry
from evspan.launch.sweep.cancel import cancel_runs, describe_cancellation
from evspan.launch.sweep.chain_status import chain_rows
from evspan.launch.sweep.code_changes import code_notes
from evspan.launch.sweep.plan import PlannedRun
from evspan.launch.sweep.registry import read_chain
from evspan.launch.sweep.state import State
from evspan.pipeline.history import append, read


def submitted_run(folder: Path, job: str, *ends: str, **values) -> Path:
    """A folder as after a submission. ends: events that follow."""
    folder.mkdir(parents=True)
    content = {"job": job, "time": 1.0, **values}
    (folder / "submitted.json").write_text(json.dumps(content))
    append(folder, "submitted", job=job)
    for event in ends:
        append(folder, event, step=0, job=job)
    return folder


def rule_of(run: Path, **values) -> RequeueRule:
    return RequeueRule(str(run), "%j.%t", 1, 3, requeue_after_fault=True, **values)


@pytest.fixture
def queue(monkeypatch):
    """SLURM's queue as a dictionary that a test fills: id -> state."""
    states: dict[str, str] = {}

    def tasks(jobs):
        return {id_: Queued(id_, state, "(Dependency)", "") for id_, state in states.items()}, ""

    monkeypatch.setattr(registry, "_read_queue", tasks)
    return states


# -- what a job does when it starts ----------------------------------------------------------------
def test_a_successor_takes_the_run_over(tmp_path):
    run = submitted_run(tmp_path / "run", "7", "start", "saved", "requeued", successor="8")
    rule = rule_of(run, successor=True)
    assert check(rule, "8", SUCCESSOR) == WORK_WITH_SUCCESSOR
    assert submission(run)["job"] == "8"
    assert submission(run)["successor"] == ""
    assert read(run)[-1]["event"] == "continued"
    record(rule, SUCCESSOR, "8", "9")
    assert submission(run)["successor"] == "9"
    # SLURM itself may start a job again: it has a successor.
    assert check(rule, "8", SUCCESSOR) == 0
    # The job before it must not come back.
    assert check(rule, "7", "first") == END
    record(rule, SUCCESSOR, "8")
    assert "submit it again" in read(run)[-1]["message"]


@pytest.mark.parametrize("end", ["done", "failed", "cancelled", "pruned"])
def test_a_successor_of_a_run_that_has_ended_does_nothing(tmp_path, end):
    run = submitted_run(tmp_path / "run", "7", "start", end, successor="8")
    assert check(rule_of(run, successor=True), "8", SUCCESSOR) == END
    assert submission(run)["job"] == "7"
    assert has_ended(run)
    append(run, "submitted", job="9")
    assert not has_ended(run)


def test_a_job_waits_until_what_it_follows_is_done(tmp_path, queue, capsys):
    first = submitted_run(tmp_path / "first", "5_1", "start", successor="6_1")
    run = submitted_run(tmp_path / "run", "7", after=[str(first)])
    rule = rule_of(run, after=[str(first)])
    queue.update({"5_1": "PREEMPTED", "6_1": "RUNNING"})
    assert check(rule, "7", "first") == WAIT
    assert capsys.readouterr().out == "afterany:5_1:6_1\n"
    record(rule, WAITING, "7", "8")
    assert submission(run)["job"] == "8"
    (first / "submitted.json").write_text(json.dumps({"job": "6_1", "time": 1.0}))
    append(first, "done", step=9)
    assert check(rule, "8", WAITING) == 0


def test_a_job_does_not_wait_for_ever(tmp_path, queue):
    """SLURM has started it, although the job that it waits for is still there."""
    first = submitted_run(tmp_path / "first", "5", "start")
    run = submitted_run(tmp_path / "run", "7")
    rule = rule_of(run, after=[str(first)])
    queue["5"] = "RUNNING"
    assert [check(rule, "7", "first"), check(rule, "7", "first")] == [WAIT, REFUSED]
    assert "not done after the end" in read(run)[-1]["reason"]


def test_a_run_without_a_job_cannot_be_waited_for(tmp_path, queue):
    """One that trains on this machine, and one of a sweep whose submission was refused."""
    local = tmp_path / "local"
    append(local, "start", step=0, pid=os.getpid())
    for any_end in (False, True):
        upstream = read_upstream([local], tmp_path / "own", any_end=any_end)
        assert re.fullmatch(f"{local} is running .*, but not as a job of SLURM", upstream.problem)
    append(local, "done", step=9)
    assert read_upstream([local], tmp_path / "own") == Upstream([])

    sweep = tmp_path / "sweep"
    submitted_run(sweep / "0", "5", "start", "done")
    (sweep / "1").mkdir()
    rows = [{"folder": name, "overrides": {}} for name in "01"]
    (sweep / "sweep.json").write_text(json.dumps({"runs": rows}))
    problem = read_upstream([sweep], tmp_path / "own").problem
    assert problem == f"{sweep / '1'} is unknown (not submitted)"
    assert not read_upstream([sweep], tmp_path / "own", any_end=True).problem
    # The controller of a search will submit it.
    write_info(sweep, SearchInfo("ab12", "ap", True, 2, "tpe", "asha", 100, 3, job="9"))
    assert read_upstream([sweep], tmp_path / "own") == Upstream(["9"])


@pytest.mark.parametrize("end", ["failed", "cancelled"])
def test_a_job_is_not_started_after_a_failure(tmp_path, queue, end):
    first = submitted_run(tmp_path / "first", "5", "start", end)
    run = submitted_run(tmp_path / "run", "7")
    assert check(rule_of(run, after=[str(first)]), "7", "first") == REFUSED
    last = read(run)[-1]
    assert last["event"] == "cancelled"
    assert f"first is {end}" in last["reason"]
    (row,) = read_chain(run).runs
    assert row.state is State.cancelled
    assert f"first is {end}" in row.reason
    assert not read_upstream([first], run, any_end=True).problem


def test_what_a_report_waits_for(tmp_path, queue):
    """All that was submitted for the folder before it; not what was submitted later."""
    run = submitted_run(tmp_path / "run", "5", "start", "done")
    submitted_run(run / ".jobs" / "evaluate-val", "6")
    report = submitted_run(run / ".jobs" / "report", "7")
    (report / "submitted.json").write_text(json.dumps({"job": "7", "time": 2.0}))
    queue.update({"6": "PENDING", "7": "PENDING"})
    assert read_upstream([run], report, any_end=True).jobs == ["6"]
    assert read_upstream([run], run / ".jobs" / "evaluate-val").jobs == []


@pytest.mark.parametrize("value", [None, "x", [], {}])
def test_a_damaged_submission_is_read(tmp_path, queue, value):
    run = submitted_run(tmp_path / "run", "5", time=value, code={"folder": "a\0b"})
    report = submitted_run(run / ".jobs" / "report", "6", time=value)
    queue.update({"5": "PENDING", "6": "PENDING"})
    assert read_upstream([run], report, any_end=True).jobs == ["5"]
    assert read_upstream([run], tmp_path / "other").jobs == ["5", "6"]
    assert code_notes(read_chain(run).runs) == []


def test_a_report_is_made_where_a_run_was_lost(tmp_path, queue):
    run = submitted_run(tmp_path / "run", "5", "start")
    report = tmp_path / "run" / ".jobs" / "report"
    assert "is lost" in read_upstream([run], report).problem
    assert read_upstream([run], report, any_end=True).problem == ""


def test_a_pruned_run_of_a_search_is_complete(tmp_path, queue):
    for name, end in (("0", "pruned"), ("1", "done")):
        submitted_run(tmp_path / "sweep" / name, name, "start", end)
    assert read_upstream([tmp_path / "sweep"], tmp_path / "run").problem == ""


def test_a_search_is_waited_for_until_its_controller_has_ended(tmp_path, queue):
    """Trials that it starts later are waited for, too."""
    sweep = tmp_path / "sweep"
    sweep.mkdir()
    search = SearchInfo("ab12", "ap", True, 2, "tpe", "asha", 100, 3, job="40")
    write_info(sweep, search)
    run = submitted_run(tmp_path / "run", "7", after=[str(sweep)])
    rule = rule_of(run, after=[str(sweep)])
    assert read_upstream([sweep], run) == Upstream(["40"])
    submitted_run(sweep / "0", "41", "start", "pruned")
    submitted_run(sweep / "1", "42", "start")
    queue["42"] = "RUNNING"
    assert check(rule, "7", "first") == WAIT
    assert submission(run)["waited_for"] == "afterany:40:42"
    write_info(sweep, replace(search, job=""))
    append(sweep / "1", "done", step=0, job="42")
    assert check(rule, "7", "first") == 0


def test_a_report_does_not_wait_twice_for_the_same_job(tmp_path, queue):
    sweep = tmp_path / "sweep"
    submitted_run(sweep / "0", "41", "start", "done")
    write_info(sweep, SearchInfo("ab12", "ap", True, 2, "tpe", "asha", 100, 3, job="40"))
    report = submitted_run(sweep / ".jobs" / "report", "50", after=[str(sweep)])
    rule = rule_of(report, after=[str(sweep)], any_end=True)
    assert check(rule, "50", "first") == WAIT
    assert check(rule, "50", "first") == 0  # the controller was killed for good


def test_the_ranks_of_a_run_that_waits_are_not_asked_what_they_do(tmp_path, queue):
    run = submitted_run(tmp_path / "run", "5")
    queue["5"] = "PENDING"
    with pytest.raises(UserError, match="no reports of its ranks.* it is waiting"):
        list(hang_lines(run))
    assert not (run / "hang").exists()


def test_the_folder_of_shards_counts_as_prepared(tmp_path, queue):
    shards = tmp_path / "shards"
    shards.mkdir()
    assert "no folder of prepared shards" in read_upstream([shards], tmp_path).problem
    (shards / "manifest.json").write_text("{}")
    assert read_upstream([shards], tmp_path).problem == ""
    submitted_run(shards / ".jobs" / "prep", "3")
    queue["3"] = "RUNNING"
    assert read_upstream([shards], tmp_path).dependency == "afterany:3"


def test_status_shows_the_chain_in_its_order(tmp_path, queue):
    shards = tmp_path / "shards"
    submitted_run(shards / ".jobs" / "prep", "3", "start", "done")
    run = submitted_run(tmp_path / "run", "4", "start", after=[str(shards)], successor="6")
    submitted_run(run / ".jobs" / "evaluate-val", "5", after=[str(run)])
    queue.update({"4": "CANCELLED", "6": "PENDING", "5": "PENDING"})
    runs = read_chain(run).runs
    rows = chain_rows(run, runs)
    assert [row[1] for row in rows[1:]] == ["done", "requeued", "waiting"]
    assert [row[3] for row in rows[1:]] == ["3", "4", "5"]
    assert runs[0].alive
    assert runs[0].successor == "6"


# -- the end of a job ------------------------------------------------------------------------------
def end_of(tmp_path, monkeypatch, rule: RequeueRule, code: str) -> int:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    rules = tmp_path / "runs.json"
    rules.write_text(json.dumps([rule.__dict__]))
    return main([str(rules), "0", code, "RUNNING", "None", "900"])


def test_the_successor_is_not_needed_after_the_end_of_a_run(tmp_path, monkeypatch, capsys):
    run = submitted_run(tmp_path / "run", "7", "start")
    rule = rule_of(run, successor=True)
    assert end_of(tmp_path, monkeypatch, rule, "75") == 0
    assert "its successor continues" in capsys.readouterr().out
    append(run, "start", step=0)
    append(run, "done", step=0)
    assert end_of(tmp_path, monkeypatch, rule, "0") == RUN_HAS_ENDED


def test_a_sweep_that_ends_with_its_first_runs_ends_their_successors(tmp_path, monkeypatch):
    """Each of them would start a run of the sweep when its job is cancelled."""
    runs = [submitted_run(tmp_path / "0", "7_0", "start", successor="8_0")]
    runs += [submitted_run(tmp_path / "1", "7_1", "start", successor="8_1")]
    runs += [submitted_run(tmp_path / "2", "7_2", successor="8_2")]
    runs += [submitted_run(tmp_path / "3", "7_3", successor="--user=me")]
    append(runs[0], "failed", step=0, message="no data")
    monkeypatch.setattr(fail_fast, "FIRST_RUNS", 2)
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "scancel").write_text(f'#!/bin/bash\necho "$*" >> {tmp_path}/calls\n')
    (programs / "scancel").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    rules = [{**rule_of(run, successor=True, fail_fast=True).__dict__} for run in runs]
    (tmp_path / "runs.json").write_text(json.dumps(rules))
    notes = notes_folder(runs[1], os.environ)
    notes.mkdir(parents=True)
    write_note(notes, RankNote("rank-00", USER_ERROR_EXIT_CODE, "no data", "node"))
    code = main([str(tmp_path / "runs.json"), "1", str(USER_ERROR_EXIT_CODE), "RUNNING", "None"])
    assert code == RUN_HAS_ENDED
    ids = "7_2 8_2 7_3"
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls == [f"--state=PENDING {ids}", f"--state=RUNNING {ids}"]
    assert [has_ended(run) for run in runs] == [True] * 4
    assert check(rule_of(runs[2], successor=True), "8_2", SUCCESSOR) == END


def test_a_failed_smoke_run_cancels_its_run(tmp_path, monkeypatch):
    run = submitted_run(tmp_path / "run", "8")
    smoke = submitted_run(run / "smoke", "7", "start")
    rule = rule_of(smoke, smoke_of=str(run))
    assert end_of(tmp_path, monkeypatch, rule, "75") == 0
    assert not has_ended(run)
    append(smoke, "start", step=0)
    rule = RequeueRule(str(smoke), "%j.%t", 1, 1, requeue_after_fault=False, smoke_of=str(run))
    assert end_of(tmp_path, monkeypatch, rule, "1") == DO_NOT_REQUEUE
    assert "smoke run" in read(run)[-1]["reason"]
    assert has_ended(run)
    before = read(run)
    append(smoke, "start", step=0)
    assert end_of(tmp_path, monkeypatch, rule, "1") == DO_NOT_REQUEUE
    assert read(run) == before  # as after evspan cancel, which gives no reason


def test_cancel_ends_the_smoke_run_too(tmp_path, queue, monkeypatch):
    run = submitted_run(tmp_path / "run", "8")
    submitted_run(run / "smoke", "7", "start")
    queue.update({"7": "RUNNING", "8": "PENDING"})
    cancelled = []
    monkeypatch.setattr(client, "cancel_tasks", cancelled.extend)
    lines = describe_cancellation(cancel_runs(run))
    assert cancelled == ["8", "7"]
    assert [line.split(", which")[0] for line in lines] == [
        f"{run}: cancelled SLURM job 8",
        f"{run / 'smoke'}: cancelled SLURM job 7",
    ]
    assert has_ended(run)
    assert has_ended(run / "smoke")


def test_a_smoke_run_has_the_layout_of_its_run(tmp_path):
    config = TrainConfig(run_dir=str(tmp_path / "run"))
    config.cluster = ClusterConfig(scheduler=Scheduler.slurm, successor=True, timeout_min=600)
    smoke = smoke_run(PlannedRun(tmp_path / "run", [], config))
    assert smoke.folder == tmp_path / "run" / "smoke"
    assert smoke.config.training.max_steps == 2
    assert smoke.config.parallel == config.parallel
    assert smoke.config.training.batch_size == config.training.batch_size
    assert smoke.config.cluster.timeout_min == 15
    assert not smoke.config.cluster.successor
    assert config.training.max_steps == TrainConfig().training.max_steps


# -- the batch script ------------------------------------------------------------------------------
def run_script(tmp_path: Path, text: str, code: int, *arguments: str, **variables: str) -> str:
    """Runs a batch script with programs of ours. code: of the check. Returns their calls."""
    programs = tmp_path / "bin"
    programs.mkdir()
    calls = tmp_path / "calls"
    checks = f"if [[ $5 == check ]]; then echo afterany:3; exit {code}; fi"
    checks += "\nif [[ $5 == next ]]; then echo 44; fi"
    bodies = {
        "python": f'echo "python ${{@:3}}" >> {calls}\n{checks}\n[[ $2 != *requeue ]] || exit 7',
        "sbatch": f'echo "sbatch $*; ${{SLURM_JOB_ID:-}}" >> {calls}\necho 44',
        "srun": f'echo srun >> {calls}\necho "$PATH"',
        "scancel": f'echo "scancel $*" >> {calls}',
        "scontrol": "echo JobState=RUNNING",
    }
    for name, body in bodies.items():
        (programs / name).write_text(f"#!/bin/bash\n{body}\n")
        (programs / name).chmod(0o755)
    environment = {"PATH": f"{programs}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", **variables}
    (tmp_path / "script").write_text(text)
    subprocess.run(
        ["bash", str(tmp_path / "script"), *arguments],
        env=environment,
        timeout=120,
        check=False,
        capture_output=True,
    )
    return calls.read_text()


def written(tmp_path: Path, **keys) -> str:
    config = ClusterConfig(scheduler=Scheduler.slurm, code="live", **keys)
    config.python = "python"
    run = PlannedRun(tmp_path / "run", [], TrainConfig())
    return script(JobArray([run], config, 1, 1, tmp_path / "folder", "evspan-x"))


def test_the_script_submits_its_successor_and_cancels_it_at_the_end(tmp_path):
    text = written(tmp_path, successor=True)
    assert "#SBATCH --no-requeue" in text
    assert "#SBATCH --requeue" not in text
    place = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}
    calls = run_script(tmp_path, text, WORK_WITH_SUCCESSOR, "successor", **place)
    script_file = tmp_path / "folder" / "script.sh"
    assert "check 7_3 successor" in calls
    assert f"--array=3 --dependency=afterany:7_3 {script_file} successor; \n" in calls
    assert "successor 7_3 44_3" in calls
    assert calls.index("sbatch") < calls.index("srun")
    assert calls.splitlines()[-1] == "scancel 44"


@pytest.mark.parametrize("code", [END, REFUSED, WAIT, 1, 125])  # 125: no container
def test_a_job_that_does_not_work_starts_no_ranks(tmp_path, code):
    calls = run_script(tmp_path, written(tmp_path, after=["a"]), code)
    assert "srun" not in calls
    assert ("--dependency=afterany:3" in calls) == (code == WAIT)
    assert ("waiting 7 44" in calls) == (code == WAIT)


def test_a_container_mounts_what_the_job_waits_for(tmp_path):
    """The check before the start of the ranks reads it."""
    values = {"container": Container.apptainer, "image": "evspan.sif"}
    text = written(tmp_path, after=["/scratch/shards"], **values)
    (check_line,) = [line for line in text.splitlines() if line.startswith("chain()")]
    assert "--bind /scratch/shards" in check_line


def test_a_script_without_chain_is_as_before(tmp_path):
    text = written(tmp_path)
    assert "slurm.chain" not in text
    assert "#SBATCH --requeue" in text


# -- the command -----------------------------------------------------------------------------------
def test_after_is_a_word_of_submit():
    words = ["a=1", "after=runs/a b", "after=$x"]
    assert after_overrides(words) == ["a=1", "cluster.after=['runs/a b','$x']"]
    assert after_overrides(["a=1"]) == ["a=1"]


def test_the_grammar_of_a_submitted_command_is_that_of_the_command():
    good = ["submit", "evaluate", "runs/a", "after=runs/a", "cluster.partition=cpu"]
    assert correct(good, options_of) is None
    bad = ["submit", "report", "path=sweeps/a", "after=sweeps/a"]
    correction = correct(bad, options_of)
    assert correction is not None
    assert correction.argv == ["submit", "report", "sweeps/a", "after=sweeps/a"]


def test_the_dry_run_of_a_report(tmp_path, capsys, queue):
    run = submitted_run(tmp_path / "run", "5", "start")
    queue["5"] = "RUNNING"
    words = ["report", str(run), f"after={run}", "cluster=slurm", "cluster.dry_run=true"]
    submit.main([*words, "cluster.partition=cpu"])
    text = capsys.readouterr().out
    assert "#SBATCH --dependency=afterany:5" in text
    assert "#SBATCH --partition=cpu" in text
    assert "evspan.launch.slurm.command_job" in text
    assert not (run / ".jobs").exists()
    subprocess.run(["bash", "-n"], input=text, text=True, check=True, timeout=120)


@pytest.mark.parametrize(
    ("gres", "lines"),
    [("", ["#SBATCH --gpus-per-node=1"]), ("gpu:a100:4", ["#SBATCH --gres=gpu:a100:4"])],
)
def test_gpus_of_a_submitted_command_are_requested_once(tmp_path, gres, lines):
    cluster = ClusterConfig(
        scheduler=Scheduler.slurm, dry_run=True, gpus_per_node=4, gres=gres, code="live"
    )
    text = submit_command_job(CommandJob(tmp_path / "run/.jobs/x", ["evaluate"], cluster, gpus=1))
    assert [line for line in text.splitlines() if re.search("--(gres|gpus)", line)] == lines


def test_the_container_of_an_evaluation_mounts_what_it_reads_and_writes(tmp_path):
    config = EvaluateConfig(checkpoint=str(tmp_path / "run"), output=str(tmp_path / "out/new"))
    config.dataset.root = str(tmp_path / "shards")
    (tmp_path / "out").mkdir()
    mounts = evaluation_mounts(config)
    cluster = ClusterConfig(
        scheduler=Scheduler.slurm,
        dry_run=True,
        container=Container.apptainer,
        image="image.sif",
        code="live",
    )
    job = CommandJob(tmp_path / "run/.jobs/x", ["evaluate"], cluster, mounts=mounts)
    text = submit_command_job(job)
    # The output is made in the job: what does not exist yet cannot be mounted.
    for mount in ("run", "shards", "out"):
        assert f"--bind {tmp_path / mount} " in text
    assert "out/new" not in text


def test_a_submitted_evaluation_mounts_the_dataset_of_its_run(tmp_path, capsys):
    run = submitted_run(tmp_path / "run", "5", "start", "done")
    config = TrainConfig()
    config.dataset.root = str(tmp_path / "shards")
    save_config(config, run / CONFIG_FILE)
    words = ["evaluate", str(run), "cluster=slurm", "cluster.dry_run=true", "cluster.code=live"]
    submit.main([*words, "cluster.container=apptainer", "cluster.image=image.sif"])
    assert f"--bind {tmp_path / 'shards'} " in capsys.readouterr().out


def test_the_requeue_of_a_command_that_slurm_does_not_answer_is_tried_again(tmp_path, monkeypatch):
    monkeypatch.setattr(watchdog, "REQUEUE_PAUSE_S", 0)
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$*" >> {tmp_path}/calls\n[ -e {tmp_path}/answers ]\n')
    scontrol.chmod(0o755)
    answers = f"sleep() {{ touch {tmp_path}/answers; }}"  # after the first try
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    for code, calls in ((0, 0), (1, 0), (75, 2)):
        text = "\n".join([answers, "id=7", f"code={code}", *requeue_lines()])
        subprocess.run(["bash", "-s"], input=text, text=True, env=environment, check=True)
        log = tmp_path / "calls"
        lines = log.read_text().splitlines() if log.exists() else []
        assert lines == ["requeue 7"] * calls


def test_more_runs_than_an_array_may_have_get_several(tmp_path, monkeypatch):
    monkeypatch.setattr(submit_runs, "LEAST_MAX_ARRAY_SIZE", 2)
    monkeypatch.setattr(submit_runs, "max_array_size", lambda: 3)
    runs = [PlannedRun(tmp_path / str(number), [], TrainConfig()) for number in range(7)]
    cluster = ClusterConfig(scheduler=Scheduler.slurm, code=CodeSource.live)
    arrays = submit_runs.plan_arrays(runs, cluster, tmp_path)
    assert [len(array.runs) for array in arrays] == [3, 3, 1]
    assert [run for array in arrays for run in array.runs] == runs
    assert len({array.folder for array in arrays}) == 3


def test_the_largest_array_is_read_from_slurms_config(monkeypatch):
    monkeypatch.setattr(client, "_run", lambda *command: "A = 1\nMaxArraySize            = 4001\n")
    assert client.max_array_size() == 4001
    monkeypatch.setattr(client, "_run", lambda *command: "A = 1\n")
    assert client.max_array_size() == client.LEAST_MAX_ARRAY_SIZE


def test_the_container_of_a_smoke_run_mounts_the_run_that_waits_for_it(tmp_path):
    """The decision on its end writes into that run's history."""
    run = PlannedRun(tmp_path / "run", [], TrainConfig())
    smoke = smoke_run(run)
    cluster = ClusterConfig(
        scheduler=Scheduler.slurm, container=Container.apptainer, image="image.sif"
    )
    folder = smoke.folder / ".submitit" / "1"
    array = JobArray([smoke], cluster, 1, 1, folder, "evspan-x", smoke_of=str(run.folder))
    assert f"--bind {run.folder} " in array.python().command
    alone = replace(array, smoke_of="")
    assert f"--bind {run.folder} " not in alone.python().command


def test_a_submitted_command_needs_a_cluster(tmp_path, capsys):
    run = submitted_run(tmp_path / "run", "5", "start", "done")
    with pytest.raises(SystemExit):
        submit.main(["report", str(run), "cluster=local"])
    assert "cluster=local starts no job" in capsys.readouterr().err
