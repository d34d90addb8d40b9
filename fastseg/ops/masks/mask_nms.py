"""mask_nms: greedy non-maximum suppression of masks.

In the order of their scores, a mask is kept unless its IoU with a mask kept before it (of the same label) is above the
threshold:

    keep j  <=>  no kept i before j has  |i and j| / |i or j| > iou_threshold
"""

import torch
from torch import Tensor

from fastseg import _check
from fastseg._backend import rows
from fastseg._dtypes import FLOATING
from fastseg._op import Op
from fastseg.kernels.mask_nms import reference
from fastseg.ops.masks.mask_iou import check_known
from fastseg.ops.masks.pack_masks import packed_from
from fastseg.ops.masks.packed import PackedMasks

_NAME = "mask_nms"


def check(words, area, boxes, order, labels, iou_threshold, max_output):
    check_known(_NAME, words, area, boxes)
    count = words.shape[:1]
    _check.argument(_NAME, "order", order, (torch.int64,), count, like=("masks", words))
    if labels is not None:
        _check.argument(_NAME, "labels", labels, (torch.int64,), count, like=("masks", words))
    _check.in_range(_NAME, "iou_threshold", iou_threshold, 0, 1)
    _check.max_output(_NAME, max_output)


def outputs(words, max_output):
    room = words.shape[0] if max_output is None else max_output
    return words.new_empty(room, dtype=torch.int64), words.new_empty((), dtype=torch.int64)


mask_nms_op = Op(
    "mask_nms(Tensor words, Tensor area, Tensor boxes, Tensor order, Tensor? labels, float iou_threshold, "
    "SymInt? max_output) -> (Tensor keep, Tensor count)",
    check=check,
    outputs=outputs,
    internal=True,
    recorded=True,
    contiguous=("words", "area", "boxes", "order", "labels"),
    backends=rows(reference.mask_nms, cpu=(torch.int32,), cuda=(torch.int32,)),
)


def mask_nms(
    masks: PackedMasks | Tensor,
    scores: Tensor,
    iou_threshold: float,
    labels: Tensor | None = None,
    *,
    max_output: int | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Greedy non-maximum suppression of masks: torchvision.ops.nms and batched_nms, with the IoU of masks.

    Args:
        masks: N masks: `PackedMasks`, or (N, H, W) of bool or uint8, which is packed first.
        scores: (N), float32, float16, bfloat16 or float64. Equal scores rank by index, NaN above every number.
        iou_threshold: 0 to 1; a mask is suppressed if its IoU with a kept one is above it, not if it is equal.
        labels: int64, int32 or uint8 (N): masks suppress only masks of the same label. None: all have the same.
        max_output: with an int M the result has a static shape, which torch.compile(fullgraph=True), torch.export and
            CUDA graphs accept, and the host does not wait for the GPU: at most M masks are kept.
        backend: "auto", "cpu", "cuda" or "reference".

    Returns:
        int64 (K), the indices of the kept masks, best score first. With max_output: indices int64 (M), -1 after the
        last, and their number, int64 (). The same on CPU and GPU. Not differentiable.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit.
        ValueError: a threshold outside of 0 to 1, or NaN; a negative max_output.
        TypeError: arguments of other types.
    """
    masks = packed_from(_NAME, "masks", masks)
    iou_threshold = _check.number(_NAME, "iou_threshold", iou_threshold)
    _check.in_range(_NAME, "iou_threshold", iou_threshold, 0, 1)
    order, labels = ranking(_NAME, masks, scores, labels)
    max_output = _check.max_output(_NAME, max_output)
    keep, count = mask_nms_op(
        masks.words, masks.area, masks.boxes, order, labels, iou_threshold, max_output, backend=backend
    )
    return keep[: count.item()] if max_output is None else (keep, count)


def ranking(op: str, masks: PackedMasks, scores: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The masks' indices, best score first, and their labels as int64."""
    masks_argument = ("masks", masks.words)
    _check.argument(op, "scores", scores, FLOATING, (len(masks),), "one for each mask", like=masks_argument)
    if labels is not None:
        integers = (torch.int64, torch.int32, torch.uint8)
        _check.argument(op, "labels", labels, integers, (len(masks),), "one for each mask", like=masks_argument)
        labels = labels.long()
    return scores.detach().argsort(descending=True, stable=True), labels
