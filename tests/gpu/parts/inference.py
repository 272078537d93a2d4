"""Streaming latency with and without CUDA graphs, and evaluation in batches."""

import time
from statistics import median

import numpy as np
import torch
from evspan.conf.schema.prep import FrameConfig
from evspan.conf.schema.training import EvaluationConfig, Precision
from evspan.pipeline.benchmark.streaming import measure_evaluation, measure_streaming
from evspan.pipeline.data.datasets import open_dataset
from evspan.pipeline.inference.trained_detector import detector_from
from evspan.pipeline.model.detector import Detector
from evspan.pipeline.weights import Weights
from gpu import measure, models
from gpu.simulated import dataset_config

FRAMES = 40
CONFIDENCE = 0.004  # an untrained detector scores about 0.0001 to 0.01
TOLERANCE = 1e-3  # of scores and pixels, between the graph and the same kernels launched one by one


def run(context):
    """Adds the rows."""
    dataset = open_dataset(dataset_config(context.datasets["gen4"]), "train")
    sizes = ["micro"] if context.tiny else ["tiny", "base"]
    precisions = [Precision.fp32] if context.tiny else [Precision.tf32, Precision.bf16]
    for size in sizes:
        for precision in precisions:
            detector = _detector(context, dataset, size, precision)
            label = f"{size}, {precision.name}"
            _streaming(context, detector, dataset, label)
            _graphs(context, detector, dataset, label)
            _evaluation(context, detector, dataset, label)


def _detector(context, dataset, size, precision):
    torch.manual_seed(0)
    config = models.model_config(size)
    tensors = Detector(config, dataset.channels).state_dict()
    frames = FrameConfig(bins=dataset.frames.bins)
    weights = Weights(tensors, config, frames, dataset.classes, 0)
    return detector_from(weights, device=context.device, precision=precision)


def _streaming(context, detector, dataset, label):
    seconds = 0.5 if context.tiny else 4.0
    measured = measure_streaming(detector, dataset, device=context.device, seconds=seconds)
    context.report.measured(
        "inference",
        f"a frame, {label}",
        step_ms=measured.step.median,
        detect_ms=measured.detect.median,
        detect_ms_95=measured.detect.high,
        candidates=measured.candidates,
        **measure.row_values(measured.operations),
    )


def _graphs(context, detector, dataset, label):
    """The streaming detector with and without CUDA graphs: equal detections, and the latency."""
    if not context.on_gpu:
        context.report.skipped("inference", f"CUDA graphs, {label}", "needs a GPU")
        return
    recording = dataset.recordings[0]
    stored = recording.read(0, min(FRAMES, recording.frames))
    results = {}
    latency = {}
    for use_graphs in (False, True):
        stream = detector.frame_stream(
            1,
            dataset.height,
            dataset.width,
            confidence_threshold=CONFIDENCE,
            cuda_graphs=use_graphs,
        )
        stream.detect(torch.from_numpy(stored[:1]))
        stream.reset()
        times = []
        detections = []
        for frame in stored:
            started = time.perf_counter()
            detections += stream.detect(torch.from_numpy(frame[None]))
            times.append(1e3 * (time.perf_counter() - started))
        results[use_graphs] = detections
        latency[use_graphs] = median(times)
    context.report.compared(
        "inference",
        f"CUDA graph against single launches, {label}",
        all(map(_are_close, results[True], results[False])),
        detect_ms=latency[False],
        graph_ms=latency[True],
        detections=sum(map(len, results[False])),
    )


def _are_close(actual, expected):
    return actual.shape == expected.shape and np.allclose(
        actual.numpy(), expected.numpy(), rtol=TOLERANCE, atol=TOLERANCE
    )


def _evaluation(context, detector, dataset, label):
    config = (
        EvaluationConfig(sequence_length=2, batch_size=2) if context.tiny else EvaluationConfig()
    )
    seconds = 1.0 if context.tiny else 5.0
    measured = measure_evaluation(detector, dataset, config, device=context.device, seconds=seconds)
    context.report.measured("inference", f"evaluation, {label}", frames_per_s=measured.frames_per_s)
