"""confusion_matrix: how often class i was predicted as class j, from labels or directly from logits.

    result[i, j] = #{pixels p : target[p] = i, prediction[p] = j, target[p] != ignore_index}

The prediction is `input` if it holds integer labels, or its arg max over dim 1 if it holds logits; that label map
is not stored in memory. `fastseg.metrics` computes accuracy, IoU and Dice from the result.
"""

import torch
from torch import Tensor

from fastseg import _check
from fastseg._backend import rows
from fastseg._dtypes import FLOATING, LABELS
from fastseg._op import Op
from fastseg.kernels.confusion_matrix import reference

_NAME = "confusion_matrix"
MAX_CLASSES = 32767  # pairs of classes are counted through 32-bit indices


def check(input, target, num_classes):
    _check.dtype(_NAME, "input", input, (*LABELS, *FLOATING))
    _check.dtype(_NAME, "target", target, LABELS)
    _check.same_device(_NAME, "target", target, "input", input)
    _check.in_range(_NAME, "num_classes", num_classes, 1, MAX_CLASSES)
    if not input.is_floating_point():
        _check.shape(_NAME, "target", target, input.shape, "the shape of input, which holds labels")
        return
    if input.dim() < 2:
        raise RuntimeError(
            f"fastseg.ops.{_NAME}: input has shape {tuple(input.shape)}; allowed: (N, C, *spatial) logits"
        )
    _check.shape(_NAME, "input", input, ("N", num_classes, *input.shape[2:]), "logits, C is num_classes")
    _check.shape(_NAME, "target", target, (input.shape[0], *input.shape[2:]), "input's without the class dimension")


def outputs(input, num_classes):
    return input.new_empty((num_classes, num_classes), dtype=torch.int64)


confusion_matrix_op = Op(
    "confusion_matrix(Tensor input, Tensor target, int num_classes, int ignore_index) -> Tensor counts",
    check=check,
    outputs=outputs,
    backends=rows(reference.confusion_matrix, cpu=(*FLOATING, *LABELS), cuda=(*FLOATING, *LABELS)),
)


def confusion_matrix(
    input: Tensor,
    target: Tensor,
    num_classes: int | None = None,
    ignore_index: int | None = -100,
    *,
    backend: str = "auto",
) -> Tensor:
    """Counts pixels by true class (row) and predicted class (column).

    Equals `sklearn.metrics.confusion_matrix(target, prediction, labels=range(C))` over the counted pixels.

    Args:
        input: predicted labels of target's shape (int64, int32 or uint8), or logits (N, C, *spatial) of dtype
            float32, float16, bfloat16 or float64, contiguous or channels_last, whose arg max over dim 1 is
            the prediction, as in `torch.argmax`: the first of equal maxima, NaN above every number.
        target: true labels (int64, int32 or uint8), of input's shape without the class dimension.
        num_classes: C, 1 to 32767. Must be given with labels; with logits it is input.size(1).
        ignore_index: pixels with this true label are not counted; any integer, also one inside [0, C), or None.
        backend: "auto", "cpu", "cuda" or "reference".

    Returns:
        int64 (C, C). Integer counts: the same on every run, and correct beyond 2^31 pixels.

    Raises:
        IndexError: on CPU, a label outside [0, C) in target that is not ignore_index, or in input at a pixel
            that is not ignored. On GPU, where a check would stall the stream, such a pixel is not counted.
        RuntimeError: shapes, dtypes or devices that do not fit.
        ValueError: num_classes missing or out of range.
        TypeError: arguments of other types.
    """
    _check.tensor(_NAME, "input", input)
    _check.tensor(_NAME, "target", target)
    if num_classes is None:
        _check.dtype(_NAME, "input", input, (*LABELS, *FLOATING))
        if not input.is_floating_point() or input.dim() < 2:
            raise ValueError(f"fastseg.ops.{_NAME}: num_classes=None; allowed: an int (None only with logits)")
        num_classes = input.size(1)
    try:
        num_classes = _check.integer(num_classes)
    except TypeError as error:
        raise TypeError(f"fastseg.ops.{_NAME}: num_classes={num_classes!r}; allowed: an int") from error
    ignore_index = _check.label(_NAME, "ignore_index", ignore_index)
    return confusion_matrix_op(input.detach(), target, num_classes, ignore_index, backend=backend)
