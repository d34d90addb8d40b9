"""The kernels of the metrics, called with unchecked values: they must raise or return numbers, at once."""

import pytest
import torch

import fastseg.metrics  # noqa: F401  defines the ops

NAN, INF = float("nan"), float("inf")
OPS = torch.ops.fastseg
pytestmark = pytest.mark.sanitized


def matching(**changes):
    """Two groups: two detections and one truth; one detection and two truths."""
    arguments = dict(
        ious=torch.rand(4).double(), detections=torch.tensor([0, 2, 3]), truths=torch.tensor([0, 1, 3]),
        ignored=torch.zeros(2, 3, dtype=torch.bool), crowd=torch.zeros(3, dtype=torch.bool),
        outside=torch.zeros(2, 3, dtype=torch.bool), thresholds=torch.tensor([0.5, 0.75]).double(),
    )  # fmt: skip
    return OPS.match_detections(*(arguments | changes).values())


def curves(**changes):
    """Two categories, with three detections and with none."""
    arguments = dict(
        states=torch.ones(1, 2, 3, dtype=torch.uint8), ranks=torch.tensor([0, 1, 0]), order=torch.tensor([2, 0, 1]),
        categories=torch.tensor([0, 3, 3]), positives=torch.tensor([[5], [0]]), max_detections=torch.tensor([1, 9]),
        recall_thresholds=torch.tensor([0.0, 0.5, 1.0]).double(),
    )  # fmt: skip
    return OPS.precision_recall(*(arguments | changes).values())


@pytest.mark.parametrize("offsets", [[0, 3, 2], [1, 2, 3], [0, 2, 4], [0, -1, 3], [0, 2**62, 3]])
def test_offsets_that_do_not_rise(offsets):
    for name in ("detections", "truths"):
        with pytest.raises(RuntimeError, match=f"{name} must rise from 0 to 3"):
            matching(**{name: torch.tensor(offsets)})
    with pytest.raises(RuntimeError, match="categories must rise from 0 to 3"):
        curves(categories=torch.tensor(offsets))


def test_too_few_ious():
    with pytest.raises(RuntimeError, match="ious must be .* with 4 elements"):
        matching(ious=torch.rand(3).double())


@pytest.mark.parametrize("value", [NAN, INF, -INF, 1e308])
def test_strange_ious_and_thresholds(value):
    for name, count in (("ious", 4), ("thresholds", 2)):
        assert matching(**{name: torch.full((count,), value, dtype=torch.float64)}).max() <= 2
    precision, recall = curves(recall_thresholds=torch.tensor([value, 0.5, -value], dtype=torch.float64))
    assert precision.isfinite().all() and recall.isfinite().all()


@pytest.mark.parametrize("value", [-1, 3, 2**62, -(2**63)])
def test_numbers_of_no_detection(value):
    with pytest.raises(RuntimeError, match="order must hold numbers of detections"):
        curves(order=torch.tensor([0, value, 1]))
    assert curves(ranks=torch.full((3,), value), positives=torch.full((2, 1), value))[0].max() <= 1
    curves(max_detections=torch.tensor([value, value]), states=torch.full((1, 2, 3), 77, dtype=torch.uint8))


SQUARE = torch.tensor([[1, 1], [4, 1], [4, 3], [1, 3]]).double()


@pytest.mark.parametrize("value", [NAN, INF, -INF, 1e9, 1e300, -1e19])
def test_corners_of_no_image(value):
    points = SQUARE.clone()
    points[2, 0] = value
    with pytest.raises(RuntimeError, match="points must lie within 1e8 pixels"):
        OPS.fill_polygons(points, torch.tensor([4]), torch.tensor([0]), 1, 5, 6)


@pytest.mark.parametrize("ends, objects, message", [
    ([5], [0], "ends must rise"), ([3, 2], [0, 0], "ends must rise"), ([-1], [0], "ends must rise"),
    ([2**62], [0], "ends must rise"), ([4], [1], "objects must rise"), ([4], [-1], "objects must rise"),
    ([2, 4], [1, 0], "objects must rise"),
])  # fmt: skip
def test_polygons_of_no_object(ends, objects, message):
    with pytest.raises(RuntimeError, match=message):
        OPS.fill_polygons(SQUARE, torch.tensor(ends), torch.tensor(objects), 1, 5, 6)


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_polygons_of_few_points(count):
    """Fewer than three points, or none, enclose nothing."""
    words = OPS.fill_polygons(SQUARE[:count], torch.tensor([count]), torch.tensor([0]), 1, 5, 6)
    assert words.any() == (count == 3)
