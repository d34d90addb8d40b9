"""fastseg.metrics.coco against pycocotools: `make test-interop`."""

import contextlib
import copy
import io

import numpy
import pytest
import torch

from fastseg.metrics import coco_evaluate
from fastseg.metrics.polygons import polygons_to_masks
from fastseg.ops import unpack_masks
from tests.coco_data import random_data_set, with_masks

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
    compare(*random_data_set(seed, ties=ties), "bbox", use_categories)


def compare(annotations, detections, iou_type, use_categories=True):
    ours = coco_evaluate(annotations, detections, iou_type, use_categories=use_categories)
    theirs = pycocotools(annotations, detections, iou_type, use_categories)
    assert list(ours.values()) == pytest.approx(theirs.stats.tolist(), abs=1e-12)
    assert ours.curves.precision == pytest.approx(theirs.eval["precision"], abs=1e-12)
    assert ours.curves.recall == pytest.approx(theirs.eval["recall"], abs=1e-12)
    return ours


@pytest.mark.parametrize("use_categories", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_masks(seed, use_categories):
    """Polygons and run lengths of all kinds, crowds among them."""
    annotations, detections = with_masks(*random_data_set(seed, images=12, categories=3), seed)
    assert compare(annotations, detections, "segm", use_categories)["AP"] > 0.03


def test_masks_of_detections_with_boxes():
    """Areas are those of the boxes, and a box is the mask of a detection without a mask."""
    annotations, boxed = random_data_set(1, images=10, categories=2)
    annotations, masked = with_masks(annotations, boxed, 1)
    both = [box | mask if i % 3 else box for i, (box, mask) in enumerate(zip(boxed, masked))]
    compare(annotations, both, "segm")
    compare(annotations, [box | {"segmentation": [[0, 0, 50, 0, 50, 50]]} for box in boxed], "segm")


@pytest.mark.filterwarnings("ignore:fastseg.metrics")
def test_unknown_categories_are_left_out():
    annotations, detections = random_data_set(3, images=10)
    compare(annotations | {"categories": annotations["categories"][1:-1]}, detections, "bbox")


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
