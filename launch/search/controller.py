"""The loop of a search: starts trials, reports their values, ends what the pruner rejects.

Everything that must survive the controller lies in the journal, in the runs' folders and in SLURM's
queue, and is written in this order:

1. the trial, its values and its folder (journal), and its row in sweep.json
2. that it is about to be submitted (journal)
3. its config, its job, the job's record (run folder)
4. its metrics (run folder), then each of them once (journal)
5. that it is to be pruned (journal), `pruned` in its history, its stop signal
6. its end (history), then its end (journal)

A new controller continues each trial that the journal lists as running from its present state.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from evspan.conf.errors import STOPPED_EXIT_CODE, UserError, is_user_error, one_line
from evspan.conf.text import plural
from evspan.launch.search.files import STOP, SearchInfo, write_info
from evspan.launch.search.study import SearchStudy, Trial
from evspan.launch.search.trial_runs import Observation, TrialRuns
from evspan.launch.search.values import best_value, metric_values
from evspan.launch.sweep.fail_fast import EndedRun, same_error
from evspan.launch.sweep.plan import PlannedRun
from evspan.launch.sweep.queued import submitted_job
from evspan.launch.sweep.state import State
from evspan.pipeline.history import append

logger = logging.getLogger(__name__)
POLL_S = 5.0
PAUSE_S = 0.2  # between two looks at the stop flag
MOST_POLLS_WITHOUT_JOB = 3  # a run without a job or an end is lost after them
MOST_REFUSALS = 5  # submissions in a row that SLURM refuses or does not answer while no trial runs
CANCELLED = "the search was cancelled"
CANCELLED_EXIT_CODE = 1  # unlike after a signal, the controller's job does not come back

Planner = Callable[[Trial], PlannedRun]


class SearchStoppedError(Exception):
    """The controller is to end: by a signal, or by `evspan cancel`. code: its exit code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class Controller:
    """Runs a search to its end.

    Args:
        plan: makes the run of a trial, and records it in sweep.json. It raises a UserError for
            values that cannot work.
        must_stop: whether a signal has arrived.
        continues_cancelled: whether runs that were cancelled are started again.
        max_retries: submissions of a run whose job is lost.
    """

    def __init__(
        self,
        sweep: Path,
        info: SearchInfo,
        study: SearchStudy,
        runs: TrialRuns,
        plan: Planner,
        *,
        must_stop: Callable[[], bool],
        continues_cancelled: bool,
        max_retries: int,
        fail_fast: bool,
    ) -> None:
        self.sweep = sweep
        self.info = info
        self.study = study
        self.runs = runs
        self.plan = plan
        self.must_stop = must_stop
        self.continues_cancelled = continues_cancelled
        self.max_retries = max_retries
        self.fail_fast = fail_fast and not study.has_result()
        self.planned: dict[int, PlannedRun] = {}  # by trial
        self.active: list[int] = []  # trials whose runs were started
        self.pending: list[int] = []  # trials that are to be started, first of all
        self.ended: list[EndedRun] = []  # by this controller, in their order
        self.polls_without_job: Counter[int] = Counter()
        self.lost: set[int] = set()  # pending trials whose runs have lost their jobs
        self.refusals = 0  # of SLURM, in a row
        self.refusal = ""  # the last one

    def run(self) -> int:
        """Until all trials have ended.

        Returns:
            The exit code: 0; 1 if all trials failed or the search was cancelled; 75 if a signal
            ended the controller.

        Raises:
            UserError: SLURM refuses the jobs while no trial runs, or the first runs fail with the
                same error.
        """
        try:
            self._check_stop()
            self._recover()
            while True:
                self._update_all()
                self._fill()
                if not self.active and not self.pending:
                    return self._report_end()
                self._pause()
        except SearchStoppedError as stop:
            logger.info("%s", stop)
            return stop.code

    # -- starting ------------------------------------------------------------------------------
    def _recover(self) -> None:
        """Takes over the trials of an earlier controller."""
        trials = self.study.running()
        for trial in trials:
            if not trial.overrides:  # interrupted before it had its values
                trial = self.study.draw(trial)
            if self._planned(trial) is None:
                continue
            run = self.planned[trial.number]
            if self._is_started(trial, run) and not self._is_to_continue(run):
                self.active.append(trial.number)
            else:
                self.pending.append(trial.number)
        if trials:
            logger.info(
                "continues %s, %d of them to be started",
                plural(len(trials), "trial"),
                len(self.pending),
            )

    def _is_started(self, trial: Trial, run: PlannedRun) -> bool:
        """Whether the run's last submission has reached SLURM. Waits until SLURM answers."""
        while True:
            try:
                return self.runs.is_started(trial, run)
            except UserError as error:
                self._warn_once(f"{error}; the search waits")
                self._pause()

    def _warn_once(self, message: str) -> None:
        """Logs a refusal, unless it is that of the last try."""
        if message != self.refusal:
            self.refusal = message
            logger.warning("%s", message)

    def _is_to_continue(self, run: PlannedRun) -> bool:
        """Whether a run was cancelled, and the user has started the search again."""
        if not self.continues_cancelled:
            return False
        observations = self.runs.observe([run])
        return observations is not None and observations[0].state is State.cancelled

    def _fill(self) -> None:
        """Starts trials until as many run as may."""
        while len(self.active) < self.runs.most_active:
            self._check_stop()
            trial = self._next_trial()
            if trial is None or not self._start(trial):
                return

    def _next_trial(self) -> Trial | None:
        """A trial that is to be started; None if there is none."""
        while True:
            if self.pending:
                return self.study.trial(self.pending.pop(0))
            is_complete = self.study.number_of_trials() >= self.info.trials
            if is_complete and not self.study.has_waiting():
                return None
            trial = self.study.draw(self.study.create())
            if self._planned(trial) is not None:
                return trial

    def _planned(self, trial: Trial) -> PlannedRun | None:
        """The run of a trial; None where its values cannot work, which ends the trial."""
        if trial.number not in self.planned:
            try:
                self.planned[trial.number] = self.plan(trial)
            except Exception as error:
                if not is_user_error(error):
                    raise
                self._fail(trial, one_line(error))
                return None
        return self.planned[trial.number]

    def _start(self, trial: Trial) -> bool:
        """Starts the run of a trial.

        False where SLURM does not accept it now. While others run it may do so later: sites limit
        the jobs of a user.
        """
        run = self.planned[trial.number]
        try:
            if trial.submitted_at is None or not self._was_submitted(trial, run):
                is_retry = trial.number in self.lost
                self.study.record_submission(trial, submitted_job(run.folder), retry=is_retry)
                self.lost.discard(trial.number)
                self.runs.start(trial, run)
        except UserError as error:
            self.pending.insert(0, trial.number)
            self.refusals += 1
            if not self.active and (trial.number == 0 or self.refusals >= MOST_REFUSALS):
                raise
            self._warn_once(f"trial {trial.name} waits: {error}")
            return False
        self.refusals = 0
        self.refusal = ""
        self.polls_without_job[trial.number] = 0
        self.active.append(trial.number)
        return True

    def _was_submitted(self, trial: Trial, run: PlannedRun) -> bool:
        """Whether a submission that seemed to be refused has reached SLURM after all."""
        return bool(self.refusals) and self.runs.is_started(trial, run)

    # -- observing -----------------------------------------------------------------------------
    def _update_all(self) -> None:
        """Reports the values of all trials that run, and ends those whose runs have ended."""
        numbers = list(self.active)
        # The states are read before the metrics: a run that is done has written all of them.
        observations = self.runs.observe([self.planned[number] for number in numbers])
        if observations is None:
            return
        for number, observation in zip(numbers, observations, strict=True):
            self._update(self.study.trial(number), observation)

    def _update(self, trial: Trial, observation: Observation) -> None:
        trial = self._report_values(trial, is_done=observation.state is State.done)
        state = observation.state
        if state is State.done:
            self._complete(trial)
        elif trial.prune_step is not None:
            self._prune(trial, observation)
        elif state is State.failed:
            self._fail(trial, observation.reason)
        elif observation.active:
            self.polls_without_job[trial.number] = 0
        elif state is State.cancelled:
            self._fail(trial, f"cancelled {observation.reason}".strip())
        else:
            self._lose(trial, observation)

    def _report_values(self, trial: Trial, *, is_done: bool) -> Trial:
        """Reports each value of the metric once. Returns the trial as it is now."""
        run = self.planned[trial.number]
        try:
            values = metric_values(run.folder, self.info.metric, self.info.first_rung)
        except OSError as error:  # the next look may succeed
            logger.warning("trial %s: %s", trial.name, one_line(error))
            return trial
        rejected_at = None
        last_step = run.config.training.max_steps
        for step, value in values.items():
            is_rejected = self.study.report(trial, step, value)
            if is_rejected and rejected_at is None and step < last_step:
                rejected_at = step
        if rejected_at is not None and not is_done and trial.prune_step is None:
            self.study.request_prune(trial, rejected_at)
        return self.study.trial(trial.number)

    def _complete(self, trial: Trial) -> None:
        value = best_value(trial.values, maximise=self.info.maximise)
        if value is None:
            self._fail(trial, f"no evaluation has {self.info.metric_name}")
            return
        self.study.complete(trial, value)
        self._end(trial, "")
        logger.info("trial %s: done, %s %.4g", trial.name, self.info.metric_name, value)

    def _prune(self, trial: Trial, observation: Observation) -> None:
        run = self.planned[trial.number]
        reason = f"{self.info.metric_name} at step {trial.prune_step}"
        try:
            self.runs.prune(run, reason)
        except UserError as error:  # the next look tries again
            self._warn_once(f"trial {trial.name} is not pruned yet: {error}")
            return
        if not observation.active:
            self.study.pruned(trial)
            self._end(trial, "")
            logger.info("trial %s: pruned by its %s", trial.name, reason)

    def _fail(self, trial: Trial, reason: str) -> None:
        self.study.failed(trial, reason)
        self._end(trial, reason or "failed")
        logger.warning("trial %s: failed: %s", trial.name, reason)
        message = same_error(self.ended, self.info.trials) if self.fail_fast else ""
        if message:
            self.runs.cancel(self._active_runs(), message)
            raise UserError(message)

    def _end(self, trial: Trial, error: str) -> None:
        if trial.number in self.active:  # unlike a trial whose values cannot work
            self.active.remove(trial.number)
        self.ended.append(EndedRun(self.sweep / trial.folder, error))

    def _lose(self, trial: Trial, observation: Observation) -> None:
        """A run that has neither a job nor an end: it is started again, a few times."""
        self.polls_without_job[trial.number] += 1
        if self.polls_without_job[trial.number] < MOST_POLLS_WITHOUT_JOB:
            return
        reason = f"{observation.state.value}: {observation.reason}"
        if trial.retries >= self.max_retries:
            append(self.planned[trial.number].folder, "failed", message=reason)
            self._fail(trial, reason)
            return
        logger.warning("trial %s: %s; it is started again", trial.name, reason)
        self.active.remove(trial.number)
        self.pending.append(trial.number)
        self.lost.add(trial.number)

    # -- ending --------------------------------------------------------------------------------
    def _pause(self) -> None:
        end = time.monotonic() + POLL_S
        while time.monotonic() < end:
            self._check_stop()
            time.sleep(PAUSE_S)

    def _check_stop(self) -> None:
        """Ends the controller if it was asked to.

        Raises:
            SearchStoppedError: it was.
        """
        if (self.sweep / STOP).exists():
            self.runs.cancel(self._active_runs(), CANCELLED)
            raise SearchStoppedError(
                f"{CANCELLED}; the same command continues it", CANCELLED_EXIT_CODE
            )
        if self.must_stop():
            left = self.runs.leave()
            raise SearchStoppedError(
                f"the controller ends, {left}. The same command continues the search",
                STOPPED_EXIT_CODE,
            )

    def _active_runs(self) -> list[PlannedRun]:
        return [self.planned[number] for number in self.active]

    def _report_end(self) -> int:
        is_failure = bool(self.ended) and all(run.error for run in self.ended)
        write_info(self.sweep, replace(self.info, job=""))  # no job waits for the controller now
        logger.info("the search is complete: evspan report %s", self.sweep)
        return int(is_failure)
