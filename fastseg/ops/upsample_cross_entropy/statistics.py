"""The Dice sums and the two sums of the cross-entropy of bilinearly upsampled logits, and their gradient.

As `fastseg.ops.cross_entropy_dice.statistics` of the upsampled logits, which are never stored.
"""

from fastseg._layout import empty_as
from fastseg._op import THROUGH_REFERENCE, Op
from fastseg.kernels.upsample_cross_entropy import reference
from fastseg.ops.cross_entropy_dice.statistics import check_gradients, outputs
from fastseg.ops.upsample_cross_entropy.common import CONTIGUOUS, INPUTS, SAMPLING, backends, check


def backward(
    input, target, weight, pixel_weight, grad_intersection, grad_prediction, grad_numerator,
    scale_factors, align_corners, ignore_index, label_smoothing, squared, backend,
):  # fmt: skip
    grad_input = upsample_softmax_statistics_backward(
        input, target, weight, pixel_weight, grad_intersection, grad_prediction, grad_numerator,
        scale_factors, align_corners, ignore_index, label_smoothing, squared, backend=backend,
    )  # fmt: skip
    return {"input": grad_input}


upsample_softmax_statistics = Op(
    f"upsample_softmax_statistics({INPUTS}, {SAMPLING}, bool squared) -> "
    "(Tensor intersection, Tensor prediction, Tensor truth, Tensor numerator, Tensor denominator)",
    check=check,
    outputs=outputs,
    backward=backward,
    internal=True,
    contiguous=CONTIGUOUS,
    backends=backends("statistics", reference.upsample_softmax_statistics),
)


def check_backward(
    input, target, weight, pixel_weight, grad_intersection, grad_prediction, grad_numerator, label_smoothing
):
    check(input, target, weight, pixel_weight, label_smoothing)
    name = "upsample_softmax_statistics_backward"
    check_gradients(name, input.shape[:2], grad_intersection, grad_prediction, grad_numerator)


upsample_softmax_statistics_backward = Op(
    f"upsample_softmax_statistics_backward({INPUTS}, Tensor grad_intersection, Tensor grad_prediction,"
    f" Tensor grad_numerator, {SAMPLING}, bool squared) -> Tensor grad_input",
    check=check_backward,
    outputs=lambda input: empty_as(input),
    backward=THROUGH_REFERENCE,
    internal=True,
    contiguous=(*CONTIGUOUS, "grad_intersection", "grad_prediction"),
    backends=backends("statistics_backward", reference.upsample_softmax_statistics_backward),
)
