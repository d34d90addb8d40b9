"""COCO's detection metrics, accumulated over batches and ranks: `CocoEvaluator`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy
import torch
import torch.distributed
from torch import Tensor

from fastseg import _check
from fastseg.metrics.coco import IOU_TYPES, MAX_DETECTIONS, CocoResult, check_limits, summarize
from fastseg.metrics.detection_table import Array, Instances, Table, box_ious, group, overlap
from fastseg.ops import PackedMasks, mask_iou, pack_masks
from fastseg.ops.masks.pack_masks import BINARY

_NAME = "fastseg.metrics.CocoEvaluator"
_SHAPES = dict(zip(IOU_TYPES, ("boxes", "masks")))


class CocoEvaluator:
    """`coco_evaluate` for batches of detections and truths, as tensors. It keeps scores, areas and the IoU of pairs,
    but no masks.

        evaluator = CocoEvaluator("segm")
        for images, truths in loader:
            evaluator.update(model(images), truths)
        print(evaluator.all_gather().compute()["AP"])

    Args:
        iou_type: "bbox" or "segm".
        max_detections: ascending numbers of detections per image and category to count; AP uses the last one.
        use_categories: False to match detections with truths of any category, as for proposals.

    Raises:
        ValueError: other values; the message names the argument.
    """

    def __init__(
        self,
        iou_type: str = "bbox",
        *,
        max_detections: Sequence[int] = MAX_DETECTIONS,
        use_categories: bool = True,
    ):
        if iou_type not in IOU_TYPES:
            raise ValueError(f"{_NAME}: iou_type={iou_type!r}; allowed: {', '.join(IOU_TYPES)}")
        self.iou_type, self.max_detections = iou_type, check_limits(max_detections)
        self.use_categories = use_categories
        self.reset()

    def reset(self) -> None:
        """Removes all images."""
        self._tables: dict[int, Table] = {}  # by image
        self._numbered: bool | None = None  # True if images have no ids, None before the first image

    def update(
        self,
        detections: Sequence[Mapping[str, Tensor]],
        truths: Sequence[Mapping[str, Tensor]],
        image_ids: Sequence[int] | Tensor | None = None,
    ) -> None:
        """Adds a batch; tensors may be on any device.

        Args:
            detections: of each image, scores [n], labels [n] of ints, and boxes [n, 4] (x1, y1, x2, y2) or, for "segm",
                masks, n `fastseg.ops.PackedMasks` or dense masks [n, H, W] of bool or uint8.
            truths: of each image, labels [m], boxes or masks, and optionally iscrowd [m] and area [m] (else that of
                the box or mask).
            image_ids: ints. With them, an image that several ranks saw (a sampler may pad the last batch) counts once,
                and detections of equal score are sorted by image. Without them, images are numbered in order.

        Raises:
            ValueError: a missing field, or one of another shape or dtype, an image that was given before, scores that
                are NaN. Nothing of the batch is then added.
        """
        numbered = image_ids is None
        ids = [*range(len(self._tables), len(self._tables) + len(truths))] if numbered else _ints(image_ids)
        if not len(detections) == len(truths) == len(ids):
            raise ValueError(
                f"{_NAME}: detections of {len(detections)} images, truths of {len(truths)}, image_ids of "
                f"{len(ids)}; allowed: as many of each"
            )
        if self._numbered not in (None, numbered):
            raise ValueError(f"{_NAME}: image_ids were given for some batches; allowed: for all, or for none")
        tables: dict[int, Table] = {}
        for image, found, real in zip(ids, detections, truths):
            if image in self._tables or image in tables:
                raise ValueError(f"{_NAME}: image {image} was given before; allowed: each once")
            tables[image] = self._table_of(image, found, real)
        self._tables |= tables
        self._numbered = numbered if ids else self._numbered

    def all_gather(self, process_group: torch.distributed.ProcessGroup | None = None) -> "CocoEvaluator":
        """A new object with the images of all ranks; this one keeps only the images of its rank.

        Every rank of the group must call it, also a rank without images. Without an initialised process group there is
        one rank. The nccl backend sends the data through the current CUDA device.

        Raises:
            ValueError: some ranks gave image_ids, others did not.
        """
        parts: list[Any] = [(self._tables, self._numbered)]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            parts = [None] * torch.distributed.get_world_size(process_group)
            torch.distributed.all_gather_object(parts, (self._tables, self._numbered), group=process_group)
        total = CocoEvaluator(self.iou_type, max_detections=self.max_detections, use_categories=self.use_categories)
        kinds = {numbered for _, numbered in parts} - {None}
        if len(kinds) > 1:
            raise ValueError(f"{_NAME}: image_ids were given on some ranks; allowed: on all, or on none")
        total._numbered = kinds.pop() if kinds else None
        for rank, (tables, _) in enumerate(parts):
            for image, table in tables.items():
                if total._numbered:  # in the order of a distributed sampler
                    total._tables[image * len(parts) + rank] = table.of_image(image * len(parts) + rank)
                else:
                    total._tables.setdefault(image, table)
        return total

    def compute(self) -> CocoResult:
        """The results for all images so far; categories are the labels that occurred."""
        table = Table.join([*self._tables.values()])
        categories = numpy.union1d(table.detections.category, table.truths.category).tolist()
        return summarize(table, categories, self.max_detections)

    def _table_of(self, image: int, detections: Mapping, truths: Mapping) -> Table:
        found, shapes = self._instances(detections, f"detections of image {image}")
        real, real_shapes = self._instances(truths, f"truths of image {image}")
        found.score = _column(detections, "scores", f"detections of image {image}", len(found))
        if numpy.isnan(found.score).any():
            raise ValueError(f"{_NAME}: detections of image {image} have a score that is NaN; allowed: numbers")
        what = f"truths of image {image}"
        real.crowd = _column(truths, "iscrowd", what, len(real), numpy.zeros(len(real))) != 0
        own = real.area
        real.area = _column(truths, "area", what, len(real), own)
        if self.iou_type == "bbox":
            ious = box_ious(shapes, real_shapes, real.crowd)
        else:
            ious = _mask_ious(shapes, real_shapes, (found.area, own, real.crowd), image)
        if not self.use_categories:
            found, real, ious = _without_categories(found, real, ious)
        for instances in (found, real):
            instances.image = numpy.full(len(instances), image)
        return group(found, real, self.max_detections[-1], ious)

    def _instances(self, entry: Mapping, what: str) -> tuple[Instances, Any]:
        """Labels and areas of an image's instances, and their boxes (x, y, width, height) or packed masks."""
        name = _SHAPES[self.iou_type]
        shapes = _field(entry, name, what)
        if name == "boxes":
            shapes = torch.as_tensor(shapes).detach().cpu().double().numpy()
            shapes = shapes if shapes.size else shapes.reshape(0, 4)
            if shapes.ndim != 2 or shapes.shape[1] != 4:
                raise ValueError(f"{_NAME}: 'boxes' of {what} has shape {shapes.shape}; allowed: (n, 4)")
            shapes = numpy.concatenate([shapes[:, :2], shapes[:, 2:] - shapes[:, :2]], 1)
            areas = shapes[:, 2] * shapes[:, 3]
        else:
            if not isinstance(shapes, PackedMasks):
                shapes = pack_masks(_dense(shapes, what))
            areas = shapes.area.cpu().double().numpy()
        labels = torch.as_tensor(_field(entry, "labels", what))
        if labels.dtype.is_floating_point or labels.dtype.is_complex:
            if labels.numel():  # torch.tensor([]) is float32
                dtype = _check.dtype_name(labels.dtype)
                raise ValueError(f"{_NAME}: 'labels' of {what} has dtype {dtype}; allowed: integers")
        kinds = _of_length(labels, "labels", what, len(areas)).astype(numpy.int64)
        return Instances(numpy.zeros(len(areas), numpy.int64), kinds, areas), shapes


def _ints(image_ids) -> list[int]:
    values = image_ids.tolist() if isinstance(image_ids, Tensor) else [*image_ids]
    array = numpy.array(values) if values else numpy.zeros(0, numpy.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(f"{_NAME}: image_ids={values!r:.80}; allowed: an int of 64 bits for each image")
    return array.astype(numpy.int64).tolist()


def _field(entry: Mapping, name: str, what: str):
    if not isinstance(entry, Mapping) or name not in entry:
        raise ValueError(f"{_NAME}: {what} have no {name!r}")
    return entry[name]


def _column(entry: Mapping, name: str, what: str, count: int, default: Array | None = None) -> Array:
    """The field as double [count]; `default`, if given, replaces a missing field."""
    if default is not None and entry.get(name) is None:
        return default
    return _of_length(_field(entry, name, what), name, what, count).astype(numpy.float64)


def _of_length(values, name: str, what: str, count: int) -> Array:
    values = torch.as_tensor(values).detach().cpu()
    if values.shape != (count,):
        raise ValueError(f"{_NAME}: {name!r} of {what} has shape {tuple(values.shape)}; allowed: ({count},)")
    return (values.double() if values.is_floating_point() else values).numpy()


def _dense(masks, what: str) -> Tensor:
    masks = torch.as_tensor(masks)
    if masks.dim() != 3 or masks.dtype not in BINARY:
        given = f"'masks' of {what} has shape {tuple(masks.shape)} and dtype {_check.dtype_name(masks.dtype)}"
        raise ValueError(f"{_NAME}: {given}; allowed: (n, H, W) of bool or uint8, or PackedMasks")
    return masks


def _mask_ious(masks: PackedMasks, truths: PackedMasks, known, image: int) -> Callable[[Array, Array], Array]:
    """The function `ious` for the masks of an image. known: areas, areas of the truths, and which truths are crowds."""
    areas, truth_areas, crowd = known
    shared = numpy.zeros((len(masks), len(truths)), numpy.int64)
    if shared.size:
        if masks.shape[1:] != truths.shape[1:]:
            given, allowed = (" x ".join(map(str, one.shape[1:])) for one in (masks, truths))
            raise ValueError(
                f"{_NAME}: masks of detections of image {image} are {given}; allowed: {allowed}, as those of truths"
            )
        shared = mask_iou(masks, truths.to(masks.device), metric="intersection").cpu().numpy()

    def ious(detection, truth):
        return overlap(shared[detection, truth], areas[detection], truth_areas[truth], crowd[truth])

    return ious


def _without_categories(found: Instances, real: Instances, ious) -> tuple[Instances, Instances, Callable]:
    """All in one category, sorted by their own: the order decides between equal scores and IoUs (`coco_evaluate`)."""
    order, truth_order = (numpy.argsort(instances.category, kind="stable") for instances in (found, real))
    found, real = found[order], real[truth_order]
    for instances in (found, real):
        instances.category = numpy.zeros(len(instances), numpy.int64)
    return found, real, lambda detection, truth: ious(order[detection], truth_order[truth])
