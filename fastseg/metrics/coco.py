"""COCO's detection metrics: average precision and recall of boxes or masks, equal to pycocotools' up to rounding.

    AP    mean over IoU thresholds 0.5, 0.55, ..., 0.95, categories and 101 recalls of the largest precision at that
          recall or above
    AR@n  mean over thresholds and categories of the recall of the n best detections per image

Two deviations: a match with the annotation id 0 counts as any other (pycocotools treats it as no match), and AP is for
the last of `max_detections` (pycocotools' is for 100, and -1 if 100 is not among them).
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy

from fastseg.metrics.coco_masks import CocoMasks
from fastseg.metrics.detection_table import Curves, Instances, Table, box_ious, curves_of, group

IOU_THRESHOLDS = numpy.linspace(0.5, 0.95, 10)
RECALLS = numpy.linspace(0.0, 1.0, 101)
AREAS = {"": (0.0, 1e10), "s": (0.0, 32.0**2), "m": (32.0**2, 96.0**2), "l": (96.0**2, 1e10)}  # pixels, limits included
MAX_DETECTIONS = (1, 10, 100)
IOU_TYPES = ("bbox", "segm")
TRUTHS, DETECTIONS = "annotations['annotations']", "detections"  # in error messages


@dataclass(frozen=True)
class CocoResult(Mapping):
    """The results for a data set by name, in pycocotools' order: AP, AP50, AP75, APs, APm, APl, AR@1, AR@10, AR@100,
    ARs, ARm, ARl (s, m, l: small, medium and large areas); -1 if there is no truth to count.

    per_class: the same results for each category, by its id. curves: precision and recall.
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
    """Evaluates the detections of a data set; annotations and detections are COCO's structures.

    Equals pycocotools' `COCOeval` with its default parameters, except for the two deviations above.

    Args:
        annotations: {"images": [{"id", "height", "width"}], "annotations": [{"image_id", "category_id", "area", "bbox"
            (x, y, width, height) or "segmentation", "iscrowd" (0 by default)}], "categories": [{"id"}]}, as json.load
            returns it. Images need height and width only for polygons.
        detections: [{"image_id", "category_id", "score", "bbox" or "segmentation"}]. Detections whose category is not
            in the annotations are left out, with a warning.
        iou_type: "bbox" for boxes, "segm" for masks: a "segmentation" is a list of polygons (x1, y1, x2, y2, ...) or
            run lengths {"size": [H, W], "counts": text or ints}. The area of a detection is that of its mask; but as
            in pycocotools, if the first detection has a "bbox", all areas are those of the boxes.
        max_detections: ascending numbers of detections per image and category to count; AP uses the last one.
        use_categories: False to match detections with truths of any category, as for proposals.
        progress: show the progress over the masks on stderr, by tqdm if it is installed.

    Raises:
        ValueError: structures that lack a field, ids that are not in "images", scores that are NaN, masks of another
            size, and other wrong values; the message names the entry.
        TypeError: counts that are neither text nor ints.
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
    figures = {
        "AP": mean(precision[..., 0, -1]),
        "AP50": mean(precision[0, ..., 0, -1]),
        "AP75": mean(precision[5, ..., 0, -1]),
    }
    figures |= {f"AP{name}": mean(precision[..., names.index(name), -1]) for name in names[1:]}
    figures |= {f"AR@{limit}": mean(recall[..., 0, m]) for m, limit in enumerate(limits)}
    return figures | {f"AR{name}": mean(recall[..., names.index(name), -1]) for name in names[1:]}


def table_of_json(annotations, detections, iou_type, most, use_categories=True, progress=False) -> tuple[Table, list]:
    """The table made from COCO's structures, and their categories."""
    for name in ("images", "annotations"):
        if not isinstance(annotations, Mapping) or name not in annotations:
            raise ValueError(f"fastseg.metrics: annotations have no {name!r}; allowed: COCO's structure, as a dict")
    truths, images = annotations["annotations"], annotations["images"]
    categories = _column(annotations.get("categories", []), "id", "annotations['categories']")
    if not len(categories):
        categories = _column(truths, "category_id", TRUTHS)
    categories = numpy.unique(categories) if use_categories else numpy.zeros(1, numpy.int64)

    ids = _column(images, "id", "annotations['images']")
    found, used = _instances(detections, DETECTIONS, ids, categories, use_categories)
    real, used_truths = _instances(truths, TRUTHS, ids, categories, use_categories)
    if len(used) < len(detections):
        unknown = detections[numpy.setdiff1d(numpy.arange(len(detections)), used)[0]]["category_id"]
        warnings.warn(
            f"fastseg.metrics: {len(detections) - len(used)} detections have a category_id that is "
            f"not in the annotations, such as {unknown}; they are left out",
            stacklevel=3,
        )
    found.score = _column(detections, "score", DETECTIONS).astype(numpy.float64)[used]
    if numpy.isnan(found.score).any():
        raise ValueError("fastseg.metrics: detections have a score that is NaN; allowed: numbers")
    real.crowd = numpy.array([bool(truth.get("iscrowd", 0)) for truth in truths], bool)[used_truths]
    real.area = _column(truths, "area", TRUTHS).astype(numpy.float64)[used_truths]
    if iou_type == "bbox":
        boxes, real_boxes = _boxes(detections, DETECTIONS)[used], _boxes(truths, TRUTHS)[used_truths]
        found.area = boxes[:, 2] * boxes[:, 3]
        ious = box_ious(boxes, real_boxes, real.crowd)
    else:
        masks, area = _masks(detections, truths, images)
        found.area = used if area is None else area[used]  # until masks have been read: their numbers

        def ious(detection, truth):
            return masks.ious(used[detection], len(detections) + used_truths[truth], real.crowd[truth], progress)

    table = group(found, real, most, ious)
    if iou_type == "segm" and area is None:
        table.detections.area = masks.areas(table.detections.area, progress)
    return table, categories.tolist()


def _instances(entries, what, images, categories, use_categories) -> tuple[Instances, numpy.ndarray]:
    """The instances of known categories, and their indices in `entries`. Without `use_categories` all get category 0
    and are sorted by their own: the order decides between equal scores and IoUs, as in pycocotools.
    """
    image, category = _column(entries, "image_id", what), _column(entries, "category_id", what)
    strange = ~numpy.isin(image, images)
    if strange.any():
        raise ValueError(f"fastseg.metrics: {what} have image_id {image[strange][0]}; allowed: the ids in 'images'")
    if use_categories:
        used = numpy.flatnonzero(numpy.isin(category, categories))
    else:
        used, category = numpy.argsort(category, kind="stable"), numpy.zeros(len(category), numpy.int64)
    return Instances(image[used], category[used], numpy.zeros(len(used))), used


def _masks(detections, truths, images) -> tuple[CocoMasks, numpy.ndarray | None]:
    """The masks of all detections, then of all truths; and the areas of the detections, or None for areas of masks.

    As in pycocotools: if the first detection has a box, all must have one. Then the areas of the boxes count, and a box
    is the mask of a detection without a mask.
    """
    area = None
    first = detections[0].get("bbox") if len(detections) and isinstance(detections[0], Mapping) else None
    if first is not None and numpy.size(first):
        boxes = _boxes(detections, DETECTIONS)
        area = boxes[:, 2] * boxes[:, 3]
        found = [
            entry["segmentation"] if "segmentation" in entry else [_corners(*boxes[number].tolist())]
            for number, entry in enumerate(detections)
        ]
    else:
        found = _field(detections, "segmentation", DETECTIONS)
    by_id = {image["id"]: image for image in images}
    entries = [by_id[entry["image_id"]] for entry in (*detections, *truths)]

    def name(number):
        place, what = (number, DETECTIONS) if number < len(found) else (number - len(found), TRUTHS)
        return f"{what}[{place}]['segmentation']"

    return CocoMasks(found + _field(truths, "segmentation", TRUTHS), entries, name), area


def _corners(x: float, y: float, width: float, height: float) -> list[float]:
    return [x, y, x, y + height, x + width, y + height, x + width, y]


def _field(entries: Sequence[Mapping], name: str, what: str) -> list:
    try:
        return [entry[name] for entry in entries]
    except (KeyError, TypeError):
        number = next(i for i, entry in enumerate(entries) if not isinstance(entry, Mapping) or name not in entry)
        raise ValueError(f"fastseg.metrics: {what}[{number}] has no {name!r}") from None


def _column(entries: Sequence[Mapping], name: str, what: str) -> numpy.ndarray:
    values = _field(entries, name, what)
    return numpy.array(values) if values else numpy.zeros(0, numpy.int64)


def _boxes(entries: Sequence[Mapping], what: str) -> numpy.ndarray:
    values = _field(entries, "bbox", what)
    try:
        boxes = numpy.array(values, numpy.float64).reshape(-1, 4) if values else numpy.zeros((0, 4))
        if len(boxes) != len(values):
            raise ValueError
        return boxes
    except (TypeError, ValueError):
        number = next((i for i, value in enumerate(values) if numpy.shape(value) != (4,)), 0)
        given = f"{what}[{number}]['bbox']={values[number]!r:.80}"
        raise ValueError(f"fastseg.metrics: {given}; allowed: [x, y, width, height]") from None
