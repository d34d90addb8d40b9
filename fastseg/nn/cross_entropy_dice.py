"""`DiceLoss` and `CrossEntropyDiceLoss`."""

from fastseg import ops
from fastseg.nn._loss import Loss


class DiceLoss(Loss):
    """`fastseg.ops.dice_loss` as a module: the arguments are documented there.

    ``forward`` takes logits ``(N, C, d1, ..., dk)`` and integer labels ``(N, d1, ..., dk)``.
    """

    def __init__(
        self,
        weight=None,
        *,
        ignore_index=-100,
        include_background=True,
        squared=True,
        smooth=1e-6,
        per_image=False,
        reduction="mean",
        process_group=None,
    ):
        super().__init__(
            "weight",
            weight,
            ignore_index=ignore_index,
            include_background=include_background,
            squared=squared,
            smooth=smooth,
            per_image=per_image,
            reduction=reduction,
            process_group=process_group,
        )

    def forward(self, input, target):
        return ops.dice_loss(input, target, self.weight, **self.options())


class CrossEntropyDiceLoss(Loss):
    """`fastseg.ops.cross_entropy_dice` as a module: the arguments are documented there.

    ``forward`` takes logits ``(N, C, d1, ..., dk)``, integer labels ``(N, d1, ..., dk)`` and optionally one
    factor per label, ``pixel_weight``, for the cross-entropy.
    """

    def __init__(
        self,
        weight=None,
        *,
        ce_weight=1.0,
        dice_weight=1.0,
        ignore_index=-100,
        label_smoothing=0.0,
        include_background=True,
        squared=True,
        smooth=1e-6,
        per_image=False,
        zero_if_empty=False,
        process_group=None,
    ):
        super().__init__(
            "weight",
            weight,
            ce_weight=ce_weight,
            dice_weight=dice_weight,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            include_background=include_background,
            squared=squared,
            smooth=smooth,
            per_image=per_image,
            zero_if_empty=zero_if_empty,
            process_group=process_group,
        )

    def forward(self, input, target, pixel_weight=None):
        options = self.options()
        return ops.cross_entropy_dice(input, target, self.weight, pixel_weight=pixel_weight, **options)
