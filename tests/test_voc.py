"""fastseg.metrics.voc and .proposals: golden values, hand-made cases, error messages."""

import math

import numpy
import pytest
import torch

from fastseg.metrics import average_precision, coco_evaluate, proposal_recall, voc_evaluate
from fastseg.metrics.proposals import area_under_curve
from tests.coco_data import GOLDEN, GOLDEN_DETECTIONS, random_data_set, with_masks

HITS = [True, True, False, True, False, False, True]


@pytest.mark.parametrize("method, expected", [("11point", 0.678571), ("area", 0.664286), ("101point", 0.667610)])
def test_golden_average_precision(method, expected):
    """The golden value for 11 points is from the VOC 2007 code, which misses the point at 0.6 by rounding."""
    assert average_precision(HITS, 5, method, strict=True) == pytest.approx(expected, abs=6e-7)
    if method == "11point":
        assert average_precision(HITS, 5, method) == pytest.approx((5 + 2 * 3 / 4 + 2 * 4 / 7) / 11)


def test_strict_recalls_miss_the_point_that_rounding_hides():
    """3 of 10: a recall of 0.3, below numpy's 0.30000000000000004."""
    hits = [True] * 3
    assert average_precision(hits, 10, "11point") == pytest.approx(4 / 11)
    assert average_precision(hits, 10, "11point", strict=True) == pytest.approx(3 / 11)


def test_average_precision_without_truths_or_detections():
    assert math.isnan(average_precision([], 0)) and average_precision([], 3) == 0.0
    with pytest.raises(ValueError, match="method='mean'; allowed: area, 11point, 101point"):
        average_precision([], 1, "mean")


def image(boxes, labels=None, **others):
    labels = torch.ones(len(boxes), dtype=torch.int64) if labels is None else torch.tensor(labels)
    return dict(
        boxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        labels=labels,
        **{name: torch.tensor(value) for name, value in others.items()},
    )


def test_voc_rules():
    truths = [image([[0, 0, 9, 9], [20, 20, 29, 29], [50, 50, 59, 59]], difficult=[False, True, False])]
    found = image(
        [[0, 0, 9, 9], [0, 0, 9, 8], [20, 20, 29, 29], [50, 50, 59, 54], [80, 80, 90, 90]],
        scores=[0.9, 0.8, 0.7, 0.6, 0.5],
    )
    # correct; truth already matched; difficult, not counted; IoU 0.5, not above the threshold; no truth
    result = voc_evaluate([found], truths)
    assert result["per_class"] == {1: average_precision([True, False, False, False], 2)}
    assert voc_evaluate([found], truths, iou_threshold=0.49)["per_class"][1] == average_precision(
        [True, False, True, False], 2
    )


def test_voc_classes_and_images_are_apart():
    truths = [image([[0, 0, 9, 9]], [1]), image([[0, 0, 9, 9]], [2]), image([], [])]
    found = [
        image([[0, 0, 9, 9]], [2], scores=[0.9]),
        image([[0, 0, 9, 9]], [2], scores=[0.3]),
        image([[0, 0, 9, 9]], [3], scores=[0.9]),
    ]
    assert voc_evaluate(found, truths) == {"mAP": 0.25, "per_class": {1: 0.0, 2: 0.5}}


@pytest.mark.parametrize(
    "found, message",
    [
        ([], "detections of 0 images; allowed: 1"),
        ([image([[0, 0, 1, 1]])], r"detections\[0\] has no 'scores'"),
        ([image([[0, 0, 1, 1]], scores=[0.5, 0.5])], r"\['scores'\] has shape \(2,\); allowed: \(1,\)"),
        ([image([[0, 0, 1, 1]], scores=[float("nan")])], "a score that is NaN"),
    ],
)
def test_voc_errors(found, message):
    with pytest.raises(ValueError, match=message):
        voc_evaluate(found, [image([[0, 0, 1, 1]])])


def test_golden_proposals():
    figures = proposal_recall(GOLDEN, GOLDEN_DETECTIONS, counts=(1, 2, 3))
    assert [figures[f"AR@{n}"] for n in (1, 2, 3)] == pytest.approx([0.3, 2 / 3, 0.7])
    assert list(figures) == ["AR@1", "AR@2", "AR@3", "AUC", "AUCs", "AUCm", "AUCl"] and figures["AUCl"] == -1.0


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_recall_of_proposals_is_that_of_coco_without_categories(iou_type):
    annotations, detections = random_data_set(3, images=8)
    if iou_type == "segm":
        annotations, detections = with_masks(annotations, detections)
    counts = (1, 3, 10)
    expected = coco_evaluate(annotations, detections, iou_type, use_categories=False, max_detections=counts)
    figures = proposal_recall(annotations, detections, iou_type, counts=counts)
    assert [figures[f"AR@{n}"] for n in counts] == pytest.approx([expected[f"AR@{n}"] for n in counts], abs=1e-12)


@pytest.mark.parametrize("first, recalls, expected", [(2.5, (12.6, 24.5, 33.1), 18.3), (None, (50, 50, 50), 50)])
def test_area_under_the_curve_of_published_rows(first, recalls, expected):
    """DeepMask's published AR@10, AR@100, AR@1000 and AUC, with an assumed AR@1; and a constant."""
    values = [recalls[0] if first is None else first, *recalls]
    curve = numpy.interp(numpy.log10(numpy.arange(1, 1001)), [0, 1, 2, 3], values)
    assert area_under_curve(curve) == pytest.approx(expected, abs=0.1)
