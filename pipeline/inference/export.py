"""Exports the streaming step of a trained detector, and runs the written file against it."""

from evspan.conf.schema.prep import FrameConfig
from evspan.data_prep.shards.atomic import atomic_write
from evspan.pipeline.inference import exported_step
from evspan.pipeline.inference.options import ExportOptions, ExportSummary
from evspan.pipeline.inference.trained_detector import detector_from
from evspan.pipeline.rvt_checkpoint import open_weights

GEN4_HEIGHT = 720  # pixels of the sensor
GEN4_WIDTH = 1280


def export_detector(options: ExportOptions) -> ExportSummary:
    """Writes `options.output`: ONNX if it ends in .onnx, else torch.export's .pt2.

    Raises:
        UserError: the checkpoint cannot be read, or the written file gives other numbers than
            the detector; the file is then not kept.
    """
    weights = open_weights(options.checkpoint, raw=options.weights == "raw")
    shape = frame_shape(options, weights.frames)
    batch, _, height, width = shape
    detector = detector_from(weights)
    metadata = exported_step.file_metadata(weights, detector.initial_state(batch, height, width))
    program = exported_step.trace(detector, shape)
    with atomic_write(options.output) as path:
        if options.output.suffix == ".onnx":
            exported_step.write_onnx(program, path, metadata)
            run = exported_step.run_onnx(path)
        else:
            exported_step.write_pt2(program, path, metadata)
            run = exported_step.run_pt2(path)
        differences = exported_step.check(run, detector, shape, cutoff=weights.frames.cutoff)
    return ExportSummary(
        step=weights.step,
        frames=shape,
        num_states=len(metadata["inputs"]) - 1,
        checked_frames=exported_step.STEPS,
        differences=exported_step.summarize(differences),
    )


def frame_shape(options: ExportOptions, config: FrameConfig) -> tuple[int, int, int, int]:
    """(B, 2 * bins, H, W) of the input: the options' size, else a Gen4 sensor's, downsampled."""
    height = options.height or GEN4_HEIGHT // config.downsample
    width = options.width or GEN4_WIDTH // config.downsample
    return options.batch, config.channels, height, width
