"""nms, batched_nms: greedy non-maximum suppression of boxes, of all or of each class.

    box j is kept  <=>  no kept box i of a higher score (and of j's class) has IoU(i, j) > iou_threshold

IoU is intersection / (area + area - intersection) of continuous boxes (no + 1), each operation rounded to fp32 (fp64
for fp64): the same decisions on every device, and those of torchvision.ops.nms. With max_output=M results have a fixed
shape and nothing waits for the device.
"""

import torch
from torch import Tensor

from fastseg import _check
from fastseg._backend import rows
from fastseg._dtypes import FLOATING
from fastseg._op import Op
from fastseg.kernels.nms import reference

_NAME = "nms"
CLASSES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def check_boxes(op: str, boxes, scores, idxs) -> None:
    """Checks tensors of this op and of soft_nms."""
    _check.argument(op, "boxes", boxes, FLOATING, ("N", 4), "x1, y1, x2, y2")
    count = boxes.shape[0]
    _check.argument(op, "scores", scores, FLOATING, (count,), "one score per box", like=("boxes", boxes))
    if idxs is not None:
        _check.argument(op, "idxs", idxs, CLASSES, (count,), "one class per box", like=("boxes", boxes))


def check(boxes, scores, idxs, iou_threshold):
    check_boxes(_NAME, boxes, scores, idxs)
    _check.in_range(_NAME, "iou_threshold", iou_threshold, 0, 1)


def outputs(boxes, most):
    return boxes.new_empty((most,), dtype=torch.int64), boxes.new_empty((), dtype=torch.int64)


nms_op = Op(
    "nms(Tensor boxes, Tensor scores, Tensor? idxs, float iou_threshold, SymInt most)"
    " -> (Tensor indices, Tensor count)",
    check=check,
    outputs=outputs,
    internal=True,
    recorded=True,
    contiguous=("idxs",),
    accumulated=("boxes", "scores"),
    backends=rows(reference.nms, cuda=FLOATING),
)


def nms(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float,
    *,
    max_output: int | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Keeps the best of boxes that overlap; drop-in for torchvision.ops.nms.

    Args:
        boxes: (N, 4), corners x1, y1, x2, y2 with x1 <= x2 and y1 <= y2 in any unit; float32, float16, bfloat16 or
            float64, any strides, N >= 0. A box without area, or with a NaN or an infinite coordinate that makes the
            IoU NaN, neither suppresses nor is suppressed.
        scores: (N,), of any of these dtypes. Equal scores: the lower index first. NaN comes before every number, as in
            `torch.sort(descending=True)`.
        iou_threshold: 0 to 1. Boxes with an IoU strictly above it suppress each other.
        max_output: None, or M for results of static shape, of the best M boxes that are kept.
        backend: "auto", "cpu", "cuda" or "reference".

    Returns:
        int64 indices of the kept boxes, by descending score. Their number depends on the data, so on a GPU the host
        waits for it. With `max_output`: (indices (M,), padded with -1, and count, int64 of no dimension). Their shapes
        do not depend on the data: nothing waits, and torch.compile(fullgraph=True), torch.export and CUDA graphs work.
        Not differentiable; the same on every device and run.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit.
        ValueError: iou_threshold that is NaN or not in 0 to 1; max_output < 0.
        TypeError: arguments of other types.
    """
    return _suppress(_NAME, boxes, scores, None, iou_threshold, max_output, backend)


def batched_nms(
    boxes: Tensor,
    scores: Tensor,
    idxs: Tensor,
    iou_threshold: float,
    *,
    max_output: int | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """`nms` within each class; drop-in for torchvision.ops.batched_nms.

    Classes are compared. Boxes are not shifted by an offset for each class, which would lose the fraction of large
    coordinates and overflow in half types.

    Args:
        boxes, scores, iou_threshold, max_output, backend: as in `nms`.
        idxs: (N,) class, image or level of every box: any integers (int64, int32, int16, int8 or uint8).

    Returns:
        As `nms`: the boxes of all classes that are kept, by descending score.

    Raises:
        As `nms`.
    """
    _check.tensor("batched_nms", "idxs", idxs)
    return _suppress("batched_nms", boxes, scores, idxs, iou_threshold, max_output, backend)


def _suppress(op, boxes, scores, idxs, iou_threshold, max_output, backend):
    check_boxes(op, boxes, scores, idxs)
    iou_threshold = _check.number(op, "iou_threshold", iou_threshold)
    _check.in_range(op, "iou_threshold", iou_threshold, 0, 1)
    max_output = _check.max_output(op, max_output)
    boxes, scores, idxs = kernel_arguments(boxes, scores, idxs)
    most = boxes.shape[0] if max_output is None else max_output
    indices, count = nms_op(boxes, scores, idxs, iou_threshold, most, backend=backend)
    return (indices, count) if max_output is not None else indices.masked_select(indices >= 0)


def kernel_arguments(boxes: Tensor, scores: Tensor, idxs: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Without gradient, boxes in fp64 if scores are, classes as int64. `Op` makes the other conversions."""
    if scores.dtype == torch.float64:
        boxes = boxes.double()
    return boxes.detach(), scores.detach(), idxs if idxs is None else idxs.long()
