"""Metrics: of label maps, from a confusion matrix; of detections, by COCO's and VOC's rules.

The modules `segmentation`, `coco`, `proposals` and `voc` define them.
"""

from fastseg.metrics.coco import CocoResult, coco_evaluate
from fastseg.metrics.coco_evaluator import CocoEvaluator
from fastseg.metrics.proposals import proposal_recall
from fastseg.metrics.segmentation import (
    METRICS,
    SegmentationMetrics,
    class_accuracy,
    dice,
    frequency_weighted_iou,
    iou,
    mean_accuracy,
    mean_dice,
    mean_iou,
    pixel_accuracy,
)
from fastseg.metrics.voc import average_precision, voc_evaluate

__all__ = [
    "METRICS",
    "CocoEvaluator",
    "CocoResult",
    "SegmentationMetrics",
    "average_precision",
    "class_accuracy",
    "coco_evaluate",
    "dice",
    "frequency_weighted_iou",
    "iou",
    "mean_accuracy",
    "mean_dice",
    "mean_iou",
    "pixel_accuracy",
    "proposal_recall",
    "voc_evaluate",
]
