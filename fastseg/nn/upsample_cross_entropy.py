"""`UpsampleCrossEntropyLoss`: bilinear upsampling and cross-entropy in one."""

from fastseg import ops
from fastseg.nn._loss import Loss


class UpsampleCrossEntropyLoss(Loss):
    """`fastseg.ops.upsample_cross_entropy` as a module: the arguments are documented there.

    Replaces a bilinear ``torch.nn.Upsample`` at the end of a network and the ``CrossEntropyLoss`` after it,
    without storing the upsampled logits. ``forward`` takes low-resolution logits ``(N, C, h, w)``, labels
    ``(N, H, W)`` and optionally one factor per label, ``pixel_weight``.
    """

    def __init__(
        self,
        size=None,
        scale_factor=None,
        align_corners=False,
        weight=None,
        ignore_index=-100,
        reduction="mean",
        label_smoothing=0.0,
        *,
        zero_if_empty=False,
    ):
        super().__init__(
            "weight",
            weight,
            size=size,
            scale_factor=scale_factor,
            align_corners=align_corners,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
            zero_if_empty=zero_if_empty,
        )

    def forward(self, input, target, pixel_weight=None):
        options = self.options()
        return ops.upsample_cross_entropy(input, target, weight=self.weight, pixel_weight=pixel_weight, **options)
