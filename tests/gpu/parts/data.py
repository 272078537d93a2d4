"""The way of frames to the device: loader, copy, expansion there."""

from dataclasses import replace

import torch
from evspan.conf.compose import compose
from evspan.conf.schema.training import AugmentationConfig, TrainConfig, TrainingConfig
from evspan.pipeline.benchmark.loading import measure_loader, usable_cores
from evspan.pipeline.data.datasets import open_dataset
from evspan.pipeline.data.loader import Loader
from evspan.pipeline.data.plan import SamplingPlan
from gpu import measure
from gpu.simulated import dataset_config


def run(context):
    """Adds the rows."""
    lanes, frames = (2, 2) if context.tiny else (24, 5)
    dataset = open_dataset(dataset_config(context.datasets["gen4"]), "train")
    config = TrainingConfig(
        batch_size=lanes,
        sequence_length=frames,
        augmentation=AugmentationConfig(zoom_prob=1.0),
    )
    strong = compose(TrainConfig, ["augmentation=strong"]).training.augmentation
    plan = SamplingPlan(
        [recording.frames for recording in dataset.recordings],
        [recording.labelled for recording in dataset.recordings],
        lanes=lanes,
        sequence_length=frames,
        sampling=config.sampling,
        seed=0,
    )
    loader = Loader(dataset, plan, range(lanes), range(frames), config, seed=0)
    _expansion(context, loader, "expansion on the device equals the CPU's frames")
    strong_loader = Loader(
        dataset, plan, range(lanes), range(frames), replace(config, augmentation=strong), seed=0
    )
    _expansion(context, strong_loader, "the same, augmentation=strong")
    _threads(context, loader)


def _expansion(context, loader, label):
    """Encoded batches, copied and expanded, against the dense ones of the CPU."""
    device = context.device
    dense = loader.batch(0)
    encoded = loader.encoded_batch(0)
    expanded = encoded.to(device).expand()
    equal = [
        torch.equal(actual.cpu(), expected)
        for actual, expected in zip(expanded, dense, strict=True)
    ]
    num_frames = dense.frames.shape[0] * dense.frames.shape[1]
    repeats = 3 if context.tiny else 10
    on_device = encoded.to(device)
    copy_s = measure.seconds(lambda: encoded.to(device), device, repeats=repeats)
    expand_s = measure.seconds(on_device.expand, device, repeats=repeats)
    dense_s = measure.seconds(lambda: dense.frames.to(device), device, repeats=repeats)
    counted = measure.counts(lambda: encoded.to(device).expand(), device)
    context.report.compared(
        "data",
        label,
        all(equal) and bool(dense.frames.any()),
        expand_ms=1e3 * expand_s,
        copy_ms=1e3 * copy_s,
        frames_per_s=num_frames / (copy_s + expand_s),
        encoded_mb=encoded.packed.buffer.numel() / 1e6,
        dense_mb=dense.frames.numel() / 1e6,
        dense_copy_ms=1e3 * dense_s,
        **counted,
    )


def _threads(context, loader):
    numbers = [1] if context.tiny else [n for n in (1, 2, 4, 8, 12) if n <= usable_cores()]
    seconds = 0.5 if context.tiny else 2.0 * len(numbers)
    for kind, device in (("encoded", torch.device("cuda")), ("dense", torch.device("cpu"))):
        for speed in measure_loader(loader, device=device, seconds=seconds, threads=numbers):
            label = f"loader, {kind} frames, {speed.threads} threads"
            context.report.measured("data", label, frames_per_s=speed.frames_per_s)
