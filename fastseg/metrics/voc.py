"""PASCAL VOC's average precision of boxes."""

from collections.abc import Mapping, Sequence

import numpy
from torch import Tensor

METHODS = ("area", "11point", "101point")


def average_precision(hits: Sequence[bool], positives: int, method: str = "area", *, strict: bool = False) -> float:
    """Average precision of detections in order of descending score.

    Args:
        hits: for each detection whether it is a true positive, [n]; without detections that are ignored.
        positives: number of truths.
        method: "area": area under the precision, where each precision is raised to the largest at a higher recall (VOC
            2010 and later); "11point": mean at recalls 0, 0.1, ..., 1 (VOC 2007); "101point": at 0, 0.01, ... (COCO).
        strict: take the 11 recalls from `numpy.arange(0, 1.1, 0.1)`, as the VOC 2007 code does. Its rounding can miss
            a point (0.3 is 0.30000000000000004 there).

    Returns:
        The average precision; NaN without a positive.
    """
    if method not in METHODS:
        raise ValueError(f"fastseg.metrics.average_precision: method={method!r}; allowed: {', '.join(METHODS)}")
    if positives == 0:
        return float("nan")
    found = numpy.cumsum(numpy.asarray(hits, bool))
    recall, precision = found / positives, found / numpy.arange(1, len(hits) + 1)
    envelope = numpy.maximum.accumulate(precision[::-1])[::-1]
    if method == "area":
        steps = numpy.diff(recall, prepend=0.0)
        return float((steps * envelope).sum())
    points = int(method.removesuffix("point"))
    at = numpy.arange(0, 1.1, 0.1) if strict and points == 11 else numpy.arange(points) / (points - 1) - 1e-9
    place = numpy.searchsorted(recall, at)
    return float(numpy.append(envelope, 0.0)[place].mean())


def voc_evaluate(
    detections: Sequence[Mapping[str, Tensor]],
    truths: Sequence[Mapping[str, Tensor]],
    *,
    iou_threshold: float = 0.5,
    method: str = "area",
    strict: bool = False,
) -> dict:
    """Mean average precision by VOC's rules: a detection is compared with the truth of its class and image that it
    overlaps most. It is correct if their IoU, of boxes with + 1, is above the threshold and no detection of a higher
    score had that truth. It is not counted if the truth is difficult.

    Args:
        detections: for each image, boxes [n, 4] (x1, y1, x2, y2: first and last pixel), labels [n], scores [n].
        truths: for each image, boxes [m, 4], labels [m] and optionally difficult [m] of bool.
        iou_threshold, method, strict: see above and `average_precision`.

    Returns:
        {"mAP": mean over the classes that have a truth, NaN without one; "per_class": {label: AP}}.

    Raises:
        ValueError: different numbers of images in detections and truths, lengths that differ, scores that are NaN.
    """
    if len(detections) != len(truths):
        given = f"detections of {len(detections)} images"
        raise ValueError(f"fastseg.metrics.voc_evaluate: {given}; allowed: {len(truths)}, as many as truths")
    outcomes: dict[int, list] = {}  # by label: scores, hits and whether it counts, of each image
    positives: dict[int, int] = {}
    for image, (found, real) in enumerate(zip(detections, truths)):
        found = _arrays(found, ("boxes", "labels", "scores"), f"detections[{image}]")
        real = _arrays(real, ("boxes", "labels", "difficult"), f"truths[{image}]")
        if numpy.isnan(found["scores"]).any():
            given = f"detections[{image}] has a score that is NaN"
            raise ValueError(f"fastseg.metrics.voc_evaluate: {given}; allowed: numbers")
        for label in numpy.union1d(found["labels"], real["labels"]).tolist():
            own, other = found["labels"] == label, real["labels"] == label
            difficult = real["difficult"][other].astype(bool)
            positives[label] = positives.get(label, 0) + int((~difficult).sum())
            order = numpy.argsort(-found["scores"][own], kind="stable")
            boxes = found["boxes"][own][order]
            hits, counted = _outcomes(boxes, real["boxes"][other], difficult, iou_threshold)
            outcomes.setdefault(label, []).append((found["scores"][own][order], hits, counted))
    per_class = {}
    for label in sorted(outcomes):
        if positives[label]:
            scores, hits, counted = (numpy.concatenate(column) for column in zip(*outcomes[label]))
            order = numpy.argsort(-scores, kind="stable")
            hits = hits[order][counted[order]]
            per_class[label] = average_precision(hits, positives[label], method, strict=strict)
    return {"mAP": float(numpy.mean([*per_class.values()])) if per_class else float("nan"), "per_class": per_class}


def _outcomes(boxes, truths, difficult, threshold):
    """For boxes by descending score: which are correct, and which count."""
    hits, counted = numpy.zeros(len(boxes), bool), numpy.ones(len(boxes), bool)
    if not len(truths):
        return hits, counted
    low = numpy.maximum(boxes[:, None, :2], truths[None, :, :2])
    high = numpy.minimum(boxes[:, None, 2:], truths[None, :, 2:])
    shared = numpy.maximum(high - low + 1, 0).prod(2)
    areas = [(these[:, 2:] - these[:, :2] + 1).prod(1) for these in (boxes, truths)]
    ious = shared / (areas[0][:, None] + areas[1] - shared)
    best = ious.argmax(1)
    near = ious[numpy.arange(len(boxes)), best] > threshold
    counted[near] = ~difficult[best[near]]
    candidates = numpy.flatnonzero(near & counted)
    _, first = numpy.unique(best[candidates], return_index=True)  # the highest score gets the truth
    hits[candidates[first]] = True
    return hits, counted


def _arrays(entry, names, what):
    """The tensors of one image as arrays of one length."""
    found = {}
    for name in names:
        if name == "difficult" and name not in entry:
            found[name] = numpy.zeros(len(found["boxes"]), bool)
            continue
        if name not in entry:
            raise ValueError(f"fastseg.metrics.voc_evaluate: {what} has no {name!r}")
        found[name] = numpy.asarray(entry[name].cpu() if isinstance(entry[name], Tensor) else entry[name])
        shape = (len(found["boxes"]), 4) if name == "boxes" else (len(found["boxes"]),)
        if found[name].shape != shape:
            given = f"{what}[{name!r}] has shape {found[name].shape}"
            raise ValueError(f"fastseg.metrics.voc_evaluate: {given}; allowed: {shape}")
    found["boxes"] = found["boxes"].astype(numpy.float64)
    return found
