"""Draws detections and labels over event frames, for the video of `evspan infer`."""

import numpy as np
from evspan.conf.schema.prep import FrameConfig
from evspan.data_prep.draw import RGB, box_corners, draw_boxes, draw_label, frame_to_rgb
from evspan.pipeline.inference.detect import Detected, class_name
from numpy.typing import NDArray

DETECTION_COLOR = (230, 120, 0)  # orange
LABEL_COLOR = (0, 160, 0)  # green
VIDEO_WIDTH = 640  # pixels; smaller frames are enlarged by whole numbers up to it


class Overlay:
    """Draws detections, and the labels of the recording that fall into the frame's window."""

    def __init__(
        self,
        config: FrameConfig,
        classes: list[str],
        labels: NDArray[np.void],
        *,
        side_by_side: bool = False,
    ) -> None:
        """Keeps the labels for `draw`.

        Args:
            config: how the frames were made.
            classes: names by class id.
            labels: (N,) RAW_BOX, pixels of the sensor, sorted by time; may be empty.
            side_by_side: the events alone are drawn left of the detections, where nothing covers
                them.
        """
        self.config = config
        self.classes = classes
        self.boxes = labels
        self.times = np.ascontiguousarray(labels["t"])
        self.side_by_side = side_by_side

    def draw(self, item: Detected) -> RGB:
        """Returns an image (H, W, 3), or (H, 2 * W, 3) side by side, enlarged up to VIDEO_WIDTH."""
        upscale = max(1, VIDEO_WIDTH // item.frame.shape[2])
        events = frame_to_rgb(item.frame)
        labels = box_corners(self.labels(item.end_us)) / self.config.downsample
        image = draw_boxes(events, labels, None, LABEL_COLOR, upscale)

        detected = item.boxes[::-1]  # in increasing order of confidence: the highest is on top
        corners = box_corners(detected) / self.config.downsample
        names = []
        for box in detected:
            name = class_name(self.classes, int(box["class_id"]))
            names.append(f"{name} {box['class_confidence']:.2f}")
        image = draw_boxes(image, corners * upscale, names, DETECTION_COLOR)
        image = draw_label(image, f"{item.end_us / 1e6:.2f} s")
        if not self.side_by_side:
            return image
        plain = draw_boxes(events, [], upscale=upscale)
        return np.concatenate((plain, image), axis=1)

    def labels(self, end_us: int) -> NDArray[np.void]:
        """The boxes (RAW_BOX) of the latest label time in (end_us - window, end_us]."""
        after = int(np.searchsorted(self.times, end_us, "right"))
        start_us = end_us - self.config.window_us
        if after == 0 or self.times[after - 1] <= start_us:
            return self.boxes[:0]
        first = int(np.searchsorted(self.times, self.times[after - 1], "left"))
        return self.boxes[first:after]
