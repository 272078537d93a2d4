"""Pictures of augmentations: one example of each, and what the first micro-batch got."""

from collections.abc import Sequence
from copy import copy

import numpy as np
from evspan.conf.schema.training import AugmentationConfig
from evspan.data_prep.draw import RGB, draw_boxes, draw_label, frame_to_rgb
from evspan.data_prep.frames.pixel_map import DROP_ONE
from evspan.pipeline.data.augment import (
    Augmentation,
    augment_boxes,
    augment_frames,
    draw_patches,
    hot_pixels,
    noise_events,
)
from evspan.pipeline.data.boxes import to_center
from evspan.pipeline.data.datasets import Dataset, RecordingData
from evspan.pipeline.data.loader import Loader
from evspan.pipeline.tensorboard.images import GREEN, NUM_TILES, tiled, upscale_of
from numpy.typing import NDArray

TURN = 2 / 3  # of the largest angle, in the examples


def augmentation_examples(
    config: AugmentationConfig, height: int, width: int, frame_us: int
) -> dict[str, Augmentation]:
    """An example of every augmentation that the config has, with large amounts.

    Args:
        height, width, frame_us: of the frames.

    Returns:
        Name -> augmentation.
    """
    pixels = height * width
    patches = draw_patches(config, np.random.default_rng(2), height, width)
    down = config.translate_fraction * height
    right = config.translate_fraction * width
    noise = noise_events(config.noise_hz, pixels, frame_us)
    examples = {
        "flip": (config.hflip_prob, Augmentation(flip=True)),
        "zoom in": (config.zoom_prob, _zoomed(config.zoom_in, height, width)),
        "zoom out": (config.zoom_prob, _zoomed(1 / config.zoom_out, height, width)),
        "rotation": (config.rotate_prob, Augmentation(rotation=TURN * config.rotate_degrees)),
        "shear": (config.shear_prob, Augmentation(shear=TURN * config.shear_degrees)),
        "translation": (config.translate_prob, Augmentation(top=down, left=right)),
        "polarity flip": (config.polarity_flip_prob, Augmentation(polarity_flip=True)),
        "lost events": (
            config.drop_prob,
            Augmentation(drop=round(config.drop_fraction * DROP_ONE), key=1),
        ),
        "noise": (config.noise_prob, Augmentation(noise=noise, key=1)),
        "hot pixels": (
            config.hot_prob,
            Augmentation(hot=hot_pixels(config.hot_pixels, np.random.default_rng(2), pixels)),
        ),
        "erased patches": (config.erase_prob, Augmentation(patches=patches)),
    }
    return {name: how for name, (probability, how) in examples.items() if probability > 0}


def _zoomed(zoom: float, height: int, width: int) -> Augmentation:
    """Zooms about the centre."""
    return Augmentation(zoom=zoom, top=height * (1 - zoom) / 2, left=width * (1 - zoom) / 2)


def example_tiles(dataset: Dataset, config: AugmentationConfig) -> list[RGB]:
    """A labelled frame as it is stored, and under every augmentation of the config, named.

    Returns:
        (H, W, 3) uint8 each; none where no frame has boxes.
    """
    found = _frame_with_boxes(dataset)
    if found is None:
        return []
    recording, index = found
    frame = recording.read(index, index + 1)
    boxes = to_center(recording.boxes(index))
    height, width = dataset.height, dataset.width
    examples = {"as stored": Augmentation()}
    examples |= augmentation_examples(config, height, width, dataset.frames.window_us)
    tiles = []
    for name, how in examples.items():
        augmented = np.zeros_like(frame)
        augment_frames(frame, how, augmented, index)
        moved = augment_boxes(
            boxes, how, height=height, width=width, min_visible=config.min_visible
        )
        tiles.append(_tile(augmented[0], moved, dataset.classes, name))
    return tiles


def _frame_with_boxes(dataset: Dataset) -> tuple[RecordingData, int] | None:
    """The frame with the most boxes, in the first recording that has any."""
    for recording in dataset.recordings:
        _, frame_of_box = recording.all_boxes()
        num_boxes = np.bincount(frame_of_box, minlength=recording.frames) * recording.labelled
        if num_boxes.any():
            return recording, int(num_boxes.argmax())
    return None


def first_batch_tiles(loader: Loader, index: int) -> list[RGB]:
    """The last frame of the first lanes of a micro-batch, with boxes, and what was drawn for it."""
    shown = copy(loader)
    shown.lanes = loader.lanes[:NUM_TILES]
    batch = shown.batch(index)
    classes = loader.dataset.classes
    labelled = batch.labelled.nonzero().tolist()
    tiles = []
    for lane, how in enumerate(shown.augmentations(index)):
        rows = [row for row, (_, b) in enumerate(labelled) if b == lane]
        boxes = np.zeros((0, 5), np.float32)
        time = len(batch.frames) - 1
        if rows:
            time = labelled[rows[-1]][0]
            boxes = batch.boxes[rows[-1], : batch.counts[rows[-1]]].numpy()
        tiles.append(_tile(batch.frames[time, lane].numpy(), boxes, classes, how.summary()))
    return tiles


def _tile(
    frame: NDArray[np.uint8], boxes: NDArray[np.float32], classes: Sequence[str], label: str
) -> RGB:
    """A frame (C, H, W) with its boxes (n, 5) class, cx, cy, w, h and a label."""
    class_ids, cx, cy, w, h = boxes.T
    corners = np.stack((cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2), axis=1)
    names = [classes[int(k)] for k in class_ids]
    rgb = draw_boxes(frame_to_rgb(frame), corners, names, GREEN, upscale_of(frame))
    return draw_label(rgb, label)


def first_images(loader: Loader, index: int) -> dict[str, RGB]:
    """Pictures for the start of a run, by TensorBoard tag.

    Args:
        loader: its micro-batch `index` is read.
    """
    pictures = {
        "training/augmentations": example_tiles(loader.dataset, loader.config.augmentation),
        "training/first_batch": first_batch_tiles(loader, index),
    }
    images = {tag: tiled(tiles) for tag, tiles in pictures.items()}
    return {tag: image for tag, image in images.items() if image is not None}
