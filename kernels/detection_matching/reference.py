"""COCO's matching of detections with truths, and its precision and recall, in plain Python: the definition."""

import torch
from torch import Tensor

FALSE, TRUE, IGNORED = 0, 1, 2  # states of a detection: false positive, true positive, not counted
EPS = 2.0**-52  # numpy.spacing(1), as pycocotools adds it


def match_detections(
    ious: Tensor,
    detections: Tensor,
    truths: Tensor,
    ignored: Tensor,
    crowd: Tensor,
    outside: Tensor,
    thresholds: Tensor,
) -> Tensor:
    ranges = len(ignored)
    states = torch.zeros(ranges, len(thresholds), outside.shape[1], dtype=torch.uint8)
    first_iou = 0
    for group in range(len(detections) - 1):
        found = range(detections[group], detections[group + 1])
        real = range(truths[group], truths[group + 1])
        table = ious[first_iou : first_iou + len(found) * len(real)].view(len(found), len(real)).tolist()
        first_iou += len(found) * len(real)
        for area in range(ranges):
            for t, threshold in enumerate(thresholds.tolist()):
                taken = set()
                for row, detection in zip(table, found):
                    best = _best(row, real, ignored[area].tolist(), crowd.tolist(), taken, min(threshold, 1 - 1e-10))
                    if best is not None:
                        taken.add(best)
                        states[area, t, detection] = IGNORED if ignored[area, best] else TRUE
                    elif outside[area, detection]:
                        states[area, t, detection] = IGNORED
    return states


def _best(row, real, ignored, crowd, taken, threshold):
    """The truth that matches a detection, or None; truths that count are tried before ignored ones."""
    for ignores in (False, True):
        best, least = None, threshold
        for iou, truth in zip(row, real):
            if ignored[truth] == ignores and iou >= least and (truth not in taken or crowd[truth]):
                best, least = truth, iou
        if best is not None:
            return best
    return None


def precision_recall(
    states: Tensor,
    ranks: Tensor,
    order: Tensor,
    categories: Tensor,
    positives: Tensor,
    max_detections: Tensor,
    recall_thresholds: Tensor,
) -> tuple[Tensor, Tensor]:
    ranges, thresholds, _ = states.shape
    count, most = len(categories) - 1, len(max_detections)
    precision = torch.full((thresholds, len(recall_thresholds), count, ranges, most), -1.0, dtype=torch.float64)
    recall = torch.full((thresholds, count, ranges, most), -1.0, dtype=torch.float64)
    for k in range(count):
        own = order[categories[k] : categories[k + 1]]
        for area in range(ranges):
            if positives[k, area] == 0:
                continue
            for m, limit in enumerate(max_detections.tolist()):
                counted = states[area][:, own[ranks[own] < limit]]  # [T, detections by falling score]
                hits, misses = (counted == TRUE).cumsum(1).double(), (counted == FALSE).cumsum(1).double()
                recalls = hits / positives[k, area]
                envelope = (hits / (hits + misses + EPS)).flip(1).cummax(1).values.flip(1)
                at = torch.searchsorted(recalls, recall_thresholds.expand(thresholds, -1).contiguous())
                padded = torch.cat([envelope, envelope.new_zeros(thresholds, 1)], 1)  # 0 where recall is not reached
                precision[:, :, k, area, m] = padded.gather(1, at)
                recall[:, k, area, m] = recalls[:, -1] if recalls.shape[1] else 0.0
    return precision, recall
