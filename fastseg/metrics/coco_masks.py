"""The masks of COCO's structures, polygons or run lengths: their areas, and the IoU of pairs.

Areas and intersections are computed from run lengths without decoding. Masks are processed in parts, so that the memory
does not grow with the data set.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy
import torch
from torch import Tensor

from fastseg import _check
from fastseg.metrics.detection_table import overlap
from fastseg.metrics.polygons import fill
from fastseg.metrics.progress import progress
from fastseg.ops.masks.run_lengths import MOST_PIXELS, counts_of_masks, read_rles, run_overlaps_op

Array = numpy.ndarray
Size = tuple[int, int]  # (H, W)
_AT_A_TIME = 8192  # masks in a part, some KB each
_PIXELS_AT_A_TIME = 1 << 29  # pixels of polygons in a part, one bit each


@dataclass
class Runs:
    """n masks as run lengths: counts [k]; for each mask the begin and end of its counts, and its pixels, [n] each."""

    counts: Tensor
    begins: Tensor
    ends: Tensor
    areas: Tensor

    @staticmethod
    def join(parts: Sequence[tuple[list[int], "Runs"]], count: int) -> "Runs":
        """Joins parts, (indices of the masks, runs), to the runs of `count` masks."""
        begins, ends, areas = numpy.empty((3, count), numpy.int64)
        first = 0
        for places, runs in parts:
            own = runs.begins.numpy() + first, runs.ends.numpy() + first, runs.areas.numpy()
            begins[places], ends[places], areas[places] = own
            first += len(runs.counts)
        counts = numpy.concatenate([runs.counts.numpy() for _, runs in parts])
        return Runs(*map(torch.from_numpy, (counts, begins, ends, areas)))


class CocoMasks:
    """Masks by number, from COCO's `segmentations`.

    images: for each mask the entry of its image; polygons need its "height" and "width".
    names: for each mask the name in error messages.
    """

    def __init__(self, segmentations: Sequence, images: Sequence[Mapping], names: Callable[[int], str]):
        self._segmentations, self._images, self._names = segmentations, images, names
        self._sizes: dict[Size, Size] = {}
        self._areas = numpy.full(len(segmentations), -1)  # -1 until a mask has been read

    def areas(self, numbers: Array, shown: bool = False) -> Array:
        """The areas of masks `numbers` [n], in pixels. shown: show the progress."""
        missing = numbers[self._areas[numbers] < 0].tolist()
        parts = [missing[first : first + _AT_A_TIME] for first in range(0, len(missing), _AT_A_TIME)]
        for part in progress(parts, "areas of masks", shown):
            self._runs(part)
        return self._areas[numbers].astype(numpy.float64)

    def ious(self, first: Array, second: Array, crowd: Array, shown: bool = False) -> Array:
        """The IoU of masks first [pairs] and second [pairs]; crowd [pairs]: `second` is a crowd region. Equal `first`
        must be adjacent. shown: show the progress.
        """
        starts = numpy.flatnonzero(numpy.diff(first, prepend=-1))[::_AT_A_TIME]
        parts = [slice(*ends) for ends in zip(starts, [*starts[1:], len(first)])]
        found = [
            self._ious_at_once(first[part], second[part], crowd[part])
            for part in progress(parts, "IoU of masks", shown)
        ]
        return numpy.concatenate([numpy.zeros(0), *found])

    def _ious_at_once(self, first, second, crowd):
        numbers, places = numpy.unique(numpy.concatenate([first, second]), return_inverse=True)
        runs, sizes = self._runs(numbers.tolist())
        areas = runs.areas.numpy()
        a, b = numpy.split(places, 2)
        differ = numpy.flatnonzero((sizes[a] != sizes[b]).any(1))
        if len(differ):
            pair = differ[0]
            given = f"{self._names(first[pair])} is a mask of {_text(sizes[a[pair]])}"
            allowed = f"{_text(sizes[b[pair]])}, as {self._names(second[pair])}"
            raise ValueError(f"fastseg.metrics: {given}; allowed: {allowed}")
        shared = run_overlaps_op(runs.counts, runs.begins, runs.ends, torch.from_numpy(a), torch.from_numpy(b))
        return overlap(shared.numpy(), areas[a], areas[b], crowd)

    def _runs(self, numbers: list[int]) -> tuple[Runs, Array]:
        """The runs of these masks, and their sizes [n, 2]; keeps their areas."""
        masks = [self._segmentations[number] for number in numbers]
        of_counts = [type(mask) is dict or isinstance(mask, Mapping) for mask in masks]
        texts = [place for place, yes in enumerate(of_counts) if yes]
        polygons: dict[Size, list[int]] = {}  # indices by size
        for place, other in enumerate(of_counts):
            if not other:
                polygons.setdefault(self._size_of_image(masks[place], numbers[place]), []).append(place)
        parts = [(texts, *self._read([numbers[place] for place in texts]))]
        for size, places in polygons.items():
            step = max(1, _PIXELS_AT_A_TIME // max(1, size[0] * size[1]))
            for first in range(0, len(places), step):
                some = places[first : first + step]
                parts.append((some, self._fill([numbers[place] for place in some], size), [size] * len(some)))
        sizes = numpy.empty((len(numbers), 2), numpy.int64)
        for places, runs, own in parts:
            self._areas[[numbers[place] for place in places]] = runs.areas.numpy()
            sizes[places] = numpy.array(own, numpy.int64).reshape(-1, 2)
        return Runs.join([part[:2] for part in parts], len(numbers)), sizes

    def _read(self, numbers: list[int]) -> tuple[Runs, list[Size]]:
        """The masks that are run lengths, and their sizes."""
        rles = [self._segmentations[number] for number in numbers]
        try:
            counts, sizes = [rle["counts"] for rle in rles], [self._sizes[tuple(rle["size"])] for rle in rles]
        except (KeyError, TypeError):  # a new size, or an error
            sizes = [self._size_of(rle, number) for rle, number in zip(rles, numbers)]
            counts = [rle["counts"] for rle in rles]
        name = lambda i: f"fastseg.metrics: {self._names(numbers[i])}['counts']"  # noqa: E731
        return Runs(*read_rles(counts, sizes, name)), sizes

    def _fill(self, numbers: list[int], size: Size) -> Runs:
        masks = fill(
            [self._segmentations[number] for number in numbers],
            size,
            lambda i: f"fastseg.metrics: {self._names(numbers[i])}",
        )
        counts, ends = counts_of_masks(masks)
        return Runs(counts, torch.nn.functional.pad(ends[:-1], (1, 0)), ends, masks.area)

    def _size_of(self, rle: Mapping, number: int) -> Size:
        """The size of run lengths."""
        size = self._checked(rle.get("size"))
        if size is None or "counts" not in rle:
            given = f"{self._names(number)}={rle!r:.80}"
            raise ValueError(f'fastseg.metrics: {given}; allowed: {{"size": [H, W], "counts": ...}}, or polygons')
        return size

    def _size_of_image(self, polygons, number: int) -> Size:
        if not isinstance(polygons, (list, tuple)) or not polygons:
            given = f"{self._names(number)}={polygons!r:.80}"
            allowed = 'a list of polygons, or {"size": [H, W], "counts": ...}'
            raise ValueError(f"fastseg.metrics: {given}; allowed: {allowed}")
        image = self._images[number]
        height, width = image.get("height"), image.get("width")
        size = self._checked((height, width))
        if size is None:
            given = f"{self._names(number)} is polygons, and its image has height={height!r}, width={width!r}"
            raise ValueError(f"fastseg.metrics: {given}; allowed: ints, at most {MOST_PIXELS} pixels")
        return size

    def _checked(self, size) -> Size | None:
        """(H, W) as ints, or None if it is something else. Checks each size once: images have few sizes."""
        try:
            size = tuple(size)
            if size not in self._sizes:
                height, width = (_check.integer(extent) for extent in size)
                if min(height, width) < 0 or height * width > MOST_PIXELS:
                    return None
                self._sizes[size] = height, width
            return self._sizes[size]
        except (TypeError, ValueError):
            return None


def _text(size) -> str:
    return f"{size[0]} x {size[1]}"
