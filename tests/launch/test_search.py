"""A search: ranges, the study, and a controller that is killed at every point."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
from evspan.conf.compose import compose, expand_sweep, search_space
from evspan.conf.errors import ConfigError, UserError
from evspan.conf.schema.cluster import ClusterConfig
from evspan.conf.schema.search import SearchConfig
from evspan.conf.schema.training import TrainConfig
from evspan.conf.search_space import Choices, FloatRange, IntRange
from evspan.launch.cli import cancel as cancel_command
from evspan.launch.cli import report as report_command
from evspan.launch.cli import status as status_command
from evspan.launch.cli import sweep, train
from evspan.launch.search import controller as controllers
from evspan.launch.search import run as search_run
from evspan.launch.search import slurm_trials, values
from evspan.launch.search.controller import Controller
from evspan.launch.search.files import new_info, read_info, write_info
from evspan.launch.search.job import controller_script
from evspan.launch.search.run import SearchPlan, check_class
from evspan.launch.search.study import JOURNAL, SearchStudy, importance
from evspan.launch.search.trial_runs import Observation
from evspan.launch.search.values import metric_values
from evspan.launch.slurm.client import Queued
from evspan.launch.sweep import registry
from evspan.launch.sweep.fail_fast import EndedRun, error_of_sweep, same_error
from evspan.launch.sweep.plan import PlannedRun
from evspan.launch.sweep.registry import starts_runs
from evspan.launch.sweep.report.summary import write_report
from evspan.launch.sweep.state import State
from evspan.pipeline.history import append, read, read_progress
from evspan.pipeline.metrics_log import EVALUATION, MetricsLog, read_metrics
from evspan.pipeline.run_lock import RunLock
from support.search_runs import search_words, study_of

RANGES = ["optimizer.lr=tag(log,interval(1e-5,1e-2))", "size=micro,tiny"]


# -- ranges --------------------------------------------------------------------------------------
def test_ranges_are_read_in_hydras_grammar():
    space = search_space(
        [
            *RANGES,
            "optimizer.weight_decay=interval(0,0.1)",
            "training.bptt_frames=int(interval(2,8))",
            "training.gradient_accumulation_steps=tag(log,int(interval(1,64)))",
            "training.sequence_length=range(4,17,4)",
            "seed=choice(1,2)",
            "run_dir=sweeps/a",
        ]
    )
    assert space.fixed == ("run_dir=sweeps/a",)
    assert dict(space.ranges) == {
        "optimizer.lr": FloatRange(1e-5, 1e-2, log=True),
        "size": Choices(("micro", "tiny")),
        "optimizer.weight_decay": FloatRange(0.0, 0.1),
        "training.bptt_frames": IntRange(2, 8),
        "training.gradient_accumulation_steps": IntRange(1, 64, log=True),
        "training.sequence_length": IntRange(4, 16, step=4),
        "seed": Choices(("1", "2")),
    }
    assert space.overrides({key: getattr(r, "low", "1") for key, r in space.ranges.items()})[
        :2
    ] == ["optimizer.lr=1e-05", "size=1"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lr=interval(2,1)", "is empty"),
        ("optimizer.lr=tag(log,interval(0,1))", "ends above 0"),
        ("optimizer.lr=tag(lg,interval(1,2))", "the only one is log"),
        ("seed=tag(log,range(1,3))", "has no tag log"),
        ("size=tag(log,choice(a,b))", "which choices do not have"),
        ("size=glob(*)", "size=choice"),
    ],
)
def test_impossible_ranges_are_refused(override, message):
    with pytest.raises(ConfigError, match=message):
        search_space([override])


def test_a_grid_refuses_an_interval():
    with pytest.raises(ConfigError, match="search=optuna"):
        expand_sweep(["optimizer.lr=interval(1e-5,1e-3)"])


@pytest.mark.parametrize(
    ("main", "words", "message"),
    [
        (sweep.main, ["search=optuna"], "nothing to search"),
        (sweep.main, ["search=optuna", *RANGES, "training.evaluate_every=0"], "asha compares"),
        (sweep.main, ["search=optuna", *RANGES, "search.metric=mAP"], "choose from AP, AP50"),
        (sweep.main, ["search=optuna", *RANGES, "search.metric=loss"], "search.min_steps"),
        (
            sweep.main,
            ["search=optuna", *RANGES, "training.max_steps=10"],
            "lower training.evaluate_every",
        ),
        (sweep.main, ["search=optuna", "cluster.partition=a,b"], "cannot try"),
        (train.main, ["search=optuna"], "evspan sweep search=optuna"),
    ],
)
def test_what_cannot_be_searched_is_refused(main, words, message, capsys):
    with pytest.raises(SystemExit):
        main(words)
    assert message in capsys.readouterr().err


# -- the study -----------------------------------------------------------------------------------
def open_study(sweep_folder: Path, **settings) -> SearchStudy:
    config = SearchConfig(metric="loss", min_steps=3, startup_trials=2, **settings)
    return SearchStudy(sweep_folder, config, search_space(RANGES), 3)


def test_the_folder_of_a_search_is_not_that_of_a_grid(tmp_path, capsys):
    (tmp_path / "search.json").touch()
    with pytest.raises(SystemExit):
        sweep.main([f"run_dir={tmp_path}", "cluster=local", "seed=1,2", "cluster.after=[x]"])
    assert "is the folder of a search" in capsys.readouterr().err


def test_importance_is_of_the_last_step_that_enough_trials_reached(tmp_path):
    """Most trials of a search are pruned: it does not wait for eight that are complete."""
    space = ["optimizer.lr=interval(0,1)", "optimizer.weight_decay=interval(0,1)"]
    config = SearchConfig(metric="loss", min_steps=3, sampler="random")
    study = SearchStudy(tmp_path, config, search_space(space), 3)
    for number in range(24):
        trial = study.draw(study.create())
        rate = float(trial.overrides[0].partition("=")[2])
        for step in (3, 6, 9)[: 3 if number < 3 else 2]:
            study.report(trial, step, 10 * rate + step)
        study.pruned(trial)
    computed = importance(tmp_path)
    assert computed is not None
    assert (computed.step, computed.trials) == (6, 24)
    assert [*computed.by_key] == ["optimizer.lr", "optimizer.weight_decay"]
    assert computed.by_key["optimizer.lr"] > 0.8
    (tmp_path / JOURNAL).write_text('{"op_code": 3}\n[]\n')
    assert importance(tmp_path) is None


def test_an_interrupted_trial_gets_the_values_that_it_would_have_got(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    study = open_study(tmp_path / "one")
    expected = [study.draw(study.create()).overrides for _ in range(4)]
    assert len(set(expected)) == 4
    values = []
    for _ in range(4):
        trial = open_study(tmp_path / "two").create()  # killed before it has values
        values.append(open_study(tmp_path / "two").draw(trial).overrides)
    assert values == expected
    assert [trial.folder for trial in open_study(tmp_path / "two").running()] == list("0123")


def test_a_journal_whose_last_line_is_cut_is_read(tmp_path):
    study = open_study(tmp_path)
    expected = study.draw(study.create()).overrides
    journal = tmp_path / JOURNAL
    whole = journal.read_bytes()
    journal.write_bytes(whole[:-7])
    (tmp_path / f"{JOURNAL}.lock").symlink_to(journal)  # of the process that was killed
    trial = open_study(tmp_path).running()[0]
    assert trial.overrides == ()
    assert open_study(tmp_path).draw(trial).overrides == expected
    journal.write_text("no journal\n" * 3)
    with pytest.raises(UserError, match="cannot be read"):
        open_study(tmp_path)


def write_metrics(run: Path, records: list[dict]) -> None:
    run.mkdir(exist_ok=True)
    text = "".join(json.dumps({"time": 0.0, **record}) + "\n" for record in records)
    (run / "metrics.jsonl").write_text(text)


def test_values_come_from_the_evaluations_or_are_means_of_losses(tmp_path):
    records = [{"kind": "train", "step": s, "loss": float(s)} for s in range(1, 8)]
    records.append({"kind": "evaluation", "step": 6, "ap": 0.25, "ap50": None})
    write_metrics(tmp_path, records)
    assert metric_values(tmp_path, "ap", 3) == {6: 0.25}
    assert metric_values(tmp_path, "ap50", 3) == {}
    assert metric_values(tmp_path, "loss", 3) == {3: 2.0, 6: 5.0}


# -- the controller ------------------------------------------------------------------------------
class KilledError(BaseException):
    """Stands for SIGKILL: nothing handles it."""


class Jobs:
    """What SLURM and the runs' folders hold: it survives the controller.

    A job trains three steps each time it is observed, and saves when it is asked to stop.
    """

    def __init__(self) -> None:
        self.steps: Counter[str] = Counter()
        self.submitted: Counter[str] = Counter()
        self.states: dict[str, State] = {}
        self.cancelled: list[str] = []
        self.most_running = 99  # jobs that the site allows
        self.unanswered: Counter[str] = Counter()  # calls that SLURM will not answer

    def answer(self, call: str) -> None:
        """Raises UserError where SLURM does not answer."""
        if self.unanswered[call] > 0:
            self.unanswered[call] -= 1
            raise UserError("SLURM does not answer")


class FakeRuns:
    """Runs that a controller starts."""

    most_active = 2

    def __init__(self, jobs: Jobs, sweep_folder: Path, kill) -> None:
        self.jobs = jobs
        self.sweep = sweep_folder
        self.kill = kill

    def is_started(self, trial, run) -> bool:
        self.jobs.answer("is_started")
        return trial.submitted_at is not None and run.folder.name in self.jobs.states

    def start(self, trial, run) -> None:
        self.kill()
        name = run.folder.name
        assert self.jobs.states.get(name) is not State.running, "two jobs for a trial"
        running = [state for state in self.jobs.states.values() if state is State.running]
        if len(running) >= self.jobs.most_running:
            raise UserError("QOSMaxSubmitJobPerUserLimit")
        self.jobs.submitted[name] += 1
        self.jobs.states[name] = State.running
        self.kill()

    def observe(self, runs) -> list[Observation]:
        self.kill()
        return [self._observe(run) for run in runs]

    def _observe(self, run) -> Observation:
        name = run.folder.name
        if self.jobs.states[name] is State.running:
            self.jobs.steps[name] += 3
            quality = 1 + int(name) % 3  # of 0, 3, 6, ... the best
            records = [
                {"kind": "train", "step": s, "loss": quality / s}
                for s in range(1, self.jobs.steps[name] + 1)
            ]
            write_metrics(run.folder, records)
            if self.jobs.steps[name] == 27:
                self.jobs.states[name] = State.done
        state = self.jobs.states[name]
        return Observation(state, active=state is State.running)

    def prune(self, run, reason) -> None:
        self.jobs.answer("prune")
        self.kill()
        self.jobs.states[run.folder.name] = State.pruned
        self.kill()

    def cancel(self, runs, reason) -> None:
        self.jobs.cancelled = [run.folder.name for run in runs]

    def leave(self) -> str:
        return "alone"


def run_controller(sweep_folder: Path, jobs: Jobs, kill, trials: int = 6, **settings) -> int:
    config = SearchConfig(metric="loss", min_steps=3, startup_trials=2, trials=trials)
    space = search_space(RANGES)
    study = SearchStudy(sweep_folder, config, space, 3)
    for name in ("record_submission", "request_prune", "complete", "pruned", "draw", "report"):
        setattr(study, name, killing(getattr(study, name), kill))
    info = new_info(config, space, 3, read_info(sweep_folder))
    write_info(sweep_folder, info)

    def plan(trial) -> PlannedRun:
        kill()
        return PlannedRun(sweep_folder / trial.folder, list(trial.overrides), TrainConfig())

    options = {
        "must_stop": lambda: False,
        "continues_cancelled": True,
        "max_retries": 3,
        "fail_fast": False,
        **settings,
    }
    runs = FakeRuns(jobs, sweep_folder, kill)
    return Controller(sweep_folder, info, study, runs, plan, **options).run()


def killing(function, kill):
    def call(*args, **kwargs):
        kill()
        result = function(*args, **kwargs)
        kill()
        return result

    return call


@pytest.fixture
def without_pauses(monkeypatch):
    monkeypatch.setattr(controllers, "POLL_S", 0.0)


@pytest.mark.parametrize("every", [1, 3, 7])
def test_no_trial_is_lost_or_run_twice(every, tmp_path, without_pauses):
    """The controller is killed at its n-th action, and each that follows after `every` more than the one before."""
    jobs = Jobs()
    for life in range(500):
        actions = 0
        limit = every * (1 + life)

        def kill() -> None:
            nonlocal actions
            actions += 1
            if actions > limit:  # noqa: B023  # it is called within this life
                raise KilledError

        try:
            assert run_controller(tmp_path, jobs, kill) == 0
            break
        except KilledError:
            continue
    study = study_of(tmp_path)
    assert [trial.user_attrs["folder"] for trial in study.trials] == list("012345")
    assert set(jobs.submitted.values()) == {1}
    states = {trial.user_attrs["folder"]: trial.state.name for trial in study.trials}
    expected = {State.done: "COMPLETE", State.pruned: "PRUNED"}
    assert states == {name: expected[state] for name, state in jobs.states.items()}
    assert "PRUNED" in states.values()
    assert study.best_trial.user_attrs["folder"] in ("0", "3")
    reported = Counter()
    for line in (tmp_path / JOURNAL).read_text().splitlines():
        entry = json.loads(line)
        if "intermediate_value" in entry:
            reported[entry["trial_id"], entry["step"]] += 1
    assert max(reported.values()) == 1
    assert life > 0  # it was killed


def test_a_search_continues_with_more_trials_and_a_pruned_one_to_its_end(tmp_path, without_pauses):
    jobs = Jobs()
    run_controller(tmp_path, jobs, lambda: None)
    pruned = [name for name, state in jobs.states.items() if state is State.pruned]
    study = open_study(tmp_path)
    with pytest.raises(UserError, match="which is not pruned"):
        study.enqueue(99)
    study.enqueue(int(pruned[0]))
    study.enqueue(int(pruned[0]))  # the same command again
    run_controller(tmp_path, jobs, lambda: None, trials=8)
    assert jobs.states[pruned[0]] is State.done
    assert jobs.steps[pruned[0]] == 27
    trials = study_of(tmp_path).trials
    assert len(trials) == 9
    (continued,) = [trial for trial in trials if "continues" in trial.user_attrs]
    assert continued.state.name == "COMPLETE"
    assert continued.params == trials[int(pruned[0])].params
    assert sorted(jobs.states) == sorted({t.user_attrs["folder"] for t in trials})


def controller_of(folder: Path, words: list[str], **settings) -> Controller:
    """Of trials that are composed as in a real search."""
    space = search_space(words)
    search = SearchConfig(metric="loss", min_steps=3, trials=4)
    info = new_info(search, space, 3, None)
    write_info(folder, info)
    options = {"continues_cancelled": True, "max_retries": 3, "fail_fast": False, **settings}
    return Controller(
        folder,
        info,
        SearchStudy(folder, search, space, 3),
        FakeRuns(Jobs(), folder, lambda: None),
        SearchPlan([], space, TrainConfig(), folder).run_of,
        must_stop=lambda: False,
        **options,
    )


def test_a_trial_whose_values_cannot_work_fails(tmp_path, without_pauses, monkeypatch, capsys):
    """`status` shows why, and the search fails only if all of its trials do."""
    monkeypatch.setattr(search_run, "check_run", lambda config: None)
    assert controller_of(tmp_path, ["optimizer.schedule=linear,quadratic"]).run() == 1
    status_command.main([str(tmp_path)])
    shown = capsys.readouterr().out
    assert "4 of 4 trials have ended: 4 failed" in shown
    assert "give one of onecycle, cosine" in shown


def test_first_trials_with_the_same_error_end_a_search(tmp_path, without_pauses, monkeypatch):
    monkeypatch.setattr(search_run, "check_run", lambda config: None)
    words = ["optimizer.schedule=linear", "seed=range(1,9)"]
    with pytest.raises(UserError, match="first 3 runs failed .* is 'linear'"):
        controller_of(tmp_path, words, fail_fast=True).run()
    assert [trial.state.name for trial in study_of(tmp_path).trials] == ["FAIL"] * 3


def test_the_class_of_the_metric_is_one_of_the_dataset(shards):
    words = [f"dataset.root={shards}", "search=optuna", "model.head.num_classes=3"]
    check_class(compose(TrainConfig, [*words, "search.metric=AP"]))
    with pytest.raises(ConfigError, match="no class dog; its classes are"):
        check_class(compose(TrainConfig, [*words, "search.metric=AP_class/dog"]))


def test_runs_whose_jobs_are_lost_are_started_again(tmp_path, without_pauses):
    jobs = Jobs()
    lost = []

    def lose() -> None:
        if jobs.states.get("1") is State.running and len(lost) < 2:
            jobs.states["1"] = State.lost
            lost.append(1)

    assert run_controller(tmp_path, jobs, lose, trials=2) == 0
    assert jobs.submitted == {"0": 1, "1": 3}
    assert study_of(tmp_path).trials[1].user_attrs["retries"] == 2


def test_a_search_goes_on_within_the_number_of_jobs_that_a_site_allows(
    tmp_path, without_pauses, caplog
):
    jobs = Jobs()
    jobs.most_running = 1  # of two that the controller would start
    assert run_controller(tmp_path, jobs, lambda: None) == 0
    assert jobs.submitted == dict.fromkeys("012345", 1)
    waits = [message for message in caplog.messages if "QOSMaxSubmitJobPerUserLimit" in message]
    assert 1 <= len(waits) <= 6  # one for each trial that waits, not one for each try


def test_a_search_ends_where_no_job_is_accepted(tmp_path, without_pauses):
    jobs = Jobs()
    jobs.most_running = 0
    with pytest.raises(UserError, match="QOSMaxSubmitJobPerUserLimit"):
        run_controller(tmp_path, jobs, lambda: None)


@pytest.mark.parametrize("partition", ["", "cpu"])
def test_the_controller_requests_no_gpus_and_no_nodes_of_the_trials(tmp_path, partition):
    config = compose(
        TrainConfig,
        [
            "cluster=slurm",
            "cluster.partition=gpu",
            "cluster.account=lab",
            "cluster.gpus_per_node=4",
            "cluster.gres='gpu:a100:4,nvme:1'",
            "cluster.exclusive=true",
            "cluster.constraint=a100",
            "cluster.exclude=n07",
            "cluster.gpu_bind=closest",
            "cluster.mem_gb=400",
            "cluster.sbatch_args=[gpus=4,gpu-freq=high,tres-per-task='gres/gpu:1',comment=x]",
            f"search.partition={partition}",
        ],
    )
    info = new_info(config.search, search_space(RANGES), 1, None)
    text = controller_script(tmp_path / "sweep", config, info)
    lines = [line for line in text.splitlines() if line.startswith(("#SBATCH", "srun"))]
    assert not [line for line in lines if re.search("gres|gpu[s-]|tres|exclusive|--mem", line)]
    assert "#SBATCH --account=lab" in lines
    assert "#SBATCH --comment=x" in lines
    of_trials = {"#SBATCH --constraint=a100", "#SBATCH --exclude=n07", "#SBATCH --partition=gpu"}
    if partition:
        assert "#SBATCH --partition=cpu" in lines
        assert not of_trials & set(lines)
    else:
        assert of_trials <= set(lines)


def test_a_search_waits_while_slurm_does_not_answer(tmp_path, without_pauses):
    jobs = Jobs()

    def kill() -> None:
        if jobs.steps["0"] >= 6 and not jobs.unanswered:
            raise KilledError

    with pytest.raises(KilledError):
        run_controller(tmp_path, jobs, kill)
    jobs.unanswered.update({"is_started": 7, "prune": 7})
    assert run_controller(tmp_path, jobs, kill) == 0
    assert not jobs.unanswered.total()
    assert set(jobs.submitted.values()) == {1}


def test_a_stop_request_cancels_the_runs(tmp_path, without_pauses):
    jobs = Jobs()

    def stop() -> None:
        if jobs.steps["0"] >= 6:
            (tmp_path / "search.stop").touch()

    assert run_controller(tmp_path, jobs, stop) == 1
    running = [t.number for t in study_of(tmp_path).trials if t.state.name == "RUNNING"]
    assert 0 in running
    assert jobs.cancelled == [str(number) for number in running]


def test_a_cancelled_trial_has_no_successor(tmp_path, monkeypatch):
    """The record comes first: a successor that starts meanwhile reads it, and ends."""
    run = tmp_path / "0"
    append(run, "start", step=0, job="12")
    (run / "submitted.json").write_text(json.dumps({"job": "12", "successor": "13"}))
    queued = {
        "12": Queued("12", "RUNNING", "n1", ""),
        "13": Queued("13", "PENDING", "(Dependency)", ""),
    }
    monkeypatch.setattr(registry, "_read_queue", lambda jobs: (queued, ""))
    cancelled = []

    def cancel(jobs) -> None:
        assert read(run)[-1]["event"] == "cancelled"
        cancelled.append(jobs)

    monkeypatch.setattr(slurm_trials, "cancel_tasks", cancel)
    trials = slurm_trials.SlurmTrials(tmp_path, "1a2b", ClusterConfig())
    trials.cancel([PlannedRun(run, [], TrainConfig())], "the search was cancelled")
    assert cancelled == [["13", "12"]]


# -- the same error ------------------------------------------------------------------------------
def test_first_runs_with_the_same_error_end_a_sweep(tmp_path):
    def ended(*errors: str) -> list[EndedRun]:
        return [EndedRun(tmp_path / str(i), error) for i, error in enumerate(errors)]

    one = "rank-00 on n1: no file /data/4"
    two = "rank-03 on n2: no file /data/7"
    assert "no file /data/4" in same_error(ended(one, two, one), 8)
    assert same_error(ended(one, two), 8) == ""
    assert same_error(ended(one, two), 2)
    assert same_error(ended(one), 1) == ""
    assert same_error(ended("", one, two, one), 8) == ""
    assert same_error(ended(one, "another", one), 8) == ""
    for number in range(3):
        append(tmp_path / str(number), "start", step=0)
        append(tmp_path / str(number), "failed", step=0, message=f"{tmp_path / str(number)}: bad")
    assert "cluster.fail_fast" in error_of_sweep([tmp_path / str(n) for n in range(4)])


# -- what is shown -------------------------------------------------------------------------------
def test_status_and_report_show_the_search(tmp_path, without_pauses, capsys):
    jobs = Jobs()
    run_controller(tmp_path, jobs, lambda: None, trials=12)
    rows = []
    for trial in study_of(tmp_path).trials:
        name = trial.user_attrs["folder"]
        rows.append({"folder": name, "overrides": trial.user_attrs["overrides"], "error": None})
        append(tmp_path / name, "start", step=0, of=27)
        append(tmp_path / name, jobs.states[name].value, step=jobs.steps[name])
    (tmp_path / "sweep.json").write_text(json.dumps({"runs": rows}))
    status_command.main([str(tmp_path)])
    shown = capsys.readouterr().out
    num_pruned = sum(state is State.pruned for state in jobs.states.values())
    assert f"12 of 12 trials have ended: {12 - num_pruned} done, {num_pruned} pruned" in shown
    assert "best so far: 0, loss" in shown
    status_command.main([str(tmp_path), "--json"])
    printed = json.loads(capsys.readouterr().out)
    assert printed["search"]["best"] == "0"
    assert {run["state"] for run in printed["runs"]} == {"done", "pruned"}
    report = write_report(tmp_path, "http://localhost:6006")
    page = report.page.read_text()
    assert page.count("<polyline") == 12
    assert page.count('class="run pruned"') == num_pruned
    assert "tag" not in page.split("<svg")[1]
    assert report.search is not None
    if report.search.importance:
        assert sum(report.search.importance.values()) == pytest.approx(1)
        assert set(report.search.importance) == {"optimizer.lr", "size"}


def test_a_search_before_its_first_trial(tmp_path, capsys):
    """Its controller may wait in SLURM's queue: status and cancel are about the search then."""
    info = new_info(SearchConfig(metric="loss", min_steps=3), search_space(RANGES), 3, None)
    write_info(tmp_path, info)
    status_command.main([str(tmp_path)])
    assert "0 of 32 trials have ended" in capsys.readouterr().out
    status_command.main([str(tmp_path), "--watch"])  # no controller runs, so it ends
    with RunLock(tmp_path, "evspan sweep"):
        assert starts_runs(tmp_path)
    assert not starts_runs(tmp_path)
    capsys.readouterr()
    cancel_command.main([str(tmp_path)])
    assert "a controller of the search that still runs ends" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        report_command.main([str(tmp_path)])
    assert "is a search that has started no trial yet" in capsys.readouterr().err


def test_an_unchanged_metrics_file_is_parsed_once(tmp_path, monkeypatch):
    reads = []

    def counted(run, kind=""):
        reads.append(run)
        return read_metrics(run, kind)

    monkeypatch.setattr(values, "read_metrics", counted)
    log = MetricsLog(tmp_path, enabled=True)
    log.write(EVALUATION, 3, {"ap": 0.25})
    for _ in range(3):
        assert metric_values(tmp_path, "ap", 3) == {3: 0.25}
    assert len(reads) == 1
    log.write(EVALUATION, 6, {"ap": 0.5})
    assert metric_values(tmp_path, "ap", 3) == {3: 0.25, 6: 0.5}
    assert len(reads) == 2


@pytest.mark.parametrize(
    "damage",
    [
        {"id": 3},
        {"metric": "\x1b[2J"},
        {"first_rung": 0},
        {"ranges": {"a": 3}},
        {"ranges": {"size": {"kind": "choice", "values": 3}}},
        {"other": 1},
    ],
)
def test_a_damaged_search_file_names_its_remedy(damage, tmp_path):
    info = new_info(SearchConfig(metric="loss", min_steps=3), search_space(RANGES), 3, None)
    write_info(tmp_path, info)
    assert read_info(tmp_path) == info
    path = tmp_path / "search.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **damage}))
    with pytest.raises(UserError, match="is damaged"):
        read_info(tmp_path)


# -- real runs -----------------------------------------------------------------------------------
SHARD_FRAMES = {"train": [30, 24], "val": [12]}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_search_on_this_machine(shards, tmp_path, monkeypatch, capfd):
    """Trials one at a time; one that is pruned keeps its checkpoint, and is trained to the end by search.resume."""
    monkeypatch.setattr(controllers, "POLL_S", 0.5)
    folder = tmp_path / "search"
    words = search_words(
        shards,
        folder,
        "cluster=local",
        "search.trials=2",
        "search.seed=2",
        "training.max_steps=40",
        "search.reduction_factor=9",
        "checkpoint.every=100",
    )
    sweep.main(words)
    states = [trial.state.name for trial in study_of(folder).trials]
    assert states == ["COMPLETE", "PRUNED"]
    number = 1
    run = folder / str(number)
    saved = (run / "checkpoints" / "latest").read_text().strip()
    assert 3 <= read_progress(run)["step"] < 40
    sweep.main([*words, f"search.resume=[{number}]"])
    assert (run / "checkpoints" / "latest").read_text().strip() != saved
    assert [t.user_attrs.get("continues") for t in study_of(folder).trials] == [None, None, 1]
    status_command.main([str(folder)])
    assert "2 of 2 trials have ended" in capfd.readouterr().out
