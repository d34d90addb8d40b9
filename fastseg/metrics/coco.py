"""COCO's detection metrics: average precision and recall of boxes or masks, equal to pycocotools' to rounding.

    AP    mean over IoU thresholds 0.5, 0.55, ..., 0.95, categories and 101 recalls of the precision at that recall,
          which
          is the largest at that recall or more
    AR@n  mean over thresholds and categories of the recall of the n best detections per image

Two deviations: an annotation id of 0 counts as any other (pycocotools takes its match for none), and AP is that of the
last of `max_detections` (pycocotools' is that of 100, and -1 where 100 is not among them).
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy

from fastseg.metrics.detection_table import Curves, Instances, Table, box_ious, curves_of, group

IOU_THRESHOLDS = numpy.linspace(0.5, 0.95, 10)
RECALLS = numpy.linspace(0.0, 1.0, 101)
AREAS = {"": (0.0, 1e10), "s": (0.0, 32.0**2), "m": (32.0**2, 96.0**2), "l": (96.0**2, 1e10)}  # pixels, ends included
MAX_DETECTIONS = (1, 10, 100)
IOU_TYPES = ("bbox", "segm")


@dataclass(frozen=True)
class CocoResult(Mapping):
    """The figures of a data set by name, in pycocotools' order: AP, AP50, AP75, APs, APm, APl, AR@1, AR@10, AR@100,
    ARs, ARm, ARl (those of small, medium and large areas); -1 where there is no truth to count.

    per_class: the same of every category by its id. curves: precision and recall themselves.
    """

    figures: dict[str, float]
    per_class: dict
    curves: Curves

    def __getitem__(self, name: str) -> float:
        return self.figures[name]

    def __iter__(self):
        return iter(self.figures)

    def __len__(self) -> int:
        return len(self.figures)

    def __str__(self) -> str:
        return "\n".join(f"{name:>7}  {value:.3f}" for name, value in self.figures.items())


def coco_evaluate(
    annotations: Mapping,
    detections: Sequence[Mapping],
    iou_type: str = "bbox",
    *,
    max_detections: Sequence[int] = MAX_DETECTIONS,
    use_categories: bool = True,
    progress: bool = False,
) -> CocoResult:
    """Evaluates detections of a data set, both in COCO's own structures.

    Equals pycocotools' `COCOeval` with its default parameters, but for the two deviations above.

    Args:
        annotations: {"images": [{"id"}], "annotations": [{"image_id", "category_id", "area", "bbox" (x, y, width,
            height) or "segmentation", "iscrowd" (0 by default)}], "categories": [{"id"}]}, as json.load gives it.
        detections: [{"image_id", "category_id", "score", "bbox" or "segmentation"}]. Those of categories that the
            annotations do not know are left out, with a warning.
        iou_type: "bbox" for boxes, "segm" for masks (polygons, or run lengths, compressed or not).
        max_detections: detections per image and category that are counted, rising; the last is that of AP.
        use_categories: False to match whatever the category, as for proposals.
        progress: show how far it has come.

    Raises:
        ValueError: structures that lack a field, ids that are not in "images", scores that are NaN, and other values
            that
            do not fit, by name.
    """
    limits = check_limits(max_detections)
    if iou_type not in IOU_TYPES:
        raise ValueError(f"fastseg.metrics.coco_evaluate: iou_type={iou_type!r}; allowed: {', '.join(IOU_TYPES)}")
    table, categories = table_of_json(annotations, detections, iou_type, limits[-1], use_categories, progress)
    return summarize(table, categories, limits)


def check_limits(max_detections: Sequence[int]) -> list[int]:
    limits = [int(limit) for limit in max_detections]
    if not limits or limits != sorted(set(limits)) or limits[0] < 1 or limits != list(max_detections):
        given = f"max_detections={tuple(max_detections)!r}"
        raise ValueError(f"fastseg.metrics: {given}; allowed: one or more rising positive ints")
    return limits


def summarize(table: Table, categories: Sequence, limits: Sequence[int]) -> CocoResult:
    curves = curves_of(table, categories, IOU_THRESHOLDS, RECALLS, list(AREAS.values()), limits)
    per_class = {category: _figures(curves, limits, slice(k, k + 1)) for k, category in enumerate(categories)}
    return CocoResult(_figures(curves, limits, slice(None)), per_class, curves)


def _figures(curves: Curves, limits: Sequence[int], kinds: slice) -> dict[str, float]:
    precision, recall = curves.precision[:, :, kinds], curves.recall[:, kinds]

    def mean(values):
        values = values[values > -1]
        return float(values.mean()) if values.size else -1.0

    names = list(AREAS)
    figures = {"AP": mean(precision[..., 0, -1]), "AP50": mean(precision[0, ..., 0, -1]),
               "AP75": mean(precision[5, ..., 0, -1])}
    figures |= {f"AP{name}": mean(precision[..., names.index(name), -1]) for name in names[1:]}
    figures |= {f"AR@{limit}": mean(recall[..., 0, m]) for m, limit in enumerate(limits)}
    return figures | {f"AR{name}": mean(recall[..., names.index(name), -1]) for name in names[1:]}


def table_of_json(annotations, detections, iou_type, most, use_categories=True, progress=False) -> tuple[Table, list]:
    """The table of COCO's structures, and their categories."""
    field = "bbox" if iou_type == "bbox" else "segmentation"
    for name in ("images", "annotations"):
        if not isinstance(annotations, Mapping) or name not in annotations:
            raise ValueError(f"fastseg.metrics: annotations have no {name!r}; allowed: COCO's structure, as a dict")
    truths = annotations["annotations"]
    images = _column(annotations["images"], "id", "annotations['images']")
    categories = _column(annotations.get("categories", []), "id", "annotations['categories']")
    if not len(categories):
        categories = _column(truths, "category_id", "annotations['annotations']")
    categories = numpy.unique(categories)

    known = _column(detections, "category_id", "detections")
    unknown = ~numpy.isin(known, categories) if use_categories else numpy.zeros(len(known), bool)
    if unknown.any():
        warnings.warn(f"fastseg.metrics: {unknown.sum()} detections have a category_id that the annotations do not "
                      f"know, such as {known[unknown][0]}; they are left out", stacklevel=3)
        detections = [detection for detection, out in zip(detections, unknown) if not out]
    if not use_categories:  # of equal scores and IoUs the order decides, which pycocotools has by category
        detections = [detections[i] for i in numpy.argsort(known, kind="stable")]
        truths = [truths[i] for i in numpy.argsort(_column(truths, "category_id", "annotations"), kind="stable")]
    parts = []
    for entries, what in ((detections, "detections"), (truths, "annotations['annotations']")):
        image, category = _column(entries, "image_id", what), _column(entries, "category_id", what)
        strange = ~numpy.isin(image, images)
        if strange.any():
            raise ValueError(f"fastseg.metrics: {what} have image_id {image[strange][0]}; allowed: the ids in 'images'")
        if not use_categories:
            category = numpy.zeros(len(category), numpy.int64)
        parts.append(Instances(image, category, numpy.zeros(len(entries))))
    found, real = parts
    if not use_categories:
        categories = numpy.zeros(1, numpy.int64)
    found.score = _column(detections, "score", "detections").astype(numpy.float64)
    if numpy.isnan(found.score).any():
        raise ValueError("fastseg.metrics: detections have a score that is NaN; allowed: numbers")
    real.crowd = numpy.array([bool(truth.get("iscrowd", 0)) for truth in truths], bool)
    real.area = _column(truths, "area", "annotations['annotations']").astype(numpy.float64)
    shapes = [_field(entries, field, what) for entries, what in
              ((detections, "detections"), (truths, "annotations['annotations']"))]
    boxes, real_boxes = (_boxes(values) for values in shapes)
    found.area = boxes[:, 2] * boxes[:, 3]
    return group(found, real, most, box_ious(boxes, real_boxes, real.crowd)), categories.tolist()


def _field(entries: Sequence[Mapping], name: str, what: str) -> list:
    try:
        return [entry[name] for entry in entries]
    except (KeyError, TypeError):
        number = next(i for i, entry in enumerate(entries) if not isinstance(entry, Mapping) or name not in entry)
        raise ValueError(f"fastseg.metrics: {what}[{number}] has no {name!r}") from None


def _column(entries: Sequence[Mapping], name: str, what: str) -> numpy.ndarray:
    values = _field(entries, name, what)
    return numpy.array(values) if values else numpy.zeros(0, numpy.int64)


def _boxes(values: list) -> numpy.ndarray:
    try:
        boxes = numpy.array(values, numpy.float64).reshape(-1, 4) if values else numpy.zeros((0, 4))
        if len(boxes) != len(values):
            raise ValueError
        return boxes
    except (TypeError, ValueError):
        raise ValueError("fastseg.metrics: 'bbox' holds something else; allowed: [x, y, width, height]") from None
