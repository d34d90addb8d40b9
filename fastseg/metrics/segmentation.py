"""Segmentation metrics from a confusion matrix that is accumulated over batches and ranks.

Rows of a matrix n are true classes, columns predicted ones (`fastseg.ops.confusion_matrix`); n_ij counts the
pixels of class i predicted as j over the whole data set, t_i = sum_j n_ij, q_i = sum_j n_ji. The functions
take such a matrix (C, C) of any integer or floating dtype and compute in float64:

    pixel_accuracy           sum_i n_ii / sum_i t_i
    class_accuracy           n_ii / t_i, NaN where t_i = 0
    mean_accuracy            mean of class_accuracy over the classes with t_i > 0
    iou                      n_ii / (t_i + q_i - n_ii), NaN where the class is neither true nor predicted
    mean_iou                 mean of iou without NaN: a class that is predicted but never true counts as 0
    frequency_weighted_iou   sum_i t_i iou_i / sum_i t_i over the classes with t_i > 0
    dice                     2 n_ii / (t_i + q_i) = 2 iou / (1 + iou), NaN like iou
    mean_dice                mean of dice without NaN

These are the conventions of Long, Shelhamer and Darrell (FCN). An empty matrix gives NaN everywhere.
"""

import torch
import torch.distributed
from torch import Tensor, nn

from fastseg.ops import confusion_matrix


def pixel_accuracy(matrix: Tensor) -> Tensor:
    """Share of the pixels whose class was predicted correctly: a scalar."""
    hits, true, _ = _counts(matrix)
    return hits.sum() / true.sum()


def class_accuracy(matrix: Tensor) -> Tensor:
    """Share of the pixels of each class that was predicted correctly (recall): (C,), NaN if the class is never true."""
    hits, true, _ = _counts(matrix)
    return hits / true


def mean_accuracy(matrix: Tensor) -> Tensor:
    """Mean of `class_accuracy` over the classes that are true somewhere: a scalar."""
    return class_accuracy(matrix).nanmean()


def iou(matrix: Tensor) -> Tensor:
    """Intersection over union of each class: (C,), NaN where the class is neither true nor predicted."""
    hits, true, predicted = _counts(matrix)
    return hits / (true + predicted - hits)


def mean_iou(matrix: Tensor) -> Tensor:
    """Mean of `iou` over the classes that are true or predicted somewhere: a scalar."""
    return iou(matrix).nanmean()


def frequency_weighted_iou(matrix: Tensor) -> Tensor:
    """Mean of `iou`, each class weighted by its share of the true pixels: a scalar."""
    _, true, _ = _counts(matrix)
    return torch.where(true > 0, true * iou(matrix), 0).sum() / true.sum()


def dice(matrix: Tensor) -> Tensor:
    """Dice coefficient (F1) of each class: (C,), NaN where the class is neither true nor predicted."""
    hits, true, predicted = _counts(matrix)
    return 2 * hits / (true + predicted)


def mean_dice(matrix: Tensor) -> Tensor:
    """Mean of `dice` over the classes that are true or predicted somewhere: a scalar."""
    return dice(matrix).nanmean()


def _counts(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Hits n_ii, true pixels t_i and predicted pixels q_i of every class: (C,) each, float64."""
    if matrix.dim() != 2 or matrix.size(0) != matrix.size(1):
        raise ValueError(f"fastseg.metrics: matrix has shape {tuple(matrix.shape)}; allowed: (C, C)")
    matrix = matrix.double()
    return matrix.diagonal(), matrix.sum(1), matrix.sum(0)


class SegmentationMetrics(nn.Module):
    """Accumulates a confusion matrix over batches and ranks, and computes the metrics from it.

        metrics = SegmentationMetrics(num_classes=19, ignore_index=255)
        for images, labels in loader:
            metrics.update(model(images), labels)
        print(metrics.all_reduce().compute()["mean_iou"])

    It is a module without parameters: as an attribute of a model it moves with the model (``to``, ``cuda``), and its
    counts are in the model's ``state_dict`` under ``matrix``, so that checkpoints include them. They are not a buffer:
    DistributedDataParallel would replace every rank's buffers by those of the first rank.

    In a LightningModule, with ``self.metrics`` made in its constructor (`update` in ``validation_step``):

        def on_validation_epoch_end(self):
            self.log_dict(self.metrics.all_reduce().scalars())
            self.metrics.reset()

    Args:
        num_classes: C.
        ignore_index: true label of the pixels that are not counted; any integer.
        device: where the matrix is kept. `update` stays asynchronous on a GPU only if it is that GPU; by
            default the device of the first batch.
    """

    def __init__(self, num_classes: int, ignore_index: int = -100, device: torch.device | str | None = None):
        super().__init__()
        self.num_classes, self.ignore_index, self.device = num_classes, ignore_index, device
        self.reset()

    def reset(self) -> None:
        """Sets the counts to 0."""
        self._matrix: Tensor | None = None

    @property
    def matrix(self) -> Tensor:
        """The counts so far: int64 (C, C), rows truth, columns prediction."""
        if self._matrix is None:
            return torch.zeros(self.num_classes, self.num_classes, dtype=torch.int64, device=self.device)
        return self._matrix

    def update(self, input: Tensor, target: Tensor) -> None:
        """Counts a batch: predicted labels or logits, and true labels (as `fastseg.ops.confusion_matrix`).

        Raises: what confusion_matrix raises; the counts are then unchanged.
        """
        self._add(self._count(input, target))

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Counts a batch as `update` does, and returns the metrics of this batch alone, as `compute` does."""
        counts = self._count(input, target)
        self._add(counts)
        return _compute(counts)

    def all_reduce(self, process_group: torch.distributed.ProcessGroup | None = None) -> "SegmentationMetrics":
        """A new object with the counts of all ranks; this one keeps the counts of its rank.

        Every rank of the group must call it, also a rank without batches. Without an initialised process group
        there is one rank. The nccl backend sums on the current CUDA device.
        """
        total = SegmentationMetrics(self.num_classes, self.ignore_index, self.device)
        summed = self.matrix.clone()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            if torch.distributed.get_backend(process_group) == "nccl":
                summed = summed.cuda()
            torch.distributed.all_reduce(summed, group=process_group)
        total._matrix = summed
        return total

    def compute(self) -> dict[str, Tensor]:
        """Every metric of this module by its name: scalars, and (C,) for class_accuracy, iou and dice."""
        return _compute(self.matrix)

    def scalars(self) -> dict[str, Tensor]:
        """The scalars of `compute`, for loggers."""
        return {name: value for name, value in self.compute().items() if value.dim() == 0}

    def extra_repr(self) -> str:
        return f"num_classes={self.num_classes}, ignore_index={self.ignore_index}"

    def _count(self, input, target):
        return confusion_matrix(input, target, self.num_classes, self.ignore_index)

    def _add(self, counts):
        if self._matrix is None:
            self._matrix = counts.to(self.device or counts.device)
        else:
            self._matrix = self._matrix + counts.to(self._matrix.device)

    def _apply(self, fn, recurse=True):
        """Called by ``to``, ``cuda``, ``cpu`` and similar: moves the matrix, which stays int64."""
        device = fn(torch.zeros(0, device=self.matrix.device)).device
        if self.device is not None:
            self.device = device
        if self._matrix is not None:
            self._matrix = self._matrix.to(device)
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}matrix"] = self.matrix

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected, errors):
        key, size = f"{prefix}matrix", (self.num_classes, self.num_classes)
        matrix = state_dict.get(key)
        if matrix is None:
            missing_keys.append(key)
        elif tuple(matrix.shape) != size:
            errors.append(f"fastseg.metrics: {key} has shape {tuple(matrix.shape)}; allowed: {size}")
        else:
            self._matrix = matrix.detach().clone().to(self.device or matrix.device)
        others = {name: value for name, value in state_dict.items() if name != key}
        super()._load_from_state_dict(others, prefix, local_metadata, strict, missing_keys, unexpected, errors)


def _compute(matrix: Tensor) -> dict[str, Tensor]:
    return {function.__name__: function(matrix) for function in METRICS}


METRICS = (
    pixel_accuracy,
    class_accuracy,
    mean_accuracy,
    iou,
    mean_iou,
    frequency_weighted_iou,
    dice,
    mean_dice,
)
