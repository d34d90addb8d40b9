"""`ClassBalancedCrossEntropyLoss` and `median_frequency_weights`: a larger weight for rare classes."""

import torch

from fastseg import ops
from fastseg._check import NO_LABEL, dtype_name
from fastseg.nn._loss import Loss

_LABEL_DTYPES = (torch.int64, torch.int32, torch.int16, torch.uint8)


class ClassBalancedCrossEntropyLoss(Loss):
    """Cross-entropy with class weights, divided by the number of pixels: the loss of Caffe's SegNet.

        mean over the pixels not ignored of  weight[label] * (-log p_label)

    ``CrossEntropyLoss(weight)`` divides by the sum of ``weight[label]`` instead: there the size of the
    weights cancels out, and a batch without the rare classes has the same weight as any other.

    It is softmax focal loss with gamma 0 and calls `fastseg.ops.focal_loss`, where shapes, dtypes and
    errors are documented. ``forward`` takes logits ``(N, C, d1, ..., dk)``, integer labels ``(N, d1, ...,
    dk)`` and optionally one factor per label, ``pixel_weight``; a mean then divides by their sum.

    Args:
        weight: (C,) weight of each class, as from `median_frequency_weights`, or None for 1.
        ignore_index: label that contributes nothing, for any logits of the pixel; None for none.
        reduction: "none", "mean" or "sum".
        zero_if_empty: a mean over no valid pixel is 0 instead of NaN.
    """

    def __init__(self, weight=None, *, ignore_index=-100, reduction="mean", zero_if_empty=False):
        options = dict(ignore_index=ignore_index, reduction=reduction, zero_if_empty=zero_if_empty)
        super().__init__("weight", weight, **options)

    def forward(self, input, target, pixel_weight=None):
        options = self.options()
        return ops.focal_loss(input, target, self.weight, 0.0, pixel_weight=pixel_weight, **options)


def median_frequency_weights(label_maps, num_classes, ignore_index=-100):
    """Weights that balance the classes of a data set: ``w_c = median(f) / f_c`` (Eigen and Fergus, 2015).

    ``f_c`` is the number of pixels of class c over the number of pixels of all images that contain c; pixels
    labelled ``ignore_index`` do not count. The median is over the classes that occur, the mean of the two
    middle ones if their number is even; a class that never occurs gets weight 0.

    SegNet's published weights for CamVid (`fastseg.models.segnet.CAMVID_CLASS_WEIGHTS`) follow this rule over
    12 classes, void included: on the 367 published training images it reproduces them to within 11%, except
    the weight of "sign".

    Args:
        label_maps: the label maps of the images: an iterable of tensors of any shape, such as ``(H, W)``, or
            one tensor ``(N, H, W)``. int64, int32, int16 or uint8.
        num_classes: C.
        ignore_index: label of the pixels that are not counted; None for none.

    Returns:
        float32 (C,) on the CPU.

    Raises:
        TypeError: a label map is not a tensor.
        RuntimeError: it has another dtype.
        IndexError: a label is neither in [0, C) nor ignore_index.
        ValueError: no pixel is labelled, or ``num_classes`` is below 1.
    """
    name = "fastseg.nn.median_frequency_weights"
    if num_classes < 1:
        raise ValueError(f"{name}: num_classes is {num_classes}; allowed: 1 or more")
    ignore_index = NO_LABEL if ignore_index is None else ignore_index
    pixels = torch.zeros(num_classes, dtype=torch.int64)  # of each class
    pixels_around = torch.zeros(num_classes, dtype=torch.int64)  # of the images that contain it
    for labels in label_maps:
        counts = _count_labels(name, labels, num_classes, ignore_index)
        pixels += counts
        pixels_around += torch.where(counts > 0, counts.sum(), 0)
    occurs = pixels > 0
    if not occurs.any():
        raise ValueError(f"{name}: label_maps has no labelled pixel; allowed: 1 or more")
    frequency = pixels.double() / pixels_around
    weight = frequency[occurs].quantile(0.5) / frequency
    return torch.where(occurs, weight, 0).float()


def _count_labels(name, labels, num_classes, ignore_index):
    """The number of pixels of each class: int64 (num_classes,)."""
    if not isinstance(labels, torch.Tensor):
        raise TypeError(f"{name}: label_maps holds {type(labels).__name__}; allowed: tensors")
    if labels.dtype not in _LABEL_DTYPES:
        allowed = ", ".join(map(dtype_name, _LABEL_DTYPES))
        raise RuntimeError(f"{name}: label_maps holds dtype {dtype_name(labels.dtype)}; allowed: {allowed}")
    labels = labels.cpu().long().flatten()
    labels = labels[labels != ignore_index]
    if labels.numel() and not 0 <= labels.min() <= labels.max() < num_classes:
        bad = labels[(labels < 0) | (labels >= num_classes)][0].item()
        raise IndexError(
            f"{name}: label_maps holds label {bad}; allowed: [0, {num_classes}) and ignore_index={ignore_index}"
        )
    return labels.bincount(minlength=num_classes)
