"""Draws frames with boxes, detections and attention maps, for TensorBoard."""

import numpy as np
from evspan.data_prep.draw import RGB, draw_boxes, draw_label, frame_to_rgb
from evspan.pipeline.data.batch import Batch
from evspan.pipeline.data.boxes import to_corners
from evspan.pipeline.data.datasets import Dataset
from evspan.pipeline.inference.streaming import RecordingResult
from evspan.pipeline.tensorboard.attention_probe import ProbeFrame, ProbeResult
from numpy.typing import NDArray

NUM_TILES = 6
SHOWN_CONFIDENCE = 0.3  # detections below are not drawn
GREEN = (0, 160, 0)
ORANGE = (230, 120, 0)
MIN_WIDTH = 320  # pixels of a tile; smaller frames are enlarged, so that labels stay legible
GAP = 2  # pixels between the tiles of a probe frame
GAP_GREY = 120
HEAT_COLORS = np.array(  # from low to high
    [(12, 7, 60), (88, 16, 110), (175, 40, 90), (235, 105, 40), (250, 215, 90)], np.float64
)


def training_image(batch: Batch, classes: list[str]) -> RGB | None:
    """The last labelled frame of the first lanes, augmented as in training, with its boxes.

    Returns:
        (H, W, 3) uint8; None if no frame is labelled.
    """
    tiles = []
    labelled = batch.labelled.nonzero().tolist()
    for lane in range(min(NUM_TILES, batch.frames.shape[1])):
        rows = [row for row, (_, b) in enumerate(labelled) if b == lane]
        if rows:
            last_row = rows[-1]
            time = labelled[last_row][0]
            tiles.append(_training_tile(batch, last_row, time, lane, classes))
    return tiled(tiles)


def _training_tile(batch: Batch, row: int, time: int, lane: int, classes: list[str]) -> RGB:
    boxes = batch.boxes[row, : batch.counts[row]].cpu().numpy()
    class_ids, cx, cy, w, h = boxes.T
    corners = np.stack((cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2), 1)
    rgb = frame_to_rgb(batch.frames[time, lane].cpu().numpy())
    return draw_boxes(rgb, corners, [classes[int(k)] for k in class_ids], GREEN)


def evaluation_image(results: list[RecordingResult], data: Dataset) -> RGB | None:
    """Labelled frames of the recordings in turn: boxes green, confident detections orange.

    Returns:
        (H, W, 3) uint8; None if no frame is labelled.
    """
    if not results:
        return None
    recordings = {recording.name: recording for recording in data.recordings}
    tiles = []
    for i in range(NUM_TILES):
        result = results[i % len(results)]
        if not result.frames:
            continue
        position = (2 * i + 1) * len(result.frames) // (2 * NUM_TILES)
        frame = result.frames[position]
        rgb = frame_to_rgb(recordings[result.name].read(frame, frame + 1)[0])
        boxes = result.boxes[position]
        rgb = draw_boxes(rgb, to_corners(boxes[boxes["class_id"] >= 0]), None, GREEN)
        rows = _confident(result.detections[position])
        names = [data.classes[int(class_id)] for class_id in rows[:, 6]]
        tiles.append(draw_boxes(rgb, rows[:, :4], names, ORANGE))
    return tiled(tiles)


def probe_image(result: ProbeResult, classes: list[str]) -> RGB | None:
    """A row per probe frame: boxes; detections; attention maps of the finest scale with boxes.

    Returns:
        (H, W, 3) uint8; None if there are no probe frames.
    """
    rows = []
    for frame in result.frames:
        tiles = [_with_gap(tile) for tile in _probe_tiles(frame, result.gates, classes)]
        rows.append(np.concatenate(tiles, axis=1))
    return np.concatenate(rows)[:-GAP, :-GAP] if rows else None


def _with_gap(tile: RGB) -> RGB:
    """A margin on the right and below."""
    return np.pad(tile, ((0, GAP), (0, GAP), (0, 0)), constant_values=GAP_GREY)


def _probe_tiles(frame: ProbeFrame, gates: dict[str, float], classes: list[str]) -> list[RGB]:
    rgb = frame_to_rgb(frame.frame)
    corners = to_corners(frame.boxes)
    upscale = upscale_of(frame.frame)
    names = [classes[int(class_id)] for class_id in frame.boxes["class_id"]]
    boxes = draw_boxes(rgb, corners, names, GREEN, upscale)
    tiles = [
        draw_label(boxes, f"{frame.recording} {frame.end_us / 1e6:.2f} s"),
        _detections_tile(frame, rgb, upscale, classes),
    ]
    for name, values in frame.maps.items():
        if name.startswith("scale_0/"):
            map_rgb = heat_map(values, frame.strides[name], frame.frame)
            tile = draw_boxes(map_rgb, corners, None, GREEN, upscale)
            kind = name.partition("/")[2]
            label = f"{kind} attention {values.min():.3g} to {values.max():.3g}"
            gate = gates.get(name.replace("motion", "temporal"))
            if gate is not None:
                label += f", gate {gate:+.3f}"
            tiles.append(draw_label(tile, label))
    return tiles


def _detections_tile(frame: ProbeFrame, rgb: RGB, upscale: int, classes: list[str]) -> RGB:
    rows = _confident(frame.detections)
    labels = [f"{classes[int(row[6])]} {row[4] * row[5]:.2f}" for row in rows]
    summary = f"{len(rows)} detections above {SHOWN_CONFIDENCE}"
    if len(frame.detections) and not len(rows):
        highest = (frame.detections[:, 4] * frame.detections[:, 5]).max()
        summary += f", the highest {highest:.3f}"
    return draw_label(draw_boxes(rgb, rows[:, :4], labels, ORANGE, upscale), summary)


def _confident(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """The detections (k, 7) to draw. Confidence is objectness times class score."""
    return rows[rows[:, 4] * rows[:, 5] >= SHOWN_CONFIDENCE]


def upscale_of(frame: NDArray[np.uint8]) -> int:
    """The whole number by which a frame (2 * bins, H, W) is enlarged."""
    width: int = frame.shape[-1]
    return max(1, round(MIN_WIDTH / width))


def heat_map(values: NDArray[np.float32], stride: int, frame: NDArray[np.uint8]) -> RGB:
    """Colours an attention map over a frame: low values dark, high values bright.

    Args:
        values: (h, w), of cells of `stride` x `stride` pixels. Cells in the padding are cut off.
        frame: (2 * bins, H, W) counts. Pixels with events are lighter.

    Returns:
        (H, W, 3) uint8.
    """
    height, width = frame.shape[1:]
    low, high = np.quantile(values, (0.02, 0.98))  # the border of a frame has outliers
    normalized = (values - low) / max(high - low, 1e-6)
    pixels = normalized.repeat(stride, 0).repeat(stride, 1)[:height, :width]
    positions = np.linspace(0, 1, len(HEAT_COLORS))
    channels = [np.interp(pixels, positions, HEAT_COLORS[:, k]) for k in range(3)]
    colour = np.stack(channels, axis=2)
    lightening = np.where(frame.any(0), 0.3, 0.0)[..., None]
    lighter: RGB = (colour + lightening * (255 - colour)).astype(np.uint8)
    return lighter


def tiled(tiles: list[RGB]) -> RGB | None:
    """Two tiles per row; an odd last one is followed by a white tile."""
    if not tiles:
        return None
    if len(tiles) % 2:
        tiles = [*tiles, np.full_like(tiles[0], 255)]
    rows = [np.concatenate(tiles[i : i + 2], axis=1) for i in range(0, len(tiles), 2)]
    return np.concatenate(rows)
