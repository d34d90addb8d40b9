"""soft_nms: non-maximum suppression that lowers the scores of boxes that overlap (Bodla et al., ICCV 2017).

    repeat: pick the box i of the highest score; multiply the score of every other box j (of i's class) by
        1 - o  if o > iou_threshold, else 1        linear       o = IoU(i, j)
        exp(-o^2 / sigma)                          gaussian
    until no score of min_score or more is left

The IoU is that of `nms`. A weight of 0 makes every score 0; a NaN IoU (of boxes without area) weighs 1.
"""

import math

import torch
from torch import Tensor

from fastseg import _check
from fastseg._backend import rows
from fastseg._dtypes import FLOATING, accumulator
from fastseg._op import Op
from fastseg.kernels.soft_nms import reference
from fastseg.ops.nms import check_boxes, kernel_arguments

_NAME = "soft_nms"
METHODS = ("linear", "gaussian")


def check(boxes, scores, idxs, iou_threshold, sigma, min_score):
    check_boxes(_NAME, boxes, scores, idxs)
    _check.in_range(_NAME, "iou_threshold", iou_threshold, 0, 1)
    _check.in_range(_NAME, "min_score", min_score, 0, math.inf)
    if not 0 < sigma < math.inf:
        raise ValueError(f"fastseg.ops.{_NAME}: sigma={sigma!r}; allowed: a positive finite number")


def outputs(boxes, most):
    return (
        boxes.new_empty((most,), dtype=accumulator(boxes.dtype)),
        boxes.new_empty((most,), dtype=torch.int64),
        boxes.new_empty((), dtype=torch.int64),
    )


soft_nms_op = Op(
    "soft_nms(Tensor boxes, Tensor scores, Tensor? idxs, float iou_threshold, bool gaussian, float sigma,"
    " float min_score, SymInt most) -> (Tensor picked_scores, Tensor indices, Tensor count)",
    check=check,
    outputs=outputs,
    internal=True,
    recorded=True,
    contiguous=("idxs",),
    accumulated=("boxes", "scores"),
    backends=rows(reference.soft_nms, cuda=FLOATING),
)


def soft_nms(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float = 0.3,
    *,
    method: str = "linear",
    sigma: float = 0.5,
    min_score: float = 0.001,
    idxs: Tensor | None = None,
    max_output: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]:
    """Picks boxes by score; each pick lowers the scores of boxes that overlap it, but suppresses none.

    Equal to the original (github.com/bharatsingh430/soft-nms), except for its + 1 in the size of boxes.

    Args:
        boxes: (N, 4), corners x1, y1, x2, y2; float32, float16, bfloat16 or float64, any strides, N >= 0.
        scores: (N,), of any of these dtypes; computed in fp32, fp64 if boxes or scores are. Of equal scores the lower
            index is picked first; NaN comes before every number and stays.
        iou_threshold: 0 to 1, of the linear method: scores fall where the IoU is strictly above it.
        method: "linear" or "gaussian".
        sigma: of the gaussian method, positive.
        min_score: 0 or more. A box is dropped as soon as its score is below it, even its initial score.
        idxs: None, or integers (N,): only boxes of the same class lower a score.
        max_output: None, or M for results of static shape, of the first M boxes picked.
        backend: "auto", "cpu", "cuda" or "reference".

    Returns:
        (indices, int64, in the order picked, which is that of the decayed scores; decayed scores in the dtype of
        `scores`). With `max_output`: (indices (M,), padded with -1; scores (M,), padded with 0; count, int64 of no
        dimension), as `nms`. Not differentiable; the same on every device and run.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit.
        ValueError: numbers that are NaN or not allowed; another method; max_output < 0.
        TypeError: arguments of other types.
    """
    iou_threshold, sigma, min_score = _check.numbers(
        _NAME, iou_threshold=iou_threshold, sigma=sigma, min_score=min_score
    )
    check(boxes, scores, idxs, iou_threshold, sigma, min_score)
    _check.one_of(_NAME, "method", method, METHODS)
    max_output = _check.max_output(_NAME, max_output)
    picked_scores, indices, count = soft_nms_op(
        *kernel_arguments(boxes, scores, idxs),
        iou_threshold,
        method == "gaussian",
        sigma,
        min_score,
        boxes.shape[0] if max_output is None else max_output,
        backend=backend,
    )
    picked_scores = picked_scores.to(scores.dtype)
    if max_output is not None:
        return indices, picked_scores, count
    picked = indices >= 0
    return indices.masked_select(picked), picked_scores.masked_select(picked)
