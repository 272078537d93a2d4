"""The training loop of one rank, in step with all other ranks."""

import json
import logging
import os
import time
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from evspan.conf.atomic_files import replace_file
from evspan.conf.compose import CONFIG_FILE, load_config, save_config
from evspan.conf.errors import STOPPED_EXIT_CODE, ConfigError, UserError
from evspan.conf.schema.training import Precision, TrainConfig
from evspan.conf.secret_values import without_secrets
from evspan.pipeline.data.batch import Batch
from evspan.pipeline.data.datasets import Dataset, open_dataset
from evspan.pipeline.data.device_batches import batches_ahead, device_batches, encodes_for
from evspan.pipeline.data.loader import Loader, ReadingStoppedError
from evspan.pipeline.data.requirements import open_training
from evspan.pipeline.data.sampling import sampling_plan
from evspan.pipeline.data_digest import data_digest
from evspan.pipeline.engine.batch_norm import batch_norm_reductions
from evspan.pipeline.engine.batch_size import with_batch_size
from evspan.pipeline.engine.best_checkpoint import EVALUATION_ID
from evspan.pipeline.engine.checkpoints import (
    Checkpoints,
    LoadedSnapshot,
    Snapshot,
)
from evspan.pipeline.engine.continuation import (
    DATA,
    check_continues,
    continue_run,
    saved_precision,
)
from evspan.pipeline.engine.ema import open_average
from evspan.pipeline.engine.engines import engine_class
from evspan.pipeline.engine.evaluator import (
    EvaluationStoppedError,
    describe_evaluation,
    evaluate_weights,
    evaluation_id,
    write_results,
)
from evspan.pipeline.engine.host_copies import CopyToHost, HostCopies, copy_now, no_copy
from evspan.pipeline.engine.initial_weights import INIT_FROM, Target, initialise, started_from
from evspan.pipeline.engine.limits import LIMITS, RunLimits, frames_of, with_total_steps
from evspan.pipeline.engine.loss_spikes import RECENT_LOSSES, LossSpikes
from evspan.pipeline.engine.oom import explain_out_of_memory
from evspan.pipeline.engine.parameter_patterns import freeze
from evspan.pipeline.engine.precision import resolve_precision, set_float32_kernels
from evspan.pipeline.engine.profiling import Profiler
from evspan.pipeline.engine.restarts import LAUNCHERS, continue_if_restarted, launcher_ids
from evspan.pipeline.engine.run_reporter import Evaluated, RunReporter
from evspan.pipeline.engine.running_statistics import RunningStatistics
from evspan.pipeline.engine.signals import StopFlag, catch_stop_signals
from evspan.pipeline.engine.step_clock import StepPart
from evspan.pipeline.engine.step_report import (
    MicroBatchReport,
    MicroBatchSum,
    PendingValues,
    StepReport,
    StepValues,
)
from evspan.pipeline.engine.time_account import TimeAccount
from evspan.pipeline.engine.training_engine import TrainingEngine
from evspan.pipeline.evaluation.coco import Metrics
from evspan.pipeline.evaluation.protocol import protocol_of
from evspan.pipeline.history import (
    Activity,
    append,
    record_first_step,
    record_start,
    write_activity,
)
from evspan.pipeline.model.backbone import Execution
from evspan.pipeline.model.detector import Detector
from evspan.pipeline.model.loss import detection_loss
from evspan.pipeline.model.norm import global_batch_norms
from evspan.pipeline.model.sequence_protocol import Exchange
from evspan.pipeline.model.state import (
    DetectorState,
    detach,
    state_from_tensors,
    state_tensors,
    zero_unless,
)
from evspan.pipeline.parallel.exchange import open_exchange
from evspan.pipeline.parallel.flight_recorder import BACKWARD, FORWARD, OPTIMIZER, set_phase
from evspan.pipeline.parallel.mesh import Mesh, open_mesh
from evspan.pipeline.parallel.rank_exit import leave_threads_behind
from evspan.pipeline.parallel.reductions import (
    barrier,
    broadcast_json,
)
from evspan.pipeline.parallel.world import World
from evspan.pipeline.run_lock import attempt_lock, end_if_taken_over
from evspan.pipeline.tensorboard.attention_probe import probe
from evspan.pipeline.tensorboard.summaries import write_first_images, write_images
from evspan.pipeline.tensorboard.writer import TensorBoardWriter
from evspan.pipeline.time_records import Part
from evspan.pipeline.weights import (
    AVERAGE_KEY,
    Weights,
    generator_states,
    plain,
    restore_generators,
    seed_everything,
)
from torch import Tensor

logger = logging.getLogger(__name__)
ACTIVITY_PARTS = {  # of the time of a run
    Activity.saving: Part.saving,
    Activity.images: Part.images,
    Activity.evaluating: Part.evaluation,
}
DATA_WAIT_S = 5.0  # how long a rank that was asked to stop waits for the data of the next step

StepCallback = Callable[[StepReport], None]


@dataclass
class PendingStep:
    """A step that was queued, and whose values the host has not read."""

    number: int
    values: PendingValues
    gradients: dict[str, Tensor]  # as in StepReport
    started: float  # as in StepReport
    state: DetectorState  # before the step


class DataWait:
    """How long this rank waits for the data of a step after it was asked to stop."""

    def __init__(self, stop_flag: StopFlag) -> None:
        self.stop_flag = stop_flag
        self.started = 0.0  # time.perf_counter()
        self.may_end = False

    def start(self, *, may_end: bool) -> None:
        """Begins. may_end: whether the rank may go on without the data."""
        self.started = time.perf_counter()
        self.may_end = may_end

    def is_too_long(self) -> bool:
        """Whether to go on without the data. Called by the loader while it waits."""
        waited_s = time.perf_counter() - self.started
        return self.may_end and self.stop_flag.is_set() and waited_s > DATA_WAIT_S


def train(
    config: TrainConfig,
    world: World,
    *,
    on_start: Callable[[], None] | None = None,
    account: TimeAccount | None = None,
) -> Metrics | None:
    """Trains to `max_steps`, from the run's newest checkpoint if there is one. A collective.

    Args:
        on_start: called when this process may write into the run's folder.
        account: of this rank's time so far; None: it starts now.

    Returns:
        Metrics of the last evaluation in this process; None if there was none.

    Raises:
        UserError: bad data, a checkpoint of another batch or model, too many non-finite losses in a
            row, or too little memory.
        SystemExit: a stop signal arrived; the newest checkpoint has all steps.
        FolderInUseError: another process trains in the run's folder.
    """
    account = account or TimeAccount()
    with attempt_lock(config.run_dir, is_main=world.is_main):
        if on_start is not None:
            on_start()
        # Rank 0 has the run's lock: no other run writes reports into the folder.
        barrier("the lock of the run")
        if world.hang is not None:
            world.hang.start()
        config = continue_if_restarted(config, world)
        config = with_batch_size(config, world, lambda probed: _ProbedTrainer(probed, world))
        with explain_out_of_memory(config, world):
            trainer = Trainer(config, world, account=account)
            try:
                with catch_stop_signals() as stop_flag:
                    return trainer.run(stop_flag)
            finally:
                trainer.close()
                account.abandon()


class _ProbedTrainer:
    """Trains single micro-batches, for `training.batch_size=auto`."""

    def __init__(self, config: TrainConfig, world: World) -> None:
        self.trainer = Trainer(config, world)
        device = world.device
        loaded = self.trainer.loader.batches(0, encoded=encodes_for(device))
        self.batches = device_batches(loaded, device)

    def train_micro_batch(self) -> None:
        self.trainer.micro_batch(next(self.batches))
        self.trainer._read_pending()

    def close(self) -> None:
        self.batches.close()
        self.trainer.close()
        self.trainer.engine.close()


class Trainer:
    """One rank of a run.

    The host queues the work of a step without waiting for the device. It reads the losses and the
    stop flag of a step in the next one, after the backward pass is queued, or at the end of the
    step where something depends on them: a log line, a checkpoint, an evaluation, a callback. What
    must not wait is decided on the device: a micro-batch whose loss is not finite changes neither
    weights, moments and counters nor running statistics, and resets the recurrent state.

    A stop flag is read in every micro-batch; after a checkpoint, images and an evaluation, which
    may take minutes; and inside of an evaluation. All ranks agree on it, save what is not saved,
    and end. An evaluation that was stopped is done again by the next attempt. A rank that waits for
    the data of a step takes part in it without them. Such a step counts nowhere: the checkpoint
    has the state before it.

    Args:
        engine: the class that steps the model; None: the one that the config names.
        on_step: is called on every rank after each optimizer step, before the step is logged, saved
            or evaluated; the host waits for the step then. To end the run after this step, it calls
            `end_after_step` on every rank.
        gradient_steps: steps whose report contains the gradients; collecting them costs a
            collective and a copy of all gradients.
        account: of this rank's time; rank 0 writes it into the run's folder.
    """

    def __init__(
        self,
        config: TrainConfig,
        world: World,
        engine: type[TrainingEngine] | None = None,
        *,
        on_step: StepCallback | None = None,
        gradient_steps: Container[int] = (),
        account: TimeAccount | None = None,
    ) -> None:
        self.account = account or TimeAccount()
        config = without_secrets(config)  # all that a run writes may be published
        self.world = world
        self.run_dir = Path(config.run_dir)
        self.launchers = launcher_ids(os.environ)
        self.checkpoints = Checkpoints(
            self.run_dir,
            rank=world.rank,
            keep=config.checkpoint.keep,
            start_over=not config.checkpoint.resume,
            started_over=lambda: _resume_from_now_on(self.run_dir),
            asynchronous=config.checkpoint.asynchronous,
        )
        self.mesh = open_mesh(
            world, sequence=config.parallel.sequence, timeout_s=config.parallel.timeout_s
        )
        self.lanes = self.mesh.lanes(config.training.batch_size)
        resumed = None
        if config.checkpoint.resume:
            resumed = self.checkpoints.resume(
                self.lanes, lambda folder, meta: check_continues(folder, meta, config)
            )
        config = resolve_precision(
            config, world, saved_precision(resumed.meta) if resumed else None
        )
        set_float32_kernels(config.training.precision)
        self.config = config
        self.on_step = on_step
        self.gradient_steps = gradient_steps
        self.exchange = open_exchange(
            config.parallel.exchange,
            self.mesh,
            sequence_length=config.training.sequence_length,
            dws_conv=config.model.backbone.dws_conv,
        )
        seed_everything(config.seed)
        self.dataset = open_training(config.dataset, config.model.head.num_classes)
        self.data_digest: dict[str, Any] = {}  # rank 0 saves it
        if world.is_main:
            self.data_digest = data_digest(self.dataset, config.dataset, config.evaluation.split)
        if resumed is not None:
            continue_run(resumed, config, self.data_digest, self.checkpoints, world)
        given_config = config
        frames = frames_of(self.dataset)
        self.config = config = with_total_steps(config, frames)
        self.saved_config = plain(asdict(given_config))
        self.limits = RunLimits(config.training, frames)
        self.loader = _build_loader(config, self.dataset, self.mesh)
        self.spikes = LossSpikes(
            self.run_dir, config.training, self.loader.plan, self.dataset, enabled=world.is_main
        )
        detector = _build_detector(
            config, self.dataset.channels, self.exchange, self.mesh, world.device
        )
        self.init_from = started_from(resumed.meta) if resumed else {}
        if resumed is None and config.checkpoint.init_from:
            target = Target(config.model, self.dataset.classes, self.dataset.frames)
            self.init_from = initialise(detector, config, target, world.rank)
        frozen = freeze(detector, config.training.freeze)
        if frozen is not None and world.is_main:
            logger.info("%s", frozen.summary())
        engine = engine or engine_class(config)
        self.engine = engine(detector, config, world, lanes=len(self.lanes))
        self.statistics = RunningStatistics(self.engine.module)
        self.average = open_average(config.training.ema_decay, self.engine, self.statistics)
        self.state = self._zero_state()
        self.step = 0
        self.saved_step = 0  # of the newest checkpoint
        self.skipped = 0  # micro-batches, since the run's first step
        self.skipped_in_a_row = 0
        self.metrics: list[Tensor] = []  # of the micro-batches since the last update
        self.pending: PendingStep | None = None
        self.state_before_step = self.state
        self.stop_flag = StopFlag()
        self.has_data = True  # False: this rank has left off waiting for it
        self.left_out: PendingStep | None = None  # the first step in which a rank had no data
        self.stop = False  # whether a rank was asked to stop, as far as reports were read
        self.gradient_norm = 0.0  # of the last update that was applied
        if resumed is not None:
            self._resume(resumed.meta, resumed.snapshot)
        if world.is_main:
            _write_config(given_config, self.run_dir)
        self.writer = TensorBoardWriter(self.run_dir, enabled=world.is_main, resume_step=self.step)
        if world.is_main:
            self.attempt = record_start(self.run_dir, self.step, config.training.max_steps)
            if account is not None:
                account.write_to(
                    self.run_dir,
                    first_step=self.step,
                    starts_over=self.checkpoints.start_over,
                    ranks=world.size,
                    gpu=world.device.type == "cuda",
                )
        self.first_step_ended = False  # of this process
        self.step_started = 0.0  # as StepReport.started
        self.profiler = Profiler(
            self.run_dir, world.rank, self.writer, detector, config.training.profile
        )
        self.reporter = RunReporter(
            config,
            world,
            self.mesh,
            self.exchange,
            self.writer,
            self.profiler,
            resume_step=self.step,
            account=self.account,
        )
        self.probe_dataset: Dataset | None = None  # the evaluated split, for TensorBoard images

    def end_after_step(self) -> None:
        """Ends the run after the step that was reported last, as a stop signal does."""
        self.stop = True

    def close(self) -> None:
        """Writes the trace that is running, and closes the TensorBoard event file.

        A checkpoint that an error has interrupted is not committed.
        """
        self.checkpoints.close()
        self.reporter.close()
        self.profiler.close()
        self.writer.close()

    # -- the loop ------------------------------------------------------------------------------
    def run(self, stop_flag: StopFlag) -> Metrics | None:
        """Trains to `max_steps`; see `train`."""
        self.stop_flag = stop_flag
        self.reporter.start(self.dataset, self._detector, self.step)
        training = self.config.training
        device = self.world.device
        first = self.step * training.gradient_accumulation_steps
        wait = DataWait(stop_flag)
        read = self.loader.batches(
            first, encoded=encodes_for(device), stop_requested=wait.is_too_long
        )
        batches = device_batches(read, device)
        was_complete = self._is_last_step
        metrics = self._evaluate_if_missing(stop_flag)
        if self.world.is_main and self.step == 0 and training.log_images_every > 0:
            write_first_images(self.writer, self.loader, first, self.step)
        if was_complete:
            self.reporter.finished(self.step, self.limits)
        while not self._is_last_step:
            self.profiler.before(self.step + 1)
            batch = self._train_step(batches, wait)
            self.reporter.queued()
            self.profiler.after()
            if self.stop or self._report_is_due:
                report = self._read_report()
                self._exit_if_left_out()
                self.limits.check_time(device)
                self._after_step(report)
            self._advance_save()
            if self._checkpoint_is_due or self.stop:
                self._save()
                self._exit_if_stopped(stop_flag)
            if self._images_are_due:
                self._write_images(batch, stop_flag)
                self._exit_if_stopped(stop_flag)
            if self._evaluation_is_due:
                metrics = self._evaluate(stop_flag)
        self.account.enter(Part.ending)
        batches.close()
        self._end_save()
        self._record_done()
        # SLURM and the other ranks treat a rank that exits long before them as failed.
        barrier("end of training")
        self.account.close()
        return metrics

    def _record_done(self) -> None:
        reason = self.limits.reason
        if reason:
            self.reporter.log(
                f"ends at step {self.step} of {self.config.training.max_steps}: {reason}"
            )
        if self.world.is_main:
            append(self.run_dir, "done", step=self.step, **({"reason": reason} if reason else {}))

    @property
    def stopped_by(self) -> str:
        """What ends the run, for a message."""
        return self.stop_flag.name

    @property
    def _is_last_step(self) -> bool:
        return self.limits.is_last(self.step)

    @property
    def _evaluation_is_due(self) -> bool:
        every = self.config.training.evaluate_every
        at_end = self._is_last_step and self.config.evaluation.at_end
        return at_end or (every > 0 and self.step % every == 0)

    @property
    def _checkpoint_is_due(self) -> bool:
        """An evaluated step always has a checkpoint, and so does the last one."""
        every = self.config.checkpoint.every
        return self.step % every == 0 or self._evaluation_is_due or self._is_last_step

    @property
    def _images_are_due(self) -> bool:
        every = self.config.training.log_images_every
        return every > 0 and (self.step % every == 0 or self._is_last_step)

    @property
    def _log_is_due(self) -> bool:
        return self.reporter.is_due(self.step) or self._is_last_step

    @property
    def _report_is_due(self) -> bool:
        """Whether something at the end of this step depends on its values."""
        due = self._log_is_due or self._checkpoint_is_due or self._images_are_due
        return due or self.on_step is not None

    def _train_step(self, batches: Iterator[Batch], wait: "DataWait") -> Batch:
        """Queues all micro-batches of one optimizer step. Returns the last one."""
        training = self.config.training
        collect = self.step + 1 in self.gradient_steps
        self.state_before_step = self.state
        self.account.start_step(self.step + 1)
        clock = self.reporter.step_clock
        clock.start_step()
        ahead = batches_ahead(self.world.device)
        for number in range(1, training.gradient_accumulation_steps + 1):
            # A step is left out as a whole, so its first micro-batch decides. The one that is
            # requested now may be that of the next step.
            requested = number - 1 + ahead
            wait.start(may_end=requested % training.gradient_accumulation_steps == 0)
            clock.begin(StepPart.data)
            with self.account.part(Part.data_wait):
                batch = self._next_batch(batches, number)
            if number == 1:
                self.step_started = time.perf_counter()
            is_last = number == training.gradient_accumulation_steps
            self.micro_batch(
                batch,
                stop_requested=wait.stop_flag.is_set(),
                collect_gradients=collect and is_last,
            )
        clock.end_step()
        self.step += 1
        self.account.end_step(self.step)
        return batch

    def _next_batch(self, batches: Iterator[Batch], number: int) -> Batch:
        """The next batch; one without data if this rank has left off waiting for it.

        Args:
            number: of the micro-batch in its step, from 1.
        """
        training = self.config.training
        set_phase("waiting for data")
        requested = time.perf_counter()
        batch = None
        if self.has_data:
            try:
                batch = next(batches)
            except ReadingStoppedError:
                leave_threads_behind()
                self.has_data = False
        if batch is None:
            index = self.step * training.gradient_accumulation_steps + number - 1
            batch = self.loader.batch_without_data(index).to(self.world.device)
        self.reporter.throughput.add_wait(since=requested)
        self.reporter.add_batch(batch)
        return batch

    def micro_batch(
        self, batch: Batch, *, stop_requested: bool = False, collect_gradients: bool = False
    ) -> MicroBatchReport:
        """One forward and backward; the last micro-batch of an accumulation updates the weights.

        Args:
            stop_requested: whether this rank was asked to stop.
            collect_gradients: only in the last micro-batch of an accumulation.
        """
        set_phase(FORWARD)
        clock = self.reporter.step_clock
        clock.begin(StepPart.forward)
        self.engine.train()
        self.statistics.save()
        raw, state = self.engine(
            batch.frames,
            self.state,
            starts=batch.starts,
            labelled=batch.labelled,
            following=batch.following,
        )
        over_ranks = MicroBatchSum(
            stop_requested=stop_requested,
            has_data=self.has_data,
            is_saving=self.checkpoints.is_writing,
        )
        local_losses = detection_loss(
            raw,
            batch.boxes,
            batch.counts,
            self._detector.geometry(self.dataset.height, self.dataset.width),
            self.config.model.head,
            sum_over_ranks=over_ranks,
            regions=batch.regions,
        )
        metrics = over_ranks.metrics(local_losses)
        is_finite = torch.isfinite(metrics[0])
        set_phase(BACKWARD)
        clock.begin(StepPart.backward)
        self.engine.backward(local_losses.total * self.world.size, is_finite)
        self.statistics.restore_unless(is_finite)
        gradients = self.engine.full_gradients() if collect_gradients else {}
        self.state = zero_unless(is_finite, detach(state))
        self.metrics.append(metrics)
        if self.engine.updates_next:
            # The schedule of this update depends on whether the previous one was applied.
            self._read_pending()
        set_phase(OPTIMIZER)
        clock.begin(StepPart.update)
        update = self.engine.step()
        set_phase(Activity.training.value)
        if update is not None:
            if self.average is not None:
                self.average.update(update.applied)
            values = PendingValues(self.metrics, update)
            self.pending = PendingStep(
                self.step + 1, values, gradients, self.step_started, self.state_before_step
            )
            self.metrics = []
        return MicroBatchReport(metrics, gradients)

    def _read_report(self) -> StepReport:
        """The values of the step that was queued last."""
        report = self._read_pending()
        assert report is not None
        return report

    def _read_pending(self) -> StepReport | None:
        """Reads the values of the step that is pending, if one is; the host waits for them."""
        pending = self.pending
        if pending is None:
            return None
        self.pending = None
        values = pending.values.read()
        if values.no_data:
            self.left_out = self.left_out or pending
        else:
            self.spikes.add(pending.number, [losses.total for losses in values.losses])
            self._count_skipped(values, pending.number)
        if values.applied:
            self.engine.advance()
            if self.average is not None:
                self.average.advance()
            self.gradient_norm = values.gradient_norm
        self.stop = self.stop or values.stop
        self.checkpoints.observe(pending.number, any_writing=values.saving)
        if not self.first_step_ended:
            self.first_step_ended = True
            self.account.first_step_ended()
            if self.world.is_main:
                restarts = record_first_step(self.run_dir, self.attempt)
                self.writer.write_scalars(restarts, pending.number)
        last = values.losses[-1]
        return StepReport(
            step=pending.number,
            losses=last,
            learning_rate=self.engine.learning_rate,
            gradient_norm=self.gradient_norm,
            gradients=pending.gradients if last.is_finite else {},
            stop=values.stop,
            started=pending.started,
        )

    def _count_skipped(self, values: StepValues, step: int) -> None:
        """Counts micro-batches whose loss is not finite, and an update whose gradients are not.

        Raises:
            UserError: `max_nonfinite` in a row.
        """
        for losses in values.losses:
            if not losses.is_finite:
                self._count_one_skipped(step)
            elif values.applied:
                self.skipped_in_a_row = 0
        if not values.applied and any(losses.is_finite for losses in values.losses):
            self._count_one_skipped(step)

    def _count_one_skipped(self, step: int) -> None:
        self.skipped += 1
        self.skipped_in_a_row += 1
        limit = self.config.training.max_nonfinite
        if self.skipped_in_a_row >= limit:
            remedy = "lower optimizer.lr"
            if self.config.training.precision is not Precision.fp32:
                remedy += ", or start a new run_dir with training.precision=fp32"
            self._end_save()
            raise UserError(
                f"the loss or its gradients were not finite {limit} times in a row, last in step "
                f"{step}. The last checkpoint is in {self.checkpoints.folder}; {remedy}"
            )

    def _after_step(self, report: StepReport) -> None:
        if self.on_step is not None:
            self.on_step(report)
        if self._log_is_due:
            self.reporter.step(report, skipped=self.skipped)

    # -- state, checkpoints --------------------------------------------------------------------
    def _zero_state(self) -> DetectorState:
        return self.exchange.scatter(self._initial_state(self.world.device))

    def _initial_state(self, device: torch.device | str) -> DetectorState:
        """The canonical state of this rank's lanes: as one rank alone would hold it."""
        return self._detector.initial_state(
            len(self.lanes),
            self.dataset.height,
            self.dataset.width,
            device=device,
            dtype=self.engine.dtype,
        )

    @property
    def _detector(self) -> Detector:
        assert isinstance(self.engine.module, Detector)
        return self.engine.module

    def _used_weights(self) -> Weights:
        """The weights that are evaluated and used: their average where it is kept. A collective."""
        weights = self._weights()
        return self._averaged(weights) or weights

    def _averaged(self, weights: Weights, copy: CopyToHost = copy_now) -> Weights | None:
        """The average of the weights; None where it is not kept. A collective."""
        if self.average is None:
            return None
        tensors = self.average.state(weights.tensors, copy)
        return replace(weights, tensors=tensors, average=self.average.info)

    def _weights(self, copy: CopyToHost = copy_now) -> Weights:
        """The consolidated weights, on every rank. A collective."""
        return Weights(
            self.engine.full_state(copy),
            self.config.model,
            self.dataset.frames,
            self.dataset.classes,
            self.step,
            self.config.training.precision,
        )

    @contextmanager
    def _activity(self, activity: Activity) -> Iterator[None]:
        """Records what the run does: for the message of a job whose time limit is reached, for the
        account of its time, and for its speed, which leaves it out.
        """
        started = time.perf_counter()
        if self.world.is_main:
            write_activity(self.run_dir, activity, self.step)
        phase = set_phase(activity.value)
        with self.account.part(ACTIVITY_PARTS[activity]):
            yield
        set_phase(phase)
        if self.world.is_main:
            write_activity(self.run_dir, Activity.training, self.step)
        self.reporter.throughput.add_pause(since=started)

    def _save(self) -> None:
        end_if_taken_over(self.run_dir)
        with self._activity(Activity.saving):
            self.checkpoints.wait()  # before the copies, which take memory, too
            self._save_snapshot()
        self.saved_step = self.step

    def _advance_save(self) -> None:
        """Goes on with the checkpoint that is being written, where all ranks are done with a phase.

        A collective then.
        """
        if self.checkpoints.can_advance:
            end_if_taken_over(self.run_dir)
            with self.account.part(Part.saving):
                self.checkpoints.advance(self.step)

    def _end_save(self) -> None:
        """Waits until the checkpoint that is being written is committed. A collective."""
        if self.checkpoints.pending is not None:
            end_if_taken_over(self.run_dir)
            with self._activity(Activity.saving):
                self.checkpoints.wait()

    def _save_snapshot(self) -> None:
        # TensorBoard must not be behind the checkpoint that a resume continues from.
        self.writer.flush()
        carry = self.exchange.gather(self.state, like=self._initial_state("meta"))
        meta = {
            "skipped": self.skipped,
            "counters": self.engine.optimizer_state.counters(),
            "config": self.saved_config,
            LIMITS: self.limits.to_json(),
            RECENT_LOSSES: self.spikes.state(),
            DATA: self.data_digest,
            INIT_FROM: self.init_from,
            LAUNCHERS: self.launchers,
        }
        if self.average is not None:
            meta[AVERAGE_KEY] = self.average.info._asdict()
        is_main = self.world.is_main
        copies = HostCopies()
        copy: CopyToHost = copies if is_main else no_copy
        weights = self._weights(copy)
        average = self._averaged(weights, copy)
        moments = self.engine.optimizer_state.moments(keep=is_main, copy=copy)
        writes_carry = self.mesh.sequence == 0
        self.checkpoints.save(
            self.step,
            Snapshot(
                meta,
                weights if is_main else replace(weights, tensors={}),
                moments,
                self.lanes,
                [copies(tensor) for tensor in state_tensors(carry)] if writes_carry else None,
                average if is_main else None,
                copies=copies,
            ),
        )

    def _resume(self, meta: dict[str, Any], loaded: LoadedSnapshot) -> None:
        self.engine.load_state(loaded.weights, loaded.moments, meta["counters"])
        if self.average is not None:
            self.average.resume(loaded.average, meta.get(AVERAGE_KEY, {}), log=self.world.is_main)
        carry = state_from_tensors(
            [t.to(self.world.device) for t in loaded.carry], self._initial_state("meta")
        )
        self.state = self.exchange.scatter(carry)
        if loaded.generators is not None:
            restore_generators(loaded.generators)
        self.step = meta["step"]
        evaluated = self.checkpoints.recorded(self.step) if self.world.is_main else {}
        self.limits.resume(
            meta.get(LIMITS, {}), broadcast_json(evaluated, name="results so far").get(LIMITS, {})
        )
        self.saved_step = self.step
        self.skipped = meta["skipped"]
        self.spikes.resume(meta.get(RECENT_LOSSES))

    def _exit_if_stopped(self, stop_flag: StopFlag) -> None:
        """Ends the process if any rank was asked to stop. A collective."""
        if not self.stop:
            self.stop = stop_flag.is_set_on_any_rank(self.world.device)
        if self.stop:
            self._exit_stopped()

    def _exit_if_left_out(self) -> None:
        """Ends the process if a rank had no data, as it was before the first such step."""
        if self.left_out is None:
            return
        self.step = self.left_out.number - 1
        self.state = self.left_out.state
        self.reporter.log(
            f"{self.stopped_by} while a rank waited for the data of step {self.step + 1}"
        )
        self._exit_stopped()

    def _exit_stopped(self) -> NoReturn:
        """Ends the process on a stop signal; saves what is not saved."""
        if self.saved_step != self.step:
            self._save()
        self._end_save()
        self.reporter.log(
            f"{self.stopped_by}: saved step {self.step} in {self.checkpoints.folder}; "
            f"the same command with run_dir={self.run_dir} continues"
        )
        self.writer.close()
        if self.world.is_main:
            append(self.run_dir, "saved", step=self.step)
        self.account.close()
        raise SystemExit(STOPPED_EXIT_CODE)

    # -- images --------------------------------------------------------------------------------
    def _write_images(self, batch: Batch, stop_flag: StopFlag) -> None:
        """Rank 0 leaves them out if it is asked to stop."""
        with self._activity(Activity.images):
            weights = self._used_weights()  # a collective, so outside the condition
            if not self.world.is_main or stop_flag.is_set():
                return
            if self.probe_dataset is None:
                self.probe_dataset = open_dataset(self.config.dataset, self.config.evaluation.split)
            evaluation = protocol_of(self.config.evaluation, self.probe_dataset)
            result = probe(weights, self.probe_dataset, evaluation, self.world.device)
            if not stop_flag.is_set():
                write_images(self.writer, result, batch, self.dataset.classes, self.step)

    # -- evaluation ----------------------------------------------------------------------------
    def _evaluate_if_missing(self, stop_flag: StopFlag) -> Metrics | None:
        """Evaluates the checkpoint that was resumed, if the run was stopped before it could."""
        if self.step == 0 or not self._evaluation_is_due:
            return None
        if broadcast_json(
            self.checkpoints.evaluated(self.step), name="whether the step is evaluated"
        ):
            return None
        return self._evaluate(stop_flag)

    def _evaluate(self, stop_flag: StopFlag) -> Metrics:
        """Evaluates the step that was saved last. A collective; see `train`."""
        self._end_save()  # it may take minutes, and its metrics belong to the checkpoint
        with self._activity(Activity.evaluating):
            try:
                metrics = self._evaluate_step(stop_flag)
            except EvaluationStoppedError:
                self._exit_stopped()
        if not self._is_last_step:
            self._exit_if_stopped(stop_flag)
        return metrics

    def _evaluate_step(self, stop_flag: StopFlag) -> Metrics:
        started = time.perf_counter()
        # Building a detector draws random weights. A resumed run need not evaluate again, so the
        # generators must not depend on it.
        generators = generator_states()
        weights = self._used_weights()
        metrics, results, data, protocol = evaluate_weights(
            weights,
            self.config.dataset,
            self.config.evaluation,
            self.world,
            stop_requested=stop_flag.is_set,
        )
        restore_generators(generators)
        evaluation = ""
        if self.world.is_main:
            evaluation = evaluation_id(protocol, self.data_digest["evaluation"])
        evaluation = broadcast_json(evaluation, name="which evaluation it is")
        self.limits.evaluated(metrics.ap, evaluation)
        if self.world.is_main:
            seconds = time.perf_counter() - started
            self.reporter.evaluation(
                Evaluated(metrics, results, data, protocol, seconds, weights.kind), self.step
            )
            description = describe_evaluation(
                str(self.run_dir),
                weights,
                self.config.dataset,
                protocol,
                self.world.device,
                data=data,
            )
            write_results(
                self.run_dir / "evaluation",
                metrics,
                results,
                data,
                protocol,
                description,
            )
            description[LIMITS] = self.limits.to_metrics()
            description[EVALUATION_ID] = evaluation
            self.checkpoints.record(self.step, {**metrics.to_json(), **description})
        return metrics


def _build_loader(config: TrainConfig, dataset: Dataset, mesh: Mesh) -> Loader:
    training = config.training
    return Loader(
        dataset,
        sampling_plan(dataset, training, seed=config.seed),
        mesh.lanes(training.batch_size),
        mesh.frames(training.sequence_length),
        training,
        seed=config.seed,
        looks_back=config.model.fpn.looks_back,
    )


def _build_detector(
    config: TrainConfig, channels: int, exchange: Exchange, mesh: Mesh, device: torch.device
) -> Detector:
    """With random weights."""
    training = config.training
    execution = Execution(
        frames_per_call=training.frames_per_call,
        bptt_frames=training.bptt_frames,
        activation_checkpointing=training.activation_checkpointing,
        compile=training.compile,
        cuda_graphs=training.cuda_graphs and device.type == "cuda",
    )
    detector = Detector(config.model, channels, exchange, execution=execution)
    global_batch_norms(detector, batch_norm_reductions(config.parallel.batch_norm, mesh))
    return detector


def _write_config(config: TrainConfig, run_dir: Path) -> None:
    run_dir.mkdir(parents=True, exist_ok=True)
    text = json.dumps(plain(asdict(config)), indent=1)
    replace_file(run_dir / "config.json", text + "\n")


def _resume_from_now_on(run_dir: Path) -> None:
    """Makes a requeued attempt continue a run that was started over, instead of doing so again."""
    path = run_dir / CONFIG_FILE
    if not path.exists():  # the run was started by torchrun, with a config of its own
        return
    try:
        config = load_config(TrainConfig, path)
        config.checkpoint.resume = True
        save_config(config, path)
    except (ConfigError, OSError) as error:
        logger.warning("a requeued attempt will start over: %s", error)
