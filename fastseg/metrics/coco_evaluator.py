"""COCO's detection metrics, image by image and rank by rank: `CocoEvaluator`."""

from collections.abc import Mapping, Sequence

import numpy
import torch
from torch import Tensor

from fastseg.metrics.coco import IOU_TYPES, MAX_DETECTIONS, CocoResult, check_limits, summarize
from fastseg.metrics.detection_table import Instances, Table, box_ious, group


class CocoEvaluator:
    """Takes detections and truths batch by batch and keeps, of each image, scores, areas and the IoU of each pair: no
    mask outlives its batch.

        evaluator = CocoEvaluator("segm")
        for images, truths in loader:
            evaluator.update(model(images), truths)
        print(evaluator.all_gather().compute()["AP"])

    Args:
        iou_type: "bbox" or "segm".
        max_detections: detections per image and category that are counted, rising; the last is that of AP.
        use_categories: False to match whatever the category, as for proposals.

    Raises:
        ValueError: other values, by name.
    """

    def __init__(
        self,
        iou_type: str = "bbox",
        *,
        max_detections: Sequence[int] = MAX_DETECTIONS,
        use_categories: bool = True,
    ):
        if iou_type not in IOU_TYPES:
            raise ValueError(f"fastseg.metrics.CocoEvaluator: iou_type={iou_type!r}; allowed: {', '.join(IOU_TYPES)}")
        self.iou_type, self.max_detections = iou_type, check_limits(max_detections)
        self.use_categories = use_categories
        self.reset()

    def reset(self) -> None:
        """Forgets every image."""
        self._tables: dict[int, Table] = {}  # by image
        self._numbered = None  # True if images have no id of their own, None before the first

    def update(
        self,
        detections: Sequence[Mapping[str, Tensor]],
        truths: Sequence[Mapping[str, Tensor]],
        image_ids: Sequence[int] | None = None,
    ) -> None:
        """Takes a batch.

        Args:
            detections: of each image, scores [n], labels [n] of ints, and boxes [n, 4] (x1, y1, x2, y2) or, for "segm",
                masks, n `fastseg.ops.PackedMasks` or dense masks [n, H, W] of bool or uint8.
            truths: of each image, labels [m], boxes or masks, and optionally iscrowd [m] and area [m] (else that of
                the box or mask).
            image_ids: ints. With them an image that several ranks saw (a sampler that pads its last batch) counts
                once, and
                detections of equal score are sorted by image; without them images are numbered as they come.

        Raises:
            ValueError: a field that lacks or has another length, an image that was given before, scores that are NaN.
        """
        ids = range(len(self._tables), len(self._tables) + len(truths)) if image_ids is None else [*map(int, image_ids)]
        if not len(detections) == len(truths) == len(ids):
            raise ValueError(f"fastseg.metrics.CocoEvaluator: detections of {len(detections)} images, truths of "
                             f"{len(truths)}, image_ids of {len(ids)}; allowed: as many of each")
        if self._numbered not in (None, image_ids is None):
            raise ValueError("fastseg.metrics.CocoEvaluator: image_ids were given for some batches; allowed: all, "
                             "or none")
        given = [image for place, image in enumerate(ids) if image in self._tables or image in ids[:place]]
        if given:
            raise ValueError(f"fastseg.metrics.CocoEvaluator: image {given[0]} was given before; allowed: each once")
        tables = {image: self._table_of(image, *pair) for image, *pair in zip(ids, detections, truths)}
        self._tables |= tables
        self._numbered = image_ids is None

    def all_gather(self, process_group: torch.distributed.ProcessGroup | None = None) -> "CocoEvaluator":
        """The images of all ranks together, as a new object: this one keeps those of its own.

        Every rank of the group must call it, also one that saw no image. Without an initialised process group there is
        one rank.
        """
        total = CocoEvaluator(
            self.iou_type, max_detections=self.max_detections, use_categories=self.use_categories
        )
        parts = [(self._tables, self._numbered)]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            parts = [None] * torch.distributed.get_world_size(process_group)
            torch.distributed.all_gather_object(parts, (self._tables, self._numbered), group=process_group)
        for rank, (tables, numbered) in enumerate(parts):
            for image, table in tables.items():
                total._tables.setdefault(image * len(parts) + rank if numbered else image, table)
        total._numbered = self._numbered
        return total

    def compute(self) -> CocoResult:
        """The figures of all images so far; categories are the labels that occurred."""
        empty = Instances(*[numpy.zeros(0, numpy.int64)] * 2, *[numpy.zeros(0)] * 2, numpy.zeros(0, bool))
        tables = [group(empty, empty, 1, lambda *_: numpy.zeros(0))]
        for image, table in self._tables.items():
            for instances in (table.detections, table.truths):
                instances.image = numpy.full(len(instances), image)
            tables.append(table)
        table = Table.join(tables)
        categories = numpy.union1d(table.detections.category, table.truths.category).tolist()
        return summarize(table, categories, self.max_detections)

    def _table_of(self, image, detections, truths) -> Table:
        shape = "boxes" if self.iou_type == "bbox" else "masks"
        found, shapes = self._instances(image, detections, "detections", shape, "scores")
        real, real_shapes = self._instances(image, truths, "truths", shape, None)
        if self.iou_type == "bbox":
            ious = box_ious(shapes, real_shapes, real.crowd)
        else:
            table = mask_iou(shapes, real_shapes, crowd=torch.from_numpy(real.crowd)).double().numpy()
            ious = lambda detection, truth: table[detection, truth]  # noqa: E731
        return group(found, real, self.max_detections[-1], ious)

    def _instances(self, image, entry, what, shape, score):
        """The instances of an image, and their boxes (x, y, width, height) or packed masks."""

        def column(name, dtype, default=None):
            if name not in entry:
                if default is None:
                    raise ValueError(f"fastseg.metrics.CocoEvaluator: {what} of image {image} have no {name!r}")
                return default
            value = numpy.asarray(torch.as_tensor(entry[name]).detach().cpu().double())
            if value.shape != (count,):
                given = f"{name!r} of {what} of image {image} has shape {value.shape}"
                raise ValueError(f"fastseg.metrics.CocoEvaluator: {given}; allowed: ({count},)")
            return value.astype(dtype)

        if shape not in entry:
            raise ValueError(f"fastseg.metrics.CocoEvaluator: {what} of image {image} have no {shape!r}")
        if shape == "boxes":
            shapes = numpy.array(torch.as_tensor(entry[shape]).detach().cpu().double())
            if shapes.ndim != 2 or shapes.shape[1] != 4:
                given = f"'boxes' of {what} of image {image} has shape {shapes.shape}"
                raise ValueError(f"fastseg.metrics.CocoEvaluator: {given}; allowed: (n, 4)")
            shapes[:, 2:] -= shapes[:, :2]
            areas = shapes[:, 2] * shapes[:, 3]
        else:
            shapes = entry[shape] if isinstance(entry[shape], PackedMasks) else pack_masks(entry[shape])
            areas = shapes.area.cpu().double().numpy()
        count = len(shapes)
        labels = column("labels", numpy.int64)
        if not self.use_categories:
            labels = numpy.zeros_like(labels)
        instances = Instances(numpy.full(count, image), labels, areas)
        if score is None:
            instances.area = column("area", numpy.float64, areas)
            instances.crowd = column("iscrowd", bool, numpy.zeros(count, bool))
        else:
            instances.score = column(score, numpy.float64)
            if numpy.isnan(instances.score).any():
                raise ValueError(f"fastseg.metrics.CocoEvaluator: {what} of image {image} have a score that is NaN; "
                                 "allowed: numbers")
        return instances, shapes
