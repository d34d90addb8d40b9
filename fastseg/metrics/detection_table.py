"""Detections and truths of many images in flat arrays, with the IoU of every pair that could match.

A `Table` holds instances sorted by group (an image and a category), detections by descending score. Tables of different
images can be joined, over batches and ranks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy
import torch

from fastseg.metrics.matching import match_detections, precision_recall

Array = numpy.ndarray
_PAIRS_AT_A_TIME = 1 << 22


@dataclass
class Instances:
    """Arrays [n]: image and category of an instance, area in pixels, and score (detections) or crowd (truths)."""

    image: Array
    category: Array
    area: Array
    score: Any = None  # Array, for detections
    crowd: Any = None  # Array, for truths

    def __getitem__(self, index) -> "Instances":
        values: list[Any] = [None if value is None else value[index] for value in self._values()]
        return Instances(*values)

    def __len__(self) -> int:
        return len(self.image)

    def _values(self) -> list[Any]:
        return [getattr(self, entry.name) for entry in fields(self)]

    @staticmethod
    def join(parts: Sequence["Instances"]) -> "Instances":
        columns = zip(*[part._values() for part in parts])
        values: list[Any] = [None if column[0] is None else numpy.concatenate(column) for column in columns]
        return Instances(*values)


@dataclass
class Table:
    """detections and truths, sorted by group; the first of each group, [groups + 1]; ranks [detections]: the position
    of each in its group; IoUs [pairs]: by group, then by detection, then by truth.
    """

    detections: Instances
    truths: Instances
    first_detection: Array
    first_truth: Array
    ranks: Array
    ious: Array

    def of_image(self, image: int) -> "Table":
        """The table of one image with another image id."""
        found, real = (replace(part, image=numpy.full(len(part), image)) for part in (self.detections, self.truths))
        return replace(self, detections=found, truths=real)

    @staticmethod
    def join(tables: Sequence["Table"]) -> "Table":
        tables = tables or [_empty()]

        def shifted(name, counts):
            ends = numpy.cumsum([0, *counts])
            parts = [getattr(table, name)[:-1] + end for table, end in zip(tables, ends)]
            return numpy.concatenate([*parts, ends[-1:]])

        detections = Instances.join([table.detections for table in tables])
        truths = Instances.join([table.truths for table in tables])
        return Table(
            detections,
            truths,
            shifted("first_detection", [len(table.detections) for table in tables]),
            shifted("first_truth", [len(table.truths) for table in tables]),
            numpy.concatenate([table.ranks for table in tables]),
            numpy.concatenate([table.ious for table in tables]),
        )


def _empty() -> Table:
    numbers, areas = numpy.zeros(0, numpy.int64), numpy.zeros(0)
    detections = Instances(numbers, numbers, areas, score=areas)
    truths = Instances(numbers, numbers, areas, crowd=numpy.zeros(0, bool))
    return group(detections, truths, 1, lambda *_: areas)


def group(
    detections: Instances,
    truths: Instances,
    most: int,
    ious: Callable[[Array, Array], Array],
) -> Table:
    """The table of these instances, with the `most` best detections of each group (of equal scores the first).

    ious: takes the numbers [pairs] of detections and of truths, sorted by image, and returns their IoUs.
    """
    _, image = numpy.unique(numpy.concatenate([detections.image, truths.image]), return_inverse=True)
    kinds, kind = numpy.unique(numpy.concatenate([detections.category, truths.category]), return_inverse=True)
    keys = image.astype(numpy.int64) * max(1, len(kinds)) + kind
    of_detections, of_truths = keys[: len(detections)], keys[len(detections) :]

    number = numpy.lexsort((-detections.score, of_detections))
    of_detections = of_detections[number]
    ranks = numpy.arange(len(number)) - numpy.searchsorted(of_detections, of_detections)
    kept = ranks < most
    number, of_detections, ranks = number[kept], of_detections[kept], ranks[kept]
    truth_number = numpy.argsort(of_truths, kind="stable")
    of_truths = of_truths[truth_number]

    groups = numpy.unique(keys)
    first_detection = numpy.append(numpy.searchsorted(of_detections, groups), len(of_detections))
    first_truth = numpy.append(numpy.searchsorted(of_truths, groups), len(of_truths))
    begin = numpy.searchsorted(of_truths, of_detections)  # first truth in the group of a detection
    partners = numpy.searchsorted(of_truths, of_detections, side="right") - begin
    ends = numpy.cumsum(partners)
    found = numpy.empty(ends[-1] if len(ends) else 0)
    row = 0
    while row < len(number):  # in parts: a large data set has many pairs
        done = ends[row] - partners[row]
        last = max(row + 1, int(numpy.searchsorted(ends, done + _PAIRS_AT_A_TIME)))
        detection = numpy.repeat(numpy.arange(row, last), partners[row:last])
        pair = numpy.arange(done, ends[last - 1])
        truth = begin[detection] + pair - (ends - partners)[detection]
        found[done : ends[last - 1]] = ious(number[detection], truth_number[truth])
        row = last
    return Table(detections[number], truths[truth_number], first_detection, first_truth, ranks, found)


def box_ious(detections: Array, truths: Array, crowd: Array) -> Callable[[Array, Array], Array]:
    """The function `ious` for boxes (x, y, width, height) [n, 4]: no + 1 in sizes; divides by the detection's area
    alone if the truth is a crowd; 0 if they do not overlap.
    """

    def ious(detection, truth):
        a, b = detections[detection].T, truths[truth].T
        width = numpy.minimum(a[0] + a[2], b[0] + b[2]) - numpy.maximum(a[0], b[0])
        height = numpy.minimum(a[1] + a[3], b[1] + b[3]) - numpy.maximum(a[1], b[1])
        shared = numpy.where((width > 0) & (height > 0), width * height, 0.0)
        return overlap(shared, a[2] * a[3], b[2] * b[3], crowd[truth])

    return ious


def overlap(shared: Array, area: Array, truth_area: Array, crowd: Array) -> Array:
    """COCO's IoU from the intersections `shared` and the areas, in double; 0 / 0 is 0."""
    union = numpy.where(crowd, area, area + truth_area - shared)
    return numpy.divide(shared, union, out=numpy.zeros(shared.shape), where=union > 0)


@dataclass(frozen=True)
class Curves:
    """precision [thresholds, recalls, categories, ranges, limits] and recall [thresholds, categories, ranges, limits],
    -1 for a category without a truth that counts.
    """

    categories: list
    precision: Array
    recall: Array


def states_of(table: Table, thresholds: Array, ranges: Sequence[tuple[float, float]]) -> tuple[Array, Array]:
    """States [ranges, thresholds, detections] of `match_detections`, and which truths count [ranges, truths]."""

    def beyond(area):
        return numpy.stack([(area < low) | (area > high) for low, high in ranges])

    ignored = beyond(table.truths.area) | table.truths.crowd
    arrays = (
        table.ious,
        table.first_detection,
        table.first_truth,
        ignored,
        table.truths.crowd,
        beyond(table.detections.area),
        thresholds,
    )
    states = match_detections(*[torch.from_numpy(numpy.ascontiguousarray(array)) for array in arrays])
    return states.numpy(), ~ignored


def curves_of(
    table: Table,
    categories: Sequence,
    thresholds: Array,
    recalls: Array,
    ranges: Sequence[tuple[float, float]],
    limits: Sequence[int],
) -> Curves:
    """COCO's precision and recall of the sorted `categories`."""
    states, counts = states_of(table, thresholds, ranges)
    known, detections = numpy.asarray(categories), table.detections
    positives = numpy.stack(
        [numpy.bincount(numpy.searchsorted(known, table.truths.category[own]), minlength=len(known)) for own in counts],
        1,
    )
    kind = numpy.searchsorted(known, detections.category)
    order = numpy.lexsort((table.ranks, detections.image, -detections.score, kind))
    first = numpy.searchsorted(kind[order], numpy.arange(len(known) + 1))
    arrays = (states, table.ranks, order, first, positives, numpy.asarray(limits, numpy.int64), recalls)
    precision, recall = precision_recall(*[torch.from_numpy(numpy.ascontiguousarray(array)) for array in arrays])
    return Curves(list(categories), precision.numpy(), recall.numpy())
