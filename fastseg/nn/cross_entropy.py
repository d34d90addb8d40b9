"""`CrossEntropyLoss`, a drop-in for ``torch.nn.CrossEntropyLoss``."""

from torch import nn

from fastseg import ops
from fastseg.nn._drop_in import drop_in


@drop_in(nn.CrossEntropyLoss, own_options=("zero_if_empty",), own_none=("ignore_index",))
class CrossEntropyLoss(nn.CrossEntropyLoss):
    """``torch.nn.CrossEntropyLoss`` through `fastseg.ops.cross_entropy`, where shapes and errors are documented.

    Arguments and attributes are those of the stock class, and also:

    Args:
        ignore_index: also None, for no label.
        zero_if_empty: a mean over no valid pixel is 0 instead of NaN.

    ``forward`` takes an optional ``pixel_weight``, one factor per target (the weight map of U-Net).
    """

    zero_if_empty = False  # for stock modules whose class `fastseg.accelerate` changed

    def __init__(
        self,
        weight=None,
        size_average=None,
        ignore_index=-100,
        reduce=None,
        reduction="mean",
        label_smoothing=0.0,
        *,
        zero_if_empty=False,
    ):
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.zero_if_empty = zero_if_empty

    def forward(self, input, target, pixel_weight=None):
        return ops.cross_entropy(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            pixel_weight=pixel_weight,
            zero_if_empty=self.zero_if_empty,
        )
