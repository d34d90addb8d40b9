"""fastseg.metrics.coco: golden values, hand-made cases, C++ against the reference, error messages."""

import numpy
import pytest
import torch

from fastseg.metrics import coco_evaluate, coco_masks, progress
from fastseg.metrics.coco import AREAS, IOU_THRESHOLDS, RECALLS, table_of_json
from fastseg.metrics.detection_table import states_of
from fastseg.metrics.matching import match_detections, precision_recall
from fastseg.ops import masks_to_rle
from tests.coco_data import (
    GOLDEN,
    GOLDEN_DETECTIONS,
    annotation,
    data_set,
    detection,
    random_data_set,
    with_masks,
)

GOLDEN_FIGURES = {
    "AP": 0.594884,
    "AP50": 0.915842,
    "AP75": 0.5,
    "APs": 0.4,
    "APm": 0.710726,
    "APl": -1.0,
    "AR@1": 0.3,
    "AR@10": 0.7,
    "AR@100": 0.7,
    "ARs": 0.4,
    "ARm": 0.85,
    "ARl": -1.0,
}


def test_golden_figures():
    result = coco_evaluate(GOLDEN, GOLDEN_DETECTIONS, "bbox")
    assert list(result) == list(GOLDEN_FIGURES)
    assert dict(result) == pytest.approx(GOLDEN_FIGURES, abs=6e-7)
    assert result.per_class[1] == pytest.approx(GOLDEN_FIGURES, abs=6e-7)
    assert "AP50  0.916" in str(result)


def test_golden_recall_of_proposals():
    moved = [entry | {"category_id": 7} for entry in GOLDEN_DETECTIONS]
    result = coco_evaluate(GOLDEN, moved, max_detections=(1, 2, 3), use_categories=False)
    assert [result[f"AR@{n}"] for n in (1, 2, 3)] == pytest.approx([0.3, 2 / 3, 0.7])


def test_the_last_of_equal_truths_is_taken():
    """A later truth of the same IoU wins; only the first remains for the second detection, which misses it."""
    truths = data_set([annotation(1, 1, (0, 0, 10, 10)), annotation(2, 1, (20, 0, 10, 10))], [1])
    both = [detection(1, (10, 0, 10, 10), 0.9), detection(1, (20, 0, 10, 10), 0.8)]
    assert coco_evaluate(truths, both)["AR@100"] == 0.5
    twins = data_set([annotation(1, 1, (0, 0, 10, 10), area=50), annotation(2, 1, (0, 0, 10, 10), area=2000)], [1])
    result = coco_evaluate(twins, [detection(1, (0, 0, 10, 10), 0.9)])
    assert result["ARm"] == 1.0 and result["ARs"] == 1.0 and result["AR@1"] == 0.5


def test_an_annotation_id_of_zero_counts():
    truths = data_set([annotation(0, 1, (0, 0, 10, 10))], [1])
    assert coco_evaluate(truths, [detection(1, (0, 0, 10, 10), 0.5)])["AP"] == pytest.approx(1.0)


def test_average_precision_is_that_of_the_last_limit():
    result = coco_evaluate(GOLDEN, GOLDEN_DETECTIONS, max_detections=(1, 3))
    assert list(result)[6:8] == ["AR@1", "AR@3"] and result["AP"] == pytest.approx(GOLDEN_FIGURES["AP"], abs=6e-7)


def test_nothing_found_and_nothing_true():
    assert coco_evaluate(GOLDEN, [])["AP"] == 0.0
    assert set(coco_evaluate(data_set([], [1, 2]), GOLDEN_DETECTIONS).figures.values()) == {-1.0}
    assert set(coco_evaluate(data_set([], [1]), []).figures.values()) == {-1.0}


def test_crowds_take_any_number_and_cost_nothing():
    truths = data_set([annotation(1, 1, (0, 0, 50, 50)), annotation(2, 1, (100, 0, 100, 100), crowd=1)], [1])
    found = [detection(1, (0, 0, 50, 50), 0.5)]
    crowd = [detection(1, (100 + 10 * i, 10, 10, 10), 0.9) for i in range(5)]
    assert coco_evaluate(truths, found + crowd)["AP"] == pytest.approx(coco_evaluate(truths, found)["AP"])


def boxes_as_masks(entries, form):
    """The golden boxes have integer corners: as masks they give the same results."""
    found = []
    for entry in entries:
        x, y, width, height = entry["bbox"]
        mask = torch.zeros(1, 120, 110, dtype=torch.bool)
        mask[0, y : y + height, x : x + width] = True
        segmentation = [[x, y, x, y + height, x + width, y + height, x + width, y]]
        if form != "polygons":
            segmentation = masks_to_rle(mask, compressed=form == "text")[0]
        found.append({name: value for name, value in entry.items() if name != "bbox"} | {"segmentation": segmentation})
    return found


MASK_IMAGES = [{"id": image, "height": 120, "width": 110} for image in (1, 2)]


@pytest.mark.parametrize("form", ["polygons", "list", "text"])
def test_golden_figures_of_masks(form):
    truths = GOLDEN | {"annotations": boxes_as_masks(GOLDEN["annotations"], form), "images": MASK_IMAGES}
    found = boxes_as_masks(GOLDEN_DETECTIONS, form)
    assert dict(coco_evaluate(truths, found, "segm")) == pytest.approx(GOLDEN_FIGURES, abs=6e-7)
    moved = [entry | {"category_id": 7} for entry in found]
    result = coco_evaluate(truths, moved, "segm", max_detections=(1, 2, 3), use_categories=False)
    assert [result[f"AR@{n}"] for n in (1, 2, 3)] == pytest.approx([0.3, 2 / 3, 0.7])


def test_no_masks():
    truths = GOLDEN | {"annotations": boxes_as_masks(GOLDEN["annotations"], "text")}
    found = boxes_as_masks(GOLDEN_DETECTIONS, "text")
    assert coco_evaluate(truths, [], "segm")["AP"] == 0.0
    for detections in ([], found):
        assert set(coco_evaluate(data_set([], [1, 2]), detections, "segm").values()) == {-1.0}
    empty = [{"image_id": 1, "category_id": 1, "score": 0.5, "segmentation": {"size": [120, 110], "counts": [13200]}}]
    assert coco_evaluate(truths, empty, "segm")["AP"] == 0.0


def test_areas_of_masks_and_of_boxes():
    """Without boxes, areas are those of the masks; with them those of the boxes, as in pycocotools."""
    truths = data_set([annotation(1, 1, (0, 0, 9, 9)) | {"segmentation": [[90, 90, 99, 90, 99, 99]]}], [1])
    truths["images"] = MASK_IMAGES[:1]
    found = [{"image_id": 1, "category_id": 1, "score": 0.5, "segmentation": [[0, 0, 40, 0, 40, 40, 0, 40]]}]
    assert table_of_json(truths, found, "segm", 9)[0].detections.area.tolist() == [1600]
    for box in ([0, 0, 10, 10], numpy.array([0, 0, 10, 10])):
        boxed = [found[0] | {"bbox": box}]
        assert table_of_json(truths, boxed, "segm", 9)[0].detections.area.tolist() == [100]
    assert table_of_json(truths, [found[0] | {"bbox": []}], "segm", 9)[0].detections.area.tolist() == [1600]
    only_box = [detection(1, (90, 89, 9, 10), 0.5)]
    table, _ = table_of_json(truths, only_box, "segm", 9)
    assert table.ious.tolist() == [36 / 90] and table.detections.area.tolist() == [90]


def test_parts_of_the_masks_at_a_time(monkeypatch):
    data = with_masks(*random_data_set(4, images=5, categories=2), seed=4)
    expected = coco_evaluate(*data, "segm")
    monkeypatch.setattr(coco_masks, "_AT_A_TIME", 3)
    monkeypatch.setattr(coco_masks, "_PIXELS_AT_A_TIME", 1)
    assert dict(coco_evaluate(*data, "segm")) == dict(expected) and expected["AP"] > 0.01


@pytest.mark.parametrize("bar", ["lines", "tqdm"])
def test_progress(bar, monkeypatch, capsys):
    data = with_masks(*random_data_set(4, images=5, categories=2), seed=4)
    monkeypatch.setattr(coco_masks, "_AT_A_TIME", 3)
    if bar == "lines":
        monkeypatch.setattr(progress, "tqdm", None)
    elif progress.tqdm is None:
        pytest.skip("tqdm is not installed")
    coco_evaluate(*data, "segm")
    assert capsys.readouterr() == ("", "")
    coco_evaluate(*data, "segm", progress=True)
    out, shown = capsys.readouterr()
    assert out == "" and "areas of masks: " in shown and "IoU of masks: " in shown
    assert ("100 %" in shown) == (bar == "lines")


@pytest.mark.sanitized
@pytest.mark.parametrize("seed", range(4))
def test_the_kernels_equal_the_definition(seed):
    truths, found = random_data_set(seed, images=6)
    table, categories = table_of_json(truths, found, "bbox", most=7)
    states, counts = states_of(table, IOU_THRESHOLDS, list(AREAS.values()))
    tensors = [
        torch.from_numpy(numpy.ascontiguousarray(array))
        for array in (
            table.ious,
            table.first_detection,
            table.first_truth,
            ~counts,
            table.truths.crowd,
            torch.rand(4, len(table.detections), generator=torch.Generator().manual_seed(seed)).numpy() < 0.5,
            IOU_THRESHOLDS,
        )
    ]
    expected = match_detections(*tensors, backend="reference")
    assert torch.equal(match_detections(*tensors), expected) and len(expected.unique()) == 3
    kind = numpy.searchsorted(categories, table.detections.category)
    order = numpy.lexsort((-table.detections.score, kind))
    curves = (
        expected,
        torch.from_numpy(table.ranks),
        torch.from_numpy(order),
        torch.from_numpy(numpy.searchsorted(kind[order], numpy.arange(len(categories) + 1))),
        torch.from_numpy(numpy.random.default_rng(seed).integers(0, 30, (len(categories), 4))),
        torch.tensor([1, 3, 7]),
        torch.from_numpy(RECALLS),
    )
    for ours, definition in zip(precision_recall(*curves), precision_recall(*curves, backend="reference")):
        torch.testing.assert_close(ours, definition, rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(annotations=5), "annotations have no 'images'"),
        (dict(detections=[{"image_id": 1, "category_id": 1, "score": 0.5}]), r"detections\[0\] has no 'bbox'"),
        (dict(detections=[detection(9, (0, 0, 1, 1), 0.5)]), "image_id 9; allowed: the ids in 'images'"),
        (dict(detections=[detection(1, (0, 0, 1, 1), float("nan"))]), "score that is NaN"),
        (
            dict(detections=[detection(1, (0, 0, 1), 0.5) | {"bbox": [0, 0, 1]}]),
            r"detections\[0\]\['bbox'\]=\[0, 0, 1\]; allowed: \[x, y, width, height\]",
        ),
        (dict(iou_type="keypoints"), "iou_type='keypoints'; allowed: bbox, segm"),
        (dict(max_detections=(10, 1)), "max_detections=.*rising"),
        (dict(max_detections=()), "max_detections=.*rising"),
    ],
)
def test_errors(change, message):
    with pytest.raises(ValueError, match=message):
        coco_evaluate(**dict(annotations=GOLDEN, detections=GOLDEN_DETECTIONS) | change)


SEGMENTED = GOLDEN | {"annotations": boxes_as_masks(GOLDEN["annotations"], "text"), "images": MASK_IMAGES}
RLE = {"size": [120, 110], "counts": [0, 13200]}


def second_mask(change):
    """Detections, the second of which has another mask."""
    found = boxes_as_masks(GOLDEN_DETECTIONS, "text")
    return dict(detections=[found[0], found[1] | {"segmentation": change}, *found[2:]])


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(detections=[{"image_id": 1, "category_id": 1, "score": 0.5}]), r"detections\[0\] has no 'segmentation'"),
        (second_mask(5), r"detections\[1\]\['segmentation'\]=5; allowed: a list of polygons, or {"),
        (second_mask([]), r"detections\[1\]\['segmentation'\]=\[\]; allowed: a list of polygons"),
        (second_mask({"size": [120, 110]}), r"detections\[1\]\['segmentation'\]={.*}; allowed: {"),
        (second_mask(RLE | {"size": [120.5, 110]}), r"detections\[1\]\['segmentation'\]={.*}; allowed: {"),
        (second_mask(RLE | {"size": 5}), r"detections\[1\]\['segmentation'\]={.*}; allowed: {"),
        (second_mask(RLE | {"size": [2**20, 2**20]}), r"detections\[1\]\['segmentation'\]={.*}; allowed: {"),
        (second_mask(RLE | {"counts": "~"}), r"detections\[1\]\['segmentation'\]\['counts'\]='~' holds a character"),
        (
            second_mask(RLE | {"counts": [5]}),
            r"detections\[1\]\['segmentation'\]\['counts'\] add up to 5; allowed: 132",
        ),
        (
            second_mask({"size": [110, 120], "counts": [13200]}),
            r"detections\[1\]\['segmentation'\] is a mask of 110 x 120; allowed: 120 x 110, as "
            r"annotations\['annotations'\]\[0\]\['segmentation'\]",
        ),
        (second_mask([[0, 0, 1, 1]]), r"detections\[1\]\['segmentation'\] has a polygon of 4 coordinates"),
        (second_mask([["a"] * 6]), r"detections\[1\]\['segmentation'\] has a polygon \['a'"),
        (second_mask([7]), r"detections\[1\]\['segmentation'\] has a polygon 7"),
        (
            second_mask([[0, 0, 1, 1, 2, 1e10]]),
            r"detections\[1\]\['segmentation'\] has a polygon with the coordinate 1000",
        ),
        (
            second_mask([[0, 0, 1, 1, 2, 0]])
            | {"annotations": SEGMENTED | {"images": [{"id": 1, "height": "a"}, {"id": 2}]}},
            r"detections\[1\]\['segmentation'\] is polygons, and its image has height='a', width=None; allowed: ints",
        ),
    ],
)
def test_errors_of_masks(change, message):
    found = boxes_as_masks(GOLDEN_DETECTIONS, "text")
    with pytest.raises(ValueError, match=f"fastseg.metrics: {message}"):
        coco_evaluate(**dict(annotations=SEGMENTED, detections=found, iou_type="segm") | change)
    with pytest.raises(TypeError, match="counts'.=5; allowed: bytes, str, or ints"):
        coco_evaluate(**dict(annotations=SEGMENTED, iou_type="segm") | second_mask(RLE | {"counts": 5}))


def test_unknown_categories_of_truths_are_left_out():
    more = [annotation(9, 1, (10, 10, 40, 40), category=5)]
    result = coco_evaluate(GOLDEN | {"annotations": GOLDEN["annotations"] + more}, GOLDEN_DETECTIONS)
    assert dict(result) == pytest.approx(GOLDEN_FIGURES, abs=6e-7)


def test_unknown_categories_are_named():
    with pytest.warns(UserWarning, match="1 detections have a category_id .* such as 5"):
        result = coco_evaluate(GOLDEN, [*GOLDEN_DETECTIONS, detection(1, (10, 10, 40, 40), 0.99, category=5)])
    assert dict(result) == pytest.approx(GOLDEN_FIGURES, abs=6e-7)
