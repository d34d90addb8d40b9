"""roi_pool: the maximum of each bin of each box of a feature map.

    output[k, c, i, j] = max of input[n_k, c] over the cells of bin (i, j) of box k

Boxes are rounded to whole cells and include their last row and column; bins may share a row or a column of cells. The
index of each maximum is kept: its gradient goes there. Source: Girshick, Fast R-CNN; as torchvision.ops.roi_pool.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastseg import _check
from fastseg._backend import rows
from fastseg._dtypes import FLOATING_GPU
from fastseg._op import THROUGH_REFERENCE, Op
from fastseg._rois import (
    as_rows,
    check_boxes,
    check_grad_output,
    check_input,
    check_output_size,
    empty,
    is_channels_last,
)
from fastseg.kernels.roi_pool import reference

_NAME = "roi_pool"
_MOST_CELLS = 2**31 - 1  # of a plane, for int32 indices


def check(input, boxes, output_size):
    check_input(_NAME, "input", input)
    check_plane(input.shape[2:])
    check_boxes(_NAME, boxes, input)
    check_output_size(_NAME, output_size)


def check_plane(size):
    if type(size[0]) is int and type(size[1]) is int and size[0] * size[1] > _MOST_CELLS:
        raise RuntimeError(f"fastseg.ops.{_NAME}: input has planes of {size[0]}x{size[1]}; allowed: below 2^31 cells")


def outputs(input, boxes, output_size, channels_last):
    output = empty(input, (boxes.shape[0], input.shape[1], *output_size), channels_last)
    return output, torch.empty_like(output, dtype=torch.int32)


def backward(shape_input, argmax, boxes, spatial_scale, channels_last, grad_output, backend):
    images, _, height, width = shape_input
    size = [images, height, width]
    return {"input": roi_pool_backward(grad_output, argmax, boxes, size, spatial_scale, channels_last, backend=backend)}


roi_pool_op = Op(
    "roi_pool(Tensor input, Tensor boxes, SymInt[] output_size, float spatial_scale, bool channels_last)"
    " -> (Tensor output, Tensor argmax)",
    check=check,
    outputs=outputs,
    backward=backward,
    accumulated=("boxes",),
    image_layout=("input",),
    backends=rows(reference.roi_pool, cuda=FLOATING_GPU),
)


def check_backward(grad_output, argmax, boxes, size):
    name = "roi_pool_backward"
    check_grad_output(name, grad_output, boxes)
    _check.argument(name, "argmax", argmax, (torch.int32,), grad_output.shape, like=("grad_output", grad_output))
    check_plane(size[1:])


def outputs_backward(grad_output, size, channels_last):
    return empty(grad_output, (size[0], grad_output.shape[1], *size[1:]), channels_last)


roi_pool_backward = Op(
    "roi_pool_backward(Tensor grad_output, Tensor argmax, Tensor boxes, SymInt[] size, float spatial_scale,"
    " bool channels_last) -> Tensor grad_input",
    check=check_backward,
    outputs=outputs_backward,
    backward=THROUGH_REFERENCE,
    internal=True,
    accumulated=("boxes",),
    image_layout=("argmax", "grad_output"),
    backends=rows(reference.roi_pool_backward, cuda=FLOATING_GPU),
)


def roi_pool(
    input: Tensor,
    boxes: Tensor | Sequence[Tensor],
    output_size: int | Sequence[int],
    spatial_scale: float = 1.0,
    *,
    backend: str = "auto",
) -> Tensor:
    """Maximum of the cells in each bin of each box; drop-in for torchvision.ops.roi_pool.

    Args:
        input: (N, C, H, W), empty in N only; float32, float16, bfloat16 or float64; contiguous, channels_last or any
            other strides.
        boxes: (K, 5) rows (batch index, x1, y1, x2, y2) in pixels of the image, or a list of N tensors (L, 4), one
            for each image; any floating dtype.
        output_size: bins (PH, PW), or one int for both.
        spatial_scale: cells of the feature map per pixel of the image. Scaled boxes are rounded, halves away from 0.
        backend: "auto", "cpu", "cuda" or "reference".

    Returns:
        (K, C, PH, PW) in the dtype and memory format of input; 0 in bins without a cell and in all bins of a box that
        is not finite. Of equal maxima the first gets the gradient; a NaN is above every number, of NaNs the last
        counts. Differentiable any number of times with respect to input (boxes get no gradient); the gradient, summed
        in fp32 for half types, is the same on every run.

    Raises:
        IndexError: on CPU a batch index outside of [0, N). On GPU, where checking would stall the stream, such boxes
            give 0.
        RuntimeError: shapes, dtypes or devices that do not fit.
        ValueError: a spatial_scale that is not a positive number.
        TypeError: arguments of other types.
    """
    if not isinstance(input, Tensor):
        _check.tensor(_NAME, "input", input)
    output_size = _check.pair(_NAME, "output_size", output_size)
    spatial_scale = _check.positive(_NAME, "spatial_scale", spatial_scale)
    boxes = as_rows(_NAME, boxes, input)
    return roi_pool_op(input, boxes, output_size, spatial_scale, is_channels_last(input), backend=backend)[0]
