"""The reduced cross-entropy of bilinearly upsampled logits, optionally with its gradient, in one call."""

import torch

from fastseg._dtypes import accumulator
from fastseg._early_gradient import scaled_mean, share
from fastseg._layout import empty_as
from fastseg._op import Op
from fastseg.kernels.upsample_cross_entropy import reference
from fastseg.ops.upsample_cross_entropy.common import CONTIGUOUS, INPUTS, SAMPLING, backends, check
from fastseg.ops.upsample_cross_entropy.pixels import upsample_cross_entropy_pixels_backward


def outputs(input, with_gradient, dtype):
    """The loss, the fp64 divisor `count` of its mean, and count * its gradient (no elements unless requested)."""
    dtype_of_gradient = accumulator(input.dtype)
    gradient = empty_as(input, dtype_of_gradient) if with_gradient else input.new_empty(0, dtype=dtype_of_gradient)
    return input.new_empty((), dtype=dtype), input.new_empty((), dtype=torch.float64), gradient


def backward(
    input, target, weight, pixel_weight, count, gradient, grad_loss, scale_factors, align_corners, ignore_index,
    label_smoothing, with_gradient, backend,
):  # fmt: skip
    if with_gradient and not torch.is_grad_enabled():
        return {"input": scaled_mean(gradient, grad_loss, count, input.dtype)}
    grad_losses = share(grad_loss, count).to(accumulator(input.dtype)).expand(target.shape)
    grad_input = upsample_cross_entropy_pixels_backward(
        input, target, weight, pixel_weight, grad_losses, scale_factors, align_corners, ignore_index, label_smoothing,
        backend=backend,
    )  # fmt: skip
    return {"input": grad_input}


upsample_cross_entropy_op = Op(
    f"upsample_cross_entropy({INPUTS}, {SAMPLING}, bool mean, bool zero_if_empty, bool with_gradient, ScalarType dtype)"
    " -> (Tensor loss, Tensor count, Tensor gradient)",
    check=check,
    outputs=outputs,
    backward=backward,
    internal=True,
    contiguous=CONTIGUOUS,
    backends=backends("loss", reference.upsample_cross_entropy),
)
