"""Draws detections and labels over event frames, for the video of `evspan infer`."""

import numpy as np
from evspan.conf.schema.prep import FrameConfig
from evspan.data_prep.draw import (
    RGB,
    Colour,
    box_corners,
    draw_boxes,
    draw_label,
    draw_legend,
    frame_to_rgb,
)
from evspan.data_prep.labels.box_files import NO_TRACK
from evspan.pipeline.inference.detect import Detected, class_name
from numpy.typing import NDArray

# Of the classes, in their order; again from the start after the last. Apart from each other, from
# events (red, blue) and from labels (green), and dark enough for white text.
CLASS_COLORS: tuple[Colour, ...] = (
    (230, 120, 0),  # orange
    (150, 60, 170),  # purple
    (0, 140, 150),  # teal
    (120, 80, 40),  # brown
    (215, 60, 140),  # pink
    (110, 120, 0),  # olive
    (70, 70, 70),  # grey
    (190, 150, 0),  # yellow
)
LABEL_COLOR: Colour = (0, 160, 0)  # green
DIVIDER_COLOR = 90  # grey
DIVIDER_WIDTH = 4  # pixels between the halves of a side-by-side video
VIDEO_WIDTH = 640  # pixels; smaller frames are enlarged by whole numbers up to it


def class_color(class_id: int) -> Colour:
    """The colour of a class in videos."""
    return CLASS_COLORS[class_id % len(CLASS_COLORS)]


class Overlay:
    """Draws detections, and the labels of the recording that fall into the frame's window."""

    def __init__(
        self,
        config: FrameConfig,
        classes: list[str],
        labels: NDArray[np.void],
        *,
        side_by_side: bool = False,
        lowest_confidence: float = 0.0,
    ) -> None:
        """Keeps the labels for `draw`.

        Args:
            config: how the frames were made.
            classes: names by class id.
            labels: (N,) RAW_BOX, pixels of the sensor, sorted by time; may be empty.
            side_by_side: the events alone are drawn left of the detections, where nothing covers
                them, with a line between the halves.
            lowest_confidence: detections of less are not drawn.
        """
        self.config = config
        self.classes = classes
        self.boxes = labels
        self.times = np.ascontiguousarray(labels["t"])
        self.side_by_side = side_by_side
        self.lowest_confidence = lowest_confidence
        self.legend = [(name, class_color(i)) for i, name in enumerate(classes)]
        if labels.size:
            self.legend.append(("labels", LABEL_COLOR))

    def draw(self, item: Detected, first_us: int) -> RGB:
        """Draws a frame, enlarged up to VIDEO_WIDTH, with the time since the first event.

        Args:
            item: its end is in the recording's clock, as are the labels.
            first_us: time of the recording's first event in that clock.

        Returns:
            (H, W, 3) uint8, or side by side (H, 2 * W + DIVIDER_WIDTH, 3).
        """
        upscale = max(1, VIDEO_WIDTH // item.frame.shape[2])
        events = frame_to_rgb(item.frame)
        labels = box_corners(self.labels(item.end_us)) / self.config.downsample
        image = draw_boxes(events, labels, None, LABEL_COLOR, upscale)

        # In increasing order of confidence: the highest is on top.
        detected = item.boxes[::-1]
        detected = detected[detected["class_confidence"] >= self.lowest_confidence]
        corners = box_corners(detected) / self.config.downsample
        names = [self._name(box) for box in detected]
        colors = [class_color(int(box["class_id"])) for box in detected]
        image = draw_boxes(image, corners * upscale, names, colors=colors)
        image = draw_label(image, f"{(item.end_us - first_us) / 1e6:.2f} s")
        image = draw_legend(image, self.legend)
        if not self.side_by_side:
            return image
        plain = draw_boxes(events, [], upscale=upscale)
        divider = np.full((len(plain), DIVIDER_WIDTH, 3), DIVIDER_COLOR, np.uint8)
        return np.concatenate((plain, divider, image), axis=1)

    def _name(self, box: NDArray[np.void]) -> str:
        """'car 0.83', or 'car #12 0.83' where the detections have track ids, which start at 1."""
        name = class_name(self.classes, int(box["class_id"]))
        if box["track_id"] not in (0, NO_TRACK):
            name += f" #{box['track_id']}"
        return f"{name} {box['class_confidence']:.2f}"

    def labels(self, end_us: int) -> NDArray[np.void]:
        """The boxes (RAW_BOX) of the latest label time in (end_us - window, end_us]."""
        after = int(np.searchsorted(self.times, end_us, "right"))
        start_us = end_us - self.config.window_us
        if after == 0 or self.times[after - 1] <= start_us:
            return self.boxes[:0]
        first = int(np.searchsorted(self.times, self.times[after - 1], "left"))
        return self.boxes[first:after]
