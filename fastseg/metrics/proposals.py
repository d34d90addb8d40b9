"""Recall of proposals without regard to categories: AR@n, and the area under AR over the logarithm of n."""

from collections.abc import Mapping, Sequence

import numpy

from fastseg.metrics.coco import AREAS, IOU_THRESHOLDS, IOU_TYPES, check_limits, table_of_json
from fastseg.metrics.detection_table import states_of
from fastseg.metrics.matching import TRUE

CURVE_PROPOSALS = 1000  # proposals per image for the area under the curve


def proposal_recall(
    annotations: Mapping,
    proposals: Sequence[Mapping],
    iou_type: str = "bbox",
    *,
    counts: Sequence[int] = (10, 100, 1000),
    progress: bool = False,
) -> dict[str, float]:
    """Average recall of the n best proposals per image, and the area under its curve, as in DeepMask and SharpMask.

        AR@n  mean over IoU thresholds 0.5, 0.55, ..., 0.95 of the recall of the n best proposals per image, crowds
              ignored
        AUC   1/3 of the integral of AR@n over log10 n from 1 to 1000, by trapezoids between all n

    Args:
        annotations, proposals, iou_type, progress: as in `coco_evaluate`; proposals need no category_id.
        counts: the values of n to report, ascending.

    Returns:
        {"AR@10", "AR@100", "AR@1000", "AUC", "AUCs", "AUCm", "AUCl"}: the last three for truths of small, medium and
        large area (COCO's); -1 without such truths.

    Raises:
        ValueError: as in `coco_evaluate`.
    """
    counts = check_limits(counts)
    if iou_type not in IOU_TYPES:
        raise ValueError(f"fastseg.metrics.proposal_recall: iou_type={iou_type!r}; allowed: {', '.join(IOU_TYPES)}")
    most = max(CURVE_PROPOSALS, counts[-1])
    proposals = [{"category_id": 0} | entry if isinstance(entry, dict) else entry for entry in proposals]
    table, _ = table_of_json(annotations, proposals, iou_type, most, use_categories=False, progress=progress)
    states, counted = states_of(table, IOU_THRESHOLDS, list(AREAS.values()))
    curves = [recall_curve(states[area], table.ranks, counted[area].sum(), most) for area in range(len(AREAS))]
    figures = {f"AR@{n}": float(curves[0][n - 1]) for n in counts}
    return figures | {f"AUC{name}": area_under_curve(curve[:CURVE_PROPOSALS]) for name, curve in zip(AREAS, curves)}


def recall_curve(states: numpy.ndarray, ranks: numpy.ndarray, positives: int, most: int) -> numpy.ndarray:
    """AR@1 to AR@most [most] from states [thresholds, detections]; -1 without a truth. One matching gives all: that of
    a detection does not depend on those with lower scores.
    """
    if positives == 0:
        return numpy.full(most, -1.0)
    hits = [numpy.bincount(ranks[row == TRUE], minlength=most)[:most].cumsum() for row in states]
    return numpy.mean(hits, 0) / positives


def area_under_curve(recall: numpy.ndarray) -> float:
    """The area under AR@1, AR@2, ... over log10 n, divided by the length of that axis."""
    if recall[0] < 0:
        return -1.0
    at = numpy.log10(numpy.arange(1, len(recall) + 1))
    return float(numpy.trapezoid(recall, at) / at[-1])
