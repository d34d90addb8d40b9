"""fastseg.metrics.coco against pycocotools itself: `make test-interop`."""

import contextlib
import copy
import io

import numpy
import pytest
import torch

from fastseg.metrics import coco_evaluate
from fastseg.metrics.polygons import polygons_to_masks
from fastseg.ops import unpack_masks
from tests.coco_data import random_data_set

COCO = pytest.importorskip("pycocotools.coco").COCO
COCOeval = pytest.importorskip("pycocotools.cocoeval").COCOeval


def pycocotools(annotations, detections, iou_type="bbox", use_categories=True):
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = copy.deepcopy(annotations)
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(copy.deepcopy(detections)), iou_type)
        evaluation.params.useCats = use_categories
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


@pytest.mark.parametrize("use_categories", [True, False])
@pytest.mark.parametrize("ties", [True, False])
@pytest.mark.parametrize("seed", range(6))
def test_boxes(seed, ties, use_categories):
    annotations, detections = random_data_set(seed, ties=ties)
    ours = coco_evaluate(annotations, detections, "bbox", use_categories=use_categories)
    theirs = pycocotools(annotations, detections, use_categories=use_categories)
    assert list(ours.values()) == pytest.approx(theirs.stats.tolist(), abs=1e-12)
    assert ours.curves.precision == pytest.approx(theirs.eval["precision"], abs=1e-12)
    assert ours.curves.recall == pytest.approx(theirs.eval["recall"], abs=1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_polygons(seed):
    mask = pytest.importorskip("pycocotools.mask")
    random = numpy.random.default_rng(seed)
    height, width = (int(random.integers(1, 90)) for _ in range(2))
    objects = []
    for _ in range(20):
        corners = [random.uniform(-20, 100, 2 * random.integers(3, 9)) for _ in range(random.integers(1, 4))]
        objects.append([(points.round() if random.random() < 0.3 else points).tolist() for points in corners])
    ours = unpack_masks(polygons_to_masks(objects, (height, width)), torch.uint8).numpy()
    for found, polygons in zip(ours, objects):
        expected = mask.decode(mask.merge(mask.frPyObjects(polygons, height, width)))
        assert (found == expected).all()
