"""`FocalLoss`."""

from fastseg import ops
from fastseg.nn._loss import Loss


class FocalLoss(Loss):
    """`fastseg.ops.focal_loss` (softmax focal loss) as a module: the arguments are documented there.

    ``forward`` takes logits ``(N, C, d1, ..., dk)``, integer labels ``(N, d1, ..., dk)`` and optionally one
    factor per label, ``pixel_weight``.
    """

    def __init__(self, alpha=None, gamma=2.0, ignore_index=-100, reduction="mean", *, zero_if_empty=False):
        super().__init__(
            "alpha",
            alpha,
            gamma=gamma,
            ignore_index=ignore_index,
            reduction=reduction,
            zero_if_empty=zero_if_empty,
        )

    def forward(self, input, target, pixel_weight=None):
        return ops.focal_loss(input, target, self.alpha, pixel_weight=pixel_weight, **self.options())
