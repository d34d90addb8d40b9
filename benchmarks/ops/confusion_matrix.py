"""confusion_matrix of predicted and true labels, without ignored pixels. The shape of a case is (N, classes, H, W);
its dtype is that of the labels.
"""

import numpy
import torch

import fastseg.ops
from benchmarks import checks
from benchmarks.harness import Case, Peer, Target
from benchmarks.inputs import IGNORED, labels


def make(shape, device, dtype, layout):
    """Predicted labels (never ignored), true labels and the number of classes."""
    batch, classes, *spatial = shape
    predicted = labels((batch, *spatial), classes, device, ignored_share=0)
    true = labels((batch, *spatial), classes, device)
    return predicted.to(dtype), true.to(dtype), classes


def minimal_bytes(shape, dtype):
    """Both label maps read once."""
    return 2 * shape[0] * shape[2] * shape[3] * dtype.itemsize


def bincount(predicted, true, classes):
    valid = true != IGNORED
    index = true[valid].long() * classes + predicted[valid]
    return torch.bincount(index, minlength=classes * classes).view(classes, classes)


def numpy_bincount(predicted, true, classes):
    predicted, true = predicted.numpy().ravel(), true.numpy().ravel()
    valid = true != IGNORED
    index = true[valid].astype(numpy.int64) * classes + predicted[valid]
    return numpy.bincount(index, minlength=classes * classes).reshape(classes, classes)


def confusion_matrix(predicted, true, classes):
    return fastseg.ops.confusion_matrix(predicted, true, classes, ignore_index=IGNORED)


def case(shape, dtype, targets=()):
    return Case(
        "confusion_matrix",
        shape,
        make,
        confusion_matrix,
        {"bincount": Peer(bincount), "numpy": Peer(numpy_bincount, devices=("cpu",))},
        minimal_bytes,
        checks.equal_to(bincount),
        dtype=dtype,
        targets=targets,
        backward=False,
    )


CASES = [
    case(
        (1, 19, 512, 1024),
        torch.int64,
        (Target("speedup", 20, "bincount"), Target("speedup", 10, "numpy")),
    ),
    case((1, 19, 512, 1024), torch.uint8),
    case((4, 150, 513, 511), torch.int64),
    case((1, 1000, 512, 1024), torch.int64),
]
