"""pycocotools, which the evaluation is compared with."""

import contextlib
import io

from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval


def coco_evaluation(images: int, annotations: list[dict], results: list[dict], classes) -> COCOeval:
    """Images 1, 2, ...; categories 1, 2, ... in the order of the classes."""
    with contextlib.redirect_stdout(io.StringIO()):
        dataset = COCO()
        dataset.dataset = {
            "images": [{"id": i + 1} for i in range(images)],
            "annotations": annotations,
            "info": {},
            "categories": [{"id": k + 1, "name": name} for k, name in enumerate(classes)],
        }
        dataset.createIndex()
        evaluation = COCOeval(dataset, dataset.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation
