"""Cross-entropy of bilinearly upsampled logits at every pixel, and its gradient on the source grid."""

from fastseg import _check
from fastseg._dtypes import accumulator
from fastseg._layout import empty_as
from fastseg._op import THROUGH_REFERENCE, Op
from fastseg.kernels.upsample_cross_entropy import reference
from fastseg.ops.upsample_cross_entropy.common import CONTIGUOUS, INPUTS, SAMPLING, backends, check


def backward(
    input, target, weight, pixel_weight, grad_losses, scale_factors, align_corners, ignore_index, label_smoothing,
    backend,
):  # fmt: skip
    grad_input = upsample_cross_entropy_pixels_backward(
        input, target, weight, pixel_weight, grad_losses, scale_factors, align_corners, ignore_index, label_smoothing,
        backend=backend,
    )  # fmt: skip
    return {"input": grad_input}


upsample_cross_entropy_pixels = Op(
    f"upsample_cross_entropy_pixels({INPUTS}, {SAMPLING}) -> Tensor losses",
    check=check,
    outputs=lambda input, target: input.new_empty(target.shape, dtype=accumulator(input.dtype)),
    backward=backward,
    internal=True,
    contiguous=CONTIGUOUS,
    backends=backends("pixels", reference.upsample_cross_entropy_pixels),
)


def check_backward(input, target, weight, pixel_weight, grad_losses, label_smoothing):
    check(input, target, weight, pixel_weight, label_smoothing)
    name = "upsample_cross_entropy_pixels_backward"
    _check.shape(name, "grad_losses", grad_losses, target.shape)
    _check.dtype(name, "grad_losses", grad_losses, (accumulator(input.dtype),))


# grad_losses may have any strides: 0 if all pixels have the same number.
upsample_cross_entropy_pixels_backward = Op(
    f"upsample_cross_entropy_pixels_backward({INPUTS}, Tensor grad_losses, {SAMPLING}) -> Tensor grad_input",
    check=check_backward,
    outputs=lambda input: empty_as(input),
    backward=THROUGH_REFERENCE,
    internal=True,
    contiguous=CONTIGUOUS,
    backends=backends("pixels_backward", reference.upsample_cross_entropy_pixels_backward),
)
