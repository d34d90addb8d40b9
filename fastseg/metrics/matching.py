"""The two steps of COCO's evaluation, as ops: matching of detections with truths, and precision and recall.

A group is one category in one image, its detections by descending score. For every range of areas and IoU threshold,
each detection in turn gets the unmatched truth with the largest IoU that reaches the threshold, the last of equal ones.
It gets an ignored truth (a crowd, or with an area outside the range) only if no other is possible; a crowd may match
any number of detections. A detection does not count if its truth is ignored, or if it has none and its area is outside
the range.
"""

import torch

from fastseg import _check
from fastseg._backend import rows
from fastseg._op import Op
from fastseg.kernels.detection_matching import reference
from fastseg.kernels.detection_matching.reference import FALSE, IGNORED, TRUE

__all__ = ["FALSE", "IGNORED", "TRUE", "match_detections", "precision_recall"]

_DOUBLE, _LONG, _BOOL, _BYTE = (torch.float64,), (torch.int64,), (torch.bool,), (torch.uint8,)


def check_match(ious, detections, truths, ignored, crowd, outside, thresholds):
    name = "match_detections"
    _check.argument(name, "ious", ious, _DOUBLE, ("pairs",))
    _check.argument(name, "detections", detections, _LONG, ("groups + 1",))
    _check.argument(name, "truths", truths, _LONG, detections.shape, "as many groups as detections")
    _check.argument(name, "ignored", ignored, _BOOL, ("ranges", "truths"))
    _check.argument(name, "crowd", crowd, _BOOL, ignored.shape[1:])
    _check.argument(name, "outside", outside, _BOOL, (ignored.shape[0], "detections"))
    _check.argument(name, "thresholds", thresholds, _DOUBLE, ("thresholds",))


# ious [sum of detections x truths over the groups]; detections, truths [groups + 1]: the first of each group
match_detections = Op(
    "match_detections(Tensor ious, Tensor detections, Tensor truths, Tensor ignored, Tensor crowd, Tensor outside,"
    " Tensor thresholds) -> Tensor states",
    check=check_match,
    outputs=lambda ious, ignored, outside, thresholds: ious.new_empty(
        (ignored.shape[0], thresholds.shape[0], outside.shape[1]), dtype=torch.uint8
    ),
    contiguous=("ious", "detections", "truths", "ignored", "crowd", "outside", "thresholds"),
    backends=rows(reference.match_detections, cpu=_DOUBLE),
)


def check_curves(states, ranks, order, categories, positives, max_detections, recall_thresholds):
    name = "precision_recall"
    _check.argument(name, "states", states, _BYTE, ("ranges", "thresholds", "detections"))
    _check.argument(name, "ranks", ranks, _LONG, states.shape[2:])
    _check.argument(name, "order", order, _LONG, states.shape[2:])
    _check.argument(name, "categories", categories, _LONG, ("categories + 1",))
    _check.argument(name, "positives", positives, _LONG, ("categories", states.shape[0]))
    _check.argument(name, "max_detections", max_detections, _LONG, ("limits",))
    _check.argument(name, "recall_thresholds", recall_thresholds, _DOUBLE, ("recalls",))


def outputs_of_curves(states, positives, max_detections, recall_thresholds):
    ranges, thresholds, _ = states.shape
    kinds, limits = positives.shape[0], max_detections.shape[0]
    recalls, new = recall_thresholds.shape[0], recall_thresholds.new_empty
    return new((thresholds, recalls, kinds, ranges, limits)), new((thresholds, kinds, ranges, limits))


# ranks [detections]: position in the group; order [detections]: by category, then by descending score; categories: the
# first of each in `order`. Results are -1 for a category without a truth that counts.
precision_recall = Op(
    "precision_recall(Tensor states, Tensor ranks, Tensor order, Tensor categories, Tensor positives,"
    " Tensor max_detections, Tensor recall_thresholds) -> (Tensor precision, Tensor recall)",
    check=check_curves,
    outputs=outputs_of_curves,
    contiguous=("states", "ranks", "order", "categories", "positives", "max_detections", "recall_thresholds"),
    backends=rows(reference.precision_recall, cpu=_BYTE),
)
