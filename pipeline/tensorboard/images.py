"""Frames with boxes, detections and attention maps, for TensorBoard."""

import numpy as np
from evspan.data_prep.draw import RGB, draw_boxes, draw_label, frame_to_rgb
from evspan.pipeline.data.boxes import to_corners
from evspan.pipeline.data.datasets import Dataset
from evspan.pipeline.data.loader import Batch
from evspan.pipeline.inference.streaming import RecordingResult
from evspan.pipeline.tensorboard.attention_probe import Look, Watched
from numpy.typing import NDArray

TILES, SURE = 6, 0.3
GREEN, ORANGE = (0, 160, 0), (230, 120, 0)
LEAST_WIDTH = 320  # of a tile: smaller frames are enlarged, so that labels stay legible
GAP, GREY = 2, 120  # between tiles of a watched frame
HEAT = np.array(
    [(12, 7, 60), (88, 16, 110), (175, 40, 90), (235, 105, 40), (250, 215, 90)], np.float64
)  # from low to high


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
        tiles.append(
            draw_boxes(rgb, sure[:, :4], [data.classes[int(c)] for c in sure[:, 6]], ORANGE)
        )
    return _tiled(tiles)


def watched_picture(look: Look, classes: list[str]) -> RGB | None:
    """A row per watched frame: boxes; detections; the finest scale's attention maps, boxes outlined."""
    rows = [
        np.concatenate(
            [np.pad(tile, ((0, GAP), (0, GAP), (0, 0)), constant_values=GREY) for tile in tiles],
            axis=1,
        )
        for tiles in (_watched_tiles(frame, look.gates, classes) for frame in look.frames)
    ]
    return np.concatenate(rows)[:-GAP, :-GAP] if rows else None


def _watched_tiles(frame: Watched, gates: dict[str, float], classes: list[str]) -> list[RGB]:
    rgb, corners, upscale = (
        frame_to_rgb(frame.frame),
        to_corners(frame.boxes),
        upscale_of(frame.frame),
    )
    taught = draw_boxes(
        rgb, corners, [classes[int(k)] for k in frame.boxes["class_id"]], GREEN, upscale
    )
    confidence = frame.found[:, 4] * frame.found[:, 5]
    sure = frame.found[confidence >= SURE]
    labels = [f"{classes[int(row[6])]} {row[4] * row[5]:.2f}" for row in sure]
    best = f", the surest {confidence.max():.3f}" if len(confidence) and not len(sure) else ""
    tiles = [
        draw_label(taught, f"{frame.recording} {frame.end_us / 1e6:.2f} s"),
        draw_label(
            draw_boxes(rgb, sure[:, :4], labels, ORANGE, upscale),
            f"{len(sure)} detections above {SURE}{best}",
        ),
    ]
    for name, values in frame.maps.items():
        if name.startswith("scale_0/"):
            gate = gates.get(name.replace("motion", "temporal"))
            told = f"{name.partition('/')[2]} attention {values.min():.3g} to {values.max():.3g}"
            tile = draw_boxes(
                heat_map(values, frame.strides[name], frame.frame), corners, None, GREEN, upscale
            )
            tiles.append(draw_label(tile, told if gate is None else f"{told}, gate {gate:+.3f}"))
    return tiles


def upscale_of(frame: NDArray[np.uint8]) -> int:
    return max(1, round(LEAST_WIDTH / frame.shape[-1]))


def heat_map(values: NDArray[np.float32], stride: int, frame: NDArray[np.uint8]) -> RGB:
    """(h, w) values of cells of `stride` pixels, the low dark and the high bright, over a frame (channels, H, W), whose
    padding is cut off; pixels with events are lighter."""
    height, width = frame.shape[1:]
    low, high = np.quantile(values, (0.02, 0.98))  # without what the frame's border does
    place = (
        ((values - low) / max(high - low, 1e-6))
        .repeat(stride, 0)
        .repeat(stride, 1)[:height, :width]
    )
    colour = np.stack(
        [np.interp(place, np.linspace(0, 1, len(HEAT)), HEAT[:, k]) for k in range(3)], axis=2
    )
    lighter = np.where(frame.any(0), 0.3, 0.0)[..., None]
    return (colour + lighter * (255 - colour)).astype(np.uint8)


def _tiled(tiles: list[NDArray[np.uint8]]) -> RGB | None:
    """Two in a row."""
    if len(tiles) % 2:
        tiles.append(np.full_like(tiles[0], 255))
    return (
        np.concatenate([np.concatenate(tiles[i : i + 2], axis=1) for i in range(0, len(tiles), 2)])
        if tiles
        else None
    )
