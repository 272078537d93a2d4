"""Turns decoded predictions into detections: confidence threshold, suppression per class.

Greedy suppression goes through the candidates by falling score and drops those that overlap one
that was kept. `kept` is then the only solution of

    kept[j] = no candidate i before j has kept[i] and overlaps j

and repeating this rule for all candidates at once, from all kept, reaches it: a candidate is final
as soon as those before it that it depends on are. Detections depend on each other over 3 to 6
candidates, so a few repetitions replace the loop over candidates. A GPU makes a fixed number of
them for all frames of a batch, without a wait of the host, and reports whether the last one changed
anything.
"""

from typing import NamedTuple

import torch
from evspan.pipeline.model.host_copy import HostCopy
from torch import Tensor

CANDIDATES = 3000  # per frame, by score, before suppression
BLOCK = 256  # candidates compared with all others at a time
ROUNDS = 16  # repetitions of the suppression on a device, before its result is read
MATRIX_BYTES = 2**28  # of the overlaps of the frames that a device suppresses together
MAX_DETECTIONS = 300  # per frame
COLUMNS = 7  # x1, y1, x2, y2, objectness, class score, class id


class DetectionLimits(NamedTuple):
    """Which predictions are detections.

    confidence_threshold: lowest objectness * class score. nms_threshold: IoU threshold of the
    suppression. max_detections: per frame.
    """

    confidence_threshold: float
    nms_threshold: float
    max_detections: int = MAX_DETECTIONS


def detections(
    decoded: Tensor,
    *,
    confidence_threshold: float,
    nms_threshold: float,
    max_detections: int = MAX_DETECTIONS,
) -> list[Tensor]:
    """Selects the detections of each frame. Waits once for the device.

    Args:
        decoded: (n, cells, 5 + classes) cx, cy, w, h in pixels, objectness, class scores in 0..1.
        confidence_threshold: lowest objectness * class score.
        nms_threshold: IoU threshold of the suppression.
        max_detections: per frame.

    Returns:
        Per frame (k, 7) on the CPU: x1, y1, x2, y2 in pixels, objectness, class score, class id;
        highest objectness * class score first, of equal ones the first cell.
    """
    limits = DetectionLimits(confidence_threshold, nms_threshold, max_detections)
    return PendingDetections(decoded, limits).read()


class PendingDetections:
    """The detections of n frames, which the device may still be selecting.

    Args:
        decoded: (n, cells, 5 + classes), see `detections`. It must stay as it is until `read`.
        packed: of `select` for `decoded` and `limits`; None: it is called here.
    """

    def __init__(
        self, decoded: Tensor, limits: DetectionLimits, packed: Tensor | None = None
    ) -> None:
        self._decoded = decoded
        self._limits = limits
        self._copy: HostCopy | None = None
        if decoded.is_cpu and packed is None:
            self._rows = [_frame_detections(frame, limits) for frame in decoded]
        else:
            self._copy = HostCopy(select(decoded, limits) if packed is None else packed)

    def read(self) -> list[Tensor]:
        """Per frame (k, 7) on the CPU, see `detections`. Waits once for the device.

        Where candidates depend on each other over more than ROUNDS others, as few real ones do, the
        selection is repeated with as many rounds as any input needs.
        """
        if self._copy is not None:
            packed = self._copy.wait()
            if not bool(packed[:, -1, 1].all()):
                most = 2 * self._limits.max_detections
                packed = HostCopy(select(self._decoded, self._limits, rounds=most)).wait()
            counts = packed[:, -1, 0].tolist()
            # Cloned: a view would keep the rows of all frames, in pinned memory.
            self._rows = [rows[: int(k)].clone() for rows, k in zip(packed, counts, strict=True)]
            self._copy = None
        return self._rows


# -- one frame after the other, on the CPU -----------------------------------------------------
def _frame_detections(frame: Tensor, limits: DetectionLimits) -> Tensor:
    """frame: (cells, 5 + classes). Returns (k, 7)."""
    best, class_ids = frame[:, 5:].max(1)
    scores = frame[:, 4] * best
    keep = (scores >= limits.confidence_threshold).nonzero()[:, 0]
    if len(keep) > CANDIDATES:  # not topk, which takes any of equal scores
        keep = keep[scores[keep].argsort(descending=True, stable=True)[:CANDIDATES]]
    rows = _rows(frame[keep], best[keep], class_ids[keep])
    kept = nms(
        rows[:, :4], scores[keep], class_ids[keep], limits.nms_threshold, limits.max_detections
    )
    return rows[kept]


def nms(
    boxes: Tensor, scores: Tensor, class_ids: Tensor, threshold: float, limit: int | None = None
) -> Tensor:
    """Greedy non-maximum suppression within each class.

    Drops a box that overlaps a kept box of a higher score by an IoU above `threshold`.

    Args:
        boxes: (k, 4) x1, y1, x2, y2.
        scores, class_ids: (k,).
        threshold: IoU.
        limit: stop when this number of boxes is kept; None: no limit.

    Returns:
        (m,) int64 kept rows, highest score first. Of equal scores the first row comes first.
    """
    kept = torch.empty(0, dtype=torch.long, device=boxes.device)
    for block in torch.split(scores.argsort(descending=True, stable=True), BLOCK):
        suppressed = _overlaps(
            boxes[kept], boxes[block], class_ids[kept], class_ids[block], threshold
        )
        block = block[~suppressed.any(0)]
        among = _overlaps(boxes[block], boxes[block], class_ids[block], class_ids[block], threshold)
        kept = torch.cat((kept, block[_greedy(among.triu(1))]))
        if limit is not None and len(kept) >= limit:
            return kept[:limit]
    return kept


def _greedy(suppresses: Tensor) -> Tensor:
    """(k,) bool, the candidates that greedy suppression keeps.

    Args:
        suppresses: (k, k) bool, whether the row's candidate, if kept, drops the column's; False on
            and below the diagonal.
    """
    kept = ~suppresses.any(0)
    while True:
        before = kept
        kept = ~(suppresses & before[:, None]).any(0)
        if torch.equal(kept, before):
            return kept


def _rows(chosen: Tensor, best: Tensor, class_ids: Tensor) -> Tensor:
    """(..., 5 + classes) of `detections`, best score (...) and class id (...) -> (..., 7)."""
    centre = chosen[..., :2]
    half = chosen[..., 2:4] / 2
    columns = (
        centre - half,
        centre + half,
        chosen[..., 4:5],
        best[..., None],
        class_ids[..., None].to(chosen),
    )
    return torch.cat(columns, -1)


def _overlaps(
    first: Tensor, second: Tensor, first_ids: Tensor, second_ids: Tensor, threshold: float
) -> Tensor:
    """Which pairs of boxes have the same class and an IoU above `threshold`.

    Args:
        first, second: (..., a, 4) and (..., b, 4) x1, y1, x2, y2.
        first_ids, second_ids: (..., a) and (..., b) class ids.

    Returns:
        (..., a, b) bool.
    """
    x1, y1, x2, y2 = (column[..., :, None] for column in first.unbind(-1))
    u1, v1, u2, v2 = (column[..., None, :] for column in second.unbind(-1))
    width = (torch.minimum(x2, u2) - torch.maximum(x1, u1)).clamp_(min=0)
    height = (torch.minimum(y2, v2) - torch.maximum(y1, v1)).clamp_(min=0)
    shared = width.mul_(height)
    areas = (x2 - x1) * (y2 - y1) + (u2 - u1) * (v2 - v1)
    iou = shared / areas.sub_(shared).clamp_(min=1e-12)
    same_class = first_ids[..., :, None] == second_ids[..., None, :]
    return (iou > threshold).logical_and_(same_class)


# -- all frames at once, on a device -----------------------------------------------------------
def select(decoded: Tensor, limits: DetectionLimits, *, rounds: int = ROUNDS) -> Tensor:
    """Selects the detections of all frames without a wait of the host.

    Every size follows from the shape of `decoded`, so a CUDA graph can hold it.

    Args:
        decoded: (n, cells, 5 + classes), see `detections`.
        rounds: repetitions of the suppression rule. 2 * max_detections are enough for any input:
            two of them make the next kept candidate final.

    Returns:
        (n, m + 1, 7) of the dtype of `decoded`: the detections of each frame, then zeros; the last
        row is (number of detections, 1 if they are final, 0, ...). m is `max_detections`, or the
        number of candidates if that is smaller.
    """
    cells = decoded.shape[1]
    candidates = min(CANDIDATES, cells)
    frame_bytes = max(1, candidates**2 * _count_dtype(decoded).itemsize)
    parts = torch.split(decoded, max(1, MATRIX_BYTES // frame_bytes))
    return torch.cat([_select(part, limits, candidates, rounds) for part in parts])


def _select(decoded: Tensor, limits: DetectionLimits, candidates: int, rounds: int) -> Tensor:
    """`select` for as many frames as fit MATRIX_BYTES."""
    best, class_ids = decoded[..., 5:].max(-1)
    scores = decoded[..., 4] * best
    # Minus infinity, also in place of NaN, which would come first.
    scores = torch.where(scores >= limits.confidence_threshold, scores, -torch.inf)
    scores, order = scores.sort(dim=1, descending=True, stable=True)
    is_candidate = scores[:, :candidates] > -torch.inf
    order = order[:, :candidates]
    chosen = decoded.gather(1, order[..., None].expand(-1, -1, decoded.shape[2]))
    class_ids = class_ids.gather(1, order)
    rows = _rows(chosen, best.gather(1, order), class_ids)
    kept, is_final = _kept(rows, class_ids, is_candidate, limits.nms_threshold, rounds)
    most = min(limits.max_detections, candidates)
    return _packed(rows, kept, is_final, most)


def _kept(
    rows: Tensor, class_ids: Tensor, is_candidate: Tensor, threshold: float, rounds: int
) -> tuple[Tensor, Tensor]:
    """Greedy suppression of n frames.

    Args:
        rows: (n, k, 7), by falling score. class_ids, is_candidate: (n, k).

    Returns:
        (n, k) bool kept, and (n,) bool, whether another round would change nothing.
    """
    suppresses = _suppression_matrix(rows[..., :4], class_ids, threshold, _count_dtype(rows))
    candidates = is_candidate[:, None].to(suppresses.dtype)
    kept = candidates
    before = kept
    for _ in range(max(1, rounds)):
        before = kept
        # 1 for a candidate less the number of kept ones that drop it.
        kept = torch.baddbmm(candidates, before, suppresses, alpha=-1).clamp_(min=0)
    return kept[:, 0] > 0, (kept == before).all(2)[:, 0]


def _suppression_matrix(
    boxes: Tensor, class_ids: Tensor, threshold: float, dtype: torch.dtype
) -> Tensor:
    """(n, k, k): 1 where the row's candidate, if kept, drops the column's, which comes later.

    Args:
        boxes: (n, k, 4). class_ids: (n, k).
    """
    frames, candidates, _ = boxes.shape
    matrix = torch.zeros(frames, candidates, candidates, dtype=dtype, device=boxes.device)
    for first in range(0, candidates, BLOCK):
        part = slice(first, first + BLOCK)
        overlaps = _overlaps(
            boxes[:, part], boxes[:, first:], class_ids[:, part], class_ids[:, first:], threshold
        )
        matrix[:, part, first:] = overlaps.triu_(1)
    return matrix


def _count_dtype(decoded: Tensor) -> torch.dtype:
    """In which a product counts up to CANDIDATES suppressors; rounding makes none of them 0."""
    return torch.float32 if decoded.is_cpu else torch.float16


def _packed(rows: Tensor, kept: Tensor, is_final: Tensor, most: int) -> Tensor:
    """The return value of `select`.

    Args:
        rows: (n, k, 7). kept: (n, k) bool. is_final: (n,) bool. most: detections per frame.
    """
    place = kept.cumsum(1) - 1
    # All others go to the last row, which is overwritten.
    place = torch.where(kept & (place < most), place, most)
    packed = rows.new_zeros(len(rows), most + 1, COLUMNS)
    packed.scatter_(1, place[..., None].expand(-1, -1, COLUMNS), rows)
    packed[:, most] = 0
    packed[:, most, 0] = kept.sum(1).clamp_(max=most)
    packed[:, most, 1] = is_final
    return packed
