"""The merge of instances and a semantic map to one panoptic map, as Panoptic FPN and detectron2 define it."""

from dataclasses import dataclass

import torch
from torch import Tensor

THING_LABEL = 0  # in the semantic map: any thing
VOID = 0  # in the panoptic map: no segment


@dataclass(frozen=True)
class Segment:
    """A segment of a panoptic map.

    Attributes:
        id: its number in the map, 1 or more.
        is_thing: True for an instance, False for stuff.
        category: the class of the instance, or the label of the stuff.
        area: its pixels in the map.
        score: of the instance; None for stuff.
    """

    id: int
    is_thing: bool
    category: int
    area: int
    score: float | None = None


@torch.no_grad()
def panoptic_merge(
    masks: Tensor,
    scores: Tensor,
    classes: Tensor,
    labels: Tensor,
    *,
    least_score: float = 0.5,
    most_overlap: float = 0.5,
    least_area: int = 64 * 64,
) -> tuple[Tensor, list[Segment]]:
    """The panoptic map of one image: each pixel belongs to one segment, or to none.

    Instances are pasted in the order of their scores, the first of equal ones first, where no other is yet. One of
    which too large a part is covered already is left out. Stuff takes the pixels that are left.

    Args:
        masks: (n, H, W), bool, or integers of which 0 is outside.
        scores, classes: (n,) of the instances.
        labels: (H, W), integers: the semantic map, in which 0 stands for all things.
        least_score: of instances that are used.
        most_overlap: the part of an instance's pixels that others may cover.
        least_area: pixels that a stuff class needs.

    Returns:
        the map (H, W), int32, of the segments' ids, 0 where there is none; the segments in the order of their ids.

    Raises:
        ValueError: shapes that do not fit, or a map of floating point.
    """
    _check(masks, scores, classes, labels)
    segment_map = torch.zeros(labels.shape, dtype=torch.int32, device=labels.device)
    segments: list[Segment] = []

    def paste(mask: Tensor, area: int, is_thing: bool, category: int, score: float | None = None) -> None:
        segments.append(Segment(len(segments) + 1, is_thing, category, area, score))
        segment_map.masked_fill_(mask, segments[-1].id)

    order = scores.argsort(descending=True, stable=True)
    order = order[scores[order] >= least_score]
    masks, categories, kept_scores = masks[order] != 0, classes[order].tolist(), scores[order].tolist()
    areas = masks.sum(dim=(1, 2)).tolist()
    for mask, area, category, score in zip(masks, areas, categories, kept_scores):
        if area:
            mask = mask & (segment_map == VOID)
            free = int(mask.sum())
            if (area - free) / area <= most_overlap:
                paste(mask, free, True, int(category), score)
    left = torch.where(segment_map == VOID, labels, THING_LABEL)
    for label, area in zip(*(values.tolist() for values in left.unique(return_counts=True))):
        if label != THING_LABEL and area >= least_area:
            paste(left == label, area, False, label)
    return segment_map, segments


def _check(masks: Tensor, scores: Tensor, classes: Tensor, labels: Tensor) -> None:
    if labels.dim() != 2 or labels.is_floating_point():
        raise ValueError(_message("labels", labels, "integers (H, W)"))
    if masks.dim() != 3 or masks.shape[1:] != labels.shape or masks.is_floating_point():
        raise ValueError(_message("masks", masks, f"bool or integers (n, {labels.shape[0]}, {labels.shape[1]})"))
    for name, values in (("scores", scores), ("classes", classes)):
        if values.shape != masks.shape[:1]:
            raise ValueError(_message(name, values, f"({len(masks)},), one of each mask"))


def _message(name: str, value: Tensor, allowed: str) -> str:
    given = f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    return f"fastseg.models.panoptic_merge: {name} is {given}; allowed: {allowed}"
