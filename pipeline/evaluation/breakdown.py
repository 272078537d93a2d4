"""Where a detector is good: by recording, by time since the start, by speed and rest of the object, and what it confuses."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from evspan.conf.schema.training import EvaluationConfig
from evspan.pipeline.evaluation.coco import WORDS, Scorer, Values
from evspan.pipeline.evaluation.frames import LabelledFrames, scored
from evspan.pipeline.evaluation.motion import motion
from numpy.typing import NDArray

CONFUSION_IOU = 0.5
HEADINGS = {
    "ap": "AP",
    "ap50": "AP50",
    "ap_small": "AP small",
    "recall": "recall",
    "ar100": "recall",
    "recall50": "recall50",
    "boxes": "boxes",
}


@dataclass(frozen=True)
class Breakdown:
    """Shares from 0 to 1, None where there are no boxes. A bin has `from` (included) and `to` (None: no end).

    Of groups of boxes (stillness, speed, rest), boxes of the others, and detections of them, are ignored; a detection of
    nothing counts against each group, so AP is lower the fewer boxes a group has, while recall can be compared between groups.
    """

    per_recording: dict[str, Values]
    by_time: list[Values]  # s since the recording's first event
    stillness: dict[str, Values]  # still, moving
    by_speed: list[Values]  # pixels of the stored frames per second
    by_rest: list[Values]  # s at rest by now; objects that move are in none
    ranked_by_class_score: Values  # AP with detections ranked as RVT ranks them, without objectness
    confusion: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def table(self) -> str:
        blocks = [
            _table("recording", self.per_recording, "no boxes"),
            _table("since start", {_span(v, "s"): v for v in self.by_time}, "no boxes"),
            _table(
                "object",
                self.stillness
                | {_span(v, "px/s"): v for v in self.by_speed}
                | {f"at rest {_span(v, 's')}": v for v in self.by_rest},
                "no boxes whose tracks tell how they move",
            ),
            _confusion_table(self.confusion),
        ]
        return "\n\n".join(blocks)


def breakdown(
    frames: LabelledFrames, classes: Sequence[str], config: EvaluationConfig
) -> Breakdown:
    """frames: all labelled ones, since those that are not scored tell of motion, too."""
    moved = motion(frames, config.still_speed)
    chosen, kept = scored(frames, config)
    speed = moved.speed[kept]
    rest = np.where(speed < config.still_speed, moved.rest_s[kept], np.nan)
    scorer = Scorer(chosen, classes)
    names = {name: chosen.recording == i for i, name in enumerate(chosen.names)}
    times = _bins(chosen.end_us / 1e6, config.time_bins_s, 0.0)
    by_time = scorer.of_frames({str(i): inside for i, (_, inside) in enumerate(times)})
    by_class_score = Scorer(
        chosen, classes, scores=chosen.detections[:, 5].astype(np.float64)
    ).metrics()
    matrix = scorer.confusion(CONFUSION_IOU, config.confusion_threshold)
    return Breakdown(
        per_recording=scorer.of_frames(names),
        by_time=[edges | by_time[str(i)] for i, (edges, _) in enumerate(times)],
        stillness={
            "still": scorer.of_group(moved.still(config.still_s)[kept]),
            "moving": scorer.of_group(moved.moving(config.still_s)[kept]),
        },
        by_speed=[
            edges | scorer.of_group(inside)
            for edges, inside in _bins(speed, config.speed_bins, 0.0)
        ],
        by_rest=[
            edges | scorer.of_group(inside)
            for edges, inside in _bins(rest, config.rest_bins_s, 0.0)
        ],
        ranked_by_class_score={k: getattr(by_class_score, k) for k in WORDS if k.startswith("ap")},
        confusion={
            "iou": CONFUSION_IOU,
            "score_threshold": config.confusion_threshold,
            "labels": [*classes, "nothing"],
            "rows": "boxes",
            "columns": "detections",
            "matrix": matrix.tolist(),
        },
    )


def _bins(
    values: NDArray, edges: Sequence[float], first: float
) -> list[tuple[Values, NDArray[np.bool_]]]:
    """Half-open bins from `first` over the edges to no end; nan is in none."""
    bounds = [first, *edges, np.inf]
    return [
        ({"from": low, "to": None if high == np.inf else high}, (values >= low) & (values < high))
        for low, high in pairwise(bounds)
    ]


def _span(value: Values, unit: str) -> str:
    return (
        f"{value['from']:g}+ {unit}"
        if value["to"] is None
        else f"{value['from']:g}-{value['to']:g} {unit}"
    )


def _table(title: str, rows: dict[str, Values], nothing: str) -> str:
    """Rows without boxes are left out."""
    rows = {name: values for name, values in rows.items() if values["boxes"]}
    if not rows:
        return f"  {title}: {nothing}"
    names = [k for k in HEADINGS if any(k in values for values in rows.values())]
    width = max(map(len, [title, *rows]))
    lines = [f"  {title:<{width}}" + "".join(f"{HEADINGS[k]:>10}" for k in names)]
    for name, values in rows.items():
        cells = [
            "-"
            if values[k] is None
            else str(values[k])
            if k == "boxes"
            else format(values[k], ".3f")
            for k in names
        ]
        lines.append(f"  {name:<{width}}" + "".join(f"{cell:>10}" for cell in cells))
    return "\n".join(lines)


def _confusion_table(confusion: dict[str, Any]) -> str:
    labels, width = confusion["labels"], max(10, *(len(name) + 2 for name in confusion["labels"]))
    lines = [
        f"  boxes (rows) and the detections they got, from score {confusion['score_threshold']:g}, IoU {confusion['iou']:g}",
        "  " + " " * width + "".join(f"{name:>{width}}" for name in labels),
    ]
    return "\n".join(
        lines
        + [
            f"  {name:<{width}}" + "".join(f"{n:>{width}}" for n in row)
            for name, row in zip(labels, confusion["matrix"], strict=True)
        ]
    )
