"""Bilinear upsampling fused with argmax over the classes: from low-resolution logits to a label map in one pass.

    label[n, Y, X] = argmax_c sum over the four neighbours (y, x) of weight(Y, y) weight(X, x) input[n, c, y, x]

with PyTorch's sampling rule; the first maximum wins and NaN is the maximum, as in torch.argmax. The upsampled
logits are never stored, and classes that cannot win at a pixel are not computed there: see
kernels/upsample_argmax/README.md.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastseg import _check
from fastseg._backend import rows
from fastseg._bilinear import output_size_and_scales
from fastseg._dtypes import FLOATING, FLOATING_GPU
from fastseg._op import Op
from fastseg.kernels.upsample_argmax import reference

_ARGUMENTS = "Tensor input, SymInt[] size, float[]? scales, bool align_corners, ScalarType dtype"


def check(input, dtype):
    _check.argument("upsample_argmax", "input", input, FLOATING, input.shape)
    _check.one_of("upsample_argmax", "dtype", dtype, (torch.int64, torch.uint8))
    if input.dim() != 4 or 0 in input.shape[1:]:
        raise RuntimeError(
            f"fastseg.ops.upsample_argmax: input has shape {tuple(input.shape)}; "
            "allowed: (N, C, h, w) with C, h and w of at least 1"
        )
    if dtype == torch.uint8 and input.shape[1] > 256:
        raise ValueError(
            f"fastseg.ops.upsample_argmax: dtype=torch.uint8 for {input.shape[1]} classes; "
            "allowed: up to 256, else int64"
        )


def outputs(input, size, dtype):
    return input.new_empty((input.shape[0], *size), dtype=dtype)


upsample_argmax_op = Op(
    f"upsample_argmax({_ARGUMENTS}) -> Tensor labels",
    check=check,
    outputs=outputs,
    backends=rows(reference.upsample_argmax, cpu=FLOATING_GPU, triton="upsample_argmax.triton.upsample_argmax"),
)


def outputs_with_probability(input, size, dtype):
    labels = outputs(input, size, dtype)
    return labels, torch.empty_like(labels, dtype=torch.float32)


upsample_argmax_probability_op = Op(
    f"upsample_argmax_probability({_ARGUMENTS}) -> (Tensor labels, Tensor probability)",
    check=check,
    outputs=outputs_with_probability,
    backends=rows(
        reference.upsample_argmax_probability,
        cpu=FLOATING_GPU,
        triton="upsample_argmax.triton.upsample_argmax_probability",
    ),
)


def upsample_argmax(
    input: Tensor,
    size: int | Sequence[int] | None = None,
    scale_factor: float | Sequence[float] | None = None,
    align_corners: bool = False,
    *,
    dtype: torch.dtype = torch.int64,
    return_probability: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """`F.interpolate(input, size, scale_factor, mode="bilinear", align_corners=align_corners).argmax(1)` in one pass.

    The upsampled logits are never stored: besides the results, only a few source rows per thread are kept. With the
    size of the input it is a fast `input.argmax(1)`, except that infinities count as NaN, as F.interpolate gives them.
    Half inputs are interpolated in fp32, so the labels are those of the fp32 computation. The results are
    not differentiable.

    Args:
        input: logits (N, C, h, w), contiguous, channels_last or any other strides; float32, float16, bfloat16
            (float64 through the plain PyTorch reference, which stores the upsampled logits).
        size: output size, one integer or (H, W).
        scale_factor: instead of size, one number or one each for height and width; sampling then uses
            1/scale_factor as torch.nn.functional.interpolate does.
        align_corners: whether the centres of the corner pixels of input and output coincide.
        dtype: of the labels, torch.int64 or torch.uint8 (at most 256 classes).
        return_probability: also return the softmax probability of the label.
        backend: "auto" or one backend's name.

    Returns:
        Labels (N, H, W) of `dtype`; the first maximum wins, and the first NaN is the maximum, as for
        torch.argmax. With return_probability the pair of labels and probabilities (N, H, W), float32; NaN
        where a class is NaN.

    Raises:
        TypeError: input is not a tensor.
        ValueError: size and scale_factor are both or neither given or not positive; dtype is not one of the
            two, or is uint8 for more than 256 classes.
        RuntimeError: input is not four-dimensional, has no classes or pixels, or has another dtype.
    """
    _check.tensor("upsample_argmax", "input", input)
    _check.booleans("upsample_argmax", align_corners=align_corners, return_probability=return_probability)
    out_size, scales = output_size_and_scales("upsample_argmax", input, size, scale_factor)
    if out_size is None:
        raise ValueError("fastseg.ops.upsample_argmax: size and scale_factor: neither given; allowed: one of them")
    op = upsample_argmax_probability_op if return_probability else upsample_argmax_op
    return op(input.detach(), out_size, scales, align_corners, dtype, backend=backend)
