"""Labels of other tools: COCO, YOLO, Pascal VOC, CVAT, CSV and MOT, read and written."""
