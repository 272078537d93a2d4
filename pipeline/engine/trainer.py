"""The training loop: one rank of it, in step with all the others."""

import json
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_prep.errors import UserError
from pipeline.checkpoint import (
    Checkpoints,
    Weights,
    generator_states,
    load_sidecar,
    load_weights,
    plain,
    restore_generators,
    seed_everything,
)
from pipeline.config import TrainConfig
from pipeline.data.datasets import open_dataset
from pipeline.data.loader import Batch, Loader
from pipeline.data.plan import SamplingPlan
from pipeline.engine.build import load_tensors
from pipeline.engine.evaluator import evaluate_weights, write_results
from pipeline.engine.pictures import evaluation_picture, training_picture
from pipeline.engine.signals import StopFlag, stop_flag
from pipeline.engine.zero import ZeroEngine
from pipeline.evaluation.coco import Metrics
from pipeline.model.detector import Detector
from pipeline.model.loss import detection_loss
from pipeline.model.norm import RankReductions, global_batch_norms
from pipeline.model.state import DetectorState, detach, state_from_tensors, state_tensors
from pipeline.monitor import Monitor, Stopwatch
from pipeline.parallel.reductions import gather_over_ranks, sum_over_ranks
from pipeline.parallel.world import World

STOPPED_EXIT_CODE = 75  # EX_TEMPFAIL: saved on a stop signal; the same command continues


def train(config: TrainConfig, world: World) -> Metrics | None:
    """Train to `max_steps`, resuming where the run's newest checkpoint stands; returns the last evaluation's metrics.

    Raises:
        UserError: bad data, a checkpoint of another layout, or too many non-finite losses in a row.
        SystemExit: a stop signal came and everything was saved.
    """
    trainer = Trainer(config, world)
    try:
        with stop_flag() as flag:
            return trainer.run(flag)
    finally:
        trainer.monitor.close()


class Trainer:
    def __init__(self, config: TrainConfig, world: World) -> None:
        self.config, self.world, self.run_dir = config, world, Path(config.run_dir)
        self.lanes = world.lanes(config.training.batch_size)
        seed_everything(config.seed)
        self.dataset = open_dataset(config.dataset, "train")
        plan = SamplingPlan([r.frames for r in self.dataset.recordings], [r.labelled for r in self.dataset.recordings],
                            lanes=config.training.batch_size, sequence_length=config.training.sequence_length,
                            sampling=config.training.sampling, seed=config.seed)
        self.loader = Loader(self.dataset, plan, self.lanes, config.training, seed=config.seed)
        detector = Detector(config.model, self.dataset.channels)
        if config.checkpoint.init_from:
            load_tensors(detector, load_weights(config.checkpoint.init_from))
        if world.size > 1:
            global_batch_norms(detector, RankReductions(gather_over_ranks, sum_over_ranks))
        self.engine = ZeroEngine(detector, config, world, lanes=len(self.lanes))
        self.state = self._zero_state()
        self.checkpoints = Checkpoints(self.run_dir, rank=world.rank, keep=config.checkpoint.keep)
        self.step, self.skipped, self.skipped_in_a_row = 0, 0, 0
        if config.checkpoint.resume:
            self._resume()
        if world.is_main:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            (self.run_dir / "config.json").write_text(json.dumps(plain(asdict(config)), indent=1) + "\n")
        self.monitor = Monitor(self.run_dir, enabled=world.is_main, resume_step=self.step)

    # -- the loop ------------------------------------------------------------------------------------------------
    def run(self, flag: StopFlag) -> Metrics | None:
        config, accumulation = self.config.training, self.config.training.accumulation
        self._say_hello()
        batches, watch, metrics = self.loader.batches(self.step * accumulation), Stopwatch(), None
        while self.step < config.max_steps:
            for _ in range(accumulation):
                asked = time.perf_counter()
                batch = next(batches).to(self.world.device)
                watch.wait(asked)
                told, stop = self._micro_batch(batch, flag.received is not None)
            watch.frames += config.batch_size * config.sequence_length * accumulation
            self.step += 1
            done = self.step == config.max_steps
            if self.step % config.log_every == 0 or done:
                self._log(told, watch)
            if self.step % self.config.checkpoint.every == 0 or done or stop:
                self._save()
                self._show(batch)
            if stop and not done:
                self._stop(flag)
            if done or (config.evaluate_every and self.step % config.evaluate_every == 0):
                metrics = self._evaluate()
        batches.close()  # type: ignore[attr-defined]
        return metrics

    def _micro_batch(self, batch: Batch, stop: bool) -> tuple[Tensor, bool]:
        """One forward, backward and step. Returns the losses over all ranks, and whether any rank was told to stop."""
        self.engine.train()
        raw, state = self.engine(batch.frames, self.state, starts=batch.starts, labelled=batch.labelled)
        geometry = self._detector.geometry(self.dataset.height, self.dataset.width)
        losses = detection_loss(raw, batch.boxes, batch.counts, geometry, self.config.model.head,
                                sum_over_ranks=sum_over_ranks)
        # One small sum tells the losses, whether one is bad anywhere, and whether to stop: all ranks then do the same.
        told = sum_over_ranks(torch.stack([losses.total, losses.iou, losses.objectness, losses.classes,
                                           losses.total.new_tensor(float(stop))]).detach())
        stop = bool(told[-1] > 0)
        if math.isfinite(float(told[0])):
            self.engine.backward(losses.total * self.world.size)
            self.engine.step()
            self.state, self.skipped_in_a_row = detach(state), 0
        else:
            self._skip()
        return torch.cat((told[:4], losses.positives.reshape(1).to(told))), stop

    def _skip(self) -> None:
        """A bad loss must reach neither the weights nor, through the carry, the next chunk."""
        self.state = self._zero_state()
        self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1
        limit = self.config.training.max_nonfinite
        if self.skipped_in_a_row >= limit:
            raise UserError(f"the loss was not finite {limit} times in a row, last in step {self.step}. The checkpoint before "
                            f"stands in {self.checkpoints.folder}; lower optimizer.lr, or set training.precision=fp32")

    # -- state, checkpoints --------------------------------------------------------------------------------------
    def _zero_state(self) -> DetectorState:
        return self._detector.initial_state(len(self.lanes), self.dataset.height, self.dataset.width,
                                            device=self.world.device, dtype=self.engine.dtype)

    @property
    def _detector(self) -> Detector:
        return self.engine.engine.module

    def _weights(self) -> Weights:
        return Weights(self.engine.full_state(), self.config.model, self.dataset.frames, self.dataset.classes, self.step)

    def _save(self) -> None:
        sidecar = {"generators": generator_states(), "lanes": [self.lanes.start, self.lanes.stop], "skipped": self.skipped,
                   "carry": [t.cpu() for t in state_tensors(self.state)]}
        meta = {"world": self.world.size, "stage": self.config.deepspeed.stage, "config": plain(asdict(self.config))}
        self.checkpoints.save(self.step, meta=meta, sidecar=sidecar, weights=self._weights, save_engine=self.engine.save)

    def _resume(self) -> None:
        if (found := self.checkpoints.find()) is None:
            return
        folder, meta = found
        self._check_layout(folder, meta)
        self.engine.load(folder / "engine")
        sidecar = load_sidecar(folder, self.world.rank)
        like = self.state
        self.state = state_from_tensors([t.to(self.world.device) for t in sidecar["carry"]], like)
        restore_generators(sidecar["generators"])
        self.step, self.skipped = meta["step"], sidecar["skipped"]

    def _check_layout(self, folder: Path, meta: dict[str, Any]) -> None:
        ours = {"world": self.world.size, "stage": self.config.deepspeed.stage}
        for key, remedy in (("world", "parallel.ranks"), ("stage", "deepspeed.stage")):
            if meta[key] != ours[key]:
                raise UserError(f"{folder} was saved with {remedy}={meta[key]}, this run has {ours[key]}. Resume with {remedy}="
                                f"{meta[key]}, or start from its weights: run_dir=NEW checkpoint.init_from={folder}")
        was, now = meta["config"], plain(asdict(self.config))
        for group, keys in (("training", ("batch_size", "sequence_length", "accumulation", "sampling", "max_steps", "precision")),
                            ("model", ("backbone", "fpn", "head"))):
            for key in keys:
                if was[group][key] != now[group][key]:
                    raise UserError(f"{folder} was saved with {group}.{key}={was[group][key]}, this run has {now[group][key]}, "
                                    "so it cannot continue it. Give the old value, or another run_dir")

    def _stop(self, flag: StopFlag) -> None:
        self.monitor.say(f"stop signal: saved step {self.step} in {self.checkpoints.folder}; the same command continues")
        self.monitor.close()
        if self.world.is_main:
            flag.hand_on()
        raise SystemExit(STOPPED_EXIT_CODE)

    # -- telling -------------------------------------------------------------------------------------------------
    def _say_hello(self) -> None:
        parameters = sum(p.numel() for p in self._detector.parameters()) if self.config.deepspeed.stage < 3 else None
        size = f", {parameters:,} parameters" if parameters else ""
        at = f"resumes at step {self.step}" if self.step else "starts"
        self.monitor.say(f"{self.run_dir}: {at} of {self.config.training.max_steps}; {self.world.size} rank(s), "
                         f"{len(self.dataset.recordings)} recordings, {sum(r.frames for r in self.dataset.recordings)} "
                         f"frames{size}")
        self.monitor.say(f"watch it: tensorboard --logdir {self.run_dir}")

    def _log(self, told: Tensor, watch: Stopwatch) -> None:
        total, iou, objectness, classes, positives = told.tolist()
        speed, waiting = watch.report()
        self.monitor.scalars({
            "loss/total": total, "loss/iou": iou, "loss/objectness": objectness, "loss/class": classes,
            "train/positives": positives, "train/learning_rate": self.engine.learning_rate,
            "train/gradient_norm": self.engine.gradient_norm, "train/skipped_steps": self.skipped,
            "speed/frames_per_s": speed, "speed/data_wait_share": waiting}, self.step)
        self.monitor.say(f"step {self.step:6d}  loss {total:8.4f}  iou {iou:7.4f}  obj {objectness:7.4f}  cls {classes:7.4f}  "
                         f"lr {self.engine.learning_rate:.2e}  |g| {self.engine.gradient_norm:7.3f}  {speed:6.1f} frames/s  "
                         f"data wait {waiting:4.0%}")

    def _show(self, batch: Batch) -> None:
        if self.world.is_main and (rgb := training_picture(batch, self.dataset.classes)) is not None:
            self.monitor.picture("training/boxes", rgb, self.step)

    def _evaluate(self) -> Metrics:
        began = time.perf_counter()
        metrics, results, data = evaluate_weights(self._weights(), self.config.dataset, self.config.evaluation, self.world)
        if self.world.is_main:
            self.monitor.scalars({f"evaluation/{k}": v for k, v in metrics.scalars().items()}, self.step)
            if (rgb := evaluation_picture(results, data)) is not None:
                self.monitor.picture("evaluation/boxes_green_detections_orange", rgb, self.step)
            self.monitor.say(f"evaluation at step {self.step} ({time.perf_counter() - began:.0f} s)\n{metrics.table()}")
            about = {"checkpoint": str(self.run_dir), "step": self.step, "split": self.config.evaluation.split}
            write_results(self.run_dir / "evaluation", metrics, results, data, self.config.evaluation, about)
        return metrics
