"""Frames with boxes and detections, for TensorBoard."""

import numpy as np
from numpy.typing import NDArray

from data_prep.draw import RGB, draw_boxes, frame_to_rgb
from pipeline.data.boxes import to_corners
from pipeline.data.datasets import Dataset
from pipeline.data.loader import Batch
from pipeline.engine.streaming import RecordingResult

TILES, SURE = 6, 0.3
GREEN, ORANGE = (0, 160, 0), (230, 120, 0)


def training_picture(batch: Batch, classes: list[str]) -> RGB | None:
    """What the network is taught: the last labelled frame of each lane, augmented as it was, with its boxes."""
    tiles, places = [], batch.labelled.nonzero().tolist()
    for lane in range(min(TILES, batch.frames.shape[1])):
        rows = [row for row, (_, b) in enumerate(places) if b == lane]
        if not rows:
            continue
        row, t = rows[-1], places[rows[-1]][0]
        kind, cx, cy, w, h = batch.boxes[row, : batch.counts[row]].cpu().numpy().T
        corners = np.stack((cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2), 1)
        rgb = frame_to_rgb(batch.frames[t, lane].cpu().numpy())
        tiles.append(draw_boxes(rgb, corners, [classes[int(k)] for k in kind], GREEN))
    return _tiled(tiles)


def evaluation_picture(results: list[RecordingResult], data: Dataset) -> RGB | None:
    """Labelled frames of the recordings in turn: boxes green, sure detections orange."""
    by_name = {r.name: r for r in data.recordings}
    tiles = []
    for i in range(TILES if results else 0):
        result = results[i % len(results)]
        if not result.frames:
            continue
        place = (2 * i + 1) * len(result.frames) // (2 * TILES)
        frame, found = result.frames[place], result.detections[place]
        rgb = frame_to_rgb(by_name[result.name].read(frame, frame + 1)[0])
        rgb = draw_boxes(rgb, to_corners(result.boxes[place]), None, GREEN)
        sure = found[found[:, 4] * found[:, 5] >= SURE]
        tiles.append(draw_boxes(rgb, sure[:, :4], [data.classes[int(c)] for c in sure[:, 6]], ORANGE))
    return _tiled(tiles)


def _tiled(tiles: list[NDArray[np.uint8]]) -> RGB | None:
    """Two in a row."""
    if len(tiles) % 2:
        tiles.append(np.full_like(tiles[0], 255))
    return np.concatenate([np.concatenate(tiles[i : i + 2], axis=1) for i in range(0, len(tiles), 2)]) if tiles else None
