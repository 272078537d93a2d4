"""A search in this process: its plan, its checks, and the controller until it ends."""

import logging
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

from evspan.conf.compose import compose, config_dir_options, replace_override, search_space
from evspan.conf.errors import STOP_SIGNALS, UserError, is_user_error, one_line, require
from evspan.conf.schema.cluster import Scheduler
from evspan.conf.schema.search import LOSS, PER_CLASS, Pruner
from evspan.conf.schema.training import TrainConfig
from evspan.conf.search_space import Choices, SearchSpace
from evspan.conf.secret_values import hide_values
from evspan.launch.local.run import check_sweep_folder
from evspan.launch.local.run_folder import SWEEPS, numbered_folder
from evspan.launch.search.controller import Controller
from evspan.launch.search.files import (
    SearchInfo,
    check_continues,
    new_info,
    read_info,
    write_info,
)
from evspan.launch.search.study import SearchStudy, Trial, require_optuna
from evspan.launch.search.trial_runs import TrialRuns
from evspan.launch.sweep.plan import PlannedRun, check_run, read_table, write_rows
from evspan.pipeline.history import slurm_job
from evspan.pipeline.run_lock import ATTEMPT_WAIT_S, RunLock

logger = logging.getLogger(__name__)
NOT_SEARCHED = ("run_dir", "cluster", "search", "hydra")  # keys, or groups of keys


@dataclass(frozen=True)
class SearchPlan:
    """A search, as the arguments make it.

    argv: of `evspan sweep`. config: of a trial with the first value of each range. folder: of the
    sweep.
    """

    argv: Sequence[str]
    space: SearchSpace
    config: TrainConfig
    folder: Path

    @property
    def first_rung(self) -> int:
        """The step at which trials are compared for the first time."""
        return self.config.search.min_steps or self.config.training.evaluate_every

    def run_of(self, trial: Trial) -> PlannedRun:
        """The run of a trial, recorded in sweep.json.

        Raises:
            UserError: the trial's values cannot work.
        """
        self._record(trial, None)
        folder = self.folder / trial.folder
        try:
            config = self._composed(trial.overrides, folder)
        except Exception as error:
            if is_user_error(error):
                self._record(trial, hide_values(one_line(error), trial.overrides))
            raise
        return PlannedRun(folder, list(trial.overrides), config)

    def example(self) -> PlannedRun:
        """A run with the first value of each range."""
        overrides = first_values(self.space)
        folder = self.folder / "0"
        return PlannedRun(folder, overrides, self._composed(overrides, folder))

    def _composed(self, overrides: Sequence[str], folder: Path) -> TrainConfig:
        every = [*self.space.fixed, *overrides]
        words = replace_override(every, "run_dir", str(folder))
        config = compose(TrainConfig, [*config_dir_options(self.argv), *words])
        check_run(config)
        return config

    def _record(self, trial: Trial, error: str | None) -> None:
        """Writes the trial's row of sweep.json. error: why its run cannot start."""
        table = read_table(self.folder)
        row: dict[str, Any] = {
            "folder": trial.folder,
            "overrides": list(trial.overrides),
            "error": error,
        }
        same = [i for i, other in enumerate(table) if other["folder"] == trial.folder]
        if not same:
            write_rows(self.folder, [*table, row])
        elif table[same[0]].get("error") != error:
            table[same[0]]["error"] = error
            write_rows(self.folder, table)


def plan_search(argv: Sequence[str]) -> SearchPlan:
    """Plans a search; makes its folder where the arguments do not name one.

    Args:
        argv: of `evspan sweep`: overrides, and `--config-dir FOLDER`.

    Raises:
        UserError: Optuna is not installed, or the search cannot work.
    """
    require_optuna()
    space = search_space(argv)
    config = compose(TrainConfig, [*config_dir_options(argv), *space.fixed, *first_values(space)])
    check_search(space, config)
    if config.run_dir:
        folder = Path(config.run_dir)
    else:
        folder = numbered_folder(SWEEPS, create=not config.cluster.dry_run)
    return SearchPlan(argv, space, config, folder)


def run_as_job(argv: Sequence[str]) -> int:
    """Runs the controller in a job that was submitted for it. Returns the exit code.

    Raises:
        UserError: the search cannot go on, or its runs fail.
        FolderInUseError: another process runs it.
    """
    plan = plan_search(argv)
    with RunLock(plan.folder, "evspan sweep", wait_s=ATTEMPT_WAIT_S):
        return run_controller(plan, record_search(plan), is_job=True)


def record_search(plan: SearchPlan) -> SearchInfo:
    """Writes search.json, with the lock on the sweep. Returns its contents.

    Raises:
        UserError: the folder is that of a grid, or of a search that cannot be compared.
    """
    check_sweep_folder(plan.folder)
    plan.folder.mkdir(parents=True, exist_ok=True)
    earlier = read_info(plan.folder)
    if earlier is None and read_table(plan.folder):
        raise UserError(
            f"{plan.folder} is the folder of a grid; name another one for the search: "
            "run_dir=sweeps/NAME"
        )
    # What a grid would check for a run of it; also whether the first trial can be composed.
    plan.example()
    check_class(plan.config)
    info = new_info(plan.config.search, plan.space, plan.first_rung, earlier)
    if earlier is not None:
        check_continues(info, earlier, plan.folder)
    write_info(plan.folder, info)
    return info


def run_controller(plan: SearchPlan, info: SearchInfo, *, is_job: bool = False) -> int:
    """Runs the controller to the end of the search, with the lock on the sweep.

    Args:
        is_job: whether this process is in a job that was submitted for it.

    Returns:
        The exit code.

    Raises:
        UserError: SLURM refuses the jobs, or the first runs fail with the same error.
    """
    write_info(plan.folder, replace(info, job=slurm_job() if is_job else ""))
    logger.info("%s in %s", info.describe(), plan.folder)
    config = plan.config
    study = SearchStudy(plan.folder, config.search, plan.space, plan.first_rung)
    for number in config.search.resume:
        study.enqueue(number)
    with _stop_flag() as must_stop:
        controller = Controller(
            plan.folder,
            info,
            study,
            _trial_runs(plan, info),
            plan.run_of,
            must_stop=must_stop,
            continues_cancelled=not is_job,
            max_retries=config.cluster.max_retries,
            fail_fast=config.cluster.fail_fast,
        )
        return controller.run()


def _trial_runs(plan: SearchPlan, info: SearchInfo) -> TrialRuns:
    if plan.config.cluster.scheduler is Scheduler.local:
        from evspan.launch.search.local_trials import LocalTrials

        return LocalTrials()
    from evspan.launch.search.slurm_trials import SlurmTrials
    from evspan.launch.slurm.client import require_commands

    require_commands()
    return SlurmTrials(plan.folder, info.id, plan.config.cluster)


def check_search(space: SearchSpace, config: TrainConfig) -> None:
    """Check what can be known before a trial is drawn.

    Raises:
        ConfigError: the ranges, the metric or the pruner cannot work.
    """
    require(
        bool(space.ranges),
        "search=optuna has nothing to search; give a key several values, such as "
        "'optimizer.lr=tag(log,interval(1e-5,1e-3))' or size=tiny,small",
    )
    for key in space.keys:
        group = key.partition(".")[0].partition("/")[0]
        require(
            group not in NOT_SEARCHED,
            f"{key} has several values, which a search cannot try: they do not change what a run "
            "learns. Give it one",
        )
    search = config.search
    if search.metric_key == LOSS:
        require(
            search.min_steps > 0,
            "search.metric=loss needs search.min_steps: the steps over which a loss is the mean",
        )
    else:
        require(
            config.training.evaluate_every > 0 or config.evaluation.at_end,
            f"search.metric={search.metric} needs evaluations; set training.evaluate_every",
        )
    if search.pruner is Pruner.none:
        return
    require(
        search.metric_key == LOSS or config.training.evaluate_every > 0,
        "search.pruner=asha compares trials by their evaluations during training; set "
        "training.evaluate_every, or search.pruner=none",
    )
    rung_key = "search.min_steps" if search.min_steps else "training.evaluate_every"
    rung = search.min_steps or config.training.evaluate_every
    require(
        rung < config.training.max_steps,
        f"search.pruner=asha compares trials for the first time at step {rung} ({rung_key}), and a "
        f"trial has {config.training.max_steps} steps; lower {rung_key}, or set search.pruner=none",
    )


def check_class(config: TrainConfig) -> None:
    """Check that the class of search.metric=AP_class/NAME is one of the evaluated dataset's.

    Raises:
        UserError: it is not, or the dataset cannot be used.
    """
    from evspan.pipeline.data.requirements import open_scored

    metric = config.search.metric_key
    if not metric.startswith(PER_CLASS) or config.cluster.after:  # the dataset may not exist yet
        return
    name = metric.removeprefix(PER_CLASS)
    classes = open_scored(config.dataset, config.evaluation.split).classes
    require(
        name in classes,
        f"search.metric is {config.search.metric}, and the dataset has no class {name}; its "
        f"classes are {', '.join(classes)}",
    )


def first_values(space: SearchSpace) -> list[str]:
    """The overrides of the first value of each range."""
    values: dict[str, Any] = {}
    for key, range_ in space.ranges.items():
        values[key] = range_.values[0] if isinstance(range_, Choices) else range_.low
    return space.overrides(values)


@contextmanager
def _stop_flag() -> Iterator[Callable[[], bool]]:
    """While open, stop signals and the first Ctrl-C are noted. Yields whether one has arrived."""
    received: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    numbers = (*STOP_SIGNALS, signal.SIGINT)
    previous = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
