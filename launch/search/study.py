"""The search's state: an Optuna study, journalled in SWEEP/search.journal. The only user of Optuna.

A trial of the study has, as user attributes, what ties it to a run, written before the run starts:

    folder         name of the run's folder in the sweep
    overrides      of the run, those of the ranges
    continues      number of the pruned trial whose run this one trains to the end
    submission     time of the last submission, and the job that the run had before it
    prune          step at which the pruner has ended it; the run may still save
    retries        how often the run was submitted again after its job was lost
    reason         how it ended
"""

import random
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from evspan.conf.errors import UserError, one_line
from evspan.conf.schema.search import Pruner, Sampler, SearchConfig
from evspan.conf.search_space import FloatRange, IntRange, Range, SearchSpace

if TYPE_CHECKING:
    import optuna
    from optuna.storages import JournalStorage
    from optuna.trial import FrozenTrial

JOURNAL = "search.journal"  # in the sweep's folder
STUDY = "evspan"
INSTALL = 'search=optuna needs Optuna: pip install ".[search]" in the checkout of Evspan'
FEWEST_FOR_IMPORTANCE = 8  # trials with a value; fewer say nothing
LOCK_SUFFIXES = (".lock", ".lock.rename")  # of Optuna's lock, which a killed process leaves behind


@dataclass(frozen=True)
class Trial:
    """A trial as the journal has it.

    Attributes:
        folder, overrides: empty if the trial was created, but not yet tied to a run.
        continues: number of the pruned trial whose run it continues; None for a trial of its own.
        values: step -> value of the metric, as reported.
        prune_step: where the pruner has ended it; None if it has not.
        submitted_at: time of the last submission in seconds since 1970; None before the first.
        previous_job: SLURM job id of the run before that submission; may be empty.
    """

    number: int
    folder: str
    overrides: tuple[str, ...]
    continues: int | None
    values: dict[int, float]
    prune_step: int | None
    submitted_at: float | None
    previous_job: str
    retries: int

    @property
    def name(self) -> str:
        """As `status` shows it: the folder's, also of a trial that continues another one."""
        return self.folder or str(self.number)


class SearchStudy:
    """Opens or creates the study of a sweep. One process at a time: call it with the sweep's lock.

    Raises:
        UserError: Optuna is not installed, or the journal cannot be read.
    """

    def __init__(
        self, sweep: Path, config: SearchConfig, space: SearchSpace, first_rung: int
    ) -> None:
        self.config = config
        self.space = space
        _repair(sweep / JOURNAL)
        self.storage = _storage(sweep)
        self.study = _create(self.storage, maximise=config.maximises)
        self.study.pruner = _pruner(config, first_rung)

    # -- trials --------------------------------------------------------------------------------
    def running(self) -> list[Trial]:
        """The trials that have not ended, in their order."""
        from optuna.trial import TrialState

        return [_trial(frozen) for frozen in self._frozen((TrialState.RUNNING,))]

    def number_of_trials(self) -> int:
        """How many trials there are, without those that continue a pruned one."""
        return sum("continues" not in frozen.user_attrs for frozen in self._frozen())

    def has_waiting(self) -> bool:
        """Whether a pruned trial waits to be continued."""
        from optuna.trial import TrialState

        return bool(self._frozen((TrialState.WAITING,)))

    def has_result(self) -> bool:
        """Whether a trial has ended otherwise than by a failure."""
        from optuna.trial import TrialState

        return bool(self._frozen((TrialState.COMPLETE, TrialState.PRUNED)))

    def create(self) -> Trial:
        """Creates a trial; it has no values yet, see `draw`."""
        self.study.sampler = self._sampler(len(self._frozen()))
        return self.trial(self.study.ask().number)

    def draw(self, trial: Trial) -> Trial:
        """Draws the values of a trial that has none and ties it to its run.

        A trial that was interrupted here gets the values that it would have got.
        """
        import optuna

        self.study.sampler = self._sampler(trial.number)
        open_trial = optuna.trial.Trial(self.study, self._id(trial.number))
        values = {key: _suggest(open_trial, key, r) for key, r in self.space.ranges.items()}
        if trial.continues is None:
            self._set(trial.number, folder=str(trial.number))
        self._set(trial.number, overrides=self.space.overrides(values))
        return self.trial(trial.number)

    def trial(self, number: int) -> Trial:
        """The trial with this number, as the journal has it now."""
        return _trial(self._frozen_trial(number))

    def enqueue(self, number: int) -> None:
        """Has a pruned trial continued to its end, unless it is already.

        Raises:
            UserError: there is no such pruned trial.
        """
        from optuna.trial import TrialState

        continuing = (TrialState.WAITING, TrialState.RUNNING, TrialState.COMPLETE)
        continued = {frozen.user_attrs.get("continues") for frozen in self._frozen(continuing)}
        if number in continued:
            return
        pruned = {frozen.number: frozen for frozen in self._frozen((TrialState.PRUNED,))}
        if number not in pruned:
            others = [str(other) for other in pruned if other not in continued]
            raise UserError(
                f"search.resume names trial {number}, which is not pruned; pruned trials: "
                f"{', '.join(others) or 'none'}"
            )
        frozen = pruned[number]
        attributes = {"continues": number, "folder": frozen.user_attrs["folder"]}
        self.study.enqueue_trial(frozen.params, user_attrs=attributes)

    # -- what happens to a trial ---------------------------------------------------------------
    def record_submission(self, trial: Trial, previous_job: str, *, retry: bool) -> None:
        """Records that the run of a trial is about to be submitted."""
        submission = {"time": round(time.time(), 3), "previous_job": previous_job}
        retries = trial.retries + int(retry)
        self._set(trial.number, retries=retries, submission=submission)

    def report(self, trial: Trial, step: int, value: float) -> bool:
        """Reports a value of the metric, each step once.

        Returns:
            Whether the pruner ends the trial.
        """
        if step in trial.values:
            return False
        self.storage.set_trial_intermediate_value(self._id(trial.number), step, value)
        if trial.continues is not None:
            return False
        return bool(self.study.pruner.prune(self.study, self._frozen_trial(trial.number)))

    def request_prune(self, trial: Trial, step: int) -> None:
        """Records that the run of the trial is to be stopped."""
        self._set(trial.number, prune=step)

    def complete(self, trial: Trial, value: float) -> None:
        """Ends a trial with a value."""
        self.study.tell(trial.number, value)

    def pruned(self, trial: Trial) -> None:
        """Ends a trial whose run the pruner has stopped."""
        from optuna.trial import TrialState

        self.study.tell(trial.number, state=TrialState.PRUNED)

    def failed(self, trial: Trial, reason: str) -> None:
        """Ends a trial without a value."""
        from optuna.trial import TrialState

        self._set(trial.number, reason=reason)
        self.study.tell(trial.number, state=TrialState.FAIL)

    # -- private -------------------------------------------------------------------------------
    def _frozen(self, states: "Sequence[optuna.trial.TrialState] | None" = None) -> "list[Any]":
        trials = self.study.get_trials(deepcopy=False)
        return [trial for trial in trials if states is None or trial.state in states]

    def _frozen_trial(self, number: int) -> "FrozenTrial":
        return self.storage.get_trial(self._id(number))

    def _id(self, number: int) -> int:
        study = self.storage.get_study_id_from_name(STUDY)
        return self.storage.get_trial_id_from_study_id_trial_number(study, number)

    def _set(self, number: int, **attributes: Any) -> None:
        for name, value in attributes.items():
            self.storage.set_trial_user_attr(self._id(number), name, value)

    def _sampler(self, number: int) -> "optuna.samplers.BaseSampler":
        """The sampler of one trial: its numbers depend on nothing but the seed and the trial."""
        from optuna.samplers import RandomSampler, TPESampler

        seed = random.Random(f"{self.config.seed} {number}").getrandbits(31)
        if self.config.sampler is Sampler.random:
            return RandomSampler(seed=seed)
        return TPESampler(
            seed=seed, n_startup_trials=self.config.startup_trials, constant_liar=True
        )


class Importance(NamedTuple):
    """by_key: key -> its fraction of the metric's variation at a step of `trials` trials."""

    by_key: dict[str, float]
    step: int
    trials: int


def importance(sweep: Path) -> Importance | None:
    """The importance of keys, largest first (PED-ANOVA).

    The pruner ends most trials, so they are compared at the last step that enough of them reached.

    Returns:
        None without Optuna, without a journal that can be read, or with too few trials.
    """
    if not (sweep / JOURNAL).is_file():
        return None
    try:
        return _importance(_storage(sweep))
    except Exception:  # of many kinds: the file may have been written by anyone
        return None


def _importance(storage: "JournalStorage") -> Importance | None:
    import optuna
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    study = optuna.load_study(study_name=STUDY, storage=storage)
    every = [t for t in study.get_trials(deepcopy=False) if "continues" not in t.user_attrs]
    reached = Counter(step for frozen in every for step in frozen.intermediate_values)
    steps = [step for step, count in reached.items() if count >= FEWEST_FOR_IMPORTANCE]
    if not steps:
        return None
    step = max(steps)
    compared = optuna.create_study(direction=study.direction)
    trials = [frozen for frozen in every if step in frozen.intermediate_values]
    for frozen in trials:
        value = frozen.intermediate_values[step]
        # Ranges may have been widened since a trial was drawn.
        distributions = trials[-1].distributions
        compared.add_trial(
            optuna.create_trial(params=frozen.params, distributions=distributions, value=value)
        )
    by_key = get_param_importances(compared, evaluator=PedAnovaImportanceEvaluator())
    return Importance(dict(by_key), step, len(trials))


def require_optuna() -> None:
    """Checks that Optuna is installed.

    Raises:
        UserError: it is not.
    """
    try:
        import optuna  # noqa: F401
    except ImportError as error:
        raise UserError(INSTALL) from error


def _storage(sweep: Path) -> "JournalStorage":
    require_optuna()
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    path = sweep / JOURNAL
    try:
        return JournalStorage(JournalFileBackend(str(path)))
    except Exception as error:  # of many kinds: the file may have been written by anyone
        raise UserError(
            f"{path} cannot be read: {one_line(error)}. Restore it, or start the search in another "
            "folder: run_dir=sweeps/NAME"
        ) from error


def _create(storage: "JournalStorage", *, maximise: bool) -> "optuna.Study":
    import optuna

    names = optuna.study.StudyDirection
    direction = names.MAXIMIZE if maximise else names.MINIMIZE
    return optuna.create_study(
        study_name=STUDY, storage=storage, direction=direction, load_if_exists=True
    )


def _repair(journal: Path) -> None:
    """Removes a last line that a killed process has not finished, and its lock."""
    for suffix in LOCK_SUFFIXES:
        Path(f"{journal}{suffix}").unlink(missing_ok=True)
    if not journal.exists():
        return
    with journal.open("r+b") as file:
        end = file.seek(0, 2)
        if end == 0:
            return
        file.seek(max(0, end - (1 << 20)))
        tail = file.read()
        if not tail.endswith(b"\n"):
            file.truncate(end - len(tail) + tail.rfind(b"\n") + 1)


def _suggest(trial: "optuna.Trial", key: str, range_: Range) -> float | int | str:
    if isinstance(range_, FloatRange):
        step = range_.step or None
        return trial.suggest_float(key, range_.low, range_.high, log=range_.log, step=step)
    if isinstance(range_, IntRange):
        step = range_.step
        return trial.suggest_int(key, range_.low, range_.high, log=range_.log, step=step)
    return str(trial.suggest_categorical(key, range_.values))


def _pruner(config: SearchConfig, first_rung: int) -> "optuna.pruners.BasePruner":
    from optuna.pruners import NopPruner, SuccessiveHalvingPruner

    if config.pruner is Pruner.none:
        return NopPruner()
    return SuccessiveHalvingPruner(
        min_resource=first_rung, reduction_factor=config.reduction_factor
    )


def _trial(frozen: "FrozenTrial") -> Trial:
    attributes = frozen.user_attrs
    submission = attributes.get("submission") or {}
    return Trial(
        number=frozen.number,
        folder=attributes.get("folder", ""),
        overrides=tuple(attributes.get("overrides", ())),
        continues=attributes.get("continues"),
        values=dict(frozen.intermediate_values),
        prune_step=attributes.get("prune"),
        submitted_at=submission.get("time"),
        previous_job=submission.get("previous_job", ""),
        retries=attributes.get("retries", 0),
    )
