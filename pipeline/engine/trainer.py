"""The training loop: one rank of it, in step with all the others."""

import json
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from evspan.conf.errors import STOPPED_EXIT_CODE, UserError
from evspan.conf.schema.layout import chosen_exchange
from evspan.conf.schema.training import TrainConfig
from evspan.pipeline.data.datasets import Dataset, open_dataset
from evspan.pipeline.data.loader import Batch, Loader
from evspan.pipeline.data.plan import SamplingPlan
from evspan.pipeline.engine.attempt import Attempt
from evspan.pipeline.engine.checkpoints import FORM, Checkpoints, Snapshot, load_snapshot
from evspan.pipeline.engine.deepspeed_engine import ZeroEngine
from evspan.pipeline.engine.evaluator import described, evaluate_weights, write_results
from evspan.pipeline.engine.oom import telling_knobs
from evspan.pipeline.engine.profiling import Profiler
from evspan.pipeline.engine.resources import Resources, over_ranks
from evspan.pipeline.engine.signals import StopFlag, stop_flag
from evspan.pipeline.evaluation.coco import Metrics
from evspan.pipeline.history import append, write_progress
from evspan.pipeline.inference.trained_detector import load_tensors
from evspan.pipeline.model.detector import Detector
from evspan.pipeline.model.loss import detection_loss
from evspan.pipeline.model.norm import RankReductions, global_batch_norms
from evspan.pipeline.model.state import DetectorState, detach, state_from_tensors, state_tensors
from evspan.pipeline.parallel.exchange import open_exchange
from evspan.pipeline.parallel.mesh import open_mesh
from evspan.pipeline.parallel.reductions import (
    barrier,
    broadcast_object,
    gather_over_ranks,
    sum_over_ranks,
)
from evspan.pipeline.parallel.world import World
from evspan.pipeline.tensorboard.attention_probe import look
from evspan.pipeline.tensorboard.run_info import environment
from evspan.pipeline.tensorboard.summaries import tell_evaluation, tell_look, tell_start
from evspan.pipeline.tensorboard.writer import Monitor, Stopwatch
from evspan.pipeline.weights import (
    Weights,
    generator_states,
    load_weights,
    plain,
    restore_generators,
    seed_everything,
)
from torch import Tensor

PROFILE = "profile"  # what ranks tell each other of a request for a trace


def train(config: TrainConfig, world: World) -> Metrics | None:
    """Train to `max_steps`, resuming where the run's newest checkpoint stands; returns the last evaluation's metrics.

    Raises:
        UserError: bad data, a checkpoint of another batch or model, too many non-finite losses in a row, or too little memory.
        SystemExit: a stop signal came and everything was saved.
    """
    with telling_knobs(config, world):
        trainer = Trainer(config, world)
        try:
            with stop_flag() as flag:
                return trainer.run(flag)
        finally:
            trainer.profiler.close()
            trainer.monitor.close()


class Trainer:
    """One rank of a run.

    Args:
        engine: what steps the model.
    """

    def __init__(
        self, config: TrainConfig, world: World, engine: type[ZeroEngine] = ZeroEngine
    ) -> None:
        self.config, self.world, self.run_dir = config, world, Path(config.run_dir)
        mesh = self.mesh = open_mesh(
            world, sequence=config.parallel.sequence, timeout_s=config.parallel.timeout_s
        )
        self.lanes, length = mesh.lanes(config.training.batch_size), config.training.sequence_length
        self.exchange = open_exchange(
            config.parallel.exchange,
            mesh,
            sequence_length=length,
            dws_conv=config.model.backbone.dws_conv,
        )
        seed_everything(config.seed)
        self.dataset = open_dataset(config.dataset, "train")
        plan = SamplingPlan(
            [r.frames for r in self.dataset.recordings],
            [r.labelled for r in self.dataset.recordings],
            lanes=config.training.batch_size,
            sequence_length=length,
            sampling=config.training.sampling,
            seed=config.seed,
        )
        self.loader = Loader(
            self.dataset, plan, self.lanes, mesh.frames(length), config.training, seed=config.seed
        )
        detector = Detector(config.model, self.dataset.channels, self.exchange)
        if config.checkpoint.init_from:
            load_tensors(detector, load_weights(config.checkpoint.init_from))
        backbone, asked = detector.backbone, config.training
        backbone.frames_per_call, backbone.recompute = (
            asked.frames_per_call,
            asked.activation_checkpointing,
        )
        backbone.bptt_frames = asked.bptt_frames
        if asked.compile:
            backbone.compile_spatial()
        if world.size > 1:
            global_batch_norms(detector, RankReductions(gather_over_ranks, sum_over_ranks))
        self.engine = engine(detector, config, world, lanes=len(self.lanes))
        self.state = self._zero_state()
        self.checkpoints = Checkpoints(
            self.run_dir,
            rank=world.rank,
            keep=config.checkpoint.keep,
            anew=not config.checkpoint.resume,
        )
        self.step, self.skipped, self.skipped_in_a_row = 0, 0, 0
        if config.checkpoint.resume:
            self._resume()
        if world.is_main:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            (self.run_dir / "config.json").write_text(
                json.dumps(plain(asdict(config)), indent=1) + "\n"
            )
        self.monitor = Monitor(self.run_dir, enabled=world.is_main, resume_step=self.step)
        self.attempt = (
            Attempt(self.run_dir, self.step, config.training.max_steps) if world.is_main else None
        )
        self.profiler = Profiler(
            self.run_dir, world.rank, self.monitor, detector, config.training.profile
        )
        self.resources = Resources(world.device)
        self.watched: Dataset | None = None  # the evaluated split, once pictures of it are wanted

    # -- the loop ------------------------------------------------------------------------------------------------
    def run(self, flag: StopFlag) -> Metrics | None:
        config, accumulation = (
            self.config.training,
            self.config.training.gradient_accumulation_steps,
        )
        self._say_hello()
        batches, watch, metrics = self.loader.batches(self.step * accumulation), Stopwatch(), None
        if (
            self.step
            and self._evaluates
            and not broadcast_object(self.checkpoints.evaluated(self.step))
        ):
            metrics = self._evaluate()  # the run was killed before it had
        while self.step < config.max_steps:
            self.profiler.before(self.step + 1)
            for _ in range(accumulation):
                asked = time.perf_counter()
                batch = next(batches).to(self.world.device)
                watch.wait(asked)
                told, stop = self._micro_batch(batch, flag.received is not None)
            watch.frames += config.batch_size * config.sequence_length * accumulation
            self.step += 1
            self.profiler.after()
            done = self.step == config.max_steps
            if self.attempt and not self.attempt.running:
                self.monitor.scalars(self.attempt.began_to_run(), self.step)
            if self.step % config.log_every == 0 or done:
                self._log(told, watch)
            if self.step % self.config.checkpoint.every == 0 or self._evaluates or stop:
                self._save()
            if stop and not done:
                self._stop(flag)
            if (every := config.log_images_every) and (self.step % every == 0 or done):
                self._show(batch)
            if self._evaluates:
                metrics = self._evaluate()
        batches.close()  # type: ignore[attr-defined]
        if self.attempt:
            append(self.run_dir, "done", step=self.step)
        barrier()  # who leaves long before the others is taken for dead, by SLURM too
        return metrics

    def _micro_batch(self, batch: Batch, stop: bool) -> tuple[Tensor, bool]:
        """One forward, backward and step. Returns the losses over all ranks, and whether any rank was told to stop."""
        self.engine.train()
        raw, state = self.engine(
            batch.frames, self.state, starts=batch.starts, labelled=batch.labelled
        )
        geometry = self._detector.geometry(self.dataset.height, self.dataset.width)
        losses = detection_loss(
            raw,
            batch.boxes,
            batch.counts,
            geometry,
            self.config.model.head,
            sum_over_ranks=sum_over_ranks,
        )
        # One small sum tells the losses, whether one is bad anywhere, and whether to stop: all ranks then do the same.
        told = sum_over_ranks(
            torch.stack(
                [
                    losses.total,
                    losses.iou,
                    losses.objectness,
                    losses.classes,
                    losses.total.new_tensor(float(stop)),
                ]
            ).detach()
        )
        total, *_, stops = (
            told.tolist()
        )  # the one place in a step where the host waits for the device
        if math.isfinite(total):
            self.engine.backward(losses.total * self.world.size)
            self.engine.step()
            self.state, self.skipped_in_a_row = detach(state), 0
        else:
            self._skip()
        return torch.cat((told[:4], losses.positives.reshape(1).to(told))), stops > 0

    def _skip(self) -> None:
        """A bad loss must reach neither the weights nor, through the carry, the next chunk."""
        self.engine.skip()
        self.state = self._zero_state()
        self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1
        limit = self.config.training.max_nonfinite
        if self.skipped_in_a_row >= limit:
            raise UserError(
                f"the loss was not finite {limit} times in a row, last in step {self.step}. The checkpoint before "
                f"stands in {self.checkpoints.folder}; lower optimizer.lr, or set training.precision=fp32"
            )

    # -- state, checkpoints --------------------------------------------------------------------------------------
    def _zero_state(self) -> DetectorState:
        return self.exchange.scatter(self._initial_state(self.world.device))

    def _initial_state(self, device: torch.device | str) -> DetectorState:
        """Canonical: as one rank would hold it."""
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

    def _weights(self) -> Weights:
        return Weights(
            self.engine.full_state(),
            self.config.model,
            self.dataset.frames,
            self.dataset.classes,
            self.step,
        )

    @property
    def _evaluates(self) -> bool:
        """Whether this step ends in an evaluation: of a checkpoint, which is saved before."""
        every = self.config.training.evaluate_every
        return self.step == self.config.training.max_steps or (every > 0 and self.step % every == 0)

    def _save(self) -> None:
        self.monitor.flush()  # what is resumed from must not be ahead of what was told
        carry = self.exchange.gather(self.state, like=self._initial_state("meta"))
        meta = {
            "skipped": self.skipped,
            "counters": self.engine.memory.counters(),
            "config": plain(asdict(self.config)),
        }
        moments = self.engine.memory.moments(keep=self.world.is_main)
        self.checkpoints.save(
            self.step,
            Snapshot(
                meta,
                self._weights(),
                moments,
                self.lanes,
                state_tensors(carry) if self.mesh.sequence == 0 else None,
            ),
        )

    def _resume(self) -> None:
        if (found := self.checkpoints.find()) is None:
            return
        folder, meta = found
        self._check_continues(folder, meta)
        loaded = load_snapshot(folder, self.lanes, self.world.rank)
        self.engine.load_state(loaded.weights, loaded.moments, meta["counters"])
        carry = state_from_tensors(
            [t.to(self.world.device) for t in loaded.carry], self._initial_state("meta")
        )
        self.state = self.exchange.scatter(carry)
        if loaded.generators is not None:
            restore_generators(loaded.generators)
        self.step, self.skipped = meta["step"], meta["skipped"]

    def _check_continues(self, folder: Path, meta: dict[str, Any]) -> None:
        if meta.get("form") != FORM:
            raise UserError(
                f"{folder} was saved by another version of evspan, in a form that this one cannot continue. "
                f"Start from its weights: run_dir=NEW checkpoint.init_from={folder}"
            )
        was, now = meta["config"], plain(asdict(self.config))
        for group, keys in (
            (
                "training",
                (
                    "batch_size",
                    "sequence_length",
                    "gradient_accumulation_steps",
                    "sampling",
                    "max_steps",
                    "precision",
                ),
            ),
            ("model", ("backbone", "fpn", "head")),
        ):
            for key in keys:
                if was[group][key] != now[group][key]:
                    raise UserError(
                        f"{folder} was saved with {group}.{key}={was[group][key]}, this run has {now[group][key]}, "
                        "so it cannot continue it. Give the old value, or another run_dir"
                    )

    def _stop(self, flag: StopFlag) -> None:
        self.monitor.say(
            f"stop signal: saved step {self.step} in {self.checkpoints.folder}; the same command continues"
        )
        self.monitor.close()
        if self.world.is_main:
            append(self.run_dir, "saved", step=self.step)
            flag.hand_on()
        raise SystemExit(STOPPED_EXIT_CODE)

    # -- telling -------------------------------------------------------------------------------------------------
    def _say_hello(self) -> None:
        parameters = (
            sum(p.numel() for p in self._detector.parameters())
            if self.config.deepspeed.stage < 3
            else None
        )
        size = f", {parameters:,} parameters" if parameters else ""
        at = f"resumes at step {self.step}" if self.step else "starts"
        self.monitor.say(
            f"{self.run_dir}: {at} of {self.config.training.max_steps}; {self._layout()}, "
            f"{len(self.dataset.recordings)} recordings, {sum(r.frames for r in self.dataset.recordings)} "
            f"frames{size}"
        )
        self.monitor.say(f"watch it: tensorboard --logdir {self.run_dir}")
        where = environment(self.world)
        if self.world.is_main:
            tell_start(
                self.monitor,
                self.config,
                self.dataset.classes,
                [n for n, _ in self._detector.named_parameters()],
                where,
                self.step,
                gpu=self.world.device.type == "cuda",
            )

    def _layout(self) -> str:
        mesh, kind = (
            self.mesh,
            chosen_exchange(
                self.config.parallel.exchange, dws_conv=self.config.model.backbone.dws_conv
            ),
        )
        shared = (
            f" x {mesh.sequence_size} sequence, exchange {kind.name}"
            if mesh.sequence_size > 1
            else ""
        )
        return (
            f"{self.world.size} ranks = {mesh.data_size} data{shared}"
            if self.world.size > 1
            else "1 rank"
        )

    def _log(self, told: Tensor, watch: Stopwatch) -> None:
        total, iou, objectness, classes, positives = told.tolist()
        exchanging, (speed, waiting, passed) = self.exchange.clock.read(), watch.report()
        mine = {
            "speed/data_wait_fraction": waiting,
            PROFILE: float(self.profiler.requested()),
            **self.resources.read(),
        }
        if self.mesh.sequence_size > 1:
            mine["speed/exchange_fraction"] = exchanging / passed
        of_all = over_ranks(mine, self.world.device)
        if asked := int(of_all.pop(PROFILE)):
            self.profiler.ask(self.step + 2, asked)
        frames = (
            self.config.training.batch_size
            * self.config.training.sequence_length
            * self.config.training.gradient_accumulation_steps
        )
        self.monitor.scalars(
            {
                "loss/total": total,
                "loss/iou": iou,
                "loss/objectness": objectness,
                "loss/class": classes,
                "train/positives": positives,
                "train/learning_rate": self.engine.learning_rate,
                "train/gradient_norm": self.engine.gradient_norm,
                "train/skipped_steps": self.skipped,
                "speed/frames_per_s": speed,
                "speed/step_ms": 1000 * frames / speed,
                **of_all,
            },
            self.step,
        )
        self.monitor.say(
            f"step {self.step:6d}  loss {total:8.4f}  iou {iou:7.4f}  obj {objectness:7.4f}  cls {classes:7.4f}  "
            f"lr {self.engine.learning_rate:.2e}  |g| {self.engine.gradient_norm:7.3f}  {speed:6.1f} frames/s  "
            f"data wait {of_all['speed/data_wait_fraction']:4.0%}"
        )
        if self.attempt:
            write_progress(
                self.run_dir,
                {
                    "step": self.step,
                    "of": self.config.training.max_steps,
                    "loss": total,
                    "frames_per_s": speed,
                    "seconds_per_step": frames / speed if speed else None,
                },
            )

    def _show(self, batch: Batch) -> None:
        weights = self._weights()  # of all ranks
        if self.world.is_main:
            self.watched = self.watched or open_dataset(
                self.config.dataset, self.config.evaluation.split
            )
            seen = look(weights, self.watched, self.config.evaluation, self.world.device)
            tell_look(self.monitor, seen, batch, self.dataset.classes, self.step)

    def _evaluate(self) -> Metrics:
        began = time.perf_counter()
        generators = (
            generator_states()
        )  # a detector that is built draws weights; a resumed run need not evaluate again
        weights = self._weights()
        metrics, results, data = evaluate_weights(
            weights, self.config.dataset, self.config.evaluation, self.world
        )
        restore_generators(generators)
        if self.world.is_main:
            self.monitor.scalars(
                {f"evaluation/{k}": v for k, v in metrics.scalars().items()}, self.step
            )
            tell_evaluation(self.monitor, results, data, self.config, self.step)
            self.monitor.say(
                f"evaluation at step {self.step} ({time.perf_counter() - began:.0f} s)\n{metrics.table()}"
            )
            about = described(
                str(self.run_dir), weights, self.config.dataset, self.config.evaluation
            )
            write_results(
                self.run_dir / "evaluation", metrics, results, data, self.config.evaluation, about
            )
            self.checkpoints.record(self.step, {**metrics.to_json(), **about})
        return metrics
