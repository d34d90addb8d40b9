"""fastseg.metrics.coco against pycocotools itself: `make test-interop`."""

import contextlib
import copy
import io

import pytest

from fastseg.metrics import coco_evaluate
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
