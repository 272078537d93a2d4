"""AP and recall by recording, time, and motion of the object; and the confusion matrix."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import chain, pairwise
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
    """Fractions from 0 to 1, None where there are no boxes.

    A bin has `from` (included) and `to` (None: no end). For groups of boxes (stillness, speed,
    rest), boxes of the other groups, and detections of them, are ignored. A detection without a box
    counts against every group, so AP is lower the fewer boxes a group has, while recall can be
    compared between groups.

    Attributes:
        per_root: of several roots; empty with one.
        by_time: bins in seconds since the recording's first event.
        stillness: by "still" and "moving".
        by_speed: bins in pixels of the stored frames per second.
        by_rest: bins in seconds at rest by now; objects that move are in none.
        ranked_by_class_score: AP with detections ranked without objectness, as RVT ranks them.
        confusion: matrix, its labels and thresholds.
    """

    per_recording: dict[str, Values]
    per_root: dict[str, Values]
    by_time: list[Values]
    stillness: dict[str, Values]
    by_speed: list[Values]
    by_rest: list[Values]
    ranked_by_class_score: Values
    confusion: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """The attributes as JSON values."""
        return asdict(self)

    def table(self) -> str:
        """The breakdown as tables of text."""
        times = {_span(v, "s"): v for v in self.by_time}
        objects = dict(self.stillness)
        objects |= {_span(v, "px/s"): v for v in self.by_speed}
        objects |= {f"at rest {_span(v, 's')}": v for v in self.by_rest}
        roots = [_table("root", self.per_root, "no boxes")] if self.per_root else []
        blocks = [
            *roots,
            _table("recording", self.per_recording, "no boxes"),
            _table("since start", times, "no boxes"),
            _table("object", objects, "no boxes whose tracks show how they move"),
            _confusion_table(self.confusion),
        ]
        return "\n\n".join(blocks)


def breakdown(
    frames: LabelledFrames, classes: Sequence[str], config: EvaluationConfig
) -> Breakdown:
    """Breaks the metrics down.

    Args:
        frames: all labelled frames; those that are not scored show motion, too.
        classes: names of class 0, 1, ...
        config: filters of the protocol, and the edges of the bins.
    """
    moved = motion(frames, config.still_speed)
    chosen, kept = scored(frames, config)
    speed = moved.speed[kept]
    rest = np.where(speed < config.still_speed, moved.rest_s[kept], np.nan)
    scorer = Scorer(chosen, classes)
    names = {name: chosen.recording == i for i, name in enumerate(chosen.names)}
    times = _bins(chosen.end_us / 1e6, config.time_bins_s)
    by_time = scorer.of_frames({str(i): inside for i, (_, inside) in enumerate(times)})
    class_scores = chosen.detections[:, 5].astype(np.float64)
    by_class_score = Scorer(chosen, classes, scores=class_scores).metrics()
    matrix = scorer.confusion(CONFUSION_IOU, config.confusion_threshold)
    by_speed = []
    for edges, inside in _bins(speed, config.speed_bins):
        by_speed.append(edges | scorer.of_group(inside))
    by_rest = []
    for edges, inside in _bins(rest, config.rest_bins_s):
        by_rest.append(edges | scorer.of_group(inside))
    return Breakdown(
        per_recording=scorer.of_frames(names),
        per_root=scorer.of_frames(_roots(chosen)),
        by_time=[edges | by_time[str(i)] for i, (edges, _) in enumerate(times)],
        stillness={
            "still": scorer.of_group(moved.still(config.still_s)[kept]),
            "moving": scorer.of_group(moved.moving(config.still_s)[kept]),
        },
        by_speed=by_speed,
        by_rest=by_rest,
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


def _roots(frames: LabelledFrames) -> dict[str, NDArray[np.bool_]]:
    """Root -> (F,) its frames. The names of recordings of several roots are ROOT/NAME."""
    roots = [name.rpartition("/")[0] for name in frames.names]
    of_frames = np.array(roots)[frames.recording] if len(frames) else np.zeros(0, str)
    return {root: of_frames == root for root in dict.fromkeys(roots) if root}


def _bins(
    values: NDArray[np.float64], edges: Sequence[float]
) -> list[tuple[Values, NDArray[np.bool_]]]:
    """Half-open bins from 0 over the edges to infinity; nan is in none.

    Args:
        values: (n,).

    Returns:
        Per bin its `from` and `to`, and the values (n,) inside.
    """
    bins: list[tuple[Values, NDArray[np.bool_]]] = []
    for low, high in pairwise([0.0, *edges, np.inf]):
        span: Values = {"from": low, "to": None if high == np.inf else high}
        bins.append((span, (values >= low) & (values < high)))
    return bins


def _span(value: Values, unit: str) -> str:
    if value["to"] is None:
        return f"{value['from']:g}+ {unit}"
    return f"{value['from']:g}-{value['to']:g} {unit}"


def _table(title: str, rows: dict[str, Values], nothing: str) -> str:
    """Rows without boxes are left out; nothing: what is written where none is left."""
    rows = {name: values for name, values in rows.items() if values["boxes"]}
    if not rows:
        return f"  {title}: {nothing}"
    present = set(chain.from_iterable(rows.values()))
    names = [key for key in HEADINGS if key in present]
    width = max(map(len, [title, *rows]))
    lines = [f"  {title:<{width}}" + "".join(f"{HEADINGS[k]:>10}" for k in names)]
    for name, values in rows.items():
        cells = [_cell(k, values[k]) for k in names]
        lines.append(f"  {name:<{width}}" + "".join(f"{cell:>10}" for cell in cells))
    return "\n".join(lines)


def _cell(key: str, value: float | None) -> str:
    if value is None:
        return "-"
    return str(value) if key == "boxes" else format(value, ".3f")


def _confusion_table(confusion: dict[str, Any]) -> str:
    labels = confusion["labels"]
    width = max(10, *(len(name) + 2 for name in labels))
    lines = [
        "  boxes (rows) and the detections they got, from score "
        f"{confusion['score_threshold']:g}, IoU {confusion['iou']:g}",
        "  " + " " * width + "".join(f"{name:>{width}}" for name in labels),
    ]
    for name, row in zip(labels, confusion["matrix"], strict=True):
        lines.append(f"  {name:<{width}}" + "".join(f"{n:>{width}}" for n in row))
    return "\n".join(lines)
